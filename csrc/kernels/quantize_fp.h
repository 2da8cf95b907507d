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

/* Whole vectors of packed codes: of groups of 16, the last may be half of one. Prefetches: see affine_encode. */
QZ_INLINE void encode_fp_groups(uint8_t *packed, const fp_batch *b, ptrdiff_t first, ptrdiff_t count, ptrdiff_t size,
                                const qz_quantize_job *job, const fp_element *element, int profile, int is_plain) {
    const ptrdiff_t step = job->step;
    for (ptrdiff_t i = 0; i < count; i += QZ_BYTES) {
        const char *next = job->next + (first * size + i) * step;
        v_i32 v[4];
        QZ_UNROLL
        for (int line = 0; line < QZ_BYTES / 16; line++) prefetch(next + line * 16 * step); /* if float32 */
        QZ_UNROLL
        for (int j = 0; j < 4; j++) {
            const ptrdiff_t at = i + j * QZ_LANES, g = at / size;
            v[j] = encode_fp_vector(b->w + at, b->factor[g], b->used[g], job, element, profile, is_plain);
        }
        store_packed(packed, bytes_from_i32(v[0], v[1], v[2], v[3]), element->bits);
        packed += QZ_BYTES / 8 * element->bits;
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

/* Scales as they multiply: times the decoding factor G / 2688 and, in profile "cpu", rounded to the result's type. */
QZ_INLINE void decode_fp_scales(float *scales, const qz_dequantize_job *job, ptrdiff_t first, ptrdiff_t groups,
                                const fp_scale *scale) {
    for (ptrdiff_t g = 0; g < groups; g += QZ_LANES) {
        uint8_t codes[QZ_LANES] = {0};
        memcpy(codes, job->scale_codes + first + g, (size_t)(groups - g < QZ_LANES ? groups - g : QZ_LANES));
        v_f32 s = mul_f32(scale->decode(i32_from_u8(codes)), set1_f32(job->decode_factor));
        store_f32(scales + g, round_to_type(canonical_nan(s), job->round_products_to));
    }
}

/* NaN is made the one that stores round to NaN. */
QZ_INLINE v_f32 decode_fp_vector(const uint8_t *codes, float scale, const fp_element *element) {
    return canonical_nan(mul_f32(element->decode(i32_from_u8(codes)), set1_f32(scale)));
}

/* Groups are multiples of 16 elements, and two vectors of 16 lanes hold 32: the last ones may be half there. */
QZ_INLINE void decode_fp_groups(const qz_dequantize_job *job, const uint8_t *codes, const float *scales,
                                ptrdiff_t first, ptrdiff_t groups, ptrdiff_t size, const fp_element *element,
                                qz_type type) {
    const ptrdiff_t count = groups * size, value = type == QZ_F32 ? 4 : 2;
    char *to = job->w + first * size * value;
    for (ptrdiff_t i = 0; i < count; i += 2 * QZ_LANES) {
        const v_f32 low = decode_fp_vector(codes + i, scales[i / size], element);
        const v_f32 high = decode_fp_vector(codes + i + QZ_LANES, scales[(i + QZ_LANES) / size], element);
        if (count - i >= 2 * QZ_LANES) {
            put_results(to, i, type, low, high, job->stream);
        } else {
            char last[4 * 2 * QZ_LANES];
            put_results(last, 0, type, low, high, 0);
            memcpy(to + i * value, last, (size_t)((count - i) * value));
        }
    }
}

QZ_INLINE void dequantize_fp(const qz_dequantize_job *job, const fp_element *element, const fp_scale *scale,
                             ptrdiff_t size) {
    const ptrdiff_t most = DECODED / size;
    uint8_t codes[DECODED + 2 * QZ_LANES] = {0};
    float scales[DECODED / 16 + QZ_LANES] = {0};
    for (ptrdiff_t first = 0; first < job->groups; first += most) {
        const ptrdiff_t left = job->groups - first, groups = left < most ? left : most;
        unpack_bits(codes, job->packed + first * size / 8 * element->bits, element->bits, groups * size);
        decode_fp_scales(scales, job, first, groups, scale);
        switch (job->w_type) {
        case QZ_F16: decode_fp_groups(job, codes, scales, first, groups, size, element, QZ_F16); break;
        case QZ_BF16: decode_fp_groups(job, codes, scales, first, groups, size, element, QZ_BF16); break;
        default: decode_fp_groups(job, codes, scales, first, groups, size, element, QZ_F32);
        }
    }
    if (job->stream) stream_end();
}
