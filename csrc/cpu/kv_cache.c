/* The codecs of the KV cache over strided arrays. */
#include "cpu.h"
#include "rows.h"
#include "threads.h"

/* Elements in one piece of work, as far as rows are not longer, and of the rows that a kernel takes at a time: so few
 * that copies of them stay in L1. */
enum { PIECE = 1 << 14, CHUNK = QZ_MAX_HEAD_DIM };

/* Rows of a few kernels' call: one array's first row, the distance to the next, and that of its elements. */
typedef struct rows_of {
    char *at;
    ptrdiff_t step, stride;
    qz_type type;
} rows_of;

static int is_direct(const rows_of *r, qz_type type, ptrdiff_t size) {
    return r->type == type && r->stride == size && (uintptr_t)r->at % (uintptr_t)size == 0 && r->step % size == 0;
}

/* The rows from `index` on of an array whose last two axes are rows and elements. */
static rows_of rows_at(const qz_array *a, ptrdiff_t lead, ptrdiff_t index) {
    const int axis = a->ndim - 2;
    const ptrdiff_t step = a->strides[axis];
    return (rows_of){qz_element(a, axis, lead) + index * step, step, qz_last_stride(a), a->type};
}

static void load_rows(const qz_kernels *kernels, float *to, const rows_of *r, ptrdiff_t rows, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < rows; i++) {
        kernels->load(to + i * count, r->at + i * r->step, r->stride, r->type, count);
    }
}

static void store_rows(const qz_kernels *kernels, const rows_of *r, const float *from, ptrdiff_t rows,
                       ptrdiff_t count) {
    if (count == 1) { /* a norm each: one row of them */
        kernels->store(r->at, r->step, r->type, from, rows);
        return;
    }
    for (ptrdiff_t i = 0; i < rows; i++) {
        kernels->store(r->at + i * r->step, r->stride, r->type, from + i * count, count);
    }
}

static ptrdiff_t rows_together(const qz_kv_codec *codec) {
    const ptrdiff_t rows = CHUNK / codec->rotation.dimension;
    return rows < 64 ? rows : 64;
}

/* ---- rotation ---- */

typedef struct fwht_job {
    const qz_kernels *kernels;
    const qz_fwht_args *args;
    ptrdiff_t x_step, y_step; /* bytes from row to row */
} fwht_job;

static void rotate_row(const fwht_job *j, ptrdiff_t row) {
    const qz_array *x = &j->args->x, *y = &j->args->y;
    const ptrdiff_t count = qz_last(x), x_stride = qz_last_stride(x), y_stride = qz_last_stride(y);
    const char *from = qz_element(x, x->ndim - 1, row);
    char *to = qz_element(y, y->ndim - 1, row);
    const int from_plain = x->type == QZ_F32 && qz_is_plain(from, x_stride, QZ_F32);
    const int to_plain = qz_is_plain(to, y_stride, QZ_F32);
    float values[QZ_MAX_HEAD_DIM];
    if (!from_plain) j->kernels->load(values, from, x_stride, x->type, count);
    const qz_rotate_job job = {.rotation = &j->args->rotation,
                               .is_inverse = j->args->is_inverse,
                               .from = from_plain ? (const float *)from : values,
                               .to = to_plain ? (float *)to : values,
                               .rows = 1};
    j->kernels->kv->rotate(&job);
    if (!to_plain) j->kernels->store(to, y_stride, QZ_F32, values, count);
}

/* The distance of rows, where it is the same for all; else 1. */
static ptrdiff_t row_step(const qz_array *a) {
    ptrdiff_t step = 0, reach = 0;
    int has_step = 0; /* reach is 0 after a broadcast axis too */
    for (int i = a->ndim - 2; i >= 0; i--) {
        if (a->shape[i] == 1) continue;
        if (has_step && a->strides[i] != reach) return 1;
        if (!has_step) step = a->strides[i];
        has_step = 1;
        reach = a->strides[i] * a->shape[i];
    }
    return step;
}

/* Rows at one distance go to the kernel together. */
static void rotate_rows(void *context, ptrdiff_t begin, ptrdiff_t end) {
    const fwht_job *j = context;
    const qz_array *x = &j->args->x, *y = &j->args->y;
    const rows_of from = {x->data, j->x_step, qz_last_stride(x), x->type};
    const rows_of to = {y->data, j->y_step, qz_last_stride(y), y->type};
    if (!is_direct(&from, QZ_F32, 4) || !is_direct(&to, QZ_F32, 4)) {
        for (ptrdiff_t row = begin; row < end; row++) rotate_row(j, row);
        return;
    }
    const qz_rotate_job job = {.rotation = &j->args->rotation,
                               .is_inverse = j->args->is_inverse,
                               .from = (const float *)(x->data + begin * j->x_step),
                               .to = (float *)(y->data + begin * j->y_step),
                               .rows = end - begin,
                               .from_stride = j->x_step / 4,
                               .to_stride = j->y_step / 4};
    j->kernels->kv->rotate(&job);
}

qz_status qz_cpu_fwht(const qz_plan *plan, const qz_fwht_args *args, const qz_run *run) {
    const ptrdiff_t rows = qz_count(&args->x, args->x.ndim - 1), count = qz_last(&args->x);
    if (rows == 0) return QZ_OK;
    fwht_job j = {plan->kernels, args, row_step(&args->x), row_step(&args->y)};
    return qz_parallel(rotate_rows, &j, rows, 1 + PIECE / count, run);
}

/* ---- encoding ---- */

typedef struct encode_job {
    const qz_kernels *kernels;
    const qz_kv_encode_args *args;
    ptrdiff_t rows, slots, piece, pieces; /* rows of an axis, in how many pieces of how many */
} encode_job;

/* Norms where the norms' array is one of its own shape. */
static void count_out_norms(const encode_job *j, const float *norms, ptrdiff_t place, ptrdiff_t rows) {
    const qz_array *array = &j->args->norms;
    for (ptrdiff_t i = 0; i < rows; i++) {
        j->kernels->store(qz_element(array, array->ndim, place + i), 4, array->type, norms + i, 1);
    }
}

/* A few rows, from `row` on, to as many slots. */
static void encode_chunk(const encode_job *j, ptrdiff_t lead, ptrdiff_t row, ptrdiff_t slot, ptrdiff_t rows) {
    const qz_kv_encode_args *args = j->args;
    const qz_kv_codec *codec = &args->codec;
    const ptrdiff_t count = codec->rotation.dimension, bytes = qz_kv_row_bytes(codec), parts = qz_kv_row_norms(codec);
    const rows_of x = rows_at(&args->x, lead, row), packed = rows_at(&args->packed, lead, slot);
    const int x_direct = is_direct(&x, QZ_F32, 4), packed_direct = is_direct(&packed, QZ_U8, 1);
    float values[CHUNK], z[CHUNK], norms[CHUNK / 2];
    uint8_t codes[CHUNK];
    if (!x_direct) load_rows(j->kernels, values, &x, rows, count);
    const qz_kv_encode_job job = {.codec = codec,
                                  .from = x_direct ? (const float *)x.at : values,
                                  .packed = packed_direct ? (uint8_t *)packed.at : codes,
                                  .norms = norms,
                                  .z = args->z.data ? z : NULL,
                                  .rows = rows,
                                  .from_stride = x_direct ? x.step / 4 : count,
                                  .packed_stride = packed_direct ? packed.step : bytes,
                                  .z_stride = count};
    j->kernels->kv->encode(&job);
    for (ptrdiff_t i = 0; !packed_direct && i < rows; i++) {
        qz_copy_bytes(packed.at + i * packed.step, packed.stride, (const char *)codes + i * bytes, 1, bytes);
    }
    if (args->z.data) {
        const rows_of to = rows_at(&args->z, lead, row);
        store_rows(j->kernels, &to, z, rows, count);
    }
    if (args->counts_norms) {
        count_out_norms(j, norms, lead * j->slots + slot, rows);
    } else {
        const rows_of to = rows_at(&args->norms, lead, slot);
        store_rows(j->kernels, &to, norms, rows, parts);
    }
}

static void encode_pieces(void *context, ptrdiff_t begin, ptrdiff_t end) {
    const encode_job *j = context;
    const ptrdiff_t most = rows_together(&j->args->codec);
    for (ptrdiff_t piece = begin; piece < end; piece++) {
        const ptrdiff_t lead = piece / j->pieces, first = piece % j->pieces * j->piece;
        const ptrdiff_t last = j->rows - first < j->piece ? j->rows : first + j->piece;
        for (ptrdiff_t row = first, rows; row < last; row += rows) {
            const ptrdiff_t slot = j->args->first + row, at = slot < j->slots ? slot : slot - j->slots;
            rows = last - row < most ? last - row : most;
            if (rows > j->slots - at) rows = j->slots - at;
            encode_chunk(j, lead, row, at, rows);
        }
    }
}

/* From [heads, rows, ...] to one row for each of some rows: an array whose heads are all that there is of it. */
static void take_heads_for_rows(qz_array *a, ptrdiff_t row) {
    if (!a->data) return;
    a->data = (char *)a->data + row * a->strides[1];
    a->shape[1] = a->shape[0];
    a->strides[1] = a->strides[0];
    a->shape[0] = 1;
}

/* A token: its heads go to the kernel together. */
static qz_kv_encode_args one_of_each_head(const qz_kv_encode_args *args) {
    qz_kv_encode_args turned = *args;
    const ptrdiff_t slots = args->packed.shape[1], slot = args->first < slots ? args->first : args->first - slots;
    take_heads_for_rows(&turned.x, 0);
    take_heads_for_rows(&turned.z, 0);
    take_heads_for_rows(&turned.packed, slot);
    take_heads_for_rows(&turned.norms, slot);
    turned.first = 0;
    return turned;
}

qz_status qz_cpu_kv_encode(const qz_plan *plan, const qz_kv_encode_args *args, const qz_run *run) {
    if (args->x.ndim == 3 && args->x.shape[1] == 1 && args->x.shape[0] > 1 && !args->counts_norms) {
        const qz_kv_encode_args turned = one_of_each_head(args);
        return qz_cpu_kv_encode(plan, &turned, run);
    }
    const int axis = args->x.ndim - 2;
    const ptrdiff_t leads = qz_count(&args->x, axis), rows = args->x.shape[axis];
    if (leads == 0 || rows == 0) return QZ_OK;
    const ptrdiff_t piece = 1 + (PIECE - 1) / args->codec.rotation.dimension;
    encode_job j = {plan->kernels, args, rows, args->packed.shape[axis], piece, (rows + piece - 1) / piece};
    const ptrdiff_t together = rows < piece ? piece / rows : 1;
    return qz_parallel(encode_pieces, &j, leads * j.pieces, together, run);
}

/* ---- decoding ---- */

typedef struct decode_job {
    const qz_kernels *kernels;
    const qz_kv_decode_args *args;
    ptrdiff_t rows, piece, pieces;
} decode_job;

static void take_norms(const decode_job *j, float *norms, ptrdiff_t lead, ptrdiff_t row, ptrdiff_t rows) {
    const qz_array *array = &j->args->norms;
    const ptrdiff_t place = lead * j->rows + row;
    if (!j->args->counts_norms) {
        const rows_of from = rows_at(array, lead, row);
        load_rows(j->kernels, norms, &from, rows, qz_kv_row_norms(&j->args->codec));
        return;
    }
    for (ptrdiff_t i = 0; i < rows; i++) {
        j->kernels->load(norms + i, qz_element(array, array->ndim, place + i), 4, array->type, 1);
    }
}

static void decode_chunk(const decode_job *j, ptrdiff_t lead, ptrdiff_t row, ptrdiff_t rows) {
    const qz_kv_decode_args *args = j->args;
    const qz_kv_codec *codec = &args->codec;
    const ptrdiff_t count = codec->rotation.dimension, bytes = qz_kv_row_bytes(codec);
    const rows_of packed = rows_at(&args->packed, lead, row), y = rows_at(&args->y, lead, row);
    const int y_direct = is_direct(&y, QZ_F32, 4), packed_direct = packed.stride == 1;
    float values[CHUNK], norms[CHUNK / 2];
    uint8_t codes[CHUNK];
    take_norms(j, norms, lead, row, rows);
    for (ptrdiff_t i = 0; !packed_direct && i < rows; i++) {
        qz_copy_bytes((char *)codes + i * bytes, 1, packed.at + i * packed.step, packed.stride, bytes);
    }
    const qz_kv_decode_job job = {.codec = codec,
                                  .packed = packed_direct ? (const uint8_t *)packed.at : codes,
                                  .norms = norms,
                                  .to = y_direct ? (float *)y.at : values,
                                  .stays_rotated = args->stays_rotated,
                                  .rows = rows,
                                  .packed_stride = packed_direct ? packed.step : bytes,
                                  .to_stride = y_direct ? y.step / 4 : count};
    j->kernels->kv->decode(&job);
    if (!y_direct) store_rows(j->kernels, &y, values, rows, count);
}

static void decode_pieces(void *context, ptrdiff_t begin, ptrdiff_t end) {
    const decode_job *j = context;
    const ptrdiff_t most = rows_together(&j->args->codec);
    for (ptrdiff_t piece = begin; piece < end; piece++) {
        const ptrdiff_t lead = piece / j->pieces, first = piece % j->pieces * j->piece;
        const ptrdiff_t last = j->rows - first < j->piece ? j->rows : first + j->piece;
        for (ptrdiff_t row = first; row < last; row += most) {
            decode_chunk(j, lead, row, last - row < most ? last - row : most);
        }
    }
}

qz_status qz_cpu_kv_decode(const qz_plan *plan, const qz_kv_decode_args *args, const qz_run *run) {
    const int axis = args->packed.ndim - 2;
    const ptrdiff_t leads = qz_count(&args->packed, axis), rows = args->packed.shape[axis];
    if (leads == 0 || rows == 0) return QZ_OK;
    const ptrdiff_t piece = 1 + (PIECE - 1) / args->codec.rotation.dimension;
    decode_job j = {plan->kernels, args, rows, piece, (rows + piece - 1) / piece};
    const ptrdiff_t together = rows < piece ? piece / rows : 1;
    return qz_parallel(decode_pieces, &j, leads * j.pieces, together, run);
}
