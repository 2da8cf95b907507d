/* The vector primitives on AVX-512 with BW, DQ, VBMI and VNNI: sixteen lanes. Contracts: simd/generic.h and simd/dot.h.
 * The unit that includes this brings the intrinsics, real or emulated. */
#ifndef QZ_SIMD_AVX512_H
#define QZ_SIMD_AVX512_H

#include "../arch.h"
#include "../half.h"
#include "bits.h"

#define QZ_LANES 16
#define QZ_FLOAT_ROWS 14
#define QZ_PREFETCH 12288
#define QZ_STEPS_ABREAST 4
#define QZ_JOINS_EARLY
/* Codes of 3, 5 and 8 bits come in two vectors, too, so that each block has half the lanes of a sum: half the additions
 * of lanes and half the shifts. 16 neighbours keep blocks of 32 apart. Those of 6 and 7 bits would need more loads. */
#define QZ_FOLD(bits) ((bits) == 2 ? 4 : (bits) == 1 || (bits) == 6 || (bits) == 7 ? 1 : 2)
#define QZ_FOLD_RUN(bits) ((bits) == 3 || (bits) == 5 || (bits) == 8 ? 16 : 1)

typedef __m512 v_f32;
typedef __m512i v_i32;
typedef __m512i v_u8;

#ifndef QZ_EMULATE_AVX512
#define QZ_HOLD(v) __asm__ volatile("" : "+v"(v))
#endif
#include "dot.h"

static inline v_f32 load_f32(const float *from) { return _mm512_loadu_ps(from); }
static inline void store_f32(float *to, v_f32 v) { _mm512_storeu_ps(to, v); }
static inline void stream_f32(float *to, v_f32 v) { _mm512_stream_ps(to, v); }
static inline void stream_end(void) { _mm_sfence(); }
static inline v_i32 load_i32(const int32_t *from) { return _mm512_loadu_si512(from); }
static inline void store_i32(int32_t *to, v_i32 v) { _mm512_storeu_si512(to, v); }

static inline v_f32 set1_f32(float x) { return _mm512_set1_ps(x); }
static inline v_i32 set1_i32(int32_t x) { return _mm512_set1_epi32(x); }
static inline v_i32 bits_of_f32(v_f32 v) { return _mm512_castps_si512(v); }
static inline v_f32 f32_of_bits(v_i32 v) { return _mm512_castsi512_ps(v); }

static inline v_f32 add_f32(v_f32 a, v_f32 b) { return _mm512_add_ps(a, b); }
static inline v_f32 sub_f32(v_f32 a, v_f32 b) { return _mm512_sub_ps(a, b); }
static inline v_f32 mul_f32(v_f32 a, v_f32 b) { return _mm512_mul_ps(a, b); }
static inline v_f32 fma_f32(v_f32 a, v_f32 b, v_f32 c) { return _mm512_fmadd_ps(a, b, c); }
static inline v_f32 div_f32(v_f32 a, v_f32 b) { return _mm512_div_ps(a, b); }
static inline v_f32 min_f32(v_f32 a, v_f32 b) { return _mm512_min_ps(a, b); }
static inline v_f32 max_f32(v_f32 a, v_f32 b) { return _mm512_max_ps(a, b); }
static inline v_f32 trunc_f32(v_f32 v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_ZERO); }

static inline v_i32 add_i32(v_i32 a, v_i32 b) { return _mm512_add_epi32(a, b); }
static inline v_i32 sub_i32(v_i32 a, v_i32 b) { return _mm512_sub_epi32(a, b); }
static inline v_i32 and_i32(v_i32 a, v_i32 b) { return _mm512_and_si512(a, b); }
static inline v_i32 or_i32(v_i32 a, v_i32 b) { return _mm512_or_si512(a, b); }
static inline v_i32 xor_i32(v_i32 a, v_i32 b) { return _mm512_xor_si512(a, b); }
static inline v_i32 max_i32(v_i32 a, v_i32 b) { return _mm512_max_epi32(a, b); }
static inline v_i32 greater_i32(v_i32 a, v_i32 b) { return _mm512_movm_epi32(_mm512_cmpgt_epi32_mask(a, b)); }
/* 0xca is the truth table of mask ? yes : no. */
static inline v_i32 select_i32(v_i32 mask, v_i32 yes, v_i32 no) {
    return _mm512_ternarylogic_epi32(mask, yes, no, 0xca);
}
#define shr_u32(v, count) _mm512_srli_epi32(v, count)
#define shl_i32(v, count) _mm512_slli_epi32(v, count)

static inline v_f32 f32_from_i32(v_i32 v) { return _mm512_cvtepi32_ps(v); }
static inline v_i32 i32_from_f32_truncate(v_f32 v) { return _mm512_cvttps_epi32(v); }
static inline v_i32 i32_from_f32_nearest(v_f32 v) { return _mm512_cvtps_epi32(v); }

static inline v_i32 i32_from_u8(const uint8_t *from) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
}
static inline v_i32 i32_from_u16(const uint16_t *from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
}
static inline void store_low_u8(uint8_t *to, v_i32 v) { _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(v)); }
static inline v_f32 f32_from_f16(const uint16_t *from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}
static inline void store_f16_from_f32(uint16_t *to, v_f32 v) {
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

/* Integer dots. */

#define QZ_DOT_NAME "vpdpbusd"
#define QZ_DOT_ZERO(bits) 0

static inline v_u8 u8_of_i32(v_i32 v) { return v; }
static inline v_u8 load_u8(const void *from) { return _mm512_loadu_si512(from); }
static inline void store_u8(uint8_t *to, v_u8 v) { _mm512_storeu_si512(to, v); }

static inline v_i32 dot4(v_i32 sum, v_u8 codes, v_u8 digits, int bits) {
    (void)bits;
#ifdef QZ_EMULATE_AVX512
    return _mm512_dpbusd_epi32(sum, codes, digits);
#else
    /* As assembly, since compilers keep the sums of a tile in registers only if they cannot see what is done to them.
     */
    __asm__("vpdpbusd %[x], %[codes], %[sum]" : [sum] "+v"(sum) : [codes] "v"(codes), [x] "vm"(digits));
    return sum;
#endif
}

QZ_INLINE v_i32 dot4_units(v_i32 sum, const v_u8 *codes, const int8_t *digits, int units, int bits, int factor) {
    (void)factor;
    (void)bits;
    QZ_UNROLL
    for (int i = 0; i < units; i++) sum = _mm512_dpbusd_epi32(sum, codes[i], load_u8(digits + 64 * i));
    return sum;
}

/* Registers hold the codes and the sums of two rows. */
#define QZ_ROWS_BESIDE 2

static inline v_i32 add_pairs_32(v_i32 a, v_i32 b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}
static inline v_i32 add_pairs_64(v_i32 a, v_i32 b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}
static inline v_i32 add_pairs_128(v_i32 a, v_i32 b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}
static inline v_i32 add_four(const v_i32 *v) {
    return add_pairs_64(add_pairs_32(v[0], v[1]), add_pairs_32(v[2], v[3]));
}
/* Four at a time, so that no more than a few wait for the others. After the additions the sums stand in the order of
 * the shuffles; one permutation puts them in order. */
QZ_INLINE void join_sums(v_i32 *v, int done, int lanes) {
    const __m512i of_8 = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    const __m512i of_4 = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i of_2 = _mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    if (done % 4 == 0) v[done / 4 - 1] = add_four(v + done - 4);
    if (done < lanes) return;
    if (lanes == 16) {
        v[0] = add_pairs_128(add_pairs_128(v[0], v[1]), add_pairs_128(v[2], v[3]));
    } else if (lanes == 8) {
        v[0] = _mm512_permutexvar_epi32(of_8, add_pairs_128(v[0], v[1]));
    } else if (lanes == 4) {
        v[0] = _mm512_permutexvar_epi32(of_4, v[0]);
    } else {
        const __m512 a = _mm512_castsi512_ps(v[0]), b = _mm512_castsi512_ps(v[1]);
        const __m512i even = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88));
        const __m512i odd = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xdd));
        v[0] = _mm512_permutexvar_epi32(of_2, _mm512_add_epi32(even, odd));
    }
}

#define QZ_LOOSE_PLACE(i) (i)
static inline v_f32 loosen_f32(v_f32 v) { return v; }
QZ_INLINE v_i32 sum_pairs_loosely(const v_i32 *v) { return sum_blocks(v, 2); }

QZ_INLINE void transpose_f32(v_f32 *rows) {
    __m512 t[16];
    QZ_UNROLL
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    QZ_UNROLL
    for (int i = 0; i < 16; i += 4) {
        rows[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
        rows[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
        rows[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        rows[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    QZ_UNROLL
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_f32x4(rows[i], rows[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_f32x4(rows[i], rows[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_f32x4(rows[8 + i], rows[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_f32x4(rows[8 + i], rows[12 + i], 0xdd);
    }
    QZ_UNROLL
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
        rows[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
        rows[4 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
        rows[12 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
    }
}
static inline v_f32 double_lanes(v_f32 v) {
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), v);
}

/* The unpacking leaves in 128-bit lane i of q0...q3 the elements 16 i + (0...15); the rest transposes those lanes. */
static inline void store_interleaved_4(uint8_t *to, v_u8 a, v_u8 b, v_u8 c, v_u8 d) {
    __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
    __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
    __m512i q0 = _mm512_unpacklo_epi16(ab_low, cd_low), q1 = _mm512_unpackhi_epi16(ab_low, cd_low);
    __m512i q2 = _mm512_unpacklo_epi16(ab_high, cd_high), q3 = _mm512_unpackhi_epi16(ab_high, cd_high);
    __m512i q01_low = _mm512_shuffle_i32x4(q0, q1, 0x44), q01_high = _mm512_shuffle_i32x4(q0, q1, 0xee);
    __m512i q23_low = _mm512_shuffle_i32x4(q2, q3, 0x44), q23_high = _mm512_shuffle_i32x4(q2, q3, 0xee);
    _mm512_storeu_si512(to, _mm512_shuffle_i32x4(q01_low, q23_low, 0x88));
    _mm512_storeu_si512(to + 64, _mm512_shuffle_i32x4(q01_low, q23_low, 0xdd));
    _mm512_storeu_si512(to + 128, _mm512_shuffle_i32x4(q01_high, q23_high, 0x88));
    _mm512_storeu_si512(to + 192, _mm512_shuffle_i32x4(q01_high, q23_high, 0xdd));
}

/* VPERMB brings the `bits` bytes of eight codes into each 64-bit lane, VPMULTISHIFTQB takes from it the eight bits at
 * 0, bits, ..., 7 * bits, and the mask drops those of the next code. */
static inline __m512i take_codes(__m512i bytes, int bits) {
    const __m512i bytes_of_lane = _mm512_set1_epi64(0x0706050403020100);
    const __m512i lanes =
        _mm512_setr_epi64(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303, 0x0404040404040404,
                          0x0505050505050505, 0x0606060606060606, 0x0707070707070707);
    /* No product of bytes passes 7 * 8, so whole 16- and 64-bit lanes multiply them without a carry. */
    const __m512i fetch = _mm512_add_epi8(bytes_of_lane, _mm512_mullo_epi16(lanes, _mm512_set1_epi16((short)bits)));
    const __m512i shifts = _mm512_set1_epi64(0x0706050403020100 * bits);
    const __m512i mask = _mm512_set1_epi8((char)((1 << bits) - 1));
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(fetch, bytes)), mask);
}

QZ_INLINE v_u8 unpack_in_order(const uint8_t *packed, int bits, ptrdiff_t count) {
    const ptrdiff_t some = count < 64 ? count : 64;
    if (bits == 8 && count >= 64) return load_u8(packed);
    __m512i bytes = _mm512_maskz_loadu_epi8(~UINT64_C(0) >> (64 - some / 8 * bits), packed);
    return bits == 8 ? bytes : take_codes(bytes, bits);
}

/* So many bytes, and zeros after them. */
#define QZ_LOADS_SOME
static inline v_u8 load_some_u8(const uint8_t *from, ptrdiff_t count) {
    return count >= 64 ? load_u8(from) : _mm512_maskz_loadu_epi8(((uint64_t)1 << count) - 1, from);
}

/* 16 bytes of each of four rows, one after the other. */
static inline __m512i load_four(const char *const rows[4]) {
    __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)rows[0]));
    v = _mm512_mask_broadcast_i32x4(v, 0x00f0, _mm_loadu_si128((const __m128i *)rows[1]));
    v = _mm512_mask_broadcast_i32x4(v, 0x0f00, _mm_loadu_si128((const __m128i *)rows[2]));
    return _mm512_mask_broadcast_i32x4(v, 0xf000, _mm_loadu_si128((const __m128i *)rows[3]));
}
#define QZ_TURNS_HALVES
/* Eight 16-bit numbers of each of 16 rows become columns. */
QZ_INLINE void turn_halves(uint16_t to[8][16], const char *from, const ptrdiff_t rows[16]) {
    const __m512i apart = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    __m512i a[4], low[2], high[2];
    QZ_UNROLL
    for (int j = 0; j < 4; j++) {
        const char *const four[4] = {from + rows[j], from + rows[4 + j], from + rows[8 + j], from + rows[12 + j]};
        a[j] = load_four(four);
    }
    QZ_UNROLL
    for (int j = 0; j < 2; j++) {
        low[j] = _mm512_unpacklo_epi16(a[2 * j], a[2 * j + 1]);
        high[j] = _mm512_unpackhi_epi16(a[2 * j], a[2 * j + 1]);
    }
    _mm512_storeu_si512(to[0], _mm512_permutexvar_epi64(apart, _mm512_unpacklo_epi32(low[0], low[1])));
    _mm512_storeu_si512(to[2], _mm512_permutexvar_epi64(apart, _mm512_unpackhi_epi32(low[0], low[1])));
    _mm512_storeu_si512(to[4], _mm512_permutexvar_epi64(apart, _mm512_unpacklo_epi32(high[0], high[1])));
    _mm512_storeu_si512(to[6], _mm512_permutexvar_epi64(apart, _mm512_unpackhi_epi32(high[0], high[1])));
}

/* The lower halves of both. */
static inline v_f32 join_lower_f32(v_f32 a, v_f32 b) { return _mm512_shuffle_f32x4(a, b, 0x44); }

static inline v_u8 look_up_u8(const uint8_t table[16], v_u8 codes) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table)), codes);
}

/* VPERMB looks at six bits, for the upper two of which the table repeats: no mask is needed. */
#define QZ_LOOKS_UP_FOLDED
QZ_INLINE void look_up_folded(v_u8 codes[2], const uint8_t *packed, const uint8_t table[16]) {
    const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table));
    v_u8 bytes = load_u8(packed);
    QZ_HOLD(bytes); /* as in unpack_folded */
    codes[0] = _mm512_permutexvar_epi8(bytes, all);
    codes[1] = _mm512_permutexvar_epi8(_mm512_srli_epi32(bytes, 4), all);
}

/* 32 bytes and 32 others: narrow loads cross fewer lines. */
static inline __m512i load_two(const uint8_t *low, const uint8_t *high) {
    const __m512i v = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)low));
    return _mm512_inserti64x4(v, _mm256_loadu_si256((const __m256i *)high), 1);
}

/* 128 codes of 3, 5 or 8 bits. The lower half of each vector is of the first 8 * bits bytes, the upper of the others.
 * For 5 bits the runs of a half fit 32 bytes, and no load passes the end of the codes. */
QZ_INLINE void unpack_in_turns(v_u8 codes[2], const uint8_t *packed, int bits) {
    if (bits == 8) {
        const __m512i low = load_u8(packed), high = load_u8(packed + 64);
        codes[0] = _mm512_shuffle_i32x4(low, high, 0x88);
        codes[1] = _mm512_shuffle_i32x4(low, high, 0xdd);
        return;
    }
    const uint64_t each = 0x0101010101010101, bytes_of_lane = 0x0706050403020100, step = (uint64_t)bits * each;
    const __m512i shifts = _mm512_set1_epi64(0x0706050403020100 * bits);
    const __m512i mask = _mm512_set1_epi8((char)((1 << bits) - 1));
    QZ_UNROLL
    for (int j = 0; j < 2; j++) {
        const int low = 2 * j * bits, from = bits == 3 ? 0 : low, to = bits == 3 ? 32 : j == 0 ? 40 : 48;
        const uint64_t a = bytes_of_lane + (uint64_t)(low - from) * each;
        const uint64_t b = bytes_of_lane + (uint64_t)(low + 8 * bits - to + 32) * each;
        const __m512i fetch = _mm512_setr_epi64((long long)a, (long long)(a + step), (long long)(a + 4 * step),
                                                (long long)(a + 5 * step), (long long)b, (long long)(b + step),
                                                (long long)(b + 4 * step), (long long)(b + 5 * step));
        const __m512i some =
            bits == 3 ? _mm512_maskz_loadu_epi8((UINT64_C(1) << 48) - 1, packed) : load_two(packed + from, packed + to);
        const __m512i bytes = _mm512_permutexvar_epi8(fetch, some);
        codes[j] = _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, bytes), mask);
    }
}

QZ_INLINE void unpack_folded(v_u8 *codes, const uint8_t *packed, int bits) {
    const int fold = QZ_FOLD(bits);
    const __m512i mask = _mm512_set1_epi8((char)((1 << bits) - 1));
    if (fold == 1) {
        codes[0] = unpack_in_order(packed, bits, 64);
        return;
    }
    if (QZ_FOLD_RUN(bits) > 1) {
        unpack_in_turns(codes, packed, bits);
        return;
    }
    v_u8 bytes = load_u8(packed);
    QZ_HOLD(bytes); /* else compilers load the bytes anew for each shift */
    QZ_UNROLL
    for (int i = 0; i < fold; i++) {
        codes[i] = _mm512_and_si512(_mm512_srli_epi32(bytes, (unsigned)(i * bits)), mask);
    }
}

/* Panels are transposed before they are unpacked, which saves most of the shuffles; QZ_PANEL_FOLD codes of a byte then
 * go to as many quads. */
#define QZ_PANEL_FOLD(bits) (QZ_FOLD_RUN(bits) > 1 ? 1 : QZ_FOLD(bits))
/* Codes `index`, index + QZ_PANEL_FOLD(bits), ... */
QZ_INLINE v_u8 folded_codes(v_u8 packed, int index, int bits) {
    return _mm512_and_si512(_mm512_srli_epi32(packed, (unsigned)(index * bits)),
                            _mm512_set1_epi8((char)((1 << bits) - 1)));
}
/* The order of these quads: every fold-th of 4 * fold lanes side by side. */
QZ_INLINE v_i32 fold_lanes(v_i32 v, int fold) {
    const __m512i by_2 = _mm512_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    const __m512i by_4 = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return fold == 1 ? v : _mm512_permutexvar_epi32(fold == 2 ? by_2 : by_4, v);
}
#define QZ_FORGET_REGISTERS __asm__ volatile("" ::: "memory")

static inline void unpack_bits(uint8_t *codes, const uint8_t *packed, int bits, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; i += 64) {
        ptrdiff_t some = count - i < 64 ? count - i : 64; /* a multiple of 8 */
        __m512i in_order = unpack_in_order(packed + i / 8 * bits, bits, some);
        _mm512_mask_storeu_epi8(codes + i, ~UINT64_C(0) >> (64 - some), in_order);
    }
}

/* Tiles: eight rows of x by two vectors, 16 sums, twice as many as hide the latency of VPDPBUSD. Codes of every width
 * are multiplied alike. */
#define QZ_TILE_M 8
#define QZ_TILE_VECTORS 2
#define QZ_TILES_FOR_ALL
/* The codes that kernels/lines.h takes line by line, and up to how many rows of x. */
#define QZ_LINE_BITS 4
#define QZ_LINE_ROWS 10
/* Lines pay at once. Panels need four rows of x, or five with one digit, which takes so little time. */
#define QZ_MIN_PREFILL(bits, block) {5, QZ_HAS_LINES(bits, block) ? 2 : 4, QZ_HAS_LINES(bits, block) ? 2 : 4}

/* The float class of matmul. */

/* VPERMPS looks at four bits of a lane: no mask is needed, and no conversion. Narrower codes find theirs repeated. */
QZ_INLINE v_f32 f32_of_code(v_i32 words, int index, int bits) {
    const __m512i ranks = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i mask = _mm512_set1_epi32((1 << bits) - 1);
    const __m512i moved = _mm512_srli_epi32(words, (unsigned)(index * bits));
    if (bits == 8) return _mm512_cvtepi32_ps(_mm512_and_si512(moved, mask));
    return _mm512_permutexvar_ps(moved, _mm512_cvtepi32_ps(_mm512_and_si512(ranks, mask)));
}

/* Elementwise operations. */

#define QZ_BYTES (4 * QZ_LANES)
typedef __m512i v_bytes;

#define QZ_FUSED 1
static inline v_f32 fused_f32(v_f32 a, v_f32 b, v_f32 c) { return _mm512_fmadd_ps(a, b, c); }

static inline int any_i32(v_i32 mask) { return _mm512_test_epi32_mask(mask, mask) != 0; }

/* VPERMPS looks at the lowest four bits of a lane. */
static inline void f32_from_fp4(v_f32 to[2], const uint8_t *packed) {
    const __m512 numbers = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, //
                                          -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
    const __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)packed));
    const __m256i codes = _mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4));
    to[0] = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm256_castsi256_si128(codes)), numbers);
    to[1] = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm256_extracti128_si256(codes, 1)), numbers);
}

static inline v_i32 f32_from_e4m3(v_f32 to[2], const uint8_t *codes) {
    const __m256i v = _mm256_loadu_si256((const __m256i *)codes), largest = _mm256_set1_epi8(0x7f);
    const __m512i wide = _mm512_srai_epi16(_mm512_slli_epi16(_mm512_cvtepu8_epi16(v), 8), 1);
    const __m512i halves = _mm512_and_si512(wide, _mm512_set1_epi16((short)0xbfff));
    to[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    to[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
    return _mm512_zextsi256_si512(_mm256_cmpeq_epi8(_mm256_and_si256(v, largest), largest));
}

/* Of float32 numbers, the upper halves are all that is not 0. Their bytes are looked up by a code's magnitude, seven
 * bits, which are those at which VPERMI2B looks, and joined by unpacking, which every pipe can do: 10 operations for 64
 * codes, where conversions from float16 take twice as many. */
#define QZ_E4M3_BITS(c)                          \
    ((c) == 0x7f ? 0x7fc0                        \
     : (c) >= 8  ? (112 << 7) + ((c) << 4)       \
     : (c) >= 4  ? (112 << 7) + (((c) & 3) << 5) \
     : (c) >= 2  ? (111 << 7) + (((c) & 1) << 6) \
                 : (c) * (110 << 7))
#define QZ_E4M3_LOW(c) QZ_E4M3_BITS(c) & 0xff
#define QZ_E4M3_HIGH(c) QZ_E4M3_BITS(c) >> 8
#define QZ_E4M3_8(byte, c) \
    byte(c), byte(c + 1), byte(c + 2), byte(c + 3), byte(c + 4), byte(c + 5), byte(c + 6), byte(c + 7)
#define QZ_E4M3_32(byte, c) QZ_E4M3_8(byte, c), QZ_E4M3_8(byte, c + 8), QZ_E4M3_8(byte, c + 16), QZ_E4M3_8(byte, c + 24)
#define QZ_E4M3_128(byte) {QZ_E4M3_32(byte, 0), QZ_E4M3_32(byte, 32), QZ_E4M3_32(byte, 64), QZ_E4M3_32(byte, 96)}
static const uint8_t e4m3_low[128] = QZ_E4M3_128(QZ_E4M3_LOW), e4m3_high[128] = QZ_E4M3_128(QZ_E4M3_HIGH);

#define QZ_E4M3_TOGETHER 64
QZ_INLINE void f32_of_spread_e4m3(v_f32 to[4], __m512i at) {
    const __m512i none = _mm512_setzero_si512();
    const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(e4m3_low), at, _mm512_loadu_si512(e4m3_low + 64));
    __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(e4m3_high), at, _mm512_loadu_si512(e4m3_high + 64));
    high = _mm512_ternarylogic_epi32(at, _mm512_set1_epi8((char)0x80), high, 0xea); /* at & 0x80 | high */
    const __m512i a = _mm512_unpacklo_epi8(low, high), b = _mm512_unpackhi_epi8(low, high);
    to[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(none, a));
    to[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(none, a));
    to[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(none, b));
    to[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(none, b));
}
QZ_INLINE v_i32 f32_from_e4m3_together(v_f32 to[4], const uint8_t *codes) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    f32_of_spread_e4m3(to, _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes)));
    return _mm512_setzero_si512();
}

/* Vector j gets byte j of each lane. */
#define QZ_E4M3_OF_LANES
QZ_INLINE v_i32 f32_of_lanes_e4m3(v_f32 to[4], v_u8 codes) {
    const __m128i turned = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    f32_of_spread_e4m3(to, _mm512_shuffle_epi8(codes, _mm512_broadcast_i32x4(turned)));
    return _mm512_setzero_si512();
}

static inline v_i32 f32_from_scales_e4m3(v_f32 to[1], const uint8_t *codes, v_i32 most) {
    const __m128i v = _mm_loadu_si128((const __m128i *)codes);
    to[0] = _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(v), 7));
    return _mm512_zextsi128_si512(_mm_max_epu8(_mm512_castsi512_si128(most), v));
}
static inline int exceeds_7e(v_i32 most) {
    return _mm_movemask_epi8(_mm_adds_epu8(_mm512_castsi512_si128(most), _mm_set1_epi8(1))) != 0;
}

/* Each step halves the lanes that are left of a vector and joins two vectors. */
#define QZ_REDUCE_EACH(name, op)                                                       \
    static inline v_f32 name##_of_pair(v_f32 a, v_f32 b) {                             \
        return op(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));                 \
    }                                                                                  \
    static inline v_f32 name##_of_four(const v_f32 v[4]) {                             \
        v_f32 a = name##_of_pair(v[0], v[1]), b = name##_of_pair(v[2], v[3]);          \
        return op(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));       \
    }                                                                                  \
    static inline v_f32 name##_of_eight(const v_f32 v[8]) {                            \
        v_f32 a = name##_of_four(v), b = name##_of_four(v + 4);                        \
        return op(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee)); \
    }                                                                                  \
    static inline v_f32 name##_of_each(const v_f32 v[QZ_LANES]) {                      \
        v_f32 a = name##_of_eight(v), b = name##_of_eight(v + 8);                      \
        return op(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); \
    }
QZ_REDUCE_EACH(least, _mm512_min_ps)
QZ_REDUCE_EACH(greatest, _mm512_max_ps)

#define prefetch(at) _mm_prefetch((const char *)(at), _MM_HINT_T1)

static inline v_bytes bytes_of_f32(v_f32 v) { return _mm512_castps_si512(v); }
static inline void store_bytes(void *to, v_bytes v) { _mm512_storeu_si512(to, v); }
static inline void stream_by_16(void *to, v_bytes v) {
    _mm_stream_si128((__m128i *)to, _mm512_castsi512_si128(v));
    _mm_stream_si128((__m128i *)to + 1, _mm512_extracti32x4_epi32(v, 1));
    _mm_stream_si128((__m128i *)to + 2, _mm512_extracti32x4_epi32(v, 2));
    _mm_stream_si128((__m128i *)to + 3, _mm512_extracti32x4_epi32(v, 3));
}

static inline v_bytes join_halves(__m256i low, __m256i high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
static inline v_bytes high_u16_of_two(v_i32 a, v_i32 b) {
    return join_halves(_mm512_cvtepi32_epi16(_mm512_srli_epi32(a, 16)),
                       _mm512_cvtepi32_epi16(_mm512_srli_epi32(b, 16)));
}
static inline v_bytes f16_of_two(v_f32 a, v_f32 b) {
    return join_halves(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT), _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT));
}

static inline v_f32 round_to_f16(v_f32 v) { return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }

typedef __m512i v_table;
static inline v_table load_table(const uint16_t *entries) {
    return _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i *)entries));
}
QZ_INLINE void look_up(v_bytes found[2], v_table table, const uint8_t *packed, int bits) {
    const __m512i codes = unpack_in_order(packed, bits, 64);
    const __m256i low = _mm512_castsi512_si256(codes), high = _mm512_extracti64x4_epi64(codes, 1);
    found[0] = _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(low), table);
    found[1] = _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(high), table);
}

static inline v_bytes bytes_from_i32(v_i32 a, v_i32 b, v_i32 c, v_i32 d) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
    return _mm512_permutexvar_epi32(order, bytes);
}
static inline v_bytes min_bytes(v_bytes a, int b) { return _mm512_min_epu8(a, _mm512_set1_epi8((char)b)); }

/* As on AVX2, but for the bytes after the run, which may be any. */
#define QZ_HALF(bits) ((bits) > 1 ? (bits) / 2 : 1)
#define QZ_PACKED_BYTE(bits, k) \
    ((bits) % 2 == 0 ? (k) / QZ_HALF(bits) * 4 + (k) % QZ_HALF(bits) : (k) / (bits) * 8 + (k) % (bits)) & 63
#define QZ_PACKED_8(bits, k)                                                                                        \
    QZ_PACKED_BYTE(bits, k), QZ_PACKED_BYTE(bits, k + 1), QZ_PACKED_BYTE(bits, k + 2), QZ_PACKED_BYTE(bits, k + 3), \
        QZ_PACKED_BYTE(bits, k + 4), QZ_PACKED_BYTE(bits, k + 5), QZ_PACKED_BYTE(bits, k + 6),                      \
        QZ_PACKED_BYTE(bits, k + 7)
#define QZ_PACKED_RUN(bits)                                                                      \
    {QZ_PACKED_8(bits, 0),  QZ_PACKED_8(bits, 8),  QZ_PACKED_8(bits, 16), QZ_PACKED_8(bits, 24), \
     QZ_PACKED_8(bits, 32), QZ_PACKED_8(bits, 40), QZ_PACKED_8(bits, 48), QZ_PACKED_8(bits, 56)}
static const uint8_t packed_bytes[8][64] = {
    [1] = QZ_PACKED_RUN(1), [2] = QZ_PACKED_RUN(2), [3] = QZ_PACKED_RUN(3), [4] = QZ_PACKED_RUN(4),
    [5] = QZ_PACKED_RUN(5), [6] = QZ_PACKED_RUN(6), [7] = QZ_PACKED_RUN(7),
};

/* As on AVX2, but that one VPERMB gathers the bytes of all lanes. */
QZ_INLINE void store_packed(uint8_t *packed, v_bytes codes, int bits) {
    if (bits == 8) {
        _mm512_storeu_si512(packed, codes);
        return;
    }
    if (bits == 7) {
        uint8_t plain[64];
        _mm512_storeu_si512(plain, codes);
        pack_bits(packed, plain, bits, 64);
        return;
    }
    const int empty = 32 - 4 * bits;
    __m512i v = _mm512_maddubs_epi16(codes, _mm512_set1_epi16((short)(1 | 1 << (8 + bits))));
    v = _mm512_madd_epi16(v, _mm512_set1_epi32(1 | 1 << (16 + 2 * bits)));
    if (bits % 2) v = _mm512_srli_epi64(_mm512_sllv_epi32(v, _mm512_set1_epi64(empty)), (unsigned)empty);
    v = _mm512_permutexvar_epi8(_mm512_loadu_si512(packed_bytes[bits]), v);
    _mm512_storeu_si512(packed, v);
}

static inline v_bytes loose_bytes_from_i32(v_i32 a, v_i32 b, v_i32 c, v_i32 d) {
    return _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
}
/* Packing leaves the bytes of vector v in dword v of each 128-bit lane; VPERMB puts in order what they were joined to.
 */
#define QZ_NIBBLES_OF(v) \
    4 * (v), 4 * (v) + 2, 4 * (v) + 16, 4 * (v) + 18, 4 * (v) + 32, 4 * (v) + 34, 4 * (v) + 48, 4 * (v) + 50
static inline __m256i join_loose_nibbles(v_bytes codes) {
    static const uint8_t order[64] = {QZ_NIBBLES_OF(0), QZ_NIBBLES_OF(1), QZ_NIBBLES_OF(2), QZ_NIBBLES_OF(3)};
    const __m512i pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(1 | 16 << 8));
    return _mm512_castsi512_si256(_mm512_permutexvar_epi8(_mm512_loadu_si512(order), pairs));
}
QZ_INLINE void store_loose_nibbles(uint8_t *packed, const v_bytes codes[2]) {
    _mm256_storeu_si256((__m256i *)packed, join_loose_nibbles(codes[0]));
    _mm256_storeu_si256((__m256i *)packed + 1, join_loose_nibbles(codes[1]));
}

/* The KV cache. */

#define QZ_TABLE_BITS 5

QZ_INLINE v_f32 partner_f32(v_f32 v, int distance) {
    if (distance == 8) return _mm512_shuffle_f32x4(v, v, 0x4e);
    if (distance == 4) return _mm512_shuffle_f32x4(v, v, 0xb1);
    return distance == 1 ? _mm512_shuffle_ps(v, v, 0xb1) : _mm512_shuffle_ps(v, v, 0x4e);
}
static inline float first_f32(v_f32 v) { return _mm_cvtss_f32(_mm512_castps512_ps128(v)); }

QZ_INLINE void store_nibbles(uint8_t *packed, const v_i32 codes[4]) {
    const __m256i joined = join_loose_nibbles(loose_bytes_from_i32(codes[0], codes[1], codes[2], codes[3]));
    _mm256_storeu_si256((__m256i *)packed, joined);
}

/* VRANGEPS: the smaller magnitude (2) with the sign of the first operand. */
static inline v_f32 clamp_f32(v_f32 v, v_f32 most) { return _mm512_range_ps(v, most, 2); }

static inline v_i32 count_greater(v_i32 counts, v_f32 a, v_f32 b) {
    const __mmask16 greater = _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
    return _mm512_mask_add_epi32(counts, greater, counts, _mm512_set1_epi32(1));
}

QZ_INLINE v_f32 look_up_f32(const float *table, v_i32 index, int bits) {
    const __m512 first = _mm512_loadu_ps(table);
    if (bits <= 4) return _mm512_permutexvar_ps(index, first);
    if (bits > 6) return _mm512_i32gather_ps(index, table, 4);
    const __m512 low = _mm512_permutex2var_ps(first, index, _mm512_loadu_ps(table + 16));
    if (bits == 5) return low;
    const __m512 high = _mm512_permutex2var_ps(_mm512_loadu_ps(table + 32), index, _mm512_loadu_ps(table + 48));
    return _mm512_mask_blend_ps(_mm512_test_epi32_mask(index, _mm512_set1_epi32(32)), low, high);
}
static inline v_i32 gather_u8(const uint8_t *table, v_i32 index) {
    return _mm512_and_si512(_mm512_i32gather_epi32(index, table, 1), _mm512_set1_epi32(0xff));
}
static inline v_bytes load_codes(const void *from) { return _mm512_loadu_si512(from); }

/* Attention over the KV cache. */

#define QZ_DIRECT_ROWS 8
#define QZ_SCORE_SUMS 16
#define QZ_SCORE_TOGETHER 8
#define QZ_SCORE_ROWS 4
#define QZ_SCORE_POSITIONS 4
#define QZ_WEIGH_ROWS 4
#define QZ_WEIGH_VECTORS 4
#define QZ_WEIGH_HALVES 4

QZ_INLINE v_f32 sum_of_each(const float *chains) {
    __m512 v[16], eights[8], fours[4], twos[2];
    QZ_UNROLL
    for (int i = 0; i < 16; i++) /* such an order that the last step leaves the sums in order */
        v[i] = _mm512_loadu_ps(chains + 16 * (i % 4 * 4 + i / 4));
    QZ_UNROLL
    for (int i = 0; i < 8; i++) {
        __m512 a = v[2 * i], b = v[2 * i + 1];
        eights[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    QZ_UNROLL
    for (int i = 0; i < 4; i++) {
        __m512 a = eights[2 * i], b = eights[2 * i + 1];
        fours[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    QZ_UNROLL
    for (int i = 0; i < 2; i++) {
        __m512 a = fours[2 * i], b = fours[2 * i + 1];
        twos[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    return _mm512_add_ps(_mm512_shuffle_ps(twos[0], twos[1], 0x44), _mm512_shuffle_ps(twos[0], twos[1], 0xee));
}

/* Up to 64 values, those that are bfloat16 as words too; all 256 by their bytes, 64 to a register. */
typedef struct v_centroids {
    __m512 of_16[4];
    __m512i words[2], planes[4][4];
} v_centroids;
QZ_INLINE v_centroids load_centroids(const float *values, const uint8_t planes[1024]) {
    v_centroids c;
    QZ_UNROLL
    for (int i = 0; i < 4; i++) c.of_16[i] = _mm512_loadu_ps(values + 16 * i);
    QZ_UNROLL
    for (int i = 0; i < 2; i++)
        c.words[i] = high_u16_of_two(_mm512_castps_si512(c.of_16[2 * i]), _mm512_castps_si512(c.of_16[2 * i + 1]));
    QZ_UNROLL
    for (int i = 0; i < 16; i++) c.planes[i % 4][i / 4] = _mm512_loadu_si512(planes + 64 * i);
    return c;
}

/* Lanes 8 u + 4 h + d take what is left over of the number of an element, 32 h + 16 u + 4 d + step: lanes of 64 bits
 * get the bytes of eight codes, from 8 (4 h + 2 u + d / 2) on, and each step takes one of them into either half. Of 4
 * bits, lanes get the byte of steps 0 and 2 and, in their upper half, that of steps 1 and 3. Of 8 bits, each 128 bits
 * get the four bytes of each step after another: those of steps 0, 2, 1 and 3. */
#define QZ_EIGHT_CODES(bits, eighth) ((int64_t)((bits) * (eighth)) * 0x0101010101010101 + 0x0706050403020100)
#define QZ_EIGHT_NIBBLES(eighth) ((int64_t)(eighth) * 0x0404040404040404 + 0x0303020201010000)
#define QZ_EIGHT_BYTES(lane, odd) ((int64_t)((lane) * 16 + (odd)) * 0x0101010101010101 + 0x0e0a06020c080400)
typedef __m512i v_codes;

QZ_INLINE v_codes codes_of_64(const uint8_t *packed, int bits) {
    if (bits == 8) {
        const __m512i order =
            _mm512_setr_epi64(QZ_EIGHT_BYTES(0, 0), QZ_EIGHT_BYTES(0, 1), QZ_EIGHT_BYTES(2, 0), QZ_EIGHT_BYTES(2, 1),
                              QZ_EIGHT_BYTES(1, 0), QZ_EIGHT_BYTES(1, 1), QZ_EIGHT_BYTES(3, 0), QZ_EIGHT_BYTES(3, 1));
        return _mm512_permutexvar_epi8(order, _mm512_loadu_si512(packed));
    }
    if (bits == 4) {
        const __m512i order =
            _mm512_setr_epi64(QZ_EIGHT_NIBBLES(0), QZ_EIGHT_NIBBLES(1), QZ_EIGHT_NIBBLES(4), QZ_EIGHT_NIBBLES(5),
                              QZ_EIGHT_NIBBLES(2), QZ_EIGHT_NIBBLES(3), QZ_EIGHT_NIBBLES(6), QZ_EIGHT_NIBBLES(7));
        const __m256i bytes = _mm256_loadu_si256((const __m256i *)packed);
        return _mm512_permutexvar_epi8(order, _mm512_zextsi256_si512(bytes));
    }
    const __m512i order = _mm512_setr_epi64(QZ_EIGHT_CODES(bits, 0), QZ_EIGHT_CODES(bits, 1), QZ_EIGHT_CODES(bits, 4),
                                            QZ_EIGHT_CODES(bits, 5), QZ_EIGHT_CODES(bits, 2), QZ_EIGHT_CODES(bits, 3),
                                            QZ_EIGHT_CODES(bits, 6), QZ_EIGHT_CODES(bits, 7));
    return _mm512_permutexvar_epi8(order, _mm512_maskz_loadu_epi8(~UINT64_C(0) >> (64 - 8 * bits), packed));
}

/* Codes of steps `half` and half + 2 at the bottom of the halves of their lanes, with something else above them. */
QZ_INLINE __m512i codes_of_steps(v_codes codes, int bits, int half) {
    const int64_t first = bits * half, second = first + 2 * bits, next_lane = 4 * bits;
    if (bits == 4) return half ? _mm512_srli_epi32(codes, 4) : codes;
    const int64_t low = second << 16 | first, high = (second + next_lane) << 16 | (first + next_lane);
    return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(high << 32 | low), codes);
}

/* VPERMI2B looks at seven bits. The bytes of floats are joined by unpacking. */
QZ_INLINE void centroids_of_bytes(v_f32 to[2], v_codes codes, const v_centroids *c, int half) {
    const __mmask64 is_upper = _mm512_movepi8_mask(codes);
    __m512i bytes[4], words[2];
    QZ_UNROLL
    for (int i = 0; i < 4; i++) {
        const __m512i *of_128 = c->planes[i];
        const __m512i lower = _mm512_permutex2var_epi8(of_128[0], codes, of_128[1]);
        const __m512i upper = _mm512_permutex2var_epi8(of_128[2], codes, of_128[3]);
        bytes[i] = _mm512_mask_blend_epi8(is_upper, lower, upper);
    }
    QZ_UNROLL
    for (int i = 0; i < 2; i++)
        words[i] = half ? _mm512_unpackhi_epi8(bytes[2 * i], bytes[2 * i + 1])
                        : _mm512_unpacklo_epi8(bytes[2 * i], bytes[2 * i + 1]);
    to[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(words[0], words[1]));
    to[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(words[0], words[1]));
}

/* As words, VPERMW looks at five bits, VPERMI2W at six, and of narrower codes the values are repeated. */
QZ_INLINE void centroids_of_32(v_f32 to[2], v_codes codes, const v_centroids *c, int bits, int is_wide, int half) {
    if (bits == 8) {
        centroids_of_bytes(to, codes, c, half);
        return;
    }
    const __m512i of_steps = codes_of_steps(codes, bits, half);
    if (is_wide || bits == 4) { /* VPERMPS looks at four bits; words would take as many instructions */
        to[0] = _mm512_permutexvar_ps(of_steps, c->of_16[0]);
        to[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(of_steps, 16), c->of_16[0]);
        return;
    }
    const __m512i words = bits < 6 ? _mm512_permutexvar_epi16(of_steps, c->words[0])
                                   : _mm512_permutex2var_epi16(c->words[0], of_steps, c->words[1]);
    to[0] = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    to[1] = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-0x10000)));
}

#endif
