"""Compare the codes of affine_quantize, where they are made without divisions, with those of true divisions.

    python tests/campaigns/quotients.py --seconds 60

The generic kernels divide, and those of the vector instruction sets multiply by a reciprocal of twice the precision
(csrc/kernels/quantize.h, which proves that no code changes). Most elements here lie within a few units in the last
place of a tie between two codes; scales reach from the floor of 1e-7 to the overflow of float32. `hard_pairs` lists the
dividends and divisors that the proof leaves to be tried. A difference is printed with what reproduces it, and the exit
status is 1.
"""

import sys
from fractions import Fraction
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import quantization
from campaigns.rounds import MismatchError, available_isas, go_on

BITS = (1, 2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
PROFILES = ("metal", "cpu")
F32 = np.float32
PRECISION = 24


def hard_pairs(codes):
    """(V, S, E, k): significands of 24 bits for which V/S * 2^E lies next to the tie k + 1/2, for all k in `codes`.

    The code can only change if a midpoint m of two floats, one of the two next to k + 1/2, lies within 4u ulp(Q) of the
    quotient Q. With ulp(Q) = 2^(e-23), m = M * 2^(e-24) for an odd M of 25 bits, and V * 2^t = M*S + d with t = 24 or
    25, since both sides lie in [2^47, 2^49). |Q - m| = |d|/S * ulp(Q)/2, so that |d| < 8u*S < 8; and d = 0 would mean
    that M divides V, which is less. So S = -d/M modulo 2^t, one candidate for each M, d and t.
    """
    for k in codes:
        for side in (-1, 1):
            e = k.bit_length() - 1 if k else (side - 3) // 2  # 1/2 begins a binade
            m = (2 * k + 1) * 2 ** (23 - e) + side
            for t in (PRECISION, PRECISION + 1):
                inverse = pow(m, -1, 2**t)
                for d in (*range(-7, 0), *range(1, 8)):
                    s = -d * inverse % 2**t
                    v = (m * s + d) >> t
                    if min(v, s).bit_length() == PRECISION == max(v, s).bit_length():
                        yield v, s, t + e - 24, k


def rounded(exact):
    """The float32 nearest to a positive fraction, ties to even: no under- or overflow."""
    e = exact.numerator.bit_length() - exact.denominator.bit_length() - PRECISION
    e += exact / Fraction(2) ** e >= 2**PRECISION
    return round(exact / Fraction(2) ** e) * Fraction(2) ** e


def nearest(exact):
    """The same of any fraction."""
    return rounded(abs(exact)) * (1 if exact > 0 else -1) if exact else exact


def by_reciprocal(v, s):
    """v/s as steps_of of csrc/kernels/quantize.h has it; each operation is rounded once."""
    reciprocal = rounded(1 / s)
    rest = nearest(nearest(1 - reciprocal * s) / s)
    return rounded(v * reciprocal + nearest(v * rest))


def hard_groups(bits, pairs):
    """Groups of 32 whose scale is -S and of whose differences from the bias one is -V, as far as there are such groups.

    With hi = S*j, j = 2^(bits-1), and lo = hi - (2^bits-1)*S, which is above -hi, s0 is S and hi/s0 is j but for its
    rounding; the bias is hi and the scale hi/-j. The element is hi - V, if that is a float. Everything else is 0.
    With 1 bit, the scale is S and the bias lo, which is 0, so that the element is V.
    """
    groups = []
    for v, s, e, k in pairs:
        hi = s * 2.0 ** (bits - 1)
        lo = hi - (2**bits - 1) * s
        w = hi - v * 2.0**e if bits > 1 else v * 2.0**e
        if k < 2**bits and lo <= w <= hi and float(F32(w)) == w:
            groups.append([hi, F32(lo), w] + [0.0] * 29)
    return np.array(groups, F32).reshape(-1, 32)


def random_groups(rng, count, group_size, bits, quantize):
    """Groups of any size, whose elements but the first two are near ties of the scale and bias that these two make."""
    with np.errstate(all="ignore"):
        ends = rng.uniform(-1, 1, (count, 2)) * np.exp2(rng.uniform(-30, 129, (count, 1)))
        ends = np.clip(ends, -3.4e38, 3.4e38).astype(F32)
        _, scales, biases = quantize(np.tile(ends, group_size // 2), group_size, bits)
        ties = rng.integers(0, 2**bits, (count, group_size)) + 0.5
        w = (biases.astype(float) + scales.astype(float) * ties).astype(F32)
    near = w.view(np.int32) + rng.integers(-2, 3, w.shape, dtype=np.int32)
    w = np.where(np.isfinite(w), near.view(F32), 0)
    w = np.where(np.isfinite(w), w, 0).clip(ends.min(axis=1, keepdims=True), ends.max(axis=1, keepdims=True))
    w[:, :2] = ends
    w[rng.random(w.shape) < 1e-3] = np.nan
    return w


def check(seed, i, isas):
    """The i-th array of a seed on every instruction set; returns how many elements it has."""
    rng = np.random.default_rng([seed, i])
    bits, group_size, profile = int(rng.choice(BITS)), int(rng.choice(GROUP_SIZES)), str(rng.choice(PROFILES))

    def quantize(w, group_size, bits):
        with quantization.isa("generic"):
            return quantization.affine_quantize(w, group_size, bits, profile=profile)

    w = random_groups(rng, 4096 if i else 64, group_size, bits, quantize)
    expected = quantize(w, group_size, bits)
    for isa in isas:
        with quantization.isa(isa):
            ours = quantization.affine_quantize(w, group_size, bits, profile=profile)
        if any(a.tobytes() != b.tobytes() for a, b in zip(ours, expected, strict=True)):
            raise MismatchError(f"{isa} differs, {bits=}, {group_size=}, {profile=}")
    return w.size


def main():
    isas, elements = available_isas()[1:], []
    go_on("quotients", __doc__, lambda *case: elements.append(check(*case, isas)))
    print(f"{sum(elements)} elements on {', '.join(isas) or 'nothing but generic'}: all bytes equal")


if __name__ == "__main__":
    main()
