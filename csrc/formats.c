#include "formats.h"

#include <string.h>

const qz_format qz_formats[QZ_FORMATS] = {
#define QZ_FORMAT(name, mode, element, bits, first, second, third, scale, bias) \
    {#name, #mode, #element, bits, {first, second, third}, #scale, bias},
#include "formats.def"
#undef QZ_FORMAT
};

int qz_find_format(const char *mode, ptrdiff_t bits, ptrdiff_t group_size, int *slot) {
    for (int row = 0; row < QZ_FORMATS; row++) {
        if (qz_formats[row].bits != bits || strcmp(qz_formats[row].mode, mode) != 0) continue;
        for (*slot = 0; *slot < QZ_GROUP_SLOTS; ++*slot) {
            if (group_size > 0 && qz_formats[row].group_sizes[*slot] == group_size) return row;
        }
    }
    return -1;
}
