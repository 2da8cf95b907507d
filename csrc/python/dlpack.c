/* CPU tensors of other libraries, through DLPack (https://dmlc.github.io/dlpack/latest/c_api.html). */
#include <stdint.h>

#include "binding.h"

typedef struct dl_tensor {
    void *data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides; /* in elements; strides may be NULL: C order */
    uint64_t byte_offset;
} dl_tensor;

typedef struct dl_managed {
    dl_tensor tensor;
    void *context;
    void (*deleter)(struct dl_managed *);
} dl_managed;

typedef struct dl_managed_versioned {
    uint32_t major, minor;
    void *context;
    void (*deleter)(struct dl_managed_versioned *);
    uint64_t flags;
    dl_tensor tensor;
} dl_managed_versioned;

enum { DL_CPU = 1, DL_INT = 0, DL_UINT = 1, DL_FLOAT = 2, DL_BFLOAT = 4, DL_READ_ONLY = 1 };

static const char plain_name[] = "dltensor", versioned_name[] = "dltensor_versioned";

static int dl_type(const dl_tensor *t, int raw_bfloat16, qz_type *type) {
    static const struct {
        uint8_t code, bits;
        qz_type type;
    } known[] = {{DL_FLOAT, 32, QZ_F32},   {DL_FLOAT, 16, QZ_F16}, {DL_FLOAT, 64, QZ_F64},
                 {DL_BFLOAT, 16, QZ_BF16}, {DL_UINT, 32, QZ_U32},  {DL_INT, 32, QZ_U32}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (t->lanes == 1 && t->code == known[i].code && t->bits == known[i].bits) {
            *type = known[i].type;
            return 1;
        }
    }
    *type = QZ_BF16;
    return raw_bfloat16 && t->lanes == 1 && t->code == DL_UINT && t->bits == 16;
}

static int fill_view(view *v, const call *c, const char *name, const dl_tensor *t) {
    qz_array *a = &v->array;
    if (t->device_type != DL_CPU) {
        return qz_raise(PyExc_TypeError, c->op,
                        "%s is not in CPU memory (DLPack device type %d): move it to the CPU first", name,
                        (int)t->device_type);
    }
    if (!dl_type(t, c->raw_bfloat16, &a->type)) {
        return qz_raise(PyExc_TypeError, c->op,
                        "%s has an element type that is not supported (DLPack code %d, %d bits, %d lanes)", name,
                        (int)t->code, (int)t->bits, (int)t->lanes);
    }
    if (t->ndim < 0 || t->ndim > QZ_MAX_DIMS) {
        return qz_raise(PyExc_ValueError, c->op, "%s has %d dimensions, at most %d are supported", name, (int)t->ndim,
                        QZ_MAX_DIMS);
    }
    a->data = (char *)t->data + t->byte_offset;
    a->ndim = t->ndim;
    ptrdiff_t size = qz_type_size(a->type), step = size;
    int impossible = 0;
    for (int i = t->ndim - 1; i >= 0; i--) {
        a->shape[i] = (ptrdiff_t)t->shape[i];
        a->strides[i] = step;
        impossible |= a->shape[i] < 0 || (a->shape[i] > 0 && __builtin_mul_overflow(step, a->shape[i], &step));
        if (t->strides) impossible |= __builtin_mul_overflow((ptrdiff_t)t->strides[i], size, &a->strides[i]);
    }
    return impossible ? qz_raise(PyExc_ValueError, c->op, "%s is a DLPack tensor of an impossible shape", name) : 0;
}

/* A consumed capsule is renamed, and its owner then is ours to delete: the capsule of ours does so. Deleters may run
 * Python code, which must not see the exception that a refused call has set. */
static void delete_plain(PyObject *capsule) {
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    dl_managed *m = PyCapsule_GetPointer(capsule, "quantization.plain");
    if (m && m->deleter) m->deleter(m);
    PyErr_Restore(type, value, traceback);
}

static void delete_versioned(PyObject *capsule) {
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    dl_managed_versioned *m = PyCapsule_GetPointer(capsule, "quantization.versioned");
    if (m && m->deleter) m->deleter(m);
    PyErr_Restore(type, value, traceback);
}

static int consume(view *v, const call *c, const char *name, PyObject *capsule, int writable) {
    if (PyCapsule_IsValid(capsule, versioned_name)) {
        dl_managed_versioned *m = PyCapsule_GetPointer(capsule, versioned_name);
        v->owner = PyCapsule_New(m, "quantization.versioned", delete_versioned);
        if (!v->owner || PyCapsule_SetName(capsule, "used_dltensor_versioned") < 0) return -1;
        if (m->major != 1) { /* of another one only the deleter may be used */
            return qz_raise(PyExc_TypeError, c->op, "%s offers version %u of DLPack, only version 1 is understood",
                            name, (unsigned)m->major);
        }
        if (writable && m->flags & DL_READ_ONLY) return qz_raise(PyExc_ValueError, c->op, "%s is read-only", name);
        return fill_view(v, c, name, &m->tensor);
    }
    if (PyCapsule_IsValid(capsule, plain_name)) {
        dl_managed *m = PyCapsule_GetPointer(capsule, plain_name);
        v->owner = PyCapsule_New(m, "quantization.plain", delete_plain);
        if (!v->owner || PyCapsule_SetName(capsule, "used_dltensor") < 0) return -1;
        return fill_view(v, c, name, &m->tensor);
    }
    return qz_raise(PyExc_TypeError, c->op, "%s: its __dlpack__ returned no DLPack capsule", name);
}

/* The type of device that holds an object's memory; 0 or -1. */
static int device_of(const call *c, const char *name, PyObject *object, long *type) {
    if (!PyObject_HasAttrString(object, "__dlpack_device__"))
        return qz_raise(PyExc_TypeError, c->op, "%s has __dlpack__ but no __dlpack_device__", name);
    PyObject *device = PyObject_CallMethod(object, "__dlpack_device__", NULL);
    if (!device) return -1;
    int is_pair = PyTuple_Check(device) && PyTuple_Size(device) == 2 && PyLong_Check(PyTuple_GetItem(device, 0));
    *type = is_pair ? PyLong_AsLong(PyTuple_GetItem(device, 0)) : 0;
    Py_DECREF(device);
    if (is_pair) return *type == -1 && PyErr_Occurred() ? -1 : 0;
    return qz_raise(PyExc_TypeError, c->op, "%s: its __dlpack_device__ returned no pair of integers", name);
}

int qz_take_dlpack(view *v, const call *c, const char *name, PyObject *object, int writable) {
    PyObject *method = PyObject_GetAttrString(object, "__dlpack__"), *capsule;
    if (!method) {
        PyErr_Clear();
        return 0;
    }
    long device_type;
    if (device_of(c, name, object, &device_type) < 0) {
        Py_DECREF(method);
        return -1;
    }
    if (device_type != DL_CPU) {
        Py_DECREF(method);
        return qz_raise(PyExc_TypeError, c->op,
                        "%s is not in CPU memory (DLPack device type %ld): move it to the CPU first", name,
                        device_type);
    }
    capsule = PyObject_CallNoArgs(method);
    Py_DECREF(method);
    if (!capsule) return -1;
    int status = consume(v, c, name, capsule, writable);
    Py_DECREF(capsule);
    if (status < 0) return -1;
    return 1;
}
