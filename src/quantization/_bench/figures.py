"""How the figure of each gate is taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from .. import _text
from . import attention, ceilings, elementwise, gather, machine, ours, peers, scratch
from .clock import LEAST_SHARE
from .gates import Gate, Product, verdict
from .matmuls import READ_BOUND, cached_weights, figure_of
from .ours import settings
from .rows import text_of_time
from .sampling import Effort, Measurement, TooSlowError, Work, against, measure
from .weights import Weights

_SLOW = 60.0
"""Seconds that one call may take: a gate is to be missed, not left out, because a kernel is slow."""


class NotMeasuredError(Exception):
    """Why a gate has no figure."""


def _call(product: Product, weights: Weights) -> Callable[[int], Any]:
    out = ours.output(weights, product.m, product.variant)
    return ours.repeat(ours.call_matmul(product.operation, weights, product.m, product.variant, out))


def _weights(product: Product, cold: bool) -> Weights:
    return cached_weights(product.shape, product.bits, True, cold, ours.scale_dtype_for(product.variant, product.bits))


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


def bound(gate: Gate, isa: str, effort: Effort) -> Measurement:
    """Divide the time by that of reading the weights or that of the dots at their peak, whichever takes longer.

    Being the longer one, it is that by which the work's share is the larger.
    """
    product = _product(gate)
    weights = _weights(product, True)
    dots = 2.0 * product.variant.planes * product.m * product.shape.n * product.shape.k
    limits = (
        (ceilings.reading(weights.spans, isa, gate.threads), float(weights.nbytes)),
        (ceilings.arithmetic("dot", isa, gate.threads), dots),
    )
    call = _call(product, weights)
    with settings(isa, gate.threads):
        found = [measure(Work(call, amount), limit, effort) for limit, amount in limits]
    result = max(found, key=lambda one: one.ratio)
    return dataclasses.replace(result, ratio=1 / result.ratio, spread=result.spread / result.ratio**2)


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


def _in_microseconds(result: Measurement) -> Measurement:
    """Return the same with the median time as figure; the spread was that of the ratios."""
    return dataclasses.replace(result, ratio=result.seconds * 1e6, spread=0.0)


def microseconds(gate: Gate, isa: str, effort: Effort) -> Measurement:
    """Take the time of a product whose weights are in the cache."""
    product = _product(gate)
    weights = _weights(product, False)
    ceiling, amount = figure_of(weights, product.m, isa, gate.threads)
    with settings(isa, gate.threads):
        result = measure(Work(_call(product, weights), amount), ceiling, effort)
    return _in_microseconds(result)


def _by_peer(gate: Gate, isa: str, effort: Effort, name: str) -> Measurement:
    peer = next(peer for peer in peers.MATMUL if peer.name.startswith(name))
    if why := peer.missing():
        raise NotMeasuredError(why)
    product = _product(gate)
    weights = _weights(product, product.m <= READ_BOUND)
    other = peer.prepare(weights, gate.threads)(product.m)
    if product.m <= READ_BOUND:
        other(weights.copies)
    patient = dataclasses.replace(effort, samples=3) if name == "MLX" else effort
    with settings(isa, gate.threads):
        return measure(Work(_call(product, weights), 1.0), against(name, other), patient, settle=True)


def blas(gate: Gate, isa: str, effort: Effort) -> Measurement:
    """Divide NumPy's time, with dense float32 weights, by ours."""
    return _by_peer(gate, isa, effort, "NumPy")


def mlx(gate: Gate, isa: str, effort: Effort) -> Measurement:
    """Divide MLX's time on the CPU by ours."""
    return _by_peer(gate, isa, effort, "MLX")


def _experts(gate: Gate) -> gather.Experts:
    product = _product(gate)
    assert isinstance(product.bits, int)
    return gather.Experts(product.shape, product.bits, product.m, product.variant)


def gather_roof(gate: Gate, isa: str, effort: Effort) -> Measurement:
    """Divide by reading the chosen experts, or by the FMA peak."""
    experts = _experts(gate)
    ceiling, amount = experts.ceiling(isa, gate.threads)
    with settings(isa, gate.threads):
        return measure(Work(experts.gathered(), amount), ceiling, effort)


def gather_calls(gate: Gate, isa: str, effort: Effort) -> Measurement:
    """Divide the time of a call for each chosen expert by that of one for all."""
    experts = _experts(gate)
    with settings(isa, gate.threads):
        return measure(Work(experts.gathered(), 1.0), against("a call for each", experts.separate()), effort)


def _attention(gate: Gate, isa: str, effort: Effort, group: int) -> Measurement:
    return attention.take(1 << 15, group, isa, gate.threads, effort)[0]


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


def kv_encode(gate: Gate, isa: str, effort: Effort) -> Measurement:
    """Take the nanoseconds that a vector of 128 in a core's L2 takes."""
    vectors = max(1, elementwise.in_cache() // 128)
    case = ours.encoding_kv(vectors)
    with settings(isa, gate.threads):
        result = measure(case.work, elementwise.ceiling_for(case, isa, gate.threads), effort)
    return dataclasses.replace(result, ratio=result.seconds * 1e9 / vectors, spread=0.0)


def scratch_a_thread(gate: Gate, isa: str, effort: Effort) -> Measurement:
    """Take the MiB beyond arguments, planes of x included, by threads."""
    effort.check()
    product = _product(gate)
    taken = max(0.0, scratch.take(isa, gate.threads, product) / 2**20)
    nan = float("nan")
    return Measurement(nan, taken, nan, taken / gate.threads, 0.0, 1, 0, 1.0, "MiB")


def _call_overhead(dtype: str, effort: Effort) -> Measurement:
    result = elementwise.tiny(dtype, effort)
    return _in_microseconds(result)


FIGURES: dict[str, Callable[[Gate, str, Effort], Measurement]] = {
    "roof": roof,
    "bound": bound,
    "scaling": scaling,
    "microseconds": microseconds,
    "blas": blas,
    "mlx": mlx,
    "gather_roof": gather_roof,
    "gather_calls": gather_calls,
    "attention_read": lambda gate, isa, effort: _attention(gate, isa, effort, 1),
    "attention_fma": lambda gate, isa, effort: _attention(gate, isa, effort, 8),
    "fake_quantize_memory": fake_quantize_memory,
    "fake_quantize_cache": fake_quantize_cache,
    "kv_encode": kv_encode,
    "scratch": scratch_a_thread,
    "call_float32": lambda gate, isa, effort: _call_overhead("float32", effort),
    "call_bfloat16": lambda gate, isa, effort: _call_overhead("bfloat16", effort),
}


def _absolute(result: Measurement) -> str:
    """Say what a ratio was made of: both rates, or both times."""
    if result.unit == "calls":
        return f"{text_of_time(1e-9 / result.ceiling)} / {text_of_time(result.seconds)}"
    if result.unit == "MiB":
        return f"{result.rate:.1f} MiB"
    return f"{result.rate:.1f} of {result.ceiling:.1f} {result.unit}" if result.unit else ""


def take(gate: Gate, effort: Effort) -> dict[str, Any]:
    """Return a gate's line as plain values: its figure and verdict, or why there is none."""
    line: dict[str, Any] = {
        "gate": gate.name,
        "accuracy": gate.accuracy,
        "isa": gate.isa or machine.default_isa(),
        "threads": gate.threads,
    }
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
            raise NotMeasuredError(machine.lacking(line["isa"]))
        if gate.threads > len(machine.cpus()):
            raise NotMeasuredError(f"only {len(machine.cpus())} CPU here")
        result = FIGURES[gate.figure](gate, line["isa"], dataclasses.replace(effort, longest_call=_SLOW))
    except (NotMeasuredError, TooSlowError, ImportError, MemoryError, RuntimeError, ValueError) as error:
        return line | {"verdict": f"not run: {_text.first_line(error)}"}
    said = verdict(gate, result.ratio) + (" (disturbed)" if result.share < LEAST_SHARE else "")
    return line | {"figure": result.ratio, "spread": result.spread, "measured": _absolute(result), "verdict": said}


def take_all(gates: tuple[Gate, ...], effort: Effort) -> Iterator[dict[str, Any]]:
    """Yield every gate's line."""
    for gate in gates:
        yield take(gate, effort)
