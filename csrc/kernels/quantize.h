/* Affine quantization and its inverse, a run of groups at a time.
 *
 * The algorithm is MLX's (mlx/backend/cpu/quantized.cpp and mlx/backend/metal/kernels/quantized.h): the range [lo, hi]
 * of the group is spread over n = 2^bits - 1 steps, anchored so that the edge of larger magnitude is code 0, and
 * stretched so that real 0 is a code. All in float32, with real divisions; codes come from the unrounded scale and
 * bias.
 *
 * The profiles differ in two points. "cpu" rounds ties to even. "metal" rounds ties away from zero, and its hi is at
 * least 0, so that an all-negative group is spread over [lo, 0]. Groups with infinities, and those of NaN alone, follow
 * "cpu" in both: NaN is ignored by the range and gets code 0. */

typedef struct affine_range {
    float scale, bias;
} affine_range;

QZ_INLINE float round_step(float value, int profile) {
    return profile == QZ_PROFILE_METAL ? roundf(value) : rintf(value);
}

static affine_range affine_range_of(float lo, float hi, int bits, int profile) {
    const float steps = (float)((1 << bits) - 1), smallest = 1e-7f;
    if (profile == QZ_PROFILE_METAL && hi < 0.0f && hi >= -FLT_MAX) hi = 0.0f;
    float scale = (hi - lo) / steps;
    if (!(scale > smallest)) scale = smallest;
    float edge = hi;
    if (fabsf(lo) > fabsf(hi)) {
        edge = lo;
    } else {
        scale = -scale;
    }
    float code = round_step(edge / scale, profile);
    if (code == 0.0f) return (affine_range){scale, 0.0f};
    scale = edge / code;
    return (affine_range){scale == scale ? scale : qz_float_of(0x7fc00000u), edge};
}

QZ_INLINE affine_range affine_measure(const float *w, ptrdiff_t count, int bits, int profile) {
    v_f32 lo = set1_f32(INFINITY), hi = set1_f32(-INFINITY);
    float los[QZ_LANES], his[QZ_LANES];
    for (ptrdiff_t i = 0; i < count; i += QZ_LANES) {
        lo = min_f32(load_f32(w + i), lo); /* NaN in w leaves the second operand */
        hi = max_f32(load_f32(w + i), hi);
    }
    store_f32(los, lo);
    store_f32(his, hi);
    for (int i = 1; i < QZ_LANES; i++) {
        los[0] = los[i] < los[0] ? los[i] : los[0];
        his[0] = his[i] > his[0] ? his[i] : his[0];
    }
    return affine_range_of(los[0], his[0], bits, profile);
}

QZ_INLINE void affine_encode(uint8_t *codes, const float *w, ptrdiff_t count, affine_range range, int bits,
                             int profile) {
    v_f32 scale = set1_f32(range.scale), bias = set1_f32(range.bias);
    for (ptrdiff_t i = 0; i < count; i += QZ_LANES) {
        v_f32 steps = div_f32(sub_f32(load_f32(w + i), bias), scale);
        store_low_u8(codes + i, encode_uint(steps, bits, profile));
    }
}

QZ_INLINE void quantize_affine(const qz_quantize_job *job, int bits, int profile) {
    const ptrdiff_t size = job->group_size;
    uint8_t codes[QZ_MAX_GROUP];
    for (ptrdiff_t group = 0; group < job->groups; group++) {
        const float *w = job->w + group * size;
        affine_range range = affine_measure(w, size, bits, profile);
        affine_encode(codes, w, size, range, bits, profile);
        pack_bits(job->packed + group * (size * bits / 8), codes, bits, size);
        job->scales[group] = range.scale;
        job->biases[group] = range.bias;
    }
}

QZ_INLINE v_f32 round_to_type(v_f32 v, qz_type type) {
    uint16_t half[QZ_LANES];
    if (type == QZ_F16) {
        store_f16_from_f32(half, v);
        return f32_from_f16(half);
    }
    return type == QZ_BF16 ? f32_of_bits(shl_i32(bf16_bits(v), 16)) : v;
}

/* A float32 sum of two float16 (or bfloat16) values, rounded again to that type, is the type's own sum: float32 has
 * more than twice its precision and two bits. */
QZ_INLINE void dequantize_group(float *w, const uint8_t *codes, ptrdiff_t count, float scale, float bias,
                                qz_type type) {
    v_f32 s = set1_f32(scale), b = set1_f32(bias);
    for (ptrdiff_t i = 0; i < count; i += QZ_LANES) {
        v_f32 product = round_to_type(mul_f32(decode_uint(codes + i), s), type);
        store_f32(w + i, round_to_type(add_f32(product, b), type));
    }
}

QZ_INLINE void dequantize_affine(const qz_dequantize_job *job, int bits) {
    const ptrdiff_t size = job->group_size;
    uint8_t codes[QZ_MAX_GROUP];
    for (ptrdiff_t group = 0; group < job->groups; group++) {
        unpack_bits(codes, job->packed + group * (size * bits / 8), bits, size);
        float *w = job->w + group * size, s = job->scales[group], b = job->biases[group];
        if (job->round_products_to == QZ_F32) {
            dequantize_group(w, codes, size, s, b, QZ_F32);
        } else {
            dequantize_group(w, codes, size, s, b, job->round_products_to);
        }
        /* Finite scales and biases make no NaN, even where s * q overflows. */
        if (!isfinite(s) || !isfinite(b)) make_nan_canonical(w, size);
    }
}
