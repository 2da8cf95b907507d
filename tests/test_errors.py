"""Every refusal: its exception, its exact words, and that it wrote nothing."""

import datetime

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import quantization as q
from quantization import _C

F32, U32 = np.float32, np.uint32


def ones(*shape, dtype=F32):
    return np.ones(shape, dtype)


def stored(rows=3, groups=2, words=16):
    """Codes, scales and biases of 64-code groups of 4 bits."""
    return {"w": ones(rows, words, dtype=U32), "scales": ones(rows, groups), "biases": ones(rows, groups)}


def experts(count=4):
    """Four times the same."""
    return {name: np.stack([array] * count) for name, array in stored().items()}


# Arguments with which every function works, and the shape of its result.
FUNCTIONS = {
    "quantize": (q.quantize, lambda: {"x": ones(3, 64)}, (3, 64)),
    "affine_quantize": (q.affine_quantize, lambda: {"w": ones(3, 64)}, None),
    "affine_dequantize": (q.affine_dequantize, stored, (3, 128)),
    "affine_qmm_t": (q.affine_qmm_t, lambda: {"x": ones(2, 128), **stored()}, (2, 3)),
    "affine_qmv": (q.affine_qmv, lambda: {"x": ones(128), **stored()}, (3,)),
    "affine_qmm_n": (q.affine_qmm_n, lambda: {"x": ones(2, 3), **stored()}, (2, 128)),
    "affine_qvm": (q.affine_qvm, lambda: {"x": ones(3), **stored()}, (128,)),
    "affine_gather_qmm": (
        q.affine_gather_qmm,
        lambda: {"x": ones(2, 2, 128), **experts(), "rhs_indices": np.array([3, 0])},
        (2, 2, 3),
    ),
    "affine_gather_qmm_rhs": (
        q.affine_gather_qmm_rhs,
        lambda: {"x": ones(2, 128), **experts(), "indices": np.array([3, 0])},
        (2, 3),
    ),
}
PRODUCTS = ["affine_qmm_t", "affine_qmv", "affine_qmm_n", "affine_qvm"]
GATHERED = ["affine_gather_qmm", "affine_gather_qmm_rhs"]
STORED = ["affine_dequantize", *PRODUCTS, *GATHERED]
FLOATS = [
    ("quantize", "x"),
    ("affine_quantize", "w"),
    *((name, argument) for name in STORED for argument in ("scales", "biases")),
    *((name, "x") for name in (*PRODUCTS, *GATHERED)),
]


def refuse(name, error, message, **changes):
    """Assert that a function called with these changes raises exactly this."""
    function, arguments, _ = FUNCTIONS[name]
    with pytest.raises(error) as caught:
        function(**{**arguments(), **changes})
    assert type(caught.value) is error
    assert str(caught.value) == f"{name}: {message}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_arguments_these_tests_start_from_work(name):
    function, arguments, shape = FUNCTIONS[name]
    result = function(**arguments())
    assert shape is None or result.shape == shape


# ---- kinds and dtypes ----


def arrays_of_wrong_dtype():
    structured = np.dtype([("a", "<f4")])
    for dtype in ("bool", "int8", "uint8", "int16", "int32", "int64", "uint32", "uint64", "complex64", ">f4", ">f8"):
        yield np.ones((3, 2), dtype), dtype
    yield np.ones((3, 2), object), "object"
    yield np.ones((3, 2), "U3"), "<U3"
    yield np.ones((3, 2), "S3"), "|S3"
    yield np.ones((3, 2), "M8[s]"), "datetime64[s]"
    yield np.ones((3, 2), "m8[ns]"), "timedelta64[ns]"
    yield np.ones((3, 2), structured), "[('a', '<f4')]"
    if np.dtype(np.longdouble).itemsize > 8:
        yield np.ones((3, 2), np.longdouble), np.dtype(np.longdouble).name


@pytest.mark.parametrize(("name", "argument"), FLOATS)
def test_other_dtypes_are_no_floats(name, argument):
    for array, dtype in arrays_of_wrong_dtype():
        text = str(np.dtype(array.dtype))
        assert text == dtype or dtype in (">f4", ">f8", array.dtype.name)
        expected = f"{argument} has dtype {text}, must be float32, float16, bfloat16 or float64"
        refuse(name, TypeError, expected, **{argument: array})


@pytest.mark.parametrize(("name", "argument"), FLOATS)
def test_bits_of_bfloat16_have_to_be_declared(name, argument):
    hint = '(input_dtype="bfloat16" declares that uint16 holds bfloat16 bits)'
    expected = f"{argument} has dtype uint16, must be float32, float16, bfloat16 or float64 {hint}"
    refuse(name, TypeError, expected, **{argument: ones(3, 2, dtype=np.uint16)})


@pytest.mark.parametrize(("name", "argument"), FLOATS)
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, "NoneType"),
        ("1.5", "str"),
        ({}, "dict"),
        ({1.0}, "set"),
        (object(), "object"),
        (1j, "complex"),
        (["a"], "list"),
        ([[1.0], [1.0, 2.0]], "list"),
        (datetime.date(2026, 1, 1), "date"),
        (lambda: 0, "function"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_objects_are_no_floats(name, argument, value, kind):
    expected = f"{argument} must be an array of floats, or a list of numbers, got {kind}"
    refuse(name, TypeError, expected, **{argument: value})


@pytest.mark.parametrize(("name", "argument"), FLOATS)
def test_bytes_are_no_floats(name, argument):
    for value in (b"12345678", bytearray(8), memoryview(b"1234")):
        kind = type(value).__name__
        rule = "float32, float16, bfloat16 or float64"
        refuse(name, TypeError, f"{argument} must be an array of {rule}, got {kind}", **{argument: value})


@pytest.mark.parametrize("name", STORED)
def test_codes_are_32_bit_integers(name):
    rule = "uint32 (or int32 with the same bits)"
    for dtype in ("int64", "uint64", "uint8", "uint16", "float32", "float64", "bool", "object", ">u4"):
        codes = ones(3, 16).astype(dtype)
        refuse(name, TypeError, f"w has dtype {codes.dtype}, must be {rule}", w=codes)
        if dtype == "uint16":
            refuse(name, TypeError, f"w has dtype uint16, must be {rule}", w=codes, input_dtype="bfloat16")
    for value in ([[1, 2]], 5, None, "w", {}):
        refuse(name, TypeError, f"w must be an array of {rule}, got {type(value).__name__}", w=value)


@pytest.mark.parametrize("name", STORED)
def test_int32_codes_are_the_same_bits(name):
    function, arguments, _ = FUNCTIONS[name]
    signed = {**arguments(), "w": arguments()["w"].view(np.int32)}
    assert function(**signed).tobytes() == function(**arguments()).tobytes()


# ---- plain values ----


@pytest.mark.parametrize("x", [["0.5"], [None], [True, False], [1j], [[1.0], [2.0, 3.0]], [{}]])
def test_lists_hold_numbers(x):
    refuse("quantize", TypeError, "x must be an array of floats, or a list of numbers, got list", x=x)


def test_elements_of_out_do_not_share_memory():
    memory = np.zeros(64, F32)
    for shape, strides in (((3, 8), (8, 4)), ((8, 3), (4, 8)), ((2, 2), (4, 4)), ((3, 8), (-8, 4))):
        out = as_strided(memory[32:], shape, strides)
        refuse("quantize", ValueError, "out has elements that share memory: give each its own", x=ones(*shape), out=out)
    for out in (
        memory.reshape(8, 8)[::2, ::-3],
        memory.reshape(8, 8).T[1:2],
        memory.reshape(4, 4, 4).transpose(2, 0, 1),
    ):
        assert q.quantize(ones(*out.shape), out=out) is out


AFFINE = [row for row in q._C.formats() if row["mode"] == "affine"]
WIDTHS = sorted({row["bits"] for row in AFFINE})
GROUP_SIZES = sorted({size for row in AFFINE if row["bits"] == 4 for size in row["group_sizes"]})


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "quantize"])
@pytest.mark.parametrize("argument", ["bits", "group_size"])
def test_packing_is_an_integer_of_the_table(name, argument):
    choices = {"bits": WIDTHS, "group_size": GROUP_SIZES}[argument]
    listed = ", ".join(map(str, choices))
    for value in {0, -1, 1, 7, 16, 48, 1 << 40, -(1 << 62)} - set(choices):
        refuse(name, ValueError, f"{argument} must be one of {listed}, got {value}", **{argument: value})
    for value in (1 << 63, -(1 << 70), 10**5000):
        refuse(name, ValueError, f"{argument} is out of range: it does not fit 64 bits", **{argument: value})
    for value in (4.0, True, "4", (4,), np.float32(4), np.bool_(True), 4j):
        refuse(name, TypeError, f"{argument} must be an integer, got {type(value).__name__}", **{argument: value})


def test_bits_of_fake_quantization():
    for value in (0, -1, 17, 1 << 40):
        refuse("quantize", ValueError, f"bits must be between 1 and 16, got {value}", bits=value)
    refuse("quantize", ValueError, "bits is out of range: it does not fit 64 bits", bits=1 << 64)
    for value, kind in ((None, "None"), (4.0, "float"), (True, "bool"), ("4", "str")):
        refuse("quantize", TypeError, f"bits must be an integer, got {kind}", bits=value)


@pytest.mark.parametrize("name", ["affine_quantize", "affine_dequantize"])
def test_profile(name):
    refuse(name, ValueError, "profile must be 'metal' or 'cpu', got 'gpu'", profile="gpu")
    refuse(name, TypeError, "profile must be a string, got NoneType", profile=None)
    refuse(name, TypeError, "profile must be a string, got bytes", profile=b"cpu")


@pytest.mark.parametrize(("name", "argument"), [("affine_quantize", "scale_dtype"), ("affine_dequantize", "dtype")])
def test_dtypes_of_results(name, argument):
    words = "'float32' or 'float16' or 'bfloat16'"
    swapped = np.dtype(">f4")
    for value, text in (("int8", "int8"), (np.int32, "int32"), (np.dtype("f8"), "float64"), (float, "float")):
        refuse(name, ValueError, f"{argument} must be {words}, got '{text}'", **{argument: value})
    refuse(name, ValueError, f"{argument} must have this machine's byte order, got >f4", **{argument: swapped})
    for value in (5, 1.5, [], object()):
        rule = f"{argument} must be a dtype or its name, got {type(value).__name__}"
        refuse(name, TypeError, rule, **{argument: value})


@pytest.mark.parametrize("name", [*PRODUCTS, *GATHERED])
def test_accumulate_and_activations(name):
    refuse(name, ValueError, "accumulate must be 'exact' or 'float', got 'fast'", accumulate="fast")
    refuse(name, TypeError, "accumulate must be a string, got NoneType", accumulate=None)
    refuse(name, ValueError, "activations must be 'int8', got 'int4'", activations="int4")
    refuse(name, TypeError, "activations must be a string, got int", activations=8)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_input_dtype(name):
    refuse(name, ValueError, "input_dtype must be 'bfloat16', got 'float16'", input_dtype="float16")
    refuse(name, TypeError, "input_dtype must be a string, got type", input_dtype=np.float16)


# ---- shapes ----


def test_groups_that_do_not_fill_the_last_axis():
    hint = "pad=True stores it as 4352"
    rule = "w.shape[-1] must be a multiple of group_size=64, got 4303"
    refuse("affine_quantize", ValueError, f"{rule} ({hint})", w=ones(2, 4303))
    rule = "w.shape[-1] must be a multiple of group_size=128, got 4320"
    refuse(
        "affine_quantize",
        ValueError,
        f"{rule} (group_size=32 would fit, and pad=True stores it as 4352)",
        w=ones(2, 4320),
        group_size=128,
    )
    rule = "w.shape[-1] must be a multiple of group_size=128, got 192"
    refuse(
        "affine_quantize",
        ValueError,
        f"{rule} (group_size=64 would fit, and pad=True stores it as 256)",
        w=ones(192),
        group_size=128,
    )
    refuse("affine_quantize", ValueError, "w must have at least one dimension, got a scalar", w=F32(1))
    refuse("affine_quantize", ValueError, "w must have at least one dimension, got a scalar", w=1.5)


@pytest.mark.parametrize("name", STORED)
def test_stored_arrays_agree(name):
    rule = "w, scales and biases must have the same shape but for w's last axis, got"
    shapes = [
        ((3, 16), (4, 2), (4, 2)),
        ((3, 16), (3, 2), (3, 1)),
        ((3, 16), (3, 2), (1, 2)),
        ((3, 16), (2,), (2,)),
        ((2, 3, 16), (3, 2), (3, 2)),
        ((), (), ()),
    ]
    for w, scales, biases in shapes:
        changes = {"w": ones(*w, dtype=U32), "scales": ones(*scales), "biases": ones(*biases)}
        refuse(name, ValueError, f"{rule} {w}, {scales} and {biases}", **changes)


def test_words_and_groups_agree():
    rule = "w.shape[-1] = 16 words of 4-bit codes and scales.shape[-1] = 1 groups of 64 do not agree"
    fits = "would fit: bits=4 and group_size=128 for 128 features, bits=8 and group_size=64 for 64 features"
    refuse("affine_dequantize", ValueError, f"{rule} ({fits})", **stored(groups=1))
    refuse("affine_qmm_n", ValueError, f"{rule} ({fits})", **stored(groups=1))
    rule = "w.shape[-1] = 17 words of 4-bit codes and scales.shape[-1] = 2 groups of 64 do not agree"
    refuse("affine_dequantize", ValueError, rule, **stored(words=17))
    rule = "w.shape[-1] = 3 words of 4-bit codes and scales.shape[-1] = 0 groups of 64 do not agree"
    refuse("affine_dequantize", ValueError, rule, **stored(words=3, groups=0))


@pytest.mark.parametrize("name", ["affine_qmm_t", "affine_qmv"])
def test_features_of_x_agree(name):
    fits = "would fit: bits=2 and group_size=128 for 256 features, bits=4 and group_size=64 for 128 features, "
    fits += "bits=8 and group_size=32 for 64 features"
    rule = "which packing has 20 features in w.shape[-1] = 16 words and scales.shape[-1] = 2 groups "
    rule += "does not follow from these sizes: give bits and group_size"
    refuse(name, ValueError, f"{rule} ({fits})", x=ones(20))
    rule = "x.shape[-1] must be 128, the input features of w, or less by less than a group if w was padded, got"
    for wrong in (0, 64, 129):
        refuse(name, ValueError, f"{rule} {wrong}", x=ones(wrong), bits=4, group_size=64)


@pytest.mark.parametrize("name", ["affine_qmm_n", "affine_qvm"])
def test_rows_of_w_agree(name):
    refuse(name, ValueError, "x.shape[-1] must be 3, the input features of w, got 4", x=ones(4))


@pytest.mark.parametrize("name", PRODUCTS)
def test_dimensions_of_products(name):
    rule = "x must have at least 1 dimension and w at least 2, got shapes"
    refuse(name, ValueError, f"{rule} () and (3, 16)", x=F32(1))
    flat = {"w": ones(16, dtype=U32), "scales": ones(2), "biases": ones(2)}
    shape = FUNCTIONS[name][1]()["x"].shape
    refuse(name, ValueError, f"{rule} {shape} and (16,)", **flat)


@pytest.mark.parametrize("name", PRODUCTS)
def test_batches_broadcast(name):
    last = FUNCTIONS[name][1]()["x"].shape[-1]
    w = {key: np.stack([value] * 3) for key, value in stored().items()}
    rule = "the batch dimensions (2,) of x and (3,) of w do not broadcast"
    refuse(name, ValueError, rule, x=ones(2, 1, last), **w)


@pytest.mark.parametrize("name", [name for name in PRODUCTS if name != "affine_qmm_t"])
def test_output_features(name):
    outputs = FUNCTIONS[name][2][-1]
    refuse(name, ValueError, "output_features must not be negative, got -1", output_features=-1)
    refuse(name, TypeError, "output_features must be an integer, got float", output_features=3.0)
    padded = "" if name == "affine_qmv" else ", or less by less than a group if w was padded"
    rule = f"output_features must be {outputs}, the output features of w{padded}, got 5"
    refuse(name, ValueError, rule, output_features=5, bits=4, group_size=64)


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.0.0", reason="NumPy 1 ends at 32 dimensions itself")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_more_than_32_dimensions(name):
    deep = (1,) * 32
    for argument, value in FUNCTIONS[name][1]().items():
        deeper = value.reshape(deep[: 33 - value.ndim] + value.shape)
        refuse(name, ValueError, f"{argument} has 33 dimensions, at most 32 are supported", **{argument: deeper})


def huge(count, dtype=F32, last=()):
    return as_strided(np.ones(1, dtype), (count, *last), (0,) * (1 + len(last)))


def test_sizes_that_overflow_are_value_errors():
    rows = 1 << 54
    wide = huge(rows, np.float16, (64,))  # 2^60 elements, which NumPy allows
    refuse("affine_quantize", ValueError, f"w of shape ({rows}, 64) is too large", w=wide)
    refuse("quantize", ValueError, f"x of shape ({rows}, 64) is too large", x=wide)
    rows = 1 << 44
    w = {"w": huge(rows, U32, (16,)), "scales": huge(rows, last=(2,)), "biases": huge(rows, last=(2,))}
    refuse("affine_qmm_t", ValueError, f"out of shape ({rows}, {rows}) is too large", x=huge(rows, last=(128,)), **w)
    x = huge(1 << 58, np.float16)
    w = {"w": huge(1 << 58, U32, (4,)), "scales": huge(1 << 58, last=(1,)), "biases": huge(1 << 58, last=(1,))}
    refuse("affine_qvm", ValueError, f"x of shape ({1 << 58},) is too large", x=x, **w)
    refuse("affine_dequantize", ValueError, f"w of shape ({1 << 58}, 4) is too large", **w)


def test_codes_that_would_fill_no_memory():
    """2^52 codes are not too many to count, but no machine has room for them."""
    with pytest.raises(MemoryError):
        q.affine_quantize(huge(1 << 45, last=(128,)))


@pytest.mark.parametrize(("name", "argument"), FLOATS)
def test_calls_within_calls(name, argument):
    """An array made by the call that takes it would need a stack without end; the calls after it work."""
    function, arguments, _ = FUNCTIONS[name]

    class Endless:
        def __array__(self, *_, **__):
            return function(**{**arguments(), argument: Endless()})

    class Nested:
        def __array__(self, *_, **__):
            function(**arguments())
            return arguments()[argument]

    with pytest.raises(RecursionError, match=f"^{name}: more than 64 calls within each other"):
        function(**{**arguments(), argument: Endless()})
    for _ in range(100):
        function(**{**arguments(), argument: Nested()})


# ---- results given by the caller ----


def result_of(name):
    shape = FUNCTIONS[name][2]
    return np.full(shape, 7, F32)


SINGLE = [name for name in FUNCTIONS if name != "affine_quantize"]


@pytest.mark.parametrize("name", SINGLE)
def test_out_that_does_not_fit(name):
    shape = FUNCTIONS[name][2]
    bigger = (*shape[:-1], shape[-1] + 1)
    refuse(name, ValueError, f"out must have shape {shape}, got {bigger}", out=ones(*bigger))
    refuse(name, ValueError, f"out must have shape {shape}, got {(1, *shape)}", out=ones(1, *shape))
    refuse(name, ValueError, f"out must have shape {shape}, got ()", out=ones())
    for dtype in ("float64", "float16", "uint32", "uint16", "int64", "complex64", "object", ">f4"):
        wrong = np.zeros(shape, dtype)
        refuse(name, TypeError, f"out has dtype {wrong.dtype}, must be float32", out=wrong)
    for value in ([[1.0]], "out", 5, {}, (result_of(name),)):
        refuse(name, TypeError, f"out must be an array of float32, got {type(value).__name__}", out=value)


@pytest.mark.parametrize("name", SINGLE)
def test_out_that_cannot_be_written(name):
    out = result_of(name)
    out.flags.writeable = False
    refuse(name, ValueError, "out is read-only", out=out)
    assert (out == 7).all()
    shape = FUNCTIONS[name][2]
    shared = as_strided(np.full(shape, 7, F32), shape, (0,) * len(shape))
    refuse(name, ValueError, "out has a stride of 0: its elements share memory", out=shared)
    assert (shared == 7).all()


def overlapping(array, out_shape):
    """An `out` whose memory meets the array's last byte."""
    size = int(np.prod(out_shape)) * 4
    memory = np.zeros(array.nbytes + size, np.uint8)
    memory[: array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
    inside = memory[: array.nbytes].view(array.dtype).reshape(array.shape)
    start = array.nbytes - 4
    return inside, memory[start : start + size].view(F32).reshape(out_shape)


@pytest.mark.parametrize("name", SINGLE)
def test_out_that_overlaps_an_input(name):
    shape = FUNCTIONS[name][2]
    for argument, value in FUNCTIONS[name][1]().items():
        if argument.endswith("indices"):
            continue  # copied before anything is written
        inside, out = overlapping(value, shape)
        before = out.tobytes()
        rule = f"out shares memory with {argument}: give it memory of its own"
        refuse(name, ValueError, rule, **{argument: inside}, out=out)
        backwards = (slice(None, None, -1),) * len(shape)
        refuse(name, ValueError, rule, **{argument: inside}, out=out[backwards])
        assert out.tobytes() == before


def test_in_place_only_for_the_same_elements():
    memory = np.full(65, 0.5, F32)
    refuse("quantize", ValueError, "out shares memory with x: give it memory of its own", x=memory[1:], out=memory[:-1])
    assert (memory == 0.5).all()
    halves = memory[:64].view(np.float16)[:64]
    refuse("quantize", ValueError, "out shares memory with x: give it memory of its own", x=halves, out=memory[:64])


def quantized_out():
    return [np.full((3, 8), 7, U32), np.full((3, 1), 7, F32), np.full((3, 1), 7, F32)]


@pytest.mark.parametrize("entry", [0, 1, 2])
def test_tuples_of_results(entry):
    names = ["out[0] (codes)", "out[1] (scales)", "out[2] (biases)"]
    name, dtype = names[entry], ["uint32", "float32", "float32"][entry]

    def refuse_entry(error, message, value):
        out = quantized_out()
        out[entry] = value
        refuse("affine_quantize", error, message, out=tuple(out))
        for i in {0, 1, 2} - {entry}:
            assert (out[i] == 7).all()

    good = quantized_out()[entry]
    shape = good.shape
    refuse_entry(TypeError, f"{name} has dtype float64, must be {dtype}", good.astype("f8"))
    refuse_entry(TypeError, f"{name} must be an array of {dtype}, got list", [1])
    refuse_entry(ValueError, f"{name} must have shape {shape}, got {shape[::-1]}", np.ascontiguousarray(good.T))
    good.flags.writeable = False
    refuse_entry(ValueError, f"{name} is read-only", good)
    zero = as_strided(np.zeros(1, dtype), shape, (0, 0))
    refuse_entry(ValueError, f"{name} has a stride of 0: its elements share memory", zero)


def test_tuples_of_results_share_nothing():
    memory = np.full(64, 7, F32)
    w = np.zeros((3, 64), F32)
    out = quantized_out()
    own = "give it memory of its own"
    rule = f"out[2] (biases) shares memory with out[1] (scales): {own}"
    refuse("affine_quantize", ValueError, rule, out=(None, out[1], out[1]))
    codes = memory[:24].view(U32).reshape(3, 8)
    rule = f"out[1] (scales) shares memory with out[0] (codes): {own}"
    refuse("affine_quantize", ValueError, rule, out=(codes, memory[23:26].reshape(3, 1), None))
    for i, kind in enumerate(("codes", "scales", "biases")):
        given = [None] * 3
        given[i] = w.ravel()[: out[i].size].reshape(out[i].shape).view(out[i].dtype)
        rule = f"out[{i}] ({kind}) shares memory with w: {own}"
        refuse("affine_quantize", ValueError, rule, w=w, out=tuple(given))
    assert (memory == 7).all()
    assert not w.any()


def test_results_of_another_kind():
    rule = "out must be a tuple (codes, scales, biases), with None for a new array, got"
    refuse("affine_quantize", TypeError, f"{rule} list", out=quantized_out())
    refuse("affine_quantize", TypeError, f"{rule} ndarray", out=ones(3, 8))
    refuse("affine_quantize", ValueError, f"{rule} 2 entries", out=tuple(quantized_out()[:2]))
    refuse("affine_quantize", ValueError, f"{rule} 0 entries", out=())


def test_results_of_bfloat16():
    raw = np.full((3, 64), 0x3F80, np.uint16)
    kind = "bfloat16 (or uint16 for its bits)"
    given = {"w": raw, "input_dtype": "bfloat16"}
    rule = f"out[1] (scales) has dtype float32, must be {kind}"
    refuse("affine_quantize", TypeError, rule, out=(None, ones(3, 1), None), **given)
    rule = f"out has dtype float32, must be {kind}"
    refuse("affine_dequantize", TypeError, rule, out=ones(3, 128), dtype="bfloat16")


# ---- threads, devices, instruction sets ----


@pytest.mark.parametrize("call", [q.set_num_threads, q.threads])
def test_numbers_of_threads(call):
    name, before = call.__name__, q.get_num_threads()
    for value in (0, -1, 1025, 1 << 40):
        with pytest.raises(ValueError, match=rf"^{name}: n must be between 1 and 1024, got {value}$"):
            call(value)
    with pytest.raises(ValueError, match=rf"^{name}: n is out of range: it does not fit 64 bits$"):
        call(1 << 70)
    for value, kind in ((2.0, "float"), ("2", "str"), (True, "bool"), ([2], "list")):
        with pytest.raises(TypeError, match=rf"^{name}: n must be an integer, got {kind}$"):
            call(value)
    if call is q.threads:  # of set_num_threads, None restores the default
        with pytest.raises(TypeError, match=r"^threads: n must be an integer, got None$"):
            call(None)
    assert q.get_num_threads() == before


HERE = ", ".join(entry["name"] for entry in _C.isas() if entry["available"])


@pytest.mark.parametrize("name", ["nonsense", "", "AVX2", "avx2 "])
def test_instruction_sets_that_do_not_exist(name):
    with pytest.raises(RuntimeError, match=rf"^there is no ISA '{name}'; here are {HERE}$"), q.isa(name):
        pass


@pytest.mark.parametrize("entry", [e for e in _C.isas() if not e["available"]], ids=lambda e: e["name"])
def test_instruction_sets_that_are_not_here(entry):
    assert entry["reason"]
    expected = f"ISA '{entry['name']}' is not available: {entry['reason']}; here are {HERE}"
    with pytest.raises(RuntimeError) as caught, q.isa(entry["name"]):
        pass
    assert str(caught.value) == expected


def test_devices_that_are_not_here():
    with (
        pytest.raises(RuntimeError, match=r"^there is no device 'cuda'; 'cpu' and 'auto' would work$"),
        q.device("cuda"),
    ):
        pass
    metal = next(entry for entry in _C.devices() if entry["name"] == "metal")
    if not metal["available"]:
        expected = "device 'metal' is not available: built without Metal; 'cpu' and 'auto' would work"
        with pytest.raises(RuntimeError) as caught, q.device("metal"):
            pass
        assert str(caught.value) == expected


def test_names_are_strings():
    for context in (q.isa, q.device):
        for value in (5, b"cpu", ["cpu"]):
            kind = type(value).__name__
            with (
                pytest.raises(TypeError, match=rf"^Plan: {context.__name__} must be a string, got {kind}$"),
                context(value),
            ):
                pass
        with pytest.raises(ValueError, match=r"must not contain null characters"), context("cpu\0"):
            pass


def test_plans_of_nonsense():
    known = ", ".join(_C.ops())
    with pytest.raises(ValueError, match=rf"^Plan: there is no operation 'add'; there are {known}$"):
        _C.Plan("add")
    for threads in (-1, 1025, 1 << 40):
        rule = rf"^Plan: threads must be between 1 and 1024 \(0: the default\), got {threads}$"
        with pytest.raises(ValueError, match=rule):
            _C.Plan("quantize", threads=threads)
    with pytest.raises(TypeError, match=r"^Plan: threads must be an integer, got float$"):
        _C.Plan("quantize", threads=1.0)
    for arguments in ((), (5,), ("quantize", "cpu", None, 0, 0)):
        with pytest.raises(TypeError, match=r"Plan"):
            _C.Plan(*arguments)


# ---- memory that cannot be had ----


@pytest.mark.parametrize("name", FUNCTIONS)
def test_scratch_that_cannot_be_had(name):
    """The nth allocation fails, for every n: nothing is written, and the next call works."""
    function, arguments, shape = FUNCTIONS[name]
    given = arguments()
    if "w" in given and "scales" in given:  # words that are not contiguous are copied to scratch too
        given["w"] = np.asfortranarray(given["w"])
    expected = function(**given)
    out = quantized_out() if shape is None else [np.full(shape, 7, F32)]
    before = [array.tobytes() for array in out]
    failures = 0
    try:
        for successes in range(100):
            _C.fail_allocations_after(successes)
            try:
                function(**given, out=tuple(out) if shape is None else out[0])
                break
            except MemoryError:
                failures += 1
                assert [array.tobytes() for array in out] == before
        else:
            pytest.fail("still no success after 100 allocations")
    finally:
        _C.fail_allocations_after(-1)
    found = {"affine_qmm_t": 4, "affine_qmv": 4, "affine_qmm_n": 3, "affine_qvm": 3}
    assert failures == {**found, **dict.fromkeys(GATHERED, 8)}.get(name, 0)
    expected = expected if shape is None else (expected,)
    again = function(**given)
    for result in (again if shape is None else (again,), out):
        for got, wanted in zip(result, expected, strict=True):
            assert got.tobytes() == wanted.tobytes()
