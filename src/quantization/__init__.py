"""Low-bit quantization kernels as plain functions over NumPy arrays, in MLX's storage formats."""

from ._config import device, get_num_threads, isa, set_num_threads, show_config, threads
from ._fake_quantize import (
    VariableQuantizationKernel,
    VariableQuantizationMLXKernel,
    quantize,
    variable_quantization,
)
from ._matmul import (
    AffineQmmN,
    AffineQmmT,
    AffineQmv,
    AffineQvm,
    affine_qmm_n,
    affine_qmm_t,
    affine_qmv,
    affine_qvm,
)
from ._quantize import AffineDequantize, AffineQuantize, affine_dequantize, affine_quantize
from ._report import Report, report
from ._version import __version__

__all__ = [
    "AffineDequantize",
    "AffineQmmN",
    "AffineQmmT",
    "AffineQmv",
    "AffineQuantize",
    "AffineQvm",
    "Report",
    "VariableQuantizationKernel",
    "VariableQuantizationMLXKernel",
    "__version__",
    "affine_dequantize",
    "affine_qmm_n",
    "affine_qmm_t",
    "affine_qmv",
    "affine_quantize",
    "affine_qvm",
    "device",
    "get_num_threads",
    "isa",
    "quantize",
    "report",
    "set_num_threads",
    "show_config",
    "threads",
    "variable_quantization",
]
