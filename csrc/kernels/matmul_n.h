/* y = x W: weights [K, N], groups along N. What a result is, bit for bit, is said by matmul_definition.h. Lanes are
 * outputs; x takes each weight row's scale, so that every group of outputs has its own digits of x. */

/* The codes of a block of k for one group of outputs, and the group's scales. Unpacking writes whole vectors. */
/* Bytes from row to row of a panel: a tile may begin at the last group of 16 outputs and takes 32. */
enum { QZ_PITCH_N = 4 * (QZ_MAX_GROUP + 16) };
typedef struct panel_n {
    _Alignas(64) uint8_t quads[QZ_MAX_BLOCK / 4][QZ_PITCH_N];
#if QZ_PAIRS
    uint8_t pairs[QZ_MAX_BLOCK / 2][QZ_PITCH_N];
#endif
    int32_t excess[QZ_MAX_GROUP];                                            /* see store_pairs */
    float scales[QZ_MAX_BLOCK], biases[QZ_MAX_BLOCK], centred[QZ_MAX_BLOCK]; /* centred: b + c s */
} panel_n;

QZ_INLINE void load_scales_n(panel_n *panel, const qz_scales *from, ptrdiff_t group, ptrdiff_t first, ptrdiff_t count,
                             int bits) {
    const ptrdiff_t s = group * from->scale_group_stride, b = group * from->bias_group_stride;
    if (count < QZ_MAX_BLOCK) {
        memset(panel->scales, 0, sizeof panel->scales);
        memset(panel->biases, 0, sizeof panel->biases);
    }
    QZ_NAME(load)(panel->scales, from->scales + first * from->scale_row_stride + s, from->scale_row_stride,
                  from->scale_type, count);
    if (!QZ_HAS_BIAS(bits)) return;
    QZ_NAME(load)(panel->biases, from->biases + first * from->bias_row_stride + b, from->bias_row_stride,
                  from->bias_type, count);
    for (int i = 0; i < QZ_MAX_BLOCK; i++) {
        panel->centred[i] = panel->biases[i] + (float)QZ_CENTRE(bits) * panel->scales[i];
    }
}

/* The codes of a group that begin at w, of `count` weight rows; the last stands in for those beyond, where x is 0. */
QZ_INLINE void load_codes_n(panel_n *panel, const uint8_t *w, ptrdiff_t w_row_stride, ptrdiff_t count,
                            ptrdiff_t outputs, int bits, int digits) {
    for (ptrdiff_t k = 0; k < QZ_MAX_BLOCK; k += 4) {
        for (ptrdiff_t n = 0; n < outputs; n += QZ_VECTOR_BYTES) {
            v_u8 lines[4];
            QZ_UNROLL
            for (int i = 0; i < 4; i++) {
                const ptrdiff_t line = k + i < count ? k + i : count - 1;
                lines[i] = unpack_line(w + line * w_row_stride + n * QZ_STORED_BITS(bits) / 8, bits, outputs - n);
            }
            store_interleaved_4(panel->quads[k / 4] + 4 * n, lines[0], lines[1], lines[2], lines[3]);
        }
    }
#if QZ_PAIRS
    for (ptrdiff_t n = 0; n < outputs && has_pairs(bits, digits); n += QZ_LANES) {
        v_i32 excess = store_pairs(panel->pairs[0] + 4 * n, panel->quads[0] + 4 * n, QZ_PITCH_N, QZ_MAX_BLOCK, bits,
                                   is_wide(bits, QZ_MAX_BLOCK, digits));
        store_i32(panel->excess + n, excess);
    }
#else
    (void)digits;
#endif
}

/* A row of x against a panel: t = x s and z = x (b + c s), each put into block fixed point. */
typedef struct row_n {
    int8_t strip[QZ_MAX_DIGITS * QZ_MAX_BLOCK]; /* digit after digit, if for multiply_row_n */
    float scale, shift;                         /* 2^e of t; the sum of z */
    int32_t offset, offset_high;
    int is_finite;
} row_n;

QZ_INLINE void prepare_row_n(row_n *row, const float *from, ptrdiff_t count, const panel_n *panel, int few, int bits,
                             int digits) {
    const int p = fixed_point_bits(bits, QZ_MAX_BLOCK, digits), wide = is_wide(bits, QZ_MAX_BLOCK, digits);
    float padded[QZ_MAX_BLOCK], t[QZ_MAX_BLOCK], z[QZ_MAX_BLOCK], z_scale;
    int32_t v[QZ_MAX_BLOCK], u[QZ_MAX_BLOCK], high, sum_u = 0;
    if (count < QZ_MAX_BLOCK) {
        memset(padded, 0, sizeof padded);
        from = memcpy(padded, from, (size_t)count * sizeof *from);
    }
    for (int i = 0; i < QZ_MAX_BLOCK; i += QZ_LANES) {
        v_f32 value = load_f32(from + i);
        store_f32(t + i, mul_f32(value, load_f32(panel->scales + i)));
        if (QZ_HAS_BIAS(bits)) store_f32(z + i, mul_f32(value, load_f32(panel->centred + i)));
    }
    row->is_finite = fixed_point(v, t, QZ_MAX_BLOCK, p, &row->scale);
    if (QZ_HAS_BIAS(bits)) row->is_finite = row->is_finite && fixed_point(u, z, QZ_MAX_BLOCK, 22, &z_scale);
    if (!row->is_finite) return;
    row->scale *= QZ_UNIT(bits);
    if (few) {
        int32_t sum = store_digits(row->strip, QZ_MAX_BLOCK, v, QZ_MAX_BLOCK, digits, &high);
        set_offsets(&row->offset, &row->offset_high, sum, high, bits, wide);
    } else {
        int32_t sum = store_strip(row->strip, v, QZ_MAX_BLOCK, bits, digits, wide, &high);
        set_strip_offsets(&row->offset, &row->offset_high, sum, high, bits, digits, wide);
    }
    if (!QZ_HAS_BIAS(bits)) return;
    for (int i = 0; i < QZ_MAX_BLOCK; i++) sum_u += u[i];
    row->shift = (float)sum_u * z_scale;
}

/* y = y + Gf * 2^e + Z for the outputs of a tile, of which there are `outputs`: a group of 16 may be less than a tile.
 * Without a bias, no Z. excess: of their pairs, if the low dots are of such. */
QZ_INLINE void add_terms_n(float *y, const v_i32 *low, const v_i32 *high, const int32_t *excess, ptrdiff_t outputs,
                           const row_n *row, int bits, int wide) {
    QZ_UNROLL
    for (int v = 0; v < QZ_TILE_VECTORS; v++) {
        if (bits == QZ_FP4 && v * QZ_LANES >= outputs) break;
        float *to = y + v * QZ_LANES;
        v_i32 sum = excess ? sub_i32(low[v], load_i32(excess + v * QZ_LANES)) : low[v];
        v_f32 dot = float_of_dots(sum, high + v, set1_i32(row->offset), set1_i32(row->offset_high), wide);
        v_f32 term = mul_f32(dot, set1_f32(row->scale));
        if (QZ_HAS_BIAS(bits)) term = add_f32(term, set1_f32(row->shift));
        store_f32(to, add_f32(load_f32(to), term));
    }
}

/* A block in which x s or x (b + c s) is not finite: the plain sum, in order. */
static void add_terms_n_not_finite(float *y, const float *x, const panel_n *panel, const uint8_t *w,
                                   ptrdiff_t w_row_stride, ptrdiff_t outputs, ptrdiff_t count, int bits) {
    float terms[QZ_MAX_GROUP] = {0};
    for (ptrdiff_t k = 0; k < count; k++) {
        uint8_t codes[QZ_MAX_GROUP];
        unpack_bits(codes, w + k * w_row_stride, QZ_STORED_BITS(bits), outputs);
        for (ptrdiff_t n = 0; n < outputs; n++) {
            const int shifted = QZ_HAS_BIAS(bits) ? codes[n] : shifted_fp4[codes[n]] - QZ_CENTRE(bits);
            float weight = panel->scales[k] * (QZ_UNIT(bits) * (float)shifted);
            if (QZ_HAS_BIAS(bits)) weight += panel->biases[k];
            terms[n] += x[k] * weight;
        }
    }
    for (ptrdiff_t n = 0; n < outputs; n++) y[n] += terms[n];
}

/* `rows` rows of x, of which the first `count` count, against the outputs of a group that stand at `at` in a panel. */
QZ_INLINE void multiply_panel_n(float *y, ptrdiff_t pitch, const panel_n *panel, ptrdiff_t at, ptrdiff_t outputs,
                                const row_n *x, ptrdiff_t count, int rows, int bits, int digits) {
    const int wide = is_wide(bits, QZ_MAX_BLOCK, digits);
    const int8_t *strips[QZ_TILE_M];
    for (ptrdiff_t r = 0; r < rows; r++) strips[r] = x[r < count ? r : count - 1].strip;
    for (ptrdiff_t n = 0; n < outputs; n += QZ_TILE_OUTPUTS) {
        tile_sums low, high;
        tile_codes codes = {panel->quads[0] + 4 * (at + n), NULL, QZ_PITCH_N};
#if QZ_PAIRS
        codes.pairs = panel->pairs[0] + 4 * (at + n);
#endif
        sum_tile(low, high, codes, strips, 0, rows, bits, QZ_MAX_BLOCK, digits, wide);
        const int32_t *excess = wide && has_pairs(bits, digits) ? panel->excess + at + n : NULL;
        for (ptrdiff_t r = 0; r < count; r++) {
            if (x[r].is_finite) add_terms_n(y + r * pitch + n, low[r], high[r], excess, outputs - n, &x[r], bits, wide);
        }
    }
}

#if QZ_PAIRS
typedef v_sums sums_n[QZ_MAX_DIGITS][2]; /* of 32 outputs, by digit */

/* Adds two weight rows' products with the digits at x and, of the next row, at x + 1. */
QZ_INLINE void add_rows_n(sums_n sums, const uint8_t *first, const uint8_t *second, const int8_t *x, int bits,
                          int digits) {
    v_u8 codes[2];
    pair_rows(codes, first, second, bits);
    QZ_UNROLL
    for (int d = 0; d < digits; d++) {
        const v_u8 digit = broadcast_two(x + d * QZ_MAX_BLOCK);
        QZ_UNROLL
        for (int v = 0; v < 2; v++) sums[d][v] = add_quad(sums[d][v], codes[v], digit, bits);
    }
}

/* The dots of a row of x with the `count` codes of each of 32 outputs: low of the two low digits, high of the top one.
 * x is 0 beyond them. */
QZ_INLINE void sum_row_n(v_i32 low[4], v_i32 high[4], const uint8_t *w, ptrdiff_t stride, ptrdiff_t count,
                         const int8_t *x, int bits, int digits) {
    const int fit = 2 * QZ_QUADS_TOGETHER(bits, 128); /* rows whose sums are int16 */
    const v_sums none[2] = {no_sums(), no_sums()};
    QZ_UNROLL
    for (int v = 0; v < 4; v++) low[v] = high[v] = set1_i32(0);
    for (ptrdiff_t begin = 0; begin < count; begin += fit) {
        const ptrdiff_t some = count - begin < fit ? count - begin : fit;
        sums_n sums = {{no_sums(), no_sums()}, {no_sums(), no_sums()}, {no_sums(), no_sums()}};
        QZ_UNROLL_BY_4
        for (ptrdiff_t i = 0; i < some / 2; i++) {
            add_rows_n(sums, w, w + stride, x + begin + 2 * i, bits, digits);
            w += 2 * stride;
        }
        if (some % 2) add_rows_n(sums, w, w, x + begin + some - 1, bits, digits);
        widen_pairs(low, sums[0], digits > 1 ? sums[1] : none);
        if (digits == 3) widen_pairs(high, sums[2], none);
    }
    order_sums(low, bits);
    if (digits == 3) order_sums(high, bits);
}

/* One row of x against the group of outputs whose codes begin at w: no other row would share codes put in quads. */
QZ_INLINE void multiply_row_n(float *y, const uint8_t *w, ptrdiff_t stride, ptrdiff_t outputs, const row_n *row,
                              ptrdiff_t count, int bits, int digits) {
    const int wide = is_wide(bits, QZ_MAX_BLOCK, digits);
    for (ptrdiff_t n = 0; n < outputs; n += 32) {
        v_i32 low[4], high[4];
        sum_row_n(low, high, w + n * bits / 8, stride, count, row->strip, bits, digits);
        QZ_UNROLL
        for (int v = 0; v < 4; v++) {
            if (digits == 3 && !wide) low[v] = add_i32(low[v], shl_i32(high[v], 16));
        }
        QZ_UNROLL
        for (int v = 0; v < 4; v += QZ_TILE_VECTORS) {
            add_terms_n(y + n + v * QZ_LANES, low + v, high + v, NULL, outputs - n - v * QZ_LANES, row, bits, wide);
        }
    }
}
#endif

/* One block of k of the job's weights [first, first + count), for one group of outputs, from `column` on, whose codes
 * stand in the panel at `at`. */
QZ_INLINE void multiply_block_n(panel_n *panel, ptrdiff_t at, const qz_matmul_job *job, ptrdiff_t first,
                                ptrdiff_t count, ptrdiff_t column, int bits, int digits) {
    const ptrdiff_t outputs = job->group_size, stride = job->w_row_stride;
    const uint8_t *w = job->w + first * stride + column * QZ_STORED_BITS(bits) / 8;
    load_scales_n(panel, &job->scales, column / job->group_size, first, count, bits);
    for (ptrdiff_t m = 0; m < job->m; m += QZ_TILE_M) {
        const ptrdiff_t rows = job->m - m < QZ_TILE_M ? job->m - m : QZ_TILE_M;
        float *y = job->y + m * job->y_stride + column;
        row_n x[QZ_TILE_M];
        for (ptrdiff_t r = 0; r < rows; r++) {
            const float *from = (const float *)(job->x + (m + r) * job->x_stride) + first;
            prepare_row_n(&x[r], from, count, panel, 0, bits, digits);
            if (!x[r].is_finite) {
                add_terms_n_not_finite(y + r * job->y_stride, from, panel, w, stride, outputs, count, bits);
            }
        }
        if (rows == 1) {
            multiply_panel_n(y, job->y_stride, panel, at, outputs, x, rows, 1, bits, digits);
        } else {
            multiply_panel_n(y, job->y_stride, panel, at, outputs, x, rows, QZ_TILE_M, bits, digits);
        }
    }
}

/* The same for all groups that a panel holds: small ones share vectors of codes. */
QZ_INLINE ptrdiff_t multiply_groups_n(panel_n *panel, const qz_matmul_job *job, ptrdiff_t first, ptrdiff_t count,
                                      ptrdiff_t column, int bits, int digits) {
    const ptrdiff_t left = job->columns - column, most = QZ_HAS_BIAS(bits) ? job->group_size : QZ_MAX_GROUP;
    const ptrdiff_t outputs = left < most ? left : most;
    const uint8_t *w = job->w + first * job->w_row_stride + column * QZ_STORED_BITS(bits) / 8;
    load_codes_n(panel, w, job->w_row_stride, count, outputs, bits, digits);
    for (ptrdiff_t at = 0; at < outputs; at += job->group_size) {
        multiply_block_n(panel, at, job, first, count, column + at, bits, digits);
    }
    return outputs;
}

#if QZ_PAIRS
/* Rows of x up to which codes are taken anew for each: quads and pairs of them would cost more than they save. 8-bit
 * codes have no int16 sums of digits. */
enum { QZ_FEW_N = 2 };

/* multiply_block_n for few rows. */
QZ_INLINE void multiply_few_n(panel_n *panel, const qz_matmul_job *job, ptrdiff_t first, ptrdiff_t count,
                              ptrdiff_t column, int bits, int digits) {
    const ptrdiff_t outputs = job->group_size, stride = job->w_row_stride;
    const uint8_t *w = job->w + first * stride + column * QZ_STORED_BITS(bits) / 8;
    load_scales_n(panel, &job->scales, column / job->group_size, first, count, bits);
    for (ptrdiff_t m = 0; m < job->m; m++) {
        const float *from = (const float *)(job->x + m * job->x_stride) + first;
        float *y = job->y + m * job->y_stride + column;
        row_n x;
        prepare_row_n(&x, from, count, panel, 1, bits, digits);
        if (x.is_finite) {
            multiply_row_n(y, w, stride, outputs, &x, count, bits, digits);
        } else {
            add_terms_n_not_finite(y, from, panel, w, stride, outputs, count, bits);
        }
    }
}
#endif

/* Lines of weights are far apart, so that hardware does not foresee them. */
QZ_INLINE void prefetch_lines(const qz_matmul_job *job, ptrdiff_t first, int bits) {
    const ptrdiff_t last = first + QZ_MAX_BLOCK < job->rows ? first + QZ_MAX_BLOCK : job->rows;
    for (ptrdiff_t k = first; k < last; k++) {
        const uint8_t *line = job->w + k * job->w_row_stride;
        for (ptrdiff_t i = 0; i < job->columns * QZ_STORED_BITS(bits) / 8; i += 64) prefetch(line + i);
    }
}

QZ_INLINE void matmul_n(const qz_matmul_job *job, int bits, int digits) {
    panel_n panel;
    memset(job->y, 0, (size_t)(job->m * job->y_stride) * sizeof *job->y);
    for (ptrdiff_t first = 0; first < job->rows; first += QZ_MAX_BLOCK) {
        const ptrdiff_t count = job->rows - first < QZ_MAX_BLOCK ? job->rows - first : QZ_MAX_BLOCK;
        prefetch_lines(job, first + QZ_MAX_BLOCK, bits);
        for (ptrdiff_t column = 0; column < job->columns;) {
#if QZ_PAIRS
            if (bits < 8 && job->m <= QZ_FEW_N) {
                multiply_few_n(&panel, job, first, count, column, bits, digits);
                column += job->group_size;
                continue;
            }
#endif
            column += multiply_groups_n(&panel, job, first, count, column, bits, digits);
        }
    }
    make_nan_canonical(job->y, job->m * job->y_stride);
}
