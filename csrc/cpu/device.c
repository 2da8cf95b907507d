#include "cpu.h"

static const char *unavailable(void) { return NULL; }

const qz_device qz_cpu_device = {
    .name = "cpu",
    .unavailable = unavailable,
    .quantize = qz_cpu_quantize,
    .dequantize = qz_cpu_dequantize,
    .matmul = qz_cpu_matmul,
    .gather = qz_cpu_gather,
    .fake_quantize = qz_cpu_fake_quantize,
    .fp8 = qz_cpu_fp8,
    .fwht = qz_cpu_fwht,
    .kv_encode = qz_cpu_kv_encode,
    .kv_decode = qz_cpu_kv_decode,
    .attention = qz_cpu_attention,
    .probe = qz_cpu_probe,
};
