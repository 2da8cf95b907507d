/* The KV cache, in the target region of avx2.c. */
#define QZ_ALL_KERNELS "../kernels/kv.h"
#include "avx2.c"
