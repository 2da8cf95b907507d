"""The stored formats as the tables name them: affine codes by their width, small floats by their mode."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .. import _C

Stored = int | str
"""A width of affine codes, such as 4, or a mode of small floats, such as "mxfp4"."""


class Format(NamedTuple):
    """What a format stores: codes of ``bits``, and for each group of ``group_size`` a scale, and a bias if affine."""

    mode: str
    bits: int
    group_size: int

    @property
    def is_affine(self) -> bool:
        """Whether a weight is scale * code + bias."""
        return self.mode == "affine"

    @property
    def bits_per_weight(self) -> float:
        """With scales and biases, of 16 bits if affine and else of 8."""
        return self.bits + (32 if self.is_affine else 8) / self.group_size

    def __str__(self) -> str:
        return f"affine {self.bits}-bit, g{self.group_size}" if self.is_affine else self.mode


_ROWS = {row["name"]: row for row in _C.formats()}
SMALL_FLOATS: tuple[str, ...] = tuple(name for name, row in _ROWS.items() if row["family"] == "fp")
WIDTHS = (2, 3, 4, 5, 6, 8)
"""Of affine codes that the tables compare: MLX's, but for 1 bit, which only weights trained for it bear."""
EVERY: tuple[Stored, ...] = (*WIDTHS, *SMALL_FLOATS)


def format_of(stored: Stored, group_size: int = 64) -> Format:
    """Return what is stored; the group size is that of affine codes."""
    if isinstance(stored, int):
        return Format("affine", stored, group_size)
    row = _ROWS[stored]
    return Format(stored, row["bits"], row["group_sizes"][0])


def parse(text: str) -> tuple[Stored, ...]:
    """Resolve ``"affine_3,mxfp4"``, or ``"all"``.

    Raises
    ------
    ValueError
        If a part is no format's name.
    """
    if text == "all":
        return EVERY
    names: dict[str, Stored] = {f"affine_{bits}": bits for bits in WIDTHS} | {name: name for name in SMALL_FLOATS}
    for part in text.split(","):
        if part not in names:
            raise ValueError(f"bench: no format {part!r}; there are all, {', '.join(names)}")
    return tuple(dict.fromkeys(names[part] for part in text.split(",")))


def _numbers(exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """Every number of a small float of no infinity, by its code; the largest code of 8 bits is NaN."""
    codes = np.arange(2 ** (exponent_bits + mantissa_bits))
    exponents, fractions = codes >> mantissa_bits, (codes % 2**mantissa_bits) / 2**mantissa_bits
    bias = 2 ** (exponent_bits - 1) - 1
    values = np.ldexp(fractions + (exponents > 0), np.maximum(exponents, 1) - bias)
    if len(codes) == 128:
        values[-1] = np.nan
    return np.concatenate([values, -values])


NUMBERS = {4: _numbers(2, 1), 8: _numbers(4, 3)}
"""float64 values of the codes of FP4 (E2M1) and FP8 (E4M3), by bits."""


def scales_of(mode: str, scales: np.ndarray) -> np.ndarray:
    """Return float64 values of scale bytes: E4M3 for nvfp4, else powers of two."""
    return NUMBERS[8][scales] if mode == "nvfp4" else np.ldexp(1.0, scales.astype(np.int32) - 127)
