/* Affine quantization and its inverse, a run of groups at a time.
 *
 * The algorithm is MLX's (mlx/backend/cpu/quantized.cpp and mlx/backend/metal/kernels/quantized.h): the range [lo, hi]
 * of the group is spread over n = 2^bits - 1 steps, anchored so that the edge of larger magnitude is code 0, and
 * stretched so that real 0 is a code; the two codes of 1 bit stand for lo and hi as they are. All in float32; codes
 * come from the unrounded scale and bias, and are those of a real division even where steps_of does without.
 *
 * The profiles differ in two points. "cpu" rounds ties to even. "metal" rounds ties away from zero, and its hi is at
 * least 0, so that an all-negative group is spread over [lo, 0]. Groups with infinities, and those of NaN alone, follow
 * "cpu" in both: NaN is ignored by the range and gets code 0.
 *
 * QZ_LANES groups form a batch: their ranges are worked out side by side, one in each lane. */

/* ---- quantize ---- */

QZ_INLINE v_i32 magnitude_of(v_f32 v) { return and_i32(bits_of_f32(v), set1_i32(0x7fffffff)); }

/* NaNs made by x86 and Arm differ in sign: results carry this one. */
QZ_INLINE v_f32 canonical_nan(v_f32 v) {
    v_i32 is_nan = greater_i32(magnitude_of(v), set1_i32(0x7f800000));
    return f32_of_bits(select_i32(is_nan, set1_i32(0x7fc00000), bits_of_f32(v)));
}

/* roundf ("metal") or rintf of any float, but for the sign of a zero. From 2^23 on, floats are integers. Below, half
 * away from zero is as in fake_quantize.h (in [2^22, 2^23), where a half is one ulp, v + h rounds to v or v + 1/2); and
 * adding 2^23 leaves no room for a fraction. */
QZ_INLINE v_f32 round_any(v_f32 v, int profile) {
    const v_i32 sign = and_i32(bits_of_f32(v), set1_i32(INT32_MIN));
    const v_i32 whole = greater_i32(magnitude_of(v), set1_i32(0x4affffff));
    const v_f32 inside = f32_of_bits(select_i32(whole, sign, bits_of_f32(v)));
    const float with = profile == QZ_PROFILE_METAL ? 0x1.fffffep-2f : 0x1p23f;
    const v_f32 shift = f32_of_bits(or_i32(sign, bits_of_f32(set1_f32(with))));
    v_f32 rounded = add_f32(inside, shift);
    rounded = profile == QZ_PROFILE_METAL ? trunc_f32(rounded) : sub_f32(rounded, shift);
    return f32_of_bits(select_i32(whole, bits_of_f32(v), bits_of_f32(rounded)));
}

/* What encoding needs to know of each group of a batch. */
typedef struct affine_ranges {
    float scale[QZ_LANES], bias[QZ_LANES];
#if QZ_FUSED
    float reciprocal[QZ_LANES], rest[QZ_LANES]; /* together 1 / scale */
#endif
    int is_tame; /* 1 where steps_of may be used on every group */
} affine_ranges;

/* Makes the edge of larger magnitude code 0, and real 0 a code. */
QZ_INLINE void stretch_to_zero(v_f32 *scales, v_f32 *biases, v_f32 lo, v_f32 hi, int profile) {
    const v_f32 one = set1_f32(1.0f);
    v_f32 scale = *scales;
    v_i32 low_edge = greater_i32(magnitude_of(lo), magnitude_of(hi)); /* floats that are not NaN sort by their bits */
    scale = f32_of_bits(select_i32(low_edge, bits_of_f32(scale), xor_i32(bits_of_f32(scale), set1_i32(INT32_MIN))));
    v_f32 edge = f32_of_bits(select_i32(low_edge, bits_of_f32(lo), bits_of_f32(hi)));
    v_f32 code = round_any(div_f32(edge, scale), profile);
    v_i32 stretched = greater_i32(magnitude_of(code), set1_i32(0));
    v_f32 divisor = f32_of_bits(select_i32(stretched, bits_of_f32(code), bits_of_f32(one)));
    *scales = f32_of_bits(select_i32(stretched, bits_of_f32(div_f32(edge, divisor)), bits_of_f32(scale)));
    *biases = f32_of_bits(and_i32(stretched, bits_of_f32(edge)));
}

QZ_INLINE void affine_ranges_of(affine_ranges *r, v_f32 lo, v_f32 hi, float steps, int profile) {
    const v_f32 zero = set1_f32(0.0f);
    if (profile == QZ_PROFILE_METAL) {
        v_i32 infinite = greater_i32(magnitude_of(hi), set1_i32(0x7f7fffff));
        hi = f32_of_bits(select_i32(infinite, bits_of_f32(hi), bits_of_f32(max_f32(hi, zero))));
    }
    v_f32 scale = div_f32(sub_f32(hi, lo), set1_f32(steps)), bias = lo;
    scale = max_f32(set1_f32(1e-7f), scale); /* NaN stays */
    if (steps > 1.0f) stretch_to_zero(&scale, &bias, lo, hi, profile);
    scale = canonical_nan(scale);
    store_f32(r->scale, scale);
    store_f32(r->bias, bias);
#if QZ_FUSED
    const v_f32 one = set1_f32(1.0f), reciprocal = div_f32(one, scale);
    const v_f32 minus_scale = f32_of_bits(xor_i32(bits_of_f32(scale), set1_i32(INT32_MIN)));
    store_f32(r->reciprocal, reciprocal);
    store_f32(r->rest, div_f32(fused_f32(reciprocal, minus_scale, one), scale));
#endif
    r->is_tame = QZ_FUSED && !any_i32(greater_i32(magnitude_of(scale), bits_of_f32(set1_f32(0x1p60f))));
}

/* Up to QZ_LANES groups and their ranges; `count` elements, whole vectors of bytes, stand at w. */
typedef struct affine_batch {
    const float *w;
    ptrdiff_t first, groups, count;
    affine_ranges ranges;
    float copy[QZ_LANES * QZ_MAX_GROUP]; /* of w, where that is not float32 or ends within a vector of bytes */
} affine_batch;

/* The least and the greatest element of each group, NaN ignored. Lanes beyond the groups repeat the last one. Elements
 * are converted on the way, once for encoding too. */
QZ_INLINE void measure_groups(v_f32 *lo, v_f32 *hi, affine_batch *b, const char *w, ptrdiff_t size, qz_type type) {
    v_f32 los[QZ_LANES], his[QZ_LANES];
    ptrdiff_t at = 0;
    for (ptrdiff_t g = 0; g < QZ_LANES; g++) {
        los[g] = set1_f32(INFINITY);
        his[g] = set1_f32(-INFINITY);
        QZ_UNROLL
        for (ptrdiff_t i = 0; i < size; i += QZ_LANES) {
            v_f32 v = load_floats(w, at + i, type);
            if (type != QZ_F32) store_f32(b->copy + at + i, v);
            los[g] = min_f32(v, los[g]); /* NaN in v leaves the second operand */
            his[g] = max_f32(v, his[g]);
        }
        if (g + 1 < b->groups) at += size;
    }
    *lo = least_of_each(los);
    *hi = greatest_of_each(his);
}

QZ_INLINE void measure_type(v_f32 *lo, v_f32 *hi, affine_batch *b, const char *w, ptrdiff_t size, qz_type type) {
    switch (size) {
    case 32: measure_groups(lo, hi, b, w, 32, type); return;
    case 64: measure_groups(lo, hi, b, w, 64, type); return;
    default: QZ_ASSUME(size == 128); measure_groups(lo, hi, b, w, 128, type);
    }
}

/* Not inline: it is the same for all widths. */
static __attribute__((noinline)) void QZ_NAME(measure_batch)(affine_batch *b, const qz_quantize_job *job,
                                                             ptrdiff_t first, float steps, int profile) {
    const ptrdiff_t size = job->group_size, left = job->groups - first;
    const char *w = job->w + first * size * (job->w_type == QZ_F32 ? 4 : 2);
    v_f32 lo, hi;
    b->first = first;
    b->groups = left < QZ_LANES ? left : QZ_LANES;
    b->count = b->groups * size;
    b->w = job->w_type == QZ_F32 ? (const float *)w : b->copy;
    if (b->count % QZ_BYTES != 0) {
        const ptrdiff_t missing = QZ_BYTES - b->count % QZ_BYTES;
        memset(b->copy + b->count, 0, (size_t)missing * sizeof *b->copy);
        if (job->w_type == QZ_F32) b->w = memcpy(b->copy, w, (size_t)b->count * sizeof *b->copy);
        b->count += missing;
    }
    switch (job->w_type) {
    case QZ_F16: measure_type(&lo, &hi, b, w, size, QZ_F16); break;
    case QZ_BF16: measure_type(&lo, &hi, b, w, size, QZ_BF16); break;
    default: measure_type(&lo, &hi, b, w, size, QZ_F32);
    }
    if (profile == QZ_PROFILE_METAL) {
        affine_ranges_of(&b->ranges, lo, hi, steps, QZ_PROFILE_METAL);
    } else {
        affine_ranges_of(&b->ranges, lo, hi, steps, QZ_PROFILE_CPU);
    }
}

/* The range of one group, in all lanes. */
typedef struct affine_range {
    v_f32 bias, scale;
#if QZ_FUSED
    v_f32 reciprocal, rest;
#endif
} affine_range;

QZ_INLINE affine_range range_of_group(const affine_ranges *r, ptrdiff_t group) {
    affine_range one;
    one.bias = set1_f32(r->bias[group]);
    one.scale = set1_f32(r->scale[group]);
#if QZ_FUSED
    one.reciprocal = set1_f32(r->reciprocal[group]);
    one.rest = set1_f32(r->rest[group]);
#endif
    return one;
}

#if QZ_FUSED
/* v / scale by way of the scale's reciprocal, with the same code as the quotient of a division.
 *
 * Let Q = v / scale, r the reciprocal, u = 2^-24 and d = 1 - r * scale: |d| is at most some u, and a multiple of 2^-47,
 * so that the fused operation gives it exactly. The rest is d / scale, which is 1 / scale - r, rounded by at most u^2
 * of 1 / scale; and v * rest is rounded by at most u^2 Q. So what is rounded last differs from Q by some 2u^2 Q, which
 * is less than 4u ulp(Q). The result thus is the quotient, Q rounded, unless a midpoint of two floats lies within 4u
 * ulp(Q) of Q; and its code is the quotient's unless that is one of the two midpoints next to k + 1/2 for a code k. For
 * a midpoint m, of 25 bits, |Q - m| = |v - m * scale| / |scale| is a multiple of u/2 ulp(Q) or more, so that few pairs
 * of 24-bit significands come so close: tests/campaigns/quotients.py lists them, and tests/test_quantize.py finds that
 * the result is the quotient for each. (It is not for 2^23 / (2^24 - 1) if the rest is d * r.)
 *
 * Powers of two change nothing as long as nothing under- or overflows. The scale is at least 1e-7 / 2 in magnitude;
 * where it is at most 2^60, all elements are finite, |v| <= (2^bits + 1) |scale|, and the rest is 0 or at least 2^-107.
 * So no operation overflows, and v * rest underflows only where Q is far below 1/2. NaN stays NaN. */
QZ_INLINE v_f32 steps_of(v_f32 v, const affine_range *r) { return fused_f32(v, r->reciprocal, mul_f32(v, r->rest)); }
#endif

/* Steps of tame groups, NaN apart, lie in [-1/2, 2^bits + 1): they need no clamping before they are bytes. */
QZ_INLINE v_i32 encode_vector(const float *w, const affine_range *r, int bits, int profile, int is_tame) {
    const v_f32 v = sub_f32(load_f32(w), r->bias);
#if QZ_FUSED
    if (is_tame) return round_steps(steps_of(v, r), profile);
#endif
    (void)is_tame;
    return encode_uint(div_f32(v, r->scale), bits, profile);
}

QZ_INLINE void encode_vectors(v_i32 v[4], const float *w, const affine_range r[4], int bits, int profile, int is_tame) {
    QZ_UNROLL
    for (int j = 0; j < 4; j++) v[j] = encode_vector(w + j * QZ_LANES, &r[j], bits, profile, is_tame);
}

/* The codes of a vector of bytes, each quarter of which has a range. */
QZ_INLINE void store_codes(uint8_t *packed, const float *w, const affine_range r[4], int bits, int profile,
                           int is_tame) {
    v_i32 v[4];
    encode_vectors(v, w, r, bits, profile, is_tame);
    const v_bytes codes = bytes_from_i32(v[0], v[1], v[2], v[3]);
    store_packed(packed, is_tame && bits < 8 ? min_bytes(codes, (1 << bits) - 1) : codes, bits);
}

/* The codes of two vectors of bytes, of 4 bits and in tame groups, each of which has one range. */
QZ_INLINE void store_nibble_codes(uint8_t *packed, const float *w, const affine_range *first,
                                  const affine_range *second, int profile) {
    v_bytes codes[2];
    for (int i = 0; i < 2; i++) {
        const affine_range one = i ? *second : *first, r[4] = {one, one, one, one};
        v_i32 v[4];
        encode_vectors(v, w + i * QZ_BYTES, r, 4, profile, 1);
        codes[i] = min_bytes(loose_bytes_from_i32(v[0], v[1], v[2], v[3]), 15);
    }
    store_loose_nibbles(packed, codes);
}

/* What will be read after as many elements as a vector holds bytes, if float32. */
QZ_INLINE void prefetch_next(const char *next, ptrdiff_t step) {
    QZ_UNROLL
    for (int line = 0; line < QZ_BYTES / 16; line++) prefetch(next + line * 16 * step);
}

/* The codes of a batch, whole vectors of bytes. `apart` is QZ_LANES where a vector of bytes may hold elements of
 * several groups, else 0.
 *
 * Encoding reads what measuring has just read: without the prefetches the memory would idle meanwhile, and the
 * processor wait for it at the next measuring. */
QZ_INLINE void affine_encode(const affine_batch *b, const qz_quantize_job *job, int bits, int profile, int is_tame,
                             int apart) {
    const ptrdiff_t size = job->group_size, step = job->step, count = b->count;
    const int shift = __builtin_ctzll((unsigned long long)size);
    const char *next = job->next + b->first * size * step;
    uint8_t *packed = job->packed + b->first * size / 8 * bits;
    ptrdiff_t i = 0;
    for (; bits == 4 && is_tame && apart == 0 && i + 2 * QZ_BYTES <= count; i += 2 * QZ_BYTES) {
        const affine_range first = range_of_group(&b->ranges, i >> shift);
        const affine_range second = range_of_group(&b->ranges, (i + QZ_BYTES) >> shift);
        prefetch_next(next + i * step, step);
        prefetch_next(next + (i + QZ_BYTES) * step, step);
        store_nibble_codes(packed + i / 2, b->w + i, &first, &second, profile);
    }
    for (; i < count; i += QZ_BYTES) {
        affine_range r[4];
        QZ_UNROLL
        for (int j = 0; j < 4; j++) r[j] = range_of_group(&b->ranges, (i + j * apart) >> shift);
        prefetch_next(next + i * step, step);
        store_codes(packed + i / 8 * bits, b->w + i, r, bits, profile, is_tame);
    }
}

QZ_INLINE void encode_batch(const affine_batch *b, const qz_quantize_job *job, int bits, int profile) {
    if (!QZ_FUSED || !b->ranges.is_tame) {
        affine_encode(b, job, bits, profile, 0, QZ_LANES);
    } else if (job->group_size < QZ_BYTES) {
        affine_encode(b, job, bits, profile, 1, QZ_LANES);
    } else {
        affine_encode(b, job, bits, profile, 1, 0);
    }
    if (b->groups == QZ_LANES) {
        store_f32(job->scales + b->first, load_f32(b->ranges.scale));
        store_f32(job->biases + b->first, load_f32(b->ranges.bias));
    } else {
        memcpy(job->scales + b->first, b->ranges.scale, (size_t)b->groups * sizeof *b->ranges.scale);
        memcpy(job->biases + b->first, b->ranges.bias, (size_t)b->groups * sizeof *b->ranges.bias);
    }
}

/* The sign of a zero that is a group's lo, and with 1 bit its bias, is the first zero's: vectors find either. A bias of
 * zero is one of the group's own elements, so that there is one to be found. */
QZ_INLINE void take_signs_of_zeros(affine_batch *b, ptrdiff_t size) {
    for (ptrdiff_t g = 0; g < b->groups; g++) {
        const float *w = b->w + g * size;
        if (b->ranges.bias[g] != 0.0f) continue;
        while (*w != 0.0f) w++;
        b->ranges.bias[g] = *w;
    }
}

/* A batch is measured before the one before it is encoded: the chain of divisions that makes a range takes long, and
 * the processor can encode meanwhile. */
QZ_INLINE void quantize_affine(const qz_quantize_job *job, int bits, int profile) {
    const float steps = (float)((1 << bits) - 1);
    affine_batch batches[2];
    for (ptrdiff_t i = 0, first = 0; first < job->groups + QZ_LANES; i++, first += QZ_LANES) {
        if (first < job->groups) {
            QZ_NAME(measure_batch)(&batches[i % 2], job, first, steps, profile);
            if (bits == 1) take_signs_of_zeros(&batches[i % 2], job->group_size);
        }
        if (i > 0) encode_batch(&batches[(i + 1) % 2], job, bits, profile);
    }
}

/* ---- dequantize ---- */

/* Elements decoded at a time: codes and results stay in L1. */
enum { DECODED = 2048 };

/* Rounded to the type, and back in float32. Not for NaN. */
QZ_INLINE v_f32 round_to_type(v_f32 v, qz_type type) {
    if (type == QZ_F16) return round_to_f16(v);
    return type == QZ_BF16 ? f32_of_bits(and_i32(bf16_rounded(v), set1_i32(INT32_MIN >> 15))) : v;
}

QZ_INLINE void put(char *to, v_bytes v, int stream) {
    if (stream) {
        stream_by_16(to, v);
    } else {
        store_bytes(to, v);
    }
}

/* Two vectors of results, not NaN. */
QZ_INLINE void put_results(char *to, ptrdiff_t i, qz_type type, v_f32 a, v_f32 b, int stream) {
    if (type == QZ_F32) {
        put(to + 4 * i, bytes_of_f32(a), stream);
        put(to + 4 * (i + QZ_LANES), bytes_of_f32(b), stream);
    } else {
        put(to + 2 * i, type == QZ_F16 ? f16_of_two(a, b) : high_u16_of_two(bf16_rounded(a), bf16_rounded(b)), stream);
    }
}

/* A float32 sum of two float16 (or bfloat16) values, rounded again to that type, is the type's own sum: float32 has
 * more than twice its precision and two bits. */
QZ_INLINE v_f32 decode_vector(const uint8_t *codes, v_f32 s, v_f32 b, qz_type products) {
    return add_f32(round_to_type(mul_f32(decode_uint(codes), s), products), b);
}

/* Finite scales and biases make no NaN, even where s * q overflows. */
QZ_INLINE void decode_group(char *to, const uint8_t *codes, ptrdiff_t count, float scale, float bias, qz_type products,
                            qz_type type, int stream) {
    const v_f32 s = set1_f32(scale), b = set1_f32(bias);
    for (ptrdiff_t i = 0; i < count; i += 2 * QZ_LANES) {
        v_f32 low = decode_vector(codes + i, s, b, products);
        v_f32 high = decode_vector(codes + i + QZ_LANES, s, b, products);
        if (products != type) { /* else the stores round */
            low = round_to_type(low, products);
            high = round_to_type(high, products);
        }
        put_results(to, i, type, low, high, stream);
    }
}

QZ_INLINE void decode_groups(char *to, const uint8_t *codes, const float *scales, const float *biases, ptrdiff_t groups,
                             ptrdiff_t size, ptrdiff_t step, qz_type products, qz_type type, int stream) {
    for (ptrdiff_t g = 0; g < groups; g++) {
        decode_group(to + g * size * (type == QZ_F32 ? 4 : 2), codes + g * step, size, scales[g], biases[g], products,
                     type, stream);
    }
}

/* Groups of `size` codes, `step` codes apart, by the types of both roundings. */
QZ_INLINE void decode_products(char *to, const uint8_t *codes, const float *scales, const float *biases,
                               ptrdiff_t groups, ptrdiff_t size, ptrdiff_t step, qz_type products, qz_type type,
                               int stream) {
    switch (products) {
    case QZ_F16: decode_groups(to, codes, scales, biases, groups, size, step, QZ_F16, type, stream); return;
    case QZ_BF16: decode_groups(to, codes, scales, biases, groups, size, step, QZ_BF16, type, stream); return;
    default: decode_groups(to, codes, scales, biases, groups, size, step, QZ_F32, type, stream);
    }
}

QZ_INLINE void decode_type(char *to, const uint8_t *codes, const float *scales, const float *biases, ptrdiff_t groups,
                           ptrdiff_t size, ptrdiff_t step, qz_type products, qz_type type, int stream) {
    switch (type) {
    case QZ_F16: decode_products(to, codes, scales, biases, groups, size, step, products, QZ_F16, stream); return;
    case QZ_BF16: decode_products(to, codes, scales, biases, groups, size, step, products, QZ_BF16, stream); return;
    default: decode_products(to, codes, scales, biases, groups, size, step, products, QZ_F32, stream);
    }
}

/* Not inline, as what follows: it is the same for all formats whose codes stand for themselves. */
static __attribute__((noinline)) void QZ_NAME(decode)(char *to, const uint8_t *codes, const float *scales,
                                                      const float *biases, ptrdiff_t groups,
                                                      const qz_dequantize_job *job) {
    const ptrdiff_t size = job->group_size;
    const qz_type products = job->round_products_to, type = job->w_type;
    if (job->stream) {
        decode_type(to, codes, scales, biases, groups, size, size, products, type, 1);
    } else {
        decode_type(to, codes, scales, biases, groups, size, size, products, type, 0);
    }
}

/* The same one by one, for scales and biases that may make NaN. */
static __attribute__((noinline)) void QZ_NAME(decode_each)(char *to, const uint8_t *codes, const float *scales,
                                                           const float *biases, ptrdiff_t groups,
                                                           const qz_dequantize_job *job) {
    const ptrdiff_t size = job->group_size, step = job->w_type == QZ_F32 ? 4 : 2;
    const qz_type products = job->round_products_to;
    for (ptrdiff_t i = 0; i < groups * size; i++) {
        float w = round_one((float)codes[i] * scales[i / size], products) + biases[i / size];
        w = round_one(w, products);
        store_one(to + i * step, job->w_type, w == w ? w : qz_float_of(0x7fc00000u));
    }
}

/* Groups of no more than 16 results, of 16 bits each, are decoded by a table: what every code stands for in them. A
 * table costs as much as some 30 results. */
enum { QZ_TABLED = DECODED / 64, QZ_TABLE = 2 * QZ_LANES < 16 ? 16 : 2 * QZ_LANES };

static __attribute__((noinline)) void QZ_NAME(tabulate)(uint16_t *tables, const float *scales, const float *biases,
                                                        ptrdiff_t groups, const qz_dequantize_job *job) {
    static const uint8_t codes[32] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const qz_type products = job->round_products_to;
    if (job->w_type == QZ_F16) {
        decode_products((char *)tables, codes, scales, biases, groups, QZ_TABLE, 0, products, QZ_F16, 0);
    } else {
        decode_products((char *)tables, codes, scales, biases, groups, QZ_TABLE, 0, products, QZ_BF16, 0);
    }
}

QZ_INLINE void look_up_groups(char *to, const uint8_t *packed, const uint16_t *tables, ptrdiff_t groups, ptrdiff_t size,
                              int bits, int stream) {
    for (ptrdiff_t g = 0; g < groups; g++) {
        const v_table table = load_table(tables + g * QZ_TABLE);
        for (ptrdiff_t i = 0; i < size; i += QZ_BYTES) {
            v_bytes found[2];
            look_up(found, table, packed, bits);
            put(to, found[0], stream);
            put(to + QZ_BYTES, found[1], stream);
            packed += QZ_BYTES / 8 * bits;
            to += 2 * QZ_BYTES;
        }
    }
}

QZ_INLINE int are_finite(const float *v, ptrdiff_t count) {
    v_i32 most = set1_i32(0);
    ptrdiff_t i = 0;
    for (; i + QZ_LANES <= count; i += QZ_LANES) most = max_i32(most, magnitude_of(load_f32(v + i)));
    for (; i < count; i++) most = max_i32(most, magnitude_of(set1_f32(v[i])));
    return !any_i32(greater_i32(most, set1_i32(0x7f7fffff)));
}

QZ_INLINE void dequantize_affine(const qz_dequantize_job *job, int bits) {
    const ptrdiff_t size = job->group_size, most = DECODED / size;
    const int is_tabled = bits <= 4 && job->w_type != QZ_F32 && size >= 64;
    uint8_t codes[DECODED];
    uint16_t tables[QZ_TABLED * QZ_TABLE];
    for (ptrdiff_t first = 0; first < job->groups; first += most) {
        const ptrdiff_t left = job->groups - first, groups = left < most ? left : most;
        const float *const scales = job->scales + first, *const biases = job->biases + first;
        const uint8_t *packed = job->packed + first * size / 8 * bits;
        char *to = job->w + first * size * (job->w_type == QZ_F32 ? 4 : 2);
        const int is_finite = are_finite(scales, groups) && are_finite(biases, groups);
        for (ptrdiff_t line = 0; line < groups * size / 8 * bits; line += 64) {
            prefetch(packed + most * size / 8 * bits + line);
        }
        if (is_tabled && is_finite) {
            QZ_NAME(tabulate)(tables, scales, biases, groups, job);
            if (job->stream) {
                look_up_groups(to, packed, tables, groups, size, bits, 1);
            } else {
                look_up_groups(to, packed, tables, groups, size, bits, 0);
            }
        } else {
            unpack_bits(codes, packed, bits, groups * size);
            (is_finite ? QZ_NAME(decode) : QZ_NAME(decode_each))(to, codes, scales, biases, groups, job);
        }
    }
    if (job->stream) stream_end();
}
