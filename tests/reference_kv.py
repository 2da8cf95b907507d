"""The oracle of the key-value cache: both codecs, the rotation and attention in NumPy, as they are defined.

Like reference.py it favours being readable over being fast. Functions with a `dtype` compute in float32 in the defined
order, so that results are those of the C code to the bit, or in float64, so that they are exact beside float32. The
constants come from csrc/kernels/kv_tables.h, which test_kv_codec.py checks by itself.

A vector of D coordinates is rotated in blocks of B: for codec 1 one block whatever D is, for codec 2 as `block_size`
says. `codes` are one number per coordinate, `packed` are the bytes that hold them.
"""

import functools
import re
from pathlib import Path

import numpy as np

F32, F64 = np.float32, np.float64
U = 2.0**-24  # unit roundoff of float32
BITS_1, BITS_2 = (4, 5, 6, 8), (2, 3, 4, 5, 6, 8)
HEADER = Path(__file__).parents[1] / "csrc" / "kernels" / "kv_tables.h"


# ---------------------------------------------------------------------------------------------------------------------
# Constants


@functools.cache
def tables():
    """Every array of the header by its name without qz_kv_."""
    found = {}
    for kind, name, text in re.findall(r"const (\w+) qz_kv_(\w+)\[.*?\] = \{(.*?)\};", HEADER.read_text(), re.DOTALL):
        items = [item.strip() for item in text.split(",")]
        if kind == "float":
            found[name] = np.array([np.inf if item == "INFINITY" else float(item[:-1]) for item in items], F32)
        else:
            found[name] = np.array([int(item, 0) for item in items], kind.removesuffix("_t"))
    return found


def codebook(codec, bits):
    """Values, and the boundaries between them."""
    early = "_early" if codec == 1 and bits > 4 else ""
    unrounded = "_unrounded" if codec == 1 and bits == 4 else early
    return tables()[f"values_{bits}{unrounded}"], tables()[f"boundaries_{bits}{early}"][:-1]


@functools.cache
def signs(D):
    """+-1 for each of the first D coordinates."""
    return 1 - 2 * np.unpackbits(tables()["signs"], bitorder="little")[:D].astype(np.int8)


def block_size(D):
    """Of codec 2: the power of two in D times the largest of 1, 3, 5 and 7 that divides the rest."""
    power = D & -D
    return power * max(m for m in (1, 3, 5, 7) if D // power % m == 0)


@functools.cache
def hadamard(n):
    """Matrix of +-1: Sylvester's where n is a power of two, else symmetric of order 12, 20 or 28."""
    if n & (n - 1) == 0:
        return np.array([[(-1) ** (i & j).bit_count() for j in range(n)] for i in range(n)])
    rows = tables()[f"hadamard_{n}"]
    return 1 - 2 * (rows[:, None] >> np.arange(n) & 1).astype(np.int64)


def factors(B):
    """Orders of the two Hadamard matrices whose Kronecker product rotates a block."""
    power = B & -B
    return (1, B) if power == B else (4 * (B // power), power // 4)


def rotation(B):
    """Rotate a block by this orthonormal symmetric float64 matrix, signs aside."""
    outer, inner = factors(B)
    return np.kron(hadamard(outer), hadamard(inner)) / np.sqrt(B)


# ---------------------------------------------------------------------------------------------------------------------
# Rotation


def transform(x):
    """H x over the last axis, not normalised, in x's own type and in the order of operations of the C code."""
    x = np.asarray(x)
    *lead, B = x.shape
    outer, inner = factors(B)
    h = 1
    while h < inner:
        pairs = x.reshape(*lead, B // (2 * h), 2, h)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = np.stack([a + b, a - b], axis=-2)
        h *= 2
    if outer == 1:
        return x.reshape(*lead, B)
    # H_outer = C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]]: runs [p, m] after one more step of the butterflies
    pairs = x.reshape(*lead, outer // 2, 2, inner)
    a, b = pairs[..., 0, :], pairs[..., 1, :]
    runs = np.stack([a + b, a - b], axis=-2)
    c = hadamard(outer)[::2, ::2].astype(x.dtype)
    rows = []
    for i in range(outer // 2):
        own = np.stack([runs[..., i, 1, :], -runs[..., i, 0, :]], axis=-2)
        terms = [own if i == j else c[i, j] * runs[..., j, :, :] for j in range(outer // 2)]
        rows.append(functools.reduce(np.add, terms))
    return np.stack(rows, axis=-3).reshape(*lead, B)


def in_blocks(x, B):
    return x.reshape(*x.shape[:-1], x.shape[-1] // B, B)


def fwht(x, *, signed=False, inverse=False, dtype=F32):
    """Orthonormal rotation of the last axis, block by block."""
    x = np.asarray(x).astype(dtype)
    D = x.shape[-1]
    B = block_size(D)
    s = signs(D).astype(dtype) if signed else np.ones(D, dtype)
    if not inverse:
        x = x * s
    y = (transform(in_blocks(x, B)) * dtype(1 / np.sqrt(B))).reshape(x.shape)
    return y * s if inverse else y


def chain_sum(products):
    """Sum over the last axis: element j into chain j mod 16, the chains added by halves."""
    *lead, B = products.shape
    padded = np.zeros((*lead, -(-B // 16) * 16), products.dtype)
    padded[..., :B] = products
    chains = np.zeros((*lead, 16), products.dtype)
    for step in range(0, padded.shape[-1], 16):
        chains = chains + padded[..., step : step + 16]
    for half in (8, 4, 2, 1):
        chains = chains[..., :half] + chains[..., half : 2 * half]
    return chains[..., 0]


def fused(a, b, c):
    """a b + c of float32, rounded once: by a float64 sum rounded to odd; of float64 as it is.

    Products of float32 are exact in float64. Where the sum is not, its last bit is set, towards the error where it was
    not: from 53 bits so rounded, those of float32 are what they are from the exact sum (S. Boldo and G. Melquiond,
    Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd, 2008).
    """
    if a.dtype == F64:
        return a * b + c
    product, c = a.astype(F64) * b.astype(F64), c.astype(F64)
    total = product + c
    of_c = total - product
    error = (product - (total - of_c)) + (c - of_c)
    is_even = total.view(np.int64) & 1 == 0
    odd = total.view(np.int64) + np.where((error > 0) == (total > 0), 1, -1)
    return np.where((error != 0) & is_even, odd.view(F64), total).astype(F32)


def chain_dot(a, b):
    """Sum of products over the last axis as chain_sum's, but each product and sum rounded once."""
    *lead, B = a.shape
    size = -(-B // 16) * 16
    padded = [np.concatenate([array, np.zeros((*lead, size - B), a.dtype)], axis=-1) for array in (a, b)]
    chains = np.zeros((*lead, 16), a.dtype)
    for step in range(0, size, 16):
        chains = fused(*(array[..., step : step + 16] for array in padded), chains)
    return chain_sum(chains)


def code_of(z, codec, bits, unit=None):
    """How many boundaries, times units [...] of vectors [..., B], lie strictly below z; 0 of NaN."""
    boundaries = codebook(codec, bits)[1].astype(z.dtype)
    if unit is not None:
        return sum((z > unit[..., None] * boundary).astype(np.uint8) for boundary in boundaries)
    return np.where(np.isnan(z), 0, np.searchsorted(boundaries, z, side="left")).astype(np.uint8)


def distance(z, codec, bits):
    """From z to the nearest boundary."""
    boundaries = codebook(codec, bits)[1].astype(F64)
    place = np.searchsorted(boundaries, z)
    below, above = np.append(-np.inf, boundaries)[place], np.append(boundaries, np.inf)[place]
    return np.minimum(np.abs(z - below), np.abs(above - z))


# ---------------------------------------------------------------------------------------------------------------------
# Codec 1


def encode_1(x, bits=4, *, scale_factor=1.0, dtype=F32):
    """Codes, norms [..., number of norms] and z of vectors [..., D]."""
    x = np.asarray(x).astype(dtype)
    D = x.shape[-1]
    signed = D in (256, 512)
    with np.errstate(all="ignore"):
        y = transform(x * signs(D).astype(dtype) if signed else x) * dtype(1 / np.sqrt(D))
        if D == 512:
            parts, factor = in_blocks(y, 256), dtype(scale_factor)
            norms = np.sqrt(chain_sum(parts * parts) * dtype(1 / 256))
        else:
            parts, factor = in_blocks(y, D), dtype(np.sqrt(D))
            norms = np.sqrt(chain_sum(parts * parts))
        tiny = ~(norms > 1e-10)[..., None]
        if signed:
            z = parts * np.where(tiny, 0, 1 / norms[..., None]).astype(dtype) * factor
        else:
            z = np.where(tiny, 0, parts / norms[..., None]).astype(dtype) * factor
    z = z.reshape(x.shape)
    return code_of(z, 1, bits), norms, z


def decode_1(codes, norms, bits=4, *, scale_factor=1.0, rotated=False, dtype=F32):
    """Vectors [..., D] of codes and norms [..., number of norms]."""
    D = codes.shape[-1]
    values = codebook(1, bits)[0].astype(dtype)[codes]
    norms = np.asarray(norms).astype(dtype)
    if D == 512:
        y = in_blocks(values, 256) * (norms / dtype(scale_factor))[..., None]
    else:
        y = in_blocks(values, D) * (norms * dtype(1 / np.sqrt(D)))[..., None]
    y = y.reshape(codes.shape)
    if rotated:
        return y
    x = transform(y) * dtype(1 / np.sqrt(D))
    return x * signs(D).astype(dtype) if D in (256, 512) else x


def shapes_1(heads, capacity, D, bits=4):
    """Shapes of a cache's codes and norms."""
    codes, norms = (D // 2 if bits == 4 else D,), () if D < 512 else (D // 256,)
    return (heads, capacity, *codes), (heads, capacity, *norms)


def pack_1(codes, bits):
    """At 4 bits two codes in a byte, the even coordinate in the lower half; otherwise one."""
    return codes[..., ::2] | codes[..., 1::2] << 4 if bits == 4 else codes


def unpack_1(packed, bits):
    """Take the codes from their bytes again."""
    if bits != 4:
        return packed & np.uint8(2**bits - 1)
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], 2 * packed.shape[-1])


# ---------------------------------------------------------------------------------------------------------------------
# Codec 2


def encode_2(x, bits=4, *, scale="unbiased", dtype=F64):
    """Codes [..., D], scales [..., blocks] before they are rounded to their stored type, and z [..., D].

    For finite vectors whose sums of squares neither overflow nor vanish in `dtype`.
    """
    x = np.asarray(x).astype(dtype)
    D = x.shape[-1]
    B = block_size(D)
    blocks = in_blocks(x, B)
    squares = chain_dot(blocks, blocks)
    norm = np.sqrt(squares)
    v = transform(in_blocks(x * signs(D).astype(dtype), B))  # sqrt(B) norm z/|z|
    codes = code_of(v, 2, bits, norm)
    c = codebook(2, bits)[0].astype(dtype)[codes]
    root = dtype(np.sqrt(B))
    with np.errstate(all="ignore"):
        z = v / norm[..., None]
        scales = {
            "norm": lambda: norm / root,
            "least_squares": lambda: chain_dot(v, c) / (root * chain_dot(c, c)),
            "unbiased": lambda: squares * root / chain_dot(v, c),
        }[scale]()
    zero = squares == 0
    z = np.where(zero[..., None], 0, z).astype(dtype)
    return codes.reshape(x.shape), np.where(zero, 0, scales).astype(dtype), z.reshape(x.shape)


def decode_2(codes, norms, bits=4, *, rotated=False, dtype=F32):
    """Vectors [..., D] of codes and stored scales [..., blocks]."""
    D = codes.shape[-1]
    values = codebook(2, bits)[0].astype(dtype)[codes]
    y = (in_blocks(values, block_size(D)) * np.asarray(norms).astype(dtype)[..., None]).reshape(codes.shape)
    return y if rotated else fwht(y, signed=True, inverse=True, dtype=dtype)


def pack_2(codes, bits):
    """A little-endian stream of bits, code j in bits [j * bits, (j + 1) * bits) of the row."""
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(stream.reshape(*codes.shape[:-1], codes.shape[-1] * bits), axis=-1, bitorder="little")


def unpack_2(packed, bits):
    """Take the codes from their bytes again."""
    stream = np.unpackbits(packed, axis=-1, bitorder="little")
    stream = stream.reshape(*packed.shape[:-1], packed.shape[-1] * 8 // bits, bits)
    return np.packbits(stream, axis=-1, bitorder="little")[..., 0]


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def attention(q, k, v, *, length=None, start=0, scale=None, mask=None, causal=False, window=None, softcap=None):
    """Attention in float64 of q [Hq, T, D] over decoded caches k [H, C, D] and v [H, C, Dv], rings from `start` on.

    Query t stands at position length - T + t if causal, else at the last one. Rows that see nothing give 0, and those
    that see a NaN or an infinity of v give NaN in that column.
    """
    q, k, v = (np.asarray(array, F64) for array in (q, k, v))
    heads, T, D = q.shape
    kv_heads, capacity, _ = k.shape
    length = capacity if length is None else length
    slots = (start + np.arange(length)) % capacity
    repeat = np.arange(heads) * kv_heads // heads
    k, v = k[repeat][:, slots], v[repeat][:, slots]
    scores = np.einsum("htd,hld->htl", q, k) * (1 / np.sqrt(D) if scale is None else scale)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    own = length - T + np.arange(T)[:, None] if causal else np.full((T, 1), length - 1)
    position = np.arange(length)
    seen = position <= own
    if window is not None:
        seen = seen & (position > own - window)
    seen = np.broadcast_to(seen, scores.shape)
    if mask is not None and np.asarray(mask).dtype == bool:
        seen = seen & mask
    elif mask is not None:
        scores = scores + np.asarray(mask, F64)
    scores = np.where(seen, scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    with np.errstate(invalid="ignore"):
        weights = np.where(top == -np.inf, 0, np.exp(scores - top))
    total = weights.sum(axis=-1, keepdims=True)
    out = weights @ np.where(np.isfinite(v), v, 0)
    out[(seen[..., None] & ~np.isfinite(v)[:, None]).any(axis=2)] = np.nan
    return np.divide(out, total, out=np.zeros_like(out), where=total != 0)
