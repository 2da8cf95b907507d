/* From rotated and normalised elements to the codes of a codebook, and back. A code is the number of boundaries that
 * lie strictly below the element (0 for NaN), so that all ways of finding it agree to the last bit. */

/* Sums of products go in so many chains, element j of a block into chain j % 16, and the chains are added by halves:
 * i and i + 8, then i + 4, 2, 1. */
enum { QZ_CHAINS = 16, QZ_CHAIN_VECTORS = QZ_CHAINS / QZ_LANES };

QZ_INLINE float sum_chains(v_f32 *chains) {
    QZ_UNROLL
    for (int n = QZ_CHAIN_VECTORS; n > 1; n /= 2) {
        for (int i = 0; i < n / 2; i++) chains[i] = add_f32(chains[i], chains[i + n / 2]);
    }
    v_f32 sum = chains[0];
    if (QZ_LANES > 8) sum = add_f32(sum, partner_f32(sum, QZ_LANES > 8 ? 8 : 1));
    if (QZ_LANES > 4) sum = add_f32(sum, partner_f32(sum, QZ_LANES > 4 ? 4 : 1));
    sum = add_f32(sum, partner_f32(sum, 2));
    return first_f32(add_f32(sum, partner_f32(sum, 1)));
}

/* Of count squares, whose number is a multiple of QZ_CHAINS. */
QZ_INLINE float sum_of_squares(const float *x, ptrdiff_t count) {
    v_f32 chains[QZ_CHAIN_VECTORS];
    QZ_UNROLL
    for (int i = 0; i < QZ_CHAIN_VECTORS; i++) chains[i] = set1_f32(0.0f);
    for (ptrdiff_t j = 0; j < count; j += QZ_CHAINS) {
        QZ_UNROLL
        for (int i = 0; i < QZ_CHAIN_VECTORS; i++) {
            const v_f32 v = load_f32(x + j + i * QZ_LANES);
            chains[i] = add_f32(chains[i], mul_f32(v, v));
        }
    }
    return sum_chains(chains);
}

/* A whole block: signs turned, times H, into x; returns the sum of its squares. */
QZ_INLINE float transform_vectors(float *x, const float *from, const int32_t *flips, int vectors) {
    v_f32 v[QZ_AT_ONCE], chains[QZ_CHAIN_VECTORS];
    QZ_UNROLL
    for (int i = 0; i < vectors; i++) {
        const v_i32 turned = xor_i32(bits_of_f32(load_f32(from + i * QZ_LANES)), load_i32(flips + i * QZ_LANES));
        v[i] = f32_of_bits(turned);
    }
    butterflies_within(v, vectors, QZ_LANES);
    butterflies_between(v, vectors);
    QZ_UNROLL
    for (int i = 0; i < vectors; i++) {
        const v_f32 square = mul_f32(v[i], v[i]);
        chains[i % QZ_CHAIN_VECTORS] = i < QZ_CHAIN_VECTORS ? square : add_f32(chains[i % QZ_CHAIN_VECTORS], square);
        store_f32(x + i * QZ_LANES, v[i]);
    }
    return sum_chains(chains);
}

/* The same of any block, which goes on with zeros. */
static float transform_and_sum(float *x, const float *from, const qz_rotation *rotation, const rotation_tables *tables,
                               const int32_t *flips) {
    const ptrdiff_t block = rotation->block;
    if (rotation->order == 1 && block % QZ_PADDING == 0) {
        if (block == 16 * QZ_LANES) return transform_vectors(x, from, flips, 16);
        if (block == 8 * QZ_LANES) return transform_vectors(x, from, flips, 8);
        if (block == 4 * QZ_LANES) return transform_vectors(x, from, flips, 4);
    }
    load_block(x, from, block, flips);
    transform_block(x, rotation, tables);
    return sum_of_squares(x, padded(block));
}

typedef struct codebook {
    const float *values, *boundaries;
    const uint8_t *grid;
    float few_values[16]; /* of up to 8 values: repeated, for look_up_f32 */
    float steps[32];      /* of 16 values: the boundaries above 0, again and again; or the one in each bin, */
    int32_t bases[32];    /* and how many lie below the bin */
} codebook;

/* Bin k is the lower five bits of the integer next to 6 z, from -15 to 15. No two boundaries come to the same bin, and
 * none nearer than 0.04 to where bins meet: six times them is 0, 1.55, 3.13, 4.80, 6.60, 8.62, 11.06 and 14.40. */
static inline void open_bins(codebook *book) {
    for (int k = -16, below = 0; k < 16; k++) {
        book->bases[k & 31] = below;
        book->steps[k & 31] = qz_kv_boundaries_4[below];
        below += 6.0f * qz_kv_boundaries_4[below] < (float)k + 0.5f;
    }
}

static void open_codebook(codebook *book, int bits, int version) {
    static const struct {
        const float *values, *boundaries;
        const uint8_t *grid;
    } books[2][9] = {
        {[4] = {qz_kv_values_4_unrounded, qz_kv_boundaries_4, NULL},
         [5] = {qz_kv_values_5_early, qz_kv_boundaries_5_early, qz_kv_grid_5_early},
         [6] = {qz_kv_values_6_early, qz_kv_boundaries_6_early, qz_kv_grid_6_early},
         [8] = {qz_kv_values_8_early, qz_kv_boundaries_8_early, qz_kv_grid_8_early}},
        {[2] = {qz_kv_values_2, qz_kv_boundaries_2, NULL},
         [3] = {qz_kv_values_3, qz_kv_boundaries_3, NULL},
         [4] = {qz_kv_values_4, qz_kv_boundaries_4, NULL},
         [5] = {qz_kv_values_5, qz_kv_boundaries_5, qz_kv_grid_5},
         [6] = {qz_kv_values_6, qz_kv_boundaries_6, qz_kv_grid_6},
         [8] = {qz_kv_values_8, qz_kv_boundaries_8, qz_kv_grid_8}},
    };
    book->values = books[version - 1][bits].values;
    book->boundaries = books[version - 1][bits].boundaries;
    book->grid = books[version - 1][bits].grid;
    for (int i = 0; i < 16; i++) {
        if (bits < 4) book->few_values[i] = book->values[i & ((1 << bits) - 1)];
        book->steps[i] = qz_kv_boundaries_4[8 + i % 8];
    }
    if (bits < 4) book->values = book->few_values;
    if (QZ_TABLE_BITS == 5 && bits == 4) open_bins(book);
}

/* Few boundaries: compared with one after the other. */
QZ_INLINE v_i32 search_few(v_f32 z, const codebook *book, int bits) {
    v_i32 code = set1_i32(0);
    QZ_UNROLL
    for (int i = 0; i < (1 << bits) - 1; i++) code = count_greater(code, z, set1_f32(book->boundaries[i]));
    return code;
}

/* Of 16 values, where 32 table entries are looked up by one instruction. */
QZ_INLINE v_i32 search_16_in_bins(v_f32 z, const codebook *book) {
    const v_f32 near = min_f32(max_f32(z, set1_f32(-2.5f)), set1_f32(2.5f));
    const v_i32 bin = bits_of_f32(fma_f32(near, set1_f32(6.0f), set1_f32(0x1.8p23f)));
    const v_i32 base = bits_of_f32(look_up_f32((const float *)(const void *)book->bases, bin, 5));
    return count_greater(base, z, look_up_f32(book->steps, bin, 5));
}

/* Of 16 values: the codebook is symmetric, and boundary k above 0, k = 1...7, is so nearly a linear function of k that
 * 1.127 + 2.8 b_k lies in [k, k + 1), with a margin of 0.12: one comparison is left. A tie counts for the outer side
 * where z is negative: as integers, |z| + 1 > b is then |z| >= b. The sign comes from 0 - z, which is +0 for both
 * zeros, and these belong to the codes below: code 7 - k is 8 + k with its four bits inverted. */
QZ_INLINE v_i32 search_16(v_f32 z, const codebook *book) {
    const v_i32 negated = bits_of_f32(sub_f32(set1_f32(0.0f), z));
    const v_i32 size = and_i32(negated, set1_i32(0x7fffffff)), below = greater_i32(negated, set1_i32(-1));
    const v_f32 near = min_f32(f32_of_bits(size), set1_f32(2.42f));
    const v_i32 place = i32_from_f32_truncate(fma_f32(near, set1_f32(2.8f), set1_f32(8.127f)));
    const v_i32 step = bits_of_f32(look_up_f32(book->steps, place, 3));
    const v_i32 code = sub_i32(place, greater_i32(sub_i32(size, below), step));
    return xor_i32(code, and_i32(below, set1_i32(15)));
}

/* Of many: a grid of fine bins says how many boundaries lie below each, and holds no more than one within, which is no
 * nearer than 7e-6 to an edge but where it is 0, an edge itself: the rounding to a bin, of at most 5e-7, does no harm.
 */
QZ_INLINE v_i32 search_many(v_f32 z, const codebook *book) {
    const float least = -QZ_KV_HALF_BINS, most = QZ_KV_HALF_BINS - 1;
    v_f32 bin = mul_f32(z, set1_f32(QZ_KV_BINS_PER_UNIT));
    bin = min_f32(max_f32(bin, set1_f32(least)), set1_f32(most));
    const v_i32 place = i32_from_f32_truncate(add_f32(bin, set1_f32(QZ_KV_HALF_BINS)));
    const v_i32 code = gather_u8(book->grid, place);
    return count_greater(code, z, look_up_f32(book->boundaries, code, 8));
}

QZ_INLINE v_i32 search(v_f32 z, const codebook *book, int bits) {
    if (bits == 4) return QZ_TABLE_BITS == 5 ? search_16_in_bins(z, book) : search_16(z, book);
    return bits < 4 ? search_few(z, book, bits) : search_many(z, book);
}

/* The same of elements that need not be finite. */
static void search_any(uint8_t *codes, const float *z, ptrdiff_t count, const codebook *book, int bits) {
    for (ptrdiff_t j = 0; j < count; j++) {
        codes[j] = 0;
        for (int i = 0; i < (1 << bits) - 1; i++) codes[j] = (uint8_t)(codes[j] + (z[j] > book->boundaries[i]));
    }
}

/* The values of count codes, times a factor. */
QZ_INLINE void values_of_bits(float *to, const uint8_t *codes, ptrdiff_t count, const codebook *book, float factor,
                              int bits) {
    ptrdiff_t j = 0;
    for (; j + QZ_LANES <= count; j += QZ_LANES) {
        const v_f32 value = look_up_f32(book->values, i32_from_u8(codes + j), bits);
        store_f32(to + j, mul_f32(value, set1_f32(factor)));
    }
    for (; j < count; j++) to[j] = book->values[codes[j]] * factor;
}

static void values_of(float *to, const uint8_t *codes, ptrdiff_t count, const codebook *book, float factor, int bits) {
    switch (bits) {
    case 2:
    case 3: values_of_bits(to, codes, count, book, factor, 3); return;
    case 4: values_of_bits(to, codes, count, book, factor, 4); return;
    case 5: values_of_bits(to, codes, count, book, factor, 5); return;
    default: values_of_bits(to, codes, count, book, factor, 8);
    }
}
