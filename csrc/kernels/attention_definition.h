/* Attention over packed keys and values, defined in scalar C: which sums, in which order, rounded where. Every other
 * instruction set returns these bits.
 *
 * A tile is QZ_ATTENTION_TILE positions whose numbers start at a multiple of that. For each row (query) of a chunk of
 * tiles the softmax is online (Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al.,
 * "FlashAttention", 2022): `max` and `sum` so far, and an accumulator of values that is rescaled where max rises.
 *
 * Error bound, against exact attention to what the caches hold. To first order in u = 2^-24, with g(n) = n u / (1 - n
 * u) for n roundings in a row (Higham, Accuracy and Stability of Numerical Algorithms, 3.1), k_i and v_i the decoded
 * vectors, w_i the exact weights, s_i the exact scores and M the greatest of them:
 *
 * r(B), a rotation of blocks of B = m' 2^k' elements, relative in the Euclidean norm: each level of butterflies rounds
 * every element once and further levels keep norms: k' roundings. A sum over the m' terms of the outer matrix is off by
 * g(m' - 1) times the sum of magnitudes, for all its rows together by g(m' - 1) sqrt(m') of the result's norm. The
 * factor 1 / sqrt(B) is rounded, and so is the product with it: r(B) = g(k' + 2 + (m' - 1) sqrt(m')).
 *
 * d_i, a score: |q| |k_i| scale (r(B) + g(N)), N = 4 ceil(B / 64) + 4 + 2 D / B + 5. N counts a chain's products, the
 * levels that add chains, a block's scale and sum (2 each), and the factors: scale, itself rounded, and a codec's.
 * Cauchy's inequality bounds the sums of magnitudes. softcap has a derivative of at most 1; quotient, tanh (below 6 u)
 * and product add 8 u |s_i|. An added mask m is rounded once, and so is the sum: u (|m| + |s_i + m|).
 *
 * e_i, a weight, relative: exp is off by 4 u and its product by u in each step: from a score to the tile's greatest,
 * from there to the chunk's and to all positions'. The steps' differences, each rounded, add up to M - s_i. A position
 * passes less than t = 8 (tiles of a chunk) + c (chunks) steps: e_i = d_i + u (M - s_i) + 5 (t + 2) u.
 *
 * The result, a block of B elements in the Euclidean norm:
 *     |sum_i w_i (e_i + max e + g(min(L, 512) + t + 2 c + 6)) |v_i|| + r(B) |sum_i w_i v_i|
 * with v_i rotated and |v_i| its elements' magnitudes. Terms are rounded when scaled (2), at most once a position of
 * the chunk, once a tile, twice a chunk; the sum of weights less often, though its weights may all be off by max e; the
 * quotient adds 2. Rotating back keeps the norm of these errors and adds its own. Weights below exp(-87) count as 0,
 * which adds 2^-126 |sum_i |v_i||. The result's type rounds once more. tests/attention_bound.py computes this bound,
 * and tests hold every result to it. */
#include "attention_math.h"

static float exp_of_f32(float x) {
    x = QZ_EXP_LOWEST > x ? QZ_EXP_LOWEST : x;
    const float t = fmaf(x, QZ_EXP_LOG2_E, QZ_EXP_ROUND), n = t - QZ_EXP_ROUND;
    const float r = fmaf(n, -QZ_EXP_LN2_LOW, fmaf(n, -QZ_EXP_LN2_HIGH, x));
    float p = fmaf(QZ_EXP_P4, r, QZ_EXP_P3);
    p = fmaf(p, r, QZ_EXP_P2);
    p = fmaf(p, r, QZ_EXP_P1);
    p = fmaf(p, r, QZ_EXP_P0);
    p = fmaf(fmaf(p, r, 1.0f), r, 1.0f);
    return p * qz_float_of((qz_bits_of(t) + 127) << 23);
}

static float tanh_of_f32(float x) {
    const float magnitude = qz_float_of(qz_bits_of(x) & 0x7fffffffu), z = x * x;
    float q = fmaf(QZ_TANH_Q4, z, QZ_TANH_Q3);
    q = fmaf(q, z, QZ_TANH_Q2);
    q = fmaf(q, z, QZ_TANH_Q1);
    q = fmaf(q, z, QZ_TANH_Q0);
    if (magnitude <= QZ_TANH_SMALL) return fmaf(x * z, q, x);
    const float e = exp_of_f32(magnitude * -2.0f), large = (1.0f - e) / (1.0f + e);
    return qz_float_of(qz_bits_of(large) | (qz_bits_of(x) & 0x80000000u));
}

/* What weighs nothing counts for nothing, be it NaN or infinite. */
static float weighed(float value, float weight) { return weight == 0 ? 0.0f : value * weight; }

/* Adds 16 chains by halves. */
static float sum_of_16(float *chains) {
    for (int half = 8; half > 0; half /= 2) {
        for (int i = 0; i < half; i++) chains[i] += chains[i + half];
    }
    return chains[0];
}

/* Floats of a row in places. */
static ptrdiff_t pitch_of(const qz_kv_block *k) {
    return (k->length + QZ_ATTENTION_UNIT - 1) / QZ_ATTENTION_UNIT * QZ_ATTENTION_UNIT;
}

/* In their places; where there is no element, queries are 0 and nobody looks at sums. */
static void centroids_of_row(float *to, const qz_kv_block *k, ptrdiff_t position) {
    const uint8_t *from = k->codes + position * k->stride;
    uint8_t codes[QZ_MAX_HEAD_DIM];
    for (ptrdiff_t j = k->length / QZ_ATTENTION_UNIT * QZ_ATTENTION_UNIT; j < pitch_of(k); j++) to[j] = 0;
    if (k->in_bytes) {
        memcpy(codes, from, (size_t)k->length);
    } else {
        unpack_bits(codes, from, k->bits, k->length);
    }
    for (ptrdiff_t j = 0; j < k->length; j++) to[qz_attention_place(j)] = k->centroids[codes[j] & ((1 << k->bits) - 1)];
}

/* scores += scale * <q, centroids>: what stands at place j in chain j mod 16, so that of 64 elements each chain takes
 * four neighbours, first the even ones. */
static void QZ_NAME(score)(const qz_kv_block *k, const qz_kv_rows *rows, float *scores) {
    float centroids[QZ_MAX_HEAD_DIM];
    for (ptrdiff_t i = 0; i < k->positions; i++) {
        centroids_of_row(centroids, k, i);
        for (ptrdiff_t row = 0; row < rows->count; row++) {
            const float *q = rows->data + row * rows->stride;
            float chains[16] = {0}, *score = scores + row * QZ_ATTENTION_TILE + i;
            for (ptrdiff_t j = 0; j < pitch_of(k); j++) chains[j % 16] = fmaf(centroids[j], q[j], chains[j % 16]);
            *score = fmaf(k->scales[i], sum_of_16(chains), *score);
        }
    }
}

/* accumulator += (weight * scale) * centroids, position by position. */
static void QZ_NAME(weigh)(const qz_kv_block *v, const qz_kv_rows *rows, const float *weights) {
    float centroids[QZ_MAX_HEAD_DIM];
    for (ptrdiff_t i = 0; i < v->positions; i++) {
        centroids_of_row(centroids, v, i);
        for (ptrdiff_t row = 0; row < rows->count; row++) {
            const float scaled = weighed(v->scales[i], weights[row * QZ_ATTENTION_TILE + i]);
            float *to = rows->data + row * rows->stride;
            for (ptrdiff_t j = 0; j < pitch_of(v); j++) to[j] = fmaf(scaled, centroids[j], to[j]);
        }
    }
}

static void QZ_NAME(cap)(float *scores, float softcap) {
    for (int i = 0; i < QZ_ATTENTION_TILE; i++) scores[i] = softcap * tanh_of_f32(scores[i] / softcap);
}

/* Scores of a tile to weights: exp(score - max). Scores of minus infinity, those of what is not seen among them, weigh
 * 0; while there is no other, max counts as 0. */
static void QZ_NAME(soften)(float *scores, qz_softmax *s) {
    float chains[16] = {0}, max = s->max;
    for (int i = 0; i < QZ_ATTENTION_TILE; i++) max = scores[i] > max ? scores[i] : max;
    const float zero = max == -INFINITY ? 0.0f : max;
    for (int i = 0; i < QZ_ATTENTION_TILE; i++) {
        scores[i] = exp_of_f32(scores[i] - zero);
        chains[i % 16] += scores[i];
    }
    s->factor = exp_of_f32(s->max - zero);
    s->sum = fmaf(s->sum, s->factor, sum_of_16(chains));
    s->max = max;
}

static void QZ_NAME(rescale)(float *values, ptrdiff_t count, float factor) {
    for (ptrdiff_t i = 0; i < count; i++) values[i] = weighed(values[i], factor);
}

/* Adds what came of a later chunk. */
static void QZ_NAME(merge)(qz_softmax *s, float *values, const qz_softmax *later, const float *more, ptrdiff_t count) {
    const float max = later->max > s->max ? later->max : s->max, zero = max == -INFINITY ? 0.0f : max;
    const float before = exp_of_f32(s->max - zero), after = exp_of_f32(later->max - zero);
    for (ptrdiff_t i = 0; i < count; i++)
        values[i] = fmaf(after == 0 ? 0.0f : more[i], after, weighed(values[i], before));
    s->sum = fmaf(later->sum, after, s->sum * before);
    s->max = max;
}
