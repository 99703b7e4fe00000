"""Rows of the embedding in PEFT's files: written, read in any order, refused where they differ."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console

from lora.adapters.files import load_adapter, open_adapter
from lora.adapters.peft_files import save_peft_adapter
from lora.commands.inspect import adapter_facts, describe_adapter
from lora.commands.plan import plan_facts, print_plan
from lora.config.schema import load_config
from lora.shaders.errors import InputError
from lora.training.card import model_card
from lora.training.device_state import SessionPlan
from lora.training.workload import Workload
from tests.support.renderings import CPU
from tests.support.tiny_run import write_run

NAME = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Workload, Path]:
    """A session's beginning, and the adapter of it."""
    adapter = {"targets": ["q_proj"], "layers": [1], "trainable_tokens": [9, 300, 4]}
    config = load_config(str(write_run(tmp_path, adapter=adapter)))
    workload = Workload.open(config, train=True)
    save_peft_adapter(tmp_path / "saved", workload.layout, workload.initial, config)
    return workload, tmp_path / "saved"


def change(folder: Path, rows: np.ndarray | None = None, **settings: Any) -> None:
    """Other settings, and other rows."""
    path = folder / SETTINGS
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    if rows is not None:
        tensors = safetensors.numpy.load_file(folder / WEIGHTS)
        safetensors.numpy.save_file({**tensors, NAME: rows}, folder / WEIGHTS)


def test_as_peft_names_them(saved: tuple[Workload, Path]) -> None:
    workload, folder = saved
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    rows = workload.layout.trained_tokens(workload.initial)
    assert rows.any() and rows.shape == (3, 32)
    np.testing.assert_array_equal(tensors[NAME], rows)
    assert json.loads((folder / SETTINGS).read_text())["trainable_token_indices"] == [9, 300, 4]


def test_they_come_back_in_any_order(saved: tuple[Workload, Path]) -> None:
    workload, folder = saved
    layout = workload.layout
    assert load_adapter(folder, layout).tobytes() == workload.initial.tobytes()
    found = open_adapter(folder, layout.architecture)
    assert found.tokens == (9, 300, 4)
    assert found.layout(layout.architecture).tokens == (9, 300, 4)
    assert found.settings(layout.architecture).trainable_tokens == [9, 300, 4]
    rows = safetensors.numpy.load_file(folder / WEIGHTS)[NAME]
    # Named by the module, as PEFT allows, and in another order.
    change(folder, rows[[2, 0, 1]], trainable_token_indices={"model.embed_tokens": [4, 9, 300]})
    assert load_adapter(folder, layout).tobytes() == workload.initial.tobytes()


def test_inspect_counts_them(saved: tuple[Workload, Path]) -> None:
    workload, folder = saved
    facts = adapter_facts(folder)
    assert facts["trainable_tokens"] == [9, 300, 4]
    assert facts["parameters"] == workload.layout.n_trainable
    assert describe_adapter(folder)


def test_plan_and_card_name_them(saved: tuple[Workload, Path]) -> None:
    workload, _ = saved
    plan, out = SessionPlan.of(CPU.facts, workload), StringIO()
    assert plan_facts(plan, None)["adapter"]["trainable_tokens"] == [9, 300, 4]
    print_plan(Console(file=out, width=400), plan)
    assert "and 3 rows of the embedding (token 9, 300, 4)" in out.getvalue()
    card = model_card(workload.config, workload.gguf_file)
    assert "--to merged-gguf" in card


@pytest.mark.parametrize(
    ("settings", "rows", "words"),
    [
        ({"trainable_token_indices": [9, 300]}, None, "names 2 tokens .* are \\(3, 32\\)"),
        ({"trainable_token_indices": None}, None, "names 0 tokens"),
        ({"trainable_token_indices": [9, 300, 9]}, None, "a list of token ids, each once"),
        ({"trainable_token_indices": [9, 300, -4]}, None, "a list of token ids, each once"),
        ({"trainable_token_indices": {"lm_head": [9, 300, 4]}}, None, "names 'lm_head'"),
        ({"trainable_token_indices": [9, 300, 5]}, None, "no row of the token 4"),
        ({}, np.zeros((3, 36), np.float32), "have 36 columns"),
        ({"trainable_token_indices": [9, 321, 4]}, None, "row of the token 321, but the model's"),
    ],
)
def test_what_does_not_fit_is_refused(
    saved: tuple[Workload, Path], settings: dict[str, Any], rows: np.ndarray | None, words: str
) -> None:
    workload, folder = saved
    change(folder, rows, **settings)
    with pytest.raises(InputError, match=words):
        open_adapter(folder, workload.architecture).layout(workload.architecture)
        load_adapter(folder, workload.layout)


def test_a_run_begins_with_the_same_tokens(saved: tuple[Workload, Path]) -> None:
    folder = saved[1]

    def begun(tokens: list[int]) -> np.ndarray:
        overrides = [f"adapter.init_from={folder}", f"adapter.trainable_tokens={tokens}"]
        config = load_config(str(folder.parent / "config.yaml"), overrides)
        return Workload.open(config, train=False).initial

    assert begun([9, 300, 4]).tobytes() == saved[0].initial.tobytes()
    with pytest.raises(InputError, match="has a row of the token 300, which .* lacks"):
        begun([9, 4])
    with pytest.raises(InputError, match="has no row of the token 5, which .* names"):
        begun([9, 300, 4, 5])
