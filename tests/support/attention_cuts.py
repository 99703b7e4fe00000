"""Attention on matrix units in tests: by one cut, whatever the number of rows asks for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lora.forward import attention as forward_attention
from lora.forward.attention_matrix import MatrixCut, cuts_of
from lora.forward.matmul_matrix import EMULATED, shape_on
from lora.shaders.recording import Recording
from tests.support.half_tensors import needs_halves


def on_matrix_units(recording: Recording, *, on_software: bool = False) -> Recording:
    """As f16 training has it there; in plain WGSL where the device has none.

    Args:
        on_software: also by a software driver that has units, which compiles them for minutes.
    """
    needs_halves(recording.facts)
    software = recording.facts.info["adapter_type"] == "CPU"
    if software and shape_on(recording.facts) is not None and not on_software:
        pytest.skip("software drivers would compile it for minutes: one case is for them")
    return replace(recording, precision="f16", body="matrix")


def use_block(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Makes every kernel take the cut whose block is the largest up to that, if it fits."""

    def choose(
        kernel: str, recording: Recording, rows: int, heads: int, head_size: int
    ) -> MatrixCut:
        shape = shape_on(recording.facts) or EMULATED
        for cut in cuts_of(kernel, head_size):
            if cut.block <= min(block, rows) and cut.fits(
                kernel, head_size, shape, recording.facts
            ):
                return cut
        pytest.skip(f"no cut for heads of {head_size} fits this device")

    monkeypatch.setattr(forward_attention, "choose_cut", choose)
