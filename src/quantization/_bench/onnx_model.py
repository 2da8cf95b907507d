"""The smallest ONNX model that multiplies by 4-bit weights."""

from __future__ import annotations

import numpy as np

from .._extras import require


def _pairs(codes: np.ndarray) -> np.ndarray:
    pairs: np.ndarray = codes[:, 0::2] | codes[:, 1::2] << 4
    return pairs


def matmul_nbits(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, group_size: int, level: int) -> bytes:
    """Return y = x @ W.T as a model of one MatMulNBits node, serialized.

    Zero points are packed as codes are: with those of the scales' type onnxruntime leaves its fast kernels.
    """
    onnx = require("onnx", "bench")
    helper = onnx.helper
    n, k = codes.shape
    blocks = k // group_size
    packed = _pairs(codes).reshape(n, blocks, group_size // 2)
    padded = np.pad(zeros.astype(np.uint8), ((0, 0), (0, blocks % 2)))
    tensors = {"w": packed, "scales": scales.reshape(-1), "zeros": _pairs(padded).reshape(-1)}
    node = helper.make_node(
        "MatMulNBits",
        ["x", *tensors],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=4,
        block_size=group_size,
        accuracy_level=level,
    )
    graph = helper.make_graph(
        [node],
        "matmul",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["m", n])],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    return model
