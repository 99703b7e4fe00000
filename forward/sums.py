"""Sums of one value a row, kept on the device."""

from __future__ import annotations

from lora.shaders.activations import check_shape
from lora.shaders.program import Program
from lora.shaders.tensor import Extent, Tensor


def sum_into(program: Program, values: Tensor, extent: Extent, totals: Tensor, slot: int) -> None:
    """Appends totals[slot] += sum of values[: rows in use], in a fixed order.

    Args:
        values: [extent.maximum].
        extent: how many values are in use.
        totals: [n], one of which is added to.
        slot: which.
    """
    check_shape("sum_into values", values, extent.maximum)
    if not 0 <= slot < totals.size:
        # WGSL clamps an index past the end: another total would be added to.
        raise ValueError(f"sum_into: there is no slot {slot} in {totals.shape}")
    program.dispatch("sum_into", {"slot": slot}, [extent.uniform, values, totals], 1)
