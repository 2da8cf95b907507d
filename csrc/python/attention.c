/* Attention over packed keys and values. */
#include <math.h>
#include <string.h>

#include "binding.h"

static qz_status operation(const qz_plan *plan, const void *args, const qz_run *run) {
    return plan->device->attention(plan, args, run);
}

/* One of the two caches, as the caller gave it. */
typedef struct cache {
    const char *name, *packed_name, *norms_name, *size_name; /* "k_cache", "k_cache[0]", "k_cache[1]", .. */
    PyObject *items[2];                                      /* new references */
    view packed, norms;
    int bits;
} cache;

typedef struct attention_views {
    view q, mask, out;
    cache keys, values;
    int codec;
    float scale_factor;
} attention_views;

/* ---- values ---- */

/* A finite number that is positive, or not zero; None leaves *value alone. */
static int take_finite(const call *c, const char *name, PyObject *object, float *value, int must_be_positive) {
    if (object == Py_None) return 0;
    if (qz_take_number(c, name, object, value) < 0) return -1;
    if (isfinite(*value) && (!must_be_positive || *value > 0)) return 0;
    return qz_raise(PyExc_ValueError, c->op, "%s must be a finite%s number or None, got %R", name,
                    must_be_positive ? ", positive" : "", object);
}

/* An integer from `least` to `most`; None leaves *value alone. */
static int take_between(const call *c, const char *name, PyObject *object, ptrdiff_t least, ptrdiff_t most,
                        const char *why, ptrdiff_t *value, int *given) {
    if (qz_take_integer(c, name, object, value, given) < 0) return -1;
    if (!*given || (*value >= least && *value <= most)) return 0;
    if (most == PTRDIFF_MAX)
        return qz_raise(PyExc_ValueError, c->op, "%s must be at least %zd, got %zd", name, least, *value);
    return qz_raise(PyExc_ValueError, c->op, "%s must be from %zd to %zd%s, got %zd", name, least, most, why, *value);
}

/* ---- caches ---- */

static int raise_pair(const call *c, const char *name, PyObject *object) {
    PyObject *kind = PyType_GetName(Py_TYPE(object));
    if (kind) {
        qz_raise(PyExc_TypeError, c->op, "%s must be a tuple (packed, norms), as quantize_kv returns it, got %U", name,
                 kind);
    }
    Py_XDECREF(kind);
    return -1;
}

static int take_cache(const call *c, cache *to, PyObject *object) {
    const int is_sequence = PyTuple_Check(object) || PyList_Check(object);
    if (!is_sequence) return raise_pair(c, to->name, object);
    const Py_ssize_t size = PySequence_Size(object);
    if (size != 2) {
        return qz_raise(PyExc_ValueError, c->op, "%s must be a tuple (packed, norms), got %zd items", to->name, size);
    }
    for (int i = 0; i < 2; i++) {
        to->items[i] = PySequence_GetItem(object, i);
        if (!to->items[i]) return -1;
    }
    if (qz_take_bytes(&to->packed, c, to->packed_name, to->items[0]) < 0) return -1;
    if (to->packed.array.ndim != 3)
        return qz_raise_shape(c, to->packed_name, &to->packed.array, "(heads, capacity, bytes)");
    return qz_take_floats(&to->norms, c, to->norms_name, to->items[1]);
}

/* What codec 1 stores in a norm, or codec 2: see kernels/attention_definition.h for what a scale is. */
static void describe_scales(qz_kv_side *side, int codec, float scale_factor) {
    const ptrdiff_t dimension = side->codec.rotation.dimension;
    side->norm_divisor = side->norm_factor = 1;
    side->norms_are_flat = codec == 1 && dimension >= 1024;
    if (codec == 1 && dimension == 512) {
        side->norm_divisor = scale_factor;
    } else if (codec == 1) {
        side->norm_factor = (float)(1 / sqrt((double)dimension));
    }
}

/* [H, C, n] norms: n is the number of blocks, but for codec 1 D / 256 from 512 on; below, that axis may be left out. */
static int check_norms(const call *c, cache *from, const qz_kv_side *side, int codec) {
    qz_array *norms = &from->norms.array;
    const qz_array *packed = &from->packed.array;
    const ptrdiff_t dimension = side->codec.rotation.dimension;
    const ptrdiff_t count = codec == 2 ? dimension / side->codec.block : dimension >= 512 ? dimension / 256 : 1;
    if (norms->type != QZ_F32 && (codec == 1 || norms->type != QZ_F16)) {
        return qz_raise(PyExc_TypeError, c->op, "%s must be %s for codec %d, got %s", from->norms_name,
                        codec == 1 ? "float32" : "float16 or float32", codec, qz_type_name(norms->type));
    }
    if (codec == 1 && count == 1 && qz_fits_norms(packed, norms, 0)) {
        norms->ndim = 3;
        norms->shape[2] = 1;
        norms->strides[2] = 0;
    }
    if (qz_fits_norms(packed, norms, count)) return 0;
    return qz_raise_shape(c, from->norms_name, norms, "(%zd, %zd, %zd)%s", packed->shape[0], packed->shape[1], count,
                          codec == 1 && count == 1 ? " or without the last axis" : "");
}

static int fill_side(const call *c, qz_kv_side *side, cache *from, const attention_views *v) {
    const ptrdiff_t bytes = from->packed.array.shape[2];
    const ptrdiff_t dimension = qz_take_kv_dimension(c, from->size_name, bytes, v->codec, from->bits, 8);
    if (dimension < 0) return -1;
    qz_open_kv_codec(&side->codec, v->codec, from->bits, dimension);
    describe_scales(side, v->codec, v->scale_factor);
    if (check_norms(c, from, side, v->codec) < 0) return -1;
    qz_copy_array(&side->codes, &from->packed.array);
    qz_copy_array(&side->norms, &from->norms.array);
    return 0;
}

/* ---- q, mask and result ---- */

static int check_heads(const call *c, const attention_views *v, const qz_attention_args *a) {
    const qz_array *k = &a->keys.codes, *values = &a->values.codes;
    if (k->shape[0] != values->shape[0] || k->shape[1] != values->shape[1]) {
        return qz_raise(PyExc_ValueError, c->op,
                        "k_cache and v_cache must have the same heads and capacity, got %zd, %zd and %zd, %zd",
                        k->shape[0], k->shape[1], values->shape[0], values->shape[1]);
    }
    const ptrdiff_t heads = v->q.array.shape[0], dimension = v->q.array.shape[v->q.array.ndim - 1];
    if (dimension != a->keys.codec.rotation.dimension) {
        return qz_raise(PyExc_ValueError, c->op, "q.shape[-1] must be %zd, the head dimension of k_cache, got %zd",
                        a->keys.codec.rotation.dimension, dimension);
    }
    if (k->shape[0] == 0 ? heads == 0 : heads % k->shape[0] == 0) return 0;
    return qz_raise(PyExc_ValueError, c->op, "q.shape[0] must be a multiple of the cache's %zd heads, got %zd",
                    k->shape[0], heads);
}

/* An axis of one query, where none was given. */
static void add_query_axis(qz_array *to) {
    to->ndim = 3;
    to->shape[2] = to->shape[1];
    to->strides[2] = to->strides[1];
    to->shape[1] = 1;
    to->strides[1] = 0;
}

/* A mask of bools as its bytes, or else itself; a new reference, NULL with an exception set. */
static PyObject *bytes_of_mask(const call *c, PyObject *object, int *is_bool) {
    PyObject *array = PyObject_CallFunctionObjArgs(c->state->asarray, object, NULL);
    PyObject *dtype = array ? PyObject_GetAttrString(array, "dtype") : NULL;
    PyObject *kind = dtype ? PyObject_GetAttrString(dtype, "kind") : NULL, *bytes = NULL;
    *is_bool = kind && PyUnicode_Check(kind) && PyUnicode_CompareWithASCIIString(kind, "b") == 0;
    if (*is_bool) {
        bytes = PyObject_CallMethod(array, "view", "O", c->state->u8);
    } else if (kind) {
        bytes = Py_NewRef(object);
    }
    Py_XDECREF(kind);
    Py_XDECREF(dtype);
    Py_XDECREF(array);
    return bytes;
}

/* Spreads the mask to [heads, queries, length] by strides of 0. For a q of two axes its own last two are heads and
 * positions. */
static int broadcast_mask(const call *c, qz_attention_args *a, const qz_array *mask, int q_ndim) {
    const ptrdiff_t shape[3] = {a->q.shape[0], a->q.shape[1], a->length};
    qz_array *to = &a->mask;
    int fits = mask->ndim <= 3;
    to->data = mask->data;
    to->type = mask->type;
    to->ndim = 3;
    for (int i = 0; i < 3; i++) {
        int own = mask->ndim - 3 + i;
        if (q_ndim == 2 && mask->ndim < 3 && i < 2) own = i == 0 ? mask->ndim - 2 : -1;
        to->shape[i] = shape[i];
        to->strides[i] = own >= 0 && mask->shape[own] != 1 ? mask->strides[own] : 0;
        if (fits && own >= 0) fits = mask->shape[own] == 1 || mask->shape[own] == shape[i];
    }
    if (fits) return 0;
    return qz_raise_shape(c, "mask", mask, "that broadcasts to (%zd, %zd, %zd)", shape[0], shape[1], shape[2]);
}

static int take_mask(const call *c, attention_views *v, qz_attention_args *a, PyObject *object) {
    int is_bool, status;
    a->mask_kind = QZ_MASK_NONE;
    if (object == Py_None) return 0;
    PyObject *mask = bytes_of_mask(c, object, &is_bool);
    if (!mask) return -1;
    status = is_bool ? qz_take_bytes(&v->mask, c, "mask", mask) : qz_take_floats(&v->mask, c, "mask", mask);
    Py_DECREF(mask); /* the buffer keeps it alive */
    a->mask_kind = is_bool ? QZ_MASK_BOOL : QZ_MASK_FLOAT;
    return status < 0 ? -1 : broadcast_mask(c, a, &v->mask.array, v->q.array.ndim);
}

static int take_out(const call *c, attention_views *v, qz_attention_args *a, PyObject *out, PyObject **result) {
    const qz_array *q = &v->q.array;
    const ptrdiff_t dimension = a->values.codec.rotation.dimension;
    const ptrdiff_t shape[3] = {q->shape[0], q->ndim == 3 ? q->shape[1] : dimension, dimension};
    const wanted want = {"out", q->type == QZ_F64 ? QZ_F32 : q->type, v->q.is_ml_dtype, q->ndim, shape};
    const named_view inputs[] = {{"q", &v->q},
                                 {v->keys.packed_name, &v->keys.packed},
                                 {v->keys.norms_name, &v->keys.norms},
                                 {v->values.packed_name, &v->values.packed},
                                 {v->values.norms_name, &v->values.norms},
                                 {"mask", &v->mask}};
    if (qz_take_result(&v->out, result, c, out, &want) < 0) return -1;
    if (qz_refuse_overlap(c, "out", &v->out, inputs, a->mask_kind == QZ_MASK_NONE ? 5 : 6) < 0) return -1;
    qz_copy_array(&a->y, &v->out.array);
    if (a->y.ndim == 2) add_query_axis(&a->y);
    return 0;
}

/* ---- the call ---- */

/* The places of the arguments after the plan. */
enum {
    Q,
    K_CACHE,
    V_CACHE,
    BITS,
    VALUE_BITS,
    CODEC,
    LENGTH,
    START,
    SCALE,
    MASK,
    CAUSAL,
    WINDOW,
    SOFTCAP,
    FACTOR,
    OUT,
    INPUT_DTYPE,
    ARGUMENTS
};

static int take_caches(const call *c, attention_views *v, qz_attention_args *a, PyObject *const *args) {
    v->codec = qz_take_kv_version(c, args[CODEC]);
    if (v->codec < 0) return -1;
    v->keys.bits = qz_take_kv_bits(c, "bits", args[BITS], v->codec, 4);
    if (v->keys.bits < 0) return -1;
    v->values.bits = qz_take_kv_bits(c, "value_bits", args[VALUE_BITS], v->codec, v->keys.bits);
    if (v->values.bits < 0 || qz_take_kv_factor(c, args[FACTOR], 1, &v->scale_factor) < 0) return -1;
    if (take_cache(c, &v->keys, args[K_CACHE]) < 0 || take_cache(c, &v->values, args[V_CACHE]) < 0) return -1;
    return fill_side(c, &a->keys, &v->keys, v) < 0 ? -1 : fill_side(c, &a->values, &v->values, v);
}

static int take_options(const call *c, qz_attention_args *a, PyObject *const *args) {
    const ptrdiff_t capacity = a->keys.codes.shape[1];
    int given;
    a->length = capacity;
    a->start = a->window = 0;
    a->softcap = 0;
    a->scale = (float)(1 / sqrt((double)a->keys.codec.rotation.dimension));
    if (take_between(c, "length", args[LENGTH], 0, capacity, ", the capacity", &a->length, &given) < 0 ||
        take_between(c, "start", args[START], 0, PTRDIFF_MAX, "", &a->start, &given) < 0 ||
        take_between(c, "window", args[WINDOW], 1, PTRDIFF_MAX, "", &a->window, &a->has_window) < 0 ||
        take_finite(c, "scale", args[SCALE], &a->scale, 0) < 0 ||
        take_finite(c, "softcap", args[SOFTCAP], &a->softcap, 1) < 0)
        return -1;
    a->has_window = a->has_window && a->window < a->length; /* one that hides nothing could overflow a position */
    a->start = capacity > 0 ? a->start % capacity : 0;
    a->is_causal = qz_take_flag(c, "causal", args[CAUSAL]);
    return a->is_causal < 0 ? -1 : 0;
}

static int attend(const plan_object *plan, const call *c, attention_views *v, PyObject *const *args,
                  PyObject **result) {
    qz_attention_args a;
    if (qz_take_floats(&v->q, c, "q", args[Q]) < 0) return -1;
    if (v->q.array.ndim != 2 && v->q.array.ndim != 3)
        return qz_raise_shape(c, "q", &v->q.array, "(heads, D) or (heads, queries, D)");
    if (take_caches(c, v, &a, args) < 0 || check_heads(c, v, &a) < 0 || take_options(c, &a, args) < 0) return -1;
    qz_copy_array(&a.q, &v->q.array);
    if (a.q.ndim == 2) add_query_axis(&a.q);
    if (take_mask(c, v, &a, args[MASK]) < 0 || take_out(c, v, &a, args[OUT], result) < 0) return -1;
    const double products = (double)a.keys.codec.rotation.dimension + (double)a.values.codec.rotation.dimension;
    const double rows = (double)a.q.shape[0] * (double)a.q.shape[1];
    return qz_run_operation(plan, operation, &a, rows * (double)(a.length + 16) * products * 0.1);
}

static void open_cache(cache *to, const char *name, const char *packed, const char *norms, const char *size) {
    to->name = name;
    to->packed_name = packed;
    to->norms_name = norms;
    to->size_name = size;
    to->items[0] = to->items[1] = NULL;
    qz_open_view(&to->packed);
    qz_open_view(&to->norms);
}

static void close_cache(cache *from) {
    qz_release(&from->packed);
    qz_release(&from->norms);
    Py_XDECREF(from->items[0]);
    Py_XDECREF(from->items[1]);
}

/* kv_attention(plan, q, k_cache, v_cache, bits, value_bits, codec, length, start, scale, mask, causal, window, softcap,
 * scale_factor_d512, out, input_dtype) */
PyObject *qz_py_kv_attention(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    attention_views v;
    PyObject *result = NULL;
    call c;
    if (qz_check_count("kv_attention", count, ARGUMENTS + 1) < 0) return NULL;
    const plan_object *plan = qz_take_plan(module, args[0], OP_KV_ATTENTION);
    if (!plan || qz_open_call(&c, module, plan, args[1 + INPUT_DTYPE]) < 0) return NULL;
    qz_open_view(&v.q);
    qz_open_view(&v.mask);
    qz_open_view(&v.out);
    open_cache(&v.keys, "k_cache", "k_cache[0]", "k_cache[1]", "k_cache[0].shape[2]");
    open_cache(&v.values, "v_cache", "v_cache[0]", "v_cache[1]", "v_cache[0].shape[2]");
    const int status = attend(plan, &c, &v, args + 1, &result);
    close_cache(&v.keys);
    close_cache(&v.values);
    qz_release(&v.q);
    qz_release(&v.mask);
    qz_release(&v.out);
    if (status < 0) Py_CLEAR(result);
    qz_close_call();
    return result;
}
