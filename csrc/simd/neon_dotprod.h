/* NEON with the dot product instructions (FEAT_DotProd, optional from Armv8.2 and mandatory from Armv8.4). */
#ifndef QZ_SIMD_NEON_DOTPROD_H
#define QZ_SIMD_NEON_DOTPROD_H

#define QZ_DOT_NAME "sdot"
#include "neon.h"

static inline v_i32 dot4(v_i32 sum, v_u8 codes, v_u8 digits, int bits) {
    return vdotq_s32(sum, signed_codes(codes, bits), vreinterpretq_s8_u8(digits));
}

#endif
