"""MLX's functions over our kernels: signatures, values, types, batches and errors, beside MLX where it is right."""

import importlib
import inspect
import itertools
import re

import numpy as np
import pytest

import quantization as q
import quantization.mlx as qx
import reference as ref
import reference_fp
from mlx_cases import CASES, DEFAULTS, KINDS, MODES, PARAMETERS, as_kind, check, columns, integers, product, stored
from quantization import _mlx_rules as rules

F32 = np.float32
OURS = {"profile", "mx_scale"}  # what our functions take beyond MLX's

# The subjects of MLX's own python/tests/test_quantized.py, and the tests that take them up here; those with "gradient"
# or "derivative" in their names are in test_mlx_gradients.py.
SUBJECTS = {
    "quantize_dequantize": "test_quantize_is_mlx_byte_for_byte test_dequantize test_zeros_stay_zeros test_refused",
    "mxfp4_quantize_dequantize": "test_values_of_the_grid_survive test_zeros_stay_zeros test_refused",
    "mxfp8_quantize_dequantize": "test_mxfp8_keeps_three_bits test_zeros_stay_zeros test_refused",
    "nvfp4_quantize_dequantize": "test_values_of_the_grid_survive test_nvfp4_has_a_scale_for_each_16 test_global_scale",
    "qqmv": "test_qqmm test_qqmm_of_one_row_is_that_of_mlx",
    "qqmm": "test_qqmm test_shapes_of_x_in_qqmm test_type_of_qqmm_is_that_of_x",
    "qmm": "test_product test_product_is_that_of_mlx test_product_of_normal_numbers_keeps_the_bound "
    "test_product_of_normal_numbers_with_small_floats_keeps_the_bound",
    "qmm_large_dims": "test_more_than_32768_rows_of_x_or_w test_more_than_32768_columns",
    "qmm_non_transposed": "test_product test_product_is_that_of_mlx",
    "qmm_small_m_block": "test_every_number_of_rows",
    "qmm_shapes": "test_every_number_of_rows test_batches_broadcast test_batches_as_in_mlx",
    "qmm_vjp": "test_gradient_of_x test_gradients_are_those_of_mlx",
    "qmm_jvp": "test_derivative_along_x_is_the_product",
    "qmv": "test_product test_batches_broadcast",
    "fp_qmv": "test_product test_nvfp4_of_an_odd_number_of_groups test_batches_broadcast",
    "fp_qmv_large_output": "test_many_outputs",
    "qmv_wide": "test_every_number_of_rows test_numbers_of_outputs_that_no_block_divides",
    "qmv_small_non_multiples": "test_numbers_of_outputs_that_no_block_divides",
    "qvm": "test_vectors_by_untransposed_weights test_vectors",
    "qvm_splitk": "test_vectors_by_untransposed_weights",
    "qvm_splitk_multi_row": "test_vectors_by_untransposed_weights",
    "fp_qvm": "test_vectors_by_untransposed_weights",
    "mode_error_cases": "test_refused test_refused_like_mlx",
    "throw": "test_refused test_refused_like_mlx",
    "small_matrix": "test_numbers_of_outputs_that_no_block_divides test_batches_broadcast",
    "non_multiples": "test_numbers_of_outputs_that_no_block_divides test_batches_broadcast",
    "gather_qmm": "test_gather test_gather_is_that_of_mlx test_gather_without_indices_is_a_product",
    "gather_qqmm": "test_gather_qqmm test_gather_qqmm_of_floats",
    "gather_qmm_matrix_path": "test_gather_of_matrices_that_no_tile_divides",
    "gather_qmm_sorted": "test_sorted_experts",
    "gather_qmm_sorted_sliced_weight": "test_gather_from_slices",
    "gather_matmul_grad": "test_gradients_of_gathered_products test_gradients_of_gathered_products_are_those_of_mlx",
    "gather_qmm_grad": "test_gradient_of_gathered_x test_gradients_of_gathered_products",
    "vjp_scales_biases": "test_gradients test_gradients_are_differences_of_products",
    "fp_vjp_scales_throws": "test_small_floats_have_no_gradient_of_scales",
    "qmm_fp_type": "test_type_of_products_with_small_floats_is_that_of_x",
    "quantize_strided": "test_strided_and_repeated_parts",
}

SIGNATURES = {
    "quantize": "(w, /, group_size=None, bits=None, mode='affine', *, global_scale=None)",
    "dequantize": "(w, /, scales, biases=None, group_size=None, bits=None, mode='affine', global_scale=None, "
    "dtype=None)",
    "quantized_matmul": "(x, w, /, scales, biases=None, transpose=True, group_size=None, bits=None, mode='affine')",
    "gather_qmm": "(x, w, /, scales, biases=None, lhs_indices=None, rhs_indices=None, transpose=True, "
    "group_size=None, bits=None, mode='affine', global_scale=None, *, sorted_indices=False)",
    "qqmm": "(x, w, scales=None, group_size=None, bits=None, mode='nvfp4', global_scale_x=None, global_scale_w=None)",
    "gather_qqmm": "(x, w, /, scales=None, lhs_indices=None, rhs_indices=None, group_size=None, bits=None, "
    "mode='nvfp4', global_scale_x=None, global_scale_w=None, *, sorted_indices=False)",
    "to_fp8": "(x)",
    "from_fp8": "(x, dtype='bfloat16')",
}


@pytest.fixture
def mx():
    return pytest.importorskip("mlx.core")


def to_mlx(mx, array):
    """An array of MLX's; bfloat16 crosses as bits."""
    if array.dtype.name == "bfloat16":
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def from_mlx(mx, array):
    """A NumPy array, where bfloat16 is its bits."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def bits_of(array):
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_subject_of_the_tests_of_mlx_has_its_own_here(subject):
    there = {**globals(), **vars(importlib.import_module("test_mlx_gradients"))}
    assert all(callable(there[name]) for name in SUBJECTS[subject].split())
    assert len(SUBJECTS) == 37


# ---------------------------------------------------------------------------------------------------------------------
# Signatures


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    found = inspect.signature(getattr(qx, name))
    theirs = [p.replace(annotation=p.empty) for p in found.parameters.values() if p.name not in OURS]
    assert str(inspect.Signature(theirs)) == SIGNATURES[name]
    for own in OURS & set(found.parameters):
        assert found.parameters[own].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_that_of_the_installed_mlx(name, mx):
    line = getattr(mx, name).__doc__.strip().splitlines()[0]
    text = re.search(r"\((.*)\) ->", line).group(1)
    text = re.sub(r"(, \*)?, stream: StreamOrDevice = None$", "", text)  # before it, a `*` of its own
    text = re.sub(r": [\w |]+? = ", "=", text)
    text = re.sub(r": [\w |]+", "", text).replace("=bfloat16", "='bfloat16'")
    assert f"({text})" == SIGNATURES[name]


# ---------------------------------------------------------------------------------------------------------------------
# quantize and dequantize


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("mode", "group_size", "bits"), PARAMETERS)
def test_quantize_is_mlx_byte_for_byte(rng, mx, mode, group_size, bits, kind):
    w = as_kind(rng.standard_normal((2, 6, 256)), kind)
    theirs = mx.quantize(to_mlx(mx, w), group_size, bits, mode)
    ours = qx.quantize(w, group_size, bits, mode, profile="cpu")
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert np.array_equal(bits_of(mine), bits_of(from_mlx(mx, other)))
    y = qx.dequantize(*ours, group_size=group_size, bits=bits, mode=mode, dtype=kind, profile="cpu")
    other = mx.dequantize(*theirs, group_size=group_size, bits=bits, mode=mode, dtype=getattr(mx, kind))
    assert np.array_equal(bits_of(y), bits_of(from_mlx(mx, other)))


def test_defaults_of_quantize(rng):
    w = rng.standard_normal((4, 128)).astype(F32)
    for ours, native in zip(qx.quantize(w), q.affine_quantize(w, 64, 4), strict=True):
        assert np.array_equal(ours, native)
    assert [part.shape for part in qx.quantize(w, mode="mxfp4")] == [(4, 16), (4, 4)]
    assert [part.shape for part in qx.quantize(w, mode="mxfp8")] == [(4, 32), (4, 4)]
    assert [part.shape for part in qx.quantize(w, mode="nvfp4")] == [(4, 16), (4, 8)]


@pytest.mark.parametrize(("mode", "group_size", "bits"), PARAMETERS)
def test_zeros_stay_zeros(mode, group_size, bits):
    parts = qx.quantize(np.zeros((3, 256), F32), group_size, bits, mode)
    y = qx.dequantize(*parts, group_size=group_size, bits=bits, mode=mode, dtype="float32")
    assert y.shape == (3, 256) and not y.any()


@pytest.mark.parametrize(("mode", "group_size", "bits"), PARAMETERS)
def test_dequantize(rng, mode, group_size, bits):
    case = stored(rng, (2, 3, 256), mode, group_size, bits)
    check(qx.dequantize(*case.parts, **case.options, dtype="float32"), case.values)
    check(qx.dequantize(*case.parts, **case.options, dtype=np.float16), case.values, "float16")


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_small_floats_become_bfloat16_by_default(rng, mode):
    pytest.importorskip("ml_dtypes")
    case = stored(rng, (3, 64), *next(case for case in CASES if case[0] == mode))
    check(qx.dequantize(*case.parts, mode=mode), case.values, "bfloat16")


def test_bfloat16_without_ml_dtypes_names_the_extra(rng, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ml_dtypes", None)
    case = stored(rng, (3, 64), "mxfp4", 32, 4)
    with pytest.raises(ImportError, match=r"ml_dtypes.*\[io\]"):
        qx.dequantize(*case.parts, mode="mxfp4")


def test_dequantize_of_mixed_scales_is_float32(rng):
    case = stored(rng, (3, 64))
    w, scales, biases = case.parts
    check(qx.dequantize(w, scales.astype(np.float16), biases), case.values)
    check(qx.dequantize(w, scales.astype(np.float16), biases.astype(np.float16)), case.values, "float16")


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4"])
def test_values_of_the_grid_survive(rng, mode):
    """With a 6 in every group its scale is 1, and every E2M1 value is one of the grid."""
    size = reference_fp.GROUP_SIZES[mode]
    w = rng.choice(np.concatenate([reference_fp.FP4, -reference_fp.FP4]), (64, size)).astype(F32)
    w[:, 0] = 6
    parts = qx.quantize(w, mode=mode)
    assert np.array_equal(qx.dequantize(*parts, mode=mode, dtype="float32"), w)


def test_mxfp8_keeps_three_bits(rng):
    """The scale is at least amax / 448 and less than twice that, so nothing saturates; E4M3 rounds to nearest, by half
    of 2^-3 of a normal value at most, and by half of 2^-9 below: of the scale, which is below amax / 224."""
    w = rng.uniform(-1, 1, (64, 32)).astype(F32)
    y = qx.dequantize(*qx.quantize(w, mode="mxfp8"), mode="mxfp8", dtype="float32").astype(np.float64)
    most = np.abs(w).max(axis=1, keepdims=True)
    assert (np.abs(y - w) <= np.abs(w) / 16 + most / 224 * 2.0**-10).all()


def test_nvfp4_has_a_scale_for_each_16():
    w = np.zeros((64, 16), F32)
    w[::2], w[1::2] = 6 * 2.0**-9, 6
    assert np.array_equal(qx.dequantize(*qx.quantize(w, mode="nvfp4"), mode="nvfp4", dtype="float32"), w)


@pytest.mark.parametrize("form", [np.float32, lambda g: np.full((1,), g, F32), float])
def test_global_scale(rng, form):
    w = rng.standard_normal((8, 64)).astype(F32)
    largest = form(2.0 ** np.ceil(np.log2(np.abs(w).max())))
    scales = qx.quantize(w, mode="nvfp4", global_scale=largest)
    codes, stored_scales = reference_fp.quantize(w, "float32", "nvfp4", "metal", global_scale=np.max(largest))
    assert np.array_equal(scales[0], ref.pack(codes, 4)) and np.array_equal(scales[1], stored_scales)
    expected = reference_fp.dequantize(codes, stored_scales, "nvfp4", "float16", "metal", np.max(largest))
    y = qx.dequantize(*scales, mode="nvfp4", global_scale=largest, dtype="float16")
    assert y.dtype == np.float16 and np.array_equal(y.astype(F32), expected)


@pytest.mark.parametrize("name", ["up", "nearest", "floor"])
def test_mx_scale(rng, name):
    w = rng.standard_normal((8, 64)).astype(F32)
    for ours, native in zip(
        qx.quantize(w, mode="mxfp8", mx_scale=name), q.mxfp8_quantize(w, mx_scale=name), strict=True
    ):
        assert np.array_equal(ours, native)


# ---------------------------------------------------------------------------------------------------------------------
# quantized_matmul


def operands(rng, m, n, k, mode, group_size, bits, transpose, kind="float32"):
    """X [m, K] and W with about n and k: the axis along the groups becomes a multiple of them."""
    if transpose:
        k = columns(group_size, k)
    else:
        n = columns(group_size, n)
    x = integers(rng, (m, k), kind)
    return x, stored(rng, (n, k) if transpose else (k, n), mode, group_size, bits, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize(("mode", "group_size", "bits"), PARAMETERS)
def test_product(rng, mode, group_size, bits, transpose, kind):
    for m in (1, 2, 5, 33):
        x, w = operands(rng, m, 40, 160, mode, group_size, bits, transpose, kind)
        y = qx.quantized_matmul(x, *w.parts, transpose=transpose, **w.options)
        check(y, product(x, w.values, transpose), kind)


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize(("mode", "group_size", "bits"), PARAMETERS)
def test_product_is_that_of_mlx(rng, mx, mode, group_size, bits, transpose):
    x, w = operands(rng, 3, 40, 160, mode, group_size, bits, transpose)
    theirs = mx.quantized_matmul(to_mlx(mx, x), *(to_mlx(mx, p) for p in w.parts), transpose=transpose, **w.options)
    check(qx.quantized_matmul(x, *w.parts, transpose=transpose, **w.options), np.array(theirs))


@pytest.mark.parametrize(("group_size", "bits"), [(64, 4), (32, 8), (128, 3)])
@pytest.mark.parametrize("transpose", [True, False])
def test_product_of_normal_numbers_keeps_the_bound(rng, group_size, bits, transpose):
    w = rng.standard_normal((48, 256) if transpose else (256, 128)).astype(F32)
    x = rng.standard_normal((5, 256)).astype(F32)
    words, scales, biases = qx.quantize(w, group_size, bits)
    y = qx.quantized_matmul(x, words, scales, biases, transpose, group_size, bits)
    weights = (ref.unpack(words, bits, w.shape[1]), scales, biases)
    bound = (ref.bound_t if transpose else ref.bound_n)(x, *weights, group_size, bits, 3)
    assert (np.abs(y - ref.exact64(x, *weights, group_size, transpose)) <= bound).all()


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("transpose", [True, False])
def test_product_of_normal_numbers_with_small_floats_keeps_the_bound(rng, mode, transpose):
    w = rng.standard_normal((24, 256) if transpose else (256, 64)).astype(F32)
    x = rng.standard_normal((5, 256)).astype(F32)
    words, scales = qx.quantize(w, mode=mode)
    weights = (ref.unpack(words, reference_fp.BITS[mode], w.shape[1]), scales, mode, transpose)
    y = qx.quantized_matmul(x, words, scales, transpose=transpose, mode=mode)
    assert (np.abs(y - reference_fp.exact(x, *weights)) <= reference_fp.bound(x, *weights, 3)).all()


@pytest.mark.parametrize(("m", "n"), [(2**15 + 1, 4), (1, 2**15 + 1)])
def test_more_than_32768_rows_of_x_or_w(rng, m, n):
    x, w = operands(rng, m, n, 32, "affine", 32, 4, True)
    check(qx.quantized_matmul(x, *w.parts, **w.options), product(x, w.values))


def test_more_than_32768_columns(rng):
    x, w = operands(rng, 2, 2**15 + 32, 5, "affine", 32, 4, False)
    check(qx.quantized_matmul(x, *w.parts, transpose=False, **w.options), product(x, w.values, False))


@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
def test_every_number_of_rows(rng, mode, group_size, bits):
    x, w = operands(rng, 129, 16, 64, mode, group_size, bits, True)
    exact = product(x, w.values)
    for m in range(130):
        check(qx.quantized_matmul(x[:m], *w.parts, **w.options), exact[:m])


@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
@pytest.mark.parametrize("n", [1, 3, 5, 7, 8, 33, 67, 99])
def test_numbers_of_outputs_that_no_block_divides(rng, mode, group_size, bits, n):
    for m in (1, 4):
        x, w = operands(rng, m, n, 96, mode, group_size, bits, True)
        check(qx.quantized_matmul(x, *w.parts, **w.options), product(x, w.values))


@pytest.mark.parametrize("transpose", [True, False])
def test_nvfp4_of_an_odd_number_of_groups(rng, transpose):
    x = integers(rng, (2, 48))
    w = stored(rng, (7, 48) if transpose else (48, 48), "nvfp4", 16, 4)
    y = qx.quantized_matmul(x, *w.parts, transpose=transpose, mode="nvfp4")
    check(y, product(x, w.values, transpose))


@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
def test_many_outputs(rng, mode, group_size, bits):
    x, w = operands(rng, 1, 4100, 64, mode, group_size, bits, True)
    check(qx.quantized_matmul(x, *w.parts, **w.options), product(x, w.values))


@pytest.mark.parametrize("k", [1, 67, 1024, 2176, 16384])
@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
def test_vectors_by_untransposed_weights(rng, mode, group_size, bits, k):
    if bits == 8:
        k = min(k, 2176)  # where sums are still exact
    x, w = operands(rng, 3, 64, k, mode, group_size, bits, False)
    for rows in (x[0], x[:1], x):
        y = qx.quantized_matmul(rows, *w.parts, transpose=False, **w.options)
        check(y, product(rows, w.values, False))


# Shapes of batches of x and of W. MLX takes W[0] alone where x has no batch.
BATCHES = [
    ((2,), ()),
    ((2, 3), ()),
    ((3,), (3,)),
    ((3,), (1,)),
    ((1,), (3,)),
    ((2, 3), (3,)),
    ((2, 1), (2, 3)),
    ((), (3,)),
    ((), (2, 3)),
    ((0,), (1,)),
]


@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
@pytest.mark.parametrize(("batch_x", "batch_w"), BATCHES)
def test_batches_broadcast(rng, mode, group_size, bits, batch_x, batch_w):
    w = stored(rng, (*batch_w, 64, 64), mode, group_size, bits)
    for m, transpose in itertools.product((1, 5), (True, False)):
        x = integers(rng, (*batch_x, m, 64))
        y = qx.quantized_matmul(x, *w.parts, transpose=transpose, **w.options)
        check(y, product(x, w.values, transpose))


@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_vectors(rng, mode, group_size, bits, batch):
    x = integers(rng, (64,))
    w = stored(rng, (*batch, 10, 64), mode, group_size, bits)
    check(qx.quantized_matmul(x, *w.parts, **w.options), product(x, w.values))


@pytest.mark.parametrize("batch_x", [(3,), (2, 3)])
@pytest.mark.parametrize("batch_w", [(), (1,), (3,)])
def test_batches_as_in_mlx(rng, mx, batch_x, batch_w):
    w = stored(rng, (*batch_w, 32, 64))
    x = integers(rng, (*batch_x, 4, 64))
    theirs = mx.quantized_matmul(to_mlx(mx, x), *(to_mlx(mx, part) for part in w.parts))
    check(qx.quantized_matmul(x, *w.parts), np.array(theirs))


@pytest.mark.parametrize("kinds", list(itertools.product(KINDS, KINDS, KINDS)))
def test_types_promote_to_float32_where_they_differ(rng, kinds):
    x = integers(rng, (2, 64), kinds[0])
    w, scales, biases = stored(rng, (8, 64)).parts
    scales, biases = as_kind(scales, kinds[1]), as_kind(biases, kinds[2])
    y = qx.quantized_matmul(x, w, scales, biases)
    assert y.dtype == (as_kind(0, kinds[0]).dtype if len(set(kinds)) == 1 else F32)
    mx = pytest.importorskip("mlx.core")
    theirs = mx.quantized_matmul(*(to_mlx(mx, array) for array in (x, w, scales, biases)))
    assert str(theirs.dtype) == f"mlx.core.{y.dtype.name}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("transpose", [True, False])
def test_type_of_products_with_small_floats_is_that_of_x(rng, mode, transpose, kind):
    x = integers(rng, (3, 64), kind)
    w = stored(rng, (64, 64), *next(case for case in CASES if case[0] == mode))
    check(qx.quantized_matmul(x, *w.parts, transpose=transpose, mode=mode), product(x, w.values, transpose), kind)


@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
def test_float64_is_computed_as_float32(rng, mode, group_size, bits):
    x, w = operands(rng, 2, 8, 64, mode, group_size, bits, True)
    check(qx.quantized_matmul(x.astype(np.float64), *w.parts, **w.options), product(x, w.values))


@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
def test_strided_and_repeated_parts(rng, mode, group_size, bits):
    """Weights that share one row of scales by a stride of 0, and slices of larger arrays."""
    w = stored(rng, (6, 128), mode, group_size, bits)
    repeated = tuple(np.broadcast_to(part[:1], part.shape) for part in w.parts)
    x = integers(rng, (3, 2, 128))[:, 1]
    exact = np.broadcast_to(product(x, w.values[:1]), (3, 6))
    check(qx.quantized_matmul(x, *repeated, **w.options), exact)
    check(qx.dequantize(*repeated, **w.options, dtype="float32"), np.broadcast_to(w.values[:1], (6, 128)))
    check(qx.quantized_matmul(x, *(part[::-2] for part in w.parts), **w.options), product(x, w.values[::-2]))


def test_products_never_dequantize(rng, monkeypatch):
    for mode in {case[0] for case in CASES}:
        monkeypatch.setattr(q, f"{mode}_dequantize", None)
    for case in DEFAULTS:
        x, w = operands(rng, 4, 64, 64, *case, True)
        qx.quantized_matmul(x, *w.parts, **w.options)
        qx.gather_qmm(x, *w.parts, rhs_indices=np.array([0]), **w.options)


# ---------------------------------------------------------------------------------------------------------------------
# gather_qmm


def gathered(x, values, lhs, rhs, transpose=True):
    """Products of pairs of matrices in float64; an index that is None names all of a batch."""
    lhs = np.arange(int(np.prod(x.shape[:-2]))).reshape(x.shape[:-2]) if lhs is None else lhs
    rhs = np.arange(int(np.prod(values.shape[:-2]))).reshape(values.shape[:-2]) if rhs is None else rhs
    lhs, rhs = np.broadcast_arrays(lhs, rhs)
    matrices = x.reshape(-1, *x.shape[-2:])[lhs], values.reshape(-1, *values.shape[-2:])[rhs]
    return product(*matrices, transpose)


INDICES = {
    "rhs": ((), None, [1, 0, 2, 2]),
    "lhs": ((4,), [3, 0, 1], None),
    "both": ((4,), [3, 0], [1, 1]),
    "broadcast": ((4,), [[3], [0]], [1, 2, 0]),
    "scalar": ((4,), 2, [1, 2]),
    "batch of x against rows of rhs": ((2, 1), None, [0, 1, 2]),
    "two axes": ((2, 2), [[0, 3]], [[1, 2], [0, 0]]),
    "one product": ((4,), 1, 2),
    "none at all": ((4,), [], []),
}


@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("name", INDICES)
def test_gather(rng, mode, group_size, bits, transpose, name):
    batch, lhs, rhs = INDICES[name]
    lhs, rhs = (None if i is None else np.array(i, np.uint32) for i in (lhs, rhs))
    w = stored(rng, (3, 64, 64), mode, group_size, bits)
    for m in (1, 7):
        x = integers(rng, (*batch, m, 64))
        y = qx.gather_qmm(x, *w.parts, lhs_indices=lhs, rhs_indices=rhs, transpose=transpose, **w.options)
        check(y, gathered(x, w.values, lhs, rhs, transpose))


@pytest.mark.parametrize("name", INDICES)
def test_gather_is_that_of_mlx(rng, mx, name):
    batch, lhs, rhs = INDICES[name]
    w, x = stored(rng, (3, 32, 64)), integers(rng, (*batch, 3, 64))
    indices = {"lhs_indices": lhs, "rhs_indices": rhs}
    theirs = mx.gather_qmm(
        to_mlx(mx, x),
        *(to_mlx(mx, part) for part in w.parts),
        **{key: None if i is None else mx.array(i, mx.uint32) for key, i in indices.items()},
    )
    ours = qx.gather_qmm(
        x, *w.parts, **{key: None if i is None else np.array(i, np.int64) for key, i in indices.items()}
    )
    check(ours, np.array(theirs))


@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
def test_gather_without_indices_is_a_product(rng, mode, group_size, bits):
    w, x = stored(rng, (3, 10, 64), mode, group_size, bits), integers(rng, (2, 1, 5, 64))
    check(qx.gather_qmm(x, *w.parts, **w.options), product(x, w.values))


@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
@pytest.mark.parametrize("transpose", [True, False])
def test_gather_of_matrices_that_no_tile_divides(rng, mode, group_size, bits, transpose):
    w = stored(rng, (2, 555, 544), mode, min(group_size, 32), bits)
    x = integers(rng, (1, 33, 544 if transpose else 555))
    rhs = np.array([1, 0])
    check(
        qx.gather_qmm(x, *w.parts, rhs_indices=rhs, transpose=transpose, **w.options),
        gathered(x, w.values, None, rhs, transpose),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
def test_sorted_experts(rng, mode, group_size, bits, kind):
    """Tokens sorted by expert, as layers of experts do it; the hint may also be wrong."""
    w = stored(rng, (8, 40, 64), mode, group_size, bits, kind)
    x = integers(rng, (50, 1, 64), kind)
    experts = np.sort(rng.integers(0, 8, 50))
    for rhs in (experts, rng.permutation(experts)):
        y = qx.gather_qmm(x, *w.parts, rhs_indices=rhs, sorted_indices=True, **w.options)
        check(y, gathered(x, w.values, None, rhs), kind)


@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
def test_gather_from_slices(rng, mode, group_size, bits):
    w = stored(rng, (6, 80, 64), mode, group_size, bits)
    part = w[1::2, 8:48]
    x = integers(rng, (20, 1, 128))[..., ::2]
    rhs = np.sort(rng.integers(0, 3, 20))
    check(
        qx.gather_qmm(x, *part.parts, rhs_indices=rhs, sorted_indices=True, **w.options),
        gathered(x, part.values, None, rhs),
    )


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint64", "uint8", "int16"])
def test_types_of_indices(rng, dtype):
    w, x = stored(rng, (3, 8, 64)), integers(rng, (2, 1, 64))
    rhs = np.array([2, 0], dtype)
    check(qx.gather_qmm(x, *w.parts, rhs_indices=rhs), gathered(x, w.values, None, rhs))


@pytest.mark.parametrize("index", [3, -1, 2**32])
@pytest.mark.parametrize("side", ["lhs_indices", "rhs_indices"])
def test_indices_out_of_range(rng, side, index):
    w, x = stored(rng, (3, 8, 64)), integers(rng, (3, 1, 64))
    with pytest.raises(IndexError):
        qx.gather_qmm(x, *w.parts, **{side: np.array([0, index, 0])})


def test_gather_with_global_scales(rng):
    """Powers of two times 2688, so that the products stay exact."""
    w, x = stored(rng, (3, 8, 64), "nvfp4", 16, 4), integers(rng, (2, 4, 64), "float16")
    largest = np.array([1344, 2688, 5376], F32)
    rhs, factors = np.array([[2], [0]]), np.array([2.0, 0.5])[:, None, None, None]
    y = qx.gather_qmm(x, *w.parts, rhs_indices=rhs, mode="nvfp4", global_scale=largest)
    check(y, gathered(x, w.values, None, rhs) * factors, "float16")
    y = qx.gather_qmm(x[:, None], *w.parts, lhs_indices=np.array([1, 1, 0]), mode="nvfp4", global_scale=largest)
    check(
        y, gathered(x[:, None], w.values, np.array([1, 1, 0]), None) * np.array([0.5, 1, 2])[:, None, None], "float16"
    )


# ---------------------------------------------------------------------------------------------------------------------
# qqmm and gather_qqmm


def product_of_rounded(x, w, mode, global_scales=(None, None), profile="metal"):
    """x @ W.T in float64 for what `quantize` makes of both, and how far a float32 result may be from it.

    `reference_fp.bound` is that of the product without global scales. Their product and its own with the result are two
    more roundings of 2^-24 of the result.
    """
    stored = [
        reference_fp.quantize(a, "float32", mode, profile, global_scale=g)
        for a, g in zip((x, w), global_scales, strict=True)
    ]
    x_hat = reference_fp.dequantize(*stored[0], mode, "float32", "metal")
    exact = reference_fp.exact(x_hat, *stored[1], mode, True)
    bound = reference_fp.bound(x_hat, *stored[1], mode, True, 3)
    if global_scales[0] is None:
        return exact, bound
    factor = float(F32(global_scales[0]) / F32(2688)) * float(F32(global_scales[1]) / F32(2688))
    return exact * factor, (bound + 2.01 * 2.0**-24 * (np.abs(exact) + bound)) * factor


@pytest.mark.parametrize(
    ("mode", "has_global_scales"), [("nvfp4", False), ("nvfp4", True), ("mxfp8", False), ("mxfp4", False)]
)
@pytest.mark.parametrize("m", [1, 2, 8, 33])
@pytest.mark.parametrize("n", [5, 67])
def test_qqmm(rng, mode, m, n, has_global_scales):
    x, w = rng.standard_normal((m, 128)).astype(F32), rng.standard_normal((n, 128)).astype(F32)
    scales = [np.abs(a).max() if has_global_scales else None for a in (x, w)]
    keywords = {"mode": mode, "global_scale_x": scales[0], "global_scale_w": scales[1]}
    exact, bound = product_of_rounded(x, w, mode, scales)
    stored_w = qx.quantize(w, mode=mode, global_scale=scales[1])
    for y in (qx.qqmm(x, *stored_w, **keywords), qx.qqmm(x, w, **keywords)):
        assert y.dtype == F32 and y.shape == (m, n)
        assert (np.abs(y - exact) <= bound).all()


@pytest.mark.parametrize("mode", ["nvfp4", "mxfp8"])
def test_qqmm_of_one_row_is_that_of_mlx(rng, mx, mode):
    """MLX sums 256 float32 products: each goes through at most 1 + 256 roundings of 2^-24, so that the result is off by
    1.01 * 257 * 2^-24 of the sum of magnitudes at most."""
    x, w = rng.standard_normal((1, 256)).astype(F32), rng.standard_normal((67, 256)).astype(F32)
    parts = qx.quantize(w, mode=mode, profile="cpu")
    theirs = np.array(mx.qqmm(to_mlx(mx, x), *(to_mlx(mx, part) for part in parts), mode=mode))
    _, bound = product_of_rounded(x, w, mode, profile="cpu")
    rounded = [qx.dequantize(*qx.quantize(a, mode=mode, profile="cpu"), mode=mode, dtype="float32") for a in (x, w)]
    bound += 1.01 * 257 * 2.0**-24 * (np.abs(rounded[0]) @ np.abs(rounded[1]).T)
    assert (np.abs(qx.qqmm(x, *parts, mode=mode, profile="cpu") - theirs) <= bound).all()


@pytest.mark.parametrize("kind", KINDS)
def test_type_of_qqmm_is_that_of_x(rng, kind):
    """Integers up to 4 beside a 6 are E2M1 values with scale 1, so that x is its own round trip."""
    x = rng.choice([-4, -3, -2, -1, 0, 1, 2, 3, 4], (3, 64))
    x[:, ::16] = 6
    w = stored(rng, (5, 64), "nvfp4", 16, 4)
    check(qx.qqmm(as_kind(x, kind), *w.parts), product(x, w.values), kind)


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64)])
def test_shapes_of_x_in_qqmm(rng, shape):
    x = np.full(shape, 6, F32)
    w = stored(rng, (5, 64), "nvfp4", 16, 4)
    check(qx.qqmm(x, *w.parts), product(x, w.values))


def test_gather_qqmm(rng):
    x = np.where(np.arange(64) % 16 == 0, 6.0, rng.integers(-4, 5, (4, 3, 64))).astype(F32)
    w = stored(rng, (3, 8, 64), "nvfp4", 16, 4)
    for lhs, rhs in (([3, 0], [1, 1]), (None, [0, 1, 2, 2]), ([1, 2, 3], None)):
        lhs, rhs = (None if i is None else np.array(i) for i in (lhs, rhs))
        exact = gathered(x, w.values, lhs, rhs)
        check(qx.gather_qqmm(x, *w.parts, lhs, rhs), exact)
        y = qx.gather_qqmm(
            x, *w.parts, lhs_indices=lhs, rhs_indices=rhs, global_scale_x=F32(2688), global_scale_w=F32(1344)
        )
        check(y, exact / 2)
    check(qx.gather_qqmm(x[:3], *w.parts), product(x[:3], w.values))


@pytest.mark.parametrize("mode", ["nvfp4", "mxfp8", "mxfp4"])
def test_gather_qqmm_of_floats(rng, mode):
    x, w = rng.standard_normal((4, 3, 64)).astype(F32), rng.standard_normal((3, 8, 64)).astype(F32)
    y = qx.gather_qqmm(x, w, rhs_indices=np.array([2, 0, 1, 1]), mode=mode)
    for i, j in enumerate([2, 0, 1, 1]):
        exact, bound = product_of_rounded(x[i], w[j], mode)
        assert (np.abs(y[i] - exact) <= bound).all()


# ---------------------------------------------------------------------------------------------------------------------
# to_fp8 and from_fp8


@pytest.mark.parametrize("kind", KINDS)
def test_to_fp8(rng, kind):
    """Values, ties between neighbours and what lies beside them, and all that saturates."""
    exact = np.concatenate([reference_fp.FP8, (reference_fp.FP8[1:] + reference_fp.FP8[:-1]) / 2])
    x = np.concatenate([exact, exact * 1.01, rng.standard_normal(100) * 100, [449, 1e9, np.inf]])
    x = as_kind(np.concatenate([x, -x]), kind)
    wide = x.astype(F32)
    expected = reference_fp.nearest_even(wide, reference_fp.FP8, 128)
    assert np.array_equal(qx.to_fp8(x), expected)
    assert np.array_equal(qx.to_fp8(x.reshape(2, -1)[:, ::2]), expected.reshape(2, -1)[:, ::2])


def test_nan_saturates_in_fp8():
    assert list(qx.to_fp8(np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0, 0.0], F32))) in (
        [0x7E, 0xFE, 0x7E, 0xFE, 0x80, 0],
    )


@pytest.mark.parametrize("kind", KINDS)
def test_from_fp8(kind):
    codes, dtype = np.arange(256, dtype=np.uint8), as_kind(0, kind).dtype
    values = qx.from_fp8(codes.reshape(16, 16), kind)
    assert values.shape == (16, 16) and values.dtype == dtype
    assert np.array_equal(values.astype(F32).ravel(), reference_fp.decode_fp8(codes), equal_nan=True)


def test_fp8_is_that_of_mlx(rng, mx):
    x = np.concatenate([rng.standard_normal(1000) * 100, [0, -0.0, np.inf, -np.inf]]).astype(F32)
    assert np.array_equal(qx.to_fp8(x), np.array(mx.to_fp8(mx.array(x))))
    codes = np.arange(256, dtype=np.uint8)
    theirs = np.array(mx.from_fp8(mx.array(codes), mx.float32))
    assert np.array_equal(qx.from_fp8(codes, "float32"), theirs, equal_nan=True)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, and how


def material():
    """Arrays that bad calls are made of: weights of (32, 128) in every mode, a batch of 3, and what is of no use."""
    rng = np.random.default_rng(0)
    arrays = {"x": integers(rng, (3, 128)), "w": integers(rng, (32, 128)), "xx": integers(rng, (2, 5, 128))}
    for prefix, case in zip(("a", "m", "e", "n"), DEFAULTS, strict=True):
        for name, part in zip(("q", "s", "b"), stored(rng, (32, 128), *case).parts, strict=False):
            arrays[prefix + name] = part
    for name, part in zip(("bq", "bs", "bb"), stored(rng, (3, 32, 128)).parts, strict=True):
        arrays[name] = part
    arrays |= {f"{name}_i32": arrays[name].astype(np.int32) for name in ("x", "w", "aq", "as", "ms")}
    arrays |= {"ms_f32": arrays["ms"].astype(F32), "ab_i32": arrays["ab"].astype(np.int32), "x_c": arrays["x"] * 1j}
    arrays |= {"one": np.ones((), F32), "two": np.ones(2, F32), "half": np.ones((), np.float16)}
    arrays |= {"i2": np.array([0, 1], np.uint32), "i3": np.array([0, 1, 2], np.uint32), "zero": np.zeros((), F32)}
    arrays |= {"if": np.zeros(2, F32), "ib": np.zeros(2, bool)}
    return arrays


# Calls by the names of `material`, m being MLX or quantization.mlx; all of them must raise ValueError, in both.
BAD_VALUES = """
m.quantize(w[0])
m.quantize(one)
m.quantize(w_i32)
m.quantize(w, mode="fp4")
m.quantize(w, bits=7)
m.quantize(w, bits=0)
m.quantize(w, bits=-4)
m.quantize(w, group_size=16)
m.quantize(w[:, :100])
m.quantize(w, global_scale=one)
m.quantize(w, mode="mxfp4", global_scale=one)
m.quantize(w, mode="nvfp4", global_scale=half)
m.quantize(w, mode="nvfp4", global_scale=i2[0])
m.quantize(w, mode="nvfp4", global_scale=two)
m.quantize(w, mode="mxfp4", bits=3)
m.quantize(w, mode="mxfp4", group_size=64)
m.quantize(w, mode="mxfp8", bits=4)
m.quantize(w, mode="mxfp8", group_size=16)
m.quantize(w, mode="nvfp4", bits=8)
m.quantize(w, mode="nvfp4", group_size=32)
m.quantize(w[:, :24], mode="nvfp4")
m.dequantize(aq, as_)
m.dequantize(mq, ms, ms, mode="mxfp4")
m.dequantize(mq, ms_f32, mode="mxfp4")
m.dequantize(aq_i32, as_, ab)
m.dequantize(w, as_, ab)
m.dequantize(aq, as_i32, ab_i32)
m.dequantize(aq, as_, ab, dtype=m_int32)
m.dequantize(mq, ms, mode="mxfp4", dtype=m_int32)
m.dequantize(aq[0], as_[0], ab[0])
m.dequantize(aq, as_[:, :1], ab[:, :1])
m.dequantize(aq[:16], as_, ab)
m.dequantize(bq, as_, ab)
m.dequantize(aq, as_, ab, 32)
m.dequantize(aq, as_, ab, 64, 5)
m.dequantize(aq, as_, ab, mode="what")
m.dequantize(aq, as_, ab, global_scale=one)
m.dequantize(mq, ms, mode="mxfp4", global_scale=one)
m.dequantize(mq, ms, bits=3, mode="mxfp4")
m.dequantize(mq, ms, group_size=64, mode="mxfp4")
m.dequantize(eq, es, bits=4, mode="mxfp8")
m.dequantize(nq, ns, group_size=32, mode="nvfp4")
m.dequantize(nq, ns, mode="nvfp4", global_scale=half)
m.dequantize(nq, ns, mode="nvfp4", global_scale=two)
m.quantized_matmul(x, aq, as_)
m.quantized_matmul(x, mq, ms, as_, mode="mxfp4")
m.quantized_matmul(x, mq, ms_f32, mode="mxfp4")
m.quantized_matmul(x_i32, mq, ms, mode="mxfp4")
m.quantized_matmul(x_i32, aq, as_i32, ab_i32)
m.quantized_matmul(x_c, aq, as_, ab)
m.quantized_matmul(x, aq_i32, as_, ab)
m.quantized_matmul(x, aq[0], as_[0], ab[0])
m.quantized_matmul(x, aq.T, as_, ab)
m.quantized_matmul(x, aq.T, as_.T, ab)
m.quantized_matmul(x, aq.T, as_.T, ab.T)
m.quantized_matmul(x, aq, as_.T, ab.T)
m.quantized_matmul(x, aq, as_, ab.T)
m.quantized_matmul(x, aq, as_, ab[:, :1])
m.quantized_matmul(x, aq, as_, ab, False)
m.quantized_matmul(x[:, :64], aq, as_, ab)
m.quantized_matmul(x[:, :100], aq, as_, ab)
m.quantized_matmul(x, aq, as_, ab, bits=8)
m.quantized_matmul(x, aq, as_, ab, bits=7)
m.quantized_matmul(x, aq, as_, ab, group_size=32)
m.quantized_matmul(x, aq, as_, ab, mode="what")
m.quantized_matmul(x, nq, ns, mode="mxfp4")
m.quantized_matmul(x, nq, ns, mode="nvfp4", bits=8)
m.quantized_matmul(x, mq, ms, mode="mxfp4", group_size=16)
m.quantized_matmul(xx, bq, bs, bb)
m.quantized_matmul(x, bq, bs[:1], bb[:1])
m.quantized_matmul(x, bq, as_, ab)
m.gather_qmm(x, bq, bs, rhs_indices=i2)
m.gather_qmm(x, bq, bs, bb, rhs_indices=i2, mode="what")
m.gather_qmm(x, bq, bs, bb, rhs_indices=i2, bits=8)
m.gather_qmm(x, bq.astype(m_int32), bs, bb, rhs_indices=i2)
m.gather_qmm(x, bq, bs, bb[..., :1], rhs_indices=i2)
m.gather_qmm(x[:, :64], bq, bs, bb, rhs_indices=i2)
m.gather_qmm(x[0], bq, bs, bb, rhs_indices=i2)
m.gather_qmm(x, bq, bs, bb, rhs_indices=if_)
m.gather_qmm(x, bq, bs, bb, rhs_indices=ib)
m.gather_qmm(xx, bq, bs, bb, lhs_indices=if_)
m.gather_qmm(xx, bq, bs, bb, i2, i3)
m.gather_qmm(xx, bq, bs, bb, lhs_indices=i2)
m.gather_qmm(xx, bq, bs, bb)
m.gather_qmm(x, bq, bs, bb, rhs_indices=i2, global_scale=one)
m.gather_qmm(x, nq[None], ns[None], rhs_indices=i2, mode="nvfp4", global_scale=two)
m.gather_qmm(x, nq[None], ns[None], mode="nvfp4", global_scale=two[:1])
m.gather_qmm(x, nq[None], ns[None], rhs_indices=i2, mode="nvfp4", global_scale=half[None])
m.qqmm(x[:1], nq)
m.qqmm(x[:1], nq, ns, mode="what")
m.qqmm(x_i32[:1], nq, ns)
m.qqmm(x[:1], w_i32)
m.qqmm(x[:1], nq, ns, bits=8)
m.qqmm(x[:1], nq, ns, group_size=32)
m.qqmm(x[:1], nq, ns, global_scale_x=one)
m.qqmm(x[:1], nq, ns, global_scale_w=one)
m.qqmm(x[:1], eq, es, mode="mxfp8", global_scale_x=one, global_scale_w=one)
m.qqmm(x[:1], nq, ns, global_scale_x=half, global_scale_w=one)
m.qqmm(x[:1, :64], nq, ns)
m.qqmm(x[:1], nq[0], ns[0])
m.qqmm(x[:1], aq_i32, ns)
m.qqmm(xx[:, :1], nq[None], ns[None])
m.gather_qqmm(x[0], nq[None], ns[None], rhs_indices=i2)
m.gather_qqmm(x, nq[None], ns[None], rhs_indices=i2, mode="what")
m.gather_qqmm(x, nq[None], ns[None], rhs_indices=if_)
m.gather_qqmm(x[:, :64], nq[None], ns[None], rhs_indices=i2[:1])
m.to_fp8(x_i32)
m.to_fp8(ms)
m.to_fp8(x_c)
m.to_fp8(ib)
m.from_fp8(x)
m.from_fp8(x_i32)
m.from_fp8(ms, m_int32)
"""

# Those that raise TypeError in both.
BAD_TYPES = """
m.quantize(None)
m.quantize(w=w)
m.quantize(w, mode=None)
m.quantize(w, group_size=64.0)
m.quantize(w, bits="4")
m.quantize(w, 64, 4, "affine", None, None)
m.dequantize(aq)
m.dequantize(None, as_, ab)
m.dequantize(w=aq, scales=as_, biases=ab)
m.dequantize(aq, "scales", ab)
m.quantized_matmul(x=x, w=aq, scales=as_, biases=ab)
m.quantized_matmul(None, aq, as_, ab)
m.quantized_matmul(x, None, as_, ab)
m.quantized_matmul(x, aq, None, ab)
m.quantized_matmul(x, aq, as_, ab, global_scale=one)
m.quantized_matmul(x, aq, as_, ab, 1)
m.quantized_matmul(x, aq, as_, ab, None)
m.gather_qmm(x, bq, bs, bb, rhs_indices="0")
m.gather_qmm(x, bq, bs, bb, rhs_indices=i2, transpose=1)
m.gather_qmm(x, bq, bs, bb, rhs_indices=i2, sorted_indices=1)
m.gather_qqmm(x, nq[None], ns[None], rhs_indices=i2[:1], sorted_indices=0)
m.gather_qmm(x, bq, bs, bb, None, i2, True, 64, 4, "affine", None, True)
m.qqmm(None, nq, ns)
m.to_fp8(None)
m.from_fp8(ms, None)
"""


def named(arrays):
    return {name + "_" if name in ("as", "if") else name: array for name, array in arrays.items()}


def lines(calls):
    return [pytest.param(call, id=call.removeprefix("m.")) for call in calls.strip().splitlines()]


BAD_CALLS = [
    pytest.param(*call.values, error, id=call.id)
    for calls, error in ((BAD_VALUES, ValueError), (BAD_TYPES, TypeError))
    for call in lines(calls)
]


@pytest.mark.parametrize(("call", "error"), BAD_CALLS)
def test_refused(call, error):
    with pytest.raises(error) as caught:
        eval(call, {"m": qx, "m_int32": np.int32, **named(material())})
    assert type(caught.value) is error
    name = re.match(r"m\.(\w+)\(", call)[1]
    assert re.match(rf"{name}(: .{{15}}|\(\) )", str(caught.value))  # name() is how Python begins


@pytest.mark.parametrize(("call", "error"), BAD_CALLS)
def test_refused_like_mlx(call, error, mx):
    """Both fed MLX's arrays."""
    arrays = {name: to_mlx(mx, array) for name, array in named(material()).items()}
    for module in (mx, qx):
        with pytest.raises(error):
            eval(call, {"m": module, "m_int32": mx.int32, **arrays})


@pytest.mark.parametrize(
    "call",
    [
        "m.quantize(w, mx_scale='down')",
        "m.quantize(w, profile='gpu')",
        "m.quantize(w, group_size=0)",  # ends MLX's process
        "m.dequantize(aq, as_, ab, profile='gpu')",
        "m.dequantize(aq, as_, ab, dtype='float64')",
        "m.dequantize(aq, as_, ab[:, :1])",
        "m.dequantize(aq, as_, ab, 16, 16)",
        "m.quantized_matmul(one, aq, as_, ab)",
        "m.quantized_matmul(x, aq, as_, ab.astype('>f4'))",
        "m.quantized_matmul(x[:, :32], aq, as_, ab, True, 16, 16)",
        "m.qqmm(x, nq, ns, mode='affine')",
        "m.qqmm(x, w, mode='affine')",
        "m.qqmm(x, w, ns)",
        "m.qqmm(one, nq, ns)",
        "m.qqmm(x.astype(float), nq, ns)",
        "m.gather_qqmm(x, nq[None], ns[None], global_scale_x=one)",
        "m.gather_qqmm(x, aq[None], as_[None], mode='affine')",
    ],
)
def test_refused_where_mlx_goes_wrong_or_has_no_such_argument(call):
    name = re.match(r"m\.(\w+)\(", call)[1]
    with pytest.raises(ValueError, match=rf"^{name}: .{{15}}"):
        eval(call, {"m": qx, **named(material())})


def test_x_of_integers_is_refused_though_mlx_makes_floats_of_them(mx):
    """MLX asks for floats only after it has found the common type of x, scales and biases."""
    arrays = named(material())
    theirs = (to_mlx(mx, arrays[name]) for name in ("x_i32", "aq", "as_", "ab"))
    assert mx.quantized_matmul(*theirs).dtype == mx.float32
    with pytest.raises(ValueError, match=r"^quantized_matmul: x must have dtype float32, .* got int32$"):
        qx.quantized_matmul(*(arrays[name] for name in ("x_i32", "aq", "as_", "ab")))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            "m.dequantize(aq[:16], as_, ab)",
            "dequantize: w and scales must have at least 2 dimensions, all but the last",
        ),
        (
            "m.quantized_matmul(x, aq, as_, ab.T)",
            "quantized_matmul: biases must have the shape of scales, (32, 2), got",
        ),
        (
            "m.quantized_matmul(x, aq, as_, ab, bits=8)",
            "quantized_matmul: with group_size=64 and bits=8, scales for a w",
        ),
        (
            "m.quantize(w, mode='nvfp4', global_scale=two)",
            "quantize: global_scale must be a single number, got shape (2,)",
        ),
        (
            "m.quantized_matmul(x[:, :100], aq, as_, ab)",
            "quantized_matmul: x.shape[-1] must be 128, the input features",
        ),
        ("m.qqmm(x[:, :64], nq, ns)", "qqmm: x.shape[-1] must be 128, the input features of w, got shape (3, 64)"),
        (
            "m.gather_qmm(x, nq, ns, rhs_indices=i2, transpose=False, mode='nvfp4')",
            "gather_qmm: x.shape[-1] must be 32",
        ),
        ("m.quantize(w, bits=7)", "quantize: mode 'affine' has bits 1, 2, 3, 4, 5, 6, 8, got 7"),
        ("m.quantize(w, mode='what')", "quantize: mode must be one of 'affine', 'mxfp4', 'mxfp8', 'nvfp4', got 'what'"),
    ],
)
def test_messages_name_operation_argument_and_rule(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        eval(call, {"m": qx, **named(material())})


# ---------------------------------------------------------------------------------------------------------------------
# Arrays of other libraries


def test_lists_of_numbers_are_floats(rng):
    parts = qx.quantize([[1.0] * 64, [2.0] * 64])
    assert np.array_equal(qx.dequantize(*parts), [[1.0] * 64, [2.0] * 64])
    w = stored(rng, (3, 8, 64))
    check(qx.gather_qmm([[1.0] * 64], *w.parts, rhs_indices=[1]), gathered(np.ones((1, 64)), w.values, None, [1]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
def test_arrays_of_mlx(rng, mx, mode, group_size, bits, kind):
    x, w = operands(rng, 3, 8, 64, mode, group_size, bits, True, kind)
    y = qx.quantized_matmul(to_mlx(mx, x), *(to_mlx(mx, part) for part in w.parts), **w.options)
    check(y, product(x, w.values), kind)
    y = qx.dequantize(*(to_mlx(mx, part) for part in w.parts), **w.options, dtype=getattr(mx, kind))
    check(y, w.values, kind)


def to_torch(torch, array):
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
def test_tensors_of_torch(rng, mode, group_size, bits, kind):
    torch = pytest.importorskip("torch")
    x, w = operands(rng, 3, 8, 64, mode, group_size, bits, True, kind)
    y = qx.quantized_matmul(to_torch(torch, x), *(to_torch(torch, part) for part in w.parts), **w.options)
    check(y, product(x, w.values), kind)
    y = qx.dequantize(*(to_torch(torch, part) for part in w.parts), **w.options, dtype=getattr(torch, kind))
    check(y, w.values, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_read_in_place(rng, kind):
    torch = pytest.importorskip("torch")
    tensor = to_torch(torch, integers(rng, (2, 64), kind))
    assert rules.as_array("quantize", "w", tensor).ctypes.data == tensor.data_ptr()


def test_tensors_that_cannot_be_read():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="quantize: w must be an array in the CPU's memory"):
        qx.quantize(torch.ones((2, 64), device="meta"))
    with pytest.raises(TypeError, match="requires grad"):
        qx.quantize(torch.ones((2, 64), requires_grad=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
def test_arrays_of_jax(rng, mode, group_size, bits, kind):
    jnp = pytest.importorskip("jax.numpy")
    x, w = operands(rng, 3, 8, 64, mode, group_size, bits, True, kind)
    y = qx.quantized_matmul(jnp.asarray(x), *map(jnp.asarray, w.parts), **w.options)
    check(y, product(x, w.values), kind)
    check(qx.dequantize(*map(jnp.asarray, w.parts), **w.options, dtype=getattr(jnp, kind)), w.values, kind)


def test_what_offers_dlpack_alone(rng):
    class Tensor:
        def __init__(self, array):
            self.dtype, self._array = array.dtype, array

        def __dlpack__(self, **options):
            return self._array.__dlpack__(**options)

        def __dlpack_device__(self):
            return self._array.__dlpack_device__()

    x, w = operands(rng, 3, 8, 64, "affine", 64, 4, True)
    check(qx.quantized_matmul(Tensor(x), *map(Tensor, w.parts)), product(x, w.values))


@pytest.mark.parametrize("missing", [1, 31])
@pytest.mark.parametrize("transpose", [True, False])
def test_x_counts_the_padding(missing, transpose, rng):
    """Where the native functions take x without the padding of the last group, MLX refuses it."""
    x = rng.standard_normal((2, 64), dtype=np.float32)
    weights = qx.quantize(rng.standard_normal((64, 64), dtype=np.float32), group_size=32)
    stacked = [part[None] for part in weights]
    for call in (
        lambda: qx.quantized_matmul(x[:, missing:], *weights, transpose, 32),
        lambda: qx.gather_qmm(x[None, :, missing:], *stacked, rhs_indices=[0], transpose=transpose, group_size=32),
    ):
        with pytest.raises(ValueError, match=r"x.shape\[-1\] must be 64, the input features of w"):
            call()
