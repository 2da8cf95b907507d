"""Documentation that runs, and says of everything public what it takes, returns and raises."""

import doctest
import importlib.util
import inspect
import operator
import os
import pkgutil
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import quantization as q
import quantization.mlx
from conftest import SMALL
from quantization import _C

ROOT = Path(__file__).parents[1]
MODULES = ["quantization"] + [
    f"quantization.{info.name}" for info in pkgutil.iter_modules(q.__path__) if info.name not in ("_C", "__main__")
]
PUBLIC = [name for name in q.__all__ if not name.startswith("__")]
FUNCTIONS = [name for name in PUBLIC if inspect.isfunction(getattr(q, name))]
FUNCTIONS += [f"mlx.{name}" for name in quantization.mlx.__all__]
CLASSES = [name for name in PUBLIC if inspect.isclass(getattr(q, name))]
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


NEEDED = {"q.open(": "safetensors", "q.save_mlx(": "safetensors", "gguf.": "gguf", ".plot(": "matplotlib"}


def can_run(source):
    """Whether the optional packages that examples use are installed."""
    return all(importlib.util.find_spec(package) for text, package in NEEDED.items() if text in source)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name):
    module = importlib.import_module(name)
    np.set_printoptions()  # examples assume the default
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    for found in doctest.DocTestFinder().find(module):
        if can_run(found.docstring):
            runner.run(found)
    assert runner.failures == 0


def blocks_of(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.exists()]


@pytest.mark.skipif(SMALL, reason="the same on every CPU")
@pytest.mark.skipif(not PAGES, reason="README.md is not beside the tests")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_of_pages(page, tmp_path, monkeypatch):
    """Every session of a page (pycon), whose names last to its end."""
    monkeypatch.chdir(tmp_path)
    names, runner, parser = {}, doctest.DocTestRunner(optionflags=FLAGS), doctest.DocTestParser()
    for i, block in enumerate(blocks_of(page.read_text(encoding="utf-8"), "pycon")):
        if not can_run(block):
            continue
        session = parser.get_doctest(block, names, f"{page.name} session {i}", str(page), 0)
        runner.run(session, clear_globs=False)
        names = session.globs
    assert runner.tries > 0 and runner.failures == 0


def sections(text):
    """The numpydoc sections of a docstring: heading to text."""
    lines, found, heading = inspect.cleandoc(text).splitlines(), {}, None
    for i, line in enumerate(lines):
        if i + 1 < len(lines) and line and re.fullmatch(r"-{3,}", lines[i + 1]):
            heading = line
            assert len(lines[i + 1]) == len(line), f"underline of {line}"
            found[heading] = []
        elif heading and not re.fullmatch(r"-{3,}", line):
            found[heading].append(line)
    return {name: "\n".join(body) for name, body in found.items()}


def documented_names(body):
    """The names that a Parameters section describes, one or several to a line."""
    heads = [line.split(" : ")[0] for line in body.splitlines() if line and not line.startswith(" ")]
    return [name.strip().lstrip("*") for head in heads for name in head.split(",")]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_documented(name):
    function = operator.attrgetter(name)(q)
    found = sections(function.__doc__)
    first = inspect.cleandoc(function.__doc__).splitlines()[0]
    assert first.endswith(".") or first.endswith(":") or len(inspect.cleandoc(function.__doc__).split("\n\n")) > 1
    signature = inspect.signature(function)
    if signature.parameters:
        assert set(documented_names(found["Parameters"])) == set(signature.parameters)
    returns = str(signature.return_annotation)
    is_context = "ContextManager" in returns
    if not is_context and name != "get_num_threads":
        assert found["Returns"].strip()
    if signature.parameters and name != "show_config":
        assert re.search(r"Error", found["Raises"])
    if name != "get_num_threads":
        assert ">>>" in found["Examples"]


@pytest.mark.parametrize("name", CLASSES)
def test_classes_are_documented(name):
    found = getattr(q, name)
    assert found.__doc__.strip() and (">>>" in found.__doc__ or issubclass(found, _C.Kernel))
    parameters = [p for p in inspect.signature(found).parameters if p != "self"]
    text = found.__doc__ + (found.__init__.__doc__ or "")
    if issubclass(found, q.VariableQuantizationKernel | q.AffineQuantize | q.AffineDequantize | q.AffineQmmT):
        assert set(documented_names(sections(found.__doc__)["Parameters"])) == set(parameters)
    else:
        assert "parameters as" in text or not parameters or "Attributes" in text or "Parameters" in text
    for method, value in vars(found).items():
        if not method.startswith("_") and callable(value):
            assert value.__doc__, f"{name}.{method}"


# Methods of kernels are the functions of the same names, which their docstrings point to.
METHODS = [
    f"{name}.{method}"
    for name in CLASSES
    if not issubclass(getattr(q, name), _C.Kernel)
    for method, value in vars(getattr(q, name)).items()
    if not method.startswith("_") and isinstance(value, (types.FunctionType, classmethod, staticmethod))
]


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_documented(name):
    method = operator.attrgetter(name)(q)
    found, signature = sections(method.__doc__), inspect.signature(method)
    parameters = {p for p in signature.parameters if p != "self"}
    assert set(documented_names(found.get("Parameters", ""))) == parameters
    assert "Returns" in found or signature.return_annotation == "None"
    if parameters:
        assert re.search(r"Error", found["Raises"])
    assert ">>>" in found["Examples"]


def test_everything_public_is_there_and_sorted():
    assert sorted(q.__all__) == q.__all__
    assert sorted(quantization.mlx.__all__) == quantization.mlx.__all__
    for name in PUBLIC:
        assert getattr(q, name).__doc__


@pytest.mark.skipif(SMALL, reason="the same on every CPU")
def test_functions_of_small_floats_are_what_their_script_writes():
    for path, text in runpy.run_path(str(ROOT / "src" / "fp_functions.py"))["modules"]().items():
        assert path.read_text() == text, path.name


def test_stubs_name_what_there_is():
    text = (Path(q.__file__).parent / "_C.pyi").read_text()
    stubs = set(re.findall(r"^(?:def|class) (\w+)", text, re.MULTILINE))
    assert stubs == {name for name in dir(_C) if not name.startswith("_")}
    members = {name for name in re.findall(r"^    def (\w+)", text, re.MULTILINE) if not name.startswith("_")}
    assert members == {name for name in dir(_C.Plan) if not name.startswith("_")}
    assert (Path(q.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("name", sorted(name for name in dir(_C) if inspect.isbuiltin(getattr(_C, name))))
def test_signatures_of_the_core_are_those_of_the_stubs(name):
    import ast

    stub = (Path(q.__file__).parent / "_C.pyi").read_text()
    tree = {node.name: node for node in ast.parse(stub).body if isinstance(node, ast.FunctionDef)}
    expected = [argument.arg for argument in (*tree[name].args.posonlyargs, *tree[name].args.args)]
    assert list(inspect.signature(getattr(_C, name)).parameters) == expected
    assert inspect.getdoc(getattr(_C, name))


def test_importing_is_enough_with_numpy_alone():
    """None of the optional packages is imported unless asked for."""
    script = "import sys, quantization; print(*sys.modules)"
    path = os.pathsep.join([str(Path(q.__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        check=True,
        capture_output=True,
        text=True,
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    optional = {"ml_dtypes", "safetensors", "gguf", "tokenizers", "tqdm", "matplotlib", "mlx", "torch", "jax"}
    optional.add("hypothesis")
    assert not loaded & optional
