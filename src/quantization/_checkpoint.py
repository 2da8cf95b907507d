"""Quantized checkpoints, MLX's and GGUF, as mappings from layer names to `QTensor`; and MLX's written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import _gguf
from ._errors import names_itself
from ._formats import Format, as_format, known_formats
from ._qtensor import QTensor
from ._report import Skipped, skipped_text
from ._safetensors import StoredTensor, map_safetensors
from ._text import table

__all__ = ["Checkpoint", "open"]

_REPR_ROWS = 60

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class _Layer:
    """What is known of a quantized matrix before it is loaded."""

    format: Format
    shape: tuple[int, ...]
    stored: str
    nbytes: int
    load: Callable[[], QTensor]


class _Lazy(Mapping[str, Any]):
    """Values that are made when they are asked for, each time anew."""

    def __init__(self, makers: dict[str, Callable[[], Any]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> Any:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def __repr__(self) -> str:
        return f"{len(self)} entries: {', '.join(self._makers)}"


class Checkpoint(Mapping[str, QTensor]):
    """The quantized matrices of a model's files: layer name to `QTensor`; made by `open`.

    Attributes
    ----------
    path : Path
        What was opened.
    unquantized : mapping of str to numpy.ndarray
        Every tensor that is stored as plain numbers, as a read-only view of the file.
    unsupported : tuple of Skipped
        Every tensor that is neither, with name, shape, type and reason. `decode` may still read it.
    metadata : mapping of str to object
        ``config.json`` of an MLX checkpoint, the header's fields of a GGUF file.

    Notes
    -----
    Files are mapped into memory: nothing is read before it is asked for. MLX's layers are views of the file. A GGUF
    layer is moved over to MLX's layout at each look-up, so keep what you look up.

    Examples
    --------
    >>> import numpy as np, quantization as q, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     up = q.QTensor.quantize(np.eye(64, dtype=np.float32), "mxfp4")
    ...     q.save_mlx(folder, {"layers.0.up": up, "norm.weight": np.ones(64, np.float16)})
    ...     model = q.open(folder)
    >>> list(model), list(model.unquantized), model.unsupported
    (['layers.0.up'], ['norm.weight'], ())
    >>> np.ones(64, np.float32) @ model["layers.0.up"].T == 1
    array([ True,  True,  True, ...,  True])
    >>> model.metadata["quantization"]["mode"]
    'mxfp4'
    """

    def __init__(
        self,
        path: Path,
        layers: dict[str, _Layer],
        unquantized: dict[str, Callable[[], np.ndarray]],
        unsupported: list[Skipped],
        metadata: Mapping[str, Any],
        decoders: dict[str, Callable[[], np.ndarray]],
    ) -> None:
        self.path, self.metadata, self.unsupported = path, metadata, tuple(unsupported)
        self.unquantized: Mapping[str, np.ndarray] = _Lazy(unquantized)
        self._layers, self._decoders = layers, decoders

    @names_itself("Checkpoint")
    def __getitem__(self, name: str) -> QTensor:
        return self._layers[name].load()

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @names_itself("Checkpoint.decode")
    def decode(self, name: str) -> np.ndarray:
        """Decode a tensor of a GGUF file to float32 by the code of the library gguf, which knows more types.

        Parameters
        ----------
        name : str
            Of a tensor: one of those in `unsupported`, or a layer's with its ``.weight``.

        Returns
        -------
        numpy.ndarray of float32

        Raises
        ------
        KeyError
            If there is no such tensor that is quantized.
        ValueError
            If the library does not decode this type either.

        Examples
        --------
        >>> import gguf, numpy as np, quantization as q, tempfile
        >>> w, kind = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32), gguf.GGMLQuantizationType.Q8_0
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     writer = gguf.GGUFWriter(f"{folder}/model.gguf", "llama")
        ...     writer.add_tensor("up.weight", gguf.quantize(w, kind), raw_dtype=kind)
        ...     writer.write_header_to_file()
        ...     writer.write_kv_data_to_file()
        ...     writer.write_tensors_to_file()
        ...     writer.close()
        ...     model = q.open(f"{folder}/model.gguf")
        >>> model.decode("up.weight").round(2)[:, :4]
        array([[-1.  , -0.97, -0.94, -0.91],
               [ 0.02,  0.05,  0.08,  0.11]], dtype=float32)
        """
        return self._decoders[name]()

    def __repr__(self) -> str:
        rows = [
            (
                name,
                layer.stored,
                str(layer.format),
                "x".join(map(str, layer.shape)),
                f"{8 * layer.nbytes / max(1, math.prod(layer.shape)):.2f}",
                f"{layer.nbytes:,}",
            )
            for name, layer in self._layers.items()
        ]
        lines = [f"{self.path}: {len(self)} quantized layers, {len(self.unquantized)} unquantized tensors"]
        if rows:
            lines.append(table(("layer", "stored", "format", "shape", "bits/w", "bytes"), rows[:_REPR_ROWS], left=4))
        if len(rows) > _REPR_ROWS:
            lines.append(f"... and {len(rows) - _REPR_ROWS} more layers")
        if self.unsupported:
            lines.append(skipped_text(self.unsupported, "unsupported"))
        return "\n".join(lines)


@names_itself("open")
def open(path: str | Path, *, quantization: Mapping[str, Any] | None = None) -> Checkpoint:
    """Open the quantized matrices of an MLX checkpoint or of a GGUF file.

    Parameters
    ----------
    path : str or Path
        A folder with ``config.json`` and safetensors files (with ``model.safetensors.index.json`` if there are
        several), one ``.safetensors`` file, or a ``.gguf`` file.
    quantization : mapping, optional
        In place of the entry of this name in ``config.json``: ``group_size``, ``bits``, ``mode``, and for layers that
        differ a mapping of these, or False, under the layer's name. Without either, what the shapes leave open is
        MLX's default, groups of 64 at 4 bits.

    Returns
    -------
    Checkpoint
        Layer name to `QTensor`; every other tensor in its `unquantized` or, with the reason, in its `unsupported`.

    Raises
    ------
    OSError
        If a file cannot be opened.
    ValueError
        If a file is cut short or is not what it says, or parts of a layer do not fit together; the message names it.
    ImportError
        Without the extra ``io``.

    Notes
    -----
    Of GGUF, the types Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, TQ1_0, TQ2_0, MXFP4 and NVFP4 are held exactly: the
    values are those that gguf decodes (a zero is never negative). Scales are float16 where that is exact, else float32.
    A tensor of NVFP4 whose scale as a whole is a tensor beside it, of one number and named with ``.scale`` at the end,
    has it in its `global_scale`, 2688-fold, as MLX has it: its values are exact but for float32's rounding of that.

    Examples
    --------
    >>> import numpy as np, quantization as q, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     up = q.QTensor.quantize(np.eye(64, dtype=np.float16), bits=4)
    ...     q.save_mlx(f"{folder}/model", {"up": up, "norm.weight": np.ones(64, np.float16)})
    ...     model = q.open(f"{folder}/model")
    >>> model["up"]
    QTensor(64x64, affine 4 g64, float16 scales, 4.50 bits/weight, 2,304 bytes)
    >>> list(model.unquantized)
    ['norm.weight']
    """
    path = Path(path)
    if path.suffix.lower() == ".gguf":
        return _open_gguf(path)
    if not path.is_dir() and path.suffix.lower() != ".safetensors":
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}")
        raise ValueError(f"{path} is no folder, .safetensors or .gguf file")
    tensors = {name: tensor for file in find_shards(path) for name, tensor in file.items()}
    config = read_config(path)
    if quantization is None:
        quantization = config.get("quantization")
        quantization = {} if quantization is None else quantization  # null says no more than nothing
    return _open_mlx(path, tensors, quantization, config)


def natural(name: str) -> list[Any]:
    """Key by which layer 2 comes before layer 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


# ------------------------------------------------------------------------------------------------------------- MLX


def read_config(path: Path) -> dict[str, Any]:
    """``config.json`` of a folder, or beside a file; empty if there is none."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    return _read_json(file) if file.exists() else {}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return content


def find_shards(path: Path) -> list[dict[str, StoredTensor]]:
    """Map the tensors of every safetensors file of a model, a dict to a file.

    The index says which files belong to it; without one they are those that mlx-lm looks for, or a single other one.
    """
    if not path.is_dir():
        return [map_safetensors(path)[0]]
    index = path / INDEX
    place = _read_json(index).get("weight_map") if index.exists() else {}
    if not isinstance(place, dict) or not all(isinstance(name, str) for name in place.values()):
        raise ValueError(f"{index}: weight_map must map names of tensors to names of files")
    for name, file in place.items():
        if file in ("", ".", "..") or re.search(r"[/\\\0]", file):
            raise ValueError(f"{index}: {name} is said to lie in {file!r}, which is no name of a file in this folder")
    names = sorted(set(place.values())) or sorted(file.name for file in path.glob("model*.safetensors"))
    names = names or sorted(file.name for file in path.glob("*.safetensors"))
    if not names:
        raise FileNotFoundError(f"there are no safetensors files in {path}")
    shards = {name: map_safetensors(path / name)[0] for name in names}
    for name, file in place.items():
        if name not in shards[file]:
            raise ValueError(f"{index}: {name} is said to lie in {file}, which has no such tensor")
    seen: dict[str, str] = {}
    for file, tensors in shards.items():
        for name in tensors:
            if name in seen:
                raise ValueError(f"{path}: {name} lies in {seen[name]} and in {file}")
            seen[name] = file
    return list(shards.values())


def _open_mlx(
    path: Path, tensors: dict[str, StoredTensor], quantization: Mapping[str, Any], config: dict[str, Any]
) -> Checkpoint:
    layers: dict[str, _Layer] = {}
    unsupported: list[Skipped] = []
    taken = set()
    if not isinstance(quantization, Mapping):
        raise ValueError(f"{path}: quantization in config.json must be an object, got {quantization!r}")
    for name in sorted(tensors, key=natural):
        layer = name.removesuffix(".scales")
        parts = {part: tensors[full] for part in _PARTS if (full := f"{layer}.{part}") in tensors}
        if layer == name or "weight" not in parts:
            continue
        taken |= {part.name for part in parts.values()}
        outcome = _find_layer(layer, parts, quantization)
        if isinstance(outcome, _Layer):
            layers[layer] = outcome
        else:
            unsupported += [Skipped(part.name, None, part.shape, part.tag, outcome) for part in parts.values()]
    unquantized = {}
    for name in sorted(tensors.keys() - taken, key=natural):
        tensor = tensors[name]
        if name.endswith(".weight") and quantization.get(name.removesuffix(".weight"), False) is not False:
            raise ValueError(f"{path}: config.json says that {name} is quantized, but there are no scales of it")
        if tensor.tag == "F4" or tensor.tag.startswith("F6_"):
            reason = f"{tensor.tag}: no array type has elements of fewer than 8 bits"
            unsupported.append(Skipped(name, None, tensor.shape, tensor.tag, reason))
        else:
            unquantized[name] = tensor.array
    return Checkpoint(path, layers, unquantized, unsupported, config, {})


_PARTS = ("weight", "scales", "biases", "global_scale")


def _find_layer(layer: str, parts: dict[str, StoredTensor], quantization: Mapping[str, Any]) -> _Layer | str:
    """Resolve a layer's format and check its parts against it; or say why it cannot be used."""
    weight, scales = parts["weight"], parts["scales"]
    if weight.tag != "U32":
        return f"{weight.tag}: MLX packs codes in U32"
    entry = quantization.get(layer, True)
    if entry is False:
        return "config.json says false, yet there are scales"
    if not isinstance(entry, Mapping):
        entry = quantization
    wanted = (entry.get("mode", "affine"), entry.get("bits"), entry.get("group_size"))
    if entry.keys().isdisjoint({"mode", "bits", "group_size"}):
        wanted = _infer(layer, weight, scales)
    try:
        found = as_format(wanted)
    except (TypeError, ValueError) as error:
        return str(error).removeprefix("formats: ")
    words = scales.shape[-1] * found.group_size * found.bits // 32 if scales.shape else 0
    if not scales.shape or weight.shape != (*scales.shape[:-1], words):
        raise ValueError(f"{layer}: weight of {weight.shape} and scales of {scales.shape} are not those of {found}")
    expected = ("F16", "BF16", "F32") if found.mode == "affine" else ("U8",)
    if scales.tag not in expected:
        raise ValueError(f"{layer}: scales of {found} are of {' or '.join(expected)}, got {scales.tag}")
    biases = parts.get("biases")
    if (biases is not None) != (found.mode == "affine"):
        raise ValueError(f"{layer}: {found} {'needs biases' if biases is None else 'has no biases'}")
    if biases is not None and (biases.shape, biases.tag) != (scales.shape, scales.tag):
        raise ValueError(f"{layer}: biases ({biases.tag} {biases.shape}) do not go with scales ({scales.tag})")
    overall = parts.get("global_scale")
    if overall is not None and (found.mode != "nvfp4" or overall.tag != "F32" or math.prod(overall.shape) != 1):
        raise ValueError(f"{layer}: global_scale is one F32 number of nvfp4, got {overall.tag} {overall.shape}")
    shape = (*scales.shape[:-1], scales.shape[-1] * found.group_size)

    def load() -> QTensor:
        arrays = {name: part.array() for name, part in parts.items()}
        factor = float(arrays["global_scale"].reshape(())) if "global_scale" in arrays else None
        return QTensor(
            arrays["weight"],
            arrays["scales"],
            arrays.get("biases"),
            mode=found.mode,
            bits=found.bits,
            group_size=found.group_size,
            global_scale=factor,
        )

    return _Layer(found, shape, f"U32, {scales.tag}", sum(part.nbytes for part in parts.values()), load)


def _infer(layer: str, weight: StoredTensor, scales: StoredTensor) -> tuple[str, int, int]:
    """Find the format that the shapes allow without a word from config.json; MLX's default if they allow several."""
    groups = scales.shape[-1] if scales.shape else 0
    fits = [
        (f.mode, f.bits, f.group_size)
        for f in known_formats()
        if (f.mode == "affine") == (scales.tag != "U8") and weight.shape[-1:] == (groups * f.group_size * f.bits // 32,)
    ]
    if len(fits) > 1 and ("affine", 4, 64) in fits:
        return ("affine", 4, 64)
    if len(fits) != 1:
        many = " or ".join(f"{bits} bits in groups of {size}" for _, bits, size in fits) or "no format"
        raise ValueError(
            f"{layer}: weight of {weight.shape} and scales of {scales.shape} fit {many}; open(..., quantization={{"
            f"'group_size': ..., 'bits': ...}}) says which"
        )
    return fits[0]


# ------------------------------------------------------------------------------------------------------------ GGUF


def _open_gguf(path: Path) -> Checkpoint:
    tensors, fields = _gguf.read_gguf(path)
    layers, unquantized, unsupported, decoders = {}, {}, [], {}
    names = {tensor.name: tensor for tensor in tensors}
    for tensor in tensors:
        if tensor.is_plain:
            unquantized[tensor.name] = tensor.array
    for tensor in tensors:
        if tensor.is_plain:
            continue
        if tensor.type == "NVFP4":  # llama.cpp writes the scale of a whole tensor beside it
            beside = (f"{tensor.name.removesuffix('.weight')}.scale", f"{tensor.name}.scale")
            tensor.scale = next((names[name] for name in beside if name in names), None)
            if tensor.scale and tensor.factor is not None:
                unquantized.pop(tensor.scale.name, None)
        decoders[tensor.name] = tensor.decode
        if (found := tensor.format) is not None:
            layer = tensor.name.removesuffix(".weight")
            name = tensor.name if layer in names else layer
            layers[name] = _Layer(found, tensor.shape, tensor.type, tensor.nbytes, tensor.load)
        else:
            unsupported.append(Skipped(tensor.name, None, tensor.shape, tensor.type, tensor.reason))
    metadata = _Lazy({name: field.contents for name, field in fields.items()})
    return Checkpoint(path, layers, unquantized, unsupported, metadata, decoders)
