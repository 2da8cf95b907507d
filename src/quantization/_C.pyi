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
    pad: bool,
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
    k: int | None,
    out: Any,
    input_dtype: str | None,
    /,
) -> Any: ...
def quantize_fp(
    plan: Plan,
    w: Any,
    profile: str,
    mx_scale: str | None,
    global_scale: float | None,
    pad: bool,
    out: Any,
    input_dtype: str | None,
    /,
) -> tuple[Any, Any]: ...
def dequantize_fp(
    plan: Plan,
    w: Any,
    scales: Any,
    global_scale: float | None,
    dtype: Any,
    profile: str,
    k: int | None,
    out: Any,
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
def gather(
    plan: Plan,
    x: Any,
    w: Any,
    scales: Any,
    biases: Any,
    lhs_indices: Any,
    rhs_indices: Any,
    transpose: bool,
    group_size: int | None,
    bits: int | None,
    sorted_indices: bool,
    accumulate: str,
    activations: str | None,
    out: Any,
    input_dtype: str | None,
    /,
) -> Any: ...
def gather_rhs(
    plan: Plan,
    x: Any,
    w: Any,
    scales: Any,
    biases: Any,
    indices: Any,
    output_features: int | None,
    group_size: int | None,
    bits: int | None,
    transpose: bool,
    accumulate: str,
    activations: str | None,
    out: Any,
    input_dtype: str | None,
    /,
) -> Any: ...
def matmul_fp(
    plan: Plan,
    x: Any,
    w: Any,
    scales: Any,
    output_features: int | None,
    global_scale: float | None,
    accumulate: str,
    activations: str | None,
    out: Any,
    input_dtype: str | None,
    /,
) -> Any: ...
def gather_fp(
    plan: Plan,
    x: Any,
    w: Any,
    scales: Any,
    lhs_indices: Any,
    rhs_indices: Any,
    transpose: bool,
    sorted_indices: bool,
    global_scale: float | None,
    accumulate: str,
    activations: str | None,
    out: Any,
    input_dtype: str | None,
    /,
) -> Any: ...
def gather_rhs_fp(
    plan: Plan,
    x: Any,
    w: Any,
    scales: Any,
    indices: Any,
    output_features: int | None,
    transpose: bool,
    global_scale: float | None,
    accumulate: str,
    activations: str | None,
    out: Any,
    input_dtype: str | None,
    /,
) -> Any: ...
def fake_quantize(plan: Plan, x: Any, bits: int, out: Any, input_dtype: str | None, /) -> Any: ...
def to_fp8(plan: Plan, x: Any, out: Any, input_dtype: str | None, /) -> Any: ...
def from_fp8(plan: Plan, x: Any, dtype: Any, out: Any, /) -> Any: ...
def fwht(plan: Plan, x: Any, signs: bool, inverse: bool, out: Any, input_dtype: str | None, /) -> Any: ...
def hadamard_quantize_kv(
    plan: Plan,
    src: Any,
    packed: Any,
    norms: Any,
    write_pos: Any,
    is_sliding: bool,
    scale_factor_d512: float | None,
    rms_scratch: Any,
    /,
) -> tuple[Any, Any]: ...
def hadamard_quantize_kv_seq(
    plan: Plan,
    src: Any,
    packed: Any,
    norms: Any,
    write_pos_start: Any,
    n_tokens: Any,
    src_tok_offset: Any,
    is_sliding: bool,
    scale_factor_d512: float | None,
    /,
) -> tuple[Any, Any]: ...
def hadamard_quantize_kv_hb(
    plan: Plan,
    src: Any,
    packed: Any,
    norms: Any,
    write_pos: Any,
    codebook_bits: Any,
    is_sliding: bool,
    scale_factor_d512: float | None,
    /,
) -> tuple[Any, Any]: ...
def quantize_kv(
    plan: Plan, x: Any, bits: int, scale: str, norms_dtype: Any, out: Any, input_dtype: str | None, /
) -> tuple[Any, Any]: ...
def dequantize_kv(
    plan: Plan,
    packed: Any,
    norms: Any,
    bits: int,
    codec: int,
    rotated: bool,
    scale_factor_d512: float | None,
    out: Any,
    /,
) -> Any: ...
def kv_attention(
    plan: Plan,
    q: Any,
    k_cache: Any,
    v_cache: Any,
    bits: int,
    value_bits: int | None,
    codec: int,
    length: int | None,
    start: int,
    scale: float | None,
    mask: Any,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale_factor_d512: float | None,
    out: Any,
    input_dtype: str | None,
    /,
) -> Any: ...
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
