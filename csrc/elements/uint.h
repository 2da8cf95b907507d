/* Unsigned integer codes of 1 to 8 bits: a code stands for itself. */

/* What is taken from a code to centre it: |code - centre| <= centre. */
#define QZ_CENTRE(bits) (1 << (QZ_DOT_BITS(bits) - 1))

/* The integers nearest to `steps`, which lie in [-1/2, 2^22) or are NaN: "metal" rounds ties away from zero, "cpu" to
 * even. In [0, 2^22), half away from zero is the truncation of v + h with h the float below 0.5 (see fake_quantize.h);
 * in [-1/2, 0) that gives 0, as both ways of rounding do to the code after clamping. */
QZ_INLINE v_i32 round_steps(v_f32 steps, int profile) {
    if (profile == QZ_PROFILE_METAL) return i32_from_f32_truncate(add_f32(steps, set1_f32(0x1.fffffep-2f)));
    return i32_from_f32_nearest(steps);
}

/* The codes nearest to any `steps`; NaN becomes 0. Clamping first gives the same code as rounding first, since both
 * ends are integers, and keeps the conversion in range. */
QZ_INLINE v_i32 encode_uint(v_f32 steps, int bits, int profile) {
    steps = min_f32(max_f32(steps, set1_f32(0.0f)), set1_f32((float)((1 << bits) - 1)));
    return round_steps(steps, profile);
}

QZ_INLINE v_f32 decode_uint(const uint8_t *codes) { return f32_from_i32(i32_from_u8(codes)); }
