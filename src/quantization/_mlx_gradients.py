"""Gradients of products with stored weights, for `quantization.mlx`.

With W[n, k] = scale * code + bias over groups of k, and y = x @ W.T, a cotangent c of y gives

- d/dx = c @ W, the product with the other orientation;
- D = c.T @ x, the gradient of W as if it were stored in floats, of which those of scale and bias of a group are the
  sums of D * code and of D over that group.

For y = x @ W, x and c change places in D. The products for D are NumPy's, in float32, some rows of W at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from . import _mlx_rules as rules
from ._errors import names_itself

__all__ = ["gather_qmm_vjp", "quantized_matmul_vjp"]

# Elements of W whose gradient is in memory at a time: 4 MiB of it, and as much for their codes.
_ELEMENTS_AT_A_TIME = 2**20


class _Pairs(NamedTuple):
    """A batch of products as a list: of which matrix of x with which of W, and the cotangent of each."""

    lhs: np.ndarray
    rhs: np.ndarray
    cotangents: np.ndarray


def _flat(batch: tuple[int, ...]) -> np.ndarray:
    """Positions of the matrices of a batch."""
    return np.arange(math.prod(batch)).reshape(batch)


def _sum_to(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Undo a broadcast: sum over the axes that it added or repeated."""
    if array.shape == shape:
        return array
    array = array.sum(axis=tuple(range(array.ndim - len(shape))))
    repeated = tuple(i for i, size in enumerate(shape) if size == 1 and array.shape[i] != 1)
    return array.sum(axis=repeated, keepdims=True) if repeated else array


def _sum_by_index(parts: np.ndarray, index: np.ndarray, count: int) -> np.ndarray:
    """For each of `count` indices the sum of its parts, zeros for one that has none."""
    total = np.zeros((count, *parts.shape[1:]), np.float32)
    if len(index):
        order = np.argsort(index, kind="stable")
        present, starts = np.unique(index[order], return_index=True)
        total[present] = np.add.reduceat(parts[order], starts, axis=0)
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def _take_wrt(op: str, wrt: tuple[str, ...], mode: str) -> tuple[str, ...]:
    for name in (names := tuple(wrt)):
        if name not in ("x", "scales", "biases"):
            raise ValueError(f"{op}: wrt may name 'x', 'scales' and 'biases', got {name!r}")
        if name != "x" and mode != "affine":
            raise ValueError(f"{op}: there is no gradient for the {name} of mode {mode!r}")
    return names


def _take_operands(
    op: str,
    x: Any,
    stored: tuple[Any, Any, Any],
    transpose: bool,
    form: tuple[int | None, int | None, str],
    wrt: tuple[str, ...],
) -> tuple[tuple[str, ...], np.ndarray, rules.Weights, bool]:
    """Check what was multiplied: gradients asked for, x, weights and whether they were transposed."""
    transposed = rules.take_flag(op, "transpose", transpose)
    taken = rules.take_format(op, *form)
    names = _take_wrt(op, wrt, form[2])
    weights = rules.take_weights(op, *stored, taken)
    return names, rules.take_floats(op, "x", x), weights, transposed


def _take_cotangent(
    op: str, cotangent: Any, batch: tuple[int, ...], rows: tuple[int, ...], features: int
) -> np.ndarray:
    array = rules.take_floats(op, "cotangent", cotangent)
    if array.shape != (*batch, *rows, features):
        raise ValueError(f"{op}: cotangent must have the result's shape {(*batch, *rows, features)}, got {array.shape}")
    return array


def _take_positions(op: str, name: str, indices: Any, batch: tuple[int, ...]) -> np.ndarray:
    array = rules.take_indices(op, name, indices)
    if array is None:
        return _flat(batch)
    for index in array[array >= math.prod(batch)][:1]:
        raise IndexError(f"{op}: {name} holds {index}, but there are {math.prod(batch)} matrices")
    return array.astype(np.intp)


def _broadcast(op: str, what: str, *shapes: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        raise ValueError(f"{op}: the {what} {' and '.join(map(str, shapes))} do not broadcast") from None


# ---------------------------------------------------------------------------------------------------------------------
# Gradients of scales and biases


def _by_matrix(x: np.ndarray, pairs: _Pairs) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each matrix of W that a product has used: its position, all rows of x that met it, and their cotangents."""
    matrices = x.reshape(-1, *x.shape[-2:])
    order = np.argsort(pairs.rhs, kind="stable")
    for chosen in np.split(order, np.flatnonzero(np.diff(pairs.rhs[order])) + 1):
        if len(chosen):
            rows = matrices[pairs.lhs[chosen]].reshape(-1, x.shape[-1])
            cotangents = pairs.cotangents[chosen].reshape(-1, pairs.cotangents.shape[-1])
            yield int(pairs.rhs[chosen[0]]), rows.astype(np.float32), cotangents.astype(np.float32)


def _group_sums(
    codes: np.ndarray, rows_of: np.ndarray, columns_of: np.ndarray, form: rules.Format
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of scales and biases of one matrix, float32 [R, C / group_size], for D = rows_of.T @ columns_of."""
    rows, columns = rows_of.shape[1], columns_of.shape[1]
    groups = (rows, columns // form.group_size)
    of_scales, of_biases = np.empty(groups, np.float32), np.empty(groups, np.float32)
    step = max(1, _ELEMENTS_AT_A_TIME // max(1, columns))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        d = (rows_of[:, part].T @ columns_of).reshape(-1, groups[1], form.group_size)
        ones = np.ones(d.shape[:2], np.float32)
        decoded = rules.native(form.mode, "dequantize")(codes[part], ones, np.zeros_like(ones), **form.options)
        of_biases[part] = d.sum(axis=-1)
        d *= decoded.reshape(d.shape)
        of_scales[part] = d.sum(axis=-1)
    return of_scales, of_biases


def _of_stored(x: np.ndarray, weights: rules.Weights, transpose: bool, pairs: _Pairs) -> dict[str, np.ndarray]:
    """Gradients of scales and biases, in float32; zeros for matrices that no product has used."""
    codes = weights.parts[0].reshape(-1, *weights.parts[0].shape[-2:])
    shape = weights.parts[1].shape
    of_scales, of_biases = (
        np.zeros((len(codes), *shape[-2:]), np.float32),
        np.zeros((len(codes), *shape[-2:]), np.float32),
    )
    for position, rows, cotangents in _by_matrix(x, pairs):
        sides = (cotangents, rows) if transpose else (rows, cotangents)
        of_scales[position], of_biases[position] = _group_sums(codes[position], *sides, weights.format)
    return {"scales": of_scales.reshape(shape), "biases": of_biases.reshape(shape)}


def _in_order(
    wrt: tuple[str, ...], gradients: dict[str, np.ndarray], x: np.ndarray, weights: rules.Weights
) -> tuple[np.ndarray, ...]:
    """Pick the gradients that were asked for, each in the type of what it is the gradient of."""
    types = {"x": x.dtype, "scales": weights.parts[1].dtype, "biases": weights.parts[-1].dtype}
    return tuple(gradients[name].astype(types[name], copy=False) for name in wrt)


# ---------------------------------------------------------------------------------------------------------------------
# The public functions


def _of_x(op: str, cotangent: np.ndarray, x: np.ndarray, weights: rules.Weights, transpose: bool) -> np.ndarray:
    """Gradient of x; where matrices of x were repeated, their sum is taken in float32."""
    batch = cotangent.shape[:-2]
    if batch != x.shape[:-2]:
        cotangent = cotangent.astype(np.float32, copy=False)
    return _sum_to(rules.multiply(op, cotangent, weights, not transpose), x.shape)


@names_itself("quantized_matmul_vjp")
def quantized_matmul_vjp(
    cotangent: Any,
    x: Any,
    w: Any,
    scales: Any,
    biases: Any = None,
    transpose: bool = True,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    *,
    wrt: tuple[str, ...] = ("x",),
) -> tuple[Any, ...]:
    """Compute gradients of `quantized_matmul`: the products of a cotangent with its Jacobians.

    Parameters
    ----------
    cotangent : array of float32, float16, bfloat16 or float64
        Gradient of the result, of its shape.
    x, w, scales, biases, transpose, group_size, bits, mode
        What `quantized_matmul` was given.
    wrt : tuple of str
        Gradients of what: any of "x", "scales", "biases"; the last two in mode "affine" only. There is none of w.

    Returns
    -------
    tuple of numpy.ndarray
        In the order of `wrt`, each of the shape and dtype of what it is the gradient of.

    Raises
    ------
    ValueError
        If `wrt` names something else, or shapes, dtypes and format do not agree.
    TypeError
        If an argument is no array, number or string where one is meant.

    Notes
    -----
    The gradient of x is a product with the same weights in the other orientation, with that product's error. Gradients
    of scales and biases are float32 sums of products of cotangent, x and code.

    Examples
    --------
    >>> import numpy as np
    >>> import quantization.mlx as mx
    >>> stored = mx.quantize(np.eye(64, dtype=np.float32), bits=8)
    >>> x, c = np.ones((1, 64), np.float32), np.arange(64, dtype=np.float32).reshape(1, 64)
    >>> dx, db = mx.quantized_matmul_vjp(c, x, *stored, bits=8, wrt=("x", "biases"))
    >>> dx[0, 1:4].round(3), db[1:4, 0]
    (array([1., 2., 3.], dtype=float32), array([ 64., 128., 192.], dtype=float32))
    """
    op = "quantized_matmul_vjp"
    names, array, weights, transpose = _take_operands(
        op, x, (w, scales, biases), transpose, (group_size, bits, mode), wrt
    )
    features = rules.output_features(op, array, weights, transpose)
    matrix = array if array.ndim > 1 else array[np.newaxis]
    batch = _broadcast(op, "batch dimensions of x and w,", matrix.shape[:-2], weights.batch)
    c = _take_cotangent(op, cotangent, batch, array.shape[-2:-1], features).reshape(*batch, matrix.shape[-2], features)
    gradients = {}
    if "x" in names:
        gradients["x"] = _of_x(op, c, matrix, weights, transpose).reshape(array.shape)
    if "scales" in names or "biases" in names:
        lhs, rhs = (np.broadcast_to(_flat(own), batch).reshape(-1) for own in (matrix.shape[:-2], weights.batch))
        pairs = _Pairs(lhs, rhs, c.reshape(-1, *c.shape[-2:]))
        gradients |= _of_stored(matrix, weights, transpose, pairs)
    return _in_order(names, gradients, array, weights)


def _of_gathered_x(
    op: str, x: np.ndarray, weights: rules.Weights, transpose: bool, pairs: _Pairs, sorted_indices: bool
) -> np.ndarray:
    """Gradient of x in float32."""
    cotangents = pairs.cotangents.astype(np.float32, copy=False)
    parts = rules.gather_multiply(op, cotangents, weights, None, pairs.rhs, not transpose, sorted_indices)
    return _sum_by_index(parts, pairs.lhs, math.prod(x.shape[:-2])).reshape(x.shape)


@names_itself("gather_qmm_vjp")
def gather_qmm_vjp(
    cotangent: Any,
    x: Any,
    w: Any,
    scales: Any,
    biases: Any = None,
    lhs_indices: Any = None,
    rhs_indices: Any = None,
    transpose: bool = True,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    global_scale: Any = None,
    *,
    sorted_indices: bool = False,
    wrt: tuple[str, ...] = ("x",),
) -> tuple[Any, ...]:
    """Compute gradients of `gather_qmm`: the products of a cotangent with its Jacobians.

    Parameters
    ----------
    cotangent : array of float32, float16, bfloat16 or float64
        Gradient of the result, of its shape.
    x, w, scales, biases, lhs_indices, rhs_indices, transpose, group_size, bits, mode, global_scale, sorted_indices
        What `gather_qmm` was given.
    wrt : tuple of str
        As in `quantized_matmul_vjp`.

    Returns
    -------
    tuple of numpy.ndarray
        In the order of `wrt`, each of the shape and dtype of what it is the gradient of: sums over all products that a
        matrix has a part in, zeros for one that no index names.

    Raises
    ------
    ValueError
        If `wrt` names something else, or shapes, dtypes and format do not agree.
    IndexError
        If an index is out of range.
    TypeError
        If an argument is no array, number or string where one is meant.

    Examples
    --------
    >>> import numpy as np
    >>> import quantization.mlx as mx
    >>> experts = mx.quantize(np.stack([np.eye(64, dtype=np.float32)] * 3), bits=8)
    >>> x, c = np.ones((1, 64), np.float32), np.ones((2, 1, 64), np.float32)
    >>> db, = mx.gather_qmm_vjp(c, x, *experts, rhs_indices=np.array([2, 2]), bits=8, wrt=("biases",))
    >>> db[:, 0, 0]
    array([  0.,   0., 128.], dtype=float32)
    """
    op = "gather_qmm_vjp"
    if lhs_indices is None and rhs_indices is None and global_scale is None:
        return quantized_matmul_vjp(cotangent, x, w, scales, biases, transpose, group_size, bits, mode, wrt=wrt)
    names, array, weights, transpose = _take_operands(
        op, x, (w, scales, biases), transpose, (group_size, bits, mode), wrt
    )
    if array.ndim < 2 or (lhs_indices is None and rhs_indices is None):
        raise ValueError(f"{op}: x must have at least 2 dimensions, and global_scale needs indices")
    features = rules.output_features(op, array, weights, transpose)
    largest = rules.take_global_scales(op, "global_scale", global_scale, mode, weights.batch)
    left = _take_positions(op, "lhs_indices", lhs_indices, array.shape[:-2])
    right = _take_positions(op, "rhs_indices", rhs_indices, weights.batch)
    batch = _broadcast(op, "shapes of the indices,", left.shape, right.shape)
    c = _take_cotangent(op, cotangent, batch, array.shape[-2:-1], features)
    if largest is not None:
        c = c.astype(np.float32) * rules.picked(largest / rules.FULL_RANGE, right)
    lhs, rhs = (np.broadcast_to(indices, batch).reshape(-1) for indices in (left, right))
    pairs = _Pairs(lhs, rhs, c.reshape(-1, *c.shape[-2:]))
    gradients = {}
    if "x" in names:
        gradients["x"] = _of_gathered_x(op, array, weights, transpose, pairs, sorted_indices)
    if "scales" in names or "biases" in names:
        gradients |= _of_stored(array, weights, transpose, pairs)
    return _in_order(names, gradients, array, weights)
