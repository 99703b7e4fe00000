"""The output gate of attention against float64 numpy; see lora/checks/kernels/recurrent.py."""

from __future__ import annotations

import pytest

from lora.checks.comparison import NotHereError
from lora.checks.kernels.recurrent import check_head_gate
from lora.forward.head_gate import head_gate
from lora.shaders.program import Program
from lora.shaders.recording import Recording


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_head_gate(recording: Recording, dtype: str) -> None:
    try:
        result = check_head_gate(recording, dtype, backward=False)
    except NotHereError as why:
        pytest.skip(str(why))
    assert result.passed, result


def test_heads_that_do_not_fit_are_refused(recording: Recording) -> None:
    extent = recording.memory.extent(2)
    raw, x = (recording.memory.empty((2, n), extent=extent) for n in (44, 24))
    with pytest.raises(ValueError, match="heads of 12 do not fit"):
        head_gate(Program(recording), raw, x, 12, x)
