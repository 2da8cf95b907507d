"""The C functions called directly: nonsense, every kind of memory, DLPack, references, leaks."""

import array
import ctypes
import gc
import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import quantization as q
from conftest import SMALL
from quantization import _C

F32, U32 = np.float32, np.uint32


def plan(op):
    return _C.Plan(op)


def stored(rows=3):
    return np.arange(rows * 16, dtype=U32).reshape(rows, 16), np.ones((rows, 2), F32), np.ones((rows, 2), F32)


def experts():
    return [np.stack([array] * 4) for array in stored()]


def experts_fp():
    return [np.full((4, 3, 8), 0x12345678, U32), np.full((4, 3, 2), 127, np.uint8)]


def cache(D=64, width=32):
    return [np.ones((2, D), F32), np.zeros((2, 4, width), np.uint8), np.ones((2, 4), F32)]


# Every function with arguments that work; the first is a plan of this operation.
CALLS = {
    "quantize": ("affine_quantize", lambda: [np.ones((3, 64), F32), 64, 4, "metal", None, False, None, None]),
    "dequantize": ("affine_dequantize", lambda: [*stored(), None, None, None, "metal", None, None, None]),
    "matmul": (
        "affine_qmm_t",
        lambda: [np.ones((2, 128), F32), *stored(), None, None, None, "exact", None, None, None],
    ),
    "gather": (
        "affine_gather_qmm",
        lambda: [
            np.ones((2, 2, 128), F32), *experts(), np.array([[1], [0]]), np.array([3, 0, -1]), True, None, None, False,
            "exact", None, None, None,
        ],
    ),
    "gather_rhs": (
        "affine_gather_qmm_rhs",
        lambda: [
            np.ones((2, 128), F32), *experts(), np.array([3, 0]), None, None, None, True, "exact", None, None, None
        ],
    ),
    "fake_quantize": ("quantize", lambda: [np.ones((3, 64), F32), 4, None, None]),
    "gather_fp": (
        "mxfp4_gather_qmm",
        lambda: [
            np.ones((2, 2, 64), F32), *experts_fp(), np.array([1, 0]), np.array([3, -1]), True, False, None, "exact",
            None, None, None,
        ],
    ),
    "gather_rhs_fp": (
        "mxfp4_gather_qmm_rhs",
        lambda: [
            np.ones((2, 64), F32), *experts_fp(), np.array([3, 0]), None, True, None, "exact", None, None, None
        ],
    ),
    "fwht": ("fwht", lambda: [np.ones((3, 64), F32), True, False, None, None]),
    "quantize_kv": ("quantize_kv", lambda: [np.ones((3, 64), F32), 4, "unbiased", None, None, None]),
    "dequantize_kv": (
        "dequantize_kv",
        lambda: [np.zeros((3, 32), np.uint8), np.ones((3, 1), F32), 4, 2, False, None, None],
    ),
    "hadamard_quantize_kv": ("hadamard_quantize_kv", lambda: [*cache(), 1, False, None, None]),
    "hadamard_quantize_kv_seq": (
        "hadamard_quantize_kv_seq",
        lambda: [np.ones((3, 2, 64), F32), *cache()[1:], 1, None, 0, False, None],
    ),
    "hadamard_quantize_kv_hb": ("hadamard_quantize_kv_hb", lambda: [*cache(256, 256), 1, 5, False, None]),
}  # fmt: skip
OUT = {"quantize": 6, "dequantize": 8, "matmul": 9, "gather": 12, "gather_rhs": 11, "fake_quantize": 2}
OUT |= {"gather_fp": 10, "gather_rhs_fp": 9, "fwht": 3, "quantize_kv": 4, "dequantize_kv": 6}
WRONG_OUT = {"quantize": (None, None, np.ones(2, F32)), "quantize_kv": (None, np.ones(2, F32))}
KINDS = {
    "affine_quantize": "quantize",
    "affine_dequantize": "dequantize",
    "affine_qmm_t": "matmul",
    "affine_qmm_n": "matmul",
    "affine_qmv": "matmul",
    "affine_qvm": "matmul",
    "affine_qmm_t_nax": "matmul",
    "affine_qmm_n_nax": "matmul",
    "affine_gather_qmm": "gather",
    "affine_gather_qmm_rhs": "gather_rhs",
    "affine_gather_qmm_rhs_nax": "gather_rhs",
    "mxfp4_gather_qmm": "gather_fp",
    "nvfp4_gather_qmm_rhs": "gather_rhs_fp",
    "quantize": "fake_quantize",
    "fwht": "fwht",
    "quantize_kv": "quantize_kv",
    "dequantize_kv": "dequantize_kv",
    "hadamard_quantize_kv": "hadamard_quantize_kv",
    "hadamard_quantize_kv_seq": "hadamard_quantize_kv_seq",
    "hadamard_quantize_kv_hb": "hadamard_quantize_kv_hb",
}


# ---- nonsense ----


@pytest.mark.parametrize("function", CALLS)
def test_numbers_of_arguments(function):
    op, arguments = CALLS[function]
    full = [plan(op), *arguments()]
    getattr(_C, function)(*full)
    for count in (*range(len(full)), len(full) + 1, 40):
        given = (full * 40)[:count]
        with pytest.raises(TypeError, match=rf"^{function} takes {len(full)} positional arguments, got {count}$"):
            getattr(_C, function)(*given)
    with pytest.raises(TypeError, match=r"keyword"):
        getattr(_C, function)(*full[:-1], input_dtype=None)


@pytest.mark.parametrize("function", CALLS)
def test_what_is_no_plan(function):
    for thing in (None, 5, "affine_quantize", _C.Plan, object(), np.ones(3), q.AffineQuantize()):
        with pytest.raises(TypeError, match=r"^the first argument must be a Plan, got <class"):
            getattr(_C, function)(thing, *CALLS[function][1]())


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("op", KINDS)
def test_plans_of_other_operations(function, op):
    if KINDS[op] == function:
        return
    with pytest.raises(TypeError, match=rf"^the plan is for {op}, here one for \w+ or its like is needed$"):
        getattr(_C, function)(plan(op), *CALLS[function][1]())


NONSENSE = [
    None,
    True,
    -1,
    5,
    1 << 70,
    1.5,
    "",
    "x",
    b"\0" * 4,
    (),
    [],
    {},
    object(),
    np.ones(3),
    np.zeros((0, 4), U32),
]


@pytest.mark.parametrize("function", CALLS)
def test_each_argument_as_nonsense(function):
    op, arguments = CALLS[function]
    for position in range(len(arguments())):
        for thing in NONSENSE:
            given = arguments()
            given[position] = thing
            said = f"{op}: "
            try:
                getattr(_C, function)(plan(op), *given)
            except (TypeError, ValueError, IndexError) as error:
                said = str(error)
            assert said.startswith(f"{op}: ")


def test_plans_cannot_be_changed_or_subclassed():
    p = plan("quantize")
    for name in ("op", "device", "isa", "variant", "threads", "new"):
        with pytest.raises(AttributeError):
            setattr(p, name, 1)
    with pytest.raises(TypeError):
        type("Sub", (_C.Plan,), {})
    with pytest.raises(TypeError):
        _C.Plan.op = 5


# ---- kinds of memory ----


def fake(x, **given):
    return q.quantize(x, 4, **given)


def test_buffers_of_the_standard_library():
    values = [0.1, -0.5, 0.7, 2.0]
    expected = fake(np.array(values, F32))
    for code in "fd":
        assert np.array_equal(fake(array.array(code, values)), expected)
        assert np.array_equal(fake(memoryview(array.array(code, values))), expected)
    raw = bytearray(np.array(values, F32).tobytes())
    assert np.array_equal(fake(memoryview(raw).cast("f")), expected)
    assert np.array_equal(fake(memoryview(raw).cast("f", (2, 2))), expected.reshape(2, 2))
    assert np.array_equal(fake(memoryview(raw).cast("f")[::-2]), expected[::-2])
    assert np.array_equal(fake(memoryview(bytes(raw)).cast("f")), expected)


def test_ctypes_arrays_which_give_no_strides():
    expected = fake(np.arange(6, dtype=F32).reshape(2, 3) / 6)
    flat = (ctypes.c_float * 6)(*(i / 6 for i in range(6)))
    matrix = ((ctypes.c_float * 3) * 2).from_buffer(flat)
    assert np.array_equal(fake(flat), expected.ravel())
    assert np.array_equal(fake(matrix), expected)
    assert fake(ctypes.c_float(0.5)).shape == ()
    out = ((ctypes.c_float * 3) * 2)()
    assert fake(matrix, out=out) is out
    assert np.array_equal(np.array(out), expected)
    codes, scales, biases = stored()
    words = ((ctypes.c_uint32 * 16) * 3).from_buffer_copy(codes)
    same = q.affine_dequantize(words, scales, biases)
    assert np.array_equal(same, q.affine_dequantize(codes, scales, biases))


def test_lists_and_numbers_are_float64():
    assert fake(0.5).shape == ()
    assert fake(0.5) == fake(F32(0.5)) == fake(np.float64(0.5)) == fake(np.array(0.5, F32))
    assert fake(1) == 1
    assert fake([[0, 1], [0.5, 1.0]]).shape == (2, 2)
    assert fake([]).shape == (0,)
    assert fake((0.1, F32(0.2))).shape == (2,)


def test_containers_that_become_arrays():
    class Container:
        def __init__(self, values):
            self.values = values

        def __array__(self, dtype=None, copy=None):
            return self.values if dtype is None else self.values.astype(dtype)

    assert np.array_equal(fake(Container(np.ones(3, np.float16))), [1, 1, 1])
    with pytest.raises(TypeError, match=r"^quantize: x has dtype int64, must be float32"):
        fake(Container(np.ones(3, np.int64)))


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # NumPy discourages its matrices
def test_matrix_and_record_views_are_their_memory():
    values = np.linspace(-1, 1, 6, dtype=F32).reshape(2, 3)
    assert np.array_equal(fake(np.matrix(values)), fake(values))
    records = np.zeros(4, [("a", "u1"), ("b", F32)])
    records["b"] = [0.1, 0.2, 0.3, 0.4]
    assert np.array_equal(fake(records["b"]), fake(records["b"].copy()))
    assert np.array_equal(fake(records["b"], out=records["b"]), records["b"])
    assert not records["a"].any()


def test_read_only_inputs():
    for function in OUT:
        op, arguments = CALLS[function]
        frozen = arguments()
        for value in frozen:
            if isinstance(value, np.ndarray):
                value.flags.writeable = False
        first, second = (getattr(_C, function)(plan(op), *given) for given in (frozen, arguments()))
        for a, b in zip(first, second, strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_unaligned_memory(offset, isa, rng):
    def unaligned(values):
        memory = np.zeros(values.nbytes + 8, np.uint8)
        view = memory[offset : offset + values.nbytes].view(values.dtype).reshape(values.shape)
        view[...] = values
        return view

    x, w = rng.standard_normal((3, 128)).astype(F32), rng.standard_normal((5, 128)).astype(F32)
    codes, scales, biases = q.affine_quantize(unaligned(w))
    for got, expected in zip((codes, scales, biases), q.affine_quantize(w), strict=True):
        assert np.array_equal(got, expected)
    given = [unaligned(value) for value in (codes, scales, biases)]
    expected = q.affine_qmm_t(x, codes, scales, biases)
    out = unaligned(np.zeros_like(expected))
    assert np.array_equal(q.affine_qmm_t(unaligned(x), *given, out=out), expected)
    assert np.array_equal(q.affine_dequantize(*given), q.affine_dequantize(codes, scales, biases))
    assert np.array_equal(fake(unaligned(x)), fake(x))


def test_codes_of_the_standard_library():
    codes, scales, biases = stored()
    for letter in "iI":
        same = array.array(letter, codes.ravel().tolist())
        words = memoryview(same).cast("B").cast(letter, codes.shape)
        assert np.array_equal(q.affine_dequantize(words, scales, biases), q.affine_dequantize(codes, scales, biases))
    with pytest.raises(TypeError, match=r"^affine_dequantize: w must be an array of uint32"):
        q.affine_dequantize(array.array("q", [1] * 16), scales, biases)


# ---- bfloat16 ----


@pytest.fixture
def ml_dtypes():
    return pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")


def test_ml_dtypes_in_and_out(ml_dtypes, rng):
    w = rng.standard_normal((3, 64)).astype(ml_dtypes.bfloat16)
    raw = w.view(np.uint16)
    codes, scales, biases = q.affine_quantize(w)
    raw_codes, raw_scales, raw_biases = q.affine_quantize(raw, input_dtype="bfloat16")
    assert scales.dtype == biases.dtype == ml_dtypes.bfloat16
    assert raw_scales.dtype == raw_biases.dtype == np.uint16
    assert np.array_equal(codes, raw_codes)
    assert np.array_equal(scales.view(np.uint16), raw_scales)
    assert np.array_equal(biases.view(np.uint16), raw_biases)
    y = q.affine_dequantize(codes, scales, biases)
    assert y.dtype == ml_dtypes.bfloat16
    assert q.affine_dequantize(codes, scales, biases, dtype="bfloat16").dtype == ml_dtypes.bfloat16
    assert q.affine_dequantize(codes, raw_scales, raw_biases, input_dtype="bfloat16").dtype == np.uint16
    f32 = scales.astype(F32), biases.astype(F32)
    assert q.affine_dequantize(codes, *f32, dtype="bfloat16").dtype == np.uint16
    assert q.affine_dequantize(codes, *f32, dtype=ml_dtypes.bfloat16).dtype == ml_dtypes.bfloat16
    assert q.affine_dequantize(codes, *f32, dtype=np.dtype(ml_dtypes.bfloat16)).dtype == ml_dtypes.bfloat16
    for out in (np.zeros((3, 64), ml_dtypes.bfloat16), np.zeros((3, 64), np.uint16)):
        assert q.affine_dequantize(codes, scales, biases, out=out) is out
        assert np.array_equal(out.view(np.uint16), y.view(np.uint16))
    product = q.affine_qmm_t(w[:, ::-1], codes, scales, biases)
    assert product.dtype == ml_dtypes.bfloat16
    assert fake(w[0, 0]).shape == ()
    assert np.array_equal(fake(w), fake(w.astype(F32)))


def test_ml_dtypes_read_only(ml_dtypes):
    codes, scales, biases = q.affine_quantize(np.ones((1, 64), ml_dtypes.bfloat16))
    out = np.zeros((1, 64), ml_dtypes.bfloat16)
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"^affine_dequantize: out is read-only$"):
        q.affine_dequantize(codes, scales, biases, out=out)
    assert np.array_equal(fake(out), np.zeros((1, 64)))


def test_other_ml_dtypes_are_refused_by_name(ml_dtypes):
    for name in ("float8_e4m3fn", "float8_e5m2", "int4", "uint4"):
        values = np.zeros((2, 64), getattr(ml_dtypes, name))
        with pytest.raises(TypeError, match=rf"^quantize: x has dtype {name}, must be float32"):
            fake(values)
        with pytest.raises(TypeError, match=rf"^quantize: out has dtype {name}, must be float32"):
            fake(np.zeros((2, 64), F32), out=values)


def test_without_ml_dtypes(monkeypatch):
    """As Python marks a package that must not be imported, and one that is half imported."""
    script = """if True:
        import sys, types
        import numpy as np
        for module in (None, types.ModuleType("ml_dtypes")):
            sys.modules["ml_dtypes"] = module
            import quantization as q
            assert q.quantize([0.5, 1], 2).shape == (2,)
            codes, scales, biases = q.affine_quantize(np.ones((1, 64), np.float32), scale_dtype="bfloat16")
            assert scales.dtype == np.uint16
            try:
                class bfloat16: name = "bfloat16"
                q.affine_quantize(np.ones((1, 64), np.float32), scale_dtype=bfloat16)
            except ImportError as error:
                assert str(error) == "affine_quantize: a bfloat16 dtype needs ml_dtypes: import it first", error
            else:
                raise AssertionError
        """
    subprocess.run([sys.executable, "-c", script], check=True, env=environment())


def test_an_impostor_of_bfloat16(ml_dtypes):
    """An object whose dtype is bfloat16, but whose view is something else, is not read past its end."""

    class Impostor:
        dtype = np.dtype(ml_dtypes.bfloat16)

        def __init__(self, view):
            self._view = view

        def view(self, dtype):
            return self._view

    for view in (np.zeros(1, np.uint8), np.zeros(4, F32), b"", None, 5):
        with pytest.raises(TypeError, match=r"^quantize: x has dtype bfloat16"):
            fake(Impostor(view))


def test_mlx_arrays():
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    w = np.linspace(-1, 1, 192, dtype=F32).reshape(3, 64)
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        given = mx.array(w).astype(dtype)
        codes, scales, _ = q.affine_quantize(given, profile="cpu")
        mx_codes, mx_scales, _ = mx.quantize(given, group_size=64, bits=4, stream=mx.cpu)
        assert np.array_equal(codes, np.array(mx_codes))
        found = scales.view(np.uint16) if dtype == mx.bfloat16 else scales
        expected = np.array(mx_scales.view(mx.uint16)) if dtype == mx.bfloat16 else np.array(mx_scales)
        assert np.array_equal(found, expected)
        assert q.affine_dequantize(mx_codes, mx_scales, mx_scales).shape == (3, 64)
    with pytest.raises(TypeError, match=r"^quantize: x has dtype mlx\.core\.int32, must be float32"):
        fake(mx.array([1, 2]))


def test_torch_tensors():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    w = torch.linspace(-1, 1, 192).reshape(3, 64)
    assert np.array_equal(q.affine_quantize(w)[0], q.affine_quantize(w.numpy())[0])
    half = w.to(torch.bfloat16)
    assert np.array_equal(fake(half), fake(half.float().numpy()))


# ---- DLPack ----

new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
is_capsule = ctypes.pythonapi.PyCapsule_IsValid
is_capsule.restype, is_capsule.argtypes = ctypes.c_int, [ctypes.py_object, ctypes.c_char_p]


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Plain(ctypes.Structure):
    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", Deleter))


class Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


CODES = {"f": 2, "u": 1, "i": 0}


class Producer:
    """Offers an array through hand-made DLPack structures alone, and counts the deletions."""

    def __init__(self, values, versioned=False, strides=True, device=(1, 0), **changes):
        self.values, self.device, self.deleted, self.capsule = values, device, 0, None
        size = values.itemsize
        self.shape = (ctypes.c_int64 * values.ndim)(*changes.pop("shape", values.shape))
        self.strides = (ctypes.c_int64 * values.ndim)(*(changes.pop("steps", [s // size for s in values.strides])))
        tensor = Tensor(values.ctypes.data, 1, 0, values.ndim, CODES[values.dtype.kind], 8 * size, 1)
        tensor.shape = ctypes.cast(self.shape, ctypes.POINTER(ctypes.c_int64))
        if strides:
            tensor.strides = ctypes.cast(self.strides, ctypes.POINTER(ctypes.c_int64))
        owner = Versioned if versioned else Plain
        outer = {key: changes.pop(key) for key in list(changes) if key in ("flags", "major")}
        for key, value in changes.items():
            setattr(tensor, key, value)
        deleter = Deleter(self._delete) if outer.get("deleter", True) else Deleter(0)
        self.managed = owner(tensor=tensor, deleter=deleter, **({"major": 1} if versioned else {}) | outer)
        self.name = b"dltensor_versioned" if versioned else b"dltensor"

    def _delete(self, address):
        assert address == ctypes.addressof(self.managed)
        assert sys.exc_info()[0] is None
        self.deleted += 1

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **_):
        self.capsule = new_capsule(ctypes.addressof(self.managed), self.name, None)
        return self.capsule


KINDS_OF_CAPSULE = pytest.mark.parametrize("versioned", [False, True], ids=["plain", "versioned"])


@KINDS_OF_CAPSULE
def test_dlpack_is_used_once_and_deleted_once(versioned, rng):
    w = rng.standard_normal((3, 64)).astype(F32)
    for dtype in ("f2", "f4", "f8"):
        producer = Producer(w.astype(dtype), versioned)
        assert np.array_equal(q.affine_quantize(producer)[0], q.affine_quantize(w.astype(dtype))[0])
        assert producer.deleted == 1
        assert is_capsule(producer.capsule, b"used_" + producer.name)
    expected = q.affine_quantize(w)
    for given in (
        Producer(np.asfortranarray(w), versioned),
        Producer(np.ascontiguousarray(w[::-1, ::-1])[::-1, ::-1], versioned),
        Producer(w, versioned, strides=False),
        Producer(w[1:], versioned, shape=(2, 64), data=w.ctypes.data, byte_offset=256),
    ):
        found = q.affine_quantize(given)[0]
        assert np.array_equal(found, expected[0][-len(found) :])
        assert given.deleted == 1


@KINDS_OF_CAPSULE
def test_dlpack_codes_and_bfloat16(versioned):
    codes, scales, biases = stored()
    expected = q.affine_dequantize(codes, scales, biases)
    for words in (codes, codes.view(np.int32)):
        given = [Producer(array, versioned) for array in (words, scales, biases)]
        assert np.array_equal(q.affine_dequantize(*given), expected)
        assert [producer.deleted for producer in given] == [1, 1, 1]
    raw = np.full((1, 64), 0x3F80, np.uint16)
    assert np.array_equal(fake(Producer(raw, versioned, code=4)), np.ones((1, 64)))
    assert np.array_equal(fake(Producer(raw, versioned), input_dtype="bfloat16"), np.ones((1, 64)))
    with pytest.raises(TypeError, match=r"element type that is not supported \(DLPack code 1, 16 bits, 1 lanes\)$"):
        fake(Producer(raw, versioned))


@KINDS_OF_CAPSULE
def test_dlpack_out(versioned):
    x = np.linspace(-1, 1, 6, dtype=F32).reshape(2, 3)
    memory = np.zeros((3, 2), F32)
    out = Producer(memory.T, versioned)
    assert fake(x, out=out) is out
    assert np.array_equal(memory.T, fake(x))
    assert out.deleted == 1
    inside = Producer(x, versioned)
    assert fake(Producer(x, versioned), out=inside) is inside  # the same elements: in place


def test_dlpack_out_that_is_read_only():
    memory = np.zeros(3, F32)
    out = Producer(memory, versioned=True, flags=1)
    with pytest.raises(ValueError, match=r"^quantize: out is read-only$"):
        fake(np.ones(3, F32), out=out)
    assert out.deleted == 1
    assert not memory.any()
    assert np.array_equal(fake(out), [0, 0, 0])
    assert out.deleted == 2


REFUSED = [
    (dict(device_type=2), TypeError, r"x is not in CPU memory \(DLPack device type 2\): move it to the CPU first"),
    (dict(code=0), None, None),
    (
        dict(code=5, bits=64),
        TypeError,
        r"x has an element type that is not supported \(DLPack code 5, 64 bits, 1 lanes\)",
    ),
    (dict(lanes=4), TypeError, r"x has an element type that is not supported \(DLPack code 2, 32 bits, 4 lanes\)"),
    (
        dict(code=0, bits=64),
        TypeError,
        r"x has an element type that is not supported \(DLPack code 0, 64 bits, 1 lanes\)",
    ),
    (dict(ndim=33), ValueError, "x has 33 dimensions, at most 32 are supported"),
    (dict(ndim=-1), ValueError, "x has -1 dimensions, at most 32 are supported"),
    (dict(shape=(-1, 4)), ValueError, "x is a DLPack tensor of an impossible shape"),
    (dict(shape=(1 << 40, 1 << 40)), ValueError, "x is a DLPack tensor of an impossible shape"),
    (dict(steps=(1 << 62, 1)), ValueError, "x is a DLPack tensor of an impossible shape"),
    (dict(shape=(1 << 30, 1 << 30), steps=(0, 0)), ValueError, r"x of shape \(1073741824, 1073741824\) is too large"),
]


@KINDS_OF_CAPSULE
@pytest.mark.parametrize(("changes", "error", "message"), REFUSED)
def test_dlpack_that_is_refused_is_deleted(changes, error, message, versioned):
    given = Producer(np.ones((2, 4), F32), versioned, **changes)
    with pytest.raises(error or TypeError, match=f"^quantize: {message or 'x has dtype|quantize: x must be'}"):
        fake(given)
    assert given.deleted == 1


def test_dlpack_of_a_later_version():
    given = Producer(np.ones((2, 4), F32), versioned=True, major=2)
    with pytest.raises(TypeError, match=r"^quantize: x offers version 2 of DLPack, only version 1 is understood$"):
        fake(given)
    assert given.deleted == 1


@KINDS_OF_CAPSULE
def test_dlpack_of_other_devices_is_not_asked_for(versioned):
    given = Producer(np.ones(3, F32), versioned, device=(2, 0))
    with pytest.raises(TypeError, match=r"^quantize: x is not in CPU memory \(DLPack device type 2\)"):
        fake(given)
    assert given.capsule is None


def test_dlpack_made_wrong():
    def producer(pack, device=lambda: (1, 0)):
        return type("Wrong", (), {"__dlpack__": lambda self: pack(), "__dlpack_device__": lambda self: device()})()

    for thing in (None, 5, "dltensor", object(), new_capsule(1, b"something", None)):
        with pytest.raises(TypeError, match=r"^quantize: x: its __dlpack__ returned no DLPack capsule$"):
            fake(producer(lambda thing=thing: thing))
    for device in (None, 5, (1,), (1, 0, 0), ("cpu", 0), [1, 0]):
        with pytest.raises(TypeError, match=r"^quantize: x: its __dlpack_device__ returned no pair of integers$"):
            fake(producer(object, lambda device=device: device))
    with pytest.raises(OverflowError):
        fake(producer(object, lambda: (1 << 70, 0)))
    with pytest.raises(ZeroDivisionError):
        fake(producer(lambda: 1 // 0))
    with pytest.raises(ZeroDivisionError):
        fake(producer(object, lambda: 1 // 0))
    with pytest.raises(TypeError, match=r"^quantize: x has __dlpack__ but no __dlpack_device__$"):
        fake(type("Half", (), {"__dlpack__": None})())
    used = Producer(np.ones(3, F32))
    capsule = used.__dlpack__()
    fake(producer(lambda: capsule))
    with pytest.raises(TypeError, match=r"returned no DLPack capsule$"):
        fake(producer(lambda: capsule))
    assert used.deleted == 1


def test_dlpack_of_numpy():
    class Wrapped:
        def __init__(self, values):
            self.values = values

        def __dlpack__(self, **given):
            return self.values.__dlpack__(**given)

        def __dlpack_device__(self):
            return self.values.__dlpack_device__()

    x = np.linspace(-1, 1, 64, dtype=F32).reshape(8, 8)
    before = sys.getrefcount(x)
    for view in (x, x.T, x[::-1, ::2], x[:0], x[0, 0:1]):
        assert np.array_equal(fake(Wrapped(view)), fake(view))
    del view
    with pytest.raises(ValueError, match=r"^quantize: out must have shape"):
        fake(x, out=Wrapped(x[0]))
    assert sys.getrefcount(x) == before


# ---- references and memory ----


def environment(**changes):
    source = str(Path(q.__file__).parents[1])
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **changes}


def rss():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) << 10
    raise AssertionError


def failing(function, position):
    """The call with its argument at this position wrong in a way that is found late, if there is one."""
    op, arguments = CALLS[function]
    given = arguments()
    given[position] = {int: 7, str: "nonsense"}.get(type(given[position]), object())
    return op, given


def bad_calls(function):
    for position in range(len(CALLS[function][1]())):
        yield failing(function, position)
    op, arguments = CALLS[function]
    given = arguments()
    given[OUT.get(function, 1)] = WRONG_OUT.get(function, np.ones((1, 1), F32))
    yield op, given


def calls_of(function):
    """A call that works, without and with `out` (those of a cache write in place), and all that fail."""
    op, arguments = CALLS[function]
    out = OUT.get(function)
    given = arguments()
    result = getattr(_C, function)(plan(op), *given)
    with_out = given if out is None else [*given[:out], result, *given[out + 1 :]]
    return [(op, given), (op, with_out), *bad_calls(function)]


def attempt(function, compiled, given):
    try:
        getattr(_C, function)(compiled, *given)
    except (TypeError, ValueError):
        return False
    return True


@pytest.mark.parametrize("function", CALLS)
def test_no_references_are_lost_or_kept(function):
    calls = [(plan(op), given) for op, given in calls_of(function)]
    for call in calls:
        attempt(function, *call)
    gc.collect()
    for compiled, given in calls:
        objects = [compiled, *(value for value in given if not isinstance(value, str | int | type(None)))]
        before = [sys.getrefcount(thing) for thing in objects]
        for _ in range(100):
            attempt(function, compiled, given)
        assert [sys.getrefcount(thing) for thing in objects] == before


@pytest.mark.skipif(SMALL, reason="emulators keep memory of their own")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("function", CALLS)
def test_no_memory_is_lost(function):
    """2000 calls of each kind: a leak of 8 bytes a call or more is seen, as RSS grows by whole pages."""
    calls = [(plan(op), given) for op, given in calls_of(function)]
    assert [attempt(function, *call) for call in calls[:2]] == [True, True]
    assert not any(attempt(function, *call) for call in calls[3:-1] if call[1][-1] is not None)

    def repeat(times):
        for call in calls:
            for _ in range(times):
                attempt(function, *call)
        gc.collect()
        return rss()

    before = repeat(200)
    grown = repeat(2000) - before
    assert grown < 1 << 20


@pytest.mark.skipif(SMALL, reason="emulators keep memory of their own")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_no_memory_is_lost_with_dlpack_and_failing_allocations():
    producer, wrong = Producer(np.ones((3, 64), F32)), Producer(np.ones((3, 64), F32), lanes=2)
    x, weights = np.ones((2, 128), F32), stored()

    def repeat(times):
        for i in range(times):
            fake(producer)
            fake([0.5, 1.0])
            with pytest.raises(TypeError):
                fake(wrong)
            _C.fail_allocations_after(i % 3)
            with pytest.raises(MemoryError):
                q.affine_qmm_t(x, *weights)
        gc.collect()
        return rss()

    try:
        before = repeat(200)
        assert repeat(2000) - before < 1 << 20
    finally:
        _C.fail_allocations_after(-1)
    assert producer.deleted == wrong.deleted == 2200


def test_two_instances_of_the_module():
    first, name = _C, "quantization._C"
    saved = sys.modules.pop(name)
    try:
        second = importlib.import_module(name)
        assert second.Plan("quantize").op == "quantize"
        if second is not first:
            with pytest.raises(TypeError, match=r"must be a Plan"):
                second.fake_quantize(first.Plan("quantize"), [0.5], 4, None, None)
        assert second.fake_quantize(second.Plan("quantize"), [0.5], 2, None, None) == 1
        importlib.reload(second)
        assert second.fake_quantize(second.Plan("quantize"), [0.5], 2, None, None) == 1
        del second
        gc.collect()
    finally:
        sys.modules[name] = saved
    assert first.fake_quantize(first.Plan("quantize"), [0.5], 2, None, None) == 1


# ---- random views ----


def random_view(draw, st):
    """A view of random memory: shape, strides in elements of either sign and 0, and an offset that keeps it inside."""
    ndim = draw(st.integers(0, 4))
    shape = tuple(draw(st.integers(0, 5)) for _ in range(ndim))
    strides = tuple(draw(st.integers(-7, 7)) for _ in range(ndim))
    reach = [(n - 1) * s if n else 0 for n, s in zip(shape, strides, strict=True)]
    low, high = -sum(r for r in reach if r < 0), sum(r for r in reach if r > 0)
    dtype = draw(st.sampled_from(["f2", "f4", "f8"]))
    memory = np.random.default_rng(low * 97 + high).standard_normal(low + high + 1).astype(dtype)
    return as_strided(memory[low:], shape, tuple(s * memory.itemsize for s in strides))


def test_random_views_are_as_their_copies():
    hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=20 if SMALL else 200, deadline=None, database=None)
    @hypothesis.given(st.data())
    def check(data):
        x = random_view(data.draw, st)
        expected = fake(x.copy())
        assert np.array_equal(fake(x), expected)
        out = np.zeros(x.shape[::-1], F32).T[(*[slice(None, None, -1)] * x.ndim, ...)]
        assert fake(x, out=out) is out
        assert np.array_equal(out, expected)
        if x.ndim == 0:
            return
        w = np.repeat(x, 32, -1)
        w = as_strided(w, w.shape, w.strides) if data.draw(st.booleans()) else np.asfortranarray(w)
        for got, want in zip(q.affine_quantize(w, 32), q.affine_quantize(w.copy(), 32), strict=True):
            assert got.tobytes() == want.tobytes()

    check()
