"""A prompt's products in f16: which programs take them, and where they are refused."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora.forward.attention_prompt import FEWEST_ROWS
from lora.forward.gguf.file import GGUFFile
from lora.forward.model.architecture import Architecture
from lora.forward.model.frozen_model import load_model
from lora.forward.plans.matmul_plans import Request
from lora.forward.plans.matmul_tiles import MatrixTile, Plan, cut
from lora.generation.engine import DecodeEngine
from lora.generation.opening import open_generator
from lora.shaders.choice import Wanted
from lora.shaders.device import Device
from lora.shaders.errors import InputError
from lora.shaders.memory import CountingMemory
from lora.shaders.recording import Recording
from tests.support.attention_cuts import on_matrix_units
from tests.support.half_tensors import needs_halves
from tests.support.renderings import LARGE_GPU, MATRIX_GPU, Kind
from tests.support.tiny_models import TINY_MODELS

ROOM = 5000
SMALLEST = MatrixTile(32, 32, 16, 32, 16)


def engine_on(kind: Kind, folder: Path, products: str | None) -> DecodeEngine:
    """That of a tiny model on a described device."""
    TINY_MODELS["qwen3"].write_gguf(folder / "model.gguf")
    gguf_file = GGUFFile(folder / "model.gguf")
    recording = Recording(kind.facts, CountingMemory(kind.facts), products=products)
    architecture = Architecture.from_gguf(gguf_file)
    return DecodeEngine(recording, load_model(recording, gguf_file, architecture, ROOM), {})


def templates_of(engine: DecodeEngine, one_row: bool, few: bool = False) -> set[str]:
    """Kernels of a prompt's piece, or of one row."""
    inputs = engine._tensors.step if one_row else engine._tensors.pieces
    programs = engine._programs_of(None, inputs, few=few)
    return {d.template for program in programs for d in program.dispatches}


@pytest.mark.parametrize(
    ("kind", "products", "rows", "body"),
    [
        (MATRIX_GPU, "f16", 2048, "matmul_matrix"),
        (MATRIX_GPU, "f32", 512, "matmul_tiled"),
        (LARGE_GPU, "f16", 2048, "matmul_tiled"),
    ],
    ids=["on units", "in f32", "without units"],
)
def test_pieces(tmp_path: Path, kind: Kind, products: str | None, rows: int, body: str) -> None:
    engine = engine_on(kind, tmp_path, products)
    assert engine.piece_rows == rows
    # Of products as small as these, some are faster by plain tiles on any GPU.
    found = templates_of(engine, one_row=False)
    assert body in found and ("matmul_matrix" in found) == (body == "matmul_matrix")
    assert not {"matmul_matrix", "matmul_tiled"} & templates_of(engine, one_row=True)


def by_smallest_tile(request: Request) -> Plan:
    """What software compiles soonest."""
    return Plan(SMALLEST, *cut(request.constants["contraction"], 1, SMALLEST.depth))


def test_attention_of_pieces(tmp_path: Path) -> None:
    """On units, where products are in f16 and rows are many; else as ever."""
    found = []
    for products, few in (("f16", False), ("f16", True), ("f32", False)):
        engine = engine_on(MATRIX_GPU, tmp_path, products)
        found.append({t for t in templates_of(engine, False, few) if t[:4] in ("atte", "head")})
    normed = {"head_norm_rope"}
    assert found[0] == {"head_sizes", "head_halves", "attention_matrix"} | normed
    assert found[1] == found[2] == {"attention_decode"} | normed


def test_a_piece_of_few_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the programs that read the cache row by row, whatever the rows are recorded for."""
    engine, asked = engine_on(MATRIX_GPU, tmp_path, "f16"), []

    def programs_of(*_: object, opening: bool, few: bool) -> None:
        asked.append((opening, few))
        raise InterruptedError

    monkeypatch.setattr(engine, "_programs_of", programs_of)
    for n, first in ((FEWEST_ROWS - 1, 0), (FEWEST_ROWS, 0), (2, 40), (40, 40)):
        with pytest.raises(InterruptedError):
            engine.run_piece(range(n), first, first, None, with_head=False)
    assert asked == [(True, True), (True, False), (False, True), (False, False)]


def test_logits_of_pieces_that_attend_on_units(recording: Recording, tmp_path: Path) -> None:
    """In plain WGSL in their place: each piece sees those before it, of many rows and of few."""
    halves = replace(
        on_matrix_units(recording), precision="f32", products="f16", plans=by_smallest_tile
    )
    TINY_MODELS["gemma2_q8_0"].write_gguf(tmp_path / "model.gguf")  # caps, windows and none
    gguf_file = GGUFFile(tmp_path / "model.gguf")
    architecture = Architecture.from_gguf(gguf_file)
    logits, kernels = [], {}
    for own in (recording, halves):
        with closing(
            DecodeEngine(own, load_model(own, gguf_file, architecture, 128), {})
        ) as engine:
            for first, stop in ((0, 33), (33, 40), (40, 101)):
                tokens = [3 + position % 40 for position in range(first, stop)]
                engine.run_piece(tokens, first, first, None, with_head=True)
                logits.append(engine.logits())
            for (_, _, _, few), (layers, _) in engine._programs.items():
                kernels[own.products, few] = {d.template for d in layers.dispatches}
    assert "attention_matrix" in kernels["f16", False] - kernels["f16", True]
    assert "attention_decode" in kernels["f16", True] - kernels["f16", False]
    for plain, on_units in zip(logits[:3], logits[3:], strict=True):
        assert 0 < np.abs(plain - on_units).max() / np.abs(plain).max() < 1e-2


def test_logits_with_products_in_halves(recording: Recording, tmp_path: Path) -> None:
    """On any driver: the body that GPUs without units take, forced."""
    needs_halves(recording.facts)
    model = TINY_MODELS["qwen3"]
    model.write_gguf(tmp_path / "model.gguf")
    gguf_file = GGUFFile(tmp_path / "model.gguf")
    architecture = Architecture.from_gguf(gguf_file)
    logits = []
    for products in (None, "f16"):
        own = replace(recording, products=products, body="tiled")
        engine = DecodeEngine(own, load_model(own, gguf_file, architecture, 64), {})
        with closing(engine):
            engine.run_piece(range(3, 43), 0, 0, None, with_head=True)
            logits.append(engine.logits())
    worst = np.abs(logits[0] - logits[1]).max() / np.abs(logits[0]).max()
    assert 0 < worst < 1e-2  # rounded factors, and no more than that


def test_units_are_asked_about(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before training, and before anything is recorded; products in f32 take none."""
    TINY_MODELS["qwen3"].write_gguf(tmp_path / "model.gguf")
    asked: list[str | int] = []

    def trust(opened: Device, wanted: str | int) -> None:
        asked.append(wanted)
        raise InterruptedError

    monkeypatch.setattr("lora.checks.matrix_units.trust_matrix_units", trust)
    monkeypatch.setattr("lora.generation.opening.check_half_products", lambda _: None)
    with pytest.raises(InterruptedError):
        open_generator(str(tmp_path / "model.gguf"), device=Wanted(products="f16"))
    open_generator(str(tmp_path / "model.gguf"), max_length=64).close()
    assert asked == ["auto"]


def test_refused_where_there_are_none(device: Device, tmp_path: Path) -> None:
    """Before the model is read: CPU devices have one body for products, in f32."""
    if not device.facts.is_cpu:
        pytest.skip("this device has products in f16")
    TINY_MODELS["qwen3"].write_gguf(tmp_path / "model.gguf")
    with pytest.raises(InputError, match="computes a prompt's products in f32 only"):
        open_generator(str(tmp_path / "model.gguf"), device=Wanted(products="f16"))
