"""How much memory a product takes beyond its arguments: run as a process of its own, where the first call is the only.

A process's largest resident size only grows, so a ballast lifts it beyond all earlier peaks before the call, and what
the call adds is what it took at most: scratch, planes of x, and the stacks of the threads it started.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

import quantization as q

from .ours import settings

_BALLAST = 64 << 20


def _peak() -> int:
    """Bytes that were resident at most.

    On Linux as /proc has it, since getrusage counts what the parent had when this process was started.
    """
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def growth(call: Callable[[], object]) -> int:
    """Return the bytes that a call takes at most, give or take what Linux counts late: 64 pages a thread."""
    ballast = np.ones(_BALLAST, np.uint8)
    before = _peak()
    call()
    del ballast
    return _peak() - before


def _measure(isa: str, threads: int, n: int, k: int, m: int) -> int:
    codes = np.full((n, k // 8), 0x76543210, np.uint32)
    scales, biases = np.full((n, k // 64), 0.01, np.float32), np.full((n, k // 64), -0.08, np.float32)
    x, out = np.ones((m, k), np.float32), np.ones((m, n), np.float32)
    with settings(isa, threads):
        kernel = q.AffineQmmT(64, 4)
        kernel(x[:1, :64], codes[:1, :8], scales[:1, :1], biases[:1, :1])  # the kernel's code becomes resident
        return growth(lambda: kernel(x, codes, scales, biases, out=out))


def take(isa: str, threads: int, n: int, k: int, m: int) -> int:
    """Return the bytes that a product takes in a fresh process."""
    command = [sys.executable, "-m", __name__, isa, *map(str, (threads, n, k, m))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"bench: measuring scratch failed: {done.stderr.strip().splitlines()[-1:]}")
    return int(json.loads(done.stdout))


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], *map(int, sys.argv[2:]))))
