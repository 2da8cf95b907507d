/* Array arguments: the buffer protocol first, then ml_dtypes arrays by an integer view, then DLPack, then lists. */
#include <string.h>

#include "binding.h"

void qz_release(view *v) {
    if (v->has_buffer) PyBuffer_Release(&v->buffer);
    Py_CLEAR(v->owner);
    v->has_buffer = 0;
}

static const char float_kinds[] = "float32, float16, bfloat16 or float64";
static const char code_kinds[] = "uint32 (or int32 with the same bits)";

/* "name has dtype X, must be what", or for what has no dtype "name must be an array of what, got a list". */
static int raise_dtype(const call *c, const char *name, PyObject *object, const char *what) {
    PyObject *dtype = PyObject_GetAttrString(object, "dtype"), *text;
    if (!dtype) PyErr_Clear();
    text = dtype ? PyObject_Str(dtype) : PyType_GetName(Py_TYPE(object));
    if (text && dtype) {
        const char *hint = "";
        if (what == float_kinds && PyUnicode_CompareWithASCIIString(text, "uint16") == 0) {
            hint = c->takes_input_dtype ? " (input_dtype=\"bfloat16\" declares that uint16 holds bfloat16 bits)"
                                        : " (.view(ml_dtypes.bfloat16) declares that uint16 holds bfloat16 bits)";
        }
        qz_raise(PyExc_TypeError, c->op, "%s has dtype %U, must be %s%s", name, text, what, hint);
    } else if (text) {
        qz_raise(PyExc_TypeError, c->op, "%s must be an array of %s, got %U", name, what, text);
    }
    Py_XDECREF(dtype);
    Py_XDECREF(text);
    return -1;
}

/* Clears an exception that says that an object is of another kind. 0, or -1 if it is one to pass on: MemoryError,
 * RecursionError, KeyboardInterrupt and their like. */
static int clear_unless_serious(void) {
    PyObject *const mild[] = {PyExc_TypeError,    PyExc_ValueError,    PyExc_BufferError, PyExc_AttributeError,
                              PyExc_RuntimeError, PyExc_OverflowError, PyExc_LookupError};
    if (PyErr_ExceptionMatches(PyExc_RecursionError)) return -1; /* a RuntimeError */
    for (size_t i = 0; i < sizeof mild / sizeof *mild; i++) {
        if (!PyErr_ExceptionMatches(mild[i])) continue;
        PyErr_Clear();
        return 0;
    }
    return -1;
}

/* The element type of a buffer: 1 with *type set, 0 if it is none that we know. */
static int buffer_type(const Py_buffer *buffer, int raw_bfloat16, qz_type *type) {
    static const struct {
        const char *letters;
        qz_type type;
    } known[] = {{"f", QZ_F32}, {"e", QZ_F16}, {"d", QZ_F64}, {"H", QZ_BF16}, {"iIlL", QZ_U32}, {"B", QZ_U8}};
    const char *format = buffer->format ? buffer->format : "B";
    if (strcmp(format, "bfloat16") == 0 && buffer->itemsize == 2) { /* as MLX arrays name it */
        *type = QZ_BF16;
        return 1;
    }
    if (*format == '@' || *format == '=' || *format == '<' || *format == '^') format++;
    if (*format == '\0' || format[1] != '\0') return 0;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (!strchr(known[i].letters, *format)) continue;
        *type = known[i].type;
        return buffer->itemsize == qz_type_size(*type) && (*format != 'H' || raw_bfloat16);
    }
    return 0;
}

static int fill_from_buffer(view *v, const call *c, const char *name) {
    const Py_buffer *b = &v->buffer;
    qz_array *a = &v->array;
    if (b->ndim > QZ_MAX_DIMS) {
        return qz_raise(PyExc_ValueError, c->op, "%s has %d dimensions, at most %d are supported", name, b->ndim,
                        QZ_MAX_DIMS);
    }
    a->data = b->buf;
    a->ndim = b->ndim;
    ptrdiff_t step = b->itemsize;
    for (int i = b->ndim - 1; i >= 0; i--) { /* ctypes gives no strides even if asked: C order */
        a->shape[i] = b->shape ? b->shape[i] : b->len / b->itemsize;
        a->strides[i] = b->strides ? b->strides[i] : step;
        if (a->shape[i] < 0 || (a->shape[i] > 0 && __builtin_mul_overflow(step, a->shape[i], &step)))
            return qz_raise(PyExc_ValueError, c->op, "%s has a buffer with an impossible shape", name);
    }
    return 0;
}

/* Notices ml_dtypes once it has been imported by somebody; we never import it. 0 or -1. */
static int find_ml_bfloat16(module_state *state) {
    if (state->ml_bfloat16) return 0;
    PyObject *modules = PySys_GetObject("modules");
    PyObject *module = modules ? PyDict_GetItemString(modules, "ml_dtypes") : NULL;
    if (!module) return 0;
    PyObject *scalar = PyObject_GetAttrString(module, "bfloat16"), *numpy = NULL;
    if (!scalar) { /* sys.modules["ml_dtypes"] = None, or an import under way */
        PyErr_Clear();
        return 0;
    }
    numpy = PyImport_ImportModule("numpy");
    if (numpy) state->ml_bfloat16 = PyObject_CallMethod(numpy, "dtype", "O", scalar);
    Py_XDECREF(scalar);
    Py_XDECREF(numpy);
    return state->ml_bfloat16 ? 0 : -1;
}

/* 1 if the object is an ml_dtypes bfloat16 array, 0 if not, -1 on error. */
static int is_ml_bfloat16(const call *c, PyObject *object) {
    if (find_ml_bfloat16(c->state) < 0) return -1;
    if (!c->state->ml_bfloat16) return 0;
    PyObject *dtype = PyObject_GetAttrString(object, "dtype");
    if (!dtype) {
        PyErr_Clear();
        return 0;
    }
    int same = PyObject_RichCompareBool(dtype, c->state->ml_bfloat16, Py_EQ);
    Py_DECREF(dtype);
    if (same < 0) PyErr_Clear(); /* some libraries' dtypes refuse the comparison */
    return same > 0;
}

static int take_buffer(view *v, PyObject *object) {
    if (PyObject_GetBuffer(object, &v->buffer, PyBUF_RECORDS_RO) < 0) return -1;
    v->has_buffer = 1;
    return 0;
}

static int check_writable(const view *v, const call *c, const char *name, int writable) {
    if (!writable || !v->buffer.readonly) return 0;
    return qz_raise(PyExc_ValueError, c->op, "%s is read-only", name);
}

/* The element type that goes with a dtype object: 1 with *type set, 0 if it is none of those that we hold. */
static int dtype_type(const call *c, const PyObject *dtype, qz_type *type) {
    const module_state *state = c->state;
    if (dtype == state->f32) return *type = QZ_F32, 1;
    if (dtype == state->u32 || dtype == state->i32) return *type = QZ_U32, 1;
    if (dtype == state->f16) return *type = QZ_F16, 1;
    if (dtype == state->u8) return *type = QZ_U8, 1;
    if (dtype == state->f64) return *type = QZ_F64, 1;
    *type = QZ_BF16;
    return dtype == state->ml_bfloat16 || (dtype == state->u16 && c->raw_bfloat16);
}

/* The buffer of a plain NumPy array, whose dtype tells the type: NumPy spells the format of a buffer anew each time,
 * which costs more than all else that it does, and has none for bfloat16. 1: taken; 0: to be taken in another way; -1:
 * error. */
static int take_plain_array(view *v, const call *c, PyObject *object) {
    if ((PyObject *)Py_TYPE(object) != c->state->ndarray) return 0;
    /* without the search for the property in the array's type */
    PyObject *dtype = c->state->get_dtype(c->state->dtype_of_arrays, object, c->state->ndarray);
    if (!dtype) return -1;
    Py_DECREF(dtype); /* from here on an address to compare */
    if (!dtype_type(c, dtype, &v->array.type)) return 0;
    if (PyObject_GetBuffer(object, &v->buffer, PyBUF_STRIDED_RO) < 0) return clear_unless_serious();
    v->has_buffer = 1;
    v->is_ml_dtype = dtype == c->state->ml_bfloat16;
    return 1;
}

/* An ml_dtypes array as the uint16 array that NumPy can lend. 1: taken; 0: it lends none; -1: error. */
static int take_ml_bfloat16(view *v, const call *c, PyObject *object) {
    qz_type type;
    PyObject *integers = PyObject_CallMethod(object, "view", "O", c->state->u16);
    int taken = integers && PyObject_CheckBuffer(integers) ? take_buffer(v, integers) : -1;
    Py_XDECREF(integers); /* the buffer keeps it alive */
    if (taken < 0) return PyErr_Occurred() ? clear_unless_serious() : 0;
    if (!buffer_type(&v->buffer, 1, &type) || type != QZ_BF16) {
        qz_release(v);
        return 0;
    }
    v->array.type = QZ_BF16;
    v->is_ml_dtype = 1;
    return 1;
}

/* The buffer, or integer view, or DLPack tensor of an object. 1: taken; 0: it offers none; -1: error. */
static int take_memory(view *v, const call *c, const char *name, PyObject *object, int writable, const char *what) {
    int plain = take_plain_array(v, c, object);
    if (plain < 0) return -1;
    if (plain) return fill_from_buffer(v, c, name) < 0 || check_writable(v, c, name, writable) < 0 ? -1 : 1;
    if (PyObject_CheckBuffer(object)) {
        if (take_buffer(v, object) == 0) {
            if (!buffer_type(&v->buffer, c->raw_bfloat16, &v->array.type)) return raise_dtype(c, name, object, what);
            if (fill_from_buffer(v, c, name) < 0 || check_writable(v, c, name, writable) < 0) return -1;
            return 1;
        }
        if (clear_unless_serious() < 0) return -1;
    }
    int ml = is_ml_bfloat16(c, object);
    if (ml > 0) ml = take_ml_bfloat16(v, c, object);
    if (ml < 0) return -1;
    if (ml) return fill_from_buffer(v, c, name) < 0 || check_writable(v, c, name, writable) < 0 ? -1 : 1;
    if (PyObject_HasAttrString(object, "dtype") && PyObject_CheckBuffer(object))
        return raise_dtype(c, name, object, what);
    return qz_take_dlpack(v, c, name, object, writable);
}

/* A list's array as float64, if it holds numbers: text, None and bools would be converted too. Steals the reference. */
static PyObject *numbers_as_f64(const call *c, const char *name, PyObject *object, PyObject *array,
                                const char *wanted) {
    PyObject *dtype = PyObject_GetAttrString(array, "dtype"), *converted = NULL;
    PyObject *kind = dtype ? PyObject_GetAttrString(dtype, "kind") : NULL;
    Py_UCS4 letter = kind && PyUnicode_Check(kind) ? PyUnicode_ReadChar(kind, 0) : 0;
    if (letter == 'f' || letter == 'i' || letter == 'u') {
        converted = PyObject_CallFunctionObjArgs(c->state->asarray, array, c->state->f64, NULL);
    } else if (kind) {
        raise_dtype(c, name, object, wanted);
    }
    Py_XDECREF(kind);
    Py_XDECREF(dtype);
    Py_DECREF(array);
    return converted;
}

/* Lists and numbers as a new float64 array, other libraries' containers as the array that they say they are. */
static int take_array_like(view *v, const call *c, const char *name, PyObject *object) {
    static const char wanted[] = "floats, or a list of numbers";
    int is_container = PyObject_HasAttrString(object, "__array__");
    if (object == Py_None || PyUnicode_Check(object) || PyDict_Check(object))
        return raise_dtype(c, name, object, wanted);
    PyObject *array = PyObject_CallFunctionObjArgs(c->state->asarray, object, NULL);
    if (!array) return clear_unless_serious() < 0 ? -1 : raise_dtype(c, name, object, wanted);
    if (!is_container && !(array = numbers_as_f64(c, name, object, array, wanted))) return -1;
    int taken = take_memory(v, c, name, array, 0, float_kinds);
    Py_DECREF(array); /* the buffer keeps it alive */
    return taken == 0 ? raise_dtype(c, name, object, wanted) : taken;
}

int qz_take_floats(view *v, const call *c, const char *name, PyObject *object) {
    int taken = take_memory(v, c, name, object, 0, float_kinds);
    if (taken == 0) taken = take_array_like(v, c, name, object);
    if (taken < 0) return -1;
    if (v->array.type == QZ_U32 || v->array.type == QZ_U8) return raise_dtype(c, name, object, float_kinds);
    return qz_checked_count(c, name, v->array.shape, v->array.ndim) < 0 ? -1 : 0;
}

static int take_integers(view *v, const call *c, const char *name, PyObject *object, qz_type type, const char *kinds) {
    int taken = take_memory(v, c, name, object, 0, kinds);
    if (taken < 0) return -1;
    if (taken == 0 || v->array.type != type) return raise_dtype(c, name, object, kinds);
    return qz_checked_count(c, name, v->array.shape, v->array.ndim) < 0 ? -1 : 0;
}

int qz_take_codes(view *v, const call *c, const char *name, PyObject *object) {
    return take_integers(v, c, name, object, QZ_U32, code_kinds);
}

int qz_take_bytes(view *v, const call *c, const char *name, PyObject *object) {
    return take_integers(v, c, name, object, QZ_U8, "uint8");
}

/* The array itself, or an ml_dtypes array of this type as its bytes; a new reference or NULL. */
static PyObject *as_bytes(const call *c, PyObject *object, const char *ml_dtype) {
    PyObject *dtype = PyObject_GetAttrString(object, "dtype"), *text = NULL, *bytes = NULL;
    if (dtype && dtype != c->state->u8) text = PyObject_GetAttrString(dtype, "name");
    if (text && PyUnicode_Check(text) && PyUnicode_CompareWithASCIIString(text, ml_dtype) == 0)
        bytes = PyObject_CallMethod(object, "view", "O", c->state->u8);
    int failed = PyErr_Occurred() && clear_unless_serious() < 0;
    Py_XDECREF(dtype);
    Py_XDECREF(text);
    return bytes || failed ? bytes : Py_NewRef(object);
}

int qz_take_byte_floats(view *v, const call *c, const char *name, PyObject *object, const char *element) {
    const int is_e8m0 = strcmp(element, "e8m0") == 0;
    PyObject *bytes = as_bytes(c, object, is_e8m0 ? "float8_e8m0fnu" : "float8_e4m3fn");
    if (!bytes) return -1;
    int status =
        take_integers(v, c, name, bytes, QZ_U8,
                      is_e8m0 ? "uint8 (or ml_dtypes' float8_e8m0fnu)" : "uint8 (or ml_dtypes' float8_e4m3fn)");
    Py_DECREF(bytes); /* the buffer keeps it alive */
    return status;
}

/* "i" or "u" for arrays of integers, else 0; -1 if an exception is to be passed on. */
static int kind_of_integers(PyObject *array) {
    PyObject *dtype = PyObject_GetAttrString(array, "dtype");
    PyObject *kind = dtype ? PyObject_GetAttrString(dtype, "kind") : NULL;
    const Py_UCS4 letter = kind && PyUnicode_Check(kind) ? PyUnicode_ReadChar(kind, 0) : 0;
    Py_XDECREF(kind);
    Py_XDECREF(dtype);
    if (PyErr_Occurred() && clear_unless_serious() < 0) return -1;
    return letter == 'i' || letter == 'u' ? (int)letter : 0;
}

/* Whether a list or tuple holds nothing, though it may hold lists of nothing: NumPy reads that as float64 and takes it
 * for indices all the same. -1 with an exception set. */
static int is_empty_sequence(PyObject *object, PyObject *array) {
    if (!PyList_Check(object) && !PyTuple_Check(object)) return 0;
    PyObject *size = PyObject_GetAttrString(array, "size");
    const int empty = size ? PyObject_Not(size) : -1;
    Py_XDECREF(size);
    return empty;
}

int qz_take_indices(view *v, const call *c, const char *name, PyObject *object, int *is_unsigned) {
    PyObject *array = PyObject_CallFunctionObjArgs(c->state->asarray, object, NULL), *copy = NULL;
    if (!array && clear_unless_serious() < 0) return -1;
    int kind = array ? kind_of_integers(array) : 0;
    if (array && kind == 0) {
        kind = is_empty_sequence(object, array);
        if (kind > 0) kind = 'i';
    }
    if (kind > 0) copy = PyObject_CallMethod(array, "astype", "ss", kind == 'u' ? "u8" : "i8", "C");
    Py_XDECREF(array);
    if (kind == 0) return raise_dtype(c, name, object, "integers");
    if (!copy || PyObject_GetBuffer(copy, &v->buffer, PyBUF_CONTIG) < 0) {
        Py_XDECREF(copy);
        return -1;
    }
    Py_DECREF(copy); /* the buffer keeps it alive */
    v->has_buffer = 1;
    *is_unsigned = kind == 'u';
    return fill_from_buffer(v, c, name);
}

/* Takes a new array, of which *result is a new reference. 0 or -1. */
static int take_new_array(view *v, PyObject **result, const call *c, const wanted *want) {
    module_state *state = c->state;
    const int as_ml = want->type == QZ_BF16 && want->as_ml_dtype;
    if (as_ml && find_ml_bfloat16(state) < 0) return -1;
    if (as_ml && !state->ml_bfloat16)
        return qz_raise(PyExc_ImportError, c->op, "a bfloat16 dtype needs ml_dtypes: import it first");
    PyObject *const dtypes[] = {
        [QZ_F32] = state->f32, [QZ_F16] = state->f16, [QZ_BF16] = as_ml ? state->ml_bfloat16 : state->u16,
        [QZ_F64] = state->f64, [QZ_U32] = state->u32, [QZ_U8] = state->u8};
    PyObject *sizes = PyTuple_New(want->ndim);
    for (int i = 0; sizes && i < want->ndim; i++) {
        PyObject *size = PyLong_FromSsize_t(want->shape[i]);
        if (!size || PyTuple_SetItem(sizes, i, size) < 0) Py_CLEAR(sizes);
    }
    if (sizes) *result = PyObject_CallFunctionObjArgs(state->empty, sizes, dtypes[want->type], NULL);
    Py_XDECREF(sizes);
    if (!*result || PyObject_GetBuffer(*result, &v->buffer, PyBUF_STRIDED_RO) < 0) return -1;
    v->has_buffer = 1;
    v->array.type = want->type;
    return fill_from_buffer(v, c, want->name);
}

static int same_shape(const qz_array *a, int ndim, const ptrdiff_t *shape) {
    if (a->ndim != ndim) return 0;
    for (int i = 0; i < ndim; i++) {
        if (a->shape[i] != shape[i]) return 0;
    }
    return 1;
}

/* Every element must have a place of its own. Strides of an array without elements mean nothing. */
static int has_zero_stride(const qz_array *a) {
    int found = 0;
    for (int i = 0; i < a->ndim; i++) {
        if (a->shape[i] == 0) return 0;
        found |= a->shape[i] > 1 && a->strides[i] == 0;
    }
    return found;
}

static const char *result_kind(qz_type type) {
    return type == QZ_BF16 ? "bfloat16 (or uint16 for its bits)" : qz_type_name(type);
}

/* Whether elements may share memory: in every slice of an ordinary array, what the axes of smaller strides reach is
 * less than one step of the next larger stride. */
static int overlaps_itself(const qz_array *a) {
    uintptr_t extent = (uintptr_t)qz_type_size(a->type), below = 0;
    for (int done = 0; done < a->ndim; done++) {
        int next = -1;
        uintptr_t least = UINTPTR_MAX, stride;
        for (int i = 0; i < a->ndim; i++) {
            stride = a->strides[i] < 0 ? -(uintptr_t)a->strides[i] : (uintptr_t)a->strides[i];
            if (a->shape[i] > 1 && stride > below && stride < least) least = stride, next = i;
        }
        if (next < 0) return 0;
        for (int i = 0; i < a->ndim; i++) {
            stride = a->strides[i] < 0 ? -(uintptr_t)a->strides[i] : (uintptr_t)a->strides[i];
            if (a->shape[i] <= 1 || stride != least) continue;
            if (least < extent) return 1;
            extent += least * ((uintptr_t)a->shape[i] - 1);
        }
        below = least;
    }
    return 0;
}

static int check_places(const view *v, const call *c, const char *name, ptrdiff_t count) {
    if (has_zero_stride(&v->array)) {
        return qz_raise(PyExc_ValueError, c->op, "%s has a stride of 0: its elements share memory", name);
    }
    if (count > 0 && overlaps_itself(&v->array)) {
        return qz_raise(PyExc_ValueError, c->op, "%s has elements that share memory: give each its own", name);
    }
    return 0;
}

static int check_result(const view *v, const call *c, PyObject *out, const wanted *want, ptrdiff_t count) {
    const char *name = want->name;
    if (v->array.type != want->type) return raise_dtype(c, name, out, result_kind(want->type));
    if (!same_shape(&v->array, want->ndim, want->shape)) {
        PyObject *shape = qz_shape_text(want->shape, want->ndim), *got = qz_shape_text(v->array.shape, v->array.ndim);
        if (shape && got) qz_raise(PyExc_ValueError, c->op, "%s must have shape %U, got %U", name, shape, got);
        Py_XDECREF(shape);
        Py_XDECREF(got);
        return -1;
    }
    return check_places(v, c, name, count);
}

int qz_take_result(view *v, PyObject **result, const call *c, PyObject *out, const wanted *want) {
    const ptrdiff_t count = qz_checked_count(c, want->name, want->shape, want->ndim);
    if (count < 0) return -1;
    if (out == Py_None) return take_new_array(v, result, c, want);
    call raw = *c; /* a bfloat16 result may be given as uint16 */
    raw.raw_bfloat16 = want->type == QZ_BF16;
    int taken = take_memory(v, &raw, want->name, out, 1, result_kind(want->type));
    if (taken == 0) return raise_dtype(c, want->name, out, result_kind(want->type));
    if (taken < 0 || check_result(v, c, out, want, count) < 0) return -1;
    Py_INCREF(out);
    *result = out;
    return 0;
}

int qz_take_writable(view *v, const call *c, const char *name, PyObject *object, qz_type type) {
    const int taken = take_memory(v, c, name, object, 1, result_kind(type));
    if (taken < 0) return -1;
    if (taken == 0 || v->array.type != type) return raise_dtype(c, name, object, result_kind(type));
    const ptrdiff_t count = qz_checked_count(c, name, v->array.shape, v->array.ndim);
    return count < 0 ? -1 : check_places(v, c, name, count);
}

/* The addresses [*low, *high) that an array's elements lie in; none if it has no elements. */
static void address_range(const qz_array *a, uintptr_t *low, uintptr_t *high) {
    int empty = 0;
    *low = (uintptr_t)a->data;
    *high = *low + (uintptr_t)qz_type_size(a->type);
    for (int i = 0; i < a->ndim; i++) { /* unsigned: strides of arrays without elements may be anything */
        *(a->strides[i] < 0 ? low : high) += ((uintptr_t)a->shape[i] - 1) * (uintptr_t)a->strides[i];
        empty |= a->shape[i] == 0;
    }
    if (empty) *high = *low;
}

int qz_refuse_overlap(const call *c, const char *out_name, const view *out, const named_view *others, int count) {
    uintptr_t out_low, out_high, low, high;
    address_range(&out->array, &out_low, &out_high);
    for (int i = 0; i < count; i++) {
        address_range(&others[i].view->array, &low, &high);
        if (out_high <= low || high <= out_low || out_low == out_high || low == high) continue;
        return qz_raise(PyExc_ValueError, c->op, "%s shares memory with %s: give it memory of its own", out_name,
                        others[i].name);
    }
    return 0;
}
