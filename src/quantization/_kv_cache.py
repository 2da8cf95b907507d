"""Keys and values of a sequence, kept packed, attended to where they lie, and saved to files."""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import _kv_file
from ._errors import names_itself
from ._kv_attention import kv_attention
from ._kv_codec import quantize_kv
from ._kv_store import Store

__all__ = ["KVCache"]

_WIDTHS = {1: (4, 5, 6, 8), 2: (2, 3, 4, 5, 6, 8)}

# The attributes that arguments become, but for norms_dtype, which files name.
_SETTINGS = (
    "heads", "capacity", "head_dim", "bits", "value_bits", "codec", "sliding", "value_dim", "window", "scale",
)  # fmt: skip


class KVCache:
    """Keys and values of the positions of a sequence, rotated and quantized.

    Parameters
    ----------
    heads : int
        Heads of keys and values; queries may have a multiple of them (grouped queries).
    capacity : int
        Positions that there is memory for.
    head_dim : int
        Elements of a key: a multiple of 8 from 8 to 4096. With ``codec=1`` a power of two of these, and 256 or
        512 where `bits` is not 4.
    bits : {2, 3, 4, 5, 6, 8}, default 4
        Of an element's code; with ``codec=1`` 4, 5, 6 or 8.
    value_bits : int, optional
        Of the values' codes, by default `bits`. Keys suffer more from few bits than values.
    codec : {2, 1}, default 2
        2 as `quantize_kv` encodes; 1 as `hadamard_quantize_kv` and `hadamard_quantize_kv_hb` do.
    sliding : bool, default False
        Keep the last `capacity` positions instead of refusing more.
    value_dim : int, optional
        Elements of a value, by default `head_dim`.
    window : int, optional
        How many positions, its own included, a query attends to; by default all, or `capacity` if `sliding`.
    scale : {"unbiased", "least_squares", "norm"}, default "unbiased"
        The factor stored with each block, see `quantize_kv`. Codec 1 has the norm.
    norms_dtype : dtype, default float16
        Of these factors: float16 or float32. Codec 1 has float32.

    Attributes
    ----------
    heads, capacity, head_dim, value_dim, bits, value_bits, codec, sliding, window, scale, norms_dtype
        As above.

    Raises
    ------
    TypeError, ValueError
        For a number of the wrong kind, or a size, width or codec that does not exist; for `scale` and `norms_dtype` as
        `quantize_kv` does.

    Notes
    -----
    Position p lies in slot p mod `capacity`. All memory is taken when the object is made, though most systems bring in
    pages when they are first written. Objects can be copied and pickled; what is written out is the positions held, and
    what a subclass has added. That is done, as is `load`, without a call of ``__init__``.

    Examples
    --------
    >>> import numpy as np, quantization as q
    >>> rng = np.random.default_rng(0)
    >>> k, v = rng.standard_normal((2, 8, 100, 64), dtype=np.float32)  # 8 heads, 100 tokens
    >>> cache = q.KVCache(heads=8, capacity=1024, head_dim=64)
    >>> cache.append(k, v)
    >>> cache
    KVCache(100 of 1024 positions, 8 heads x 64, 4 bits, 4.250 bits/value, 557,056 bytes)
    >>> query = rng.standard_normal((32, 64), dtype=np.float32)  # four queries to each head of keys
    >>> cache.attend(query).shape
    (32, 64)
    """

    def __init__(
        self,
        heads: int,
        capacity: int,
        head_dim: int,
        bits: int = 4,
        value_bits: int | None = None,
        *,
        codec: int = 2,
        sliding: bool = False,
        value_dim: int | None = None,
        window: int | None = None,
        scale: str = "unbiased",
        norms_dtype: Any = np.float16,
    ) -> None:
        self.heads, self.capacity = _take_count("heads", heads), _take_count("capacity", capacity)
        self.codec, self.sliding = _take_integer("codec", codec), _take_flag("sliding", sliding)
        if self.codec not in _WIDTHS:
            raise ValueError(f"KVCache: codec must be 1 or 2, got {codec}")
        self.bits = self._take_bits("bits", bits)
        self.value_bits = self.bits if value_bits is None else self._take_bits("value_bits", value_bits)
        self.head_dim = self._take_dim("head_dim", head_dim, self.bits)
        self.value_dim = self._take_dim("value_dim", self.head_dim if value_dim is None else value_dim, self.value_bits)
        self.window = self._take_window(window)
        self.scale, self.norms_dtype = self._take_norms(scale, norms_dtype)
        self._extent = (0, 0)  # total and length: one assignment, so that an interrupt finds both or neither
        self._keys = self._new_store(self.head_dim, self.bits)
        self._values = self._new_store(self.value_dim, self.value_bits)

    def _take_bits(self, name: str, bits: Any) -> int:
        widths = _WIDTHS[self.codec]
        if _take_integer(name, bits) not in widths:
            known = f"{', '.join(map(str, widths[:-1]))} or {widths[-1]}"
            raise ValueError(f"KVCache: {name} of codec {self.codec} must be {known}, got {bits}")
        return operator.index(bits)

    def _take_dim(self, name: str, dim: Any, bits: int) -> int:
        size = _take_integer(name, dim)
        sizes: Sequence[int]
        if self.codec == 2:
            sizes, rule = range(8, 4097, 8), "a multiple of 8 from 8 to 4096"
        elif bits == 4:
            sizes, rule = [2**k for k in range(3, 13)], "a power of two from 8 to 4096 (codec=1)"
        else:
            sizes, rule = (256, 512), f"256 or 512 with codec=1 and {bits} bits"
        if size not in sizes:
            near = min(sizes, key=lambda fitting: abs(fitting - size))
            other = f", and codec=2 takes {size}" if size in range(8, 4097, 8) else ""
            raise ValueError(f"KVCache: {name} must be {rule}, got {size} ({near} would fit{other})")
        return size

    def _take_window(self, window: Any) -> int | None:
        if window is None:
            return self.capacity if self.sliding else None
        size = _take_count("window", window)
        if self.sliding and size > self.capacity:
            raise ValueError(
                f"KVCache: window must be at most capacity={self.capacity} of a sliding cache, got {size} "
                f"(capacity={size} would hold it)"
            )
        return size

    def _take_norms(self, scale: Any, norms_dtype: Any) -> tuple[str, np.dtype]:
        try:  # the encoder of codec 2 says what there is
            _, norms = quantize_kv(np.zeros(8, np.float32), scale=scale, norms_dtype=norms_dtype)
        except (TypeError, ValueError) as error:
            raise type(error)(f"KVCache: {str(error).removeprefix('quantize_kv: ')}") from None
        if self.codec == 2:
            return scale, norms.dtype
        if scale == "least_squares":
            raise ValueError("KVCache: codec 1 stores the norm: leave scale out, or take codec=2")
        return "norm", np.dtype(np.float32)

    def _new_store(self, dim: int, bits: int) -> Store:
        return Store(self.heads, self.capacity, dim, bits, self.codec, self.scale, self.norms_dtype)

    @property
    def length(self) -> int:
        """Positions held."""
        return self._extent[1]

    @property
    def total(self) -> int:
        """Positions of the sequence: those appended, less those trimmed."""
        return self._extent[0]

    @property
    def start(self) -> int:
        """Slot of the oldest position held."""
        total, length = self._extent
        return (total - length) % self.capacity

    @property
    def keys(self) -> tuple[np.ndarray, np.ndarray]:
        """Packed codes and norms of the keys, all slots: read-only views.

        ``kv_attention`` takes them as they are, with ``length=cache.length, start=cache.start``.
        """
        return self._keys.views()

    @property
    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """Packed codes and norms of the values, as `keys`."""
        return self._values.views()

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, codes and norms."""
        return sum(array.nbytes for array in (*self.keys, *self.values))

    @property
    def bits_per_value(self) -> float:
        """Stored bits per element of keys and values, norms included."""
        return 8 * self.nbytes / (self.heads * self.capacity * (self.head_dim + self.value_dim))

    @names_itself("KVCache.append")
    def append(self, k: Any, v: Any) -> None:
        """Add the keys and values of one token or several.

        Parameters
        ----------
        k : array of floats, shape (heads, head_dim) or (heads, T, head_dim)
            Keys, positions already rotated into them where the model does so.
        v : array of floats, shape (heads, value_dim) or (heads, T, value_dim)
            Values.

        Raises
        ------
        TypeError, ValueError
            For arrays of the wrong type or shape, or more tokens than there is room for. The cache is then what it was.

        Notes
        -----
        A sliding cache keeps the last `capacity` positions. A key or value with a NaN or an infinity makes every result
        NaN that attends to it. After a KeyboardInterrupt a full sliding cache may have lost its oldest positions; what
        it says it holds is right. A cache has no lock: threads that share one take turns.

        Examples
        --------
        >>> import numpy as np, quantization as q
        >>> cache = q.KVCache(2, 4, 64, sliding=True)
        >>> for token in np.random.default_rng(0).standard_normal((6, 2, 64), dtype=np.float32):
        ...     cache.append(token, token)
        >>> cache
        KVCache(last 4 of 6 positions, sliding, 2 heads x 64, 4 bits, 4.250 bits/value, 544 bytes)
        """
        k, tokens = self._take_tokens("k", k, self.head_dim)
        v, of_values = self._take_tokens("v", v, self.value_dim)
        if tokens != of_values:
            raise ValueError(f"KVCache.append: k has {tokens} tokens and v has {of_values}")
        room = self.capacity - self.length
        if tokens > room and not self.sliding:
            raise ValueError(
                f"KVCache.append: {tokens} tokens do not fit: {self.length} of {self.capacity} positions are taken "
                f"({room} would fit, and sliding=True keeps the last {self.capacity})"
            )
        kept = min(tokens, self.capacity)
        encoded = []
        for name, store, tensor in (("k", self._keys, k), ("v", self._values, v)):
            try:
                encoded.append(store.encode(tensor[:, tokens - kept :]))
            except (TypeError, ValueError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                # "quantize_kv: x has dtype ...", in the words of this function
                raise kind(re.sub(r"^\w+: (?:x|src)\b", name, str(error))) from error
        total, length = self._extent
        # What is about to be overwritten is given up first: an interrupt then leaves less, but nothing wrong.
        self._extent = (total, min(length, self.capacity - kept))
        first = total + tokens - kept
        for store, (packed, norms) in zip((self._keys, self._values), encoded, strict=True):
            store.put(first, packed, norms)
        self._extent = (total + tokens, min(length + tokens, self.capacity))

    def _take_tokens(self, name: str, tensor: Any, dim: int) -> tuple[Any, int]:
        """Check the shape, and give a single token its axis."""
        tensor = tensor if hasattr(tensor, "shape") else np.asarray(tensor)
        shape = tuple(tensor.shape)
        if len(shape) not in (2, 3) or (shape[0], shape[-1]) != (self.heads, dim):
            raise ValueError(
                f"KVCache.append: {name} must have the shape ({self.heads}, {dim}) or ({self.heads}, T, {dim}), "
                f"got {shape}"
            )
        return (tensor, shape[1]) if len(shape) == 3 else (tensor[:, None], 1)

    @names_itself("KVCache.attend")
    def attend(
        self,
        q: Any,
        *,
        scale: float | None = None,
        mask: Any = None,
        causal: bool = True,
        softcap: float | None = None,
        out: Any = None,
    ) -> np.ndarray:
        """Attend to the positions held, straight from their codes.

        Parameters
        ----------
        q : array of floats, shape (query heads, head_dim) or (query heads, T, head_dim)
            Queries; their number of heads is a multiple of `heads`. If `causal`, those of the last T positions.
        scale : float, optional
            Factor of the products, by default ``1 / sqrt(head_dim)``.
        mask : array, optional
            Of bool, True where to attend, or of floats, added to the products; (query heads, T, `length`), or what
            broadcasts to it.
        causal : bool, default True
            Whether a query attends to no position after its own. Otherwise all stand at the last position.
        softcap : float, optional
            Bound of the products: ``softcap * tanh(product / softcap)``.
        out : array, optional
            Where to write the result.

        Returns
        -------
        numpy.ndarray, shape (query heads, value_dim) or (query heads, T, value_dim)
            In the type of `q`; float32 for float64.

        Raises
        ------
        TypeError, ValueError
            For arrays of the wrong type or shape, and for queries to which the cache no longer holds all that they
            attend to: T of them need ``min(total, window + T - 1)`` positions.

        Examples
        --------
        >>> import numpy as np, quantization as q
        >>> cache = q.KVCache(2, 4, 64, sliding=True)
        >>> tokens = np.random.default_rng(0).standard_normal((2, 6, 64), dtype=np.float32)
        >>> cache.append(tokens, tokens)
        >>> cache.attend(tokens[:, -1]).shape
        (2, 64)
        >>> cache.attend(tokens[:, -2:])
        Traceback (most recent call last):
            ...
        ValueError: KVCache.attend: 2 queries with window=4 attend to 5 positions, but 4 are held (capacity=5 would do)
        """
        q = q if hasattr(q, "shape") else np.asarray(q)
        self._check_held(q.shape[1] if len(q.shape) == 3 else 1, causal)
        result: np.ndarray = kv_attention(
            q,
            (self._keys.packed, self._keys.norms),
            (self._values.packed, self._values.norms),
            bits=self.bits,
            value_bits=self.value_bits,
            codec=self.codec,
            length=self.length,
            start=self.start,
            scale=scale,
            mask=mask,
            causal=causal,
            window=self.window,
            softcap=softcap,
            out=out,
        )
        return result

    def _check_held(self, queries: int, causal: bool) -> None:
        """Refuse queries that attend to positions which are no longer, or not yet, there."""
        if causal and queries > self.total:
            raise ValueError(
                f"KVCache.attend: {queries} queries of a sequence of {self.total} positions (append their keys and "
                "values first)"
            )
        window = self.total if self.window is None else self.window
        needed = min(self.total, window + queries - 1 if causal else window)
        if needed > self.length:
            # Where some were trimmed, `capacity` slots reached that far beyond the last position of now.
            enough = needed + self.capacity - self.length
            raise ValueError(
                f"KVCache.attend: {queries} {'query' if queries == 1 else 'queries'} with window={window} attend to "
                f"{needed} positions, but {self.length} are held (capacity={enough} would do)"
            )

    def dequantize(self) -> tuple[np.ndarray, np.ndarray]:
        """Decode what is held, oldest position first.

        Returns
        -------
        k : numpy.ndarray of float32, shape (heads, length, head_dim)
        v : numpy.ndarray of float32, shape (heads, length, value_dim)

        Examples
        --------
        >>> import numpy as np, quantization as q
        >>> cache = q.KVCache(2, 16, 64, bits=8)
        >>> tokens = np.random.default_rng(0).standard_normal((2, 5, 64), dtype=np.float32)
        >>> cache.append(tokens, tokens)
        >>> k, v = cache.dequantize()
        >>> bool(np.linalg.norm(k - tokens) < 0.01 * np.linalg.norm(tokens))
        True
        """
        first = self.total - self.length
        k, v = (store.decode(*store.take(first, self.length)) for store in (self._keys, self._values))
        return k, v

    def reset(self) -> None:
        """Forget all positions; the memory stays.

        Examples
        --------
        >>> import numpy as np, quantization as q
        >>> cache = q.KVCache(2, 16, 64)
        >>> cache.append(np.ones((2, 5, 64), np.float32), np.ones((2, 5, 64), np.float32))
        >>> cache.reset()
        >>> cache.length, cache.total, cache.nbytes
        (0, 0, 2176)
        """
        self._extent = (0, 0)

    def trim(self, n: int) -> None:
        """Take the last positions back, as after tokens that were proposed and rejected.

        Parameters
        ----------
        n : int
            How many, at most `length`. What a sliding cache dropped for them does not come back.

        Raises
        ------
        TypeError, ValueError
            If `n` is no integer, is negative, or exceeds `length`.

        Examples
        --------
        >>> import numpy as np, quantization as q
        >>> cache = q.KVCache(2, 16, 64)
        >>> cache.append(np.ones((2, 5, 64), np.float32), np.ones((2, 5, 64), np.float32))
        >>> cache.trim(2)
        >>> cache.length
        3
        """
        count = _take_integer("trim: n", n)
        if not 0 <= count <= self.length:
            raise ValueError(f"KVCache.trim: n must be from 0 to the {self.length} positions held, got {count}")
        self._extent = (self.total - count, self.length - count)

    def copy(self) -> KVCache:
        """Make another cache with memory of its own.

        Returns
        -------
        KVCache

        Examples
        --------
        >>> import numpy as np, quantization as q
        >>> cache = q.KVCache(2, 16, 64)
        >>> branch = cache.copy()
        >>> branch.append(np.ones((2, 64), np.float32), np.ones((2, 64), np.float32))
        >>> cache.length, branch.length
        (0, 1)
        """
        return copy.copy(self)

    def __getstate__(self) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, Any]]:
        own = {*_SETTINGS, "norms_dtype", "_extent", "_keys", "_values"}
        return *self._contents(), {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: tuple[dict[str, Any], dict[str, np.ndarray], dict[str, Any]]) -> None:
        settings, arrays, added = state
        self._restore(settings, arrays)
        vars(self).update(added)

    def save(self, path: str | Path) -> None:
        """Write the positions held, and what the cache is, to a file.

        Parameters
        ----------
        path : str or Path
            Its suffix says of which kind: ``.npz``, or ``.safetensors``, for which the extra ``[io]`` is needed.

        Returns
        -------
        None
            The file takes the place of one that was there when all of it is on the disk.

        Raises
        ------
        ValueError
            For another suffix.
        OSError
            If it cannot be written.

        Examples
        --------
        >>> import numpy as np, os, quantization as q, tempfile
        >>> cache = q.KVCache(2, 1024, 64)
        >>> cache.append(np.ones((2, 5, 64), np.float32), np.ones((2, 5, 64), np.float32))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache.save(f"{folder}/cache.npz")
        ...     q.KVCache.load(f"{folder}/cache.npz")
        KVCache(5 of 1024 positions, 2 heads x 64, 4 bits, 4.250 bits/value, 139,264 bytes)
        """
        _kv_file.write(Path(path), *self._contents())

    @classmethod
    def load(cls, path: str | Path) -> KVCache:
        """Read a cache that `save` wrote.

        Parameters
        ----------
        path : str or Path

        Returns
        -------
        KVCache
            With the capacity that the saved one had.

        Raises
        ------
        ValueError
            If the file is of another kind, damaged, or of a later version; the message says what is wrong.
        OSError
            If it cannot be read.

        Examples
        --------
        >>> import numpy as np, quantization as q, tempfile
        >>> cache = q.KVCache(2, 16, 64)
        >>> cache.append(np.ones((2, 5, 64), np.float32), np.ones((2, 5, 64), np.float32))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache.save(f"{folder}/cache.npz")
        ...     again = q.KVCache.load(f"{folder}/cache.npz")
        >>> np.array_equal(again.keys[0], cache.keys[0]), again.length, again.capacity
        (True, 5, 16)
        """
        settings, arrays = _kv_file.read(Path(path))
        cache = cls.__new__(cls)
        try:
            cache._restore(settings, arrays)
        except (TypeError, ValueError, OverflowError, MemoryError) as error:
            raise ValueError(f"{path}: not a KV cache that can be had again: {error}") from error
        return cache

    def _contents(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return what makes the cache: its settings, and the arrays of the positions held, the oldest first."""
        settings = {name: getattr(self, name) for name in (*_SETTINGS, "total")}
        arrays = {}
        for name, store in (("keys", self._keys), ("values", self._values)):
            taken = store.take(self.total - self.length, self.length)
            arrays[f"{name}.packed"], arrays[f"{name}.norms"] = taken
        return settings | {"norms_dtype": self.norms_dtype.name}, arrays

    def _restore(self, settings: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Become the cache whose `_contents` these are; ValueError or TypeError if they are of none."""
        options = dict(settings)
        total = _take_integer("total", options.pop("total", None))
        KVCache.__init__(self, **options)  # that of a subclass may take other arguments
        length = arrays["keys.packed"].shape[1] if arrays["keys.packed"].ndim == 3 else -1
        if not (0 <= length <= min(total, self.capacity) and (self.sliding or length == total)):
            raise ValueError(f"KVCache: {length} positions held, {total} in all and room for {self.capacity}")
        for name, store in (("keys", self._keys), ("values", self._values)):
            packed, norms = arrays[f"{name}.packed"], arrays[f"{name}.norms"]
            store.check(name, length, packed, norms)
            store.put(total - length, packed, norms)
        self._extent = (total, length)

    def __repr__(self) -> str:
        lost = self.total > self.length
        held = f"last {self.length} of {self.total}" if lost else f"{self.length} of {self.capacity}"
        window = "" if self.window in (None, self.capacity) else f", window {self.window}"
        dims = f"{self.head_dim}" + (f" and {self.value_dim}" if self.value_dim != self.head_dim else "")
        bits = f"{self.bits}" + (f" and {self.value_bits}" if self.value_bits != self.bits else "")
        return (
            f"{type(self).__name__}({held} positions{', sliding' if self.sliding else ''}{window}, "
            f"{self.heads} {'head' if self.heads == 1 else 'heads'} x {dims}, {bits} bits"
            f"{', codec 1' if self.codec == 1 else ''}, {self.bits_per_value:.3f} bits/value, {self.nbytes:,} bytes)"
        )


def _take_integer(name: str, value: Any) -> int:
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise TypeError(f"KVCache: {name} must be an integer, got {type(value).__name__}")
    return operator.index(value)


def _take_count(name: str, value: Any) -> int:
    count = _take_integer(name, value)
    if count < 1:
        raise ValueError(f"KVCache: {name} must be at least 1, got {count}")
    return count


def _take_flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"KVCache: {name} must be True or False, got {type(value).__name__}")
    return bool(value)
