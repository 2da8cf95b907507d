"""Products by plain float32 sums, accumulate="float", of mxfp4 and nvfp4 weights: the error bound, special values.

mxfp8's are those of its exact class. Arrays of every form are tested in test_matmul_fp.py, gathered products in
test_gather_fp.py. The oracle is the product in float64, of exact weights.
"""

import functools

import numpy as np
import pytest

import quantization as q
import reference as ref
import reference_fp as fp
from conftest import SMALL, assert_same_bytes, assert_threads_change_nothing
from test_matmul_fp import FUNCTIONS, Product, both_layouts, families, make, random_weights

F32 = np.float32
FLOAT_MODES = ["mxfp4", "nvfp4"]
KINDS = ("float32", "float16", "bfloat16")

every_float_mode = pytest.mark.parametrize("mode", FLOAT_MODES)
every_kind = pytest.mark.parametrize("kind", KINDS)


def results(product, **changes):
    """What each function of the layout returns, computed in the float class."""
    return product.results(accumulate="float", **changes)


def exact_and_bound(product):
    """The product in float64, and how far a result may be from it."""
    value = fp.exact64(*product.wide, product.global_scale)
    bound = fp.bound_float(*product.wide, product.global_scale)
    with np.errstate(all="ignore"):
        rounding = 0 if product.stored == "float32" else ref.half_ulp(np.abs(value) + bound, product.stored)
    return value, bound + rounding


def check(product, y):
    """Assert that `y` is within the bound, and return where a bound exists."""
    value, bound = exact_and_bound(product)
    assert y.shape == value.shape and y.dtype == product.x.dtype
    bounded = np.isfinite(bound)
    with np.errstate(invalid="ignore"):
        error = np.abs(ref.to_f32(y, product.stored).astype(np.float64) - value)
    assert (error[bounded] <= bound[bounded]).all(), np.max(error[bounded] / bound[bounded])
    return bounded


def outliers(rng, shape):
    return rng.standard_normal(shape) * np.where(rng.random(shape) < 0.02, 1e5, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Error


@both_layouts
@every_kind
@every_float_mode
def test_error_bound(isa, mode, kind, transpose, rng):
    """Outliers of 1e5, exponents far apart, groups of zeros, subnormal x, x near the largest."""
    *finite, _ = families(mode)
    for m in (1, 3, 11):
        for x in (None, outliers, *finite):
            product = make(mode, transpose, rng, m, 33, 240, kind, x)
            for y in results(product):
                bounded = check(product, y)
            assert bounded.all() or kind == "float16" or x.__name__ == "huge"


@both_layouts
@every_float_mode
def test_any_number_of_rows(isa, mode, transpose, rng):
    """Few rows, whole and partial tiles of rows; N and K that fill no tile, panel or vector, odd numbers of groups."""
    for m in (1, 2, 5, 9) if SMALL else (*range(1, 31), 64, 65, 127, 130):
        size = fp.GROUP_SIZES[mode]
        product = make(mode, transpose, rng, m, 1 + 7 * m % 37, size * (1 + 2 * (m % 5)) + (0 if transpose else m % 7))
        assert check(product, results(product)[0]).all()


@both_layouts
@every_float_mode
def test_long_rows(isa, mode, transpose, rng):
    """K of several panels and of several portions of groups, and odd multiples of a group."""
    size = fp.GROUP_SIZES[mode]
    for m in (1, 3, 8, 130):
        for groups in (33,) if SMALL else (17, 63, 64, 65, 129):
            product = make(mode, transpose, rng, m, 35, groups * size + (0 if transpose else 1), x=outliers)
            assert check(product, results(product)[0]).all()


@both_layouts
@every_float_mode
def test_every_scale_and_code(isa, mode, transpose, rng):
    """All scale bytes and all codes; where scales are not finite, or weights overflow, nothing is promised."""
    k = n = 256
    codes = rng.integers(0, 16, (n, k), dtype=np.uint8)
    scales = np.resize(np.arange(256, dtype=np.uint8), (n, k // fp.GROUP_SIZES[mode]))
    for m in (2, 9):
        product = Product(mode, transpose, rng.standard_normal((m, k)).astype(F32), codes, scales)
        bounded = check(product, results(product)[0])
        assert bounded.any() and not bounded.all()


@both_layouts
@every_float_mode
def test_every_code_by_itself(isa, mode, transpose, rng):
    """x is one of the unit vectors and scales are powers of two: no operation rounds, and outputs are the weights."""
    size = fp.GROUP_SIZES[mode]
    codes = np.tile(np.arange(16, dtype=np.uint8), (5 * size, 3 * size // 16))
    codes = np.roll(codes.ravel(), 3).reshape(codes.shape)
    scales = rng.choice(np.array([119, 127, 140] if mode == "mxfp4" else [0x30, 0x38, 0xC8], np.uint8), (5 * size, 3))
    weights = fp.weights32(codes, scales, mode)
    for m in (1, 7, 8, 40):
        x = np.eye(3 * size if transpose else 5 * size, dtype=F32)[-m:]
        y = results(Product(mode, transpose, x, codes, scales))[0]
        assert np.array_equal(y, x @ (weights.T if transpose else weights))


@pytest.mark.parametrize("global_scale", [2688.0, 3.7, 1e-3, 0.0, 3e38])
@both_layouts
def test_global_scale(isa, transpose, global_scale, rng):
    """Results are multiplied by float32(global_scale / 2688), once, in whichever kernel."""
    for kind in KINDS:
        for m in (3, 9):
            product = make("nvfp4", transpose, rng, m, 32, 96, kind, global_scale=global_scale)
            bounded = check(product, results(product)[0])
            assert bounded.all() or kind == "float16" or global_scale > 1e38
    product = make("nvfp4", transpose, rng, 9, 32, 96, global_scale=global_scale)
    plain = results(product, global_scale=None)[0]
    assert_same_bytes(results(product)[0], plain * (F32(global_scale) / F32(2688)))


def test_the_bound_is_of_the_class_of_float32(rng):
    """It is no more than 2^-15 of the sum of magnitudes on ordinary numbers: no bound says nothing."""
    for mode in FLOAT_MODES:
        for transpose in (True, False):
            product = make(mode, transpose, rng, 2, 32, 1024, spread=0)
            weights = np.abs(fp.weights32(product.codes, product.scales, mode).astype(np.float64))
            sizes = np.abs(product.x.astype(np.float64)) @ (weights.T if transpose else weights)
            assert (fp.bound_float(*product.wide) <= 2.0**-15 * sizes).all()


@both_layouts
@every_float_mode
def test_it_is_another_class(isa, mode, transpose, rng):
    """In a long sum of x that block fixed point rounds, at least one output has other bits in each class."""
    for m in (3, 9):
        product = make(mode, transpose, rng, m, 32, 992)
        assert (results(product)[0] != product.expected).any()


@both_layouts
@every_float_mode
def test_against_mlx(isa, mode, transpose, rng):
    """MLX's CPU computes in float32 too; both are within the bound of the same value."""
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    product = make(mode, transpose, rng, 9, 64, 256)
    arrays = [mx.array(a) for a in (product.x, product.words, product.scales)]
    theirs = mx.quantized_matmul(*arrays, transpose=transpose, mode=mode, stream=mx.cpu)
    check(product, np.array(theirs))
    check(product, results(product)[0])


# ---------------------------------------------------------------------------------------------------------------------
# The same bits again


@both_layouts
@every_float_mode
def test_threads_change_nothing(isa, mode, transpose, rng):
    n, k = (67, 1040) if transpose else (272, 600)
    for m in (1, 7, 18, 24):  # 18: tiles of 3 and of 4 rows on one thread, of 3 on two, where a tile has at most 4
        product = make(mode, transpose, rng, m, n, k)
        y = assert_threads_change_nothing(functools.partial(results, product))
        assert check(product, y).all()


# ---------------------------------------------------------------------------------------------------------------------
# Special values


@pytest.mark.parametrize("m", [2, 9])
@both_layouts
@every_kind
@every_float_mode
def test_non_finite_x_changes_its_rows_only(isa, mode, kind, transpose, m, rng):
    """NaN spreads to all outputs of its row; Inf leaves none of them finite, be it as Inf or, at code 0, as NaN."""
    product = make(mode, transpose, rng, m, 33, 112, kind)
    clean, x = results(product)[0], ref.to_f32(product.x, product.stored)
    for value in (np.nan, np.inf, -np.inf):
        for place in (0, x.shape[1] // 2, -1):
            changed = x.copy()
            changed[1, place] = value
            y = results(Product(mode, transpose, changed, product.codes, product.scales, kind))[0]
            others = np.arange(m) != 1
            assert_same_bytes(y[others], clean[others])
            row = ref.to_f32(y[1], product.stored)
            assert np.isnan(row).all() if np.isnan(value) else not np.isfinite(row).any()


@pytest.mark.parametrize("groups", [5, 69])
@pytest.mark.parametrize("m", [1, 2, 9])
@both_layouts
@every_float_mode
def test_non_finite_scales_change_their_outputs_only(isa, mode, transpose, m, groups, rng):
    """nvfp4's 0x7f and 0xff are NaN, mxfp4's 255 is infinity: an infinity comes of it, or NaN.

    69 groups: scales are loaded 64 and 32 at a time, and then there are some left.
    """
    size = fp.GROUP_SIZES[mode]
    product = make(mode, transpose, rng, m, 9 if transpose else groups * size, groups * size if transpose else 70)
    clean = results(product)[0]
    for byte in (255,) if mode == "mxfp4" else (0x7F, 0xFF):
        for group in {1, 4, 33, 63, 64, groups - 1} & set(range(groups)):
            scales = product.scales.copy()
            scales[3, group] = byte
            y = results(Product(mode, transpose, product.x, product.codes, scales))[0]
            hit = np.arange(y.shape[1]) == 3 if transpose else np.arange(y.shape[1]) // size == group
            assert_same_bytes(y[:, ~hit], clean[:, ~hit])
            assert not np.isfinite(y[:, hit]).any()
            assert mode == "mxfp4" or np.isnan(y[:, hit]).all()


@every_float_mode
def test_scales_that_stand_apart(isa, mode, rng):
    """So many that they would be loaded as vectors if they stood side by side: the same bits."""
    product = make(mode, True, rng, 3, 7, 69 * fp.GROUP_SIZES[mode])
    wide = np.repeat(product.scales, 3, axis=1)
    for m in (1, 3):
        y = results(product, x=product.x[:m])[0]
        for scales in (wide[:, ::3], np.asfortranarray(product.scales), product.scales[:, ::-1].copy()[:, ::-1]):
            assert_same_bytes(results(product, x=product.x[:m], scales=scales)[0], y)


@pytest.mark.parametrize("m", [0, 1, 3, 9])
@every_float_mode
def test_empty_sums_are_zero(isa, mode, m):
    """No inputs: zeros; no rows or no outputs: nothing."""
    for transpose, names in FUNCTIONS.items():
        for n, k in ((64, 0), (0, 64)):
            rows, columns = (n, k) if transpose else (k, n)
            stored = np.zeros((rows, columns // 8), np.uint32), np.zeros((rows, columns // fp.GROUP_SIZES[mode]), "u1")
            for name in names:
                y = getattr(q, f"{mode}_{name}")(np.ones((m, k), F32), *stored, accumulate="float")
                assert_same_bytes(y, np.zeros((m, n), F32))


@functools.cache
def weights_of_batch(mode):
    rng = np.random.default_rng(7)
    return [random_weights(mode, rng, 32, 64) for _ in range(3)]


@pytest.mark.parametrize("m", [2, 9])
@both_layouts
@every_float_mode
def test_batches(isa, mode, transpose, m, rng):
    """x of one matrix with w of three, and the other way round: each place of the batch has its own product."""
    weights = weights_of_batch(mode)
    words, scales = (np.stack(a) for a in zip(*[(ref.pack(c, 4), s) for c, s in weights], strict=True))
    x = rng.standard_normal((3, m, 64 if transpose else 32)).astype(F32)
    function = getattr(q, f"{mode}_{FUNCTIONS[transpose][0]}")
    for xs, chosen in ((x[:1], slice(0, 3)), (x, slice(1, 2)), (x, slice(0, 3))):
        y = function(xs, words[chosen], scales[chosen], accumulate="float")
        assert y.shape[:2] == (3, m)
        for i in range(3):
            one = Product(mode, transpose, xs[i % len(xs)], *weights[chosen][i % len(weights[chosen])])
            assert check(one, y[i]).all()


@every_float_mode
def test_int8_activations_have_no_float_class(mode, rng):
    product = make(mode, True, rng, 2, 8, 64)
    with pytest.raises(ValueError, match="activations='int8' needs accumulate='exact', got 'float'"):
        results(product, activations="int8")
