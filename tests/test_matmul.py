"""Products with packed weights: every bit, the error bound, special values, arrays of every form, kernel classes."""

import ctypes
import functools
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

import quantization as q
import reference as ref
from campaigns import long_rows, same_bits, same_bits_grid
from conftest import AVAILABLE, FORMATS, ISAS, SMALL, Page, assert_same_bytes, assert_threads_change_nothing

F32 = np.float32
NAN, INF = F32(np.nan), F32(np.inf)

# Packed along K, and along N; each function with its name for vectors.
FUNCTIONS = {"t": (q.affine_qmm_t, q.affine_qmv), "n": (q.affine_qmm_n, q.affine_qvm)}
LAYOUTS = list(FUNCTIONS)

# What x, scales and biases are stored in, and "int8": float32 with activations="int8".
KINDS = ("float32", "float16", "bfloat16", "int8")
DIGITS = {"float32": 3, "float16": 2, "bfloat16": 2, "int8": 1}
LARGEST = {"float32": 3e38, "float16": 6e4, "bfloat16": 3e38}
SUBNORMAL = {"float32": 1e-41, "float16": 1e-7, "bfloat16": 1e-39}


# ---------------------------------------------------------------------------------------------------------------------
# Products and what must come of them


def stored_kind(kind):
    return "float32" if kind == "int8" else kind


class Product:
    """Stored inputs of one product, and what must come of it by `reference`."""

    def __init__(self, layout, x, codes, scales, biases, group_size, bits, kind="float32"):
        self.layout, self.codes, self.group_size, self.bits, self.kind = layout, codes, group_size, bits, kind
        self.digits, self.stored = DIGITS[kind], stored_kind(kind)
        self.x, self.scales, self.biases = (ref.round_to(a, self.stored) for a in (x, scales, biases))
        self.words = ref.pack(codes, bits)
        self.keywords = {"activations": "int8"} if kind == "int8" else {}
        if kind == "bfloat16":
            self.keywords["input_dtype"] = "bfloat16"

    @property
    def wide(self):
        """x, codes, scales and biases with the floats as float32: what `reference` takes."""
        x, scales, biases = (ref.to_f32(a, self.stored) for a in (self.x, self.scales, self.biases))
        return x, self.codes, scales, biases

    @functools.cached_property
    def unrounded(self):
        bits_of = ref.qmm_t_bits if self.layout == "t" else ref.qmm_n_bits
        return bits_of(*self.wide, self.group_size, self.bits, self.digits)

    @functools.cached_property
    def expected(self):
        return ref.round_to(self.unrounded, self.stored)

    @functools.cached_property
    def exact_and_bound(self):
        """The product in float64, and how far a result may be from it (derived in `reference`)."""
        bound_of = ref.bound_t if self.layout == "t" else ref.bound_n
        exact = ref.exact64(*self.wide, self.group_size, self.layout == "t")
        bound = bound_of(*self.wide, self.group_size, self.bits, self.digits)
        with np.errstate(all="ignore"):
            rounding = 0 if self.stored == "float32" else ref.half_ulp(np.abs(exact) + bound, self.stored)
        return exact, bound + rounding

    def results(self, **changes):
        """What each function of the layout returns."""
        arrays = {"x": self.x, "w": self.words, "scales": self.scales, "biases": self.biases}
        keywords = {"group_size": self.group_size, "bits": self.bits, **arrays, **self.keywords, **changes}
        return [function(**keywords) for function in FUNCTIONS[self.layout]]

    def check(self):
        for y in self.results():
            assert_same_bytes(y, self.expected)


def random_weights(rng, rows, columns, group_size, bits, symmetric=True):
    """Codes [rows, columns], and scales and biases of groups along the columns."""
    codes = rng.integers(0, 2**bits, (rows, columns), dtype=np.uint8)
    scales = rng.standard_normal((rows, columns // group_size)).astype(F32)
    biases = -scales * 2 ** (bits - 1) if symmetric else rng.standard_normal(scales.shape).astype(F32)
    return codes, scales, biases


def small_product(rng, layout, kind="float32", group_size=64, bits=4, m=3, n=9, k=130):
    """A product of about m, n and k: the packed axis becomes three groups."""
    outputs, inputs = (n, 3 * group_size) if layout == "t" else (3 * group_size, k)
    rows, columns = (outputs, inputs) if layout == "t" else (inputs, outputs)
    weights = random_weights(rng, rows, columns, group_size, bits, symmetric=False)
    return Product(layout, rng.standard_normal((m, inputs)), *weights, group_size, bits, kind)


def extreme_digits(rng, shape, p, kind):
    """x whose fixed-point integers of p bits have the most extreme digits: all-ones, or -128, -128, t and 127, 127, t.

    Every other row has elements that would round to more than the digits hold, so that the next exponent is taken.
    """
    odd = np.arange(shape[0])[:, None] % 2
    if p > 15:
        top = 2 ** (p - 16) - 1
        v = rng.choice([-32896, 32639], shape) + 65536.0 * rng.choice([-top, top], shape)
        v = np.where(rng.random(shape) < 0.25, rng.choice([-1, 1], shape) * (2.0**p - 1 + 0.75 * odd), v)
    else:  # what two digits (32639) or one (127) hold and what they do not, in significands that the kind has
        largest, too_large = {"float16": (32624, 32752), "bfloat16": (32512, 32640)}.get(kind, (127, 127.75))
        v = rng.choice([-1.0, 1.0], shape) * np.where(odd, too_large, largest)
    return np.ldexp(v, rng.integers(-20, 0 if kind == "float16" else 20))


def x_of_family(rng, family, shape, kind, p):
    """float64 x [M, K] of one of the families on which arithmetic in blocks could go wrong."""
    stored = stored_kind(kind)
    normal, sign = rng.standard_normal(shape), rng.choice([-1.0, 1.0], shape)
    if family == "digits":
        return extreme_digits(rng, shape, p, kind)
    if family == "zero blocks":
        keep = rng.random((shape[0], -(-shape[1] // 32))) < 0.5
        return normal * np.repeat(keep, 32, axis=1)[:, : shape[1]]
    reach = 12 if stored == "float16" else 30
    values = {
        "normal": normal,
        "outliers": normal * np.where(rng.random(shape) < 0.02, 1e5, 1.0),
        "subnormal": normal * SUBNORMAL[stored],
        "huge": sign * LARGEST[stored] * rng.uniform(0.5, 1, shape),
        "spread": normal * np.exp2(rng.uniform(-reach, reach, shape)),
    }[family]
    return np.clip(values, -LARGEST[stored], LARGEST[stored])


# Of each family: M, N and groups for layout t, groups of outputs and K for layout n. 33 groups and more do not fill a
# whole number of the panels of 32 blocks that kernels work on; layout n has blocks of 64 k.
FAMILIES = {
    "normal": (3, 33, 4, 2, 200),
    "outliers": (2, 9, 3, 3, 64),
    "subnormal": (1, 7, 5, 1, 63),
    "huge": (7, 8, 2, 2, 65),
    "spread": (4, 17, 34, 1, 130),
    "zero blocks": (19, 1, 1, 2, 192),
    "digits": (5, 3, 33, 2, 129),
}
if SMALL:
    FAMILIES = {name: FAMILIES[name] for name in ("outliers", "subnormal", "digits")}


@functools.cache
def products_of(layout, kind, bits, group_size):
    """A product of each family; some with all codes 0 or all codes at the top, where the integers are largest."""
    rng = np.random.default_rng([ord(layout), KINDS.index(kind), bits, group_size])
    products = {}
    for family, (m, n, groups, groups_n, k) in FAMILIES.items():
        rows, columns = (n, groups * group_size) if layout == "t" else (k, groups_n * group_size)
        inputs = columns if layout == "t" else rows
        codes, scales, biases = random_weights(rng, rows, columns, group_size, bits, family in ("huge", "digits"))
        if family in ("huge", "digits"):
            codes[...] = rng.choice([0, 2**bits - 1], (rows, 1) if layout == "t" else (1, columns))
            scales = np.exp2(rng.integers(-3, 3, scales.shape)).astype(F32)
            biases = -scales * 2 ** (bits - 1)
        p, _ = ref.number_format(min(group_size, 64) if layout == "t" else 64, bits, DIGITS[kind])
        x = x_of_family(rng, family, (m, inputs), kind, p)
        products[family] = Product(layout, x, codes, scales, biases, group_size, bits, kind)
    return products


# ---------------------------------------------------------------------------------------------------------------------
# Bits and error


@pytest.mark.parametrize(("mode", "bits", "group_size"), FORMATS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_bit(isa, layout, kind, mode, bits, group_size):
    for product in products_of(layout, kind, bits, group_size).values():
        product.check()


@pytest.mark.parametrize(("mode", "bits", "group_size"), FORMATS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_bound(isa, layout, kind, mode, bits, group_size):
    """`reference` derives the bound; where it says Inf, an intermediate may overflow and nothing is promised."""
    for family, product in products_of(layout, kind, bits, group_size).items():
        exact, bound = product.exact_and_bound
        bounded = np.isfinite(bound)
        assert bounded.all() or family == "huge" or product.stored == "float16"
        y = ref.to_f32(product.results()[0], product.stored).astype(np.float64)
        assert (np.abs(y - exact)[bounded] <= bound[bounded]).all(), family


@pytest.mark.parametrize(("mode", "bits", "group_size"), FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_is_the_same_in_any_batch(isa, layout, mode, bits, group_size, rng):
    for kind in ("float32", "float16"):
        product = small_product(rng, layout, kind, group_size, bits, m=19, n=33)
        all_rows = product.results()[0]
        assert_same_bytes(all_rows, product.expected)
        for m in (3, 17) if SMALL else range(1, 19):
            for y in product.results(x=product.x[:m]):
                assert_same_bytes(y, all_rows[:m])
            assert_same_bytes(product.results(x=product.x[m])[0], all_rows[m])


@pytest.mark.parametrize(("mode", "bits", "group_size"), FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_change_nothing(isa, layout, mode, bits, group_size, rng):
    """The product is large enough to be shared out, by outputs and (layout n, one group) by rows of x."""
    outputs, inputs = (67, 1024) if layout == "t" else (128, 600)
    rows, columns = (outputs, inputs) if layout == "t" else (inputs, outputs)
    weights = random_weights(rng, rows, columns, group_size, bits)
    product = Product(layout, rng.standard_normal((24, inputs)), *weights, group_size, bits)
    y = assert_threads_change_nothing(product.results)
    assert_same_bytes(product.results(x=product.x[20:21])[0], y[20:21])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("m", [31, 33, 127, 129, 260])
def test_many_rows(isa, layout, kind, m, rng):
    """Rows of x are prepared some at a time: results do not depend on where a portion ends."""
    small_product(rng, layout, kind, 32, 4, m=m, n=9, k=70).check()


@pytest.mark.parametrize(("mode", "bits", "group_size"), FORMATS)
def test_long_rows_of_extreme_codes(isa, mode, bits, group_size, rng):
    """K of up to 2^20 with all codes 0 or at the top and the most extreme digits, so that integers are largest.

    The weights repeat from block to block. Then one call of the reference gives all terms, as the products of rows of
    one block, and NumPy adds them up in order (accumulate is sequential by definition).
    """
    n = min(group_size, 64)
    p, _ = ref.number_format(n, bits, 3)
    sizes = [(1, 2**14)] if SMALL else [(1, 2**16)]
    if group_size == 64 and not SMALL:
        sizes = [(1, 2**20), (11, 2**17)]  # 11: more rows than are prepared together
    for m, k in sizes:
        codes = np.repeat(np.array([[0], [2**bits - 1]], np.uint8), n, axis=1)
        scales = np.array([[0.5], [0.3]], F32)
        biases = -scales * 2 ** (bits - 1)
        x = np.where(np.arange(k) < k // 2, 2.0**p - 1, extreme_digits(rng, (m, k), p, "float32")).astype(F32)
        terms = ref.qmm_t_bits(x.reshape(-1, n), codes, scales, biases, n, bits, 3).reshape(m, k // n, 2)
        expected = np.add.accumulate(terms, axis=1, dtype=F32)[:, -1]
        words = np.tile(ref.pack(codes, bits), k // n)
        scales, biases = (np.repeat(a, k // group_size, axis=1) for a in (scales, biases))
        assert_same_bytes(q.affine_qmm_t(x, words, scales, biases), expected)


def at_the_limits(kind, p):
    """Values that fill their digits: the largest v, and where digits below the top are all -128 or all 127."""
    if p < 16:  # as in extreme_digits; where x has few bits the digits end in zeros
        return {"float16": (32624, 32384), "bfloat16": (32512, 32384)}.get(kind, (127,))
    top = 2 ** (p - 16) - 1
    return 2**p - 1, 65536 * top + 32639, 65536 * top - 32896


@functools.cache
def product_at_the_limits(layout, kind, bits, group_size):
    """Every row of x is one value, or one value and zeros, and every output's codes are all 0 or all at the top.

    So all products of a sum have the same sign, and no sum over part of a block can be larger.
    """
    n = min(group_size, 64) if layout == "t" else 64
    values = at_the_limits(kind, ref.number_format(n, bits, DIGITS[kind])[0])
    outputs, inputs = (5, 5 * group_size) if layout == "t" else (group_size, 130)
    signed = np.array([sign * value for value in values for sign in (1.0, -1.0)] + [0.0])
    x = np.repeat(np.resize(signed, (9, 1)), inputs, axis=1)
    x[:, n : 2 * n : 2] = 0
    codes = np.where(np.arange(outputs) % 2, 2**bits - 1, 0).astype(np.uint8)[:, None]
    codes = np.repeat(codes, inputs, axis=1) if layout == "t" else np.repeat(codes.T, inputs, axis=0)
    scales = np.ones((codes.shape[0], codes.shape[1] // group_size), F32)
    return Product(layout, x, codes, scales, -scales * 2 ** (bits - 1), group_size, bits, kind)


@pytest.mark.parametrize(("mode", "bits", "group_size"), FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_integers_at_their_limits(isa, layout, mode, bits, group_size):
    """Sums of int16 and int32 inside the kernels are at their largest, with many rows of x and with few."""
    for kind in ("float32", "int8") if SMALL else KINDS:
        product = product_at_the_limits(layout, kind, bits, group_size)
        product.check()
        for m in range(0, 9, 2):
            assert_same_bytes(product.results(x=product.x[m : m + 2])[0], product.expected[m : m + 2])


@pytest.mark.parametrize("bits", [4, 8])
def test_two_digits_hold_32639(isa, bits, rng):
    """x*s between 32639.5 and 32640 steps would need a digit of 128: the next exponent is taken.

    No 16-bit x lies there, but products of a float16 x and a float16 scale do.
    """
    significands = np.arange(1024, 2048)
    products = np.outer(significands, significands)
    steps = products / np.exp2(np.floor(np.log2(products)) - 14)
    pairs = significands[np.argwhere((steps >= 32639.5) & (steps < 32640))]
    pairs = pairs[np.prod(pairs, axis=1) < 2**21]  # in one binade
    x, scales = rng.choice(pairs, 64).T * 2.0**-10
    codes = rng.choice([0, 2**bits - 1], (64, 64)).astype(np.uint8)
    signs = rng.choice([-1, 1], (3, 64))
    Product("n", signs * x, codes, scales[:, None], 0 * scales[:, None], 64, bits, "float16").check()


# ---------------------------------------------------------------------------------------------------------------------
# Special values


@pytest.mark.parametrize(("mode", "bits", "group_size"), FORMATS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_non_finite_x_changes_its_rows_only(isa, layout, kind, mode, bits, group_size, rng):
    product = small_product(rng, layout, kind, group_size, bits, m=9)
    clean, x = product.expected, ref.to_f32(product.x, product.stored)
    k = x.shape[1]
    x[1, 0], x[3, k - 1], x[4, k // 2], x[6, [0, 5]], x[8] = NAN, INF, -INF, (INF, -INF), NAN
    product = Product(layout, x, product.codes, *product.wide[2:], group_size, bits, kind)
    assert np.isnan(product.unrounded[1]).all()
    assert np.isinf(product.unrounded[3]).any()
    product.check()
    y = product.results()[0]
    for row in (0, 2, 5, 7):
        assert_same_bytes(y[row], clean[row])
    for row in (2, 6) if SMALL else range(9):
        assert_same_bytes(product.results(x=product.x[row])[0], y[row])


def by_definition(product, **changes):
    """The result of the scalar definition, on one thread."""
    with q.isa("generic"), q.threads(1):
        return product.results(**changes)[0]


@pytest.mark.parametrize(("bits", "group_size"), [(2, 128), (3, 32), (4, 64), (6, 64), (8, 128)])
@pytest.mark.parametrize("m", [1, 9, 130])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_non_finite_among_many_rows(isa, layout, m, bits, group_size, rng):
    """Every seventh row of x, or a scale and a bias; rows without are as they were, on any number of threads."""
    for kind in ("float32",) if SMALL else ("float32", "bfloat16"):
        clean = small_product(rng, layout, kind, group_size, bits, m=m, n=18, k=70)
        x, codes, scales, biases = (a.copy() for a in clean.wide)
        x[::7, rng.integers(x.shape[1])] = rng.choice([NAN, INF, -INF])
        dirty_x = Product(layout, x, codes, scales, biases, group_size, bits, kind)
        scales[-1, -1], biases[0, 0] = INF, NAN
        dirty_scales = Product(layout, clean.wide[0], codes, scales, biases, group_size, bits, kind)
        expected, expected_of_scales = by_definition(dirty_x), by_definition(dirty_scales)
        finite_rows = np.arange(m) % 7 != 0
        for threads in (1, 3):
            with q.threads(threads):
                y = dirty_x.results()[0]
                assert_same_bytes(y, expected)
                assert_same_bytes(y[finite_rows], clean.results()[0][finite_rows])
                assert_same_bytes(dirty_scales.results()[0], expected_of_scales)


@pytest.mark.parametrize(("mode", "bits", "group_size"), FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_non_finite_scales_and_biases(isa, layout, mode, bits, group_size, rng):
    """One in the scales, one in the biases, both: in float32, and in float16, which rounds what float32 gave."""
    cases = itertools.product(("float32", "float16"), (NAN, -NAN, INF, -INF))
    for kind, value in [("float32", INF)] if SMALL else cases:
        product = small_product(rng, layout, kind, group_size, bits, n=9)
        x, codes, scales, biases = product.wide
        scales[1, 0], biases[3, 1], scales[7, 2], biases[7, 2] = value, value, value, -value
        product = Product(layout, x, codes, scales, biases, group_size, bits, kind)
        assert not np.isfinite(product.unrounded).all()
        product.check()


@pytest.mark.parametrize(("mode", "bits", "group_size"), FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_overflow(isa, layout, mode, bits, group_size, rng):
    """Finite inputs whose products overflow: x*s in some groups only, the sum of terms, Inf - Inf."""
    product = small_product(rng, layout, "float32", group_size, bits, m=5)
    x, codes, scales, biases = product.wide
    x[1:4] *= np.array([[1e20], [1e25], [1e36]], F32)
    scales[::2, 0] *= F32(1e19)
    biases[1::2, 2] *= F32(1e18)
    product = Product(layout, x, codes, scales, biases, group_size, bits)
    assert np.isfinite(product.unrounded[0]).all()
    assert not np.isfinite(product.unrounded[3]).all()
    product.check()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_results_have_one_pattern(isa, layout, rng):
    """0x7fc00000, whatever sign and payload came in, and whether a NaN came in at all."""
    product = small_product(rng, layout, m=4)
    x, codes, scales, biases = product.wide
    x[0, 3] = np.array(0xFFC12345, np.uint32).view(F32)
    x[1, 3] = np.array(0x7F800001, np.uint32).view(F32)
    x[2, [3, 4]], codes[:, :5] = (INF, -INF), 7
    scales[...], biases[...] = 1, 1
    product = Product(layout, x, codes, scales, biases, 64, 4)
    for y in product.results():
        affected = y[:3] if layout == "t" else y[:3, :5]
        assert (affected.view(np.uint32)[:2] == 0x7FC00000).all()
        assert (affected.view(np.uint32)[2] == 0x7FC00000).all() or layout == "n"
        assert np.isfinite(y[3]).all()
    product.check()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_zeros_are_positive(isa, layout):
    """A sum starts at +0, and +0 + -0 is +0."""
    codes = np.zeros((64, 64), np.uint8)
    scales = np.full((64, 1), -0.0, F32)
    product = Product(layout, np.full((2, 64), -0.0), codes, scales, scales, 64, 4)
    for y in product.results():
        assert y.view(np.uint32).tolist() == [[0] * 64] * 2
    product.check()


def flush_subnormals():
    """Set the calling thread's float environment to flush subnormals; return what restores it.

    By fesetenv with the C library's saved environment changed: on x86-64 Linux the MXCSR is its last word (DAZ 0x40,
    FTZ 0x8000), on AArch64 Linux FPCR is its first (FZ 1 << 24).
    """
    word, flags = {"x86_64": (7, 0x8040), "aarch64": (0, 1 << 24)}.get(os.uname().machine, (None, 0))
    if sys.platform != "linux" or word is None:
        pytest.skip("the layout of fenv_t is known here for Linux only")
    libm = ctypes.CDLL("libm.so.6")
    before, changed = (ctypes.c_uint32 * 16)(), (ctypes.c_uint32 * 16)()
    libm.fegetenv(before)
    libm.fegetenv(changed)
    changed[word] |= flags
    libm.fesetenv(changed)
    return lambda: libm.fesetenv(before)


def subnormals_are_flushed():
    smallest = [sys.float_info.min]
    return smallest[0] / 4 == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_flushing_subnormals_in_the_caller_changes_nothing(isa, layout, kind, rng):
    """Subnormal x, scales, biases and results; with few and many elements, so that other threads take part too."""
    for m, threads in ((2, 1), (40, 5)):
        product = small_product(rng, layout, kind, m=m, n=67, k=600)
        x, codes, scales, biases = product.wide
        tiny = F32(SUBNORMAL[product.stored])
        x[1] *= tiny
        x[0] *= F32(1e3)
        for array in (scales, biases):
            array[0] *= tiny
            array[:, 0] *= tiny
        product = Product(layout, x, codes, scales, biases, 64, 4, kind)
        expected = product.expected
        if kind != "float16":  # its subnormals are normal in float32
            x, scales, biases = (np.where(np.abs(a) < 2.0**-126, 0, a) for a in (x, scales, biases))
            changed = Product(layout, x, codes, scales, biases, 64, 4, kind).expected
            assert changed.tobytes() != expected.tobytes()
        restore = flush_subnormals()
        try:
            flushed = subnormals_are_flushed()
            with q.threads(threads):
                results = product.results()
            still_flushed = subnormals_are_flushed()
        finally:
            restore()
        if not flushed:
            pytest.skip("this CPU (or its emulation) does not flush subnormals")
        assert still_flushed
        assert not subnormals_are_flushed()
        for y in results:
            assert_same_bytes(y, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Types of arrays


def stored_as(array, dtype):
    """float32 values stored as a dtype by name; bfloat16 as uint16."""
    return array.astype(np.float64) if dtype == "float64" else ref.round_to(array, dtype)


def widened(array, dtype):
    return array.astype(F32) if dtype == "float64" else ref.to_f32(array, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("x_type", ["float32", "float16", "bfloat16", "float64"])
def test_result_has_the_promoted_dtype(isa, layout, x_type, rng):
    """Three of a kind stay that kind, float64 counts as float32, and anything mixed is float32."""
    types = ("float32", "float16", "bfloat16", "float64")
    product = small_product(rng, layout)
    bits_of = ref.qmm_t_bits if layout == "t" else ref.qmm_n_bits
    for s_type, b_type in itertools.product(types, types):
        own = (x_type, s_type, b_type)
        arrays = [stored_as(a, t) for a, t in zip((product.x, product.scales, product.biases), own, strict=True)]
        x, scales, biases = (widened(a, t) for a, t in zip(arrays, own, strict=True))
        digits = 2 if x_type in ("float16", "bfloat16") else 3
        kind = x_type if len(set(own)) == 1 and x_type != "float64" else "float32"
        expected = ref.round_to(bits_of(x, product.codes, scales, biases, 64, 4, digits), kind)
        declared = {"input_dtype": "bfloat16"} if "bfloat16" in own else {}
        for y in product.results(x=arrays[0], scales=arrays[1], biases=arrays[2], **declared):
            assert_same_bytes(y, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_is_computed_in_float32(isa, layout, rng):
    product = small_product(rng, layout)
    x = rng.standard_normal(product.x.shape)
    expected = Product(layout, x.astype(F32), *product.wide[1:], 64, 4).expected
    for y in product.results(x=x):
        assert_same_bytes(y, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_activations_int8_takes_one_digit_of_any_x(isa, layout, rng):
    product = small_product(rng, layout, "float16")
    bits_of = ref.qmm_t_bits if layout == "t" else ref.qmm_n_bits
    expected = ref.round_to(bits_of(*product.wide, 64, 4, 1), "float16")
    for y in product.results(activations="int8"):
        assert_same_bytes(y, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kind_of_bfloat16_out_is_kind_in(isa, layout, rng):
    bfloat16 = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed").bfloat16
    product = small_product(rng, layout, "bfloat16")
    names, raw = ("x", "scales", "biases"), (product.x, product.scales, product.biases)
    for ml in itertools.product((False, True), repeat=3):
        arrays = {name: a.view(bfloat16) if is_ml else a for name, a, is_ml in zip(names, raw, ml, strict=True)}
        declared = None if all(ml) else "bfloat16"
        for y in product.results(**arrays, input_dtype=declared):
            assert y.dtype == (bfloat16 if any(ml) else np.uint16)
            assert_same_bytes(y.view(np.uint16), product.expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lists_and_vectors(isa, layout, rng):
    product = small_product(rng, layout)
    one = product.x[1]
    for y in product.results(x=product.x.tolist(), scales=product.scales.tolist(), biases=product.biases.tolist()):
        assert_same_bytes(y, product.expected)
    for x in (one, one.tolist(), tuple(one.tolist())):
        for y in product.results(x=x):
            assert_same_bytes(y, product.expected[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_int32_codes_are_the_same_bits(isa, layout, rng):
    product = small_product(rng, layout)
    for y in product.results(w=product.words.view(np.int32)):
        assert_same_bytes(y, product.expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_of_another_type_are_refused(layout, rng):
    product = small_product(rng, layout)
    for w in (product.words.astype(np.int64), product.words.astype(F32), product.words.view(np.uint8), [[1]]):
        with pytest.raises(TypeError, match="w "):
            product.results(w=w)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


def batch_of_products(rng, layout, batch, m, n=5):
    """Products of the same shape, one for each place of `batch`, and their stored arrays with that shape."""
    products = [small_product(rng, layout, group_size=32, m=m, n=n, k=40) for _ in range(int(np.prod(batch)))]
    names = ("x", "words", "scales", "biases")
    stacked = [np.stack([getattr(p, name) for p in products]) for name in names]
    return [a.reshape(batch + a.shape[1:]) for a in stacked]


def expected_of_batch(layout, x, words, scales, biases):
    """By one call of the reference for each place of the broadcast batch."""
    batch = np.broadcast_shapes(x.shape[:-2], words.shape[:-2])
    x, words, scales, biases = (np.broadcast_to(a, batch + a.shape[-2:]) for a in (x, words, scales, biases))
    bits_of = ref.qmm_t_bits if layout == "t" else ref.qmm_n_bits
    columns = words.shape[-1] * 8
    places = [
        bits_of(x[i], ref.unpack(words[i], 4, columns), scales[i], biases[i], 32, 4, 3) for i in np.ndindex(*batch)
    ]
    return np.reshape(places, batch + places[0].shape)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("x_batch", "w_batch"),
    [
        ((), (3,)),  # x of two dimensions with batched weights
        ((3,), ()),
        ((3,), (3,)),
        ((3,), (1,)),
        ((1,), (3,)),
        ((2, 1), (3,)),
        ((2, 3), (2, 1)),
        ((3,), (2, 1)),
        ((2, 1, 3), (2, 2, 1)),
    ],
)
def test_batch_dimensions_broadcast(isa, layout, x_batch, w_batch, rng):
    x, _, _, _ = batch_of_products(rng, layout, x_batch, m=2)
    _, words, scales, biases = batch_of_products(rng, layout, w_batch, m=2)
    expected = expected_of_batch(layout, x, words, scales, biases)
    for function in FUNCTIONS[layout]:
        assert_same_bytes(function(x, words, scales, biases, group_size=32), expected)
        vectors = function(x[..., 0, :], words, scales, biases, group_size=32) if x.ndim == 2 else None
        assert vectors is None or np.array_equal(vectors, expected[..., 0, :])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_vector_times_batched_weights(isa, layout, rng):
    x, _, _, _ = batch_of_products(rng, layout, (), m=1)
    _, words, scales, biases = batch_of_products(rng, layout, (2, 3), m=1)
    expected = expected_of_batch(layout, x, words, scales, biases)[..., 0, :]
    for function in FUNCTIONS[layout]:
        assert_same_bytes(function(x[0], words, scales, biases, group_size=32), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_that_do_not_broadcast_are_refused(layout, rng):
    x, _, _, _ = batch_of_products(rng, layout, (2,), m=2)
    _, words, scales, biases = batch_of_products(rng, layout, (3,), m=2)
    for function in FUNCTIONS[layout]:
        with pytest.raises(ValueError, match=r"\(2,\) of x and \(3,\) of w do not broadcast"):
            function(x, words, scales, biases, group_size=32)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_shapes(isa, kind):
    """No rows, no outputs, no batch: nothing. No inputs: zeros, the empty sum."""
    stored = stored_kind(kind)
    keywords = {"activations": "int8"} if kind == "int8" else {}
    if kind == "bfloat16":
        keywords["input_dtype"] = "bfloat16"
    for batch, m, n, k in [((), 0, 64, 64), ((), 3, 0, 64), ((), 3, 64, 0), ((0,), 3, 64, 64), ((2, 0), 0, 0, 0)]:
        x = ref.round_to(np.ones((*batch, m, k)), stored)
        expected = ref.round_to(np.zeros((*batch, m, n)), stored)
        for layout, functions in FUNCTIONS.items():
            rows, columns = (n, k) if layout == "t" else (k, n)
            scales = ref.round_to(np.ones((rows, columns // 64)), stored)
            words = np.zeros((rows, columns // 8), np.uint32)
            for function in functions:
                y = function(x, words, scales, scales, group_size=64, bits=4, **keywords)
                assert_same_bytes(y, expected)
                if not batch and m:
                    assert_same_bytes(function(x[0], words, scales, scales, group_size=64, bits=4, **keywords), y[0])


@pytest.mark.parametrize(("mode", "bits", "group_size"), FORMATS)
def test_group_size_and_bits_are_inferred(isa, mode, bits, group_size, rng):
    """By qmm_t and qmv from x; by the others one from the other, or both from output_features."""
    t = small_product(rng, "t", group_size=group_size, bits=bits)
    for given in ({}, {"group_size": group_size}, {"bits": bits}):
        for y in t.results(**{"group_size": None, "bits": None, **given}):
            assert_same_bytes(y, t.expected)
    n = small_product(rng, "n", group_size=group_size, bits=bits)
    outputs = n.codes.shape[1]
    for given in ({"group_size": group_size}, {"bits": bits}, {"output_features": outputs}):
        for y in n.results(**{"group_size": None, "bits": None, **given}):
            assert_same_bytes(y, n.expected)


def test_defaults_are_64_and_4(rng):
    product = small_product(rng, "n")
    for y in product.results(group_size=None, bits=None):
        assert_same_bytes(y, product.expected)
    other = small_product(rng, "n", group_size=128)
    with pytest.raises(ValueError, match="groups of 64"):
        other.results(group_size=None, bits=None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_given_is_checked(layout, rng):
    product = small_product(rng, layout)
    outputs = product.expected.shape[1]
    with pytest.raises(ValueError, match="output_features"):
        FUNCTIONS[layout][1](product.x, product.words, product.scales, product.biases, outputs + 1, 64, 4)
    y = FUNCTIONS[layout][1](product.x, product.words, product.scales, product.biases, outputs, 64, 4)
    assert_same_bytes(y, product.expected)
    for wrong in ({"group_size": 32}, {"bits": 8}, {"bits": 7}, {"group_size": 0}, {"x": product.x[:, 64:]}):
        with pytest.raises(ValueError, match=f"^{FUNCTIONS[layout][0].__name__}: "):
            product.results(**wrong)
    for wrong in ({"accumulate": "fast"}, {"activations": "int4"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            product.results(**wrong)


# ---------------------------------------------------------------------------------------------------------------------
# Memory: strides, alignment, what is written and read


def views_of(array):
    """Views with the same values: stepped, reversed, transposed in memory, and not aligned."""
    shape, itemsize = array.shape, array.itemsize
    stepped = np.zeros((2 * shape[0], 3 * shape[1]), array.dtype)[::2, 1::3]
    backwards = np.zeros(shape, array.dtype)[::-1, ::-1]
    in_columns = np.zeros(shape[::-1], array.dtype).T
    rows_apart = np.zeros((shape[0], shape[1] + 5), array.dtype)[:, 2:-3]
    unaligned = np.zeros(array.nbytes + itemsize, np.uint8)[itemsize // 2 : array.nbytes + itemsize // 2]
    unaligned = unaligned[: array.nbytes].view(array.dtype).reshape(shape)
    odd = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(shape)
    views = (stepped, backwards, in_columns, rows_apart, unaligned, odd)
    for view in views:
        view[...] = array
    return views


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (3, 32), (8, 128)])
def test_strides_and_alignment_of_inputs(isa, layout, kind, bits, group_size, rng):
    product = small_product(rng, layout, kind, group_size, bits, m=4)
    names = {"x": product.x, "w": product.words, "scales": product.scales, "biases": product.biases}
    for name, array in names.items():
        for view in views_of(array):
            view.flags.writeable = False
            assert_same_bytes(product.results(**{name: view})[0], product.expected)
    for all_of_them in zip(*(views_of(array) for array in names.values()), strict=True):
        assert_same_bytes(product.results(**dict(zip(names, all_of_them, strict=True)))[0], product.expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repeated_inputs_have_a_stride_of_zero(isa, layout, rng):
    """Scales, biases, weights and x that np.broadcast_to repeats."""
    product = small_product(rng, layout)
    x, codes, scales, biases = product.wide
    one_scale, one_bias = np.broadcast_to(scales[:1, :1], scales.shape), np.broadcast_to(biases[:, :1], biases.shape)
    repeated = Product(layout, x, codes, one_scale, one_bias, 64, 4)
    for y in repeated.results(scales=one_scale, biases=one_bias):
        assert_same_bytes(y, repeated.expected)
    batched = {name: np.broadcast_to(a, (3, *a.shape)) for name, a in (("w", product.words), ("scales", scales))}
    for y in product.results(**batched, biases=np.stack([biases] * 3), x=np.broadcast_to(x, (2, 1, *x.shape))):
        assert_same_bytes(y, np.broadcast_to(product.expected, y.shape))
    same = np.broadcast_to(x[:, :1], x.shape)
    for y in product.results(x=same):
        assert_same_bytes(y, Product(layout, same, codes, scales, biases, 64, 4).expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_out_of_any_strides(isa, layout, kind, rng):
    product = small_product(rng, layout, kind)
    for out in views_of(product.expected):
        out[...] = 0
        for y in product.results(out=out):
            assert y is out
            assert_same_bytes(y, product.expected)
    vector = np.zeros(2 * product.expected.shape[1], product.expected.dtype)[::-2]
    product.results(x=product.x[1], out=vector)
    assert_same_bytes(vector, product.expected[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_that_does_not_fit_is_refused_untouched(layout, rng):
    product = small_product(rng, layout)
    good = np.full_like(product.expected, 7)
    read_only = good.copy()
    read_only.flags.writeable = False
    repeated = np.lib.stride_tricks.as_strided(good, good.shape, (0, 4))
    refused = [(ValueError, a) for a in (good[1:], good[None], read_only, repeated)]
    refused += [(TypeError, a) for a in (good.astype(np.float16), good.astype(np.float64), good.tolist())]
    for error, out in refused:
        with pytest.raises(error, match="out"):
            product.results(out=out)
    assert (good == 7).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_as_ml_dtypes(isa, layout, rng):
    bfloat16 = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed").bfloat16
    product = small_product(rng, layout, "bfloat16")
    out = np.zeros(product.expected.shape, bfloat16)
    for y in product.results(out=out):
        assert y is out
        assert_same_bytes(y.view(np.uint16), product.expected)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        product.results(out=out)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_may_not_share_memory(layout, rng):
    product = small_product(rng, layout, m=64, n=192, k=192)
    for name in ("x", "w"):
        memory = np.zeros(max(product.x.nbytes, product.expected.nbytes), np.uint8)
        shared = {"x": product.x, "w": product.words}[name]
        source = memory[: shared.nbytes].view(shared.dtype).reshape(shared.shape)
        out = memory[: product.expected.nbytes].view(F32).reshape(product.expected.shape)
        with pytest.raises(ValueError, match=f"out shares memory with {name}"):
            product.results(**{name: source}, out=out)


@pytest.mark.parametrize(("mode", "bits", "group_size"), FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_written_outside_of_out(isa, layout, mode, bits, group_size, guarded, rng):
    for offset, kind in ((0, "float32"), (4, "float32"), (2, "float16")):
        product = small_product(rng, layout, kind, group_size, bits, m=5, n=11)
        arrays = {"x": product.x, "w": product.words, "scales": product.scales, "biases": product.biases}
        places = {name: guarded.empty(a.shape, a.dtype, offset) for name, a in arrays.items()}
        for name, place in places.items():
            place[...] = arrays[name]
        out = guarded.empty(product.expected.shape, product.expected.dtype, offset)
        for y in product.results(**places, out=out):
            assert_same_bytes(y, product.expected)
        for name, place in places.items():
            assert_same_bytes(place, arrays[name])


# N and groups of layout t, groups and K of layout n. 17 groups are some whole chunks of blocks and a part of one, on
# every instruction set; with 1 row of weights or of x there is none that could stand in for others.
SIZES_BETWEEN_PAGES = {"t": ((7, 3), (17, 17), (1, 1)), "n": ((3, 67), (1, 64), (5, 1))}


@pytest.mark.parametrize(("mode", "bits", "group_size"), FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_touched_beyond_the_arrays(isa, layout, mode, bits, group_size, rng):
    """Reading or writing one byte too many ends the process. Every form of the kernels, words at odd addresses, too."""
    pages = {name: Page(1 << 17) for name in ("x", "w", "scales", "biases", "out")}
    kinds = ("float32",) if SMALL else ("float32", "float16", "bfloat16")
    for (one, other), kind in itertools.product(SIZES_BETWEEN_PAGES[layout], kinds):
        outputs, inputs = (one, other * group_size) if layout == "t" else (one * group_size, other)
        rows, columns = (outputs, inputs) if layout == "t" else (inputs, outputs)
        weights = random_weights(rng, rows, columns, group_size, bits, symmetric=False)
        product = Product(layout, rng.standard_normal((9, inputs)), *weights, group_size, bits, kind)
        stored = {"w": product.words, "scales": product.scales, "biases": product.biases}
        expected = by_definition(product)
        for m, at_end in itertools.product((1, 2, 9), (True, False)):
            arrays = {"x": product.x[:m], **stored, "out": expected[:m]}
            placed = {name: pages[name].put(array, at_end) for name, array in arrays.items()}
            placed["out"][...] = 0
            assert_same_bytes(product.results(**placed)[0], expected[:m])
            plain_sums = product.results(**{**arrays, "out": None}, accumulate="float")[0]
            assert_same_bytes(product.results(**placed, accumulate="float")[0], plain_sums)


@pytest.mark.parametrize(("mode", "bits", "group_size"), FORMATS)
def test_nothing_is_touched_between_weight_rows(isa, mode, bits, group_size, rng):
    """Rows lie in pages of their own, none of whose neighbours may be touched. One, two and three groups: rows end
    within what kernels take at a time."""
    for k in (group_size, 2 * group_size, 3 * group_size):
        w, scales, biases = q.affine_quantize(rng.standard_normal((2, k), np.float32), group_size, bits)
        pages = sorted((Page(row.nbytes) for row in w), key=lambda page: page.bytes.ctypes.data)
        rows = [page.put(row, at_end=True) for page, row in zip(pages, w, strict=True)]
        pitch = rows[1].ctypes.data - rows[0].ctypes.data
        apart = np.lib.stride_tricks.as_strided(rows[0], w.shape, (pitch, w.itemsize))
        x = rng.standard_normal((9, k), np.float32)
        for m in (1, 2, 3, 9):
            expected = q.affine_qmm_t(x[:m], w, scales, biases, group_size, bits)
            assert_same_bytes(q.affine_qmm_t(x[:m], apart, scales, biases, group_size, bits), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Kernel classes and the published call forms

CLASSES = {
    q.AffineQmmT: ("affine_qmm_t", "t"),
    q.AffineQmmN: ("affine_qmm_n", "n"),
    q.AffineQmv: ("affine_qmv", "t"),
    q.AffineQvm: ("affine_qvm", "n"),
}


@pytest.mark.parametrize("kernel_class", CLASSES)
def test_kernel_classes(kernel_class, rng):
    name, layout = CLASSES[kernel_class]
    product = small_product(rng, layout)
    arguments = (product.x, product.words, product.scales, product.biases)
    kernel = kernel_class(group_size=64, bits=4)
    assert kernel._kernel is None
    assert "not compiled" in repr(kernel)
    compiled = kernel.compile()
    assert compiled is kernel.compile()
    assert compiled is kernel._kernel
    for telling in (name, compiled.device, compiled.isa, compiled.variant):
        assert telling
        assert telling in repr(compiled)
        assert telling in repr(kernel)
    assert_same_bytes(kernel(*arguments), product.expected)
    lazy = kernel_class()
    assert_same_bytes(lazy(*arguments, group_size=64), product.expected)
    assert lazy._kernel is lazy.compile()


@pytest.mark.parametrize("kernel_class", CLASSES)
def test_kernels_use_their_group_size_and_bits(kernel_class, rng):
    product = small_product(rng, CLASSES[kernel_class][1], group_size=128, bits=8)
    arguments = (product.x, product.words, product.scales, product.biases)
    assert_same_bytes(kernel_class(128, 8)(*arguments), product.expected)
    assert_same_bytes(kernel_class(64, 4)(*arguments, group_size=128, bits=8), product.expected)
    with pytest.raises(ValueError, match=CLASSES[kernel_class][0]):
        kernel_class(64, 8)(*arguments)


def test_contexts_do_not_change_the_compiled_kernel(rng):
    product = small_product(rng, "t")
    kernel = q.AffineQmmT()
    first = kernel.compile()
    for name in ISAS:
        with q.isa(name), q.threads(2), q.device("cpu"):
            y = kernel(product.x, product.words, product.scales, product.biases)
            assert kernel._plan().isa == name
            assert kernel._plan() is kernel._plan()
        assert_same_bytes(y, product.expected)
    assert kernel._kernel is first
    assert kernel._plan() is first


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_environment_chooses_the_isa():
    code = "import quantization as q; k = q.AffineQmmT(64, 4).compile(); print(k.isa, k.device, k)"
    for name in ISAS:
        run = run_python(code, QUANTIZATION_ISA=name)
        assert run.stdout.startswith(f"{name} cpu "), run.stderr
        assert f"isa {name}" in run.stdout
    refused = run_python(code, QUANTIZATION_ISA="nonsense")
    assert refused.returncode
    assert "RuntimeError" in refused.stderr
    assert "generic" in refused.stderr


def test_published_example():
    """The call of the package that these functions stem from, with NumPy arrays; sampled outputs are compared."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 32, 4096)).astype(np.float16)
    w = rng.integers(0, 255, (4096, 512), dtype=np.int32)
    scales = rng.standard_normal((4096, 4096 // 128)).astype(np.float16)
    biases = np.zeros((4096, 4096 // 128), np.float16)
    if SMALL:
        x, w, scales, biases = x[:, :3], w[:65], scales[:65], biases[:65]

    y = q.affine_qmm_t(x, w, scales, biases, group_size=128, bits=4)

    assert y.shape == (1, x.shape[1], w.shape[0])
    assert y.dtype == np.float16
    some = slice(None, None, 64)
    codes = ref.unpack(np.ascontiguousarray(w[some]).view(np.uint32), 4, 4096)
    expected = ref.qmm_t_bits(x[0], codes, scales[some], biases[some], 128, 4, 2).astype(np.float16)
    assert_same_bytes(y[0][:, some], expected)


def test_published_call_forms(rng):
    """Positional arguments, in the order published; every width's packing factor."""
    for bits, group_size in ((2, 64), (4, 128), (8, 64)):
        t = small_product(rng, "t", "float16", group_size, bits)
        arguments = (t.x, t.words.view(np.int32), t.scales, t.biases)
        assert t.words.shape[1] == t.codes.shape[1] * bits // 32
        assert_same_bytes(q.affine_qmm_t(*arguments, group_size, bits), t.expected)
        assert_same_bytes(q.affine_qmv(*arguments, t.codes.shape[0], group_size, bits), t.expected)
        n = small_product(rng, "n", "float16", group_size, bits)
        arguments = (n.x, n.words.view(np.int32), n.scales, n.biases, n.codes.shape[1], group_size, bits)
        assert_same_bytes(q.affine_qmm_n(*arguments), n.expected)
        assert_same_bytes(q.affine_qvm(*arguments), n.expected)


# ---------------------------------------------------------------------------------------------------------------------
# The campaign


def test_short_campaign(capsys):
    same_bits.main(["--quick"])
    assert capsys.readouterr().out.rstrip().endswith("identical")


def test_short_campaign_of_long_rows(capsys):
    formats = ["affine_8", "mxfp8"] if SMALL else ["affine_3", "affine_8", "mxfp8", "nvfp4"]
    long_rows.main(["--length=4096", *(f"--format={name}" for name in formats)])
    assert capsys.readouterr().out.rstrip().endswith("identical, all within the bound")


# Of the results of campaigns/same_bits_grid.py --quick: the same on every machine. They change with the definition of a
# result, which the changelog must tell, and with the script's inputs.
DIGESTS = {
    "affine_1": "ad52cec115baa528",
    "affine_2": "cee316aad688dd81",
    "affine_3": "b185f3780ccbb68a",
    "affine_4": "87a898d8ce8b41b4",
    "affine_5": "d7b41f896e281a66",
    "affine_6": "69497a6e4a4d2431",
    "affine_7": "c18167e64d6953b0",
    "affine_8": "a928d93311b00fe9",
    "mxfp4": "7fed8db2790d2bfb",
    "mxfp8": "2ed396bb70137d66",
    "nvfp4": "ba88b6b97a9c56d7",
}


def test_results_are_those_of_every_machine(capsys):
    names = ["affine_3", "affine_8", "mxfp8", "nvfp4"] if SMALL else list(DIGESTS)
    arguments = [f"--format={name}" for name in names]
    assert same_bits_grid.main(["--quick", *arguments]) == {name: DIGESTS[name] for name in names}
    assert capsys.readouterr().out.rstrip().endswith("identical")


def test_a_flipped_bit_ends_the_campaign(monkeypatch):
    """The lowest bit of one element, on one instruction set, for one number of rows."""
    right = q.affine_qmm_n

    def wrong(x, *stored, **keywords):
        y = right(x, *stored, **keywords)
        if len(x) == 14 and q.AffineQmmN()._plan().isa == AVAILABLE[0]:
            y.view(np.uint8)[13, 0] ^= 1
        return y

    monkeypatch.setattr(q, "affine_qmm_n", wrong)
    with pytest.raises(SystemExit, match=r"same_bits_grid: affine_qmm_n, 1 bits(.|\n)*14 rows(.|\n)*y\[13, 0\]"):
        same_bits_grid.main(["--quick"])
