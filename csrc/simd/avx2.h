/* The vector primitives on AVX2 with FMA and F16C: eight lanes. Contracts: simd/generic.h and simd/dot.h. */
#ifndef QZ_SIMD_AVX2_H
#define QZ_SIMD_AVX2_H

#include <immintrin.h>

#include "../arch.h"
#include "../half.h"
#include "bits.h"

#define QZ_LANES 8
#define QZ_FLOAT_ROWS 6

typedef __m256 v_f32;
typedef __m256i v_i32;
typedef __m256i v_u8;

#define QZ_HOLD(v) __asm__ volatile("" : "+x"(v))
#define QZ_DOT_FACTOR 256
#define QZ_JOINS_EARLY
#include "dot.h"

static inline v_f32 load_f32(const float *from) { return _mm256_loadu_ps(from); }
static inline void store_f32(float *to, v_f32 v) { _mm256_storeu_ps(to, v); }
static inline void stream_f32(float *to, v_f32 v) { _mm256_stream_ps(to, v); }
static inline void stream_end(void) { _mm_sfence(); }
static inline v_i32 load_i32(const int32_t *from) { return _mm256_loadu_si256((const __m256i *)from); }
static inline void store_i32(int32_t *to, v_i32 v) { _mm256_storeu_si256((__m256i *)to, v); }

static inline v_f32 set1_f32(float x) { return _mm256_set1_ps(x); }
static inline v_i32 set1_i32(int32_t x) { return _mm256_set1_epi32(x); }
static inline v_i32 bits_of_f32(v_f32 v) { return _mm256_castps_si256(v); }
static inline v_f32 f32_of_bits(v_i32 v) { return _mm256_castsi256_ps(v); }

static inline v_f32 add_f32(v_f32 a, v_f32 b) { return _mm256_add_ps(a, b); }
static inline v_f32 sub_f32(v_f32 a, v_f32 b) { return _mm256_sub_ps(a, b); }
static inline v_f32 mul_f32(v_f32 a, v_f32 b) { return _mm256_mul_ps(a, b); }
static inline v_f32 fma_f32(v_f32 a, v_f32 b, v_f32 c) { return _mm256_fmadd_ps(a, b, c); }
static inline v_f32 div_f32(v_f32 a, v_f32 b) { return _mm256_div_ps(a, b); }
static inline v_f32 min_f32(v_f32 a, v_f32 b) { return _mm256_min_ps(a, b); }
static inline v_f32 max_f32(v_f32 a, v_f32 b) { return _mm256_max_ps(a, b); }
static inline v_f32 trunc_f32(v_f32 v) { return _mm256_round_ps(v, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC); }

static inline v_i32 add_i32(v_i32 a, v_i32 b) { return _mm256_add_epi32(a, b); }
static inline v_i32 sub_i32(v_i32 a, v_i32 b) { return _mm256_sub_epi32(a, b); }
static inline v_i32 and_i32(v_i32 a, v_i32 b) { return _mm256_and_si256(a, b); }
static inline v_i32 or_i32(v_i32 a, v_i32 b) { return _mm256_or_si256(a, b); }
static inline v_i32 xor_i32(v_i32 a, v_i32 b) { return _mm256_xor_si256(a, b); }
static inline v_i32 max_i32(v_i32 a, v_i32 b) { return _mm256_max_epi32(a, b); }
static inline v_i32 greater_i32(v_i32 a, v_i32 b) { return _mm256_cmpgt_epi32(a, b); }
static inline v_i32 select_i32(v_i32 mask, v_i32 yes, v_i32 no) { return _mm256_blendv_epi8(no, yes, mask); }
#define shr_u32(v, count) _mm256_srli_epi32(v, count)
#define shl_i32(v, count) _mm256_slli_epi32(v, count)

static inline v_f32 f32_from_i32(v_i32 v) { return _mm256_cvtepi32_ps(v); }
static inline v_i32 i32_from_f32_truncate(v_f32 v) { return _mm256_cvttps_epi32(v); }
static inline v_i32 i32_from_f32_nearest(v_f32 v) { return _mm256_cvtps_epi32(v); }

static inline v_i32 i32_from_u8(const uint8_t *from) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
}
static inline v_i32 i32_from_u16(const uint16_t *from) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
}
static inline void store_low_u8(uint8_t *to, v_i32 v) {
    const __m256i low_bytes = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, //
                                               -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1);
    v = _mm256_shuffle_epi8(v, low_bytes);
    _mm_storel_epi64((__m128i *)to, _mm_or_si128(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}
static inline v_f32 f32_from_f16(const uint16_t *from) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
}
static inline void store_f16_from_f32(uint16_t *to, v_f32 v) {
    _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

/* Integer dots. */

#define QZ_DOT_NAME "vpmaddubsw"
#define QZ_DOT_ZERO(bits) 0

static inline v_u8 u8_of_i32(v_i32 v) { return v; }
static inline v_u8 load_u8(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }
static inline void store_u8(uint8_t *to, v_u8 v) { _mm256_storeu_si256((__m256i *)to, v); }

/* VPMADDUBSW saturates at int16: two products of a 7-bit code and an int8 stay below 2 * 127 * 128 = 32512. Codes of 8
 * bits go nibble by nibble: 2 * 15 * 128 = 3840, and the high nibbles' sum counts 16-fold. */
static inline v_i32 dot4(v_i32 sum, v_u8 codes, v_u8 digits, int bits) {
    const __m256i one = _mm256_set1_epi16(1), nibble = _mm256_set1_epi8(15);
    if (bits < 8) return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, digits), one));
    __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(codes, nibble), digits);
    __m256i high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble), digits);
    /* |low + 16 high| would not fit int16, so the factor 16 is taken in the widening step. */
    __m256i both = _mm256_add_epi32(_mm256_madd_epi16(low, one), _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
    return _mm256_add_epi32(sum, both);
}

/* Sums of VPMADDUBSW stay within int16 for so many units: 32767 / (2 * 128 * (2^bits - 1)). */
#define QZ_UNITS_IN_I16(bits) ((bits) == 8 ? 8 : 127 / ((1 << (bits)) - 1))

QZ_INLINE v_i32 dot4_units(v_i32 sum, const v_u8 *codes, const int8_t *digits, int units, int bits, int factor) {
    const __m256i times = _mm256_set1_epi16((short)factor), nibble = _mm256_set1_epi8(15);
    const int together = units < QZ_UNITS_IN_I16(bits) ? units : QZ_UNITS_IN_I16(bits);
    QZ_UNROLL
    for (int i = 0; i < units; i += together) {
        __m256i low = _mm256_setzero_si256(), high = low;
        QZ_UNROLL
        for (int j = 0; j < together; j++) {
            v_u8 code = codes[i + j], digit = load_u8(digits + 32 * (i + j));
            if (bits == 8) {
                v_u8 upper = _mm256_and_si256(_mm256_srli_epi16(code, 4), nibble);
                high = _mm256_add_epi16(high, _mm256_maddubs_epi16(upper, digit));
                code = _mm256_and_si256(code, nibble);
            }
            low = _mm256_add_epi16(low, _mm256_maddubs_epi16(code, digit));
        }
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(low, times));
        if (bits == 8) {
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(high, _mm256_set1_epi16((short)(16 * factor))));
        }
    }
    return sum;
}

/* Tiles. Four rows of x by two vectors: eight sums, two vectors of codes, one of x and one product.
 *
 * v_sums: int16, two a lane, which take QZ_QUADS_TOGETHER quads of digits of at most `most`: a power of two up to the
 * 16 quads of the largest block, so that it divides every block or exceeds it.
 * QZ_PAIRS: sums over int16 pairs are offered as well. pairs_of_quads makes codes less their centre int16, k = 4 i and
 * 4 i + 1 in pairs[0] and the other two in pairs[1]; add_pair adds to each lane the two products of its int16. */
#define QZ_TILE_M 4
#define QZ_TILE_VECTORS 2
#define QZ_PAIRS 1
#define QZ_QUADS_TOGETHER(bits, most)                          \
    ((bits) == 8                                          ? 1  \
     : (32767 / (2 * (most) * ((1 << (bits)) - 1))) >= 16 ? 16 \
                                                          : 32767 / (2 * (most) * ((1 << (bits)) - 1)))
typedef __m256i v_sums;
static inline v_sums no_sums(void) { return _mm256_setzero_si256(); }
/* As assembly, since compilers keep a sum in one register through the loop only if they cannot see what is done to it.
 */
static inline v_sums add_quad(v_sums sum, v_u8 codes, v_u8 digits, int bits) {
    __m256i product;
    (void)bits;
    __asm__("vpmaddubsw %[x], %[codes], %[product]\n\t"
            "vpaddw %[product], %[sum], %[sum]"
            : [sum] "+x"(sum), [product] "=&x"(product)
            : [codes] "x"(codes), [x] "x"(digits));
    return sum;
}
static inline v_i32 widen_sums(v_i32 sum, v_sums some) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(some, _mm256_set1_epi16(1)));
}
static inline v_i32 add_pair(v_i32 sum, v_i32 codes, v_u8 x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(codes, x));
}
/* add_pair of both vectors of a tile with one row of x. */
QZ_INLINE void add_pair_tile(v_i32 sum[QZ_TILE_VECTORS], const v_i32 codes[QZ_TILE_VECTORS], v_u8 x) {
    __m256i product;
    __asm__("vpmaddwd %[x], %[first], %[product]\n\t"
            "vpaddd %[product], %[low], %[low]\n\t"
            "vpmaddwd %[x], %[second], %[product]\n\t"
            "vpaddd %[product], %[high], %[high]"
            : [low] "+x"(sum[0]), [high] "+x"(sum[1]), [product] "=&x"(product)
            : [first] "x"(codes[0]), [second] "x"(codes[1]), [x] "x"(x));
}
static inline void pairs_of_quads(v_i32 pairs[2], v_u8 quads, int centre) {
    const __m256i low = _mm256_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1, //
                                         0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1);
    const __m256i c = _mm256_set1_epi16((short)centre);
    pairs[0] = _mm256_sub_epi16(_mm256_shuffle_epi8(quads, low), c);
    pairs[1] = _mm256_sub_epi16(_mm256_shuffle_epi8(_mm256_srli_epi32(quads, 16), low), c);
}

static inline v_i32 add_pairs_32(v_i32 a, v_i32 b) {
    return _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
}
static inline v_i32 add_pairs_64(v_i32 a, v_i32 b) {
    return _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
}
static inline v_i32 add_halves(v_i32 a, v_i32 b) {
    return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}
/* Without the permutation that puts halves in order, which costs as much as the rest. */
#define QZ_LOOSE_PLACE(i) (((i) & ~6) | ((i) >> 1 & 2) | ((i) << 1 & 4))
static inline v_f32 loosen_f32(v_f32 v) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8)); }
QZ_INLINE v_i32 sum_pairs_loosely(const v_i32 *v) {
    const __m256 a = _mm256_castsi256_ps(v[0]), b = _mm256_castsi256_ps(v[1]);
    const __m256i even = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));
    const __m256i odd = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd));
    return _mm256_add_epi32(even, odd);
}
QZ_INLINE void join_sums(v_i32 *v, int done, int lanes) {
    if (lanes > 2 && done % 2 == 0) {
        v[done - 2] = add_pairs_32(v[done - 2], v[done - 1]);
        QZ_HOLD(v[done - 2]);
    }
    if (lanes > 2 && done % 4 == 0) {
        v[done - 4] = add_pairs_64(v[done - 4], v[done - 2]);
        QZ_HOLD(v[done - 4]);
    }
    if (done < lanes) return;
    if (lanes == 8) {
        v[0] = add_halves(v[0], v[4]);
    } else if (lanes == 4) {
        v[0] = _mm256_permutevar8x32_epi32(v[0], _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    } else {
        v[0] = _mm256_permute4x64_epi64(sum_pairs_loosely(v), 0xd8);
    }
}
/* One digit: sums of a block may stay int16 until four blocks are joined, if so many units fit. dot_narrow is
 * dot4_units before it widens, and join_narrow joins such sums of eight blocks as join_sums does. */
#define QZ_NARROW(bits, units) ((bits) < 8 && 4 * (units) <= QZ_UNITS_IN_I16(bits))
QZ_INLINE v_i32 dot_narrow(const v_u8 *codes, const int8_t *digits, int units) {
    __m256i sum = _mm256_maddubs_epi16(codes[0], load_u8(digits));
    QZ_UNROLL
    for (int i = 1; i < units; i++) {
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes[i], load_u8(digits + 32 * i)));
    }
    return sum;
}
QZ_INLINE void join_narrow(v_i32 *v, int done) {
    if (done % 2 == 0) {
        const __m256i a = v[done - 2], b = v[done - 1];
        v[done - 2] = _mm256_add_epi16(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
        QZ_HOLD(v[done - 2]);
    }
    if (done % 4 == 0) {
        const __m256i a = v[done - 4], b = v[done - 2];
        const __m256i four = _mm256_add_epi16(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
        v[done - 4] = _mm256_madd_epi16(four, _mm256_set1_epi16(1));
        QZ_HOLD(v[done - 4]);
    }
    if (done == 8) v[0] = add_halves(v[0], v[4]);
}

QZ_INLINE void transpose_f32(v_f32 *rows) {
    __m256 t[8], u[8];
    QZ_UNROLL
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    QZ_UNROLL
    for (int i = 0; i < 8; i += 4) {
        u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    QZ_UNROLL
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        rows[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}
static inline v_f32 double_lanes(v_f32 v) {
    return _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
}

static inline void store_interleaved_4(uint8_t *to, v_u8 a, v_u8 b, v_u8 c, v_u8 d) {
    __m256i ab_low = _mm256_unpacklo_epi8(a, b), ab_high = _mm256_unpackhi_epi8(a, b);
    __m256i cd_low = _mm256_unpacklo_epi8(c, d), cd_high = _mm256_unpackhi_epi8(c, d);
    __m256i q0 = _mm256_unpacklo_epi16(ab_low, cd_low), q1 = _mm256_unpackhi_epi16(ab_low, cd_low);
    __m256i q2 = _mm256_unpacklo_epi16(ab_high, cd_high), q3 = _mm256_unpackhi_epi16(ab_high, cd_high);
    __m256i *out = (__m256i *)to;
    _mm256_storeu_si256(out, _mm256_permute2x128_si256(q0, q1, 0x20));
    _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(q2, q3, 0x20));
    _mm256_storeu_si256(out + 2, _mm256_permute2x128_si256(q0, q1, 0x31));
    _mm256_storeu_si256(out + 3, _mm256_permute2x128_si256(q2, q3, 0x31));
}

/* 32 codes from 4 * bits bytes, without reading beyond them. Each 16-bit lane fetches the two bytes that hold its code
 * (VPSHUFB), a multiplication moves the code to the lane's top, a shift brings it down. The lanes of step r hold the
 * codes 8 r + (0...7) and 16 + 8 r + (0...7), so that VPACKUSWB puts all 32 in order. From 4 bits on, the upper half
 * is loaded from the last 16 bytes, which start at byte 4 * bits - 16. */
#define QZ_HIGH_BASE(bits, code) ((bits) >= 4 && (code) >= 16 ? 4 * (bits) - 16 : 0)
#define QZ_BYTE(bits, code) ((code) * (bits) / 8 - QZ_HIGH_BASE(bits, code))
#define QZ_NEXT(bits, code) ((code) * (bits) % 8 + (bits) > 8 ? QZ_BYTE(bits, code) + 1 : -1)
#define QZ_PAIR(bits, code) QZ_BYTE(bits, code), QZ_NEXT(bits, code)
#define QZ_FACTOR(bits, code) 1 << (16 - (bits) - (code) * (bits) % 8)
#define QZ_EIGHT(ONE, bits, code)                                                                        \
    ONE(bits, code), ONE(bits, code + 1), ONE(bits, code + 2), ONE(bits, code + 3), ONE(bits, code + 4), \
        ONE(bits, code + 5), ONE(bits, code + 6), ONE(bits, code + 7)
#define QZ_STEPS(ONE, bits)                                                                                    \
    {                                                                                                          \
        {QZ_EIGHT(ONE, bits, 0), QZ_EIGHT(ONE, bits, 16)}, { QZ_EIGHT(ONE, bits, 8), QZ_EIGHT(ONE, bits, 24) } \
    }
#define QZ_WIDTHS(ONE)                                                       \
    {[2] = QZ_STEPS(ONE, 2), [3] = QZ_STEPS(ONE, 3), [4] = QZ_STEPS(ONE, 4), \
     [5] = QZ_STEPS(ONE, 5), [6] = QZ_STEPS(ONE, 6), [7] = QZ_STEPS(ONE, 7)}

static const int8_t fetch_bytes[8][2][32] = QZ_WIDTHS(QZ_PAIR);
static const uint16_t fetch_factors[8][2][16] = QZ_WIDTHS(QZ_FACTOR);

static inline __m256i fetch_16_codes(__m256i bytes, int bits, int step) {
    __m256i pairs = _mm256_shuffle_epi8(bytes, _mm256_loadu_si256((const __m256i *)fetch_bytes[bits][step]));
    __m256i factors = _mm256_loadu_si256((const __m256i *)fetch_factors[bits][step]);
    return _mm256_srli_epi16(_mm256_mullo_epi16(pairs, factors), 16 - bits);
}
/* Each byte's eight bits, one by one in bytes of their own. */
static inline __m256i unpack_32_bits(const uint8_t *packed) {
    const __m256i spread = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit_of_byte = _mm256_set1_epi64x((long long)0x8040201008040201);
    int32_t bits;
    memcpy(&bits, packed, sizeof bits);
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), spread);
    return _mm256_min_epu8(_mm256_and_si256(bytes, bit_of_byte), _mm256_set1_epi8(1));
}
static inline __m256i unpack_32_codes(const uint8_t *packed, int bits) {
    __m256i bytes;
    if (bits == 1) return unpack_32_bits(packed);
    if (bits == 8) return _mm256_loadu_si256((const __m256i *)packed);
    if (bits == 4) {
        __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)packed));
        return _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4)), _mm256_set1_epi8(15));
    }
    if (bits > 4) {
        bytes = _mm256_loadu2_m128i((const __m128i *)(packed + 4 * bits - 16), (const __m128i *)packed);
    } else {
        int32_t last;
        memcpy(&last, packed + 4 * bits - 4, sizeof last);
        __m128i few = _mm_cvtsi32_si128(last);
        if (bits == 2) few = _mm_loadl_epi64((const __m128i *)packed);
        if (bits == 3) few = _mm_insert_epi32(_mm_loadl_epi64((const __m128i *)packed), last, 2);
        bytes = _mm256_broadcastsi128_si256(few);
    }
    return _mm256_packus_epi16(fetch_16_codes(bytes, bits, 0), fetch_16_codes(bytes, bits, 1));
}

static inline void unpack_bits(uint8_t *codes, const uint8_t *packed, int bits, ptrdiff_t count) {
    ptrdiff_t i = 0;
    for (; i + 32 <= count; i += 32) {
        _mm256_storeu_si256((__m256i *)(codes + i), unpack_32_codes(packed + i / 8 * bits, bits));
    }
    unpack_bits_by_8(codes + i, packed + i / 8 * bits, bits, count - i);
}

QZ_INLINE v_u8 unpack_in_order(const uint8_t *packed, int bits, ptrdiff_t count) {
    (void)count;
    return unpack_32_codes(packed, bits);
}

/* Few rows of x against weights [K, N]. pair_rows brings the codes of 32 outputs from two weight rows side by side in
 * an order of outputs that costs least; add_quad takes them with the row's digits of those two k. widen_pairs adds such
 * sums, low + 256 next, to 32-bit ones in their own order; order_sums makes that the order of outputs. */
static inline v_u8 broadcast_two(const int8_t *from) {
    int16_t two;
    memcpy(&two, from, sizeof two);
    return _mm256_set1_epi16(two);
}
QZ_INLINE void pair_rows(v_u8 pairs[2], const uint8_t *first, const uint8_t *second, int bits) {
    const __m256i nibble = _mm256_set1_epi8(15);
    if (bits == 4) {
        __m128i a = _mm_loadu_si128((const __m128i *)first), b = _mm_loadu_si128((const __m128i *)second);
        __m256i both = _mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b));
        pairs[0] = _mm256_and_si256(both, nibble);
        pairs[1] = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
    } else {
        __m256i a = unpack_32_codes(first, bits), b = unpack_32_codes(second, bits);
        pairs[0] = _mm256_unpacklo_epi8(a, b);
        pairs[1] = _mm256_unpackhi_epi8(a, b);
    }
}
QZ_INLINE void widen_pairs(v_i32 sums[4], const v_sums low[2], const v_sums next[2]) {
    const __m256i factors = _mm256_set1_epi32(1 | 256 << 16);
    QZ_UNROLL
    for (int i = 0; i < 2; i++) {
        __m256i lower = _mm256_unpacklo_epi16(low[i], next[i]), upper = _mm256_unpackhi_epi16(low[i], next[i]);
        sums[2 * i] = _mm256_add_epi32(sums[2 * i], _mm256_madd_epi16(lower, factors));
        sums[2 * i + 1] = _mm256_add_epi32(sums[2 * i + 1], _mm256_madd_epi16(upper, factors));
    }
}
QZ_INLINE void order_sums(v_i32 sums[4], int bits) {
    __m256i a = sums[0], b = sums[1], c = sums[2], d = sums[3];
    if (bits == 4) { /* a and b hold even outputs, c and d odd ones */
        a = _mm256_unpacklo_epi32(sums[0], sums[2]);
        b = _mm256_unpackhi_epi32(sums[0], sums[2]);
        c = _mm256_unpacklo_epi32(sums[1], sums[3]);
        d = _mm256_unpackhi_epi32(sums[1], sums[3]);
    }
    sums[0] = _mm256_permute2x128_si256(a, b, 0x20);
    sums[1] = _mm256_permute2x128_si256(c, d, 0x20);
    sums[2] = _mm256_permute2x128_si256(a, b, 0x31);
    sums[3] = _mm256_permute2x128_si256(c, d, 0x31);
}

static inline v_u8 look_up_u8(const uint8_t table[16], v_u8 codes) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table)), codes);
}

QZ_INLINE void unpack_folded(v_u8 *codes, const uint8_t *packed, int bits) {
    const int fold = QZ_FOLD(bits);
    const __m256i mask = _mm256_set1_epi8((char)((1 << bits) - 1));
    if (fold == 1) {
        codes[0] = unpack_32_codes(packed, bits);
        return;
    }
    v_u8 bytes = load_u8(packed);
    QZ_HOLD(bytes); /* else compilers load the bytes anew for each shift */
    QZ_UNROLL
    for (int i = 0; i < fold; i++) codes[i] = _mm256_and_si256(_mm256_srli_epi16(bytes, i * bits), mask);
}

/* The float class of matmul. */

/* One shuffle brings a code's byte to the bottom of its lane, and clears the rest. */
QZ_INLINE v_f32 f32_of_code(v_i32 words, int index, int bits) {
    const char at = (char)(index * bits / 8);
    const __m256i bytes = _mm256_setr_epi8(at, -1, -1, -1, at + 4, -1, -1, -1, at + 8, -1, -1, -1, at + 12, -1, -1, -1,
                                           at, -1, -1, -1, at + 4, -1, -1, -1, at + 8, -1, -1, -1, at + 12, -1, -1, -1);
    const __m256i mask = _mm256_set1_epi8((char)((1 << bits) - 1));
    if (bits < 8) words = _mm256_and_si256(_mm256_srli_epi32(words, index * bits % 8), mask);
    return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(words, bytes));
}

/* Elementwise operations. */

#define QZ_BYTES (4 * QZ_LANES)
typedef __m256i v_bytes;

#define QZ_FUSED 1
static inline v_f32 fused_f32(v_f32 a, v_f32 b, v_f32 c) { return _mm256_fmadd_ps(a, b, c); }

static inline int any_i32(v_i32 mask) { return _mm256_movemask_epi8(mask) != 0; }

/* 32 codes of 4 bits, two by two from the bytes that `apart` brings into 16-bit lanes. */
static inline __m256i codes_of_pairs(const uint8_t *packed, __m256i apart) {
    const __m256i all = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)packed));
    const __m256i pairs = _mm256_shuffle_epi8(all, apart);
    return _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4)), _mm256_set1_epi8(15));
}

/* The upper bytes of the numbers, of bfloat16 as it were, are looked up. The codes are such a way apart that unpacking,
 * which takes half of each half, first to 16 and then to 32 bits, puts them in order. */
static inline void f32_from_fp4(v_f32 to[4], const uint8_t *packed) {
    const __m256i low = _mm256_setr_epi8(0, 0, -128, -64, 0, 64, -128, -64, 0, 0, -128, -64, 0, 64, -128, -64, //
                                         0, 0, -128, -64, 0, 64, -128, -64, 0, 0, -128, -64, 0, 64, -128, -64);
    const __m256i high = _mm256_setr_epi8(0, 63, 63, 63, 64, 64, 64, 64, -128, -65, -65, -65, -64, -64, -64, -64, //
                                          0, 63, 63, 63, 64, 64, 64, 64, -128, -65, -65, -65, -64, -64, -64, -64);
    const __m256i apart = _mm256_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1, //
                                           2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15, -1);
    const __m256i none = _mm256_setzero_si256(), codes = codes_of_pairs(packed, apart);
    const __m256i lower = _mm256_shuffle_epi8(low, codes), upper = _mm256_shuffle_epi8(high, codes);
    const __m256i a = _mm256_unpacklo_epi8(lower, upper), b = _mm256_unpackhi_epi8(lower, upper);
    to[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(none, a));
    to[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(none, a));
    to[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(none, b));
    to[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(none, b));
}

static inline v_i32 f32_from_e4m3(v_f32 to[4], const uint8_t *codes) {
    const __m256i v = _mm256_loadu_si256((const __m256i *)codes), none = _mm256_setzero_si256();
    const __m256i kept = _mm256_set1_epi16((short)0xbfff), largest = _mm256_set1_epi8(0x7f);
    const __m256i low = _mm256_and_si256(_mm256_srai_epi16(_mm256_unpacklo_epi8(none, v), 1), kept);
    const __m256i high = _mm256_and_si256(_mm256_srai_epi16(_mm256_unpackhi_epi8(none, v), 1), kept);
    to[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(low));
    to[1] = _mm256_cvtph_ps(_mm256_castsi256_si128(high));
    to[2] = _mm256_cvtph_ps(_mm256_extracti128_si256(low, 1));
    to[3] = _mm256_cvtph_ps(_mm256_extracti128_si256(high, 1));
    return _mm256_cmpeq_epi8(_mm256_and_si256(v, largest), largest);
}

static inline v_i32 f32_from_scales_e4m3(v_f32 to[2], const uint8_t *codes, v_i32 most) {
    const __m128i low = _mm_setr_epi8(-1, 0, -1, 1, -1, 4, -1, 5, -1, 2, -1, 3, -1, 6, -1, 7);
    const __m128i high = _mm_setr_epi8(-1, 8, -1, 9, -1, 12, -1, 13, -1, 10, -1, 11, -1, 14, -1, 15);
    const __m128i v = _mm_loadu_si128((const __m128i *)codes);
    to[0] = _mm256_cvtph_ps(_mm_srli_epi16(_mm_shuffle_epi8(v, low), 1));
    to[1] = _mm256_cvtph_ps(_mm_srli_epi16(_mm_shuffle_epi8(v, high), 1));
    return _mm256_zextsi128_si256(_mm_max_epu8(_mm256_castsi256_si128(most), v));
}
static inline int exceeds_7e(v_i32 most) {
    return _mm_movemask_epi8(_mm_adds_epu8(_mm256_castsi256_si128(most), _mm_set1_epi8(1))) != 0;
}

/* Each step halves the lanes that are left of a vector and joins two vectors. */
#define QZ_REDUCE_EACH(name, op)                                                           \
    static inline v_f32 name##_of_pair(v_f32 a, v_f32 b) {                                 \
        return op(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));                     \
    }                                                                                      \
    static inline v_f32 name##_of_four(const v_f32 v[4]) {                                 \
        v_f32 a = name##_of_pair(v[0], v[1]), b = name##_of_pair(v[2], v[3]);              \
        return op(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));           \
    }                                                                                      \
    static inline v_f32 name##_of_each(const v_f32 v[QZ_LANES]) {                          \
        v_f32 a = name##_of_four(v), b = name##_of_four(v + 4);                            \
        return op(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)); \
    }
QZ_REDUCE_EACH(least, _mm256_min_ps)
QZ_REDUCE_EACH(greatest, _mm256_max_ps)

#define prefetch(at) _mm_prefetch((const char *)(at), _MM_HINT_T1)

static inline v_bytes bytes_of_f32(v_f32 v) { return _mm256_castps_si256(v); }
static inline void store_bytes(void *to, v_bytes v) { _mm256_storeu_si256((__m256i *)to, v); }
static inline void stream_by_16(void *to, v_bytes v) {
    _mm_stream_si128((__m128i *)to, _mm256_castsi256_si128(v));
    _mm_stream_si128((__m128i *)to + 1, _mm256_extracti128_si256(v, 1));
}

static inline v_bytes high_u16_of_two(v_i32 a, v_i32 b) {
    __m256i high = _mm256_packus_epi32(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16));
    return _mm256_permute4x64_epi64(high, 0xd8);
}
static inline v_bytes f16_of_two(v_f32 a, v_f32 b) {
    return _mm256_set_m128i(_mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

static inline v_f32 round_to_f16(v_f32 v) { return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }

/* The lower and the upper bytes of 16 entries, each in both halves. */
typedef struct v_table {
    __m256i low, high;
} v_table;
static inline v_table load_table(const uint16_t *entries) {
    const __m256i all = _mm256_loadu_si256((const __m256i *)entries);
    const __m256i low = _mm256_and_si256(all, _mm256_set1_epi16(0xff)), high = _mm256_srli_epi16(all, 8);
    const __m256i bytes = _mm256_packus_epi16(low, high);
    return (v_table){_mm256_permute4x64_epi64(bytes, 0x88), _mm256_permute4x64_epi64(bytes, 0xdd)};
}
/* The unpacking at the end takes eight codes out of each half. */
QZ_INLINE void look_up(v_bytes found[2], v_table table, const uint8_t *packed, int bits) {
    const __m256i apart = _mm256_setr_epi8(0, -1, 1, -1, 2, -1, 3, -1, 8, -1, 9, -1, 10, -1, 11, -1, //
                                           4, -1, 5, -1, 6, -1, 7, -1, 12, -1, 13, -1, 14, -1, 15, -1);
    __m256i v;
    if (bits == 4) {
        v = codes_of_pairs(packed, apart);
    } else {
        v = _mm256_permute4x64_epi64(unpack_32_codes(packed, bits), 0xd8);
    }
    __m256i low = _mm256_shuffle_epi8(table.low, v), high = _mm256_shuffle_epi8(table.high, v);
    found[0] = _mm256_unpacklo_epi8(low, high);
    found[1] = _mm256_unpackhi_epi8(low, high);
}

static inline v_bytes bytes_from_i32(v_i32 a, v_i32 b, v_i32 c, v_i32 d) {
    __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
static inline v_bytes min_bytes(v_bytes a, int b) { return _mm256_min_epu8(a, _mm256_set1_epi8((char)b)); }

/* Byte k of a packed run is byte k % bits of 64-bit lane k / bits; or, since four codes of even width fill bytes, byte
 * k % (bits / 2) of 32-bit lane k / (bits / 2). */
#define QZ_PACKED_BYTE(bits, k)                                        \
    ((k) >= 2 * (bits) ? -1                                            \
     : (bits) % 2 == 0 ? (k) / QZ_HALF(bits) * 4 + (k) % QZ_HALF(bits) \
                       : (k) / (bits) * 8 + (k) % (bits))
#define QZ_HALF(bits) ((bits) > 1 ? (bits) / 2 : 1)
#define QZ_PACKED_RUN(bits) {QZ_EIGHT(QZ_PACKED_BYTE, bits, 0), QZ_EIGHT(QZ_PACKED_BYTE, bits, 8)}
static const int8_t packed_bytes[8][16] = {
    [1] = QZ_PACKED_RUN(1), [2] = QZ_PACKED_RUN(2), [3] = QZ_PACKED_RUN(3), [4] = QZ_PACKED_RUN(4),
    [5] = QZ_PACKED_RUN(5), [6] = QZ_PACKED_RUN(6), [7] = QZ_PACKED_RUN(7),
};

/* Neighbours are joined in lanes of 16 and 32 bits by multiplying the upper one by a power of two, and for odd widths
 * in lanes of 64 by a shift of the lower one to the top and of both back down; a shuffle drops the empty bytes. The
 * factor 2^bits must be a signed byte. */
QZ_INLINE void store_packed(uint8_t *packed, v_bytes codes, int bits) {
    if (bits == 8) {
        _mm256_storeu_si256((__m256i *)packed, codes);
        return;
    }
    if (bits == 7) {
        uint8_t plain[32];
        _mm256_storeu_si256((__m256i *)plain, codes);
        pack_bits(packed, plain, bits, 32);
        return;
    }
    const int empty = 32 - 4 * bits;
    const __m256i order = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)packed_bytes[bits]));
    __m256i v = _mm256_maddubs_epi16(codes, _mm256_set1_epi16((short)(1 | 1 << (8 + bits))));
    v = _mm256_madd_epi16(v, _mm256_set1_epi32(1 | 1 << (16 + 2 * bits)));
    if (bits % 2) v = _mm256_srli_epi64(_mm256_sllv_epi32(v, _mm256_set1_epi64x(empty)), empty);
    v = _mm256_shuffle_epi8(v, order);
    _mm_storeu_si128((__m128i *)packed, _mm256_castsi256_si128(v));
    _mm_storeu_si128((__m128i *)(packed + 2 * bits), _mm256_extracti128_si256(v, 1));
}

/* Packing leaves four codes of each vector in either half, and so does what joins two codes of two bytes: halves are
 * brought together, and then what was apart in them. */
static inline v_bytes loose_bytes_from_i32(v_i32 a, v_i32 b, v_i32 c, v_i32 d) {
    return _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
}
QZ_INLINE void store_loose_nibbles(uint8_t *packed, const v_bytes codes[2]) {
    const __m256i order = _mm256_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15, //
                                           0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
    const __m256i join = _mm256_set1_epi16(1 | 16 << 8);
    const __m256i bytes =
        _mm256_packus_epi16(_mm256_maddubs_epi16(codes[0], join), _mm256_maddubs_epi16(codes[1], join));
    _mm256_storeu_si256((__m256i *)packed, _mm256_shuffle_epi8(_mm256_permute4x64_epi64(bytes, 0xd8), order));
}

/* The KV cache. */

#define QZ_TABLE_BITS 3

QZ_INLINE v_f32 partner_f32(v_f32 v, int distance) {
    if (distance == 4) return _mm256_permute2f128_ps(v, v, 1);
    return distance == 1 ? _mm256_permute_ps(v, 0xb1) : _mm256_permute_ps(v, 0x4e);
}
static inline float first_f32(v_f32 v) { return _mm256_cvtss_f32(v); }

/* Packing leaves four codes of each vector in either half; a shuffle brings together what they were joined to. */
QZ_INLINE void store_nibbles(uint8_t *packed, const v_i32 codes[4]) {
    const __m128i order = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
    const __m256i ab = _mm256_packs_epi32(codes[0], codes[1]), cd = _mm256_packs_epi32(codes[2], codes[3]);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_packus_epi16(ab, cd), _mm256_set1_epi16(1 | 16 << 8));
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    _mm_storeu_si128((__m128i *)packed, _mm_shuffle_epi8(bytes, order));
}

static inline v_i32 count_greater(v_i32 counts, v_f32 a, v_f32 b) {
    return _mm256_sub_epi32(counts, _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
}

/* Tables of more than eight entries by halves, between which one bit of the index decides. */
QZ_INLINE v_f32 choose_by_bit(v_f32 low, v_f32 high, v_i32 index, int bit) {
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 31 - bit)));
}
QZ_INLINE v_f32 look_up_16_f32(const float *table, v_i32 index) {
    return choose_by_bit(_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index),
                         _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index), index, 3);
}
QZ_INLINE v_f32 look_up_32_f32(const float *table, v_i32 index) {
    return choose_by_bit(look_up_16_f32(table, index), look_up_16_f32(table + 16, index), index, 4);
}
QZ_INLINE v_f32 look_up_f32(const float *table, v_i32 index, int bits) {
    if (bits == 3) return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
    if (bits == 4) return look_up_16_f32(table, index);
    if (bits == 5) return look_up_32_f32(table, index);
    if (bits > 6) return _mm256_i32gather_ps(table, index, 4);
    return choose_by_bit(look_up_32_f32(table, index), look_up_32_f32(table + 32, index), index, 5);
}
static inline v_i32 gather_u8(const uint8_t *table, v_i32 index) {
    return _mm256_and_si256(_mm256_i32gather_epi32((const int *)(const void *)table, index, 1),
                            _mm256_set1_epi32(0xff));
}
static inline v_bytes load_codes(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }

/* Attention over the KV cache. */

#define QZ_DIRECT_ROWS 1
#define QZ_SCORE_SUMS 2
#define QZ_SCORE_TOGETHER 2
#define QZ_SCORE_ROWS 4
#define QZ_SCORE_POSITIONS 3
#define QZ_WEIGH_ROWS 3
#define QZ_WEIGH_VECTORS 4
#define QZ_WEIGH_HALVES 1

QZ_INLINE v_f32 sum_of_each(const float *chains) {
    __m256 fours[4], twos[2];
    QZ_UNROLL
    for (int i = 0; i < 4; i++) { /* such an order that the last step leaves the sums in order */
        const __m256 a = _mm256_loadu_ps(chains + 8 * i), b = _mm256_loadu_ps(chains + 8 * (i + 4));
        fours[i] = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    }
    QZ_UNROLL
    for (int i = 0; i < 2; i++) {
        const __m256 a = fours[2 * i], b = fours[2 * i + 1];
        twos[i] = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    }
    return _mm256_add_ps(_mm256_shuffle_ps(twos[0], twos[1], 0x44), _mm256_shuffle_ps(twos[0], twos[1], 0xee));
}

/* Up to 64 values by their bytes, 16 to a table of VPSHUFB; more are loaded one by one. */
typedef struct v_centroids {
    __m256i planes[4][4];
    const float *values;
} v_centroids;
QZ_INLINE v_centroids load_centroids(const float *values, const uint8_t planes[256]) {
    v_centroids c = {.values = values};
    QZ_UNROLL
    for (int i = 0; i < 16; i++) {
        const __m128i entries = _mm_loadu_si128((const __m128i *)planes + i);
        c.planes[i / 4][i % 4] = _mm256_broadcastsi128_si256(entries);
    }
    return c;
}

/* of[n]: byte i of half h is code 32 h + 2 i + n. */
typedef struct v_codes {
    __m256i of[2];
} v_codes;

QZ_INLINE v_codes codes_of_64(const uint8_t *packed, int bits) {
    if (bits == 4) {
        const __m256i pairs = _mm256_loadu_si256((const __m256i *)packed), mask = _mm256_set1_epi8(15);
        return (v_codes){{_mm256_and_si256(pairs, mask), _mm256_and_si256(_mm256_srli_epi16(pairs, 4), mask)}};
    }
    const __m256i a = unpack_32_codes(packed, bits), b = unpack_32_codes(packed + 4 * bits, bits);
    const __m256i low = _mm256_permute2x128_si256(a, b, 0x20), high = _mm256_permute2x128_si256(a, b, 0x31);
    const __m256i mask = _mm256_set1_epi16(0xff);
    return (v_codes){{_mm256_packus_epi16(_mm256_and_si256(low, mask), _mm256_and_si256(high, mask)),
                      _mm256_packus_epi16(_mm256_srli_epi16(low, 8), _mm256_srli_epi16(high, 8))}};
}

/* One byte of the values of codes; bits 4 and 5 of a code choose among tables. */
QZ_INLINE __m256i look_up_bytes(const __m256i tables[4], __m256i codes, int bits) {
    __m256i found = _mm256_shuffle_epi8(tables[0], codes);
    if (bits <= 4) return found;
    const __m256i is_odd = _mm256_slli_epi16(codes, 3);
    found = _mm256_blendv_epi8(found, _mm256_shuffle_epi8(tables[1], codes), is_odd);
    if (bits == 5) return found;
    const __m256i third = _mm256_shuffle_epi8(tables[2], codes), fourth = _mm256_shuffle_epi8(tables[3], codes);
    return _mm256_blendv_epi8(found, _mm256_blendv_epi8(third, fourth, is_odd), _mm256_slli_epi16(codes, 2));
}

/* VGATHERDPS takes 1.7 times as long (Zen 3). */
QZ_INLINE __m128 load_four(const float *values, const uint8_t *codes, int step) {
    const __m128 a = _mm_unpacklo_ps(_mm_load_ss(values + codes[0]), _mm_load_ss(values + codes[step]));
    const __m128 b = _mm_unpacklo_ps(_mm_load_ss(values + codes[2 * step]), _mm_load_ss(values + codes[3 * step]));
    return _mm_movelh_ps(a, b);
}

/* Unpacked to words, even and odd ones become floats by a shift and by a mask, since the lower words of bfloat16 values
 * are 0; what those of others are is blended in. */
QZ_INLINE void centroids_of_32(v_f32 to[4], v_codes codes, const v_centroids *c, int bits, int is_wide, int half) {
    const __m256i of = codes.of[half];
    if (bits == 8) {
        uint8_t bytes[32];
        _mm256_storeu_si256((__m256i *)bytes, of);
        QZ_UNROLL
        for (int i = 0; i < 4; i++) {
            const uint8_t *first = bytes + i % 2 * 8 + i / 2; /* in words, the even ones or the odd ones */
            to[i] = _mm256_set_m128(load_four(c->values, first + 16, 2), load_four(c->values, first, 2));
        }
        return;
    }
    const __m256i third = look_up_bytes(c->planes[2], of, bits), fourth = look_up_bytes(c->planes[3], of, bits);
    const __m256i high[2] = {_mm256_unpacklo_epi8(third, fourth), _mm256_unpackhi_epi8(third, fourth)};
    QZ_UNROLL
    for (int i = 0; i < 2; i++) {
        to[i] = _mm256_castsi256_ps(_mm256_slli_epi32(high[i], 16));
        to[i + 2] = _mm256_castsi256_ps(_mm256_and_si256(high[i], _mm256_set1_epi32(-0x10000)));
    }
    if (!is_wide) return;
    const __m256i first = look_up_bytes(c->planes[0], of, bits), second = look_up_bytes(c->planes[1], of, bits);
    const __m256i low[2] = {_mm256_unpacklo_epi8(first, second), _mm256_unpackhi_epi8(first, second)};
    QZ_UNROLL
    for (int i = 0; i < 2; i++) {
        to[i] = _mm256_castsi256_ps(_mm256_blend_epi16(low[i], _mm256_castps_si256(to[i]), 0xaa));
        to[i + 2] = _mm256_castsi256_ps(_mm256_or_si256(_mm256_srli_epi32(low[i], 16), _mm256_castps_si256(to[i + 2])));
    }
}

#endif
