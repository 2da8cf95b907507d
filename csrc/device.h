/* What a device offers: one table of functions per device. The binding reaches every operation through it. */
#ifndef QZ_DEVICE_H
#define QZ_DEVICE_H

#include "args.h"
#include "formats.h"
#include "kernels_kv.h"

typedef struct qz_kernels qz_kernels;

/* What compile() resolves: where and by which kernels an operation runs. */
typedef struct qz_plan {
    const struct qz_device *device;
    const qz_kernels *kernels; /* NULL on devices without ISAs */
} qz_plan;

/* Leading (batch) dimensions agree; the last two are those of the operation. Shapes have been checked. */
typedef struct qz_quantize_args {
    qz_array w;                     /* [..., C] floats; zeros stand for those that the last group lacks */
    qz_array codes, scales, biases; /* [..., words], [..., groups] twice */
    int format, group_slot;
    qz_profile profile;
    /* The fp family has scales of bytes, and no biases: */
    qz_mx_scale mx_scale;
    float global_scale; /* 2688: as if there were none */
} qz_quantize_args;

typedef struct qz_dequantize_args {
    qz_array codes, scales, biases, w; /* w may leave out the end of the last group */
    int format, group_slot;
    qz_profile profile;
    qz_type product_type; /* what profile "cpu" computes in: the promotion of the scales' and biases' types; fp: w's */
    float global_scale;   /* fp, as above */
} qz_dequantize_args;

typedef struct qz_matmul_args {
    qz_array x, w, scales, biases, y; /* batch dimensions already broadcast: equal shapes, some strides 0. Along the
                                       * packed axis x (if transpose) or y may leave out the end of the last group. */
    int format, group_slot;
    int transpose; /* y = x Wᵀ, W [N, K]; else y = x W, W [K, N] */
    float factor;  /* of all results: 1, or nvfp4's global scale / 2688 */
    int digits;    /* 1, 2 or 3: how many digits of x count (kernels/fixed_point.h); 0: plain float32 sums instead */
} qz_matmul_args;

/* Products of some matrices of x with some of w. Their batch dimensions are their own, and y's are another's: the i-th
 * matrix of y, in C order as all of them, is that of matrix lhs[i] of x and matrix rhs[i] of w. */
typedef struct qz_gather_args {
    qz_matmul_args product;
    const ptrdiff_t *lhs, *rhs;
    ptrdiff_t count; /* matrices of y */
} qz_gather_args;

typedef struct qz_fake_quantize_args {
    qz_array x, y; /* equal shapes; y is float32; y may be x */
    int bits;
} qz_fake_quantize_args;

/* Plain FP8 (E4M3), floats to codes or back. */
typedef struct qz_fp8_args {
    qz_array floats, codes; /* equal shapes; codes are bytes */
    int is_decoding;
} qz_fp8_args;

/* The rotation that the KV cache applies to rows; equal shapes. y is float32, and may be x. */
typedef struct qz_fwht_args {
    qz_array x, y;
    qz_rotation rotation;
    int is_inverse;
} qz_fwht_args;

/* Rows of keys or values into codes. The last axes are those of a row; the axis before is one of n rows of x and of
 * C >= n slots of packed and norms: row i goes to slot (first + i) mod C. The axes before those agree. */
typedef struct qz_kv_encode_args {
    qz_array x, packed, norms; /* norms: float32 or float16 */
    qz_array z;                /* as x, float32: what is rounded; its data is NULL if nobody wants it */
    ptrdiff_t first;
    int counts_norms; /* norms is any array; the norm of the row whose codes stand at place i, in C order, is element i
                       */
    qz_kv_codec codec;
} qz_kv_encode_args;

/* And back; all axes but the last agree. */
typedef struct qz_kv_decode_args {
    qz_array packed, norms, y; /* y is float32 */
    int counts_norms;          /* as above */
    int stays_rotated;
    qz_kv_codec codec;
} qz_kv_decode_args;

/* Packed keys or values, [heads, capacity, bytes], and the norms or scales of their blocks, [heads, capacity, blocks].
 */
typedef struct qz_kv_side {
    qz_array codes, norms;
    qz_kv_codec codec;
    int norms_are_flat;              /* codec 1 from 1024 dimensions on: norms.flat[head * capacity + slot] */
    float norm_divisor, norm_factor; /* of what is stored, for the scale: one of them is 1 */
} qz_kv_side;

typedef enum qz_mask_kind { QZ_MASK_NONE, QZ_MASK_BOOL, QZ_MASK_FLOAT } qz_mask_kind;

/* q [query heads, queries, dimension], y [query heads, queries, value dimension], mask broadcast to [query heads,
 * queries, length]. Position i stands at slot (start + i) mod capacity. */
typedef struct qz_attention_args {
    qz_array q, y, mask;
    qz_kv_side keys, values;
    ptrdiff_t length, start, window; /* start < capacity */
    int is_causal, has_window;
    qz_mask_kind mask_kind;
    float scale, softcap; /* 0: none */
} qz_attention_args;

typedef enum qz_probe { QZ_PROBE_READ, QZ_PROBE_COPY, QZ_PROBE_STREAM, QZ_PROBE_FMA, QZ_PROBE_DOT, QZ_PROBES } qz_probe;

/* One ceiling, measured by doing its work `repeats` times while the caller looks at a clock. */
typedef struct qz_probe_args {
    qz_probe what;
    const char *from; /* READ, COPY, STREAM: `size` bytes, a multiple of QZ_PROBE_BLOCK */
    char *to;         /* COPY, STREAM: as many elsewhere, aligned to 64 bytes */
    ptrdiff_t size, repeats;
    double *done; /* set to the bytes read and written, or the multiplications and additions */
} qz_probe_args;

typedef struct qz_device {
    const char *name;
    /* NULL if the device can be used, else why not. */
    const char *(*unavailable)(void);
    qz_status (*quantize)(const qz_plan *, const qz_quantize_args *, const qz_run *);
    qz_status (*dequantize)(const qz_plan *, const qz_dequantize_args *, const qz_run *);
    qz_status (*matmul)(const qz_plan *, const qz_matmul_args *, const qz_run *);
    qz_status (*gather)(const qz_plan *, const qz_gather_args *, const qz_run *);
    qz_status (*fake_quantize)(const qz_plan *, const qz_fake_quantize_args *, const qz_run *);
    qz_status (*fp8)(const qz_plan *, const qz_fp8_args *, const qz_run *);
    qz_status (*fwht)(const qz_plan *, const qz_fwht_args *, const qz_run *);
    qz_status (*kv_encode)(const qz_plan *, const qz_kv_encode_args *, const qz_run *);
    qz_status (*kv_decode)(const qz_plan *, const qz_kv_decode_args *, const qz_run *);
    qz_status (*attention)(const qz_plan *, const qz_attention_args *, const qz_run *);
    qz_status (*probe)(const qz_plan *, const qz_probe_args *, const qz_run *);
} qz_device;

extern const qz_device qz_cpu_device, qz_metal_device;

#endif
