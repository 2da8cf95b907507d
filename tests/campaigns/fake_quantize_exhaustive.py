"""Compare fake quantization with exact arithmetic on every float32 of [-1, 1].

    python tests/campaigns/fake_quantize_exhaustive.py --bits 2 4 8 16
    QUANTIZATION_ISA=generic python tests/campaigns/fake_quantize_exhaustive.py --bits 4
    python tests/campaigns/fake_quantize_exhaustive.py --quick

All floats are 2 * 1,065,353,217 for each width. --quick takes those around every step between two levels, and one in
4099 of the others. A difference is printed and the exit status is 1.
"""

import argparse
import sys
import time

import numpy as np

ONE = 0x3F800000  # the bits of 1.0: those of every float of [0, 1] are at most that
SIGN = np.uint32(0x80000000)
CHUNK = 1 << 21
QUICK_STRIDE = 4099  # a prime, so that all patterns of low bits occur


def expected(x, bits):
    """Levels of float32 x in [-1, 1] from exact arithmetic, which float64 is here.

    x*S has 24 + 15 digits and |x*S| + 1/2 at most 40, or x*S is so small that their sum rounds to 1/2 and the level is
    0 all the same; k*float(1/S) has 15 + 24. So nothing rounds but where it is told to: to float32, once each.
    """
    scale = 2 ** (bits - 1) - 1
    if bits == 1:
        return np.where(x < 0, np.float32(-1), np.float32(1))
    scaled = np.abs(x).astype(np.float64)
    scaled *= scale
    scaled = scaled.astype(np.float32).astype(np.float64)
    scaled += 0.5
    np.floor(scaled, out=scaled)
    scaled *= np.float64(np.float32(1.0 / scale))
    return np.copysign(scaled.astype(np.float32), x)


def check(quantize, patterns, bits):
    """Both signs of the floats with the given bits (uint32); returns how many."""
    for sign in (np.uint32(0), SIGN):
        x = (patterns | sign).view(np.float32)
        got, want = quantize(x, bits), expected(x, bits)
        if got.tobytes() != want.tobytes():
            i = int(np.flatnonzero(got.view(np.uint32) != want.view(np.uint32))[0])
            raise AssertionError(f"bits={bits}, x={x[i]!r} ({float(x[i]).hex()}): got {got[i]!r}, exact {want[i]!r}")
    return 2 * len(patterns)


def quick_patterns(bits, stride=QUICK_STRIDE):
    """Bits of the floats within four of every step between levels, of the ends, and of one float in `stride`."""
    scale = max(2 ** (bits - 1) - 1, 1)
    steps = ((np.arange(scale) + 0.5) / scale).astype(np.float32).view(np.uint32).astype(np.int64)
    around = np.concatenate([steps, [0, ONE]])[:, None] + np.arange(-4, 5)
    patterns = np.concatenate([around.ravel(), np.arange(0, ONE + 1, stride)])
    return np.unique(np.clip(patterns, 0, ONE)).astype(np.uint32)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[*range(1, 17)], help="widths (default: 1 to 16)")
    parser.add_argument("--quick", action="store_true", help="a sample of seconds instead of minutes")
    arguments = parser.parse_args()
    from quantization import quantize, variable_quantization

    isa, begin, count = variable_quantization.compile().isa, time.monotonic(), 0
    try:
        for bits in arguments.bits:
            if arguments.quick:
                count += check(quantize, quick_patterns(bits), bits)
                continue
            for first in range(0, ONE + 1, CHUNK):
                count += check(quantize, np.arange(first, min(first + CHUNK, ONE + 1), dtype=np.uint32), bits)
    except AssertionError as difference:
        sys.exit(f"fake_quantize_exhaustive: {isa}: {difference}")
    widths = " ".join(map(str, arguments.bits))
    print(f"{count} floats, bits {widths}, ISA {isa}: all bytes equal ({time.monotonic() - begin:.0f} s)")


if __name__ == "__main__":
    main()
