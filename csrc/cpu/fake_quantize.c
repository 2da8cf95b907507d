#include "cpu.h"
#include "rows.h"
#include "threads.h"

/* Elements in one piece of work, so many that the fence after its streaming stores costs nothing, and elements
 * converted at a time, so few that they stay in L1. */
enum { PIECE = 1 << 16, CONVERTED = 1 << 12 };

typedef struct job {
    const qz_kernels *kernels;
    const qz_fake_quantize_args *args;
    ptrdiff_t row, pieces_per_row;
    int stream;
} job;

static void quantize_converted(const job *j, const char *from, char *to, ptrdiff_t count) {
    const qz_array *x = &j->args->x, *y = &j->args->y;
    ptrdiff_t from_stride = qz_last_stride(x), to_stride = qz_last_stride(y);
    float values[CONVERTED];
    for (ptrdiff_t i = 0; i < count; i += CONVERTED) {
        ptrdiff_t n = count - i < CONVERTED ? count - i : CONVERTED;
        j->kernels->load(values, from + i * from_stride, from_stride, x->type, n);
        j->kernels->fake_quantize(values, (const char *)values, QZ_F32, n, j->args->bits, 0);
        j->kernels->store(to + i * to_stride, to_stride, QZ_F32, values, n);
    }
}

static void quantize_piece(const job *j, ptrdiff_t piece) {
    const qz_array *x = &j->args->x, *y = &j->args->y;
    ptrdiff_t first = piece % j->pieces_per_row * PIECE, row = piece / j->pieces_per_row;
    ptrdiff_t count = j->row - first < PIECE ? j->row - first : PIECE;
    ptrdiff_t from_stride = qz_last_stride(x), to_stride = qz_last_stride(y);
    const char *from = qz_element(x, x->ndim - 1, row) + first * from_stride;
    char *to = qz_element(y, y->ndim - 1, row) + first * to_stride;
    if (qz_is_plain(from, from_stride, x->type) && qz_is_plain(to, to_stride, QZ_F32)) {
        j->kernels->fake_quantize((float *)to, from, x->type, count, j->args->bits, j->stream);
    } else {
        quantize_converted(j, from, to, count);
    }
}

static void quantize_pieces(void *context, ptrdiff_t begin, ptrdiff_t end) {
    for (ptrdiff_t piece = begin; piece < end; piece++) quantize_piece(context, piece);
}

qz_status qz_cpu_fake_quantize(const qz_plan *plan, const qz_fake_quantize_args *args, const qz_run *run) {
    qz_fake_quantize_args merged = *args;
    qz_array *const arrays[] = {&merged.x, &merged.y};
    qz_merge_axes(arrays, 2);
    ptrdiff_t rows = qz_count(&merged.x, merged.x.ndim - 1), row = qz_last(&merged.x);
    if (rows == 0 || row == 0) return QZ_OK;
    job j = {plan->kernels, &merged, row, (row + PIECE - 1) / PIECE, 0};
    /* In place, the cache line is there already: a plain store writes it once. */
    j.stream = rows * row * 4 >= QZ_STREAM_FROM && args->x.data != args->y.data;
    ptrdiff_t grain = PIECE / (row < PIECE ? row : PIECE);
    return qz_parallel(quantize_pieces, &j, rows * j.pieces_per_row, grain, run);
}
