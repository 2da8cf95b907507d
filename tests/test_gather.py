"""Products of matrices that indices choose: the bits of the products one by one, the error bound, MLX, indices."""

import itertools

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import quantization as q
import reference as ref
from conftest import FORMATS, SMALL, assert_same_bytes, assert_threads_change_nothing
from quantization import _C
from test_matmul import random_weights

F32 = np.float32
ONE_BY_ONE = {True: q.affine_qmm_t, False: q.affine_qmm_n}
KINDS = ("float32", "float16", "bfloat16", "int8")
OPTIONS = {"bfloat16": {"input_dtype": "bfloat16"}, "int8": {"activations": "int8"}}


class Experts:
    """Stored matrices, rows of x for them, and the oracle: one product for each pair of matrices."""

    def __init__(self, rng, experts=5, n=9, k=192, group_size=64, bits=4, transpose=True, kind="float32"):
        self.rng, self.transpose, self.group_size, self.bits, self.kind = rng, transpose, group_size, bits, kind
        self.stored_kind = "float32" if kind == "int8" else kind
        self.inputs = k
        rows, columns = (n, k) if transpose else (k, n)
        codes, scales, biases = random_weights(rng, experts * rows, columns, group_size, bits, symmetric=False)
        words = ref.pack(codes, bits)
        floats = (ref.round_to(a, self.stored_kind) for a in (scales, biases))
        self.codes, *self.stored = (a.reshape(experts, rows, a.shape[-1]) for a in (codes, words, *floats))
        self.options = {"group_size": group_size, "bits": bits, **OPTIONS.get(kind, {})}

    def x(self, *shape):
        return ref.round_to(self.rng.standard_normal((*shape, self.inputs)), self.stored_kind)

    def gather(self, x, lhs=None, rhs=None, stored=None, **changes):
        options = {**self.options, "transpose": self.transpose, **changes}
        return q.affine_gather_qmm(x, *(self.stored if stored is None else stored), lhs, rhs, **options)

    def one_by_one(self, x, lhs=None, rhs=None, stored=None):
        """Each pair by a call of its own. Batches are made flat, and the indices are NumPy's."""
        stored = self.stored if stored is None else stored
        lhs = np.arange(int(np.prod(x.shape[:-2]))).reshape(x.shape[:-2]) if lhs is None else np.asarray(lhs)
        batch = stored[0].shape[:-2]
        rhs = np.arange(int(np.prod(batch))).reshape(batch) if rhs is None else np.asarray(rhs)
        flat = [a.reshape(-1, *a.shape[-2:]) for a in (x, *stored)]
        multiply = ONE_BY_ONE[self.transpose]
        pairs = np.broadcast(lhs, rhs)
        results = [multiply(flat[0][i], *(a[j] for a in flat[1:]), **self.options) for i, j in pairs]
        return np.stack(results).reshape(*pairs.shape, *results[0].shape)

    def check(self, x, lhs=None, rhs=None, stored=None, **changes):
        expected = self.one_by_one(x, lhs, rhs, stored)
        y = self.gather(x, lhs, rhs, stored, **changes)
        assert_same_bytes(y, expected)
        return y

    def exact_and_bound(self, x, lhs, rhs, bound_of):
        """The products in float64, and the bounds that `bound_of(x, codes, scales, biases)` derives."""
        wide = [ref.to_f32(a, self.stored_kind) for a in (x, *self.stored[1:])]
        values, bounds = [], []
        for i, j in np.broadcast(lhs, rhs):
            arrays = wide[0][i], self.codes[j], wide[1][j], wide[2][j]
            values.append(ref.exact64(*arrays, self.group_size, self.transpose))
            bounds.append(bound_of(*arrays))
        return np.stack(values), np.stack(bounds)


def indices(rng, low, high, *shape):
    return rng.integers(low, high, shape)


# ---------------------------------------------------------------------------------------------------------------------
# Bits


@pytest.mark.parametrize(("mode", "bits", "group_size"), FORMATS)
@pytest.mark.parametrize("transpose", [True, False])
def test_every_bit(isa, transpose, mode, bits, group_size, rng):
    """Every type, one row and several, experts with few rows of x and with many."""
    for kind, m in (("float32", 3), ("int8", 3)) if SMALL else itertools.product(KINDS, (1, 3)):
        experts = Experts(rng, 3, 2 * group_size, 2 * group_size, group_size, bits, transpose, kind)
        experts.check(experts.x(4, m), indices(rng, -4, 4, 7), [2, 0, 2, 2, 0, 2, 2])


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("rows", [1, 6, 7, 8, 9, 33, 130])
def test_rows_of_an_expert(isa, transpose, rows, rng):
    """Rows that share an expert need not be neighbours, nor follow in order; other experts have one row, or none."""
    experts = Experts(rng, 4, 64 if transpose else 128, 64 if transpose else 70, transpose=transpose)
    rhs = np.zeros(rows + 2, int)
    rhs[rng.integers(rows + 2)], rhs[rng.integers(rows + 2)] = 3, 1
    experts.check(experts.x(rows, 1), indices(rng, 0, rows, rows + 2), rhs)


@pytest.mark.parametrize("transpose", [True, False])
def test_matrices_of_many_rows(isa, transpose, rng):
    """A matrix of x is cut where it has more rows than are multiplied together; one serves several experts."""
    experts = Experts(rng, 3, 64, 64, transpose=transpose)
    x = experts.x(2, 150)
    experts.check(x, [0, 1, 0, 0], [2, 1, 0, 1])
    experts.check(x[:1, :5], [0, 0, 0, 0], [2, 1, 0, 1])


def test_long_rows_of_x(isa, rng):
    """So long that only some of them are prepared together."""
    experts = Experts(rng, 3, 3, 32768)
    experts.check(experts.x(41, 1), None, indices(rng, 0, 3, 41))


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("accumulate", ["exact", "float"])
def test_threads_change_nothing(isa, transpose, accumulate, rng):
    """Enough work to be shared out, by experts, by outputs and by rows."""
    shapes = [(3, 64, 40), (2, 384, 9)] if SMALL else [(1, 64, 150), (5, 64, 200), (3, 448, 5), (2, 256, 66)]
    for count, n, rows in shapes:
        experts = Experts(rng, count, n, 1024 if transpose else 600, transpose=transpose)
        x, rhs = experts.x(rows, 1), indices(rng, 0, count, rows)
        y = assert_threads_change_nothing(lambda e=experts, x=x, r=rhs: [e.gather(x, None, r, accumulate=accumulate)])
        if accumulate == "exact":
            assert_same_bytes(y, experts.one_by_one(x, None, rhs))


@pytest.mark.parametrize("transpose", [True, False])
def test_rows_that_are_not_finite(isa, transpose, rng):
    """They change their own results only, and are what the product alone gives."""
    experts = Experts(rng, 3, 64, 192, transpose=transpose)
    x = experts.x(12, 2)
    lhs, rhs = indices(rng, 0, 12, 30), indices(rng, 0, 3, 30)
    clean = experts.check(x, lhs, rhs)
    x[[1, 4, 7], [0, 1, 1], [5, 64, 191]] = np.nan, np.inf, -np.inf
    for threads in (1, 3):
        with q.threads(threads):
            y = experts.check(x, lhs, rhs)
    finite = np.isfinite(x).all(axis=-1)[lhs]
    assert_same_bytes(y[finite], clean[finite])
    assert not np.isfinite(y[~finite]).all()


# ---------------------------------------------------------------------------------------------------------------------
# Error


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("kind", ["float32", "float16"])
@pytest.mark.parametrize("accumulate", ["exact", "float"])
def test_error_bound(isa, transpose, kind, accumulate, rng):
    """`reference` derives the bounds of both classes; for float16 the result's rounding comes on top."""
    digits = 3 if kind == "float32" else 2
    exact_bound = ref.bound_t if transpose else ref.bound_n
    for bits, group_size in ((4, 64), (3, 32), (8, 128)):
        experts = Experts(rng, 3, group_size, 2 * group_size, group_size, bits, transpose, kind)
        x, lhs, rhs = experts.x(6, 4), indices(rng, 0, 6, 12), indices(rng, 0, 3, 12)

        def bound_of(*arrays, bits=bits, group_size=group_size):
            if accumulate == "float":
                return ref.bound_float(*arrays, group_size, transpose)
            return exact_bound(*arrays, group_size, bits, digits)

        value, bound = experts.exact_and_bound(x, lhs, rhs, bound_of)
        rounding = 0 if kind == "float32" else ref.half_ulp(np.abs(value) + bound, kind)
        y = ref.to_f32(experts.gather(x, lhs, rhs, accumulate=accumulate), kind).astype(np.float64)
        assert (np.abs(y - value) <= bound + rounding).all()


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_against_mlx(isa, transpose, bits, rng):
    """MLX's CPU takes plain float32 sums: it is within their bound of the float64 product, and so are both classes."""
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    experts = Experts(rng, 5, 64, 192, bits=bits, transpose=transpose)
    x, lhs, rhs = experts.x(4, 3), indices(rng, 0, 4, 2, 5), indices(rng, 0, 5, 5)
    arrays = [mx.array(a) for a in (x, *experts.stored)]
    keywords = {"lhs_indices": mx.array(lhs), "rhs_indices": mx.array(rhs), "transpose": transpose, "bits": bits}
    theirs = np.array(mx.gather_qmm(*arrays, **keywords, group_size=64, stream=mx.cpu))
    value, bound = experts.exact_and_bound(x, lhs, rhs, lambda *a: ref.bound_float(*a, 64, transpose))
    for y in (theirs, experts.gather(x, lhs, rhs), experts.gather(x, lhs, rhs, accumulate="float")):
        assert y.shape == (2, 5, 3, 64)
        assert (np.abs(y.reshape(value.shape) - value) <= bound).all()


# ---------------------------------------------------------------------------------------------------------------------
# Indices


@pytest.fixture
def experts(rng):
    return Experts(rng, 6, 5, 64)


@pytest.mark.parametrize("dtype", [*"bhilqBHILQpP", ">i2", ">u8"])
def test_indices_of_every_type(experts, dtype):
    lhs, rhs = np.array([1, 0, 2], dtype), np.array([5, 0, 3], dtype)
    experts.check(experts.x(3, 2), lhs, rhs)
    if lhs.dtype.kind == "i":
        experts.check(experts.x(3, 2), np.array([-1, 0, -3], dtype), np.array([-6, 5, -1], dtype))


def test_indices_of_every_form(experts):
    x = experts.x(3, 2)
    two = np.arange(12).reshape(3, 4) % 6
    strided = [two, two.T, two[::-1, ::2], two[:, 1], np.asfortranarray(two), np.broadcast_to(two[0], (3, 4)), two[:0]]
    for rhs in [
        *strided[:-1],
        5,
        -6,
        np.int8(3),
        np.array(2),
        [1, 5],
        ((0, 1), (2, 3)),
        [[4]],
        memoryview(b"\x02\x05"),
    ]:
        experts.check(x, 1, rhs)
    assert experts.gather(x, 1, two[:0]).shape == (0, 4, 2, 5)
    unaligned = np.frombuffer(b"\0" + two.tobytes(), two.dtype, 12, 1)
    experts.check(x, 1, unaligned)


def test_indices_broadcast(experts):
    x = experts.x(2, 3, 2)
    for left, right in (((4,), (4,)), ((4, 1), (3,)), ((), (2, 2)), ((2, 1, 3), (4, 1)), ((1,), (5,))):
        experts.check(x, indices(experts.rng, 0, 6, *left), indices(experts.rng, 0, 6, *right))
    for left, right in (((4,), (3,)), ((2, 2), (3, 2)), ((0,), (2,))):
        text = f"{left} of lhs_indices and {right} of rhs_indices do not broadcast"
        with pytest.raises(ValueError, match=r"^affine_gather_qmm: the shapes ") as caught:
            experts.gather(x, np.zeros(left, int), np.zeros(right, int))
        assert text in str(caught.value)


def test_indices_left_out(experts):
    """Then it is every matrix, in the shape of the batch; without both it is the product of the batches."""
    x = experts.x(2, 1, 3)
    experts.check(x, None, [1, 5, 0])
    experts.check(x, [[1], [0]], None)
    assert_same_bytes(experts.check(x), q.affine_qmm_t(x, *experts.stored, **experts.options))
    experts.check(experts.x(3), None, [[4], [2]])
    experts.check(experts.x(3), [0, 0], [4, 2])
    first = [a[0] for a in experts.stored]
    experts.check(x, [1, 1], None, stored=first)


def out_of_range(experts, message, lhs, rhs, x=None, stored=None):
    x = experts.x(3, 2) if x is None else x
    shape = np.broadcast_shapes(np.shape(lhs), np.shape(rhs))
    out = np.full((*shape, 2, 5), 7, F32)
    with pytest.raises(IndexError) as caught:
        experts.gather(x, lhs, rhs, stored=stored, out=out)
    assert str(caught.value) == f"affine_gather_qmm: {message}"
    assert (out == 7).all()


def test_indices_out_of_range(experts):
    """The first wrong one is named, with its position and the bound; nothing is written."""
    w, x = "must be from -6 to 5, as w has 6 matrices", "must be from -3 to 2, as x has 3 matrices"
    out_of_range(experts, f"rhs_indices[3] {w}, got 6", 0, [0, 5, -6, 6, 99])
    out_of_range(experts, f"rhs_indices[1, 0] {w}, got -7", 0, np.array([[5, 5], [-7, 5]]).T.copy().T)
    out_of_range(experts, f"lhs_indices[0] {x}, got 3", [3, 3], [0, 6])
    out_of_range(experts, f"lhs_indices {x}, got -4", -4, [0, 1])
    for dtype in (np.uint64, np.int64, np.uint32, np.int8):
        for value in (np.iinfo(dtype).max, np.iinfo(dtype).min) if dtype in (np.int64, np.int8) else (2**32 - 1,):
            out_of_range(experts, f"rhs_indices[1] {w}, got {value}", 0, np.array([0, value], dtype))
    for value in (2**63, 2**64 - 1, 2**64 - 6):  # not -1 and its like
        out_of_range(experts, f"rhs_indices[0] {w}, got {value}", 0, np.array([value], np.uint64))
    nothing = [a[:0] for a in experts.stored]
    out_of_range(experts, "rhs_indices[0] is 0, but w has no matrices", 0, [0], stored=nothing)
    with pytest.raises(IndexError, match=r"^affine_gather_qmm_rhs: indices\[2\] must be from -6 to 5"):
        q.affine_gather_qmm_rhs(experts.x(3), *experts.stored, [0, 1, 6])
    with pytest.raises(IndexError, match=r"^affine_gather_qmm_rhs_nax: indices\[0\] must be from -6 to 5"):
        q.affine_gather_qmm_rhs_nax(experts.x(3), *experts.stored, [-7, 1, 0])


def test_indices_are_integers(experts):
    x = experts.x(3, 2)
    for wrong, got in (
        ([0.0], "list"),
        ([True], "list"),
        ("0", "str"),
        ({}, "dict"),
        ([[0], [1, 2]], "list"),
    ):
        for argument, given in (("lhs_indices", {"lhs": wrong}), ("rhs_indices", {"rhs": wrong})):
            with pytest.raises(TypeError) as caught:
                experts.gather(x, **given)
            assert str(caught.value) == f"affine_gather_qmm: {argument} must be an array of integers, got {got}"
    for dtype in ("float32", "bool", "object", "complex64", "U1", "M8[s]"):
        wrong = np.zeros(2, dtype)
        with pytest.raises(TypeError) as caught:
            experts.gather(x, 0, wrong)
        assert str(caught.value) == f"affine_gather_qmm: rhs_indices has dtype {wrong.dtype}, must be integers"


@pytest.mark.parametrize("nothing", [[], (), [[], []], np.zeros((2, 0), np.int8)], ids=repr)
def test_no_indices(experts, nothing):
    """Empty lists are indices to NumPy, whatever type it reads them as; its empty arrays of floats are none."""
    shape = np.take(np.arange(6), nothing).shape
    x = experts.x(3, 2)
    y = experts.gather(x, 0, nothing)
    assert (y.dtype, y.shape) == (x.dtype, (*shape, *experts.gather(x, 0, 0).shape))
    assert q.affine_gather_qmm_rhs(x[:0, 0], *experts.stored, nothing if len(shape) == 1 else []).shape[0] == 0
    with pytest.raises(TypeError, match="rhs_indices has dtype float64, must be integers"):
        experts.gather(x, 0, np.zeros(shape))


def test_indices_are_read_once(experts):
    """Whoever changes them later, even while they are read, cannot lead a kernel astray."""
    asked = []

    class Changing:
        def __array__(self, dtype=None, copy=None):
            asked.append(self)
            return np.array([1, 5] if len(asked) == 1 else [99, 99])

    x = experts.x(3, 2)
    y = experts.gather(x, 0, Changing())
    assert len(asked) == 1
    assert_same_bytes(y, experts.one_by_one(x, 0, [1, 5]))


def test_indices_that_raise(experts):
    class Failing:
        def __array__(self, dtype=None, copy=None):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experts.gather(experts.x(3, 2), 0, Failing())


def test_sorted_indices_is_only_a_word(experts):
    x = experts.x(3, 2)
    for rhs in ([0, 1, 1, 5], [5, 1, 0, 1], [-1, 0, 5]):
        for lhs in (0, None if len(rhs) == 3 else 2):
            for said in (True, False, np.True_, np.False_):
                experts.check(x, lhs, rhs, sorted_indices=said)
    for name in ("sorted_indices", "transpose"):
        for wrong in (1, 0, None, "yes", np.ones(1, bool)):
            kind = type(wrong).__name__
            with pytest.raises(TypeError, match=rf"^affine_gather_qmm: {name} must be True or False, got {kind}$"):
                experts.gather(x, 0, 0, **{name: wrong})
    with pytest.raises(TypeError, match=r"^affine_gather_qmm_rhs: transpose must be True or False, got int$"):
        q.affine_gather_qmm_rhs(x, *experts.stored, 0, None, 64, 4, 1)


def test_indices_of_other_libraries(experts):
    x = experts.x(3, 2)
    expected = experts.one_by_one(x, [0, 2], [5, 1])
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    for dtype in (mx.uint32, mx.int32, mx.int64, mx.uint8):
        assert_same_bytes(experts.gather(x, mx.array([0, 2], dtype), mx.array([5, 1], dtype)), expected)


def test_many_experts(isa, rng):
    """More than sorting takes at a time, and more than are multiplied together, in any order."""
    experts = Experts(rng, 5000, 1, 32, 32, 2)
    x, rhs = experts.x(300, 1), indices(rng, -5000, 5000, 300)
    experts.check(x, None, rhs)
    experts.check(x, indices(rng, 0, 300, 300), np.sort(rhs))


def test_rows_of_an_expert_meet_wherever_they_stand(isa, rng):
    """In the float class bits tell how many rows were multiplied together: those of a sorted call."""
    experts = Experts(rng, 5000, 1, 128, 32, 2)
    rhs = np.tile([2049, 1, 4097], 9)  # alike in the lowest 11 bits
    x, order = experts.x(27, 1), np.argsort(rhs, kind="stable")
    y = experts.gather(x, None, rhs, accumulate="float")
    assert_same_bytes(y[order], experts.gather(x, order, rhs[order], accumulate="float"))
    one = [a[1] for a in experts.stored]
    together = q.affine_qmm_t(x[rhs == 1, 0], *one, **experts.options, accumulate="float")
    assert_same_bytes(y[rhs == 1, 0], together)
    alone = [q.affine_qmm_t(row, *one, **experts.options, accumulate="float") for row in x[rhs == 1]]
    assert not np.array_equal(together, np.concatenate(alone))


# ---------------------------------------------------------------------------------------------------------------------
# Memory and shapes


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("accumulate", ["exact", "float"])
def test_strides_of_inputs_and_out(isa, transpose, accumulate, rng):
    """Stepped, reversed, transposed and unaligned; words of a row that are apart; out of any strides."""
    experts = Experts(rng, 4, 64, 128, transpose=transpose)
    x, lhs, rhs = experts.x(5, 2), indices(rng, 0, 5, 12), indices(rng, 0, 4, 12)
    expected = experts.gather(x, lhs, rhs, accumulate=accumulate)

    def views(a):
        stepped = np.zeros((2 * a.shape[0], a.shape[1] + 1, a.shape[2]), a.dtype)[::2, 1:]
        backwards = np.zeros(a.shape, a.dtype)[::-1, ::-1, ::-1]
        columns = np.zeros(a.shape[::-1], a.dtype).T
        unaligned = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
        for view in (stepped, backwards, columns, unaligned):
            view[...] = a
            yield view

    for given in zip(*(views(a) for a in (x, *experts.stored)), strict=True):
        y = experts.gather(given[0], lhs, rhs, stored=given[1:], accumulate=accumulate)
        assert_same_bytes(y, expected)
        out = np.zeros((64, 2, 24), F32).T[::2]
        assert experts.gather(given[0], lhs, rhs, stored=given[1:], accumulate=accumulate, out=out) is out
        assert_same_bytes(np.ascontiguousarray(out), expected)


def test_nothing_is_written_outside_of_out(isa, guarded, rng):
    for transpose, kind in itertools.product((True, False), ("float32", "float16")):
        experts = Experts(rng, 3, 64, 64, transpose=transpose, kind=kind)
        x, lhs, rhs = experts.x(4, 3), indices(rng, 0, 4, 5), indices(rng, 0, 3, 5)
        expected = experts.one_by_one(x, lhs, rhs)
        out = guarded.empty(expected.shape, expected.dtype, 2)
        experts.gather(x, lhs, rhs, out=out)
        assert_same_bytes(out, expected)


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("accumulate", ["exact", "float"])
def test_empty_shapes(isa, transpose, accumulate):
    """No rows, outputs, indices or matrices: nothing. No inputs: zeros, the empty sum."""
    cases = [(0, 64, 64, 2), (3, 0, 64, 2), (3, 64, 64, 0), (3, 64, 0, 2), (0, 0, 0, 0)]
    for m, n, k, count in cases:
        rows, columns = (n, k) if transpose else (k, n)
        scales = np.ones((4, rows, columns // 64), F32)
        words = np.zeros((4, rows, columns // 8), np.uint32)
        chosen = np.zeros(count, int)
        options = {"transpose": transpose, "group_size": 64, "bits": 4, "accumulate": accumulate}
        y = q.affine_gather_qmm(np.ones((2, m, k), F32), words, scales, scales, chosen, chosen, **options)
        assert_same_bytes(y, np.zeros((count, m, n), F32))


def test_batches_that_claim_to_be_huge(rng):
    """Strides of 0 make 2^40 matrices of x, of which two are used; scratch depends on what is used."""
    experts = Experts(rng, 2, 5, 64)
    one = experts.x(1, 2)
    x = as_strided(one, (1 << 20, 1 << 20, 2, 64), (0, 0, *one.strides[1:]))
    y = experts.gather(x, [7, (1 << 40) - 1], [1, 0])
    assert_same_bytes(y, experts.one_by_one(one, [0, 0], [1, 0]))
    empty = [as_strided(a[:, :0], (1 << 40, 0, a.shape[-1]), (0, *a.strides[1:])) for a in experts.stored]
    assert experts.gather(one, [0], None, stored=empty, group_size=64).shape == (1 << 40, 2, 0)


def test_dimensions(experts):
    rule = "x must have 2 to 32 dimensions and w at least 2, got shapes"
    with pytest.raises(ValueError, match=r"^affine_gather_qmm: ") as caught:
        experts.gather(experts.x(), 0, 0)
    assert str(caught.value).endswith(f": {rule} (64,) and (6, 5, 8)")
    with pytest.raises(
        ValueError, match=r"^affine_gather_qmm: lhs_indices and rhs_indices have 31 dimensions, at most 30"
    ):
        experts.gather(experts.x(3, 2), 0, np.zeros((1,) * 31, int))
    assert experts.gather(experts.x(3, 2), 0, np.zeros((1,) * 30, int)).ndim == 32
    deep = np.ones((1,) * 31 + (64,), F32)
    with pytest.raises(ValueError, match=r"^affine_gather_qmm_rhs: x must have 1 to 31 dimensions"):
        q.affine_gather_qmm_rhs(deep, *experts.stored, 0)


@pytest.mark.parametrize("transpose", [True, False])
def test_group_size_and_bits_are_inferred(transpose, rng):
    experts = Experts(rng, 2, 96, 96, 32, 8, transpose)
    x = experts.x(2, 3)
    expected = experts.one_by_one(x, None, [1, 0])
    for given in [{"group_size": 32}, {"bits": 8}] + [{}] * transpose:
        options = {"group_size": None, "bits": None, **given}
        assert_same_bytes(experts.gather(x, None, [1, 0], **options), expected)
    rows = q.affine_gather_qmm_rhs(x[:, 0], *experts.stored, [1, 0], 96, transpose=transpose)
    assert_same_bytes(rows, expected[:, 0])
    with pytest.raises(ValueError, match=r"output_features must be 96, the output features of w.*, got 64$"):
        q.affine_gather_qmm_rhs(x[:, 0], *experts.stored, [1, 0], 64, 32, 8, transpose)


@pytest.mark.parametrize("accumulate", ["exact", "float"])
def test_rows_padded_to_whole_groups(isa, accumulate, rng):
    """x of the true K, or fewer outputs than the padded axis holds: as with zeros, or without what is padding."""
    for kind, transpose in itertools.product(("float32", "float16"), (True, False)):
        experts = Experts(rng, 3, 128, 128, transpose=transpose, kind=kind)
        x, lhs, rhs = experts.x(5, 2), indices(rng, 0, 5, 20), indices(rng, 0, 3, 20)
        stored, options = (
            experts.stored,
            {"accumulate": accumulate, "group_size": 64, "bits": 4, "transpose": transpose},
        )
        if transpose:
            x[..., 103:] = 0
            expected = q.affine_gather_qmm(x, *stored, lhs, rhs, **options)
            assert_same_bytes(q.affine_gather_qmm(x[..., :103], *stored, lhs, rhs, **options), expected)
        else:
            expected = q.affine_gather_qmm_rhs(x[lhs, 0], *stored, rhs, **options)
            fewer = q.affine_gather_qmm_rhs(x[lhs, 0], *stored, rhs, 103, **options)
            assert_same_bytes(fewer, np.ascontiguousarray(expected[:, :103]))


# ---------------------------------------------------------------------------------------------------------------------
# Rows by indices, and the other names


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("function", [q.affine_gather_qmm_rhs, q.affine_gather_qmm_rhs_nax])
def test_rows_by_indices(isa, transpose, function, rng):
    """[M, K] with M indices; rows that broadcast against their indices; one row."""
    experts = Experts(rng, 4, 64, 192, transpose=transpose)
    options = {**experts.options, "transpose": transpose}
    x, chosen = experts.x(3, 1), indices(rng, -4, 4, 3, 5)
    expected = experts.one_by_one(x[:, :, None], None, chosen)[..., 0, :]
    assert_same_bytes(function(x, *experts.stored, chosen, **options), expected)
    rows = np.broadcast_to(x, (3, 5, 192)).reshape(15, 192)
    flat = function(rows, *experts.stored, chosen.ravel(), 64, 64, 4, transpose)  # as published, by position
    assert_same_bytes(flat, expected.reshape(15, 64))
    assert_same_bytes(function(x[1, 0], *experts.stored, chosen[1], **options), expected[1])
    assert_same_bytes(function(x[1, 0], *experts.stored, chosen[1, 2], **options), expected[1, 2])
    with pytest.raises(ValueError, match=r"the shapes \(3,\) of x.shape\[:-1\] and \(5,\) of indices do not broadcast"):
        function(x[:, 0], *experts.stored, chosen[0], **options)


@pytest.mark.parametrize("kind", KINDS)
def test_nax_names_compute_the_same(isa, kind, rng):
    t, n = (Experts(rng, 1, 128, 128, transpose=transpose, kind=kind) for transpose in (True, False))
    for function, nax, experts in ((q.affine_qmm_t, q.affine_qmm_t_nax, t), (q.affine_qmm_n, q.affine_qmm_n_nax, n)):
        for m in (1, 9):
            given = [experts.x(m), *(a[0] for a in experts.stored)]
            assert_same_bytes(nax(*given, **experts.options), function(*given, **experts.options))
    kernel = q.AffineQmmTNax(64, 4)
    assert kernel.compile().op == "affine_qmm_t_nax"
    assert kernel.compile() is kernel._kernel


def test_kernels(experts):
    x = experts.x(3, 2)
    kernel = q.AffineGatherQmm(64, 4)
    assert kernel._kernel is None
    assert_same_bytes(kernel(x, *experts.stored, [2, 0], [1, 1]), experts.one_by_one(x, [2, 0], [1, 1]))
    assert kernel.compile() is kernel._kernel
    assert "exact" in repr(kernel)
    rows = q.AffineGatherQmmRhs(64, 4)(x[:, 0], *experts.stored, [1, 0, 5])
    assert_same_bytes(rows, experts.one_by_one(x[:, :1], None, [1, 0, 5])[:, 0])


@pytest.mark.parametrize("argument", ["accumulate", "activations"])
def test_options_are_those_of_products(experts, argument):
    with pytest.raises(ValueError, match=rf"^affine_gather_qmm: {argument} must be"):
        experts.gather(experts.x(3, 2), **{argument: "nonsense"})


# ---------------------------------------------------------------------------------------------------------------------
# Shapes on which MLX's kernels have been wrong


@pytest.mark.parametrize("k", [32, 96, 544, 160])
def test_mlx_3887_k_that_is_no_multiple_of_64_with_sorted_experts(isa, k, rng):
    """The last rows of K were taken from beyond x, and rows of W were cleared instead of its columns."""
    experts = Experts(rng, 4, 96, k, 32)
    experts.check(experts.x(40, 1), None, np.sort(indices(rng, 0, 4, 40)), sorted_indices=True)


def test_mlx_3856_more_than_32768_rows(isa, rng):
    """Row numbers of 16 bits wrapped. Sampled rows are compared with their own products."""
    experts = Experts(rng, 3, 8, 32, 32)
    count = 33000
    x, chosen = experts.x(count), np.sort(indices(rng, 0, 3, count))
    y = q.affine_gather_qmm_rhs(x, *experts.stored, chosen, **experts.options)
    some = [0, 1, 32766, 32767, 32768, 32769, count - 1, *indices(rng, 0, count, 40)]
    expected = experts.one_by_one(x[some][:, None], None, chosen[some])[:, 0]
    assert_same_bytes(y[some], expected)
    one = [a[1] for a in experts.stored]
    there = chosen == 1
    assert_same_bytes(y[there], q.affine_qmm_t(x[there], *one, **experts.options))


@pytest.mark.parametrize("n", [1, 3, 7, 9, 33, 67, 99, 555])
def test_mlx_3762_n_that_is_no_multiple_of_8(isa, n, rng):
    """And MLX's own shapes of few or odd outputs."""
    experts = Experts(rng, 3, n, 64, 32)
    experts.check(experts.x(11, 1), None, indices(rng, 0, 3, 11))
    experts.check(experts.x(2, 9), [1, 0, 1], [2, 2, 0])


@pytest.mark.parametrize("transpose", [True, False])
def test_mlx_3480_weights_that_heads_share_have_a_stride_of_0(isa, transpose, rng):
    """Grouped queries, where np.broadcast_to repeats keys and values for the heads of a group."""
    experts = Experts(rng, 3, 64, 64, transpose=transpose)
    shared = [np.broadcast_to(a[:, None], (3, 4, *a.shape[1:])) for a in experts.stored]
    assert shared[0].strides[1] == 0
    x = experts.x(3, 4, 5)
    experts.check(x, stored=shared)
    experts.check(x, None, indices(rng, 0, 12, 3, 4), stored=shared)
    one_scale = [shared[0], *(np.broadcast_to(a[:1, :1, :1, :1], a.shape) for a in shared[1:])]
    experts.check(x, None, indices(rng, 0, 12, 3, 4), stored=one_scale)


@pytest.mark.parametrize("transpose", [True, False])
def test_sliced_weights_with_sorted_experts(isa, transpose, rng):
    """Parts of stored arrays, as when gate and up projections stand in one: batch strides are not the sizes."""
    experts = Experts(rng, 4, 128, 128, transpose=transpose)
    half = [a[:, : a.shape[1] // 2] for a in experts.stored] if transpose else [a[::2] for a in experts.stored]
    rhs = np.sort(indices(rng, 0, len(half[0]), 30))
    assert not half[0].flags.c_contiguous
    experts.check(experts.x(30, 1), None, rhs, stored=half, sorted_indices=True)
    experts.check(experts.x(30, 1), None, rhs[::-1], stored=half)


def test_scratch_that_cannot_be_had_in_every_class(rng):
    """The nth allocation fails, for every n: MemoryError, and nothing is written."""
    for transpose, accumulate in itertools.product((True, False), ("exact", "float")):
        experts = Experts(rng, 3, 64, 64, transpose=transpose)
        stored = [np.asfortranarray(experts.stored[0]), *experts.stored[1:]]
        x, out = experts.x(4, 1), np.full((4, 1, 64), 7, F32)
        try:
            for successes in range(20):
                _C.fail_allocations_after(successes)
                with pytest.raises(MemoryError):
                    experts.gather(x, None, [2, 0, 1, 1], stored, out=out, accumulate=accumulate)
                assert (out == 7).all()
                if successes == 5:
                    break
        finally:
            _C.fail_allocations_after(-1)


def test_rows_prepared_in_two_ways(rng):
    """A matrix of x that meets many rows' weights first and those of few then, in a portion of one long K: the float
    class prepares it twice. Exact sums tell what must come, but for the rounding of both (`roundings_float`)."""
    k = 75008
    x = rng.standard_normal((2, 7, k)).astype(np.float32)
    w, scales, biases = q.affine_quantize(rng.standard_normal((2, 8, k)).astype(np.float32), 64, 2)
    arguments = {"lhs_indices": [0, 1, 0], "rhs_indices": [0, 0, 1], "group_size": 64, "bits": 2}
    ours, exact = (
        q.affine_gather_qmm(x, w, scales, biases, **arguments, accumulate=accumulate)
        for accumulate in ("float", "exact")
    )
    sizes = np.abs(x).sum(axis=2)[[0, 1, 0]][..., None] * np.abs(q.affine_dequantize(w, scales, biases, 64, 2)).max()
    assert (np.abs(ours - exact) <= 2 * ref.roundings_float(k) * ref.U * sizes).all()
