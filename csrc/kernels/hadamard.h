/* Rotations: orthonormal Hadamard transforms of blocks of a row, with signs flipped before or after.
 *
 * A block of order * power elements is multiplied by H_order (x) H_power. H_power, of Sylvester's order, goes by
 * butterflies (a, b) -> (a + b, a - b) at distances 1, 2, 4 ... within each run of `power` elements: the fast
 * Walsh-Hadamard transform. Then each element of the block is the sum, t rising, of those at the same place of all
 * runs, with the signs of a row of H_order. This order of the additions is the definition: bits depend on it. */
#include "kv_tables.h"

/* Blocks come to multiples of so many elements, as many as codes are made at a time (codebook.h): zeros fill them up.
 */
enum { QZ_PADDING = 64 };

/* Vectors that a pass over a block holds in registers, and what one pass multiplies the distance by; and vectors of a
 * block that is transformed at once. */
enum { QZ_PASS = 8, QZ_AT_ONCE = 16 };

/* The largest order. */
enum { QZ_MAX_ORDER = 28 };

typedef struct rotation_tables {
    _Alignas(64) int32_t flips[QZ_MAX_HEAD_DIM]; /* what turns the signs, by exclusive or */
    float outer[QZ_MAX_ORDER][QZ_MAX_ORDER];
} rotation_tables;

static void open_rotation(rotation_tables *tables, const qz_rotation *rotation) {
    const uint32_t *rows = rotation->order == 12   ? qz_kv_hadamard_12
                           : rotation->order == 20 ? qz_kv_hadamard_20
                                                   : qz_kv_hadamard_28;
    for (ptrdiff_t j = 0; rotation->is_signed && j < rotation->dimension; j += 8) {
        const uint32_t byte = qz_kv_signs[j / 8];
        for (int i = 0; i < 8; i++) tables->flips[j + i] = (int32_t)(byte << (31 - i) & 0x80000000u);
    }
    for (int i = 0; rotation->order > 1 && i < rotation->order; i++) {
        for (int t = 0; t < rotation->order; t++) tables->outer[i][t] = rows[i] >> t & 1 ? -1.0f : 1.0f;
    }
}

/* The butterfly within a vector as one operation: a product with 1 or -1 is exact, so that it is the same fused or
 * not. */
QZ_INLINE v_f32 butterfly_within(v_f32 v, int distance) {
    static const float signs[8][16] = {
        [1] = {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1},
        [2] = {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1},
        [4] = {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1},
        [0] = {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1},
    };
    return fma_f32(v, load_f32(signs[distance % 8]), partner_f32(v, distance));
}

QZ_INLINE void butterflies_within(v_f32 *v, int vectors, int power) {
    QZ_UNROLL
    for (int level = 0; level < 4; level++) {
        if (1 << level >= power || 1 << level >= QZ_LANES) break;
        QZ_UNROLL
        for (int i = 0; i < vectors; i++) v[i] = butterfly_within(v[i], 1 << level);
    }
}

/* Between 2, 4, 8 or 16 vectors. */
QZ_INLINE void butterflies_between(v_f32 *v, int vectors) {
    QZ_UNROLL
    for (int level = 0; level < 4; level++) {
        const int distance = 1 << level;
        if (distance >= vectors) break;
        QZ_UNROLL
        for (int i = 0; i < vectors / 2; i++) {
            const int at = i / distance * 2 * distance + i % distance;
            const v_f32 a = v[at], b = v[at + distance];
            v[at] = add_f32(a, b);
            v[at + distance] = sub_f32(a, b);
        }
    }
}

/* All butterflies of runs of `power` elements that `vectors` vectors hold, wholly or many of them. */
QZ_INLINE void transform_near(float *x, ptrdiff_t count, int vectors, int power) {
    for (ptrdiff_t at = 0; at < count; at += vectors * QZ_LANES) {
        v_f32 v[QZ_PASS];
        QZ_UNROLL
        for (int i = 0; i < vectors; i++) v[i] = load_f32(x + at + i * QZ_LANES);
        butterflies_within(v, vectors, power);
        butterflies_between(v, vectors);
        QZ_UNROLL
        for (int i = 0; i < vectors; i++) store_f32(x + at + i * QZ_LANES, v[i]);
    }
}

/* The butterflies at distances `near` to near * vectors / 2, in runs of near * vectors elements. */
QZ_INLINE void transform_far(float *x, ptrdiff_t count, int vectors, ptrdiff_t near) {
    for (ptrdiff_t at = 0; at < count; at += near * vectors) {
        for (ptrdiff_t l = 0; l < near; l += QZ_LANES) {
            v_f32 v[QZ_PASS];
            QZ_UNROLL
            for (int i = 0; i < vectors; i++) v[i] = load_f32(x + at + l + i * near);
            butterflies_between(v, vectors);
            QZ_UNROLL
            for (int i = 0; i < vectors; i++) store_f32(x + at + l + i * near, v[i]);
        }
    }
}

/* H_power over each run of `power` elements; count is a multiple of it, and of QZ_PADDING. */
static void walsh_hadamard(float *x, ptrdiff_t count, ptrdiff_t power) {
    ptrdiff_t near = power < QZ_PASS * QZ_LANES ? power : QZ_PASS * QZ_LANES;
    switch (near / QZ_LANES) {
    case 8: transform_near(x, count, 8, QZ_LANES); break;
    case 4: transform_near(x, count, 4, QZ_LANES); break;
    case 2: transform_near(x, count, 2, QZ_LANES); break;
    case 1: transform_near(x, count, 1, QZ_LANES); break;
    default:
        if (power == 8) transform_near(x, count, 1, 8);
        if (power == 4) transform_near(x, count, 1, 4);
        if (power == 2) transform_near(x, count, 1, 2);
    }
    while (near < power) {
        const ptrdiff_t vectors = power / near < QZ_PASS ? power / near : QZ_PASS;
        if (vectors == 8) transform_far(x, count, 8, near);
        if (vectors == 4) transform_far(x, count, 4, near);
        if (vectors == 2) transform_far(x, count, 2, near);
        near *= vectors;
    }
}

/* H_order over the runs of a block. */
static void combine_runs(float *x, const rotation_tables *tables, int order, ptrdiff_t power) {
    ptrdiff_t l = 0;
    for (; l + QZ_LANES <= power; l += QZ_LANES) {
        v_f32 v[QZ_MAX_ORDER];
        for (int t = 0; t < order; t++) v[t] = load_f32(x + t * power + l);
        for (int i = 0; i < order; i++) {
            v_f32 sum = mul_f32(v[0], set1_f32(tables->outer[i][0]));
            for (int t = 1; t < order; t++) sum = fma_f32(v[t], set1_f32(tables->outer[i][t]), sum);
            store_f32(x + i * power + l, sum);
        }
    }
    for (; l < power; l++) {
        float v[QZ_MAX_ORDER];
        for (int t = 0; t < order; t++) v[t] = x[t * power + l];
        for (int i = 0; i < order; i++) {
            float sum = v[0] * tables->outer[i][0];
            for (int t = 1; t < order; t++) sum += v[t] * tables->outer[i][t];
            x[i * power + l] = sum;
        }
    }
}

QZ_INLINE ptrdiff_t padded(ptrdiff_t block) { return (block + QZ_PADDING - 1) / QZ_PADDING * QZ_PADDING; }

/* A block and its zeros, signs turned. */
QZ_INLINE void load_block(float *x, const float *from, ptrdiff_t block, const int32_t *flips) {
    ptrdiff_t i = 0;
    for (; i + QZ_LANES <= block; i += QZ_LANES) {
        v_f32 v = load_f32(from + i);
        if (flips) v = f32_of_bits(xor_i32(bits_of_f32(v), load_i32(flips + i)));
        store_f32(x + i, v);
    }
    for (; i < block; i++) x[i] = flips && flips[i] ? -from[i] : from[i];
    for (; i < padded(block); i++) x[i] = 0.0f;
}

/* Times factor, signs turned. */
QZ_INLINE void store_block(float *to, const float *x, ptrdiff_t block, float factor, const int32_t *flips) {
    ptrdiff_t i = 0;
    for (; i + QZ_LANES <= block; i += QZ_LANES) {
        v_f32 v = mul_f32(load_f32(x + i), set1_f32(factor));
        if (flips) v = f32_of_bits(xor_i32(bits_of_f32(v), load_i32(flips + i)));
        store_f32(to + i, v);
    }
    for (; i < block; i++) to[i] = flips && flips[i] ? -(x[i] * factor) : x[i] * factor;
}

/* A block times H, not yet divided by the root of its size. */
QZ_INLINE void transform_block(float *x, const qz_rotation *rotation, const rotation_tables *tables) {
    walsh_hadamard(x, padded(rotation->block), rotation->power);
    if (rotation->order > 1) combine_runs(x, tables, rotation->order, rotation->power);
}

static void QZ_NAME(rotate)(const qz_rotate_job *job) {
    const qz_rotation *rotation = job->rotation;
    const ptrdiff_t block = rotation->block;
    const float factor = (float)(1.0 / sqrt((double)block));
    rotation_tables tables;
    _Alignas(64) float x[QZ_MAX_HEAD_DIM];
    open_rotation(&tables, rotation);
    const int32_t *before = rotation->is_signed && !job->is_inverse ? tables.flips : NULL;
    const int32_t *after = rotation->is_signed && job->is_inverse ? tables.flips : NULL;
    for (ptrdiff_t row = 0; row < job->rows; row++) {
        for (ptrdiff_t j = 0; j < rotation->dimension; j += block) {
            load_block(x, job->from + row * job->from_stride + j, block, before ? before + j : NULL);
            transform_block(x, rotation, &tables);
            store_block(job->to + row * job->to_stride + j, x, block, factor, after ? after + j : NULL);
        }
    }
}
