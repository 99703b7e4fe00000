"""Products in stretches, for the kernels that add them up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora.forward.plans.stretches import Stretches
from lora.shaders.activations import extent_of
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

# In how many stretches a product comes, and the type that it is rounded to.
STRETCHES = [(2, "f32"), (3, "f16"), (7, "f32")]


def in_stretches(recording: Recording, splits: int, rows: int, width: int) -> Stretches:
    """Random partial sums."""
    partial = np.random.default_rng(splits).normal(size=(splits * rows, width))
    return Stretches(recording.memory.upload(partial.astype(np.float32)), splits)


def finish(program: Program, stretches: Stretches, out: Tensor) -> None:
    """Appends the second pass of a product, which the kernels that are tested do without."""
    extent, (_, width) = extent_of(out), out.shape
    after = [t for t in (stretches.scales, stretches.kept) if t is not None]
    constants = {
        "splits": stretches.splits, "n_columns": width, "maximum_rows": extent.maximum,
        "out_stride": width, "epilogue": "write", "bias": False, "softcap": None,
        "scaled": stretches.kept and {"kept_type": stretches.kept.dtype},
        "placed": False, "out_type": out.dtype,
    }  # fmt: skip
    program.dispatch(
        "matmul_reduce", constants, [extent.uniform, stretches.partial, out, *after],
        -(-extent.maximum * width // 256),
    )  # fmt: skip


def same(
    recording: Recording,
    types: Sequence[str],
    found: Sequence[np.ndarray],
    wanted: Sequence[np.ndarray],
    *,
    roundings: int = 1,
) -> bool:
    """Bit for bit; on a GPU, whose compiler contracts sums differently, but for the rounding.

    A value beside the edge between two f16 then comes out as the one or the other, and what f32
    makes of it is as far off. Mesa from 25 on may keep more than f16 between the operations of one
    kernel, so that two kernels with f16 in them agree but for that rounding on a CPU, too.
    """
    if recording.facts.info["adapter_type"] == "CPU" and "f16" not in types:
        return all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
    bound = roundings * (2.0**-10 if "f16" in types else 2.0**-18)
    return all(
        np.abs(a.astype(np.float64) - b).max() <= bound * np.abs(b).max()
        for a, b in zip(found, wanted, strict=True)
    )
