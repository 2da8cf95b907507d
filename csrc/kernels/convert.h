/* Stored floats to float32 and back, any stride. bfloat16 is rounded to nearest even and keeps NaN a NaN. */

QZ_INLINE v_f32 f32_from_bf16(const uint16_t *from) {
    v_i32 low = i32_from_u16(from);
    return f32_of_bits(shl_i32(low, 16));
}

/* bfloat16 of what is not NaN, in the upper halves; the lower halves hold a rest of the rounding. */
QZ_INLINE v_i32 bf16_rounded(v_f32 v) {
    v_i32 bits = bits_of_f32(v), odd = and_i32(shr_u32(bits, 16), set1_i32(1));
    return add_i32(add_i32(bits, set1_i32(0x7fff)), odd);
}

/* The same of any float. */
QZ_INLINE v_i32 bf16_of_any(v_f32 v) {
    v_i32 bits = bits_of_f32(v), magnitude = and_i32(bits, set1_i32(0x7fffffff));
    v_i32 quiet = or_i32(bits, set1_i32(0x400000));
    return select_i32(greater_i32(magnitude, set1_i32(0x7f800000)), quiet, bf16_rounded(v));
}

/* QZ_LANES neighbours, the first of them element i. Not for float64. */
QZ_INLINE v_f32 load_floats(const char *from, ptrdiff_t i, qz_type type) {
    if (type == QZ_F16) return f32_from_f16((const uint16_t *)from + i);
    return type == QZ_BF16 ? f32_from_bf16((const uint16_t *)from + i) : load_f32((const float *)from + i);
}

/* Inline with a constant type, so that no loop asks for it again. */
QZ_INLINE float load_one(const char *from, qz_type type) {
    uint16_t half;
    double wide;
    float single;
    switch (type) {
    case QZ_E8M0: return qz_f32_from_e8m0(*(const uint8_t *)from);
    case QZ_E4M3: return qz_f32_from_e4m3(*(const uint8_t *)from);
    case QZ_F64: memcpy(&wide, from, sizeof wide); return (float)wide;
    case QZ_F16: memcpy(&half, from, sizeof half); return qz_f32_from_f16(half);
    case QZ_BF16: memcpy(&half, from, sizeof half); return qz_f32_from_bf16(half);
    default: memcpy(&single, from, sizeof single); return single;
    }
}

QZ_INLINE void store_one(char *to, qz_type type, float value) {
    uint16_t half = type == QZ_F16 ? qz_f16_from_f32(value) : qz_bf16_from_f32(value);
    if (type == QZ_F32) {
        memcpy(to, &value, sizeof value);
    } else {
        memcpy(to, &half, sizeof half);
    }
}

QZ_INLINE float round_one(float value, qz_type type) {
    if (type == QZ_F16) return qz_f32_from_f16(qz_f16_from_f32(value));
    return type == QZ_BF16 ? qz_f32_from_bf16(qz_bf16_from_f32(value)) : value;
}

QZ_INLINE void load_each(float *to, const char *from, ptrdiff_t stride, qz_type type, ptrdiff_t count) {
    QZ_UNROLL_BY_4
    for (ptrdiff_t i = 0; i < count; i++) to[i] = load_one(from + i * stride, type);
}

QZ_INLINE void store_each(char *to, ptrdiff_t stride, qz_type type, const float *from, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; i++) store_one(to + i * stride, type, from[i]);
}

/* Halves at `stride`, gathered where they are no neighbours: into a vector, since a load cannot be served by the
 * smaller stores that are on their way. */
typedef uint16_t halves __attribute__((vector_size(2 * QZ_LANES)));

QZ_INLINE void load_halves(float *to, const char *from, ptrdiff_t stride, qz_type type, ptrdiff_t count) {
    ptrdiff_t i = 0;
    if (stride == 2) {
        for (; i + QZ_LANES <= count; i += QZ_LANES) store_f32(to + i, load_floats(from, i, type));
    }
    for (; i + QZ_LANES <= count; i += QZ_LANES) {
        halves gathered = {0};
        QZ_UNROLL
        for (int j = 0; j < QZ_LANES; j++) {
            uint16_t half;
            memcpy(&half, from + (i + j) * stride, sizeof half);
            gathered[j] = half;
        }
        store_f32(to + i, load_floats((const char *)&gathered, 0, type));
    }
    load_each(to + i, from + i * stride, stride, type, count - i);
}

/* Scales of bytes, gathered in the same way. */
typedef uint8_t few_bytes __attribute__((vector_size(QZ_LANES)));

QZ_INLINE v_f32 scales_of_bytes(const uint8_t *from, qz_type type) {
    const v_i32 codes = i32_from_u8(from);
    return type == QZ_E8M0 ? decode_e8m0(codes) : decode_fp8_e4m3(codes);
}

QZ_INLINE void load_bytes(float *to, const char *from, ptrdiff_t stride, qz_type type, ptrdiff_t count) {
    ptrdiff_t i = 0;
    for (; stride == 1 && i + QZ_LANES <= count; i += QZ_LANES) {
        store_f32(to + i, scales_of_bytes((const uint8_t *)from + i, type));
    }
    for (; i + QZ_LANES <= count; i += QZ_LANES) {
        few_bytes gathered = {0};
        QZ_UNROLL
        for (int j = 0; j < QZ_LANES; j++) gathered[j] = *(const uint8_t *)(from + (i + j) * stride);
        store_f32(to + i, scales_of_bytes((const uint8_t *)&gathered, type));
    }
    load_each(to + i, from + i * stride, stride, type, count - i);
}

/* Not inline: clang would copy this, vectorized for every type, into each of the matmul kernels. */
static __attribute__((noinline)) void QZ_NAME(load)(float *to, const char *from, ptrdiff_t stride, qz_type type,
                                                    ptrdiff_t count) {
    switch (type) {
    case QZ_F16: load_halves(to, from, stride, QZ_F16, count); return;
    case QZ_BF16: load_halves(to, from, stride, QZ_BF16, count); return;
    case QZ_F64: load_each(to, from, stride, QZ_F64, count); return;
    case QZ_E8M0: load_bytes(to, from, stride, QZ_E8M0, count); return;
    case QZ_E4M3: load_bytes(to, from, stride, QZ_E4M3, count); return;
    default:
        if (stride == 4) {
            memcpy(to, from, (size_t)count * 4);
        } else {
            load_each(to, from, stride, QZ_F32, count);
        }
    }
}

static void QZ_NAME(store)(char *to, ptrdiff_t stride, qz_type type, const float *from, ptrdiff_t count) {
    uint16_t *half = (uint16_t *)to;
    ptrdiff_t i = 0;
    switch (type) {
    case QZ_F16:
        for (; stride == 2 && i + QZ_LANES <= count; i += QZ_LANES) store_f16_from_f32(half + i, load_f32(from + i));
        store_each(to + i * stride, stride, QZ_F16, from + i, count - i);
        return;
    case QZ_BF16:
        for (; stride == 2 && i + 2 * QZ_LANES <= count; i += 2 * QZ_LANES) {
            const v_f32 low = load_f32(from + i), high = load_f32(from + i + QZ_LANES);
            store_bytes(half + i, high_u16_of_two(bf16_of_any(low), bf16_of_any(high)));
        }
        store_each(to + i * stride, stride, QZ_BF16, from + i, count - i);
        return;
    default:
        if (stride == 4) {
            memcpy(to, from, (size_t)count * 4);
        } else {
            store_each(to, stride, QZ_F32, from, count);
        }
    }
}
