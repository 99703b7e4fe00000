"""The model card of an adapter, and pushing it to a stand-in for the Hub."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import huggingface_hub
import pytest

from lora import TrainingSession, run_training
from lora.config.schema import load_config
from lora.forward.gguf.file import GGUFFile
from lora.shaders.device import Device
from lora.training.card import base_repository, model_card, write_card
from tests.support.command_server import run_lora
from tests.support.stand_in_hub import StandInHub
from tests.support.stand_in_hub import hub as hub  # a fixture
from tests.support.tiny_run import write_run


class Named(GGUFFile):
    """A model's file with more metadata."""

    def __init__(self, path: Path, **metadata: str) -> None:
        super().__init__(path)
        self.metadata = {**self.metadata, **{k.replace("_", "."): v for k, v in metadata.items()}}


def test_every_output_has_a_card(tmp_path: Path, device: Device) -> None:
    path = write_run(tmp_path, train={"steps": 3, "eval_every": 2})
    output = run_training(TrainingSession.from_config(path, device=device))
    card = huggingface_hub.ModelCard.load(output / "README.md")
    assert card.data.library_name == "peft" and card.data.tags == ["lora", "webgpu-lora"]
    assert card.data.pipeline_tag == "text-generation" and card.data.base_model is None
    assert "| `eval_loss` |" in card.text and "trained tokens" in card.text
    assert str(tmp_path) not in card.content  # whoever it is pushed to needs no paths of here
    assert (output / "best" / "README.md").exists()


def test_what_the_card_knows(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    config = load_config(str(path), ["data.train={name: org/rows}", "data.eval=null"])
    model = Named(
        tmp_path / "model.gguf",
        general_license="apache-2.0",
        general_source_url="https://huggingface.co/org/base-Instruct",
    )
    card = huggingface_hub.ModelCard(model_card(config, model))
    assert card.data.base_model == "org/base-Instruct" and card.data.license == "apache-2.0"
    assert card.data.datasets == ["org/rows"]
    assert card.data.tags == ["base_model:adapter:org/base-Instruct", "lora", "webgpu-lora"]
    assert 'from_pretrained("org/base-Instruct")' in card.text
    assert "\nlora generate model.gguf --adapter run --prompt" in card.text
    assert "\nlora chat model.gguf --adapter run\n" in model_card(config, model, chats=True)
    strange = Named(
        tmp_path / "model.gguf", general_license="a\nb: c", general_source_url="https://x.org/a/b"
    )
    assert huggingface_hub.ModelCard(model_card(config, strange)).data.license is None
    assert base_repository(config, strange) is None
    named = load_config(str(path), ["model.path=hf:org/base-GGUF:Q8_0"])
    assert base_repository(named, strange) == "org/base-GGUF"


def test_a_card_of_someone_else_stays(tmp_path: Path) -> None:
    config = load_config(str(write_run(tmp_path)))
    model = GGUFFile(tmp_path / "model.gguf")
    (tmp_path / "README.md").write_text("# My project\n")
    write_card(tmp_path, config, model)
    assert (tmp_path / "README.md").read_text() == "# My project\n"
    write_card(tmp_path / "new", config, model)
    first = (tmp_path / "new" / "README.md").read_text()
    write_card(tmp_path / "new", config.model_copy(update={"hub": "a/b"}), model)
    assert first == (tmp_path / "new" / "README.md").read_text() or "a/b" in first


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may be, by the environment."""
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)


def train(
    path: Path, hub: StandInHub, *more: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return run_lora("train", path, *more, **hub.environment(**environment))


def test_the_adapter_is_pushed(tmp_path: Path, hub: StandInHub) -> None:
    """A refusal loses nothing, and the same command with --resume pushes it."""
    path = write_run(tmp_path, train={"steps": 2})
    setting = ["--set", "hub=org/mine", "--set", "data.eval=null"]
    nobody = train(path, hub, *setting)
    assert nobody.returncode == 2 and "nobody is logged in" in nobody.stderr
    assert not (tmp_path / "run").exists()
    hub.refuses = True
    refused = train(path, hub, *setting, HF_TOKEN="hf_x")
    assert refused.returncode == 1, refused.stdout + refused.stderr
    assert "The adapter is saved, but could not be pushed to org/mine" in refused.stderr
    output = tmp_path / "run"
    assert (output / "adapter_model.safetensors").exists() and hub.pushed == {}
    hub.refuses = False
    pushed = train(path, hub, *setting, "--resume", HF_TOKEN="hf_x")
    assert pushed.returncode == 0, pushed.stderr
    assert set(hub.pushed) == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    weights = hub.pushed["adapter_model.safetensors"]
    assert weights == (output / "adapter_model.safetensors").read_bytes()
    assert json.loads(hub.pushed["adapter_config.json"])["peft_type"] == "LORA"
    assert f"{hub.url}/org/mine" in pushed.stderr


@pytest.mark.parametrize("setting", ["HF_HUB_OFFLINE"])
def test_a_push_that_can_only_fail(tmp_path: Path, hub: StandInHub, setting: str) -> None:
    path = write_run(tmp_path)
    done = train(path, hub, "--set", "hub=org/mine", HF_TOKEN="hf_x", **{setting: "1"})
    assert done.returncode == 2 and "HF_HUB_OFFLINE forbids pushing" in done.stderr
