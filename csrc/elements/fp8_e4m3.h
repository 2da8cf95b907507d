/* FP8 (E4M3, as OCP has it): up to 448 in magnitude, multiples of 2^-9 at the least; no infinity, 0x7f and 0xff are
 * NaN. Encoding saturates, NaN and infinities too, in both profiles; so it never gives a NaN. */
#include "minifloat.h"

QZ_INLINE v_i32 encode_fp8_e4m3(v_f32 v, int profile) {
    (void)profile;
    return encode_minifloat(v, 8, 3, 7, 0x7e);
}

QZ_INLINE v_f32 decode_fp8_e4m3(v_i32 code) {
    const v_i32 is_nan = greater_i32(and_i32(code, set1_i32(0x7f)), set1_i32(0x7e));
    const v_f32 number = decode_minifloat(code, 8, 3, 7);
    return f32_of_bits(select_i32(is_nan, set1_i32(0x7fc00000), bits_of_f32(number)));
}

/* 32 codes as numbers divided by 256, and whether one is NaN: those are wrong. */
QZ_INLINE int decode_32_fp8_e4m3(v_f32 to[32 / QZ_LANES], const uint8_t *codes) {
    return any_i32(f32_from_e4m3(to, codes));
}
