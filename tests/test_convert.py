"""float16, bfloat16 and float64, to and from float32, as they pass through the operations: every pattern, every tie.

A group whose codes are all 1, with bias -0, is dequantized to its scale; one with scale -0 to its bias: s*1 + -0 and
-0*1 + b are exact, the signs of zeros included. So dequantization hands out its inputs, converted. Adjacent arrays go
through vector instructions, stepped ones element by element: each test takes both.
"""

import numpy as np
import pytest

import quantization as q
import reference as ref
from conftest import SMALL

F32 = np.float32
GROUP = 32
ONES = ref.pack(np.ones((1, GROUP), np.uint8), 2)
THIN = 31 if SMALL else 1  # under emulation one pattern in 31

each_half = pytest.mark.parametrize("kind", ["float16", "bfloat16"])


def every_pattern(kind):
    """All 65536 values of a 16-bit kind as stored."""
    patterns = np.arange(0, 2**16, THIN, dtype=np.uint16)
    return patterns.view(np.float16) if kind == "float16" else patterns


def stepped(array):
    """The same values, two elements apart."""
    wide = np.zeros((*array.shape, 2), array.dtype)
    wide[..., 0] = array
    return wide[..., 0]


def declared(kind):
    """Keyword arguments that declare arrays of raw bfloat16 bits."""
    return {"input_dtype": "bfloat16"} if kind == "bfloat16" else {}


def through(values, as_scale=True, **options):
    """`values` as the scales (or biases) of one row of groups, and what dequantization makes of each of them."""
    values = values[None]
    zeros = np.full(values.shape, -0.0, F32)
    parts = (values, zeros) if as_scale else (zeros, values)
    codes = np.broadcast_to(ONES.ravel(), (1, values.shape[1], ONES.size)).reshape(1, -1)
    w = q.affine_dequantize(codes, *parts, GROUP, 2, **options).reshape(-1, GROUP)
    assert (w.view(f"u{w.itemsize}") == w.view(f"u{w.itemsize}")[:, :1]).all(), "elements of a group differ"
    return w[:, 0]


def assert_same_floats(ours, expected, kind):
    """Equal bytes; any NaN where there should be one: `test_quantize.py` and those below look at its bits."""
    assert ours.shape == expected.shape and ours.dtype == expected.dtype
    nan = np.isnan(ref.to_f32(expected, kind))
    unsigned = f"u{expected.itemsize}"
    a, b = (np.ascontiguousarray(array).view(unsigned) for array in (ours, expected))
    assert np.array_equal(np.isnan(ref.to_f32(ours, kind)), nan)
    wrong = np.flatnonzero((a != b) & ~nan)
    assert wrong.size == 0, f"{wrong.size} differ, the first: {a[wrong[0]]:#x}, not {b[wrong[0]]:#x}"


def around_midpoints(kind):
    """float32 values: those that a 16-bit kind holds, those between two of them, and their neighbours, of both signs.

    Beyond the largest float16 the next value would be 65536, and 65520 lies between them. For bfloat16 the neighbours
    in float32 are found in the bits, which overflow and NaN share.
    """
    if kind == "bfloat16":
        upper = np.arange(0, 2**16, THIN, dtype=np.uint32)[:, None] << 16
        return (upper + np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)).view(F32).ravel()
    bits = np.arange(0, 0x7C00, THIN, dtype=np.uint16)
    values = bits.view(np.float16).astype(np.float64)
    upper = np.where(bits < 0x7BFF, (bits + np.uint16(1)).view(np.float16).astype(np.float64), 65536)
    ties = ((values + upper) / 2).astype(F32)  # exact: one bit more than float16 has
    near = [ties, np.nextafter(ties, F32(0)), np.nextafter(ties, F32(np.inf)), values.astype(F32)]
    extreme = F32([65520, 65536, 1e5, 3e38, np.inf, np.nan, 1e-45, 2.0**-25, 2.0**-26])
    both = np.concatenate([*near, extreme])
    return np.concatenate([both, -both])


# ---------------------------------------------------------------------------------------------------------------------
# To float32


@pytest.mark.parametrize("as_scale", [True, False])
@each_half
def test_every_pattern_widens(isa, kind, as_scale):
    stored = every_pattern(kind)
    expected = ref.to_f32(stored, kind)
    for values in (stored, stepped(stored), stored[::-1].copy()[::-1]):
        assert_same_floats(through(values, as_scale, dtype="float32", **declared(kind)), expected, "float32")


def test_every_float16_widens_as_numpy_says(isa):
    """NumPy's own conversion as the oracle, instead of ours in reference.py."""
    stored = every_pattern("float16")
    assert_same_floats(through(stored, dtype=F32), stored.astype(F32), "float32")


def test_every_bfloat16_widens_as_ml_dtypes_says(isa):
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    stored = every_pattern("bfloat16").view(bfloat16)
    assert_same_floats(through(stored, dtype=F32), stored.astype(F32), "float32")


@each_half
def test_every_pattern_through_fake_quantization(isa, kind):
    stored = every_pattern(kind)
    for bits in (1, 4, 16):
        for x in (stored, stepped(stored), stored[1:], stored[:-3]):
            expected = ref.fake_quantize(ref.to_f32(x, kind), bits)
            assert_same_floats(q.quantize(x, bits, **declared(kind)), expected, "float32")


@each_half
def test_every_pattern_is_quantized(isa, kind):
    """Weights of a 16-bit kind give what the same weights in float32 give."""
    stored = every_pattern(kind)
    stored = np.resize(stored, -(-stored.size // 64) * 64).reshape(-1, 64)
    for profile in ("metal", "cpu"):
        expected = q.affine_quantize(ref.to_f32(stored, kind), profile=profile)
        for w in (stored, stepped(stored)):
            ours = q.affine_quantize(w, profile=profile, scale_dtype="float32", **declared(kind))
            assert all(a.tobytes() == b.tobytes() for a, b in zip(ours, expected, strict=True))


def test_float64_is_rounded_once(isa, rng):
    """Doubles between two floats, and next to the middle of them: ties to even, and overflow where it begins."""
    low = rng.integers(0, 0x7F7FFFFF, 500 if SMALL else 20_000, dtype=np.uint32)
    low[:4] = 0, 1, 0x007FFFFF, 0x7F7FFFFE
    middle = (low.view(F32).astype(np.float64) + (low + np.uint32(1)).view(F32).astype(np.float64)) / 2
    extreme = [0, np.inf, np.nan, 1e300, 5e-324, 2.0**-150, 2.0**128 - 2.0**103, 2.0**128 - 2.0**103 - 2.0**75]
    values = np.concatenate([middle, np.nextafter(middle, 0), np.nextafter(middle, np.inf), extreme])
    values = np.concatenate([values, -values])
    with np.errstate(over="ignore"):
        expected = values.astype(F32)
    for array in (values, stepped(values)):
        assert_same_floats(through(array), expected, "float32")
        assert_same_floats(through(array, as_scale=False), expected, "float32")


# ---------------------------------------------------------------------------------------------------------------------
# From float32


def narrow(values, kind):
    """The oracle for rounding to 16 bits: NumPy's conversion for float16, ml_dtypes' (or ours) for bfloat16."""
    with np.errstate(over="ignore", invalid="ignore"):
        if kind == "float16":
            return values.astype(np.float16)
        try:
            import ml_dtypes
        except ImportError:
            return ref.round_to(values, kind)
        return values.astype(ml_dtypes.bfloat16).view(np.uint16)


@each_half
def test_results_are_rounded_to_nearest_even(isa, kind):
    """Every tie of the kind, its neighbours, overflow and NaN, as the result of a dequantization."""
    values = around_midpoints(kind)
    expected = narrow(values, kind)
    assert_same_floats(through(values, dtype=kind), expected, kind)
    out = stepped(np.zeros((1, values.size * GROUP), expected.dtype))
    assert_same_floats(through(values, dtype=kind, out=out), expected, kind)


@each_half
def test_results_next_to_each_other_are_rounded_each(isa, kind):
    """Codes 0 to 3 and a scale of half a step: values and ties alternate in one vector.

    A step of a kind with p digits is 2^(1-p) in [1, 2), so that 1 + c*2^-p is a value for even c and a tie for odd c.
    """
    digits = ref.PRECISION[kind]
    codes = np.arange(GROUP, dtype=np.uint8)[None] % 4
    scale, bias = F32([[2.0**-digits]]), F32([[1]])
    for sign in (F32(1), F32(-1)):
        w = q.affine_dequantize(ref.pack(codes, 2), sign * scale, sign * bias, GROUP, 2, dtype=kind)
        assert_same_floats(w, narrow(sign * (bias + codes * scale), kind), kind)


@each_half
def test_stored_scales_are_rounded_to_nearest_even(isa, kind):
    """A constant group's bias is its value (profile cpu, from 1e-7 on): 1 group of a row next to the other."""
    values = around_midpoints(kind)
    values = values[(np.abs(values) > 1e-7) & np.isfinite(values)]
    w = np.broadcast_to(values[:, None], (values.size, GROUP)).reshape(1, -1)
    expected = narrow(values[None], kind)
    _, scales, biases = q.affine_quantize(w, GROUP, 4, profile="cpu", scale_dtype=kind)
    assert_same_floats(biases, expected, kind)
    _, exact, _ = q.affine_quantize(w, GROUP, 4, profile="cpu")
    assert_same_floats(scales, narrow(exact, kind), kind)
    out = (None, stepped(np.zeros_like(scales)), stepped(np.zeros_like(biases)))
    ours = q.affine_quantize(w, GROUP, 4, profile="cpu", scale_dtype=kind, out=out)
    assert_same_floats(ours[1], scales, kind)
    assert_same_floats(ours[2], expected, kind)


@each_half
def test_both_roundings_of_the_cpu_profile(isa, kind):
    """Product and sum are each rounded to the kind, as ml_dtypes and NumPy compute with it."""
    rng = np.random.default_rng(5)
    scales, biases = (
        narrow((rng.standard_normal((1, 512)) * 10.0 ** rng.uniform(-6, 3, (1, 512))).astype(F32), kind)
        for _ in range(2)
    )
    codes = rng.integers(0, 256, (1, 512 * GROUP), dtype=np.uint8)
    arrays = scales, biases, codes
    if kind == "bfloat16":
        bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
        arrays = scales.view(bfloat16), biases.view(bfloat16), codes.astype(F32).astype(bfloat16)
    s, b, c = arrays[0], arrays[1], arrays[2].astype(arrays[0].dtype)  # 8 digits: codes are exact in either kind
    with np.errstate(over="ignore"):
        expected = c.reshape(1, 512, GROUP) * s[..., None] + b[..., None]
    ours = q.affine_dequantize(ref.pack(codes, 8), s, b, GROUP, 8, profile="cpu")
    assert ours.dtype == expected.dtype
    assert ours.tobytes() == expected.tobytes()


def test_nan_never_becomes_infinity(isa):
    """NaNs whose payload lies in the bits that rounding drops; what comes out is the canonical NaN."""
    values = np.array([0x7F800001, 0xFF800001, 0x7F801000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F80FFFF], np.uint32).view(F32)
    for kind, canonical in (("float32", 0x7FC00000), ("float16", 0x7E00), ("bfloat16", 0x7FC0)):
        for repeated in (values, np.tile(values, 5)):
            for array in (repeated, stepped(repeated)):
                result = through(array, dtype=kind)
                assert (result.view(f"u{result.itemsize}") == canonical).all()
