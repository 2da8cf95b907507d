/* Walking over strided arrays row by row, where a row is the last axis. */
#ifndef QZ_CPU_ROWS_H
#define QZ_CPU_ROWS_H

#include <string.h>

#include "../args.h"

/* Bytes written from which on the stores bypass the caches: several times the L2 of one core. */
enum { QZ_STREAM_FROM = 8 << 20 };

/* Number of index tuples of the first `dims` axes. */
static inline ptrdiff_t qz_count(const qz_array *array, int dims) {
    ptrdiff_t count = 1;
    for (int i = 0; i < dims; i++) count *= array->shape[i];
    return count;
}

/* The element whose indices on the first `dims` axes are those of position `index` in C order, and 0 on the others. */
static inline char *qz_element(const qz_array *array, int dims, ptrdiff_t index) {
    char *at = array->data;
    for (int i = dims - 1; i >= 0 && index > 0; i--) { /* small calls feel a division */
        at += index % array->shape[i] * array->strides[i];
        index /= array->shape[i];
    }
    return at;
}

static inline ptrdiff_t qz_last(const qz_array *array) { return array->shape[array->ndim - 1]; }
static inline ptrdiff_t qz_last_stride(const qz_array *array) { return array->strides[array->ndim - 1]; }

/* Whether kernels can read a row as it is: in memory order, and float32 where C allows floats to stand. */
static inline int qz_is_plain(const char *data, ptrdiff_t stride, qz_type type) {
    if (type == QZ_F16 || type == QZ_BF16) return stride == 2;
    return type == QZ_F32 && stride == 4 && (uintptr_t)data % 4 == 0;
}

static inline void qz_drop_axis(qz_array *a, int i) {
    a->ndim--;
    for (; i < a->ndim; i++) {
        a->shape[i] = a->shape[i + 1];
        a->strides[i] = a->strides[i + 1];
    }
}

/* Makes rows as long as they can be: axes of one element go, and axes that continue each other in all arrays are one.
 * The arrays agree in all axes but the last. */
static inline void qz_merge_axes(qz_array *const *arrays, int count) {
    for (int i = arrays[0]->ndim - 2; i >= 0; i--) {
        int alone = 1, continued = 1;
        for (int j = 0; j < count; j++) {
            const qz_array *a = arrays[j];
            alone = alone && a->shape[i + 1] == 1;
            continued = continued && a->strides[i] == a->strides[i + 1] * a->shape[i + 1];
        }
        if (!alone && !continued && arrays[0]->shape[i] != 1) continue;
        for (int j = 0; j < count; j++) {
            qz_array *a = arrays[j];
            if (!alone && a->shape[i] != 1) a->shape[i + 1] *= a->shape[i];
            qz_drop_axis(a, alone ? i + 1 : i);
        }
    }
}

/* Packed words, 4 bytes each, from one strided row to another. */
static inline void qz_copy_words(char *to, ptrdiff_t to_stride, const char *from, ptrdiff_t from_stride,
                                 ptrdiff_t words) {
    if (to_stride == 4 && from_stride == 4) {
        memcpy(to, from, (size_t)words * 4);
        return;
    }
    for (ptrdiff_t i = 0; i < words; i++) memcpy(to + i * to_stride, from + i * from_stride, 4);
}

/* Bytes from one strided row to another. */
static inline void qz_copy_bytes(char *to, ptrdiff_t to_stride, const char *from, ptrdiff_t from_stride,
                                 ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; i++) to[i * to_stride] = from[i * from_stride];
}

#endif
