/* The float class of matmul: plain float32 sums over vectors, multiplications and additions fused where the ISA does
 * so. What comes out depends on the ISA and, by the height of the tiles that rows of x fall into, on how many rows
 * there are. tests/reference.py derives the error bound (bound_float) from the orders of addition here; NaN and Inf go
 * where IEEE arithmetic takes them.
 *
 * Few rows of x, y = x Wᵀ: the codes of a vector are multiplied as they are, and scale and bias come in once a group:
 * s sum(q x) + b sum(x). All else: a panel of weights s q + b is decoded to float, lanes being outputs, and multiplied
 * by tiles of rows of x. */

/* The width of codes in a word: those that straddle bytes, and those of 1 bit, are unpacked to bytes first. */
#define QZ_WIDTH(bits) ((bits) == 2 || (bits) == 4 ? (bits) : 8)
#define QZ_RUN(bits) (32 / QZ_WIDTH(bits)) /* consecutive codes in a lane's word */
#define QZ_RUNS(bits) (QZ_LANES * QZ_RUN(bits))

/* Words of QZ_RUNS(bits) consecutive codes, QZ_RUN(bits) a lane. Reads no byte beyond them. */
QZ_INLINE v_i32 load_words(const uint8_t *packed, int bits) {
    uint8_t codes[4 * QZ_LANES];
    if (bits == QZ_WIDTH(bits)) return load_i32((const int32_t *)packed);
    unpack_bits(codes, packed, bits, sizeof codes);
    return load_i32((const int32_t *)codes);
}

/* ---- few rows of x, weights [N, K] ---- */

/* Codes are masked where they stand in their half of a word, which makes them 2^QZ_PLACE times as large, and x is
 * divided by as much beforehand: one shift a word, and no shuffle. */
#define QZ_PLACE(j, width) ((j) * (width) % 16)

QZ_INLINE v_f32 code_in_place(v_i32 words, int j, int width) {
    if (j * width >= 16) words = shr_u32(words, 16);
    return f32_from_i32(and_i32(words, set1_i32(((1 << width) - 1) << QZ_PLACE(j, width))));
}

/* A prepared row: x padded with zeros to whole vectors of words, place [j][lane] of each for code j of the lane's word;
 * then sum(x) of each group, padded with zeros to whole vectors. */
QZ_INLINE ptrdiff_t padded_to(ptrdiff_t count, ptrdiff_t unit) { return (count + unit - 1) / unit * unit; }

QZ_INLINE size_t float_row_size(ptrdiff_t k, ptrdiff_t group_size, int bits) {
    return (size_t)(padded_to(k, QZ_RUNS(bits)) + padded_to(k / group_size, QZ_LANES)) * sizeof(float);
}

QZ_INLINE void prepare_float_row(float *to, const float *x, ptrdiff_t k, ptrdiff_t group_size, int bits) {
    const int run = QZ_RUN(bits), runs = QZ_RUNS(bits);
    const ptrdiff_t padded = padded_to(k, runs);
    float *sums = to + padded, padding[QZ_RUNS(2)] = {0};
    for (ptrdiff_t at = 0; at < padded; at += runs) {
        const float *from = x + at;
        if (at + runs > k) from = memcpy(padding, from, (size_t)(k - at) * sizeof *x);
        for (int j = 0; j < run; j++) {
            const float place = 1.0f / (float)(1 << QZ_PLACE(j, QZ_WIDTH(bits)));
            for (int lane = 0; lane < QZ_LANES; lane++) to[at + j * QZ_LANES + lane] = from[lane * run + j] * place;
        }
    }
    memset(sums, 0, (size_t)padded_to(k / group_size, QZ_LANES) * sizeof *sums);
    for (ptrdiff_t group = 0; group < k / group_size; group++) {
        v_f32 sum = load_f32(x + group * group_size);
        float lanes[QZ_LANES];
        for (ptrdiff_t i = QZ_LANES; i < group_size; i += QZ_LANES) {
            sum = add_f32(sum, load_f32(x + group * group_size + i));
        }
        store_f32(lanes, sum);
        for (int lane = 0; lane < QZ_LANES; lane++) sums[group] += lanes[lane];
    }
}

/* Rows of x that share the decoding of a weight, and the groups whose scales are loaded at a time: whole vectors of
 * words at every width. One row of x is multiplied by several rows of weights at a time, which share its loads and what
 * begins and ends a row. */
enum { QZ_SHARING = 4, QZ_GROUPS = 64, QZ_LINES = 2 };

QZ_INLINE int log2_of(ptrdiff_t power_of_two) { return __builtin_ctzll((unsigned long long)power_of_two); }

/* Some groups of `lines` weight rows and what they are multiplied by: prepared rows, from these groups on. Scales are
 * padded with zeros. */
typedef struct chunk {
    const char *x;
    ptrdiff_t x_stride;
    const uint8_t *w;
    ptrdiff_t w_row_stride;
    float scales[QZ_LINES][QZ_GROUPS + QZ_LANES], biases[QZ_GROUPS + QZ_LANES];
    int group_shift; /* log2 of the group size */
} chunk;

/* Adds sum(q x) s over one vector of words of each line. Chains are short; where sums are few, each has two. */
QZ_INLINE void add_words(v_f32 (*totals)[QZ_SHARING], v_i32 *words, const char *x, ptrdiff_t x_stride,
                         const v_f32 *scales, int lines, int rows, int bits) {
    const int chains = lines * rows > 2 ? 1 : 2, run = QZ_RUN(bits);
    v_f32 sums[QZ_LINES][QZ_SHARING][2];
    QZ_UNROLL
    for (int j = 0; j < run; j++) {
        QZ_UNROLL
        for (int i = 0; i < lines * rows; i++) {
            const v_f32 value = load_f32((const float *)(x + i % rows * x_stride) + j * QZ_LANES);
            const v_f32 codes = code_in_place(words[i / rows], j, QZ_WIDTH(bits));
            v_f32 *sum = &sums[i / rows][i % rows][j % chains];
            *sum = j < chains ? mul_f32(codes, value) : fma_f32(codes, value, *sum);
        }
    }
    QZ_UNROLL
    for (int i = 0; i < lines * rows; i++) {
        const v_f32 *sum = sums[i / rows][i % rows];
        v_f32 *total = &totals[i / rows][i % rows];
        *total = fma_f32(chains == 2 ? add_f32(sum[0], sum[1]) : sum[0], scales[i / rows], *total);
    }
}

/* Whether no vector of words has several groups. A loop for either case spends no instructions on the other. */
QZ_INLINE int scale_is_shared(int group_shift, int bits) {
    return QZ_RUNS(bits) <= 32 || QZ_RUNS(bits) >> group_shift <= 1;
}

/* The scales of vector `i` of words, each for the lanes of its group. */
QZ_INLINE v_f32 scales_of_words(const float *scales, int group_shift, ptrdiff_t i, int shared, int bits) {
    const ptrdiff_t runs = QZ_RUNS(bits), groups = runs >> group_shift;
    if (shared) return set1_f32(scales[i * runs >> group_shift]);
    v_f32 v = load_f32(scales + i * groups);
    for (ptrdiff_t lanes = groups; lanes < QZ_LANES; lanes *= 2) v = double_lanes(v);
    return v;
}

/* Asks for the scales that belong to weights QZ_PREFETCH bytes ahead. */
QZ_INLINE void prefetch_scales(const char *at, ptrdiff_t stride, ptrdiff_t groups, ptrdiff_t group_bytes) {
    const ptrdiff_t ahead = QZ_PREFETCH / group_bytes;
    for (ptrdiff_t i = 0; i < groups * stride; i += 64) __builtin_prefetch(at + ahead * stride + i);
}

/* Adds the first `count` vectors of words. */
QZ_INLINE void add_vectors(v_f32 (*totals)[QZ_SHARING], const chunk *c, ptrdiff_t count, int lines, int rows,
                           int shared, int bits) {
    const ptrdiff_t runs = QZ_RUNS(bits), bytes = runs * bits / 8;
    for (ptrdiff_t i = 0; i < count; i++) {
        v_i32 words[QZ_LINES];
        v_f32 scales[QZ_LINES];
        QZ_UNROLL
        for (int r = 0; r < lines; r++) {
            const uint8_t *w = c->w + r * c->w_row_stride + i * bytes;
            __builtin_prefetch(w + QZ_PREFETCH);
            words[r] = load_words(w, bits);
            scales[r] = scales_of_words(c->scales[r], c->group_shift, i, shared, bits);
        }
        add_words(totals, words, c->x + i * runs * (ptrdiff_t)sizeof(float), c->x_stride, scales, lines, rows, bits);
    }
}

QZ_INLINE void add_chunk(v_f32 (*totals)[QZ_SHARING], const chunk *c, ptrdiff_t codes, int lines, int rows, int bits) {
    const ptrdiff_t runs = QZ_RUNS(bits), whole = codes / runs;
    const int shared = scale_is_shared(c->group_shift, bits);
    if (shared) {
        add_vectors(totals, c, whole, lines, rows, 1, bits);
    } else {
        add_vectors(totals, c, whole, lines, rows, 0, bits);
    }
    if (codes % runs == 0) return;
    v_i32 words[QZ_LINES];
    v_f32 scales[QZ_LINES];
    QZ_UNROLL
    for (int r = 0; r < lines; r++) {
        uint8_t last[4 * QZ_LANES] = {0};
        memcpy(last, c->w + r * c->w_row_stride + whole * runs * bits / 8, (size_t)(codes % runs * bits / 8));
        words[r] = load_words(last, bits);
        scales[r] = scales_of_words(c->scales[r], c->group_shift, whole, shared, bits);
    }
    add_words(totals, words, c->x + whole * runs * (ptrdiff_t)sizeof(float), c->x_stride, scales, lines, rows, bits);
}

/* Makes weight row r a line of the chunk: loads its scales of `groups` groups from `first` on, and adds b sum(x). */
QZ_INLINE void begin_line(v_f32 *totals, chunk *c, int line, const qz_matmul_job *job, ptrdiff_t r, ptrdiff_t first,
                          ptrdiff_t groups, int rows, int bits) {
    const qz_scales *from = &job->scales;
    const ptrdiff_t padded = padded_to(job->columns, QZ_RUNS(bits)), group_bytes = job->group_size * bits / 8;
    const char *s = from->scales + r * from->scale_row_stride + first * from->scale_group_stride;
    const char *b = from->biases + r * from->bias_row_stride + first * from->bias_group_stride;
    if (groups % QZ_LANES) memset(c->scales[line] + groups, 0, QZ_LANES * sizeof(float));
    if (groups % QZ_LANES) memset(c->biases + groups, 0, QZ_LANES * sizeof(float));
    prefetch_scales(s, from->scale_group_stride, groups, group_bytes);
    prefetch_scales(b, from->bias_group_stride, groups, group_bytes);
    QZ_NAME(load)(c->scales[line], s, from->scale_group_stride, from->scale_type, groups);
    QZ_NAME(load)(c->biases, b, from->bias_group_stride, from->bias_type, groups);
    for (ptrdiff_t i = 0; i < groups; i += QZ_LANES) {
        QZ_UNROLL
        for (int m = 0; m < rows; m++) {
            const float *sums = (const float *)(job->x + m * job->x_stride) + padded + first;
            totals[m] = fma_f32(load_f32(c->biases + i), load_f32(sums + i), totals[m]);
        }
    }
}

QZ_INLINE float sum_of_lanes(v_f32 v) {
    float lanes[QZ_LANES];
    store_f32(lanes, v);
    for (int half = QZ_LANES / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

/* `lines` weight rows from row r on times up to QZ_SHARING rows of x. */
QZ_INLINE void multiply_float_rows(float *y, const qz_matmul_job *job, ptrdiff_t r, int lines, int rows, int bits) {
    const ptrdiff_t groups = job->columns / job->group_size;
    v_f32 totals[QZ_LINES][QZ_SHARING];
    chunk c;
    c.x_stride = job->x_stride;
    c.w_row_stride = job->w_row_stride;
    c.group_shift = log2_of(job->group_size);
    QZ_UNROLL
    for (int i = 0; i < lines * rows; i++) totals[i / rows][i % rows] = set1_f32(0.0f);
    for (ptrdiff_t first = 0; first < groups; first += QZ_GROUPS) {
        const ptrdiff_t some = groups - first < QZ_GROUPS ? groups - first : QZ_GROUPS, k = first * job->group_size;
        c.x = job->x + k * (ptrdiff_t)sizeof(float);
        c.w = job->w + r * job->w_row_stride + k * bits / 8;
        QZ_UNROLL
        for (int i = 0; i < lines; i++) begin_line(totals[i], &c, i, job, r + i, first, some, rows, bits);
        add_chunk(totals, &c, some * job->group_size, lines, rows, bits);
    }
    QZ_UNROLL
    for (int i = 0; i < lines * rows; i++) {
        y[i % rows * QZ_FLOAT_OUTPUTS + r + i / rows] = sum_of_lanes(totals[i / rows][i % rows]);
    }
}

/* Defines `name`, which shares rows of weights and of x out to `multiply`. format: bits, or what else `multiply` is
 * told. By name: compilers leave calls through a pointer as calls, constant though it be. */
#define QZ_DEFINE_FLOAT_DECODE(name, multiply)                                                               \
    QZ_INLINE void name(const qz_matmul_job *job, int format) {                                              \
        for (ptrdiff_t m = 0; m < job->m; m += QZ_SHARING) {                                                 \
            qz_matmul_job some = *job;                                                                       \
            float *y = job->y + m * QZ_FLOAT_OUTPUTS;                                                        \
            ptrdiff_t r = 0;                                                                                 \
            some.x += m * job->x_stride;                                                                     \
            if (job->m - m == 1) {                                                                           \
                for (; r + QZ_LINES <= job->rows; r += QZ_LINES) multiply(y, &some, r, QZ_LINES, 1, format); \
            }                                                                                                \
            for (; r < job->rows; r++) {                                                                     \
                switch (job->m - m) {                                                                        \
                case 1: multiply(y, &some, r, 1, 1, format); break;                                          \
                case 2: multiply(y, &some, r, 1, 2, format); break;                                          \
                case 3: multiply(y, &some, r, 1, 3, format); break;                                          \
                default: multiply(y, &some, r, 1, 4, format);                                                \
                }                                                                                            \
            }                                                                                                \
        }                                                                                                    \
    }
QZ_DEFINE_FLOAT_DECODE(float_decode_t, multiply_float_rows)

/* ---- panels and tiles ---- */

/* A panel is QZ_ACROSS outputs wide, two vectors, and as long in k as the job. Two vectors of sums for each row of x
 * fill the registers but for the panel's vectors and x. */
enum { QZ_ACROSS = 2 * QZ_LANES };

/* Adds the products of column k of x with one line of a panel. */
QZ_INLINE void add_outer(v_f32 (*sums)[2], const float *line, const char *x, ptrdiff_t x_stride, ptrdiff_t k,
                         int rows) {
    const v_f32 low = load_f32(line), high = load_f32(line + QZ_LANES);
    QZ_UNROLL
    for (int m = 0; m < rows; m++) {
        const v_f32 value = set1_f32(((const float *)(x + m * x_stride))[k]);
        sums[m][0] = fma_f32(value, low, sums[m][0]);
        sums[m][1] = fma_f32(value, high, sums[m][1]);
    }
}

/* Adds to y the products of `rows` rows of x and a panel. A sum of few rows has several chains, so that additions wait
 * less for each other. No number of threads may change which have: what is shared out, 8 rows or more, falls into tiles
 * of at least 3 rows where QZ_FLOAT_ROWS is 4, else of at least 4 (multiply_panel). */
QZ_INLINE void multiply_tile(float *y, ptrdiff_t pitch, const float *panel, const char *x, ptrdiff_t x_stride,
                             ptrdiff_t count, int rows) {
    const int chains = rows == 1 ? 4 : rows < (QZ_FLOAT_ROWS == 4 ? 3 : 4) ? 2 : 1;
    v_f32 sums[4][QZ_FLOAT_ROWS][2];
    QZ_UNROLL
    for (int i = 0; i < chains * rows; i++) sums[i / rows][i % rows][0] = sums[i / rows][i % rows][1] = set1_f32(0.0f);
    ptrdiff_t k = 0;
    for (; k + chains <= count; k += chains) {
        QZ_UNROLL
        for (int c = 0; c < chains; c++) add_outer(sums[c], panel + (k + c) * QZ_ACROSS, x, x_stride, k + c, rows);
    }
    for (; k < count; k++) add_outer(sums[0], panel + k * QZ_ACROSS, x, x_stride, k, rows);
    QZ_UNROLL
    for (int m = 0; m < rows; m++) {
        float *to = y + m * pitch;
        for (int c = 1; c < chains; c++) {
            sums[0][m][0] = add_f32(sums[0][m][0], sums[c][m][0]);
            sums[0][m][1] = add_f32(sums[0][m][1], sums[c][m][1]);
        }
        store_f32(to, add_f32(load_f32(to), sums[0][m][0]));
        store_f32(to + QZ_LANES, add_f32(load_f32(to + QZ_LANES), sums[0][m][1]));
    }
}

#define QZ_TILE_CASE(rows)                                                                                    \
    case rows:                                                                                                \
        if (rows <= QZ_FLOAT_ROWS) {                                                                          \
            multiply_tile(y, pitch, panel, x, x_stride, count, rows <= QZ_FLOAT_ROWS ? rows : QZ_FLOAT_ROWS); \
        }                                                                                                     \
        break;

static void multiply_rows(float *y, ptrdiff_t pitch, const float *panel, const char *x, ptrdiff_t x_stride,
                          ptrdiff_t count, ptrdiff_t rows) {
    switch (rows) {
        QZ_TILE_CASE(1)
        QZ_TILE_CASE(2)
        QZ_TILE_CASE(3)
        QZ_TILE_CASE(4)
        QZ_TILE_CASE(5)
        QZ_TILE_CASE(6)
        QZ_TILE_CASE(7)
        QZ_TILE_CASE(8)
        QZ_TILE_CASE(9)
        QZ_TILE_CASE(10)
        QZ_TILE_CASE(11)
        QZ_TILE_CASE(12)
        QZ_TILE_CASE(13)
        QZ_TILE_CASE(14)
    }
}

/* All rows of x times a panel, in tiles of nearly the same height: a low tile takes as long as a higher one. Not
 * inline: gcc would keep constants of the decoding in registers that the sums need. */
static __attribute__((noinline)) void multiply_panel(float *y, ptrdiff_t pitch, const float *panel, const char *x,
                                                     ptrdiff_t x_stride, ptrdiff_t count, ptrdiff_t m) {
    const ptrdiff_t tiles = (m + QZ_FLOAT_ROWS - 1) / QZ_FLOAT_ROWS;
    for (ptrdiff_t tile = 0; tile < tiles; tile++) {
        const ptrdiff_t first = m * tile / tiles, last = m * (tile + 1) / tiles;
        multiply_rows(y + first * pitch, pitch, panel, x + first * x_stride, x_stride, count, last - first);
    }
}

/* ---- weights [N, K] ---- */

/* Scales and biases of one panel: of each group, QZ_ACROSS rows'. */
typedef struct panel_scales {
    float scales[QZ_FLOAT_PANEL_T / 32][QZ_ACROSS], biases[QZ_FLOAT_PANEL_T / 32][QZ_ACROSS];
} panel_scales;

QZ_INLINE void load_panel_scales(panel_scales *to, const qz_matmul_job *job, ptrdiff_t first, ptrdiff_t rows) {
    const qz_scales *from = &job->scales;
    const ptrdiff_t groups = job->columns / job->group_size;
    const char *s = from->scales + first * from->scale_row_stride;
    const char *b = from->biases + first * from->bias_row_stride;
#ifdef QZ_LOADS_SOME
    int done = 1;
    for (int lane = 0; lane < QZ_ACROSS && done; lane += QZ_LANES) {
        rows_of_lanes of;
        for (int i = 0; i < QZ_LANES; i++) {
            const ptrdiff_t r = first + (lane + i < rows ? lane + i : rows - 1);
            of.scales[i] = r * from->scale_row_stride;
            of.biases[i] = r * from->bias_row_stride;
        }
        done = QZ_NAME(load_columns)(to->scales[0] + lane, to->biases[0] + lane, QZ_ACROSS, from, &of, (int)groups, 1);
    }
    if (done) return;
#endif
    for (ptrdiff_t g = 0; g < groups; g++) {
        QZ_NAME(load)(to->scales[g], s + g * from->scale_group_stride, from->scale_row_stride, from->scale_type, rows);
        QZ_NAME(load)(to->biases[g], b + g * from->bias_group_stride, from->bias_row_stride, from->bias_type, rows);
    }
}

/* Asks for what the panel of the next k needs of the first `rows` rows, while this one is multiplied. */
QZ_INLINE void prefetch_panel(const qz_matmul_job *job, ptrdiff_t first, ptrdiff_t rows, int bits) {
    const qz_scales *from = &job->scales;
    const ptrdiff_t groups = job->columns / job->group_size;
    for (ptrdiff_t r = first; r < first + rows; r++) {
        const uint8_t *next = job->w + r * job->w_row_stride + job->columns * bits / 8;
        for (int i = 0; i < QZ_FLOAT_PANEL_T * bits / 8; i += 64) __builtin_prefetch(next + i);
        __builtin_prefetch(from->scales + r * from->scale_row_stride + groups * from->scale_group_stride);
        __builtin_prefetch(from->biases + r * from->bias_row_stride + groups * from->bias_group_stride);
    }
}

/* Words of QZ_LANES rows: vector i gets word i of each. */
QZ_INLINE void load_words_of_rows(v_i32 *words, const uint8_t *w, ptrdiff_t row_stride, int bits) {
    v_f32 lines[QZ_LANES];
    QZ_UNROLL
    for (int r = 0; r < QZ_LANES; r++) lines[r] = f32_of_bits(load_words(w + r * row_stride, bits));
    transpose_f32(lines);
    QZ_UNROLL
    for (int r = 0; r < QZ_LANES; r++) words[r] = bits_of_f32(lines[r]);
}

/* Words of QZ_ACROSS rows, of which there are `rows`, with `codes` codes of each. Where those are too few for whole
 * vectors, kernels read a copy, which is padded with zeros. */
QZ_INLINE void load_words_of_panel(v_i32 *low, v_i32 *high, uint8_t (*copy)[4 * QZ_LANES], const uint8_t *from,
                                   ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t codes, int bits) {
    if (codes < QZ_RUNS(bits) || rows < QZ_ACROSS) {
        for (ptrdiff_t r = 0; r < rows; r++) memcpy(copy[r], from + r * stride, (size_t)(codes * bits / 8));
        from = copy[0];
        stride = sizeof copy[0];
    }
    load_words_of_rows(low, from, stride, bits);
    load_words_of_rows(high, from + QZ_LANES * stride, stride, bits);
}

/* QZ_RUN(bits) lines of a panel: weights of one k each. */
QZ_INLINE void decode_lines(float *to, v_i32 low, v_i32 high, const float *scales, const float *biases, int bits) {
    const v_f32 s0 = load_f32(scales), s1 = load_f32(scales + QZ_LANES);
    const v_f32 b0 = load_f32(biases), b1 = load_f32(biases + QZ_LANES);
    const int run = QZ_RUN(bits);
    QZ_UNROLL
    for (int j = 0; j < run; j++) {
        store_f32(to + j * QZ_ACROSS, fma_f32(f32_of_code(low, j, QZ_WIDTH(bits)), s0, b0));
        store_f32(to + j * QZ_ACROSS + QZ_LANES, fma_f32(f32_of_code(high, j, QZ_WIDTH(bits)), s1, b1));
    }
}

/* The first `rows` rows at w. */
QZ_INLINE void decode_panel_t(float *panel, const panel_scales *scales, const qz_matmul_job *job, const uint8_t *w,
                              ptrdiff_t rows, int bits) {
    const ptrdiff_t count = job->columns, runs = QZ_RUNS(bits), run = QZ_RUN(bits);
    const int shift = log2_of(job->group_size);
    uint8_t copy[QZ_ACROSS][4 * QZ_LANES] = {{0}};
    for (ptrdiff_t at = 0; at < count; at += runs) {
        const ptrdiff_t codes = count - at < runs ? count - at : runs;
        v_i32 low[QZ_LANES], high[QZ_LANES];
        load_words_of_panel(low, high, copy, w + at * bits / 8, job->w_row_stride, rows, codes, bits);
        for (ptrdiff_t i = 0; i * run < codes; i++) {
            const ptrdiff_t k = at + i * run, group = k >> shift;
            decode_lines(panel + k * QZ_ACROSS, low[i], high[i], scales->scales[group], scales->biases[group], bits);
        }
    }
}

QZ_INLINE void float_prefill_t(const qz_matmul_job *job, int bits) {
    _Alignas(64) float panel[QZ_FLOAT_PANEL_T * QZ_ACROSS];
    panel_scales scales;
    memset(&scales, 0, sizeof scales);
    for (ptrdiff_t first = 0; first < job->rows; first += QZ_ACROSS) {
        const ptrdiff_t rows = job->rows - first < QZ_ACROSS ? job->rows - first : QZ_ACROSS;
        load_panel_scales(&scales, job, first, rows);
        decode_panel_t(panel, &scales, job, job->w + first * job->w_row_stride, rows, bits);
        prefetch_panel(job, first, rows, bits);
        multiply_panel(job->y + first, QZ_FLOAT_OUTPUTS, panel, job->x, job->x_stride, job->columns, job->m);
    }
}

/* ---- weights [K, N] ---- */

/* Panels side by side for all outputs of a tile. */
QZ_INLINE void decode_panels_n(float *panels, const qz_matmul_job *job, int bits) {
    const qz_scales *from = &job->scales;
    const ptrdiff_t groups = job->columns / job->group_size, count = job->rows;
    float scales[QZ_FLOAT_OUTPUTS_N / 32][QZ_FLOAT_PANEL_N], biases[QZ_FLOAT_OUTPUTS_N / 32][QZ_FLOAT_PANEL_N];
    const char *s = from->scales, *b = from->biases;
    for (ptrdiff_t g = 0; g < groups; g++) {
        QZ_NAME(load)(scales[g], s + g * from->scale_group_stride, from->scale_row_stride, from->scale_type, count);
        QZ_NAME(load)(biases[g], b + g * from->bias_group_stride, from->bias_row_stride, from->bias_type, count);
    }
    uint8_t codes[QZ_FLOAT_OUTPUTS_N] = {0};
    for (ptrdiff_t k = 0; k < count; k++) {
        unpack_bits(codes, job->w + k * job->w_row_stride, bits, job->columns);
        for (ptrdiff_t g = 0; g < groups; g++) {
            const v_f32 scale = set1_f32(scales[g][k]), bias = set1_f32(biases[g][k]);
            for (ptrdiff_t n = g * job->group_size; n < (g + 1) * job->group_size; n += QZ_LANES) {
                float *to = panels + (n / QZ_ACROSS * QZ_FLOAT_PANEL_N + k) * QZ_ACROSS + n % QZ_ACROSS;
                store_f32(to, fma_f32(f32_from_i32(i32_from_u8(codes + n)), scale, bias));
            }
        }
    }
}

QZ_INLINE void multiply_panels_n(const qz_matmul_job *job, const float *panels) {
    for (ptrdiff_t n = 0; n < job->columns; n += QZ_ACROSS) {
        multiply_panel(job->y + n, QZ_FLOAT_OUTPUTS_N, panels + n * QZ_FLOAT_PANEL_N, job->x, job->x_stride, job->rows,
                       job->m);
    }
}

QZ_INLINE void float_matmul_n(const qz_matmul_job *job, int bits) {
    _Alignas(64) float panels[QZ_FLOAT_PANEL_N * QZ_FLOAT_OUTPUTS_N];
    decode_panels_n(panels, job, bits);
    multiply_panels_n(job, panels);
}
