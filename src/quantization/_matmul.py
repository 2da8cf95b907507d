"""Matrix products with affine-quantized weights, straight from the stored codes."""

from __future__ import annotations

from typing import Any

from . import _C
from ._kernel import Kernel, called_by_core

__all__ = [
    "AffineQmmN",
    "AffineQmmT",
    "AffineQmv",
    "AffineQvm",
    "affine_qmm_n",
    "affine_qmm_t",
    "affine_qmv",
    "affine_qvm",
]


class AffineProduct(Kernel):
    """A product with packed weights, gathered ones among them: its group size and bits.

    Parameters
    ----------
    group_size, bits : int, optional
        What its calls use unless they say otherwise; left out, they are inferred from the shapes.
    """

    def __init__(self, group_size: int | None = None, bits: int | None = None) -> None:
        super().__init__()
        self.group_size, self.bits = group_size, bits

    def _packing(self, group_size: int | None, bits: int | None) -> tuple[int | None, int | None]:
        return self.group_size if group_size is None else group_size, self.bits if bits is None else bits


class _AffineMatmul(AffineProduct):
    """What the products of whole arrays share."""

    def _multiply(
        self, x, w, scales, biases, output_features, group_size, bits, accumulate, activations, out, input_dtype
    ):
        return _C.matmul(
            self._plan(),
            x,
            w,
            scales,
            biases,
            output_features,
            *self._packing(group_size, bits),
            accumulate,
            activations,
            out,
            input_dtype,
        )


@called_by_core
class AffineQmmT(_AffineMatmul):
    """`affine_qmm_t` as a kernel that is compiled once.

    Parameters
    ----------
    group_size, bits : int, optional
        What its calls use unless they say otherwise; left out, they are inferred from the shapes.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> kernel = q.AffineQmmT(group_size=32, bits=4)
    >>> w = q.affine_quantize(np.eye(32, dtype=np.float32), 32, 4)
    >>> kernel(np.arange(32, dtype=np.float32), *w)[1:4].round(3)
    array([1., 2., 3.], dtype=float32)
    >>> kernel.compile().device
    'cpu'
    """

    _op = "affine_qmm_t"

    def __call__(
        self,
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
        """Multiply; see `affine_qmm_t`."""
        return self._multiply(x, w, scales, biases, None, group_size, bits, accumulate, activations, out, input_dtype)


@called_by_core
class _WithOutputFeatures(_AffineMatmul):
    def __call__(
        self,
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
        """Multiply; see the function of the same name."""
        return self._multiply(
            x, w, scales, biases, output_features, group_size, bits, accumulate, activations, out, input_dtype
        )


class AffineQmmN(_WithOutputFeatures):
    """`affine_qmm_n` as a kernel that is compiled once; parameters as `AffineQmmT`."""

    _op = "affine_qmm_n"


class AffineQmv(_WithOutputFeatures):
    """`affine_qmv` as a kernel that is compiled once; parameters as `AffineQmmT`."""

    _op = "affine_qmv"


class AffineQvm(_WithOutputFeatures):
    """`affine_qvm` as a kernel that is compiled once; parameters as `AffineQmmT`."""

    _op = "affine_qvm"


_qmm_t, _qmm_n, _qmv, _qvm = AffineQmmT(), AffineQmmN(), AffineQmv(), AffineQvm()


def affine_qmm_t(
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
    """Compute x @ W.T for a W of shape (N, K) stored as affine codes whose groups run along K.

    Parameters
    ----------
    x : array_like of float32, float16, bfloat16 or float64, shape (..., M, K) or (K,)
        Any strides. float64 is computed as float32.
    w : array of uint32, shape (..., N, K * bits / 32)
        Codes as `affine_quantize` packs them; int32 with the same bits is accepted.
    scales, biases : array_like of float32, float16, bfloat16 or float64, shape (..., N, K / group_size)
    group_size, bits : int, optional
        Inferred from the shapes if left out, else checked against them.
    accumulate : {"exact", "float"}
        How sums are taken. "exact": x is put into block fixed point (22 bits for float32 x, 15 for float16 and
        bfloat16, relative to the largest magnitude of each block of up to 64), products are summed in integers, without
        error, and one float32 term per block is added in order. "float": plain float32 sums, whatever x is, with the
        error and the promises of such (see Notes).
    activations : "int8", optional
        Lossy: uses 7 bits of x instead, an error up to 2^-7 of each block's largest magnitude. Only with "exact".
    out : array, optional
        Where to put the result; exact shape and dtype, any strides but 0, no overlap with an input.
    input_dtype : "bfloat16", optional
        Declares that arrays of uint16 among x, scales and biases hold bfloat16 bits.

    Returns
    -------
    numpy.ndarray, shape (..., M, N) or (N,)
        The batch dimensions of x and w broadcast. The dtype is that of x, scales and biases, float32 if they differ.
        bfloat16 is an ml_dtypes array if an input was one, else uint16 bits.

    Raises
    ------
    TypeError
        If an array has another dtype, or is not in CPU memory.
    ValueError
        If shapes, group size and width do not agree, or options exclude each other.

    Notes
    -----
    With accumulate="exact" the result is the same bits for every number of threads, instruction set and M: a row of x
    gives the same alone or in any batch. Weights are used as stored, scale * code + bias, without rounding them first.
    Rows of x with NaN or infinities are computed by plain float32 sums in those blocks, at the speed of scalar code; a
    NaN result is always the NaN with bits 0x7fc00000.

    The error of an output is at most the sum over its blocks of 2^-p * max|x| * sum|W|, p = 22 (21 for 5 bits in groups
    of 64 or 128 and 6 bits in groups of 32) or 15, plus about one float32 rounding per block, as long as no scale is
    within a factor 2^31 of overflowing float32.

    With accumulate="float" the result is the same bits for every number of threads, and each time, for given shapes on
    one instruction set, but not across instruction sets or values of M. As long as no sum of |x|*code or
    |x|*(|scale|*code + |bias|) overflows float32, its error is at most (min(K, 256) + K/14 + 80) * 2^-24 * sum(|x| *
    (|scale|*code + |bias|)), beside what underflow takes from subnormal x and products, and usually far less. NaN and
    infinities in x, scales and biases go where IEEE arithmetic takes them: an output that one has a share in is not
    finite, though it may be NaN where exact arithmetic has an infinity, as where its code is 0.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> w = np.eye(64, dtype=np.float32)
    >>> codes, scales, biases = q.affine_quantize(w, bits=8)
    >>> q.affine_qmm_t(np.arange(64, dtype=np.float32), codes, scales, biases)[1:4].round(3)
    array([1., 2., 3.], dtype=float32)
    """
    plan = _qmm_t._plan()
    return _C.matmul(plan, x, w, scales, biases, None, group_size, bits, accumulate, activations, out, input_dtype)


def affine_qmm_n(
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
    """Compute x @ W for a W of shape (K, N) stored as affine codes whose groups run along N.

    Parameters
    ----------
    x : array_like of float32, float16, bfloat16 or float64, shape (..., M, K) or (K,)
        Any K and strides.
    w : array of uint32, shape (..., K, N * bits / 32)
    scales, biases : array_like of float32, float16, bfloat16 or float64, shape (..., K, N / group_size)
    output_features : int, optional
        N, to infer group size and width from, or to be checked.
    group_size, bits : int, optional
        If one is given, or `output_features`, the rest is inferred from the shapes; without any, 64 and 4.
    accumulate, activations, out, input_dtype
        As in `affine_qmm_t`. Here, with "exact", the products x * scale and x * (bias + c * scale) are formed in
        float32 and put into block fixed point, over blocks of 64 along K.

    Returns
    -------
    numpy.ndarray, shape (..., M, N) or (N,)
        As in `affine_qmm_t`, with the same promise of equal bits.

    Raises
    ------
    TypeError, ValueError
        As in `affine_qmm_t`.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales, biases = q.affine_quantize(np.eye(64, dtype=np.float32), bits=8)
    >>> q.affine_qmm_n(np.arange(64, dtype=np.float32), codes, scales, biases, output_features=64)[:4]
    array([0., 1., 2., 3.], dtype=float32)
    """
    plan = _qmm_n._plan()
    return _C.matmul(
        plan, x, w, scales, biases, output_features, group_size, bits, accumulate, activations, out, input_dtype
    )


def affine_qmv(
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
    """Compute W @ x for a W of shape (N, K) stored as affine codes: `affine_qmm_t` by its name for vectors.

    Parameters
    ----------
    x : array_like of float32, float16, bfloat16 or float64, shape (K,) or (..., M, K)
        A vector as a rule, but any M will do.
    w, scales, biases, group_size, bits, accumulate, activations, out, input_dtype
        As in `affine_qmm_t`.
    output_features : int, optional
        N, checked against w.

    Returns
    -------
    numpy.ndarray, shape (N,) or (..., M, N)

    Raises
    ------
    TypeError, ValueError
        As in `affine_qmm_t`.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales, biases = q.affine_quantize(np.eye(64, dtype=np.float32), bits=8)
    >>> q.affine_qmv(np.arange(64, dtype=np.float32), codes, scales, biases)[1:4].round(3)
    array([1., 2., 3.], dtype=float32)
    """
    plan = _qmv._plan()
    return _C.matmul(
        plan, x, w, scales, biases, output_features, group_size, bits, accumulate, activations, out, input_dtype
    )


def affine_qvm(
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
    """Compute x @ W for a W of shape (K, N) stored as affine codes: `affine_qmm_n` by its name for vectors.

    Parameters
    ----------
    x : array_like of float32, float16, bfloat16 or float64, shape (K,) or (..., M, K)
    w, scales, biases, output_features, group_size, bits, accumulate, activations, out, input_dtype
        As in `affine_qmm_n`.

    Returns
    -------
    numpy.ndarray, shape (N,) or (..., M, N)

    Raises
    ------
    TypeError, ValueError
        As in `affine_qmm_t`.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales, biases = q.affine_quantize(np.eye(64, dtype=np.float32), bits=8)
    >>> q.affine_qvm(np.arange(64, dtype=np.float32), codes, scales, biases, bits=8)[:4]
    array([0., 1., 2., 3.], dtype=float32)
    """
    plan = _qvm._plan()
    return _C.matmul(
        plan, x, w, scales, biases, output_features, group_size, bits, accumulate, activations, out, input_dtype
    )
