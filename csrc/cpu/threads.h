/* The thread pool: one per process, started by the first call that needs it. */
#ifndef QZ_CPU_THREADS_H
#define QZ_CPU_THREADS_H

#include "../args.h"

enum { QZ_MAX_THREADS = 1024 }; /* larger limits are cut down to this */

/* Does the pieces [begin, end) of a job. Called from several threads at once, never twice for one piece. It must
   neither fork nor exit its thread. */
typedef void (*qz_task)(void *context, ptrdiff_t begin, ptrdiff_t end);

/* Runs task over [0, count), handed out in runs of `grain` consecutive pieces. Pieces are independent: no result may
   depend on which thread did which. Floating-point control state is the default (round to nearest, no flush to zero)
   in every thread while the task runs, and restored afterwards. Returns QZ_OK or QZ_INTERRUPTED.

   Any thread may call it at any time. A call runs in its own thread alone if the pool is busy with another call, or if
   it comes from inside a task; the latter never asks run->poll, which belongs to the thread that called from outside.
   run->poll itself may call qz_parallel and may fork; in the child the call then returns QZ_INTERRUPTED if the pool's
   threads, which the child lacks, had a share in it. */
qz_status qz_parallel(qz_task task, void *context, ptrdiff_t count, ptrdiff_t grain, const qz_run *run);

/* For callers that run many short jobs one after the other, none of which is long enough to ask: asks run->poll if 20
   ms have passed since *since, a time that starts as 0. Returns QZ_OK or QZ_INTERRUPTED. */
qz_status qz_poll_between(const qz_run *run, int64_t *since);

/* The limit used where qz_run.threads is 0. Setting 0 restores the default. Returns the former limit. */
int qz_set_num_threads(int threads);
int qz_get_num_threads(void);

/* Writes in words where the present limit comes from, for show_config(). */
void qz_explain_num_threads(char *text, size_t size);

#endif
