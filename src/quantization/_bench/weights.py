"""Packed weights in as many distinct copies as no cache holds, and what their product should be."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

import quantization as q

from . import machine
from .ceilings import ALIGNMENT, aligned
from .shapes import Shape
from .stored import NUMBERS, Stored, format_of, scales_of

CACHE_MULTIPLE = 4
_ERROR_ROWS, _ERROR_COLUMNS = 2, 256


def _bf16_bits(array: np.ndarray) -> np.ndarray:
    """Float32 as the bits of bfloat16, rounded to nearest even; the values here are finite."""
    bits = array.view(np.uint32)
    rounded: np.ndarray = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return rounded


def as_dtype(array: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 as "float32", "float16", or the bits of "bfloat16"."""
    return _bf16_bits(np.ascontiguousarray(array)) if dtype == "bfloat16" else array.astype(dtype)


def as_float64(array: Any, dtype: str) -> np.ndarray:
    """Values of what `as_dtype` returned."""
    values = np.asarray(array)
    if dtype == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    wide: np.ndarray = values.astype(np.float64)
    return wide


class Weights:
    """A quantized matrix, `copies` times in memory, and rows of x for it.

    Parameters
    ----------
    shape : Shape
    stored : int or str
        Bits of affine codes, or a mode of small floats.
    group_size : int, default 64
        Of affine codes.
    transpose : bool, default True
        Whether it is stored as [N, K], for x @ W.T; else as [K, N], for x @ W.
    cold : bool, default True
        Whether to make copies that hold `CACHE_MULTIPLE` times the last level of cache (at most a quarter of the free
        memory); else one.
    scale_dtype : str, default "float16"
        Of affine scales and biases; those of small floats are bytes.
    most : int, optional
        At most so many copies, whether or not a cache holds them.
    multiple : int, default 1
        Of which the number of copies is to be a multiple, if it is not `most`.

    Attributes
    ----------
    nbytes : int
        Of one copy: codes, scales and biases.
    memory : str
        "cold" if no cache holds all the copies, "hot" if there is one, else their number.
    """

    def __init__(
        self,
        shape: Shape,
        stored: Stored,
        group_size: int = 64,
        *,
        transpose: bool = True,
        cold: bool = True,
        scale_dtype: str = "float16",
        most: int | None = None,
        multiple: int = 1,
    ) -> None:
        self.format = format_of(stored, group_size)
        self.shape, self.stored, self.transpose = shape, stored, transpose
        self.mode, self.bits, self.group_size = self.format
        self.scale_dtype = scale_dtype if self.format.is_affine else "uint8"
        placed = shape if transpose else Shape(shape.k, shape.n)
        parts = _packed(placed, stored, group_size, self.scale_dtype)
        sizes = [-(-part.nbytes // 64) * 64 for part in parts]
        self.nbytes = sum(part.nbytes for part in parts)
        self._slot = -(-sum(sizes) // ALIGNMENT) * ALIGNMENT
        limit = min(CACHE_MULTIPLE * machine.last_level_cache(), machine.memory() // 4)
        enough = max(2, -(-limit // self._slot)) if cold else 1
        enough = -(-enough // multiple) * multiple
        self.copies = min(enough, most or enough)
        self.memory = "hot" if self.copies == 1 else "cold" if self.copies == enough else f"{self.copies} copies"
        self._arena = aligned(self._slot * self.copies)
        self._next = 0
        self.parts = [self._place(copy, parts, sizes) for copy in range(self.copies)]

    def _place(self, copy: int, parts: tuple[np.ndarray, ...], sizes: list[int]) -> tuple[np.ndarray, ...]:
        placed, at = [], copy * self._slot
        for part, size in zip(parts, sizes, strict=True):
            view = self._arena[at : at + part.nbytes].view(part.dtype).reshape(part.shape)
            view[...] = part
            placed.append(view)
            at += size
        return tuple(placed)

    def _take(self) -> int:
        """Return the copy whose turn it is: every one is used once before one is used again."""
        copy = self._next
        self._next = (copy + 1) % self.copies
        return copy

    def next(self) -> tuple[np.ndarray, ...]:
        """Return codes, scales and biases of the next copy."""
        return self.parts[self._take()]

    def spans(self, count: int) -> list[np.ndarray]:
        """Return the memory of the next copies, for a probe to read."""
        return [self.span(self._take()) for _ in range(count)]

    def stacked(self, first: int, count: int) -> tuple[np.ndarray, ...]:
        """Return codes, scales and biases of some copies in arrays whose first axis counts them."""
        return tuple(
            np.lib.stride_tricks.as_strided(part, (count, *part.shape), (self._slot, *part.strides))
            for part in self.parts[first]
        )

    def span(self, copy: int) -> np.ndarray:
        """Return the memory of a copy, for a probe to read."""
        return self._arena[copy * self._slot : (copy + 1) * self._slot]

    def distinct(self, copy: int) -> tuple[np.ndarray, ...]:
        """Return a copy whose content differs from every other's: some libraries hold equal ones once."""
        return tuple(np.roll(part, copy, axis=0) for part in self.parts[0])

    def dense(self, copy: int = 0) -> np.ndarray:
        """Return the float32 matrix, as stored, that a copy stands for."""
        options: dict[str, Any] = {"input_dtype": "bfloat16"} if self.scale_dtype == "bfloat16" else {}
        options |= {"group_size": self.group_size, "bits": self.bits} if self.format.is_affine else {}
        w: np.ndarray = getattr(q, f"{self.mode}_dequantize")(*self.distinct(copy), dtype="float32", **options)
        return w

    def x(self, m: int, dtype: str) -> np.ndarray:
        """Return m rows of normal numbers, the same for every caller."""
        rows = np.random.default_rng(7).standard_normal((m, self.shape.k), dtype=np.float32)
        return as_dtype(rows, dtype)

    def error(self, y: Any, dtype: str, x_dtype: str) -> float:
        """Return |y - x W| / |x W| (2-norms), against float64 from the stored codes, over a corner of y."""
        rows = np.asarray(y).reshape(-1, self.shape.n)[:_ERROR_ROWS, :_ERROR_COLUMNS]
        exact = as_float64(self.x(len(rows), x_dtype), x_dtype) @ self._corner.T
        return float(np.linalg.norm(as_float64(rows, dtype) - exact) / np.linalg.norm(exact))

    @functools.cached_property
    def unpacked(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes, scales and zero points of the first copy, which is affine."""
        w, *stored = self.parts[0]
        scales, biases = (as_float64(part, self.scale_dtype).astype(np.float32) for part in stored)
        return _unpack(w, self.bits), scales, np.rint(-biases / scales)

    @functools.cached_property
    def _corner(self) -> np.ndarray:
        parts = self.parts[0]
        if self.transpose:
            parts = tuple(part[:_ERROR_COLUMNS] for part in parts)
        codes = _unpack(parts[0], self.bits)
        if self.format.is_affine:
            scales, biases = (
                np.repeat(as_float64(part, self.scale_dtype), self.group_size, axis=1) for part in parts[1:]
            )
            wide = codes.astype(np.float64) * scales + biases
        else:
            wide = NUMBERS[self.bits][codes] * np.repeat(scales_of(self.mode, parts[1]), self.group_size, axis=1)
        return wide if self.transpose else np.ascontiguousarray(wide[:, :_ERROR_COLUMNS].T)


def _unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes from a stream of bits, lowest first."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    digits = stream.reshape(*words.shape[:-1], -1, bits)
    codes: np.ndarray = np.packbits(digits, axis=-1, bitorder="little")[..., 0]
    return codes


def codes_of(weights: Weights, copy: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a distinct copy as other layouts need it: uint8 codes [N, K], float32 scales and zero points [N, groups].

    A weight is (code - zero point) * scale.
    """
    codes, scales, zeros = (np.roll(part, copy, axis=0) for part in weights.unpacked)
    return codes, scales, zeros


def _four_digits(values: np.ndarray) -> np.ndarray:
    """Float32 rounded to four significant bits."""
    fraction, exponent = np.frexp(values)
    rounded: np.ndarray = np.ldexp(np.rint(fraction * 16) / 16, exponent).astype(np.float32)
    return rounded


def _pack(shape: Shape, stored: Stored, group_size: int, scale_dtype: str) -> tuple[np.ndarray, ...]:
    """Codes, scales and, if affine, biases of a random matrix [N, K] as stored.

    Affine scales have four significant bits and biases are -scale times a code: some libraries hold zero points as
    codes, some hold 16-bit floats, and at 4 bits the matrix is the same, exactly, for all of them. At most 4096 rows
    are drawn; larger matrices repeat them, which no kernel can tell.
    """
    rows = min(shape.n, 4096)
    w = np.random.default_rng(3).standard_normal((rows, shape.k), dtype=np.float32) * np.float32(0.02)
    parts: tuple[np.ndarray, ...]
    if isinstance(stored, str):
        parts = getattr(q, f"{stored}_quantize")(w)
    else:
        codes, scales, biases = q.affine_quantize(w, group_size, stored)
        zeros = np.clip(np.rint(-biases / scales), 0, 2**stored - 1)
        scales = _four_digits(scales)
        parts = codes, as_dtype(scales, scale_dtype), as_dtype(-zeros * scales, scale_dtype)
    times = -(-shape.n // rows)
    return tuple(np.tile(part, (times, 1))[: shape.n] if times > 1 else part for part in parts)


_packed = functools.lru_cache(maxsize=4)(_pack)
