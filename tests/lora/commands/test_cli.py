"""The command line: exit statuses, one clear line for wrong input, nothing half-written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from lora import __version__
from lora.commands.cli import app, main
from lora.commands.options import key_of_option
from lora.shaders.choice import Wanted
from lora.shaders.errors import InputError
from tests.support.command_server import run_lora as lora
from tests.support.tiny_gguf import write_tiny_llama
from tests.support.tiny_run import write_run


def refused(result: subprocess.CompletedProcess, *words: str) -> None:
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) <= 2, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


@pytest.mark.parametrize("option", [("--top-k", 5), ("--top-p", 0.9), ("--seed", 3)])
@pytest.mark.parametrize(
    "command",
    [["generate", "absent.gguf", "--prompt", "a"], ["chat", "absent.gguf", "--temperature", "0"]],
    ids=["generate", "chat"],
)
def test_sampling_options_without_a_temperature(
    command: list[str], option: tuple[str, float]
) -> None:
    """They would do nothing; the model is not even looked for."""
    words = f"{option[0]} chooses between draws", "--temperature above 0"
    refused(lora(*command, *option), *words)
    # What a chat has by default may stand: only the model is missed.
    refused(lora(*command), "absent.gguf")


def test_the_order_of_sampling_is_told() -> None:
    for command in ("generate", "chat"):
        shown = " ".join(lora(command, "--help", COLUMNS="200").stdout.split())
        assert "penalty over the whole text, temperature, top-k, top-p, min-p, in this" in shown


def test_a_prompt_on_stdin(tmp_path: Path) -> None:
    """Without the newline at its end; UTF-8 whatever the locale says."""
    model = tmp_path / "model.gguf"
    write_tiny_llama(model)

    def generate(prompt: str | bytes, given: bytes = b"") -> subprocess.CompletedProcess:
        arguments = [sys.executable, "-m", "lora", "generate", model, "--max-tokens", "8"]
        return subprocess.run(
            [*arguments, "--prompt", prompt], input=given, capture_output=True,
            env=os.environ | {"PYTHONIOENCODING": "latin-1:replace"},
        )  # fmt: skip

    whole = generate("say é\nand").stdout
    assert whole and whole != generate("say é").stdout
    assert generate("-", "say é\r\nand\n".encode()).stdout == whole
    for wrong, words in (
        (generate("-", b"caf\xe9"), b"prompt on stdin is not UTF-8: its character 4 is the byte"),
        (generate(b"caf\xe9"), b"prompt (--prompt) is not UTF-8: its character 4 is the byte 0xE9"),
    ):
        assert wrong.returncode == 2 and words in wrong.stderr, wrong.stderr


@pytest.mark.parametrize(
    ("where", "arguments"),
    [
        ("lora.generation.opening.open_generator", ["generate", "model.gguf", "--prompt", "a"]),
        ("lora.config.schema.load_config", ["plan", "config.yaml"]),
    ],
)
def test_ctrl_c_says_so(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
    arguments: list[str],
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    monkeypatch.setattr(sys, "argv", ["lora", *arguments])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 130
    assert capsys.readouterr().err == "\nlora: interrupted\n"  # below what was written so far


@pytest.mark.parametrize("arguments", [["generate", "--prompt", "a"], ["chat"]], ids=lambda a: a[0])
@pytest.mark.parametrize("given", [[], ["--precision", "f16"]], ids=["f32", "f16"])
def test_precision_reaches_the_generator(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], given: list[str]
) -> None:
    """What it does there: tests/lora/generation/test_prompt_products.py."""
    asked = []

    def opened(*_: object, device: Wanted, **__: object) -> None:
        asked.append(device.products)
        raise InputError("enough")

    for module in ("generation.opening", "commands.chat"):
        monkeypatch.setattr(f"lora.{module}.open_generator", opened)
    monkeypatch.setattr("lora.commands.chat.check_can_chat", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["lora", arguments[0], "model.gguf", *arguments[1:], *given])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 2 and asked == [given[-1] if given else "f32"]


def test_train_eval_generate_inspect(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    run = tmp_path / "run"
    dry = lora("train", path, "--dry-run")
    assert dry.returncode == 0 and "parameters" in dry.stdout and not run.exists()
    assert lora("train", path, "--set", "train.epochs=1").returncode == 0
    values = json.loads(lora("eval", path, "--adapter", run, "--json").stdout)
    assert values["base"]["n_examples"] == values["adapter"]["n_examples"] == 3
    shown = lora("eval", path, "--adapter", run)
    assert "exact match" in shown.stdout and "prompt" in shown.stdout
    model = tmp_path / "model.gguf"
    for extra in ([], ["--chat"], ["--adapter", run]):
        result = lora("generate", model, "--prompt", "say ab ", "--max-tokens", 3, *extra)
        assert result.returncode == 0, result.stderr
    assert "can be trained" in lora("inspect", model).stdout
    assert "rank" in lora("inspect", run).stdout


def test_version_and_help() -> None:
    for arguments in (["--version"], ["--debug", "--version"]):
        assert lora(*arguments).stdout == f"webgpu-lora {__version__}\n"
    for arguments in (["-h"], ["train", "-h"], ["init", "--help"]):
        assert "Usage: " in lora(*arguments).stdout


def test_help_on_a_narrow_terminal() -> None:
    # Of a process of its own: the options' table is as wide as the terminal when it begins.
    shown = subprocess.run(
        [sys.executable, "-m", "lora", "chat", "-h"],
        capture_output=True, text=True, env=os.environ | {"COLUMNS": "44"},
    ).stdout  # fmt: skip
    for option in ("--max-tokens", "--max-length", "--repetition-penalty"):
        assert option in shown
    assert all(len(line) <= 44 for line in shown.splitlines())


def test_help_flows() -> None:
    """A docstring's line breaks are none of the help's."""
    for command in typer.main.get_group(app).commands.values():
        assert command.help and not any("\n" in part for part in command.help.split("\n\n"))


@pytest.mark.parametrize(
    ("option", "setting"),
    [
        ("--learning-rate", "train.learning_rate=VALUE"),
        ("--lr", "train.learning_rate=VALUE"),
        ("--lora_r", "adapter.rank=VALUE"),
        ("--num-layers", "'adapter.layers={last: N}'"),
    ],
)
def test_an_option_that_is_a_key_of_the_config(option: str, setting: str) -> None:
    with pytest.raises(Exception, match="No such option") as caught:
        app(["train", "lora.yaml", option, "1"], standalone_mode=False)
    assert key_of_option(caught.value).endswith(f" --set {setting}")
    with pytest.raises(Exception, match="No such option") as caught:
        app(["pull", option], standalone_mode=False)
    assert key_of_option(caught.value) == ""


def test_shell_completion() -> None:
    """The script for a shell, and what it then asks the command for."""
    script = lora(_LORA_COMPLETE="source_bash").stdout
    assert "_LORA_COMPLETE=complete_bash" in script and "_lora_completion lora" in script
    assert "--install-completion" in lora("--help").stdout
    asked = {"_LORA_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    for word, words in (("ex", ["export"]), ("--deb", ["--debug"]), ("in", ["init", "inspect"])):
        result = lora(**asked, COMP_WORDS=f"lora {word}")
        assert sorted(result.stdout.split()) == words, result.stderr


def test_devices() -> None:
    assert "Vulkan" in lora("devices", COLUMNS="200").stdout


def test_no_adapter_found() -> None:
    refused(lora("devices", VK_DRIVER_FILES="/nowhere", VK_ICD_FILENAMES="/nowhere"),
            "WebGPU found no device", "mesa-vulkan-drivers")  # fmt: skip


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.learning_rat=1", ["learning_rat", "did you mean learning_rate"]),
        ("train.batch_size=0", ["train.batch_size", "0"]),
        ("adapter.dropout=1.5", ["adapter.dropout", "1.5"]),
        ("model.path=nowhere.gguf", ["nowhere.gguf"]),
        ("data.train=nowhere.jsonl", ["nowhere.jsonl"]),
        ("device=Voodoo", ["Voodoo", "llvmpipe"]),
        ("adapter.layers={last: 9}", ["adapter.layers", "3 layers"]),
    ],
)
def test_wrong_settings(tmp_path: Path, override: str, words: list[str]) -> None:
    if override == "device=Voodoo":
        words = words[:1]  # the adapters' names differ from machine to machine
    refused(lora("train", write_run(tmp_path), "--set", override), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["train", "plan", "bench", "eval", "tune", "generate", "chat"])
def test_every_command_that_computes_takes_an_implementation(tmp_path: Path, command: str) -> None:
    """A wrong name is refused before the model is loaded."""
    path = write_run(tmp_path)
    arguments = {
        "generate": [tmp_path / "model.gguf", "--prompt", "a"],
        "chat": [tmp_path / "model.gguf"],
    }.get(command, [path])
    refused(lora(command, *arguments, "--webgpu", "metal"), "webgpu: got 'metal'", "dawn")


def test_an_option_goes_before_the_environment(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    refused(lora("plan", path, LORA_WEBGPU="metal"), "LORA_WEBGPU: got 'metal'; allowed here: auto")
    done = lora("plan", path, "--webgpu", "wgpu", LORA_WEBGPU="metal")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["train.jsonl"]),
        ('{"prompt": "a", "completion": "b"}\n{"prompt"\n', ["train.jsonl", "2"]),
        ('{"question": "a"}\n', ["train.jsonl", "question"]),
        ('{"prompt": "a", "completion": ""}\n', ["no token of its 1 rows is trained"]),
    ],
)
def test_wrong_data(tmp_path: Path, text: str, words: list[str]) -> None:
    path = write_run(tmp_path)
    (tmp_path / "train.jsonl").write_text(text)
    overrides = ["--set", "data.append_eos=off"]
    refused(lora("train", path, *overrides), *words)


def test_nothing_is_loaded_for_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    done = lora("train", write_run(tmp_path), "--resume")
    refused(done, "holds no checkpoint; run without --resume")
    assert "Reading" not in done.stdout


def test_wrong_models(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    model = tmp_path / "model.gguf"
    whole = model.read_bytes()
    for contents, words in ((whole[:5000], ["model.gguf"]), (b"PK\x03\x04" * 50, ["GGUF"])):
        model.write_bytes(contents)
        refused(lora("train", path), *words)
    write_tiny_llama(model, hidden_size=256, types={"ffn_up.weight": "TQ1_0"})
    refused(lora("train", path), "TQ1_0", "Q4_1")
    model.unlink()
    refused(lora("train", path), "model.gguf")


def test_long_rows_are_cut_and_counted(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    result = lora("train", path, "--dry-run", "--set", "data.max_length=12", COLUMNS="200")
    assert result.returncode == 0 and "cut" in result.stdout
