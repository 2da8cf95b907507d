#include "formats.h"

#include <string.h>

const qz_format qz_formats[QZ_FORMATS] = {
#define QZ_FORMAT(name, family, mode, element, bits, first, second, third, scale, bias) \
    {#name, #family, #mode, #element, bits, {first, second, third}, #scale, bias},
#include "formats.def"
#undef QZ_FORMAT
};

/* What the kernels assume of a row: groups that are powers of two from 16 to 128, and codes that fit a byte. */
#define QZ_FITS(size) ((size) == 0 || (size) == 16 || (size) == 32 || (size) == 64 || (size) == 128)
#define QZ_FORMAT(name, family, mode, element, bits, first, second, third, scale, bias) \
    _Static_assert((bits) >= 1 && (bits) <= 8, #name ": codes have 1 to 8 bits");       \
    _Static_assert(QZ_FITS(first) && QZ_FITS(second) && QZ_FITS(third) && (first) > 0,  \
                   #name ": groups are 16, 32, 64 or 128 (0: none)");
#include "formats.def"
#undef QZ_FORMAT

/* Mostly the linker has made the two one. */
static int is_same(const char *a, const char *b) { return a == b || strcmp(a, b) == 0; }

int qz_find_format(const char *mode, ptrdiff_t bits, ptrdiff_t group_size, int *slot) {
    for (int row = 0; row < QZ_FORMATS; row++) {
        if (qz_formats[row].bits != bits || !is_same(qz_formats[row].mode, mode)) continue;
        for (*slot = 0; *slot < QZ_GROUP_SLOTS; ++*slot) {
            if (group_size > 0 && qz_formats[row].group_sizes[*slot] == group_size) return row;
        }
    }
    return -1;
}

int qz_find_mode(const char *mode) {
    int row = 0;
    while (!is_same(qz_formats[row].mode, mode)) row++;
    return row;
}
