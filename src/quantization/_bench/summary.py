"""The products in short: ours beside the fastest other library of the same accuracy class."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from .. import _text
from .ours import ALIKE, Variant
from .rows import Row, text_of_time, times

HEADER = (
    "accuracy class",
    "N x K",
    "bits",
    "M",
    "threads",
    "ours",
    "by ceiling",
    "error",
    "fastest other",
    "its time",
    "by ours alike",
    "by ours exact",
    "its error",
    "note",
)


def _own(rows: Sequence[Row], variant: Variant) -> Iterator[Row]:
    """Yield our x @ W.T of a variant with cold weights, as far as it was measured."""
    names = {f"qmv {variant}", f"qmm_t {variant}"}
    for row in rows:
        name = row.what.partition("_")[2]
        if row.implementation == "quantization" and name in names and row.memory != "hot" and not row.note:
            yield row


def _others(rows: Sequence[Row], own: Row, accuracy: str) -> list[Row]:
    """Return other libraries' rows for the same product, fastest first by what was sampled in turn with ours."""

    def key(row: Row) -> tuple[object, ...]:
        return row.shape, row.stored, row.m, row.threads

    same = [row for row in rows if not math.isnan(row.by_alike) and row.accuracy == accuracy and key(row) == key(own)]
    return sorted(same, key=lambda row: row.by_alike)


def _cells(own: Row, accuracy: str, others: list[Row]) -> list[str]:
    cells = [accuracy, own.shape, own.stored, str(own.m), str(own.threads), text_of_time(own.seconds)]
    cells += [f"{own.ceiling_name} {own.ratio:.2f}", f"{own.error:.1e}"]
    if not others:
        return [*cells, "none measured", "", "", "", "", own.disturbed]
    best = others[0]
    cells += [best.implementation, text_of_time(best.seconds), times(best.by_alike), times(best.by_exact)]
    return [*cells, f"{best.error:.1e}", own.disturbed or best.disturbed]


def table(rows: Sequence[Row]) -> str:
    """Return one line for each accuracy class, matrix, number of threads and M."""
    matmuls = [row for row in rows if row.section == "matmul"]
    lines = [
        _cells(own, accuracy, _others(matmuls, own, accuracy))
        for accuracy, variant in ALIKE.items()
        for own in _own(matmuls, variant)
    ]
    return _text.table(HEADER, lines, left=2) if lines else ""
