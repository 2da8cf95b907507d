/* Opens a unit of csrc/isa/: QZ_ISA_NAME must be defined, and the vector header included, before this. */
#include <math.h>

#include "../arch.h"
#include "../kernels.h"

#define QZ_JOIN_(a, b) a##_##b
#define QZ_JOIN(a, b) QZ_JOIN_(a, b)
#define QZ_NAME(name) QZ_JOIN(name, QZ_ISA_NAME)
#define QZ_TEXT_(text) #text
#define QZ_TEXT(text) QZ_TEXT_(text)

/* Tells the compiler of a precondition, so that it leaves out the code for its contrary. */
#define QZ_ASSUME(condition) ((condition) ? (void)0 : __builtin_unreachable())

/* Weights are read once, from memory: hardware alone fetches them too late where rows are short or other data come in
 * between. The distance crosses row ends, as rows mostly follow each other. */
#ifndef QZ_PREFETCH
#define QZ_PREFETCH 4096
#endif
