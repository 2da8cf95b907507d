"""The key-value cache's constants, rotation and codecs: against digests, float64, and the definition to the bit."""

import hashlib
import itertools
import math
import runpy

import numpy as np
import pytest

import layouts
import quantization as q
import reference_kv as ref
from campaigns import kv_positions, same_bits_kv
from conftest import AVAILABLE, SMALL, Page

F16, F32, F64, U8 = np.float16, np.float32, np.float64, np.uint8
U = ref.U
POWERS = [1 << k for k in range(1, 13)]
# Every m of a block, one block and several, and the ends of the range.
HEAD_DIMS = [8, 16, 24, 40, 56, 64, 72, 80, 88, 96, 112, 128, 192, 256, 320, 360, 448, 512, 576, 768, 1024, 2040, 3584,
             4032, 4096]  # fmt: skip
if SMALL:
    HEAD_DIMS = [8, 24, 72, 80, 112, 128, 576, 1024]
SCALES = ("unbiased", "least_squares", "norm")


def assert_same(ours, expected):
    """Equal type, shape and bytes, where NaN equals NaN."""
    assert ours.dtype == expected.dtype and ours.shape == expected.shape
    both_nan = np.isnan(ours) & np.isnan(expected) if ours.dtype.kind == "f" else np.zeros(ours.shape, bool)
    different = np.ascontiguousarray(ours).view(f"u{ours.itemsize}") != np.ascontiguousarray(expected).view(
        f"u{ours.itemsize}"
    )
    different = different & ~both_nan
    assert not different.any(), (
        f"{different.sum()} of {different.size} differ, the first at {np.argwhere(different)[0]}"
    )


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def normal(rng, *shape):
    return rng.standard_normal(shape, dtype=F32)


# ---------------------------------------------------------------------------------------------------------------------
# Constants


def generator():
    """What the program that writes the tables defines."""
    return runpy.run_path(str(ref.HEADER.with_suffix(".py")))


@pytest.mark.skipif(SMALL, reason="the same on every CPU")
def test_the_header_is_what_its_script_writes():
    assert generator()["header"]() == ref.HEADER.read_text()


# Of float32 tables: the crate mlx-native's for codec 1, all but the optima at 5, 6 and 8 bits.
DIGESTS = {
    (1, 4): "87562063faf1e769",
    (1, 5): "7480a54bdf3b8084",
    (1, 6): "98ba30b44dd4cfd8",
    (1, 8): "00d4d0f2551e2557",
    (2, 8): "39ba7de4d4180579",
}
UNROUNDED_DIGESTS = {2: "6b3cafd715ba7e12", 3: "d04bf4a5e5e09cb7", 5: "5f90b1e9f10459e0", 6: "f10be8bf6129a209"}
BOUNDARY_DIGESTS = {4: "353bccb47eff2d4d", 5: "7949f0dcd96caa38", 6: "713de2f8f77ed28b", 8: "b0f3329c7f30bad7"}


def test_codebooks_have_their_digests():
    for (codec, bits), expected in DIGESTS.items():
        assert digest(ref.codebook(codec, bits)[0]) == expected
    for bits, expected in BOUNDARY_DIGESTS.items():
        assert digest(ref.codebook(1, bits)[1]) == expected


@pytest.mark.skipif(SMALL, reason="the same on every CPU")
def test_values_of_codec_2_are_rounded_to_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    codebook = generator()["codebook"]
    for bits in (2, 3, 4, 5, 6):
        unrounded = np.array(codebook(str(bits))[0], F64).astype(F32)
        assert digest(unrounded) == (UNROUNDED_DIGESTS[bits] if bits != 4 else DIGESTS[1, 4])
        assert np.array_equal(ref.codebook(2, bits)[0], unrounded.astype(ml_dtypes.bfloat16).astype(F32))


def cell_moments(edges):
    """Probability of each cell of the standard normal distribution, and the mean times it; edges are symmetric."""
    density = np.exp(-0.5 * edges**2) / math.sqrt(2 * math.pi)
    tail = np.array([math.erfc(abs(edge) / math.sqrt(2)) / 2 for edge in edges])
    below = np.where(edges > 0, 1 - tail, tail)
    upper = edges[:-1] >= 0
    probability = np.where(upper, tail[:-1] - tail[1:], np.diff(below))
    return probability, density[:-1] - density[1:]


def exact_mse(codec, bits):
    """Mean squared error of a codebook for the standard normal distribution."""
    values, boundaries = (table.astype(F64) for table in ref.codebook(codec, bits))
    probability, moment = cell_moments(np.concatenate([[-np.inf], boundaries, [np.inf]]))
    return 1 - 2 * (values * moment).sum() + (values**2 * probability).sum()


def half_place(values, bits):
    """By how much codec 2's values may have been rounded: half a unit in the last of 8 binary places, at 8 bits of 24
    after 7 decimals."""
    return np.exp2(np.floor(np.log2(np.abs(values))) - 8) if bits < 8 else 0.5e-7 + U * np.abs(values)


def test_codebooks_err_as_theory_says():
    """Known to six digits; an error of values has no first order at an optimum, and its square on average is added."""
    optimum = {2: 0.117482, 3: 0.0345478, 4: 0.00950101, 5: 2.50467e-3, 6: 6.4424e-4, 8: 4.1185e-5}
    for bits, expected in optimum.items():
        values, boundaries = (table.astype(F64) for table in ref.codebook(2, bits))
        probability, _ = cell_moments(np.concatenate([[-np.inf], boundaries, [np.inf]]))
        most = expected + (probability * half_place(values, bits) ** 2).sum()
        assert expected * (1 - 1.5e-5) <= exact_mse(2, bits) <= most * (1 + 1.5e-5)
        assert exact_mse(2, bits) <= 1.005 * expected
    for bits, expected in {5: 2.50467e-3, 6: 6.4865e-4, 8: 6.2743e-5}.items():
        assert exact_mse(1, bits) == pytest.approx(expected, rel=1.5e-5)


@pytest.mark.parametrize("bits", ref.BITS_2)
def test_optima_are_the_means_of_their_cells(bits):
    """Values are rounded, and so are boundaries, by 0.5e-7, which moves a mean by no more than the boundary."""
    values, boundaries = (table.astype(F64) for table in ref.codebook(2, bits))
    probability, moment = cell_moments(np.concatenate([[-np.inf], boundaries, [np.inf]]))
    means = moment / probability
    around = np.abs(np.concatenate([[0], boundaries, [0]]))
    of_boundaries = 0.5e-7 + U * np.maximum(around[:-1], around[1:])
    assert (np.abs(values - means) < half_place(values, bits) + of_boundaries + 1e-12).all()
    middles = (means[1:] + means[:-1]) / 2
    assert (np.abs(boundaries - middles) < of_boundaries[1:] + of_boundaries[:-1] + U * np.abs(boundaries)).all()


def test_signs_have_their_digests():
    signs = ref.tables()["signs"]
    assert digest(signs[:32])[:8] == "3ef1038e" and digest(signs[:64])[:8] == "44f13ce9"
    assert (ref.signs(256) < 0).sum() == 132 and (ref.signs(512) < 0).sum() == 263
    state = 512
    for byte in signs[64:]:
        state = (1664525 * state + 1013904223) % 2**32
        assert byte == state >> 24


@pytest.mark.parametrize("n", [12, 20, 28])
def test_hadamard_matrices_are_symmetric_and_orthogonal(n):
    matrix = ref.hadamard(n)
    assert np.array_equal(matrix, matrix.T) and np.array_equal(matrix @ matrix, n * np.eye(n))


def test_blocks():
    for D, B in {8: 8, 64: 64, 72: 24, 80: 80, 88: 8, 96: 96, 120: 40, 168: 56, 360: 40, 576: 192, 4096: 4096}.items():
        assert ref.block_size(D) == B


# ---------------------------------------------------------------------------------------------------------------------
# Rotation


@pytest.mark.parametrize("D", sorted({*POWERS, *HEAD_DIMS}))
@pytest.mark.parametrize(
    "keywords", [{}, {"signs": True}, {"signs": True, "inverse": True}, {"inverse": True}], ids=str
)
def test_fwht_is_its_definition(D, keywords, isa, rng):
    x = normal(rng, 3, D)
    expected = ref.fwht(x, signed=keywords.get("signs", False), inverse=keywords.get("inverse", False))
    assert_same(q.fwht(x, **keywords), expected)


def depth(B):
    """Additions that an element passes through in the rotation of a block."""
    outer, inner = ref.factors(B)
    return inner.bit_length() - 1 + outer // 2


def gamma(n):
    """Relative error of n roundings (N. J. Higham, Accuracy and Stability of Numerical Algorithms, section 3.1)."""
    return n * U / (1 - n * U)


@pytest.mark.parametrize("D", [D for D in HEAD_DIMS if ref.block_size(D) <= 512])
def test_fwht_against_its_matrix(D, rng):
    """An element of the sum meets so many additions, the factor 1/sqrt(B) (rounded) and the product one each."""
    x = normal(rng, 5, D)
    B = ref.block_size(D)
    signed = ref.in_blocks(x * F64(ref.signs(D)), B)
    exact = (signed @ ref.rotation(B)).reshape(x.shape)
    bound = gamma(depth(B) + 2) * np.abs(signed).sum(axis=-1) / math.sqrt(B)
    assert (np.abs(ref.in_blocks(q.fwht(x, signs=True) - exact, B)) <= bound[..., None]).all()


@pytest.mark.parametrize("D", [2, 64, 96, 256, 320, 576, 1024])
@pytest.mark.parametrize("signs", [False, True])
def test_fwht_undoes_itself(D, signs, rng):
    """Each way errs by at most gamma |x|_1/sqrt(B) in every element, and so by gamma |x|_1 in norm."""
    x = normal(rng, 4, D)
    B = ref.block_size(D)
    y = q.fwht(x, signs=signs)
    back = q.fwht(y, signs=signs, inverse=True)
    bound = 2 * 1.001 * gamma(depth(B) + 2) * np.maximum(*(np.abs(ref.in_blocks(a, B)).sum(-1) for a in (x, y)))
    assert (np.linalg.norm(ref.in_blocks(back - x, B), axis=-1) <= bound).all()
    assert np.abs(np.linalg.norm(y, axis=-1) / np.linalg.norm(x, axis=-1) - 1).max() < 1e-5


def test_fwht_of_a_unit_vector_is_constant(isa):
    for D in POWERS:
        assert (q.fwht(np.eye(1, D, dtype=F32)) == F32(1 / math.sqrt(D))).all()


def test_fwht_of_other_types_layouts_and_sizes(rng):
    x = normal(rng, 2, 3, 96)
    expected = ref.fwht(x)
    assert_same(q.fwht(x.astype(F64)), expected)
    assert_same(q.fwht(x.astype(F16)), ref.fwht(x.astype(F16).astype(F32)))
    assert_same(q.fwht(x[0, 0]), expected[0, 0])
    assert q.fwht(np.empty((0, 64), F32)).shape == (0, 64)
    for D in (64, 80, 576):
        in_place = normal(rng, 5, D)
        want = ref.fwht(in_place, signed=True)
        assert q.fwht(in_place, signs=True, out=in_place) is in_place
        assert_same(in_place, want)
    for layout in layouts.fixed(3):
        memory, out = layout.empty(x.shape, F32)
        assert q.fwht(layout.place(x), out=out) is out
        assert_same(out.copy(), expected)
        layout.check(memory, x.shape, F32)


# ---------------------------------------------------------------------------------------------------------------------
# Codec 1


def room(H, C, D, bits=4, fill=0xA5):
    """Packed codes and norms, filled with what must stay."""
    packed, norms = ref.shapes_1(H, C, D, bits)
    return np.full(packed, fill, U8), np.full(norms, -1234.5, F32)


def encode_1(src, bits=4, *, write_pos=0, C=1, **keywords):
    """Encode [H, D] into new arrays; return the position's bytes, its norms as [H, number], and the arrays."""
    H, D = src.shape
    packed, norms = room(H, C, D, bits)
    if bits == 4:
        q.hadamard_quantize_kv(src, packed, norms, write_pos=write_pos, **keywords)
    else:
        q.hadamard_quantize_kv_hb(src, packed, norms, write_pos=write_pos, codebook_bits=bits, **keywords)
    p = write_pos % C
    written = norms[:, p] if D == 512 else norms.reshape(-1)[np.arange(H) * C + p][:, None]
    return packed[:, p], written, (packed, norms)


def golden(D):
    """Bytes of a linear congruential generator, less 128."""
    state, x = 11, []
    for _ in range(D):
        state = (1664525 * state + 1013904223) % 2**32
        x.append((state >> 24) - 128)
    return np.array([x], F32)


GOLDEN = [
    (256, 4, 1168.7626, "4688be411438737a", "c360775be851b3f9"),
    (256, 5, 1168.7626, "0c0810101d170309", "af11da96d2ac9c39"),
    (256, 6, 1168.7626, "170f20203a2f0711", "23dfbe7706e5a8bd"),
    (256, 8, 1168.7626, "6d578182d1a5375d", "8ac52e81c20ae25c"),
    (64, 4, 594.2045, "833486a5c5a97aeb", "7590329e8b0b6ce1"),
    (128, 4, 823.9915, "a223b2b4a8da9c67", "c50e5f77c1c682ca"),
]


def test_golden_vectors(isa):
    compared = 0
    for D, bits, norm, first, expected in GOLDEN:
        x = golden(D)
        assert x[0, :4].tolist() == [-67, -58, -39, -109]
        packed, norms, _ = encode_1(x, bits)
        assert packed[0, :8].tobytes().hex() == first and digest(packed) == expected
        assert norms[0, 0] == pytest.approx(norm, rel=1e-5)
        compared += D
    assert compared == 1216  # codes, and six norms


def test_ties_go_down(isa):
    for D in (256, 512):
        assert (encode_1(np.eye(1, D, dtype=F32))[0] == 0x44).all()
    ones = np.ones((1, 256), F32)
    assert encode_1(ones)[0][0, :6].tobytes().hex() == "76788677ab65"
    for bits, middle in ((4, 7), (5, 15), (6, 31), (8, 127)):
        y = ref.transform(ones * ref.signs(256))
        assert (y == 0).any()
        assert (ref.unpack_1(encode_1(ones, bits)[0], bits)[y == 0] == middle).all()


@pytest.mark.parametrize("bits", ref.BITS_1)
def test_codes_at_boundaries(bits, isa):
    """A unit vector's rotation is +-1 times the factor after division by the norm: every z that is wanted."""
    boundaries = ref.codebook(1, bits)[1]
    up, down = np.nextafter(boundaries, F32(9)), np.nextafter(boundaries, F32(-9))
    tested = np.concatenate([boundaries, up, down, F32([9, -9, 1e30])])
    x = np.eye(1, 512, dtype=F32) * F32(math.sqrt(512) / 8)
    probe = np.empty((1, 512), F32)
    encode_1(x, rms_scratch=probe)
    assert (np.abs(probe) == 1).all()
    for z in tested[:: 7 if SMALL else 1]:
        codes = ref.unpack_1(encode_1(x, bits, scale_factor_d512=float(z))[0], bits)
        assert_same(codes, ref.code_of(probe * z, 1, bits))


@pytest.mark.parametrize(("D", "bits"), [*((D, 4) for D in POWERS), *itertools.product((256, 512), (5, 6, 8))])
def test_codec_1_against_float64(D, bits, isa, rng):
    """A code may differ only within 1e-5 max(1, |b|) of a boundary b, norms by 1e-5."""
    H = 4 if SMALL else 12
    x = np.concatenate([normal(rng, H, D), normal(rng, H, D) ** 3, rng.integers(-4095, 4096, (H, D)).astype(F32)])
    packed, norms, _ = encode_1(x, bits)
    codes, exact_norms, z = ref.encode_1(x, bits, dtype=F64)
    assert_codes_near(ref.unpack_1(packed, bits), codes, z, bits)
    assert np.abs(norms / exact_norms - 1).max() <= 1e-5
    exact_zeros = ref.transform(x[2 * H :].astype(F64) * (ref.signs(D) if D in (256, 512) else 1)) == 0
    assert (ref.unpack_1(packed, bits)[2 * H :][exact_zeros] == 2 ** (bits - 1) - 1).all()


def assert_codes_near(codes, expected, z, bits, tolerance=1e-5):
    """Codes equal, or the boundary between the two is as near as this."""
    different = codes != expected
    boundaries = ref.codebook(1, bits)[1].astype(F64)
    lower = np.minimum(codes, expected)[different]
    assert (np.maximum(codes, expected)[different] == lower + 1).all()
    near = boundaries[lower]
    assert (np.abs(z[different] - near) <= tolerance * np.maximum(1, np.abs(near))).all()


@pytest.mark.parametrize(("D", "bits"), [(64, 4), (256, 4), (256, 8), (512, 4), (512, 5), (2048, 4)])
def test_codec_1_is_the_same_everywhere(D, bits, rng):
    """Codes and norms on every instruction set and any number of threads are those of scalar C."""
    x = normal(rng, 40, D)
    with q.isa("generic"), q.threads(1):
        expected = encode_1(x, bits, C=3, write_pos=1)[2]
    for name, threads in itertools.product(AVAILABLE, (1, 2, 3)):
        with q.isa(name), q.threads(threads):
            for ours, theirs in zip(encode_1(x, bits, C=3, write_pos=1)[2], expected, strict=True):
                assert_same(ours, theirs)


@pytest.mark.parametrize(("D", "bits"), [(128, 4), (256, 5), (512, 8), (512, 4)])
def test_powers_of_two_leave_the_codes_alone(D, bits, rng):
    x = normal(rng, 3, D)
    packed, norms, _ = encode_1(x, bits)
    for k in (-30, -1, 7, 50):
        again, scaled, _ = encode_1(x * F32(2.0**k), bits)
        assert_same(again, packed)
        assert_same(scaled, norms * F32(2.0**k))


SPECIAL = {
    "zero": (lambda x: x * 0, "middle", "middle", 0),
    "negative zero": (lambda x: -x * 0, "middle", "middle", 0),
    "below the guard": (lambda x: np.eye(1, x.size, dtype=F32) * F32(0.9e-10), "middle", "middle", 0.9e-10),
    "above the guard": (lambda x: np.eye(1, x.size, dtype=F32) * F32(1e-8), None, None, 1e-8),
    "NaN": (lambda x: np.where(np.arange(x.size) == 3, F32("nan"), x), 0, "middle", np.nan),
    "all NaN": (lambda x: x * F32("nan"), 0, "middle", np.nan),
    "infinity": (lambda x: np.where(np.arange(x.size) == 1, F32("-inf"), x), 0, 0, np.inf),
    "overflow": (lambda x: np.eye(1, x.size, dtype=F32) * F32(3e38), "middle", "middle", np.inf),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize(("D", "bits"), [(64, 4), (256, 4), (512, 4), (1024, 4), (256, 5), (256, 6), (512, 8)])
def test_special_values(kind, D, bits, isa, rng):
    make, fast, fallback, norm = SPECIAL[kind]
    packed, norms, _ = encode_1(make(normal(rng, 1, D)), bits)
    expected = fast if D in (256, 512) else fallback
    codes = ref.unpack_1(packed, bits)
    if expected is not None:
        assert (codes == (2 ** (bits - 1) - 1 if expected == "middle" else expected)).all()
    else:
        assert_same(packed, encode_1(np.eye(1, D, dtype=F32), bits)[0])
    if D == 512:  # the root mean square of each half, into which a unit vector spreads evenly
        norm = norm / math.sqrt(512)
    assert np.allclose(norms, norm, rtol=1e-5, atol=0, equal_nan=True)


def test_halves_of_512_have_norms_of_their_own(isa, rng):
    """The rotation of a vector is zero in its second half if, after the signs, both halves are equal."""
    half = normal(rng, 256)
    x = (np.concatenate([half, half]) * ref.signs(512))[None].astype(F32)
    for bits in ref.BITS_1:
        packed, norms, _ = encode_1(x, bits)
        codes = ref.unpack_1(packed, bits)[0]
        assert norms[0, 1] == 0 and (codes[256:] == 2 ** (bits - 1) - 1).all()
        assert norms[0, 0] == pytest.approx(math.sqrt(2 * (half.astype(F64) ** 2).sum() / 256), rel=1e-5)
        assert len(np.unique(codes[:256])) > 8


# Vectors and their errors, known to so many decimals.
STRUCTURED = {
    "one-hot": ("0.00332", lambda D: np.eye(D)),
    "constant": ("0.01179", lambda D: np.full((1, D), 5.0)),
    "alternating": ("0.01179", lambda D: np.resize([1.0, -1.0], (1, D))),
    "ramp": ("0.01014", lambda D: np.arange(D)[None] - D / 2),
    "two-hot": ("0.0207", lambda D: np.eye(D)[:15] + np.eye(D)[17:32]),
}


def relative_mse(x, decoded):
    """Return the mean over vectors of |x - decoded|^2/|x|^2."""
    x = x.astype(F64)
    return (((x - decoded) ** 2).sum(axis=-1) / (x**2).sum(axis=-1)).mean()


def through_1(x, bits=4, **keywords):
    packed, norms, _ = encode_1(x, bits)
    norms = norms if x.shape[-1] == 512 else norms[:, 0]
    return q.dequantize_kv(packed, norms, bits, codec=1, **keywords)


def half_a_decimal(text):
    """By how much a number may have been rounded to be written so."""
    return 0.5 * 10.0 ** -len(text.partition(".")[2])


@pytest.mark.parametrize("kind", STRUCTURED)
def test_structured_vectors(kind):
    """Errors are known to half a decimal. Ours are those of float32: 8 levels of the rotation there and back, the norm
    and the products move a decoded vector by less than 32 roundings, 2^-19, of it, and the square root of its error by
    as much."""
    text, make = STRUCTURED[kind]
    x, expected = make(256).astype(F32), float(text)
    within = half_a_decimal(text) + 2.0**-19 * (2 * math.sqrt(expected) + 2.0**-19)
    assert relative_mse(x, through_1(x)) == pytest.approx(expected, rel=0, abs=within)


def test_vectors_with_an_outlier(rng):
    x = normal(rng, 200, 256)
    x[:, 77] *= 100
    assert relative_mse(x, through_1(x)) < 0.01


COUNT = 1000 if SMALL else 10000
WITHIN = 0.03 if SMALL else 0.01


@pytest.mark.parametrize(
    ("D", "bits", "expected"),
    [
        (64, 4, 9.18e-3),
        (128, 4, 9.32e-3),
        (256, 4, 9.43e-3),
        (512, 4, 9.41e-3),
        (256, 5, 2.48e-3),
        (256, 6, 6.40e-4),
        (256, 8, 6.26e-5),
        (512, 5, 2.48e-3),
        (512, 6, 6.40e-4),
        (512, 8, 6.27e-5),
    ],
)
def test_error_of_codec_1(D, bits, expected):
    x = normal(np.random.default_rng(D + bits), COUNT, D)
    decoded = through_1(x, bits)
    assert relative_mse(x, decoded) == pytest.approx(expected, rel=WITHIN)
    if (D, bits) == (256, 4):
        inner = (x.astype(F64) * decoded).sum(-1) / (x.astype(F64) ** 2).sum(-1)
        # 0.9909 is rounded by 0.5e-4; a mean deviates by less than 4 standard errors.
        assert inner.mean() == pytest.approx(0.9909, abs=0.5e-4 + 4 * inner.std() / math.sqrt(COUNT))


def test_bfloat16_and_other_types(rng):
    x = normal(rng, 2, 128)
    for dtype in (F16, F64):
        assert_same(encode_1(x.astype(dtype))[0], encode_1(x.astype(dtype).astype(F32))[0])
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rounded = x.astype(ml_dtypes.bfloat16)
    assert_same(encode_1(rounded)[0], encode_1(rounded.astype(F32))[0])


@pytest.mark.parametrize("factor", [None, 1, 1.0, 0.5, 16.0, -1.0, 3])
def test_scale_factor(factor, rng):
    x = normal(rng, 3, 512)
    for bits in ref.BITS_1:
        packed, norms, _ = encode_1(x, bits, scale_factor_d512=factor)
        codes, _, z = ref.encode_1(x, bits, scale_factor=1 if factor is None else factor, dtype=F64)
        assert_codes_near(ref.unpack_1(packed, bits), codes, z, bits, 1e-5 * max(1, abs(factor or 1)))
        decoded = q.dequantize_kv(packed, norms, bits, codec=1, rotated=True, scale_factor_d512=factor)
        assert_same(decoded, ref.decode_1(ref.unpack_1(packed, bits), norms, bits, scale_factor=factor or 1,
                                          rotated=True))  # fmt: skip
    for D in (64, 256, 1024):
        x = normal(rng, 2, D)
        assert_same(encode_1(x, scale_factor_d512=factor)[0], encode_1(x)[0])


def test_scale_factor_of_zero():
    """The encoder multiplies by it, so that all is a tie; the decoder divides by it."""
    assert (encode_1(golden(512), scale_factor_d512=0.0)[0] == 0x77).all()


@pytest.mark.parametrize("D", [2, 64, 256, 512, 1024])
def test_rms_probe_receives_what_is_quantized(D, isa, rng):
    x = normal(rng, 3, D)
    probe = np.full((3, D), np.nan, F32)
    packed, _, _ = encode_1(x, rms_scratch=probe)
    assert_same(ref.pack_1(ref.code_of(probe, 1, 4), 4), packed)
    z = ref.encode_1(x, dtype=F64)[2]
    assert np.abs(probe - z).max() <= 1e-5 * max(1, np.abs(z).max())
    for layout in layouts.fixed(2):
        memory, out = layout.empty(probe.shape, F32)
        encode_1(x, rms_scratch=out)
        assert_same(out.copy(), probe)
        layout.check(memory, probe.shape, F32)


# ---- where it is written ----


@pytest.mark.parametrize(("D", "bits"), [(64, 4), (256, 4), (256, 6), (512, 4), (512, 8), (1024, 4), (4096, 4)])
@pytest.mark.parametrize(
    ("write_pos", "sliding", "slot"), [(3, False, 3), (10, True, 2), (0, True, 0), (8**30, True, 0)]
)
def test_only_the_addressed_slot_changes(D, bits, write_pos, sliding, slot, isa, rng):
    C, H = 8, 3
    x = normal(rng, H, D)
    expected, expected_norms, _ = encode_1(x, bits)
    packed, norms = room(H, C, D, bits)
    call(bits, x, packed, norms, write_pos=write_pos, is_sliding=sliding)
    want, want_norms = room(H, C, D, bits)
    want[:, slot] = expected
    if D == 512:
        want_norms[:, slot] = expected_norms
    else:
        want_norms.reshape(-1)[np.arange(H) * C + slot] = expected_norms[:, 0]
    assert_same(packed, want)
    assert_same(norms, want_norms)


def call(bits, src, packed, norms, **keywords):
    """The function of this width."""
    if bits == 4:
        return q.hadamard_quantize_kv(src, packed, norms, **keywords)
    return q.hadamard_quantize_kv_hb(src, packed, norms, codebook_bits=bits, **keywords)


@pytest.mark.parametrize("D", [16, 256, 512, 1024])
@pytest.mark.parametrize(
    ("C", "start", "n", "offset", "sliding"),
    [(8, 0, 8, 0, False), (8, 3, 4, 2, False), (8, 6, 5, 1, True), (4, 9, 11, 0, True), (1, 5, 3, 0, True),
     (8, 7, 1, 3, False), (3, 2**40, 7, 2, True), (5, 0, None, 2, True)],
)  # fmt: skip
def test_sequences_are_loops(D, C, start, n, offset, sliding, isa, rng):
    T, H = 13, 2
    src = normal(rng, T, H, D)
    want = room(H, C, D)
    for i in range(T - offset if n is None else n):
        q.hadamard_quantize_kv(src[offset + i], *want, write_pos=start + i, is_sliding=sliding)
    got = room(H, C, D)
    result = q.hadamard_quantize_kv_seq(
        src, *got, write_pos_start=start, n_tokens=n, src_tok_offset=offset, is_sliding=sliding
    )
    assert result[0] is got[0] and result[1] is got[1]
    assert_same(got[0], want[0])
    assert_same(got[1], want[1])


def test_long_sequences_on_threads(rng):
    src = normal(rng, 700, 3, 64)
    with q.isa("generic"), q.threads(1):
        want = q.hadamard_quantize_kv_seq(src, *room(3, 650, 64), write_pos_start=17, is_sliding=True)
    for name in AVAILABLE:
        with q.isa(name), q.threads(3):
            got = q.hadamard_quantize_kv_seq(src, *room(3, 650, 64), write_pos_start=17, is_sliding=True)
        assert_same(got[0], want[0])
        assert_same(got[1], want[1])


@pytest.mark.parametrize(("D", "bits"), [(32, 4), (256, 4), (256, 5), (512, 4), (512, 8), (1024, 4)])
def test_any_layout(D, bits, isa, rng):
    H, C = 3, 4
    x = normal(rng, H, D)
    want = room(H, C, D, bits, fill=layouts.FILL)
    call(bits, x, *want, write_pos=2)
    codes_at, norms_at = layouts.fixed(3), layouts.fixed(want[1].ndim)
    for i in range(6):
        memory, packed = codes_at[i].empty(want[0].shape, U8)
        norms_memory, norms = norms_at[-1 - i].empty(want[1].shape, F32)
        norms_memory_before = norms.copy()
        result = call(bits, layouts.fixed(2)[i].place(x), packed, norms, write_pos=2)
        assert result[0] is packed and result[1] is norms
        assert_same(packed.copy(), want[0])
        changed = want[1] != F32(-1234.5)
        assert_same(np.where(changed, norms, 0), np.where(changed, want[1], 0))
        assert norms[~changed].tobytes() == norms_memory_before[~changed].tobytes()
        codes_at[i].check(memory, want[0].shape, U8)
        norms_at[-1 - i].check(norms_memory, want[1].shape, F32)


def test_sources_may_repeat_and_be_read_only(rng):
    x = normal(rng, 1, 64)
    one = np.broadcast_to(x, (3, 64))
    assert not one.flags.writeable
    assert_same(encode_1(one)[0], encode_1(np.repeat(x, 3, axis=0))[0])


@pytest.mark.parametrize(("D", "bits"), [(64, 4), (256, 4), (512, 6), (2048, 4)])
def test_nothing_outside_of_the_arrays(D, bits, isa, guarded, rng):
    H, C = 2, 3
    for offset in (0, 1, 4, 31):
        shapes = ((H, D), *ref.shapes_1(H, C, D, bits))
        src, packed, norms = (guarded.empty(*array, offset) for array in zip(shapes, (F32, U8, F32), strict=True))
        src[...] = normal(rng, H, D)
        for p in range(C):
            call(bits, src, packed, norms, write_pos=p)


@pytest.mark.parametrize("D", [8, 24, 64, 72, 80, 128, 256, 512, 576])
def test_nothing_is_touched_beyond_the_arrays(D, isa, rng):
    """Reading or writing one byte too many ends the process."""
    pages = {name: Page(1 << 14) for name in ("x", "packed", "norms", "out")}
    x = normal(rng, 3, D)

    def put(at_end, **arrays):
        return [pages[name].put(array, at_end) for name, array in arrays.items()]

    for at_end in (True, False):
        (place,) = put(at_end, x=x)
        out = pages["out"].put(np.zeros_like(x), at_end)
        assert_same(q.fwht(place, signs=True, out=out).copy(), q.fwht(x, signs=True))
        for bits, scale, dtype in zip(ref.BITS_2, itertools.cycle(SCALES), itertools.cycle((F16, F32)), strict=False):
            want = q.quantize_kv(x, bits, scale=scale, norms_dtype=dtype)
            packed, norms = put(at_end, packed=np.zeros_like(want[0]), norms=np.zeros_like(want[1]))
            q.quantize_kv(place, bits, scale=scale, norms_dtype=dtype, out=(packed, norms))
            assert_same(packed.copy(), want[0])
            assert_same(norms.copy(), want[1])
            assert_same(q.dequantize_kv(packed, norms, bits, out=out).copy(), q.dequantize_kv(*want, bits))
        for bits in (4,) if D not in (256, 512) else ref.BITS_1:
            if D & (D - 1) == 0:
                want = room(3, 1, D, bits)
                packed, norms = put(at_end, packed=want[0], norms=want[1])
                call(bits, place, packed, norms, write_pos=0)
                call(bits, x, *want, write_pos=0)
                assert_same(packed.copy(), want[0])
                assert_same(norms.copy(), want[1])
                got = q.dequantize_kv(packed, norms, bits, codec=1, out=out[:, None])
                assert_same(got.copy(), q.dequantize_kv(*want, bits, codec=1))


def test_nothing_to_do_writes_nothing():
    untouched = room(2, 4, 64)
    packed, norms = room(2, 4, 64)
    q.hadamard_quantize_kv(np.empty((0, 64), F32), packed[:0], norms[:0], write_pos=99)
    q.hadamard_quantize_kv(np.empty((2, 0), F32), packed[..., :0], norms, write_pos=99)
    q.hadamard_quantize_kv_seq(np.ones((3, 2, 64), F32), packed, norms, write_pos_start=99, n_tokens=0)
    q.hadamard_quantize_kv_seq(np.ones((3, 2, 64), F32), packed, norms, write_pos_start=99, src_tok_offset=3)
    q.hadamard_quantize_kv_seq(np.empty((0, 2, 64), F32), packed, norms, write_pos_start=99)
    assert_same(packed, untouched[0])
    assert_same(norms, untouched[1])
    empty = np.empty((0, 4, 256), U8), np.empty((0, 4), F32)
    q.hadamard_quantize_kv_hb(np.empty((0, 256), F32), *empty, write_pos=99, codebook_bits=5)


@pytest.mark.parametrize(
    ("name", "keywords"),
    [
        ("HadamardQuantizeKv", {"write_pos": 1}),
        ("HadamardQuantizeKvSeq", {"write_pos_start": 1}),
        ("HadamardQuantizeKvHb", {"write_pos": 1, "codebook_bits": 5}),
    ],
)
def test_kernel_classes(name, keywords, rng):
    kernel = getattr(q, name)()
    assert kernel._kernel is None
    compiled = kernel.compile()
    assert compiled is not None and kernel.compile() is compiled
    src = normal(rng, 2, 256)
    bits = keywords.get("codebook_bits", 4)
    got, want = room(2, 4, 256, bits), room(2, 4, 256, bits)
    src_of = src[None] if name.endswith("Seq") else src
    kernel(src_of, *got, **keywords)
    call(bits, src, *want, write_pos=1)
    assert_same(got[0], want[0])
    assert_same(got[1], want[1])
    lazily = getattr(q, name)()
    lazily(src_of, *got, **keywords)
    assert lazily._kernel is not None


def test_kernel_classes_of_codec_2(rng):
    x = normal(rng, 2, 96)
    packed, norms = q.quantize_kv(x, 5)
    cases = [
        (q.Fwht(), lambda kernel: [kernel(x, signs=True)], [q.fwht(x, signs=True)]),
        (q.QuantizeKv(), lambda kernel: kernel(x, 5), [packed, norms]),
        (q.DequantizeKv(), lambda kernel: [kernel(packed, norms, 5)], [q.dequantize_kv(packed, norms, 5)]),
    ]
    for kernel, run, expected in cases:
        assert kernel._kernel is None
        plan = kernel.compile()
        for ours, theirs in zip(run(kernel), expected, strict=True):
            assert_same(ours, theirs)
        assert kernel.compile() is plan


# ---- the way back ----


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(("D", "bits"), [*((D, 4) for D in POWERS), *itertools.product((256, 512), (5, 6, 8))])
def test_decoding_codec_1_is_its_definition(D, bits, rotated, isa, rng):
    codes = rng.integers(0, 2**bits, (3, 5, D), dtype=U8)
    packed = ref.pack_1(codes, bits)
    norms = normal(rng, 3, 5) if D != 512 else normal(rng, 3, 5, 2)
    norms.flat[:3] = 0, np.inf, np.nan
    with np.errstate(invalid="ignore"):
        expected = ref.decode_1(codes, norms if D == 512 else norms[..., None], bits, rotated=rotated)
    assert_same(q.dequantize_kv(packed, norms, bits, codec=1, rotated=rotated), expected)


@pytest.mark.parametrize("D", [1024, 4096])
def test_decoding_norms_where_the_crate_leaves_them(D, isa, rng):
    """From 1024 on the norm of head h at position p is the (h C + p)-th number of [H, C, D/256]."""
    H, C = 2, 3
    src = normal(rng, C, H, D)
    packed, norms = q.hadamard_quantize_kv_seq(src, *room(H, C, D), write_pos_start=0)
    one_each = np.ascontiguousarray(norms).reshape(-1)[: H * C].reshape(H, C)
    expected = ref.decode_1(ref.unpack_1(packed, 4), one_each[..., None])
    assert relative_mse(src.transpose(1, 0, 2), expected) < 0.01
    for places in (norms, one_each):
        assert_same(q.dequantize_kv(packed, places, codec=1), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Codec 2


def stored_2(x, bits, scale="unbiased", norms_dtype=F16):
    """The defined bytes and stored scales."""
    codes, scales, _ = ref.encode_2(x, bits, scale=scale, dtype=F32)
    with np.errstate(over="ignore"):
        return ref.pack_2(codes, bits), scales.astype(norms_dtype)


@pytest.mark.parametrize("D", HEAD_DIMS)
def test_codec_2_is_its_definition(D, isa, rng):
    x = np.concatenate([normal(rng, 3, D), normal(rng, 2, D) ** 3 * F32(40)])
    manners = [("unbiased", F16), ("norm", F32), ("least_squares", F32), ("unbiased", F32)]
    for i, bits in enumerate(ref.BITS_2):
        scale, dtype = manners[(i + D // 8) % 4]
        packed, norms = q.quantize_kv(x, bits, scale=scale, norms_dtype=dtype)
        want, want_norms = stored_2(x, bits, scale, dtype)
        assert_same(packed, want)
        assert_same(norms, want_norms)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_decoding_codec_2_is_its_definition(D, rotated, isa, rng):
    for bits in ref.BITS_2:
        codes = rng.integers(0, 2**bits, (4, D), dtype=U8)
        norms = normal(rng, 4, D // ref.block_size(D)).astype(F16 if bits % 2 else F32)
        got = q.dequantize_kv(ref.pack_2(codes, bits), norms, bits, rotated=rotated)
        assert_same(got, ref.decode_2(codes, norms, bits, rotated=rotated))


@pytest.mark.parametrize("D", [64, 96, 112, 128, 320, 576, 1024])
@pytest.mark.parametrize("bits", ref.BITS_2)
def test_definition_against_float64(D, bits, rng):
    """The definition in float32 beside exact arithmetic.

    Each element of the rotation sums B terms, each through `depth` additions: an error of at most g |x|_1 with
    g = gamma(depth). Relative to |x|_2, by which v is divided, that is eta = g |x|_1/|x|_2 for the whole block. A sum
    of B products in 16 chains errs by gamma(B/16 + 5) relative to the sum of magnitudes, its root by half of that and a
    rounding. The quotient v/|x|, or the product of |x| and a boundary, rounds once more: z errs by
    eta + |z| (gamma(B/16 + 5)/2 + 3 u), and codes differ only so near to a boundary. Where codes agree, <v, c>/|x|_2
    errs by gamma(B/16 + 5) sum |z c| + eta sum |c|, <c, c> by gamma(B/16 + 5), and four more roundings follow at most,
    that of sqrt(B) being one.
    """
    x = normal(rng, 30, D)
    B = ref.block_size(D)
    blocks = ref.in_blocks(x.astype(F64), B)
    eta = (gamma(depth(B)) * np.abs(blocks).sum(-1) / np.linalg.norm(blocks, axis=-1))[..., None]
    sums = gamma(-(-B // 16) + 5)
    for scale in SCALES:
        codes, norms, z = ref.encode_2(x, bits, scale=scale, dtype=F32)
        exact_codes, exact_norms, exact_z = ref.encode_2(x, bits, scale=scale, dtype=F64)
        exact_z = ref.in_blocks(exact_z, B)
        error = 1.001 * (eta + np.abs(exact_z) * (sums / 2 + 3 * U))
        assert (np.abs(ref.in_blocks(z, B) - exact_z) <= error).all()
        different = ref.in_blocks(codes != exact_codes, B)
        assert (ref.distance(exact_z, 2, bits) <= error)[different].all()
        c = np.abs(ref.codebook(2, bits)[0].astype(F64)[ref.in_blocks(exact_codes, B)])
        dot = (c * np.abs(exact_z)).sum(-1)
        of_dot = sums + (c * eta).sum(-1) / dot
        bound = 4 * U + (np.full_like(of_dot, sums / 2) if scale == "norm" else of_dot + sums)
        same = ~different.any(-1)
        assert same.any()
        assert (np.abs(norms / exact_norms - 1)[same] <= 1.001 * bound[same]).all()


@pytest.mark.parametrize("bits", ref.BITS_2)
def test_ties_of_codec_2_go_down(bits, isa, rng):
    """Rotations of integers hold exact zeros, which lie on the middle boundary."""
    for D in (64, 96, 256):
        x = np.concatenate([np.ones((1, D), F32), np.eye(3, D, dtype=F32) + np.eye(3, D, 5, dtype=F32)])
        zeros = ref.transform(ref.in_blocks(x * ref.signs(D), ref.block_size(D))).reshape(x.shape) == 0
        assert zeros.sum() > D / 2
        codes = ref.unpack_2(q.quantize_kv(x, bits)[0], bits)
        assert (codes[zeros] == 2 ** (bits - 1) - 1).all()


def test_codec_2_is_the_same_on_threads(rng):
    x = normal(rng, 5, 300, 96)
    for bits in (3, 4, 8):
        with q.threads(1):
            want = q.quantize_kv(x, bits)
            decoded = q.dequantize_kv(*want, bits)
        for threads in (2, 3):
            with q.threads(threads):
                got = q.quantize_kv(x, bits)
                assert_same(got[0], want[0])
                assert_same(got[1], want[1])
                assert_same(q.dequantize_kv(*want, bits), decoded)


def through_2(x, bits, **keywords):
    return q.dequantize_kv(*q.quantize_kv(x, bits, **keywords), bits)


@pytest.mark.parametrize(
    ("D", "bits", "scale", "expected"),
    [
        (64, 4, "norm", 9.18e-3),
        (64, 4, "least_squares", 8.86e-3),
        (64, 4, "unbiased", 8.95e-3),
        (128, 4, "norm", 9.32e-3),
        (128, 4, "least_squares", 9.16e-3),
        (128, 4, "unbiased", 9.25e-3),
        (256, 4, "norm", 9.43e-3),
        (256, 4, "least_squares", 9.34e-3),
        (256, 4, "unbiased", 9.43e-3),
        (64, 8, "norm", 3.98e-5),
        (128, 8, "norm", 4.05e-5),
        (256, 8, "norm", 4.07e-5),
        (256, 8, "unbiased", 4.07e-5),
        (64, 5, "norm", 2.41e-3),
        (64, 6, "norm", 6.22e-4),
        (256, 5, "norm", 2.48e-3),
        (128, 5, "norm", 2.45e-3),
        (128, 6, "norm", 6.36e-4),
        (256, 6, "norm", 6.40e-4),
        (512, 4, "norm", 9.41e-3),
        (512, 5, "norm", 2.48e-3),
        (512, 6, "norm", 6.40e-4),
        (512, 8, "norm", 4.07e-5),
    ],
)
def test_error_of_codec_2(D, bits, scale, expected):
    x = normal(np.random.default_rng(D + bits), COUNT, D)
    assert relative_mse(x, through_2(x, bits, scale=scale)) == pytest.approx(expected, rel=WITHIN)


@pytest.mark.parametrize("kind", STRUCTURED)
def test_structured_vectors_of_codec_2(kind):
    """The norm is that of codec 1, and so is the error but for the rounding of values to 8 binary places, which moves a
    decoded vector by 2^-8 of itself at most; the best scale for the same codes is below it."""
    text, make = STRUCTURED[kind]
    x, expected = make(256).astype(F32), float(text)
    error = relative_mse(x, through_2(x, 4, scale="norm", norms_dtype=F32))
    within = 2**-8 + half_a_decimal(text) / (2 * math.sqrt(expected))  # the square root's derivative
    assert math.sqrt(error) == pytest.approx(math.sqrt(expected), rel=0, abs=within)
    assert relative_mse(x, through_2(x, 4, scale="least_squares", norms_dtype=F32)) < error


def test_vectors_with_an_outlier_in_codec_2(rng):
    x = normal(rng, 200, 256)
    x[:, 77] *= 100
    assert relative_mse(x, through_2(x, 4)) < 0.01


@pytest.mark.parametrize("D", [80, 96, 112, 192, 320, 512, 576])
def test_error_of_other_head_dimensions(D):
    """Between those of the same block of 64 and the optimum of theory."""
    x = normal(np.random.default_rng(D), COUNT, D)
    for bits in (2, 4, 8):
        error = relative_mse(x, through_2(x, bits, scale="norm"))
        assert 0.96 * exact_mse(2, bits) < error < (1 + WITHIN) * exact_mse(2, bits)


def int8_absmax(x):
    """Symmetric int8 with a float16 scale per vector."""
    scale = (np.abs(x).max(axis=-1, keepdims=True) / 127).astype(F16).astype(F32)
    return np.clip(np.rint(x / scale), -127, 127) * scale


@pytest.mark.parametrize("D", [128, 256])
def test_eight_bits_beat_int8_of_the_same_size(D):
    """Both store 8 bits per value and a float16 per vector, and int8 gets the rotated vector as well."""
    x = normal(np.random.default_rng(D), COUNT, D)
    ours, theirs = relative_mse(x, through_2(x, 8)), relative_mse(q.fwht(x), int8_absmax(q.fwht(x)))
    assert ours < theirs
    assert D != 128 or theirs == pytest.approx(4.18e-5, rel=WITHIN)


def shrinking(bits, D):
    """By how much <z, c>, c the values that stand for z, is below <z, z> on average over a sphere of radius sqrt(D).

    An element of z has the density f(z) = f(0) (1 - z^2/D)^((D-3)/2), and z f(z) the integral
    -f(0) D/(D-1) (1 - z^2/D)^((D-1)/2).
    """
    values, boundaries = (table.astype(F64) for table in ref.codebook(2, bits))
    at_zero = math.exp(math.lgamma(D / 2) - math.lgamma((D - 1) / 2)) / math.sqrt(math.pi * D)
    integral = -at_zero * D / (D - 1) * (1 - boundaries**2 / D) ** ((D - 1) / 2)
    return 1 - (values * np.diff(integral, prepend=0, append=0)).sum()


@pytest.mark.parametrize("bits", ref.BITS_2)
def test_inner_products_are_unbiased(bits):
    """The mean of n independent errors lies within 3 sigma/sqrt(n) of 0; so it does of what the plain norm shrinks.

    Query and key are correlated, as shrinking would not show otherwise. A rotated normal vector divided by its norm is
    evenly distributed on a sphere, whatever the norm.
    """
    rng = np.random.default_rng(bits)
    k = normal(rng, COUNT, 128)
    query = (k + normal(rng, COUNT, 128)).astype(F64)
    true = (query * k).sum(-1)
    error = (query * through_2(k, bits, norms_dtype=F32)).sum(-1) - true
    assert abs(error.mean()) < 3 * error.std() / math.sqrt(COUNT)
    plain = (query * through_2(k, bits, scale="norm", norms_dtype=F32)).sum(-1) - true
    if bits < 5 and not SMALL:
        assert plain.mean() < -3 * plain.std() / math.sqrt(COUNT)
    error = plain + shrinking(bits, 128) * true
    assert abs(error.mean()) < 3 * error.std() / math.sqrt(COUNT)


def test_least_squares_is_never_worse(rng):
    """Than any other scale, for each vector and with the same codes, but for rounding relative to |x|^2.

    With d the exact decoding of what is stored, decoding errs by at most r |d|: a product, the rotation's levels, each
    of which rounds every element once and keeps norms, a factor and its product. |d| is below 1.02 |x|. |x - d|^2 then
    errs by (2 |x - d| + r |x|) r |x|, on both sides. The best scale <z, c>/<c, c> is at a minimum, where being off by s
    of itself costs s^2 |d|^2: z is off by depth + 4 roundings and half a sum's, sums by gamma(B/16 + 5) each, <z, c> is
    at least 0.9 |z| |c| at 4 bits, and six roundings make the scale.
    """
    D = 128
    x = normal(rng, 300, D)
    exact = x.astype(F64)
    size = np.linalg.norm(exact, axis=-1)
    errors = {}
    for scale in SCALES:
        decoded = through_2(x, 4, scale=scale, norms_dtype=F32)
        errors[scale] = np.linalg.norm(exact - decoded, axis=-1) / size
    r = 1.02 * gamma(depth(D) + 3)
    s = 1.02 * gamma((depth(D) + 4 + 2.5 * (D / 16 + 5)) / 0.9 + 6)
    best = errors["least_squares"]
    for scale in ("norm", "unbiased"):
        slack = (2 * errors[scale] + r) * r + (2 * best + r) * r + s**2
        assert (best**2 <= errors[scale] ** 2 + slack).all()


@pytest.mark.parametrize("bits", ref.BITS_2)
@pytest.mark.parametrize("D", [64, 96, 576])
def test_special_values_of_codec_2(D, bits, isa, rng):
    x = normal(rng, 6, D)
    x[0] = 0
    x[1] = -0.0
    x[2, D // 3] = np.nan
    x[3, 1] = np.inf
    x[4, D - 1] = -np.inf
    B, middle = ref.block_size(D), 2 ** (bits - 1) - 1
    packed, norms = q.quantize_kv(x, bits)
    codes = ref.unpack_2(packed, bits)
    assert (norms[:2] == 0).all() and (codes[:2] == middle).all()
    for row, place in ((2, D // 3), (3, 1), (4, D - 1)):
        poisoned = np.arange(D // B) == place // B
        assert np.array_equal(np.isnan(norms[row]), poisoned)
        assert (ref.in_blocks(codes[row], B)[poisoned] == 0).all()
        clean = stored_2(np.where(np.isfinite(x[row]), x[row], 0), bits)
        assert_same(norms[row][~poisoned], clean[1][~poisoned])
    assert_same(packed[5], stored_2(x[5], bits)[0])


@pytest.mark.parametrize("D", [64, 96, 576])
@pytest.mark.parametrize("scale", SCALES)
def test_codec_2_of_tiny_and_huge_vectors(D, scale, isa, rng):
    """Powers of two leave the codes alone and scale the scales exactly, as long as all elements stay normal."""
    x = normal(rng, 4, D)
    packed, norms = q.quantize_kv(x, 4, scale=scale, norms_dtype=F32)
    for k in (-100, -70, -60, -1, 3, 55, 70, 110, 120):
        again, scaled = q.quantize_kv(np.ldexp(x, k), 4, scale=scale, norms_dtype=F32)
        assert_same(again, packed)
        assert_same(scaled, np.ldexp(norms, k))
    largest = np.full((1, D), np.finfo(F32).max)
    for vector in (largest, -largest, largest * F32(2.0**-20) * ref.signs(D).astype(F32)):
        again, scaled = q.quantize_kv(vector, 4, scale=scale, norms_dtype=F32)
        small, small_norms = q.quantize_kv(np.ldexp(vector, -100), 4, scale=scale, norms_dtype=F32)
        assert_same(again, small)
        with np.errstate(over="ignore"):
            assert_same(scaled, np.ldexp(small_norms, 100))
    subnormal = np.zeros((1, D), F32)
    subnormal[0, 0] = 1e-45
    again, scaled = q.quantize_kv(subnormal, 4, scale=scale, norms_dtype=F32)
    assert_same(again, q.quantize_kv(np.ldexp(subnormal, 149), 4)[0])


def test_float16_scales_overflow_to_infinity():
    x = np.full((1, 64), 1e6, F32) * ref.signs(64)
    _, norms = q.quantize_kv(x)
    assert norms.dtype == F16 and np.isinf(norms).all()
    assert np.isfinite(q.quantize_kv(x, norms_dtype=F32)[1]).all()


@pytest.mark.parametrize("bits", ref.BITS_2)
def test_layouts_of_codec_2(bits, isa, rng):
    x = normal(rng, 2, 3, 72)
    want = q.quantize_kv(x, bits)
    assert want[0].shape == (2, 3, 9 * bits) and want[1].shape == (2, 3, 3)
    decoded = q.dequantize_kv(*want, bits)
    for i, layout in enumerate(layouts.fixed(3)):
        other = layouts.fixed(3)[i - 2]
        memory, packed = layout.empty(want[0].shape, U8)
        norms_memory, norms = other.empty(want[1].shape, F16)
        result = q.quantize_kv(layout.place(x), bits, out=(packed, norms))
        assert result[0] is packed and result[1] is norms
        assert_same(packed.copy(), want[0])
        assert_same(norms.copy(), want[1])
        layout.check(memory, want[0].shape, U8)
        other.check(norms_memory, want[1].shape, F16)
        memory, out = layout.empty(x.shape, F32)
        assert q.dequantize_kv(layout.place(want[0]), other.place(want[1]), bits, out=out) is out
        assert_same(out.copy(), decoded)
        layout.check(memory, x.shape, F32)


def test_any_leading_axes_and_types(rng):
    x = normal(rng, 2, 2, 2, 64)
    packed, norms = q.quantize_kv(x, 5)
    assert packed.shape == (2, 2, 2, 40) and norms.shape == (2, 2, 2, 1)
    one = q.quantize_kv(x[0, 1, 1], 5)
    assert one[0].shape == (40,) and one[1].shape == (1,)
    assert_same(one[0], packed[0, 1, 1])
    assert_same(q.dequantize_kv(*one, 5), q.dequantize_kv(packed, norms, 5)[0, 1, 1])
    for dtype in (F16, F64):
        assert_same(q.quantize_kv(x.astype(dtype))[0], q.quantize_kv(x.astype(dtype).astype(F32))[0])
    bits16 = (x.view(np.uint32) >> 16).astype(np.uint16)
    wide = (bits16.astype(np.uint32) << 16).view(F32)
    assert_same(q.fwht(bits16, input_dtype="bfloat16"), q.fwht(wide))
    for ours, expected in zip(q.quantize_kv(bits16, input_dtype="bfloat16"), q.quantize_kv(wide), strict=True):
        assert_same(ours, expected)
    for empty in (np.empty((0, 64), F32), np.empty((3, 0, 96), F32)):
        packed, norms = q.quantize_kv(empty, 3)
        assert packed.shape == (*empty.shape[:-1], empty.shape[-1] * 3 // 8) and packed.dtype == U8
        assert q.dequantize_kv(packed, norms, 3).shape == empty.shape


def test_packing_is_that_of_affine_codes(rng):
    """The words of affine formats are the same stream of bits."""
    x = normal(rng, 4, 64)
    for bits in ref.BITS_2:
        packed, _ = q.quantize_kv(x, bits)
        codes = ref.unpack_2(packed, bits)
        zero_one = np.ones((4, 1), F32), np.zeros((4, 1), F32)
        as_values = q.affine_dequantize(packed.view(np.uint32), *zero_one, group_size=64, bits=bits)
        assert np.array_equal(as_values, codes)


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
def test_broadcast_rows(axes, isa, rng):
    shape = [1 if axis in axes else size for axis, size in enumerate((2, 3, 64))]
    x = np.broadcast_to(normal(rng, *shape), (2, 3, 64))
    assert_same(q.fwht(x), ref.fwht(x))
    assert_same(q.quantize_kv(x)[0], stored_2(x, 4)[0])
    one = q.quantize_kv(normal(rng, *shape))
    packed, norms = (np.broadcast_to(array, (2, 3, array.shape[-1])) for array in one)
    assert_same(q.dequantize_kv(packed, norms), ref.decode_2(ref.unpack_2(packed, 4), norms))


# ---------------------------------------------------------------------------------------------------------------------
# Campaigns


@pytest.mark.slow
def test_short_campaigns(capsys):
    same_bits_kv.main(["--quick"])
    assert capsys.readouterr().out.endswith(": identical\n")
    kv_positions.main(["--quick"])
    assert capsys.readouterr().out.endswith("; every byte as expected\n")
