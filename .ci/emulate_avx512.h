/* Stands in for <immintrin.h> in the avx512 unit on machines without AVX-512: SIMDe provides most intrinsics, and those
   that its version in Debian 12 lacks are defined here, in 256-bit halves of real AVX2 instructions where there are
   such, so that rounding, NaN and saturation are the hardware's own. Compile with -mavx2 -mfma -mf16c -fwrapv
   -Wno-psabi (SIMDe adds signed lanes, which wrap on the hardware).

   Two things differ on purpose from a plain stand-in: masked loads and stores touch only the lanes of the mask, as the
   hardware promises, so that ASan sees a lane too many; and streaming stores trap on a misaligned address. */
#ifndef EMULATE_AVX512_H
#define EMULATE_AVX512_H

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(SIMDE_X86_AVX512F_NATIVE)
#error "compile without AVX-512: this header replaces it"
#endif
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile with -mavx2 -mfma -mf16c"
#endif

#define EMU static inline __attribute__((always_inline, unused))
/* Long and often used: inlined into every unrolled kernel they take the compiler many minutes. */
#define EMU_CALLED static __attribute__((noinline, unused))

/* Halves. */

EMU __m256i emu_low(__m512i v) {
    __m256i half;
    memcpy(&half, &v, sizeof half);
    return half;
}

EMU __m256i emu_high(__m512i v) {
    __m256i half;
    memcpy(&half, (const char *)&v + sizeof half, sizeof half);
    return half;
}

EMU __m512i emu_join(__m256i low, __m256i high) {
    __m512i v;
    memcpy(&v, &low, sizeof low);
    memcpy((char *)&v + sizeof low, &high, sizeof high);
    return v;
}

#define EMU_LOW_PS(v) _mm256_castsi256_ps(emu_low(_mm512_castps_si512(v)))
#define EMU_HIGH_PS(v) _mm256_castsi256_ps(emu_high(_mm512_castps_si512(v)))
#define EMU_JOIN_PS(low, high) _mm512_castsi512_ps(emu_join(_mm256_castps_si256(low), _mm256_castps_si256(high)))

/* Masked loads and stores of `lanes` elements of a `vector`, named by prefix and element type. */

#define EMU_MASKED(prefix, suffix, vector, element, mask, lanes)                                                     \
    EMU_CALLED vector emu##prefix##_mask_loadu_##suffix(vector v, mask k, const void *from) {                        \
        for (int i = 0; i < (lanes); i++)                                                                            \
            if (k >> i & 1)                                                                                          \
                memcpy((char *)&v + i * sizeof(element), (const char *)from + i * sizeof(element), sizeof(element)); \
        return v;                                                                                                    \
    }                                                                                                                \
    EMU_CALLED vector emu##prefix##_maskz_loadu_##suffix(mask k, const void *from) {                                 \
        vector zero;                                                                                                 \
        memset(&zero, 0, sizeof zero);                                                                               \
        return emu##prefix##_mask_loadu_##suffix(zero, k, from);                                                     \
    }                                                                                                                \
    EMU_CALLED void emu##prefix##_mask_storeu_##suffix(void *to, mask k, vector v) {                                 \
        for (int i = 0; i < (lanes); i++)                                                                            \
            if (k >> i & 1)                                                                                          \
                memcpy((char *)to + i * sizeof(element), (const char *)&v + i * sizeof(element), sizeof(element));   \
    }

EMU_MASKED(_mm512, epi8, __m512i, int8_t, __mmask64, 64)
EMU_MASKED(_mm512, epi16, __m512i, int16_t, __mmask32, 32)
EMU_MASKED(_mm512, epi32, __m512i, int32_t, __mmask16, 16)
EMU_MASKED(_mm512, epi64, __m512i, int64_t, __mmask8, 8)
EMU_MASKED(_mm512, ps, __m512, float, __mmask16, 16)
EMU_MASKED(_mm256, epi8, __m256i, int8_t, __mmask32, 32)
EMU_MASKED(_mm256, epi16, __m256i, int16_t, __mmask16, 16)
EMU_MASKED(_mm256, epi32, __m256i, int32_t, __mmask8, 8)
EMU_MASKED(_mm256, ps, __m256, float, __mmask8, 8)
EMU_MASKED(_mm, epi8, __m128i, int8_t, __mmask16, 16)
EMU_MASKED(_mm, epi16, __m128i, int16_t, __mmask8, 8)
EMU_MASKED(_mm, epi32, __m128i, int32_t, __mmask8, 4)

#undef _mm512_mask_loadu_epi8
#define _mm512_mask_loadu_epi8 emu_mm512_mask_loadu_epi8
#undef _mm512_maskz_loadu_epi8
#define _mm512_maskz_loadu_epi8 emu_mm512_maskz_loadu_epi8
#undef _mm512_mask_storeu_epi8
#define _mm512_mask_storeu_epi8 emu_mm512_mask_storeu_epi8
#undef _mm512_mask_loadu_epi16
#define _mm512_mask_loadu_epi16 emu_mm512_mask_loadu_epi16
#undef _mm512_maskz_loadu_epi16
#define _mm512_maskz_loadu_epi16 emu_mm512_maskz_loadu_epi16
#undef _mm512_mask_storeu_epi16
#define _mm512_mask_storeu_epi16 emu_mm512_mask_storeu_epi16
#undef _mm512_mask_loadu_epi32
#define _mm512_mask_loadu_epi32 emu_mm512_mask_loadu_epi32
#undef _mm512_maskz_loadu_epi32
#define _mm512_maskz_loadu_epi32 emu_mm512_maskz_loadu_epi32
#undef _mm512_mask_storeu_epi32
#define _mm512_mask_storeu_epi32 emu_mm512_mask_storeu_epi32
#undef _mm512_mask_loadu_epi64
#define _mm512_mask_loadu_epi64 emu_mm512_mask_loadu_epi64
#undef _mm512_maskz_loadu_epi64
#define _mm512_maskz_loadu_epi64 emu_mm512_maskz_loadu_epi64
#undef _mm512_mask_storeu_epi64
#define _mm512_mask_storeu_epi64 emu_mm512_mask_storeu_epi64
#undef _mm512_mask_loadu_ps
#define _mm512_mask_loadu_ps emu_mm512_mask_loadu_ps
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps emu_mm512_maskz_loadu_ps
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps emu_mm512_mask_storeu_ps
#undef _mm256_maskz_loadu_epi8
#define _mm256_maskz_loadu_epi8 emu_mm256_maskz_loadu_epi8
#undef _mm256_mask_storeu_epi8
#define _mm256_mask_storeu_epi8 emu_mm256_mask_storeu_epi8
#undef _mm256_maskz_loadu_epi16
#define _mm256_maskz_loadu_epi16 emu_mm256_maskz_loadu_epi16
#undef _mm256_mask_storeu_epi16
#define _mm256_mask_storeu_epi16 emu_mm256_mask_storeu_epi16
#undef _mm256_maskz_loadu_epi32
#define _mm256_maskz_loadu_epi32 emu_mm256_maskz_loadu_epi32
#undef _mm256_mask_storeu_epi32
#define _mm256_mask_storeu_epi32 emu_mm256_mask_storeu_epi32
#undef _mm256_maskz_loadu_ps
#define _mm256_maskz_loadu_ps emu_mm256_maskz_loadu_ps
#undef _mm256_mask_storeu_ps
#define _mm256_mask_storeu_ps emu_mm256_mask_storeu_ps
#undef _mm_maskz_loadu_epi8
#define _mm_maskz_loadu_epi8 emu_mm_maskz_loadu_epi8
#undef _mm_mask_storeu_epi8
#define _mm_mask_storeu_epi8 emu_mm_mask_storeu_epi8
#undef _mm_maskz_loadu_epi16
#define _mm_maskz_loadu_epi16 emu_mm_maskz_loadu_epi16
#undef _mm_mask_storeu_epi16
#define _mm_mask_storeu_epi16 emu_mm_mask_storeu_epi16
#undef _mm_maskz_loadu_epi32
#define _mm_maskz_loadu_epi32 emu_mm_maskz_loadu_epi32
#undef _mm_mask_storeu_epi32
#define _mm_mask_storeu_epi32 emu_mm_mask_storeu_epi32

/* Streaming stores: as the hardware, not for misaligned addresses. */

EMU void emu_stream(void *to, __m512i v) {
    if ((uintptr_t)to % 64) __builtin_trap();
    _mm256_stream_si256((__m256i *)to, emu_low(v));
    _mm256_stream_si256((__m256i *)to + 1, emu_high(v));
}
#undef _mm512_stream_si512
#define _mm512_stream_si512(to, v) emu_stream((void *)(to), (v))
#undef _mm512_stream_ps
#define _mm512_stream_ps(to, v) emu_stream((void *)(to), _mm512_castps_si512(v))

/* Conversions. */

#define EMU_HALF_PS(v, i) ((i) ? EMU_HIGH_PS(v) : EMU_LOW_PS(v))
#define EMU_QUARTER(v, i) ((i) ? _mm256_extracti128_si256((v), 1) : _mm256_castsi256_si128(v))

EMU __m512 emu_cvtph_ps(__m256i v) {
    return EMU_JOIN_PS(_mm256_cvtph_ps(EMU_QUARTER(v, 0)), _mm256_cvtph_ps(EMU_QUARTER(v, 1)));
}
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps emu_cvtph_ps

#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(v, rounding) \
    _mm256_set_m128i(_mm256_cvtps_ph(EMU_HIGH_PS(v), (rounding)), _mm256_cvtps_ph(EMU_LOW_PS(v), (rounding)))
#undef _mm512_cvt_roundps_ph
#define _mm512_cvt_roundps_ph _mm512_cvtps_ph

EMU __m512 emu_cvtepi32_ps(__m512i v) {
    return EMU_JOIN_PS(_mm256_cvtepi32_ps(emu_low(v)), _mm256_cvtepi32_ps(emu_high(v)));
}
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps emu_cvtepi32_ps

EMU __m512 emu_cvtepu32_ps(__m512i v) {
    uint32_t from[16];
    __m512 to;
    memcpy(from, &v, sizeof from);
    for (int i = 0; i < 16; i++) {
        const float f = (float)from[i];
        memcpy((char *)&to + 4 * i, &f, 4);
    }
    return to;
}
#undef _mm512_cvtepu32_ps
#define _mm512_cvtepu32_ps emu_cvtepu32_ps

EMU __m512i emu_cvtps_epi32(__m512 v) {
    return emu_join(_mm256_cvtps_epi32(EMU_LOW_PS(v)), _mm256_cvtps_epi32(EMU_HIGH_PS(v)));
}
#undef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32 emu_cvtps_epi32

EMU __m512i emu_cvttps_epi32(__m512 v) {
    return emu_join(_mm256_cvttps_epi32(EMU_LOW_PS(v)), _mm256_cvttps_epi32(EMU_HIGH_PS(v)));
}
#undef _mm512_cvttps_epi32
#define _mm512_cvttps_epi32 emu_cvttps_epi32

/* Widening: `half` gives the source's lower (0) or upper (1) half as the 256-bit instruction wants it. */
#define EMU_HALF_OF_128(v, i) ((i) ? _mm_unpackhi_epi64((v), (v)) : (v))
#define EMU_WIDEN(name, source, half) \
    EMU __m512i emu_##name(source v) { return emu_join(_mm256_##name(half(v, 0)), _mm256_##name(half(v, 1))); }
EMU_WIDEN(cvtepu8_epi32, __m128i, EMU_HALF_OF_128)
EMU_WIDEN(cvtepi8_epi32, __m128i, EMU_HALF_OF_128)
EMU_WIDEN(cvtepu16_epi32, __m256i, EMU_QUARTER)
EMU_WIDEN(cvtepi16_epi32, __m256i, EMU_QUARTER)
EMU_WIDEN(cvtepu8_epi16, __m256i, EMU_QUARTER)
EMU_WIDEN(cvtepi8_epi16, __m256i, EMU_QUARTER)
EMU_WIDEN(cvtepu32_epi64, __m256i, EMU_QUARTER)
EMU_WIDEN(cvtepi32_epi64, __m256i, EMU_QUARTER)
#undef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32 emu_cvtepu8_epi32
#undef _mm512_cvtepi8_epi32
#define _mm512_cvtepi8_epi32 emu_cvtepi8_epi32
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 emu_cvtepu16_epi32
#undef _mm512_cvtepi16_epi32
#define _mm512_cvtepi16_epi32 emu_cvtepi16_epi32
#undef _mm512_cvtepu8_epi16
#define _mm512_cvtepu8_epi16 emu_cvtepu8_epi16
#undef _mm512_cvtepi8_epi16
#define _mm512_cvtepi8_epi16 emu_cvtepi8_epi16
#undef _mm512_cvtepu32_epi64
#define _mm512_cvtepu32_epi64 emu_cvtepu32_epi64
#undef _mm512_cvtepi32_epi64
#define _mm512_cvtepi32_epi64 emu_cvtepi32_epi64

/* Narrowing without saturation keeps the low bytes of each element; the masked store writes only its lanes. */
#define EMU_NARROW(name, source, from_type, to, to_type, mask, lanes)                                    \
    EMU_CALLED to emu_##name(source v) {                                                                 \
        from_type from[lanes];                                                                           \
        to narrow;                                                                                       \
        memcpy(from, &v, sizeof from);                                                                   \
        memset(&narrow, 0, sizeof narrow);                                                               \
        for (int i = 0; i < (lanes); i++) {                                                              \
            const to_type element = (to_type)from[i];                                                    \
            memcpy((char *)&narrow + i * sizeof element, &element, sizeof element);                      \
        }                                                                                                \
        return narrow;                                                                                   \
    }                                                                                                    \
    EMU_CALLED void emu_##name##_store(void *place, mask k, source v) {                                  \
        const to narrow = emu_##name(v);                                                                 \
        for (int i = 0; i < (lanes); i++)                                                                \
            if (k >> i & 1)                                                                              \
                memcpy((char *)place + i * sizeof(to_type), (const char *)&narrow + i * sizeof(to_type), \
                       sizeof(to_type));                                                                 \
    }
EMU_NARROW(512_cvtepi32_epi8, __m512i, uint32_t, __m128i, uint8_t, __mmask16, 16)
EMU_NARROW(512_cvtepi32_epi16, __m512i, uint32_t, __m256i, uint16_t, __mmask16, 16)
EMU_NARROW(512_cvtepi16_epi8, __m512i, uint16_t, __m256i, uint8_t, __mmask32, 32)
EMU_NARROW(256_cvtepi32_epi8, __m256i, uint32_t, __m128i, uint8_t, __mmask8, 8)
EMU_NARROW(256_cvtepi32_epi16, __m256i, uint32_t, __m128i, uint16_t, __mmask8, 8)
EMU_NARROW(256_cvtepi16_epi8, __m256i, uint16_t, __m128i, uint8_t, __mmask16, 16)
#undef _mm512_cvtepi32_epi8
#define _mm512_cvtepi32_epi8 emu_512_cvtepi32_epi8
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16 emu_512_cvtepi32_epi16
#undef _mm512_cvtepi16_epi8
#define _mm512_cvtepi16_epi8 emu_512_cvtepi16_epi8
#undef _mm256_cvtepi32_epi8
#define _mm256_cvtepi32_epi8 emu_256_cvtepi32_epi8
#undef _mm256_cvtepi32_epi16
#define _mm256_cvtepi32_epi16 emu_256_cvtepi32_epi16
#undef _mm256_cvtepi16_epi8
#define _mm256_cvtepi16_epi8 emu_256_cvtepi16_epi8
#undef _mm512_mask_cvtepi32_storeu_epi8
#define _mm512_mask_cvtepi32_storeu_epi8 emu_512_cvtepi32_epi8_store
#undef _mm512_mask_cvtepi32_storeu_epi16
#define _mm512_mask_cvtepi32_storeu_epi16 emu_512_cvtepi32_epi16_store
#undef _mm512_mask_cvtepi16_storeu_epi8
#define _mm512_mask_cvtepi16_storeu_epi8 emu_512_cvtepi16_epi8_store

/* Shifts, shuffles, parts. */

#define EMU_BINARY(name)                                                                                 \
    EMU __m512i emu_##name(__m512i a, __m512i b) {                                                       \
        return emu_join(_mm256_##name(emu_low(a), emu_low(b)), _mm256_##name(emu_high(a), emu_high(b))); \
    }
EMU_BINARY(srav_epi32)
EMU_BINARY(madd_epi16)
EMU_BINARY(unpacklo_epi8)
EMU_BINARY(unpackhi_epi8)
EMU_BINARY(unpacklo_epi16)
EMU_BINARY(unpackhi_epi16)
EMU_BINARY(unpacklo_epi32)
EMU_BINARY(unpackhi_epi32)
EMU_BINARY(unpacklo_epi64)
EMU_BINARY(unpackhi_epi64)
#undef EMU_BINARY
#undef _mm512_srav_epi32
#define _mm512_srav_epi32 emu_srav_epi32
#undef _mm512_madd_epi16
#define _mm512_madd_epi16 emu_madd_epi16
#undef _mm512_unpacklo_epi8
#define _mm512_unpacklo_epi8 emu_unpacklo_epi8
#undef _mm512_unpackhi_epi8
#define _mm512_unpackhi_epi8 emu_unpackhi_epi8
#undef _mm512_unpacklo_epi16
#define _mm512_unpacklo_epi16 emu_unpacklo_epi16
#undef _mm512_unpackhi_epi16
#define _mm512_unpackhi_epi16 emu_unpackhi_epi16
#undef _mm512_unpacklo_epi32
#define _mm512_unpacklo_epi32 emu_unpacklo_epi32
#undef _mm512_unpackhi_epi32
#define _mm512_unpackhi_epi32 emu_unpackhi_epi32
#undef _mm512_unpacklo_epi64
#define _mm512_unpacklo_epi64 emu_unpacklo_epi64
#undef _mm512_unpackhi_epi64
#define _mm512_unpackhi_epi64 emu_unpackhi_epi64
#undef _mm512_unpacklo_ps
#define _mm512_unpacklo_ps(a, b) _mm512_castsi512_ps(emu_unpacklo_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)))
#undef _mm512_unpackhi_ps
#define _mm512_unpackhi_ps(a, b) _mm512_castsi512_ps(emu_unpackhi_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)))

/* The even and the odd bytes, widened: no product of two reaches 2^15, so the pairs add up exactly in 32 bits. */
EMU __m256i emu_dpbusd_half(__m256i sum, __m256i codes, __m256i digits) {
    __m256i even = _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(0xff)),
                                     _mm256_srai_epi16(_mm256_slli_epi16(digits, 8), 8));
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(digits, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}
EMU_CALLED __m512i emu_dpbusd_epi32(__m512i sum, __m512i codes, __m512i digits) {
    return emu_join(emu_dpbusd_half(emu_low(sum), emu_low(codes), emu_low(digits)),
                    emu_dpbusd_half(emu_high(sum), emu_high(codes), emu_high(digits)));
}
#undef _mm512_dpbusd_epi32
#define _mm512_dpbusd_epi32 emu_dpbusd_epi32

EMU_CALLED __m512i emu_permutexvar_epi8(__m512i order, __m512i v) { return simde_mm512_permutexvar_epi8(order, v); }
#undef _mm512_permutexvar_epi8
#define _mm512_permutexvar_epi8 emu_permutexvar_epi8

EMU __m512i emu_srai_epi32(__m512i v, int count) {
    return emu_join(_mm256_srai_epi32(emu_low(v), count), _mm256_srai_epi32(emu_high(v), count));
}
#undef _mm512_srai_epi32
#define _mm512_srai_epi32(v, count) emu_srai_epi32((v), (int)(count))

#undef _mm512_shuffle_epi32
#define _mm512_shuffle_epi32(v, order) \
    emu_join(_mm256_shuffle_epi32(emu_low(v), (order)), _mm256_shuffle_epi32(emu_high(v), (order)))
#undef _mm512_alignr_epi8
#define _mm512_alignr_epi8(a, b, count) \
    emu_join(_mm256_alignr_epi8(emu_low(a), emu_low(b), (count)), _mm256_alignr_epi8(emu_high(a), emu_high(b), (count)))
#undef _mm512_bslli_epi128
#define _mm512_bslli_epi128(v, count) \
    emu_join(_mm256_bslli_epi128(emu_low(v), (count)), _mm256_bslli_epi128(emu_high(v), (count)))
#undef _mm512_bsrli_epi128
#define _mm512_bsrli_epi128(v, count) \
    emu_join(_mm256_bsrli_epi128(emu_low(v), (count)), _mm256_bsrli_epi128(emu_high(v), (count)))
#undef _mm512_shuffle_i64x2
#define _mm512_shuffle_i64x2 _mm512_shuffle_i32x4
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4(a, b, order) \
    _mm512_castsi512_ps(_mm512_shuffle_i32x4(_mm512_castps_si512(a), _mm512_castps_si512(b), (order)))

#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps(v, i) EMU_HALF_PS((v), (i))
#undef _mm512_extracti32x8_epi32
#define _mm512_extracti32x8_epi32(v, i) ((i) ? emu_high(v) : emu_low(v))
#undef _mm512_undefined_epi32
#define _mm512_undefined_epi32 _mm512_setzero_si512
#undef _mm512_undefined_ps
#define _mm512_undefined_ps _mm512_setzero_ps
#undef _mm512_zextsi256_si512
#define _mm512_zextsi256_si512(v) emu_join((v), _mm256_setzero_si256())
#undef _mm512_zextsi128_si512
#define _mm512_zextsi128_si512(v) emu_join(_mm256_zextsi128_si256(v), _mm256_setzero_si256())
#undef _mm512_zextps256_ps512
#define _mm512_zextps256_ps512(v) EMU_JOIN_PS((v), _mm256_setzero_ps())

/* Gathers of 32-bit elements; the scale is a constant. */
#undef _mm512_i32gather_ps
#define _mm512_i32gather_ps(index, from, scale)                                      \
    EMU_JOIN_PS(_mm256_i32gather_ps((const float *)(from), emu_low(index), (scale)), \
                _mm256_i32gather_ps((const float *)(from), emu_high(index), (scale)))
#undef _mm512_i32gather_epi32
#define _mm512_i32gather_epi32(index, from, scale)                                               \
    emu_join(_mm256_i32gather_epi32((const int *)(const void *)(from), emu_low(index), (scale)), \
             _mm256_i32gather_epi32((const int *)(const void *)(from), emu_high(index), (scale)))

EMU __m512 emu_abs_ps(__m512 v) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)));
}
#undef _mm512_abs_ps
#define _mm512_abs_ps emu_abs_ps

/* Byte i of the result is the eight bits of its quadword rotated right by control byte i, 0 included. */
EMU_CALLED __m512i emu_multishift_epi64_epi8(__m512i control, __m512i v) {
    uint8_t at[64];
    uint64_t from[8];
    memcpy(at, &control, sizeof at);
    memcpy(from, &v, sizeof from);
    for (int i = 0; i < 64; i++) at[i] = (uint8_t)(from[i / 8] >> (at[i] & 63) | from[i / 8] << (-at[i] & 63));
    memcpy(&v, at, sizeof at);
    return v;
}
#undef _mm512_multishift_epi64_epi8
#define _mm512_multishift_epi64_epi8 emu_multishift_epi64_epi8

/* a * 2^floor(b), rounded once; ldexpf is exact up to that one rounding and int holds every useful exponent. */
EMU_CALLED __m512 emu_scalef_ps(__m512 a, __m512 b) {
    float x[16], y[16];
    memcpy(x, &a, sizeof x);
    memcpy(y, &b, sizeof y);
    for (int i = 0; i < 16; i++) {
        if (isnan(y[i]))
            x[i] += y[i];
        else if (isinf(y[i]))
            x[i] *= y[i] > 0 ? y[i] : 0;
        else
            x[i] = ldexpf(x[i], (int)fmaxf(-1000, fminf(1000, floorf(y[i]))));
    }
    memcpy(&a, x, sizeof x);
    return a;
}
#undef _mm512_scalef_ps
#define _mm512_scalef_ps emu_scalef_ps

/* Reductions and comparisons, element by element. */

#define EMU_REDUCE(name, vector, element, combine)                              \
    EMU element emu_##name(vector v) {                                          \
        element x[16];                                                          \
        memcpy(x, &v, sizeof x);                                                \
        for (int width = 8; width; width /= 2)                                  \
            for (int i = 0; i < width; i++) x[i] = combine(x[i], x[i + width]); \
        return x[0];                                                            \
    }
#define EMU_ADD(a, b) ((a) + (b))
#define EMU_WRAPPING_ADD(a, b) ((int32_t)((uint32_t)(a) + (uint32_t)(b)))
#define EMU_MAX(a, b) ((a) > (b) ? (a) : (b))
#define EMU_MIN(a, b) ((a) < (b) ? (a) : (b))
EMU_REDUCE(reduce_add_epi32, __m512i, int32_t, EMU_WRAPPING_ADD)
EMU_REDUCE(reduce_max_epi32, __m512i, int32_t, EMU_MAX)
EMU_REDUCE(reduce_min_epi32, __m512i, int32_t, EMU_MIN)
EMU_REDUCE(reduce_max_epu32, __m512i, uint32_t, EMU_MAX)
EMU_REDUCE(reduce_min_epu32, __m512i, uint32_t, EMU_MIN)
EMU_REDUCE(reduce_add_ps, __m512, float, EMU_ADD)
EMU_REDUCE(reduce_max_ps, __m512, float, EMU_MAX)
EMU_REDUCE(reduce_min_ps, __m512, float, EMU_MIN)
#undef _mm512_reduce_add_epi32
#define _mm512_reduce_add_epi32 emu_reduce_add_epi32
#undef _mm512_reduce_max_epi32
#define _mm512_reduce_max_epi32 emu_reduce_max_epi32
#undef _mm512_reduce_min_epi32
#define _mm512_reduce_min_epi32 emu_reduce_min_epi32
#undef _mm512_reduce_max_epu32
#define _mm512_reduce_max_epu32 emu_reduce_max_epu32
#undef _mm512_reduce_min_epu32
#define _mm512_reduce_min_epu32 emu_reduce_min_epu32
#undef _mm512_reduce_add_ps
#define _mm512_reduce_add_ps emu_reduce_add_ps
#undef _mm512_reduce_max_ps
#define _mm512_reduce_max_ps emu_reduce_max_ps
#undef _mm512_reduce_min_ps
#define _mm512_reduce_min_ps emu_reduce_min_ps

#define EMU_COMPARE(name, type, op)                            \
    EMU __mmask16 emu_##name(__m512i a, __m512i b) {           \
        type x[16], y[16];                                     \
        unsigned k = 0;                                        \
        memcpy(x, &a, sizeof x);                               \
        memcpy(y, &b, sizeof y);                               \
        for (int i = 0; i < 16; i++) k |= (unsigned)(op) << i; \
        return (__mmask16)k;                                   \
    }
EMU_COMPARE(cmpeq_epi32_mask, int32_t, x[i] == y[i])
EMU_COMPARE(cmpneq_epi32_mask, int32_t, x[i] != y[i])
EMU_COMPARE(cmplt_epi32_mask, int32_t, x[i] < y[i])
EMU_COMPARE(cmple_epi32_mask, int32_t, x[i] <= y[i])
EMU_COMPARE(cmpgt_epi32_mask, int32_t, x[i] > y[i])
EMU_COMPARE(cmpge_epi32_mask, int32_t, x[i] >= y[i])
EMU_COMPARE(cmplt_epu32_mask, uint32_t, x[i] < y[i])
EMU_COMPARE(cmple_epu32_mask, uint32_t, x[i] <= y[i])
EMU_COMPARE(cmpgt_epu32_mask, uint32_t, x[i] > y[i])
EMU_COMPARE(cmpge_epu32_mask, uint32_t, x[i] >= y[i])
EMU_COMPARE(test_epi32_mask, uint32_t, (x[i] & y[i]) != 0)
EMU_COMPARE(testn_epi32_mask, uint32_t, (x[i] & y[i]) == 0)
#undef _mm512_cmpeq_epi32_mask
#define _mm512_cmpeq_epi32_mask emu_cmpeq_epi32_mask
#undef _mm512_cmpneq_epi32_mask
#define _mm512_cmpneq_epi32_mask emu_cmpneq_epi32_mask
#undef _mm512_cmplt_epi32_mask
#define _mm512_cmplt_epi32_mask emu_cmplt_epi32_mask
#undef _mm512_cmple_epi32_mask
#define _mm512_cmple_epi32_mask emu_cmple_epi32_mask
#undef _mm512_cmpgt_epi32_mask
#define _mm512_cmpgt_epi32_mask emu_cmpgt_epi32_mask
#undef _mm512_cmpge_epi32_mask
#define _mm512_cmpge_epi32_mask emu_cmpge_epi32_mask
#undef _mm512_cmpeq_epu32_mask
#define _mm512_cmpeq_epu32_mask emu_cmpeq_epi32_mask
#undef _mm512_cmpneq_epu32_mask
#define _mm512_cmpneq_epu32_mask emu_cmpneq_epi32_mask
#undef _mm512_cmplt_epu32_mask
#define _mm512_cmplt_epu32_mask emu_cmplt_epu32_mask
#undef _mm512_cmple_epu32_mask
#define _mm512_cmple_epu32_mask emu_cmple_epu32_mask
#undef _mm512_cmpgt_epu32_mask
#define _mm512_cmpgt_epu32_mask emu_cmpgt_epu32_mask
#undef _mm512_cmpge_epu32_mask
#define _mm512_cmpge_epu32_mask emu_cmpge_epu32_mask
#undef _mm512_test_epi32_mask
#define _mm512_test_epi32_mask emu_test_epi32_mask
#undef _mm512_testn_epi32_mask
#define _mm512_testn_epi32_mask emu_testn_epi32_mask

#endif
