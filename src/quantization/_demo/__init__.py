"""`python -m quantization demo`: what quantizing a real model costs and keeps, as one table.

`minilm` finds the installed weights and runs the model, `sentences` is the text it runs on, `compare` quantizes,
measures and prints.
"""
