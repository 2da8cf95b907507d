"""The shapes of real models' linear layers, from the configurations that their authors publish."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """A weight matrix: N output features of K inputs."""

    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.n}x{self.k}"


def _layers(hidden: int, query: int, key_value: int, inner: int, vocabulary: int = 0) -> tuple[Shape, ...]:
    """List queries, keys (values are like them), attention's output, the inner layer both ways, and logits."""
    shapes = [(query, hidden), (key_value, hidden), (hidden, query), (inner, hidden), (hidden, inner)]
    if vocabulary:
        shapes.append((vocabulary, hidden))
    return tuple(dict.fromkeys(Shape(n, k) for n, k in shapes))


MODELS: dict[str, tuple[Shape, ...]] = {
    "square": (Shape(4096, 4096),),
    "qwen3-0.6b": _layers(1024, 2048, 1024, 3072, 151936),
    "llama-3.2-1b": _layers(2048, 2048, 512, 8192, 128256),
    "qwen3-4b": _layers(2560, 4096, 1024, 9728, 151936),
    "llama-3.1-8b": _layers(4096, 4096, 1024, 14336, 128256),
    "qwen3-32b": _layers(5120, 8192, 1024, 25600),
    "gpt-oss-20b-expert": (Shape(5760, 2880), Shape(2880, 2880)),
    "olmoe-1b-7b-expert": (Shape(1024, 2048), Shape(2048, 1024)),
    "odd": (Shape(1, 2880), Shape(7, 64), Shape(192, 2880), Shape(4100, 2880)),
}
QUICK_ROWS = (1, 4, 16, 128)
ROWS = (1, 2, 4, 8, 16, 32, 128, 512)


def parse(text: str) -> tuple[Shape, ...]:
    """Resolve ``"llama-3.1-8b,4096x11008"``: names of models, and N times K.

    Raises
    ------
    ValueError
        If a part is neither.
    """
    shapes: list[Shape] = []
    for part in text.lower().split(","):
        sizes = part.split("x")
        if part in MODELS:
            shapes += MODELS[part]
        elif len(sizes) == 2 and all(size.isdecimal() and int(size) > 0 for size in sizes):
            shapes.append(Shape(int(sizes[0]), int(sizes[1])))
        else:
            raise ValueError(f"bench: no shape {part!r}; there are NxK such as 4096x14336, and {', '.join(MODELS)}")
    return tuple(dict.fromkeys(shapes))
