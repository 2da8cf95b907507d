/* y = x Wᵀ for many rows of x. The codes of QZ_TILE_OUTPUTS weight rows are unpacked and transposed once, a panel of
 * k at a time, then multiplied with every row of x. Same integers and same float operations in the same order as in
 * matmul.h. */

/* Blocks of k in a panel, which stays in the first level of the caches while the rows of x pass by. */
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

/* Scales or biases of QZ_LANES weight rows become columns, from `first` on; each of the `blocks` blocks gets its
 * group's. */
QZ_INLINE void load_columns(float (*to)[QZ_TILE_OUTPUTS], int first, const char *from, const ptrdiff_t rows[QZ_LANES],
                            ptrdiff_t stride, qz_type type, int blocks, int per_group) {
    float numbers[QZ_LANES][QZ_PANEL_BLOCKS];
    for (int i = 0; i < QZ_LANES; i++) {
        QZ_NAME(load)(numbers[i], from + rows[i], stride, type, group_of(blocks + per_group - 1, per_group));
    }
    for (int b = 0; b < blocks; b++) {
        QZ_UNROLL
        for (int i = 0; i < QZ_LANES; i++) to[b][first + i] = numbers[i][group_of(b, per_group)];
    }
}

/* The codes and scales of QZ_LANES weight rows, to block `at` of the panel; the last of the job stands in for those
 * beyond. */
QZ_INLINE void load_panel_rows(panel_t *panel, int at, int first_output, const qz_matmul_job *job, ptrdiff_t row,
                               ptrdiff_t first, int blocks, int bits, int block, int per_group) {
    const qz_scales *from = &job->scales;
    const ptrdiff_t group = group_of(first, per_group), count = blocks * block;
    const uint8_t *w[QZ_LANES];
    ptrdiff_t scales[QZ_LANES], biases[QZ_LANES];
    for (int i = 0; i < QZ_LANES; i++) {
        const ptrdiff_t r = row + i < job->rows ? row + i : job->rows - 1;
        w[i] = job->w + r * job->w_row_stride + first * block * QZ_STORED_BITS(bits) / 8;
        scales[i] = r * from->scale_row_stride + group * from->scale_group_stride;
        biases[i] = r * from->bias_row_stride + group * from->bias_group_stride;
    }
    for (ptrdiff_t k = 0; k < count; k += QZ_VECTOR_BYTES) {
        v_f32 codes[QZ_LANES];
        QZ_UNROLL
        for (int i = 0; i < QZ_LANES; i++) {
            codes[i] = f32_of_bits((v_i32)unpack_line(w[i] + k * QZ_STORED_BITS(bits) / 8, bits, count - k));
        }
        transpose_f32(codes);
        QZ_UNROLL
        for (int i = 0; i < QZ_LANES; i++) {
            store_f32((float *)(panel->quads[at * block / 4 + k / 4 + i] + 4 * first_output), codes[i]);
        }
    }
    load_columns(panel->scales + at, first_output, from->scales, scales, from->scale_group_stride, from->scale_type,
                 blocks, per_group);
    if (!QZ_HAS_BIAS(bits)) return;
    load_columns(panel->centred + at, first_output, from->biases, biases, from->bias_group_stride, from->bias_type,
                 blocks, per_group);
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

/* y = y + (Gf * s + (b + c s) * S) * 2^e for one row of x, whose numbers for the block are `x` at `at`. Without a bias,
 * y + Gf * s * 2^e. */
QZ_INLINE void add_tile_terms(float *y, const v_i32 *low, const v_i32 *high, const panel_t *panel, int b,
                              const planes *x, ptrdiff_t at, int bits, int digits, int wide) {
    const chunk_numbers *numbers = numbers_at(x, at);
    const int lane = lane_of(at);
    QZ_UNROLL
    for (int v = 0; v < QZ_TILE_VECTORS; v++) {
        v_i32 sum = low[v];
        if (wide && has_pairs(bits, digits)) sum = sub_i32(sum, load_i32(panel->excess[b] + v * QZ_LANES));
        v_f32 dot =
            float_of_dots(sum, high + v, set1_i32(numbers->offset[lane]), set1_i32(numbers->offset_high[lane]), wide);
        v_f32 scaled = mul_f32(dot, load_f32(panel->scales[b] + v * QZ_LANES));
        if (QZ_HAS_BIAS(bits)) {
            const v_f32 sum = set1_f32(numbers->sum[lane]);
            scaled = add_f32(scaled, mul_f32(load_f32(panel->centred[b] + v * QZ_LANES), sum));
        }
        const v_f32 term = mul_f32(scaled, set1_f32(numbers->scale[lane]));
        store_f32(y + v * QZ_LANES, add_f32(load_f32(y + v * QZ_LANES), term));
    }
}

/* A panel against QZ_TILE_M rows of x from `prepared` on, of which `rows` count; the last stands in for the others. */
QZ_INLINE void multiply_panel_t(float *y, ptrdiff_t pitch, const panel_t *panel, const char *prepared,
                                ptrdiff_t x_stride, ptrdiff_t k, ptrdiff_t first, int blocks, ptrdiff_t rows, int bits,
                                int block, int digits) {
    const int wide = is_wide(bits, block, digits), bytes = strip_bytes(bits, digits);
    planes x[QZ_TILE_M];
    const int8_t *strips[QZ_TILE_M];
    for (ptrdiff_t r = 0; r < QZ_TILE_M; r++) {
        x[r] = planes_at(prepared + (r < rows ? r : rows - 1) * x_stride, k, block, bytes);
        strips[r] = x[r].digits;
    }
    for (int b = 0; b < blocks; b++) {
        tile_sums low, high;
        sum_tile(low, high, codes_of_block(panel, b, block), strips, (first + b) * block * bytes, QZ_TILE_M, bits,
                 block, digits, wide);
        for (ptrdiff_t r = 0; r < rows; r++) {
            add_tile_terms(y + r * pitch, low[r], high[r], panel, b, &x[r], first + b, bits, digits, wide);
        }
    }
}

QZ_INLINE void prefill_t(const qz_matmul_job *job, int bits, int block, int digits) {
    const int per_group = block < QZ_MAX_BLOCK ? 1 : blocks_per_group(job, block);
    panel_t panel;
    const ptrdiff_t blocks = job->columns / block;
    memset(job->y, 0, (size_t)(job->m * job->y_stride) * sizeof *job->y);
    for (ptrdiff_t first = 0; first < blocks; first += QZ_PANEL_BLOCKS) {
        const int some = blocks - first < QZ_PANEL_BLOCKS ? (int)(blocks - first) : QZ_PANEL_BLOCKS;
        for (ptrdiff_t column = 0; column < job->rows; column += QZ_TILE_OUTPUTS) {
            load_panel_t(&panel, 0, job, column, first, some, bits, block, per_group, digits);
            for (ptrdiff_t m = 0; m < job->m; m += QZ_TILE_M) {
                const ptrdiff_t rows = job->m - m < QZ_TILE_M ? job->m - m : QZ_TILE_M;
                multiply_panel_t(job->y + m * job->y_stride + column, job->y_stride, &panel, job->x + m * job->x_stride,
                                 job->x_stride, job->columns, first, some, rows, bits, block, digits);
            }
        }
    }
    make_nan_canonical(job->y, job->m * job->y_stride);
}

QZ_INLINE size_t strips_size(ptrdiff_t k, int bits, int block, int digits) {
    return planes_size(k, block, strip_bytes(bits, digits));
}

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
