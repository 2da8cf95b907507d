/* Quantization to small floats with a scale per group, and its inverse: MLX's mxfp4, mxfp8 and nvfp4.
 *
 * The algorithm is MLX's (mlx/backend/metal/kernels/fp_quantized.h, and what its CPU backend computes instead). A group
 * of largest magnitude `most` has the scale s of about most / largest, largest being the element's greatest number;
 * nvfp4 with a global scale G multiplies by the encoding factor 2688 / G on the way, 2688 being 448 * 6.
 *
 * "metal": float32; elements are encoded from w * (factor / s).
 * "cpu": most / largest and w / s are rounded to w's type; the factor multiplies after that, in float32.
 *
 * Where MLX gives no result worth having, both profiles do the same. mx formats: an exponent below the byte's range is
 * the least (MLX's CPU wraps it), and a group with NaN or an infinity has byte 255 and codes 0, so that it decodes to
 * NaN. nvfp4: a group whose scale rounds to 0 has codes 0; one with NaN or an infinity has the largest scale, and those
 * elements code 0. */
#include "fp_codecs.h"

/* Groups of a batch: whole vectors of them, and of bytes. */
enum { FP_GROUPS = 16, FP_MAX_GROUP = 32 };

typedef struct fp_batch {
    float most[FP_GROUPS], factor[FP_GROUPS];
    int32_t used[FP_GROUPS];
    uint8_t codes[FP_GROUPS];
    float w[FP_GROUPS * FP_MAX_GROUP];
} fp_batch;

/* Magnitudes are compared as integers, in which NaN is the greatest: it counts as infinity. Groups that are not there
 * are zeros. */
QZ_INLINE void measure_fp_groups(fp_batch *b, const char *w, ptrdiff_t groups, ptrdiff_t size, qz_type type) {
    const v_i32 infinity = set1_i32(0x7f800000);
    if (groups < FP_GROUPS) memset(b->w, 0, sizeof b->w);
    for (ptrdiff_t first = 0; first < FP_GROUPS; first += QZ_LANES) {
        v_f32 each[QZ_LANES];
        QZ_UNROLL
        for (ptrdiff_t j = 0; j < QZ_LANES; j++) {
            v_i32 most = set1_i32(0);
            const ptrdiff_t at = (first + j) * size;
            for (ptrdiff_t i = at; i < at + size && first + j < groups; i += QZ_LANES) {
                const v_f32 v = load_floats(w, i, type);
                store_f32(b->w + i, v);
                most = max_i32(most, magnitude_of(v));
            }
            each[j] = f32_of_bits(select_i32(greater_i32(most, infinity), infinity, most));
        }
        store_f32(b->most + first, greatest_of_each(each));
    }
}

/* Not inline: it is the same for all formats of a group size. */
static __attribute__((noinline)) void QZ_NAME(measure_fp_batch_16)(fp_batch *b, const char *w, ptrdiff_t groups,
                                                                   qz_type type) {
    switch (type) {
    case QZ_F16: measure_fp_groups(b, w, groups, 16, QZ_F16); return;
    case QZ_BF16: measure_fp_groups(b, w, groups, 16, QZ_BF16); return;
    default: measure_fp_groups(b, w, groups, 16, QZ_F32);
    }
}

static __attribute__((noinline)) void QZ_NAME(measure_fp_batch_32)(fp_batch *b, const char *w, ptrdiff_t groups,
                                                                   qz_type type) {
    switch (type) {
    case QZ_F16: measure_fp_groups(b, w, groups, 32, QZ_F16); return;
    case QZ_BF16: measure_fp_groups(b, w, groups, 32, QZ_BF16); return;
    default: measure_fp_groups(b, w, groups, 32, QZ_F32);
    }
}

/* Returns whether nothing is odd: all groups are finite and have a scale, and no step is NaN for another reason, an
 * encoding factor that is infinite. */
QZ_INLINE int set_fp_scales(fp_batch *b, const qz_quantize_job *job, const fp_element *element, const fp_scale *scale,
                            int profile) {
    const v_i32 finite = set1_i32(0x7f7fffff);
    v_i32 odd = greater_i32(magnitude_of(set1_f32(job->encode_factor)), finite);
    for (int g = 0; g < FP_GROUPS; g += QZ_LANES) {
        fp_scales s;
        scale->set(&s, load_f32(b->most + g), element, job, profile);
        v_f32 factor = s.values;
        if (profile == QZ_PROFILE_METAL) factor = div_f32(set1_f32(job->encode_factor), s.values);
        store_f32(b->factor + g, factor);
        odd = or_i32(odd, greater_i32(bits_of_f32(load_f32(b->most + g)), finite));
        odd = or_i32(odd, or_i32(greater_i32(magnitude_of(factor), finite), greater_i32(s.used, set1_i32(-1))));
        store_i32(b->used + g, s.used);
        store_low_u8(b->codes + g, s.codes);
    }
    return !any_i32(odd);
}

QZ_INLINE v_i32 encode_fp_vector(const float *w, float factor, int32_t used, const qz_quantize_job *job,
                                 const fp_element *element, int profile, int is_plain) {
    const v_i32 infinity = set1_i32(0x7f800000);
    const v_f32 v = load_f32(w), f = set1_f32(factor);
    v_f32 steps;
    if (profile == QZ_PROFILE_METAL) {
        steps = mul_f32(v, f);
    } else {
        steps = mul_f32(round_to_type(div_f32(v, f), job->round_to), set1_f32(job->encode_factor));
    }
    if (is_plain) return element->encode(steps, profile);
    v_i32 counts = and_i32(greater_i32(infinity, magnitude_of(v)), set1_i32(used));
    counts = and_i32(counts, greater_i32(set1_i32(0x7f800001), magnitude_of(steps)));
    return and_i32(element->encode(steps, profile), counts);
}

/* The codes of a vector of bytes from element i on, a multiple of as many. */
QZ_INLINE void encode_fp_vectors(v_i32 v[4], const fp_batch *b, ptrdiff_t i, ptrdiff_t size, const qz_quantize_job *job,
                                 const fp_element *element, int profile, int is_plain) {
    const float *const factor = b->factor + i / size;
    const int32_t *const used = b->used + i / size;
    QZ_UNROLL
    for (int j = 0; j < 4; j++) {
        const ptrdiff_t at = j * QZ_LANES, g = at / size;
        v[j] = encode_fp_vector(b->w + i + at, factor[g], used[g], job, element, profile, is_plain);
        QZ_HOLD(v[j]); /* else gcc does all four side by side, and runs out of registers */
    }
}

/* Whole vectors of packed codes: of groups of 16, the last may be half of one. Prefetches: see affine_encode. */
QZ_INLINE void encode_fp_groups(uint8_t *packed, const fp_batch *b, ptrdiff_t first, ptrdiff_t count, ptrdiff_t size,
                                const qz_quantize_job *job, const fp_element *element, int profile, int is_plain) {
    const ptrdiff_t step = job->step;
    const char *next = job->next + first * size * step;
    ptrdiff_t i = 0;
    for (; element->bits == 4 && i + 2 * QZ_BYTES <= count; i += 2 * QZ_BYTES) {
        v_bytes codes[2];
        QZ_UNROLL
        for (int half = 0; half < 2; half++) {
            v_i32 v[4];
            prefetch_next(next + (i + half * QZ_BYTES) * step, step);
            encode_fp_vectors(v, b, i + half * QZ_BYTES, size, job, element, profile, is_plain);
            codes[half] = loose_bytes_from_i32(v[0], v[1], v[2], v[3]);
        }
        store_loose_nibbles(packed + i / 2, codes);
    }
    for (; i < count; i += QZ_BYTES) {
        v_i32 v[4];
        prefetch_next(next + i * step, step);
        encode_fp_vectors(v, b, i, size, job, element, profile, is_plain);
        store_packed(packed + i / 8 * element->bits, bytes_from_i32(v[0], v[1], v[2], v[3]), element->bits);
    }
}

QZ_INLINE void quantize_fp(const qz_quantize_job *job, const fp_element *element, const fp_scale *scale, ptrdiff_t size,
                           int profile) {
    const ptrdiff_t value = job->w_type == QZ_F32 ? 4 : 2;
    fp_batch b;
    for (ptrdiff_t first = 0; first < job->groups; first += FP_GROUPS) {
        const ptrdiff_t left = job->groups - first, groups = left < FP_GROUPS ? left : FP_GROUPS;
        uint8_t *packed = job->packed + first * size / 8 * element->bits;
        if (size == 16) {
            QZ_NAME(measure_fp_batch_16)(&b, job->w + first * size * value, groups, job->w_type);
        } else {
            QZ_NAME(measure_fp_batch_32)(&b, job->w + first * size * value, groups, job->w_type);
        }
        const int is_plain = set_fp_scales(&b, job, element, scale, profile);
        memcpy(job->scale_codes + first, b.codes, (size_t)groups);
        if (is_plain) {
            encode_fp_groups(packed, &b, first, groups * size, size, job, element, profile, 1);
        } else {
            encode_fp_groups(packed, &b, first, groups * size, size, job, element, profile, 0);
        }
    }
}

/* ---- dequantize ---- */

/* Of a scale that decodes a group by itself. */
QZ_INLINE v_f32 decode_fp_scale(const uint8_t *codes, const qz_dequantize_job *job, const fp_scale *scale) {
    const v_f32 s = mul_f32(scale->decode(i32_from_u8(codes)), set1_f32(job->decode_factor));
    return round_to_type(canonical_nan(s), job->round_products_to);
}

/* What decoding needs to know of some scales. */
typedef struct fp_scale_traits {
    int is_finite; /* all, times the element's unit */
    int is_short;  /* all times a number of an element are bfloat16 numbers */
} fp_scale_traits;

/* Scales as they multiply: times the decoding factor G / 2688, in profile "cpu" rounded to the result's type, and times
 * the element's unit, by which decode_32 divides: powers of two, so that products stay the same unless the scale
 * overflows.
 *
 * Short ones have four significant bits, as E4M3 numbers have too, so that products have no more than eight; and are 0
 * or at least 2^-100, so that no bit of a product is below 2^-133, the least of bfloat16. */
QZ_INLINE fp_scale_traits decode_fp_scales(float *scales, const qz_dequantize_job *job, const uint8_t *codes,
                                           ptrdiff_t groups, const fp_scale *scale, float unit) {
    v_i32 infinite = set1_i32(0), longer = infinite;
    for (ptrdiff_t g = 0; g < groups; g += QZ_LANES) {
        const v_f32 s = mul_f32(decode_fp_scale(codes + g, job, scale), set1_f32(unit));
        const v_i32 magnitude = magnitude_of(s), is_small = greater_i32(bits_of_f32(set1_f32(0x1p-100f)), magnitude);
        infinite = or_i32(infinite, greater_i32(magnitude, set1_i32(0x7f7fffff)));
        longer = or_i32(longer, and_i32(magnitude, select_i32(is_small, set1_i32(-1), set1_i32(0xfffff))));
        store_f32(scales + g, s);
    }
    return (fp_scale_traits){!any_i32(infinite), !any_i32(greater_i32(longer, set1_i32(0)))};
}

/* Two vectors of results, which are bfloat16 numbers if is_short says so. */
QZ_INLINE void put_fp_results(char *to, ptrdiff_t i, qz_type type, v_f32 a, v_f32 b, int is_short, int stream) {
    if (type == QZ_BF16 && is_short) {
        put(to + 2 * i, high_u16_of_two(bits_of_f32(a), bits_of_f32(b)), stream);
    } else {
        put_results(to, i, type, a, b, stream);
    }
}

/* 32 elements, whose groups' scales are finite. Codes that are NaN are rare. */
QZ_INLINE void decode_fp_32(char *to, const uint8_t *packed, const float *scales, ptrdiff_t size,
                            const fp_element *element, qz_type type, int is_short, int stream) {
    v_f32 v[32 / QZ_LANES];
    const int has_nan = element->decode_32(v, packed);
    QZ_UNROLL
    for (int j = 0; j < 32 / QZ_LANES; j++) v[j] = mul_f32(v[j], set1_f32(scales[j * QZ_LANES / size]));
    if (has_nan) { /* of 8 bits each */
        for (int j = 0; j < 32 / QZ_LANES; j++) {
            const v_f32 number = element->decode(i32_from_u8(packed + j * QZ_LANES));
            const v_i32 is_nan = greater_i32(magnitude_of(number), set1_i32(0x7f800000));
            v[j] = f32_of_bits(select_i32(is_nan, set1_i32(0x7fc00000), bits_of_f32(v[j])));
        }
    }
    QZ_UNROLL
    for (int j = 0; j < 32 / QZ_LANES; j += 2) {
        put_fp_results(to, j * QZ_LANES, type, v[j], v[j + 1], is_short, stream);
    }
}

/* `count` elements, a multiple of 16. */
QZ_INLINE void decode_fp_run(char *to, const uint8_t *packed, ptrdiff_t count, const float *scales, ptrdiff_t size,
                             const fp_element *element, qz_type type, int is_short, int stream) {
    const ptrdiff_t value = type == QZ_F32 ? 4 : 2, bytes = 4 * element->bits;
    for (; count >= 32; count -= 32, to += 32 * value, packed += bytes, scales += 32 / size) {
        decode_fp_32(to, packed, scales, size, element, type, is_short, stream);
    }
    if (size < 32 && count > 0) {
        uint8_t last[32] = {0};
        float results[32];
        memcpy(last, packed, (size_t)bytes / 2);
        decode_fp_32((char *)results, last, scales, size, element, type, is_short, 0);
        memcpy(to, results, 16 * (size_t)value);
    }
}

QZ_INLINE void decode_fp_groups(char *to, const uint8_t *packed, ptrdiff_t groups, const float *scales, ptrdiff_t size,
                                const fp_element *element, qz_type type, int is_short, int stream) {
    const ptrdiff_t count = groups * size;
    switch (type) {
    case QZ_F16: decode_fp_run(to, packed, count, scales, size, element, QZ_F16, 0, stream); return;
    case QZ_BF16:
        if (is_short) {
            decode_fp_run(to, packed, count, scales, size, element, QZ_BF16, 1, stream);
        } else {
            decode_fp_run(to, packed, count, scales, size, element, QZ_BF16, 0, stream);
        }
        return;
    default: decode_fp_run(to, packed, count, scales, size, element, QZ_F32, 0, stream);
    }
}

/* Groups of any scale, NaN and infinities too: rare. NaN is made the one that stores round to NaN. */
static __attribute__((noinline)) void QZ_NAME(decode_odd_fp_groups)(const qz_dequantize_job *job, char *to,
                                                                    const uint8_t *packed, const uint8_t *scale_codes,
                                                                    ptrdiff_t groups, ptrdiff_t size,
                                                                    const fp_element *element, const fp_scale *scale) {
    uint8_t codes[FP_MAX_GROUP];
    float scales[QZ_LANES], w[FP_MAX_GROUP];
    const ptrdiff_t value = job->w_type == QZ_F32 ? 4 : 2;
    for (ptrdiff_t g = 0; g < groups; g++) {
        unpack_bits(codes, packed + g * size / 8 * element->bits, element->bits, size);
        store_f32(scales, decode_fp_scale(scale_codes + g, job, scale));
        for (ptrdiff_t i = 0; i < size; i += QZ_LANES) {
            const v_f32 number = element->decode(i32_from_u8(codes + i));
            store_f32(w + i, canonical_nan(mul_f32(number, set1_f32(scales[0]))));
        }
        QZ_NAME(store)(to + g * size * value, value, job->w_type, w, size);
    }
}

QZ_INLINE void dequantize_fp(const qz_dequantize_job *job, const fp_element *element, const fp_scale *scale,
                             ptrdiff_t size) {
    const ptrdiff_t most = DECODED / size, value = job->w_type == QZ_F32 ? 4 : 2;
    uint8_t codes[DECODED / 16 + QZ_LANES] = {0};
    float scales[DECODED / 16 + QZ_LANES];
    for (ptrdiff_t first = 0; first < job->groups; first += most) {
        const ptrdiff_t left = job->groups - first, groups = left < most ? left : most;
        const uint8_t *packed = job->packed + first * size / 8 * element->bits;
        char *to = job->w + first * size * value;
        memcpy(codes, job->scale_codes + first, (size_t)groups);
        const fp_scale_traits traits = decode_fp_scales(scales, job, codes, groups, scale, element->unit);
        if (!traits.is_finite) {
            QZ_NAME(decode_odd_fp_groups)(job, to, packed, codes, groups, size, element, scale);
        } else if (job->stream) {
            decode_fp_groups(to, packed, groups, scales, size, element, job->w_type, traits.is_short, 1);
        } else {
            decode_fp_groups(to, packed, groups, scales, size, element, job->w_type, traits.is_short, 0);
        }
    }
    if (job->stream) stream_end();
}
