
#include "cpu.h"
#include "rows.h"
#include "threads.h"

/* Elements in one piece of work, so many that the fence after its streaming stores costs nothing, and elements
 * converted at a time, so few that they stay in L1. */
enum { PIECE = 1 << 16, CONVERTED = 1 << 12 };

/* Bytes written from which on the stores bypass the caches: several times the L2 of one core. */
static const ptrdiff_t stream_from = (ptrdiff_t)8 << 20;

typedef struct job {
    const qz_kernels *kernels;
    const qz_fake_quantize_args *args;
    ptrdiff_t row, pieces_per_row;
    int stream;
} job;

/* Float32 in memory order on both sides needs no copy. */
static int is_direct(const char *data, ptrdiff_t stride, qz_type type) {
    return type == QZ_F32 && stride == 4 && (uintptr_t)data % 4 == 0;
}

static void quantize_converted(const job *j, const char *from, char *to, ptrdiff_t count) {
    const qz_array *x = &j->args->x, *y = &j->args->y;
    ptrdiff_t from_stride = qz_last_stride(x), to_stride = qz_last_stride(y);
    float values[CONVERTED];
    for (ptrdiff_t i = 0; i < count; i += CONVERTED) {
        ptrdiff_t n = count - i < CONVERTED ? count - i : CONVERTED;
        j->kernels->load(values, from + i * from_stride, from_stride, x->type, n);
        j->kernels->fake_quantize(values, values, n, j->args->bits, 0);
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
    if (is_direct(from, from_stride, x->type) && is_direct(to, to_stride, QZ_F32)) {
        j->kernels->fake_quantize((float *)to, (const float *)from, count, j->args->bits, j->stream);
    } else {
        quantize_converted(j, from, to, count);
    }
}

/* Whether axis i of an array continues axis i + 1, so that both can be walked as one. */
static int continues(const qz_array *a, int i) { return a->strides[i] == a->strides[i + 1] * a->shape[i + 1]; }

static void drop_axis(qz_array *a, int i) {
    a->ndim--;
    for (; i < a->ndim; i++) {
        a->shape[i] = a->shape[i + 1];
        a->strides[i] = a->strides[i + 1];
    }
}

/* Makes rows as long as they can be: axes of one element go, and axes that continue each other in both arrays are one.
 */
static void merge_axes(qz_array *x, qz_array *y) {
    for (int i = x->ndim - 2; i >= 0; i--) {
        if (x->shape[i + 1] == 1 || x->shape[i] == 1) {
            int gone = x->shape[i + 1] == 1 ? i + 1 : i;
            drop_axis(x, gone);
            drop_axis(y, gone);
        } else if (continues(x, i) && continues(y, i)) {
            x->shape[i + 1] *= x->shape[i];
            y->shape[i + 1] = x->shape[i + 1];
            drop_axis(x, i);
            drop_axis(y, i);
        }
    }
}

static void quantize_pieces(void *context, ptrdiff_t begin, ptrdiff_t end) {
    for (ptrdiff_t piece = begin; piece < end; piece++) quantize_piece(context, piece);
}

qz_status qz_cpu_fake_quantize(const qz_plan *plan, const qz_fake_quantize_args *args, const qz_run *run) {
    qz_fake_quantize_args merged = *args;
    merge_axes(&merged.x, &merged.y);
    ptrdiff_t rows = qz_count(&merged.x, merged.x.ndim - 1), row = qz_last(&merged.x);
    if (rows == 0 || row == 0) return QZ_OK;
    job j = {plan->kernels, &merged, row, (row + PIECE - 1) / PIECE, 0};
    /* In place, the cache line is there already: a plain store writes it once. */
    j.stream = rows * row * 4 >= stream_from && args->x.data != args->y.data;
    ptrdiff_t grain = PIECE / (row < PIECE ? row : PIECE);
    return qz_parallel(quantize_pieces, &j, rows * j.pieces_per_row, grain, run);
}
