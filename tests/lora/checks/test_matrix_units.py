"""Matrix units that compute something else are left alone, with one line; asked once."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora.checks.matrix_units import answer, ask_child, kind_of, trust_matrix_units
from lora.checks.suite import ALL_CHECKS, Result
from lora.config.schema import Config
from lora.data.examples import Example
from lora.forward.attention_matrix import choose_cut
from lora.forward.delta_matrix import CHUNK, delta_cut
from lora.forward.lora_matrix import projection_cut
from lora.forward.matmul_matrix import takes_units
from lora.forward.plans.matmul_plans import ProductShape
from lora.forward.plans.matmul_tiles import PAIRED_TILES, PREPARED_TILES, PairedTile, Plan
from lora.shaders import templates
from lora.shaders.device import Device
from lora.shaders.memory import CountingMemory
from lora.shaders.recording import Recording
from lora.shaders.webgpu import MatrixShape
from lora.storage.tile_cache import entry_of, plan_of_entry
from lora.training.session import TrainingSession
from tests.support.tiny_gguf import write_tiny_llama

SHAPE = MatrixShape(16, 16, 16, "f16", "f32", 32, 32)


@pytest.fixture
def card(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """The software driver under the name of a GPU with matrix units, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    facts = replace(device.facts, name="Card", is_cpu=False, matrix_shapes=(SHAPE,))
    monkeypatch.setattr(device, "facts", facts)
    yield device


def test_right_ones_stay_and_are_asked_once(card: Device) -> None:
    asked: list[str | int] = []

    def ask(_: Device, wanted: str | int) -> dict[str, str]:
        asked.append(wanted)
        return {}

    for _ in range(2):
        trust_matrix_units(card, "auto", ask)
    assert card.facts.matrix_shapes == (SHAPE,) and asked == ["auto"]


def test_wrong_ones_are_left_alone(card: Device, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trust_matrix_units(card, 0, lambda *_: {"products": "an error of 2, above 0.1"})
    assert card.facts.matrix_shapes == ()
    (line,) = caplog.messages
    assert "Card are left alone: an error of 2, above 0.1" in line and "\n" not in line


@pytest.mark.parametrize("kind", ["attention", "low rank", "gated delta rule", "pairs"])
def test_of_kernels_that_are_wrong_the_others_stay(
    card: Device, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """A rule that few models have does not cost all of them their speed."""
    facts = replace(
        card.facts, workgroup_memory=49152, most_lanes=1024, matrix_shapes=(SHAPE,),
        info={**card.facts.info, "adapter_type": "DiscreteGPU"},
        features=card.facts.features | {"shader-f16"},
    )  # fmt: skip
    card.facts = facts

    def taken() -> set[str]:
        half, whole = (Recording(card.facts, CountingMemory(facts), p) for p in ("f16", "f32"))
        found = {
            "products": takes_units(half),
            "attention": choose_cut("attention", half, 512, 8, 64) is not None,
            "low rank": projection_cut(half, 512, 16, 1, transposed=False) is not None,
            "gated delta rule": delta_cut(half, CHUNK, 64) is not None,
            "pairs": whole.paired_products,
        }
        return {name for name, is_so in found.items() if is_so}

    before = taken()
    assert len(before) == 5
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # the second time it is remembered
            card.facts = facts
            trust_matrix_units(card, 0, lambda *_: {kind: "an error of 2, above 0.1"})
            assert taken() == before - {kind}
    assert f"left alone ({kind}: an error of 2, above 0.1)" in caplog.messages[0]


@pytest.mark.parametrize("tile", [PAIRED_TILES[0], PREPARED_TILES[0]], ids=lambda tile: tile.name)
def test_a_tuned_plan_of_pairs_is_not_taken_where_they_are_wrong(
    card: Device, tile: PairedTile
) -> None:
    facts = replace(card.facts, workgroup_memory=49152)
    plan = Plan(tile, 1, 4 * tile.depth)
    sizes = 64, 64, plan.length
    product = ProductShape(*sizes, "q8_0", False, 0, 0, False, "write", "f32", "f32", False, False)
    assert plan_of_entry(facts, product, entry_of(plan)) == plan
    wrong = replace(facts, distrusted=frozenset({"pairs"}))
    assert plan_of_entry(wrong, product, entry_of(plan)) is None


def test_what_each_check_is_of() -> None:
    kinds = {(c.kernel, kind_of(c)) for c in ALL_CHECKS if "_matrix" in c.kernel}
    assert {("matmul_matrix", "products"), ("matmul_matrix", "pairs")} <= kinds
    of_pairs = {c.case for c in ALL_CHECKS if "_matrix" in c.kernel and kind_of(c) == "pairs"}
    for tile in (*PAIRED_TILES, *PREPARED_TILES):
        assert any(case.startswith(tile.name) for case in of_pairs)
    assert {kind for kernel, kind in kinds if kernel.startswith("attention")} == {"attention"}
    assert {kind for kernel, kind in kinds if kernel.startswith("lora")} == {"low rank"}
    assert {k for kernel, k in kinds if kernel.startswith("gated")} == {"gated delta rule"}


def test_the_child_tells_of_each_kind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = [c for c in ALL_CHECKS if c.kernel in ("lora_matrix", "gated_delta_matrix")]
    results = [Result(c, None, f"wrong in {c.case}", False, 0.0, ()) for c in failing]
    monkeypatch.setattr("lora.checks.suite.run_checks", lambda *_: results)
    assert answer({"device": "auto", "webgpu": "auto"}) != 0
    said = json.loads(capsys.readouterr().out)
    assert set(said) == {"low rank", "gated delta rule"}
    assert all("wrong in" in why for why in said.values())


def test_remembered_for_a_driver(card: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    trust_matrix_units(card, 0, lambda *_: {"products": "wrong"})
    info = {**card.facts.info, "description": "another driver"}
    facts = replace(card.facts, info=info, matrix_shapes=(SHAPE,))
    monkeypatch.setattr(card, "facts", facts)
    trust_matrix_units(card, 0, lambda *_: {})
    assert card.facts.matrix_shapes == (SHAPE,)


def test_other_kernels_are_asked_again(
    card: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of attention, say, on which no tile of products depends."""
    trust_matrix_units(card, 0, lambda *_: {"products": "wrong"})
    monkeypatch.setattr(card, "facts", replace(card.facts, matrix_shapes=(SHAPE,)))
    kernels = tmp_path / "shaders" / "wgsl"
    shutil.copytree(Path(templates.__file__).parent / "wgsl", kernels)
    with open(kernels / "attention_matrix.wgsl", "a") as file:
        file.write("// changed\n")
    monkeypatch.setattr(templates, "__file__", str(kernels.parent / "templates.py"))
    trust_matrix_units(card, 0, lambda *_: {})
    assert card.facts.matrix_shapes == (SHAPE,)


def test_every_kernel_on_units_is_asked_about() -> None:
    """The child takes the checks by their kernels' names."""
    names = {check.kernel for check in ALL_CHECKS if "_matrix" in check.kernel}
    for kernels in ("matmul", "attention", "lora", "lora_backward", "gated_delta"):
        assert any(name.startswith(f"{kernels}_matrix") for name in names), kernels


def test_a_damaged_answer_is_asked_again(card: Device, tmp_path: Path) -> None:
    trust_matrix_units(card, 0, lambda *_: {})
    (path,) = (tmp_path / "webgpu-lora").glob("matrix-units-*.json")
    path.write_text("{")
    trust_matrix_units(card, 0, lambda *_: {"products": "wrong now"})
    assert card.facts.matrix_shapes == ()


def test_devices_without_them_are_not_asked(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: object) -> dict[str, str]:
        raise AssertionError("asked")

    monkeypatch.setattr(device, "facts", replace(device.facts, matrix_shapes=()))
    trust_matrix_units(device, 0, ask)


@pytest.mark.parametrize("precision", ["f32", "f16"])
def test_every_training_asks(
    card: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Products take them in either precision."""

    class Asked(Exception):
        pass

    def ask(device: Device, wanted: str | int) -> None:
        assert device is card
        raise Asked

    monkeypatch.setattr("lora.training.open_session.trust_matrix_units", ask)
    write_tiny_llama(tmp_path / "model.gguf")
    config = Config.model_validate(
        {"model": {"path": str(tmp_path / "model.gguf")}, "data": {"train": "none"},
         "train": {"steps": 1, "precision": precision}, "output": "none"}
    )  # fmt: skip
    examples = [Example(np.arange(3, 9, dtype=np.int32), np.arange(6) > 0, 0)]
    with pytest.raises(Asked):
        TrainingSession(config, examples=examples, device=card)


def test_a_child_that_fails_is_a_reason(device: Device) -> None:
    """No such device: whatever ends a child, the plain kernels go on."""
    assert "ended badly" in ask_child(device, "no such card")["products"]


def test_a_child_without_matrix_units_finds_nothing_wrong(device: Device) -> None:
    """It skips what the device can't do, and ends well."""
    assert ask_child(device, "auto") == {}
