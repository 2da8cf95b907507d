"""The demo's measurements and its table: a model in every format against itself in float32."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from .. import AffineQmmT, get_num_threads
from .._extras import require
from .._formats import Format, as_formats, known_formats
from .._report import Errors, Report, Skipped, report, skipped_text
from .._text import table
from .minilm import MiniLM, find_model
from .sentences import QUERY, SENTENCES
from .weights import FloatWeight, QuantizedWeight, Weight

# float16 scales lose nothing at any width, where those of bfloat16 cost 4 dB at 8 bits; float32 ones cost half a bit
# per weight more.
SCALE_DTYPE = "float16"

# Rank correlation from which on a quantized model orders its answers almost as before.
RANK_BAR = 0.95

# What the single query is answered in beside float32, and what --layers lists.
COMPARED_BITS, COMPARED_GROUP = 4, 64

_HEADER = (
    "format",
    "bits/w",
    "MB",
    "x smaller",
    "SNR dB",
    "SNR cpu dB",
    "cos mean",
    "cos min",
    "rank rho",
    "ms/50",
    "ms/sentence",
    "skipped",
)


@dataclass(frozen=True)
class Result:
    """One row of the table; `snr_db` is None if nothing was rounded, `snr_cpu_db` also if the row has no profiles."""

    name: str
    bits_per_weight: float
    nbytes: int
    snr_db: float | None
    snr_cpu_db: float | None
    cosines: np.ndarray
    rank_rho: float
    ms_batch: float
    ms_sentence: float
    skipped: tuple[Skipped, ...]
    embedding: np.ndarray
    matrices: Mapping[str, Weight]
    report: Report | None = None


class Comparison:
    """Runs one model in float32 and in each format over the same sentences."""

    def __init__(self, model: MiniLM, sentences: Sequence[str] = SENTENCES) -> None:
        self.model = model
        self.token_ids = model.tokenize(sentences)
        self._float_bytes = sum(t.nbytes for t in model.others.values() if t.dtype == np.float32)
        floats = {name: FloatWeight(w) for name, w in model.matrices.items()}
        self._reference = model.embed(self.token_ids, floats)
        self.baseline = self._result("float32 (NumPy)", floats, sum(w.nbytes for w in model.matrices.values()))

    def naive_int8(self) -> Result:
        """One scale per tensor, the first thing everybody tries, multiplied in float32 by NumPy."""
        matrices, sums = {}, Errors()
        for name, w in self.model.matrices.items():
            scale = np.abs(w).max() / np.float32(127)
            decoded = np.rint(w / scale) * scale
            sums.add(w, decoded)
            matrices[name] = FloatWeight(decoded)
        nbytes = sum(w.size for w in self.model.matrices.values())
        return self._result("naive int8 per tensor", matrices, nbytes, sums.snr_db)

    def quantized(self, target: Format) -> Result:
        """Run the model in a format; matrices that it cannot take stay in float32 and are listed."""
        measured = report(self.model.matrices, [target], scale_dtype=SCALE_DTYPE)
        on_cpu = report(self.model.matrices, [target], scale_dtype=SCALE_DTYPE, profile="cpu")
        left = {entry.name for entry in measured.skipped}
        matrices: dict[str, Weight] = {}
        for name, w in self.model.matrices.items():
            matrices[name] = (
                FloatWeight(w) if name in left else QuantizedWeight(target, target.encode(w, scale_dtype=SCALE_DTYPE))
            )
        total, total_cpu = (r.totals().get(str(target)) for r in (measured, on_cpu))
        nbytes = sum(self.model.matrices[name].nbytes for name in left) + (total.nbytes if total else 0)
        snr_db, snr_cpu_db = (t.snr_db if t else None for t in (total, total_cpu))
        return self._result(str(target), matrices, nbytes, snr_db, snr_cpu_db, measured)

    def _result(
        self,
        name: str,
        matrices: Mapping[str, Weight],
        nbytes: int,
        snr_db: float | None = None,
        snr_cpu_db: float | None = None,
        measured: Report | None = None,
    ) -> Result:
        embedding = self.model.embed(self.token_ids, matrices)
        # The first batch, above, also warmed caches and thread pool up; of two more the better one counts.
        batch = min(self._seconds(self.token_ids, matrices) for _ in range(2))
        single = statistics.median(self._seconds([ids], matrices) for ids in self.token_ids[:10])
        weights = sum(w.size for w in self.model.matrices.values())
        return Result(
            name,
            8 * nbytes / weights,
            nbytes + self._float_bytes,
            snr_db,
            snr_cpu_db,
            (embedding * self._reference).sum(axis=1),
            rank_correlation(embedding, self._reference),
            1e3 * batch,
            1e3 * single,
            measured.skipped if measured else (),
            embedding,
            matrices,
            measured,
        )

    def _seconds(self, token_ids: Sequence[Sequence[int]], matrices: Mapping[str, Weight]) -> float:
        start = time.perf_counter()
        self.model.embed(token_ids, matrices)
        return time.perf_counter() - start


def rank_correlation(embedding: np.ndarray, reference: np.ndarray) -> float:
    """Spearman's rho between the similarities of all pairs of sentences, in two sets of unit vectors."""
    upper = np.triu_indices(len(embedding), 1)
    ranks, expected = (np.argsort(np.argsort((unit @ unit.T)[upper])) for unit in (embedding, reference))
    return float(np.corrcoef(ranks, expected)[0, 1])


def default_formats() -> list[Format]:
    """Every width at its usual group size, and 4 bits, where the choice matters most, at each; wide ones first.

    1 bit is left out: only weights that were trained for it bear it.
    """
    known = [f for f in known_formats() if f.is_mlx and f.bits > 1]
    chosen = [f for f in known if not f.sized or f.group_size == COMPARED_GROUP or f.bits == COMPARED_BITS]
    modes = list(dict.fromkeys(f.mode for f in known))
    return sorted(chosen, key=lambda f: (modes.index(f.mode), -f.bits, f.group_size))


def run(
    out: TextIO,
    *,
    model: str | None = None,
    formats: Any = None,
    query: str = QUERY,
    layers: bool = False,
    plot: str | None = None,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> list[Result]:
    """Measure and print everything; returns the table's rows."""
    if plot is not None:
        _check_plot(Path(plot))
    targets = default_formats() if formats is None else as_formats(formats)
    folder = find_model(model)
    loaded = MiniLM(folder.path)
    comparison = Comparison(loaded)
    results = [comparison.baseline]
    for step in progress([comparison.naive_int8, *targets]):
        results.append(comparison.quantized(step) if isinstance(step, Format) else step())
    _print_head(out, folder.origin, comparison)
    print(table(_HEADER, [_cells(result, comparison.baseline.nbytes) for result in results]), file=out)
    _print_left(out, loaded, results)
    _print_choice(out, results)
    compared = _compared(results)
    _print_answers(out, loaded, query, [results[0]] + ([compared] if compared else []))
    if layers and compared and compared.report:
        print(f"\nWorst layers first, {compared.name}:\n{compared.report}", file=out)
    if plot is not None:
        draw(results, plot)
        print(f"\nplot written to {plot}", file=out)
    return results


def _compared(results: Sequence[Result]) -> Result | None:
    """Pick the 4-bit row, or, if a choice of formats left it out, the last one."""
    quantized = [result for result in results if result.report is not None]
    wanted = [result for result in quantized if result.name == f"affine {COMPARED_BITS} g{COMPARED_GROUP}"]
    return next(iter(wanted or quantized[-1:]), None)


def _print_head(out: TextIO, origin: str, comparison: Comparison) -> None:
    model = comparison.model
    weights = sum(w.size for w in model.matrices.values())
    tokens = sum(map(len, comparison.token_ids))
    print(
        f"model    {origin}\n"
        f"weights  {len(model.matrices)} linear and embedding matrices, {weights / 1e6:.1f} M float32 values, "
        f"quantized with {SCALE_DTYPE} scales\n"
        f"text     {len(comparison.token_ids)} sentences, {tokens} tokens; cosine and rank rho against float32\n"
        f"kernels  {AffineQmmT().compile()!r}, {get_num_threads()} thread(s)\n",
        file=out,
    )


def _cells(result: Result, float_bytes: int) -> tuple[str, ...]:
    def db(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    return (
        result.name,
        f"{result.bits_per_weight:.2f}",
        f"{result.nbytes / 1e6:.1f}",
        f"{float_bytes / result.nbytes:.1f}",
        db(result.snr_db),
        db(result.snr_cpu_db),
        f"{result.cosines.mean():.4f}",
        f"{result.cosines.min():.4f}",
        f"{result.rank_rho:.4f}",
        f"{result.ms_batch:.0f}",
        f"{result.ms_sentence:.1f}",
        str(len(result.skipped)),
    )


def _print_left(out: TextIO, model: MiniLM, results: Sequence[Result]) -> None:
    """List what stayed in float32: by design in every row, then what a single format could not take."""
    left = [Skipped(name, None, model.others[name].shape, "float32", reason) for name, reason in model.kept.items()]
    left += report({name: tensor for name, tensor in model.others.items() if name not in model.kept}).skipped
    print(
        '\nMB counts every float tensor of the file; SNR cpu is that of the codes MLX makes on a CPU (profile="cpu").',
        file=out,
    )
    print(skipped_text(left, "not quantized in any row"), file=out)
    misfits = [entry for result in results for entry in result.skipped]
    if misfits:
        print(skipped_text(misfits), file=out)


def _print_choice(out: TextIO, results: Sequence[Result]) -> None:
    good = [result for result in results if result.report is not None and result.rank_rho >= RANK_BAR]
    if not good:
        print(f"\nNo format here reaches a rank rho of {RANK_BAR}.", file=out)
        return
    best = min(good, key=lambda result: result.nbytes)
    print(
        f"\nSmallest format with a rank rho of {RANK_BAR} or more: {best.name}, {best.nbytes / 1e6:.1f} MB, "
        f"{results[0].nbytes / best.nbytes:.1f} times smaller than float32.",
        file=out,
    )


def _print_answers(out: TextIO, model: MiniLM, query: str, results: Sequence[Result]) -> None:
    print(f"\nQuery: {query}", file=out)
    for result in results:
        scores = result.embedding @ model.embed(model.tokenize([query]), result.matrices)[0]
        print(f"  {result.name}, {result.nbytes / 1e6:.1f} MB", file=out)
        for index in np.argsort(-scores)[:3]:
            print(f"    {scores[index]:.3f}  {SENTENCES[index]}", file=out)


def _check_plot(path: Path) -> None:
    """Fail before the minute of work, not after it."""
    canvas = require("matplotlib.backend_bases", "plot").FigureCanvasBase
    kinds = canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise ValueError(f"demo: --plot {path}: unknown kind {path.suffix!r}; there are {', '.join(sorted(kinds))}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"demo: --plot {path}: no folder {path.absolute().parent}")


def draw(results: Sequence[Result], path: str | Path) -> None:
    """Save quality and SNR against bits per weight as two panels."""
    figure = require("matplotlib.figure", "plot").Figure(figsize=(11, 4.5), layout="constrained")
    quality, noise = figure.subplots(1, 2)
    shown = [result for result in results if result.snr_db is not None and math.isfinite(result.snr_db)]
    bits = [result.bits_per_weight for result in shown]
    quality.scatter(bits, [result.cosines.mean() for result in shown], marker="o", label="cosine to float32, mean")
    quality.scatter(bits, [result.rank_rho for result in shown], marker="x", label="rank correlation of similarities")
    quality.axhline(RANK_BAR, linewidth=0.8, linestyle="--", color="grey")
    quality.legend(loc="lower right")
    noise.scatter(bits, [result.snr_db for result in shown])
    for result in shown:
        noise.annotate(
            result.name, (result.bits_per_weight, result.snr_db), textcoords="offset points", xytext=(5, -9), fontsize=7
        )
    noise.margins(x=0.2)
    noise.set_ylabel("signal-to-noise ratio of the weights, dB")
    for axes in (quality, noise):
        axes.set_xlabel("bits per weight, scales included")
        axes.grid(alpha=0.3)
    figure.savefig(path)
