"""GGUF files: the block types that one of MLX's formats holds exactly, moved over without rounding.

The layouts of the blocks are those of ggml (ggml-common.h). "Exactly" is meant of values in float32 arithmetic, in
which ggml decodes too: a code times a scale of 11 or 17 significant bits is exact there, so scale * code + bias is
rounded no more often than in ggml. (Only the sign of a zero is lost where ggml makes -0.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ._extras import require
from ._formats import Format, known_formats
from ._qtensor import QTensor
from ._text import first_line

# Of one block to a row: codes, scales, and biases or None.
_Parts = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def _halves(blocks: np.ndarray, start: int, count: int = 1) -> np.ndarray:
    """Read `count` float16 numbers at a byte of every block, as float32: products with codes are exact there."""
    return np.ascontiguousarray(blocks[:, start : start + 2 * count]).view(np.float16).astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Low nibbles, then high ones: ggml keeps the two halves of a block side by side."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(packed: np.ndarray) -> np.ndarray:
    return np.unpackbits(packed, axis=-1, bitorder="little") << 4


def _q4_0(blocks: np.ndarray) -> _Parts:
    scale = _halves(blocks, 0)
    return _nibbles(blocks[:, 2:]), scale, -8 * scale


def _q4_1(blocks: np.ndarray) -> _Parts:
    return _nibbles(blocks[:, 4:]), _halves(blocks, 0), _halves(blocks, 2)


def _q5_0(blocks: np.ndarray) -> _Parts:
    scale = _halves(blocks, 0)
    return _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6]), scale, -16 * scale


def _q5_1(blocks: np.ndarray) -> _Parts:
    return _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8]), _halves(blocks, 0), _halves(blocks, 2)


def _q8_0(blocks: np.ndarray) -> _Parts:
    scale = _halves(blocks, 0)
    return blocks[:, 2:] ^ 128, scale, -128 * scale  # two's complement to an offset of 128


def _k_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and biases of Q4_K's and Q5_K's 8 groups: 6-bit integers, in 12 bytes, times two float16 numbers.

    Of the bytes, 4 hold the first scales and 4 the first minima in their low 6 bits; the 4 last hold the low nibbles
    of the later ones, whose two high bits are those that the first left free.
    """
    first, minima, later = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, (later & 15) | (first >> 6 << 4)], axis=1)
    minima = np.concatenate([minima & 63, (later >> 4) | (minima >> 6 << 4)], axis=1)
    factors = _halves(blocks, 0, 2)
    return factors[:, :1] * scales, -factors[:, 1:] * minima


def _k_nibbles(packed: np.ndarray) -> np.ndarray:
    """Each 32 bytes hold two groups of 32, in the low and in the high nibbles."""
    return _nibbles(packed.reshape(-1, 4, 32)).reshape(-1, 256)


def _q4_k(blocks: np.ndarray) -> _Parts:
    return _k_nibbles(blocks[:, 16:]), *_k_scales(blocks)


def _q5_k(blocks: np.ndarray) -> _Parts:
    # Bit g of byte i is the fifth of element i of group g.
    fifth = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1) << 4
    return _k_nibbles(blocks[:, 48:]) | fifth.reshape(-1, 256), *_k_scales(blocks)


def _ternary(codes: np.ndarray, scale: np.ndarray) -> _Parts:
    """Codes 0, 1, 2 of 256 elements for -1, 0, 1; the scale serves both groups of 128."""
    scales = np.repeat(scale, 2, axis=1)
    return codes, scales, -scales


def _tq2_0(blocks: np.ndarray) -> _Parts:
    packed = blocks[:, :64].reshape(-1, 2, 1, 32)
    return _ternary((packed >> np.array([[0], [2], [4], [6]], np.uint8) & 3).reshape(-1, 256), _halves(blocks, 64))


def _tq1_0(blocks: np.ndarray) -> _Parts:
    """Decode digits of base 3, five (at last four) to a byte, the byte being the fraction rounded up over 256.

    Times 3**n modulo 256, the fraction starts at digit n; times 3, its integer part is that digit.
    """
    digits = []
    for start, stop, count in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        powers = np.array([[1], [3], [9], [27], [81]], np.uint8)[:count]
        fractions = blocks[:, None, start:stop] * powers  # uint8: modulo 256
        digits.append((fractions.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(len(blocks), -1))
    return _ternary(np.concatenate(digits, axis=1), _halves(blocks, 52))


def _mxfp4(blocks: np.ndarray) -> _Parts:
    return _nibbles(blocks[:, 1:]), blocks[:, :1], None


def _nvfp4(blocks: np.ndarray) -> _Parts:
    return _nibbles(blocks[:, 4:].reshape(-1, 4, 8)).reshape(-1, 64), blocks[:, :4], None


@dataclass(frozen=True)
class _BlockType:
    target: tuple[str, int, int]
    take_apart: Callable[[np.ndarray], _Parts]


_BLOCK_TYPES = {
    "Q4_0": _BlockType(("affine", 4, 32), _q4_0),
    "Q4_1": _BlockType(("affine", 4, 32), _q4_1),
    "Q5_0": _BlockType(("affine", 5, 32), _q5_0),
    "Q5_1": _BlockType(("affine", 5, 32), _q5_1),
    "Q8_0": _BlockType(("affine", 8, 32), _q8_0),
    "Q4_K": _BlockType(("affine", 4, 32), _q4_k),
    "Q5_K": _BlockType(("affine", 5, 32), _q5_k),
    "TQ1_0": _BlockType(("affine", 2, 128), _tq1_0),
    "TQ2_0": _BlockType(("affine", 2, 128), _tq2_0),
    "MXFP4": _BlockType(("mxfp4", 4, 32), _mxfp4),
    "NVFP4": _BlockType(("nvfp4", 4, 16), _nvfp4),
}
_LARGEST_NVFP4 = 2688  # 448 * 6: a global scale stands for so many times the factor that it means
_PLAIN_TYPES = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")


class Tensor:
    """A tensor of a GGUF file, its bytes mapped."""

    def __init__(self, entry: Any, block: tuple[int, int]) -> None:
        self.name, self.type = str(entry.name), str(entry.tensor_type.name)
        self.shape = tuple(int(length) for length in reversed(entry.shape.tolist()))
        self.nbytes = int(entry.n_bytes)
        self.is_plain = self.type in _PLAIN_TYPES
        self._data, self._block = np.asarray(entry.data), block
        self.scale: Tensor | None = None
        """A tensor of numbers that count for this whole one, of type NVFP4."""

    @property
    def format(self) -> Format | None:
        """The format that holds it exactly, None if there is none."""
        if self.scale and self.factor is None:
            return None
        target = _BLOCK_TYPES[self.type].target if self.type in _BLOCK_TYPES else None
        return next((f for f in known_formats() if (f.mode, f.bits, f.group_size) == target), None)

    @property
    def reason(self) -> str:
        """Why there is no such format."""
        if self.scale and self.factor is None:
            return f"{self.type}: {self.scale.name} is not one finite, positive F32 number"
        if self.type in _BLOCK_TYPES:
            return f"{self.type}: needs {_BLOCK_TYPES[self.type].target[0]}, which this version lacks"
        groups = " (its groups are of 16)" if self.type in ("Q2_K", "Q3_K", "Q6_K") else ""
        return f"{self.type}: no format here holds it exactly{groups}"

    @property
    def factor(self) -> np.float32 | None:
        """What `scale` says, if it is what a global scale can say."""
        if self.scale is None or self.scale.type != "F32" or math.prod(self.scale.shape) != 1:
            return None
        number: np.float32 = self.scale.array().reshape(-1)[0]
        return number if 0 < number < np.finfo(np.float32).max / _LARGEST_NVFP4 else None

    def array(self) -> np.ndarray:
        """View the numbers of a plain type."""
        if self.type == "BF16":
            numbers: np.ndarray = self._data.view(require("ml_dtypes", "io").bfloat16)
            return numbers
        return self._data

    def decode(self) -> np.ndarray:
        """Float32 values of any type that gguf decodes, by its code, which leaves `scale` to its callers."""
        library = require("gguf", "io")
        try:
            decoded: np.ndarray = library.dequantize(self._data, library.GGMLQuantizationType[self.type])
        except NotImplementedError as error:
            raise ValueError(f"{self.name}: {first_line(error)}") from error
        decoded = decoded.astype(np.float32, copy=False).reshape(self.shape)
        return decoded if self.factor is None else decoded * self.factor

    def load(self) -> QTensor:
        """Move the blocks over to MLX's layout."""
        block_type = _BLOCK_TYPES[self.type]
        mode, bits, group_size = block_type.target
        codes, scales, biases = block_type.take_apart(self._data.reshape(-1, self._block[1]))
        largest = {"affine": math.inf, "mxfp4": 255, "nvfp4": 127}[mode]  # there infinity and NaN begin
        if not (np.isfinite(scales) & (scales < largest)).all() or (
            biases is not None and not np.isfinite(biases).all()
        ):
            raise ValueError(f"{self.name}: a block of {self.type} has a scale that is NaN or infinite")
        scales, biases = _narrowed(scales, biases)
        parts = [part if part is None else part.reshape(*self.shape[:-1], -1) for part in (scales, biases)]
        packed = pack_codes(codes.reshape(self.shape), bits)
        overall = None if self.factor is None else _LARGEST_NVFP4 * float(self.factor)
        return QTensor(packed, *parts, mode=mode, bits=bits, group_size=group_size, global_scale=overall)


def _narrowed(scales: np.ndarray, biases: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Scales and biases as float16 if that holds them exactly, as it does but for K-quants and huge scales."""
    if biases is None:
        return np.ascontiguousarray(scales), None
    with np.errstate(over="ignore"):
        narrow = scales.astype(np.float16), biases.astype(np.float16)
    exact = (narrow[0] == scales).all() and (narrow[1] == biases).all()
    return narrow if exact else (scales, biases)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes of shape (..., K) into rows of uint32 words, as little-endian streams with the first code lowest.

    As many codes as fill whole bytes (8 of 5 bits: 5 bytes) are joined in one integer.
    """
    count = 8 // math.gcd(8, bits)
    size = count * bits // 8
    groups = codes.reshape(*codes.shape[:-1], -1, count)
    joined = np.zeros(groups.shape[:-1], np.uint8 if size == 1 else np.uint64)
    for index in range(count):
        joined |= groups[..., index].astype(joined.dtype) << joined.dtype.type(bits * index)
    octets = np.ascontiguousarray(joined[..., None].view(np.uint8)[..., :size])
    words: np.ndarray = octets.reshape(*codes.shape[:-1], -1).view(np.uint32)
    return words


def read_gguf(path: Path) -> tuple[list[Tensor], dict[str, Any]]:
    """All tensors of a file in its order, and the fields of its header, undecoded.

    Raises
    ------
    OSError
        If the file cannot be opened.
    ValueError
        If it is cut short, or its header does not agree with it.
    """
    library = require("gguf", "io")
    with open(path, "rb"):
        pass  # a missing or forbidden file is the operating system's own OSError
    try:
        with np.errstate(over="ignore"):  # products that wrap are found by _check_entry
            reader: Any = type("Reader", (_Bounded, library.GGUFReader), {"_library": library})(path)
        if reader.byte_order != "I":
            raise ValueError("it is big-endian")
    except (ValueError, LookupError, ArithmeticError, RecursionError, TypeError) as error:
        raise ValueError(f"{path}: not a readable GGUF file: {first_line(error)}") from error
    sizes = library.GGML_QUANT_SIZES
    return [Tensor(entry, sizes[entry.tensor_type]) for entry in reader.tensors], dict(reader.fields)


class _Bounded:
    """Put before gguf's reader, which takes a slice that ends behind the end of the file for a shorter one."""

    _library: Any

    @property
    def data(self) -> np.ndarray:
        return self._content

    @data.setter
    def data(self, content: np.ndarray) -> None:
        self._content = np.asarray(content)  # a plain array is sliced several times as fast as a memmap

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        piece = super()._get(offset, dtype, count, override_order)  # type: ignore[misc]
        if len(piece) < int(count):
            raise ValueError(f"it has {len(self.data)} bytes, but its header goes on behind them")
        return piece

    def _build_tensors(self, start: int, fields: Any) -> None:
        for field in fields:
            _check_entry(self._library, field, start, len(self.data))
        super()._build_tensors(start, fields)  # type: ignore[misc]


def _check_entry(library: Any, field: Any, start: int, file_size: int) -> None:
    """Check one tensor's entry in integers that do not overflow."""
    _, _, _, lengths, kind, offset = field.parts
    shape = [int(length) for length in lengths]  # the row's length comes first
    try:
        block, size = library.GGML_QUANT_SIZES[library.GGMLQuantizationType(int(kind[0]))]
    except (KeyError, ValueError):
        raise ValueError(f"{field.name} has the type number {kind[0]}, which gguf does not know") from None
    if len(shape) > 4 or (shape and shape[0] % block):
        raise ValueError(f"{field.name} has the shape {shape[::-1]}; rows are of blocks of {block}, axes 4 at most")
    end = start + int(offset[0]) + math.prod(shape) // block * size
    if end > file_size:
        raise ValueError(f"{field.name} ends {end - file_size} bytes behind the end of the file")
