#include "../arch.h"
#ifndef QZ_ALL_KERNELS
#define QZ_ALL_KERNELS "../kernels/vector.h" /* but in avx2_kv.c */
#endif
#if QZ_X86_64
#include <immintrin.h>
#include <math.h>
#include <string.h>

QZ_TARGET_BEGIN("avx2,fma,f16c")
#define QZ_ISA_NAME avx2
#include "../simd/avx2.h"

#include QZ_ALL_KERNELS
QZ_TARGET_END
#endif
