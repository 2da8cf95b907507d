/* y = x W: weights [K, N], groups along N. What a result is, bit for bit, is said by matmul_definition.h. Lanes are
 * outputs; x takes each weight row's scale, so that every group of outputs has its own digits of x. */

/* Scales are loaded for so many groups at once, and rows of x prepared for so many pairs of a row and a group: their
 * maxima, and sums, fill a vector with two for each. */
enum { QZ_GROUPS_N = QZ_LANES < 8 ? 8 : QZ_LANES, QZ_ROWS_N = QZ_LANES / 2 };

/* What a group of outputs has for a block of k. */
typedef struct group_n {
    float scales[QZ_MAX_BLOCK], biases[QZ_MAX_BLOCK], centred[QZ_MAX_BLOCK]; /* centred: b + c s */
} group_n;

/* Bytes from row to row of a panel: a tile may begin at the last group of 16 outputs and takes 32. */
enum { QZ_PITCH_N = 4 * (QZ_MAX_GROUP + 16) };

/* The codes of a block of k for some groups of outputs. Unpacking writes whole vectors. */
typedef struct panel_n {
    _Alignas(64) uint8_t quads[QZ_MAX_BLOCK / 4][QZ_PITCH_N];
#if QZ_PAIRS
    uint8_t pairs[QZ_MAX_BLOCK / 2][QZ_PITCH_N];
#endif
    int32_t excess[QZ_MAX_GROUP]; /* see store_pairs */
} panel_n;

/* The row of a block whose codes are byte i of quad q: such that vectors of x's digits become quads lane by lane. */
QZ_INLINE ptrdiff_t row_of_quad(int q, int i) { return (q / QZ_LANES * 4 + i) * QZ_LANES + q % QZ_LANES; }

/* The numbers of QZ_LANES groups that are neighbours in one of QZ_MAX_BLOCK weight rows become columns. */
QZ_INLINE void transpose_scales(group_n *groups, ptrdiff_t place, const char *from, ptrdiff_t stride, qz_type type) {
    for (int k = 0; k < QZ_MAX_BLOCK; k += QZ_LANES) {
        v_f32 v[QZ_LANES];
        QZ_UNROLL
        for (int i = 0; i < QZ_LANES; i++) {
            const char *row = from + (k + i) * stride;
            v[i] = type == QZ_E8M0 || type == QZ_E4M3 ? scales_of_bytes((const uint8_t *)row, type)
                                                      : load_floats(row, 0, type);
        }
        transpose_f32(v);
        QZ_UNROLL
        for (int i = 0; i < QZ_LANES; i++) store_f32((float *)((char *)(groups + i) + place) + k, v[i]);
    }
}

/* Scales or biases, which stand at `place` in group_n, of `some` groups and `count` rows; 0 beyond. Not inline: it is
 * the same for all formats. */
static __attribute__((noinline)) void QZ_NAME(load_numbers_n)(group_n *groups, ptrdiff_t place, const char *from,
                                                              ptrdiff_t group_stride, ptrdiff_t row_stride,
                                                              qz_type type, ptrdiff_t some, ptrdiff_t count) {
    const int bytes = type == QZ_F32 ? 4 : type == QZ_F16 || type == QZ_BF16 ? 2 : 1;
    ptrdiff_t i = 0;
    if (group_stride == bytes && type != QZ_F64 && count == QZ_MAX_BLOCK) {
        for (; i + QZ_LANES <= some; i += QZ_LANES) {
            const char *at = from + i * group_stride;
            switch (type) {
            case QZ_F32: transpose_scales(groups + i, place, at, row_stride, QZ_F32); break;
            case QZ_F16: transpose_scales(groups + i, place, at, row_stride, QZ_F16); break;
            case QZ_BF16: transpose_scales(groups + i, place, at, row_stride, QZ_BF16); break;
            case QZ_E8M0: transpose_scales(groups + i, place, at, row_stride, QZ_E8M0); break;
            default: transpose_scales(groups + i, place, at, row_stride, QZ_E4M3);
            }
        }
    }
    for (; i < some; i++) {
        float *to = (float *)((char *)(groups + i) + place);
        memset(to + count, 0, (size_t)(QZ_MAX_BLOCK - count) * sizeof *to);
        QZ_NAME(load)(to, from + i * group_stride, row_stride, type, count);
    }
}

/* Of `some` groups from `group` on, and the block of rows from `first` on. */
QZ_INLINE void load_groups_n(group_n *groups, const qz_scales *from, ptrdiff_t group, ptrdiff_t some, ptrdiff_t first,
                             ptrdiff_t count, int bits) {
    QZ_NAME(load_numbers_n)(groups, offsetof(group_n, scales),
                            from->scales + group * from->scale_group_stride + first * from->scale_row_stride,
                            from->scale_group_stride, from->scale_row_stride, from->scale_type, some, count);
    if (!QZ_HAS_BIAS(bits)) return;
    QZ_NAME(load_numbers_n)(groups, offsetof(group_n, biases),
                            from->biases + group * from->bias_group_stride + first * from->bias_row_stride,
                            from->bias_group_stride, from->bias_row_stride, from->bias_type, some, count);
    for (ptrdiff_t i = 0; i < some; i++) {
        group_n *to = groups + i;
        for (int k = 0; k < QZ_MAX_BLOCK; k++) {
            to->centred[k] = to->biases[k] + (float)QZ_CENTRE(bits) * to->scales[k];
        }
    }
}

/* The codes that begin at w, of `count` weight rows; the last stands in for those beyond, where x is 0. */
QZ_INLINE void load_codes_n(panel_n *panel, const uint8_t *w, ptrdiff_t w_row_stride, ptrdiff_t count,
                            ptrdiff_t outputs, int bits, int digits) {
    for (int q = 0; q < QZ_MAX_BLOCK / 4; q++) {
        const uint8_t *rows[4];
        QZ_UNROLL
        for (int i = 0; i < 4; i++) {
            const ptrdiff_t row = row_of_quad(q, i);
            rows[i] = w + (row < count ? row : count - 1) * w_row_stride;
        }
        for (ptrdiff_t n = 0; n < outputs; n += QZ_VECTOR_BYTES) {
            v_u8 lines[4];
            QZ_UNROLL
            for (int i = 0; i < 4; i++) {
                lines[i] = unpack_line(rows[i] + n * QZ_STORED_BITS(bits) / 8, bits, outputs - n);
            }
            store_interleaved_4(panel->quads[q] + 4 * n, lines[0], lines[1], lines[2], lines[3]);
        }
    }
#if QZ_PAIRS
    for (ptrdiff_t n = 0; n < outputs && has_pairs(bits, digits); n += QZ_LANES) {
        v_i32 excess = store_pairs(panel->pairs[0] + 4 * n, panel->quads[0] + 4 * n, QZ_PITCH_N, QZ_MAX_BLOCK, QZ_LANES,
                                   bits, is_wide(bits, QZ_MAX_BLOCK, digits));
        store_i32(panel->excess + n, excess);
    }
#else
    (void)digits;
#endif
}

/* A row of x against a group: t = x s and z = x (b + c s), each put into block fixed point. */
typedef struct row_n {
    _Alignas(32) int8_t strip[QZ_MAX_DIGITS * QZ_MAX_BLOCK]; /* in quads; digit after digit, if for multiply_row_n */
    float scale, shift;                                      /* 2^e of t; the sum of z */
    int32_t offset, offset_high;
    int is_finite;
} row_n;

/* Of two vectors, the lower or upper halves of lanes side by side, and then the lower or upper bytes of those. */
QZ_INLINE v_i32 low_halves(v_i32 a, v_i32 b) { return or_i32(and_i32(a, set1_i32(0xffff)), shl_i32(b, 16)); }
QZ_INLINE v_i32 high_halves(v_i32 a, v_i32 b) { return or_i32(shr_u32(a, 16), and_i32(b, set1_i32(-0x10000))); }
QZ_INLINE v_i32 low_bytes(v_i32 a, v_i32 b) {
    const v_i32 low = set1_i32(0xff00ff);
    return or_i32(and_i32(a, low), shl_i32(and_i32(b, low), 8));
}
QZ_INLINE v_i32 high_bytes(v_i32 a, v_i32 b) {
    const v_i32 low = set1_i32(0xff00ff);
    return or_i32(and_i32(shr_u32(a, 8), low), xor_i32(b, and_i32(b, low)));
}

QZ_INLINE void store_quad(int8_t *to, v_i32 quads) { store_u8((uint8_t *)to, u8_of_i32(quads)); }

/* Stores v of QZ_LANES quads, from element `at` of the block on. Returns `tops` plus the top digits. The digits are
 * those of store_strip, and of store_digits. */
QZ_INLINE v_i32 store_quads(int8_t *strip, int at, const v_i32 v[4], v_i32 tops, int paired, int digits, int wide) {
    const v_i32 bias = set1_i32(paired ? pair_excess(wide) : 0x808080 & ((1 << 8 * digits) - 1));
    v_i32 w[4];
    QZ_UNROLL
    for (int i = 0; i < 4; i++) w[i] = add_i32(v[i], bias);
    if (paired) {
        store_quad(strip + 2 * at, low_halves(w[0], w[1]));
        store_quad(strip + 2 * at + QZ_VECTOR_BYTES, low_halves(w[2], w[3]));
        QZ_UNROLL
        for (int i = 0; i < 4; i++) w[i] = add_i32(w[i], set1_i32(0x8000));
    } else {
        QZ_UNROLL
        for (int i = 0; i < 4; i++) w[i] = xor_i32(w[i], bias);
        const v_i32 even = low_halves(w[0], w[2]), odd = low_halves(w[1], w[3]);
        store_quad(strip + at, low_bytes(even, odd));
        if (digits > 1) store_quad(strip + QZ_MAX_BLOCK + at, high_bytes(even, odd));
    }
    if (digits < 3) return tops;
    const v_i32 top = low_bytes(high_halves(w[0], w[2]), high_halves(w[1], w[3]));
    store_quad(strip + 2 * QZ_MAX_BLOCK + at, top);
    return dot4(tops, u8_of_i32(set1_i32(0x1010101)), u8_of_i32(top), 1);
}

/* The largest magnitudes of t and of z. */
QZ_INLINE void largest_of_row(v_f32 *t, v_f32 *z, const float *x, const group_n *group, int bits) {
    v_i32 most_t = set1_i32(0), most_z = set1_i32(0);
    QZ_UNROLL
    for (int i = 0; i < QZ_MAX_BLOCK; i += QZ_LANES) {
        const v_f32 value = load_f32(x + i);
        most_t = max_i32(most_t, magnitude_f32(mul_f32(value, load_f32(group->scales + i))));
        if (!QZ_HAS_BIAS(bits)) continue;
        most_z = max_i32(most_z, magnitude_f32(mul_f32(value, load_f32(group->centred + i))));
    }
    *t = f32_of_bits(most_t);
    *z = f32_of_bits(most_z);
}

/* Sums over a row's lanes that are still to be added up. */
typedef struct sums_of_row {
    v_i32 v, u, tops;
} sums_of_row;

/* v to the strip, and sums, of one row; the inverses are 2^-e of t and of z. */
QZ_INLINE sums_of_row store_row(int8_t *strip, const float *x, const group_n *group, float inverse_t, float inverse_z,
                                int paired, int bits, int digits) {
    const v_f32 inverses[2] = {set1_f32(inverse_t), set1_f32(inverse_z)};
    const int wide = is_wide(bits, QZ_MAX_BLOCK, digits);
    sums_of_row sums = {set1_i32(0), set1_i32(0), set1_i32(0)};
    QZ_UNROLL
    for (int at = 0; at < QZ_MAX_BLOCK; at += QZ_VECTOR_BYTES) {
        v_i32 v[4];
        QZ_UNROLL
        for (int i = 0; i < 4; i++) {
            const int k = at + i * QZ_LANES;
            const v_f32 value = load_f32(x + k), t = mul_f32(value, load_f32(group->scales + k));
            v[i] = i32_from_f32_nearest(mul_f32(t, inverses[0]));
            sums.v = add_i32(sums.v, v[i]);
            if (!QZ_HAS_BIAS(bits)) continue;
            const v_f32 z = mul_f32(value, load_f32(group->centred + k));
            sums.u = add_i32(sums.u, i32_from_f32_nearest(mul_f32(z, inverses[1])));
        }
        sums.tops = store_quads(strip, at, v, sums.tops, paired, digits, wide);
    }
    return sums;
}

/* `count` rows, at most QZ_ROWS_N, each of the block of x and for the group that stand at its place. */
QZ_INLINE void prepare_rows_n(row_n *rows, const float *const *x, const group_n *const *groups, ptrdiff_t count,
                              int few, int bits, int digits) {
    const int wide = is_wide(bits, QZ_MAX_BLOCK, digits), paired = !few && has_pairs(bits, digits);
    v_f32 most[QZ_LANES];
    v_i32 sums[QZ_LANES], tops[QZ_LANES];
    float scales[2][QZ_LANES], inverses[2][QZ_LANES], shifts[QZ_LANES];
    int32_t largest[QZ_LANES], sum[QZ_LANES], top[QZ_LANES];
    for (int i = 0; i < QZ_LANES; i++) sums[i] = tops[i] = bits_of_f32(most[i] = set1_f32(0.0f));
    for (ptrdiff_t i = 0; i < count; i++) largest_of_row(&most[i], &most[QZ_ROWS_N + i], x[i], groups[i], bits);
    const v_i32 all = greatest_i32(most);
    store_i32(largest, all);
    powers_of_two(scales[0], inverses[0], all, fixed_point_bits(bits, QZ_MAX_BLOCK, digits));
    const v_f32 scales_z = powers_of_two(scales[1], inverses[1], all, 22);
    for (ptrdiff_t i = 0; i < count; i++) {
        const uint32_t t = (uint32_t)largest[i], z = (uint32_t)largest[QZ_ROWS_N + i];
        rows[i].is_finite = is_finite_magnitude(t > z ? t : z);
        if (!rows[i].is_finite) continue;
        const sums_of_row of =
            store_row(rows[i].strip, x[i], groups[i], inverses[0][i], inverses[1][QZ_ROWS_N + i], paired, bits, digits);
        sums[i] = paired ? of.tops : of.v;
        sums[QZ_ROWS_N + i] = of.u;
        tops[i] = of.tops;
    }
    const v_i32 totals = sum_blocks(sums, QZ_LANES);
    store_i32(sum, totals);
    store_f32(shifts, mul_f32(f32_from_i32(totals), scales_z));
    if (wide && !paired) store_i32(top, sum_blocks(tops, QZ_LANES));
    for (ptrdiff_t i = 0; i < count; i++) {
        row_n *row = rows + i;
        row->scale = scales[0][i] * QZ_UNIT(bits);
        row->shift = shifts[QZ_ROWS_N + i];
        if (paired) {
            set_strip_offsets(&row->offset, &row->offset_high, 0, sum[i], bits, digits, wide);
        } else {
            set_offsets(&row->offset, &row->offset_high, sum[i], wide ? top[i] : 0, bits, wide);
        }
    }
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
static void add_terms_n_not_finite(float *y, const float *x, const group_n *group, const uint8_t *w,
                                   ptrdiff_t w_row_stride, ptrdiff_t outputs, ptrdiff_t count, int bits) {
    float terms[QZ_MAX_GROUP] = {0};
    for (ptrdiff_t k = 0; k < count; k++) {
        uint8_t codes[QZ_MAX_GROUP];
        unpack_bits(codes, w + k * w_row_stride, QZ_STORED_BITS(bits), outputs);
        for (ptrdiff_t n = 0; n < outputs; n++) {
            const int shifted = QZ_HAS_BIAS(bits) ? codes[n] : shifted_fp4[codes[n]] - QZ_CENTRE(bits);
            float weight = group->scales[k] * (QZ_UNIT(bits) * (float)shifted);
            if (QZ_HAS_BIAS(bits)) weight += group->biases[k];
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

/* Rows of x up to which quads and pairs of codes would cost more than they save. The sums of x's digits stay int16
 * then, for which codes of 8 bits are too large. */
enum { QZ_FEW_N = 2 };
QZ_INLINE int is_few(ptrdiff_t rows, int bits) { return QZ_PAIRS && QZ_DOT_BITS(bits) < 8 && rows <= QZ_FEW_N; }

#if QZ_PAIRS
/* Codes of 32 outputs, those of two weight rows side by side (pair_rows). */
typedef v_u8 rows_of_32[QZ_MAX_BLOCK / 2][2];

typedef struct few_n {
    rows_of_32 codes[QZ_MAX_GROUP / 32];
    row_n x[QZ_FEW_N][QZ_GROUPS_N];
} few_n;

/* The codes of 32 outputs from two weight rows, of which `outputs` are there: groups of 16 may end before. */
QZ_INLINE void load_two_rows(v_u8 codes[2], const uint8_t *first, const uint8_t *second, ptrdiff_t outputs, int bits) {
    uint8_t copies[2][16] = {{0}};
    if (bits == QZ_FP4 && outputs < 32) {
        first = memcpy(copies[0], first, 8);
        second = memcpy(copies[1], second, 8);
    }
    pair_rows(codes, first, second, QZ_STORED_BITS(bits));
    QZ_UNROLL
    for (int v = 0; v < 2; v++) codes[v] = as_multiplied(codes[v], bits);
}

/* Quads of a block that hold `count` rows. */
QZ_INLINE int quads_of_rows(ptrdiff_t count) { return (int)(count + QZ_VECTOR_BYTES - 1) / QZ_VECTOR_BYTES * QZ_LANES; }

/* All outputs before the next rows, so that each line of weights is read once. */
QZ_INLINE void load_rows_n(few_n *few, const uint8_t *w, ptrdiff_t stride, ptrdiff_t count, ptrdiff_t outputs,
                           int bits) {
    const int quads = quads_of_rows(count);
    for (int q = 0; q < quads; q++) {
        const uint8_t *lines[4];
        QZ_UNROLL
        for (int i = 0; i < 4; i++) {
            const ptrdiff_t row = row_of_quad(q, i);
            lines[i] = w + (row < count ? row : count - 1) * stride;
        }
        v_u8(*codes)[2] = few->codes[0] + 2 * q;
        for (ptrdiff_t n = 0; n < outputs; n += 32, codes += QZ_MAX_BLOCK / 2) {
            const ptrdiff_t place = n * QZ_STORED_BITS(bits) / 8;
            load_two_rows(codes[0], lines[0] + place, lines[1] + place, outputs - n, bits);
            load_two_rows(codes[1], lines[2] + place, lines[3] + place, outputs - n, bits);
        }
    }
}

typedef v_sums sums_n[QZ_MAX_DIGITS][2]; /* of 32 outputs, by digit */

QZ_INLINE void clear_sums(v_sums sums[2]) { sums[0] = sums[1] = no_sums(); }

/* Adds the products of a pair of codes with the digits at x. */
QZ_INLINE void add_pair_n(sums_n sums, const v_u8 codes[2], const int8_t *x, int bits, int digits) {
    QZ_UNROLL
    for (int d = 0; d < digits; d++) {
        const v_u8 digit = broadcast_two(x + d * QZ_MAX_BLOCK);
        QZ_UNROLL
        for (int v = 0; v < 2; v++) sums[d][v] = add_quad(sums[d][v], codes[v], digit, bits);
    }
}

/* Where codes of 32 outputs come from: `pairs`, or if that is NULL the weight rows from w on, all of a block. */
typedef struct codes_n {
    v_u8 (*pairs)[2];
    const uint8_t *w;
    ptrdiff_t stride, outputs;
} codes_n;

/* A quad, as two pairs. */
QZ_INLINE void load_quad_n(v_u8 codes[2][2], codes_n from, int q, int direct, int bits) {
    if (direct) {
        const uint8_t *const w = from.w + row_of_quad(q, 0) * from.stride;
        const ptrdiff_t next = QZ_LANES * from.stride;
        load_two_rows(codes[0], w, w + next, from.outputs, bits);
        load_two_rows(codes[1], w + 2 * next, w + 3 * next, from.outputs, bits);
    } else {
        memcpy(codes, from.pairs + 2 * q, 2 * sizeof *codes);
    }
}

/* The dots of a row of x with 32 outputs: low of the two low digits, high of the top one, which is at most 64, so that
 * twice as many of its products fit. */
QZ_INLINE void sum_row_n(v_i32 low[4], v_i32 high[4], codes_n from, int quads, const int8_t *x, int direct, int bits,
                         int digits) {
    const int pairs = QZ_QUADS_TOGETHER(QZ_DOT_BITS(bits), 128); /* that fit */
    const int fit = pairs > 1 ? pairs / 2 : 1; /* quads, at most QZ_LANES, of which `quads` is a multiple */
    const int top_fit = pairs * fit > 1 ? 2 * fit : 1;
    QZ_UNROLL
    for (int v = 0; v < 4; v++) low[v] = high[v] = set1_i32(0);
    for (int begin = 0; begin < quads; begin += top_fit) {
        sums_n sums;
        clear_sums(sums[2]);
        for (int half = begin; half < begin + top_fit && half < quads; half += fit) {
            clear_sums(sums[0]);
            clear_sums(sums[1]);
            QZ_UNROLL_BY_4
            for (int q = half; q < half + fit; q++) {
                v_u8 codes[2][2];
                load_quad_n(codes, from, q, direct, bits);
                add_pair_n(sums, codes[0], x + 4 * q, bits, digits);
                if (pairs == 1) {
                    widen_pairs(low, sums[0], sums[1]);
                    clear_sums(sums[0]);
                    clear_sums(sums[1]);
                }
                add_pair_n(sums, codes[1], x + 4 * q + 2, bits, digits);
            }
            widen_pairs(low, sums[0], sums[1]);
        }
        if (digits == 3) {
            clear_sums(sums[1]);
            widen_pairs(high, sums[2], sums[1]);
        }
    }
    order_sums(low, QZ_STORED_BITS(bits));
    if (digits == 3) order_sums(high, QZ_STORED_BITS(bits));
}

/* One row of x against a group of outputs, which begins `skipped` vectors after the codes. */
QZ_INLINE void multiply_row_n(float *y, codes_n from, ptrdiff_t skipped, ptrdiff_t outputs, const row_n *row, int quads,
                              int direct, int bits, int digits) {
    const int wide = is_wide(bits, QZ_MAX_BLOCK, digits);
    for (ptrdiff_t n = 0; n < outputs; n += 32) {
        v_i32 low[4], high[4];
        sum_row_n(low, high, from, quads, row->strip, direct, bits, digits);
        from.pairs += QZ_MAX_BLOCK / 2;
        from.w += 32 * QZ_STORED_BITS(bits) / 8;
        from.outputs -= 32;
        QZ_UNROLL
        for (int v = 0; v < 4; v++) {
            if (digits == 3 && !wide) low[v] = add_i32(low[v], shl_i32(high[v], 16));
        }
        QZ_UNROLL
        for (int v = 0; v < 4; v += QZ_TILE_VECTORS) {
            if (v < skipped) continue;
            add_terms_n(y + n + (v - skipped) * QZ_LANES, low + v, high + v, NULL,
                        outputs - n - (v - skipped) * QZ_LANES, row, bits, wide);
        }
    }
}
#endif

/* The block of row m of x, which begins at element `first`; padded with zeros to `copy` if it is shorter. */
QZ_INLINE const float *block_of_row(float copy[QZ_MAX_BLOCK], const qz_matmul_job *job, ptrdiff_t m, ptrdiff_t first,
                                    ptrdiff_t count) {
    const float *from = (const float *)(job->x + m * job->x_stride) + first;
    if (count == QZ_MAX_BLOCK) return from;
    memset(copy, 0, QZ_MAX_BLOCK * sizeof *copy);
    return memcpy(copy, from, (size_t)count * sizeof *from);
}

/* `rows` rows of x from m on, at most QZ_TILE_M, for one group of outputs. */
QZ_INLINE void prepare_tile_n(row_n x[QZ_TILE_M], const qz_matmul_job *job, const group_n *group, ptrdiff_t m,
                              ptrdiff_t rows, ptrdiff_t first, ptrdiff_t count, int bits, int digits) {
    for (ptrdiff_t begin = 0; begin < rows; begin += QZ_ROWS_N) {
        const ptrdiff_t some = rows - begin < QZ_ROWS_N ? rows - begin : QZ_ROWS_N;
        float copies[QZ_ROWS_N][QZ_MAX_BLOCK];
        const float *from[QZ_ROWS_N];
        const group_n *groups[QZ_ROWS_N];
        for (ptrdiff_t r = 0; r < some; r++) {
            from[r] = block_of_row(copies[r], job, m + begin + r, first, count);
            groups[r] = group;
        }
        prepare_rows_n(x + begin, from, groups, some, 0, bits, digits);
    }
}

/* One block of k of the job's weights [first, first + count), for one group of outputs, from `column` on, whose codes
 * stand in the panel at `at`. one: x, if it is one row, which is prepared. */
QZ_INLINE void multiply_block_n(const panel_n *panel, ptrdiff_t at, const group_n *group, const row_n *one,
                                const qz_matmul_job *job, ptrdiff_t first, ptrdiff_t count, ptrdiff_t column, int bits,
                                int digits) {
    const ptrdiff_t outputs = job->group_size, stride = job->w_row_stride;
    const uint8_t *w = job->w + first * stride + column * QZ_STORED_BITS(bits) / 8;
    for (ptrdiff_t m = 0; m < job->m; m += QZ_TILE_M) {
        const ptrdiff_t rows = job->m - m < QZ_TILE_M ? job->m - m : QZ_TILE_M;
        float *y = job->y + m * job->y_stride + column;
        row_n tile[QZ_TILE_M];
        const row_n *x = job->m == 1 ? one : tile;
        if (job->m > 1) prepare_tile_n(tile, job, group, m, rows, first, count, bits, digits);
        for (ptrdiff_t r = 0; r < rows; r++) {
            if (x[r].is_finite) continue;
            const float *from = (const float *)(job->x + (m + r) * job->x_stride) + first;
            add_terms_n_not_finite(y + r * job->y_stride, from, group, w, stride, outputs, count, bits);
        }
        if (rows == 1) {
            multiply_panel_n(y, job->y_stride, panel, at, outputs, x, rows, 1, bits, digits);
        } else {
            multiply_panel_n(y, job->y_stride, panel, at, outputs, x, rows, QZ_TILE_M, bits, digits);
        }
    }
}

/* The same for the groups that a panel holds, which share lines of codes, and small ones vectors. */
QZ_INLINE void multiply_groups_n(panel_n *panel, const group_n *groups, const row_n *one, const qz_matmul_job *job,
                                 ptrdiff_t first, ptrdiff_t count, ptrdiff_t column, ptrdiff_t outputs, int bits,
                                 int digits) {
    const uint8_t *w = job->w + first * job->w_row_stride + column * QZ_STORED_BITS(bits) / 8;
    load_codes_n(panel, w, job->w_row_stride, count, outputs, bits, digits);
    for (ptrdiff_t at = 0; at < outputs; at += job->group_size) {
        multiply_block_n(panel, at, groups++, one++, job, first, count, column + at, bits, digits);
    }
}

/* Row m of x for `some` groups. */
QZ_INLINE void prepare_groups_n(row_n *rows, const group_n *groups, ptrdiff_t some, const qz_matmul_job *job,
                                ptrdiff_t m, ptrdiff_t first, ptrdiff_t count, int few, int bits, int digits) {
    float copy[QZ_MAX_BLOCK];
    const float *x[QZ_ROWS_N];
    const group_n *of[QZ_ROWS_N];
    for (int i = 0; i < QZ_ROWS_N; i++) x[i] = block_of_row(copy, job, m, first, count);
    for (ptrdiff_t begin = 0; begin < some; begin += QZ_ROWS_N) {
        for (int i = 0; i < QZ_ROWS_N; i++) of[i] = groups + begin + i;
        prepare_rows_n(rows + begin, x, of, some - begin < QZ_ROWS_N ? some - begin : QZ_ROWS_N, few, bits, digits);
    }
}

#if QZ_PAIRS
/* multiply_groups_n for few rows of x, which are prepared. `from`: the place of the first group in few->x. direct: one
 * row and a whole block, whose codes need no copy. */
QZ_INLINE void multiply_few_n(few_n *few, ptrdiff_t from, const group_n *groups, const qz_matmul_job *job,
                              ptrdiff_t first, ptrdiff_t count, ptrdiff_t column, ptrdiff_t outputs, int direct,
                              int bits, int digits) {
    const uint8_t *w = job->w + first * job->w_row_stride + column * QZ_STORED_BITS(bits) / 8;
    if (!direct) load_rows_n(few, w, job->w_row_stride, count, outputs, bits);
    for (ptrdiff_t m = 0; m < job->m; m++) {
        for (ptrdiff_t at = 0, i = 0; at < outputs; at += job->group_size, i++) {
            const ptrdiff_t of_32 = at / 32 * 32;
            const codes_n codes = {few->codes[at / 32], w + of_32 * QZ_STORED_BITS(bits) / 8, job->w_row_stride,
                                   outputs - of_32};
            float *y = job->y + m * job->y_stride + column + at;
            const row_n *x = &few->x[m][from + i];
            if (x->is_finite) {
                multiply_row_n(y, codes, (at - of_32) / QZ_LANES, job->group_size, x, quads_of_rows(count), direct,
                               bits, digits);
            } else {
                const float *row = (const float *)(job->x + m * job->x_stride) + first;
                add_terms_n_not_finite(y, row, groups + i, w + at * QZ_STORED_BITS(bits) / 8, job->w_row_stride,
                                       job->group_size, count, bits);
            }
        }
    }
}
#endif

QZ_INLINE void prefetch_line(const char *from, ptrdiff_t bytes) {
    for (ptrdiff_t i = 0; i < bytes; i += 64) prefetch(from + i);
}

/* Lines of weights are far apart, so that hardware does not foresee them: fetches the rows [from, to), row after row as
 * they stand in memory. */
QZ_INLINE void prefetch_rows(const qz_matmul_job *job, ptrdiff_t from, ptrdiff_t to, int bits) {
    const qz_scales *scales = &job->scales;
    const ptrdiff_t groups = job->columns / job->group_size;
    for (ptrdiff_t k = from; k < to; k++) {
        prefetch_line((const char *)job->w + k * job->w_row_stride, job->columns * QZ_STORED_BITS(bits) / 8);
        prefetch_line(scales->scales + k * scales->scale_row_stride, groups * scales->scale_group_stride);
        if (!QZ_HAS_BIAS(bits)) continue;
        prefetch_line(scales->biases + k * scales->bias_row_stride, groups * scales->bias_group_stride);
    }
}

/* What matmul_n works with, between groups of outputs. */
typedef struct block_n {
    panel_n panel;
#if QZ_PAIRS
    few_n few;
#endif
    group_n groups[QZ_GROUPS_N];
    row_n one[QZ_GROUPS_N];
    ptrdiff_t fetched; /* the first row of weights that is still to be fetched */
} block_n;

/* One block of k against the groups [group, group + some), at most QZ_GROUPS_N. */
QZ_INLINE void multiply_run_n(block_n *b, const qz_matmul_job *job, ptrdiff_t first, ptrdiff_t count, ptrdiff_t group,
                              ptrdiff_t some, int bits, int digits) {
    const ptrdiff_t size = job->group_size, together = QZ_MAX_GROUP / size;
    const ptrdiff_t left = job->rows - first - count, ahead = left < QZ_MAX_BLOCK ? left : QZ_MAX_BLOCK;
    load_groups_n(b->groups, &job->scales, group, some, first, count, bits);
    const int few = is_few(job->m, bits);
    if (job->m == 1 && !few) prepare_groups_n(b->one, b->groups, some, job, 0, first, count, 0, bits, digits);
#if QZ_PAIRS
    for (ptrdiff_t m = 0; few && m < job->m; m++) {
        prepare_groups_n(b->few.x[m], b->groups, some, job, m, first, count, 1, bits, digits);
    }
#endif
    for (ptrdiff_t i = 0; i < some; i += together) {
        const ptrdiff_t column = (group + i) * size, outputs = (some - i < together ? some - i : together) * size;
        const ptrdiff_t share = first + count + ahead * (column + outputs) / job->columns;
        prefetch_rows(job, b->fetched, share, bits);
        b->fetched = share;
#if QZ_PAIRS
        if (few) {
            if (job->m == 1 && count == QZ_MAX_BLOCK) {
                multiply_few_n(&b->few, i, b->groups + i, job, first, count, column, outputs, 1, bits, digits);
            } else {
                multiply_few_n(&b->few, i, b->groups + i, job, first, count, column, outputs, 0, bits, digits);
            }
            continue;
        }
#endif
        multiply_groups_n(&b->panel, b->groups + i, b->one + i, job, first, count, column, outputs, bits, digits);
    }
}

QZ_INLINE void matmul_n(const qz_matmul_job *job, int bits, int digits) {
    const ptrdiff_t groups = job->columns / job->group_size;
    block_n b;
    memset(job->y, 0, (size_t)(job->m * job->y_stride) * sizeof *job->y);
    for (ptrdiff_t first = 0; first < job->rows; first += QZ_MAX_BLOCK) {
        const ptrdiff_t count = job->rows - first < QZ_MAX_BLOCK ? job->rows - first : QZ_MAX_BLOCK;
        b.fetched = first + count;
        for (ptrdiff_t group = 0; group < groups; group += QZ_GROUPS_N) {
            const ptrdiff_t some = groups - group < QZ_GROUPS_N ? groups - group : QZ_GROUPS_N;
            multiply_run_n(&b, job, first, count, group, some, bits, digits);
        }
    }
    make_nan_canonical(job->y, job->m * job->y_stride);
}
