"""The machine as a benchmark must know it: caches, memory, CPUs, and the environment NumPy's BLAS needs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import _C, get_num_threads
from .._config import compile_plan
from .._version import __version__

PEERS = ("mlx", "torch", "onnxruntime", "openvino", "gguf")
_CPU = Path("/sys/devices/system/cpu")
_SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None


def _sysctl(name: str) -> str | None:
    if sys.platform != "darwin":
        return None
    found = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def cpus() -> list[int]:
    """Return the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _cpu_name() -> str:
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()


def caches() -> dict[str, int]:
    """Return bytes of each level of data cache that the process's CPUs have, distinct ones added up."""
    distinct = {}
    for cpu in cpus():
        for index in sorted((_CPU / f"cpu{cpu}" / "cache").glob("index*")):
            size, level = _read(index / "size"), _read(index / "level")
            if size and level and _read(index / "type") != "Instruction":
                number = int(size[:-1]) * _SUFFIXES[size[-1]] if size[-1] in _SUFFIXES else int(size)
                distinct[level, _read(index / "shared_cpu_list")] = number
    totals: dict[str, int] = {}
    for (level, _), number in distinct.items():
        totals[f"L{level}"] = totals.get(f"L{level}", 0) + number
    for level, name in (("L2", "hw.perflevel0.l2cachesize"), ("L3", "hw.l3cachesize")):
        if level not in totals and (text := _sysctl(name)) and int(text):
            totals[level] = int(text)
    return totals


def last_level_cache() -> int:
    """Return bytes of the largest level of cache, 32 MiB if the system does not tell."""
    return max(caches().values(), default=32 << 20)


def core_cache() -> int:
    """Return bytes of one core's L2, 512 KiB if the system does not tell."""
    return caches().get("L2", len(cpus()) << 19) // len(cpus())


def memory() -> int:
    """Return bytes of memory that are free, or all there are where the system does not tell."""
    for line in (_read(Path("/proc/meminfo")) or "").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def isas() -> list[str]:
    """Return the instruction sets that can run here, best first."""
    return [entry["name"] for entry in _C.isas() if entry["available"]]


_TITLES = {
    "avx512": "AVX-512 (with VNNI and VBMI)",
    "avx2": "AVX2",
    "neon": "NEON",
    "neon_dotprod": "NEON dot products",
}


def lacking(isa: str) -> str:
    """Say that an instruction set cannot run here."""
    return f"this CPU has no {_TITLES.get(isa, isa)}"


def default_isa() -> str:
    """Return the instruction set that calls use: the best, unless the environment asks for another."""
    return compile_plan("quantize", None).isa


def dot_name(isa: str) -> str:
    """Return the instruction that an instruction set's integer dots are made of."""
    name: str = next(entry["dot"] for entry in _C.isas() if entry["name"] == isa)
    return name


def blas_environment() -> dict[str, str]:
    """Return what OpenBLAS must find in the environment before NumPy loads it.

    It chooses kernels by the model of the CPU and takes older ones for models that it does not know, half as fast. Set
    by features instead. A choice that is there already stays.
    """
    if platform.machine() != "x86_64" or "OPENBLAS_CORETYPE" in os.environ:
        return {}
    features = _C.cpu_features()
    if "AVX512F" in features:
        return {"OPENBLAS_CORETYPE": "SkylakeX"}
    return {"OPENBLAS_CORETYPE": "Haswell"} if "AVX2" in features else {}


def restart_with_blas_environment() -> None:
    """Replace this process by one in whose environment NumPy's BLAS takes the right kernels; return if it does."""
    missing = blas_environment()
    if missing:
        environment: MutableMapping[str, str] = {**os.environ, **missing}
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, "-m", "quantization", *sys.argv[1:]], environment)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """Return what a reader of figures must know of the machine, for JSON."""
    versions = {name: found for name in PEERS if (found := _version(name))}
    return {
        "cpu": _cpu_name(),
        "cpus": len(cpus()),
        "threads": get_num_threads(),
        "caches": caches(),
        "memory_gib": round(memory() / 2**30, 1),
        "isas": {name: dot_name(name) for name in isas()},
        "features": _C.cpu_features(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "openblas_coretype": os.environ.get("OPENBLAS_CORETYPE"),
        "versions": {
            "quantization": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "compiler": _C.compiler(),
            **versions,
        },
    }
