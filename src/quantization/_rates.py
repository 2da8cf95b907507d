"""Rate and distortion of the key-value codecs and of what else stores a rotated vector: a table and a picture.

Vectors are Gaussian, for which the least error at a rate is known (T. M. Cover, J. A. Thomas, Elements of Information
Theory, section 10.3): at R bits per value nothing has a relative mean squared error below 4^-R. A quantizer that takes
coordinates one by one has the optimum of Lloyd and Max, at high rates sqrt(3) pi/2 times that bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from ._extras import require
from ._kv_codec import dequantize_kv, fwht, hadamard_quantize_kv, hadamard_quantize_kv_hb, quantize_kv
from ._quantize import affine_dequantize, affine_quantize
from ._text import table

LLOYD_MAX = {2: 0.117482, 3: 0.0345478, 4: 0.00950101, 5: 2.50467e-3, 6: 6.4424e-4, 8: 4.1185e-5}
"""Mean squared error of the best quantizer of a standard normal variable, by its bits."""


class Rate(NamedTuple):
    """One way to store vectors.

    Attributes
    ----------
    format : str
        Its name.
    bits : int
        Of a code.
    stored_bits : float
        Bits stored per value, scales and unused bits included.
    error : float
        Relative mean squared error, measured.
    theory : float or None
        That of the best quantizer of single coordinates with these bits, for formats that aim at it.
    """

    format: str
    bits: int
    stored_bits: float
    error: float
    theory: float | None

    @property
    def shannon(self) -> float:
        """The least error possible at the stored bits."""
        return 4.0**-self.stored_bits

    @property
    def gap_db(self) -> float:
        """How far the error is above that bound."""
        return 10 * math.log10(self.error / self.shannon)


def _relative_error(x: NDArray[np.float32], decoded: NDArray[np.float32]) -> float:
    exact = x.astype(np.float64)
    return float((((exact - decoded) ** 2).sum(axis=-1) / (exact**2).sum(axis=-1)).mean())


def _rate(name: str, bits: int, x: NDArray[np.float32], decoded: NDArray[np.float32],
          stored: Sequence[NDArray[np.generic]], theory: float | None) -> Rate:  # fmt: skip
    size = 8 * sum(array.nbytes for array in stored) / x.size
    return Rate(name, bits, size, _relative_error(x, decoded), theory)


def _codec_1(x: NDArray[np.float32]) -> Iterator[Rate]:
    """All widths that codec 1 has for this head dimension."""
    count, dim = x.shape
    if dim & (dim - 1):
        return
    for bits in (4, 5, 6, 8) if dim in (256, 512) else (4,):
        packed = np.empty((count, 1, dim // 2 if bits == 4 else dim), np.uint8)
        norms = np.empty((count, 1) if dim < 512 else (count, 1, dim // 256), np.float32)
        if bits == 4:
            hadamard_quantize_kv(x, packed, norms, write_pos=0)
        else:
            hadamard_quantize_kv_hb(x, packed, norms, write_pos=0, codebook_bits=bits)
        decoded = dequantize_kv(packed, norms, bits, codec=1)[:, 0]
        yield _rate("codec 1", bits, x, decoded, (packed, norms), LLOYD_MAX[bits])


def _codec_2(x: NDArray[np.float32]) -> Iterator[Rate]:
    for name, scale in (("codec 2", "unbiased"), ("codec 2 l.s.", "least_squares")):
        for bits in LLOYD_MAX:
            stored = quantize_kv(x, bits, scale=scale)
            yield _rate(name, bits, x, dequantize_kv(*stored, bits), stored, LLOYD_MAX[bits])


def _int8_absmax(rotated: NDArray[np.float32]) -> Rate:
    """Symmetric int8 with one float16 scale per vector."""
    scales = (np.abs(rotated).max(axis=-1, keepdims=True) / 127).astype(np.float16)
    scale = scales.astype(np.float32)
    codes = np.clip(np.rint(rotated / scale), -127, 127).astype(np.int8)
    return _rate("int8 absmax", 8, rotated, codes * scale, (codes, scales), None)


def _affine(rotated: NDArray[np.float32]) -> Iterator[Rate]:
    """Affine codes with float16 scales and biases, in groups along whole vectors."""
    for group_size in (64, 32):
        if rotated.shape[1] % group_size == 0:
            for bits in LLOYD_MAX:
                stored = affine_quantize(rotated, group_size, bits, scale_dtype=np.float16)
                decoded = affine_dequantize(*stored, group_size, bits, dtype=np.float32)
                yield _rate(f"affine g{group_size}", bits, rotated, decoded, stored, None)


def measure(head_dim: int = 256, vectors: int = 10000, seed: int = 0) -> list[Rate]:
    """Store Gaussian vectors in every format and compare what comes back.

    Parameters
    ----------
    head_dim : int
        Length of a vector, a multiple of 8 up to 4096.
    vectors : int
        How many; the relative deviation of an error is about 2.6/sqrt(head_dim * vectors).
    seed : int
        Of the random numbers.

    Returns
    -------
    list of Rate
        Those of int8 and of affine codes are taken on the rotated vectors, so that all formats see the same.

    Raises
    ------
    ValueError
        For a head dimension that `quantize_kv` does not take, or without a vector.

    Examples
    --------
    >>> from quantization import _rates
    >>> rates = _rates.measure(128, 500)
    >>> [f"{rate.bits}: {rate.stored_bits}" for rate in rates if rate.format == "codec 2"]
    ['2: 2.125', '3: 3.125', '4: 4.125', '5: 5.125', '6: 6.125', '8: 8.125']
    """
    if vectors < 1:
        raise ValueError(f"rates: vectors must be at least 1, got {vectors}")
    x = np.random.default_rng(seed).standard_normal((vectors, head_dim), dtype=np.float32)
    rates = [*_codec_2(x), *_codec_1(x)]
    rotated = fwht(x, signs=True)
    return [*rates, _int8_absmax(rotated), *_affine(rotated)]


def text(rates: Sequence[Rate]) -> str:
    """Return the table."""
    header = ("format", "bits", "bits/value", "relative MSE", "Lloyd-Max", "Shannon", "gap dB")
    rows = [
        (
            rate.format,
            str(rate.bits),
            f"{rate.stored_bits:.3f}",
            f"{rate.error:.3e}",
            "" if rate.theory is None else f"{rate.theory:.3e}",
            f"{rate.shannon:.3e}",
            f"{rate.gap_db:.2f}",
        )
        for rate in rates
    ]
    return table(header, rows)


def draw(path: str | Path, rates: Sequence[Rate]) -> None:
    """Write a picture of error over rate; needs matplotlib."""
    figure = require("matplotlib.figure", "plot").Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    ends = min(rate.stored_bits for rate in rates), max(rate.stored_bits for rate in rates)
    axes.plot(ends, [4.0**-bits for bits in ends], color="black", linewidth=0.8, label="Shannon's bound")
    axes.plot(*zip(*LLOYD_MAX.items(), strict=True), ":", color="grey", label="Lloyd-Max, scales not counted")
    for name in dict.fromkeys(rate.format for rate in rates):
        points = [(rate.stored_bits, rate.error) for rate in rates if rate.format == name]
        line = "" if name == "codec 1" else "-"  # a byte per code from 5 bits on: no line to draw
        axes.plot(*zip(*points, strict=True), line, marker=".", linewidth=0.8, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("bits stored per value")
    axes.set_ylabel("relative mean squared error")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def run(stream: TextIO, head_dim: int, vectors: int, picture: str | None) -> None:
    """Print the table, and draw the picture if one is asked for."""
    rates = measure(head_dim, vectors)
    print(
        f"{vectors} Gaussian vectors of {head_dim}; Shannon's bound and the gap to it at the bits stored\n", file=stream
    )
    print(text(rates), file=stream)
    if picture:
        draw(picture, rates)
