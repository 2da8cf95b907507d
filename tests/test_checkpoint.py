"""`QTensor`, `quantization.open` and `quantization.save_mlx`, with the libraries that own the formats as oracles."""

import json
import pickle
import re
import struct

import numpy as np
import pytest

import quantization as q
import reference
from quantization import _checkpoint, _gguf
from quantization._formats import Format, known_formats

FORMATS = known_formats()
OF_MLX = [f for f in FORMATS if f.bits != 7]
GGUF_TYPES = {
    "Q4_0": "affine 4 g32",
    "Q4_1": "affine 4 g32",
    "Q5_0": "affine 5 g32",
    "Q5_1": "affine 5 g32",
    "Q8_0": "affine 8 g32",
    "Q4_K": "affine 4 g32",
    "Q5_K": "affine 5 g32",
    "TQ1_0": "affine 2 g128",
    "TQ2_0": "affine 2 g128",
    "MXFP4": "mxfp4",
    "NVFP4": "nvfp4",
}


def quantized(target, rng, shape=(6, 256), dtype=np.float16):
    w = rng.standard_normal(shape).astype(dtype)
    return q.QTensor.quantize(w, target.mode, bits=target.bits, group_size=target.group_size)


def same_parts(a, b):
    assert a.parts.keys() == b.parts.keys()
    for name, part in a.parts.items():
        assert (part.dtype, part.shape, part.tobytes()) == (
            b.parts[name].dtype,
            b.parts[name].shape,
            b.parts[name].tobytes(),
        )


# ---------------------------------------------------------------------------------------------------------- QTensor


@pytest.mark.parametrize("target", FORMATS, ids=str)
def test_qtensor_is_its_parts(target, rng):
    w = rng.standard_normal((6, 256)).astype(np.float16)
    t = quantized(target, np.random.default_rng(0))
    assert (t.shape, t.ndim, t.size, len(t)) == ((6, 256), 2, 1536, 6)
    assert (t.mode, t.bits, t.group_size) == (target.mode, target.bits, target.group_size)
    assert t.nbytes == sum(part.nbytes for part in t.parts.values())
    assert t.bits_per_weight == 8 * t.nbytes / 1536
    text = repr(t)
    assert all(expected in text for expected in ("6x256", str(target), f"{t.nbytes:,} bytes", "bits/weight"))
    arrays = getattr(q, f"{target.mode}_quantize")(w, **_sizes(target))
    t = q.QTensor(*arrays, mode=target.mode, **_sizes(target))
    expected = getattr(q, f"{target.mode}_dequantize")(*arrays, **_sizes(target), dtype="float32")
    assert np.asarray(t).tobytes() == t.dequantize().tobytes() == expected.tobytes()
    assert np.asarray(t, np.float64).dtype == np.float64
    assert np.asarray(t[2:4]).tobytes() == expected[2:4].tobytes()
    assert np.asarray(t[3]).tobytes() == expected[3].tobytes()
    assert np.asarray(t[[5, 0]]).tobytes() == expected[[5, 0]].tobytes()
    assert (t.T.shape, t.T.T is t) == ((256, 6), True)
    np.testing.assert_array_equal(np.asarray(t.T), expected.T)
    same_parts(pickle.loads(pickle.dumps(t)), t)


def _sizes(target):
    return {"bits": target.bits, "group_size": target.group_size} if target.sized else {}


@pytest.mark.parametrize("target", FORMATS, ids=str)
def test_products_are_those_of_the_functions(target, rng):
    t = quantized(target, rng, (128, 256))
    parts = list(t.parts.values())
    x, v = rng.standard_normal((3, 256), np.float32), rng.standard_normal((2, 128), np.float32)
    assert (x @ t.T).tobytes() == getattr(q, f"{target.mode}_qmm_t")(x, *parts, **_sizes(target)).tobytes()
    assert (x[0] @ t.T).tobytes() == (x @ t.T)[0].tobytes()
    assert (v @ t).tobytes() == getattr(q, f"{target.mode}_qmm_n")(v, *parts, **_sizes(target)).tobytes()


def test_bfloat16_scales_as_bits_and_as_ml_dtypes(rng):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs ml_dtypes")
    w, x = rng.standard_normal((8, 64), np.float32), rng.standard_normal((2, 64), np.float32)
    t = q.QTensor.quantize(w, scale_dtype=ml_dtypes.bfloat16)
    raw = q.QTensor(t.codes, t.scales.view(np.uint16), t.biases.view(np.uint16))
    assert raw.dequantize().tobytes() == t.dequantize().tobytes()
    assert (x @ raw.T).tobytes() == (x @ t.T).tobytes()


def test_global_scale_goes_everywhere(rng):
    w = rng.standard_normal((4, 64), np.float32)
    t = q.QTensor.quantize(w, "nvfp4", global_scale=float(np.abs(w).max()))
    parts = t.parts
    assert (parts["global_scale"].dtype, parts["global_scale"].shape) == (np.float32, (1,))
    expected = q.nvfp4_dequantize(parts["weight"], parts["scales"], global_scale=t.global_scale)
    assert np.asarray(pickle.loads(pickle.dumps(t[:]))).tobytes() == expected.tobytes()
    assert "global scale" in repr(t)


@pytest.mark.parametrize("target", FORMATS, ids=str)
def test_rows_that_end_within_a_group(target, rng):
    """A padded tensor knows its length: it is that of the matrix everywhere, and the rest is the functions'."""
    k = 2 * target.group_size - 5
    w, x, v = (rng.standard_normal((rows, columns), np.float32) for rows, columns in ((6, k), (3, k), (2, 6)))
    t = q.QTensor.quantize(w, target.mode, pad=True, **_sizes(target))
    parts, of_mode = list(t.parts.values()), f"{target.mode}_"
    assert (t.shape, t.k, t.stored_k, t.T.shape) == ((6, k), k, 2 * target.group_size, (k, 6))
    assert t.bits_per_weight == 8 * t.nbytes / (6 * k)
    expected = getattr(q, of_mode + "dequantize")(*parts, k=k, dtype="float32", **_sizes(target))
    for same in (t, pickle.loads(pickle.dumps(t)), q.QTensor(*parts, mode=t.mode, k=k, **_sizes(target))):
        assert np.asarray(same).tobytes() == expected.tobytes()
        assert f"rows padded to {2 * target.group_size}, " in repr(same)
    assert np.asarray(t[1:3]).tobytes() == expected[1:3].tobytes()
    assert (x @ t.T).tobytes() == getattr(q, of_mode + "qmm_t")(x, *parts, **_sizes(target)).tobytes()
    product = getattr(q, of_mode + "qmm_n")(v, *parts, output_features=k, **_sizes(target))
    assert (v @ t).tobytes() == product.tobytes()
    whole = q.QTensor(*parts, mode=t.mode, **_sizes(target))
    assert (whole.shape, "padded" in repr(whole)) == ((6, 2 * target.group_size), False)
    for wrong, tensor in ((w[:, 1:], t), (np.ones((1, k + 1)), t), (x, whole)):
        with pytest.raises(ValueError, match=rf"^QTensor: x\.shape\[-1\] must be {tensor.k}, .* got {wrong.shape[-1]}"):
            wrong @ tensor.T


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_a_quantized_matrix_on_the_left_is_refused_with_what_works(mode):
    t, x = q.QTensor.quantize(np.eye(64, dtype=np.float32), mode), np.ones((64, 2), np.float32)
    for left in (t, t.T):
        for right in (x, t):
            with pytest.raises(
                TypeError, match=r"^QTensor: .* on the right: x @ t\.T or x @ t; .*np\.asarray\(t\) @ x$"
            ):
                left @ right
        np.testing.assert_array_equal(np.asarray(left) @ x, x)


def test_length_of_rows_that_is_wrong():
    for wrong in (0, 64, 129, -1):
        with pytest.raises(
            ValueError, match=f"^QTensor: k must be from 65 to 128, as rows have 2 groups, got {wrong}$"
        ):
            q.QTensor(np.zeros((2, 16), np.uint32), *np.ones((2, 2, 2), np.float32), group_size=64, k=wrong)
    with pytest.raises(TypeError, match=r"^QTensor: k must be an integer, got float$"):
        q.QTensor(CODES, SCALES, SCALES, k=64.0)


CODES, SCALES = np.zeros((4, 8), np.uint32), np.zeros((4, 1), np.float16)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((CODES.astype(np.int64), SCALES, SCALES), {}, TypeError, "codes must be an array of uint32, got int64"),
        ((CODES, SCALES[:3], SCALES[:3]), {}, ValueError, "codes of (4, 8) do not go with scales of (3, 1)"),
        ((CODES, SCALES, SCALES[:, :0]), {}, ValueError, "biases of (4, 0) do not go with scales of (4, 1)"),
        ((CODES, SCALES), {}, ValueError, "mode 'affine' needs biases"),
        ((CODES, SCALES, SCALES), {"bits": 8, "group_size": 64}, ValueError, "16 words of codes to each scale, got 8"),
        ((CODES, SCALES, SCALES), {"bits": 7, "group_size": 5}, ValueError, "unknown format affine 7-bit g5"),
        ((CODES, SCALES, SCALES), {"mode": "mxfp9"}, ValueError, "unknown format mxfp9"),
        ((CODES, SCALES, SCALES), {"global_scale": 1.0}, ValueError, "mode 'affine' has no global_scale"),
        ((CODES[:, :4], SCALES.astype(np.uint8), SCALES), {"mode": "mxfp4"}, ValueError, "'mxfp4' has no biases"),
    ],
)
def test_parts_that_do_not_fit(arguments, options, error, text):
    with pytest.raises(error, match="^QTensor: .*" + re.escape(text)):
        q.QTensor(*arguments, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t, x: x @ t, r"^QTensor: x\.shape\[-1\] must be 6, the input features of w"),
        (lambda t, x: "x" @ t.T, r"^QTensor: x must be an array of floats"),
        (lambda t, x: t.__array__(copy=False), r"^QTensor: decoding makes a new array"),
        (lambda t, x: t.dequantize("int8"), r"^QTensor\.dequantize: dtype must be "),
        (lambda t, x: q.QTensor.quantize(x[:, :3]), r"^QTensor\.quantize: w\.shape\[-1\] must be a multiple"),
        (lambda t, x: q.QTensor.quantize(x, bits=9), r"^QTensor\.quantize: unknown format affine 9-bit;"),
        (lambda t, x: q.QTensor.quantize(x, flavour=9), r"^QTensor\.quantize: .*unexpected keyword argument"),
    ],
)
def test_errors_name_what_was_called(call, message, rng):
    with pytest.raises((ValueError, TypeError), match=message):
        call(quantized(FORMATS[0], rng), np.ones((3, 256), np.float32))


def test_misuse_of_a_qtensor(rng):
    t = quantized(FORMATS[0], rng)
    with pytest.raises(IndexError, match="the last one is packed"):
        t[0, 1]
    with pytest.raises(IndexError, match="the last one is packed"):
        t[0][0]
    with pytest.raises(TypeError):
        t * np.ones(256)
    with pytest.raises(ValueError, match="copy=False"):
        t.__array__(copy=False)
    assert q.QTensor(CODES, SCALES, SCALES, bits=8).group_size == 32  # 8 words are 256 bits


# -------------------------------------------------------------------------------------------------- MLX checkpoints


@pytest.fixture
def checkpoint(rng, tmp_path):
    """A folder in which every format occurs, and what was written there."""
    pytest.importorskip("safetensors", reason="needs safetensors")
    tensors = {f"layers.{i}.up": quantized(target, rng) for i, target in enumerate(OF_MLX)}
    tensors["experts"] = quantized(FORMATS[0], rng, (3, 4, 64))
    tensors["global"] = q.QTensor.quantize(np.ones((2, 32), np.float32), "nvfp4", global_scale=2.0)
    tensors["norm.weight"] = np.arange(5, dtype=np.float32)
    tensors["ids"] = np.arange(3)
    q.save_mlx(tmp_path / "m", tensors, config={"model_type": "x"}, max_shard_bytes=5000)
    return tmp_path / "m", tensors


def test_what_is_saved_is_opened(checkpoint):
    folder, tensors = checkpoint
    opened = q.open(folder)
    for name, tensor in tensors.items():
        if isinstance(tensor, q.QTensor):
            same_parts(opened[name], tensor)
            assert (opened[name].format, opened[name].global_scale) == (tensor.format, tensor.global_scale)
        else:
            np.testing.assert_array_equal(opened.unquantized[name], tensor)
    assert opened.keys() | opened.unquantized.keys() == tensors.keys()
    assert opened.unsupported == ()
    assert list(opened)[2:5] == ["layers.0.up", "layers.1.up", "layers.2.up"] and "layers.10.up" in list(opened)[10:13]
    assert opened.metadata["model_type"] == "x"
    text = repr(opened)
    assert f"{len(opened)} quantized layers, 2 unquantized tensors" in text and "layers.0.up" in text
    assert not opened["layers.0.up"].codes.flags.writeable
    assert all(part.flags.aligned for t in opened.values() for part in t.parts.values())
    q.save_mlx(folder.with_name("again"), opened)
    again = q.open(folder.with_name("again"))
    same_parts(again["layers.3.up"], opened["layers.3.up"])
    assert again.metadata == opened.metadata and set(again.unquantized) == {"norm.weight", "ids"}


def test_saved_files_are_read_by_safetensors(checkpoint):
    folder, tensors = checkpoint
    load_file = pytest.importorskip("safetensors.numpy", reason="needs safetensors").load_file
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {}
    for file in files:
        content = load_file(file)
        assert all(index["weight_map"][name] == file.name for name in content)
        assert sum(array.nbytes for array in content.values()) <= 5000 or len(content) <= 4
        found |= content
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in found.values())
    np.testing.assert_array_equal(found["layers.0.up.weight"], tensors["layers.0.up"].codes)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    default = {key: config["quantization"][key] for key in ("group_size", "bits", "mode")}
    for name, tensor in tensors.items():
        if isinstance(tensor, q.QTensor):
            entry = {"group_size": tensor.group_size, "bits": tensor.bits, "mode": tensor.mode}
            assert config["quantization"].get(name, default) == entry


def test_mlx_reads_what_is_saved(checkpoint):
    mx = pytest.importorskip("mlx.core", reason="needs mlx")
    folder, tensors = checkpoint
    arrays = {}
    for file in folder.glob("*.safetensors"):
        content, metadata = mx.load(str(file), return_metadata=True)
        assert metadata["format"] == "mlx"
        arrays |= content
    x = np.random.default_rng(1).standard_normal((1, 256)).astype(np.float32)
    for name, t in tensors.items():
        if not isinstance(t, q.QTensor) or t.ndim > 2 or t.global_scale is not None:
            continue
        parts = [arrays[f"{name}.{part}"] for part in t.parts]
        sizes = {"group_size": t.group_size, "bits": t.bits, "mode": t.mode}
        if t.mode == "affine":  # whose scales may be widened without loss: MLX then computes in float32
            parts[1:] = [part.astype(mx.float32) for part in parts[1:]]
        decoded = np.array(mx.dequantize(*parts, **sizes, dtype=mx.float32))
        np.testing.assert_array_equal(decoded, np.asarray(t))
        product = np.array(mx.quantized_matmul(mx.array(x), *parts, **sizes))
        # Both sums of K = 256 terms are in float32: each is within K * 2**-24 of the exact one, relative to sum |x w|;
        # block fixed point adds 2**-22 of the largest |x| per term.
        bound = np.abs(x) @ np.abs(decoded.T) * 256 * 2.0**-23 + np.abs(decoded).sum(1) * np.abs(x).max() * 2.0**-22
        if hasattr(q, f"{t.mode}_qmm_t"):
            assert (np.abs(product - x @ t.T) <= bound).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_what_mlx_saves_is_opened(bits, tmp_path, rng):
    """Its header is not padded, so that nothing in the file is aligned."""
    mx = pytest.importorskip("mlx.core", reason="needs mlx")
    pytest.importorskip("safetensors", reason="needs safetensors")
    pytest.importorskip("ml_dtypes", reason="needs ml_dtypes")
    w = mx.array(rng.standard_normal((16, 128), np.float32)).astype(mx.bfloat16)
    parts = dict(zip(("up.weight", "up.scales", "up.biases"), mx.quantize(w, 32, bits), strict=True))
    for length in range(1, 9):  # some length makes an address that is not divisible by four
        mx.save_safetensors(str(tmp_path / "model.safetensors"), {**parts, "n" * length: w}, {"format": "mlx"})
        (tmp_path / "config.json").write_text(json.dumps({"quantization": {"group_size": 32, "bits": bits}}))
        t = q.open(tmp_path)["up"]
        if not t.codes.flags.aligned:
            break
    assert not t.codes.flags.aligned
    expected = np.array(mx.dequantize(*[part.astype(mx.float32) if part.dtype == mx.bfloat16 else part
                                        for part in parts.values()], group_size=32, bits=bits))  # fmt: skip
    np.testing.assert_array_equal(np.asarray(t), expected)
    np.testing.assert_array_equal(t.codes, np.array(parts["up.weight"]))
    x = rng.standard_normal((2, 128), np.float32)
    copied = pickle.loads(pickle.dumps(t))
    assert (x @ t.T).tobytes() == (x @ copied.T).tobytes()
    same_parts(t, copied)


def write_plain(path, arrays, metadata=None):
    save_file = pytest.importorskip("safetensors.numpy", reason="needs safetensors").save_file
    save_file(arrays, path, metadata)


def layer(target=("affine", 4, 64), rows=2, groups=2, name="up"):
    mode, bits, size = target
    scales = np.ones((rows, groups), np.float16 if mode == "affine" else np.uint8)
    parts = {"weight": np.zeros((rows, groups * size * bits // 32), np.uint32), "scales": scales}
    return {f"{name}.{part}": array for part, array in parts.items()} | (
        {f"{name}.biases": np.zeros_like(scales)} if mode == "affine" else {}
    )


def test_overrides_of_layers(tmp_path):
    arrays = layer() | layer(("affine", 8, 64), name="down") | layer(("mxfp8", 8, 32), name="head")
    arrays |= {"kept.weight": np.ones((2, 64), np.float32), "kept.bias": np.ones(2, np.float32)}
    write_plain(tmp_path / "model.safetensors", arrays)
    entry = {"group_size": 64, "bits": 4, "down": {"group_size": 64, "bits": 8}, "head": {"mode": "mxfp8"}, "up": True}
    (tmp_path / "config.json").write_text(json.dumps({"quantization": entry | {"kept": False}}))
    opened = q.open(tmp_path)
    assert [str(opened[name].format) for name in ("up", "down", "head")] == ["affine 4 g64", "affine 8 g64", "mxfp8"]
    assert set(opened.unquantized) == {"kept.weight", "kept.bias"}
    del entry["down"]
    with pytest.raises(ValueError, match=r"down: weight of \(2, 32\) and scales of \(2, 2\) are not those of affine 4"):
        q.open(tmp_path, quantization=entry)
    with pytest.raises(ValueError, match=r"kept\.weight is quantized, but there are no scales"):
        q.open(tmp_path, quantization=entry | {"down": {"group_size": 64, "bits": 8}, "kept": {"bits": 4}})


def test_quantization_that_is_null(tmp_path):
    """Checkpoints that are not quantized say so; it means no more than no entry."""
    write_plain(tmp_path / "model.safetensors", layer() | {"norm.weight": np.ones(3, np.float32)})
    (tmp_path / "config.json").write_text('{"quantization": null, "quantization_config": null}')
    opened = q.open(tmp_path)
    assert (list(opened), list(opened.unquantized)) == (["up"], ["norm.weight"])
    (tmp_path / "config.json").write_text('{"quantization": 4}')
    with pytest.raises(ValueError, match=r"^open: .*: quantization in config\.json must be an object, got 4"):
        q.open(tmp_path)


def test_without_a_config_shapes_decide(tmp_path):
    arrays = layer() | layer(("mxfp4", 4, 32), name="m") | layer(("nvfp4", 4, 16), name="n")
    write_plain(tmp_path / "a.safetensors", arrays | layer(("affine", 5, 128), name="five"))
    opened = q.open(tmp_path / "a.safetensors")
    assert [str(opened[name].format) for name in opened] == ["affine 5 g128", "mxfp4", "nvfp4", "affine 4 g64"]
    write_plain(tmp_path / "b.safetensors", layer(("affine", 6, 32)))
    with pytest.raises(ValueError, match=r"up: .* fit 3 bits in groups of 64 or 6 bits in groups of 32; open\("):
        q.open(tmp_path / "b.safetensors")
    assert q.open(tmp_path / "b.safetensors", quantization={"bits": 6, "group_size": 32})["up"].bits == 6


def test_what_is_not_supported_is_listed(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs ml_dtypes")
    arrays = layer(name="a") | layer(name="b") | {"c.weight": np.ones((2, 64), np.float16), "c.scales": np.ones(2)}
    arrays["d.weight"] = np.ones(3, ml_dtypes.float8_e4m3fn)
    write_plain(tmp_path / "model.safetensors", arrays)
    entry = {"group_size": 64, "bits": 4, "a": {"mode": "own", "bits": 9}, "b": False}
    (tmp_path / "config.json").write_text(json.dumps({"quantization": entry}))
    opened = q.open(tmp_path)
    assert len(opened) == 0
    reasons = {entry.name: entry.reason for entry in opened.unsupported}
    assert "unknown format own 9-bit" in reasons["a.weight"]
    assert reasons["b.scales"] == "config.json says false, yet there are scales"
    assert reasons["c.weight"] == "F16: MLX packs codes in U32"
    assert reasons.keys() == arrays.keys() - {"d.weight"}
    assert "c.scales, c.weight" in repr(opened) or "c.weight, c.scales" in repr(opened)
    assert opened.unquantized["d.weight"].dtype == ml_dtypes.float8_e4m3fn
    with pytest.raises(ValueError, match=r"has unsupported tensors: a\.weight"):
        q.save_mlx(tmp_path / "new", opened)
    assert not (tmp_path / "new").exists()


BAD_LAYERS = [
    ({"up.scales": np.ones((2, 3), np.float16)}, r"up: weight of \(2, 16\) and scales of \(2, 3\) are not those"),
    ({"up.scales": np.ones((2, 2))}, "up: scales of affine 4 g64 are of F16 or BF16 or F32, got F64"),
    ({"up.biases": np.ones((2, 2), np.float32)}, r"up: biases \(F32 \(2, 2\)\) do not go with scales"),
    ({"up.biases": np.ones((4, 1), np.float16)}, r"up: biases \(F16 \(4, 1\)\) do not go with scales"),
    ({"up.biases": None}, "up: affine 4 g64 needs biases"),
    ({"up.global_scale": np.ones(1, np.float32)}, "up: global_scale is one F32 number of nvfp4"),
]


@pytest.mark.parametrize(("change", "text"), BAD_LAYERS)
def test_parts_of_a_layer_that_do_not_fit(change, text, tmp_path):
    arrays = {name: array for name, array in (layer() | change).items() if array is not None}
    write_plain(tmp_path / "model.safetensors", arrays)
    with pytest.raises(ValueError, match=text):
        q.open(tmp_path, quantization={"group_size": 64, "bits": 4})


@pytest.mark.parametrize("file", ["../x.safetensors", "/x.safetensors", "..", "", "a\\b", "a\0b", 7])
def test_shard_names_that_leave_the_folder(file, tmp_path):
    pytest.importorskip("safetensors", reason="needs safetensors")
    (tmp_path / "m").mkdir()
    write_plain(tmp_path / "x.safetensors", layer())
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"up.weight": file}}))
    with pytest.raises(ValueError, match=r"up\.weight is said to lie in|names of files"):
        q.open(tmp_path / "m")


def test_index_that_does_not_agree(tmp_path):
    write_plain(tmp_path / "a.safetensors", layer())
    write_plain(tmp_path / "b.safetensors", layer(name="down"))
    index = tmp_path / "model.safetensors.index.json"
    place = dict.fromkeys(layer(), "a.safetensors") | dict.fromkeys(layer(name="down"), "b.safetensors")
    index.write_text(json.dumps({"weight_map": place}))
    assert set(q.open(tmp_path)) == {"up", "down"}
    index.write_text(json.dumps({"weight_map": place | {"gone": "b.safetensors"}}))
    with pytest.raises(ValueError, match=r"gone is said to lie in b\.safetensors, which has no such tensor"):
        q.open(tmp_path)
    index.write_text(json.dumps({"weight_map": place | {"gone": "c.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"c\.safetensors"):
        q.open(tmp_path)
    index.unlink()
    write_plain(tmp_path / "b.safetensors", layer())
    with pytest.raises(ValueError, match=r"up\.\w+ lies in a\.safetensors and in b\.safetensors"):
        q.open(tmp_path)
    for text in ("[]", "{", '{"weight_map": 3}', "[" * 100_000):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"index\.json"):
            q.open(tmp_path)


def test_paths_that_are_nothing(tmp_path):
    pytest.importorskip("safetensors", reason="needs safetensors")
    with pytest.raises(FileNotFoundError, match="there is no"):
        q.open(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="no safetensors files"):
        q.open(tmp_path)
    (tmp_path / "x.bin").touch()
    with pytest.raises(ValueError, match=r"no folder, \.safetensors or \.gguf file"):
        q.open(tmp_path / "x.bin")


class FakeOf7Bits(q.QTensor):
    """Pretends to have a format of ours that MLX lacks."""

    def __init__(self, tensor):
        self.__dict__.update(tensor.__dict__, format=Format("affine", 7, 64))


def test_save_refuses_and_writes_nothing(tmp_path):
    pytest.importorskip("safetensors", reason="needs safetensors")
    up = q.QTensor.quantize(np.ones((2, 64), np.float32))
    for tensors, error, text in [
        ({"up": up, "up.scales": np.ones(2)}, ValueError, r"two tensors would have the name up\.scales"),
        ({"__metadata__": np.ones(2)}, ValueError, "a tensor would have the name __metadata__"),
        ({"up": FakeOf7Bits(up)}, ValueError, "MLX has no format affine 7 g64"),
        ({"x": np.array(["text"])}, TypeError, "x: <U4: safetensors has no such type"),
        ({1: np.ones(2)}, TypeError, "names are texts, got 1"),
        (
            {"up": q.QTensor.quantize(np.ones((2, 60), np.float32), pad=True)},
            ValueError,
            "up: its rows of 60 are padded to 64, which files of MLX cannot say",
        ),
    ]:
        with pytest.raises(error, match=f"^save_mlx: {text}"):
            q.save_mlx(tmp_path / "m", tensors)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "m").mkdir()
    q.save_mlx(tmp_path / "m", {"up": up})  # an empty folder is as good as none
    before = {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()}
    with pytest.raises(FileExistsError, match=r"^save_mlx: .*nothing is ever written over"):
        q.save_mlx(tmp_path / "m", {"x": np.ones(2)})
    assert {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


# ------------------------------------------------------------------------------------------- headers that are lies


def safetensors_file(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


LIES = {
    "nothing": b"",
    "length cut": b"\1\0\0",
    "length huge": safetensors_file({"a": entry()}, bytes(4), 2**63),
    "header cut": safetensors_file({"a": entry()}, bytes(4), 1000),
    "data cut": safetensors_file({"a": entry()}, bytes(3)),
    "data left over": safetensors_file({"a": entry()}, bytes(5)),
    "shape against offsets": safetensors_file({"a": entry(shape=(5,))}, bytes(4)),
    "product overflows": safetensors_file({"a": entry(shape=(2**32, 2**32, 4), offsets=(0, 0))}),
    "product overflows to its size": safetensors_file({"a": entry(shape=(2**62 + 1, 4))}, bytes(4)),
    "negative shape": safetensors_file({"a": entry(shape=(-4,))}, bytes(4)),
    "hole": safetensors_file({"a": entry(), "b": entry(offsets=(5, 9))}, bytes(9)),
    "overlap": safetensors_file({"a": entry(), "b": entry(offsets=(2, 6))}, bytes(6)),
    "backwards": safetensors_file({"a": entry(offsets=(4, 0))}, bytes(4)),
    "beyond": safetensors_file({"a": entry(offsets=(2**63, 2**63 + 4))}, bytes(4)),
    "type unknown": safetensors_file({"a": entry("Q4")}, bytes(4)),
    "no object": safetensors_file([1], bytes(4)),
    "not JSON": safetensors_file(b"{]" * 50),
    "not UTF-8": safetensors_file(b"\xff" * 50),
    "nested": safetensors_file(b"[" * 100_000),
}


@pytest.mark.parametrize("name", LIES)
def test_safetensors_header_that_lies(name, tmp_path):
    pytest.importorskip("safetensors", reason="needs safetensors")
    (tmp_path / "model.safetensors").write_bytes(LIES[name])
    with pytest.raises(ValueError, match=r"^open: .*model\.safetensors: "):
        q.open(tmp_path)


def survives(path, opener):
    """Open a damaged file and touch all of it: a ValueError is fine, anything else but success is not."""
    try:
        opened = opener(path)
        for name in opened:
            np.asarray(opened[name])
        for name in opened.unquantized:
            opened.unquantized[name].sum()
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("kind", ["mlx", "gguf"])
def test_damaged_files(kind, tmp_path, rng):
    """Every cut and random changes of the header: the file is refused, or read without touching foreign memory."""
    path = tmp_path / f"x.{'safetensors' if kind == 'mlx' else 'gguf'}"
    if kind == "mlx":
        write_plain(path, layer() | {"n": np.ones(3, np.float32)})
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    else:
        header = write_gguf(path, {"Q4_0": rng.standard_normal((2, 64)), "F32": np.ones(3)})
    whole = path.read_bytes()
    assert survives(path, q.open)
    for cut in [*range(0, header, 7), *range(header, len(whole) - 33, 11)]:
        path.write_bytes(whole[:cut])
        assert not survives(path, q.open), cut
    accepted = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for place in rng.integers(0, header, rng.integers(1, 3)):
            damaged[place] = rng.choice([0, 255, 128, 1, rng.integers(256)])
        path.write_bytes(damaged)
        accepted += survives(path, q.open)
    assert accepted < 150


# ------------------------------------------------------------------------------------------------------------- GGUF


def blocks_of(gguf, kind, rng, rows=4, width=512):
    """Random blocks of a type; gguf makes those that it can, so that its conventions are met."""
    number = gguf.GGMLQuantizationType[kind]
    spread = np.exp(rng.normal(0, 2, (rows, width // 32, 1))) * rng.standard_normal((rows, width // 32, 32))
    w = spread.reshape(rows, width).astype(np.float32)
    if kind not in ("Q4_K", "Q5_K", "NVFP4"):
        return gguf.quantize(w, number), number
    elements, size = gguf.GGML_QUANT_SIZES[number]
    blocks = rng.integers(0, 256, (rows, width // elements, size), dtype=np.uint8)
    if kind == "NVFP4":
        blocks[..., :4] %= 127
    else:
        factors = rng.uniform(-1, 1, (rows, width // elements, 2)).astype(np.float16)
        blocks[..., :4] = factors.view(np.uint8)
    return blocks.reshape(rows, -1), number


def write_gguf(path, tensors, raw=None):
    """Write tensors by the name of their type with gguf's own writer; return where the data begin."""
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    writer = gguf.GGUFWriter(path, "test")
    writer.add_array("list", ["a", "bc"])
    for name, w in tensors.items():
        kind = gguf.GGMLQuantizationType[name]
        data = raw[name] if raw else gguf.quantize(np.asarray(w, np.float32), kind)
        writer.add_tensor(f"blk.0.{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.GGUFReader(path).data_offset


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_gguf_type_is_held_exactly(kind, tmp_path, rng):
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    blocks, number = blocks_of(gguf, kind, rng)
    write_gguf(tmp_path / "x.gguf", {kind: None}, {kind: blocks})
    opened = q.open(tmp_path / "x.gguf")
    t = opened[f"blk.0.{kind}"]
    assert (str(t.format), t.shape) == (GGUF_TYPES[kind], (4, 512))
    expected = gguf.dequantize(blocks, number).astype(np.float32)
    # Adding 0 makes +0 of the -0 that ggml has where a negative scale meets its zero; every other bit counts.
    assert (np.asarray(t) + np.float32(0)).tobytes() == (expected + np.float32(0)).tobytes()
    if t.mode == "affine":
        assert t.scales.dtype == (np.float32 if kind.endswith("_K") else np.float16)
    assert opened.metadata["list"] == ["a", "bc"]
    assert f"blk.0.{kind} " in repr(opened)


def test_mlx_repacks_gguf_alike(tmp_path, rng):
    mx = pytest.importorskip("mlx.core", reason="needs mlx")
    w = {kind: rng.standard_normal((4, 128)) for kind in ("Q4_0", "Q4_1", "Q8_0")}
    write_gguf(tmp_path / "x.gguf", w)
    expected, opened = mx.load(str(tmp_path / "x.gguf")), q.open(tmp_path / "x.gguf")
    for name in opened:
        for part, array in opened[name].parts.items():
            np.testing.assert_array_equal(array, np.array(expected[f"{name}.{part}"]))


def test_gguf_s_plain_and_unsupported_tensors(tmp_path, rng):
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs ml_dtypes")
    raw = {kind: rng.integers(0, 4, (2, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]), dtype=np.uint8)
           for kind in ("Q6_K", "Q2_K", "IQ4_NL", "Q8_K")}  # fmt: skip
    raw |= {"F32": np.ones((2, 3), np.float32), "F16": np.ones(3, np.float16), "I32": np.arange(3, dtype=np.int32)}
    raw["BF16"] = np.ones(4, ml_dtypes.bfloat16).view(np.uint8)
    write_gguf(tmp_path / "x.gguf", dict.fromkeys(raw), raw)
    opened = q.open(tmp_path / "x.gguf")
    assert len(opened) == 0
    for kind in ("F32", "F16", "I32"):
        np.testing.assert_array_equal(opened.unquantized[f"blk.0.{kind}.weight"], raw[kind])
    assert opened.unquantized["blk.0.BF16.weight"].dtype == ml_dtypes.bfloat16
    reasons = {entry.dtype: entry.reason for entry in opened.unsupported}
    assert reasons.keys() == {"Q6_K", "Q2_K", "IQ4_NL", "Q8_K"}
    assert reasons["Q6_K"] == "Q6_K: no format here holds it exactly (its groups are of 16)"
    assert "unsupported (1), IQ4_NL" in repr(opened)
    kind = gguf.GGMLQuantizationType.Q6_K
    np.testing.assert_array_equal(opened.decode("blk.0.Q6_K.weight"), gguf.dequantize(raw["Q6_K"], kind))
    with pytest.raises(ValueError, match=r"blk\.0\.Q8_K\.weight: "):
        opened.decode("blk.0.Q8_K.weight")


@pytest.mark.parametrize("ending", [".scale", ".weight.scale"])
def test_nvfp4_with_a_scale_of_the_whole(ending, tmp_path, rng):
    """The scale is a tensor beside the codes, which multiplies all of them. Half a unit of its last place is lost in
    2688 times it and another in that divided again; then a block's scale times it rounds once, and every value once."""
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    blocks, number = blocks_of(gguf, "NVFP4", rng)
    scales = {"up": np.float32([0.3]), "experts": np.float32([0.3, 0.2]), "wrong": np.float32([np.inf])}
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "test")
    for name, scale in scales.items():
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=number)
        writer.add_tensor(name + ending, scale)
    writer.add_tensor("up.input_scale", np.ones(1, np.float32))  # of activations
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    opened = q.open(tmp_path / "x.gguf")
    assert list(opened) == ["up"]
    assert sorted(opened.unquantized) == sorted(["up.input_scale", f"experts{ending}", f"wrong{ending}"])
    reasons = {entry.name: entry.reason for entry in opened.unsupported}
    assert reasons == {
        f"{name}.weight": f"NVFP4: {name}{ending} is not one finite, positive F32 number"
        for name in ("experts", "wrong")
    }
    expected = gguf.dequantize(blocks, number).astype(np.float64) * np.float64(scales["up"][0])
    assert opened["up"].global_scale == pytest.approx(2688 * 0.3, rel=2**-23)
    np.testing.assert_allclose(np.asarray(opened["up"]), expected, rtol=(1 + 2**-24) ** 4 - 1, atol=0)
    np.testing.assert_allclose(opened.decode("up.weight"), expected, rtol=2**-24, atol=0)


def test_names_that_differ_by_their_suffix(tmp_path, rng):
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    kind = gguf.GGMLQuantizationType.Q4_0
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "test")
    data = {name: rng.standard_normal((2, 32), np.float32) for name in ("up", "up.weight", "down.weight")}
    for name, w in data.items():
        writer.add_tensor(name, gguf.quantize(w, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    opened = q.open(tmp_path / "x.gguf")
    assert list(opened) == ["up", "up.weight", "down"]
    np.testing.assert_array_equal(np.asarray(opened["up.weight"]), opened.decode("up.weight"))


@pytest.mark.parametrize(
    ("kind", "scale", "dtype"),
    [("Q4_0", 9000, np.float32), ("Q8_0", 600, np.float32), ("Q8_0", 511, np.float16), ("Q5_0", 4094, np.float16)],
)
def test_scales_that_float16_would_not_hold(kind, scale, dtype, tmp_path, rng):
    """-8, -16 or -128 times the scale must not be beyond 65504."""
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    blocks, number = blocks_of(gguf, kind, rng)
    blocks[:, :2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    write_gguf(tmp_path / "x.gguf", {kind: None}, {kind: blocks})
    t = q.open(tmp_path / "x.gguf")[f"blk.0.{kind}"]
    assert t.scales.dtype == t.biases.dtype == dtype
    np.testing.assert_array_equal(np.asarray(t), gguf.dequantize(blocks, number))


@pytest.mark.parametrize(("kind", "value"), [("Q4_0", b"\0\x7c"), ("Q4_K", b"\0\x7e"), ("MXFP4", b"\xff"),
                                             ("NVFP4", b"\x7f"), ("NVFP4", b"\x80")])  # fmt: skip
def test_scales_that_are_not_numbers(kind, value, tmp_path, rng):
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    blocks, _ = blocks_of(gguf, kind, rng)
    blocks[1, : len(value)] = list(value)
    write_gguf(tmp_path / "x.gguf", {kind: None}, {kind: blocks})
    with pytest.raises(ValueError, match=rf"blk\.0\.{kind}\.weight: .* NaN or infinite"):
        q.open(tmp_path / "x.gguf")[f"blk.0.{kind}"]


def replace_once(whole, old, new):
    assert whole.count(old) == 1
    return whole.replace(old, new)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ((64, 2), (64, 2**58), r"blk\.0\.Q4_0\.weight ends \d+ bytes behind the end"),
        ((64, 2), (2**32, 2**32), r"blk\.0\.Q4_0\.weight ends \d+ bytes behind the end"),  # product 0 modulo 2**64
        ((64, 2), (65, 2), r"blk\.0\.Q4_0\.weight has the shape \[2, 65\]; rows are of blocks of 32"),
    ],
)
def test_gguf_shapes_that_lie(old, new, text, tmp_path, rng):
    write_gguf(tmp_path / "x.gguf", {"Q4_0": rng.standard_normal((2, 64))})
    whole = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(replace_once(whole, struct.pack("<QQ", *old), struct.pack("<QQ", *new)))
    with pytest.raises(ValueError, match=text):
        q.open(tmp_path / "x.gguf")


def test_other_lies_of_gguf_headers(tmp_path, rng):
    path = tmp_path / "x.gguf"
    write_gguf(path, {"Q4_0": rng.standard_normal((2, 64))})
    whole = path.read_bytes()
    entry = whole.index(b"blk.0.Q4_0.weight") + len(b"blk.0.Q4_0.weight") + 4 + 16  # behind its name and shape
    list_length = whole.index(b"list") + 4 + 8  # behind the types of the array and of its elements
    for place, new, text in [
        (entry, struct.pack("<I", 9999), "has the type number 9999"),
        (entry + 4, struct.pack("<Q", 2**64 - 1), "behind the end of the file"),
        (entry + 4, struct.pack("<Q", 2**63 - 32), "behind the end of the file"),
        (list_length, struct.pack("<Q", 2**60), "its header goes on behind them"),
        (8, struct.pack("<Q", 2**60), "not a readable GGUF file"),
        (16, struct.pack("<Q", 2**60), "not a readable GGUF file"),
        (0, b"GGML", "magic"),
        (4, struct.pack("<I", 77), "version 77"),
        (4, struct.pack(">I", 3), "not a readable GGUF file"),
    ]:
        path.write_bytes(whole[:place] + new + whole[place + len(new) :])
        with pytest.raises(ValueError, match=text):
            q.open(path)


def test_packing(rng):
    for bits in (1, 2, 3, 4, 5, 6, 7, 8):
        codes = rng.integers(0, 2**bits, (3, 64), dtype=np.uint8)
        np.testing.assert_array_equal(_gguf.pack_codes(codes, bits), reference.pack(codes, bits))


def test_names_sort_as_people_count():
    assert sorted(["l.10", "l.9", "a2b", "a10b"], key=_checkpoint.natural) == ["a2b", "a10b", "l.9", "l.10"]


def test_what_a_qtensor_takes_can_be_saved_and_opened(rng, tmp_path):
    pytest.importorskip("safetensors", reason="needs safetensors")
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs ml_dtypes")
    w = rng.standard_normal((4, 64)).astype(np.float32)
    raw = (w.view(np.uint32) >> 16).astype(np.uint16)
    bits = q.QTensor.quantize(raw, bits=4, input_dtype="bfloat16")
    codes, scales = q.mxfp4_quantize(w)
    bytes_ = q.QTensor(codes, scales.view(ml_dtypes.float8_e8m0fnu), mode="mxfp4")
    q.save_mlx(tmp_path / "m", {"bits": bits, "bytes": bytes_, "double": np.arange(3.0)})
    opened = q.open(tmp_path / "m")
    assert opened["bits"].scales.dtype == ml_dtypes.bfloat16 and opened["bytes"].scales.dtype == np.uint8
    assert np.asarray(opened["bits"]).tobytes() == np.asarray(bits).tobytes()
    assert np.asarray(opened["bytes"]).tobytes() == q.mxfp4_dequantize(codes, scales).tobytes()
    assert opened.unquantized["double"].dtype == np.float64 and not opened.unsupported


@pytest.mark.parametrize("scales", [np.float64, np.int64, np.uint8])
def test_scales_that_no_file_holds_are_refused(scales):
    with pytest.raises(TypeError, match="scales of mode 'affine' must be of float32 or float16 or bfloat16"):
        q.QTensor(CODES, SCALES.astype(scales), SCALES.astype(scales))
    with pytest.raises(TypeError, match="biases of float32 do not go with scales of float16"):
        q.QTensor(CODES, SCALES, SCALES.astype(np.float32))


def test_global_scale_of_a_qtensor_is_a_number():
    codes, scales = q.nvfp4_quantize(np.ones((2, 16), np.float32))
    for wrong in ("3", True, np.zeros(1), [3]):
        with pytest.raises(TypeError, match="global_scale must be a number"):
            q.QTensor(codes, scales, mode="nvfp4", global_scale=wrong)
    for wrong in (-1, np.nan, np.inf, 10**400):
        with pytest.raises(ValueError, match="global_scale must be finite and not negative"):
            q.QTensor(codes, scales, mode="nvfp4", global_scale=wrong)
