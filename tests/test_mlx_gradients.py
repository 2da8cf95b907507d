"""Gradients of products with stored weights: exact ones, bounds, differences of the products, and PyTorch."""

import inspect

import numpy as np
import pytest

import quantization.mlx as qx
from mlx_cases import CASES, KINDS, MODES, as_kind, check, columns, integers, product, ref_float64, stored

F32 = np.float32
ALL = ("x", "scales", "biases")
AFFINE = [pytest.param(size, bits, id=f"{bits}_g{size}") for mode, size, bits in CASES if mode == "affine"]


def codes_of(w):
    """Codes as float64: what the weights are with scales 1 and biases 0."""
    words, scales, _ = w.parts
    ones = np.ones(scales.shape, F32)
    options = {key: value for key, value in w.options.items() if key != "mode"}
    return qx.dequantize(words, ones, np.zeros_like(ones), **options).astype(np.float64)


def group_sums(array, scales):
    return array.reshape(*scales.shape, -1).sum(axis=-1)


def expected(cotangent, x, w, transpose, pairs):
    """Gradients in float64 by the definition, one product after the other.

    y[i] = x[l] @ W[r].T for the pairs (l, r), so that x[l] gets c[i] @ W[r], and W[r] gets D = c[i].T @ x[l], which
    scales take times their codes and biases as it is.
    """
    x, cotangent = ref_float64(x), ref_float64(cotangent)
    matrices, values = x.reshape(-1, *x.shape[-2:]), w.values.reshape(-1, *w.values.shape[-2:])
    dx, dw = np.zeros_like(matrices), np.zeros_like(values)
    for c, left, right in zip(cotangent.reshape(-1, *cotangent.shape[-2:]), *pairs, strict=True):
        dx[left] += c @ (values[right] if transpose else values[right].T)
        dw[right] += c.T @ matrices[left] if transpose else matrices[left].T @ c
    found = {"x": dx.reshape(x.shape)}
    if len(w.parts) == 3:
        dw = dw.reshape(w.values.shape)
        found |= {"scales": group_sums(dw * codes_of(w), w.parts[1]), "biases": group_sums(dw, w.parts[1])}
    return found


def pairs_of(x, w, lhs=None, rhs=None):
    """The flat indices of each product; without any, those of broadcasting."""
    indices = [
        np.arange(int(np.prod(array.shape[:-2]))).reshape(array.shape[:-2]) if index is None else index
        for array, index in ((x, lhs), (w.values, rhs))
    ]
    return [index.reshape(-1) for index in np.broadcast_arrays(*indices)]


def factors(rng, batch_x, batch_w, m, transpose, mode="affine", group_size=64, bits=4, kind="float32"):
    """Draw x, and W of about 40 by 128."""
    size = columns(group_size, 100)
    x = integers(rng, (*batch_x, m, size if transpose else 40), kind)
    return x, stored(rng, (*batch_w, 40, size), mode, group_size, bits, kind)


def operands(rng, batch_x, batch_w, m, transpose, mode="affine", group_size=64, bits=4, kind="float32"):
    """Draw x and W, and a cotangent of their product."""
    x, w = factors(rng, batch_x, batch_w, m, transpose, mode, group_size, bits, kind)
    batch = np.broadcast_shapes(batch_x, batch_w)
    return x, w, integers(rng, (*batch, m, 40 if transpose else w.values.shape[-1]), kind)


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize(("group_size", "bits"), AFFINE)
def test_gradients(rng, transpose, group_size, bits):
    x, w, c = operands(rng, (), (), 3, transpose, "affine", group_size, bits)
    found = qx.quantized_matmul_vjp(c, x, *w.parts, transpose, group_size, bits, wrt=ALL)
    exact = expected(c, x, w, transpose, pairs_of(x, w))
    for name, gradient in zip(ALL, found, strict=True):
        check(gradient, exact[name])


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_x(rng, mode, group_size, bits, transpose, kind):
    x, w, c = operands(rng, (2,), (2,), 3, transpose, mode, group_size, bits, kind)
    (dx,) = qx.quantized_matmul_vjp(c, x, *w.parts, transpose=transpose, **w.options)
    check(dx, expected(c, x, w, transpose, pairs_of(x, w))["x"], kind)


@pytest.mark.parametrize(
    ("batch_x", "batch_w"), [((3,), ()), ((), (3,)), ((3,), (1,)), ((2, 1), (3,)), ((2, 3), (3,)), ((0,), (1,))]
)
def test_gradients_of_what_is_broadcast_are_sums(rng, batch_x, batch_w):
    for transpose in (True, False):
        x, w, c = operands(rng, batch_x, batch_w, 2, transpose)
        found = qx.quantized_matmul_vjp(c, x, *w.parts, transpose, wrt=ALL)
        exact = expected(c, x, w, transpose, pairs_of(x, w))
        for name, gradient in zip(ALL, found, strict=True):
            check(gradient, exact[name])


@pytest.mark.parametrize("batch", [(), (3,)])
def test_gradients_of_vectors(rng, batch):
    x, w, c = operands(rng, (), batch, 1, True)
    found = qx.quantized_matmul_vjp(c[..., 0, :], x[0], *w.parts, wrt=ALL)
    exact = expected(c, x, w, True, pairs_of(x, w))
    for gradient, what in zip(found, (exact["x"][0], exact["scales"], exact["biases"]), strict=True):
        check(gradient, what)


@pytest.mark.parametrize(("lhs", "rhs"), [(None, [1, 0, 1, 1]), ([3, 0, 3], [1, 1, 0]), ([[0], [2]], [2, 1]), ([], [])])
@pytest.mark.parametrize("transpose", [True, False])
def test_gradients_of_gathered_products(rng, lhs, rhs, transpose):
    lhs, rhs = (None if i is None else np.array(i, np.int64) for i in (lhs, rhs))
    for m in (1, 3):
        x, w = factors(rng, (4,), (3,), m, transpose)
        pairs = pairs_of(x, w, lhs, rhs)
        batch = np.broadcast_shapes((4,) if lhs is None else lhs.shape, rhs.shape)
        c = integers(rng, (*batch, m, 40 if transpose else w.values.shape[-1]))
        found = qx.gather_qmm_vjp(c, x, *w.parts, lhs, rhs, transpose, wrt=ALL)
        exact = expected(c, x, w, transpose, pairs)
        for name, gradient in zip(ALL, found, strict=True):
            check(gradient, exact[name])


@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
def test_gradient_of_gathered_x(rng, mode, group_size, bits):
    lhs, rhs = np.array([1, 0, 1, 1]), np.array([2, 2, 0, 1])
    x, w = factors(rng, (3,), (3,), 2, True, mode, group_size, bits)
    c = integers(rng, (4, 2, 40))
    (dx,) = qx.gather_qmm_vjp(c, x, *w.parts, lhs_indices=lhs, rhs_indices=rhs, **w.options)
    check(dx, expected(c, x, w, True, (lhs, rhs))["x"])


def test_gradient_with_global_scales(rng):
    x, w = factors(rng, (), (3,), 2, True, "nvfp4", 16, 4)
    c, rhs = integers(rng, (2, 2, 40)), np.array([2, 0])
    (dx,) = qx.gather_qmm_vjp(
        c, x, *w.parts, rhs_indices=rhs, mode="nvfp4", global_scale=np.array([1344, 2688, 5376], F32)
    )
    check(dx, expected(c * np.array([2, 0.5])[:, None, None], x, w, True, ([0, 0], rhs))["x"])


def test_gather_without_indices_has_the_gradients_of_a_product(rng):
    x, w, c = operands(rng, (2, 1), (3,), 2, True)
    for a, b in zip(
        qx.gather_qmm_vjp(c, x, *w.parts, wrt=ALL), qx.quantized_matmul_vjp(c, x, *w.parts, wrt=ALL), strict=True
    ):
        assert np.array_equal(a, b)


def test_gradients_are_differences_of_products(rng):
    """A product is linear in x, in scales and in biases: its differences are exactly its derivatives."""
    x, w, c = operands(rng, (), (), 3, True)
    words, scales, biases = w.parts
    dx, ds, db = qx.quantized_matmul_vjp(c, x, words, scales, biases, wrt=ALL)

    def loss(x, scales, biases):
        return float((c * qx.quantized_matmul(x, words, scales, biases)).sum(dtype=np.float64))

    start = loss(x, scales, biases)
    for position, (array, gradient) in enumerate(((x, dx), (scales, ds), (biases, db))):
        for index in rng.choice(array.size, 20, replace=False):
            moved = array.copy()
            moved.reshape(-1)[index] += 1
            inputs = [x, scales, biases]
            inputs[position] = moved
            assert loss(*inputs) - start == gradient.reshape(-1)[index]


def test_derivative_along_x_is_the_product(rng):
    """The Jacobian times a tangent, which is how MLX differentiates forwards."""
    x, w = factors(rng, (), (), 3, True)
    tangent = integers(rng, x.shape)
    y, moved = (qx.quantized_matmul(a, *w.parts) for a in (x, x + tangent))
    check(qx.quantized_matmul(tangent, *w.parts), moved.astype(np.float64) - y)


def test_gradients_of_normal_numbers_keep_their_bound(rng):
    """D sums P products, whose factors reach it through P roundings at most, in any order; times a code is one more,
    and the sum of a group of gs at most gs more: an element's error is at most gamma(P + 1 + gs) times the sum of
    magnitudes, gamma(n) = n u / (1 - n u), u = 2^-24."""
    w = qx.quantize(rng.standard_normal((24, 256)).astype(F32))
    x, c = rng.standard_normal((2, 50, 256)).astype(F32), rng.standard_normal((2, 50, 24)).astype(F32)
    ds, db = qx.quantized_matmul_vjp(c, x, *w, wrt=("scales", "biases"))
    codes = qx.dequantize(w[0], np.ones_like(w[1]), np.zeros_like(w[1])).astype(np.float64)
    flat_c, flat_x = c.reshape(100, 24).astype(np.float64), x.reshape(100, 256).astype(np.float64)
    n = (100 + 1 + 64) * 2.0**-24
    for gradient, factor in ((ds, codes), (db, np.ones_like(codes))):
        exact = group_sums(flat_c.T @ flat_x * factor, w[1])
        magnitudes = group_sums(np.abs(flat_c).T @ np.abs(flat_x) * factor, w[1])
        assert (np.abs(gradient - exact) <= n / (1 - n) * magnitudes).all()


def test_more_weights_than_are_taken_at_a_time(rng, monkeypatch):
    from quantization import _mlx_gradients

    x, w, c = operands(rng, (), (), 3, True)
    whole = qx.quantized_matmul_vjp(c, x, *w.parts, wrt=ALL)
    monkeypatch.setattr(_mlx_gradients, "_ELEMENTS_AT_A_TIME", 1000)
    for a, b in zip(whole, qx.quantized_matmul_vjp(c, x, *w.parts, wrt=ALL), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("wrt", [(), ("x",), ("biases",), ("biases", "x"), ("scales", "biases", "x"), ["scales"]])
def test_order_shapes_and_types(rng, wrt):
    x, w, c = operands(rng, (), (), 3, True)
    inputs = {"x": x.astype(np.float16), "scales": w.parts[1].astype(np.float16), "biases": w.parts[2]}
    found = qx.quantized_matmul_vjp(c, inputs["x"], w.parts[0], inputs["scales"], inputs["biases"], wrt=wrt)
    assert isinstance(found, tuple) and len(found) == len(wrt)
    for name, gradient in zip(wrt, found, strict=True):
        assert gradient.shape == inputs[name].shape and gradient.dtype == inputs[name].dtype


def test_signatures():
    product_names, gather_names = (
        [*inspect.signature(function).parameters] for function in (qx.quantized_matmul_vjp, qx.gather_qmm_vjp)
    )
    assert product_names == ["cotangent", *inspect.signature(qx.quantized_matmul).parameters, "wrt"]
    assert gather_names == ["cotangent", *inspect.signature(qx.gather_qmm).parameters, "wrt"]


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("name", ["scales", "biases"])
def test_small_floats_have_no_gradient_of_scales(rng, mode, name):
    case = next(case for case in CASES if case[0] == mode)
    x, w, c = operands(rng, (), (), 3, True, *case)
    with pytest.raises(ValueError, match=f"no gradient for the {name} of mode '{mode}'"):
        qx.quantized_matmul_vjp(c, x, *w.parts, mode=mode, wrt=("x", name))
    with pytest.raises(ValueError, match="no gradient"):
        qx.gather_qmm_vjp(c[None], x, w.parts[0][None], w.parts[1][None], None, None, [0], mode=mode, wrt=(name,))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"wrt": ("w",)}, ValueError, "got 'w'"),
        ({"cotangent": np.ones((3, 39), F32)}, ValueError, "the result's shape"),
        ({"cotangent": np.ones((3, 40), np.int32)}, ValueError, "cotangent must have dtype"),
        ({"x": np.ones((3, 64), F32)}, ValueError, "x.shape"),
        ({"x": np.ones((), F32)}, ValueError, "x.shape"),
        ({"biases": None}, ValueError, "needs biases"),
        ({"bits": 8}, ValueError, "columns"),
        ({"x": None}, TypeError, "x must be an array"),
        ({"transpose": 1}, TypeError, "transpose must be True or False"),
    ],
)
def test_refused(rng, changes, error, message):
    x, w, c = operands(rng, (), (), 3, True)
    arguments = dict(zip(("w", "scales", "biases"), w.parts, strict=True)) | {"x": x, "cotangent": c} | changes
    with pytest.raises(error, match=rf"quantized_matmul_vjp: .*{message}"):
        qx.quantized_matmul_vjp(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rhs_indices": [0, 3]}, IndexError, "rhs_indices holds 3, but there are 3 matrices"),
        ({"lhs_indices": [-1]}, IndexError, "lhs_indices must not be negative, got -1"),
        ({"rhs_indices": [0.5]}, ValueError, "integer"),
        ({"lhs_indices": [0, 1, 0]}, ValueError, "do not broadcast"),
        ({"cotangent": np.ones((3, 40), F32)}, ValueError, "the result's shape"),
        ({"x": np.ones(128, F32)}, ValueError, "at least 2 dimensions"),
        ({"global_scale": np.ones(3, F32)}, ValueError, "'nvfp4' only"),
    ],
)
def test_refused_by_gather(rng, changes, error, message):
    x, w = factors(rng, (2,), (3,), 3, True)
    arguments = dict(zip(("w", "scales", "biases"), w.parts, strict=True)) | {"x": x, "rhs_indices": [0, 1]}
    with pytest.raises(error, match=rf"gather_qmm_vjp: .*{message}"):
        qx.gather_qmm_vjp(**{"cotangent": np.ones((2, 3, 40), F32)} | arguments | changes)


# ---------------------------------------------------------------------------------------------------------------------
# Beside others


@pytest.mark.parametrize("transpose", [True, False])
def test_gradients_are_those_of_mlx(rng, transpose):
    mx = pytest.importorskip("mlx.core")
    x, w, c = operands(rng, (), (), 3, transpose)
    words, *inputs = (mx.array(part) for part in w.parts)
    _, theirs = mx.vjp(
        lambda x, s, b: mx.quantized_matmul(x, words, s, b, transpose), [mx.array(x), *inputs], [mx.array(c)]
    )
    for ours, other in zip(qx.quantized_matmul_vjp(c, x, *w.parts, transpose, wrt=ALL), theirs, strict=True):
        check(ours, np.array(other))


def test_gradients_of_gathered_products_are_those_of_mlx(rng):
    mx = pytest.importorskip("mlx.core")
    x, w = factors(rng, (2,), (3,), 2, True)
    c, lhs, rhs = integers(rng, (3, 2, 40)), np.array([1, 0, 1]), np.array([2, 2, 0])
    words, *inputs = (mx.array(part) for part in w.parts)

    def multiply(x, s, b):
        return mx.gather_qmm(x, words, s, b, mx.array(lhs), mx.array(rhs))

    _, theirs = mx.vjp(multiply, [mx.array(x), *inputs], [mx.array(c)])
    for ours, other in zip(qx.gather_qmm_vjp(c, x, *w.parts, lhs, rhs, wrt=ALL), theirs, strict=True):
        check(ours, np.array(other))


def torch_operator(torch):
    """`quantized_matmul` as an operator that PyTorch differentiates: how to register it with a library."""
    Tensor = torch.Tensor

    @torch.library.custom_op("quantization_tests::quantized_matmul", mutates_args=())
    def multiply(x: Tensor, w: Tensor, scales: Tensor, biases: Tensor, group_size: int, bits: int) -> Tensor:
        return torch.from_numpy(qx.quantized_matmul(x, w, scales, biases, True, group_size, bits))

    @multiply.register_fake
    def _(x, w, scales, biases, group_size, bits):
        return x.new_empty((*x.shape[:-1], w.shape[-2]))

    def remember(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4])
        ctx.options = inputs[4:]

    def backward(ctx, cotangent):
        x, w, scales, biases = ctx.saved_tensors
        gradients = qx.quantized_matmul_vjp(cotangent, x, w, scales, biases, True, *ctx.options, wrt=ALL)
        dx, ds, db = map(torch.from_numpy, gradients)
        return dx, None, ds, db, None, None

    multiply.register_autograd(backward, setup_context=remember)
    return multiply


def test_torch_differentiates(rng):
    torch = pytest.importorskip("torch")
    if not hasattr(torch.library, "custom_op"):
        pytest.skip("torch.library.custom_op came with PyTorch 2.4")
    multiply = torch_operator(torch)
    x, w, c = operands(rng, (2,), (), 3, True)
    words = torch.from_numpy(w.parts[0])
    inputs = [torch.from_numpy(a).requires_grad_() for a in (x, *w.parts[1:])]
    y = multiply(inputs[0], words, *inputs[1:], 64, 4)
    check(y.detach().numpy(), product(x, w.values))
    y.backward(torch.from_numpy(c))
    exact = expected(c, x, w, True, pairs_of(x, w))
    for tensor, name in zip(inputs, ALL, strict=True):
        check(tensor.grad.numpy(), exact[name])


@pytest.mark.parametrize("kind", KINDS)
def test_cotangents_of_any_type(rng, kind):
    x, w, c = operands(rng, (), (), 3, True)
    for ours, exact in zip(
        qx.quantized_matmul_vjp(as_kind(c, kind), x, *w.parts, wrt=ALL),
        expected(c, x, w, True, pairs_of(x, w)).values(),
        strict=True,
    ):
        check(ours, exact)
