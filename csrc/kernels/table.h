/* Closes a unit of csrc/isa/: one set of kernels per row of formats.def and group size, and the table of them all. An
 * empty group slot is built as if it were a group of 64, and never handed out. */

#define QZ_SLOT_BLOCK(group_size) QZ_BLOCK((group_size) ? (group_size) : QZ_MAX_BLOCK)

/* Group sizes with the same block share one kernel: the slot hands on to the one before it. KIND is DECODE or PREFILL,
 * whose functions the unit has named. */
#define QZ_DEFINE_MATMUL(kind, KIND, name, slot, before, bits, block, block_before, digits)                      \
    static size_t QZ_NAME(kind##_size_##name##_##slot##_##digits)(ptrdiff_t k) {                                 \
        return QZ_##KIND##_SIZE(k, bits, block, digits);                                                         \
    }                                                                                                            \
    static int QZ_NAME(kind##_prepare_##name##_##slot##_##digits)(char *prepared, const float *x, ptrdiff_t k) { \
        if (slot > 0 && (block) == (block_before)) {                                                             \
            return QZ_NAME(kind##_prepare_##name##_##before##_##digits)(prepared, x, k);                         \
        }                                                                                                        \
        return QZ_##KIND##_PREPARE(prepared, x, k, bits, block, digits);                                         \
    }                                                                                                            \
    static void QZ_NAME(kind##_multiply_##name##_##slot##_##digits)(const qz_matmul_job *job) {                  \
        if (slot > 0 && (block) == (block_before)) {                                                             \
            QZ_NAME(kind##_multiply_##name##_##before##_##digits)(job);                                          \
        } else {                                                                                                 \
            QZ_##KIND##_T(job, bits, block, digits);                                                             \
        }                                                                                                        \
    }
#define QZ_DEFINE_DIGITS(...)                     \
    QZ_DEFINE_MATMUL(decode, DECODE, __VA_ARGS__) \
    QZ_DEFINE_MATMUL(prefill, PREFILL, __VA_ARGS__)

#define QZ_DEFINE_SLOT(name, slot, before, bits, group_size, size_before)                                \
    QZ_DEFINE_DIGITS(name, slot, before, bits, QZ_SLOT_BLOCK(group_size), QZ_SLOT_BLOCK(size_before), 1) \
    QZ_DEFINE_DIGITS(name, slot, before, bits, QZ_SLOT_BLOCK(group_size), QZ_SLOT_BLOCK(size_before), 2) \
    QZ_DEFINE_DIGITS(name, slot, before, bits, QZ_SLOT_BLOCK(group_size), QZ_SLOT_BLOCK(size_before), 3)

#define QZ_DEFINE_MATMUL_N(name, bits, digits) \
    static void QZ_NAME(matmul_n_##name##_##digits)(const qz_matmul_job *job) { QZ_MATMUL_N(job, bits, digits); }

#define QZ_DEFINE_FLOAT(name, bits)                                                                           \
    static size_t QZ_NAME(float_row_size_##name)(ptrdiff_t k, ptrdiff_t group_size) {                         \
        return float_row_size(k, group_size, bits);                                                           \
    }                                                                                                         \
    static void QZ_NAME(prepare_float_##name)(float *to, const float *x, ptrdiff_t k, ptrdiff_t group_size) { \
        prepare_float_row(to, x, k, group_size, bits);                                                        \
    }                                                                                                         \
    static void QZ_NAME(float_decode_t_##name)(const qz_matmul_job *job) { float_decode_t(job, bits); }       \
    static void QZ_NAME(float_prefill_t_##name)(const qz_matmul_job *job) { float_prefill_t(job, bits); }     \
    static void QZ_NAME(float_n_##name)(const qz_matmul_job *job) { float_matmul_n(job, bits); }

/* Groups of a small float's format are of one size, its block. */
#define QZ_DEFINE_FLOAT_FP4(name, block)                                                                       \
    static size_t QZ_NAME(float_row_size_##name)(ptrdiff_t k, ptrdiff_t group_size) {                          \
        (void)group_size;                                                                                      \
        return float_row_size_fp4(k);                                                                          \
    }                                                                                                          \
    static void QZ_NAME(prepare_float_##name)(float *to, const float *x, ptrdiff_t k, ptrdiff_t group_size) {  \
        (void)group_size;                                                                                      \
        prepare_float_row_fp4(to, x, k);                                                                       \
    }                                                                                                          \
    static void QZ_NAME(float_decode_t_##name)(const qz_matmul_job *job) { float_decode_t_fp4(job, block); }   \
    static void QZ_NAME(float_prefill_t_##name)(const qz_matmul_job *job) { float_prefill_t_fp4(job, block); } \
    static void QZ_NAME(float_n_##name)(const qz_matmul_job *job) { float_matmul_n_fp4(job, block); }

#define QZ_DEFINE_QUANTIZE(name, quantize, dequantize, ...)                  \
    static void QZ_NAME(quantize_metal_##name)(const qz_quantize_job *job) { \
        quantize(job, __VA_ARGS__, QZ_PROFILE_METAL);                        \
    }                                                                        \
    static void QZ_NAME(quantize_cpu_##name)(const qz_quantize_job *job) {   \
        quantize(job, __VA_ARGS__, QZ_PROFILE_CPU);                          \
    }                                                                        \
    static void QZ_NAME(dequantize_##name)(const qz_dequantize_job *job) { dequantize(job, __VA_ARGS__); }

#define QZ_DEFINE_affine(name, element, bits, first, second, third, scale) \
    QZ_DEFINE_QUANTIZE(name, quantize_affine, dequantize_affine, bits)     \
    QZ_DEFINE_FLOAT(name, bits)                                            \
    QZ_DEFINE_MATMUL_N(name, bits, 1)                                      \
    QZ_DEFINE_MATMUL_N(name, bits, 2)                                      \
    QZ_DEFINE_MATMUL_N(name, bits, 3)                                      \
    QZ_DEFINE_SLOT(name, 0, 0, bits, first, first)                         \
    QZ_DEFINE_SLOT(name, 1, 0, bits, second, first)                        \
    QZ_DEFINE_SLOT(name, 2, 1, bits, third, second)
#define QZ_DEFINE_fp(name, element, bits, first, second, third, scale)                    \
    QZ_DEFINE_QUANTIZE(name, quantize_fp, dequantize_fp, &element, &scale_##scale, first) \
    QZ_DEFINE_##element(name, first)
#define QZ_DEFINE_fp4_e2m1(name, first) \
    QZ_DEFINE_FLOAT_FP4(name, first)    \
    QZ_DEFINE_MATMUL_N(name, QZ_FP4, 1) \
    QZ_DEFINE_MATMUL_N(name, QZ_FP4, 2) \
    QZ_DEFINE_MATMUL_N(name, QZ_FP4, 3) \
    QZ_DEFINE_SLOT(name, 0, 0, QZ_FP4, first, first)
#define QZ_DEFINE_fp8_e4m3(name, first)                                                        \
    static size_t QZ_NAME(row_size_##name)(ptrdiff_t k) { return (size_t)k * sizeof(float); }  \
    static int QZ_NAME(copy_row_##name)(char *prepared, const float *x, ptrdiff_t k) {         \
        memcpy(prepared, x, (size_t)k * sizeof *x);                                            \
        return 1;                                                                              \
    }                                                                                          \
    static void QZ_NAME(decode_t_##name)(const qz_matmul_job *job) { QZ_DECODE_T_FP8(job); }   \
    static void QZ_NAME(prefill_t_##name)(const qz_matmul_job *job) { QZ_PREFILL_T_FP8(job); } \
    static void QZ_NAME(matmul_n_##name)(const qz_matmul_job *job) { QZ_MATMUL_N_FP8(job); }

#define QZ_FORMAT(name, family, mode, element, bits, first, second, third, scale, bias) \
    QZ_DEFINE_##family(name, element, bits, first, second, third, scale)
#include "../formats.def"
#undef QZ_FORMAT

/* Rows of x from which on panels are worth their making, by digits; a header whose panels of affine codes cost less
 * says so. */
#define QZ_MIN_PREFILL_FP {8, 8, 8}
#ifndef QZ_MIN_PREFILL
#define QZ_MIN_PREFILL(bits, block) {8, 8, 8}
#endif
_Static_assert(8 <= QZ_DECODE_ROWS + 1, "decode_t takes all rows of x below");

#define QZ_BY_DIGITS(kernel) {QZ_NAME(kernel##_1), QZ_NAME(kernel##_2), QZ_NAME(kernel##_3)}
#define QZ_KERNEL(kind, which) \
    {QZ_NAME(kind##_size_##which), QZ_NAME(kind##_prepare_##which), QZ_NAME(kind##_multiply_##which)}
#define QZ_KERNELS_BY_DIGITS(kind, which) \
    {QZ_KERNEL(kind, which##_1), QZ_KERNEL(kind, which##_2), QZ_KERNEL(kind, which##_3)}
#define QZ_FLOAT_KERNELS(name)                                                                      \
    {QZ_NAME(float_row_size_##name), QZ_NAME(prepare_float_##name), QZ_NAME(float_decode_t_##name), \
     QZ_NAME(float_prefill_t_##name), QZ_NAME(float_n_##name)}
#define QZ_QUANTIZE(name) \
    {[QZ_PROFILE_METAL] = QZ_NAME(quantize_metal_##name), [QZ_PROFILE_CPU] = QZ_NAME(quantize_cpu_##name)}
#define QZ_SLOT_affine(name, slot, bits, block)    \
    {QZ_QUANTIZE(name),                            \
     QZ_NAME(dequantize_##name),                   \
     QZ_KERNELS_BY_DIGITS(decode, name##_##slot),  \
     QZ_KERNELS_BY_DIGITS(prefill, name##_##slot), \
     QZ_MIN_PREFILL(bits, block),                  \
     QZ_BY_DIGITS(matmul_n_##name),                \
     QZ_FLOAT_KERNELS(name)}
/* The fp family has one group size. fp8_e4m3 has no kernels of the float class: where those are asked for, the binding
 * takes the exact ones, whose sums are as good. x keeps all its digits there. */
#define QZ_SLOT_fp4_e2m1(name)                 \
    {.quantize = QZ_QUANTIZE(name),            \
     .dequantize = QZ_NAME(dequantize_##name), \
     QZ_KERNELS_BY_DIGITS(decode, name##_0),   \
     QZ_KERNELS_BY_DIGITS(prefill, name##_0),  \
     QZ_MIN_PREFILL_FP,                        \
     QZ_BY_DIGITS(matmul_n_##name),            \
     QZ_FLOAT_KERNELS(name)}
#define QZ_KERNEL_FP8(kind, name) {QZ_NAME(row_size_##name), QZ_NAME(copy_row_##name), QZ_NAME(kind##_##name)}
#define QZ_THRICE(...) {__VA_ARGS__, __VA_ARGS__, __VA_ARGS__}
#define QZ_SLOT_fp8_e4m3(name)                  \
    {.quantize = QZ_QUANTIZE(name),             \
     .dequantize = QZ_NAME(dequantize_##name),  \
     QZ_THRICE(QZ_KERNEL_FP8(decode_t, name)),  \
     QZ_THRICE(QZ_KERNEL_FP8(prefill_t, name)), \
     QZ_MIN_PREFILL_FP,                         \
     QZ_THRICE(QZ_NAME(matmul_n_##name))}
#define QZ_SLOTS_affine(name, element, bits, first, second, third)                                              \
    {QZ_SLOT_affine(name, 0, bits, QZ_SLOT_BLOCK(first)), QZ_SLOT_affine(name, 1, bits, QZ_SLOT_BLOCK(second)), \
     QZ_SLOT_affine(name, 2, bits, QZ_SLOT_BLOCK(third))},
#define QZ_SLOTS_fp(name, element, ...) {QZ_SLOT_##element(name)},
#define QZ_FORMAT(name, family, mode, element, bits, first, second, third, scale, bias) \
    QZ_SLOTS_##family(name, element, bits, first, second, third)
static const qz_format_kernels QZ_NAME(format_kernels)[QZ_FORMATS][QZ_GROUP_SLOTS] = {
#include "../formats.def"
};
#undef QZ_FORMAT

static const qz_format_kernels *QZ_NAME(format)(int format, int group_slot) {
    return &QZ_NAME(format_kernels)[format][group_slot];
}

extern const qz_kv_kernels QZ_NAME(qz_kv_kernels);

const qz_kernels QZ_NAME(qz_kernels) = {
    .name = QZ_TEXT(QZ_ISA_NAME),
    .matmul_note = QZ_MATMUL_NOTE,
    .load = QZ_NAME(load),
    .store = QZ_NAME(store),
    .fake_quantize = QZ_NAME(fake_quantize),
    .to_fp8 = QZ_NAME(to_fp8),
    .from_fp8 = QZ_NAME(from_fp8),
    .format = QZ_NAME(format),
    .probe = {QZ_NAME(probe_read), QZ_NAME(probe_stream), QZ_NAME(probe_fma), QZ_NAME(probe_dot),
              .fma_operations = 2 * QZ_LANES * QZ_PROBE_CHAINS,
              .dot_operations = 2 * QZ_LANES * QZ_PROBE_CHAINS * QZ_PROBE_PRODUCTS, .dot_name = QZ_PROBE_DOT_NAME},
    .kv = &QZ_NAME(qz_kv_kernels),
};
