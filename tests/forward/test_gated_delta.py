"""The gated delta rule against float64 numpy; see lora/checks/kernels/recurrent.py."""

from __future__ import annotations

import numpy as np
import pytest

from lora.checks.comparison import NotHereError
from lora.checks.kernels.recurrent import (
    SIZES,
    STARTS,
    check_delta_gates,
    check_gated_delta,
    check_gated_delta_text,
    random_inputs,
)
from lora.checks.references.gated_delta import gated_delta_reference
from lora.forward.gated_delta import DeltaSizes, DeltaTensors, chunk_rows, gated_delta
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.kernels import with_facts

SHAPES = [SIZES, DeltaSizes(4, 4, 20), DeltaSizes(4, 12, 8)]
KINDS = {
    "cpu": {"is_cpu": True},
    "gpu": {"is_cpu": False},
    "small gpu": {"is_cpu": False, "workgroup_memory": 16384},
}
# Chunks of a small GPU are another number in the same kernels.
CASES = [(k, s) for k in KINDS for s in (SHAPES if k != "small gpu" else SHAPES[:1])]


def test_chunks(recording: Recording) -> None:
    rows = {name: chunk_rows(with_facts(recording, **kind).facts) for name, kind in KINDS.items()}
    assert rows == {"cpu": 16, "gpu": 64, "small gpu": 32}


@pytest.mark.parametrize(("kind", "sizes"), CASES, ids=str)
def test_gated_delta(recording: Recording, kind: str, sizes: DeltaSizes) -> None:
    result = check_gated_delta(with_facts(recording, **KINDS[kind]), sizes)
    assert result.passed, result


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
@pytest.mark.parametrize(
    ("rows", "position"), [(37, 9), (37, 0), (64, 3), (1, 5), (1, 0), (130, 7)]
)
def test_new_rows_of_a_text(recording: Recording, rows: int, position: int, kind: str) -> None:
    where = with_facts(recording, **KINDS[kind])
    result = check_gated_delta_text(where, rows=rows, position=position)
    assert result.passed, result


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_delta_gates(recording: Recording, dtype: str) -> None:
    try:
        result = check_delta_gates(recording, dtype, backward=False)
    except NotHereError as why:
        pytest.skip(str(why))
    assert result.passed, result


def test_the_reference_forgets_at_an_examples_start() -> None:
    x = random_inputs(SIZES, STARTS)
    whole, _ = gated_delta_reference(x)
    alone = random_inputs(SIZES, STARTS)
    rows = slice(22, 75)
    one = type(x)(*(part[rows] for part in (alone.q, alone.k, alone.v, alone.g, alone.beta)),
                  np.zeros(53, int))  # fmt: skip
    np.testing.assert_allclose(gated_delta_reference(one)[0], whole[rows], rtol=0, atol=1e-12)


def test_sizes_that_no_kernel_does_are_refused(recording: Recording) -> None:
    extent = recording.memory.extent(4)
    segments = recording.memory.empty((4, 2), "u32", extent=extent)
    for sizes in (DeltaSizes(2, 6, 16), DeltaSizes(3, 4, 16), DeltaSizes(2, 4, 18)):
        tensors = DeltaTensors.allocate(recording, sizes, extent)
        with pytest.raises(ValueError, match="are no multiples"):
            gated_delta(Program(recording), tensors, sizes, segments)
    tensors = DeltaTensors.allocate(recording, SIZES, extent)
    with pytest.raises(ValueError, match="gated_delta inputs has shape"):
        gated_delta(Program(recording), tensors, DeltaSizes(4, 4, 16), segments)
