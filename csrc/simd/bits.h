/* Bit streams in plain 64-bit arithmetic: eight codes of `bits` bits make `bits` bytes, the first code lowest.
 *
 * Both directions work in three steps on one 64-bit word, whose lanes of 8, 16 and 32 bits hold 1, 2 and 4 codes: in
 * each step the upper half of every pair of lanes moves next to (or away from) the lower half. */
#ifndef QZ_SIMD_BITS_H
#define QZ_SIMD_BITS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline uint64_t pack_8_codes(uint64_t codes, int bits) {
    const uint64_t even_bytes = 0x00ff00ff00ff00ffu, even_halves = 0x0000ffff0000ffffu, low_word = 0xffffffffu;
    codes = (codes & even_bytes) | (codes & ~even_bytes) >> (8 - bits);
    codes = (codes & even_halves) | (codes & ~even_halves) >> (16 - 2 * bits);
    return (codes & low_word) | (codes & ~low_word) >> (32 - 4 * bits);
}

static inline uint64_t unpack_8_codes(uint64_t stream, int bits) {
    const uint64_t one = ((uint64_t)1 << bits) - 1, two = ((uint64_t)1 << 2 * bits) - 1;
    const uint64_t four = ((uint64_t)1 << 4 * bits) - 1;
    const uint64_t twos = two | two << 32, ones = (one | one << 16) * 0x100000001u;
    stream = (stream & four) | (stream & four << 4 * bits) << (32 - 4 * bits);
    stream = (stream & twos) | (stream & twos << 2 * bits) << (16 - 2 * bits);
    return (stream & ones) | (stream & ones << bits) << (8 - bits);
}

static inline void pack_bits(uint8_t *packed, const uint8_t *codes, int bits, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; i += 8) {
        uint64_t word;
        memcpy(&word, codes + i, 8);
        word = pack_8_codes(word, bits);
        memcpy(packed + i / 8 * bits, &word, (size_t)bits);
    }
}

static inline void unpack_bits_by_8(uint8_t *codes, const uint8_t *packed, int bits, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; i += 8) {
        uint64_t word = 0;
        memcpy(&word, packed + i / 8 * bits, (size_t)bits);
        word = unpack_8_codes(word, bits);
        memcpy(codes + i, &word, 8);
    }
}

#endif
