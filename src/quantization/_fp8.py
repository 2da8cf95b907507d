"""Floats as plain FP8 (E4M3), without scales, and back."""

from __future__ import annotations

from typing import Any

from . import _C
from ._kernel import Kernel, called_by_core

__all__ = ["FromFp8", "ToFp8", "from_fp8", "to_fp8"]


@called_by_core
class ToFp8(Kernel):
    """`to_fp8` as a kernel that is compiled once."""

    _op = "to_fp8"

    def __call__(self, x: Any, *, out: Any = None, input_dtype: str | None = None) -> Any:
        """Round x to FP8; see `to_fp8`."""
        return _C.to_fp8(self._plan(), x, out, input_dtype)


@called_by_core
class FromFp8(Kernel):
    """`from_fp8` as a kernel that is compiled once."""

    _op = "from_fp8"

    def __call__(self, x: Any, *, dtype: Any = None, out: Any = None) -> Any:
        """Widen x to floats; see `from_fp8`."""
        return _C.from_fp8(self._plan(), x, dtype, out)


_to_fp8, _from_fp8 = ToFp8(), FromFp8()


def to_fp8(x: Any, *, out: Any = None, input_dtype: str | None = None) -> Any:
    """Round each element to FP8 (E4M3, as OCP's float8_e4m3fn): a sign, 4 bits of exponent, 3 of fraction.

    Parameters
    ----------
    x : array_like of float32, float16, bfloat16 or float64
        Any shape and strides. float64 is computed as float32.
    out : array of uint8, optional
        Where to put the result, of x's shape.
    input_dtype : "bfloat16", optional
        Declares that an x of uint16 holds bfloat16 bits.

    Returns
    -------
    numpy.ndarray of uint8
        The shape of x. ``.view(ml_dtypes.float8_e4m3fn)`` makes numbers of it.

    Raises
    ------
    TypeError
        If x is no array of floats.
    ValueError
        If `out` does not fit.

    Notes
    -----
    Ties go to the even code; subnormal numbers, multiples of 2**-9, are kept, and so is the sign of zero. Whatever is
    above 448 in magnitude becomes that, infinities and NaN too, as MLX has it: no code of NaN comes out.

    Examples
    --------
    >>> import quantization as q
    >>> q.to_fp8([1.0, -0.3, 1000.0])
    array([ 56, 170, 126], dtype=uint8)
    >>> q.from_fp8(q.to_fp8([1.0, -0.3, 1000.0])).tolist()
    [1.0, -0.3125, 448.0]
    """
    return _C.to_fp8(_to_fp8._plan(), x, out, input_dtype)


def from_fp8(x: Any, *, dtype: Any = None, out: Any = None) -> Any:
    """Widen FP8 (E4M3) codes to floats, without error.

    Parameters
    ----------
    x : array of uint8 or ml_dtypes' float8_e4m3fn
        Codes, of any shape and strides.
    dtype : dtype or str, optional
        Type of the result: float32 by default, float16 or bfloat16; all of them hold every FP8 number.
    out : array, optional
        Where to put the result, of x's shape.

    Returns
    -------
    numpy.ndarray
        The shape of x; bfloat16 is an ml_dtypes array if `dtype` was of ml_dtypes, else uint16 bits.

    Raises
    ------
    TypeError
        If x has another dtype.
    ValueError
        If `out` does not fit.

    Notes
    -----
    Codes 0x7f and 0xff are NaN.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> q.from_fp8(np.array([0x38, 0xB8, 0x01], np.uint8))
    array([ 1.        , -1.        ,  0.00195312], dtype=float32)
    """
    return _C.from_fp8(_from_fp8._plan(), x, dtype, out)
