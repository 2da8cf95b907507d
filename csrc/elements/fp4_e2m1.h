/* FP4 (E2M1): 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; the upper bit is the sign. */
#include "minifloat.h"

/* The first code, in rising order, of those nearest to |v| by a float32 difference: ties go toward zero, and so does
 * what is so large that all differences are equal; NaN becomes 0, and 0 has no sign. This is how MLX's CPU backend
 * encodes. */
QZ_INLINE v_i32 encode_first_nearest_fp4(v_f32 v) {
    static const float values[] = {0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
    const v_i32 absolute = set1_i32(0x7fffffff);
    const v_i32 magnitude = and_i32(bits_of_f32(v), absolute), sign = shl_i32(shr_u32(bits_of_f32(v), 31), 3);
    v_i32 least = magnitude, code = set1_i32(0); /* floats that are not negative sort by their bits, NaN last */
    for (int i = 0; i < 7; i++) {
        v_i32 distance = bits_of_f32(sub_f32(f32_of_bits(magnitude), set1_f32(values[i])));
        distance = and_i32(distance, absolute);
        const v_i32 nearer = greater_i32(least, distance);
        least = select_i32(nearer, distance, least);
        code = select_i32(nearer, set1_i32(i + 1), code);
    }
    return or_i32(code, and_i32(sign, greater_i32(code, set1_i32(0))));
}

/* "metal": ties to the even code, and zeros keep their sign. */
QZ_INLINE v_i32 encode_fp4_e2m1(v_f32 v, int profile) {
    return profile == QZ_PROFILE_METAL ? encode_minifloat(v, 4, 1, 1, 7) : encode_first_nearest_fp4(v);
}

QZ_INLINE v_f32 decode_fp4_e2m1(v_i32 code) { return decode_minifloat(code, 4, 1, 1); }

/* 32 packed codes, and whether one is NaN: none is. */
QZ_INLINE int decode_32_fp4_e2m1(v_f32 to[32 / QZ_LANES], const uint8_t *packed) {
    f32_from_fp4(to, packed);
    return 0;
}
