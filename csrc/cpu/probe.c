/* The ceilings: the probes of an ISA, on as many threads as a kernel would have and by the same pool. */
#include <string.h>

#include "cpu.h"
#include "threads.h"

/* What is handed out at a time: memory that a thread reads in one go (longer than what the prefetchers need to be up to
 * speed, shorter than what would leave threads waiting at the end), or arithmetic of about 0.1 ms. */
enum { PIECE = 1 << 18, ROUNDS = 1 << 15 };

typedef struct job {
    const qz_probe_kernels *kernels;
    const qz_probe_args *args;
} job;

static void probe_memory(const job *j, ptrdiff_t first, ptrdiff_t size) {
    const qz_probe_args *a = j->args;
    switch (a->what) {
    case QZ_PROBE_READ: j->kernels->read(a->from + first, size); break;
    case QZ_PROBE_COPY: memcpy(a->to + first, a->from + first, (size_t)size); break;
    default: j->kernels->stream(a->to + first, a->from + first, size); break;
    }
}

static void probe_spans(void *context, ptrdiff_t begin, ptrdiff_t end) {
    const job *j = context;
    const ptrdiff_t first = begin * PIECE, size = j->args->size - first;
    probe_memory(j, first, size < (end - begin) * PIECE ? size : (end - begin) * PIECE);
}

static void probe_rounds(void *context, ptrdiff_t begin, ptrdiff_t end) {
    const job *j = context;
    void (*rounds)(ptrdiff_t) = j->args->what == QZ_PROBE_FMA ? j->kernels->fma : j->kernels->dot;
    rounds((end - begin) * ROUNDS);
}

static ptrdiff_t work_of_one(const qz_probe_kernels *kernels, const qz_probe_args *args) {
    switch (args->what) {
    case QZ_PROBE_READ: return args->size;
    case QZ_PROBE_FMA: return ROUNDS * kernels->fma_operations;
    case QZ_PROBE_DOT: return ROUNDS * kernels->dot_operations;
    default: return 2 * args->size;
    }
}

qz_status qz_cpu_probe(const qz_plan *plan, const qz_probe_args *args, const qz_run *run) {
    job j = {&plan->kernels->probe, args};
    const ptrdiff_t pieces = args->size / PIECE + (args->size % PIECE != 0);
    qz_status status = QZ_OK;
    int64_t polled = 0;
    *args->done = (double)work_of_one(j.kernels, args) * (double)args->repeats;
    if (args->what >= QZ_PROBE_FMA) return qz_parallel(probe_rounds, &j, args->repeats, 1, run);
    for (ptrdiff_t i = 0; i < args->repeats && status == QZ_OK; i++) {
        status = qz_parallel(probe_spans, &j, pieces, 1, run);
        if (status == QZ_OK) status = qz_poll_between(run, &polled);
    }
    return status;
}
