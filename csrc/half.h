/* float16 and bfloat16 to and from float32, one element at a time, by integer arithmetic: the same bits as F16C and as
 * NEON's conversions, NaN included (the payload's top bits are kept and the NaN is made quiet). And the scales that are
 * bytes: csrc/elements/ says what they stand for. */
#ifndef QZ_HALF_H
#define QZ_HALF_H

#include <stdint.h>
#include <string.h>

static inline uint32_t qz_bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float qz_float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float qz_f32_from_bf16(uint16_t half) { return qz_float_of((uint32_t)half << 16); }

static inline uint16_t qz_bf16_from_f32(float value) {
    uint32_t bits = qz_bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static inline float qz_f32_from_f16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, rest = half & 0x7fffu;
    if (rest > 0x7c00u) return qz_float_of(sign | 0x7fc00000u | rest << 13);
    if (rest == 0x7c00u) return qz_float_of(sign | 0x7f800000u);
    if (rest >= 0x0400u) return qz_float_of(sign | ((rest << 13) + 0x38000000u));
    float magnitude = (float)rest * 0x1p-24f; /* zero or subnormal: exact */
    return qz_float_of(sign | qz_bits_of(magnitude));
}

static inline uint16_t qz_f16_from_f32(float value) {
    uint32_t bits = qz_bits_of(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (rest >> 13 & 0x3ffu));
    if (rest >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and above round to infinity */
    if (rest < 0x38800000u) {                                   /* below 2^-14: let the FPU round at 2^-24 */
        float shifted = qz_float_of(rest) + 0x1p-1f;            /* an ulp of [0.5, 1) is 2^-24 */
        return (uint16_t)(sign | (qz_bits_of(shifted) - 0x3f000000u));
    }
    uint32_t rebiased = rest - 0x38000000u;
    return (uint16_t)(sign | (rebiased + 0xfffu + (rebiased >> 13 & 1u)) >> 13);
}

static inline float qz_f32_from_e8m0(uint8_t code) { return qz_float_of(code ? (uint32_t)code << 23 : 0x400000u); }

static inline float qz_f32_from_e4m3(uint8_t code) {
    uint32_t sign = (uint32_t)(code & 0x80u) << 24, rest = code & 0x7fu;
    if (rest == 0x7fu) return qz_float_of(sign | 0x7fc00000u);
    if (rest >= 8) return qz_float_of(sign | ((rest << 20) + 0x3c000000u));
    float magnitude = (float)rest * 0x1p-9f; /* zero or subnormal: exact */
    return qz_float_of(sign | qz_bits_of(magnitude));
}

#endif
