/* Scratch memory of one call. */
#ifndef QZ_CPU_SCRATCH_H
#define QZ_CPU_SCRATCH_H

#include <stddef.h>

/* 64-byte aligned; NULL if there is not enough memory. Released by free(). */
void *qz_scratch(size_t size);

/* For tests: lets the next `successes` allocations succeed and the one after fail; a negative number lets all succeed.
 */
void qz_fail_scratch_after(int successes);

#endif
