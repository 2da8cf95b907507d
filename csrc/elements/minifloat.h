/* Small floats: a sign, an exponent, `mantissa` bits of fraction and no infinity, the largest codes being numbers. As
 * float32 has them all, codes are a float32's upper bits but for the exponent's bias, and subnormal numbers.
 *
 * Those are multiples of 2^(1 - bias - mantissa): adding a float whose ulp that is rounds to them, to nearest even, and
 * leaves the code in the low bits. All others are rounded by the same rule by carrying into the bits that stay. */
#ifndef QZ_ELEMENTS_MINIFLOAT_H
#define QZ_ELEMENTS_MINIFLOAT_H

/* The code nearest to v, ties to the even one; whatever lies beyond `largest`, infinities and NaN included, becomes
 * that. Signs stay, those of zeros too. `bits` counts the sign. */
QZ_INLINE v_i32 encode_minifloat(v_f32 v, int bits, int mantissa, int bias, int largest) {
    const int shift = 23 - mantissa;
    const v_i32 magnitude = and_i32(bits_of_f32(v), set1_i32(0x7fffffff));
    const v_i32 sign = shl_i32(shr_u32(bits_of_f32(v), 31), bits - 1);
    const v_i32 even_up = and_i32(shr_u32(magnitude, shift), set1_i32(1));
    const v_i32 carried = add_i32(add_i32(magnitude, set1_i32((1 << (shift - 1)) - 1)), even_up);
    const v_i32 normal = sub_i32(shr_u32(carried, shift), set1_i32((127 - bias) << mantissa));
    const v_i32 magic = set1_i32((127 + 24 - bias - mantissa) << 23);
    const v_i32 subnormal = sub_i32(bits_of_f32(add_f32(f32_of_bits(magnitude), f32_of_bits(magic))), magic);
    v_i32 code = select_i32(greater_i32(set1_i32((128 - bias) << 23), magnitude), subnormal, normal);
    code = select_i32(greater_i32(code, set1_i32(largest)), set1_i32(largest), code);
    return or_i32(code, sign);
}

/* Exact. A subnormal code m stands for 2^(1 - bias) * m / 2^mantissa, and its bits here for 2^-bias * (1 + that ratio).
 */
QZ_INLINE v_f32 decode_minifloat(v_i32 code, int bits, int mantissa, int bias) {
    const v_i32 magnitude = and_i32(code, set1_i32((1 << (bits - 1)) - 1)), offset = set1_i32((127 - bias) << 23);
    const v_i32 sign = shl_i32(shr_u32(code, bits - 1), 31);
    const v_f32 normal = f32_of_bits(add_i32(shl_i32(magnitude, 23 - mantissa), offset));
    const v_f32 half = sub_f32(normal, f32_of_bits(offset));
    const v_i32 is_normal = greater_i32(magnitude, set1_i32((1 << mantissa) - 1));
    return f32_of_bits(or_i32(select_i32(is_normal, bits_of_f32(normal), bits_of_f32(add_f32(half, half))), sign));
}

#endif
