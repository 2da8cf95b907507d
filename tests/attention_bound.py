"""The bound of attention's error that csrc/kernels/attention_definition.h derives, computed for given arguments."""

import math

import numpy as np

import reference_kv as reference

U = reference.U


def gamma(n):
    """Relative error of n roundings in a row (Higham, Accuracy and Stability, 3.1)."""
    return n * U / (1 - n * U)


def rotation_error(B):
    """r(B) of kernels/attention_definition.h."""
    outer, inner = reference.factors(B)
    return gamma(math.log2(inner) + 2 + (outer - 1) * math.sqrt(outer))


def bound(queries, keys, values, *, length, start=0, scale=None, mask=None, softcap=None, **options):
    """Bound of each element's error, as kernels/attention_definition.h derives it; comments give its letters."""
    heads, _T, D = queries.shape
    H, C, _ = keys.y.shape
    L = C if length is None else length
    slots, repeat = (start + np.arange(L)) % C, np.arange(heads) * H // heads
    k, v = keys.x[repeat][:, slots], values.y[repeat][:, slots]
    factor = 1 / math.sqrt(D) if scale is None else abs(scale)
    norms = np.linalg.norm(queries.astype(np.float64), axis=-1)[:, :, None] * np.linalg.norm(k, axis=-1)[:, None]
    chunks = -(-L // 512)
    off = norms * factor * (rotation_error(keys.B) + gamma(4 * math.ceil(keys.B / 64) + 4 + D // keys.B * 2 + 5))  # d_i
    raw = np.einsum("htd,hld->htl", queries.astype(np.float64), k) * (1 / math.sqrt(D) if scale is None else scale)
    if softcap is not None:
        off = off + 8 * U * np.abs(raw)
        raw = softcap * np.tanh(raw / softcap)
    scores = raw
    if mask is not None and np.asarray(mask).dtype != bool:
        added = np.where(np.isfinite(mask), np.asarray(mask, np.float64), 0)
        scores = raw + np.asarray(mask, np.float64)
        off = off + U * (np.abs(added) + np.abs(raw + added))
    each = np.broadcast_to(np.eye(C), (H, C, C))  # values that show the weights of all slots
    options = {"length": L, "start": start, "scale": scale, "mask": mask, "softcap": softcap, **options}
    weights = reference.attention(queries, keys.x, each, **options)[..., slots]
    top = np.where(weights > 0, scores, -np.inf).max(axis=-1, keepdims=True, initial=-np.inf)
    spread = np.where(weights > 0, top - scores, 0)
    steps = 8 + chunks  # t
    relative = np.where(weights > 0, off + U * spread + 5 * U * (steps + 2), 0)  # e_i
    relative = relative + relative.max(axis=-1, keepdims=True, initial=0) + gamma(min(L, 512) + steps + 2 * chunks + 6)
    error = np.einsum("htl,hld->htd", weights * relative, np.abs(v)) + 2.0**-126 * np.abs(v).sum(axis=1, keepdims=True)
    total = np.einsum("htl,hld->htd", weights, v)
    size = np.linalg.norm(reference.in_blocks(error, values.B), axis=-1, keepdims=True)
    size = size + rotation_error(values.B) * np.linalg.norm(
        reference.in_blocks(total, values.B), axis=-1, keepdims=True
    )
    return 1.01 * np.broadcast_to(size, (*size.shape[:-1], values.B)).reshape(total.shape) + 1e-35
