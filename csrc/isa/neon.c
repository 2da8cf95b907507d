#include "../arch.h"
#ifndef QZ_ALL_KERNELS
#define QZ_ALL_KERNELS "../kernels/vector.h" /* but in neon_kv.c */
#endif
#if QZ_AARCH64
#define QZ_ISA_NAME neon
#include "../simd/neon.h"

#include QZ_ALL_KERNELS
#endif
