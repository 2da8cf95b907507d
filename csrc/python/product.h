/* What products with packed weights share, gathered ones among them. */
#ifndef QZ_PYTHON_PRODUCT_H
#define QZ_PYTHON_PRODUCT_H

#include "binding.h"

/* The arguments of a product by name; stored: w, scales and, of the affine family, biases. */
typedef struct product_arguments {
    PyObject *x, *const *stored, *output_features;
    PyObject *group_size, *bits; /* affine */
    PyObject *global_scale;      /* fp */
    PyObject *accumulate, *activations, *out;
    int transpose;
} product_arguments;

typedef struct product_views {
    view x, w, scales, biases, y;
    PyObject *result;
} product_views;

/* Takes w, scales and biases, and how they are packed as far as it is known; sets with what all results are multiplied.
 * The fp family has no biases: its scales stand in for them, and nobody reads them as such. 0 or -1. */
int qz_take_weights(const call *c, const product_arguments *a, const char *mode, product_views *v, packing *p,
                    float *factor);

/* K and N, checked against each other: what x, w and output_features say; x is a matrix. Returns the row of
 * formats.def, or -1 with ValueError set. */
int qz_check_sizes(const call *c, const product_arguments *a, const char *mode, const product_views *v, packing *p,
                   int *slot, ptrdiff_t *outputs);

/* The digits of x that count (csrc/kernels/fixed_point.h), 0 for plain float32; -1 with an exception set. */
int qz_take_digits(const call *c, const product_arguments *a, const char *mode, const qz_array *x);

/* The result, of this shape: the batch, then [M, N], without M if x was a vector. 0 or -1. */
int qz_take_product_result(product_views *v, const call *c, PyObject *out, int dims, const ptrdiff_t *batch,
                           int is_vector, ptrdiff_t outputs);

/* Makes an array's vectors matrices of one row. */
void qz_insert_row_axis(qz_array *array);

#endif
