/* Checks of plain values, errors, and the call itself. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "binding.h"

int qz_raise(PyObject *type, const char *op, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    PyObject *message = PyUnicode_FromFormatV(format, arguments);
    va_end(arguments);
    if (message) PyErr_Format(type, "%s: %U", op, message);
    Py_XDECREF(message);
    return -1;
}

PyObject *qz_shape_text(const ptrdiff_t *shape, int ndim) {
    PyObject *tuple = PyTuple_New(ndim), *text = NULL;
    for (int i = 0; tuple && i < ndim; i++) {
        PyObject *size = PyLong_FromSsize_t(shape[i]);
        if (!size || PyTuple_SetItem(tuple, i, size) < 0) Py_CLEAR(tuple);
    }
    if (tuple) text = PyObject_Repr(tuple);
    Py_XDECREF(tuple);
    return text;
}

int qz_check_count(const char *function, Py_ssize_t got, Py_ssize_t expected) {
    if (got == expected) return 0;
    PyErr_Format(PyExc_TypeError, "%s takes %zd positional arguments, got %zd", function, expected, got);
    return -1;
}

/* A call may come from within another, by way of an object's __array__ and its like. Each holds kilobytes of views on
 * the stack, of which Python's own limit knows nothing: its thousand calls would overflow it. */
enum { MAX_CALLS_WITHIN_CALLS = 64 };
static _Thread_local int open_calls;

int qz_open_call(call *c, PyObject *module, const plan_object *plan, PyObject *input_dtype) {
    static const char *const words[] = {"bfloat16"};
    c->state = PyModule_GetState(module);
    c->op = plan->op->name;
    c->takes_input_dtype = input_dtype != NULL;
    c->raw_bfloat16 = input_dtype && input_dtype != Py_None;
    if (c->raw_bfloat16 && qz_take_word(c, "input_dtype", input_dtype, words, 1) < 0) return -1;
    if (open_calls == MAX_CALLS_WITHIN_CALLS) {
        return qz_raise(PyExc_RecursionError, c->op, "more than %d calls within each other", MAX_CALLS_WITHIN_CALLS);
    }
    open_calls++;
    return 0;
}

void qz_close_call(void) { open_calls--; }

static PyObject *type_name(PyObject *object) { return PyType_GetName(Py_TYPE(object)); }

/* "name must be what, got a type" */
static int raise_kind(const call *c, const char *name, const char *what, PyObject *object) {
    PyObject *kind = type_name(object);
    if (kind) qz_raise(PyExc_TypeError, c->op, "%s must be %s, got %U", name, what, kind);
    Py_XDECREF(kind);
    return -1;
}

/* A bool is an int, and NumPy's an index before NumPy 2; its name is bool_ there. */
static int is_boolean(PyObject *object) {
    PyObject *kind = PyBool_Check(object) ? NULL : type_name(object);
    int is = !kind || PyUnicode_CompareWithASCIIString(kind, "bool_") == 0;
    Py_XDECREF(kind);
    return is;
}

int qz_take_integer(const call *c, const char *name, PyObject *object, ptrdiff_t *value, int *given) {
    *given = 0;
    if (object == Py_None) return 0;
    if (!PyLong_CheckExact(object) && (is_boolean(object) || !PyIndex_Check(object)))
        return raise_kind(c, name, "an integer", object);
    *value = PyLong_CheckExact(object) ? PyLong_AsSsize_t(object) : PyNumber_AsSsize_t(object, PyExc_OverflowError);
    if (*value == -1 && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_TypeError)) { /* such as an array, which has __index__ for one element */
            PyErr_Clear();
            return raise_kind(c, name, "an integer", object);
        }
        if (!PyErr_ExceptionMatches(PyExc_OverflowError)) return -1;
        PyErr_Clear(); /* without the number: Python refuses to print those of 4300 digits */
        return qz_raise(PyExc_ValueError, c->op, "%s is out of range: it does not fit 64 bits", name);
    }
    *given = 1;
    return 0;
}

int qz_take_number(const call *c, const char *name, PyObject *object, float *value) {
    const int is_number = !PyUnicode_Check(object) && !PyBytes_Check(object) && !PyBool_Check(object);
    PyObject *number = is_number ? PyNumber_Float(object) : NULL;
    if (!number) {
        if (PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_OverflowError)) {
            PyErr_Clear();
            return qz_raise(PyExc_ValueError, c->op, "%s is out of range: it does not fit a float", name);
        }
        if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_TypeError)) return -1;
        PyErr_Clear();
        return raise_kind(c, name, "a number", object);
    }
    *value = (float)PyFloat_AsDouble(number);
    Py_DECREF(number);
    return 0;
}

int qz_take_flag(const call *c, const char *name, PyObject *object) {
    PyObject *kind = PyBool_Check(object) ? NULL : type_name(object);
    /* NumPy's is named bool_ before NumPy 2, then bool */
    const int is_flag = PyBool_Check(object) || (kind && (PyUnicode_CompareWithASCIIString(kind, "bool") == 0 ||
                                                          PyUnicode_CompareWithASCIIString(kind, "bool_") == 0));
    Py_XDECREF(kind);
    if (PyErr_Occurred()) return -1;
    return is_flag ? PyObject_IsTrue(object) : raise_kind(c, name, "True or False", object);
}

int qz_take_word(const call *c, const char *name, PyObject *object, const char *const *words, int count) {
    char list[128] = "";
    if (!PyUnicode_Check(object)) return raise_kind(c, name, "a string", object);
    for (int i = 0; i < count; i++) {
        if (PyUnicode_CompareWithASCIIString(object, words[i]) == 0) return i;
        size_t used = strlen(list);
        snprintf(list + used, sizeof list - used, i ? " or '%s'" : "'%s'", words[i]);
    }
    return qz_raise(PyExc_ValueError, c->op, "%s must be %s, got %R", name, list, object);
}

/* 0 if an object says that it is a dtype of the other byte order, of which the name tells nothing. */
static int is_native(PyObject *object) {
    PyObject *native = PyObject_GetAttrString(object, "isnative");
    int is = native != Py_False;
    if (!native) PyErr_Clear();
    Py_XDECREF(native);
    return is;
}

/* The first `choices` of three. */
static int take_type(const call *c, const char *name, PyObject *object, int choices, qz_type otherwise, qz_type *type,
                     int *ml) {
    static const char *const words[] = {"float32", "float16", "bfloat16"};
    static const qz_type types[] = {QZ_F32, QZ_F16, QZ_BF16};
    *type = otherwise;
    if (object == Py_None) return 0;
    if (!is_native(object))
        return qz_raise(PyExc_ValueError, c->op, "%s must have this machine's byte order, got %S", name, object);
    PyObject *word = PyUnicode_Check(object) ? PyObject_Str(object) : PyObject_GetAttrString(object, "name");
    if (!word || !PyUnicode_Check(word)) { /* numpy.float32 and its like have a dtype's name as __name__ */
        PyErr_Clear();
        Py_XDECREF(word);
        word = PyObject_GetAttrString(object, "__name__");
    }
    if (!word || !PyUnicode_Check(word)) {
        PyErr_Clear();
        Py_XDECREF(word);
        return raise_kind(c, name, "a dtype or its name", object);
    }
    int index = qz_take_word(c, name, word, words, choices);
    Py_DECREF(word);
    if (index < 0) return -1;
    *type = types[index];
    *ml |= *type == QZ_BF16 && !PyUnicode_Check(object);
    return 0;
}

int qz_take_float_type(const call *c, const char *name, PyObject *object, qz_type otherwise, qz_type *type, int *ml) {
    return take_type(c, name, object, 3, otherwise, type, ml);
}

int qz_take_norm_type(const call *c, const char *name, PyObject *object, qz_type *type) {
    int unused = 0;
    return take_type(c, name, object, 2, QZ_F16, type, &unused);
}

/* The distinct values of one column of formats.def for a mode, as text; `bits` 0: of the widths, else of that width's
 * group sizes. */
static void list_choices(const char *mode, ptrdiff_t bits, char *text, size_t size) {
    size_t used = 0;
    int last = 0;
    text[0] = '\0';
    for (;;) { /* in rising order */
        int next = 0;
        for (int row = 0; row < QZ_FORMATS; row++) {
            if (strcmp(qz_formats[row].mode, mode) != 0 || (bits && qz_formats[row].bits != bits)) continue;
            for (int slot = 0; slot < QZ_GROUP_SLOTS; slot++) {
                int value = bits ? qz_formats[row].group_sizes[slot] : qz_formats[row].bits;
                if (value > last && (!next || value < next)) next = value;
            }
        }
        if (!next || used >= size) return;
        used += (size_t)snprintf(text + used, size - used, used ? ", %d" : "%d", next);
        last = next;
    }
}

int qz_take_format(const call *c, const char *mode, ptrdiff_t bits, ptrdiff_t group_size, int *slot) {
    char list[96];
    int row = qz_find_format(mode, bits, group_size, slot);
    if (row >= 0) return row;
    list_choices(mode, bits > 0 ? bits : -1, list, sizeof list);
    if (list[0]) return qz_raise(PyExc_ValueError, c->op, "group_size must be one of %s, got %zd", list, group_size);
    list_choices(mode, 0, list, sizeof list);
    return qz_raise(PyExc_ValueError, c->op, "bits must be one of %s, got %zd", list, bits);
}

qz_type qz_promote(qz_type a, qz_type b) {
    if (a == QZ_F64) a = QZ_F32;
    if (b == QZ_F64) b = QZ_F32;
    return a == b ? a : QZ_F32;
}

const char *qz_type_name(qz_type type) {
    static const char *const names[] = {[QZ_F32] = "float32", [QZ_F16] = "float16", [QZ_BF16] = "bfloat16",
                                        [QZ_F64] = "float64", [QZ_U32] = "uint32",  [QZ_U8] = "uint8",
                                        [QZ_E8M0] = "uint8",  [QZ_E4M3] = "uint8"};
    return names[type];
}

ptrdiff_t qz_type_size(qz_type type) {
    static const ptrdiff_t sizes[] = {[QZ_F32] = 4, [QZ_F16] = 2, [QZ_BF16] = 2, [QZ_F64] = 8,
                                      [QZ_U32] = 4, [QZ_U8] = 1,  [QZ_E8M0] = 1, [QZ_E4M3] = 1};
    return sizes[type];
}

/* No memory holds so many elements, but arrays with strides of 0 may claim to. What is derived from one size then fits
 * too: at most 8 rows of scratch (csrc/cpu/matmul.c), each of at most 16 bytes for an element. */
static const ptrdiff_t max_count = PTRDIFF_MAX / 1024;

ptrdiff_t qz_checked_count(const call *c, const char *name, const ptrdiff_t *shape, int ndim) {
    ptrdiff_t count = 1;
    int overflows = 0, empty = 0;
    for (int i = 0; i < ndim; i++) { /* as in NumPy, the other axes of an empty array must be possible too */
        empty |= shape[i] == 0;
        if (shape[i] != 0) overflows |= __builtin_mul_overflow(count, shape[i], &count);
    }
    if (!overflows && count <= max_count) return empty ? 0 : count;
    PyObject *text = qz_shape_text(shape, ndim);
    if (text) qz_raise(PyExc_ValueError, c->op, "%s of shape %U is too large", name, text);
    Py_XDECREF(text);
    return -1;
}

/* Lets Python handle signals; the GIL is held only for that. */
static int poll_signals(void *context) {
    PyThreadState **saved = context;
    PyEval_RestoreThread(*saved);
    int stop = PyErr_CheckSignals();
    *saved = PyEval_SaveThread();
    return stop;
}

int qz_run_operation(const plan_object *plan, qz_operation operation, const void *args, double work) {
    const double worth_releasing_the_gil = 10e3;
    qz_run run = {plan->threads, NULL, NULL};
    qz_status status;
    if (work < worth_releasing_the_gil) {
        run.threads = 1;
        status = operation(&plan->plan, args, &run);
    } else {
        PyThreadState *saved = PyEval_SaveThread();
        run.poll = poll_signals;
        run.poll_context = &saved;
        status = operation(&plan->plan, args, &run);
        PyEval_RestoreThread(saved);
    }
    if (status == QZ_NO_MEMORY) PyErr_NoMemory();
    if (status == QZ_INTERRUPTED && !PyErr_Occurred()) { /* threads.h: a signal handler forked, and this is the child */
        qz_raise(PyExc_RuntimeError, plan->op->name, "the process forked during the call: its result is incomplete");
    }
    return status == QZ_OK ? 0 : -1;
}
