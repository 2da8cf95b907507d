"""Products by plain float32 sums, accumulate="float": the error bound, special values, arrays of every form.

What the binding does (types, batches, messages) is that of the exact class, and tested in test_matmul.py; here are the
kernels and loops of this class. The oracle is the product in float64.
"""

import functools
import itertools

import numpy as np
import pytest

import reference as ref
import test_matmul as exact
from conftest import FORMATS, SMALL, assert_same_bytes, assert_threads_change_nothing
from test_matmul import INF, LAYOUTS, NAN, Product, small_product, views_of

KINDS = ("float32", "float16", "bfloat16")


def results(product, **changes):
    """What each function of the layout returns, computed in the float class."""
    return product.results(accumulate="float", **changes)


def exact_and_bound(product):
    """The product in float64, and how far a result may be from it."""
    transpose = product.layout == "t"
    value = ref.exact64(*product.wide, product.group_size, transpose)
    bound = ref.bound_float(*product.wide, product.group_size, transpose)
    with np.errstate(all="ignore"):
        rounding = 0 if product.stored == "float32" else ref.half_ulp(np.abs(value) + bound, product.stored)
    return value, bound + rounding


def check(product, y, rows=slice(None), outputs=slice(None)):
    """Assert that `y` is within the bound in these rows and outputs, and return where a bound exists."""
    value, bound = (a[rows, outputs] for a in exact_and_bound(product))
    bounded = np.isfinite(bound)
    error = np.abs(ref.to_f32(y, product.stored).astype(np.float64).reshape(value.shape) - value)
    assert (error[bounded] <= bound[bounded]).all(), np.max(error[bounded] / bound[bounded])
    return bounded


# ---------------------------------------------------------------------------------------------------------------------
# Error


@pytest.mark.parametrize(("mode", "bits", "group_size"), FORMATS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_bound(isa, layout, kind, mode, bits, group_size):
    """Outliers of 1e5, subnormals, huge values, zero blocks, all-extreme codes."""
    for family, product in exact.products_of(layout, kind, bits, group_size).items():
        for y in results(product):
            assert y.dtype == product.x.dtype
            bounded = check(product, y)
        assert bounded.all() or family == "huge" or product.stored == "float16"


@pytest.mark.parametrize(("mode", "bits", "group_size"), FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_number_of_rows(isa, layout, mode, bits, group_size, rng):
    """Few rows, whole and partial tiles of rows; outputs and K that fill no tile, panel or vector."""
    for m in (1, 2, 9) if SMALL else (*range(1, 31), 64, 65, 127, 131):
        product = small_product(rng, layout, "float32", group_size, bits, m=m, n=1 + 7 * m % 37, k=1 + 29 * m % 137)
        assert check(product, results(product)[0]).all()


@pytest.mark.parametrize(("mode", "bits", "group_size"), FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_long_rows(isa, layout, mode, bits, group_size, rng):
    """K of several panels and of several portions of groups, odd numbers of groups among them."""
    for m, groups in itertools.product((1, 3, 8), (33,) if SMALL else (17, 64, 65, 129)):
        rows, columns = (35, groups * group_size) if layout == "t" else (groups * 40 + 1, 3 * group_size)
        weights = exact.random_weights(rng, rows, columns, group_size, bits)
        x = rng.standard_normal((m, columns if layout == "t" else rows))
        product = Product(layout, x, *weights, group_size, bits)
        assert check(product, results(product)[0]).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_another_class(isa, layout, rng):
    """In a long sum of x that block fixed point rounds, at least one output has other bits in each class."""
    product = small_product(rng, layout, group_size=128, m=9, k=999)
    assert (results(product)[0] != product.expected).any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [4, 8])
def test_against_mlx(isa, layout, bits, rng):
    """MLX's CPU computes in float32 too; both are within the bound of the same value."""
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    product = small_product(rng, layout, bits=bits, m=9, n=64)
    arrays = [mx.array(a) for a in (product.x, product.words, product.scales, product.biases)]
    theirs = mx.quantized_matmul(*arrays, transpose=layout == "t", group_size=64, bits=bits, stream=mx.cpu)
    check(product, np.array(theirs))
    check(product, results(product)[0])


# ---------------------------------------------------------------------------------------------------------------------
# The same bits again


@pytest.mark.parametrize(("mode", "bits", "group_size"), FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_change_nothing(isa, layout, mode, bits, group_size, rng):
    outputs, inputs = (67, 1024) if layout == "t" else (256, 600)
    rows, columns = (outputs, inputs) if layout == "t" else (inputs, outputs)
    weights = exact.random_weights(rng, rows, columns, group_size, bits)
    for m in (1, 18, 24):  # 18: tiles of 3 and of 4 rows on one thread, of 3 on two, where a tile has at most 4
        product = Product(layout, rng.standard_normal((m, inputs)), *weights, group_size, bits)
        y = assert_threads_change_nothing(functools.partial(results, product))
        assert check(product, y).all()


# ---------------------------------------------------------------------------------------------------------------------
# Special values


@pytest.mark.parametrize("m", [2, 9])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_non_finite_x_changes_its_rows_only(isa, layout, kind, m, rng):
    """NaN spreads to all outputs of its row; Inf leaves none of them finite, be it as Inf or, at code 0, as NaN."""
    product = small_product(rng, layout, kind, m=m)
    clean, x = results(product)[0], ref.to_f32(product.x, product.stored)
    for value, place in itertools.product((NAN, INF, -INF), (0, x.shape[1] // 2, -1)):
        changed = x.copy()
        changed[1, place] = value
        y = results(Product(layout, changed, product.codes, *product.wide[2:], 64, 4, kind))[0]
        others = np.arange(m) != 1
        assert_same_bytes(y[others], clean[others])
        row = ref.to_f32(y[1], product.stored)
        assert np.isnan(row).all() if np.isnan(value) else not np.isfinite(row).any()


@pytest.mark.parametrize("m", [2, 9])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_non_finite_scales_and_biases_change_their_outputs_only(isa, layout, m, rng):
    product = small_product(rng, layout, m=m, n=9)
    clean = results(product)[0]
    for value, which in itertools.product((NAN, INF, -INF), ("scales", "biases")):
        x, codes, scales, biases = product.wide
        {"scales": scales, "biases": biases}[which][3, 1] = value
        y = results(Product(layout, x, codes, scales, biases, 64, 4))[0]
        hit = np.arange(y.shape[1]) == 3 if layout == "t" else np.arange(y.shape[1]) // 64 == 1
        assert_same_bytes(y[:, ~hit], clean[:, ~hit])
        assert not np.isfinite(y[:, hit]).any()


@pytest.mark.parametrize("m", [0, 1, 3, 9])
def test_empty_sums_are_zero(isa, m):
    """No inputs: zeros; no rows or no outputs: nothing."""
    for layout, functions in exact.FUNCTIONS.items():
        for n, k in ((64, 0), (0, 64)):
            rows, columns = (n, k) if layout == "t" else (k, n)
            scales, words = np.ones((rows, columns // 64), np.float32), np.zeros((rows, columns // 8), np.uint32)
            for function in functions:
                x = np.ones((m, k), np.float32)
                y = function(x, words, scales, scales, group_size=64, bits=4, accumulate="float")
                assert_same_bytes(y, np.zeros((m, n), np.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Arrays


@pytest.mark.parametrize("m", [3, 9])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (3, 32), (8, 128)])
def test_strides_and_alignment(isa, layout, kind, bits, group_size, m, rng):
    product = small_product(rng, layout, kind, group_size, bits, m=m)
    names = {"x": product.x, "w": product.words, "scales": product.scales, "biases": product.biases}
    expected = results(product)[0]
    check(product, expected)
    for name, array in names.items():
        for view in views_of(array):
            assert_same_bytes(results(product, **{name: view})[0], expected)
    for all_of_them in zip(*(views_of(array) for array in names.values()), strict=True):
        assert_same_bytes(results(product, **dict(zip(names, all_of_them, strict=True)))[0], expected)
    for out in views_of(expected):
        out[...] = 0
        for y in results(product, out=out):
            assert y is out
            assert_same_bytes(y, expected)


@pytest.mark.parametrize("m", [2, 9])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("x_batch", "w_batch"), [((), (3,)), ((3,), ()), ((2, 1), (3,)), ((2, 1, 3), (2, 2, 1))])
def test_batch_dimensions_broadcast(isa, layout, x_batch, w_batch, m, rng):
    """Each place of the batch is within the bound of its own product."""
    x, _, _, _ = exact.batch_of_products(rng, layout, x_batch, m=m)
    _, words, scales, biases = exact.batch_of_products(rng, layout, w_batch, m=m)
    batch = np.broadcast_shapes(x_batch, w_batch)
    wide = [np.broadcast_to(a, batch + a.shape[-2:]) for a in (x, words, scales, biases)]
    for function in exact.FUNCTIONS[layout]:
        y = function(x, words, scales, biases, group_size=32, accumulate="float")
        assert y.shape[: len(batch)] == batch
        for i in np.ndindex(*batch):
            codes = ref.unpack(wide[1][i], 4, words.shape[-1] * 8)
            assert check(Product(layout, wide[0][i], codes, wide[2][i], wide[3][i], 32, 4), y[i]).all()


def test_int8_activations_have_no_float_class(rng):
    product = small_product(rng, "t")
    with pytest.raises(ValueError, match="activations='int8' needs accumulate='exact', got 'float'"):
        results(product, activations="int8")
