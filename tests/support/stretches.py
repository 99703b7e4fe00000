"""Products in stretches, for the kernels that add them up."""

import numpy as np

# In how many stretches a product comes, and the type that it is rounded to.
STRETCHES = [(2, "f32"), (3, "f16"), (7, "f32")]


def in_stretches(splits: int, rows: int, width: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Partial sums f32 [splits · rows, width], and their sum in that order, rounded."""
    partial = np.random.default_rng(splits).normal(size=(splits, rows, width)).astype(np.float32)
    total = partial[0]
    for one in partial[1:]:
        total = total + one
    half = np.float16 if dtype == "f16" else np.float32
    return partial.reshape(-1, width), total.astype(half).astype(np.float32)
