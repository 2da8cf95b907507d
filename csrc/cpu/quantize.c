/* Both ways between floats and codes: rows are cut into pieces of whole groups, so that one long row is shared by the
 * threads too. Floats, and codes to be decoded, that lie in memory order are used in place; all else goes through
 * copies in L1. */
#include <string.h>

#include "cpu.h"
#include "rows.h"
#include "threads.h"

/* Elements in one piece of work where it goes through a copy, and where it need not. Elements that make it worth
 * handing out: some 10 to 20 microseconds. */
enum { COPIED = 4096, IN_PLACE = 16384, WORTHWHILE = 1 << 16, MIN_GROUP = 16 };

typedef struct span {
    ptrdiff_t row, first_group, groups;
} span;

typedef struct cut {
    ptrdiff_t groups_per_row, groups_per_piece, pieces_per_row;
} cut;

static cut cut_rows(ptrdiff_t groups_per_row, ptrdiff_t group_size, ptrdiff_t piece) {
    cut c = {groups_per_row, piece / group_size, 0};
    c.pieces_per_row = (groups_per_row + c.groups_per_piece - 1) / c.groups_per_piece;
    return c;
}

/* Pieces that are handed out together. */
static ptrdiff_t grain_of(const cut *c, ptrdiff_t group_size) {
    ptrdiff_t groups = c->groups_per_row < c->groups_per_piece ? c->groups_per_row : c->groups_per_piece;
    return WORTHWHILE / (groups * group_size) + 1;
}

static span span_of(const cut *c, ptrdiff_t piece) {
    span s = {piece / c->pieces_per_row, piece % c->pieces_per_row * c->groups_per_piece, c->groups_per_piece};
    if (s.groups > c->groups_per_row - s.first_group) s.groups = c->groups_per_row - s.first_group;
    return s;
}

/* Where the groups of a span begin in an array that holds so many of its elements for each group. */
static char *span_at(const qz_array *array, const span *s, ptrdiff_t per_group) {
    return qz_element(array, array->ndim - 1, s->row) + s->first_group * per_group * qz_last_stride(array);
}

/* The same in an array of words: every piece but the last of a row holds a multiple of 32 codes. */
static char *words_at(const qz_array *codes, const span *s, ptrdiff_t group_bits) {
    return qz_element(codes, codes->ndim - 1, s->row) + s->first_group * group_bits / 32 * qz_last_stride(codes);
}

/* Rows of groups become one long row where all arrays allow it: a group may end within a word, but no row does. A row
 * of floats may end within a group, whose other codes are padding. */
static void merge_rows(qz_array *floats, qz_array *codes, qz_array *scales, qz_array *biases, ptrdiff_t group_size) {
    qz_array *const arrays[] = {floats, codes, scales, biases};
    if (qz_last(floats) == qz_last(scales) * group_size) qz_merge_axes(arrays, 4);
}

/* How many floats of a row the groups of a span hold, padding left out. */
static ptrdiff_t floats_of(const qz_array *floats, const span *s, ptrdiff_t group_size) {
    const ptrdiff_t left = qz_last(floats) - s->first_group * group_size, held = s->groups * group_size;
    return left < held ? left : held;
}

/* ---- quantize ---- */

typedef struct quantize_job {
    const qz_kernels *kernels;
    void (*quantize)(const qz_quantize_job *);
    qz_quantize_args args;
    cut cut;
    ptrdiff_t group_size, group_bits;
} quantize_job;

static void quantize_piece(const quantize_job *j, ptrdiff_t piece) {
    const qz_quantize_args *a = &j->args;
    const span s = span_of(&j->cut, piece);
    float copy[COPIED], scales[COPIED / MIN_GROUP], biases[COPIED / MIN_GROUP];
    uint8_t packed[COPIED + QZ_SPILL], scale_codes[COPIED / MIN_GROUP];
    const char *w = span_at(&a->w, &s, j->group_size);
    const ptrdiff_t stride = qz_last_stride(&a->w), count = floats_of(&a->w, &s, j->group_size);
    const ptrdiff_t padding = s.groups * j->group_size - count;
    const ptrdiff_t step = stride > 0 && stride <= 8 ? stride : 0;
    qz_quantize_job job = {
        .w = w,
        .w_type = a->w.type,
        .next = w + count * step,
        .step = step,
        .groups = s.groups,
        .group_size = j->group_size,
        .packed = packed,
        .scales = scales,
        .biases = biases,
        .scale_codes = scale_codes,
        .mx_scale = a->mx_scale,
        .round_to = a->w.type == QZ_F64 ? QZ_F32 : a->w.type,
        .encode_factor = 2688.0f / a->global_scale,
    };
    if (padding || !qz_is_plain(w, stride, a->w.type)) {
        j->kernels->load(copy, w, stride, a->w.type, count);
        memset(copy + count, 0, (size_t)padding * sizeof *copy);
        job.w = (const char *)copy;
        job.w_type = QZ_F32;
    }
    j->quantize(&job);
    char *words = words_at(&a->codes, &s, j->group_bits);
    qz_copy_words(words, qz_last_stride(&a->codes), (const char *)packed, 4, s.groups * j->group_bits / 32);
    char *const to = span_at(&a->scales, &s, 1);
    if (a->scales.type == QZ_U8) {
        qz_copy_bytes(to, qz_last_stride(&a->scales), (const char *)scale_codes, 1, s.groups);
        return;
    }
    j->kernels->store(to, qz_last_stride(&a->scales), a->scales.type, scales, s.groups);
    j->kernels->store(span_at(&a->biases, &s, 1), qz_last_stride(&a->biases), a->biases.type, biases, s.groups);
}

static void quantize_pieces(void *context, ptrdiff_t begin, ptrdiff_t end) {
    for (ptrdiff_t piece = begin; piece < end; piece++) quantize_piece(context, piece);
}

qz_status qz_cpu_quantize(const qz_plan *plan, const qz_quantize_args *args, const qz_run *run) {
    const qz_format *format = &qz_formats[args->format];
    quantize_job j = {.kernels = plan->kernels, .args = *args};
    j.quantize = plan->kernels->format(args->format, args->group_slot)->quantize[args->profile];
    j.group_size = format->group_sizes[args->group_slot];
    j.group_bits = j.group_size * format->bits;
    merge_rows(&j.args.w, &j.args.codes, &j.args.scales, &j.args.biases, j.group_size);
    ptrdiff_t rows = qz_count(&j.args.w, j.args.w.ndim - 1), groups = qz_last(&j.args.scales);
    if (rows == 0 || groups == 0) return QZ_OK;
    j.cut = cut_rows(groups, j.group_size, COPIED);
    return qz_parallel(quantize_pieces, &j, rows * j.cut.pieces_per_row, grain_of(&j.cut, j.group_size), run);
}

/* ---- dequantize ---- */

typedef struct dequantize_job {
    const qz_kernels *kernels;
    void (*dequantize)(const qz_dequantize_job *);
    qz_dequantize_args args;
    cut cut;
    ptrdiff_t group_size, group_bits;
    int in_place, stream;
} dequantize_job;

/* Whether a row lies in memory order. */
static int is_adjacent(const qz_array *array) {
    return qz_last_stride(array) == (array->type == QZ_F32 || array->type == QZ_U32 ? 4 : 2);
}

/* The kernel's job but for the places of codes and results. */
static qz_dequantize_job load_scales(const dequantize_job *j, const span *s, float *scales, float *biases,
                                     uint8_t *scale_codes) {
    const qz_dequantize_args *a = &j->args;
    const qz_type products = a->profile == QZ_PROFILE_CPU ? a->product_type : QZ_F32;
    qz_dequantize_job job = {
        .groups = s->groups,
        .group_size = j->group_size,
        .scales = scales,
        .biases = biases,
        .scale_codes = scale_codes,
        .decode_factor = a->global_scale / 2688.0f,
        .round_products_to = products,
        .w_type = QZ_F32,
    };
    const char *from = span_at(&a->scales, s, 1);
    if (a->scales.type == QZ_U8) {
        qz_copy_bytes((char *)scale_codes, 1, from, qz_last_stride(&a->scales), s->groups);
        return job;
    }
    j->kernels->load(scales, from, qz_last_stride(&a->scales), a->scales.type, s->groups);
    j->kernels->load(biases, span_at(&a->biases, s, 1), qz_last_stride(&a->biases), a->biases.type, s->groups);
    return job;
}

static void dequantize_in_place(const dequantize_job *j, const span *s) {
    const qz_dequantize_args *a = &j->args;
    float scales[IN_PLACE / MIN_GROUP], biases[IN_PLACE / MIN_GROUP];
    uint8_t scale_codes[IN_PLACE / MIN_GROUP];
    qz_dequantize_job job = load_scales(j, s, scales, biases, scale_codes);
    job.packed = (const uint8_t *)words_at(&a->codes, s, j->group_bits);
    job.w = span_at(&a->w, s, j->group_size);
    job.w_type = a->w.type;
    job.stream = j->stream && (uintptr_t)job.w % 16 == 0;
    j->dequantize(&job);
}

static void dequantize_copied(const dequantize_job *j, const span *s) {
    const qz_dequantize_args *a = &j->args;
    float w[COPIED], scales[COPIED / MIN_GROUP], biases[COPIED / MIN_GROUP];
    uint8_t packed[COPIED], scale_codes[COPIED / MIN_GROUP];
    const char *words = words_at(&a->codes, s, j->group_bits);
    qz_dequantize_job job = load_scales(j, s, scales, biases, scale_codes);
    qz_copy_words((char *)packed, 4, words, qz_last_stride(&a->codes), s->groups * j->group_bits / 32);
    job.packed = packed;
    job.w = (char *)w;
    j->dequantize(&job);
    j->kernels->store(span_at(&a->w, s, j->group_size), qz_last_stride(&a->w), a->w.type, w,
                      floats_of(&a->w, s, j->group_size));
}

/* All in place but for a group that w holds only the beginning of. */
static void dequantize_span(const dequantize_job *j, span s) {
    const span last = {s.row, s.first_group + s.groups - 1, 1};
    const int is_padded = floats_of(&j->args.w, &last, j->group_size) < j->group_size;
    s.groups -= is_padded;
    if (s.groups > 0) dequantize_in_place(j, &s);
    if (is_padded) dequantize_copied(j, &last);
}

static void dequantize_pieces(void *context, ptrdiff_t begin, ptrdiff_t end) {
    const dequantize_job *j = context;
    for (ptrdiff_t piece = begin; piece < end; piece++) {
        const span s = span_of(&j->cut, piece);
        if (j->in_place) {
            dequantize_span(j, s);
        } else {
            dequantize_copied(j, &s);
        }
    }
}

qz_status qz_cpu_dequantize(const qz_plan *plan, const qz_dequantize_args *args, const qz_run *run) {
    const qz_format *format = &qz_formats[args->format];
    dequantize_job j = {.kernels = plan->kernels, .args = *args};
    j.dequantize = plan->kernels->format(args->format, args->group_slot)->dequantize;
    j.group_size = format->group_sizes[args->group_slot];
    j.group_bits = j.group_size * format->bits;
    merge_rows(&j.args.w, &j.args.codes, &j.args.scales, &j.args.biases, j.group_size);
    ptrdiff_t rows = qz_count(&j.args.codes, j.args.codes.ndim - 1), groups = qz_last(&j.args.scales);
    if (rows == 0 || groups == 0) return QZ_OK;
    j.in_place = is_adjacent(&j.args.w) && is_adjacent(&j.args.codes);
    j.cut = cut_rows(groups, j.group_size, j.in_place ? IN_PLACE : COPIED);
    j.stream = rows * groups * j.group_size * (args->w.type == QZ_F32 ? 4 : 2) >= QZ_STREAM_FROM;
    return qz_parallel(dequantize_pieces, &j, rows * j.cut.pieces_per_row, grain_of(&j.cut, j.group_size), run);
}
