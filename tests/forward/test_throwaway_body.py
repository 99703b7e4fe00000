"""A body of products that is added from outside: a file and a row (CONTRIBUTING.md)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from lora.backward.matmul import matmul_backward
from lora.forward import matmul_bodies
from lora.forward.matmul import matmul
from lora.forward.model.weights import load_matrix
from lora.forward.product import Product
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.kernels import activation, extent_in_use
from tests.support.plain_body import PLAIN
from tests.support.quantized_tensors import dequantized, random_blocks, tensor_of

ROWS, N_OUT, N_IN = 5, 12, 20


@pytest.fixture(autouse=True)
def row_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ahead of the others."""
    bodies = {"plain": PLAIN, **matmul_bodies.BODIES}
    monkeypatch.setattr(matmul_bodies, "BODIES", bodies)


@pytest.mark.parametrize("kind", ["F32", "F16"])
@pytest.mark.parametrize("parts", [1, 2])
def test_products_take_the_first_body_that_fits(
    recording: Recording, kind: str, parts: int
) -> None:
    rng, of_type = np.random.default_rng(0), GGMLQuantizationType[kind]
    other = GGMLQuantizationType.BF16
    types = [of_type, other][:parts]
    tensors = [tensor_of(t, random_blocks(t, N_OUT, N_IN, i), N_IN) for i, t in enumerate(types)]
    matrix = load_matrix(recording, tensors)
    w = np.concatenate([dequantized(tensor) for tensor in tensors]).astype(np.float64)
    values: dict[str, Any] = {
        "x": rng.normal(size=(ROWS, N_IN)), "residual": rng.normal(size=(ROWS, len(w))),
        "d_y": rng.normal(size=(ROWS, len(w))), "bias": rng.normal(size=len(w)),
    }  # fmt: skip
    values = {name: value.astype(np.float32) for name, value in values.items()}
    extent, program = extent_in_use(recording, ROWS, ROWS), Program(recording)
    x, residual, d_y = (activation(recording, values[n], extent) for n in ("x", "residual", "d_y"))
    bias = recording.memory.upload(values["bias"])
    y = matmul(program, Product(x, matrix, bias=bias, residual=residual))
    d_x = matmul_backward(program, d_y, matrix)
    program.run()
    expected = values["x"] @ w.T + values["bias"] + values["residual"]
    np.testing.assert_allclose(recording.memory.read(y), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(recording.memory.read(d_x), values["d_y"] @ w, rtol=0, atol=1e-4)
    taken = [dispatch.label.startswith("plain") for dispatch in program.dispatches]
    assert taken == ([kind == "F32"] + [False] * (parts - 1)) * 2
