"""`KVCache` against a plain list of tokens: rings, long appends, trims, copies, files, and every error."""

import copy
import json
import pickle

import numpy as np
import pytest

import quantization as q
import reference_kv as ref
from attention_bound import bound
from quantization import _kv_cache, _kv_file
from quantization._kv_store import Store

HEADS, D = 2, 16


def tokens_of(rng, count, heads=HEADS, dim=D):
    return rng.standard_normal((heads, count, dim), dtype=np.float32)


def arrays_of(cache):
    return (*cache.keys, *cache.values)


class Plain:
    """What a cache must be: every token of the sequence in a list of float arrays, and how many of them it holds."""

    def __init__(self, **options):
        self.options = dict(heads=HEADS, capacity=7, head_dim=D) | options
        self.cache = q.KVCache(**self.options)
        self.k, self.v, self.held = [], [], 0

    def append(self, k, v):
        self.cache.append(k, v)
        self.k += list(k.swapaxes(0, 1))
        self.v += list(v.swapaxes(0, 1))
        self.held = min(self.held + k.shape[1], self.cache.capacity)

    def trim(self, n):
        self.cache.trim(n)
        self.k, self.v, self.held = self.k[: len(self.k) - n], self.v[: len(self.v) - n], self.held - n

    def reset(self):
        self.cache.reset()
        self.k, self.v, self.held = [], [], 0

    def tail(self, count):
        """The last tokens, as arrays (heads, count, dim)."""
        first = len(self.k) - count
        k = np.array(self.k[first:]).reshape(count, HEADS, self.cache.head_dim)
        v = np.array(self.v[first:]).reshape(count, HEADS, self.cache.value_dim)
        return k.swapaxes(0, 1), v.swapaxes(0, 1)

    def anew(self):
        """The tokens held in an order that never wrapped, encoded in one piece."""
        cache = q.KVCache(**(self.options | {"capacity": max(1, self.held), "window": None}))
        cache.append(*self.tail(self.held))
        return cache

    def check(self, rng):
        cache, anew = self.cache, self.anew()
        assert (cache.length, cache.total) == (self.held, len(self.k))
        for got, expected in zip(cache.dequantize(), anew.dequantize(), strict=True):
            assert np.array_equal(got, expected) and got.dtype == np.float32
        window = cache.window or len(self.k)
        for T in (1, 2, 3):
            query = rng.standard_normal((2 * HEADS, T, cache.head_dim), dtype=np.float32)
            if not 0 < T <= len(self.k) or min(len(self.k), window + T - 1) > self.held:
                with pytest.raises(ValueError, match=r"KVCache\.attend: "):
                    cache.attend(query)
                continue
            got = cache.attend(query)
            assert np.array_equal(got, q.kv_attention(query, anew.keys, anew.values, **self.kernel(), causal=True))
            check_attention(got, query, cache, causal=True, window=window)

    def kernel(self):
        names = ("bits", "value_bits", "codec", "window")
        return {name: getattr(self.cache, name) for name in names}


class Exact:
    """What one side of a cache stands for in float64, by slot: rotated and not."""

    def __init__(self, arrays, dim, bits, codec):
        packed, norms = arrays
        if codec == 2:
            self.B, codes, decode = ref.block_size(dim), ref.unpack_2(packed, bits), ref.decode_2
        else:
            self.B, codes, decode = dim, ref.unpack_1(packed, bits), ref.decode_1
            norms = norms if dim == 512 else norms.reshape(-1)[: packed[..., 0].size].reshape(*packed.shape[:2], 1)
        self.y = decode(codes, norms, bits, rotated=True, dtype=np.float64)
        self.x = decode(codes, norms, bits, dtype=np.float64)


def check_attention(got, query, cache, **options):
    """Compare with float64 attention to what the cache holds."""
    keys = Exact(cache.keys, cache.head_dim, cache.bits, cache.codec)
    values = Exact(cache.values, cache.value_dim, cache.value_bits, cache.codec)
    options = {"length": cache.length, "start": cache.start, **options}
    error = np.abs(got - ref.attention(query, keys.x, values.x, **options))
    assert (error <= bound(query, keys, values, **options)).all()


KINDS = [
    dict(),
    dict(sliding=True),
    dict(sliding=True, window=3, bits=3, value_bits=2),
    dict(window=2, bits=8, value_dim=24, norms_dtype=np.float32, scale="norm"),
    dict(codec=1, sliding=True),
    dict(codec=1, sliding=True, head_dim=8, value_dim=64),
]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_random_operations(options, rng):
    plain = Plain(**options)
    for _ in range(40):
        room = plain.cache.capacity - plain.held
        match rng.integers(7):
            case 0:
                plain.trim(int(rng.integers(plain.held + 1)))
            case 1:
                plain.cache = pickle.loads(pickle.dumps(plain.cache))
            case 2 if rng.integers(4) == 0:
                plain.reset()
            case _:
                count = int(rng.integers(20 if plain.cache.sliding and rng.integers(4) == 0 else 4))
                count = count if plain.cache.sliding else min(count, room)
                cache = plain.cache
                plain.append(tokens_of(rng, count, dim=cache.head_dim), tokens_of(rng, count, dim=cache.value_dim))
        plain.check(rng)


def test_operations_that_hypothesis_finds():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    step = st.tuples(st.sampled_from(["append", "append", "trim", "copy", "reset"]), st.integers(0, 12))

    @hypothesis.settings(max_examples=25, derandomize=True)
    @hypothesis.given(st.lists(step, max_size=12), st.integers(1, 5), st.booleans())
    def run(steps, capacity, sliding):
        rng = np.random.default_rng(capacity)
        plain = Plain(capacity=capacity, sliding=sliding)
        for name, count in steps:
            if name == "append":
                count = count if sliding else min(count, capacity - plain.held)
                plain.append(tokens_of(rng, count), tokens_of(rng, count))
            elif name == "trim":
                plain.trim(min(count, plain.held))
            elif name == "copy":
                plain.cache = plain.cache.copy()
            else:
                plain.reset()
        plain.check(rng)

    run()


@pytest.mark.parametrize("stores", [0, 1, 2])
@pytest.mark.parametrize("tokens", [3, 9])
def test_an_interrupt_leaves_nothing_wrong(stores, tokens, monkeypatch, rng):
    """Of a ring that was full, after none, one or both stores were written: what is still held is what it was."""
    plain = Plain(sliding=True)
    plain.append(tokens_of(rng, 12), tokens_of(rng, 12))
    put, written = Store.put, []

    def put_and_stop(store, *arguments):
        if len(written) == stores:
            raise KeyboardInterrupt
        put(store, *arguments)
        written.append(store)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "put", put_and_stop)
    with pytest.raises(KeyboardInterrupt):
        plain.cache.append(tokens_of(rng, tokens), tokens_of(rng, tokens))
    monkeypatch.undo()
    plain.held = max(0, 7 - tokens)
    plain.check(rng)


@pytest.mark.parametrize("sliding", [False, True])
def test_decoded_tokens_are_those_appended(sliding, rng):
    """At 8 bits the mean square error of a vector is 4.1e-5 of it: its root 0.0064, for 64 coordinates never 0.02."""
    cache = q.KVCache(3, 10 if sliding else 32, 64, bits=8, sliding=sliding)
    k, v = tokens_of(rng, 32, 3, 64), tokens_of(rng, 32, 3, 64)
    for first, last in [(0, 4), (4, 5), (5, 16), (16, 32)]:
        cache.append(k[:, first:last], v[:, first:last])
    for got, given in zip(cache.dequantize(), (k, v), strict=True):
        given = given[:, 32 - cache.length :]
        error = np.linalg.norm(got - given, axis=-1) / np.linalg.norm(given, axis=-1)
        assert got.shape == given.shape and error.max() < 0.02


@pytest.mark.parametrize(
    "options",
    [
        dict(bits=bits, codec=codec, head_dim=dim)
        for codec, bits, dim in [(1, 4, 64), (1, 4, 256), (1, 4, 512), (1, 4, 1024), (1, 5, 256), (1, 8, 512)]
    ]
    + [dict(bits=bits, head_dim=dim) for bits, dim in [(2, 80), (3, 96), (4, 576), (5, 128), (6, 8), (8, 64)]],
    ids=str,
)
def test_codes_are_those_of_the_encoders(options, rng):
    """A long append that wraps, against the encoders, which tests of their own know."""
    codec, bits, dim = options.get("codec", 2), options["bits"], options["head_dim"]
    cache = q.KVCache(heads=2, capacity=5, sliding=True, **options)
    k, v = tokens_of(rng, 7, 2, dim), tokens_of(rng, 7, 2, dim)
    cache.append(k, v)
    slots = np.arange(2, 7) % 5
    for (packed, norms), x in ((cache.keys, k), (cache.values, v)):
        if codec == 2:
            expected, factors = q.quantize_kv(x[:, 2:], bits)
            assert np.array_equal(packed[:, slots], expected) and np.array_equal(norms[:, slots], factors)
            continue
        shapes = ref.shapes_1(2, 5, dim, bits)
        expected, factors = np.zeros(shapes[0], np.uint8), np.zeros(shapes[1], np.float32)
        for t in range(2, 7):
            if bits == 4:
                q.hadamard_quantize_kv(x[:, t], expected, factors, write_pos=t, is_sliding=True)
            else:
                q.hadamard_quantize_kv_hb(x[:, t], expected, factors, write_pos=t, is_sliding=True, codebook_bits=bits)
        assert np.array_equal(packed, expected) and np.array_equal(norms, factors)
    decoded = q.dequantize_kv(*cache.keys, bits, codec=codec)[:, slots]
    assert np.array_equal(cache.dequantize()[0], decoded)
    query = rng.standard_normal((4, dim), dtype=np.float32)
    check_attention(cache.attend(query)[:, None], query[:, None], cache)


def test_views_are_what_attention_takes(rng):
    cache = q.KVCache(2, 4, 64, value_dim=128, bits=8, value_bits=3, sliding=True)
    cache.append(tokens_of(rng, 6, 2, 64), tokens_of(rng, 6, 2, 128))
    assert [array.shape for array in arrays_of(cache)] == [(2, 4, 64), (2, 4, 1), (2, 4, 48), (2, 4, 1)]
    assert [array.dtype for array in arrays_of(cache)] == [np.uint8, np.float16] * 2
    assert cache.start == 2 and cache.length == 4
    query = rng.standard_normal((2, 64), dtype=np.float32)
    got = q.kv_attention(query, cache.keys, cache.values, bits=8, value_bits=3, length=4, start=cache.start)
    assert np.array_equal(got, cache.attend(query)) and got.shape == (2, 128)
    before = cache.keys[0]
    cache.append(tokens_of(rng, 1, 2, 64)[:, 0], tokens_of(rng, 1, 2, 128)[:, 0])
    assert np.array_equal(before, cache.keys[0])  # no copies: they follow the cache
    for array in arrays_of(cache):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    assert cache.nbytes == 2 * 4 * (64 + 2 + 48 + 2) and cache.bits_per_value == 8 * 116 / 192


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16", "list"])
def test_types_of_floats(dtype, rng):
    x = rng.standard_normal((2, 3, 64)).astype(np.float16)
    if dtype == "bfloat16":
        x = x.astype(pytest.importorskip("ml_dtypes").bfloat16)
    given = x.tolist() if dtype == "list" else x.astype(dtype)
    cache, plain = q.KVCache(2, 8, 64), q.KVCache(2, 8, 64)
    cache.append(given, given)
    plain.append(x.astype(np.float32), x.astype(np.float32))
    for got, expected in zip(arrays_of(cache), arrays_of(plain), strict=True):
        assert np.array_equal(got, expected)
    assert cache.attend(np.ones((2, 64), np.float16)).dtype == np.float16


def test_options_of_attend(rng):
    cache = q.KVCache(2, 9, 64, bits=6)
    cache.append(tokens_of(rng, 9, 2, 64), tokens_of(rng, 9, 2, 64))
    query, out = rng.standard_normal((4, 3, 64), dtype=np.float32), np.empty((4, 3, 64), np.float32)
    for options in (
        dict(scale=0.3, softcap=5.0),
        dict(mask=rng.integers(0, 2, (4, 3, 9)).astype(bool)),
        dict(mask=rng.standard_normal((3, 9)).astype(np.float32), causal=False),
    ):
        assert cache.attend(query, **options, out=out) is out
        check_attention(out, query, cache, **({"causal": True} | options))


def test_copies_are_apart(rng):
    cache = q.KVCache(2, 4, 64, sliding=True, window=2, value_bits=8, scale="least_squares")
    cache.append(tokens_of(rng, 6, 2, 64), tokens_of(rng, 6, 2, 64))
    for twin in (cache.copy(), copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert repr(twin) == repr(cache) and twin.scale == "least_squares"
        for got, expected in zip(twin.dequantize(), cache.dequantize(), strict=True):
            assert np.array_equal(got, expected)
        assert not any(np.shares_memory(a, b) for a, b in zip(arrays_of(twin), arrays_of(cache), strict=True))
        twin.reset()
    assert (cache.length, cache.total) == (4, 6)


class Layered(q.KVCache):
    """A subclass whose __init__ takes something else, and which keeps something of its own."""

    def __init__(self, layers):
        super().__init__(2, 4, 64, sliding=True)
        self.layers = layers


def test_a_subclass_with_an_init_of_its_own(rng, tmp_path):
    cache = Layered([3, 4])
    cache.append(tokens_of(rng, 6, 2, 64), tokens_of(rng, 6, 2, 64))
    twins = {way: way(cache) for way in (Layered.copy, copy.copy, copy.deepcopy)}
    twins[pickle.loads] = pickle.loads(pickle.dumps(cache))
    for way, twin in twins.items():
        assert type(twin) is Layered and repr(twin) == repr(cache) and repr(twin).startswith("Layered(last 4 of 6")
        assert twin.layers == [3, 4] and (twin.layers is cache.layers) == (way in (Layered.copy, copy.copy))
        assert all(np.array_equal(a, b) for a, b in zip(twin.dequantize(), cache.dequantize(), strict=True))
        assert not any(np.shares_memory(a, b) for a, b in zip(arrays_of(twin), arrays_of(cache), strict=True))
        twin.reset()
    assert cache.length == 4
    cache.save(tmp_path / "cache.npz")
    loaded = Layered.load(tmp_path / "cache.npz")
    assert type(loaded) is Layered and repr(loaded) == repr(cache) and not hasattr(loaded, "layers")


def test_a_deep_copy_of_a_cache_that_knows_itself():
    cache = Layered([])
    cache.layers.append(cache)
    twin = copy.deepcopy(cache)
    assert twin is not cache and twin.layers[0] is twin


def test_repr():
    cache = q.KVCache(1, 4, 192, 8, 4, sliding=True, window=3, value_dim=128)
    cache.append(np.ones((1, 6, 192), np.float32), np.ones((1, 6, 128), np.float32))
    assert repr(cache) == (
        "KVCache(last 4 of 6 positions, sliding, window 3, 1 head x 192 and 128, 8 and 4 bits, 6.500 bits/value, "
        "1,040 bytes)"
    )
    assert repr(q.KVCache(8, 1024, 256, codec=1)) == (
        "KVCache(0 of 1024 positions, 8 heads x 256, 4 bits, codec 1, 4.125 bits/value, 2,162,688 bytes)"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def test_window_that_is_no_longer_held(rng):
    cache = q.KVCache(2, 6, 64, sliding=True, window=4)
    cache.append(tokens_of(rng, 6, 2, 64), tokens_of(rng, 6, 2, 64))
    cache.attend(tokens_of(rng, 6, 2, 64))  # nothing is lost yet: all six are there
    cache.append(tokens_of(rng, 1, 2, 64), tokens_of(rng, 1, 2, 64))
    cache.attend(tokens_of(rng, 3, 2, 64))
    with pytest.raises(ValueError, match=r"4 queries with window=4 attend to 7 positions, but 6 are held \(capacity=7"):
        cache.attend(tokens_of(rng, 4, 2, 64))
    cache.attend(tokens_of(rng, 4, 2, 64), causal=False)  # all from the last position
    cache.trim(3)
    with pytest.raises(ValueError, match=r"1 query with window=4 attend.* 4 positions, but 3 are held \(capacity=7 wo"):
        cache.attend(tokens_of(rng, 1, 2, 64))
    enough = q.KVCache(2, 7, 64, sliding=True, window=4)
    enough.append(tokens_of(rng, 7, 2, 64), tokens_of(rng, 7, 2, 64))
    enough.trim(3)
    enough.attend(tokens_of(rng, 1, 2, 64))
    with pytest.raises(ValueError, match="5 queries of a sequence of 4 positions"):
        cache.attend(tokens_of(rng, 5, 2, 64))


def test_overflow_says_what_would_fit(rng):
    cache = q.KVCache(2, 4, 64)
    cache.append(tokens_of(rng, 3, 2, 64), tokens_of(rng, 3, 2, 64))
    message = r"2 tokens do not fit: 3 of 4 positions are taken \(1 would fit, and sliding=True keeps the last 4\)"
    with pytest.raises(ValueError, match=message):
        cache.append(tokens_of(rng, 2, 2, 64), tokens_of(rng, 2, 2, 64))
    cache.append(tokens_of(rng, 1, 2, 64), tokens_of(rng, 1, 2, 64))
    assert cache.length == 4


x64 = np.ones((2, 1, 64), np.float32)
BAD_TOKENS = [
    (x64[0], x64, ValueError, r"k must have the shape \(2, 64\) or \(2, T, 64\), got \(1, 64\)"),
    (x64, x64[..., :32], ValueError, r"v must have the shape"),
    (x64, np.ones((2, 2, 64), np.float32), ValueError, "k has 1 tokens and v has 2"),
    (x64.astype(int), x64, TypeError, r"^KVCache\.append: k has dtype int64, must be float32, float16, "),
    (x64, x64.astype(int), TypeError, r"^KVCache\.append: v has dtype int64, must be "),
    (x64, "text", ValueError, "v must have the shape"),
]


@pytest.mark.parametrize("case", BAD_TOKENS, ids=lambda case: case[3])
def test_append_is_atomic(case, rng):
    cache = q.KVCache(2, 4, 64, sliding=True)
    cache.append(tokens_of(rng, 6, 2, 64), tokens_of(rng, 6, 2, 64))
    before = [array.copy() for array in arrays_of(cache)]
    k, v, error, message = case
    with pytest.raises(error, match=message):
        cache.append(k, v)
    assert (cache.length, cache.total) == (4, 6)
    assert all(np.array_equal(a, b) for a, b in zip(arrays_of(cache), before, strict=True))


BAD_OPTIONS = [
    (dict(heads=0), ValueError, "heads must be at least 1, got 0"),
    (dict(heads=2.0), TypeError, "heads must be an integer, got float"),
    (dict(capacity=True), TypeError, "capacity must be an integer, got bool"),
    (dict(head_dim=100), ValueError, r"head_dim must be a multiple of 8 from 8 to 4096, got 100 \(96 would fit\)"),
    (dict(head_dim=5000), ValueError, r"got 5000 \(4096 would fit\)"),
    (dict(value_dim=4), ValueError, r"value_dim must be a multiple of 8 from 8 to 4096, got 4 \(8 would fit\)"),
    (dict(bits=7), ValueError, "bits of codec 2 must be 2, 3, 4, 5, 6 or 8, got 7"),
    (dict(value_bits=1), ValueError, "value_bits of codec 2 must be"),
    (dict(codec=3), ValueError, "codec must be 1 or 2, got 3"),
    (dict(codec=1, bits=2), ValueError, "bits of codec 1 must be 4, 5, 6 or 8, got 2"),
    (
        dict(codec=1, head_dim=96),
        ValueError,
        r"a power of two from 8 to 4096 \(codec=1\), got 96 \(64 would fit, and codec=2 takes 96\)$",
    ),
    (dict(codec=1, head_dim=100), ValueError, r"\(codec=1\), got 100 \(128 would fit\)$"),
    (dict(codec=1, head_dim=4), ValueError, r"\(codec=1\), got 4 \(8 would fit\)$"),
    (
        dict(codec=1, bits=8),
        ValueError,
        r"256 or 512 with codec=1 and 8 bits, got 64 \(256 would fit, and codec=2 takes",
    ),
    (dict(codec=1, scale="least_squares"), ValueError, "codec 1 stores the norm"),
    (dict(sliding=1), TypeError, "sliding must be True or False, got int"),
    (dict(window=0), ValueError, "window must be at least 1, got 0"),
    (dict(window=9, sliding=True), ValueError, r"at most capacity=8 of a sliding cache, got 9 \(capacity=9 would hold"),
    (dict(scale="mean"), ValueError, "scale must be 'unbiased' or 'least_squares' or 'norm', got 'mean'"),
    (dict(norms_dtype=np.float64), ValueError, "norms_dtype must be 'float32' or 'float16', got 'float64'"),
]


@pytest.mark.parametrize("case", BAD_OPTIONS, ids=lambda case: str(case[0]))
def test_options_that_do_not_exist(case):
    options, error, message = case
    with pytest.raises(error, match=rf"KVCache: .*{message}"):
        q.KVCache(**(dict(heads=2, capacity=8, head_dim=64) | options))


@pytest.mark.parametrize(
    "options",
    [dict(scale=scale) for scale in ("mean", 1, None, np.ones(2))]
    + [dict(norms_dtype=dtype) for dtype in ("foo", "bfloat16", np.float64, int, 3, np.ones(2))],
    ids=str,
)
def test_scales_are_refused_as_the_encoder_refuses_them(options):
    with pytest.raises((TypeError, ValueError)) as of_encoder:
        q.quantize_kv(np.ones(64, np.float32), **options)
    for codec in (1, 2):
        with pytest.raises((TypeError, ValueError)) as of_cache:
            q.KVCache(2, 8, 64, codec=codec, **options)
        assert of_cache.type is of_encoder.type
        assert str(of_cache.value) == str(of_encoder.value).replace("quantize_kv: ", "KVCache: ")


def test_other_errors(rng):
    cache = q.KVCache(2, 4, 64)
    with pytest.raises(ValueError, match="1 queries of a sequence of 0 positions"):
        cache.attend(np.ones((2, 64), np.float32))
    cache.append(x64, x64)
    for n, error, message in [
        (2, ValueError, "n must be from 0 to the 1 positions held, got 2"),
        (-1, ValueError, "got -1"),
        (1.0, TypeError, "n must be an integer, got float"),
    ]:
        with pytest.raises(error, match=message):
            cache.trim(n)
    for query in (np.ones((3, 64), np.float32), np.ones((2, 32), np.float32), np.ones(64, np.float32)):
        with pytest.raises(ValueError, match=r"^KVCache\.attend: q"):
            cache.attend(query)


# ---------------------------------------------------------------------------------------------------------------------
# Files


SUFFIXES = [".npz", ".safetensors"]


@pytest.fixture(params=SUFFIXES)
def path(request, tmp_path):
    if request.param == ".safetensors":
        pytest.importorskip("safetensors", reason="needs safetensors")
    return tmp_path / f"cache{request.param}"


@pytest.mark.parametrize("count", [0, 3, 12])
@pytest.mark.parametrize("options", [*KINDS[1:4], dict(codec=1, head_dim=1024), dict(codec=1, head_dim=512)], ids=str)
def test_files_hold_everything(options, count, path, rng):
    cache = q.KVCache(**(dict(heads=2, capacity=9, head_dim=64) | options))
    count = count if cache.sliding else min(count, 9)
    cache.append(tokens_of(rng, count, 2, cache.head_dim), tokens_of(rng, count, 2, cache.value_dim))
    path.write_bytes(b"what was there before")
    cache.save(path)
    again = q.KVCache.load(str(path))
    assert (repr(again), again.total, again.scale, again.window, again.norms_dtype) == (
        repr(cache),
        cache.total,
        cache.scale,
        cache.window,
        cache.norms_dtype,
    )
    for got, expected in zip(arrays_of(again), arrays_of(cache), strict=True):
        assert np.array_equal(got, expected)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def saved(path):
    cache = q.KVCache(2, 4, 8, sliding=True)
    tokens = np.random.default_rng(5).standard_normal((2, 6, 8), dtype=np.float32)
    cache.append(tokens, tokens)
    cache.save(path)
    return cache


def test_damaged_files(path, rng):
    """Cut short anywhere or with a bit turned: an error, or, where nothing depends on the bit, the same cache."""
    cache = saved(path)
    content = path.read_bytes()
    variants = [content[:size] for size in rng.integers(0, len(content), 40)]
    for place in rng.integers(0, len(content), 300):
        turned = bytearray(content)
        turned[place] ^= 1 << rng.integers(8)
        variants.append(bytes(turned))
    if path.suffix == ".npz":  # every bit of a directory entry and of the end record: what zipfile itself goes by
        first, end = content.index(b"PK\1\2"), content.rindex(b"PK\5\6")
        for place in (*range(first, first + 46), *range(end, end + 22)):
            for bit in range(8):
                turned = bytearray(content)
                turned[place] ^= 1 << bit
                variants.append(bytes(turned))
    refused = 0
    for variant in variants:
        path.write_bytes(variant)
        try:
            again = q.KVCache.load(path)
        except ValueError as error:
            refused += str(path) in str(error)
        else:
            assert repr(again) == repr(cache)
            for got, expected in zip(arrays_of(again), arrays_of(cache), strict=True):
                assert np.array_equal(got, expected)
    assert refused > 100


def test_files_of_others(path):
    npz = path.suffix == ".npz"

    def write(**arrays):
        if npz:
            np.savez(path, **arrays)
        else:
            pytest.importorskip("safetensors.numpy").save_file(arrays, path)

    write(weights=np.ones(3, np.float32))
    names = "keys.packed, keys.norms, values.packed, values.norms"
    with pytest.raises(
        ValueError, match=f"not a file that KVCache.save wrote: it has no quantization_kv_cache, {names}"
    ):
        q.KVCache.load(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"not a(.* readable)? \{path.suffix} file"):
        q.KVCache.load(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        q.KVCache.load(path)
    for wrong in ("cache.pkl", "cache"):
        with pytest.raises(ValueError, match=r"KVCache: files are \.npz or \.safetensors, got cache"):
            q.KVCache(1, 1, 8).save(path.with_name(wrong))
        with pytest.raises(ValueError, match=r"KVCache: files are \.npz or \.safetensors, got cache"):
            q.KVCache.load(path.with_name(wrong))


def test_no_pickle_is_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("a pickle was loaded",)

    path = tmp_path / "trap.npz"
    np.savez(path, **{"quantization_kv_cache": np.array("{}"), "keys.packed": np.array([Trap()], object)})
    with pytest.raises(ValueError, match=r"keys\.packed: .*pickled objects are never loaded"):
        q.KVCache.load(path)


def settings_with(changes):
    """Forge: settings that no cache has, under a right checksum."""

    def forge(settings, arrays):
        settings = {**settings, **changes}
        return {name: value for name, value in settings.items() if value is not ...}, arrays

    return forge


def arrays_with(name, change):
    return lambda settings, arrays: (settings, {**arrays, name: change(arrays[name])})


FORGED = [
    (settings_with({"bits": 7}), "bits of codec 2 must be"),
    (settings_with({"heads": "two"}), "heads must be an integer"),
    (settings_with({"heads": 3}), r"keys\.packed must be uint8 of \(3, 4, 4\), got uint8 of \(2, 4, 4\)"),
    (settings_with({"capacity": 3, "window": 3}), "4 positions held, 6 in all and room for 3"),
    (settings_with({"capacity": 2**62}), "not a KV cache that can be had again"),
    (settings_with({"sliding": False}), "4 positions held, 6 in all"),
    (settings_with({"total": 3}), "4 positions held, 3 in all"),
    (settings_with({"total": ...}), "total must be an integer"),
    (settings_with({"color": "red"}), "color"),
    (settings_with({"norms_dtype": "float32"}), r"keys\.norms must be float32"),
    (settings_with({"norms_dtype": "object"}), "norms_dtype must be"),
    (arrays_with("values.packed", lambda a: a[:, :3]), r"values\.packed must be uint8 of \(2, 4, 4\)"),
    (arrays_with("values.norms", lambda a: a.astype(np.float32)), r"values\.norms must be float16"),
    (arrays_with("keys.packed", lambda a: a[0, 0]), "-1 positions held"),
]


@pytest.mark.parametrize("case", FORGED, ids=lambda case: case[1])
def test_forged_files(case, path):
    forge, message = case
    contents = saved(path)._contents()
    _kv_file.write(path, *forge(*contents))
    with pytest.raises(ValueError, match=rf"cache\{path.suffix}: .*{message}"):
        q.KVCache.load(path)


@pytest.mark.parametrize(
    "case",
    [
        (lambda t: t.replace('"version": 1', '"version": 2'), "written by a later version: layout 2, and this one"),
        (lambda t: t.replace('"total": 6', '"total": 7'), "checksum is not that of its settings and arrays"),
        (lambda t: json.dumps(json.loads(t) | {"settings": [1]}), "checksum is not that of its settings"),
        (lambda t: t[:-1], "its settings cannot be read"),
        (lambda t: "[" * 100000, "its settings cannot be read"),
        (lambda t: "{}", "its settings cannot be read"),
        (lambda t: "1", "its settings cannot be read"),
    ],
    ids=lambda case: case[1],
)
def test_settings_that_cannot_be_read(case, tmp_path):
    path = tmp_path / "cache.npz"
    saved(path)
    parts = dict(np.load(path))
    parts["quantization_kv_cache"] = np.array(case[0](str(parts["quantization_kv_cache"])))
    np.savez(path, **parts)
    with pytest.raises(ValueError, match=case[1]):
        q.KVCache.load(path)


def test_a_file_that_could_not_be_written_leaves_the_old_one(path, monkeypatch):
    cache = saved(path)
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(_kv_file.np if path.suffix == ".npz" else _kv_file, *fails_in(path, fail))
    cache.append(np.ones((2, 8), np.float32), np.ones((2, 8), np.float32))
    with pytest.raises(OSError, match="no space left"):
        cache.save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def fails_in(path, fail):
    return ("savez", fail) if path.suffix == ".npz" else ("_checksum", fail)


def test_what_is_public():
    assert _kv_cache.__all__ == ["KVCache"] and q.KVCache is _kv_cache.KVCache
