/* How a call meets the workers. All they share is `seats`: its upper half counts the places for workers that the
   current job still offers, its lower half the workers that sit in it. The caller opens the seats, works itself, takes
   back the seats that nobody took, and waits for those who sit. A worker that wakes too late finds no seat and has no
   part in the job, so that a short job never waits for a slow wake-up. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* CLOCK_MONOTONIC_COARSE */
#endif

#include "threads.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <time.h>

#include "cpu_count.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

enum {
    CACHE_LINE = 128, /* Apple's; x86-64 fetches its 64-byte lines in pairs */
    POLL_NS = 20 * 1000 * 1000,
    /* Waiting threads spin for so long before they park: several times what a wake-up costs (about 20 us), and more
       than the Python code between two operations usually takes. */
    SPIN_NS = 100 * 1000,
    SPINS_PER_CLOCK = 32,
    STACK_SIZE = 2 << 20, /* glibc's default follows `ulimit -s`, macOS gives 512 KiB, musl 128 KiB */
    SEAT = 1 << 16,       /* one open seat in `seats` */
    SITTING = SEAT - 1,   /* mask of its lower half */
};

typedef struct qz_job {
    qz_task task;
    void *context;
    ptrdiff_t count, grain, runs;
    _Alignas(CACHE_LINE) atomic_ptrdiff_t next; /* the next run of pieces to hand out */
} qz_job;

static struct {
    _Alignas(CACHE_LINE) atomic_uint seats;
    _Alignas(CACHE_LINE) atomic_int sleepers;
    atomic_int spinners;
    atomic_int owned; /* set while one caller has the pool; job and workers are its own to change */
    qz_job *job;
    int workers;
    int forks;       /* how often the process has become a child */
    atomic_int cpus; /* that can run at once; 0: not yet known */
    atomic_bool caller_parked;
    pthread_mutex_t mutex;     /* only for parking */
    pthread_cond_t work, done; /* seats were opened; the last sitting worker rose */
} pool;

static pthread_once_t pool_once = PTHREAD_ONCE_INIT;
static _Thread_local bool in_task;

static int64_t nanoseconds(clockid_t clock) {
    struct timespec time;
    clock_gettime(clock, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* For the 20 ms of polling, a clock that is 1 to 10 ms behind does, at a fifth of the price. */
static int64_t coarse_time(void) {
#ifdef __APPLE__
    return nanoseconds(CLOCK_MONOTONIC_RAW_APPROX);
#else
    return nanoseconds(CLOCK_MONOTONIC_COARSE);
#endif
}

static void relax(void) {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory"); /* `yield` is a no-op on most cores; this takes about as long as pause */
#endif
}

/* ---- The task's surroundings ---- */

#if defined(__x86_64__)
typedef unsigned fp_control;
enum { FP_DEFAULT = 0x1f80 }; /* MXCSR: all exceptions masked, round to nearest, no FTZ, no DAZ */

static fp_control get_fp_control(void) { return _mm_getcsr(); }

static void set_fp_control(fp_control control) { _mm_setcsr(control); }
#elif defined(__aarch64__)
typedef uint64_t fp_control;
enum { FP_DEFAULT = 0 }; /* FPCR: no traps, round to nearest, no FZ, IEEE half precision */

static fp_control get_fp_control(void) {
    fp_control control;
    __asm__ volatile("mrs %0, fpcr" : "=r"(control));
    return control;
}

static void set_fp_control(fp_control control) { __asm__ volatile("msr fpcr, %0" ::"r"(control) : "memory"); }
#endif

typedef struct surroundings {
    fp_control control;
    bool in_task;
} surroundings;

static surroundings enter_task(void) {
    const surroundings outside = {get_fp_control(), in_task};
    if (outside.control != FP_DEFAULT) set_fp_control(FP_DEFAULT);
    in_task = true;
    return outside;
}

/* The status flags that a task raises in MXCSR go with the rest of it: callers see no trace of where a piece ran. */
static void leave_task(surroundings outside) {
    if (get_fp_control() != outside.control) set_fp_control(outside.control);
    in_task = outside.in_task;
}

/* Does runs of pieces until none is left (false), or, if `polls`, until it is time to ask run->poll (true). */
static bool do_pieces(qz_job *job, bool polls) {
    const surroundings outside = enter_task();
    const int64_t start = polls ? coarse_time() : 0;
    bool late = false;
    while (!late) {
        const ptrdiff_t run = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed);
        if (run >= job->runs) break;
        const ptrdiff_t begin = run * job->grain, left = job->count - begin;
        job->task(job->context, begin, begin + (left < job->grain ? left : job->grain));
        late = polls && coarse_time() - start >= POLL_NS;
    }
    leave_task(outside);
    return late;
}

/* From here on nobody gets a run of pieces. */
static void stop_job(qz_job *job) { atomic_store_explicit(&job->next, job->runs, memory_order_relaxed); }

/* ---- Workers ---- */

static bool sit_down(void) {
    unsigned seats = atomic_load(&pool.seats);
    while (seats >= SEAT)
        if (atomic_compare_exchange_weak(&pool.seats, &seats, seats - SEAT + 1)) return true;
    return false;
}

static void stand_up(void) {
    /* Both sides of this handshake are sequentially consistent: either we see that the caller parked, or it sees that
       we rose. */
    const unsigned seats = atomic_fetch_sub(&pool.seats, 1);
    if ((seats & SITTING) != 1 || !atomic_load(&pool.caller_parked)) return;
    pthread_mutex_lock(&pool.mutex);
    pthread_mutex_unlock(&pool.mutex);
    pthread_cond_signal(&pool.done);
}

/* Wakes up to two parked workers for seats that the spinning ones will not fill. Each wakes two more, so that n threads
   are up after log2(n) wake-ups. None is overlooked: who stops spinning looks for a seat once more before it parks,
   and has by then counted itself as a sleeper. */
static void wake_workers(void) {
    const int open = (int)(atomic_load(&pool.seats) / SEAT) - atomic_load(&pool.spinners);
    const int sleepers = atomic_load(&pool.sleepers);
    const int missing = open < sleepers ? open : sleepers;
    if (missing <= 0) return;
    pthread_mutex_lock(&pool.mutex);
    pthread_mutex_unlock(&pool.mutex);
    pthread_cond_signal(&pool.work);
    if (missing > 1) pthread_cond_signal(&pool.work);
}

/* Waits for a seat, spinning. At most one thread fewer spins than there are CPUs, so that the caller always has one. */
static bool spin_for_seat(void) {
    bool seated = false;
    if (atomic_fetch_add(&pool.spinners, 1) < atomic_load(&pool.cpus) - 1) {
        const int64_t start = nanoseconds(CLOCK_MONOTONIC);
        do
            for (int i = 0; i < SPINS_PER_CLOCK && !seated; i++) {
                relax();
                seated = sit_down();
            }
        while (!seated && nanoseconds(CLOCK_MONOTONIC) - start < SPIN_NS);
    }
    atomic_fetch_sub(&pool.spinners, 1);
    return seated;
}

static void park_until_seated(void) {
    pthread_mutex_lock(&pool.mutex);
    atomic_fetch_add(&pool.sleepers, 1);
    while (!sit_down()) pthread_cond_wait(&pool.work, &pool.mutex);
    atomic_fetch_sub(&pool.sleepers, 1);
    pthread_mutex_unlock(&pool.mutex);
    wake_workers();
}

static void *worker_main(void *unused) {
    for (;;) {
        if (!spin_for_seat()) park_until_seated();
        do_pieces(pool.job, false);
        stand_up();
    }
    return unused;
}

/* ---- The pool ---- */

static void prepare_parking(void) {
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
#ifndef __APPLE__
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
#endif
    pthread_mutex_init(&pool.mutex, NULL);
    pthread_cond_init(&pool.work, NULL);
    pthread_cond_init(&pool.done, &attributes);
    pthread_condattr_destroy(&attributes);
}

/* A child has only the thread that forked. Whatever state the pool was in, it becomes one without workers, free for
   the next call to build up. */
static void forget_workers(void) {
    prepare_parking();
    pool.forks++;
    pool.workers = 0;
    atomic_store(&pool.seats, 0);
    atomic_store(&pool.cpus, 0); /* children are often given another affinity */
    atomic_store(&pool.sleepers, 0);
    atomic_store(&pool.spinners, 0);
    atomic_store(&pool.caller_parked, false);
    atomic_store(&pool.owned, 0);
}

static void prepare_pool(void) {
    prepare_parking();
    pthread_atfork(NULL, NULL, forget_workers);
}

/* Starts workers until there are `wanted`, or as many as the system gives. */
static void hire(int wanted) {
    if (pool.workers >= wanted) return;
    if (atomic_load(&pool.cpus) == 0) {
        const qz_cpus cpus = qz_count_cpus("");
        atomic_store(&pool.cpus, qz_parallel_cpus(&cpus));
    }
    /* Signals are for the program's own threads: Python handles SIGINT in its main thread. Faults stay deliverable,
       so that whatever reports crashes sees ours. */
    static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS, SIGABRT};
    sigset_t blocked, former;
    sigfillset(&blocked);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) sigdelset(&blocked, faults[i]);
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0) return;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK_SIZE);
    pthread_sigmask(SIG_SETMASK, &blocked, &former);
    pthread_t thread;
    while (pool.workers < wanted && pthread_create(&thread, &attributes, worker_main, NULL) == 0) pool.workers++;
    pthread_sigmask(SIG_SETMASK, &former, NULL);
    pthread_attr_destroy(&attributes);
}

/* Offers the job to `wanted` workers. False if they all are someone else's, or cannot be had: the caller is alone. */
static bool share_job(qz_job *job, int wanted) {
    pthread_once(&pool_once, prepare_pool);
    if (atomic_exchange(&pool.owned, 1) != 0) return false;
    hire(wanted);
    const int seats = wanted < pool.workers ? wanted : pool.workers;
    if (seats == 0) {
        atomic_store(&pool.owned, 0);
        return false;
    }
    pool.job = job;
    atomic_store(&pool.seats, (unsigned)seats * SEAT);
    wake_workers();
    return true;
}

/* Waits until the last worker rises, with `polls` for 20 ms at most. True if it did. */
static bool park_until_done(bool polls) {
    pthread_mutex_lock(&pool.mutex);
    atomic_store(&pool.caller_parked, true);
    int timed_out = 0;
    bool done;
    while (!(done = atomic_load(&pool.seats) == 0) && !timed_out) {
        if (!polls) {
            pthread_cond_wait(&pool.done, &pool.mutex);
            continue;
        }
#ifdef __APPLE__
        const struct timespec slice = {0, POLL_NS};
        timed_out = pthread_cond_timedwait_relative_np(&pool.done, &pool.mutex, &slice);
#else
        const int64_t end = nanoseconds(CLOCK_MONOTONIC) + POLL_NS;
        const struct timespec until = {(time_t)(end / 1000000000), (long)(end % 1000000000)};
        timed_out = pthread_cond_timedwait(&pool.done, &pool.mutex, &until);
#endif
    }
    atomic_store(&pool.caller_parked, false);
    pthread_mutex_unlock(&pool.mutex);
    return done;
}

static bool spin_until_done(void) {
    if ((int)atomic_load(&pool.seats) >= atomic_load(&pool.cpus)) return false; /* the workers need our CPU */
    const int64_t start = nanoseconds(CLOCK_MONOTONIC);
    do
        for (int i = 0; i < SPINS_PER_CLOCK; i++) {
            if (atomic_load(&pool.seats) == 0) return true;
            relax();
        }
    while (nanoseconds(CLOCK_MONOTONIC) - start < SPIN_NS);
    return false;
}

/* Asks run->poll, and ends the job if it says so. False if there is nobody left to wait for: the poll forked, and this
   is the child. */
static bool ask(qz_job *job, const qz_run *run, qz_status *status) {
    const int forks = pool.forks;
    if (run->poll(run->poll_context) != 0) {
        stop_job(job);
        *status = QZ_INTERRUPTED;
    }
    return pool.forks == forks;
}

/* The caller's part in a job that workers share, after it found no more pieces or a poll ended it: takes the empty
   seats back, waits for the workers and frees the pool. */
static qz_status finish_job(qz_job *job, const qz_run *run, bool polls, qz_status status) {
    atomic_fetch_and(&pool.seats, SITTING);
    if (!spin_until_done())
        while (!park_until_done(polls && status == QZ_OK))
            if (!ask(job, run, &status)) return QZ_INTERRUPTED;
    atomic_store(&pool.owned, 0);
    return status;
}

qz_status qz_parallel(qz_task task, void *context, ptrdiff_t count, ptrdiff_t grain, const qz_run *run) {
    if (count <= 0) return QZ_OK;
    if (grain < 1) grain = 1;
    if (count <= grain) { /* for small calls: nothing to share, nothing to ask between */
        const surroundings outside = enter_task();
        task(context, 0, count);
        leave_task(outside);
        return QZ_OK;
    }
    qz_job job = {.task = task, .context = context, .count = count, .grain = grain};
    job.runs = count / grain + (count % grain != 0);

    bool shared = false;
    if (!in_task && run->threads != 1) {
        ptrdiff_t threads = run->threads > 0 ? run->threads : qz_get_num_threads();
        threads = threads < QZ_MAX_THREADS ? threads : QZ_MAX_THREADS;
        threads = threads < job.runs ? threads : job.runs;
        shared = threads > 1 && share_job(&job, (int)threads - 1);
    }
    const bool polls = run->poll && !in_task;
    qz_status status = QZ_OK;
    while (status == QZ_OK && do_pieces(&job, polls))
        if (!ask(&job, run, &status) && shared) return QZ_INTERRUPTED;
    return shared ? finish_job(&job, run, polls, status) : status;
}

qz_status qz_poll_between(const qz_run *run, int64_t *since) {
    if (!run->poll || in_task) return QZ_OK;
    const int64_t now = coarse_time();
    if (*since == 0) *since = now;
    if (now - *since < POLL_NS) return QZ_OK;
    *since = now;
    return run->poll(run->poll_context) == 0 ? QZ_OK : QZ_INTERRUPTED;
}

/* ---- The limit ---- */

static atomic_int chosen_limit;  /* 0: none was set */
static atomic_int default_limit; /* 0: not yet found out; two threads that do so at once find the same */

static int present_default(void) {
    int limit = atomic_load(&default_limit);
    if (limit == 0) {
        const qz_cpus cpus = qz_count_cpus("");
        limit = qz_default_threads(&cpus, NULL, 0);
        atomic_store(&default_limit, limit);
    }
    return limit;
}

int qz_get_num_threads(void) {
    const int chosen = atomic_load(&chosen_limit);
    return chosen > 0 ? chosen : present_default();
}

int qz_set_num_threads(int threads) {
    threads = threads < 0 ? 0 : threads < QZ_MAX_THREADS ? threads : QZ_MAX_THREADS;
    const int chosen = atomic_exchange(&chosen_limit, threads);
    const int former = chosen > 0 ? chosen : present_default();
    if (threads == 0) atomic_store(&default_limit, 0);
    return former;
}

void qz_explain_num_threads(char *text, size_t size) {
    const int limit = qz_get_num_threads();
    if (atomic_load(&chosen_limit) > 0) {
        snprintf(text, size, "%d: set by set_num_threads", limit);
        return;
    }
    char reason[512];
    const qz_cpus cpus = qz_count_cpus("");
    if (qz_default_threads(&cpus, reason, sizeof reason) == limit)
        snprintf(text, size, "%s", reason);
    else
        snprintf(text, size, "%d: found by the first call that needed it; set_num_threads(None) would now find %s",
                 limit, reason);
}
