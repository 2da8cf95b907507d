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
from .stored import Stored, format_of
from .weights import Weights

READ_BOUND = 2
"""Up to so many rows of x, reading weights takes longer than float32 multiplications would at their peak."""


def figure_of(weights: Weights, m: int, isa: str, threads: int) -> tuple[Ceiling, float]:
    """Return the ceiling of a product, and the bytes or operations that a call counts for."""
    if m <= READ_BOUND:
        return ceilings.reading(weights.spans, isa, threads), float(weights.nbytes)
    return ceilings.arithmetic("fma", isa, threads), 2.0 * m * weights.shape.n * weights.shape.k


def _new_weights(shape: Shape, stored: Stored, transpose: bool, cold: bool, scale_dtype: str,
                 most: int | None = None) -> Weights:  # fmt: skip
    return Weights(shape, stored, transpose=transpose, cold=cold, scale_dtype=scale_dtype, most=most)


cached_weights = functools.lru_cache(maxsize=4)(_new_weights)
"""Weights that a former row may have made: shape, format, transpose, cold, scale_dtype, most."""


def _row(library: str, what: str, accuracy: str, isa: str, threads: int, shape: Shape, stored: Stored) -> Row:
    """Return a row without figures."""
    form = format_of(stored)
    mode = "" if form.is_affine else form.mode
    return Row("matmul", library, what, accuracy, isa, threads, str(shape), form.bits, mode=mode)


def our_row(op: str, shape: Shape, stored: Stored, m: int, variant: Variant, isa: str, threads: int, cold: bool,
            effort: Effort) -> Row:  # fmt: skip
    """Measure one of our products."""
    row = _row("quantization", f"{op} {variant}", variant.accuracy, isa, threads, shape, stored)
    row = dataclasses.replace(row, m=m, memory="cold" if cold else "hot")
    if why := ours.missing(variant):
        return row.with_note(why)
    error = [math.nan]

    def take() -> Measurement:
        effort.check()
        scale_dtype = ours.scale_dtype_for(variant, stored)
        weights = cached_weights(shape, stored, not op.endswith("_qmm_n"), cold, scale_dtype)
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
    op = ours.product_name(weights.stored, m)
    calls: list[Callable[[int], object]] = []
    for variant in dict.fromkeys((ours.EXACT, ours.ALIKE[accuracy])):
        dtype = ours.scale_dtype_for(variant, weights.stored)
        own = cached_weights(weights.shape, weights.stored, True, True, dtype, MOST_COPIES)
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


def peer_rows(peer: peers.Peer, shape: Shape, stored: Stored, isa: str, threads: int, numbers: Iterable[int],
              effort: Effort) -> Iterator[Row]:  # fmt: skip
    """Measure a peer with more and more rows of x, until its time would be out of proportion."""
    row = _row(peer.name, f"x @ W.T, {peer.dtype}", peer.accuracy, "", threads, shape, stored)
    if why := peer.missing() or ("has no threads" if peer.serial and threads > 1 else None):
        yield row.with_note(why)
        return
    try:
        effort.check()
        weights = cached_weights(shape, stored, True, True, ours.scale_dtype_for(ours.EXACT, stored), MOST_COPIES)
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


def chosen_peers(names: list[str] | None, stored: Stored) -> list[peers.Peer]:
    """Return the peers that have a format and whose name contains one of the words; all for None."""
    able = [peer for peer in peers.MATMUL if stored in peer.formats]
    if names is None:
        return able
    return [peer for peer in able if any(word.lower() in peer.name.lower() for word in names)]


def our_cases(m: int, shape: Shape, stored: Stored, full: bool) -> Iterator[tuple[str, Variant, bool]]:
    """Yield operation, variant and whether the weights are cold, for one M.

    mxfp8 has no float class of its own, and its x is never rounded to int8.
    """
    op, mode = ours.product_name(stored, m), format_of(stored).mode
    variants: list[Variant] = [ours.EXACT, ours.BF16]
    variants += [ours.INT8, ours.FLOAT] if mode != "mxfp8" else []
    variants += [ours.F16] if full else []
    for variant in variants:
        yield op, variant, True
    if m == 1:
        yield op, ours.EXACT, False
    if shape.n % 64 == 0 and (full or m in (1, 128)):
        yield f"{mode}_qmm_n", ours.EXACT, True


def rows(options: Any, effort: Effort) -> Iterator[Row]:
    """Yield the rows of the matmul table: for each matrix and number of threads, ours and then the peers."""
    tables = list(itertools.product(options.matrices, options.threads))
    for i, ((shape, stored), threads) in enumerate(tables):
        part = effort.part(1 / (len(tables) - i))
        for m in options.rows:
            for op, variant, cold in our_cases(m, shape, stored, options.full):
                yield our_row(op, shape, stored, m, variant, options.isa, threads, cold, part)
        for peer in chosen_peers(options.peers, stored):
            yield from peer_rows(peer, shape, stored, options.isa, threads, options.rows, part)
