"""How much memory a product takes beyond its arguments: run as a process of its own, where the first call is the only.

A process's largest resident size only grows, so a ballast lifts it beyond all earlier peaks before the call, and what
the call adds is what it took at most: scratch, planes of x, and the stacks of the threads it started.
"""

from __future__ import annotations

import functools
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .gates import Product
from .ours import KERNELS, Variant, settings
from .shapes import Shape
from .stored import format_of

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


def _weights(product: Product, shape: tuple[int, int]) -> list[np.ndarray]:
    """Any codes, scales and, if affine, biases of the shape in which they are stored."""
    mode = product.operation.partition("_")[0]
    form = format_of(product.bits if mode == "affine" else mode)
    scale = np.uint8 if mode != "affine" else np.uint16 if product.variant.dtype == "bfloat16" else np.float32
    codes = np.full((shape[0], shape[1] // 32 * form.bits), 0x76543210, np.uint32)
    groups = (shape[0], shape[1] // form.group_size)
    return [codes, *(np.full(groups, 1, scale) for _ in range(2 if mode == "affine" else 1))]


def _measure(isa: str, threads: int, product: Product) -> int:
    n, k = product.shape
    shape = (k, n) if product.operation.endswith(("_qvm", "_qmm_n")) else (n, k)
    given, kind = _weights(product, shape), np.dtype(np.uint16 if product.variant.dtype == "bfloat16" else np.float32)
    x, out = np.ones((product.m, k), kind), np.ones((product.m, n), kind)
    options = {"accumulate": product.variant.accumulate, "activations": product.variant.activations}
    options |= {"input_dtype": "bfloat16"} if product.variant.dtype == "bfloat16" else {}
    with settings(isa, threads):
        affine = (64, product.bits) if product.operation.startswith("affine") else ()
        multiply = functools.partial(KERNELS[product.operation](*affine), **options)
        small = [array[:64, : 64 * array.shape[1] // shape[1]] for array in given]
        if product.operation == "affine_gather_qmm_rhs":  # each row chooses one of 8, in turn
            small = [*(array[None] for array in small), np.zeros(1, np.int64)]
            given = [*(np.stack([array] * 8) for array in given), np.arange(product.m) % 8]
        multiply(x[:1, :64], *small)  # the kernel's code becomes resident
        return growth(lambda: multiply(x, *given, out=out))


def take(isa: str, threads: int, product: Product) -> int:
    """Return the bytes that a product takes in a fresh process."""
    command = [sys.executable, "-m", __name__, isa, str(threads), json.dumps(product)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring scratch failed: {done.stderr.strip().splitlines()[-1:]}")
    return int(json.loads(done.stdout))


def _product_of(text: str) -> Product:
    m, bits, variant, shape, op = json.loads(text)
    return Product(m, bits, Variant(*variant), Shape(*shape), op)


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], int(sys.argv[2]), _product_of(sys.argv[3]))))
