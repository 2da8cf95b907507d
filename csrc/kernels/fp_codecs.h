/* What the codecs of csrc/elements/ say of the fp formats. Pointers are constants where they are called: they cost no
 * call. */

typedef struct fp_element {
    int bits;
    float largest;
    int exponent; /* of the largest number */
    v_i32 (*encode)(v_f32 steps, int profile);
    v_f32 (*decode)(v_i32 codes);
    int (*decode_32)(v_f32 to[32 / QZ_LANES], const uint8_t *packed); /* divided by unit; returns whether one is NaN */
    float unit;
} fp_element;

/* The scales of QZ_LANES groups. */
typedef struct fp_scales {
    v_i32 codes, used; /* used: -1, or 0 where all of a group's elements get code 0 */
    v_f32 values;
} fp_scales;

typedef struct fp_scale {
    void (*set)(fp_scales *, v_f32 most, const fp_element *, const qz_quantize_job *, int profile);
    v_f32 (*decode)(v_i32 codes);
} fp_scale;

static const fp_element fp4_e2m1 = {4, 6.0f, 2, encode_fp4_e2m1, decode_fp4_e2m1, decode_32_fp4_e2m1, 1.0f};
static const fp_element fp8_e4m3 = {8, 448.0f, 8, encode_fp8_e4m3, decode_fp8_e4m3, decode_32_fp8_e4m3, 256.0f};

/* The nearest by its logarithm, as MLX rounded before it rounded up: ties away from zero ("metal"), or to even after
 * the logarithm is rounded to w's type ("cpu"). */
QZ_INLINE v_i32 e8m0_nearest(v_f32 d, qz_type type, int profile) {
    float values[QZ_LANES];
    int32_t codes[QZ_LANES];
    store_f32(values, d);
    for (int i = 0; i < QZ_LANES; i++) {
        const float logarithm = values[i] > 0 && values[i] < INFINITY ? (float)log2((double)values[i]) : -127.0f;
        const float exponent = profile == QZ_PROFILE_METAL ? roundf(logarithm) : rintf(round_one(logarithm, type));
        codes[i] = exponent > -127.0f ? (int32_t)exponent + 127 : 0;
    }
    return load_i32(codes);
}

/* E8M0: a group of zeros has byte 0 ("metal") or 127 ("cpu"); one with NaN or an infinity 255 and codes 0, so that all
 * of it decodes to NaN. */
QZ_INLINE void set_scales_e8m0(fp_scales *s, v_f32 most, const fp_element *element, const qz_quantize_job *job,
                               int profile) {
    const v_i32 infinite = greater_i32(bits_of_f32(most), set1_i32(0x7f7fffff));
    v_f32 d = div_f32(most, set1_f32(element->largest));
    if (profile == QZ_PROFILE_CPU) d = round_to_type(d, job->round_to);
    switch (job->mx_scale) {
    case QZ_MX_NEAREST: s->codes = e8m0_nearest(d, job->round_to, profile); break;
    case QZ_MX_FLOOR:
        s->codes = e8m0_floor(most, element->exponent);
        d = most;
        break;
    default: s->codes = e8m0_above(d);
    }
    if (profile == QZ_PROFILE_CPU) {
        s->codes = select_i32(greater_i32(bits_of_f32(d), set1_i32(0)), s->codes, set1_i32(127));
    }
    s->codes = select_i32(infinite, set1_i32(255), s->codes);
    s->values = decode_e8m0(s->codes);
    s->used = greater_i32(set1_i32(255), s->codes);
}

static const fp_scale scale_e8m0 = {set_scales_e8m0, decode_e8m0};

/* E4M3: that of the group's magnitude d over the element's largest number, times the encoding factor. */
QZ_INLINE void set_scales_fp8_e4m3(fp_scales *s, v_f32 most, const fp_element *element, const qz_quantize_job *job,
                                   int profile) {
    v_f32 d = div_f32(most, set1_f32(element->largest));
    if (profile == QZ_PROFILE_CPU) d = round_to_type(d, job->round_to);
    d = mul_f32(d, set1_f32(job->encode_factor));
    const v_i32 finite = greater_i32(set1_i32(0x7f800000), bits_of_f32(most));
    d = f32_of_bits(and_i32(select_i32(finite, bits_of_f32(d), set1_i32(0x7f800000)), set1_i32(0x7fffffff)));
    s->codes = encode_fp8_e4m3(d, profile);
    s->values = decode_fp8_e4m3(s->codes);
    s->used = greater_i32(s->codes, set1_i32(0));
}

static const fp_scale scale_fp8_e4m3 = {set_scales_fp8_e4m3, decode_fp8_e4m3};
