"""What is measured of this package: the matmuls in their accuracy classes, and what makes and undoes codes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

import quantization as q

from .ceilings import aligned
from .sampling import Work
from .stored import SMALL_FLOATS, Stored, format_of
from .weights import Weights, as_dtype


class Variant(NamedTuple):
    """One way to call a matmul: the type of x, and the options that choose an accuracy class."""

    dtype: str = "float32"
    accumulate: str = "exact"
    activations: str | None = None

    def __str__(self) -> str:
        options = [self.dtype]
        options += [self.activations + " activations"] if self.activations else []
        options += ["accumulate=" + self.accumulate] if self.accumulate != "exact" else []
        return ", ".join(options)

    @property
    def planes(self) -> int:
        """How many 8-bit digits an element of x has in the exact class, and in that of int8 activations."""
        return 1 if self.activations else 3 if self.dtype == "float32" else 2

    @property
    def accuracy(self) -> str:
        """The accuracy class, in the words that peers get too."""
        if self.activations:
            return "int8 activations"
        return "exact f32" if self.dtype == "float32" else f"exact, {self.dtype} x"


EXACT, BF16, F16 = Variant(), Variant("bfloat16"), Variant("float16")
INT8, FLOAT = Variant(activations="int8"), Variant(accumulate="float")
ALIKE = {"exact f32": EXACT, "bf16": BF16, "int8 activations": INT8}
"""What of ours is to be compared with a peer, by the peer's accuracy class."""


_PRODUCTS = (("qmv", "Qmv"), ("qvm", "Qvm"), ("qmm_t", "QmmT"), ("qmm_n", "QmmN"))
KERNELS: dict[str, Any] = {
    "affine_qmv": q.AffineQmv,
    "affine_qvm": q.AffineQvm,
    "affine_qmm_t": q.AffineQmmT,
    "affine_qmm_n": q.AffineQmmN,
    "affine_gather_qmm_rhs": q.AffineGatherQmmRhs,
    **{f"{mode}_{name}": getattr(q, mode.capitalize() + kernel) for mode in SMALL_FLOATS for name, kernel in _PRODUCTS},
}


@contextlib.contextmanager
def settings(isa: str, threads: int) -> Iterator[None]:
    """Run kernels of this instruction set on so many threads."""
    with q.isa(isa), q.threads(threads):
        yield


def missing(variant: Variant) -> str | None:
    """Say why the installed package cannot do a variant, or return None."""
    w = q.affine_quantize(np.ones((1, 32), np.float32), 32, 4)
    try:
        q.affine_qmm_t(np.ones(32, np.float32), *w, accumulate=variant.accumulate, activations=variant.activations)
    except ValueError:
        return f"accumulate={variant.accumulate} is not there"
    return None


def call_matmul(
    op: str, weights: Weights, m: int, variant: Variant, out: np.ndarray | None = None
) -> Callable[[], Any]:
    """Return a call of `op` that takes the next copy of the weights."""
    kernel = KERNELS[op]()
    x = weights.x(m, variant.dtype)
    options: dict[str, Any] = {}
    if weights.format.is_affine:
        options |= {"group_size": weights.group_size, "bits": weights.bits}
    options |= {"accumulate": variant.accumulate, "activations": variant.activations, "out": out}
    if variant.dtype == "bfloat16" or weights.scale_dtype == "bfloat16":
        options["input_dtype"] = "bfloat16"
    return lambda: kernel(x, *weights.next(), **options)


def output(weights: Weights, m: int, variant: Variant) -> np.ndarray:
    """Return an array for the product: x's dtype where affine scales have it too, else float32."""
    same = variant.dtype == weights.scale_dtype or not weights.format.is_affine
    dtype = {"bfloat16": "uint16"}.get(variant.dtype, variant.dtype) if same else "float32"
    return np.zeros((m, weights.shape.n), dtype)


def repeat(call: Callable[[], Any]) -> Callable[[int], None]:
    """Return a function that makes the call n times."""

    def run(count: int) -> None:
        for _ in range(count):
            call()

    return run


def product_name(stored: Stored, m: int) -> str:
    """Return the function for x @ W.T that one would call for so many rows of x."""
    return f"{format_of(stored).mode}_{'qmv' if m == 1 else 'qmm_t'}"


def scale_dtype_for(variant: Variant, stored: Stored = 4) -> str:
    """Scales in 16 bits, of x's own type if that has 16 too; bytes for small floats."""
    if not format_of(stored).is_affine:
        return "uint8"
    return variant.dtype if variant.dtype != "float32" else "float16"


CODES, ONCE = "affine g64 codes", "rounded once"
"""Accuracy classes of what makes codes, by their format, and of what undoes them."""


@dataclass(frozen=True)
class Elementwise:
    """An operation on arrays without a product: what to call, on what, and by which ceiling to judge it."""

    op: str
    what: str
    accuracy: str
    ceiling: str
    work: Work
    nbytes: int


def _columns(elements: int) -> tuple[int, int]:
    return max(1, elements // 4096), min(elements, 4096)


def _draw(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


_normal = functools.lru_cache(maxsize=1)(_draw)


def _codec(stored: Stored, name: str) -> tuple[str, Callable[..., Any], dict[str, Any]]:
    """Return a function's name, its kernel and the options that say the format."""
    form = format_of(stored)
    options: dict[str, Any] = {"group_size": form.group_size, "bits": form.bits} if form.is_affine else {}
    return f"{form.mode}_{name}", getattr(q, form.mode.capitalize() + name.capitalize())(), options


def quantizing(elements: int, dtype: str, stored: Stored) -> Elementwise:
    """Return `quantize` of an array of so many elements."""
    op, kernel, options = _codec(stored, "quantize")
    w = as_dtype(_normal(_columns(elements)), dtype)
    options |= {"input_dtype": "bfloat16"} if dtype == "bfloat16" else {}
    out = kernel(w, **options)
    moved = w.nbytes + sum(part.nbytes for part in out)
    run = repeat(lambda: kernel(w, **options, out=out))
    codes, what = (CODES, f" to {stored} bits") if isinstance(stored, int) else (f"{stored} codes", "")
    return Elementwise(op, dtype + what, codes, "read", Work(run, moved), moved)


def dequantizing(elements: int, dtype: str, stored: Stored) -> Elementwise:
    """Return `dequantize` to an array of so many elements; to 16 bits it is the conversion of types too."""
    shape = _columns(elements)
    codes = getattr(q, f"{format_of(stored).mode}_quantize")(_normal(shape), **_codec(stored, "quantize")[2])
    op, kernel, options = _codec(stored, "dequantize")
    out = aligned(elements * (4 if dtype == "float32" else 2))
    out = out.view({"bfloat16": np.uint16}.get(dtype, dtype)).reshape(shape)
    moved = out.nbytes + sum(part.nbytes for part in codes)
    run = repeat(lambda: kernel(*codes, **options, dtype=dtype, out=out))
    what = f"{stored} bits to {dtype}" if isinstance(stored, int) else f"to {dtype}"
    return Elementwise(op, what, ONCE, "stream", Work(run, moved), moved)


def fake_quantizing(elements: int, cached: bool) -> Elementwise:
    """Return `quantize`: from and to memory against a non-temporal copy, in the cache against memcpy."""
    x = np.random.default_rng(1).uniform(-1.2, 1.2, elements).astype(np.float32)
    y = aligned(elements * 4).view(np.float32)
    kernel = q.VariableQuantizationKernel()
    run = repeat(lambda: kernel(x, 4, out=y))
    what = f"{elements:,} floats" + (" in L2" if cached else "")
    nbytes = 8 * elements
    return Elementwise("quantize", what, "exact f32", "copy" if cached else "stream", Work(run, nbytes), nbytes)


def encoding_kv(vectors: int) -> Elementwise:
    """Return `quantize_kv` of vectors of 128 with 4 bits, in the cache against memcpy."""
    x = np.random.default_rng(1).standard_normal((vectors, 128), dtype=np.float32)
    out = q.quantize_kv(x)
    kernel = q.QuantizeKv()
    run = repeat(lambda: kernel(x, out=out))
    nbytes = x.nbytes + out[0].nbytes + out[1].nbytes
    return Elementwise("quantize_kv", f"{vectors:,} x 128 floats", "4-bit cache", "copy", Work(run, nbytes), nbytes)


def tiny_call(dtype: str) -> Callable[[], Any]:
    """Return a product with a 64 x 64 matrix, small enough that only the way to the kernel takes time."""
    scale_dtype = "bfloat16" if dtype == "bfloat16" else "float32"
    w = np.random.default_rng(1).standard_normal((64, 64), dtype=np.float32)
    codes, scales, biases = q.affine_quantize(w, 64, 4, scale_dtype=scale_dtype)
    x, out = as_dtype(w[0], dtype), np.zeros(64, np.float32 if dtype == "float32" else np.uint16)
    kernel = q.AffineQmv(64, 4)
    kernel.compile()
    if dtype == "bfloat16":
        return lambda: kernel(x, codes, scales, biases, out=out, input_dtype="bfloat16")
    return lambda: kernel(x, codes, scales, biases, out=out)
