"""Writing weights as blocks of GGUF tensors: f32 [blocks, weights] → uint8 [blocks, bytes].

gguf-py decodes every type, but writes only the simple ones, and those by the largest weight of a
block alone. Here the scale of a block is searched: some candidates around the one that the largest
weight gives; each rounds the weights to levels, and the least squares over those levels give the
scale (and minimum) that fits them best. The candidate whose squared error is smallest is taken.
A super-block then rounds its scales to a few bits, and the levels are chosen again under the scales
as they will be read.

Source of the block formats: ggml-common.h of ggml, and `gguf.quants`, which decodes them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_NO_SCALE = 1e-15  # blocks whose weights are all smaller become zeros; their inverse would overflow

# How much finer (or coarser, below 0) than the largest weight asks for, in levels: larger weights
# are then cut off for the sake of the many smaller ones. Steps half as long gain less than 0.2 %.
_OFFSETS = np.arange(-1.6, 1.7, 0.2)

# IQ4_NL and IQ4_XS: what the sixteen indices stand for.
_NONLINEAR = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
# The index nearest to every half from -128 on. The borders between values are halves themselves,
# so that what lies between two halves has one nearest value.
_NEAREST_TO_HALVES = np.searchsorted(
    (_NONLINEAR[1:] + _NONLINEAR[:-1]) / 2, np.arange(-128, 128, 0.5), side="right"
).astype(np.uint8)


# -- the search -----------------------------------------------------------------------------------


def _dot(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sum over the last axis of x · y."""
    product: np.ndarray = np.einsum("...j,...j->...", x, y)
    return product


def _inverse(values: np.ndarray) -> np.ndarray:
    """1 / values, 0 where they are as good as 0."""
    inverse = np.zeros_like(values)
    np.divide(1.0, values, out=inverse, where=np.abs(values) >= _NO_SCALE)
    return inverse


def _levels(scaled: np.ndarray, lowest: int, highest: int) -> np.ndarray:
    """The nearest levels; in place."""
    np.rint(scaled, out=scaled)
    return np.clip(scaled, lowest, highest, out=scaled)


def _extreme(x: np.ndarray) -> np.ndarray:
    """The weight of each block that is largest in size, with its sign.  # [..., 1]"""
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    return np.where(-low > high, low, high)


def _better(best: np.ndarray, gain: np.ndarray, pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Takes over what the candidate found, for the blocks where it gained more."""
    better = gain > best
    np.copyto(best, gain, where=better)
    for kept, found in pairs:
        np.copyto(kept, found, where=better)


def _fit_scale(x: np.ndarray, bits: int) -> np.ndarray:
    """Scales s so that x ≈ s · q, q of `bits` bits with a sign.

    The largest weight falls on the lowest level, which is farther from zero than the highest; so a
    scale may be negative.

    Args:
        x: f32 [blocks, weights].

    Returns:
        f32 [blocks].
    """
    lowest, highest = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    inverse = _inverse(_extreme(x))
    scale = np.zeros(len(x), np.float32)
    best = np.zeros(len(x), np.float32)
    for offset in _OFFSETS:
        q = _levels(x * (inverse * np.float32(lowest - offset)), lowest, highest)
        xq, qq = _dot(x, q), _dot(q, q)
        fitted = xq * _inverse(qq)
        _better(best, fitted * xq, [(scale, fitted)])
    return scale


def _fit_affine(
    x: np.ndarray, bits: int, *, below_zero: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Scales s and minima m so that x ≈ s · q + m, q of `bits` bits from 0.

    Args:
        x: f32 [blocks, weights].
        below_zero: m must not lie above 0: K-quants store its size alone.

    Returns:
        s and m, f32 [blocks].
    """
    n, top = x.shape[1], (1 << bits) - 1
    low, high = x.min(axis=1), x.max(axis=1)
    if below_zero:
        low = np.minimum(low, np.float32(0))
    ones = np.ones(n, np.float32)
    sum_x = x @ ones
    inverse = _inverse(high - low)[:, None]
    scale, minimum = np.zeros(len(x), np.float32), low.copy()
    best = np.full(len(x), -np.inf, np.float32)
    shifted = x - low[:, None]
    for offset in _OFFSETS:
        q = _levels(shifted * (inverse * np.float32(top + offset)), 0, top)
        sum_q, qq, xq = q @ ones, _dot(q, q), _dot(x, q)
        s = (n * xq - sum_x * sum_q) * _inverse(n * qq - sum_q * sum_q)
        m = (sum_x - s * sum_q) / n
        if below_zero:
            above = m > 0
            m = np.where(above, np.float32(0), m)
            s = np.where(above, xq * _inverse(qq), s)
        # The squared error less what does not depend on the candidate.
        error = s * (s * qq + 2 * (m * sum_q - xq)) + m * (n * m - 2 * sum_x)
        _better(best, -error, [(scale, s), (minimum, m)])
    return scale, minimum


def _half(values: np.ndarray) -> np.ndarray:
    """f32 as f16 will be read."""
    return values.astype(np.float16).astype(np.float32)


def _half_bytes(values: np.ndarray) -> np.ndarray:
    """f32 [n] as the two bytes of an f16.  # uint8 [n, 2]"""
    return values.astype("<f2").view(np.uint8).reshape(-1, 2)


# -- pieces of blocks -----------------------------------------------------------------------------


def _nibbles(q: np.ndarray, half: int) -> np.ndarray:
    """Chunks of 2 · half weights, two a byte: weight l in the lower bits, half + l above.

    Args:
        q: uint8 [blocks, weights], the lower four bits count.
    """
    pairs = q.reshape(len(q), -1, 2, half) & 15
    return (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(len(q), -1)


def _fields(q: np.ndarray, bits: int) -> np.ndarray:
    """Chunks of 32 bytes: bits · s of byte l hold the `bits` lower bits of weight 32 s + l.

    Args:
        q: uint8 [blocks, weights].
    """
    n = 8 // bits
    chunks = (q & ((1 << bits) - 1)).reshape(len(q), -1, n, 32)
    packed = np.zeros((len(q), chunks.shape[1], 32), np.uint8)
    for s in range(n):
        packed |= chunks[:, :, s] << (bits * s)
    return packed.reshape(len(q), -1)


def _fifth_bits(q: np.ndarray) -> np.ndarray:
    """Bit 4 of 32 weights, weight i in bit i.  # uint8 [blocks, 4]"""
    return np.packbits((q >> 4) & 1, axis=1, bitorder="little")


def _join(*pieces: np.ndarray) -> np.ndarray:
    return np.concatenate(pieces, axis=1)


# -- blocks of 32 ---------------------------------------------------------------------------------


def write_scaled(bits: int) -> Callable[[np.ndarray], np.ndarray]:
    """Q4_0 and Q5_0."""

    def write(x: np.ndarray) -> np.ndarray:
        d = _half(_fit_scale(x, bits))
        half_range = 1 << (bits - 1)
        q = _levels(x * _inverse(d)[:, None], -half_range, half_range - 1)
        q = (q + half_range).astype(np.uint8)
        upper = [_fifth_bits(q)] if bits == 5 else []
        return _join(_half_bytes(d), *upper, _nibbles(q, 16))

    return write


def write_affine(bits: int) -> Callable[[np.ndarray], np.ndarray]:
    """Q4_1 and Q5_1."""

    def write(x: np.ndarray) -> np.ndarray:
        scale, minimum = _fit_affine(x, bits)
        d, m = _half(scale), _half(minimum)
        q = _levels((x - m[:, None]) * _inverse(d)[:, None], 0, (1 << bits) - 1).astype(np.uint8)
        upper = [_fifth_bits(q)] if bits == 5 else []
        return _join(_half_bytes(d), _half_bytes(m), *upper, _nibbles(q, 16))

    return write


def _fit_nonlinear(x: np.ndarray) -> np.ndarray:
    """Scales s so that x ≈ s · value, a value of _NONLINEAR.  # f32 [blocks]"""
    inverse = _inverse(_extreme(x))
    scale = np.zeros(len(x), np.float32)
    best = np.zeros(len(x), np.float32)
    for extreme in np.concatenate([np.arange(-148, -111, 4), np.arange(101, 134, 4)]):
        value = _NONLINEAR[_nearest_value(x * (inverse * np.float32(extreme)))]
        xv = _dot(x, value)
        fitted = xv * _inverse(_dot(value, value))
        _better(best, fitted * xv, [(scale, fitted)])
    return scale


def _nearest_value(scaled: np.ndarray) -> np.ndarray:
    """Indices into _NONLINEAR, uint8."""
    halves = np.clip(np.floor(2 * scaled), -256, 255).astype(np.int32)
    return _NEAREST_TO_HALVES[halves + 256]


def write_iq4_nl(x: np.ndarray) -> np.ndarray:
    d = _half(_fit_nonlinear(x))
    q = _nearest_value(x * _inverse(d)[:, None])
    return _join(_half_bytes(d), _nibbles(q, 16))


# -- super-blocks of 256 --------------------------------------------------------------------------


def _round_scales(scales: np.ndarray, lowest: int, highest: int) -> tuple[np.ndarray, np.ndarray]:
    """The scales of super-blocks as d · an integer each.

    Args:
        scales: f32 [blocks, sub-blocks].
        lowest, highest: of the integers. With a lowest below zero the largest scale falls on it.

    Returns:
        d as f16 gives it [blocks], and the integers f32 [blocks, sub-blocks].
    """
    d = _half(_extreme(scales)[:, 0] / (lowest if lowest else highest))
    # Divided by d as it will be read: of small weights it has only a few bits.
    return d, _levels(scales * _inverse(d)[:, None], lowest, highest)


def _write_signed(
    x: np.ndarray, bits: int, lowest: int, highest: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """d [blocks], integer scales [blocks, 16], q from 0 uint8 [blocks, 256] of Q3_K and Q6_K."""
    parts = x.reshape(-1, 16)
    d, scales = _round_scales(_fit_scale(parts, bits).reshape(-1, 16), lowest, highest)
    half_range = 1 << (bits - 1)
    inverse = _inverse((d[:, None] * scales).reshape(-1, 1))
    q = _levels(parts * inverse, -half_range, half_range - 1)
    return d, scales.astype(np.int8), (q + half_range).astype(np.uint8).reshape(-1, 256)


def write_q3_k(x: np.ndarray) -> np.ndarray:
    d, signed, q = _write_signed(x, 3, -32, 31)
    scales = (signed + 32).astype(np.uint8)
    fours = (scales >> 4).reshape(-1, 4, 4)
    upper = fours[:, 0] | (fours[:, 1] << 2) | (fours[:, 2] << 4) | (fours[:, 3] << 6)
    return _join(_fields(q >> 2, 1), _fields(q, 2), _nibbles(scales, 8), upper, _half_bytes(d))


def write_q6_k(x: np.ndarray) -> np.ndarray:
    d, scales, q = _write_signed(x, 6, -128, 127)
    return _join(_nibbles(q, 64), _fields(q >> 4, 2), scales.view(np.uint8), _half_bytes(d))


def _write_minimum(
    x: np.ndarray, bits: int, part: int, top: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Super-blocks of x ≈ d · scale · q - d_min · minimum.

    Args:
        part: weights of a sub-block.
        top: the largest scale and minimum.

    Returns:
        d and d_min f32 [blocks], scales and minima uint8 [blocks, sub-blocks], q uint8 [blocks,
        256].
    """
    parts = x.reshape(-1, part)
    n_parts = 256 // part
    scale, minimum = _fit_affine(parts, bits, below_zero=True)
    # A scale below zero would take the worst of fits; rounding gives it 0.
    d, scales = _round_scales(np.maximum(scale, 0).reshape(-1, n_parts), 0, top)
    d_min, minima = _round_scales(-minimum.reshape(-1, n_parts), 0, top)
    inverse = _inverse((d[:, None] * scales).reshape(-1, 1))
    lowered = parts + (d_min[:, None] * minima).reshape(-1, 1)
    q = _levels(lowered * inverse, 0, (1 << bits) - 1).astype(np.uint8).reshape(-1, 256)
    return d, d_min, scales.astype(np.uint8), minima.astype(np.uint8), q


def write_q2_k(x: np.ndarray) -> np.ndarray:
    d, d_min, scales, minima, q = _write_minimum(x, 2, 16, 15)
    return _join(scales | (minima << 4), _fields(q, 2), _half_bytes(d), _half_bytes(d_min))


def _six_bits(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Eight scales and eight minima of six bits in twelve bytes, as Q4_K and Q5_K have them."""
    lower, upper = slice(0, 4), slice(4, 8)
    return _join(
        scales[:, lower] | (scales[:, upper] >> 4 << 6),
        minima[:, lower] | (minima[:, upper] >> 4 << 6),
        (scales[:, upper] & 15) | (minima[:, upper] << 4),
    )


def write_q4_k(x: np.ndarray) -> np.ndarray:
    d, d_min, scales, minima, q = _write_minimum(x, 4, 32, 63)
    return _join(_half_bytes(d), _half_bytes(d_min), _six_bits(scales, minima), _nibbles(q, 32))


def write_q5_k(x: np.ndarray) -> np.ndarray:
    d, d_min, scales, minima, q = _write_minimum(x, 5, 32, 63)
    return _join(
        _half_bytes(d),
        _half_bytes(d_min),
        _six_bits(scales, minima),
        _fields(q >> 4, 1),
        _nibbles(q, 32),
    )


def write_iq4_xs(x: np.ndarray) -> np.ndarray:
    parts = x.reshape(-1, 32)
    d, signed = _round_scales(_fit_nonlinear(parts).reshape(-1, 8), -32, 31)
    inverse = _inverse((d[:, None] * signed).reshape(-1, 1))
    q = _nearest_value(parts * inverse).reshape(-1, 256)
    scales = (signed + 32).astype(np.uint8)
    upper = np.zeros(len(x), "<u2")
    for part in range(8):
        upper |= (scales[:, part] >> 4).astype("<u2") << (2 * part)
    lower = (scales[:, 0::2] & 15) | (scales[:, 1::2] << 4)
    return _join(_half_bytes(d), upper.view(np.uint8).reshape(-1, 2), lower, _nibbles(q, 16))
