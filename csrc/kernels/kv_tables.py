"""Writes kv_tables.h: codebooks, their boundaries, signs and Hadamard matrices of the key-value cache.

``python csrc/kernels/kv_tables.py`` writes the header beside this file, with ``--check`` it compares instead and exits
with 1 if the header is not what this program writes. Only the standard library is needed.

The codebooks are the quantizers of least mean squared error for the standard normal distribution (S. P. Lloyd, Least
squares quantization in PCM, IEEE Trans. Inf. Theory 28, 1982; J. Max, Quantizing for minimum distortion, IRE Trans.
Inf. Theory 6, 1960): each value c_i is the mean of its cell, each boundary the middle between two values. Codec 1 is
that of the crate mlx-native, whose values at 5, 6 and 8 bits are those after a fixed number of Lloyd's steps and not
the optimum; codec 2 takes the optimum at every width, up to 6 bits with its values rounded to bfloat16, the upper two
bytes of a float32, which attention looks up in half the steps that four bytes take. Boundaries stay. The mean squared
error of a normal variable grows by what GROWTH says (0.03 % at 4 bits, 0.5 % at 6), which `header` checks.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import statistics
import struct
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

HEADER = Path(__file__).with_suffix(".h")

# The first 16 digits of SHA-256 of values and of boundaries as little-endian float32. Those of codec 1 are the digests
# of the crate's own tables; all are here so that a platform whose erfc is too coarse fails instead of writing others.
DIGESTS = {
    "2": ("6b3cafd715ba7e12", "5f5692692dd6b010"),
    "3": ("d04bf4a5e5e09cb7", "55fdd725bc9253d8"),
    "4": ("87562063faf1e769", "353bccb47eff2d4d"),
    "5_early": ("7480a54bdf3b8084", "7949f0dcd96caa38"),
    "6_early": ("98ba30b44dd4cfd8", "713de2f8f77ed28b"),
    "8_early": ("00d4d0f2551e2557", "b0f3329c7f30bad7"),
    "5": ("5f90b1e9f10459e0", "3f502def8ce01a43"),
    "6": ("f10be8bf6129a209", "82b97e7defef81dc"),
    "8": ("39ba7de4d4180579", "f87c12b330ae516d"),
}


def density(z: float) -> float:
    """Return the standard normal density."""
    return math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def cells(values: Sequence[float]) -> list[tuple[float, float, float]]:
    """Lower edge, upper edge and mean of the cells of the positive values of a symmetric codebook.

    The probability of a cell is a difference of erfc, which keeps its relative accuracy far out in the tail.
    """
    edges = [0.0, *itertools.starmap(middle, itertools.pairwise(values)), math.inf]
    return [(a, b, (density(a) - density(b)) / probability(a, b)) for a, b in itertools.pairwise(edges)]


def middle(a: float, b: float) -> float:
    """Return the boundary between two neighbours."""
    return (a + b) / 2


def probability(a: float, b: float) -> float:
    """Return how probably a standard normal variable lies between 0 <= a < b."""
    return (math.erfc(a / math.sqrt(2)) - math.erfc(b / math.sqrt(2))) / 2


def lloyd(values: Sequence[float], steps: int) -> list[float]:
    """Positive values after so many of Lloyd's steps: each becomes the mean of its cell."""
    for _ in range(steps):
        values = [mean for _, _, mean in cells(values)]
    return list(values)


def newton_step(values: Sequence[float]) -> list[float]:
    """One step of Newton's method on c_i - mean_i = 0, whose matrix is tridiagonal.

    The mean of a cell [a, b] of probability P moves with its edges as d mean/da = density(a) (mean - a)/P and
    d mean/db = density(b) (b - mean)/P, and an edge moves by half of what each neighbour does; the edges 0 and
    infinity stay.
    """
    lower, diagonal, upper, right = [], [], [], []
    for value, (a, b, mean) in zip(values, cells(values), strict=True):
        mass = probability(a, b)
        by_a = density(a) * (mean - a) / mass / 2 if a else 0.0
        by_b = density(b) * (b - mean) / mass / 2 if b < math.inf else 0.0
        lower.append(-by_a)
        diagonal.append(1 - by_a - by_b)
        upper.append(-by_b)
        right.append(mean - value)
    for i in range(1, len(right)):  # elimination, then back substitution
        factor = lower[i] / diagonal[i - 1]
        diagonal[i] -= factor * upper[i - 1]
        right[i] -= factor * right[i - 1]
    step = 0.0
    result = list(values)
    for i in reversed(range(len(right))):
        step = (right[i] - upper[i] * step) / diagonal[i]
        result[i] += step
    return result


def quantile(p: float) -> float:
    """Of the standard normal distribution; infinite at 1."""
    return statistics.NormalDist().inv_cdf(p) if p < 1 else math.inf


def converged(bits: int) -> list[float]:
    """Positive values of the optimum.

    The start has the density of points of the high-rate optimum, the cube root of the normal density: a normal
    distribution of variance 3.
    """
    size = 1 << bits
    values = [math.sqrt(3) * quantile((i + 0.5) / size) for i in range(size // 2, size)]
    for _ in range(60):
        previous, values = values, newton_step(values)
        if max(abs(a - b) for a, b in zip(values, previous, strict=True)) < 1e-13:
            break
    return values


def equiprobable(bits: int) -> list[float]:
    """Positive means of 2^bits cells of the same probability."""
    size = 1 << bits
    edges = [quantile(i / size) if i > size // 2 else 0.0 for i in range(size // 2, size + 1)]
    return [size * (density(a) - density(b)) for a, b in itertools.pairwise(edges)]


def uniform(bits: int) -> list[float]:
    """Positive middles of 2^bits cells of the same width in [-4, 4]."""
    size = 1 << bits
    return [-4 + 8 * (i + 0.5) / size for i in range(size // 2, size)]


RECIPES: dict[str, Callable[[], list[float]]] = {
    **{str(bits): (lambda bits=bits: converged(bits)) for bits in (2, 3, 4, 5, 6, 8)},
    "5_early": lambda: lloyd(equiprobable(5), 1000),
    "6_early": lambda: lloyd(equiprobable(6), 1000),
    "8_early": lambda: lloyd(uniform(8), 2000),
}


# Signs of the first 512 coordinates, bit j of the string at coordinate j, 1 for minus: mlx-native's table for head
# dimension 512, whose first half is its table for 256. Its origin is not documented; any fair coin would do.
SIGNS_512 = bytes.fromhex(
    "a73b91f46dc2580eb37f24d68945ea1c63afd852970be13d76c419fe4a852cdb"
    "d34ea8179c5be63172b90df5438a6ec7582f94e1b63d0a7cc561d84fa3971e85"
)

MAX_HEAD_DIM = 4096

# Bins of the grids per unit and to each side of 0. All boundaries lie within, and at most one in a bin.
BINS_PER_UNIT = 64
HALF_BINS = 5 * BINS_PER_UNIT

# The bin of z is taken from z BINS_PER_UNIT + HALF_BINS in float32, in units of a bin rounded by 2^-15 at most.
CLEARANCE = 4 * 2**-15 / BINS_PER_UNIT


def as_float32(text: str) -> float:
    """Return the float32 that a decimal stands for."""
    return float(struct.unpack("<f", struct.pack("<f", float(text)))[0])


# The mean squared error of rounded values, relative to that of the optimum, is at most 1 plus this.
GROWTH = {"2": 2e-5, "3": 8e-5, "4": 3e-4, "5": 1e-3, "6": 5e-3}


def as_bfloat16(text: str) -> float:
    """Return the bfloat16 nearest to the float32 that a decimal stands for, of two the one whose last bit is 0."""
    bits = struct.unpack("<I", struct.pack("<f", float(text)))[0]
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return float(struct.unpack("<f", struct.pack("<I", rounded))[0])


def squared_error(values: Sequence[float], boundaries: Sequence[float]) -> float:
    """Mean squared error of a standard normal variable that becomes the value of its cell."""
    half = len(values) // 2
    edges = [*boundaries[half - 1 :], math.inf]
    total = 0.0
    for value, (a, b) in zip(values[half:], itertools.pairwise(edges), strict=True):
        mass = probability(a, b)
        tail = 0.0 if b == math.inf else b * density(b)
        square, mean = mass + a * density(a) - tail, density(a) - density(b)  # of z^2 and z over the cell
        total += 2 * (square - 2 * value * mean + value * value * mass)
    return total


def rounded_values(name: str, values: list[str], boundaries: list[str]) -> list[float]:
    """Values as bfloat16, after a check of what this costs."""
    rounded, edges = list(map(as_bfloat16, values)), list(map(float, boundaries))
    growth = squared_error(rounded, edges) / squared_error(list(map(float, values)), edges) - 1
    if not 0 <= growth <= GROWTH[name]:
        raise ValueError(f"codebook {name}: rounded values err {growth:.2e} more")
    return rounded


def codebook(name: str) -> tuple[list[str], list[str]]:
    """Values and boundaries in decimals: both rounded to seven places, the boundaries from unrounded values."""
    half = RECIPES[name]()
    values = [-c for c in reversed(half)] + half
    boundaries = list(itertools.starmap(middle, itertools.pairwise(values)))
    texts = [[f"{number:.7f}" for number in numbers] for numbers in (values, boundaries)]
    for kind, expected in zip(texts, DIGESTS[name], strict=True):
        digest = hashlib.sha256(struct.pack(f"<{len(kind)}f", *map(float, kind))).hexdigest()[:16]
        if digest != expected:
            raise ValueError(f"codebook {name}: digest {digest} instead of {expected}")
    return texts[0], texts[1]


def grid(name: str, boundaries: list[str]) -> list[int]:
    """For each bin, how many boundaries lie below its lower edge.

    The code of z in that bin is this number, plus 1 if the boundary of this number lies below z as well. But for 0,
    which is an edge itself, no boundary is so near to one that float32 rounds what lies between them to another bin.
    """
    exact = list(map(as_float32, boundaries))
    edges = [k / BINS_PER_UNIT for k in range(-HALF_BINS, HALF_BINS + 1)]
    below = [sum(b < edge for b in exact) for edge in edges]
    if any(b and abs(b - round(b * BINS_PER_UNIT) / BINS_PER_UNIT) < CLEARANCE for b in exact):
        raise ValueError(f"codebook {name}: a boundary too near to an edge of a bin")
    if below[0] or below[-1] != len(exact) or any(b - a > 1 for a, b in itertools.pairwise(below)):
        raise ValueError(f"codebook {name}: two boundaries in one bin, or one outside of all bins")
    return below[:-1]


def signs() -> bytes:
    """Of all coordinates: the crate's, then the upper bytes of a linear congruential generator (Numerical Recipes)."""
    state, rest = 512, bytearray()
    while 8 * (len(SIGNS_512) + len(rest)) < MAX_HEAD_DIM:
        state = (1664525 * state + 1013904223) % 2**32
        rest.append(state >> 24)
    return SIGNS_512 + bytes(rest)


def character_of(q: int) -> Callable[[int, int], int]:
    """Character of a difference in the field of 5, 9 or 13 elements: 0 of zero, 1 of a square, -1 of the others.

    The nine elements are a + b i over the integers mod 3 with i^2 = -1, numbered 3 a + b.
    """

    def subtract(x: int, y: int) -> int:
        return (x // 3 - y // 3) % 3 * 3 + (x - y) % 3 if q == 9 else (x - y) % q

    def square(x: int) -> int:
        a, b = divmod(x, 3)
        return (a * a - b * b) % 3 * 3 + 2 * a * b % 3 if q == 9 else x * x % q

    squares = {square(x) for x in range(1, q)}
    return lambda x, y: 0 if x == y else 1 if subtract(x, y) in squares else -1


def hadamard(order: int) -> list[list[int]]:
    """Symmetric matrix of +-1 whose rows are orthogonal: Paley's second construction for q = order/2 - 1.

    With C the symmetric conference matrix of order q + 1, it is C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]]
    (R. E. A. C. Paley, On orthogonal matrices, J. Math. Phys. 12, 1933).
    """
    q = order // 2 - 1
    character = character_of(q)
    conference = [[0] + [1] * q] + [[1] + [character(x, y) for y in range(q)] for x in range(q)]
    rows = [
        [
            c * (-1 if i % 2 and j % 2 else 1) if (c := conference[i // 2][j // 2]) else (-1 if i % 2 or j % 2 else 1)
            for j in range(order)
        ]
        for i in range(order)
    ]
    for i, j in itertools.product(range(order), repeat=2):
        if rows[i][j] != rows[j][i] or sum(map(int.__mul__, rows[i], rows[j])) != order * (i == j):
            raise ValueError(f"Hadamard matrix of order {order}: row {i}, column {j}")
    return rows


def c_array(declaration: str, items: Sequence[object]) -> str:
    """Definition of a constant array."""
    lines = textwrap.wrap(", ".join(map(str, items)), width=116)
    return f"static const {declaration} = {{\n" + "".join(f"    {line}\n" for line in lines) + "};\n"


HEAD = f"""\
/* Codebooks, signs and Hadamard matrices of the key-value cache. Written by kv_tables.py, which derives them all:
 * change that and run it.
 *
 * qz_kv_values_<bits>: the values of the codes, rising; qz_kv_boundaries_<bits>: what lies between them, then infinity.
 * The code of z is the number of boundaries strictly below it. With _early or _unrounded: codec 1's, with codec 2's
 * boundaries at 4 bits; without: codec 2's. qz_kv_grid_<bits>[k]: how many boundaries lie below the lower edge
 * (k - QZ_KV_HALF_BINS) / QZ_KV_BINS_PER_UNIT of bin k, which holds at most one; with zeros behind, so that four bytes
 * may be read anywhere.
 * qz_kv_signs: bit j % 8 of byte j / 8 is set where coordinate j changes its sign.
 * qz_kv_hadamard_<n>: bit t of row r is set where the symmetric matrix holds -1. */
#ifndef QZ_KV_TABLES_H
#define QZ_KV_TABLES_H

#include <math.h>
#include <stdint.h>

enum {{ QZ_KV_BINS_PER_UNIT = {BINS_PER_UNIT}, QZ_KV_HALF_BINS = {HALF_BINS} }};

/* clang-format off */
"""

FOOT = """\
/* clang-format on */

#endif
"""


def header() -> str:
    """Return the whole header."""
    parts = []
    for name in RECIPES:
        values, boundaries = codebook(name)
        size = len(values)
        unrounded = c_array(f"float qz_kv_values_{name}[{size}]", [f"{text}f" for text in values])
        if name in GROWTH:
            rounded = [f"{value}f" for value in rounded_values(name, values, boundaries)]
            parts.append(c_array(f"float qz_kv_values_{name}[{size}]", rounded))
            if name == "4":
                parts.append(unrounded.replace("values_4", "values_4_unrounded"))
        else:
            parts.append(unrounded)
        edges = [f"{text}f" for text in boundaries] + ["INFINITY"]
        parts.append(c_array(f"float qz_kv_boundaries_{name}[{size}]", edges))
        if size > 64:
            bins = grid(name, boundaries)
            parts.append(c_array(f"uint8_t qz_kv_grid_{name}[2 * QZ_KV_HALF_BINS + 4]", bins))
    parts.append(c_array(f"uint8_t qz_kv_signs[{MAX_HEAD_DIM // 8}]", [f"0x{byte:02x}" for byte in signs()]))
    for order in (12, 20, 28):
        rows = [sum((entry < 0) << t for t, entry in enumerate(row)) for row in hadamard(order)]
        parts.append(c_array(f"uint32_t qz_kv_hadamard_{order}[{order}]", [f"0x{row:07x}" for row in rows]))
    return HEAD + "\n".join(parts) + FOOT


def main() -> int:
    """Write the header, or compare it."""
    text = header()
    if sys.argv[1:] == ["--check"]:
        if HEADER.read_text() == text:
            return 0
        print(f"{HEADER.name} is not what {Path(__file__).name} writes", file=sys.stderr)
        return 1
    HEADER.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
