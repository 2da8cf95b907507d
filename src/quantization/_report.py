"""What a format costs and keeps: bits per weight and error of every tensor, of arrays and of files.

The decision a user makes per tensor is "which format, and does it hurt?". `report` answers it by encoding every float
tensor, decoding it in float32 (the values every matmul of this package multiplies by) and comparing in float64. A
tensor that a format cannot take is listed with its reason: a skip that nobody sees is a wrong total.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ._extras import require
from ._files import READERS, CorruptError, Unreadable
from ._formats import Format, as_formats, known_formats
from ._text import first_line, fold_names, table

# Elements per block of rows. Errors are taken in float64, so a block needs about 30 bytes an element: 32 MB.
_BLOCK = 1 << 20

_REPR_ROWS = 60


# ----------------------------------------------------------------------------------------------------------- errors


class Errors:
    """Sums from which signal-to-noise ratio and largest error of one tensor, or of many together, are read."""

    def __init__(self) -> None:
        self.signal = self.noise = self.largest = self.error = 0.0

    def add(self, exact: np.ndarray, decoded: np.ndarray) -> None:
        """Compare a block; both are taken to float64, in which their difference of two float32 is exact or nearly."""
        values = exact.astype(np.float64).ravel()
        if values.size == 0:
            return
        difference = decoded.astype(np.float64).ravel() - values
        block = Errors()
        block.signal, block.noise = float(values @ values), float(difference @ difference)
        block.largest, block.error = float(np.abs(values).max()), float(np.abs(difference).max())
        self.merge(block)

    def merge(self, other: Errors) -> None:
        self.signal += other.signal
        self.noise += other.noise
        self.largest = max(self.largest, other.largest)
        # Not max(), which may drop a NaN, and with it the only trace of a scale that overflowed.
        self.error = float(np.maximum(self.error, other.error))

    @property
    def snr_db(self) -> float:
        """10 log10(sum of w**2 / sum of errors**2); infinite where nothing was lost."""
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


@dataclass(frozen=True)
class Row:
    """One tensor in one format."""

    name: str
    format: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    """Bytes of codes, scales and biases together."""
    bits_per_weight: float
    snr_db: float
    max_error: float
    """Largest absolute error, in the tensor's own unit."""
    relative_error: float
    """`max_error` divided by the tensor's largest magnitude."""
    errors: Errors = field(repr=False)
    """The sums behind the three figures above."""


@dataclass(frozen=True)
class Skipped:
    """One tensor that was not quantized, and why; `format` is None if no format could change that."""

    name: str
    format: str | None
    shape: tuple[int, ...]
    dtype: str
    reason: str


# ----------------------------------------------------------------------------------------------------------- report


class Report:
    """The outcome of `report`.

    Attributes
    ----------
    rows : tuple of Row
        One row per tensor and format, lowest signal-to-noise ratio first.
    skipped : tuple of Skipped
        Every tensor that was left out, with its reason.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> found = q.report({"up": np.linspace(-1, 1, 4096, dtype=np.float32).reshape(64, 64)}, "affine_4")
    >>> (row,) = found.rows
    >>> row.name, row.format, row.shape, row.bits_per_weight
    ('up', 'affine 4 g64', (64, 64), 5.0)
    """

    def __init__(self, rows: Iterable[Row], skipped: Iterable[Skipped]) -> None:
        self.rows = tuple(sorted(rows, key=lambda row: row.snr_db))
        self.skipped = tuple(skipped)

    def totals(self) -> dict[str, Row]:
        """Take all tensors of a format as one.

        Returns
        -------
        dict of str to Row
            By format: a row named ``"total"``, whose shape is the number of weights.

        Examples
        --------
        >>> import numpy as np, quantization as q
        >>> weights = {name: np.linspace(-1, 1, 4096, dtype=np.float32).reshape(64, 64) for name in ("up", "down")}
        >>> {name: (total.shape, total.nbytes) for name, total in q.report(weights, "affine_4").totals().items()}
        {'affine 4 g64': ((8192,), 5120)}
        """
        totals = {}
        for name in dict.fromkeys(row.format for row in self.rows):
            rows = [row for row in self.rows if row.format == name]
            sums = Errors()
            for row in rows:
                sums.merge(row.errors)
            weights, nbytes = sum(math.prod(row.shape) for row in rows), sum(row.nbytes for row in rows)
            totals[name] = _row("total", name, (weights,), "", nbytes, sums)
        return totals

    def __str__(self) -> str:
        return self._text(len(self.rows))

    def __repr__(self) -> str:
        return self._text(_REPR_ROWS)

    def _text(self, limit: int) -> str:
        parts = []
        if self.rows:
            parts.append(
                table(
                    ("tensor", "format", "shape", "dtype", "bits/w", "SNR dB", "max error", "relative"),
                    [_cells(row) for row in self.rows[:limit]],
                    left=4,
                )
            )
        if limit < len(self.rows):
            parts.append(f"... and {len(self.rows) - limit} more rows with a higher SNR; str() of the report has all")
        for name, total in self.totals().items():
            tensors = sum(row.format == name for row in self.rows)
            parts.append(
                f"{name}: {tensors} tensor{'s' * (tensors != 1)}, {total.shape[0]:,} weights, "
                f"{total.nbytes / 1e6:.4g} MB, {total.bits_per_weight:.2f} bits/weight, "
                f"SNR {total.snr_db:.1f} dB"
            )
        if self.skipped:
            parts.append(skipped_text(self.skipped))
        return "\n".join(parts) or "nothing to report: no tensors"

    def plot(self, path: str | Path) -> None:
        """Draw the SNR of the worst 40 tensors as bars, a colour per format, and save it.

        Parameters
        ----------
        path : str or Path
            File to write; its suffix chooses the kind (.png, .svg, .pdf).

        Raises
        ------
        ImportError
            Without matplotlib (extra ``plot``).
        ValueError
            If there is nothing to draw, or matplotlib cannot write this kind of file.

        Examples
        --------
        >>> import numpy as np, os, quantization as q, tempfile
        >>> weights = {"up": np.linspace(-1, 1, 4096, dtype=np.float32).reshape(64, 64)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     q.report(weights, ["affine_8", "affine_4"]).plot(f"{folder}/snr.svg")
        ...     os.listdir(folder)
        ['snr.svg']
        """
        figure_class = require("matplotlib.figure", "plot").Figure
        if not self.rows:
            raise ValueError("report: no tensor was quantized, so there is nothing to plot")
        names = list(dict.fromkeys(row.name for row in self.rows))[:40]
        formats = list(dict.fromkeys(row.format for row in self.rows))
        snr = {(row.name, row.format): row.snr_db for row in self.rows}
        finite = [value for value in snr.values() if math.isfinite(value)]
        figure = figure_class(figsize=(9, 1.5 + 0.28 * len(names)), layout="constrained")
        axes = figure.subplots()
        height = 0.8 / len(formats)
        for index, name in enumerate(formats):
            shown = [(row, snr[tensor, name]) for row, tensor in enumerate(names) if (tensor, name) in snr]
            # A tensor stored exactly has no finite SNR: its bar ends where the longest finite one does.
            axes.barh(
                [row + index * height for row, _ in shown],
                [min(value, max(finite, default=0.0)) for _, value in shown],
                height,
                label=name,
            )
        axes.set_yticks([row + (len(formats) - 1) * height / 2 for row in range(len(names))], names, fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("signal-to-noise ratio, dB (worst first)")
        axes.legend()
        figure.savefig(path)


def report(arrays: Any, formats: Any = None, *, scale_dtype: Any = None, profile: str = "metal") -> Report:
    """Quantize every float array in every format and tell what it costs and what it keeps.

    Parameters
    ----------
    arrays : mapping of str to array_like, sequence of array_like, or one array
        Tensors by name, such as a model's weights or an open ``.npz`` file. Members of a sequence are named by their
        index. float16, bfloat16, float32 and float64 arrays with two axes or more are quantized along the last axis.
    formats : sequence, optional
        Names such as ``"affine_4_g64"`` (mode, bits, group size; ``"affine_8"`` has group size 64, ``"mxfp4"`` needs
        neither) or tuples ``(mode, bits, group_size)``; one name alone is accepted too. Default: ``"affine_4_g64"``.
    scale_dtype : dtype, optional
        Type in which scales and biases are stored; the array's own if left out. ``"float16"`` is what fits most
        models, and halves what float32 weights pay for their scales.
    profile : {"metal", "cpu"}
        Which of MLX's two backends the codes follow, see `affine_quantize`.

    Returns
    -------
    Report
        ``.rows`` worst first, ``.skipped`` with reasons, ``.totals()`` per format, ``.plot(path)``; printing it shows
        the table.

    Raises
    ------
    ValueError, TypeError
        For a format that does not exist.

    Notes
    -----
    Errors are those of the decoded float32 values against the array as it came, in float64. Blocks of rows keep the
    memory needed at about 32 MB beyond the array itself; an array of three or more axes whose leading axes do not lie
    one after the other in memory is copied once.

    Examples
    --------
    >>> import numpy as np, quantization
    >>> weights = {"up": np.linspace(-1, 1, 128 * 64, dtype=np.float32).reshape(128, 64), "bias": np.zeros(128)}
    >>> result = quantization.report(weights, ["affine_8", "affine_4"])
    >>> [row.format for row in result.rows]
    ['affine 4 g64', 'affine 8 g64']
    >>> result.skipped[0].reason
    '1-D: biases and norms stay as they are'
    """
    if isinstance(arrays, Mapping):
        items: Iterable[tuple[str, Any]] = arrays.items()
    elif isinstance(arrays, (list, tuple)):
        items = ((str(index), array) for index, array in enumerate(arrays))
    else:
        items = [("array", arrays)]
    return _report(items, as_formats(formats), scale_dtype, profile)


def _report(items: Iterable[tuple[str, Any]], formats: list[Format], scale_dtype: Any, profile: str) -> Report:
    rows: list[Row] = []
    skipped: list[Skipped] = []
    for name, value in items:
        array = _as_array(value)
        reason = array.reason if isinstance(array, Unreadable) else _unfit(array)
        if isinstance(array, Unreadable) or reason:
            skipped.append(Skipped(str(name), None, tuple(array.shape), str(array.dtype), reason))
            continue
        for target in formats:
            outcome = _measure(array, target, scale_dtype, profile)
            if isinstance(outcome, str):
                skipped.append(Skipped(str(name), str(target), array.shape, str(array.dtype), outcome))
            else:
                nbytes, sums = outcome
                rows.append(_row(str(name), str(target), array.shape, str(array.dtype), nbytes, sums))
    return Report(rows, skipped)


def _as_array(value: Any) -> np.ndarray | Unreadable:
    if isinstance(value, (np.ndarray, Unreadable)):
        return value
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # tensors of other libraries raise any of the three
        return Unreadable(
            tuple(getattr(value, "shape", ())),
            str(getattr(value, "dtype", type(value).__name__)),
            f"cannot be read as a NumPy array: {first_line(error)}",
        )


def _unfit(array: np.ndarray) -> str:
    """Why no format can take this array, or an empty string."""
    dtype = array.dtype
    if dtype.name == "uint16":
        return "uint16: not a float (raw bfloat16 bits: view them as ml_dtypes.bfloat16)"
    if dtype.name not in ("float16", "float32", "float64", "bfloat16"):
        return f"{dtype}: only float16, bfloat16, float32 and float64 are quantized"
    if array.ndim == 0:
        return "0-D: a single number"
    if array.ndim == 1:
        return "1-D: biases and norms stay as they are"
    if array.size == 0:
        return "empty"
    with np.errstate(over="ignore"):
        bad = sum(int(block.size - np.isfinite(block.astype(np.float32)).sum()) for block in row_blocks(array))
    if bad:
        return f"{bad} value{'s are' if bad > 1 else ' is'} NaN, infinite or beyond float32"
    return ""


def row_blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """`array` as blocks of whole rows in native byte order; groups lie within rows, so blocks encode as the whole."""
    rows = array.reshape(-1, array.shape[-1])
    step = max(1, _BLOCK // rows.shape[1])
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        yield block if block.dtype.isnative else block.astype(block.dtype.newbyteorder("="))


def _measure(array: np.ndarray, target: Format, scale_dtype: Any, profile: str) -> tuple[int, Errors] | str:
    """Bytes and errors of `array` in a format, or why the format cannot take it."""
    width = array.shape[-1]
    if width % target.group_size:
        fitting = dict.fromkeys(
            f"group size {f.group_size}" if f.mode == target.mode else str(f)
            for f in known_formats()
            if width % f.group_size == 0 and (f.mode != target.mode or f.bits == target.bits)
        )
        fits = f"{' or '.join(fitting)} would fit" if fitting else "no format here fits"
        return f"last axis {width} is not a multiple of group size {target.group_size} ({fits})"
    nbytes, sums = 0, Errors()
    for block in row_blocks(array):
        encoded = target.encode(block, scale_dtype=scale_dtype, profile=profile)
        nbytes += sum(part.nbytes for part in encoded)
        # A scale that overflowed decodes to Inf or, times code 0, to NaN: reported below, so not worth a warning.
        with np.errstate(invalid="ignore", over="ignore"):
            sums.add(block, target.decode(encoded))
    if not math.isfinite(sums.error):
        stored = encoded[1].dtype
        advice = ": use a wider scale_dtype" if stored.itemsize < 4 else ""
        return f"scales do not fit in {stored} (values up to {sums.largest:.3g}){advice}"
    return nbytes, sums


def _row(name: str, target: str, shape: tuple[int, ...], dtype: str, nbytes: int, sums: Errors) -> Row:
    relative = sums.error / sums.largest if sums.largest else (math.inf if sums.error else 0.0)
    bits = 8 * nbytes / math.prod(shape)
    return Row(name, target, shape, dtype, nbytes, bits, sums.snr_db, sums.error, relative, sums)


# ------------------------------------------------------------------------------------------------------------ files


def report_file(
    path: str | Path,
    formats: Any = None,
    *,
    scale_dtype: Any = None,
    profile: str = "metal",
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> Report:
    """`report` of the tensors in a ``.npz``, ``.npy`` or ``.safetensors`` file, read one at a time.

    Parameters
    ----------
    path : str or Path
        The file; its suffix says what it is.
    formats, scale_dtype, profile
        As for `report`.
    progress : callable, optional
        Wraps the list of tensor names and yields it, as `tqdm.tqdm` does.

    Raises
    ------
    OSError
        If the file cannot be opened.
    ValueError
        If it is not what its suffix says, or has another suffix.
    ImportError
        For ``.safetensors`` without its library (extra ``io``).
    """
    chosen = as_formats(formats)
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: unknown suffix {path.suffix!r}; .npz, .npy and .safetensors can be read")
    with open(path, "rb"):
        pass  # a missing or forbidden file is the operating system's own OSError, whatever library reads it
    try:
        tensors = reader(path)
        return _report(((name, tensors[name]) for name in progress(tensors.names)), chosen, scale_dtype, profile)
    except CorruptError as error:
        raise ValueError(f"{path}: not a readable {path.suffix.lower()} file: {first_line(error)}") from error


# ------------------------------------------------------------------------------------------------------------- text


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        row.format,
        "x".join(map(str, row.shape)),
        row.dtype,
        f"{row.bits_per_weight:.2f}",
        f"{row.snr_db:.1f}",
        f"{row.max_error:.3g}",
        f"{row.relative_error:.3g}",
    )


def skipped_text(skipped: Iterable[Skipped], heading: str = "skipped") -> str:
    """List the skipped tensors by reason, names that differ by one number folded into one."""
    reasons: dict[str, list[str]] = {}
    for entry in skipped:
        reasons.setdefault(f"{entry.format}: {entry.reason}" if entry.format else entry.reason, []).append(entry.name)
    lines = []
    for reason, names in reasons.items():
        lines.append(f"{heading} ({len(names)}), {reason}")
        lines.append(
            textwrap.fill(
                ", ".join(fold_names(names)),
                116,
                initial_indent="    ",
                subsequent_indent="    ",
                break_long_words=False,
                break_on_hyphens=False,
            )
        )
    return "\n".join(lines)
