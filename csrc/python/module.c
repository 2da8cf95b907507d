/* The module quantization._C: its functions and its state. */
#include "../cpu/scratch.h"
#include "../cpu/threads.h"
#include "binding.h"

/* A number of threads; -1 with an exception set. */
static int take_threads(const char *op, PyObject *argument) {
    call c = {.op = op};
    ptrdiff_t threads = 0;
    int given;
    if (qz_take_integer(&c, "n", argument, &threads, &given) < 0) return -1;
    if (!given) return qz_raise(PyExc_TypeError, op, "n must be an integer, got None");
    if (threads < 1 || threads > 1024)
        return qz_raise(PyExc_ValueError, op, "n must be between 1 and 1024, got %zd", threads);
    return (int)threads;
}

static PyObject *py_set_num_threads(PyObject *module, PyObject *argument) {
    int threads = argument == Py_None ? 0 : take_threads("set_num_threads", argument);
    (void)module;
    return threads < 0 ? NULL : PyLong_FromLong(qz_set_num_threads(threads));
}

static PyObject *py_check_num_threads(PyObject *module, PyObject *argument) {
    int threads = take_threads("threads", argument);
    (void)module;
    return threads < 0 ? NULL : PyLong_FromLong(threads);
}

static PyObject *py_get_num_threads(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyLong_FromLong(qz_get_num_threads());
}

static PyObject *py_explain_num_threads(PyObject *module, PyObject *unused) {
    char text[512];
    (void)module, (void)unused;
    qz_explain_num_threads(text, sizeof text);
    return PyUnicode_FromString(text);
}

static PyObject *py_compiler(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
#ifdef __clang__
    return PyUnicode_FromString("clang " __clang_version__);
#else
    return PyUnicode_FromString("gcc " __VERSION__);
#endif
}

static PyObject *py_fail_allocations_after(PyObject *module, PyObject *argument) {
    long successes = PyLong_AsLong(argument);
    (void)module;
    if (successes == -1 && PyErr_Occurred()) return NULL;
    qz_fail_scratch_after((int)successes);
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"quantize", (PyCFunction)(void (*)(void))qz_py_quantize, METH_FASTCALL,
     "quantize($module, plan, w, group_size, bits, profile, scale_dtype, pad, out, input_dtype, /)\n--\n\nPacks "
     "groups."},
    {"dequantize", (PyCFunction)(void (*)(void))qz_py_dequantize, METH_FASTCALL,
     "dequantize($module, plan, w, scales, biases, group_size, bits, dtype, profile, k, out, input_dtype, /)\n--\n\n"
     "Unpacks groups."},
    {"quantize_fp", (PyCFunction)(void (*)(void))qz_py_quantize_fp, METH_FASTCALL,
     "quantize_fp($module, plan, w, profile, mx_scale, global_scale, pad, out, input_dtype, /)\n--\n\nPacks groups."},
    {"dequantize_fp", (PyCFunction)(void (*)(void))qz_py_dequantize_fp, METH_FASTCALL,
     "dequantize_fp($module, plan, w, scales, global_scale, dtype, profile, k, out, /)\n--\n\nUnpacks groups."},
    {"matmul", (PyCFunction)(void (*)(void))qz_py_matmul, METH_FASTCALL,
     "matmul($module, plan, x, w, scales, biases, output_features, group_size, bits, accumulate, activations, out, "
     "input_dtype, /)\n--\n\nMultiplies by packed weights."},
    {"gather", (PyCFunction)(void (*)(void))qz_py_gather, METH_FASTCALL,
     "gather($module, plan, x, w, scales, biases, lhs_indices, rhs_indices, transpose, group_size, bits, "
     "sorted_indices, accumulate, activations, out, input_dtype, /)\n--\n\nMultiplies matrices by packed weights "
     "that indices choose."},
    {"gather_rhs", (PyCFunction)(void (*)(void))qz_py_gather_rhs, METH_FASTCALL,
     "gather_rhs($module, plan, x, w, scales, biases, indices, output_features, group_size, bits, transpose, "
     "accumulate, activations, out, input_dtype, /)\n--\n\nMultiplies rows by packed weights that indices choose."},
    {"matmul_fp", (PyCFunction)(void (*)(void))qz_py_matmul_fp, METH_FASTCALL,
     "matmul_fp($module, plan, x, w, scales, output_features, global_scale, accumulate, activations, out, "
     "input_dtype, /)\n--\n\nMultiplies by packed weights."},
    {"gather_fp", (PyCFunction)(void (*)(void))qz_py_gather_fp, METH_FASTCALL,
     "gather_fp($module, plan, x, w, scales, lhs_indices, rhs_indices, transpose, sorted_indices, global_scale, "
     "accumulate, activations, out, input_dtype, /)\n--\n\nMultiplies matrices by packed weights that indices choose."},
    {"gather_rhs_fp", (PyCFunction)(void (*)(void))qz_py_gather_rhs_fp, METH_FASTCALL,
     "gather_rhs_fp($module, plan, x, w, scales, indices, output_features, transpose, global_scale, accumulate, "
     "activations, out, input_dtype, /)\n--\n\nMultiplies rows by packed weights that indices choose."},
    {"fake_quantize", (PyCFunction)(void (*)(void))qz_py_fake_quantize, METH_FASTCALL,
     "fake_quantize($module, plan, x, bits, out, input_dtype, /)\n--\n\nRounds to a grid."},
    {"to_fp8", (PyCFunction)(void (*)(void))qz_py_to_fp8, METH_FASTCALL,
     "to_fp8($module, plan, x, out, input_dtype, /)\n--\n\nRounds floats to FP8."},
    {"from_fp8", (PyCFunction)(void (*)(void))qz_py_from_fp8, METH_FASTCALL,
     "from_fp8($module, plan, x, dtype, out, /)\n--\n\nWidens FP8 to floats."},
    {"fwht", (PyCFunction)(void (*)(void))qz_py_fwht, METH_FASTCALL,
     "fwht($module, plan, x, signs, inverse, out, input_dtype, /)\n--\n\nRotates rows."},
    {"hadamard_quantize_kv", (PyCFunction)(void (*)(void))qz_py_hadamard_quantize_kv, METH_FASTCALL,
     "hadamard_quantize_kv($module, plan, src, packed, norms, write_pos, is_sliding, scale_factor_d512, rms_scratch, "
     "/)\n--\n\nEncodes one position."},
    {"hadamard_quantize_kv_seq", (PyCFunction)(void (*)(void))qz_py_hadamard_quantize_kv_seq, METH_FASTCALL,
     "hadamard_quantize_kv_seq($module, plan, src, packed, norms, write_pos_start, n_tokens, src_tok_offset, "
     "is_sliding, scale_factor_d512, /)\n--\n\nEncodes several positions."},
    {"hadamard_quantize_kv_hb", (PyCFunction)(void (*)(void))qz_py_hadamard_quantize_kv_hb, METH_FASTCALL,
     "hadamard_quantize_kv_hb($module, plan, src, packed, norms, write_pos, codebook_bits, is_sliding, "
     "scale_factor_d512, /)\n--\n\nEncodes one position, a byte per code."},
    {"quantize_kv", (PyCFunction)(void (*)(void))qz_py_quantize_kv, METH_FASTCALL,
     "quantize_kv($module, plan, x, bits, scale, norms_dtype, out, input_dtype, /)\n--\n\nEncodes rows."},
    {"dequantize_kv", (PyCFunction)(void (*)(void))qz_py_dequantize_kv, METH_FASTCALL,
     "dequantize_kv($module, plan, packed, norms, bits, codec, rotated, scale_factor_d512, out, /)\n--\n\nDecodes "
     "rows."},
    {"kv_attention", (PyCFunction)(void (*)(void))qz_py_kv_attention, METH_FASTCALL,
     "kv_attention($module, plan, q, k_cache, v_cache, bits, value_bits, codec, length, start, scale, mask, causal, "
     "window, softcap, scale_factor_d512, out, input_dtype, /)\n--\n\nAttends to packed keys and values."},
    {"probe", (PyCFunction)(void (*)(void))qz_py_probe, METH_FASTCALL,
     "probe($module, plan, what, source, target, repeats, /)\n--\n\nDoes a ceiling's work; returns how much."},
    {"formats", qz_list_formats, METH_NOARGS, "formats($module, /)\n--\n\nThe rows of formats.def."},
    {"isas", qz_list_isas, METH_NOARGS, "isas($module, /)\n--\n\nThe instruction sets, best first."},
    {"devices", qz_list_devices, METH_NOARGS, "devices($module, /)\n--\n\nThe devices, and why not."},
    {"ops", qz_list_ops, METH_NOARGS, "ops($module, /)\n--\n\nThe operations that a Plan can be made of."},
    {"cpu_features", qz_explain_cpu_features, METH_NOARGS, "cpu_features($module, /)\n--\n\nThe CPU's features."},
    {"compiler", py_compiler, METH_NOARGS, "compiler($module, /)\n--\n\nThe compiler of this build."},
    {"set_num_threads", py_set_num_threads, METH_O,
     "set_num_threads($module, n, /)\n--\n\nSets the limit and returns the former one."},
    {"check_num_threads", py_check_num_threads, METH_O,
     "check_num_threads($module, n, /)\n--\n\nReturns n as an int, or raises as threads(n) does."},
    {"get_num_threads", py_get_num_threads, METH_NOARGS, "get_num_threads($module, /)\n--\n\nThe present limit."},
    {"explain_num_threads", py_explain_num_threads, METH_NOARGS,
     "explain_num_threads($module, /)\n--\n\nWhere the limit comes from."},
    {"fail_allocations_after", py_fail_allocations_after, METH_O,
     "fail_allocations_after($module, n, /)\n--\n\nFor tests: the scratch allocation after the next n fails."},
    {NULL, NULL, 0, NULL},
};

static int take_numpy(module_state *state) {
    const struct {
        PyObject **to;
        const char *name;
    } wanted[] = {{&state->f32, "float32"}, {&state->f16, "float16"}, {&state->u16, "uint16"}, {&state->u8, "uint8"},
                  {&state->u32, "uint32"},  {&state->i32, "int32"},   {&state->f64, "float64"}};
    PyObject *numpy = PyImport_ImportModule("numpy");
    if (!numpy) return -1;
    state->ndarray = PyObject_GetAttrString(numpy, "ndarray");
    state->dtype_of_arrays = state->ndarray ? PyObject_GetAttrString(state->ndarray, "dtype") : NULL;
    if (state->dtype_of_arrays) {
        state->get_dtype = (descrgetfunc)PyType_GetSlot(Py_TYPE(state->dtype_of_arrays), Py_tp_descr_get);
        if (!state->get_dtype) PyErr_SetString(PyExc_ImportError, "numpy.ndarray.dtype must be a property");
    }
    state->empty = PyObject_GetAttrString(numpy, "empty");
    state->asarray = PyObject_GetAttrString(numpy, "asarray");
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        *wanted[i].to = PyObject_CallMethod(numpy, "dtype", "s", wanted[i].name);
    }
    Py_DECREF(numpy);
    return PyErr_Occurred() ? -1 : 0;
}

/* The variable that holds what the context managers ask for: made here, since every call reads it here. */
static int make_settings(PyObject *module, module_state *state) {
    PyObject *contextvars = PyImport_ImportModule("contextvars");
    PyObject *type = contextvars ? PyObject_GetAttrString(contextvars, "ContextVar") : NULL;
    PyObject *args = Py_BuildValue("(s)", "quantization_settings"),
             *default_none = Py_BuildValue("{sO}", "default", Py_None);
    if (type && args && default_none) state->settings = PyObject_Call(type, args, default_none);
    if (state->settings) state->get_settings = PyObject_GetAttrString(state->settings, "get");
    Py_XDECREF(contextvars);
    Py_XDECREF(type);
    Py_XDECREF(args);
    Py_XDECREF(default_none);
    return state->get_settings ? PyModule_AddObjectRef(module, "_settings", state->settings) : -1;
}

static int execute(PyObject *module) {
    module_state *state = PyModule_GetState(module);
    state->plan_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &qz_plan_spec, NULL);
    if (!state->plan_type || PyModule_AddType(module, state->plan_type) < 0) return -1;
    PyObject *kernel = PyType_FromModuleAndSpec(module, &qz_kernel_spec, NULL);
    int status = kernel ? PyModule_AddType(module, (PyTypeObject *)kernel) : -1;
    Py_XDECREF(kernel);
    if (status < 0 || make_settings(module, state) < 0 || qz_prepare_calls(state) < 0) return -1;
    return take_numpy(state);
}

enum { OWNED = offsetof(module_state, get_dtype) / sizeof(PyObject *) };
_Static_assert(offsetof(module_state, get_dtype) == OWNED * sizeof(PyObject *), "the state begins with references");

static int traverse(PyObject *module, visitproc visit, void *arg) {
    PyObject **owned = PyModule_GetState(module);
    for (int i = 0; i < OWNED; i++) Py_VISIT(owned[i]);
    return 0;
}

static int clear(PyObject *module) {
    PyObject **owned = PyModule_GetState(module);
    for (int i = 0; i < OWNED; i++) Py_CLEAR(owned[i]);
    return 0;
}

static void release(void *module) { clear(module); }

static PyModuleDef_Slot slots[] = {{Py_mod_exec, execute}, {0, NULL}};

struct PyModuleDef qz_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "quantization._C",
    .m_doc =
        "The C core of quantization. Use the functions of the package instead: these are the same with fewer comforts.",
    .m_size = sizeof(module_state),
    .m_methods = functions,
    .m_slots = slots,
    .m_traverse = traverse,
    .m_clear = clear,
    .m_free = release,
};

PyMODINIT_FUNC PyInit__C(void) { return PyModuleDef_Init(&qz_module); }
