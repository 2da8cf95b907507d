
#include "cpu.h"
#include "rows.h"
#include "threads.h"

/* Elements in one piece of work: large enough to hide its bookkeeping, and what is converted fits L1. */
enum { PIECE = 4096 };

/* Bytes written from which on the stores bypass the caches: several times the L2 of one core. */
static const ptrdiff_t stream_from = (ptrdiff_t)8 << 20;

typedef struct job {
    const qz_kernels *kernels;
    const qz_fake_quantize_args *args;
    ptrdiff_t row, pieces_per_row;
    int stream;
} job;

static void quantize_piece(const job *j, ptrdiff_t piece) {
    const qz_array *x = &j->args->x, *y = &j->args->y;
    ptrdiff_t first = piece % j->pieces_per_row * PIECE, row = piece / j->pieces_per_row;
    ptrdiff_t count = j->row - first < PIECE ? j->row - first : PIECE;
    ptrdiff_t from_stride = qz_last_stride(x), to_stride = qz_last_stride(y);
    const char *from = qz_element(x, x->ndim - 1, row) + first * from_stride;
    char *to = qz_element(y, y->ndim - 1, row) + first * to_stride;
    float values[PIECE];
    int direct_in = x->type == QZ_F32 && from_stride == 4 && (uintptr_t)from % 4 == 0;
    int direct_out = to_stride == 4 && (uintptr_t)to % 4 == 0;
    if (!direct_in) j->kernels->load(values, from, from_stride, x->type, count);
    const float *in = direct_in ? (const float *)from : values;
    float *out = direct_out ? (float *)to : values;
    j->kernels->fake_quantize(out, in, count, j->args->bits, j->stream && direct_out);
    if (!direct_out) j->kernels->store(to, to_stride, QZ_F32, values, count);
}

static void quantize_pieces(void *context, ptrdiff_t begin, ptrdiff_t end) {
    for (ptrdiff_t piece = begin; piece < end; piece++) quantize_piece(context, piece);
}

qz_status qz_cpu_fake_quantize(const qz_plan *plan, const qz_fake_quantize_args *args, const qz_run *run) {
    ptrdiff_t rows = qz_count(&args->x, args->x.ndim - 1), row = qz_last(&args->x);
    if (rows == 0 || row == 0) return QZ_OK;
    job j = {plan->kernels, args, row, (row + PIECE - 1) / PIECE, 0};
    /* In place, the cache line is there already: a plain store writes it once. */
    j.stream = rows * row * 4 >= stream_from && args->x.data != args->y.data;
    return qz_parallel(quantize_pieces, &j, rows * j.pieces_per_row, 16, run);
}
