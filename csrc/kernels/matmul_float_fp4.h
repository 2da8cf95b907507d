/* The float class of matmul (matmul_float.h) for FP4 weights: mxfp4 and nvfp4, whose groups are blocks of 32 or 16
 * codes. tests/reference_fp.py derives the error bound (bound_float) from the orders of addition here.
 *
 * Few rows of x, y = x Wᵀ: numbers are multiplied as they are, and the scale comes in once a group: s sum(number x).
 * All else: panels of weights s * number, which are float32 without rounding, as numbers have 2 significant bits and
 * scales at most 4; they are infinite where they overflow. */

/* ---- few rows of x, weights [N, K] ---- */

/* Codes that f32_from_fp4 takes: a group, or two. */
enum { QZ_FP4_RUN = 32, QZ_FP4_VECTORS = QZ_FP4_RUN / QZ_LANES };

/* A prepared row: x padded with zeros to whole runs. */
QZ_INLINE size_t float_row_size_fp4(ptrdiff_t k) { return (size_t)padded_to(k, QZ_FP4_RUN) * sizeof(float); }

QZ_INLINE void prepare_float_row_fp4(float *to, const float *x, ptrdiff_t k) {
    memcpy(to, x, (size_t)k * sizeof *to);
    memset(to + k, 0, (size_t)(padded_to(k, QZ_FP4_RUN) - k) * sizeof *to);
}

/* Some scales as floats. E4M3's standing side by side come 32 at a time, divided by 256, unless one is NaN. */
QZ_INLINE void load_scales_fp4(float *to, const char *from, ptrdiff_t stride, qz_type type, ptrdiff_t count,
                               int block) {
    v_i32 odd = set1_i32(0);
    ptrdiff_t at = 0;
    for (; block < 32 && stride == 1 && at + 32 <= count; at += 32) {
        v_f32 scales[32 / QZ_LANES];
        odd = or_i32(odd, f32_from_e4m3(scales, (const uint8_t *)from + at));
        QZ_UNROLL
        for (int i = 0; i < 32 / QZ_LANES; i++) {
            store_f32(to + at + i * QZ_LANES, mul_f32(scales[i], set1_f32(256.0f)));
        }
    }
    if (any_i32(odd)) at = 0;
    if (at < count) QZ_NAME(load)(to + at, from + at * stride, stride, type, count - at);
}

/* Adds s sum(number x) of the groups of one run of each line. Their sums are short chains of their own, so that only
 * one operation a group waits for the total. */
QZ_INLINE void add_run_fp4(v_f32 (*totals)[QZ_SHARING], const v_f32 (*numbers)[QZ_FP4_VECTORS], const char *x,
                           ptrdiff_t x_stride, const float *const *scales, int lines, int rows, int block) {
    const int vectors = block / QZ_LANES;
    QZ_UNROLL
    for (int r = 0; r < lines; r++) {
        QZ_UNROLL
        for (int m = 0; m < rows; m++) {
            const float *values = (const float *)(x + m * x_stride);
            QZ_UNROLL
            for (int group = 0; group < QZ_FP4_RUN / block; group++) {
                const v_f32 *some = numbers[r] + group * vectors;
                v_f32 sum = mul_f32(some[0], load_f32(values + group * block));
                QZ_UNROLL
                for (int v = 1; v < vectors; v++) {
                    sum = fma_f32(some[v], load_f32(values + group * block + v * QZ_LANES), sum);
                }
                totals[r][m] = fma_f32(sum, set1_f32(scales[r][group]), totals[r][m]);
            }
        }
    }
}

/* The run of number i of a chunk, whose codes stand at `w`. */
QZ_INLINE void decode_and_add_run_fp4(v_f32 (*totals)[QZ_SHARING], const chunk *c, const uint8_t *w,
                                      ptrdiff_t w_row_stride, ptrdiff_t i, int lines, int rows, int block) {
    v_f32 numbers[QZ_LINES][QZ_FP4_VECTORS];
    const float *scales[QZ_LINES];
    QZ_UNROLL
    for (int r = 0; r < lines; r++) {
        f32_from_fp4(numbers[r], w + r * w_row_stride);
        scales[r] = c->scales[r] + i * (QZ_FP4_RUN / block);
    }
    add_run_fp4(totals, (const v_f32(*)[QZ_FP4_VECTORS])numbers, c->x + i * QZ_FP4_RUN * (ptrdiff_t)sizeof(float),
                c->x_stride, scales, lines, rows, block);
}

QZ_INLINE void add_chunk_fp4(v_f32 (*totals)[QZ_SHARING], const chunk *c, ptrdiff_t codes, int lines, int rows,
                             int block) {
    enum { BYTES = QZ_FP4_RUN / 2 };
    const ptrdiff_t whole = codes / QZ_FP4_RUN;
    for (ptrdiff_t i = 0; i < whole; i++) {
        QZ_UNROLL
        for (int r = 0; r < lines; r++) __builtin_prefetch(c->w + r * c->w_row_stride + i * BYTES + QZ_PREFETCH);
        decode_and_add_run_fp4(totals, c, c->w + i * BYTES, c->w_row_stride, i, lines, rows, block);
    }
    if (codes % QZ_FP4_RUN == 0) return;
    uint8_t last[QZ_LINES][BYTES] = {{0}};
    for (int r = 0; r < lines; r++) {
        memcpy(last[r], c->w + r * c->w_row_stride + whole * BYTES, (size_t)(codes % QZ_FP4_RUN / 2));
    }
    decode_and_add_run_fp4(totals, c, last[0], BYTES, whole, lines, rows, block);
}

/* `lines` weight rows from row r on times up to QZ_SHARING rows of x. */
QZ_INLINE void multiply_float_rows_fp4(float *y, const qz_matmul_job *job, ptrdiff_t r, int lines, int rows,
                                       int block) {
    const qz_scales *from = &job->scales;
    const ptrdiff_t groups = job->columns / block, stride = from->scale_group_stride;
    v_f32 totals[QZ_LINES][QZ_SHARING];
    chunk c;
    c.x_stride = job->x_stride;
    c.w_row_stride = job->w_row_stride;
    QZ_UNROLL
    for (int i = 0; i < lines * rows; i++) totals[i / rows][i % rows] = set1_f32(0.0f);
    for (ptrdiff_t first = 0; first < groups; first += QZ_GROUPS) {
        const ptrdiff_t some = groups - first < QZ_GROUPS ? groups - first : QZ_GROUPS, k = first * block;
        c.x = job->x + k * (ptrdiff_t)sizeof(float);
        c.w = job->w + r * job->w_row_stride + k / 2;
        QZ_UNROLL
        for (int i = 0; i < lines; i++) {
            const char *scales = from->scales + (r + i) * from->scale_row_stride + first * stride;
            prefetch_scales(scales, stride, some, block / 2);
            load_scales_fp4(c.scales[i], scales, stride, from->scale_type, some, block);
            c.scales[i][some] = 0.0f; /* of the second half of the last run, whose codes are zeros */
        }
        add_chunk_fp4(totals, &c, some * block, lines, rows, block);
    }
    QZ_UNROLL
    for (int i = 0; i < lines; i++) {
        QZ_UNROLL
        for (int m = 0; m < rows; m++) y[m * QZ_FLOAT_OUTPUTS + r + i] = sum_of_lanes(totals[i][m]);
    }
}

QZ_DEFINE_FLOAT_DECODE(float_decode_t_fp4, multiply_float_rows_fp4)

/* ---- panels, weights [N, K] ---- */

/* Of each group of a panel, the scales of QZ_ACROSS rows. */
typedef float panel_scales_fp4[QZ_FLOAT_PANEL_T / 16][QZ_ACROSS];

/* Code j of each lane's word as a number. */
QZ_INLINE v_f32 number_of_code_fp4(v_i32 words, int j) {
    static const float numbers[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                      -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
    const v_i32 codes = shr_u32(words, 4 * j);
    if (QZ_TABLE_BITS == 5) return look_up_f32(numbers, codes, 4);
    if (QZ_TABLE_BITS == 4) return look_up_f32(numbers, and_i32(codes, set1_i32(15)), 4);
    const v_i32 sign = and_i32(shl_i32(words, 28 - 4 * j), set1_i32(INT32_MIN));
    return f32_of_bits(or_i32(bits_of_f32(look_up_f32(numbers, and_i32(codes, set1_i32(7)), 3)), sign));
}

/* 8 lines of a panel: weights of one k each. */
QZ_INLINE void decode_lines_fp4(float *to, v_i32 low, v_i32 high, const float *scales) {
    const v_f32 s0 = load_f32(scales), s1 = load_f32(scales + QZ_LANES);
    QZ_UNROLL
    for (int j = 0; j < QZ_RUN(4); j++) {
        store_f32(to + j * QZ_ACROSS, mul_f32(number_of_code_fp4(low, j), s0));
        store_f32(to + j * QZ_ACROSS + QZ_LANES, mul_f32(number_of_code_fp4(high, j), s1));
    }
}

/* The first `rows` rows at w, as decode_panel_t does it. */
QZ_INLINE void decode_panel_t_fp4(float *panel, panel_scales_fp4 scales, const qz_matmul_job *job, const uint8_t *w,
                                  ptrdiff_t rows, int block) {
    const ptrdiff_t count = job->columns, runs = QZ_RUNS(4), run = QZ_RUN(4);
    uint8_t copy[QZ_ACROSS][4 * QZ_LANES] = {{0}};
    for (ptrdiff_t at = 0; at < count; at += runs) {
        const ptrdiff_t codes = count - at < runs ? count - at : runs;
        v_i32 low[QZ_LANES], high[QZ_LANES];
        load_words_of_panel(low, high, copy, w + at / 2, job->w_row_stride, rows, codes, 4);
        for (ptrdiff_t i = 0; i * run < codes; i++) {
            const ptrdiff_t k = at + i * run;
            decode_lines_fp4(panel + k * QZ_ACROSS, low[i], high[i], scales[k / block]);
        }
    }
}

QZ_INLINE void float_prefill_t_fp4(const qz_matmul_job *job, int block) {
    const qz_scales *from = &job->scales;
    _Alignas(64) float panel[QZ_FLOAT_PANEL_T * QZ_ACROSS];
    panel_scales_fp4 scales;
    memset(scales, 0, sizeof scales);
    for (ptrdiff_t first = 0; first < job->rows; first += QZ_ACROSS) {
        const ptrdiff_t rows = job->rows - first < QZ_ACROSS ? job->rows - first : QZ_ACROSS;
        const char *s = from->scales + first * from->scale_row_stride;
        for (ptrdiff_t g = 0; g < job->columns / block; g++) {
            QZ_NAME(load)(scales[g], s + g * from->scale_group_stride, from->scale_row_stride, from->scale_type, rows);
        }
        decode_panel_t_fp4(panel, scales, job, job->w + first * job->w_row_stride, rows, block);
        prefetch_panel(job, first, rows, 4);
        multiply_panel(job->y + first, QZ_FLOAT_OUTPUTS, panel, job->x, job->x_stride, job->columns, job->m);
    }
}

/* ---- panels, weights [K, N] ---- */

/* Panels side by side for all outputs of a tile. Where these end within a run, kernels read a copy padded with zeros,
 * and their scale of its second half is zero. */
QZ_INLINE void decode_panels_n_fp4(float *panels, const qz_matmul_job *job, int block) {
    const qz_scales *from = &job->scales;
    const ptrdiff_t groups = job->columns / block, count = job->rows;
    float scales[QZ_FLOAT_OUTPUTS_N / 16][QZ_FLOAT_PANEL_N];
    for (ptrdiff_t g = 0; g < groups; g++) {
        QZ_NAME(load)(scales[g], from->scales + g * from->scale_group_stride, from->scale_row_stride, from->scale_type,
                      count);
    }
    if (groups * block % QZ_FP4_RUN) memset(scales[groups], 0, sizeof scales[groups]);
    for (ptrdiff_t k = 0; k < count; k++) {
        const uint8_t *codes = job->w + k * job->w_row_stride;
        for (ptrdiff_t n = 0; n < job->columns; n += QZ_FP4_RUN) {
            uint8_t copy[QZ_FP4_RUN / 2] = {0};
            v_f32 numbers[QZ_FP4_VECTORS];
            const int is_whole = job->columns - n >= QZ_FP4_RUN;
            if (!is_whole) memcpy(copy, codes + n / 2, (size_t)(job->columns - n) / 2);
            f32_from_fp4(numbers, is_whole ? codes + n / 2 : copy);
            QZ_UNROLL
            for (int v = 0; v < QZ_FP4_VECTORS; v++) {
                const ptrdiff_t at = n + v * QZ_LANES;
                float *to = panels + (at / QZ_ACROSS * QZ_FLOAT_PANEL_N + k) * QZ_ACROSS + at % QZ_ACROSS;
                store_f32(to, mul_f32(numbers[v], set1_f32(scales[at / block][k])));
            }
        }
    }
}

QZ_INLINE void float_matmul_n_fp4(const qz_matmul_job *job, int block) {
    _Alignas(64) float panels[QZ_FLOAT_PANEL_N * QZ_FLOAT_OUTPUTS_N];
    decode_panels_n_fp4(panels, job, block);
    multiply_panels_n(job, panels);
}
