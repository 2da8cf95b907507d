/* Block fixed point, on which the exact class of matmul rests: a block of n floats becomes integers v and one exponent
 * e with |x - v 2^e| <= 2^(e-1), so that a dot with integer codes is exact and owes nothing to the order of its terms.
 *
 * n, the block, is min(group size, 64): a group of 128 is two blocks that share a scale. c = 2^(bits-1) centres the
 * codes: |q - c| <= c. With p bits, |v| <= 2^p - 1, and |sum (q - c) v| <= n c (2^p - 1) must stay below 2^31: with
 * L = log2(n c) this asks for p <= 31 - L. float32 x takes p = 22 where that holds and p = 21 where 22 does not; where
 * not even 21 does, the format is wide: p = 22, and the dot is taken in two integers, v = 65536 h + l with l the two
 * low balanced digits in base 256 (|l| <= 32896, |h| <= 64: n c |l| <= 64 * 128 * 32896 < 2^29).
 *
 * In base 256 with digits -128...127, three digits hold p = 22. Two hold at most 127 * 257 = 32639, one holds 127: the
 * exponents of p = 15 and p = 7 are chosen so that no v is larger. Two digits are what float16 and bfloat16 x get, one
 * is activations="int8". */
#ifndef QZ_KERNELS_FIXED_POINT_H
#define QZ_KERNELS_FIXED_POINT_H

/* Kernels of the exact class know a format by the width of its codes, or as QZ_FP4: codes of 4 bits that are looked up.
 * What multiplies x for them is twice the number plus 16, which takes 5 bits, and there is no bias. */
enum { QZ_FP4 = 36 };
#define QZ_STORED_BITS(bits) ((bits) == QZ_FP4 ? 4 : (bits))
#define QZ_DOT_BITS(bits) ((bits) == QZ_FP4 ? 5 : (bits))
#define QZ_HAS_BIAS(bits) ((bits) != QZ_FP4)
#define QZ_UNIT(bits) ((bits) == QZ_FP4 ? 0.5f : 1.0f) /* what a step of the multiplied codes stands for */

#define QZ_BLOCK(group_size) ((group_size) < QZ_MAX_BLOCK ? (group_size) : QZ_MAX_BLOCK)

QZ_INLINE int narrow_bits(int bits, int block) {
    int free_bits = 31 - __builtin_ctz((unsigned)block) - (QZ_DOT_BITS(bits) - 1);
    return free_bits < 22 ? free_bits : 22;
}
QZ_INLINE int is_wide(int bits, int block, int digits) { return digits == 3 && narrow_bits(bits, block) < 21; }
QZ_INLINE int fixed_point_bits(int bits, int block, int digits) {
    if (digits == 3) return is_wide(bits, block, digits) ? 22 : narrow_bits(bits, block);
    return digits == 2 ? 15 : 7;
}

QZ_INLINE float power_of_two(int exponent) { return qz_float_of((uint32_t)(exponent + 127) << 23); }

/* What is added to the bits of a block's largest magnitude: it carries into the exponent where that element would round
 * up to 2^p (p = 15: beyond 32639). */
QZ_INLINE uint32_t fixed_point_carry(int p) { return p == 15 ? (1u << 16) + (1u << 8) : 1u << (23 - p); }

/* The exponent for the largest magnitude of a block, given as float bits: the smallest that no v outgrows. */
QZ_INLINE int fixed_point_exponent(uint32_t largest, int p) {
    int exponent = (int)((largest + fixed_point_carry(p)) >> 23) - 127 - (p - 1);
    return exponent < -126 ? -126 : exponent;
}

QZ_INLINE int is_finite_magnitude(uint32_t bits) { return bits < 0x7f800000u; }

/* NaNs made by x86 and Arm differ in sign: results carry this one. */
QZ_INLINE void make_nan_canonical(float *y, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; i++) {
        if (y[i] != y[i]) y[i] = qz_float_of(0x7fc00000u);
    }
}

#endif
