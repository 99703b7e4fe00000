"""mlx-lm's config (`mlx_lm.lora --config`, its lora_config.yaml) as ours."""

from __future__ import annotations

from typing import Any

from lora.config.conversion.draft import Draft, base_model, optimizer, schedule

_NEEDLESS = (
    "train", "test", "test_batches", "steps_per_report", "grad_checkpoint", "clear_cache_threshold",
    "project_name", "prompt_feature", "completion_feature",
)  # fmt: skip
_DEFAULT_RANK, _DEFAULT_SCALE = 8, 20.0  # of mlx-lm


def convert(draft: Draft) -> None:
    """Takes over what there is; what mlx-lm does by default and we don't is written down."""
    base_model(draft, draft.take("model"), "model")
    kind = draft.take("fine_tune_type", "lora")
    if kind == "dora":
        draft.set("adapter.variant", "dora", "fine_tune_type")
    elif kind != "lora":
        draft.lacking["fine_tune_type"] = f"{kind}; adapters are LoRA's here"
    _adapter(draft)
    _data(draft)
    accumulation = int(draft.take("grad_accumulation_steps", 1))
    draft.set("train.gradient_accumulation", accumulation, "grad_accumulation_steps")
    batch_size = draft.take("batch_size", 4)
    draft.set("train.batch_size", batch_size, "batch_size")
    for theirs, ours, default in (
        ("iters", "train.steps", 1000),
        ("steps_per_eval", "train.eval_every", 200),
        ("save_every", "train.save_every", 100),
    ):  # counted in micro-batches there
        iterations = draft.take(theirs, default)
        draft.set(ours, max(1, int(iterations) // accumulation), theirs)
    batches = draft.take("val_batches", 25)
    if isinstance(batches, int) and batches > 0:
        draft.set("train.eval_samples", batches * batch_size, "val_batches")
    draft.set("train.learning_rate", draft.take("learning_rate", 1e-5), "learning_rate")
    draft.set("train.seed", draft.take("seed"), "seed")
    optimizer(draft, draft.take("optimizer", "adam"), "optimizer")
    _schedule(draft, accumulation)
    reporters = draft.take("report_to")
    if reporters:
        names = reporters.split(",") if isinstance(reporters, str) else reporters
        draft.set("train.report_to", names, "report_to")
    draft.set("train.max_grad_norm", draft.take("max_grad_norm"), "max_grad_norm")
    if "train.max_grad_norm" not in draft.values:
        draft.values["train.max_grad_norm"] = None  # mlx-lm clips nothing
    draft.set("output", draft.take("adapter_path", "adapters"), "adapter_path")
    draft.drop(*_NEEDLESS)
    if draft.values.get("data.eval") is None:
        for key in ("train.eval_every", "train.eval_samples"):
            draft.values.pop(key, None)


def _adapter(draft: Draft) -> None:
    parameters = draft.take("lora_parameters", {})
    own = dict(parameters) if isinstance(parameters, dict) else {}
    rank = own.pop("rank", _DEFAULT_RANK)
    scale = own.pop("scale", None)
    alpha = own.pop("alpha", None)
    if alpha is None:
        alpha = float(_DEFAULT_SCALE if scale is None else scale) * rank
    draft.set("adapter.rank", rank, "lora_parameters.rank")
    draft.set("adapter.alpha", alpha, "lora_parameters.scale")
    draft.set("adapter.dropout", own.pop("dropout", None), "lora_parameters.dropout")
    keys = own.pop("keys", None)
    if isinstance(keys, list):
        names = list(dict.fromkeys(str(key).rpartition(".")[2] for key in keys))
        draft.set("adapter.targets", names, "lora_parameters.keys")
    for key, value in own.items():
        draft.lacking[f"lora_parameters.{key}"] = str(value)[:80]
    layers = draft.take("num_layers", 16)
    draft.set("adapter.layers", "all" if layers == -1 else {"last": layers}, "num_layers")
    draft.set("adapter.init_from", draft.take("resume_adapter_file"), "resume_adapter_file")


def _data(draft: Draft) -> None:
    remote = draft.take("hf_dataset")
    place = draft.take("data")
    if isinstance(remote, dict):
        source: dict[str, Any] = {"name": remote.get("path") or remote.get("name")}
        if remote.get("train_split"):
            source["split"] = remote["train_split"]
        draft.set("data.train", source, "hf_dataset")
        if remote.get("valid_split"):
            held_out = {**source, "split": remote["valid_split"]}
            draft.set("data.eval", held_out, "hf_dataset")
    elif place is not None:
        text = str(place).rstrip("/")
        if text.count("/") == 1 and not text.startswith((".", "/", "~")):
            draft.notes.append(
                f"data: {text} is taken for a directory; of a data set of the Hub give its name "
                "as data.train."
            )
        draft.set("data.train", f"{text}/train.jsonl", "data")
        draft.set("data.eval", f"{text}/valid.jsonl", "data")
    if not draft.take("mask_prompt", False):
        draft.set("data.train_on", "all", "mask_prompt")
    draft.set("data.max_length", draft.take("max_seq_length", 2048), "max_seq_length")


def _schedule(draft: Draft, accumulation: int) -> None:
    given = draft.take("lr_schedule")
    if not isinstance(given, dict):
        draft.set("train.schedule", "constant", "lr_schedule")
        draft.set("train.warmup_ratio", 0.0, "lr_schedule")
        return
    own = dict(given)
    schedule(draft, own.pop("name", None), "lr_schedule.name")
    warmup = own.pop("warmup", 0)
    draft.set("train.warmup_steps", int(warmup) // accumulation, "lr_schedule.warmup")
    arguments = own.pop("arguments", None)
    if isinstance(arguments, list) and arguments:
        draft.set("train.learning_rate", arguments[0], "lr_schedule.arguments")
        if len(arguments) > 1:
            draft.notes.append(
                "lr_schedule.arguments: the rate falls over the whole run here, to zero."
            )
    own.pop("warmup_init", None)
