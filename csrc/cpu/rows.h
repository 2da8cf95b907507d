/* Walking over strided arrays row by row, where a row is the last axis. */
#ifndef QZ_CPU_ROWS_H
#define QZ_CPU_ROWS_H

#include "../args.h"

/* Number of index tuples of the first `dims` axes. */
static inline ptrdiff_t qz_count(const qz_array *array, int dims) {
    ptrdiff_t count = 1;
    for (int i = 0; i < dims; i++) count *= array->shape[i];
    return count;
}

/* The element whose indices on the first `dims` axes are those of position `index` in C order, and 0 on the others. */
static inline char *qz_element(const qz_array *array, int dims, ptrdiff_t index) {
    char *at = array->data;
    for (int i = dims - 1; i >= 0; i--) {
        at += index % array->shape[i] * array->strides[i];
        index /= array->shape[i];
    }
    return at;
}

static inline ptrdiff_t qz_last(const qz_array *array) { return array->shape[array->ndim - 1]; }
static inline ptrdiff_t qz_last_stride(const qz_array *array) { return array->strides[array->ndim - 1]; }

#endif
