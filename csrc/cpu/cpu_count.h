/* How many CPUs this process may use, and how many threads it should therefore start. */
#ifndef QZ_CPU_COUNT_H
#define QZ_CPU_COUNT_H

#include <stddef.h>

typedef struct qz_cpus {
    int online; /* CPUs of the machine */
    int usable; /* those within the calling thread's affinity */
    int cores;  /* distinct physical cores among the usable ones */
    int quota;  /* CPU time that the cgroups allow, in CPUs, rounded up; 0: unlimited */
} qz_cpus;

/* `root` goes before every path that is read: "" on the real system, a directory in tests. */
qz_cpus qz_count_cpus(const char *root);

/* CPUs that can run at once: the usable ones within the quota. At least 1. */
int qz_parallel_cpus(const qz_cpus *cpus);

/* The number of threads where nobody sets one: QUANTIZATION_NUM_THREADS, else OMP_NUM_THREADS, else the cores within
   the quota. Writes "N: reason" to text (size may be 0). */
int qz_default_threads(const qz_cpus *cpus, char *text, size_t size);

#endif
