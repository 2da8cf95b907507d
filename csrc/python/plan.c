/* Compiled kernels: an operation bound to a device and an ISA. */
#include <string.h>

#include "../cpu/select.h"
#include "binding.h"

static const op_row ops[] = {
    {"affine_quantize", OP_QUANTIZE, "affine", 0, 0},
    {"affine_dequantize", OP_DEQUANTIZE, "affine", 0, 0},
    {"affine_qmm_t", OP_MATMUL, "affine", 1, 0},
    {"affine_qmm_n", OP_MATMUL, "affine", 0, 1},
    {"affine_qmv", OP_MATMUL, "affine", 1, 1},
    {"affine_qvm", OP_MATMUL, "affine", 0, 1},
    {"affine_gather_qmm", OP_GATHER, "affine", 0, 0},
    {"affine_gather_qmm_rhs", OP_GATHER_RHS, "affine", 0, 0},
    {"affine_qmm_t_nax", OP_MATMUL, "affine", 1, 0},
    {"affine_qmm_n_nax", OP_MATMUL, "affine", 0, 1},
    {"affine_gather_qmm_rhs_nax", OP_GATHER_RHS, "affine", 0, 0},
    {"mxfp4_quantize", OP_QUANTIZE_FP, "mxfp4", 0, 0},
    {"mxfp4_dequantize", OP_DEQUANTIZE_FP, "mxfp4", 0, 0},
    {"mxfp8_quantize", OP_QUANTIZE_FP, "mxfp8", 0, 0},
    {"mxfp8_dequantize", OP_DEQUANTIZE_FP, "mxfp8", 0, 0},
    {"nvfp4_quantize", OP_QUANTIZE_FP, "nvfp4", 0, 0},
    {"nvfp4_dequantize", OP_DEQUANTIZE_FP, "nvfp4", 0, 0},
    {"mxfp4_qmm_t", OP_MATMUL_FP, "mxfp4", 1, 0},
    {"mxfp4_qmm_n", OP_MATMUL_FP, "mxfp4", 0, 1},
    {"mxfp4_qmv", OP_MATMUL_FP, "mxfp4", 1, 1},
    {"mxfp4_qvm", OP_MATMUL_FP, "mxfp4", 0, 1},
    {"mxfp4_gather_qmm", OP_GATHER_FP, "mxfp4", 0, 0},
    {"mxfp4_gather_qmm_rhs", OP_GATHER_RHS_FP, "mxfp4", 0, 0},
    {"mxfp8_qmm_t", OP_MATMUL_FP, "mxfp8", 1, 0},
    {"mxfp8_qmm_n", OP_MATMUL_FP, "mxfp8", 0, 1},
    {"mxfp8_qmv", OP_MATMUL_FP, "mxfp8", 1, 1},
    {"mxfp8_qvm", OP_MATMUL_FP, "mxfp8", 0, 1},
    {"mxfp8_gather_qmm", OP_GATHER_FP, "mxfp8", 0, 0},
    {"mxfp8_gather_qmm_rhs", OP_GATHER_RHS_FP, "mxfp8", 0, 0},
    {"nvfp4_qmm_t", OP_MATMUL_FP, "nvfp4", 1, 0},
    {"nvfp4_qmm_n", OP_MATMUL_FP, "nvfp4", 0, 1},
    {"nvfp4_qmv", OP_MATMUL_FP, "nvfp4", 1, 1},
    {"nvfp4_qvm", OP_MATMUL_FP, "nvfp4", 0, 1},
    {"nvfp4_gather_qmm", OP_GATHER_FP, "nvfp4", 0, 0},
    {"nvfp4_gather_qmm_rhs", OP_GATHER_RHS_FP, "nvfp4", 0, 0},
    {"to_fp8", OP_TO_FP8, NULL, 0, 0},
    {"from_fp8", OP_FROM_FP8, NULL, 0, 0},
    {"fwht", OP_FWHT, NULL, 0, 0},
    {"hadamard_quantize_kv", OP_HADAMARD_KV, NULL, 0, 0},
    {"hadamard_quantize_kv_seq", OP_HADAMARD_KV_SEQ, NULL, 0, 0},
    {"hadamard_quantize_kv_hb", OP_HADAMARD_KV_HB, NULL, 0, 0},
    {"quantize_kv", OP_QUANTIZE_KV, NULL, 0, 0},
    {"dequantize_kv", OP_DEQUANTIZE_KV, NULL, 0, 0},
    {"kv_attention", OP_KV_ATTENTION, NULL, 0, 0},
    {"quantize", OP_FAKE_QUANTIZE, NULL, 0, 0},
};

static const qz_device *const devices[] = {&qz_cpu_device, &qz_metal_device};
enum { OPS = sizeof ops / sizeof *ops, DEVICES = sizeof devices / sizeof *devices };

static const op_row *find_op(const char *name) {
    for (int i = 0; i < OPS; i++) {
        if (strcmp(ops[i].name, name) == 0) return &ops[i];
    }
    char list[2048] = "";
    for (int i = 0; i < OPS; i++) {
        size_t used = strlen(list);
        PyOS_snprintf(list + used, sizeof list - used, "%s%s", i ? ", " : "", ops[i].name);
    }
    qz_raise(PyExc_ValueError, "Plan", "there is no operation '%s'; there are %s", name, list);
    return NULL;
}

static const qz_device *find_device(const char *name) {
    for (int i = 0; i < DEVICES; i++) {
        if (strcmp(devices[i]->name, name) != 0) continue;
        const char *why_not = devices[i]->unavailable();
        if (!why_not) return devices[i];
        PyErr_Format(PyExc_RuntimeError, "device '%s' is %s; 'cpu' and 'auto' would work", name, why_not);
        return NULL;
    }
    PyErr_Format(PyExc_RuntimeError, "there is no device '%s'; 'cpu' and 'auto' would work", name);
    return NULL;
}

/* "a, b, c", the ISAs that this machine has. */
static void list_isas(char *text, size_t size) {
    char why[256];
    text[0] = '\0';
    for (int i = 0; i < QZ_ISA_COUNT; i++) {
        if (qz_isa_unavailable(&qz_isas[i], why, sizeof why)) continue;
        if (text[0]) strncat(text, ", ", size - strlen(text) - 1);
        strncat(text, qz_isas[i].name, size - strlen(text) - 1);
    }
}

static const qz_kernels *find_kernels(const char *isa) {
    char why[256], list[128];
    if (!isa || strcmp(isa, "auto") == 0) return qz_best_kernels();
    for (int i = 0; i < QZ_ISA_COUNT; i++) {
        if (strcmp(qz_isas[i].name, isa) != 0) continue;
        if (!qz_isa_unavailable(&qz_isas[i], why, sizeof why)) return qz_isas[i].kernels;
        list_isas(list, sizeof list);
        PyErr_Format(PyExc_RuntimeError, "ISA '%s' is not available: %s; here are %s", isa, why, list);
        return NULL;
    }
    list_isas(list, sizeof list);
    PyErr_Format(PyExc_RuntimeError, "there is no ISA '%s'; here are %s", isa, list);
    return NULL;
}

/* The UTF-8 text of a string; `otherwise` if the object is NULL or None. -1 with an exception set. */
static int take_text(const call *c, const char *name, PyObject *object, const char *otherwise, const char **text) {
    *text = otherwise;
    if (!object || object == Py_None) return 0;
    if (PyUnicode_Check(object)) {
        Py_ssize_t size;
        *text = PyUnicode_AsUTF8AndSize(object, &size);
        if (!*text || strlen(*text) == (size_t)size) return *text ? 0 : -1;
        return qz_raise(PyExc_ValueError, c->op, "%s must not contain null characters, got %R", name, object);
    }
    PyObject *kind = PyType_GetName(Py_TYPE(object));
    if (kind) qz_raise(PyExc_TypeError, c->op, "%s must be a string, got %U", name, kind);
    Py_XDECREF(kind);
    return -1;
}

static PyObject *plan_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"op", "device", "isa", "threads", NULL};
    PyObject *op_object, *device_object = NULL, *isa_object = NULL, *threads_object = Py_None;
    const char *op_name, *device_name, *isa;
    const call c = {.op = "Plan"};
    ptrdiff_t threads = 0;
    int given;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "U|OOO:Plan", names, &op_object, &device_object, &isa_object,
                                     &threads_object) ||
        take_text(&c, "op", op_object, NULL, &op_name) < 0 ||
        take_text(&c, "device", device_object, "auto", &device_name) < 0 ||
        take_text(&c, "isa", isa_object, NULL, &isa) < 0 ||
        qz_take_integer(&c, "threads", threads_object, &threads, &given) < 0)
        return NULL;
    const op_row *op = find_op(op_name);
    if (!op) return NULL;
    const qz_device *device = strcmp(device_name, "auto") == 0 ? &qz_cpu_device : find_device(device_name);
    const qz_kernels *kernels = device ? find_kernels(isa) : NULL;
    if (!kernels) return NULL;
    if (threads < 0 || threads > 1024) {
        return PyErr_Format(PyExc_ValueError, "Plan: threads must be between 1 and 1024 (0: the default), got %zd",
                            threads);
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    plan_object *self = (plan_object *)allocate(type, 0);
    if (!self) return NULL;
    self->plan = (qz_plan){device, kernels};
    self->op = op;
    self->threads = (int)threads;
    return (PyObject *)self;
}

static void plan_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyObject *plan_variant(PyObject *object, void *unused) {
    const plan_object *self = (const plan_object *)object;
    (void)unused;
    switch (self->op->kind) {
    case OP_MATMUL_FP:
    case OP_GATHER_FP:
    case OP_GATHER_RHS_FP:
        if (strcmp(qz_formats[qz_find_mode(self->op->mode)].element, "fp8_e4m3") == 0)
            return PyUnicode_FromString("exact, fused float32 sums in one order");
        /* fall through */
    case OP_MATMUL:
    case OP_GATHER:
    case OP_GATHER_RHS: return PyUnicode_FromFormat("exact, %s", self->plan.kernels->matmul_note);
    case OP_TO_FP8:
    case OP_FROM_FP8: return PyUnicode_FromString("float32, by element");
    case OP_HADAMARD_KV:
    case OP_HADAMARD_KV_SEQ:
    case OP_HADAMARD_KV_HB:
    case OP_QUANTIZE_KV:
    case OP_DEQUANTIZE_KV:
    case OP_FWHT: return PyUnicode_FromString("float32, by row");
    case OP_KV_ATTENTION: return PyUnicode_FromString("float32, fused sums in one order");
    case OP_FAKE_QUANTIZE: return PyUnicode_FromString("streaming stores for large arrays");
    default: return PyUnicode_FromString("float32, by group");
    }
}

static PyObject *plan_isa(PyObject *self, void *unused) {
    (void)unused;
    return PyUnicode_FromString(((const plan_object *)self)->plan.kernels->name);
}

static PyObject *plan_device(PyObject *self, void *unused) {
    (void)unused;
    return PyUnicode_FromString(((const plan_object *)self)->plan.device->name);
}

static PyObject *plan_op(PyObject *self, void *unused) {
    (void)unused;
    return PyUnicode_FromString(((const plan_object *)self)->op->name);
}

static PyObject *plan_threads(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromLong(((const plan_object *)self)->threads);
}

static PyObject *plan_repr(PyObject *object) {
    const plan_object *self = (const plan_object *)object;
    PyObject *variant = plan_variant(object, NULL), *text = NULL;
    if (variant) {
        text = PyUnicode_FromFormat("<Plan %s: device %s, isa %s, %U>", self->op->name, self->plan.device->name,
                                    self->plan.kernels->name, variant);
    }
    Py_XDECREF(variant);
    return text;
}

static PyGetSetDef plan_getset[] = {
    {"op", plan_op, NULL, "The operation.", NULL},
    {"device", plan_device, NULL, "The device it runs on.", NULL},
    {"isa", plan_isa, NULL, "The instruction set whose kernels it uses.", NULL},
    {"variant", plan_variant, NULL, "How it computes, in words.", NULL},
    {"threads", plan_threads, NULL, "The most threads it uses; 0: get_num_threads().", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot plan_slots[] = {
    {Py_tp_doc, "Plan(op, device='auto', isa=None, threads=0)\n--\n\nAn operation bound to a device and an ISA."},
    {Py_tp_new, plan_new},
    {Py_tp_dealloc, plan_dealloc},
    {Py_tp_repr, plan_repr},
    {Py_tp_getset, plan_getset},
    {0, NULL},
};

PyType_Spec qz_plan_spec = {
    .name = "quantization._C.Plan",
    .basicsize = sizeof(plan_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = plan_slots,
};

const plan_object *qz_take_plan(PyObject *module, PyObject *object, op_kind kind) {
    static const char *const kinds[] = {
        [OP_QUANTIZE] = "affine_quantize",
        [OP_DEQUANTIZE] = "affine_dequantize",
        [OP_MATMUL] = "affine_qmm_t",
        [OP_GATHER] = "affine_gather_qmm",
        [OP_GATHER_RHS] = "affine_gather_qmm_rhs",
        [OP_FAKE_QUANTIZE] = "quantize",
        [OP_QUANTIZE_FP] = "mxfp4_quantize",
        [OP_DEQUANTIZE_FP] = "mxfp4_dequantize",
        [OP_MATMUL_FP] = "mxfp4_qmm_t",
        [OP_GATHER_FP] = "mxfp4_gather_qmm",
        [OP_GATHER_RHS_FP] = "mxfp4_gather_qmm_rhs",
        [OP_TO_FP8] = "to_fp8",
        [OP_FROM_FP8] = "from_fp8",
        [OP_FWHT] = "fwht",
        [OP_HADAMARD_KV] = "hadamard_quantize_kv",
        [OP_HADAMARD_KV_SEQ] = "hadamard_quantize_kv_seq",
        [OP_HADAMARD_KV_HB] = "hadamard_quantize_kv_hb",
        [OP_QUANTIZE_KV] = "quantize_kv",
        [OP_DEQUANTIZE_KV] = "dequantize_kv",
        [OP_KV_ATTENTION] = "kv_attention",
    };
    const module_state *state = PyModule_GetState(module);
    if (Py_TYPE(object) == state->plan_type) {
        const plan_object *plan = (const plan_object *)object;
        if (plan->op->kind == kind || kind == OP_ANY) return plan;
        PyErr_Format(PyExc_TypeError, "the plan is for %s, here one for %s or its like is needed", plan->op->name,
                     kinds[kind]);
        return NULL;
    }
    PyErr_Format(PyExc_TypeError, "the first argument must be a Plan, got %R", Py_TYPE(object));
    return NULL;
}

/* ---- lists ---- */

/* Appends a dict and takes its reference; frees the list on failure. */
static int append(PyObject **list, PyObject *item) {
    int status = item ? PyList_Append(*list, item) : -1;
    Py_XDECREF(item);
    if (status < 0) Py_CLEAR(*list);
    return status;
}

static PyObject *as_tuple(PyObject *list) {
    PyObject *tuple = list ? PyList_AsTuple(list) : NULL;
    Py_XDECREF(list);
    return tuple;
}

static PyObject *group_sizes_of(const qz_format *format) {
    PyObject *list = PyList_New(0);
    for (int slot = 0; list && slot < QZ_GROUP_SLOTS; slot++) {
        if (format->group_sizes[slot] && append(&list, PyLong_FromLong(format->group_sizes[slot])) < 0) break;
    }
    return as_tuple(list);
}

PyObject *qz_list_formats(PyObject *module, PyObject *unused) {
    PyObject *list = PyList_New(0);
    (void)module, (void)unused;
    for (int i = 0; list && i < QZ_FORMATS; i++) {
        const qz_format *f = &qz_formats[i];
        PyObject *sizes = group_sizes_of(f);
        PyObject *item = sizes
                             ? Py_BuildValue("{s:s,s:s,s:s,s:s,s:i,s:O,s:s,s:O}", "name", f->name, "family", f->family,
                                             "mode", f->mode, "element", f->element, "bits", f->bits, "group_sizes",
                                             sizes, "scale", f->scale, "bias", f->bias ? Py_True : Py_False)
                             : NULL;
        Py_XDECREF(sizes);
        append(&list, item);
    }
    return as_tuple(list);
}

PyObject *qz_list_isas(PyObject *module, PyObject *unused) {
    PyObject *list = PyList_New(0);
    char why[256];
    (void)module, (void)unused;
    for (int i = 0; list && i < QZ_ISA_COUNT; i++) {
        const char *reason = qz_isa_unavailable(&qz_isas[i], why, sizeof why);
        const char *dot = qz_isas[i].kernels ? qz_isas[i].kernels->probe.dot_name : NULL;
        append(&list, Py_BuildValue("{s:s,s:O,s:z,s:z}", "name", qz_isas[i].name, "available",
                                    reason ? Py_False : Py_True, "reason", reason, "dot", dot));
    }
    return as_tuple(list);
}

PyObject *qz_list_ops(PyObject *module, PyObject *unused) {
    PyObject *list = PyList_New(0);
    (void)module, (void)unused;
    for (int i = 0; list && i < OPS; i++) append(&list, PyUnicode_FromString(ops[i].name));
    return as_tuple(list);
}

PyObject *qz_list_devices(PyObject *module, PyObject *unused) {
    PyObject *list = PyList_New(0);
    (void)module, (void)unused;
    for (int i = 0; list && i < DEVICES; i++) {
        const char *reason = devices[i]->unavailable();
        append(&list, Py_BuildValue("{s:s,s:O,s:z}", "name", devices[i]->name, "available", reason ? Py_False : Py_True,
                                    "reason", reason));
    }
    return as_tuple(list);
}

PyObject *qz_explain_cpu_features(PyObject *module, PyObject *unused) {
    char text[256];
    (void)module, (void)unused;
    qz_explain_cpu(text, sizeof text);
    return PyUnicode_FromString(text);
}
