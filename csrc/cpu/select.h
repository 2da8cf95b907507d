/* Which instruction sets this CPU has, and the kernels of each. */
#ifndef QZ_CPU_SELECT_H
#define QZ_CPU_SELECT_H

#include "../kernels.h"

typedef struct qz_isa {
    const char *name;
    const qz_kernels *kernels; /* NULL where the build has none */
    unsigned features;         /* needed */
} qz_isa;

enum {
    QZ_ISA_COUNT = 0
#define QZ_ISA(name, guard, features) +1
#include "../isa.def"
#undef QZ_ISA
};

extern const qz_isa qz_isas[QZ_ISA_COUNT]; /* best first */

/* NULL if the ISA can run here, else why not, in words that a user understands. */
const char *qz_isa_unavailable(const qz_isa *isa, char *text, size_t size);

/* The best ISA that can run here. */
const qz_kernels *qz_best_kernels(void);

/* The scalar definition. */
const qz_kernels *qz_definition(void);

/* The CPU features found, as a list of names. */
void qz_explain_cpu(char *text, size_t size);

#endif
