"""Every format's vector product in short: what a weight takes, and how fast it is read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from .. import _text
from . import matmuls, ours
from .ours import Variant
from .rows import Row, text_of_time
from .sampling import Effort
from .shapes import MODELS
from .stored import EVERY, Stored, format_of

SHAPE = MODELS["square"][0]
HEADER = ("format", "bits a weight", "threads", "time", "GB/s", "10^9 weights/s", "by read", "bfloat16 x", "note")


def _stored(row: Row) -> Stored:
    return row.mode or row.bits


def rows(options: Any, effort: Effort) -> Iterator[Row]:
    """Yield the product of one row of float32 x, and of one of bfloat16 x, with cold weights of every format."""
    for threads in options.threads:
        for stored in EVERY:
            op = ours.product_name(stored, 1)
            for variant in (ours.EXACT, ours.BF16):
                row = matmuls.our_row(op, SHAPE, stored, 1, variant, options.isa, threads, True, effort)
                yield dataclasses.replace(row, section="formats")


def _of(row: Row, variant: Variant) -> bool:
    return bool(re.fullmatch(rf"\w+_qmv {variant}", row.what))


def _cells(row: Row, halves: Row) -> list[str]:
    form = format_of(_stored(row))
    cells = [str(form), f"{form.bits_per_weight:g}", str(row.threads)]
    if row.note:
        return [*cells, "", "", "", "", "", row.note]
    weights = SHAPE.n * SHAPE.k / row.seconds / 1e9
    cells += [text_of_time(row.seconds), f"{row.rate:.1f}", f"{weights:.1f}", f"{row.ratio:.2f}"]
    return [*cells, "" if halves.note else f"{halves.ratio:.2f}", row.disturbed or halves.disturbed]


def table(found: Sequence[Row]) -> str:
    """Return a line for each format and number of threads: float32 x, and by what part of reading bfloat16 x is."""
    exact, halves = ([row for row in found if _of(row, variant)] for variant in (ours.EXACT, ours.BF16))
    return _text.table(HEADER, [_cells(*pair) for pair in zip(exact, halves, strict=True)], left=1)
