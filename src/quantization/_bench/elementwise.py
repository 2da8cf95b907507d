"""Quantize, dequantize, conversion and fake quantization as rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import ceilings, machine, ours, peers
from .ceilings import Ceiling
from .ours import Elementwise, repeat, settings
from .rows import Row
from .sampling import Effort, Measurement, Work, measure
from .stored import EVERY, SMALL_FLOATS


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
    row = Row("elementwise", "quantization", f"{case.op} {case.what}", case.accuracy, isa, threads)
    ceiling = ceiling_for(case, isa, threads)
    with settings(isa, threads):
        return row.measured(lambda: measure(case.work, ceiling, effort))


def _cases(full: bool) -> Iterator[Callable[[], Elementwise]]:
    for dtype in ("float32", "bfloat16") + (("float16",) if full else ()):
        for stored in EVERY if full else (4, *SMALL_FLOATS):
            if full or stored == 4 or dtype == "float32":
                yield lambda dtype=dtype, stored=stored: ours.quantizing(large(), dtype, stored)  # type: ignore[misc]
                yield lambda dtype=dtype, stored=stored: ours.dequantizing(large(), dtype, stored)  # type: ignore[misc]
    yield lambda: ours.dequantizing(large(), "float16", 4)
    yield lambda: ours.fake_quantizing(large(), cached=False)
    yield lambda: ours.fake_quantizing(in_cache(), cached=True)


def _peer_rows(isa: str, effort: Effort) -> Iterator[Row]:
    """Measure the peers on a sixteenth of what we are measured on: they are so much slower."""
    elements = large() // 16
    w = np.random.default_rng(1).standard_normal((max(1, elements // 4096), 4096), dtype=np.float32)
    calls = ours.quantizing(w.size, "float32", 4), ours.dequantizing(w.size, "float32", 4)
    for codec in peers.CODECS:
        for what, accuracy, own in zip(("quantize", "dequantize"), (codec.codes, ours.ONCE), calls, strict=True):
            row = Row("elementwise", codec.name, f"{what} {w.size:,} floats", accuracy, "", 1)
            if why := codec.missing():
                yield row.with_note(why)
                continue
            with settings(isa, 1):
                yield row.measured(lambda: _codec_measured(codec, what, w, own, isa, effort))  # noqa: B023


def _codec_measured(codec: peers.Codec, what: str, w: np.ndarray, own: Elementwise, isa: str,
                    effort: Effort) -> Measurement:  # fmt: skip
    effort.check()
    quantize, dequantize, nbytes = codec.prepare(w)
    buffer = ceilings.aligned(4 * machine.last_level_cache() // ceilings.BLOCK * ceilings.BLOCK)
    ceiling = ceilings.reading(lambda count: [buffer] * count, isa, 1)
    work = Work(repeat(quantize if what == "quantize" else dequantize), w.nbytes + nbytes)
    return measure(work, ceiling, effort, [own.work.run], settle=True)


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
        accuracy = ours.Variant(dtype).accuracy
        row = Row(
            "calls", "quantization", f"affine_qmv {dtype}, compiled, out=", accuracy, options.isa, 1, "64x64", 4, 1
        )
        yield row.measured(lambda: tiny(dtype, effort))  # noqa: B023


def tiny(dtype: str, effort: Effort) -> Measurement:
    """Measure the call overhead, on the best instruction set; the ceiling is an empty call, of the loop and the clock.

    Without context managers: they choose another kernel than the compiled one, which costs a look-up.
    """
    call = ours.tiny_call(dtype)
    empty = ceilings.Ceiling("empty call", lambda count: (repeat(lambda: None)(count), float(count))[1], "calls")
    return measure(Work(repeat(call), 1.0), empty, effort)
