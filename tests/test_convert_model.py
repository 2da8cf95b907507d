"""`python -m quantization convert`: what it writes, what it refuses, and that a kill at any moment does no harm."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest

import quantization as q
from conftest import SMALL
from quantization import _convert
from quantization._formats import as_format, known_formats

pytest.importorskip("safetensors", reason="needs safetensors")
main = importlib.import_module("quantization.__main__").main
SHARDS = 2


def save(path, arrays):
    importlib.import_module("safetensors.numpy").save_file(arrays, path)


@pytest.fixture
def source(tmp_path):
    """A float model of two shards with whatever a folder has besides."""
    rng = np.random.default_rng(5)
    folder = tmp_path / "float"
    folder.mkdir()
    for i in range(SHARDS):
        arrays = {
            f"layers.{i}.up.weight": rng.standard_normal((96, 128)).astype(np.float16),
            f"layers.{i}.down.weight": rng.standard_normal((64, 256), np.float32),
            f"layers.{i}.norm.weight": np.ones(64, np.float32),
            f"layers.{i}.odd.weight": np.ones((3, 100), np.float16),
            f"layers.{i}.conv.weight": np.ones((2, 2, 64), np.float16),
            f"layers.{i}.up.bias": np.ones(96, np.float16),
            f"layers.{i}.table": np.ones((2, 64), np.float16),
            f"layers.{i}.ids": np.arange(4),
        }
        save(folder / f"model-{i + 1:05}-of-{SHARDS:05}.safetensors", arrays)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 128}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"other weights")
    return folder


def floats(folder):
    load_file = importlib.import_module("safetensors.numpy").load_file
    return {name: array for file in sorted(folder.glob("*.safetensors")) for name, array in load_file(file).items()}


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("target", [f for f in known_formats() if f.bits in (3, 4, 8)], ids=str)
def test_every_matrix_is_quantized_as_by_hand(target, source, tmp_path):
    done = _convert.convert(source, tmp_path / "new", target)
    opened, given = q.open(tmp_path / "new"), floats(source)
    fitting = [name for name in given if name.endswith(("up.weight", "down.weight"))]
    assert {f"{name}.weight" for name in opened} == set(fitting)
    for name in fitting:
        expected = q.QTensor.quantize(given[name], target.mode, bits=target.bits, group_size=target.group_size)
        for part, array in opened[name.removesuffix(".weight")].parts.items():
            assert (array.dtype, array.tobytes()) == (expected.parts[part].dtype, expected.parts[part].tobytes())
    for name in given.keys() - set(fitting):
        np.testing.assert_array_equal(opened.unquantized[name], given[name])
    assert len(opened.unquantized) == len(given) - len(fitting)
    assert {entry.name for entry in done.skipped} == given.keys() - set(fitting)
    names = {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    names |= {f"model-{i + 1:05}-of-{SHARDS:05}.safetensors" for i in range(SHARDS)}
    assert {file.name for file in (tmp_path / "new").iterdir()} == names
    assert opened.metadata["hidden_size"] == 128
    assert (
        done.nbytes == json.loads((tmp_path / "new/model.safetensors.index.json").read_text())["metadata"]["total_size"]
    )


def test_mlx_multiplies_what_was_converted(source, tmp_path):
    mx = pytest.importorskip("mlx.core", reason="needs mlx")
    _convert.convert(source, tmp_path / "new", as_format("affine_4_g64"))
    arrays, opened = mx.load(str(tmp_path / "new/model-00001-of-00002.safetensors")), q.open(tmp_path / "new")
    parts = [arrays[f"layers.0.down.{part}"] for part in ("weight", "scales", "biases")]
    x = np.random.default_rng(1).standard_normal((3, 256), np.float32)
    product = np.array(mx.quantized_matmul(mx.array(x), *parts, group_size=64, bits=4))
    weights = np.abs(np.array(mx.dequantize(*parts, group_size=64, bits=4)))
    # Sums of K = 256 terms in float32, MLX's and ours: K * 2**-24 of sum |x w| each; block fixed point of 22 bits
    # besides moves each x by at most 2**-22 of the largest.
    bound = np.abs(x) @ weights.T * 256 * 2.0**-23 + weights.sum(1) * np.abs(x).max() * 2.0**-22
    assert (np.abs(product - x @ opened["layers.0.down"].T) <= bound).all()


@pytest.mark.parametrize("target", [f for f in known_formats() if f.bits != 7], ids=str)
def test_profile_cpu_writes_what_mlx_quantizes(target, source, tmp_path):
    mx = pytest.importorskip("mlx.core", reason="needs mlx")
    _convert.convert(source, tmp_path / "new", target, profile="cpu")
    opened, given = q.open(tmp_path / "new"), floats(source)
    for name in ("layers.0.up", "layers.1.down"):
        w = mx.array(given[f"{name}.weight"])
        expected = mx.quantize(w, target.group_size, target.bits, mode=target.mode)
        for part, array in zip(opened[name].parts.values(), expected, strict=True):
            np.testing.assert_array_equal(part, np.array(array))


def test_command_with_overrides(source, tmp_path, capsys):
    overrides = ["--override", "*.down=affine_6_g32", "--override", "layers.1.down=false", "--override", "*.0.up=mxfp8"]
    assert main(["convert", str(source), str(tmp_path / "a"), "--bits", "3", "--group-size", "32", *overrides]) == 0
    printed = capsys.readouterr().out
    for text in ("affine 3 g32: 1 matrices", "mxfp8: 1 matrices", "affine 6 g32: 1 matrices", "bits/weight"):
        assert text in printed
    for text in ("(1), left as it is by an override", "1-D: only matrices", "is not a multiple of group size 32"):
        assert text in printed
    opened = q.open(tmp_path / "a")
    formats = {name: str(opened[name].format) for name in opened}
    assert formats == {"layers.0.up": "mxfp8", "layers.1.up": "affine 3 g32", "layers.0.down": "affine 6 g32"}
    entry = opened.metadata["quantization"]
    assert (entry["bits"], entry["group_size"], entry["mode"], entry["layers.1.down"]) == (3, 32, "affine", False)
    assert entry["layers.0.down"] == {"group_size": 32, "bits": 6, "mode": "affine"}
    flags = ["--q-bits", "3", "--q-group-size", "32", "--q-mode", "affine"]
    assert main(["convert", str(source), str(tmp_path / "b"), *flags, *overrides]) == 0
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_dtype_rounds_everything_first(source, tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs ml_dtypes")
    assert main(["convert", str(source), str(tmp_path / "new"), "--dtype", "bfloat16"]) == 0
    opened, given = q.open(tmp_path / "new"), floats(source)
    expected = q.QTensor.quantize(given["layers.0.down.weight"].astype(ml_dtypes.bfloat16))
    for part, array in opened["layers.0.down"].parts.items():
        assert array.tobytes() == expected.parts[part].tobytes()
    assert opened.unquantized["layers.0.norm.weight"].dtype == ml_dtypes.bfloat16
    assert opened.unquantized["layers.0.ids"].dtype == np.int64


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Matrices of 16 MB of float32 in blocks of 4 MB: block, codes and parts are some 10 MB."""
    (tmp_path / "float").mkdir()
    w = np.random.default_rng(3).standard_normal((4096, 1024), np.float32)
    save(tmp_path / "float/model.safetensors", {"up.weight": w, "kept.weight": w})
    (tmp_path / "float/config.json").write_text('{"model_type": "x"}')
    tracemalloc.start()
    try:
        arguments = tmp_path / "float", tmp_path / "new", as_format("affine_8_g64")
        _convert.convert(*arguments, overrides={"kept": None}, dtype="float16")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 14 << 20
    opened, w = q.open(tmp_path / "new"), w.astype(np.float16)
    for part, array in zip(opened["up"].parts.values(), q.affine_quantize(w, 64, 8), strict=True):
        np.testing.assert_array_equal(part, array)
    np.testing.assert_array_equal(opened.unquantized["kept.weight"], w)


# ------------------------------------------------------------------------------------------------- kill and resume


def run_and_kill(source, target, moment):
    """Convert in a child that kills itself at the file operation or tensor number `moment`; whether it came so far."""
    child = os.fork()
    if child == 0:
        try:
            remaining = moment

            def count(event, _):
                nonlocal remaining
                if event in ("open", "os.rename", "os.remove", "os.mkdir", "tensor"):
                    if remaining == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    remaining -= 1

            sys.addaudithook(count)
            counted = {"progress": lambda steps: (count("tensor", step) or step for step in steps)}
            with q.threads(1):  # emulators start no threads after a fork
                _convert.convert(source, target, as_format("affine_4_g32"), **counted)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


def test_killed_at_any_file_operation(source, tmp_path):
    """After each kill there is no folder or a complete one, and the next run ends as an undisturbed one does."""
    _convert.convert(source, tmp_path / "expected", as_format("affine_4_g32"))
    expected, target, partial = content(tmp_path / "expected"), tmp_path / "new", tmp_path / "new.partial"
    whole = 0
    for moment in range(0, 1000, 7 if SMALL else 2):
        if not run_and_kill(source, target, moment):
            break
        if target.exists():
            # Killed between the renaming and the removal of the mark: all files are there.
            assert content(target).items() >= expected.items()
            whole += 1
        else:
            complete = {file.name: file for file in partial.glob("*.safetensors")} if partial.exists() else {}
            assert all(file.read_bytes() == expected[name] for name, file in complete.items())
            times = {name: file.stat().st_mtime_ns for name, file in complete.items()}
            _convert.convert(source, target, as_format("affine_4_g32"))
            assert content(target) == expected
            assert times.items() <= {name: (target / name).stat().st_mtime_ns for name in times}.items()  # not redone
        assert not partial.exists()
        for file in target.iterdir():
            file.unlink()
        target.rmdir()
    assert moment > 20 and whole <= 2
    assert content(target) == expected


def test_killed_from_outside(source, tmp_path):
    """A process of its own and a signal that comes whenever it comes."""
    arguments = [sys.executable, "-m", "quantization", "convert", str(source), str(tmp_path / "new")]
    child = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while child.poll() is None and not (tmp_path / "new.partial").exists():
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode in (0, -signal.SIGKILL)
    assert (tmp_path / "new").exists() or main(arguments[3:]) == 0
    assert len(q.open(tmp_path / "new")) == 4


def test_old_folder_stays(source, tmp_path, capsys):
    (tmp_path / "new").mkdir()
    (tmp_path / "new/precious").write_text("x")
    assert main(["convert", str(source), str(tmp_path / "new")]) == 2
    assert "nothing is ever written over" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "new"]
    (tmp_path / "link").symlink_to("nowhere")
    assert main(["convert", str(source), str(tmp_path / "link")]) == 2
    assert "link exists already" in capsys.readouterr().err
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial/precious").write_text("x")
    assert main(["convert", str(source), str(tmp_path / "other")]) == 2
    assert "is left from other work; remove it" in capsys.readouterr().err
    assert (tmp_path / "other.partial/precious").read_text() == "x"


def test_what_was_begun_otherwise_is_not_taken_up(source, tmp_path):
    assert run_and_kill(source, tmp_path / "new", 12)
    assert (tmp_path / "new.partial").exists()
    with pytest.raises(FileExistsError, match="left from other work"):
        _convert.convert(source, tmp_path / "new", as_format("affine_8_g32"))
    (source / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(FileExistsError, match="left from other work"):
        _convert.convert(source, tmp_path / "new", as_format("affine_4_g32"))


def test_one_writer_at_a_time(source, tmp_path):
    def second(steps):
        with pytest.raises(BlockingIOError, match="another process is writing"):
            _convert.convert(source, tmp_path / "new", as_format("affine_4_g32"))
        return steps

    _convert.convert(source, tmp_path / "new", as_format("affine_4_g32"), progress=second)
    assert len(q.open(tmp_path / "new")) == 4


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(bad, source, tmp_path, capsys):
    given = floats(source)
    given["layers.1.up.weight"][95, 127] = bad
    for file in source.glob("*.safetensors"):
        file.unlink()
    save(source / "model.safetensors", given)
    assert main(["convert", str(source), str(tmp_path / "new")]) == 2
    assert "layers.1.up.weight has values that are NaN or infinite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["float"]
    assert main(["convert", str(source), str(tmp_path / "new"), "--override", "layers.1.up=false"]) == 0


def cut(folder):
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def quantized_already(folder):
    (folder / "config.json").write_text('{"quantization": {}}')


def has_scales(folder):
    save(folder / "model-x.safetensors", {"x.scales": np.ones(2)})


BAD_SOURCES = [
    (cut, [], "model-00002-of-00002.safetensors: not a readable .safetensors file"),
    (quantized_already, [], "is quantized already, says its config.json"),
    (has_scales, [], "is quantized already: it has x.scales"),
    (lambda folder: (folder / "config.json").unlink(), [], "has no config.json"),
    (lambda folder: (folder / "config.json").write_text("[]"), [], "config.json: expected a JSON object"),
    (lambda folder: None, ["--override", "nobody=false"], "no layer has a name like nobody"),
    (lambda folder: None, ["--override", "*.up=affine_9"], "unknown format 'affine_9'"),
    (lambda folder: None, ["--override", "false"], "expected PATTERN=FORMAT or PATTERN=false"),
    (lambda folder: None, ["--bits", "9"], "unknown format affine 9-bit;"),
    (lambda folder: None, ["--bits", "7"], "MLX has no format affine 7 g64"),
    (lambda folder: None, ["--mode", "mxfp4", "--group-size", "16"], "unknown format mxfp4 g16;"),
]


@pytest.mark.parametrize(("change", "options", "text"), BAD_SOURCES)
def test_refused_before_anything_is_written(change, options, text, source, tmp_path, capsys):
    change(source)
    assert main(["convert", str(source), str(tmp_path / "new"), *options]) == 2
    assert text in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


def test_source_that_is_no_folder(tmp_path, capsys):
    assert main(["convert", str(tmp_path / "gone"), str(tmp_path / "new")]) == 2
    assert "is no folder" in capsys.readouterr().err
