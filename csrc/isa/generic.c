/* Portable C, on any CPU; its matmul is the definition itself. */
#define QZ_ISA_NAME generic
#include "../simd/generic.h"

#include "../kernels/begin.h"

#include "../elements/uint.h"
#include "../kernels/convert.h"
#include "../kernels/fake_quantize.h"
#include "../kernels/fixed_point.h"
#include "../kernels/matmul_definition.h"
#include "../kernels/matmul_float.h"
#include "../kernels/probe.h"
#include "../kernels/quantize.h"

#define QZ_MATMUL_NOTE "the definition in scalar C"
#define QZ_DECODE_SIZE(k, bits, block, digits) definition_size(k, block)
#define QZ_DECODE_PREPARE definition_prepare
#define QZ_DECODE_T definition_matmul_t
#define QZ_PREFILL_SIZE QZ_DECODE_SIZE
#define QZ_PREFILL_PREPARE definition_prepare
#define QZ_PREFILL_T definition_matmul_t
#define QZ_MATMUL_N definition_matmul_n
#include "../kernels/table.h"
