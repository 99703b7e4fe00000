"""`lora export` on tiny models: files, messages, the command. llama.cpp: tests/parity."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import typer
import yaml
from gguf import GGMLQuantizationType as Type
from typer.testing import CliRunner

import lora.export.to_gguf
from lora.adapters.origin import PromptForm
from lora.commands.cli import app
from lora.commands.export import describe, export_command, loss_warning
from lora.export.merge import MergedTensor
from lora.export.to_gguf import Export, export
from lora.forward.gguf.file import GGUFFile
from lora.shaders.errors import InputError, LoraError
from lora.storage.gguf_output import new_file
from tests.support.export_case import Case, write_faint, write_wide
from tests.support.ollama_store import REGISTRY, install, layer
from tests.support.ollama_store import store as store  # a fixture
from tests.support.tiny_gguf import write_tiny_llama
from tests.support.tiny_models import TINY_MODELS


@pytest.fixture
def llama(tmp_path: Path) -> Case:
    return Case(TINY_MODELS["llama"], tmp_path)


@pytest.fixture
def wide(tmp_path: Path) -> tuple[Path, Path]:
    return write_wide(tmp_path)


@pytest.fixture
def faint(tmp_path: Path) -> Path:
    return write_faint(tmp_path)


def test_modelfiles(llama: Case, tmp_path: Path) -> None:
    done = llama.export()
    assert done.modelfile == llama.adapter / "Modelfile"
    lines = done.modelfile.read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        f"FROM {llama.base.resolve()}",
        "ADAPTER ./adapter.gguf",
    ]
    merged = llama.export("merged-gguf", output=tmp_path / "two words.gguf")
    lines = merged.modelfile.read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ['FROM "./two words.gguf"']


def test_each_export_keeps_its_modelfile(llama: Case, tmp_path: Path) -> None:
    """In one directory, whichever comes last; again for the same file it is written anew."""
    done = [llama.export(), llama.export("merged-gguf")]
    done.append(llama.export("merged-gguf", kind="F16", output=llama.adapter / "half.gguf"))
    names = [each.modelfile.name for each in done]
    assert names == ["Modelfile", "merged.Modelfile", "half.Modelfile"]
    for each, instruction in zip(done, ("ADAPTER", "FROM", "FROM"), strict=True):
        assert f"{instruction} ./{each.path.name}" in each.modelfile.read_text().splitlines()
    before = done[0].modelfile.read_text()
    with pytest.raises(InputError, match=r"was not written by lora export for other.gguf; --force"):
        llama.export(output=llama.adapter / "other.gguf")
    assert done[0].modelfile.read_text() == before
    done[0].path.unlink()
    assert llama.export().modelfile.read_text() == before


def test_modelfile_names_the_ollama_model(
    llama: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("lora.export.to_gguf.resolve_model", lambda name: llama.base)
    llama.change(base_model_name_or_path="ollama:gemma3:270m")
    assert "\nFROM gemma3:270m\n" in llama.export(base=None).modelfile.read_text()


TEMPLATE = '<s>{{ .System }}\n{{ .Prompt }}"end"</s>'
SYSTEM = 'Say "yes".'
PARAMETERS = (
    b'{"stop": ["</s>", "a\\"b\\n"], "temperature": 0.7, "num_ctx": 4096, "x": null, "a b": 1}'
)


def install_base(store: Path, base: Path) -> None:
    kind = "application/vnd.ollama.image."
    path = install(
        store,
        f"{REGISTRY}/llama/latest",
        layer(store, base.read_bytes()),
        layer(store, SYSTEM.encode(), f"{kind}system"),
        layer(store, PARAMETERS, f"{kind}params"),
    )
    manifest = json.loads(path.read_text())
    manifest["layers"][0] = layer(store, TEMPLATE.encode(), f"{kind}template")
    path.write_text(json.dumps(manifest))


def test_merged_modelfile_keeps_what_ollama_runs_the_base_with(llama: Case, store: Path) -> None:
    """The GGUF says none of it; beside an adapter it comes with FROM llama."""
    install_base(store, llama.base)
    done = llama.export("merged-gguf", base="ollama:llama")
    _, rest = done.modelfile.read_text().split("\n", 1)
    assert rest == (
        "FROM ./merged.gguf\n"
        f'TEMPLATE """{TEMPLATE}"""\n'
        f'SYSTEM """{SYSTEM}"""\n'
        'PARAMETER stop "</s>"\n'
        'PARAMETER stop """a"b\n"""\n'
        "PARAMETER temperature 0.7\n"
        "PARAMETER num_ctx 4096\n"
    )
    assert "TEMPLATE" not in llama.export(base="ollama:llama").modelfile.read_text()


def test_a_template_that_no_modelfile_can_hold(
    llama: Case, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three quotes end a value at the end of a line, and there is no escape."""
    monkeypatch.setattr(f"{__name__}.TEMPLATE", 'write """\n{{ .Prompt }}')
    install_base(store, llama.base)
    before = sorted(llama.adapter.iterdir())
    with pytest.raises(InputError, match=r"TEMPLATE .* three quotes .* with --base"):
        llama.export("merged-gguf", base="ollama:llama")
    assert sorted(llama.adapter.iterdir()) == before


def write_origin(adapter: Path, data_format: str, row: dict[str, str]) -> None:
    data = adapter / "train.jsonl"
    data.write_text(json.dumps(row) + "\n")
    config = {
        "model": {"path": "base.gguf"},
        "data": {"train": str(data), "format": data_format},
        "output": str(adapter),
    }
    (adapter / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("target", ["gguf", "merged-gguf"])
def test_prompts_without_a_chat_template(llama: Case, store: Path, target: str) -> None:
    """As the adapter was trained: only the data's own ending, in Ollama and in llama.cpp."""
    install_base(store, llama.base)
    write_origin(llama.adapter, "auto", {"prompt": "wake me\n", "completion": "{}"})
    done = llama.export(target, base="ollama:llama")
    text = done.modelfile.read_text()
    assert text.count("TEMPLATE") == text.count('TEMPLATE """{{ .Prompt }}\n"""\n') == 1
    assert "SYSTEM" not in text
    assert ("PARAMETER temperature" in text) == (target == "merged-gguf")
    printed = "\n".join(describe(done))
    assert "data.format completion" in printed
    assert '"\\n" must end it: in Ollama leave that out' in printed
    assert "llama-completion -no-cnv -m " in printed
    assert "-p 'PROMPT\\n'" in printed
    assert "llama-cli" not in printed


def test_prompts_of_data_that_is_gone(llama: Case) -> None:
    write_origin(llama.adapter, "completion", {})
    (llama.adapter / "train.jsonl").unlink()
    done = llama.export()
    assert 'TEMPLATE """{{ .Prompt }}"""\n' in done.modelfile.read_text()
    printed = "\n".join(describe(done))
    assert "to its last character." in printed
    assert "-p PROMPT\n" in printed


def test_instructions_end_as_in_training(wide: tuple[Path, Path]) -> None:
    """Through the model's chat template; where it has none, as data._mark writes them."""
    base, adapter = wide
    write_origin(adapter, "instruct", {"instruction": "Add.", "output": "3"})
    done = export(adapter, "gguf")
    assert "TEMPLATE" not in done.modelfile.read_text()
    none = {"tokenizer.chat_template": None}
    write_tiny_llama(base, hidden_size=256, intermediate_size=512, metadata=none)
    done = export(adapter, "gguf", force=True)
    assert 'TEMPLATE """{{ .Prompt }}\n\n"""\n' in done.modelfile.read_text()
    printed = "\n".join(describe(done))
    assert "-p 'PROMPT\\n\\n'" in printed
    assert "after an empty line the input" in printed


def test_chats_keep_the_models_template(llama: Case) -> None:
    write_origin(llama.adapter, "chat", {})
    done = llama.export()
    assert "TEMPLATE" not in done.modelfile.read_text()
    assert "llama.cpp: llama-cli -m" in "\n".join(describe(done))


@pytest.mark.parametrize("target", ["gguf", "merged-gguf"])
def test_a_template_of_the_run_goes_with_it(llama: Case, store: Path, target: str) -> None:
    """llama.cpp runs it, and a merged file holds it; the base's own is not the trained one."""
    install_base(store, llama.base)
    source = "{{ messages[0].content }}{{ style }}"
    write_origin(llama.adapter, "chat", {})
    config = yaml.safe_load((llama.adapter / "config.yaml").read_text())
    config["data"] |= {"chat_template": source, "chat_template_kwargs": {"style": "a b"}}
    (llama.adapter / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match="chat_template.jinja: there is no such file, and the ad"):
        llama.export(target, base="ollama:llama")
    (llama.adapter / "chat_template.jinja").write_text(source)
    done = llama.export(target, base="ollama:llama")
    assert "TEMPLATE" not in done.modelfile.read_text()
    printed = "\n".join(describe(done))
    assert "--jinja" in printed and """--chat-template-kwargs '{"style": "a b"}'""" in printed
    assert ("--chat-template-file " in printed) == (target == "gguf")
    assert "Ollama takes templates in Go alone" in printed
    if target == "merged-gguf":
        merged, base = GGUFFile(done.path), GGUFFile(llama.base)
        assert merged.metadata["tokenizer.chat_template"] == source
        others = set(base.metadata) - {"tokenizer.chat_template"}
        assert all(merged.metadata[key] == base.metadata[key] for key in others)
        assert merged.metadata.keys() == base.metadata.keys()


def test_nothing_is_replaced_without_force(llama: Case) -> None:
    path = llama.adapter / "adapter.gguf"
    path.write_text("mine")
    with pytest.raises(InputError, match=r"adapter.gguf is there already; --force"):
        llama.export()
    assert path.read_text() == "mine"
    llama.export(force=True)
    path.unlink()
    (llama.adapter / "Modelfile").write_text("FROM mine\n")
    with pytest.raises(InputError, match="not written by lora export"):
        llama.export()
    assert not path.exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_the_adapter_is_never_replaced(llama: Case, tmp_path: Path, name: str) -> None:
    before = (llama.adapter / name).read_bytes()
    (tmp_path / "link").symlink_to(llama.adapter / name)
    for output in (llama.adapter / name, tmp_path / "link"):
        with pytest.raises(InputError, match="is a part of the adapter itself"):
            llama.export("gguf", output=output, force=True)
    assert (llama.adapter / name).read_bytes() == before


@pytest.mark.parametrize("force", [False, True])
def test_a_directory_in_the_place_of_the_modelfile(llama: Case, force: bool) -> None:
    (llama.adapter / "Modelfile").mkdir()
    with pytest.raises(InputError, match="Modelfile is a directory"):
        llama.export(force=force)
    assert not (llama.adapter / "adapter.gguf").exists()


def test_a_modelfile_that_cannot_be_written(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lora.export.to_gguf, "write_file", fail)
    with pytest.raises(LoraError, match=r"Modelfile could not be written: No space.* is whole"):
        llama.export()


def test_a_relative_base(llama: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found from elsewhere: from where the run was started, or from the adapter."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    llama.change(base_model_name_or_path="../base.gguf")
    llama.adapter.rename(tmp_path / "elsewhere" / "adapter")
    llama.adapter = tmp_path / "elsewhere" / "adapter"
    monkeypatch.chdir("/")
    with pytest.raises(InputError, match="no GGUF file here; name it with --base"):
        llama.export(base=None)
    config = {"model": {"path": "x"}, "data": {"train": "x"}, "output": "adapter"}
    (llama.adapter / "config.yaml").write_text(yaml.safe_dump(config))
    assert os.path.samefile(llama.export(base=None).base_path, llama.base)
    (llama.adapter / "config.yaml").unlink()
    llama.change(base_model_name_or_path="../../base.gguf")
    done = llama.export(base=None, force=True)
    assert f"\nFROM {llama.base.resolve()}\n" in done.modelfile.read_text()


def test_the_base_is_never_replaced(llama: Case) -> None:
    before = llama.base.read_bytes()
    with pytest.raises(InputError, match="is the base itself"):
        llama.export("merged-gguf", output=llama.base, force=True)
    assert llama.base.read_bytes() == before


def test_a_failure_leaves_nothing(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora.export.merge._copy", fail)
    before = sorted(llama.adapter.iterdir())
    with pytest.raises(LoraError, match="could not be written: No space left"):
        llama.export("merged-gguf")
    assert sorted(llama.adapter.iterdir()) == before


def test_new_file_keeps_the_old_one_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyError), new_file(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def broken(case: Case, change: str) -> dict[str, Any]:
    """Breaks a case; returns the options of its export."""
    tensors = case.model.adapter()
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    weights = case.adapter / "adapter_model.safetensors"
    if change == "no adapter":
        weights.unlink()
    elif change == "no json":
        (case.adapter / "adapter_config.json").write_text("{")
    elif change == "dora":
        case.change(use_dora=True)
    elif change == "dora without lengths":
        case.change(use_dora=True)
        return {"target": "merged-gguf"}
    elif change == "lengths":
        lengths = {
            name.replace("lora_A.weight", "lora_magnitude_vector"): np.ones(3, np.float32)
            for name in tensors
            if "lora_A" in name
        }
        safetensors.numpy.save_file(tensors | lengths, weights)
        case.change(use_dora=True)
        return {"target": "merged-gguf"}
    elif change == "lengths of none":
        name = first.replace("lora_B.weight", "lora_magnitude_vector")
        safetensors.numpy.save_file({**tensors, name: np.ones(3, np.float32)}, weights)
    elif change == "alora":
        case.change(alora_invocation_tokens=[1, 2])
    elif change in ("use_qalora", "use_bdlora"):
        case.change(**{change: {"nblocks": 2} if "bd" in change else True})
    elif change == "rank 0":
        case.change(rank_pattern={"o_proj": 0})
    elif change == "alpha":
        case.change(lora_alpha=float("nan"))
    elif change == "rank":
        case.change(rank_pattern={"o_proj": 9})
    elif change == "integers":
        safetensors.numpy.save_file({**tensors, first: tensors[first].astype(np.int32)}, weights)
    elif change == "other kind":
        case.change(peft_type="IA3")
    elif change == "pattern":
        case.change(rank_pattern={"(": 3})
    elif change == "shape":
        safetensors.numpy.save_file({**tensors, first: tensors[first][:-1].copy()}, weights)
    elif change == "module":
        renamed = {n.replace("layers.0.", "layers.77."): v for n, v in tensors.items()}
        safetensors.numpy.save_file(renamed, weights)
    elif change == "empty":
        safetensors.numpy.save_file({}, weights)
    elif change == "huge":
        safetensors.numpy.save_file({**tensors, first: tensors[first] * 1e9}, weights)
        return {"kind": "F16"}
    elif change == "no base":
        return {"base": None}
    elif change == "missing base":
        return {"base": "nowhere.gguf"}
    elif change == "target":
        return {"target": "merged"}
    elif change == "type":
        return {"kind": "Q4_K"}
    elif change == "blocks":
        return {"target": "merged-gguf", "kind": "Q4_K"}
    elif change == "directory":
        return {"output": case.adapter}
    return {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no adapter", "no PEFT adapter there"),
        ("no json", "not the config of a LoRA adapter"),
        ("dora", "a DoRA adapter is no sum.* lora export .* --to merged-gguf"),
        ("dora without lengths", "has no lora_magnitude_vector, but use_dora is True"),
        ("lengths", r"has a lora_magnitude_vector \(3,\); this base wants"),
        ("lengths of none", "q_proj has a lora_magnitude_vector, but use_dora is False"),
        ("alora", r"an aLoRA adapter, .* \(alora_invocation_tokens\) is not supported"),
        ("use_qalora", r"a QA-LoRA adapter, .* \(use_qalora\) is not supported"),
        ("use_bdlora", r"a BD-LoRA adapter, .* \(use_bdlora\) is not supported"),
        ("rank 0", "has the rank 0; it must be 1 at least"),
        ("alpha", "has the alpha nan; it must be a number"),
        ("rank", "gives it the rank 9"),
        ("integers", "q_proj.lora_B.weight is none of F32, F16, BF16, F64"),
        ("other kind", "peft_type is 'IA3'"),
        ("pattern", "not the config of a LoRA adapter"),
        ("shape", r"q_proj has A .* want .* Name the right base with --base"),
        ("module", r"adapts model.layers.77.* does not have"),
        ("empty", "the adapter changes nothing"),
        ("huge", "too large for F16; take F32"),
        ("no base", r"names the base 'llama', which is no GGUF file here; name it with --base"),
        ("missing base", "There is no file nowhere.gguf"),
        ("target", r"--to merged: did you mean merged-gguf\?"),
        ("type", "--type Q4_K: with --to gguf it must be one of F32, F16"),
        ("blocks", r"blocks of 256. Take Q8_0"),
        ("directory", "is a directory"),
    ],
)
def test_messages(llama: Case, change: str, message: str) -> None:
    options = broken(llama, change)
    before = sorted(llama.adapter.iterdir())
    with pytest.raises(InputError, match=message):
        llama.export(**{"target": "gguf", **options})
    assert sorted(llama.adapter.iterdir()) == before


def lossy(kind: str, kept: float, path: Path = Path(__file__)) -> Export:
    merged = MergedTensor("blk.0.attn_q.weight", Type[kind], error=0.01, change=0.01, kept=kept)
    return Export(path, path, path, 1, [merged])


@pytest.mark.parametrize(
    ("kind", "kept", "behaves", "finer"),
    [
        ("Q4_K", 0.06, "hardly like the tuned model: 94.0%", "Q8_0"),
        ("Q8_0", 0.79, "only in part like the tuned model: 21.0%", "F16"),
        ("BF16", 0.49, "hardly like the tuned model: 51.0%", "F32"),
    ],
)
def test_warning_of_a_lost_change(kind: str, kept: float, behaves: str, finer: str) -> None:
    done = lossy(kind, kept)
    warning = loss_warning(done, Path("my run"), output=Path("it's.gguf"), base="ollama:x")
    assert warning[0].startswith(f"Warning: {__file__} behaves {behaves}")
    assert warning[0].endswith(f"rounding to {kind}.")
    command = ["lora", "export", "my run", "--to", "merged-gguf", "--output", "it's.gguf"]
    assert shlex.split(warning[-1]) == [*command, "--base", "ollama:x", "--type", finer, "--force"]
    runs = describe(done)[-2:]
    assert [line.split(":")[0] for line in runs] == [
        f"llama.cpp, with {kept:.1%} of the adapter",
        f"Ollama, with {kept:.1%} of the adapter",
    ]
    assert not loss_warning(lossy(kind, 0.81), Path("my run"), output=None, base=None)


def test_printed_commands_are_quoted(tmp_path: Path) -> None:
    path = tmp_path / "it's $HOME; x.gguf"
    path.write_bytes(b"")
    alone = Export(path, path, path, 1, [])
    asked = Export(path, path, path, 1, [], PromptForm("completion", ""))
    for done, places in ((alone, 3), (asked, 3), (lossy("F16", 1.0, path), 2)):
        words = [word for line in describe(done)[-2:] for word in shlex.split(line)]
        assert words.count(str(path)) == places


def test_command(wide: tuple[Path, Path]) -> None:
    app = typer.Typer()
    app.command(name="export")(export_command)
    runner = CliRunner()
    result = runner.invoke(app, [str(wide[1]), "--to", "gguf"])
    assert result.exit_code == 0, result.output
    assert "1 adapted tensors" in result.output
    assert f"--lora {wide[1] / 'adapter.gguf'}" in result.output
    result = runner.invoke(app, [str(wide[1]), "--to", "merged-gguf", "--type", "q4_k"])
    assert result.exit_code == 0, result.output
    assert "Types of the merged tensors: 1 Q4_K." in result.output
    assert "at worst (blk.1.ffn_down.weight, Q4_K)" in result.output
    assert "of what the adapter changed is kept." in result.output
    assert "Warning" not in result.output
    assert result.stderr == ""  # no terminal: no bar, and no line of it
    assert runner.invoke(app, [str(wide[1])]).exit_code == 2


def test_command_warns_last(faint: Path, tmp_path: Path) -> None:
    """On stderr, and the command that it prints does keep the adapter."""
    runner = CliRunner()
    given = [str(faint), "--to", "merged-gguf", "--output", str(tmp_path / "two words.gguf")]
    result = runner.invoke(app, ["export", *given])
    assert result.exit_code == 0, result.output
    assert "Warning" not in result.stdout
    assert result.stdout.splitlines()[-1].startswith("Ollama, with ")
    warning = result.stderr.splitlines()
    assert "behaves hardly like the tuned model" in warning[0]
    assert result.output.splitlines()[-1] == warning[-1]
    command = shlex.split(warning[-1])
    assert command == ["lora", "export", *given, "--type", "Q8_0", "--force"]
    again = runner.invoke(app, command[1:])
    assert again.exit_code == 0, again.output
    assert again.stderr == ""
    assert "\nOllama: ollama create" in again.stdout
