/* Rows of keys or values to codes and norms, and back: rotated (hadamard.h), divided by their norm, rounded to a
 * codebook made for normally distributed numbers (codebook.h).
 *
 * Version 1 is that of the crate mlx-native 0.6 to the byte, with all its special cases; TurboQuant (Zandieh, Daliri,
 * Hadian and Mirrokni 2025) describes the idea. Version 2 stores the scale that makes inner products unbiased, as EDEN
 * (Vargaftik et al. 2022) derives it: |v|^2 / <v, c>. */

typedef struct encoder {
    rotation_tables tables;
    codebook book;
    _Alignas(64) float x[QZ_MAX_HEAD_DIM];
    uint8_t codes[QZ_MAX_HEAD_DIM + QZ_PADDING]; /* of a row */
    uint8_t packed[QZ_MAX_HEAD_DIM + QZ_SPILL];
} encoder;

/* <z, c> and <c, c> over a block, c being the values of the codes; and which of them are wanted. */
enum { NO_PRODUCTS, ONLY_ZC, BOTH_PRODUCTS };
typedef struct products {
    float zc, cc;
} products;

QZ_INLINE void clear_beyond(v_f32 *v, ptrdiff_t j, ptrdiff_t block) {
    float lanes[QZ_LANES];
    store_f32(lanes, *v);
    for (int i = 0; i < QZ_LANES; i++) {
        if (j + i >= block) lanes[i] = 0.0f;
    }
    *v = load_f32(lanes);
}

/* Codes of a block of elements times factor, which are finite; and the products if they are wanted. x goes on with
 * zeros up to a multiple of QZ_PADDING. */
QZ_INLINE products encode_bits(uint8_t *codes, const float *x, ptrdiff_t block, float factor, const codebook *book,
                               int wanted, int bits) {
    v_f32 zc[QZ_CHAIN_VECTORS], cc[QZ_CHAIN_VECTORS];
    QZ_UNROLL
    for (int i = 0; i < QZ_CHAIN_VECTORS; i++) zc[i] = cc[i] = set1_f32(0.0f);
    for (ptrdiff_t j = 0; j < block; j += 4 * QZ_LANES) {
        v_i32 code[4];
        QZ_UNROLL
        for (int i = 0; i < 4; i++) {
            const v_f32 z = mul_f32(load_f32(x + j + i * QZ_LANES), set1_f32(factor));
            code[i] = search(z, book, bits);
            if (wanted == NO_PRODUCTS) continue;
            v_f32 c = look_up_f32(book->values, code[i], bits);
            zc[i % QZ_CHAIN_VECTORS] = add_f32(zc[i % QZ_CHAIN_VECTORS], mul_f32(z, c)); /* of zeros a zero */
            if (wanted == ONLY_ZC) continue;
            if (j + (i + 1) * QZ_LANES > block) clear_beyond(&c, j + i * QZ_LANES, block);
            cc[i % QZ_CHAIN_VECTORS] = add_f32(cc[i % QZ_CHAIN_VECTORS], mul_f32(c, c));
        }
        store_bytes(codes + j, bytes_from_i32(code[0], code[1], code[2], code[3]));
    }
    products sums = {0.0f, 0.0f};
    if (wanted != NO_PRODUCTS) sums.zc = sum_chains(zc);
    if (wanted == BOTH_PRODUCTS) sums.cc = sum_chains(cc);
    return sums;
}

QZ_INLINE products encode_wanted(uint8_t *codes, const float *x, ptrdiff_t block, float factor, const codebook *book,
                                 int wanted, int bits) {
    if (wanted == ONLY_ZC) return encode_bits(codes, x, block, factor, book, ONLY_ZC, bits);
    if (wanted == NO_PRODUCTS) return encode_bits(codes, x, block, factor, book, NO_PRODUCTS, bits);
    return encode_bits(codes, x, block, factor, book, BOTH_PRODUCTS, bits);
}

static products encode_block(uint8_t *codes, const float *x, ptrdiff_t block, float factor, const codebook *book,
                             int wanted, int bits) {
    switch (bits) {
    case 2: return encode_wanted(codes, x, block, factor, book, wanted, 2);
    case 3: return encode_wanted(codes, x, block, factor, book, wanted, 3);
    case 4: return encode_wanted(codes, x, block, factor, book, wanted, 4);
    case 5: return encode_wanted(codes, x, block, factor, book, wanted, 5);
    case 6: return encode_wanted(codes, x, block, factor, book, wanted, 6);
    default: return encode_wanted(codes, x, block, factor, book, wanted, 8);
    }
}

/* Codes as they are stored; count is a multiple of 8, or codes go on with what is left out of the copy. */
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

/* ---- version 1 ---- */

/* Divides the elements of a part by its norm, with the crate's operations, and returns that. */
static float normalise_1(float *y, const qz_kv_codec *codec) {
    const ptrdiff_t part = codec->block, dimension = codec->rotation.dimension;
    const float root = (float)sqrt((double)dimension), sum = sum_of_squares(y, padded(part));
    const float norm = sqrtf(dimension == 512 ? sum * (1.0f / 256.0f) : sum);
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

static void encode_row_1(encoder *e, const qz_kv_codec *codec, const float *from, float *norms) {
    const qz_rotation *rotation = &codec->rotation;
    const ptrdiff_t dimension = rotation->dimension, part = codec->block;
    const float factor = (float)(1.0 / sqrt((double)dimension));
    load_block(e->x, from, dimension, rotation->is_signed ? e->tables.flips : NULL);
    transform_block(e->x, rotation, &e->tables);
    store_block(e->x, e->x, padded(dimension), factor, NULL);
    for (ptrdiff_t j = 0; j < dimension; j += part) {
        const float norm = norms[j / part] = normalise_1(e->x + j, codec);
        if (norm <= 3.4e38f) {
            encode_block(e->codes + j, e->x + j, part, 1.0f, &e->book, NO_PRODUCTS, codec->bits);
        } else {
            search_any(e->codes + j, e->x + j, part, &e->book, codec->bits);
        }
    }
}

/* ---- version 2 ---- */

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

static float stored_scale(qz_kv_scale scale, float rho, ptrdiff_t block, products sums) {
    if (scale == QZ_KV_NORM) return rho;
    return scale == QZ_KV_UNBIASED ? rho * (float)block / sums.zc : rho * sums.zc / sums.cc;
}

/* From a block in e->x, transformed, and the root of its sum of squares. */
static float encode_transformed(encoder *e, const qz_kv_codec *codec, uint8_t *codes, float sum) {
    const ptrdiff_t block = codec->block;
    const float root = sqrtf(sum), factor = (float)sqrt((double)block) / root;
    const int wanted[] = {
        [QZ_KV_UNBIASED] = ONLY_ZC, [QZ_KV_LEAST_SQUARES] = BOTH_PRODUCTS, [QZ_KV_NORM] = NO_PRODUCTS};
    const products sums = encode_block(codes, e->x, block, factor, &e->book, wanted[codec->scale], codec->bits);
    return stored_scale(codec->scale, root / (float)block, block, sums);
}

/* A block whose sum of squares is out of range, or that holds what is not finite. */
static __attribute__((noinline)) float encode_unusual(encoder *e, const qz_kv_codec *codec, const float *from,
                                                      uint8_t *codes, const int32_t *flips) {
    float scaled[QZ_MAX_HEAD_DIM];
    int exponent = 0;
    const float largest = largest_size(from, codec->block, &exponent);
    if (!(largest > 0.0f)) {
        memset(codes, largest == 0.0f ? (1 << (codec->bits - 1)) - 1 : 0, (size_t)codec->block);
        return largest;
    }
    for (ptrdiff_t j = 0; j < codec->block; j++) scaled[j] = ldexpf(from[j], -exponent);
    const float sum = transform_and_sum(e->x, scaled, &codec->rotation, &e->tables, flips);
    return ldexpf(encode_transformed(e, codec, codes, sum), exponent);
}

static void encode_row_2(encoder *e, const qz_kv_codec *codec, const float *from, float *norms) {
    const ptrdiff_t dimension = codec->rotation.dimension, block = codec->block;
    for (ptrdiff_t j = 0; j < dimension; j += block) {
        const float sum = transform_and_sum(e->x, from + j, &codec->rotation, &e->tables, e->tables.flips + j);
        norms[j / block] = sum >= 0x1p-100f && sum <= 0x1p120f
                               ? encode_transformed(e, codec, e->codes + j, sum)
                               : encode_unusual(e, codec, from + j, e->codes + j, e->tables.flips + j);
    }
}

static void QZ_NAME(encode)(const qz_kv_encode_job *job) {
    const qz_kv_codec *codec = job->codec;
    const ptrdiff_t dimension = codec->rotation.dimension, bytes = qz_kv_row_bytes(codec);
    encoder e;
    open_rotation(&e.tables, &codec->rotation);
    open_codebook(&e.book, codec->bits, codec->version);
    for (ptrdiff_t row = 0; row < job->rows; row++) {
        const float *from = job->from + row * job->from_stride;
        float *norms = job->norms + row * qz_kv_row_norms(codec);
        if (codec->version == 1) {
            encode_row_1(&e, codec, from, norms);
            if (job->z) memcpy(job->z + row * job->z_stride, e.x, (size_t)dimension * sizeof *e.x);
        } else {
            encode_row_2(&e, codec, from, norms);
        }
        pack_codes(e.packed, e.codes, dimension, codec->stored_bits);
        memcpy(job->packed + row * job->packed_stride, e.packed, (size_t)bytes);
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
    const ptrdiff_t dimension = codec->rotation.dimension, part = codec->block;
    const ptrdiff_t parts = qz_kv_row_norms(codec);
    uint8_t codes[QZ_MAX_HEAD_DIM + QZ_PADDING];
    codebook book;
    open_codebook(&book, codec->bits, codec->version);
    for (ptrdiff_t row = 0; row < job->rows; row++) {
        float *to = job->to + row * job->to_stride;
        read_codes(codes, job->packed + row * job->packed_stride, codec);
        for (ptrdiff_t j = 0; j < dimension; j += part) {
            const float factor = decode_factor(codec, job->norms[row * parts + j / part]);
            values_of(to + j, codes + j, part, &book, factor, codec->bits);
        }
    }
    if (job->stays_rotated) return;
    const qz_rotate_job back = {.rotation = &codec->rotation,
                                .is_inverse = 1,
                                .from = job->to,
                                .to = job->to,
                                .rows = job->rows,
                                .from_stride = job->to_stride,
                                .to_stride = job->to_stride};
    QZ_NAME(rotate)(&back);
}
