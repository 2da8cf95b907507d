/* All kernels of the KV cache: what a unit csrc/isa/<name>_kv.c includes inside its target region. They are a unit of
 * their own because that of the matmuls takes long to compile as it is. */
#include "begin.h"

#include "hadamard.h"

#include "codebook.h"
#include "kv_codec.h"

#if QZ_FUSED
#include "attention.h"
#else
#include "attention_definition.h"
#endif

extern const qz_kv_kernels QZ_NAME(qz_kv_kernels);
const qz_kv_kernels QZ_NAME(qz_kv_kernels) = {
    .rotate = QZ_NAME(rotate),
    .encode = QZ_NAME(encode),
    .decode = QZ_NAME(decode),
    .attention = {QZ_NAME(score), QZ_NAME(weigh), QZ_NAME(cap), QZ_NAME(soften), QZ_NAME(rescale), QZ_NAME(merge)},
};
