"""The codecs of the rotated KV cache: rotation, encoders and decoder."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _C
from ._kernel import Kernel, called_by_core

__all__ = [
    "DequantizeKv",
    "Fwht",
    "HadamardQuantizeKv",
    "HadamardQuantizeKvHb",
    "HadamardQuantizeKvSeq",
    "QuantizeKv",
    "dequantize_kv",
    "fwht",
    "hadamard_quantize_kv",
    "hadamard_quantize_kv_hb",
    "hadamard_quantize_kv_seq",
    "quantize_kv",
]


@called_by_core
class Fwht(Kernel):
    """`fwht` as a kernel that is compiled once."""

    _op = "fwht"

    def __call__(
        self, x: Any, *, signs: bool = False, inverse: bool = False, out: Any = None, input_dtype: str | None = None
    ) -> Any:
        """Rotate rows; see `fwht`."""
        return _C.fwht(self._plan(), x, signs, inverse, out, input_dtype)


@called_by_core
class HadamardQuantizeKv(Kernel):
    """`hadamard_quantize_kv` as a kernel that is compiled once."""

    _op = "hadamard_quantize_kv"

    def __call__(
        self,
        src: Any,
        packed: Any,
        norms: Any,
        /,
        *,
        write_pos: Any,
        is_sliding: bool = False,
        scale_factor_d512: float | None = None,
        rms_scratch: Any = None,
    ) -> tuple[Any, Any]:
        """Encode one position; see `hadamard_quantize_kv`."""
        return _C.hadamard_quantize_kv(
            self._plan(), src, packed, norms, write_pos, is_sliding, scale_factor_d512, rms_scratch
        )


@called_by_core
class HadamardQuantizeKvSeq(Kernel):
    """`hadamard_quantize_kv_seq` as a kernel that is compiled once."""

    _op = "hadamard_quantize_kv_seq"

    def __call__(
        self,
        src: Any,
        packed: Any,
        norms: Any,
        /,
        *,
        write_pos_start: Any,
        n_tokens: Any = None,
        src_tok_offset: Any = 0,
        is_sliding: bool = False,
        scale_factor_d512: float | None = None,
    ) -> tuple[Any, Any]:
        """Encode several positions; see `hadamard_quantize_kv_seq`."""
        return _C.hadamard_quantize_kv_seq(
            self._plan(),
            src,
            packed,
            norms,
            write_pos_start,
            n_tokens,
            src_tok_offset,
            is_sliding,
            scale_factor_d512,
        )


@called_by_core
class HadamardQuantizeKvHb(Kernel):
    """`hadamard_quantize_kv_hb` as a kernel that is compiled once."""

    _op = "hadamard_quantize_kv_hb"

    def __call__(
        self,
        src: Any,
        packed: Any,
        norms: Any,
        /,
        *,
        write_pos: Any,
        codebook_bits: Any,
        is_sliding: bool = False,
        scale_factor_d512: float | None = None,
    ) -> tuple[Any, Any]:
        """Encode one position, a byte per code; see `hadamard_quantize_kv_hb`."""
        return _C.hadamard_quantize_kv_hb(
            self._plan(), src, packed, norms, write_pos, codebook_bits, is_sliding, scale_factor_d512
        )


@called_by_core
class QuantizeKv(Kernel):
    """`quantize_kv` as a kernel that is compiled once."""

    _op = "quantize_kv"

    def __call__(
        self,
        x: Any,
        bits: int = 4,
        *,
        scale: str = "unbiased",
        norms_dtype: Any = np.float16,
        out: Any = None,
        input_dtype: str | None = None,
    ) -> tuple[Any, Any]:
        """Encode rows; see `quantize_kv`."""
        return _C.quantize_kv(self._plan(), x, bits, scale, norms_dtype, out, input_dtype)


@called_by_core
class DequantizeKv(Kernel):
    """`dequantize_kv` as a kernel that is compiled once."""

    _op = "dequantize_kv"

    def __call__(
        self,
        packed: Any,
        norms: Any,
        bits: int = 4,
        *,
        codec: int = 2,
        rotated: bool = False,
        scale_factor_d512: float | None = None,
        out: Any = None,
    ) -> Any:
        """Decode rows; see `dequantize_kv`."""
        return _C.dequantize_kv(self._plan(), packed, norms, bits, codec, rotated, scale_factor_d512, out)


_fwht = Fwht()
_hadamard_quantize_kv = HadamardQuantizeKv()
_hadamard_quantize_kv_seq = HadamardQuantizeKvSeq()
_hadamard_quantize_kv_hb = HadamardQuantizeKvHb()
_quantize_kv = QuantizeKv()
_dequantize_kv = DequantizeKv()


def fwht(x: Any, *, signs: bool = False, inverse: bool = False, out: Any = None, input_dtype: str | None = None) -> Any:
    """Rotate the rows of x by an orthonormal Hadamard transform, the rotation of the KV cache.

    Parameters
    ----------
    x : array_like of float32, float16, bfloat16 or float64, shape (..., D)
        D is a power of two from 2 to 4096, or a multiple of 8 up to 4096.
    signs : bool
        Whether signs are flipped as the cache's fixed table says, before the transform, or after an inverse one.
    inverse : bool
        Whether to undo the rotation. Without signs that is the rotation itself.
    out : array of float32, shape (..., D), optional
        Where to put the result; may be x itself.
    input_dtype : "bfloat16", optional
        Declares that an x of uint16 holds bfloat16 bits.

    Returns
    -------
    numpy.ndarray of float32, shape (..., D)

    Raises
    ------
    TypeError
        If x is no array of floats.
    ValueError
        If D is none of those above, or `out` does not fit.

    Notes
    -----
    For a power of two this is the fast Walsh-Hadamard transform in natural (Sylvester's) order. Other rows consist of
    equal blocks of m * 2**k elements, 2**k the power of two in D and m the largest of 1, 3, 5 and 7 that divides D;
    each block is multiplied by H_4m (x) H_2**(k-2), where H_4m is Paley's symmetric Hadamard matrix [1]_. 80 is a
    block of 5 * 16 elements, 576 are three of 3 * 64.

    References
    ----------
    .. [1] R. E. A. C. Paley, "On orthogonal matrices", J. Math. Phys. 12 (1933), 311-320.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> q.fwht(np.array([1, 0, 0, 0], np.float32))
    array([0.5, 0.5, 0.5, 0.5], dtype=float32)
    >>> x = np.arange(80, dtype=np.float32)
    >>> bool(np.abs(q.fwht(q.fwht(x, signs=True), signs=True, inverse=True) - x).max() < 1e-4)
    True
    """
    return _C.fwht(_fwht._plan(), x, signs, inverse, out, input_dtype)


def hadamard_quantize_kv(
    src: Any,
    packed: Any,
    norms: Any,
    /,
    *,
    write_pos: Any,
    is_sliding: bool = False,
    scale_factor_d512: float | None = None,
    rms_scratch: Any = None,
) -> tuple[Any, Any]:
    """Encode the keys or values of one token at 4 bits, in place, as the crate mlx-native does (codec 1).

    Parameters
    ----------
    src : array of float32, float16, bfloat16 or float64, shape (H, D)
        One vector per head; D is a power of two from 2 to 4096.
    packed : array of uint8, shape (H, C, D/2)
        The cache's codes, C positions for each head. Written at one position alone.
    norms : array of float32, shape (H, C), or (H, C, D/256) from D = 512 on
        The cache's norms.
    write_pos : int
        The position, less than C unless `is_sliding`.
    is_sliding : bool
        Whether the cache is a ring: the position is taken modulo C, however large it is.
    scale_factor_d512 : float, optional
        At D = 512 elements are multiplied by this before they are rounded. 1 by default, the only sound choice.
    rms_scratch : array of float32, shape (H, D), optional
        Receives the elements as they are rounded, about normally distributed.

    Returns
    -------
    packed, norms
        The same two objects.

    Raises
    ------
    TypeError
        If an array is none or has another dtype, or `write_pos` is no integer.
    ValueError
        If D is none of those above, a shape does not fit, an output is read-only or shares memory with another array,
        the position is negative or beyond the cache, C is 0, or the factor is not finite. Nothing is written then.

    Notes
    -----
    The vector is rotated by the orthonormal fast Walsh-Hadamard transform, at D = 256 and 512 after signs were flipped
    as a fixed table says; divided by its norm and multiplied by sqrt(D); and each element becomes the nearest of the
    16 values of the Lloyd-Max codebook for normal distributions, ties going down. Code 2 j is the lower half of byte
    j. ``norms[h, p]`` is the norm; at D = 512 each half has one, its root mean square; from D = 1024 on the norm
    stands at ``norms.flat[h * C + p]``, the place where the crate puts it. Without heads or elements nothing is done.

    The method is TurboQuant [1]_; rotating before rounding goes back to DRIVE [2]_.

    References
    ----------
    .. [1] A. Zandieh, M. Daliri, M. Hadian, V. Mirrokni, "TurboQuant: Online Vector Quantization with Near-optimal
       Distortion Rate", arXiv:2504.19874 (2025).
    .. [2] S. Vargaftik et al., "DRIVE: One-bit Distributed Mean Estimation", NeurIPS 2021.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> packed, norms = np.zeros((2, 8, 64), np.uint8), np.zeros((2, 8), np.float32)
    >>> keys = np.random.default_rng(0).standard_normal((2, 128), dtype=np.float32)
    >>> _ = q.hadamard_quantize_kv(keys, packed, norms, write_pos=3)
    >>> decoded = q.dequantize_kv(packed[:, 3], norms[:, 3], codec=1)
    >>> bool(((decoded - keys) ** 2).sum() / (keys**2).sum() < 0.012)
    True
    """
    return _C.hadamard_quantize_kv(
        _hadamard_quantize_kv._plan(), src, packed, norms, write_pos, is_sliding, scale_factor_d512, rms_scratch
    )


def hadamard_quantize_kv_seq(
    src: Any,
    packed: Any,
    norms: Any,
    /,
    *,
    write_pos_start: Any,
    n_tokens: Any = None,
    src_tok_offset: Any = 0,
    is_sliding: bool = False,
    scale_factor_d512: float | None = None,
) -> tuple[Any, Any]:
    """Encode the keys or values of several tokens at 4 bits: `hadamard_quantize_kv` for one after the other.

    Parameters
    ----------
    src : array of float32, float16, bfloat16 or float64, shape (T, H, D)
        Vectors of T tokens.
    packed, norms : arrays
        The cache, as `hadamard_quantize_kv` takes it.
    write_pos_start : int
        The position of the first token; all positions must be less than C unless `is_sliding`.
    n_tokens : int, optional
        How many tokens of src are encoded; by default all from `src_tok_offset` on.
    src_tok_offset : int
        The first of them.
    is_sliding : bool
        Whether the cache is a ring. More than C tokens leave the last C in it.
    scale_factor_d512 : float, optional
        As for `hadamard_quantize_kv`.

    Returns
    -------
    packed, norms
        The same two objects.

    Raises
    ------
    TypeError, ValueError
        As `hadamard_quantize_kv` does, and ValueError if `src_tok_offset` and `n_tokens` exceed T. Nothing is written
        then, of no token.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> packed, norms = np.zeros((1, 4, 32), np.uint8), np.zeros((1, 4), np.float32)
    >>> keys = np.ones((6, 1, 64), np.float32)
    >>> _ = q.hadamard_quantize_kv_seq(keys, packed, norms, write_pos_start=0, is_sliding=True)
    >>> norms.tolist()
    [[8.0, 8.0, 8.0, 8.0]]
    """
    return _C.hadamard_quantize_kv_seq(
        _hadamard_quantize_kv_seq._plan(),
        src,
        packed,
        norms,
        write_pos_start,
        n_tokens,
        src_tok_offset,
        is_sliding,
        scale_factor_d512,
    )


def hadamard_quantize_kv_hb(
    src: Any,
    packed: Any,
    norms: Any,
    /,
    *,
    write_pos: Any,
    codebook_bits: Any,
    is_sliding: bool = False,
    scale_factor_d512: float | None = None,
) -> tuple[Any, Any]:
    """Encode the keys or values of one token with 5, 6 or 8 bits, a byte for each code (codec 1).

    Parameters
    ----------
    src : array of float32, float16, bfloat16 or float64, shape (H, D)
        One vector per head; D is 256 or 512.
    packed : array of uint8, shape (H, C, D)
        The cache's codes.
    norms : array of float32, shape (H, C), or (H, C, 2) at D = 512
        The cache's norms.
    write_pos : int
        The position, as for `hadamard_quantize_kv`.
    codebook_bits : int
        5, 6 or 8: the codebook has 32, 64 or 256 values.
    is_sliding, scale_factor_d512
        As for `hadamard_quantize_kv`.

    Returns
    -------
    packed, norms
        The same two objects.

    Raises
    ------
    TypeError, ValueError
        As `hadamard_quantize_kv` does.

    Notes
    -----
    The crate's codebooks of 5, 6 and 8 bits are not quite the best there are; `quantize_kv` has those, and packs its
    codes.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> packed, norms = np.zeros((1, 2, 256), np.uint8), np.zeros((1, 2), np.float32)
    >>> keys = np.random.default_rng(0).standard_normal((1, 256), dtype=np.float32)
    >>> _ = q.hadamard_quantize_kv_hb(keys, packed, norms, write_pos=0, codebook_bits=8)
    >>> decoded = q.dequantize_kv(packed[:, 0], norms[:, 0], 8, codec=1)
    >>> bool(((decoded - keys) ** 2).sum() / (keys**2).sum() < 1e-4)
    True
    """
    return _C.hadamard_quantize_kv_hb(
        _hadamard_quantize_kv_hb._plan(), src, packed, norms, write_pos, codebook_bits, is_sliding, scale_factor_d512
    )


def quantize_kv(
    x: Any,
    bits: int = 4,
    *,
    scale: str = "unbiased",
    norms_dtype: Any = np.float16,
    out: Any = None,
    input_dtype: str | None = None,
) -> tuple[Any, Any]:
    """Encode rows of keys or values with 2 to 8 bits per element (codec 2, that of `KVCache`).

    Parameters
    ----------
    x : array_like of float32, float16, bfloat16 or float64, shape (..., D)
        D is a multiple of 8 up to 4096.
    bits : int
        2, 3, 4, 5, 6 or 8.
    scale : {"unbiased", "least_squares", "norm"}
        What is stored for each block: the scale with which inner products are unbiased (EDEN), that of the least
        squared error, or the root mean square of the block.
    norms_dtype : dtype or str
        Type of these scales: float16, or float32 (float16 ends at 65504; what is beyond becomes infinity).
    out : tuple (packed, norms), optional
        Where to put the results, None for a new array.
    input_dtype : "bfloat16", optional
        Declares that an x of uint16 holds bfloat16 bits.

    Returns
    -------
    packed : numpy.ndarray of uint8, shape (..., D*bits/8)
        The codes as a stream of bits, the first code lowest.
    norms : numpy.ndarray, shape (..., blocks)
        The scales; blocks is 1 for any D of 1, 3, 5 or 7 times a power of two, see `fwht`.

    Raises
    ------
    TypeError
        If x is no array of floats, or `bits` no integer.
    ValueError
        If D, `bits`, `scale` or `norms_dtype` is none of those above, or `out` does not fit.

    Notes
    -----
    A block v of B elements, rotated by ``fwht(x, signs=True)``, is multiplied by sqrt(B)/|v|, and each element z
    becomes the nearest of the values c of the Lloyd-Max codebook for normal distributions, a tie the lower one.
    Element j is decoded as a * c_j, where a is |v|/sqrt(B) for "norm", times <z, c>/<c, c> for "least_squares" and
    times B/<z, c> for "unbiased" [2]_. The recipe is that of TurboQuant [1]_.

    A block with an element that is not finite has scale NaN and codes 0; one of zeros has scale 0.

    References
    ----------
    .. [1] A. Zandieh, M. Daliri, M. Hadian, V. Mirrokni, "TurboQuant: Online Vector Quantization with Near-optimal
       Distortion Rate", arXiv:2504.19874 (2025).
    .. [2] S. Vargaftik et al., "EDEN: Communication-Efficient and Robust Distributed Mean Estimation for Federated
       Learning", ICML 2022.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> x = np.random.default_rng(0).standard_normal((1000, 96), dtype=np.float32)
    >>> packed, norms = q.quantize_kv(x, 4)
    >>> packed.shape, norms.shape
    ((1000, 48), (1000, 1))
    >>> error = q.dequantize_kv(packed, norms, 4) - x
    >>> bool((error**2).sum() / (x**2).sum() < 0.01)
    True
    """
    return _C.quantize_kv(_quantize_kv._plan(), x, bits, scale, norms_dtype, out, input_dtype)


def dequantize_kv(
    packed: Any,
    norms: Any,
    bits: int = 4,
    *,
    codec: int = 2,
    rotated: bool = False,
    scale_factor_d512: float | None = None,
    out: Any = None,
) -> Any:
    """Decode rows of keys or values.

    Parameters
    ----------
    packed : array of uint8, shape (..., D*bits/8); with codec 1 (..., D/2) at 4 bits, else (..., D)
        Codes as `quantize_kv` or `hadamard_quantize_kv` wrote them.
    norms : array of floats
        Norms or scales as they wrote them: of shape (..., blocks) with codec 2; with codec 1 (...), (..., 2) at
        D = 512, and from D = 1024 on also (..., D/256), where the norm of row i, in C order, is ``norms.flat[i]``.
    bits : int
        Of a code: 2, 3, 4, 5, 6 or 8; with codec 1 4, 5, 6 or 8.
    codec : {2, 1}
        That of `quantize_kv`, or that of `hadamard_quantize_kv`, `hadamard_quantize_kv_seq` and
        `hadamard_quantize_kv_hb`.
    rotated : bool
        Whether to leave rows rotated, as `fwht` with the codec's signs makes them: inner products with rotated rows
        are those of the originals.
    scale_factor_d512 : float, optional
        That of the encoder (codec 1, D = 512), which must not be 0 here, as norms are divided by it.
    out : array of float32, shape (..., D), optional
        Where to put the result.

    Returns
    -------
    numpy.ndarray of float32, shape (..., D)

    Raises
    ------
    TypeError
        If `packed` is no array of uint8, `norms` none of floats, or `bits` or `codec` no integer.
    ValueError
        If no D, or none that the encoder takes, goes with the shape of `packed`; if `norms` or `out` do not fit.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> packed, norms = q.quantize_kv(np.full((1, 64), 3.0, np.float32), 8)
    >>> bool(np.abs(q.dequantize_kv(packed, norms, 8) - 3.0).max() < 0.1)
    True
    """
    return _C.dequantize_kv(_dequantize_kv._plan(), packed, norms, bits, codec, rotated, scale_factor_d512, out)
