/* The architectures, and the region of a file in which functions may use more instructions than the whole build. */
#ifndef QZ_ARCH_H
#define QZ_ARCH_H

#if defined(__x86_64__)
#define QZ_X86_64 1
#define QZ_AARCH64 0
#elif defined(__aarch64__)
#define QZ_X86_64 0
#define QZ_AARCH64 1
#else
#error "quantization supports x86-64 and AArch64 (64-bit, little-endian) only"
#endif

#if !defined(__linux__) && !defined(__APPLE__)
#error "quantization supports Linux and macOS only"
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "quantization supports little-endian machines only"
#endif

#define QZ_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define QZ_TARGET_BEGIN(features) \
    QZ_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define QZ_TARGET_END QZ_PRAGMA(clang attribute pop)
#else
#define QZ_TARGET_BEGIN(features) QZ_PRAGMA(GCC push_options) QZ_PRAGMA(GCC target(features))
#define QZ_TARGET_END QZ_PRAGMA(GCC pop_options)
#endif

#define QZ_INLINE static inline __attribute__((always_inline))

#ifdef __clang__
#define QZ_UNROLL _Pragma("clang loop unroll(full)")
#define QZ_UNROLL_BY_4 _Pragma("clang loop unroll_count(4)")
#else
#define QZ_UNROLL _Pragma("GCC unroll 16")
#define QZ_UNROLL_BY_4 _Pragma("GCC unroll 4")
#endif

#endif
