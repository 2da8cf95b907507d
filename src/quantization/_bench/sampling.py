"""Interleaved samples: each of a kernel's is directly followed by one of its ceiling, and their ratio is the result."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import clock
from .ceilings import Ceiling


@dataclass(frozen=True)
class Effort:
    """How much time a figure may take: rounds of samples, seconds each, and the longest call that is sampled at all.

    Nothing is begun after ``deadline``, a time of `time.monotonic`.
    """

    samples: int
    seconds: float
    longest_call: float
    deadline: float = math.inf

    def check(self) -> None:
        """Raise TooSlowError if the time is up."""
        if time.monotonic() > self.deadline:
            raise TooSlowError("left out: time is up")

    def part(self, share: float) -> Effort:
        """Return the same with a deadline after a share of the time that is left."""
        now = time.monotonic()
        return dataclasses.replace(self, deadline=now + share * max(0.0, self.deadline - now))


FEWEST, LONG = 3, 10
"""Rounds that take so many times what was asked for, because one call does, are taken only so often."""

QUICK = Effort(samples=5, seconds=0.02, longest_call=1.0)
FULL = Effort(samples=9, seconds=0.06, longest_call=30.0)


@dataclass(frozen=True)
class Work:
    """Something to time: `run(n)` makes n calls, each of which does `amount` bytes or operations."""

    run: Callable[[int], object]
    amount: float


@dataclass(frozen=True)
class Measurement:
    """Medians over rounds of samples; ratios are the kernel's rate to the ceiling's of the same round.

    Rates are in ``unit``: GB/s, GFLOP/s and so on. ``share`` is the least that a thread had of its time. ``by`` is how
    many times the time of each rival a call took.
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
    by: tuple[float, ...] = ()


class TooSlowError(Exception):
    """A call takes longer than the effort allows, or the time is up."""


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


@dataclass(frozen=True)
class _Round:
    """Seconds a call and the rate of the work, the ceiling's rate, and seconds a call of each rival."""

    seconds: float
    rate: float
    ceiling: float
    rivals: tuple[float, ...]


def _summary(rounds: list[_Round], retries: int, share: float, ceiling: Ceiling) -> Measurement:
    ratios = [one.rate / one.ceiling for one in rounds]
    by = zip(*([one.seconds / rival for rival in one.rivals] for one in rounds), strict=True)
    return Measurement(
        statistics.median(one.seconds for one in rounds),
        statistics.median(one.rate for one in rounds),
        statistics.median(one.ceiling for one in rounds),
        statistics.median(ratios),
        _spread(ratios),
        len(rounds),
        retries,
        share,
        ceiling.unit,
        ceiling.name,
        tuple(statistics.median(ratios_of_one) for ratios_of_one in by),
    )


def measure(
    work: Work,
    ceiling: Ceiling,
    effort: Effort,
    rivals: Sequence[Callable[[int], object]] = (),
    settle: bool = False,
) -> Measurement:
    """Take rounds of samples: the work, its ceiling, and other ways to do the same.

    A round in which a thread did not get `clock.LEAST_SHARE` of its time is thrown away, at most as often as there are
    rounds; after that it counts, and `share` tells. `settle`: another library's threads may spin after a sample.
    """
    effort.check()
    done = [0.0]

    def run_ceiling(count: int) -> None:
        done[0] = ceiling.run(count)

    runs = [work.run, run_ceiling, *rivals]
    calls = [_calls_for(run, effort.seconds, effort.longest_call) for run in runs]
    bound = [functools.partial(run, count) for run, count in zip(runs, calls, strict=True)]
    rounds: list[_Round] = []
    retries, least, wanted = 0, 1.0, effort.samples
    with clock.pinned(*bound):
        while len(rounds) < wanted:
            samples = []
            for call in bound:
                if settle:
                    clock.wait_for_spinners()
                samples.append(clock.timed(call))
            share = min(sample.share for sample in samples)
            if share < clock.LEAST_SHARE and retries < wanted:
                retries += 1
                continue
            least = min(least, share)
            took = [sample.seconds for sample in samples]
            wanted = min(wanted, FEWEST) if sum(took) > LONG * effort.seconds else wanted
            each = [seconds / count for seconds, count in zip(took, calls, strict=True)]
            rates = work.amount / each[0] / 1e9, done[0] / took[1] / 1e9
            rounds.append(_Round(each[0], *rates, tuple(each[2:])))
    return _summary(rounds, retries, least, ceiling)
