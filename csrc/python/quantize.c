#include <stdio.h>
#include <string.h>

#include "binding.h"

int qz_take_profile(const call *c, PyObject *object, qz_profile *profile) {
    static const char *const profiles[] = {[QZ_PROFILE_METAL] = "metal", [QZ_PROFILE_CPU] = "cpu"};
    int word = qz_take_word(c, "profile", object, profiles, QZ_PROFILES);
    *profile = (qz_profile)word;
    return word < 0 ? -1 : 0;
}

static qz_status quantize_operation(const qz_plan *plan, const void *args, const qz_run *run) {
    return plan->device->quantize(plan, args, run);
}

static qz_status dequantize_operation(const qz_plan *plan, const void *args, const qz_run *run) {
    return plan->device->dequantize(plan, args, run);
}

/* The largest supported group size of this width that divides k; 0 if there is none. */
static int fitting_group_size(const char *mode, ptrdiff_t bits, ptrdiff_t k) {
    int best = 0;
    for (int row = 0; row < QZ_FORMATS; row++) {
        if (qz_formats[row].bits != bits || strcmp(qz_formats[row].mode, mode) != 0) continue;
        for (int slot = 0; slot < QZ_GROUP_SLOTS; slot++) {
            int size = qz_formats[row].group_sizes[slot];
            if (size > best && k % size == 0) best = size;
        }
    }
    return best;
}

ptrdiff_t qz_count_groups(const call *c, const qz_array *w, const qz_format *format, ptrdiff_t group_size,
                          PyObject *pad) {
    const int may_pad = qz_take_flag(c, "pad", pad);
    if (may_pad < 0) return -1;
    if (w->ndim == 0) return qz_raise(PyExc_ValueError, c->op, "w must have at least one dimension, got a scalar");
    const ptrdiff_t k = w->shape[w->ndim - 1], groups = k / group_size + (k % group_size != 0);
    if (k % group_size != 0 && !may_pad) {
        char hint[64] = "";
        const int fits = fitting_group_size(format->mode, format->bits, k);
        if (fits) PyOS_snprintf(hint, sizeof hint, "group_size=%d would fit, and ", fits);
        return qz_raise(PyExc_ValueError, c->op,
                        "w.shape[-1] must be a multiple of group_size=%zd, got %zd (%spad=True stores it as %zd)",
                        group_size, k, hint, groups * group_size);
    }
    return groups;
}

int qz_take_length(const call *c, PyObject *k, ptrdiff_t groups, ptrdiff_t group_size, ptrdiff_t *length) {
    int given;
    *length = groups * group_size;
    if (qz_take_integer(c, "k", k, length, &given) < 0) return -1;
    if (qz_fits_groups(*length, groups, group_size)) return 0;
    const ptrdiff_t least = groups ? (groups - 1) * group_size + 1 : 0;
    return qz_raise(PyExc_ValueError, c->op, "k must be between %zd and %zd, which %zd groups of %zd hold, got %zd",
                    least, groups * group_size, groups, group_size, *length);
}

static const char *const result_names[] = {"out[0] (codes)", "out[1] (scales)", "out[2] (biases)"};

int qz_check_outputs(const call *c, PyObject *out, const char *names, Py_ssize_t count) {
    static const char wanted[] = "out must be a tuple %s, with None for a new array, got ";
    if (out == Py_None || (PyTuple_Check(out) && PyTuple_Size(out) == count)) return 0;
    char format[128];
    const int is_tuple = PyTuple_Check(out);
    PyOS_snprintf(format, sizeof format, "%s%s", wanted, is_tuple ? "%zd entries" : "%U");
    if (is_tuple) return qz_raise(PyExc_ValueError, c->op, format, names, PyTuple_Size(out));
    PyObject *kind = PyType_GetName(Py_TYPE(out));
    if (kind) qz_raise(PyExc_TypeError, c->op, format, names, kind);
    Py_XDECREF(kind);
    return -1;
}

/* The three outputs, from `out`, a tuple with None where a new array is wanted. */
static int take_outputs(quantize_views *v, const call *c, PyObject *out, ptrdiff_t count, ptrdiff_t group_words,
                        qz_type scale_type, int as_ml) {
    const int last = v->w.array.ndim - 1;
    const named_view others[] = {{"w", &v->w}, {result_names[0], &v->result[0]}, {result_names[1], &v->result[1]}};
    ptrdiff_t words[QZ_MAX_DIMS], groups[QZ_MAX_DIMS];
    for (int i = 0; i < last; i++) words[i] = groups[i] = v->w.array.shape[i];
    groups[last] = count;
    words[last] = count * group_words;
    if (qz_check_outputs(c, out, "(codes, scales, biases)", 3) < 0) return -1;
    for (int i = 0; i < 3; i++) {
        PyObject *given = out == Py_None ? Py_None : PyTuple_GetItem(out, i);
        const wanted want = {result_names[i], i ? scale_type : QZ_U32, as_ml, last + 1, i ? groups : words};
        if (qz_take_result(&v->result[i], &v->results[i], c, given, &want) < 0) return -1;
        if (qz_refuse_overlap(c, result_names[i], &v->result[i], others, i + 1) < 0) return -1;
    }
    return 0;
}

typedef struct quantize_options {
    ptrdiff_t group_size, bits;
    qz_profile profile;
} quantize_options;

static int take_quantize_options(quantize_options *o, const call *c, PyObject *const *args) {
    int given;
    *o = (quantize_options){64, 4, 0};
    if (qz_take_integer(c, "group_size", args[2], &o->group_size, &given) < 0) return -1;
    if (qz_take_integer(c, "bits", args[3], &o->bits, &given) < 0) return -1;
    return qz_take_profile(c, args[4], &o->profile);
}

static PyObject *quantize(const plan_object *plan, const call *c, PyObject *const *args, quantize_views *v) {
    quantize_options o;
    qz_quantize_args job; /* set below, as far as its arrays have axes */
    qz_type scale_type;
    int as_ml = 0;
    if (take_quantize_options(&o, c, args) < 0) return NULL;
    job.format = qz_take_format(c, plan->op->mode, o.bits, o.group_size, &job.group_slot);
    if (job.format < 0 || qz_take_floats(&v->w, c, "w", args[1]) < 0) return NULL;
    qz_type own = v->w.array.type == QZ_F64 ? QZ_F32 : v->w.array.type;
    as_ml = v->w.is_ml_dtype;
    if (qz_take_float_type(c, "scale_dtype", args[5], own, &scale_type, &as_ml) < 0) return NULL;
    const qz_format *format = &qz_formats[job.format];
    const ptrdiff_t groups = qz_count_groups(c, &v->w.array, format, o.group_size, args[6]);
    if (groups < 0) return NULL;
    const ptrdiff_t count = qz_checked_count(c, "w", v->w.array.shape, v->w.array.ndim);
    const ptrdiff_t group_words = o.group_size * format->bits / 32;
    if (count < 0 || take_outputs(v, c, args[7], groups, group_words, scale_type, as_ml) < 0) return NULL;
    qz_copy_array(&job.w, &v->w.array);
    qz_copy_array(&job.codes, &v->result[0].array);
    qz_copy_array(&job.scales, &v->result[1].array);
    qz_copy_array(&job.biases, &v->result[2].array);
    job.profile = o.profile;
    job.mx_scale = QZ_MX_UP; /* this and the next are the fp family's */
    job.global_scale = 1;
    if (qz_run_operation(plan, quantize_operation, &job, (double)count) < 0) return NULL;
    return PyTuple_Pack(3, v->results[0], v->results[1], v->results[2]);
}

PyObject *qz_run_quantize(PyObject *module, const plan_object *plan, PyObject *const *args, PyObject *input_dtype,
                          PyObject *(*run)(const plan_object *, const call *, PyObject *const *, quantize_views *)) {
    quantize_views v;
    call c;
    if (qz_open_call(&c, module, plan, input_dtype) < 0) return NULL;
    qz_open_view(&v.w);
    for (int i = 0; i < 3; i++) {
        qz_open_view(&v.result[i]);
        v.results[i] = NULL;
    }
    PyObject *tuple = run(plan, &c, args, &v);
    qz_release(&v.w);
    for (int i = 0; i < 3; i++) {
        qz_release(&v.result[i]);
        Py_XDECREF(v.results[i]);
    }
    qz_close_call();
    return tuple;
}

/* quantize(plan, w, group_size, bits, profile, scale_dtype, pad, out, input_dtype) */
PyObject *qz_py_quantize(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    if (qz_check_count("quantize", count, 9) < 0) return NULL;
    const plan_object *plan = qz_take_plan(module, args[0], OP_QUANTIZE);
    return plan ? qz_run_quantize(module, plan, args, args[8], quantize) : NULL;
}

/* ---- dequantize ---- */

typedef struct dequantize_views {
    view codes, scales, biases, w;
    PyObject *result;
} dequantize_views;

/* Codes, scales and biases agree in their leading axes, and the scales with the biases in all. */
static int check_stored_shapes(const call *c, const view *codes, const view *scales, const view *biases) {
    const qz_array *q = &codes->array, *s = &scales->array, *b = &biases->array;
    int agree = q->ndim == s->ndim && s->ndim == b->ndim && q->ndim > 0;
    for (int i = 0; agree && i < q->ndim; i++) {
        agree = s->shape[i] == b->shape[i] && (i == q->ndim - 1 || q->shape[i] == s->shape[i]);
    }
    if (agree) return 0;
    PyObject *qs = qz_shape_text(q->shape, q->ndim), *ss = qz_shape_text(s->shape, s->ndim);
    PyObject *bs = qz_shape_text(b->shape, b->ndim);
    if (qs && ss && bs) {
        qz_raise(PyExc_ValueError, c->op,
                 "w, scales and biases must have the same shape but for w's last axis, got %U, %U and %U", qs, ss, bs);
    }
    Py_XDECREF(qs);
    Py_XDECREF(ss);
    Py_XDECREF(bs);
    return -1;
}

int qz_take_stored(const call *c, PyObject *const *args, view *codes, view *scales, view *biases) {
    if (qz_take_codes(codes, c, "w", args[0]) < 0) return -1;
    if (qz_take_floats(scales, c, "scales", args[1]) < 0) return -1;
    if (qz_take_floats(biases, c, "biases", args[2]) < 0) return -1;
    return check_stored_shapes(c, codes, scales, biases);
}

int qz_take_packing(packing *p, const call *c, PyObject *group_size, PyObject *bits) {
    if (qz_take_integer(c, "group_size", group_size, &p->group_size, &p->has_group_size) < 0) return -1;
    return qz_take_integer(c, "bits", bits, &p->bits, &p->has_bits);
}

/* Says what does not fit what was given or inferred, and what would. `features` as asked for, -1: any number. */
static int raise_packing(const call *c, const char *mode, const packing *p, ptrdiff_t words, ptrdiff_t groups,
                         ptrdiff_t features) {
    char list[192] = "";
    size_t used = 0;
    for (int row = 0; groups > 0 && row < QZ_FORMATS; row++) {
        for (int slot = 0; slot < QZ_GROUP_SLOTS; slot++) {
            int size = qz_formats[row].group_sizes[slot], bits = qz_formats[row].bits;
            if (!size || strcmp(qz_formats[row].mode, mode) != 0 || words * 32 != groups * size * bits) continue;
            if (used >= sizeof list) continue;
            used += (size_t)snprintf(list + used, sizeof list - used, "%sbits=%d and group_size=%d for %td features",
                                     used ? ", " : " (would fit: ", bits, size, groups * size);
        }
    }
    const char *end = used ? ")" : "";
    if (features >= 0) {
        return qz_raise(PyExc_ValueError, c->op,
                        "which packing has %zd features in w.shape[-1] = %zd words and scales.shape[-1] = %zd groups "
                        "does not follow from these sizes: give bits and group_size%s%s",
                        features, words, groups, list, end);
    }
    return qz_raise(
        PyExc_ValueError, c->op,
        "w.shape[-1] = %zd words of %zd-bit codes and scales.shape[-1] = %zd groups of %zd do not agree%s%s", words,
        p->bits, groups, p->group_size, list, end);
}

/* Whether a row of the mode has the width and the group size, as far as they are given. */
static int is_offered(const char *mode, const packing *p) {
    for (int row = 0; row < QZ_FORMATS; row++) {
        const qz_format *f = &qz_formats[row];
        if ((p->has_bits && f->bits != p->bits) || strcmp(f->mode, mode) != 0) continue;
        for (int slot = 0; slot < QZ_GROUP_SLOTS; slot++) {
            if (!p->has_group_size || (p->group_size > 0 && f->group_sizes[slot] == p->group_size)) return 1;
        }
    }
    return 0;
}

/* The one packing whose last group is padded, as far as it was given; -1 if there is none, or several. */
static int find_padded(packing *p, const char *mode, ptrdiff_t words, ptrdiff_t groups, ptrdiff_t features, int *slot) {
    int found = -1;
    for (int row = 0; row < QZ_FORMATS; row++) {
        const qz_format *f = &qz_formats[row];
        if ((p->has_bits && f->bits != p->bits) || strcmp(f->mode, mode) != 0) continue;
        for (int i = 0; i < QZ_GROUP_SLOTS; i++) {
            const ptrdiff_t size = f->group_sizes[i];
            if (!size || (p->has_group_size && size != p->group_size) || words * 32 != groups * size * f->bits)
                continue;
            if (!qz_fits_groups(features, groups, size)) continue;
            if (found >= 0) return -1;
            found = row;
            *slot = i;
        }
    }
    if (found < 0) return -1;
    p->bits = qz_formats[found].bits;
    p->group_size = qz_formats[found].group_sizes[*slot];
    return found;
}

int qz_infer_packing(packing *p, const call *c, const char *mode, ptrdiff_t words, ptrdiff_t groups, ptrdiff_t features,
                     int *slot) {
    const int all_given = p->has_bits && p->has_group_size;
    const ptrdiff_t asked = all_given ? -1 : features;
    packing padded = *p;
    const ptrdiff_t given_bits = p->has_bits ? p->bits : 4, given_size = p->has_group_size ? p->group_size : 64;
    if (!is_offered(mode, p) && qz_take_format(c, mode, given_bits, given_size, slot) < 0) return -1;
    if (features < 0 && p->has_group_size) features = groups * p->group_size;
    if (features < 0 && p->has_bits) features = words * 32 / p->bits;
    if (features > 0 && !p->has_bits && words * 32 % features == 0) {
        p->bits = words * 32 / features;
        p->has_bits = 1;
    }
    if (features > 0 && !p->has_group_size && groups > 0 && features % groups == 0) {
        p->group_size = features / groups;
        p->has_group_size = 1;
    }
    if (!p->has_bits) p->bits = 4;
    if (!p->has_group_size) p->group_size = 64;
    int row = qz_find_format(mode, p->bits, p->group_size, slot);
    if (row >= 0 && words * 32 == groups * p->group_size * p->bits) return row;
    row = asked > 0 ? find_padded(&padded, mode, words, groups, asked, slot) : -1;
    if (row >= 0) {
        *p = padded;
        return row;
    }
    return raise_packing(c, mode, p, words, groups, asked);
}

static PyObject *dequantize(const plan_object *plan, const call *c, PyObject *const *args, dequantize_views *v) {
    packing p = {0};
    qz_dequantize_args job; /* set below, as far as its arrays have axes */
    qz_type type;
    if (qz_take_profile(c, args[7], &job.profile) < 0 || qz_take_packing(&p, c, args[4], args[5]) < 0) return NULL;
    if (qz_take_stored(c, args + 1, &v->codes, &v->scales, &v->biases) < 0) return NULL;
    const int last = v->codes.array.ndim - 1;
    ptrdiff_t words = v->codes.array.shape[last], groups = v->scales.array.shape[last];
    job.format = qz_infer_packing(&p, c, plan->op->mode, words, groups, -1, &job.group_slot);
    if (job.format < 0) return NULL;
    ptrdiff_t shape[QZ_MAX_DIMS];
    memcpy(shape, v->codes.array.shape, (size_t)last * sizeof *shape);
    if (qz_take_length(c, args[8], groups, p.group_size, &shape[last]) < 0) return NULL;
    int as_ml = v->scales.is_ml_dtype || v->biases.is_ml_dtype;
    job.product_type = qz_promote(v->scales.array.type, v->biases.array.type);
    if (qz_take_float_type(c, "dtype", args[6], job.product_type, &type, &as_ml) < 0) return NULL;
    ptrdiff_t count = qz_checked_count(c, "out", shape, last + 1);
    const wanted want = {"out", type, as_ml, last + 1, shape};
    const named_view inputs[] = {{"w", &v->codes}, {"scales", &v->scales}, {"biases", &v->biases}};
    if (count < 0 || qz_take_result(&v->w, &v->result, c, args[9], &want) < 0) return NULL;
    if (qz_refuse_overlap(c, "out", &v->w, inputs, 3) < 0) return NULL;
    qz_copy_array(&job.codes, &v->codes.array);
    qz_copy_array(&job.scales, &v->scales.array);
    qz_copy_array(&job.biases, &v->biases.array);
    qz_copy_array(&job.w, &v->w.array);
    job.global_scale = 1; /* the fp family's */
    if (qz_run_operation(plan, dequantize_operation, &job, (double)count * 0.5) < 0) return NULL;
    PyObject *result = v->result;
    v->result = NULL;
    return result;
}

/* dequantize(plan, w, scales, biases, group_size, bits, dtype, profile, k, out, input_dtype) */
PyObject *qz_py_dequantize(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    dequantize_views v;
    view *const all[] = {&v.codes, &v.scales, &v.biases, &v.w};
    call c;
    if (qz_check_count("dequantize", count, 11) < 0) return NULL;
    const plan_object *plan = qz_take_plan(module, args[0], OP_DEQUANTIZE);
    if (!plan || qz_open_call(&c, module, plan, args[10]) < 0) return NULL;
    v.result = NULL;
    for (int i = 0; i < 4; i++) qz_open_view(all[i]);
    PyObject *result = dequantize(plan, &c, args, &v);
    for (int i = 0; i < 4; i++) qz_release(all[i]);
    Py_XDECREF(v.result);
    qz_close_call();
    return result;
}
