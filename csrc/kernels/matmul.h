/* The exact class of matmul on vectors. What a result is, bit for bit, is said by kernels/matmul_definition.h; these
 * kernels do the same float operations in the same order and get the integers from exact dots of digit planes. */

/* ---- y = x Wᵀ: weights [N, K], groups along K ---- */

/* The places in a row of weights, and of its scales, where a chunk of QZ_LANES blocks begins. */
typedef struct row_t {
    const uint8_t *w;
    const char *scales, *biases;
} row_t;

/* How far ahead of them stands what is to be fetched meanwhile. */
typedef struct distance {
    ptrdiff_t w, scales, biases;
} distance;

/* A group is one block or two. */
QZ_INLINE int blocks_per_group(const qz_matmul_job *job, int block) { return job->group_size == block ? 1 : 2; }
QZ_INLINE ptrdiff_t group_of(ptrdiff_t block, int per_group) {
    return per_group == 1 ? block : (ptrdiff_t)((size_t)block / 2);
}

/* QZ_LANES blocks' scales; where a group is two blocks, each serves two. */
QZ_INLINE v_f32 load_block_scales(const char *from, qz_type type, int per_group) {
    v_f32 v = type == QZ_F16    ? f32_from_f16((const uint16_t *)from)
              : type == QZ_BF16 ? f32_from_bf16((const uint16_t *)from)
                                : load_f32((const float *)from);
    return per_group == 1 ? v : double_lanes(v);
}

/* Codes of one step, which come packed, or as unpack_chunk left them. */
QZ_INLINE void codes_of_step(v_u8 code[QZ_MAX_UNITS], const uint8_t *from, int is_packed, int bits, int block) {
    const int fold = QZ_FOLD(QZ_STORED_BITS(bits)), units = QZ_UNITS(bits, block);
    QZ_UNROLL
    for (int u = 0; u < units; u += fold) {
        const int place = u * QZ_VECTOR_BYTES;
        if (is_packed) unpack_codes(code + u, from + place * QZ_STORED_BITS(bits) / 8, bits);
        QZ_UNROLL
        for (int f = 0; f < fold && !is_packed; f++) code[u + f] = load_u8(from + place + f * QZ_VECTOR_BYTES);
    }
}

/* The integer sums of `steps` neighbouring steps, in one vector for each class of digits: low of all digits together,
 * or, in wide formats, of the low two, and high of the top one. Where a step holds several blocks, each has some
 * neighbouring lanes. Steps take turns, since each is a chain of dependent instructions. */
QZ_INLINE void dot_steps(v_i32 *low, v_i32 *high, const uint8_t *from, int is_packed, const int8_t *digits, int steps,
                         int bits, int block, int count) {
    const int wide = is_wide(bits, block, count), step = QZ_STEP(bits, block), units = QZ_UNITS(bits, block);
    const int size = is_packed ? step * QZ_STORED_BITS(bits) / 8 : step, top = wide ? 1 : count - 1;
    v_u8 code[QZ_STEPS_ABREAST][QZ_MAX_UNITS];
    QZ_UNROLL
    for (int i = 0; i < steps; i++) {
        codes_of_step(code[i], from + i * size, is_packed, bits, block);
        low[i] = set1_i32(0);
        high[i] = set1_i32(0);
        if (wide) high[i] = dot4_units(high[i], code[i], digits + (3 * i + 2) * step, units, QZ_DOT_BITS(bits), 1);
    }
    QZ_UNROLL
    for (int d = top; d >= 0; d--) {
        const int factor = d == top && d > 0 ? QZ_DOT_FACTOR : 1;
        QZ_UNROLL
        for (int i = 0; i < steps; i++) {
            const int8_t *x = digits + (i * count + d) * step;
            low[i] = dot4_units(low[i], code[i], x, units, QZ_DOT_BITS(bits), factor);
        }
        if (d == 0 || factor != 1) continue;
        QZ_UNROLL
        for (int i = 0; i < steps; i++) low[i] = shl_i32(low[i], 8);
    }
}

#ifdef QZ_NARROW
/* dot_chunk for one digit, where a step is a block. */
QZ_INLINE v_i32 dot_chunk_narrow(const uint8_t *from, int is_packed, const int8_t *digits, int bits, int block) {
    const int size = is_packed ? block * QZ_STORED_BITS(bits) / 8 : block;
    v_i32 sums[QZ_LANES];
    QZ_UNROLL
    for (int i = 0; i < QZ_LANES; i++) {
        v_u8 code[QZ_MAX_UNITS];
        codes_of_step(code, from + i * size, is_packed, bits, block);
        sums[i] = dot_narrow(code, digits + i * block, QZ_UNITS(bits, block));
        QZ_HOLD(sums[i]);
        join_narrow(sums, i + 1);
    }
    return sums[0];
}
#endif

/* Asks for the lines that begin in [from + at, from + at + size). */
QZ_INLINE void prefetch_lines(const uint8_t *from, int at, int size) {
    QZ_UNROLL
    for (int line = (at + 63) / 64 * 64; line < at + size; line += 64) __builtin_prefetch(from + line);
}

/* The integer sums of QZ_LANES blocks, one a lane: sums[0] and, in wide formats, sums[1] are low and high of their
 * steps. nvfp4's come in loose order. ahead: what is to be fetched meanwhile, as many bytes as a chunk has, or NULL;
 * line by line, since requests for all of them at once would stall. */
QZ_INLINE void dot_chunk_ahead(v_i32 sums[2], const uint8_t *from, int is_packed, const int8_t *digits, int bits,
                               int block, int count, const uint8_t *ahead) {
    const int step = QZ_STEP(bits, block), steps = QZ_LANES * block / step,
              size = is_packed ? step * QZ_STORED_BITS(bits) / 8 : step,
              together = steps < QZ_STEPS_ABREAST ? steps : QZ_STEPS_ABREAST;
    v_i32 low[QZ_LANES], high[QZ_LANES];
#ifdef QZ_NARROW
    if (count == 1 && step == block && QZ_NARROW(QZ_DOT_BITS(bits), QZ_UNITS(bits, block))) {
        if (ahead) prefetch_lines(ahead, 0, steps * size);
        sums[0] = dot_chunk_narrow(from, is_packed, digits, bits, block);
        return;
    }
#endif
    QZ_UNROLL
    for (int i = 0; i < steps; i += together) {
        /* Where steps are no whole lines, the last one may end within the next. */
        const int beyond = size % 32 != 0 && i + together == steps ? 64 : 0;
        if (ahead) prefetch_lines(ahead, i * size, together * size + beyond);
        dot_steps(low + i, high + i, from + i * size, is_packed, digits + i * step * count, together, bits, block,
                  count);
        QZ_UNROLL
        for (int j = i; j < i + together; j++) {
            QZ_HOLD(low[j]);
            if (!QZ_IS_NVFP4(bits, block)) join_sums(low, j + 1, steps);
            if (is_wide(bits, block, count)) join_sums(high, j + 1, steps);
        }
    }
    sums[0] = QZ_IS_NVFP4(bits, block) ? sum_pairs_loosely(low) : low[0];
    if (is_wide(bits, block, count)) sums[1] = high[0];
}
QZ_INLINE void dot_chunk(v_i32 sums[2], const uint8_t *from, int is_packed, const int8_t *digits, int bits, int block,
                         int count) {
    dot_chunk_ahead(sums, from, is_packed, digits, bits, block, count, NULL);
}

#ifdef QZ_ROWS_BESIDE
/* Where a step is of four vectors, two rows share the loads of x, of which a core does fewer a cycle than dots. The
 * sums of each digit are chains of their own then, short enough for the next steps to be begun meanwhile. */
QZ_INLINE int are_beside(int bits, int block) { return QZ_UNITS(bits, block) == QZ_MAX_UNITS; }

/* The sums of a step of packed codes of all the rows, in formats that are not wide. */
QZ_INLINE void dot_step_beside(v_i32 sums[QZ_ROWS_BESIDE], const uint8_t *const from[QZ_ROWS_BESIDE],
                               const int8_t *digits, int bits, int block, int count) {
    const int step = QZ_STEP(bits, block), units = QZ_UNITS(bits, block);
    v_u8 code[QZ_ROWS_BESIDE][QZ_MAX_UNITS];
    v_i32 sum[QZ_ROWS_BESIDE][QZ_MAX_DIGITS];
    QZ_UNROLL
    for (int r = 0; r < QZ_ROWS_BESIDE; r++) {
        codes_of_step(code[r], from[r], 1, bits, block);
        QZ_UNROLL
        for (int d = 0; d < count; d++) sum[r][d] = set1_i32(0);
    }
    QZ_UNROLL
    for (int i = 0; i < units * count; i++) {
        const int u = i / count, d = count - 1 - i % count;
        v_u8 x = load_u8(digits + d * step + u * QZ_VECTOR_BYTES);
        QZ_HOLD(x);
        QZ_UNROLL
        for (int r = 0; r < QZ_ROWS_BESIDE; r++) sum[r][d] = dot4(sum[r][d], code[r][u], x, QZ_DOT_BITS(bits));
    }
    QZ_UNROLL
    for (int r = 0; r < QZ_ROWS_BESIDE; r++) {
        sums[r] = sum[r][count - 1];
        QZ_UNROLL
        for (int d = count - 2; d >= 0; d--) sums[r] = add_i32(shl_i32(sums[r], 8), sum[r][d]);
    }
}

/* dot_chunk_ahead of the packed codes of all the rows; ahead: the distance of what is fetched meanwhile. */
QZ_INLINE void dot_chunk_beside(v_i32 sums[QZ_ROWS_BESIDE], const row_t *rows, const int8_t *digits, int bits,
                                int block, int count, ptrdiff_t ahead) {
    const int step = QZ_STEP(bits, block), steps = QZ_LANES * block / step, size = step * QZ_STORED_BITS(bits) / 8;
    v_i32 of_steps[QZ_ROWS_BESIDE][QZ_LANES];
    QZ_UNROLL
    for (int i = 0; i < steps; i++) {
        const uint8_t *from[QZ_ROWS_BESIDE];
        v_i32 of_rows[QZ_ROWS_BESIDE];
        QZ_UNROLL
        for (int r = 0; r < QZ_ROWS_BESIDE; r++) {
            from[r] = rows[r].w + i * size;
            prefetch_lines(rows[r].w + ahead, i * size, size);
        }
        dot_step_beside(of_rows, from, digits + i * step * count, bits, block, count);
        QZ_UNROLL
        for (int r = 0; r < QZ_ROWS_BESIDE; r++) {
            of_steps[r][i] = of_rows[r];
            join_sums(of_steps[r], i + 1, steps);
        }
    }
    QZ_UNROLL
    for (int r = 0; r < QZ_ROWS_BESIDE; r++) sums[r] = of_steps[r][0];
}
#endif

/* float(G) from the dots of stored codes and by what they exceed those of centred ones. In wide formats low is of the
 * two low digits and *high of the top one. */
QZ_INLINE v_f32 float_of_dots(v_i32 low, const v_i32 *high, v_i32 offset, v_i32 offset_high, int wide) {
    const v_f32 dot = f32_from_i32(sub_i32(low, offset));
    if (!wide) return dot;
    return add_f32(mul_f32(f32_from_i32(sub_i32(*high, offset_high)), set1_f32(65536.0f)), dot);
}

/* What block_terms needs of x: QZ_LANES blocks, or one for all lanes. */
typedef struct x_numbers {
    v_f32 scale, sum;
    v_i32 offset, offset_high;
} x_numbers;

QZ_INLINE x_numbers numbers_of_chunk(const planes *x, ptrdiff_t at) {
    const chunk_numbers *numbers = numbers_at(x, at);
    return (x_numbers){load_f32(numbers->scale), load_f32(numbers->sum), load_i32(numbers->offset),
                       load_i32(numbers->offset_high)};
}
QZ_INLINE x_numbers numbers_of_block(const planes *x, ptrdiff_t at) {
    const chunk_numbers *numbers = numbers_at(x, at);
    const int lane = lane_of(at);
    return (x_numbers){set1_f32(numbers->scale[lane]), set1_f32(numbers->sum[lane]), set1_i32(numbers->offset[lane]),
                       set1_i32(numbers->offset_high[lane])};
}

/* (Gf * s + (b + c s) * S) * 2^e, each operation rounded. */
QZ_INLINE v_f32 block_terms(const v_i32 sums[2], x_numbers x, v_f32 scales, v_f32 centred, int wide) {
    const v_f32 dots = float_of_dots(sums[0], sums + 1, x.offset, x.offset_high, wide);
    return mul_f32(add_f32(mul_f32(dots, scales), mul_f32(centred, x.sum)), x.scale);
}

QZ_INLINE void unpack_chunk(uint8_t *codes, const uint8_t *packed, int bits, int block) {
    const int fold = QZ_FOLD(QZ_STORED_BITS(bits)), run = fold * QZ_VECTOR_BYTES;
    for (int i = 0; i < QZ_LANES * block; i += run) {
        v_u8 code[4];
        unpack_codes(code, packed + i * QZ_STORED_BITS(bits) / 8, bits);
        QZ_UNROLL
        for (int f = 0; f < fold; f++) store_u8(codes + i + f * QZ_VECTOR_BYTES, code[f]);
    }
}

/* The scales of a chunk, and b + c s; what is to come is asked for. */
typedef struct scale_pair {
    v_f32 scales, centred;
} scale_pair;

QZ_INLINE scale_pair scales_of_chunk(const row_t *row, const qz_type types[2], const distance *ahead, int bits,
                                     int per_group) {
    __builtin_prefetch(row->scales + ahead->scales);
    __builtin_prefetch(row->biases + ahead->biases);
    const v_f32 s = load_block_scales(row->scales, types[0], per_group);
    const v_f32 b = load_block_scales(row->biases, types[1], per_group);
    return (scale_pair){s, add_f32(b, mul_f32(set1_f32((float)QZ_CENTRE(bits)), s))};
}

/* The terms of one chunk of a weight row, for all rows of x: a chunk is unpacked once. single: there is one row. */
QZ_INLINE void chunk_terms(float *terms, ptrdiff_t pitch, const qz_matmul_job *job, const row_t *row,
                           const qz_type types[2], const distance *ahead, ptrdiff_t first, int single, int bits,
                           int block, int per_group, int digits) {
    const int wide = is_wide(bits, block, digits);
    const scale_pair of_row = scales_of_chunk(row, types, ahead, bits, per_group);
    v_i32 sums[2];
    if (single) {
        planes x = planes_at(job->x, job->columns, block, digits);
        dot_chunk_ahead(sums, row->w, 1, x.digits + first * block * digits, bits, block, digits, row->w + ahead->w);
        store_f32(terms, block_terms(sums, numbers_of_chunk(&x, first), of_row.scales, of_row.centred, wide));
        return;
    }
    _Alignas(64) uint8_t codes[QZ_LANES * QZ_MAX_BLOCK];
    prefetch_lines(row->w + ahead->w, 0, QZ_LANES * block * QZ_STORED_BITS(bits) / 8);
    unpack_chunk(codes, row->w, bits, block);
    for (ptrdiff_t m = 0; m < job->m; m++) {
        planes x = planes_at(job->x + m * job->x_stride, job->columns, block, digits);
        dot_chunk(sums, codes, 0, x.digits + first * block * digits, bits, block, digits);
        const v_f32 term = block_terms(sums, numbers_of_chunk(&x, first), of_row.scales, of_row.centred, wide);
        store_f32(terms + m * pitch, term);
    }
}

/* Where scales of a chunk are no neighbours, or reading a whole vector of them would pass their end. */
QZ_INLINE void copy_scales(float numbers[2][QZ_LANES], row_t *row, const qz_scales *from, ptrdiff_t groups) {
    memset(numbers, 0, 2 * sizeof *numbers);
    QZ_NAME(load)(numbers[0], row->scales, from->scale_group_stride, from->scale_type, groups);
    QZ_NAME(load)(numbers[1], row->biases, from->bias_group_stride, from->bias_type, groups);
    row->scales = (const char *)numbers[0];
    row->biases = (const char *)numbers[1];
}

QZ_INLINE int are_neighbours(ptrdiff_t stride, qz_type type) {
    return type == QZ_F32 ? stride == 4 : (type == QZ_F16 || type == QZ_BF16) && stride == 2;
}

/* Terms wait here for their addition in order: of all rows of the tile, for as many blocks as fit. */
enum { QZ_TERMS = QZ_DECODE_ROWS * QZ_LANES * QZ_TILE_ROWS };

/* Bytes of digits of x that stay in the first cache while rows of weights pass by, 32 KiB or more of it. Where there
 * are more, a job's rows are walked in panels of k, small ones: what is fetched ahead then comes from many rows, often
 * at strides that share few of the cache's lines. */
enum { QZ_MOST_DIGITS = 24576, QZ_PANEL_DIGITS = 4096 };

/* Blocks of a panel, whole chunks, of panels as alike as can be: for job->m rows of x, of which `blocks` are in whole
 * chunks. */
QZ_INLINE ptrdiff_t panel_of(const qz_matmul_job *job, ptrdiff_t blocks, int block, int digits) {
    const ptrdiff_t fit = QZ_DECODE_ROWS / job->m * QZ_LANES, bytes = blocks * block * digits * job->m;
    const ptrdiff_t panels = bytes > QZ_MOST_DIGITS ? (bytes - 1) / QZ_PANEL_DIGITS + 1 : 1;
    const ptrdiff_t alike = (blocks / QZ_LANES - 1) / panels * QZ_LANES + QZ_LANES;
    return alike < fit ? alike : fit;
}

/* The last block from which on a vector of scales can be read in place; -1: there is none. */
QZ_INLINE ptrdiff_t last_in_place(const qz_matmul_job *job, int block, int per_group) {
    const qz_scales *from = &job->scales;
    const int neighbours = are_neighbours(from->scale_group_stride, from->scale_type) &&
                           are_neighbours(from->bias_group_stride, from->bias_type);
    return neighbours ? job->columns / block - QZ_LANES * per_group : -1;
}

QZ_INLINE row_t row_of(const qz_matmul_job *job, ptrdiff_t r, ptrdiff_t begin, int bits, int block, int per_group) {
    const qz_scales *from = &job->scales;
    const ptrdiff_t first = group_of(begin, per_group);
    return (row_t){job->w + r * job->w_row_stride + begin * block * QZ_STORED_BITS(bits) / 8,
                   from->scales + r * from->scale_row_stride + first * from->scale_group_stride,
                   from->biases + r * from->bias_row_stride + first * from->bias_group_stride};
}

/* To the next chunk; strides are those of the scales and of the biases. */
QZ_INLINE void move_on(row_t *row, ptrdiff_t scale_stride, ptrdiff_t bias_stride, int bits, int block, int per_group) {
    const ptrdiff_t groups = group_of(QZ_LANES, per_group);
    row->w += QZ_LANES * block * QZ_STORED_BITS(bits) / 8;
    row->scales += groups * scale_stride;
    row->biases += groups * bias_stride;
}

/* Blocks [begin, end) of a job's rows, QZ_TILE_ROWS at a time. */
typedef struct panel {
    ptrdiff_t begin, end, blocks; /* blocks: of a row, those in whole chunks */
    ptrdiff_t row, end_row;
    float *terms; /* of these rows */
    ptrdiff_t pitch;
    ptrdiff_t last;  /* the scales of chunks after this block are copied */
    ptrdiff_t ahead; /* rows of the panel that are QZ_PREFETCH bytes */
} panel;

QZ_INLINE ptrdiff_t rows_ahead(const qz_matmul_job *job, const panel *p, int bits, int block) {
    const ptrdiff_t size = (p->end - p->begin) * block * QZ_STORED_BITS(bits) / 8;
    const ptrdiff_t rows = (QZ_PREFETCH - 1) / size + 1;
    return p->end - p->begin < p->blocks && rows > job->rows ? job->rows : rows;
}

/* From row r to what is walked so many rows later: the rows after the panel's last are those of the next panel, and
 * after the last panel, probably, those of the next job. */
QZ_INLINE distance distance_ahead(const qz_matmul_job *job, const panel *p, ptrdiff_t r, int bits, int block,
                                  int per_group) {
    const qz_scales *from = &job->scales;
    ptrdiff_t rows = p->ahead, at = p->begin;
    if (r + rows >= job->rows) {
        at = p->end < p->blocks ? p->end : 0;
        rows -= p->end < p->blocks ? job->rows : 0;
    }
    const ptrdiff_t groups = group_of(at, per_group) - group_of(p->begin, per_group);
    return (distance){rows * job->w_row_stride + (at - p->begin) * block * QZ_STORED_BITS(bits) / 8,
                      rows * from->scale_row_stride + groups * from->scale_group_stride,
                      rows * from->bias_row_stride + groups * from->bias_group_stride};
}

/* Rows of a panel, from its block `begin` on. */
QZ_INLINE void panel_terms(const qz_matmul_job *job, const panel *p, ptrdiff_t begin, int single, int bits, int block,
                           int per_group, int digits) {
    const qz_scales *from = &job->scales;
    for (ptrdiff_t r = p->row; r < p->end_row; r++) {
        const distance ahead = distance_ahead(job, p, r, bits, block, per_group);
        float *const terms = p->terms + (r - p->row) * p->pitch;
        row_t next = row_of(job, r, begin, bits, block, per_group);
        for (ptrdiff_t i = begin; i < p->end; i += QZ_LANES) {
            row_t row = next;
            distance fetched = ahead;
            float numbers[2][QZ_LANES];
            qz_type types[2] = {from->scale_type, from->bias_type};
            move_on(&next, from->scale_group_stride, from->bias_group_stride, bits, block, per_group);
            if (i > p->last) {
                copy_scales(numbers, &row, from, group_of(QZ_LANES, per_group));
                types[0] = types[1] = QZ_F32;
                fetched.scales = fetched.biases = 0;
            }
            chunk_terms(terms + (i - p->begin), p->pitch * QZ_TILE_ROWS, job, &row, types, &fetched, i, single, bits,
                        block, per_group, digits);
        }
    }
}

#ifdef QZ_ROWS_BESIDE
/* typed_terms of rows side by side. Where they are odd in number, the last one is taken twice: its second terms are
 * those of a row that is not there. */
QZ_INLINE void typed_terms_beside(const qz_matmul_job *job, const panel *p, ptrdiff_t end, qz_type type, int bits,
                                  int block, int per_group, int digits) {
    const planes x = planes_at(job->x, job->columns, block, digits);
    const ptrdiff_t size = type == QZ_F32 ? 4 : 2;
    for (ptrdiff_t r = p->row; r < p->end_row; r += QZ_ROWS_BESIDE) {
        const distance ahead = distance_ahead(job, p, r, bits, block, per_group);
        float *const terms = p->terms + (r - p->row) * p->pitch;
        row_t rows[QZ_ROWS_BESIDE];
        QZ_UNROLL
        for (int i = 0; i < QZ_ROWS_BESIDE; i++)
            rows[i] = row_of(job, r + i < p->end_row ? r + i : r, p->begin, bits, block, per_group);
        for (ptrdiff_t at = p->begin; at < end; at += QZ_LANES) {
            v_i32 sums[QZ_ROWS_BESIDE];
            QZ_ASSUME(at % QZ_LANES == 0);
            dot_chunk_beside(sums, rows, x.digits + at * block * digits, bits, block, digits, ahead.w);
            QZ_UNROLL
            for (int i = 0; i < QZ_ROWS_BESIDE; i++) {
                const qz_type types[2] = {type, type};
                const scale_pair pair = scales_of_chunk(rows + i, types, &ahead, bits, per_group);
                const v_f32 term = block_terms(sums + i, numbers_of_chunk(&x, at), pair.scales, pair.centred, 0);
                store_f32(terms + i * p->pitch + (at - p->begin), term);
                move_on(rows + i, size, size, bits, block, per_group);
            }
        }
    }
}
#endif

/* Chunks before block `end` whose scales and biases are of one type and read in place, for one row of x. */
QZ_INLINE void typed_terms(const qz_matmul_job *job, const panel *p, ptrdiff_t end, qz_type type, int bits, int block,
                           int per_group, int digits) {
    const qz_type types[2] = {type, type};
    const ptrdiff_t size = type == QZ_F32 ? 4 : 2;
#ifdef QZ_ROWS_BESIDE
    if (are_beside(bits, block)) {
        typed_terms_beside(job, p, end, type, bits, block, per_group, digits);
        return;
    }
#endif
    for (ptrdiff_t r = p->row; r < p->end_row; r++) {
        const distance ahead = distance_ahead(job, p, r, bits, block, per_group);
        float *const terms = p->terms + (r - p->row) * p->pitch;
        row_t row = row_of(job, r, p->begin, bits, block, per_group);
        for (ptrdiff_t i = p->begin; i < end; i += QZ_LANES) {
            QZ_ASSUME(i % QZ_LANES == 0);
            chunk_terms(terms + (i - p->begin), 0, job, &row, types, &ahead, i, 1, bits, block, per_group, digits);
            move_on(&row, size, size, bits, block, per_group);
        }
    }
}

/* panel_terms for one row of x: a loop for each type of scales, since asking for it at every chunk takes as long as a
 * tenth of the dots. */
QZ_INLINE void panel_of_one(const qz_matmul_job *job, const panel *p, int bits, int block, int per_group, int digits) {
    const qz_type type = job->scales.scale_type;
    ptrdiff_t stop = p->begin;
    if (p->last >= stop && type == job->scales.bias_type) stop += (p->last - stop) / QZ_LANES * QZ_LANES + QZ_LANES;
    if (stop > p->end) stop = p->end;
    if (type == QZ_BF16) {
        typed_terms(job, p, stop, QZ_BF16, bits, block, per_group, digits);
    } else if (type == QZ_F16) {
        typed_terms(job, p, stop, QZ_F16, bits, block, per_group, digits);
    } else {
        typed_terms(job, p, stop, QZ_F32, bits, block, per_group, digits);
    }
    if (stop == p->end) return;
    panel rest = *p;
    rest.last = -1;
    panel_terms(job, &rest, stop, 1, bits, block, per_group, digits);
}

/* Lanes become weight rows, so that the terms of many outputs are added side by side, each in order of k. */
QZ_INLINE void add_terms_in_order(float *y, const float *terms, ptrdiff_t pitch, ptrdiff_t count) {
    QZ_UNROLL
    for (int r = 0; r < QZ_TILE_ROWS; r += QZ_LANES) {
        v_f32 sum = load_f32(y + r);
        for (ptrdiff_t i = 0; i < count; i += QZ_LANES) {
            v_f32 rows[QZ_LANES];
            QZ_UNROLL
            for (int j = 0; j < QZ_LANES; j++) rows[j] = load_f32(terms + (r + j) * pitch + i);
            transpose_f32(rows);
            QZ_UNROLL
            for (int j = 0; j < QZ_LANES; j++) sum = add_f32(sum, rows[j]);
        }
        store_f32(y + r, sum);
    }
}

/* The step of a weight row at block `at`. Where the row has less, digits are zero, and what stands there does not
 * matter: the next row, if it follows without a gap; else a copy padded with zeros. */
QZ_INLINE const uint8_t *step_of_row(uint8_t *copy, const qz_matmul_job *job, ptrdiff_t r, ptrdiff_t at, int bits,
                                     int block) {
    const ptrdiff_t row = r < job->rows ? r : job->rows - 1, left = job->columns - at * block;
    const uint8_t *from = job->w + row * job->w_row_stride + at * block * QZ_STORED_BITS(bits) / 8;
    const ptrdiff_t lacking = (QZ_STEP(bits, block) - left) * QZ_STORED_BITS(bits) / 8;
    const int has_next = row + 1 < job->rows && job->w_row_stride <= job->columns * QZ_STORED_BITS(bits) / 8;
    if (lacking <= 0 || (has_next && lacking <= job->w_row_stride)) return from;
    memset(copy, 0, QZ_MAX_UNITS * QZ_VECTOR_BYTES);
    memcpy(copy, from, (size_t)(left * QZ_STORED_BITS(bits) / 8));
    return copy;
}

/* Scales or biases of one group for all rows of the tile, zero beyond. */
QZ_INLINE void load_of_rows(float to[QZ_TILE_ROWS], const char *from, ptrdiff_t stride, qz_type type, ptrdiff_t rows) {
    QZ_NAME(load)(to, from, stride, type, rows);
    for (ptrdiff_t r = rows; r < QZ_TILE_ROWS; r++) to[r] = 0.0f;
}

/* The terms of block `at`, whose sums stand at dots[0] and dots[1]: lanes are weight rows. */
QZ_INLINE void add_block_of_rows(float *y, int32_t (*const dots)[QZ_TILE_ROWS], const qz_matmul_job *job,
                                 const planes *x, ptrdiff_t at, int bits, int per_group, int wide) {
    const qz_scales *from = &job->scales;
    const ptrdiff_t group = group_of(at, per_group);
    float scales[QZ_TILE_ROWS], biases[QZ_TILE_ROWS];
    load_of_rows(scales, from->scales + group * from->scale_group_stride, from->scale_row_stride, from->scale_type,
                 job->rows);
    load_of_rows(biases, from->biases + group * from->bias_group_stride, from->bias_row_stride, from->bias_type,
                 job->rows);
    QZ_UNROLL
    for (int r = 0; r < QZ_TILE_ROWS; r += QZ_LANES) {
        const v_i32 sums[2] = {load_i32(dots[0] + r), load_i32(dots[1] + r)};
        const v_f32 s = load_f32(scales + r), b = load_f32(biases + r);
        const v_f32 centred = add_f32(b, mul_f32(set1_f32((float)QZ_CENTRE(bits)), s));
        const v_f32 term = block_terms(sums, numbers_of_block(x, at), s, centred, wide);
        store_f32(y + r, add_f32(load_f32(y + r), term));
    }
}

/* Sums of `blocks` neighbouring blocks of some rows from r on, row after row, each to its block's. */
QZ_INLINE void store_block_sums(int32_t (*dots)[2][QZ_TILE_ROWS], int which, ptrdiff_t r, v_i32 sums, int blocks) {
    int32_t each[QZ_LANES];
    if (blocks == 1) {
        store_i32(dots[0][which] + r, sums);
        return;
    }
    store_i32(each, sums);
    for (int i = 0; i < QZ_LANES; i++) dots[i % blocks][which][r + i / blocks] = each[i];
}

/* The last blocks of the rows, from `first` on, fewer than fill a chunk: all blocks of short rows. Those of the tile
 * that follows are asked for, since steps of many rows are too far apart for processors to foresee. */
QZ_INLINE void add_last_blocks(float *y, const qz_matmul_job *job, const planes *x, ptrdiff_t first, int bits,
                               int block, int per_group, int digits) {
    const int step = QZ_STEP(bits, block), rows = QZ_LANES * block / step, blocks = step / block;
    const int wide = is_wide(bits, block, digits), block_bytes = block * QZ_STORED_BITS(bits) / 8;
    for (ptrdiff_t at = first; at < job->columns / block; at += blocks) {
        int32_t dots[QZ_LANES][2][QZ_TILE_ROWS];
        if (job->rows <= QZ_TILE_ROWS - rows) memset(dots, 0, (size_t)blocks * sizeof *dots);
        for (ptrdiff_t r = 0; r < job->rows; r += rows) {
            v_i32 low[QZ_LANES], high[QZ_LANES];
            for (int j = 0; j < rows; j++) {
                _Alignas(64) uint8_t copy[QZ_MAX_UNITS * QZ_VECTOR_BYTES];
                const uint8_t *from = step_of_row(copy, job, r + j, at, bits, block);
                prefetch_lines(job->w + (r + j + QZ_TILE_ROWS) * job->w_row_stride + at * block_bytes, 0,
                               blocks * block_bytes);
                dot_steps(&low[j], &high[j], from, 1, x->digits + at * block * digits, 1, bits, block, digits);
            }
            store_block_sums(dots, 0, r, sum_blocks(low, rows), blocks);
            if (wide) store_block_sums(dots, 1, r, sum_blocks(high, rows), blocks);
        }
        for (int i = 0; i < blocks && at + i < job->columns / block; i++) {
            add_block_of_rows(y, dots[i], job, x, at + i, bits, per_group, wide);
        }
    }
}

/* QZ_TILE_ROWS outputs of a job, from weight row r on. */
QZ_INLINE qz_matmul_job tile_of_job(const qz_matmul_job *job, ptrdiff_t r) {
    qz_matmul_job tile = *job;
    tile.w += r * job->w_row_stride;
    tile.scales.scales += r * job->scales.scale_row_stride;
    tile.scales.biases += r * job->scales.bias_row_stride;
    tile.rows = job->rows - r < QZ_TILE_ROWS ? job->rows - r : QZ_TILE_ROWS;
    tile.y += r;
    return tile;
}

QZ_INLINE void clear_tile(const qz_matmul_job *tile) {
    for (ptrdiff_t m = 0; m < tile->m; m++) memset(tile->y + m * tile->y_stride, 0, QZ_TILE_ROWS * sizeof *tile->y);
}
QZ_INLINE void make_tile_canonical(const qz_matmul_job *tile) {
    for (ptrdiff_t m = 0; m < tile->m; m++) make_nan_canonical(tile->y + m * tile->y_stride, QZ_TILE_ROWS);
}

QZ_INLINE void add_panel(const qz_matmul_job *job, const panel *p, int bits, int block, int per_group, int digits) {
    /* Two calls, since compilers would do what both share before they ask which, and keep the codes in memory. */
    if (job->m == 1) {
        panel_of_one(job, p, bits, block, per_group, digits);
    } else {
        panel_terms(job, p, p->begin, 0, bits, block, per_group, digits);
    }
    for (ptrdiff_t m = 0; m < job->m; m++) {
        float *const y = job->y + m * job->y_stride + p->row;
        add_terms_in_order(y, p->terms + m * p->pitch * QZ_TILE_ROWS, p->pitch, p->end - p->begin);
    }
}

QZ_INLINE void decode_rows(const qz_matmul_job *call, int bits, int block, int digits) {
    const qz_matmul_job job = *call; /* which no store changes, as compilers see: 8 % where M is 1 */
    const int per_group = block < QZ_MAX_BLOCK ? 1 : blocks_per_group(&job, block);
    const ptrdiff_t blocks = job.columns / block / QZ_LANES * QZ_LANES;
    _Alignas(64) float terms[QZ_TERMS];
    panel p = {.blocks = blocks, .terms = terms, .last = last_in_place(&job, block, per_group)};
    p.pitch = panel_of(&job, blocks, block, digits);
    for (ptrdiff_t r = 0; r < job.rows; r += QZ_TILE_ROWS) {
        const qz_matmul_job tile = tile_of_job(&job, r);
        clear_tile(&tile);
    }
    if (job.rows % QZ_TILE_ROWS != 0 && blocks > 0) memset(terms, 0, sizeof terms);
    for (; p.begin < blocks; p.begin = p.end) {
        p.end = blocks - p.begin < p.pitch ? blocks : p.begin + p.pitch;
        p.ahead = rows_ahead(&job, &p, bits, block);
        for (p.row = 0; p.row < job.rows; p.row = p.end_row) {
            p.end_row = job.rows - p.row < QZ_TILE_ROWS ? job.rows : p.row + QZ_TILE_ROWS;
            add_panel(&job, &p, bits, block, per_group, digits);
        }
    }
    for (ptrdiff_t r = 0; r < job.rows; r += QZ_TILE_ROWS) {
        const qz_matmul_job tile = tile_of_job(&job, r);
        for (ptrdiff_t m = 0; m < job.m && blocks < job.columns / block; m++) {
            planes x = planes_at(job.x + m * job.x_stride, job.columns, block, digits);
            add_last_blocks(tile.y + m * job.y_stride, &tile, &x, blocks, bits, block, per_group, digits);
        }
        make_tile_canonical(&tile);
    }
}
