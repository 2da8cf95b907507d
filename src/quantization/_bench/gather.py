"""Products with experts: rows of x that choose 8 of 64 weight matrices, in one call and by a call for each expert."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import ceilings, ours
from .ceilings import Ceiling
from .ours import Variant, settings
from .rows import Row
from .sampling import Effort, Measurement, Work, measure
from .shapes import MODELS, Shape
from .weights import Weights

CHOSEN, EXPERTS = 8, 64
EXPERT = MODELS["olmoe-1b-7b-expert"][0]
ROWS = (1, 64)
"""Rows of x: one, as in decode, each expert's for it alone; and so many that experts have several."""

OP = "affine_gather_qmm_rhs"


class Experts:
    """Banks of 64 experts that together are in no cache, and rows of x, each of which chooses 8 of one bank.

    Attributes
    ----------
    turns : list of (int, numpy.ndarray)
        What is chosen one after the other: a bank, and indices of shape (m, 8) into it. A single row's choices name
        every expert once before they name one again.
    """

    def __init__(self, shape: Shape, bits: int, m: int, variant: Variant) -> None:
        self.weights = _weights(shape, bits, ours.scale_dtype_for(variant))
        self.variant, self.m = variant, m
        firsts = range(0, self.weights.copies, EXPERTS)
        self.banks = {first: self.weights.stacked(first, EXPERTS) for first in firsts}
        rng = np.random.default_rng(5)
        orders = rng.permuted(np.tile(np.arange(EXPERTS), (m, 1)), axis=1).reshape(m, -1, CHOSEN)
        self.turns = [(first, orders[:, i]) for i in range(orders.shape[1]) for first in firsts]
        same = variant.dtype == self.weights.scale_dtype
        dtype = {"bfloat16": "uint16"}.get(variant.dtype, variant.dtype) if same else "float32"
        self.out = np.zeros((m, CHOSEN, shape.n), dtype)

    @property
    def nbytes(self) -> float:
        """Of what one row chooses."""
        return float(CHOSEN * self.weights.nbytes)

    @property
    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"group_size": self.weights.group_size, "bits": self.weights.bits}
        options |= {"accumulate": self.variant.accumulate, "activations": self.variant.activations}
        return options | ({"input_dtype": "bfloat16"} if self.variant.dtype == "bfloat16" else {})

    def gathered(self) -> Callable[[int], None]:
        """Return the product by one call."""
        kernel, options, turns = ours.KERNELS[OP](), self._options, itertools.cycle(self.turns)
        x = self.weights.x(self.m, self.variant.dtype)[:, None]

        def call() -> None:
            first, chosen = next(turns)
            kernel(x, *self.banks[first], chosen, **options, out=self.out)

        return ours.repeat(call)

    def separate(self) -> Callable[[int], None]:
        """Return the same by a call for each expert that is chosen, with the rows that chose it."""
        kernel, options = ours.KERNELS["affine_qmv" if self.m == 1 else "affine_qmm_t"](), self._options
        turns, x = itertools.cycle(self.turns), self.weights.x(self.m, self.variant.dtype)

        def call() -> None:
            first, chosen = next(turns)
            if self.m == 1:
                for place, expert in enumerate(chosen[0]):
                    kernel(x, *self.weights.parts[first + expert], **options, out=self.out[:, place])
                return
            for expert in np.unique(chosen):
                rows, places = np.nonzero(chosen == expert)
                self.out[rows, places] = kernel(x[rows], *self.weights.parts[first + expert], **options)

        return ours.repeat(call)

    def ceiling(self, isa: str, threads: int) -> tuple[Ceiling, float]:
        """Return the ceiling, and what a call counts for: reading what one row chooses, or the multiplications."""
        if self.m > 1:
            shape = self.weights.shape
            return ceilings.arithmetic("fma", isa, threads), 2.0 * self.m * CHOSEN * shape.n * shape.k
        turns = itertools.cycle(self.turns)

        def spans(count: int) -> list[np.ndarray]:
            chosen = (next(turns) for _ in range(count))
            return [self.weights.span(first + expert) for first, experts in chosen for expert in experts[0]]

        return ceilings.reading(spans, isa, threads), self.nbytes

    def error(self) -> float:
        """Return the relative error of `out`, whose experts are all alike."""
        dtype = "bfloat16" if self.out.dtype == np.uint16 else str(self.out.dtype)
        return self.weights.error(self.out[:, 0], dtype, self.variant.dtype)


def _new_weights(shape: Shape, bits: int, scale_dtype: str) -> Weights:
    return Weights(shape, bits, scale_dtype=scale_dtype, multiple=EXPERTS)


_weights = functools.lru_cache(maxsize=1)(_new_weights)


def _rows_of(m: int, variant: Variant, isa: str, threads: int, effort: Effort) -> Iterator[Row]:
    text = f"{variant}, {CHOSEN} of {EXPERTS} experts"
    row = Row("gather", "quantization", f"{OP} {text}", variant.accuracy, isa, threads, str(EXPERT), 4, m, "cold")
    for is_gathered in (True, False):
        error = [math.nan]

        def take(is_gathered: bool = is_gathered, error: list[float] = error) -> Measurement:
            effort.check()
            experts = Experts(EXPERT, 4, m, variant)
            ceiling, amount = experts.ceiling(isa, threads)
            calls = [experts.gathered(), experts.separate()]
            first, *others = calls if is_gathered else calls[::-1]
            result = measure(Work(first, amount), ceiling, effort, [] if is_gathered else others)
            error[0] = experts.error()
            return result

        with settings(isa, threads):
            yield dataclasses.replace(row.measured(take), error=error[0])
        row = dataclasses.replace(row, what=f"{'affine_qmv' if m == 1 else 'affine_qmm_t'} {text}, a call for each")


def rows(options: Any, effort: Effort) -> Iterator[Row]:
    """Yield the rows of the table of experts: the product by one call, and by one for each expert in turn with it."""
    variants = (ours.EXACT, ours.BF16) if options.full else (ours.EXACT,)
    for threads, m, variant in itertools.product(options.threads, ROWS, variants):
        yield from _rows_of(m, variant, options.isa, threads, effort)
