/* The exact class of matmul: its definition, in scalar C. Every other kernel equals this one bit for bit, at any thread
 * count and any M; it also does the blocks with NaN and Inf for all of them.
 *
 * y = x Wᵀ, weights [N, K] (groups along K). For each block of n = min(group size, 64) elements of k, with scale s,
 * bias b and centre c = 2^(bits-1):
 *
 *     v, e     x of the block in fixed point (fixed_point.h);  S = sum v;  G = sum (q - c) v       integers, exact
 *     term     = (float(G) * s + (b + c * s) * float(S)) * 2^e                                   each operation rounded
 *     y        = y + term, blocks in order of k, from y = 0
 *
 * In wide formats float(G) is float(H) * 65536 + float(L), the sums over the top digit and over the low two digits of
 * v.
 *
 * y = x W, weights [K, N] (groups along N). For each block of 64 elements of k (the last may be shorter) and each group
 * of outputs:
 *
 *     t = x * s, v and e_t, G as above;  z = x * (b + c * s), u and e_z with p = 22;  Z = sum u
 *     term = float(G) * 2^e_t + float(Z) * 2^e_z;  y = y + term
 *
 * A block with a NaN or Inf in x (in t or z) has as its term the plain sum of (s * q + b) * x in order of k, from 0. A
 * NaN result is stored as 0x7fc00000. No operation is fused: (c * s and H * 65536 are exact, so there it would not
 * matter).
 *
 * Error. |x - v 2^e| <= 2^(e-1) <= 2^-p max|x| in a block (p = 22, 21, 15, 7; for p = 15 up to a factor 1.004, as 32639
 * stands for 2^15 - 1; and at least 2^-127), so a block adds at most 2^-p max|x| sum |W| by it. Each term takes five
 * more roundings of 2^-24, relative to |G s| 2^e + |(b + c s) S| 2^e, and the chain of B additions at most B 2^-24 sum
 * |term|, as long as nothing overflows: |G s| is taken before 2^e, so that |s| must stay some 2^31 below float32's
 * largest. tests/reference.py has it in full, as tests use it. */

QZ_INLINE uint8_t code_at(const uint8_t *row, ptrdiff_t index, int bits) {
    ptrdiff_t bit = index * bits;
    unsigned pair = row[bit / 8];
    if (bit % 8 + bits > 8) pair |= (unsigned)row[bit / 8 + 1] << 8;
    return (uint8_t)(pair >> (bit % 8) & ((1u << bits) - 1));
}

/* rintf for |x| < 2^22: the sum has its last bit at 1. */
QZ_INLINE float nearest_even(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }

/* Returns 0, and leaves v and *exponent alone, if an element is not finite. */
static int to_fixed_point(int32_t *v, int *exponent, const float *x, ptrdiff_t n, int p) {
    uint32_t largest = 0;
    for (ptrdiff_t i = 0; i < n; i++) {
        uint32_t magnitude = qz_bits_of(x[i]) & 0x7fffffffu;
        if (magnitude > largest) largest = magnitude;
    }
    if (!is_finite_magnitude(largest)) return 0;
    *exponent = fixed_point_exponent(largest, p);
    for (ptrdiff_t i = 0; i < n; i++) v[i] = (int32_t)nearest_even(x[i] * power_of_two(-*exponent));
    return 1;
}

/* float(G) for codes q. The top digit of v in base 256, with the two below it between -128 and 127, is v + 0x8080
 * >> 16. */
QZ_INLINE float float_dot(const uint8_t *q, const int32_t *v, ptrdiff_t n, int bits, int wide) {
    int32_t low = 0, high = 0;
    for (ptrdiff_t i = 0; i < n; i++) {
        int32_t code = (int32_t)q[i] - QZ_CENTRE(bits), top = wide ? (v[i] + 0x8080) >> 16 : 0;
        low += code * (v[i] - 65536 * top);
        high += code * top;
    }
    return wide ? (float)high * 65536.0f + (float)low : (float)low;
}

QZ_INLINE int32_t sum_of(const int32_t *v, ptrdiff_t n) {
    int32_t sum = 0;
    for (ptrdiff_t i = 0; i < n; i++) sum += v[i];
    return sum;
}

/* The plain sum over a block. */
QZ_INLINE float plain_term(const float *x, const uint8_t *q, ptrdiff_t n, const float *s, const float *b, int step) {
    float term = 0.0f;
    for (ptrdiff_t i = 0; i < n; i++) {
        float weight = s[i * step] * (float)q[i] + b[i * step];
        term += weight * x[i];
    }
    return term;
}

/* A prepared row: x as it was, v, and for each block a record. */
typedef struct block_record {
    float scale, sum; /* 2^e, 0 if the block is not finite; float(S) */
} block_record;

QZ_INLINE size_t definition_size(ptrdiff_t k, int block) {
    return (size_t)k * (sizeof(float) + sizeof(int32_t)) + (size_t)(k / block) * sizeof(block_record);
}

QZ_INLINE int definition_prepare(char *prepared, const float *x, ptrdiff_t k, int bits, int block, int digits) {
    int32_t *v = (int32_t *)(prepared + k * (ptrdiff_t)sizeof *x);
    block_record *records = (block_record *)(v + k);
    memcpy(prepared, x, (size_t)k * sizeof *x);
    for (ptrdiff_t at = 0; at < k; at += block) {
        int exponent, finite = to_fixed_point(v + at, &exponent, x + at, block, fixed_point_bits(bits, block, digits));
        records[at / block] = (block_record){0.0f, 0.0f};
        if (finite) records[at / block] = (block_record){power_of_two(exponent), (float)sum_of(v + at, block)};
    }
    return 1;
}

QZ_INLINE float definition_output_t(const qz_matmul_job *job, ptrdiff_t row, const char *prepared, int bits, int block,
                                    int digits) {
    const ptrdiff_t k = job->columns;
    const float *x = (const float *)prepared;
    const int32_t *v = (const int32_t *)(x + k);
    const block_record *records = (const block_record *)(v + k);
    const qz_scales *from = &job->scales;
    float y = 0.0f;
    for (ptrdiff_t at = 0; at < k; at += block) {
        ptrdiff_t group = at / job->group_size;
        float s =
            load_one(from->scales + row * from->scale_row_stride + group * from->scale_group_stride, from->scale_type);
        float b =
            load_one(from->biases + row * from->bias_row_stride + group * from->bias_group_stride, from->bias_type);
        block_record record = records[at / block];
        uint8_t q[QZ_MAX_BLOCK];
        for (int i = 0; i < block; i++) q[i] = code_at(job->w + row * job->w_row_stride, at + i, bits);
        if (record.scale == 0.0f) {
            y += plain_term(x + at, q, block, &s, &b, 0);
            continue;
        }
        float dot = float_dot(q, v + at, block, bits, is_wide(bits, block, digits));
        y += (dot * s + (b + (float)QZ_CENTRE(bits) * s) * record.sum) * record.scale;
    }
    return y;
}

QZ_INLINE void definition_matmul_t(const qz_matmul_job *job, int bits, int block, int digits) {
    for (ptrdiff_t m = 0; m < job->m; m++) {
        for (ptrdiff_t row = 0; row < job->rows; row++) {
            float *y = job->y + m * job->y_stride + row;
            *y = definition_output_t(job, row, job->x + m * job->x_stride, bits, block, digits);
            make_nan_canonical(y, 1);
        }
    }
}

/* What all outputs of a group share in one block of k. */
typedef struct block_n {
    float x[QZ_MAX_BLOCK], s[QZ_MAX_BLOCK], b[QZ_MAX_BLOCK];
    int32_t v[QZ_MAX_BLOCK];
    float scale, shift; /* 2^e_t; float(Z) * 2^e_z */
    int finite;
} block_n;

static void definition_block_n(block_n *to, const qz_matmul_job *job, ptrdiff_t m, ptrdiff_t group, ptrdiff_t first,
                               ptrdiff_t n, int bits, int p) {
    const qz_scales *from = &job->scales;
    const char *scales = from->scales + group * from->scale_group_stride;
    const char *biases = from->biases + group * from->bias_group_stride;
    const float *x = (const float *)(job->x + m * job->x_stride) + first;
    float t[QZ_MAX_BLOCK], z[QZ_MAX_BLOCK];
    int32_t u[QZ_MAX_BLOCK];
    int e_t, e_z;
    for (ptrdiff_t i = 0; i < n; i++) {
        to->x[i] = x[i];
        to->s[i] = load_one(scales + (first + i) * from->scale_row_stride, from->scale_type);
        to->b[i] = load_one(biases + (first + i) * from->bias_row_stride, from->bias_type);
        t[i] = x[i] * to->s[i];
        z[i] = x[i] * (to->b[i] + (float)QZ_CENTRE(bits) * to->s[i]);
    }
    to->finite = to_fixed_point(to->v, &e_t, t, n, p) && to_fixed_point(u, &e_z, z, n, 22);
    if (!to->finite) return;
    to->scale = power_of_two(e_t);
    to->shift = (float)sum_of(u, n) * power_of_two(e_z);
}

/* One group of outputs for one row of x. */
QZ_INLINE void definition_group_n(const qz_matmul_job *job, ptrdiff_t m, ptrdiff_t group, int bits, int digits) {
    const int p = fixed_point_bits(bits, QZ_MAX_BLOCK, digits), wide = is_wide(bits, QZ_MAX_BLOCK, digits);
    for (ptrdiff_t first = 0; first < job->rows; first += QZ_MAX_BLOCK) {
        ptrdiff_t n = job->rows - first < QZ_MAX_BLOCK ? job->rows - first : QZ_MAX_BLOCK;
        block_n block;
        definition_block_n(&block, job, m, group, first, n, bits, p);
        for (ptrdiff_t column = group * job->group_size; column < (group + 1) * job->group_size; column++) {
            uint8_t q[QZ_MAX_BLOCK];
            for (ptrdiff_t i = 0; i < n; i++) q[i] = code_at(job->w + (first + i) * job->w_row_stride, column, bits);
            job->y[m * job->y_stride + column] += block.finite
                                                      ? float_dot(q, block.v, n, bits, wide) * block.scale + block.shift
                                                      : plain_term(block.x, q, n, block.s, block.b, 1);
        }
    }
}

QZ_INLINE void definition_matmul_n(const qz_matmul_job *job, int bits, int digits) {
    memset(job->y, 0, (size_t)(job->m * job->y_stride) * sizeof *job->y);
    for (ptrdiff_t m = 0; m < job->m; m++) {
        for (ptrdiff_t group = 0; group < job->columns / job->group_size; group++) {
            definition_group_n(job, m, group, bits, digits);
        }
    }
    make_nan_canonical(job->y, job->m * job->y_stride);
}
