"""How the figure of each gate is taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from . import elementwise, machine, ours, peers, scratch
from .gates import Gate, Product, verdict
from .matmuls import READ_BOUND, cached_weights, figure_of
from .ours import settings
from .rows import text_of_time
from .sampling import Effort, Measurement, TooSlowError, Work, against, measure
from .weights import Weights

_SLOW = 60.0
"""Seconds that one call of a peer may take."""


class NotMeasuredError(Exception):
    """Why a gate has no figure."""


def _call(product: Product, weights: Weights) -> Callable[[int], Any]:
    op = "affine_qmv" if product.m == 1 else "affine_qmm_t"
    out = ours.output(weights, product.m, product.variant)
    return ours.repeat(ours.call_matmul(op, weights, product.m, product.variant, out))


def _weights(product: Product, cold: bool) -> Weights:
    return cached_weights(product.shape, product.bits, True, cold, ours.scale_dtype_for(product.variant))


def _product(gate: Gate) -> Product:
    assert gate.product is not None
    if why := ours.missing(gate.product.variant):
        raise NotMeasuredError(why)
    return gate.product


def roof(gate: Gate, isa: str, effort: Effort) -> Measurement:
    """Divide by reading the same bytes, or by the FMA peak."""
    product = _product(gate)
    weights = _weights(product, product.m <= READ_BOUND)
    ceiling, amount = figure_of(weights, product.m, isa, gate.threads)
    with settings(isa, gate.threads):
        return measure(Work(_call(product, weights), amount), ceiling, effort)


def flat(gate: Gate, isa: str, effort: Effort) -> Measurement:
    """Divide the time of M rows by that of one."""
    product = _product(gate)
    weights = _weights(product, True)
    one, many = _call(product._replace(m=1), weights), _call(product, weights)
    with settings(isa, gate.threads):
        return measure(Work(one, 1.0), against("M rows", many), effort)


def scaling(gate: Gate, isa: str, effort: Effort) -> Measurement:
    """Divide one thread's time by that of several."""
    product = _product(gate)
    weights = _weights(product, False)
    call = _call(product, weights)

    def alone(count: int) -> None:
        with settings(isa, 1):
            call(count)

    with settings(isa, gate.threads):
        return measure(Work(call, 1.0), against("1 thread", alone), effort)


def microseconds(gate: Gate, isa: str, effort: Effort) -> Measurement:
    """Take the time of a product whose weights are in the cache."""
    product = _product(gate)
    weights = _weights(product, False)
    ceiling, amount = figure_of(weights, product.m, isa, gate.threads)
    with settings(isa, gate.threads):
        result = measure(Work(_call(product, weights), amount), ceiling, effort)
    return dataclasses.replace(result, ratio=result.seconds * 1e6)


def _by_peer(gate: Gate, isa: str, effort: Effort, name: str) -> Measurement:
    peer = next(peer for peer in peers.MATMUL if peer.name.startswith(name))
    if why := peer.missing():
        raise NotMeasuredError(why)
    product = _product(gate)
    weights = _weights(product, product.m <= READ_BOUND)
    other = peer.prepare(weights, gate.threads)(product.m)
    if product.m <= READ_BOUND:
        other(weights.copies)
    patient = dataclasses.replace(effort, samples=3, longest_call=_SLOW) if name == "MLX" else effort
    with settings(isa, gate.threads):
        return measure(Work(_call(product, weights), 1.0), against(name, other), patient, settle=True)


def blas(gate: Gate, isa: str, effort: Effort) -> Measurement:
    """Divide NumPy's time, with dense float32 weights, by ours."""
    return _by_peer(gate, isa, effort, "NumPy")


def mlx(gate: Gate, isa: str, effort: Effort) -> Measurement:
    """Divide MLX's time on the CPU by ours."""
    return _by_peer(gate, isa, effort, "MLX")


def _fake_quantize(gate: Gate, isa: str, effort: Effort, cached: bool) -> Measurement:
    case = ours.fake_quantizing(elementwise.in_cache() if cached else elementwise.large(), cached)
    with settings(isa, gate.threads):
        return measure(case.work, elementwise.ceiling_for(case, isa, gate.threads), effort)


def fake_quantize_memory(gate: Gate, isa: str, effort: Effort) -> Measurement:
    """Divide by a copy past the caches."""
    return _fake_quantize(gate, isa, effort, False)


def fake_quantize_cache(gate: Gate, isa: str, effort: Effort) -> Measurement:
    """Divide by memcpy within a core's L2."""
    return _fake_quantize(gate, isa, effort, True)


def scratch_a_thread(gate: Gate, isa: str, effort: Effort) -> Measurement:
    """Take the MiB beyond arguments and planes of x (three bytes an element), by threads."""
    product = _product(gate)
    n, k = product.shape
    taken, planes = scratch.take(isa, gate.threads, n, k, product.m) / 2**20, 3 * product.m * k / 2**20
    beyond = max(0.0, taken - planes) / gate.threads
    nan = float("nan")
    return Measurement(nan, taken, planes, beyond, 0.0, 1, 0, 1.0, "MiB", "planes of x")


def _call_overhead(dtype: str, effort: Effort) -> Measurement:
    result = elementwise.tiny(dtype, effort)
    return dataclasses.replace(result, ratio=result.seconds * 1e6)


FIGURES: dict[str, Callable[[Gate, str, Effort], Measurement]] = {
    "roof": roof,
    "flat": flat,
    "scaling": scaling,
    "microseconds": microseconds,
    "blas": blas,
    "mlx": mlx,
    "fake_quantize_memory": fake_quantize_memory,
    "fake_quantize_cache": fake_quantize_cache,
    "scratch": scratch_a_thread,
    "call_float32": lambda gate, isa, effort: _call_overhead("float32", effort),
    "call_bfloat16": lambda gate, isa, effort: _call_overhead("bfloat16", effort),
}


def _absolute(result: Measurement) -> str:
    """Say what a ratio was made of: both rates, or both times."""
    if result.unit == "calls":
        return f"{text_of_time(1e-9 / result.ceiling)} / {text_of_time(result.seconds)}"
    if result.ceiling_name == "planes of x":
        return f"{result.rate:.1f} MiB, planes of x {result.ceiling:.1f} MiB"
    return f"{result.rate:.1f} of {result.ceiling:.1f} {result.unit}" if result.unit else ""


def take(gate: Gate, effort: Effort) -> dict[str, Any]:
    """Return a gate's line as plain values: its figure and verdict, or why there is none."""
    line: dict[str, Any] = {"gate": gate.name, "isa": gate.isa or machine.default_isa(), "threads": gate.threads}
    line |= {
        "figure": None,
        "spread": None,
        "measured": "",
        "must": gate.must,
        "stretch": gate.stretch,
        "lower": gate.lower,
    }
    try:
        if line["isa"] not in machine.isas():
            raise NotMeasuredError("CPU lacks it")
        if gate.threads > len(machine.cpus()):
            raise NotMeasuredError(f"only {len(machine.cpus())} CPU")
        result = FIGURES[gate.figure](gate, line["isa"], effort)
    except (NotMeasuredError, TooSlowError, RuntimeError, ImportError, ValueError) as error:
        return line | {"verdict": f"not measured: {error}"}
    said = verdict(gate, result.ratio)
    if result.share < 0.985 and said == "MISSED":
        said += " (disturbed)"
    return line | {"figure": result.ratio, "spread": result.spread, "measured": _absolute(result), "verdict": said}


def take_all(gates: tuple[Gate, ...], effort: Effort) -> Iterator[dict[str, Any]]:
    """Yield every gate's line."""
    for gate in gates:
        yield take(gate, effort)
