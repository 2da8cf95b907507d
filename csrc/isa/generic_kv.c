/* Portable C, on any CPU. */
#define QZ_ISA_NAME generic
#include "../simd/generic.h"

#include "../kernels/kv.h"
