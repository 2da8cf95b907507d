"""Optional libraries, each brought by an extra of this package."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import an optional library, or say which extra of this package brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise ImportError(
            f"{name} is not installed: pip install 'quantization[{extra}]' brings it "
            f"(from a checkout: pip install '.[{extra}]')"
        ) from error
