"""MLX's quantized operations by their own names and signatures, over NumPy arrays.

Code written for MLX's `quantize`, `dequantize`, `quantized_matmul`, `gather_qmm`, `qqmm`, `gather_qqmm`, `to_fp8` and
`from_fp8` runs on this module instead: the same positional-only and keyword-only parameters, the same defaults, the
same types of results, and ValueError wherever MLX raises it. Nothing is inferred from shapes, as MLX infers nothing.
The differences:

- Arrays are NumPy's (bfloat16 is that of ml_dtypes) or CPU tensors of PyTorch, JAX and MLX, whose memory is read in
  place. What comes back is always NumPy arrays; ``torch.from_numpy(y)``, ``jax.numpy.asarray(y)`` and ``mx.array(y)``
  take them. PyTorch and MLX take a bfloat16 result by its bits, as in
  ``torch.from_numpy(y.view("int16")).view(torch.bfloat16)``. There is no ``stream``.
- Sums are exact integers within blocks, whatever the type of x: see `quantization.affine_qmm_t`. MLX's CPU backend
  sums in that type.
- All matrices of a batched w count. MLX takes the first one where x has no batch: of a w of shape (1, N, K) the result
  here has a batch of 1, and MLX's has none.
- Global scales count in every operation, `qqmm` takes any number of rows, and `gather_qqmm` exists: MLX's CPU backend
  ignores or refuses the first and lacks the others.
- Indices out of range are an IndexError. MLX reads outside of the array.
- ``profile`` and ``mx_scale`` choose between MLX's algorithms where its backends and versions differ.
- `quantized_matmul_vjp` and `gather_qmm_vjp` are the gradients, to be registered with any library that differentiates.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _fp8
from . import _mlx_rules as rules
from ._errors import names_itself
from ._mlx_gradients import gather_qmm_vjp, quantized_matmul_vjp

__all__ = [
    "dequantize",
    "from_fp8",
    "gather_qmm",
    "gather_qmm_vjp",
    "gather_qqmm",
    "qqmm",
    "quantize",
    "quantized_matmul",
    "quantized_matmul_vjp",
    "to_fp8",
]


def _encode(w: np.ndarray, form: rules.Format, global_scale: float | None, profile: str, mx_scale: str) -> Any:
    """Quantize with the keywords that the mode has."""
    options: dict[str, Any] = {"profile": profile, **form.options}
    if form.mode == "nvfp4":
        options["global_scale"] = global_scale
    elif form.mode != "affine":
        options["mx_scale"] = mx_scale
    return rules.native(form.mode, "quantize")(w, **options)


def _check_mx_scale(op: str, mx_scale: str) -> None:
    if mx_scale not in ("up", "nearest", "floor"):  # also where the mode has no use for it
        raise ValueError(f"{op}: mx_scale must be 'up', 'nearest' or 'floor', got {mx_scale!r}")


@names_itself("quantize")
def quantize(
    w: Any,
    /,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    *,
    global_scale: Any = None,
    profile: str = "metal",
    mx_scale: str = "up",
) -> tuple[Any, ...]:
    """Quantize groups of the last axis of w.

    Parameters
    ----------
    w : array of float32, float16, bfloat16 or float64, shape (..., N, K)
        K must be a multiple of the group size.
    group_size, bits : int, optional
        In mode "affine" one of 32, 64 (default), 128, and one of 1, 2, 3, 4 (default), 5, 6, 8. The other modes have
        one choice: 32 and 4 ("mxfp4"), 32 and 8 ("mxfp8"), 16 and 4 ("nvfp4").
    mode : {"affine", "mxfp4", "mxfp8", "nvfp4"}
    global_scale : array of float32 with one element, or float, optional
        Mode "nvfp4": by convention the largest magnitude of w.
    profile : {"metal", "cpu"}, default "metal"
        Which of MLX's backends to follow where they differ; "cpu" equals MLX's CPU backend byte for byte. See
        `quantization.affine_quantize` and `quantization.mxfp4_quantize`.
    mx_scale : {"up", "nearest", "floor"}, default "up"
        Modes "mxfp4" and "mxfp8": how scales become powers of two; see `quantization.mxfp4_quantize`.

    Returns
    -------
    codes : numpy.ndarray of uint32, shape (..., N, K * bits / 32)
    scales : numpy.ndarray, shape (..., N, K / group_size)
        Of w's type (float32 for float64) in mode "affine", else uint8.
    biases : numpy.ndarray
        Like scales; only in mode "affine".

    Raises
    ------
    ValueError
        If w has fewer than 2 dimensions, another dtype or a last axis that no groups fill; for an unknown mode, group
        size or width.
    TypeError
        If an argument is no array, number or string where one is meant.

    Examples
    --------
    >>> import numpy as np
    >>> import quantization.mlx as mx
    >>> w_q, scales, biases = mx.quantize(np.eye(64, dtype=np.float32), bits=8)
    >>> w_q.shape, scales.shape
    ((64, 16), (64, 1))
    """
    form = rules.take_format("quantize", group_size, bits, mode)
    largest = rules.take_global_scale("quantize", "global_scale", global_scale, mode)
    _check_mx_scale("quantize", mx_scale)
    array = rules.take_floats("quantize", "w", w)
    if array.ndim < 2:
        raise ValueError(f"quantize: w must have at least 2 dimensions, got shape {array.shape}")
    return _encode(array, form, largest, profile, mx_scale)


@names_itself("dequantize")
def dequantize(
    w: Any,
    /,
    scales: Any,
    biases: Any = None,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    global_scale: Any = None,
    dtype: Any = None,
    *,
    profile: str = "metal",
) -> Any:
    """Turn codes back into floats.

    Parameters
    ----------
    w : array of uint32, shape (..., N, K * bits / 32)
    scales, biases : array, shape (..., N, K / group_size)
        As `quantize` returns them; only mode "affine" has biases.
    group_size, bits, mode
        As in `quantize`.
    global_scale : array of float32 with one element, or float, optional
        Mode "nvfp4": what `quantize` was given.
    dtype : dtype or str, optional
        float32, float16 or bfloat16, also as another library's dtype. By default that of scales and biases in mode
        "affine" (float32 if they differ), else bfloat16, which needs ml_dtypes.
    profile : {"metal", "cpu"}, default "metal"
        "metal" rounds once, "cpu" as often as MLX's CPU backend; see `quantization.affine_dequantize`.

    Returns
    -------
    numpy.ndarray, shape (..., N, K)

    Raises
    ------
    ValueError
        If shapes, dtypes and format do not agree, or biases are missing, or given to a mode without.
    TypeError
        If an argument is no array, number or string where one is meant.
    ImportError
        If the result is bfloat16 and ml_dtypes is not installed.

    Examples
    --------
    >>> import numpy as np
    >>> import quantization.mlx as mx
    >>> w_q, scales = mx.quantize(np.full((1, 32), 3.0, np.float32), mode="mxfp4")
    >>> mx.dequantize(w_q, scales, mode="mxfp4", dtype=np.float32)[0, :4]
    array([3., 3., 3., 3.], dtype=float32)
    """
    form = rules.take_format("dequantize", group_size, bits, mode)
    largest = rules.take_global_scale("dequantize", "global_scale", global_scale, mode)
    weights = rules.take_weights("dequantize", w, scales, biases, form)
    options: dict[str, Any] = {"profile": profile, **form.options}
    if dtype is not None or mode != "affine":
        options["dtype"] = rules.take_dtype("dequantize", "bfloat16" if dtype is None else dtype)
    if mode == "nvfp4":
        options["global_scale"] = largest
    return rules.native(mode, "dequantize")(*weights.parts, **options)


@names_itself("quantized_matmul")
def quantized_matmul(
    x: Any,
    w: Any,
    /,
    scales: Any,
    biases: Any = None,
    transpose: bool = True,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
) -> Any:
    """Compute x @ W.T, or x @ W, for a W as `quantize` stores it.

    Parameters
    ----------
    x : array of float32, float16, bfloat16 or float64, shape (..., M, K) or (K,)
    w : array of uint32
        Codes of a W of shape (..., N, K), or (..., K, N) without `transpose`. Its batch dimensions and x's broadcast.
    scales, biases : array
        As `quantize` returns them; only mode "affine" has biases.
    transpose : bool
        Whether W is multiplied transposed.
    group_size, bits, mode
        As in `quantize`.

    Returns
    -------
    numpy.ndarray, shape (..., M, N) or (..., N)
        In mode "affine" of the type of x, scales and biases, float32 if they differ; else of x's.

    Raises
    ------
    ValueError
        If shapes, dtypes and format do not agree, or biases are missing, or given to a mode without.
    TypeError
        If an argument is no array, number or string where one is meant.

    Examples
    --------
    >>> import numpy as np
    >>> import quantization.mlx as mx
    >>> w_q, scales, biases = mx.quantize(np.eye(64, dtype=np.float32), bits=8)
    >>> mx.quantized_matmul(np.arange(64, dtype=np.float32), w_q, scales, biases, bits=8)[1:4].round(3)
    array([1., 2., 3.], dtype=float32)
    """
    op = "quantized_matmul"
    form = rules.take_format(op, group_size, bits, mode)
    weights = rules.take_weights(op, w, scales, biases, form)
    return rules.multiply(op, rules.take_floats(op, "x", x), weights, rules.take_flag(op, "transpose", transpose))


@names_itself("gather_qmm")
def gather_qmm(
    x: Any,
    w: Any,
    /,
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
) -> Any:
    """Multiply pairs of matrices from a batch of x and a batch of stored W that indices name.

    Parameters
    ----------
    x : array of float32, float16, bfloat16 or float64, shape (..., M, K)
    w, scales, biases, transpose, group_size, bits, mode
        As in `quantized_matmul`.
    lhs_indices, rhs_indices : array of integers, optional
        For each product, which matrix of x and which of W: positions in the batch dimensions, counted in C order. The
        two broadcast. One that is left out names all matrices of its batch. Without either this is `quantized_matmul`.
    global_scale : array of float32, shape of w's batch dimensions, optional
        Mode "nvfp4": for each matrix what `quantize` was given. Only with indices.
    sorted_indices : bool
        A hint that `rhs_indices` rises; results do not depend on it.

    Returns
    -------
    numpy.ndarray, shape (..., M, N)
        The batch dimensions are those of the indices. The type is that of `quantized_matmul`.

    Raises
    ------
    ValueError
        If shapes, dtypes and format do not agree, or indices are no integers or do not broadcast.
    IndexError
        If an index is out of range.
    TypeError
        If an argument is no array, number or string where one is meant.

    Examples
    --------
    >>> import numpy as np
    >>> import quantization.mlx as mx
    >>> experts = np.stack([np.eye(64, dtype=np.float32), 2 * np.eye(64, dtype=np.float32)])
    >>> x = np.arange(64, dtype=np.float32).reshape(1, 64)
    >>> mx.gather_qmm(x, *mx.quantize(experts, bits=8), rhs_indices=np.array([1, 0]), bits=8)[:, 0, 1:4].round(2)
    array([[2., 4., 6.],
           [1., 2., 3.]], dtype=float32)
    """
    op = "gather_qmm"
    transpose = rules.take_flag(op, "transpose", transpose)
    sorted_indices = rules.take_flag(op, "sorted_indices", sorted_indices)
    form = rules.take_format(op, group_size, bits, mode)
    weights = rules.take_weights(op, w, scales, biases, form)
    left, right = (
        rules.take_indices(op, "lhs_indices", lhs_indices),
        rules.take_indices(op, "rhs_indices", rhs_indices),
    )
    if left is None and right is None:
        if global_scale is not None:
            raise ValueError("gather_qmm: global_scale needs lhs_indices or rhs_indices")
        return rules.multiply(op, rules.take_floats(op, "x", x), weights, transpose)
    array = rules.take_floats(op, "x", x)
    if array.ndim < 2:
        raise ValueError(f"gather_qmm: x must have at least 2 dimensions, got shape {array.shape}")
    largest = rules.take_global_scales(op, "global_scale", global_scale, mode, weights.batch)
    if largest is None:
        return rules.gather_multiply(op, array, weights, left, right, transpose, sorted_indices)
    y = rules.gather_multiply(op, array.astype(np.float32), weights, left, right, transpose, sorted_indices)
    y *= rules.picked(largest / rules.FULL_RANGE, right)
    return y.astype(rules.result_type(array), copy=False)


def _take_operand(
    op: str, w: Any, scales: Any, form: rules.Format, largest: float | None, options: Any
) -> rules.Weights:
    """Take the weights of `qqmm`: stored ones, or floats to be stored now."""
    if scales is not None:
        return rules.take_weights(op, w, scales, None, form)
    array = rules.as_array(op, "w", w)
    if array.dtype == np.uint32:
        raise ValueError(f"{op}: a w of codes needs scales")
    array = rules.take_narrow_floats(op, "w", array)
    if array.ndim < 2:
        raise ValueError(f"{op}: w must have at least 2 dimensions, got shape {array.shape}")
    return rules.Weights(form, tuple(_encode(array, form, largest, *options)))


def _take_qqmm_format(op: str, group_size: int | None, bits: int | None, mode: str) -> rules.Format:
    form = rules.take_format(op, group_size, bits, mode)
    if mode == "affine":
        raise ValueError(f"{op}: mode must be 'nvfp4', 'mxfp8' or 'mxfp4', got 'affine', which needs biases")
    return form


def _take_both_scales(op: str, of_x: Any, of_w: Any, mode: str) -> tuple[float | None, float | None]:
    if mode == "nvfp4" and (of_x is None) != (of_w is None):
        raise ValueError(f"{op}: global_scale_x and global_scale_w must both be given or neither")
    return (
        rules.take_global_scale(op, "global_scale_x", of_x, mode),
        rules.take_global_scale(op, "global_scale_w", of_w, mode),
    )


def _round_trip(x: np.ndarray, form: rules.Format, largest: float | None, options: Any) -> np.ndarray:
    """Quantize x and turn it back: float32, where code times scale is exact; the global scale is left out."""
    return rules.native(form.mode, "dequantize")(*_encode(x, form, largest, *options), dtype="float32")


def _scaled(y: np.ndarray, of_x: float | None, of_w: float | None, x: np.ndarray) -> Any:
    """Multiply a float32 result by the global scales that its factors left out; return it in x's type."""
    if of_x is not None and of_w is not None:
        y *= np.float32(of_x) / rules.FULL_RANGE * (np.float32(of_w) / rules.FULL_RANGE)
    return y.astype(x.dtype, copy=False)


@names_itself("qqmm")
def qqmm(
    x: Any,
    w: Any,
    scales: Any = None,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "nvfp4",
    global_scale_x: Any = None,
    global_scale_w: Any = None,
    *,
    profile: str = "metal",
    mx_scale: str = "up",
) -> Any:
    """Compute x @ W.T with x quantized on the way: what `dequantize` makes of the codes of both.

    Parameters
    ----------
    x : array of float32, float16 or bfloat16, shape (..., M, K) or (K,)
    w : array, 2 dimensions
        Codes of a W of shape (N, K), or W itself as floats, which is quantized like x.
    scales : array of uint8, shape (N, K / group_size), optional
        Those of codes.
    group_size, bits
        As in `quantize`.
    mode : {"nvfp4", "mxfp8", "mxfp4"}
    global_scale_x, global_scale_w : array of float32 with one element, or float, optional
        Mode "nvfp4", both or neither: the largest magnitudes of x and of W.
    profile, mx_scale
        How x, and a W of floats, are quantized; see `quantize`.

    Returns
    -------
    numpy.ndarray of x's dtype, shape (..., M, N) or (N,)

    Raises
    ------
    ValueError
        If shapes, dtypes and format do not agree, scales of codes are missing, or one global scale is.
    TypeError
        If an argument is no array, number or string where one is meant.

    Examples
    --------
    >>> import numpy as np
    >>> import quantization.mlx as mx
    >>> mx.qqmm(np.full((2, 32), 3, np.float32), np.full((1, 32), 0.75, np.float32))
    array([[72.],
           [72.]], dtype=float32)
    """
    op = "qqmm"
    form = _take_qqmm_format(op, group_size, bits, mode)
    of_x, of_w = _take_both_scales(op, global_scale_x, global_scale_w, mode)
    _check_mx_scale(op, mx_scale)
    array = rules.take_narrow_floats(op, "x", x)
    weights = _take_operand(op, w, scales, form, of_w, (profile, mx_scale))
    if array.ndim < 1 or weights.batch:
        raise ValueError(
            f"qqmm: x must have at least 1 dimension and w 2, got shapes {array.shape} and {weights.parts[0].shape}"
        )
    y = rules.multiply(op, _round_trip(array, form, of_x, (profile, mx_scale)), weights, True)
    return _scaled(y, of_x, of_w, array)


@names_itself("gather_qqmm")
def gather_qqmm(
    x: Any,
    w: Any,
    /,
    scales: Any = None,
    lhs_indices: Any = None,
    rhs_indices: Any = None,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "nvfp4",
    global_scale_x: Any = None,
    global_scale_w: Any = None,
    *,
    sorted_indices: bool = False,
    profile: str = "metal",
    mx_scale: str = "up",
) -> Any:
    """Multiply pairs of matrices as `qqmm` does, chosen by indices as in `gather_qmm`.

    Parameters
    ----------
    x : array of float32, float16 or bfloat16, shape (..., M, K)
    w, scales
        As in `qqmm`, with any batch dimensions.
    lhs_indices, rhs_indices, sorted_indices
        As in `gather_qmm`.
    group_size, bits, mode, global_scale_x, global_scale_w, profile, mx_scale
        As in `qqmm`: one global scale for all of x, one for all of W.

    Returns
    -------
    numpy.ndarray of x's dtype, shape (..., M, N)

    Raises
    ------
    ValueError
        As in `qqmm` and `gather_qmm`.
    IndexError
        If an index is out of range.
    TypeError
        If an argument is no array, number or string where one is meant.

    Examples
    --------
    >>> import numpy as np
    >>> import quantization.mlx as mx
    >>> experts = np.stack([np.full((1, 32), 0.75, np.float32), np.full((1, 32), 6, np.float32)])
    >>> mx.gather_qqmm(np.full((1, 32), 3, np.float32), experts, rhs_indices=np.array([1, 0, 1])).reshape(-1)
    array([576.,  72., 576.], dtype=float32)
    """
    op = "gather_qqmm"
    sorted_indices = rules.take_flag(op, "sorted_indices", sorted_indices)
    form = _take_qqmm_format(op, group_size, bits, mode)
    of_x, of_w = _take_both_scales(op, global_scale_x, global_scale_w, mode)
    _check_mx_scale(op, mx_scale)
    array = rules.take_narrow_floats(op, "x", x)
    if array.ndim < 2:
        raise ValueError(f"gather_qqmm: x must have at least 2 dimensions, got shape {array.shape}")
    left, right = (
        rules.take_indices(op, "lhs_indices", lhs_indices),
        rules.take_indices(op, "rhs_indices", rhs_indices),
    )
    weights = _take_operand(op, w, scales, form, of_w, (profile, mx_scale))
    rounded = _round_trip(array, form, of_x, (profile, mx_scale))
    if left is None and right is None:
        y = rules.multiply(op, rounded, weights, True)
    else:
        y = rules.gather_multiply(op, rounded, weights, left, right, True, sorted_indices)
    return _scaled(y, of_x, of_w, array)


@names_itself("to_fp8")
def to_fp8(x: Any) -> Any:
    """Convert floats to FP8 (E4M3).

    Parameters
    ----------
    x : array of float32, float16, bfloat16 or float64
        Any shape.

    Returns
    -------
    numpy.ndarray of uint8, of x's shape
        Nearest codes, ties to even. Magnitudes from 448 on, infinities and NaN become 448 with their sign.

    Raises
    ------
    ValueError
        If x has another dtype.
    TypeError
        If x is no array.

    Examples
    --------
    >>> import numpy as np
    >>> import quantization.mlx as mx
    >>> mx.to_fp8(np.array([1, -2, 1e9], np.float32))
    array([ 56, 192, 126], dtype=uint8)
    """
    return _fp8.to_fp8(rules.take_floats("to_fp8", "x", x))


@names_itself("from_fp8")
def from_fp8(x: Any, dtype: Any = "bfloat16") -> Any:
    """Convert FP8 (E4M3) to floats.

    Parameters
    ----------
    x : array of uint8
        Any shape.
    dtype : dtype or str
        float32, float16 or bfloat16, also as another library's dtype. bfloat16 needs ml_dtypes.

    Returns
    -------
    numpy.ndarray of `dtype`, of x's shape
        Codes 0x7f and 0xff are NaN.

    Raises
    ------
    ValueError
        If x or `dtype` is of another dtype.
    TypeError
        If x is no array.
    ImportError
        If the result is bfloat16 and ml_dtypes is not installed.

    Examples
    --------
    >>> import numpy as np
    >>> import quantization.mlx as mx
    >>> mx.from_fp8(np.array([56, 192, 126], np.uint8), np.float32)
    array([  1.,  -2., 448.], dtype=float32)
    """
    array = rules.as_array("from_fp8", "x", x)
    if array.dtype != np.uint8:
        raise ValueError(f"from_fp8: x must have dtype uint8, got {array.dtype}")
    return _fp8.from_fp8(array, dtype=rules.take_dtype("from_fp8", dtype))
