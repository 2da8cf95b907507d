/* Exercises the thread pool from plain C, for the sanitizers and for machines without Python:
       cc -std=c11 -pthread tests/driver_threads.c csrc/cpu/threads.c csrc/cpu/cpu_count.c && ./a.out [no-fork]
   (no-fork is for emulators that cannot start threads in a child of a process that had several: qemu-user 7.2 aborts.)
   Times that are checked: a poll comes every 20 ms and pieces here take 5 ms, so that a stop is answered within about
   25 ms; the promise is 100 ms. Emulators and sanitizers may keep a thread off a CPU for longer, hence their margin. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif

#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../csrc/cpu/cpu_count.h"
#include "../csrc/cpu/threads.h"

#if defined(__SANITIZE_THREAD__)
#define UNDER_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define UNDER_TSAN 1
#endif
#endif
#ifndef UNDER_TSAN
#define UNDER_TSAN 0
#endif

#if defined(__SANITIZE_ADDRESS__)
#define UNDER_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define UNDER_ASAN 1
#endif
#endif
#ifndef UNDER_ASAN
#define UNDER_ASAN 0
#endif

static atomic_long checks;

#define CHECK(condition) check((condition), #condition, __LINE__)

static void check(bool holds, const char *condition, int line) {
    atomic_fetch_add(&checks, 1);
    if (holds) return;
    fprintf(stderr, "driver_threads.c:%d: failed: %s\n", line, condition);
    fflush(stderr);
    _exit(1);
}

static double seconds(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static void sleep_ms(int ms) {
    const double end = seconds() + 1e-3 * ms;
    for (double left; (left = end - seconds()) > 0;)
        nanosleep(&(struct timespec){0, (long)(1e9 * left)}, NULL); /* a signal may end it early */
}

/* ---- Every piece exactly once ---- */

enum { MOST_PIECES = 2000 };

typedef struct tally {
    ptrdiff_t count, grain;
    atomic_bool bad_run;
    long long values[MOST_PIECES]; /* not atomic: the pool orders them, or TSan tells */
} tally;

static void add_pieces(void *context, ptrdiff_t begin, ptrdiff_t end) {
    tally *t = context;
    const ptrdiff_t whole = begin + t->grain < t->count ? begin + t->grain : t->count;
    if (begin < 0 || begin % t->grain != 0 || end != whole) atomic_store(&t->bad_run, true);
    for (ptrdiff_t i = begin; i < end; i++) t->values[i] += i + 1;
}

static void run_tally(tally *t, ptrdiff_t count, ptrdiff_t grain, int threads) {
    memset(t, 0, sizeof *t);
    t->count = count;
    t->grain = grain;
    CHECK(qz_parallel(add_pieces, t, count, grain, &(qz_run){.threads = threads}) == QZ_OK);
    long long sum = 0;
    for (ptrdiff_t i = 0; i < count; i++) sum += t->values[i];
    CHECK(sum == (long long)count * (count + 1) / 2);
    CHECK(!atomic_load(&t->bad_run));
}

static void test_sums(void) {
    static const ptrdiff_t counts[] = {0, 1, 2, 3, 7, 64, 100, 1000, MOST_PIECES};
    static const ptrdiff_t grains[] = {1, 2, 3, 7, 64, 999, 5000};
    static tally t;
    for (size_t c = 0; c < sizeof counts / sizeof *counts; c++)
        for (size_t g = 0; g < sizeof grains / sizeof *grains; g++)
            for (int threads = 0; threads <= 9; threads++) run_tally(&t, counts[c], grains[g], threads);
}

typedef struct extremes {
    atomic_long runs;
    _Atomic ptrdiff_t last;
} extremes;

static void note_end(void *context, ptrdiff_t begin, ptrdiff_t end) {
    extremes *e = context;
    (void)begin;
    atomic_fetch_add(&e->runs, 1);
    if (end > atomic_load(&e->last)) atomic_store(&e->last, end); /* only the last run can reach PTRDIFF_MAX */
}

/* Many threads asking beyond the end of a job near PTRDIFF_MAX must not overflow. */
static void test_large_counts(void) {
    for (int threads = 1; threads <= 8; threads++) {
        extremes e = {0};
        CHECK(qz_parallel(note_end, &e, PTRDIFF_MAX, PTRDIFF_MAX / 3, &(qz_run){.threads = threads}) == QZ_OK);
        CHECK(atomic_load(&e.runs) == 4);
        extremes whole = {0};
        CHECK(qz_parallel(note_end, &whole, PTRDIFF_MAX, PTRDIFF_MAX, &(qz_run){.threads = threads}) == QZ_OK);
        CHECK(atomic_load(&whole.runs) == 1 && atomic_load(&whole.last) == PTRDIFF_MAX);
    }
}

static int thread_count(void) {
    int threads = 0;
    DIR *directory = opendir("/proc/self/task");
    for (struct dirent *entry; directory && (entry = readdir(directory));) threads += entry->d_name[0] != '.';
    if (directory) closedir(directory);
    return threads;
}

static void test_started_lazily(void) {
    static tally t;
    const int before = thread_count();
    run_tally(&t, 1000, 1, 1);    /* one thread asked for */
    run_tally(&t, 1000, 1000, 8); /* one run of pieces */
    CHECK(thread_count() == before);
}

/* ---- Many callers, nested calls ---- */

static void *call_often(void *argument) {
    unsigned random = *(unsigned *)argument;
    tally *t = malloc(sizeof *t);
    CHECK(t != NULL);
    for (int i = 0; i < 300; i++) {
        random = random * 1664525u + 1013904223u;
        run_tally(t, (random >> 8) % 500, 1 + (random >> 20) % 9, (int)((random >> 28) % 5));
    }
    free(t);
    return NULL;
}

static void test_many_callers(void) {
    pthread_t threads[16];
    unsigned seeds[16];
    for (unsigned i = 0; i < 16; i++) {
        seeds[i] = i;
        CHECK(pthread_create(&threads[i], NULL, call_often, &seeds[i]) == 0);
    }
    for (int i = 0; i < 16; i++) CHECK(pthread_join(threads[i], NULL) == 0);
}

static int count_polls(void *context) {
    ++*(int *)context;
    return 0;
}

typedef struct nest {
    atomic_bool wrong;
    atomic_long pieces;
} nest;

static void inner_pieces(void *context, ptrdiff_t begin, ptrdiff_t end) {
    nest *n = context;
    sleep_ms(1);
    atomic_fetch_add(&n->pieces, (long)(end - begin));
}

static void outer_pieces(void *context, ptrdiff_t begin, ptrdiff_t end) {
    int polls = 0; /* a poll is for the outermost caller's thread only */
    const qz_run run = {.threads = 4, .poll = count_polls, .poll_context = &polls};
    for (ptrdiff_t i = begin; i < end; i++)
        if (qz_parallel(inner_pieces, context, 30, 1, &run) != QZ_OK || polls != 0)
            atomic_store(&((nest *)context)->wrong, true);
}

static void test_nested(void) {
    nest n = {0};
    CHECK(qz_parallel(outer_pieces, &n, 8, 1, &(qz_run){.threads = 4}) == QZ_OK);
    CHECK(atomic_load(&n.pieces) == 8 * 30 && !atomic_load(&n.wrong));
}

/* ---- Polls ---- */

typedef struct stopper {
    pthread_t caller;
    double first, at; /* the poll says stop `at` seconds after its first call, and remembers when it said so */
    double said;
    int polls;
    atomic_bool stopped;
    atomic_long started, late;
    int piece_ms;
} stopper;

static int stop_after(void *context) {
    stopper *s = context;
    CHECK(pthread_equal(pthread_self(), s->caller) != 0);
    if (s->polls++ == 0) s->first = seconds();
    if (seconds() < s->first + s->at) return 0;
    CHECK(!atomic_load(&s->stopped)); /* not asked again */
    s->said = seconds();
    atomic_store(&s->stopped, true);
    return 1;
}

static void slow_piece(void *context, ptrdiff_t begin, ptrdiff_t end) {
    stopper *s = context;
    (void)end;
    atomic_fetch_add(&s->started, 1);
    if (atomic_load(&s->stopped)) atomic_fetch_add(&s->late, 1);
    sleep_ms(begin == 0 ? 2 * s->piece_ms : s->piece_ms);
}

/* How much later than planned a thread may run: sanitizers and emulators are slow, and machines are shared. */
static const double slack = 0.2;

static void test_poll_stops(void) {
    for (int threads = 1; threads <= 4; threads++) {
        stopper s = {.caller = pthread_self(), .at = 0.05, .piece_ms = 5};
        const qz_run run = {.threads = threads, .poll = stop_after, .poll_context = &s};
        const double start = seconds();
        CHECK(qz_parallel(slow_piece, &s, 100000, 1, &run) == QZ_INTERRUPTED);
        const double end = seconds();
        CHECK(end - s.said < 0.1 + slack && s.first - start < 0.1 + slack);
        CHECK(s.polls >= 2 && s.polls <= (end - start) / 0.01 + 2);
        /* A thread may have taken its piece just before the stop and begin it just after. */
        CHECK(atomic_load(&s.late) <= threads - 1);
        const long started = atomic_load(&s.started);
        sleep_ms(20);
        CHECK(atomic_load(&s.started) == started);
    }
}

typedef struct long_tail {
    pthread_t caller;
    atomic_bool worker_busy;
    atomic_int worker_ms; /* how long a worker's piece lasts */
} long_tail;

static void busy_worker(void *context, ptrdiff_t begin, ptrdiff_t end) {
    long_tail *t = context;
    (void)begin, (void)end;
    if (!pthread_equal(pthread_self(), t->caller)) {
        atomic_store(&t->worker_busy, true);
        sleep_ms(atomic_load(&t->worker_ms));
    } else {
        for (int i = 0; i < 2000 && !atomic_load(&t->worker_busy); i++) sleep_ms(1);
    }
}

static int always_stop(void *context) {
    ++*(int *)context;
    return 1;
}

/* The caller has no piece left and only waits; polls must go on, and a stop must wait for the worker. */
static void test_poll_while_waiting(void) {
    int polls = 0;
    long_tail t = {.caller = pthread_self(), .worker_ms = 300};
    qz_run run = {.threads = 2, .poll = count_polls, .poll_context = &polls};
    CHECK(qz_parallel(busy_worker, &t, 2, 1, &run) == QZ_OK);
    CHECK(atomic_load(&t.worker_busy) && polls >= 2);

    polls = 0;
    long_tail u = {.caller = pthread_self(), .worker_ms = 100};
    run.poll = always_stop;
    CHECK(qz_parallel(busy_worker, &u, 2, 1, &run) == QZ_INTERRUPTED);
    CHECK(polls == 1);
}

static int call_again(void *context) {
    static tally t;
    ++*(int *)context;
    run_tally(&t, 1000, 3, 4);
    return 0;
}

/* Python's signal handlers run inside a poll and may use the library. */
static void test_poll_calls_pool(void) {
    for (int threads = 1; threads <= 2; threads++) {
        int polls = 0;
        stopper s = {.piece_ms = 5};
        const qz_run run = {.threads = threads, .poll = call_again, .poll_context = &polls};
        CHECK(qz_parallel(slow_piece, &s, 30, 1, &run) == QZ_OK);
        CHECK(polls >= 1 && atomic_load(&s.started) == 30);
    }
}

/* ---- Surroundings of a task ---- */

#if defined(__x86_64__)
#include <xmmintrin.h>
static const uint64_t strange_control = 0xffc0; /* FTZ, DAZ, round to zero */
static uint64_t get_control(void) { return _mm_getcsr() & ~0x3fu; /* without the status flags */ }
static void set_control(uint64_t control) { _mm_setcsr((unsigned)control); }
static const uint64_t usual_control = 0x1f80;
#else
static const uint64_t strange_control = 0x1c00000; /* FZ, round to zero */
static uint64_t get_control(void) {
    uint64_t control;
    __asm__ volatile("mrs %0, fpcr" : "=r"(control));
    return control;
}
static void set_control(uint64_t control) { __asm__ volatile("msr fpcr, %0" ::"r"(control) : "memory"); }
static const uint64_t usual_control = 0;
#endif

typedef struct surroundings {
    pthread_t caller;
    atomic_int wrong;
    atomic_bool worker_came;
} surroundings;

static int check_poll_control(void *context) {
    ++*(int *)context;
    CHECK(get_control() == strange_control); /* a poll belongs to the caller */
    return 0;
}

static void look_around(void *context, ptrdiff_t begin, ptrdiff_t end) {
    surroundings *s = context;
    volatile float tiny = 0x1p-126f, half = 0.5f;
    (void)begin, (void)end;
    if (tiny * half != 0x1p-127f || get_control() != usual_control) atomic_fetch_add(&s->wrong, 1);
    if (!pthread_equal(pthread_self(), s->caller)) {
        volatile char stack[900 << 10];
        stack[0] = stack[sizeof stack / 2] = 1;
        sigset_t blocked;
        pthread_sigmask(SIG_SETMASK, NULL, &blocked);
        if (!sigismember(&blocked, SIGINT) || !sigismember(&blocked, SIGCHLD) || sigismember(&blocked, SIGSEGV))
            atomic_fetch_add(&s->wrong, 1);
        atomic_store(&s->worker_came, true);
    }
    sleep_ms(1);
}

static void test_surroundings(void) {
    sigset_t before, after;
    pthread_sigmask(SIG_SETMASK, NULL, &before);
    for (int threads = 1; threads <= 3; threads++) {
        int polls = 0;
        surroundings s = {.caller = pthread_self()};
        const qz_run run = {.threads = threads, .poll = check_poll_control, .poll_context = &polls};
        set_control(strange_control);
        const qz_status status = qz_parallel(look_around, &s, 100, 1, &run);
        const bool restored = get_control() == strange_control;
        set_control(usual_control);
        CHECK(status == QZ_OK && restored && atomic_load(&s.wrong) == 0 && polls > 0);
        CHECK(atomic_load(&s.worker_came) == (threads > 1));
    }
    pthread_sigmask(SIG_SETMASK, NULL, &after);
    CHECK(sigismember(&before, SIGINT) == sigismember(&after, SIGINT));
}

/* ---- Forks ---- */

static bool child_succeeds(pid_t child) {
    int status = 0;
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR) return false;
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

static atomic_bool enough;

static void *keep_pool_busy(void *unused) {
    tally *t = malloc(sizeof *t);
    CHECK(t != NULL);
    while (!atomic_load(&enough)) run_tally(t, 200, 1, 3);
    free(t);
    return unused;
}

static void test_fork_with_busy_pool(void) {
    static tally t;
    pthread_t others[2];
    atomic_store(&enough, false);
    for (int i = 0; i < 2; i++) CHECK(pthread_create(&others[i], NULL, keep_pool_busy, NULL) == 0);
    for (int i = 0; i < 200; i++) {
        const pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            alarm(20);
            const int before = thread_count();
            run_tally(&t, 500, 1, 1 + i % 4);
            run_tally(&t, 500, 2, 3);
            CHECK(before == 0 || thread_count() == before + (i % 4 == 3 ? 3 : 2)); /* a pool of its own */
            if (i % 10 == 0) {
                const pid_t grandchild = fork();
                if (grandchild == 0) {
                    run_tally(&t, 500, 1, 2);
                    _exit(0);
                }
                CHECK(child_succeeds(grandchild));
            }
            _exit(0);
        }
        CHECK(child_succeeds(child));
        run_tally(&t, 500, 1, 2);
    }
    atomic_store(&enough, true);
    for (int i = 0; i < 2; i++) CHECK(pthread_join(others[i], NULL) == 0);
}

static int fork_once(void *context) {
    pid_t *child = context;
    if (*child < 0) {
        fflush(NULL);
        *child = fork();
        if (*child == 0) alarm(20);
    }
    return 0;
}

/* The forking thread is itself inside qz_parallel: alone (the child can finish) or with workers (it cannot). */
static void test_fork_in_poll(void) {
    static tally t;
    for (int threads = 1; threads <= 3; threads++) {
        pid_t child = -1;
        stopper s = {.piece_ms = 5};
        const qz_run run = {.threads = threads, .poll = fork_once, .poll_context = &child};
        const qz_status status = qz_parallel(slow_piece, &s, 40, 1, &run);
        if (child == 0) {
            CHECK(status == (threads == 1 ? QZ_OK : QZ_INTERRUPTED));
            run_tally(&t, 500, 1, 3);
            _exit(0);
        }
        CHECK(status == QZ_OK && child > 0 && child_succeeds(child));
        CHECK(atomic_load(&s.started) == 40);
    }
}

/* In a child whose address space is used up, no stack can be had for a worker (emulators may ignore the limit). */
static void test_without_workers(void) {
    static tally t;
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        alarm(20);
        setrlimit(RLIMIT_AS, &(struct rlimit){1 << 20, 1 << 20});
        run_tally(&t, 1000, 1, 8);
        run_tally(&t, 1000, 1, 8);
        _exit(0);
    }
    CHECK(child_succeeds(child));
}

/* ---- The limit and its explanation ---- */

static const char *explanation(void) {
    static char text[512];
    qz_explain_num_threads(text, sizeof text);
    return text;
}

static void test_limit(void) {
    unsetenv("QUANTIZATION_NUM_THREADS");
    unsetenv("OMP_NUM_THREADS");
    qz_set_num_threads(0);
    const int standard = qz_get_num_threads();
    CHECK(standard >= 1 && standard <= QZ_MAX_THREADS);
    CHECK(atoi(explanation()) == standard && strstr(explanation(), "physical cores"));
    CHECK(qz_set_num_threads(3) == standard && qz_get_num_threads() == 3);
    CHECK(strcmp(explanation(), "3: set by set_num_threads") == 0);
    CHECK(qz_set_num_threads(1 << 30) == 3 && qz_get_num_threads() == QZ_MAX_THREADS);
    CHECK(qz_set_num_threads(-1) == QZ_MAX_THREADS && qz_get_num_threads() == standard);

    setenv("OMP_NUM_THREADS", "5,2", 1);
    CHECK(qz_get_num_threads() == standard && strstr(explanation(), "would now find 5: OMP_NUM_THREADS='5,2'"));
    CHECK(qz_set_num_threads(0) == standard && qz_get_num_threads() == 5);
    setenv("QUANTIZATION_NUM_THREADS", " 7 ", 1);
    CHECK(qz_set_num_threads(0) == 5 && qz_get_num_threads() == 7);
    CHECK(strcmp(explanation(), "7: QUANTIZATION_NUM_THREADS=' 7 '") == 0);
    setenv("QUANTIZATION_NUM_THREADS", "99999999999999999999", 1);
    CHECK(qz_set_num_threads(0) == 7 && qz_get_num_threads() == QZ_MAX_THREADS);

    static const char *const wrong[] = {"abc", "0", "-3", "4x", "4,2", "1.5", " "};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        char expected[128];
        snprintf(expected, sizeof expected,
                 "5: OMP_NUM_THREADS='5,2'; QUANTIZATION_NUM_THREADS='%s' is not a positive number, ignored", wrong[i]);
        setenv("QUANTIZATION_NUM_THREADS", wrong[i], 1);
        qz_set_num_threads(0);
        CHECK(qz_get_num_threads() == 5 && strcmp(explanation(), expected) == 0);
    }
    setenv("QUANTIZATION_NUM_THREADS", "", 1);
    setenv("OMP_NUM_THREADS", "many", 1);
    qz_set_num_threads(0);
    CHECK(qz_get_num_threads() == standard);
    CHECK(strstr(explanation(), "; OMP_NUM_THREADS='many' is not a positive number, ignored"));
    unsetenv("QUANTIZATION_NUM_THREADS");
    unsetenv("OMP_NUM_THREADS");
    qz_set_num_threads(0);
}

#ifdef __linux__

static void write_file(const char *root, const char *path, const char *text) {
    char name[512];
    snprintf(name, sizeof name, "%s%s", root, path);
    for (char *slash = strchr(name + strlen(root) + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        CHECK(mkdir(name, 0700) == 0 || errno == EEXIST);
        *slash = '/';
    }
    FILE *file = fopen(name, "w");
    CHECK(file != NULL);
    fputs(text, file);
    fclose(file);
}

static void remove_tree(const char *root) {
    char command[128];
    snprintf(command, sizeof command, "rm -rf '%s'", root);
    CHECK(system(command) == 0);
}

static int quota_of(const char *root) { return qz_count_cpus(root).quota; }

static void test_quota(const char *root) {
    CHECK(quota_of(root) == 0);
    write_file(root, "/proc/self/cgroup", "0::/a/b\n");
    CHECK(quota_of(root) == 0);
    write_file(root, "/sys/fs/cgroup/a/b/cpu.max", "max 100000\n");
    CHECK(quota_of(root) == 0);
    write_file(root, "/sys/fs/cgroup/a/cpu.max", "250000 100000\n");
    CHECK(quota_of(root) == 3); /* the parent's 2.5 */
    write_file(root, "/sys/fs/cgroup/cpu.max", "400000 100000\n");
    CHECK(quota_of(root) == 3);
    write_file(root, "/proc/self/cgroup", "0::/not/mounted/here\n");
    CHECK(quota_of(root) == 4); /* a container that sees the host's path */
    write_file(root, "/proc/self/cgroup", "0::/\n");
    CHECK(quota_of(root) == 4);
    write_file(root, "/proc/self/cgroup", "5:memory:/a\n3:cpuset:/a\n1:cpuacct,cpu:/x\n0::/not/here\nnonsense\n");
    write_file(root, "/sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us", "-1\n");
    write_file(root, "/sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us", "100000\n");
    CHECK(quota_of(root) == 4);
    write_file(root, "/sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us", "100001\n");
    CHECK(quota_of(root) == 2);
    write_file(root, "/sys/fs/cgroup/unified/cpu.max", "1000 100000\n");
    CHECK(quota_of(root) == 1);
}

static void test_cpu_count(void) {
    char root[] = "/tmp/driver_threads_XXXXXX", path[128], text[256];
    CHECK(mkdtemp(root) != NULL);
    test_quota(root);

    /* Cores are those of the real affinity; the tree pairs CPUs 2i and 2i+1, the odd ones under the old name. */
    cpu_set_t usable;
    CHECK(sched_getaffinity(0, sizeof usable, &usable) == 0);
    int pairs = 0;
    CHECK(qz_count_cpus(root).cores == CPU_COUNT(&usable)); /* no topology: every CPU is a core */
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu += 2) {
        char list[32];
        if (!CPU_ISSET(cpu, &usable) && !CPU_ISSET(cpu + 1, &usable)) continue;
        pairs++;
        snprintf(list, sizeof list, "%d-%d\n", cpu, cpu + 1);
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/core_cpus_list", cpu);
        write_file(root, path, list);
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu + 1);
        write_file(root, path, list);
    }
    CHECK(qz_count_cpus(root).cores == pairs && qz_count_cpus(root).usable == CPU_COUNT(&usable));
    remove_tree(root);

    const qz_cpus free_machine = {.online = 16, .usable = 12, .cores = 8};
    CHECK(qz_default_threads(&free_machine, text, sizeof text) == 8 && qz_parallel_cpus(&free_machine) == 12);
    CHECK(strcmp(text, "8: distinct physical cores within the CPU affinity (12 of 16 CPUs), no cgroup quota") == 0);
    const qz_cpus container = {.online = 16, .usable = 12, .cores = 8, .quota = 3};
    CHECK(qz_default_threads(&container, text, sizeof text) == 3 && qz_parallel_cpus(&container) == 3);
    CHECK(strcmp(text, "3: cgroup CPU quota (rounded up), less than the 8 distinct physical cores within the CPU "
                       "affinity (12 of 16 CPUs)") == 0);
    const qz_cpus roomy = {.online = 16, .usable = 12, .cores = 8, .quota = 10};
    CHECK(qz_default_threads(&roomy, text, sizeof text) == 8 && qz_parallel_cpus(&roomy) == 10);
    CHECK(strstr(text, ", cgroup quota of 10 CPUs") != NULL);
    CHECK(qz_default_threads(&roomy, text, 9) == 8 && strcmp(text, "8: disti") == 0);
}

#endif

int main(int argc, char **argv) {
    bool forks = !(argc > 1 && strcmp(argv[1], "no-fork") == 0);
    /* ThreadSanitizer refuses new threads in a child that was forked from a process with several. */
    forks = forks && !UNDER_TSAN;

    test_started_lazily();
    test_limit();
#ifdef __linux__
    test_cpu_count();
#endif
    test_sums();
    test_large_counts();
    test_many_callers();
    test_nested();
    test_poll_stops();
    test_poll_while_waiting();
    test_poll_calls_pool();
    test_surroundings();
    if (forks) {
        test_fork_with_busy_pool();
        test_fork_in_poll();
        if (!UNDER_ASAN) /* whose runtime needs address space itself */
            test_without_workers();
    }
    test_sums();
    printf("driver_threads: %ld checks passed\n", atomic_load(&checks));
    return 0;
}
