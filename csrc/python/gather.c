/* Products of matrices that indices choose. */
#include <stdint.h>
#include <string.h>

#include "product.h"

static qz_status operation(const qz_plan *plan, const void *args, const qz_run *run) {
    return plan->device->gather(plan, args, run);
}

/* Indices into the flat batch of one operand. Where none are given they are the places of its batch, in its shape. */
typedef struct indices {
    view view;
    const int64_t *values; /* NULL: none are given */
} indices;

/* What is special to gathered products. */
typedef struct gather_views {
    product_views product;
    indices lhs, rhs;
    ptrdiff_t *places; /* of the matrices of x, then of w, for each matrix of the result */
} gather_views;

/* IndexError for the value at a place, in C order. */
static int raise_index(const call *c, const char *name, const indices *from, ptrdiff_t place, int is_unsigned,
                       const char *operand, ptrdiff_t bound) {
    const qz_array *a = &from->view.array;
    const int64_t value = from->values[place];
    ptrdiff_t at[QZ_MAX_DIMS];
    char where[QZ_MAX_DIMS * 22 + 3] = "";
    for (int i = a->ndim - 1; i >= 0; i--) {
        at[i] = place % a->shape[i];
        place /= a->shape[i];
    }
    for (int i = 0; i < a->ndim; i++) {
        const size_t used = strlen(where);
        PyOS_snprintf(where + used, sizeof where - used, "%s%zd%s", i ? ", " : "[", at[i], i == a->ndim - 1 ? "]" : "");
    }
    PyObject *text = is_unsigned ? PyLong_FromUnsignedLongLong((unsigned long long)value) : PyLong_FromLongLong(value);
    if (text && bound == 0) {
        qz_raise(PyExc_IndexError, c->op, "%s%s is %S, but %s has no matrices", name, where, text, operand);
    } else if (text) {
        qz_raise(PyExc_IndexError, c->op, "%s%s must be from %zd to %zd, as %s has %zd matrices, got %S", name, where,
                 -bound, bound - 1, operand, bound, text);
    }
    Py_XDECREF(text);
    return -1;
}

/* How many indices are looked at between two looks for signals: some milliseconds' worth. */
enum { PIECE = 1 << 20 };

/* Takes the indices into an operand's batch, all of them checked, once. Negative ones count from the end. */
static int take_indices(indices *to, const call *c, const char *name, PyObject *object, const char *operand_name,
                        const qz_array *operand) {
    const ptrdiff_t bound = qz_checked_count(c, operand_name, operand->shape, operand->ndim - 2);
    int is_unsigned;
    to->values = NULL;
    if (bound < 0) return -1;
    if (object == Py_None) {
        to->view.array.ndim = operand->ndim - 2;
        memcpy(to->view.array.shape, operand->shape, (size_t)to->view.array.ndim * sizeof *operand->shape);
        return 0;
    }
    if (qz_take_indices(&to->view, c, name, object, &is_unsigned) < 0) return -1;
    int64_t *values = (int64_t *)to->view.array.data;
    const ptrdiff_t count = to->view.buffer.len / (ptrdiff_t)sizeof *values;
    to->values = values;
    for (ptrdiff_t i = 0; i < count; i++) {
        if (i % PIECE == PIECE - 1 && PyErr_CheckSignals() < 0) return -1;
        const int below = values[i] < 0;
        if (below ? is_unsigned || values[i] < -bound : values[i] >= bound)
            return raise_index(c, name, to, i, is_unsigned, operand_name, bound);
        if (below) values[i] += bound;
    }
    return 0;
}

/* The shape of both indices together, as NumPy broadcasts them. Returns the number of dimensions, or -1 with ValueError
 * set. */
static int join_indices(const call *c, const char *const *names, const qz_array *a, const qz_array *b,
                        ptrdiff_t *shape) {
    const int ndim = a->ndim > b->ndim ? a->ndim : b->ndim;
    if (ndim > QZ_MAX_DIMS - 2) {
        return qz_raise(PyExc_ValueError, c->op, "%s and %s have %d dimensions, at most %d are supported", names[0],
                        names[1], ndim, QZ_MAX_DIMS - 2);
    }
    for (int i = 0; i < ndim; i++) {
        const int ai = i - (ndim - a->ndim), bi = i - (ndim - b->ndim);
        const ptrdiff_t an = ai >= 0 ? a->shape[ai] : 1, bn = bi >= 0 ? b->shape[bi] : 1;
        shape[i] = an == 1 ? bn : an;
        if (an == bn || an == 1 || bn == 1) continue;
        PyObject *as = qz_shape_text(a->shape, a->ndim), *bs = qz_shape_text(b->shape, b->ndim);
        if (as && bs) {
            qz_raise(PyExc_ValueError, c->op, "the shapes %U of %s and %U of %s do not broadcast", as, names[0], bs,
                     names[1]);
        }
        Py_XDECREF(as);
        Py_XDECREF(bs);
        return -1;
    }
    return ndim;
}

/* The indices for a broadcast shape, one after the other in C order. -1 if a signal's handler raised. */
static int spread(ptrdiff_t *to, const indices *from, int ndim, const ptrdiff_t *shape, ptrdiff_t count) {
    const qz_array *a = &from->view.array;
    ptrdiff_t steps[QZ_MAX_DIMS], at[QZ_MAX_DIMS] = {0}, step = 1, place = 0;
    for (int i = ndim - 1; i >= 0; i--) {
        const int own = i - (ndim - a->ndim);
        steps[i] = own >= 0 && a->shape[own] > 1 ? step : 0;
        if (own >= 0) step *= a->shape[own];
    }
    for (ptrdiff_t i = 0; i < count; i++) {
        if (i % PIECE == PIECE - 1 && PyErr_CheckSignals() < 0) return -1;
        to[i] = from->values ? (ptrdiff_t)from->values[place] : place;
        for (int axis = ndim - 1; axis >= 0; axis--) {
            place += steps[axis];
            if (++at[axis] < shape[axis]) break;
            place -= steps[axis] * shape[axis];
            at[axis] = 0;
        }
    }
    return 0;
}

/* Takes x and the stored arrays. In products of rows, x gets an axis of one row, which the result does not have. */
static int take_operands(const call *c, const product_arguments *a, const char *mode, product_views *v, packing *p,
                         float *factor, int of_rows) {
    const qz_array *x = &v->x.array, *w = &v->w.array;
    if (qz_take_floats(&v->x, c, "x", a->x) < 0 || qz_take_weights(c, a, mode, v, p, factor) < 0) return -1;
    const int least = of_rows ? 1 : 2;
    if (x->ndim >= least && w->ndim >= 2 && x->ndim + of_rows <= QZ_MAX_DIMS) {
        if (of_rows) qz_insert_row_axis(&v->x.array);
        return 0;
    }
    PyObject *xs = qz_shape_text(x->shape, x->ndim), *ws = qz_shape_text(w->shape, w->ndim);
    if (xs && ws) {
        qz_raise(PyExc_ValueError, c->op, "x must have %d to %d dimensions and w at least 2, got shapes %U and %U",
                 least, QZ_MAX_DIMS - of_rows, xs, ws);
    }
    Py_XDECREF(xs);
    Py_XDECREF(ws);
    return -1;
}

/* Runs the product, of which all is known but what the indices say. */
static int run(const plan_object *plan, gather_views *v, qz_gather_args *job, int ndim, const ptrdiff_t *shape) {
    ptrdiff_t count = 1;
    for (int i = 0; i < ndim; i++) count *= shape[i];
    v->places = PyMem_Malloc((size_t)count * 2 * sizeof *v->places);
    if (!v->places) return PyErr_NoMemory(), -1;
    if (spread(v->places, &v->lhs, ndim, shape, count) < 0) return -1;
    if (spread(v->places + count, &v->rhs, ndim, shape, count) < 0) return -1;
    job->lhs = v->places;
    job->rhs = v->places + count;
    job->count = count;
    const qz_array *x = &job->product.x, *y = &job->product.y;
    const double work = (double)count * (double)x->shape[x->ndim - 2] * (double)y->shape[y->ndim - 1] *
                        (double)x->shape[x->ndim - 1] * 0.1;
    return qz_run_operation(plan, operation, job, work);
}

static PyObject *gather(const plan_object *plan, const call *c, const product_arguments *a, PyObject *lhs,
                        PyObject *rhs, gather_views *views, int of_rows) {
    static const char *const both[] = {"lhs_indices", "rhs_indices"}, *const one[] = {"x.shape[:-1]", "indices"};
    const char *const *names = of_rows ? one : both;
    product_views *v = &views->product;
    qz_gather_args job; /* set below, as far as its arrays have axes */
    packing p = {0};
    if (of_rows && rhs == Py_None)
        return qz_raise(PyExc_TypeError, c->op, "indices must be an array of integers, got None"), NULL;
    ptrdiff_t shape[QZ_MAX_DIMS], outputs = 0;
    if (take_operands(c, a, plan->op->mode, v, &p, &job.product.factor, of_rows) < 0) return NULL;
    job.product.transpose = a->transpose;
    job.product.digits = qz_take_digits(c, a, plan->op->mode, &v->x.array);
    if (job.product.digits < 0) return NULL;
    job.product.format = qz_check_sizes(c, a, plan->op->mode, v, &p, &job.product.group_slot, &outputs);
    if (job.product.format < 0 || take_indices(&views->lhs, c, names[0], lhs, "x", &v->x.array) < 0) return NULL;
    if (take_indices(&views->rhs, c, names[1], rhs, "w", &v->w.array) < 0) return NULL;
    const int ndim = join_indices(c, names, &views->lhs.view.array, &views->rhs.view.array, shape);
    if (ndim < 0 || qz_take_product_result(v, c, a->out, ndim, shape, of_rows, outputs) < 0) return NULL;
    const ptrdiff_t elements = qz_checked_count(c, "out", v->y.array.shape, v->y.array.ndim);
    if (of_rows) qz_insert_row_axis(&v->y.array);
    qz_copy_array(&job.product.x, &v->x.array);
    qz_copy_array(&job.product.w, &v->w.array);
    qz_copy_array(&job.product.scales, &v->scales.array);
    qz_copy_array(&job.product.biases, &v->biases.array);
    qz_copy_array(&job.product.y, &v->y.array);
    if (elements > 0 && run(plan, views, &job, ndim, shape) < 0) return NULL;
    PyObject *result = v->result;
    v->result = NULL;
    return result;
}

static PyObject *open_gather(const plan_object *plan, const call *c, const product_arguments *a, PyObject *lhs,
                             PyObject *rhs, int of_rows) {
    gather_views v;
    product_views *p = &v.product;
    view *const all[] = {&p->x, &p->w, &p->scales, &p->biases, &p->y, &v.lhs.view, &v.rhs.view};
    enum { VIEWS = sizeof all / sizeof *all };
    v.places = NULL;
    p->result = NULL;
    for (int i = 0; i < VIEWS; i++) qz_open_view(all[i]);
    PyObject *result = a->transpose < 0 ? NULL : gather(plan, c, a, lhs, rhs, &v, of_rows);
    for (int i = 0; i < VIEWS; i++) qz_release(all[i]);
    PyMem_Free(v.places);
    Py_XDECREF(p->result);
    qz_close_call();
    return result;
}

/* gather(plan, x, w, scales, biases, lhs_indices, rhs_indices, transpose, group_size, bits, sorted_indices, accumulate,
 * activations, out, input_dtype). Whether indices are sorted is seen where they are sorted, so that nobody need trust
 * sorted_indices. */
PyObject *qz_py_gather(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    call c;
    if (qz_check_count("gather", count, 15) < 0) return NULL;
    const plan_object *plan = qz_take_plan(module, args[0], OP_GATHER);
    if (!plan || qz_open_call(&c, module, plan, args[14]) < 0) return NULL;
    product_arguments a = {args[1], args + 2, Py_None, args[8], args[9], NULL, args[11], args[12], args[13], 0};
    a.transpose = qz_take_flag(&c, "transpose", args[7]);
    if (a.transpose >= 0 && qz_take_flag(&c, "sorted_indices", args[10]) < 0) a.transpose = -1;
    return open_gather(plan, &c, &a, args[5], args[6], 0);
}

/* gather_rhs(plan, x, w, scales, biases, indices, output_features, group_size, bits, transpose, accumulate,
 * activations, out, input_dtype) */
PyObject *qz_py_gather_rhs(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    call c;
    if (qz_check_count("gather_rhs", count, 14) < 0) return NULL;
    const plan_object *plan = qz_take_plan(module, args[0], OP_GATHER_RHS);
    if (!plan || qz_open_call(&c, module, plan, args[13]) < 0) return NULL;
    product_arguments a = {args[1], args + 2, args[6], args[7], args[8], NULL, args[10], args[11], args[12], 0};
    a.transpose = qz_take_flag(&c, "transpose", args[9]);
    return open_gather(plan, &c, &a, Py_None, args[5], 1);
}

/* gather_fp(plan, x, w, scales, lhs_indices, rhs_indices, transpose, sorted_indices, global_scale, accumulate,
 * activations, out, input_dtype) */
PyObject *qz_py_gather_fp(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    call c;
    if (qz_check_count("gather_fp", count, 13) < 0) return NULL;
    const plan_object *plan = qz_take_plan(module, args[0], OP_GATHER_FP);
    if (!plan || qz_open_call(&c, module, plan, args[12]) < 0) return NULL;
    product_arguments a = {args[1], args + 2, Py_None, NULL, NULL, args[8], args[9], args[10], args[11], 0};
    a.transpose = qz_take_flag(&c, "transpose", args[6]);
    if (a.transpose >= 0 && qz_take_flag(&c, "sorted_indices", args[7]) < 0) a.transpose = -1;
    return open_gather(plan, &c, &a, args[4], args[5], 0);
}

/* gather_rhs_fp(plan, x, w, scales, indices, output_features, transpose, global_scale, accumulate, activations, out,
 * input_dtype) */
PyObject *qz_py_gather_rhs_fp(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    call c;
    if (qz_check_count("gather_rhs_fp", count, 12) < 0) return NULL;
    const plan_object *plan = qz_take_plan(module, args[0], OP_GATHER_RHS_FP);
    if (!plan || qz_open_call(&c, module, plan, args[11]) < 0) return NULL;
    product_arguments a = {args[1], args + 2, args[5], NULL, NULL, args[7], args[8], args[9], args[10], 0};
    a.transpose = qz_take_flag(&c, "transpose", args[6]);
    return open_gather(plan, &c, &a, Py_None, args[4], 1);
}
