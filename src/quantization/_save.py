"""Model folders in MLX's format, which appear under their name only when all of them is on the disk."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections import ChainMap, Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ._checkpoint import INDEX, Checkpoint
from ._errors import names_itself
from ._extras import require
from ._formats import Format
from ._qtensor import QTensor
from ._safetensors import TensorSpec, replaced_file, sync_folder, tag_of, write_safetensors

__all__ = ["save_mlx"]

# Present as long as a folder is being written; it says by whom, so that only the same work goes on in it.
_MARK = "being-written.json"

METADATA = {"format": "mlx"}


@contextlib.contextmanager
def new_folder(path: Path, work: dict[str, Any], resume: bool) -> Iterator[Path]:
    """Give the block a folder to fill, and rename it to `path` when the block has ended.

    The folder is ``<path>.partial``. It outlasts a process that is killed, and, if `resume`, the next call with the
    same `work` finds the files that were complete (`replaced_file` completes them in one step).

    Raises
    ------
    FileExistsError
        If there is something at `path`, or a partial folder of other work.
    BlockingIOError
        If another process is filling it.
    """
    path = path.absolute()
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise FileExistsError(f"{path} exists already; nothing is ever written over")
    partial = path.with_name(path.name + ".partial")
    mark, text = partial / _MARK, json.dumps(work, indent=1, sort_keys=True)
    partial.mkdir(exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        _lock(descriptor, partial)
        found = mark.read_text() if mark.exists() else None
        if any(file.name not in (_MARK, _MARK + ".tmp") for file in partial.iterdir()) and found != text:
            raise FileExistsError(f"{partial} is left from other work; remove it to begin anew")
        if found is not None and not resume:
            _empty(partial)
        with replaced_file(mark) as file:
            file.write(text.encode())
        try:
            yield partial
        except (ValueError, TypeError):  # bad input: no later call could make use of what is there
            shutil.rmtree(partial)
            raise
        for unfinished in partial.glob("*.tmp"):
            unfinished.unlink()
        sync_folder(partial)
        os.rename(partial, path)
        sync_folder(path.parent)
        (path / _MARK).unlink()
    finally:
        os.close(descriptor)  # which unlocks


def _lock(descriptor: int, partial: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(f"another process is writing {partial}") from None


def _empty(folder: Path) -> None:
    """Remove the files of an attempt that cannot be resumed; the mark goes last."""
    for file in sorted(folder.iterdir(), key=lambda file: file.name == _MARK):
        file.unlink()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as mlx-lm does."""
    with replaced_file(path) as file:
        file.write((json.dumps(content, indent=4, ensure_ascii=False) + "\n").encode())


def shard_name(index: int, count: int) -> str:
    """Name of shard number `index`, from 0, of `count`."""
    return "model.safetensors" if count == 1 else f"model-{index + 1:05}-of-{count:05}.safetensors"


def write_index(folder: Path, shards: Sequence[Sequence[TensorSpec]]) -> None:
    """Say in which shard every tensor lies."""
    place = {spec.name: shard_name(index, len(shards)) for index, shard in enumerate(shards) for spec in shard}
    size = sum(spec.nbytes for shard in shards for spec in shard)
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(place.items()))})


def quantized_config(
    config: Mapping[str, Any], formats: Mapping[str, Format | None], default: Format | None = None
) -> dict[str, Any]:
    """`config` with the formats of layers as mlx-lm reads them: one, by default the most frequent, and who differs."""
    counts = Counter(found for found in formats.values() if found is not None)
    for found in counts:
        if not found.is_mlx:
            raise ValueError(f"MLX has no format {found}, so that no file of it can be written for MLX")
    changed = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    if counts:
        default = default or counts.most_common(1)[0][0]
        entry: dict[str, Any] = _entry(default)
        entry |= {name: (found and _entry(found)) or False for name, found in formats.items() if found != default}
        changed |= {"quantization": entry, "quantization_config": entry}
    return changed


def _entry(found: Format) -> dict[str, Any]:
    return {"group_size": found.group_size, "bits": found.bits, "mode": found.mode}


@names_itself("save_mlx")
def save_mlx(
    path: str | Path,
    tensors: Mapping[str, Any],
    *,
    config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Write a model folder as mlx-lm reads it: safetensors files, their index, and ``config.json``.

    Parameters
    ----------
    path : str or Path
        The folder to make.
    tensors : Checkpoint, or mapping of str to QTensor or array
        `QTensor` under the names of their layers (``model.layers.0.mlp.up_proj``), arrays under their own
        (``model.norm.weight``). A `Checkpoint` is written with its `unquantized`.
    config : mapping, optional
        What ``config.json`` says beside the quantization; that of the `Checkpoint` by default.
    max_shard_bytes : int, default 5 GiB
        Where a new file begins.

    Returns
    -------
    None
        The folder appears under its name when all of it is on the disk.

    Raises
    ------
    FileExistsError
        If there is something at `path` already.
    TypeError, ValueError
        For a tensor that cannot be stored; the message names it, and nothing is written.

    Examples
    --------
    >>> import numpy as np, os, quantization as q, tempfile
    >>> head = q.QTensor.quantize(np.eye(64, dtype=np.float16), "affine", bits=8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     q.save_mlx(f"{folder}/model", {"lm_head": head}, config={"model_type": "llama"})
    ...     sorted(os.listdir(f"{folder}/model"))
    ['config.json', 'model.safetensors', 'model.safetensors.index.json']
    """
    if isinstance(tensors, Checkpoint):
        if config is None and tensors.path.suffix.lower() != ".gguf":
            config = tensors.metadata
        tensors = _all_of(tensors)
    shards, formats = _plan(tensors, max_shard_bytes)
    specs = [[spec for of_name in shard.values() for spec in of_name] for shard in shards]
    check_names(specs)
    settings = quantized_config(config or {}, formats)
    with new_folder(Path(path), {"work": "save_mlx"}, resume=False) as folder:
        for index, shard in enumerate(shards):
            with write_safetensors(folder / shard_name(index, len(shards)), specs[index], METADATA) as put:
                for name in shard:
                    for full, array in _arrays(name, tensors[name]).items():
                        put(full, 0, array)
        write_index(folder, specs)
        write_json(folder / "config.json", settings)


def _all_of(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Layers and unquantized tensors of a checkpoint under one roof, made when they are asked for."""
    if checkpoint.unsupported:
        names = ", ".join(entry.name for entry in checkpoint.unsupported)
        raise ValueError(f"{checkpoint.path} has unsupported tensors: {names}")
    parts: list[Any] = [checkpoint, checkpoint.unquantized]
    return ChainMap(*parts)


def _plan(
    tensors: Mapping[str, Any], max_shard_bytes: int
) -> tuple[list[dict[str, list[TensorSpec]]], dict[str, Format | None]]:
    """Deal the tensors out to files, in their order, and collect the formats of those that are quantized."""
    shards: list[dict[str, list[TensorSpec]]] = [{}]
    formats: dict[str, Format | None] = {}
    filled = 0
    for name in tensors:
        value = tensors[name]
        if isinstance(value, QTensor):
            formats[name] = value.format
        specs = [_spec(full, array) for full, array in _arrays(name, value).items()]
        size = sum(spec.nbytes for spec in specs)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = specs
        filled += size
    return shards, formats


def _arrays(name: str, value: Any) -> dict[str, np.ndarray]:
    if not isinstance(name, str):
        raise TypeError(f"names are texts, got {name!r}")
    if isinstance(value, QTensor):
        if value.k != value.stored_k:
            raise ValueError(
                f"{name}: its rows of {value.k} are padded to {value.stored_k}, which files of MLX cannot say; a "
                f"QTensor of the same parts without k is stored as rows of {value.stored_k}"
            )
        return {f"{name}.{part}": _as_stored(array) for part, array in value.parts.items()}
    array = np.asarray(value)
    return {name: array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))}


def _as_stored(part: np.ndarray) -> np.ndarray:
    """Scales and biases of uint16 are bits of bfloat16: files say so."""
    return part.view(require("ml_dtypes", "io").bfloat16) if part.dtype == np.uint16 else part


def _spec(name: str, array: np.ndarray) -> TensorSpec:
    try:
        return TensorSpec(name, tag_of(array.dtype), array.shape)
    except ValueError as error:
        raise TypeError(f"{name}: {error}") from None


def check_names(shards: Sequence[Sequence[TensorSpec]]) -> None:
    """Refuse names that the format reserves, or that two tensors would have."""
    for name, count in Counter(spec.name for shard in shards for spec in shard).items():
        if count > 1 or name == "__metadata__":
            raise ValueError(f"{'two tensors' if count > 1 else 'a tensor'} would have the name {name}")
