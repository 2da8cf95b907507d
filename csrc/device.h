/* What a device offers: one table of functions per device. The binding reaches every operation through it. */
#ifndef QZ_DEVICE_H
#define QZ_DEVICE_H

#include "args.h"
#include "formats.h"

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
    qz_status (*probe)(const qz_plan *, const qz_probe_args *, const qz_run *);
} qz_device;

extern const qz_device qz_cpu_device, qz_metal_device;

#endif
