"""`lora export` on tiny models: files, messages, the command. llama.cpp: tests/parity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import typer
from gguf import GGMLQuantizationType as Type
from typer.testing import CliRunner

from lora.export import Export
from lora.export_command import describe, export_command
from lora.gguf_output import new_file
from lora.merge import MergedTensor
from shaders.errors import InputError, LoraError
from tests.lora.export_case import Case, write_faint, write_wide
from tests.parity.tiny_models import TINY_MODELS


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
    monkeypatch.setattr("lora.export.resolve_model", lambda name: llama.base)
    llama.change(base_model_name_or_path="ollama:gemma3:270m")
    assert "\nFROM gemma3:270m\n" in llama.export(base=None).modelfile.read_text()


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


def test_the_base_is_never_replaced(llama: Case) -> None:
    before = llama.base.read_bytes()
    with pytest.raises(InputError, match="is the base itself"):
        llama.export("merged-gguf", output=llama.base, force=True)
    assert llama.base.read_bytes() == before


def test_a_failure_leaves_nothing(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora.merge._copy", fail)
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


def described(kind: str, kept: float) -> list[str]:
    merged = MergedTensor("blk.0.attn_q.weight", Type[kind], error=0.01, change=0.01, kept=kept)
    here = Path(__file__)
    return describe(Export(here, here, here, 1, [merged]))


@pytest.mark.parametrize(
    ("kind", "kept", "behaves", "finer"),
    [
        ("Q4_K", 0.06, "mostly like the base: 6.0%", "Q8_0"),
        ("Q8_0", 0.79, "only in part as it was trained: 79.0%", "F16"),
        ("BF16", 0.49, "mostly like the base: 49.0%", "F32"),
    ],
)
def test_warning_of_a_lost_change(kind: str, kept: float, behaves: str, finer: str) -> None:
    first, second, *_ = described(kind, kept)
    assert first.startswith(f"Warning: the merged file behaves {behaves}")
    assert f"rounding to {kind}." in first
    assert f"--type {finer} and --force" in second
    assert not any("Warning" in line for line in described(kind, 0.81))


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


def test_command_warns_first(faint: Path) -> None:
    app = typer.Typer()
    app.command(name="export")(export_command)
    runner = CliRunner()
    result = runner.invoke(app, [str(faint), "--to", "merged-gguf"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Warning: the merged file behaves mostly like the base: ")
    result = runner.invoke(app, [str(faint), "--to", "merged-gguf", "--type", "Q8_0", "--force"])
    assert result.exit_code == 0, result.output
    assert "Warning" not in result.output
    assert "--type" not in result.output
