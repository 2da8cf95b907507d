/* The KV cache, in the target region of avx512.c. */
#define QZ_ALL_KERNELS "../kernels/kv.h"
#include "avx512.c"
