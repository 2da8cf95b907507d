/* All kernels of an ISA with vectors: what its unit of csrc/isa/ includes inside its target region. */
#include "begin.h"

#include "../elements/uint.h"
#include "convert.h"
#include "fake_quantize.h"
#include "fixed_point.h"
#include "planes.h"

#include "matmul.h"
#include "tile.h"
#include "prefill.h"
#include "matmul_n.h"
#include "matmul_float.h"
#include "probe.h"
#include "quantize.h"

#define QZ_MATMUL_NOTE "digit planes, " QZ_DOT_NAME
#define QZ_DECODE_SIZE(k, bits, block, digits) planes_size(k, block, digits)
#define QZ_DECODE_PREPARE prepare_planes
#define QZ_DECODE_T decode_t
#define QZ_PREFILL_SIZE strips_size
#define QZ_PREFILL_PREPARE prepare_strips
#define QZ_PREFILL_T prefill_t
#define QZ_MATMUL_N matmul_n
#include "table.h"
