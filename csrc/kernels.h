/* The table of inner kernels that every ISA offers, and what those kernels are called with.
 *
 * Kernels return void, allocate nothing and trust their sizes: csrc/python/ has checked them. Rows and groups are
 * contiguous here; strides and stored types are dealt with by load and store. */
#ifndef QZ_KERNELS_H
#define QZ_KERNELS_H

#include "args.h"
#include "formats.h"
#include "kernels_kv.h"

/* Outputs of one job: QZ_PREFILL_ROWS, so that x stays in the caches meanwhile, or QZ_TILE_ROWS where threads could not
 * share them out evenly. For _n up to QZ_TILE_COLUMNS, so that
 * lines of weights are long, and more for few rows of x (cpu/matmul.c). */
enum {
    QZ_TILE_ROWS = 16,
    QZ_PREFILL_ROWS = 64,
    QZ_TILE_COLUMNS = 256,
    QZ_DECODE_ROWS = 16, /* rows of x that decode_t takes at most */
    QZ_MAX_BLOCK = 64,
    QZ_MAX_DIGITS = 3,
    QZ_MAX_GROUP = 128
};

/* FP8 weights (kernels/matmul_definition_fp.h): k of a panel, and the chains of sums in it. nvfp4: the same, but blocks
 * of a panel. */
enum { QZ_FP8_PANEL = 256, QZ_FP8_CHAINS = 16, QZ_NVFP4_PANEL = 64, QZ_NVFP4_CHAINS = 16 };

/* The float class: outputs of a tile at most, _t and _n, which is also the pitch of y; k of a job at most where weights
 * are decoded first, multiples of every group size. Up to QZ_FLOAT_FEW rows of x, _t multiplies codes as they are. */
enum {
    QZ_FLOAT_OUTPUTS = 64,
    QZ_FLOAT_OUTPUTS_N = 128,
    QZ_FLOAT_PANEL_T = 256,
    QZ_FLOAT_PANEL_N = 128,
    QZ_FLOAT_FEW = 7
};

/* Bytes after a run of packed codes that a kernel may overwrite, so that it need not count them. */
enum { QZ_SPILL = 128 };

/* How a tensor's stored scales and biases reach a kernel: element (row, group) stands at
 * data + row * row_stride + group * group_stride. */
typedef struct qz_scales {
    const char *scales, *biases;
    ptrdiff_t scale_row_stride, scale_group_stride, bias_row_stride, bias_group_stride;
    qz_type scale_type, bias_type;
} qz_scales;

/* Some rows of packed weights times M rows of x. */
typedef struct qz_matmul_job {
    const uint8_t *w; /* first packed row */
    ptrdiff_t w_row_stride;
    qz_scales scales; /* of the first packed row */
    ptrdiff_t group_size;
    ptrdiff_t rows;     /* _t: weight rows of this tile, at most QZ_PREFILL_ROWS; _n: k, all of them */
    ptrdiff_t columns;  /* _t: k, all of them; _n: outputs of this tile, whole groups */
    const char *x;      /* M rows: _t, as prepare_x left them; _n, float32 */
    ptrdiff_t x_stride; /* bytes from row to row */
    ptrdiff_t m;
    float *y; /* [m][y_stride]: set, not added to; y_stride is the largest tile's outputs, a multiple of QZ_TILE_ROWS */
    ptrdiff_t y_stride;
} qz_matmul_job;

typedef struct qz_quantize_job {
    const char *w;    /* groups * group_size values in memory order; float16 and bfloat16 need no alignment */
    qz_type w_type;   /* QZ_F32, QZ_F16 or QZ_BF16 */
    const char *next; /* what will be read after them, for the caches: `step` bytes for each value, which need not */
    ptrdiff_t step;   /* be there */
    ptrdiff_t groups, group_size;
    uint8_t *packed;        /* with QZ_SPILL bytes of room after the codes */
    float *scales, *biases; /* one a group, unrounded */
    /* The fp family, instead of scales and biases: */
    uint8_t *scale_codes;
    qz_mx_scale mx_scale;
    qz_type round_to;    /* profile "cpu": w's own type */
    float encode_factor; /* 1, or 2688 / the global scale */
} qz_quantize_job;

typedef struct qz_dequantize_job {
    const uint8_t *packed;
    ptrdiff_t groups, group_size;
    const float *scales, *biases;
    const uint8_t *scale_codes; /* the fp family: instead of scales and biases */
    float decode_factor;        /* 1, or the global scale / 2688 */
    qz_type round_products_to;  /* profile "cpu": the type in which MLX's CPU multiplies and adds; else QZ_F32 */
    char *w;                    /* contiguous, of any alignment */
    qz_type w_type;             /* QZ_F32, QZ_F16 or QZ_BF16 */
    int stream;                 /* stores bypass the caches; w is aligned to 16 bytes */
} qz_dequantize_job;

typedef struct qz_matmul_kernel {
    /* x in the form that multiply reads: bytes for one row, and the conversion, which returns 0 if an element of the
       row is not finite. */
    size_t (*prepared_size)(ptrdiff_t k);
    int (*prepare_x)(char *prepared, const float *x, ptrdiff_t k);
    void (*multiply)(const qz_matmul_job *);
} qz_matmul_kernel;

/* accumulate="float" (kernels/matmul_float.h, matmul_float_fp4.h). Jobs are those of the exact class, with y's pitches
 * as said above. decode_t reads rows as prepare leaves them, of prepared_size bytes each, and sets y; the others take
 * so much of k as said above, x being float32, and add to y. */
typedef struct qz_float_kernels {
    size_t (*prepared_size)(ptrdiff_t k, ptrdiff_t group_size);
    void (*prepare)(float *to, const float *x, ptrdiff_t k, ptrdiff_t group_size);
    void (*decode_t)(const qz_matmul_job *);
    void (*prefill_t)(const qz_matmul_job *);
    void (*matmul_n)(const qz_matmul_job *);
} qz_float_kernels;

typedef struct qz_format_kernels {
    void (*quantize[QZ_PROFILES])(const qz_quantize_job *);
    void (*dequantize)(const qz_dequantize_job *);
    /* y = x Wᵀ for few rows of x and for many (cpu/weights.h says which); same bits. Index: digits - 1. */
    qz_matmul_kernel decode_t[QZ_MAX_DIGITS], prefill_t[QZ_MAX_DIGITS];
    ptrdiff_t min_prefill[QZ_MAX_DIGITS]; /* at most QZ_DECODE_ROWS + 1 */
    void (*matmul_n[QZ_MAX_DIGITS])(const qz_matmul_job *);
    qz_float_kernels plain;
} qz_format_kernels;

/* What the ceilings are measured by (kernels/probe.h). Sizes are multiples of QZ_PROBE_BLOCK; an operation is a
 * multiplication or an addition. */
typedef struct qz_probe_kernels {
    void (*read)(const char *from, ptrdiff_t size);
    void (*stream)(char *to, const char *from, ptrdiff_t size); /* `to` is aligned to 64 bytes */
    void (*fma)(ptrdiff_t rounds);
    void (*dot)(ptrdiff_t rounds);
    ptrdiff_t fma_operations, dot_operations; /* of a round */
    const char *dot_name;                     /* the instruction */
} qz_probe_kernels;

typedef struct qz_kernels {
    const char *name;        /* of the ISA */
    const char *matmul_note; /* how the exact class is computed, for the repr of a compiled kernel */
    void (*load)(float *to, const char *from, ptrdiff_t stride, qz_type type, ptrdiff_t count);
    void (*store)(char *to, ptrdiff_t stride, qz_type type, const float *from, ptrdiff_t count);
    /* x is of any type but float64, in memory order; float16 and bfloat16 need no alignment. y may be x. stream:
       stores bypass the caches; y is not x then. */
    void (*fake_quantize)(float *y, const char *x, qz_type type, ptrdiff_t count, int bits, int stream);
    /* Plain FP8; floats of any type but float64, in memory order as the codes are. */
    void (*to_fp8)(uint8_t *to, const char *from, qz_type type, ptrdiff_t count);
    void (*from_fp8)(char *to, qz_type type, const uint8_t *from, ptrdiff_t count);
    const qz_format_kernels *(*format)(int format, int group_slot);
    qz_probe_kernels probe;
    const qz_kv_kernels *kv; /* of a unit of their own */
} qz_kernels;

#endif
