"""Stored weights of all of MLX's modes, made so that products with small integers are exact in float32.

Elements of x and of cotangents are integers up to 4. Weights are multiples of a unit u up to a largest magnitude m:
affine scales are 1/4, 1/2 or 1 and biases integers up to 4 (u = 1/4, m = 259 at 8 bits, 19 at 4); E8M0 scales are 2^-2
to 2^2 and E2M1 values multiples of 1/2 up to 6 (u = 1/8, m = 24), E4M3 values here multiples of 1/8 up to 15 (u = 1/32,
m = 60); E4M3 scales are multiples of 1/4 up to 5/4 (u = 1/8, m = 7.5). Every partial sum, in any order, of floats or
integers in blocks, and also if codes are centred first, is a multiple of u below 4 * K * m. That is below u * 2^24, and
so a float32, for K up to 2184 (8 bits) and 16384 (4 bits and fewer). Results are therefore compared without tolerance.
"""

from typing import Any, NamedTuple

import numpy as np
import pytest

import reference as ref
import reference_fp

KINDS = ("float32", "float16", "bfloat16")

CASES = [("affine", size, bits) for bits in (1, 2, 3, 4, 5, 6, 8) for size in (32, 64, 128)] + [
    ("mxfp4", 32, 4),
    ("mxfp8", 32, 8),
    ("nvfp4", 16, 4),
]
PARAMETERS = [pytest.param(*case, id=f"{case[0]}_{case[2]}_g{case[1]}") for case in CASES]
DEFAULTS = [case for case in CASES if case in (("affine", 64, 4), *CASES[-3:])]
MODES = [pytest.param(*case, id=case[0]) for case in DEFAULTS]

_FP4 = np.concatenate([reference_fp.FP4, -reference_fp.FP4])
_FP8 = reference_fp.decode_fp8(np.arange(256)).astype(np.float64)  # NaN passes neither of the comparisons below
_FP8_CODES = np.flatnonzero((np.rint(_FP8 * 8) == _FP8 * 8) & (np.abs(_FP8) <= 15)).astype(np.uint8)
_FP8_SCALES = np.flatnonzero(np.isin(_FP8, (0.25, 0.5, 0.75, 1, 1.25))).astype(np.uint8)


class Stored(NamedTuple):
    """Weights as they are stored, and as the float64 numbers that they stand for."""

    parts: tuple
    values: np.ndarray
    options: dict[str, Any]

    def __getitem__(self, index):  # of a batch
        return Stored(tuple(part[index] for part in self.parts), self.values[index], self.options)


def as_kind(values, kind):
    """Round to a type once; bfloat16 as an array of ml_dtypes."""
    rounded = ref.round_to(np.asarray(values, np.float32), kind)
    return rounded.view(pytest.importorskip("ml_dtypes").bfloat16) if kind == "bfloat16" else rounded


def integers(rng, shape, kind="float32"):
    return as_kind(rng.integers(-4, 5, shape), kind)


def _affine(rng, shape, group_size, bits, kind):
    codes = rng.integers(0, 2**bits, shape, dtype=np.uint8)
    groups = (*shape[:-1], shape[-1] // group_size)
    scales, biases = rng.choice([0.25, 0.5, 1.0], groups), rng.integers(-4, 5, groups).astype(float)
    values = np.repeat(scales, group_size, -1) * codes + np.repeat(biases, group_size, -1)
    return (ref.pack(codes, bits), as_kind(scales, kind), as_kind(biases, kind)), values


def _small_floats(rng, shape, mode, group_size, bits):
    codes = rng.choice(_FP8_CODES, shape) if mode == "mxfp8" else rng.integers(0, 16, shape, dtype=np.uint8)
    groups = (*shape[:-1], shape[-1] // group_size)
    if mode == "nvfp4":
        stored = rng.choice(_FP8_SCALES, groups)
        scales = _FP8[stored]
    else:
        stored = rng.integers(125, 130, groups, dtype=np.uint8)
        scales = 2.0 ** (stored.astype(float) - 127)
    values = np.repeat(scales, group_size, -1) * (_FP8[codes] if mode == "mxfp8" else _FP4[codes])
    return (ref.pack(codes, bits), stored), values


def stored(rng, shape, mode="affine", group_size=64, bits=4, kind="float32"):
    """Draw weights of a shape (..., rows, columns), groups along the columns."""
    options = {"mode": mode, "group_size": group_size, "bits": bits}
    if mode == "affine":
        return Stored(*_affine(rng, shape, group_size, bits, kind), options)
    return Stored(*_small_floats(rng, shape, mode, group_size, bits), options)


def columns(group_size, about):
    """The multiple of the group size next above a number, and of 32 elements, as every row fills whole words."""
    size = max(group_size, 32)
    return -(-about // size) * size


def product(x, values, transpose=True):
    """Batches of x @ W.T or x @ W in float64, where integers like these are exact."""
    vector = x.ndim == 1
    matrix = np.atleast_2d(ref_float64(x))
    y = matrix @ (np.swapaxes(values, -1, -2) if transpose else values)
    return y[..., 0, :] if vector else y


def ref_float64(array):
    """Widen an array of any kind."""
    return np.asarray(array).astype(np.float32).astype(np.float64)


def check(y, exact, kind="float32"):
    """Assert that a result is a NumPy array of a type with the exact values, rounded once if that type is narrow."""
    expected = as_kind(exact, kind)
    assert isinstance(y, np.ndarray)
    assert y.dtype == expected.dtype
    assert y.shape == expected.shape
    assert np.array_equal(ref_float64(y), ref_float64(expected))
