/* The integer dots of the exact class of matmul, which every vector header offers beside the primitives of generic.h. A
 * header includes this after its types; the prototypes hold it to the contract.
 *
 * QZ_LANES          int32 lanes of a vector; v_u8 has four bytes in the place of each lane
 * QZ_DOT_NAME       the instruction, for the repr of a compiled kernel
 * QZ_DOT_ZERO(bits) what dot4 subtracts from every code: 0, or 128 where only signed bytes multiply signed bytes */
#ifndef QZ_SIMD_DOT_H
#define QZ_SIMD_DOT_H

static inline v_u8 u8_of_i32(v_i32 v);
static inline v_u8 load_u8(const void *from);

/* Adds to lane i the sum over its own four bytes j = 4 i ... 4 i + 3 of (codes[j] - zero) * digits[j], exact modulo
 * 2^32. codes are unsigned and below 2^bits; digits are signed bytes, -128 among them. */
static inline v_i32 dot4(v_i32 sum, v_u8 codes, v_u8 digits, int bits);

/* a[0] + a[1], a[2] + a[3], ... in the lower half, the same of b in the upper half, modulo 2^32. */
static inline v_i32 add_neighbours(v_i32 a, v_i32 b);

/* a[0] b[0] c[0] d[0] a[1] b[1] ...: four vectors of bytes. */
static inline void store_interleaved_4(uint8_t *to, v_u8 a, v_u8 b, v_u8 c, v_u8 d);

#endif
