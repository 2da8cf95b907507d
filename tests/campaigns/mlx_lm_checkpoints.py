"""Model folders exchanged with mlx-lm: what `convert` writes it loads and runs, what it writes `open` reads.

    python tests/campaigns/mlx_lm_checkpoints.py

needs mlx, mlx-lm and safetensors. The model is a small Llama with random float32 weights. Logits of the quantized
model, computed by MLX, are compared with those of the float model of the decoded weights; both are sums of at most
256 float32 terms in 2 layers, so they differ by some 1e-5, and a wrong scale or code shows at 1e-1.
"""

import json
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from safetensors.numpy import save_file

import quantization as q
from quantization import _convert
from quantization._formats import known_formats

HIDDEN, INNER, WORDS, LAYERS, BOUND = 128, 256, 512, 2, 1e-4
CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "intermediate_size": INNER,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": WORDS,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
FORMATS = [f for f in known_formats() if f.bits != 7]  # 7 bits are not MLX's


def random_model(rng):
    shapes = {"model.embed_tokens": (WORDS, HIDDEN), "lm_head": (WORDS, HIDDEN), "model.norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in SHAPES.items()}
        shapes |= {f"model.layers.{layer}.{name}_layernorm": (HIDDEN,) for name in ("input", "post_attention")}
    return {
        f"{name}.weight": rng.standard_normal(shape, np.float32) / np.float32(HIDDEN**0.5)
        if len(shape) == 2
        else np.ones(shape, np.float32)
        for name, shape in shapes.items()
    }


def write_float(folder, arrays):
    folder.mkdir()
    save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))


def logits(folder):
    model, _ = load_model(folder)
    return np.array(model(mx.array([[1, 2, 3, 5, 7]])).astype(mx.float32))


def decoded(folder):
    opened = q.open(folder)
    arrays = {f"{name}.weight": np.asarray(opened[name]) for name in opened}
    return arrays | {name: np.asarray(array) for name, array in opened.unquantized.items()}


def ours_in_mlx_lm(source, work, target, number):
    """Convert with overrides of one layer each way; return the largest difference of logits."""
    other = FORMATS[(number + 1) % len(FORMATS)]
    _convert.convert(source, work / "ours", target, overrides={"*.down_proj": other, "lm_head": None})
    write_float(work / "decoded", decoded(work / "ours"))
    return float(np.abs(logits(work / "ours") - logits(work / "decoded")).max())


def mlx_lm_in_ours(source, work, arrays, target):
    """Let mlx-lm quantize and save; return how many layers differ in any byte from ours under profile cpu."""
    model, config = quantize_model(*load_model(source), target.group_size, target.bits, mode=target.mode)
    save_model(work / "theirs", model)
    save_config(config, work / "theirs/config.json")
    opened, differing = q.open(work / "theirs"), 0
    assert len(opened) == 2 + LAYERS * len(SHAPES) and not opened.unsupported
    for name in opened:
        expected = target.encode(arrays[f"{name}.weight"], profile="cpu")
        parts = opened[name].parts.values()
        differing += any(part.tobytes() != own.tobytes() for part, own in zip(parts, expected, strict=True))
    return differing


def main():
    mx.set_default_device(mx.cpu)
    arrays = random_model(np.random.default_rng(0))
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "float")
        write_float(source, arrays)
        for number, target in enumerate(FORMATS):
            work = Path(folder, str(number))
            work.mkdir()
            difference = ours_in_mlx_lm(source, work, target, number)
            differing = mlx_lm_in_ours(source, work, arrays, target)
            failures += not difference <= BOUND or differing > 0
            print(f"{target}: logits within {difference:.1e}; of mlx-lm's layers {differing} differ", flush=True)
    print(f"{len(FORMATS)} formats, {failures} failures")
    return failures > 0


if __name__ == "__main__":
    raise SystemExit(main())
