"""affine_quantize and affine_dequantize, byte for byte: every format, ISA, kind of float, layout and thread count."""

from fractions import Fraction

import numpy as np
import pytest

import layouts
import quantization as q
import reference as ref
from campaigns import quotients
from conftest import FORMATS, SMALL

KINDS = ("float32", "float16", "bfloat16")
PROFILES = ("metal", "cpu")
F32 = np.float32
NAN = {"float32": 0x7FC00000, "float16": 0x7E00, "bfloat16": 0x7FC0}  # the one NaN that results hold

every_format = pytest.mark.parametrize(("mode", "bits", "group_size"), FORMATS)
some_formats = pytest.mark.parametrize(
    ("bits", "group_size"), [(1, 32), (2, 128), (3, 32), (4, 64), (5, 64), (6, 32), (8, 128)]
)


def declared(kind):
    """Keyword arguments that declare arrays of raw bfloat16 bits."""
    return {"input_dtype": "bfloat16"} if kind == "bfloat16" else {}


def weights(rng, group_size, bits):
    """[rows, 4 groups] float32: random ones of several sizes, ties, and each edge group in another place of a row."""
    rows = 4 if SMALL else 24
    random = rng.standard_normal((rows, 4 * group_size)) * 10.0 ** rng.uniform(-9, 6, (rows, 1))
    skewed = np.abs(rng.standard_normal((rows // 2, 4 * group_size))) * rng.choice([-1, 1], (rows // 2, 1))
    grid = rng.integers(-20, 20, (rows, 4 * group_size)) / 8
    edges = np.stack(list(ref.edge_groups(group_size, bits).values()))
    edges = np.concatenate([np.roll(edges, i, axis=0) for i in range(4)], axis=1)
    return np.concatenate([random, skewed, grid, edges]).astype(F32)


def quantized(stored, kind, group_size, bits, profile, scale_kind=None):
    """What affine_quantize must return for an array of a kind."""
    codes, scales, biases = ref.affine_quantize(ref.to_f32(stored, kind), group_size, bits, profile)
    return ref.pack(codes, bits), *(ref.round_to(part, scale_kind or kind) for part in (scales, biases))


def assert_floats(ours, expected, kind):
    """Equal bytes, where every NaN is the canonical one."""
    assert ours.dtype == expected.dtype and ours.shape == expected.shape
    unsigned = f"u{expected.itemsize}"
    bits = np.ascontiguousarray(expected).view(unsigned)
    bits = np.where(np.isnan(ref.to_f32(expected, kind)), NAN[kind], bits)
    assert np.array_equal(np.ascontiguousarray(ours).view(unsigned), bits)


def assert_quantized(ours, expected, kind):
    """Equal bytes of codes, scales and biases."""
    assert ours[0].dtype == np.uint32 and np.array_equal(ours[0], expected[0])
    assert_floats(ours[1], expected[1], kind)
    assert_floats(ours[2], expected[2], kind)


def random_stored(rng, rows, groups, group_size, bits, kind):
    """Random codes and words, and scales and biases of a kind over its whole range, with zeros, NaN and infinities."""
    codes = rng.integers(0, 2**bits, (rows, groups * group_size), dtype=np.uint8)
    parts = rng.standard_normal((2, rows, groups)) * 10.0 ** rng.uniform(-7, 4, (2, rows, groups))
    parts[:, 0, 0], parts[0, 0, -1], parts[1, 0, -1] = 0, np.inf, -np.inf
    parts[0, -1, 0], parts[1, -1, -1] = np.nan, -0.0
    scales, biases = (ref.round_to(part, kind) for part in parts)
    return codes, ref.pack(codes, bits), scales, biases


def dequantized(codes, scales, biases, kinds, group_size, out_kind, profile):
    """What affine_dequantize must return; `kinds` are those of scales and biases."""
    kind = kinds[0] if kinds[0] == kinds[1] else "float32"
    scales, biases = (ref.to_f32(part, k) for part, k in zip((scales, biases), kinds, strict=True))
    return ref.affine_dequantize(codes, scales, biases, group_size, out_kind or kind, profile, kind)


# ---------------------------------------------------------------------------------------------------------------------
# Values


@every_format
@pytest.mark.parametrize("profile", PROFILES)
def test_quantize_equals_reference(isa, mode, bits, group_size, profile, rng):
    w = weights(rng, group_size, bits)
    for kind in KINDS:
        stored = ref.round_to(w, kind)
        ours = q.affine_quantize(stored, group_size, bits, profile=profile, **declared(kind))
        assert_quantized(ours, quantized(stored, kind, group_size, bits, profile), kind)


@every_format
@pytest.mark.parametrize("profile", PROFILES)
def test_dequantize_equals_reference(isa, mode, bits, group_size, profile, rng):
    for kind in KINDS:
        codes, words, scales, biases = random_stored(rng, 8, 4, group_size, bits, kind)
        for out_kind in (None, *KINDS):
            ours = q.affine_dequantize(
                words, scales, biases, group_size, bits, dtype=out_kind, profile=profile, **declared(kind)
            )
            expected = dequantized(codes, scales, biases, (kind, kind), group_size, out_kind, profile)
            assert_floats(ours, expected, out_kind or kind)


@pytest.mark.parametrize("scale_kind", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_scale_dtype(isa, kind, scale_kind, rng):
    """Codes come from the unrounded scale: they do not depend on how it is stored."""
    stored = ref.round_to(weights(rng, 64, 4), kind)
    for profile in PROFILES:
        ours = q.affine_quantize(stored, profile=profile, scale_dtype=scale_kind, **declared(kind))
        assert_quantized(ours, quantized(stored, kind, 64, 4, profile, scale_kind), scale_kind)


@pytest.mark.parametrize("profile", PROFILES)
def test_dequantize_mixed_kinds(isa, profile, rng):
    """Scales and biases of different kinds: float32 is both what the cpu profile computes in and the result."""
    codes, words, scales, biases = random_stored(rng, 4, 3, 32, 4, "float32")
    for kinds in [("float16", "float32"), ("float32", "float16")]:
        parts = [ref.round_to(part, kind) for part, kind in zip((scales, biases), kinds, strict=True)]
        ours = q.affine_dequantize(words, *parts, 32, 4, profile=profile)
        assert_floats(ours, dequantized(codes, *parts, kinds, 32, None, profile), "float32")
    parts = [ref.round_to(scales, "bfloat16"), ref.round_to(biases, "float16")]
    ours = q.affine_dequantize(words, *parts, 32, 4, profile=profile, input_dtype="bfloat16")
    assert_floats(ours, dequantized(codes, *parts, ("bfloat16", "float16"), 32, None, profile), "float32")


def test_float64_is_computed_as_float32(isa, rng):
    w = rng.standard_normal((3, 128))
    narrow = w.astype(F32)
    ours = q.affine_quantize(w, 32, 5)
    assert_quantized(ours, quantized(narrow, "float32", 32, 5, "metal"), "float32")
    words, scales, biases = ours
    wide = q.affine_dequantize(words, scales.astype(float) * (1 + 2.0**-40), biases.astype(float), 32, 5)
    assert_floats(wide, q.affine_dequantize(words, scales, biases, 32, 5), "float32")
    mixed = q.affine_dequantize(words, scales.astype(np.float16), biases.astype(float), 32, 5, profile="cpu")
    assert mixed.dtype == F32


def test_lists(isa):
    w = [[float(i % 7) for i in range(64)]] * 2
    assert_quantized(q.affine_quantize(w), quantized(np.array(w, F32), "float32", 64, 4, "metal"), "float32")
    codes, scales, biases = q.affine_quantize(w)
    from_lists = q.affine_dequantize(codes, scales.tolist(), biases.tolist())
    assert_floats(from_lists, q.affine_dequantize(codes, scales, biases), "float32")


def test_bfloat16_kind_in_is_kind_out(rng):
    """ml_dtypes arrays give ml_dtypes arrays, declared uint16 arrays give uint16; the bytes are the same."""
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    raw = ref.round_to(rng.standard_normal((2, 64)), "bfloat16")
    plain = q.affine_quantize(raw, input_dtype="bfloat16")
    tagged = q.affine_quantize(raw.view(bfloat16))
    assert [a.dtype for a in plain] == [np.uint32, np.uint16, np.uint16]
    assert [a.dtype for a in tagged] == [np.uint32, bfloat16, bfloat16]
    assert all(a.tobytes() == b.tobytes() for a, b in zip(plain, tagged, strict=True))
    by_name = q.affine_quantize(raw.view(bfloat16), scale_dtype="bfloat16")
    by_type = q.affine_quantize(ref.to_f32(raw, "bfloat16"), scale_dtype=bfloat16)
    assert by_name[1].dtype == by_type[2].dtype == bfloat16
    assert q.affine_quantize(ref.to_f32(raw, "bfloat16"), scale_dtype="bfloat16")[1].dtype == np.uint16

    assert q.affine_dequantize(*plain, input_dtype="bfloat16").dtype == np.uint16
    for dtype in (None, bfloat16, np.dtype(bfloat16), "bfloat16"):
        w = q.affine_dequantize(*tagged, dtype=dtype)
        assert w.dtype == bfloat16
        assert w.tobytes() == q.affine_dequantize(*plain, input_dtype="bfloat16").tobytes()
    narrow = [part.astype(np.float16) for part in tagged[1:]]
    assert q.affine_dequantize(plain[0], *narrow, dtype="bfloat16").dtype == np.uint16
    assert q.affine_dequantize(plain[0], *narrow, dtype=bfloat16).dtype == bfloat16


def test_dtype_may_be_a_name_a_type_or_a_dtype(rng):
    stored = q.affine_quantize(rng.standard_normal((1, 64)))
    for dtype in ("float16", np.float16, np.dtype(np.float16)):
        assert q.affine_dequantize(*stored, dtype=dtype).dtype == np.float16
        assert q.affine_quantize(np.ones(64), scale_dtype=dtype)[1].dtype == np.float16


@every_format
def test_rounding_error(isa, mode, bits, group_size, rng):
    """|w - (s*q + b)| <= |s|/2 where the code was not clamped, and |s| everywhere.

    Let n = 2^bits - 1, s0 = max((hi-lo)/n, 1e-7), e the edge of larger magnitude, z = e/s0 and j = round(z). If j is 0,
    b = 0 and |w| <= |e| <= |s0|/2. Else b = e, s = e/j, and t = (w-b)/s >= 0 is at most |j|*(hi-lo)/|e|. As
    hi - lo <= min(n*s0, 2|e|) and |j| <= |z| + 1/2, that is at most min(n*(1 + 1/(2|z|)), 2|z| + 1) <= n + 1: the first
    is for |z| >= n/2, the second for |z| < n/2. So rounding costs half a step, and clamping to n at most one.
    With u = 2^-24, z comes from three rounded operations and s and t from one and two more, each a relative error in t,
    which is at most n + 1 = 2^bits steps: 8u * 2^bits covers them.
    """
    sizes, offsets = 10.0 ** rng.uniform(-9, 9, (16, 1)), rng.choice([0, 3, -3], (16, 1))
    w = (rng.standard_normal((16, 4 * group_size)) * sizes + offsets).astype(F32)
    for profile in PROFILES:
        words, scales, biases = q.affine_quantize(w, group_size, bits, profile=profile)
        codes = ref.unpack(words, bits, w.shape[1])
        step = np.repeat(np.abs(scales.astype(np.float64)), group_size, axis=1)
        error = np.abs(ref.weights64(codes, scales, biases, group_size) - w)
        slack = 8 * ref.U * 2.0**bits
        assert (error <= step * (np.where(codes == 2**bits - 1, 1.0, 0.5) + slack)).all()


def test_zero_stays_zero(isa, rng):
    """The scale is stretched so that zero falls on a code: s*q + b is zero but for the rounding of s and of the result.

    With b = e and s = -e/j (1 + d), |d| <= u, code |j| gives e - e(1 + d)(1 + d'), where d' rounds the product and the
    sum is exact: at most (2u + u^2)|e|.
    """
    w = rng.standard_normal((64, 64)).astype(F32)
    w[:, ::5] = 0
    for bits in (2, 4, 8):
        words, scales, biases = q.affine_quantize(w, 64, bits)
        zeros = q.affine_dequantize(words, scales, biases, bits=bits)[:, ::5]
        assert (np.abs(zeros) <= (2 * ref.U + ref.U**2) * np.abs(biases.astype(np.float64))).all()


# ---------------------------------------------------------------------------------------------------------------------
# Quotients without divisions


def test_quotients_by_reciprocal():
    """What csrc/kernels/quantize.h leaves to be tried: every pair whose code could be another than a division's."""
    pairs = [(Fraction(v), Fraction(s)) for v, s, _, _ in quotients.hard_pairs(range(0, 257, 16 if SMALL else 1))]
    assert pairs
    for v, s in pairs:
        assert quotients.by_reciprocal(v, s) == quotients.rounded(v / s)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_quotients_next_to_ties(isa, bits):
    """The same pairs as weights, at the ends of the range of exponents and in the middle, beside the next floats."""
    groups = quotients.hard_groups(bits, quotients.hard_pairs(range(max(0, 2**bits - 16) if SMALL else 0, 2**bits)))
    assert len(groups) > 6
    least, greatest = (int(np.floor(np.log2(end / groups.max()))) for end in (2.0**bits * 2e-7, 2.0**127))
    for exponent in (least, -23, 60, greatest):
        near = groups[:, 2:3] * (1 + np.arange(-5, 6) * F32(ref.U))
        w = np.concatenate([groups[:, :3], near, groups[:, 14:]], axis=1) * F32(2) ** exponent
        for profile in PROFILES:
            ours = q.affine_quantize(w, 32, bits, profile=profile)
            assert_quantized(ours, quantized(w, "float32", 32, bits, profile), "float32")


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_quotients_of_random_groups(isa, bits, rng):
    """Ties and their neighbours in groups of any size: a short run of campaigns/quotients.py with another oracle."""
    for group_size in (32, 64, 128):
        w = quotients.random_groups(rng, 16 if SMALL else 128, group_size, bits, ref.affine_quantize)
        w = np.concatenate([w[:, ::-1], w], axis=1)[1:]
        for profile in PROFILES:
            ours = q.affine_quantize(w, group_size, bits, profile=profile)
            assert_quantized(ours, quantized(w, "float32", group_size, bits, profile), "float32")


# ---------------------------------------------------------------------------------------------------------------------
# MLX


@pytest.mark.parametrize(("mode", "bits", "group_size"), [f for f in FORMATS if f.values[1] != 7])  # not MLX's
def test_equals_mlx_at_edges(isa, mode, bits, group_size):
    """Each edge group in an odd number of rows, unaligned and strided, with unaligned and strided results."""
    mlx_differential = pytest.importorskip("campaigns.mlx_differential")
    mx = pytest.importorskip("mlx.core", reason="MLX is the oracle here")
    mx.set_default_device(mx.cpu)
    edges = np.stack(list(ref.edge_groups(group_size, bits).values()))
    w = np.concatenate([np.roll(edges, i, axis=0) for i in range(3)], axis=1)
    places = [layouts.Layout((0, 1), steps, offset) for steps in [(1, 1), (-1, 1), (1, -2)] for offset in (0, 3)]
    for i, kind in enumerate(KINDS * 2):
        stored = ref.round_to(w, kind)[: len(w) - (len(w) + 1) % 2]
        theirs = mx.quantize(mlx_differential.to_mlx(mx, stored, kind), group_size=group_size, bits=bits)
        theirs = [mlx_differential.from_mlx(mx, array) for array in theirs]
        out = tuple(places[(i + j) % 6].empty(a.shape, a.dtype)[1] for j, a in enumerate(theirs))
        placed = places[(i + 3) % 6].place(stored)
        q.affine_quantize(placed, group_size, bits, profile="cpu", out=out, **declared(kind))
        for name, a, b, k in zip(("codes", "scales", "biases"), out, theirs, ("uint32", kind, kind), strict=True):
            mlx_differential.compare(name, a, b, k)


def test_equals_mlx(isa):
    """A short run of campaigns/mlx_differential.py, which see."""
    pytest.importorskip("mlx.core", reason="MLX is the oracle here")
    from campaigns import mlx_differential

    mx, _ = mlx_differential.import_libraries()
    for i in range(30 if SMALL else 300):
        mlx_differential.check(mx, q, 1, i)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 128), (2, 3, 64), (2, 1, 3, 192), (1,) * 26 + (2, 64)])
def test_shapes(isa, shape, rng):
    w = rng.standard_normal(shape).astype(F32)
    ours = q.affine_quantize(w)
    assert_quantized(ours, quantized(w, "float32", 64, 4, "metal"), "float32")
    codes = ref.unpack(ours[0], 4, shape[-1])
    expected = dequantized(codes, *ours[1:], ("float32", "float32"), 64, None, "metal")
    assert_floats(q.affine_dequantize(*ours), expected, "float32")


@pytest.mark.parametrize("shape", [(0,), (0, 64), (3, 0), (0, 0), (2, 0, 64), (0, 5, 128)])
def test_empty(isa, shape):
    for kind in KINDS:
        stored = ref.round_to(np.empty(shape, F32), kind)
        ours = q.affine_quantize(stored, **declared(kind))
        assert_quantized(ours, quantized(stored, kind, 64, 4, "metal"), kind)
        w = q.affine_dequantize(*ours, 64, 4, **declared(kind))
        assert w.shape == shape and w.dtype == stored.dtype


@every_format
def test_inference_of_group_size_and_bits(mode, bits, group_size, rng):
    _, words, scales, biases = random_stored(rng, 2, 3, group_size, bits, "float32")
    expected = q.affine_dequantize(words, scales, biases, group_size, bits)
    assert expected.shape == (2, 3 * group_size)
    assert_floats(q.affine_dequantize(words, scales, biases, group_size), expected, "float32")
    assert_floats(q.affine_dequantize(words, scales, biases, bits=bits), expected, "float32")
    assert_floats(q.AffineDequantize(bits=bits)(words, scales, biases), expected, "float32")


@every_format
def test_packing_left_out_means_64_and_4(mode, bits, group_size, rng):
    _, words, scales, biases = random_stored(rng, 2, 3, group_size, bits, "float32")
    if group_size * bits == 256:  # the words of a group of 64 codes of 4 bits, whatever they were meant to be
        expected = q.affine_dequantize(words, scales, biases, 64, 4)
        assert_floats(q.affine_dequantize(words, scales, biases), expected, "float32")
    else:
        with pytest.raises(ValueError, match=r"^affine_dequantize: w.shape\[-1\] = \d+ words of 4-bit codes"):
            q.affine_dequantize(words, scales, biases)


def test_kernel_classes(isa, rng):
    w = rng.standard_normal((2, 64)).astype(F32)
    expected = quantized(w, "float32", 32, 8, "metal")
    assert_quantized(q.AffineQuantize(32, 8)(w), expected, "float32")
    assert_quantized(q.AffineQuantize()(w, 32, 8), expected, "float32")
    decoded = q.affine_dequantize(*expected, 32, 8)
    assert_floats(q.AffineDequantize(32, 8)(*expected), decoded, "float32")
    assert_floats(q.AffineDequantize()(*expected, 32, 8), decoded, "float32")


def test_int32_codes(rng):
    _, words, scales, biases = random_stored(rng, 2, 3, 64, 4, "float32")
    as_signed = q.affine_dequantize(words.view(np.int32), scales, biases)
    assert_floats(as_signed, q.affine_dequantize(words, scales, biases), "float32")


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def check_quantize_layouts(w, kind, group_size, bits, places):
    """One array in one place, outputs in three others."""
    stored = ref.round_to(w, kind)
    expected = quantized(stored, kind, group_size, bits, "metal")
    x_place, *out_places = places
    outs = [place.empty(part.shape, part.dtype) for place, part in zip(out_places, expected, strict=True)]
    given = tuple(view for _, view in outs)
    ours = q.affine_quantize(x_place.place(stored), group_size, bits, out=given, **declared(kind))
    assert all(a is b for a, b in zip(ours, given, strict=True))
    assert_quantized(ours, expected, kind)
    for place, (memory, view) in zip(out_places, outs, strict=True):
        place.check(memory, view.shape, view.dtype)


def check_dequantize_layouts(stored, kind, group_size, bits, places):
    """The same the other way round; `stored` is what random_stored returns, in any shape."""
    codes, *arrays = stored
    *in_places, out_place = places
    expected = dequantized(codes, *arrays[1:], (kind, kind), group_size, None, "metal")
    memory, out = out_place.empty(expected.shape, expected.dtype)
    placed = (place.place(array) for place, array in zip(in_places, arrays, strict=True))
    assert q.affine_dequantize(*placed, group_size, bits, out=out, **declared(kind)) is out
    assert_floats(out, expected, kind)
    out_place.check(memory, out.shape, out.dtype)


@pytest.mark.parametrize("columns", [256, 2048 + 256], ids=["short", "long"])
@some_formats
def test_fixed_layouts(isa, bits, group_size, columns, rng):
    """Short rows, and rows that are worked at in more than one piece."""
    every = layouts.fixed(3)
    for i, kind in enumerate(KINDS * 2):
        w = rng.standard_normal((2, 3, columns)).astype(F32)
        places = [every[(i + j) % len(every)] for j in range(4)]
        check_quantize_layouts(w, kind, group_size, bits, places)
        stored = [a.reshape(2, 3, -1) for a in random_stored(rng, 6, columns // group_size, group_size, bits, kind)]
        check_dequantize_layouts(stored, kind, group_size, bits, places)


def test_any_layout(isa):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(**layouts.settings(10 if SMALL else 60))
    @hypothesis.given(st.data())
    def run(data):
        batch = data.draw(st.lists(st.integers(1, 3), max_size=3))
        kind, bits = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from((1, 2, 3, 4, 5, 6, 8)))
        group_size, groups = data.draw(st.sampled_from((32, 64, 128))), data.draw(st.integers(1, 5))
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        places = [data.draw(layouts.layouts(len(batch) + 1)) for _ in range(4)]
        w = rng.standard_normal((*batch, groups * group_size)).astype(F32)
        check_quantize_layouts(w, kind, group_size, bits, places)
        flat = random_stored(rng, int(np.prod(batch)), groups, group_size, bits, kind)
        check_dequantize_layouts([a.reshape(*batch, -1) for a in flat], kind, group_size, bits, places)

    run()


def test_zero_strides(isa, rng):
    row = rng.standard_normal(128).astype(F32)
    repeated = np.broadcast_to(row, (3, 2, 128))
    assert_quantized(q.affine_quantize(repeated), quantized(repeated, "float32", 64, 4, "metal"), "float32")
    constant = np.broadcast_to(F32(-0.7), (2, 64))
    assert_quantized(q.affine_quantize(constant), quantized(constant, "float32", 64, 4, "metal"), "float32")
    codes, scales, biases = q.affine_quantize(row)
    ours = q.affine_dequantize(*(np.broadcast_to(a, (5, *a.shape)) for a in (codes, scales, biases)))
    assert_floats(ours, np.stack([q.affine_dequantize(codes, scales, biases)] * 5), "float32")
    same_scale = np.broadcast_to(F32(0.5), (1, 4)), np.broadcast_to(F32(-1), (1, 4))
    codes = rng.integers(0, 16, (1, 256), dtype=np.uint8)
    assert_floats(q.affine_dequantize(ref.pack(codes, 4), *same_scale), codes * F32(0.5) - F32(1), "float32")


def test_out_entries_may_be_none(rng):
    w = rng.standard_normal((2, 64)).astype(F32)
    expected = q.affine_quantize(w)
    for chosen in range(3):
        out = [None] * 3
        out[chosen] = np.empty_like(expected[chosen])
        ours = q.affine_quantize(w, out=tuple(out))
        assert ours[chosen] is out[chosen]
        assert_quantized(ours, expected, "float32")


@every_format
def test_nothing_outside_is_written(isa, mode, bits, group_size, guarded, rng):
    """Outputs between guard bytes, at every alignment that their type allows and at one that it does not."""
    for kind in KINDS:
        for offset in (0, 2, 4, 31):
            stored = ref.round_to(rng.standard_normal((3, 3 * group_size)), kind)
            expected = quantized(stored, kind, group_size, bits, "cpu")
            out = tuple(guarded.empty(a.shape, a.dtype, offset) for a in expected)
            q.affine_quantize(stored, group_size, bits, profile="cpu", out=out, **declared(kind))
            assert_quantized(out, expected, kind)
            w = guarded.empty(stored.shape, stored.dtype, offset)
            q.affine_dequantize(*out, group_size, bits, out=w, **declared(kind))
            codes = ref.unpack(expected[0], bits, stored.shape[1])
            assert_floats(w, dequantized(codes, *expected[1:], (kind, kind), group_size, None, "metal"), kind)
            guarded.check()


@pytest.mark.parametrize(
    ("kind", "profile", "bits"), [("float32", "metal", 4), ("float16", "cpu", 5), ("bfloat16", "cpu", 3)]
)
def test_results_that_bypass_the_caches(isa, kind, profile, bits, rng):
    """Results of more than 8 MiB, where their address allows it and where not, against the same row by row."""
    rows, columns = 257, 16384
    _, _, scales, biases = random_stored(rng, rows, columns // 64, 4, 8, kind)
    words = rng.integers(0, 2**32, (rows, columns // 32 * bits), dtype=np.uint32)
    options = {"profile": profile, **declared(kind)}
    for out_kind in (kind,) if SMALL else KINDS:
        few = [
            q.affine_dequantize(*row, 64, bits, dtype=out_kind, **options)
            for row in zip(words, scales, biases, strict=True)
        ]
        expected = np.stack(few).view(np.uint8)
        for offset in (0, 1) if SMALL else (0, 16, 2, 1):
            memory = np.full(expected.size + 128, layouts.FILL, np.uint8)
            start = -memory.ctypes.data % 64 + offset
            out = np.ndarray((rows, columns), few[0].dtype, memory, start)
            q.affine_dequantize(words, scales, biases, 64, bits, dtype=out_kind, out=out, **options)
            end = start + expected.size
            assert np.array_equal(memory[start:end], expected.ravel())
            assert (memory[:start] == layouts.FILL).all() and (memory[end:] == layouts.FILL).all()


# ---------------------------------------------------------------------------------------------------------------------
# Threads


@pytest.mark.parametrize("shape", [(1, 128 * 211), (3, 128 * 67), (211, 128)])
@pytest.mark.parametrize("bits", [3, 4])
def test_threads(isa, shape, bits, rng):
    """A single long row and many short ones give the same bytes on any number of threads."""
    w = rng.standard_normal(shape).astype(F32)
    expected = quantized(w, "float32", 128, bits, "metal")
    codes = ref.unpack(expected[0], bits, shape[1])
    decoded = dequantized(codes, *expected[1:], ("float32", "float32"), 128, None, "metal")
    for n in range(1, 5):
        with q.threads(n):
            assert_quantized(q.affine_quantize(w, 128, bits), expected, "float32")
            assert_floats(q.affine_dequantize(*expected, 128, bits), decoded, "float32")
