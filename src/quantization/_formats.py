"""The stored formats by name, as the table of the C core has them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import _C

# The package's own namespace: the functions of a format are found in it by name, `<mode>_quantize` and so on, so that
# a row added to the table of formats appears here by itself.
_package = importlib.import_module(__package__)

DEFAULT_FORMAT = ("affine", 4, 64)


@dataclass(frozen=True)
class Format:
    """One storage format: a mode at one width and one group size. ``str()`` of it is a name `report` accepts."""

    mode: str
    bits: int
    group_size: int
    sized: bool = field(default=True, compare=False)
    """Whether the functions of the mode take ``group_size`` and ``bits``; those of a mode with one choice do not."""

    def __str__(self) -> str:
        return f"{self.mode} {self.bits} g{self.group_size}" if self.sized else self.mode

    @property
    def is_mlx(self) -> bool:
        """Whether MLX has the format too."""
        return self.mode != "affine" or self.bits != 7

    def call(self, suffix: str, *arrays: Any, **options: Any) -> Any:
        """Call ``<mode>_<suffix>``: the one place where a format's functions are looked up."""
        if self.sized:
            options.update(group_size=self.group_size, bits=self.bits)
        return getattr(_package, f"{self.mode}_{suffix}")(*arrays, **options)

    def encode(
        self, w: np.ndarray, *, scale_dtype: Any = None, profile: str = "metal", **options: Any
    ) -> tuple[np.ndarray, ...]:
        """Codes, scales and, if the mode has them, biases of `w`."""
        if self.sized:
            options["scale_dtype"] = scale_dtype
        encoded: tuple[np.ndarray, ...] = self.call("quantize", w, profile=profile, **options)
        return encoded

    def decode(self, encoded: Sequence[np.ndarray]) -> np.ndarray:
        """Float32 values of what `encode` returned, unrounded: what the matmuls multiply by."""
        decoded: np.ndarray = self.call("dequantize", *encoded, dtype="float32")
        return decoded

    def matmul_t(self, x: np.ndarray, encoded: Sequence[np.ndarray]) -> np.ndarray:
        """``x @ w.T`` straight from the codes."""
        product: np.ndarray = self.call("qmm_t", x, *encoded)
        return product


def known_formats() -> tuple[Format, ...]:
    """Every format of the table that the extension was built from, in the table's order."""
    choices = [(row["mode"], row["bits"], group) for row in _C.formats() for group in row["group_sizes"]]
    modes = [mode for mode, _, _ in choices]
    return tuple(Format(mode, bits, group, modes.count(mode) > 1) for mode, bits, group in choices)


def as_format(spec: Any) -> Format:
    """Resolve ``"affine_4_g64"``, ``"affine 4"``, ``"mxfp4"`` or ``("affine", 4, 64)`` to a format.

    A width or group size that is left out, or None, is 4 or 64 where the mode has it, else the first that the mode has.
    """
    if isinstance(spec, Format):
        return spec
    if isinstance(spec, str):
        modes = "|".join(sorted({re.escape(f.mode) for f in known_formats()}, key=len, reverse=True))
        match = re.fullmatch(rf"({modes})(?:[ _-]?(\d+))?(?:[ _-]?g(\d+))?", spec.strip())
        wanted = match.groups() if match else (None, None, None)
    elif isinstance(spec, tuple) and 1 <= len(spec) <= 3 and isinstance(spec[0], str):
        if not all(number is None or (isinstance(number, int) and not isinstance(number, bool)) for number in spec[1:]):
            raise TypeError(f"formats: bits and group size are integers, got {spec!r}")
        wanted = spec + (None,) * (3 - len(spec))
    else:
        raise TypeError(
            f"formats: each is a name such as 'affine_4_g64' or a tuple (mode, bits, group_size), got {spec!r}"
        )
    mode, bits, group = wanted
    fits = [
        f
        for f in known_formats()
        if f.mode == mode and (bits is None or f.bits == int(bits)) and (group is None or f.group_size == int(group))
    ]
    if not fits:
        raise ValueError(f"formats: unknown format {_spelled(spec)}; there are {_list_formats(known_formats())}")
    return min(fits, key=lambda f: (f.bits != DEFAULT_FORMAT[1], f.group_size != DEFAULT_FORMAT[2]))


def _spelled(spec: str | tuple[Any, ...]) -> str:
    """Spell what was asked for: a name as it is, of a tuple 'affine 9-bit g64' or what of that it has."""
    if isinstance(spec, str):
        return repr(spec)
    return " ".join(
        form.format(part) for form, part in zip(("{}", "{}-bit", "g{}"), spec, strict=False) if part is not None
    )


def _list_formats(formats: Sequence[Format]) -> str:
    """List formats, a mode at a time: 'affine (bits 1, 2, …; group sizes 32, 64, 128), mxfp4'."""
    texts = []
    for mode in dict.fromkeys(f.mode for f in formats):
        of_mode = [f for f in formats if f.mode == mode]
        bits = ", ".join(map(str, sorted({f.bits for f in of_mode})))
        groups = ", ".join(map(str, sorted({f.group_size for f in of_mode})))
        texts.append(f"{mode} (bits {bits}; group sizes {groups})" if of_mode[0].sized else mode)
    return ", ".join(texts)


def _is_one(specs: Any) -> bool:
    """Whether this is one format and no sequence of them; a tuple of a mode and numbers is one."""
    if not isinstance(specs, tuple):
        return isinstance(specs, (str, Format))
    return [type(part) for part in specs[:2]] == [str, int]


def as_formats(specs: Any) -> list[Format]:
    """Resolve the formats of a `report` call: one name, a sequence of them, or None for the default."""
    if specs is None:
        specs = [DEFAULT_FORMAT]
    formats = [as_format(spec) for spec in ([specs] if _is_one(specs) else specs)]
    if not formats:
        raise ValueError("formats: got none; leave it out for 'affine_4_g64'")
    return list(dict.fromkeys(formats))
