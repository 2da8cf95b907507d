"""The memory of a `KVCache`: codes and norms of its keys, or of its values, by slot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ._kv_codec import dequantize_kv, hadamard_quantize_kv, hadamard_quantize_kv_hb, quantize_kv


class Store:
    """Codes and norms of vectors of one size; position p lies in slot p mod capacity."""

    def __init__(
        self, heads: int, capacity: int, dim: int, bits: int, codec: int, scale: str, norms_dtype: np.dtype
    ) -> None:
        self._dim, self._bits, self._codec, self._scale, self._norms_dtype = dim, bits, codec, scale, norms_dtype
        packed, norms = self.encode(np.zeros((1, 1, dim), np.float32))
        self.packed = np.zeros((heads, capacity, *packed.shape[2:]), packed.dtype)
        self.norms, self._by_slot = self._new_norms(heads, capacity, norms.shape[2:])

    def _new_norms(self, heads: int, positions: int, blocks: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Make the array of norms as kernels take it, and a view of it that has those of a position at its index.

        From dimension 1024 on codec 1 has room for dim / 256 norms per position, but writes only one of them: to the
        element ``head * positions + position`` of the whole array.
        """
        if self._codec == 2 or self._dim < 1024:
            norms = np.zeros((heads, positions, *blocks), self._norms_dtype)
            return norms, norms
        norms = np.zeros((heads, positions, self._dim // 256), self._norms_dtype)
        return norms, norms.reshape(-1)[: heads * positions].reshape(heads, positions)

    def encode(self, x: Any) -> tuple[np.ndarray, np.ndarray]:
        """Encode tokens (heads, T, dim); the first two axes stay."""
        if self._codec == 2:
            packed, norms = quantize_kv(x, self._bits, scale=self._scale, norms_dtype=self._norms_dtype)
            return packed, norms
        heads, tokens = x.shape[:2]
        # As many heads of one token each: the same bytes in one call, where the sequences' function knows 4 bits only.
        rows = heads * tokens
        packed = np.empty((rows, 1, self._dim // 2 if self._bits == 4 else self._dim), np.uint8)
        norms, by_slot = self._new_norms(rows, 1, (2,) if self._dim == 512 else ())
        if self._bits == 4:
            hadamard_quantize_kv(x.reshape((rows, self._dim)), packed, norms, write_pos=0)
        else:
            hadamard_quantize_kv_hb(x.reshape((rows, self._dim)), packed, norms, write_pos=0, codebook_bits=self._bits)
        return packed.reshape(heads, tokens, packed.shape[-1]), by_slot.reshape(heads, tokens, *by_slot.shape[2:])

    def decode(self, packed: np.ndarray, norms: np.ndarray) -> np.ndarray:
        """Decode positions in the layout of `encode`."""
        as_written, by_slot = self._new_norms(packed.shape[0], packed.shape[1], norms.shape[2:])
        by_slot[...] = norms
        decoded: np.ndarray = dequantize_kv(packed, as_written, self._bits, codec=self._codec)
        return decoded

    def put(self, first: int, packed: np.ndarray, norms: np.ndarray) -> None:
        """Store encoded positions, of which `first` is the first one's number."""
        for slots, piece in self._runs(first, packed.shape[1]):
            self.packed[:, slots] = packed[:, piece]
            self._by_slot[:, slots] = norms[:, piece]

    def take(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return positions in the layout of `encode`: views where they lie together."""
        runs = [slots for slots, _ in self._runs(first, count)]
        packed, norms = (
            arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1)
            for arrays in ([array[:, slots] for slots in runs] for array in (self.packed, self._by_slot))
        )
        return packed, norms

    def _runs(self, first: int, count: int) -> Iterator[tuple[slice, slice]]:
        """Yield the slots of consecutive positions, at most two runs of them, and which of the positions each has."""
        capacity = self.packed.shape[1]
        slot = first % capacity
        ahead = min(count, capacity - slot)
        yield slice(slot, slot + ahead), slice(0, ahead)
        if ahead < count:
            yield slice(0, count - ahead), slice(ahead, count)

    def views(self) -> tuple[np.ndarray, np.ndarray]:
        """Return codes and norms as kernels take them, read-only."""
        packed, norms = self.packed.view(), self.norms.view()
        packed.flags.writeable = norms.flags.writeable = False
        return packed, norms

    def check(self, name: str, length: int, packed: np.ndarray, norms: np.ndarray) -> None:
        """Refuse arrays that `put` would not take as they are; ValueError."""
        for part, array, own in (("packed", packed, self.packed), ("norms", norms, self._by_slot)):
            shape = (own.shape[0], length, *own.shape[2:])
            if array.shape != shape or array.dtype != own.dtype:
                raise ValueError(
                    f"KVCache: {name}.{part} must be {own.dtype} of {shape}, got {array.dtype} of {array.shape}"
                )
