"""Quantization to MLX's formats of small floats, mxfp4, mxfp8 and nvfp4, and its inverse."""

# Written by src/fp_functions.py, which defines each operation once for all formats: change that and run it.

from __future__ import annotations

from typing import Any

from . import _C
from ._kernel import Kernel, called_by_core

__all__ = [
    "Mxfp4Dequantize",
    "Mxfp4Quantize",
    "Mxfp8Dequantize",
    "Mxfp8Quantize",
    "Nvfp4Dequantize",
    "Nvfp4Quantize",
    "mxfp4_dequantize",
    "mxfp4_quantize",
    "mxfp8_dequantize",
    "mxfp8_quantize",
    "nvfp4_dequantize",
    "nvfp4_quantize",
]


@called_by_core
class Mxfp4Quantize(Kernel):
    """`mxfp4_quantize` as a kernel that is compiled once."""

    _op = "mxfp4_quantize"

    def __call__(
        self,
        w: Any,
        *,
        profile: str = "metal",
        mx_scale: str = "up",
        pad: bool = False,
        out: Any = None,
        input_dtype: str | None = None,
    ) -> tuple[Any, Any]:
        """Quantize w; see `mxfp4_quantize`."""
        return _C.quantize_fp(self._plan(), w, profile, mx_scale, None, pad, out, input_dtype)


_mxfp4_quantize = Mxfp4Quantize()


def mxfp4_quantize(
    w: Any,
    *,
    profile: str = "metal",
    mx_scale: str = "up",
    pad: bool = False,
    out: Any = None,
    input_dtype: str | None = None,
) -> tuple[Any, Any]:
    """Quantize groups of 32 of the last axis to FP4 (E2M1) with a power of two per group (OCP's MXFP4).

    Parameters
    ----------
    w : array_like of float32, float16, bfloat16 or float64, shape (..., K)
        The weights; any strides. K must be a multiple of 32 unless `pad` is true. float64 is computed as float32.
    profile : {"metal", "cpu"}, default "metal"
        Which of MLX's two algorithms to follow. "metal" computes in float32, rounds ties to even codes and keeps the
        sign of zero, as MLX does on GPUs. "cpu" rounds each step to w's type and ties toward zero, and equals MLX's
        CPU backend byte for byte but for the groups of the Notes.
    mx_scale : {"up", "nearest", "floor"}, default "up"
        How the largest magnitude of a group over that of the format becomes a power of two. "up" takes the least that
        is not below: nothing saturates, and MLX does so since 0.32.4. "nearest", by the logarithm, is what it did
        before; "floor" is the rule of OCP's specification.
    pad : bool, default False
        Store rows of another K as if zeros followed; see `affine_quantize`.
    out : tuple of 2 arrays or None, optional
        Where to put codes and scales; None for a new array.
    input_dtype : "bfloat16", optional
        Declares that a w of uint16 holds bfloat16 bits.

    Returns
    -------
    codes : numpy.ndarray of uint32, shape (..., K / 8)
    scales : numpy.ndarray of uint8, shape (..., K / 32)
        E8M0: byte b stands for 2**(b - 127).

    Raises
    ------
    TypeError
        If w is no array of floats.
    ValueError
        If K is not a multiple of 32, without `pad`.

    Notes
    -----
    A group with NaN or an infinity gets scale 255, infinity, and codes 0, so that all of it decodes to NaN. One of
    zeros gets scale 0 ("metal") or 127 ("cpu"). Scales below 2**-127 are that; MLX's CPU backend wraps their byte.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales = q.mxfp4_quantize(np.full((1, 32), 3.0))
    >>> q.mxfp4_dequantize(codes, scales)[0, :4]
    array([3., 3., 3., 3.], dtype=float32)
    """
    return _C.quantize_fp(_mxfp4_quantize._plan(), w, profile, mx_scale, None, pad, out, input_dtype)


@called_by_core
class Mxfp4Dequantize(Kernel):
    """`mxfp4_dequantize` as a kernel that is compiled once."""

    _op = "mxfp4_dequantize"

    def __call__(
        self,
        w: Any,
        scales: Any,
        *,
        dtype: Any = None,
        profile: str = "metal",
        k: int | None = None,
        out: Any = None,
    ) -> Any:
        """Turn codes back into floats; see `mxfp4_dequantize`."""
        return _C.dequantize_fp(self._plan(), w, scales, None, dtype, profile, k, out)


_mxfp4_dequantize = Mxfp4Dequantize()


def mxfp4_dequantize(
    w: Any,
    scales: Any,
    *,
    dtype: Any = None,
    profile: str = "metal",
    k: int | None = None,
    out: Any = None,
) -> Any:
    """Turn MXFP4 codes back into floats: 2**(scale - 127) * code.

    Scale 255 is infinity.

    Parameters
    ----------
    w : array of uint32, shape (..., K / 8)
        Codes as `mxfp4_quantize` packs them; int32 with the same bits is accepted.
    scales : array of uint8 or ml_dtypes' float8_e8m0fnu, shape (..., K / 32)
    dtype : dtype or str, optional
        Type of the result: float32 by default, float16 or bfloat16.
    profile : {"metal", "cpu"}, default "metal"
        "metal" computes in float32 and rounds once. "cpu" rounds the scale to `dtype` first, as MLX's CPU backend
        does: in float16 it may over- or underflow.
    k : int, optional
        The K of rows that were stored with ``pad=True``; see `affine_dequantize`.
    out : array, optional
        Where to put the result.

    Returns
    -------
    numpy.ndarray, shape (..., K)
        bfloat16 is an ml_dtypes array if `dtype` was of ml_dtypes, else uint16 bits.

    Raises
    ------
    TypeError
        If the arrays have other dtypes.
    ValueError
        If the shapes do not agree.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales = np.full((1, 4), 0x22222222, np.uint32), np.full((1, 1), 127, np.uint8)
    >>> q.mxfp4_dequantize(codes, scales)[0, :4]
    array([1., 1., 1., 1.], dtype=float32)
    """
    return _C.dequantize_fp(_mxfp4_dequantize._plan(), w, scales, None, dtype, profile, k, out)


@called_by_core
class Mxfp8Quantize(Kernel):
    """`mxfp8_quantize` as a kernel that is compiled once."""

    _op = "mxfp8_quantize"

    def __call__(
        self,
        w: Any,
        *,
        profile: str = "metal",
        mx_scale: str = "up",
        pad: bool = False,
        out: Any = None,
        input_dtype: str | None = None,
    ) -> tuple[Any, Any]:
        """Quantize w; see `mxfp8_quantize`."""
        return _C.quantize_fp(self._plan(), w, profile, mx_scale, None, pad, out, input_dtype)


_mxfp8_quantize = Mxfp8Quantize()


def mxfp8_quantize(
    w: Any,
    *,
    profile: str = "metal",
    mx_scale: str = "up",
    pad: bool = False,
    out: Any = None,
    input_dtype: str | None = None,
) -> tuple[Any, Any]:
    """Quantize groups of 32 of the last axis to FP8 (E4M3) with a power of two per group (OCP's MXFP8).

    Parameters
    ----------
    w : array_like of float32, float16, bfloat16 or float64, shape (..., K)
        The weights; any strides. K must be a multiple of 32 unless `pad` is true. float64 is computed as float32.
    profile : {"metal", "cpu"}, default "metal"
        Which of MLX's two algorithms to follow. "metal" computes in float32, rounds ties to even codes and keeps the
        sign of zero, as MLX does on GPUs. "cpu" rounds each step to w's type and ties to even codes, and equals MLX's
        CPU backend byte for byte but for the groups of the Notes.
    mx_scale : {"up", "nearest", "floor"}, default "up"
        How the largest magnitude of a group over that of the format becomes a power of two. "up" takes the least that
        is not below: nothing saturates, and MLX does so since 0.32.4. "nearest", by the logarithm, is what it did
        before; "floor" is the rule of OCP's specification.
    pad : bool, default False
        Store rows of another K as if zeros followed; see `affine_quantize`.
    out : tuple of 2 arrays or None, optional
        Where to put codes and scales; None for a new array.
    input_dtype : "bfloat16", optional
        Declares that a w of uint16 holds bfloat16 bits.

    Returns
    -------
    codes : numpy.ndarray of uint32, shape (..., K / 4)
    scales : numpy.ndarray of uint8, shape (..., K / 32)
        E8M0: byte b stands for 2**(b - 127).

    Raises
    ------
    TypeError
        If w is no array of floats.
    ValueError
        If K is not a multiple of 32, without `pad`.

    Notes
    -----
    A group with NaN or an infinity gets scale 255, infinity, and codes 0, so that all of it decodes to NaN. One of
    zeros gets scale 0 ("metal") or 127 ("cpu"). Scales below 2**-127 are that; MLX's CPU backend wraps their byte.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales = q.mxfp8_quantize(np.full((1, 32), 3.0))
    >>> q.mxfp8_dequantize(codes, scales)[0, :4]
    array([3., 3., 3., 3.], dtype=float32)
    """
    return _C.quantize_fp(_mxfp8_quantize._plan(), w, profile, mx_scale, None, pad, out, input_dtype)


@called_by_core
class Mxfp8Dequantize(Kernel):
    """`mxfp8_dequantize` as a kernel that is compiled once."""

    _op = "mxfp8_dequantize"

    def __call__(
        self,
        w: Any,
        scales: Any,
        *,
        dtype: Any = None,
        profile: str = "metal",
        k: int | None = None,
        out: Any = None,
    ) -> Any:
        """Turn codes back into floats; see `mxfp8_dequantize`."""
        return _C.dequantize_fp(self._plan(), w, scales, None, dtype, profile, k, out)


_mxfp8_dequantize = Mxfp8Dequantize()


def mxfp8_dequantize(
    w: Any,
    scales: Any,
    *,
    dtype: Any = None,
    profile: str = "metal",
    k: int | None = None,
    out: Any = None,
) -> Any:
    """Turn MXFP8 codes back into floats: 2**(scale - 127) * code.

    Codes 0x7f and 0xff are NaN.
    Scale 255 is infinity.

    Parameters
    ----------
    w : array of uint32, shape (..., K / 4)
        Codes as `mxfp8_quantize` packs them; int32 with the same bits is accepted.
    scales : array of uint8 or ml_dtypes' float8_e8m0fnu, shape (..., K / 32)
    dtype : dtype or str, optional
        Type of the result: float32 by default, float16 or bfloat16.
    profile : {"metal", "cpu"}, default "metal"
        "metal" computes in float32 and rounds once. "cpu" rounds the scale to `dtype` first, as MLX's CPU backend
        does: in float16 it may over- or underflow.
    k : int, optional
        The K of rows that were stored with ``pad=True``; see `affine_dequantize`.
    out : array, optional
        Where to put the result.

    Returns
    -------
    numpy.ndarray, shape (..., K)
        bfloat16 is an ml_dtypes array if `dtype` was of ml_dtypes, else uint16 bits.

    Raises
    ------
    TypeError
        If the arrays have other dtypes.
    ValueError
        If the shapes do not agree.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales = np.full((1, 8), 0x38383838, np.uint32), np.full((1, 1), 127, np.uint8)
    >>> q.mxfp8_dequantize(codes, scales)[0, :4]
    array([1., 1., 1., 1.], dtype=float32)
    """
    return _C.dequantize_fp(_mxfp8_dequantize._plan(), w, scales, None, dtype, profile, k, out)


@called_by_core
class Nvfp4Quantize(Kernel):
    """`nvfp4_quantize` as a kernel that is compiled once."""

    _op = "nvfp4_quantize"

    def __call__(
        self,
        w: Any,
        *,
        profile: str = "metal",
        global_scale: float | None = None,
        pad: bool = False,
        out: Any = None,
        input_dtype: str | None = None,
    ) -> tuple[Any, Any]:
        """Quantize w; see `nvfp4_quantize`."""
        return _C.quantize_fp(self._plan(), w, profile, None, global_scale, pad, out, input_dtype)


_nvfp4_quantize = Nvfp4Quantize()


def nvfp4_quantize(
    w: Any,
    *,
    profile: str = "metal",
    global_scale: float | None = None,
    pad: bool = False,
    out: Any = None,
    input_dtype: str | None = None,
) -> tuple[Any, Any]:
    """Quantize groups of 16 of the last axis to FP4 (E2M1) with an FP8 (E4M3) scale per group (NVIDIA's NVFP4).

    Parameters
    ----------
    w : array_like of float32, float16, bfloat16 or float64, shape (..., K)
        The weights; any strides. K must be a multiple of 16 unless `pad` is true. float64 is computed as float32.
    profile : {"metal", "cpu"}, default "metal"
        Which of MLX's two algorithms to follow. "metal" computes in float32, rounds ties to even codes and keeps the
        sign of zero, as MLX does on GPUs. "cpu" rounds each step to w's type and ties toward zero, and equals MLX's
        CPU backend byte for byte but for the groups of the Notes.
    global_scale : float, optional
        By convention the largest magnitude of the whole tensor: scales are stored times 2688 / global_scale, so that
        they use the range of FP8. Without it, and as with 2688, groups beyond 2688 = 448 * 6 saturate.
    pad : bool, default False
        Store rows of another K as if zeros followed; see `affine_quantize`.
    out : tuple of 2 arrays or None, optional
        Where to put codes and scales; None for a new array.
    input_dtype : "bfloat16", optional
        Declares that a w of uint16 holds bfloat16 bits.

    Returns
    -------
    codes : numpy.ndarray of uint32, shape (..., K / 8)
    scales : numpy.ndarray of uint8, shape (..., K / 16)
        E4M3.

    Raises
    ------
    TypeError
        If w is no array of floats.
    ValueError
        If K is not a multiple of 16, without `pad`.

    Notes
    -----
    A group so small that its scale rounds to 0 gets codes 0. In one with NaN or an infinity the scale is 448, the
    largest, and those elements get code 0.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales = q.nvfp4_quantize(np.full((1, 16), 3.0))
    >>> q.nvfp4_dequantize(codes, scales)[0, :4]
    array([3., 3., 3., 3.], dtype=float32)
    """
    return _C.quantize_fp(_nvfp4_quantize._plan(), w, profile, None, global_scale, pad, out, input_dtype)


@called_by_core
class Nvfp4Dequantize(Kernel):
    """`nvfp4_dequantize` as a kernel that is compiled once."""

    _op = "nvfp4_dequantize"

    def __call__(
        self,
        w: Any,
        scales: Any,
        *,
        global_scale: float | None = None,
        dtype: Any = None,
        profile: str = "metal",
        k: int | None = None,
        out: Any = None,
    ) -> Any:
        """Turn codes back into floats; see `nvfp4_dequantize`."""
        return _C.dequantize_fp(self._plan(), w, scales, global_scale, dtype, profile, k, out)


_nvfp4_dequantize = Nvfp4Dequantize()


def nvfp4_dequantize(
    w: Any,
    scales: Any,
    *,
    global_scale: float | None = None,
    dtype: Any = None,
    profile: str = "metal",
    k: int | None = None,
    out: Any = None,
) -> Any:
    """Turn NVFP4 codes back into floats: scale * code, times global_scale / 2688 if there is one.

    Scales 0x7f and 0xff are NaN.

    Parameters
    ----------
    w : array of uint32, shape (..., K / 8)
        Codes as `nvfp4_quantize` packs them; int32 with the same bits is accepted.
    scales : array of uint8 or ml_dtypes' float8_e4m3fn, shape (..., K / 16)
    global_scale : float, optional
        What `nvfp4_quantize` was given.
    dtype : dtype or str, optional
        Type of the result: float32 by default, float16 or bfloat16.
    profile : {"metal", "cpu"}, default "metal"
        "metal" computes in float32 and rounds once. "cpu" rounds the scale to `dtype` first, as MLX's CPU backend
        does: in float16 it may over- or underflow.
    k : int, optional
        The K of rows that were stored with ``pad=True``; see `affine_dequantize`.
    out : array, optional
        Where to put the result.

    Returns
    -------
    numpy.ndarray, shape (..., K)
        bfloat16 is an ml_dtypes array if `dtype` was of ml_dtypes, else uint16 bits.

    Raises
    ------
    TypeError
        If the arrays have other dtypes.
    ValueError
        If the shapes do not agree.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales = np.full((1, 2), 0x22222222, np.uint32), np.full((1, 1), 0x38, np.uint8)
    >>> q.nvfp4_dequantize(codes, scales)[0, :4]
    array([1., 1., 1., 1.], dtype=float32)
    """
    return _C.dequantize_fp(_nvfp4_dequantize._plan(), w, scales, global_scale, dtype, profile, k, out)
