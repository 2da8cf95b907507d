"""`python -m quantization bench`: the probes' arithmetic, what is sampled, printed and written. No time is asserted."""

import dataclasses
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import types

import numpy as np
import pytest

import attention_bound
import quantization as q
import reference_kv
from conftest import ISAS
from quantization import _C
from quantization._bench import (
    attention,
    ceilings,
    clock,
    elementwise,
    figures,
    formats,
    gates,
    gather,
    machine,
    matmuls,
    ours,
    peers,
    plot,
    run,
    sampling,
    scratch,
    shapes,
    stored,
    summary,
)
from quantization._bench import rows as table_rows
from quantization._bench.shapes import Shape
from quantization._bench.weights import _ERROR_ROWS, Weights, as_dtype, as_float64, codes_of

__main__ = importlib.import_module("quantization.__main__")
main = __main__.main

HASTE = sampling.Effort(samples=3, seconds=1e-5, longest_call=60.0)
SMALL_SHAPE = Shape(128, 64)


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    """Caches so small that copies of weights which they do not hold are few."""
    monkeypatch.setattr(machine, "caches", lambda: {"L2": 1 << 14, "L3": 1 << 15})
    monkeypatch.setattr(elementwise, "large", lambda: 1 << 13)
    matmuls.cached_weights.cache_clear()
    gather._weights.cache_clear()


# ----------------------------------------------------------------------------------------------------------- probes


@pytest.fixture(params=ISAS)
def plan(request):
    return _C.Plan("quantize", isa=request.param, threads=2)


@pytest.mark.parametrize("blocks", [1, 3, 1025])
def test_probes_count_bytes(plan, blocks):
    """1025 blocks are one more than a piece of work."""
    size = blocks * ceilings.BLOCK
    source, target = ceilings.aligned(size), ceilings.aligned(size)
    assert _C.probe(plan, "read", source, None, 3) == 3 * size
    for what in ("copy", "stream"):
        source[:] = np.random.default_rng(blocks).integers(0, 256, size, dtype=np.uint8)
        target.fill(0)
        assert _C.probe(plan, what, source, target, 2) == 2 * 2 * size
        assert np.array_equal(source, target)


def test_probes_count_operations(plan):
    """Work is proportional to the repeats, and a dot has as many lanes as a multiply-add: 4 products each, or 1."""
    fma, dot = (_C.probe(plan, what, None, None, 1) for what in ("fma", "dot"))
    for what, one in (("fma", fma), ("dot", dot)):
        assert one > 0 and one % 2 == 0
        assert _C.probe(plan, what, None, None, 5) == 5 * one
    assert dot / fma == (1 if plan.isa == "generic" else 4)


def test_every_isa_of_this_build_names_its_dot():
    for entry in _C.isas():
        assert entry["dot"] if entry["available"] else entry["dot"] is None or isinstance(entry["dot"], str)


BUFFER = np.zeros(2048, np.uint8)
BASE = -BUFFER.ctypes.data % 64
SOURCE, TARGET = BUFFER[BASE : BASE + 512], BUFFER[BASE + 512 : BASE + 1024]


@pytest.mark.parametrize(
    ("what", "source", "target", "repeats", "error", "words"),
    [
        ("sing", SOURCE, None, 1, ValueError, "what must be 'read' or 'copy'"),
        (3, SOURCE, None, 1, TypeError, "what must be a string"),
        ("read", None, None, 1, TypeError, "source must offer the buffer protocol, got NoneType"),
        ("read", [1], None, 1, TypeError, "source must offer the buffer protocol, got list"),
        ("read", SOURCE[:100], None, 1, ValueError, "source must hold a multiple of 256 bytes, got 100"),
        ("read", SOURCE[:0], None, 1, ValueError, "source must hold a multiple of 256 bytes, got 0"),
        ("read", SOURCE, TARGET, 1, ValueError, "target must be None"),
        ("fma", SOURCE, None, 1, ValueError, "source must be None"),
        ("copy", SOURCE, None, 1, TypeError, "target must offer the buffer protocol"),
        ("copy", SOURCE, TARGET[:256], 1, ValueError, "target must be as long as source, 512 bytes, got 256"),
        ("stream", SOURCE, BUFFER[BASE + 513 : BASE + 1025], 1, ValueError, "multiple of 64"),
        ("stream", SOURCE, BUFFER[BASE + 256 : BASE + 768], 1, ValueError, "shares memory"),
        ("copy", SOURCE, SOURCE, 1, ValueError, "shares memory"),
        ("copy", SOURCE, bytes(512), 1, BufferError, "."),
        ("read", BUFFER[::2][:256], None, 1, (BufferError, ValueError), "."),
        ("read", SOURCE, None, 0, ValueError, "repeats must be a positive integer, got 0"),
        ("read", SOURCE, None, -1, ValueError, "repeats must be a positive integer"),
        ("read", SOURCE, None, None, TypeError, "repeats must be a positive integer"),
        ("read", SOURCE, None, 1.5, TypeError, "repeats must be an integer"),
        ("read", SOURCE, None, 10**30, ValueError, "repeats is out of range"),
    ],
)
def test_probes_refuse(what, source, target, repeats, error, words):
    with pytest.raises(error, match=words):
        _C.probe(_C.Plan("quantize"), what, source, target, repeats)


def test_probes_want_a_plan():
    with pytest.raises(TypeError, match="the first argument must be a Plan"):
        _C.probe("avx2", "fma", None, None, 1)
    with pytest.raises(TypeError, match="probe takes 5"):
        _C.probe(_C.Plan("quantize"), "fma")
    assert _C.probe(_C.Plan("affine_qmv"), "fma", None, None, 1) > 0  # of any operation


# ---------------------------------------------------------------------------------------------------- shapes, weights


def test_shapes_by_name_and_by_size():
    assert shapes.parse("512x64,Square,512x64") == (Shape(512, 64), Shape(4096, 4096))
    assert Shape(14336, 4096) in shapes.parse("llama-3.1-8b") and Shape(4096, 14336) in shapes.parse("llama-3.1-8b")
    for wrong in ("gpt-9", "4096", "0x64", "4x4x4", "", "-1x64"):
        with pytest.raises(ValueError, match="no shape"):
            shapes.parse(wrong)


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("transpose", [True, False])
def test_other_layouts_get_the_same_matrix_exactly(scale_dtype, transpose):
    """Codes less zero points have 5 bits and scales 4: their product is exact in float32."""
    weights = Weights(SMALL_SHAPE, 4, transpose=transpose, scale_dtype=scale_dtype)
    assert weights.copies > 1
    for copy in range(2):
        codes, scales, zeros = codes_of(weights, copy)
        assert zeros.min() >= 0 and zeros.max() <= 15
        dense = (codes - np.repeat(zeros, 64, axis=1)) * np.repeat(scales, 64, axis=1)
        assert np.array_equal(dense, weights.dense(copy))
    assert not np.array_equal(weights.dense(0), weights.dense(1))


def test_copies_take_turns_and_share_no_memory():
    weights = Weights(SMALL_SHAPE, 4)
    assert weights.copies * weights.nbytes >= machine.last_level_cache()
    firsts = [weights.next()[0].ctypes.data for _ in range(weights.copies)]
    assert len(set(firsts)) == weights.copies
    spans = weights.spans(weights.copies)
    for first, span, parts in zip(firsts, spans, weights.parts, strict=True):
        begin, end = span.ctypes.data, span.ctypes.data + span.nbytes
        assert first == begin and span.nbytes % ceilings.BLOCK == 0
        assert all(begin <= part.ctypes.data and part.ctypes.data + part.nbytes <= end for part in parts)
    assert sum(part.nbytes for part in weights.parts[0]) == weights.nbytes
    assert Weights(SMALL_SHAPE, 4, cold=False).copies == 1


@pytest.mark.parametrize("form", [4, *stored.SMALL_FLOATS])
@pytest.mark.parametrize("transpose", [True, False])
def test_errors_are_those_of_float64(transpose, form):
    """Rounding to float32 moves each element by at most 2^-24 of itself, and so the norm by no more."""
    weights = Weights(SMALL_SHAPE, form, transpose=transpose)
    assert weights.nbytes * 8 == weights.format.bits_per_weight * 128 * 64
    dense = weights.dense().astype(np.float64)
    exact = as_float64(weights.x(3, "float32"), "float32") @ (dense.T if transpose else dense)
    assert weights.error(exact.astype(np.float32), "float32", "float32") <= 2.0**-24
    assert weights.error(exact * 1.25, "float32", "float32") == pytest.approx(0.25, rel=1e-12)


def test_bfloat16_bits():
    """Against the definition: the nearest multiple of 2^-7 of the power of two below, ties to even."""
    x = np.float32([1.0, 1.00390625, 1.01171875, -2.71875, 1e-3])
    mantissa, exponent = np.frexp(x.astype(np.float64))
    expected = np.ldexp(np.rint(mantissa * 256) / 256, exponent)
    assert np.array_equal(as_float64(as_dtype(x, "bfloat16"), "bfloat16"), expected)


# ---------------------------------------------------------------------------------------------------------- sampling


def script(monkeypatch, samples):
    """Let the clock show these samples, whatever is called."""
    left = iter(samples)

    def timed(call):
        call()
        return next(left)

    monkeypatch.setattr(clock, "timed", timed)
    monkeypatch.setattr(clock, "working_threads", lambda call: [])


def scripted(pairs, share=1.0):
    calibration = [clock.Sample(1.0, 1.0)] * 2
    return calibration + [clock.Sample(seconds, share) for pair in pairs for seconds in pair]


TEN_OPERATIONS = sampling.Work(lambda count: None, 10.0)
CEILING = ceilings.Ceiling("roof", lambda count: 40.0 * count, "GB/s")
SECOND = sampling.Effort(samples=3, seconds=1.0, longest_call=2.0)


def test_ratios_are_taken_pair_by_pair(monkeypatch):
    pairs = [(1.0, 1.0), (2.0, 2.0), (1.0, 2.0)]
    script(monkeypatch, scripted(pairs))
    result = sampling.measure(TEN_OPERATIONS, CEILING, SECOND)
    ratios = [(10 / ours) / (40 / theirs) for ours, theirs in pairs]
    assert result.ratio == statistics.median(ratios)
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    assert result.spread == (high - low) / 2
    assert (result.seconds, result.samples, result.retries) == (1.0, 3, 0)
    assert (result.unit, result.ceiling_name) == ("GB/s", "roof")


def test_disturbed_samples_are_taken_again(monkeypatch):
    disturbed = [clock.Sample(9.0, 0.5), clock.Sample(1.0, 1.0)]
    script(monkeypatch, scripted([]) + disturbed + scripted([(1.0, 1.0)] * 3)[2:])
    result = sampling.measure(TEN_OPERATIONS, CEILING, SECOND)
    assert (result.ratio, result.retries, result.share) == (0.25, 1, 1.0)


def test_disturbance_without_end_is_told(monkeypatch):
    script(monkeypatch, scripted([(1.0, 1.0)] * 6, share=0.6))
    result = sampling.measure(TEN_OPERATIONS, CEILING, SECOND)
    assert (result.samples, result.retries, result.share) == (3, 3, 0.6)


def test_rivals_are_sampled_in_every_round(monkeypatch):
    """The work took 2, 3 and 8 s a call, the first rival 1, 1 and 2 of them, the other as many tenths."""
    rounds = [(2.0, 1.0, 1.0, 0.1), (3.0, 1.0, 1.0, 0.1), (8.0, 1.0, 2.0, 0.2)]
    script(monkeypatch, [clock.Sample(1.0, 1.0)] * 2 + scripted(rounds))
    nothing = TEN_OPERATIONS.run
    patient = dataclasses.replace(SECOND, longest_call=10.0)
    result = sampling.measure(TEN_OPERATIONS, CEILING, patient, [nothing, nothing])
    assert result.by == pytest.approx((3.0, 30.0))
    row = table_rows.Row("matmul", "other", "x @ W.T", "bf16", "", 1).with_measurement(result)
    assert (row.by_exact, row.by_alike) == pytest.approx((3.0, 30.0))


def test_nothing_is_begun_after_the_deadline():
    called = []
    work = sampling.Work(called.append, 1.0)
    with pytest.raises(sampling.TooSlowError, match="time is up"):
        sampling.measure(work, CEILING, dataclasses.replace(SECOND, deadline=0.0))
    assert called == []


def test_calls_that_take_too_long(monkeypatch):
    script(monkeypatch, [clock.Sample(2.5, 1.0)])
    with pytest.raises(sampling.TooSlowError, match=r"a call takes 2\.5 s"):
        sampling.measure(TEN_OPERATIONS, CEILING, SECOND)


def test_share_of_the_worst_thread():
    """Of 1000 ns, one thread waited 100, one that hardly ran waited 500, and one that is new waited 20."""
    before = {1: (5000, 40), 2: (700, 50)}
    after = {1: (5900, 140), 2: (710, 550), 3: (980, 20)}
    assert clock._least_share(before, after, 1000) == pytest.approx(0.9)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads are pinned on Linux only")
def test_pinning_ends():
    before = os.sched_getaffinity(0)
    with clock.pinned(lambda: sum(range(200000))):
        assert len(os.sched_getaffinity(0)) == 1 or clock.working_threads(lambda: None) == []
    assert os.sched_getaffinity(0) == before


def test_the_own_thread_comes_first():
    assert clock.working_threads(lambda: sum(range(100000)))[:1] in ([threading.get_native_id()], [])


# ------------------------------------------------------------------------------------------------------------- gates


def test_gates_have_figures_and_names_of_their_own():
    keys = [(gate.name, gate.isa, gate.threads) for gate in gates.GATES]
    assert len(set(keys)) == len(keys)
    known = {entry["name"] for entry in _C.isas()} | {""}
    for gate in gates.GATES:
        assert gate.figure in figures.FIGURES and gate.isa in known
        assert gate.must is None or gate.stretch is None or (gate.must >= gate.stretch) == gate.lower


@pytest.mark.parametrize(
    ("lower", "stretch", "figure", "said"),
    [
        (False, None, 0.88, "met"),
        (False, None, 0.87, "missed"),
        (False, 0.95, 0.94, "met"),
        (False, 0.95, 0.95, "met, stretch too"),
        (True, None, 0.88, "met"),
        (True, None, 0.89, "missed"),
        (True, 0.8, 0.8, "met, stretch too"),
        (True, 0.8, 0.81, "met"),
    ],
)
def test_verdicts(lower, stretch, figure, said):
    gate = gates.Gate("g", "roof", "", 1, None, 0.88, stretch, lower)
    assert gates.verdict(gate, figure) == said
    assert gates.verdict(gate._replace(must=None), figure) == "no limit"


GATE = gates.Gate("g", "roof", "", 1, gates.Product(), 0.88, 0.95)


def test_why_a_gate_has_no_figure(monkeypatch):
    assert figures.take(GATE._replace(threads=4097), HASTE)["verdict"].startswith("not run: only ")
    late = dataclasses.replace(HASTE, deadline=0.0)
    for figure in set(figures.FIGURES) - {"blas", "mlx"}:  # which first say what is not installed
        gate = GATE._replace(figure=figure, product=gates.Product(shape=SMALL_SHAPE))
        assert figures.take(gate, late)["verdict"] == "not run: left out: time is up"
    with monkeypatch.context() as patch:
        patch.setattr(ours, "missing", lambda variant: "not there")
        assert figures.take(GATE, HASTE)["verdict"] == "not run: not there"
    monkeypatch.setattr(machine, "isas", lambda: ["generic"])
    assert figures.take(GATE._replace(isa="avx512"), HASTE)["verdict"].startswith("not run: this CPU has no AVX-512")


def test_an_option_that_is_not_there_yet(monkeypatch):
    """Until a product takes it, it is told; then it is measured without a change here."""
    assert ours.missing(ours.EXACT) is None
    unknown = ours.Variant(accumulate="by hand")
    assert ours.missing(unknown) == "accumulate=by hand is not there"
    right = q.affine_qmm_t
    monkeypatch.setattr(q, "affine_qmm_t", lambda *arrays, accumulate, activations: right(*arrays))
    assert ours.missing(unknown) is None


PLAIN = sampling.Measurement(1e-3, 3.0, 4.0, 0.75, 0.01, 3, 0, 1.0, "GB/s", "read")


def stub_figures(monkeypatch, measurement):
    monkeypatch.setattr(figures, "FIGURES", dict.fromkeys(figures.FIGURES, lambda gate, isa, effort: measurement))


def test_every_gate_is_printed(monkeypatch, capsys, tmp_path):
    stub_figures(monkeypatch, PLAIN)
    file = tmp_path / "gates.json"
    assert main(["bench", "--gates", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    lines = [line.split(" | ") for line in printed.splitlines() if " | " in line]
    assert [cell.strip() for cell in lines[0]] == [
        "gate", "accuracy class", "ISA", "threads", "figure", "must", "stretch", "verdict", "measured"
    ]  # fmt: skip
    assert all(line[1].strip() for line in lines)
    assert [line[0].strip() for line in lines[2:]] == [gate.name for gate in gates.GATES]
    written = json.loads(file.read_text())["gates"]
    assert len(written) == len(gates.GATES)
    for gate, line in zip(gates.GATES, written, strict=True):
        assert line["must"] == gate.must and line["figure"] in (0.75, None)
        assert (line["figure"] is None) == line["verdict"].startswith("not run: ")


def test_strict_is_about_missed_gates(monkeypatch, capsys):
    only = ["bench", "--gates", "--only", "NT copy"]
    stub_figures(monkeypatch, PLAIN)
    assert main(only) == 0 and "missed" in capsys.readouterr().out
    assert main([*only, "--strict"]) == 1
    stub_figures(monkeypatch, dataclasses.replace(PLAIN, ratio=0.9))
    assert main([*only, "--strict"]) == 0


SMALL_GATES = [
    gate._replace(product=gate.product._replace(shape=SMALL_SHAPE, m=min(gate.product.m, 3)))
    for gate in {gate.figure: gate for gate in gates.GATES if gate.product}.values()
    if gate.figure != "scratch"
] + [gate for gate in gates.GATES if not gate.product]


@pytest.mark.parametrize("gate", SMALL_GATES, ids=lambda gate: f"{gate.name} {gate.threads}")
def test_figures_of_small_products(gate):
    """Each way to take a figure runs, and gives a positive number."""
    gate = gate._replace(isa="", threads=1)
    try:
        result = figures.FIGURES[gate.figure](gate, ISAS[0], HASTE)
    except figures.NotMeasuredError as error:
        pytest.skip(str(error))
    assert result.ratio > 0 and math.isfinite(result.ratio)


GROWTH = "import numpy as np; from quantization._bench.scratch import growth; print(growth(lambda: np.ones({}, 'u1')))"


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer takes memory of its own")
def test_growth_is_what_a_call_takes():
    """Whatever this process holds; Linux counts up to 64 pages of 4 KiB (or 64 KiB) late, hence the slack."""
    held = np.ones(256 << 20, np.uint8)
    slack = 64 * os.sysconf("SC_PAGE_SIZE") + (1 << 20)
    for size in (32 << 20, 1):
        done = subprocess.run([sys.executable, "-c", GROWTH.format(size)], capture_output=True, text=True, check=True)
        assert abs(int(done.stdout) - size) <= slack
    assert held.nbytes == 256 << 20


def test_scratch_of_a_product():
    """At least the planes of one row, three digits of a byte for an element, less what is counted late."""
    product = gates.Product(8, 4, shape=Shape(8, 1 << 20))
    assert scratch.take(ISAS[0], 1, product) >= 3 * (1 << 20) - 64 * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("op", "variant"),
    [
        (op, variant)
        for op in ours.KERNELS
        for variant in (ours.EXACT, ours.BF16, ours.INT8)
        if variant != ours.INT8 or "mxfp8" not in op
    ],
)
def test_scratch_is_measured_on_every_way(op, variant):
    assert scratch._product_of(json.dumps(gates.Product(3, 4, variant, SMALL_SHAPE, op))).variant == variant
    assert scratch._measure(ISAS[0], 1, gates.Product(3, 4, variant, SMALL_SHAPE, op)) >= 0


# ------------------------------------------------------------------------------------------------------------ tables


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(run.Options, "effort", property(lambda self: HASTE))


ARGUMENTS = ["bench", "--shapes", "128x64", "--rows", "1,3", "--threads", "1", "--peers", ""]


def test_tables_and_json(hasty, capsys, tmp_path):
    file = tmp_path / "rows.json"
    assert main([*ARGUMENTS, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    for title in ("ceilings", "products", "products in short", run.ELEMENTWISE_TITLE, "small calls"):
        assert f"\n{title}\n" in printed
    for block in printed.split("\n\n"):
        bars = {tuple(i for i, c in enumerate(line) if c == "|") for line in block.splitlines() if " | " in line}
        longest = max(bars, key=len, default=())
        assert all(found == longest[: len(found)] for found in bars), block
    content = json.loads(file.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert content["schema"] == table_rows.SCHEMA and content["gates"] == []
    assert {"cpu", "cpus", "caches", "isas", "versions"} <= set(content["machine"])
    names = [field.name for field in dataclasses.fields(table_rows.Row)]
    for row in content["rows"]:
        assert list(row) == names and row["accuracy"]
        assert row["note"] or (row["seconds"] > 0 and row["ratio"] > 0 and row["samples"] > 0)
    classes = {row["accuracy"] for row in content["rows"] if row["section"] == "matmul"}
    assert {"exact f32", "exact, bfloat16 x", "int8 activations"} <= classes


def test_reading_bounds_few_rows_and_arithmetic_many():
    weights = Weights(SMALL_SHAPE, 4)
    for m in (1, 2, 3, 512):
        ceiling, amount = matmuls.figure_of(weights, m, ISAS[0], 1)
        assert ceiling.name == ("read" if m <= 2 else "fma")
        assert amount == (weights.nbytes if m <= 2 else 2 * m * 128 * 64)


@pytest.mark.parametrize("variant", [ours.EXACT, ours.BF16])
@pytest.mark.parametrize("m", [1, 5])
def test_experts_by_one_call_and_by_many(m, variant):
    """The same products of the same turns; a single row's turns name every expert of a bank once."""
    by_one, by_many = (gather.Experts(SMALL_SHAPE, 4, m, variant) for _ in range(2))
    assert by_one.weights.copies % gather.EXPERTS == 0
    if m == 1:
        named = [first + expert for first, chosen in by_one.turns for expert in chosen[0]]
        assert sorted(named) == list(range(by_one.weights.copies))
    for part in by_one.weights.parts:  # all different
        part[0][...] = np.random.default_rng(part[0].ctypes.data).integers(0, 1 << 32, part[0].shape)
    for turns in (1, 3):
        by_one.gathered()(turns)
        by_many.separate()(turns)
        assert by_one.out.any()
        assert np.array_equal(by_one.out, by_many.out)
    ceiling, amount = by_one.ceiling(ISAS[0], 1)
    assert (ceiling.name, amount) == (("read", by_one.nbytes) if m == 1 else ("fma", 2.0 * m * 8 * 128 * 64))
    if m == 1:
        assert ceiling.run(2) == 2 * 8 * len(by_one.weights.span(0))


@pytest.mark.parametrize("mode", stored.SMALL_FLOATS)
def test_products_of_small_floats(mode):
    """Of every kind. A product with other weights or another x would be wrong by its own size.

    int8 activations are off by half of 1 / 127 of the largest of a row at most, and digits of the other classes by
    less; a result of 16 bits by 2^-9 of itself, and (64 + 3) roundings of sums by 2^-24 of |x| |W| each.
    """
    for m in (1, 3):
        for op, variant, cold in matmuls.our_cases(m, SMALL_SHAPE, mode, True):
            row = matmuls.our_row(op, SMALL_SHAPE, mode, m, variant, ISAS[0], 1, cold, HASTE)
            assert row.note == "" and row.mode == row.stored == mode and row.ratio > 0
            weights = Weights(SMALL_SHAPE, mode, transpose=not op.endswith("_qmm_n"), cold=False)
            dense = weights.dense().astype(np.float64)
            dense = dense if weights.transpose else dense.T
            x = as_float64(weights.x(min(m, _ERROR_ROWS), variant.dtype), variant.dtype)
            largest = np.abs(x).max(axis=1, keepdims=True) * np.abs(dense).sum(axis=1)
            off = largest / 254 + 67 * 2.0**-24 * np.abs(x) @ np.abs(dense).T
            y = x @ dense.T
            assert row.error <= np.linalg.norm(off + 2.0**-9 * (np.abs(y) + off)) / np.linalg.norm(y)


def test_table_of_formats(monkeypatch):
    monkeypatch.setattr(formats, "SHAPE", SMALL_SHAPE)
    found = list(formats.rows(run.Options(isa=ISAS[0]), HASTE))
    cells = [[cell.strip() for cell in line.split("|")] for line in formats.table(found).splitlines()]
    assert cells[0] == list(formats.HEADER)
    assert [line[0] for line in cells[2:]] == [str(stored.format_of(form)) for form in stored.EVERY]
    assert {line[0]: line[1] for line in cells[2:]}["nvfp4"] == "4.5"
    assert all(row.rate > 0 and row.ratio > 0 for row in found)
    assert all(float(cell) >= 0 for line in cells[2:] for cell in line[4:8])  # one decimal may be 0.0
    left_out = formats.table([row.with_note("time is up") for row in found])
    assert left_out.count("time is up") == len(stored.EVERY)


def decoded(packed, norms):
    """What 4-bit codes and norms stand for, as the bound of attention needs it."""
    codes, D = reference_kv.unpack_2(packed, 4), attention.DIMENSION
    x, y = (reference_kv.decode_2(codes, norms, 4, rotated=rotated, dtype=np.float64) for rotated in (False, True))
    return types.SimpleNamespace(B=reference_kv.block_size(D), x=x, y=y)


def plain_attention_bound(x, k, v):
    """How far results in float32 may be from float64's, by the norm of those.

    With u the unit roundoff, to first order: a product of D terms, scaled, is off by (D + 2) u |x| |k| / sqrt(D), its
    distance from the greatest, which is less than twice the greatest |x| |k| / sqrt(D), by 2 u of that, an exponential
    of it by 4 u more. Numerator and denominator are sums of L such weights, one of them times values, and are divided.
    """
    u, (D, L) = 2.0**-24, (k.shape[-1], k.shape[1])
    norms = [np.linalg.norm(rows.astype(np.float64), axis=-1) for rows in (x, k)]
    largest = norms[0] * np.repeat(norms[1].max(axis=1), len(x) // len(k))[:, None] / math.sqrt(D)
    off = 2 * u * ((D + 4) * largest + L + 6)
    size = reference_kv.attention(x, k, np.abs(v))
    return 1.01 * np.linalg.norm(off[..., None] * size) / np.linalg.norm(reference_kv.attention(x, k, v))


@pytest.mark.parametrize("group", [1, 8])
def test_attention_beside_plain_ones(group):
    """All attend to the same keys and values, ours to their codes, which lose more than its arithmetic."""
    caches = attention.Caches(40)
    assert sum(span.nbytes for span in caches.spans) == caches.memory.nbytes
    run, out = caches.attending(group)
    run(len(caches.copies) + 1)
    x, (keys, values) = caches.queries(group)[:, None], (decoded(*pair) for pair in caches.copies[0])
    want, within = reference_kv.attention(x, keys.x, values.x), attention_bound.bound(x, keys, values, length=40)
    assert (np.abs(out[:, None] - want) <= within).all()
    exact = reference_kv.attention(x, caches.k, caches.v)
    assert caches.error(group, out) > np.linalg.norm(within) / np.linalg.norm(exact)
    in_float64 = 2.0**-29 * plain_attention_bound(x, caches.k, caches.v)
    for result in (out, exact * 1.25):
        expected = np.linalg.norm(result.reshape(exact.shape) - exact) / np.linalg.norm(exact)
        assert caches.error(group, result.reshape(out.shape)) == pytest.approx(expected, rel=0, abs=4 * in_float64)
    ceiling, amount = caches.ceiling(group, ISAS[0], 1)
    assert (ceiling.name, amount) == (("read", caches.nbytes) if group == 1 else ("fma", 4.0 * 8 * 8 * 40 * 128))
    if group == 1:
        assert ceiling.run(2) == 2 * caches.spans[0].nbytes
    for name, dtype, prepare in attention.PEERS:
        if name == "NumPy" and importlib.util.find_spec("threadpoolctl"):
            call, nbytes = prepare(caches, group, dtype, 1)
            rounded = [array.astype(dtype) for array in (caches.k, caches.v)]
            want = reference_kv.attention(x, *rounded)
            off = np.linalg.norm(call()[:, None] - want) / np.linalg.norm(want)
            assert off <= plain_attention_bound(x, *rounded)
            assert nbytes == 2 * 8 * 40 * 128 * np.dtype(dtype).itemsize


def test_attention_of_different_caches_is_in_different_classes():
    """With no time left every row has a note, and its labels."""
    options = run.Options(tables=("attention",))
    found = list(attention.rows(options, dataclasses.replace(HASTE, deadline=0.0)))
    assert all(row.note for row in found)
    classes = {(row.implementation, row.what.removeprefix("softmax(q kT) v, "), row.accuracy) for row in found}
    others = {(name, f"{dtype} cache", attention.ACCURACY[dtype]) for name, dtype, _ in attention.PEERS}
    assert classes == {("quantization", "kv_attention", "4-bit cache"), *others}
    assert all(f"{accuracy} =" in run.LEGEND or f"{accuracy}, " in run.LEGEND for _, _, accuracy in classes)
    of_gates = {gate.accuracy for gate in gates.GATES if gate.figure in ("attention_read", "attention_fma")}
    assert of_gates == {"4-bit cache"}


def test_small_floats_are_held_to_the_limits_of_affine_codes():
    """Wherever both have a row: mxfp4 and nvfp4 to those of 4 bits, mxfp8 to those of 8, and of 4 in prefill."""
    limits = {
        (gate.name.replace(" 4-bit", "") if gate.product.m > 1 else gate.name, gate.isa, gate.threads): gate[5:7]
        for gate in gates.GATES
        if gate.figure == "roof" and gate.must is not None and gate.product
    }
    for mode, bits in (("mxfp4", 4), ("nvfp4", 4), ("mxfp8", 8)):
        of_mode = [key for key in limits if f" {mode}," in key[0]]
        assert {
            (f"decode {mode}, {ours.EXACT}", "avx512", 2),
            (f"decode {mode}, K > 8k, {ours.EXACT}", "avx512", 1),
        } <= set(of_mode)
        for name, isa, threads in of_mode:
            affine = name.replace(f" {mode}, M", " M") if "prefill" in name else name.replace(mode, f"{bits}-bit")
            assert limits[name, isa, threads] == limits[affine, isa, threads]


def test_short_table_takes_the_fastest_other():
    """Of the same class, matrix, M and threads, and by what was sampled in turn rather than by the times."""
    own = table_rows.Row("matmul", "quantization", "affine_qmv float32", "exact f32", "avx2", 1, "64x64", 4, 1, "cold")
    other = dataclasses.replace(own, implementation="slow", what="x @ W.T, float32", seconds=5.0, by_alike=4.0)
    rows = [
        own.with_measurement(PLAIN),
        other,
        dataclasses.replace(other, implementation="fast", seconds=6.0, by_alike=3.0),
        dataclasses.replace(other, implementation="coarse", accuracy="bf16", by_alike=1.0),
        dataclasses.replace(other, implementation="parallel", threads=2, by_alike=1.0),
        dataclasses.replace(other, implementation="absent", by_alike=math.nan),
    ]
    lines = summary.table(rows).splitlines()
    assert len(lines) == 3
    cells = dict(zip(summary.HEADER, (cell.strip() for cell in lines[2].split("|")), strict=True))
    assert (cells["fastest other"], cells["its time"], cells["by ours alike"]) == ("fast", "6 s", "3 x")
    assert summary.table(rows[1:]) == ""


def test_full_measures_every_shape_and_width():
    def matrices(*arguments):
        return run.options_of(__main__._parser().parse_args(["bench", *arguments])).matrices

    everything = matrices("--full")
    assert {shape for shape, _ in everything} == {shape for model in shapes.MODELS.values() for shape in model}
    assert len(set(everything)) == len(everything) and {form for _, form in everything} == set(stored.EVERY)
    assert matrices() == ((Shape(4096, 4096), 4),)
    assert matrices("--shapes", "7x64,64x64", "--bits", "3,4") == tuple(
        (shape, bits) for shape in (Shape(7, 64), Shape(64, 64)) for bits in (3, 4)
    )
    assert matrices("--formats", "affine_3,nvfp4,affine_3") == ((Shape(4096, 4096), 3), (Shape(4096, 4096), "nvfp4"))
    assert len(matrices("--formats", "all")) == len(stored.EVERY)
    with pytest.raises(ValueError, match=r"^bench: there are no affine codes of 9 bits, but of .*, 8$"):
        matrices("--bits", "4,9")
    for wrong in (("--formats", "affine_1"), ("--formats", "mxfp4", "--bits", "4")):
        with pytest.raises(ValueError, match="bench: "):
            matrices(*wrong)


def test_time_is_bounded(capsys, monkeypatch):
    monkeypatch.setattr(matmuls, "cached_weights", None)  # not even made
    assert main([*ARGUMENTS, "--minutes", "1e-9", "--table", "matmul"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("quantization | ")]
    assert lines and all("time is up" in line or "not there" in line for line in lines)


@pytest.mark.parametrize("wrong", [["--gates", "--shapes", "8x64"], ["--gates", "--plot", "a.png"], ["--only", "x"]])
def test_options_that_do_not_go_together(wrong, capsys):
    assert main(["bench", *wrong]) == 2
    assert "is for the " in capsys.readouterr().err


def test_files_that_cannot_be_written_are_told_at_once(tmp_path, capsys):
    assert main([*ARGUMENTS, "--json", str(tmp_path / "none" / "a.json")]) == 2
    captured = capsys.readouterr()
    assert "a.json" in captured.err and captured.out == ""


def test_numbers_of_the_command_line(capsys):
    for wrong in ("0", "1,x", "-1", ""):
        with pytest.raises(SystemExit):
            main(["bench", "--rows", wrong])
    assert main(["bench", "--shapes", "nothing"]) == 2
    assert "no shape 'nothing'" in capsys.readouterr().err


def test_lines_of_the_plot():
    """A vector's product goes on as the matrix's; weights that stay in the cache are no point of a line by memory."""
    vector = table_rows.Row("matmul", "quantization", "affine_qmv float32", "", "", 1, "8x64", 4, 1, "cold", ratio=0.5)
    rows = [
        vector,
        dataclasses.replace(vector, memory="hot", ratio=0.1),
        dataclasses.replace(vector, what="affine_qmm_t float32", m=8, ratio=0.25),
        dataclasses.replace(vector, implementation="other", memory="64 copies"),
    ]
    mine, theirs = plot.lines_of(rows).values()
    assert (mine, theirs) == ([(1, 0.5), (8, 0.25)], [(1, 0.5)])


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    row = table_rows.Row("matmul", "quantization", "affine_qmv", "exact f32", "avx2", 1, "64x64", 4, 1, "cold")
    rows = [row.with_measurement(PLAIN), dataclasses.replace(row, m=8).with_measurement(PLAIN), row.with_note("none")]
    plot.draw(tmp_path / "a.png", rows)
    plot.draw(tmp_path / "none.svg", [])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------------------- peers

# Unit roundoffs of what a class keeps: float32; bfloat16. A product's error is below (k + 3) of them on |x| |W|:
# products and sums, rounding of x and of y.
ROUNDOFFS = {"exact f32": 2.0**-24, "bf16": 2.0**-8}


def cancellation(weights, m, dtype):
    """How many times larger the norm of |x| |W| is than that of x W, over the rows whose errors count."""
    x, dense = as_float64(weights.x(min(m, _ERROR_ROWS), dtype), dtype), weights.dense().astype(np.float64)
    return np.linalg.norm(np.abs(x) @ np.abs(dense).T) / np.linalg.norm(x @ dense.T)


@pytest.mark.parametrize(
    ("peer", "form"),
    [
        pytest.param(peer, form, id=f"{peer.name} {form}")
        for peer in peers.MATMUL
        if peer.accuracy in ROUNDOFFS
        for form in peer.formats
    ],
)
def test_peers_multiply_by_the_same_matrix(peer, form):
    if why := peer.missing():
        pytest.skip(why)
    weights = Weights(SMALL_SHAPE, form)
    weights.copies = 2
    try:
        prepared = peer.prepare(weights, 1)
    except RuntimeError as error:
        pytest.skip(str(error))
    y = prepared(3)(1)
    bound = (64 + 3) * ROUNDOFFS[peer.accuracy] * cancellation(weights, 3, peer.dtype)
    assert weights.error(y, "float32", peer.dtype) <= bound


@pytest.mark.parametrize("codec", peers.CODECS, ids=lambda c: c.name)
def test_codecs_of_peers_run(codec):
    if why := codec.missing():
        pytest.skip(why)
    quantize, dequantize, nbytes = codec.prepare(np.ones((2, 256), np.float32))
    quantize(), dequantize()
    assert 0 < nbytes < 2 * 256 * 4


def test_what_is_not_installed_is_a_row_that_says_so():
    peer = dataclasses.replace(peers.MATMUL[0], modules=("no_such_module",))
    (row,) = matmuls.peer_rows(peer, SMALL_SHAPE, 4, ISAS[0], 1, (1, 2), HASTE)
    assert row.note == "no_such_module is not installed"


def dense_peer(accuracy, error):
    """A product with the dense matrix, wrong by a factor of 1 + error."""

    def prepare(weights, threads):
        dense = [weights.dense(copy).T * np.float32(1 + error) for copy in range(weights.copies)]
        return lambda m: lambda count: [weights.x(m, "float32") @ dense[i % len(dense)] for i in range(count)][-1]

    return peers.Peer("dense", (), "float32", accuracy, prepare)


@pytest.mark.parametrize("accuracy", ours.ALIKE)
def test_peers_are_sampled_in_turn_with_ours(accuracy):
    """With a peer of our own making, in whose place any may stand."""
    peer = dense_peer(accuracy, 0.0 if accuracy == "exact f32" else 2.0**-9)
    weights = matmuls.cached_weights(SMALL_SHAPE, 4, True, True, "float16", matmuls.MOST_COPIES)
    for row in matmuls.peer_rows(peer, SMALL_SHAPE, 4, ISAS[0], 1, (1, 3), HASTE):
        assert row.note == "" and row.by_exact > 0 and row.by_alike > 0
        assert (row.by_exact == row.by_alike) == (accuracy == "exact f32")
        # The peer's factor; and, on |x| |W|, a rounding of the weight (of s q + b, s q being exact), one of its product
        # with the factor, one of that with x and 63 of sums: 66 (1 + 2^-9) < 67 of 2^-24.
        bound = 2.0**-9 + 67 * 2.0**-24 * cancellation(weights, row.m, "float32")
        assert row.memory == weights.memory and row.error <= bound


def test_a_peer_is_in_the_class_that_its_error_tells():
    """One that could round x but does not, and one that should not but does."""
    (row,) = matmuls.peer_rows(dense_peer("int8 activations", 0.0), SMALL_SHAPE, 4, ISAS[0], 1, (3,), HASTE)
    assert row.accuracy == "exact f32" and row.by_exact == row.by_alike > 0
    (row,) = matmuls.peer_rows(dense_peer("exact f32", 2.0**-9), SMALL_SHAPE, 4, ISAS[0], 1, (3,), HASTE)
    assert row.note == "not exact: error 2.0e-03" and math.isnan(row.by_exact)


def test_copies_can_be_limited():
    whole, few = Weights(SMALL_SHAPE, 4), Weights(SMALL_SHAPE, 4, most=2)
    assert (whole.memory, few.copies, few.memory) == ("cold", 2, "2 copies")
    assert Weights(SMALL_SHAPE, 4, cold=False).memory == "hot"
    assert Weights(SMALL_SHAPE, 4, most=1000).memory == "cold"


# ------------------------------------------------------------------------------------------------------------ machine


@pytest.mark.parametrize(
    ("features", "core"),
    [("AVX2, FMA, AVX512F", "SkylakeX"), ("AVX2, FMA", "Haswell"), ("", None)],
)
def test_openblas_is_told_what_the_cpu_can_do(monkeypatch, features, core):
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(_C, "cpu_features", lambda: features)
    assert machine.blas_environment().get("OPENBLAS_CORETYPE") == core
    restarted = []
    monkeypatch.setattr(machine.os, "execve", lambda *arguments: restarted.append(arguments))
    machine.restart_with_blas_environment()
    assert len(restarted) == (core is not None)
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Zen")
    assert machine.blas_environment() == {}


def test_the_environment_chooses_what_is_measured(monkeypatch):
    monkeypatch.delenv("QUANTIZATION_ISA", raising=False)
    assert machine.default_isa() == machine.isas()[0] == run.Options().isa
    monkeypatch.setenv("QUANTIZATION_ISA", "generic")
    assert machine.default_isa() == "generic"
    assert q.get_num_threads() == machine.describe()["threads"]
