"""Variable-bit fake quantization: values rounded to a grid of 2^bits - 1 levels, kept as float32."""

from __future__ import annotations

from typing import Any

from . import _C
from ._kernel import Kernel, called_by_core

__all__ = ["VariableQuantizationKernel", "VariableQuantizationMLXKernel", "quantize", "variable_quantization"]


@called_by_core
class VariableQuantizationKernel(Kernel):
    """Fake quantization as a kernel that is compiled once; `quantize` says what it computes.

    Parameters
    ----------
    use_block_kernel : bool, default True
        Accepted for compatibility with kernels for GPUs, where it chooses between two ways of moving data. The result
        never depends on it.
    use_double_buffer : bool, default False
        As `use_block_kernel`.

    Examples
    --------
    >>> import quantization as q
    >>> kernel = q.VariableQuantizationKernel()
    >>> kernel._kernel is None
    True
    >>> kernel.compile() is kernel.compile()
    True
    >>> kernel([-2.0, 0.5, 2.0], bits=2)
    array([-1.,  1.,  1.], dtype=float32)
    """

    _op = "quantize"

    def __init__(self, use_block_kernel: bool = True, use_double_buffer: bool = False) -> None:
        super().__init__()
        self.use_block_kernel = bool(use_block_kernel)
        self.use_double_buffer = bool(use_double_buffer)

    def __call__(self, x: Any, bits: int = 4, *, out: Any = None, input_dtype: str | None = None) -> Any:
        """Round x to the grid; see `quantize`."""
        return _C.fake_quantize(self._plan(), x, bits, out, input_dtype)

    def quantize(self, x: Any, bits: int = 4, *, out: Any = None, input_dtype: str | None = None) -> Any:
        """Round x to the grid; see `quantize`."""
        return _C.fake_quantize(self._plan(), x, bits, out, input_dtype)


VariableQuantizationMLXKernel = VariableQuantizationKernel

variable_quantization = VariableQuantizationKernel()


def quantize(x: Any, bits: int = 4, *, out: Any = None, input_dtype: str | None = None) -> Any:
    """Clip x to [-1, 1] and round it to the levels of a signed integer of `bits` bits, as float32.

    With S = 2^(bits-1) - 1, the result is ``round(clip(x, -1, 1) * S) * (1/S)``: 2^bits - 1 levels, ties rounded away
    from zero, ends exactly -1 and 1. Each step is one float32 operation. With ``bits=1`` the result is the sign of x,
    +1 for zeros of either sign.

    Parameters
    ----------
    x : array_like of float32, float16, bfloat16 or float64
        Any shape and strides. float64 is computed as float32. NaN stays NaN; infinities are clipped.
    bits : int, default 4
        From 1 to 16.
    out : array of float32, optional
        Where to put the result, of x's shape. ``out=x`` works in place; other overlap is an error.
    input_dtype : "bfloat16", optional
        Declares that an x of uint16 holds bfloat16 bits.

    Returns
    -------
    numpy.ndarray of float32
        The shape of x; `out` if that was given.

    Raises
    ------
    TypeError
        If x is no array of floats, or `bits` no integer.
    ValueError
        If `bits` is not from 1 to 16, or `out` does not fit.

    Notes
    -----
    Multiplies by the float32 reciprocal of S, so that a level may differ by one unit in the last place from k/S; the
    map is idempotent all the same.

    Examples
    --------
    >>> import quantization as q
    >>> q.quantize([-2.0, -0.5, 0.5, 2.0], bits=4)
    array([-1.       , -0.5714286,  0.5714286,  1.       ], dtype=float32)
    >>> q.quantize([0.1, 0.6], bits=17)
    Traceback (most recent call last):
        ...
    ValueError: quantize: bits must be between 1 and 16, got 17
    """
    return _C.fake_quantize(variable_quantization._plan(), x, bits, out, input_dtype)
