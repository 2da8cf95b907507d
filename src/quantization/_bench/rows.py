"""Results as rows: what a table prints and JSON holds."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import _text
from .clock import LEAST_SHARE
from .sampling import Measurement, TooSlowError

SCHEMA = 2
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


@dataclass(frozen=True)
class Row:
    """One figure and its ceiling.

    ``rate`` is in ``unit``; ``ratio`` is the median of rates by the ceiling measured directly after; ``spread`` is half
    of what lies between the quartiles of those ratios. ``by_exact`` and ``by_alike``, in rows of other libraries: their
    time by that of our exact float32 product, and of our product of the same accuracy class, sampled in turn with them.
    ``error`` is relative, against float64. ``mode`` is that of weights in small floats, else empty. A row that could
    not be measured has a ``note`` instead of figures.
    """

    section: str
    implementation: str
    what: str
    accuracy: str
    isa: str
    threads: int
    shape: str = ""
    bits: int = 0
    m: int = 0
    memory: str = ""
    seconds: float = math.nan
    rate: float = math.nan
    unit: str = ""
    ceiling_name: str = ""
    ceiling: float = math.nan
    ratio: float = math.nan
    spread: float = math.nan
    by_exact: float = math.nan
    by_alike: float = math.nan
    error: float = math.nan
    mode: str = ""
    samples: int = 0
    retries: int = 0
    share: float = math.nan
    note: str = ""

    @property
    def stored(self) -> str:
        """The format of the weights, in a word: bits of affine codes, or the mode of small floats."""
        return self.mode or str(self.bits or "")

    @property
    def disturbed(self) -> str:
        """Whether a thread had to wait for a CPU, in a word."""
        return "disturbed" if self.samples and self.share < LEAST_SHARE else ""

    def with_measurement(self, measurement: Measurement, error: float = math.nan) -> Row:
        """Return the row with its figures; of rivals, the first was the exact one and the last the one alike."""
        figures = dataclasses.asdict(measurement)
        by = figures.pop("by") or (math.nan,)
        return dataclasses.replace(self, error=error, by_exact=by[0], by_alike=by[-1], **figures)

    def with_note(self, note: str) -> Row:
        """Return the row with the reason why it has no figures."""
        return dataclasses.replace(self, note=note)

    def measured(self, take: Callable[[], Measurement]) -> Row:
        """Return the row with the figures that are taken now, or the reason why there are none."""
        try:
            return self.with_measurement(take())
        except (TooSlowError, ImportError, MemoryError, RuntimeError, ValueError) as failure:
            return self.with_note(_text.first_line(failure)[:60])


def text_of_time(seconds: float) -> str:
    """Return a time in s, ms or µs; nothing for NaN."""
    if math.isnan(seconds):
        return ""
    size, unit = next((entry for entry in _UNITS if seconds >= entry[0]), _UNITS[-1])
    return f"{seconds / size:.3g} {unit}"


def _number(value: float, digits: str) -> str:
    return "" if math.isnan(value) else format(value, digits)


def times(factor: float) -> str:
    """Return how many times as long something takes."""
    return "" if math.isnan(factor) else f"{factor:.3g} x"


def _cells(row: Row) -> list[str]:
    rated = row.unit not in ("", "calls")
    return [
        row.implementation,
        row.what,
        row.accuracy,
        row.shape,
        row.stored,
        str(row.m or ""),
        row.memory,
        str(row.threads),
        text_of_time(row.seconds),
        f"{row.rate:.1f} {row.unit}" if rated else "",
        f"{row.ceiling_name} {row.ceiling:.1f}" if rated else "",
        f"{row.ratio:.2f} ±{row.spread:.2f}" if rated else "",
        times(row.by_exact),
        times(row.by_alike),
        _number(row.error, ".1e"),
        row.note or row.disturbed,
    ]


HEADER = ("library", "operation", "accuracy class", "N x K", "bits", "M", "weights", "threads", "time", "rate",
          "ceiling", "by ceiling", "by ours exact", "by ours alike", "error", "note")  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Return rows as text; columns that are empty throughout are left out."""
    cells = [_cells(row) for row in rows]
    kept = [i for i in range(len(HEADER)) if any(line[i] for line in cells)]
    lines = [[line[i] for i in kept] for line in cells]
    return _text.table([HEADER[i] for i in kept], lines, left=sum(i < 4 for i in kept))


def _plain(value: Any) -> Any:
    """JSON has no NaN: what was not measured is null."""
    return None if isinstance(value, float) and math.isnan(value) else value


def as_json(machine: dict[str, Any], rows: Iterable[Row], gates: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return everything as plain objects: the schema of ``--json``."""
    return {
        "schema": SCHEMA,
        "machine": machine,
        "rows": [{key: _plain(value) for key, value in dataclasses.asdict(row).items()} for row in rows],
        "gates": [{key: _plain(value) for key, value in gate.items()} for gate in gates],
    }


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write what `as_json` returned."""
    Path(path).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
