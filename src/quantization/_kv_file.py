"""Files of a `KVCache`: ``.npz`` or ``.safetensors``, with its settings as JSON and a checksum of everything."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ._files import READERS, CorruptError
from ._safetensors import TensorSpec, map_safetensors, replaced_file, tag_of, write_safetensors
from ._text import first_line

# Of the layout of files: what a reader must know. Later versions of the package read the earlier ones.
VERSION = 1

# The array, or the text of the header, that holds the settings.
_SETTINGS = "quantization_kv_cache"

_ARRAYS = ("keys.packed", "keys.norms", "values.packed", "values.norms")


def write(path: Path, settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write a file, which takes the place of one that was there when all of it is on the disk."""
    kind = _kind(path)
    text = json.dumps({"version": VERSION, "crc32": _checksum(settings, arrays), "settings": dict(settings)})
    if kind == ".npz":
        parts: dict[str, Any] = {_SETTINGS: np.array(text), **arrays}
        with replaced_file(path) as file:
            np.savez(file, **parts)
        return
    specs = [TensorSpec(name, tag_of(array.dtype), array.shape) for name, array in arrays.items()]
    with write_safetensors(path, specs, {_SETTINGS: text}) as put:
        for name, array in arrays.items():
            put(name, 0, array)


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return settings and arrays of a file; ValueError, which says what is wrong, if it is not what `write` wrote."""
    text, arrays = (_read_npz if _kind(path) == ".npz" else _read_safetensors)(path)
    try:
        found = json.loads(text)
        version, checksum, settings = found["version"], found["crc32"], found["settings"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: its settings cannot be read: {first_line(error)}") from error
    if version != VERSION:
        raise ValueError(f"{path}: written by a later version: layout {version!r}, and this one reads {VERSION}")
    if not isinstance(settings, dict) or _checksum(settings, arrays) != checksum:
        raise ValueError(f"{path}: damaged: the checksum is not that of its settings and arrays")
    return settings, arrays


def _kind(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in (".npz", ".safetensors"):
        raise ValueError(f"KVCache: files are .npz or .safetensors, got {path.name}")
    return suffix


def _checksum(settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> int:
    """CRC-32 of the settings and of the arrays with their types and shapes."""
    shapes = {name: [arrays[name].dtype.str, *arrays[name].shape] for name in _ARRAYS}
    checksum = zlib.crc32(json.dumps([dict(settings), shapes], sort_keys=True).encode())
    for name in _ARRAYS:
        content = np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8)
        checksum = zlib.crc32(content.data, checksum)
    return checksum


def _read_npz(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    try:
        reader = READERS[".npz"](path)
        found = {name: reader[name] for name in (_SETTINGS, *_ARRAYS) if name in reader.names}
    except CorruptError as error:
        raise ValueError(f"{path}: damaged, or not a .npz file: {first_line(error)}") from error
    for name, array in found.items():
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{path}: {name}: {array.reason}")
    _check_names(path, found)
    return str(found.pop(_SETTINGS)), found


def _read_safetensors(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    tensors, texts = map_safetensors(path)
    _check_names(path, {**tensors, **texts})
    for name in _ARRAYS:
        if tensors[name].tag not in ("U8", "F16", "F32"):
            raise ValueError(f"{path}: {name} is of the type {tensors[name].tag}, which no KV cache has")
    return texts[_SETTINGS], {name: tensors[name].array() for name in _ARRAYS}


def _check_names(path: Path, found: Mapping[str, Any]) -> None:
    missing = [name for name in (_SETTINGS, *_ARRAYS) if name not in found]
    if missing:
        raise ValueError(f"{path}: not a file that KVCache.save wrote: it has no {', '.join(missing)}")
