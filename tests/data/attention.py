"""Write attention.npz: what other people's attention makes of decoded caches, for test_kv_attention.py.

    python tests/data/attention.py

Needs mlx and torch. Every case is written with the name and version of what computed it: mlx's
fast.scaled_dot_product_attention, torch's scaled_dot_product_attention, and, as those have no softcap, torch's
flex_attention with tanh in its score_mod. Keys and values are decoded caches, oldest position first.
"""

import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from torch.nn.attention.flex_attention import flex_attention

import quantization

HEADS, KV_HEADS, D, DV = 6, 2, 16, 24
QUERIES, LENGTH, WINDOW, SOFTCAP, SCALE = 3, 11, 4, 1.5, 0.4


def by_mlx(q, k, v, *, scale, mask=None, causal=False):
    mask = "causal" if causal else None if mask is None else mx.array(mask)
    return np.array(mx.fast.scaled_dot_product_attention(*(mx.array(a[None]) for a in (q, k, v)),
                                                         scale=scale, mask=mask))[0]  # fmt: skip


def by_torch(q, k, v, *, scale, mask=None):
    """All in float64; torch's own causal mask starts at position 0, so that it is given as one of bool."""
    mask = None if mask is None else torch.from_numpy(mask if mask.dtype == bool else mask.astype(np.float64))
    arrays = (torch.from_numpy(a.astype(np.float64))[None] for a in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(
        *arrays, attn_mask=mask, scale=scale, enable_gqa=True
    ).numpy()[0]


def by_flex(q, k, v, *, scale, softcap):
    arrays = (torch.from_numpy(a)[None] for a in (q, k, v))
    return flex_attention(
        *arrays, score_mod=lambda s, *_: softcap * torch.tanh(s / softcap), scale=scale, enable_gqa=True
    ).numpy()[0]


def main():
    rng = np.random.default_rng(0)
    q = rng.standard_normal((HEADS, QUERIES, D)).astype(np.float32)
    k, v = (
        quantization.dequantize_kv(*quantization.quantize_kv(rng.standard_normal((KV_HEADS, LENGTH, size)), 4))
        for size in (D, DV)
    )
    scale = 1 / math.sqrt(D)
    own = LENGTH - QUERIES + np.arange(QUERIES)[:, None]
    causal = np.arange(LENGTH) <= own
    arrays = {
        "q": q,
        "k": k,
        "v": v,
        "bool": rng.random((HEADS, QUERIES, LENGTH)) < 0.6,
        "float": np.where(rng.random((QUERIES, LENGTH)) < 0.3, -np.inf, rng.normal(size=(QUERIES, LENGTH))).astype(
            np.float32
        ),
    }
    arrays["bool"][..., 0] = True  # what sees nothing is NaN in torch
    arrays["float"][:, 0] = 0
    windowed = causal & (np.arange(LENGTH) > own - WINDOW)
    for name, attend in (("mlx", by_mlx), ("torch", by_torch)):
        arrays[f"{name}.plain"] = attend(q, k, v, scale=scale)
        arrays[f"{name}.scale"] = attend(q, k, v, scale=SCALE)
        arrays[f"{name}.bool"] = attend(q, k, v, scale=scale, mask=arrays["bool"])
        arrays[f"{name}.float"] = attend(q, k, v, scale=scale, mask=arrays["float"])
        arrays[f"{name}.window"] = attend(q, k, v, scale=scale, mask=windowed)
    arrays["mlx.causal"] = by_mlx(q, k, v, scale=scale, causal=True)
    arrays["torch.causal"] = by_torch(q, k, v, scale=scale, mask=causal)
    wide = (a.astype(np.float64) for a in (q, k, v))
    arrays["torch.softcap"] = by_flex(*wide, scale=SCALE, softcap=SOFTCAP)
    settings = {"window": WINDOW, "softcap": SOFTCAP, "scale": SCALE}
    versions = {"mlx": mx.__version__, "torch": torch.__version__}
    arrays |= {f"setting.{name}": np.array(value) for name, value in (settings | versions).items()}
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **arrays)


if __name__ == "__main__":
    main()
