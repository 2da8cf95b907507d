"""The program: what is asked for, measured and printed as it comes."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from .. import _text, get_num_threads
from .._extras import require
from .._formats import known_formats
from . import attention, ceilings, elementwise, figures, formats, gather, machine, matmuls, plot, summary
from . import shapes as known
from .gates import GATES, VERDICTS, Gate
from .rows import Row, as_json, table, write_json
from .sampling import FULL, QUICK, Effort, Work, measure
from .stored import EVERY, SMALL_FLOATS, Stored
from .stored import parse as parse_formats

TABLES = ("matmul", "gather", "attention", "elementwise", "calls")
ASKED_TABLES = ("formats",)
"""Tables that are printed only where they are asked for."""
SUMMARY_TITLE = "products in short"
GATHER_TITLE = "products with experts"
ATTENTION_TITLE = "attention of one query a head: heads x positions x dimension; M: query heads to a head of the cache"
ELEMENTWISE_TITLE = "quantize, dequantize, convert, fake quantize"
FORMATS_TITLE = "every format"
LEGEND = """\
accuracy class: exact f32 = float32 x, sums at least as exact as float32's; exact, bfloat16 x = only x and y have 16
bits; bf16 = that or coarser sums; int8 activations = x rounded to 8 bits. A library that could round x on this CPU
but by its error does not is among exact f32. attention: 4-bit cache, float16 cache = keys and values rounded to that
(torch's queries and results to float16 too), products and sums no coarser; exact f32 = all float32.
rate: GB/s of codes, scales and biases at M <= 2, else GFLOP/s (2MNK); others' too, whatever their own format holds.
attention: GB/s of packed bytes for one query to a head, else GFLOP/s of two products; weights: bytes of the cache;
by ours exact: their time by that of ours, which reads 4 bits; error: against float64 attention to what was packed.
ceiling: measured directly after each sample with the same threads: read = reading the same bytes, fma = float32 FMA
peak, stream = non-temporal copy, copy = memcpy (both read + written). by ceiling: median ± half the quartiles' range.
by ours exact, by ours alike: the time by that of our float32 product, and of ours in the same accuracy class (bf16:
bfloat16 x), sampled in turn: above 1, ours is faster. error: |y - y64| / |y64|, y64 from the same stored weights.
cold: copies of the weights that no cache holds, in turn; hot: one copy; disturbed: threads had to wait for a CPU."""
AFFINE_WIDTHS = {form.bits for form in known_formats() if form.mode == "affine"}
MINUTES = 3.5
"""How long the tables may take, but for `--full` or as `--minutes` says."""


@dataclass(frozen=True)
class Options:
    """What to measure.

    ``matrices`` are shapes with their formats; ``peers`` words that peers' names contain, None for all of them;
    ``only`` part of a gate's name; ``deadline`` a time of `time.monotonic` after which nothing is begun.
    """

    matrices: tuple[tuple[known.Shape, Stored], ...] = ((known.MODELS["square"][0], 4),)
    rows: tuple[int, ...] = known.QUICK_ROWS
    threads: tuple[int, ...] = (1,)
    isa: str = dataclasses.field(default_factory=machine.default_isa)
    tables: tuple[str, ...] = TABLES
    peers: list[str] | None = None
    full: bool = False
    only: str = ""
    deadline: float = math.inf

    @property
    def effort(self) -> Effort:
        """How long to sample."""
        return dataclasses.replace(FULL if self.full else QUICK, deadline=self.deadline)


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
            dot = f" ({machine.dot_name(options.isa)})" if ceiling.name == "dot" else ""
            row = Row("ceilings", "quantization", ceiling.name + dot, "no result", options.isa, threads)
            row = row.measured(lambda: measure(own, ceiling, options.effort))  # noqa: B023
            yield dataclasses.replace(row, ceiling_name="itself")


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
        return "" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.3g}"

    sign = "<= " if line["lower"] else ">= "
    limits = [sign + number(line[key]) if line[key] is not None else "" for key in ("must", "stretch")]
    spread = f" ±{line['spread']:.2g}" if line["spread"] else ""
    figure = number(line["figure"]) + spread
    return [
        line["gate"],
        line["accuracy"],
        line["isa"],
        str(line["threads"]),
        figure,
        *limits,
        line["verdict"],
        line["measured"],
    ]


def chosen_gates(only: str) -> tuple[Gate, ...]:
    """Return the gates whose name, instruction set or both contain a text."""
    return tuple(gate for gate in GATES if only.lower() in f"{gate.isa} {gate.name}".lower())


def print_gates(out: TextIO, lines: Sequence[dict[str, Any]]) -> None:
    """Print one line for each gate, and how many were met."""
    header = ["gate", "accuracy class", "ISA", "threads", "figure", "must", "stretch", "verdict", "measured"]
    out.write(f"\n{_text.table(header, [_gate_cells(line) for line in lines], left=3)}\n")
    counts = {word: sum(line["verdict"].startswith(word) for line in lines) for word in VERDICTS}
    out.write("\n" + ", ".join(f"{count} {word}" for word, count in counts.items()) + "\n")
    out.flush()


def _watched(title: str, rows: Iterator[Row]) -> list[Row]:
    """Take all rows and meanwhile say on a terminal how far that is."""
    found = []
    show = sys.stderr.isatty()
    for row in rows:
        found.append(row)
        if show:
            line = f"{title}: {len(found)} rows, last {row.implementation} {row.what} {row.shape}"
            print(f"\r{line[:78]:78}", end="", file=sys.stderr, flush=True)
    if show:
        print(f"\r{'':78}\r", end="", file=sys.stderr, flush=True)
    return found


def tables(out: TextIO, options: Options) -> list[Row]:
    """Print the tables as they are measured and return their rows: the quick ones first, since time may be bounded."""
    rows = _watched("ceilings", ceiling_rows(options))
    _print_table(out, "ceilings", rows)
    if "calls" in options.tables:
        found = _watched("small calls", elementwise.tiny_rows(options, options.effort))
        _print_table(out, "small calls", found)
        rows += found
    if "elementwise" in options.tables:
        found = _watched("elementwise", elementwise.rows(options, options.effort.part(0.25)))
        _print_table(out, ELEMENTWISE_TITLE, found)
        rows += found
    if "gather" in options.tables:
        found = _watched("experts", gather.rows(options, options.effort.part(0.25)))
        _print_table(out, GATHER_TITLE, found)
        rows += found
    if "formats" in options.tables:
        found = _watched("formats", formats.rows(options, options.effort))
        out.write(f"\n{FORMATS_TITLE}\n\n{formats.table(found)}\n")
        rows += found
    if "attention" in options.tables:
        found = _watched("attention", attention.rows(options, options.effort.part(0.25)))
        _print_table(out, ATTENTION_TITLE, found)
        rows += found
    if "matmul" in options.tables:
        found = _watched("products", matmuls.rows(options, options.effort))
        _print_table(out, "products", found)
        if short := summary.table(found):
            out.write(f"\n{SUMMARY_TITLE}\n\n{short}\n")
        rows += found
    out.write(f"\n{LEGEND}\n")
    return rows


def _matrices(arguments: argparse.Namespace) -> tuple[tuple[known.Shape, Stored], ...]:
    """Return the shapes asked for in the formats asked for; for `--full` every shape, and the first in every format."""
    asked = parse_formats(arguments.formats) if arguments.formats else tuple(arguments.bits or ())
    if arguments.formats and arguments.bits:
        raise ValueError("bench: --bits 4 is --formats affine_4: give one of them")
    if unknown := sorted(set(arguments.bits or ()) - AFFINE_WIDTHS):
        widths = ", ".join(map(str, sorted(AFFINE_WIDTHS)))
        raise ValueError(f"bench: there are no affine codes of {unknown[0]} bits, but of {widths}")
    stored = asked or (EVERY if arguments.full else (4,))
    if arguments.full and not arguments.shapes and not asked:
        first, *others = known.parse(",".join(known.MODELS))
        return (*((first, form) for form in stored), *((shape, 4) for shape in others))
    return tuple((shape, form) for shape in known.parse(arguments.shapes or "square") for form in stored)


def options_of(arguments: argparse.Namespace) -> Options:
    """Return the options that a command line stands for.

    Raises
    ------
    ValueError
        If something is asked for that the tables have and the gates have not, or the other way round.
    """
    of_tables = ("shapes", "bits", "formats", "rows", "threads", "isa", "table", "peers", "plot")
    of_gates = ("only", "strict")
    for name in of_tables if arguments.gates else of_gates:
        if getattr(arguments, name) not in (None, "", False):
            raise ValueError(f"bench: --{name} is for the {'tables' if arguments.gates else 'gates: add --gates'}")
    names = None if arguments.peers is None else [word for word in arguments.peers.split(",") if word]
    minutes = arguments.minutes or (math.inf if arguments.full or arguments.gates else MINUTES)
    return Options(
        matrices=_matrices(arguments),
        rows=tuple(arguments.rows or (known.ROWS if arguments.full else known.QUICK_ROWS)),
        threads=tuple(arguments.threads or dict.fromkeys((1, get_num_threads()))),
        isa=arguments.isa or machine.default_isa(),
        tables=tuple(arguments.table or TABLES),
        peers=names,
        full=arguments.full,
        only=arguments.only,
        deadline=time.monotonic() + 60 * minutes,
    )


def _check_outputs(json: str | None, picture: str | None) -> None:
    """Fail now rather than after minutes if a file cannot be written, or drawn."""
    if picture:
        require("matplotlib", "plot")
    for path in (json, picture):
        if path:
            Path(path).open("ab").close()


def run(out: TextIO, options: Options, *, gates: bool, json: str | None, picture: str | None) -> bool:
    """Measure, print, and write what is asked for; return whether every gate that has a figure is met."""
    _check_outputs(json, picture)
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
    return not any(line["verdict"].startswith("missed") for line in lines)


def _positive(text: str) -> list[int]:
    numbers = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers such as 1 or 1,2, got {text!r}")
    return numbers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``python -m quantization bench``."""
    parser.add_argument("--full", action="store_true", help="all shapes, widths, types and M, longer samples: hours")
    limit = f"begin nothing after so long (default: {MINUTES}; none for --full and --gates)"
    parser.add_argument("--minutes", type=float, metavar="N", help=limit)
    parser.add_argument("--json", metavar="FILE", help="also write every row, the machine and the versions")
    tables = parser.add_argument_group("tables")
    tables.add_argument("--shapes", metavar="NAME,…", help=f"NxK, or {', '.join(known.MODELS)}")
    tables.add_argument("--bits", type=_positive, metavar="N,…", help="widths of affine codes (default: 4)")
    names = f"instead of --bits: affine_4 and so on, {', '.join(SMALL_FLOATS)}, or all"
    tables.add_argument("--formats", metavar="NAME,…", help=names)
    tables.add_argument("--rows", type=_positive, metavar="M,…", help="rows of x (default: 1, 4, 16, 128)")
    tables.add_argument("--threads", type=_positive, metavar="N,…", help="numbers of threads (default: 1 and all)")
    tables.add_argument("--isa", choices=machine.isas(), help="instruction set (default: the best)")
    only = f"only this table; may be given several times; {', '.join(ASKED_TABLES)}: not among the others"
    tables.add_argument("--table", action="append", choices=(*TABLES, *ASKED_TABLES), help=only)
    tables.add_argument("--peers", metavar="NAME,…", help="only libraries with such names; '' for none")
    tables.add_argument("--plot", metavar="FILE", help="also draw the products (.png, .svg, .pdf)")
    gates = parser.add_argument_group("gates")
    gates.add_argument("--gates", action="store_true", help="one line for each gate instead of the tables")
    gates.add_argument("--only", default="", metavar="TEXT", help="only gates whose name or ISA contains it")
    gates.add_argument("--strict", action="store_true", help="exit status 1 if a gate is missed")
