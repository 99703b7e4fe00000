"""The copy in f16 of the stream's gradient is the rows' own wherever a kernel reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora.shaders.program import Dispatch
from tests.support.places import Places, written
from tests.support.renderings import LARGE_GPU, MATRIX_GPU
from tests.support.tiny_models import TINY_MODELS
from tests.support.tiny_sessions import micro_batch

F16 = {"precision": "f16", "recompute": "off"}
ALL = {"layers": "all", "targets": "all-linear"}


@pytest.fixture(autouse=True)
def _places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora.training.device_state.CountingMemory", Places)


def readers(dispatches: Sequence[Dispatch]) -> tuple[list[str], list[str]]:
    """Who reads the copy; and who reads sized rows of f32 in its place.

    Whenever a kernel reads the copy or the sizes, rows and both were written together.
    """
    copied = [d for d in dispatches if d.constants.get("copied")]
    if not copied:
        return [], []
    stream = copied[0].tensors[4]
    sizes, halves = (
        next(t for t in copied[0].tensors if t.dtype == dtype and t.shape == shape)
        for dtype, shape in (("u32", stream.shape[:1]), ("f16", stream.shape))
    )
    for one in copied:
        assert {id(t.buffer) for t in (stream, sizes, halves)} <= {
            id(one.tensors[n].buffer) for n in written(one)
        }
    last: dict[int, Dispatch] = {}
    of_copy, of_rows = [], []
    for dispatch in dispatches:
        mine = written(dispatch)
        read = {id(t.buffer) for n, t in enumerate(dispatch.tensors) if n not in mine}
        kind = dispatch.label.rpartition(".")[2]
        for part in (sizes, halves):
            if id(part.buffer) in read:
                writer = last[id(part.buffer)]
                assert writer is last[id(stream.buffer)] and writer in copied
        if id(halves.buffer) in read:
            of_copy.append(kind)
        elif id(sizes.buffer) in read:
            of_rows.append(kind)
        for binding in mine:
            last[id(dispatch.tensors[binding].buffer)] = dispatch
    return of_copy, of_rows


@pytest.mark.parametrize("name", TINY_MODELS)
def test_who_reads_it(name: str, tmp_path: Path) -> None:
    """Products that give to the stream, and what is of their factors: of every family."""
    model = TINY_MODELS[name]
    model.write_gguf(tmp_path / "model.gguf")
    own = {"layers": model.layers or "all", "targets": model.targets}
    for recompute, adapter in (("on", own), ("off", ALL)):
        found = micro_batch(
            tmp_path / "model.gguf", MATRIX_GPU, adapter, precision="f16", recompute=recompute
        )
        of_copy, of_rows = readers(found)
        assert of_rows == []
        norms = [d for d in found if d.template == "rmsnorm_backward" and d.constants["sized"]]
        assert all(norm.constants["copied"] for norm in norms)
        products = [k for k in of_copy if not k.startswith("lora_")]
        assert len(products) >= len(norms) - 1 and (not norms or len(of_copy) > len(products))


@pytest.mark.parametrize(
    "adapter",
    [
        {"targets": ["q_proj", "down_proj"]},
        {"targets": ["gate_proj"]},
        {"targets": "all-linear", "layers": [1]},
        {"targets": "all-linear", "dropout": 0.1},
        {"targets": "all-linear", "variant": "dora"},
    ],
    ids=str,
)
def test_who_reads_it_where_not_all_is_adapted(adapter: dict[str, Any], tmp_path: Path) -> None:
    """Also where the gradients of A and B wait for nobody."""
    TINY_MODELS["llama"].write_gguf(tmp_path / "model.gguf")
    for kind in (MATRIX_GPU, replace(MATRIX_GPU, most_storage_buffers=8)):
        found = micro_batch(tmp_path / "model.gguf", kind, adapter, **F16)
        of_copy, of_rows = readers(found)
        assert of_copy or kind.most_storage_buffers == 8
        assert of_rows == []


def test_who_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices without matrix units, f32, models of post norms; and where it is left out."""
    for name in ("llama", "gemma3"):
        TINY_MODELS[name].write_gguf(tmp_path / f"{name}.gguf")
    llama, gemma = (tmp_path / f"{name}.gguf" for name in ("llama", "gemma3"))
    cases = [
        (llama, LARGE_GPU, F16),
        (llama, MATRIX_GPU, {**F16, "precision": "f32"}),
        (gemma, MATRIX_GPU, F16),
    ]
    for path, kind, train in cases:
        found = micro_batch(path, kind, ALL, **train)
        assert not any(d.constants.get("copied") for d in found)
        assert not any(
            d.tensors[1].dtype == "f16" and d.constants.get("x_scaled")
            for d in found
            if not d.label.endswith("head")
        )
    with_it = micro_batch(llama, MATRIX_GPU, ALL, **F16)
    monkeypatch.setattr("lora.backward.scratch.takes_copies", lambda _: False)
    without = micro_batch(llama, MATRIX_GPU, ALL, **F16)
    assert [d.label for d in without] == [d.label for d in with_it]
    assert any(d.constants.get("copied") for d in with_it)
    assert not any(d.constants.get("copied") for d in without)


@pytest.mark.parametrize(
    ("name", "adapter", "precision", "scaled"),
    [
        ("llama", ALL, "f16", True),
        ("gemma3", ALL, "f16", True),
        ("llama_head", {"targets": ["q_proj", "lm_head"]}, "f16", False),
        ("gemma2", {"trainable_tokens": [5, 9]}, "f16", False),
        ("llama", ALL, "f32", False),
    ],
)
def test_what_the_head_is_given(
    name: str, adapter: dict[str, Any], precision: str, scaled: bool, tmp_path: Path
) -> None:
    """f16, of rows that the norm scales, where a product alone reads it: nothing is sized apart."""
    TINY_MODELS[name].write_gguf(tmp_path / "model.gguf")
    train = {"precision": precision, "recompute": "off"}
    for kind in (MATRIX_GPU, LARGE_GPU):
        found = micro_batch(tmp_path / "model.gguf", kind, adapter, **train)
        heads = [d for d in found if d.label.endswith("head") and d.template.startswith("matmul")]
        norms = [d for d in found if d.template == "rmsnorm" and d.constants["sized"]]
        here = scaled and kind is MATRIX_GPU
        assert heads and len(norms) == here
        for head in heads:
            x = head.tensors[1]
            assert (x.dtype == "f16") == here
            if here:
                assert head.constants["x_scaled"] and x.buffer is norms[0].tensors[3].buffer
                assert any(t.buffer is norms[0].tensors[4].buffer for t in head.tensors)
        if here:
            assert not any(d.template == "largest_of_rows" for d in found)
