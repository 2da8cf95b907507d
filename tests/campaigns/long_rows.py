"""Compare long sums, K up to 2^20, with scalar C to the byte and with exact sums to within the derived bound.

    python tests/campaigns/long_rows.py

Every format, both layouts and every type of x: with outliers of 1e5, and with codes and x at their limits all along.
The largest error is printed for each as a part of its bound and of sum |w x|; a difference, or an error beyond the
bound, is printed with what it was and the exit status is 1. Takes about a quarter of an hour.
"""

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from same_bits import MismatchError, compare

import quantization
import reference

DIGITS = {"float32": 3, "bfloat16": 2, "int8": 1}
ROWS = 9  # more than are multiplied one by one; the first is compared with the exact sum
LONGEST = 2**20


def sizes(transpose, group_size, length):
    """Rows and columns of the weights. With groups along N they are a group wide, and shorter for that."""
    return (2, length // group_size * group_size) if transpose else (length // 8 + 1, group_size)


def random_product(rng, family, shape, transpose, bits, group_size, digits):
    """float64 x, codes, scales and biases. At the limits, all products of a sum are the largest and have one sign."""
    k, groups = shape[transpose], (shape[0], shape[1] // group_size)
    codes = rng.integers(0, 2**bits, shape, dtype=np.uint8)
    if family == "limits":
        codes[...] = 2**bits - 1
        codes[: shape[0] // 2 if transpose else 0] = 0
        p, _ = reference.number_format(min(group_size, 64) if transpose else 64, bits, digits)
        largest = {3: 2.0**p - 1, 2: 32512.0, 1: 127.0}[digits]  # bfloat16 has eight bits
        x, scales = np.outer(rng.choice([-largest, largest], ROWS), np.ones(k)), np.full(groups, 0.3)
    else:
        x = rng.standard_normal((ROWS, k)) * np.where(rng.random((ROWS, k)) < 0.001, 1e5, 1)
        scales = rng.uniform(0.5, 1.5, groups)
    return x, codes, scales, -scales * 2 ** (bits - 1)


def check(transpose, kind, bits, group_size, family, length):
    """Returns the largest error of the first row as a part of its bound, and of sum |w x|."""
    rng = np.random.default_rng([transpose, bits, group_size])
    shape = sizes(transpose, group_size, length)
    stored = "float32" if kind == "int8" else kind
    arrays = random_product(rng, family, shape, transpose, bits, group_size, DIGITS[kind])
    x = reference.to_f32(reference.round_to(arrays[0], stored), stored)
    codes, (scales, biases) = arrays[1], (a.astype(np.float32) for a in arrays[2:])
    function = quantization.affine_qmm_t if transpose else quantization.affine_qmm_n
    keywords = {"group_size": group_size, "bits": bits}
    if kind != "float32":
        keywords |= {"activations": "int8"} if kind == "int8" else {"input_dtype": "bfloat16"}
    inputs = (reference.round_to(x, stored), reference.pack(codes, bits), scales, biases)
    with quantization.isa("generic"):
        expected = function(*inputs, **keywords)
    for isa, rows in itertools.product([i["name"] for i in quantization._C.isas() if i["available"]], (1, ROWS)):
        with quantization.isa(isa):
            compare(f"isa {isa}, {rows} rows", function(inputs[0][:rows], *inputs[1:], **keywords), expected[:rows])
    bound_of = reference.bound_t if transpose else reference.bound_n
    exact = reference.exact64(x[:1], codes, scales, biases, group_size, transpose)
    bound = bound_of(x[:1], codes, scales, biases, group_size, bits, DIGITS[kind])
    error = np.abs(expected[:1].astype(np.float64) - exact)
    if not (error <= bound).all():
        raise MismatchError(f"the error is {(error / bound).max():.3g} of the bound")
    weights = np.abs(reference.weights64(codes, scales, biases, group_size))
    size = np.abs(x[:1].astype(np.float64)) @ (weights.T if transpose else weights)
    return (error / bound).max(), (error / size).max()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=LONGEST, help=f"K (default {LONGEST})")
    parser.add_argument("--format", action="append", help="affine_2 and so on; all unless given")
    options = parser.parse_args(arguments)
    affine = [row for row in quantization._C.formats() if row["family"] == "affine"]
    formats = [row for row in affine if not options.format or row["name"] in options.format]
    for row, transpose, family in itertools.product(formats, (True, False), ("outliers", "limits")):
        largest = (0.0, 0.0)
        for group_size, kind in itertools.product(row["group_sizes"], DIGITS):
            what = f"{row['name']}, groups of {group_size}, {'t' if transpose else 'n'}, {kind}, {family}"
            try:
                parts = check(transpose, kind, row["bits"], group_size, family, options.length)
            except MismatchError as difference:
                sys.exit(f"long_rows: {what}: {difference}")
            largest = tuple(map(max, largest, parts))
        layout = "t" if transpose else "n"
        print(
            f"{row['name']} {layout} {family}: {largest[0]:.2g} of the bound, {largest[1]:.1e} of sum |w x|", flush=True
        )
    print(f"K = {options.length}: identical, all within the bound")


if __name__ == "__main__":
    main()
