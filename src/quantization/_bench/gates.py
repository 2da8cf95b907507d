"""The gates: what a release must reach on the machine that it is run on. A format adds rows here, and nothing else.

Figures are ratios of interleaved samples wherever there is something to divide by: they hold on a machine whose clock
and memory are shared, where absolute figures do not. "must" and "stretch" come from prototypes of each kernel, measured
in the same way on a CPU with AVX-512 VNNI, and on the same CPU by AVX2 alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .ours import BF16, EXACT, F16, FLOAT, INT8, Variant
from .shapes import Shape

SQUARE, LONG = Shape(4096, 4096), Shape(4096, 14336)


class Product(NamedTuple):
    """A product of 4096 x 4096 weights in groups of 64, or what differs from it."""

    m: int = 1
    bits: int = 4
    variant: Variant = EXACT
    shape: Shape = SQUARE


class Gate(NamedTuple):
    """One line: which figure (a function of `figures`), on what, and its limits.

    ``must`` is None where nothing is asked on this instruction set and the figure is for the record. ``isa`` is empty
    where the best one counts. ``lower``: limits are upper ones.
    """

    name: str
    figure: str
    isa: str
    threads: int
    product: Product | None
    must: float | None
    stretch: float | None
    lower: bool = False


def _decode() -> Iterator[Gate]:
    """M = 1 by the speed of memory, weights cold."""
    for bits in (4, 5, 6, 8):
        for variant in (EXACT, BF16):
            yield Gate(f"decode {bits}-bit, {variant}", "roof", "avx512", 1, Product(1, bits, variant), 0.88, 0.95)
    yield Gate("decode 4-bit, K > 8k", "roof", "avx512", 1, Product(shape=LONG), 0.80, 0.90)
    for bits, must in ((2, 0.58), (3, 0.66)):
        yield Gate(f"decode {bits}-bit, {EXACT}", "roof", "avx512", 1, Product(1, bits), must, 0.85)
        yield Gate(f"decode {bits}-bit, {BF16}", "roof", "avx512", 1, Product(1, bits, BF16), 0.83, 0.93)
    yield Gate("decode 4-bit, accumulate=float", "roof", "avx512", 1, Product(variant=FLOAT), 0.72, 0.80)
    for bits in (4, 5, 6, 8):
        yield Gate(f"decode {bits}-bit, {EXACT}", "roof", "avx512", 2, Product(1, bits), 0.92, 1.0)
    for variant, must, stretch in ((FLOAT, 0.42, 0.50), (EXACT, 0.52, 0.65), (BF16, 0.70, 0.80), (INT8, 0.88, 0.95)):
        yield Gate(f"decode 4-bit, {variant}", "roof", "avx2", 1, Product(variant=variant), must, stretch)
    for bits in (2, 3, 5, 6, 8):
        yield Gate(f"decode {bits}-bit, {EXACT}", "roof", "avx2", 1, Product(1, bits), None, None)
    yield Gate("decode 4-bit, K > 8k", "roof", "avx2", 1, Product(shape=LONG), None, None)
    yield Gate("decode 4-bit, float32", "roof", "avx2", 2, Product(), None, None)


def _flat() -> Iterator[Gate]:
    """Time of M rows by that of one, the weights cold: decoding a weight once serves all rows.

    The limit is 1.15 * max(reading, P * 2 M N K / dot peak) over reading, with P = 3 digit planes for float32 x and 2
    for 16 bits: where memory gives 43 GB/s and the dots 1100 Gop/s, reading a weight of 4.5 bits takes 13.1 ps and a
    row's share of dots 1.8 P ps. Only M = 4 in float32 is beyond reading: 21.8 / 13.1 * 1.15 = 1.9.
    """
    for isa in ("avx512", "avx2"):
        for variant in (EXACT, BF16):
            for m in (2, 3, 4):
                must = 1.9 if variant == EXACT and m == 4 else 1.15
                limits = (must, must / 1.15) if isa == "avx512" else (None, None)
                name = f"time(M={m}) / time(1), {variant}"
                yield Gate(name, "flat", isa, 1, Product(m, 4, variant), limits[0], limits[1], lower=True)


def _prefill() -> Iterator[Gate]:
    """M >= 14 by the FMA peak; then by the best float32 product of dense weights; then two threads by one."""
    limits = {FLOAT: (0.88, 0.97), EXACT: (1.08, 1.3), F16: (1.5, 1.8), BF16: (1.5, 1.8), INT8: (2.5, 3.2)}
    few = {FLOAT: (0.65, 0.8), INT8: (1.6, 2.2)}
    for isa in ("avx512", "avx2"):
        required = isa == "avx512"
        for m, table in ((14, few), (128, limits), (512, limits)):
            for variant, (must, stretch) in table.items():
                asked = (must, stretch) if required else (None, None)
                yield Gate(f"prefill M={m}, {variant}", "roof", isa, 1, Product(m, 4, variant), *asked)
        for m, must, stretch in ((128, 1.2, 1.5), (512, 1.0, 1.25)):
            asked = (must, stretch) if required else (None, None)
            yield Gate(f"prefill M={m} / OpenBLAS sgemm", "blas", isa, 1, Product(m), *asked)
        asked = (1.85, 1.97) if required else (None, None)
        yield Gate("prefill M=128, 2 threads / 1", "scaling", isa, 2, Product(128), *asked)


def _others() -> Iterator[Gate]:
    yield Gate("4096x4096 in L3, µs", "microseconds", "avx512", 1, Product(), 210, 160, True)
    yield Gate("4096x4096 in L3, µs", "microseconds", "avx2", 1, Product(), None, None, True)
    for threads in (1, 2):
        yield Gate("fake quantize / NT copy", "fake_quantize_memory", "", threads, None, 0.85, 0.95)
    yield Gate("fake quantize / memcpy in L2", "fake_quantize_cache", "", 1, None, 0.45, 0.65)
    for m, must in ((1, 40.0), (128, 70.0)):
        yield Gate(f"MLX float32 / ours, M={m}", "mlx", "", 1, Product(m), must, None)
    for threads in (1, 2):
        yield Gate("scratch, MiB a thread, M=512", "scratch", "", threads, Product(512), 4.0, None, True)
    yield Gate("call 64x64 float32, out=, µs", "call_float32", "", 1, None, 1.5, None, True)
    yield Gate("call 64x64 bfloat16, out=, µs", "call_bfloat16", "", 1, None, 2.5, None, True)


GATES: tuple[Gate, ...] = (*_decode(), *_flat(), *_prefill(), *_others())


def verdict(gate: Gate, figure: float) -> str:
    """Return "ok", "MISSED", or "no gate" where nothing is asked."""
    if gate.must is None:
        return "no gate"
    return "ok" if (figure <= gate.must if gate.lower else figure >= gate.must) else "MISSED"
