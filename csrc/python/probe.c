/* The ceilings of this machine, for those who measure: the work is done here, the clock is theirs. */
#include "binding.h"

static const char *const probes[QZ_PROBES] = {[QZ_PROBE_READ] = "read",
                                              [QZ_PROBE_COPY] = "copy",
                                              [QZ_PROBE_STREAM] = "stream",
                                              [QZ_PROBE_FMA] = "fma",
                                              [QZ_PROBE_DOT] = "dot"};

static qz_status operation(const qz_plan *plan, const void *args, const qz_run *run) {
    return plan->device->probe(plan, args, run);
}

/* Contiguous bytes where the probe needs them, else None. */
static int take_bytes(Py_buffer *buffer, const call *c, const char *name, PyObject *object, int needed, int flags) {
    if (!needed) {
        return object == Py_None ? 0 : qz_raise(PyExc_ValueError, c->op, "%s must be None for this probe", name);
    }
    if (!PyObject_CheckBuffer(object)) {
        PyObject *kind = PyType_GetName(Py_TYPE(object));
        if (kind) qz_raise(PyExc_TypeError, c->op, "%s must offer the buffer protocol, got %U", name, kind);
        Py_XDECREF(kind);
        return -1;
    }
    if (PyObject_GetBuffer(object, buffer, flags) < 0) return -1;
    if (buffer->len > 0 && buffer->len % QZ_PROBE_BLOCK == 0) return 0;
    return qz_raise(PyExc_ValueError, c->op, "%s must hold a multiple of %d bytes, got %zd", name, (int)QZ_PROBE_BLOCK,
                    buffer->len);
}

static int check_target(const call *c, const Py_buffer *source, const Py_buffer *target) {
    const char *from = source->buf, *to = target->buf;
    if (source->len != target->len) {
        return qz_raise(PyExc_ValueError, c->op, "target must be as long as source, %zd bytes, got %zd", source->len,
                        target->len);
    }
    if ((uintptr_t)to % 64) return qz_raise(PyExc_ValueError, c->op, "target must begin at a multiple of 64");
    if (from + source->len <= to || to + target->len <= from) return 0;
    return qz_raise(PyExc_ValueError, c->op, "target shares memory with source: give it memory of its own");
}

static int take_repeats(const call *c, PyObject *object, ptrdiff_t *repeats) {
    int given;
    if (qz_take_integer(c, "repeats", object, repeats, &given) < 0) return -1;
    if (given && *repeats > 0) return 0;
    return qz_raise(given ? PyExc_ValueError : PyExc_TypeError, c->op, "repeats must be a positive integer, got %S",
                    object);
}

static PyObject *probe(const plan_object *plan, const call *c, PyObject *const *args, Py_buffer *source,
                       Py_buffer *target) {
    double done = 0.0;
    qz_probe_args job = {.done = &done};
    const int what = qz_take_word(c, "what", args[1], probes, QZ_PROBES);
    if (what < 0 || take_repeats(c, args[4], &job.repeats) < 0) return NULL;
    const int reads = what < QZ_PROBE_FMA, writes = what == QZ_PROBE_COPY || what == QZ_PROBE_STREAM;
    if (take_bytes(source, c, "source", args[2], reads, PyBUF_SIMPLE) < 0) return NULL;
    if (take_bytes(target, c, "target", args[3], writes, PyBUF_WRITABLE) < 0) return NULL;
    if (writes && check_target(c, source, target) < 0) return NULL;
    job.what = (qz_probe)what;
    job.from = source->buf;
    job.to = target->buf;
    job.size = source->len;
    const double nanoseconds = reads ? (double)source->len / 64.0 : 1e5;
    if (qz_run_operation(plan, operation, &job, nanoseconds * (double)job.repeats) < 0) return NULL;
    return PyFloat_FromDouble(done);
}

/* probe(plan, what, source, target, repeats): bytes read and written, or multiplications and additions done */
PyObject *qz_py_probe(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    Py_buffer source = {0}, target = {0};
    if (qz_check_count("probe", count, 5) < 0) return NULL;
    const plan_object *plan = qz_take_plan(module, args[0], OP_ANY);
    if (!plan) return NULL;
    const call c = {.state = PyModule_GetState(module), .op = "probe"};
    PyObject *done = probe(plan, &c, args, &source, &target);
    if (source.obj) PyBuffer_Release(&source);
    if (target.obj) PyBuffer_Release(&target);
    return done;
}
