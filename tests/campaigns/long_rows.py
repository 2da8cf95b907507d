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
import quantization
import reference
import reference_fp
from campaigns.rounds import MismatchError
from campaigns.same_bits import compare

DIGITS = {"float32": 3, "bfloat16": 2, "int8": 1}
ROWS = 9  # more than are multiplied one by one; the first is compared with the exact sum
LONGEST = 2**20


def sizes(transpose, group_size, length):
    """Rows and columns of the weights. With groups along N they are a group wide, and shorter for that."""
    return (2, length // group_size * group_size) if transpose else (length // 8 + 1, group_size)


def largest_of(p, kind):
    """The largest x of p digits, for the types of x."""
    return {3: 2.0**p - 1, 2: 32512.0, 1: 127.0}[DIGITS[kind]]  # bfloat16 has eight bits


class Affine:
    """Products in an affine format: random ones, and those at the limits, where all terms are the largest of a sign."""

    def __init__(self, row, group_size, transpose, kind):
        self.bits, self.group_size, self.transpose, self.digits = row["bits"], group_size, transpose, DIGITS[kind]
        p, _ = reference.number_format(min(group_size, 64) if transpose else 64, self.bits, self.digits)
        self.largest = largest_of(p, kind)
        self.keywords = {"group_size": group_size, "bits": self.bits}

    def limits(self, rng, shape, groups):
        codes = np.full(shape, 2**self.bits - 1, np.uint8)
        codes[: shape[0] // 2 if self.transpose else 0] = 0
        return codes, *self._stored(np.full(groups, 0.3))

    def random(self, rng, shape, groups):
        codes = rng.integers(0, 2**self.bits, shape, dtype=np.uint8)
        return codes, *self._stored(rng.uniform(0.5, 1.5, groups))

    def _stored(self, scales):
        return (a.astype(np.float32) for a in (scales, -scales * 2 ** (self.bits - 1)))

    def exact(self, x, *stored):
        return reference.exact64(x, *stored, self.group_size, self.transpose)

    def bound(self, x, *stored):
        bound_of = reference.bound_t if self.transpose else reference.bound_n
        return bound_of(x, *stored, self.group_size, self.bits, self.digits)

    def weights(self, *stored):
        return reference.weights64(*stored, self.group_size)


class Fp:
    """The same in a format of small floats. At the limits, all codes are the largest number or its negative."""

    def __init__(self, row, group_size, transpose, kind):
        self.mode, self.bits, self.transpose, self.digits = row["mode"], row["bits"], transpose, DIGITS[kind]
        if self.mode == "mxfp8":
            p = 24
        else:
            p = reference_fp.precision_t(self.mode, self.digits) if transpose else reference_fp.precision_n(self.digits)
        self.largest = largest_of(p, kind)
        self.keywords = {}

    def limits(self, rng, shape, groups):
        sign = 2 ** (self.bits - 1)
        codes = np.full(shape, {"mxfp8": 0x7E}.get(self.mode, 7), np.uint8)
        codes[: shape[0] // 2 if self.transpose else 0] |= np.uint8(sign)
        return codes, np.full(groups, 0x2B if self.mode == "nvfp4" else 125, np.uint8)

    def random(self, rng, shape, groups):
        codes = rng.integers(0, 2**self.bits, shape, dtype=np.uint8)
        if self.mode == "mxfp8":
            codes[codes & 127 == 127] -= 1
        middle = 0x38 if self.mode == "nvfp4" else 127
        return codes, (middle + rng.integers(-3, 4, groups)).astype(np.uint8)

    def exact(self, x, *stored):
        return reference_fp.exact(x, *stored, self.mode, self.transpose)

    def bound(self, x, *stored):
        return reference_fp.bound(x, *stored, self.mode, self.transpose, self.digits)

    def weights(self, *stored):
        return reference_fp.weights32(*stored, self.mode).astype(np.float64)


FAMILIES = {"affine": Affine, "fp": Fp}


def errors(product, x, y, y_kind, *stored):
    """The largest error of a result that was rounded to a type, as a part of its bound, and of sum |w x|."""
    exact = product.exact(x, *stored)
    bound = product.bound(x, *stored)
    if y_kind != "float32":
        bound = bound + reference.half_ulp(np.abs(exact) + bound, y_kind)
    error = np.abs(y.astype(np.float64) - exact)
    if not (error <= bound).all():
        raise MismatchError(f"the error is {(error / bound).max():.3g} of the bound")
    weights = np.abs(product.weights(*stored))
    size = np.abs(x.astype(np.float64)) @ (weights.T if product.transpose else weights)
    return (error / bound).max(), (error / size).max()


def check(row, transpose, kind, group_size, family, length):
    """Returns the largest error of the first row as a part of its bound, and of sum |w x|."""
    rng = np.random.default_rng([transpose, row["bits"], group_size])
    product, shape = FAMILIES[row["family"]](row, group_size, transpose, kind), sizes(transpose, group_size, length)
    k, groups = shape[transpose], (shape[0], shape[1] // group_size)
    codes, *scales = (product.limits if family == "limits" else product.random)(rng, shape, groups)
    if family == "limits":
        x = np.outer(rng.choice([-product.largest, product.largest], ROWS), np.ones(k))
    else:
        x = rng.standard_normal((ROWS, k)) * np.where(rng.random((ROWS, k)) < 0.001, 1e5, 1)
    stored = "float32" if kind == "int8" else kind
    x = reference.round_to(x, stored)
    function = getattr(quantization, f"{row['mode']}_{'qmm_t' if transpose else 'qmm_n'}")
    keywords = dict(product.keywords)
    if kind != "float32":
        keywords |= {"activations": "int8"} if kind == "int8" else {"input_dtype": "bfloat16"}
    inputs = (x, reference.pack(codes, row["bits"]), *scales)
    with quantization.isa("generic"):
        expected = function(*inputs, **keywords)
    for isa, rows in itertools.product([i["name"] for i in quantization._C.isas() if i["available"]], (1, ROWS)):
        with quantization.isa(isa):
            compare(f"isa {isa}, {rows} rows", function(inputs[0][:rows], *inputs[1:], **keywords), expected[:rows])
    y_kind = "float32" if row["family"] == "affine" else stored
    return errors(
        product, reference.to_f32(x[:1], stored), reference.to_f32(expected[:1], y_kind), y_kind, codes, *scales
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=LONGEST, help=f"K (default {LONGEST})")
    parser.add_argument("--format", action="append", help="affine_2, mxfp4 and so on; all unless given")
    options = parser.parse_args(arguments)
    formats = [row for row in quantization._C.formats() if not options.format or row["name"] in options.format]
    for row, transpose, family in itertools.product(formats, (True, False), ("outliers", "limits")):
        largest = (0.0, 0.0)
        kinds = [kind for kind in DIGITS if kind != "int8" or row["mode"] != "mxfp8"]
        for group_size, kind in itertools.product(row["group_sizes"], kinds):
            what = f"{row['name']}, groups of {group_size}, {'t' if transpose else 'n'}, {kind}, {family}"
            try:
                parts = check(row, transpose, kind, group_size, family, options.length)
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
