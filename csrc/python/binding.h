/* The binding: from Python objects to checked views and back. Every error message of the package is made here. */
#ifndef QZ_PYTHON_BINDING_H
#define QZ_PYTHON_BINDING_H

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include "../device.h"

/* ---- module state ---- */

typedef enum op_kind {
    OP_QUANTIZE,
    OP_DEQUANTIZE,
    OP_MATMUL,
    OP_FAKE_QUANTIZE,
    OP_QUANTIZE_FP,
    OP_DEQUANTIZE_FP,
    OP_GATHER,
    OP_GATHER_RHS,
    OP_MATMUL_FP,
    OP_GATHER_FP,
    OP_GATHER_RHS_FP,
    OP_TO_FP8,
    OP_FROM_FP8,
    OP_FWHT,
    OP_HADAMARD_KV,
    OP_HADAMARD_KV_SEQ,
    OP_HADAMARD_KV_HB,
    OP_QUANTIZE_KV,
    OP_DEQUANTIZE_KV,
    OP_KV_ATTENTION,
    OP_KINDS,
    OP_ANY = OP_KINDS
} op_kind;

enum { QZ_MAX_PARAMETERS = 16 }; /* of an operation, the plan not counted */

/* Owned references, which module.c walks as an array, and at the end what is no reference. */
typedef struct module_state {
    PyTypeObject *plan_type;
    PyObject *settings, *get_settings; /* the ContextVar of the context managers, and its method get */
    PyObject *names[OP_KINDS][QZ_MAX_PARAMETERS], *defaults[OP_KINDS][QZ_MAX_PARAMETERS]; /* NULL after the last */
    PyObject *ndarray, *empty, *asarray;                                                  /* numpy's */
    PyObject *f32, *f16, *u8, *u16, *u32, *i32, *f64;                                     /* numpy dtypes */
    PyObject *exact;           /* the word, as programs that write it have it */
    PyObject *ml_bfloat16;     /* numpy.dtype(ml_dtypes.bfloat16), or NULL until ml_dtypes is seen */
    PyObject *dtype_of_arrays; /* numpy.ndarray.dtype, a descriptor, */
    descrgetfunc get_dtype;    /* and what it does */
    int parameters[OP_KINDS];  /* how many names and defaults there are */
} module_state;

extern struct PyModuleDef qz_module;

/* ---- compiled kernels (plan.c, kernel.c) ---- */

typedef struct op_row {
    const char *name;
    op_kind kind;
    const char *mode; /* of formats.def */
    int transpose;    /* of a matmul */
    int takes_output_features;
} op_row;

typedef struct plan_object {
    PyObject_HEAD qz_plan plan;
    const op_row *op;
    int threads; /* 0: the global limit */
} plan_object;

extern PyType_Spec qz_plan_spec, qz_kernel_spec;

/* Makes what binds the arguments of calls (kernel.c): state->names and state->defaults. 0 or -1. */
int qz_prepare_calls(module_state *state);

/* The first argument of a call as a plan of this kind (OP_ANY: of whichever); NULL with TypeError set if it is none. */
const plan_object *qz_take_plan(PyObject *module, PyObject *object, op_kind kind);

/* Lists for Python: what formats.def, isa.def and the devices say. */
PyObject *qz_list_formats(PyObject *module, PyObject *unused);
PyObject *qz_list_isas(PyObject *module, PyObject *unused);
PyObject *qz_list_ops(PyObject *module, PyObject *unused);
PyObject *qz_list_devices(PyObject *module, PyObject *unused);
PyObject *qz_explain_cpu_features(PyObject *module, PyObject *unused);

/* ---- errors (check.c) ---- */

/* Sets an exception that reads "op: message"; the format is PyUnicode_FromFormat's. Returns -1. */
int qz_raise(PyObject *type, const char *op, const char *format, ...);

/* A shape as Python writes it, "(2, 3)"; a new reference or NULL. */
PyObject *qz_shape_text(const ptrdiff_t *shape, int ndim);

/* ---- arrays (array.c, dlpack.c) ---- */

/* An array argument and what keeps its memory alive. Open with qz_open_view, which leaves all but the flags as it is:
 * to clear the kilobytes of a call's views would take longer than its checks. Release with qz_release. */
typedef struct view {
    qz_array array;
    int is_ml_dtype; /* bfloat16 as an ml_dtypes array */
    Py_buffer buffer;
    int has_buffer;
    PyObject *owner; /* a capsule of DLPack, or an array made on the way */
} view;

static inline void qz_open_view(view *v) {
    v->is_ml_dtype = 0;
    v->has_buffer = 0;
    v->owner = NULL;
}

void qz_release(view *v);

/* Copies the axes that there are. */
static inline void qz_copy_array(qz_array *to, const qz_array *from) {
    to->data = from->data;
    to->type = from->type;
    to->ndim = from->ndim;
    for (int i = 0; i < from->ndim; i++) {
        to->shape[i] = from->shape[i];
        to->strides[i] = from->strides[i];
    }
}

ptrdiff_t qz_type_size(qz_type type);

/* A scalar becomes a row of one element. */
static inline void qz_make_row(qz_array *array) {
    if (array->ndim > 0) return;
    array->ndim = 1;
    array->shape[0] = 1;
    array->strides[0] = qz_type_size(array->type);
}

typedef struct call {
    module_state *state;
    const char *op;
    int raw_bfloat16;      /* input_dtype="bfloat16": uint16 arrays hold bfloat16 bits */
    int takes_input_dtype; /* whether the function has that keyword */
} call;

/* input_dtype: NULL where a function has no such keyword. 0, or -1 with an exception set; where it is 0,
 * qz_close_call() follows in the same thread. */
int qz_open_call(call *c, PyObject *module, const plan_object *plan, PyObject *input_dtype);
void qz_close_call(void);

/* An array of float16, bfloat16, float32 or float64; lists and numbers become float64. 0 or -1. */
int qz_take_floats(view *v, const call *c, const char *name, PyObject *object);

/* Packed codes: uint32, or int32 with the same bits. */
int qz_take_codes(view *v, const call *c, const char *name, PyObject *object);

/* Packed codes of the KV cache: uint8. */
int qz_take_bytes(view *v, const call *c, const char *name, PyObject *object);

/* Small floats, a byte each, whose element formats.def names: uint8, or the type that ml_dtypes has for them. */
int qz_take_byte_floats(view *v, const call *c, const char *name, PyObject *object, const char *element);

/* Integers of any type as a copy of our own: 64 bits each, in C order, of which v->array.type says nothing. */
int qz_take_indices(view *v, const call *c, const char *name, PyObject *object, int *is_unsigned);

/* What an array result is, or must be if it is given. */
typedef struct wanted {
    const char *name;
    qz_type type;
    int as_ml_dtype; /* whether a new array of bfloat16 is one of ml_dtypes; else it is of uint16 */
    int ndim;
    const ptrdiff_t *shape;
} wanted;

/* Writable memory for a result: `out` if it is not None, checked, else a new array. *result is a new reference. */
int qz_take_result(view *v, PyObject **result, const call *c, PyObject *out, const wanted *want);

/* Memory of any shape that is written in place, each element in a place of its own. */
int qz_take_writable(view *v, const call *c, const char *name, PyObject *object, qz_type type);

typedef struct named_view {
    const char *name;
    const view *view;
} named_view;

/* ValueError if memory of `out` may overlap that of one of the others. */
int qz_refuse_overlap(const call *c, const char *out_name, const view *out, const named_view *others, int count);

/* Takes `object` through DLPack. 1: done; 0: it has no __dlpack__; -1: an exception is set. */
int qz_take_dlpack(view *v, const call *c, const char *name, PyObject *object, int writable);

/* ---- values (check.c) ---- */

/* An integer (__index__, not bool); None leaves *value alone and *given 0. */
int qz_take_integer(const call *c, const char *name, PyObject *object, ptrdiff_t *value, int *given);

/* A number, not bool; infinities and NaN are for the caller to judge. */
int qz_take_number(const call *c, const char *name, PyObject *object, float *value);

/* True or False, NumPy's among them; -1 with TypeError set. */
int qz_take_flag(const call *c, const char *name, PyObject *object);

/* One of the words, whose index is returned; -1 with ValueError or TypeError set. */
int qz_take_word(const call *c, const char *name, PyObject *object, const char *const *words, int count);

/* "float32", "float16", "bfloat16", or a dtype of that name, None for `otherwise`. -1 on error. */
int qz_take_float_type(const call *c, const char *name, PyObject *object, qz_type otherwise, qz_type *type, int *ml);

/* "float32" or "float16", or a dtype of that name, None for the latter. */
int qz_take_norm_type(const call *c, const char *name, PyObject *object, qz_type *type);

/* Finds the row of formats.def, or raises a ValueError that lists what there is. */
int qz_take_format(const call *c, const char *mode, ptrdiff_t bits, ptrdiff_t group_size, int *slot);

/* How codes are packed, as far as it was given. */
typedef struct packing {
    ptrdiff_t group_size, bits;
    int has_group_size, has_bits;
} packing;

int qz_take_packing(packing *p, const call *c, PyObject *group_size, PyObject *bits);

/* Completes a packing from the stored shapes: `words` and `groups` are the last axes of codes and scales, `features`
 * the number of codes in a row, or -1 if only they tell. Where no packing has just so many, but a single one has more
 * by less than a group, it is that. Returns the row of formats.def, or -1 with ValueError set. */
int qz_infer_packing(packing *p, const call *c, const char *mode, ptrdiff_t words, ptrdiff_t groups, ptrdiff_t features,
                     int *slot);

/* args[0...2]: packed codes, scales and biases, with their shapes checked against each other. */
int qz_take_stored(const call *c, PyObject *const *args, view *codes, view *scales, view *biases);

/* The same without biases, for the fp family. */
int qz_take_stored_fp(const call *c, PyObject *const *args, const qz_format *format, view *codes, view *scales);

/* A number that is not negative, for a mode whose scales are E4M3; None for 2688, which changes nothing. */
int qz_take_global_scale(const call *c, const qz_format *format, PyObject *object, float *scale);

/* "metal" or "cpu". */
int qz_take_profile(const call *c, PyObject *object, qz_profile *profile);

/* How many groups w's last axis makes, padded to whole ones if `pad`; else -1 with ValueError unless it is a multiple
 * of the group size: the message says what fits. */
ptrdiff_t qz_count_groups(const call *c, const qz_array *w, const qz_format *format, ptrdiff_t group_size,
                          PyObject *pad);

/* Sets *length, the number of floats in a row of `groups` groups, to `k` if that is not None: whole groups, or less by
 * less than one. 0, or -1 with an exception set. */
int qz_take_length(const call *c, PyObject *k, ptrdiff_t groups, ptrdiff_t group_size, ptrdiff_t *length);

/* Whether `features` may stand for a row of `groups` groups, the last of which may be padded. */
static inline int qz_fits_groups(ptrdiff_t features, ptrdiff_t groups, ptrdiff_t group_size) {
    return features >= 0 && features <= groups * group_size && groups * group_size - features < group_size;
}

/* Refuses an `out` that is neither None nor a tuple of so many, which `names` says in words. */
int qz_check_outputs(const call *c, PyObject *out, const char *names, Py_ssize_t count);

/* The arrays of a call that quantizes: codes and scales, and biases where the format has them. */
typedef struct quantize_views {
    view w, result[3];
    PyObject *results[3];
} quantize_views;

/* Opens the call and its views for `run`, which returns the tuple of results, and closes them. */
PyObject *qz_run_quantize(PyObject *module, const plan_object *plan, PyObject *const *args, PyObject *input_dtype,
                          PyObject *(*run)(const plan_object *, const call *, PyObject *const *, quantize_views *));

qz_type qz_promote(qz_type a, qz_type b);
const char *qz_type_name(qz_type type);

/* Number of elements of an array of this name; -1 with ValueError set if it does not fit. */
ptrdiff_t qz_checked_count(const call *c, const char *name, const ptrdiff_t *shape, int ndim);

/* ---- the KV cache (kv_cache.c) ---- */

/* Rows of `dimension` elements with codes of so many bits, as codec 1 or 2 defines them; factor and scale are left at
 * their defaults. */
void qz_open_kv_codec(qz_kv_codec *codec, int version, int bits, ptrdiff_t dimension);

/* Number of a codec: 1 or 2; None for 2. It, or -1 with an exception set; so too what follows. */
int qz_take_kv_version(const call *c, PyObject *object);

/* Width of the codes of a codec; None for `otherwise`, if that is not 0. */
int qz_take_kv_bits(const call *c, const char *name, PyObject *object, int version, int otherwise);

/* scale_factor_d512: a finite number, by which norms can be divided if `divides`; None for 1. */
int qz_take_kv_factor(const call *c, PyObject *object, int divides, float *factor);

/* The head dimension, at least `least`, whose codes take so many bytes; `name` is the size's. */
ptrdiff_t qz_take_kv_dimension(const call *c, const char *name, ptrdiff_t bytes, int version, int bits, int least);

/* Whether norms agree with packed but for the last axis, of so many; 0: that axis is missing. */
int qz_fits_norms(const qz_array *packed, const qz_array *norms, ptrdiff_t last);

/* ValueError "name must have shape ..., got ...". Returns -1. */
int qz_raise_shape(const call *c, const char *name, const qz_array *got, const char *format, ...);

/* ---- running (check.c) ---- */

typedef qz_status (*qz_operation)(const qz_plan *plan, const void *args, const qz_run *run);

/* Runs the operation, without the GIL if `work` (rough nanoseconds) is long enough, and maps its status to an
 * exception. */
int qz_run_operation(const plan_object *plan, qz_operation operation, const void *args, double work);

/* The functions of the module. */
PyObject *qz_py_quantize(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *qz_py_dequantize(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *qz_py_matmul(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *qz_py_gather(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *qz_py_gather_rhs(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *qz_py_gather_fp(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *qz_py_gather_rhs_fp(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *qz_py_fake_quantize(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *qz_py_quantize_fp(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *qz_py_dequantize_fp(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *qz_py_matmul_fp(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *qz_py_to_fp8(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *qz_py_from_fp8(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *qz_py_fwht(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *qz_py_hadamard_quantize_kv(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *qz_py_hadamard_quantize_kv_seq(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *qz_py_hadamard_quantize_kv_hb(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *qz_py_quantize_kv(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *qz_py_dequantize_kv(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *qz_py_kv_attention(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *qz_py_probe(PyObject *module, PyObject *const *args, Py_ssize_t count);

/* TypeError unless a function got just so many arguments. */
int qz_check_count(const char *function, Py_ssize_t got, Py_ssize_t expected);

#endif
