"""Run every operation on arrays of more than 2^31 elements and compare the results with those of small calls.

    python tests/campaigns/huge.py

Takes some minutes and 10 GB of memory (--list tells what each part takes; parts can be named). Inputs repeat with a
period that is no power of two, so that results must repeat too: an index that wraps at 2^31 or 2^32 would read or write
at another place of the period. A difference is printed, and the exit status is 1.
"""

import argparse
import math
import os
import sys
import time

import numpy as np

import quantization

BEYOND = 2**31 + 1
PERIOD = 1000003  # a prime, in groups of 64 or in rows


def repeat(part, length):
    """`part` over and over along the first axis, `length` rows of it."""
    whole = np.empty((length, *part.shape[1:]), part.dtype)
    for first in range(0, length, len(part)):
        whole[first : first + len(part)] = part[: length - first]
    return whole


def check_repeats(what, whole, part):
    """Exit unless `whole` is `part` over and over, to the byte."""
    unsigned = f"u{part.itemsize}"
    for first in range(0, len(whole), len(part)):
        place = whole[first : first + len(part)]
        if not np.array_equal(place.view(unsigned), part[: len(place)].view(unsigned)):
            sys.exit(f"huge: {what} differs from a small call at rows {first} to {first + len(place)}")


def weights(rows, columns, bits, group_size=64):
    """Random words, and scales and biases in float16, of rows * columns weights."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, (rows, columns * bits // 32), dtype=np.uint32)
    scales, biases = (rng.standard_normal((rows, columns // group_size)).astype(np.float16) for _ in range(2))
    return words, scales, biases


# ---------------------------------------------------------------------------------------------------------------------
# The parts: each returns the shapes it worked on, for the report


def quantize_and_dequantize():
    """float16 weights to 4-bit codes and back: 2^31 + 2^20 elements."""
    groups = 2**25 + 2**14
    part = np.random.default_rng(0).standard_normal((PERIOD, 64)).astype(np.float16)
    w = repeat(part, groups)
    whole, small = quantization.affine_quantize(w, 64, 4), quantization.affine_quantize(part, 64, 4)
    for name, ours, theirs in zip(("codes", "scales", "biases"), whole, small, strict=True):
        check_repeats(f"affine_quantize: {name}", ours, theirs)
    quantization.affine_dequantize(*whole, 64, 4, out=w)
    check_repeats("affine_dequantize", w, quantization.affine_dequantize(*small, 64, 4))
    return w.shape


def one_row():
    """One row of float16 weights, 2^31 + 128 elements long, to 8-bit codes and back."""
    part = np.random.default_rng(0).standard_normal((PERIOD, 64)).astype(np.float16)
    w = repeat(part, 2**25 + 2)
    codes, scales, biases = quantization.affine_quantize(w.reshape(1, -1), 64, 8)
    small = quantization.affine_quantize(part, 64, 8)
    check_repeats("affine_quantize: codes of one row", codes.reshape(len(w), -1), small[0])
    row = quantization.affine_dequantize(codes, scales, biases, 64, 8, out=w.reshape(1, -1))
    check_repeats("affine_dequantize of one row", row.reshape(w.shape), quantization.affine_dequantize(*small, 64, 8))
    return row.shape


def fake_quantize():
    """float32 in place: 2^31 + 1 elements."""
    part = np.random.default_rng(0).standard_normal(PERIOD).astype(np.float32)
    x = repeat(part, BEYOND)
    quantization.quantize(x, 4, out=x)
    check_repeats("quantize", x, quantization.quantize(part, 4))
    return x.shape


def weights_packed_along_k():
    """[N, K] weights of 2 bits, 2^31 + 2048 of them."""
    part = weights(PERIOD, 2048, 2)
    whole = [repeat(array, 2**20 + 1) for array in part]
    x = np.random.default_rng(1).standard_normal((2, 2048)).astype(np.float32)
    y, small = (quantization.affine_qmm_t(x, *w, 64, 2) for w in (whole, part))
    check_repeats("affine_qmm_t", y.T.copy(), small.T.copy())
    y, small = (quantization.affine_qmv(x[0], *w, None, 64, 2) for w in (whole, part))
    check_repeats("affine_qmv", y, small)
    return whole[0].shape[0], 2048


def weights_packed_along_n():
    """[K, N] weights of 2 bits, 2^31 + 2048 of them; x is 0 but where it meets the last rows, beyond 2^31."""
    part = weights(PERIOD, 2048, 2)
    whole = [repeat(array, 2**20 + 1) for array in part]
    x = np.zeros((2, 2**20 + 1), np.float32)
    x[:, 2**20 - 64 :] = np.random.default_rng(1).standard_normal((2, 65))
    y = quantization.affine_qmm_n(x, *whole, 2048, 64, 2)
    end = [array[2**20 - 64 :] for array in whole]
    check_repeats("affine_qmm_n", y, quantization.affine_qmm_n(x[:, 2**20 - 64 :], *end, 2048, 64, 2))
    check_repeats("affine_qvm", quantization.affine_qvm(x[0], *whole, 2048, 64, 2), y[0])
    return 2**20 + 1, 2048


def many_rows_of_x():
    """2^31 + 2^15 elements of x in float16, one output."""
    part = np.random.default_rng(1).standard_normal((1009, 2**15)).astype(np.float16)
    x = repeat(part, 2**16 + 1)
    w = weights(1, 2**15, 4)
    check_repeats("affine_qmm_t", quantization.affine_qmm_t(x, *w), quantization.affine_qmm_t(part, *w))
    return x.shape


def many_results():
    """2^31 + 2^16 results in float16."""
    part = np.random.default_rng(1).standard_normal((1009, 64)).astype(np.float16)
    w = weights(2**15, 64, 4)
    y = quantization.affine_qmm_t(repeat(part, 2**16 + 2), *w)
    check_repeats("affine_qmm_t", y, quantization.affine_qmm_t(part, *w))
    return y.shape


# What each takes at its peak, in GB.
PARTS = {
    quantize_and_dequantize: 6,
    one_row: 7,
    fake_quantize: 9,
    weights_packed_along_k: 2,
    weights_packed_along_n: 2,
    many_rows_of_x: 5,
    many_results: 5,
}


def available_memory():
    """GB that can be had now, as far as the system tells."""
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 1e6
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


def main():
    by_name = {part.__name__: part for part in PARTS}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="default: all")
    parser.add_argument("--list", action="store_true", help="only tell what each part does and takes")
    options = parser.parse_args()
    unknown = set(options.parts) - set(by_name)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(by_name)}")
    skipped = 0
    for name in options.parts or by_name:
        part, memory = by_name[name], PARTS[by_name[name]]
        if options.list or available_memory() < memory + 1:
            skipped += not options.list
            print(f"{name}: {part.__doc__} {memory} GB{'' if options.list else ' are not there: left out'}")
            continue
        start = time.monotonic()
        shape = part()
        seconds = time.monotonic() - start
        print(f"{name}: {shape}, {math.prod(shape) / 2**31:.6f} * 2^31 elements, {seconds:.0f} s: equal", flush=True)
    sys.exit(bool(skipped))


if __name__ == "__main__":
    main()
