"""`quantization.report` and `python -m quantization report | info`."""

import importlib
import itertools
import math
import os
import subprocess
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest

import quantization
from quantization import _formats, _report

main = importlib.import_module("quantization.__main__").main

EPSILON = 2.0**-53
RNG = np.random.default_rng(7)


def normal(*shape, dtype=np.float32):
    return RNG.standard_normal(shape).astype(dtype)


def ramp():
    """One group of 64 that 4 bits hold exactly: 0 ... 15, so scale -1, bias 15 and the codes 15 ... 0."""
    return np.tile(np.arange(16, dtype=np.float32), 4)[None, :]


def only(arrays, formats=None, **options):
    (row,) = quantization.report(arrays, formats, **options).rows
    return row


def reason(array, formats=None, **options):
    result = quantization.report({"w": array}, formats, **options)
    assert result.rows == ()
    (skipped,) = result.skipped
    assert skipped.name == "w"
    return skipped.reason


# ---------------------------------------------------------------------------------------------------------- numbers


def test_exact_tensor_loses_nothing():
    row = only({"w": ramp()})
    assert (row.max_error, row.relative_error, row.snr_db) == (0, 0, math.inf)


def test_one_known_error():
    w = ramp()
    w[0, 7] = 7.25  # decodes to 7; every other element is exact, so the noise is 1/16 and nothing is rounded
    row = only({"w": w})
    assert (row.max_error, row.relative_error) == (0.25, 0.25 / 15)
    signal = sum(float(v) ** 2 for v in w[0])
    # Quotient, logarithm and product round once each.
    assert row.snr_db == pytest.approx(10 * math.log10(signal * 16), rel=4 * EPSILON)


@pytest.mark.parametrize(("scale_dtype", "bits"), [("float16", 4.5), ("float32", 5.0), (None, 5.0)])
def test_bits_per_weight_count_scales_and_biases(scale_dtype, bits):
    row = only({"w": normal(3, 128)}, scale_dtype=scale_dtype)
    assert row.bits_per_weight == bits
    assert row.nbytes == 3 * 128 * bits / 8


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("bits", "group"), [(1, 128), (2, 32), (3, 64), (4, 128), (5, 32), (6, 64), (8, 128)])
def test_errors_equal_a_whole_array_computation(dtype, bits, group):
    w = normal(33, 256, dtype=dtype)
    row = only({"w": w}, [("affine", bits, group)])
    encoded = quantization.affine_quantize(w, group, bits)
    decoded = quantization.affine_dequantize(*encoded, group, bits, dtype="float32")
    exact = w.astype(np.float64)
    error = decoded.astype(np.float64) - exact
    assert row.max_error == np.abs(error).max()
    assert row.relative_error == np.abs(error).max() / np.abs(exact).max()
    assert row.nbytes == sum(part.nbytes for part in encoded)
    # Both sides add n squares in float64, in whatever order: each sum is off by less than n * epsilon, their quotient
    # by less than 4 n * epsilon, and the logarithm turns a relative error into an absolute one.
    expected = 10 * math.log10((exact**2).sum() / (error**2).sum())
    assert row.snr_db == pytest.approx(expected, rel=4 * EPSILON, abs=10 / math.log(10) * 4 * w.size * EPSILON)


def test_profile_reaches_the_encoder():
    w = np.tile(np.linspace(-1.97, -1, 64, dtype=np.float32), (4, 1))
    # All negative: the "metal" rule spreads the codes up to 0, about twice the range.
    assert only([w], profile="cpu").snr_db > only([w], profile="metal").snr_db + 3


def test_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    w = normal(4, 64).astype(ml_dtypes.bfloat16)
    row = only({"w": w})
    assert row.dtype == "bfloat16"
    assert row.bits_per_weight == 4.5


def test_rows_are_worst_first_and_totals_add_up():
    arrays = {"good": ramp(), "bad": normal(8, 64), "middle": ramp() + normal(1, 64) / 100}
    result = quantization.report(arrays, ["affine_4", "affine_2"], scale_dtype="float16")
    assert [row.snr_db for row in result.rows] == sorted(row.snr_db for row in result.rows)
    assert {(row.name, row.format) for row in result.rows} == set(
        itertools.product(arrays, ["affine 4 g64", "affine 2 g64"])
    )
    total = result.totals()["affine 4 g64"]
    rows = [row for row in result.rows if row.format == "affine 4 g64"]
    assert total.shape == (10 * 64,)
    assert total.nbytes == sum(row.nbytes for row in rows) == 10 * 64 * 4.5 / 8
    assert total.max_error == max(row.max_error for row in rows)


def test_blocks_change_nothing(monkeypatch):
    w = normal(5, 7, 128)
    whole = only([w])
    monkeypatch.setattr(_report, "_BLOCK", 3 * 128)
    blocks = only([w])
    assert (blocks.nbytes, blocks.max_error) == (whole.nbytes, whole.max_error)
    assert blocks.snr_db == pytest.approx(whole.snr_db, abs=10 / math.log(10) * 4 * w.size * EPSILON)


def test_memory_is_bounded_by_the_block_not_by_the_array(monkeypatch):
    monkeypatch.setattr(_report, "_BLOCK", 1 << 14)
    w = np.zeros((1 << 14, 64), np.float32)
    tracemalloc.start()
    quantization.report([w])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A block's float64 copies and codes are some 50 bytes an element, 0.8 MB here; the array has 4 MB.
    assert peak < w.nbytes


@pytest.mark.parametrize(
    "view",
    [
        lambda w: np.asfortranarray(w),
        lambda w: w[::-1].copy()[::-1],
        lambda w: np.repeat(w, 2, axis=1)[:, ::2],
        lambda w: w.astype(">f4"),
        lambda w: w.reshape(4, 4, 64).transpose(1, 0, 2).copy().transpose(1, 0, 2),
    ],
    ids=["fortran", "negative stride", "stepped", "big endian", "3-D transposed"],
)
def test_layout_does_not_matter(view):
    w = normal(16, 64)
    assert view(w).tobytes("C") == w.astype(view(w).dtype).tobytes()
    expected, row = only([w]), only([view(w)])
    assert (row.snr_db, row.max_error, row.nbytes) == (expected.snr_db, expected.max_error, expected.nbytes)


def test_read_only_arrays():
    w = normal(2, 64)
    w.flags.writeable = False
    assert only([w]).name == "0"


# ----------------------------------------------------------------------------------------------- names and formats


def test_names_of_members():
    w = normal(2, 64)
    assert only(w).name == "array"
    assert {row.name for row in quantization.report([w, w]).rows} == {"0", "1"}
    assert only({"layer": w.tolist()}).dtype == "float64"


@pytest.mark.parametrize(
    "spec",
    ["affine_4_g64", "affine 4 g64", "affine-4-g64", "affine4", "affine_4", "affine", "affine_g64", ("affine", 4, 64)],
)
def test_spellings_of_one_format(spec):
    assert only([normal(2, 64)], [spec]).format == "affine 4 g64"


def test_every_format_of_the_table_is_found_under_its_printed_name():
    formats = _formats.known_formats()
    assert len(formats) == sum(len(row["group_sizes"]) for row in quantization._C.formats())
    for each in formats:
        assert _formats.as_format(str(each)) == each
        assert only([normal(2, 128)], str(each)).format == str(each)


@pytest.mark.parametrize("spec", ["affine_9", "affine_4_g65", "q4_k", "", ("affine", 9, 64)])
def test_unknown_format(spec):
    with pytest.raises(
        ValueError, match=r"formats: unknown format .*; there are affine \(bits 1, 2, 3, 4, 5, 6, 7, 8;"
    ):
        quantization.report([normal(2, 64)], [spec])


def test_formats_of_the_wrong_kind():
    with pytest.raises(TypeError, match=r"formats: each is a name .* got 4"):
        quantization.report([normal(2, 64)], [4])
    with pytest.raises(ValueError, match="formats: got none"):
        quantization.report([normal(2, 64)], [])


# ------------------------------------------------------------------------------------------------------------ skips


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.zeros((2, 64), np.int32), "int32: only float16, bfloat16, float32 and float64 are quantized"),
        (np.zeros((2, 64), np.complex64), "complex64: only float16, bfloat16, float32 and float64 are quantized"),
        (np.zeros((2, 64), bool), "bool: only float16, bfloat16, float32 and float64 are quantized"),
        (np.zeros((2, 64), object), "object: only float16, bfloat16, float32 and float64 are quantized"),
        (np.zeros((2, 64), np.uint16), "uint16: not a float (raw bfloat16 bits: view them as ml_dtypes.bfloat16)"),
        (np.float32(3), "0-D: a single number"),
        (np.zeros(64, np.float32), "1-D: biases and norms stay as they are"),
        (np.zeros((0, 64), np.float32), "empty"),
        (np.zeros((2, 0), np.float32), "empty"),
        (np.full((1, 64), np.nan, np.float32), "64 values are NaN, infinite or beyond float32"),
        (np.eye(64) * 1e300, "64 values are NaN, infinite or beyond float32"),
    ],
)
def test_reasons(array, expected):
    assert reason(array) == expected


def test_single_infinite_value():
    w = normal(2, 64, dtype=np.float16)
    w[1, 3] = np.inf
    assert reason(w) == "1 value is NaN, infinite or beyond float32"


def test_group_that_does_not_fit_names_what_would():
    text = reason(normal(2, 96))
    assert text.startswith("last axis 96 is not a multiple of group size 64 (")
    assert "group size 32" in text
    text = reason(normal(2, 4304))
    fits = [f for f in _formats.known_formats() if 4304 % f.group_size == 0]
    assert ("no format here fits" in text) == (not fits)


def test_skip_per_format_keeps_the_other_formats():
    result = quantization.report({"w": normal(2, 96)}, ["affine_4_g64", "affine_4_g32"])
    assert [row.format for row in result.rows] == ["affine 4 g32"]
    assert [(entry.name, entry.format) for entry in result.skipped] == [("w", "affine 4 g64")]


def test_scales_that_overflow_are_a_reason_not_a_nan():
    assert reason(normal(2, 64) * 1e7, scale_dtype="float16").startswith("scales do not fit in float16 (values up to ")


def test_foreign_object_that_is_no_array():
    class Foreign:
        shape, dtype = (2, 64), "torch.bfloat16"

        def __array__(self, dtype=None, copy=None):
            raise TypeError("Got unsupported ScalarType BFloat16\nmore lines")

    assert reason(Foreign()) == "cannot be read as a NumPy array: Got unsupported ScalarType BFloat16"


# ------------------------------------------------------------------------------------------------------------- text


def test_text_shows_every_row_and_every_skip():
    arrays = {f"layer.{i}.weight": normal(2, 64) for i in range(3)}
    arrays |= {f"layer.{i}.bias": np.zeros(64, np.float32) for i in range(3)}
    arrays |= {f"layer.{i}.odd": np.zeros((2, 63), np.float32) for i in (0, 2)}
    text = str(quantization.report(arrays))
    lines = text.splitlines()
    header = [cell.strip() for cell in lines[0].split("|")]
    assert header == ["tensor", "format", "shape", "dtype", "bits/w", "SNR dB", "max error", "relative"]
    assert sum(line.startswith("layer.") and " affine 4 g64 " in line for line in lines) == 3
    assert "skipped (3), 1-D: biases and norms stay as they are\n    layer.[0-2].bias" in text
    assert "skipped (2), affine 4 g64: last axis 63" in text
    assert "    layer.0.odd, layer.2.odd" in text
    assert "affine 4 g64: 3 tensors, 384 weights" in text


def test_repr_of_a_long_report_is_cut_and_says_so():
    result = quantization.report([normal(1, 64) for _ in range(70)])
    assert "... and 10 more rows with a higher SNR" in repr(result)
    assert len(str(result).splitlines()) == 70 + 3
    assert repr(quantization.report({})) == "nothing to report: no tensors"


def test_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    path = tmp_path / "report.png"
    quantization.report({"exact": ramp(), "w": normal(4, 64), "v": normal(4, 32)}, ["affine_4", "affine_2"]).plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to plot"):
        quantization.report({"b": np.zeros(3)}).plot(path)


@pytest.mark.parametrize(("module", "extra"), [("matplotlib.figure", "plot"), ("safetensors", "io")])
def test_missing_library_names_its_extra(monkeypatch, tmp_path, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / "model.safetensors"
    path.touch()
    use = _report.report_file if extra == "io" else quantization.report([normal(2, 64)]).plot
    with pytest.raises(ImportError, match=rf"pip install 'quantization\[{extra}\]'"):
        use(path)


# ------------------------------------------------------------------------------------------------------------ files


def test_npz(tmp_path):
    w = normal(4, 64)
    np.savez(tmp_path / "model.npz", w=w, bias=np.zeros(4), names=np.array(["a", None], object))
    result = _report.report_file(tmp_path / "model.npz")
    (row,) = result.rows
    assert (row.name, row.snr_db) == ("w", only([w]).snr_db)
    assert {entry.name: entry.reason for entry in result.skipped} == {
        "bias": "1-D: biases and norms stay as they are",
        "names": "object: pickled objects are never loaded",
    }


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.zeros((0, 64), np.float32), "empty"),
        (np.array(1.0), "0-D: a single number"),
        (np.array([[{}]], object), "object: pickled objects are never loaded"),
    ],
)
def test_npy_that_is_skipped(tmp_path, array, expected):
    np.save(tmp_path / "w.npy", array, allow_pickle=True)
    (entry,) = _report.report_file(tmp_path / "w.npy").skipped
    assert (entry.name, entry.reason) == ("w", expected)


def test_npy(tmp_path):
    w = normal(4, 64)
    np.save(tmp_path / "w.npy", w)
    (row,) = _report.report_file(str(tmp_path / "w.npy"), "affine_8").rows
    assert (row.name, row.snr_db) == ("w", only([w], "affine_8").snr_db)


def test_safetensors_of_every_kind(tmp_path):
    save_file = pytest.importorskip("safetensors.numpy", reason="needs safetensors").save_file
    ml_dtypes = pytest.importorskip("ml_dtypes")
    w = normal(4, 64)
    tensors = {
        "f16": w.astype(np.float16),
        "bf16": w.astype(ml_dtypes.bfloat16),
        "f32": w,
        "f64": w.astype(np.float64),
        "e4m3": w.astype(ml_dtypes.float8_e4m3fn),
        "ids": np.arange(6).reshape(2, 3),
        "flags": np.ones((2, 64), bool),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    seen = []
    result = _report.report_file(tmp_path / "model.safetensors", progress=lambda names: seen.extend(names) or names)
    assert {row.name: row.snr_db for row in result.rows} == {
        name: only([tensors[name]]).snr_db for name in ("f16", "bf16", "f32", "f64")
    }
    skipped = {entry.name: entry for entry in result.skipped}
    assert skipped["e4m3"].reason == "F8_E4M3: not a type that is quantized"
    assert skipped["e4m3"].shape == (4, 64)
    assert skipped.keys() == {"e4m3", "ids", "flags"}
    assert sorted(seen) == sorted(tensors)


def test_safetensors_bfloat16_in_a_fresh_process(tmp_path):
    """Nobody has imported ml_dtypes there, without which safetensors cannot make the array."""
    save_file = pytest.importorskip("safetensors.numpy", reason="needs safetensors").save_file
    ml_dtypes = pytest.importorskip("ml_dtypes")
    save_file({"w": normal(4, 64).astype(ml_dtypes.bfloat16)}, tmp_path / "model.safetensors")
    done = command("report", str(tmp_path / "model.safetensors"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "w      | affine 4 g64 | 4x64  | bfloat16 |   4.50 |" in done.stdout


# ----------------------------------------------------------------------------------------------------- command line


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "quantization", *arguments], capture_output=True, text=True, timeout=120, **options
    )


def test_command_report(tmp_path, capsys):
    np.savez(tmp_path / "model.npz", w=normal(4, 128), bias=np.zeros(4))
    path = str(tmp_path / "model.npz")
    assert main(["report", path, "--bits", "4,8", "--group-size", "32,128", "--scale-dtype", "float16"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for name in ("affine 4 g32", "affine 4 g128", "affine 8 g32", "affine 8 g128"):
        assert f"{name}: 1 tensor, 512 weights" in captured.out
    assert "skipped (1), 1-D" in captured.out
    assert main(["report", path, "--format", "affine_3"]) == 0
    assert "affine 3 g64: 1 tensor" in capsys.readouterr().out


def corrupt_npz_member(path):
    np.savez(path, w=normal(64, 64))
    data = bytearray(path.read_bytes())
    data[5000] ^= 255  # inside the only member, which the archive's checksum covers
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "make", "expected"),
    [
        ("gone.npz", lambda path: None, "No such file or directory"),
        ("folder.npz", lambda path: path.mkdir(), "Is a directory"),
        ("model.bin", lambda path: path.touch(), "unknown suffix '.bin'; .npz, .npy and .safetensors can be read"),
        ("empty.npy", lambda path: path.touch(), "not a readable .npy file"),
        ("text.npy", lambda path: path.write_text("hello " * 9), "not a readable .npy file"),
        ("short.npy", lambda path: path.write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr'"), "not a readable .npy file"),
        ("text.npz", lambda path: path.write_text("hello " * 9), "not a readable .npz file"),
        ("empty.npz", lambda path: path.touch(), "not a readable .npz file"),
        ("cut.npz", lambda path: path.write_bytes(b"PK\x03\x04" + bytes(40)), "not a readable .npz file"),
        ("flip.npz", corrupt_npz_member, "not a readable .npz file: w: "),
        ("empty.safetensors", lambda path: path.touch(), "not a readable .safetensors file"),
        ("huge.safetensors", lambda path: path.write_bytes(b"\xff" * 16), "not a readable .safetensors file"),
    ],
)
def test_bad_file_is_one_line_and_status_2(tmp_path, capsys, name, make, expected):
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors", reason="needs safetensors")
    path = tmp_path / name
    make(path)
    status = main(["report", str(path)])
    captured = capsys.readouterr()
    assert (status, captured.out) == (2, "")
    assert captured.err.startswith("quantization: error: ")
    assert captured.err.count("\n") == 1
    assert expected in captured.err
    assert name in captured.err


def test_archive_member_that_is_no_array(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.npz", "w") as archive:
        archive.writestr("notes.txt", b"not an array")
    (entry,) = _report.report_file(tmp_path / "model.npz").skipped
    assert (entry.name, entry.reason) == ("notes.txt", "not an array")


def test_truncated_npy(tmp_path, capsys):
    path = tmp_path / "cut.npy"
    np.save(path, normal(64, 64))
    os.truncate(path, 1000)
    assert main(["report", str(path)]) == 2
    assert "cut.npy: not a readable .npy file: " in capsys.readouterr().err


def test_swapped_suffixes(tmp_path, capsys):
    np.save(tmp_path / "w.npy", normal(2, 64))
    np.savez(tmp_path / "w.npz", w=normal(2, 64))
    (tmp_path / "a.npz").write_bytes((tmp_path / "w.npy").read_bytes())
    (tmp_path / "b.npy").write_bytes((tmp_path / "w.npz").read_bytes())
    assert main(["report", str(tmp_path / "a.npz")]) == main(["report", str(tmp_path / "b.npy")]) == 2
    error = capsys.readouterr().err
    assert "is it a .npy file?" in error
    assert "is it a .npz file?" in error


def test_bad_arguments(tmp_path, capsys):
    np.save(tmp_path / "w.npy", normal(2, 64))
    assert main(["report", str(tmp_path / "w.npy"), "--bits", "9"]) == 2
    assert "unknown format affine 9-bit g64; there are affine (bits 1," in capsys.readouterr().err
    for arguments in ([], ["nothing"], ["report"], ["report", "w.npy", "--bits", "x"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2


def test_command_info(capsys):
    assert main(["info"]) == 0
    assert capsys.readouterr().out == f"{quantization.show_config()}\n"


def test_ctrl_c_ends_quietly(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(_report, "report_file", interrupt)
    assert main(["report", "w.npy"]) == 130
    assert capsys.readouterr() == ("", "")


def test_reader_that_goes_away(tmp_path):
    np.savez(tmp_path / "model.npz", **{f"tensor{i}": normal(2, 64) for i in range(2000)})  # more than a pipe holds
    with subprocess.Popen(
        [sys.executable, "-m", "quantization", "report", str(tmp_path / "model.npz")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141
