"""The fp formats in NumPy: tables of values and exact comparisons in float64, where the kernels work on bits."""

import math

import numpy as np

import reference as ref

F32 = np.float32

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FP8 = np.array([m * 2.0**-9 if m < 8 else (8 + m % 8) * 2.0 ** (m // 8 - 10) for m in range(127)])

GROUP_SIZES = {"mxfp4": 32, "mxfp8": 32, "nvfp4": 16}
BITS = {"mxfp4": 4, "mxfp8": 8, "nvfp4": 4}

PANEL, CHAINS = 64, 16  # of products with nvfp4 weights: groups of a panel, and its chains


def rounded(x, kind):
    """Float32 values that have been rounded to the type."""
    with np.errstate(all="ignore"):
        return ref.to_f32(ref.round_to(np.asarray(x, F32), kind), kind)


def nearest_even(x, values, sign):
    """Codes of the nearest values, ties to the even code; what is not a number is the largest."""
    with np.errstate(invalid="ignore"):
        magnitude = np.nan_to_num(np.abs(x.astype(np.float64)), nan=np.inf)
    at = np.minimum(np.searchsorted(values, magnitude), len(values) - 1)
    below, middle = np.maximum(at - 1, 0), (values[at] + values[at - 1]) / 2
    lower = (magnitude < middle) | ((magnitude == middle) & (below % 2 == 0))
    return np.where((at > 0) & lower, below, at) | np.where(np.signbit(x), sign, 0)


def first_nearest(x):
    """FP4 codes as MLX's CPU backend finds them: the first least float32 distance in its table of 16 values."""
    table = np.concatenate([FP4, -FP4]).astype(F32)
    with np.errstate(all="ignore"):
        distances = np.abs(x.astype(F32)[..., None] - table)
    return np.where(np.isfinite(x), np.argmin(np.nan_to_num(distances, nan=np.inf), axis=-1), 0)


def decode_fp8(codes):
    values = np.append(FP8, np.nan)[codes & 127]
    return np.where(codes > 127, -values, values).astype(F32)


def decode_e8m0(codes):
    return np.where(codes == 255, np.inf, 2.0 ** (np.minimum(codes, 254).astype(np.float64) - 127)).astype(F32)


def _e8m0(most, largest, kind, profile, mx_scale):
    with np.errstate(all="ignore"):
        d = rounded(most / F32(largest), kind if profile == "cpu" else "float32").astype(np.float64)
        fraction, exponent = np.frexp(d)  # d = fraction * 2**exponent, fraction in [0.5, 1)
        if mx_scale == "up":
            exponent = exponent - (fraction == 0.5)
        elif mx_scale == "floor":
            exponent = np.frexp(most.astype(np.float64))[1] - np.frexp(largest)[1]
            d = most
        else:
            logarithm = np.log2(d).astype(F32)
            away = np.trunc(logarithm + np.copysign(0.5, logarithm))
            exponent = np.rint(rounded(logarithm, kind)) if profile == "cpu" else away
        codes = np.where(d == 0, 127 if profile == "cpu" else 0, np.clip(exponent, -127, 127) + 127)
    return np.where(np.isfinite(most), codes, 255).astype(np.int64)


def quantize(w, kind, mode, profile, mx_scale="up", global_scale=None):
    """Codes one by one, shape of w, and scale bytes."""
    groups = ref.to_f32(w, kind).reshape(-1, GROUP_SIZES[mode])
    most = np.max(np.where(np.isnan(groups), np.inf, np.abs(groups)), axis=1, keepdims=True)
    largest = 448.0 if mode == "mxfp8" else 6.0
    with np.errstate(all="ignore"):
        factor = F32(1) if global_scale is None else F32(2688) / F32(global_scale)
        if mode == "nvfp4":
            d = rounded(most / F32(largest), kind if profile == "cpu" else "float32") * factor
            stored = nearest_even(d, FP8, 0)
            scales, unused = decode_fp8(stored), stored == 0
        else:
            stored = _e8m0(most, largest, kind, profile, mx_scale)
            scales, unused = decode_e8m0(stored), stored == 255
        steps = rounded(groups / scales, kind) * factor if profile == "cpu" else groups * (factor / scales)
    if mode == "mxfp8":
        codes = nearest_even(steps, FP8, 128)
    else:
        codes = first_nearest(steps) if profile == "cpu" else nearest_even(steps, FP4, 8)
    codes = np.where(unused | ~np.isfinite(groups) | np.isnan(steps), 0, codes)
    return codes.reshape(w.shape), stored.reshape(*w.shape[:-1], -1).astype(np.uint8)


def dequantize(codes, stored, mode, kind, profile, global_scale=None):
    """Values of codes one by one, as float32 numbers of the type `kind`."""
    factor = F32(1) if global_scale is None else F32(global_scale) / F32(2688)
    with np.errstate(all="ignore"):
        scales = (decode_fp8(stored) if mode == "nvfp4" else decode_e8m0(stored)) * factor
        if profile == "cpu" and global_scale is None:
            scales = rounded(scales, kind)
        values = decode_fp8(codes) if mode == "mxfp8" else np.concatenate([FP4, -FP4]).astype(F32)[codes]
        return rounded(np.repeat(scales, GROUP_SIZES[mode], axis=-1) * values, kind)


# ---------------------------------------------------------------------------------------------------------------------
# Products, to the bit: csrc/kernels/matmul_definition_fp.h says what they are


def _scales(stored, mode):
    with np.errstate(all="ignore"):
        return (decode_fp8(stored) if mode == "nvfp4" else decode_e8m0(stored)).astype(F32)


def _twice(codes):
    """Twice the FP4 numbers: integers up to 12."""
    return np.concatenate([2 * FP4, -2 * FP4])[codes]


def _plain(x, weights):
    """Sums of x * weights in order of k, each operation rounded: x [..., n], weights [..., n] float32, to [...]."""
    total = np.zeros(np.broadcast_shapes(x.shape, weights.shape)[:-1], F32)
    for k in range(x.shape[-1]):
        total = total + x[..., k] * weights[..., k]
    return total


def _term_fp4(x, numbers, p, s):
    """(float(G) * s) * 2^(e-1) of one block: x [M, n], numbers [N, n] float64, s [N] float32 or 1."""
    v, e = ref.fixed_point(x, p)
    return (ref.integer_dot(v, numbers.T, False) * s) * ref.two_to(e - 1).astype(F32)[:, None]


def _add_term_fp4(total, x, numbers, p, s):
    """Total and the term of one block: s [N] float32; the plain sum where x is not finite."""
    finite = np.isfinite(x).all(axis=1)
    term = _term_fp4(np.where(finite[:, None], x, F32(0)), numbers, p, s)
    term[~finite] = _plain(x[~finite][:, None], s[:, None] * (numbers / 2).astype(F32))
    return total + term


def _link_fp4(total, x, numbers, p, s):
    """_add_term_fp4, but fused."""
    finite = np.isfinite(x).all(axis=1)
    v, e = ref.fixed_point(np.where(finite[:, None], x, F32(0)), p)
    linked = fused(ref.integer_dot(v, numbers.T, False) * s, ref.two_to(e - 1)[:, None], total)
    linked[~finite] = total[~finite] + _plain(x[~finite][:, None], s[:, None] * (numbers / 2).astype(F32))
    return linked


def precision_t(mode, digits):
    return ref.number_format(GROUP_SIZES[mode], 5, digits)[0]


def precision_n(digits):
    return ref.number_format(64, 5, digits)[0]


def fp4_t_bits(x, codes, stored, mode, digits):
    """x [M, K] float32, codes [N, K], stored scales [N, groups]."""
    n, p, scales = GROUP_SIZES[mode], precision_t(mode, digits), _scales(stored, mode)
    y = np.zeros((len(x), len(codes)), F32)
    groups = x.shape[1] // n
    with np.errstate(all="ignore"):
        for group in range(groups if mode == "mxfp4" else 0):
            k = slice(group * n, (group + 1) * n)
            y = _add_term_fp4(y, x[:, k], _twice(codes[:, k]), p, scales[:, group])
        for first in range(0, groups if mode == "nvfp4" else 0, PANEL):
            for chain in range(first, min(first + CHAINS, groups)):
                total = np.zeros_like(y)
                for group in range(chain, min(first + PANEL, groups), CHAINS):
                    k = slice(group * n, (group + 1) * n)
                    total = _link_fp4(total, x[:, k], _twice(codes[:, k]), p, scales[:, group])
                y = y + total
    return y


def fp4_n_bits(x, codes, stored, mode, digits):
    """x [M, K] float32, codes [K, N], stored scales [K, groups]."""
    size, p, scales = GROUP_SIZES[mode], precision_n(digits), _scales(stored, mode)
    y = np.zeros((len(x), codes.shape[1]), F32)
    with np.errstate(all="ignore"):
        for first in range(0, x.shape[1], 64):
            block = x[:, first : first + 64]
            for group in range(scales.shape[1]):
                s, columns = scales[first : first + 64, group], slice(group * size, (group + 1) * size)
                twice, t = _twice(codes[first : first + 64, columns]), block * s
                finite = np.isfinite(t).all(axis=1)
                term = _term_fp4(np.where(finite[:, None], t, F32(0)), twice.T, p, F32(1))
                weights = s[:, None] * (twice / 2).astype(F32)
                term[~finite] = _plain(block[~finite][:, None], weights.T)
                y[:, columns] = y[:, columns] + term
    return y


def fused(a, b, c):
    """a * b + c in float32, rounded once, for b of at most 8 significant bits.

    The product is exact in float64. The sum is rounded to odd there: if it is not exact, its last bit is set, which
    keeps it off the middles between float32 numbers, so that the second rounding is right.
    """
    with np.errstate(all="ignore"):
        a, b, c = (np.asarray(v, np.float64) for v in (a, b, c))
        product = a * b
        total = product + c
        part = total - product
        rest = (product - (total - part)) + (c - part)
        bits = np.ascontiguousarray(total).view(np.int64)
        toward = np.where((rest > 0) == (total > 0), 0, -1)  # total was rounded away from the sum: step back first
        odd = ((bits + toward) | 1).view(np.float64)
        return np.where(np.isfinite(total) & (rest != 0), odd, total).astype(F32)


def fp8_bits(x, weights):
    """x [M, K] and weights [K, N] in float32. All chains of a panel side by side; zeros fill it, and change none."""
    y = np.zeros((len(x), weights.shape[1]), F32)
    with np.errstate(all="ignore"):
        for first in range(0, x.shape[1], 256):
            missing = -(min(first + 256, x.shape[1]) - first) % 16
            columns = np.pad(x[:, first : first + 256], [(0, 0), (0, missing)]).T.reshape(-1, 16, len(x), 1)
            rows = np.pad(weights[first : first + 256], [(0, missing), (0, 0)]).reshape(-1, 16, 1, y.shape[1])
            sums = np.zeros((16, *y.shape), F32)
            for column, row in zip(columns, rows, strict=True):
                sums = fused(column, row, sums)
            term = sums[0]
            for j in range(1, 16):
                term = term + sums[j]
            y = y + term
    return y


def weights32(codes, stored, mode):
    """Scale * number in float32: exact, unless it overflows."""
    with np.errstate(all="ignore"):
        return dequantize(codes, stored, mode, "float32", "metal")


def product_bits(x, codes, stored, mode, transpose, digits, global_scale=None):
    """What a product must be in float32, bit for bit."""
    if mode == "mxfp8":
        weights = weights32(codes, stored, mode)
        y = fp8_bits(x, weights.T if transpose else weights)
    else:
        y = (fp4_t_bits if transpose else fp4_n_bits)(x, codes, stored, mode, digits)
    if global_scale is not None:
        with np.errstate(all="ignore"):
            y = y * (F32(global_scale) / F32(2688))
    return np.where(np.isnan(y), ref.CANONICAL_NAN, y.view(np.uint32)).view(F32)


# ---------------------------------------------------------------------------------------------------------------------
# Products, exactly, and how far a result may be from them


def exact(x, codes, stored, mode, transpose):
    """[M, N] float64: the exact products, rounded once. x * number * scale has at most 24 + 8 digits."""
    weights = weights32(codes, stored, mode).astype(np.float64)
    weights = weights.T if transpose else weights
    wide = x.astype(np.float64)
    return np.array([[math.fsum(row * column) for column in weights.T] for row in wide])


def bound(x, codes, stored, mode, transpose, digits):
    """[M, N]: the error that the definition allows, for finite operands far from overflow; derived in place."""
    weights = weights32(codes, stored, mode).astype(np.float64)
    weights, u = weights.T if transpose else weights, ref.U
    sizes = np.abs(x.astype(np.float64)) @ np.abs(weights)
    if mode == "mxfp8":
        # Factors of at most 1 + u: 16 in a chain, 15 to add them up, one for each panel. A fused operation in the
        # subnormal range is off by 2^-150, and additions there are exact.
        panels = -(-x.shape[1] // 256)
        return sizes * np.expm1((16 + 15 + panels) * np.log1p(u)) + x.shape[1] * 2.0**-150
    chain, rounding = ref._Chain(sizes.shape), x.shape[1] * 2.0**-53 * sizes
    n = GROUP_SIZES[mode] if transpose else 64
    if mode == "nvfp4" and transpose:
        for first in range(0, x.shape[1], n * PANEL):
            for start in range(first, min(first + n * CHAINS, x.shape[1]), n):
                blocks = [slice(k, k + n) for k in range(start, min(first + n * PANEL, x.shape[1]), n * CHAINS)]
                chain.add(*_chain_error_t(x, weights, blocks, precision_t(mode, digits)))
        return chain.bound(rounding)
    for first in range(0, x.shape[1], n):
        k = slice(first, first + n)
        if transpose:
            chain.add(*_block_error_t(x[:, k], weights[k], precision_t(mode, digits)))
        else:
            chain.add(*_block_error_n(x[:, k], weights[k], codes[k], stored[k], mode, digits))
    return chain.bound(rounding)


def _block_error_t(x, weights, p):
    """Exact terms and the bound on their error.

    x is off by h = 2^(e-1) at most, and float(G) and its product with s are rounded; 2^(e-1) times that is exact or, in
    the subnormal range, off by 2^-150.
    """
    h = ref.two_to(ref.block_exponent(x, p) - 1)[:, None] * np.abs(weights).sum(axis=0)
    term = x.astype(np.float64) @ weights
    return term, h + (np.abs(term) + h) * ((1 + ref.U) ** 2 - 1) + 2.0**-150


def _chain_error_t(x, weights, blocks, p):
    """The exact sum of a chain of blocks and the bound on its error: each is added and rounded at once, off by U times
    the sum, or, in the subnormal range, by 2^-150."""
    total = error = np.zeros((len(x), weights.shape[1]))
    for k in blocks:
        term, off = _block_error_t(x[:, k], weights[k], p)
        total = total + term
        error = error + off
        error = error + ref.U * (np.abs(total) + error)
    return total, error


def _block_error_n(x, weights, codes, stored, mode, digits):
    """As `_block_error_t`, but that t = x * s is rounded before (off by 2^-150 if subnormal), and h is that of t."""
    size, scales, p = GROUP_SIZES[mode], _scales(stored, mode), precision_n(digits)
    numbers = np.abs(_twice(codes)) / 2
    error = np.zeros((len(x), weights.shape[1]))
    for group in range(scales.shape[1]):
        with np.errstate(all="ignore"):
            t = x * scales[:, group]
        off = np.abs(t.astype(np.float64)) * ref.U + 2.0**-150
        off = off + ref.two_to(ref.block_exponent(t, p) - 1)[:, None]
        columns = slice(group * size, (group + 1) * size)
        error[:, columns] = off @ numbers[:, columns]
    term = x.astype(np.float64) @ weights
    return term, error + (np.abs(term) + error) * ref.U + 2.0**-149


# ---------------------------------------------------------------------------------------------------------------------
# Products by plain float32 sums (accumulate="float") of FP4 weights: csrc/kernels/matmul_float_fp4.h


def roundings_float(k):
    """How many float32 roundings a summand x*W can pass through on its way into an output, on any ISA.

    Each multiplication and each addition counts, as if none were fused. Vectors have 4 <= L <= 16 lanes. Weights
    s*number are exact: 2 significant bits times at most 4.

    - Weights decoded first: 1 for the product with x, and an addition per element of a panel of at most 256 k, 3 where
      a panel is summed in up to 4 chains, 1 for the sum of each panel of 128 or more: min(k, 256) + k/128 + 5.
    - Numbers multiplied first: 1 for number*x, at most 32/L - 1 <= 7 additions in a group's lane, 1 for the product
      with s, an addition per group, of 16 or more, and log2(L) <= 4 over the lanes: k/16 + 13.
    """
    return min(k, 256) + k / 16 + 13


def exact64(x, codes, stored, mode, transpose, global_scale=None):
    """[M, N] float64: the product of unrounded weights; its own error is in `bound_float`."""
    weights = weights32(codes, stored, mode).astype(np.float64)
    with np.errstate(all="ignore"):
        return (x.astype(np.float64) @ (weights.T if transpose else weights)) * float(_factor(global_scale))


def _factor(global_scale):
    return F32(1) if global_scale is None else F32(global_scale) / F32(2688)


def bound_float(x, codes, stored, mode, transpose, global_scale=None):
    """Bound [M, N] on |result - exact64| of accumulate="float"; Inf where an intermediate may overflow float32.

    D = `roundings_float` factors of at most 1 + U each change every summand by at most ((1 + U)^D - 1) of itself, so an
    output by that much of sum |x*W|. What is rounded in the subnormal range is off by 2^-150 instead: additions are
    exact there, weights too, so that these are a product for each k, which counts |s| times where the number is
    multiplied first, and one for each group, which has more than one k. Twice that covers the factors of later
    roundings. A global scale multiplies the sum by a float32 factor: one rounding more. float64 sums of K products, and
    the factor, add (K + 2) * 2^-53. For a result rounded to a 16-bit kind add `half_ulp(abs(exact64) + bound, kind)`.
    """
    x64, k = np.abs(x.astype(np.float64)), x.shape[1]
    weights, numbers = np.abs(weights32(codes, stored, mode).astype(np.float64)), _twice(codes & 7) / 2
    scales = np.abs(np.repeat(_scales(stored, mode), GROUP_SIZES[mode], axis=1).astype(np.float64))
    turn = np.transpose if transpose else np.asarray
    factor = float(_factor(global_scale))
    with np.errstate(all="ignore"):
        sizes = x64 @ turn(weights)
        sums = sizes * np.expm1(roundings_float(k) * np.log1p(ref.U)) + 2.0**-148 * (k + turn(scales).sum(axis=0))
        scaled = 0.0 if global_scale is None else ref.U * factor * (sizes + sums) + 2.0**-150
        error = factor * sums + scaled + (k + 2) * 2.0**-53 * factor * sizes
        largest = np.maximum(np.maximum(sizes + sums, factor * (sizes + sums)), x64 @ turn(numbers))
        return np.where((largest >= 2.0**127) | ~np.isfinite(error), np.inf, error)
