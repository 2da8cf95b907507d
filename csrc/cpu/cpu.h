/* The operations of the CPU device. */
#ifndef QZ_CPU_H
#define QZ_CPU_H

#include "../device.h"
#include "../kernels.h"

qz_status qz_cpu_quantize(const qz_plan *, const qz_quantize_args *, const qz_run *);
qz_status qz_cpu_dequantize(const qz_plan *, const qz_dequantize_args *, const qz_run *);
qz_status qz_cpu_matmul(const qz_plan *, const qz_matmul_args *, const qz_run *);
qz_status qz_cpu_matmul_float(const qz_plan *, const qz_matmul_args *, const qz_run *);
qz_status qz_cpu_gather(const qz_plan *, const qz_gather_args *, const qz_run *);
qz_status qz_cpu_fake_quantize(const qz_plan *, const qz_fake_quantize_args *, const qz_run *);
qz_status qz_cpu_fp8(const qz_plan *, const qz_fp8_args *, const qz_run *);
qz_status qz_cpu_probe(const qz_plan *, const qz_probe_args *, const qz_run *);

#endif
