"""Compare the bytes of all matrix products over ISAs, threads, rows, batches and alignments with those of scalar C.

    python tests/campaigns/same_bits.py --seconds 60

Each case is a random product in a random format; every fifth small one is compared with tests/reference.py, or
reference_fp.py, as well. A difference is printed with what reproduces it, and the exit status is 1.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import quantization
import reference
import reference_fp
from campaigns.rounds import MismatchError, available_isas, go_on

OPERATIONS = ("qmm_t", "qmm_n", "qmv", "qvm")
ALONG_K = ("qmm_t", "qmv")
KINDS = ("float32", "float16", "bfloat16")
LARGEST = {"float32": 3.4e38, "float16": 65504.0, "bfloat16": 3.38e38}
MAX_ROWS, MAX_THREADS = 19, 8
QUICK_CASES = 60


class Seen:
    """What the campaign has covered, for its last line."""

    def __init__(self):
        self.cases, self.isas, self.threads, self.rows, self.formats = 0, available_isas(), set(), set(), set()

    def __str__(self):
        threads, rows = (f"{min(numbers)}…{max(numbers)}" for numbers in (self.threads, self.rows))
        formats = ", ".join(sorted(self.formats))
        return f"{self.cases} cases, {formats}; ISAs {', '.join(self.isas)}, threads {threads}, M {rows}: identical"


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


def random_scale_bytes(rng, mode, shape):
    """Scales of one of several distributions: about 1, any size, or any byte, infinities and NaN among them."""
    middle = 0x38 if mode == "nvfp4" else 127
    spread = rng.choice([6, 50, 256])
    scales = rng.integers(0, 256, shape) if spread == 256 else middle + rng.integers(-spread, spread + 1, shape)
    return scales.astype(np.uint8)


def random_codes(rng, row, shape):
    """Any codes; NaN, which mxfp8 has, is rare in most cases, since it spreads over whole rows of results."""
    codes = rng.integers(0, 2 ** row["bits"], shape, dtype=np.uint8)
    if row["mode"] == "mxfp8":
        codes[(codes & 127 == 127) & (rng.random(shape) < rng.choice([0, 0.999, 1]))] = 126
    if rng.random() < 0.2:
        codes[...] = rng.choice([0, 2 ** row["bits"] - 1], (shape[0], 1))
    return codes


class Case(NamedTuple):
    """A product: its operation's name without the mode, x's type and the scales', digits, arrays and keywords.

    Codes are one by one here; `arguments` has them as stored.
    """

    row: dict
    operation: str
    kinds: tuple[str, str]
    digits: int
    arrays: tuple[np.ndarray, ...]
    keywords: dict

    @property
    def arguments(self):
        x, codes, *stored = self.arrays
        return (x, reference.pack(codes, self.row["bits"]), *stored)

    @property
    def function(self):
        return getattr(quantization, f"{self.row['mode']}_{self.operation}")

    @property
    def definition(self):
        """What it must be, by NumPy."""
        kind, scale_kind = self.kinds
        x, codes, *stored = self.arrays
        x, along_k = reference.to_f32(x, kind), self.operation in ALONG_K
        if self.row["family"] == "fp":
            factor = self.keywords.get("global_scale")
            y = reference_fp.product_bits(x, codes, *stored, self.row["mode"], along_k, self.digits, factor)
        else:
            bits_of = reference.qmm_t_bits if along_k else reference.qmm_n_bits
            scales, biases = (reference.to_f32(a, scale_kind) for a in stored)
            y = bits_of(x, codes, scales, biases, self.keywords["group_size"], self.row["bits"], self.digits)
        with np.errstate(over="ignore"):
            return reference.round_to(y, kind if kind == scale_kind else "float32")


def random_options(rng, row, kinds, group_size):
    """The keywords of a call."""
    keywords = {"group_size": group_size, "bits": row["bits"]} if row["family"] == "affine" else {}
    if "bfloat16" in kinds:
        keywords["input_dtype"] = "bfloat16"
    if rng.random() < 0.2 and row["mode"] != "mxfp8":
        keywords["activations"] = "int8"
    if rng.random() < 0.3 and row["mode"] == "nvfp4":
        keywords["global_scale"] = float(10.0 ** rng.uniform(-3, 6))
    return keywords


def random_case(rng):
    """A product in any format, fp ones in half of the cases."""
    family = rng.choice(["affine", "fp"])
    formats = [row for row in quantization._C.formats() if row["family"] == family]
    row = formats[rng.integers(len(formats))]
    group_size = int(rng.choice(row["group_sizes"]))
    operation, kind, scale_kind = rng.choice(OPERATIONS), rng.choice(KINDS), rng.choice(KINDS)
    m, groups = int(rng.integers(1, MAX_ROWS + 1)), int(rng.integers(1, 1 + rng.choice([3, 40]) * 64 // group_size))
    other = int(rng.integers(1, rng.choice([20, 300])))
    k = groups * group_size if operation in ALONG_K else other
    codes = random_codes(rng, row, (other, groups * group_size))
    kinds = (kind, scale_kind) if family == "affine" else (kind, kind)
    with np.errstate(all="ignore"):
        x = reference.round_to(random_values(rng, (m, k), kind), kind)
        if family == "fp":
            stored = [random_scale_bytes(rng, row["mode"], (other, groups))]
        else:
            stored = [reference.round_to(random_values(rng, (other, groups), scale_kind), scale_kind) for _ in range(2)]
    keywords = random_options(rng, row, kinds, group_size)
    digits = 1 if "activations" in keywords else 3 if kind == "float32" else 2
    return Case(row, operation, kinds, digits, (x, codes, *stored), keywords)


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


def compare_everywhere(rng, case, expected, seen):
    """On every ISA: all rows, some of them, and one as a vector, with random numbers of threads and alignments."""
    arguments = case.arguments
    m = len(arguments[0])
    for name in seen.isas:
        for part in (slice(0, m), slice(0, int(rng.integers(1, m + 1))), int(rng.integers(m))):
            threads, offsets = int(rng.integers(1, MAX_THREADS + 1)), rng.integers(0, 64, len(arguments))
            moved = [at_offset(a, offset) for a, offset in zip(arguments, offsets, strict=True)]
            with quantization.isa(name), quantization.threads(threads):
                y = case.function(moved[0][part], *moved[1:], **case.keywords)
            compare(f"isa {name}, {threads} threads, rows {part}, offsets {offsets.tolist()}", y, expected[part])
            seen.threads.add(threads)
            seen.rows.add(y.size // expected.shape[1])
    seen.formats.add(case.row["name"])


def check(seed, i, seen):
    """The i-th case of a seed."""
    rng = np.random.default_rng([seed, i])
    case = random_case(rng)
    x, codes = case.arrays[:2]
    try:
        with quantization.isa("generic"), quantization.threads(1):
            expected = case.function(*case.arguments, **case.keywords)
        if i % 5 == 0 and codes.size * len(x) < 1 << 20:
            compare("the definition", expected, case.definition)
        compare_everywhere(rng, case, expected, seen)
    except MismatchError as difference:
        name = f"{case.row['name']} {case.operation}"
        where = f"{name}, x {case.kinds[0]}{x.shape}, scales {case.kinds[1]}, {case.keywords}"
        raise MismatchError(f"{where}\n{difference}") from None


def main(arguments=None):
    seen = Seen()
    seen.cases = go_on("same_bits", __doc__, lambda seed, i: check(seed, i, seen), arguments, QUICK_CASES)
    print(seen)


if __name__ == "__main__":
    main()
