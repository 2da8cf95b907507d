"""Matrix products with weights in MLX's formats of small floats that indices choose, as in mixtures of experts."""

# Written by src/fp_functions.py, which defines each operation once for all formats: change that and run it.

from __future__ import annotations

from typing import Any

from . import _C
from ._kernel import Kernel, called_by_core

__all__ = [
    "Mxfp4GatherQmm",
    "Mxfp4GatherQmmRhs",
    "Mxfp8GatherQmm",
    "Mxfp8GatherQmmRhs",
    "Nvfp4GatherQmm",
    "Nvfp4GatherQmmRhs",
    "mxfp4_gather_qmm",
    "mxfp4_gather_qmm_rhs",
    "mxfp8_gather_qmm",
    "mxfp8_gather_qmm_rhs",
    "nvfp4_gather_qmm",
    "nvfp4_gather_qmm_rhs",
]


@called_by_core
class Mxfp4GatherQmm(Kernel):
    """`mxfp4_gather_qmm` as a kernel that is compiled once."""

    _op = "mxfp4_gather_qmm"

    def __call__(
        self,
        x: Any,
        w: Any,
        scales: Any,
        lhs_indices: Any = None,
        rhs_indices: Any = None,
        transpose: bool = True,
        *,
        sorted_indices: bool = False,
        accumulate: str = "exact",
        activations: str | None = None,
        out: Any = None,
        input_dtype: str | None = None,
    ) -> Any:
        """Multiply; see `mxfp4_gather_qmm`."""
        return _C.gather_fp(
            self._plan(),
            x,
            w,
            scales,
            lhs_indices,
            rhs_indices,
            transpose,
            sorted_indices,
            None,
            accumulate,
            activations,
            out,
            input_dtype,
        )


_mxfp4_gather_qmm = Mxfp4GatherQmm()


def mxfp4_gather_qmm(
    x: Any,
    w: Any,
    scales: Any,
    lhs_indices: Any = None,
    rhs_indices: Any = None,
    transpose: bool = True,
    *,
    sorted_indices: bool = False,
    accumulate: str = "exact",
    activations: str | None = None,
    out: Any = None,
    input_dtype: str | None = None,
) -> Any:
    """Multiply some matrices of x by some MXFP4 matrices, which indices choose; see `affine_gather_qmm`.

    Parameters
    ----------
    x : array_like of float32, float16, bfloat16 or float64, shape (..., M, K)
        Any strides. float64 is computed as float32.
    w : array of uint32, shape (..., N, K / 8), or (..., K, N / 8) where transpose is False
        Codes as `mxfp4_quantize` packs them; int32 with the same bits is accepted.
    scales : array of uint8 or ml_dtypes' float8_e8m0fnu
        Of w's shape but for its last axis, which has an element for each group of 32.
    lhs_indices, rhs_indices : array_like of integers, optional
        Which matrices of x and of w, counted through their batch dimensions in C order; negative ones count from the
        end. The shapes of both broadcast. Left out: every one, in the shape of the batch.
    transpose : bool
        Whether W is transposed: its groups run along K then, else along N.
    sorted_indices : bool
        Says that rhs_indices rise. Nothing depends on it.
    accumulate, activations, out, input_dtype
        As in `mxfp4_qmm_t`.

    Returns
    -------
    numpy.ndarray, shape (*indices, M, N)
        In the dtype that `mxfp4_qmm_t` or `mxfp4_qmm_n` gives, and with accumulate="exact", the default, with the bits
        that it gives for each pair alone.
        With accumulate="float" the bits depend on how many rows of x meet the same weights, not on threads.

    Raises
    ------
    TypeError
        If an array has another dtype, or is not in CPU memory.
    ValueError
        If shapes do not agree, or an option is not offered.
    IndexError
        If an index is out of range. Every index is checked before anything is computed.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales = q.mxfp4_quantize(np.stack([scale * np.eye(32, dtype=np.float32) for scale in (6, 12, 24)]))
    >>> q.mxfp4_gather_qmm(np.full((1, 32), 0.5, np.float32), codes, scales, rhs_indices=[[2, 0]])[:, :, 0, 7]
    array([[12.,  3.]], dtype=float32)
    """
    return _C.gather_fp(
        _mxfp4_gather_qmm._plan(),
        x,
        w,
        scales,
        lhs_indices,
        rhs_indices,
        transpose,
        sorted_indices,
        None,
        accumulate,
        activations,
        out,
        input_dtype,
    )


@called_by_core
class Mxfp4GatherQmmRhs(Kernel):
    """`mxfp4_gather_qmm_rhs` as a kernel that is compiled once."""

    _op = "mxfp4_gather_qmm_rhs"

    def __call__(
        self,
        x: Any,
        w: Any,
        scales: Any,
        indices: Any,
        output_features: int | None = None,
        transpose: bool = True,
        *,
        accumulate: str = "exact",
        activations: str | None = None,
        out: Any = None,
        input_dtype: str | None = None,
    ) -> Any:
        """Multiply; see `mxfp4_gather_qmm_rhs`."""
        return _C.gather_rhs_fp(
            self._plan(),
            x,
            w,
            scales,
            indices,
            output_features,
            transpose,
            None,
            accumulate,
            activations,
            out,
            input_dtype,
        )


_mxfp4_gather_qmm_rhs = Mxfp4GatherQmmRhs()


def mxfp4_gather_qmm_rhs(
    x: Any,
    w: Any,
    scales: Any,
    indices: Any,
    output_features: int | None = None,
    transpose: bool = True,
    *,
    accumulate: str = "exact",
    activations: str | None = None,
    out: Any = None,
    input_dtype: str | None = None,
) -> Any:
    """Multiply each row of x by the MXFP4 matrix that its index chooses; see `affine_gather_qmm_rhs`.

    Parameters
    ----------
    x : array_like of float32, float16, bfloat16 or float64, shape (..., K)
        Any strides. float64 is computed as float32.
    w : array of uint32, shape (..., N, K / 8), or (..., K, N / 8) where transpose is False
        Codes as `mxfp4_quantize` packs them; int32 with the same bits is accepted.
    scales : array of uint8 or ml_dtypes' float8_e8m0fnu
        Of w's shape but for its last axis, which has an element for each group of 32.
    indices : array_like of integers
        Which matrices of w, counted through its batch dimensions in C order; negative ones count from the end.
    output_features : int, optional
        N, checked against w.
    transpose : bool
        Whether W is transposed: its groups run along K then, else along N.
    accumulate, activations, out, input_dtype
        As in `mxfp4_qmm_t`.

    Returns
    -------
    numpy.ndarray, shape (..., N)
        In the dtype that `mxfp4_qmm_t` or `mxfp4_qmm_n` gives, and with accumulate="exact", the default, with the bits
        that it gives for each pair alone.
        With accumulate="float" the bits depend on how many rows of x meet the same weights, not on threads.

    Raises
    ------
    TypeError
        If an array has another dtype, or is not in CPU memory.
    ValueError
        If shapes do not agree, or an option is not offered.
    IndexError
        If an index is out of range. Every index is checked before anything is computed.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales = q.mxfp4_quantize(np.stack([scale * np.eye(32, dtype=np.float32) for scale in (6, 12, 24)]))
    >>> q.mxfp4_gather_qmm_rhs(np.full((3, 32), 0.5, np.float32), codes, scales, [2, 0, 1])[:, 7]
    array([12.,  3.,  6.], dtype=float32)
    """
    return _C.gather_rhs_fp(
        _mxfp4_gather_qmm_rhs._plan(),
        x,
        w,
        scales,
        indices,
        output_features,
        transpose,
        None,
        accumulate,
        activations,
        out,
        input_dtype,
    )


@called_by_core
class Mxfp8GatherQmm(Kernel):
    """`mxfp8_gather_qmm` as a kernel that is compiled once."""

    _op = "mxfp8_gather_qmm"

    def __call__(
        self,
        x: Any,
        w: Any,
        scales: Any,
        lhs_indices: Any = None,
        rhs_indices: Any = None,
        transpose: bool = True,
        *,
        sorted_indices: bool = False,
        accumulate: str = "exact",
        activations: str | None = None,
        out: Any = None,
        input_dtype: str | None = None,
    ) -> Any:
        """Multiply; see `mxfp8_gather_qmm`."""
        return _C.gather_fp(
            self._plan(),
            x,
            w,
            scales,
            lhs_indices,
            rhs_indices,
            transpose,
            sorted_indices,
            None,
            accumulate,
            activations,
            out,
            input_dtype,
        )


_mxfp8_gather_qmm = Mxfp8GatherQmm()


def mxfp8_gather_qmm(
    x: Any,
    w: Any,
    scales: Any,
    lhs_indices: Any = None,
    rhs_indices: Any = None,
    transpose: bool = True,
    *,
    sorted_indices: bool = False,
    accumulate: str = "exact",
    activations: str | None = None,
    out: Any = None,
    input_dtype: str | None = None,
) -> Any:
    """Multiply some matrices of x by some MXFP8 matrices, which indices choose; see `affine_gather_qmm`.

    Parameters
    ----------
    x : array_like of float32, float16, bfloat16 or float64, shape (..., M, K)
        Any strides. float64 is computed as float32.
    w : array of uint32, shape (..., N, K / 4), or (..., K, N / 4) where transpose is False
        Codes as `mxfp8_quantize` packs them; int32 with the same bits is accepted.
    scales : array of uint8 or ml_dtypes' float8_e8m0fnu
        Of w's shape but for its last axis, which has an element for each group of 32.
    lhs_indices, rhs_indices : array_like of integers, optional
        Which matrices of x and of w, counted through their batch dimensions in C order; negative ones count from the
        end. The shapes of both broadcast. Left out: every one, in the shape of the batch.
    transpose : bool
        Whether W is transposed: its groups run along K then, else along N.
    sorted_indices : bool
        Says that rhs_indices rise. Nothing depends on it.
    accumulate, activations, out, input_dtype
        As in `mxfp8_qmm_t`.

    Returns
    -------
    numpy.ndarray, shape (*indices, M, N)
        In the dtype that `mxfp8_qmm_t` or `mxfp8_qmm_n` gives, and with accumulate="exact", the default, with the bits
        that it gives for each pair alone.

    Raises
    ------
    TypeError
        If an array has another dtype, or is not in CPU memory.
    ValueError
        If shapes do not agree, or an option is not offered.
    IndexError
        If an index is out of range. Every index is checked before anything is computed.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales = q.mxfp8_quantize(np.stack([scale * np.eye(32, dtype=np.float32) for scale in (6, 12, 24)]))
    >>> q.mxfp8_gather_qmm(np.full((1, 32), 0.5, np.float32), codes, scales, rhs_indices=[[2, 0]])[:, :, 0, 7]
    array([[12.,  3.]], dtype=float32)
    """
    return _C.gather_fp(
        _mxfp8_gather_qmm._plan(),
        x,
        w,
        scales,
        lhs_indices,
        rhs_indices,
        transpose,
        sorted_indices,
        None,
        accumulate,
        activations,
        out,
        input_dtype,
    )


@called_by_core
class Mxfp8GatherQmmRhs(Kernel):
    """`mxfp8_gather_qmm_rhs` as a kernel that is compiled once."""

    _op = "mxfp8_gather_qmm_rhs"

    def __call__(
        self,
        x: Any,
        w: Any,
        scales: Any,
        indices: Any,
        output_features: int | None = None,
        transpose: bool = True,
        *,
        accumulate: str = "exact",
        activations: str | None = None,
        out: Any = None,
        input_dtype: str | None = None,
    ) -> Any:
        """Multiply; see `mxfp8_gather_qmm_rhs`."""
        return _C.gather_rhs_fp(
            self._plan(),
            x,
            w,
            scales,
            indices,
            output_features,
            transpose,
            None,
            accumulate,
            activations,
            out,
            input_dtype,
        )


_mxfp8_gather_qmm_rhs = Mxfp8GatherQmmRhs()


def mxfp8_gather_qmm_rhs(
    x: Any,
    w: Any,
    scales: Any,
    indices: Any,
    output_features: int | None = None,
    transpose: bool = True,
    *,
    accumulate: str = "exact",
    activations: str | None = None,
    out: Any = None,
    input_dtype: str | None = None,
) -> Any:
    """Multiply each row of x by the MXFP8 matrix that its index chooses; see `affine_gather_qmm_rhs`.

    Parameters
    ----------
    x : array_like of float32, float16, bfloat16 or float64, shape (..., K)
        Any strides. float64 is computed as float32.
    w : array of uint32, shape (..., N, K / 4), or (..., K, N / 4) where transpose is False
        Codes as `mxfp8_quantize` packs them; int32 with the same bits is accepted.
    scales : array of uint8 or ml_dtypes' float8_e8m0fnu
        Of w's shape but for its last axis, which has an element for each group of 32.
    indices : array_like of integers
        Which matrices of w, counted through its batch dimensions in C order; negative ones count from the end.
    output_features : int, optional
        N, checked against w.
    transpose : bool
        Whether W is transposed: its groups run along K then, else along N.
    accumulate, activations, out, input_dtype
        As in `mxfp8_qmm_t`.

    Returns
    -------
    numpy.ndarray, shape (..., N)
        In the dtype that `mxfp8_qmm_t` or `mxfp8_qmm_n` gives, and with accumulate="exact", the default, with the bits
        that it gives for each pair alone.

    Raises
    ------
    TypeError
        If an array has another dtype, or is not in CPU memory.
    ValueError
        If shapes do not agree, or an option is not offered.
    IndexError
        If an index is out of range. Every index is checked before anything is computed.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales = q.mxfp8_quantize(np.stack([scale * np.eye(32, dtype=np.float32) for scale in (6, 12, 24)]))
    >>> q.mxfp8_gather_qmm_rhs(np.full((3, 32), 0.5, np.float32), codes, scales, [2, 0, 1])[:, 7]
    array([12.,  3.,  6.], dtype=float32)
    """
    return _C.gather_rhs_fp(
        _mxfp8_gather_qmm_rhs._plan(),
        x,
        w,
        scales,
        indices,
        output_features,
        transpose,
        None,
        accumulate,
        activations,
        out,
        input_dtype,
    )


@called_by_core
class Nvfp4GatherQmm(Kernel):
    """`nvfp4_gather_qmm` as a kernel that is compiled once."""

    _op = "nvfp4_gather_qmm"

    def __call__(
        self,
        x: Any,
        w: Any,
        scales: Any,
        lhs_indices: Any = None,
        rhs_indices: Any = None,
        transpose: bool = True,
        *,
        sorted_indices: bool = False,
        global_scale: float | None = None,
        accumulate: str = "exact",
        activations: str | None = None,
        out: Any = None,
        input_dtype: str | None = None,
    ) -> Any:
        """Multiply; see `nvfp4_gather_qmm`."""
        return _C.gather_fp(
            self._plan(),
            x,
            w,
            scales,
            lhs_indices,
            rhs_indices,
            transpose,
            sorted_indices,
            global_scale,
            accumulate,
            activations,
            out,
            input_dtype,
        )


_nvfp4_gather_qmm = Nvfp4GatherQmm()


def nvfp4_gather_qmm(
    x: Any,
    w: Any,
    scales: Any,
    lhs_indices: Any = None,
    rhs_indices: Any = None,
    transpose: bool = True,
    *,
    sorted_indices: bool = False,
    global_scale: float | None = None,
    accumulate: str = "exact",
    activations: str | None = None,
    out: Any = None,
    input_dtype: str | None = None,
) -> Any:
    """Multiply some matrices of x by some NVFP4 matrices, which indices choose; see `affine_gather_qmm`.

    Parameters
    ----------
    x : array_like of float32, float16, bfloat16 or float64, shape (..., M, K)
        Any strides. float64 is computed as float32.
    w : array of uint32, shape (..., N, K / 8), or (..., K, N / 8) where transpose is False
        Codes as `nvfp4_quantize` packs them; int32 with the same bits is accepted.
    scales : array of uint8 or ml_dtypes' float8_e4m3fn
        Of w's shape but for its last axis, which has an element for each group of 16.
    lhs_indices, rhs_indices : array_like of integers, optional
        Which matrices of x and of w, counted through their batch dimensions in C order; negative ones count from the
        end. The shapes of both broadcast. Left out: every one, in the shape of the batch.
    transpose : bool
        Whether W is transposed: its groups run along K then, else along N.
    sorted_indices : bool
        Says that rhs_indices rise. Nothing depends on it.
    global_scale : float, optional
        What `nvfp4_quantize` was given, one for all matrices of w.
    accumulate, activations, out, input_dtype
        As in `nvfp4_qmm_t`.

    Returns
    -------
    numpy.ndarray, shape (*indices, M, N)
        In the dtype that `nvfp4_qmm_t` or `nvfp4_qmm_n` gives, and with accumulate="exact", the default, with the bits
        that it gives for each pair alone.
        With accumulate="float" the bits depend on how many rows of x meet the same weights, not on threads.

    Raises
    ------
    TypeError
        If an array has another dtype, or is not in CPU memory.
    ValueError
        If shapes do not agree, or an option is not offered.
    IndexError
        If an index is out of range. Every index is checked before anything is computed.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales = q.nvfp4_quantize(np.stack([scale * np.eye(32, dtype=np.float32) for scale in (6, 12, 24)]))
    >>> q.nvfp4_gather_qmm(np.full((1, 32), 0.5, np.float32), codes, scales, rhs_indices=[[2, 0]])[:, :, 0, 7]
    array([[12.,  3.]], dtype=float32)
    """
    return _C.gather_fp(
        _nvfp4_gather_qmm._plan(),
        x,
        w,
        scales,
        lhs_indices,
        rhs_indices,
        transpose,
        sorted_indices,
        global_scale,
        accumulate,
        activations,
        out,
        input_dtype,
    )


@called_by_core
class Nvfp4GatherQmmRhs(Kernel):
    """`nvfp4_gather_qmm_rhs` as a kernel that is compiled once."""

    _op = "nvfp4_gather_qmm_rhs"

    def __call__(
        self,
        x: Any,
        w: Any,
        scales: Any,
        indices: Any,
        output_features: int | None = None,
        transpose: bool = True,
        *,
        global_scale: float | None = None,
        accumulate: str = "exact",
        activations: str | None = None,
        out: Any = None,
        input_dtype: str | None = None,
    ) -> Any:
        """Multiply; see `nvfp4_gather_qmm_rhs`."""
        return _C.gather_rhs_fp(
            self._plan(),
            x,
            w,
            scales,
            indices,
            output_features,
            transpose,
            global_scale,
            accumulate,
            activations,
            out,
            input_dtype,
        )


_nvfp4_gather_qmm_rhs = Nvfp4GatherQmmRhs()


def nvfp4_gather_qmm_rhs(
    x: Any,
    w: Any,
    scales: Any,
    indices: Any,
    output_features: int | None = None,
    transpose: bool = True,
    *,
    global_scale: float | None = None,
    accumulate: str = "exact",
    activations: str | None = None,
    out: Any = None,
    input_dtype: str | None = None,
) -> Any:
    """Multiply each row of x by the NVFP4 matrix that its index chooses; see `affine_gather_qmm_rhs`.

    Parameters
    ----------
    x : array_like of float32, float16, bfloat16 or float64, shape (..., K)
        Any strides. float64 is computed as float32.
    w : array of uint32, shape (..., N, K / 8), or (..., K, N / 8) where transpose is False
        Codes as `nvfp4_quantize` packs them; int32 with the same bits is accepted.
    scales : array of uint8 or ml_dtypes' float8_e4m3fn
        Of w's shape but for its last axis, which has an element for each group of 16.
    indices : array_like of integers
        Which matrices of w, counted through its batch dimensions in C order; negative ones count from the end.
    output_features : int, optional
        N, checked against w.
    transpose : bool
        Whether W is transposed: its groups run along K then, else along N.
    global_scale : float, optional
        What `nvfp4_quantize` was given, one for all matrices of w.
    accumulate, activations, out, input_dtype
        As in `nvfp4_qmm_t`.

    Returns
    -------
    numpy.ndarray, shape (..., N)
        In the dtype that `nvfp4_qmm_t` or `nvfp4_qmm_n` gives, and with accumulate="exact", the default, with the bits
        that it gives for each pair alone.
        With accumulate="float" the bits depend on how many rows of x meet the same weights, not on threads.

    Raises
    ------
    TypeError
        If an array has another dtype, or is not in CPU memory.
    ValueError
        If shapes do not agree, or an option is not offered.
    IndexError
        If an index is out of range. Every index is checked before anything is computed.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales = q.nvfp4_quantize(np.stack([scale * np.eye(32, dtype=np.float32) for scale in (6, 12, 24)]))
    >>> q.nvfp4_gather_qmm_rhs(np.full((3, 32), 0.5, np.float32), codes, scales, [2, 0, 1])[:, 7]
    array([12.,  3.,  6.], dtype=float32)
    """
    return _C.gather_rhs_fp(
        _nvfp4_gather_qmm_rhs._plan(),
        x,
        w,
        scales,
        indices,
        output_features,
        transpose,
        global_scale,
        accumulate,
        activations,
        out,
        input_dtype,
    )
