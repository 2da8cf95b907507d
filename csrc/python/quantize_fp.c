/* quantize and dequantize of the fp family: scales are bytes, and there are no biases. */
#include <string.h>

#include "binding.h"

static const char *const mx_scales[] = {[QZ_MX_UP] = "up", [QZ_MX_NEAREST] = "nearest", [QZ_MX_FLOOR] = "floor"};

static const float no_global_scale = 2688.0f;

static qz_status quantize_operation(const qz_plan *plan, const void *args, const qz_run *run) {
    return plan->device->quantize(plan, args, run);
}

static qz_status dequantize_operation(const qz_plan *plan, const void *args, const qz_run *run) {
    return plan->device->dequantize(plan, args, run);
}

int qz_take_global_scale(const call *c, const qz_format *format, PyObject *object, float *scale) {
    *scale = no_global_scale;
    if (object == Py_None) return 0;
    if (strcmp(format->scale, "e8m0") == 0)
        return qz_raise(PyExc_TypeError, c->op, "there is no global_scale in mode '%s'", format->mode);
    if (qz_take_number(c, "global_scale", object, scale) < 0) return -1;
    if (*scale >= 0 && *scale <= 0x1.fffffep127f) return 0;
    return qz_raise(PyExc_ValueError, c->op, "global_scale must be finite and not negative, got %R", object);
}

static int take_mx_scale(const call *c, const qz_format *format, PyObject *object, qz_mx_scale *mx_scale) {
    *mx_scale = QZ_MX_UP;
    if (strcmp(format->scale, "e8m0") != 0) {
        if (object == Py_None) return 0;
        return qz_raise(PyExc_TypeError, c->op, "there is no mx_scale in mode '%s'", format->mode);
    }
    int word = object == Py_None ? QZ_MX_UP : qz_take_word(c, "mx_scale", object, mx_scales, QZ_MX_SCALES);
    *mx_scale = (qz_mx_scale)word;
    return word < 0 ? -1 : 0;
}

/* Codes and scales, from `out`, a tuple with None where a new array is wanted. */
static int take_outputs(quantize_views *v, const call *c, PyObject *out, ptrdiff_t count, const qz_format *format) {
    static const char *const names[] = {"out[0] (codes)", "out[1] (scales)"};
    const int last = v->w.array.ndim - 1;
    const named_view others[] = {{"w", &v->w}, {names[0], &v->result[0]}};
    ptrdiff_t words[QZ_MAX_DIMS], groups[QZ_MAX_DIMS];
    for (int i = 0; i < last; i++) words[i] = groups[i] = v->w.array.shape[i];
    groups[last] = count;
    words[last] = count * (format->group_sizes[0] * format->bits / 32);
    if (qz_check_outputs(c, out, "(codes, scales)", 2) < 0) return -1;
    for (int i = 0; i < 2; i++) {
        PyObject *given = out == Py_None ? Py_None : PyTuple_GetItem(out, i);
        const wanted want = {names[i], i ? QZ_U8 : QZ_U32, 0, last + 1, i ? groups : words};
        if (qz_take_result(&v->result[i], &v->results[i], c, given, &want) < 0) return -1;
        if (qz_refuse_overlap(c, names[i], &v->result[i], others, i + 1) < 0) return -1;
    }
    return 0;
}

static PyObject *quantize(const plan_object *plan, const call *c, PyObject *const *args, quantize_views *v) {
    qz_quantize_args job; /* set below, as far as its arrays have axes */
    job.format = qz_find_mode(plan->op->mode);
    job.group_slot = 0;
    const qz_format *format = &qz_formats[job.format];
    if (qz_take_profile(c, args[2], &job.profile) < 0) return NULL;
    if (take_mx_scale(c, format, args[3], &job.mx_scale) < 0) return NULL;
    if (qz_take_global_scale(c, format, args[4], &job.global_scale) < 0) return NULL;
    if (qz_take_floats(&v->w, c, "w", args[1]) < 0) return NULL;
    const ptrdiff_t groups = qz_count_groups(c, &v->w.array, format, format->group_sizes[0], args[5]);
    if (groups < 0) return NULL;
    ptrdiff_t count = qz_checked_count(c, "w", v->w.array.shape, v->w.array.ndim);
    if (count < 0 || take_outputs(v, c, args[6], groups, format) < 0) return NULL;
    qz_copy_array(&job.w, &v->w.array);
    qz_copy_array(&job.codes, &v->result[0].array);
    qz_copy_array(&job.scales, &v->result[1].array);
    qz_copy_array(&job.biases, &v->result[1].array); /* read by nobody: the axes of all four merge together */
    if (qz_run_operation(plan, quantize_operation, &job, (double)count) < 0) return NULL;
    return PyTuple_Pack(2, v->results[0], v->results[1]);
}

/* quantize_fp(plan, w, profile, mx_scale, global_scale, pad, out, input_dtype) */
PyObject *qz_py_quantize_fp(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    if (qz_check_count("quantize_fp", count, 8) < 0) return NULL;
    const plan_object *plan = qz_take_plan(module, args[0], OP_QUANTIZE_FP);
    return plan ? qz_run_quantize(module, plan, args, args[7], quantize) : NULL;
}

/* ---- dequantize ---- */

typedef struct dequantize_views {
    view codes, scales, w;
    PyObject *result;
} dequantize_views;

/* Codes and scales agree in their leading axes, and in how many values they stand for. */
static int check_stored(const call *c, const qz_array *codes, const qz_array *scales, const qz_format *format) {
    const ptrdiff_t words = format->group_sizes[0] * format->bits / 32;
    const int last = codes->ndim - 1;
    int agree = codes->ndim == scales->ndim && codes->ndim > 0;
    for (int i = 0; agree && i < last; i++) agree = codes->shape[i] == scales->shape[i];
    if (agree && codes->shape[last] == scales->shape[last] * words) return 0;
    PyObject *q = qz_shape_text(codes->shape, codes->ndim), *s = qz_shape_text(scales->shape, scales->ndim);
    if (q && s) {
        qz_raise(PyExc_ValueError, c->op,
                 "w and scales must have the same shape but for the last axis, which holds %zd words in w for each "
                 "scale; got %U and %U",
                 words, q, s);
    }
    Py_XDECREF(q);
    Py_XDECREF(s);
    return -1;
}

int qz_take_stored_fp(const call *c, PyObject *const *args, const qz_format *format, view *codes, view *scales) {
    if (qz_take_codes(codes, c, "w", args[0]) < 0) return -1;
    if (qz_take_byte_floats(scales, c, "scales", args[1], format->scale) < 0) return -1;
    return check_stored(c, &codes->array, &scales->array, format);
}

static PyObject *dequantize(const plan_object *plan, const call *c, PyObject *const *args, dequantize_views *v) {
    qz_dequantize_args job; /* set below, as far as its arrays have axes */
    job.format = qz_find_mode(plan->op->mode);
    job.group_slot = 0;
    const qz_format *format = &qz_formats[job.format];
    ptrdiff_t shape[QZ_MAX_DIMS];
    int as_ml = 0;
    if (qz_take_global_scale(c, format, args[3], &job.global_scale) < 0) return NULL;
    if (qz_take_float_type(c, "dtype", args[4], QZ_F32, &job.product_type, &as_ml) < 0) return NULL;
    if (qz_take_profile(c, args[5], &job.profile) < 0) return NULL;
    if (qz_take_stored_fp(c, args + 1, format, &v->codes, &v->scales) < 0) return NULL;
    const int last = v->codes.array.ndim - 1;
    memcpy(shape, v->codes.array.shape, (size_t)last * sizeof *shape);
    if (qz_take_length(c, args[6], v->scales.array.shape[last], format->group_sizes[0], &shape[last]) < 0) return NULL;
    ptrdiff_t count = qz_checked_count(c, "out", shape, last + 1);
    const wanted want = {"out", job.product_type, as_ml, last + 1, shape};
    const named_view inputs[] = {{"w", &v->codes}, {"scales", &v->scales}};
    if (count < 0 || qz_take_result(&v->w, &v->result, c, args[7], &want) < 0) return NULL;
    if (qz_refuse_overlap(c, "out", &v->w, inputs, 2) < 0) return NULL;
    if (args[3] != Py_None) job.product_type = QZ_F32; /* where MLX's CPU multiplies by it, it computes in float32 */
    qz_copy_array(&job.codes, &v->codes.array);
    qz_copy_array(&job.scales, &v->scales.array);
    qz_copy_array(&job.biases, &v->scales.array); /* as in quantize */
    qz_copy_array(&job.w, &v->w.array);
    if (qz_run_operation(plan, dequantize_operation, &job, (double)count * 0.5) < 0) return NULL;
    return Py_NewRef(v->result);
}

/* dequantize_fp(plan, w, scales, global_scale, dtype, profile, k, out) */
PyObject *qz_py_dequantize_fp(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    dequantize_views v;
    view *const all[] = {&v.codes, &v.scales, &v.w};
    call c;
    if (qz_check_count("dequantize_fp", count, 8) < 0) return NULL;
    const plan_object *plan = qz_take_plan(module, args[0], OP_DEQUANTIZE_FP);
    if (!plan || qz_open_call(&c, module, plan, Py_None) < 0) return NULL;
    v.result = NULL;
    for (int i = 0; i < 3; i++) qz_open_view(all[i]);
    PyObject *result = dequantize(plan, &c, args, &v);
    for (int i = 0; i < 3; i++) qz_release(all[i]);
    Py_XDECREF(v.result);
    qz_close_call();
    return result;
}
