"""``python -m quantization bench``: kernels and installed peers beside the ceilings of the machine they run on."""
