/* Floats to plain FP8 (E4M3) and back, elements in memory order: the codes of quantize_fp.h, without scales. */

QZ_INLINE v_bytes fp8_of_floats(const char *from, ptrdiff_t i, qz_type type) {
    v_i32 v[4];
    QZ_UNROLL
    for (int j = 0; j < 4; j++) v[j] = encode_fp8_e4m3(load_floats(from, i + j * QZ_LANES, type), QZ_PROFILE_METAL);
    return bytes_from_i32(v[0], v[1], v[2], v[3]);
}

QZ_INLINE void to_fp8_of_type(uint8_t *to, const char *from, ptrdiff_t count, qz_type type) {
    const ptrdiff_t size = type == QZ_F32 ? 4 : 2;
    ptrdiff_t i = 0;
    float few[QZ_BYTES] = {0};
    uint8_t codes[QZ_BYTES];
    for (; i + QZ_BYTES <= count; i += QZ_BYTES) store_bytes(to + i, fp8_of_floats(from, i, type));
    memcpy(few, from + i * size, (size_t)((count - i) * size));
    store_bytes(codes, fp8_of_floats((const char *)few, 0, type));
    memcpy(to + i, codes, (size_t)(count - i));
}

static void QZ_NAME(to_fp8)(uint8_t *to, const char *from, qz_type type, ptrdiff_t count) {
    switch (type) {
    case QZ_F16: to_fp8_of_type(to, from, count, QZ_F16); return;
    case QZ_BF16: to_fp8_of_type(to, from, count, QZ_BF16); return;
    default: to_fp8_of_type(to, from, count, QZ_F32);
    }
}

enum { QZ_FP8_TOGETHER = 32 };

QZ_INLINE void put_fp8(char *to, ptrdiff_t i, qz_type type, const uint8_t *codes) {
    v_f32 v[QZ_FP8_TOGETHER / QZ_LANES];
    const int odd = any_i32(f32_from_e4m3(v, codes));
    QZ_UNROLL
    for (int j = 0; j < QZ_FP8_TOGETHER / QZ_LANES; j++) {
        v[j] = odd ? decode_fp8_e4m3(i32_from_u8(codes + j * QZ_LANES)) : mul_f32(v[j], set1_f32(256.0f));
    }
    QZ_UNROLL
    for (int j = 0; j < QZ_FP8_TOGETHER / QZ_LANES; j += 2) put_results(to, i + j * QZ_LANES, type, v[j], v[j + 1], 0);
}

QZ_INLINE void from_fp8_to_type(char *to, const uint8_t *from, ptrdiff_t count, qz_type type) {
    const ptrdiff_t size = type == QZ_F32 ? 4 : 2;
    ptrdiff_t i = 0;
    uint8_t few[QZ_FP8_TOGETHER] = {0};
    float values[QZ_FP8_TOGETHER];
    for (; i + QZ_FP8_TOGETHER <= count; i += QZ_FP8_TOGETHER) put_fp8(to, i, type, from + i);
    memcpy(few, from + i, (size_t)(count - i));
    put_fp8((char *)values, 0, type, few);
    memcpy(to + i * size, values, (size_t)((count - i) * size));
}

static void QZ_NAME(from_fp8)(char *to, qz_type type, const uint8_t *from, ptrdiff_t count) {
    switch (type) {
    case QZ_F16: from_fp8_to_type(to, from, count, QZ_F16); return;
    case QZ_BF16: from_fp8_to_type(to, from, count, QZ_BF16); return;
    default: from_fp8_to_type(to, from, count, QZ_F32);
    }
}
