"""`demo smollm2`: a language model's text, perplexity and speed in every format, against itself in float32."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np

from .. import AffineQmmT, get_num_threads
from .._formats import Format, as_format, as_formats, known_formats
from .._qtensor import QTensor
from .._text import fold_names, table
from .compare import SCALE_DTYPE
from .prose import TEXT
from .smollm2 import EMBEDDING, Network, SmolLM2, find_model, stream

PROMPT = "Why is the sky blue?"

# Enough to time, and for a format with too few bits to show where it ends.
TOKENS = 48

GROUP_SIZE = 64

_HEADER = ("format", "MB", "ppl", "KL", "top-1", "kernel ms/token", "token ms", "tok/s", "GB/s")


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    name: str
    nbytes: int
    """Of all matrices."""
    perplexity: float
    divergence: float
    """Mean Kullback-Leibler divergence of the predicted distributions from float32's, in nats."""
    agreement: float
    """Share of positions at which the likeliest token is float32's."""
    kernel_seconds: float
    token_seconds: float
    """Medians over the tokens generated: of the products with weights, and of everything."""
    tokens: list[int]
    misfits: list[str]
    """Matrices that stayed float32 because the group size does not divide their rows."""


class Comparison:
    """Runs one model with several choices of matrices over the same text and the same prompt."""

    def __init__(self, model: SmolLM2, prompt: str = PROMPT, count: int = TOKENS, text: str = TEXT) -> None:
        self.model, self.count = model, count
        self.stored: dict[str, QTensor] = {name: model.checkpoint[name] for name in model.checkpoint}
        self.floats = {name: np.asarray(matrix) for name, matrix in self.stored.items()}
        self.ids = model.tokenizer.encode(text).ids
        self.prompt = model.chat(prompt)
        network = self.network(self.floats)
        self._reference = model.logits(self.ids, network)
        self.baseline = self._row("float32 (NumPy)", self.floats, network, self._reference)

    def network(self, matrices: Mapping[str, Any]) -> Network:
        """Put matrices into the model."""
        return Network.of(matrices, self.model.layers)

    def row(self, name: str, matrices: Mapping[str, Any]) -> Row:
        """Measure the model with these matrices."""
        network = self.network(matrices)
        return self._row(name, matrices, network, self.model.logits(self.ids, network))

    def quantized(self, target: Callable[[str], Format]) -> dict[str, QTensor | np.ndarray]:
        """Quantize the float matrices that fit, each to the format that `target` says of its name."""
        matrices: dict[str, QTensor | np.ndarray] = dict(self.floats)
        for name, values in self.floats.items():
            chosen = target(name)
            if values.shape[-1] % chosen.group_size:
                continue
            options = {"scale_dtype": SCALE_DTYPE} if chosen.sized else {}
            matrices[name] = QTensor.quantize(
                values, chosen.mode, bits=chosen.bits, group_size=chosen.group_size, **options
            )
        return matrices

    def inexact(self) -> list[str]:
        """Names of the matrices whose values are not those that the library gguf decodes."""
        decode = self.model.checkpoint.decode
        return [name for name, values in self.floats.items() if not np.array_equal(values, decode(f"{name}.weight"))]

    def _row(self, name: str, matrices: Mapping[str, Any], network: Network, logits: np.ndarray) -> Row:
        perplexity, divergence, agreement = against(self._reference, logits, self.ids)
        tokens, kernel, token = self._decode(network)
        nbytes = sum(matrix.nbytes for matrix in matrices.values())
        misfits = [
            key for key, matrix in matrices.items() if matrices is not self.floats and matrix is self.floats[key]
        ]
        return Row(name, nbytes, perplexity, divergence, agreement, kernel, token, tokens, misfits)

    def _decode(self, network: Network) -> tuple[list[int], float, float]:
        """Generate from the prompt; the first token is not timed, for it takes the whole prompt."""
        tokens, marks = [], []
        for token in self.model.generate(self.prompt, network, self.count):
            tokens.append(token)
            marks.append((network.clock.seconds, time.perf_counter()))
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(marks)]
        if not steps:
            return tokens, float("nan"), float("nan")
        kernel, whole = (statistics.median(step[kind] for step in steps) for kind in (0, 1))
        return tokens, kernel, whole


def against(reference: np.ndarray, logits: np.ndarray, ids: Sequence[int]) -> tuple[float, float, float]:
    """Perplexity of a text, and mean divergence and share of equal likeliest tokens against others' logits."""
    loss = divergence = 0.0
    following = np.asarray(ids[1:])
    for start in range(0, len(following), 64):  # a block of positions takes 64 * 49152 doubles
        rows = slice(start, min(start + 64, len(following)))
        here, expected = (_log_softmax(scores[rows]) for scores in (logits, reference))
        loss -= float(np.take_along_axis(here, following[rows, None], axis=1).sum())
        divergence += float((np.exp(expected) * (expected - here)).sum())
    agreement = float((logits.argmax(axis=1) == reference.argmax(axis=1)).mean())
    return float(np.exp(loss / len(following))), divergence / len(following), agreement


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    normalized: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return normalized


def _mixed(name: str) -> Format:
    """Give bits to what suffers most from few of them: the head, then values, and the way into and out of the MLP."""
    bits = 6 if name == EMBEDDING else 5 if name.endswith(("attn_v", "ffn_up", "ffn_down")) else 4
    return as_format(("affine", bits, GROUP_SIZE))


def default_choices() -> dict[str, Callable[[str], Format]]:
    """Rows of the table by name: widths at the usual group size, the mix, and the other modes that there are."""
    known = known_formats()
    widths = (8, 6, 5, 4, 3)  # at 2 bits nothing is left of the model; 7 are not MLX's
    usual = sorted((f for f in known if f.group_size == GROUP_SIZE and f.bits in widths), key=lambda f: -f.bits)
    choices: dict[str, Callable[[str], Format]] = {}
    for found in [*usual, *(f for f in known if not f.sized)]:
        choices[str(found)] = _always(found)
        if (found.mode, found.bits) == ("affine", 4):
            choices["mixed 4, 5 and 6"] = _mixed
    return choices


def _always(target: Format) -> Callable[[str], Format]:
    return lambda name: target


def run(
    out: TextIO,
    *,
    model: str | None = None,
    formats: Any = None,
    prompt: str = PROMPT,
    text: str = TEXT,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> list[Row]:
    """Measure and print everything; returns the table's rows."""
    choices = default_choices() if formats is None else {str(f): _always(f) for f in as_formats(formats)}
    path, origin = find_model(model)
    loaded = SmolLM2(path)
    comparison = Comparison(loaded, prompt, text=text)
    _print_head(out, origin, comparison)
    print(f"\n{prompt}\n  from the file's own codes: ", end="", file=out)
    stored = comparison.network(comparison.stored)
    tokens = stream(
        loaded.tokenizer,
        loaded.generate(comparison.prompt, stored, TOKENS),
        lambda text: print(_flat(text), end="", file=out, flush=True),
    )
    same = "the same" if tokens == comparison.baseline.tokens else "OTHER"
    print(f"\n  float32 (NumPy): {same} {len(comparison.baseline.tokens)} tokens\n", file=out)
    rows = [comparison.baseline, comparison.row("repacked", comparison.stored)]
    for name in progress(list(choices)):
        rows.append(comparison.row(name, comparison.quantized(choices[name])))
    print(table(_HEADER, [_cells(row) for row in rows]), file=out)
    print(
        "\nMB counts the matrices; ppl is the perplexity of a text of "
        f"{len(comparison.ids)} tokens, KL and top-1 its predictions against float32. kernel ms/token are the products "
        "with weights, token ms everything; GB/s of weights in these products.",
        file=out,
    )
    for row in rows:
        if row.misfits:
            names = ", ".join(fold_names(row.misfits))
            print(f"{row.name}: in float32, their rows being no multiple of the group size: {names}", file=out)
    print(f"\n{prompt}", file=out)
    for row in rows[2:]:
        print(f"  {row.name}: {_flat(loaded.tokenizer.decode(row.tokens))}", file=out)
    return rows


def _print_head(out: TextIO, origin: str, comparison: Comparison) -> None:
    checkpoint = comparison.model.checkpoint
    weights = sum(matrix.size for matrix in comparison.stored.values())
    formats = Counter(str(matrix.format) for matrix in comparison.stored.values())
    inexact = comparison.inexact()
    verdict = f"but for {', '.join(inexact)}" if inexact else "every value equal to what gguf decodes"
    print(
        f"model    {origin}\n"
        f"weights  {len(comparison.stored)} matrices, {weights / 1e6:.1f} M values; {len(checkpoint.unquantized)} "
        "small tensors stay float32\n"
        f"repacked {', '.join(f'{count} as {name}' for name, count in formats.items())}; {verdict}\n"
        f"kernels  {AffineQmmT().compile()!r}, {get_num_threads()} thread(s)",
        file=out,
    )


def _flat(text: str) -> str:
    """Keep the text of a model on one line."""
    return text.replace("\n", " / ")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.nbytes / 1e6:.1f}",
        f"{row.perplexity:.3f}" if row.perplexity < 1000 else f"{row.perplexity:.3g}",
        f"{row.divergence:.4f}",
        f"{row.agreement:.3f}",
        f"{1e3 * row.kernel_seconds:.1f}",
        f"{1e3 * row.token_seconds:.1f}",
        f"{1 / row.token_seconds:.0f}",
        f"{row.nbytes / row.kernel_seconds / 1e9:.1f}",
    )
