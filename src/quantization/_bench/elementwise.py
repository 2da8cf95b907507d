"""Quantize, dequantize, conversion and fake quantization as rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import ceilings, machine, ours, peers
from .ceilings import Ceiling
from .ours import Elementwise, repeat, settings
from .rows import Row
from .sampling import Effort, Measurement, TooSlowError, Work, measure


def large() -> int:
    """Return how many floats no cache holds: 16 million, or twice the last level of cache."""
    return max(1 << 24, machine.last_level_cache() // 2)


def in_cache() -> int:
    """Return how many floats to take so that source and target fill half of a core's L2."""
    return max(1024, machine.core_cache() // 16)


def ceiling_for(case: Elementwise, isa: str, threads: int) -> Ceiling:
    """Return the ceiling that a case names, on as much memory as it uses."""
    if case.ceiling == "read":
        buffer = ceilings.aligned(case.nbytes // ceilings.BLOCK * ceilings.BLOCK)
        return ceilings.reading(lambda count: [buffer] * count, isa, threads)
    return ceilings.copying(case.ceiling, case.nbytes, isa, threads)


def measured(case: Elementwise, isa: str, threads: int, effort: Effort) -> Row:
    """Measure a case of ours."""
    row = Row("elementwise", "quantization", f"{case.op} {case.what}", "same bits", isa, threads)
    ceiling = ceiling_for(case, isa, threads)
    with settings(isa, threads):
        try:
            result = measure(case.work, ceiling, effort)
        except TooSlowError as error:
            return row.with_note(str(error))
    return row.with_measurement(result)


def _cases(full: bool) -> Iterator[Callable[[], Elementwise]]:
    for dtype in ("float32", "bfloat16") + (("float16",) if full else ()):
        for bits in (2, 3, 4, 5, 6, 8) if full else (4,):
            yield lambda dtype=dtype, bits=bits: ours.quantizing(large(), dtype, bits)  # type: ignore[misc]
            yield lambda dtype=dtype, bits=bits: ours.dequantizing(large(), dtype, bits)  # type: ignore[misc]
    yield lambda: ours.dequantizing(large(), "float16", 4)
    yield lambda: ours.fake_quantizing(large(), cached=False)
    yield lambda: ours.fake_quantizing(in_cache(), cached=True)


def _peer_rows(isa: str, effort: Effort) -> Iterator[Row]:
    w = np.random.default_rng(1).standard_normal((large() // 16 // 4096, 4096), dtype=np.float32)
    for codec in peers.CODECS:
        row = Row("elementwise", codec.name, "quantize", "", "", 1)
        if why := codec.missing():
            yield row.with_note(why)
            continue
        quantize, dequantize, nbytes = codec.prepare(w)
        size = f"{w.size:,} floats"
        for what, call in ((f"quantize {size}", quantize), (f"dequantize {size}", dequantize)):
            moved = w.nbytes + nbytes
            row = Row("elementwise", codec.name, what, "", "", 1)
            buffer = ceilings.aligned(4 * machine.last_level_cache() // ceilings.BLOCK * ceilings.BLOCK)
            ceiling = ceilings.reading(lambda count, buffer=buffer: [buffer] * count, isa, 1)  # type: ignore[misc]
            result = measure(Work(repeat(call), moved), ceiling, effort)
            yield row.with_measurement(result)


def rows(options: Any, effort: Effort) -> Iterator[Row]:
    """Yield the rows of the table of operations without a product."""
    for threads in options.threads:
        for case in _cases(options.full):
            made = case()
            if threads > 1 and made.ceiling == "copy":
                continue
            yield measured(made, options.isa, threads, effort)
    if options.peers is None or options.peers:
        yield from _peer_rows(options.isa, effort)


def tiny_rows(options: Any, effort: Effort) -> Iterator[Row]:
    """Yield what a call costs when there is hardly anything to compute."""
    for dtype in ("float32", "bfloat16"):
        row = Row("calls", "quantization", f"affine_qmv 64 x 64 {dtype}, out=", "", options.isa, 1)
        yield row.with_measurement(tiny(dtype, effort))


def tiny(dtype: str, effort: Effort) -> Measurement:
    """Measure the call overhead, on the best instruction set; the ceiling is an empty call, of the loop and the clock.

    Without context managers: they choose another kernel than the compiled one, which costs a look-up.
    """
    call = ours.tiny_call(dtype)
    empty = ceilings.Ceiling("empty call", lambda count: (repeat(lambda: None)(count), float(count))[1], "calls")
    return measure(Work(repeat(call), 1.0), empty, effort)
