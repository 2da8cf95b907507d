"""Fake quantization: what its first users observe, and every bit of it against reference.py and exact arithmetic."""

import numpy as np
import pytest

import layouts
import quantization as q
import reference as ref
from campaigns import fake_quantize_exhaustive as exhaustive
from conftest import SMALL

F32 = np.float32
BITS = range(1, 17)
SOME_BITS = (1, 2, 4, 8, 16)
STREAMED = 8 << 20  # bytes from which on results bypass the caches

every_width = pytest.mark.parametrize("bits", BITS)
some_widths = pytest.mark.parametrize("bits", SOME_BITS)


def assert_equals_reference(y, x, bits):
    """Equal bytes; NaN where x has NaN, whatever its payload."""
    expected = ref.fake_quantize(x, bits)
    assert y.dtype == F32 and y.shape == expected.shape
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(y), nan)
    bits_of = (np.where(nan, F32(0), array).view(np.uint32) for array in (y, expected))
    assert np.array_equal(*bits_of)


def inputs(rng, count):
    """Values in and around [-1, 1], of every size, and the special ones."""
    special = [0, -0.0, 1, -1, 2, -2, np.inf, -np.inf, np.nan, -np.nan, 1e-45, -1e-45, 3e38, -3e38, 0.49999997, 0.5]
    any_bits = rng.integers(0, 2**32, count, dtype=np.uint32).view(F32)
    return np.concatenate([F32(special), rng.uniform(-1.1, 1.1, count).astype(F32), any_bits])


# ---------------------------------------------------------------------------------------------------------------------
# The kernel pattern


@pytest.mark.parametrize("options", [{}, {"use_block_kernel": False}, {"use_double_buffer": True}])
def test_compiles_once(options):
    kernel = q.VariableQuantizationMLXKernel(**options)
    assert kernel._kernel is None
    compiled = kernel.compile()
    assert compiled is not None and kernel._kernel is compiled
    assert kernel.compile() is compiled
    kernel(np.zeros(3, F32), 4)
    kernel(np.zeros((2, 2), F32), bits=8)
    assert kernel._kernel is compiled


def test_compiles_lazily():
    kernel = q.VariableQuantizationMLXKernel()
    assert kernel([0.5], bits=2).tolist() == [1]
    assert kernel._kernel is not None and kernel.compile() is kernel._kernel


def test_names():
    assert q.VariableQuantizationMLXKernel is q.VariableQuantizationKernel
    assert isinstance(q.variable_quantization, q.VariableQuantizationKernel)


def test_variants_give_the_same(isa, rng):
    x = inputs(rng, 5000)
    for bits in SOME_BITS:
        for block in (True, False):
            for double in (True, False):
                kernel = q.VariableQuantizationKernel(use_block_kernel=block, use_double_buffer=double)
                assert kernel(x, bits).tobytes() == q.quantize(x, bits).tobytes()
                assert kernel.quantize(x, bits).tobytes() == q.quantize(x, bits).tobytes()


# ---------------------------------------------------------------------------------------------------------------------
# Values

SEVENTH = F32(1) / F32(7)
STEP_8 = F32(1) / F32(127)
VECTORS = [
    (4, np.arange(-7, 8, dtype=F32) / F32(7), np.arange(-7, 8, dtype=F32) * SEVENTH),
    (4, [-2, -1.5, 0, 1.5, 2], [-1, -1, 0, 1, 1]),
    (4, [-2, -0.5, 0.5, 2], [-1, -4 * SEVENTH, 4 * SEVENTH, 1]),
    (4, [[0.5, 0], [-0.5, 1]], [[4 * SEVENTH, 0], [-4 * SEVENTH, 1]]),
    (8, [0.5, 0.25, 0.125], F32([64, 32, 16]) * STEP_8),
    (2, [-0.6, -0.2, 0, 0.3, 0.7], [-1, 0, 0, 0, 1]),
    (2, [0.5, -0.5, 0.49999997], [1, -1, 0]),
    (1, [-3, -1e-45, -0.0, 0, 0.2, np.inf], [-1, -1, 1, 1, 1, 1]),
    (16, [1, -1, np.inf, -np.inf], [1, -1, 1, -1]),
]


@pytest.mark.parametrize(("bits", "x", "y"), VECTORS)
def test_examples(isa, bits, x, y):
    assert np.array_equal(q.quantize(np.array(x, F32), bits), np.array(y, F32))
    assert np.array_equal(q.quantize(x if isinstance(x, list) else x.tolist(), bits), np.array(y, F32))


def test_default_is_4_bits(rng):
    x = inputs(rng, 100)
    assert q.quantize(x).tobytes() == q.variable_quantization(x).tobytes() == q.quantize(x, 4).tobytes()


@every_width
def test_equals_reference(isa, bits, rng):
    x = inputs(rng, 200 if SMALL else 5000)
    assert_equals_reference(q.quantize(x, bits), x, bits)


@every_width
def test_every_length(isa, bits, rng):
    """Vectors and what is left of them: the same value wherever an element stands."""
    x = inputs(rng, 40)
    for length in range(70):
        assert_equals_reference(q.quantize(x[:length], bits), x[:length], bits)


@some_widths
def test_every_length_of_16_bits(isa, bits, rng):
    """The same, where floats of two bytes may begin at an odd address and results at any float."""
    for kind in ("float16", "bfloat16"):
        raw = ref.round_to(inputs(rng, 40), kind)
        odd = np.ndarray(raw.shape, raw.dtype, bytearray(raw.nbytes + 1), 1)
        odd[...] = raw
        x, options = ref.to_f32(raw, kind), {"input_dtype": kind} if kind == "bfloat16" else {}
        for length in range(70):
            for halves in (raw, odd):
                y = q.quantize(halves[:length], bits, **options)
                assert_equals_reference(y, x[:length], bits)


@every_width
def test_floats_around_every_step(isa, bits):
    """A short run of campaigns/fake_quantize_exhaustive.py, which see."""
    patterns = exhaustive.quick_patterns(bits, stride=1_000_003 if SMALL else 30_011)
    assert exhaustive.check(q.quantize, patterns, bits) == 2 * len(patterns)


@every_width
def test_idempotent(isa, bits):
    """Every level is kept, and there are 2^bits - 1 of them (for one bit: two)."""
    scale = max(2 ** (bits - 1) - 1, 1)
    grid = np.arange(-scale, scale + 1, dtype=F32) / F32(scale)
    levels = q.quantize(grid, bits)
    assert q.quantize(levels, bits).tobytes() == levels.tobytes()
    assert len(np.unique(levels)) == (2 if bits == 1 else 2**bits - 1)
    assert (levels[0], levels[-1]) == (-1, 1)


@some_widths
def test_special_values(isa, bits):
    """NaN stays NaN whatever its sign and payload; -0 stays -0, as does what rounds to it (one bit: +1)."""
    nan = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF] * 5, np.uint32).view(F32)
    assert np.isnan(q.quantize(nan, bits)).all()
    zeros = q.quantize(F32([-0.0, 0.0, -1e-30, 1e-30] * 5), bits)
    assert (np.signbit(zeros) == ([False, False, True, False] if bits == 1 else [True, False, True, False]) * 5).all()
    assert np.abs(zeros).max() == (1 if bits == 1 else 0)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def test_bits_that_are_integers(rng):
    x = inputs(rng, 10)
    for bits in (np.int64(4), np.uint8(4), np.array(4)):
        assert q.quantize(x, bits).tobytes() == q.quantize(x, 4).tobytes()


@pytest.mark.parametrize("bits", [True, False, np.True_, 4.0, np.float32(4), "4", None])
def test_bits_of_another_kind(bits):
    with pytest.raises(TypeError, match=r"^quantize: bits must be an integer, got"):
        q.quantize(np.zeros(3, F32), bits)


@pytest.mark.parametrize("bits", [0, -1, 17, np.int64(32), 2**70, -(2**70)])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=r"^quantize: bits (must be between 1 and 16, got -?\d+$|is out of range)"):
        q.quantize(np.zeros(3, F32), bits)


def test_failure_writes_nothing():
    x = F32([0.3, 0.6])
    for bits in (17, True):
        with pytest.raises((ValueError, TypeError)):
            q.quantize(x, bits, out=x)
    with pytest.raises(ValueError, match="shares memory"):
        q.quantize(x[::-1], 4, out=x)
    assert x.tolist() == F32([0.3, 0.6]).tolist()


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (5, 1, 7), (2, 0, 3), (0,), (1,) * 28 + (2, 3)])
def test_shapes(isa, shape, rng):
    x = np.asarray(rng.uniform(-1, 1, shape), F32)
    y = q.quantize(x, 4)
    assert y.shape == shape
    assert_equals_reference(np.asarray(y), x, 4)


def test_scalars_and_lists(isa):
    for x in (0.5, F32(0.5), np.float64(0.5), np.array(0.5, np.float16)):
        y = q.quantize(x, 2)
        assert y.shape == () and y.dtype == F32 and float(y) == 1
    y = q.quantize([[0.5, -2], [1, 0]], 4)
    assert y.dtype == F32 and np.array_equal(y, [[4 * SEVENTH, -1], [1, 0]])


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_result_is_float32(isa, dtype, rng):
    with np.errstate(over="ignore", invalid="ignore"):
        x = inputs(rng, 500).astype(dtype)
        narrow = x.astype(F32)
    for bits in SOME_BITS:
        assert_equals_reference(q.quantize(x, bits), narrow, bits)
        assert_equals_reference(q.quantize(x[::2], bits), narrow[::2], bits)  # float16 at the stride of float32


def test_bfloat16(isa, rng):
    raw = ref.round_to(inputs(rng, 500), "bfloat16")
    for bits in SOME_BITS:
        assert_equals_reference(q.quantize(raw, bits, input_dtype="bfloat16"), ref.to_f32(raw, "bfloat16"), bits)
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    y = q.quantize(raw.view(bfloat16), 6)
    assert y.tobytes() == q.quantize(raw, 6, input_dtype="bfloat16").tobytes() and y.dtype == F32


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@some_widths
def test_in_place(isa, bits, rng):
    values = inputs(rng, 200 if SMALL else 9000)
    for x in (values.copy(), np.stack([values, values])[::-1, ::-3], np.stack([values] * 3).T[1::2]):
        expected, y = x.copy(), q.quantize(x, bits, out=x)
        assert y is x
        assert_equals_reference(x, expected, bits)


def check_layouts(x, bits, places):
    place, out_place = places
    memory, out = out_place.empty(x.shape, F32)
    kept = place.place(x)
    assert q.quantize(kept, bits, out=out) is out
    assert_equals_reference(out, x.astype(F32), bits)
    out_place.check(memory, x.shape, F32)
    fresh = q.quantize(kept, bits)
    assert fresh.flags.c_contiguous and fresh.tobytes() == np.ascontiguousarray(out).tobytes()


@pytest.mark.parametrize("shape", [(3, 5, 37), (2, 2, 4500)])
def test_fixed_layouts(isa, shape, rng):
    every = layouts.fixed(3)
    for i in range(len(every)):
        for dtype in (F32, np.float16, np.float64):
            x = rng.uniform(-1.5, 1.5, shape).astype(dtype)
            check_layouts(x, SOME_BITS[i % 5], (every[i], every[(i + 2) % len(every)]))


def test_any_layout(isa):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(**layouts.settings(15 if SMALL else 80))
    @hypothesis.given(st.data())
    def run(data):
        shape = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        x = rng.uniform(-1.5, 1.5, shape).astype(data.draw(st.sampled_from((F32, np.float16, np.float64))))
        places = [data.draw(layouts.layouts(len(shape))) for _ in range(2)]
        check_layouts(x, data.draw(st.integers(1, 16)), places)

    run()


def test_empty_out_of_any_strides(isa):
    """NumPy gives arrays without elements strides of 0, which elsewhere are an error for `out`."""
    out = np.empty((4, 0), F32)[::2]
    assert out.strides[0] == 0 and q.quantize(np.empty((2, 0)), 4, out=out) is out
    with pytest.raises(ValueError, match="stride of 0"):
        q.quantize(np.zeros(3), 4, out=np.lib.stride_tricks.as_strided(np.empty(3, F32), (3,), (0,)))


def test_zero_strides(isa):
    x = np.broadcast_to(F32([[0.3], [-0.9]]), (2, 50))
    assert_equals_reference(q.quantize(x, 3), x, 3)
    assert_equals_reference(q.quantize(np.broadcast_to(F32(0.4), (3, 4)), 8), np.full((3, 4), 0.4, F32), 8)


def test_nothing_outside_is_written(isa, guarded, rng):
    x = inputs(rng, 40)
    for bits in SOME_BITS:
        for length in (1, 3, 7, 8, 17, 31, 33, 64):
            for offset in (0, 4, 8, 28, 29, 60):
                out = guarded.empty((length,), F32, offset)
                q.quantize(x[:length], bits, out=out)
                assert_equals_reference(out, x[:length], bits)
        guarded.check()


def tiled(rng, shape, bits):
    """A large x that repeats a small one, and what it gives: the small one's result, repeated."""
    small = inputs(rng, 5000)
    count = int(np.prod(shape))
    times = -(-count // len(small))
    y = q.quantize(small, bits)
    assert_equals_reference(y, small, bits)
    return (np.tile(array, times)[:count].reshape(shape) for array in (small, y))


def same_bytes(a, b):
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("offset", [0, 4, 20, 60, 30])
def test_large_arrays_equal_small_ones(isa, offset, guarded, rng):
    """Where stores bypass the caches, from any start: aligned to a vector, to a float, to nothing."""
    bits = {0: 1, 4: 16}.get(offset, 4)
    x, y = tiled(rng, (STREAMED // 4 + 4099,), bits)
    out = guarded.empty(x.shape, F32, offset)
    assert q.quantize(x, bits, out=out) is out
    assert same_bytes(np.ascontiguousarray(out), y)


def test_large_rows_of_odd_length(isa, guarded, rng):
    """Every row starts at another alignment; one row is longer than a piece of work."""
    x, y = tiled(rng, (431, 5003), 5)
    wide = guarded.empty((431, 5005), F32, 4)
    wide[:, :2] = 7
    q.quantize(x, 5, out=wide[:, 2:])
    assert same_bytes(np.ascontiguousarray(wide[:, 2:]), y)
    assert (wide[:, :2] == 7).all()


def test_large_in_place(isa, rng):
    x, y = tiled(rng, (STREAMED // 4 + 3,), 8)
    q.quantize(x, 8, out=x)
    assert same_bytes(x, y)


def test_large_float16(isa, rng):
    x, _ = tiled(rng, (STREAMED // 4 + 5,), 8)
    with np.errstate(over="ignore", invalid="ignore"):
        half = x.astype(np.float16)
    y = q.quantize(half, 8)
    for part in (slice(0, 5016), slice(-5016, None)):
        assert_equals_reference(y[part], half[part].astype(F32), 8)
    period = 2 * 5000 + 16
    assert same_bytes(y[period:], y[:-period])


@pytest.mark.parametrize("shape", [(131_101,), (7, 20_011), (20_011, 7)])
def test_threads(isa, shape, rng):
    """The same bytes on any number of threads, whether one row is cut or many are dealt out."""
    x, y = tiled(rng, shape, 7)
    for n in range(1, 5):
        with q.threads(n):
            assert same_bytes(q.quantize(x, 7), y)
