"""Products as rows: ours and the peers', with the memory's speed as ceiling at M <= 2 and the FMA peak beyond."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from .. import _text
from . import ceilings, ours, peers
from .ceilings import Ceiling
from .ours import Variant, settings
from .rows import Row
from .sampling import Effort, Measurement, TooSlowError, Work, measure
from .shapes import Shape
from .weights import Weights

READ_BOUND = 2
"""Up to so many rows of x, reading weights takes longer than float32 multiplications would at their peak."""


def figure_of(weights: Weights, m: int, isa: str, threads: int) -> tuple[Ceiling, float]:
    """Return the ceiling of a product, and the bytes or operations that a call counts for."""
    if m <= READ_BOUND:
        return ceilings.reading(weights.spans, isa, threads), float(weights.nbytes)
    return ceilings.arithmetic("fma", isa, threads), 2.0 * m * weights.shape.n * weights.shape.k


def _new_weights(shape: Shape, bits: int, transpose: bool, cold: bool, scale_dtype: str,
                 most: int | None = None) -> Weights:  # fmt: skip
    return Weights(shape, bits, transpose=transpose, cold=cold, scale_dtype=scale_dtype, most=most)


cached_weights = functools.lru_cache(maxsize=4)(_new_weights)
"""Weights that a former row may have made: shape, bits, transpose, cold, scale_dtype, most."""


def our_row(op: str, shape: Shape, bits: int, m: int, variant: Variant, isa: str, threads: int, cold: bool,
            effort: Effort) -> Row:  # fmt: skip
    """Measure one of our products."""
    row = Row("matmul", "quantization", f"{op} {variant}", variant.accuracy, isa, threads, str(shape), bits, m,
              "cold" if cold else "hot")  # fmt: skip
    if why := ours.missing(variant):
        return row.with_note(why)
    error = [math.nan]

    def take() -> Measurement:
        effort.check()
        weights = cached_weights(shape, bits, op != "affine_qmm_n", cold, ours.scale_dtype_for(variant))
        ceiling, amount = figure_of(weights, m, isa, threads)
        out = ours.output(weights, m, variant)
        work = Work(ours.repeat(ours.call_matmul(op, weights, m, variant, out)), amount)
        result = measure(work, ceiling, effort)
        error[0] = weights.error(out, "bfloat16" if out.dtype == np.uint16 else str(out.dtype), variant.dtype)
        return result

    with settings(isa, threads):
        row = row.measured(take)
    return dataclasses.replace(row, error=error[0])


MOST_COPIES = 64
"""Copies of small matrices that peers get, and ours beside them: each may be a compiled model of its own."""


def _rivals(accuracy: str, weights: Weights, m: int) -> list[Callable[[int], object]]:
    """Return our exact float32 product and, if that is another one, the one of the accuracy class."""
    op = "affine_qmv" if m == 1 else "affine_qmm_t"
    calls: list[Callable[[int], object]] = []
    for variant in dict.fromkeys((ours.EXACT, ours.ALIKE[accuracy])):
        dtype = ours.scale_dtype_for(variant)
        own = cached_weights(weights.shape, weights.bits, True, True, dtype, MOST_COPIES)
        out = ours.output(own, m, variant)
        calls.append(ours.repeat(ours.call_matmul(op, own, m, variant, out)))
    return calls


EXACT_ERROR = 1e-5
"""Between the errors of float32 sums, about 1e-6 at most, and those of anything with 16 bits, about 1e-3 at least."""


def _class_found(accuracy: str, error: float) -> str:
    """Return the accuracy class that a peer turns out to be in: some round x only where the CPU gains by it.

    Raises
    ------
    RuntimeError
        If it is less exact than it should be.
    """
    if error <= EXACT_ERROR:
        return "exact f32"
    if accuracy == "exact f32":
        raise RuntimeError(f"not exact: error {error:.1e}")
    return accuracy


def _peer_row(row: Row, call: peers.Call, peer: peers.Peer, weights: Weights, isa: str, effort: Effort) -> Row:
    """Measure a peer's product between its ceiling and ours."""
    found: dict[str, Any] = {}

    def take() -> Measurement:
        effort.check()
        ceiling, amount = figure_of(weights, row.m, isa, row.threads)
        found["error"] = weights.error(call(1), "float32", peer.dtype)
        found["accuracy"] = _class_found(peer.accuracy, found["error"])
        call(weights.copies - 1)  # some libraries finish compiling in the first call of each
        rivals = _rivals(found["accuracy"], weights, row.m)
        return measure(Work(call, amount), ceiling, effort, rivals, settle=True)

    with settings(isa, row.threads):
        row = row.measured(take)
    return dataclasses.replace(row, **found)


def peer_rows(peer: peers.Peer, shape: Shape, bits: int, isa: str, threads: int, numbers: Iterable[int],
              effort: Effort) -> Iterator[Row]:  # fmt: skip
    """Measure a peer with more and more rows of x, until its time would be out of proportion."""
    row = Row("matmul", peer.name, f"x @ W.T, {peer.dtype}", peer.accuracy, "", threads, str(shape), bits)
    if why := peer.missing() or ("has no threads" if peer.serial and threads > 1 else None):
        yield row.with_note(why)
        return
    try:
        effort.check()
        weights = cached_weights(shape, bits, True, True, "float16", MOST_COPIES)
        row = dataclasses.replace(row, memory=weights.memory)
        prepared = peer.prepare(weights, threads)
    except (TooSlowError, ImportError, MemoryError, RuntimeError, ValueError) as failure:
        yield row.with_note(_text.first_line(failure)[:60])
        return
    last: tuple[int, float] | None = None
    for m in sorted(numbers):
        row = dataclasses.replace(row, m=m)
        if last and last[1] * m / last[0] > effort.longest_call:
            yield row.with_note(f"too slow: {last[1]:.2g} s at M = {last[0]}")
            continue
        found = _peer_row(row, prepared(m), peer, weights, isa, effort)
        last = (m, found.seconds) if not found.note else last
        yield found


def chosen_peers(names: list[str] | None) -> list[peers.Peer]:
    """Return the peers whose name contains one of the words; all for None."""
    if names is None:
        return list(peers.MATMUL)
    return [peer for peer in peers.MATMUL if any(word.lower() in peer.name.lower() for word in names)]


def our_cases(m: int, shape: Shape, full: bool) -> Iterator[tuple[str, Variant, bool]]:
    """Yield operation, variant and whether the weights are cold, for one M."""
    op = "affine_qmv" if m == 1 else "affine_qmm_t"
    variants: list[Variant] = [ours.EXACT, ours.BF16, ours.INT8, ours.FLOAT]
    variants += [ours.F16] if full else []
    for variant in variants:
        yield op, variant, True
    if m == 1:
        yield op, ours.EXACT, False
    if shape.n % 64 == 0 and (full or m in (1, 128)):
        yield "affine_qmm_n", ours.EXACT, True


def rows(options: Any, effort: Effort) -> Iterator[Row]:
    """Yield the rows of the matmul table: for each matrix and number of threads, ours and then the peers."""
    tables = list(itertools.product(options.matrices, options.threads))
    for i, ((shape, bits), threads) in enumerate(tables):
        part = effort.part(1 / (len(tables) - i))
        for m in options.rows:
            for op, variant, cold in our_cases(m, shape, options.full):
                yield our_row(op, shape, bits, m, variant, options.isa, threads, cold, part)
        for peer in chosen_peers(options.peers) if bits == 4 else []:
            yield from peer_rows(peer, shape, bits, options.isa, threads, options.rows, part)
