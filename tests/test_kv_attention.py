"""Attention from packed keys and values, beside float64 attention on what the caches hold."""

import contextlib
import itertools
import math
from pathlib import Path

import numpy as np
import pytest

import quantization as q
import reference_kv as reference
from attention_bound import bound
from conftest import AVAILABLE, SMALL, Page
from quantization import _C

U = reference.U
HALF = {np.dtype(np.float16): 2.0**-11, np.dtype(np.float32): 0.0}


class Cache:
    """Random codes and scales of H heads at C slots, and what they stand for in float64."""

    def __init__(self, rng, H, C, D, bits, codec=2, norms_dtype=np.float32, factor=None):
        self.bits, self.codec, self.D = bits, codec, D
        codes = rng.integers(0, 2**bits, (H, C, D), dtype=np.uint8)
        blocks = D // reference.block_size(D) if codec == 2 else max(1, D // 256)
        norms = rng.uniform(0.5, 1.5, (H, C, blocks)).astype(norms_dtype)
        if codec == 2:
            self.packed, self.B, self.scale_block = reference.pack_2(codes, bits), reference.block_size(D), None
            self.y = reference.decode_2(codes, norms, bits, rotated=True, dtype=np.float64)
            self.x = reference.decode_2(codes, norms, bits, dtype=np.float64)
        else:
            norms *= np.float32(math.sqrt(D)) if D != 512 else np.float32(1)
            used = norms if D == 512 else norms.reshape(-1)[: H * C].reshape(H, C, 1)
            if D < 512:
                norms = norms[..., 0]
            self.packed, self.B = reference.pack_1(codes, bits), D
            s = 1.0 if factor is None else factor
            self.y = reference.decode_1(codes, used, bits, scale_factor=s, rotated=True, dtype=np.float64)
            self.x = reference.decode_1(codes, used, bits, scale_factor=s, dtype=np.float64)
        self.norms = norms

    @property
    def pair(self):
        return self.packed, self.norms


def check(queries, keys, values, **options):
    """Compare with the oracle, a rounding to float16 allowed for; return the result."""
    has_axis = queries.ndim == 3
    given = dict(options)
    common = {"codec": keys.codec, "bits": keys.bits, "value_bits": values.bits}
    got = q.kv_attention(queries, keys.pair, values.pair, **common, **given)
    rounded = queries.astype(np.float64) if queries.dtype != np.float64 else queries.astype(np.float32)
    rows = rounded if has_axis else rounded[:, None]
    options.setdefault("length", None)
    options.pop("scale_factor_d512", None)
    want = reference.attention(rows, keys.x, values.x, **options)
    limit = bound(rows, keys, values, **options) + HALF[got.dtype] * np.abs(want)
    got = got if has_axis else got[:, None]
    assert got.shape == want.shape
    assert (np.abs(got - want) <= limit).all(), np.max(np.abs(got - want) / limit)
    return got


GOLDEN = Path(__file__).parent / "data" / "attention.npz"  # attention.py beside it says whose results these are
CASES = ["plain", "scale", "bool", "float", "window", "causal"]


@pytest.mark.parametrize("name", [f"{peer}.{case}" for peer in ("mlx", "torch") for case in CASES] + ["torch.softcap"])
def test_oracle_is_that_of_others(name):
    """Attention as in bound(), but of plain arrays, in mlx's float32 or torch's float64, and the oracle's float64.

    To first order in the unit roundoff u: a product of D terms, with the scale and its own rounding, is off by
    (D + 2) u |q| |k| scale, softcap adds 8 u |s|, a mask u (|m| + |s + m|). A weight is exp, off by 4 u, of the
    difference from the greatest score, which is rounded: u (M - s). Numerator and denominator sum L weights, one of
    them times values; the quotient rounds once more. In float64 both sides err so.
    """
    data = np.load(GOLDEN)
    case = name.split(".")[1]
    queries, keys, values = (data[array].astype(np.float64) for array in ("q", "k", "v"))
    options = {
        "scale": {"scale": float(data["setting.scale"])},
        "bool": {"mask": data["bool"]},
        "float": {"mask": data["float"]},
        "causal": {"causal": True},
        "window": {"causal": True, "window": int(data["setting.window"])},
        "softcap": {"scale": float(data["setting.scale"]), "softcap": float(data["setting.softcap"])},
    }.get(case, {})
    (heads, _, D), L = queries.shape, keys.shape[1]
    each = np.broadcast_to(np.eye(L), (len(keys), L, L))
    weights = reference.attention(queries, keys, each, **options)
    repeat = np.arange(heads) * len(keys) // heads
    scale = options.get("scale", 1 / math.sqrt(D))
    raw = np.einsum("htd,hld->htl", queries, keys[repeat]) * scale
    norms = np.linalg.norm(queries, axis=-1)[:, :, None] * np.linalg.norm(keys[repeat], axis=-1)[:, None] * scale
    mask = np.where(np.isfinite(data["float"]), data["float"], 0) if case == "float" else 0
    cap = options.get("softcap")
    scores = (raw if cap is None else cap * np.tanh(raw / cap)) + mask
    top = np.where(weights > 0, scores, -np.inf).max(axis=-1, keepdims=True)
    off = (D + 2) * norms + (8 * np.abs(raw) if cap else 0) + np.abs(mask) + np.abs(scores) + (top - scores) + 4
    off = np.where(weights > 0, off, 0)
    off = off + off.max(axis=-1, keepdims=True) + 2 * L + 2
    u = U if name.startswith("mlx") else 2 * 2.0**-53
    limit = 1.01 * u * np.einsum("htl,hld->htd", weights * off, np.abs(values[repeat]))
    got = reference.attention(queries, keys, values, **options)
    assert got.shape == data[name].shape and (np.abs(got - data[name]) <= limit).all()


@pytest.mark.parametrize(("bits", "value_bits"), [(2, 8), (3, 6), (4, 4), (5, 2), (6, 3), (8, 5)])
def test_widths(rng, isa, bits, value_bits):
    keys, values = Cache(rng, 2, 70, 64, bits), Cache(rng, 2, 70, 64, value_bits, norms_dtype=np.float16)
    for rows in (2, 6):
        check(rng.normal(size=(rows, 64)).astype(np.float32), keys, values)


@pytest.mark.parametrize(
    ("D", "Dv"), [(8, 16), (24, 40), (72, 80), (96, 112), (128, 64), (192, 128), (576, 512), (88, 56)]
)
def test_dimensions(rng, D, Dv):
    keys, values = Cache(rng, 2, 21, D, 4), Cache(rng, 2, 21, Dv, 4)
    check(rng.normal(size=(2, D)).astype(np.float32), keys, values)
    check(rng.normal(size=(4, 3, D)).astype(np.float32), keys, values, causal=True)


@pytest.mark.parametrize(
    ("D", "bits"), [(8, 4), (64, 4), (128, 4), (256, 4), (512, 4), (1024, 4), (2048, 4), (256, 5), (512, 6), (256, 8)]
)
def test_codec_1(rng, D, bits):
    factor = 0.5 if D == 512 else None
    keys, values = (Cache(rng, 2, 9, D, bits, codec=1, factor=factor) for _ in range(2))
    for rows in (2, 4):
        queries = rng.normal(size=(rows, D)).astype(np.float32)
        check(queries, keys, values, scale_factor_d512=factor)


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 63, 64, 65, 511, 512, 513, 1030])
def test_lengths(rng, length):
    keys, values = Cache(rng, 1, max(1, length), 32, 4), Cache(rng, 1, max(1, length), 32, 4)
    for queries in (rng.normal(size=(1, 32)), rng.normal(size=(3, 2, 32))):
        got = check(queries.astype(np.float32), keys, values, length=length, causal=True)
        assert length or not got.any()


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (8, 2), (6, 1), (37, 1)])
@pytest.mark.parametrize("queries", [1, 5])
def test_groups(rng, heads, kv_heads, queries):
    keys, values = Cache(rng, kv_heads, 40, 32, 4), Cache(rng, kv_heads, 40, 32, 3)
    check(rng.normal(size=(heads, queries, 32)).astype(np.float32), keys, values, causal=queries > 1)


OPTIONS = [
    {"scale": 0.7},
    {"scale": 0.0},
    {"softcap": 2.5, "scale": 1.0},
    {"causal": True, "window": 9},
    {"window": 50},
    {"window": 10**12},
    {"mask": "bool"},
    {"mask": "float"},
    {"mask": "rows"},
    {"mask": "bool", "causal": True, "window": 30, "softcap": 5.0, "scale": -0.4},
    {"start": 90, "length": 80},
    {"start": 1000, "causal": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(rng, options):
    keys, values = Cache(rng, 2, 100, 64, 4), Cache(rng, 2, 100, 64, 4)
    options = {**options, "length": options.get("length", 100)}
    shape = (4, 3, options["length"])
    masks = {
        "bool": rng.random(shape) < 0.5,
        "float": np.where(rng.random(shape) < 0.3, -np.inf, rng.normal(size=shape)).astype(np.float32),
        "rows": rng.normal(size=shape[2]),
    }
    if "mask" in options:
        options["mask"] = masks[options["mask"]]
    check(rng.normal(size=(4, 3, 64)).astype(np.float32), keys, values, **options)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, "bfloat16"])
def test_types(rng, dtype):
    keys, values = Cache(rng, 2, 40, 64, 4), Cache(rng, 2, 40, 64, 4)
    queries = rng.normal(size=(4, 64)).astype(np.float32)
    if dtype == "bfloat16":
        raw = (queries.view(np.uint32) >> 16).astype(np.uint16)
        got = q.kv_attention(raw, keys.pair, values.pair, input_dtype="bfloat16")
        assert got.dtype == np.uint16
        wide = q.kv_attention((raw.astype(np.uint32) << 16).view(np.float32), keys.pair, values.pair)
        assert (np.abs((got.astype(np.uint32) << 16).view(np.float32) - wide) <= 2**-8 * np.abs(wide)).all()
    else:
        got = q.kv_attention(queries.astype(dtype), keys.pair, values.pair)
        assert got.dtype == (np.float16 if dtype == np.float16 else np.float32)
        check(queries.astype(dtype), keys, values)


def test_nothing_seen_gives_zero(rng):
    keys, values = Cache(rng, 2, 70, 64, 4), Cache(rng, 2, 70, 64, 4)
    queries = rng.normal(size=(2, 3, 64)).astype(np.float32)
    mask = np.ones((2, 3, 70), bool)
    mask[1, 2] = False
    got = check(queries, keys, values, mask=mask)
    assert not got[1, 2].any() and got[0].all()
    assert not q.kv_attention(queries, keys.pair, values.pair, mask=np.full(70, -np.inf)).any()
    early = q.kv_attention(queries, keys.pair, values.pair, length=1, causal=True)
    assert not early[:, :2].any() and early[:, 2].all()


@contextlib.contextmanager
def settings(isa, threads):
    with q.isa(isa), q.threads(threads):
        yield


def random_case(rng):
    D, Dv = rng.choice([8, 16, 24, 64, 72, 80, 96, 128, 192], 2)
    bits, value_bits = rng.choice([2, 3, 4, 5, 6, 8], 2)
    H, T = rng.integers(1, 3), rng.integers(1, 12)
    C = int(rng.choice([1, 7, 64, 65, 130, 600]))
    L = int(rng.integers(0, C + 1))
    keys, values = (
        Cache(rng, H, C, int(D), int(bits)),
        Cache(rng, H, C, int(Dv), int(value_bits), norms_dtype=np.float16),
    )
    queries = rng.normal(size=(H * int(rng.choice([1, 2, 5])), T, D)).astype(np.float32)
    options = {"bits": int(bits), "value_bits": int(value_bits), "length": L, "start": int(rng.integers(0, C))}
    options["causal"] = bool(rng.integers(2))
    options["window"] = [None, int(rng.integers(1, 80))][rng.integers(2)]
    options["softcap"] = [None, 3.0][rng.integers(2)]
    options["mask"] = [None, rng.random((queries.shape[0], T, L)) < 0.8][rng.integers(2)]
    return queries, keys, values, options


def test_same_bits(rng):
    """On every instruction set, for every number of threads, for queries one by one, wherever the ring starts."""
    for _ in range(3 if SMALL else 12):
        queries, keys, values, options = random_case(rng)
        want = q.kv_attention(queries, keys.pair, values.pair, **options)
        for isa, threads in itertools.product(AVAILABLE, (1, 3)):
            with settings(isa, threads):
                assert q.kv_attention(queries, keys.pair, values.pair, **options).tobytes() == want.tobytes()
        T, L, C = queries.shape[1], options["length"], keys.packed.shape[1]
        for t in range(T):
            alone = dict(options)
            if options["causal"]:
                alone["length"] = max(0, L - T + t + 1)
            if options["mask"] is not None:
                alone["mask"] = options["mask"][:, t : t + 1, : alone["length"]]
            got = q.kv_attention(queries[:, t : t + 1], keys.pair, values.pair, **alone)
            assert got.tobytes() == want[:, t : t + 1].tobytes()
        pairs = [tuple(np.roll(a, 3 - options["start"], axis=1) for a in side.pair) for side in (keys, values)]
        got = q.kv_attention(queries, *pairs, **{**options, "start": 3 % C})
        assert got.tobytes() == want.tobytes()


def test_not_finite(rng, isa):
    keys, values = Cache(rng, 2, 70, 64, 4), Cache(rng, 2, 70, 64, 4)
    queries = rng.normal(size=(4, 64)).astype(np.float32)

    def attend(queries=queries, **options):
        got = q.kv_attention(queries, keys.pair, values.pair, **options)
        nan = np.isnan(got)
        assert (got[nan].view(np.uint32) == 0x7FC00000).all()  # one NaN everywhere
        return nan.all(axis=-1)

    assert not attend().any()
    broken = queries.copy()
    broken[1, 5] = np.nan
    assert attend(broken).tolist() == [False, True, False, False]
    broken[1, 5] = np.inf
    assert attend(broken).tolist() == [False, True, False, False]
    keys.norms[1, 69] = np.nan  # of heads 2 and 3; the last position
    assert attend().tolist() == [False, False, True, True]
    assert not attend(length=69).any()
    assert not attend(mask=np.arange(70) < 69).any()
    values.norms[0, 3] = np.nan
    assert attend(length=69).tolist() == [True, True, False, False]
    assert not attend(length=69, window=60).any()
    assert attend(mask=np.where(np.arange(70) == 8, np.nan, 0)).all()


def test_infinite_scores(rng):
    """A float16 scale that has overflowed: the position has all the weight, which softmax makes NaN, or none.

    Then the result is that of not seeing the position. The other query's sign turns that of the scores.
    """
    keys, values = Cache(rng, 1, 3, 64, 4), Cache(rng, 1, 3, 64, 4)
    queries = rng.normal(size=(1, 64)).astype(np.float32)
    unseen = {
        sign: q.kv_attention(sign * queries, keys.pair, values.pair, mask=[True, False, True]) for sign in (1, -1)
    }
    keys.norms[0, 1] = np.inf
    results = {sign: q.kv_attention(sign * queries, keys.pair, values.pair) for sign in (1, -1)}
    (sign,) = (sign for sign, result in results.items() if not np.isnan(result).any())
    assert results[sign].tobytes() == unseen[sign].tobytes()
    assert np.isnan(results[-sign]).all()


def test_layouts(rng):
    """Strides of every kind, odd addresses, read-only memory."""
    keys, values = Cache(rng, 2, 70, 80, 3), Cache(rng, 2, 70, 80, 6, norms_dtype=np.float16)
    queries = rng.normal(size=(4, 2, 80)).astype(np.float32)
    options = {"bits": 3, "value_bits": 6, "causal": True, "start": 11}
    want = q.kv_attention(queries, keys.pair, values.pair, **options)

    def apart(a):
        wide = np.empty((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
        wide[..., ::2] = a
        return wide[..., ::2]

    def odd(a):
        raw = np.empty(a.nbytes + 1, np.uint8)
        view = raw[1:].view(a.dtype).reshape(a.shape)
        view[...] = a
        view.flags.writeable = False
        return view

    def backwards(a):
        return np.ascontiguousarray(a[:, ::-1])[:, ::-1]

    for layout in (apart, odd, backwards, np.asfortranarray):
        got = q.kv_attention(layout(queries), tuple(map(layout, keys.pair)), list(map(layout, values.pair)), **options)
        assert got.tobytes() == want.tobytes()
    shared = tuple(np.broadcast_to(a[:1, :1], a.shape) for a in keys.pair)
    got = q.kv_attention(queries, shared, values.pair, **options)
    copied = q.kv_attention(queries, tuple(a.copy() for a in shared), values.pair, **options)
    assert got.tobytes() == copied.tobytes()
    out = np.empty((4, 80, 2), np.float32).transpose(0, 2, 1)
    assert q.kv_attention(queries, keys.pair, values.pair, **options, out=out) is out
    assert (out == want).all()


@pytest.mark.parametrize("D", [8, 24, 64, 72, 80, 128, 256, 512])
def test_nothing_is_touched_beyond_the_arrays(D, isa, rng):
    """Reading or writing one byte too many ends the process. Positions before a tile's end, and rows alone and many."""
    pages = [Page(1 << 16) for _ in range(6)]
    codecs = [(2, bits) for bits in reference.BITS_2]
    codecs += [(1, bits) for bits in (reference.BITS_1 if D in (256, 512) else (4,) if D & (D - 1) == 0 else ())]
    for codec, bits in codecs:
        keys, values = Cache(rng, 1, 67, D, bits, codec=codec), Cache(rng, 1, 67, D, bits, codec=codec)
        options = {"bits": bits, "codec": codec}
        for rows, at_end in itertools.product((1, 5), (True, False)):
            queries = rng.normal(size=(rows, D)).astype(np.float32)
            want = q.kv_attention(queries, keys.pair, values.pair, **options)
            arrays = (queries, *keys.pair, *values.pair, np.zeros_like(want))
            x, k, k_norms, v, v_norms, out = (p.put(a, at_end) for p, a in zip(pages, arrays, strict=True))
            q.kv_attention(x, (k, k_norms), (v, v_norms), **options, out=out)
            assert out.tobytes() == want.tobytes()


@pytest.mark.slow
def test_rows_that_share_too_much_memory(rng):
    """Sums of 34 chunks of 4096 elements take more than 16 MiB for 32 rows: blocks of 16, one at a turn."""
    (k, k_norms), (v, v_norms) = (q.quantize_kv(rng.normal(size=(1, 1000, D)).astype(np.float32), 2) for D in (8, 4096))
    keys, values = ([np.tile(a, (1, 17, 1)) for a in side] for side in ((k, k_norms), (v, v_norms)))
    queries = rng.normal(size=(40, 8)).astype(np.float32)
    got = q.kv_attention(queries, keys, values, bits=2)
    for row in (0, 16, 39):
        alone = q.kv_attention(queries[row : row + 1], keys, values, bits=2)
        assert got[row : row + 1].tobytes() == alone.tobytes()


def test_many_queries(rng):
    """70000 queries of three positions: 2188 blocks of rows, more than are under way at a time."""
    keys, values = Cache(rng, 1, 3, 8, 4), Cache(rng, 1, 3, 8, 4)
    queries = rng.normal(size=(1, 70000, 8)).astype(np.float32)
    got = q.kv_attention(queries, keys.pair, values.pair)
    for t in (0, 31, 32, 40000, 69999):
        assert got[:, t].tobytes() == q.kv_attention(queries[:, t], keys.pair, values.pair).tobytes()
    causal = q.kv_attention(queries, keys.pair, values.pair, causal=True)
    assert not causal[:, :-3].any()
    assert causal[:, -1].tobytes() == got[:, -1].tobytes()


def test_empty(rng):
    keys = Cache(rng, 2, 0, 64, 4)
    assert q.kv_attention(np.ones((4, 64), np.float32), keys.pair, keys.pair).tolist() == np.zeros((4, 64)).tolist()
    assert q.kv_attention(np.ones((4, 0, 64), np.float32), keys.pair, keys.pair).shape == (4, 0, 64)
    none = Cache(rng, 0, 5, 64, 4)
    assert q.kv_attention(np.ones((0, 64), np.float32), none.pair, none.pair).shape == (0, 64)


def test_scratch_runs_out(rng):
    keys = Cache(rng, 2, 600, 64, 4)
    out = np.full((2, 64), 7, np.float32)
    for successes in range(3):
        _C.fail_allocations_after(successes)
        try:
            with pytest.raises(MemoryError):
                q.kv_attention(np.ones((2, 64), np.float32), keys.pair, keys.pair, out=out)
        finally:
            _C.fail_allocations_after(-1)
    assert (out == 7).all()


def test_kernel_is_compiled_once(rng):
    keys = Cache(rng, 2, 10, 64, 4)
    kernel = q.KvAttention()
    assert kernel._kernel is None
    plan = kernel.compile()
    queries = rng.normal(size=(2, 64)).astype(np.float32)
    got = kernel(queries, keys.pair, keys.pair, length=4)
    assert kernel.compile() is plan and "kv_attention" in repr(plan)
    assert got.tobytes() == q.kv_attention(queries, keys.pair, keys.pair, length=4).tobytes()


PACKED, NORMS = np.zeros((2, 8, 32), np.uint8), np.zeros((2, 8, 1), np.float16)
ERRORS = [
    ({"q": np.zeros(64, np.float32)}, ValueError, r"q must have shape \(heads, D\) or .* got \(64,\)"),
    ({"q": np.zeros((4, 64), np.int32)}, TypeError, "q has dtype int32, must be float32"),
    (
        {"q": np.zeros((3, 64), np.float32)},
        ValueError,
        r"q.shape\[0\] must be a multiple of the cache's 2 heads, got 3",
    ),
    ({"q": np.zeros((4, 32), np.float32)}, ValueError, r"q.shape\[-1\] must be 64, .* got 32"),
    ({"k_cache": PACKED}, TypeError, r"k_cache must be a tuple \(packed, norms\), .* got ndarray"),
    ({"v_cache": (PACKED,)}, ValueError, r"v_cache must be a tuple \(packed, norms\), got 1 items"),
    ({"k_cache": (PACKED.astype(np.int8), NORMS)}, TypeError, r"k_cache\[0\] has dtype int8, must be uint8"),
    ({"k_cache": (PACKED[0], NORMS)}, ValueError, r"k_cache\[0\] must have shape \(heads, capacity, bytes\)"),
    (
        {"v_cache": (PACKED[..., :31], NORMS)},
        ValueError,
        r"v_cache\[0\].shape\[2\] must be D \* 4 / 8 bytes, .* got 31",
    ),
    ({"k_cache": (PACKED, NORMS[:, :, 0])}, ValueError, r"k_cache\[1\] must have shape \(2, 8, 1\), got \(2, 8\)"),
    ({"k_cache": (PACKED, NORMS.astype(np.float64))}, TypeError, r"k_cache\[1\] must be float16 or float32 .* float64"),
    (
        {"v_cache": (PACKED[:, :7], NORMS[:, :7])},
        ValueError,
        "k_cache and v_cache must have the same heads and capacity, got 2, 8 and 2, 7",
    ),
    ({"bits": 7}, ValueError, "bits must be 2, 3, 4, 5, 6 or 8, got 7"),
    ({"bits": 3, "codec": 1}, ValueError, "bits must be 4, 5, 6 or 8 with codec=1, got 3"),
    ({"value_bits": 0}, ValueError, "value_bits must be 2, 3, 4, 5, 6 or 8, got 0"),
    ({"bits": 4.0}, TypeError, "bits must be an integer, got float"),
    ({"codec": 3}, ValueError, "codec must be 1 or 2, got 3"),
    ({"codec": 1}, TypeError, r"k_cache\[1\] must be float32 for codec 1, got float16"),
    ({"length": 9}, ValueError, "length must be from 0 to 8, the capacity, got 9"),
    ({"start": -1}, ValueError, "start must be at least 0, got -1"),
    ({"window": 0}, ValueError, "window must be at least 1, got 0"),
    ({"scale": np.nan}, ValueError, "scale must be a finite number or None, got nan"),
    ({"scale": "1"}, TypeError, "scale must be a number, got str"),
    ({"softcap": 0.0}, ValueError, "softcap must be a finite, positive number or None, got 0.0"),
    ({"scale_factor_d512": 0.0}, ValueError, "scale_factor_d512 must not be 0"),
    ({"causal": 1}, TypeError, "causal must be True or False, got int"),
    ({"mask": np.ones(7, bool)}, ValueError, r"mask must have shape that broadcasts to \(4, 1, 8\), got \(7,\)"),
    ({"mask": np.ones(8, np.int64)}, TypeError, "mask has dtype int64, must be float32"),
    ({"mask": np.ones((1, 4, 1, 8), bool)}, ValueError, "mask must have shape"),
    ({"out": np.zeros((4, 64))}, TypeError, "out has dtype float64, must be float32"),
    ({"out": np.zeros((4, 1, 64), np.float32)}, ValueError, r"out must have shape \(4, 64\), got \(4, 1, 64\)"),
    ({"input_dtype": "float16"}, ValueError, "input_dtype must be 'bfloat16'"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=lambda value: str(value)[:40])
def test_errors(change, error, message):
    arguments = {"q": np.zeros((4, 64), np.float32), "k_cache": (PACKED, NORMS), "v_cache": (PACKED, NORMS), **change}
    with pytest.raises(error, match="^kv_attention: " + message):
        q.kv_attention(**arguments)


def test_out_shares_no_memory(rng):
    keys = Cache(rng, 2, 8, 64, 4)
    queries = rng.normal(size=(2, 64)).astype(np.float32)
    with pytest.raises(ValueError, match="out shares memory with q: give it memory of its own"):
        q.kv_attention(queries, keys.pair, keys.pair, out=queries)
    norms = np.zeros((2, 64, 1), np.float32)
    packed = np.zeros((2, 64, 32), np.uint8)
    with pytest.raises(ValueError, match=r"out shares memory with v_cache\[1\]"):
        q.kv_attention(queries, (packed, norms.copy()), (packed, norms), out=norms[..., 0])


# ---- windows without an end, values without weight, sizes beyond memory ----


@pytest.mark.parametrize("window", [2**63 - 1, 2**63 - 2, 2**62, 70])
def test_windows_that_hide_nothing(rng, window):
    """More queries than positions: the first ones stand before position 0."""
    keys, values = Cache(rng, 1, 70, 64, 4), Cache(rng, 1, 70, 64, 4)
    queries = rng.normal(size=(1, 3, 64)).astype(np.float32)
    for options in ({"length": 1, "causal": True}, {"length": 0, "causal": True}, {"causal": True}, {}):
        plain = q.kv_attention(queries, keys.pair, values.pair, **options)
        got = q.kv_attention(queries, keys.pair, values.pair, window=window, **options)
        assert got.tobytes() == plain.tobytes()


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("distance", [1, 70, 600])
@pytest.mark.parametrize("rows", [1, 4])
def test_values_without_weight(rng, isa, scale, distance, rows):
    """A score 200 below the greatest one makes a weight of 0, in the same tile, in another, in another chunk, before
    or after it; a score 20 below does not."""
    C = distance + 2
    for heavy, light in ((0, distance), (distance, 0)):
        keys, values = Cache(rng, 1, C, 64, 4), Cache(rng, 1, C, 64, 4)
        queries = rng.normal(size=(rows, 64)).astype(np.float32)
        mask = np.full(C, -np.inf, np.float32)
        mask[heavy], mask[light] = 200, 0
        seen = np.arange(C) == heavy
        want = q.kv_attention(0 * queries, keys.pair, values.pair, mask=seen)
        values.norms[0, light] = scale
        assert np.isfinite(want).all()
        assert (q.kv_attention(0 * queries, keys.pair, values.pair, mask=mask) == want).all()
        mask[heavy] = 20
        assert not np.isfinite(q.kv_attention(0 * queries, keys.pair, values.pair, mask=mask)).any()


def test_caches_larger_than_memory():
    """A broadcast cache has no more positions than sizes of scratch can count."""
    packed = np.broadcast_to(np.zeros((1, 1, 2), np.uint8), (1, 2**60, 2))
    norms = np.broadcast_to(np.zeros((1, 1, 1), np.float16), (1, 2**60, 1))
    with pytest.raises(ValueError, match=r"^kv_attention: k_cache\[0\] of shape .* is too large$"):
        q.kv_attention(np.ones((32, 8), np.float32), (packed, norms), (packed, norms), bits=2)
