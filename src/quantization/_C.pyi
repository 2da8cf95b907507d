from contextvars import ContextVar
from typing import Any, final

from typing_extensions import disjoint_base

_settings: ContextVar[Any]

@final
class Plan:
    def __new__(cls, op: str, device: str = "auto", isa: str | None = None, threads: int = 0) -> Plan: ...
    @property
    def op(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def isa(self) -> str: ...
    @property
    def variant(self) -> str: ...
    @property
    def threads(self) -> int: ...

@disjoint_base
class Kernel:
    _kernel: Plan | None
    group_size: Any
    bits: Any
    def _plan(self) -> Plan: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

def quantize(
    plan: Plan,
    w: Any,
    group_size: int | None,
    bits: int | None,
    profile: str,
    scale_dtype: Any,
    out: Any,
    input_dtype: str | None,
    /,
) -> tuple[Any, Any, Any]: ...
def dequantize(
    plan: Plan,
    w: Any,
    scales: Any,
    biases: Any,
    group_size: int | None,
    bits: int | None,
    dtype: Any,
    profile: str,
    out: Any,
    input_dtype: str | None,
    /,
) -> Any: ...
def matmul(
    plan: Plan,
    x: Any,
    w: Any,
    scales: Any,
    biases: Any,
    output_features: int | None,
    group_size: int | None,
    bits: int | None,
    accumulate: str,
    activations: str | None,
    out: Any,
    input_dtype: str | None,
    /,
) -> Any: ...
def fake_quantize(plan: Plan, x: Any, bits: int, out: Any, input_dtype: str | None, /) -> Any: ...
def probe(plan: Plan, what: str, source: Any, target: Any, repeats: int, /) -> float: ...
def formats() -> tuple[dict[str, Any], ...]: ...
def isas() -> tuple[dict[str, Any], ...]: ...
def devices() -> tuple[dict[str, Any], ...]: ...
def ops() -> tuple[str, ...]: ...
def cpu_features() -> str: ...
def compiler() -> str: ...
def set_num_threads(n: int | None, /) -> int: ...
def check_num_threads(n: int, /) -> int: ...
def get_num_threads() -> int: ...
def explain_num_threads() -> str: ...
def fail_allocations_after(n: int, /) -> None: ...
