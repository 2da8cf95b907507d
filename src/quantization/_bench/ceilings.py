"""What the machine can do at most, measured beside every sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .. import _C

ALIGNMENT = 4096
BLOCK = 256
"""The C core probes multiples of so many bytes."""


def aligned(size: int) -> np.ndarray:
    """Return so many bytes on pages of their own, which have been touched."""
    room = np.empty(size + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    array = room[start : start + size]
    array.fill(1)
    return array


@dataclass(frozen=True)
class Ceiling:
    """One way to be limited: `run(n)` does n portions of the work and returns how much of it was done.

    ``name`` is "read", "copy" (memcpy), "stream" (non-temporal copy), "fma" or "dot"; the unit is GB/s, where copies
    count what they read and what they write, or GFLOP/s or Gop/s, which count multiplications and additions.
    """

    name: str
    run: Callable[[int], float]
    unit: str


def _plan(isa: str, threads: int) -> _C.Plan:
    return _C.Plan("quantize", isa=isa, threads=threads)


def arithmetic(name: str, isa: str, threads: int) -> Ceiling:
    """Return the peak of fused multiply-adds ("fma") or of integer dots ("dot") of an instruction set."""
    plan, unit = _plan(isa, threads), "GFLOP/s" if name == "fma" else "Gop/s"
    return Ceiling(name, lambda portions: _C.probe(plan, name, None, None, portions * threads), unit)


def reading(spans: Callable[[int], list[np.ndarray]], isa: str, threads: int) -> Ceiling:
    """Return the speed at which memory is read; `spans(n)` are the next n pieces of it."""
    plan = _plan(isa, threads)

    def run(portions: int) -> float:
        return sum(_C.probe(plan, "read", span, None, 1) for span in spans(portions))

    return Ceiling("read", run, "GB/s")


def copying(name: str, size: int, isa: str, threads: int) -> Ceiling:
    """Return the speed of copies of `size` bytes in all, source and target, by memcpy ("copy") or past the caches."""
    half = max(BLOCK, size // 2 // BLOCK * BLOCK)
    plan, source, target = _plan(isa, threads), aligned(half), aligned(half)
    return Ceiling(name, lambda portions: _C.probe(plan, name, source, target, portions), "GB/s")
