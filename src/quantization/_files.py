"""Tensors of ``.npz``, ``.npy`` and ``.safetensors`` files, through the libraries that own the formats."""

from __future__ import annotations

import importlib.util
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ._safetensors import map_safetensors


@dataclass(frozen=True)
class Unreadable:
    """Stands for a tensor whose values could not be had as a NumPy array."""

    shape: tuple[int, ...]
    dtype: str
    reason: str


class CorruptError(Exception):
    """The file is not what its suffix says."""


# What NumPy and zipfile raise of damaged archives: RuntimeError where bits say that they are encrypted, or packed in a
# way that does not exist; OSError without a file name where they point outside.
_DAMAGE = (ValueError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError, KeyError, OSError)


def _corrupt(error: BaseException, name: str = "") -> BaseException:
    """Return the error to raise: a file that cannot be opened is no damaged one."""
    if isinstance(error, OSError) and error.filename is not None:
        return error
    return CorruptError(f"{name}{error}")


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
        except _DAMAGE as error:
            raise _corrupt(error) from error
        if not isinstance(self._archive, Mapping):
            raise CorruptError("it holds a single array; is it a .npy file?")
        self.names = list(self._archive)

    def __getitem__(self, name: str) -> Any:
        try:
            array = self._archive[name]
        except _DAMAGE as error:
            if "Object arrays" in str(error):
                return Unreadable((), "object", "object: pickled objects are never loaded")
            raise _corrupt(error, f"{name}: ") from error
        return array if isinstance(array, np.ndarray) else Unreadable((len(array),), "bytes", "not an array")


class _SafetensorsReader:
    def __init__(self, path: Path) -> None:
        self._tensors = map_safetensors(path)[0]
        self.names = list(self._tensors)

    def __getitem__(self, name: str) -> np.ndarray | Unreadable:
        tensor = self._tensors[name]
        if tensor.tag == "BF16" and importlib.util.find_spec("ml_dtypes") is None:
            reason = "BF16: needs ml_dtypes, which pip install 'quantization[io]' brings"
            return Unreadable(tensor.shape, tensor.tag, reason)
        if tensor.tag not in ("BF16", "F16", "F32", "F64") and not re.fullmatch(r"BOOL|[IU](8|16|32|64)", tensor.tag):
            return Unreadable(tensor.shape, tensor.tag, f"{tensor.tag}: not a type that is quantized")
        return tensor.array()


READERS: dict[str, Callable[[Path], Reader]] = {
    ".npz": _NpzReader,
    ".npy": _NpyReader,
    ".safetensors": _SafetensorsReader,
}


def read_safetensors(path: Path) -> dict[str, np.ndarray | Unreadable]:
    """All tensors of a safetensors file by name."""
    tensors = _SafetensorsReader(path)
    return {name: tensors[name] for name in tensors.names}
