"""The kernel pattern: a cheap object whose `compile` resolves, once, where and how an operation runs."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, TypeVar

from . import _C
from ._config import Settings, compile_plan, current_settings

__all__ = ["Kernel", "called_by_core"]


class _CallSignature:
    """What `inspect.signature` finds on a kernel: the signature of its call, which the core's own hides."""

    def __get__(self, kernel: Kernel | None, owner: type[Kernel]) -> inspect.Signature:
        if kernel is None:  # a class has the signature of its __init__
            raise AttributeError("__signature__")
        return inspect.signature(kernel._call if owner.__call__ is _C.Kernel.__call__ else kernel.__call__)


class Kernel(_C.Kernel):
    """An operation that is compiled once and then called.

    Making one costs nothing: ``_kernel`` is None until `compile` is called, by you or by the first call. `compile`
    resolves device and instruction set and returns the compiled kernel, the same object every time; its ``repr`` says
    what was chosen. Calls inside ``with device(...)``, ``isa(...)`` or ``threads(...)`` use a kernel compiled for
    those, kept for later too; ``_kernel`` is the one for calls outside.
    """

    _op: ClassVar[str]
    _call: Any
    __signature__ = _CallSignature()

    def __init__(self) -> None:
        self._plans: dict[Settings, _C.Plan] = {}

    def compile(self) -> _C.Plan:
        """Resolve device and instruction set now, instead of at the first call.

        Returns
        -------
        Plan
            The compiled kernel; later calls return the same object.

        Raises
        ------
        RuntimeError
            If the device or instruction set that ``QUANTIZATION_DEVICE`` or ``QUANTIZATION_ISA`` asks for is not
            available.
        """
        if self._kernel is None:
            self._kernel = compile_plan(self._op, None)
        return self._kernel

    def _find_plan(self) -> _C.Plan:
        """Find what `_plan` returns where it is not simply ``_kernel``."""
        settings = current_settings()
        if settings is None:
            return self.compile()
        plan = self._plans.get(settings)
        if plan is None:
            plan = self._plans[settings] = compile_plan(self._op, settings)
        return plan

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is compiled: copies do that anew."""
        defaults = {name: getattr(self, name) for name in ("group_size", "bits") if hasattr(self, name)}
        return {**vars(self), **defaults, "_plans": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._kernel if self._kernel is not None else 'not compiled'}>"


_K = TypeVar("_K", bound=type[Kernel])


def called_by_core(kernel_class: _K) -> _K:
    """Leave the calls of a kernel class to the core, which binds the arguments of ordinary ones in half the time.

    ``__call__`` as the class defines it becomes ``_call``: it says what a call means, and the core hands it every call
    that is out of the ordinary. Only a class without ``__call__`` of its own inherits the core's.
    """
    kernel_class._call = kernel_class.__call__
    del kernel_class.__call__
    return kernel_class
