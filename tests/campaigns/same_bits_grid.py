"""Compare the bytes of matrix products over formats x groups x types x instruction sets x threads x M, all of them.

    python tests/campaigns/same_bits_grid.py

Every combination is compared with scalar C on one thread with all rows of x at once. Inputs are made of integers, the
same on every machine, so that the digests, one for each format over all its products, are too. A difference is printed
and the exit status is 1. `same_bits.py` goes on for as long as wanted with random shapes, offsets and special values.
"""

import argparse
import hashlib
import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import quantization
import reference
from campaigns.rounds import MismatchError, available_isas
from campaigns.same_bits import ALONG_K, KINDS, OPERATIONS, compare


class Grid(NamedTuple):
    """What is combined: x's types with those of the scales and `activations`, and sizes N and K of matrices.

    Of the two, the one along which codes are packed is rounded up to whole groups.
    """

    operations: tuple[str, ...]
    kinds: tuple[tuple[str, str, str | None], ...]
    rows: tuple[int, ...]
    threads: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]


def _kinds(scales):
    exact = [(kind, scale_kind, None) for kind in KINDS for scale_kind in scales(kind)]
    return (*exact, *((kind, kind, "int8") for kind in KINDS))


# Rows on both sides of where kernels change, tiles end and batches are split. Sizes with tails in either axis; the
# second K is longer than x's planes may be to stay in the nearest cache.
WHOLE = Grid(
    OPERATIONS,
    _kinds(lambda kind: KINDS),
    (1, 2, 3, 4, 5, 7, 8, 13, 14, 15, 16, 17, 31, 32, 33, 100),
    (1, 2, 3, 8),
    ((75, 640), (9, 9000)),
)
QUICK = Grid(
    ("qmm_t", "qmm_n"),
    _kinds(lambda kind: dict.fromkeys((kind, "float32"))),
    (1, 3, 14, 33),
    (1, 3),
    ((35, 200),),
)


def mixed(seed, *shape):
    """64 pseudo-random bits for each element: Steele, Lea, Flood: Fast splittable pseudorandom number generators."""
    z = np.arange(1, 1 + np.prod(shape), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(seed * 0x632BE59BD9B4E019 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ z >> np.uint64(shift)) * np.uint64(factor)
    return (z ^ z >> np.uint64(31)).reshape(shape)


def fractions(bits):
    """Multiples of 2^-23 from -1 on, below 1: exact in float32."""
    return ((bits >> np.uint64(40)).astype(np.float32) - np.float32(2**23)) * np.float32(2.0**-23)


class Case(NamedTuple):
    """A product: what it is called with, and how many rows of x there are."""

    name: str
    arrays: tuple[np.ndarray, ...]
    keywords: dict
    label: str

    def run(self, isa, threads, rows):
        """The product of the first rows of x."""
        x, *stored = self.arrays
        with quantization.isa(isa), quantization.threads(threads):
            return getattr(quantization, self.name)(x[:rows], *stored, **self.keywords)


def stored_affine(bits, group_size, scale_kind, lines, packed):
    """Codes, scales and biases of [lines, packed] weights."""
    groups = packed // group_size
    codes = (mixed(2, lines, packed) >> np.uint64(32)).astype(np.uint8) & np.uint8(2**bits - 1)
    scales = (fractions(mixed(3, lines, groups)) + np.float32(1.25)) * np.float32(2.0**-8)
    biases = fractions(mixed(4, lines, groups)) * np.float32(2.0**-5)
    return codes, *(reference.round_to(array, scale_kind) for array in (scales, biases))


def stored_fp(row, group_size, lines, packed):
    """Codes and scales: numbers of all sizes that nvfp4's scales have, of 2^-20 to 2^11 for the others."""
    codes = (mixed(2, lines, packed) >> np.uint64(32)).astype(np.uint8) & np.uint8(2 ** row["bits"] - 1)
    if row["mode"] == "mxfp8":
        codes[codes & 127 == 127] -= 1  # a single NaN would take the place of its whole row of results
    scales = (mixed(3, lines, packed // group_size) >> np.uint64(32)).astype(np.uint8)
    scales = scales % np.uint8(127) | scales & np.uint8(128) if row["mode"] == "nvfp4" else scales % np.uint8(32) + 107
    return codes, scales.astype(np.uint8)


def case_of(operation, kinds, row, group_size, size, rows):
    """Make the arrays of a product from integers alone."""
    kind, scale_kind, activations = kinds
    lines, least = size if operation in ALONG_K else reversed(size)
    packed = -(-least // group_size) * group_size
    k = packed if operation in ALONG_K else lines
    wild = mixed(1, rows, k)
    x = fractions(wild) * np.where(wild % np.uint64(61) == 0, np.float32(2**12), np.float32(1))
    if row["family"] == "fp":
        codes, *stored = stored_fp(row, group_size, lines, packed)
        keywords, what = {}, row["name"]
    else:
        codes, *stored = stored_affine(row["bits"], group_size, scale_kind, lines, packed)
        keywords, what = {"group_size": group_size, "bits": row["bits"]}, f"{row['bits']} bits, groups of {group_size}"
    keywords |= {"input_dtype": "bfloat16"} if "bfloat16" in (kind, scale_kind) else {}
    keywords |= {"activations": activations} if activations else {}
    arrays = (reference.round_to(x, kind), reference.pack(codes, row["bits"]), *stored)
    name = f"{row['mode']}_{operation}"
    return Case(name, arrays, keywords, f"{name}, {what}, x {kind}{x.shape}, scales {scale_kind}, {activations}")


def kinds_for(row, kinds):
    """Those of the grid that a format has: the types of fp scales are one, and mxfp8 rounds no x to int8."""
    if row["family"] == "affine":
        return kinds
    return [one for one in kinds if one[0] == one[1] and not (one[2] and row["mode"] == "mxfp8")]


def check(case, grid, isas):
    """Compare all combinations of a product; return the expected bytes and how many there were."""
    expected = case.run("generic", 1, max(grid.rows))
    count = 0
    for isa, threads, rows in itertools.product(isas, grid.threads, grid.rows):
        where = f"{case.label}\nisa {isa}, {threads} threads, {rows} rows"
        compare(where, case.run(isa, threads, rows), expected[:rows])
        count += 1
    return np.ascontiguousarray(expected).astype(expected.dtype.newbyteorder("<")).tobytes(), count


def check_format(row, grid, isas):
    """Return the digest of a format's products and the number of combinations compared."""
    digest, count = hashlib.sha256(), 0
    cells = itertools.product(sorted(row["group_sizes"]), grid.operations, kinds_for(row, grid.kinds), grid.sizes)
    for group_size, operation, kinds, size in cells:
        case = case_of(operation, kinds, row, group_size, size, max(grid.rows))
        expected, compared = check(case, grid, isas)
        digest.update(expected)
        count += compared
    return digest.hexdigest()[:16], count


def main(arguments=None):
    """Print a line for each format; return the digests by format."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer types, rows, threads, operations and sizes")
    parser.add_argument("--format", action="append", help="only this one; may be given several times")
    options = parser.parse_args(arguments)
    grid = QUICK if options.quick else WHOLE
    isas = available_isas()
    digests, total = {}, 0
    try:
        for row in quantization._C.formats():
            if options.format and row["name"] not in options.format:
                continue
            digests[row["name"]], count = check_format(row, grid, isas)
            print(f"{row['name']}: {count} combinations, digest {digests[row['name']]}", flush=True)
            total += count
    except MismatchError as difference:
        sys.exit(f"same_bits_grid: {difference}")
    print(f"{total} combinations on {', '.join(isas)}: identical")
    return digests


if __name__ == "__main__":
    main()
