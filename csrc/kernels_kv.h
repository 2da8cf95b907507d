/* The table of inner kernels of the rotated KV cache that every ISA offers, and what those kernels are called with. As
 * for kernels.h: they return void, allocate nothing and trust their sizes. */
#ifndef QZ_KERNELS_KV_H
#define QZ_KERNELS_KV_H

#include "args.h"

enum { QZ_MAX_HEAD_DIM = 4096 };

/* How the elements of a row are rotated: in blocks, each by H = H_order (x) H_power / sqrt(block), after the signs of
 * the elements have been flipped where a table says so. H is symmetric, hence its own inverse. */
typedef struct qz_rotation {
    ptrdiff_t dimension; /* of a row: whole blocks, at most QZ_MAX_HEAD_DIM */
    ptrdiff_t block;     /* order * power */
    int order;           /* 1, 12, 20 or 28: of the matrix that varies slowest */
    int power;           /* a power of two, at least 2 */
    int is_signed;
} qz_rotation;

typedef struct qz_rotate_job {
    const qz_rotation *rotation;
    int is_inverse; /* signs come last */
    const float *from;
    float *to;                              /* may be `from` */
    ptrdiff_t rows, from_stride, to_stride; /* floats from row to row */
} qz_rotate_job;

typedef enum qz_kv_scale { QZ_KV_UNBIASED, QZ_KV_LEAST_SQUARES, QZ_KV_NORM, QZ_KV_SCALES } qz_kv_scale;

/* How rows are encoded. */
typedef struct qz_kv_codec {
    int version;     /* 1: that of the crate mlx-native; 2 */
    int bits;        /* of a code: 2, 3, 4, 5, 6 or 8 */
    int stored_bits; /* that a code takes: with version 1, 4 or 8 */
    qz_kv_scale scale;
    float factor;    /* version 1, dimension 512 */
    ptrdiff_t block; /* elements with a common norm */
    qz_rotation rotation;
} qz_kv_codec;

/* Rows of rotation.dimension elements, whose codes take qz_kv_row_bytes bytes and whose norms stand together. */
typedef struct qz_kv_encode_job {
    const qz_kv_codec *codec;
    const float *from;
    uint8_t *packed;
    float *norms;
    float *z;                                             /* what the codebook was asked for; or NULL */
    ptrdiff_t rows, from_stride, packed_stride, z_stride; /* floats and bytes from row to row */
} qz_kv_encode_job;

typedef struct qz_kv_decode_job {
    const qz_kv_codec *codec;
    const uint8_t *packed;
    const float *norms;
    float *to;
    int stays_rotated;
    ptrdiff_t rows, packed_stride, to_stride;
} qz_kv_decode_job;

static inline ptrdiff_t qz_kv_row_bytes(const qz_kv_codec *codec) {
    return codec->rotation.dimension * codec->stored_bits / 8;
}
static inline ptrdiff_t qz_kv_row_norms(const qz_kv_codec *codec) { return codec->rotation.dimension / codec->block; }

/* Attention: positions of a tile, of which an online softmax takes one after the other; and rows (queries) that are
 * multiplied by the same codes, at most. */
enum { QZ_ATTENTION_TILE = 64, QZ_ATTENTION_ROWS = 32 };

/* Queries, accumulators and decoded codes stand in an order of their own, 64 elements by 64: where even and odd codes
 * of 4 bits end up when their bytes are looked up in each 16 bytes of a vector, unpacked to words, and these to floats.
 * Bits 5...0 of the number of an element, h u d d' p n, are bits n p u h d d' of its place. */
enum { QZ_ATTENTION_UNIT = 64 };
static inline ptrdiff_t qz_attention_place(ptrdiff_t j) {
    const ptrdiff_t step = j % 2 * 2 + j / 2 % 2, chain = j / 16 % 2 * 8 + j / 32 % 2 * 4 + j / 4 % 4;
    return j / QZ_ATTENTION_UNIT * QZ_ATTENTION_UNIT + 16 * step + chain;
}

/* One block (the elements that share a scale) of packed keys or values at some consecutive positions of a tile. */
typedef struct qz_kv_block {
    const uint8_t *codes;   /* of the first position */
    ptrdiff_t stride;       /* bytes from position to position */
    ptrdiff_t positions;    /* at most QZ_ATTENTION_TILE */
    ptrdiff_t length;       /* codes of a position, a multiple of 8 */
    int bits, in_bytes;     /* packed by `bits`, or a byte each, whose upper bits mean nothing */
    int is_bfloat16;        /* centroids are, of at most 6 bits */
    const float *centroids; /* 256, repeated from 2^bits on */
    const uint8_t *planes;  /* byte b of centroid i at i / 64 * 256 + 64 b + i % 64; in_bytes 256, else 64 */
    const float *scales;    /* one a position, readable to the end of a tile */
} qz_kv_block;

/* Rows of floats in places, `stride` of them apart. Readable, and for weigh writable, to the next multiple of
 * QZ_ATTENTION_UNIT of the block's length; where no element stands queries are 0. */
typedef struct qz_kv_rows {
    float *data;
    ptrdiff_t stride, count; /* at most QZ_ATTENTION_ROWS */
} qz_kv_rows;

/* An online softmax: the greatest score so far, the sum of weights beside it, and what the last step multiplies earlier
 * weights by. */
typedef struct qz_softmax {
    float max, sum, factor;
} qz_softmax;

/* kernels/attention_definition.h says what each does. Scores and weights of a row are a tile of floats; the rows of
 * score and weigh follow each other, and of all rows the same positions are meant, the first being given. */
typedef struct qz_attention_kernels {
    void (*score)(const qz_kv_block *keys, const qz_kv_rows *queries, float *scores);
    void (*weigh)(const qz_kv_block *values, const qz_kv_rows *accumulators, const float *weights);
    void (*cap)(float *scores, float softcap);
    void (*soften)(float *scores, qz_softmax *softmax);
    void (*rescale)(float *values, ptrdiff_t count, float factor); /* count: a multiple of 64; for merge too */
    void (*merge)(qz_softmax *softmax, float *values, const qz_softmax *later, const float *more, ptrdiff_t count);
} qz_attention_kernels;

typedef struct qz_kv_kernels {
    void (*rotate)(const qz_rotate_job *);
    void (*encode)(const qz_kv_encode_job *);
    void (*decode)(const qz_kv_decode_job *);
    qz_attention_kernels attention;
} qz_kv_kernels;

#endif
