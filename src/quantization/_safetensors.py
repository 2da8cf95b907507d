"""Safetensors files as memory-mapped bytes of any type, and files written piece by piece.

The library checks a file's header and tells names, types and shapes. It makes NumPy arrays of the types that NumPy
knows only, though, and copies what it reads; so the bytes are viewed here. The format leaves no holes: tensors follow
one another in the order of their offsets, and the first begins behind the header.

Writing, the library wants all tensors of a file at once, in memory. A converted model does not fit there, hence the
header and the seeks of `write_safetensors`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ._extras import require
from ._text import first_line

# The format's types: bits of an element, and the NumPy or ml_dtypes type that views it, if there is one.
_TYPES: dict[str, tuple[int, str | None]] = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "U16": (16, "uint16"),
    "I16": (16, "int16"),
    "U32": (32, "uint32"),
    "I32": (32, "int32"),
    "U64": (64, "uint64"),
    "I64": (64, "int64"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "F32": (32, "float32"),
    "F64": (64, "float64"),
    "C64": (64, "complex64"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F4": (4, None),
}
_TAGS = {name: tag for tag, (_, name) in _TYPES.items() if name}


def tag_of(dtype: np.dtype) -> str:
    """Find what the format calls a type; ValueError if it has no name for it."""
    if dtype.name not in _TAGS:
        raise ValueError(f"{dtype}: safetensors has no such type")
    return _TAGS[dtype.name]


def dtype_of(tag: str) -> np.dtype:
    """Return the type that views a tag's bytes; TypeError if there is none, ImportError if ml_dtypes would have it."""
    name = _TYPES[tag][1]
    if name is None:
        raise TypeError(f"{tag}: {_TYPES[tag][0]} bits an element, which no array type has")
    with contextlib.suppress(TypeError):
        return np.dtype(name)
    found: np.dtype = np.dtype(getattr(require("ml_dtypes", "io"), name))
    return found


@dataclass(frozen=True)
class TensorSpec:
    """Name, type and shape of a tensor in a file."""

    name: str
    tag: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return (math.prod(self.shape) * _TYPES[self.tag][0] + 7) // 8


@dataclass(frozen=True)
class StoredTensor(TensorSpec):
    """A tensor whose bytes are mapped, not read."""

    file: Path
    content: np.ndarray

    def array(self) -> np.ndarray:
        """View the bytes; at whatever address they lie, for writers need not align them."""
        return self.content.view(dtype_of(self.tag)).reshape(self.shape)


def map_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """All tensors of a file by name, and the texts of its header.

    Raises
    ------
    OSError
        If the file cannot be opened.
    ValueError
        If it is cut short, or its header does not agree with it.
    """
    library = require("safetensors", "io")
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    try:
        with library.safe_open(path, framework="numpy") as header:
            entries = [(name, header.get_slice(name)) for name in header.offset_keys()]
            metadata = dict(header.metadata() or {})
            specs = [(name, entry.get_dtype(), tuple(entry.get_shape())) for name, entry in entries]
    except library.SafetensorError as error:
        raise ValueError(f"{path}: not a readable .safetensors file: {first_line(error)}") from error
    content = np.asarray(np.memmap(path, np.uint8, mode="r"))
    tensors = {}
    for name, tag, shape in specs:
        if tag not in _TYPES:
            raise ValueError(f"{path}: {name} has the type {tag}, which is not known here")
        size = TensorSpec(name, tag, shape).nbytes
        tensors[name] = StoredTensor(name, tag, shape, path, content[start : start + size])
        start += size
    if start != content.size:  # the library has seen to it, unless the table above is wrong
        raise ValueError(f"{path}: its tensors end at byte {start} of {content.size}")
    return tensors, metadata


Put = Callable[[str, int, np.ndarray], None]


@contextlib.contextmanager
def write_safetensors(path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> Iterator[Put]:
    """Write a file of tensors that are known by type and shape, their bytes in any order and any number of pieces.

    The block gets ``put(name, first, piece)``, which stores an array as the bytes from number `first` on. The file
    appears under its name when the block has ended, complete and on the disk, in place of the one that was there; if
    the block raises, nothing appears.
    """
    largest_first = sorted(specs, key=lambda spec: -_TYPES[spec.tag][0])  # so that every tensor is aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    starts, end = {}, 0
    for spec in largest_first:
        if spec.name in header:
            raise ValueError(f"{path.name}: two tensors would have the name {spec.name}")
        starts[spec.name], end = end, end + spec.nbytes
        offsets = [starts[spec.name], end]
        header[spec.name] = {"dtype": spec.tag, "shape": list(spec.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replaced_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)

        def put(name: str, first: int, piece: np.ndarray) -> None:
            file.seek(8 + len(text) + starts[name] + first)
            file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))

        yield put


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[Any]:
    """Open a file for writing that takes its place when the block has ended, complete and on the disk."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Have the disk know the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
