"""The oracle of the C code: formats, codes and results of this project in NumPy, as they are defined.

Everything here favours being readable over being fast and imports nothing but NumPy (1.24 or later). The functions
whose results are promised to the bit (`qmm_t_bits`, `qmm_n_bits`, the quantizers) use float32 operations that NumPy
rounds one by one, and integers; `exact64` and the bounds use float64. `test_reference.py` checks this file against
MLX, ml_dtypes and exact rational arithmetic.

A *kind* is "float32", "float16" or "bfloat16". Arrays of kind bfloat16 are uint16 bits; ml_dtypes arrays enter as well.
Shapes: K is the reduction, N the outputs, M the rows of x; weights are [N, K] for `t` and [K, N] for `n`, and their
groups run along the last axis.
"""

import numpy as np

F32 = np.float32
U = 2.0**-24  # unit roundoff of float32
CANONICAL_NAN = np.uint32(0x7FC00000)
PRECISION = {"float32": 24, "float16": 11, "bfloat16": 8}
LARGEST_EXPONENT = {"float32": 128, "float16": 16, "bfloat16": 128}
SMALLEST_STEP = {"float32": -149, "float16": -24, "bfloat16": -133}


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of floats


def bfloat16_to_f32(bits):
    """Widen bfloat16 bits (uint16) to float32: they are the upper half of it."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(F32)


def f32_to_bfloat16(values):
    """Round float32 to bfloat16 bits, ties to even; a NaN keeps sign and upper payload and becomes quiet."""
    values = np.asarray(values, F32)
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    # Adding just under half a step, plus one if the kept part is odd, carries into it exactly when RNE rounds up.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x0040
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def to_f32(array, kind):
    """Widen an array of the given kind to float32 (exact)."""
    array = np.asarray(array)
    if kind != "bfloat16":
        return array.astype(F32)
    return bfloat16_to_f32(np.ascontiguousarray(array).view(np.uint16).reshape(array.shape))


def round_to(values, kind):
    """Round float32 to the given kind once, ties to even; bfloat16 as bits."""
    values = np.asarray(values, F32)
    if kind == "bfloat16":
        return f32_to_bfloat16(values)
    with np.errstate(over="ignore"):
        return values.astype(kind)


def two_to(e):
    """2^e as float64 (np.ldexp of a Python float would choose float16)."""
    return np.ldexp(np.ones(np.shape(e)), np.asarray(e, np.int32))


def half_ulp(magnitude, kind):
    """Largest error of rounding any real number up to `magnitude` to `kind`; Inf where it can overflow."""
    magnitude = np.asarray(magnitude, np.float64)
    _, exponent = np.frexp(np.maximum(magnitude, 2.0**-200))
    step = np.maximum(exponent - PRECISION[kind], SMALLEST_STEP[kind])
    overflows = magnitude >= (2.0 - 2.0 ** -PRECISION[kind]) * 2.0 ** (LARGEST_EXPONENT[kind] - 1)
    return np.where(overflows, np.inf, two_to(step - 1))


def round_half_away(values):
    """Round float32 to the nearest integer, ties away from zero, -0 kept. The fraction is exact, so no tie is lost."""
    whole = np.trunc(np.abs(values))
    return np.copysign(whole + (np.abs(values) - whole >= F32(0.5)).astype(F32), values)


# ---------------------------------------------------------------------------------------------------------------------
# Packed codes


def pack(codes, bits):
    """Pack codes [..., C] into uint32 words [..., ceil(C*bits/32)]: a little-endian, LSB-first bit stream per row."""
    codes = np.asarray(codes, np.uint8)
    length = codes.shape[-1] * bits
    stream = np.unpackbits(codes[..., None], axis=-1, bitorder="little", count=bits)
    stream = stream.reshape(codes.shape[:-1] + (length,))
    padding = [(0, 0)] * (codes.ndim - 1) + [(0, -length % 32)]
    return np.packbits(np.pad(stream, padding), axis=-1, bitorder="little").view("<u4")


def unpack(words, bits, count):
    """Inverse of `pack`: the first `count` codes of every row, as uint8."""
    stream = np.unpackbits(np.ascontiguousarray(words, "<u4").view(np.uint8), axis=-1, bitorder="little")
    stream = stream[..., : count * bits].reshape(stream.shape[:-1] + (count, bits))
    return np.packbits(stream, axis=-1, bitorder="little")[..., 0]


# ---------------------------------------------------------------------------------------------------------------------
# Affine quantization


def _groups(array, group_size):
    """View the last axis as [groups, group_size]."""
    return array.reshape(array.shape[:-1] + (array.shape[-1] // group_size, group_size))


def _first_least(groups):
    """Least element of each group; the first of equal ones, as in a loop in C, which decides the sign of a zero."""
    return np.take_along_axis(groups, groups.argmin(axis=-1)[..., None], axis=-1)[..., 0]


def _limits(groups, profile):
    """Smallest and largest element of each group, NaN ignored; an empty choice is +Inf and -Inf.

    MLX's Metal kernel starts its maximum at 0 instead of -Inf. Groups without two finite limits follow the CPU in both
    profiles, so that NaN and Inf give the same on every device.
    """
    lo = _first_least(np.where(np.isnan(groups), F32(np.inf), groups))
    hi = -_first_least(np.where(np.isnan(groups), F32(np.inf), -groups))
    if profile == "metal":
        hi = np.where(np.isfinite(lo) & np.isfinite(hi), np.maximum(hi, F32(0)), hi)
    return lo, hi


def _scale_and_bias(lo, hi, bits, rounding):
    """Scale and bias of each group in float32; `rounding` is the profile's R.

    The larger edge becomes the bias (code 0) and the scale is stretched so that zero falls on a code. One bit has no
    such code to spare: its two codes are the two limits (MLX from 0.32.4 on).
    """
    levels = F32(2**bits - 1)
    scale = np.maximum((hi - lo) / levels, F32(1e-7))
    if bits == 1:
        return scale, lo
    low_edge = np.abs(lo) > np.abs(hi)
    scale = np.where(low_edge, scale, -scale)
    edge = np.where(low_edge, lo, hi)
    zero_code = rounding(edge / scale)
    stretched = zero_code != 0  # true for NaN, as in C
    divisor = np.where(stretched, zero_code, F32(1))
    return np.where(stretched, edge / divisor, scale), np.where(stretched, edge, F32(0))


def affine_quantize(w, group_size, bits, profile="metal"):
    """Quantize float32 w [..., C] by groups along the last axis.

    Returns
    -------
    codes : uint8 [..., C]
    scales, biases : float32 [..., C/group_size]
        Unrounded, as the codes were computed with them; store them with `round_to`.
    """
    rounding = {"cpu": np.rint, "metal": round_half_away}[profile]
    groups = _groups(np.asarray(w, F32), group_size)
    with np.errstate(all="ignore"):
        lo, hi = _limits(groups, profile)
        scales, biases = _scale_and_bias(lo, hi, bits, rounding)
        codes = rounding((groups - biases[..., None]) / scales[..., None])
    codes = np.clip(np.where(np.isnan(codes), F32(0), codes), F32(0), F32(2**bits - 1))
    return codes.astype(np.uint8).reshape(np.shape(w)), scales, biases


def affine_dequantize(codes, scales, biases, group_size, out_kind, profile="metal", kind=None):
    """Weights s*q + b from float32 scales and biases, as an array of `out_kind`.

    "metal" computes in float32 and rounds once to `out_kind`. "cpu" computes in `kind`, the kind in which scales and
    biases are stored (default: `out_kind`), rounding the product and the sum to it, and casts the result.
    """
    q = _groups(np.asarray(codes).astype(F32), group_size)
    s, b = np.asarray(scales, F32)[..., None], np.asarray(biases, F32)[..., None]
    inner = "float32" if profile == "metal" else kind or out_kind
    with np.errstate(all="ignore"):
        # float32 holds q*s of 16-bit kinds exactly, and has more than twice the digits of their sums plus two, so
        # rounding to float32 first never changes the result of the second rounding.
        product = to_f32(round_to(q * s, inner), inner)
        weights = to_f32(round_to(product + b, inner), inner)
    return round_to(weights.reshape(np.shape(codes)), out_kind)


# ---------------------------------------------------------------------------------------------------------------------
# Block fixed point


def number_format(length, bits, digits):
    """(p, wide) of blocks of `length` elements: x becomes integers |v| <= 2^p - 1.

    Parameters
    ----------
    digits : {1, 2, 3}
        Balanced base-256 digits of x: 3 for float32, 2 for the 16-bit kinds, 1 for `activations="int8"`.

    Notes
    -----
    Centred codes satisfy |q - c| <= c = 2^(bits-1), so the integer sum of a block is at most n*c*(2^p - 1), below 2^31
    where three digits are narrow. With two digits or one nothing needs a limit: 64 * 128 * 32639 < 2^28.

    Wide formats hold v as 65536*h + l, -32896 <= l <= 32639, so |h| <= 64 for p = 22. Then
    |sum (q-c)*h| <= 64*128*64 = 2^19 and |sum (q-c)*l| <= 64*128*32896 < 2^29. The sum of all v is at most
    64*(2^22 - 1) < 2^28 in every format. So no integer overflows int32, and p needs no other limit for n <= 64.
    """
    if digits < 3:
        return (15, False) if digits == 2 else (7, False)
    largest = next(p for p in range(22, 0, -1) if length * 2 ** (bits - 1) * (2**p - 1) < 2**31)
    return (22, True) if largest < 21 else (largest, False)


def power_of_two(e):
    """2^e as float32, for -126 <= e <= 127."""
    return ((np.asarray(e) + 127).astype(np.uint32) << 23).view(F32)


def block_exponent(x, p):
    """Exponent e of blocks x [..., n] of finite float32: max|x| rounds to at most 2^p - 1 steps of 2^e.

    Adding r to the bits of the largest element carries into its exponent exactly if the element would round up to 2^p.
    For two digits the limit is 127*257 = 32639, the largest v whose two balanced digits both fit int8:
    32768 - 65792/2^9 = 32639.5.
    """
    r = 65792 if p == 15 else 1 << (23 - p)
    magnitude = np.ascontiguousarray(x, F32).view(np.uint32) & np.uint32(0x7FFFFFFF)
    largest = magnitude.max(axis=-1).astype(np.int64)
    return np.maximum(((largest + r) >> 23) - 127 - (p - 1), -126)


def fixed_point(x, p):
    """Integers v (as float64) and exponents e with x ~ v * 2^e, ties to even. |x - v*2^e| <= 2^(e-1).

    x * 2^-e is exact: it is scaled up, or it falls below the normal range and then rounds to 0 either way.
    """
    e = block_exponent(x, p)
    return np.rint(x * power_of_two(-e)[..., None]).astype(np.float64), e


def integer_dot(v, q, wide):
    """float32 of the exact integer v [..., M, n] @ q [..., n, N], rounded once (wide: as two parts).

    Products and partial sums are integers below 2^53, so float64 holds them exactly in any order of summation.
    """
    if not wide:
        return (v @ q).astype(F32)
    h = np.floor((v + 32896) / 65536)
    low = v - 65536 * h
    return (h @ q).astype(F32) * F32(65536) + (low @ q).astype(F32)


def _canonical(y):
    """Give every NaN the same bits: those that x86 and Arm make differ in sign."""
    return np.where(np.isnan(y), CANONICAL_NAN, y.view(np.uint32)).view(F32)


# ---------------------------------------------------------------------------------------------------------------------
# x @ w.T for w [N, K]


def block_length(group_size):
    """Elements of x that share an exponent: a group, or 64 elements of a larger one."""
    if group_size > 64 and group_size % 64:
        raise ValueError(f"groups above 64 must be multiples of 64, got {group_size}")
    return min(group_size, 64)


def _float_block_t(x, q, s, b):
    """Term of a block in which x is not finite: sum of (s*q + b)*x in order of k, each operation rounded."""
    total = np.zeros((x.shape[0], q.shape[0]), F32)
    for k in range(x.shape[1]):
        total = total + (s * q[:, k] + b) * x[:, k, None]
    return total


def _term_t(x, q, s, b, bits, p, wide):
    """Terms [M, N] of one block: x [M, n], q [N, n] as float32, s and b [N]."""
    c = F32(2 ** (bits - 1))
    finite = np.isfinite(x).all(axis=-1)
    v, e = fixed_point(np.where(finite[:, None], x, F32(0)), p)
    dot = integer_dot(v, (q - c).astype(np.float64).T, wide)
    total = v.sum(axis=-1).astype(F32)[:, None]
    term = (dot * s + (b + c * s) * total) * power_of_two(e)[:, None]
    if not finite.all():
        term[~finite] = _float_block_t(x[~finite], q, s, b)
    return term


def qmm_t_bits(x, codes, scales, biases, group_size, bits, digits):
    """y [M, N] = x @ w.T to the bit, for x [M, K], codes [N, K], scales and biases [N, K/group_size] in float32.

    Per block of `block_length` elements, with x ~ v * 2^e (`fixed_point`), c = 2^(bits-1), G = sum (q - c)*v and
    S = sum v, both exact integers:

        term = (float(G)*s + (b + c*s)*float(S)) * 2^e

    and y = ((0 + term_0) + term_1) + ..., all in float32, each operation rounded, no FMA. Every NaN result is
    0x7fc00000. A block that holds a NaN or an Inf of x takes the sum of (s*q + b)*x in order instead.
    """
    x, scales, biases = (np.asarray(a, F32) for a in (x, scales, biases))
    n = block_length(group_size)
    p, wide = number_format(n, bits, digits)
    codes = np.asarray(codes).astype(F32)
    y = np.zeros((x.shape[0], codes.shape[0]), F32)
    with np.errstate(all="ignore"):
        for k in range(0, x.shape[1], n):
            group = k // group_size
            y = y + _term_t(x[:, k : k + n], codes[:, k : k + n], scales[:, group], biases[:, group], bits, p, wide)
    return _canonical(y)


# ---------------------------------------------------------------------------------------------------------------------
# x @ w for w [K, N], whose groups run along N

BLOCK_N = 64  # consecutive k that share an exponent
BITS_OF_Z = 22  # z enters no product, so that its full precision costs nothing: |Z| <= 64*(2^22 - 1) < 2^28


def _float_block_n(x, q, s, b):
    """Terms [B, g] of B pairs of a row and a group that are not finite: x [B, n], q [n, B, g], s and b [n, B]."""
    total = np.zeros(q.shape[1:], F32)
    for k in range(q.shape[0]):
        total = total + x[:, k, None] * (s[k, :, None] * q[k] + b[k, :, None])
    return total


def _fixed_operands_n(x, s, b, bits, p):
    """Both operands of a block in fixed point: (v, e_t, u, e_z, finite) for x [M, n], s and b [n, J]; all [M, J, ...].

    t = x*s and z = x*(b + c*s). Pairs (m, j) with a t or z that is not finite have finite = False and zeros.
    """
    c = F32(2 ** (bits - 1))
    t = x[:, None, :] * s.T
    z = x[:, None, :] * (b + c * s).T
    finite = (np.isfinite(t) & np.isfinite(z)).all(axis=-1)
    v, e_t = fixed_point(np.where(finite[..., None], t, F32(0)), p)
    u, e_z = fixed_point(np.where(finite[..., None], z, F32(0)), BITS_OF_Z)
    return v, e_t, u, e_z, finite


def _term_n(x, q, s, b, bits, p, wide):
    """Terms [M, N] of one block: x [M, n], q [n, J, g] as float32, s and b [n, J]."""
    v, e_t, u, e_z, finite = _fixed_operands_n(x, s, b, bits, p)
    centred = (q - F32(2 ** (bits - 1))).astype(np.float64)
    dot = integer_dot(v.swapaxes(0, 1), centred.swapaxes(0, 1), wide).swapaxes(0, 1)
    offset = u.sum(axis=-1).astype(F32) * power_of_two(e_z)
    term = dot * power_of_two(e_t)[..., None] + offset[..., None]
    if not finite.all():
        m, j = np.nonzero(~finite)
        term[m, j] = _float_block_n(x[m], q[:, j], s[:, j], b[:, j])
    return term.reshape(x.shape[0], -1)


def qmm_n_bits(x, codes, scales, biases, group_size, bits, digits):
    """y [M, N] = x @ w to the bit, for x [M, K], codes [K, N], scales and biases [K, N/group_size] in float32.

    Scales differ from k to k here, so they go into the fixed-point operand. Blocks are 64 consecutive k (the last may
    be shorter: as if filled with zeros). For row m, group j of N and a block, with c = 2^(bits-1):

        t_k = x_k * s_kj                 ~ v_k * 2^e_t
        z_k = x_k * (b_kj + c*s_kj)      ~ u_k * 2^e_z
        G_n = sum (q_kn - c)*v_k,  Z = sum u_k                     exact integers
        term_n = float(G_n)*2^e_t + float(Z)*2^e_z

    and y = ((0 + term_0) + term_1) + ..., all in float32, each operation rounded, no FMA. p and wide are those of a
    block of 64 for t; z has p = 22 always. If a t_k or z_k is not finite, the block's term for that m and j is the sum
    of x_k*(s*q + b) in order of k. Every NaN result is 0x7fc00000.

    No integer overflows int32: `number_format` shows it for G with n = 64, and `BITS_OF_Z` for Z.
    """
    x, scales, biases = (np.asarray(a, F32) for a in (x, scales, biases))
    p, wide = number_format(BLOCK_N, bits, digits)
    groups = _groups(np.asarray(codes).astype(F32), group_size)
    y = np.zeros((x.shape[0], np.shape(codes)[1]), F32)
    with np.errstate(all="ignore"):
        for k in range(0, x.shape[1], BLOCK_N):
            block = slice(k, k + BLOCK_N)
            y = y + _term_n(x[:, block], groups[block], scales[block], biases[block], bits, p, wide)
    return _canonical(y)


# ---------------------------------------------------------------------------------------------------------------------
# Exact results and error bounds


def weights64(codes, scales, biases, group_size):
    """Unrounded weights s*q + b in float64."""
    q = _groups(np.asarray(codes).astype(np.float64), group_size)
    s, b = (np.asarray(a, F32).astype(np.float64)[..., None] for a in (scales, biases))
    with np.errstate(all="ignore"):
        return (s * q + b).reshape(np.shape(codes))


def exact64(x, codes, scales, biases, group_size, transpose):
    """x @ w.T (transpose) or x @ w in float64, with unrounded weights; its own error is `error64`."""
    w = weights64(codes, scales, biases, group_size)
    with np.errstate(all="ignore"):
        return np.asarray(x, np.float64) @ (w.T if transpose else w)


def error64(x, codes, scales, biases, group_size, transpose):
    """Bound on |exact64 - exact|: s*q is exact, s*q + b rounds once, a dot product of K terms K times at most."""
    q = _groups(np.asarray(codes).astype(np.float64), group_size)
    s, b = (np.abs(np.asarray(a, np.float64))[..., None] for a in (scales, biases))
    w = (s * q + b).reshape(np.shape(codes))
    return (x.shape[1] + 4) * 2.0**-53 * (np.abs(np.asarray(x, np.float64)) @ (w.T if transpose else w))


class _Chain:
    """Error of y = ((0 + term_0) + term_1) + ... when each term is known up to an error.

    With P the exact partial sum and E the bound so far, an add of a term with error d yields at most
    E + d + U*(|P| + E + d), since its exact operands sum to at most |P| + E + d. The first add (to 0) is exact.
    """

    def __init__(self, shape):
        self.partial, self.error, self.rounds = np.zeros(shape), np.zeros(shape), False

    def add(self, term, error):
        self.partial = self.partial + term
        self.error = self.error + error
        if self.rounds:
            self.error = self.error + U * (np.abs(self.partial) + self.error)
        self.rounds = True

    def bound(self, error_of_float64):
        """The bound, Inf where it means nothing: the sum can overflow float32, or an operand is not finite."""
        # The factor covers the rounding of this computation itself: relative errors below K*2^-50, and dot products
        # over one block, whose error of 64*2^-53*sum|q-c|*max|x| is below 2^-24 of the h*sum|q-c| kept beside them.
        total = self.error * (1 + 2.0**-20) + error_of_float64 * (1 + 2.0**-20)
        bad = ~np.isfinite(total) | (np.abs(self.partial) + total >= 2.0**127)
        return np.where(bad, np.inf, total)


def _block_error_t(x, q, s, b, bits, p, wide):
    """Exact terms [M, N] of a block and the bound on their error; arguments as `_term_t`, in float64.

    Let h = 2^(e-1). Replacing x by v*2^e changes x_k by at most h, hence the exact term by h*sum|s*q + b|, G*2^e by
    h*sum|q - c| and S*2^e by h*n. float(G)*s is rounded twice, (b + c*s)*float(S) three times (c*s is exact), and their
    sum once more: factors (1+U)^3 and (1+U)^4. A wide G is a sum of an exact part and of one, |lo| <= 32896*sum|q-c|,
    that rounds once more. Products in the subnormal range are off by 2^-150 each instead: two before, one after 2^e.
    """
    c = 2.0 ** (bits - 1)
    two_e = two_to(block_exponent(x.astype(F32), p))[:, None]
    centred, h = np.abs(q - c).sum(axis=1), two_e / 2
    weights = s[:, None] * q + b[:, None]
    dot = np.abs(x @ (q - c).T) + h * centred + (32896 * two_e * centred if wide else 0.0)
    total = np.abs(x.sum(axis=1))[:, None] + h * x.shape[1]
    product, offset = np.abs(s) * dot, np.abs(b + c * s) * total
    error = h * np.abs(weights).sum(axis=1) + product * ((1 + U) ** 3 - 1) + offset * ((1 + U) ** 4 - 1)
    overflows = np.maximum(1, 1 / two_e) * (product + offset) + np.abs(b) + np.abs(c * s) >= 2.0**127
    return x @ weights.T, np.where(overflows, np.inf, error + 2.0**-148 * (1 + two_e))


def bound_t(x, codes, scales, biases, group_size, bits, digits):
    """Bound [M, N] on |qmm_t_bits - exact64|, from the definition; Inf where an intermediate may overflow float32.

    The derivation is in `_block_error_t` (one term) and `_Chain` (the adds). exact64's own error is included. For a
    result rounded to a 16-bit kind add `half_ulp(abs(exact64) + bound, kind)`.
    """
    x64, q, s, b = (np.asarray(a).astype(np.float64) for a in (x, codes, scales, biases))
    n = block_length(group_size)
    p, wide = number_format(n, bits, digits)
    chain = _Chain((x64.shape[0], q.shape[0]))
    with np.errstate(all="ignore"):
        for k in range(0, x64.shape[1], n):
            g = k // group_size
            chain.add(*_block_error_t(x64[:, k : k + n], q[:, k : k + n], s[:, g], b[:, g], bits, p, wide))
        return chain.bound(error64(x, codes, scales, biases, group_size, True))


def _block_error_n(x, q, s, b, bits, p, wide):
    """Exact terms [M, N] of a block and the bound on their error; arguments as `_term_n`, in float64.

    t = x*s is rounded once, then put into fixed point: off by U*|x*s| + 2^-150 + h_t, h_t = 2^(e_t-1), each counted
    |q - c| times in G*2^e_t. z = x*(b + c*s) is rounded twice (c*s is exact) and off by ((1+U)^2 - 1)*|z| + 2^-150 +
    h_z. The conversions to float and the sum then give (1+U)^2 to each part (wide: as in `_block_error_t`), and the
    factors 2^e up to 2^-150 each, in the subnormal range.
    """
    c, twice = 2.0 ** (bits - 1), (1 + U) ** 2 - 1
    _, e_t, _, e_z, finite = _fixed_operands_n(x.astype(F32), s.astype(F32), b.astype(F32), bits, p)
    two_t, two_z = (two_to(e)[..., None] for e in (e_t, e_z))
    centred = q - c
    t, z = x[:, None, :] * s.T, x[:, None, :] * (b + c * s).T
    dot = np.einsum("mjk,kjg->mjg", t, centred)
    off_t = np.abs(t) * U + 2.0**-150 + two_t / 2
    off_dot = np.einsum("mjk,kjg->mjg", off_t, np.abs(centred))
    offset = z.sum(axis=-1)[..., None]
    off_offset = (np.abs(z) * twice + 2.0**-150 + two_z / 2).sum(axis=-1)[..., None]
    size = np.abs(dot) + off_dot + np.abs(offset) + off_offset
    if wide:
        size = size + 32896 * two_t * np.abs(centred).sum(axis=0)
    error = np.where(finite[..., None] & (size < 2.0**127), off_dot + off_offset + size * twice + 2.0**-148, np.inf)
    return (dot + offset).reshape(x.shape[0], -1), error.reshape(x.shape[0], -1)


def bound_n(x, codes, scales, biases, group_size, bits, digits):
    """Bound [M, N] on |qmm_n_bits - exact64|; as `bound_t`, one term's derivation being in `_block_error_n`."""
    x64, s, b = (np.asarray(a).astype(np.float64) for a in (x, scales, biases))
    groups = _groups(np.asarray(codes).astype(np.float64), group_size)
    p, wide = number_format(BLOCK_N, bits, digits)
    chain = _Chain((x64.shape[0], np.shape(codes)[1]))
    with np.errstate(all="ignore"):
        for k in range(0, x64.shape[1], BLOCK_N):
            block = slice(k, k + BLOCK_N)
            chain.add(*_block_error_n(x64[:, block], groups[block], s[block], b[block], bits, p, wide))
        return chain.bound(error64(x, codes, scales, biases, group_size, False))


# ---------------------------------------------------------------------------------------------------------------------
# Plain float32 sums (accumulate="float")


def roundings_float(k):
    """How many float32 roundings a summand s*q*x or b*x can pass through on its way into an output, on any ISA.

    Each multiplication and each addition counts, as if none were fused. Vectors have L >= 4 lanes.

    - Weights decoded first: 2 for s*q + b, 1 for its product with x, and an addition per element of a panel of at most
      256 k, 3 where a panel is summed in up to 4 chains, 1 for the sum of each panel of 128 or more:
      min(k, 256) + k/128 + 7.
    - Codes multiplied first, vectors of them that hold at least 4*L >= 16 codes of k: 1 for q*x, up to 16 and 3
      additions in a lane, 1 for the product with s, and an addition per such vector (k/16 + 1) and per L groups of
      biases (k/128 + k/2048 + 1, as groups of 32 or more are taken 64 at a time), then up to 16 over the lanes. Sums of
      x in a group take at most 128/L + 16 <= 48 instead of the first 20. That is k/14 + 80 at most.
    """
    return min(k, 256) + k / 14 + 80


def bound_float(x, codes, scales, biases, group_size, transpose):
    """Bound [M, N] on |result - exact64| of accumulate="float"; Inf where an intermediate may overflow float32.

    D = `roundings_float` factors of at most 1 + U each change every summand by at most ((1 + U)^D - 1) of itself, so an
    output by that much of sum |x|*(|s|*q + |b|). A product in the subnormal range is off by 2^-150 instead: one for the
    weight (counted |x| times) and two for each k. Codes multiplied first may be 2^i times as large, and x as much
    smaller, so that 2^i * q < 2^16: what x loses if that makes it subnormal, up to 2^-150, counts 2^16 |s| times.
    (q*x is then exact: a multiple of 2^-149.) exact64's own error is included. For a result rounded to a 16-bit kind
    add `half_ulp(abs(exact64) + bound, kind)`.
    """
    x64 = np.abs(np.asarray(x, np.float64))
    q = np.asarray(codes).astype(np.float64)
    s, b = (np.abs(np.asarray(a, np.float64)) for a in (scales, biases))
    turn = np.transpose if transpose else np.asarray
    with np.errstate(all="ignore"):
        sizes = x64 @ turn(weights64(codes, s, b, group_size))
        factor = np.expm1(roundings_float(x64.shape[1]) * np.log1p(U))
        underflow = 2.0**-149 * (x64.sum(axis=1) + x64.shape[1])[:, None]
        underflow = underflow + 2.0**-134 * turn(weights64(np.ones_like(codes), s, np.zeros_like(b), group_size)).sum(
            axis=0
        )
        error = sizes * factor + underflow + error64(x, codes, scales, biases, group_size, transpose)
        overflows = np.maximum(sizes + error, np.maximum(x64 @ turn(q), x64.sum(axis=1)[:, None])) >= 2.0**127
        return np.where(overflows | ~np.isfinite(error), np.inf, error)


# ---------------------------------------------------------------------------------------------------------------------
# Fake quantization


def fake_quantize(x, bits):
    """Round x, clipped to [-1, 1], to multiples of 1/(2^(bits-1) - 1); float32 in and out.

    Ties go away from zero, and levels are k times the float32 reciprocal, not k divided by the scale. One bit is the
    sign, +1 for zeros of either sign. NaN stays NaN, Inf becomes 1 of its sign, -0 and what rounds to it stay -0.
    """
    x = np.asarray(x, F32)
    if bits == 1:
        levels = np.where(x < 0, F32(-1), F32(1))
    else:
        scale = F32(2 ** (bits - 1) - 1)
        clipped = np.clip(x, F32(-1), F32(1))
        with np.errstate(invalid="ignore"):
            levels = round_half_away(clipped * scale) * (F32(1) / scale)
    return np.where(np.isnan(x), x, levels)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs worth trying


def edge_groups(length, bits):
    """Groups of `length` float32 on which quantizers have gone wrong, by name."""
    k = np.arange(length, dtype=F32)
    levels = 2**bits - 1
    inf, nan = F32(np.inf), F32(np.nan)
    groups = {
        "zeros": 0 * k,
        "negative zeros": -0.0 * k,
        "zeros of both signs": np.where(k % 2, F32(-0.0), F32(0)),
        # the second zero stands in the first lane of any vector, where a least element is looked for before others
        "zero, then -0": np.where(k == 3, F32(0), np.where(k == 16, F32(-0.0), F32(1))),
        "constant": 0 * k + F32(0.3),
        "negative constant": 0 * k - F32(0.3),
        "all positive": 1 + k / length,
        "all negative": -1 - k / length,
        "tiny": (k - length / 2) * F32(1e-9),
        "subnormal": (k - length / 2) * F32(1e-41),
        "scale at the floor": k / length * F32(levels * 1e-7),
        "half codes": np.append(levels, np.minimum(k[:-1] % (levels + 1) + F32(0.5), levels) * (k[:-1] > 0)),
        # edge/scale is j + 1/2 exactly: the rounding of the zero point is a tie
        "half zero point": np.append([(levels + 2) // 4 * 2 + 0.5, (levels + 2) // 4 * 2 + 0.5 - levels], 0 * k[2:]),
        "equal edges": np.where(k % 2, F32(1.5), F32(-1.5)),
        "one outlier": np.where(k == 3, F32(1e4), k / length),
        "huge": np.where(k % 2, F32(1.5e38), F32(-1.5e38)),
        "range overflows": np.where(k % 2, F32(3.3e38), F32(-3.3e38)) * ((1 + k) / length),
        "one nan": np.where(k == 1, nan, np.sqrt(k) - 2),
        "first nan": np.where(k == 0, nan, np.sqrt(k) - 2),
        "all nan": 0 * k + nan,
        "one inf": np.where(k == 2, inf, np.sqrt(k) - 2),
        "one -inf": np.where(k == 2, -inf, np.sqrt(k) - 2),
        "both inf": np.where(k % 2, inf, -inf),
        "all inf": 0 * k + inf,
        "nan and inf": np.where(k % 2, inf, nan),
    }
    return {name: np.asarray(group, F32) for name, group in groups.items()}
