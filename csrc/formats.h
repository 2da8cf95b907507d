/* csrc/formats.def as C: one enumerator and one row of facts per format. */
#ifndef QZ_FORMATS_H
#define QZ_FORMATS_H

#include <stddef.h>

enum { QZ_GROUP_SLOTS = 3 };

/* How the scale of an mx format is rounded to a power of two. */
typedef enum qz_mx_scale { QZ_MX_UP, QZ_MX_NEAREST, QZ_MX_FLOOR, QZ_MX_SCALES } qz_mx_scale;

typedef enum qz_profile { QZ_PROFILE_METAL, QZ_PROFILE_CPU, QZ_PROFILES } qz_profile;

enum qz_format_index {
#define QZ_FORMAT(name, family, mode, element, bits, first, second, third, scale, bias) QZ_FORMAT_##name,
#include "formats.def"
#undef QZ_FORMAT
    QZ_FORMATS
};

typedef struct qz_format {
    const char *name, *family, *mode, *element;
    int bits;
    int group_sizes[QZ_GROUP_SLOTS];
    const char *scale;
    int bias;
} qz_format;

extern const qz_format qz_formats[QZ_FORMATS];

/* The row of a mode that has this width and group size; -1 if there is none. *slot is the group size's place in it. */
int qz_find_format(const char *mode, ptrdiff_t bits, ptrdiff_t group_size, int *slot);

/* The only row of a mode that has one. */
int qz_find_mode(const char *mode);

#endif
