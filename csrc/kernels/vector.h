/* All kernels of an ISA with vectors: what its unit of csrc/isa/ includes inside its target region. */
#include "begin.h"

#include "../elements/e8m0.h"
#include "../elements/fp4_e2m1.h"
#include "../elements/fp8_e4m3.h"
#include "../elements/uint.h"
#include "convert.h"
#include "fake_quantize.h"
#include "fixed_point.h"
#include "planes.h"

#include "matmul.h"
#include "tile.h"
#include "prefill.h"
#include "lines.h"
#include "matmul_fp4.h"
#include "matmul_n.h"
#include "matmul_float.h"
#include "matmul_float_fp4.h"
#include "probe.h"
#include "quantize.h"
#include "quantize_fp.h"

#include "fp8.h"
#include "matmul_fp8.h"

#define QZ_MATMUL_NOTE "digit planes, " QZ_DOT_NAME
#define QZ_DECODE_SIZE(k, bits, block, digits) planes_size(k, block, digits)
#define QZ_DECODE_PREPARE prepare_planes
#define QZ_DECODE_T decode_any
#define QZ_PREFILL_SIZE strips_size
#define QZ_PREFILL_PREPARE prepare_strips
#define QZ_PREFILL_T prefill_any
#define QZ_MATMUL_N matmul_n
#define QZ_DECODE_T_FP8 QZ_NAME(decode_t_fp8)
#define QZ_PREFILL_T_FP8 QZ_NAME(prefill_t_fp8)
#define QZ_MATMUL_N_FP8 QZ_NAME(matmul_n_fp8)
#include "table.h"
