/* Scratch memory of one call. */
#ifndef QZ_CPU_SCRATCH_H
#define QZ_CPU_SCRATCH_H

#include <stdalign.h>
#include <stddef.h>

/* Under AddressSanitizer every piece comes from the heap, where the sanitizer sees its ends. */
#if defined(__SANITIZE_ADDRESS__)
#define QZ_ARENA_BYTES 64
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define QZ_ARENA_BYTES 64
#endif
#endif
#ifndef QZ_ARENA_BYTES
#define QZ_ARENA_BYTES 8192
#endif

/* All scratch of a call: its caller keeps it on the stack, so that a small call allocates nothing, and threads, forks
   and exits have nothing to share or to clean up. What does not fit comes from the heap: calls that need so much take
   a hundred times longer than malloc. */
typedef struct qz_arena {
    size_t used;
    void *heap; /* the last piece from there; each begins with a pointer to the one before */
    alignas(64) char block[QZ_ARENA_BYTES];
} qz_arena;

/* Instead of `= {0}`, which would clear the block. */
static inline void qz_arena_open(qz_arena *arena) {
    arena->used = 0;
    arena->heap = NULL;
}

/* 64-byte aligned, not cleared, of its own even if `size` is 0; NULL if there is not enough memory. */
void *qz_arena_take(qz_arena *arena, size_t size);

/* Ends the life of all pieces taken. */
void qz_arena_release(qz_arena *arena);

/* For tests: lets the next `successes` allocations succeed and the one after fail; a negative number lets all succeed.
 */
void qz_fail_scratch_after(int successes);

#endif
