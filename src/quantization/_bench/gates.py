"""The gates: what a release must reach on the machine that it is run on. A format adds rows here, and nothing else.

Figures are ratios of interleaved samples wherever there is something to divide by: they hold on a machine whose clock
and memory are shared, where absolute figures do not. "must" and "stretch" come from trials of the inner loop of
each kernel, measured in the same way on a CPU with AVX-512 VNNI, and on the same CPU by AVX2 alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .ours import BF16, EXACT, F16, FLOAT, INT8, Variant, product_name
from .shapes import MODELS, Shape
from .stored import Stored

SQUARE, LONG = Shape(4096, 4096), Shape(4096, 14336)


class Product(NamedTuple):
    """A product of 4096 x 4096 affine weights in groups of 64, or what differs from it; ``op`` empty: as M asks for.

    ``bits`` names small floats by their mode.
    """

    m: int = 1
    bits: Stored = 4
    variant: Variant = EXACT
    shape: Shape = SQUARE
    op: str = ""

    @property
    def operation(self) -> str:
        """The function to call."""
        return self.op or product_name(self.bits, self.m)


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

    accuracy_of_others: str = ""

    @property
    def accuracy(self) -> str:
        """The accuracy class of what is measured."""
        return self.product.variant.accuracy if self.product else self.accuracy_of_others


def _decode() -> Iterator[Gate]:
    """M = 1 by the speed of memory, weights cold."""
    for bits in (4, 5, 6, 8):
        for variant in (EXACT, BF16):
            yield Gate(f"decode {bits}-bit, {variant}", "roof", "avx512", 1, Product(1, bits, variant), 0.88, 0.95)
            name = f"decode {bits}-bit, K > 8k, {variant}"
            yield Gate(name, "roof", "avx512", 1, Product(1, bits, variant, LONG), 0.80, 0.90)
    for bits, must in ((2, 0.58), (3, 0.66)):
        yield Gate(f"decode {bits}-bit, {EXACT}", "roof", "avx512", 1, Product(1, bits), must, 0.85)
        for variant in (F16, BF16):
            yield Gate(f"decode {bits}-bit, {variant}", "roof", "avx512", 1, Product(1, bits, variant), 0.83, 0.93)
    yield Gate(f"decode 4-bit, {FLOAT}", "roof", "avx512", 1, Product(variant=FLOAT), 0.72, 0.80)
    for bits in (4, 5, 6, 8):
        yield Gate(f"decode {bits}-bit, {EXACT}", "roof", "avx512", 2, Product(1, bits), 0.92, 1.0)
    for variant, must, stretch in ((FLOAT, 0.42, 0.50), (EXACT, 0.52, 0.65), (BF16, 0.70, 0.80), (INT8, 0.88, 0.95)):
        yield Gate(f"decode 4-bit, {variant}", "roof", "avx2", 1, Product(variant=variant), must, stretch)
    for bits in (2, 3, 5, 6, 8):
        yield Gate(f"decode {bits}-bit, {EXACT}", "roof", "avx2", 1, Product(1, bits), None, None)
    yield Gate(f"decode 4-bit, K > 8k, {EXACT}", "roof", "avx2", 1, Product(shape=LONG), None, None)
    yield Gate(f"decode 4-bit, {EXACT}", "roof", "avx2", 2, Product(), None, None)


def _small_floats() -> Iterator[Gate]:
    """mxfp4 and nvfp4 by the limits of affine codes of 4 bits, mxfp8 by those of 8.

    mxfp8's products are float32 multiplications, which cannot pass the peak that their prefill is divided by: its gates
    show what integers would gain.
    """
    none = (None, None)
    for mode in ("mxfp4", "nvfp4", "mxfp8"):
        for variant, limits, slower in ((EXACT, (1.08, 1.3), (0.52, 0.65)), (BF16, (1.5, 1.8), (0.70, 0.80))):
            yield Gate(f"decode {mode}, {variant}", "roof", "avx512", 1, Product(1, mode, variant), 0.88, 0.95)
            name = f"decode {mode}, K > 8k, {variant}"
            yield Gate(name, "roof", "avx512", 1, Product(1, mode, variant, LONG), 0.80, 0.90)
            asked = none if mode == "mxfp8" else slower
            yield Gate(f"decode {mode}, {variant}", "roof", "avx2", 1, Product(1, mode, variant), *asked)
            for m in (128, 512):
                name = f"prefill {mode}, M={m}, {variant}"
                yield Gate(name, "roof", "avx512", 1, Product(m, mode, variant), *limits)
                yield Gate(name, "roof", "avx2", 1, Product(m, mode, variant), *none)
        yield Gate(f"decode {mode}, {EXACT}", "roof", "avx512", 2, Product(1, mode), 0.92, 1.0)


def _few() -> Iterator[Gate]:
    """M = 1 to 16 by what bounds them: the reading of the weights, or P dots for each weight and row at the dot peak.

    P is the number of digit planes of x, 3 for float32 and 2 for 16 bits. Where the first bounds, time does not grow
    with M, since a weight is decoded once for all rows.
    """
    for isa in ("avx512", "avx2"):
        must, stretch = (1.15, 1.0) if isa == "avx512" else (None, None)
        for variant in (EXACT, BF16):
            for m in (2, 3, 4, 8, 16):
                name = f"M={m}, time / max(read, dots), {variant}"
                yield Gate(name, "bound", isa, 1, Product(m, 4, variant), must, stretch, True)


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
            yield Gate(f"prefill M={m}, {EXACT} / best sgemm", "blas", isa, 1, Product(m), *asked)
        asked = (1.85, 1.97) if required else (None, None)
        yield Gate(f"prefill M=128, {EXACT}, 2 threads / 1", "scaling", isa, 2, Product(128), *asked)


def _gather() -> Iterator[Gate]:
    """One row of x and 8 of 64 experts: by reading those, and by the time of a call for each of them."""
    product = Product(shape=MODELS["olmoe-1b-7b-expert"][0], op="affine_gather_qmm_rhs")
    for isa, must, stretch in (("avx512", 0.80, 0.90), ("avx2", 0.45, 0.52)):
        for threads in (1, 2):
            name = f"gather 8 of 64 experts 1024x2048, {EXACT}"
            yield Gate(name, "gather_roof", isa, threads, product, must, stretch)
            yield Gate(f"{name}, 8 calls of affine_qmv / one", "gather_calls", isa, threads, product, 0.97, 1.03)


def _attention() -> Iterator[Gate]:
    """One query a head over 32768 positions of 4 bits: by reading them, and for a group of 8 by the FMA peak."""
    name, accuracy = "attention 4-bit, 32K positions", "4-bit cache"
    for isa, must, stretch, of_groups in (("avx512", 0.6, 0.8, 0.5), ("avx2", None, None, None)):
        for threads in (1, 2):
            yield Gate(name, "attention_read", isa, threads, None, must, stretch, False, accuracy)
            yield Gate(f"{name}, groups of 8", "attention_fma", isa, threads, None, of_groups, None, False, accuracy)


def _memory() -> Iterator[Gate]:
    """Memory that products take beyond their arguments, each way through them: no dequantized matrix is among it.

    The limit is 4 MiB a thread and the planes of x, a byte for each digit, or the float32 that x stands for.
    """
    for m, variant, op in ((1, EXACT, "affine_qmv"), (1, EXACT, "affine_qvm"), (512, EXACT, "affine_qmm_t"),
                           (512, EXACT, "affine_qmm_n"), (512, BF16, "affine_qmm_t"), (512, INT8, "affine_qmm_t"),
                           (512, FLOAT, "affine_qmm_t"), (512, EXACT, "affine_gather_qmm_rhs"),
                           (1, EXACT, "mxfp8_qmv"), (512, EXACT, "mxfp8_qmm_t"), (512, EXACT, "mxfp8_qmm_n"),
                           (512, EXACT, "nvfp4_qmm_t")):  # fmt: skip
        product = Product(m, 4, variant, op=op)
        planes = (4 if variant == FLOAT or "mxfp8" in op else variant.planes) * m * product.shape.k / 2**20
        for threads in (1, 2):
            name = f"scratch, MiB a thread, {op}, M={m}, {variant}"
            yield Gate(name, "scratch", "", threads, product, 4.0 + planes / threads, None, True)


def _others() -> Iterator[Gate]:
    yield Gate(f"decode 4-bit, {EXACT}, 4096x4096 in L3, µs", "microseconds", "avx512", 1, Product(), 210, 160, True)
    yield Gate(f"decode 4-bit, {EXACT}, 4096x4096 in L3, µs", "microseconds", "avx2", 1, Product(), None, None, True)
    for threads in (1, 2):
        yield Gate("fake quantize / NT copy", "fake_quantize_memory", "", threads, None, 0.85, 0.95, False, "exact f32")
    yield Gate("fake quantize / memcpy in L2", "fake_quantize_cache", "", 1, None, 0.45, 0.65, False, "exact f32")
    for isa, must, stretch in (("avx512", 30.0, 16.0), ("avx2", None, None)):
        name = "KV cache, encode 4-bit, ns a vector of 128"
        yield Gate(name, "kv_encode", isa, 1, None, must, stretch, True, "4-bit cache")
    for m, must in ((1, 40.0), (128, 70.0)):
        yield Gate(f"MLX float32 / ours, M={m}", "mlx", "", 1, Product(m), must, None)
    for variant, must in ((EXACT, 1.5), (BF16, 2.5)):
        name = f"call 64x64 {variant}, out=, µs"
        yield Gate(name, f"call_{variant.dtype}", "", 1, None, must, None, True, variant.accuracy)


GATES: tuple[Gate, ...] = (
    *_decode(),
    *_few(),
    *_prefill(),
    *_small_floats(),
    *_gather(),
    *_attention(),
    *_others(),
    *_memory(),
)
VERDICTS = ("met", "missed", "no limit", "not run")


def verdict(gate: Gate, figure: float) -> str:
    """Return "met", with a word if "stretch" is met too, "missed", or "no limit" where nothing is asked."""

    def within(limit: float) -> bool:
        return figure <= limit if gate.lower else figure >= limit

    if gate.must is None:
        return "no limit"
    if gate.stretch is not None and within(gate.stretch):
        return "met, stretch too"
    return "met" if within(gate.must) else "missed"
