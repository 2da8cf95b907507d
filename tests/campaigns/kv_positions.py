"""Write and read key-value caches at random positions, lengths and windows, between guard bytes.

    python tests/campaigns/kv_positions.py --seconds 60

Each case is a cache of random size and memory layout and a series of calls: single tokens, sequences and calls that
must fail. After each call every byte of the cache, and every byte around it, must be what the model says: vectors
encoded one by one into caches of one slot. And attention over a random part of a ring: what it may not see is NaN, and
must not change a bit. To be run under AddressSanitizer too. A difference gives exit status 1.
"""

import collections
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import layouts
import quantization
import reference_kv as ref
from campaigns.rounds import MismatchError, available_isas, go_on

CALLS = 12
QUICK_CASES = 40
NORM_FILL = np.float32(-1.5)


def any_layout(rng, ndim):
    order, steps = rng.permutation(ndim).tolist(), rng.choice(layouts.STEPS, ndim).tolist()
    return layouts.Layout(order, steps, int(rng.choice(layouts.OFFSETS)))


class Model:
    """A cache of codec 1 in strange memory, and what it must hold."""

    def __init__(self, rng):
        self.rng = rng
        self.bits = int(rng.choice(ref.BITS_1))
        self.D = int(2 ** rng.integers(1, 12) if self.bits == 4 else rng.choice([256, 512]))
        self.H, self.C = int(rng.integers(1, 5)), int(rng.integers(1, 20))
        packed, norms = ref.shapes_1(self.H, self.C, self.D, self.bits)
        self.layouts = any_layout(rng, 3), any_layout(rng, len(norms))
        self.memory, self.packed = self.layouts[0].empty(packed, np.uint8)
        self.norms_memory, self.norms = self.layouts[1].empty(norms, np.float32)
        self.norms[...] = NORM_FILL
        self.want, self.want_norms = self.packed.copy(), self.norms.copy()
        self.counts = collections.Counter()

    def __str__(self):
        return f"H={self.H}, C={self.C}, D={self.D}, bits={self.bits}, {self.layouts}"

    def source(self, *lead):
        return any_layout(self.rng, len(lead) + 2).place(
            self.rng.standard_normal((*lead, self.H, self.D)).astype(np.float32)
        )

    def write(self, packed, norms, src, p, **keywords):
        if self.bits == 4:
            return quantization.hadamard_quantize_kv(src, packed, norms, write_pos=p, **keywords)
        return quantization.hadamard_quantize_kv_hb(
            src, packed, norms, write_pos=p, codebook_bits=self.bits, **keywords
        )

    def expect(self, src, slot):
        """Encode heads one by one into caches of one slot."""
        for h in range(self.H):
            packed = np.empty((1, 1, self.want.shape[2]), np.uint8)
            norms = np.empty((1, 1, *self.want_norms.shape[2:]), np.float32)
            self.write(packed, norms, np.ascontiguousarray(src[h : h + 1]), 0)
            self.want[h, slot] = packed[0, 0]
            if self.D == 512:
                self.want_norms[h, slot] = norms[0, 0]
            else:
                self.want_norms.reshape(-1)[h * self.C + slot] = norms.reshape(-1)[0]

    def one(self):
        """Write one token."""
        sliding = bool(self.rng.integers(2))
        p = int(self.rng.integers(0, self.rng.choice([self.C, 5 * self.C, 2**40]) if sliding else self.C))
        src = self.source()
        self.write(self.packed, self.norms, src, p, is_sliding=sliding)
        self.expect(src, p % self.C)
        self.counts["tokens"] += 1

    def sequence(self):
        """Write many tokens, often more than there are slots."""
        if self.bits != 4:
            return self.one()
        sliding = bool(self.rng.integers(2))
        n = int(self.rng.integers(0, 1 + (3 * self.C if sliding else self.C)))
        start = int(self.rng.integers(0, self.rng.choice([self.C, 2**40]) if sliding else self.C - n + 1))
        offset, rest = (int(number) for number in self.rng.integers(0, 4, 2))
        src = self.source(offset + n + rest)
        quantization.hadamard_quantize_kv_seq(
            src, self.packed, self.norms, write_pos_start=start, n_tokens=n, src_tok_offset=offset, is_sliding=sliding
        )
        for i in range(n):
            self.expect(src[offset + i], (start + i) % self.C)
        self.counts["sequences"] += 1
        return None

    def failure(self):
        """Make a call that must write nothing."""
        try:
            if self.bits == 4 and self.rng.integers(2):
                n = int(self.rng.integers(1, self.C + 2))
                start = self.C - n + 1
                quantization.hadamard_quantize_kv_seq(self.source(n), self.packed, self.norms, write_pos_start=start)
            else:
                self.write(self.packed, self.norms, self.source(), self.C + int(self.rng.integers(0, 9)))
        except ValueError:
            self.counts["refusals"] += 1
        else:
            raise AssertionError("a position beyond the cache was taken")

    def check(self):
        assert self.packed.tobytes() == self.want.tobytes(), "packed"
        assert self.norms.tobytes() == self.want_norms.tobytes(), "norms"
        self.layouts[0].check(self.memory, self.packed.shape, np.uint8)
        self.layouts[1].check(self.norms_memory, self.norms.shape, np.float32)


def visible(T, length, causal, window):
    """Which positions any of T queries sees."""
    own = length - T + np.arange(T)[:, None] if causal else np.full((T, 1), length - 1)
    position = np.arange(length)
    return ((position <= own) & (position > own - (window or length))).any(axis=0)


def attend(rng):
    """Attention from strange memory, where all that is not seen is NaN, gives the bits of that from plain arrays."""
    H, group, T = (int(n) for n in rng.integers(1, 4, 3))
    D, D_v = (int(n) for n in rng.choice([8, 24, 64, 72, 80, 128, 192], 2))
    bits, value_bits = (int(n) for n in rng.choice(ref.BITS_2, 2))
    C = int(rng.integers(1, rng.choice([12, 100, 1200])))
    length, start = int(rng.integers(1, C + 1)), int(rng.integers(C))
    causal, window = bool(rng.integers(2)) and length >= T, int(rng.integers(1, length + 2)) * int(rng.integers(2))
    keywords = {"bits": bits, "value_bits": value_bits, "length": length, "start": start, "causal": causal}
    keywords |= {"window": window} if window else {}
    queries = rng.standard_normal((H * group, T, D)).astype(np.float32)
    caches = [quantization.quantize_kv(rng.standard_normal((H, C, dim)).astype(np.float32), width)
              for dim, width in ((D, bits), (D_v, value_bits))]  # fmt: skip
    expected = quantization.kv_attention(queries, *caches, **keywords)
    seen = (start + np.flatnonzero(visible(T, length, causal, window))) % C
    hidden = np.setdiff1d(np.arange(C), seen)
    for packed, norms in caches:
        packed[:, hidden] = 0xFF
        norms[:, hidden] = np.nan
    moved = [tuple(any_layout(rng, 3).place(array) for array in cache) for cache in caches]
    layout = any_layout(rng, 3)
    memory, out = layout.empty(expected.shape, np.float32)
    quantization.kv_attention(any_layout(rng, 3).place(queries), *moved, out=out, **keywords)
    assert np.isfinite(expected).all() and out.tobytes() == expected.tobytes(), f"attention, {keywords}"
    layout.check(memory, expected.shape, np.float32)


def check(seed, i, isas):
    """Check the i-th case of a seed; return what was done."""
    rng = np.random.default_rng([seed, i])
    model = Model(rng)
    done = []
    try:
        for _ in range(CALLS):
            call = rng.choice(["one", "sequence", "sequence", "failure"])
            done.append(str(call))
            with quantization.isa(str(rng.choice(isas))), quantization.threads(int(rng.integers(1, 5))):
                getattr(model, call)()
            model.check()
        done.append("attention")
        with quantization.isa(str(rng.choice(isas))), quantization.threads(int(rng.integers(1, 5))):
            attend(rng)
        model.counts["attentions"] += 1
    except AssertionError as error:
        raise MismatchError(f"{model}, after {', '.join(done)}\n{error}") from None
    return model.counts


def main(arguments=None):
    isas, counts = available_isas(), collections.Counter()
    cases = go_on("kv_positions", __doc__, lambda *case: counts.update(check(*case, isas)), arguments, QUICK_CASES)
    done = ", ".join(f"{number} {name}" for name, number in sorted(counts.items()))
    print(f"{cases} caches: {done}; every byte as expected")


if __name__ == "__main__":
    main()
