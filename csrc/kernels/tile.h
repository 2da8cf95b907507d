/* Integer dots of a tile: QZ_TILE_OUTPUTS outputs by up to QZ_TILE_M rows of x over one block of k, whose sums stay in
 * registers. Lanes are outputs, so that no sum crosses lanes. The kernels for many rows of x rest on it.
 *
 * Where bytes multiply bytes into 32-bit lanes in one instruction, x's digits are taken one by one from the top, the
 * sums shifted by eight bits in between. Where QZ_PAIRS says that 16-bit products are as cheap as two of bytes, the two
 * low digits are taken as one int16, against codes less their centre; a digit above them counts 65536-fold. */

#ifndef QZ_PAIRS
#define QZ_PAIRS 0
typedef v_i32 v_sums;
static inline v_sums no_sums(void) { return set1_i32(0); }
static inline v_sums add_quad(v_sums sum, v_u8 codes, v_u8 digits, int bits) { return dot4(sum, codes, digits, bits); }
#endif

static inline v_u8 broadcast_four(const int8_t *from) {
    int32_t four;
    memcpy(&four, from, sizeof four);
    return u8_of_i32(set1_i32(four));
}

enum { QZ_TILE_OUTPUTS = QZ_TILE_VECTORS * QZ_LANES };

typedef v_i32 tile_sums[QZ_TILE_M][QZ_TILE_VECTORS];

/* What a block of codes, and of x, is held as: pairs of int16, quads of bytes, or both. */
QZ_INLINE int has_pairs(int bits, int digits) { return QZ_PAIRS && (digits > 1 || bits == 8); }

/* Codes of a tile: quads of k = 4 i ... 4 i + 3 and pairs of k = 2 i, 2 i + 1, four bytes for each output side by side,
 * i by i `pitch` bytes apart. */
typedef struct tile_codes {
    const uint8_t *quads, *pairs;
    ptrdiff_t pitch;
} tile_codes;

/* Bytes for one element of x in a strip: the form of a row that tiles read, block after block, of each first the pairs
 * and then the quads, or digit after digit. */
QZ_INLINE int strip_bytes(int bits, int digits) { return has_pairs(bits, digits) && digits == 1 ? 2 : digits; }

/* By what a low pair exceeds the two low digits: with it -32896 ... 32639 becomes an int16. Where the format is not
 * wide, the share of the top digit is free. */
QZ_INLINE int32_t pair_excess(int wide) { return wide ? 128 : 0; }

/* One block of a strip; returns sum(v), and in *high that of what counts 65536-fold. */
QZ_INLINE int32_t store_strip(int8_t *to, const int32_t *v, int block, int bits, int digits, int wide, int32_t *high) {
    if (!has_pairs(bits, digits)) return store_digits(to, block, v, block, digits, high);
    const int32_t excess = pair_excess(wide);
    int32_t sum = 0, tops = 0;
    for (int i = 0; i < block; i++) {
        const int16_t low = (int16_t)(uint16_t)(v[i] + excess);
        memcpy(to + 2 * i, &low, sizeof low);
        sum += v[i];
    }
    for (int i = 0; i < block && digits == 3; i++) {
        const int32_t top = (v[i] + 32768 + excess) >> 16;
        to[2 * block + i] = (int8_t)top;
        tops += top;
    }
    *high = tops;
    return sum;
}

/* By what the dots of stored codes exceed those of centred ones. Pairs are centred already. */
QZ_INLINE void set_strip_offsets(int32_t *offset, int32_t *offset_high, int32_t sum, int32_t high, int bits, int digits,
                                 int wide) {
    if (!has_pairs(bits, digits)) {
        set_offsets(offset, offset_high, sum, high, bits, wide);
        return;
    }
    const uint32_t top = (uint32_t)QZ_CENTRE(bits) * (uint32_t)high;
    *offset = wide ? 0 : (int32_t)(65536u * top);
    *offset_high = wide ? (int32_t)top : 0;
}

/* Adds the products of quad k of all outputs. */
QZ_INLINE void add_one_quad(v_sums sum[QZ_TILE_M][QZ_TILE_VECTORS], tile_codes codes, const int8_t *const *x,
                            ptrdiff_t at, int k, int rows, int bits) {
    v_u8 code[QZ_TILE_VECTORS];
    QZ_UNROLL
    for (int v = 0; v < QZ_TILE_VECTORS; v++) code[v] = load_u8(codes.quads + k * codes.pitch + v * QZ_VECTOR_BYTES);
    QZ_UNROLL
    for (int r = 0; r < rows; r++) {
        const v_u8 digit = broadcast_four(x[r] + at + 4 * k);
        QZ_UNROLL
        for (int v = 0; v < QZ_TILE_VECTORS; v++) sum[r][v] = add_quad(sum[r][v], code[v], digit, QZ_DOT_BITS(bits));
    }
}

QZ_INLINE void clear_sums_of_tile(v_sums sum[QZ_TILE_M][QZ_TILE_VECTORS], int rows) {
    QZ_UNROLL
    for (int r = 0; r < rows; r++) {
        QZ_UNROLL
        for (int v = 0; v < QZ_TILE_VECTORS; v++) sum[r][v] = no_sums();
    }
}

QZ_INLINE void shift_sums(tile_sums sums, int rows, int by) {
    QZ_UNROLL
    for (int r = 0; r < rows; r++) {
        QZ_UNROLL
        for (int v = 0; v < QZ_TILE_VECTORS; v++) sums[r][v] = shl_i32(sums[r][v], by);
    }
}

#if QZ_PAIRS
/* Adds the dots of a block with one digit, which stands at x[r] + at and is at most `most` in magnitude. */
QZ_INLINE void add_quads(tile_sums sums, tile_codes codes, const int8_t *const *x, ptrdiff_t at, int rows, int quads,
                         int bits, int most) {
    const int fit = QZ_QUADS_TOGETHER(QZ_DOT_BITS(bits), most), together = fit < quads ? fit : quads;
    for (int begin = 0; begin < quads; begin += together) {
        v_sums sum[QZ_TILE_M][QZ_TILE_VECTORS];
        clear_sums_of_tile(sum, rows);
        QZ_UNROLL_BY_4
        for (int k = begin; k < begin + together; k++) add_one_quad(sum, codes, x, at, k, rows, bits);
        QZ_UNROLL
        for (int r = 0; r < rows; r++) {
            QZ_UNROLL
            for (int v = 0; v < QZ_TILE_VECTORS; v++) sums[r][v] = widen_sums(sums[r][v], sum[r][v]);
        }
    }
}

QZ_INLINE void add_pairs(tile_sums sums, tile_codes codes, const int8_t *const *x, ptrdiff_t at, int rows, int pairs) {
    v_i32 sum[QZ_TILE_M][QZ_TILE_VECTORS];
    QZ_UNROLL
    for (int r = 0; r < rows; r++) {
        QZ_UNROLL
        for (int v = 0; v < QZ_TILE_VECTORS; v++) sum[r][v] = sums[r][v];
    }
    QZ_UNROLL_BY_4
    for (int k = 0; k < pairs; k++) {
        v_i32 code[QZ_TILE_VECTORS];
        QZ_UNROLL
        for (int v = 0; v < QZ_TILE_VECTORS; v++)
            code[v] = (v_i32)load_u8(codes.pairs + k * codes.pitch + v * QZ_VECTOR_BYTES);
        QZ_UNROLL
        for (int r = 0; r < rows; r++) {
            const v_u8 low = broadcast_four(x[r] + at + 4 * k);
            add_pair_tile(sum[r], code, low);
        }
    }
    QZ_UNROLL
    for (int r = 0; r < rows; r++) {
        QZ_UNROLL
        for (int v = 0; v < QZ_TILE_VECTORS; v++) sums[r][v] = sum[r][v];
    }
}
#else
/* Sums the dots of digits `top` to `last` of a block, each of which counts 256-fold what the next one does. The sums
 * stay in registers until they are whole: compilers move arrays to memory that outlive a loop. Of few rows those of
 * even and of odd quads are apart, since there are too few otherwise to hide what a dot takes. */
QZ_INLINE void sum_digits(tile_sums sums, tile_codes codes, const int8_t *const *x, ptrdiff_t at, int rows, int bits,
                          int block, int top, int last) {
    const int chains = rows <= QZ_TILE_M / 2 ? 2 : 1;
    v_i32 sum[2][QZ_TILE_M][QZ_TILE_VECTORS];
    clear_sums_of_tile(sum[0], rows);
    clear_sums_of_tile(sum[1], rows);
    for (int d = top;; d--) {
        for (int k = 0; k < block / 4; k += 2) {
            add_one_quad(sum[0], codes, x, at + d * block, k, rows, bits);
            add_one_quad(sum[chains - 1], codes, x, at + d * block, k + 1, rows, bits);
        }
        if (d == last) break;
        shift_sums(sum[0], rows, 8);
        if (chains == 2) shift_sums(sum[1], rows, 8);
    }
    QZ_UNROLL
    for (int r = 0; r < rows; r++) {
        QZ_UNROLL
        for (int v = 0; v < QZ_TILE_VECTORS; v++)
            sums[r][v] = chains == 2 ? add_i32(sum[0][r][v], sum[1][r][v]) : sum[0][r][v];
    }
}
#endif

/* The dots of one block: in low all of it, or in wide formats the two low digits, in high the top one. */
QZ_INLINE void sum_tile(tile_sums low, tile_sums high, tile_codes codes, const int8_t *const *x, ptrdiff_t at, int rows,
                        int bits, int block, int digits, int wide) {
#if QZ_PAIRS
    QZ_UNROLL
    for (int r = 0; r < rows; r++) {
        QZ_UNROLL
        for (int v = 0; v < QZ_TILE_VECTORS; v++) low[r][v] = high[r][v] = set1_i32(0);
    }
    if (!has_pairs(bits, digits)) {
        add_quads(low, codes, x, at, rows, block / 4, bits, 128);
        return;
    }
    /* |v| < 2^22, so that the top digit is at most 64. */
    if (digits == 3) add_quads(wide ? high : low, codes, x, at + 2 * block, rows, block / 4, bits, 64);
    if (digits == 3 && !wide) shift_sums(low, rows, 16);
    add_pairs(low, codes, x, at, rows, block / 2);
#else
    if (wide) sum_digits(high, codes, x, at, rows, bits, block, 2, 2);
    sum_digits(low, codes, x, at, rows, bits, block, wide ? 1 : digits - 1, 0);
#endif
}

#if QZ_PAIRS
/* Makes the pairs, centred, of one vector of outputs from their quads, for `together` quads at a time the first pairs
 * and then the second. Returns by what the dots with low pairs exceed those with low digits: pair_excess times the sum
 * of the codes. */
QZ_INLINE v_i32 store_pairs(uint8_t *pairs, const uint8_t *quads, ptrdiff_t pitch, int block, int together, int bits,
                            int wide) {
    const v_u8 twice = u8_of_i32(set1_i32(pair_excess(wide) * 65537));
    v_i32 excess = set1_i32(0);
    for (int k = 0; k < block / 4; k++) {
        const int place = k / together * 2 * together + k % together;
        v_i32 two[2];
        pairs_of_quads(two, load_u8(quads + k * pitch), QZ_CENTRE(bits));
        store_u8(pairs + place * pitch, (v_u8)two[0]);
        store_u8(pairs + (place + together) * pitch, (v_u8)two[1]);
        if (wide) excess = add_pair(add_pair(excess, two[0], twice), two[1], twice);
    }
    return excess;
}
#endif
