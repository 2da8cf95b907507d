"""Builds quantization._C with plain setuptools: instruction sets are chosen by target regions in the sources."""

import os
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent

sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.c"))
headers = sorted(str(path.relative_to(ROOT)) for pattern in ("*.h", "*.def") for path in (ROOT / "csrc").rglob(pattern))

# -g1: line numbers; where Python itself was built with -g, all its variables would take half the time of compiling.
# -fno-math-errno lets rintf and fabsf be instructions; it changes no result. Contraction would change results.
flags = ["-g1", "-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra"]
if "-O" not in os.environ.get("CFLAGS", ""):
    flags.append("-O3")

setup(
    license="MIT",
    ext_modules=[
        Extension(
            "quantization._C",
            sources,
            depends=headers,
            extra_compile_args=flags,
            extra_link_args=["-pthread", "-lm"],
            py_limited_api=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
