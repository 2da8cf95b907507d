"""A quantized matrix as one object: its parts, its format, and products with it."""

from __future__ import annotations

import math
import operator
from typing import Any, NoReturn

import numpy as np

from ._errors import names_itself
from ._formats import Format, as_format

__all__ = ["QTensor"]


class QTensor:
    """A matrix in one of the stored formats.

    Parameters
    ----------
    codes : array of uint32, shape (..., N, K * bits / 32)
    scales : array, shape (..., N, K / group_size)
    biases : array like `scales`, optional
        Of mode "affine" only, which needs them.
    mode : str, default "affine"
    bits, group_size : int, optional
        If one is given the other is inferred from the shapes; without either, those that MLX takes by default.
    global_scale : float, optional
        Of mode "nvfp4" only, see `nvfp4_quantize`.
    k : int, optional
        K, where rows end within their last group, as ``pad=True`` stores them; by default groups are full.

    Attributes
    ----------
    codes, scales, biases : numpy.ndarray
        The parts as they were given: no copies. `biases` is None where the mode has none. Those of uint16 hold bits of
        bfloat16; scales of the other modes are uint8.
    mode, bits, group_size, global_scale, k
        As above.
    shape : tuple of int
        Of the matrix that they stand for, (..., N, K).

    Raises
    ------
    TypeError, ValueError
        If the parts do not fit together, or no such format exists.

    Notes
    -----
    ``x @ t.T`` and ``x @ t`` multiply straight from the codes; ``np.asarray(t)`` is ``t.dequantize()``; ``t[index]``
    picks along the first axis and stays quantized. Objects can be pickled; parts that are views of a mapped file are
    then written out.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> t = q.QTensor.quantize(np.eye(64, dtype=np.float32), "affine", bits=4)
    >>> t
    QTensor(64x64, affine 4 g64, float32 scales, 5.00 bits/weight, 2,560 bytes)
    >>> x = np.arange(64, dtype=np.float32)
    >>> (x @ t.T)[1:4].round(3)
    array([1., 2., 3.], dtype=float32)
    >>> np.asarray(t[1])[:3].round(3)
    array([0., 1., 0.], dtype=float32)
    """

    # NumPy's operators leave `array @ tensor` to the methods here instead of decoding the tensor.
    __array_ufunc__ = None

    @names_itself("QTensor")
    def __init__(
        self,
        codes: Any,
        scales: Any,
        biases: Any = None,
        *,
        mode: str = "affine",
        bits: int | None = None,
        group_size: int | None = None,
        global_scale: float | None = None,
        k: int | None = None,
    ) -> None:
        self.codes, self.scales = np.asarray(codes), np.asarray(scales)
        self.biases = None if biases is None else np.asarray(biases)
        if self.codes.dtype != np.uint32 or self.codes.ndim == 0:
            raise TypeError(f"codes must be an array of uint32, got {self.codes.dtype} of {self.codes.shape}")
        if self.codes.shape[:-1] != self.scales.shape[:-1] or self.scales.ndim == 0:
            raise ValueError(f"codes of {self.codes.shape} do not go with scales of {self.scales.shape}")
        self.format = _find_format(mode, bits, group_size, self.codes.shape[-1], self.scales.shape[-1])
        if (self.biases is None) == (mode == "affine"):
            raise ValueError(f"mode {mode!r} {'needs biases' if mode == 'affine' else 'has no biases'}")
        if self.biases is not None and self.biases.shape != self.scales.shape:
            raise ValueError(f"biases of {self.biases.shape} do not go with scales of {self.scales.shape}")
        self.scales = _take_scales(mode, self.scales)
        if self.biases is not None and self.biases.dtype != self.scales.dtype:
            raise TypeError(f"biases of {self.biases.dtype} do not go with scales of {self.scales.dtype}")
        if global_scale is not None and mode != "nvfp4":
            raise ValueError(f"mode {mode!r} has no global_scale")
        self.global_scale = None if global_scale is None else _take_global_scale(global_scale)
        self.k = _take_length(k, self.scales.shape[-1], self.group_size)

    @classmethod
    @names_itself("QTensor.quantize")
    def quantize(
        cls, w: Any, mode: str = "affine", *, bits: int | None = None, group_size: int | None = None, **options: Any
    ) -> QTensor:
        """Quantize a float array along its last axis.

        Parameters
        ----------
        w : array_like of floats, shape (..., K)
        mode : str, default "affine"
        bits, group_size : int, optional
            Where the mode leaves a choice; by default 4 and 64.
        **options
            As the function ``<mode>_quantize`` takes them: `profile`, `scale_dtype`, `mx_scale`, `global_scale`, `pad`
            (the tensor then knows where its rows end).

        Returns
        -------
        QTensor

        Raises
        ------
        TypeError
            If w is no array of floats, or an option is none of the mode's.
        ValueError
            If no such format exists, or it does not divide w's last axis and `pad` is not True.

        Examples
        --------
        >>> import numpy as np, quantization as q
        >>> w = np.linspace(-1, 1, 200, dtype=np.float32).reshape(2, 100)
        >>> q.QTensor.quantize(w, bits=8, group_size=32, pad=True)
        QTensor(2x100, affine 8 g32, float32 scales, rows padded to 128, 12.80 bits/weight, 320 bytes)
        >>> q.QTensor.quantize(w[:, :96], "nvfp4", global_scale=1.0)
        QTensor(2x96, nvfp4, global scale 1, 4.67 bits/weight, 112 bytes)
        """
        target = as_format((mode, bits, group_size))
        parts = target.call("quantize", w, **options)
        chosen, k = options.get("global_scale"), np.shape(w)[-1] if options.get("pad") else None
        return cls(*parts, mode=mode, bits=target.bits, group_size=target.group_size, global_scale=chosen, k=k)

    @property
    def mode(self) -> str:
        """How codes are meant: "affine" or one of MLX's formats of small floats."""
        return self.format.mode

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.format.bits

    @property
    def group_size(self) -> int:
        """How many elements share a scale."""
        return self.format.group_size

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix, its last axis counted in elements."""
        return (*self.scales.shape[:-1], self.k)

    @property
    def stored_k(self) -> int:
        """Length of a stored row, in elements: `k` and the zeros that fill its last group."""
        return self.scales.shape[-1] * self.group_size

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.scales.ndim

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def parts(self) -> dict[str, np.ndarray]:
        """The arrays by the names under which MLX stores them: weight, scales, biases, global_scale."""
        parts = {"weight": self.codes, "scales": self.scales}
        if self.biases is not None:
            parts["biases"] = self.biases
        if self.global_scale is not None:
            parts["global_scale"] = np.array([self.global_scale], np.float32)
        return parts

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element, scales included."""
        return 8 * self.nbytes / self.size if self.size else math.nan

    @property
    def T(self) -> _Transposed:  # noqa: N802 - NumPy's name
        """The transposed matrix, for ``x @ t.T``."""
        return _Transposed(self)

    @names_itself("QTensor.dequantize")
    def dequantize(self, dtype: Any = np.float32) -> np.ndarray:
        """Decode to an array of floats.

        Parameters
        ----------
        dtype : dtype or str, default float32
            Type to round to, once.

        Returns
        -------
        numpy.ndarray
            Of `shape`.

        Raises
        ------
        TypeError, ValueError
            If `dtype` is none of float32, float16 and bfloat16.
        ImportError
            If it is bfloat16 and ml_dtypes has not been imported.

        Examples
        --------
        >>> import numpy as np, quantization as q
        >>> t = q.QTensor.quantize(np.linspace(-1, 1, 64, dtype=np.float32)[None], bits=8)
        >>> t.dequantize("float16")[0, :3]
        array([-1.    , -0.9683, -0.937 ], dtype=float16)
        """
        decoded: np.ndarray = self._call("dequantize", dtype=dtype, k=None if self.k == self.stored_k else self.k)
        return decoded

    def _call(self, suffix: str, *arrays: Any, **options: Any) -> Any:
        if self.global_scale is not None:
            options["global_scale"] = self.global_scale
        if self.mode == "affine" and self.scales.dtype == np.uint16:
            options["input_dtype"] = "bfloat16"
        biases = () if self.biases is None else (self.biases,)
        return self.format.call(suffix, *arrays, self.codes, self.scales, *biases, **options)

    @names_itself("QTensor")
    def __rmatmul__(self, x: Any) -> Any:
        return self._call("qmm_n", x, output_features=self.k)

    def __matmul__(self, x: Any) -> NoReturn:
        _refuse_the_left()

    @names_itself("QTensor")
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("decoding makes a new array: np.asarray(tensor) works, copy=False cannot")
        return self.dequantize().astype(np.float32 if dtype is None else dtype, copy=False)

    def __len__(self) -> int:
        return self.shape[0]

    @names_itself("QTensor")
    def __getitem__(self, index: Any) -> QTensor:
        if isinstance(index, tuple) or self.ndim < 2:
            raise IndexError("index the first axis of at least two; the last one is packed")
        parts = (part if part is None else part[index] for part in (self.codes, self.scales, self.biases))
        sizes = {"bits": self.bits, "group_size": self.group_size, "k": self.k}
        return QTensor(*parts, mode=self.mode, global_scale=self.global_scale, **sizes)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape))
        scales = f", {self.scales.dtype} scales" if self.mode == "affine" else ""
        extra = "" if self.global_scale is None else f", global scale {self.global_scale:g}"
        extra += "" if self.k == self.stored_k else f", rows padded to {self.stored_k}"
        return (
            f"QTensor({shape}, {self.format}{scales}{extra}, {self.bits_per_weight:.2f} bits/weight, "
            f"{self.nbytes:,} bytes)"
        )


class _Transposed:
    """``t.T`` of a `QTensor`: the codes stay as they are, and ``x @ t.T`` reads them row by row."""

    __array_ufunc__ = None

    def __init__(self, tensor: QTensor) -> None:
        self.T = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.T.shape
        return (*shape[:-2], *shape[-2:][::-1])

    @names_itself("QTensor")
    def __rmatmul__(self, x: Any) -> Any:
        length = np.shape(x)[-1:]
        if length and length[0] != self.T.k:  # the product underneath takes any that ends within the last group
            raise ValueError(f"x.shape[-1] must be {self.T.k}, the length of the matrix's rows, got {length[0]}")
        return self.T._call("qmm_t", x)

    def __matmul__(self, x: Any) -> NoReturn:
        _refuse_the_left()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        decoded = self.T.__array__(dtype, copy)
        return decoded.swapaxes(-1, -2) if decoded.ndim > 1 else decoded

    def __repr__(self) -> str:
        return f"{self.T!r}.T"


def _refuse_the_left() -> NoReturn:
    raise TypeError(
        "QTensor: a quantized matrix t stands on the right: x @ t.T or x @ t; on the left it has to be decoded: "
        "np.asarray(t) @ x"
    )


def _take_scales(mode: str, scales: np.ndarray) -> np.ndarray:
    """Check the type of scales; those of small floats become the bytes that they are."""
    floats, small = ("float32", "float16", "bfloat16", "uint16"), ("uint8", "float8_e8m0fnu", "float8_e4m3fn")
    wanted = floats if mode == "affine" else small
    if scales.dtype.name not in wanted:
        raise TypeError(f"scales of mode {mode!r} must be of {' or '.join(wanted)}, got {scales.dtype}")
    return scales if mode == "affine" else scales.view(np.uint8)


def _take_global_scale(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"global_scale must be a number, got {type(value).__name__}")
    if not 0 <= value <= float(np.finfo(np.float32).max):
        raise ValueError(f"global_scale must be finite and not negative, got {value}")
    return float(value)


def _take_length(k: int | None, groups: int, group_size: int) -> int:
    """Check the length of rows of so many groups."""
    full = groups * group_size
    if k is None:
        return full
    if isinstance(k, bool) or not hasattr(k, "__index__"):
        raise TypeError(f"k must be an integer, got {type(k).__name__}")
    k = operator.index(k)
    least = max(0, full - group_size + 1)
    if not least <= k <= full:
        raise ValueError(f"k must be from {least} to {full}, as rows have {groups} groups, got {k}")
    return k


def _find_format(mode: str, bits: int | None, group_size: int | None, words: int, groups: int) -> Format:
    """Resolve the format of `words` 32-bit words of codes and `groups` scales per row, and check that they agree."""
    if mode == "affine" and groups and (bits is None) != (group_size is None):
        per_group = 32 * words // groups  # bits * group_size
        bits, group_size = bits or per_group // (group_size or 1), group_size or per_group // (bits or 1)
    found = as_format((mode, bits, group_size))
    if 32 * words != groups * found.group_size * found.bits:
        raise ValueError(
            f"{found} has {found.group_size * found.bits // 32} words of codes to each scale, got "
            f"{words} words and {groups} scales a row"
        )
    return found
