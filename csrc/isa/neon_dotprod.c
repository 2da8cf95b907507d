#include "../arch.h"
#ifndef QZ_ALL_KERNELS
#define QZ_ALL_KERNELS "../kernels/vector.h" /* but in neon_dotprod_kv.c */
#endif
#if QZ_AARCH64
#include <math.h>
#include <string.h>

/* The two compilers spell the feature differently, and before version 16 clang's header leaves out the dot product
 * intrinsics where the whole build lacks them, target region or not. */
#ifdef __clang__
#ifndef __ARM_FEATURE_DOTPROD
#define __ARM_FEATURE_DOTPROD 1
#endif
QZ_TARGET_BEGIN("dotprod")
#else
#include <arm_neon.h>
QZ_TARGET_BEGIN("arch=armv8.2-a+dotprod")
#endif
#define QZ_ISA_NAME neon_dotprod
#include "../simd/neon_dotprod.h"

#include QZ_ALL_KERNELS
QZ_TARGET_END
#endif
