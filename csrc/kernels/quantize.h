/* Affine quantization and its inverse, a run of groups at a time.
 *
 * The algorithm is MLX's (mlx/backend/cpu/quantized.cpp and mlx/backend/metal/kernels/quantized.h): the range [lo, hi]
 * of the group is spread over n = 2^bits - 1 steps, anchored so that the edge of larger magnitude is code 0, and
 * stretched so that real 0 is a code. All in float32; codes come from the unrounded scale and bias, and are those
 * of a real division even where steps_of does without.
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

QZ_INLINE void affine_ranges_of(affine_ranges *r, v_f32 lo, v_f32 hi, float steps, int profile) {
    const v_f32 zero = set1_f32(0.0f), one = set1_f32(1.0f);
    const v_i32 sign = set1_i32(INT32_MIN);
    if (profile == QZ_PROFILE_METAL) {
        v_i32 infinite = greater_i32(magnitude_of(hi), set1_i32(0x7f7fffff));
        hi = f32_of_bits(select_i32(infinite, bits_of_f32(hi), bits_of_f32(max_f32(hi, zero))));
    }
    v_f32 scale = div_f32(sub_f32(hi, lo), set1_f32(steps));
    scale = max_f32(scale, set1_f32(1e-7f));
    v_i32 low_edge = greater_i32(magnitude_of(lo), magnitude_of(hi)); /* floats that are not NaN sort by their bits */
    scale = f32_of_bits(select_i32(low_edge, bits_of_f32(scale), xor_i32(bits_of_f32(scale), sign)));
    v_f32 edge = f32_of_bits(select_i32(low_edge, bits_of_f32(lo), bits_of_f32(hi)));
    v_f32 code = round_any(div_f32(edge, scale), profile);
    v_i32 stretched = greater_i32(magnitude_of(code), set1_i32(0));
    v_f32 divisor = f32_of_bits(select_i32(stretched, bits_of_f32(code), bits_of_f32(one)));
    v_f32 quotient = canonical_nan(div_f32(edge, divisor));
    scale = f32_of_bits(select_i32(stretched, bits_of_f32(quotient), bits_of_f32(scale)));
    store_f32(r->scale, scale);
    store_f32(r->bias, f32_of_bits(and_i32(stretched, bits_of_f32(edge))));
#if QZ_FUSED
    const v_f32 minus_scale = f32_of_bits(xor_i32(bits_of_f32(scale), sign)), reciprocal = div_f32(one, scale);
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

/* The codes of a vector of bytes, each quarter of which has a range. */
QZ_INLINE v_bytes encode_bytes(const float *w, const affine_range r[4], int bits, int profile, int is_tame) {
    v_i32 v[4];
    QZ_UNROLL
    for (int j = 0; j < 4; j++) v[j] = encode_vector(w + j * QZ_LANES, &r[j], bits, profile, is_tame);
    const v_bytes codes = bytes_from_i32(v[0], v[1], v[2], v[3]);
    return is_tame && bits < 8 ? min_bytes(codes, (1 << bits) - 1) : codes;
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
    const float *w = b->w;
    for (ptrdiff_t i = 0; i < count; i += QZ_BYTES) {
        affine_range r[4];
        QZ_UNROLL
        for (int j = 0; j < 4; j++) r[j] = range_of_group(&b->ranges, (i + j * apart) >> shift);
        QZ_UNROLL
        for (int line = 0; line < QZ_BYTES / 16; line++) prefetch(next + line * 16 * step); /* if float32 */
        store_packed(packed, encode_bytes(w + i, r, bits, profile, is_tame), bits);
        next += QZ_BYTES * step;
        packed += QZ_BYTES / 8 * bits;
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

/* A batch is measured before the one before it is encoded: the chain of divisions that makes a range takes long, and
 * the processor can encode meanwhile. */
QZ_INLINE void quantize_affine(const qz_quantize_job *job, int bits, int profile) {
    const float steps = (float)((1 << bits) - 1);
    affine_batch batches[2];
    for (ptrdiff_t i = 0, first = 0; first < job->groups + QZ_LANES; i++, first += QZ_LANES) {
        if (first < job->groups) QZ_NAME(measure_batch)(&batches[i % 2], job, first, steps, profile);
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

/* Where there are no more than 16 results, of 16 bits each, they are decoded once and looked up. */
QZ_INLINE void look_up_group(char *to, const uint8_t *codes, ptrdiff_t count, float scale, float bias, qz_type products,
                             qz_type type, int stream) {
    static const uint8_t every_code[32] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    uint16_t results[32];
    decode_group((char *)results, every_code, 2 * QZ_LANES < 16 ? 16 : 2 * QZ_LANES, scale, bias, products, type, 0);
    const v_table table = load_table(results);
    for (ptrdiff_t i = 0; i < count; i += QZ_BYTES) {
        v_bytes found[2];
        look_up(found, table, codes + i);
        put(to + 2 * i, found[0], stream);
        put(to + 2 * i + QZ_BYTES, found[1], stream);
    }
}

/* The same one by one, for scales and biases that may make NaN, and for groups shorter than two vectors. */
static __attribute__((noinline)) void QZ_NAME(decode_each)(char *to, const uint8_t *codes, ptrdiff_t count, float scale,
                                                           float bias, qz_type products, qz_type type) {
    for (ptrdiff_t i = 0; i < count; i++) {
        float w = round_one((float)codes[i] * scale, products) + bias;
        w = round_one(w, products);
        store_one(to + i * (type == QZ_F32 ? 4 : 2), type, w == w ? w : qz_float_of(0x7fc00000u));
    }
}

/* The groups from `first` on: codes to results, by the types of both roundings. A table of results costs as much as
 * some 30 of them. */
QZ_INLINE void decode_groups(const qz_dequantize_job *job, const uint8_t *codes, ptrdiff_t first, ptrdiff_t groups,
                             int bits, qz_type products, qz_type type, int stream) {
    const ptrdiff_t size = job->group_size, step = size * (type == QZ_F32 ? 4 : 2);
    const float *const scales = job->scales + first, *const biases = job->biases + first;
    char *to = job->w + first * step;
    for (ptrdiff_t g = 0; g < groups; g++, to += step) {
        const float s = scales[g], b = biases[g];
        if (!isfinite(s) || !isfinite(b) || size % (2 * QZ_LANES) != 0) {
            QZ_NAME(decode_each)(to, codes + g * size, size, s, b, products, type);
        } else if (type != QZ_F32 && bits <= 4 && size >= 64) {
            look_up_group(to, codes + g * size, size, s, b, products, type, stream);
        } else {
            decode_group(to, codes + g * size, size, s, b, products, type, stream);
        }
    }
}

QZ_INLINE void decode_products(const qz_dequantize_job *job, const uint8_t *codes, ptrdiff_t first, ptrdiff_t groups,
                               int bits, qz_type type, int stream) {
    switch (job->round_products_to) {
    case QZ_F16: decode_groups(job, codes, first, groups, bits, QZ_F16, type, stream); return;
    case QZ_BF16: decode_groups(job, codes, first, groups, bits, QZ_BF16, type, stream); return;
    default: decode_groups(job, codes, first, groups, bits, QZ_F32, type, stream); return;
    }
}

QZ_INLINE void decode_to(const qz_dequantize_job *job, const uint8_t *codes, ptrdiff_t first, ptrdiff_t groups,
                         int bits, int stream) {
    switch (job->w_type) {
    case QZ_F16: decode_products(job, codes, first, groups, bits, QZ_F16, stream); return;
    case QZ_BF16: decode_products(job, codes, first, groups, bits, QZ_BF16, stream); return;
    default: decode_products(job, codes, first, groups, bits, QZ_F32, stream); return;
    }
}

/* Not inline: it is the same for all formats whose codes stand for themselves. */
static __attribute__((noinline)) void QZ_NAME(decode)(const qz_dequantize_job *job, const uint8_t *codes,
                                                      ptrdiff_t first, ptrdiff_t groups, int bits) {
    if (job->stream) {
        decode_to(job, codes, first, groups, bits, 1);
    } else {
        decode_to(job, codes, first, groups, bits, 0);
    }
}

QZ_INLINE void dequantize_affine(const qz_dequantize_job *job, int bits) {
    const ptrdiff_t size = job->group_size, most = DECODED / size;
    uint8_t codes[DECODED];
    for (ptrdiff_t first = 0; first < job->groups; first += most) {
        const ptrdiff_t left = job->groups - first, groups = left < most ? left : most;
        const uint8_t *packed = job->packed + first * size / 8 * bits;
        unpack_bits(codes, packed, bits, groups * size);
        for (ptrdiff_t line = 0; line < groups * size / 8 * bits; line += 64) {
            prefetch(packed + most * size / 8 * bits + line);
        }
        QZ_NAME(decode)(job, codes, first, groups, bits);
    }
    if (job->stream) stream_end();
}
