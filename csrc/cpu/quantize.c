#include <string.h>

#include "cpu.h"
#include "rows.h"
#include "threads.h"

/* Values in one piece of work: whole groups of any size, and the float32 copy stays in L1. */
enum { PIECE = 2048, PIECE_GROUPS = PIECE / 16 };

typedef struct span {
    ptrdiff_t row, first_group, groups;
} span;

/* A row is cut into pieces of whole groups, so that one long row is shared by the threads too. */
typedef struct cut {
    ptrdiff_t groups_per_row, groups_per_piece, pieces_per_row;
} cut;

static cut cut_rows(ptrdiff_t groups_per_row, ptrdiff_t group_size) {
    cut c = {groups_per_row, PIECE / group_size, 0};
    c.pieces_per_row = (groups_per_row + c.groups_per_piece - 1) / c.groups_per_piece;
    return c;
}

static span span_of(const cut *c, ptrdiff_t piece) {
    span s = {piece / c->pieces_per_row, piece % c->pieces_per_row * c->groups_per_piece, c->groups_per_piece};
    if (s.groups > c->groups_per_row - s.first_group) s.groups = c->groups_per_row - s.first_group;
    return s;
}

static char *group_at(const qz_array *array, const span *s) {
    return qz_element(array, array->ndim - 1, s->row) + s->first_group * qz_last_stride(array);
}

/* Packed words of a strided array go through a contiguous copy, byte for byte. */
static void copy_words(char *to, ptrdiff_t to_stride, const char *from, ptrdiff_t from_stride, ptrdiff_t words) {
    for (ptrdiff_t i = 0; i < words; i++) memcpy(to + i * to_stride, from + i * from_stride, 4);
}

/* Where the words of a span begin: a whole word, as every piece but the last holds a multiple of 32 codes. */
static ptrdiff_t first_byte(const span *s, ptrdiff_t group_size, int bits) {
    return s->first_group * group_size * bits / 8;
}

typedef struct quantize_job {
    const qz_plan *plan;
    const qz_quantize_args *args;
    cut cut;
    ptrdiff_t group_size;
} quantize_job;

static void quantize_piece(const quantize_job *j, ptrdiff_t piece) {
    const qz_quantize_args *a = j->args;
    const qz_kernels *kernels = j->plan->kernels;
    const int bits = qz_formats[a->format].bits;
    span s = span_of(&j->cut, piece);
    float w[PIECE], scales[PIECE_GROUPS], biases[PIECE_GROUPS];
    uint8_t packed[PIECE];
    ptrdiff_t w_stride = qz_last_stride(&a->w), word_stride = qz_last_stride(&a->codes),
              count = s.groups * j->group_size;
    const char *from = qz_element(&a->w, a->w.ndim - 1, s.row) + s.first_group * j->group_size * w_stride;
    kernels->load(w, from, w_stride, a->w.type, count);
    qz_quantize_job job = {w, s.groups, j->group_size, packed, scales, biases};
    kernels->format(a->format, a->group_slot)->quantize[a->profile](&job);
    char *words =
        qz_element(&a->codes, a->codes.ndim - 1, s.row) + first_byte(&s, j->group_size, bits) / 4 * word_stride;
    copy_words(words, word_stride, (const char *)packed, 4, count * bits / 32);
    kernels->store(group_at(&a->scales, &s), qz_last_stride(&a->scales), a->scales.type, scales, s.groups);
    kernels->store(group_at(&a->biases, &s), qz_last_stride(&a->biases), a->biases.type, biases, s.groups);
}

static void quantize_pieces(void *context, ptrdiff_t begin, ptrdiff_t end) {
    for (ptrdiff_t piece = begin; piece < end; piece++) quantize_piece(context, piece);
}

qz_status qz_cpu_quantize(const qz_plan *plan, const qz_quantize_args *args, const qz_run *run) {
    quantize_job j = {plan, args, {0}, qz_formats[args->format].group_sizes[args->group_slot]};
    ptrdiff_t rows = qz_count(&args->w, args->w.ndim - 1), groups = qz_last(&args->scales);
    if (rows == 0 || groups == 0) return QZ_OK;
    j.cut = cut_rows(groups, j.group_size);
    return qz_parallel(quantize_pieces, &j, rows * j.cut.pieces_per_row, 4, run);
}

typedef struct dequantize_job {
    const qz_plan *plan;
    const qz_dequantize_args *args;
    cut cut;
    ptrdiff_t group_size;
} dequantize_job;

static void dequantize_piece(const dequantize_job *j, ptrdiff_t piece) {
    const qz_dequantize_args *a = j->args;
    const qz_kernels *kernels = j->plan->kernels;
    const int bits = qz_formats[a->format].bits;
    span s = span_of(&j->cut, piece);
    float w[PIECE], scales[PIECE_GROUPS], biases[PIECE_GROUPS];
    uint8_t packed[PIECE];
    ptrdiff_t w_stride = qz_last_stride(&a->w), word_stride = qz_last_stride(&a->codes),
              count = s.groups * j->group_size;
    const char *words =
        qz_element(&a->codes, a->codes.ndim - 1, s.row) + first_byte(&s, j->group_size, bits) / 4 * word_stride;
    copy_words((char *)packed, 4, words, word_stride, count * bits / 32);
    kernels->load(scales, group_at(&a->scales, &s), qz_last_stride(&a->scales), a->scales.type, s.groups);
    kernels->load(biases, group_at(&a->biases, &s), qz_last_stride(&a->biases), a->biases.type, s.groups);
    qz_type products = a->profile == QZ_PROFILE_CPU ? a->product_type : QZ_F32;
    qz_dequantize_job job = {packed, s.groups, j->group_size, scales, biases, products, w};
    kernels->format(a->format, a->group_slot)->dequantize(&job);
    char *to = qz_element(&a->w, a->w.ndim - 1, s.row) + s.first_group * j->group_size * w_stride;
    kernels->store(to, w_stride, a->w.type, w, count);
}

static void dequantize_pieces(void *context, ptrdiff_t begin, ptrdiff_t end) {
    for (ptrdiff_t piece = begin; piece < end; piece++) dequantize_piece(context, piece);
}

qz_status qz_cpu_dequantize(const qz_plan *plan, const qz_dequantize_args *args, const qz_run *run) {
    dequantize_job j = {plan, args, {0}, qz_formats[args->format].group_sizes[args->group_slot]};
    ptrdiff_t rows = qz_count(&args->codes, args->codes.ndim - 1), groups = qz_last(&args->scales);
    if (rows == 0 || groups == 0) return QZ_OK;
    j.cut = cut_rows(groups, j.group_size);
    return qz_parallel(dequantize_pieces, &j, rows * j.cut.pieces_per_row, 4, run);
}
