#include "../arch.h"
#ifndef QZ_ALL_KERNELS
#define QZ_ALL_KERNELS "../kernels/vector.h" /* but in avx512_kv.c */
#endif
#if QZ_X86_64
#include <math.h>
#include <string.h>

/* On a CPU without AVX-512 the same unit can be tested with the intrinsics replaced by functions for AVX2, for which
 * the whole build is then compiled (cpu/select.c knows of it too). */
#ifdef QZ_EMULATE_AVX512
#include "emulate_avx512.h"
#define AVX512_BEGIN
#define AVX512_END
#else
#include <immintrin.h>
#define AVX512_BEGIN QZ_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")
#define AVX512_END QZ_TARGET_END
#endif

AVX512_BEGIN
#define QZ_ISA_NAME avx512
#include "../simd/avx512.h"

#include QZ_ALL_KERNELS
AVX512_END
#endif
