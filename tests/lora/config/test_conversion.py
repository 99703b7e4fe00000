"""Configs of other tools as ours: the examples that each ships, key by key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from lora.commands.cli import app
from lora.commands.convert import converted
from lora.config.conversion.draft import Draft
from lora.config.schema import Config, load_config
from lora.shaders.errors import InputError

AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
load_in_4bit: true
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
  - path: json
    data_files: [data/mine.jsonl]
    type: chat_template
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
val_set_size: 0.1
output_dir: ./outputs/lora-out
adapter: qlora
lora_model_dir:
sequence_len: 2048
sample_packing: true
lora_r: 16
lora_alpha: 32
lora_target_linear: true
peft_use_rslora: true
peft_trainable_token_indices: {embed_tokens: [128002, 128003]}
wandb_project: mine
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_torch
lr_scheduler: constant_with_warmup
learning_rate: 2e-4
bf16: auto
flash_attention: true
loss_watchdog_threshold: 5.0
warmup_steps: 10
evals_per_epoch: 4
early_stopping_patience: 3
adam_beta2: 0.95
special_tokens: {pad_token: <|end_of_text|>}
"""
FACTORY = """
model_name_or_path: models/llama3.gguf
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj,v_proj
dataset: identity,chats
eval_dataset: identity
dataset_dir: data
template: llama3
cutoff_len: 1024
max_samples: 1000
output_dir: saves/sft
save_steps: 500
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
eval_steps: 500
metric_for_best_model: accuracy
report_to: tensorboard
train_on_prompt: true
pref_beta: 0.1
"""
MLX = """
model: mlx-community/Llama-3.2-1B-Instruct
train: true
optimizer: adamw
data: mine
num_layers: -1
batch_size: 2
iters: 1000
val_batches: 25
learning_rate: 1e-5
steps_per_eval: 200
grad_accumulation_steps: 4
adapter_path: adapters
save_every: 100
max_seq_length: 2048
lora_parameters: {keys: [self_attn.q_proj, self_attn.v_proj], rank: 8, scale: 20.0, dropout: 0.0}
lr_schedule: {name: cosine_decay, warmup: 100, warmup_init: 1e-7, arguments: [2e-5, 1000, 1e-7]}
mask_prompt: true
"""


def draft_of(text: str, folder: Path) -> tuple[str, Draft, Config]:
    """What becomes of a config, checked by ours."""
    values: dict[str, Any] = yaml.safe_load(text)
    tool, draft = converted(values, folder / "theirs.yaml")
    path = folder / "ours.yaml"
    path.write_text(draft.text("theirs"))
    return tool, draft, load_config(str(path))


def test_axolotl(tmp_path: Path) -> None:
    tool, draft, config = draft_of(AXOLOTL, tmp_path)
    assert tool == "Axolotl"
    assert config.model.path == "hf:NousResearch/Llama-3.2-1B-GGUF:Q4_K_M"
    adapter, data, train = config.adapter, config.data, config.train
    assert (adapter.rank, adapter.alpha, adapter.targets) == (16, 32.0, "all-linear")
    assert adapter.variant == "rslora" and adapter.trainable_tokens == [128002, 128003]
    first, second = data.sources("train")
    assert (first.name, first.format) == ("teknium/GPT4-LLM-Cleaned", "instruct")
    assert (second.path, second.format) == ("data/mine.jsonl", "chat")
    assert second.columns == {"messages": "conversations", "role": "from", "content": "value"}
    assert (data.eval_share, data.max_length, data.packing) == (0.1, 2048, True)
    assert data.train_on == "completion"
    assert (train.batch_size, train.gradient_accumulation, train.epochs) == (2, 2, 1.0)
    assert (train.schedule, train.learning_rate, train.warmup_steps) == ("constant", 2e-4, 10)
    assert (train.eval_every, train.early_stopping_patience) == ("0.25 epochs", 3)
    assert (train.betas, train.report_to) == ([0.9, 0.95], ["wandb"])
    assert config.output == "./outputs/lora-out"
    assert set(draft.lacking) == {"loss_watchdog_threshold", "special_tokens"}
    assert set(draft.needless) == {"load_in_4bit", "bf16", "flash_attention"}
    assert any("holds safetensors" in note for note in draft.notes)


def test_llama_factory(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    info = {
        "identity": {"file_name": "identity.json"},
        "chats": {
            "hf_hub_url": "org/chats", "formatting": "sharegpt", "subset": "en", "split": "train",
            "columns": {"messages": "conversations"},
            "tags": {"role_tag": "from", "content_tag": "value"},
        },
    }  # fmt: skip
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    tool, draft, config = draft_of(FACTORY, tmp_path)
    assert tool == "LLaMA-Factory" and config.model.path == "models/llama3.gguf"
    assert config.adapter.targets == ["q_proj", "v_proj"]
    assert (config.adapter.rank, config.adapter.alpha) == (8, 16.0)  # its default is twice the rank
    first, second = config.data.sources("train")
    assert (first.path, first.max_samples) == ("data/identity.json", 1000)
    assert (second.name, second.config, second.split) == ("org/chats", "en", "train")
    assert second.columns == {"messages": "conversations", "role": "from", "content": "value"}
    assert [s.path for s in config.data.sources("eval")] == ["data/identity.json"]
    assert config.data.train_on == "all"
    train = config.train
    assert (train.eval_every, train.save_every, train.best) == (500, 500, "eval_accuracy")
    assert (train.report_to, train.batch_size, train.epochs) == (["tensorboard"], 1, 3.0)
    assert set(draft.lacking) == {"pref_beta"}


def test_defaults_of_llama_factory(tmp_path: Path) -> None:
    """What it leaves unsaid is not what we leave unsaid."""
    _, draft, config = draft_of("model_name_or_path: m.gguf\ndataset: mine\n", tmp_path)
    train = config.train
    assert (train.learning_rate, train.schedule, train.warmup_ratio) == (5e-5, "linear", 0.0)
    assert (train.batch_size, train.epochs, config.data.max_length) == (8, 3.0, 2048)
    assert any("dataset_info.json" in note for note in draft.notes)


def test_mlx_lm(tmp_path: Path) -> None:
    """Iterations are micro-batches there, and the scale is alpha by the rank."""
    tool, draft, config = draft_of(MLX, tmp_path)
    assert tool == "mlx-lm"
    adapter, data, train = config.adapter, config.data, config.train
    assert (adapter.rank, adapter.alpha, adapter.layers) == (8, 160.0, "all")
    assert adapter.targets == ["q_proj", "v_proj"] and adapter.scale == 20.0
    assert (data.train, data.eval) == ("mine/train.jsonl", "mine/valid.jsonl")
    assert (data.train_on, data.max_length) == ("completion", 2048)
    assert (train.steps, train.gradient_accumulation, train.batch_size) == (250, 4, 2)
    assert (train.eval_every, train.save_every, train.eval_samples) == (50, 25, 50)
    assert (train.learning_rate, train.schedule, train.warmup_steps) == (2e-5, "cosine", 25)
    assert train.max_grad_norm is None and config.output == "adapters"
    assert draft.lacking == {}
    # It trains on prompts unless it is told not to.
    _, _, config = draft_of("model: m.gguf\ndata: mine\n", tmp_path)
    assert config.data.train_on == "all" and config.train.schedule == "constant"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base_model: m.gguf\nadapter: ia3\n", ("adapter", "ia3")),
        ("model_name_or_path: m.gguf\nstage: dpo\n", ("stage", "dpo")),
        ("model: m.gguf\nfine_tune_type: full\n", ("fine_tune_type", "full")),
        ("base_model: m.gguf\nmicro_batch_size: 0\n", ("micro_batch_size", "at least 1")),
        ("base_model: m.gguf\nval_set_size: 100\n", ("val_set_size", "100 rows")),
        ("base_model: m.gguf\ndatasets: [{path: a/b, type: alpaca, shards: 4}]\n",
         ("datasets.shards", "4")),
    ],
)  # fmt: skip
def test_what_has_no_counterpart(tmp_path: Path, text: str, words: tuple[str, str]) -> None:
    _, draft = converted(yaml.safe_load(text), tmp_path / "theirs.yaml")
    assert words[1] in draft.lacking[words[0]]
    assert f"Not taken over: {words[0]} (" in draft.text("theirs")


def test_the_command(tmp_path: Path) -> None:
    file, output = tmp_path / "ax.yml", tmp_path / "ours.yaml"
    file.write_text(AXOLOTL)
    arguments = ["convert-config", str(file), "--output", str(output)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    for words in ("from Axolotl's ax.yml", "Not taken over:", "loss_watchdog", "lora plan"):
        assert words in done.output
    assert load_config(str(output)).adapter.rank == 16
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, InputError) and "--force" in str(again.exception)
    assert CliRunner().invoke(app, [*arguments, "--force"]).exit_code == 0
    # Without data it can't run yet, which is said.
    file.write_text("base_model: m.gguf\n")
    bare = CliRunner().invoke(app, [*arguments, "--force"])
    assert "Before it can run:" in bare.output and "data" in bare.output


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {path: m.gguf}\n", "is a config of ours already"),
        ("lr: 3\n", "names no model as A"),
    ],
)
def test_files_of_no_tool(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        converted(yaml.safe_load(text), tmp_path / "x.yaml")
