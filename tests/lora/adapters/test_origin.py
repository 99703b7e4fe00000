"""Where an adapter comes from: its run's config, the folder of its start, the form of prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora.adapters.origin import PromptForm, origin_of
from lora.forward.gguf.file import GGUFFile
from lora.forward.text.tokenizer import Tokenizer
from lora.shaders.errors import InputError
from tests.support.tiny_gguf import write_tiny_llama

COMPLETIONS = [{"prompt": f"{n}? \n", "completion": "yes"} for n in range(3)]
CHAT = [{"messages": [{"role": "user", "content": "Hi"}]}]
INSTRUCTIONS = [{"instruction": "Add.", "output": "3"}]
TEXTS = [{"text": "Once upon a time.\n"}]


@pytest.fixture
def base(tmp_path: Path) -> GGUFFile:
    write_tiny_llama(tmp_path / "base.gguf", metadata={"tokenizer.chat_template": None})
    return GGUFFile(tmp_path / "base.gguf")


def write_origin(folder: Path, rows: list[dict[str, Any]] | None, **data: Any) -> Path:
    """A run that was started in `folder`; returns its directory."""
    if rows is not None:
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = folder / "runs" / "a"
    run.mkdir(parents=True)
    config = {
        "model": {"path": "base.gguf"},
        "data": {"train": ["train.jsonl", "more.jsonl"], **data},
        "output": "runs/a",
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def test_the_template_of_a_run(tmp_path: Path, base: GGUFFile) -> None:
    """It lies beside the adapter; what the config called it may be gone."""
    run = write_origin(tmp_path, INSTRUCTIONS, chat_template="gone.jinja")
    tokenizer = Tokenizer.from_gguf(base)
    origin = origin_of(run / "checkpoints" / "step-000001")
    assert origin is not None
    assert origin.prompt_form(base) is None  # instructions went through the template
    with pytest.raises(InputError, match="chat_template.jinja: there is no such file"):
        origin.chat_template(tokenizer)
    (run / "chat_template.jinja").write_text("{{ x }}")
    template = origin.chat_template(tokenizer)
    assert template is not None and template.source == "{{ x }}"


@pytest.mark.parametrize(
    ("rows", "data_format", "wanted"),
    [
        (COMPLETIONS, "completion", PromptForm("completion", " \n")),
        (COMPLETIONS, "auto", PromptForm("completion", " \n")),
        ([*COMPLETIONS, {"prompt": "x\n", "completion": "y"}], "auto",
         PromptForm("completion", "\n")),
        ([*COMPLETIONS, {"prompt": "x", "completion": "y"}], "auto", PromptForm("completion", "")),
        (None, "completion", PromptForm("completion", "")),
        (None, "auto", None),
        ([{"neither": 1}], "auto", None),
        (CHAT, "auto", None),
        (None, "chat", None),
        (INSTRUCTIONS, "auto", PromptForm("instruct", "\n\n")),
        (TEXTS, "auto", PromptForm("text", "")),
        (None, "text", PromptForm("text", "")),
    ],
)  # fmt: skip
def test_prompt_forms(
    tmp_path: Path,
    base: GGUFFile,
    rows: list[dict[str, Any]] | None,
    data_format: str,
    wanted: PromptForm | None,
) -> None:
    origin = origin_of(write_origin(tmp_path, rows, format=data_format))
    assert origin is not None
    assert origin.prompt_form(base) == wanted


def test_instructions_go_through_a_chat_template(tmp_path: Path, base: GGUFFile) -> None:
    """The model's own; where the run had another tokenizer, and it is gone, nobody knows."""
    run = write_origin(tmp_path, INSTRUCTIONS)
    write_tiny_llama(tmp_path / "with.gguf")
    origin = origin_of(run)
    assert origin is not None
    assert origin.prompt_form(GGUFFile(tmp_path / "with.gguf")) is None
    assert origin.prompt_form(base) is not None
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["tokenizer"] = "gone"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    origin = origin_of(run)
    assert origin is not None and origin.prompt_form(base) is None


def test_relative_paths_lead_from_the_start(tmp_path: Path, base: GGUFFile) -> None:
    run = write_origin(tmp_path, TEXTS)
    (run / "checkpoints" / "step-000010").mkdir(parents=True)
    for directory in (run, run / "checkpoints" / "step-000010"):
        origin = origin_of(directory)
        assert origin is not None
        assert origin.find("base.gguf") == base.path
        assert origin.find("gone.gguf") is None
    run.rename(tmp_path / "moved")
    moved = origin_of(tmp_path / "moved")
    assert moved is not None and moved.find("base.gguf") is None


@pytest.mark.parametrize("config", [None, "data: {format: completion}\n", "- axolotl\n"])
def test_no_config_of_ours(tmp_path: Path, config: str | None) -> None:
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    assert origin_of(tmp_path) is None
