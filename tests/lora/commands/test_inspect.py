"""What `lora inspect` finds in models, and how it is shown."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console
from typer.testing import CliRunner

from lora.commands.cli import app
from lora.commands.inspect import adapter_facts, describe_adapter, describe_gguf, gguf_facts
from lora.shaders.errors import InputError
from tests.support.tiny_gguf import CHATML, write_tiny_llama
from tests.support.tiny_models import TINY_MODELS


def shown(model: str | Path) -> str:
    console = Console(width=400)
    with console.capture() as capture:
        for part in describe_gguf(model):
            console.print(part)
    return capture.get()


def rows(model: str | Path) -> dict[str, str]:
    """The left table, by label."""
    lines = [line.split("  ", 1) for line in shown(model).split("┏")[0].splitlines()]
    return {line[0]: line[1].strip() for line in lines}


def test_facts_of_a_model_that_can_be_trained(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    types = {"weight": "Q4_1", "token_embd.weight": "Q8_0"}
    written = write_tiny_llama(path, types=types, metadata={"general.name": "Tiny"})
    facts = gguf_facts(path)
    assert json.loads(json.dumps(facts)) == facts
    sizes = [(kind, [v.size for n, v in written.items() if is_of(n, v)]) for kind, is_of in KINDS]
    assert facts == {
        "model": str(path),
        "files": [str(path)],
        "bytes": path.stat().st_size,
        "gguf_version": 3,
        "name": "Tiny",
        "architecture": "llama",
        "parameters": sum(values.size for values in written.values()),
        "sizes": {
            "block_count": 2,
            "embedding_length": 32,
            "feed_forward_length": 64,
            "attention.head_count": 4,
            "attention.head_count_kv": 2,
            "attention.key_length": 8,
            "context_length": 128,
        },
        "rope": {"rope.freq_base": 10000.0, "rope.dimension_count": 8},
        "models": "Llama 2 and 3, Mistral, Devstral Small 1, SmolLM 1 and 2",
        "adaptable": [
            {"module": f"{name}_proj", "layers": 2, "of": 2}
            for name in ("q", "k", "v", "o", "gate", "up", "down")
        ],
        "left_alone": {},
        "tensor_types": [
            {
                "type": kind,
                "tensors": len(counts),
                "parameters": sum(counts),
                "bytes": round(sum(counts) * BYTES[kind]),
            }
            for kind, counts in sizes
        ],
        "tokenizer": {
            "kind": "gpt2",
            "pre": "smollm",
            "entries": 320,
            "special": {
                "bos": {"id": 1, "text": "<|im_start|>"},
                "eos": {"id": 2, "text": "<|im_end|>"},
            },
            "problem": None,
        },
        "chat_template": {"characters": len(CHATML), "first_line": CHATML.splitlines()[0]},
        "adapter": None,
        "trainable": True,
        "obstacles": [],
    }


# The tensors of each type in the model above, the type with the most bytes first.
KINDS = [
    ("Q4_1", lambda name, values: values.ndim == 2 and name != "token_embd.weight"),
    ("Q8_0", lambda name, values: name == "token_embd.weight"),
    ("F32", lambda name, values: values.ndim == 1),
]
BYTES = {"Q4_1": 20 / 32, "Q8_0": 34 / 32, "F32": 4}


def test_how_it_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_llama(path, metadata={"general.name": "Tiny"})
    table = rows(path)
    assert table["file"] == f"{path} ({path.stat().st_size / 2**20:.1f} MiB, GGUF 3)"
    assert table["name"] == "Tiny"
    assert table["layers"] == "2"
    assert table["rope"] == "freq_base 10000, dimension_count 8"
    assert table["tokenizer"] == "gpt2 smollm, 320 entries"
    assert table["special tokens"] == "bos 1 <|im_start|>, eos 2 <|im_end|>"
    assert table["chat template"].startswith(f"yes, {len(CHATML)} characters: {{% for message")
    assert table["can be trained"] == "yes"
    assert "experts" not in table and "sliding window" not in table
    assert "F32" in shown(path)


def test_text_out_of_a_file_is_neither_markup_nor_obeyed(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_llama(path, metadata={"general.name": "[bold]a[/] \x1b[31mred\n[/x] é"})
    assert rows(path)["name"] == "[bold]a[/] \\x1b[31mred\\n[/x] é"


def test_one_value_a_layer(tmp_path: Path) -> None:
    path = tmp_path / "layers.gguf"
    write_tiny_llama(
        path,
        metadata={
            "llama.attention.head_count_kv": [2, 2],
            "llama.feed_forward_length": [64, 96],
            "llama.attention.sliding_window_pattern": [True, False],
            "llama.attention.head_count": [1, 2, 3, 4, 5],
            "llama.attention.sliding_window": 16,
        },
    )
    facts = gguf_facts(path)
    assert facts["sizes"]["feed_forward_length"] == [64, 96]
    table = rows(path)
    assert table["KV heads"] == "2"
    assert table["feed-forward"] == "64 (1 times), 96 (1 times)"
    assert table["window pattern"] == "True (1 times), False (1 times)"
    assert table["heads"] == "5 values, 1 to 5"
    assert table["sliding window"] == "16"


def test_rope_scaling_and_its_tensors(tmp_path: Path) -> None:
    path = tmp_path / "long.gguf"
    write_tiny_llama(
        path,
        metadata={"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
        tensors={"rope_freqs.weight": np.ones(4, np.float32)},
    )
    facts = gguf_facts(path)
    assert facts["rope"]["rope.scaling.factor"] == 4.0
    assert facts["rope"]["tensors"] == ["rope_freqs.weight"]
    assert "scaling.type yarn, scaling.factor 4, tensors rope_freqs.weight" in rows(path)["rope"]


def test_names_that_people_know_and_what_is_left_alone(tmp_path: Path) -> None:
    model, path = TINY_MODELS["gemma4_e2b"], tmp_path / "tiny.gguf"
    model.write_gguf(path, more={"v.patch_embd.weight": np.ones((4, 4), np.float32)})
    table = rows(path)
    assert table["architecture"] == "gemma4 (Gemma 4, dense and E2B, E4B)"
    assert table["adapter.targets"] == (
        "q_proj, k_proj (4 layers), v_proj (4 layers), o_proj, gate_proj, up_proj, down_proj, "
        "per_layer_input_gate, per_layer_projection"
    )
    assert table["left alone"] == "images and sound (1 tensors)"
    TINY_MODELS["gemma3"].write_gguf(path)
    assert "FunctionGemma" in rows(path)["architecture"]
    TINY_MODELS["mistral3"].write_gguf(path)
    assert "Devstral" in rows(path)["architecture"]


def test_every_reason_why_it_cannot_be_trained(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    types = {"attn_q.weight": "TQ2_0", "ffn_up.weight": "TQ1_0"}
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256}
    write_tiny_llama(path, types=types, metadata={"general.architecture": "mamba9"}, **sizes)
    facts = gguf_facts(path)
    architecture, tensor_types = facts["obstacles"]
    assert not facts["trainable"]
    assert architecture.startswith("This file has the architecture 'mamba9'")
    assert str(path) not in architecture
    assert tensor_types == "Matrices stored as TQ1_0, TQ2_0 are not supported."
    assert rows(path)["can be trained"] == f"no: {architecture} {tensor_types}"
    write_tiny_llama(path, types=types, **sizes)
    assert len(gguf_facts(path)["obstacles"]) == 1  # the types, once
    assert "TQ" in gguf_facts(path)["obstacles"][0]


def test_a_tokenizer_that_cannot_be_used_is_said_apart(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_llama(path, metadata={"tokenizer.ggml.pre": "nobody-has-this"})
    facts = gguf_facts(path)
    assert facts["trainable"]
    assert "nobody-has-this" in facts["tokenizer"]["problem"]
    table = rows(path)
    assert table["can be trained"].startswith("yes, with model.tokenizer set (This file")
    keys = ["model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id"]
    without = {f"tokenizer.ggml.{key}": None for key in keys} | {"tokenizer.chat_template": None}
    write_tiny_llama(path, metadata=without)
    assert gguf_facts(path)["tokenizer"] is None
    table = rows(path)
    assert table["tokenizer"] == "none" and table["chat template"] == "no"
    assert table["can be trained"] == "yes, with model.tokenizer set (the file has none)"


def test_metadata_of_the_wrong_kind_is_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    write_tiny_llama(
        path,
        metadata={
            "general.name": [1, 2, 2],
            "llama.context_length": "long",
            "tokenizer.ggml.tokens": "seven",
            "tokenizer.ggml.pre": 1.5,
            "tokenizer.ggml.eos_token_id": "two",
            "tokenizer.ggml.bos_token_id": 4_000_000_000,
            "tokenizer.chat_template": 3,
        },
    )
    facts = gguf_facts(path)
    assert facts["chat_template"] is None
    assert facts["tokenizer"]["entries"] == 0
    assert facts["tokenizer"]["special"] == {"bos": {"id": 4_000_000_000, "text": None}}
    assert rows(path)["context"] == "long"
    assert rows(path)["name"] == "1 (1 times), 2 (2 times)"


def test_a_file_without_tensors_or_metadata(tmp_path: Path) -> None:
    path = tmp_path / "empty.gguf"
    path.write_bytes(b"GGUF" + bytes([3, 0, 0, 0]) + bytes(16))
    facts = gguf_facts(path)
    assert facts["tensor_types"] == [] and facts["sizes"] == {} and facts["rope"] == {}
    assert rows(path)["can be trained"].startswith("no: This file lacks")
    with pytest.raises(InputError, match="There is no file"):
        gguf_facts(tmp_path / "absent.gguf")


def test_models_out_of_stores_and_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "tiny.gguf"
    write_tiny_llama(whole)
    digest = hashlib.sha256(whole.read_bytes()).hexdigest()
    manifest = tmp_path / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "latest"
    manifest.parent.mkdir(parents=True)
    kind = "application/vnd.ollama.image.model"
    manifest.write_text(json.dumps({"layers": [{"mediaType": kind, "digest": f"sha256:{digest}"}]}))
    (tmp_path / "blobs").mkdir()
    whole.rename(tmp_path / "blobs" / f"sha256-{digest}")
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    facts = gguf_facts("ollama:tiny")
    assert facts["model"] == "ollama:tiny"
    assert facts["files"] == [str(tmp_path / "blobs" / f"sha256-{digest}")]
    assert facts["trainable"]

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    for name in "abc":
        writer.add_tensor(name, np.ones((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("m-*.gguf"))
    facts = gguf_facts(parts[1])
    assert facts["files"] == [str(path) for path in parts]
    assert facts["parameters"] == 3 * 64
    assert facts["tensor_types"][0]["tensors"] == 3
    n_bytes = sum(path.stat().st_size for path in parts)
    assert facts["bytes"] == n_bytes
    assert f"{parts[0]} (2 files, {n_bytes / 2**20:.1f} MiB, GGUF 3)" in shown(parts[1])


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """One of two ranks and alphas, on three matrices."""
    tensors = {}
    for path, rank in (
        ("model.layers.1.self_attn.q_proj", 4),
        ("model.layers.3.self_attn.q_proj", 6),
        ("lm_head", 4),
    ):
        tensors[f"base_model.model.{path}.lora_A.weight"] = np.full((rank, 32), 0.5)
        tensors[f"base_model.model.{path}.lora_B.weight"] = np.full((48, rank), -rank)
    directory = tmp_path / "rank=4"
    directory.mkdir()
    safetensors.numpy.save_file(
        {name: values.astype(np.float32) for name, values in tensors.items()},
        directory / "adapter_model.safetensors",
    )
    settings = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "base_model_name_or_path": "some/base",
        "rank_pattern": {"layers.3.self_attn.q_proj": 6},
        "alpha_pattern": {"lm_head": 2},
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def test_facts_of_an_adapter_directory(adapter: Path) -> None:
    facts = adapter_facts(adapter)
    assert json.loads(json.dumps(facts)) == facts
    head, q_proj = facts.pop("matrices")
    assert facts == {
        "adapter": str(adapter),
        "base": "some/base",
        "trainable_tokens": [],
        "rank": 4,
        "ranks": [4, 6],
        "alpha": 8.0,
        "variant": "lora",
        "layers": [1, 3],
        "parameters": (4 + 6 + 4) * (32 + 48),
    }
    both = {"in_features": 32, "out_features": 48, "mean_a": 0.5}
    assert head == {
        "name": "lm_head", "modules": 1, "ranks": [4], "scales": [0.5], "mean_b": 4.0, **both
    }  # fmt: skip
    assert q_proj == {
        "name": "q_proj", "modules": 2, "ranks": [4, 6], "scales": [8 / 6, 2.0], "mean_b": 5.0,
        **both,
    }  # fmt: skip


def test_the_command_takes_either(adapter: Path, tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "tiny.gguf")
    for path, facts in ((adapter, adapter_facts), (tmp_path / "tiny.gguf", gguf_facts)):
        result = CliRunner().invoke(app, ["inspect", str(path), "--json"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout) == facts(path)


def test_how_an_adapter_directory_is_shown(adapter: Path) -> None:
    console = Console(width=200)
    with console.capture() as capture:
        for part in describe_adapter(adapter):
            console.print(part)
    text = capture.get()
    for words in ("rank=4", "some/base", "2: 1 to 3", "1,120", "4, 6", "1.333, 2", "lm_head"):
        assert words in text


def test_dora_is_said(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    for name in list(tensors):
        if "lora_A" in name:
            vector = name.replace("lora_A.weight", "lora_magnitude_vector")
            tensors[vector] = np.ones(48, np.float32)
    safetensors.numpy.save_file(tensors, path)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    facts = adapter_facts(adapter)
    assert facts["variant"] == "dora"
    assert facts["parameters"] == (4 + 6 + 4) * (32 + 48) + 3 * 48


def test_a_real_model(smollm2: Path) -> None:
    facts = gguf_facts(smollm2)
    assert facts["trainable"] and facts["tokenizer"]["problem"] is None
    assert facts["parameters"] == 134_515_008
    assert facts["rope"]["rope.freq_base"] == 100_000
