#include "product.h"

#include <string.h>

static qz_status operation(const qz_plan *plan, const void *args, const qz_run *run) {
    return plan->device->matmul(plan, args, run);
}

static int raise_dimensions(const call *c, const view *x, const view *w) {
    PyObject *xs = qz_shape_text(x->array.shape, x->array.ndim), *ws = qz_shape_text(w->array.shape, w->array.ndim);
    if (xs && ws) {
        qz_raise(PyExc_ValueError, c->op, "x must have at least 1 dimension and w at least 2, got shapes %U and %U", xs,
                 ws);
    }
    Py_XDECREF(xs);
    Py_XDECREF(ws);
    return -1;
}

/* `from` with the batch dimensions `batch`, which fit it, before its last two: stride 0 where it is repeated. */
static void broadcast(qz_array *to, const qz_array *from, int dims, const ptrdiff_t *batch) {
    const int missing = dims + 2 - from->ndim;
    if (dims == 0) {
        qz_copy_array(to, from);
        return;
    }
    to->data = from->data;
    to->type = from->type;
    to->ndim = dims + 2;
    for (int i = 0; i < to->ndim; i++) {
        const int own = i - missing;
        to->shape[i] = i < dims ? batch[i] : from->shape[own];
        to->strides[i] = own >= 0 && from->shape[own] == to->shape[i] ? from->strides[own] : 0;
    }
}

/* The batch dimensions of x and w together, as NumPy broadcasts them. -1 with ValueError set. */
static int join_batches(const call *c, const qz_array *x, const qz_array *w, ptrdiff_t *batch) {
    int dims = (x->ndim > w->ndim ? x->ndim : w->ndim) - 2;
    for (int i = 0; i < dims; i++) {
        int xi = i - (dims + 2 - x->ndim), wi = i - (dims + 2 - w->ndim);
        ptrdiff_t a = xi >= 0 ? x->shape[xi] : 1, b = wi >= 0 ? w->shape[wi] : 1;
        batch[i] = a == 1 ? b : a;
        if (a == b || a == 1 || b == 1) continue;
        PyObject *xs = qz_shape_text(x->shape, x->ndim - 2), *ws = qz_shape_text(w->shape, w->ndim - 2);
        if (xs && ws)
            qz_raise(PyExc_ValueError, c->op, "the batch dimensions %U of x and %U of w do not broadcast", xs, ws);
        Py_XDECREF(xs);
        Py_XDECREF(ws);
        return -1;
    }
    return dims;
}

int qz_check_sizes(const call *c, const product_arguments *a, const char *mode, const product_views *v, packing *p,
                   int *slot, ptrdiff_t *outputs) {
    const qz_array *x = &v->x.array, *w = &v->w.array;
    const int transpose = a->transpose;
    ptrdiff_t k = x->shape[x->ndim - 1], rows = w->shape[w->ndim - 2], words = w->shape[w->ndim - 1];
    ptrdiff_t groups = v->scales.array.shape[w->ndim - 1], features = -1;
    int given;
    if (qz_take_integer(c, "output_features", a->output_features, &features, &given) < 0) return -1;
    if (given && features < 0)
        return qz_raise(PyExc_ValueError, c->op, "output_features must not be negative, got %zd", features);
    int row = qz_infer_packing(p, c, mode, words, groups, transpose ? k : features, slot);
    if (row < 0) return -1;
    const ptrdiff_t size = p->group_size, along = groups * size; /* the axis that is packed */
    const ptrdiff_t inputs = transpose ? along : rows;
    *outputs = transpose ? rows : given && qz_fits_groups(features, groups, size) ? features : along;
    if (k != inputs && !(transpose && qz_fits_groups(k, groups, size))) {
        return qz_raise(PyExc_ValueError, c->op, "x.shape[-1] must be %zd, the input features of w%s, got %zd", inputs,
                        transpose ? ", or less by less than a group if w was padded" : "", k);
    }
    if (given && features != *outputs) {
        return qz_raise(PyExc_ValueError, c->op, "output_features must be %zd, the output features of w%s, got %zd",
                        *outputs, transpose ? "" : ", or less by less than a group if w was padded", features);
    }
    return row;
}

int qz_take_weights(const call *c, const product_arguments *a, const char *mode, product_views *v, packing *p,
                    float *factor) {
    const qz_format *format = &qz_formats[qz_find_mode(mode)];
    float global_scale;
    *factor = 1.0f;
    if (format->bias) {
        if (qz_take_packing(p, c, a->group_size, a->bits) < 0) return -1;
        return qz_take_stored(c, a->stored, &v->w, &v->scales, &v->biases);
    }
    if (qz_take_global_scale(c, format, a->global_scale, &global_scale) < 0) return -1;
    if (qz_take_stored_fp(c, a->stored, format, &v->w, &v->scales) < 0) return -1;
    v->scales.array.type = strcmp(format->scale, "e8m0") == 0 ? QZ_E8M0 : QZ_E4M3;
    qz_copy_array(&v->biases.array, &v->scales.array);
    *p = (packing){format->group_sizes[0], format->bits, 1, 1};
    *factor = global_scale / 2688.0f;
    return 0;
}

int qz_take_digits(const call *c, const product_arguments *a, const char *mode, const qz_array *x) {
    const qz_format *format = &qz_formats[qz_find_mode(mode)];
    static const char *const accumulates[] = {"exact", "float"}, *const activations[] = {"int8"};
    const int is_exact = a->accumulate == c->state->exact; /* as it mostly is, without comparing letters */
    const int in_float = is_exact ? 0 : qz_take_word(c, "accumulate", a->accumulate, accumulates, 2);
    const int in_int8 = a->activations != Py_None;
    if (in_float < 0 || (in_int8 && qz_take_word(c, "activations", a->activations, activations, 1) < 0)) return -1;
    if (in_float && in_int8)
        return qz_raise(PyExc_ValueError, c->op, "activations='int8' needs accumulate='exact', got 'float'");
    if (!format->bias && strcmp(format->element, "fp8_e4m3") == 0) {
        if (in_int8)
            return qz_raise(PyExc_ValueError, c->op, "mode '%s' has no activations='int8': it would gain nothing",
                            format->mode);
        if (in_float) return 3; /* its exact class is of such sums */
    }
    if (in_float || in_int8) return in_float ? 0 : 1;
    return x->type == QZ_F16 || x->type == QZ_BF16 ? 2 : 3;
}

/* Scales of an affine format, not those of bytes. */
static int is_float(qz_type type) { return type != QZ_E8M0 && type != QZ_E4M3; }

int qz_take_product_result(product_views *v, const call *c, PyObject *out, int dims, const ptrdiff_t *batch,
                           int is_vector, ptrdiff_t outputs) {
    const qz_array *x = &v->x.array;
    const named_view inputs[] = {{"x", &v->x}, {"w", &v->w}, {"scales", &v->scales}, {"biases", &v->biases}};
    ptrdiff_t shape[QZ_MAX_DIMS];
    int ndim = dims;
    memcpy(shape, batch, (size_t)dims * sizeof *shape);
    if (!is_vector) shape[ndim++] = x->shape[x->ndim - 2];
    shape[ndim++] = outputs;
    qz_type type = qz_promote(x->type, x->type);
    int as_ml = v->x.is_ml_dtype;
    if (is_float(v->scales.array.type)) {
        type = qz_promote(qz_promote(x->type, v->scales.array.type), v->biases.array.type);
        as_ml |= v->scales.is_ml_dtype || v->biases.is_ml_dtype;
    }
    const wanted want = {"out", type, as_ml, ndim, shape};
    if (qz_take_result(&v->y, &v->result, c, out, &want) < 0) return -1;
    return qz_refuse_overlap(c, "out", &v->y, inputs, 4);
}

void qz_insert_row_axis(qz_array *array) {
    const int last = array->ndim - 1;
    array->ndim++;
    array->shape[last + 1] = array->shape[last];
    array->strides[last + 1] = array->strides[last];
    array->shape[last] = 1;
    array->strides[last] = 0;
}

static PyObject *multiply(const plan_object *plan, const call *c, const product_arguments *a, product_views *v) {
    qz_matmul_args job; /* set below, as far as its arrays have axes */
    packing p = {0};
    ptrdiff_t batch[QZ_MAX_DIMS], outputs = 0;
    if (qz_take_floats(&v->x, c, "x", a->x) < 0) return NULL;
    if (qz_take_weights(c, a, plan->op->mode, v, &p, &job.factor) < 0) return NULL;
    qz_array *x = &v->x.array, *y = &v->y.array;
    if (x->ndim < 1 || v->w.array.ndim < 2) return raise_dimensions(c, &v->x, &v->w), NULL;
    const int is_vector = x->ndim == 1;
    if (is_vector) qz_insert_row_axis(x);
    job.transpose = a->transpose;
    job.digits = qz_take_digits(c, a, plan->op->mode, x);
    if (job.digits < 0) return NULL;
    job.format = qz_check_sizes(c, a, plan->op->mode, v, &p, &job.group_slot, &outputs);
    int dims = job.format < 0 ? -1 : join_batches(c, x, &v->w.array, batch);
    if (dims < 0 || qz_take_product_result(v, c, a->out, dims, batch, is_vector, outputs) < 0) return NULL;
    double work = (double)x->shape[x->ndim - 1] * 0.1;
    for (int i = 0; i < y->ndim; i++) work *= (double)y->shape[i];
    if (is_vector) qz_insert_row_axis(y);
    broadcast(&job.x, x, dims, batch);
    broadcast(&job.w, &v->w.array, dims, batch);
    broadcast(&job.scales, &v->scales.array, dims, batch);
    broadcast(&job.biases, &v->biases.array, dims, batch);
    qz_copy_array(&job.y, y);
    if (qz_run_operation(plan, operation, &job, work) < 0) return NULL;
    PyObject *result = v->result;
    v->result = NULL;
    return result;
}

/* Opens and closes the views of a call. */
static PyObject *run_call(PyObject *module, const plan_object *plan, const product_arguments *a,
                          PyObject *input_dtype) {
    product_views v;
    view *const all[] = {&v.x, &v.w, &v.scales, &v.biases, &v.y};
    call c;
    if (qz_open_call(&c, module, plan, input_dtype) < 0) return NULL;
    v.result = NULL;
    for (int i = 0; i < 5; i++) qz_open_view(all[i]);
    PyObject *result = multiply(plan, &c, a, &v);
    for (int i = 0; i < 5; i++) qz_release(all[i]);
    Py_XDECREF(v.result);
    qz_close_call();
    return result;
}

/* matmul(plan, x, w, scales, biases, output_features, group_size, bits, accumulate, activations, out, input_dtype) */
PyObject *qz_py_matmul(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    if (qz_check_count("matmul", count, 12) < 0) return NULL;
    const plan_object *plan = qz_take_plan(module, args[0], OP_MATMUL);
    if (!plan) return NULL;
    const product_arguments a = {args[1], args + 2, args[5], args[6],  args[7],
                                 NULL,    args[8],  args[9], args[10], plan->op->transpose};
    return run_call(module, plan, &a, args[11]);
}

/* matmul_fp(plan, x, w, scales, output_features, global_scale, accumulate, activations, out, input_dtype) */
PyObject *qz_py_matmul_fp(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    if (qz_check_count("matmul_fp", count, 10) < 0) return NULL;
    const plan_object *plan = qz_take_plan(module, args[0], OP_MATMUL_FP);
    if (!plan) return NULL;
    const product_arguments a = {args[1], args + 2, args[4], NULL,    NULL,
                                 args[5], args[6],  args[7], args[8], plan->op->transpose};
    return run_call(module, plan, &a, args[9]);
}
