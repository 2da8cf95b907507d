#include "../arch.h"
#if QZ_AARCH64
#define QZ_ISA_NAME neon
#include "../simd/neon.h"

#include "../kernels/vector.h"
#endif
