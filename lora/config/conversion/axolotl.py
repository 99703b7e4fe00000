"""Axolotl's config (docs.axolotl.ai, "Config Reference") as ours."""

from __future__ import annotations

from typing import Any

from lora.config.conversion.draft import Draft, base_model, optimizer, schedule

_NAMES = {
    "lora_r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target_modules": "adapter.targets",
    "lora_model_dir": "adapter.init_from",
    "loraplus_lr_ratio": "adapter.loraplus_lr_ratio",
    "sequence_len": "data.max_length",
    "sample_packing": "data.packing",
    "excess_length_strategy": "data.overflow",
    "shuffle_merged_datasets": "data.shuffle",
    "streaming": "data.streaming",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "micro_batch_size": "train.batch_size",
    "num_epochs": "train.epochs",
    "max_steps": "train.steps",
    "learning_rate": "train.learning_rate",
    "weight_decay": "train.weight_decay",
    "adam_epsilon": "train.epsilon",
    "max_grad_norm": "train.max_grad_norm",
    "warmup_steps": "train.warmup_steps",
    "neftune_noise_alpha": "train.neftune_noise_alpha",
    "seed": "train.seed",
    "early_stopping_patience": "train.early_stopping_patience",
    "load_best_model_at_end": "train.load_best_model_at_end",
    "metric_for_best_model": "train.best",
    "save_total_limit": "train.keep_checkpoints",
    "output_dir": "output",
    "hub_model_id": "hub",
}
# What is always so here, or decided by the GGUF.
_NEEDLESS = (
    "model_type", "tokenizer_type", "is_llama_derived_model", "load_in_8bit", "load_in_4bit",
    "strict", "pad_to_sequence_len", "eval_sample_packing", "bf16", "fp16", "tf32", "bfloat16",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "logging_steps", "flash_attention",
    "xformers_attention", "sdp_attention", "dataset_prepared_path", "group_by_length",
    "local_rank", "debug", "deepspeed", "fsdp", "fsdp_config", "dataset_processes",
    "dataloader_num_workers", "trust_remote_code", "tokenizer_use_fast", "lora_fan_in_fan_out",
    "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "eval_batch_size",
    "resume_from_checkpoint", "auto_resume_from_checkpoints", "save_safetensors", "wandb_entity",
    "wandb_watch", "wandb_log_model", "evaluation_strategy", "eval_strategy", "save_strategy",
    "ddp_timeout", "save_first_step",
)  # fmt: skip
_FORMATS = {"alpaca": "instruct", "chat_template": "chat", "completion": "text", "sharegpt": "chat",
            "input_output": None, "pretrain": "text"}  # fmt: skip


def convert(draft: Draft) -> None:
    """Takes over what there is."""
    base_model(draft, draft.take("base_model"), "base_model")
    kind = draft.take("adapter")
    if kind not in (None, "lora", "qlora"):
        draft.lacking["adapter"] = f"{kind}; adapters are LoRA's here"
    if draft.take("peft_use_dora"):
        draft.set("adapter.variant", "dora", "peft_use_dora")
    if draft.take("peft_use_rslora"):
        draft.set("adapter.variant", "rslora", "peft_use_rslora")
    if draft.take("lora_target_linear"):
        draft.take("lora_target_modules")
        draft.set("adapter.targets", "all-linear", "lora_target_linear")
    tokens = draft.take("peft_trainable_token_indices")
    if isinstance(tokens, dict) and set(tokens) == {"embed_tokens"}:
        tokens = tokens["embed_tokens"]
    if isinstance(tokens, dict):
        draft.lacking["peft_trainable_token_indices"] = "rows of the embedding alone are trained"
    elif tokens:
        draft.set("adapter.trainable_tokens", tokens, "peft_trainable_token_indices")
    _data(draft)
    schedule(draft, draft.take("lr_scheduler"), "lr_scheduler")
    optimizer(draft, draft.take("optimizer"), "optimizer")
    beta1, beta2 = draft.take("adam_beta1"), draft.take("adam_beta2")
    if beta1 is not None or beta2 is not None:
        draft.set("train.betas", [beta1 or 0.9, beta2 or 0.999], "adam_beta1")
    ratio = draft.take("warmup_ratio")
    if not draft.has("warmup_steps"):
        draft.set("train.warmup_ratio", ratio, "warmup_ratio")
    _times(draft)
    projects = {"wandb": draft.take("wandb_project"), "tensorboard": draft.take("use_tensorboard")}
    named = [name for name, value in projects.items() if value]
    if named:
        draft.set("train.report_to", named, "wandb_project")
    draft.rename(_NAMES)
    draft.drop(*_NEEDLESS)
    draft.values.setdefault("output", "runs/axolotl")


def _times(draft: Draft) -> None:
    for theirs, ours in (("eval", "train.eval_every"), ("save", "train.save_every")):
        steps = draft.take(f"{theirs}_steps")
        an_epoch = draft.take(f"{theirs}s_per_epoch")
        if isinstance(steps, int):
            draft.set(ours, steps, f"{theirs}_steps")
        elif an_epoch and theirs == "eval":
            draft.set(ours, f"{1 / float(an_epoch):.4g} epochs", "evals_per_epoch")
        elif an_epoch:
            draft.notes.append(
                "saves_per_epoch: checkpoints are saved by time here, every ten minutes "
                "(train.save_every takes steps, too)."
            )


def _data(draft: Draft) -> None:
    sources = draft.take("datasets")
    if sources is not None:
        draft.set("data.train", _sources(draft, sources, "datasets"), "datasets")
    held_out = draft.take("test_datasets")
    if held_out is not None:
        draft.set("data.eval", _sources(draft, held_out, "test_datasets"), "test_datasets")
    share = draft.take("val_set_size")
    if share and held_out is None:
        if isinstance(share, float) and share < 1:
            draft.set("data.eval_share", share, "val_set_size")
        else:
            draft.lacking["val_set_size"] = f"{share} rows; data.eval_share takes a share"
    if draft.take("train_on_inputs"):
        draft.set("data.train_on", "all", "train_on_inputs")
    template = draft.take("chat_template")
    jinja = draft.take("chat_template_jinja")
    if jinja is not None:
        draft.set("data.chat_template", jinja, "chat_template_jinja")
    elif template not in (None, "tokenizer_default", "jinja"):
        draft.notes.append(
            f"chat_template: {template}: the GGUF's own is used; data.chat_template takes another, "
            "as Jinja."
        )


def _sources(draft: Draft, given: Any, theirs: str) -> Any:
    found = []
    for one in given if isinstance(given, list) else [given]:
        if isinstance(one, str):
            found.append(one)
            continue
        if not isinstance(one, dict):
            draft.lacking[theirs] = "an entry that is no mapping"
            continue
        found.append(_source(draft, dict(one), theirs))
    return found[0] if len(found) == 1 else found


def _source(draft: Draft, one: dict[str, Any], theirs: str) -> Any:
    path, files = one.pop("path", None), one.pop("data_files", None)
    is_loader = path in ("json", "csv", "parquet", "text") and files
    place = (files[0] if isinstance(files, list) else files) if is_loader else path
    looks_local = str(place).startswith((".", "/", "~")) or "." in str(place).rpartition("/")[2]
    source: dict[str, Any] = {"path" if looks_local else "name": place}
    if one.get("name"):
        source["config"] = one.pop("name")
    split = one.pop("split", None)
    if split and (split != "train" or not looks_local):
        source["split"] = split
    own_kind = one.pop("type", None)
    if isinstance(own_kind, dict):
        draft.lacking[f"{theirs}.type"] = "a prompt format of its own; data.columns names columns"
        own_kind = None
    kind = str(own_kind or "").partition(".")[0]
    if _FORMATS.get(kind):
        source["format"] = _FORMATS[kind]
    elif kind and kind not in _FORMATS:
        draft.notes.append(f"{theirs}: type {kind}: the rows' columns decide (data.format: auto).")
    columns = {}
    if one.get("field_messages"):
        columns["messages"] = one.pop("field_messages")
    properties = one.pop("message_property_mappings", None)
    if isinstance(properties, dict):
        columns |= {k: v for k, v in properties.items() if k in ("role", "content")}
    if one.get("field"):
        columns["text"] = one.pop("field")
    columns = {ours: theirs_ for ours, theirs_ in columns.items() if ours != theirs_}
    if columns:
        source["columns"] = columns
    for name in ("roles_to_train", "train_on_eos"):
        if one.get(name):
            draft.set(f"data.{name}", one.pop(name), f"{theirs}.{name}")
    one.pop("ds_type", None)
    for key, value in one.items():
        if value not in (None, False, "", [], {}):
            draft.lacking[f"{theirs}.{key}"] = str(value)[:80]
    return place if set(source) == {"path"} else source
