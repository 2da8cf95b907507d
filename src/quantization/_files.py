"""Tensors of ``.npz``, ``.npy`` and ``.safetensors`` files, through the libraries that own the formats."""

from __future__ import annotations

import importlib
import importlib.util
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ._extras import require
from ._text import first_line


@dataclass(frozen=True)
class Unreadable:
    """Stands for a tensor whose values could not be had as a NumPy array."""

    shape: tuple[int, ...]
    dtype: str
    reason: str


class CorruptError(Exception):
    """The file is not what its suffix says."""


class Reader(Protocol):
    names: list[str]

    def __getitem__(self, name: str) -> Any: ...


class _NpyReader:
    def __init__(self, path: Path) -> None:
        self.names, self._path = [path.stem], path

    def __getitem__(self, name: str) -> np.ndarray | Unreadable:
        try:
            array = np.load(self._path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            if "Python objects in dtype" in str(error):
                return Unreadable((), "object", "object: pickled objects are never loaded")
            raise CorruptError(str(error)) from error
        if not isinstance(array, np.ndarray):
            raise CorruptError("it holds a zip archive; is it a .npz file?")
        return array


class _NpzReader:
    def __init__(self, path: Path) -> None:
        try:
            self._archive = np.load(path, allow_pickle=False)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise CorruptError(str(error)) from error
        if not isinstance(self._archive, Mapping):
            raise CorruptError("it holds a single array; is it a .npy file?")
        self.names = list(self._archive)

    def __getitem__(self, name: str) -> Any:
        try:
            array = self._archive[name]
        except (ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            if "Object arrays" in str(error):
                return Unreadable((), "object", "object: pickled objects are never loaded")
            raise CorruptError(f"{name}: {error}") from error
        return array if isinstance(array, np.ndarray) else Unreadable((len(array),), "bytes", "not an array")


class _SafetensorsReader:
    def __init__(self, path: Path) -> None:
        library = require("safetensors", "io")
        # safetensors hands out bfloat16 arrays only if somebody has registered the type with NumPy before.
        self._has_bfloat16 = importlib.util.find_spec("ml_dtypes") is not None
        if self._has_bfloat16:
            importlib.import_module("ml_dtypes")
        try:
            self._file = library.safe_open(path, framework="numpy")
        except library.SafetensorError as error:
            raise CorruptError(str(error)) from error
        self.names = list(self._file.keys())

    def __getitem__(self, name: str) -> np.ndarray | Unreadable:
        entry = self._file.get_slice(name)
        stored, shape = entry.get_dtype(), tuple(entry.get_shape())
        if stored == "BF16" and not self._has_bfloat16:
            return Unreadable(shape, stored, "BF16: needs ml_dtypes, which pip install 'quantization[io]' brings")
        # The library refuses these with whatever error its look-up of the NumPy type ends in.
        if stored not in ("BF16", "F16", "F32", "F64") and not re.fullmatch(r"BOOL|[IU](8|16|32|64)", stored):
            return Unreadable(shape, stored, f"{stored}: not a type that is quantized")
        array: np.ndarray = self._file.get_tensor(name)
        return array


READERS: dict[str, Callable[[Path], Reader]] = {
    ".npz": _NpzReader,
    ".npy": _NpyReader,
    ".safetensors": _SafetensorsReader,
}


def read_safetensors(path: Path) -> dict[str, np.ndarray | Unreadable]:
    """All tensors of a safetensors file by name."""
    try:
        tensors = _SafetensorsReader(path)
    except CorruptError as error:
        raise ValueError(f"{path}: not a readable .safetensors file: {first_line(error)}") from error
    return {name: tensors[name] for name in tensors.names}
