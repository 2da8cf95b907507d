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
    for (ptrdiff_t m = 0; m < job->m && first % QZ_NVFP4_PANEL == 0; m++) {
        memset(to + m * pitch, 0, QZ_NVFP4_CHAINS * sizeof *to);
    }
    for (ptrdiff_t at = 0; at < blocks; at += QZ_LANES) {
        const uint8_t *some = chunk_fp4(copy, codes + at * (block / 2), blocks - at, block);
        float *chain = to + at % QZ_NVFP4_CHAINS;
        if (job->m == 1) {
            const planes x = planes_at(job->x, job->columns, block, digits);
            add_links_nvfp4(chain, some, 1, scales + at, &x, first + at, block, digits);
            continue;
        }
        unpack_chunk(unpacked, some, QZ_FP4, block);
        for (ptrdiff_t m = 0; m < job->m; m++) {
            const planes x = planes_at(job->x + m * job->x_stride, job->columns, block, digits);
            add_links_nvfp4(chain + m * pitch, unpacked, 0, scales + at, &x, first + at, block, digits);
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

/* What the next panels are made of, to be fetched while others are multiplied: their first block in the first row, and
 * the bytes from one link's codes to those of the next. */
typedef struct source_nvfp4 {
    const uint8_t *w;
    const char *scales;
    ptrdiff_t w_stride, scale_stride, link;
} source_nvfp4;

/* Of the panels after those that begin with block `at`; after the last ones, of the rows that follow those of the job.
 */
QZ_INLINE source_nvfp4 next_nvfp4(const qz_matmul_job *job, ptrdiff_t at, int block) {
    const qz_scales *from = &job->scales;
    ptrdiff_t row = 0;
    at += QZ_CHAINS_NVFP4(block);
    if (at % QZ_NVFP4_PANEL >= QZ_NVFP4_CHAINS) at += QZ_NVFP4_PANEL - QZ_NVFP4_CHAINS;
    if (at * block >= job->columns) {
        at = 0;
        row = job->rows;
    }
    return (source_nvfp4){job->w + row * job->w_row_stride + at * (block / 2),
                          from->scales + row * from->scale_row_stride + at * from->scale_group_stride,
                          job->w_row_stride, from->scale_row_stride, QZ_NVFP4_CHAINS * (block / 2)};
}

QZ_INLINE void prefetch_rows_nvfp4(const source_nvfp4 *from, ptrdiff_t first, ptrdiff_t count) {
    for (ptrdiff_t r = first; r < first + count; r++) {
        prefetch(from->scales + r * from->scale_stride);
        for (int link = 0; link < QZ_LINKS_NVFP4; link++) prefetch(from->w + r * from->w_stride + link * from->link);
    }
}

/* Some chains of a panel against neighbouring rows of x. Panels stand side by side, for all outputs of a job, and some
 * chains of all of them are multiplied before others, so that the x of a tile comes from the first level of the caches
 * for all panels but one. */
enum { QZ_PANELS_NVFP4 = QZ_PREFILL_ROWS / QZ_TILE_OUTPUTS, QZ_TURNS_NVFP4 = 2 };
enum { QZ_TURN_NVFP4 = QZ_CHAINS_NVFP4(16) / QZ_TURNS_NVFP4 };
typedef struct chains_nvfp4 {
    float *y;
    ptrdiff_t y_stride;
    const panel_t *panel;
    const char *x; /* as prepared; the chunk_numbers of a row are `numbers` bytes from its beginning */
    ptrdiff_t x_stride, numbers;
    ptrdiff_t place, chain_step, link_step; /* of the first block in a strip, and from there to others */
    ptrdiff_t first, end;                   /* blocks */
    int chain, chains;                      /* the first of them in the panel, and how many */
    ptrdiff_t rows;                         /* that count; the last stands in for those beyond */
    int fetches_x;                          /* of the tile that comes after this one */
    ptrdiff_t fetched;                      /* from this row on, some weights are fetched; none: -1 */
    source_nvfp4 next;
} chains_nvfp4;

/* The numbers of a block, by bytes from the row. */
QZ_INLINE ptrdiff_t numbers_nvfp4(const chains_nvfp4 *t, ptrdiff_t place) {
    const ptrdiff_t chunk = (ptrdiff_t)((size_t)place / QZ_LANES * sizeof(chunk_numbers));
    return t->numbers + chunk + lane_of(place) * (ptrdiff_t)sizeof(float);
}

/* Strips are too far apart, and what is read of each is too short, for processors to foresee. */
QZ_INLINE void prefetch_chain_nvfp4(const chains_nvfp4 *t, int chain, ptrdiff_t place, int rows, int block,
                                    int digits) {
    const ptrdiff_t bytes = block * strip_bytes(QZ_FP4, digits), numbers = numbers_nvfp4(t, place);
    if (t->fetched >= 0) {
        enum { SOME = QZ_PREFILL_ROWS / (QZ_PANELS_NVFP4 * QZ_TURNS_NVFP4 * QZ_TURN_NVFP4) };
        prefetch_rows_nvfp4(&t->next, t->fetched + chain * SOME, SOME);
    }
    for (int r = 0; r < rows && t->fetches_x; r++) {
        const char *from = t->x + (rows + r) * t->x_stride;
        for (ptrdiff_t at = 0; at < QZ_LINKS_NVFP4 * bytes; at += 64) __builtin_prefetch(from + place * bytes + at);
        if (chain > 0) continue;
        __builtin_prefetch(from + numbers);
        __builtin_prefetch(from + numbers + offsetof(chunk_numbers, offset));
    }
}

/* Adds a link to the chains of `rows` rows of x, or begins them: block b of the panel, which strips hold at `place`. */
QZ_INLINE void add_link_of_tile(v_f32 (*sums)[QZ_TILE_VECTORS], const chains_nvfp4 *t, const int8_t *const *strips,
                                ptrdiff_t place, ptrdiff_t b, int is_first, int rows, int block, int digits) {
    const ptrdiff_t numbers = numbers_nvfp4(t, place);
    tile_sums dots, high;
    v_f32 scales[QZ_TILE_VECTORS];
    sum_tile(dots, high, codes_of_block(t->panel, (int)b, block), strips, place * block * strip_bytes(QZ_FP4, digits),
             rows, QZ_FP4, block, digits, 0);
    QZ_UNROLL
    for (int v = 0; v < QZ_TILE_VECTORS; v++) scales[v] = load_f32(t->panel->scales[b] + v * QZ_LANES);
    QZ_UNROLL
    for (int r = 0; r < rows; r++) {
        const char *at = (const char *)strips[r] + numbers;
        const v_i32 offset = set1_i32(*(const int32_t *)(at + offsetof(chunk_numbers, offset)));
        const v_f32 unit = set1_f32(*(const float *)(at + offsetof(chunk_numbers, scale)));
        QZ_UNROLL
        for (int v = 0; v < QZ_TILE_VECTORS; v++) {
            const v_f32 chain = is_first ? set1_f32(0.0f) : sums[r][v];
            sums[r][v] = chain_nvfp4(chain, dots[r][v], offset, scales[v], unit);
        }
    }
}

QZ_INLINE void multiply_chains(const chains_nvfp4 *t, int rows, int block, int digits) {
    const int8_t *strips[QZ_TILE_M];
    QZ_UNROLL
    for (int r = 0; r < rows; r++) strips[r] = (const int8_t *)t->x + (r < t->rows ? r : t->rows - 1) * t->x_stride;
    for (int chain = 0; chain < t->chains; chain++) {
        v_f32 sums[QZ_TILE_M][QZ_TILE_VECTORS];
        ptrdiff_t place = t->place + chain * t->chain_step, b = t->chain + chain;
        prefetch_chain_nvfp4(t, chain, place, rows, block, digits);
        add_link_of_tile(sums, t, strips, place, b, 1, rows, block, digits);
        for (ptrdiff_t at = t->first + chain + QZ_NVFP4_CHAINS; at < t->end; at += QZ_NVFP4_CHAINS) {
            place += t->link_step;
            b += QZ_CHAINS_NVFP4(block);
            add_link_of_tile(sums, t, strips, place, b, 0, rows, block, digits);
        }
        QZ_UNROLL
        for (int r = 0; r < rows; r++) {
            float *to = t->y + r * t->y_stride;
            if (r >= t->rows) break;
            QZ_UNROLL
            for (int v = 0; v < QZ_TILE_VECTORS; v++) {
                store_f32(to + v * QZ_LANES, add_f32(load_f32(to + v * QZ_LANES), sums[r][v]));
            }
        }
    }
}

/* The same chains of all panels against all rows of x. The last rows have a tile of half the height if that is enough.
 */
QZ_INLINE void multiply_panels_nvfp4(chains_nvfp4 *t, const qz_matmul_job *job, const panel_t *panels, int block,
                                     int digits) {
    enum { HALF = QZ_TILE_M / 2 };
    const int is_later = t->chain > 0;
    for (ptrdiff_t m = 0; m < job->m; m += QZ_TILE_M) {
        t->x = job->x + m * job->x_stride;
        t->rows = job->m - m < QZ_TILE_M ? job->m - m : QZ_TILE_M;
        for (int p = 0; p * QZ_TILE_OUTPUTS < job->rows; p++) {
            const int share = is_later * QZ_PANELS_NVFP4 + p;
            t->y = job->y + m * job->y_stride + p * QZ_TILE_OUTPUTS;
            t->panel = panels + p;
            t->fetched = m == 0 ? share * (QZ_PREFILL_ROWS / (QZ_PANELS_NVFP4 * QZ_TURNS_NVFP4)) : -1;
            t->fetches_x = (p + 1) * QZ_TILE_OUTPUTS >= job->rows;
            if (t->rows <= HALF) {
                multiply_chains(t, HALF, block, digits);
            } else {
                multiply_chains(t, QZ_TILE_M, block, digits);
            }
        }
    }
}

QZ_INLINE void prefill_nvfp4(const qz_matmul_job *job, int block, int digits) {
    const ptrdiff_t blocks = job->columns / block;
    panel_t panels[QZ_PANELS_NVFP4];
    chains_nvfp4 t = {.y_stride = job->y_stride, .x_stride = job->x_stride};
    t.numbers = padded_blocks(job->columns, block) * block * strip_bytes(QZ_FP4, digits);
    memset(job->y, 0, (size_t)(job->m * job->y_stride) * sizeof *job->y);
    for (ptrdiff_t begin = 0; begin < blocks; begin += QZ_NVFP4_PANEL) {
        const int is_whole = blocks - begin >= QZ_NVFP4_PANEL;
        t.end = is_whole ? begin + QZ_NVFP4_PANEL : blocks;
        t.chain_step = is_whole ? QZ_LINKS_NVFP4 : 1;
        t.link_step = is_whole ? 1 : QZ_NVFP4_CHAINS;
        for (ptrdiff_t i = 0; i < QZ_NVFP4_CHAINS && begin + i < t.end; i += QZ_CHAINS_NVFP4(block)) {
            t.next = next_nvfp4(job, begin + i, block);
            for (ptrdiff_t p = 0; p * QZ_TILE_OUTPUTS < job->rows; p++) {
                load_panel_nvfp4(panels + p, job, p * QZ_TILE_OUTPUTS, begin + i, t.end, block, digits);
            }
            for (t.chain = 0; t.chain < QZ_CHAINS_NVFP4(block); t.chain += QZ_TURN_NVFP4) {
                t.first = begin + i + t.chain;
                t.place = begin + (i + t.chain) * t.chain_step;
                t.chains = t.end - t.first < QZ_TURN_NVFP4 ? (int)(t.end - t.first) : QZ_TURN_NVFP4;
                multiply_panels_nvfp4(&t, job, panels, block, digits);
            }
        }
    }
    make_nan_canonical(job->y, job->m * job->y_stride);
}

/* ---- both families by their bits ---- */

QZ_INLINE void decode_any(const qz_matmul_job *job, int bits, int block, int digits) {
    if (bits != QZ_FP4) {
        decode_rows(job, bits, block, digits);
        return;
    }
    for (ptrdiff_t r = 0; r < job->rows; r += QZ_TILE_ROWS) {
        const qz_matmul_job tile = tile_of_job(job, r); /* which no store changes, as compilers see: 8 % where M is 1 */
        decode_rows_fp4(&tile, block, digits);
    }
}

QZ_INLINE void prefill_any(const qz_matmul_job *job, int bits, int block, int digits) {
    if (QZ_IS_NVFP4(bits, block)) {
        prefill_nvfp4(job, block, digits);
    } else {
        prefill_t(job, bits, block, digits);
    }
}
