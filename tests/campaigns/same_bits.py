"""Compare the bytes of all matrix products over ISAs, threads, rows, batches and alignments with those of scalar C.

    python tests/campaigns/same_bits.py --seconds 60

Each case is a random product; every fifth small one is compared with tests/reference.py as well. A difference is
printed with what reproduces it, and the exit status is 1.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import quantization
import reference

OPERATIONS = ("affine_qmm_t", "affine_qmm_n", "affine_qmv", "affine_qvm")
KINDS = ("float32", "float16", "bfloat16")
LARGEST = {"float32": 3.4e38, "float16": 65504.0, "bfloat16": 3.38e38}
MAX_ROWS, MAX_THREADS = 19, 8
QUICK_CASES = 40


class MismatchError(Exception):
    """The first bytes found to differ."""


class Seen:
    """What the campaign has covered, for its last line."""

    def __init__(self):
        self.cases, self.isas, self.threads, self.rows = 0, [], set(), set()

    def __str__(self):
        threads, rows = (f"{min(numbers)}…{max(numbers)}" for numbers in (self.threads, self.rows))
        return f"{self.cases} cases, ISAs {', '.join(self.isas)}, threads {threads}, M {rows}: identical"


# ---------------------------------------------------------------------------------------------------------------------
# Inputs


def random_values(rng, shape, kind):
    """float64 values of one of several distributions; now and then with NaN and Inf."""
    normal = rng.standard_normal(shape)
    values = {
        "normal": lambda: normal,
        "outliers": lambda: normal * np.where(rng.random(shape) < 0.01, 1e5, 1),
        "spread": lambda: normal * np.exp2(rng.uniform(-40, 40, shape)),
        "sparse": lambda: normal * (rng.random(shape) < 0.02),
        "tiny": lambda: normal * rng.choice([1e-7, 1e-38, 1e-41]),
        "huge": lambda: rng.choice([-1, 1], shape) * LARGEST[kind],
        "few levels": lambda: rng.choice(np.ldexp([-1.0, 1.0], rng.integers(-8, 8)) * 32639, shape),
    }
    names = list(values)
    x = np.clip(values[rng.choice(names, p=[0.4] + [0.1] * 6)](), -LARGEST[kind], LARGEST[kind])
    if x.size and rng.random() < 0.1:
        places = rng.integers(0, x.size, 1 + x.size // 1000)
        x.flat[places] = rng.choice([np.nan, np.inf, -np.inf], places.size)
    return x


def random_case(rng):
    """Arguments of one product: float arrays as stored, words, keywords, and the number of digits."""
    formats = [row for row in quantization._C.formats() if row["family"] == "affine"]
    row = formats[rng.integers(len(formats))]
    bits, group_size = row["bits"], int(rng.choice(row["group_sizes"]))
    operation, kind, scale_kind = rng.choice(OPERATIONS), rng.choice(KINDS), rng.choice(KINDS)
    m, groups = int(rng.integers(1, MAX_ROWS + 1)), int(rng.integers(1, 1 + rng.choice([3, 40]) * 64 // group_size))
    other = int(rng.integers(1, rng.choice([20, 300])))
    packed_along_k = operation in ("affine_qmm_t", "affine_qmv")
    k = groups * group_size if packed_along_k else other
    codes = rng.integers(0, 2**bits, (other, groups * group_size), dtype=np.uint8)
    if rng.random() < 0.2:
        codes[...] = rng.choice([0, 2**bits - 1], (other, 1))
    with np.errstate(all="ignore"):
        x = reference.round_to(random_values(rng, (m, k), kind), kind)
        stored = [reference.round_to(random_values(rng, (other, groups), scale_kind), scale_kind) for _ in range(2)]
    keywords = {"group_size": group_size, "bits": bits}
    if "bfloat16" in (kind, scale_kind):
        keywords["input_dtype"] = "bfloat16"
    if rng.random() < 0.2:
        keywords["activations"] = "int8"
    digits = 1 if "activations" in keywords else 3 if kind == "float32" else 2
    return operation, (kind, scale_kind, digits), (x, codes, *stored), keywords


def at_offset(array, offset):
    """A copy that starts `offset` bytes after a 64-byte border."""
    memory = np.empty(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


# ---------------------------------------------------------------------------------------------------------------------
# Comparison


def compare(what, ours, expected):
    """Raise MismatchError unless shape and bytes are equal."""
    if ours.shape != expected.shape or ours.dtype != expected.dtype:
        raise MismatchError(f"{what}: {ours.dtype}{ours.shape}, expected {expected.dtype}{expected.shape}")
    a, b = (np.ascontiguousarray(array).view(f"u{expected.itemsize}") for array in (ours, expected))
    different = np.argwhere(a != b)
    if len(different):
        index = tuple(map(int, different[0]))
        raise MismatchError(
            f"{what}, y{list(index)}: {a[index]:#x}, expected {b[index]:#x} ({len(different)} of {a.size} differ)"
        )


def compare_with_reference(operation, kinds, arrays, keywords, expected):
    kind, scale_kind, digits = kinds
    x, codes, scales, biases = arrays
    by_name = {"affine_qmm_t": reference.qmm_t_bits, "affine_qmv": reference.qmm_t_bits}
    bits_of = by_name.get(operation, reference.qmm_n_bits)
    x, scales, biases = reference.to_f32(x, kind), *(reference.to_f32(a, scale_kind) for a in (scales, biases))
    y = bits_of(x, codes, scales, biases, keywords["group_size"], keywords["bits"], digits)
    compare("the definition", expected, reference.round_to(y, kind if kind == scale_kind else "float32"))


def compare_everywhere(rng, operation, arrays, keywords, expected, seen):
    """On every ISA: all rows, some of them, and one as a vector, with random numbers of threads and alignments."""
    function = getattr(quantization, operation)
    m = len(arrays[0])
    for name in seen.isas:
        for part in (slice(0, m), slice(0, int(rng.integers(1, m + 1))), int(rng.integers(m))):
            threads, offsets = int(rng.integers(1, MAX_THREADS + 1)), rng.integers(0, 64, 4)
            moved = [at_offset(a, offset) for a, offset in zip(arrays, offsets, strict=True)]
            with quantization.isa(name), quantization.threads(threads):
                y = function(moved[0][part], *moved[1:], **keywords)
            compare(f"isa {name}, {threads} threads, rows {part}, offsets {offsets.tolist()}", y, expected[part])
            seen.threads.add(threads)
            seen.rows.add(y.size // expected.shape[1])
    seen.cases += 1


def check(seed, i, seen):
    """The i-th case of a seed."""
    rng = np.random.default_rng([seed, i])
    operation, kinds, arrays, keywords = random_case(rng)
    x, codes, scales, biases = arrays
    words = reference.pack(codes, keywords["bits"])
    try:
        with quantization.isa("generic"), quantization.threads(1):
            expected = getattr(quantization, operation)(x, words, scales, biases, **keywords)
        if i % 5 == 0 and codes.size * len(x) < 1 << 20:
            compare_with_reference(operation, kinds, arrays, keywords, expected)
        compare_everywhere(rng, operation, (x, words, scales, biases), keywords, expected, seen)
    except MismatchError as difference:
        where = f"--seed {seed} --first {i}: {operation}, x {kinds[0]}{x.shape}, scales {kinds[1]}, {keywords}"
        raise MismatchError(f"{where}\n{difference}") from None


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="how long to go on (default 60)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_CASES} cases instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="case to begin with, to reproduce one")
    options = parser.parse_args(arguments)
    seen = Seen()
    seen.isas = [entry["name"] for entry in reversed(quantization._C.isas()) if entry["available"]]
    end, i = time.monotonic() + options.seconds, options.first
    try:
        while seen.cases < QUICK_CASES if options.quick else seen.cases == 0 or time.monotonic() < end:
            check(options.seed, i, seen)
            i += 1
    except MismatchError as difference:
        sys.exit(f"same_bits: {difference}")
    print(seen)


if __name__ == "__main__":
    main()
