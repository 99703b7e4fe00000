"""The gradient to what dropout was given, by the product's own kernel, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
from gguf import GGMLQuantizationType

from lora.backward.matmul import Dropped, matmul_backward
from lora.forward.dropout import GroupDropout
from lora.forward.matmul_matrix import takes_dropout
from lora.forward.model.factors import LoraFactors
from lora.forward.model.weights import load_matrix
from lora.forward.plans.matmul_plans import Request, noting, plan_of
from lora.forward.plans.matmul_tiles import MATRIX_TILES, MatrixTile
from lora.forward.plans.workbench import Workbench
from lora.shaders.device import Device
from lora.shaders.memory import CountingMemory
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.kernels import with_facts
from tests.support.matrix_products import Case, check, with_tile
from tests.support.quantized_tensors import random_blocks, tensor_of

Q8_0, F16 = GGMLQuantizationType.Q8_0, GGMLQuantizationType.F16
SMALL, SMALLEST = MATRIX_TILES[-1], MatrixTile(32, 32, 16, 32, 16)


@pytest.mark.parametrize(
    ("case", "splits"),
    [
        (Case(1, 1, 4, 32, ranges=((0, 4),), parts=(F16,), dropout=0.3), 1),
        (Case(33, 32, 68, 100, ranges=((0, 20), (20, 40), (44, 68)), parts=(F16,),
              out_type="f32", dropout=0.1), 2),
        (Case(20, 19, 36, 64, rank=44, ranges=((4, 20), (20, 32)), x_type="f32", sized=True,
              dropout=0.5), 1),
        (Case(20, 20, 36, 64, ranges=((8, 44), (60, 72)), parts=(Q8_0, F16), out_type="f32",
              dropout=0.3), 1),
    ],
    ids=["one row", "stretches", "a large rank", "two parts"],
)  # fmt: skip
def test_on_any_driver(recording: Recording, case: Case, splits: int) -> None:
    check(with_tile(recording, SMALLEST, splits, on_software=True), case)


@pytest.mark.parametrize("tile", MATRIX_TILES, ids=lambda tile: tile.name)
def test_every_tile(recording: Recording, tile: MatrixTile) -> None:
    check(with_tile(recording, tile), Case(dropout=0.3))


def test_odd_widths_and_large_ranks(recording: Recording) -> None:
    of = with_tile(recording, SMALL)
    check(of, Case(33, 33, 68, 100, rank=20, ranges=((0, 68),), parts=(F16,), dropout=0.1))
    check(of, Case(40, 39, 64, 32, rank=40, ranges=((4, 12), (12, 64)), dropout=0.5))


def test_tuning_times_it_on_tensors_of_its_own(recording: Recording, device: Device) -> None:
    """A step is counted before there is memory: nothing of what it was recorded on can be bound."""
    memory = CountingMemory(recording.facts)
    of, requests = with_tile(recording, SMALLEST, on_software=True), list[Request]()
    counting = replace(of, memory=memory, plans=noting(requests))
    tensor = tensor_of(F16, random_blocks(F16, 36, 64, 0), 64)
    extent = memory.extent(20)
    lora = LoraFactors(memory.empty((8, 64)), memory.empty((28, 4)), 4, 1.0, ((4, 20), (20, 32)))
    dropout = GroupDropout(0.5, memory.empty((20,), "u32"), memory.constant_uniform((1, 2)))
    d_y, d_z = (memory.empty((20, n), extent=extent) for n in (36, 8))
    matmul_backward(
        Program(counting), d_y, load_matrix(counting, [tensor]), lora=lora,
        d_z=Dropped(d_z, dropout),
    )  # fmt: skip
    (request,) = requests
    plan = plan_of(of, request)
    plain = request.unmasked  # whose plan it takes, and which is timed for it
    assert plain.product == request.product
    with Workbench(device) as bench:
        for one, masks in ((request, True), (plain, False)):
            (dispatch,) = bench.program(one, plan, {}).dispatches
            assert all(tensor.buffer is not None for tensor in dispatch.tensors)
            assert (dispatch.constants["dropout"] is not None) == masks


def test_what_takes_it(recording: Recording) -> None:
    """Products in f16 on matrix units do; others say that they don't."""
    half = replace(recording, precision="f16")
    assert takes_dropout(replace(half, body="matrix"))
    assert not takes_dropout(replace(recording, precision="f32", body="matrix"))
    assert not takes_dropout(replace(half, body="tiled"))
    plain = replace(with_facts(half, is_cpu=False), body="tiled")
    tensor = tensor_of(F16, random_blocks(F16, 8, 32, 0), 32)
    memory, extent = recording.memory, recording.memory.extent(4)
    lora = LoraFactors(memory.empty((4, 32)), memory.empty((8, 4)), 4, 1.0, ((0, 8),))
    dropout = GroupDropout(0.5, memory.empty((4,), "u32"), memory.constant_uniform((1, 2)))
    d_y, d_z = (memory.empty((4, n), extent=extent) for n in (8, 4))
    with pytest.raises(ValueError, match="take no dropout"):
        matmul_backward(
            Program(plain), d_y, load_matrix(recording, [tensor]), lora=lora,
            d_z=Dropped(d_z, dropout),
        )  # fmt: skip
