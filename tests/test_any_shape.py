"""Rows that end within a group, and every shape of those on which kernels elsewhere have broken."""

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import layouts
import quantization as q
import reference as ref
from conftest import FORMATS, SMALL, Page, assert_same_bytes
from test_matmul import KINDS, LAYOUTS, Product, random_weights
from test_matmul_fp import make
from test_quantize import PROFILES, assert_floats, assert_quantized, declared, dequantized, quantized

F32 = np.float32
FLOATS = ("float32", "float16", "bfloat16")

every_format = pytest.mark.parametrize(("mode", "bits", "group_size"), FORMATS)


def lengths(group_size):
    """Last axes that end anywhere in a group, in one row's first and in a later one, with that of Gemma 3's vision."""
    return [1, group_size - 1, group_size + 7, 3 * group_size + group_size // 2, *([] if SMALL else [4304 - 11])]


def padded(array, group_size):
    """The array with zeros after each row, up to whole groups."""
    missing = -array.shape[-1] % group_size
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)])


# ---------------------------------------------------------------------------------------------------------------------
# Quantize and dequantize


@every_format
def test_padded_rows_are_stored_as_if_zeros_followed(isa, mode, bits, group_size, rng):
    for k in lengths(group_size):
        w = (rng.standard_normal((5, k)) * 10.0 ** rng.uniform(-3, 3, (5, 1))).astype(F32)
        for i, kind in enumerate(FLOATS):
            stored = ref.round_to(w, kind)
            profile = PROFILES[(i + k) % 2]
            expected = quantized(padded(stored, group_size), kind, group_size, bits, profile)
            for layout in layouts.fixed(2)[i::3]:
                ours = q.affine_quantize(
                    layout.place(stored), group_size, bits, profile=profile, pad=True, **declared(kind)
                )
                assert_quantized(ours, expected, kind)


@every_format
def test_dequantize_leaves_padding_out(isa, mode, bits, group_size, rng):
    for k in lengths(group_size):
        codes = rng.integers(0, 2**bits, (5, k + -k % group_size), dtype=np.uint8)
        parts = rng.standard_normal((2, 5, codes.shape[1] // group_size))
        for i, kind in enumerate(FLOATS):
            scales, biases = (ref.round_to(part, kind) for part in parts)
            profile = PROFILES[(i + k) % 2]
            expected = dequantized(codes, scales, biases, (kind, kind), group_size, None, profile)[:, :k]
            keywords = {"profile": profile, "k": k, **declared(kind)}
            ours = q.affine_dequantize(ref.pack(codes, bits), scales, biases, group_size, bits, **keywords)
            assert_floats(ours, expected, kind)
            for layout in layouts.fixed(2)[i::3]:
                memory, out = layout.empty(expected.shape, expected.dtype)
                q.affine_dequantize(ref.pack(codes, bits), scales, biases, group_size, bits, out=out, **keywords)
                assert_floats(out, expected, kind)
                layout.check(memory, out.shape, out.dtype)


def test_padded_rows_of_several_dimensions(rng):
    w = rng.standard_normal((2, 3, 70)).astype(F32)
    ours = q.affine_quantize(w, 32, 3, pad=True)
    assert_quantized(ours, quantized(padded(w, 32), "float32", 32, 3, "metal"), "float32")
    whole = q.affine_dequantize(*ours, 32, 3)
    assert_floats(q.affine_dequantize(*ours, 32, 3, k=70), whole[..., :70], "float32")
    alone = q.affine_quantize(w[0, 0], 32, 3, pad=True)
    assert all(np.array_equal(a, b[0, 0]) for a, b in zip(alone, ours, strict=True))


def test_large_padded_rows_bypass_the_caches(rng):
    """More bytes of results than are written through the caches."""
    codes, scales, biases = random_weights(rng, 700, 4352, 64, 4)
    whole = q.affine_dequantize(ref.pack(codes, 4), scales, biases, 64, 4)
    assert_floats(q.affine_dequantize(ref.pack(codes, 4), scales, biases, 64, 4, k=4303), whole[:, :4303], "float32")


def test_padding_changes_nothing_where_none_is_needed(rng):
    w = rng.standard_normal((3, 128)).astype(F32)
    assert_quantized(q.affine_quantize(w, pad=True), q.affine_quantize(w), "float32")
    empty = q.affine_quantize(w[:, :0], pad=True)
    assert [part.shape for part in empty] == [(3, 0)] * 3
    assert q.affine_dequantize(*empty, 64, 4, k=0).shape == (3, 0)
    for k in (-1, -63, -64, 1):
        with pytest.raises(ValueError, match=rf"k must be between 0 and 0, which 0 groups of 64 hold, got {k}$"):
            q.affine_dequantize(*empty, 64, 4, k=k)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_padded_rows_of_small_floats(isa, mode, rng):
    quantize, dequantize = getattr(q, f"{mode}_quantize"), getattr(q, f"{mode}_dequantize")
    group_size = 16 if mode == "nvfp4" else 32
    for k in lengths(group_size):
        w = rng.standard_normal((5, k)).astype(F32)
        ours, expected = quantize(w, pad=True), quantize(padded(w, group_size))
        assert all(np.array_equal(a, b) for a, b in zip(ours, expected, strict=True))
        assert_floats(dequantize(*ours, k=k), dequantize(*expected)[:, :k], "float32")


def test_mlx_reads_padded_rows(rng):
    mx = pytest.importorskip("mlx.core", reason="MLX is the oracle here")
    mx.set_default_device(mx.cpu)
    w = rng.standard_normal((5, 4304)).astype(F32)
    codes, scales, biases = (mx.array(part) for part in q.affine_quantize(w, 64, 4, pad=True))
    theirs = np.array(mx.dequantize(codes, scales, biases, group_size=64, bits=4))
    ours = q.affine_dequantize(np.array(codes), np.array(scales), np.array(biases), 64, 4, k=4304, profile="cpu")
    assert theirs.shape == (5, 4352) and np.array_equal(theirs[:, :4304], ours)


# ---------------------------------------------------------------------------------------------------------------------
# Products


def padded_product(rng, layout, kind, group_size, bits, m, length):
    """A product along whose packed axis only `length` elements count, and its arguments as the caller gives them."""
    along = length + -length % group_size
    n, k = (11, along) if layout == "t" else (along, 37)
    rows, columns = (n, k) if layout == "t" else (k, n)
    x = rng.standard_normal((m, k)).astype(F32)
    if layout == "t":
        x[:, length:] = 0
    product = Product(layout, x, *random_weights(rng, rows, columns, group_size, bits), group_size, bits, kind)
    if layout == "t":
        return product, {"x": product.x[:, :length]}, product.expected
    return product, {"output_features": length}, product.expected[:, :length]


def results(product, layout, arguments):
    if layout == "t":
        return product.results(**arguments)
    keywords = {"group_size": product.group_size, "bits": product.bits, **product.keywords, **arguments}
    return [
        f(product.x, product.words, product.scales, product.biases, **keywords) for f in (q.affine_qmm_n, q.affine_qvm)
    ]


@every_format
@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_take_the_true_length(isa, layout, mode, bits, group_size, rng):
    for i, length in enumerate(lengths(group_size)[: 3 if SMALL else 4]):
        for m in (1, 3, 9):
            product, arguments, expected = padded_product(rng, layout, KINDS[(i + m) % 4], group_size, bits, m, length)
            for y in results(product, layout, arguments):
                assert_same_bytes(y, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [1, 8, 70])
def test_float_sums_take_the_true_length(isa, layout, m, rng):
    """The same bits as of the padded product: the zeros are the same summands."""
    for group_size, bits in ((32, 3), (128, 4)):
        for length in lengths(group_size):
            product, arguments, _ = padded_product(rng, layout, "float16", group_size, bits, m, length)
            padded_arguments = {} if layout == "t" else {"output_features": None}
            whole = results(product, layout, {"accumulate": "float", **padded_arguments})
            ours = results(product, layout, {"accumulate": "float", **arguments})
            for a, b in zip(ours, whole, strict=True):
                assert_same_bytes(a, b if layout == "t" else b[:, :length])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_true_length_in_strange_memory(isa, layout, rng):
    """Strided x and out, and rows of x with NaN, which the definition computes."""
    product, arguments, expected = padded_product(rng, layout, "float32", 64, 4, 4, 100)
    for at in layouts.fixed(2):
        memory, out = at.empty(expected.shape, expected.dtype)
        if layout == "t":
            arguments["x"] = at.place(product.x[:, :100])
        for y in results(product, layout, {**arguments, "out": out}):
            assert_same_bytes(y, expected)
        at.check(memory, out.shape, out.dtype)
    product.x[1, 3], product.x[2, 5] = np.nan, np.inf
    again = Product(layout, product.x, product.codes, product.scales, product.biases, 64, 4)
    if layout == "t":
        arguments["x"] = product.x[:, :100]
    for y in results(again, layout, arguments):
        assert_same_bytes(y, again.expected if layout == "t" else again.expected[:, :100])


@pytest.mark.parametrize("accumulate", ["exact", "float"])
@pytest.mark.parametrize("m", [1, 12])
def test_nothing_is_read_beyond_a_short_row(isa, accumulate, m, rng):
    for kind in ("float32", "float16"):
        product, arguments, _ = padded_product(rng, "t", kind, 64, 4, m, 70)
        x = np.ascontiguousarray(arguments["x"])
        expected = product.results(x=x, accumulate=accumulate)
        for at_end in (True, False):
            placed = Page(x.nbytes + 1).put(x, at_end)
            for y, same in zip(product.results(x=placed, accumulate=accumulate), expected, strict=True):
                assert_same_bytes(y, same)


def test_packing_is_inferred_from_a_short_row(rng):
    w = rng.standard_normal((3, 100)).astype(F32)
    stored, x = q.affine_quantize(w, 64, 4, pad=True), rng.standard_normal((2, 100)).astype(F32)
    expected = q.affine_qmm_t(x, *stored, 64, 4)
    for given in ({}, {"bits": 4}, {"group_size": 64}):
        assert_same_bytes(q.affine_qmm_t(x, *stored, **given), expected)
    short = q.affine_quantize(w[:, :30], 64, 4, pad=True)  # as well 30 of 32 codes of 8 bits, or of 128 of 2
    with pytest.raises(ValueError, match="give bits and group_size"):
        q.affine_qmm_t(x[:, :30], *short)
    assert q.affine_qmm_t(x[:, :30], *short, bits=4).shape == (2, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes on which kernels have broken: mlx_<number> is an issue or a pull request of ml-explore/mlx, here and in
# test_gather.py


def check_product(rng, layout, m, n, k, group_size=64, bits=4, kind="float32"):
    rows, columns = (n, k) if layout == "t" else (k, n)
    x = rng.standard_normal((m, k)).astype(F32)
    Product(layout, x, *random_weights(rng, rows, columns, group_size, bits), group_size, bits, kind).check()


def test_mlx_328_and_1033_last_axis_of_4304(isa, rng):
    """Rows of Gemma 3's vision tower, which no group size divides."""
    product, arguments, expected = padded_product(rng, "t", "bfloat16", 64, 4, 3, 4304)
    for y in results(product, "t", arguments):
        assert_same_bytes(y, expected)


@pytest.mark.parametrize("n", [1, 3, 5, 7, 9, 31, 33, 67, 99, 129])
def test_mlx_3762_and_4498_outputs_that_fill_no_tile(isa, n, rng):
    """N that is no multiple of 8, 32 or 64: weights were read as other rows', and all was slow."""
    for m in (1, 2, 13, 33):
        check_product(rng, "t", m, n, 96, 32)


@pytest.mark.parametrize("k", [32, 96, 160, 544])
def test_mlx_3887_k_that_ends_in_half_a_tile(isa, k, rng):
    """K % 64 == 32, which a tail bounded by the tile's size misread."""
    for m in (1, 4, 33):
        check_product(rng, "t", m, 40, k, 32, 8)
        check_product(rng, "n", m, 64, k, 32, 8)


def test_mlx_3856_rows_beyond_int16(isa, rng):
    """32768 rows and more of x."""
    check_product(rng, "t", 32768 + 3, 2, 32, 32, 4)


def test_mlx_3631_outputs_beyond_int16(isa, rng):
    """N beyond 32767."""
    check_product(rng, "t", 1, 32768 + 5, 32, 32, 4)
    check_product(rng, "n", 1, 32768 + 32, 3, 32, 4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [1, 2, 3, 7, 8, 13, 14, 15, 31, 33, 63, 65, 127, 129])
def test_mlx_3473_tails_of_rows(isa, layout, m, rng):
    """Every tail of M, each row the same bits as alone."""
    check_product(rng, layout, m, 32, 64, 32, 4, "float16")


@pytest.mark.parametrize("k", [1, 63, 65, 1025])
def test_mlx_4250_split_reduction(isa, k, rng):
    """x times W over a K that no split divides, N % 64 == 32: the last columns were not written."""
    for n in (32, 96):
        check_product(rng, "n", 1, n, k, 32, 4)


@pytest.mark.parametrize("k", [1, 63, 65, 2051])
def test_mlx_3854_split_reduction_of_nvfp4(isa, k, rng):
    """The same with nvfp4, which gave NaN."""
    for n in (16, 96):
        make("nvfp4", False, rng, 1, n, k).check()


@pytest.mark.parametrize("k", [16, 48, 80, 528])
def test_mlx_3912_nvfp4_that_ends_in_half_a_block(isa, k, rng):
    """K or N % 32 == 16, of which tiles of 32 misread a half."""
    for m in (1, 9, 33):
        make("nvfp4", True, rng, m, 48, k).check()
        make("nvfp4", False, rng, m, k, 40).check()


@pytest.mark.parametrize("transpose", [True, False], ids=["t", "n"])
def test_mlx_3557_and_3934_nvfp4_has_a_scale_for_each_16(isa, transpose):
    """The first half of each 32 lanes has scales of 1, the second of 64: one of them was taken for both."""
    codes, scales = np.full((64, 64), 2, np.uint8), np.tile(np.array([0x38, 0x68], np.uint8), (64, 2))  # code 2: 1.0
    weights, columns = np.repeat(F32([1, 64, 1, 64]), 16), np.arange(3, 63, 7)
    x = np.zeros((9, 64), F32)
    x[np.arange(9), columns] = 1
    expected = np.broadcast_to(weights[columns][:, None] if transpose else weights, (9, 64))
    for function in (q.nvfp4_qmm_t, q.nvfp4_qmv) if transpose else (q.nvfp4_qmm_n, q.nvfp4_qvm):
        for m in (1, 9):
            np.testing.assert_array_equal(function(x[:m], ref.pack(codes, 4), scales), expected[:m])


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("n", range(1, 8))
def test_mlx_3762_fewer_than_8_outputs_of_small_floats(isa, mode, n, rng):
    """Where scales were used as the bytes that they are."""
    for m in (1, 3, 17):
        make(mode, True, rng, m, n, 96).check()


@pytest.mark.parametrize("m", [64, 65])
def test_mlx_4201_untransposed_groups_of_32(isa, m, rng):
    """x times W with groups of 32, in tiles of 64: also by the names that stand for kernels of Metal's matrix units."""
    for k, n in ((64, 64), (96, 128)):
        check_product(rng, "n", m, n, k, 32)
        x = rng.standard_normal((m, k)).astype(F32)
        codes, scales, biases = random_weights(rng, k, n, 32, 4)
        stored, expected = (ref.pack(codes, 4), scales, biases), Product("n", x, codes, scales, biases, 32, 4).expected
        assert_same_bytes(q.affine_qmm_n_nax(x, *stored, group_size=32, bits=4), expected)
        one = [part[None] for part in stored]
        rows = q.affine_gather_qmm_rhs_nax(x, *one, np.zeros(m, int), transpose=False, group_size=32, bits=4)
        assert_same_bytes(rows, expected)


@pytest.mark.parametrize("k", [96, 544, 1056, 4128])
def test_mlx_3444_k_that_no_block_divides(isa, k, rng):
    """The end of K beyond whole blocks of 64 to 1024."""
    for m, bits in ((1, 4), (1, 8), (8, 4)):
        check_product(rng, "t", m, 19, k, 32, bits)


def test_mlx_4135_nan_of_fp8_stays_nan(isa):
    """Bytes 0x7F and 0xFF, which were decoded to 480; products with them: test_nan_codes_give_nan."""
    codes = np.array([0x7F, 0xFF, 0x7E, 0xFE], np.uint8)
    np.testing.assert_array_equal(q.from_fp8(codes), np.array([np.nan, np.nan, 448, -448], F32))
    w = np.zeros(32, np.uint8)
    w[:4] = codes
    decoded = q.mxfp8_dequantize(ref.pack(w[None], 8), np.full((1, 1), 127, np.uint8))
    np.testing.assert_array_equal(decoded[0, :4], np.array([np.nan, np.nan, 448, -448], F32))


@pytest.mark.parametrize(("mode", "largest"), [("mxfp4", 6.0), ("mxfp8", 448.0)])
@pytest.mark.parametrize("profile", PROFILES)
def test_mlx_4353_no_scale_saturates_its_group(isa, mode, largest, profile, rng):
    """Scales are the least powers of two by which the largest element fits; the nearest ones cut off up to 29 %."""
    w = rng.standard_normal((200, 32)).astype(F32)
    w[:, 0] = largest * np.linspace(1, 2, 200, dtype=F32)
    _, scales = getattr(q, f"{mode}_quantize")(w, profile=profile)
    steps = np.ldexp(F32(1), scales[:, 0].astype(int) - 127)
    most = np.abs(w).max(axis=1)
    assert (most <= largest * steps).all() and (most > largest * steps / 2).all()


def test_mlx_896_no_nan_comes_and_goes(isa, rng):
    """After a product full of NaN has used the same memory, by one thread and by two."""
    codes, scales, biases = random_weights(rng, 300, 512, 64, 4)
    stored, x = (ref.pack(codes, 4), scales, biases), rng.standard_normal((40, 512)).astype(F32)
    first = q.affine_qmm_t(x, *stored, 64, 4)
    assert np.isfinite(first).all()
    for threads in (1, 2) * 3:
        with q.threads(threads):
            q.affine_qmm_t(np.full_like(x, np.nan), *stored, 64, 4)
            assert_same_bytes(q.affine_qmm_t(x, *stored, 64, 4), first)


def test_mlx_3480_weights_shared_by_heads(isa, rng):
    """Scales and biases of stride 0, as of grouped queries."""
    codes, scales, biases = random_weights(rng, 9, 64, 64, 4)
    shape = (9, 1)
    scales, biases = (as_strided(part[:1], shape, (0, 4)) for part in (scales, biases))
    x = rng.standard_normal((5, 64)).astype(F32)
    expected = Product("t", x, codes, np.ascontiguousarray(scales), np.ascontiguousarray(biases), 64, 4).expected
    for function in (q.affine_qmm_t, q.affine_qmv):
        assert_same_bytes(function(x, ref.pack(codes, 4), scales, biases, group_size=64, bits=4), expected)
    heads = [np.broadcast_to(part, (3, *part.shape)) for part in (ref.pack(codes, 4), scales, biases)]
    assert_same_bytes(q.affine_qmm_t(np.stack([x] * 3), *heads, 64, 4), np.stack([expected] * 3))


def test_sliced_weights(isa, rng):
    """Every second output of a larger matrix, and groups from the middle of its rows."""
    codes, scales, biases = random_weights(rng, 20, 256, 64, 4)
    x = rng.standard_normal((5, 128)).astype(F32)
    rows, columns, groups = slice(1, None, 2), slice(64, 192), slice(1, 3)
    expected = Product("t", x, codes[rows, columns], scales[rows, groups], biases[rows, groups], 64, 4).expected
    words = ref.pack(codes, 4)[rows, 8:24]
    assert_same_bytes(q.affine_qmm_t(x, words, scales[rows, groups], biases[rows, groups], 64, 4), expected)


def test_groups_of_one_sign(isa):
    """All-negative groups use all codes under "cpu", and those of [w, 0] under "metal"; positive ones under neither."""
    w = np.linspace(-1.97, -1, 64, dtype=F32).reshape(1, 64)
    steps = [np.abs(q.affine_quantize(w, 64, 4, profile=profile)[1]).item() for profile in ("metal", "cpu")]
    assert steps[0] > 1.9 * steps[1]


def test_every_matrix_of_a_batch_is_used(isa, rng):
    """x of two dimensions with W of three: MLX's CPU backend takes W[0] for all."""
    codes, scales, biases = random_weights(rng, 3 * 8, 64, 64, 4)
    x = rng.standard_normal((2, 64)).astype(F32)
    split = [part.reshape(3, 8, -1) for part in (ref.pack(codes, 4), scales, biases)]
    y = q.affine_qmm_t(x, *split, 64, 4)
    expected = Product("t", x, codes, scales, biases, 64, 4).expected
    assert_same_bytes(y, np.ascontiguousarray(expected.reshape(2, 3, 8).swapaxes(0, 1)))


# ---------------------------------------------------------------------------------------------------------------------
# Gathered products


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("accumulate", ["exact", "float"])
def test_gathered_products_take_the_true_length(isa, layout, accumulate, rng):
    """Three matrices of x with two of w: the same bits as of the padded product."""
    for kind, m, length in (("float32", 1, 100), ("float16", 3, 70), ("float32", 9, 7)):
        product, arguments, _ = padded_product(rng, layout, kind, 64, 4, 2 * m, length)
        x, w = (
            product.x.reshape(2, m, -1),
            [np.stack([a, a[::-1]]) for a in (product.words, product.scales, product.biases)],
        )
        chosen = {
            "lhs_indices": [0, 1, 1],
            "rhs_indices": [1, 0, 1],
            "transpose": layout == "t",
            "accumulate": accumulate,
        }
        whole = q.affine_gather_qmm(x, *w, **chosen, group_size=64, bits=4)
        if layout == "t":
            assert_same_bytes(q.affine_gather_qmm(x[..., :length], *w, **chosen, group_size=64, bits=4), whole)
        rows = {"transpose": layout == "t", "accumulate": accumulate, "group_size": 64, "bits": 4}
        whole = q.affine_gather_qmm_rhs(product.x, *w, np.arange(2 * m) % 2, **rows)
        given = {"output_features": arguments.get("output_features")}
        y = q.affine_gather_qmm_rhs(arguments.get("x", product.x), *w, np.arange(2 * m) % 2, **given, **rows)
        assert_same_bytes(y, whole[:, : y.shape[1]])
        assert y.shape[1] == (11 if layout == "t" else length)
