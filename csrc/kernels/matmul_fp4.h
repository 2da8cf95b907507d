/* y = x Wᵀ of FP4 weights on vectors: what a result is, bit for bit, is said by matmul_definition_fp.h. Dots, codes and
 * x in digit planes are those of matmul.h and prefill.h, and so is the rest of mxfp4 where rows of x are many. */

/* Rows of weights whose dots with one row of x share the loads of its digits. A header with registers enough has two
 * of them. */
#ifndef QZ_ROWS_BESIDE
#define QZ_ROWS_BESIDE 1
#endif

/* By how many bytes to reach what is to be asked for, from weights of row r of a tile that is read panel of k after
 * panel, and in each row after row: codes QZ_AHEAD bytes on, in rows that follow, or in the next panel or tile. */
enum { QZ_AHEAD = 12288 };
typedef struct ahead_t {
    ptrdiff_t codes, scales;
} ahead_t;

QZ_INLINE ahead_t find_ahead(const qz_matmul_job *job, ptrdiff_t r, ptrdiff_t first, ptrdiff_t count, int bits,
                             int group) {
    const qz_scales *from = &job->scales;
    const int is_last = first + count >= job->columns;
    ptrdiff_t rows = QZ_AHEAD * 8 / (bits * count), k = 0;
    if (!is_last && rows > job->rows) rows = job->rows;
    if (r + rows >= job->rows) {
        k = is_last ? -first : count;
        rows -= is_last ? 0 : job->rows;
    }
    return (ahead_t){rows * job->w_row_stride + k * bits / 8,
                     rows * from->scale_row_stride + k / group * from->scale_group_stride};
}

QZ_INLINE void prefetch_fp4(const uint8_t *codes, ptrdiff_t size) {
    for (ptrdiff_t i = 0; i < size; i += 64) __builtin_prefetch(codes + i);
}

/* Packed codes of a chunk; where the row has only `blocks` more, a copy padded with zeros. */
QZ_INLINE const uint8_t *chunk_fp4(uint8_t *copy, const uint8_t *codes, ptrdiff_t blocks, int block) {
    if (blocks >= QZ_LANES) return codes;
    memset(copy, 0, (size_t)(QZ_LANES * (block / 2)));
    memcpy(copy, codes, (size_t)(blocks * (block / 2)));
    return copy;
}

/* Some blocks of neighbouring rows of weights, from row r of the job on: as many as take part in a dot side by side,
 * the last standing in for those beyond. */
typedef struct rows_beside {
    const uint8_t *codes[QZ_ROWS_BESIDE];
    const char *scales[QZ_ROWS_BESIDE];
    ahead_t ahead;
} rows_beside;

QZ_INLINE rows_beside rows_from(const qz_matmul_job *job, ptrdiff_t r, ptrdiff_t begin, ptrdiff_t end, int block) {
    const qz_scales *from = &job->scales;
    rows_beside rows = {.ahead = find_ahead(job, r, begin * block, (end - begin) * block, 4, block)};
    QZ_UNROLL
    for (int i = 0; i < QZ_ROWS_BESIDE; i++) {
        const ptrdiff_t row = r + i < job->rows ? r + i : job->rows - 1;
        rows.codes[i] = job->w + row * job->w_row_stride + begin * (block / 2);
        rows.scales[i] = from->scales + row * from->scale_row_stride + begin * from->scale_group_stride;
    }
    return rows;
}

/* dot_chunk of the packed codes of all of them, `at` bytes further. Rows and steps alternate, so that no dot waits for
 * the one before it. */
QZ_INLINE void dot_chunk_of_rows(v_i32 dots[QZ_ROWS_BESIDE], const rows_beside *rows, ptrdiff_t at,
                                 const int8_t *digits, int block, int count) {
#if QZ_ROWS_BESIDE == 1
    v_i32 sums[2];
    dot_chunk(sums, rows->codes[0] + at, 1, digits, QZ_FP4, block, count);
    dots[0] = sums[0];
#else
    const int step = QZ_STEP(QZ_FP4, block), steps = QZ_LANES * block / step, units = QZ_UNITS(QZ_FP4, block);
    v_u8 codes[QZ_LANES][QZ_ROWS_BESIDE][QZ_MAX_UNITS];
    v_i32 sums[QZ_ROWS_BESIDE][QZ_LANES];
    QZ_UNROLL
    for (int i = 0; i < steps; i++) {
        QZ_UNROLL
        for (int r = 0; r < QZ_ROWS_BESIDE; r++) {
            codes_of_step(codes[i][r], rows->codes[r] + at + i * step / 2, 1, QZ_FP4, block);
            sums[r][i] = set1_i32(0);
        }
    }
    QZ_UNROLL
    for (int d = count - 1; d >= 0; d--) {
        QZ_UNROLL
        for (int u = 0; u < units; u++) {
            QZ_UNROLL
            for (int i = 0; i < steps; i++) {
                v_u8 x = load_u8(digits + (i * count + d) * step + u * QZ_VECTOR_BYTES);
                QZ_HOLD(x);
                QZ_UNROLL
                for (int r = 0; r < QZ_ROWS_BESIDE; r++)
                    sums[r][i] = dot4(sums[r][i], codes[i][r][u], x, QZ_DOT_BITS(QZ_FP4));
            }
        }
        QZ_UNROLL
        for (int i = 0; i < steps && d > 0; i++) {
            QZ_UNROLL
            for (int r = 0; r < QZ_ROWS_BESIDE; r++) sums[r][i] = shl_i32(sums[r][i], 8);
        }
    }
    QZ_UNROLL
    for (int r = 0; r < QZ_ROWS_BESIDE; r++) {
        dots[r] = QZ_IS_NVFP4(QZ_FP4, block) ? sum_pairs_loosely(sums[r]) : sum_blocks(sums[r], steps);
    }
#endif
}

/* ---- mxfp4, few rows of x: terms wait for their addition in order, as in matmul.h ---- */

/* (float(G) * s) * 2^(e-1) of blocks whose numbers are given. */
QZ_INLINE v_f32 terms_mxfp4(v_i32 dots, v_f32 scales, const chunk_numbers *numbers) {
    const v_f32 dot = f32_from_i32(sub_i32(dots, load_i32(numbers->offset)));
    return mul_f32(mul_f32(dot, scales), load_f32(numbers->scale));
}

/* The scales of a chunk, of which the row has only `blocks` more; zeros beyond. */
QZ_INLINE v_f32 load_scales_mxfp4(const char *from, ptrdiff_t stride, ptrdiff_t blocks) {
    float scales[QZ_LANES] = {0};
    if (stride == 1 && blocks >= QZ_LANES) return scales_of_bytes((const uint8_t *)from, QZ_E8M0);
    QZ_NAME(load)(scales, from, stride, QZ_E8M0, blocks < QZ_LANES ? blocks : QZ_LANES);
    return load_f32(scales);
}

/* Blocks [begin, end) of a row for all rows of x, whose terms are `pitch` apart: a chunk is unpacked once. */
QZ_INLINE void row_terms_mxfp4(float *terms, ptrdiff_t pitch, const qz_matmul_job *job, const uint8_t *codes,
                               const char *scales, ahead_t ahead, ptrdiff_t begin, ptrdiff_t end, int block,
                               int digits) {
    const ptrdiff_t stride = job->scales.scale_group_stride;
    _Alignas(64) uint8_t copy[QZ_LANES * QZ_MAX_BLOCK / 2], unpacked[QZ_LANES * QZ_MAX_BLOCK];
    for (ptrdiff_t at = begin; at < end; at += QZ_LANES) {
        const v_f32 s = load_scales_mxfp4(scales, stride, end - at);
        prefetch_fp4(codes + ahead.codes, QZ_LANES * block / 2);
        unpack_chunk(unpacked, chunk_fp4(copy, codes, end - at, block), QZ_FP4, block);
        for (ptrdiff_t m = 0; m < job->m; m++) {
            const planes x = planes_at(job->x + m * job->x_stride, job->columns, block, digits);
            v_i32 dots[2];
            dot_chunk(dots, unpacked, 0, x.digits + at * block * digits, QZ_FP4, block, digits);
            store_f32(terms + m * pitch + (at - begin), terms_mxfp4(dots[0], s, numbers_at(&x, at)));
        }
        codes += QZ_LANES * block / 2;
        scales += QZ_LANES * stride;
    }
}

/* Rows from r on, blocks [begin, end); terms of a row are `pitch` from those of the next. */
QZ_INLINE void rows_terms_mxfp4(float *terms, ptrdiff_t pitch, const qz_matmul_job *job, ptrdiff_t r, ptrdiff_t begin,
                                ptrdiff_t end, int block, int digits) {
    const rows_beside rows = rows_from(job, r, begin, end, block);
    const planes x = planes_at(job->x, job->columns, block, digits);
    ptrdiff_t at = begin;
    for (; job->m == 1 && job->scales.scale_group_stride == 1 && at + QZ_LANES <= end; at += QZ_LANES) {
        const ptrdiff_t byte = (at - begin) * (block / 2);
        v_i32 dots[QZ_ROWS_BESIDE];
        dot_chunk_of_rows(dots, &rows, byte, x.digits + at * block * digits, block, digits);
        QZ_UNROLL
        for (int i = 0; i < QZ_ROWS_BESIDE; i++) {
            const uint8_t *scales = (const uint8_t *)rows.scales[i] + (at - begin);
            prefetch_fp4(rows.codes[i] + byte + rows.ahead.codes, QZ_LANES * block / 2);
            __builtin_prefetch(scales + rows.ahead.scales);
            const v_f32 term = terms_mxfp4(dots[i], scales_of_bytes(scales, QZ_E8M0), numbers_at(&x, at));
            store_f32(terms + i * pitch + (at - begin), term);
        }
    }
    for (int i = 0; i < QZ_ROWS_BESIDE && at < end; i++) {
        row_terms_mxfp4(
            terms + i * pitch + (at - begin), pitch * QZ_TILE_ROWS, job, rows.codes[i] + (at - begin) * (block / 2),
            rows.scales[i] + (at - begin) * job->scales.scale_group_stride, rows.ahead, at, end, block, digits);
    }
}

/* ---- nvfp4 ---- */

/* c + (float(G) * s) * 2^(e-1), fused, for QZ_LANES blocks or outputs. */
QZ_INLINE v_f32 chain_nvfp4(v_f32 chain, v_i32 dots, v_i32 offset, v_f32 scales, v_f32 unit) {
    return fma_f32(mul_f32(f32_from_i32(sub_i32(dots, offset)), scales), unit, chain);
}

/* ---- few rows of x: lanes are chains, in loose order where they are in registers ---- */

/* Scales of some blocks, divided by QZ_GREATER_NVFP4, and zeros in the rest of the last vector. */
QZ_INLINE void load_scales_nvfp4(float to[QZ_NVFP4_PANEL], const char *from, ptrdiff_t stride, ptrdiff_t blocks) {
    enum { SOME = 32 / QZ_LANES };
    const uint8_t *bytes = (const uint8_t *)from;
    v_i32 odd = set1_i32(0);
    ptrdiff_t at = 0;
    for (; stride == 1 && at + 32 <= blocks; at += 32) {
        v_f32 scales[SOME];
        odd = or_i32(odd, f32_from_e4m3(scales, bytes + at));
        QZ_UNROLL
        for (int i = 0; i < SOME; i++) store_f32(to + at + i * QZ_LANES, scales[i]);
    }
    if (any_i32(odd)) at = 0; /* a NaN */
    if (at == blocks) return;
    QZ_NAME(load)(to + at, from + at * stride, stride, QZ_E4M3, blocks - at);
    for (ptrdiff_t i = at; i < blocks; i++) to[i] *= 1.0f / QZ_GREATER_NVFP4;
    for (ptrdiff_t i = blocks; i % QZ_LANES; i++) to[i] = 0.0f;
}

/* The links of QZ_LANES chains, from the dots of their blocks. */
QZ_INLINE v_f32 link_nvfp4(v_f32 chains, v_i32 dots, v_f32 scales, const chunk_numbers *numbers, int digits) {
    if (digits == 1) scales = mul_f32(scales, set1_f32(QZ_GREATER_NVFP4));
    return chain_nvfp4(chains, dots, load_i32(numbers->offset), scales, load_f32(numbers->scale));
}

/* The same, of chains and scales in memory, in plain order, and blocks [at, at + QZ_LANES) of x. */
QZ_INLINE void add_links_nvfp4(float *chains, const uint8_t *codes, int is_packed, const float *scales, const planes *x,
                               ptrdiff_t at, int block, int digits) {
    const v_f32 sum = loosen_f32(load_f32(chains)), s = loosen_f32(load_f32(scales));
    v_i32 dots[2];
    dot_chunk(dots, codes, is_packed, x->digits + at * block * digits, QZ_FP4, block, digits);
    store_f32(chains, loosen_f32(link_nvfp4(sum, dots[0], s, numbers_at(x, at), digits)));
}

enum { QZ_NVFP4_VECTORS = QZ_NVFP4_CHAINS / QZ_LANES };

/* The chains of panels for one row of x and blocks [first, end), which are whole links of all chains; scales stand side
 * by side. What it returns tells whether scales are odd: then the sums count for nothing. */
QZ_INLINE int sum_whole_links_nvfp4(float *to, ptrdiff_t pitch, const rows_beside *rows, const planes *x,
                                    ptrdiff_t first, ptrdiff_t end, int block, int digits) {
    v_i32 most = set1_i32(0);
    ptrdiff_t block_at = 0;
    for (; first < end; first += QZ_NVFP4_PANEL, to += QZ_NVFP4_CHAINS) {
        const ptrdiff_t last = end - first < QZ_NVFP4_PANEL ? end : first + QZ_NVFP4_PANEL;
        v_f32 chains[QZ_ROWS_BESIDE][QZ_NVFP4_VECTORS];
        QZ_UNROLL
        for (int i = 0; i < QZ_ROWS_BESIDE; i++) {
            __builtin_prefetch(rows->scales[i] + block_at + rows->ahead.scales);
            QZ_UNROLL
            for (int v = 0; v < QZ_NVFP4_VECTORS; v++) chains[i][v] = set1_f32(0.0f);
        }
        for (ptrdiff_t at = first; at < last; at += QZ_NVFP4_CHAINS, block_at += QZ_NVFP4_CHAINS) {
            v_f32 s[QZ_ROWS_BESIDE][QZ_NVFP4_VECTORS];
            QZ_UNROLL
            for (int i = 0; i < QZ_ROWS_BESIDE; i++) {
                most = f32_from_scales_e4m3(s[i], (const uint8_t *)rows->scales[i] + block_at, most);
                prefetch_fp4(rows->codes[i] + block_at * (block / 2) + rows->ahead.codes, QZ_NVFP4_CHAINS * block / 2);
            }
            QZ_UNROLL
            for (int v = 0; v < QZ_NVFP4_VECTORS; v++) {
                const ptrdiff_t b = at + v * QZ_LANES, byte = (block_at + v * QZ_LANES) * (block / 2);
                v_i32 dots[QZ_ROWS_BESIDE];
                dot_chunk_of_rows(dots, rows, byte, x->digits + b * block * digits, block, digits);
                QZ_UNROLL
                for (int i = 0; i < QZ_ROWS_BESIDE; i++) {
                    chains[i][v] = link_nvfp4(chains[i][v], dots[i], s[i][v], numbers_at(x, b), digits);
                }
            }
        }
        QZ_UNROLL
        for (int i = 0; i < QZ_ROWS_BESIDE; i++) {
            QZ_UNROLL
            for (int v = 0; v < QZ_NVFP4_VECTORS; v++) {
                store_f32(to + i * pitch + v * QZ_LANES, loosen_f32(chains[i][v]));
            }
        }
    }
    return exceeds_7e(most);
}

/* The chains of `blocks` blocks: a panel, or the end of one, for all rows of x, whose chains are `pitch` apart. Of some
 * rows of x, a chunk is unpacked once. */
QZ_INLINE void sum_panel_nvfp4(float *to, ptrdiff_t pitch, const qz_matmul_job *job, const uint8_t *codes,
                               const float *scales, ptrdiff_t first, ptrdiff_t blocks, int block, int digits) {
    _Alignas(64) uint8_t copy[QZ_LANES * QZ_MAX_BLOCK / 2], unpacked[QZ_LANES * QZ_MAX_BLOCK];
    const int packed = job->m == 1;
    for (ptrdiff_t m = 0; m < job->m && first % QZ_NVFP4_PANEL == 0; m++) {
        memset(to + m * pitch, 0, QZ_NVFP4_CHAINS * sizeof *to);
    }
    for (ptrdiff_t at = 0; at < blocks; at += QZ_LANES) {
        const uint8_t *some = chunk_fp4(copy, codes + at * (block / 2), blocks - at, block);
        if (!packed) unpack_chunk(unpacked, some, QZ_FP4, block);
        for (ptrdiff_t m = 0; m < job->m; m++) {
            const planes x = planes_at(job->x + m * job->x_stride, job->columns, block, digits);
            float *chain = to + m * pitch + at % QZ_NVFP4_CHAINS;
            if (packed) add_links_nvfp4(chain, some, 1, scales + at, &x, first + at, block, digits);
            if (!packed) add_links_nvfp4(chain, unpacked, 0, scales + at, &x, first + at, block, digits);
        }
    }
}

/* Blocks [begin, end) of a row for all rows of x. begin: a panel's, or after whole links of all chains. */
QZ_INLINE void sum_row_nvfp4(float *to, ptrdiff_t pitch, const qz_matmul_job *job, const uint8_t *codes,
                             const char *stored, ahead_t ahead, ptrdiff_t begin, ptrdiff_t end, int block, int digits) {
    const ptrdiff_t stride = job->scales.scale_group_stride;
    _Alignas(64) float scales[QZ_NVFP4_PANEL];
    while (begin < end) {
        const ptrdiff_t left = end - begin, room = QZ_NVFP4_PANEL - begin % QZ_NVFP4_PANEL;
        const ptrdiff_t blocks = left < room ? left : room;
        prefetch_fp4(codes + ahead.codes, blocks * (block / 2));
        __builtin_prefetch(stored + ahead.scales);
        load_scales_nvfp4(scales, stored, stride, blocks);
        sum_panel_nvfp4(to, pitch, job, codes, scales, begin, blocks, block, digits);
        begin += blocks;
        codes += blocks * (block / 2);
        stored += blocks * stride;
        to += QZ_NVFP4_CHAINS;
    }
}

/* Rows from r on, blocks [begin, end); chains of a row are `pitch` from those of the next. First what can be done in
 * the fast way. */
QZ_INLINE void sum_rows_nvfp4(float *to, ptrdiff_t pitch, const qz_matmul_job *job, ptrdiff_t r, ptrdiff_t begin,
                              ptrdiff_t end, int block, int digits) {
    const rows_beside rows = rows_from(job, r, begin, end, block);
    ptrdiff_t done = 0;
    if (job->m == 1 && job->scales.scale_group_stride == 1) {
        const ptrdiff_t whole = (end - begin) / QZ_NVFP4_CHAINS * QZ_NVFP4_CHAINS;
        const planes x = planes_at(job->x, job->columns, block, digits);
        if (!sum_whole_links_nvfp4(to, pitch, &rows, &x, begin, begin + whole, block, digits)) done = whole;
    }
    for (int i = 0; i < QZ_ROWS_BESIDE && begin + done < end; i++) {
        sum_row_nvfp4(to + i * pitch + done / QZ_NVFP4_PANEL * QZ_NVFP4_CHAINS, pitch * QZ_TILE_ROWS, job,
                      rows.codes[i] + done * (block / 2), rows.scales[i] + done * job->scales.scale_group_stride,
                      rows.ahead, begin + done, end, block, digits);
    }
}

/* ---- both FP4 formats ---- */

/* k of which the sums for one row of x wait for their addition: digits of so many stay in the first level of the
 * caches, and of twice as many where that is all of a row, whose weights are then one run. */
enum { QZ_FP4_WAITING = 2048 };

/* Sums are chains, QZ_NVFP4_CHAINS for each panel, or terms, one for each block. */
QZ_INLINE void decode_rows_fp4(const qz_matmul_job *job, int block, int digits) {
    const int has_chains = QZ_IS_NVFP4(QZ_FP4, block);
    const ptrdiff_t panel = has_chains ? QZ_NVFP4_PANEL : QZ_LANES, sums = has_chains ? QZ_NVFP4_CHAINS : QZ_LANES;
    const ptrdiff_t k = job->columns <= 2 * QZ_FP4_WAITING ? 2 * QZ_FP4_WAITING : QZ_FP4_WAITING;
    const ptrdiff_t blocks = job->columns / block, fit = job->m == 1 ? k / block : QZ_DECODE_ROWS / job->m * panel;
    _Alignas(64) float waiting[QZ_DECODE_ROWS * QZ_TILE_ROWS * QZ_NVFP4_CHAINS];
    clear_tile(job);
    if (job->rows < QZ_TILE_ROWS) memset(waiting, 0, sizeof waiting);
    for (ptrdiff_t begin = 0; begin < blocks; begin += fit) {
        const ptrdiff_t end = blocks - begin < fit ? blocks : begin + fit;
        const ptrdiff_t pitch = (end - begin + panel - 1) / panel * sums;
        for (ptrdiff_t r = 0; r < job->rows; r += QZ_ROWS_BESIDE) {
            if (has_chains) {
                sum_rows_nvfp4(waiting + r * pitch, pitch, job, r, begin, end, block, digits);
            } else {
                rows_terms_mxfp4(waiting + r * pitch, pitch, job, r, begin, end, block, digits);
            }
        }
        for (ptrdiff_t m = 0; m < job->m; m++) {
            add_terms_in_order(job->y + m * job->y_stride, waiting + m * pitch * QZ_TILE_ROWS, pitch, pitch);
        }
    }
    make_tile_canonical(job);
}

/* ---- many: lanes are outputs ---- */

/* A panel of prefill.h holds whole chains, as many as fit: blocks j, j + 16, ... of a panel of k side by side for some
 * neighbouring j. */
#define QZ_LINKS_NVFP4 (QZ_NVFP4_PANEL / QZ_NVFP4_CHAINS)
#define QZ_CHAINS_NVFP4(block) (QZ_PANEL_K / (block) / QZ_LINKS_NVFP4)

QZ_INLINE void load_panel_nvfp4(panel_t *panel, const qz_matmul_job *job, ptrdiff_t column, ptrdiff_t first,
                                ptrdiff_t end, int block, int digits) {
    const int chains = QZ_CHAINS_NVFP4(block);
    for (int link = 0; link < QZ_LINKS_NVFP4; link++) {
        const ptrdiff_t at = first + link * QZ_NVFP4_CHAINS, some = end - at < chains ? end - at : chains;
        if (some <= 0) break;
        load_panel_t(panel, link * chains, job, column, at, (int)some, QZ_FP4, block, 1, digits);
    }
}

/* Chain `chain` of the panel, whose first block is `first`, for QZ_TILE_M rows of x. */
QZ_INLINE void sum_chain_of_tile_nvfp4(v_f32 (*sums)[QZ_TILE_VECTORS], const panel_t *panel, const planes *x,
                                       const int8_t *const *strips, ptrdiff_t first, ptrdiff_t end, ptrdiff_t blocks,
                                       int chain, int block, int digits) {
    const int bytes = strip_bytes(QZ_FP4, digits);
    QZ_UNROLL
    for (int r = 0; r < QZ_TILE_M; r++) {
        QZ_UNROLL
        for (int v = 0; v < QZ_TILE_VECTORS; v++) sums[r][v] = set1_f32(0.0f);
    }
    for (int link = 0; link < QZ_LINKS_NVFP4; link++) {
        const ptrdiff_t at = first + chain + link * QZ_NVFP4_CHAINS;
        const int b = link * QZ_CHAINS_NVFP4(block) + chain;
        tile_sums low, high;
        if (at >= end) break;
        const ptrdiff_t place = strip_place(at, blocks, QZ_FP4, block);
        sum_tile(low, high, codes_of_block(panel, b, block), strips, place * block * bytes, QZ_TILE_M, QZ_FP4, block,
                 digits, 0);
        QZ_UNROLL
        for (int r = 0; r < QZ_TILE_M; r++) {
            const chunk_numbers *numbers = numbers_at(&x[r], place);
            const v_i32 offset = set1_i32(numbers->offset[lane_of(place)]);
            const v_f32 unit = set1_f32(numbers->scale[lane_of(place)]);
            QZ_UNROLL
            for (int v = 0; v < QZ_TILE_VECTORS; v++) {
                sums[r][v] =
                    chain_nvfp4(sums[r][v], low[r][v], offset, load_f32(panel->scales[b] + v * QZ_LANES), unit);
            }
        }
    }
}

/* The chains of a panel against QZ_TILE_M rows of x, of which `rows` count; the last stands in for the others. */
QZ_INLINE void multiply_panel_nvfp4(float *y, const qz_matmul_job *job, const panel_t *panel, ptrdiff_t m,
                                    ptrdiff_t first, ptrdiff_t end, int block, int digits) {
    const ptrdiff_t rows = job->m - m < QZ_TILE_M ? job->m - m : QZ_TILE_M;
    planes x[QZ_TILE_M];
    const int8_t *strips[QZ_TILE_M];
    for (ptrdiff_t r = 0; r < QZ_TILE_M; r++) {
        const char *prepared = job->x + (m + (r < rows ? r : rows - 1)) * job->x_stride;
        x[r] = planes_at(prepared, job->columns, block, strip_bytes(QZ_FP4, digits));
        strips[r] = x[r].digits;
    }
    for (int chain = 0; chain < QZ_CHAINS_NVFP4(block) && first + chain < end; chain++) {
        v_f32 sums[QZ_TILE_M][QZ_TILE_VECTORS];
        sum_chain_of_tile_nvfp4(sums, panel, x, strips, first, end, job->columns / block, chain, block, digits);
        for (ptrdiff_t r = 0; r < rows; r++) {
            QZ_UNROLL
            for (int v = 0; v < QZ_TILE_VECTORS; v++) {
                float *to = y + r * job->y_stride + v * QZ_LANES;
                store_f32(to, add_f32(load_f32(to), sums[r][v]));
            }
        }
    }
}

QZ_INLINE void prefill_nvfp4(const qz_matmul_job *job, int block, int digits) {
    const ptrdiff_t blocks = job->columns / block;
    panel_t panel;
    memset(job->y, 0, (size_t)(job->m * job->y_stride) * sizeof *job->y);
    for (ptrdiff_t begin = 0; begin < blocks; begin += QZ_NVFP4_PANEL) {
        const ptrdiff_t end = blocks - begin < QZ_NVFP4_PANEL ? blocks : begin + QZ_NVFP4_PANEL;
        for (ptrdiff_t i = 0; i < QZ_NVFP4_CHAINS && begin + i < end; i += QZ_CHAINS_NVFP4(block)) {
            for (ptrdiff_t column = 0; column < job->rows; column += QZ_TILE_OUTPUTS) {
                load_panel_nvfp4(&panel, job, column, begin + i, end, block, digits);
                for (ptrdiff_t m = 0; m < job->m; m += QZ_TILE_M) {
                    multiply_panel_nvfp4(job->y + m * job->y_stride + column, job, &panel, m, begin + i, end, block,
                                         digits);
                }
            }
        }
    }
    make_nan_canonical(job->y, job->m * job->y_stride);
}

/* ---- both families by their bits ---- */

QZ_INLINE void decode_any(const qz_matmul_job *job, int bits, int block, int digits) {
    for (ptrdiff_t r = 0; r < job->rows; r += QZ_TILE_ROWS) {
        const qz_matmul_job tile = tile_of_job(job, r); /* which no store changes, as compilers see: 8 % where M is 1 */
        if (bits == QZ_FP4) {
            decode_rows_fp4(&tile, block, digits);
        } else {
            decode_rows(&tile, bits, block, digits);
        }
    }
}

QZ_INLINE void prefill_any(const qz_matmul_job *job, int bits, int block, int digits) {
    if (QZ_IS_NVFP4(bits, block)) {
        prefill_nvfp4(job, block, digits);
    } else {
        prefill_t(job, bits, block, digits);
    }
}
