/* Plain FP8 (E4M3): floats to bytes and back. */
#include "binding.h"

static qz_status operation(const qz_plan *plan, const void *args, const qz_run *run) {
    return plan->device->fp8(plan, args, run);
}

static int convert(const plan_object *plan, const call *c, const view *floats, const view *codes, int is_decoding) {
    qz_fp8_args args; /* as far as its arrays have axes */
    qz_copy_array(&args.floats, &floats->array);
    qz_copy_array(&args.codes, &codes->array);
    qz_make_row(&args.floats);
    qz_make_row(&args.codes);
    args.is_decoding = is_decoding;
    const ptrdiff_t count = qz_checked_count(c, "x", args.codes.shape, args.codes.ndim);
    return count < 0 ? -1 : qz_run_operation(plan, operation, &args, (double)count * 0.5);
}

/* The result, of x's shape, and the conversion. */
static int convert_to(const plan_object *plan, const call *c, view *x, view *y, PyObject **result, PyObject *out,
                      qz_type type, int as_ml) {
    const wanted want = {"out", type, as_ml, x->array.ndim, x->array.shape};
    const named_view input = {"x", x};
    if (qz_take_result(y, result, c, out, &want) < 0 || qz_refuse_overlap(c, "out", y, &input, 1) < 0) return -1;
    return type == QZ_U8 ? convert(plan, c, x, y, 0) : convert(plan, c, y, x, 1);
}

/* to_fp8(plan, x, out, input_dtype) */
PyObject *qz_py_to_fp8(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    view x, y;
    PyObject *result = NULL;
    call c;
    if (qz_check_count("to_fp8", count, 4) < 0) return NULL;
    const plan_object *plan = qz_take_plan(module, args[0], OP_TO_FP8);
    if (!plan || qz_open_call(&c, module, plan, args[3]) < 0) return NULL;
    qz_open_view(&x);
    qz_open_view(&y);
    int status = qz_take_floats(&x, &c, "x", args[1]);
    if (status == 0) status = convert_to(plan, &c, &x, &y, &result, args[2], QZ_U8, 0);
    qz_release(&x);
    qz_release(&y);
    if (status < 0) Py_CLEAR(result);
    qz_close_call();
    return result;
}

/* from_fp8(plan, x, dtype, out) */
PyObject *qz_py_from_fp8(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    view x, y;
    PyObject *result = NULL;
    qz_type type;
    int as_ml = 0;
    call c;
    if (qz_check_count("from_fp8", count, 4) < 0) return NULL;
    const plan_object *plan = qz_take_plan(module, args[0], OP_FROM_FP8);
    if (!plan || qz_open_call(&c, module, plan, Py_None) < 0) return NULL;
    qz_open_view(&x);
    qz_open_view(&y);
    int status = qz_take_float_type(&c, "dtype", args[2], QZ_F32, &type, &as_ml);
    if (status == 0) status = qz_take_byte_floats(&x, &c, "x", args[1], "fp8_e4m3");
    if (status == 0) status = convert_to(plan, &c, &x, &y, &result, args[3], type, as_ml);
    qz_release(&x);
    qz_release(&y);
    if (status < 0) Py_CLEAR(result);
    qz_close_call();
    return result;
}
