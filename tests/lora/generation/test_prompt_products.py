"""A prompt's products in f16: which programs take them, and where they are refused."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora.forward.gguf.file import GGUFFile
from lora.forward.model.architecture import Architecture
from lora.forward.model.frozen_model import load_model
from lora.generation.engine import DecodeEngine
from lora.generation.opening import open_generator
from lora.shaders.choice import Wanted
from lora.shaders.device import Device
from lora.shaders.errors import InputError
from lora.shaders.memory import CountingMemory
from lora.shaders.recording import Recording
from tests.support.half_tensors import needs_halves
from tests.support.renderings import LARGE_GPU, MATRIX_GPU, Kind
from tests.support.tiny_models import TINY_MODELS

ROOM = 5000


def engine_on(kind: Kind, folder: Path, products: str | None) -> DecodeEngine:
    """That of a tiny model on a described device."""
    TINY_MODELS["qwen3"].write_gguf(folder / "model.gguf")
    gguf_file = GGUFFile(folder / "model.gguf")
    recording = Recording(kind.facts, CountingMemory(kind.facts), products=products)
    architecture = Architecture.from_gguf(gguf_file)
    return DecodeEngine(recording, load_model(recording, gguf_file, architecture, ROOM), {})


def templates_of(engine: DecodeEngine, one_row: bool) -> set[str]:
    """Kernels of a prompt's piece, or of one row."""
    inputs = engine._tensors.step if one_row else engine._tensors.pieces
    return {d.template for program in engine._programs_of(None, inputs) for d in program.dispatches}


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


def test_refused_where_there_are_none(device: Device, tmp_path: Path) -> None:
    """Before the model is read: CPU devices have one body for products, in f32."""
    if not device.facts.is_cpu:
        pytest.skip("this device has products in f16")
    TINY_MODELS["qwen3"].write_gguf(tmp_path / "model.gguf")
    with pytest.raises(InputError, match="computes a prompt's products in f32 only"):
        open_generator(str(tmp_path / "model.gguf"), device=Wanted(products="f16"))
