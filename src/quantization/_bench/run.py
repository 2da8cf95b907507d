"""The program: what is asked for, measured and printed as it comes."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from .. import _text, get_num_threads
from . import ceilings, elementwise, figures, machine, matmuls, plot
from . import shapes as known
from .gates import GATES, Gate
from .rows import Row, as_json, table, write_json
from .sampling import FULL, QUICK, Effort, Work, measure

TABLES = ("matmul", "elementwise", "calls")
LEGEND = """\
figure: GB/s of codes, scales and biases at M <= 2, else GFLOP/s (2MNK); peers' too, whatever their own format holds.
ceiling: measured directly after each sample with the same threads: read = reading the same bytes, fma = float32 FMA
peak, stream = non-temporal copy, copy = memcpy (both read + written). x ceiling: median ± half the quartiles' distance.
error: |y - y64| / |y64|. cold: copies of the weights that no cache holds, in turn; hot: one copy."""


@dataclass(frozen=True)
class Options:
    """What to measure.

    ``peers`` are words that peers' names contain, None for all of them; ``only`` is part of a gate's name.
    """

    shapes: tuple[known.Shape, ...] = known.MODELS["square"]
    bits: tuple[int, ...] = (4,)
    rows: tuple[int, ...] = known.QUICK_ROWS
    threads: tuple[int, ...] = (1,)
    isa: str = dataclasses.field(default_factory=machine.default_isa)
    tables: tuple[str, ...] = TABLES
    peers: list[str] | None = None
    full: bool = False
    only: str = ""

    @property
    def effort(self) -> Effort:
        """How long to sample."""
        return FULL if self.full else QUICK


def ceiling_rows(options: Options) -> Iterator[Row]:
    """Yield the ceilings alone; each is measured again beside every kernel."""
    memory = ceilings.aligned(max(256 << 20, machine.last_level_cache() * 4))
    for threads in options.threads:
        found = [
            ceilings.reading(lambda count: [memory] * count, options.isa, threads),
            ceilings.copying("copy", memory.nbytes, options.isa, threads),
            ceilings.copying("stream", memory.nbytes, options.isa, threads),
            ceilings.arithmetic("fma", options.isa, threads),
            ceilings.arithmetic("dot", options.isa, threads),
        ]
        for ceiling in found:
            own = Work(ceiling.run, ceiling.run(1))
            result = measure(own, ceiling, options.effort)
            dot = f" ({machine.dot_name(options.isa)})" if ceiling.name == "dot" else ""
            row = Row("ceilings", ceiling.name + dot, "", "", options.isa, threads)
            yield row.with_measurement(dataclasses.replace(result, ceiling_name="itself"))


def _print_table(out: TextIO, title: str, rows: Sequence[Row]) -> None:
    out.write(f"\n{title}\n\n{table(rows)}\n")
    out.flush()


def _print_machine(out: TextIO, found: dict[str, Any], options: Options) -> None:
    sizes = ", ".join(f"{level} {size >> 10} KiB" for level, size in found["caches"].items())
    isas = ", ".join(f"{name} ({dot})" for name, dot in found["isas"].items())
    out.write(f"{found['cpu']}, {found['cpus']} CPUs; {sizes}\n")
    out.write(f"instruction sets {isas}; measured: {options.isa}\n")
    out.write(", ".join(f"{name} {version}" for name, version in found["versions"].items()) + "\n")
    if found["openblas_coretype"]:
        out.write(f"OPENBLAS_CORETYPE={found['openblas_coretype']}\n")


def _gate_cells(line: dict[str, Any]) -> list[str]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.3g}"

    sign = "<= " if line["lower"] else ">= "
    limits = [sign + number(line[key]) if line[key] is not None else "" for key in ("must", "stretch")]
    spread = f" ±{line['spread']:.2g}" if line["spread"] else ""
    figure = number(line["figure"]) + spread
    return [line["gate"], line["isa"], str(line["threads"]), figure, *limits, line["verdict"], line["measured"]]


def chosen_gates(only: str) -> tuple[Gate, ...]:
    """Return the gates whose name, instruction set or both contain a text."""
    return tuple(gate for gate in GATES if only.lower() in f"{gate.isa} {gate.name}".lower())


def print_gates(out: TextIO, lines: Sequence[dict[str, Any]]) -> None:
    """Print one line for each gate, and how many were met."""
    header = ["gate", "ISA", "threads", "figure", "must", "stretch", "verdict", "measured"]
    out.write(f"\n{_text.table(header, [_gate_cells(line) for line in lines], left=2)}\n")
    met, missed = (sum(line["verdict"].startswith(word) for line in lines) for word in ("ok", "MISSED"))
    out.write(f"\n{met} ok, {missed} missed, {len(lines) - met - missed} without a verdict\n")
    out.flush()


def tables(out: TextIO, options: Options) -> list[Row]:
    """Print the tables as they are measured and return their rows."""
    rows = list(ceiling_rows(options))
    _print_table(out, "ceilings", rows)
    if "matmul" in options.tables:
        found = list(matmuls.rows(options, options.effort))
        _print_table(out, "matmul", found)
        rows += found
    if "elementwise" in options.tables:
        found = list(elementwise.rows(options, options.effort))
        _print_table(out, "quantize, dequantize, convert, fake quantize", found)
        rows += found
    if "calls" in options.tables:
        found = list(elementwise.tiny_rows(options, options.effort))
        _print_table(out, "small calls", found)
        rows += found
    out.write(f"\n{LEGEND}\n")
    return rows


def options_of(arguments: argparse.Namespace) -> Options:
    """Return the options that a command line stands for."""
    most = get_num_threads()
    names = None if arguments.peers is None else [word for word in arguments.peers.split(",") if word]
    return Options(
        shapes=known.parse(arguments.shapes),
        bits=tuple(arguments.bits or ((2, 3, 4, 5, 6, 8) if arguments.full else (4,))),
        rows=tuple(arguments.rows or (known.ROWS if arguments.full else known.QUICK_ROWS)),
        threads=tuple(arguments.threads or dict.fromkeys((1, most))),
        isa=arguments.isa or machine.default_isa(),
        tables=tuple(arguments.table or TABLES),
        peers=names,
        full=arguments.full,
        only=arguments.only,
    )


def run(out: TextIO, options: Options, *, gates: bool, json: str | None, picture: str | None) -> bool:
    """Measure, print, and write what is asked for; return whether every gate that has a figure is met."""
    found = machine.describe()
    _print_machine(out, found, options)
    lines: list[dict[str, Any]] = []
    rows: list[Row] = []
    if gates:
        lines = list(figures.take_all(chosen_gates(options.only), options.effort))
        print_gates(out, lines)
    else:
        rows = tables(out, options)
    if json:
        write_json(json, as_json(found, rows, lines))
    if picture:
        plot.draw(picture, rows)
    return not any(line["verdict"].startswith("MISSED") for line in lines)


def _positive(text: str) -> list[int]:
    numbers = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers such as 1 or 1,2, got {text!r}")
    return numbers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``python -m quantization bench``."""
    parser.add_argument("--full", action="store_true", help="every width and type, and longer samples")
    parser.add_argument("--shapes", default="square", metavar="NAME,…", help=f"NxK, or {', '.join(known.MODELS)}")
    parser.add_argument("--bits", type=_positive, metavar="N,…", help="widths (default: 4)")
    parser.add_argument("--rows", type=_positive, metavar="M,…", help="rows of x (default: 1, 4, 16, 128)")
    parser.add_argument("--threads", type=_positive, metavar="N,…", help="numbers of threads (default: 1 and all)")
    parser.add_argument("--isa", choices=machine.isas(), help="instruction set of the tables (default: the best)")
    parser.add_argument("--table", action="append", choices=TABLES, help="only this table; may be given several times")
    parser.add_argument("--peers", metavar="NAME,…", help="only peers with such names; '' for none")
    parser.add_argument("--gates", action="store_true", help="one line for each gate instead of the tables")
    parser.add_argument("--only", default="", metavar="TEXT", help="only gates whose name or ISA contains it")
    parser.add_argument("--strict", action="store_true", help="exit status 1 if a gate is missed")
    parser.add_argument("--json", metavar="FILE", help="also write every row, the machine and the versions")
    parser.add_argument("--plot", metavar="FILE", help="also draw the products (.png, .svg, .pdf)")
