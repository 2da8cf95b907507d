/* What an operation is called with: plain descriptions of arrays and of the run, shared by every layer below the
   binding. Nothing here allocates or owns memory. */
#ifndef QZ_ARGS_H
#define QZ_ARGS_H

#include <stddef.h>
#include <stdint.h>

enum { QZ_MAX_DIMS = 32 };

/* Memory that a ceiling is measured on comes in multiples of this, so that no probe has a tail to treat. */
enum { QZ_PROBE_BLOCK = 256 };

typedef enum qz_status {
    QZ_OK = 0,
    QZ_NO_MEMORY,   /* scratch could not be allocated; nothing was written */
    QZ_INTERRUPTED, /* qz_run.poll asked to stop; the output is unspecified */
} qz_status;

/* What an array holds. QZ_E8M0 and QZ_E4M3 are how bytes are to be read as scales. */
typedef enum qz_type { QZ_F32, QZ_F16, QZ_BF16, QZ_F64, QZ_U32, QZ_U8, QZ_E8M0, QZ_E4M3 } qz_type;

/* A strided array: strides are in bytes, may be negative or zero, and need no alignment. */
typedef struct qz_array {
    char *data;
    qz_type type;
    int ndim;
    ptrdiff_t shape[QZ_MAX_DIMS];
    ptrdiff_t strides[QZ_MAX_DIMS];
} qz_array;

/* How a call is carried out. */
typedef struct qz_run {
    int threads;         /* at most so many threads, the caller's included; 0: qz_get_num_threads() */
    int (*poll)(void *); /* asked by the calling thread every 20 ms or so; non-zero stops the run; NULL: never asked */
    void *poll_context;
} qz_run;

#endif
