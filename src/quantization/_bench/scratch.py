"""How much memory a product takes beyond its arguments: run as a process of its own, where the first call is the only.

A process's largest resident size only grows, so the arguments are made last before the call, and what the call adds is
what it took at most: scratch, planes of x, and the stacks of the threads it started.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import numpy as np

import quantization as q

from .ours import settings

_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes there, KiB elsewhere
_BALLAST = 64 << 20


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT


def _measure(isa: str, threads: int, n: int, k: int, m: int) -> int:
    codes = np.full((n, k // 8), 0x76543210, np.uint32)
    scales, biases = np.full((n, k // 64), 0.01, np.float32), np.full((n, k // 64), -0.08, np.float32)
    x, out = np.ones((m, k), np.float32), np.ones((m, n), np.float32)
    with settings(isa, threads):
        kernel = q.AffineQmmT(64, 4)
        kernel(x[:1, :64], codes[:1, :8], scales[:1, :1], biases[:1, :1])  # code pages of the way to the kernel
        ballast = np.ones(_BALLAST, np.uint8)  # beyond any earlier peak
        before = _peak()
        kernel(x, codes, scales, biases, out=out)
        del ballast
        return _peak() - before


def take(isa: str, threads: int, n: int, k: int, m: int) -> int:
    """Return the bytes that a product takes in a fresh process."""
    command = [sys.executable, "-m", __name__, isa, *map(str, (threads, n, k, m))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"bench: measuring scratch failed: {done.stderr.strip().splitlines()[-1:]}")
    return int(json.loads(done.stdout))


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], *map(int, sys.argv[2:]))))
