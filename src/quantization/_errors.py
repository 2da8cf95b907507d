"""Errors that name the function that was called."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, TypeVar, cast

from . import _C

_F = TypeVar("_F", bound=Callable[..., Any])

_MODES = "|".join(dict.fromkeys(re.escape(row["mode"]) for row in _C.formats()))
_INNER = re.compile(rf"(?:formats|QTensor|kv_attention|(?:{_MODES})_\w+|(?:to|from)_fp8): ")


def names_itself(name: str) -> Callable[[_F], _F]:
    """Let every error that leaves a function begin with its name.

    It takes the place of the name that an operation underneath has put there, and a function without the keyword
    input_dtype advises what does the same. Errors of the operating system, which have a number and name the file, stay
    as they are.
    """

    def decorate(function: _F) -> _F:
        parameters = inspect.signature(function).parameters.values()
        takes_input_dtype = any(p.name == "input_dtype" or p.kind is p.VAR_KEYWORD for p in parameters)

        @functools.wraps(function)
        def call(*args: Any, **keywords: Any) -> Any:
            try:
                return function(*args, **keywords)
            except (TypeError, ValueError, IndexError, ImportError, OSError) as error:
                if len(error.args) == 1 and isinstance(error.args[0], str):
                    message = error.args[0] if takes_input_dtype else without_input_dtype(error.args[0])
                    error.args = (_named(name, message),)
                raise

        return cast(_F, call)

    return decorate


def without_input_dtype(message: str) -> str:
    """Let the message of an operation advise what works in a caller that has no such keyword."""
    return message.replace('(input_dtype="bfloat16" declares', "(.view(ml_dtypes.bfloat16) declares")


def _named(name: str, message: str) -> str:
    if message.startswith((f"{name}: ", f"{name}()")):  # Python's own errors of a call begin with name()
        return message
    return f"{name}: {_INNER.sub('', message, count=1) if _INNER.match(message) else message}"
