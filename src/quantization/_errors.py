"""Errors that name the function that was called."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar, cast

from . import _C

_F = TypeVar("_F", bound=Callable[..., Any])

_MODES = "|".join(dict.fromkeys(re.escape(row["mode"]) for row in _C.formats()))
_INNER = re.compile(rf"(?:formats|QTensor|(?:{_MODES})_\w+|(?:to|from)_fp8): ")


def names_itself(name: str) -> Callable[[_F], _F]:
    """Let every error that leaves a function begin with its name.

    It takes the place of the name that an operation underneath has put there. Errors of the operating system, which
    have a number and name the file, stay as they are.
    """

    def decorate(function: _F) -> _F:
        @functools.wraps(function)
        def call(*args: Any, **keywords: Any) -> Any:
            try:
                return function(*args, **keywords)
            except (TypeError, ValueError, IndexError, ImportError, OSError) as error:
                if len(error.args) == 1 and isinstance(error.args[0], str):
                    error.args = (_named(name, error.args[0]),)
                raise

        return cast(_F, call)

    return decorate


def _named(name: str, message: str) -> str:
    if message.startswith((f"{name}: ", f"{name}()")):  # Python's own errors of a call begin with name()
        return message
    return f"{name}: {_INNER.sub('', message, count=1) if _INNER.match(message) else message}"
