"""Compare affine_quantize and affine_dequantize with MLX's CPU, byte for byte, on random and edge arrays.

    python tests/campaigns/mlx_differential.py --seconds 60

MLX must be 0.32 (pip install 'mlx[cpu]==0.32.4'). NaN scales and biases count as equal whatever their sign and payload.
A difference is printed with what reproduces it, and the exit status is 1.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import reference

KINDS = ("float32", "float16", "bfloat16")
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


class MismatchError(Exception):
    """The first bytes found to differ."""


def import_libraries():
    try:
        import mlx.core as mx
    except ImportError:
        sys.exit("mlx_differential: MLX is not installed; pip install 'mlx[cpu]==0.32.4'")
    import quantization

    mx.set_default_device(mx.cpu)
    return mx, quantization


# ---------------------------------------------------------------------------------------------------------------------
# Inputs


def random_weights(rng, shape):
    """float32 weights of one of several distributions, of any size that float32 holds."""
    normal = rng.standard_normal(shape)
    values = {
        "normal": lambda: normal,
        "wide": lambda: normal * np.exp2(rng.uniform(-40, 40, shape)),
        "heavy tails": lambda: rng.standard_t(2, shape),
        "one sign": lambda: rng.choice([-1, 1]) * np.abs(normal),
        "offset": lambda: normal + rng.uniform(-100, 100),
        "grid": lambda: rng.integers(-32, 33, shape) / 2.0 ** rng.integers(0, 8),
        "two values": lambda: rng.choice(rng.standard_normal(2), shape),
        "sparse": lambda: normal * (rng.random(shape) < 0.1),
        "any bits": lambda: rng.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32),
    }
    name = rng.choice(list(values))
    size = 10.0 ** rng.uniform(-9, 6) if name != "any bits" else 1.0
    with np.errstate(all="ignore"):
        return (values[name]() * size).astype(np.float32)


def random_shape(rng, group_size):
    """Up to two batch dimensions, some rows, some groups: about 2^14 elements at most."""
    batch = tuple(rng.integers(1, 4, rng.integers(0, 3)))
    return (*map(int, batch), int(rng.integers(1, 17)), group_size * int(rng.integers(1, 9)))


def with_edges(rng, w, group_size, bits):
    """Replace some groups by those on which quantizers have gone wrong."""
    groups = w.reshape(-1, group_size)
    edges = list(reference.edge_groups(group_size, bits).values())
    for i in np.flatnonzero(rng.random(len(groups)) < rng.choice([0.0, 0.1, 0.5])):
        groups[i] = edges[rng.integers(len(edges))]
    return w


def strided(rng, array):
    """The same values as a view with other strides, half of the time."""
    if rng.integers(2):
        return array
    padded = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    view = padded[..., ::-2] if rng.integers(2) else padded[..., 1::2]
    view[...] = array
    return view


# ---------------------------------------------------------------------------------------------------------------------
# Comparison


def to_mlx(mx, stored, kind):
    array = mx.array(np.ascontiguousarray(stored))
    return array.view(mx.bfloat16) if kind == "bfloat16" else array


def from_mlx(mx, array):
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def compare(what, ours, theirs, kind):
    """Raise MismatchError unless shape and bytes are equal; `kind` is "uint32" or that of floats (all NaNs equal)."""
    ours = np.ascontiguousarray(ours)
    if ours.shape != theirs.shape or ours.itemsize != theirs.itemsize:
        raise MismatchError(f"{what}: ours is {ours.dtype}{ours.shape}, MLX's {theirs.dtype}{theirs.shape}")
    unsigned = f"u{theirs.itemsize}"
    different = ours.view(unsigned) != theirs.view(unsigned)
    if kind != "uint32":
        ours_nan, theirs_nan = (np.isnan(reference.to_f32(a.view(theirs.dtype), kind)) for a in (ours, theirs))
        different &= ~(ours_nan & theirs_nan)
    if different.any():
        index = tuple(map(int, np.argwhere(different)[0]))
        a, b = (int(array.view(unsigned)[index]) for array in (ours, theirs))
        raise MismatchError(
            f"{what}{list(index)}: ours {a:#x}, MLX's {b:#x} ({different.sum()} of {different.size} differ)"
        )


def input_dtype(kind):
    """Keyword arguments that declare arrays of raw bfloat16 bits."""
    return {"input_dtype": "bfloat16"} if kind == "bfloat16" else {}


def check_quantize(rng, mx, quantization, kind, group_size, bits):
    """One random array through both quantizers; returns the number of groups."""
    w = with_edges(rng, random_weights(rng, random_shape(rng, group_size)), group_size, bits)
    stored = reference.round_to(w, kind)
    ours = quantization.affine_quantize(strided(rng, stored), group_size, bits, profile="cpu", **input_dtype(kind))
    theirs = mx.quantize(to_mlx(mx, stored, kind), group_size=group_size, bits=bits)
    for name, a, b, k in zip(("codes", "scales", "biases"), ours, theirs, ("uint32", kind, kind), strict=True):
        compare(f"affine_quantize: {name}", a, from_mlx(mx, b), k)
    return stored.size // group_size


def check_dequantize(rng, mx, quantization, kind, group_size, bits):
    """Random codes, scales and biases through both; returns the number of groups."""
    *batch, columns = random_shape(rng, group_size)
    words = rng.integers(0, 2**32, (*batch, columns * bits // 32), dtype=np.uint32)
    scales, biases = (reference.round_to(random_weights(rng, (*batch, columns // group_size)), kind) for _ in range(2))
    out_kind = rng.choice([None, *KINDS])
    ours = quantization.affine_dequantize(
        *(strided(rng, array) for array in (words, scales, biases)),
        group_size,
        bits,
        dtype=out_kind,
        profile="cpu",
        **input_dtype(kind),
    )
    theirs = mx.dequantize(
        mx.array(words),
        *(to_mlx(mx, array, kind) for array in (scales, biases)),
        group_size=group_size,
        bits=bits,
        dtype=getattr(mx, out_kind or kind),
    )
    compare(f"affine_dequantize to {out_kind}", ours, from_mlx(mx, theirs), out_kind or kind)
    return scales.size


def check(mx, quantization, seed, i):
    """The i-th comparison of a seed: one array each way; returns the number of groups."""
    rng = np.random.default_rng([seed, i])
    kind, group_size, bits = KINDS[i % 3], int(rng.choice(GROUP_SIZES)), int(rng.choice(BITS))
    try:
        groups = check_quantize(rng, mx, quantization, kind, group_size, bits)
        return groups + check_dequantize(rng, mx, quantization, kind, group_size, bits)
    except MismatchError as difference:
        where = f"--seed {seed} --first {i}: {kind}, group_size={group_size}, bits={bits}"
        raise MismatchError(f"{where}\n{difference}") from None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="how long to go on (default 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="comparison to begin with, to reproduce one")
    arguments = parser.parse_args()
    mx, quantization = import_libraries()
    end, i, groups = time.monotonic() + arguments.seconds, arguments.first, 0
    try:
        while i == arguments.first or time.monotonic() < end:
            groups += check(mx, quantization, arguments.seed, i)
            i += 1
    except MismatchError as difference:
        sys.exit(f"mlx_differential: {difference}")
    print(f"{2 * (i - arguments.first)} arrays, {groups} groups, all bytes equal")


if __name__ == "__main__":
    main()
