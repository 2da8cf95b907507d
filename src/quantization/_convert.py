"""`python -m quantization convert`: a float model folder to one in MLX's format.

The output has a shard for every shard of the source. A matrix is quantized in blocks of rows, from the mapped source to
its place in the new file, so that memory does not grow with the model. Everything is planned, and refused, from the
headers before anything is written; a run that was killed goes on at the first shard that is not complete.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ._checkpoint import find_shards, read_config
from ._errors import names_itself
from ._formats import Format, as_format
from ._report import Skipped, row_blocks
from ._safetensors import Put, StoredTensor, TensorSpec, dtype_of, replaced_file, tag_of, write_safetensors
from ._save import METADATA, check_names, new_folder, quantized_config, shard_name, write_index, write_json

FLOATS = ("F16", "BF16", "F32")

# What other software keeps its weights in; the rest of a folder (tokenizer, licence, ...) is copied.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".npz", ".index.json")


@dataclass(frozen=True)
class _Step:
    """What becomes of one tensor; `target` is None where it stays as it is."""

    tensor: StoredTensor
    target: Format | None
    dtype: np.dtype | None
    profile: str

    def specs(self) -> list[TensorSpec]:
        """Tell the tensors that are written."""
        tensor, target = self.tensor, self.target
        tag = tag_of(self.dtype) if self.dtype is not None and tensor.tag in FLOATS else tensor.tag
        if target is None:
            return [TensorSpec(tensor.name, tag, tensor.shape)]
        *lead, width = tensor.shape
        name, groups = tensor.name.removesuffix(".weight"), (*lead, width // target.group_size)
        codes = TensorSpec(tensor.name, "U32", (*lead, width * target.bits // 32))
        if target.mode != "affine":
            return [codes, TensorSpec(f"{name}.scales", "U8", groups)]
        return [codes, TensorSpec(f"{name}.scales", tag, groups), TensorSpec(f"{name}.biases", tag, groups)]

    def write(self, put: Put) -> None:
        """Write them, a block of rows at a time."""
        if self.target is None and (self.dtype is None or self.tensor.tag not in FLOATS):
            put(self.tensor.name, 0, self.tensor.content)
            return
        written = [0] * 3
        array = self.tensor.array()
        for block in row_blocks(array if array.ndim else array[None]) if array.size else ():
            block = block if self.dtype is None else block.astype(self.dtype)
            parts = (block,) if self.target is None else self._encode(block)
            for index, (spec, part) in enumerate(zip(self.specs(), parts, strict=True)):
                put(spec.name, written[index], part)
                written[index] += part.nbytes

    def _encode(self, block: np.ndarray) -> tuple[np.ndarray, ...]:
        assert self.target is not None
        bad = block.size - int(np.isfinite(block).sum())
        if bad:
            raise ValueError(
                f"{self.tensor.name} has values that are NaN or infinite; to keep it as it is: "
                f"--override '{self.tensor.name.removesuffix('.weight')}=false'"
            )
        return self.target.encode(block, profile=self.profile)


@dataclass(frozen=True)
class Converted:
    """What `convert` did."""

    formats: Mapping[str, Format | None]
    skipped: tuple[Skipped, ...]
    weights: int
    nbytes: int
    """Bytes of all tensors that were written."""


@names_itself("convert")
def convert(
    source: str | Path,
    target: str | Path,
    format: Format,
    *,
    overrides: Mapping[str, Format | None] | None = None,
    dtype: str | None = None,
    profile: str = "metal",
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> Converted:
    """Quantize the matrices of a model folder.

    Parameters
    ----------
    source, target : str or Path
        The folder with ``config.json`` and safetensors files; the one to make.
    format : Format
        That of every 2-D tensor of floats named ``*.weight`` whose last axis is a multiple of its group size.
    overrides : mapping of str to Format or None
        For layers whose name fits a pattern such as ``*.down_proj``, another format, or None to leave them. The last
        pattern that fits counts.
    dtype : {"float16", "bfloat16", "float32"}, optional
        What floats are rounded to before anything else: the type of scales, biases and all that is not quantized.
    profile : {"metal", "cpu"}
        Which of MLX's two backends the codes follow.
    progress : callable
        Wraps the sequence of steps, as `tqdm.tqdm` does.

    Raises
    ------
    FileExistsError
        If there is something at `target`.
    OSError, ValueError
        If the source is not readable, is quantized already, or has a tensor with NaN or infinities.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise NotADirectoryError(f"{source} is no folder")
    shards = find_shards(source)
    config = read_config(source)
    if not config:
        raise ValueError(f"{source} has no config.json, which mlx-lm needs")
    _check_float(source, shards, config)
    rounded = None if dtype is None else dtype_of({"float16": "F16", "bfloat16": "BF16", "float32": "F32"}[dtype])
    patterns = dict(overrides or {})
    plans, formats, skipped = _plan(shards, format, patterns, (rounded, profile))
    specs = [[spec for step in plan for spec in step.specs()] for plan in plans]
    check_names(specs)
    settings = quantized_config(config, formats, format)
    work = {
        "work": "convert",
        "format": str(format),
        "overrides": {name: str(chosen) for name, chosen in patterns.items()},
        "dtype": dtype,
        "profile": profile,
        "source": [_identity(next(iter(shard.values())).file) for shard in shards if shard],
    }
    with new_folder(target, work, resume=True) as folder:
        steps = [(index, step) for index, plan in enumerate(plans) for step in plan]
        for index, of_shard in itertools.groupby(progress(steps), key=lambda pair: pair[0]):
            file = folder / shard_name(index, len(plans))
            if file.exists():
                continue
            with write_safetensors(file, specs[index], METADATA) as put:
                for _, step in of_shard:
                    step.write(put)
        _copy_others(source, folder)
        write_index(folder, specs)
        write_json(folder / "config.json", settings)
    weights = sum(math.prod(tensor.shape) for shard in shards for tensor in shard.values())
    return Converted(formats, tuple(skipped), weights, sum(spec.nbytes for shard in specs for spec in shard))


def _check_float(source: Path, shards: Sequence[Mapping[str, StoredTensor]], config: Mapping[str, Any]) -> None:
    if any(config.get(name) is not None for name in ("quantization", "quantization_config")):
        raise ValueError(f"{source} is quantized already, says its config.json")
    for shard in shards:
        for name in shard:
            if name.endswith(".scales"):
                raise ValueError(f"{source} is quantized already: it has {name}")


def _identity(file: Path) -> list[Any]:
    status = file.stat()
    return [file.name, status.st_size, status.st_mtime_ns]


def _plan(
    shards: Sequence[Mapping[str, StoredTensor]],
    default: Format,
    overrides: Mapping[str, Format | None],
    settings: tuple[np.dtype | None, str],
) -> tuple[list[list[_Step]], dict[str, Format | None], list[Skipped]]:
    """Decide on every tensor: the steps of each shard, the format of each matrix, and what is left with its reason."""
    plans, formats, skipped, unused = [], {}, [], set(overrides)
    for shard in shards:
        plan = []
        for tensor in shard.values():
            layer = tensor.name.removesuffix(".weight")
            fitting = [pattern for pattern in overrides if fnmatch.fnmatchcase(layer, pattern)]
            unused -= set(fitting)
            chosen = overrides[fitting[-1]] if fitting else default
            reason = _unfit(tensor, chosen)
            if layer != tensor.name and len(tensor.shape) == 2:
                formats[layer] = None if reason else chosen
            if reason:
                skipped.append(Skipped(tensor.name, None, tensor.shape, tensor.tag, reason))
            plan.append(_Step(tensor, None if reason else chosen, *settings))
        plans.append(plan)
    if unused:
        raise ValueError(f"no layer has a name like {', '.join(sorted(unused))}")
    return plans, formats, skipped


def _unfit(tensor: StoredTensor, chosen: Format | None) -> str:
    """Why a tensor stays as it is, or an empty string."""
    if tensor.tag not in FLOATS:
        return f"{tensor.tag}: only F16, BF16 and F32 are quantized"
    if len(tensor.shape) != 2:
        return f"{len(tensor.shape)}-D: only matrices are quantized"
    if not tensor.name.endswith(".weight"):
        return "its name does not end in .weight"
    if chosen is None:
        return "left as it is by an override"
    if 0 in tensor.shape:
        return "empty"
    if tensor.shape[1] % chosen.group_size:
        return f"last axis {tensor.shape[1]} is not a multiple of group size {chosen.group_size}"
    return ""


def _copy_others(source: Path, folder: Path) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name != "config.json" and not file.name.lower().endswith(_WEIGHTS):
            with open(file, "rb") as original, replaced_file(folder / file.name) as copy:
                shutil.copyfileobj(original, copy)


def parse_override(text: str) -> tuple[str, Format | None]:
    """Read ``PATTERN=false`` or ``PATTERN=FORMAT``, such as ``*.down_proj=affine_6_g64`` or ``lm_head=mxfp8``."""
    pattern, equals, value = text.rpartition("=")
    if not equals or not pattern:
        raise ValueError(f"--override {text}: expected PATTERN=FORMAT or PATTERN=false")
    return pattern, None if value.lower() == "false" else as_format(value)
