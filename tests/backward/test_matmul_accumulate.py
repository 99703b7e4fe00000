"""The gradient of a product's input added to what is there, where a block reads the stream."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from lora.backward.matmul import Accumulate, matmul_backward
from lora.checks.tensors import frozen
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.half_tensors import needs_halves, typed
from tests.support.kernels import extent_in_use, run_twice, with_facts


@pytest.mark.parametrize(
    ("body", "precision"), [("wide", "f32"), ("tiled", "f32"), ("tiled", "f16"), ("matrix", "f16")]
)
def test_it_is_added(recording: Recording, body: str, precision: str) -> None:
    """The stream's gradient is f32; of the block's, and of tiles, f16 is wanted in training."""
    if precision == "f16":
        needs_halves(recording.facts)
    recording = with_facts(recording, is_cpu=body == "wide")
    recording = replace(recording, body=body, precision=precision)
    matrix, values = frozen(recording, GGMLQuantizationType.Q8_0, 96, 64)
    rng = np.random.default_rng(0)
    d_y, before = rng.normal(size=(20, 96)), rng.normal(size=(20, 64)).astype(np.float32)
    extent = extent_in_use(recording, 20, 18)
    source = typed(recording, d_y, precision, extent)
    out, program = typed(recording, before, "f32", extent), Program(recording)
    matmul_backward(program, source, matrix, out=out, before=Accumulate())
    found = run_twice(program, out, before)
    expected = before + d_y @ values
    # f32: a sum of 96 terms; f16: factors of up to 3 rounded to 11 bits.
    atol = 1e-4 if precision == "f32" else 0.1
    np.testing.assert_allclose(found[:18], expected[:18], rtol=0, atol=atol)
    np.testing.assert_array_equal(found[18:], before[18:])
