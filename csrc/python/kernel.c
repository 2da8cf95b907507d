/* Kernel: the base of the kernel classes, which answers their calls.
 *
 * A call of an object whose class defines __call__ in Python takes longer than a small operation: a tuple, a dict, two
 * look-ups, a frame and a second call. So Python only says what a call means, in a method `_call`. What is called
 * ordinarily, with positions and names that all fit, is bound here to the same operation; every other call, wrong ones
 * among them, goes to `_call`, so that Python's own rules and messages hold. */
#include <stddef.h>
#include <string.h>

#include "binding.h"
#include <structmember.h>

typedef struct kernel_object {
    PyObject_HEAD PyObject *plan; /* a Plan, or NULL: not yet compiled */
    PyObject *group_size, *bits;  /* what calls use that do not say; NULL: the class has none */
} kernel_object;

/* Numbers that stand for defaults which are none, and for 0. */
enum { ZERO = -3, FALSE = -2, TRUE = -1 };

/* Of parameters that are given by position alone: no keyword's name. */
#define BY_PLACE "/"

/* The parameters of each operation in the order in which its function in _C takes them, after the plan. */
static const struct parameter {
    const char *name, *word; /* the default: a word, */
    int number;              /* a number, TRUE or FALSE, or else None */
} parameters[OP_KINDS][QZ_MAX_PARAMETERS] = {
    [OP_QUANTIZE] = {{"w", NULL, 0},
                     {"group_size", NULL, 0},
                     {"bits", NULL, 0},
                     {"profile", "metal", 0},
                     {"scale_dtype", NULL, 0},
                     {"pad", NULL, FALSE},
                     {"out", NULL, 0},
                     {"input_dtype", NULL, 0}},
    [OP_DEQUANTIZE] = {{"w", NULL, 0},
                       {"scales", NULL, 0},
                       {"biases", NULL, 0},
                       {"group_size", NULL, 0},
                       {"bits", NULL, 0},
                       {"dtype", NULL, 0},
                       {"profile", "metal", 0},
                       {"k", NULL, 0},
                       {"out", NULL, 0},
                       {"input_dtype", NULL, 0}},
    [OP_MATMUL] = {{"x", NULL, 0},
                   {"w", NULL, 0},
                   {"scales", NULL, 0},
                   {"biases", NULL, 0},
                   {"output_features", NULL, 0},
                   {"group_size", NULL, 0},
                   {"bits", NULL, 0},
                   {"accumulate", "exact", 0},
                   {"activations", NULL, 0},
                   {"out", NULL, 0},
                   {"input_dtype", NULL, 0}},
    [OP_QUANTIZE_FP] = {{"w", NULL, 0},
                        {"profile", "metal", 0},
                        {"mx_scale", NULL, 0},
                        {"global_scale", NULL, 0},
                        {"pad", NULL, FALSE},
                        {"out", NULL, 0},
                        {"input_dtype", NULL, 0}},
    [OP_DEQUANTIZE_FP] = {{"w", NULL, 0},
                          {"scales", NULL, 0},
                          {"global_scale", NULL, 0},
                          {"dtype", NULL, 0},
                          {"profile", "metal", 0},
                          {"k", NULL, 0},
                          {"out", NULL, 0}},
    [OP_GATHER] = {{"x", NULL, 0},
                   {"w", NULL, 0},
                   {"scales", NULL, 0},
                   {"biases", NULL, 0},
                   {"lhs_indices", NULL, 0},
                   {"rhs_indices", NULL, 0},
                   {"transpose", NULL, TRUE},
                   {"group_size", NULL, 0},
                   {"bits", NULL, 0},
                   {"sorted_indices", NULL, FALSE},
                   {"accumulate", "exact", 0},
                   {"activations", NULL, 0},
                   {"out", NULL, 0},
                   {"input_dtype", NULL, 0}},
    [OP_GATHER_RHS] = {{"x", NULL, 0},
                       {"w", NULL, 0},
                       {"scales", NULL, 0},
                       {"biases", NULL, 0},
                       {"indices", NULL, 0},
                       {"output_features", NULL, 0},
                       {"group_size", NULL, 0},
                       {"bits", NULL, 0},
                       {"transpose", NULL, TRUE},
                       {"accumulate", "exact", 0},
                       {"activations", NULL, 0},
                       {"out", NULL, 0},
                       {"input_dtype", NULL, 0}},
    [OP_MATMUL_FP] = {{"x", NULL, 0},
                      {"w", NULL, 0},
                      {"scales", NULL, 0},
                      {"output_features", NULL, 0},
                      {"global_scale", NULL, 0},
                      {"accumulate", "exact", 0},
                      {"activations", NULL, 0},
                      {"out", NULL, 0},
                      {"input_dtype", NULL, 0}},
    [OP_GATHER_FP] = {{"x", NULL, 0},
                      {"w", NULL, 0},
                      {"scales", NULL, 0},
                      {"lhs_indices", NULL, 0},
                      {"rhs_indices", NULL, 0},
                      {"transpose", NULL, TRUE},
                      {"sorted_indices", NULL, FALSE},
                      {"global_scale", NULL, 0},
                      {"accumulate", "exact", 0},
                      {"activations", NULL, 0},
                      {"out", NULL, 0},
                      {"input_dtype", NULL, 0}},
    [OP_GATHER_RHS_FP] = {{"x", NULL, 0},
                          {"w", NULL, 0},
                          {"scales", NULL, 0},
                          {"indices", NULL, 0},
                          {"output_features", NULL, 0},
                          {"transpose", NULL, TRUE},
                          {"global_scale", NULL, 0},
                          {"accumulate", "exact", 0},
                          {"activations", NULL, 0},
                          {"out", NULL, 0},
                          {"input_dtype", NULL, 0}},
    [OP_TO_FP8] = {{"x", NULL, 0}, {"out", NULL, 0}, {"input_dtype", NULL, 0}},
    [OP_FROM_FP8] = {{"x", NULL, 0}, {"dtype", NULL, 0}, {"out", NULL, 0}},
    [OP_FWHT] =
        {{"x", NULL, 0}, {"signs", NULL, FALSE}, {"inverse", NULL, FALSE}, {"out", NULL, 0}, {"input_dtype", NULL, 0}},
    [OP_HADAMARD_KV] = {{BY_PLACE, NULL, 0},
                        {BY_PLACE, NULL, 0},
                        {BY_PLACE, NULL, 0},
                        {"write_pos", NULL, 0},
                        {"is_sliding", NULL, FALSE},
                        {"scale_factor_d512", NULL, 0},
                        {"rms_scratch", NULL, 0}},
    [OP_HADAMARD_KV_SEQ] = {{BY_PLACE, NULL, 0},
                            {BY_PLACE, NULL, 0},
                            {BY_PLACE, NULL, 0},
                            {"write_pos_start", NULL, 0},
                            {"n_tokens", NULL, 0},
                            {"src_tok_offset", NULL, ZERO},
                            {"is_sliding", NULL, FALSE},
                            {"scale_factor_d512", NULL, 0}},
    [OP_HADAMARD_KV_HB] = {{BY_PLACE, NULL, 0},
                           {BY_PLACE, NULL, 0},
                           {BY_PLACE, NULL, 0},
                           {"write_pos", NULL, 0},
                           {"codebook_bits", NULL, 0},
                           {"is_sliding", NULL, FALSE},
                           {"scale_factor_d512", NULL, 0}},
    [OP_QUANTIZE_KV] = {{"x", NULL, 0},
                        {"bits", NULL, 4},
                        {"scale", "unbiased", 0},
                        {"norms_dtype", NULL, 0},
                        {"out", NULL, 0},
                        {"input_dtype", NULL, 0}},
    [OP_DEQUANTIZE_KV] = {{"packed", NULL, 0},
                          {"norms", NULL, 0},
                          {"bits", NULL, 4},
                          {"codec", NULL, 2},
                          {"rotated", NULL, FALSE},
                          {"scale_factor_d512", NULL, 0},
                          {"out", NULL, 0}},
    [OP_KV_ATTENTION] = {{"q", NULL, 0},
                         {"k_cache", NULL, 0},
                         {"v_cache", NULL, 0},
                         {"bits", NULL, 4},
                         {"value_bits", NULL, 0},
                         {"codec", NULL, 2},
                         {"length", NULL, 0},
                         {"start", NULL, ZERO},
                         {"scale", NULL, 0},
                         {"mask", NULL, 0},
                         {"causal", NULL, FALSE},
                         {"window", NULL, 0},
                         {"softcap", NULL, 0},
                         {"scale_factor_d512", NULL, 0},
                         {"out", NULL, 0},
                         {"input_dtype", NULL, 0}},
    [OP_FAKE_QUANTIZE] = {{"x", NULL, 0}, {"bits", NULL, 4}, {"out", NULL, 0}, {"input_dtype", NULL, 0}},
};

/* How a kind of operation is called: how many parameters, the first ones, must be given, how many may be given by
 * position, and where group_size stands, with bits after it (-1: nowhere). */
static const struct manner {
    int required, positional, group_size;
    PyObject *(*function)(PyObject *module, PyObject *const *args, Py_ssize_t count);
} manners[OP_KINDS] = {
    [OP_QUANTIZE] = {1, 3, 1, qz_py_quantize},
    [OP_DEQUANTIZE] = {3, 5, 3, qz_py_dequantize},
    [OP_MATMUL] = {4, 7, 5, qz_py_matmul},
    [OP_GATHER] = {4, 9, 7, qz_py_gather},
    [OP_GATHER_RHS] = {5, 9, 6, qz_py_gather_rhs},
    [OP_FAKE_QUANTIZE] = {1, 2, -1, qz_py_fake_quantize},
    [OP_QUANTIZE_FP] = {1, 1, -1, qz_py_quantize_fp},
    [OP_DEQUANTIZE_FP] = {2, 2, -1, qz_py_dequantize_fp},
    [OP_MATMUL_FP] = {3, 4, -1, qz_py_matmul_fp},
    [OP_GATHER_FP] = {3, 6, -1, qz_py_gather_fp},
    [OP_GATHER_RHS_FP] = {4, 6, -1, qz_py_gather_rhs_fp},
    [OP_TO_FP8] = {1, 1, -1, qz_py_to_fp8},
    [OP_FROM_FP8] = {1, 1, -1, qz_py_from_fp8},
    [OP_FWHT] = {1, 1, -1, qz_py_fwht},
    [OP_HADAMARD_KV] = {4, 3, -1, qz_py_hadamard_quantize_kv},
    [OP_HADAMARD_KV_SEQ] = {4, 3, -1, qz_py_hadamard_quantize_kv_seq},
    [OP_HADAMARD_KV_HB] = {5, 3, -1, qz_py_hadamard_quantize_kv_hb},
    [OP_QUANTIZE_KV] = {1, 2, -1, qz_py_quantize_kv},
    [OP_DEQUANTIZE_KV] = {2, 3, -1, qz_py_dequantize_kv},
    [OP_KV_ATTENTION] = {3, 3, -1, qz_py_kv_attention},
};

/* The place of output_features, which functions qmm_t do not have, after the stored arrays; -1 where it is taken, or no
 * parameter at all. */
static int absent_place(const op_row *op) {
    if ((op->kind != OP_MATMUL && op->kind != OP_MATMUL_FP) || op->takes_output_features) return -1;
    return manners[op->kind].required;
}

/* Whether a parameter is one that only formats with the other kind of scales have. */
static int is_of_others(const op_row *op, int place) {
    const char *name = parameters[op->kind][place].name;
    const int of_e8m0 = strcmp(name, "mx_scale") == 0;
    if (!of_e8m0 && strcmp(name, "global_scale") != 0) return 0;
    return of_e8m0 != (strcmp(qz_formats[qz_find_mode(op->mode)].scale, "e8m0") == 0);
}

static PyObject *default_of(const struct parameter *p) {
    if (p->word) return PyUnicode_InternFromString(p->word);
    if (p->number == ZERO) return PyLong_FromLong(0);
    if (p->number < 0) return PyBool_FromLong(p->number == TRUE);
    return p->number ? PyLong_FromLong(p->number) : Py_NewRef(Py_None);
}

int qz_prepare_calls(module_state *state) {
    for (int kind = 0; kind < OP_KINDS; kind++) {
        for (int i = 0; i < QZ_MAX_PARAMETERS && parameters[kind][i].name; i++) {
            const struct parameter *p = &parameters[kind][i];
            state->names[kind][i] = PyUnicode_InternFromString(p->name);
            state->defaults[kind][i] = default_of(p);
            if (!state->names[kind][i] || !state->defaults[kind][i]) return -1;
            state->parameters[kind] = i + 1;
        }
    }
    state->exact = PyUnicode_InternFromString("exact");
    return state->exact ? 0 : -1;
}

/* The place of a keyword among the parameters; -1 if it is not found there, or if it is a string that is not interned,
 * as those that stand in a program are. */
static int place_of(PyObject *const *names, const PyObject *keyword) {
    for (int i = 0; i < QZ_MAX_PARAMETERS; i++) {
        if (names[i] == keyword) return i;
    }
    return -1;
}

/* Lays out borrowed references to the arguments as the operation's function takes them, after the plan in args[0].
 * Returns their number with the plan, or 0 for a call that Python has to judge. */
static Py_ssize_t bind(const kernel_object *self, const module_state *state, const op_row *op, PyObject *positions,
                       PyObject *keywords, PyObject **args) {
    const struct manner *manner = &manners[op->kind];
    PyObject *const *names = state->names[op->kind], *const *defaults = state->defaults[op->kind];
    const int absent = absent_place(op);
    const Py_ssize_t given = PyTuple_Size(positions);
    const int count = state->parameters[op->kind];
    PyObject **const values = args + 1, *keyword, *value;
    Py_ssize_t cursor = 0;
    uint32_t found = 0; /* the places of what was given */
    if (given + (absent >= 0) > manner->positional) return 0;
    memcpy(values, defaults, (size_t)count * sizeof *values);
    for (Py_ssize_t i = 0; i < given; i++) {
        const Py_ssize_t place = i + (absent >= 0 && i >= absent);
        values[place] = PyTuple_GetItem(positions, i);
        found |= 1u << place;
    }
    while (keywords && PyDict_Next(keywords, &cursor, &keyword, &value)) {
        int place = place_of(names, keyword);
        if (place < 0 || place == absent || found >> place & 1 || is_of_others(op, place)) return 0;
        values[place] = value;
        found |= 1u << place;
    }
    const uint32_t required = (1u << manner->required) - 1;
    if ((found & required) != required) return 0;
    if (manner->group_size >= 0) {
        PyObject **group_size = values + manner->group_size, **bits = group_size + 1;
        if (*group_size == Py_None && self->group_size) *group_size = self->group_size;
        if (*bits == Py_None && self->bits) *bits = self->bits;
    }
    return count + 1;
}

/* The plan for a call made now, a new reference: the kernel's own where no context manager is active. */
static PyObject *kernel_plan(PyObject *object, PyObject *unused) {
    const kernel_object *self = (const kernel_object *)object;
    (void)unused;
    if (self->plan) {
        const module_state *state = PyModule_GetState(PyType_GetModule(Py_TYPE(self->plan)));
        PyObject *settings = PyObject_CallNoArgs(state->get_settings);
        if (!settings) return NULL;
        Py_DECREF(settings);
        if (settings == Py_None) return Py_NewRef(self->plan);
    }
    return PyObject_CallMethod(object, "_find_plan", NULL);
}

static PyObject *call_in_python(PyObject *object, PyObject *positions, PyObject *keywords) {
    PyObject *method = PyObject_GetAttrString(object, "_call");
    PyObject *result = method ? PyObject_Call(method, positions, keywords) : NULL;
    Py_XDECREF(method);
    return result;
}

/* The module of a Plan, borrowed; NULL, and no exception of its own, if the object is NULL or none. */
static PyObject *module_of_plan(PyObject *object) {
    if (!object) return NULL;
    PyObject *module = PyType_GetModule(Py_TYPE(object));
    if (!module) PyErr_Clear();
    if (!module || PyModule_GetDef(module) != &qz_module) return NULL;
    const module_state *state = PyModule_GetState(module);
    return Py_TYPE(object) == state->plan_type ? module : NULL;
}

static PyObject *kernel_call(PyObject *object, PyObject *positions, PyObject *keywords) {
    PyObject *args[QZ_MAX_PARAMETERS + 1], *result = NULL;
    PyObject *plan = kernel_plan(object, NULL), *module = module_of_plan(plan);
    if (plan && !module) PyErr_SetString(PyExc_TypeError, "_find_plan must return a Plan");
    if (module) {
        const op_row *op = ((const plan_object *)plan)->op;
        args[0] = plan;
        Py_ssize_t count =
            bind((const kernel_object *)object, PyModule_GetState(module), op, positions, keywords, args);
        /* Whatever runs within the call may give the kernel another width, or change the dict. */
        for (Py_ssize_t i = 0; i < count; i++) Py_INCREF(args[i]);
        result = count ? manners[op->kind].function(module, args, count) : call_in_python(object, positions, keywords);
        for (Py_ssize_t i = 0; i < count; i++) Py_DECREF(args[i]);
    }
    Py_XDECREF(plan);
    return result;
}

/* ---- the type ---- */

static PyObject *get_plan(PyObject *object, void *unused) {
    PyObject *plan = ((const kernel_object *)object)->plan;
    (void)unused;
    return Py_NewRef(plan ? plan : Py_None);
}

static int set_plan(PyObject *object, PyObject *plan, void *unused) {
    kernel_object *self = (kernel_object *)object;
    (void)unused;
    if (!module_of_plan(plan)) {
        PyErr_SetString(PyExc_TypeError, "_kernel must be a Plan");
        return -1;
    }
    PyObject *former = self->plan;
    self->plan = Py_NewRef(plan);
    Py_XDECREF(former);
    return 0;
}

static int kernel_traverse(PyObject *object, visitproc visit, void *arg) {
    const kernel_object *self = (const kernel_object *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->plan);
    Py_VISIT(self->group_size);
    Py_VISIT(self->bits);
    return 0;
}

static int kernel_clear(PyObject *object) {
    kernel_object *self = (kernel_object *)object;
    Py_CLEAR(self->plan);
    Py_CLEAR(self->group_size);
    Py_CLEAR(self->bits);
    return 0;
}

static void kernel_dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    PyObject_GC_UnTrack(object);
    kernel_clear(object);
    release(object);
    Py_DECREF(type);
}

static PyMethodDef kernel_methods[] = {
    {"_plan", kernel_plan, METH_NOARGS, "_plan($self, /)\n--\n\nThe compiled kernel that a call made now uses."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef kernel_getset[] = {
    {"_kernel", get_plan, set_plan, "What compile() returned; None until then.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef kernel_members[] = {
    {"group_size", T_OBJECT_EX, offsetof(kernel_object, group_size), 0, "What calls use unless they say otherwise."},
    {"bits", T_OBJECT_EX, offsetof(kernel_object, bits), 0, "What calls use unless they say otherwise."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot kernel_slots[] = {
    {Py_tp_doc, "The base of the kernel classes: answers their calls."},
    {Py_tp_call, kernel_call},
    {Py_tp_dealloc, kernel_dealloc},
    {Py_tp_traverse, kernel_traverse},
    {Py_tp_clear, kernel_clear},
    {Py_tp_methods, kernel_methods},
    {Py_tp_getset, kernel_getset},
    {Py_tp_members, kernel_members},
    {0, NULL},
};

PyType_Spec qz_kernel_spec = {
    .name = "quantization._C.Kernel",
    .basicsize = sizeof(kernel_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = kernel_slots,
};
