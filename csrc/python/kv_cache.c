/* The rotated KV cache: its rotation, its encoders and its decoder. */
#include <stdarg.h>

#include "binding.h"

static qz_status run_fwht(const qz_plan *plan, const void *args, const qz_run *run) {
    return plan->device->fwht(plan, args, run);
}

static int is_power_of_two(ptrdiff_t n) { return n > 0 && (n & (n - 1)) == 0; }

/* The blocks of codec 2: the largest of 1, 3, 5 and 7 that divides the odd part, times the power of two. */
static void choose_blocks(qz_rotation *rotation, ptrdiff_t dimension, int is_signed) {
    const ptrdiff_t power = dimension & -dimension, odd = dimension / power;
    const int multiple = odd % 7 == 0 ? 7 : odd % 5 == 0 ? 5 : odd % 3 == 0 ? 3 : 1;
    rotation->dimension = dimension;
    rotation->block = multiple * power;
    rotation->order = multiple > 1 ? 4 * multiple : 1;
    rotation->power = (int)(multiple > 1 ? power / 4 : power);
    rotation->is_signed = is_signed;
}

void qz_open_kv_codec(qz_kv_codec *codec, int version, int bits, ptrdiff_t dimension) {
    const int has_signs = version == 2 || dimension == 256 || dimension == 512;
    choose_blocks(&codec->rotation, dimension, has_signs);
    codec->version = version;
    codec->bits = bits;
    codec->stored_bits = version == 2 ? bits : bits == 4 ? 4 : 8;
    codec->scale = QZ_KV_UNBIASED;
    codec->factor = 1.0f;
    codec->block = version == 1 && dimension == 512 ? 256 : codec->rotation.block;
}

int qz_take_kv_version(const call *c, PyObject *object) {
    ptrdiff_t version = 2;
    int given;
    if (qz_take_integer(c, "codec", object, &version, &given) < 0) return -1;
    if (version == 1 || version == 2) return (int)version;
    return qz_raise(PyExc_ValueError, c->op, "codec must be 1 or 2, got %zd", version);
}

/* One of `allowed`, which ends with 0 and which `words` lists; None for `otherwise`, if that is not 0. */
static int take_bits(const call *c, const char *name, PyObject *object, int otherwise, const int *allowed,
                     const char *words) {
    ptrdiff_t bits = otherwise;
    int given;
    if (qz_take_integer(c, name, object, &bits, &given) < 0) return -1;
    if (!given && otherwise == 0) return qz_raise(PyExc_TypeError, c->op, "%s must be an integer, got NoneType", name);
    for (; *allowed; allowed++) {
        if (bits == *allowed) return *allowed;
    }
    return qz_raise(PyExc_ValueError, c->op, "%s must be %s, got %zd", name, words, bits);
}

int qz_take_kv_bits(const call *c, const char *name, PyObject *object, int version, int otherwise) {
    static const int of_1[] = {4, 5, 6, 8, 0}, of_2[] = {2, 3, 4, 5, 6, 8, 0};
    return version == 1 ? take_bits(c, name, object, otherwise, of_1, "4, 5, 6 or 8 with codec=1")
                        : take_bits(c, name, object, otherwise, of_2, "2, 3, 4, 5, 6 or 8");
}

int qz_take_kv_factor(const call *c, PyObject *object, int divides, float *factor) {
    *factor = 1.0f;
    if (object == Py_None) return 0;
    if (qz_take_number(c, "scale_factor_d512", object, factor) < 0) return -1;
    if (*factor - *factor != 0.0f)
        return qz_raise(PyExc_ValueError, c->op, "scale_factor_d512 must be finite, got %R", object);
    if (*factor != 0.0f || !divides) return 0;
    return qz_raise(PyExc_ValueError, c->op, "scale_factor_d512 must not be 0, by which norms would be divided, got %R",
                    object);
}

ptrdiff_t qz_take_kv_dimension(const call *c, const char *name, ptrdiff_t bytes, int version, int bits, int least) {
    const int stored = version == 2 || bits == 4 ? bits : 8;
    const ptrdiff_t dimension = bytes <= QZ_MAX_HEAD_DIM ? bytes * 8 / stored : 0;
    int fits = dimension >= least && dimension <= QZ_MAX_HEAD_DIM && dimension * stored == bytes * 8;
    fits = fits && (version == 1 ? is_power_of_two(dimension) : dimension % 8 == 0);
    if (version == 1 && bits != 4) {
        if (dimension == 256 || dimension == 512) return dimension;
        return qz_raise(PyExc_ValueError, c->op, "%s must be 256 or 512 at %d bits with codec=1, got %zd", name, bits,
                        bytes);
    }
    if (fits) return dimension;
    return qz_raise(PyExc_ValueError, c->op, "%s must be D * %d / 8 bytes, where D is a %s from %d to %d, got %zd",
                    name, stored, version == 1 ? "power of two" : "multiple of 8", least, QZ_MAX_HEAD_DIM, bytes);
}

int qz_raise_shape(const call *c, const char *name, const qz_array *got, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    PyObject *shape = qz_shape_text(got->shape, got->ndim), *wanted = PyUnicode_FromFormatV(format, arguments);
    va_end(arguments);
    if (shape && wanted) qz_raise(PyExc_ValueError, c->op, "%s must have shape %U, got %U", name, wanted, shape);
    Py_XDECREF(shape);
    Py_XDECREF(wanted);
    return -1;
}

/* An axis of one element before the others; a->ndim is less than QZ_MAX_DIMS. */
static void prepend_axis(qz_array *a) {
    for (int i = a->ndim++; i > 0; i--) {
        a->shape[i] = a->shape[i - 1];
        a->strides[i] = a->strides[i - 1];
    }
    a->shape[0] = 1;
    a->strides[0] = 0;
}

/* A message that names the sizes next to `dimension` that fit: powers of two, or multiples of 8. */
static int raise_dimension(const call *c, const char *name, const char *rule, ptrdiff_t dimension, int least,
                           int by_powers) {
    const ptrdiff_t near = dimension < QZ_MAX_HEAD_DIM ? dimension : QZ_MAX_HEAD_DIM;
    ptrdiff_t below = least;
    while (by_powers && below * 2 <= near) below *= 2;
    if (!by_powers && near > least) below = near / 8 * 8;
    if (dimension < least || below == QZ_MAX_HEAD_DIM)
        return qz_raise(PyExc_ValueError, c->op, "%s must be %s, got %zd (%zd would fit)", name, rule, dimension,
                        below);
    return qz_raise(PyExc_ValueError, c->op, "%s must be %s, got %zd (%zd or %zd would fit)", name, rule, dimension,
                    below, by_powers ? 2 * below : below + 8);
}

static int rotate(const plan_object *plan, const call *c, view *x, view *y, PyObject **result, PyObject *const *args) {
    const named_view input = {"x", x};
    const wanted want = {"out", QZ_F32, 0, x->array.ndim, x->array.shape};
    const int is_signed = qz_take_flag(c, "signs", args[2]);
    if (is_signed < 0) return -1;
    const int is_inverse = qz_take_flag(c, "inverse", args[3]);
    if (is_inverse < 0) return -1;
    if (x->array.ndim == 0) return qz_raise(PyExc_ValueError, c->op, "x must have at least one dimension, got 0");
    const ptrdiff_t dimension = x->array.shape[x->array.ndim - 1];
    if (dimension < 2 || dimension > QZ_MAX_HEAD_DIM || (!is_power_of_two(dimension) && dimension % 8 != 0))
        return raise_dimension(c, "x.shape[-1]", "a power of two from 2 to 4096, or a multiple of 8 up to 4096",
                               dimension, dimension < 8 ? 2 : 8, dimension < 8);
    if (qz_take_result(y, result, c, args[4], &want) < 0) return -1;
    if (args[4] != args[1] && qz_refuse_overlap(c, "out", y, &input, 1) < 0) return -1;
    qz_fwht_args operation; /* as far as its arrays have axes */
    qz_copy_array(&operation.x, &x->array);
    qz_copy_array(&operation.y, &y->array);
    choose_blocks(&operation.rotation, dimension, is_signed);
    operation.is_inverse = is_inverse;
    const ptrdiff_t count = qz_checked_count(c, "x", x->array.shape, x->array.ndim);
    return count < 0 ? -1 : qz_run_operation(plan, run_fwht, &operation, (double)count * 0.3);
}

/* fwht(plan, x, signs, inverse, out, input_dtype) */
PyObject *qz_py_fwht(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    view x, y;
    PyObject *result = NULL;
    call c;
    if (qz_check_count("fwht", count, 6) < 0) return NULL;
    const plan_object *plan = qz_take_plan(module, args[0], OP_FWHT);
    if (!plan || qz_open_call(&c, module, plan, args[5]) < 0) return NULL;
    qz_open_view(&x);
    qz_open_view(&y);
    int status = qz_take_floats(&x, &c, "x", args[1]);
    if (status == 0) status = rotate(plan, &c, &x, &y, &result, args);
    qz_release(&x);
    qz_release(&y);
    if (status < 0) Py_CLEAR(result);
    qz_close_call();
    return result;
}

/* ---- codec 1: into slots of a cache ---- */

typedef struct slot_views {
    view src, packed, norms, z;
} slot_views;

/* What a call of hadamard_quantize_kv, _seq or _hb asks for, the arrays aside. */
typedef struct slot_call {
    const char *position_name;
    PyObject *position, *tokens, *offset, *is_sliding, *factor, *z; /* tokens, offset: NULL but for _seq */
    int is_sequence, bits, stored_bits;
} slot_call;

/* The position in a ring of an integer that may be of any size. */
static int take_huge_position(const call *c, const char *name, PyObject *object, ptrdiff_t capacity, ptrdiff_t *slot) {
    PyObject *number = PyNumber_Index(object), *zero = PyLong_FromLong(0), *size = PyLong_FromSsize_t(capacity);
    PyObject *rest = number && zero && size ? PyNumber_Remainder(number, size) : NULL;
    const int negative = rest ? PyObject_RichCompareBool(number, zero, Py_LT) : -1;
    *slot = rest ? PyLong_AsSsize_t(rest) : 0;
    Py_XDECREF(number);
    Py_XDECREF(zero);
    Py_XDECREF(size);
    Py_XDECREF(rest);
    if (negative > 0) return qz_raise(PyExc_ValueError, c->op, "%s must not be negative", name);
    return negative;
}

/* An integer that is not negative; None for `otherwise`. */
static int take_count(const call *c, const char *name, PyObject *object, ptrdiff_t otherwise, ptrdiff_t *value) {
    int given;
    *value = otherwise;
    if (qz_take_integer(c, name, object, value, &given) < 0) return -1;
    return *value >= 0 ? 0 : qz_raise(PyExc_ValueError, c->op, "%s must not be negative, got %zd", name, *value);
}

/* The slot of the first of n tokens, n > 0. */
static int take_slot(const call *c, const slot_call *s, int is_sliding, ptrdiff_t capacity, ptrdiff_t n,
                     ptrdiff_t *slot) {
    const char *name = s->position_name;
    int given;
    if (capacity == 0)
        return qz_raise(PyExc_ValueError, c->op, "packed and norms must have room for a position: got 0");
    if (qz_take_integer(c, name, s->position, slot, &given) < 0) {
        if (!is_sliding || !PyErr_ExceptionMatches(PyExc_ValueError)) return -1;
        PyErr_Clear(); /* it does not fit 64 bits */
        return take_huge_position(c, name, s->position, capacity, slot);
    }
    if (!given) return qz_raise(PyExc_TypeError, c->op, "%s must be an integer, got NoneType", name);
    if (*slot < 0) return qz_raise(PyExc_ValueError, c->op, "%s must not be negative, got %zd", name, *slot);
    if (is_sliding) {
        *slot %= capacity;
    } else if (*slot >= capacity || n > capacity - *slot) {
        if (!s->is_sequence) {
            return qz_raise(PyExc_ValueError, c->op,
                            "%s=%zd must be less than the capacity of %zd (is_sliding=True would wrap it)", name, *slot,
                            capacity);
        }
        return qz_raise(PyExc_ValueError, c->op,
                        "%s=%zd and %zd tokens must fit the capacity of %zd (is_sliding=True would wrap them)", name,
                        *slot, n, capacity);
    }
    return 0;
}

static int check_dimension(const call *c, const slot_call *s, ptrdiff_t dimension) {
    if (s->stored_bits == 8 && dimension != 256 && dimension != 512)
        return qz_raise(PyExc_ValueError, c->op, "src.shape[-1] must be 256 or 512, got %zd", dimension);
    if (is_power_of_two(dimension) && dimension >= 2 && dimension <= QZ_MAX_HEAD_DIM) return 0;
    return raise_dimension(c, "src.shape[-1]", "a power of two from 2 to 4096", dimension, 2, 1);
}

/* src [H, D] or [T, H, D], packed [H, C, bytes], norms [H, C] or [H, C, norms of a position]. */
static int check_shapes(const call *c, const slot_call *s, const slot_views *v) {
    const qz_array *src = &v->src.array, *packed = &v->packed.array, *norms = &v->norms.array;
    if (src->ndim != 2 + s->is_sequence)
        return qz_raise_shape(c, "src", src, s->is_sequence ? "(tokens, heads, D)" : "(heads, D)");
    const ptrdiff_t heads = src->shape[src->ndim - 2], dimension = src->shape[src->ndim - 1];
    /* Views can be of 2^60 elements. */
    const ptrdiff_t bytes = dimension / 8 * s->stored_bits + dimension % 8 * s->stored_bits / 8;
    const ptrdiff_t parts = dimension / 256;
    if (packed->ndim != 3 || packed->shape[0] != heads || packed->shape[2] != bytes)
        return qz_raise_shape(c, "packed", packed, "(%zd, capacity, %zd)", heads, bytes);
    const ptrdiff_t capacity = packed->shape[1];
    if (dimension < 512 && (norms->ndim != 2 || norms->shape[0] != heads || norms->shape[1] != capacity))
        return qz_raise_shape(c, "norms", norms, "(%zd, %zd)", heads, capacity);
    if (dimension >= 512 &&
        (norms->ndim != 3 || norms->shape[0] != heads || norms->shape[1] != capacity || norms->shape[2] != parts))
        return qz_raise_shape(c, "norms", norms, "(%zd, %zd, %zd)", heads, capacity, parts);
    return 0;
}

static int take_slot_arrays(const call *c, const slot_call *s, PyObject *const *args, slot_views *v) {
    const named_view others[] = {{"src", &v->src}, {"packed", &v->packed}, {"norms", &v->norms}};
    if (qz_take_floats(&v->src, c, "src", args[1]) < 0) return -1;
    if (qz_take_writable(&v->packed, c, "packed", args[2], QZ_U8) < 0) return -1;
    if (qz_take_writable(&v->norms, c, "norms", args[3], QZ_F32) < 0) return -1;
    if (check_shapes(c, s, v) < 0) return -1;
    if (qz_refuse_overlap(c, "packed", &v->packed, others, 1) < 0) return -1;
    if (qz_refuse_overlap(c, "norms", &v->norms, others, 2) < 0) return -1;
    if (!s->z || s->z == Py_None) return 0;
    if (qz_take_writable(&v->z, c, "rms_scratch", s->z, QZ_F32) < 0) return -1;
    const qz_array *src = &v->src.array, *z = &v->z.array;
    if (z->ndim != 2 || z->shape[0] != src->shape[0] || z->shape[1] != src->shape[1])
        return qz_raise_shape(c, "rms_scratch", z, "(%zd, %zd)", src->shape[0], src->shape[1]);
    return qz_refuse_overlap(c, "rms_scratch", &v->z, others, 3);
}

static qz_status run_encode(const qz_plan *plan, const void *args, const qz_run *run) {
    return plan->device->kv_encode(plan, args, run);
}

/* An array [.., heads, .., last] as [heads, rows, last]: the axes of heads and rows, -1 for rows: there is but one. */
static void arrange(qz_array *to, const qz_array *from, int heads, int rows) {
    const int last = from->ndim - 1;
    to->data = from->data;
    to->type = from->type;
    to->ndim = 3;
    to->shape[0] = from->shape[heads];
    to->strides[0] = from->strides[heads];
    to->shape[1] = rows < 0 ? 1 : from->shape[rows];
    to->strides[1] = rows < 0 ? 0 : from->strides[rows];
    to->shape[2] = from->shape[last];
    to->strides[2] = from->strides[last];
}

/* One position, whose heads can be the rows of one run: [heads, 1, last] becomes [heads, last]. */
static void make_heads_rows(qz_array *a, ptrdiff_t slot) {
    a->data += slot * a->strides[1];
    a->ndim = 2;
    a->shape[1] = a->shape[2];
    a->strides[1] = a->strides[2];
}

static void fill_arrays(qz_kv_encode_args *e, const slot_views *v, int is_sequence) {
    const ptrdiff_t dimension = e->codec.rotation.dimension;
    arrange(&e->x, &v->src.array, is_sequence, is_sequence ? 0 : -1);
    arrange(&e->packed, &v->packed.array, 0, 1);
    e->counts_norms = dimension >= 1024;
    if (e->counts_norms) {
        qz_copy_array(&e->norms, &v->norms.array);
    } else {
        arrange(&e->norms, &v->norms.array, 0, 1);
    }
    if (dimension < 512) { /* one norm, in an axis of its own */
        e->norms.shape[2] = 1;
        e->norms.strides[2] = 4;
    }
    e->z.data = NULL;
    if (v->z.has_buffer || v->z.owner) arrange(&e->z, &v->z.array, 0, -1);
}

static int encode_slots(const plan_object *plan, const call *c, const slot_call *s, PyObject *const *args,
                        slot_views *v) {
    qz_kv_encode_args e;
    ptrdiff_t n = 1, offset = 0;
    float factor;
    const int is_sliding = qz_take_flag(c, "is_sliding", s->is_sliding);
    if (is_sliding < 0 || qz_take_kv_factor(c, s->factor, 0, &factor) < 0 || take_slot_arrays(c, s, args, v) < 0)
        return -1;
    const qz_array *src = &v->src.array;
    const ptrdiff_t heads = src->shape[src->ndim - 2], dimension = src->shape[src->ndim - 1];
    const ptrdiff_t capacity = v->packed.array.shape[1];
    if (s->is_sequence) {
        const ptrdiff_t tokens = src->shape[0];
        if (take_count(c, "src_tok_offset", s->offset, 0, &offset) < 0) return -1;
        if (take_count(c, "n_tokens", s->tokens, offset < tokens ? tokens - offset : 0, &n) < 0) return -1;
        if (offset > tokens || n > tokens - offset)
            return qz_raise(PyExc_ValueError, c->op,
                            "src_tok_offset=%zd and n_tokens=%zd must fit the %zd tokens of src", offset, n, tokens);
    }
    if (heads == 0 || dimension == 0 || n == 0) return 0;
    if (check_dimension(c, s, dimension) < 0 || take_slot(c, s, is_sliding, capacity, n, &e.first) < 0) return -1;
    qz_open_kv_codec(&e.codec, 1, s->bits, dimension);
    e.codec.factor = factor;
    fill_arrays(&e, v, s->is_sequence);
    if (n > capacity) { /* in a ring the last ones stay */
        offset += n - capacity;
        e.first = (e.first + (n - capacity) % capacity) % capacity;
        n = capacity;
    }
    e.x.data += offset * e.x.strides[1];
    e.x.shape[1] = n;
    if (n == 1 && !e.counts_norms) {
        make_heads_rows(&e.x, 0);
        make_heads_rows(&e.packed, e.first);
        make_heads_rows(&e.norms, e.first);
        if (e.z.data) make_heads_rows(&e.z, 0);
        e.first = 0;
    }
    return qz_run_operation(plan, run_encode, &e, (double)(heads * n * dimension) * 0.5);
}

static PyObject *call_encode_slots(PyObject *module, const plan_object *plan, const slot_call *s,
                                   PyObject *const *args) {
    slot_views v;
    call c;
    if (qz_open_call(&c, module, plan, NULL) < 0) return NULL;
    qz_open_view(&v.src);
    qz_open_view(&v.packed);
    qz_open_view(&v.norms);
    qz_open_view(&v.z);
    const int status = encode_slots(plan, &c, s, args, &v);
    qz_release(&v.src);
    qz_release(&v.packed);
    qz_release(&v.norms);
    qz_release(&v.z);
    qz_close_call();
    return status < 0 ? NULL : PyTuple_Pack(2, args[2], args[3]);
}

/* hadamard_quantize_kv(plan, src, packed, norms, write_pos, is_sliding, scale_factor_d512, rms_scratch) */
PyObject *qz_py_hadamard_quantize_kv(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    if (qz_check_count("hadamard_quantize_kv", count, 8) < 0) return NULL;
    const plan_object *plan = qz_take_plan(module, args[0], OP_HADAMARD_KV);
    if (!plan) return NULL;
    const slot_call s = {.position_name = "write_pos",
                         .position = args[4],
                         .is_sliding = args[5],
                         .factor = args[6],
                         .z = args[7],
                         .bits = 4,
                         .stored_bits = 4};
    return call_encode_slots(module, plan, &s, args);
}

/* hadamard_quantize_kv_seq(plan, src, packed, norms, write_pos_start, n_tokens, src_tok_offset, is_sliding,
 *                          scale_factor_d512) */
PyObject *qz_py_hadamard_quantize_kv_seq(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    if (qz_check_count("hadamard_quantize_kv_seq", count, 9) < 0) return NULL;
    const plan_object *plan = qz_take_plan(module, args[0], OP_HADAMARD_KV_SEQ);
    if (!plan) return NULL;
    const slot_call s = {.position_name = "write_pos_start",
                         .position = args[4],
                         .tokens = args[5],
                         .offset = args[6],
                         .is_sliding = args[7],
                         .factor = args[8],
                         .is_sequence = 1,
                         .bits = 4,
                         .stored_bits = 4};
    return call_encode_slots(module, plan, &s, args);
}

/* hadamard_quantize_kv_hb(plan, src, packed, norms, write_pos, codebook_bits, is_sliding, scale_factor_d512) */
PyObject *qz_py_hadamard_quantize_kv_hb(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    static const int allowed[] = {5, 6, 8, 0};
    if (qz_check_count("hadamard_quantize_kv_hb", count, 8) < 0) return NULL;
    const plan_object *plan = qz_take_plan(module, args[0], OP_HADAMARD_KV_HB);
    if (!plan) return NULL;
    const call c = {.op = plan->op->name};
    const int bits = take_bits(&c, "codebook_bits", args[5], 0, allowed, "5, 6 or 8");
    if (bits < 0) return NULL;
    const slot_call s = {.position_name = "write_pos",
                         .position = args[4],
                         .is_sliding = args[6],
                         .factor = args[7],
                         .bits = bits,
                         .stored_bits = 8};
    return call_encode_slots(module, plan, &s, args);
}

/* ---- codec 2, and the way back of both ---- */

typedef struct row_views {
    view in[2], out[2];
    PyObject *results[2];
} row_views;

static void open_rows(row_views *v) {
    for (int i = 0; i < 2; i++) {
        qz_open_view(&v->in[i]);
        qz_open_view(&v->out[i]);
        v->results[i] = NULL;
    }
}

static void close_rows(row_views *v) {
    for (int i = 0; i < 2; i++) {
        qz_release(&v->in[i]);
        qz_release(&v->out[i]);
        Py_CLEAR(v->results[i]);
    }
    qz_close_call();
}

/* (packed, norms), from `out`, a tuple with None where a new array is wanted. */
static int take_encoded(row_views *v, const call *c, PyObject *out, const qz_kv_codec *codec, qz_type norms_type) {
    static const char *const names[] = {"packed", "norms"};
    const named_view others[] = {{"x", &v->in[0]}, {"packed", &v->out[0]}};
    const qz_array *x = &v->in[0].array;
    ptrdiff_t shape[QZ_MAX_DIMS];
    if (qz_check_outputs(c, out, "(packed, norms)", 2) < 0) return -1;
    for (int i = 0; i < x->ndim; i++) shape[i] = x->shape[i];
    for (int i = 0; i < 2; i++) {
        PyObject *given = out == Py_None ? Py_None : PyTuple_GetItem(out, i);
        const wanted want = {names[i], i ? norms_type : QZ_U8, 0, x->ndim, shape};
        shape[x->ndim - 1] = i ? qz_kv_row_norms(codec) : qz_kv_row_bytes(codec);
        if (qz_take_result(&v->out[i], &v->results[i], c, given, &want) < 0) return -1;
        if (qz_refuse_overlap(c, names[i], &v->out[i], others, 1 + i) < 0) return -1;
    }
    return 0;
}

static int quantize(const plan_object *plan, const call *c, PyObject *const *args, row_views *v) {
    static const char *const scales[] = {"unbiased", "least_squares", "norm"};
    qz_kv_encode_args e = {.first = 0};
    qz_type type;
    const int bits = qz_take_kv_bits(c, "bits", args[2], 2, 0);
    const int scale = bits < 0 ? -1 : qz_take_word(c, "scale", args[3], scales, QZ_KV_SCALES);
    if (scale < 0 || qz_take_norm_type(c, "norms_dtype", args[4], &type) < 0) return -1;
    if (qz_take_floats(&v->in[0], c, "x", args[1]) < 0) return -1;
    const qz_array *x = &v->in[0].array;
    if (x->ndim == 0) return qz_raise(PyExc_ValueError, c->op, "x must have at least one dimension, got 0");
    const ptrdiff_t dimension = x->shape[x->ndim - 1];
    if (dimension < 8 || dimension > QZ_MAX_HEAD_DIM || dimension % 8 != 0)
        return raise_dimension(c, "x.shape[-1]", "a multiple of 8 from 8 to 4096", dimension, 8, 0);
    qz_open_kv_codec(&e.codec, 2, bits, dimension);
    e.codec.scale = (qz_kv_scale)scale;
    if (take_encoded(v, c, args[5], &e.codec, type) < 0) return -1;
    qz_copy_array(&e.x, x);
    qz_copy_array(&e.packed, &v->out[0].array);
    qz_copy_array(&e.norms, &v->out[1].array);
    if (e.x.ndim == 1) {
        prepend_axis(&e.x);
        prepend_axis(&e.packed);
        prepend_axis(&e.norms);
    }
    const ptrdiff_t count = qz_checked_count(c, "x", x->shape, x->ndim);
    return qz_run_operation(plan, run_encode, &e, (double)count * 0.5);
}

/* quantize_kv(plan, x, bits, scale, norms_dtype, out, input_dtype) */
PyObject *qz_py_quantize_kv(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    row_views v;
    call c;
    if (qz_check_count("quantize_kv", count, 7) < 0) return NULL;
    const plan_object *plan = qz_take_plan(module, args[0], OP_QUANTIZE_KV);
    if (!plan || qz_open_call(&c, module, plan, args[6]) < 0) return NULL;
    open_rows(&v);
    const int status = quantize(plan, &c, args, &v);
    PyObject *result = status < 0 ? NULL : PyTuple_Pack(2, v.results[0], v.results[1]);
    close_rows(&v);
    return result;
}

static qz_status run_decode(const qz_plan *plan, const void *args, const qz_run *run) {
    return plan->device->kv_decode(plan, args, run);
}

int qz_fits_norms(const qz_array *packed, const qz_array *norms, ptrdiff_t last) {
    if (norms->ndim != packed->ndim - (last == 0)) return 0;
    for (int i = 0; i < packed->ndim - 1; i++) {
        if (norms->shape[i] != packed->shape[i]) return 0;
    }
    return last == 0 || norms->shape[norms->ndim - 1] == last;
}

static int check_norms(const call *c, const qz_kv_codec *codec, const qz_array *packed, const qz_array *norms) {
    const ptrdiff_t dimension = codec->rotation.dimension, parts = qz_kv_row_norms(codec);
    const int is_plain = codec->version == 1 && dimension != 512, is_long = is_plain && dimension >= 1024;
    if (!is_plain && qz_fits_norms(packed, norms, parts)) return 0;
    if (is_plain && qz_fits_norms(packed, norms, 0)) return 0;
    if (is_long && qz_fits_norms(packed, norms, dimension / 256)) return 0;
    PyObject *lead = qz_shape_text(packed->shape, packed->ndim - 1), *got = qz_shape_text(norms->shape, norms->ndim);
    if (lead && got && is_plain) {
        qz_raise(PyExc_ValueError, c->op, "norms must have packed's shape without the last axis, %U, got %U", lead,
                 got);
    } else if (lead && got) {
        qz_raise(PyExc_ValueError, c->op, "norms must have packed's shape %U with a last axis of %zd, got %U", lead,
                 parts, got);
    }
    Py_XDECREF(lead);
    Py_XDECREF(got);
    return -1;
}

/* The codec that packed's last axis and the arguments say. */
static int take_codec(const call *c, PyObject *const *args, const qz_array *packed, qz_kv_codec *codec) {
    float factor;
    const int version = qz_take_kv_version(c, args[4]);
    const int bits = version < 0 ? -1 : qz_take_kv_bits(c, "bits", args[3], version, 0);
    if (bits < 0 || qz_take_kv_factor(c, args[6], 1, &factor) < 0) return -1;
    if (packed->ndim == 0) return qz_raise(PyExc_ValueError, c->op, "packed must have at least one dimension, got 0");
    const ptrdiff_t bytes = packed->shape[packed->ndim - 1];
    const ptrdiff_t dimension = qz_take_kv_dimension(c, "packed.shape[-1]", bytes, version, bits, version == 1 ? 2 : 8);
    if (dimension < 0) return -1;
    qz_open_kv_codec(codec, version, bits, dimension);
    codec->factor = factor;
    return 0;
}

static int dequantize(const plan_object *plan, const call *c, PyObject *const *args, row_views *v) {
    qz_kv_decode_args d;
    const named_view others[] = {{"packed", &v->in[0]}, {"norms", &v->in[1]}};
    const qz_array *packed = &v->in[0].array, *norms = &v->in[1].array;
    ptrdiff_t shape[QZ_MAX_DIMS];
    d.stays_rotated = qz_take_flag(c, "rotated", args[5]);
    if (d.stays_rotated < 0 || qz_take_bytes(&v->in[0], c, "packed", args[1]) < 0) return -1;
    if (take_codec(c, args, packed, &d.codec) < 0 || qz_take_floats(&v->in[1], c, "norms", args[2]) < 0) return -1;
    if (check_norms(c, &d.codec, packed, norms) < 0) return -1;
    const ptrdiff_t dimension = d.codec.rotation.dimension;
    for (int i = 0; i < packed->ndim; i++) shape[i] = packed->shape[i];
    shape[packed->ndim - 1] = dimension;
    const wanted want = {"out", QZ_F32, 0, packed->ndim, shape};
    if (qz_take_result(&v->out[0], &v->results[0], c, args[7], &want) < 0) return -1;
    if (qz_refuse_overlap(c, "out", &v->out[0], others, 2) < 0) return -1;
    qz_copy_array(&d.packed, packed);
    qz_copy_array(&d.norms, norms);
    qz_copy_array(&d.y, &v->out[0].array);
    d.counts_norms = d.codec.version == 1 && dimension >= 1024;
    if (d.codec.version == 1 && dimension < 512) { /* one norm, in an axis of its own */
        d.norms.shape[d.norms.ndim] = 1;
        d.norms.strides[d.norms.ndim++] = 4;
    }
    if (d.packed.ndim == 1) {
        prepend_axis(&d.packed);
        prepend_axis(&d.y);
        if (!d.counts_norms) prepend_axis(&d.norms);
    }
    const ptrdiff_t count = qz_checked_count(c, "out", shape, packed->ndim);
    return qz_run_operation(plan, run_decode, &d, (double)count * 0.4);
}

/* dequantize_kv(plan, packed, norms, bits, codec, rotated, scale_factor_d512, out) */
PyObject *qz_py_dequantize_kv(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    row_views v;
    call c;
    if (qz_check_count("dequantize_kv", count, 8) < 0) return NULL;
    const plan_object *plan = qz_take_plan(module, args[0], OP_DEQUANTIZE_KV);
    if (!plan || qz_open_call(&c, module, plan, NULL) < 0) return NULL;
    open_rows(&v);
    PyObject *result = dequantize(plan, &c, args, &v) < 0 ? NULL : Py_NewRef(v.results[0]);
    close_rows(&v);
    return result;
}
