"""Gathered products with mxfp4, mxfp8 and nvfp4 weights: the bits of products one by one; see test_gather too."""

import functools

import numpy as np
import pytest

import quantization as q
import reference as ref
import reference_fp as fp
from test_matmul_float_fp import every_float_mode, every_kind
from test_matmul_fp import both_layouts, every_class, every_mode, every_mode_and_kind, make

F32 = np.float32


def experts(mode, transpose, rng, kind, **options):
    """Three matrices of weights, and five of x with three rows each."""
    products = [make(mode, transpose, rng, 15, 21, 80, kind, **options) for _ in range(3)]
    stored = [np.stack([getattr(p, name) for p in products]) for name in ("words", "scales")]
    return products[0].x.reshape(5, 3, -1), stored, products[0].keywords


def assert_same_bits(ours, expected):
    assert ours.dtype == expected.dtype and ours.shape == expected.shape and ours.tobytes() == expected.tobytes()


@both_layouts
@every_mode_and_kind
def test_equals_products_one_by_one(isa, mode, kind, transpose, rng):
    x, stored, keywords = experts(mode, transpose, rng, kind)
    one = getattr(q, f"{mode}_{'qmm_t' if transpose else 'qmm_n'}")
    lhs, rhs = rng.integers(0, 5, (1, 9)), rng.integers(-3, 3, (2, 1))
    y = getattr(q, f"{mode}_gather_qmm")(x, *stored, lhs, rhs, transpose, sorted_indices=True, **keywords)
    assert y.shape[:3] == (2, 9, 3)
    for i, j in np.ndindex(2, 9):
        matrix = [part[rhs[i, 0]] for part in stored]
        assert_same_bits(y[i, j], one(x[lhs[0, j]], *matrix, **keywords))
    rows, chosen = x.reshape(15, -1), rng.integers(0, 3, 15)
    y = getattr(q, f"{mode}_gather_qmm_rhs")(rows, *stored, chosen, transpose=transpose, **keywords)
    for i in range(15):
        assert_same_bits(y[i : i + 1], one(rows[i : i + 1], *[part[chosen[i]] for part in stored], **keywords))


@both_layouts
@every_kind
@every_float_mode
def test_float_sums(isa, mode, kind, transpose, rng):
    """Within the bound, in the bits of the product with all rows that meet the same weights, on any number of threads.

    Matrix 0 meets 3 rows of x, matrix 1 meets 24: few, and as many as panels are decoded for.
    """
    x, stored, keywords = experts(mode, transpose, rng, kind)
    keywords = keywords | {"accumulate": "float"}
    lhs, rhs = [0, 1, 2, 3, 4, 0, 1, 2, 3], [1, 1, 0, 1, 1, 1, 1, 1, 1]
    y = getattr(q, f"{mode}_gather_qmm")(x, *stored, lhs, rhs, transpose, **keywords)
    one = getattr(q, f"{mode}_{'qmm_t' if transpose else 'qmm_n'}")
    for matrix in (0, 1):
        chosen = [i for i in range(9) if rhs[i] == matrix]
        rows = np.concatenate([x[lhs[i]] for i in chosen])
        together = one(rows, *[part[matrix] for part in stored], **keywords)
        assert_same_bits(np.concatenate([y[i] for i in chosen]), together)
        codes = ref.unpack(stored[0][matrix], 4, stored[0].shape[-1] * 8)
        arrays = ref.to_f32(rows, kind), codes, stored[1][matrix], mode, transpose
        value, bound = fp.exact64(*arrays), fp.bound_float(*arrays)
        rounding = 0 if kind == "float32" else ref.half_ulp(np.abs(value) + bound, kind)
        assert (np.abs(ref.to_f32(together, kind).astype(np.float64) - value) <= bound + rounding).all()
    for threads in (1, 3):
        with q.threads(threads):
            again = getattr(q, f"{mode}_gather_qmm_rhs")(
                x[lhs].reshape(27, -1), *stored, np.repeat(rhs, 3), transpose=transpose, **keywords
            )
        assert_same_bits(again.reshape(y.shape), y)


@every_class
@both_layouts
def test_global_scale(isa, transpose, accumulate, rng):
    x, stored, keywords = experts("nvfp4", transpose, rng, "float32", global_scale=300.0)
    keywords = keywords | {"accumulate": accumulate}
    one = q.nvfp4_qmm_t if transpose else q.nvfp4_qmm_n
    y = q.nvfp4_gather_qmm(x, *stored, [4, 1], [2, 0], transpose, **keywords)
    assert_same_bits(y[1], one(x[1], *[part[0] for part in stored], **keywords))
    plain = q.nvfp4_gather_qmm(x, *stored, [4, 1], [2, 0], transpose, accumulate=accumulate)
    assert_same_bits(y, plain * (F32(300) / F32(2688)))


@every_class
@both_layouts
@every_mode
def test_true_length(isa, mode, transpose, accumulate, rng):
    """Rows that end within a group of the weights: x, or the outputs, leave the padding out."""
    x, stored, _ = experts(mode, transpose, rng, "float32")
    gather, rows, one = (
        functools.partial(getattr(q, f"{mode}_{name}"), accumulate=accumulate)
        for name in ("gather_qmm", "gather_qmm_rhs", "qmm_t")
    )
    if transpose:
        short = x[..., : x.shape[-1] - 5]
        zeroed = x.copy()
        zeroed[..., x.shape[-1] - 5 :] = 0
        assert_same_bits(gather(short, *stored, [1, 2], [0, 1]), gather(zeroed, *stored, [1, 2], [0, 1]))
        assert_same_bits(one(short[0], stored[0][0], stored[1][0]), one(zeroed[0], stored[0][0], stored[1][0]))
    else:
        whole = rows(x[:, 0], *stored, [0, 1, 2, 1, 0], transpose=False)
        n = whole.shape[1] - 3
        assert_same_bits(rows(x[:, 0], *stored, [0, 1, 2, 1, 0], n, transpose=False), whole[:, :n].copy())


@every_mode
def test_errors(mode, rng):
    x, stored, _ = experts(mode, True, rng, "float32")
    gather = getattr(q, f"{mode}_gather_qmm")
    with pytest.raises(IndexError, match=rf"^{mode}_gather_qmm: rhs_indices\[1\] must be from -3 to 2"):
        gather(x, *stored, [0, 1], [0, 3])
    with pytest.raises(TypeError, match=r"transpose must be True or False"):
        gather(x, *stored, [0], [0], 1)
    with pytest.raises(ValueError, match="w and scales must have the same shape but for the last axis"):
        gather(x, stored[0], stored[1][:2], [0], [0])
    if mode != "nvfp4":
        with pytest.raises(TypeError, match="global_scale"):
            gather(x, *stored, [0], [0], global_scale=1.0)


def test_global_scale_is_a_number(rng):
    x, stored, _ = experts("nvfp4", True, rng, "float32")
    for wrong in ("3", b"3", True, [3]):
        with pytest.raises(TypeError, match=r"^nvfp4_gather_qmm: global_scale must be a number"):
            q.nvfp4_gather_qmm(x, *stored, [0], [0], global_scale=wrong)
    for wrong in (-1, np.nan, np.inf, 10**400):
        with pytest.raises(ValueError, match=r"^nvfp4_gather_qmm: global_scale "):
            q.nvfp4_gather_qmm(x, *stored, [0], [0], global_scale=wrong)


def test_indices_of_rows_are_required(rng):
    x, stored, _ = experts("mxfp4", True, rng, "float32")
    with pytest.raises(TypeError, match="indices must be an array of integers, got None"):
        q.mxfp4_gather_qmm_rhs(x[:, 0], *stored, None)
