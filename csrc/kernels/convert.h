/* Stored floats to float32 and back, any stride. bfloat16 is rounded to nearest even and keeps NaN a NaN. */

QZ_INLINE v_f32 f32_from_bf16(const uint16_t *from) {
    v_i32 low = i32_from_u16(from);
    return f32_of_bits(shl_i32(low, 16));
}

QZ_INLINE v_i32 bf16_bits(v_f32 v) {
    v_i32 bits = bits_of_f32(v), magnitude = and_i32(bits, set1_i32(0x7fffffff));
    v_i32 odd = and_i32(shr_u32(bits, 16), set1_i32(1));
    v_i32 rounded = shr_u32(add_i32(bits, add_i32(odd, set1_i32(0x7fff))), 16);
    v_i32 quiet = or_i32(shr_u32(bits, 16), set1_i32(0x40));
    return select_i32(greater_i32(magnitude, set1_i32(0x7f800000)), quiet, rounded);
}

static float load_one(const char *from, qz_type type) {
    uint16_t half;
    double wide;
    float single;
    switch (type) {
    case QZ_F64: memcpy(&wide, from, sizeof wide); return (float)wide;
    case QZ_F16: memcpy(&half, from, sizeof half); return qz_f32_from_f16(half);
    case QZ_BF16: memcpy(&half, from, sizeof half); return qz_f32_from_bf16(half);
    default: memcpy(&single, from, sizeof single); return single;
    }
}

static void store_one(char *to, qz_type type, float value) {
    uint16_t half = type == QZ_F16 ? qz_f16_from_f32(value) : qz_bf16_from_f32(value);
    if (type == QZ_F32) {
        memcpy(to, &value, sizeof value);
    } else {
        memcpy(to, &half, sizeof half);
    }
}

/* Not inline: clang would copy this, vectorized for every type, into each of the matmul kernels. */
static __attribute__((noinline)) void QZ_NAME(load)(float *to, const char *from, ptrdiff_t stride, qz_type type,
                                                    ptrdiff_t count) {
    const uint16_t *half = (const uint16_t *)from;
    ptrdiff_t i = 0;
    if (type == QZ_F32 && stride == 4) {
        memcpy(to, from, (size_t)count * 4);
        return;
    }
    if (type == QZ_F16 && stride == 2) {
        for (; i + QZ_LANES <= count; i += QZ_LANES) store_f32(to + i, f32_from_f16(half + i));
    } else if (type == QZ_BF16 && stride == 2) {
        for (; i + QZ_LANES <= count; i += QZ_LANES) store_f32(to + i, f32_from_bf16(half + i));
    }
    for (; i < count; i++) to[i] = load_one(from + i * stride, type);
}

static void QZ_NAME(store)(char *to, ptrdiff_t stride, qz_type type, const float *from, ptrdiff_t count) {
    uint16_t *half = (uint16_t *)to;
    ptrdiff_t i = 0;
    if (type == QZ_F32 && stride == 4) {
        memcpy(to, from, (size_t)count * 4);
        return;
    }
    if (type == QZ_F16 && stride == 2) {
        for (; i + QZ_LANES <= count; i += QZ_LANES) store_f16_from_f32(half + i, load_f32(from + i));
    } else if (type == QZ_BF16 && stride == 2) {
        for (; i + QZ_LANES <= count; i += QZ_LANES) store_low_u16(half + i, bf16_bits(load_f32(from + i)));
    }
    for (; i < count; i++) store_one(to + i * stride, type, from[i]);
}
