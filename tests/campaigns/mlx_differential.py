"""Compare quantize and dequantize of every format that MLX has with MLX's CPU, byte for byte, on odd and edge arrays.

    python tests/campaigns/mlx_differential.py --seconds 60

MLX must be 0.32 (pip install 'mlx[cpu]==0.32.4'). NaN scales and biases count as equal whatever their sign and payload.
A difference is printed with what reproduces it, and the exit status is 1.

Of small floats, MLX's CPU gives some groups what no one can use, which is not copied; those groups are compared with
tests/reference_fp.py and counted apart. mxfp4 and mxfp8: the byte of the scale wraps where a group's magnitude is below
2^-127 times the element's largest number, and a group with NaN or an infinity gets an ordinary one. nvfp4: NaN and
infinities come out as any code. Two more limits of MLX's are gone around: of nvfp4 it takes multiples of 32 elements
only, so that others are given to it twice, and with a global scale it dequantizes to float32 only.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import reference
import reference_fp
from campaigns.rounds import MismatchError, go_on

KINDS = ("float32", "float16", "bfloat16")
BITS = (1, 2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
FP_MODES = ("mxfp4", "mxfp8", "nvfp4")


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


# ---------------------------------------------------------------------------------------------------------------------
# Small floats


def fp_weights(rng, mode, shape, kind):
    """Stored weights, some of them codes' values and ties of a random size, and some groups not finite."""
    w = random_weights(rng, shape)
    if rng.random() < 0.3:
        values = reference_fp.FP8 if mode == "mxfp8" else reference_fp.FP4
        ties = np.concatenate([values, (values[1:] + values[:-1]) / 2])
        w = (rng.choice(ties, shape) * rng.choice([-1, 1], shape) * 2.0 ** rng.integers(-20, 15)).astype(np.float32)
    w = with_edges(rng, w, reference_fp.GROUP_SIZES[mode], reference_fp.BITS[mode])
    with np.errstate(all="ignore"):
        return reference.round_to(w, kind)


def copied_groups(mode, groups):
    """Of float32 groups, those for which MLX's CPU gives a result worth having."""
    most = np.abs(groups).max(axis=1)
    good = np.isfinite(most)
    if mode != "nvfp4":
        good &= (most == 0) | (most > 2.0**-127 * (448.0 if mode == "mxfp8" else 6.0))
    return good


def in_pairs(call, *arrays):
    """What MLX's call returns for arrays of nvfp4 groups: given twice if there are an odd number of them."""
    if arrays[-1].size % 2 == 0:
        return call(*arrays)
    found = call(*(np.concatenate([array[None], array[None]]) for array in arrays))
    return [part[0] for part in found]


def mlx_quantize_fp(mx, stored, kind, mode, scale):
    """MLX's words and scales."""
    options = {} if scale is None else {"global_scale": mx.array(scale)}

    def call(w, _):
        return [np.array(part) for part in mx.quantize(to_mlx(mx, w, kind), mode=mode, **options)]

    groups = np.zeros((*stored.shape[:-1], stored.shape[-1] // reference_fp.GROUP_SIZES[mode]))
    return in_pairs(call, stored, groups)


def check_quantize_fp(rng, mx, quantization, kind, mode):
    """One random array through both; returns the numbers of groups equal to MLX's and to the reference's."""
    size = reference_fp.GROUP_SIZES[mode]
    stored = fp_weights(rng, mode, random_shape(rng, size), kind)
    scale = float(10.0 ** rng.uniform(-3, 6)) if mode == "nvfp4" and rng.random() < 0.4 else None
    options = input_dtype(kind) | ({} if scale is None else {"global_scale": scale})
    words, scales = getattr(quantization, f"{mode}_quantize")(strided(rng, stored), profile="cpu", **options)
    good = copied_groups(mode, reference.to_f32(stored, kind).reshape(-1, size))
    for name, ours, theirs in zip(
        ("codes", "scales"), (words, scales), mlx_quantize_fp(mx, stored, kind, mode, scale), strict=True
    ):
        if ours.shape != theirs.shape:
            raise MismatchError(f"{mode}_quantize: {name} have shape {ours.shape}, MLX's {theirs.shape}")
        ours, theirs = (part.reshape(len(good), -1)[good] for part in (ours, theirs))
        compare(f"{mode}_quantize: {name} of groups", ours, theirs, "uint32")
    if good.all():
        return len(good), 0
    codes, expected = reference_fp.quantize(stored.reshape(-1, size)[~good], kind, mode, "cpu", global_scale=scale)
    compare(f"{mode}_quantize: scales not MLX's", scales.reshape(-1)[~good], expected.reshape(-1), "uint32")
    expected = reference.pack(codes.astype(np.uint8), reference_fp.BITS[mode])
    compare(f"{mode}_quantize: codes not MLX's", words.reshape(len(good), -1)[~good], expected, "uint32")
    return int(good.sum()), int((~good).sum())


def check_dequantize_fp(rng, mx, quantization, mode):
    """Random codes and scale bytes through both; returns the number of groups."""
    size, bits = reference_fp.GROUP_SIZES[mode], reference_fp.BITS[mode]
    *batch, columns = random_shape(rng, size)
    words = rng.integers(0, 2**32, (*batch, columns * bits // 32), dtype=np.uint32)
    scales = rng.integers(0, 256, (*batch, columns // size), dtype=np.uint8)
    scale = float(10.0 ** rng.uniform(-3, 6)) if mode == "nvfp4" and rng.random() < 0.4 else None
    kind = rng.choice(KINDS) if scale is None else "float32"
    dequantize = getattr(quantization, f"{mode}_dequantize")
    ours = dequantize(strided(rng, words), strided(rng, scales), dtype=kind, profile="cpu",
                      **({} if scale is None else {"global_scale": scale}))  # fmt: skip
    options = {"dtype": getattr(mx, kind)} if scale is None else {"global_scale": mx.array(scale)}

    def call(words, scales):
        return [from_mlx(mx, mx.dequantize(mx.array(words), mx.array(scales), mode=mode, **options))]

    compare(f"{mode}_dequantize to {kind}", ours, in_pairs(call, words, scales)[0], kind)
    return scales.size


# ---------------------------------------------------------------------------------------------------------------------


class Counts:
    """By format: arrays, groups equal to MLX's, and groups compared with the reference instead."""

    def __init__(self):
        self.of = {}

    def add(self, name, arrays, groups, others=0):
        """Count what was compared."""
        was = self.of.get(name, (0, 0, 0))
        self.of[name] = (was[0] + arrays, was[1] + groups, was[2] + others)

    def __str__(self):
        def line(name, arrays, groups, others):
            return f"{name}: {arrays} arrays, {groups} groups equal to MLX's" + (
                f", {others} to the reference's where MLX's are not copied" if others else ""
            )

        lines = [line(name, *self.of[name]) for name in sorted(self.of)]
        total = np.sum(list(self.of.values()), axis=0)
        return "\n".join([*lines, f"{total[0]} arrays, {total[1] + total[2]} groups, all bytes equal"])


def check(mx, quantization, seed, i, counts=None):
    """The i-th comparison of a seed: one array each way, in an affine format and in one of small floats."""
    rng, counts = np.random.default_rng([seed, i]), counts or Counts()
    kind, group_size, bits = KINDS[i % 3], int(rng.choice(GROUP_SIZES)), int(rng.choice(BITS))
    mode = str(rng.choice(FP_MODES))
    try:
        counts.add(f"affine_{bits}", 1, check_quantize(rng, mx, quantization, kind, group_size, bits))
        counts.add(f"affine_{bits}", 1, check_dequantize(rng, mx, quantization, kind, group_size, bits))
        counts.add(mode, 1, *check_quantize_fp(rng, mx, quantization, kind, mode))
        counts.add(mode, 1, check_dequantize_fp(rng, mx, quantization, mode))
    except MismatchError as difference:
        where = f"{kind}, group_size={group_size}, bits={bits}; {mode}"
        raise MismatchError(f"{where}\n{difference}") from None


def main():
    libraries, counts = import_libraries(), Counts()
    go_on("mlx_differential", __doc__, lambda seed, i: check(*libraries, seed, i, counts))
    print(counts)


if __name__ == "__main__":
    main()
