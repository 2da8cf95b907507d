"""Compare the bytes of the key-value cache's functions over ISAs, threads and alignments with those of scalar C.

    python tests/campaigns/same_bits_kv.py --seconds 60

Each case is a rotation, an encoding or a decoding by either codec, or attention, of random sizes and values; where the
definition in tests/reference_kv.py applies, its bytes are compared as well. NaN equals NaN. A difference is printed
with what reproduces it, and the exit status is 1.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import quantization
import reference_kv as ref
from campaigns.rounds import MismatchError, available_isas, go_on
from campaigns.same_bits import at_offset, compare, random_values

MAX_THREADS = 8
QUICK_CASES = 60


class Case(NamedTuple):
    """What is called, with which arrays, and what it gives by definition (None: not defined to the bit)."""

    label: str
    arrays: dict[str, np.ndarray]
    run: Callable[[dict[str, np.ndarray]], tuple[np.ndarray, ...]]
    definition: Callable[[], tuple[np.ndarray, ...]] | None


def values(rng, *shape):
    """float32 of any distribution, NaN and Inf now and then."""
    with np.errstate(all="ignore"):
        return random_values(rng, shape, "float32").astype(np.float32)


def head_dim(rng):
    """Pick a usual one or any multiple of 8."""
    usual = rng.choice([64, 80, 96, 112, 128, 192, 256, 320, 512, 576])
    return int(usual if rng.random() < 0.6 else 8 * rng.integers(1, rng.choice([20, 513])))


def rows(rng, D):
    return int(rng.integers(1, 2 + rng.choice([4, 20000 // D])))


def fwht_case(rng):
    D = int(2 ** rng.integers(1, 13)) if rng.random() < 0.3 else head_dim(rng)
    x = values(rng, rows(rng, D), D)
    signs, inverse = (bool(flag) for flag in rng.integers(0, 2, 2))
    return Case(
        f"fwht{x.shape}, signs={signs}, inverse={inverse}",
        {"x": x},
        lambda arrays: (quantization.fwht(arrays["x"], signs=signs, inverse=inverse),),
        lambda: (ref.fwht(x, signed=signs, inverse=inverse),),
    )


def encode_2_case(rng):
    D, bits = head_dim(rng), int(rng.choice(ref.BITS_2))
    ordinary = rng.random() < 0.5
    shape = rows(rng, D), D
    x = rng.standard_normal(shape).astype(np.float32) if ordinary else values(rng, *shape)
    scale = str(rng.choice(["unbiased", "least_squares", "norm"]))
    dtype = np.dtype(rng.choice(["float16", "float32"]))

    def definition():
        codes, scales, _ = ref.encode_2(x, bits, scale=scale, dtype=np.float32)
        return ref.pack_2(codes, bits), scales.astype(dtype)

    return Case(
        f"quantize_kv{x.shape}, bits={bits}, scale={scale}, norms_dtype={dtype}",
        {"x": x},
        lambda arrays: quantization.quantize_kv(arrays["x"], bits, scale=scale, norms_dtype=dtype),
        definition if ordinary else None,
    )


def decode_2_case(rng):
    D, bits = head_dim(rng), int(rng.choice(ref.BITS_2))
    count, rotated = rows(rng, D), bool(rng.integers(2))
    packed = rng.integers(0, 256, (count, D * bits // 8), dtype=np.uint8)
    with np.errstate(over="ignore"):
        norms = values(rng, count, D // ref.block_size(D)).astype(rng.choice(["float16", "float32"]))
    return Case(
        f"dequantize_kv of {count} x {D}, bits={bits}, norms {norms.dtype}, rotated={rotated}",
        {"packed": packed, "norms": norms},
        lambda arrays: (quantization.dequantize_kv(arrays["packed"], arrays["norms"], bits, rotated=rotated),),
        lambda: (ref.decode_2(ref.unpack_2(packed, bits), norms, bits, rotated=rotated),),
    )


def room_1(heads, capacity, D, bits):
    """Packed codes and norms of codec 1, filled."""
    packed, norms = ref.shapes_1(heads, capacity, D, bits)
    return np.full(packed, 0xA5, np.uint8), np.full(norms, 7, np.float32)


def sizes_1(rng):
    bits = int(rng.choice(ref.BITS_1))
    return int(2 ** rng.integers(1, 13) if bits == 4 else rng.choice([256, 512])), bits


def encode_1_case(rng):
    D, bits = sizes_1(rng)
    heads, tokens, capacity = (int(n) for n in rng.integers(1, 12, 3))
    start = int(rng.integers(0, 100))
    src = values(rng, tokens, heads, D)

    def run(arrays):
        packed, norms = room_1(heads, capacity, D, bits)
        where = {"is_sliding": True}
        if bits == 4:
            return quantization.hadamard_quantize_kv_seq(arrays["src"], packed, norms, write_pos_start=start, **where)
        for i, token in enumerate(arrays["src"]):
            quantization.hadamard_quantize_kv_hb(token, packed, norms, write_pos=start + i, codebook_bits=bits, **where)
        return packed, norms

    return Case(f"codec 1 encodes {src.shape} to {capacity} from {start}, bits={bits}", {"src": src}, run, None)


def decode_1_case(rng):
    D, bits = sizes_1(rng)
    D, rotated = min(D, 512), bool(rng.integers(2))
    count = rows(rng, D)
    packed = rng.integers(0, 256, (count, D // 2 if bits == 4 else D), dtype=np.uint8)
    norms = values(rng, count, D // 256) if D == 512 else values(rng, count)
    return Case(
        f"dequantize_kv, codec 1, of {count} x {D}, bits={bits}, rotated={rotated}",
        {"packed": packed, "norms": norms},
        lambda arrays: (
            quantization.dequantize_kv(arrays["packed"], arrays["norms"], bits, codec=1, rotated=rotated),
        ),
        lambda: (
            ref.decode_1(ref.unpack_1(packed, bits), norms.reshape(count, -1), bits, rotated=rotated),
        ),
    )  # fmt: skip


def random_cache(rng, heads, capacity, D, bits, dtype):
    """Any codes, and norms of which some are large."""
    packed = rng.integers(0, 256, (heads, capacity, D * bits // 8), dtype=np.uint8)
    norms = rng.uniform(0.2, 2, (heads, capacity, D // ref.block_size(D)))
    return packed, (norms * np.where(rng.random(norms.shape) < 0.02, 50, 1)).astype(dtype)


def attention_case(rng):
    D, bits, value_bits = head_dim(rng), int(rng.choice(ref.BITS_2)), int(rng.choice(ref.BITS_2))
    D_v = D if rng.random() < 0.7 else head_dim(rng)
    heads, group, T = (int(n) for n in rng.integers(1, 5, 3))
    capacity = int(rng.integers(1, rng.choice([20, 200, 1500])))
    length = int(rng.integers(1, capacity + 1))
    dtype = str(rng.choice(["float16", "float32"]))
    arrays = {"q": rng.standard_normal((heads * group, T, D)).astype(np.float32)}
    for name, dim, width in (("k", D, bits), ("v", D_v, value_bits)):
        arrays[name], arrays[f"{name}_norms"] = random_cache(rng, heads, capacity, dim, width, dtype)
    keywords = {"bits": bits, "value_bits": value_bits, "length": length, "start": int(rng.integers(capacity))}
    keywords |= {"causal": bool(rng.integers(2))} if length >= T else {}
    keywords |= {"window": int(rng.integers(1, length + 2))} if rng.random() < 0.4 else {}
    keywords |= {"softcap": 20.0} if rng.random() < 0.3 else {}
    mask = rng.random()
    if mask < 0.2:
        arrays["mask"] = rng.random((T, length)) < 0.7
    elif mask < 0.4:
        arrays["mask"] = rng.standard_normal((heads * group, 1, length)).astype(np.float32)

    def run(moved):
        caches = ((moved[name], moved[f"{name}_norms"]) for name in ("k", "v"))
        return (quantization.kv_attention(moved["q"], *caches, mask=moved.get("mask"), **keywords),)

    return Case(f"kv_attention, D={D}, Dv={D_v}, C={capacity}, {keywords}", arrays, run, None)


CASES = (fwht_case, encode_2_case, decode_2_case, encode_1_case, decode_1_case, attention_case)


def compare_results(what, ours, expected):
    """Raise MismatchError unless all arrays are equal, NaN aside."""
    for name, mine, theirs in zip(("first", "second"), ours, expected, strict=False):
        pair = [
            np.where(np.isnan(array), array.dtype.type("nan"), array) if array.dtype.kind == "f" else array
            for array in (mine, theirs)
        ]
        compare(f"{what}, {name} result", *pair)


def check(seed, i, isas):
    """Check the i-th case of a seed; return how many calls were compared."""
    rng = np.random.default_rng([seed, i])
    case = CASES[i % len(CASES)](rng)
    try:
        with quantization.isa("generic"), quantization.threads(1), np.errstate(all="ignore"):
            expected = case.run(case.arrays)
            if case.definition:
                compare_results("the definition", expected, case.definition())
        for name in isas:
            threads, offsets = int(rng.integers(1, MAX_THREADS + 1)), rng.integers(0, 64, len(case.arrays))
            moved = {
                key: at_offset(array, offset)
                for (key, array), offset in zip(case.arrays.items(), offsets, strict=True)
            }  # fmt: skip
            with quantization.isa(name), quantization.threads(threads):
                results = case.run(moved)
            compare_results(f"isa {name}, {threads} threads, offsets {offsets.tolist()}", results, expected)
    except MismatchError as difference:
        raise MismatchError(f"{case.label}\n{difference}") from None
    return len(isas) + bool(case.definition)


def main(arguments=None):
    isas, compared = available_isas(), []
    cases = go_on("same_bits_kv", __doc__, lambda *case: compared.append(check(*case, isas)), arguments, QUICK_CASES)
    print(f"{cases} cases, {sum(compared)} comparisons, ISAs {', '.join(isas)}: identical")


if __name__ == "__main__":
    main()
