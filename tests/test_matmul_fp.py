"""Products with mxfp4, mxfp8 and nvfp4 weights: every bit, the error bound, special values, arrays of every form."""

import functools

import numpy as np
import pytest

import layouts
import quantization as q
import reference as ref
import reference_fp as fp
from conftest import SMALL, Page, assert_same_bytes

F32 = np.float32
MODES = [row["mode"] for row in q._C.formats() if row["family"] == "fp"]
FUNCTIONS = {True: ("qmm_t", "qmv"), False: ("qmm_n", "qvm")}
DIGITS = {"float32": 3, "float16": 2, "bfloat16": 2, "int8": 1}

every_mode = pytest.mark.parametrize("mode", MODES)
both_layouts = pytest.mark.parametrize("transpose", [True, False], ids=["t", "n"])
every_class = pytest.mark.parametrize("accumulate", ["exact", "float"])


def kinds_of(mode):
    return [kind for kind in DIGITS if kind != "int8" or mode != "mxfp8"]


every_mode_and_kind = pytest.mark.parametrize(
    ("mode", "kind"), [(mode, kind) for mode in MODES for kind in kinds_of(mode)]
)


class Product:
    """Stored inputs of one product, and what must come of it by `reference_fp`."""

    def __init__(self, mode, transpose, x, codes, scales, kind="float32", global_scale=None):
        self.mode, self.transpose, self.codes, self.scales = mode, transpose, codes, scales
        self.stored, self.digits = "float32" if kind == "int8" else kind, DIGITS[kind]
        with np.errstate(over="ignore"):
            self.x = ref.round_to(x, self.stored)
        self.words = ref.pack(codes, fp.BITS[mode])
        self.keywords = {"activations": "int8"} if kind == "int8" else {}
        if kind == "bfloat16":
            self.keywords["input_dtype"] = "bfloat16"
        self.global_scale = global_scale
        if global_scale is not None:
            self.keywords["global_scale"] = global_scale

    @property
    def wide(self):
        return ref.to_f32(self.x, self.stored), self.codes, self.scales, self.mode, self.transpose

    @functools.cached_property
    def unrounded(self):
        return fp.product_bits(*self.wide, self.digits, self.global_scale)

    @functools.cached_property
    def expected(self):
        with np.errstate(over="ignore"):
            return ref.round_to(self.unrounded, self.stored)

    def results(self, **changes):
        arrays = {"x": self.x, "w": self.words, "scales": self.scales, **self.keywords, **changes}
        return [getattr(q, f"{self.mode}_{name}")(**arrays) for name in FUNCTIONS[self.transpose]]

    def of_class(self, accumulate):
        """What arrays of any form must give: of the exact class by the reference, else what plain arrays give."""
        return self.expected if accumulate == "exact" else self.results(accumulate=accumulate)[0]

    def check(self):
        for y in self.results():
            assert_same_bytes(y, self.expected)


def random_weights(mode, rng, rows, columns, spread=6):
    """Codes [rows, columns] that are all numbers, and scales about 1."""
    codes = rng.integers(0, 2 ** fp.BITS[mode], (rows, columns), dtype=np.uint8)
    codes = np.where((codes & 127) == 127, 126, codes).astype(np.uint8)
    middle, limit = (0x38, 0x7E) if mode == "nvfp4" else (127, 254)
    scales = np.clip(middle + rng.integers(-spread, spread + 1, (rows, columns // fp.GROUP_SIZES[mode])), 0, limit)
    if mode == "nvfp4":
        scales = scales + 128 * rng.integers(0, 2, scales.shape)
    return codes, scales.astype(np.uint8)


def make(mode, transpose, rng, m, n, k, kind="float32", x=None, spread=6, global_scale=None):
    """A product of m, about n and about k: the packed axis is one of whole groups."""
    size = fp.GROUP_SIZES[mode]
    n, k = (n, -(-k // size) * size) if transpose else (-(-n // size) * size, k)
    codes, scales = random_weights(mode, rng, *((n, k) if transpose else (k, n)), spread)
    x = rng.standard_normal((m, k)) if x is None else x(rng, (m, k))
    return Product(mode, transpose, np.asarray(x, F32), codes, scales, kind, global_scale)


# M on both sides of where kernels change, N and K with every kind of remainder, K beyond a panel.
SHAPES = [
    (1, 5, 96),
    (1, 33, 1100),
    (2, 17, 530),
    (5, 16, 64),
    (8, 21, 304),
    (9, 130, 48),
    (33, 67, 544),
    (3, 300, 130),
    (9, 67, 1100),
]


@both_layouts
@every_mode_and_kind
def test_every_bit(isa, mode, kind, transpose, rng):
    for shape in SHAPES[::3] if SMALL else SHAPES:
        make(mode, transpose, rng, *shape, kind).check()


@every_mode
def test_scales_without_signs(isa, mode, rng):
    """Scales as quantizers write them, in rows of whole panels, of parts of them, and of both."""
    for k in (1024, 2048, 3424):
        product = make(mode, True, rng, 1, 18, k)
        scales = product.scales & 127 if mode == "nvfp4" else product.scales
        Product(mode, True, product.x, product.codes, scales, "float32", None).check()


def test_int8_activations_of_largest_x(isa, rng):
    """2^e is as great as it can be: sums over zeros stay zero."""
    product = make("nvfp4", True, rng, 3, 16, 160, x=lambda rng, shape: rng.choice([-3.4e38, 3.4e38], shape))
    codes = np.where(np.arange(16)[:, None] % 2 == 0, np.uint8(0), product.codes)
    Product("nvfp4", True, product.x, codes, product.scales & 127, "int8").check()


@both_layouts
@every_mode
def test_one_group(isa, mode, transpose, rng):
    """The least of everything, and rows that end within a vector or a word's neighbour."""
    size = fp.GROUP_SIZES[mode]
    for groups in range(1, 10):
        for m in (1, 9):
            n, k = (3, groups * size) if transpose else (groups * size, 3)
            make(mode, transpose, rng, m, n, k).check()


@both_layouts
@every_mode
def test_many_rows_of_x_and_threads(isa, mode, transpose, rng):
    """A row of x gives the same alone and in any batch, at any number of threads."""
    product = make(mode, transpose, rng, 70, 96, 288)
    product.check()
    for threads in (1, 2, 3):
        with q.threads(threads):
            product.check()
    function = getattr(q, f"{mode}_{FUNCTIONS[transpose][0]}")
    for rows in (1, 4, 7, 8, 63):
        assert_same_bytes(function(product.x[:rows], product.words, product.scales), product.expected[:rows])
    assert_same_bytes(function(product.x[3], product.words, product.scales), product.expected[3])


def families(mode):
    """x on which arithmetic could go wrong."""

    def outliers(rng, shape):
        x = rng.standard_normal(shape)
        return np.where(rng.random(shape) < 0.02, np.clip(1e5 * x, -6e4, 6e4), x)  # float16 has them too

    def exponents(rng, shape):
        return rng.standard_normal(shape) * 2.0 ** rng.integers(-30, 31, shape)

    def zeros(rng, shape):
        return (
            rng.standard_normal(shape) * (rng.random((shape[0], -(-shape[1] // 32))) < 0.5).repeat(32, 1)[:, : shape[1]]
        )

    def tiny(rng, shape):
        return rng.standard_normal(shape) * 10.0 ** rng.uniform(-45, -37, shape)

    def huge(rng, shape):
        return rng.choice([-3e38, 3e38, 1e38, 1.0], shape)

    def extreme(rng, shape):  # all digits at their limits, and numbers that would round beyond
        v = rng.choice([2.0**22 - 1, 2.0**21 - 1, 32639, 32767.6, 127, 127.75, 2.0**24 - 1], shape)
        return v * rng.choice([-1, 1], shape)

    def not_finite(rng, shape):
        values = np.array([np.nan, np.inf, -np.inf])
        return np.where(rng.random(shape) < 0.02, rng.choice(values, shape), rng.standard_normal(shape))

    return [outliers, exponents, zeros, tiny, huge, extreme, not_finite]


@both_layouts
@every_mode_and_kind
def test_families(isa, mode, kind, transpose, rng):
    for x in families(mode):
        for m in (3, 11) if kind == "float32" else (9,):
            make(mode, transpose, rng, m, 33, 224, kind, x).check()


@both_layouts
@every_mode
def test_every_scale_and_code(isa, mode, transpose, rng):
    """All scale bytes, all codes: infinite and NaN ones where the mode has them, over- and underflowing weights."""
    bits, size = fp.BITS[mode], fp.GROUP_SIZES[mode]
    k = n = 256
    codes = rng.integers(0, 2**bits, (n, k), dtype=np.uint8)
    scales = np.resize(np.arange(256, dtype=np.uint8), (n, k // size))
    for m in (2, 9):
        Product(mode, transpose, rng.standard_normal((m, k)).astype(F32), codes, scales).check()
    codes[:, :] = 0
    codes[1::2, ::16] = 2 ** (bits - 1)  # zeros of both signs against every scale
    Product(mode, transpose, rng.standard_normal((9, k)).astype(F32), codes, scales).check()


def test_nan_codes_give_nan(isa, rng):
    """Of mxfp8: the outputs that a NaN has a share in, with x at 0 too, and no others."""
    for transpose in (True, False):
        product = make("mxfp8", transpose, rng, 9, 64, 64)
        product.codes[5, 7] = 0x7F
        product.codes[40, 63] = 0xFF
        product.x[:, :] = 0
        nan = np.isnan(Product("mxfp8", transpose, product.x, product.codes, product.scales).results()[0])
        outputs = [5, 40] if transpose else [7, 63]
        assert nan[:, outputs].all() and not np.delete(nan, outputs, axis=1).any()


@pytest.mark.parametrize("global_scale", [2688.0, 3.7, 1e-3, 0.0, 3e38])
@both_layouts
def test_global_scale(isa, transpose, global_scale, rng):
    for kind in DIGITS:
        make("nvfp4", transpose, rng, 3, 32, 96, kind, global_scale=global_scale).check()
    make("nvfp4", transpose, rng, 3, 32, 96, x=families("nvfp4")[-1], global_scale=global_scale).check()


@both_layouts
@every_mode_and_kind
def test_error_bound(isa, mode, kind, transpose, rng):
    """Against exact sums of exact products, element by element."""
    for x in [None, *families(mode)[: 1 if kind == "float16" else 2]]:  # float16 lacks the exponents of the other
        product = make(mode, transpose, rng, 2, 24, 700, kind, x)
        exact, allowed = fp.exact(*product.wide), fp.bound(*product.wide, product.digits)
        rounding = 0 if product.stored == "float32" else ref.half_ulp(np.abs(exact) + allowed, product.stored)
        assert np.isfinite(allowed).all()
        for y in product.results():
            error = np.abs(ref.to_f32(y, product.stored).astype(np.float64) - exact)
            assert (error <= allowed + rounding).all()


def test_the_bounds_are_of_the_class_of_float32(rng):
    """They are no more than 2^-18.5 of the sum of magnitudes on ordinary numbers: no bound says nothing."""
    for mode in MODES:
        for transpose in (True, False):
            product = make(mode, transpose, rng, 2, 32, 1024, spread=0)
            sizes = fp.exact(np.abs(product.x), product.codes & (2 ** (fp.BITS[mode] - 1) - 1),
                             product.scales & (127 if mode == "nvfp4" else 255), mode, transpose)  # fmt: skip
            assert (fp.bound(*product.wide, 3) <= 2.0**-18.5 * sizes).all()


@pytest.mark.parametrize("m", [3, 9])
@every_class
@both_layouts
@every_mode
def test_layouts_and_batches(isa, mode, transpose, accumulate, m, rng):
    """Arrays of any strides, aligned or not; batches that broadcast; results into given memory."""
    every = layouts.fixed(3)
    product = make(mode, transpose, rng, m, 32, 96)
    expected = product.of_class(accumulate)
    function = functools.partial(getattr(q, f"{mode}_{FUNCTIONS[transpose][0]}"), accumulate=accumulate)
    for i, place in enumerate(every):
        batch = np.broadcast_to(expected, (2, *expected.shape))
        x, w, scales = (np.stack([a, a]) for a in (product.x, product.words, product.scales))
        others = [every[(i + j) % len(every)] for j in (1, 2, 3)]
        memory, out = others[2].empty(batch.shape, F32)
        function(place.place(x), others[0].place(w), others[1].place(scales), out=out)
        assert_same_bytes(np.ascontiguousarray(out), np.ascontiguousarray(batch))
        others[2].check(memory, batch.shape, F32)
    stacked = function(product.x[None, None], np.stack([product.words] * 2), np.stack([product.scales] * 2))
    assert_same_bytes(stacked, np.stack([expected] * 2)[None])


@every_class
@both_layouts
@every_mode
def test_nothing_is_read_beyond_the_arrays(isa, mode, transpose, accumulate, rng):
    """Reading one byte too many ends the process; rows that end within a vector, alone and as the last of several."""
    pages = {name: Page(1 << 17) for name in ("x", "w", "scales")}
    for m in (1, 5, 9):
        for one, other in ((1, 1), (3, 17), (7, 3), (5, 33)):
            size = fp.GROUP_SIZES[mode]
            n, k = (one, other * size) if transpose else (other * size, one * 23)
            product = make(mode, transpose, rng, m, n, k)
            expected = product.of_class(accumulate)
            for at_end in (True, False):
                arrays = {"x": product.x, "w": product.words, "scales": product.scales}
                placed = {name: pages[name].put(array, at_end) for name, array in arrays.items()}
                for y in product.results(**placed, accumulate=accumulate):
                    assert_same_bytes(y, expected)


@every_class
@both_layouts
@every_mode
def test_rows_that_end_within_a_group(isa, mode, transpose, accumulate, rng):
    """x, or the outputs, may leave out the end of the last group: the bits are those of zeros there."""
    size = fp.GROUP_SIZES[mode]
    functions = [
        functools.partial(getattr(q, f"{mode}_{name}"), accumulate=accumulate) for name in FUNCTIONS[transpose]
    ]
    for left_out in (1, size - 1):
        for m in (2, 9):
            product = make(mode, transpose, rng, m, 3 * size, 3 * size)
            if not transpose:
                features, expected = 3 * size - left_out, product.of_class(accumulate)
                for function in functions:
                    y = function(product.x, product.words, product.scales, features)
                    assert_same_bytes(y, np.ascontiguousarray(expected[:, :features]))
                continue
            product.x[:, -left_out:] = 0
            expected = Product(mode, transpose, product.x, product.codes, product.scales).of_class(accumulate)
            for function in functions:
                assert_same_bytes(function(product.x[:, :-left_out], product.words, product.scales), expected)


@every_mode
def test_empty(mode):
    size, bits = fp.GROUP_SIZES[mode], fp.BITS[mode]
    for m, n, k in ((0, 3, size), (2, 0, size), (2, 3, 0)):
        y = getattr(q, f"{mode}_qmm_t")(np.ones((m, k)), np.zeros((n, k * bits // 32), np.uint32),
                                        np.zeros((n, k // size), np.uint8))  # fmt: skip
        assert y.shape == (m, n) and not y.any()


@every_class
@every_mode
def test_dtypes(mode, accumulate, rng):
    product = make(mode, True, rng, 2, 8, 64)
    expected, exact64 = product.of_class(accumulate), product.x.astype(np.float64)
    qmm_t = functools.partial(getattr(q, f"{mode}_qmm_t"), accumulate=accumulate)
    assert_same_bytes(qmm_t(exact64, product.words, product.scales), expected)
    assert_same_bytes(qmm_t(exact64.tolist(), product.words.view(np.int32), product.scales), expected)
    assert qmm_t(product.x.astype(np.float16), product.words, product.scales).dtype == np.float16
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs ml_dtypes arrays")
    scale_type = ml_dtypes.float8_e4m3fn if mode == "nvfp4" else ml_dtypes.float8_e8m0fnu
    assert_same_bytes(qmm_t(product.x, product.words, product.scales.view(scale_type)), expected)
    assert qmm_t(product.x.astype(ml_dtypes.bfloat16), product.words, product.scales).dtype == "bfloat16"


@every_mode
def test_errors(mode, rng):
    product = make(mode, True, rng, 2, 8, 64)
    qmm_t, qmv = (getattr(q, f"{mode}_{name}") for name in ("qmm_t", "qmv"))
    with pytest.raises(
        ValueError, match=rf"^{mode}_qmm_t: x.shape\[-1\] must be 64, the input features of w, or less by"
    ):
        qmm_t(product.x[:, :32], product.words, product.scales)
    with pytest.raises(ValueError, match="w and scales must have the same shape but for the last axis"):
        qmm_t(product.x, product.words, product.scales[:, :1])
    with pytest.raises(TypeError, match="scales has dtype float32, must be uint8"):
        qmm_t(product.x, product.words, product.scales.astype(F32))
    with pytest.raises(ValueError, match="output_features must be 8, the output features of w, got 9"):
        qmv(product.x, product.words, product.scales, 9)
    with pytest.raises(ValueError, match="accumulate must be 'exact' or 'float', got 'fast'"):
        qmm_t(product.x, product.words, product.scales, accumulate="fast")
    with pytest.raises(TypeError):
        qmm_t(product.x, product.words, product.scales, 8)
    if mode == "mxfp8":
        with pytest.raises(ValueError, match="mode 'mxfp8' has no activations='int8'"):
            qmm_t(product.x, product.words, product.scales, activations="int8")
        assert_same_bytes(qmm_t(product.x, product.words, product.scales, accumulate="float"), product.expected)
    if mode != "nvfp4":
        with pytest.raises(TypeError, match=f"there is no global_scale in mode '{mode}'"):
            q._C.matmul_fp(q._C.Plan(f"{mode}_qmv"), product.x, product.words, product.scales, None, 1.0, "exact", None,
                           None, None)  # fmt: skip


@every_mode
def test_kernel_classes(isa, mode, rng):
    for transpose in (True, False):
        product = make(mode, transpose, rng, 2, 32, 64)
        for name in FUNCTIONS[transpose]:
            kernel = getattr(q, mode.capitalize() + name.replace("_", " ").title().replace(" ", ""))()
            assert_same_bytes(kernel(product.x, product.words, product.scales), product.expected)
            arrays = (product.x, product.words, product.scales)
            assert_same_bytes(kernel(product.x, w=product.words, scales=product.scales), product.expected)
            out = np.empty_like(product.expected)
            options = {"accumulate": "exact", "activations": None, "out": out, "input_dtype": None}
            if mode == "nvfp4":
                options["global_scale"] = 2688.0
            features = () if name == "qmm_t" else (product.expected.shape[1],)
            for call in (kernel, kernel._call):  # as the core binds arguments, and as Python does
                assert call(*arrays, *features, **options) is out
                with pytest.raises((TypeError, ValueError)):
                    call(*arrays, 99)


@both_layouts
@every_mode
def test_close_to_mlx(mode, transpose, rng):
    """MLX's CPU backend sums in float32 here: K roundings of each product at most, and K additions."""
    mx = pytest.importorskip("mlx.core", reason="MLX is the oracle here")
    product = make(mode, transpose, rng, 3, 64, 256)
    theirs = mx.quantized_matmul(
        *(mx.array(a) for a in (product.x, product.words, product.scales)), transpose=transpose, mode=mode,
        stream=mx.cpu,
    )  # fmt: skip
    sizes = np.abs(product.x.astype(np.float64)) @ np.abs(
        fp.weights32(product.codes, product.scales, mode).astype(np.float64).T
        if transpose
        else fp.weights32(product.codes, product.scales, mode).astype(np.float64)
    )
    allowed = fp.bound(*product.wide, 3) + np.expm1((product.x.shape[1] + 2) * np.log1p(ref.U)) * sizes
    assert (np.abs(product.results()[0].astype(np.float64) - np.array(theirs)) <= allowed).all()
