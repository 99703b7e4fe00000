"""LLaMA-Factory's config (its examples and `hparams`) as ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora.config.conversion.draft import Draft, base_model, optimizer, schedule
from lora.shaders.errors import InputError
from lora.shaders.untrusted import read_json_object

_NAMES = {
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "adapter_name_or_path": "adapter.init_from",
    "loraplus_lr_ratio": "adapter.loraplus_lr_ratio",
    "cutoff_len": "data.max_length",
    "packing": "data.packing",
    "streaming": "data.streaming",
    "buffer_size": "data.shuffle_buffer",
    "val_size": "data.eval_share",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "per_device_train_batch_size": "train.batch_size",
    "num_train_epochs": "train.epochs",
    "learning_rate": "train.learning_rate",
    "weight_decay": "train.weight_decay",
    "adam_epsilon": "train.epsilon",
    "max_grad_norm": "train.max_grad_norm",
    "neftune_noise_alpha": "train.neftune_noise_alpha",
    "seed": "train.seed",
    "load_best_model_at_end": "train.load_best_model_at_end",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    "output_dir": "output",
    "hub_model_id": "hub",
}
_NEEDLESS = (
    "do_train", "do_eval", "trust_remote_code", "overwrite_cache", "preprocessing_num_workers",
    "dataloader_num_workers", "logging_steps", "plot_loss", "overwrite_output_dir", "bf16", "fp16",
    "ddp_timeout", "resume_from_checkpoint", "per_device_eval_batch_size", "eval_strategy",
    "evaluation_strategy", "save_strategy", "quantization_bit", "quantization_method",
    "flash_attn", "double_quantization", "neat_packing", "save_only_model", "deepspeed",
    "push_to_hub", "gradient_checkpointing", "disable_gradient_checkpointing", "use_unsloth",
    "enable_liger_kernel", "use_fast_tokenizer", "upcast_layernorm",
    "include_num_input_tokens_seen", "run_name", "tokenized_path", "low_cpu_mem_usage",
    "infer_backend", "ddp_find_unused_parameters",
)  # fmt: skip


# LLaMA-Factory's and transformers', where ours are others.
_DEFAULTS = {
    "adapter.rank": 8,
    "data.max_length": 2048,
    "train.batch_size": 8,
    "train.epochs": 3.0,
    "train.learning_rate": 5e-5,
    "train.schedule": "linear",
}


def convert(draft: Draft, folder: Path) -> None:
    """Takes over what there is.

    Args:
        folder: of the config, in which `dataset_dir` may lie.
    """
    base_model(draft, draft.take("model_name_or_path"), "model_name_or_path")
    stage, kind = draft.take("stage", "sft"), draft.take("finetuning_type", "lora")
    if stage not in ("sft", "pt"):
        draft.lacking["stage"] = f"{stage}; what is trained here is supervised"
    if kind != "lora":
        draft.lacking["finetuning_type"] = f"{kind}; adapters are LoRA's here"
    for theirs, variant in (("use_dora", "dora"), ("use_rslora", "rslora")):
        if draft.take(theirs):
            draft.set("adapter.variant", variant, theirs)
    targets = draft.take("lora_target")
    if targets is not None:
        names = [t.strip() for t in targets.split(",")] if isinstance(targets, str) else targets
        draft.set("adapter.targets", "all-linear" if names == ["all"] else names, "lora_target")
    _data(draft, folder)
    schedule(draft, draft.take("lr_scheduler_type"), "lr_scheduler_type")
    optimizer(draft, draft.take("optim"), "optim")
    beta1, beta2 = draft.take("adam_beta1"), draft.take("adam_beta2")
    if beta1 is not None or beta2 is not None:
        draft.set("train.betas", [beta1 or 0.9, beta2 or 0.999], "adam_beta1")
    steps = draft.take("max_steps")
    if isinstance(steps, int) and steps > 0:  # -1 stands for none
        draft.set("train.steps", steps, "max_steps")
    warmup = draft.take("warmup_steps")
    ratio = draft.take("warmup_ratio")
    if warmup:
        draft.set("train.warmup_steps", warmup, "warmup_steps")
    else:
        draft.set("train.warmup_ratio", ratio, "warmup_ratio")
    draft.set("train.eval_every", draft.take("eval_steps"), "eval_steps")
    metric = draft.take("metric_for_best_model")
    if metric is not None:
        draft.set("train.best", metric if metric.startswith("eval_") else f"eval_{metric}",
                  "metric_for_best_model")  # fmt: skip
    draft.take("greater_is_better")  # follows from the metric
    reporters = draft.take("report_to")
    names = reporters if isinstance(reporters, list) else [reporters]
    if reporters not in (None, "none", "all"):
        draft.set("train.report_to", names, "report_to")
    draft.rename(_NAMES)
    for key, value in _DEFAULTS.items():
        draft.values.setdefault(key, value)
    draft.values.setdefault("adapter.alpha", 2 * draft.values["adapter.rank"])
    if not {"train.warmup_ratio", "train.warmup_steps"} & set(draft.values):
        draft.values["train.warmup_ratio"] = 0.0
    draft.drop(*_NEEDLESS)
    if "train.eval_every" in draft.values and not {"data.eval", "data.eval_share"} & set(
        draft.values
    ):
        del draft.values["train.eval_every"]
        draft.lacking["eval_steps"] = "there is nothing to evaluate on"
    draft.values.setdefault("output", "runs/llama-factory")


def _data(draft: Draft, folder: Path) -> None:
    place = draft.take("dataset_dir", "data")
    known = _known_sets(folder, str(place))
    most = draft.take("max_samples")
    for theirs, ours in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        names = draft.take(theirs)
        if names is None:
            continue
        listed = names if isinstance(names, list) else [n.strip() for n in str(names).split(",")]
        sources = [_source(draft, name, known, str(place), theirs) for name in listed]
        if most is not None:
            sources = [
                (one if isinstance(one, dict) else {"path": one}) | {"max_samples": most}
                for one in sources
            ]
        draft.set(ours, sources[0] if len(sources) == 1 else sources, theirs)
    template = draft.take("template")
    if template not in (None, "default"):
        draft.notes.append(
            f"template: {template}: the GGUF's own is used; data.chat_template takes another, as "
            "Jinja."
        )
    thinking = draft.take("enable_thinking")
    if thinking is not None:
        draft.set("data.chat_template_kwargs", {"enable_thinking": thinking}, "enable_thinking")
    if draft.take("train_on_prompt"):
        draft.set("data.train_on", "all", "train_on_prompt")
    if draft.take("mask_history"):
        draft.set("data.train_on", "last", "mask_history")


def _known_sets(folder: Path, place: str) -> dict[str, Any]:
    """dataset_info.json: what the names of data sets stand for."""
    for start in (Path(), folder, folder.parent, folder.parent.parent):
        path = start / place / "dataset_info.json"
        if path.is_file():
            try:
                return read_json_object(path, 1 << 22)
            except (InputError, json.JSONDecodeError):
                return {}
    return {}


def _source(draft: Draft, name: str, known: dict[str, Any], place: str, theirs: str) -> Any:
    entry = known.get(name)
    if not isinstance(entry, dict):
        draft.notes.append(
            f"{theirs}: {name} is a name of dataset_info.json, which was not found in {place}; put "
            "in the file or the data set that it stands for."
        )
        return f"{place}/{name}.json"
    source: dict[str, Any] = {}
    if entry.get("file_name"):
        source["path"] = f"{place}/{entry['file_name']}"
    else:
        source["name"] = entry.get("hf_hub_url") or entry.get("ms_hub_url") or name
    for key, ours in (("subset", "config"), ("split", "split"), ("num_samples", "max_samples")):
        if entry.get(key):
            source[ours] = entry[key]
    columns = entry.get("columns")
    if isinstance(columns, dict):
        names = {"prompt": "instruction", "query": "input", "response": "output"}
        mapped = {names.get(k, k): v for k, v in columns.items()}
        source_columns = {k: v for k, v in mapped.items() if k != v and isinstance(v, str)}
        if source_columns:
            source["columns"] = source_columns
    if entry.get("formatting", "alpaca") == "sharegpt":
        tags = entry.get("tags")
        if isinstance(tags, dict):
            found = {"role": tags.get("role_tag"), "content": tags.get("content_tag")}
            source.setdefault("columns", {}).update({k: v for k, v in found.items() if v})
    if entry.get("ranking"):
        draft.lacking[theirs] = f"{name} is of preference pairs"
    return source["path"] if set(source) == {"path"} else source
