"""Plain-text tables and lists."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns under their headers, the first `left` of them flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        " | ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def fold_names(names: Iterable[str]) -> list[str]:
    """`layer.0.bias`, `layer.1.bias`, `layer.2.bias` as `layer.[0-2].bias`; names without a number as they are."""
    families: dict[tuple[str, str], list[int]] = {}
    for name in names:
        match = re.fullmatch(r"(.*?)(?<![^.])(0|[1-9]\d*)(\..*)", name)
        key = (match[1], match[3]) if match else (name, "")
        families.setdefault(key, []).extend([int(match[2])] if match else [])
    folded = []
    for (head, tail), numbers in families.items():
        numbers.sort()
        run = numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else False
        if run and len(numbers) > 1:
            folded.append(f"{head}[{numbers[0]}-{numbers[-1]}]{tail}")
        else:
            folded += [f"{head}{number}{tail}" for number in numbers] or [head]
    return folded


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
