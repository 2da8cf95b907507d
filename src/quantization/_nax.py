"""The names of the kernels that MLX has for the neural accelerators of Apple's GPUs: the same on every device."""

from __future__ import annotations

from typing import Any

from . import _C
from ._gather import AffineGatherQmmRhs
from ._matmul import AffineQmmN, AffineQmmT

__all__ = [
    "AffineGatherQmmRhsNax",
    "AffineQmmNNax",
    "AffineQmmTNax",
    "affine_gather_qmm_rhs_nax",
    "affine_qmm_n_nax",
    "affine_qmm_t_nax",
]


class AffineQmmTNax(AffineQmmT):
    """`affine_qmm_t_nax` as a kernel that is compiled once.

    Parameters
    ----------
    group_size, bits : int, optional
        What its calls use unless they say otherwise; left out, they are inferred from the shapes.
    """

    _op = "affine_qmm_t_nax"


class AffineQmmNNax(AffineQmmN):
    """`affine_qmm_n_nax` as a kernel that is compiled once; parameters as `AffineQmmT`."""

    _op = "affine_qmm_n_nax"


class AffineGatherQmmRhsNax(AffineGatherQmmRhs):
    """`affine_gather_qmm_rhs_nax` as a kernel that is compiled once; parameters as `AffineQmmT`."""

    _op = "affine_gather_qmm_rhs_nax"


_qmm_t, _qmm_n, _gather_qmm_rhs = AffineQmmTNax(), AffineQmmNNax(), AffineGatherQmmRhsNax()


def affine_qmm_t_nax(
    x: Any,
    w: Any,
    scales: Any,
    biases: Any,
    group_size: int | None = None,
    bits: int | None = None,
    *,
    accumulate: str = "exact",
    activations: str | None = None,
    out: Any = None,
    input_dtype: str | None = None,
) -> Any:
    """Compute x @ W.T as `affine_qmm_t` does, with the same bits: MLX's name for its kernel on neural accelerators.

    Parameters
    ----------
    x, w, scales, biases, group_size, bits, accumulate, activations, out, input_dtype
        As in `affine_qmm_t`.

    Returns
    -------
    numpy.ndarray, shape (..., M, N) or (N,)

    Raises
    ------
    TypeError, ValueError
        As in `affine_qmm_t`.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales, biases = q.affine_quantize(np.eye(64, dtype=np.float32), bits=8)
    >>> q.affine_qmm_t_nax(np.arange(64, dtype=np.float32), codes, scales, biases)[1:4].round(3)
    array([1., 2., 3.], dtype=float32)
    """
    plan = _qmm_t._plan()
    return _C.matmul(plan, x, w, scales, biases, None, group_size, bits, accumulate, activations, out, input_dtype)


def affine_qmm_n_nax(
    x: Any,
    w: Any,
    scales: Any,
    biases: Any,
    output_features: int | None = None,
    group_size: int | None = None,
    bits: int | None = None,
    *,
    accumulate: str = "exact",
    activations: str | None = None,
    out: Any = None,
    input_dtype: str | None = None,
) -> Any:
    """Compute x @ W as `affine_qmm_n` does, with the same bits: MLX's name for its kernel on neural accelerators.

    Parameters
    ----------
    x, w, scales, biases, output_features, group_size, bits, accumulate, activations, out, input_dtype
        As in `affine_qmm_n`.

    Returns
    -------
    numpy.ndarray, shape (..., M, N) or (N,)

    Raises
    ------
    TypeError, ValueError
        As in `affine_qmm_t`.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales, biases = q.affine_quantize(np.eye(64, dtype=np.float32), bits=8)
    >>> q.affine_qmm_n_nax(np.arange(64, dtype=np.float32), codes, scales, biases, 64)[:4]
    array([0., 1., 2., 3.], dtype=float32)
    """
    plan = _qmm_n._plan()
    return _C.matmul(
        plan, x, w, scales, biases, output_features, group_size, bits, accumulate, activations, out, input_dtype
    )


def affine_gather_qmm_rhs_nax(
    x: Any,
    w: Any,
    scales: Any,
    biases: Any,
    indices: Any,
    output_features: int | None = None,
    group_size: int | None = None,
    bits: int | None = None,
    transpose: bool = True,
    *,
    accumulate: str = "exact",
    activations: str | None = None,
    out: Any = None,
    input_dtype: str | None = None,
) -> Any:
    """Compute what `affine_gather_qmm_rhs` does, with the same bits: MLX's name for its kernel on neural accelerators.

    Parameters
    ----------
    x, w, scales, biases, indices, output_features, group_size, bits, transpose
        As in `affine_gather_qmm_rhs`.
    accumulate, activations, out, input_dtype
        As in `affine_qmm_t`.

    Returns
    -------
    numpy.ndarray, shape (..., N)

    Raises
    ------
    TypeError, ValueError, IndexError
        As in `affine_gather_qmm`.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> experts = np.stack([scale * np.eye(32, dtype=np.float32) for scale in (1, 10)])
    >>> codes, scales, biases = q.affine_quantize(experts, 32, 8)
    >>> q.affine_gather_qmm_rhs_nax(np.full((2, 32), 0.5), codes, scales, biases, [1, 0])[:, 7].round(2)
    array([5. , 0.5], dtype=float32)
    """
    return _C.gather_rhs(
        _gather_qmm_rhs._plan(),
        x,
        w,
        scales,
        biases,
        indices,
        output_features,
        group_size,
        bits,
        transpose,
        accumulate,
        activations,
        out,
        input_dtype,
    )
