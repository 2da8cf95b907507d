/* Rows of keys or values to codes and norms, and back: rotated (hadamard.h), divided by their norm, rounded to a
 * codebook made for normally distributed numbers (codebook.h).
 *
 * Version 1 is that of the crate mlx-native 0.6 to the byte, with all its special cases; TurboQuant (Zandieh, Daliri,
 * Hadian and Mirrokni 2025) describes the idea. Version 2 stores the scale that makes inner products unbiased, as EDEN
 * (Vargaftik et al. 2022) derives it: |v|^2 / <v, c>. */

typedef struct encoder {
    rotation_tables tables;
    codebook book;
    _Alignas(64) float x[QZ_MAX_HEAD_DIM + QZ_PADDING];
    uint8_t codes[QZ_MAX_HEAD_DIM + QZ_PADDING];     /* one by one, where they are not made by vectors */
    uint8_t packed[QZ_MAX_HEAD_DIM + 64 + QZ_SPILL]; /* of a block */
} encoder;

/* Codes as they are stored, QZ_BYTES of them or more at a time; count is a multiple of 8, or codes go on with what is
 * left out of the copy. */
QZ_INLINE void pack_codes_of_bits(uint8_t *packed, const uint8_t *codes, ptrdiff_t count, int bits) {
    for (ptrdiff_t j = 0; j < count; j += QZ_BYTES) store_packed(packed + j / 8 * bits, load_codes(codes + j), bits);
}

static void pack_codes(uint8_t *packed, const uint8_t *codes, ptrdiff_t count, int bits) {
    switch (bits) {
    case 2: pack_codes_of_bits(packed, codes, count, 2); return;
    case 3: pack_codes_of_bits(packed, codes, count, 3); return;
    case 4: pack_codes_of_bits(packed, codes, count, 4); return;
    case 5: pack_codes_of_bits(packed, codes, count, 5); return;
    case 6: pack_codes_of_bits(packed, codes, count, 6); return;
    default: memcpy(packed, codes, (size_t)count);
    }
}

/* ---- a block ---- */

/* <v, c> and <c, c> over a block, c being the values of the codes; and which of them are wanted. */
enum { NO_PRODUCTS, ONLY_VC, BOTH_PRODUCTS };
typedef struct products {
    chain_sums vc, cc;
} products;

QZ_INLINE void clear_beyond(v_f32 *v, ptrdiff_t j, ptrdiff_t block) {
    float lanes[QZ_LANES];
    store_f32(lanes, *v);
    for (int i = 0; i < QZ_LANES; i++) {
        if (j + i >= block) lanes[i] = 0.0f;
    }
    *v = load_f32(lanes);
}

/* Packed codes of four vectors, element j of a block and what follows, beside boundaries times norm; and the chains of
 * products that are wanted. */
QZ_INLINE void encode_four(uint8_t *packed, products *sums, const v_f32 x[4], ptrdiff_t j, ptrdiff_t block,
                           const codebook *book, const search_scale *scale, int wanted, int bits, int stored_bits) {
    v_i32 codes[4];
    QZ_UNROLL
    for (int i = 0; i < 4; i++) {
        found_code found = search(x[i], book, scale, bits);
        codes[i] = found.code;
        if (wanted != NO_PRODUCTS) add_products(&sums->vc, i, found.v, found.value, 1); /* of zeros a zero */
        if (wanted != BOTH_PRODUCTS) continue;
        if (j + (i + 1) * QZ_LANES > block) clear_beyond(&found.value, j + i * QZ_LANES, block);
        add_products(&sums->cc, i, found.value, found.value, 1);
    }
    if (stored_bits == 4) {
        store_nibbles(packed, codes);
    } else {
        store_packed(packed, bytes_from_i32(codes[0], codes[1], codes[2], codes[3]), stored_bits);
    }
}

QZ_INLINE void store_products(float *vc, float *cc, const products *sums, int wanted) {
    if (wanted != NO_PRODUCTS) store_f32(vc, joined_chains(sums->vc.v));
    if (wanted == BOTH_PRODUCTS) store_f32(cc, joined_chains(sums->cc.v));
}

/* Packed codes of elements x, which are finite and go on with zeros up to a multiple of QZ_PADDING. */
QZ_INLINE void encode_bits(uint8_t *packed, float *vc, float *cc, const float *x, ptrdiff_t block, const codebook *book,
                           float norm, float inverse, int wanted, int bits, int stored_bits) {
    products sums;
    search_scale scale;
    clear_chains(&sums.vc);
    clear_chains(&sums.cc);
    open_search(&scale, book, norm, inverse, bits);
    for (ptrdiff_t j = 0; j < block; j += 4 * QZ_LANES, packed += stored_bits * QZ_LANES / 2) {
        v_f32 v[4];
        QZ_UNROLL
        for (int i = 0; i < 4; i++) v[i] = load_f32(x + j + i * QZ_LANES);
        encode_four(packed, &sums, v, j, block, book, &scale, wanted, bits, stored_bits);
    }
    store_products(vc, cc, &sums, wanted);
}

QZ_INLINE void encode_wanted(uint8_t *packed, float *vc, float *cc, const float *x, ptrdiff_t block,
                             const codebook *book, float norm, float inverse, int wanted, int bits) {
    if (wanted == ONLY_VC) {
        encode_bits(packed, vc, cc, x, block, book, norm, inverse, ONLY_VC, bits, bits);
    } else if (wanted == NO_PRODUCTS) {
        encode_bits(packed, vc, cc, x, block, book, norm, inverse, NO_PRODUCTS, bits, bits);
    } else {
        encode_bits(packed, vc, cc, x, block, book, norm, inverse, BOTH_PRODUCTS, bits, bits);
    }
}

static void encode_block(uint8_t *packed, float *vc, float *cc, const float *x, ptrdiff_t block, const codebook *book,
                         float norm, float inverse, int wanted, int bits) {
    switch (bits) {
    case 2: encode_wanted(packed, vc, cc, x, block, book, norm, inverse, wanted, 2); return;
    case 3: encode_wanted(packed, vc, cc, x, block, book, norm, inverse, wanted, 3); return;
    case 4: encode_wanted(packed, vc, cc, x, block, book, norm, inverse, wanted, 4); return;
    case 5: encode_wanted(packed, vc, cc, x, block, book, norm, inverse, wanted, 5); return;
    case 6: encode_wanted(packed, vc, cc, x, block, book, norm, inverse, wanted, 6); return;
    default: encode_wanted(packed, vc, cc, x, block, book, norm, inverse, wanted, 8);
    }
}

/* ---- version 1 ---- */

/* Divides the elements of a part by its norm, with the crate's operations, and returns that. */
static float normalise_1(float *y, const qz_kv_codec *codec) {
    const ptrdiff_t part = codec->block, dimension = codec->rotation.dimension;
    float chains[QZ_LANES * QZ_LANES], sums[QZ_LANES];
    store_square_chains(chains, y, padded(part), 0);
    sum_chains(sums, chains, 1);
    const float root = (float)sqrt((double)dimension);
    const float norm = sqrtf(dimension == 512 ? sums[0] * (1.0f / 256.0f) : sums[0]);
    const float scale = dimension == 512 ? codec->factor : root, inverse = norm > 1e-10f ? 1.0f / norm : 0.0f;
    for (ptrdiff_t j = 0; j < padded(part); j += QZ_LANES) {
        v_f32 v = load_f32(y + j);
        if (codec->rotation.is_signed) {
            v = mul_f32(v, set1_f32(inverse));
        } else {
            v = norm > 1e-10f ? div_f32(v, set1_f32(norm)) : set1_f32(0.0f);
        }
        store_f32(y + j, mul_f32(v, set1_f32(scale)));
    }
    return norm;
}

static void encode_part_1(uint8_t *packed, const float *z, ptrdiff_t part, const codebook *book, int bits) {
    switch (bits) {
    case 4: encode_bits(packed, NULL, NULL, z, part, book, 1.0f, 1.0f, NO_PRODUCTS, 4, 4); return;
    case 5: encode_bits(packed, NULL, NULL, z, part, book, 1.0f, 1.0f, NO_PRODUCTS, 5, 8); return;
    case 6: encode_bits(packed, NULL, NULL, z, part, book, 1.0f, 1.0f, NO_PRODUCTS, 6, 8); return;
    default: encode_bits(packed, NULL, NULL, z, part, book, 1.0f, 1.0f, NO_PRODUCTS, 8, 8);
    }
}

static void encode_row_1(encoder *e, const qz_kv_codec *codec, const float *from, uint8_t *packed, float *norms) {
    const qz_rotation *rotation = &codec->rotation;
    const ptrdiff_t dimension = rotation->dimension, part = codec->block;
    const pass_ends ends = {e->tables.flips, (float)(1.0 / sqrt((double)dimension))};
    if (is_even_block(rotation)) {
        transform_block(e->x, from, dimension, QZ_TURN_FIRST | QZ_SCALE, &ends);
    } else {
        transform_odd_block(e->x, from, rotation, &e->tables, NULL);
        store_block(e->x, e->x, padded(dimension), ends.factor, NULL);
    }
    for (ptrdiff_t j = 0; j < dimension; j += part) {
        const float norm = norms[j / part] = normalise_1(e->x + j, codec);
        if (norm <= 3.4e38f) {
            encode_part_1(e->packed, e->x + j, part, &e->book, codec->bits);
        } else {
            search_any(e->codes, e->x + j, part, &e->book, codec->bits);
            pack_codes(e->packed, e->codes, part, codec->stored_bits);
        }
        memcpy(packed + j * codec->stored_bits / 8, e->packed, (size_t)(part * codec->stored_bits / 8));
    }
}

/* ---- version 2 ---- */

/* As many blocks as the sums of chains are made of at a time. */
typedef struct some_blocks {
    ptrdiff_t count;
    const float *from[QZ_LANES];
    const int32_t *flips[QZ_LANES];
    uint8_t *packed[QZ_LANES];
    float *norms; /* that follow each other */
} some_blocks;

/* Whether a sum of squares and what is made of it stay clear of overflow and of subnormal numbers. */
QZ_INLINE int is_usual(float squares) { return squares >= 0x1p-100f && squares <= 0x1p100f; }

/* The largest magnitude, NaN if an element is not finite; largest = m * 2^exponent with m in [0.5, 1), as frexp says.
 */
static float largest_size(const float *from, ptrdiff_t block, int *exponent) {
    float largest = 0.0f;
    for (ptrdiff_t j = 0; j < block; j++) {
        const float size = fabsf(from[j]);
        if (!(size <= 3.40282347e38f)) return NAN;
        if (size > largest) largest = size;
    }
    frexpf(largest, exponent);
    return largest;
}

/* A block whose sum of squares is out of range, or that holds what is not finite, as one whose largest element is next
 * to 1; returns its stored scale. */
static __attribute__((noinline)) float encode_unusual(encoder *e, const qz_kv_codec *codec, const some_blocks *blocks,
                                                      ptrdiff_t index);

/* A block beside its norm. */
static void encode_one(encoder *e, const qz_kv_codec *codec, const some_blocks *blocks, ptrdiff_t index, float norm,
                       float inverse, float *vc, float *cc) {
    static const int wanted[] = {
        [QZ_KV_UNBIASED] = ONLY_VC, [QZ_KV_LEAST_SQUARES] = BOTH_PRODUCTS, [QZ_KV_NORM] = NO_PRODUCTS};
    const ptrdiff_t block = codec->block;
    const pass_ends ends = {blocks->flips[index], 1.0f};
    const int bits = codec->bits, writes_no_more = (bits == 4 || bits == 8) && block % QZ_PADDING == 0;
    if (is_even_block(&codec->rotation)) {
        transform_block(e->x, blocks->from[index], block, QZ_TURN_FIRST, &ends);
    } else {
        transform_odd_block(e->x, blocks->from[index], &codec->rotation, &e->tables, ends.flips);
    }
    uint8_t *packed = writes_no_more ? blocks->packed[index] : e->packed;
    encode_block(packed, vc, cc, e->x, block, &e->book, norm, inverse, wanted[codec->scale], bits);
    if (!writes_no_more) memcpy(blocks->packed[index], e->packed, (size_t)(block / 8 * bits));
}

#if QZ_LANES == 16
/* Blocks of 128, 4 bits each, are transformed two side by side, so that a CPU finds enough to do at a time, beside
 * their sums of squares; all of some_blocks, before the first of them is searched. */
enum { SIDES = 2, SIDE_VECTORS = 8, SIDE_BLOCK = SIDE_VECTORS * QZ_LANES };
_Static_assert(QZ_MAX_HEAD_DIM >= QZ_LANES * SIDE_BLOCK, "an encoder's x holds as many blocks as some_blocks");

QZ_INLINE void transform_sides(float *x, float *squares, const some_blocks *blocks, ptrdiff_t first, int sides) {
    v_f32 v[SIDES * SIDE_VECTORS];
    QZ_UNROLL
    for (int side = 0; side < sides; side++) {
        chain_sums sums;
        clear_chains(&sums);
        QZ_UNROLL
        for (int i = 0; i < SIDE_VECTORS; i++) {
            const float *from = blocks->from[first + side] + i * QZ_LANES;
            v_f32 *of_side = v + side * SIDE_VECTORS;
            of_side[i] = turn(load_f32(from), blocks->flips[first + side] + i * QZ_LANES);
            add_products(&sums, i, of_side[i], of_side[i], 1);
            __builtin_prefetch(from + QZ_LANES * SIDE_BLOCK); /* of those that come next */
        }
        store_f32(squares + (first + side) * QZ_LANES, sums.v[0]);
    }
    butterflies_within(v, sides * SIDE_VECTORS, QZ_LANES);
    QZ_UNROLL
    for (int side = 0; side < sides; side++) {
        butterflies_between(v + side * SIDE_VECTORS, SIDE_VECTORS);
        QZ_UNROLL
        for (int i = 0; i < SIDE_VECTORS; i++)
            store_f32(x + (first + side) * SIDE_BLOCK + i * QZ_LANES, v[side * SIDE_VECTORS + i]);
    }
}

static __attribute__((noinline)) void QZ_NAME(transform_128)(float *x, float *squares, const some_blocks *blocks) {
    ptrdiff_t i = 0;
    for (; i + SIDES <= blocks->count; i += SIDES) transform_sides(x, squares, blocks, i, SIDES);
    if (i < blocks->count) transform_sides(x, squares, blocks, i, 1);
}

static __attribute__((noinline)) void QZ_NAME(search_128)(const some_blocks *blocks, const float *x, const codebook *of,
                                                          const float *norms, const float *inverses, float *vc) {
    const codebook book = *of; /* which what is written cannot change */
    for (ptrdiff_t i = 0; i < blocks->count; i++)
        encode_bits(blocks->packed[i], vc + i * QZ_LANES, NULL, x + i * SIDE_BLOCK, SIDE_BLOCK, &book, norms[i],
                    inverses[i], ONLY_VC, 4, 4);
}

/* Whether all blocks went that way. */
static int encode_sides(encoder *e, const qz_kv_codec *codec, const some_blocks *blocks) {
    _Alignas(64) float chains[QZ_LANES * QZ_LANES];
    float squares[QZ_LANES], norms[QZ_LANES], inverses[QZ_LANES], vc[QZ_LANES];
    const float root = (float)sqrt((double)SIDE_BLOCK);
    int all_usual = 1;
    if (codec->bits != 4 || codec->scale != QZ_KV_UNBIASED || codec->block != SIDE_BLOCK || codec->rotation.order != 1)
        return 0;
    QZ_NAME(transform_128)(e->x, chains, blocks);
    sum_chains(squares, chains, blocks->count);
    for (ptrdiff_t i = 0; i < blocks->count; i++) all_usual &= is_usual(squares[i]);
    if (!all_usual) return 0;
    for (int i = 0; i < QZ_LANES; i++) norms[i] = sqrtf(squares[i]);
    for (int i = 0; i < QZ_LANES; i++) inverses[i] = 1.0f / norms[i];
    QZ_NAME(search_128)(blocks, e->x, &e->book, norms, inverses, chains);
    sum_chains(vc, chains, blocks->count);
    for (int i = 0; i < QZ_LANES; i++) vc[i] = squares[i] * root / vc[i];
    memcpy(blocks->norms, vc, (size_t)blocks->count * sizeof *vc);
    return 1;
}
#else
static int encode_sides(encoder *e, const qz_kv_codec *codec, const some_blocks *blocks) {
    (void)e;
    (void)codec;
    (void)blocks;
    return 0;
}
#endif

/* With x the elements and v those of the transform, |v|^2 = block |x|^2: an element divided by the root of the mean
 * square of all is v/|x|. Boundaries times |x| do as well. */
static void encode_blocks(encoder *e, const qz_kv_codec *codec, const some_blocks *blocks) {
    const ptrdiff_t count = blocks->count;
    const float root = (float)sqrt((double)codec->block);
    float chains[3][QZ_LANES * QZ_LANES], squares[QZ_LANES], norms[QZ_LANES], inverses[QZ_LANES];
    float vc[QZ_LANES], cc[QZ_LANES];
    if (encode_sides(e, codec, blocks)) return;
    for (ptrdiff_t i = 0; i < count; i++)
        store_square_chains(chains[0] + i * QZ_LANES, blocks->from[i], codec->block, 1);
    sum_chains(squares, chains[0], count);
    for (int i = 0; i < QZ_LANES; i++) norms[i] = sqrtf(squares[i]);
    for (int i = 0; i < QZ_LANES; i++) inverses[i] = 1.0f / norms[i];
    for (ptrdiff_t i = 0; i < count; i++) {
        float *of_vc = chains[1] + i * QZ_LANES, *of_cc = chains[2] + i * QZ_LANES;
        memset(of_cc, 0, QZ_LANES * sizeof *of_cc);
        if (is_usual(squares[i])) {
            encode_one(e, codec, blocks, i, norms[i], inverses[i], of_vc, of_cc);
        } else {
            memset(of_vc, 0, QZ_LANES * sizeof *of_vc);
        }
    }
    if (codec->scale != QZ_KV_NORM) sum_chains(vc, chains[1], count);
    if (codec->scale == QZ_KV_LEAST_SQUARES) sum_chains(cc, chains[2], count);
    for (ptrdiff_t i = 0; i < count; i++) {
        blocks->norms[i] = !is_usual(squares[i])            ? encode_unusual(e, codec, blocks, i)
                           : codec->scale == QZ_KV_NORM     ? norms[i] / root
                           : codec->scale == QZ_KV_UNBIASED ? squares[i] * root / vc[i]
                                                            : vc[i] / (root * cc[i]);
    }
}

static __attribute__((noinline)) float encode_unusual(encoder *e, const qz_kv_codec *codec, const some_blocks *blocks,
                                                      ptrdiff_t index) {
    float scaled[QZ_MAX_HEAD_DIM], scale;
    int exponent = 0;
    const float *from = blocks->from[index], largest = largest_size(from, codec->block, &exponent);
    if (!(largest > 0.0f)) {
        memset(e->codes, largest == 0.0f ? (1 << (codec->bits - 1)) - 1 : 0, (size_t)codec->block);
        pack_codes(e->packed, e->codes, codec->block, codec->bits);
        memcpy(blocks->packed[index], e->packed, (size_t)(codec->block / 8 * codec->bits));
        return largest;
    }
    for (ptrdiff_t j = 0; j < codec->block; j++) scaled[j] = ldexpf(from[j], -exponent);
    const some_blocks one = {1, {scaled}, {blocks->flips[index]}, {blocks->packed[index]}, &scale};
    encode_blocks(e, codec, &one);
    return ldexpf(scale, exponent);
}

static void encode_rows_2(encoder *e, const qz_kv_encode_job *job) {
    const qz_kv_codec *codec = job->codec;
    some_blocks blocks = {.count = 0, .norms = job->norms};
    for (ptrdiff_t row = 0; row < job->rows; row++) {
        for (ptrdiff_t j = 0; j < codec->rotation.dimension; j += codec->block) {
            blocks.from[blocks.count] = job->from + row * job->from_stride + j;
            blocks.flips[blocks.count] = e->tables.flips + j;
            blocks.packed[blocks.count] = job->packed + row * job->packed_stride + j / 8 * codec->bits;
            if (++blocks.count < QZ_LANES) continue;
            encode_blocks(e, codec, &blocks);
            blocks.norms += blocks.count;
            blocks.count = 0;
        }
    }
    if (blocks.count > 0) encode_blocks(e, codec, &blocks);
}

static void QZ_NAME(encode)(const qz_kv_encode_job *job) {
    const qz_kv_codec *codec = job->codec;
    const ptrdiff_t dimension = codec->rotation.dimension;
    encoder e;
    open_rotation(&e.tables, &codec->rotation);
    open_codebook(&e.book, codec->bits, codec->version);
    if (codec->version == 2) {
        encode_rows_2(&e, job);
        return;
    }
    for (ptrdiff_t row = 0; row < job->rows; row++) {
        encode_row_1(&e, codec, job->from + row * job->from_stride, job->packed + row * job->packed_stride,
                     job->norms + row * qz_kv_row_norms(codec));
        if (job->z) memcpy(job->z + row * job->z_stride, e.x, (size_t)dimension * sizeof *e.x);
    }
}

/* ---- the way back ---- */

static void read_codes(uint8_t *codes, const uint8_t *packed, const qz_kv_codec *codec) {
    const ptrdiff_t dimension = codec->rotation.dimension;
    uint8_t few[8] = {0};
    if (dimension < 8) { /* unpack_bits takes eight codes at a time */
        memcpy(few, packed, (size_t)qz_kv_row_bytes(codec));
        packed = few;
    }
    unpack_bits(codes, packed, codec->stored_bits, dimension < 8 ? 8 : dimension);
    if (codec->bits == codec->stored_bits) return;
    for (ptrdiff_t j = 0; j < dimension; j++) codes[j] &= (uint8_t)((1 << codec->bits) - 1);
}

/* What the values of a part are multiplied by. */
static float decode_factor(const qz_kv_codec *codec, float norm) {
    const ptrdiff_t dimension = codec->rotation.dimension;
    if (codec->version == 2) return norm;
    return dimension == 512 ? norm / codec->factor : norm * (float)(1.0 / sqrt((double)dimension));
}

static void QZ_NAME(decode)(const qz_kv_decode_job *job) {
    const qz_kv_codec *codec = job->codec;
    const qz_rotation *rotation = &codec->rotation;
    const ptrdiff_t dimension = rotation->dimension, part = codec->block, parts = qz_kv_row_norms(codec);
    const float factor = (float)(1.0 / sqrt((double)rotation->block));
    uint8_t codes[QZ_MAX_HEAD_DIM + QZ_PADDING];
    _Alignas(64) float values[QZ_MAX_HEAD_DIM], x[QZ_MAX_HEAD_DIM];
    rotation_tables tables;
    codebook book;
    open_codebook(&book, codec->bits, codec->version);
    if (!job->stays_rotated) open_rotation(&tables, rotation);
    for (ptrdiff_t row = 0; row < job->rows; row++) {
        float *to = job->to + row * job->to_stride, *rotated = job->stays_rotated ? to : values;
        read_codes(codes, job->packed + row * job->packed_stride, codec);
        for (ptrdiff_t j = 0; j < dimension; j += part) {
            const float times = decode_factor(codec, job->norms[row * parts + j / part]);
            values_of(rotated + j, codes + j, part, &book, times, codec->bits);
        }
        for (ptrdiff_t j = 0; !job->stays_rotated && j < dimension; j += rotation->block) {
            rotate_back(to + j, values + j, x, rotation, &tables, tables.flips + j, factor);
        }
    }
}
