#include "select.h"

#include <stdio.h>
#include <string.h>

#include "../arch.h"

#if QZ_X86_64
#include <cpuid.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#else
#include <sys/sysctl.h>
#endif

enum {
    QZ_AVX2 = 1 << 0,
    QZ_FMA = 1 << 1,
    QZ_F16C = 1 << 2,
    QZ_AVX512F = 1 << 3,
    QZ_AVX512BW = 1 << 4,
    QZ_AVX512DQ = 1 << 5,
    QZ_AVX512VL = 1 << 6,
    QZ_AVX512VBMI = 1 << 7,
    QZ_AVX512VNNI = 1 << 8,
    QZ_NEON = 1 << 9,
    QZ_DOTPROD = 1 << 10,
    QZ_FEATURES = 11,
};

static const char *const feature_names[QZ_FEATURES] = {"AVX2",        "FMA",      "F16C",     "AVX512F",
                                                       "AVX512BW",    "AVX512DQ", "AVX512VL", "AVX512_VBMI",
                                                       "AVX512_VNNI", "NEON",     "DOTPROD"};

#if QZ_X86_64
#ifdef QZ_EMULATE_AVX512 /* the AVX-512 unit is built from portable stand-ins, which any CPU with AVX2 runs */
enum { EMULATED = QZ_AVX512F | QZ_AVX512BW | QZ_AVX512DQ | QZ_AVX512VL | QZ_AVX512VBMI | QZ_AVX512VNNI };
#else
enum { EMULATED = 0 };
#endif

static unsigned long long saved_registers(void) {
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (unsigned long long)high << 32 | low;
}

/* Intel SDM volume 1, sections 14.3 and 15.2: a feature counts only if the OS saves its registers (XCR0). */
static unsigned detect_features(void) {
    const unsigned ymm = 0x6, zmm = 0xe6;
    unsigned a, b, c, d, found = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
    unsigned long long saved = saved_registers();
    if ((saved & ymm) != ymm) return 0;
    if (c & bit_FMA) found |= QZ_FMA;
    if (c & bit_F16C) found |= QZ_F16C;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
    if (b & bit_AVX2) found |= QZ_AVX2;
    if ((saved & zmm) != zmm) return found | EMULATED;
    if (b & bit_AVX512F) found |= QZ_AVX512F;
    if (b & bit_AVX512BW) found |= QZ_AVX512BW;
    if (b & bit_AVX512DQ) found |= QZ_AVX512DQ;
    if (b & bit_AVX512VL) found |= QZ_AVX512VL;
    if (c & (1u << 1)) found |= QZ_AVX512VBMI;
    if (c & (1u << 11)) found |= QZ_AVX512VNNI;
    return found | EMULATED;
}
#elif defined(__linux__)
static unsigned detect_features(void) {
    const unsigned long asimd_dotprod = 1ul << 20;
    return QZ_NEON | (getauxval(AT_HWCAP) & asimd_dotprod ? QZ_DOTPROD : 0);
}
#else
static unsigned detect_features(void) {
    int present = 0;
    size_t size = sizeof present;
    if (sysctlbyname("hw.optional.arm.FEAT_DotProd", &present, &size, NULL, 0) != 0) present = 0;
    return QZ_NEON | (present ? QZ_DOTPROD : 0);
}
#endif

#define QZ_KERNELS_OF_1(name) extern const qz_kernels qz_kernels_##name;
#define QZ_KERNELS_OF_0(name)
#define QZ_ADDRESS_OF_1(name) &qz_kernels_##name
#define QZ_ADDRESS_OF_0(name) NULL
#define QZ_BY_GUARD_(what, guard, name) what##guard(name)
#define QZ_BY_GUARD(what, guard, name) QZ_BY_GUARD_(what, guard, name)

#define QZ_ISA(name, guard, features) QZ_BY_GUARD(QZ_KERNELS_OF_, guard, name)
#include "../isa.def"
#undef QZ_ISA

#define QZ_ISA(name, guard, features) {#name, QZ_BY_GUARD(QZ_ADDRESS_OF_, guard, name), features},
const qz_isa qz_isas[QZ_ISA_COUNT] = {
#include "../isa.def"
};
#undef QZ_ISA

static void list_features(unsigned features, char *text, size_t size) {
    size_t used = 0;
    text[0] = '\0';
    for (int i = 0; i < QZ_FEATURES; i++) {
        if (!(features >> i & 1)) continue;
        int length = snprintf(text + used, size - used, used ? ", %s" : "%s", feature_names[i]);
        if (length < 0 || (size_t)length >= size - used) return;
        used += (size_t)length;
    }
}

const char *qz_isa_unavailable(const qz_isa *isa, char *text, size_t size) {
    char missing[256];
    unsigned lacking = isa->features & ~detect_features();
    if (isa->kernels && !lacking) return NULL;
    if (!isa->kernels) {
        snprintf(text, size, "this build is for another architecture");
    } else {
        list_features(lacking, missing, sizeof missing);
        snprintf(text, size, "this CPU or operating system lacks %s", missing);
    }
    return text;
}

const qz_kernels *qz_best_kernels(void) {
    unsigned found = detect_features();
    for (int i = 0; i < QZ_ISA_COUNT; i++) {
        if (qz_isas[i].kernels && !(qz_isas[i].features & ~found)) return qz_isas[i].kernels;
    }
    return qz_definition();
}

const qz_kernels *qz_definition(void) { return qz_isas[QZ_ISA_COUNT - 1].kernels; }

void qz_explain_cpu(char *text, size_t size) { list_features(detect_features(), text, size); }
