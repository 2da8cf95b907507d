/* Fake quantization: clip to [-1, 1], scale by S = 2^(bits-1) - 1, round half away from zero, multiply by float(1/S).
 * One bit has S = 0; there the result is the sign, with +1 for zeros. NaN stays NaN.
 *
 * Rounding: trunc(t + copysign(h, t)) with h the float below 0.5 equals roundf(t): for |t| < 2^22 the sum is exact or
 * rounds to the integer only from a half upwards, and h keeps 0.5 - 2^-25 (whose sum with 0.5 would round to 1) at 0.
 * tests/campaigns/fake_quantize_exhaustive.py compares all floats of [-1, 1] with exact arithmetic. */

QZ_INLINE v_f32 fake_quantize_vector(v_f32 x, v_f32 scale, v_f32 inverse) {
    const v_i32 sign = set1_i32(INT32_MIN);
    v_f32 clipped = max_f32(set1_f32(-1.0f), min_f32(set1_f32(1.0f), x)); /* this order of operands lets NaN through */
    v_f32 scaled = mul_f32(clipped, scale);
    v_i32 half = or_i32(and_i32(bits_of_f32(scaled), sign), bits_of_f32(set1_f32(0x1.fffffep-2f)));
    return mul_f32(trunc_f32(add_f32(scaled, f32_of_bits(half))), inverse);
}

/* A NaN's magnitude bits lie above those of infinity. -0 compares equal to 0 by its bits being INT32_MIN. */
QZ_INLINE v_f32 sign_vector(v_f32 x) {
    v_i32 bits = bits_of_f32(x), magnitude = and_i32(bits, set1_i32(0x7fffffff));
    v_i32 negative = and_i32(greater_i32(set1_i32(0), bits), greater_i32(magnitude, set1_i32(0)));
    v_i32 one = or_i32(bits_of_f32(set1_f32(1.0f)), and_i32(negative, set1_i32(INT32_MIN)));
    return f32_of_bits(select_i32(greater_i32(magnitude, set1_i32(0x7f800000)), bits, one));
}

QZ_INLINE v_f32 fake_quantize_any(v_f32 x, int bits, v_f32 scale, v_f32 inverse) {
    return bits == 1 ? sign_vector(x) : fake_quantize_vector(x, scale, inverse);
}

/* Fewer elements than a vector holds. */
QZ_INLINE void fake_quantize_few(float *y, const char *x, qz_type type, ptrdiff_t count, int bits, v_f32 scale,
                                 v_f32 inverse) {
    const size_t size = type == QZ_F32 ? 4 : 2;
    float few[QZ_LANES] = {0};
    memcpy(few, x, (size_t)count * size);
    store_f32(few, fake_quantize_any(load_floats((const char *)few, 0, type), bits, scale, inverse));
    memcpy(y, few, (size_t)count * sizeof *y);
}

QZ_INLINE void fake_quantize_span(float *y, const char *x, qz_type type, ptrdiff_t count, int bits, int stream) {
    const float levels = (float)((1 << (bits - 1)) - 1);
    const v_f32 scale = set1_f32(levels), inverse = set1_f32(bits == 1 ? 0.0f : 1.0f / levels);
    const ptrdiff_t size = type == QZ_F32 ? 4 : 2;
    ptrdiff_t i = 0;
    if (stream) { /* a streaming store wants alignment: the floats before it are done as a short tail is */
        const ptrdiff_t before = (ptrdiff_t)(-(uintptr_t)y / sizeof *y & (QZ_LANES - 1));
        i = before < count ? before : count;
        fake_quantize_few(y, x, type, i, bits, scale, inverse);
        for (; i + QZ_LANES <= count; i += QZ_LANES) {
            stream_f32(y + i, fake_quantize_any(load_floats(x, i, type), bits, scale, inverse));
        }
        stream_end();
    }
    for (; i + QZ_LANES <= count; i += QZ_LANES) {
        store_f32(y + i, fake_quantize_any(load_floats(x, i, type), bits, scale, inverse));
    }
    fake_quantize_few(y + i, x + i * size, type, count - i, bits, scale, inverse);
}

QZ_INLINE void fake_quantize_type(float *y, const char *x, qz_type type, ptrdiff_t count, int bits, int stream) {
    if (bits == 1) {
        fake_quantize_span(y, x, type, count, 1, stream);
    } else {
        QZ_ASSUME(bits >= 2);
        fake_quantize_span(y, x, type, count, bits, stream);
    }
}

static void QZ_NAME(fake_quantize)(float *y, const char *x, qz_type type, ptrdiff_t count, int bits, int stream) {
    switch (type) {
    case QZ_F16: fake_quantize_type(y, x, QZ_F16, count, bits, stream); return;
    case QZ_BF16: fake_quantize_type(y, x, QZ_BF16, count, bits, stream); return;
    default: fake_quantize_type(y, x, QZ_F32, count, bits, stream);
    }
}
