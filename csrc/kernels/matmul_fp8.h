/* FP8 weights on vectors: what a result is, bit for bit, is said by matmul_definition_fp.h. Weights are decoded to
 * float32 a panel of k at a time, as they are exactly.
 *
 * Few rows of x, y = x Wᵀ: lanes run along k, so that a vector, or some, are the chains of a panel. All else: lanes are
 * outputs, and one chain after the other passes through the panel. */

/* A group of weights, by `to`: numbers divided by 256 times the scale multiplied by it. That is the weight, exactly as
 * the definition has it, unless a code is NaN or the greater scale overflows, of which odd tells: the caller then takes
 * the weights of its panel from put_odd_weights_fp8 instead. */
enum { QZ_FP8_GROUP = 32, QZ_FP8_VECTORS = QZ_FP8_GROUP / QZ_LANES };
QZ_INLINE v_i32 decode_group_fp8(v_f32 to[QZ_FP8_VECTORS], const uint8_t *codes, float greater_scale, v_i32 odd) {
    odd = or_i32(odd, f32_from_e4m3(to, codes));
    QZ_UNROLL
    for (int i = 0; i < QZ_FP8_VECTORS; i++) to[i] = mul_f32(to[i], set1_f32(greater_scale));
    return odd;
}

/* The same of as many groups as cost least together. A header may decode more codes at once than f32_from_e4m3 does,
 * and need not call those of NaN odd, if NaN is what comes of them. */
#ifndef QZ_E4M3_TOGETHER
#define QZ_E4M3_TOGETHER 32
#define f32_from_e4m3_together f32_from_e4m3
#endif
enum { QZ_FP8_BESIDE = QZ_E4M3_TOGETHER / QZ_FP8_GROUP };
QZ_INLINE v_i32 decode_groups_fp8(v_f32 to[QZ_FP8_BESIDE * QZ_FP8_VECTORS], const uint8_t *codes,
                                  const float *greater_scales, v_i32 odd) {
    odd = or_i32(odd, f32_from_e4m3_together(to, codes));
    QZ_UNROLL
    for (int i = 0; i < QZ_FP8_BESIDE * QZ_FP8_VECTORS; i++) {
        to[i] = mul_f32(to[i], set1_f32(greater_scales[i / QZ_FP8_VECTORS]));
    }
    return odd;
}

/* Scales, 256 times as large; there is room for whole vectors. readable: of how many there are at least. */
QZ_INLINE v_i32 load_greater_scales(float *to, const char *from, ptrdiff_t stride, qz_type type, ptrdiff_t count,
                                    ptrdiff_t readable) {
    const int in_place = stride == 1 && type == QZ_E8M0 && (count + QZ_LANES - 1) / QZ_LANES * QZ_LANES <= readable;
    v_i32 odd = set1_i32(0);
    if (!in_place) QZ_NAME(load)(to, from, stride, type, count);
    for (ptrdiff_t i = 0; i < count; i += QZ_LANES) {
        const v_f32 scales = in_place ? scales_of_bytes((const uint8_t *)from + i, QZ_E8M0) : load_f32(to + i);
        const v_f32 greater = mul_f32(scales, set1_f32(256.0f));
        odd = or_i32(odd, greater_i32(bits_of_f32(greater), set1_i32(0x7f7fffff)));
        store_f32(to + i, greater);
    }
    return odd;
}

/* `count` groups whose codes and scales stand at strides, each weight by itself. */
static __attribute__((noinline)) void QZ_NAME(put_odd_weights_fp8)(float *w, ptrdiff_t w_stride, const uint8_t *codes,
                                                                   ptrdiff_t stride, const char *scales,
                                                                   ptrdiff_t scale_stride, qz_type type,
                                                                   ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; i++) {
        const v_f32 scale = set1_f32(load_one(scales + i * scale_stride, type));
        for (int j = 0; j < QZ_FP8_GROUP; j += QZ_LANES) {
            store_f32(w + i * w_stride + j, mul_f32(decode_fp8_e4m3(i32_from_u8(codes + i * stride + j)), scale));
        }
    }
}

/* ---- few rows of x, weights [N, K] ---- */

/* Rows of x that share the decoding of a weight; codes ahead that are asked for; panels that are summed side by side,
 * since the chains of one, in one or two vectors, would wait for each other's fused operations. */
enum { QZ_FP8_SHARING = 8, QZ_FP8_PREFETCH = 4096, QZ_FP8_GROUPS = QZ_FP8_PANEL / QZ_FP8_GROUP };
enum { QZ_FP8_TOGETHER_T = QZ_LANES / 4 };

/* Some k of a weight row: codes, and scales as stored and as they multiply, with room for whole vectors. */
typedef struct row_fp8 {
    const uint8_t *codes;
    const char *stored;
    float scales[QZ_FP8_TOGETHER_T * QZ_FP8_GROUPS < QZ_LANES ? QZ_LANES : QZ_FP8_TOGETHER_T * QZ_FP8_GROUPS];
} row_fp8;

QZ_INLINE v_i32 find_row_fp8(row_fp8 *row, const qz_matmul_job *job, ptrdiff_t r, ptrdiff_t first, ptrdiff_t count) {
    const qz_scales *from = &job->scales;
    const ptrdiff_t step = from->scale_group_stride, groups = count / QZ_FP8_GROUP;
    row->codes = job->w + r * job->w_row_stride + first;
    row->stored = from->scales + r * from->scale_row_stride + first / QZ_FP8_GROUP * step;
    if (groups % QZ_LANES) memset(row->scales, 0, sizeof row->scales);
    return load_greater_scales(row->scales, row->stored, step, from->scale_type, groups,
                               (job->columns - first) / QZ_FP8_GROUP);
}

static __attribute__((noinline)) void QZ_NAME(decode_odd_row_fp8)(float *w, const row_fp8 *row,
                                                                  const qz_matmul_job *job, ptrdiff_t count) {
    QZ_NAME(put_odd_weights_fp8)
    (w, QZ_FP8_GROUP, row->codes, QZ_FP8_GROUP, row->stored, job->scales.scale_group_stride, job->scales.scale_type,
     count / QZ_FP8_GROUP);
}

/* Some k of weight row r as floats. */
QZ_INLINE void decode_row_fp8(float *w, const qz_matmul_job *job, ptrdiff_t r, ptrdiff_t first, ptrdiff_t count) {
    row_fp8 row;
    v_i32 odd = find_row_fp8(&row, job, r, first, count);
    ptrdiff_t i = 0;
    for (; i + QZ_E4M3_TOGETHER <= count; i += QZ_E4M3_TOGETHER) {
        v_f32 v[QZ_FP8_BESIDE * QZ_FP8_VECTORS];
        if (i % 64 == 0) __builtin_prefetch(row.codes + QZ_FP8_PREFETCH + i);
        odd = decode_groups_fp8(v, row.codes + i, row.scales + i / QZ_FP8_GROUP, odd);
        QZ_UNROLL
        for (int j = 0; j < QZ_FP8_BESIDE * QZ_FP8_VECTORS; j++) store_f32(w + i + j * QZ_LANES, v[j]);
    }
    for (; i < count; i += QZ_FP8_GROUP) {
        v_f32 v[QZ_FP8_VECTORS];
        odd = decode_group_fp8(v, row.codes + i, row.scales[i / QZ_FP8_GROUP], odd);
        QZ_UNROLL
        for (int j = 0; j < QZ_FP8_VECTORS; j++) store_f32(w + i + j * QZ_LANES, v[j]);
    }
    if (any_i32(odd)) QZ_NAME(decode_odd_row_fp8)(w, &row, job, count);
}

enum { QZ_CHAIN_VECTORS = QZ_FP8_CHAINS / QZ_LANES };

/* The chains of one panel of a row of weights and one of x. */
QZ_INLINE void sum_chains(float *to, const float *w, const float *x, ptrdiff_t count) {
    v_f32 sums[QZ_CHAIN_VECTORS];
    QZ_UNROLL
    for (int v = 0; v < QZ_CHAIN_VECTORS; v++) sums[v] = set1_f32(0.0f);
    for (ptrdiff_t i = 0; i < count; i += QZ_FP8_CHAINS) {
        QZ_UNROLL
        for (int v = 0; v < QZ_CHAIN_VECTORS; v++) {
            sums[v] = fma_f32(load_f32(x + i + v * QZ_LANES), load_f32(w + i + v * QZ_LANES), sums[v]);
        }
    }
    QZ_UNROLL
    for (int v = 0; v < QZ_CHAIN_VECTORS; v++) store_f32(to + v * QZ_LANES, sums[v]);
}

/* The same of weights that only one row of x is multiplied by: they need not be stored in between. `panels` panels of
 * `count` k, which is less than all of a panel only where there is one; their chains stand at to[panel][r]. */
QZ_INLINE void decode_and_sum_chains(float (*to)[QZ_TILE_ROWS][QZ_FP8_CHAINS], const qz_matmul_job *job, ptrdiff_t r,
                                     ptrdiff_t first, ptrdiff_t count, ahead_t ahead, int panels) {
    const float *x = (const float *)job->x + first;
    row_fp8 row;
    v_i32 odd = find_row_fp8(&row, job, r, first, panels * count);
    v_f32 sums[QZ_FP8_TOGETHER_T][QZ_CHAIN_VECTORS];
    QZ_UNROLL
    for (int p = 0; p < panels; p++) {
        QZ_UNROLL
        for (int v = 0; v < QZ_CHAIN_VECTORS; v++) sums[p][v] = set1_f32(0.0f);
    }
    __builtin_prefetch(row.stored + ahead.scales);
    const int beside = panels > 1 ? QZ_FP8_BESIDE : 1;
    for (ptrdiff_t i = 0; i < count; i += beside * QZ_FP8_GROUP) {
        QZ_UNROLL
        for (int p = 0; p < panels; p++) {
            const ptrdiff_t at = p * QZ_FP8_PANEL + i;
            const float *scales = row.scales + at / QZ_FP8_GROUP;
            v_f32 w[QZ_FP8_BESIDE * QZ_FP8_VECTORS];
            __builtin_prefetch(row.codes + ahead.codes + at);
            odd = beside > 1 ? decode_groups_fp8(w, row.codes + at, scales, odd)
                             : decode_group_fp8(w, row.codes + at, *scales, odd);
            QZ_UNROLL
            for (int j = 0; j < beside * QZ_FP8_VECTORS; j++) {
                const int v = j % QZ_CHAIN_VECTORS;
                sums[p][v] = fma_f32(load_f32(x + at + j * QZ_LANES), w[j], sums[p][v]);
            }
        }
    }
    if (any_i32(odd)) {
        _Alignas(64) float w[QZ_FP8_TOGETHER_T * QZ_FP8_PANEL];
        QZ_NAME(decode_odd_row_fp8)(w, &row, job, panels * count);
        for (int p = 0; p < panels; p++) sum_chains(to[p][r], w + p * QZ_FP8_PANEL, x + p * QZ_FP8_PANEL, count);
        return;
    }
    QZ_UNROLL
    for (int p = 0; p < panels; p++) {
        QZ_UNROLL
        for (int v = 0; v < QZ_CHAIN_VECTORS; v++) store_f32(to[p][r] + v * QZ_LANES, sums[p][v]);
    }
}

/* y = y + c_0 + ... + c_15, the sum taken first, for all rows of weights: lanes become these. */
QZ_INLINE void add_chains(float *y, float (*chains)[QZ_FP8_CHAINS]) {
    for (int r = 0; r < QZ_TILE_ROWS; r += QZ_LANES) {
        v_f32 term = set1_f32(0.0f);
        for (int i = 0; i < QZ_FP8_CHAINS; i += QZ_LANES) {
            v_f32 rows[QZ_LANES];
            QZ_UNROLL
            for (int j = 0; j < QZ_LANES; j++) rows[j] = load_f32(chains[r + j] + i);
            transpose_f32(rows);
            term = i == 0 ? rows[0] : add_f32(term, rows[0]);
            QZ_UNROLL
            for (int j = 1; j < QZ_LANES; j++) term = add_f32(term, rows[j]);
        }
        store_f32(y + r, add_f32(load_f32(y + r), term));
    }
}

QZ_INLINE void decode_rows_fp8(const qz_matmul_job *job) {
    float chains[QZ_FP8_SHARING][QZ_TILE_ROWS][QZ_FP8_CHAINS];
    _Alignas(64) float w[QZ_FP8_PANEL];
    const ptrdiff_t together = QZ_FP8_TOGETHER_T * QZ_FP8_PANEL;
    ptrdiff_t first = 0;
    if (job->rows < QZ_TILE_ROWS) memset(chains, 0, sizeof chains);
    for (; job->m == 1 && job->columns - first >= together; first += together) {
        for (ptrdiff_t r = 0; r < job->rows; r++) {
            const ahead_t ahead = find_ahead(job, r, first, together, 8, QZ_FP8_GROUP);
            decode_and_sum_chains(chains, job, r, first, QZ_FP8_PANEL, ahead, QZ_FP8_TOGETHER_T);
        }
        for (int p = 0; p < QZ_FP8_TOGETHER_T; p++) add_chains(job->y, chains[p]);
    }
    for (; first < job->columns; first += QZ_FP8_PANEL) {
        const ptrdiff_t left = job->columns - first, count = left < QZ_FP8_PANEL ? left : QZ_FP8_PANEL;
        for (ptrdiff_t r = 0; r < job->rows; r++) {
            if (job->m == 1) {
                const ahead_t ahead = find_ahead(job, r, first, count, 8, QZ_FP8_GROUP);
                decode_and_sum_chains(chains, job, r, first, count, ahead, 1);
                continue;
            }
            decode_row_fp8(w, job, r, first, count);
            for (ptrdiff_t m = 0; m < job->m; m++) {
                sum_chains(chains[m][r], w, (const float *)(job->x + m * job->x_stride) + first, count);
            }
        }
        for (ptrdiff_t m = 0; m < job->m; m++) add_chains(job->y + m * job->y_stride, chains[m]);
    }
}

static void QZ_NAME(decode_t_fp8)(const qz_matmul_job *job) {
    memset(job->y, 0, (size_t)(job->m * job->y_stride) * sizeof *job->y);
    for (ptrdiff_t r = 0; r < job->rows; r += QZ_TILE_ROWS) {
        for (ptrdiff_t m = 0; m < job->m; m += QZ_FP8_SHARING) {
            qz_matmul_job some = tile_of_job(job, r);
            some.x += m * job->x_stride;
            some.y += m * job->y_stride;
            some.m = job->m - m < QZ_FP8_SHARING ? job->m - m : QZ_FP8_SHARING;
            decode_rows_fp8(&some);
        }
    }
    make_nan_canonical(job->y, job->m * job->y_stride);
}

/* ---- panels and tiles ---- */

/* Panels are QZ_ACROSS outputs wide (matmul_float.h); some stand side by side, as many as a line of the cache has codes
 * of weights [K, N]. */
enum { QZ_FP8_OUTPUTS = 64, QZ_FP8_PANELS = QZ_FP8_OUTPUTS / QZ_ACROSS };
typedef float panel_fp8[QZ_FP8_PANEL][QZ_ACROSS];

/* One chain of each row of x and each output of a panel. */
QZ_INLINE void sum_chain_of_tile(v_f32 (*sums)[2], panel_fp8 panel, const float (*x)[QZ_FP8_PANEL], ptrdiff_t chain,
                                 ptrdiff_t count, int rows) {
    QZ_UNROLL
    for (int m = 0; m < rows; m++) sums[m][0] = sums[m][1] = set1_f32(0.0f);
    for (ptrdiff_t k = chain; k < count; k += QZ_FP8_CHAINS) {
        const v_f32 low = load_f32(panel[k]), high = load_f32(panel[k] + QZ_LANES);
        QZ_UNROLL
        for (int m = 0; m < rows; m++) {
            const v_f32 value = set1_f32(x[m][k]);
            sums[m][0] = fma_f32(value, low, sums[m][0]);
            sums[m][1] = fma_f32(value, high, sums[m][1]);
        }
    }
}

/* What panels are made of, to be fetched while others are multiplied: some rows of codes, `bytes` of each. */
typedef struct weights_fp8 {
    const uint8_t *codes;
    const char *scales;
    ptrdiff_t stride, scale_stride, rows, bytes;
} weights_fp8;

/* The share of a chain. */
QZ_INLINE void prefetch_weights_fp8(const weights_fp8 *from, ptrdiff_t chain) {
    const ptrdiff_t share = (from->rows + QZ_FP8_CHAINS - 2) / (QZ_FP8_CHAINS - 1);
    for (ptrdiff_t r = (chain - 1) * share; r < chain * share && r < from->rows; r++) {
        prefetch(from->scales + r * from->scale_stride);
        for (ptrdiff_t i = 0; i < from->bytes; i += 64) prefetch(from->codes + r * from->stride + i);
    }
}

/* Adds to y the products of `rows` rows of x and a panel; the first `some` of them count. Asks for the x of the tile
 * that comes after this one, from `next` on. */
QZ_INLINE void multiply_tile_fp8(float *y, ptrdiff_t pitch, panel_fp8 panel, const float (*x)[QZ_FP8_PANEL],
                                 const char *next, ptrdiff_t x_stride, ptrdiff_t count, ptrdiff_t some,
                                 const weights_fp8 *weights, int rows) {
    v_f32 totals[QZ_FLOAT_ROWS][2], sums[QZ_FLOAT_ROWS][2];
    sum_chain_of_tile(totals, panel, x, 0, count, rows);
    for (ptrdiff_t chain = 1; chain < QZ_FP8_CHAINS; chain++) {
        for (ptrdiff_t m = 0; m < some; m++) prefetch(next + m * x_stride + (chain - 1) * 64);
        if (weights->rows) prefetch_weights_fp8(weights, chain);
        sum_chain_of_tile(sums, panel, x, chain, count, rows);
        QZ_UNROLL
        for (int m = 0; m < rows; m++) {
            totals[m][0] = add_f32(totals[m][0], sums[m][0]);
            totals[m][1] = add_f32(totals[m][1], sums[m][1]);
        }
    }
    for (ptrdiff_t m = 0; m < some; m++) {
        float *to = y + m * pitch;
        store_f32(to, add_f32(load_f32(to), totals[m][0]));
        store_f32(to + QZ_LANES, add_f32(load_f32(to + QZ_LANES), totals[m][1]));
    }
}

/* Held, since compilers would make of the loop what takes longer to begin. */
QZ_INLINE void copy_floats(float *to, const float *from, ptrdiff_t count) {
    ptrdiff_t i = 0;
    for (; i + QZ_LANES <= count; i += QZ_LANES) {
        v_f32 v = load_f32(from + i);
        QZ_HOLD(v);
        store_f32(to + i, v);
    }
    for (; i < count; i++) to[i] = from[i];
}

/* The height of a tile for `some` rows: there are some heights. */
QZ_INLINE ptrdiff_t height_fp8(ptrdiff_t some) {
    enum { MOST = QZ_FLOAT_ROWS, HALF = MOST / 2 };
    return some == 1 ? 1 : some <= HALF ? HALF : some < MOST ? MOST - 1 : MOST;
}

/* How many of the rows left the next tile takes: as many as go in, or, where that computes fewer rows that do not
 * count, a like share of them. */
QZ_INLINE ptrdiff_t next_rows_fp8(ptrdiff_t left) {
    enum { MOST = QZ_FLOAT_ROWS };
    const ptrdiff_t tiles = (left + MOST - 1) / MOST, alike = (left + tiles - 1) / tiles;
    const ptrdiff_t last = left - (tiles - 1) * MOST;
    if (tiles == 1) return left;
    return tiles * height_fp8(alike) < (tiles - 1) * MOST + height_fp8(last) ? alike : MOST;
}

/* All rows of x against panels of outputs from `output` on and k from `first` on. The last row of a tile stands in
 * for those that it lacks. A tile's x is copied, and asked for while the one before is multiplied: rows of x may be
 * some power of two apart, where processors neither fetch ahead nor find room in the cache for all of them. Not inline:
 * see multiply_panel. */
static __attribute__((noinline)) void QZ_NAME(multiply_panels_fp8)(const qz_matmul_job *job, panel_fp8 *panels,
                                                                   ptrdiff_t output, ptrdiff_t outputs, ptrdiff_t first,
                                                                   ptrdiff_t count, weights_fp8 weights) {
    enum { MOST = QZ_FLOAT_ROWS, HALF = MOST / 2 };
    const ptrdiff_t size = (ptrdiff_t)sizeof(float), stride = job->x_stride;
    _Alignas(64) float x[MOST][QZ_FP8_PANEL];
    for (ptrdiff_t m = 0, some; m < job->m; m += some) {
        const ptrdiff_t left = job->m - m;
        some = next_rows_fp8(left);
        const ptrdiff_t rows = height_fp8(some);
        const char *next = job->x + first * size + (m + some) * stride;
        if (some == left) next = job->x + (first + count) * size;
        for (ptrdiff_t r = 0; r < rows; r++) {
            copy_floats(x[r], (const float *)(job->x + (m + (r < some ? r : some - 1)) * stride) + first, count);
        }
        for (ptrdiff_t n = 0; n < outputs; n += QZ_ACROSS) {
            float *y = job->y + m * job->y_stride + output + n;
            panel_fp8 *panel = panels + n / QZ_ACROSS;
            if (some == 1) {
                multiply_tile_fp8(y, job->y_stride, *panel, x, next, stride, count, 1, &weights, 1);
            } else if (some <= HALF) {
                multiply_tile_fp8(y, job->y_stride, *panel, x, next, stride, count, some, &weights, HALF);
            } else if (some < MOST) {
                multiply_tile_fp8(y, job->y_stride, *panel, x, next, stride, count, some, &weights, MOST - 1);
            } else {
                multiply_tile_fp8(y, job->y_stride, *panel, x, next, stride, count, some, &weights, MOST);
            }
            weights.rows = 0;
        }
    }
}

#ifdef QZ_E4M3_OF_LANES
/* As many k of QZ_LANES rows as a vector has bytes; `scales` are theirs, group by group. */
QZ_INLINE v_i32 decode_columns_fp8(panel_fp8 panel, int lane, const uint8_t *const w[QZ_LANES], ptrdiff_t k,
                                   const float (*scales)[QZ_LANES], v_i32 odd) {
    v_f32 lines[QZ_LANES];
    QZ_UNROLL
    for (int i = 0; i < QZ_LANES; i++) lines[i] = f32_of_bits((v_i32)load_u8(w[i] + k));
    transpose_f32(lines);
    QZ_UNROLL
    for (int i = 0; i < QZ_LANES; i++) {
        v_f32 v[4];
        odd = or_i32(odd, f32_of_lanes_e4m3(v, (v_u8)bits_of_f32(lines[i])));
        const v_f32 scale = load_f32(scales[(k + 4 * i) / QZ_FP8_GROUP]);
        QZ_UNROLL
        for (int j = 0; j < 4; j++) store_f32(panel[k + 4 * i + j] + lane, mul_f32(v[j], scale));
    }
    return odd;
}

/* decode_lanes_fp8 of whole vectors. Returns 0 where weights are odd. */
QZ_INLINE int decode_whole_lanes_fp8(panel_fp8 panel, int lane, const qz_matmul_job *job, ptrdiff_t r, ptrdiff_t first,
                                     ptrdiff_t count) {
    enum { GROUPS = QZ_FP8_PANEL / QZ_FP8_GROUP };
    const qz_scales *from = &job->scales;
    const ptrdiff_t group = first / QZ_FP8_GROUP * from->scale_group_stride;
    const uint8_t *w[QZ_LANES];
    _Alignas(64) float scales[GROUPS][QZ_LANES];
    v_i32 odd = set1_i32(0);
    for (ptrdiff_t i = 0; i < QZ_LANES; i++) {
        const ptrdiff_t row = r + i < job->rows ? r + i : job->rows - 1;
        const char *stored = from->scales + row * from->scale_row_stride + group;
        w[i] = job->w + row * job->w_row_stride + first;
        for (ptrdiff_t g = 0; g < count / QZ_FP8_GROUP; g++) {
            scales[g][i] = load_one(stored + g * from->scale_group_stride, QZ_E8M0);
        }
    }
    for (ptrdiff_t g = 0; g < count / QZ_FP8_GROUP; g++) {
        const v_f32 greater = mul_f32(load_f32(scales[g]), set1_f32(256.0f));
        odd = or_i32(odd, greater_i32(bits_of_f32(greater), set1_i32(0x7f7fffff)));
        store_f32(scales[g], greater);
    }
    for (ptrdiff_t k = 0; k < count; k += QZ_VECTOR_BYTES) {
        odd = decode_columns_fp8(panel, lane, w, k, (const float (*)[QZ_LANES])scales, odd);
    }
    return !any_i32(odd);
}
#endif

/* QZ_LANES rows of weights from row r on become lanes of a panel; the last of the job stands in for those beyond. */
QZ_INLINE void decode_lanes_fp8(panel_fp8 panel, int lane, const qz_matmul_job *job, ptrdiff_t r, ptrdiff_t first,
                                ptrdiff_t count) {
#ifdef QZ_E4M3_OF_LANES
    if (count % QZ_VECTOR_BYTES == 0 && decode_whole_lanes_fp8(panel, lane, job, r, first, count)) return;
#endif
    float w[QZ_LANES][QZ_FP8_PANEL];
    for (ptrdiff_t i = 0; i < QZ_LANES; i++) {
        decode_row_fp8(w[i], job, r + i < job->rows ? r + i : job->rows - 1, first, count);
    }
    for (ptrdiff_t k = 0; k < count; k += QZ_LANES) {
        v_f32 lines[QZ_LANES];
        QZ_UNROLL
        for (int i = 0; i < QZ_LANES; i++) lines[i] = load_f32(w[i] + k);
        transpose_f32(lines);
        QZ_UNROLL
        for (int i = 0; i < QZ_LANES; i++) store_f32(panel[k + i] + lane, lines[i]);
    }
}

/* From k on, or, where that is the end, of the rows that follow those of the job. */
QZ_INLINE weights_fp8 next_weights_fp8(const qz_matmul_job *job, ptrdiff_t k) {
    const qz_scales *from = &job->scales;
    const ptrdiff_t row = k < job->columns ? 0 : job->rows;
    if (row) k = 0;
    return (weights_fp8){job->w + row * job->w_row_stride + k,
                         from->scales + row * from->scale_row_stride + k / QZ_FP8_GROUP * from->scale_group_stride,
                         job->w_row_stride,
                         from->scale_row_stride,
                         job->rows,
                         QZ_FP8_PANEL};
}

static void QZ_NAME(prefill_t_fp8)(const qz_matmul_job *job) {
    _Alignas(64) panel_fp8 panels[QZ_PREFILL_ROWS / QZ_ACROSS];
    memset(job->y, 0, (size_t)(job->m * job->y_stride) * sizeof *job->y);
    for (ptrdiff_t first = 0; first < job->columns; first += QZ_FP8_PANEL) {
        const ptrdiff_t left = job->columns - first, count = left < QZ_FP8_PANEL ? left : QZ_FP8_PANEL;
        for (ptrdiff_t r = 0; r < job->rows; r += QZ_ACROSS) {
            decode_lanes_fp8(panels[r / QZ_ACROSS], 0, job, r, first, count);
            decode_lanes_fp8(panels[r / QZ_ACROSS], QZ_LANES, job, r + QZ_LANES, first, count);
        }
        QZ_NAME(multiply_panels_fp8)(job, panels, 0, job->rows, first, count, next_weights_fp8(job, first + count));
    }
    make_nan_canonical(job->y, job->m * job->y_stride);
}

/* ---- weights [K, N] ---- */

/* Panels of outputs [column, column + outputs), of `count` k from `first` on. */
QZ_INLINE void decode_panels_fp8(panel_fp8 *panels, const qz_matmul_job *job, ptrdiff_t column, ptrdiff_t outputs,
                                 ptrdiff_t first, ptrdiff_t count) {
    const qz_scales *from = &job->scales;
    for (ptrdiff_t n = 0; n < outputs; n += QZ_FP8_GROUP) {
        const ptrdiff_t group = (column + n) / QZ_FP8_GROUP, step = job->w_row_stride;
        const uint8_t *codes = job->w + first * step + column + n;
        const char *stored = from->scales + first * from->scale_row_stride + group * from->scale_group_stride;
        float scales[QZ_FP8_PANEL];
        if (count % QZ_LANES) memset(scales, 0, sizeof scales);
        v_i32 odd = load_greater_scales(scales, stored, from->scale_row_stride, from->scale_type, count, 0);
        for (ptrdiff_t k = 0; k < count; k++) {
            v_f32 v[QZ_FP8_VECTORS];
            odd = decode_group_fp8(v, codes + k * step, scales[k], odd);
            QZ_UNROLL
            for (int i = 0; i < QZ_FP8_VECTORS; i++) {
                const ptrdiff_t at = n + i * QZ_LANES;
                store_f32(panels[at / QZ_ACROSS][k] + at % QZ_ACROSS, v[i]);
            }
        }
        for (ptrdiff_t k = 0; k < count && any_i32(odd); k++) {
            float w[QZ_FP8_GROUP];
            QZ_NAME(put_odd_weights_fp8)
            (w, QZ_FP8_GROUP, codes + k * step, step, stored + k * from->scale_row_stride, 0, from->scale_type, 1);
            for (ptrdiff_t i = n; i < n + QZ_FP8_GROUP; i++) panels[i / QZ_ACROSS][k][i % QZ_ACROSS] = w[i - n];
        }
    }
}

static void QZ_NAME(matmul_n_fp8)(const qz_matmul_job *job) {
    _Alignas(64) panel_fp8 panels[QZ_FP8_PANELS];
    memset(job->y, 0, (size_t)(job->m * job->y_stride) * sizeof *job->y);
    for (ptrdiff_t first = 0; first < job->rows; first += QZ_FP8_PANEL) {
        const ptrdiff_t left = job->rows - first, count = left < QZ_FP8_PANEL ? left : QZ_FP8_PANEL;
        for (ptrdiff_t column = 0; column < job->columns; column += QZ_FP8_OUTPUTS) {
            const ptrdiff_t rest = job->columns - column, outputs = rest < QZ_FP8_OUTPUTS ? rest : QZ_FP8_OUTPUTS;
            decode_panels_fp8(panels, job, column, outputs, first, count);
            QZ_NAME(multiply_panels_fp8)(job, panels, column, outputs, first, count, (weights_fp8){0});
        }
    }
    make_nan_canonical(job->y, job->m * job->y_stride);
}
