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

static int dl_type(const dl_tensor *t, qz_type *type) {
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
    return 0;
}

static int fill_view(view *v, const call *c, const char *name, const dl_tensor *t) {
    qz_array *a = &v->array;
    if (t->device_type != DL_CPU) {
        return qz_raise(PyExc_TypeError, c->op,
                        "%s is not in CPU memory (DLPack device type %d): move it to the CPU first", name,
                        (int)t->device_type);
    }
    if (!dl_type(t, &a->type)) {
        return qz_raise(PyExc_TypeError, c->op,
                        "%s has an element type that is not supported (DLPack code %d, %d bits)", name, (int)t->code,
                        (int)t->bits);
    }
    if (t->ndim < 0 || t->ndim > QZ_MAX_DIMS) {
        return qz_raise(PyExc_ValueError, c->op, "%s has %d dimensions, at most %d are supported", name, (int)t->ndim,
                        QZ_MAX_DIMS);
    }
    a->data = (char *)t->data + t->byte_offset;
    a->ndim = t->ndim;
    ptrdiff_t size = qz_type_size(a->type), step = size;
    for (int i = t->ndim - 1; i >= 0; i--) {
        a->shape[i] = (ptrdiff_t)t->shape[i];
        a->strides[i] = t->strides ? (ptrdiff_t)t->strides[i] * size : step;
        step *= a->shape[i];
    }
    return 0;
}

/* A consumed capsule is renamed, and its owner then is ours to delete: the capsule of ours does so. */
static void delete_plain(PyObject *capsule) {
    dl_managed *m = PyCapsule_GetPointer(capsule, "quantization.plain");
    if (m && m->deleter) m->deleter(m);
}

static void delete_versioned(PyObject *capsule) {
    dl_managed_versioned *m = PyCapsule_GetPointer(capsule, "quantization.versioned");
    if (m && m->deleter) m->deleter(m);
}

static int consume(view *v, const call *c, const char *name, PyObject *capsule, int writable) {
    if (PyCapsule_IsValid(capsule, versioned_name)) {
        dl_managed_versioned *m = PyCapsule_GetPointer(capsule, versioned_name);
        v->owner = PyCapsule_New(m, "quantization.versioned", delete_versioned);
        if (!v->owner || PyCapsule_SetName(capsule, "used_dltensor_versioned") < 0) return -1;
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

int qz_take_dlpack(view *v, const call *c, const char *name, PyObject *object, int writable) {
    PyObject *method = PyObject_GetAttrString(object, "__dlpack__"), *capsule;
    if (!method) {
        PyErr_Clear();
        return 0;
    }
    PyObject *device = PyObject_CallMethod(object, "__dlpack_device__", NULL);
    long device_type = -1;
    if (device && PyTuple_Check(device) && PyTuple_Size(device) == 2) {
        device_type = PyLong_AsLong(PyTuple_GetItem(device, 0));
    }
    Py_XDECREF(device);
    if (PyErr_Occurred() || device_type != DL_CPU) {
        Py_DECREF(method);
        if (PyErr_Occurred()) return -1;
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
    v->present = 1;
    return 1;
}
