/* Rotations: orthonormal Hadamard transforms of blocks of a row, with signs flipped before or after.
 *
 * A block of order * power elements is multiplied by H_order (x) H_power. H_power, of Sylvester's order, goes by
 * butterflies (a, b) -> (a + b, a - b) at distances 1, 2, 4 ... within each run of `power` elements: the fast
 * Walsh-Hadamard transform. H_order is C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]] with C of 0 on the diagonal
 * and +-1 elsewhere (kv_tables.py), so that the butterflies go on to runs of 2 power elements, [p, m], and run i of the
 * block becomes the sum, j rising, of c_ij times run j, with [m, -p] of run i in its place. This order of the additions
 * is the definition: bits depend on it. */
#include "kv_tables.h"

/* Blocks come to multiples of so many elements, as many as codes are made at a time (codebook.h): zeros fill them up.
 */
enum { QZ_PADDING = 64 };

/* Vectors that passes over a block hold in registers: the first, which also goes through the distances within a vector,
 * and later ones. */
enum { QZ_NEAR = QZ_FUSED && QZ_LANES != 8 ? 16 : 8, QZ_FAR = 8 };

/* Of two times `power` elements, of the largest order, 28. */
enum { QZ_MAX_RUNS = 14 };

typedef struct rotation_tables {
    _Alignas(64) int32_t flips[QZ_MAX_HEAD_DIM]; /* what turns the signs, by exclusive or; else 0 */
    float outer[QZ_MAX_RUNS][QZ_MAX_RUNS];       /* C, and 1 on the diagonal */
} rotation_tables;

static void open_flips(int32_t *flips, ptrdiff_t dimension) {
    static const int32_t bits[16] = {1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                     1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
    for (ptrdiff_t j = 0; j < dimension; j += QZ_LANES) {
        int32_t word = qz_kv_signs[j / 8] >> j % 8;
        if (QZ_LANES > 8) word |= qz_kv_signs[j / 8 + 1] << 8;
        const v_i32 is_minus = greater_i32(and_i32(set1_i32(word), load_i32(bits)), set1_i32(0));
        store_i32(flips + j, and_i32(is_minus, set1_i32(INT32_MIN)));
    }
}

static void open_rotation(rotation_tables *tables, const qz_rotation *rotation) {
    const uint32_t *rows = rotation->order == 12   ? qz_kv_hadamard_12
                           : rotation->order == 20 ? qz_kv_hadamard_20
                                                   : qz_kv_hadamard_28;
    int32_t *flips = tables->flips;
    if (rotation->is_signed) {
        open_flips(flips, rotation->dimension);
    } else {
        memset(flips, 0, (size_t)rotation->dimension * sizeof *flips);
    }
    for (int i = 0; i < rotation->order / 2; i++) {
        for (int j = 0; j < rotation->order / 2; j++) tables->outer[i][j] = rows[2 * i] >> 2 * j & 1 ? -1.0f : 1.0f;
    }
}

/* What a transform does besides: signs turned as elements are read; elements multiplied by `factor` as they are
 * written, and their signs turned. Constants once inlined. */
enum { QZ_TURN_FIRST = 1, QZ_SCALE = 2, QZ_TURN_LAST = 4 };
typedef struct pass_ends {
    const int32_t *flips;
    float factor;
} pass_ends;

QZ_INLINE v_f32 turn(v_f32 v, const int32_t *flips) { return f32_of_bits(xor_i32(bits_of_f32(v), load_i32(flips))); }

QZ_INLINE void write_one(float *to, ptrdiff_t at, v_f32 v, int kind, const pass_ends *ends) {
    if (kind & QZ_SCALE) v = mul_f32(v, set1_f32(ends->factor));
    if (kind & QZ_TURN_LAST) v = turn(v, ends->flips + at);
    store_f32(to + at, v);
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
QZ_INLINE void transform_near(float *to, const float *from, ptrdiff_t count, int vectors, int power, int kind,
                              const pass_ends *ends) {
    for (ptrdiff_t at = 0; at < count; at += vectors * QZ_LANES) {
        v_f32 v[QZ_NEAR];
        QZ_UNROLL
        for (int i = 0; i < vectors; i++) {
            const ptrdiff_t j = at + i * QZ_LANES;
            v[i] = kind & QZ_TURN_FIRST ? turn(load_f32(from + j), ends->flips + j) : load_f32(from + j);
        }
        butterflies_within(v, vectors, power);
        butterflies_between(v, vectors);
        QZ_UNROLL
        for (int i = 0; i < vectors; i++) write_one(to, at + i * QZ_LANES, v[i], kind, ends);
    }
}

/* The butterflies at distances `near` to near * vectors / 2, in runs of near * vectors elements. */
QZ_INLINE void transform_far(float *x, ptrdiff_t count, int vectors, ptrdiff_t near, int kind, const pass_ends *ends) {
    for (ptrdiff_t at = 0; at < count; at += near * vectors) {
        QZ_UNROLL_BY_4
        for (ptrdiff_t l = at; l < at + near; l += QZ_LANES) {
            v_f32 v[QZ_FAR];
            QZ_UNROLL
            for (int i = 0; i < vectors; i++) v[i] = load_f32(x + l + i * near);
            butterflies_between(v, vectors);
            QZ_UNROLL
            for (int i = 0; i < vectors; i++) write_one(x, l + i * near, v[i], kind, ends);
        }
    }
}

QZ_INLINE void transform_rest(float *x, ptrdiff_t count, ptrdiff_t near, ptrdiff_t power, int kind,
                              const pass_ends *ends) {
    kind &= ~QZ_TURN_FIRST;
    for (; power / near > QZ_FAR; near *= QZ_FAR) transform_far(x, count, QZ_FAR, near, 0, ends);
    if (power / near == 8) transform_far(x, count, 8, near, kind, ends);
    if (power / near == 4) transform_far(x, count, 4, near, kind, ends);
    if (power / near == 2) transform_far(x, count, 2, near, kind, ends);
}

/* H_power over a block of a power of two, which is a multiple of QZ_PADDING. `to` may be `from`. */
QZ_INLINE void transform_block(float *to, const float *from, ptrdiff_t power, int kind, const pass_ends *ends) {
    const ptrdiff_t near = QZ_NEAR * QZ_LANES;
    if (QZ_LANES == 16 && power == 4 * QZ_LANES) {
        transform_near(to, from, power, 4, QZ_LANES, kind, ends);
    } else if (QZ_LANES == 16 && power == 8 * QZ_LANES) {
        transform_near(to, from, power, 8, QZ_LANES, kind, ends);
    } else if (power == near) {
        transform_near(to, from, power, QZ_NEAR, QZ_LANES, kind, ends);
    } else {
        transform_near(to, from, power, QZ_NEAR, QZ_LANES, kind & QZ_TURN_FIRST, ends);
        transform_rest(to, power, near, power, kind, ends);
    }
}

/* The same over each run of `power` elements, in place; count is a multiple of it, and of QZ_PADDING. */
static void walsh_hadamard(float *x, ptrdiff_t count, ptrdiff_t power) {
    const ptrdiff_t near = power < 8 * QZ_LANES ? power : 8 * QZ_LANES;
    switch (near / QZ_LANES) {
    case 8: transform_near(x, x, count, 8, QZ_LANES, 0, NULL); break;
    case 4: transform_near(x, x, count, 4, QZ_LANES, 0, NULL); break;
    case 2: transform_near(x, x, count, 2, QZ_LANES, 0, NULL); break;
    case 1: transform_near(x, x, count, 1, QZ_LANES, 0, NULL); break;
    default:
        if (power == 8) transform_near(x, x, count, 1, 8, 0, NULL);
        if (power == 4) transform_near(x, x, count, 1, 4, 0, NULL);
        if (power == 2) transform_near(x, x, count, 1, 2, 0, NULL);
    }
    transform_rest(x, count, near, power, 0, NULL);
}

/* [p, m] of a run, or of a column of one, to [m, -p]. */
QZ_INLINE v_f32 exchange(v_f32 run) {
    static const float signs[16] = {[0] = 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1};
    return mul_f32(partner_f32(run, QZ_LANES / 2), load_f32(signs + 8 - QZ_LANES / 2));
}

/* Runs of two vectors or more, by columns of one vector of p and one of m. */
static void combine_columns(float *x, const rotation_tables *tables, int runs, ptrdiff_t power) {
    for (ptrdiff_t l = 0; l < power; l += QZ_LANES) {
        float p[QZ_MAX_RUNS][QZ_LANES], m[QZ_MAX_RUNS][QZ_LANES];
        for (int j = 0; j < runs; j++) {
            store_f32(p[j], load_f32(x + j * 2 * power + l));
            store_f32(m[j], load_f32(x + j * 2 * power + power + l));
        }
        for (int i = 0; i < runs; i++) {
            const v_f32 own_p = load_f32(p[i]), own_m = load_f32(m[i]);
            v_f32 upper = set1_f32(0.0f), lower = upper;
            store_f32(p[i], own_m);
            store_f32(m[i], mul_f32(own_p, set1_f32(-1.0f)));
            for (int j = 0; j < runs; j++) {
                const v_f32 c = set1_f32(tables->outer[i][j]);
                upper = j ? fma_f32(load_f32(p[j]), c, upper) : mul_f32(load_f32(p[j]), c);
                lower = j ? fma_f32(load_f32(m[j]), c, lower) : mul_f32(load_f32(m[j]), c);
            }
            store_f32(p[i], own_p);
            store_f32(m[i], own_m);
            store_f32(x + i * 2 * power + l, upper);
            store_f32(x + i * 2 * power + power + l, lower);
        }
    }
}

/* Runs of one vector. */
static void combine_vectors(float *x, const rotation_tables *tables, int runs) {
    float w[QZ_MAX_RUNS][QZ_LANES];
    memcpy(w, x, (size_t)runs * sizeof *w);
    for (int i = 0; i < runs; i++) {
        const v_f32 own = load_f32(w[i]);
        store_f32(w[i], exchange(own));
        v_f32 sum = mul_f32(load_f32(w[0]), set1_f32(tables->outer[i][0]));
        for (int j = 1; j < runs; j++) sum = fma_f32(load_f32(w[j]), set1_f32(tables->outer[i][j]), sum);
        store_f32(w[i], own);
        store_f32(x + i * QZ_LANES, sum);
    }
}

/* Runs of half a vector, each beside itself: two rows of C at a time. */
static void combine_halves(float *x, const rotation_tables *tables, int runs) {
    enum { HALF = QZ_LANES / 2 };
    static const int32_t is_first[16] = {[0] = -1, -1, -1, -1, -1, -1, -1, -1};
    const v_i32 first = load_i32(is_first + 8 - HALF);
    float w[QZ_MAX_RUNS][QZ_LANES];
    for (int j = 0; j < runs; j++) {
        memcpy(w[j], x + j * HALF, HALF * sizeof *x);
        memcpy(w[j] + HALF, x + j * HALF, HALF * sizeof *x);
    }
    for (int i = 0; i < runs; i += 2) {
        const v_f32 own[2] = {load_f32(w[i]), load_f32(w[i + 1])};
        for (int l = 0; l < HALF; l++) { /* in the half of its own row */
            const float sign = l < HALF / 2 ? 1.0f : -1.0f;
            w[i][l] = sign * w[i][HALF + (l ^ HALF / 2)];
        }
        for (int l = 0; l < HALF; l++) {
            const float sign = l < HALF / 2 ? 1.0f : -1.0f;
            w[i + 1][HALF + l] = sign * w[i + 1][l ^ HALF / 2];
        }
        v_f32 sum = set1_f32(0.0f);
        for (int j = 0; j < runs; j++) {
            const v_i32 upper = bits_of_f32(set1_f32(tables->outer[i][j]));
            const v_i32 lower = bits_of_f32(set1_f32(tables->outer[i + 1][j]));
            const v_f32 c = f32_of_bits(select_i32(first, upper, lower));
            sum = j ? fma_f32(load_f32(w[j]), c, sum) : mul_f32(load_f32(w[j]), c);
        }
        store_f32(w[i], own[0]);
        store_f32(w[i + 1], own[1]);
        store_f32(x + i * HALF, sum);
    }
}

/* Shorter ones. */
static void combine_few(float *x, const rotation_tables *tables, int runs, ptrdiff_t power) {
    float w[QZ_MAX_RUNS * QZ_LANES];
    memcpy(w, x, (size_t)(runs * 2 * power) * sizeof *x);
    for (int i = 0; i < runs; i++) {
        for (ptrdiff_t l = 0; l < 2 * power; l++) {
            const float own = l < power ? w[i * 2 * power + power + l] : -w[i * 2 * power + l - power];
            float sum = 0.0f;
            for (int j = 0; j < runs; j++) {
                const float product = tables->outer[i][j] * (j == i ? own : w[j * 2 * power + l]);
                sum = j ? sum + product : product;
            }
            x[i * 2 * power + l] = sum;
        }
    }
}

/* H_order over the runs of a block. */
static void combine_runs(float *x, const rotation_tables *tables, int order, ptrdiff_t power) {
    if (power >= QZ_LANES) {
        combine_columns(x, tables, order / 2, power);
    } else if (2 * power == QZ_LANES) {
        combine_vectors(x, tables, order / 2);
    } else if (4 * power == QZ_LANES) {
        combine_halves(x, tables, order / 2);
    } else {
        combine_few(x, tables, order / 2, power);
    }
}

QZ_INLINE ptrdiff_t padded(ptrdiff_t block) { return (block + QZ_PADDING - 1) / QZ_PADDING * QZ_PADDING; }

/* A block and its zeros, signs turned. */
static void load_block(float *x, const float *from, ptrdiff_t block, const int32_t *flips) {
    memcpy(x, from, (size_t)block * sizeof *x);
    for (ptrdiff_t i = 0; flips && i < block; i += QZ_LANES) store_f32(x + i, turn(load_f32(x + i), flips + i));
    memset(x + block, 0, (size_t)(padded(block) - block) * sizeof *x);
}

/* Times factor, signs turned if flips are given. */
static void store_block(float *to, const float *x, ptrdiff_t block, float factor, const int32_t *flips) {
    const pass_ends ends = {flips, factor};
    ptrdiff_t i = 0;
    for (; i + QZ_LANES <= block; i += QZ_LANES) {
        if (flips) write_one(to, i, load_f32(x + i), QZ_SCALE | QZ_TURN_LAST, &ends);
        if (!flips) write_one(to, i, load_f32(x + i), QZ_SCALE, &ends);
    }
    for (; i < block; i++) to[i] = flips && flips[i] ? -(x[i] * factor) : x[i] * factor;
}

/* A block of any size times H, not yet divided by the root of its size, with its zeros behind it. */
static void transform_odd_block(float *x, const float *from, const qz_rotation *rotation, const rotation_tables *tables,
                                const int32_t *flips) {
    const ptrdiff_t block = rotation->block;
    load_block(x, from, block, flips);
    walsh_hadamard(x, padded(block), rotation->order > 1 ? 2 * rotation->power : rotation->power);
    if (rotation->order > 1) combine_runs(x, tables, rotation->order, rotation->power);
}

/* Whether transform_block takes it. */
QZ_INLINE int is_even_block(const qz_rotation *rotation) {
    return rotation->order == 1 && rotation->block % QZ_PADDING == 0;
}

/* A block, after which signs are turned; x has room for it and its zeros. */
QZ_INLINE void rotate_back(float *to, const float *from, float *x, const qz_rotation *rotation,
                           const rotation_tables *tables, const int32_t *flips, float factor) {
    const pass_ends ends = {flips, factor};
    if (is_even_block(rotation)) {
        transform_block(to, from, rotation->block, QZ_SCALE | QZ_TURN_LAST, &ends);
    } else {
        transform_odd_block(x, from, rotation, tables, NULL);
        store_block(to, x, rotation->block, factor, flips);
    }
}

/* A block whose signs are turned before. */
QZ_INLINE void rotate_there(float *to, const float *from, float *x, const qz_rotation *rotation,
                            const rotation_tables *tables, const int32_t *flips, float factor) {
    const pass_ends ends = {flips, factor};
    if (is_even_block(rotation)) {
        transform_block(to, from, rotation->block, QZ_TURN_FIRST | QZ_SCALE, &ends);
    } else {
        transform_odd_block(x, from, rotation, tables, flips);
        store_block(to, x, rotation->block, factor, NULL);
    }
}

static void QZ_NAME(rotate)(const qz_rotate_job *job) {
    const qz_rotation *rotation = job->rotation;
    const float factor = (float)(1.0 / sqrt((double)rotation->block));
    rotation_tables tables;
    _Alignas(64) float x[QZ_MAX_HEAD_DIM];
    open_rotation(&tables, rotation);
    for (ptrdiff_t row = 0; row < job->rows; row++) {
        const float *from = job->from + row * job->from_stride;
        float *to = job->to + row * job->to_stride;
        for (ptrdiff_t j = 0; j < rotation->dimension; j += rotation->block) {
            if (job->is_inverse) {
                rotate_back(to + j, from + j, x, rotation, &tables, tables.flips + j, factor);
            } else {
                rotate_there(to + j, from + j, x, rotation, &tables, tables.flips + j, factor);
            }
        }
    }
}
