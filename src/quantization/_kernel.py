"""The kernel pattern: a cheap object whose `compile` resolves, once, where and how an operation runs."""

from __future__ import annotations

from typing import ClassVar

from . import _C
from ._config import Settings, compile_plan, current_settings

__all__ = ["Kernel"]


class Kernel:
    """An operation that is compiled once and then called.

    Making one costs nothing: ``_kernel`` is None until `compile` is called, by you or by the first call. `compile`
    resolves device and instruction set and returns the compiled kernel, the same object every time; its ``repr`` says
    what was chosen. Calls inside ``with device(...)``, ``isa(...)`` or ``threads(...)`` use a kernel compiled for
    those, kept for later too; ``_kernel`` is the one for calls outside.
    """

    _op: ClassVar[str]

    def __init__(self) -> None:
        self._kernel: _C.Plan | None = None
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

    def _plan(self) -> _C.Plan:
        """Return the compiled kernel that a call made now uses."""
        settings = current_settings()
        if settings is None:
            return self._kernel or self.compile()
        plan = self._plans.get(settings)
        if plan is None:
            plan = self._plans[settings] = compile_plan(self._op, settings)
        return plan

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._kernel if self._kernel is not None else 'not compiled'}>"
