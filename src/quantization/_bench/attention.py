"""Attention of one query per head over packed keys and values, beside NumPy's and torch's over plain ones."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .. import KvAttention, quantize_kv
from .._extras import require
from . import ceilings, machine
from .ceilings import Ceiling
from .ours import repeat, settings
from .rows import Row
from .sampling import Effort, Measurement, Work, measure

HEADS, DIMENSION = 8, 128
"""Of the cache: those of Llama 3 8B, Qwen3 and many others."""

POSITIONS = (1 << 10, 1 << 13, 1 << 15)
ALL_POSITIONS = (1 << 10, 1 << 12, 1 << 13, 1 << 14, 1 << 15, 1 << 16, 1 << 17)
GROUPS = (1, 8)
"""Heads of queries for each head of the cache."""

BITS = 4
ACCURACY = {"float32": "exact f32", "float16": "float16 cache"}
"""The accuracy class of others, by the type of their keys and values."""


class Caches:
    """Keys and values of normal numbers, packed, in as many copies as no cache holds, and queries.

    Attributes
    ----------
    k, v : numpy.ndarray
        What was packed, float32, shape (HEADS, positions, DIMENSION).
    copies : list of tuple
        (packed, norms) of keys and of values, which lie in one piece of memory.
    """

    def __init__(self, positions: int) -> None:
        self.positions = positions
        rng = np.random.default_rng(3)
        shape = (HEADS, positions, DIMENSION)
        self.k, self.v = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
        parts = [*quantize_kv(self.k, BITS), *quantize_kv(self.v, BITS)]
        self.nbytes = sum(part.nbytes for part in parts)
        size = -(-self.nbytes // ceilings.BLOCK) * ceilings.BLOCK
        self.memory = ceilings.aligned(size * max(1, -(-4 * machine.last_level_cache() // size)))
        self.spans = [self.memory[at : at + size] for at in range(0, self.memory.size, size)]
        self.copies = [self._copy(span, parts) for span in self.spans]

    @staticmethod
    def _copy(span: np.ndarray, parts: list[np.ndarray]) -> tuple[Any, Any]:
        views, at = [], 0
        for part in parts:
            views.append(span[at : at + part.nbytes].view(part.dtype).reshape(part.shape))
            views[-1][...] = part
            at += part.nbytes
        return (views[0], views[1]), (views[2], views[3])

    def queries(self, group: int) -> np.ndarray:
        """Return queries of so many heads for each head of the cache."""
        return np.random.default_rng(4).standard_normal((HEADS * group, DIMENSION), dtype=np.float32)

    def attending(self, group: int) -> tuple[Callable[[int], None], np.ndarray]:
        """Return our attention, to the next copy each time, and where its results stand."""
        kernel, x, turns = KvAttention(), self.queries(group), itertools.cycle(self.copies)
        out = np.zeros_like(x)

        def call() -> None:
            keys, values = next(turns)
            kernel(x, keys, values, bits=BITS, out=out)

        return repeat(call), out

    def ceiling(self, group: int, isa: str, threads: int) -> tuple[Ceiling, float]:
        """Return the ceiling, and what a call counts for: reading the packed bytes, or multiplications for a group."""
        if group > 1:
            return ceilings.arithmetic("fma", isa, threads), 4.0 * HEADS * group * self.positions * DIMENSION
        turns = itertools.cycle(self.spans)
        return ceilings.reading(lambda count: [next(turns) for _ in range(count)], isa, threads), float(self.nbytes)

    def error(self, group: int, out: np.ndarray) -> float:
        """Return the relative error of results, against float64 attention to what was packed."""
        exact = np.empty(out.shape)
        x = self.queries(group).astype(np.float64).reshape(HEADS, group, DIMENSION)
        for head in range(HEADS):
            exact[head * group : (head + 1) * group] = (
                softmax(x[head] @ self.k[head].T.astype(np.float64)) @ self.v[head]
            )
        return float(np.linalg.norm(out - exact) / np.linalg.norm(exact))


def softmax(products: np.ndarray) -> np.ndarray:
    """Return the weights of products of queries and keys, which are scaled by 1 / sqrt(DIMENSION)."""
    weights = products * products.dtype.type(1 / math.sqrt(DIMENSION))
    weights -= weights.max(axis=-1, keepdims=True)
    np.exp(weights, out=weights)
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def _numpy(caches: Caches, group: int, dtype: str, threads: int) -> tuple[Callable[[], np.ndarray], int]:
    """Attention of matrix products; float16 keys and values are widened head by head, as NumPy has no fast half."""
    limit = require("threadpoolctl", "bench").ThreadpoolController().limit
    k, v = caches.k.astype(dtype), caches.v.astype(dtype)
    x = caches.queries(group).reshape(HEADS, group, DIMENSION)

    def call() -> np.ndarray:
        with limit(limits=threads, user_api="blas"):
            heads = [
                softmax(x[head] @ k[head].astype(np.float32, copy=False).T) @ v[head].astype(np.float32, copy=False)
                for head in range(HEADS)
            ]
        return np.concatenate(heads)

    return call, k.nbytes + v.nbytes


def _torch(caches: Caches, group: int, dtype: str, threads: int) -> tuple[Callable[[], np.ndarray], int]:
    torch: Any = require("torch", "bench")
    torch.set_num_threads(threads)
    x, k, v = (
        torch.from_numpy(array).to(getattr(torch, dtype))[None]
        for array in (caches.queries(group).reshape(HEADS, group, DIMENSION), caches.k, caches.v)
    )

    def call() -> np.ndarray:  # the queries of a group as if they were several of one head: nothing is repeated
        with torch.inference_mode():
            found = torch.nn.functional.scaled_dot_product_attention(x, k, v)
        result: np.ndarray = found.float().numpy()
        return result.reshape(-1, DIMENSION)

    return call, (k.numel() + v.numel()) * k.element_size()


PEERS: tuple[tuple[str, str, Any], ...] = (
    ("NumPy", "float32", _numpy),
    ("NumPy", "float16", _numpy),
    ("torch", "float32", _torch),
    ("torch", "float16", _torch),
)
"""Library, type of its keys and values, and what prepares its attention."""

_caches = functools.lru_cache(maxsize=1)(Caches)


def take(positions: int, group: int, isa: str, threads: int, effort: Effort) -> tuple[Measurement, float, int]:
    """Measure our attention; return its error and the bytes of the cache too."""
    effort.check()
    caches = _caches(positions)
    run, out = caches.attending(group)
    ceiling, amount = caches.ceiling(group, isa, threads)
    with settings(isa, threads):
        result = measure(Work(run, amount), ceiling, effort)
    return result, caches.error(group, out), caches.nbytes


def take_peer(
    peer: tuple[str, str, Any], positions: int, group: int, isa: str, threads: int, effort: Effort
) -> tuple[Measurement, float, int]:
    """Measure another library's attention, and ours in turn with it; return its error and its bytes too."""
    effort.check()
    _, dtype, prepare = peer
    caches = _caches(positions)
    call, nbytes = prepare(caches, group, dtype, threads)
    ceiling, amount = caches.ceiling(group, isa, threads)
    with settings(isa, threads):
        result = measure(Work(repeat(call), amount), ceiling, effort, [caches.attending(group)[0]], settle=True)
    return result, caches.error(group, call()), nbytes


def _row(row: Row, take_it: Callable[[], tuple[Measurement, float, int]]) -> Row:
    found: dict[str, Any] = {}

    def measurement() -> Measurement:
        result, found["error"], nbytes = take_it()
        found["memory"] = f"{nbytes / 1e6:.1f} MB"
        return result

    return dataclasses.replace(row.measured(measurement), by_alike=math.nan, **found)


def rows(options: Any, effort: Effort) -> Iterator[Row]:
    """Yield the rows of the table of attention: for each length and group ours, then the others'."""
    lengths = ALL_POSITIONS if options.full else POSITIONS
    names = [
        peer for peer in PEERS if options.peers is None or any(w.lower() in peer[0].lower() for w in options.peers)
    ]
    for threads, positions, group in itertools.product(options.threads, lengths, GROUPS):
        row = Row("attention", "quantization", "kv_attention", f"{BITS}-bit cache", options.isa, threads,
                  f"{HEADS}x{positions}x{DIMENSION}", BITS, group)  # fmt: skip
        yield _row(row, functools.partial(take, positions, group, options.isa, threads, effort))
        for peer in names:
            name, dtype, _ = peer
            what, accuracy = f"softmax(q kT) v, {dtype} cache", ACCURACY[dtype]
            other = dataclasses.replace(row, implementation=name, what=what, accuracy=accuracy, isa="", bits=0)
            arguments = (peer, positions, group, options.isa, threads, effort)
            yield _row(other, functools.partial(take_peer, *arguments))
