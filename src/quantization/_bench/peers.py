"""Other libraries' products with the same weights of 4 bits, and of small floats where they have them, as installed.

Every one gets weights of its own in distinct copies, is asked for what it does best, and is measured as we are. Three
traps are stepped around: onnxruntime holds equal weights once, torch's int4 kernel is fast in bfloat16 only, and
OpenVINO rounds x to 8 bits unless told not to.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._extras import require
from . import onnx_model, openvino_model
from .stored import SMALL_FLOATS, Stored
from .weights import Weights, codes_of

Call = Callable[[int], Any]
"""Does so many products, one after the other with different copies of the weights, and returns the last result."""

Prepare = Callable[[Weights, int], Callable[[int], Call]]
"""Takes weights and threads, and returns what makes a `Call` for a number of rows of x."""


@dataclass(frozen=True)
class Peer:
    """A library's product.

    Attributes
    ----------
    name, modules : str, tuple of str
        How tables call it, and what must be importable.
    dtype, accuracy : str
        Type of x and y, and the accuracy class.
    prepare : callable
        A `Prepare`.
    serial : bool
        Whether it has no threads.
    formats : tuple of int and str
        Of weights that it takes: bits of affine codes, and modes.
    """

    name: str
    modules: tuple[str, ...]
    dtype: str
    accuracy: str
    prepare: Prepare
    serial: bool = False
    formats: tuple[Stored, ...] = (4,)

    def missing(self) -> str | None:
        """Say which module is not installed, or return None."""
        return _missing(self.modules)


def _missing(modules: tuple[str, ...]) -> str | None:
    absent = [module for module in modules if importlib.util.find_spec(module) is None]
    return f"{absent[0]} is not installed" if absent else None


def _rotating(products: list[Callable[[], Any]]) -> Call:
    turn = itertools.cycle(products)

    def run(count: int) -> Any:
        y = None
        for _ in range(count):
            y = next(turn)()
        return y

    return run


def _mlx(dtype: str) -> Prepare:
    def prepare(weights: Weights, threads: int) -> Callable[[int], Call]:
        mx = require("mlx.core", "bench")

        mx.set_default_device(mx.cpu)
        kind = getattr(mx, dtype)
        sets = []
        for copy in range(weights.copies):
            w, *stored = (mx.array(part) for part in weights.distinct(copy))
            if weights.format.is_affine:
                stored = [part.astype(kind) for part in stored]
            sets.append((w, stored[0], stored[1] if len(stored) > 1 else None))
        mx.eval(sets)

        def product(x: Any, w: Any, scales: Any, biases: Any) -> Any:
            y = mx.quantized_matmul(x, w, scales, biases, True, weights.group_size, weights.bits, weights.mode)
            mx.eval(y)
            return y

        def call(m: int) -> Call:
            x = mx.array(weights.x(m, "float32")).astype(kind)
            rotate = _rotating([functools.partial(product, x, *parts) for parts in sets])
            return lambda count: np.array(rotate(count).astype(mx.float32))

        return call

    return prepare


def _make_torch_sets(weights: Weights) -> list[tuple[Any, Any]]:
    """Pack once, which takes seconds, and copy: torch holds equal weights as often as it is told to.

    `_weight_int4pack_mm_for_cpu` computes (code - 8) * scale + offset: offset = (8 - zero point) * scale.
    """
    torch = require("torch", "bench")

    codes, scales, zeros = codes_of(weights, 0)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(codes.astype(np.int32)), 2)
    both = np.stack([scales, (8 - zeros) * scales], axis=-1).swapaxes(0, 1)
    half = torch.from_numpy(np.ascontiguousarray(both)).to(torch.bfloat16)
    return [(packed.clone(), half.clone()) for _ in range(weights.copies)]


_torch_sets = functools.lru_cache(maxsize=1)(_make_torch_sets)


def _torch_call(products: list[Callable[[], Any]], threads: int) -> Call:
    torch = require("torch", "bench")
    rotate = _rotating(products)

    def run(count: int) -> np.ndarray:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            y: np.ndarray = rotate(count).float().numpy()
        return y

    return run


def _torch(weights: Weights, threads: int) -> Callable[[int], Call]:
    torch = require("torch", "bench")

    sets = _torch_sets(weights)
    product = torch.ops.aten._weight_int4pack_mm_for_cpu

    def call(m: int) -> Call:
        x = torch.from_numpy(weights.x(m, "float32")).to(torch.bfloat16)
        group = weights.group_size
        return _torch_call([functools.partial(product, x, packed, group, both) for packed, both in sets], threads)

    return call


def _dense_copies(weights: Weights, itemsize: int) -> int:
    """Return how many dense matrices take as much memory as all the packed ones."""
    each = itemsize * weights.shape.n * weights.shape.k
    return min(weights.copies, max(2, -(-weights.nbytes * weights.copies // each)))


def _torch_dense(weights: Weights, threads: int) -> Callable[[int], Call]:
    """Products with the dequantized matrix in bfloat16, in which these weights are exact."""
    torch = require("torch", "bench")

    dense = [torch.from_numpy(weights.dense(copy)).to(torch.bfloat16) for copy in range(_dense_copies(weights, 2))]

    def call(m: int) -> Call:
        x = torch.from_numpy(weights.x(m, "float32")).to(torch.bfloat16)
        return _torch_call([functools.partial(torch.nn.functional.linear, x, w) for w in dense], threads)

    return call


def _numpy(weights: Weights, threads: int) -> Callable[[int], Call]:
    """Products with the dequantized float32 matrix: what users write who have no quantized product."""
    threadpoolctl = require("threadpoolctl", "bench")

    dense = [weights.dense(copy).T for copy in range(_dense_copies(weights, 4))]
    controller = threadpoolctl.ThreadpoolController()

    def call(m: int) -> Call:
        x, out = weights.x(m, "float32"), np.empty((m, weights.shape.n), np.float32)
        rotate = _rotating([functools.partial(np.matmul, x, w, out=out) for w in dense])

        def run(count: int) -> Any:
            with controller.limit(limits=threads, user_api="blas"):
                return rotate(count)

        return run

    return call


def _onnxruntime(level: int) -> Prepare:
    def prepare(weights: Weights, threads: int) -> Callable[[int], Call]:
        onnxruntime = require("onnxruntime", "bench")

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        sessions = []
        for copy in range(weights.copies):
            model = onnx_model.matmul_nbits(*codes_of(weights, copy), weights.group_size, level)
            sessions.append(onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]))

        def call(m: int) -> Call:
            inputs = {"x": weights.x(m, "float32")}
            rotate = _rotating([functools.partial(session.run, None, inputs) for session in sessions])
            return lambda count: rotate(count)[0]

        return call

    return prepare


def _openvino(group: int, precision: str = "f32") -> Prepare:
    """`group`: how many elements of x are rounded to 8 bits together, if the CPU has an instruction for it; 0: none."""

    def prepare(weights: Weights, threads: int) -> Callable[[int], Call]:
        openvino = require("openvino", "bench")

        config = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": precision,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
            "PERFORMANCE_HINT": "LATENCY",
        }
        core, requests = openvino.Core(), []
        if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise RuntimeError("this CPU has no bfloat16 instructions")  # it would compute in float32
        for copy in range(weights.copies):
            model = openvino_model.compressed_matmul(*codes_of(weights, copy), weights.group_size)
            requests.append(core.compile_model(model, "CPU", config).create_infer_request())

        def call(m: int) -> Call:
            shared = {"share_inputs": True, "share_outputs": True}
            inputs = {0: weights.x(m, "float32")}
            rotate = _rotating([functools.partial(request.infer, inputs, **shared) for request in requests])
            return lambda count: rotate(count)[0]

        return call

    return prepare


_ANY: tuple[Stored, ...] = (4, *SMALL_FLOATS)
MATMUL = (
    Peer("NumPy sgemm, dequantized", ("threadpoolctl",), "float32", "exact f32", _numpy, formats=_ANY),
    Peer("torch int4pack", ("torch",), "bfloat16", "bf16", _torch),
    Peer("torch, dequantized", ("torch",), "bfloat16", "bf16", _torch_dense, formats=_ANY),
    Peer("onnxruntime level 0", ("onnxruntime", "onnx"), "float32", "exact f32", _onnxruntime(0)),
    Peer("onnxruntime level 4", ("onnxruntime", "onnx"), "float32", "int8 activations", _onnxruntime(4)),
    Peer("OpenVINO", ("openvino",), "float32", "exact f32", _openvino(0)),
    Peer("OpenVINO bfloat16", ("openvino",), "float32", "bf16", _openvino(0, "bf16")),
    Peer("OpenVINO dynamic 32", ("openvino",), "float32", "int8 activations", _openvino(32)),
    Peer("MLX float32", ("mlx",), "float32", "exact f32", _mlx("float32"), serial=True, formats=_ANY),
    Peer("MLX bfloat16", ("mlx",), "bfloat16", "bf16", _mlx("bfloat16"), serial=True, formats=_ANY),
)
"""The slowest last: where time is bounded, they are what is left out."""


@dataclass(frozen=True)
class Codec:
    """A library's way to make codes, and to undo them; figures count floats in memory and codes as it packs them."""

    name: str
    modules: tuple[str, ...]
    codes: str
    """The accuracy class of its codes: their format."""
    prepare: Callable[[np.ndarray], tuple[Callable[[], Any], Callable[[], Any], int]]
    """Takes float32 [rows, columns], returns the calls that quantize and dequantize and the bytes of the codes."""

    def missing(self) -> str | None:
        """Say which module is not installed, or return None."""
        return _missing(self.modules)


def _gguf(w: np.ndarray) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    quants, kind = require("gguf.quants", "bench"), require("gguf", "bench").GGMLQuantizationType.Q4_0
    codes = quants.quantize(w, kind)
    return lambda: quants.quantize(w, kind), lambda: quants.dequantize(codes, kind), codes.nbytes


def _mlx_codec(w: np.ndarray) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    mx = require("mlx.core", "bench")

    mx.set_default_device(mx.cpu)
    array = mx.array(w)
    parts = mx.quantize(array, 64, 4)
    mx.eval(array, parts)
    return (
        lambda: mx.eval(mx.quantize(array, 64, 4)),
        lambda: mx.eval(mx.dequantize(*parts, 64, 4)),
        sum(part.nbytes for part in parts),
    )


CODECS = (
    Codec("gguf-py", ("gguf",), "Q4_0 codes: no bias", _gguf),
    Codec("MLX", ("mlx",), "affine g64 codes", _mlx_codec),
)
