#include "binding.h"

static qz_status operation(const qz_plan *plan, const void *args, const qz_run *run) {
    return plan->device->fake_quantize(plan, args, run);
}

/* Exactly the same elements at the same places. */
static int is_same_array(const qz_array *a, const qz_array *b) {
    if (a->data != b->data || a->type != b->type) return 0;
    for (int i = 0; i < a->ndim; i++) {
        if (a->shape[i] > 1 && a->strides[i] != b->strides[i]) return 0;
    }
    return 1;
}

static int quantize(const plan_object *plan, const call *c, view *x, view *y, PyObject **result, PyObject *out,
                    int bits) {
    const wanted want = {"out", QZ_F32, 0, x->array.ndim, x->array.shape};
    const named_view input = {"x", x};
    if (qz_take_result(y, result, c, out, &want) < 0) return -1;
    if (!is_same_array(&x->array, &y->array) && qz_refuse_overlap(c, "out", y, &input, 1) < 0) return -1;
    qz_fake_quantize_args args; /* as far as its arrays have axes */
    qz_copy_array(&args.x, &x->array);
    qz_copy_array(&args.y, &y->array);
    args.bits = bits;
    qz_make_row(&args.x);
    qz_make_row(&args.y);
    ptrdiff_t count = qz_checked_count(c, "x", args.x.shape, args.x.ndim);
    if (count < 0) return -1;
    return qz_run_operation(plan, operation, &args, (double)count * 0.25);
}

/* The width, from 1 to 16; -1 with an exception set. */
static int take_bits(const call *c, PyObject *object) {
    ptrdiff_t bits = 0;
    int given;
    if (qz_take_integer(c, "bits", object, &bits, &given) < 0) return -1;
    if (!given) return qz_raise(PyExc_TypeError, c->op, "bits must be an integer, got None");
    if (bits >= 1 && bits <= 16) return (int)bits;
    return qz_raise(PyExc_ValueError, c->op, "bits must be between 1 and 16, got %zd", bits);
}

/* fake_quantize(plan, x, bits, out, input_dtype) */
PyObject *qz_py_fake_quantize(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    view x, y;
    PyObject *result = NULL;
    int status = -1;
    call c;
    if (qz_check_count("fake_quantize", count, 5) < 0) return NULL;
    const plan_object *plan = qz_take_plan(module, args[0], OP_FAKE_QUANTIZE);
    if (!plan || qz_open_call(&c, module, plan, args[4]) < 0) return NULL;
    qz_open_view(&x);
    qz_open_view(&y);
    int bits = take_bits(&c, args[2]);
    if (bits > 0 && qz_take_floats(&x, &c, "x", args[1]) == 0) {
        status = quantize(plan, &c, &x, &y, &result, args[3], bits);
    }
    qz_release(&x);
    qz_release(&y);
    if (status < 0) Py_CLEAR(result);
    qz_close_call();
    return result;
}
