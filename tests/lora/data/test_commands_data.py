"""The quickstart's data: it is what its script writes, short, and held out in earnest."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from lora.config.schema import load_config
from lora.data.loading import load_examples
from lora.forward.gguf.file import GGUFFile
from lora.forward.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[3]
COMMANDS = ROOT / "configs" / "commands"


def rows_of(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (COMMANDS / name).read_text("utf-8").splitlines()]


def test_the_script_writes_the_committed_bytes(tmp_path: Path) -> None:
    specification = importlib.util.spec_from_file_location("make_commands", COMMANDS / "make.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    # dataclasses look their module up by name.
    sys.modules[specification.name] = module
    try:
        specification.loader.exec_module(module)
        module.make(tmp_path)
    finally:
        del sys.modules[specification.name]
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (COMMANDS / name).read_bytes()


def test_no_held_out_request_or_call_occurs_in_training() -> None:
    train, heldout = rows_of("train.jsonl"), rows_of("heldout.jsonl")
    assert (len(train), len(heldout)) == (402, 60)
    for column in ("prompt", "completion"):
        seen = {row[column] for row in train}
        assert not seen & {row[column] for row in heldout}
        assert len({row[column] for row in heldout}) == 60


def test_every_completion_is_compact_json_and_every_kind_is_held_out() -> None:
    for name in ("train.jsonl", "heldout.jsonl"):
        kinds = set()
        for row in rows_of(name):
            call = json.loads(row["completion"])
            assert json.dumps(call, separators=(",", ":")) == row["completion"]
            assert row["prompt"].endswith("\n")
            kinds.add(call["do"])
        assert kinds == {"alarm", "timer", "light", "heat", "meet", "buy"}


@pytest.mark.parametrize("name", ["quickstart.yaml", "smollm2-chat.yaml"])
def test_the_configs_are_valid(name: str) -> None:
    load_config(str(ROOT / "configs" / name))


def test_the_full_example_shows_every_key_with_its_default(tmp_path: Path) -> None:
    full = load_config(str(ROOT / "configs" / "smollm2-chat.yaml"))
    least = tmp_path / "least.yaml"
    least.write_text(
        f"model: {{path: {full.model.path}}}\ndata: {{train: {full.data.train}}}\n"
        f"output: {full.output}\n"
    )
    assert full == load_config(str(least))
    for section in (full, full.model, full.adapter, full.data, full.train):
        assert section.model_fields_set == set(type(section).model_fields)


def test_rows_are_short_and_fit_the_quickstart(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config("configs/quickstart.yaml")
    tokenizer = Tokenizer.from_gguf(GGUFFile(smollm2))
    for split, n_rows in (("train", 402), ("eval", 60)):
        examples, summary = load_examples(config.data, tokenizer, split)  # type: ignore[arg-type]
        assert summary.n_examples == n_rows and summary.n_cut == 0
        assert summary.longest <= 40 <= config.data.max_length
        for example in examples:
            assert example.ids[-1] == tokenizer.eos_id and example.trained[-1]
            trained = tokenizer.decode(example.ids[example.trained].tolist())
            assert json.loads(trained)["do"]
