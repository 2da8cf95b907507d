"""Affine quantization in MLX's storage format, and its inverse."""

from __future__ import annotations

from typing import Any

from . import _C
from ._kernel import Kernel, called_by_core

__all__ = ["AffineDequantize", "AffineQuantize", "affine_dequantize", "affine_quantize"]


@called_by_core
class AffineQuantize(Kernel):
    """`affine_quantize` as a kernel that is compiled once.

    Parameters
    ----------
    group_size, bits : int
        What its calls use unless they say otherwise.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> kernel = q.AffineQuantize(group_size=32, bits=8)
    >>> codes, scales, biases = kernel(np.ones((2, 64), np.float32))
    >>> codes.shape, scales.shape
    ((2, 16), (2, 2))
    """

    _op = "affine_quantize"

    def __init__(self, group_size: int = 64, bits: int = 4) -> None:
        super().__init__()
        self.group_size, self.bits = group_size, bits

    def __call__(
        self,
        w: Any,
        group_size: int | None = None,
        bits: int | None = None,
        *,
        profile: str = "metal",
        scale_dtype: Any = None,
        pad: bool = False,
        out: Any = None,
        input_dtype: str | None = None,
    ) -> tuple[Any, Any, Any]:
        """Quantize w; see `affine_quantize`."""
        group_size = self.group_size if group_size is None else group_size
        bits = self.bits if bits is None else bits
        return _C.quantize(self._plan(), w, group_size, bits, profile, scale_dtype, pad, out, input_dtype)


@called_by_core
class AffineDequantize(Kernel):
    """`affine_dequantize` as a kernel that is compiled once.

    Parameters
    ----------
    group_size, bits : int, optional
        What its calls use unless they say otherwise.
    """

    _op = "affine_dequantize"

    def __init__(self, group_size: int | None = None, bits: int | None = None) -> None:
        super().__init__()
        self.group_size, self.bits = group_size, bits

    def __call__(
        self,
        w: Any,
        scales: Any,
        biases: Any,
        group_size: int | None = None,
        bits: int | None = None,
        *,
        dtype: Any = None,
        profile: str = "metal",
        k: int | None = None,
        out: Any = None,
        input_dtype: str | None = None,
    ) -> Any:
        """Turn codes back into floats; see `affine_dequantize`."""
        group_size = self.group_size if group_size is None else group_size
        bits = self.bits if bits is None else bits
        return _C.dequantize(self._plan(), w, scales, biases, group_size, bits, dtype, profile, k, out, input_dtype)


_quantize = AffineQuantize()
_dequantize = AffineDequantize()


def affine_quantize(
    w: Any,
    group_size: int = 64,
    bits: int = 4,
    *,
    profile: str = "metal",
    scale_dtype: Any = None,
    pad: bool = False,
    out: Any = None,
    input_dtype: str | None = None,
) -> tuple[Any, Any, Any]:
    """Quantize groups of the last axis: codes with a scale and a bias per group, w = scale * code + bias or nearly so.

    The stored format is MLX's, byte for byte: each row of codes is one little-endian bit stream, the first code lowest,
    in uint32 words.

    Parameters
    ----------
    w : array_like of float32, float16, bfloat16 or float64, shape (..., K)
        The weights; any strides. K must be a multiple of `group_size` unless `pad` is true. float64 is computed as
        float32.
    group_size : {32, 64, 128}, default 64
    bits : {1, 2, 3, 4, 5, 6, 7, 8}, default 4
        7 is not a width of MLX's; packed alike. The two codes of 1 bit stand for the ends of a group's range, so that
        0 is exact only where it is one of them.
    profile : {"metal", "cpu"}, default "metal"
        Which of MLX's two algorithms to follow. "cpu" rounds ties to even and equals MLX's CPU backend byte for byte.
        "metal" rounds ties away from zero and spreads an all-negative group over [min, 0], as MLX does on GPUs.
    scale_dtype : dtype or str, optional
        Type in which scales and biases are stored: float32, float16 or bfloat16; w's own by default. Codes always come
        from the unrounded float32 scale and bias.
    pad : bool, default False
        Store rows whose K is no multiple of `group_size` as if zeros followed, which MLX reads as rows of so many more
        elements. The products here take x of the true K, and `affine_dequantize` takes ``k=K``.
    out : tuple of 3 arrays or None, optional
        Where to put codes, scales and biases; None for a new array.
    input_dtype : "bfloat16", optional
        Declares that a w of uint16 holds bfloat16 bits.

    Returns
    -------
    codes : numpy.ndarray of uint32, shape (..., K * bits / 32)
    scales, biases : numpy.ndarray, shape (..., K / group_size)
        K counts the padding. Of `scale_dtype`: bfloat16 is an ml_dtypes array if w or `scale_dtype` was of ml_dtypes,
        else uint16 bits.

    Raises
    ------
    TypeError
        If w is no array of floats.
    ValueError
        For a group size or width that does not exist, or, without `pad`, a K that is not a multiple of `group_size`.

    Notes
    -----
    NaN is ignored when the range of a group is taken, and gets code 0. A group with an infinity, or of NaN alone, gets
    scale NaN (at 1 bit, a scale or a bias that is not finite) and codes 0. Algorithm: MLX 0.32,
    ``mlx/backend/cpu/quantized.cpp`` and ``mlx/backend/metal/kernels/quantized.h``.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> w = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64)
    >>> codes, scales, biases = q.affine_quantize(w, group_size=32, bits=4)
    >>> codes.shape, scales.shape
    ((1, 8), (1, 2))
    >>> error = np.abs(q.affine_dequantize(codes, scales, biases, bits=4) - w).max()
    >>> bool(error <= np.abs(scales).max())  # half of it, but where a value lies beyond the last code
    True
    """
    return _C.quantize(_quantize._plan(), w, group_size, bits, profile, scale_dtype, pad, out, input_dtype)


def affine_dequantize(
    w: Any,
    scales: Any,
    biases: Any,
    group_size: int | None = None,
    bits: int | None = None,
    *,
    dtype: Any = None,
    profile: str = "metal",
    k: int | None = None,
    out: Any = None,
    input_dtype: str | None = None,
) -> Any:
    """Turn packed codes back into floats: scale * code + bias.

    Parameters
    ----------
    w : array of uint32, shape (..., K * bits / 32)
        Codes as `affine_quantize` packs them; int32 with the same bits is accepted.
    scales, biases : array_like of float32, float16, bfloat16 or float64, shape (..., K / group_size)
    group_size, bits : int, optional
        If one is given the other is inferred from the shapes; without either, 64 and 4.
    dtype : dtype or str, optional
        Type of the result; by default that of scales and biases (float32 if they differ).
    profile : {"metal", "cpu"}, default "metal"
        "metal" computes in float32 and rounds once. "cpu" rounds the product and the sum to the type of scales and
        biases, as MLX's CPU backend does, byte for byte.
    k : int, optional
        The K of rows that were stored with ``pad=True``: what follows is left out. Less than what the groups hold, by
        less than a group.
    out : array, optional
        Where to put the result.
    input_dtype : "bfloat16", optional
        Declares that scales and biases of uint16 hold bfloat16 bits.

    Returns
    -------
    numpy.ndarray, shape (..., K)
        bfloat16 is an ml_dtypes array if an input or `dtype` was, else uint16 bits.

    Raises
    ------
    TypeError
        If the arrays have other dtypes.
    ValueError
        If the shapes do not agree.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> codes, scales, biases = q.affine_quantize(np.full((1, 32), 3.0), 32, 4)
    >>> q.affine_dequantize(codes, scales, biases, bits=4)[0, :4]
    array([3., 3., 3., 3.], dtype=float32)
    """
    return _C.dequantize(_dequantize._plan(), w, scales, biases, group_size, bits, dtype, profile, k, out, input_dtype)
