#include "weights.h"

#include <string.h>

#include "../half.h"

#include "rows.h"
#include "threads.h"

/* What a product must have to be worth the hand-over to threads that wait, a microsecond, or may have gone to sleep. A
 * hand-over brings some 5 microseconds' work at least, so that of a small product something is left for a thread that
 * comes late, and some 30 at most: weights that follow each other are then long enough for the memory to run ahead. */
static const double worth_sharing = 240000, least_taken = 60000, most_taken = 400000;
enum { SHARES = 16 }; /* of each thread, in between */

ptrdiff_t qz_product_grain(ptrdiff_t pieces, double multiplications, ptrdiff_t threads) {
    const double work = (double)pieces * multiplications, share = work / (SHARES * (double)threads);
    const double taken = share < least_taken ? least_taken : share < most_taken ? share : most_taken;
    if (work < worth_sharing) return pieces;
    if (multiplications >= taken) return 1;
    ptrdiff_t even = (ptrdiff_t)(work / taken);
    if (even > threads) even -= even % threads; /* an odd one would keep the others waiting */
    return (pieces + even - 1) / even;
}

static ptrdiff_t packed_length(const qz_matmul_args *args) {
    return qz_last(&args->scales) * qz_formats[args->format].group_sizes[args->group_slot];
}

ptrdiff_t qz_padded_inputs(const qz_matmul_args *args) {
    return args->transpose ? packed_length(args) : qz_last(&args->x);
}

ptrdiff_t qz_padded_outputs(const qz_matmul_args *args) {
    return args->transpose ? qz_last(&args->y) : packed_length(args);
}

static int batch_is_shared(const qz_array *array) {
    for (int i = 0; i < array->ndim - 2; i++) {
        if (array->shape[i] > 1 && array->strides[i] != 0) return 0;
    }
    return 1;
}

int qz_weights_are_shared(const qz_matmul_args *args) {
    return batch_is_shared(&args->w) && batch_is_shared(&args->scales) && batch_is_shared(&args->biases);
}

int qz_words_are_apart(const qz_array *w) { return qz_last(w) > 1 && qz_last_stride(w) != 4; }

int qz_is_aligned(const qz_array *array) {
    uintptr_t places = (uintptr_t)array->data;
    for (int i = 0; i < array->ndim; i++) places |= (uintptr_t)array->strides[i];
    return places % sizeof(float) == 0;
}

typedef struct words_copy {
    char *to;
    const char *from;
    const qz_array *w;
} words_copy;

static void copy_words(void *context, ptrdiff_t begin, ptrdiff_t end) {
    const words_copy *j = context;
    const ptrdiff_t words = qz_last(j->w), stride = qz_last_stride(j->w), row_stride = j->w->strides[j->w->ndim - 2];
    for (ptrdiff_t r = begin; r < end; r++) {
        qz_copy_words(j->to + r * words * 4, 4, j->from + r * row_stride, stride, words);
    }
}

qz_status qz_point_at_weights(qz_matmul_job *job, const qz_matmul_args *args, ptrdiff_t matrix, char *copy,
                              const qz_run *run) {
    const qz_array *w = &args->w, *scales = &args->scales, *biases = &args->biases;
    const int dims = w->ndim - 2;
    char *data = qz_element(w, dims, matrix);
    ptrdiff_t rows = w->shape[dims], words = qz_last(w);
    job->w = (const uint8_t *)data;
    job->w_row_stride = w->strides[dims];
    job->group_size = qz_formats[args->format].group_sizes[args->group_slot];
    job->scales = (qz_scales){
        qz_element(scales, dims, matrix),
        qz_element(biases, dims, matrix),
        scales->strides[dims],
        scales->strides[dims + 1],
        biases->strides[dims],
        biases->strides[dims + 1],
        scales->type,
        biases->type,
    };
    if (!copy) return QZ_OK;
    job->w = (const uint8_t *)copy;
    job->w_row_stride = words * 4;
    words_copy copying = {copy, data, w};
    return qz_parallel(copy_words, &copying, rows, 16384 / (words + 1) + 1, run);
}

/* A NaN of 0 times infinity is made the one that results carry. */
static void multiply_results(float *y, ptrdiff_t count, float factor) {
    for (ptrdiff_t i = 0; i < count; i++) {
        const float product = y[i] * factor;
        y[i] = product != product ? qz_float_of(0x7fc00000u) : product;
    }
}

void qz_store_results(const qz_kernels *kernels, const qz_matmul_args *args, char *to, float *y, ptrdiff_t count) {
    if (args->factor != 1.0f) multiply_results(y, count, args->factor);
    kernels->store(to, qz_last_stride(&args->y), args->y.type, y, count);
}

void qz_move_to_output(qz_matmul_job *job, const qz_matmul_args *args, ptrdiff_t n) {
    if (args->transpose) {
        job->w += n * job->w_row_stride;
        job->scales.scales += n * job->scales.scale_row_stride;
        job->scales.biases += n * job->scales.bias_row_stride;
    } else {
        const ptrdiff_t group = n / job->group_size;
        job->w += n * qz_formats[args->format].bits / 8;
        job->scales.scales += group * job->scales.scale_group_stride;
        job->scales.biases += group * job->scales.bias_group_stride;
    }
}
