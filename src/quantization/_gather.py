"""Matrix products with packed weights that indices choose, as in mixtures of experts."""

from __future__ import annotations

from typing import Any

from . import _C
from ._kernel import called_by_core
from ._matmul import AffineProduct

__all__ = ["AffineGatherQmm", "AffineGatherQmmRhs", "affine_gather_qmm", "affine_gather_qmm_rhs"]


@called_by_core
class AffineGatherQmm(AffineProduct):
    """`affine_gather_qmm` as a kernel that is compiled once; parameters as `AffineQmmT`."""

    _op = "affine_gather_qmm"

    def __call__(
        self,
        x: Any,
        w: Any,
        scales: Any,
        biases: Any,
        lhs_indices: Any = None,
        rhs_indices: Any = None,
        transpose: bool = True,
        group_size: int | None = None,
        bits: int | None = None,
        *,
        sorted_indices: bool = False,
        accumulate: str = "exact",
        activations: str | None = None,
        out: Any = None,
        input_dtype: str | None = None,
    ) -> Any:
        """Multiply; see `affine_gather_qmm`."""
        return _C.gather(
            self._plan(),
            x,
            w,
            scales,
            biases,
            lhs_indices,
            rhs_indices,
            transpose,
            *self._packing(group_size, bits),
            sorted_indices,
            accumulate,
            activations,
            out,
            input_dtype,
        )


@called_by_core
class AffineGatherQmmRhs(AffineProduct):
    """`affine_gather_qmm_rhs` as a kernel that is compiled once; parameters as `AffineQmmT`."""

    _op = "affine_gather_qmm_rhs"

    def __call__(
        self,
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
        """Multiply; see `affine_gather_qmm_rhs`."""
        return _C.gather_rhs(
            self._plan(),
            x,
            w,
            scales,
            biases,
            indices,
            output_features,
            *self._packing(group_size, bits),
            transpose,
            accumulate,
            activations,
            out,
            input_dtype,
        )


_gather_qmm, _gather_qmm_rhs = AffineGatherQmm(), AffineGatherQmmRhs()


def affine_gather_qmm(
    x: Any,
    w: Any,
    scales: Any,
    biases: Any,
    lhs_indices: Any = None,
    rhs_indices: Any = None,
    transpose: bool = True,
    group_size: int | None = None,
    bits: int | None = None,
    *,
    sorted_indices: bool = False,
    accumulate: str = "exact",
    activations: str | None = None,
    out: Any = None,
    input_dtype: str | None = None,
) -> Any:
    """Multiply some matrices of x by some of W, which indices choose: x[lhs] @ W[rhs].T, or x[lhs] @ W[rhs].

    Parameters
    ----------
    x : array_like of float32, float16, bfloat16 or float64, shape (..., M, K)
        Any strides. float64 is computed as float32.
    w : array of uint32, shape (..., N, K * bits / 32), or (..., K, N * bits / 32) where transpose is False
        Codes as `affine_quantize` packs them, such as one matrix for each expert; int32 with the same bits is accepted.
    scales, biases : array_like of float32, float16, bfloat16 or float64
        Of w's shape but for its last axis, which has an element for each group.
    lhs_indices, rhs_indices : array_like of integers, optional
        Which matrices of x and of w, counted through their batch dimensions in C order; negative ones count from the
        end, as in NumPy. The shapes of both broadcast. Left out: every one, in the shape of the batch. An empty list is
        an empty array, as to `numpy.take`: of nothing, nothing is picked.
    transpose : bool
        Whether W is transposed: its groups run along K then, else along N.
    group_size, bits : int, optional
        As in `affine_qmm_t`, or, where transpose is False, as in `affine_qmm_n`.
    sorted_indices : bool
        Says that rhs_indices rise. Nothing depends on it: their order is looked at in any case.
    accumulate, activations, out, input_dtype
        As in `affine_qmm_t`.

    Returns
    -------
    numpy.ndarray, shape (*indices, M, N)
        In the dtype that `affine_qmm_t` would give it.

    Raises
    ------
    TypeError
        If an array has another dtype, or is not in CPU memory.
    ValueError
        If shapes, group size and width do not agree, or options exclude each other.
    IndexError
        If an index is out of range. Every index is checked before anything is computed.

    Notes
    -----
    With accumulate="exact", the default, each matrix of the result has the bits that `affine_qmm_t` or `affine_qmm_n`
    gives for its matrices of x and of W alone. The rows of x that meet the same weights are multiplied together,
    wherever they stand, so that codes are unpacked once for up to 128 of them. With accumulate="float" the bits depend
    on how many those are, but not on the number of threads.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> experts = np.stack([scale * np.eye(32, dtype=np.float32) for scale in (1, 10, 100)])
    >>> codes, scales, biases = q.affine_quantize(experts, 32, 8)
    >>> tokens = np.arange(64, dtype=np.float32).reshape(2, 1, 32) / 32  # two matrices of one row
    >>> chosen = [[0, 2], [1, -1]]  # two experts for each token; -1 is the last
    >>> y = q.affine_gather_qmm(tokens, codes, scales, biases, [[0], [1]], chosen)
    >>> y.shape
    (2, 2, 1, 32)
    >>> y[:, :, 0, 16].round(2)
    array([[  0.5,  50. ],
           [ 15. , 150. ]], dtype=float32)
    """
    return _C.gather(
        _gather_qmm._plan(),
        x,
        w,
        scales,
        biases,
        lhs_indices,
        rhs_indices,
        transpose,
        group_size,
        bits,
        sorted_indices,
        accumulate,
        activations,
        out,
        input_dtype,
    )


def affine_gather_qmm_rhs(
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
    """Multiply each row of x by the matrix of W that its index chooses, x[i] @ W[indices[i]].T or x[i] @ W[indices[i]].

    Parameters
    ----------
    x : array_like of float32, float16, bfloat16 or float64, shape (..., K)
        Any strides. float64 is computed as float32.
    w : array of uint32, shape (..., N, K * bits / 32), or (..., K, N * bits / 32) where transpose is False
        Codes as `affine_quantize` packs them, such as one matrix for each expert; int32 with the same bits is accepted.
    scales, biases : array_like of float32, float16, bfloat16 or float64
        Of w's shape but for its last axis, which has an element for each group.
    indices : array_like of integers
        Which matrices of w, counted through its batch dimensions in C order; negative ones count from the end, as in
        NumPy. Of the shape of x without its last axis, or of one that broadcasts with it: with x of shape (T, 1, K) and
        indices of shape (T, n) each of T rows meets n matrices.
    output_features : int, optional
        N, checked against w; where transpose is False, to infer group size and width from too.
    group_size, bits : int, optional
        As in `affine_qmm_t`, or, where transpose is False, as in `affine_qmm_n`.
    transpose : bool
        Whether W is transposed: its groups run along K then, else along N.
    accumulate, activations, out, input_dtype
        As in `affine_qmm_t`.

    Returns
    -------
    numpy.ndarray, shape (..., N)
        The shapes of x without its last axis and of indices broadcast. In the dtype that `affine_qmm_t` would give it.

    Raises
    ------
    TypeError, ValueError, IndexError
        As in `affine_gather_qmm`, whose notes hold here too.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> experts = np.stack([scale * np.eye(32, dtype=np.float32) for scale in (1, 10, 100)])
    >>> codes, scales, biases = q.affine_quantize(experts, 32, 8)
    >>> rows = np.full((4, 32), 0.5, np.float32)
    >>> q.affine_gather_qmm_rhs(rows, codes, scales, biases, [2, 0, 0, 1])[:, 7].round(2)
    array([50. ,  0.5,  0.5,  5. ], dtype=float32)
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
