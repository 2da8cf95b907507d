"""The tables as a picture: every product's share of its ceiling over M."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from .._extras import require
from .rows import Row


def lines_of(rows: Sequence[Row]) -> dict[str, list[tuple[int, float]]]:
    """Return a label and the points of each product; the vector's function and the matrix's are one product."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row.m > 2 or row.memory != "hot":
            what = re.sub(r"^\w+_(qmv|qmm_t) ", "x @ W.T, ", row.what)
            label = f"{row.implementation} {what}, {row.shape}, {row.mode or f'{row.bits} bits'}"
            lines.setdefault(label, []).append((row.m, row.ratio))
    return lines


def draw(path: str | Path, rows: Sequence[Row]) -> None:
    """Write a picture of the matmul rows, one panel for each number of threads; needs matplotlib."""
    require("matplotlib", "plot")
    figures = require("matplotlib.figure", "plot")
    shown = [row for row in rows if row.section == "matmul" and not math.isnan(row.ratio) and row.memory]
    threads = sorted({row.threads for row in shown}) or [1]
    figure = figures.Figure(figsize=(7 * len(threads), 5), layout="constrained")
    panels = figure.subplots(1, len(threads), squeeze=False, sharey=True)[0]
    for axes, count in zip(panels, threads, strict=True):
        lines = lines_of([row for row in shown if row.threads == count])
        for label, points in lines.items():
            style = "-" if label.startswith("quantization") else "--"
            axes.plot(*zip(*sorted(points), strict=True), style, marker=".", label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(f"rows of x (M), {count} thread{'s' * (count > 1)}")
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.grid(alpha=0.3)
        if lines:
            axes.legend(fontsize=6)
    panels[0].set_ylabel("rate by ceiling: memory read at M ≤ 2, FMA peak beyond")
    figure.savefig(path)
