/* The vector primitives in portable C: four lanes as a compiler vector. Every other header of this folder offers the
 * same names with the same results, bit for bit, but for fma_f32.
 *
 * fma_f32(a, b, c) is a * b + c, rounded once where the ISA fuses them and twice here, where fusing would be a call of
 * the C library for each lane: what uses it promises no equal bits.
 *
 * min_f32(a, b) is a < b ? a : b and max_f32(a, b) is a > b ? a : b: b where either is NaN, as MINPS and MAXPS do.
 * trunc_f32 keeps NaN and the sign of zero; its argument is below 2^31 in magnitude, as are those of the conversions.
 */
#ifndef QZ_SIMD_GENERIC_H
#define QZ_SIMD_GENERIC_H

#include <math.h>

#include "../arch.h"
#include "../half.h"
#include "bits.h"

#define QZ_LANES 4
#define QZ_HOLD(v) (void)(v) /* see dot.h */
#define QZ_FLOAT_ROWS 4      /* of x in a tile: twice as many vectors of sums leave registers for three more */

typedef float v_f32 __attribute__((vector_size(16)));
typedef int32_t v_i32 __attribute__((vector_size(16)));
typedef uint32_t v_u32 __attribute__((vector_size(16))); /* its sums wrap, as all vectors' do */

static inline v_f32 load_f32(const float *from) {
    v_f32 v;
    memcpy(&v, from, sizeof v);
    return v;
}
static inline void store_f32(float *to, v_f32 v) { memcpy(to, &v, sizeof v); }
static inline void stream_f32(float *to, v_f32 v) { memcpy(to, &v, sizeof v); }
static inline void stream_end(void) {}
static inline v_i32 load_i32(const int32_t *from) {
    v_i32 v;
    memcpy(&v, from, sizeof v);
    return v;
}
static inline void store_i32(int32_t *to, v_i32 v) { memcpy(to, &v, sizeof v); }

static inline v_f32 set1_f32(float x) { return (v_f32){x, x, x, x}; }
static inline v_i32 set1_i32(int32_t x) { return (v_i32){x, x, x, x}; }
static inline v_i32 bits_of_f32(v_f32 v) { return (v_i32)v; }
static inline v_f32 f32_of_bits(v_i32 v) { return (v_f32)v; }

static inline v_f32 add_f32(v_f32 a, v_f32 b) { return a + b; }
static inline v_f32 sub_f32(v_f32 a, v_f32 b) { return a - b; }
static inline v_f32 mul_f32(v_f32 a, v_f32 b) { return a * b; }
static inline v_f32 fma_f32(v_f32 a, v_f32 b, v_f32 c) { return a * b + c; }
static inline v_f32 div_f32(v_f32 a, v_f32 b) { return a / b; }
static inline v_i32 add_i32(v_i32 a, v_i32 b) { return (v_i32)((v_u32)a + (v_u32)b); }
static inline v_i32 sub_i32(v_i32 a, v_i32 b) { return (v_i32)((v_u32)a - (v_u32)b); }
static inline v_i32 and_i32(v_i32 a, v_i32 b) { return a & b; }
static inline v_i32 or_i32(v_i32 a, v_i32 b) { return a | b; }
static inline v_i32 xor_i32(v_i32 a, v_i32 b) { return a ^ b; }
#define shr_u32(v, count) ((v_i32)((v_u32)(v) >> (count)))
#define shl_i32(v, count) ((v_i32)((v_u32)(v) << (count)))

static inline v_i32 select_i32(v_i32 mask, v_i32 yes, v_i32 no) { return (mask & yes) | (~mask & no); }
static inline v_i32 max_i32(v_i32 a, v_i32 b) { return select_i32(a > b, a, b); }
static inline v_i32 greater_i32(v_i32 a, v_i32 b) { return a > b; }
static inline v_f32 min_f32(v_f32 a, v_f32 b) { return (v_f32)select_i32(a < b, (v_i32)a, (v_i32)b); }
static inline v_f32 max_f32(v_f32 a, v_f32 b) { return (v_f32)select_i32(a > b, (v_i32)a, (v_i32)b); }

static inline v_f32 f32_from_i32(v_i32 v) { return __builtin_convertvector(v, v_f32); }
static inline v_i32 i32_from_f32_truncate(v_f32 v) { return __builtin_convertvector(v, v_i32); }

/* Adding 1.5 * 2^23 leaves the integer, rounded to nearest even, in the low bits; |v| must be below 2^22. */
static inline v_i32 i32_from_f32_nearest(v_f32 v) {
    const v_f32 magic = set1_f32(0x1.8p23f);
    return (v_i32)(v + magic) - (v_i32)magic;
}

static inline v_f32 trunc_f32(v_f32 v) {
    const v_i32 sign = set1_i32(INT32_MIN);
    v_i32 whole = (v_i32)f32_from_i32(i32_from_f32_truncate((v_f32)select_i32(v == v, (v_i32)v, set1_i32(0))));
    return (v_f32)select_i32(v == v, (whole & ~sign) | ((v_i32)v & sign), (v_i32)v);
}

static inline v_i32 i32_from_u8(const uint8_t *from) { return (v_i32){from[0], from[1], from[2], from[3]}; }
static inline void store_low_u8(uint8_t *to, v_i32 v) {
    for (int i = 0; i < QZ_LANES; i++) to[i] = (uint8_t)v[i];
}
/* Arrays of 16-bit floats may stand at odd addresses: plain accesses to them would be undefined. */
static inline v_i32 i32_from_u16(const uint16_t *from) {
    uint16_t x[QZ_LANES];
    memcpy(x, from, sizeof x);
    return (v_i32){x[0], x[1], x[2], x[3]};
}
static inline v_f32 f32_from_f16(const uint16_t *from) {
    uint16_t x[QZ_LANES];
    memcpy(x, from, sizeof x);
    return (v_f32){qz_f32_from_f16(x[0]), qz_f32_from_f16(x[1]), qz_f32_from_f16(x[2]), qz_f32_from_f16(x[3])};
}
static inline void store_f16_from_f32(uint16_t *to, v_f32 v) {
    const uint16_t half[QZ_LANES] = {qz_f16_from_f32(v[0]), qz_f16_from_f32(v[1]), qz_f16_from_f32(v[2]),
                                     qz_f16_from_f32(v[3])};
    memcpy(to, half, sizeof half);
}

/* Writes `count` codes of `bits` bits each, in order; count is a multiple of 8. */
static inline void unpack_bits(uint8_t *codes, const uint8_t *packed, int bits, ptrdiff_t count) {
    unpack_bits_by_8(codes, packed, bits, count);
}

/* The float class of matmul. */

/* Code number `index` of each lane, a word of codes of 2, 4 or 8 bits with the first lowest. Both are constants once
 * loops are unrolled. */
QZ_INLINE v_f32 f32_of_code(v_i32 words, int index, int bits) {
    return f32_from_i32(and_i32(shr_u32(words, index * bits), set1_i32((1 << bits) - 1)));
}

/* Contracts: simd/dot.h. */
QZ_INLINE void transpose_f32(v_f32 *rows) {
    v_f32 columns[QZ_LANES];
    for (int i = 0; i < QZ_LANES; i++) columns[i] = (v_f32){rows[0][i], rows[1][i], rows[2][i], rows[3][i]};
    for (int i = 0; i < QZ_LANES; i++) rows[i] = columns[i];
}
static inline v_f32 double_lanes(v_f32 v) { return (v_f32){v[0], v[0], v[1], v[1]}; }

/* Elementwise operations. Vectors of QZ_BYTES bytes hold codes on their way between lanes and bit streams. */

#define QZ_BYTES (4 * QZ_LANES)
typedef uint8_t v_bytes __attribute__((vector_size(16)));

/* 1 where fused_f32(a, b, c), which is a * b + c rounded once, is an instruction; it does not exist elsewhere. */
#define QZ_FUSED 0

static inline int any_i32(v_i32 mask) { return (mask[0] | mask[1] | mask[2] | mask[3]) != 0; }

/* Lane i is the least (greatest) lane of v[i]. No NaN among them; of zeros, either. */
static inline v_f32 least_of_each(const v_f32 v[QZ_LANES]) {
    v_f32 a = {v[0][0], v[1][0], v[2][0], v[3][0]};
    for (int i = 1; i < QZ_LANES; i++) a = min_f32((v_f32){v[0][i], v[1][i], v[2][i], v[3][i]}, a);
    return a;
}
static inline v_f32 greatest_of_each(const v_f32 v[QZ_LANES]) {
    v_f32 a = {v[0][0], v[1][0], v[2][0], v[3][0]};
    for (int i = 1; i < QZ_LANES; i++) a = max_f32((v_f32){v[0][i], v[1][i], v[2][i], v[3][i]}, a);
    return a;
}

/* 32 codes of FP4 (E2M1) as numbers. */
static inline void f32_from_fp4(v_f32 to[32 / QZ_LANES], const uint8_t *packed) {
    static const float numbers[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                      -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
    for (int i = 0; i < 32 / QZ_LANES; i++, packed += QZ_LANES / 2) {
        const int a = packed[0], b = packed[1];
        to[i] = (v_f32){numbers[a & 15], numbers[a >> 4], numbers[b & 15], numbers[b >> 4]};
    }
}

/* 32 codes of FP8 (E4M3) as numbers divided by 256: moved to where float16 has its exponent and fraction, that is what
 * their bits mean. Those of NaN become 1.875 or its negative, and lanes of what is returned are not 0. */
static inline v_i32 f32_from_e4m3(v_f32 to[32 / QZ_LANES], const uint8_t *codes) {
    v_i32 odd = set1_i32(0);
    for (int i = 0; i < 32 / QZ_LANES; i++, codes += QZ_LANES) {
        const v_i32 v = {codes[0], codes[1], codes[2], codes[3]}, magnitude = v & 0x7f;
        to[i] = (v_f32)(shl_i32(magnitude, 20) | shl_i32(v >> 7, 31)) * 0x1p112f;
        odd |= magnitude == 0x7f;
    }
    return odd;
}

/* Asks for a cache line, which need not be there. Not a function: gcc 12 leaves out calls of one that does no more. */
#define prefetch(at) __builtin_prefetch(at, 0, 2)

static inline v_bytes bytes_of_f32(v_f32 v) { return (v_bytes)v; }
static inline void store_bytes(void *to, v_bytes v) { memcpy(to, &v, sizeof v); }
/* Past the caches, where they can be bypassed, to where 16 bytes are aligned. */
static inline void stream_by_16(void *to, v_bytes v) { memcpy(to, &v, sizeof v); }

/* The upper halves of all lanes of a, then of b. */
static inline v_bytes high_u16_of_two(v_i32 a, v_i32 b) {
    uint16_t high[2 * QZ_LANES];
    v_bytes v;
    for (int i = 0; i < QZ_LANES; i++) {
        high[i] = (uint16_t)((uint32_t)a[i] >> 16);
        high[QZ_LANES + i] = (uint16_t)((uint32_t)b[i] >> 16);
    }
    memcpy(&v, high, sizeof v);
    return v;
}
/* All lanes of a, then of b, as float16. */
static inline v_bytes f16_of_two(v_f32 a, v_f32 b) {
    uint16_t half[2 * QZ_LANES];
    v_bytes v;
    store_f16_from_f32(half, a);
    store_f16_from_f32(half + QZ_LANES, b);
    memcpy(&v, half, sizeof v);
    return v;
}

static inline v_f32 round_to_f16(v_f32 v) {
    uint16_t half[QZ_LANES];
    store_f16_from_f32(half, v);
    return f32_from_f16(half);
}

/* A table of 16 entries, and what stands in it at each of QZ_BYTES packed codes of up to 4 bits. */
typedef struct v_table {
    uint16_t entries[16];
} v_table;
static inline v_table load_table(const uint16_t *entries) {
    v_table table;
    memcpy(table.entries, entries, sizeof table.entries);
    return table;
}
QZ_INLINE void look_up(v_bytes found[2], v_table table, const uint8_t *packed, int bits) {
    uint8_t codes[QZ_BYTES];
    uint16_t each[QZ_BYTES];
    unpack_bits_by_8(codes, packed, bits, QZ_BYTES);
    for (int i = 0; i < QZ_BYTES; i++) each[i] = table.entries[codes[i]];
    memcpy(found, each, sizeof each);
}

/* The lanes of a, b, c, d, in this order, as bytes; lanes of -2^31 to 0 give 0, and those from 256 to 2^15 - 1 give
 * 255. */
static inline v_bytes bytes_from_i32(v_i32 a, v_i32 b, v_i32 c, v_i32 d) {
    const v_i32 v[4] = {a, b, c, d};
    v_bytes bytes;
    for (int i = 0; i < 16; i++) {
        const int32_t lane = v[i / 4][i % 4];
        bytes[i] = (uint8_t)(lane < 0 ? 0 : lane > 255 ? 255 : lane);
    }
    return bytes;
}
static inline v_bytes min_bytes(v_bytes a, int b) {
    for (int i = 0; i < 16; i++) a[i] = a[i] < b ? a[i] : (uint8_t)b;
    return a;
}

/* Writes QZ_BYTES codes of `bits` bits each as a bit stream, and may write whatever it likes to the 64 bytes after it,
 * but for 8 bits. */
QZ_INLINE void store_packed(uint8_t *packed, v_bytes codes, int bits) {
    uint8_t plain[sizeof codes];
    memcpy(plain, &codes, sizeof codes);
    pack_bits(packed, plain, bits, sizeof codes);
}

/* The same bytes in the order that costs least, and how to store two such vectors of codes of 4 bits; what it may write
 * after them is as above. */
static inline v_bytes loose_bytes_from_i32(v_i32 a, v_i32 b, v_i32 c, v_i32 d) { return bytes_from_i32(a, b, c, d); }
QZ_INLINE void store_loose_nibbles(uint8_t *packed, const v_bytes codes[2]) {
    store_packed(packed, codes[0], 4);
    store_packed(packed + QZ_BYTES / 2, codes[1], 4);
}

/* The KV cache. */

/* QZ_TABLE_BITS: a table of 2^that entries of 32 bits is looked up by one instruction; 5 says as well that of an index
 * for 2^bits entries only the lowest `bits` bits count, and that there is clamp_f32(v, most), which is v between -most
 * and most. */
#define QZ_TABLE_BITS 4

/* Lane i is lane i ^ distance of v: 1, 2, 4 or 8, less than QZ_LANES, and a constant once inlined. */
QZ_INLINE v_f32 partner_f32(v_f32 v, int distance) {
    return distance == 1 ? (v_f32){v[1], v[0], v[3], v[2]} : (v_f32){v[2], v[3], v[0], v[1]};
}
static inline float first_f32(v_f32 v) { return v[0]; }

/* Writes QZ_BYTES codes of 4 bits, and nothing after them. */
QZ_INLINE void store_nibbles(uint8_t *packed, const v_i32 codes[4]) {
    store_packed(packed, bytes_from_i32(codes[0], codes[1], codes[2], codes[3]), 4);
}

/* counts + 1 where a > b. */
static inline v_i32 count_greater(v_i32 counts, v_f32 a, v_f32 b) { return counts - (v_i32)(a > b); }

/* Element index[i] of a table of 2^bits: 3 to 6, or 8. */
QZ_INLINE v_f32 look_up_f32(const float *table, v_i32 index, int bits) {
    (void)bits;
    return (v_f32){table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
}
/* Lane i is the sum of the QZ_LANES floats at chains + QZ_LANES * i, added by halves. */
static inline v_f32 sum_of_each(const float *chains) {
    v_f32 sums;
    for (int i = 0; i < QZ_LANES; i++, chains += QZ_LANES) sums[i] = (chains[0] + chains[2]) + (chains[1] + chains[3]);
    return sums;
}
/* Element index[i] of a table of bytes, of any size; three bytes after the last can be read. */
static inline v_i32 gather_u8(const uint8_t *table, v_i32 index) {
    return (v_i32){table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
}
static inline v_bytes load_codes(const void *from) {
    v_bytes v;
    memcpy(&v, from, sizeof v);
    return v;
}

#endif
