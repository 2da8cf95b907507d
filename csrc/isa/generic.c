/* Portable C, on any CPU; its matmul is the definition itself. */
#define QZ_ISA_NAME generic
#include "../simd/generic.h"

#include "../kernels/begin.h"

#include "../elements/e8m0.h"
#include "../elements/fp4_e2m1.h"
#include "../elements/fp8_e4m3.h"
#include "../elements/uint.h"
#include "../kernels/convert.h"
#include "../kernels/fake_quantize.h"
#include "../kernels/fixed_point.h"
#include "../kernels/matmul_definition.h"
#include "../kernels/matmul_definition_fp.h"
#include "../kernels/matmul_float.h"
#include "../kernels/matmul_float_fp4.h"
#include "../kernels/probe.h"
#include "../kernels/quantize.h"
#include "../kernels/quantize_fp.h"

#include "../kernels/fp8.h"

#define QZ_MATMUL_NOTE "the definition in scalar C"
#define QZ_DECODE_SIZE(k, bits, block, digits) definition_size(k, block)
#define QZ_DECODE_PREPARE definition_prepare
#define QZ_DECODE_T definition_t
#define QZ_PREFILL_SIZE QZ_DECODE_SIZE
#define QZ_PREFILL_PREPARE definition_prepare
#define QZ_PREFILL_T definition_t
#define QZ_MATMUL_N definition_n
#define QZ_DECODE_T_FP8(job) definition_matmul_fp8(job, 1)
#define QZ_PREFILL_T_FP8 QZ_DECODE_T_FP8
#define QZ_MATMUL_N_FP8(job) definition_matmul_fp8(job, 0)
#include "../kernels/table.h"
