"""The graph in which OpenVINO recognizes 4-bit weights that it need not decompress."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._extras import require


def compressed_matmul(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, group_size: int) -> Any:
    """Return y = x @ W.T as convert(u4) - convert(zero), times scale, reshaped, multiplied."""
    openvino, ops = require("openvino", "bench"), require("openvino.opset13", "bench")
    n, k = codes.shape
    grouped = (n, k // group_size, group_size)

    def four_bits(values: np.ndarray, shape: tuple[int, ...]) -> Any:
        flat = values.reshape(-1)
        packed = flat[0::2] | flat[1::2] << 4
        held = openvino.Tensor(openvino.Type.u4, list(shape))  # its own memory: a view of ours would dangle
        held.data[:] = packed.reshape(held.data.shape)
        return ops.constant(held)

    w = ops.convert(four_bits(codes, grouped), "f32")
    zero = ops.convert(four_bits(zeros.astype(np.uint8), (n, k // group_size, 1)), "f32")
    w = ops.multiply(ops.subtract(w, zero), ops.constant(scales.reshape(n, k // group_size, 1)))
    x = ops.parameter([-1, k], np.float32)
    y = ops.matmul(x, ops.reshape(w, np.array([n, k]), False), False, True)
    return openvino.Model([y], [x], "matmul")
