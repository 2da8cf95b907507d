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

/* `from` with the batch dimensions `batch`, which fit it, before its last two: stride 0 where it is repeated. */
static void broadcast(qz_array *to, const qz_array *from, int dims, const ptrdiff_t *batch) {
    const int missing = dims + 2 - from->ndim;
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

/* The digits of x that count (csrc/kernels/fixed_point.h), 0 for plain float32. */
static int take_digits(const call *c, const arguments *a, const qz_array *x) {
    static const char *const accumulates[] = {"exact", "float"}, *const activations[] = {"int8"};
    const int in_float = qz_take_word(c, "accumulate", a->accumulate, accumulates, 2);
    const int in_int8 = a->activations != Py_None;
    if (in_float < 0 || (in_int8 && qz_take_word(c, "activations", a->activations, activations, 1) < 0)) return -1;
    if (in_float && in_int8)
        return qz_raise(PyExc_ValueError, c->op, "activations='int8' needs accumulate='exact', got 'float'");
    if (in_float || in_int8) return in_float ? 0 : 1;
    return x->type == QZ_F16 || x->type == QZ_BF16 ? 2 : 3;
}

/* The result's shape: the batch, then [M, N], without M if x is a vector. */
static int take_result(views *v, const call *c, PyObject *out, int dims, const ptrdiff_t *batch, int is_vector,
                       ptrdiff_t outputs) {
    const qz_array *x = &v->x.array;
    const named_view inputs[] = {{"x", &v->x}, {"w", &v->w}, {"scales", &v->scales}, {"biases", &v->biases}};
    ptrdiff_t shape[QZ_MAX_DIMS];
    int ndim = dims;
    memcpy(shape, batch, (size_t)dims * sizeof *shape);
    if (!is_vector) shape[ndim++] = x->shape[x->ndim - 2];
    shape[ndim++] = outputs;
    qz_type type = qz_promote(qz_promote(x->type, v->scales.array.type), v->biases.array.type);
    int as_ml = v->x.is_ml_dtype || v->scales.is_ml_dtype || v->biases.is_ml_dtype;
    const wanted want = {"out", type, as_ml, ndim, shape};
    if (qz_take_result(&v->y, &v->result, c, out, &want) < 0) return -1;
    return qz_refuse_overlap(c, "out", &v->y, inputs, 4);
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
    qz_matmul_args job; /* set below, as far as its arrays have axes */
    packing p = {0};
    ptrdiff_t batch[QZ_MAX_DIMS], outputs = 0;
    if (qz_take_packing(&p, c, a->group_size, a->bits) < 0 || qz_take_floats(&v->x, c, "x", a->x) < 0) return NULL;
    if (qz_take_stored(c, a->stored, &v->w, &v->scales, &v->biases) < 0) return NULL;
    qz_array *x = &v->x.array, *y = &v->y.array;
    if (x->ndim < 1 || v->w.array.ndim < 2) return raise_dimensions(c, &v->x, &v->w), NULL;
    const int is_vector = x->ndim == 1;
    make_matrix(x);
    job.transpose = plan->op->transpose;
    job.digits = take_digits(c, a, x);
    if (job.digits < 0) return NULL;
    job.format = check_sizes(c, a, plan, v, &p, &job.group_slot, &outputs);
    int dims = job.format < 0 ? -1 : join_batches(c, x, &v->w.array, batch);
    if (dims < 0 || take_result(v, c, a->out, dims, batch, is_vector, outputs) < 0) return NULL;
    double work = (double)qz_checked_count(c, "out", y->shape, y->ndim) * (double)x->shape[x->ndim - 1] * 0.1;
    if (is_vector) insert_row_axis(y);
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

/* matmul(plan, x, w, scales, biases, output_features, group_size, bits, accumulate, activations, out, input_dtype) */
PyObject *qz_py_matmul(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    views v;
    view *const all[] = {&v.x, &v.w, &v.scales, &v.biases, &v.y};
    call c;
    if (qz_check_count("matmul", count, 12) < 0) return NULL;
    const plan_object *plan = qz_take_plan(module, args[0], OP_MATMUL);
    if (!plan || qz_open_call(&c, module, plan, args[11]) < 0) return NULL;
    arguments a = {args[1], args + 2, args[5], args[6], args[7], args[8], args[9], args[10]};
    v.result = NULL;
    for (int i = 0; i < 5; i++) qz_open_view(all[i]);
    PyObject *result = multiply(plan, &c, &a, &v);
    for (int i = 0; i < 5; i++) qz_release(all[i]);
    Py_XDECREF(v.result);
    qz_close_call();
    return result;
}
