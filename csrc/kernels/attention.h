/* Attention over packed keys and values by vectors: the bits of attention_definition.h.
 *
 * Codes become centroids 32 at a time (centroids_of_32 of simd/). A single row takes them as they come. Several rows
 * share them: some positions at a time are decoded into a panel that stays in L1, and multiplied from there in tiles of
 * rows by positions, or of rows by vectors of values. */
#include "attention_math.h"

/* Vectors of 16 chains, and of 32 codes; floats of a panel. */
enum { CHAIN_VECTORS = 16 / QZ_LANES, CODE_VECTORS = 32 / QZ_LANES, PANEL_FLOATS = 4096 };

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

/* In every lane the sum of 16 chains, added by halves, or the greatest of 16. */
#define QZ_OF_16(name, op)                                                       \
    QZ_INLINE v_f32 name(const v_f32 chains[CHAIN_VECTORS]) {                    \
        v_f32 v = chains[0];                                                     \
        if (CHAIN_VECTORS == 2) v = op(v, chains[CHAIN_VECTORS - 1]);            \
        if (CHAIN_VECTORS == 4) {                                                \
            v = op(v, chains[CHAIN_VECTORS / 2]);                                \
            v = op(v, op(chains[CHAIN_VECTORS / 4], chains[CHAIN_VECTORS - 1])); \
        }                                                                        \
        if (QZ_LANES > 8) v = op(v, partner_f32(v, 8));                          \
        if (QZ_LANES > 4) v = op(v, partner_f32(v, 4));                          \
        v = op(v, partner_f32(v, 2));                                            \
        return op(v, partner_f32(v, 1));                                         \
    }
QZ_OF_16(sum_of_16, add_f32)
QZ_OF_16(greatest_of_16, max_f32)

/* ---- codes ---- */

/* Bytes that hold `count` codes. */
QZ_INLINE ptrdiff_t bytes_of_codes(const qz_kv_block *k, ptrdiff_t count) {
    return k->in_bytes ? count : count / 8 * k->bits;
}

/* The last codes of a row, fewer than 32, are decoded from a copy: nothing may be read after them. */
QZ_INLINE void centroids_of_rest(v_f32 *to, const uint8_t *from, ptrdiff_t count, const qz_kv_block *k,
                                 const v_centroids *c, int bits, int in_bytes) {
    uint8_t copy[32] = {0};
    memcpy(copy, from, (size_t)bytes_of_codes(k, count));
    centroids_of_32(to, copy, c, bits, in_bytes);
}

/* Decodes rows into a panel, each to whole units of 32. */
QZ_INLINE void fill_panel(float *panel, ptrdiff_t pitch, const qz_kv_block *k, ptrdiff_t first, ptrdiff_t count,
                          const v_centroids *c, int bits, int in_bytes) {
    const ptrdiff_t unit = in_bytes ? 32 : 4 * bits, whole = k->length / 32 * 32;
    for (ptrdiff_t i = 0; i < count; i++) {
        const uint8_t *from = k->codes + (first + i) * k->stride;
        v_f32 values[CODE_VECTORS];
        for (ptrdiff_t j = 0; j < pitch; j += 32, from += unit) {
            if (j < whole) {
                centroids_of_32(values, from, c, bits, in_bytes);
            } else {
                centroids_of_rest(values, from, k->length - j, k, c, bits, in_bytes);
            }
            QZ_UNROLL
            for (int v = 0; v < CODE_VECTORS; v++) store_f32(panel + i * pitch + j + v * QZ_LANES, values[v]);
        }
    }
}

/* Asks for the rows that come after these. */
QZ_INLINE void prefetch_rows(const qz_kv_block *k, ptrdiff_t position, ptrdiff_t bytes) {
    const uint8_t *ahead = k->codes + (position + k->positions) * k->stride;
    for (ptrdiff_t at = 0; at < bytes; at += 64) prefetch(ahead + at);
}

/* ---- scores ---- */

/* Adds products with the scales to the scores of `count` positions. */
QZ_INLINE void add_scores(float *scores, const float *scales, const float *chains, ptrdiff_t count) {
    const v_f32 products = sum_of_each_16(chains);
    if (count >= QZ_LANES) {
        store_f32(scores, fused_f32(load_f32(scales), products, load_f32(scores)));
        return;
    }
    float sums[QZ_LANES];
    store_f32(sums, products);
    for (ptrdiff_t i = 0; i < count; i++) scores[i] = fmaf(scales[i], sums[i], scores[i]);
}

/* One row; length is a multiple of 32. */
QZ_INLINE void score_one(const qz_kv_block *k, const float *q, float *scores, int bits, int in_bytes) {
    const v_centroids c = load_centroids(k->centroids, k->planes);
    const ptrdiff_t unit = in_bytes ? 32 : 4 * bits, bytes = bytes_of_codes(k, k->length);
    float chains[QZ_LANES * 16] = {0};
    for (ptrdiff_t first = 0; first < k->positions; first += QZ_LANES) {
        const ptrdiff_t count = k->positions - first < QZ_LANES ? k->positions - first : QZ_LANES;
        for (ptrdiff_t i = 0; i < count; i++) {
            const uint8_t *from = k->codes + (first + i) * k->stride;
            v_f32 sums[CHAIN_VECTORS], values[CODE_VECTORS];
            prefetch_rows(k, first + i, bytes);
            QZ_UNROLL
            for (int v = 0; v < CHAIN_VECTORS; v++) sums[v] = set1_f32(0);
            for (ptrdiff_t j = 0; j < k->length; j += 32, from += unit) {
                centroids_of_32(values, from, &c, bits, in_bytes);
                QZ_UNROLL
                for (int v = 0; v < CODE_VECTORS; v++) {
                    v_f32 *sum = &sums[v % CHAIN_VECTORS];
                    *sum = fused_f32(values[v], load_f32(q + j + v * QZ_LANES), *sum);
                }
            }
            QZ_UNROLL
            for (int v = 0; v < CHAIN_VECTORS; v++) store_f32(chains + i * 16 + v * QZ_LANES, sums[v]);
        }
        add_scores(scores + first, k->scales + first, chains, count);
    }
}

/* The chains of some rows with some positions, constants once inlined. */
QZ_INLINE void chains_of_tile(float *chains, const float *q, ptrdiff_t stride, const float *panel, ptrdiff_t pitch,
                              int rows, int positions) {
    v_f32 sums[4][4][CHAIN_VECTORS];
    QZ_UNROLL
    for (int r = 0; r < rows; r++) {
        QZ_UNROLL
        for (int p = 0; p < positions; p++) {
            QZ_UNROLL
            for (int v = 0; v < CHAIN_VECTORS; v++) sums[r][p][v] = set1_f32(0);
        }
    }
    for (ptrdiff_t j = 0; j < pitch; j += 16) {
        QZ_UNROLL
        for (int v = 0; v < CHAIN_VECTORS; v++) {
            const ptrdiff_t at = j + v * QZ_LANES;
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
            QZ_UNROLL
            for (int v = 0; v < CHAIN_VECTORS; v++)
                store_f32(chains + (r * QZ_LANES + p) * 16 + v * QZ_LANES, sums[r][p][v]);
        }
    }
}

/* Scores of some rows with up to QZ_LANES positions of a panel. */
QZ_INLINE void score_tile(const qz_kv_rows *rows, ptrdiff_t row, const float *panel, ptrdiff_t pitch, float *scores,
                          const float *scales, ptrdiff_t count, int together) {
    float chains[4 * QZ_LANES * 16];
    const float *q = rows->data + row * rows->stride;
    ptrdiff_t i = 0;
    if (count < QZ_LANES) memset(chains, 0, sizeof chains); /* all lanes are added up */
    const int step = together > 1 ? QZ_SCORE_POSITIONS : 4; /* a row alone needs more sums side by side */
    for (; i + step <= count; i += step)
        chains_of_tile(chains + i * 16, q, rows->stride, panel + i * pitch, pitch, together, step);
    for (; i < count; i++) chains_of_tile(chains + i * 16, q, rows->stride, panel + i * pitch, pitch, together, 1);
    for (int r = 0; r < together; r++) {
        add_scores(scores + (row + r) * QZ_ATTENTION_TILE, scales, chains + r * QZ_LANES * 16, count);
    }
}

QZ_INLINE ptrdiff_t pitch_of(const qz_kv_block *k) { return (k->length + 31) / 32 * 32; }

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

QZ_INLINE void score(const qz_kv_block *k, const qz_kv_rows *rows, float *scores, int bits, int in_bytes) {
    if (rows->count == 1 && k->length % 32 == 0) {
        score_one(k, rows->data, scores, bits, in_bytes);
        return;
    }
    const v_centroids c = load_centroids(k->centroids, k->planes);
    const ptrdiff_t pitch = pitch_of(k), most = panel_positions(pitch), bytes = bytes_of_codes(k, k->length);
    _Alignas(64) float panel[PANEL_FLOATS];
    for (ptrdiff_t first = 0; first < k->positions; first += most) {
        const ptrdiff_t count = k->positions - first < most ? k->positions - first : most;
        for (ptrdiff_t i = 0; i < count; i++) prefetch_rows(k, first + i, bytes);
        fill_panel(panel, pitch, k, first, count, &c, bits, in_bytes);
        score_panel(k, rows, scores, panel, pitch, first, count);
    }
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

/* One row, `units` times 32 values of it, for all positions. */
QZ_INLINE void weigh_strip(const qz_kv_block *k, const float *weights, float *to, const uint8_t *codes,
                           const v_centroids *c, int bits, int in_bytes, int units) {
    const ptrdiff_t unit = in_bytes ? 32 : 4 * bits;
    v_f32 sums[QZ_WEIGH_UNITS * CODE_VECTORS], values[CODE_VECTORS];
    QZ_UNROLL
    for (int v = 0; v < units * CODE_VECTORS; v++) sums[v] = load_f32(to + v * QZ_LANES);
    for (ptrdiff_t i = 0; i < k->positions; i++) {
        const v_f32 weight = set1_f32(weights[i]);
        QZ_UNROLL
        for (int u = 0; u < units; u++) {
            centroids_of_32(values, codes + i * k->stride + u * unit, c, bits, in_bytes);
            QZ_UNROLL
            for (int v = 0; v < CODE_VECTORS; v++) {
                v_f32 *sum = &sums[u * CODE_VECTORS + v];
                *sum = fused_f32(weight, values[v], *sum);
            }
        }
    }
    QZ_UNROLL
    for (int v = 0; v < units * CODE_VECTORS; v++) store_f32(to + v * QZ_LANES, sums[v]);
}

QZ_INLINE void weigh_one(const qz_kv_block *k, const float *weights, float *to, int bits, int in_bytes) {
    const v_centroids c = load_centroids(k->centroids, k->planes);
    const ptrdiff_t unit = in_bytes ? 32 : 4 * bits, bytes = bytes_of_codes(k, k->length);
    const uint8_t *codes = k->codes;
    _Alignas(64) float scaled[QZ_ATTENTION_TILE];
    scale_weights(scaled, weights, k->scales);
    for (ptrdiff_t i = 0; i < k->positions; i++) prefetch_rows(k, i, bytes);
    ptrdiff_t j = 0;
    for (; j + 32 * QZ_WEIGH_UNITS <= k->length; j += 32 * QZ_WEIGH_UNITS, codes += QZ_WEIGH_UNITS * unit)
        weigh_strip(k, scaled, to + j, codes, &c, bits, in_bytes, QZ_WEIGH_UNITS);
    for (; j < k->length; j += 32, codes += unit) weigh_strip(k, scaled, to + j, codes, &c, bits, in_bytes, 1);
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
        v_f32 of_panel[4];
        QZ_UNROLL
        for (int v = 0; v < vectors; v++) of_panel[v] = load_f32(panel + i * pitch + v * QZ_LANES);
        QZ_UNROLL
        for (int r = 0; r < rows; r++) {
            const v_f32 weight = set1_f32(weights[r * QZ_ATTENTION_TILE + i]);
            QZ_UNROLL
            for (int v = 0; v < vectors; v++) sums[r][v] = fused_f32(weight, of_panel[v], sums[r][v]);
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
    enum { STEP = QZ_WEIGH_VECTORS * QZ_LANES };
    for (ptrdiff_t j = 0; j < pitch; j += STEP) {
        ptrdiff_t row = 0;
        for (; row + 4 <= rows->count; row += 4) {
            weigh_tile(rows->data + row * rows->stride + j, rows->stride, weights + row * QZ_ATTENTION_TILE, panel + j,
                       pitch, count, 4, QZ_WEIGH_VECTORS);
        }
        for (; row < rows->count; row++) {
            weigh_tile(rows->data + row * rows->stride + j, rows->stride, weights + row * QZ_ATTENTION_TILE, panel + j,
                       pitch, count, 1, QZ_WEIGH_VECTORS);
        }
    }
}

QZ_INLINE void weigh(const qz_kv_block *k, const qz_kv_rows *rows, const float *weights, int bits, int in_bytes) {
    if (rows->count == 1 && k->length % 32 == 0) {
        weigh_one(k, weights, rows->data, bits, in_bytes);
        return;
    }
    const v_centroids c = load_centroids(k->centroids, k->planes);
    const ptrdiff_t pitch = pitch_of(k), most = panel_positions(pitch), bytes = bytes_of_codes(k, k->length);
    _Alignas(64) float panel[PANEL_FLOATS], scaled[QZ_ATTENTION_ROWS * QZ_ATTENTION_TILE];
    for (ptrdiff_t row = 0; row < rows->count; row++)
        scale_weights(scaled + row * QZ_ATTENTION_TILE, weights + row * QZ_ATTENTION_TILE, k->scales);
    for (ptrdiff_t first = 0; first < k->positions; first += most) {
        const ptrdiff_t count = k->positions - first < most ? k->positions - first : most;
        for (ptrdiff_t i = 0; i < count; i++) prefetch_rows(k, first + i, bytes);
        fill_panel(panel, pitch, k, first, count, &c, bits, in_bytes);
        weigh_panel(rows, scaled + first, panel, pitch, count);
    }
}

/* ---- a copy for each width ---- */

#define QZ_EACH_WIDTH(call)                       \
    switch (k->in_bytes ? 0 : k->bits) {          \
    case 2: call(k, rows, of_tile, 2, 0); break;  \
    case 3: call(k, rows, of_tile, 3, 0); break;  \
    case 4: call(k, rows, of_tile, 4, 0); break;  \
    case 5: call(k, rows, of_tile, 5, 0); break;  \
    case 6: call(k, rows, of_tile, 6, 0); break;  \
    default: call(k, rows, of_tile, 8, 1); break; \
    }

static void QZ_NAME(score)(const qz_kv_block *k, const qz_kv_rows *rows, float *of_tile) { QZ_EACH_WIDTH(score) }
static void QZ_NAME(weigh)(const qz_kv_block *k, const qz_kv_rows *rows, const float *of_tile) { QZ_EACH_WIDTH(weigh) }

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

/* count is a multiple of 32. */
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
