"""Attention straight from packed keys and values."""

from __future__ import annotations

from typing import Any

from . import _C
from ._kernel import Kernel, called_by_core

__all__ = ["KvAttention", "kv_attention"]


@called_by_core
class KvAttention(Kernel):
    """`kv_attention` as a kernel that is compiled once."""

    _op = "kv_attention"

    def __call__(
        self,
        q: Any,
        k_cache: Any,
        v_cache: Any,
        *,
        bits: int = 4,
        value_bits: int | None = None,
        codec: int = 2,
        length: int | None = None,
        start: int = 0,
        scale: float | None = None,
        mask: Any = None,
        causal: bool = False,
        window: int | None = None,
        softcap: float | None = None,
        scale_factor_d512: float | None = None,
        out: Any = None,
        input_dtype: str | None = None,
    ) -> Any:
        """Attend to a cache; see `kv_attention`."""
        # fmt: off
        return _C.kv_attention(self._plan(), q, k_cache, v_cache, bits, value_bits, codec, length, start, scale, mask,
                               causal, window, softcap, scale_factor_d512, out, input_dtype)
        # fmt: on


_kv_attention = KvAttention()


def kv_attention(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    *,
    bits: int = 4,
    value_bits: int | None = None,
    codec: int = 2,
    length: int | None = None,
    start: int = 0,
    scale: float | None = None,
    mask: Any = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    scale_factor_d512: float | None = None,
    out: Any = None,
    input_dtype: str | None = None,
) -> Any:
    """Attend to keys and values that stay packed: softmax(scale q kᵀ + mask) v, in one pass, nothing materialised.

    Parameters
    ----------
    q : array_like of float32, float16, bfloat16 or float64, shape (Hq, D) or (Hq, T, D)
        One query per head, or T of them. float64 is computed as float32.
    k_cache, v_cache : (packed, norms)
        Keys and values of H heads at C slots, as the codec's encoders write them. Packed: uint8, shape (H, C, bytes).
        Norms of codec 2: float16 or float32, shape (H, C, blocks); of codec 1: float32, (H, C), or (H, C, D / 256)
        from D = 512 on. Hq is a multiple of H; query head h attends to head h * H // Hq. The head dimension of the
        values may be another than D.
    bits : int
        Width of the codes of the keys: 2, 3, 4, 5, 6 or 8; codec 1 has 4, 5, 6 and 8.
    value_bits : int, optional
        Width of the codes of the values; as `bits` by default.
    codec : int
        1 or 2. Of codec 1, head dimensions from 8 on: its encoders and `dequantize_kv` take 2 and 4 too.
    length : int, optional
        Number of positions L, C by default.
    start : int, optional
        Slot of the oldest position, 0 by default: position i stands at slot (start + i) % C.
    scale : float, optional
        1 / sqrt(D) by default.
    mask : array of bool or of floats, optional
        Broadcasts to (Hq, T, L), or to (Hq, L) for a q of two axes. True: is seen; floats are added to the scores.
    causal : bool
        Query t stands at position L - T + t, and sees none after it; otherwise every query stands at the last one.
    window : int, optional
        A query at position i sees none up to i - window.
    softcap : float, optional
        Scores s become softcap * tanh(s / softcap) before the mask.
    scale_factor_d512 : float, optional
        What the encoder of codec 1 was given for D = 512; not 0, as norms are divided by it.
    out : array, optional
        Where to put the result, which no input may share memory with.
    input_dtype : "bfloat16", optional
        Declares that a q (and mask) of uint16 holds bfloat16 bits.

    Returns
    -------
    numpy.ndarray, shape (Hq, Dv) or (Hq, T, Dv)
        Of q's type; float32 for float64.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or dtype.
    ValueError
        If shapes or values do not fit.

    Notes
    -----
    q is rotated as the keys were, and the sum of values is rotated back. Sums are float32, in one order: the result is
    the same bits on every instruction set, for every number of threads, for queries together or alone, wherever the
    ring starts. The softmax is online [1]_, over tiles as in [2]_: exact but for rounding. Queries of one head of the
    cache share the decoding.

    Beside exact attention to what the caches hold, and to first order in u = 2**-24, a score s_i is off by at most
    d_i = u (4 ceil(D/64) + log2(D) + 13) abs(scale) norm(q) norm(k_i) for D a power of two, a weight by
    e_i = d_i + u (max(s) - s_i + 50 + 5 c) of itself with c = ceil(L/512), and the result, in the Euclidean norm, by
    norm(sum_i w_i (e_i + max(e) + u (min(L, 512) + 3 c + 14)) abs(v_i)) + u (log2(Dv) + 2) norm(sum_i w_i v_i)
    + 2**-126 norm(sum_i abs(v_i)), v_i rotated. ``csrc/kernels/attention_definition.h`` derives this, for other D,
    softcap and masks too.

    A query that sees nothing gives 0, and so does one whose scores are all minus infinity. NaN in q, in a scale of a
    key that is seen, or in a mask gives NaN. A scale of a value that is not finite, be it NaN or an infinity (to which
    scales beyond 65504 are rounded in float16), gives NaN or infinities in the elements that share it if its position
    has weight. A position that is not seen has none. One that is seen loses it where the greatest score so far lies 88
    or more above its own, or rises by 88 or more at once, from one tile of 64 positions or chunk of 512 to the next;
    never within 87 of the greatest score of all. Where lesser rises add up to 88, what is not finite still counts.

    References
    ----------
    .. [1] M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867, 2018.
    .. [2] T. Dao, D. Y. Fu, S. Ermon, A. Rudra, C. Ré, "FlashAttention: fast and memory-efficient exact attention with
       IO-awareness", NeurIPS 2022.

    Examples
    --------
    Two heads with room for 8 positions, of which 3 are filled; codes of 4 bits, 15 being the greatest value:

    >>> import numpy as np, quantization as q
    >>> packed, norms = np.full((2, 8, 32), 0xFF, np.uint8), np.ones((2, 8, 1), np.float16)
    >>> x = q.kv_attention(np.zeros((4, 64), np.float32), (packed, norms), (packed, norms), length=3)
    >>> x.shape, bool(np.isclose(np.linalg.norm(x[0]), 8 * 2.734375))
    ((4, 64), True)
    """
    # fmt: off
    return _C.kv_attention(_kv_attention._plan(), q, k_cache, v_cache, bits, value_bits, codec, length, start, scale,
                           mask, causal, window, softcap, scale_factor_d512, out, input_dtype)
    # fmt: on
