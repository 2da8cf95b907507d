"""Weight matrices of the demo's models, which run on floats or on codes alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .._formats import Format


class Weight(Protocol):
    """A matrix as the model uses it; rows are outputs of a linear layer, or entries of an embedding."""

    def rows(self, indices: np.ndarray) -> np.ndarray: ...

    def matmul_t(self, x: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class FloatWeight:
    values: np.ndarray

    def rows(self, indices: np.ndarray) -> np.ndarray:
        gathered: np.ndarray = self.values[indices]
        return gathered

    def matmul_t(self, x: np.ndarray) -> np.ndarray:
        product: np.ndarray = x @ self.values.T
        return product


@dataclass(frozen=True)
class QuantizedWeight:
    format: Format
    encoded: tuple[np.ndarray, ...]

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Decode the gathered rows only: an embedding table stays in its codes."""
        return self.format.decode([part[indices] for part in self.encoded])

    def matmul_t(self, x: np.ndarray) -> np.ndarray:
        return self.format.matmul_t(x, self.encoded)
