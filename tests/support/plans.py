"""Plans of products: products to choose them for, and tuners that time nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType

from lora.backward.matmul import matmul_backward
from lora.forward.matmul import matmul
from lora.forward.model.weights import FrozenMatrix, load_matrix
from lora.forward.plans.matmul_plans import ProductShape, Request, noting
from lora.forward.plans.matmul_tiles import Plan, candidates
from lora.forward.plans.tuning import TUNING_SECONDS
from lora.forward.product import Product
from lora.shaders.device import Device
from lora.shaders.facts import DeviceFacts
from lora.shaders.memory import CountingMemory
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.storage.tile_cache import TileCache, Tuner
from tests.support.quantized_tensors import random_blocks, tensor_of

Q8_0 = GGMLQuantizationType.Q8_0
N_OUT, N_IN = 96, 224


def a_matrix(recording: Recording, n_out: int = N_OUT, n_in: int = N_IN) -> FrozenMatrix:
    return load_matrix(recording, [tensor_of(Q8_0, random_blocks(Q8_0, n_out, n_in), n_in)])


def planned_requests(
    facts: DeviceFacts,
    shapes: Sequence[tuple[int, int, int]],
    precision: str = "f32",
    body: str | None = "tiled",
) -> list[Request]:
    """The requests of products [rows, out, in], each in both directions."""
    requests: list[Request] = []
    memory = CountingMemory(facts)
    counting = Recording(facts, memory, precision, body=body, plans=noting(requests))
    for rows, n_out, n_in in shapes:
        matrix, extent = a_matrix(counting, n_out, n_in), memory.extent(rows)
        program = Program(counting)
        x = memory.empty((rows, n_in), extent=extent)
        matmul_backward(program, matmul(program, Product(x, matrix)), matrix)
    return requests


@pytest.fixture
def gpu(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    """The software driver under the name of a GPU, and an empty folder of caches.

    Without matrix units: where it has them their tiles of a GPU's size compile for minutes.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    info = {**device.facts.info, "adapter_type": "DiscreteGPU", "description": "driver 1.0"}
    facts = replace(device.facts, name="Card 3000", info=info, is_cpu=False, matrix_shapes=())
    monkeypatch.setattr(device, "facts", facts)
    return device


def second_choices(
    device: Device, requests: Sequence[Request], *, seconds: float
) -> dict[ProductShape, Plan]:
    """What a tuner might find that disagrees with the model."""
    return {r.product: candidates(r.space(device.facts))[1] for r in requests}


def refuse(
    device: Device, requests: Sequence[Request], *, seconds: float
) -> Mapping[ProductShape, Plan]:
    raise AssertionError(f"measured again: {requests}")


def use_tuner(monkeypatch: pytest.MonkeyPatch, tuner: Tuner) -> None:
    """Lets training look for plans with another tuner than the one that times them."""
    monkeypatch.setattr(TileCache.find, "__defaults__", (tuner, TUNING_SECONDS))
