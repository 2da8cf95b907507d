"""Matrix products with weights in MLX's formats of small floats, straight from the stored codes."""

# Written by src/fp_functions.py, which defines each operation once for all formats: change that and run it.

from __future__ import annotations

from typing import Any

from . import _C
from ._kernel import Kernel, called_by_core

__all__ = [
    "Mxfp4QmmN",
    "Mxfp4QmmT",
    "Mxfp4Qmv",
    "Mxfp4Qvm",
    "Mxfp8QmmN",
    "Mxfp8QmmT",
    "Mxfp8Qmv",
    "Mxfp8Qvm",
    "Nvfp4QmmN",
    "Nvfp4QmmT",
    "Nvfp4Qmv",
    "Nvfp4Qvm",
    "mxfp4_qmm_n",
    "mxfp4_qmm_t",
    "mxfp4_qmv",
    "mxfp4_qvm",
    "mxfp8_qmm_n",
    "mxfp8_qmm_t",
    "mxfp8_qmv",
    "mxfp8_qvm",
    "nvfp4_qmm_n",
    "nvfp4_qmm_t",
    "nvfp4_qmv",
    "nvfp4_qvm",
]


@called_by_core
class Mxfp4QmmT(Kernel):
    """`mxfp4_qmm_t` as a kernel that is compiled once."""

    _op = "mxfp4_qmm_t"

    def __call__(
        self,
        x: Any,
        w: Any,
        scales: Any,
        *,
        accumulate: str = "exact",
        activations: str | None = None,
        out: Any = None,
        input_dtype: str | None = None,
    ) -> Any:
        """Multiply; see `mxfp4_qmm_t`."""
        return _C.matmul_fp(self._plan(), x, w, scales, None, None, accumulate, activations, out, input_dtype)


_mxfp4_qmm_t = Mxfp4QmmT()


def mxfp4_qmm_t(
    x: Any,
    w: Any,
    scales: Any,
    *,
    accumulate: str = "exact",
    activations: str | None = None,
    out: Any = None,
    input_dtype: str | None = None,
) -> Any:
    """Compute x @ W.T for a W of shape (N, K) stored as MXFP4 codes whose groups run along K.

    Parameters
    ----------
    x : array_like of float32, float16, bfloat16 or float64, shape (..., M, K) or (K,)
        Any strides. float64 is computed as float32.
    w : array of uint32, shape (..., N, K / 8)
        Codes as `mxfp4_quantize` packs them; int32 with the same bits is accepted.
    scales : array of uint8 or ml_dtypes' float8_e8m0fnu, shape (..., N, K / 32)
    accumulate : {"exact", "float"}
        How sums are taken. "exact": x is put into block fixed point (22 bits for float32 x, 15 for float16 and
        bfloat16, relative to the largest magnitude of each group), products are summed in integers, without error, and
        one float32 term per group is added in a fixed order. "float": plain float32 sums, whatever x is, with the error
        and the promises of such (see Notes).
    activations : "int8", optional
        Lossy: uses 7 bits of x instead, an error up to 2^-7 of each group's largest magnitude. Only with "exact".
    out : array, optional
        Where to put the result; exact shape and dtype, any strides but 0, no overlap with an input.
    input_dtype : "bfloat16", optional
        Declares that an x of uint16 holds bfloat16 bits.

    Returns
    -------
    numpy.ndarray, shape (..., M, N) or (N,)
        The batch dimensions of x and w broadcast. The dtype is that of x, float32 for float64; bfloat16 is an ml_dtypes
        array if x was one, else uint16 bits.

    Raises
    ------
    TypeError
        If an array has another dtype, or is not in CPU memory.
    ValueError
        If shapes do not agree, or an option is not offered.

    Notes
    -----
    With accumulate="exact" the result is the same bits for every number of threads, instruction set and M: a row of x
    gives the same alone or in any batch.

    There the error of an output is at most the sum over its groups of 2^-p * max|x| * sum|W|, p = 22 for float32 x and
    15 for float16 and bfloat16, plus about one float32 rounding per group, as long as no scale is within a factor 2^31
    of overflowing float32. Weights are used as stored, scale * code, without rounding them first. Rows of x with NaN or
    infinities are computed by plain float32 sums in those groups, at the speed of scalar code; a NaN result is always
    the NaN with bits 0x7fc00000.

    With accumulate="float" the result is the same bits for every number of threads, and each time, for given shapes on
    one instruction set, but not across instruction sets or values of M. As long as no weight overflows float32, and no
    sum of |x| * |W| or of |x| times the numbers that codes stand for, its error is at most about
    (min(K, 256) + K / 16 + 13) * 2^-24 * sum(|x| * |W|), beside what underflow takes from products, and usually far
    less. NaN and infinities go where IEEE arithmetic takes them, at full speed: an output that one has a share in is
    not finite, though it may be NaN where exact arithmetic has an infinity, as where its code is 0.

    Scale 255 is infinity: a group of such a scale gives an infinity, or NaN where its sum of products is 0.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales = q.mxfp4_quantize(6 * np.eye(32, dtype=np.float32))
    >>> q.mxfp4_qmm_t(np.arange(32, dtype=np.float32), codes, scales)[1:4]
    array([ 6., 12., 18.], dtype=float32)
    """
    return _C.matmul_fp(_mxfp4_qmm_t._plan(), x, w, scales, None, None, accumulate, activations, out, input_dtype)


@called_by_core
class Mxfp4QmmN(Kernel):
    """`mxfp4_qmm_n` as a kernel that is compiled once."""

    _op = "mxfp4_qmm_n"

    def __call__(
        self,
        x: Any,
        w: Any,
        scales: Any,
        output_features: int | None = None,
        *,
        accumulate: str = "exact",
        activations: str | None = None,
        out: Any = None,
        input_dtype: str | None = None,
    ) -> Any:
        """Multiply; see `mxfp4_qmm_n`."""
        return _C.matmul_fp(
            self._plan(), x, w, scales, output_features, None, accumulate, activations, out, input_dtype
        )


_mxfp4_qmm_n = Mxfp4QmmN()


def mxfp4_qmm_n(
    x: Any,
    w: Any,
    scales: Any,
    output_features: int | None = None,
    *,
    accumulate: str = "exact",
    activations: str | None = None,
    out: Any = None,
    input_dtype: str | None = None,
) -> Any:
    """Compute x @ W for a W of shape (K, N) stored as MXFP4 codes whose groups run along N.

    Parameters
    ----------
    x : array_like of float32, float16, bfloat16 or float64, shape (..., M, K) or (K,)
        Any K and strides.
    w : array of uint32, shape (..., K, N / 8)
    scales : array of uint8 or ml_dtypes' float8_e8m0fnu, shape (..., K, N / 32)
    output_features : int, optional
        N, checked against w.
    accumulate, activations, out, input_dtype
        As in `mxfp4_qmm_t`.
        With "exact", the products x * scale are formed in float32 here and put into block fixed point, over blocks of
        64 along K, with 21 bits for float32 x.

    Returns
    -------
    numpy.ndarray, shape (..., M, N) or (N,)
        As in `mxfp4_qmm_t`, with the same promise of equal bits.

    Raises
    ------
    TypeError, ValueError
        As in `mxfp4_qmm_t`.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales = q.mxfp4_quantize(6 * np.eye(32, dtype=np.float32))
    >>> q.mxfp4_qmm_n(np.arange(32, dtype=np.float32), codes, scales)[1:4]
    array([ 6., 12., 18.], dtype=float32)
    """
    return _C.matmul_fp(
        _mxfp4_qmm_n._plan(), x, w, scales, output_features, None, accumulate, activations, out, input_dtype
    )


@called_by_core
class Mxfp4Qmv(Kernel):
    """`mxfp4_qmv` as a kernel that is compiled once."""

    _op = "mxfp4_qmv"

    def __call__(
        self,
        x: Any,
        w: Any,
        scales: Any,
        output_features: int | None = None,
        *,
        accumulate: str = "exact",
        activations: str | None = None,
        out: Any = None,
        input_dtype: str | None = None,
    ) -> Any:
        """Multiply; see `mxfp4_qmv`."""
        return _C.matmul_fp(
            self._plan(), x, w, scales, output_features, None, accumulate, activations, out, input_dtype
        )


_mxfp4_qmv = Mxfp4Qmv()


def mxfp4_qmv(
    x: Any,
    w: Any,
    scales: Any,
    output_features: int | None = None,
    *,
    accumulate: str = "exact",
    activations: str | None = None,
    out: Any = None,
    input_dtype: str | None = None,
) -> Any:
    """Compute W @ x for a W of shape (N, K) stored as MXFP4 codes: `mxfp4_qmm_t` by its name for vectors.

    Parameters
    ----------
    x : array_like of float32, float16, bfloat16 or float64, shape (K,) or (..., M, K)
        A vector as a rule, but any M will do.
    w, scales, accumulate, activations, out, input_dtype
        As in `mxfp4_qmm_t`.
    output_features : int, optional
        N, checked against w.

    Returns
    -------
    numpy.ndarray, shape (N,) or (..., M, N)

    Raises
    ------
    TypeError, ValueError
        As in `mxfp4_qmm_t`.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales = q.mxfp4_quantize(6 * np.eye(32, dtype=np.float32))
    >>> q.mxfp4_qmv(np.arange(32, dtype=np.float32), codes, scales, 32)[1:4]
    array([ 6., 12., 18.], dtype=float32)
    """
    return _C.matmul_fp(
        _mxfp4_qmv._plan(), x, w, scales, output_features, None, accumulate, activations, out, input_dtype
    )


@called_by_core
class Mxfp4Qvm(Kernel):
    """`mxfp4_qvm` as a kernel that is compiled once."""

    _op = "mxfp4_qvm"

    def __call__(
        self,
        x: Any,
        w: Any,
        scales: Any,
        output_features: int | None = None,
        *,
        accumulate: str = "exact",
        activations: str | None = None,
        out: Any = None,
        input_dtype: str | None = None,
    ) -> Any:
        """Multiply; see `mxfp4_qvm`."""
        return _C.matmul_fp(
            self._plan(), x, w, scales, output_features, None, accumulate, activations, out, input_dtype
        )


_mxfp4_qvm = Mxfp4Qvm()


def mxfp4_qvm(
    x: Any,
    w: Any,
    scales: Any,
    output_features: int | None = None,
    *,
    accumulate: str = "exact",
    activations: str | None = None,
    out: Any = None,
    input_dtype: str | None = None,
) -> Any:
    """Compute x @ W for a W of shape (K, N) stored as MXFP4 codes: `mxfp4_qmm_n` by its name for vectors.

    Parameters
    ----------
    x : array_like of float32, float16, bfloat16 or float64, shape (K,) or (..., M, K)
        A vector as a rule, but any M will do.
    w, scales, output_features, accumulate, activations, out, input_dtype
        As in `mxfp4_qmm_n`.

    Returns
    -------
    numpy.ndarray, shape (N,) or (..., M, N)

    Raises
    ------
    TypeError, ValueError
        As in `mxfp4_qmm_n`.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales = q.mxfp4_quantize(6 * np.eye(32, dtype=np.float32))
    >>> q.mxfp4_qvm(np.arange(32, dtype=np.float32), codes, scales, 32)[1:4]
    array([ 6., 12., 18.], dtype=float32)
    """
    return _C.matmul_fp(
        _mxfp4_qvm._plan(), x, w, scales, output_features, None, accumulate, activations, out, input_dtype
    )


@called_by_core
class Mxfp8QmmT(Kernel):
    """`mxfp8_qmm_t` as a kernel that is compiled once."""

    _op = "mxfp8_qmm_t"

    def __call__(
        self,
        x: Any,
        w: Any,
        scales: Any,
        *,
        accumulate: str = "exact",
        activations: str | None = None,
        out: Any = None,
        input_dtype: str | None = None,
    ) -> Any:
        """Multiply; see `mxfp8_qmm_t`."""
        return _C.matmul_fp(self._plan(), x, w, scales, None, None, accumulate, activations, out, input_dtype)


_mxfp8_qmm_t = Mxfp8QmmT()


def mxfp8_qmm_t(
    x: Any,
    w: Any,
    scales: Any,
    *,
    accumulate: str = "exact",
    activations: str | None = None,
    out: Any = None,
    input_dtype: str | None = None,
) -> Any:
    """Compute x @ W.T for a W of shape (N, K) stored as MXFP8 codes whose groups run along K.

    Parameters
    ----------
    x : array_like of float32, float16, bfloat16 or float64, shape (..., M, K) or (K,)
        Any strides. float64 is computed as float32.
    w : array of uint32, shape (..., N, K / 4)
        Codes as `mxfp8_quantize` packs them; int32 with the same bits is accepted.
    scales : array of uint8 or ml_dtypes' float8_e8m0fnu, shape (..., N, K / 32)
    accumulate : {"exact", "float"}
        The same here; see Notes.
    activations : None
        "int8" is refused: it would gain nothing.
    out : array, optional
        Where to put the result; exact shape and dtype, any strides but 0, no overlap with an input.
    input_dtype : "bfloat16", optional
        Declares that an x of uint16 holds bfloat16 bits.

    Returns
    -------
    numpy.ndarray, shape (..., M, N) or (N,)
        The batch dimensions of x and w broadcast. The dtype is that of x, float32 for float64; bfloat16 is an ml_dtypes
        array if x was one, else uint16 bits.

    Raises
    ------
    TypeError
        If an array has another dtype, or is not in CPU memory.
    ValueError
        If shapes do not agree, or an option is not offered.

    Notes
    -----
    With accumulate="exact" the result is the same bits for every number of threads, instruction set and M: a row of x
    gives the same alone or in any batch.

    Weights enter as scale * code, which is a float32 without rounding, and are infinite where it overflows. Sums are
    float32, and each product is fused with its addition; their order is fixed: in panels of 256 along K there are 16
    chains, element k belonging to chain k % 16, whose ends are added up in order, and then panel to panel. So the error
    of an output is at most (32 + K / 256) * 2^-24 * sum(|x| * |W|), beside underflow, and usually far less.
    accumulate="float" is the same. NaN and infinities go where IEEE arithmetic takes them; a NaN result is always the
    NaN with bits 0x7fc00000. The codes 0x7f and 0xff are NaN.

    Scale 255 is infinity: a group of such a scale gives infinities, or NaN where a code is 0.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales = q.mxfp8_quantize(6 * np.eye(32, dtype=np.float32))
    >>> q.mxfp8_qmm_t(np.arange(32, dtype=np.float32), codes, scales)[1:4]
    array([ 6., 12., 18.], dtype=float32)
    """
    return _C.matmul_fp(_mxfp8_qmm_t._plan(), x, w, scales, None, None, accumulate, activations, out, input_dtype)


@called_by_core
class Mxfp8QmmN(Kernel):
    """`mxfp8_qmm_n` as a kernel that is compiled once."""

    _op = "mxfp8_qmm_n"

    def __call__(
        self,
        x: Any,
        w: Any,
        scales: Any,
        output_features: int | None = None,
        *,
        accumulate: str = "exact",
        activations: str | None = None,
        out: Any = None,
        input_dtype: str | None = None,
    ) -> Any:
        """Multiply; see `mxfp8_qmm_n`."""
        return _C.matmul_fp(
            self._plan(), x, w, scales, output_features, None, accumulate, activations, out, input_dtype
        )


_mxfp8_qmm_n = Mxfp8QmmN()


def mxfp8_qmm_n(
    x: Any,
    w: Any,
    scales: Any,
    output_features: int | None = None,
    *,
    accumulate: str = "exact",
    activations: str | None = None,
    out: Any = None,
    input_dtype: str | None = None,
) -> Any:
    """Compute x @ W for a W of shape (K, N) stored as MXFP8 codes whose groups run along N.

    Parameters
    ----------
    x : array_like of float32, float16, bfloat16 or float64, shape (..., M, K) or (K,)
        Any K and strides.
    w : array of uint32, shape (..., K, N / 4)
    scales : array of uint8 or ml_dtypes' float8_e8m0fnu, shape (..., K, N / 32)
    output_features : int, optional
        N, checked against w.
    accumulate, activations, out, input_dtype
        As in `mxfp8_qmm_t`.

    Returns
    -------
    numpy.ndarray, shape (..., M, N) or (N,)
        As in `mxfp8_qmm_t`, with the same promise of equal bits.

    Raises
    ------
    TypeError, ValueError
        As in `mxfp8_qmm_t`.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales = q.mxfp8_quantize(6 * np.eye(32, dtype=np.float32))
    >>> q.mxfp8_qmm_n(np.arange(32, dtype=np.float32), codes, scales)[1:4]
    array([ 6., 12., 18.], dtype=float32)
    """
    return _C.matmul_fp(
        _mxfp8_qmm_n._plan(), x, w, scales, output_features, None, accumulate, activations, out, input_dtype
    )


@called_by_core
class Mxfp8Qmv(Kernel):
    """`mxfp8_qmv` as a kernel that is compiled once."""

    _op = "mxfp8_qmv"

    def __call__(
        self,
        x: Any,
        w: Any,
        scales: Any,
        output_features: int | None = None,
        *,
        accumulate: str = "exact",
        activations: str | None = None,
        out: Any = None,
        input_dtype: str | None = None,
    ) -> Any:
        """Multiply; see `mxfp8_qmv`."""
        return _C.matmul_fp(
            self._plan(), x, w, scales, output_features, None, accumulate, activations, out, input_dtype
        )


_mxfp8_qmv = Mxfp8Qmv()


def mxfp8_qmv(
    x: Any,
    w: Any,
    scales: Any,
    output_features: int | None = None,
    *,
    accumulate: str = "exact",
    activations: str | None = None,
    out: Any = None,
    input_dtype: str | None = None,
) -> Any:
    """Compute W @ x for a W of shape (N, K) stored as MXFP8 codes: `mxfp8_qmm_t` by its name for vectors.

    Parameters
    ----------
    x : array_like of float32, float16, bfloat16 or float64, shape (K,) or (..., M, K)
        A vector as a rule, but any M will do.
    w, scales, accumulate, activations, out, input_dtype
        As in `mxfp8_qmm_t`.
    output_features : int, optional
        N, checked against w.

    Returns
    -------
    numpy.ndarray, shape (N,) or (..., M, N)

    Raises
    ------
    TypeError, ValueError
        As in `mxfp8_qmm_t`.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales = q.mxfp8_quantize(6 * np.eye(32, dtype=np.float32))
    >>> q.mxfp8_qmv(np.arange(32, dtype=np.float32), codes, scales, 32)[1:4]
    array([ 6., 12., 18.], dtype=float32)
    """
    return _C.matmul_fp(
        _mxfp8_qmv._plan(), x, w, scales, output_features, None, accumulate, activations, out, input_dtype
    )


@called_by_core
class Mxfp8Qvm(Kernel):
    """`mxfp8_qvm` as a kernel that is compiled once."""

    _op = "mxfp8_qvm"

    def __call__(
        self,
        x: Any,
        w: Any,
        scales: Any,
        output_features: int | None = None,
        *,
        accumulate: str = "exact",
        activations: str | None = None,
        out: Any = None,
        input_dtype: str | None = None,
    ) -> Any:
        """Multiply; see `mxfp8_qvm`."""
        return _C.matmul_fp(
            self._plan(), x, w, scales, output_features, None, accumulate, activations, out, input_dtype
        )


_mxfp8_qvm = Mxfp8Qvm()


def mxfp8_qvm(
    x: Any,
    w: Any,
    scales: Any,
    output_features: int | None = None,
    *,
    accumulate: str = "exact",
    activations: str | None = None,
    out: Any = None,
    input_dtype: str | None = None,
) -> Any:
    """Compute x @ W for a W of shape (K, N) stored as MXFP8 codes: `mxfp8_qmm_n` by its name for vectors.

    Parameters
    ----------
    x : array_like of float32, float16, bfloat16 or float64, shape (K,) or (..., M, K)
        A vector as a rule, but any M will do.
    w, scales, output_features, accumulate, activations, out, input_dtype
        As in `mxfp8_qmm_n`.

    Returns
    -------
    numpy.ndarray, shape (N,) or (..., M, N)

    Raises
    ------
    TypeError, ValueError
        As in `mxfp8_qmm_n`.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales = q.mxfp8_quantize(6 * np.eye(32, dtype=np.float32))
    >>> q.mxfp8_qvm(np.arange(32, dtype=np.float32), codes, scales, 32)[1:4]
    array([ 6., 12., 18.], dtype=float32)
    """
    return _C.matmul_fp(
        _mxfp8_qvm._plan(), x, w, scales, output_features, None, accumulate, activations, out, input_dtype
    )


@called_by_core
class Nvfp4QmmT(Kernel):
    """`nvfp4_qmm_t` as a kernel that is compiled once."""

    _op = "nvfp4_qmm_t"

    def __call__(
        self,
        x: Any,
        w: Any,
        scales: Any,
        *,
        global_scale: float | None = None,
        accumulate: str = "exact",
        activations: str | None = None,
        out: Any = None,
        input_dtype: str | None = None,
    ) -> Any:
        """Multiply; see `nvfp4_qmm_t`."""
        return _C.matmul_fp(self._plan(), x, w, scales, None, global_scale, accumulate, activations, out, input_dtype)


_nvfp4_qmm_t = Nvfp4QmmT()


def nvfp4_qmm_t(
    x: Any,
    w: Any,
    scales: Any,
    *,
    global_scale: float | None = None,
    accumulate: str = "exact",
    activations: str | None = None,
    out: Any = None,
    input_dtype: str | None = None,
) -> Any:
    """Compute x @ W.T for a W of shape (N, K) stored as NVFP4 codes whose groups run along K.

    Parameters
    ----------
    x : array_like of float32, float16, bfloat16 or float64, shape (..., M, K) or (K,)
        Any strides. float64 is computed as float32.
    w : array of uint32, shape (..., N, K / 8)
        Codes as `nvfp4_quantize` packs them; int32 with the same bits is accepted.
    scales : array of uint8 or ml_dtypes' float8_e4m3fn, shape (..., N, K / 16)
    global_scale : float, optional
        What `nvfp4_quantize` was given.
    accumulate : {"exact", "float"}
        How sums are taken. "exact": x is put into block fixed point (22 bits for float32 x, 15 for float16 and
        bfloat16, relative to the largest magnitude of each group), products are summed in integers, without error, and
        one float32 term per group is added in a fixed order. "float": plain float32 sums, whatever x is, with the error
        and the promises of such (see Notes).
    activations : "int8", optional
        Lossy: uses 7 bits of x instead, an error up to 2^-7 of each group's largest magnitude. Only with "exact".
    out : array, optional
        Where to put the result; exact shape and dtype, any strides but 0, no overlap with an input.
    input_dtype : "bfloat16", optional
        Declares that an x of uint16 holds bfloat16 bits.

    Returns
    -------
    numpy.ndarray, shape (..., M, N) or (N,)
        The batch dimensions of x and w broadcast. The dtype is that of x, float32 for float64; bfloat16 is an ml_dtypes
        array if x was one, else uint16 bits.

    Raises
    ------
    TypeError
        If an array has another dtype, or is not in CPU memory.
    ValueError
        If shapes do not agree, or an option is not offered.

    Notes
    -----
    With accumulate="exact" the result is the same bits for every number of threads, instruction set and M: a row of x
    gives the same alone or in any batch.

    There the error of an output is at most the sum over its groups of 2^-p * max|x| * sum|W|, p = 22 for float32 x and
    15 for float16 and bfloat16, plus about one float32 rounding per group, as long as no scale is within a factor 2^31
    of overflowing float32. Weights are used as stored, scale * code, without rounding them first. Rows of x with NaN or
    infinities are computed by plain float32 sums in those groups, at the speed of scalar code; a NaN result is always
    the NaN with bits 0x7fc00000.

    With accumulate="float" the result is the same bits for every number of threads, and each time, for given shapes on
    one instruction set, but not across instruction sets or values of M. As long as no weight overflows float32, and no
    sum of |x| * |W| or of |x| times the numbers that codes stand for, its error is at most about
    (min(K, 256) + K / 16 + 13) * 2^-24 * sum(|x| * |W|), beside what underflow takes from products, and usually far
    less. NaN and infinities go where IEEE arithmetic takes them, at full speed: an output that one has a share in is
    not finite, though it may be NaN where exact arithmetic has an infinity, as where its code is 0.

    Scales 0x7f and 0xff are NaN. With a global scale, all results are multiplied by float32(global_scale / 2688) at the
    end.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales = q.nvfp4_quantize(6 * np.eye(32, dtype=np.float32))
    >>> q.nvfp4_qmm_t(np.arange(32, dtype=np.float32), codes, scales)[1:4]
    array([ 6., 12., 18.], dtype=float32)
    """
    return _C.matmul_fp(
        _nvfp4_qmm_t._plan(), x, w, scales, None, global_scale, accumulate, activations, out, input_dtype
    )


@called_by_core
class Nvfp4QmmN(Kernel):
    """`nvfp4_qmm_n` as a kernel that is compiled once."""

    _op = "nvfp4_qmm_n"

    def __call__(
        self,
        x: Any,
        w: Any,
        scales: Any,
        output_features: int | None = None,
        *,
        global_scale: float | None = None,
        accumulate: str = "exact",
        activations: str | None = None,
        out: Any = None,
        input_dtype: str | None = None,
    ) -> Any:
        """Multiply; see `nvfp4_qmm_n`."""
        return _C.matmul_fp(
            self._plan(), x, w, scales, output_features, global_scale, accumulate, activations, out, input_dtype
        )


_nvfp4_qmm_n = Nvfp4QmmN()


def nvfp4_qmm_n(
    x: Any,
    w: Any,
    scales: Any,
    output_features: int | None = None,
    *,
    global_scale: float | None = None,
    accumulate: str = "exact",
    activations: str | None = None,
    out: Any = None,
    input_dtype: str | None = None,
) -> Any:
    """Compute x @ W for a W of shape (K, N) stored as NVFP4 codes whose groups run along N.

    Parameters
    ----------
    x : array_like of float32, float16, bfloat16 or float64, shape (..., M, K) or (K,)
        Any K and strides.
    w : array of uint32, shape (..., K, N / 8)
    scales : array of uint8 or ml_dtypes' float8_e4m3fn, shape (..., K, N / 16)
    output_features : int, optional
        N, checked against w.
    global_scale, accumulate, activations, out, input_dtype
        As in `nvfp4_qmm_t`.
        With "exact", the products x * scale are formed in float32 here and put into block fixed point, over blocks of
        64 along K, with 21 bits for float32 x.

    Returns
    -------
    numpy.ndarray, shape (..., M, N) or (N,)
        As in `nvfp4_qmm_t`, with the same promise of equal bits.

    Raises
    ------
    TypeError, ValueError
        As in `nvfp4_qmm_t`.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales = q.nvfp4_quantize(6 * np.eye(32, dtype=np.float32))
    >>> q.nvfp4_qmm_n(np.arange(32, dtype=np.float32), codes, scales)[1:4]
    array([ 6., 12., 18.], dtype=float32)
    """
    return _C.matmul_fp(
        _nvfp4_qmm_n._plan(), x, w, scales, output_features, global_scale, accumulate, activations, out, input_dtype
    )


@called_by_core
class Nvfp4Qmv(Kernel):
    """`nvfp4_qmv` as a kernel that is compiled once."""

    _op = "nvfp4_qmv"

    def __call__(
        self,
        x: Any,
        w: Any,
        scales: Any,
        output_features: int | None = None,
        *,
        global_scale: float | None = None,
        accumulate: str = "exact",
        activations: str | None = None,
        out: Any = None,
        input_dtype: str | None = None,
    ) -> Any:
        """Multiply; see `nvfp4_qmv`."""
        return _C.matmul_fp(
            self._plan(), x, w, scales, output_features, global_scale, accumulate, activations, out, input_dtype
        )


_nvfp4_qmv = Nvfp4Qmv()


def nvfp4_qmv(
    x: Any,
    w: Any,
    scales: Any,
    output_features: int | None = None,
    *,
    global_scale: float | None = None,
    accumulate: str = "exact",
    activations: str | None = None,
    out: Any = None,
    input_dtype: str | None = None,
) -> Any:
    """Compute W @ x for a W of shape (N, K) stored as NVFP4 codes: `nvfp4_qmm_t` by its name for vectors.

    Parameters
    ----------
    x : array_like of float32, float16, bfloat16 or float64, shape (K,) or (..., M, K)
        A vector as a rule, but any M will do.
    w, scales, global_scale, accumulate, activations, out, input_dtype
        As in `nvfp4_qmm_t`.
    output_features : int, optional
        N, checked against w.

    Returns
    -------
    numpy.ndarray, shape (N,) or (..., M, N)

    Raises
    ------
    TypeError, ValueError
        As in `nvfp4_qmm_t`.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales = q.nvfp4_quantize(6 * np.eye(32, dtype=np.float32))
    >>> q.nvfp4_qmv(np.arange(32, dtype=np.float32), codes, scales, 32)[1:4]
    array([ 6., 12., 18.], dtype=float32)
    """
    return _C.matmul_fp(
        _nvfp4_qmv._plan(), x, w, scales, output_features, global_scale, accumulate, activations, out, input_dtype
    )


@called_by_core
class Nvfp4Qvm(Kernel):
    """`nvfp4_qvm` as a kernel that is compiled once."""

    _op = "nvfp4_qvm"

    def __call__(
        self,
        x: Any,
        w: Any,
        scales: Any,
        output_features: int | None = None,
        *,
        global_scale: float | None = None,
        accumulate: str = "exact",
        activations: str | None = None,
        out: Any = None,
        input_dtype: str | None = None,
    ) -> Any:
        """Multiply; see `nvfp4_qvm`."""
        return _C.matmul_fp(
            self._plan(), x, w, scales, output_features, global_scale, accumulate, activations, out, input_dtype
        )


_nvfp4_qvm = Nvfp4Qvm()


def nvfp4_qvm(
    x: Any,
    w: Any,
    scales: Any,
    output_features: int | None = None,
    *,
    global_scale: float | None = None,
    accumulate: str = "exact",
    activations: str | None = None,
    out: Any = None,
    input_dtype: str | None = None,
) -> Any:
    """Compute x @ W for a W of shape (K, N) stored as NVFP4 codes: `nvfp4_qmm_n` by its name for vectors.

    Parameters
    ----------
    x : array_like of float32, float16, bfloat16 or float64, shape (K,) or (..., M, K)
        A vector as a rule, but any M will do.
    w, scales, output_features, global_scale, accumulate, activations, out, input_dtype
        As in `nvfp4_qmm_n`.

    Returns
    -------
    numpy.ndarray, shape (N,) or (..., M, N)

    Raises
    ------
    TypeError, ValueError
        As in `nvfp4_qmm_n`.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales = q.nvfp4_quantize(6 * np.eye(32, dtype=np.float32))
    >>> q.nvfp4_qvm(np.arange(32, dtype=np.float32), codes, scales, 32)[1:4]
    array([ 6., 12., 18.], dtype=float32)
    """
    return _C.matmul_fp(
        _nvfp4_qvm._plan(), x, w, scales, output_features, global_scale, accumulate, activations, out, input_dtype
    )
