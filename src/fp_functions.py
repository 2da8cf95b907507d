"""Writes what Python has of the formats of small floats: _quantize_fp.py, _matmul_fp.py, _gather_fp.py of the package.

An operation is defined here once. Each format of the family ``fp`` in ``csrc/formats.def`` gets it as a function, with
signature and docstring of its own, and as a kernel class. ``python src/fp_functions.py`` writes the modules, with
``--check`` it compares instead and exits with 1 if one is not what this program writes. Only the standard library is
needed.

In docstrings ``$name`` is a field of the format, of its element or of its scale; where one stands alone in a line, the
line takes as many as the field has, be it none. What a docstring says of parameters that a format does not have is left
out for that format.
"""

from __future__ import annotations

import ast
import re
import string
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parent / "quantization"
FORMATS = Path(__file__).parents[1] / "csrc" / "formats.def"
WIDTH = 120

# What a parameter's annotation and default are wherever it occurs.
PARAMETERS = {
    "x": "Any",
    "w": "Any",
    "scales": "Any",
    "indices": "Any",
    "lhs_indices": "Any = None",
    "rhs_indices": "Any = None",
    "output_features": "int | None = None",
    "transpose": "bool = True",
    "sorted_indices": "bool = False",
    "profile": 'str = "metal"',
    "mx_scale": 'str = "up"',
    "global_scale": "float | None = None",
    "dtype": "Any = None",
    "k": "int | None = None",
    "pad": "bool = False",
    "accumulate": 'str = "exact"',
    "activations": "str | None = None",
    "out": "Any = None",
    "input_dtype": "str | None = None",
}

# Those that only formats with the one kind of scale or the other have.
TAKEN_BY_ONE = ("mx_scale", "global_scale")

# ---- the fields of docstrings ----

ELEMENTS = {
    "fp4_e2m1": {
        "element": "FP4 (E2M1)",
        "ties": "toward zero",
        "word_of_ones": "0x22222222",
        "odd_codes": "",
        "options": """\
accumulate : {"exact", "float"}
    How sums are taken. "exact": x is put into block fixed point (22 bits for float32 x, 15 for float16 and
    bfloat16, relative to the largest magnitude of each group), products are summed in integers, without error, and
    one float32 term per group is added in a fixed order. "float": plain float32 sums, whatever x is, with the error
    and the promises of such (see Notes).
activations : "int8", optional
    Lossy: uses 7 bits of x instead, an error up to 2^-7 of each group's largest magnitude. Only with "exact".
""",
        "along_columns": """\
With "exact", the products x * scale are formed in float32 here and put into block fixed point, over blocks of
64 along K, with 21 bits for float32 x.
""",
        "sums": """\
There the error of an output is at most the sum over its groups of 2^-p * max|x| * sum|W|, p = 22 for float32 x and
15 for float16 and bfloat16, plus about one float32 rounding per group, as long as no scale is within a factor 2^31
of overflowing float32. Weights are used as stored, scale * code, without rounding them first. Rows of x with NaN or
infinities are computed by plain float32 sums in those groups, at the speed of scalar code; a NaN result is always
the NaN with bits 0x7fc00000.

With accumulate="float" the result is the same bits for every number of threads, and each time, for given shapes on
one instruction set, but not across instruction sets or values of M. As long as no weight overflows float32, and no
sum of |x| * |W| or of |x| times the numbers that codes stand for, its error is at most about
(min(K, 256) + K / 16 + 13) * 2^-24 * sum(|x| * |W|), beside what underflow takes from products, and usually far
less. NaN and infinities go where IEEE arithmetic takes them, at full speed: an output that one has a share in is
not finite, though it may be NaN where exact arithmetic has an infinity, as where its code is 0.
""",
        "gathered_bits": """\
With accumulate="float" the bits depend on how many rows of x meet the same weights, not on threads.
""",
        "by_infinity": "gives an infinity, or NaN where its sum of products is 0",
    },
    "fp8_e4m3": {
        "element": "FP8 (E4M3)",
        "ties": "to even codes",
        "word_of_ones": "0x38383838",
        "odd_codes": "Codes 0x7f and 0xff are NaN.\n",
        "options": """\
accumulate : {"exact", "float"}
    The same here; see Notes.
activations : None
    "int8" is refused: it would gain nothing.
""",
        "along_columns": "",
        "sums": """\
Weights enter as scale * code, which is a float32 without rounding, and are infinite where it overflows. Sums are
float32, and each product is fused with its addition; their order is fixed: in panels of 256 along K there are 16
chains, element k belonging to chain k % 16, whose ends are added up in order, and then panel to panel. So the error
of an output is at most (32 + K / 256) * 2^-24 * sum(|x| * |W|), beside underflow, and usually far less.
accumulate="float" is the same. NaN and infinities go where IEEE arithmetic takes them; a NaN result is always the
NaN with bits 0x7fc00000. The codes 0x7f and 0xff are NaN.
""",
        "gathered_bits": "",
        "by_infinity": "gives infinities, or NaN where a code is 0",
    },
}

SCALES = {
    "e8m0": {
        "takes": "mx_scale",
        "scale": "a power of two",
        "origin": "OCP",
        "scale_dtype": "float8_e8m0fnu",
        "scale_bytes": "E8M0: byte b stands for 2**(b - 127).\n",
        "odd_groups": """\
A group with NaN or an infinity gets scale 255, infinity, and codes 0, so that all of it decodes to NaN. One of
zeros gets scale 0 ("metal") or 127 ("cpu"). Scales below 2**-127 are that; MLX's CPU backend wraps their byte.
""",
        "decoding": "2**(scale - 127) * code",
        "odd_scales": "Scale 255 is infinity.\n",
        "one": "127",
        "sums_of_odd_scales": "Scale 255 is infinity: a group of such a scale $by_infinity.\n",
    },
    "fp8_e4m3": {
        "takes": "global_scale",
        "scale": "an FP8 (E4M3) scale",
        "origin": "NVIDIA",
        "scale_dtype": "float8_e4m3fn",
        "scale_bytes": "E4M3.\n",
        "odd_groups": """\
A group so small that its scale rounds to 0 gets codes 0. In one with NaN or an infinity the scale is 448, the
largest, and those elements get code 0.
""",
        "decoding": "scale * code, times global_scale / 2688 if there is one",
        "odd_scales": "Scales 0x7f and 0xff are NaN.\n",
        "one": "0x38",
        "sums_of_odd_scales": """\
Scales 0x7f and 0xff are NaN. With a global scale, all results are multiplied by float32(global_scale / 2688) at the
end.
""",
    },
}


# ---- the operations ----


@dataclass(frozen=True)
class Operation:
    """An operation: its name after the mode's, the function of `_C` that runs it, its parameters, what it returns."""

    name: str
    core: str
    signature: str
    doc: str
    returns: str = "Any"
    of_kernel: str = "Multiply"


QUANTIZE = Operation(
    name="quantize",
    core="quantize_fp",
    signature="w * profile mx_scale global_scale pad out input_dtype",
    returns="tuple[Any, Any]",
    of_kernel="Quantize w",
    doc="""\
Quantize groups of $group of the last axis to $element with $scale per group ($origin's $MODE).

Parameters
----------
w : array_like of float32, float16, bfloat16 or float64, shape (..., K)
    The weights; any strides. K must be a multiple of $group unless `pad` is true. float64 is computed as float32.
profile : {"metal", "cpu"}, default "metal"
    Which of MLX's two algorithms to follow. "metal" computes in float32, rounds ties to even codes and keeps the
    sign of zero, as MLX does on GPUs. "cpu" rounds each step to w's type and ties $ties, and equals MLX's
    CPU backend byte for byte but for the groups of the Notes.
mx_scale : {"up", "nearest", "floor"}, default "up"
    How the largest magnitude of a group over that of the format becomes a power of two. "up" takes the least that
    is not below: nothing saturates, and MLX does so since 0.32.4. "nearest", by the logarithm, is what it did
    before; "floor" is the rule of OCP's specification.
global_scale : float, optional
    By convention the largest magnitude of the whole tensor: scales are stored times 2688 / global_scale, so that
    they use the range of FP8. Without it, and as with 2688, groups beyond 2688 = 448 * 6 saturate.
pad : bool, default False
    Store rows of another K as if zeros followed; see `affine_quantize`.
out : tuple of 2 arrays or None, optional
    Where to put codes and scales; None for a new array.
input_dtype : "bfloat16", optional
    Declares that a w of uint16 holds bfloat16 bits.

Returns
-------
codes : numpy.ndarray of uint32, shape (..., K / $per_word)
scales : numpy.ndarray of uint8, shape (..., K / $group)
    $scale_bytes

Raises
------
TypeError
    If w is no array of floats.
ValueError
    If K is not a multiple of $group, without `pad`.

Notes
-----
$odd_groups

Examples
--------
>>> import numpy as np, quantization as q
>>> codes, scales = q.${mode}_quantize(np.full((1, $group), 3.0))
>>> q.${mode}_dequantize(codes, scales)[0, :4]
array([3., 3., 3., 3.], dtype=float32)
""",
)

DEQUANTIZE = Operation(
    name="dequantize",
    core="dequantize_fp",
    signature="w scales * global_scale dtype profile k out",
    of_kernel="Turn codes back into floats",
    doc="""\
Turn $MODE codes back into floats: $decoding.

$odd_codes
$odd_scales

Parameters
----------
w : array of uint32, shape (..., K / $per_word)
    Codes as `${mode}_quantize` packs them; int32 with the same bits is accepted.
scales : array of uint8 or ml_dtypes' $scale_dtype, shape (..., K / $group)
global_scale : float, optional
    What `${mode}_quantize` was given.
dtype : dtype or str, optional
    Type of the result: float32 by default, float16 or bfloat16.
profile : {"metal", "cpu"}, default "metal"
    "metal" computes in float32 and rounds once. "cpu" rounds the scale to `dtype` first, as MLX's CPU backend
    does: in float16 it may over- or underflow.
k : int, optional
    The K of rows that were stored with ``pad=True``; see `affine_dequantize`.
out : array, optional
    Where to put the result.

Returns
-------
numpy.ndarray, shape (..., K)
    bfloat16 is an ml_dtypes array if `dtype` was of ml_dtypes, else uint16 bits.

Raises
------
TypeError
    If the arrays have other dtypes.
ValueError
    If the shapes do not agree.

Examples
--------
>>> import numpy as np, quantization as q
>>> codes, scales = np.full((1, $words), $word_of_ones, np.uint32), np.full((1, 1), $one, np.uint8)
>>> q.${mode}_dequantize(codes, scales)[0, :4]
array([1., 1., 1., 1.], dtype=float32)
""",
)

QMM_T = Operation(
    name="qmm_t",
    core="matmul_fp",
    signature="x w scales * global_scale accumulate activations out input_dtype",
    doc="""\
Compute x @ W.T for a W of shape (N, K) stored as $MODE codes whose groups run along K.

Parameters
----------
x : array_like of float32, float16, bfloat16 or float64, shape (..., M, K) or (K,)
    Any strides. float64 is computed as float32.
w : array of uint32, shape (..., N, K / $per_word)
    Codes as `${mode}_quantize` packs them; int32 with the same bits is accepted.
scales : array of uint8 or ml_dtypes' $scale_dtype, shape (..., N, K / $group)
global_scale : float, optional
    What `${mode}_quantize` was given.
$options
out : array, optional
    Where to put the result; exact shape and dtype, any strides but 0, no overlap with an input.
input_dtype : "bfloat16", optional
    Declares that an x of uint16 holds bfloat16 bits.

Returns
-------
numpy.ndarray, shape (..., M, N) or (N,)
    The batch dimensions of x and w broadcast. The dtype is that of x, float32 for float64; bfloat16 is an ml_dtypes
    array if x was one, else uint16 bits.

Raises
------
TypeError
    If an array has another dtype, or is not in CPU memory.
ValueError
    If shapes do not agree, or an option is not offered.

Notes
-----
With accumulate="exact" the result is the same bits for every number of threads, instruction set and M: a row of x
gives the same alone or in any batch.

$sums

$sums_of_odd_scales

Examples
--------
>>> import numpy as np, quantization as q
>>> codes, scales = q.${mode}_quantize(6 * np.eye(32, dtype=np.float32))
>>> q.${mode}_qmm_t(np.arange(32, dtype=np.float32), codes, scales)[1:4]
array([ 6., 12., 18.], dtype=float32)
""",
)

QMM_N = Operation(
    name="qmm_n",
    core="matmul_fp",
    signature="x w scales output_features * global_scale accumulate activations out input_dtype",
    doc="""\
Compute x @ W for a W of shape (K, N) stored as $MODE codes whose groups run along N.

Parameters
----------
x : array_like of float32, float16, bfloat16 or float64, shape (..., M, K) or (K,)
    Any K and strides.
w : array of uint32, shape (..., K, N / $per_word)
scales : array of uint8 or ml_dtypes' $scale_dtype, shape (..., K, N / $group)
output_features : int, optional
    N, checked against w.
global_scale, accumulate, activations, out, input_dtype
    As in `${mode}_qmm_t`.
    $along_columns

Returns
-------
numpy.ndarray, shape (..., M, N) or (N,)
    As in `${mode}_qmm_t`, with the same promise of equal bits.

Raises
------
TypeError, ValueError
    As in `${mode}_qmm_t`.

Examples
--------
>>> import numpy as np, quantization as q
>>> codes, scales = q.${mode}_quantize(6 * np.eye(32, dtype=np.float32))
>>> q.${mode}_qmm_n(np.arange(32, dtype=np.float32), codes, scales)[1:4]
array([ 6., 12., 18.], dtype=float32)
""",
)

QMV = Operation(
    name="qmv",
    core="matmul_fp",
    signature=QMM_N.signature,
    doc="""\
Compute W @ x for a W of shape (N, K) stored as $MODE codes: `${mode}_qmm_t` by its name for vectors.

Parameters
----------
x : array_like of float32, float16, bfloat16 or float64, shape (K,) or (..., M, K)
    A vector as a rule, but any M will do.
w, scales, global_scale, accumulate, activations, out, input_dtype
    As in `${mode}_qmm_t`.
output_features : int, optional
    N, checked against w.

Returns
-------
numpy.ndarray, shape (N,) or (..., M, N)

Raises
------
TypeError, ValueError
    As in `${mode}_qmm_t`.

Examples
--------
>>> import numpy as np, quantization as q
>>> codes, scales = q.${mode}_quantize(6 * np.eye(32, dtype=np.float32))
>>> q.${mode}_qmv(np.arange(32, dtype=np.float32), codes, scales, 32)[1:4]
array([ 6., 12., 18.], dtype=float32)
""",
)

QVM = Operation(
    name="qvm",
    core="matmul_fp",
    signature=QMM_N.signature,
    doc="""\
Compute x @ W for a W of shape (K, N) stored as $MODE codes: `${mode}_qmm_n` by its name for vectors.

Parameters
----------
x : array_like of float32, float16, bfloat16 or float64, shape (K,) or (..., M, K)
    A vector as a rule, but any M will do.
w, scales, output_features, global_scale, accumulate, activations, out, input_dtype
    As in `${mode}_qmm_n`.

Returns
-------
numpy.ndarray, shape (N,) or (..., M, N)

Raises
------
TypeError, ValueError
    As in `${mode}_qmm_n`.

Examples
--------
>>> import numpy as np, quantization as q
>>> codes, scales = q.${mode}_quantize(6 * np.eye(32, dtype=np.float32))
>>> q.${mode}_qvm(np.arange(32, dtype=np.float32), codes, scales, 32)[1:4]
array([ 6., 12., 18.], dtype=float32)
""",
)

# What the docstrings of gathered products share: of weights, of options, and from what they return to their examples.
GATHERED_WEIGHTS = """\
    Any strides. float64 is computed as float32.
w : array of uint32, shape (..., N, K / $per_word), or (..., K, N / $per_word) where transpose is False
    Codes as `${mode}_quantize` packs them; int32 with the same bits is accepted.
scales : array of uint8 or ml_dtypes' $scale_dtype
    Of w's shape but for its last axis, which has an element for each group of $group.
"""
GATHERED_OPTIONS = """\
global_scale : float, optional
    What `${mode}_quantize` was given, one for all matrices of w.
accumulate, activations, out, input_dtype
    As in `${mode}_qmm_t`.
"""
GATHERED_RESULT = """\
    In the dtype that `${mode}_qmm_t` or `${mode}_qmm_n` gives, and with accumulate="exact", the default, with the bits
    that it gives for each pair alone.
    $gathered_bits

Raises
------
TypeError
    If an array has another dtype, or is not in CPU memory.
ValueError
    If shapes do not agree, or an option is not offered.
IndexError
    If an index is out of range. Every index is checked before anything is computed.

Examples
--------
>>> import numpy as np, quantization as q
>>> codes, scales = q.${mode}_quantize(np.stack([scale * np.eye(32, dtype=np.float32) for scale in (6, 12, 24)]))
"""

GATHER_QMM = Operation(
    name="gather_qmm",
    core="gather_fp",
    signature="x w scales lhs_indices rhs_indices transpose "
    "* sorted_indices global_scale accumulate activations out input_dtype",
    doc=f"""\
Multiply some matrices of x by some $MODE matrices, which indices choose; see `affine_gather_qmm`.

Parameters
----------
x : array_like of float32, float16, bfloat16 or float64, shape (..., M, K)
{GATHERED_WEIGHTS}\
lhs_indices, rhs_indices : array_like of integers, optional
    Which matrices of x and of w, counted through their batch dimensions in C order; negative ones count from the
    end. The shapes of both broadcast. Left out: every one, in the shape of the batch.
transpose : bool
    Whether W is transposed: its groups run along K then, else along N.
sorted_indices : bool
    Says that rhs_indices rise. Nothing depends on it.
{GATHERED_OPTIONS}\

Returns
-------
numpy.ndarray, shape (*indices, M, N)
{GATHERED_RESULT}\
>>> q.${{mode}}_gather_qmm(np.full((1, 32), 0.5, np.float32), codes, scales, rhs_indices=[[2, 0]])[:, :, 0, 7]
array([[12.,  3.]], dtype=float32)
""",
)

GATHER_QMM_RHS = Operation(
    name="gather_qmm_rhs",
    core="gather_rhs_fp",
    signature="x w scales indices output_features transpose * global_scale accumulate activations out input_dtype",
    doc=f"""\
Multiply each row of x by the $MODE matrix that its index chooses; see `affine_gather_qmm_rhs`.

Parameters
----------
x : array_like of float32, float16, bfloat16 or float64, shape (..., K)
{GATHERED_WEIGHTS}\
indices : array_like of integers
    Which matrices of w, counted through its batch dimensions in C order; negative ones count from the end.
output_features : int, optional
    N, checked against w.
transpose : bool
    Whether W is transposed: its groups run along K then, else along N.
{GATHERED_OPTIONS}\

Returns
-------
numpy.ndarray, shape (..., N)
{GATHERED_RESULT}\
>>> q.${{mode}}_gather_qmm_rhs(np.full((3, 32), 0.5, np.float32), codes, scales, [2, 0, 1])[:, 7]
array([12.,  3.,  6.], dtype=float32)
""",
)

MODULES = {
    "_quantize_fp": (
        "Quantization to MLX's formats of small floats, mxfp4, mxfp8 and nvfp4, and its inverse.",
        (QUANTIZE, DEQUANTIZE),
    ),
    "_matmul_fp": (
        "Matrix products with weights in MLX's formats of small floats, straight from the stored codes.",
        (QMM_T, QMM_N, QMV, QVM),
    ),
    "_gather_fp": (
        "Matrix products with weights in MLX's formats of small floats that indices choose, as in mixtures of experts.",
        (GATHER_QMM, GATHER_QMM_RHS),
    ),
}

# ---- how they are written ----

MODULE = """\
\"""$summary\"""

# Written by src/fp_functions.py, which defines each operation once for all formats: change that and run it.

from __future__ import annotations

from typing import Any

from . import _C
from ._kernel import Kernel, called_by_core

__all__ = [
    $names
]
"""

DEFINITIONS = """\


@called_by_core
class $kernel(Kernel):
    \"""`$function` as a kernel that is compiled once.\"""

    _op = "$function"

    def __call__(
        self,
        $signature
    ) -> $returns:
        \"""$of_kernel; see `$function`.\"""
        $core_call_of_kernel


_$function = $kernel()


def $function(
    $signature
) -> $returns:
    \"""$doc
    \"""
    $core_call
"""


def formats() -> list[dict[str, str]]:
    """Return the fields of each format of small floats, in the order of the table."""
    found = []
    for row in re.findall(r"^QZ_FORMAT\((.*)\)$", FORMATS.read_text(), re.MULTILINE):
        _, family, mode, element, bits, group, _, _, scale, _ = row.split(", ")
        if family == "fp":
            sizes = {"group": group, "per_word": str(32 // int(bits)), "words": str(int(group) * int(bits) // 32)}
            found.append({"mode": mode, "MODE": mode.upper(), **sizes, **ELEMENTS[element], **SCALES[scale]})
    return found


def fill(template: str, fields: dict[str, str]) -> str:
    """Put fields into a template; one that is alone in its line gives each of its own lines that line's indentation."""
    whole = re.sub(
        r"^( *)\$(\w+)\n", lambda line: textwrap.indent(fields[line[2]], line[1]), template, flags=re.MULTILINE
    )
    return string.Template(whole).substitute(fields)


def without_others(doc: str, names: list[str]) -> str:
    """Leave out of the section Parameters what is not among the names."""
    begin = doc.index("----------\n") + len("----------\n")
    end = doc.index("\n\n", begin) + 1
    kept = []
    for heads, kind, body in re.findall(r"^(\w[\w, ]*)( : .*)?\n((?: .*\n)*)", doc[begin:end], re.MULTILINE):
        own = [name for name in heads.split(", ") if name in names]
        if own:
            kept.append(f"{', '.join(own)}{kind}\n{body}")
    return doc[:begin] + "".join(kept) + doc[end:]


def core_call(core: str, plan: str, given: list[str], indent: int) -> str:
    """Return the call of a function of `_C`, in as many lines as ruff would give it, None for what is not given."""
    tree = ast.parse((PACKAGE / "_C.pyi").read_text())
    stub = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == core)
    names = [argument.arg for argument in stub.args.posonlyargs][1:]
    arguments = [plan, *(name if name in given else "None" for name in names)]
    line = ", ".join(arguments)
    if len(f"return _C.{core}({line})") <= WIDTH - indent:
        return f"return _C.{core}({line})\n"
    if len(f"    {line}") > WIDTH - indent:
        line = ",\n    ".join(arguments) + ","
    return f"return _C.{core}(\n    {line}\n)\n"


def definitions(operation: Operation, fields: dict[str, str]) -> str:
    """Return the kernel class and the function of an operation on a format."""
    own = [name for name in operation.signature.split() if name not in TAKEN_BY_ONE or name == fields["takes"]]
    function = f"{fields['mode']}_{operation.name}"
    doc = without_others(fill(operation.doc, fields), own)
    return fill(
        DEFINITIONS,
        {
            "function": function,
            "kernel": kernel_name(function),
            "signature": "".join(f"{name}: {PARAMETERS[name]},\n" if name != "*" else "*,\n" for name in own),
            "returns": operation.returns,
            "of_kernel": operation.of_kernel,
            "core_call_of_kernel": core_call(operation.core, "self._plan()", own, 8),
            "core_call": core_call(operation.core, f"_{function}._plan()", own, 4),
            "doc": textwrap.indent(doc, "    ").strip(),
        },
    )


def kernel_name(function: str) -> str:
    """Return the name of the kernel class of a function."""
    return "".join(word.capitalize() for word in function.split("_"))


def lines_of(names: Iterable[str], form: str) -> str:
    """Return a line for each name, in order."""
    return "".join(form.format(name) for name in sorted(names))


def exporting(init: str, names_of: dict[str, list[str]]) -> str:
    """Return the package's __init__ with these names of these modules instead of those that it had."""
    (listed,) = re.findall(r"^__all__ = \[\n(.*?)^\]", init, re.DOTALL | re.MULTILINE)
    public = set(re.findall(r'"(\w+)"', listed))
    for module, names in names_of.items():
        (imported,) = re.findall(rf"^from \.{module} import \(\n(.*?)^\)", init, re.DOTALL | re.MULTILINE)
        public = public - set(re.findall(r"\w+", imported)) | set(names)
        init = init.replace(imported, lines_of(names, "    {},\n"))
    return init.replace(listed, lines_of(public, '    "{}",\n'))


def modules() -> dict[Path, str]:
    """Return the text of each module, and of the one that imports them."""
    texts, names_of = {}, {}
    for module, (summary, operations) in MODULES.items():
        functions = [f"{fields['mode']}_{operation.name}" for fields in formats() for operation in operations]
        names_of[module] = [*functions, *map(kernel_name, functions)]
        head = fill(MODULE, {"summary": summary, "names": lines_of(names_of[module], '"{}",\n')})
        bodies = [definitions(operation, fields) for fields in formats() for operation in operations]
        texts[PACKAGE / f"{module}.py"] = head + "".join(bodies)
    init = PACKAGE / "__init__.py"
    return {**texts, init: exporting(init.read_text(), names_of)}


def main() -> int:
    """Write the modules, or compare them."""
    stale = {path: text for path, text in modules().items() if not path.exists() or path.read_text() != text}
    for path, text in stale.items():
        if sys.argv[1:] == ["--check"]:
            print(f"{path.name} is not what {Path(__file__).name} writes", file=sys.stderr)
        else:
            path.write_text(text)
    return 1 if stale and sys.argv[1:] == ["--check"] else 0


if __name__ == "__main__":
    sys.exit(main())
