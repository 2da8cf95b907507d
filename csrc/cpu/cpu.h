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
qz_status qz_cpu_fwht(const qz_plan *, const qz_fwht_args *, const qz_run *);
qz_status qz_cpu_kv_encode(const qz_plan *, const qz_kv_encode_args *, const qz_run *);
qz_status qz_cpu_kv_decode(const qz_plan *, const qz_kv_decode_args *, const qz_run *);
qz_status qz_cpu_attention(const qz_plan *, const qz_attention_args *, const qz_run *);
qz_status qz_cpu_probe(const qz_plan *, const qz_probe_args *, const qz_run *);

#endif
