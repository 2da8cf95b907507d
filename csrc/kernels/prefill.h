/* y = x Wᵀ for many rows of x. The codes of QZ_TILE_OUTPUTS weight rows are unpacked and transposed once, a panel of
 * k at a time, then multiplied with every row of x. Same integers and same float operations in the same order as in
 * matmul.h. */

/* Blocks of k in a panel, which stays in the first level of the caches while the rows of x pass by; where nvfp4's take
 * turns, in the second. */
enum { QZ_PANEL_BLOCKS = 8, QZ_PANEL_K = QZ_PANEL_BLOCKS * QZ_MAX_BLOCK, QZ_PANEL_GROUPS = QZ_PANEL_K / 16 };

typedef struct panel_t {
    _Alignas(64) uint8_t quads[QZ_PANEL_K / 4][4 * QZ_TILE_OUTPUTS];
#if QZ_PAIRS
    uint8_t pairs[QZ_PANEL_K / 2][4 * QZ_TILE_OUTPUTS];
#endif
    float scales[QZ_PANEL_GROUPS][QZ_TILE_OUTPUTS], centred[QZ_PANEL_BLOCKS][QZ_TILE_OUTPUTS]; /* centred: b + c s */
    int32_t excess[QZ_PANEL_BLOCKS][QZ_TILE_OUTPUTS];                                          /* see store_pairs */
} panel_t;

QZ_INLINE tile_codes codes_of_block(const panel_t *panel, int b, int block) {
    tile_codes codes = {panel->quads[b * block / 4], NULL, sizeof panel->quads[0]};
#if QZ_PAIRS
    codes.pairs = panel->pairs[b * block / 2];
#endif
    return codes;
}

#ifndef QZ_PANEL_FOLD
#define QZ_PANEL_FOLD(bits) 1
#define QZ_FORGET_REGISTERS (void)0
#endif

/* Scales or biases of QZ_LANES weight rows become columns, from `first` on; each of the `blocks` blocks gets its
 * group's. */
QZ_INLINE void load_columns_of_any(float (*to)[QZ_TILE_OUTPUTS], int first, const char *from,
                                   const ptrdiff_t rows[QZ_LANES], ptrdiff_t stride, qz_type type, int blocks,
                                   int per_group) {
    float numbers[QZ_LANES][QZ_PANEL_BLOCKS];
    for (int i = 0; i < QZ_LANES; i++) {
        QZ_NAME(load)(numbers[i], from + rows[i], stride, type, group_of(blocks + per_group - 1, per_group));
    }
    for (int b = 0; b < blocks; b++) {
        QZ_UNROLL
        for (int i = 0; i < QZ_LANES; i++) to[b][first + i] = numbers[i][group_of(b, per_group)];
    }
}

/* Where QZ_LANES weight rows begin, for a panel. */
typedef struct rows_of_lanes {
    const uint8_t *w[QZ_LANES];
    ptrdiff_t scales[QZ_LANES], biases[QZ_LANES];
} rows_of_lanes;

#ifdef QZ_LOADS_SOME
QZ_INLINE v_f32 load_some_scales(const char *from, ptrdiff_t count, qz_type type) {
    const ptrdiff_t size = type == QZ_F32 ? 4 : type == QZ_F16 || type == QZ_BF16 ? 2 : 1;
    const v_u8 bytes = load_some_u8((const uint8_t *)from, count * size);
    uint8_t copy[QZ_VECTOR_BYTES];
    if (type == QZ_F32) return f32_of_bits((v_i32)bytes);
    store_u8(copy, bytes);
    return size == 1 ? scales_of_bytes(copy, type) : load_floats((const char *)copy, 0, type);
}

/* Scales and biases of QZ_LANES rows and of `groups` groups that are neighbours, half a vector at most, all of one
 * type, turned together: columns `pitch` floats apart, of which `each` are the same. No biases: NULL. */
QZ_INLINE void load_columns_of(float *scales, float *biases, ptrdiff_t pitch, const qz_scales *from,
                               const rows_of_lanes *rows, qz_type type, int groups, int each) {
    v_f32 columns[QZ_LANES];
    QZ_UNROLL
    for (int i = 0; i < QZ_LANES; i++) {
        const v_f32 scale = load_some_scales(from->scales + rows->scales[i], groups, type);
        const v_f32 bias = biases ? load_some_scales(from->biases + rows->biases[i], groups, type) : scale;
        columns[i] = join_lower_f32(scale, bias);
    }
    transpose_f32(columns);
    QZ_UNROLL
    for (int g = 0; g < QZ_LANES / 2; g++) {
        for (int i = g * each; g < groups && i < (g + 1) * each; i++) {
            store_f32(scales + i * pitch, columns[g]);
            if (biases) store_f32(biases + i * pitch, columns[QZ_LANES / 2 + g]);
        }
    }
}

#ifdef QZ_TURNS_HALVES
/* The same for eight groups of 16-bit numbers. */
QZ_INLINE void load_columns_of_halves(float *to, ptrdiff_t pitch, const char *from, const ptrdiff_t rows[QZ_LANES],
                                      qz_type type, int each) {
    _Alignas(64) uint16_t columns[QZ_LANES / 2][QZ_LANES];
    turn_halves(columns, from, rows);
    QZ_UNROLL
    for (int g = 0; g < QZ_LANES / 2; g++) {
        const v_f32 column = type == QZ_F16 ? f32_from_f16(columns[g]) : f32_from_bf16(columns[g]);
        for (int i = g * each; i < (g + 1) * each; i++) store_f32(to + i * pitch, column);
    }
}
#endif

/* Not inline: it is the same for all formats. Returns 0 where it does not serve. */
static __attribute__((noinline)) int QZ_NAME(load_columns)(float *scales, float *biases, ptrdiff_t pitch,
                                                           const qz_scales *from, const rows_of_lanes *rows, int groups,
                                                           int each) {
    const ptrdiff_t stride = from->scale_group_stride;
    if (groups > QZ_LANES / 2 || from->scale_type != from->bias_type || stride != from->bias_group_stride) return 0;
#ifdef QZ_TURNS_HALVES
    if (groups == QZ_LANES / 2 && stride == 2 && (from->scale_type == QZ_F16 || from->scale_type == QZ_BF16)) {
        if (from->scale_type == QZ_F16) {
            load_columns_of_halves(scales, pitch, from->scales, rows->scales, QZ_F16, each);
            if (biases) load_columns_of_halves(biases, pitch, from->biases, rows->biases, QZ_F16, each);
        } else {
            load_columns_of_halves(scales, pitch, from->scales, rows->scales, QZ_BF16, each);
            if (biases) load_columns_of_halves(biases, pitch, from->biases, rows->biases, QZ_BF16, each);
        }
        return 1;
    }
#endif
    if (from->scale_type == QZ_F32 && stride == 4) {
        load_columns_of(scales, biases, pitch, from, rows, QZ_F32, groups, each);
    } else if (from->scale_type == QZ_F16 && stride == 2) {
        load_columns_of(scales, biases, pitch, from, rows, QZ_F16, groups, each);
    } else if (from->scale_type == QZ_BF16 && stride == 2) {
        load_columns_of(scales, biases, pitch, from, rows, QZ_BF16, groups, each);
    } else if (from->scale_type == QZ_E8M0 && stride == 1) {
        load_columns_of(scales, biases, pitch, from, rows, QZ_E8M0, groups, each);
    } else if (from->scale_type == QZ_E4M3 && stride == 1) {
        load_columns_of(scales, biases, pitch, from, rows, QZ_E4M3, groups, each);
    } else {
        return 0;
    }
    return 1;
}
#endif

/* The same in any case, to outputs from `first` on; for formats without a bias, no biases. */
QZ_INLINE void load_columns(float (*scales)[QZ_TILE_OUTPUTS], float (*biases)[QZ_TILE_OUTPUTS], int first,
                            const qz_scales *from, const rows_of_lanes *rows, int blocks, int per_group, int has_bias) {
#ifdef QZ_LOADS_SOME
    const int groups = (int)group_of(blocks + per_group - 1, per_group);
    float *some = has_bias ? biases[0] + first : NULL;
    if (QZ_NAME(load_columns)(scales[0] + first, some, QZ_TILE_OUTPUTS, from, rows, groups, per_group)) return;
#endif
    load_columns_of_any(scales, first, from->scales, rows->scales, from->scale_group_stride, from->scale_type, blocks,
                        per_group);
    if (!has_bias) return;
    load_columns_of_any(biases, first, from->biases, rows->biases, from->bias_group_stride, from->bias_type, blocks,
                        per_group);
}

/* What becomes columns of a panel: QZ_VECTOR_BYTES codes of each row, of which `count` are there, or where
 * QZ_PANEL_FOLD is not 1 as many bytes of packed codes. */
QZ_INLINE void load_lines(v_f32 lines[QZ_LANES], const uint8_t *const w[QZ_LANES], ptrdiff_t place, ptrdiff_t count,
                          int bits) {
    QZ_UNROLL
    for (int i = 0; i < QZ_LANES; i++) {
#ifdef QZ_LOADS_SOME
        if (QZ_PANEL_FOLD(QZ_STORED_BITS(bits)) > 1) {
            lines[i] = f32_of_bits((v_i32)load_some_u8(w[i] + place, count * QZ_STORED_BITS(bits) / 8));
            continue;
        }
#endif
        lines[i] = f32_of_bits((v_i32)unpack_line(w[i] + place, bits, count));
    }
}

QZ_INLINE void store_quads_of(uint8_t *to, v_f32 column, ptrdiff_t pitch, int bits) {
#ifdef QZ_LOADS_SOME
    const int fold = QZ_PANEL_FOLD(QZ_STORED_BITS(bits));
    QZ_UNROLL
    for (int f = 0; f < fold && fold > 1; f++) {
        const v_u8 codes = folded_codes((v_u8)bits_of_f32(column), f, QZ_STORED_BITS(bits));
        store_u8(to + f * pitch, as_multiplied(codes, bits));
    }
    if (fold > 1) return;
#endif
    (void)pitch, (void)bits;
    store_f32((float *)to, column);
}

/* The codes of QZ_LANES weight rows, `count` from w[i] on, as quads of neighbouring outputs. Where QZ_PANEL_FOLD is not
 * 1, four bytes of a row hold as many quads, each of every QZ_PANEL_FOLD-th code (see fold_lanes). */
QZ_INLINE void load_quads(uint8_t *to, const uint8_t *const w[QZ_LANES], ptrdiff_t count, int bits) {
    const int fold = QZ_PANEL_FOLD(QZ_STORED_BITS(bits)), step = fold * QZ_VECTOR_BYTES;
    const ptrdiff_t pitch = 4 * QZ_TILE_OUTPUTS;
    for (ptrdiff_t k = 0; k < count; k += step) {
        const ptrdiff_t place = k * QZ_STORED_BITS(bits) / 8;
        v_f32 lines[QZ_LANES];
        QZ_FORGET_REGISTERS; /* so that addresses are read again: there are too many, and copies in vectors cost more */
        if (count - k >= step) {
            load_lines(lines, w, place, step, bits);
        } else {
            load_lines(lines, w, place, count - k, bits);
        }
        transpose_f32(lines);
        QZ_UNROLL
        for (int i = 0; i < QZ_LANES; i++) store_quads_of(to + (k / 4 + i * fold) * pitch, lines[i], pitch, bits);
    }
}

/* The codes and scales of QZ_LANES weight rows, to block `at` of the panel; the last of the job stands in for those
 * beyond. */
QZ_INLINE void load_panel_rows(panel_t *panel, int at, int first_output, const qz_matmul_job *job, ptrdiff_t row,
                               ptrdiff_t first, int blocks, int bits, int block, int per_group) {
    const qz_scales *from = &job->scales;
    const ptrdiff_t group = group_of(first, per_group);
    rows_of_lanes rows;
    for (int i = 0; i < QZ_LANES; i++) {
        const ptrdiff_t r = row + i < job->rows ? row + i : job->rows - 1;
        rows.w[i] = job->w + r * job->w_row_stride + first * block * QZ_STORED_BITS(bits) / 8;
        rows.scales[i] = r * from->scale_row_stride + group * from->scale_group_stride;
        rows.biases[i] = r * from->bias_row_stride + group * from->bias_group_stride;
    }
    load_quads(panel->quads[at * block / 4] + 4 * first_output, rows.w, blocks * block, bits);
    load_columns(panel->scales + at, panel->centred + at, first_output, from, &rows, blocks, per_group,
                 QZ_HAS_BIAS(bits));
}

/* Outputs [column, column + QZ_TILE_OUTPUTS) of the job, and `blocks` blocks from `first` on, to block `at` of the
 * panel.
 */
QZ_INLINE void load_panel_t(panel_t *panel, int at, const qz_matmul_job *job, ptrdiff_t column, ptrdiff_t first,
                            int blocks, int bits, int block, int per_group, int digits) {
    const v_f32 centre = set1_f32((float)QZ_CENTRE(bits));
    for (int r = 0; r < QZ_TILE_OUTPUTS; r += QZ_LANES) {
        load_panel_rows(panel, at, r, job, column + r, first, blocks, bits, block, per_group);
    }
    for (int b = at; b < at + blocks; b++) {
#if QZ_PAIRS
        const int wide = is_wide(bits, block, digits);
        for (int v = 0; v < QZ_TILE_OUTPUTS && has_pairs(bits, digits); v += QZ_LANES) {
            uint8_t *pairs = panel->pairs[b * block / 2] + 4 * v;
            const uint8_t *quads = panel->quads[b * block / 4] + 4 * v;
            const v_i32 excess = store_pairs(pairs, quads, sizeof panel->quads[0], block, 1, bits, wide);
            if (wide) store_i32(panel->excess[b] + v, excess);
        }
#else
        (void)digits;
#endif
        if (!QZ_HAS_BIAS(bits)) continue;
        QZ_UNROLL
        for (int v = 0; v < QZ_TILE_OUTPUTS; v += QZ_LANES) {
            const v_f32 shift = mul_f32(centre, load_f32(panel->scales[b] + v));
            store_f32(panel->centred[b] + v, add_f32(load_f32(panel->centred[b] + v), shift));
        }
    }
}

/* What the outputs of a tile have for a block: loaded once for all rows, since stores to y might change it, as
 * compilers see. */
typedef struct tile_columns {
    v_f32 scales[QZ_TILE_VECTORS], centred[QZ_TILE_VECTORS];
    v_i32 excess[QZ_TILE_VECTORS];
} tile_columns;

QZ_INLINE tile_columns columns_of_block(const panel_t *panel, int b, int bits, int digits, int wide) {
    tile_columns c;
    QZ_UNROLL
    for (int v = 0; v < QZ_TILE_VECTORS; v++) {
        c.scales[v] = load_f32(panel->scales[b] + v * QZ_LANES);
        if (QZ_HAS_BIAS(bits)) c.centred[v] = load_f32(panel->centred[b] + v * QZ_LANES);
        if (wide && has_pairs(bits, digits)) c.excess[v] = load_i32(panel->excess[b] + v * QZ_LANES);
    }
    return c;
}

/* y = y + (Gf * s + (b + c s) * S) * 2^e for one row of x, whose numbers for the block are `x` at `at`. Without a bias,
 * y + Gf * s * 2^e. */
QZ_INLINE void add_tile_terms(float *y, const v_i32 *low, const v_i32 *high, const tile_columns *c, const planes *x,
                              ptrdiff_t at, int bits, int digits, int wide) {
    const chunk_numbers *numbers = numbers_at(x, at);
    const int lane = lane_of(at);
    QZ_UNROLL
    for (int v = 0; v < QZ_TILE_VECTORS; v++) {
        v_i32 sum = low[v];
        if (wide && has_pairs(bits, digits)) sum = sub_i32(sum, c->excess[v]);
        v_f32 dot =
            float_of_dots(sum, high + v, set1_i32(numbers->offset[lane]), set1_i32(numbers->offset_high[lane]), wide);
        v_f32 scaled = mul_f32(dot, c->scales[v]);
        if (QZ_HAS_BIAS(bits)) {
            scaled = add_f32(scaled, mul_f32(c->centred[v], set1_f32(numbers->sum[lane])));
        }
        const v_f32 term = mul_f32(scaled, set1_f32(numbers->scale[lane]));
        store_f32(y + v * QZ_LANES, add_f32(load_f32(y + v * QZ_LANES), term));
    }
}

/* What a panel is made of, to be fetched while another one is multiplied: lines here and there, which hardware does not
 * foresee. Asked for all at once they would keep everything else waiting. */
typedef struct panel_source {
    const char *w, *scales, *biases; /* of the first weight row */
    ptrdiff_t w_stride, scale_stride, bias_stride, bytes;
} panel_source;

/* Share `part` of QZ_PANEL_BLOCKS. */
QZ_INLINE void prefetch_part(const panel_source *from, int part, int has_bias) {
    const int rows = (QZ_TILE_OUTPUTS + QZ_PANEL_BLOCKS - 1) / QZ_PANEL_BLOCKS;
    for (int r = part * rows; r < (part + 1) * rows; r++) {
        for (ptrdiff_t i = 0; i < from->bytes; i += 64) prefetch(from->w + r * from->w_stride + i);
        prefetch(from->scales + r * from->scale_stride);
        if (has_bias) prefetch(from->biases + r * from->bias_stride);
    }
}

/* A panel, or its first blocks, against rows of x that follow each other. */
typedef struct panel_rows {
    float *y;
    ptrdiff_t y_stride;
    const panel_t *panel;
    const char *x; /* the first row as prepared, whose chunk_numbers are `numbers` bytes from there */
    ptrdiff_t x_stride, numbers, first;
    int blocks, rows, block, digits;
    int is_first; /* tile of the panel, which fetches the next one */
    panel_source next;
} panel_rows;

/* `rows` is at least t->rows; the last row stands in for those beyond. Of the format only what a tile asks for matters:
 * whether it is wide and whether it has a bias. */
QZ_INLINE void multiply_rows_t(const panel_rows *t, int rows, int bits, int block, int digits, int wide) {
    const int bytes = strip_bytes(bits, digits);
    planes x[QZ_TILE_M];
    const int8_t *strips[QZ_TILE_M];
    QZ_UNROLL
    for (int r = 0; r < rows; r++) {
        const char *row = t->x + (r < t->rows ? r : t->rows - 1) * t->x_stride;
        x[r] = (planes){(int8_t *)row, (chunk_numbers *)(row + t->numbers)};
        strips[r] = x[r].digits;
    }
    for (int b = 0; b < t->blocks; b++) {
        tile_sums low, high;
        const ptrdiff_t at = t->first + b;
        if (t->is_first) prefetch_part(&t->next, b, QZ_HAS_BIAS(bits));
        sum_tile(low, high, codes_of_block(t->panel, b, block), strips, at * block * bytes, rows, bits, block, digits,
                 wide);
        const tile_columns columns = columns_of_block(t->panel, b, bits, digits, wide);
        QZ_UNROLL
        for (int r = 0; r < rows; r++) {
            if (r >= t->rows) break;
            add_tile_terms(t->y + r * t->y_stride, low[r], high[r], &columns, &x[r], at, bits, digits, wide);
        }
    }
}

#ifdef QZ_TILES_FOR_ALL
/* Formats share tiles, of as many rows as are there. 4, 8 and QZ_FP4 stand for their kind: narrow, wide, no bias. */
typedef void tile_kernel(const panel_rows *t);
#define QZ_DEFINE_TILE(count, bits, kind, wide)                                                    \
    static __attribute__((noinline)) void QZ_NAME(tile_##kind##_##count)(const panel_rows *from) { \
        panel_rows t = *from;                                                                      \
        t.rows = count;                                                                            \
        QZ_ASSUME(t.block % 16 == 0 && t.block > 0 && t.blocks > 0);                               \
        multiply_rows_t(&t, count, bits, t.block, (wide) ? 3 : t.digits, wide);                    \
    }
#define QZ_DEFINE_TILES(...)       \
    QZ_DEFINE_TILE(1, __VA_ARGS__) \
    QZ_DEFINE_TILE(2, __VA_ARGS__) \
    QZ_DEFINE_TILE(3, __VA_ARGS__) \
    QZ_DEFINE_TILE(4, __VA_ARGS__) \
    QZ_DEFINE_TILE(5, __VA_ARGS__) \
    QZ_DEFINE_TILE(6, __VA_ARGS__) \
    QZ_DEFINE_TILE(7, __VA_ARGS__) \
    QZ_DEFINE_TILE(8, __VA_ARGS__)
QZ_DEFINE_TILES(4, narrow, 0)
QZ_DEFINE_TILES(8, wide, 1)
QZ_DEFINE_TILES(QZ_FP4, no_bias, 0)
#define QZ_TILES(kind)                                                                                       \
    {QZ_NAME(tile_##kind##_1), QZ_NAME(tile_##kind##_2), QZ_NAME(tile_##kind##_3), QZ_NAME(tile_##kind##_4), \
     QZ_NAME(tile_##kind##_5), QZ_NAME(tile_##kind##_6), QZ_NAME(tile_##kind##_7), QZ_NAME(tile_##kind##_8)}
static tile_kernel *const QZ_NAME(tiles)[3][QZ_TILE_M] = {QZ_TILES(narrow), QZ_TILES(wide), QZ_TILES(no_bias)};

QZ_INLINE void multiply_panel_t(const panel_rows *t, int bits, int block, int digits) {
    const int kind = !QZ_HAS_BIAS(bits) ? 2 : is_wide(bits, block, digits);
    QZ_NAME(tiles)[kind][t->rows - 1](t);
}
#else
QZ_INLINE void multiply_panel_t(const panel_rows *t, int bits, int block, int digits) {
    multiply_rows_t(t, QZ_TILE_M, bits, block, digits, is_wide(bits, block, digits));
}
#endif

/* Rows of the next tile where `left` are left: the last two are about equally high. */
QZ_INLINE int rows_of_tile(ptrdiff_t left) {
    return left >= 2 * QZ_TILE_M ? QZ_TILE_M : left > QZ_TILE_M ? (int)((left + 1) / 2) : (int)left;
}

/* Of the panel after that of `column` and `first`. After the last one, of the rows that follow those of the job. */
QZ_INLINE panel_source next_panel(const qz_matmul_job *job, ptrdiff_t column, ptrdiff_t first, int bits, int block,
                                  int per_group) {
    const qz_scales *from = &job->scales;
    column += QZ_TILE_OUTPUTS;
    if (column >= job->rows) {
        first += QZ_PANEL_BLOCKS;
        column = 0;
    }
    if (first * block >= job->columns) {
        first = 0;
        column = job->rows;
    }
    const ptrdiff_t group = group_of(first, per_group), block_bytes = block * QZ_STORED_BITS(bits) / 8;
    return (panel_source){(const char *)job->w + column * job->w_row_stride + first * block_bytes,
                          from->scales + column * from->scale_row_stride + group * from->scale_group_stride,
                          from->biases + column * from->bias_row_stride + group * from->bias_group_stride,
                          job->w_row_stride,
                          from->scale_row_stride,
                          from->bias_row_stride,
                          QZ_PANEL_BLOCKS * block_bytes};
}

/* Adds the terms of all blocks from `first` on. */
QZ_INLINE void add_panels_t(const qz_matmul_job *job, ptrdiff_t first, int bits, int block, int digits) {
    const int per_group = block < QZ_MAX_BLOCK ? 1 : blocks_per_group(job, block);
    panel_t panel;
    const ptrdiff_t blocks = job->columns / block;
    const ptrdiff_t numbers = padded_blocks(job->columns, block) * block * strip_bytes(bits, digits);
    panel_rows t = {NULL, job->y_stride, &panel, NULL, job->x_stride, numbers, 0, 0, 0, block, digits, 0, {0}};
    for (t.first = first; t.first < blocks; t.first += QZ_PANEL_BLOCKS) {
        t.blocks = blocks - t.first < QZ_PANEL_BLOCKS ? (int)(blocks - t.first) : QZ_PANEL_BLOCKS;
        for (ptrdiff_t column = 0; column < job->rows; column += QZ_TILE_OUTPUTS) {
            load_panel_t(&panel, 0, job, column, t.first, t.blocks, bits, block, per_group, digits);
            t.next = next_panel(job, column, t.first, bits, block, per_group);
            for (ptrdiff_t m = 0; m < job->m; m += t.rows) {
                t.rows = rows_of_tile(job->m - m);
                t.y = job->y + m * job->y_stride + column;
                t.x = job->x + m * job->x_stride;
                t.is_first = m == 0;
                multiply_panel_t(&t, bits, block, digits);
            }
        }
    }
}

QZ_INLINE size_t strips_size(ptrdiff_t k, int bits, int block, int digits) {
    return planes_size(k, block, strip_bytes(bits, digits));
}

#if QZ_PAIRS
QZ_INLINE int prepare_strips(char *prepared, const float *x, ptrdiff_t k, int bits, int block, int digits) {
    const int p = fixed_point_bits(bits, block, digits), wide = is_wide(bits, block, digits);
    const int bytes = strip_bytes(bits, digits);
    planes to = planes_at(prepared, k, block, bytes);
    for (ptrdiff_t b = 0; b < k / block; b++) {
        int32_t v[QZ_MAX_BLOCK], high, offset, offset_high;
        float scale;
        if (!fixed_point(v, x + b * block, block, p, &scale)) return 0;
        const ptrdiff_t place = strip_place(b, k / block, bits, block);
        const int32_t sum = store_strip(to.digits + place * block * bytes, v, block, bits, digits, wide, &high);
        set_strip_offsets(&offset, &offset_high, sum, high, bits, digits, wide);
        set_numbers(&to, place, scale * QZ_UNIT(bits), sum, offset, offset_high);
    }
    return 1;
}
#else
QZ_INLINE v_i32 largest_of_block(const float *x, int block) {
    v_i32 most = set1_i32(0);
    for (int i = 0; i < block; i += QZ_LANES) most = max_i32(most, magnitude_f32(load_f32(x + i)));
    return most;
}

/* One block in digits, each in the order of a panel's quads; leaves sums of v and of the top digits lane by lane. */
QZ_INLINE void store_block(int8_t *to, const float *x, float inverse, v_i32 *sum, v_i32 *tops, int bits, int block,
                           int digits) {
    *sum = *tops = set1_i32(0);
    for (int i = 0; i < block; i += QZ_LANES) {
        v_i32 v = i32_from_f32_nearest(mul_f32(load_f32(x + i), set1_f32(inverse)));
        *sum = add_i32(*sum, v);
#ifdef QZ_LOADS_SOME
        v = fold_lanes(v, QZ_PANEL_FOLD(QZ_STORED_BITS(bits)));
#endif
        *tops = store_some_digits(to + i, block, v, digits, *tops);
    }
    (void)bits;
}

/* QZ_LANES blocks at a time, whose largest magnitudes and sums fill a vector. */
QZ_INLINE int prepare_strips(char *prepared, const float *x, ptrdiff_t k, int bits, int block, int digits) {
    const int p = fixed_point_bits(bits, block, digits), wide = is_wide(bits, block, digits);
    const ptrdiff_t blocks = k / block;
    planes to = planes_at(prepared, k, block, digits);
    for (ptrdiff_t first = 0; first < blocks; first += QZ_LANES) {
        const ptrdiff_t some = blocks - first < QZ_LANES ? blocks - first : QZ_LANES;
        v_f32 most[QZ_LANES];
        v_i32 sums[QZ_LANES], tops[QZ_LANES];
        float scales[QZ_LANES], inverses[QZ_LANES];
        int32_t sum[QZ_LANES], top[QZ_LANES] = {0};
        for (int i = 0; i < QZ_LANES; i++) {
            sums[i] = tops[i] = i < some ? largest_of_block(x + (first + i) * block, block) : set1_i32(0);
            most[i] = f32_of_bits(sums[i]);
        }
        const v_i32 largest = greatest_i32(most);
        if (any_i32(greater_i32(largest, set1_i32(0x7f7fffff)))) return 0;
        powers_of_two(scales, inverses, largest, p);
        for (ptrdiff_t i = 0; i < some; i++) {
            int8_t *digit = to.digits + strip_place(first + i, blocks, bits, block) * block * digits;
            store_block(digit, x + (first + i) * block, inverses[i], &sums[i], &tops[i], bits, block, digits);
        }
        store_i32(sum, sum_blocks(sums, QZ_LANES));
        if (wide) store_i32(top, sum_blocks(tops, QZ_LANES));
        for (ptrdiff_t i = 0; i < some; i++) {
            int32_t offset, offset_high;
            set_offsets(&offset, &offset_high, sum[i], top[i], bits, wide);
            set_numbers(&to, strip_place(first + i, blocks, bits, block), scales[i] * QZ_UNIT(bits), sum[i], offset,
                        offset_high);
        }
    }
    return 1;
}
#endif
