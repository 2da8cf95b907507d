/* The integer dots of the exact class of matmul, which every vector header offers beside the primitives of generic.h. A
 * header includes this after its types; the prototypes hold it to the contract.
 *
 * QZ_LANES          int32 lanes of a vector; v_u8 has four bytes in the place of each lane
 * QZ_DOT_NAME       the instruction, for the repr of a compiled kernel
 * QZ_DOT_ZERO(bits) what dot4 subtracts from every code: 0, or 128 where only signed bytes multiply signed bytes */
#ifndef QZ_SIMD_DOT_H
#define QZ_SIMD_DOT_H

#include "../arch.h"

/* Keeps a value in a register, and what is computed before it apart from what comes after: compilers otherwise do alike
 * steps of a long unrolled sequence side by side, and run out of registers. */
#ifndef QZ_HOLD
#define QZ_HOLD(v) (void)(v)
#endif

/* Vectors of codes that are unpacked together. Unless a header knows better: whole codes in a byte, where codes do not
 * straddle bytes and are narrower than one. Codes of 1 bit come in order: a step of eight vectors would be four blocks.
 */
#ifndef QZ_FOLD
#define QZ_FOLD(bits) ((bits) == 4 ? 2 : (bits) == 2 ? 4 : 1)
#define QZ_FOLD_RUN(bits) 1 /* neighbouring codes that stay so, of which vectors then take turns */
#endif

/* Steps of dots side by side (kernels/matmul.h), as far as there are registers for them. */
#ifndef QZ_STEPS_ABREAST
#define QZ_STEPS_ABREAST 1
#endif

static inline v_u8 u8_of_i32(v_i32 v);
static inline v_u8 load_u8(const void *from);
static inline void store_u8(uint8_t *to, v_u8 v);

/* Adds to lane i the sum over its own four bytes j = 4 i ... 4 i + 3 of (codes[j] - zero) * digits[j], exact modulo
 * 2^32. codes are unsigned and below 2^bits; digits are signed bytes, -128 among them. */
static inline v_i32 dot4(v_i32 sum, v_u8 codes, v_u8 digits, int bits);

/* The same over `units` vectors of codes, each against a vector of digits of its own, and `factor`-fold: 1, or
 * QZ_DOT_FACTOR, which a header defines as 256 if that costs it nothing. */
#ifndef QZ_DOT_FACTOR
#define QZ_DOT_FACTOR 1
#endif
QZ_INLINE v_i32 dot4_units(v_i32 sum, const v_u8 *codes, const int8_t *digits, int units, int bits, int factor);

/* Codes of consecutive packed bytes, in the order that costs least: of QZ_FOLD(bits) * 4 * QZ_LANES codes, place i of
 * vector j holds code (i / QZ_FOLD_RUN(bits) * QZ_FOLD(bits) + j) * QZ_FOLD_RUN(bits) + i % QZ_FOLD_RUN(bits). */
QZ_INLINE void unpack_folded(v_u8 *codes, const uint8_t *packed, int bits);

/* One vector of codes in order, of which `count`, a multiple of 32 or more than there are, are read. */
QZ_INLINE v_u8 unpack_in_order(const uint8_t *packed, int bits, ptrdiff_t count);

/* For each code below 16 what stands there in the table. */
static inline v_u8 look_up_u8(const uint8_t table[16], v_u8 codes);

/* Sums in the order that costs least: block i of each QZ_LANES stands at QZ_LOOSE_PLACE(i). loosen_f32 goes there from
 * the plain order, and back again. sum_pairs_loosely: sum_blocks of two vectors, but for the order. */
static inline v_f32 loosen_f32(v_f32 v);
QZ_INLINE v_i32 sum_pairs_loosely(const v_i32 *sums);

/* 16 codes of FP8 (E4M3) from 0 to 0x7e, as scales are, divided by 256, in loose order; others are wrong. What it
 * returns keeps the largest codes that were seen, `most` before: exceeds_7e says whether there were others. */
static inline v_i32 f32_from_scales_e4m3(v_f32 to[16 / QZ_LANES], const uint8_t *codes, v_i32 most);
static inline int exceeds_7e(v_i32 most);

/* Of `lanes` vectors, each of which holds QZ_LANES / lanes blocks of `lanes` neighbouring lanes, the sums of all
 * QZ_LANES blocks, in order, modulo 2^32. lanes is a power of two up to QZ_LANES. */
QZ_INLINE v_i32 sum_blocks(const v_i32 *sums, int lanes);

/* sum_blocks in steps, one after each sums[done - 1]; after the last, the result is sums[0]. A header writes one of the
 * two: sum_blocks, or, if it joins sums as they come, join_sums, and defines QZ_JOINS_EARLY. */
QZ_INLINE void join_sums(v_i32 *sums, int done, int lanes);
#ifdef QZ_JOINS_EARLY
QZ_INLINE v_i32 sum_blocks(const v_i32 *v, int lanes) {
    v_i32 sums[QZ_LANES];
    QZ_UNROLL
    for (int i = 0; i < lanes; i++) {
        sums[i] = v[i];
        join_sums(sums, i + 1, lanes);
    }
    return sums[0];
}
#else
QZ_INLINE void join_sums(v_i32 *sums, int done, int lanes) {
    if (done == lanes) sums[0] = sum_blocks(sums, lanes);
}
#endif

/* Rows become columns: QZ_LANES vectors, in place. */
QZ_INLINE void transpose_f32(v_f32 *rows);

/* v[0] v[0] v[1] v[1] ...: the lower half, every lane twice. */
static inline v_f32 double_lanes(v_f32 v);

/* For tiles (kernels/tile.h), whose lanes are outputs:
 *
 * QZ_TILE_VECTORS, QZ_TILE_M   vectors of outputs, and rows of x, whose sums fit the registers
 *
 * A header may offer sums over int16 pairs, too, as avx2.h does: QZ_PAIRS. And where there is one digit, it may leave
 * sums of blocks to int16, QZ_NARROW: avx2.h says how.
 *
 * What else a header may offer or set; without it kernels do with the above. avx512.h, which has all, describes them:
 *
 * QZ_LOADS_SOME        load_some_u8, which reads no byte beyond so many, and join_lower_f32
 * QZ_PANEL_FOLD        panels transposed before they are unpacked; needs QZ_LOADS_SOME, folded_codes and fold_lanes
 * QZ_LOOKS_UP_FOLDED   look_up_folded, which takes nibbles without a mask
 * QZ_E4M3_TOGETHER     f32_from_e4m3_together, of so many codes at a time
 * QZ_E4M3_OF_LANES     f32_of_lanes_e4m3, of codes that are bytes of lanes
 * QZ_TILES_FOR_ALL     one function for each height of a tile serves all formats
 * QZ_ROWS_BESIDE       rows of FP4 weights, and of codes whose steps are long, that share loads of x
 * QZ_TURNS_HALVES      turn_halves, which transposes 16-bit scales; needs QZ_LOADS_SOME
 * QZ_LINE_BITS         the bits of codes that kernels/lines.h serves, up to QZ_LINE_ROWS rows of x; needs QZ_PANEL_FOLD
 * QZ_MIN_PREFILL       rows of x from which on panels or lines pay, by digits; 8 at most (kernels/table.h)
 * QZ_PREFETCH          bytes by which weights are asked for ahead */

/* a[0] b[0] c[0] d[0] a[1] b[1] ...: four vectors of bytes. */
static inline void store_interleaved_4(uint8_t *to, v_u8 a, v_u8 b, v_u8 c, v_u8 d);

#endif
