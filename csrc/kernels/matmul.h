/* The exact class of matmul on vectors. What a result is, bit for bit, is said by kernels/matmul_definition.h; these
 * kernels do the same float operations in the same order and get the integers from exact dots of digit planes. */

/* ---- y = x Wᵀ: weights [N, K], groups along K ---------------------------------------------------------------------
 */

/* What a tile of weight rows needs for one panel of K: read once, used for every row of x. */
typedef struct panel_t {
    _Alignas(64) uint8_t codes[QZ_TILE_ROWS][QZ_PANEL_BLOCKS * QZ_MAX_BLOCK];
    float scales[QZ_TILE_ROWS][QZ_PANEL_BLOCKS], biases[QZ_TILE_ROWS][QZ_PANEL_BLOCKS]; /* biases: b + c s */
} panel_t;

/* Scales of `blocks` blocks from block `first` on; blocks of one group share theirs. */
QZ_INLINE void load_block_scales(float *to, const char *from, ptrdiff_t stride, qz_type type, ptrdiff_t first,
                                 ptrdiff_t blocks, ptrdiff_t blocks_per_group) {
    float groups[QZ_PANEL_BLOCKS];
    if (blocks_per_group == 1) {
        QZ_NAME(load)(to, from + first * stride, stride, type, blocks);
        return;
    }
    QZ_NAME(load)(groups, from + first / blocks_per_group * stride, stride, type, blocks / blocks_per_group);
    for (ptrdiff_t i = 0; i < blocks; i++) to[i] = groups[i / blocks_per_group];
}

QZ_INLINE void load_panel_t(panel_t *panel, const qz_matmul_job *job, ptrdiff_t first, ptrdiff_t blocks,
                            ptrdiff_t padded, int bits, int block) {
    const qz_scales *from = &job->scales;
    const ptrdiff_t per_group = job->group_size / block;
    const float centre = (float)QZ_CENTRE(bits);
    for (ptrdiff_t r = 0; r < job->rows; r++) {
        float *s = panel->scales[r], *b = panel->biases[r];
        unpack_bits(panel->codes[r], job->w + r * job->w_row_stride + first * block * bits / 8, bits, blocks * block);
        load_block_scales(s, from->scales + r * from->scale_row_stride, from->scale_group_stride, from->scale_type,
                          first, blocks, per_group);
        load_block_scales(b, from->biases + r * from->bias_row_stride, from->bias_group_stride, from->bias_type, first,
                          blocks, per_group);
        for (ptrdiff_t i = 0; i < blocks; i++) b[i] = b[i] + centre * s[i];
        memset(panel->codes[r] + blocks * block, 0, (size_t)((padded - blocks) * block));
        memset(s + blocks, 0, (size_t)(padded - blocks) * sizeof *s);
        memset(b + blocks, 0, (size_t)(padded - blocks) * sizeof *b);
    }
}

/* The integer sums of QZ_LANES blocks, one a lane, for each class of digits: sums[0] of all digits together, or, in
 * wide formats, of the low two, and sums[1] of the top one. A block of n codes makes n / 4 int32 lanes, or one whole
 * vector if it fills more; neighbouring lanes are added until one per block is left. */
QZ_INLINE void dot_blocks(v_i32 sums[2], const uint8_t *codes, const int8_t *digits, int bits, int block, int count) {
    const int wide = is_wide(bits, block, count);
    const int vectors_per_block = block > QZ_VECTOR_BYTES ? block / QZ_VECTOR_BYTES : 1;
    const int lanes_per_block = block / vectors_per_block / 4;
    v_i32 low[16], high[16];
    QZ_UNROLL
    for (int i = 0; i < lanes_per_block; i++) {
        v_i32 sum[QZ_MAX_DIGITS] = {set1_i32(0), set1_i32(0), set1_i32(0)};
        QZ_UNROLL
        for (int j = 0; j < vectors_per_block; j++) {
            const int vector = i * vectors_per_block + j;
            v_u8 code = load_u8(codes + vector * QZ_VECTOR_BYTES);
            QZ_UNROLL
            for (int d = 0; d < count; d++) {
                sum[d] = dot4(sum[d], code, load_u8(digits + (vector * count + d) * QZ_VECTOR_BYTES), bits);
            }
        }
        low[i] = sum[0];
        if (count > 1) low[i] = add_i32(low[i], shl_i32(sum[1], 8));
        if (count > 2 && !wide) low[i] = add_i32(low[i], shl_i32(sum[2], 16));
        high[i] = sum[2];
    }
    QZ_UNROLL
    for (int left = lanes_per_block / 2; left > 0; left /= 2) {
        QZ_UNROLL
        for (int i = 0; i < left; i++) {
            low[i] = add_neighbours(low[2 * i], low[2 * i + 1]);
            if (wide) high[i] = add_neighbours(high[2 * i], high[2 * i + 1]);
        }
    }
    sums[0] = low[0];
    sums[1] = high[0];
}

/* (Gf * s + (b + c s) * S) * 2^e, each operation rounded. */
QZ_INLINE v_f32 block_terms(const v_i32 sums[2], const planes *x, const float *scales, const float *biases, int wide) {
    v_f32 dot = f32_from_i32(sub_i32(sums[0], load_i32(x->offset)));
    if (wide) {
        v_f32 high = f32_from_i32(sub_i32(sums[1], load_i32(x->offset_high)));
        dot = add_f32(mul_f32(high, set1_f32(65536.0f)), dot);
    }
    v_f32 product = mul_f32(dot, load_f32(scales)), shift = mul_f32(load_f32(biases), load_f32(x->sum));
    return mul_f32(add_f32(product, shift), load_f32(x->scale));
}

/* Eight outputs' chains of additions run side by side, to hide the latency of each. */
QZ_INLINE void add_terms_in_order(float *y, float terms[QZ_TILE_ROWS][QZ_PANEL_BLOCKS], ptrdiff_t blocks) {
    float a = y[0], b = y[1], c = y[2], d = y[3], e = y[4], f = y[5], g = y[6], h = y[7];
    for (ptrdiff_t i = 0; i < blocks; i++) {
        a += terms[0][i], b += terms[1][i], c += terms[2][i], d += terms[3][i];
        e += terms[4][i], f += terms[5][i], g += terms[6][i], h += terms[7][i];
    }
    y[0] = a, y[1] = b, y[2] = c, y[3] = d, y[4] = e, y[5] = f, y[6] = g, y[7] = h;
}

QZ_INLINE void matmul_panel_t(const panel_t *panel, const qz_matmul_job *job, ptrdiff_t first, ptrdiff_t blocks,
                              int bits, int block, int digits) {
    float terms[QZ_TILE_ROWS][QZ_PANEL_BLOCKS] = {{0}};
    for (ptrdiff_t m = 0; m < job->m; m++) {
        planes row = planes_at(job->x + m * job->x_stride, job->columns, block, digits);
        for (ptrdiff_t r = 0; r < job->rows; r++) {
            for (ptrdiff_t i = 0; i < blocks; i += QZ_LANES) {
                planes x = {row.digits + (first + i) * block * digits, row.scale + first + i, row.sum + first + i,
                            row.offset + first + i, row.offset_high + first + i};
                v_i32 sums[2];
                dot_blocks(sums, panel->codes[r] + i * block, x.digits, bits, block, digits);
                store_f32(terms[r] + i, block_terms(sums, &x, panel->scales[r] + i, panel->biases[r] + i,
                                                    is_wide(bits, block, digits)));
            }
        }
        add_terms_in_order(job->y + m * QZ_TILE_ROWS, terms, blocks);
    }
}

QZ_INLINE void matmul_t(const qz_matmul_job *job, int bits, int block, int digits) {
    const ptrdiff_t blocks = job->columns / block;
    panel_t panel;
    memset(job->y, 0, (size_t)(job->m * QZ_TILE_ROWS) * sizeof *job->y);
    for (ptrdiff_t first = 0; first < blocks; first += QZ_PANEL_BLOCKS) {
        ptrdiff_t count = blocks - first < QZ_PANEL_BLOCKS ? blocks - first : QZ_PANEL_BLOCKS;
        ptrdiff_t padded = (count + QZ_LANES - 1) / QZ_LANES * QZ_LANES;
        load_panel_t(&panel, job, first, count, padded, bits, block);
        matmul_panel_t(&panel, job, first, count, bits, block, digits);
    }
    make_nan_canonical(job->y, job->m * QZ_TILE_ROWS);
}

/* ---- y = x W: weights [K, N], groups along N ----------------------------------------------------------------------
 */

/* The codes of 64 k for one group of outputs, four k side by side as dot4 takes them, and the group's scales. */
typedef struct panel_n {
    _Alignas(64) uint8_t codes[QZ_MAX_BLOCK / 4][QZ_MAX_GROUP][4];
    float scales[QZ_MAX_BLOCK], biases[QZ_MAX_BLOCK], centred[QZ_MAX_BLOCK]; /* centred: b + c s */
} panel_n;

QZ_INLINE void load_panel_n(panel_n *panel, const qz_matmul_job *job, ptrdiff_t first, ptrdiff_t count, int bits) {
    const qz_scales *from = &job->scales;
    memset(panel->scales, 0, sizeof panel->scales);
    memset(panel->biases, 0, sizeof panel->biases);
    QZ_NAME(load)(panel->scales, from->scales + first * from->scale_row_stride, from->scale_row_stride,
                  from->scale_type, count);
    QZ_NAME(load)(panel->biases, from->biases + first * from->bias_row_stride, from->bias_row_stride, from->bias_type,
                  count);
    for (int i = 0; i < QZ_MAX_BLOCK; i++) {
        panel->centred[i] = panel->biases[i] + (float)QZ_CENTRE(bits) * panel->scales[i];
    }
    for (ptrdiff_t k = 0; k < QZ_MAX_BLOCK; k += 4) {
        uint8_t lines[4][QZ_MAX_GROUP] = {{0}};
        for (ptrdiff_t i = 0; i < 4 && k + i < count; i++) {
            unpack_bits(lines[i], job->w + (first + k + i) * job->w_row_stride, bits, job->columns);
        }
        for (ptrdiff_t n = 0; n < job->columns; n += QZ_VECTOR_BYTES) {
            store_interleaved_4(panel->codes[k / 4][n], load_u8(lines[0] + n), load_u8(lines[1] + n),
                                load_u8(lines[2] + n), load_u8(lines[3] + n));
        }
    }
}

/* One row of x against a panel: t = x s and z = x (b + c s), each put into block fixed point. */
typedef struct row_n {
    int8_t digits[QZ_MAX_DIGITS][QZ_MAX_BLOCK];
    float scale, shift; /* 2^e of t; the sum of z */
    int32_t offset, offset_high;
} row_n;

QZ_INLINE int prepare_row_n(row_n *row, const float x[QZ_MAX_BLOCK], const panel_n *panel, int bits, int digits) {
    const int p = fixed_point_bits(bits, QZ_MAX_BLOCK, digits), wide = is_wide(bits, QZ_MAX_BLOCK, digits);
    float t[QZ_MAX_BLOCK], z[QZ_MAX_BLOCK], z_scale;
    int32_t v[QZ_MAX_BLOCK], u[QZ_MAX_BLOCK], high, sum_u = 0;
    for (int i = 0; i < QZ_MAX_BLOCK; i += QZ_LANES) {
        v_f32 value = load_f32(x + i);
        store_f32(t + i, mul_f32(value, load_f32(panel->scales + i)));
        store_f32(z + i, mul_f32(value, load_f32(panel->centred + i)));
    }
    if (!fixed_point(v, t, QZ_MAX_BLOCK, p, &row->scale) || !fixed_point(u, z, QZ_MAX_BLOCK, 22, &z_scale)) return 0;
    int32_t sum = store_digits(row->digits[0], QZ_MAX_BLOCK, v, QZ_MAX_BLOCK, digits, &high);
    set_offsets(&row->offset, &row->offset_high, sum, high, bits, wide);
    for (int i = 0; i < QZ_MAX_BLOCK; i++) sum_u += u[i];
    row->shift = (float)sum_u * z_scale;
    return 1;
}

QZ_INLINE void add_terms_n(float *y, const row_n *row, const panel_n *panel, ptrdiff_t columns, int bits, int digits) {
    const int wide = is_wide(bits, QZ_MAX_BLOCK, digits);
    for (ptrdiff_t n = 0; n < columns; n += QZ_LANES) {
        v_i32 sum[QZ_MAX_DIGITS] = {set1_i32(0), set1_i32(0), set1_i32(0)};
        for (int k = 0; k < QZ_MAX_BLOCK / 4; k++) {
            v_u8 code = load_u8(panel->codes[k][n]);
            QZ_UNROLL
            for (int d = 0; d < digits; d++) {
                int32_t four;
                memcpy(&four, row->digits[d] + 4 * k, 4);
                sum[d] = dot4(sum[d], code, u8_of_i32(set1_i32(four)), bits);
            }
        }
        v_i32 low = sum[0];
        if (digits > 1) low = add_i32(low, shl_i32(sum[1], 8));
        if (digits > 2 && !wide) low = add_i32(low, shl_i32(sum[2], 16));
        v_f32 dot = f32_from_i32(sub_i32(low, set1_i32(row->offset)));
        if (wide) {
            v_f32 top = f32_from_i32(sub_i32(sum[2], set1_i32(row->offset_high)));
            dot = add_f32(mul_f32(top, set1_f32(65536.0f)), dot);
        }
        v_f32 term = add_f32(mul_f32(dot, set1_f32(row->scale)), set1_f32(row->shift));
        store_f32(y + n, add_f32(load_f32(y + n), term));
    }
}

/* A block in which x s or x (b + c s) is not finite: the plain sum, in order. */
static void add_terms_n_not_finite(float *y, const float *x, const panel_n *panel, ptrdiff_t columns, ptrdiff_t count) {
    for (ptrdiff_t n = 0; n < columns; n++) {
        float term = 0.0f;
        for (ptrdiff_t k = 0; k < count; k++) {
            float weight = panel->scales[k] * (float)panel->codes[k / 4][n][k % 4] + panel->biases[k];
            term += x[k] * weight;
        }
        y[n] += term;
    }
}

QZ_INLINE void matmul_n(const qz_matmul_job *job, int bits, int digits) {
    panel_n panel;
    memset(job->y, 0, (size_t)(job->m * QZ_MAX_GROUP) * sizeof *job->y);
    for (ptrdiff_t first = 0; first < job->rows; first += QZ_MAX_BLOCK) {
        ptrdiff_t count = job->rows - first < QZ_MAX_BLOCK ? job->rows - first : QZ_MAX_BLOCK;
        load_panel_n(&panel, job, first, count, bits);
        for (ptrdiff_t m = 0; m < job->m; m++) {
            float x[QZ_MAX_BLOCK] = {0}, *y = job->y + m * QZ_MAX_GROUP;
            row_n row;
            memcpy(x, (const float *)(job->x + m * job->x_stride) + first, (size_t)count * sizeof *x);
            if (prepare_row_n(&row, x, &panel, bits, digits)) {
                add_terms_n(y, &row, &panel, job->columns, bits, digits);
            } else {
                add_terms_n_not_finite(y, x, &panel, job->columns, count);
            }
        }
    }
    make_nan_canonical(job->y, job->m * QZ_MAX_GROUP);
}
