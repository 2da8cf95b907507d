#define _POSIX_C_SOURCE 200809L
#include "scratch.h"

#include <stdatomic.h>
#include <stdlib.h>

static _Atomic int successes_left = -1;

void qz_fail_scratch_after(int successes) { atomic_store(&successes_left, successes); }

void *qz_scratch(size_t size) {
    void *memory = NULL;
    if (atomic_load(&successes_left) >= 0 && atomic_fetch_sub(&successes_left, 1) == 0) return NULL;
    return posix_memalign(&memory, 64, size ? size : 64) == 0 ? memory : NULL;
}
