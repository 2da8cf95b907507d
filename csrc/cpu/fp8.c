#include "cpu.h"
#include "rows.h"
#include "threads.h"

/* Elements in one piece of work, and elements that are copied at a time, so few that they stay in L1. */
enum { PIECE = 1 << 16, COPIED = 1 << 12 };

typedef struct job {
    const qz_kernels *kernels;
    const qz_fp8_args *args;
    ptrdiff_t row, pieces_per_row;
} job;

static void encode(const job *j, uint8_t *to, const char *from, ptrdiff_t count) {
    const qz_array *floats = &j->args->floats;
    const ptrdiff_t stride = qz_last_stride(floats);
    float values[COPIED];
    if (qz_is_plain(from, stride, floats->type)) {
        j->kernels->to_fp8(to, from, floats->type, count);
        return;
    }
    j->kernels->load(values, from, stride, floats->type, count);
    j->kernels->to_fp8(to, (const char *)values, QZ_F32, count);
}

static void decode(const job *j, char *to, const uint8_t *from, ptrdiff_t count) {
    const qz_array *floats = &j->args->floats;
    const ptrdiff_t stride = qz_last_stride(floats);
    float values[COPIED];
    if (qz_is_plain(to, stride, floats->type)) {
        j->kernels->from_fp8(to, floats->type, from, count);
        return;
    }
    j->kernels->from_fp8((char *)values, QZ_F32, from, count);
    j->kernels->store(to, stride, floats->type, values, count);
}

/* At most COPIED elements. */
static void convert(const job *j, char *floats, char *codes, ptrdiff_t count) {
    const ptrdiff_t stride = qz_last_stride(&j->args->codes);
    uint8_t copy[COPIED], *bytes = stride == 1 ? (uint8_t *)codes : copy;
    if (j->args->is_decoding) {
        if (bytes == copy) qz_copy_bytes((char *)copy, 1, codes, stride, count);
        decode(j, floats, bytes, count);
    } else {
        encode(j, bytes, floats, count);
        if (bytes == copy) qz_copy_bytes(codes, stride, (const char *)copy, 1, count);
    }
}

static void convert_pieces(void *context, ptrdiff_t begin, ptrdiff_t end) {
    const job *j = context;
    const qz_array *floats = &j->args->floats, *codes = &j->args->codes;
    for (ptrdiff_t piece = begin; piece < end; piece++) {
        const ptrdiff_t first = piece % j->pieces_per_row * PIECE, row = piece / j->pieces_per_row;
        const ptrdiff_t last = j->row - first < PIECE ? j->row : first + PIECE;
        char *from = qz_element(floats, floats->ndim - 1, row), *to = qz_element(codes, codes->ndim - 1, row);
        for (ptrdiff_t i = first; i < last; i += COPIED) {
            const ptrdiff_t count = last - i < COPIED ? last - i : COPIED;
            convert(j, from + i * qz_last_stride(floats), to + i * qz_last_stride(codes), count);
        }
    }
}

qz_status qz_cpu_fp8(const qz_plan *plan, const qz_fp8_args *args, const qz_run *run) {
    qz_fp8_args merged = *args;
    qz_array *const arrays[] = {&merged.floats, &merged.codes};
    qz_merge_axes(arrays, 2);
    const ptrdiff_t rows = qz_count(&merged.codes, merged.codes.ndim - 1), row = qz_last(&merged.codes);
    if (rows == 0 || row == 0) return QZ_OK;
    job j = {plan->kernels, &merged, row, (row + PIECE - 1) / PIECE};
    return qz_parallel(convert_pieces, &j, rows * j.pieces_per_row, PIECE / (row < PIECE ? row : PIECE), run);
}
