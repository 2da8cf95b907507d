"""What the package says of itself, and which compiled kernel a call uses."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import quantization as q
from quantization import _C

KERNELS = [
    q.AffineQuantize,
    q.AffineDequantize,
    q.AffineQmmT,
    q.AffineQmmN,
    q.AffineQmv,
    q.AffineQvm,
    q.VariableQuantizationKernel,
]
AVAILABLE = [entry["name"] for entry in _C.isas() if entry["available"]]


def python(*arguments, **changes):
    """Run Python; a variable given as None is taken out of its environment."""
    path = os.pathsep.join([str(Path(q.__file__).parents[1]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, **changes}
    environment = {name: value for name, value in environment.items() if value is not None}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, check=False, capture_output=True, text=True, timeout=120
    )


# ---- tables ----


def test_tables_say_what_there_is():
    formats = _C.formats()
    assert {row["name"] for row in formats} >= {f"affine_{bits}" for bits in (2, 3, 4, 5, 6, 8)}
    for row in formats:
        assert row["name"].startswith(f"{row['mode']}_{row['bits']}")
        assert row["group_sizes"] == tuple(sorted(row["group_sizes"])) and row["group_sizes"]
        assert isinstance(row["bias"], bool)
    isas = _C.isas()
    assert [entry["name"] for entry in isas] == ["avx512", "avx2", "neon_dotprod", "neon", "generic"]
    for entry in (*isas, *_C.devices()):
        assert entry["available"] is (entry["reason"] is None)
    assert isas[-1]["available"]
    assert [entry["name"] for entry in _C.devices()] == ["cpu", "metal"]
    assert _C.devices()[0]["available"]


def test_threads_of_a_context_are_told_as_such():
    with q.threads(3):
        config = q.show_config()
    assert config.threads == 3 and config.threads_reason == "3: set by threads(3)"


def test_the_best_instruction_set_is_chosen():
    if not os.environ.get("QUANTIZATION_ISA"):
        assert q.AffineQmmT().compile().isa == AVAILABLE[0]
    with q.isa("auto"):
        assert q.AffineQmmT()._plan().isa == AVAILABLE[0]


# ---- show_config ----


def test_show_config():
    config = q.show_config()
    assert isinstance(config.threads, int)
    assert config.threads == q.get_num_threads()
    assert config.threads_reason.startswith(f"{config.threads}")
    assert config.isas == _C.isas()
    assert config.devices == _C.devices()
    assert list(config.kernels) == list(_C.ops())
    assert config.versions["NumPy"] == np.__version__
    assert config.versions["compiler"].startswith(("gcc", "clang"))
    rows = repr(config).splitlines()
    starts = [re.match(r"(?:ISA |device |CPU )?\S+ +", row).end() for row in rows]
    assert len(set(starts)) == 1, "columns are aligned"
    for entry in config.isas:
        state = "available" if entry["available"] else entry["reason"]
        assert re.search(rf"^ISA {entry['name']} +{re.escape(state)}$", repr(config), re.MULTILINE)
    for op, kernel in config.kernels.items():
        assert re.search(rf"^{op} +{re.escape(kernel)}$", repr(config), re.MULTILINE)
    assert re.search(r"^device metal +not available|^device metal +available", repr(config), re.MULTILINE)


def test_show_config_inside_blocks():
    with q.isa("generic"), q.threads(3):
        config = q.show_config()
    assert all(kernel.startswith("cpu, generic: ") for kernel in config.kernels.values())
    assert config.threads == 3


def test_info_on_the_command_line():
    done = python("-m", "quantization", "info")
    assert done.returncode == 0, done.stderr
    for word in (
        "quantization",
        "Python",
        "NumPy",
        "compiler",
        "CPU features",
        "ISA generic",
        "device metal",
        "threads",
    ):
        assert re.search(rf"^{word} ", done.stdout, re.MULTILINE), word


def test_info_where_the_environment_asks_for_nonsense():
    """The one command that helps to find out what is wrong works all the same, and says it."""
    done = python("-m", "quantization", "info", QUANTIZATION_ISA="nonsense")
    assert done.returncode == 0, done.stderr
    assert "there is no ISA 'nonsense'; here are" in done.stdout


# ---- the environment ----

CALL = "import quantization as q; print(q.quantize([0.5], bits=2), q.variable_quantization.compile().isa)"


def test_instruction_set_of_the_environment():
    for name in AVAILABLE:
        assert python("-c", CALL, QUANTIZATION_ISA=name).stdout.split()[-1] == name
    for name in ("", "auto", None):
        assert python("-c", CALL, QUANTIZATION_ISA=name).stdout.split()[-1] == AVAILABLE[0]


def last_line(done):
    assert done.returncode == 1
    return done.stderr.strip().splitlines()[-1]


def test_nonsense_in_the_environment():
    here = ", ".join(AVAILABLE)
    said = last_line(python("-c", CALL, QUANTIZATION_ISA="nonsense"))
    by = "(QUANTIZATION_ISA=nonsense is in the environment)"
    assert said == f"RuntimeError: there is no ISA 'nonsense'; here are {here} {by}"
    said = last_line(python("-c", CALL, QUANTIZATION_ISA=None, QUANTIZATION_DEVICE="metal"))
    assert said.endswith("(QUANTIZATION_DEVICE=metal is in the environment)")
    assert "'cpu' and 'auto' would work" in said
    assert python("-c", "import quantization", QUANTIZATION_ISA="nonsense").returncode == 0
    block = "import quantization as q\nwith q.isa('generic'): print(q.quantize([1.0]))"
    assert python("-c", block, QUANTIZATION_ISA="nonsense").stdout == "[1.]\n"


@pytest.mark.parametrize("entry", [e for e in _C.isas() if not e["available"]], ids=lambda e: e["name"])
def test_an_instruction_set_in_the_environment_that_is_not_here(entry):
    said = last_line(python("-c", CALL, QUANTIZATION_ISA=entry["name"]))
    assert said.startswith(f"RuntimeError: ISA '{entry['name']}' is not available: {entry['reason']}; here are ")
    assert said.endswith(f"(QUANTIZATION_ISA={entry['name']} is in the environment)")


# ---- plans ----


@pytest.mark.parametrize("op", _C.ops())
def test_what_a_plan_says(op):
    plan = _C.Plan(op, "cpu", "generic", 5)
    assert (plan.op, plan.device, plan.isa, plan.threads) == (op, "cpu", "generic", 5)
    assert repr(plan) == f"<Plan {op}: device cpu, isa generic, {plan.variant}>"
    assert plan.variant
    for default in (_C.Plan(op), _C.Plan(op=op, device="auto", isa=None, threads=0), _C.Plan(op, None, "auto")):
        assert (default.device, default.isa, default.threads) == ("cpu", AVAILABLE[0], 0)


@pytest.mark.parametrize("kernel_class", KERNELS)
def test_a_kernel_is_compiled_once(kernel_class):
    kernel = kernel_class()
    assert kernel._kernel is None
    assert repr(kernel) == f"<{kernel_class.__name__}: not compiled>"
    compiled = kernel.compile()
    assert kernel.compile() is kernel._kernel is kernel._plan() is compiled
    assert repr(kernel) == f"<{kernel_class.__name__}: {compiled!r}>"
    assert kernel_class().compile() is not compiled


@pytest.mark.parametrize("kernel_class", KERNELS)
def test_blocks_use_other_plans_that_are_kept(kernel_class):
    kernel = kernel_class()
    with q.isa("generic"):
        inside = kernel._plan()
        assert inside.isa == "generic"
        assert kernel._kernel is None
        with q.threads(2):
            limited = kernel._plan()
            assert (limited.isa, limited.threads) == ("generic", 2)
        assert kernel._plan() is inside
        own = kernel.compile()  # what calls outside use, wherever it is compiled
    assert kernel._kernel is own is kernel._plan()
    assert own.threads == 0
    assert own.isa == (os.environ.get("QUANTIZATION_ISA") or AVAILABLE[0])
    with q.isa("generic"):
        assert kernel._plan() is inside
        with q.threads(2):
            assert kernel._plan() is limited
    with q.device("cpu"):
        assert kernel._plan().device == "cpu"
    assert kernel._kernel is own


def test_a_first_call_inside_a_block_leaves_the_kernel_for_later():
    kernel = q.VariableQuantizationKernel()
    with q.isa("generic"):
        kernel([0.5], bits=2)
    assert kernel._kernel is None
    kernel([0.5], bits=2)
    assert kernel._kernel.isa == (os.environ.get("QUANTIZATION_ISA") or AVAILABLE[0])


def test_blocks_that_fail_to_open_change_nothing():
    before = q.show_config().kernels
    for block in (q.isa("nonsense"), q.device("nonsense")):
        with pytest.raises(RuntimeError), block:
            raise AssertionError
    assert q.show_config().kernels == before
