"""`lora init`: a config that loads as it was asked for, or one sentence about why not."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lora.commands.cli import app
from lora.commands.init import config_text
from lora.config.schema import Config, load_config
from lora.shaders.errors import InputError


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current directory, with a model and rows of the format completion."""
    monkeypatch.chdir(tmp_path)
    Path("model.gguf").write_bytes(b"GGUF")
    Path("my data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["init", *arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


def test_the_config_holds_every_key_with_its_default() -> None:
    written = run("--model", "model.gguf", "--data", "my data.jsonl", "--output", "my run.yaml")
    config = load_config("my run.yaml")
    assert config == Config.model_validate(
        {
            "model": {"path": "model.gguf"},
            "data": {"train": "my data.jsonl"},
            "output": "runs/my run",
        }
    )
    for section in (config, config.model, config.adapter, config.data, config.train):
        assert section.model_fields_set == set(type(section).model_fields)
    text = Path("my run.yaml").read_text()
    assert "(*)" not in text and "smollm2" not in text.lower()
    first, *commands = written.splitlines()
    assert first == "Wrote my run.yaml for 3 rows of the format completion. Next:"
    assert [shlex.split(command) for command in commands] == [
        ["lora", "data", "my run.yaml"],
        ["lora", "plan", "my run.yaml"],
        ["lora", "train", "my run.yaml"],
    ]


@pytest.mark.parametrize(
    "name",
    ["a: b.gguf", "a #b", "null", "1e3", "~", "é 'x' \"y\"", "@x", "a\nb", "- a", "*a", " a"],
)
def test_names_that_yaml_would_read_as_something_else(name: str) -> None:
    Path("config.yaml").write_text(config_text(name, name, name), encoding="utf-8")
    config = load_config("config.yaml")
    whole = str(Path(name).expanduser())  # ~ is a name, and not null; the config knows whose
    assert (config.model.path, config.data.train, config.output) == (whole, whole, whole)


def test_models_and_data_from_elsewhere_are_not_fetched() -> None:
    model = "hf:nobody/nothing/model.gguf"
    written = run("--model", model, "--data", "nobody/nothing")
    assert written.startswith("Wrote lora.yaml for the Hugging Face data set nobody/nothing. Next:")
    config = load_config("lora.yaml")
    assert (config.model.path, config.data.train) == (model, "nobody/nothing")


def test_a_file_that_is_there_stays() -> None:
    arguments = "--model", "model.gguf", "--data", "my data.jsonl"
    Path("lora.yaml").write_text("mine")
    with pytest.raises(InputError, match="lora.yaml is there already; --force replaces it"):
        run(*arguments)
    assert Path("lora.yaml").read_text() == "mine"
    run(*arguments, "--force")
    assert load_config("lora.yaml").model.path == "model.gguf"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "init needs the base model and the examples, such as: lora init --model"),
        (["--model", "model.gguf"], "init needs the base model and the examples"),
        (["--model", "nowhere.gguf", "--data", "my data.jsonl"], "nowhere.gguf: there is no such"),
        (["--model", "org/base", "--data", "my data.jsonl"], "holds a GGUF is hf:org/base or hf:"),
        (["--model", "my data.jsonl", "--data", "my data.jsonl"], "my data.jsonl is no GGUF file"),
        (["--model", "hf:nobody", "--data", "my data.jsonl"], "hf:ORG/REPO"),
        (["--model", "model.gguf", "--data", "nowhere.jsonl"], "nowhere.jsonl: there is no such"),
        (["--model", "model.gguf", "--data", "model.gguf"], "model.gguf"),
        (["--model", "model.gguf", "--data", "my data.jsonl", "--output", "."], "is a directory"),
        (["--model", "hf:a/b/\udce9.gguf", "--data", "my data.jsonl"], "is not UTF-8"),
    ],
)
def test_wrong_input_is_one_sentence(arguments: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words) as raised:
        run(*arguments)
    assert len(str(raised.value).splitlines()) == 1
    assert not Path("lora.yaml").exists()
