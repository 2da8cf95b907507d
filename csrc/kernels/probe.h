/* What an ISA's vectors can do at most, in loops that do nothing else: the ceilings beside which the benchmark puts the
 * kernels. Nothing is computed that anybody wants; what is kept alive is the work.
 *
 * A chain is a run of dependent instructions. Two fused multiply-adds of 4 cycles a cycle need 8 of them side by side,
 * four of AArch64's largest cores 16, and the accumulators, one a chain, must leave registers for the operands. */
#include "../arch.h"

enum { QZ_PROBE_CHAINS = QZ_AARCH64 ? 16 : 12, QZ_PROBE_LOADS = QZ_PROBE_BLOCK / (4 * QZ_LANES) };

/* Makes a vector into one that the compiler knows nothing of, so that an operation on it is neither hoisted out of a
 * loop nor shared. Stand-ins for vectors have no register to name. */
#if defined(QZ_EMULATE_AVX512)
#define QZ_OPAQUE(v) ((void)(v))
#elif QZ_X86_64
#define QZ_OPAQUE(v) __asm__("" : "+v"(v))
#else
#define QZ_OPAQUE(v) __asm__("" : "+w"(v))
#endif

/* Lets memory be looked at, for all that the compiler knows. */
#define QZ_KEEP(memory) __asm__ volatile("" ::"r"(memory) : "memory")

static void QZ_NAME(probe_read)(const char *from, ptrdiff_t size) {
    int32_t kept[QZ_LANES];
    v_i32 sums[QZ_PROBE_LOADS], all = set1_i32(0);
    QZ_UNROLL
    for (int i = 0; i < QZ_PROBE_LOADS; i++) sums[i] = set1_i32(0);
    for (ptrdiff_t at = 0; at < size; at += QZ_PROBE_BLOCK) {
        QZ_UNROLL
        for (int i = 0; i < QZ_PROBE_LOADS; i++) {
            sums[i] = or_i32(sums[i], load_i32((const int32_t *)(from + at) + i * QZ_LANES));
        }
    }
    QZ_UNROLL
    for (int i = 0; i < QZ_PROBE_LOADS; i++) all = or_i32(all, sums[i]);
    store_i32(kept, all);
    QZ_KEEP(kept);
}

static void QZ_NAME(probe_stream)(char *to, const char *from, ptrdiff_t size) {
    for (ptrdiff_t at = 0; at < size; at += QZ_PROBE_BLOCK) {
        QZ_UNROLL
        for (int i = 0; i < QZ_PROBE_LOADS; i++) {
            const ptrdiff_t lane = i * QZ_LANES;
            stream_f32((float *)(to + at) + lane, load_f32((const float *)(from + at) + lane));
        }
    }
    stream_end();
}

/* Each chain tends to 1 from a place of its own: equal chains would be computed once, and denormals take longer. */
static void QZ_NAME(probe_fma)(ptrdiff_t rounds) {
    float kept[QZ_PROBE_CHAINS][QZ_LANES];
    v_f32 sums[QZ_PROBE_CHAINS], half = set1_f32(0.5f);
    QZ_UNROLL
    for (int i = 0; i < QZ_PROBE_CHAINS; i++) sums[i] = set1_f32((float)(i + 2));
    for (ptrdiff_t round = 0; round < rounds; round++) {
        QZ_UNROLL
        for (int i = 0; i < QZ_PROBE_CHAINS; i++) sums[i] = fma_f32(sums[i], half, half);
    }
    QZ_UNROLL
    for (int i = 0; i < QZ_PROBE_CHAINS; i++) store_f32(kept[i], sums[i]);
    QZ_KEEP(kept);
}

/* Four products a lane where the ISA has a dot; else one, of 32-bit integers, which is what its matmul is made of. */
#ifdef QZ_DOT_NAME
enum { QZ_PROBE_PRODUCTS = 4 };
#define QZ_PROBE_DOT_NAME QZ_DOT_NAME
typedef v_u8 probe_operand;
QZ_INLINE probe_operand probe_operand_of(int32_t x) { return u8_of_i32(set1_i32(x)); }
QZ_INLINE v_i32 probe_dot_step(v_i32 sum, probe_operand a, probe_operand b) { return dot4(sum, a, b, 4); }
#else
enum { QZ_PROBE_PRODUCTS = 1 };
#define QZ_PROBE_DOT_NAME "32-bit multiply and add"
typedef v_i32 probe_operand;
QZ_INLINE probe_operand probe_operand_of(int32_t x) { return set1_i32(x); }
QZ_INLINE v_i32 probe_dot_step(v_i32 sum, probe_operand a, probe_operand b) {
    int32_t total[QZ_LANES], left[QZ_LANES], right[QZ_LANES];
    store_i32(total, sum);
    store_i32(left, a);
    store_i32(right, b);
    for (int i = 0; i < QZ_LANES; i++)
        total[i] = (int32_t)((uint32_t)total[i] + (uint32_t)left[i] * (uint32_t)right[i]);
    return load_i32(total);
}
#endif

static void QZ_NAME(probe_dot)(ptrdiff_t rounds) {
    int32_t kept[QZ_PROBE_CHAINS][QZ_LANES];
    v_i32 sums[QZ_PROBE_CHAINS];
    probe_operand codes = probe_operand_of(0x0d0b0703), digits = probe_operand_of(0x65432101);
    QZ_UNROLL
    for (int i = 0; i < QZ_PROBE_CHAINS; i++) sums[i] = set1_i32(i);
    for (ptrdiff_t round = 0; round < rounds; round++) {
        QZ_UNROLL
        for (int i = 0; i < QZ_PROBE_CHAINS; i++) {
            QZ_OPAQUE(codes);
            sums[i] = probe_dot_step(sums[i], codes, digits);
        }
    }
    QZ_UNROLL
    for (int i = 0; i < QZ_PROBE_CHAINS; i++) store_i32(kept[i], sums[i]);
    QZ_KEEP(kept);
}
