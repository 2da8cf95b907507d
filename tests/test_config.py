"""What the package says of itself, and which compiled kernel a call uses."""

import copy
import gc
import inspect
import os
import pickle
import re
import subprocess
import sys
import weakref
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
    q.AffineQmmTNax,
    q.AffineQmmNNax,
    q.AffineGatherQmm,
    q.AffineGatherQmmRhs,
    q.AffineGatherQmmRhsNax,
    q.Mxfp4GatherQmm,
    q.Nvfp4GatherQmmRhs,
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
    assert {row["name"] for row in formats} >= {f"affine_{bits}" for bits in (1, 2, 3, 4, 5, 6, 8)}
    for row in formats:
        assert row["name"] == (f"affine_{row['bits']}" if row["family"] == "affine" else row["mode"])
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


# ---- calls ----

PARAMETERS = {
    q.AffineQuantize: q.affine_quantize,
    q.AffineDequantize: q.affine_dequantize,
    q.AffineQmmT: q.affine_qmm_t,
    q.AffineQmmN: q.affine_qmm_n,
    q.AffineQmv: q.affine_qmv,
    q.AffineQvm: q.affine_qvm,
    q.AffineQmmTNax: q.affine_qmm_t_nax,
    q.AffineQmmNNax: q.affine_qmm_n_nax,
    q.AffineGatherQmm: q.affine_gather_qmm,
    q.AffineGatherQmmRhs: q.affine_gather_qmm_rhs,
    q.AffineGatherQmmRhsNax: q.affine_gather_qmm_rhs_nax,
    q.Mxfp4GatherQmm: q.mxfp4_gather_qmm,
    q.Nvfp4GatherQmmRhs: q.nvfp4_gather_qmm_rhs,
    q.VariableQuantizationKernel: q.quantize,
}


def ordinary_calls(kernel_class):
    """Arguments by position and by name, with a value other than the default for each that has one."""
    w = np.linspace(-1, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    if kernel_class is q.VariableQuantizationKernel:
        return [w], {"bits": 3, "out": np.zeros_like(w), "input_dtype": "bfloat16"}
    if kernel_class in (q.Mxfp4GatherQmm, q.Nvfp4GatherQmmRhs):
        out = np.zeros((3, 1, 64) if kernel_class is q.Mxfp4GatherQmm else (3, 64), np.float32)
        words = {"accumulate": "exact", "activations": "int8", "out": out, "input_dtype": "bfloat16"}
        if kernel_class is q.Nvfp4GatherQmmRhs:
            chosen = {"output_features": 64, "transpose": False, "global_scale": 2.5}
            return [w[:3], *q.nvfp4_quantize(w), [0, -1, 0]], {**chosen, **words}
        chosen = {"lhs_indices": [1, 0, 1], "rhs_indices": [0, 0, 0], "transpose": False, "sorted_indices": True}
        return [w[:2, None], *q.mxfp4_quantize(w)], {**chosen, **words}
    stored = q.affine_quantize(w, 32, 8)
    sizes = {"group_size": 32, "bits": 8}
    last = {"input_dtype": "bfloat16"}
    if kernel_class is q.AffineQuantize:
        out = (None, np.zeros((64, 2), np.float16), None)
        return [w], {**sizes, "profile": "cpu", "scale_dtype": "float16", "pad": True, "out": out, **last}
    if kernel_class is q.AffineDequantize:
        return list(stored), {
            **sizes,
            "dtype": "float16",
            "profile": "cpu",
            "k": 63,
            "out": np.zeros((64, 63), np.float16),
            **last,
        }
    features = {} if issubclass(kernel_class, q.AffineQmmT) else {"output_features": 64}
    out = np.zeros(64, np.float32)
    words = {"accumulate": "exact", "activations": "int8", "out": out, **last}
    if kernel_class is q.AffineGatherQmm:
        chosen = {"lhs_indices": [1, 0, 1], "rhs_indices": [0, 0, 0], "transpose": False}
        words["out"] = np.zeros((3, 1, 64), np.float32)
        return [w[:2, None], *stored], {**chosen, **sizes, "sorted_indices": True, **words}
    if issubclass(kernel_class, q.AffineGatherQmmRhs):
        words["out"] = np.zeros((3, 64), np.float32)
        return [w[:3], *stored, [0, -1, 0]], {**features, **sizes, "transpose": False, **words}
    return [w[3], *stored], {**features, **sizes, **words}


def as_bytes(result):
    return [array.tobytes() for array in (result if isinstance(result, tuple) else (result,))]


def outcome(function, given, keywords):
    try:
        return as_bytes(function(*given, **keywords))
    except (TypeError, ValueError) as error:  # such as an out that does not fit a default
        return type(error), str(error)


@pytest.mark.parametrize("kernel_class", KERNELS)
def test_the_core_binds_arguments_as_python_does(kernel_class):
    """Every parameter at every place that it may take, against the call as Python defines it."""
    arrays, options = ordinary_calls(kernel_class)
    names = list(inspect.signature(kernel_class()).parameters)
    assert names[len(arrays) :] == list(options)
    positional = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in inspect.signature(kernel_class()).parameters.values())
    kernel = kernel_class()
    kernel.compile()
    assert isinstance(outcome(kernel, arrays, options), list)
    values = [*arrays, *options.values()]
    for by_position in range(positional + 1):
        for left_out in (None, *options):
            given = values[:by_position]
            named = dict(list(zip(names, values, strict=True))[by_position:])
            named.pop(left_out, None)
            for keywords in (named, dict(reversed(named.items()))):
                assert outcome(kernel, given, keywords) == outcome(kernel._call, given, keywords)


@pytest.mark.parametrize("kernel_class", KERNELS)
def test_ordinary_calls_stay_in_the_core(kernel_class):
    """Every parameter at every place that it may take, where calling Python's definition would be an error."""
    arrays, options = ordinary_calls(kernel_class)
    kernel = kernel_class()
    parameters = inspect.signature(kernel).parameters
    positional = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())
    expected = as_bytes(kernel(*arrays, **options))
    kernel._call = None
    values = [*arrays, *options.values()]
    for by_position in range(positional + 1):
        named = dict(list(zip(parameters, values, strict=True))[by_position:])
        assert as_bytes(kernel(*values[:by_position], **named)) == expected


@pytest.mark.parametrize("kernel_class", KERNELS)
def test_calls_that_do_not_fit_are_refused_in_pythons_words(kernel_class):
    arrays, options = ordinary_calls(kernel_class)
    kernel = kernel_class()
    kernel.compile()
    first = next(iter(inspect.signature(kernel).parameters))
    wrong = [
        ([], {}),
        ([], options),
        (arrays[:-1], options),
        (arrays * 9, {}),
        (arrays, {"nonsense": 1}),
        (arrays, {first: arrays[0]}),
        (arrays, {**options, "plan": 1}),
    ]
    if issubclass(kernel_class, q.AffineQmmT):
        wrong.append((arrays, {"output_features": 64}))
    for given, named in wrong:
        with pytest.raises(TypeError) as by_python:
            kernel._call(*given, **named)
        with pytest.raises(TypeError) as by_core:
            kernel(*given, **named)
        assert str(by_core.value) == str(by_python.value)


@pytest.mark.parametrize(
    ("kernel_class", "named"),
    [
        (q.Mxfp4Quantize, {"global_scale": None}),
        (q.Mxfp8Dequantize, {"global_scale": 1.0}),
        (q.Mxfp4QmmT, {"global_scale": None}),
        (q.Mxfp8QmmN, {"global_scale": None, "output_features": 32}),
        (q.Mxfp4GatherQmm, {"global_scale": 1.0}),
        (q.Nvfp4Quantize, {"mx_scale": "up"}),
    ],
)
def test_options_of_another_formats_scales_are_refused(kernel_class, named):
    """Also those that say what holds anyway: formats share the operation, and its parameters, in the core."""
    w = np.ones((32, 32), np.float32)
    stored = q.mxfp8_quantize(w) if "Mxfp8" in kernel_class.__name__ else q.mxfp4_quantize(w)
    arrays = [w] if "Quantize" in kernel_class.__name__ else [w, *stored]
    arrays = list(stored) if kernel_class is q.Mxfp8Dequantize else arrays
    kernel = kernel_class()
    kernel.compile()
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(named))}'"):
        kernel(*arrays, **named)


@pytest.mark.parametrize(
    ("kernel_class", "missing"),
    [
        (q.HadamardQuantizeKv, "write_pos"),
        (q.HadamardQuantizeKvSeq, "write_pos_start"),
        (q.HadamardQuantizeKvHb, "write_pos"),
        (q.HadamardQuantizeKvHb, "codebook_bits"),
    ],
)
def test_options_that_must_be_given(kernel_class, missing):
    of_bytes, of_several = kernel_class is q.HadamardQuantizeKvHb, kernel_class is q.HadamardQuantizeKvSeq
    given = {"write_pos_start" if of_several else "write_pos": 0, **({"codebook_bits": 5} if of_bytes else {})}
    packed = np.zeros((1, 4, 256 if of_bytes else 128), np.uint8)
    src = np.ones((1, 1, 256) if of_several else (1, 256), np.float32)
    arrays = [src, packed, np.zeros((1, 4), np.float32)]
    kernel = kernel_class()
    kernel.compile()
    kernel(*arrays, **given)
    del given[missing]
    with pytest.raises(TypeError, match=f"missing 1 required keyword-only argument: '{missing}'"):
        kernel(*arrays, **given)


@pytest.mark.parametrize("kernel_class", KERNELS)
def test_names_that_are_not_interned(kernel_class):
    arrays, options = ordinary_calls(kernel_class)
    named = {"".join([name[:1], name[1:]]): value for name, value in options.items()}
    kernel = kernel_class()
    assert as_bytes(kernel(*arrays, **named)) == as_bytes(kernel(*arrays, **options))


@pytest.mark.parametrize("kernel_class", KERNELS)
def test_a_kernel_has_the_signature_of_its_function(kernel_class):
    found, expected = (inspect.signature(thing).parameters for thing in (kernel_class(), PARAMETERS[kernel_class]))
    assert [(p.name, p.kind) for p in found.values()] == [(p.name, p.kind) for p in expected.values()]
    own = inspect.signature(kernel_class)
    assert list(own.parameters) == [
        name for name in inspect.signature(kernel_class.__init__).parameters if name != "self"
    ]


def test_a_kernel_with_a_call_of_its_own():
    class Half(q.VariableQuantizationKernel):
        def __call__(self, x):
            return super().__call__(x, bits=2) / 2

    kernel = Half()
    for _ in range(2):
        assert np.array_equal(kernel([-1.0, 1.0]), [-0.5, 0.5])
    assert list(inspect.signature(kernel).parameters) == ["x"]


def test_sizes_of_a_kernel_may_change():
    """Also while a call reads them: the call keeps its own."""
    kernel = q.AffineQuantize(32, 8)
    kernel.compile()
    w = np.ones((1, 64), np.float32)
    assert kernel(w)[0].shape == (1, 16)
    kernel.bits = 4
    assert kernel(w)[0].shape == (1, 8)

    class Shifty:
        def __index__(self):
            kernel.group_size, kernel.bits = 64, 2
            return 32

    kernel.group_size, kernel.bits = Shifty(), int("8")
    assert kernel(w)[0].shape == (1, 16)
    assert kernel(w)[0].shape == (1, 4)


@pytest.mark.parametrize("kernel_class", KERNELS)
def test_kernels_can_be_copied_and_pickled(kernel_class):
    arrays, options = ordinary_calls(kernel_class)
    kernel = kernel_class()
    kernel.compile()
    for other in (copy.copy(kernel), copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
        assert type(other) is kernel_class and other._kernel is None and other._plans is not kernel._plans
        assert as_bytes(other(*arrays, **options)) == as_bytes(kernel(*arrays, **options))


def test_only_a_plan_can_be_the_compiled_kernel():
    kernel = q.AffineQmv()
    for thing in (None, 5, object(), kernel, _C.Plan, np.ones(3)):
        with pytest.raises(TypeError, match=r"^_kernel must be a Plan$"):
            kernel._kernel = thing
    with pytest.raises(TypeError):
        del kernel._kernel
    assert kernel._kernel is None

    class Wrong(q.AffineQmv):
        def _find_plan(self):
            return 5

    with pytest.raises(TypeError, match=r"^_find_plan must return a Plan$"):
        Wrong()(1.0)
    with pytest.raises(AttributeError):
        _C.Kernel()(1.0)


def test_kernels_are_collected():
    kernel = q.AffineQmv()
    kernel.compile()
    kernel.group_size = kernel  # a cycle through what the core holds
    gone = weakref.ref(kernel)
    del kernel
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("kernel_class", KERNELS)
def test_calls_keep_and_lose_no_references(kernel_class):
    arrays, options = ordinary_calls(kernel_class)
    kernel = kernel_class()
    plan = kernel.compile()
    objects = [kernel, plan, kernel_class, *arrays]

    def counts():
        return [sys.getrefcount(thing) for thing in objects]

    for keywords in (options, {"nonsense": 1}):
        before = counts()
        for _ in range(100):
            try:
                kernel(*arrays, **keywords)
            except TypeError:
                assert "nonsense" in keywords
        assert counts() == before
