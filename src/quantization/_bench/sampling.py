"""Interleaved samples: each of a kernel's is directly followed by one of its ceiling, and their ratio is the result."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from . import clock
from .ceilings import Ceiling


@dataclass(frozen=True)
class Effort:
    """How much time a figure may take: pairs of samples, seconds each, and the longest call that is sampled at all."""

    samples: int
    seconds: float
    longest_call: float


FEWEST, LONG = 3, 10
"""Pairs that take so many times what was asked for, because one call does, are taken only so often."""

QUICK = Effort(samples=5, seconds=0.02, longest_call=1.0)
FULL = Effort(samples=9, seconds=0.06, longest_call=30.0)


@dataclass(frozen=True)
class Work:
    """Something to time: `run(n)` makes n calls, each of which does `amount` bytes or operations."""

    run: Callable[[int], object]
    amount: float


@dataclass(frozen=True)
class Measurement:
    """Medians over pairs of samples; ratios are the kernel's rate to the ceiling's of the same pair.

    Rates are in ``unit``: GB/s, GFLOP/s and so on. ``share`` is the least that a thread had of its time.
    """

    seconds: float
    rate: float
    ceiling: float
    ratio: float
    spread: float
    samples: int
    retries: int
    share: float
    unit: str = ""
    ceiling_name: str = ""


class TooSlowError(Exception):
    """A call takes longer than the effort allows."""


def _calls_for(run: Callable[[int], object], seconds: float, longest: float) -> int:
    """How many calls take about so long."""
    calls, took = 1, clock.timed(lambda: run(1)).seconds
    if took > longest:
        raise TooSlowError(f"a call takes {took:.2g} s")
    while took < seconds / 4:
        calls = min(calls * 16, max(calls * 2, int(calls * seconds / max(took, 1e-7))))
        took = clock.timed(lambda n=calls: run(n)).seconds  # type: ignore[misc]
    return max(1, round(calls * seconds / took))


def _spread(values: list[float]) -> float:
    """Half of what lies between the quartiles."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


def against(name: str, run: Callable[[int], object]) -> Ceiling:
    """Return another way to do the same as if it were a ceiling: the ratio is how many times longer it takes."""

    def count(calls: int) -> float:
        run(calls)
        return float(calls)

    return Ceiling(name, count, "calls")


def _summary(pairs: list[tuple[float, float, float]], retries: int, share: float, ceiling: Ceiling) -> Measurement:
    seconds, rates, ceilings = zip(*pairs, strict=True)
    ratios = [rate / ceiling for rate, ceiling in zip(rates, ceilings, strict=True)]
    return Measurement(
        statistics.median(seconds),
        statistics.median(rates),
        statistics.median(ceilings),
        statistics.median(ratios),
        _spread(ratios),
        len(pairs),
        retries,
        share,
        ceiling.unit,
        ceiling.name,
    )


def measure(work: Work, ceiling: Ceiling, effort: Effort, settle: bool = False) -> Measurement:
    """Take pairs of samples of work and ceiling.

    A pair in which a thread did not get `clock.LEAST_SHARE` of its time is thrown away, at most as often as there are
    samples; after that it counts, and `share` tells. `settle`: another library's threads may spin after a sample.
    """
    calls = _calls_for(work.run, effort.seconds, effort.longest_call)
    portions = _calls_for(ceiling.run, effort.seconds, effort.longest_call)
    pairs: list[tuple[float, float, float]] = []
    retries, least, wanted = 0, 1.0, effort.samples
    done = [0.0]

    def run_ceiling() -> None:
        done[0] = ceiling.run(portions)

    with clock.pinned(lambda: work.run(calls), run_ceiling):
        while len(pairs) < wanted:
            if settle:
                clock.wait_for_spinners()
            ours = clock.timed(lambda: work.run(calls))
            if settle:
                clock.wait_for_spinners()
            theirs = clock.timed(run_ceiling)
            share = min(ours.share, theirs.share)
            if share < clock.LEAST_SHARE and retries < wanted:
                retries += 1
                continue
            least = min(least, share)
            rate = work.amount * calls / ours.seconds
            wanted = min(wanted, FEWEST) if ours.seconds + theirs.seconds > LONG * effort.seconds else wanted
            pairs.append((ours.seconds / calls, rate / 1e9, done[0] / theirs.seconds / 1e9))
    return _summary(pairs, retries, least, ceiling)
