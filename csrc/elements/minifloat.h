/* Small floats: a sign, an exponent, `mantissa` bits of fraction and no infinity, the largest codes being numbers. As
 * float32 has them all, codes are a float32's upper bits but for the exponent's bias, and subnormal numbers.
 *
 * In [2^e, 2^(e+1)] they are multiples of 2^(e - mantissa), and so they are below the least normal exponent with that
 * as e: adding a float whose ulp that is rounds to them, to nearest even, and leaves the multiple in the low bits. */
#ifndef QZ_ELEMENTS_MINIFLOAT_H
#define QZ_ELEMENTS_MINIFLOAT_H

/* The code nearest to v, ties to the even one; whatever lies beyond `largest`, infinities and NaN included, becomes
 * that. Signs stay, those of zeros too. `bits` counts the sign. */
QZ_INLINE v_i32 encode_minifloat(v_f32 v, int bits, int mantissa, int bias, int largest) {
    const int shift = 23 - mantissa, least = (128 - bias) << 23;
    const v_i32 limit = set1_i32((largest << shift) + ((127 - bias) << 23));
    const v_f32 any = f32_of_bits(and_i32(bits_of_f32(v), set1_i32(0x7fffffff)));
    const v_f32 magnitude = min_f32(any, f32_of_bits(limit)); /* NaN leaves the second operand */
    const v_i32 sign = and_i32(shr_u32(bits_of_f32(v), 32 - bits), set1_i32(1 << (bits - 1)));
    const v_i32 exponent = and_i32(max_i32(bits_of_f32(magnitude), set1_i32(least)), set1_i32(0x7f800000));
    const v_i32 magic = add_i32(exponent, set1_i32(shift << 23));
    const v_i32 multiple = sub_i32(bits_of_f32(add_f32(magnitude, f32_of_bits(magic))), magic);
    const v_i32 codes_below = sub_i32(shr_u32(exponent, shift), set1_i32(least >> shift));
    return or_i32(add_i32(multiple, codes_below), sign);
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
