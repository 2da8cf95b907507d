"""Calls the C functions with random nonsense and random views, and counts what came of it.

    PYTHONPATH=src python tests/campaigns/boundary_fuzz.py [--calls N] [--seed S]

A call must end in a TypeError, ValueError, IndexError or MemoryError that names the operation, with every `out` as it
was, or in the bytes that the same call gives for contiguous copies of its arrays. All memory lies between guard bytes,
which must stay as they are. Under AddressSanitizer (see .ci/gates/sanitizers), reads outside arrays end the run too.
"""

import argparse
import collections
import contextlib
import ctypes
import random
import time

import numpy as np
from numpy.lib.stride_tricks import as_strided

from quantization import _C

ISAS = [entry["name"] for entry in _C.isas() if entry["available"]]
PLANS = {op: [_C.Plan(op, "cpu", isa, threads) for isa in ISAS for threads in (0, 1, 2)] for op in _C.ops()}
GUARD = 0xA5

# What stands where an array, an integer, a word or a dtype should.
NONSENSE = [
    None, True, False, 0, 1, -1, 3, 4, 1 << 31, 1 << 62, 1 << 64, -(1 << 63), 0.5, float("nan"), 1j, "", "cpu",
    "bfloat16", "float32", "\0", "\udc80", b"", b"12345678", bytearray(16), (), (None,), [], [1.0], [[1.0], 2.0], {},
    set(), object(), int, np.float32, np.dtype("f4"), np.dtype(">f2"), np.float32(1), np.array(1), np.array("x"),
    np.zeros(0, np.float32), np.ones((2, 3), bool), np.zeros((4, 4), ">f4"), np.zeros(3, "M8[s]"),
    np.zeros(2, [("a", "f4"), ("b", "u4")]), range(3), memoryview(b"abcd"), (ctypes.c_float * 3)(),
    ctypes.c_uint32(5), NotImplemented, ...,
]  # fmt: skip


class Random(random.Random):
    """Random shapes, views and arguments."""

    def __init__(self, seed):
        super().__init__(seed)
        self.numbers = np.random.default_rng(seed)
        self.blocks = []

    def memory(self, size):
        """Writable bytes between guards."""
        block = np.full(size + 128, GUARD, np.uint8)
        inside = block[64 : 64 + size]
        if self.random() < 0.8:
            values = self.numbers.standard_normal(size // 4 + 1).astype(np.float32)
            inside[:] = values.view(np.uint8)[:size]
        else:  # any bits, NaN and infinities among them
            inside[:] = self.numbers.integers(0, 256, size, np.uint8)
        self.blocks.append(block)
        return inside

    def guards_hold(self):
        return all((b[:64] == GUARD).all() and (b[-64:] == GUARD).all() for b in self.blocks)

    def view(self, shape, dtype, distinct=False):
        """An array of this shape with strides of any kind; `distinct`: elements do not share memory."""
        size = np.dtype(dtype).itemsize
        order = self.sample(range(len(shape)), len(shape))
        strides, step = [0] * len(shape), size
        for axis in order:
            step += size * self.choice([0, 0, 0, 1, 3]) + self.choice([0, 0, 0, 0, 1])
            strides[axis] = step
            step *= max(shape[axis], 1)
        if not distinct and self.random() < 0.2:
            strides = [self.choice([0, s, size, 1, -size]) for s in strides]
        strides = [self.choice([s, s, s, -s]) for s in strides]
        reaches = [(n - 1) * s if n else 0 for n, s in zip(shape, strides, strict=True)]
        low, high = -sum(r for r in reaches if r < 0), sum(r for r in reaches if r > 0)
        offset = self.choice([0, 0, 0, 1, 2])
        raw = self.memory(low + high + size + offset)[offset:]
        return as_strided(raw[low : low + size].view(dtype), shape, strides)

    def shape(self, *last):
        return (*(self.choice([0, 1, 1, 2, 3]) for _ in range(self.choice([0, 0, 1, 1, 2]))), *last)

    def bent(self, shape):
        """The shape, now and then with one size changed or an axis more or less."""
        if self.random() > 0.04:
            return shape
        sizes = list(shape)
        if sizes and self.random() < 0.7:
            sizes[self.randrange(len(sizes))] += self.choice([-1, 1, 31, 32])
        else:
            sizes = sizes[1:] if self.random() < 0.5 else [1, *sizes]
        return tuple(max(size, 0) for size in sizes)

    def floats(self, *shape):
        return self.view(self.bent(shape), self.choice(["f4", "f4", "f4", "f2", "f8", "u2"]))

    def codes(self, *shape):
        return self.view(self.bent(shape), self.choice(["u4", "u4", "u4", "i4"]))

    def out(self, shape, dtype, inputs):
        """None, an array that fits, one that does not, or one inside an input's memory."""
        kind = self.random()
        if kind < 0.5:
            return None
        if kind < 0.9:
            return self.view(self.bent(shape), dtype, distinct=True)
        if kind < 0.95:
            return self.view(shape, dtype)
        base, size = self.choice(inputs), int(np.prod(shape)) * np.dtype(dtype).itemsize
        block = (
            next(block for block in self.blocks if np.may_share_memory(block, base)) if base.size else self.memory(0)
        )
        inside = block[64:-64]
        if len(inside) < size:
            return base
        start = self.randrange(len(inside) - size + 1)
        return inside[start : start + size].view(dtype).reshape(shape)

    def stored(self, *rows, columns, bits, group):
        words, groups = columns * bits // 32, columns // group
        return self.codes(*rows, words), self.floats(*rows, groups), self.floats(*rows, groups)


def quantize_call(r):
    group, bits = r.choice([32, 64, 128]), r.choice([1, 2, 3, 4, 5, 6, 8])
    shape = r.shape(group * r.choice([0, 1, 1, 2, 5]))
    lacking = r.choice([0, 0, 5]) if shape[-1] else 0  # which padding makes up for
    w = r.floats(*shape[:-1], shape[-1] - lacking)
    groups = (*shape[:-1], shape[-1] // group)
    scale = r.choice([None, None, "float32", "float16", "bfloat16", np.float16])
    store = (
        {"f2": "f2", "u2": "u2"}.get(w.dtype.str[1:], "f4") if scale is None else {"bfloat16": "u2"}.get(scale, scale)
    )
    outs = [
        r.out((*shape[:-1], shape[-1] * bits // 32), "u4", [w]),
        r.out(groups, store, [w]),
        r.out(groups, store, [w]),
    ]
    out = r.choice([None, tuple(outs)])
    declared = r.choice([None, "bfloat16"])
    given = [group, bits, r.choice(["metal", "cpu"]), scale, lacking > 0 or r.random() < 0.1]
    return _C.quantize, "affine_quantize", [w, *given, out, declared]


def dequantize_call(r):
    group, bits = r.choice([32, 64, 128]), r.choice([1, 2, 3, 4, 5, 6, 8])
    shape = r.shape(group * r.choice([0, 1, 1, 2, 5]))
    stored = r.stored(*shape[:-1], columns=shape[-1], bits=bits, group=group)
    dtype = r.choice([None, None, "float32", "float16", "bfloat16"])
    result = {"float16": "f2", "bfloat16": "u2"}.get(dtype, "f4")
    given = [r.choice([group, group, None]), r.choice([bits, bits, None])]
    k = shape[-1] - r.choice([0, 5]) if shape[-1] else 0
    out = r.out((*shape[:-1], k), result, stored)
    given += [dtype, r.choice(["metal", "cpu"]), k if k != shape[-1] else r.choice([k, None])]
    declared = r.choice([None, "bfloat16"])
    return _C.dequantize, "affine_dequantize", [*stored, *given, out, declared]


def matmul_call(r):
    op = r.choice(["affine_qmm_t", "affine_qmm_n", "affine_qmv", "affine_qvm"])
    group, bits = r.choice([32, 64, 128]), r.choice([1, 2, 3, 4, 5, 6, 8])
    columns, rows, m = group * r.choice([0, 1, 1, 2, 3]), r.choice([0, 1, 3, 16, 17, 40]), r.choice([0, 1, 1, 2, 9])
    transpose = op in ("affine_qmm_t", "affine_qmv")
    k, n = (columns, rows) if transpose else (rows, columns)
    batch = r.shape()
    w_batch = r.choice([(), batch, tuple(r.choice([size, 1]) for size in batch)])
    stored = r.stored(*w_batch, rows, columns=columns, bits=bits, group=group)
    vector = r.random() < 0.2
    x = r.floats(k) if vector else r.floats(*batch, m, k)
    out = r.out((*w_batch, n) if vector else (*batch, m, n), r.choice(["f4", "f4", "f2", "u2"]), [x, *stored])
    features = r.choice([None, None, n, r.randrange(200)])
    given = [features, r.choice([group, group, None]), r.choice([bits, bits, None])]
    declared = r.choice([None, "bfloat16"])
    return _C.matmul, op, [x, *stored, *given, "exact", r.choice([None, None, "int8"]), out, declared]


def gather_call(r):
    """Indices are in range as a rule, of any integer type."""
    of_rows = r.random() < 0.4
    group, bits = r.choice([32, 64, 128]), r.choice([1, 2, 3, 4, 5, 6, 8])
    columns, rows, m = group * r.choice([0, 1, 1, 2, 3]), r.choice([0, 1, 3, 17, 40]), r.choice([0, 1, 1, 2, 9])
    transpose = r.random() < 0.5
    k, n = (columns, rows) if transpose else (rows, columns)
    x_batch, experts = r.shape(), r.choice([0, 1, 3, 3])
    stored = r.stored(experts, rows, columns=columns, bits=bits, group=group)
    x = r.floats(*x_batch, k) if of_rows else r.floats(*x_batch, m, k)
    shape = x_batch if of_rows else r.shape()
    matrices = int(np.prod(x_batch))

    def chosen(count):
        values = np.array([r.randrange(-count, count) if count else 0 for _ in range(int(np.prod(shape)))], np.int64)
        values[: r.random() < 0.1] = count + r.choice([0, 1, 1 << 40])
        return values.reshape(shape).astype(r.choice("bhlqHLQ"))

    lhs, rhs = r.choice([None, chosen(matrices)]), chosen(experts)
    out = r.out((*shape, n) if of_rows else (*shape, m, n), r.choice(["f4", "f4", "f2", "u2"]), [x, *stored])
    given = [r.choice([group, group, None]), r.choice([bits, bits, None])]
    rest = [r.choice(["exact", "float"]), r.choice([None, None, "int8"]), out, r.choice([None, "bfloat16"])]
    if of_rows:
        features = r.choice([None, None, n, r.randrange(200)])
        return _C.gather_rhs, "affine_gather_qmm_rhs", [x, *stored, rhs, features, *given, transpose, *rest]
    said = r.choice([True, False])
    return _C.gather, "affine_gather_qmm", [x, *stored, lhs, rhs, transpose, *given, said, *rest]


def fake_quantize_call(r):
    shape = r.shape(r.choice([0, 1, 7, 64, 300]))[r.choice([0, 0, 0, 1]) :]
    x = r.floats(*shape)
    out = r.choice([r.out(shape, "f4", [x]), x])
    return _C.fake_quantize, "quantize", [x, r.choice([1, 2, 4, 8, 16, 17]), out, r.choice([None, "bfloat16"])]


CALLS = [quantize_call, dequantize_call, matmul_call, gather_call, fake_quantize_call]


def contiguous(value):
    return np.array(value, order="C", copy=True) if isinstance(value, np.ndarray) else value


def outputs_of(value):
    return [entry for entry in (value if isinstance(value, tuple) else (value,)) if isinstance(entry, np.ndarray)]


def has_own_places(array):
    """Whether no two elements share a byte."""
    if array.size < 2:
        return True
    places = sum(np.ix_(*(np.arange(n) * s for n, s in zip(array.shape, array.strides, strict=True)))).ravel()
    return bool((np.diff(np.sort(places)) >= array.itemsize).all())


def check_result(function, plan, arguments, copies, result, out):
    """The result is `out` where that was given, and equals that of contiguous copies."""
    copies[-2] = None
    expected = function(plan, *copies)
    pairs = zip(*((x if isinstance(x, tuple) else (x,)) for x in (result, expected)), strict=True)
    given = out if isinstance(out, tuple) else (out,) * len(result if isinstance(result, tuple) else (result,))
    for (got, want), place in zip(pairs, given, strict=True):
        assert place is None or got is place
        assert got.shape == want.shape
        if place is None or (isinstance(place, np.ndarray) and has_own_places(place)):
            assert got.tobytes() == want.tobytes()


def attempt(r):
    """Make one call; return what became of it."""
    r.blocks.clear()
    function, op, arguments = r.choice(CALLS)(r)
    plan = r.choice(PLANS[op])
    nonsense = r.random() < 0.3
    if nonsense:
        arguments[r.randrange(len(arguments))] = r.choice(NONSENSE)
    fails_at = r.randrange(6) if r.random() < 0.05 else -1
    copies = [contiguous(value) for value in arguments]
    out = arguments[-2]
    before = [array.tobytes() for array in outputs_of(out)]
    _C.fail_allocations_after(fails_at)
    try:
        result = function(plan, *arguments)
    except (TypeError, ValueError, IndexError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not str(error).startswith(f"{op}: "):
            raise AssertionError(f"{error} does not name {op}") from error
        assert [array.tobytes() for array in outputs_of(out)] == before, "a failing call wrote"
        assert r.guards_hold()
        return type(error).__name__
    finally:
        _C.fail_allocations_after(-1)
    assert r.guards_hold(), "bytes outside the arrays changed"
    check_result(function, plan, arguments, copies, result, out)
    return "result"


def surprise(r):
    """A call with a random number of random things."""
    products = [_C.matmul, _C.gather, _C.gather_rhs]
    function = r.choice([_C.quantize, _C.dequantize, *products, _C.fake_quantize, _C.Plan, _C.check_num_threads])
    count = r.choice([0, 1, 2, 5, 8, 10, 12, 14, 15])
    things = [*NONSENSE, *(plans[0] for plans in PLANS.values())]
    try:
        function(*(r.choice(things) for _ in range(count)))
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        return type(error).__name__
    return "result"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=300_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tally, start, shown = collections.Counter(), time.monotonic(), time.monotonic()
    with np.errstate(all="ignore"):
        for i in range(options.calls):
            r = Random(options.seed * 10**9 + i)
            try:
                tally[surprise(r) if r.random() < 0.1 else attempt(r)] += 1
            except BaseException:
                print(f"call {i} of --seed {options.seed}")
                raise
            if time.monotonic() - shown > 60:
                shown = time.monotonic()
                print(f"{i + 1} calls: {dict(tally)}", flush=True)
    print(f"{options.calls} calls in {time.monotonic() - start:.0f} s: {dict(tally)}")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
