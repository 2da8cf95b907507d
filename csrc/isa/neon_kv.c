/* The KV cache, in the target region of neon.c. */
#define QZ_ALL_KERNELS "../kernels/kv.h"
#include "neon.c"
