"""What MLX's functions take and refuse, and which function of this package does the work: for `quantization.mlx`."""

from __future__ import annotations

import importlib
import operator
import sys
from typing import Any, NamedTuple

import numpy as np

from ._extras import require

_package = importlib.import_module(__package__)

# Group sizes and widths of each mode as MLX has them, its defaults first. What else this package can store is no
# business of MLX's functions.
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((64, 32, 128), (4, 1, 2, 3, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}

# Scales of nvfp4 are stored times 448 * 6 / global_scale: the largest E4M3 times the largest E2M1.
FULL_RANGE = np.float32(2688)

_FLOAT32, _FLOAT64, _UINT32, _UINT8 = (np.dtype(name) for name in ("float32", "float64", "uint32", "uint8"))
_NUMPY_FLOATS = (_FLOAT32, np.dtype("float16"), _FLOAT64)


class Format(NamedTuple):
    """How weights are stored."""

    mode: str
    group_size: int
    bits: int

    @property
    def options(self) -> dict[str, int]:
        """The keywords that say so to a function of the mode: those of a mode with one choice take none."""
        return {"group_size": self.group_size, "bits": self.bits} if self.mode == "affine" else {}


class Weights(NamedTuple):
    """Stored weights that have passed `take_weights`."""

    format: Format
    parts: tuple[np.ndarray, ...]
    """Codes, scales and, in affine mode, biases."""

    @property
    def batch(self) -> tuple[int, ...]:
        """The axes before the last two."""
        return self.parts[0].shape[:-2]


def native(mode: str, operation: str) -> Any:
    """Find the function of this package that does an operation on a mode's weights; all are looked up here."""
    return getattr(_package, f"{mode}_{operation}")


def bfloat16() -> Any:
    """Return the bfloat16 type of ml_dtypes."""
    return require("ml_dtypes", "io").bfloat16


# ---------------------------------------------------------------------------------------------------------------------
# Arrays


def _foreign_array(op: str, name: str, value: Any) -> np.ndarray:
    """Another library's array as NumPy's, in the same memory where that library can share it."""
    try:
        if str(value.dtype).endswith(".bfloat16"):  # PyTorch's and MLX's: NumPy knows none, only integers can cross
            library = sys.modules[type(value.dtype).__module__]
            return np.asarray(value.view(library.int16)).view(bfloat16())
        if not hasattr(value, "__array__"):
            return np.from_dlpack(value)
        return np.asarray(value)
    except (TypeError, ValueError, BufferError, RuntimeError, AttributeError) as error:
        raise TypeError(f"{op}: {name} must be an array in the CPU's memory: {error}") from error


def as_array(op: str, name: str, value: Any) -> np.ndarray:
    """Take a NumPy array as it is, another library's tensor by its memory, numbers and lists of them as float32."""
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "dtype"):
        return _foreign_array(op, name, value)
    if not isinstance(value, (list, tuple, int, float)):
        raise TypeError(f"{op}: {name} must be an array, got {type(value).__name__}")
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _is_float(dtype: np.dtype) -> bool:
    return dtype in _NUMPY_FLOATS or dtype.name == "bfloat16"


def take_floats(op: str, name: str, value: Any) -> np.ndarray:
    """Take an array of floats; others are a ValueError, as in MLX."""
    array = as_array(op, name, value)
    if not _is_float(array.dtype):
        raise ValueError(f"{op}: {name} must have dtype float32, float16, bfloat16 or float64, got {array.dtype}")
    return array


def take_narrow_floats(op: str, name: str, value: Any) -> np.ndarray:
    """Take an array of floats but float64, which MLX refuses where it quantizes operands itself."""
    array = take_floats(op, name, value)
    if array.dtype == _FLOAT64:
        raise ValueError(f"{op}: {name} must have dtype float32, float16 or bfloat16, got float64")
    return array


def take_flag(op: str, name: str, value: Any) -> bool:
    """Take True or False and nothing that only counts as such."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{op}: {name} must be True or False, got {type(value).__name__}")
    return bool(value)


def take_indices(op: str, name: str, value: Any) -> np.ndarray | None:
    """Take an array of integers; others are a ValueError, as in MLX, to which negative ones are out of range."""
    if value is None:
        return None
    array = as_array(op, name, value)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{op}: {name} must have an integer dtype, got {array.dtype}")
    if array.dtype.kind == "i" and array.size and array.min() < 0:
        raise IndexError(f"{op}: {name} must not be negative, got {array.min()}")
    return array


def result_type(x: np.ndarray) -> np.dtype:
    """Return the type of a result that follows x: float64 is computed as float32."""
    return _FLOAT32 if x.dtype == _FLOAT64 else x.dtype


def take_dtype(op: str, dtype: Any) -> Any:
    """Take the dtype of a result: this library's, NumPy's, PyTorch's, JAX's, MLX's, or its name."""
    if dtype is None or isinstance(dtype, (int, float)):
        raise TypeError(f"{op}: dtype must be a dtype or its name, got {dtype!r}")
    names = (dtype if isinstance(dtype, str) else None, getattr(dtype, "name", None), getattr(dtype, "__name__", None))
    name = next((name for name in names if isinstance(name, str)), str(dtype).rpartition(".")[2])
    if name not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"{op}: dtype must be float32, float16 or bfloat16, got {name}")
    return bfloat16() if name == "bfloat16" else name


# ---------------------------------------------------------------------------------------------------------------------
# Formats and stored weights


def _list(choices: tuple[int, ...]) -> str:
    return ", ".join(map(str, sorted(choices)))


def take_format(op: str, group_size: int | None, bits: int | None, mode: str) -> Format:
    """Check mode, group size and width; left out, they are MLX's defaults."""
    if not isinstance(mode, str):
        raise TypeError(f"{op}: mode must be a string, got {type(mode).__name__}")
    if mode not in MODES:
        raise ValueError(f"{op}: mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    group_sizes, widths = MODES[mode]
    group_size = group_sizes[0] if group_size is None else operator.index(group_size)
    bits = widths[0] if bits is None else operator.index(bits)
    if group_size not in group_sizes:
        raise ValueError(f"{op}: mode {mode!r} has group_size {_list(group_sizes)}, got {group_size}")
    if bits not in widths:
        raise ValueError(f"{op}: mode {mode!r} has bits {_list(widths)}, got {bits}")
    return Format(mode, group_size, bits)


def _take_scales(op: str, scales: Any, biases: Any, mode: str) -> tuple[np.ndarray, ...]:
    if mode != "affine":
        if biases is not None:
            raise ValueError(f"{op}: mode {mode!r} has no biases: biases must be None")
        stored = as_array(op, "scales", scales)
        if stored.dtype != _UINT8:
            raise ValueError(f"{op}: scales of mode {mode!r} must have dtype uint8, got {stored.dtype}")
        return (stored,)
    if biases is None:
        raise ValueError(f"{op}: mode 'affine' needs biases")
    stored, offsets = take_floats(op, "scales", scales), take_floats(op, "biases", biases)
    if stored.shape != offsets.shape:
        raise ValueError(f"{op}: biases must have the shape of scales, {stored.shape}, got {offsets.shape}")
    return stored, offsets


def take_weights(op: str, w: Any, scales: Any, biases: Any, form: Format) -> Weights:
    """Check codes, scales and biases against the format and each other."""
    codes = as_array(op, "w", w)
    if codes.dtype != _UINT32:
        raise ValueError(f"{op}: w must have dtype uint32, got {codes.dtype}")
    parts = (codes, *_take_scales(op, scales, biases, form.mode))
    if codes.ndim < 2 or codes.shape[:-1] != parts[1].shape[:-1]:
        raise ValueError(
            f"{op}: w and scales must have at least 2 dimensions, all but the last the same, "
            f"got shapes {codes.shape} and {parts[1].shape}"
        )
    if codes.shape[-1] * 32 != parts[1].shape[-1] * form.group_size * form.bits:
        raise ValueError(
            f"{op}: with group_size={form.group_size} and bits={form.bits}, scales for a w of shape {codes.shape} have "
            f"{codes.shape[-1] * 32 / (form.group_size * form.bits):g} columns, got {parts[1].shape[-1]}"
        )
    return Weights(form, parts)


def _take_global(op: str, name: str, value: Any) -> np.ndarray:
    scale = np.asarray(value, np.float32) if isinstance(value, (int, float)) else as_array(op, name, value)
    if scale.dtype != _FLOAT32:
        raise ValueError(f"{op}: {name} must have dtype float32, got {scale.dtype}")
    return scale


def _check_global_mode(op: str, name: str, mode: str) -> None:
    if mode != "nvfp4":
        raise ValueError(f"{op}: {name} is of mode 'nvfp4' only, got mode {mode!r}")


def take_global_scale(op: str, name: str, value: Any, mode: str) -> float | None:
    """Take the largest magnitude of a whole tensor, a single float32."""
    if value is None:
        return None
    _check_global_mode(op, name, mode)
    scale = _take_global(op, name, value)
    if scale.size != 1:
        raise ValueError(f"{op}: {name} must be a single number, got shape {scale.shape}")
    return float(scale.reshape(()))


def take_global_scales(op: str, name: str, value: Any, mode: str, batch: tuple[int, ...]) -> np.ndarray | None:
    """Take one global scale per matrix of a batch."""
    if value is None:
        return None
    _check_global_mode(op, name, mode)
    scales = _take_global(op, name, value)
    if scales.shape != batch:
        raise ValueError(f"{op}: {name} must have one number for each matrix, shape {batch}, got {scales.shape}")
    return scales


def output_features(op: str, x: np.ndarray, weights: Weights, transpose: bool) -> int:
    """Check that x has as many columns as W has inputs, padding included, and return W's number of outputs."""
    rows, columns = weights.parts[0].shape[-2], weights.parts[1].shape[-1] * weights.format.group_size
    inputs, outputs = (columns, rows) if transpose else (rows, columns)
    if x.ndim < 1 or x.shape[-1] != inputs:
        raise ValueError(f"{op}: x.shape[-1] must be {inputs}, the input features of w, got shape {x.shape}")
    return outputs


# ---------------------------------------------------------------------------------------------------------------------
# Work


def multiply(op: str, x: np.ndarray, weights: Weights, transpose: bool) -> np.ndarray:
    """Compute x @ W.T or x @ W; batches broadcast as in NumPy."""
    output_features(op, x, weights, transpose)
    function = native(weights.format.mode, "qmm_t" if transpose else "qmm_n")
    return function(x, *weights.parts, **weights.format.options)


def gather_multiply(
    op: str,
    x: np.ndarray,
    weights: Weights,
    lhs_indices: np.ndarray | None,
    rhs_indices: np.ndarray | None,
    transpose: bool,
    sorted_indices: bool,
) -> np.ndarray:
    """Compute the products of the matrices that the indices name."""
    output_features(op, x, weights, transpose)
    return native(weights.format.mode, "gather_qmm")(
        x,
        *weights.parts,
        lhs_indices=lhs_indices,
        rhs_indices=rhs_indices,
        transpose=transpose,
        sorted_indices=sorted_indices,
        **weights.format.options,
    )


def picked(factors: np.ndarray, indices: np.ndarray | None) -> np.ndarray:
    """Return the factor of each product, with two axes to multiply matrices by; without indices, the batch's own."""
    chosen = factors if indices is None else factors.reshape(-1)[indices]
    return chosen[..., np.newaxis, np.newaxis]
