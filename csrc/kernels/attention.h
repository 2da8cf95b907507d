/* Attention over packed keys and values by vectors: the bits of attention_definition.h.
 *
 * Codes are read 64 at a time and become centroids 32 at a time (codes_of_64, centroids_of_32 of simd/), in the order
 * of qz_attention_place. Up to QZ_DIRECT_ROWS rows take them as they come, with QZ_SCORE_SUMS scores at most, or
 * QZ_WEIGH_HALVES halves of units of one row, under way at a time. Where registers are few or centroids are costly,
 * more rows share them: some positions at a time are decoded into a panel that stays in L1, and multiplied from there
 * in tiles of rows by positions, or of rows by vectors of values. */
#include "attention_math.h"

/* Vectors of 16 chains, and of 32 codes, half a unit; floats of a panel; passes of a tile of scores over the chains,
 * and vectors of chains in each. */
enum {
    UNIT = QZ_ATTENTION_UNIT,
    CHAIN_VECTORS = QZ_CHAIN_VECTORS,
    HALF_VECTORS = 32 / QZ_LANES,
    PANEL_FLOATS = 4096,
    PASSES = CHAIN_VECTORS > 1 ? 2 : 1,
    PASS_VECTORS = CHAIN_VECTORS / PASSES
};

QZ_INLINE v_f32 exp_of_f32(v_f32 x) {
    x = max_f32(set1_f32(QZ_EXP_LOWEST), x);
    const v_f32 one = set1_f32(1.0f), t = fused_f32(x, set1_f32(QZ_EXP_LOG2_E), set1_f32(QZ_EXP_ROUND));
    const v_f32 n = sub_f32(t, set1_f32(QZ_EXP_ROUND));
    const v_f32 r = fused_f32(n, set1_f32(-QZ_EXP_LN2_LOW), fused_f32(n, set1_f32(-QZ_EXP_LN2_HIGH), x));
    v_f32 p = fused_f32(set1_f32(QZ_EXP_P4), r, set1_f32(QZ_EXP_P3));
    p = fused_f32(p, r, set1_f32(QZ_EXP_P2));
    p = fused_f32(p, r, set1_f32(QZ_EXP_P1));
    p = fused_f32(p, r, set1_f32(QZ_EXP_P0));
    p = fused_f32(fused_f32(p, r, one), r, one);
    const v_i32 exponent = add_i32(bits_of_f32(t), set1_i32(127));
    return mul_f32(p, f32_of_bits(shl_i32(exponent, 23)));
}

QZ_INLINE v_f32 tanh_of_f32(v_f32 x) {
    const v_i32 bits = bits_of_f32(x), magnitude = and_i32(bits, set1_i32(0x7fffffff));
    const v_f32 one = set1_f32(1.0f), z = mul_f32(x, x);
    v_f32 q = fused_f32(set1_f32(QZ_TANH_Q4), z, set1_f32(QZ_TANH_Q3));
    q = fused_f32(q, z, set1_f32(QZ_TANH_Q2));
    q = fused_f32(q, z, set1_f32(QZ_TANH_Q1));
    q = fused_f32(q, z, set1_f32(QZ_TANH_Q0));
    const v_f32 small = fused_f32(mul_f32(x, z), q, x);
    const v_f32 e = exp_of_f32(mul_f32(f32_of_bits(magnitude), set1_f32(-2.0f)));
    const v_f32 large = div_f32(sub_f32(one, e), add_f32(one, e));
    const v_i32 is_large = greater_i32(magnitude, bits_of_f32(set1_f32(QZ_TANH_SMALL)));
    const v_i32 sign = and_i32(bits, set1_i32(INT32_MIN));
    return f32_of_bits(select_i32(is_large, or_i32(bits_of_f32(large), sign), bits_of_f32(small)));
}

QZ_JOIN_CHAINS(greatest_chains, max_f32)

/* Of all chains the sum in every lane, or the greatest. */
#define QZ_OF_16(name, join, op)                              \
    QZ_INLINE v_f32 name(const v_f32 chains[CHAIN_VECTORS]) { \
        v_f32 v = join(chains);                               \
        if (QZ_LANES > 8) v = op(v, partner_f32(v, 8));       \
        if (QZ_LANES > 4) v = op(v, partner_f32(v, 4));       \
        v = op(v, partner_f32(v, 2));                         \
        return op(v, partner_f32(v, 1));                      \
    }
QZ_OF_16(sum_of_16, joined_chains, add_f32)
QZ_OF_16(greatest_of_16, greatest_chains, max_f32)

/* ---- codes ---- */

/* Bytes that hold `count` codes. */
QZ_INLINE ptrdiff_t bytes_of_codes(const qz_kv_block *k, ptrdiff_t count) {
    return k->in_bytes ? count : count / 8 * k->bits;
}

/* Floats of a row in places. */
QZ_INLINE ptrdiff_t pitch_of(const qz_kv_block *k) { return (k->length + UNIT - 1) / UNIT * UNIT; }

/* The codes of a row from the unit at j on. The last ones, if fewer than a unit, come from a copy: nothing may be read
 * after them. */
QZ_INLINE v_codes codes_at(const uint8_t *from, ptrdiff_t j, const qz_kv_block *k, int bits, int is_rest) {
    uint8_t copy[UNIT];
    from += j / 8 * bits;
    if (is_rest) {
        memset(copy, 0, sizeof copy);
        memcpy(copy, from, (size_t)bytes_of_codes(k, k->length - j));
        from = copy;
    }
    return codes_of_64(from, bits);
}

/* Asks for so many codes of the row that is a call's positions after one. */
QZ_INLINE void prefetch_ahead(const uint8_t *codes, const qz_kv_block *k, ptrdiff_t count, int bits) {
    const uint8_t *ahead = codes + k->positions * k->stride;
    QZ_UNROLL
    for (ptrdiff_t at = 0; at < count / 8 * bits; at += 64) __builtin_prefetch(ahead + at);
}

/* Decodes rows into a panel, each to whole units. */
QZ_INLINE void fill_panel(float *panel, ptrdiff_t pitch, const qz_kv_block *k, ptrdiff_t first, ptrdiff_t count,
                          const v_centroids *c, int bits, int is_wide) {
    for (ptrdiff_t i = 0; i < count; i++) {
        const uint8_t *from = k->codes + (first + i) * k->stride;
        for (ptrdiff_t j = 0; j < pitch; j += UNIT) {
            const int is_rest = k->length - j < UNIT;
            const v_codes codes = is_rest ? codes_at(from, j, k, bits, 1) : codes_at(from, j, k, bits, 0);
            prefetch_ahead(from + j / 8 * bits, k, UNIT, bits);
            QZ_UNROLL
            for (int half = 0; half < 2; half++) {
                v_f32 values[HALF_VECTORS];
                float *to = panel + i * pitch + j + half * UNIT / 2;
                centroids_of_32(values, codes, c, bits, is_wide, half);
                QZ_UNROLL
                for (int v = 0; v < HALF_VECTORS; v++) store_f32(to + v * QZ_LANES, values[v]);
            }
        }
    }
}

/* ---- scores ---- */

/* Adds products with the scales to the scores of `count` positions, of each of which a vector of chains is left. */
QZ_INLINE void add_scores(float *scores, const float *scales, const float *chains, ptrdiff_t count) {
    const v_f32 products = sum_of_each(chains);
    if (count >= QZ_LANES) {
        store_f32(scores, fused_f32(load_f32(scales), products, load_f32(scores)));
        return;
    }
    float sums[QZ_LANES];
    store_f32(sums, products);
    for (ptrdiff_t i = 0; i < count; i++) scores[i] = fmaf(scales[i], sums[i], scores[i]);
}

/* Adds half a unit of some positions to their chains with some rows of q. */
QZ_INLINE void add_half(v_f32 (*sums)[CHAIN_VECTORS], v_f32 (*values)[HALF_VECTORS], const float *q, ptrdiff_t q_stride,
                        int rows, int all, int positions) {
    QZ_UNROLL
    for (int r = 0; r < rows; r++) {
        QZ_UNROLL
        for (int v = 0; v < HALF_VECTORS; v++) {
            v_f32 of_row = load_f32(q + r * q_stride + v * QZ_LANES);
            if (positions > 1) QZ_HOLD(of_row); /* else compilers load it anew for each product */
            QZ_UNROLL
            for (int p = 0; p < positions; p++) {
                v_f32 *sum = &sums[r * all + p][v % CHAIN_VECTORS];
                *sum = fused_f32(values[p][v], of_row, *sum);
            }
        }
    }
}

/* Adds a unit: as many positions are decoded at a time as registers hold. */
QZ_INLINE void add_unit(v_f32 (*sums)[CHAIN_VECTORS], const uint8_t *from, ptrdiff_t j, const qz_kv_block *k,
                        const qz_kv_rows *q, const v_centroids *c, int bits, int is_wide, int rows, int positions,
                        int is_rest) {
    const int together = rows == 1 ? 1 : positions < 4 ? positions : 4;
    QZ_UNROLL
    for (int half = 0; half < 2; half++) {
        QZ_UNROLL
        for (int first = 0; first < positions; first += together) {
            v_f32 values[QZ_SCORE_TOGETHER][HALF_VECTORS];
            QZ_UNROLL
            for (int p = 0; p < together; p++) {
                const uint8_t *row = from + (first + p) * k->stride;
                centroids_of_32(values[p], codes_at(row, j, k, bits, is_rest), c, bits, is_wide, half);
                if (half == 0) prefetch_ahead(row + j / 8 * bits, k, UNIT, bits);
            }
            add_half(sums + first, values, q->data + j + half * (UNIT / 2), q->stride, rows, positions, together);
        }
    }
}

/* What is left of the chains of some rows of q with some positions. */
QZ_INLINE void chains_of_codes(float *chains, const uint8_t *from, const qz_kv_block *k, const qz_kv_rows *q,
                               const v_centroids *c, int bits, int is_wide, int rows, int positions) {
    v_f32 sums[QZ_SCORE_SUMS][CHAIN_VECTORS];
    ptrdiff_t j = 0;
    QZ_UNROLL
    for (int i = 0; i < rows * positions; i++) {
        QZ_UNROLL
        for (int v = 0; v < CHAIN_VECTORS; v++) sums[i][v] = set1_f32(0);
    }
    for (; j + UNIT <= k->length; j += UNIT) add_unit(sums, from, j, k, q, c, bits, is_wide, rows, positions, 0);
    if (j < k->length) add_unit(sums, from, j, k, q, c, bits, is_wide, rows, positions, 1);
    QZ_UNROLL
    for (int r = 0; r < rows; r++) {
        QZ_UNROLL
        for (int p = 0; p < positions; p++)
            store_f32(chains + (r * QZ_LANES + p) * QZ_LANES, joined_chains(sums[r * positions + p]));
    }
}

/* A row of q and a vector of positions: the chains stay in registers, of which codes of 4 bits leave enough. */
QZ_INLINE void score_vector(const uint8_t *from, const qz_kv_block *k, const qz_kv_rows *q, float *scores,
                            const float *scales, const v_centroids *c, int bits, int is_wide) {
    _Alignas(64) float chains[QZ_LANES * QZ_LANES];
    QZ_UNROLL
    for (int i = 0; i < QZ_LANES; i += QZ_SCORE_TOGETHER)
        chains_of_codes(chains + i * QZ_LANES, from + i * k->stride, k, q, c, bits, is_wide, 1, QZ_SCORE_TOGETHER);
    add_scores(scores, scales, chains, QZ_LANES);
}

/* Some rows of q, for which codes are decoded as they come. */
QZ_INLINE void score_rows(const qz_kv_block *k, const qz_kv_rows *q, float *scores, const v_centroids *c, int bits,
                          int is_wide, int rows) {
    const int most = bits == 8 ? 2 : QZ_SCORE_TOGETHER; /* the bytes of 256 centroids take many registers */
    const int together = QZ_SCORE_SUMS / rows < most ? QZ_SCORE_SUMS / rows : most;
    _Alignas(64) float chains[QZ_DIRECT_ROWS * QZ_LANES * QZ_LANES];
    for (ptrdiff_t first = 0; first < k->positions; first += QZ_LANES) {
        const ptrdiff_t count = k->positions - first < QZ_LANES ? k->positions - first : QZ_LANES;
        const uint8_t *from = k->codes + first * k->stride;
        ptrdiff_t i = 0;
        if (rows == 1 && bits == 4 && QZ_LANES <= 2 * QZ_SCORE_TOGETHER && count == QZ_LANES) {
            score_vector(from, k, q, scores + first, k->scales + first, c, bits, is_wide);
            continue;
        }
        if (count < QZ_LANES) /* all lanes are added up */
            memset(chains, 0, (size_t)(rows * QZ_LANES * QZ_LANES) * sizeof *chains);
        for (; i + together <= count; i += together)
            chains_of_codes(chains + i * QZ_LANES, from + i * k->stride, k, q, c, bits, is_wide, rows, together);
        for (; i < count; i++)
            chains_of_codes(chains + i * QZ_LANES, from + i * k->stride, k, q, c, bits, is_wide, rows, 1);
        for (int r = 0; r < rows; r++)
            add_scores(scores + r * QZ_ATTENTION_TILE + first, k->scales + first, chains + r * QZ_LANES * QZ_LANES,
                       count);
    }
}

QZ_INLINE void score_one(const qz_kv_block *k, const qz_kv_rows *rows, float *scores, int bits, int is_wide) {
    const v_centroids c = load_centroids(k->centroids, k->planes);
    score_rows(k, rows, scores, &c, bits, is_wide, 1);
}

/* Chains of some rows with some positions, constants once inlined: in each pass those of other vectors, since there are
 * not enough registers for all. What is left of two passes is added. */
QZ_INLINE void chains_of_tile(float *chains, const float *q, ptrdiff_t stride, const float *panel, ptrdiff_t pitch,
                              int rows, int positions, int pass) {
    v_f32 sums[4][4][PASS_VECTORS];
    QZ_UNROLL
    for (int r = 0; r < rows; r++) {
        QZ_UNROLL
        for (int p = 0; p < positions; p++) {
            QZ_UNROLL
            for (int v = 0; v < PASS_VECTORS; v++) sums[r][p][v] = set1_f32(0);
        }
    }
    for (ptrdiff_t j = pass * QZ_LANES; j < pitch; j += 16) {
        QZ_UNROLL
        for (int v = 0; v < PASS_VECTORS; v++) {
            const ptrdiff_t at = j + v * PASSES * QZ_LANES;
            v_f32 of_panel[4];
            QZ_UNROLL
            for (int p = 0; p < positions; p++) of_panel[p] = load_f32(panel + p * pitch + at);
            QZ_UNROLL
            for (int r = 0; r < rows; r++) {
                v_f32 of_row = load_f32(q + r * stride + at);
                QZ_HOLD(of_row); /* else compilers load it anew for each product */
                QZ_UNROLL
                for (int p = 0; p < positions; p++) sums[r][p][v] = fused_f32(of_panel[p], of_row, sums[r][p][v]);
            }
        }
    }
    QZ_UNROLL
    for (int r = 0; r < rows; r++) {
        QZ_UNROLL
        for (int p = 0; p < positions; p++) {
            float *to = chains + (r * QZ_LANES + p) * QZ_LANES;
            v_f32 sum = sums[r][p][0];
            if (PASS_VECTORS == 2) sum = add_f32(sum, sums[r][p][PASS_VECTORS - 1]);
            store_f32(to, pass == 0 ? sum : add_f32(load_f32(to), sum));
        }
    }
}

/* Scores of some rows with up to QZ_LANES positions of a panel. */
QZ_INLINE void score_tile(const qz_kv_rows *rows, ptrdiff_t row, const float *panel, ptrdiff_t pitch, float *scores,
                          const float *scales, ptrdiff_t count, int together) {
    float chains[4 * QZ_LANES * QZ_LANES];
    const float *q = rows->data + row * rows->stride;
    const int step = together > 1 ? QZ_SCORE_POSITIONS : 4; /* a row alone needs more sums side by side */
    if (count < QZ_LANES) memset(chains, 0, sizeof chains); /* all lanes are added up */
    QZ_UNROLL
    for (int pass = 0; pass < PASSES; pass++) {
        ptrdiff_t i = 0;
        for (; i + step <= count; i += step)
            chains_of_tile(chains + i * QZ_LANES, q, rows->stride, panel + i * pitch, pitch, together, step, pass);
        for (; step > 2 && i + 2 <= count; i += 2)
            chains_of_tile(chains + i * QZ_LANES, q, rows->stride, panel + i * pitch, pitch, together, 2, pass);
        for (; i < count; i++)
            chains_of_tile(chains + i * QZ_LANES, q, rows->stride, panel + i * pitch, pitch, together, 1, pass);
    }
    for (int r = 0; r < together; r++)
        add_scores(scores + (row + r) * QZ_ATTENTION_TILE, scales, chains + r * QZ_LANES * QZ_LANES, count);
}

/* Positions decoded together: whole vectors of them where a panel holds so many. */
QZ_INLINE ptrdiff_t panel_positions(ptrdiff_t pitch) {
    const ptrdiff_t most = PANEL_FLOATS / pitch;
    return most < QZ_LANES ? most : most / QZ_LANES * QZ_LANES;
}

QZ_INLINE void score_panel(const qz_kv_block *k, const qz_kv_rows *rows, float *scores, const float *panel,
                           ptrdiff_t pitch, ptrdiff_t first, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; i += QZ_LANES) {
        const ptrdiff_t some = count - i < QZ_LANES ? count - i : QZ_LANES;
        const float *from = panel + i * pitch, *scales = k->scales + first + i;
        ptrdiff_t row = 0;
        for (; row + QZ_SCORE_ROWS <= rows->count; row += QZ_SCORE_ROWS)
            score_tile(rows, row, from, pitch, scores + first + i, scales, some, QZ_SCORE_ROWS);
        for (; row < rows->count; row++) score_tile(rows, row, from, pitch, scores + first + i, scales, some, 1);
    }
}

/* By a panel, which many rows share. */
QZ_INLINE void score_by_panel(const qz_kv_block *k, const qz_kv_rows *rows, float *scores, const v_centroids *c,
                              int bits, int is_wide) {
    const ptrdiff_t pitch = pitch_of(k), most = panel_positions(pitch);
    _Alignas(64) float panel[PANEL_FLOATS];
    for (ptrdiff_t first = 0; first < k->positions; first += most) {
        const ptrdiff_t count = k->positions - first < most ? k->positions - first : most;
        fill_panel(panel, pitch, k, first, count, c, bits, is_wide);
        score_panel(k, rows, scores, panel, pitch, first, count);
    }
}

/* Calls a kernel of some rows for all of them: eight, four or two at a time, then one. */
#define QZ_BY_SOME_ROWS(kernel, k, rows, of_tile, c, bits, is_wide)                              \
    for (ptrdiff_t row = 0, some; row < (rows)->count; row += some) {                            \
        const ptrdiff_t left = (rows)->count - row;                                              \
        const qz_kv_rows of = {(rows)->data + row * (rows)->stride, (rows)->stride, left};       \
        some = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;                                \
        if (some == 8) kernel(k, &of, (of_tile) + row * QZ_ATTENTION_TILE, c, bits, is_wide, 8); \
        if (some == 4) kernel(k, &of, (of_tile) + row * QZ_ATTENTION_TILE, c, bits, is_wide, 4); \
        if (some == 2) kernel(k, &of, (of_tile) + row * QZ_ATTENTION_TILE, c, bits, is_wide, 2); \
        if (some == 1) kernel(k, &of, (of_tile) + row * QZ_ATTENTION_TILE, c, bits, is_wide, 1); \
    }

QZ_INLINE void score_several(const qz_kv_block *k, const qz_kv_rows *rows, float *scores, int bits, int is_wide) {
    const v_centroids c = load_centroids(k->centroids, k->planes);
    if (QZ_DIRECT_ROWS == 1 || bits == 8) {
        score_by_panel(k, rows, scores, &c, bits, is_wide);
        return;
    }
    QZ_BY_SOME_ROWS(score_rows, k, rows, scores, &c, bits, is_wide)
}

/* ---- values ---- */

/* All bits set where a weight is not 0. */
QZ_INLINE v_i32 has_weight(v_f32 weight) {
    return greater_i32(and_i32(bits_of_f32(weight), set1_i32(0x7fffffff)), set1_i32(0));
}

/* 0 where nothing has weight. */
QZ_INLINE v_f32 keep_f32(v_i32 has, v_f32 value) { return f32_of_bits(and_i32(has, bits_of_f32(value))); }

/* weight * scale, or 0 where the weight is 0. */
QZ_INLINE void scale_weights(float *to, const float *weights, const float *scales) {
    for (ptrdiff_t i = 0; i < QZ_ATTENTION_TILE; i += QZ_LANES) {
        const v_f32 weight = load_f32(weights + i);
        store_f32(to + i, keep_f32(has_weight(weight), mul_f32(weight, load_f32(scales + i))));
    }
}

/* Some rows, from place j on some halves of units of them, the first of which is `half`, for all positions. */
QZ_INLINE void weigh_strip(const qz_kv_block *k, const float *weights, const qz_kv_rows *to, ptrdiff_t j,
                           const v_centroids *c, int bits, int is_wide, int rows, int half, int halves, int is_rest) {
    v_f32 sums[QZ_DIRECT_ROWS][(QZ_WEIGH_HALVES > 2 ? QZ_WEIGH_HALVES : 2) * HALF_VECTORS];
    const uint8_t *from = k->codes;
    float *at = to->data + j + half * (UNIT / 2);
    const int vectors = halves * HALF_VECTORS;
    QZ_UNROLL
    for (int i = 0; i < rows * vectors; i++)
        sums[i / vectors][i % vectors] = load_f32(at + i / vectors * to->stride + i % vectors * QZ_LANES);
    for (ptrdiff_t i = 0; i < k->positions; i++, from += k->stride) {
        if (half == 0) prefetch_ahead(from + j / 8 * bits, k, halves * UNIT / 2, bits);
        QZ_UNROLL
        for (int h = 0; h < halves; h++) {
            const v_codes codes = codes_at(from, j + (half + h) / 2 * UNIT, k, bits, is_rest);
            v_f32 values[HALF_VECTORS];
            centroids_of_32(values, codes, c, bits, is_wide, (half + h) % 2);
            QZ_UNROLL
            for (int r = 0; r < rows; r++) {
                const v_f32 weight = set1_f32(weights[r * QZ_ATTENTION_TILE + i]);
                v_f32 *sum = sums[r] + h * HALF_VECTORS;
                QZ_UNROLL
                for (int v = 0; v < HALF_VECTORS; v++) sum[v] = fused_f32(weight, values[v], sum[v]);
            }
        }
    }
    QZ_UNROLL
    for (int i = 0; i < rows * vectors; i++)
        store_f32(at + i / vectors * to->stride + i % vectors * QZ_LANES, sums[i / vectors][i % vectors]);
}

/* A unit of some rows: halves one after the other where registers are few, unless codes take long to unpack. */
QZ_INLINE void weigh_unit(const qz_kv_block *k, const float *weights, const qz_kv_rows *to, ptrdiff_t j,
                          const v_centroids *c, int bits, int is_wide, int rows, int halves, int is_rest) {
    if (halves > 1 || (rows == 1 && bits != 4)) {
        weigh_strip(k, weights, to, j, c, bits, is_wide, rows, 0, 2, is_rest);
    } else {
        weigh_strip(k, weights, to, j, c, bits, is_wide, rows, 0, 1, is_rest);
        weigh_strip(k, weights, to, j, c, bits, is_wide, rows, 1, 1, is_rest);
    }
}

/* Some rows, for which codes are decoded as they come. */
QZ_INLINE void weigh_rows(const qz_kv_block *k, const qz_kv_rows *to, const float *weights, const v_centroids *c,
                          int bits, int is_wide, int rows) {
    const int halves = rows > 2 ? QZ_WEIGH_HALVES * 2 / rows : QZ_WEIGH_HALVES;
    const ptrdiff_t step = halves / 2 * UNIT;
    ptrdiff_t j = 0;
    for (; step > UNIT && j + step <= k->length; j += step)
        weigh_strip(k, weights, to, j, c, bits, is_wide, rows, 0, halves, 0);
    for (; j + UNIT <= k->length; j += UNIT) weigh_unit(k, weights, to, j, c, bits, is_wide, rows, halves, 0);
    if (j < k->length) weigh_unit(k, weights, to, j, c, bits, is_wide, rows, halves, 1);
}

QZ_INLINE void weigh_one(const qz_kv_block *k, const qz_kv_rows *rows, const float *weights, int bits, int is_wide) {
    const v_centroids c = load_centroids(k->centroids, k->planes);
    _Alignas(64) float scaled[QZ_ATTENTION_TILE];
    scale_weights(scaled, weights, k->scales);
    weigh_rows(k, rows, scaled, &c, bits, is_wide, 1);
}

/* Some rows by some vectors of values, constants once inlined. */
QZ_INLINE void weigh_tile(float *to, ptrdiff_t stride, const float *weights, const float *panel, ptrdiff_t pitch,
                          ptrdiff_t count, int rows, int vectors) {
    v_f32 sums[4][4];
    QZ_UNROLL
    for (int r = 0; r < rows; r++) {
        QZ_UNROLL
        for (int v = 0; v < vectors; v++) sums[r][v] = load_f32(to + r * stride + v * QZ_LANES);
    }
    for (ptrdiff_t i = 0; i < count; i++) {
        v_f32 of_rows[4];
        QZ_UNROLL
        for (int r = 0; r < rows; r++) of_rows[r] = set1_f32(weights[r * QZ_ATTENTION_TILE + i]);
        QZ_UNROLL
        for (int v = 0; v < vectors; v++) {
            v_f32 of_panel = load_f32(panel + i * pitch + v * QZ_LANES);
            QZ_HOLD(of_panel); /* else compilers load it anew for each product */
            QZ_UNROLL
            for (int r = 0; r < rows; r++) sums[r][v] = fused_f32(of_rows[r], of_panel, sums[r][v]);
        }
    }
    QZ_UNROLL
    for (int r = 0; r < rows; r++) {
        QZ_UNROLL
        for (int v = 0; v < vectors; v++) store_f32(to + r * stride + v * QZ_LANES, sums[r][v]);
    }
}

QZ_INLINE void weigh_panel(const qz_kv_rows *rows, const float *weights, const float *panel, ptrdiff_t pitch,
                           ptrdiff_t count) {
    enum { ROWS = QZ_WEIGH_ROWS, VECTORS = QZ_WEIGH_VECTORS };
    const ptrdiff_t stride = rows->stride;
    for (ptrdiff_t j = 0; j < pitch; j += VECTORS * QZ_LANES) {
        ptrdiff_t row = 0;
        for (; row < rows->count;) {
            float *to = rows->data + row * stride + j;
            const float *of_rows = weights + row * QZ_ATTENTION_TILE;
            const ptrdiff_t left = rows->count - row;
            if (left >= ROWS) {
                weigh_tile(to, stride, of_rows, panel + j, pitch, count, ROWS, VECTORS);
                row += ROWS;
            } else if (left >= 2) {
                weigh_tile(to, stride, of_rows, panel + j, pitch, count, 2, VECTORS);
                row += 2;
            } else {
                weigh_tile(to, stride, of_rows, panel + j, pitch, count, 1, VECTORS);
                row++;
            }
        }
    }
}

QZ_INLINE void weigh_by_panel(const qz_kv_block *k, const qz_kv_rows *rows, const float *scaled, const v_centroids *c,
                              int bits, int is_wide) {
    const ptrdiff_t pitch = pitch_of(k), most = panel_positions(pitch);
    _Alignas(64) float panel[PANEL_FLOATS];
    for (ptrdiff_t first = 0; first < k->positions; first += most) {
        const ptrdiff_t count = k->positions - first < most ? k->positions - first : most;
        fill_panel(panel, pitch, k, first, count, c, bits, is_wide);
        weigh_panel(rows, scaled + first, panel, pitch, count);
    }
}

QZ_INLINE void weigh_several(const qz_kv_block *k, const qz_kv_rows *rows, const float *weights, int bits,
                             int is_wide) {
    const v_centroids c = load_centroids(k->centroids, k->planes);
    _Alignas(64) float scaled[QZ_ATTENTION_ROWS * QZ_ATTENTION_TILE];
    for (ptrdiff_t row = 0; row < rows->count; row++)
        scale_weights(scaled + row * QZ_ATTENTION_TILE, weights + row * QZ_ATTENTION_TILE, k->scales);
    if (QZ_DIRECT_ROWS == 1 || bits == 8) {
        weigh_by_panel(k, rows, scaled, &c, bits, is_wide);
        return;
    }
    QZ_BY_SOME_ROWS(weigh_rows, k, rows, scaled, &c, bits, is_wide)
}

/* ---- a copy for each width ---- */

/* Each a function of its own: in one of all of them compilers keep little in registers. */
#define QZ_OF_WIDTH(name, floats, bits, is_wide)                                                                   \
    static __attribute__((noinline)) void QZ_NAME(name##_##bits##_##is_wide)(const qz_kv_block *k,                 \
                                                                             const qz_kv_rows *rows, floats *of) { \
        name(k, rows, of, bits, is_wide);                                                                          \
    }
#define QZ_OF_EACH_WIDTH(name, floats) \
    QZ_OF_WIDTH(name, floats, 2, 0)    \
    QZ_OF_WIDTH(name, floats, 3, 0)    \
    QZ_OF_WIDTH(name, floats, 4, 0)    \
    QZ_OF_WIDTH(name, floats, 4, 1)    \
    QZ_OF_WIDTH(name, floats, 5, 0)    \
    QZ_OF_WIDTH(name, floats, 6, 0)    \
    QZ_OF_WIDTH(name, floats, 8, 1)
QZ_OF_EACH_WIDTH(score_one, float)
QZ_OF_EACH_WIDTH(score_several, float)
QZ_OF_EACH_WIDTH(weigh_one, const float)
QZ_OF_EACH_WIDTH(weigh_several, const float)

/* Codes of 8 bits are bytes; theirs, and codec 1's of 4 bits, are values of four bytes. */
#define QZ_CALL_WIDTH(name)                                     \
    switch (k->in_bytes ? 8 : k->bits + 16 * !k->is_bfloat16) { \
    case 2: QZ_NAME(name##_2_0)(k, rows, of_tile); break;       \
    case 3: QZ_NAME(name##_3_0)(k, rows, of_tile); break;       \
    case 4: QZ_NAME(name##_4_0)(k, rows, of_tile); break;       \
    case 4 + 16: QZ_NAME(name##_4_1)(k, rows, of_tile); break;  \
    case 5: QZ_NAME(name##_5_0)(k, rows, of_tile); break;       \
    case 6: QZ_NAME(name##_6_0)(k, rows, of_tile); break;       \
    default: QZ_NAME(name##_8_1)(k, rows, of_tile);             \
    }

static void QZ_NAME(score)(const qz_kv_block *k, const qz_kv_rows *rows, float *of_tile) {
    if (rows->count == 1) {
        QZ_CALL_WIDTH(score_one)
    } else {
        QZ_CALL_WIDTH(score_several)
    }
}

static void QZ_NAME(weigh)(const qz_kv_block *k, const qz_kv_rows *rows, const float *of_tile) {
    if (rows->count == 1) {
        QZ_CALL_WIDTH(weigh_one)
    } else {
        QZ_CALL_WIDTH(weigh_several)
    }
}

/* ---- softmax ---- */

static void QZ_NAME(cap)(float *scores, float softcap) {
    const v_f32 cap = set1_f32(softcap);
    for (int i = 0; i < QZ_ATTENTION_TILE; i += QZ_LANES)
        store_f32(scores + i, mul_f32(cap, tanh_of_f32(div_f32(load_f32(scores + i), cap))));
}

/* What to take from scores: max, but 0 while there is none. */
QZ_INLINE v_f32 zero_of(float max) { return set1_f32(max == -INFINITY ? 0.0f : max); }

static void QZ_NAME(soften)(float *scores, qz_softmax *s) {
    v_f32 chains[CHAIN_VECTORS];
    QZ_UNROLL
    for (int v = 0; v < CHAIN_VECTORS; v++) chains[v] = set1_f32(s->max);
    for (int i = 0; i < QZ_ATTENTION_TILE; i += 16) {
        QZ_UNROLL
        for (int v = 0; v < CHAIN_VECTORS; v++) chains[v] = max_f32(load_f32(scores + i + v * QZ_LANES), chains[v]);
    }
    const float max = first_f32(greatest_of_16(chains));
    const v_f32 zero = zero_of(max);
    QZ_UNROLL
    for (int v = 0; v < CHAIN_VECTORS; v++) chains[v] = set1_f32(0);
    for (int i = 0; i < QZ_ATTENTION_TILE; i += 16) {
        QZ_UNROLL
        for (int v = 0; v < CHAIN_VECTORS; v++) {
            const v_f32 weight = exp_of_f32(sub_f32(load_f32(scores + i + v * QZ_LANES), zero));
            store_f32(scores + i + v * QZ_LANES, weight);
            chains[v] = add_f32(chains[v], weight);
        }
    }
    s->factor = first_f32(exp_of_f32(sub_f32(set1_f32(s->max), zero)));
    s->sum = fmaf(s->sum, s->factor, first_f32(sum_of_16(chains)));
    s->max = max;
}

/* count is a multiple of 64. */
static void QZ_NAME(rescale)(float *values, ptrdiff_t count, float factor) {
    const v_f32 factors = set1_f32(factor);
    const v_i32 has = has_weight(factors);
    for (ptrdiff_t i = 0; i < count; i += QZ_LANES)
        store_f32(values + i, keep_f32(has, mul_f32(load_f32(values + i), factors)));
}

static void QZ_NAME(merge)(qz_softmax *s, float *values, const qz_softmax *later, const float *more, ptrdiff_t count) {
    const float max = later->max > s->max ? later->max : s->max;
    const v_f32 zero = zero_of(max);
    const v_f32 before = exp_of_f32(sub_f32(set1_f32(s->max), zero));
    const v_f32 after = exp_of_f32(sub_f32(set1_f32(later->max), zero));
    const v_i32 has_before = has_weight(before), has_after = has_weight(after);
    for (ptrdiff_t i = 0; i < count; i += QZ_LANES) {
        const v_f32 earlier = keep_f32(has_before, mul_f32(load_f32(values + i), before));
        store_f32(values + i, fused_f32(keep_f32(has_after, load_f32(more + i)), after, earlier));
    }
    s->sum = fmaf(later->sum, first_f32(after), s->sum * first_f32(before));
    s->max = max;
}
