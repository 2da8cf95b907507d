#include <string.h>

#include "binding.h"

static qz_status operation(const qz_plan *plan, const void *args, const qz_run *run) {
    return plan->device->matmul(plan, args, run);
}

/* The arguments of matmul() by name. */
typedef struct arguments {
    PyObject *x, *const *stored, *output_features, *group_size, *bits, *accumulate, *activations, *out;
} arguments;

typedef struct views {
    view x, w, scales, biases, y;
    PyObject *result;
} views;

/* x as a matrix: a vector is a matrix of one row, and so is its result. */
static void make_matrix(qz_array *array) {
    if (array->ndim != 1) return;
    array->ndim = 2;
    array->shape[1] = array->shape[0];
    array->strides[1] = array->strides[0];
    array->shape[0] = 1;
    array->strides[0] = 0;
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

/* Gives `array` the batch dimensions `batch` before its last `own` ones, with stride 0 where it is repeated. 0 if they
 * do not broadcast. */
static int broadcast(qz_array *array, int own, int batch_dims, const ptrdiff_t *batch) {
    int missing = batch_dims + own - array->ndim;
    qz_array to = {array->data, array->type, batch_dims + own, {0}, {0}};
    for (int i = 0; i < to.ndim; i++) {
        int from = i - missing;
        to.shape[i] = from >= 0 ? array->shape[from] : 1;
        to.strides[i] = from >= 0 ? array->strides[from] : 0;
        if (i >= batch_dims || to.shape[i] == batch[i]) continue;
        if (to.shape[i] != 1) return 0;
        to.shape[i] = batch[i];
        to.strides[i] = 0;
    }
    *array = to;
    return 1;
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

/* K and N, checked against each other: what x, w and output_features say. Returns the row of formats.def or -1. */
static int check_sizes(const call *c, const arguments *a, const plan_object *plan, const views *v, packing *p,
                       int *slot, ptrdiff_t *outputs) {
    const qz_array *x = &v->x.array, *w = &v->w.array;
    const int transpose = plan->op->transpose;
    ptrdiff_t k = x->shape[x->ndim - 1], rows = w->shape[w->ndim - 2], words = w->shape[w->ndim - 1];
    ptrdiff_t groups = v->scales.array.shape[w->ndim - 1], features = -1;
    int given;
    if (qz_take_integer(c, "output_features", a->output_features, &features, &given) < 0) return -1;
    if (given && features < 0)
        return qz_raise(PyExc_ValueError, c->op, "output_features must not be negative, got %zd", features);
    int row = qz_infer_packing(p, c, plan->op->mode, words, groups, transpose ? k : features, slot);
    if (row < 0) return -1;
    ptrdiff_t along = groups * p->group_size; /* the axis that is packed */
    *outputs = transpose ? rows : along;
    if (k != (transpose ? along : rows)) {
        return qz_raise(PyExc_ValueError, c->op, "x.shape[-1] must be %zd, the input features of w, got %zd",
                        transpose ? along : rows, k);
    }
    if (given && features != *outputs) {
        return qz_raise(PyExc_ValueError, c->op, "output_features must be %zd, the output features of w, got %zd",
                        *outputs, features);
    }
    return row;
}

/* The digits of x that count: csrc/kernels/fixed_point.h. */
static int take_digits(const call *c, const arguments *a, const qz_array *x) {
    static const char *const accumulates[] = {"exact"}, *const activations[] = {"int8"};
    if (qz_take_word(c, "accumulate", a->accumulate, accumulates, 1) < 0) return -1;
    if (a->activations != Py_None) return qz_take_word(c, "activations", a->activations, activations, 1) < 0 ? -1 : 1;
    return x->type == QZ_F16 || x->type == QZ_BF16 ? 2 : 3;
}

/* The result's shape: the batch, then [M, N], without M if x is a vector. */
static int take_result(views *v, const call *c, PyObject *out, qz_type type, int dims, const ptrdiff_t *batch,
                       int is_vector, ptrdiff_t m, ptrdiff_t n) {
    ptrdiff_t shape[QZ_MAX_DIMS];
    int ndim = dims;
    memcpy(shape, batch, (size_t)dims * sizeof *shape);
    if (!is_vector) shape[ndim++] = m;
    shape[ndim++] = n;
    if (qz_take_result(&v->y, &v->result, c, "out", out, type, ndim, shape) < 0) return -1;
    const struct {
        const char *name;
        const view *view;
    } inputs[] = {{"x", &v->x}, {"w", &v->w}, {"scales", &v->scales}, {"biases", &v->biases}};
    for (int i = 0; i < 4; i++) {
        if (qz_refuse_overlap(c, "out", &v->y, inputs[i].name, inputs[i].view) < 0) return -1;
    }
    return 0;
}

/* y with its M axis, also where it was left out. */
static void insert_row_axis(qz_array *y) {
    const int last = y->ndim - 1;
    y->ndim++;
    y->shape[last + 1] = y->shape[last];
    y->strides[last + 1] = y->strides[last];
    y->shape[last] = 1;
    y->strides[last] = 0;
}

static PyObject *multiply(const plan_object *plan, const call *c, const arguments *a, views *v) {
    qz_matmul_args job = {.transpose = plan->op->transpose};
    packing p = {0};
    ptrdiff_t batch[QZ_MAX_DIMS], outputs = 0;
    if (qz_take_packing(&p, c, a->group_size, a->bits) < 0 || qz_take_floats(&v->x, c, "x", a->x) < 0) return NULL;
    if (qz_take_stored(c, a->stored, &v->w, &v->scales, &v->biases) < 0) return NULL;
    if (v->x.array.ndim < 1 || v->w.array.ndim < 2) return raise_dimensions(c, &v->x, &v->w), NULL;
    job.x = v->x.array, job.w = v->w.array, job.scales = v->scales.array, job.biases = v->biases.array;
    const int is_vector = job.x.ndim == 1;
    make_matrix(&job.x);
    job.digits = take_digits(c, a, &job.x);
    if (job.digits < 0) return NULL;
    job.format = check_sizes(c, a, plan, v, &p, &job.group_slot, &outputs);
    int dims = job.format < 0 ? -1 : join_batches(c, &job.x, &job.w, batch);
    if (dims < 0) return NULL;
    ptrdiff_t m = job.x.shape[job.x.ndim - 2], k = job.x.shape[job.x.ndim - 1];
    qz_type type = qz_promote(qz_promote(job.x.type, job.scales.type), job.biases.type);
    if (take_result(v, c, a->out, type, dims, batch, is_vector, m, outputs) < 0) return NULL;
    job.y = v->y.array;
    if (is_vector) insert_row_axis(&job.y);
    broadcast(&job.x, 2, dims, batch);
    broadcast(&job.w, 2, dims, batch);
    broadcast(&job.scales, 2, dims, batch);
    broadcast(&job.biases, 2, dims, batch);
    double work = (double)qz_checked_count(c, "out", v->y.array.shape, v->y.array.ndim) * (double)k * 0.1;
    if (qz_run_operation(plan, operation, &job, work) < 0) return NULL;
    int as_ml = v->x.is_ml_dtype || v->scales.is_ml_dtype || v->biases.is_ml_dtype;
    PyObject *result = v->result;
    v->result = NULL;
    return qz_finish_result(c, result, type, as_ml, a->out);
}

/* matmul(plan, x, w, scales, biases, output_features, group_size, bits, accumulate, activations, out, input_dtype) */
PyObject *qz_py_matmul(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    views v = {0};
    call c;
    if (qz_check_count("matmul", count, 12) < 0) return NULL;
    const plan_object *plan = qz_take_plan(module, args[0], OP_MATMUL);
    if (!plan || qz_open_call(&c, module, plan, args[11]) < 0) return NULL;
    arguments a = {args[1], args + 2, args[5], args[6], args[7], args[8], args[9], args[10]};
    PyObject *result = multiply(plan, &c, &a, &v);
    qz_release(&v.x);
    qz_release(&v.w);
    qz_release(&v.scales);
    qz_release(&v.biases);
    qz_release(&v.y);
    Py_XDECREF(v.result);
    return result;
}
