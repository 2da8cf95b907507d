/* What callgrind counts for .ci/counts.py: counts ISA calls each kernel at two sizes and has callgrind dump the
 * instructions of each call under "KERNEL UNITS". A unit is 64 products of matmul or attention, or 64 elements. The
 * difference of the two sizes leaves out what a call costs whatever its size. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <valgrind/callgrind.h>

#include "../csrc/kernels.h"

extern const qz_kernels qz_kernels_avx2, qz_kernels_generic;
static const qz_kernels *kernels;

enum { SLOT_OF_64 = 1, GROUP = 64, MOST = 4096, MOST_M = 128 };
static const struct {
    int format, bits;
} formats[] = {{QZ_FORMAT_affine_2, 2}, {QZ_FORMAT_affine_3, 3}, {QZ_FORMAT_affine_4, 4},
               {QZ_FORMAT_affine_5, 5}, {QZ_FORMAT_affine_6, 6}, {QZ_FORMAT_affine_8, 8}};
enum { FORMAT_OF_4 = 2 };
typedef struct small_floats {
    const char *name;
    int format, bits;
    ptrdiff_t group;
    qz_type scale_type;
} small_floats;
static const small_floats fp_formats[] = {{"mxfp4", QZ_FORMAT_mxfp4, 4, 32, QZ_E8M0},
                                          {"mxfp8", QZ_FORMAT_mxfp8, 8, 32, QZ_E8M0},
                                          {"nvfp4", QZ_FORMAT_nvfp4, 4, 16, QZ_E4M3}};

static _Alignas(64) uint8_t codes[MOST * QZ_MAX_GROUP + QZ_SPILL];
static _Alignas(64) float values[MOST_M * MOST], scales[MOST], biases[MOST], results[MOST_M * QZ_MAX_GROUP];
static _Alignas(64) char prepared[MOST_M * MOST * 16], stored[MOST * 4];

static uint16_t halves[MOST];
static uint8_t scale_bytes[2][MOST * QZ_MAX_GROUP]; /* E8M0, E4M3 */

/* The same bytes on every machine. */
static void fill(void) {
    uint32_t state = 1;
    for (size_t i = 0; i < sizeof codes; i++) {
        codes[i] = (uint8_t)((state = state * 1664525u + 1013904223u) >> 24);
        if ((codes[i] & 0x7f) == 0x7f) codes[i]--; /* NaN of FP8, which is rare but in random bytes */
    }
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
        state = state * 1664525u + 1013904223u;
        values[i] = (float)(int32_t)state * 0x1p-31f;
    }
    for (int i = 0; i < MOST; i++) {
        scales[i] = 0.001f * (float)(1 + i % 7);
        biases[i] = -8.0f * scales[i];
        halves[i] = (uint16_t)(0x3000 + i); /* 2^-3 and more */
    }
    for (int i = 0; i < MOST * QZ_MAX_GROUP; i++) {
        scale_bytes[0][i] = (uint8_t)(120 + i % 7);
        scale_bytes[1][i] = (uint8_t)(0x30 + i % 7);
    }
}

/* Some rows of weights, all groups of GROUP, times m rows of x. */
static qz_matmul_job job_of(int bits, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t m, const void *x,
                            ptrdiff_t x_stride) {
    const ptrdiff_t groups = columns / GROUP;
    return (qz_matmul_job){
        .w = codes,
        .w_row_stride = columns * bits / 8,
        .scales = {.scales = (const char *)scales,
                   .biases = (const char *)biases,
                   .scale_row_stride = groups * 4,
                   .scale_group_stride = 4,
                   .bias_row_stride = groups * 4,
                   .bias_group_stride = 4,
                   .scale_type = QZ_F32,
                   .bias_type = QZ_F32},
        .group_size = GROUP,
        .rows = rows,
        .columns = columns,
        .x = x,
        .x_stride = x_stride,
        .m = m,
        .y = results,
        .y_stride = rows < QZ_PREFILL_ROWS ? QZ_TILE_ROWS : QZ_MAX_GROUP,
    };
}

static void dump(const char *name, ptrdiff_t units) {
    char text[96];
    snprintf(text, sizeof text, "%s %td", name, units);
    CALLGRIND_DUMP_STATS_AT(text);
}

static void count_multiply(const char *name, void (*multiply)(const qz_matmul_job *), qz_matmul_job job) {
    CALLGRIND_ZERO_STATS;
    multiply(&job);
    dump(name, job.rows * job.columns / GROUP * job.m);
}

static void count_matmul_t(int which, int digits, ptrdiff_t m) {
    const qz_format_kernels *format = kernels->format(formats[which].format, SLOT_OF_64);
    const qz_matmul_kernel *kernel = m == 1 ? &format->decode_t[digits - 1] : &format->prefill_t[digits - 1];
    const ptrdiff_t rows = m == 1 ? QZ_TILE_ROWS : QZ_PREFILL_ROWS;
    char name[64];
    snprintf(name, sizeof name, "matmul_t_%d_digits_%d_m_%td", formats[which].bits, digits, m);
    for (ptrdiff_t k = 1024; k <= 2048; k *= 2) {
        const ptrdiff_t stride = (ptrdiff_t)kernel->prepared_size(k);
        for (ptrdiff_t i = 0; i < m; i++) kernel->prepare_x(prepared + i * stride, values + i * k, k);
        count_multiply(name, kernel->multiply, job_of(formats[which].bits, rows, k, m, prepared, stride));
    }
}

/* Outputs of a job of y = x W, and its smaller k: one row of x has wide jobs, in which groups are prepared together. */
static ptrdiff_t columns_of(ptrdiff_t m) { return m == 1 ? 8 * GROUP : GROUP; }
static ptrdiff_t least_k(ptrdiff_t m) { return m == 1 ? 256 : 1024; }

static void count_matmul_n(ptrdiff_t m) {
    const qz_format_kernels *format = kernels->format(QZ_FORMAT_affine_4, SLOT_OF_64);
    char name[64];
    snprintf(name, sizeof name, "matmul_n_4_digits_3_m_%td", m);
    for (ptrdiff_t k = least_k(m); k <= 2 * least_k(m); k *= 2) {
        count_multiply(name, format->matmul_n[2], job_of(4, k, columns_of(m), m, values, k * 4));
    }
}

static qz_matmul_job fp_job(const small_floats *f, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t m, const void *x,
                            ptrdiff_t x_stride) {
    qz_matmul_job job = job_of(f->bits, rows, columns, m, x, x_stride);
    const char *const bytes = (const char *)scale_bytes[f->scale_type == QZ_E4M3];
    const ptrdiff_t groups = columns / f->group;
    /* scales stand in for the biases, as in calls */
    job.scales = (qz_scales){bytes, bytes, groups, 1, groups, 1, f->scale_type, f->scale_type};
    job.group_size = f->group;
    return job;
}

static void count_fp_matmul(const small_floats *f, ptrdiff_t m) {
    const qz_format_kernels *format = kernels->format(f->format, 0);
    const qz_matmul_kernel *kernel = m == 1 ? &format->decode_t[2] : &format->prefill_t[2];
    char name[64];
    snprintf(name, sizeof name, "matmul_t_%s_m_%td", f->name, m);
    for (ptrdiff_t k = 1024; k <= 2048; k *= 2) {
        const ptrdiff_t stride = (ptrdiff_t)kernel->prepared_size(k);
        for (ptrdiff_t i = 0; i < m; i++) kernel->prepare_x(prepared + i * stride, values + i * k, k);
        count_multiply(name, kernel->multiply,
                       fp_job(f, m == 1 ? QZ_TILE_ROWS : QZ_PREFILL_ROWS, k, m, prepared, stride));
    }
    snprintf(name, sizeof name, "matmul_n_%s_m_%td", f->name, m);
    for (ptrdiff_t k = least_k(m); k <= 2 * least_k(m); k *= 2) {
        count_multiply(name, format->matmul_n[2], fp_job(f, k, columns_of(m), m, values, k * 4));
    }
}

static void count_fp_codec(const small_floats *f) {
    char name[64];
    snprintf(name, sizeof name, "quantize_%s", f->name);
    for (ptrdiff_t count = 1024; count <= 2048; count *= 2) {
        const qz_quantize_job job = {
            .w = (const char *)values,
            .w_type = QZ_F32,
            .next = (const char *)values,
            .step = 4,
            .groups = count / f->group,
            .group_size = f->group,
            .packed = (uint8_t *)prepared,
            .scale_codes = (uint8_t *)stored,
            .encode_factor = 1.0f,
        };
        CALLGRIND_ZERO_STATS;
        kernels->format(f->format, 0)->quantize[QZ_PROFILE_METAL](&job);
        dump(name, count / GROUP);
    }
    snprintf(name, sizeof name, "dequantize_%s", f->name);
    for (ptrdiff_t count = 1024; count <= 2048; count *= 2) {
        const qz_dequantize_job job = {
            .packed = codes,
            .groups = count / f->group,
            .group_size = f->group,
            .scale_codes = scale_bytes[f->scale_type == QZ_E4M3],
            .decode_factor = 1.0f,
            .round_products_to = QZ_F32,
            .w = stored,
            .w_type = QZ_F32,
        };
        CALLGRIND_ZERO_STATS;
        kernels->format(f->format, 0)->dequantize(&job);
        dump(name, count / GROUP);
    }
}

/* The float class, which takes k in panels where it decodes weights first. */
static void count_float(ptrdiff_t m) {
    const qz_float_kernels *plain = &kernels->format(QZ_FORMAT_affine_4, SLOT_OF_64)->plain;
    char name[64];
    for (ptrdiff_t k = 1024; k <= 2048 && m == 1; k *= 2) {
        plain->prepare((float *)prepared, values, k, GROUP);
        count_multiply("float_t_4_m_1", plain->decode_t, job_of(4, QZ_FLOAT_OUTPUTS, k, m, prepared, 0));
    }
    snprintf(name, sizeof name, "float_t_4_m_%td", m);
    for (ptrdiff_t k = QZ_FLOAT_PANEL_T / 2; k <= QZ_FLOAT_PANEL_T && m > 1; k *= 2) {
        count_multiply(name, plain->prefill_t, job_of(4, QZ_FLOAT_OUTPUTS, k, m, values, k * 4));
    }
    snprintf(name, sizeof name, "float_n_4_m_%td", m);
    for (ptrdiff_t k = QZ_FLOAT_PANEL_N / 2; k <= QZ_FLOAT_PANEL_N; k *= 2) {
        count_multiply(name, plain->matmul_n, job_of(4, k, QZ_FLOAT_OUTPUTS_N, m, values, k * 4));
    }
}

static void count_fp_float(const small_floats *f, ptrdiff_t m) {
    const qz_float_kernels *plain = &kernels->format(f->format, 0)->plain;
    char name[64];
    if (!plain->prepare) return;
    snprintf(name, sizeof name, "float_t_%s_m_%td", f->name, m);
    for (ptrdiff_t k = 1024; k <= 2048 && m == 1; k *= 2) {
        plain->prepare((float *)prepared, values, k, f->group);
        count_multiply(name, plain->decode_t, fp_job(f, QZ_FLOAT_OUTPUTS, k, m, prepared, 0));
    }
    for (ptrdiff_t k = QZ_FLOAT_PANEL_T / 2; k <= QZ_FLOAT_PANEL_T && m > 1; k *= 2) {
        count_multiply(name, plain->prefill_t, fp_job(f, QZ_FLOAT_OUTPUTS, k, m, values, k * 4));
    }
    snprintf(name, sizeof name, "float_n_%s_m_%td", f->name, m);
    for (ptrdiff_t k = QZ_FLOAT_PANEL_N / 2; k <= QZ_FLOAT_PANEL_N; k *= 2) {
        count_multiply(name, plain->matmul_n, fp_job(f, k, QZ_FLOAT_OUTPUTS_N, m, values, k * 4));
    }
}

static void count_prepare_x(void) {
    const qz_format_kernels *format = kernels->format(QZ_FORMAT_affine_4, SLOT_OF_64);
    for (ptrdiff_t k = 1024; k <= 2048; k *= 2) {
        CALLGRIND_ZERO_STATS;
        format->decode_t[2].prepare_x(prepared, values, k);
        dump("prepare_x_4_digits_3", k / GROUP);
    }
}

static void count_quantize(qz_profile profile, qz_type type, const char *name) {
    for (ptrdiff_t groups = 16; groups <= 32; groups *= 2) {
        const qz_quantize_job job = {
            .w = type == QZ_F32 ? (const char *)values : (const char *)halves,
            .w_type = type,
            .next = (const char *)values,
            .step = type == QZ_F32 ? 4 : 2,
            .groups = groups,
            .group_size = GROUP,
            .packed = (uint8_t *)prepared,
            .scales = results,
            .biases = results + groups,
        };
        CALLGRIND_ZERO_STATS;
        kernels->format(QZ_FORMAT_affine_4, SLOT_OF_64)->quantize[profile](&job);
        dump(name, groups);
    }
}

static void count_dequantize(qz_type type, const char *name) {
    for (ptrdiff_t groups = 16; groups <= 32; groups *= 2) {
        const qz_dequantize_job job = {
            .packed = codes,
            .groups = groups,
            .group_size = GROUP,
            .scales = scales,
            .biases = biases,
            .round_products_to = QZ_F32,
            .w = stored,
            .w_type = type,
        };
        CALLGRIND_ZERO_STATS;
        kernels->format(QZ_FORMAT_affine_4, SLOT_OF_64)->dequantize(&job);
        dump(name, groups);
    }
}

/* Rows of 128, 64 elements a unit. */
static void count_kv(int bits) {
    const qz_kv_codec codec = {.version = 2,
                               .bits = bits,
                               .stored_bits = bits,
                               .block = 128,
                               .rotation = {.dimension = 128, .block = 128, .order = 1, .power = 128, .is_signed = 1}};
    char name[32];
    for (ptrdiff_t rows = 16; rows <= 32; rows *= 2) {
        const qz_kv_encode_job encode = {.codec = &codec,
                                         .from = values,
                                         .packed = (uint8_t *)prepared,
                                         .norms = scales,
                                         .rows = rows,
                                         .from_stride = 128,
                                         .packed_stride = qz_kv_row_bytes(&codec)};
        const qz_kv_decode_job decode = {.codec = &codec,
                                         .packed = codes,
                                         .norms = scales,
                                         .to = results,
                                         .rows = rows,
                                         .packed_stride = qz_kv_row_bytes(&codec),
                                         .to_stride = 128};
        snprintf(name, sizeof name, "kv_encode_%d", bits);
        CALLGRIND_ZERO_STATS;
        kernels->kv->encode(&encode);
        dump(name, rows * 2);
        snprintf(name, sizeof name, "kv_decode_%d", bits);
        CALLGRIND_ZERO_STATS;
        kernels->kv->decode(&decode);
        dump(name, rows * 2);
    }
}

/* Packed keys and values of 128 elements, times the rows of m queries. What codes stand for changes no count: any bytes
 * and floats do for the tables of it. */
static void count_attention(const char *codec, int bits, int is_bfloat16, ptrdiff_t m) {
    const qz_attention_kernels *attention = &kernels->kv->attention;
    const qz_kv_rows queries = {values, 128, m}, accumulators = {results, 128, m};
    char name[32];
    for (ptrdiff_t positions = QZ_ATTENTION_TILE / 2; positions <= QZ_ATTENTION_TILE; positions *= 2) {
        const qz_kv_block block = {.codes = codes,
                                   .stride = 128 * bits / 8,
                                   .positions = positions,
                                   .length = 128,
                                   .bits = bits,
                                   .in_bytes = bits == 8,
                                   .is_bfloat16 = is_bfloat16,
                                   .centroids = values,
                                   .planes = codes,
                                   .scales = scales};
        snprintf(name, sizeof name, "kv_score_%s_m_%td", codec, m);
        CALLGRIND_ZERO_STATS;
        attention->score(&block, &queries, results);
        dump(name, positions * 2 * m);
        snprintf(name, sizeof name, "kv_weigh_%s_m_%td", codec, m);
        CALLGRIND_ZERO_STATS;
        attention->weigh(&block, &accumulators, values);
        dump(name, positions * 2 * m);
    }
}

/* What stands between scores and values. A tile is one unit and has one size, so calls make the two sizes. */
static void count_softmax(void) {
    const qz_attention_kernels *attention = &kernels->kv->attention;
    for (ptrdiff_t tiles = 16; tiles <= 32; tiles *= 2) {
        qz_softmax softmax = {-INFINITY, 0, 1};
        const ptrdiff_t count = tiles * QZ_ATTENTION_TILE;
        memcpy(results, values, (size_t)count * sizeof *results);
        CALLGRIND_ZERO_STATS;
        for (ptrdiff_t i = 0; i < tiles; i++) attention->cap(results + i * QZ_ATTENTION_TILE, 1);
        dump("kv_cap", tiles);
        CALLGRIND_ZERO_STATS;
        for (ptrdiff_t i = 0; i < tiles; i++) attention->soften(results + i * QZ_ATTENTION_TILE, &softmax);
        dump("kv_soften", tiles);
        CALLGRIND_ZERO_STATS;
        attention->rescale(results, count, 0.5f);
        dump("kv_rescale", tiles);
        CALLGRIND_ZERO_STATS;
        attention->merge(&softmax, results, &softmax, values, count);
        dump("kv_merge", tiles);
    }
}

static void count_elementwise(void) {
    for (ptrdiff_t count = 1024; count <= 2048; count *= 2) {
        CALLGRIND_ZERO_STATS;
        kernels->fake_quantize(results, (const char *)values, QZ_F32, count, 4, 0);
        dump("fake_quantize_4", count / 64);
    }
    for (ptrdiff_t count = 1024; count <= 2048; count *= 2) {
        CALLGRIND_ZERO_STATS;
        kernels->fake_quantize(results, (const char *)halves, QZ_F16, count, 4, 0);
        dump("fake_quantize_4_f16", count / 64);
    }
    for (ptrdiff_t count = 1024; count <= 2048; count *= 2) {
        CALLGRIND_ZERO_STATS;
        kernels->load(results, (const char *)halves, 2, QZ_F16, count);
        dump("load_f16", count / 64);
    }
}

int main(int arguments, char **argument) {
    if (arguments != 2) return 2;
    kernels = strcmp(argument[1], "avx2") == 0 ? &qz_kernels_avx2 : &qz_kernels_generic;
    fill();
    for (int which = 0; which < (int)(sizeof formats / sizeof *formats); which++) {
        for (int digits = 1; digits <= QZ_MAX_DIGITS; digits++) count_matmul_t(which, digits, 1);
    }
    count_matmul_t(FORMAT_OF_4, 3, MOST_M);
    count_matmul_n(1);
    count_matmul_n(32);
    count_float(1);
    count_float(MOST_M);
    count_prepare_x();
    count_quantize(QZ_PROFILE_METAL, QZ_F32, "quantize_4");
    count_quantize(QZ_PROFILE_METAL, QZ_F16, "quantize_4_f16");
    count_dequantize(QZ_F32, "dequantize_4_f32");
    count_dequantize(QZ_F16, "dequantize_4_f16");
    for (int which = 0; which < (int)(sizeof fp_formats / sizeof *fp_formats); which++) {
        count_fp_matmul(&fp_formats[which], 1);
        count_fp_matmul(&fp_formats[which], 32);
        count_fp_float(&fp_formats[which], 1);
        count_fp_float(&fp_formats[which], MOST_M);
        count_fp_codec(&fp_formats[which]);
    }
    count_elementwise();
    for (int bits = 4; bits <= 8; bits += 4) count_kv(bits);
    for (ptrdiff_t m = 1; m <= 8; m *= 8) {
        count_attention("4", 4, 1, m);
        count_attention("4_codec_1", 4, 0, m); /* whose values are no bfloat16 */
        count_attention("8", 8, 0, m);
    }
    count_softmax();
    return 0;
}
