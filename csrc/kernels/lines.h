/* y = x Wᵀ for few rows of x where a header names codes that are taken line by line (simd/dot.h): QZ_VECTOR_BYTES of
 * each weight row are transposed while those before are multiplied, which processors do at once where both are short,
 * and panels are too long for that. A block is multiplied with all digits of x in one pass, each with sums of its own,
 * so that codes are unpacked as they are read. Strips, integers and float operations are those of prefill.h. At the end
 * stands prefill_t, which chooses. */

#ifdef QZ_LINE_BITS

#define QZ_HAS_LINES(bits, block) ((bits) == QZ_LINE_BITS && (block) == QZ_MAX_BLOCK)

/* Blocks whose scales become columns together. */
enum { QZ_LINE_COLUMNS = QZ_LANES / 2 };
_Static_assert(QZ_VECTOR_BYTES * 8 / QZ_LINE_BITS / QZ_MAX_BLOCK == QZ_TILE_VECTORS,
               "a vector of outputs is transposed for each block of a line");

/* Where the next line of what is read later stands: all lines of a row, then those of the next one. */
typedef struct cursor {
    const char *row;
    ptrdiff_t at, bytes, stride;
} cursor;

QZ_INLINE void fetch_lines(cursor *c, int count) {
    QZ_UNROLL
    for (int i = 0; i < count; i++) __builtin_prefetch(c->row + c->at + i * 64);
    c->at += count * 64;
    if (c->at < c->bytes) return;
    c->row += c->stride;
    c->at = 0;
}

/* QZ_TILE_OUTPUTS weight rows, and a tile of x's rows. */
typedef struct line_rows {
    _Alignas(64) uint8_t words[2][QZ_LANES][4 * QZ_TILE_OUTPUTS]; /* a line, transposed, and the next one */
    float scales[QZ_LINE_COLUMNS][QZ_TILE_OUTPUTS], centred[QZ_LINE_COLUMNS][QZ_TILE_OUTPUTS];
    const uint8_t *w[QZ_TILE_OUTPUTS];
    rows_of_lanes from[QZ_TILE_VECTORS]; /* the columns that follow */
    cursor codes, scale_lines, bias_lines;
    const qz_matmul_job *job;
    ptrdiff_t column, m;        /* the tile's first output and row of x */
    ptrdiff_t line, end, lines; /* [line, end) of a row's lines are multiplied */
    int per_group;
} line_rows;

/* One vector of outputs. */
QZ_INLINE void turn_line(line_rows *t, ptrdiff_t line, int vector) {
    v_f32 lines[QZ_LANES];
    uint8_t *to = t->words[line & 1][0] + vector * QZ_VECTOR_BYTES;
    QZ_FORGET_REGISTERS; /* as in load_quads */
    QZ_UNROLL
    for (int i = 0; i < QZ_LANES; i++) {
        lines[i] = load_f32((const float *)(t->w[vector * QZ_LANES + i] + line * QZ_VECTOR_BYTES));
    }
    transpose_f32(lines);
    QZ_UNROLL
    for (int i = 0; i < QZ_LANES; i++) store_f32((float *)(to + i * 4 * QZ_TILE_OUTPUTS), lines[i]);
}

QZ_INLINE void turn_scales(line_rows *t, ptrdiff_t at, int bits, int block) {
    const qz_scales *from = &t->job->scales;
    const ptrdiff_t left = t->job->columns / block - at;
    const int blocks = left < QZ_LINE_COLUMNS ? (int)left : QZ_LINE_COLUMNS;
    const v_f32 centre = set1_f32((float)QZ_CENTRE(bits));
    for (int v = 0; v < QZ_TILE_VECTORS; v++) {
        rows_of_lanes *rows = &t->from[v];
        load_columns(t->scales, t->centred, v * QZ_LANES, from, rows, blocks, t->per_group, 1);
        for (int b = 0; b < blocks; b++) {
            float *const centred = t->centred[b] + v * QZ_LANES;
            store_f32(centred, add_f32(load_f32(centred), mul_f32(centre, load_f32(t->scales[b] + v * QZ_LANES))));
        }
        for (int i = 0; i < QZ_LANES; i++) {
            rows->scales[i] += QZ_LINE_COLUMNS / t->per_group * from->scale_group_stride;
            rows->biases[i] += QZ_LINE_COLUMNS / t->per_group * from->bias_group_stride;
        }
    }
}

/* The dots of block b of a line with all digits of some rows of x. Of what is to be read, some is asked for at every
 * step: the rest of the next line, which the first cache lost or never had, and what follows the tile's rows, from
 * memory. */
QZ_INLINE void sum_line(tile_sums low, const uint8_t *words, const uint8_t *const *near, ptrdiff_t next, cursor *far,
                        const int8_t *const *x, int rows, int bits, int block, int digits) {
    const int fold = QZ_PANEL_FOLD(bits);
    v_i32 sum[QZ_MAX_DIGITS][QZ_TILE_M][QZ_TILE_VECTORS];
    QZ_UNROLL
    for (int d = 0; d < digits; d++) clear_sums_of_tile(sum[d], rows);
    for (int i = 0; i < block / 4 / fold; i++) {
        v_u8 code[4][QZ_TILE_VECTORS];
        if (far) {
            fetch_lines(far, QZ_TILE_VECTORS);
            QZ_UNROLL
            for (int v = 0; v < QZ_TILE_VECTORS; v++) __builtin_prefetch(near[i * QZ_TILE_VECTORS + v] + next);
        }
        QZ_UNROLL
        for (int v = 0; v < QZ_TILE_VECTORS; v++) {
            v_u8 word = load_u8(words + i * 4 * QZ_TILE_OUTPUTS + v * QZ_VECTOR_BYTES);
            QZ_HOLD(word); /* else compilers load it anew for each shift */
            QZ_UNROLL
            for (int f = 0; f < fold; f++) code[f][v] = folded_codes(word, f, bits);
        }
        QZ_UNROLL
        for (int f = 0; f < fold; f++) {
            QZ_UNROLL
            for (int d = 0; d < digits; d++) {
                QZ_UNROLL
                for (int r = 0; r < rows; r++) {
                    const v_u8 digit = broadcast_four(x[r] + d * block + 4 * (i * fold + f));
                    QZ_UNROLL
                    for (int v = 0; v < QZ_TILE_VECTORS; v++) {
                        sum[d][r][v] = add_quad(sum[d][r][v], code[f][v], digit, bits);
                    }
                }
            }
        }
    }
    QZ_UNROLL
    for (int r = 0; r < rows; r++) {
        QZ_UNROLL
        for (int v = 0; v < QZ_TILE_VECTORS; v++) {
            low[r][v] = sum[digits - 1][r][v];
            QZ_UNROLL
            for (int d = digits - 2; d >= 0; d--) low[r][v] = add_i32(shl_i32(low[r][v], 8), sum[d][r][v]);
        }
    }
}

QZ_INLINE void multiply_lines(line_rows *t, int is_first, int rows, int bits, int block, int digits) {
    const qz_matmul_job *job = t->job;
    const int blocks = QZ_VECTOR_BYTES * 8 / bits / block;
    float *const y = job->y + t->m * job->y_stride + t->column;
    cursor codes = t->codes;
    planes x[QZ_TILE_M];
    QZ_UNROLL
    for (int r = 0; r < rows; r++) x[r] = planes_at(job->x + (t->m + r) * job->x_stride, job->columns, block, digits);
    for (ptrdiff_t line = t->line; line < t->end; line++) {
        const ptrdiff_t first = line * blocks, next = line + 1 < t->lines ? line + 1 : line;
        if (is_first && first % QZ_LINE_COLUMNS == 0) turn_scales(t, first, bits, block);
        if (is_first) fetch_lines(&t->scale_lines, 2);
        if (is_first) fetch_lines(&t->bias_lines, 2);
        for (int b = 0; b < blocks; b++) {
            const ptrdiff_t at = first + b;
            const int place = (int)((size_t)at % QZ_LINE_COLUMNS), words = b * QZ_LANES / blocks;
            const int8_t *strips[QZ_TILE_M];
            tile_sums low;
            tile_columns columns;
            QZ_UNROLL
            for (int r = 0; r < rows; r++) strips[r] = x[r].digits + at * block * digits;
            sum_line(low, t->words[line & 1][words], t->w + words * QZ_TILE_VECTORS, next * QZ_VECTOR_BYTES,
                     is_first ? &codes : NULL, strips, rows, bits, block, digits);
            QZ_UNROLL
            for (int v = 0; v < QZ_TILE_VECTORS; v++) {
                columns.scales[v] = load_f32(t->scales[place] + v * QZ_LANES);
                columns.centred[v] = load_f32(t->centred[place] + v * QZ_LANES);
            }
            if (is_first) turn_line(t, next, b);
            QZ_UNROLL
            for (int r = 0; r < rows; r++) {
                add_tile_terms(y + r * job->y_stride, low[r], low[r], &columns, &x[r], at, bits, digits, 0);
            }
        }
    }
    if (is_first) t->codes = codes;
}

/* As many rows as registers hold the sums of. The first tile of a line transposes the next line. */
enum { QZ_LINE_TILE_2 = 6, QZ_LINE_TILE_3 = 4 };
#define QZ_DEFINE_LINE_TILE(which, is_first, digits, rows)                                    \
    static __attribute__((noinline)) void QZ_NAME(which##_##digits##_##rows)(line_rows * t) { \
        multiply_lines(t, is_first, rows, QZ_LINE_BITS, QZ_MAX_BLOCK, digits);                \
    }
#define QZ_DEFINE_LINE_TILES(which, is_first)  \
    QZ_DEFINE_LINE_TILE(which, is_first, 2, 2) \
    QZ_DEFINE_LINE_TILE(which, is_first, 2, 3) \
    QZ_DEFINE_LINE_TILE(which, is_first, 2, 4) \
    QZ_DEFINE_LINE_TILE(which, is_first, 2, 5) \
    QZ_DEFINE_LINE_TILE(which, is_first, 2, 6) \
    QZ_DEFINE_LINE_TILE(which, is_first, 3, 2) \
    QZ_DEFINE_LINE_TILE(which, is_first, 3, 3) \
    QZ_DEFINE_LINE_TILE(which, is_first, 3, 4)
QZ_DEFINE_LINE_TILES(first_tile, 1)
QZ_DEFINE_LINE_TILES(later_tile, 0)
/* By digits - 2 and rows - 2. */
#define QZ_LINE_TILES(which)                                                                     \
    {                                                                                            \
        {QZ_NAME(which##_2_2), QZ_NAME(which##_2_3), QZ_NAME(which##_2_4), QZ_NAME(which##_2_5), \
         QZ_NAME(which##_2_6)},                                                                  \
        {                                                                                        \
            QZ_NAME(which##_3_2), QZ_NAME(which##_3_3), QZ_NAME(which##_3_4)                     \
        }                                                                                        \
    }
typedef void line_tile(line_rows *);
static line_tile *const QZ_NAME(line_tiles)[2][2][QZ_LINE_TILE_2 - 1] = {QZ_LINE_TILES(later_tile),
                                                                         QZ_LINE_TILES(first_tile)};

/* The tiles of lines from t->line to t->end, one after the other. */
QZ_INLINE void multiply_tiles_of_lines(line_rows *t, ptrdiff_t tiles, int digits) {
    for (ptrdiff_t i = 0; i < tiles; i++) {
        t->m = t->job->m * i / tiles;
        QZ_NAME(line_tiles)[i == 0][digits - 2][t->job->m * (i + 1) / tiles - t->m - 2](t);
    }
}

QZ_INLINE void begin_lines(line_rows *t, const qz_matmul_job *job, ptrdiff_t column, int block) {
    const qz_scales *from = &job->scales;
    const ptrdiff_t groups = group_of(job->columns / block, t->per_group), after = column + QZ_TILE_OUTPUTS;
    t->column = column;
    for (int i = 0; i < QZ_TILE_OUTPUTS; i++) {
        const ptrdiff_t row = column + i < job->rows ? column + i : job->rows - 1;
        t->w[i] = job->w + row * job->w_row_stride;
        t->from[i / QZ_LANES].scales[i % QZ_LANES] = row * from->scale_row_stride;
        t->from[i / QZ_LANES].biases[i % QZ_LANES] = row * from->bias_row_stride;
    }
    t->codes = (cursor){(const char *)job->w + after * job->w_row_stride, 0, t->lines * 64, job->w_row_stride};
    t->scale_lines = (cursor){from->scales + after * from->scale_row_stride, 0, groups * from->scale_group_stride,
                              from->scale_row_stride};
    t->bias_lines = (cursor){from->biases + after * from->bias_row_stride, 0, groups * from->bias_group_stride,
                             from->bias_row_stride};
}

/* Adds all whole lines of a job of two rows of x or more; returns the blocks that they are. Each line is multiplied
 * with all rows of x before the next one, unless there is one tile of them. */
static __attribute__((noinline)) ptrdiff_t QZ_NAME(add_lines)(const qz_matmul_job *job, int digits) {
    const int bits = QZ_LINE_BITS, block = QZ_MAX_BLOCK, most = digits == 2 ? QZ_LINE_TILE_2 : QZ_LINE_TILE_3;
    const ptrdiff_t tiles = (job->m + most - 1) / most;
    line_rows t;
    t.job = job;
    t.per_group = blocks_per_group(job, block);
    t.lines = job->columns * bits / 8 / QZ_VECTOR_BYTES;
    for (ptrdiff_t column = 0; column < job->rows && t.lines > 0; column += QZ_TILE_OUTPUTS) {
        begin_lines(&t, job, column, block);
        for (int v = 0; v < QZ_TILE_VECTORS; v++) turn_line(&t, 0, v);
        for (ptrdiff_t line = 0; line < t.lines; line = t.end) {
            t.line = line;
            t.end = tiles > 1 ? line + 1 : t.lines;
            multiply_tiles_of_lines(&t, tiles, digits);
        }
    }
    return t.lines * (QZ_VECTOR_BYTES * 8 / bits / block);
}
#endif

/* Whole lines, where they pay, and in panels what is left. */
QZ_INLINE void prefill_t(const qz_matmul_job *job, int bits, int block, int digits) {
    ptrdiff_t first = 0;
    memset(job->y, 0, (size_t)(job->m * job->y_stride) * sizeof *job->y);
#ifdef QZ_LINE_BITS
    if (QZ_HAS_LINES(bits, block) && digits > 1 && job->m > 1 && job->m <= QZ_LINE_ROWS) {
        first = QZ_NAME(add_lines)(job, digits);
    }
#endif
    add_panels_t(job, first, bits, block, digits);
    make_nan_canonical(job->y, job->m * job->y_stride);
}
