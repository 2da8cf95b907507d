/* From rotated and normalised elements to the codes of a codebook, and back. A code is the number of boundaries that
 * lie strictly below the element (0 for NaN), so that all ways of finding it agree to the last bit. */

/* Sums of products go in so many chains, element j of a block into chain j % 16, and the chains are added by halves:
 * i and i + 8, then i + 4, 2, 1. */
enum { QZ_CHAINS = 16, QZ_CHAIN_VECTORS = QZ_CHAINS / QZ_LANES };

/* Chains joined by halves until a vector of them is left. */
#define QZ_JOIN_CHAINS(name, op)                                                      \
    QZ_INLINE v_f32 name(const v_f32 chains[QZ_CHAIN_VECTORS]) {                      \
        v_f32 v = chains[0];                                                          \
        if (QZ_CHAIN_VECTORS == 2) v = op(v, chains[QZ_CHAIN_VECTORS - 1]);           \
        if (QZ_CHAIN_VECTORS < 4) return v;                                           \
        v = op(v, chains[QZ_CHAIN_VECTORS / 2]);                                      \
        return op(v, op(chains[QZ_CHAIN_VECTORS / 4], chains[QZ_CHAIN_VECTORS - 1])); \
    }
QZ_JOIN_CHAINS(joined_chains, add_f32)

typedef struct chain_sums {
    v_f32 v[QZ_CHAIN_VECTORS];
} chain_sums;

QZ_INLINE void clear_chains(chain_sums *sums) {
    QZ_UNROLL
    for (int i = 0; i < QZ_CHAIN_VECTORS; i++) sums->v[i] = set1_f32(0.0f);
}

/* Of vector number `index` of a block, with one rounding where fused. */
QZ_INLINE void add_products(chain_sums *sums, int index, v_f32 a, v_f32 b, int fused) {
    v_f32 *chain = &sums->v[index % QZ_CHAIN_VECTORS];
    if (!fused) {
        *chain = add_f32(*chain, mul_f32(a, b));
        return;
    }
#if QZ_FUSED
    *chain = fused_f32(a, b, *chain);
#else
    for (int i = 0; i < QZ_LANES; i++) (*chain)[i] = fmaf(a[i], b[i], (*chain)[i]);
#endif
}

/* The joined chains of squares of a block, whose size is a multiple of 8. */
QZ_INLINE void store_square_chains(float to[QZ_LANES], const float *x, ptrdiff_t block, int fused) {
    chain_sums sums;
    clear_chains(&sums);
    ptrdiff_t j = 0;
    QZ_UNROLL_BY_4
    for (; j + QZ_CHAINS <= block; j += QZ_CHAINS) {
        QZ_UNROLL
        for (int i = 0; i < QZ_CHAIN_VECTORS; i++) {
            const v_f32 v = load_f32(x + j + i * QZ_LANES);
            add_products(&sums, i, v, v, fused);
        }
    }
    if (j < block) {
        float rest[QZ_CHAINS] = {0};
        memcpy(rest, x + j, (size_t)(block - j) * sizeof *x);
        QZ_UNROLL
        for (int i = 0; i < QZ_CHAIN_VECTORS; i++) {
            const v_f32 v = load_f32(rest + i * QZ_LANES);
            add_products(&sums, i, v, v, fused);
        }
    }
    store_f32(to, joined_chains(sums.v));
}

/* The sums of `count` vectors of joined chains, at most QZ_LANES; there is room for as many. */
QZ_INLINE void sum_chains(float sums[QZ_LANES], float *chains, ptrdiff_t count) {
    if (count < QZ_LANES)
        memset(chains + count * QZ_LANES, 0, (size_t)((QZ_LANES - count) * QZ_LANES) * sizeof *chains);
    store_f32(sums, sum_of_each(chains));
}

typedef struct codebook {
    const float *values, *boundaries;
    const uint8_t *grid;
    float all_values[64]; /* up to 6 bits; up to 3, repeated up to 16, as the next two are */
    float sizes[32];      /* the values above 0 */
    float steps[64];      /* the boundaries above 0, or all; or the one in each bin, */
    int32_t bases[32];    /* and how many lie below the bin */
} codebook;

/* How boundaries are found, up to 6 bits: boundary k above 0 is so nearly a polynomial of k that `at_0` + |z| (linear +
 * |z| square) lies in [k - 1, k) at it, with a margin of 0.13 at least: between boundaries k and k + 1 its whole part
 * is k - 1 or k. Greater |z| count as `most`, up to where the polynomial rises. */
typedef struct place_of_size {
    float at_0, linear, square, most;
} place_of_size;
static const place_of_size places_of_sizes[7] = {
    [3] = {-0.243f, 1.6034f, 0.0f, 1.8f},
    [4] = {0.126f, 2.8f, 0.0f, 2.42f},
    [5] = {-0.674f, 8.53f, -1.145f, 3.0f},
    [6] = {-0.938f, 17.368f, -2.399f, 3.6f},
};

#if QZ_TABLE_BITS == 5
/* The same of z itself, by an odd polynomial: next to k at boundary k, within 0.38 at most. */
typedef struct place_of_element {
    float linear, cube, fifth, most;
} place_of_element;
static const place_of_element places_of_elements[7] = {
    [3] = {1.787f, 0.0f, 0.0f, 1.8f},
    [5] = {7.2837f, -0.2596f, 0.0f, 3.0f},
    [6] = {15.325f, -0.8578f, 0.0277f, 3.48f},
};

#endif

/* How many of 15 boundaries lie below bin k: the lower five bits of the integer next to 6 z, from -15 to 15. No two
 * boundaries come to the same bin, and none nearer than 0.04 to where bins meet: six times them is 0, 1.55, 3.13, 4.80,
 * 6.60, 8.62, 11.06 and 14.40. */
static const uint8_t below_bins[32] = {7, 8, 8, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 14, 15,
                                       0, 0, 0, 1, 1,  1,  2,  2,  3,  3,  4,  4,  5,  5,  6,  7};

static void open_codebook(codebook *book, int bits, int version) {
    static const struct {
        const float *values, *boundaries;
        const uint8_t *grid;
    } books[2][9] = {
        {[4] = {qz_kv_values_4_unrounded, qz_kv_boundaries_4, NULL},
         [5] = {qz_kv_values_5_early, qz_kv_boundaries_5_early, NULL},
         [6] = {qz_kv_values_6_early, qz_kv_boundaries_6_early, NULL},
         [8] = {qz_kv_values_8_early, qz_kv_boundaries_8_early, qz_kv_grid_8_early}},
        {[2] = {qz_kv_values_2, qz_kv_boundaries_2, NULL},
         [3] = {qz_kv_values_3, qz_kv_boundaries_3, NULL},
         [4] = {qz_kv_values_4, qz_kv_boundaries_4, NULL},
         [5] = {qz_kv_values_5, qz_kv_boundaries_5, NULL},
         [6] = {qz_kv_values_6, qz_kv_boundaries_6, NULL},
         [8] = {qz_kv_values_8, qz_kv_boundaries_8, qz_kv_grid_8}},
    };
    const int all = 1 << bits, half = all / 2, first = QZ_TABLE_BITS == 5 ? 0 : half;
    book->values = books[version - 1][bits].values;
    book->boundaries = books[version - 1][bits].boundaries;
    book->grid = books[version - 1][bits].grid;
    for (int i = 0; i < 16 && bits < 4; i++) {
        book->all_values[i] = book->values[i & (all - 1)];
        book->sizes[i] = book->values[half + (i & (half - 1))];
        book->steps[i] = book->boundaries[first + (i & (all - first - 1))];
    }
    if (bits < 4 || bits == 8) return;
    memcpy(book->all_values, book->values, (size_t)all * sizeof(float));
    memcpy(book->sizes, book->values + half, (size_t)half * sizeof(float));
    memcpy(book->steps, book->boundaries + first, (size_t)(all - first) * sizeof(float));
    for (int k = 0; k < 32 && bits == 4 && QZ_TABLE_BITS == 5; k++) {
        book->bases[k] = below_bins[k];
        book->steps[k] = book->boundaries[below_bins[k]];
    }
}

/* What elements v of a block are searched with: a code is the number of boundaries times `norm` below v. */
typedef struct search_scale {
    float norm, inverse; /* 1/norm, or nearly */
    float steps[64];
} search_scale;

QZ_INLINE void open_search(search_scale *s, const codebook *book, float norm, float inverse, int bits) {
    const int entries = bits == 2 || bits == 8 ? 0
                        : QZ_TABLE_BITS < 5    ? (bits < 5 ? 8 : 1 << (bits - 1))
                        : bits == 3            ? 16
                        : bits == 6            ? 64
                                               : 32;
    s->norm = norm;
    s->inverse = inverse;
    QZ_UNROLL
    for (int i = 0; i < entries; i += QZ_LANES) {
        v_i32 steps = bits_of_f32(mul_f32(load_f32(book->steps + i), set1_f32(norm)));
        if (QZ_TABLE_BITS < 5) steps = sub_i32(steps, set1_i32(1)); /* see search_sizes */
        store_f32(s->steps + i, f32_of_bits(steps));
    }
}

/* A code, and the value that it stands for or, where v is multiplied by its size instead, the size of that. */
typedef struct found_code {
    v_i32 code;
    v_f32 v, value;
} found_code;

/* Few boundaries: compared with one after the other. */
QZ_INLINE found_code search_4(v_f32 v, const codebook *book, const search_scale *s) {
    v_i32 code = set1_i32(0);
    QZ_UNROLL
    for (int i = 0; i < 3; i++)
        code = count_greater(code, v, mul_f32(set1_f32(book->boundaries[i]), set1_f32(s->norm)));
    return (found_code){code, v, look_up_f32(book->all_values, code, 3)};
}

#if QZ_TABLE_BITS == 5
/* Of 16 values, where 32 table entries are looked up by one instruction. */
QZ_INLINE found_code search_16_in_bins(v_f32 v, const codebook *book, const search_scale *s) {
    const v_f32 near = clamp_f32(v, mul_f32(set1_f32(s->norm), set1_f32(2.5f)));
    const v_i32 bin = bits_of_f32(fma_f32(near, mul_f32(set1_f32(s->inverse), set1_f32(6.0f)), set1_f32(0x1.8p23f)));
    const v_i32 base = bits_of_f32(look_up_f32((const float *)(const void *)book->bases, bin, 5));
    const v_i32 code = count_greater(base, v, look_up_f32(s->steps, bin, 5));
    return (found_code){code, v, look_up_f32(book->all_values, code, 4)};
}

/* The boundary that is nearest by the polynomial, and which the code lies next to. */
QZ_INLINE found_code search_elements(v_f32 v, const codebook *book, const search_scale *s, int bits) {
    const place_of_element *p = &places_of_elements[bits];
    const v_f32 clamped = clamp_f32(v, mul_f32(set1_f32(s->norm), set1_f32(p->most)));
    const v_f32 near = mul_f32(clamped, set1_f32(s->inverse)), middle = set1_f32((float)((1 << (bits - 1)) - 1));
    v_f32 slope = set1_f32(p->linear);
    if (bits > 3) {
        const v_f32 square = mul_f32(near, near);
        v_f32 rest = set1_f32(p->cube);
        if (bits > 5) rest = fma_f32(square, set1_f32(p->fifth), rest);
        slope = fma_f32(square, rest, slope);
    }
    const v_i32 place = i32_from_f32_nearest(fma_f32(near, slope, middle));
    const v_i32 code = count_greater(place, v, look_up_f32(s->steps, place, bits < 4 ? 4 : bits));
    return (found_code){code, v, look_up_f32(book->all_values, code, bits < 4 ? 4 : bits)};
}

#endif

/* By the size of v, with half of the table: one comparison is left. A tie counts for the outer side where v is
 * negative: as integers, |v| > b - 1 is then |v| >= b, and |v| - 1 > b - 1 is |v| > b. Zeros belong to the codes below,
 * as negative numbers do. Code half + k and its opposite, half - 1 - k, differ in all bits. */
QZ_INLINE found_code search_sizes(v_f32 v, const codebook *book, const search_scale *s, int bits) {
    const place_of_size *p = &places_of_sizes[bits];
    const int half = 1 << (bits - 1), table_bits = bits < 5 ? 3 : bits - 1;
    const v_i32 size = and_i32(bits_of_f32(v), set1_i32(0x7fffffff)), above = greater_i32(bits_of_f32(v), set1_i32(0));
    const v_f32 near = min_f32(f32_of_bits(size), mul_f32(set1_f32(s->norm), set1_f32(p->most)));
    v_f32 slope = set1_f32(p->linear * s->inverse);
    if (bits > 4) slope = fma_f32(near, set1_f32(p->square * s->inverse * s->inverse), slope);
    const v_i32 place = i32_from_f32_truncate(fma_f32(near, slope, set1_f32(p->at_0)));
    const v_i32 step = bits_of_f32(look_up_f32(s->steps, place, table_bits));
    const v_i32 k = sub_i32(place, greater_i32(add_i32(size, above), step));
    const v_i32 code = xor_i32(k, sub_i32(set1_i32(half - 1), above));
    return (found_code){code, f32_of_bits(size), look_up_f32(book->sizes, k, table_bits)};
}

/* Of many: a grid of fine bins says how many boundaries lie below each, and holds no more than one within, which is no
 * nearer than 7e-6 to an edge but where it is 0, an edge itself: the rounding to a bin, of at most 1e-6, does no harm.
 */
QZ_INLINE found_code search_many(v_f32 v, const codebook *book, const search_scale *s) {
    const float least = -QZ_KV_HALF_BINS, most = QZ_KV_HALF_BINS - 1;
    v_f32 bin = mul_f32(v, set1_f32(QZ_KV_BINS_PER_UNIT * s->inverse));
    bin = min_f32(max_f32(bin, set1_f32(least)), set1_f32(most));
    const v_i32 place = i32_from_f32_truncate(add_f32(bin, set1_f32(QZ_KV_HALF_BINS)));
    v_i32 code = gather_u8(book->grid, place);
    code = count_greater(code, v, mul_f32(look_up_f32(book->boundaries, code, 8), set1_f32(s->norm)));
    return (found_code){code, v, look_up_f32(book->values, code, 8)};
}

QZ_INLINE found_code search(v_f32 v, const codebook *book, const search_scale *s, int bits) {
    if (bits == 8) return search_many(v, book, s);
    if (bits == 2) return search_4(v, book, s);
#if QZ_TABLE_BITS == 5
    return bits == 4 ? search_16_in_bins(v, book, s) : search_elements(v, book, s, bits);
#else
    return search_sizes(v, book, s, bits);
#endif
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
    const int table_bits = bits < 5 ? 4 : bits, entries = bits == 8 ? 0 : 1 << table_bits;
    const float *values = bits == 8 ? book->values : book->all_values;
    float table[64]; /* of products */
    QZ_UNROLL
    for (int i = 0; i < entries; i += QZ_LANES) {
        store_f32(table + i, mul_f32(load_f32(values + i), set1_f32(factor)));
    }
    ptrdiff_t j = 0;
    for (; j + QZ_LANES <= count; j += QZ_LANES) {
        const v_i32 code = i32_from_u8(codes + j);
        const v_f32 value = look_up_f32(entries ? table : values, code, table_bits);
        store_f32(to + j, entries ? value : mul_f32(value, set1_f32(factor)));
    }
    for (; j < count; j++) to[j] = values[codes[j]] * factor;
}

static void values_of(float *to, const uint8_t *codes, ptrdiff_t count, const codebook *book, float factor, int bits) {
    switch (bits) {
    case 2:
    case 3:
    case 4: values_of_bits(to, codes, count, book, factor, 4); return;
    case 5: values_of_bits(to, codes, count, book, factor, 5); return;
    case 6: values_of_bits(to, codes, count, book, factor, 6); return;
    default: values_of_bits(to, codes, count, book, factor, 8);
    }
}
