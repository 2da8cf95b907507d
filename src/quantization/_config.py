"""Where and how kernels run: devices, instruction sets, threads, and what was found on this machine."""

from __future__ import annotations

import contextlib
import contextvars
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from . import _C
from ._version import __version__

__all__ = ["Config", "device", "get_num_threads", "isa", "set_num_threads", "show_config", "threads"]


class Settings(NamedTuple):
    """What a plan is compiled for: device and ISA by name (None: the default), threads (0: the global limit)."""

    device: str | None = None
    isa: str | None = None
    threads: int = 0


_current: contextvars.ContextVar[Settings | None] = _C._settings


def current_settings() -> Settings | None:
    """Return the settings of the innermost context managers, None where there are none."""
    return _current.get()


def compile_plan(op: str, settings: Settings | None) -> _C.Plan:
    """Resolve an operation's device and ISA: settings first, then the environment, then the best there is."""
    asked = settings or Settings()
    variables = {"device": "QUANTIZATION_DEVICE", "isa": "QUANTIZATION_ISA"}
    names, inherited = {}, {}
    for kind, variable in variables.items():
        name = getattr(asked, kind)
        if name is None and (name := os.environ.get(variable) or None):
            inherited[variable] = name
        names[kind] = name
    try:
        return _C.Plan(op, threads=asked.threads, **names)
    except RuntimeError as error:
        culprits = [f"{variable}={name}" for variable, name in inherited.items() if f"'{name}'" in str(error)]
        if not culprits:
            raise
        raise RuntimeError(f"{error} ({', '.join(culprits)} is in the environment)") from None


@contextlib.contextmanager
def _use(change: Callable[[Settings], Settings]) -> Iterator[None]:
    settings = change(_current.get() or Settings())
    compile_plan("quantize", settings)  # refuses on entering what is not there
    token = _current.set(settings)
    try:
        yield
    finally:
        _current.reset(token)


def device(name: str) -> contextlib.AbstractContextManager[None]:
    """Run the calls inside a ``with`` block on a device.

    Parameters
    ----------
    name : str
        ``"cpu"``, ``"metal"`` or ``"auto"`` (the best there is).

    Raises
    ------
    RuntimeError
        On entering, if the device is not available here; the message says why.

    Examples
    --------
    >>> import quantization as q
    >>> with q.device("cpu"):
    ...     y = q.quantize([0.5], bits=2)
    """
    return _use(lambda settings: settings._replace(device=name))


def isa(name: str) -> contextlib.AbstractContextManager[None]:
    """Run the calls inside a ``with`` block with the CPU kernels of one instruction set.

    Results are the same bits for every instruction set, but for products with ``accumulate="float"``; this is for tests
    and measurements. The environment variable ``QUANTIZATION_ISA`` does the same for a whole process.

    Parameters
    ----------
    name : str
        ``"avx512"``, ``"avx2"``, ``"neon_dotprod"``, ``"neon"``, ``"generic"`` or ``"auto"``.

    Raises
    ------
    RuntimeError
        On entering, if this CPU, its operating system or this build lacks it; the message says what is missing.

    Examples
    --------
    >>> import quantization as q
    >>> with q.isa("generic"):
    ...     y = q.quantize([0.5], bits=2)
    """
    return _use(lambda settings: settings._replace(isa=name))


def threads(n: int) -> contextlib.AbstractContextManager[None]:
    """Let the calls inside a ``with`` block use at most ``n`` threads.

    The limit holds for the Python thread (or task) that entered the block; `set_num_threads` sets the limit of the
    process. Results are the same bits for every number of threads.

    Parameters
    ----------
    n : int
        From 1 to 1024.

    Raises
    ------
    TypeError, ValueError
        If `n` is not an integer, or not in that range.

    Examples
    --------
    >>> import quantization as q
    >>> with q.threads(1):
    ...     y = q.quantize([0.5], bits=2)
    """
    limit = _C.check_num_threads(n)
    return _use(lambda settings: settings._replace(threads=limit))


def set_num_threads(n: int | None) -> int:
    """Set how many threads a call uses at most, the calling one included.

    Parameters
    ----------
    n : int or None
        From 1 to 1024. None restores the default: ``QUANTIZATION_NUM_THREADS``, then ``OMP_NUM_THREADS``, then the
        distinct physical cores within the process's CPU affinity and cgroup quota.

    Returns
    -------
    int
        The limit until now.

    Raises
    ------
    TypeError, ValueError
        If `n` is not an integer, or not in that range.

    Examples
    --------
    >>> import quantization as q
    >>> before = q.set_num_threads(1)
    >>> q.set_num_threads(before)
    1
    """
    return _C.set_num_threads(n)


def get_num_threads() -> int:
    """Return how many threads a call uses at most.

    Inside ``with threads(n)`` this is ``n``.
    """
    settings = _current.get()
    return settings.threads if settings and settings.threads else _C.get_num_threads()


class Config:
    """What `show_config` found; its text is for people, its attributes for programs.

    Attributes
    ----------
    versions : dict of str to str
        This package, Python, NumPy, the compiler, and the optional packages that are installed.
    cpu_features : str
        The instruction sets that the kernels here could use.
    isas, devices : tuple of dict
        Name, whether available, and the reason if not.
    kernels : dict of str to str
        What each operation's compiled kernel says of itself, or why it could not be compiled.
    threads : int
    threads_reason : str
    """

    _OPTIONAL = ("ml_dtypes", "safetensors", "gguf", "tokenizers", "tqdm", "matplotlib", "mlx", "torch")

    def __init__(self) -> None:
        self.versions = {
            "quantization": __version__,
            "Python": f"{platform.python_version()} ({sys.platform}, {platform.machine()})",
            "NumPy": np.__version__,
            "compiler": _C.compiler(),
        }
        self.versions.update({name: found for name in self._OPTIONAL if (found := _version(name))})
        self.cpu_features = _C.cpu_features()
        self.isas = _C.isas()
        self.devices = _C.devices()
        self.kernels = {op: _describe(op) for op in _C.ops()}
        self.threads = get_num_threads()
        limited = (_current.get() or Settings()).threads
        self.threads_reason = f"{limited}: set by threads({limited})" if limited else _C.explain_num_threads()

    def __repr__(self) -> str:
        rows = [(name, value) for name, value in self.versions.items()]
        rows.append(("CPU features", self.cpu_features or "none that the kernels use"))
        rows += [(f"ISA {entry['name']}", _state(entry)) for entry in self.isas]
        rows += [(f"device {entry['name']}", _state(entry)) for entry in self.devices]
        rows += list(self.kernels.items())
        rows.append(("threads", self.threads_reason))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _state(entry: dict) -> str:
    return "available" if entry["available"] else entry["reason"]


def _describe(op: str) -> str:
    try:
        plan = compile_plan(op, _current.get())
    except RuntimeError as error:
        return str(error)
    return f"{plan.device}, {plan.isa}: {plan.variant}"


def show_config() -> Config:
    """Tell what this installation found and chose, as one would paste it into a bug report.

    Returns
    -------
    Config
        Its ``repr`` is a table: versions, CPU features, instruction sets and devices (and why not), the kernel chosen
        for each operation, and the number of threads with where it comes from.

    Examples
    --------
    >>> import quantization as q
    >>> "affine_qmm_t" in repr(q.show_config())
    True
    """
    return Config()
