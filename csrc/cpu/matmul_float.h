/* What the float class of matmul shares with gathered products. */
#ifndef QZ_CPU_MATMUL_FLOAT_H
#define QZ_CPU_MATMUL_FLOAT_H

#include "cpu.h"

/* The product of one job, whose rows and columns are those of the exact class, for all k. few: the rows of x stand as
 * plain->prepare leaves them. Else they are float32, panel after panel of k (QZ_FLOAT_PANEL_T or _N), which begin
 * panel_bytes apart. */
void qz_multiply_float_tile(const qz_float_kernels *plain, const qz_matmul_args *args, const qz_matmul_job *job,
                            int few, ptrdiff_t panel_bytes);

#endif
