"""Every refusal of the key-value codecs: its exception, its exact words, and that it wrote nothing."""

import re

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import quantization as q
import reference_kv as ref

F16, F32, U8 = np.float16, np.float32, np.uint8
H, C, T = 2, 4, 3
OWN = "give it memory of its own"
POWERS = "src.shape[-1] must be a power of two from 2 to 4096"
POWERS_OF_TWO, EIGHTS = {2**k for k in range(1, 13)}, set(range(8, 4097, 8))
ROTATED = "x.shape[-1] must be a power of two from 2 to 4096, or a multiple of 8 up to 4096"


def nearest(D, sizes):
    """The sizes on both sides of D, or the only one."""
    sides = [max((n for n in sizes if n < D), default=None), min((n for n in sizes if n > D), default=None)]
    return " or ".join(str(n) for n in sides if n)


def kv(D=64):
    packed, norms = ref.shapes_1(H, C, D)
    return [np.ones((H, D), F32), np.full(packed, 0xA5, U8), np.full(norms, 7, F32)], {"write_pos": 1}


def seq(D=64):
    (src, *cache), _ = kv(D)
    return [np.stack([src] * T), *cache], {"write_pos_start": 1}


def hb(D=256):
    (src, _, norms), keywords = kv(D)
    return [src, np.full((H, C, D), 0xA5, U8), norms], {**keywords, "codebook_bits": 5}


ENCODERS = {"hadamard_quantize_kv": kv, "hadamard_quantize_kv_seq": seq, "hadamard_quantize_kv_hb": hb}
PLACES = ("src", "packed", "norms")
every_encoder = pytest.mark.parametrize("name", ENCODERS)


def refuse_encoding(name, error, message, D=None, **changes):
    """Assert that an encoder with these changes raises exactly this and leaves all arrays alone."""
    arrays, keywords = ENCODERS[name](*([] if D is None else [D]))
    arrays = [changes.pop(place, array) for place, array in zip(PLACES, arrays, strict=True)]
    outputs = [*arrays[1:], *(value for value in changes.values() if isinstance(value, np.ndarray))]
    outputs = [array for array in outputs if isinstance(array, np.ndarray)]
    before = [array.tobytes() for array in outputs]
    with pytest.raises(error) as caught:
        getattr(q, name)(*arrays, **{**keywords, **changes})
    assert type(caught.value) is error
    assert str(caught.value) == f"{name}: {message}"
    assert [array.tobytes() for array in outputs] == before


@every_encoder
def test_the_arguments_these_tests_start_from_work(name):
    arrays, keywords = ENCODERS[name]()
    assert getattr(q, name)(*arrays, **keywords)[0] is arrays[1]
    assert (arrays[1] != 0xA5).any()


# ---- sizes ----


@pytest.mark.parametrize("D", [1, 3, 12, 80, 96, 8192])
@pytest.mark.parametrize("name", ["hadamard_quantize_kv", "hadamard_quantize_kv_seq"])
def test_head_dimensions_of_four_bits(name, D):
    refuse_encoding(name, ValueError, f"{POWERS}, got {D} ({nearest(D, POWERS_OF_TWO)} would fit)", D)


@pytest.mark.parametrize("D", [2, 64, 128, 255, 384, 1024])
def test_head_dimensions_of_a_byte(D):
    refuse_encoding("hadamard_quantize_kv_hb", ValueError, f"src.shape[-1] must be 256 or 512, got {D}", D)


@pytest.mark.parametrize("bits", [-1, 0, 1, 2, 3, 4, 7, 9, 16])
def test_codebook_bits(bits):
    message = f"codebook_bits must be 5, 6 or 8, got {bits}"
    refuse_encoding("hadamard_quantize_kv_hb", ValueError, message, codebook_bits=bits)


@every_encoder
def test_shapes(name):
    (src, packed, _), _ = ENCODERS[name]()
    bytes_ = packed.shape[2]
    axes = "(tokens, heads, D)" if name.endswith("seq") else "(heads, D)"
    for wrong in (src[0], src[None], np.ones(5, F32), np.float32(1)):
        shape = np.shape(wrong)
        refuse_encoding(name, ValueError, f"src must have shape {axes}, got {shape}", src=wrong)
    for shape in ((H, bytes_), (H + 1, C, bytes_), (H, C, bytes_ + 1), (H, C, bytes_ - 1), (H, C, bytes_, 1)):
        message = f"packed must have shape ({H}, capacity, {bytes_}), got {shape}"
        refuse_encoding(name, ValueError, message, packed=np.ones(shape, U8))
    for shape in ((H,), (H, C + 1), (H - 1, C), (H, C, 1), (C, H)):
        message = f"norms must have shape ({H}, {C}), got {shape}"
        refuse_encoding(name, ValueError, message, norms=np.ones(shape, F32))


@pytest.mark.parametrize("D", [512, 1024, 4096])
def test_shapes_of_norms_of_long_vectors(D):
    for shape in ((H, C), (H, C, 1), (H, C, D // 128), (H, C + 1, D // 256)):
        message = f"norms must have shape ({H}, {C}, {D // 256}), got {shape}"
        refuse_encoding("hadamard_quantize_kv", ValueError, message, D, norms=np.ones(shape, F32))


@pytest.mark.parametrize("shape", [(2, 32), (3, 64), (2, 64, 1), (64,)])
def test_shapes_of_the_probe(shape):
    message = f"rms_scratch must have shape (2, 64), got {shape}"
    refuse_encoding("hadamard_quantize_kv", ValueError, message, rms_scratch=np.ones(shape, F32))


# ---- positions ----


@pytest.mark.parametrize("position", [C, C + 1, 2**40])
@pytest.mark.parametrize("name", ["hadamard_quantize_kv", "hadamard_quantize_kv_hb"])
def test_positions_beyond_a_global_cache(name, position):
    message = f"write_pos={position} must be less than the capacity of {C} (is_sliding=True would wrap it)"
    refuse_encoding(name, ValueError, message, write_pos=position)


@pytest.mark.parametrize(("start", "n"), [(2, 3), (4, 1), (2**62, 3), (0, T + 2)])
def test_sequences_beyond_a_global_cache(start, n):
    src = np.ones((n, H, 64), F32)
    message = f"write_pos_start={start} and {n} tokens must fit the capacity of {C} (is_sliding=True would wrap them)"
    refuse_encoding("hadamard_quantize_kv_seq", ValueError, message, src=src, write_pos_start=start)


@every_encoder
@pytest.mark.parametrize("sliding", [False, True])
def test_positions_that_are_none(name, sliding):
    position = "write_pos_start" if name.endswith("seq") else "write_pos"
    message = f"{position} must not be negative, got -1"
    refuse_encoding(name, ValueError, message, **{position: -1, "is_sliding": sliding})
    for value, kind in ((None, "NoneType"), (1.0, "float"), (True, "bool"), ("1", "str"), ([1], "list")):
        message = f"{position} must be an integer, got {kind}"
        refuse_encoding(name, TypeError, message, **{position: value, "is_sliding": sliding})


@every_encoder
def test_positions_that_do_not_fit(name):
    position = "write_pos_start" if name.endswith("seq") else "write_pos"
    message = f"{position} is out of range: it does not fit 64 bits"
    refuse_encoding(name, ValueError, message, **{position: 2**63})
    message = f"{position} must not be negative"
    refuse_encoding(name, ValueError, message, **{position: -(2**70), "is_sliding": True})


@every_encoder
def test_a_cache_without_room(name):
    (_, packed, norms), _ = ENCODERS[name]()
    for sliding in (False, True):
        message = "packed and norms must have room for a position: got 0"
        refuse_encoding(name, ValueError, message, packed=packed[:, :0], norms=norms[:, :0], is_sliding=sliding)


@pytest.mark.parametrize(("offset", "n"), [(0, T + 1), (1, T), (T + 1, 0), (2**62, 2**62)])
def test_tokens_that_are_not_there(offset, n):
    message = f"src_tok_offset={offset} and n_tokens={n} must fit the {T} tokens of src"
    refuse_encoding("hadamard_quantize_kv_seq", ValueError, message, src_tok_offset=offset, n_tokens=n)


@pytest.mark.parametrize("argument", ["src_tok_offset", "n_tokens"])
def test_counts(argument):
    name = "hadamard_quantize_kv_seq"
    refuse_encoding(name, ValueError, f"{argument} must not be negative, got -2", **{argument: -2})
    for value, kind in ((1.0, "float"), (True, "bool"), ("1", "str")):
        refuse_encoding(name, TypeError, f"{argument} must be an integer, got {kind}", **{argument: value})


def test_an_offset_beyond_the_tokens():
    message = f"src_tok_offset={T + 1} and n_tokens=0 must fit the {T} tokens of src"
    refuse_encoding("hadamard_quantize_kv_seq", ValueError, message, src_tok_offset=T + 1)


# ---- kinds ----


@every_encoder
def test_sources_are_floats(name):
    (src, *_), _ = ENCODERS[name]()
    rule = "must be float32, float16, bfloat16 or float64"
    for dtype in ("int32", "int64", "uint8", "bool", "complex64", ">f4", "object"):
        wrong = src.astype(dtype)
        refuse_encoding(name, TypeError, f"src has dtype {wrong.dtype}, {rule}", src=wrong)
    message = "src must be an array of floats, or a list of numbers, got NoneType"
    refuse_encoding(name, TypeError, message, src=None)


@every_encoder
@pytest.mark.parametrize(("argument", "wanted"), [("packed", "uint8"), ("norms", "float32")])
def test_outputs_have_one_type(name, argument, wanted):
    arrays, _ = ENCODERS[name]()
    right = arrays[PLACES.index(argument)]
    for dtype in ("int8", "uint32", "float16", "float64", "float32", "uint8"):
        if dtype != wanted:
            wrong = right.astype(dtype)
            message = f"{argument} has dtype {dtype}, must be {wanted}"
            refuse_encoding(name, TypeError, message, **{argument: wrong})
    for wrong, kind in ((None, "NoneType"), ([[1]], "list"), (3, "int")):
        message = f"{argument} must be an array of {wanted}, got {kind}"
        refuse_encoding(name, TypeError, message, **{argument: wrong})


@every_encoder
@pytest.mark.parametrize("argument", ["packed", "norms"])
def test_outputs_are_writable_and_have_places_of_their_own(name, argument):
    arrays, _ = ENCODERS[name]()
    right = arrays[PLACES.index(argument)]
    locked = right.copy()
    locked.flags.writeable = False
    refuse_encoding(name, ValueError, f"{argument} is read-only", **{argument: locked})
    repeated = as_strided(right.copy(), right.shape, (0, *right.strides[1:]))
    message = f"{argument} has a stride of 0: its elements share memory"
    refuse_encoding(name, ValueError, message, **{argument: repeated})
    shared = as_strided(right.copy(), right.shape, (right.itemsize, *right.strides[1:]))
    message = f"{argument} has elements that share memory: give each its own"
    refuse_encoding(name, ValueError, message, **{argument: shared})


def test_outputs_do_not_overlap():
    memory = np.zeros(H * 64 * 4 + H * C * 32, U8)
    src = memory[: H * 64 * 4].view(F32).reshape(H, 64)
    packed = memory[: H * C * 32].reshape(H, C, 32)
    refuse_encoding("hadamard_quantize_kv", ValueError, f"packed shares memory with src: {OWN}", src=src, packed=packed)
    norms = memory[: H * C * 4].view(F32).reshape(H, C)
    refuse_encoding(
        "hadamard_quantize_kv", ValueError, f"norms shares memory with packed: {OWN}", packed=packed, norms=norms
    )
    probe = memory[: H * 64 * 4].view(F32).reshape(H, 64)
    refuse_encoding(
        "hadamard_quantize_kv",
        ValueError,
        f"rms_scratch shares memory with packed: {OWN}",
        packed=packed,
        rms_scratch=probe,
    )


@every_encoder
def test_scale_factors(name):
    for value in (float("nan"), float("inf"), -np.inf, 1e300):
        message = f"scale_factor_d512 must be finite, got {value!r}"
        refuse_encoding(name, ValueError, message, scale_factor_d512=value)
    for value, kind in (("1", "str"), (True, "bool"), ([1.0], "list")):
        message = f"scale_factor_d512 must be a number, got {kind}"
        refuse_encoding(name, TypeError, message, scale_factor_d512=value)


@every_encoder
def test_flags(name):
    for value, kind in ((None, "NoneType"), (1, "int"), ("yes", "str")):
        refuse_encoding(name, TypeError, f"is_sliding must be True or False, got {kind}", is_sliding=value)


# ---- codec 2, the way back, the rotation ----


def refuse(name, error, message, *arrays, **keywords):
    """Assert that a function raises exactly this and leaves what it was given alone."""
    given = keywords.get("out")
    outputs = [out for out in (given if isinstance(given, tuple) else [given]) if isinstance(out, np.ndarray)]
    before = [array.tobytes() for array in outputs]
    with pytest.raises(error) as caught:
        getattr(q, name)(*arrays, **keywords)
    assert type(caught.value) is error
    assert str(caught.value) == f"{name}: {message}"
    assert [array.tobytes() for array in outputs] == before


X = np.ones((3, 96), F32)


def stored(bits=4):
    return q.quantize_kv(X, bits)


@pytest.mark.parametrize("D", [0, 1, 3, 6, 12, 100, 4098, 8192])
def test_sizes_of_rotations(D):
    refuse(
        "fwht",
        ValueError,
        f"{ROTATED}, got {D} ({nearest(D, {*POWERS_OF_TWO, *EIGHTS})} would fit)",
        np.ones((2, D), F32),
    )


@pytest.mark.parametrize("D", [0, 2, 4, 12, 100, 4104, 8192])
def test_sizes_of_codec_2(D):
    message = f"x.shape[-1] must be a multiple of 8 from 8 to 4096, got {D} ({nearest(D, EIGHTS)} would fit)"
    refuse("quantize_kv", ValueError, message, np.ones((2, D), F32))


@pytest.mark.parametrize("name", ["fwht", "quantize_kv"])
def test_scalars_have_no_rows(name):
    refuse(name, ValueError, "x must have at least one dimension, got 0", F32(1))
    message = "x has dtype int64, must be float32, float16, bfloat16 or float64"
    refuse(name, TypeError, message, np.ones((2, 64), np.int64))


@pytest.mark.parametrize("bits", [-4, 0, 1, 7, 9, 16])
def test_bits_of_codec_2(bits):
    message = f"bits must be 2, 3, 4, 5, 6 or 8, got {bits}"
    refuse("quantize_kv", ValueError, message, X, bits)
    refuse("dequantize_kv", ValueError, message, *stored(), bits)


def test_kinds_of_bits():
    for value, kind in ((4.0, "float"), (True, "bool"), (None, "NoneType"), ("4", "str")):
        message = f"bits must be an integer, got {kind}"
        refuse("quantize_kv", TypeError, message, X, value)
        refuse("dequantize_kv", TypeError, message, *stored(), value)


def test_scales_and_types_of_norms():
    message = "scale must be 'unbiased' or 'least_squares' or 'norm', got 'eden'"
    refuse("quantize_kv", ValueError, message, X, scale="eden")
    refuse("quantize_kv", TypeError, "scale must be a string, got int", X, scale=1)
    for dtype in ("float64", "bfloat16", "int8"):
        with pytest.raises(ValueError, match=rf"^quantize_kv: norms_dtype must be .*float16.*, got '?{dtype}"):
            q.quantize_kv(X, norms_dtype=dtype)


def test_outputs_of_codec_2():
    packed, norms = stored()
    message = "packed must have shape (3, 48), got (3, 47)"
    refuse("quantize_kv", ValueError, message, X, out=(packed[:, :47], norms))
    message = "norms must have shape (3, 1), got (3,)"
    refuse("quantize_kv", ValueError, message, X, out=(packed, norms[:, 0]))
    refuse("quantize_kv", TypeError, "packed has dtype int8, must be uint8", X, out=(packed.view(np.int8), norms))
    message = "norms has dtype float32, must be float16"
    refuse("quantize_kv", TypeError, message, X, out=(packed, norms.astype(F32)))
    message = "norms has dtype float16, must be float32"
    refuse("quantize_kv", TypeError, message, X, out=(packed, norms), norms_dtype=F32)
    locked = packed.copy()
    locked.flags.writeable = False
    refuse("quantize_kv", ValueError, "packed is read-only", X, out=(locked, norms))
    over = X.view(U8)[:, :48]
    refuse("quantize_kv", ValueError, f"packed shares memory with x: {OWN}", X, out=(over, None))
    rule = "out must be a tuple (packed, norms), with None for a new array, got"
    refuse("quantize_kv", TypeError, f"{rule} ndarray", X, out=packed)
    refuse("quantize_kv", TypeError, f"{rule} list", X, out=[packed, norms])
    refuse("quantize_kv", ValueError, f"{rule} 1 entries", X, out=(packed,))


def test_decoding():
    packed, norms = stored()
    refuse("dequantize_kv", ValueError, "codec must be 1 or 2, got 3", packed, norms, codec=3)
    refuse("dequantize_kv", TypeError, "codec must be an integer, got str", packed, norms, codec="2")
    refuse("dequantize_kv", TypeError, "rotated must be True or False, got int", packed, norms, rotated=1)
    message = "packed has dtype int64, must be uint8"
    refuse("dequantize_kv", TypeError, message, packed.astype(np.int64), norms)
    message = "norms has dtype uint8, must be float32, float16, bfloat16 or float64"
    refuse("dequantize_kv", TypeError, message, packed, norms.astype(U8))
    message = "packed.shape[-1] must be D * 5 / 8 bytes, where D is a multiple of 8 from 8 to 4096, got 48"
    refuse("dequantize_kv", ValueError, message, packed, norms, 5)
    message = "packed.shape[-1] must be D * 4 / 8 bytes, where D is a multiple of 8 from 8 to 4096, got 6"
    refuse("dequantize_kv", ValueError, message, packed[:, :6], norms)
    message = "norms must have packed's shape (3,) with a last axis of 1, got (3,)"
    refuse("dequantize_kv", ValueError, message, packed, norms[:, 0])
    message = "out must have shape (3, 96), got (3, 95)"
    refuse("dequantize_kv", ValueError, message, packed, norms, out=np.ones((3, 95), F32))
    message = "out has dtype float64, must be float32"
    refuse("dequantize_kv", TypeError, message, packed, norms, out=np.ones((3, 96)))


def test_decoding_codec_1():
    packed, norms = np.zeros((3, 32), U8), np.ones(3, F32)
    assert q.dequantize_kv(packed, norms, codec=1).shape == (3, 64)
    message = "bits must be 4, 5, 6 or 8 with codec=1, got 3"
    refuse("dequantize_kv", ValueError, message, packed, norms, 3, codec=1)
    message = "packed.shape[-1] must be D * 4 / 8 bytes, where D is a power of two from 2 to 4096, got 31"
    refuse("dequantize_kv", ValueError, message, packed[:, :31], norms, codec=1)
    message = "packed.shape[-1] must be 256 or 512 at 8 bits with codec=1, got 32"
    refuse("dequantize_kv", ValueError, message, packed, norms, 8, codec=1)
    message = "norms must have packed's shape without the last axis, (3,), got (3, 1)"
    refuse("dequantize_kv", ValueError, message, packed, norms[:, None], codec=1)
    message = "norms must have packed's shape (3,) with a last axis of 2, got (3,)"
    refuse("dequantize_kv", ValueError, message, np.zeros((3, 256), U8), norms, codec=1)
    message = "scale_factor_d512 must be finite, got nan"
    refuse("dequantize_kv", ValueError, message, packed, norms, codec=1, scale_factor_d512=np.nan)


def test_outputs_of_rotations():
    refuse("fwht", ValueError, "out must have shape (3, 96), got (96,)", X, out=np.ones(96, F32))
    refuse("fwht", TypeError, "out has dtype float16, must be float32", X, out=np.ones((3, 96), F16))
    refuse("fwht", TypeError, "signs must be True or False, got int", X, signs=1)
    refuse("fwht", TypeError, "inverse must be True or False, got NoneType", X, inverse=None)
    memory = np.ones(3 * 96 + 1, F32)
    refuse(
        "fwht",
        ValueError,
        f"out shares memory with x: {OWN}",
        memory[1:].reshape(3, 96),
        out=memory[:-1].reshape(3, 96),
    )


# ---- factors that divide, keywords that are not there ----


def test_a_factor_of_zero_is_for_encoders_alone():
    packed, norms = np.zeros((2, 3, 256), U8), np.ones((2, 3, 2), F32)
    for value in (0, 0.0, -0.0, 1e-60):
        message = f"scale_factor_d512 must not be 0, by which norms would be divided, got {value!r}"
        refuse("dequantize_kv", ValueError, message, packed, norms, codec=1, scale_factor_d512=value)
        cache = packed, norms
        keywords = {"codec": 1, "scale_factor_d512": value}
        refuse("kv_attention", ValueError, message, np.ones((2, 512), F32), cache, cache, **keywords)
    arrays, keywords = kv(512)
    q.hadamard_quantize_kv(*arrays, **keywords, scale_factor_d512=0.0)
    assert (arrays[1][:, 1] == 0x77).all()


def test_only_functions_with_input_dtype_speak_of_it():
    rule = "must be float32, float16, bfloat16 or float64"
    without = f"has dtype uint16, {rule} (.view(ml_dtypes.bfloat16) declares that uint16 holds bfloat16 bits)"
    for name, encoder in ENCODERS.items():
        (src, *_), _ = encoder()
        refuse_encoding(name, TypeError, f"src {without}", src=src.astype(np.uint16))
    x = np.ones((2, 3, 256), np.uint16)
    for codec in (1, 2):
        cache = q.KVCache(2, 8, 256, codec=codec)
        with pytest.raises(TypeError, match=f"^{re.escape(f'KVCache.append: k {without}')}$"):
            cache.append(x, x)
        cache.append(x.astype(F32), x.astype(F32))
        with pytest.raises(TypeError, match=f"^{re.escape(f'KVCache.attend: q {without}')}$"):
            cache.attend(x)
    for mode in ("affine", "mxfp4"):
        t = q.QTensor.quantize(np.eye(256, dtype=F32), mode)
        for right in (t, t.T):
            with pytest.raises(TypeError, match=f"^{re.escape(f'QTensor: x {without}')}$"):
                x @ right
    hint = '(input_dtype="bfloat16" declares that uint16 holds bfloat16 bits)'
    refuse("quantize_kv", TypeError, f"x has dtype uint16, {rule} {hint}", X.astype(np.uint16))
    with pytest.raises(TypeError, match=re.escape(f"QTensor.quantize: w has dtype uint16, {rule} {hint}")):
        q.QTensor.quantize(x)
    assert q.QTensor.quantize(x, input_dtype="bfloat16").shape == x.shape


def test_what_the_messages_about_bfloat16_advise_works():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.full((2, 3, 256), 0x3F80, np.uint16).view(ml_dtypes.bfloat16)
    cache = q.KVCache(2, 8, 256)
    cache.append(x, x)
    assert cache.attend(x).dtype == x.dtype
    t = q.QTensor.quantize(np.eye(256, dtype=F32))
    for right in (t, t.T):
        np.testing.assert_array_equal((x @ right).astype(x.dtype), x)  # 0x3F80 is 1 in bfloat16
