"""`demo smollm2 --kv`: a language model's predictions when its keys and values are kept in few bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

import numpy as np

from .. import KVCache, affine_dequantize, affine_quantize, get_num_threads
from .._text import table
from .compare import SCALE_DTYPE
from .generate import against
from .prose import TEXT
from .smollm2 import Network, SmolLM2, find_model

_HEADER = ("keys and values", "bits/value", "MB", "ppl", "KL", "top-1")


class LayerCache(Protocol):
    """Keys and values of one layer; `KVCache` is one."""

    def append(self, k: np.ndarray, v: np.ndarray) -> None: ...

    def attend(self, q: np.ndarray) -> np.ndarray: ...

    @property
    def nbytes(self) -> int: ...


# Values that stand for a vector's, and the bytes that they would be kept in.
Rounding = Callable[[np.ndarray], tuple[np.ndarray, int]]


class RoundedCache:
    """Keys and values as an ordinary format holds them, unpacked to float32 for NumPy's products."""

    def __init__(self, rounding: Rounding) -> None:
        self._rounding = rounding
        self._held: list[tuple[np.ndarray, np.ndarray]] = []
        self.nbytes = 0

    def append(self, k: np.ndarray, v: np.ndarray) -> None:
        (k, of_keys), (v, of_values) = self._rounding(k), self._rounding(v)
        self._held.append((k, v))
        self.nbytes += of_keys + of_values

    def attend(self, q: np.ndarray) -> np.ndarray:
        k, v = (np.concatenate(arrays, axis=1) for arrays in zip(*self._held, strict=True))
        queries, end = q.shape[1], k.shape[1]
        grouped = q.reshape(len(k), -1, queries, q.shape[2])
        scores = grouped @ k[:, None].swapaxes(2, 3) * np.float32(q.shape[2] ** -0.5)
        later = np.arange(end) > np.arange(end - queries, end)[:, None]
        scores[..., later] = -np.inf
        scores = np.exp(scores - scores.max(axis=3, keepdims=True))
        scores /= scores.sum(axis=3, keepdims=True)
        context: np.ndarray = scores @ v[:, None]
        return context.reshape(q.shape)


def keep(x: np.ndarray) -> tuple[np.ndarray, int]:
    """float32 as it is."""
    return x, x.nbytes


def round_int8(x: np.ndarray) -> tuple[np.ndarray, int]:
    """int8 with the largest value of each vector at 127, and a float16 scale."""
    scales = (np.abs(x).max(axis=-1, keepdims=True) / 127).astype(np.float16)
    divisors = np.where(scales == 0, 1, scales).astype(np.float32)
    codes = np.clip(np.rint(x / divisors), -127, 127)
    return codes * scales.astype(np.float32), x.size + scales.nbytes


def round_affine4(x: np.ndarray) -> tuple[np.ndarray, int]:
    """Affine codes of 4 bits in groups of 64, as mlx-lm keeps keys and values."""
    parts = affine_quantize(x, 64, 4, scale_dtype=SCALE_DTYPE, pad=True)
    rounded = affine_dequantize(*parts, 64, 4, dtype="float32")
    return rounded[..., : x.shape[-1]], sum(part.nbytes for part in parts)


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    name: str
    nbytes: int
    """Of keys and values of all positions, layers and heads."""
    bits: float
    """Per key's or value's element, scales included."""
    perplexity: float
    divergence: float
    """Mean Kullback-Leibler divergence of the predicted distributions from those with float32 caches, in nats."""
    agreement: float
    """Share of positions at which the likeliest token is theirs."""


# A layer's empty cache for (heads, positions, width).
NewCache = Callable[[int, int, int], LayerCache]


def default_choices(width: int) -> dict[str, NewCache]:
    """Rows of the table by name, for vectors of so many elements."""
    choices: dict[str, NewCache] = {
        "float32": lambda *_: RoundedCache(keep),
        "int8, a scale per vector": lambda *_: RoundedCache(round_int8),
        "affine 4 g64": lambda *_: RoundedCache(round_affine4),
    }
    for bits in (8, 6, 5, 4) if width in (256, 512) else (4,):  # codec 1 has the others for these widths only
        choices[f"KVCache, {bits} bits, codec 1"] = _packed(bits, codec=1)
    for bits in (8, 6, 5, 4, 3, 2):
        choices[f"KVCache, {bits} bits"] = _packed(bits)
    choices["KVCache, keys 5 bits, values 3"] = _packed(5, value_bits=3)
    return choices


def _packed(bits: int, **options: Any) -> NewCache:
    return lambda heads, positions, width: KVCache(heads, positions, width, bits, **options)


@dataclass
class _Caches:
    """What the model takes for its cache: one for each layer."""

    layers: list[LayerCache]
    length: int = 0


class WithCaches(SmolLM2):
    """The model with caches that choose how keys and values are kept, and attend to them."""

    def caches(self, new_cache: NewCache, positions: int) -> _Caches:
        return _Caches([new_cache(self._groups, positions, self._width) for _ in range(self.layers)])

    @property
    def width(self) -> int:
        """Elements of a key."""
        return self._width

    @property
    def elements(self) -> int:
        """Elements of the keys and values of a position, all layers together."""
        return 2 * self.layers * self._groups * self._width

    def _attention(
        self, packed: np.ndarray, cache: Any, layer: int, positions: np.ndarray, rotation: Any
    ) -> np.ndarray:
        turning = np.exp(1j * positions[:, None, None] * self._frequencies).astype(np.complex64)
        heads = packed.reshape(len(packed), -1, self._width)
        # Pairs of neighbours, GGUF's order, are complex numbers that their position turns.
        turned = (heads[:, : self._heads + self._groups].view(np.complex64) * turning).view(np.float32).swapaxes(0, 1)
        cache.layers[layer].append(turned[self._heads :], heads[:, self._heads + self._groups :].swapaxes(0, 1))
        context: np.ndarray = cache.layers[layer].attend(turned[: self._heads])
        return context.swapaxes(0, 1).reshape(len(packed), -1)


def measure(
    model: WithCaches,
    network: Network,
    ids: Sequence[int],
    choices: Mapping[str, NewCache],
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> list[Row]:
    """Run the model over a text with each choice of caches; the first of them is what the others are compared with."""
    rows: list[Row] = []
    reference: Any = None
    for name in progress(list(choices)):
        cache = model.caches(choices[name], len(ids))
        logits = model.logits(ids, network, cache)  # type: ignore[arg-type]
        reference = logits if reference is None else reference
        nbytes = sum(layer.nbytes for layer in cache.layers)
        bits = 8 * nbytes / (model.elements * len(ids))
        rows.append(Row(name, nbytes, bits, *against(reference, logits, ids)))
    return rows


def run(
    out: TextIO,
    *,
    model: str | None = None,
    text: str = TEXT,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> list[Row]:
    """Measure and print everything; returns the table's rows."""
    path, origin = find_model(model)
    loaded = WithCaches(path)
    network = Network.of({name: loaded.checkpoint[name] for name in loaded.checkpoint}, loaded.layers)
    ids = loaded.tokenizer.encode(text).ids
    print(
        f"model    {origin}\n"
        f"caches   {loaded.layers} layers, {loaded.elements // loaded.layers // 2} elements of keys and as many of "
        f"values per position, {loaded.width} to a head; {get_num_threads()} thread(s)\n",
        file=out,
    )
    rows = measure(loaded, network, ids, default_choices(loaded.width), progress)
    print(table(_HEADER, [_cells(row) for row in rows]), file=out)
    print(f"\n{verdict({row.name: row.divergence for row in rows})}", file=out)
    print(
        f"\nMB are those of {len(ids)} positions; ppl is the perplexity of this text, KL and top-1 its predictions "
        "against float32 keys and values. KVCache rotates them and attends straight from its codes; the other rows "
        "round what the model makes. The weights are the file's own.",
        file=out,
    )
    return rows


def verdict(divergence: Mapping[str, float]) -> str:
    """Say whether rotation halves what 4 bits cost, by the divergences of the table's rows."""
    rotated, plain = divergence["KVCache, 4 bits"], divergence["affine 4 g64"]
    if plain == 0:
        return "rotated 4-bit KL / plain 4-bit KL: undefined, as plain codes changed nothing"
    ratio = rotated / plain
    return f"rotated 4-bit KL / plain 4-bit KL: {ratio:.2f} ({'below' if ratio < 0.5 else 'not below'} half)"


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.bits:.2f}",
        f"{row.nbytes / 1e6:.2f}",
        f"{row.perplexity:.3f}" if row.perplexity < 1000 else f"{row.perplexity:.3g}",
        f"{row.divergence:.4f}",
        f"{row.agreement:.3f}",
    )
