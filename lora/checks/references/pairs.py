"""What pairs of f16 stand for."""

from __future__ import annotations

import numpy as np


def paired_numbers(words: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """The f64 that pairs are of, without their powers of two (parts/pairs.wgsl).

    Args:
        words: u32 [2, rows, columns / 2], upper halves and lower ones.
        largest: f32, of the numbers that have a power in common; against [rows, columns].
    """
    upper, lower = np.ascontiguousarray(words).view(np.float16).astype(np.float64)
    bits = largest.astype(np.float32).view(np.uint32)
    exponents = np.clip(141 - (bits >> 23).astype(np.int64), -126, 126)
    return (upper + lower) * 2.0**-exponents
