/* y = x Wᵀ of FP4 weights on vectors: what a result is, bit for bit, is said by matmul_definition_fp.h. Dots, codes and
 * x in digit planes are those of matmul.h and prefill.h, and so is the rest of mxfp4 where rows of x are many. */

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
    for (ptrdiff_t i = 0; i < size; i += 64) __builtin_prefetch(codes + QZ_PREFETCH + i);
}

/* Packed codes of a chunk; where the row has only `blocks` more, a copy padded with zeros. */
QZ_INLINE const uint8_t *chunk_fp4(uint8_t *copy, const uint8_t *codes, ptrdiff_t blocks, int block) {
    if (blocks >= QZ_LANES) return codes;
    memset(copy, 0, (size_t)(QZ_LANES * (block / 2)));
    memcpy(copy, codes, (size_t)(blocks * (block / 2)));
    return copy;
}

/* ---- mxfp4, few rows of x: terms wait for their addition in order, as in matmul.h ---- */

/* (float(G) * s) * 2^(e-1) of blocks [at, at + QZ_LANES) of x. */
QZ_INLINE v_f32 terms_mxfp4(const uint8_t *codes, int is_packed, v_f32 scales, const planes *x, ptrdiff_t at, int block,
                            int digits) {
    const chunk_numbers *numbers = numbers_at(x, at);
    v_i32 dots[2];
    dot_chunk(dots, codes, is_packed, x->digits + at * block * digits, QZ_FP4, block, digits);
    const v_f32 dot = f32_from_i32(sub_i32(dots[0], load_i32(numbers->offset)));
    return mul_f32(mul_f32(dot, scales), load_f32(numbers->scale));
}

/* The scales of a chunk, of which the row has only `blocks` more; zeros beyond. */
QZ_INLINE v_f32 load_scales_mxfp4(const char *from, ptrdiff_t stride, ptrdiff_t blocks) {
    float scales[QZ_LANES] = {0};
    if (stride == 1 && blocks >= QZ_LANES) return scales_of_bytes((const uint8_t *)from, QZ_E8M0);
    QZ_NAME(load)(scales, from, stride, QZ_E8M0, blocks < QZ_LANES ? blocks : QZ_LANES);
    return load_f32(scales);
}

/* Weight row r, blocks [begin, end), for all rows of x, whose terms are `pitch` apart: a chunk is unpacked once. */
QZ_INLINE void row_terms_mxfp4(float *terms, ptrdiff_t pitch, const qz_matmul_job *job, ptrdiff_t r, ptrdiff_t begin,
                               ptrdiff_t end, int block, int digits) {
    const ptrdiff_t stride = job->scales.scale_group_stride;
    const char *scales = job->scales.scales + r * job->scales.scale_row_stride;
    const uint8_t *codes = job->w + r * job->w_row_stride;
    const planes first = planes_at(job->x, job->columns, block, digits);
    _Alignas(64) uint8_t copy[QZ_LANES * QZ_MAX_BLOCK / 2], unpacked[QZ_LANES * QZ_MAX_BLOCK];
    ptrdiff_t at = begin;
    for (; job->m == 1 && stride == 1 && at + QZ_LANES <= end; at += QZ_LANES) {
        const v_f32 s = scales_of_bytes((const uint8_t *)scales + at, QZ_E8M0);
        prefetch_fp4(codes + at * (block / 2), QZ_LANES * block / 2);
        __builtin_prefetch(scales + at + QZ_PREFETCH * 2 / block);
        store_f32(terms + at - begin, terms_mxfp4(codes + at * (block / 2), 1, s, &first, at, block, digits));
    }
    for (; at < end; at += QZ_LANES) {
        const v_f32 s = load_scales_mxfp4(scales + at * stride, stride, end - at);
        prefetch_fp4(codes + at * (block / 2), QZ_LANES * block / 2);
        unpack_chunk(unpacked, chunk_fp4(copy, codes + at * (block / 2), end - at, block), QZ_FP4, block);
        for (ptrdiff_t m = 0; m < job->m; m++) {
            const planes x = planes_at(job->x + m * job->x_stride, job->columns, block, digits);
            store_f32(terms + m * pitch + (at - begin), terms_mxfp4(unpacked, 0, s, &x, at, block, digits));
        }
    }
}

QZ_INLINE void decode_rows_mxfp4(const qz_matmul_job *job, int block, int digits) {
    const ptrdiff_t blocks = job->columns / block, fit = QZ_DECODE_ROWS / job->m * QZ_LANES;
    _Alignas(64) float terms[QZ_TERMS];
    clear_tile(job);
    if (job->rows < QZ_TILE_ROWS) memset(terms, 0, sizeof terms);
    for (ptrdiff_t begin = 0; begin < blocks; begin += fit) {
        const ptrdiff_t end = blocks - begin < fit ? blocks : begin + fit;
        const ptrdiff_t pitch = (end - begin + QZ_LANES - 1) / QZ_LANES * QZ_LANES;
        for (ptrdiff_t r = 0; r < job->rows; r++) {
            row_terms_mxfp4(terms + r * pitch, pitch * QZ_TILE_ROWS, job, r, begin, end, block, digits);
        }
        for (ptrdiff_t m = 0; m < job->m; m++) {
            add_terms_in_order(job->y + m * job->y_stride, terms + m * pitch * QZ_TILE_ROWS, pitch, pitch);
        }
    }
    make_tile_canonical(job);
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

/* The links of QZ_LANES chains at blocks [at, at + QZ_LANES) of x. */
QZ_INLINE v_f32 link_nvfp4(v_f32 chains, const uint8_t *codes, int is_packed, v_f32 scales, const planes *x,
                           ptrdiff_t at, int block, int digits) {
    const chunk_numbers *numbers = numbers_at(x, at);
    v_i32 dots[2];
    dot_chunk(dots, codes, is_packed, x->digits + at * block * digits, QZ_FP4, block, digits);
    if (digits == 1) scales = mul_f32(scales, set1_f32(QZ_GREATER_NVFP4));
    return chain_nvfp4(chains, dots[0], load_i32(numbers->offset), scales, load_f32(numbers->scale));
}

/* The same of chains and scales in memory, in plain order. */
QZ_INLINE void add_links_nvfp4(float *chains, const uint8_t *codes, int is_packed, const float *scales, const planes *x,
                               ptrdiff_t at, int block, int digits) {
    const v_f32 sum = loosen_f32(load_f32(chains)), s = loosen_f32(load_f32(scales));
    store_f32(chains, loosen_f32(link_nvfp4(sum, codes, is_packed, s, x, at, block, digits)));
}

enum { QZ_NVFP4_VECTORS = QZ_NVFP4_CHAINS / QZ_LANES };

/* The chains of panels for one row of x, whose first block is `first`, where scales stand side by side; there are
 * blocks for whole links of all chains. What it returns tells whether scales are odd: then the sums count for nothing.
 */
QZ_INLINE int sum_whole_links_nvfp4(float *to, const uint8_t *codes, const uint8_t *scales, const planes *x,
                                    ptrdiff_t first, ptrdiff_t end, int block, int digits) {
    v_i32 most = set1_i32(0);
    for (; first < end; first += QZ_NVFP4_PANEL) {
        v_f32 chains[QZ_NVFP4_VECTORS];
        QZ_UNROLL
        for (int v = 0; v < QZ_NVFP4_VECTORS; v++) chains[v] = set1_f32(0.0f);
        __builtin_prefetch(scales + QZ_PREFETCH * 2 / block);
        const ptrdiff_t last = end - first < QZ_NVFP4_PANEL ? end : first + QZ_NVFP4_PANEL;
        for (ptrdiff_t at = first; at < last; at += QZ_NVFP4_CHAINS) {
            v_f32 s[QZ_NVFP4_VECTORS];
            most = f32_from_scales_e4m3(s, scales, most);
            prefetch_fp4(codes, QZ_NVFP4_CHAINS * block / 2);
            QZ_UNROLL
            for (int v = 0; v < QZ_NVFP4_VECTORS; v++) {
                chains[v] = link_nvfp4(chains[v], codes, 1, s[v], x, at + v * QZ_LANES, block, digits);
                codes += QZ_LANES * block / 2;
            }
            scales += QZ_NVFP4_CHAINS;
        }
        QZ_UNROLL
        for (int v = 0; v < QZ_NVFP4_VECTORS; v++) store_f32(to + v * QZ_LANES, loosen_f32(chains[v]));
        to += QZ_NVFP4_CHAINS;
    }
    return exceeds_7e(most);
}

/* The chains of `blocks` blocks: a panel, or the end of one. */
QZ_INLINE void sum_panel_nvfp4(float *to, const uint8_t *codes, const float *scales, const planes *x, ptrdiff_t first,
                               ptrdiff_t blocks, int block, int digits) {
    _Alignas(64) uint8_t copy[QZ_LANES * QZ_MAX_BLOCK / 2];
    if (first % QZ_NVFP4_PANEL == 0) memset(to, 0, QZ_NVFP4_CHAINS * sizeof *to);
    for (ptrdiff_t at = 0; at < blocks; at += QZ_LANES) {
        const uint8_t *some = chunk_fp4(copy, codes + at * (block / 2), blocks - at, block);
        float *chain = to + at % QZ_NVFP4_CHAINS;
        prefetch_fp4(codes + at * (block / 2), QZ_LANES * block / 2);
        add_links_nvfp4(chain, some, 1, scales + at, x, first + at, block, digits);
    }
}

/* The same for all rows of x, whose chains are `pitch` apart: a chunk is unpacked once. */
QZ_INLINE void sum_panel_of_rows_nvfp4(float *to, ptrdiff_t pitch, const uint8_t *codes, const float *scales,
                                       const qz_matmul_job *job, ptrdiff_t first, ptrdiff_t blocks, int block,
                                       int digits) {
    _Alignas(64) uint8_t copy[QZ_LANES * QZ_MAX_BLOCK / 2], unpacked[QZ_LANES * QZ_MAX_BLOCK];
    for (ptrdiff_t m = 0; m < job->m; m++) memset(to + m * pitch, 0, QZ_NVFP4_CHAINS * sizeof *to);
    for (ptrdiff_t at = 0; at < blocks; at += QZ_LANES) {
        const uint8_t *some = codes + at * (block / 2);
        prefetch_fp4(some, QZ_LANES * block / 2);
        unpack_chunk(unpacked, chunk_fp4(copy, some, blocks - at, block), QZ_FP4, block);
        for (ptrdiff_t m = 0; m < job->m; m++) {
            const planes x = planes_at(job->x + m * job->x_stride, job->columns, block, digits);
            float *chain = to + m * pitch + at % QZ_NVFP4_CHAINS;
            add_links_nvfp4(chain, unpacked, 0, scales + at, &x, first + at, block, digits);
        }
    }
}

/* Weight row r, blocks [begin, end), for all rows of x. begin: a panel's, or after whole links of all chains. */
QZ_INLINE void sum_row_nvfp4(float *to, ptrdiff_t pitch, const qz_matmul_job *job, const char *stored,
                             const uint8_t *codes, ptrdiff_t begin, ptrdiff_t end, int block, int digits) {
    const ptrdiff_t stride = job->scales.scale_group_stride;
    _Alignas(64) float scales[QZ_NVFP4_PANEL];
    while (begin < end) {
        const ptrdiff_t left = end - begin, room = QZ_NVFP4_PANEL - begin % QZ_NVFP4_PANEL;
        const ptrdiff_t blocks = left < room ? left : room;
        __builtin_prefetch(stored + QZ_PREFETCH * 2 / block);
        load_scales_nvfp4(scales, stored, stride, blocks);
        if (job->m == 1) {
            const planes x = planes_at(job->x, job->columns, block, digits);
            sum_panel_nvfp4(to, codes, scales, &x, begin, blocks, block, digits);
        } else {
            sum_panel_of_rows_nvfp4(to, pitch, codes, scales, job, begin, blocks, block, digits);
        }
        begin += blocks;
        codes += blocks * (block / 2);
        stored += blocks * stride;
        to += QZ_NVFP4_CHAINS;
    }
}

/* The same; first what can be done in the fast way. */
QZ_INLINE void sum_row_or_fast_nvfp4(float *to, ptrdiff_t pitch, const qz_matmul_job *job, ptrdiff_t r, ptrdiff_t begin,
                                     ptrdiff_t end, int block, int digits) {
    const qz_scales *from = &job->scales;
    const char *stored = from->scales + r * from->scale_row_stride + begin * from->scale_group_stride;
    const uint8_t *codes = job->w + r * job->w_row_stride + begin * (block / 2);
    if (job->m == 1 && from->scale_group_stride == 1) {
        const ptrdiff_t whole = (end - begin) / QZ_NVFP4_CHAINS * QZ_NVFP4_CHAINS;
        const planes x = planes_at(job->x, job->columns, block, digits);
        if (!sum_whole_links_nvfp4(to, codes, (const uint8_t *)stored, &x, begin, begin + whole, block, digits)) {
            begin += whole;
            stored += whole;
            codes += whole * (block / 2);
            to += whole / QZ_NVFP4_PANEL * QZ_NVFP4_CHAINS;
        }
    }
    if (begin < end) sum_row_nvfp4(to, pitch, job, stored, codes, begin, end, block, digits);
}

QZ_INLINE void decode_rows_nvfp4(const qz_matmul_job *job, int block, int digits) {
    const ptrdiff_t blocks = job->columns / block, fit = QZ_DECODE_ROWS / job->m * QZ_NVFP4_PANEL;
    _Alignas(64) float chains[QZ_DECODE_ROWS * QZ_TILE_ROWS * QZ_NVFP4_CHAINS];
    clear_tile(job);
    if (job->rows < QZ_TILE_ROWS) memset(chains, 0, sizeof chains);
    for (ptrdiff_t begin = 0; begin < blocks; begin += fit) {
        const ptrdiff_t end = blocks - begin < fit ? blocks : begin + fit;
        const ptrdiff_t pitch = (end - begin + QZ_NVFP4_PANEL - 1) / QZ_NVFP4_PANEL * QZ_NVFP4_CHAINS;
        for (ptrdiff_t r = 0; r < job->rows; r++) {
            sum_row_or_fast_nvfp4(chains + r * pitch, pitch * QZ_TILE_ROWS, job, r, begin, end, block, digits);
        }
        for (ptrdiff_t m = 0; m < job->m; m++) {
            add_terms_in_order(job->y + m * job->y_stride, chains + m * pitch * QZ_TILE_ROWS, pitch, pitch);
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
        if (QZ_IS_NVFP4(bits, block)) {
            decode_rows_nvfp4(&tile, block, digits);
        } else if (bits == QZ_FP4) {
            decode_rows_mxfp4(&tile, block, digits);
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
