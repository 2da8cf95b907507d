/* The exact class of matmul for the fp family: its definition, in scalar C, as matmul_definition.h has that of affine
 * weights. With a global scale G, all of these results are multiplied by float(G / 2688) at the end.
 *
 * FP4 (mxfp4, nvfp4). Twice a number is an integer a, |a| <= 12, so that codes take the place of 5-bit ones less their
 * centre 16: x has p = 22, or 21 in blocks of 64, and 64 * 12 * (2^21 - 1) < 2^31. y = x Wᵀ, weights [N, K]: a block is
 * a group, of n = 32 or 16 elements with scale s.
 *
 *     v, e     x of the block in fixed point (fixed_point.h);  G = sum a v                       integers, exact
 *
 * mxfp4:   y   = y + (float(G) * s) * 2^(e-1), blocks in order of k, from y = 0                  each operation rounded
 *
 * nvfp4: groups are so small that what is done for each of them counts. Lanes along k hold chains of groups, and only
 * the ends of chains cross lanes; in each panel of 64 blocks (the last may be shorter),
 *
 *     c_j      = fused (float(G) * s) * 2^(e-1) + c_j over blocks = j modulo 16, in order of k, from 0
 *     y        = y + c_0, + c_1, ... + c_15; panels in order of k, from y = 0                    each operation rounded
 *
 * y = x W, weights [K, N] (groups along N). For each block of 64 elements of k (the last may be shorter) and each group
 * of outputs: t = x * s, v and e of t, G = sum a v, term = float(G) * 2^(e-1), and y = y + term in order of k. A block
 * with a NaN or Inf in x (in t) has as its term, which is added, the plain sum of (s * number) * x in order of k, from
 * 0.
 *
 * Error. |x - v 2^e| <= 2^(e-1) <= 2^-p max|x|, so a block adds at most 2^-p max|x| sum |W| by it; its term takes two
 * roundings of 2^-24 ([K, N]: t one more before that, and max|t| stands for max|x|), and the chain of B additions at
 * most B 2^-24 sum |term|. nvfp4, [N, K]: it passes through at most 4 in its chain and 16 for each of the ceil(B / 64)
 * panels, so that sums add at most (4 + 16 ceil(B / 64)) 2^-24 sum |term|. That is as long as nothing overflows: |G s|
 * is taken before 2^e, so that |s| must stay some 2^31 below float32's largest.
 *
 * FP8 (mxfp8). Numbers are integers of 18 bits, or up to 15 * 2^14: three digits of them against three of x would take
 * nine dots. But a weight has 4 bits only, so that s * number is a float32 (infinite where it overflows), and one fused
 * multiplication and addition, which every instruction set with vectors has, takes in x with all its bits. What is
 * fixed instead is the order, one that lanes along k and lanes of outputs can both follow, in either orientation:
 *
 *     in each panel of 256 elements of k (the last may be shorter), c_j = sum of x W over k = j modulo 16: a chain of
 *     fused operations in order of k, from 0
 *     term = c_0 + c_1 + ... + c_15 in this order;  y = y + term, panels in order of k, from y = 0
 *
 * NaN and Inf, in x as in weights, go where IEEE arithmetic takes them. Error: a product passes through at most 16
 * roundings in its chain, 15 on the way into the term and one for each of the ceil(K / 256) panels, each of 2^-24.
 *
 * A NaN result is stored as 0x7fc00000. tests/reference_fp.py has all bounds in full, as tests use them. */

static const int8_t twice_fp4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

/* `a` of elements [at, at + n) of a row of codes. */
QZ_INLINE void load_twice_fp4(int8_t *a, const uint8_t *row, ptrdiff_t at, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i++) a[i] = twice_fp4[code_at(row, at + i, 4)];
}

QZ_INLINE float float_dot_fp4(const int8_t *a, const int32_t *v, ptrdiff_t n) {
    int32_t sum = 0;
    for (ptrdiff_t i = 0; i < n; i++) sum += a[i] * v[i];
    return (float)sum;
}

/* The plain sum over a block; scales stand `step` apart. */
QZ_INLINE float plain_term_fp4(const float *x, const int8_t *a, ptrdiff_t n, const float *s, int step) {
    float term = 0.0f;
    for (ptrdiff_t i = 0; i < n; i++) {
        float weight = s[i * step] * (0.5f * (float)a[i]);
        term += weight * x[i];
    }
    return term;
}

/* One row of x, as the definition reads it, and one of weights. */
typedef struct rows_fp4 {
    const float *x;
    const int32_t *v;
    const block_record *records;
    const uint8_t *codes;
    const char *scales;
} rows_fp4;

QZ_INLINE rows_fp4 rows_of_fp4(const qz_matmul_job *job, ptrdiff_t row, const char *prepared) {
    const float *x = (const float *)prepared;
    const int32_t *v = (const int32_t *)(x + job->columns);
    return (rows_fp4){x, v, (const block_record *)(v + job->columns), job->w + row * job->w_row_stride,
                      job->scales.scales + row * job->scales.scale_row_stride};
}

/* What is added for block b: returned is the plain term where x is not finite, with *unit = 0, or float(G) * s, with
 * *unit = 2^(e-1). */
QZ_INLINE float dot_of_block_fp4(float *unit, const rows_fp4 *rows, ptrdiff_t b, const qz_matmul_job *job, int block) {
    const float s = load_one(rows->scales + b * job->scales.scale_group_stride, job->scales.scale_type);
    int8_t a[QZ_MAX_BLOCK];
    load_twice_fp4(a, rows->codes, b * block, block);
    *unit = 0.5f * rows->records[b].scale;
    if (*unit == 0.0f) return plain_term_fp4(rows->x + b * block, a, block, &s, 0);
    return float_dot_fp4(a, rows->v + b * block, block) * s;
}

QZ_INLINE float definition_output_mxfp4(const qz_matmul_job *job, const rows_fp4 *rows, int block) {
    float y = 0.0f;
    for (ptrdiff_t b = 0; b < job->columns / block; b++) {
        float unit;
        const float dot = dot_of_block_fp4(&unit, rows, b, job, block);
        y += unit == 0.0f ? dot : dot * unit;
    }
    return y;
}

QZ_INLINE float definition_output_nvfp4(const qz_matmul_job *job, const rows_fp4 *rows, int block) {
    const ptrdiff_t blocks = job->columns / block;
    float y = 0.0f, sums[QZ_NVFP4_CHAINS] = {0};
    for (ptrdiff_t b = 0; b < blocks; b++) {
        float unit, *sum = &sums[b % QZ_NVFP4_CHAINS];
        const float dot = dot_of_block_fp4(&unit, rows, b, job, block);
        *sum = unit == 0.0f ? *sum + dot : fmaf(dot, unit, *sum);
        if ((b + 1) % QZ_NVFP4_PANEL && b + 1 < blocks) continue;
        for (int j = 0; j < QZ_NVFP4_CHAINS; j++) y += sums[j];
        memset(sums, 0, sizeof sums);
    }
    return y;
}

QZ_INLINE void definition_matmul_t_fp4(const qz_matmul_job *job, int block) {
    for (ptrdiff_t m = 0; m < job->m; m++) {
        for (ptrdiff_t row = 0; row < job->rows; row++) {
            float *y = job->y + m * job->y_stride + row;
            const rows_fp4 rows = rows_of_fp4(job, row, job->x + m * job->x_stride);
            *y = block < 32 ? definition_output_nvfp4(job, &rows, block) : definition_output_mxfp4(job, &rows, block);
            make_nan_canonical(y, 1);
        }
    }
}

/* The k of [first, first + n), for one row of x and one group of outputs. */
QZ_INLINE void definition_block_n_fp4(const qz_matmul_job *job, ptrdiff_t m, ptrdiff_t group, ptrdiff_t first,
                                      ptrdiff_t n, int digits) {
    const qz_scales *from = &job->scales;
    const char *scales = from->scales + group * from->scale_group_stride + first * from->scale_row_stride;
    const float *x = (const float *)(job->x + m * job->x_stride) + first;
    float s[QZ_MAX_BLOCK], t[QZ_MAX_BLOCK];
    int32_t v[QZ_MAX_BLOCK];
    int e = 0;
    for (ptrdiff_t i = 0; i < n; i++) {
        s[i] = load_one(scales + i * from->scale_row_stride, from->scale_type);
        t[i] = x[i] * s[i];
    }
    const int finite = to_fixed_point(v, &e, t, n, fixed_point_bits(QZ_FP4, QZ_MAX_BLOCK, digits));
    for (ptrdiff_t column = group * job->group_size; column < (group + 1) * job->group_size; column++) {
        int8_t a[QZ_MAX_BLOCK];
        for (ptrdiff_t i = 0; i < n; i++) load_twice_fp4(a + i, job->w + (first + i) * job->w_row_stride, column, 1);
        job->y[m * job->y_stride + column] +=
            finite ? float_dot_fp4(a, v, n) * (0.5f * power_of_two(e)) : plain_term_fp4(x, a, n, s, 1);
    }
}

QZ_INLINE void definition_matmul_n_fp4(const qz_matmul_job *job, int digits) {
    memset(job->y, 0, (size_t)(job->m * job->y_stride) * sizeof *job->y);
    for (ptrdiff_t m = 0; m < job->m; m++) {
        for (ptrdiff_t group = 0; group < job->columns / job->group_size; group++) {
            for (ptrdiff_t first = 0; first < job->rows; first += QZ_MAX_BLOCK) {
                const ptrdiff_t left = job->rows - first;
                definition_block_n_fp4(job, m, group, first, left < QZ_MAX_BLOCK ? left : QZ_MAX_BLOCK, digits);
            }
        }
    }
    make_nan_canonical(job->y, job->m * job->y_stride);
}

/* Both families by their bits. */
QZ_INLINE void definition_t(const qz_matmul_job *job, int bits, int block, int digits) {
    if (bits == QZ_FP4) {
        definition_matmul_t_fp4(job, block);
    } else {
        definition_matmul_t(job, bits, block, digits);
    }
}

QZ_INLINE void definition_n(const qz_matmul_job *job, int bits, int digits) {
    if (bits == QZ_FP4) {
        definition_matmul_n_fp4(job, digits);
    } else {
        definition_matmul_n(job, bits, digits);
    }
}

/* ---- FP8 ---- */

/* The weight at (row, column) of the stored matrix. */
QZ_INLINE float weight_fp8(const qz_matmul_job *job, ptrdiff_t row, ptrdiff_t column) {
    const qz_scales *from = &job->scales;
    const char *scale = from->scales + row * from->scale_row_stride;
    const float s = load_one(scale + column / job->group_size * from->scale_group_stride, from->scale_type);
    return s * qz_f32_from_e4m3(job->w[row * job->w_row_stride + column]);
}

/* One output; weights [N, K] or [K, N]. */
QZ_INLINE float definition_output_fp8(const qz_matmul_job *job, const float *x, ptrdiff_t output, ptrdiff_t k,
                                      int transpose) {
    float y = 0.0f;
    for (ptrdiff_t first = 0; first < k; first += QZ_FP8_PANEL) {
        const ptrdiff_t last = k - first < QZ_FP8_PANEL ? k : first + QZ_FP8_PANEL;
        float sums[QZ_FP8_CHAINS] = {0}, term;
        for (ptrdiff_t i = first; i < last; i++) {
            const float weight = transpose ? weight_fp8(job, output, i) : weight_fp8(job, i, output);
            sums[i % QZ_FP8_CHAINS] = fmaf(x[i], weight, sums[i % QZ_FP8_CHAINS]);
        }
        term = sums[0];
        for (int j = 1; j < QZ_FP8_CHAINS; j++) term += sums[j];
        y += term;
    }
    return y;
}

QZ_INLINE void definition_matmul_fp8(const qz_matmul_job *job, int transpose) {
    const ptrdiff_t outputs = transpose ? job->rows : job->columns, k = transpose ? job->columns : job->rows;
    for (ptrdiff_t m = 0; m < job->m; m++) {
        float *y = job->y + m * job->y_stride;
        const float *x = (const float *)(job->x + m * job->x_stride);
        for (ptrdiff_t output = 0; output < outputs; output++) {
            y[output] = definition_output_fp8(job, x, output, k, transpose);
        }
        make_nan_canonical(y, outputs);
    }
}
