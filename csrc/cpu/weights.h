/* The weight matrices of a product, as both classes of matmul hand them to kernels. */
#ifndef QZ_CPU_WEIGHTS_H
#define QZ_CPU_WEIGHTS_H

#include "cpu.h"

/* Whether there are too few rows of x for panels, or lines, to pay in the exact class. */
static inline int qz_is_few(const qz_format_kernels *kernels, ptrdiff_t rows, int digits) {
    return rows < kernels->min_prefill[digits - 1];
}

/* How many pieces of work, each of so many multiplications, a thread should take at a time. */
ptrdiff_t qz_product_grain(ptrdiff_t pieces, double multiplications, ptrdiff_t threads);

/* K and N of the weights: whole groups, of which x or y may hold fewer by less than a group. */
ptrdiff_t qz_padded_inputs(const qz_matmul_args *args);
ptrdiff_t qz_padded_outputs(const qz_matmul_args *args);

/* Whether one matrix serves the whole batch. */
int qz_weights_are_shared(const qz_matmul_args *args);

/* Whether words of a row are not contiguous, so that kernels read a copy. */
int qz_words_are_apart(const qz_array *w);

/* Whether every float32 of the array stands where C allows a float to stand. */
int qz_is_aligned(const qz_array *array);

/* Sets the job's weights, scales and group size to those of one matrix of the batch; fills `copy` with its words first,
 * and points there, if that is not NULL. */
qz_status qz_point_at_weights(qz_matmul_job *job, const qz_matmul_args *args, ptrdiff_t matrix, char *copy,
                              const qz_run *run);

/* Writes some results of one row of y, times the product's factor, from `y` on. */
void qz_store_results(const qz_kernels *kernels, const qz_matmul_args *args, char *to, float *y, ptrdiff_t count);

/* Moves the places of weights and scales on by n outputs, whole groups of them where groups run along n. */
void qz_move_to_output(qz_matmul_job *job, const qz_matmul_args *args, ptrdiff_t n);

#endif
