"""Checks of the oracle itself: against MLX and ml_dtypes where they define a thing, else against exact arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest

import reference as ref

KINDS = ("float32", "float16", "bfloat16")
MLX_BITS = (1, 2, 3, 4, 5, 6, 8)
F32 = np.float32


@pytest.fixture(scope="module")
def mx():
    return pytest.importorskip("mlx.core")


def to_mlx(mx, stored, kind):
    """Stored array (bfloat16 as bits) to an MLX array, without rounding."""
    return mx.array(stored).view(mx.bfloat16) if kind == "bfloat16" else mx.array(stored)


def from_mlx(mx, array):
    """MLX array to a stored array (bfloat16 as bits)."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def assert_same_bits(ours, theirs, kind):
    """Byte equality; NaN equals any NaN, since neither side promises its sign."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    a, b = ref.to_f32(ours, kind), ref.to_f32(theirs, kind)
    same = (a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))
    assert same.all(), (ours[~same][:4], theirs[~same][:4])


def weights(rng, group_size, bits):
    """[rows, 4 groups] float32: random ones of several sizes, then each edge group at each of the four places."""
    random = rng.standard_normal((48, 4 * group_size)) * 10.0 ** rng.uniform(-4, 3, (48, 1))
    skewed = np.abs(rng.standard_normal((8, 4 * group_size))) * rng.choice([-1, 1], (8, 1))
    grid = rng.integers(-20, 20, (16, 4 * group_size)) / 8  # many ties and equal limits
    edges = np.stack(list(ref.edge_groups(group_size, bits).values()))
    edges = np.concatenate([np.roll(edges, i, axis=0) for i in range(4)], axis=1)
    return np.concatenate([random, skewed, grid, edges]).astype(F32)


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of floats


def test_bfloat16_matches_ml_dtypes():
    """All 2^16 bit patterns widen alike, and floats around every one of their midpoints round alike."""
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    every = np.arange(2**16, dtype=np.uint16)
    assert_same_bits(ref.to_f32(every, "bfloat16"), every.view(bfloat16).astype(F32), "float32")
    assert_same_bits(ref.to_f32(every.view(bfloat16), "bfloat16"), ref.to_f32(every, "bfloat16"), "float32")
    around = (every.astype(np.uint32)[:, None] << 16) + np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    with np.errstate(all="ignore"):
        theirs = around.view(F32).astype(bfloat16).view(np.uint16)
    assert_same_bits(ref.round_to(around.view(F32), "bfloat16"), theirs, "bfloat16")


def test_bfloat16_nan_is_quieted():
    bits = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF], np.uint32)  # the first two would round to Inf
    assert ref.round_to(bits.view(F32), "bfloat16").tolist() == [0x7FC0, 0xFFC0, 0x7FFF]


@pytest.mark.parametrize("kind", KINDS)
def test_half_ulp(kind):
    """The rounding error of exact values never exceeds it and reaches it; overflow starts where it says Inf."""
    one = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}[kind]
    assert ref.half_ulp(1.0, kind) == one and ref.half_ulp(0.0, kind) == 2.0 ** (ref.SMALLEST_STEP[kind] - 1)
    x = np.random.default_rng(0).standard_normal(4096).astype(F32) * F32(2.0) ** np.arange(-145, 111)[:, None]
    with np.errstate(all="ignore"):
        stored = ref.to_f32(ref.round_to(x, kind), kind).astype(np.float64)
        bound = ref.half_ulp(np.abs(x), kind)
        assert not (np.abs(stored - x) > bound).any()
    assert (np.isinf(stored) == np.isinf(bound)).all()


def test_round_half_away():
    values = F32([-2.5, -0.5, -0.25, -0.0, 0.49999997, 0.5, 1.5, 2.5, 8388609, np.inf])
    expected = F32([-3, -1, -0.0, -0.0, 0, 1, 2, 3, 8388609, np.inf])
    with np.errstate(invalid="ignore"):
        assert ref.round_half_away(values).tobytes() == expected.tobytes()


# ---------------------------------------------------------------------------------------------------------------------
# Packed codes


@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_is_a_bit_stream(bits):
    """Each row, read as one large integer, is the sum of code_i * 2^(i*bits)."""
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, 3, 45), dtype=np.uint8)
    words = ref.pack(codes, bits)
    assert words.shape == (2, 3, -(-45 * bits // 32)) and words.dtype == np.uint32
    for row, packed in zip(codes.reshape(-1, 45), words.reshape(6, -1), strict=True):
        expected = sum(int(code) << (i * bits) for i, code in enumerate(row))
        assert int.from_bytes(packed.tobytes(), "little") == expected
    assert (ref.unpack(words, bits, 45) == codes).all()


@pytest.mark.parametrize("bits", MLX_BITS)
def test_unpack_reads_what_mlx_packs(mx, bits):
    """With scale 1 and bias 0, MLX's dequantize returns the codes themselves."""
    words = np.random.default_rng(bits).integers(0, 2**32, (3, 4 * bits), dtype=np.uint32)
    ones = mx.ones((3, 4))
    theirs = np.array(mx.dequantize(mx.array(words), ones, 0 * ones, group_size=32, bits=bits))
    assert (ref.unpack(words, bits, 128) == theirs).all()
    assert (ref.pack(theirs.astype(np.uint8), bits) == words).all()


# ---------------------------------------------------------------------------------------------------------------------
# Affine quantization


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group_size", (32, 64, 128))
@pytest.mark.parametrize("bits", MLX_BITS)
def test_quantize_cpu_matches_mlx(mx, bits, group_size, kind):
    rng = np.random.default_rng([bits, group_size])
    stored = ref.round_to(weights(rng, group_size, bits), kind)
    codes, scales, biases = ref.affine_quantize(ref.to_f32(stored, kind), group_size, bits, profile="cpu")
    theirs = mx.quantize(to_mlx(mx, stored, kind), group_size=group_size, bits=bits)
    words, their_scales, their_biases = (from_mlx(mx, array) for array in theirs)
    assert (ref.pack(codes, bits) == words).all()
    assert_same_bits(ref.round_to(scales, kind), their_scales, kind)
    assert_same_bits(ref.round_to(biases, kind), their_biases, kind)


@pytest.mark.parametrize("out_kind", KINDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", MLX_BITS)
def test_dequantize_cpu_matches_mlx(mx, bits, kind, out_kind):
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (64, 256), dtype=np.uint8)
    s, b = rng.standard_normal((2, 64, 4)) * 10.0 ** rng.uniform(-5, 4, (2, 64, 4))
    s[0], b[1], s[2], b[3] = np.inf, -np.inf, np.nan, 0.0
    s, b = ref.round_to(s, kind), ref.round_to(b, kind)
    dtype = getattr(mx, out_kind)
    words = mx.array(ref.pack(codes, bits))
    theirs = mx.dequantize(words, to_mlx(mx, s, kind), to_mlx(mx, b, kind), group_size=64, bits=bits, dtype=dtype)
    ours = ref.affine_dequantize(codes, ref.to_f32(s, kind), ref.to_f32(b, kind), 64, out_kind, "cpu", kind)
    assert_same_bits(ours, from_mlx(mx, theirs), out_kind)


@pytest.mark.parametrize("bits", range(2, 9))
def test_quantize_metal_differs_only_as_stated(bits):
    """Ties go up and all-negative groups end at 0; every other group is the CPU's, NaN and Inf included."""
    edges = ref.edge_groups(32, bits)
    other = ("all negative", "negative constant", "half codes", "half zero point")
    w = np.stack([edge for name, edge in edges.items() if name not in other])
    for ours, theirs in zip(*(ref.affine_quantize(w, 32, bits, profile) for profile in ("cpu", "metal")), strict=True):
        assert np.array_equal(ours, theirs, equal_nan=True)
    codes, scales, biases = ref.affine_quantize(edges["all negative"], 32, bits)
    assert biases == edges["all negative"].min() and abs(biases + scales * (2**bits - 1)) < 1e-6
    codes, scales, biases = ref.affine_quantize(edges["half zero point"], 32, bits)
    edge = edges["half zero point"][0]
    assert biases == edge and scales == edge / -F32(np.ceil(edge))
    codes, scales, biases = ref.affine_quantize(edges["half codes"], 32, bits)
    assert scales == -1 and (codes[2:] == np.floor(biases - edges["half codes"][2:] + F32(0.5))).all()


def test_dequantize_metal_rounds_once():
    """3 + 3/128 lies between two bfloat16 neighbours, so rounding the product loses what is left after adding -3."""
    s, b, q = F32([1 + 2.0**-7]), F32([-3.0]), np.uint8([[3]])
    exact = Fraction(float(s[0])) * 3 + Fraction(float(b[0]))
    once = ref.affine_dequantize(q, s[None], b[None], 1, "bfloat16")
    twice = ref.affine_dequantize(q, s[None], b[None], 1, "bfloat16", "cpu")
    assert ref.to_f32(once, "bfloat16") == float(exact) != ref.to_f32(twice, "bfloat16")


# ---------------------------------------------------------------------------------------------------------------------
# The exact matmuls: their definitions once more, one output at a time, in rational arithmetic


def nearest32(value):
    """A Fraction rounded to float32, ties to even, as a Fraction (finite results only)."""
    if value == 0:
        return Fraction(0)
    exponent = math.frexp(float(abs(value)))[1]  # within one of the true one; corrected by the comparison below
    exponent += (abs(value) >= Fraction(2) ** exponent) - (abs(value) < Fraction(2) ** (exponent - 1))
    step = Fraction(2) ** max(exponent - 24, -149)
    return round(value / step) * step


def exact_fixed_point(block, p):
    """Integers and exponent of a block by search: the least e >= -126 for which the largest element fits."""
    limit = (32639 if p == 15 else 2**p - 1) + Fraction(1, 2)
    largest, e = max(abs(x) for x in block), -126
    while largest >= limit * Fraction(2) ** e:
        e += 1
    return [round(x / Fraction(2) ** e) for x in block], Fraction(2) ** e


def exact_dot(v, q, wide):
    if not wide:
        return nearest32(Fraction(sum(a * b for a, b in zip(v, q, strict=True))))
    low = [(a + 32896) % 65536 - 32896 for a in v]
    high = sum((a - r) // 65536 * b for a, r, b in zip(v, low, q, strict=True))
    low = sum(a * b for a, b in zip(low, q, strict=True))
    return nearest32(nearest32(Fraction(high)) * 65536 + nearest32(Fraction(low)))


def exact_term_t(x, q, s, b, c, p, wide):
    v, step = exact_fixed_point(x, p)
    assert abs(sum(a * (k - c) for a, k in zip(v, q, strict=True))) < 2**31 or wide
    product = nearest32(exact_dot(v, [k - c for k in q], wide) * s)
    offset = nearest32(nearest32(b + nearest32(c * s)) * nearest32(Fraction(sum(v))))
    return nearest32(nearest32(product + offset) * step)


def exact_term_n(x, q, s, b, c, p, wide):
    v, step_v = exact_fixed_point([nearest32(a * r) for a, r in zip(x, s, strict=True)], p)
    z = [nearest32(a * nearest32(t + nearest32(c * r))) for a, r, t in zip(x, s, b, strict=True)]
    u, step_u = exact_fixed_point(z, ref.BITS_OF_Z)
    assert abs(sum(u)) < 2**31
    product = nearest32(exact_dot(v, [k - c for k in q], wide) * step_v)
    return nearest32(product + nearest32(nearest32(Fraction(sum(u))) * step_u))


def fractions(array):
    return [Fraction(float(value)) for value in array]


def exact_output(x, q, s, b, n, term):
    """One output, from columns of x, q, s, b all of length K, in blocks of n."""
    y = Fraction(0)
    for k in range(0, len(x), n):
        block = slice(k, k + n)
        y = nearest32(y + term(fractions(x[block]), q[block].tolist(), fractions(s[block]), fractions(b[block])))
    return float(y)


def operands(rng, bits, group_size, digits, shape, transpose, spread=6):
    """x, codes, scales, biases for (M, N, K); x of a kind that has these digits, some just below powers of two."""
    m, n, k = shape
    w = rng.standard_normal((n, k) if transpose else (k, n)).astype(F32)
    codes, s, b = ref.affine_quantize(w, group_size, bits)
    x = rng.standard_normal((m, k)) * 2.0 ** rng.integers(-spread, spread + 1, (m, k))
    kind = "float32" if digits == 3 else "float16" if spread <= 6 and rng.integers(2) else "bfloat16"
    x[:, ::61] = 2.0 ** rng.integers(0, 9, x[:, ::61].shape) * (1 - 2.0 ** -rng.integers(5, 25, x[:, ::61].shape))
    return ref.to_f32(ref.round_to(x, kind), kind), codes, s, b


@pytest.mark.parametrize("group_size", (16, 32, 64, 128))
@pytest.mark.parametrize("digits", (3, 2, 1))
@pytest.mark.parametrize("bits", range(1, 9))
def test_qmm_t_bits_matches_rational_arithmetic(bits, digits, group_size):
    rng = np.random.default_rng([bits, digits, group_size])
    x, codes, s, b = operands(rng, bits, group_size, digits, (2, 2, 128), True)
    x[1] *= F32(2.0**-140)  # subnormal: e stays at its floor
    n = min(group_size, 64)
    p, wide = ref.number_format(n, bits, digits)
    c = 2 ** (bits - 1)
    y = ref.qmm_t_bits(x, codes, s, b, group_size, bits, digits)
    s, b = s.repeat(group_size, axis=1), b.repeat(group_size, axis=1)
    for m, i in np.ndindex(y.shape):
        exact = exact_output(
            x[m], codes[i], s[i], b[i], n, lambda x, q, s, b: exact_term_t(x, q, s[0], b[0], c, p, wide)
        )
        assert y[m, i] == exact


@pytest.mark.parametrize("digits", (3, 2, 1))
@pytest.mark.parametrize("bits", range(1, 9))
def test_qmm_n_bits_matches_rational_arithmetic(bits, digits):
    rng = np.random.default_rng([bits, digits])
    x, codes, s, b = operands(rng, bits, 2, digits, (2, 4, 100), False)  # blocks of 64 and 36
    x[1] *= F32(2.0**-120)
    p, wide = ref.number_format(64, bits, digits)
    c = 2 ** (bits - 1)
    y = ref.qmm_n_bits(x, codes, s, b, 2, bits, digits)
    s, b = s.repeat(2, axis=1), b.repeat(2, axis=1)
    for m, i in np.ndindex(y.shape):
        exact = exact_output(
            x[m], codes[:, i], s[:, i], b[:, i], 64, lambda x, q, s, b: exact_term_n(x, q, s, b, c, p, wide)
        )
        assert y[m, i] == exact


def test_wide_dot_splits_at_balanced_digits():
    """Integers around each border of the upper digit, so many alike that the lower sum itself needs rounding."""
    rng = np.random.default_rng(0)
    v = 65536 * rng.integers(-63, 63, (300, 1)) + rng.integers(32600, 32960, (300, 64))
    q = rng.integers(60, 128, (64, 8))
    y = ref.integer_dot(v.astype(np.float64), q.astype(np.float64), True)
    assert y.tolist() == [[float(exact_dot(a, b, True)) for b in q.T.tolist()] for a in v.tolist()]


def test_number_formats():
    """p of every affine format, as the definition's table of formats has it."""
    p = {(bits, n): ref.number_format(n, bits, 3) for bits in range(2, 9) for n in (32, 64)}
    assert all(p[bits, n] == (22, False) for bits in (2, 3, 4) for n in (32, 64))
    assert p[5, 32] == (22, False) and p[5, 64] == p[6, 32] == (21, False)
    assert p[6, 64] == p[8, 32] == p[8, 64] == (22, True)
    assert ref.number_format(64, 8, 2) == (15, False) and ref.number_format(64, 8, 1) == (7, False)


@pytest.mark.parametrize("p", (7, 15, 21, 22))
def test_fixed_point_limits(p):
    """Around the carry into the next exponent: |v| stays within its digits, and e is the least that allows it."""
    limit = 32639 if p == 15 else 2**p - 1
    below_two = np.arange(0x3FFEFE00 - 10, 0x40000100, dtype=np.uint32).view(F32)
    for scale in (1.0, 2.0**126, 2.0 ** (p - 127), 2.0 ** (p - 128), 2.0**-149):
        x = -(below_two * F32(scale))
        v, e = ref.fixed_point(x[:, None], p)
        e, x, v = e.astype(np.float64), x.astype(np.float64), v[:, 0]
        assert (np.abs(x - v * 2.0**e) <= 2.0 ** (e - 1)).all()
        assert np.abs(v).max() == limit if scale >= 2.0 ** (p - 127) else (e == -126).all()
        assert ((e == -126) | (np.rint(np.abs(x) * 2.0 ** (1 - e)) > limit)).all()


# ---------------------------------------------------------------------------------------------------------------------
# Their bounds, and what float64 says

FUNCTIONS = {"t": (ref.qmm_t_bits, ref.bound_t), "n": (ref.qmm_n_bits, ref.bound_n)}


def error_and_bound(x, codes, s, b, group_size, bits, digits, layout):
    product, bound = FUNCTIONS[layout]
    y = product(x, codes, s, b, group_size, bits, digits).astype(np.float64)
    exact = ref.exact64(x, codes, s, b, group_size, layout == "t")
    return np.abs(y - exact), bound(x, codes, s, b, group_size, bits, digits)


@pytest.mark.parametrize("layout", ("t", "n"))
@pytest.mark.parametrize("digits", (3, 2, 1))
@pytest.mark.parametrize("bits", range(1, 9))
def test_bounds_hold(bits, digits, layout):
    """Random x reaches .04 to .3 of the bound; that of subnormal x keeps 2^-148 per block for underflow (to .006)."""
    rng = np.random.default_rng([bits, digits])
    for group_size, spread, scale in ((32, 0, 1), (64, 6, 1e-30), (128, 20, 1e25), (16, 0, 1e-41)):
        x, codes, s, b = operands(rng, bits, group_size, digits, (4, 128, 512), layout == "t", spread)
        x *= F32(scale)
        error, bound = error_and_bound(x, codes, s, b, group_size, bits, digits, layout)
        assert np.isfinite(bound).all() and (error <= bound).all()
        assert (error / bound).max() > (0.02 if scale > 1e-38 else 0)


@pytest.mark.parametrize("layout", ("t", "n"))
@pytest.mark.parametrize("digits", (3, 2, 1))
@pytest.mark.parametrize("bits", (2, 4, 5, 6, 8))
def test_bounds_are_tight(bits, digits, layout):
    """x halfway between steps, on the side of its weight: .93 to .99 of the bound (`n`, 3 digits: .77 to .88)."""
    rng = np.random.default_rng([bits, digits])
    n = 64
    p, _ = ref.number_format(n, bits, digits)
    codes = rng.integers(0, 2**bits, (n, n), dtype=np.uint8)
    s = np.full((n, 1), F32(0.5))
    b = np.full((n, 1), F32(-(2.0 ** (bits - 2))))  # weights (q - c)/2
    w = ref.weights64(codes, s, b, n)
    w = w[0] if layout == "t" else w[:, 0]
    even = 2 * rng.integers(2 ** (p - 3), 2 ** (p - 2), n) * rng.choice([-1, 1], n)
    x = (even - 0.5 * np.sign(w))[None].astype(F32)  # rounds to even
    x[0, 0] = 2 ** (p - 1)  # makes e = 0
    error, bound = error_and_bound(x, codes, s, b, n, bits, digits, layout)
    assert (error <= bound).all()
    assert error[0, 0] > 0.7 * bound[0, 0]


@pytest.mark.parametrize("layout", ("t", "n"))
def test_bound_of_the_chain_is_tight(layout):
    """1 + 2^-24 + 2^-24 + ... loses every term to a tie, an error of U*|sum| per add: .99 of the bound."""
    blocks, n = 1000, 64
    x, codes = np.zeros((1, blocks * n), F32), np.full((2, blocks * n), 8, np.uint8)
    x[0, ::n], x[0, 0], codes[:, ::n] = 2.0**-24, 1, 9  # weights q - 8
    codes = codes if layout == "t" else codes.T
    group_size = n if layout == "t" else 2
    s = np.ones((codes.shape[0], codes.shape[1] // group_size), F32)
    error, bound = error_and_bound(x, codes, s, -8 * s, group_size, 4, 3, layout)
    assert (error == (blocks - 1) * 2.0**-24).all()
    assert (error <= bound).all() and (error > 0.98 * bound).all()


@pytest.mark.parametrize("transpose", (True, False))
@pytest.mark.parametrize("bits", (1, 2, 3, 4, 5, 6, 8))
def test_exact64_matches_mlx(mx, bits, transpose):
    """MLX sums K float32 products of weights rounded twice, in some order: off by (K + 3)*2^-23*sum(|w*x|) at most."""
    rng = np.random.default_rng(bits)
    x, codes, s, b = operands(rng, bits, 32, 3, (3, 64, 96), transpose)
    args = mx.array(x), mx.array(ref.pack(codes, bits)), mx.array(s), mx.array(b)
    theirs = np.array(mx.quantized_matmul(*args, transpose=transpose, group_size=32, bits=bits))
    ours = ref.exact64(x, codes, s, b, 32, transpose)
    magnitude = ref.error64(x, codes, s, b, 32, transpose) * 2.0**53 / (96 + 4)  # sum of |x|*(|s|*q + |b|)
    assert (np.abs(theirs - ours) <= (96 + 3) * 2.0**-23 * magnitude).all()


@pytest.mark.parametrize("layout", ("t", "n"))
@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf))
def test_non_finite_x_changes_its_rows_only(layout, value):
    """A row with NaN or Inf gives what plain float32 sums of its block give: NaN or Inf; other rows keep their bits."""
    rng = np.random.default_rng(0)
    product = FUNCTIONS[layout][0]
    x, codes, s, b = operands(rng, 4, 32, 3, (5, 64, 128), layout == "t")
    clean = product(x, codes, s, b, 32, 4, 3)
    x[2, 70] = value
    y = product(x, codes, s, b, 32, 4, 3)
    others = [0, 1, 3, 4]
    assert (y[others].view(np.uint32) == clean[others].view(np.uint32)).all()
    w = ref.affine_dequantize(codes, s, b, 32, "float32")
    with np.errstate(invalid="ignore"):
        expected = F32(value) * (w[:, 70] if layout == "t" else w[70])  # Inf * 0 is NaN
    assert np.array_equal(y[2], expected, equal_nan=True)
    assert (y[np.isnan(y)].view(np.uint32) == 0x7FC00000).all()
    assert np.isinf(FUNCTIONS[layout][1](x, codes, s, b, 32, 4, 3)[2]).all()


@pytest.mark.parametrize("layout", ("t", "n"))
def test_one_output_does_not_depend_on_the_others(layout):
    """Every sub-matrix of x and w gives the same bits, so no matrix product of NumPy decides a rounding."""
    rng = np.random.default_rng(1)
    product = FUNCTIONS[layout][0]
    x, codes, s, b = operands(rng, 8, 32, 3, (7, 96, 128), layout == "t")
    y = product(x, codes, s, b, 32, 8, 3)
    part = (codes[32:64], s[32:64], b[32:64]) if layout == "t" else (codes[:, 32:64], s[:, 1:2], b[:, 1:2])
    assert product(x[3:4], *part, 32, 8, 3).tobytes() == y[3:4, 32:64].tobytes()


# ---------------------------------------------------------------------------------------------------------------------
# Fake quantization


def exact_fake(value, bits):
    """One value in rational arithmetic: nearest32 stands for each of the three float32 roundings."""
    scale = 2 ** (bits - 1) - 1
    scaled = nearest32(min(max(Fraction(float(value)), Fraction(-1)), Fraction(1)) * scale)
    level = math.floor(abs(scaled) + Fraction(1, 2)) * (1 if scaled >= 0 else -1)
    return float(nearest32(level * nearest32(Fraction(1, scale))))


def around_ties(bits):
    """Floats of [0, 1] within 8 steps of every (k + 1/2)/scale; no other float is near enough to round to a tie."""
    scale = 2 ** (bits - 1) - 1
    centre = ((np.arange(scale) + 0.5) / scale).astype(F32).view(np.uint32)
    return np.unique(centre[:, None] + np.arange(-8, 9, dtype=np.int64)).astype(np.uint32).view(F32)


@pytest.mark.parametrize("bits", range(2, 9))
def test_fake_quantize_ties(bits):
    """Every tie, from both sides and with both signs; ties to even would differ on few floats of [0, 1]."""
    x = around_ties(bits)
    x = np.concatenate([x, -x])
    y = ref.fake_quantize(x, bits)
    assert y.tolist() == [exact_fake(value, bits) for value in x]
    scale = F32(2 ** (bits - 1) - 1)
    to_even = np.rint(x * scale) * (F32(1) / scale)
    assert ((y != to_even) & (x > 0)).sum() == {2: 1, 3: 3, 4: 5, 5: 9, 6: 17, 7: 33, 8: 64}[bits]


@pytest.mark.parametrize("bits", range(1, 17))
def test_fake_quantize_every_float16(bits):
    """All 2^16 float16 values: the ends stay, the map is idempotent and odd, the error is half a level."""
    with np.errstate(invalid="ignore"):
        x = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(F32)
    y = ref.fake_quantize(x, bits)
    nan = np.isnan(x)
    assert y.dtype == F32 and (np.isnan(y) == nan).all()
    x, y = x[~nan], y[~nan]
    assert set(y[np.abs(x) >= 1]) == {-1, 1} and (ref.fake_quantize(y, bits) == y).all()
    if bits == 1:
        assert (y == np.where(x < 0, -1, 1)).all()
        return
    assert (np.signbit(x) == np.signbit(y)).all()
    scale = 2 ** (bits - 1) - 1
    # Half a level; one rounding of x*scale (at most scale*2^-24 levels), and two of the level (2^-23 of at most 1).
    assert (np.abs(np.clip(x, -1, 1).astype(np.float64) - y) <= 0.5 / scale + 2.0**-24 + 2.0**-23).all()


def test_fake_quantize_examples():
    assert ref.fake_quantize(F32([-2, -0.5, 0.5, 2]), 4).tolist() == [-1, -4 * F32(1 / 7), 4 * F32(1 / 7), 1]
    assert ref.fake_quantize(F32([-0.6, -0.2, 0, 0.3, 0.5, 0.7]), 2).tolist() == [-1, 0, 0, 0, 1, 1]
    assert ref.fake_quantize(F32([-0.0, 0.0, -1e-45, np.inf]), 1).tolist() == [1, 1, -1, 1]
    assert ref.fake_quantize(F32([0.5, 0.25, 0.125]), 8).tolist() == (F32([64, 32, 16]) * F32(1 / 127)).tolist()
