/* E8M0, a scale: byte b stands for 2^(b - 127), and 255, which OCP has as NaN, for infinity as in MLX. */

/* The least that is d or more, d being 0 or more: the exponent's field, and one more if there is a fraction. 2^-127,
 * byte 0, is float32's subnormal 0x400000. */
QZ_INLINE v_i32 e8m0_above(v_f32 d) {
    const v_i32 bits = bits_of_f32(d), exponent = shr_u32(add_i32(bits, set1_i32(0x7fffff)), 23);
    return and_i32(exponent, greater_i32(bits, set1_i32(0x400000)));
}

/* OCP's rule: the exponent of the group's magnitude, less that of the element's largest number. */
QZ_INLINE v_i32 e8m0_floor(v_f32 most, int exponent) {
    return max_i32(sub_i32(shr_u32(bits_of_f32(most), 23), set1_i32(exponent)), set1_i32(0));
}

QZ_INLINE v_f32 decode_e8m0(v_i32 code) { return f32_of_bits(max_i32(shl_i32(code, 23), set1_i32(0x400000))); }
