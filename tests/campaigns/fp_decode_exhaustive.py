"""Decode every code with every scale byte of mxfp4, mxfp8 and nvfp4, beside ml_dtypes and beside MLX's CPU.

    python tests/campaigns/fp_decode_exhaustive.py

On every instruction set, to every type. In profile "metal", a weight is ml_dtypes' number times ml_dtypes' scale in
float32 and rounded once; of E8M0's byte 255, which ml_dtypes reads as NaN, MLX makes infinity and so do we. In profile
"cpu" it is what `mlx.core.dequantize` returns. NaN counts as equal whatever its payload. A difference is printed and
the exit status is 1. MLX is left out where it is not installed.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import quantization
import reference
from campaigns.rounds import MismatchError, available_isas

KINDS = ("float32", "float16", "bfloat16")


def stored_pairs(row):
    """Words and scale bytes in which every code meets every scale, and both one by one, codes running fastest."""
    group_size = row["group_sizes"][0]
    codes = np.resize(np.arange(2 ** row["bits"], dtype=np.uint8), max(2 ** row["bits"], group_size))
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], len(codes) // group_size, 1)
    codes = np.tile(codes, (256, 1))
    return reference.pack(codes, row["bits"]), scales, codes, np.repeat(scales, group_size, 1)


def numbers_of(ml_dtypes, row, codes, scales):
    """float32 weights by ml_dtypes."""
    element = {"fp4_e2m1": ml_dtypes.float4_e2m1fn, "fp8_e4m3": ml_dtypes.float8_e4m3fn}[row["element"]]
    scale = {"e8m0": ml_dtypes.float8_e8m0fnu, "fp8_e4m3": ml_dtypes.float8_e4m3fn}[row["scale"]]
    factors = scales.view(scale).astype(np.float32)
    if row["scale"] == "e8m0":
        factors[scales == 255] = np.inf
    with np.errstate(all="ignore"):
        return codes.view(element).astype(np.float32) * factors


def compare(what, ours, theirs, codes, scales):
    """Raise MismatchError unless float32 values are the same bits, or both NaN; return how many there are."""
    same = (ours.view(np.uint32) == theirs.view(np.uint32)) | (np.isnan(ours) & np.isnan(theirs))
    if not same.all():
        at = tuple(np.argwhere(~same)[0])
        raise MismatchError(
            f"{what}, code {codes[at]:#x}, scale {scales[at]:#x}: {ours[at]!r}, expected {theirs[at]!r}"
            f" ({np.count_nonzero(~same)} of {same.size} differ)"
        )
    return same.size


def check(row, kind, isa, ml_dtypes, mx):
    """All pairs of a format to a type; returns how many were compared with ml_dtypes, and with MLX."""
    words, scales, codes, each = stored_pairs(row)
    dequantize = getattr(quantization, f"{row['mode']}_dequantize")
    counts = [0, 0]
    with np.errstate(all="ignore"):
        exact = reference.to_f32(reference.round_to(numbers_of(ml_dtypes, row, codes, each), kind), kind)
    with quantization.isa(isa):
        results = [reference.to_f32(dequantize(words, scales, dtype=kind, profile=p), kind) for p in ("metal", "cpu")]
        pairs = [dequantize(words[i : i + 2], scales[i : i + 2], dtype=kind) for i in range(0, 256, 2)]
    counts[0] = compare(f"{row['name']} to {kind} on {isa}, ml_dtypes", results[0], exact, codes, each)
    # A scale that is not finite sends those around it another way.
    pairs = reference.to_f32(np.concatenate(pairs), kind)
    compare(f"{row['name']} to {kind} on {isa}, two scales at a time, ml_dtypes", pairs, exact, codes, each)
    if mx:
        theirs = mx.dequantize(mx.array(words), mx.array(scales), mode=row["mode"], dtype=getattr(mx, kind))
        theirs = np.array(theirs.astype(mx.float32))
        counts[1] = compare(f"{row['name']} to {kind} on {isa}, MLX", results[1], theirs, codes, each)
    return counts


def main(arguments=None):
    """Print a line for each format."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(arguments)
    try:
        import ml_dtypes
    except ImportError:
        sys.exit("fp_decode_exhaustive: ml_dtypes is not installed; pip install ml_dtypes")
    try:
        import mlx.core as mx

        mx.set_default_device(mx.cpu)
    except ImportError:
        mx = None
    isas = available_isas()
    for row in quantization._C.formats():
        if row["family"] != "fp":
            continue
        counts = np.zeros(2, np.int64)
        try:
            for kind in KINDS:
                for isa in isas:
                    counts += check(row, kind, isa, ml_dtypes, mx)
        except MismatchError as difference:
            sys.exit(f"fp_decode_exhaustive: {difference}")
        pairs = 256 * 2 ** row["bits"]
        what = f"{row['name']}: {pairs} codes x scales, {len(KINDS)} types on {', '.join(isas)}"
        print(f"{what}: {counts[0]} weights equal to ml_dtypes', {counts[1]} to MLX's")


if __name__ == "__main__":
    main()
