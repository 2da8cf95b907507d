#include "cpu.h"

static const char *unavailable(void) { return NULL; }

const qz_device qz_cpu_device = {
    .name = "cpu",
    .unavailable = unavailable,
    .quantize = qz_cpu_quantize,
    .dequantize = qz_cpu_dequantize,
    .matmul = qz_cpu_matmul,
    .fake_quantize = qz_cpu_fake_quantize,
    .probe = qz_cpu_probe,
};
