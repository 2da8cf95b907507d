"""mxfp4, mxfp8 and nvfp4: quantize and dequantize against NumPy, and against MLX byte for byte."""

import numpy as np
import pytest

import layouts
import quantization as q
import reference as ref
import reference_fp as fp
from campaigns import fp_decode_exhaustive
from conftest import SMALL

F32 = np.float32
KINDS = ["float32", "float16", "bfloat16"]
PROFILES = ["metal", "cpu"]
MODES = [row["mode"] for row in q._C.formats() if row["family"] == "fp"]
LARGEST = {"mxfp4": 6.0, "mxfp8": 448.0, "nvfp4": 6.0}
GLOBAL_SCALES = [None, 2688.0, 3.7, 1e-3, 1e6, 0.0]

every_mode = pytest.mark.parametrize("mode", MODES)
every_kind = pytest.mark.parametrize("kind", KINDS)


def declared(kind):
    """Keyword arguments that declare arrays of raw bfloat16 bits."""
    return {"input_dtype": "bfloat16"} if kind == "bfloat16" else {}


def call(mode, name, *args, **options):
    return getattr(q, f"{mode}_{name}")(*args, **options)


def choices(mode):
    """What else the functions of the mode take."""
    if mode == "nvfp4":
        return [{"global_scale": scale} for scale in GLOBAL_SCALES]
    return [{"mx_scale": word} for word in ("up", "nearest", "floor")]


def ordinary_groups(mode, rng, rows=64):
    """[rows, 3 groups]: random ones of many sizes; ties of codes; largest elements at powers of two and beside them."""
    size, largest = fp.GROUP_SIZES[mode], LARGEST[mode]
    random = rng.standard_normal((rows, 3 * size)) * 10.0 ** rng.uniform(-30, 30, (rows, 1))
    values = fp.FP8 if mode == "mxfp8" else fp.FP4
    ties = np.concatenate([values, (values[1:] + values[:-1]) / 2])
    near = rng.choice(ties, (rows, 3 * size)) * rng.choice([-1, 1], (rows, 3 * size))
    near[:, ::size] = largest * (1 + rng.integers(-4, 5, (rows, 3)) * 2.0 ** -rng.choice([7, 10, 23], (rows, 3)))
    near *= 2.0 ** rng.integers(-12, 8, (rows, 1))
    middling = rng.standard_normal((rows, 3 * size)) * 10.0 ** rng.uniform(-5, 4, (rows, 1))
    return np.concatenate([random, near, middling]).astype(F32)


def edge_groups(mode):
    """Zeros of both signs, subnormal and largest numbers, and groups that are not finite."""
    size, largest = fp.GROUP_SIZES[mode], LARGEST[mode]
    starts = [
        [0.0],
        [-0.0, 0.0],
        [-0.0, 1.0, -1e-30],
        [2.0**-149, -(2.0**-149)],
        [1e-40, -3e-41],
        [largest * 2.0**-126, -(2.0**-126)],
        [largest * 2.0**-127, -(2.0**-127), 2.0**-128],
        [2.0**-24 * largest, 2.0**-24],
        [2.0**-24 * 5, 2.0**-24],
        [2.0**-9 * 6, -(2.0**-10)],
        [2.0**-10 * 6, 2.0**-11, -(2.0**-12)],
        [3.4e38, 1.0, -3.4e38],
        [3e38 / 448, 5.0, -2e37],
        [65504.0, -65504.0, 1.0],
        [2688.0, 2689.0, -2687.0],
        [1e10, 600.0, -300.0],
        [np.nan, 1.0, -2.0, 6.0],
        [-np.nan, -1.0],
        [np.inf, 1.0, -2.0],
        [-np.inf, np.inf, np.nan],
    ]
    groups = np.zeros((len(starts), size), F32)
    with np.errstate(all="ignore"):
        for row, start in zip(groups, starts, strict=True):
            row[: len(start)] = start
    return np.concatenate([np.roll(groups, i, axis=0) for i in range(3)], axis=1)


def stored_as(w, kind):
    with np.errstate(all="ignore"):
        return ref.round_to(w, kind)


def assert_quantized(ours, expected, mode):
    codes, scales = expected
    assert ours[0].dtype == np.uint32 and ours[1].dtype == np.uint8
    np.testing.assert_array_equal(ours[1], scales)
    np.testing.assert_array_equal(ref.unpack(ours[0], fp.BITS[mode], codes.shape[-1]), codes)


def assert_floats(ours, expected, kind):
    """The same bits, but any NaN for a NaN."""
    ours = ref.to_f32(ours, kind)
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(expected))
    there = ~np.isnan(expected)
    np.testing.assert_array_equal(ours[there].view(np.uint32), expected[there].view(np.uint32))


@pytest.mark.parametrize("profile", PROFILES)
@every_kind
@every_mode
def test_quantize(isa, mode, kind, profile, rng):
    for w in (ordinary_groups(mode, rng, 8 if SMALL else 64), edge_groups(mode)):
        stored = stored_as(w, kind)
        for options in choices(mode):
            ours = call(mode, "quantize", stored, profile=profile, **options, **declared(kind))
            assert_quantized(ours, fp.quantize(stored, kind, mode, profile, **options), mode)


@every_kind
@every_mode
def test_every_code_with_every_scale(isa, mode, kind):
    size, bits = fp.GROUP_SIZES[mode], fp.BITS[mode]
    every = np.resize(np.arange(2**bits), max(2**bits, size))
    codes, scales = np.tile(every, (256, 1)), np.repeat(np.arange(256, dtype=np.uint8)[:, None], len(every) // size, 1)
    words = ref.pack(codes, bits)
    for profile in PROFILES:
        for options in choices(mode) if mode == "nvfp4" else [{}]:
            expected = fp.dequantize(codes, scales, mode, kind, profile, **options)
            for rows in (256, 2):  # a scale that is not finite sends those around it another way
                some = [slice(i, i + rows) for i in range(0, 256, rows)]
                ours = [
                    call(mode, "dequantize", words[s], scales[s], dtype=kind, profile=profile, **options) for s in some
                ]
                assert_floats(np.concatenate(ours), expected, kind)


@every_mode
def test_layouts_and_odd_rows(isa, mode, rng):
    """Strided and unaligned arrays, rows of odd numbers of groups, rows that are worked at in pieces."""
    size, bits = fp.GROUP_SIZES[mode], fp.BITS[mode]
    every = layouts.fixed(3)
    for i, (groups, kind) in enumerate((g, k) for g in (1, 3, 5, 2 * 4096 // size + 1) for k in KINDS):
        w = stored_as(rng.standard_normal((2, 3, groups * size)).astype(F32), kind)
        x_place, codes_place, scales_place = (every[(i + j) % len(every)] for j in range(3))
        codes, scales = fp.quantize(w, kind, mode, "metal")
        memory, out = zip(
            *(p.empty(s, t) for p, s, t in (
                (codes_place, (2, 3, groups * size * bits // 32), np.uint32), (scales_place, scales.shape, np.uint8)
            )),
            strict=True,
        )  # fmt: skip
        call(mode, "quantize", x_place.place(w), out=out, **declared(kind))
        assert_quantized(out, (codes, scales), mode)
        codes_place.check(memory[0], out[0].shape, np.uint32)
        scales_place.check(memory[1], out[1].shape, np.uint8)
        memory, decoded = x_place.empty(w.shape, w.dtype)
        call(mode, "dequantize", *out, dtype=kind, out=decoded)
        assert_floats(decoded, fp.dequantize(codes, scales, mode, kind, "metal"), kind)
        x_place.check(memory, w.shape, w.dtype)


@every_mode
def test_empty(mode):
    size = fp.GROUP_SIZES[mode]
    for shape in ((0,), (0, size), (3, 0), (2, 0, size)):
        codes, scales = call(mode, "quantize", np.empty(shape, F32))
        assert scales.shape == (*shape[:-1], shape[-1] // size)
        assert call(mode, "dequantize", codes, scales).shape == shape


@every_mode
def test_errors(mode):
    size = fp.GROUP_SIZES[mode]
    w = np.ones((2, 2 * size), F32)
    codes, scales = call(mode, "quantize", w)
    with pytest.raises(ValueError, match=rf"^{mode}_quantize: w.shape\[-1\] must be a multiple of group_size={size}"):
        call(mode, "quantize", np.ones((2, size + 1)))
    with pytest.raises(ValueError, match="w and scales must have the same shape but for the last axis"):
        call(mode, "dequantize", codes, scales[:, :1])
    with pytest.raises(TypeError, match="scales has dtype float32, must be uint8"):
        call(mode, "dequantize", codes, scales.astype(F32))
    with pytest.raises(TypeError, match="w has dtype uint8, must be"):
        call(mode, "quantize", np.ones((2, size), np.uint8))
    with pytest.raises(ValueError, match="profile must be 'metal' or 'cpu', got 'gpu'"):
        call(mode, "quantize", w, profile="gpu")
    with pytest.raises(ValueError, match=r"must be a tuple .codes, scales., with None for a new array, got 3 entries"):
        call(mode, "quantize", w, out=(None, None, None))
    if mode == "nvfp4":
        for value in (-1.0, np.inf, np.nan):
            with pytest.raises(ValueError, match="global_scale must be finite and not negative"):
                call(mode, "quantize", w, global_scale=value)
        with pytest.raises(TypeError, match="global_scale must be a number, got list"):
            call(mode, "dequantize", codes, scales, global_scale=[1])
    else:
        with pytest.raises(ValueError, match="mx_scale must be 'up' or 'nearest' or 'floor', got 'down'"):
            call(mode, "quantize", w, mx_scale="down")


def test_kernel_classes(isa, rng):
    for mode in MODES:
        w = rng.standard_normal((2, 64)).astype(F32)
        stored = call(mode, "quantize", w)
        kernel, inverse = (getattr(q, mode.capitalize() + name)() for name in ("Quantize", "Dequantize"))
        for ours, expected in zip(kernel(w, profile="metal"), stored, strict=True):
            np.testing.assert_array_equal(ours, expected)
        assert_floats(inverse(*stored), call(mode, "dequantize", *stored), "float32")


# ---------------------------------------------------------------------------------------------------------------------
# MLX


def import_mlx():
    mx = pytest.importorskip("mlx.core", reason="MLX is the oracle here")
    mx.set_default_device(mx.cpu)
    return mx


def to_mlx(mx, stored, kind):
    array = mx.array(np.ascontiguousarray(stored))
    return array.view(mx.bfloat16) if kind == "bfloat16" else array


def copied_from_mlx(w, kind, mode):
    """Groups for which MLX's CPU backend gives what we give: finite ones, of no exponent that its byte wraps."""
    groups = ref.to_f32(stored_as(w, kind), kind).reshape(-1, fp.GROUP_SIZES[mode])
    most = np.abs(groups).max(axis=1)
    good = np.isfinite(most)
    if mode != "nvfp4":
        good &= (most == 0) | (most > 2.0**-127 * LARGEST[mode])
    groups = groups[good]
    return stored_as(groups[: len(groups) // 2 * 2], kind)  # nvfp4 wants a multiple of 32 elements


@every_kind
@every_mode
def test_quantize_equals_mlx(isa, mode, kind, rng):
    mx = import_mlx()
    for w in (ordinary_groups(mode, rng, 16 if SMALL else 256), edge_groups(mode)):
        stored = copied_from_mlx(w, kind, mode)
        for scale in GLOBAL_SCALES[:-1] if mode == "nvfp4" else [None]:
            options = {} if scale is None else {"global_scale": scale}
            theirs = mx.quantize(
                to_mlx(mx, stored, kind), mode=mode, **({} if scale is None else {"global_scale": mx.array(scale)})
            )
            ours = call(mode, "quantize", stored, profile="cpu", **options, **declared(kind))
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(a, np.array(b))


@every_kind
@every_mode
def test_dequantize_equals_mlx(isa, mode, kind):
    mx = import_mlx()
    size, bits = fp.GROUP_SIZES[mode], fp.BITS[mode]
    every = np.resize(np.arange(2**bits), max(2**bits, size))
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], len(every) // size, 1)
    words = ref.pack(np.tile(every, (256, 1)), bits)
    theirs = mx.dequantize(mx.array(words), mx.array(scales), mode=mode, dtype=getattr(mx, kind))
    ours = call(mode, "dequantize", words, scales, dtype=kind, profile="cpu")
    assert_floats(ours, np.array(theirs.astype(mx.float32)), kind)


def test_dequantize_with_global_scale_equals_mlx(isa, rng):
    """In float32: with a global scale, MLX's CPU backend ignores dtype."""
    mx = import_mlx()
    words = rng.integers(0, 2**32, (256, 4), dtype=np.uint32)
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 2, 1)
    for scale in (3.7, 1e-3, 1e6):
        theirs = mx.dequantize(mx.array(words), mx.array(scales), mode="nvfp4", global_scale=mx.array(scale))
        ours = q.nvfp4_dequantize(words, scales, global_scale=scale, profile="cpu")
        assert_floats(ours, np.array(theirs.astype(mx.float32)), "float32")


@every_kind
@every_mode
def test_every_code_with_every_scale_equals_ml_dtypes(isa, mode, kind):
    """What campaigns/fp_decode_exhaustive.py does, which see."""
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is the oracle here")
    row = next(row for row in q._C.formats() if row["mode"] == mode)
    weights = max(2 ** fp.BITS[mode], fp.GROUP_SIZES[mode]) * 256
    assert fp_decode_exhaustive.check(row, kind, isa, ml_dtypes, None) == [weights, 0]


def test_scales_of_ml_dtypes(rng):
    """They are the same bytes under another name; another format's are refused."""
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs ml_dtypes arrays")
    names = {"mxfp4": "float8_e8m0fnu", "mxfp8": "float8_e8m0fnu", "nvfp4": "float8_e4m3fn"}
    for mode, name in names.items():
        codes, scales = call(mode, "quantize", rng.standard_normal((3, 64)).astype(F32))
        other = "float8_e5m2" if name == "float8_e4m3fn" else "float8_e4m3fn"
        named = scales.view(getattr(ml_dtypes, name))
        assert_floats(call(mode, "dequantize", codes, named), call(mode, "dequantize", codes, scales), "float32")
        with pytest.raises(TypeError, match=f"scales has dtype {other}, must be uint8 .or ml_dtypes' {name}"):
            call(mode, "dequantize", codes, scales.view(getattr(ml_dtypes, other)))


def test_fp8_codes_equal_ml_dtypes(isa):
    """Blocks whose scale is 1 hold plain FP8: every code decoded, and every number and tie encoded."""
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is the oracle here")
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(F32)
    ours = q.mxfp8_dequantize(codes.view(np.uint32), np.full(8, 127, np.uint8))
    assert_floats(ours, expected, "float32")
    middles = np.concatenate([fp.FP8, (fp.FP8[1:] + fp.FP8[:-1]) / 2])
    blocks = np.resize(np.concatenate([middles, -middles]), (64, 31))
    blocks = np.concatenate([np.full((64, 1), 448.0), blocks], axis=1).astype(F32)
    words, scales = q.mxfp8_quantize(blocks)
    assert (scales == 127).all()
    np.testing.assert_array_equal(words.view(np.uint8), blocks.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# Plain FP8


def numbers_to_round(kind):
    """Every number of 16 bits; for float32 those, every FP8 number and tie, and the floats beside them."""
    half = np.arange(2**16, dtype=np.uint16)
    if kind != "float32":
        return half if kind == "bfloat16" else half.view(np.float16)
    middles = np.concatenate([fp.FP8, (fp.FP8[1:] + fp.FP8[:-1]) / 2, [464.0, 480.0]]).astype(F32)
    bits = (middles.view(np.int32)[:, None] + np.arange(-2, 3, dtype=np.int32)).ravel()
    near = bits[bits >= 0].view(F32)
    return np.concatenate([near, -near, ref.bfloat16_to_f32(half), half.view(np.float16).astype(F32)])


@every_kind
def test_to_fp8(isa, kind):
    x = numbers_to_round(kind)
    ours = q.to_fp8(x, **declared(kind))
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(ours, fp.nearest_even(ref.to_f32(x, kind), fp.FP8, 128))


@every_kind
def test_to_fp8_equals_mlx(isa, kind):
    mx = import_mlx()
    x = numbers_to_round(kind)
    theirs = np.array(mx.to_fp8(to_mlx(mx, x, kind)))
    np.testing.assert_array_equal(q.to_fp8(x, **declared(kind)), theirs)


def test_to_fp8_equals_ml_dtypes(isa):
    """Where ml_dtypes has a number: beyond 464 it has NaN."""
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is the oracle here")
    x = numbers_to_round("float32")
    x = x[np.abs(x) <= 464]
    np.testing.assert_array_equal(q.to_fp8(x), x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


@every_kind
def test_from_fp8(isa, kind):
    codes = np.arange(256, dtype=np.uint8)
    assert_floats(q.from_fp8(codes, dtype=kind), fp.decode_fp8(codes), kind)
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is the oracle here")
    named = codes.view(ml_dtypes.float8_e4m3fn)
    assert_floats(q.from_fp8(named, dtype=kind), named.astype(F32), kind)
    mx = import_mlx()
    theirs = mx.from_fp8(mx.array(codes), dtype=getattr(mx, kind))
    assert_floats(q.from_fp8(codes, dtype=kind), np.array(theirs.astype(mx.float32)), kind)


@every_kind
def test_fp8_layouts(isa, kind, rng):
    """Every length of a tail, and arrays of any form."""
    every = layouts.fixed(3)
    for i, length in enumerate((*range(1, 2 if SMALL else 131), 4097)):
        x = stored_as(rng.standard_normal((2, 3, length)).astype(F32) * 100, kind)
        codes = fp.nearest_even(ref.to_f32(x, kind), fp.FP8, 128).astype(np.uint8)
        x_place, codes_place = every[i % len(every)], every[(i + 1) % len(every)]
        memory, out = codes_place.empty(x.shape, np.uint8)
        q.to_fp8(x_place.place(x), out=out, **declared(kind))
        np.testing.assert_array_equal(out, codes)
        codes_place.check(memory, x.shape, np.uint8)
        memory, decoded = x_place.empty(x.shape, x.dtype)
        q.from_fp8(out, dtype=kind, out=decoded)
        assert_floats(decoded, fp.decode_fp8(codes), kind)
        x_place.check(memory, x.shape, x.dtype)


def test_fp8_scalars_lists_and_errors():
    assert q.to_fp8(1.0) == 0x38 and q.to_fp8(1.0).shape == ()
    assert q.from_fp8(np.uint8(0x38)) == 1.0
    assert q.to_fp8(np.empty((0, 3))).shape == q.from_fp8(np.empty((0, 3), np.uint8)).shape == (0, 3)
    np.testing.assert_array_equal(q.FromFp8()(q.ToFp8()([1.0, 2.0])), [1, 2])
    with pytest.raises(TypeError, match=r"^to_fp8: x has dtype uint8, must be float32"):
        q.to_fp8(np.ones(3, np.uint8))
    with pytest.raises(TypeError, match=r"^from_fp8: x has dtype float32, must be uint8 .or ml_dtypes' float8_e4m3fn"):
        q.from_fp8(np.ones(3, F32))
    with pytest.raises(ValueError, match="dtype must be 'float32' or 'float16' or 'bfloat16', got 'float64'"):
        q.from_fp8(np.ones(3, np.uint8), dtype="float64")
