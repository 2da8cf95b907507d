"""Samples that can be trusted: threads pinned to distinct CPUs, and proof that each had its CPU to itself."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import machine

_TASKS = Path("/proc/self/task")
LEAST_SHARE = 0.985
"""Of a sample's wall time, what every thread that works must have had of a CPU; else the sample is taken again."""
WORKING = 0.1
"""A thread works if it ran for so much of a sample."""


@dataclass(frozen=True)
class Sample:
    """Seconds that some calls took, and the least share of its time that a thread got."""

    seconds: float
    share: float


def _thread_times() -> dict[int, tuple[int, int]]:
    """Nanoseconds that each thread of this process ran, and that it waited for a CPU (Linux; elsewhere empty)."""
    times = {}
    for task in _TASKS.glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            ran, waited = task.read_text(encoding="ascii").split()[:2]
            times[int(task.parent.name)] = int(ran), int(waited)
    return times


def _least_share(before: dict[int, tuple[int, int]], after: dict[int, tuple[int, int]], wall_ns: float) -> float:
    """1 less what the worst-off of the working threads waited."""
    share = 1.0
    for thread, (ran, waited) in after.items():
        ran_before, waited_before = before.get(thread, (0, 0))
        if ran - ran_before > WORKING * wall_ns:
            share = min(share, 1 - (waited - waited_before) / wall_ns)
    return share


def timed(call: Callable[[], object]) -> Sample:
    """Time one call.

    Where the system does not tell how long threads waited, the caller's own CPU time stands for all: it works or spins
    all the while.
    """
    before, own = _thread_times(), time.thread_time()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    own = time.thread_time() - own
    after = _thread_times()
    share = _least_share(before, after, seconds * 1e9) if after else min(1.0, own / seconds)
    return Sample(seconds, share)


def working_threads(call: Callable[[], object]) -> list[int]:
    """Return the ids of the threads, the calling one first, that work during a call (Linux; elsewhere empty).

    The call must have been made before: the first one starts threads.
    """
    before = _thread_times()
    start = time.perf_counter()
    call()
    wall_ns = (time.perf_counter() - start) * 1e9
    after = _thread_times()
    works = {thread for thread in after if after[thread][0] - before.get(thread, (0, 0))[0] > WORKING * wall_ns}
    own = threading.get_native_id()
    return [own, *sorted(works - {own})] if after else []


@contextlib.contextmanager
def pinned(*calls: Callable[[], object]) -> Iterator[None]:
    """Keep the threads that work during each of the calls on CPUs of their own; afterwards as before.

    Two threads that spin may otherwise share a CPU for a while. A call with more threads than CPUs is left alone.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cpus = machine.cpus()
    former: dict[int, set[int]] = {}
    for threads in [working_threads(call) for call in calls]:
        if len(threads) > len(cpus):
            continue
        for cpu, thread in zip(cpus, threads, strict=False):
            with contextlib.suppress(OSError):
                former.setdefault(thread, os.sched_getaffinity(thread))
                os.sched_setaffinity(thread, {cpu})
    try:
        yield
    finally:
        for thread, mask in former.items():
            with contextlib.suppress(OSError):
                os.sched_setaffinity(thread, mask)


def wait_for_spinners(limit: float = 0.3) -> None:
    """Wait until no other thread of this process is running: pools spin for a while after their last task."""
    own, end = threading.get_native_id(), time.perf_counter() + limit
    while time.perf_counter() < end:
        running = False
        for task in _TASKS.glob("*/stat"):
            with contextlib.suppress(OSError):
                state = task.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
                running |= state == "R" and int(task.parent.name) != own
        if not running:
            return
        time.sleep(0.002)
