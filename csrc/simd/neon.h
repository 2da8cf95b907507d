/* The vector primitives on AArch64's base instruction set: four lanes. Contracts: simd/generic.h and simd/dot.h. */
#ifndef QZ_SIMD_NEON_H
#define QZ_SIMD_NEON_H

#include <arm_neon.h>

#include "../arch.h"
#include "../half.h"
#include "bits.h"

#define QZ_LANES 4
#define QZ_FLOAT_ROWS 12

typedef float32x4_t v_f32;
typedef int32x4_t v_i32;
typedef uint8x16_t v_u8;

#define QZ_HOLD(v) __asm__ volatile("" : "+w"(v))
#include "dot.h"

static inline v_f32 load_f32(const float *from) { return vld1q_f32(from); }
static inline void store_f32(float *to, v_f32 v) { vst1q_f32(to, v); }
static inline void stream_f32(float *to, v_f32 v) { vst1q_f32(to, v); }
static inline void stream_end(void) {}
static inline v_i32 load_i32(const int32_t *from) { return vld1q_s32(from); }
static inline void store_i32(int32_t *to, v_i32 v) { vst1q_s32(to, v); }

static inline v_f32 set1_f32(float x) { return vdupq_n_f32(x); }
static inline v_i32 set1_i32(int32_t x) { return vdupq_n_s32(x); }
static inline v_i32 bits_of_f32(v_f32 v) { return vreinterpretq_s32_f32(v); }
static inline v_f32 f32_of_bits(v_i32 v) { return vreinterpretq_f32_s32(v); }

static inline v_f32 add_f32(v_f32 a, v_f32 b) { return vaddq_f32(a, b); }
static inline v_f32 sub_f32(v_f32 a, v_f32 b) { return vsubq_f32(a, b); }
static inline v_f32 mul_f32(v_f32 a, v_f32 b) { return vmulq_f32(a, b); }
static inline v_f32 fma_f32(v_f32 a, v_f32 b, v_f32 c) { return vfmaq_f32(c, a, b); }
static inline v_f32 div_f32(v_f32 a, v_f32 b) { return vdivq_f32(a, b); }
/* FMIN and FMAX would give NaN where either operand is NaN, and tell -0 from 0. */
static inline v_f32 min_f32(v_f32 a, v_f32 b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
static inline v_f32 max_f32(v_f32 a, v_f32 b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
static inline v_f32 trunc_f32(v_f32 v) { return vrndq_f32(v); }

static inline v_i32 add_i32(v_i32 a, v_i32 b) { return vaddq_s32(a, b); }
static inline v_i32 sub_i32(v_i32 a, v_i32 b) { return vsubq_s32(a, b); }
static inline v_i32 and_i32(v_i32 a, v_i32 b) { return vandq_s32(a, b); }
static inline v_i32 or_i32(v_i32 a, v_i32 b) { return vorrq_s32(a, b); }
static inline v_i32 xor_i32(v_i32 a, v_i32 b) { return veorq_s32(a, b); }
static inline v_i32 max_i32(v_i32 a, v_i32 b) { return vmaxq_s32(a, b); }
static inline v_i32 greater_i32(v_i32 a, v_i32 b) { return vreinterpretq_s32_u32(vcgtq_s32(a, b)); }
static inline v_i32 select_i32(v_i32 mask, v_i32 yes, v_i32 no) {
    return vbslq_s32(vreinterpretq_u32_s32(mask), yes, no);
}
/* By operators: clang's intrinsics take literals alone, not parameters that become constants when inlined. */
#define shr_u32(v, count) vreinterpretq_s32_u32(vreinterpretq_u32_s32(v) >> (uint32_t)(count))
#define shl_i32(v, count) vreinterpretq_s32_u32(vreinterpretq_u32_s32(v) << (uint32_t)(count))

static inline v_f32 f32_from_i32(v_i32 v) { return vcvtq_f32_s32(v); }
static inline v_i32 i32_from_f32_truncate(v_f32 v) { return vcvtq_s32_f32(v); }
static inline v_i32 i32_from_f32_nearest(v_f32 v) { return vcvtnq_s32_f32(v); }

static inline v_i32 i32_from_u16(const uint16_t *from) { return vreinterpretq_s32_u32(vmovl_u16(vld1_u16(from))); }
static inline v_i32 i32_from_u8(const uint8_t *from) {
    uint32_t four;
    memcpy(&four, from, sizeof four);
    uint16x8_t wide = vmovl_u8(vcreate_u8(four));
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide)));
}
static inline void store_low_u8(uint8_t *to, v_i32 v) {
    uint16x4_t halves = vmovn_u32(vreinterpretq_u32_s32(v));
    uint32_t four = vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(halves, halves))), 0);
    memcpy(to, &four, sizeof four);
}
static inline v_f32 f32_from_f16(const uint16_t *from) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))); }
static inline void store_f16_from_f32(uint16_t *to, v_f32 v) { vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(v))); }

/* Integer dots. Only signed bytes multiply signed bytes: codes of 8 bits are moved to -128...127. */

#define QZ_DOT_ZERO(bits) ((bits) == 8 ? 128 : 0)

static inline v_u8 u8_of_i32(v_i32 v) { return vreinterpretq_u8_s32(v); }
static inline v_u8 load_u8(const void *from) { return vld1q_u8(from); }
static inline void store_u8(uint8_t *to, v_u8 v) { vst1q_u8(to, v); }

static inline int8x16_t signed_codes(v_u8 codes, int bits) {
    return vreinterpretq_s8_u8(bits == 8 ? veorq_u8(codes, vdupq_n_u8(128)) : codes);
}

#ifndef QZ_DOT_NAME /* else neon_dotprod.h brings dot4 */
#define QZ_DOT_NAME "smull"

/* Two products of a 7-bit code and an int8 add up within int16: 2 * 127 * 128 = 32512. Two of a code of -128 and a
 * digit of -128 do not: 8 bits add in 32. */
static inline v_i32 dot4(v_i32 sum, v_u8 codes, v_u8 digits, int bits) {
    int8x16_t c = signed_codes(codes, bits), d = vreinterpretq_s8_u8(digits);
    int16x8_t low = vmull_s8(vget_low_s8(c), vget_low_s8(d)), high = vmull_high_s8(c, d);
    if (bits < 8) return vpadalq_s16(sum, vpaddq_s16(low, high));
    return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
}
#endif

QZ_INLINE v_i32 dot4_units(v_i32 sum, const v_u8 *codes, const int8_t *digits, int units, int bits, int factor) {
    (void)factor;
    QZ_UNROLL
    for (int i = 0; i < units; i++) sum = dot4(sum, codes[i], load_u8(digits + 16 * i), bits);
    return sum;
}

QZ_INLINE v_i32 sum_blocks(const v_i32 *v, int lanes) {
    if (lanes == 4) return vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3]));
    return vpaddq_s32(v[0], v[1]);
}

#define QZ_LOOSE_PLACE(i) (i)
static inline v_f32 loosen_f32(v_f32 v) { return v; }
QZ_INLINE v_i32 sum_pairs_loosely(const v_i32 *v) { return sum_blocks(v, 2); }

QZ_INLINE void transpose_f32(v_f32 *rows) {
    float32x4x2_t a = vtrnq_f32(rows[0], rows[1]), b = vtrnq_f32(rows[2], rows[3]);
    rows[0] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
    rows[1] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
    rows[2] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
    rows[3] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}
static inline v_f32 double_lanes(v_f32 v) { return vzip1q_f32(v, v); }

static inline void store_interleaved_4(uint8_t *to, v_u8 a, v_u8 b, v_u8 c, v_u8 d) {
    const uint8x16x4_t all = {{a, b, c, d}};
    vst4q_u8(to, all);
}

/* How 16 codes lie in their 2 * bits bytes: code i begins in byte first[i], down[i] bits from its low end (USHL shifts
 * right by negative counts), and may go on in the byte after. */
typedef struct code_places {
    uint8x16_t first, mask;
    int8x16_t down;
} code_places;

static inline code_places places_of_codes(int bits) {
    const uint8x16_t ranks = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const uint8x16_t bit = vmulq_u8(ranks, vdupq_n_u8((uint8_t)bits));
    code_places p;
    p.first = vshrq_n_u8(bit, 3);
    p.down = vnegq_s8(vreinterpretq_s8_u8(vandq_u8(bit, vdupq_n_u8(7))));
    p.mask = vdupq_n_u8((uint8_t)((1 << bits) - 1));
    return p;
}

/* The 16 codes that begin at byte `at` of bytes. TBL gives 0 for the byte beyond the last. */
static inline uint8x16_t fetch_16_codes(uint8x16_t bytes, ptrdiff_t at, const code_places *p) {
    const uint8x16_t first = vaddq_u8(p->first, vdupq_n_u8((uint8_t)at));
    const uint8x16_t next = vaddq_u8(first, vdupq_n_u8(1));
    uint8x16_t low = vshlq_u8(vqtbl1q_u8(bytes, first), p->down);
    uint8x16_t high = vshlq_u8(vqtbl1q_u8(bytes, next), vaddq_s8(p->down, vdupq_n_s8(8)));
    return vandq_u8(vorrq_u8(low, high), p->mask);
}

QZ_INLINE v_u8 unpack_in_order(const uint8_t *packed, int bits, ptrdiff_t count) {
    (void)count;
    if (bits == 8) return vld1q_u8(packed);
    const code_places places = places_of_codes(bits);
    uint8_t bytes[16] = {0};
    memcpy(bytes, packed, (size_t)(2 * bits));
    return fetch_16_codes(vld1q_u8(bytes), 0, &places);
}

static inline v_u8 look_up_u8(const uint8_t table[16], v_u8 codes) { return vqtbl1q_u8(vld1q_u8(table), codes); }

QZ_INLINE void unpack_folded(v_u8 *codes, const uint8_t *packed, int bits) {
    const int fold = QZ_FOLD(bits);
    if (fold == 1) {
        codes[0] = unpack_in_order(packed, bits, 16);
    } else {
        const uint8x16_t mask = vdupq_n_u8((uint8_t)((1 << bits) - 1)), bytes = vld1q_u8(packed);
        QZ_UNROLL
        for (int i = 0; i < fold; i++) {
            codes[i] = vandq_u8(vshlq_u8(bytes, vdupq_n_s8((int8_t)(-i * bits))), mask);
        }
    }
}

/* Sixteen codes a step. Bytes are read 16 at a time; where fewer than 16 are left, all further codes come out of the
 * last 16, or of a copy if there are not so many. */
static inline void unpack_bits(uint8_t *codes, const uint8_t *packed, int bits, ptrdiff_t count) {
    const code_places places = places_of_codes(bits);
    const ptrdiff_t size = count / 8 * bits;
    ptrdiff_t i = 0, at = 0;
    if (bits == 8) {
        memcpy(codes, packed, (size_t)count);
        return;
    }
    for (; at + 16 <= size; i += 16, at += 2 * bits) {
        vst1q_u8(codes + i, fetch_16_codes(vld1q_u8(packed + at), 0, &places));
    }
    uint8_t few[16] = {0};
    if (size < 16) memcpy(few, packed, (size_t)size);
    const uint8x16_t last = vld1q_u8(size < 16 ? few : packed + size - 16);
    const ptrdiff_t base = size < 16 ? 0 : size - 16;
    for (; i + 16 <= count; i += 16, at += 2 * bits) {
        vst1q_u8(codes + i, fetch_16_codes(last, at - base, &places));
    }
    unpack_bits_by_8(codes + i, packed + at, bits, count - i);
}

/* Tiles: four rows of x by four vectors, 16 sums. */
#define QZ_TILE_M 4
#define QZ_TILE_VECTORS 4

/* The float class of matmul. */

QZ_INLINE v_f32 f32_of_code(v_i32 words, int index, int bits) {
    uint32x4_t moved = vshlq_u32(vreinterpretq_u32_s32(words), vdupq_n_s32(-index * bits));
    return vcvtq_f32_u32(vandq_u32(moved, vdupq_n_u32((1u << bits) - 1)));
}

/* Elementwise operations. */

#define QZ_BYTES (4 * QZ_LANES)
typedef uint8x16_t v_bytes;

#define QZ_FUSED 1
static inline v_f32 fused_f32(v_f32 a, v_f32 b, v_f32 c) { return vfmaq_f32(c, a, b); }

static inline int any_i32(v_i32 mask) { return vmaxvq_u32(vreinterpretq_u32_s32(mask)) != 0; }

/* The upper bytes of the numbers, of bfloat16 as it were, are looked up. */
static inline void f32_from_fp4(v_f32 to[8], const uint8_t *packed) {
    const uint8x16_t low = {0, 0, 0x80, 0xc0, 0, 0x40, 0x80, 0xc0, 0, 0, 0x80, 0xc0, 0, 0x40, 0x80, 0xc0};
    const uint8x16_t high = {0,    0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40,
                             0x80, 0xbf, 0xbf, 0xbf, 0xc0, 0xc0, 0xc0, 0xc0};
    const uint8x16_t pairs = vld1q_u8(packed), even = vandq_u8(pairs, vdupq_n_u8(15)), odd = vshrq_n_u8(pairs, 4);
    const uint8x16_t codes[2] = {vzip1q_u8(even, odd), vzip2q_u8(even, odd)};
    for (int i = 0; i < 2; i++) {
        const uint8x16_t lower = vqtbl1q_u8(low, codes[i]), upper = vqtbl1q_u8(high, codes[i]);
        const uint16x8_t words[2] = {vreinterpretq_u16_u8(vzip1q_u8(lower, upper)),
                                     vreinterpretq_u16_u8(vzip2q_u8(lower, upper))};
        for (int j = 0; j < 2; j++) {
            to[4 * i + 2 * j] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(words[j]), 16));
            to[4 * i + 2 * j + 1] = vreinterpretq_f32_u32(vshll_high_n_u16(words[j], 16));
        }
    }
}

static inline v_i32 f32_from_e4m3(v_f32 to[8], const uint8_t *codes) {
    const uint8x16_t largest = vdupq_n_u8(0x7f);
    uint8x16_t odd = vdupq_n_u8(0);
    for (int i = 0; i < 2; i++) {
        const uint8x16_t v = vld1q_u8(codes + 16 * i);
        const uint16x8_t wide[2] = {vshll_n_u8(vget_low_u8(v), 8), vshll_n_u8(vget_high_u8(v), 8)};
        for (int j = 0; j < 2; j++) {
            const int16x8_t moved =
                vandq_s16(vshrq_n_s16(vreinterpretq_s16_u16(wide[j]), 1), vdupq_n_s16((short)0xbfff));
            const float16x8_t halves = vreinterpretq_f16_s16(moved);
            to[4 * i + 2 * j] = vcvt_f32_f16(vget_low_f16(halves));
            to[4 * i + 2 * j + 1] = vcvt_high_f32_f16(halves);
        }
        odd = vorrq_u8(odd, vceqq_u8(vandq_u8(v, largest), largest));
    }
    return vreinterpretq_s32_u8(odd);
}

static inline v_i32 f32_from_scales_e4m3(v_f32 to[4], const uint8_t *codes, v_i32 most) {
    const uint8x16_t v = vld1q_u8(codes);
    const float16x8_t low = vreinterpretq_f16_u16(vshll_n_u8(vget_low_u8(v), 7));
    const float16x8_t high = vreinterpretq_f16_u16(vshll_n_u8(vget_high_u8(v), 7));
    to[0] = vcvt_f32_f16(vget_low_f16(low));
    to[1] = vcvt_high_f32_f16(low);
    to[2] = vcvt_f32_f16(vget_low_f16(high));
    to[3] = vcvt_high_f32_f16(high);
    return vreinterpretq_s32_u8(vmaxq_u8(vreinterpretq_u8_s32(most), v));
}
static inline int exceeds_7e(v_i32 most) { return vmaxvq_u8(vreinterpretq_u8_s32(most)) > 0x7e; }

static inline v_f32 least_of_each(const v_f32 v[QZ_LANES]) {
    return vpminq_f32(vpminq_f32(v[0], v[1]), vpminq_f32(v[2], v[3]));
}
static inline v_f32 greatest_of_each(const v_f32 v[QZ_LANES]) {
    return vpmaxq_f32(vpmaxq_f32(v[0], v[1]), vpmaxq_f32(v[2], v[3]));
}

#define prefetch(at) __builtin_prefetch(at, 0, 2)

static inline v_bytes bytes_of_f32(v_f32 v) { return vreinterpretq_u8_f32(v); }
static inline void store_bytes(void *to, v_bytes v) { vst1q_u8(to, v); }
static inline void stream_by_16(void *to, v_bytes v) { vst1q_u8(to, v); }

static inline v_bytes high_u16_of_two(v_i32 a, v_i32 b) {
    return vreinterpretq_u8_u16(vuzp2q_u16(vreinterpretq_u16_s32(a), vreinterpretq_u16_s32(b)));
}
static inline v_bytes f16_of_two(v_f32 a, v_f32 b) {
    return vreinterpretq_u8_f16(vcombine_f16(vcvt_f16_f32(a), vcvt_f16_f32(b)));
}

static inline v_f32 round_to_f16(v_f32 v) { return vcvt_f32_f16(vcvt_f16_f32(v)); }

typedef uint8x16x2_t v_table;
static inline v_table load_table(const uint16_t *entries) { return vld2q_u8((const uint8_t *)entries); }
QZ_INLINE void look_up(v_bytes found[2], v_table table, const uint8_t *packed, int bits) {
    const uint8x16_t v = unpack_in_order(packed, bits, 16);
    const uint8x16_t low = vqtbl1q_u8(table.val[0], v), high = vqtbl1q_u8(table.val[1], v);
    found[0] = vzip1q_u8(low, high);
    found[1] = vzip2q_u8(low, high);
}

static inline v_bytes bytes_from_i32(v_i32 a, v_i32 b, v_i32 c, v_i32 d) {
    uint16x8_t low = vqmovun_high_s32(vqmovun_s32(a), b), high = vqmovun_high_s32(vqmovun_s32(c), d);
    return vqmovn_high_u16(vqmovn_u16(low), high);
}
static inline v_bytes min_bytes(v_bytes a, int b) { return vminq_u8(a, vdupq_n_u8((uint8_t)b)); }

/* Neighbours are joined in lanes of 16, 32 and 64 bits, the upper one times a power of two; TBL drops the empty
 * bytes. */
QZ_INLINE void store_packed(uint8_t *packed, v_bytes codes, int bits) {
    const uint8x16_t ranks = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const uint8x16_t upper = vcgeq_u8(ranks, vdupq_n_u8((uint8_t)bits));
    const uint8x16_t order = vaddq_u8(ranks, vandq_u8(upper, vdupq_n_u8((uint8_t)(8 - bits))));
    if (bits == 8) {
        vst1q_u8(packed, codes);
        return;
    }
    uint16x8_t twos = vreinterpretq_u16_u8(codes);
    twos = vmlaq_n_u16(vandq_u16(twos, vdupq_n_u16(0xff)), vshrq_n_u16(twos, 8), (uint16_t)(1 << bits));
    uint32x4_t fours = vreinterpretq_u32_u16(twos);
    fours = vmlaq_n_u32(vandq_u32(fours, vdupq_n_u32(0xffff)), vshrq_n_u32(fours, 16), 1u << 2 * bits);
    uint64x2_t eights = vreinterpretq_u64_u32(fours);
    uint64x2_t high = vshlq_u64(vshrq_n_u64(eights, 32), vdupq_n_s64(4 * bits));
    eights = vorrq_u64(vandq_u64(eights, vdupq_n_u64(0xffffffff)), high);
    vst1q_u8(packed, vqtbl1q_u8(vreinterpretq_u8_u64(eights), order));
}

static inline v_bytes loose_bytes_from_i32(v_i32 a, v_i32 b, v_i32 c, v_i32 d) { return bytes_from_i32(a, b, c, d); }
QZ_INLINE void store_loose_nibbles(uint8_t *packed, const v_bytes codes[2]) {
    const uint8x16_t even = vuzp1q_u8(codes[0], codes[1]), odd = vuzp2q_u8(codes[0], codes[1]);
    vst1q_u8(packed, vsliq_n_u8(even, odd, 4));
}

/* The KV cache. */

#define QZ_TABLE_BITS 4

QZ_INLINE v_f32 partner_f32(v_f32 v, int distance) { return distance == 1 ? vrev64q_f32(v) : vextq_f32(v, v, 2); }
static inline float first_f32(v_f32 v) { return vgetq_lane_f32(v, 0); }

QZ_INLINE void store_nibbles(uint8_t *packed, const v_i32 codes[4]) {
    const uint16x8_t pairs = vreinterpretq_u16_u8(bytes_from_i32(codes[0], codes[1], codes[2], codes[3]));
    vst1_u8(packed, vmovn_u16(vsraq_n_u16(pairs, pairs, 4)));
}

static inline v_i32 count_greater(v_i32 counts, v_f32 a, v_f32 b) {
    return vsubq_s32(counts, vreinterpretq_s32_u32(vcgtq_f32(a, b)));
}

/* TBX keeps what it is given where an index is beyond its 64 bytes. */
QZ_INLINE v_f32 look_up_f32(const float *table, v_i32 index, int bits) {
    if (bits > 6) {
        int32_t at[4];
        vst1q_s32(at, index);
        const float found[4] = {table[at[0]], table[at[1]], table[at[2]], table[at[3]]};
        return vld1q_f32(found);
    }
    const uint8_t *bytes = (const uint8_t *)table;
    const uint32x4_t four = vmlaq_n_u32(vdupq_n_u32(0x03020100), vreinterpretq_u32_s32(index), 0x04040404);
    const uint8x16_t at = vreinterpretq_u8_u32(four);
    uint8x16_t found = vqtbl4q_u8(vld1q_u8_x4(bytes), at);
    QZ_UNROLL
    for (int i = 64; i < 4 << bits; i += 64) {
        found = vqtbx4q_u8(found, vld1q_u8_x4(bytes + i), vsubq_u8(at, vdupq_n_u8((uint8_t)i)));
    }
    return vreinterpretq_f32_u8(found);
}
static inline v_i32 gather_u8(const uint8_t *table, v_i32 index) {
    int32_t at[4];
    vst1q_s32(at, index);
    const int32_t found[4] = {table[at[0]], table[at[1]], table[at[2]], table[at[3]]};
    return vld1q_s32(found);
}
static inline v_bytes load_codes(const void *from) { return vld1q_u8(from); }

/* Attention over the KV cache. */

#define QZ_DIRECT_ROWS 1
#define QZ_SCORE_SUMS 2
#define QZ_SCORE_TOGETHER 2
#define QZ_SCORE_ROWS 4
#define QZ_SCORE_POSITIONS 2
#define QZ_WEIGH_ROWS 4
#define QZ_WEIGH_VECTORS 4
#define QZ_WEIGH_HALVES 2

QZ_INLINE v_f32 sum_of_each(const float *chains) {
    float32x4_t twos[2];
    QZ_UNROLL
    for (int i = 0; i < 2; i++) {
        const float32x4_t a = vld1q_f32(chains + 8 * i), b = vld1q_f32(chains + 8 * i + 4);
        twos[i] =
            vaddq_f32(vcombine_f32(vget_low_f32(a), vget_low_f32(b)), vcombine_f32(vget_high_f32(a), vget_high_f32(b)));
    }
    return vpaddq_f32(twos[0], twos[1]);
}

/* Up to 64 values by their bytes, which TBL looks up; more are loaded one by one. */
typedef struct v_centroids {
    uint8x16x4_t planes[4];
    const float *values;
} v_centroids;
QZ_INLINE v_centroids load_centroids(const float *values, const uint8_t planes[256]) {
    v_centroids c = {.values = values};
    QZ_UNROLL
    for (int i = 0; i < 4; i++) c.planes[i] = vld1q_u8_x4(planes + 64 * i);
    return c;
}

/* of[n][h]: byte i is code 32 h + 2 i + n. */
typedef struct v_codes {
    uint8x16_t of[2][2];
} v_codes;

QZ_INLINE v_codes codes_of_64(const uint8_t *packed, int bits) {
    v_codes codes;
    QZ_UNROLL
    for (int h = 0; h < 2; h++, packed += 4 * bits) {
        if (bits == 4) {
            const uint8x16_t pairs = vld1q_u8(packed);
            codes.of[0][h] = vandq_u8(pairs, vdupq_n_u8(15));
            codes.of[1][h] = vshrq_n_u8(pairs, 4);
        } else {
            const uint8x16_t a = unpack_in_order(packed, bits, 16), b = unpack_in_order(packed + 2 * bits, bits, 16);
            codes.of[0][h] = vuzp1q_u8(a, b);
            codes.of[1][h] = vuzp2q_u8(a, b);
        }
    }
    return codes;
}

QZ_INLINE uint8x16_t look_up_bytes(uint8x16x4_t table, uint8x16_t codes, int bits) {
    if (bits <= 4) return vqtbl1q_u8(table.val[0], codes);
    if (bits == 5) return vqtbl2q_u8((uint8x16x2_t){{table.val[0], table.val[1]}}, codes);
    return vqtbl4q_u8(table, codes);
}

/* Zipped to words, even and odd ones become floats by a shift and by a mask, since the lower words of bfloat16 values
 * are 0; those of others are shifted in. */
QZ_INLINE void centroids_of_32(v_f32 to[8], v_codes codes, const v_centroids *c, int bits, int is_wide, int half) {
    QZ_UNROLL
    for (int h = 0; h < 2; h++) {
        const uint8x16_t of = codes.of[half][h];
        if (bits == 8) {
            uint8_t each[16];
            vst1q_u8(each, of);
            QZ_UNROLL
            for (int i = 0; i < 4; i++) { /* from 8 u + p on, to 4 p + 2 u + h */
                const uint8_t *at = each + i % 2 * 8 + i / 2;
                to[2 * i + h] = (v_f32){c->values[at[0]], c->values[at[2]], c->values[at[4]], c->values[at[6]]};
            }
            continue;
        }
        const uint8x16_t third = look_up_bytes(c->planes[2], of, bits), fourth = look_up_bytes(c->planes[3], of, bits);
        const uint32x4_t high[2] = {vreinterpretq_u32_u8(vzip1q_u8(third, fourth)),
                                    vreinterpretq_u32_u8(vzip2q_u8(third, fourth))};
        if (is_wide) {
            const uint8x16_t first = look_up_bytes(c->planes[0], of, bits);
            const uint8x16_t second = look_up_bytes(c->planes[1], of, bits);
            const uint32x4_t low[2] = {vreinterpretq_u32_u8(vzip1q_u8(first, second)),
                                       vreinterpretq_u32_u8(vzip2q_u8(first, second))};
            QZ_UNROLL
            for (int u = 0; u < 2; u++) {
                to[2 * u + h] = vreinterpretq_f32_u32(vsliq_n_u32(low[u], high[u], 16));
                to[4 + 2 * u + h] = vreinterpretq_f32_u32(vsriq_n_u32(high[u], low[u], 16));
            }
        } else {
            QZ_UNROLL
            for (int u = 0; u < 2; u++) {
                to[2 * u + h] = vreinterpretq_f32_u32(vshlq_n_u32(high[u], 16));
                to[4 + 2 * u + h] = vreinterpretq_f32_u32(vandq_u32(high[u], vdupq_n_u32(0xffff0000)));
            }
        }
    }
}

#endif
