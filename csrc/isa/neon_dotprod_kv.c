/* The KV cache, in the target region of neon_dotprod.c. */
#define QZ_ALL_KERNELS "../kernels/kv.h"
#include "neon_dotprod.c"
