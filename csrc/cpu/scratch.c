#include "scratch.h"

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

enum { ALIGNMENT = 64 };

static _Atomic int successes_left = -1;

void qz_fail_scratch_after(int successes) { atomic_store(&successes_left, successes); }

static int is_to_fail(void) { return atomic_load(&successes_left) >= 0 && atomic_fetch_sub(&successes_left, 1) == 0; }

/* A piece from the heap: a pointer to the one before, then the aligned memory. malloc and rounding up take half the
   time of posix_memalign, which cuts what it rounds off into a chunk of its own. */
static void *take_from_heap(qz_arena *arena, size_t size) {
    const size_t extra = sizeof(void *) + ALIGNMENT - 1;
    void **piece = size > PTRDIFF_MAX - extra ? NULL : malloc(size + extra);
    if (!piece) return NULL;
    *piece = arena->heap;
    arena->heap = piece;
    return (void *)(((uintptr_t)piece + extra) / ALIGNMENT * ALIGNMENT);
}

void *qz_arena_take(qz_arena *arena, size_t size) {
    const size_t left = sizeof arena->block - arena->used;
    if (is_to_fail()) return NULL;
    if (size == 0) size = 1;
    if (size > left || sizeof arena->block == ALIGNMENT) return take_from_heap(arena, size);
    void *piece = arena->block + arena->used;
    arena->used += (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return piece;
}

void qz_arena_release(qz_arena *arena) {
    while (arena->heap) {
        void **piece = arena->heap;
        arena->heap = *piece;
        free(piece);
    }
}
