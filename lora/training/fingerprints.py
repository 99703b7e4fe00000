"""What decides the numbers of a run, part by part: checkpoints hold it, resuming compares it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora.data.examples import Example
from lora.forward.gguf.file import GGUFFile
from lora.training.workload import Workload

if TYPE_CHECKING:
    from lora.config.schema import Config

_SAMPLE = 256  # bytes at both ends of each tensor: other weights under the same names are noticed
_NAMED = 4  # differences that one sentence names
# What a user may want to change on the way; the run goes on with it, and a line says so.
_FREE = (
    "processes",
    "train.comm_dtype",
    "train.learning_rate",
    "train.weight_decay",
    "train.max_grad_norm",
    "warm-up steps",
    "steps",
)

# What decides numbers, too, and stands in few configs.
_ADAPTER_OPTIONS = ("dropout", "rank_pattern", "alpha_pattern", "init", "loraplus_lr_ratio")
_TRAIN_OPTIONS = (
    "optimizer", "schedule_kwargs", "neftune_noise_alpha", "label_smoothing", "loss_type"
)  # fmt: skip


@dataclass(frozen=True)
class Course:
    """What decides a run's numbers and stands in no config.

    Attributes:
        loss: its name.
        processes: that train together.
        total_steps, warmup_steps: as they follow from the data.
        precision: as it follows from the device, where the config leaves it to that.
    """

    loss: str
    processes: int
    total_steps: int
    warmup_steps: int
    precision: str


def fingerprints(workload: Workload, course: Course) -> dict[str, Any]:
    """Of a run, as values that JSON can hold.

    Returns:
        `base`: digests of the file's metadata by key, of its tensors' names, shapes and types, and
        of samples of their data; `data`: of the token ids and of what is trained, in their order
        and without it; `settings`: by the config's key, as they were resolved.
    """
    found = {
        "base": _of_base(workload.gguf_file),
        "data": _of_examples(workload.train_examples),
        "settings": _of_settings(workload, course),
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What two fingerprints differ in, as pieces of a sentence.

    Returns:
        What a run can't go on with, and what it goes on with.
    """
    refused = [*_base_differences(then["base"], now["base"])]
    refused += _data_differences(then["data"], now["data"])
    free: list[str] = []
    for key in {**now["settings"], **then["settings"]}:
        value, before = now["settings"].get(key), then["settings"].get(key)
        if before is None and key == "train.comm_dtype":
            continue  # nothing travelled then
        if before != value:
            piece = f"{key} {_shown(before)}, and now it is {_shown(value)}"
            (free if key in _FREE else refused).append(piece)
    return refused, free


def _of_base(gguf_file: GGUFFile) -> dict[str, Any]:
    samples = []
    for tensor in gguf_file.tensors.values():
        rows = tensor.data
        if rows.nbytes:
            samples += [bytes(rows[:1][0, :_SAMPLE]), bytes(rows[-1:][0, -_SAMPLE:])]
    table = [
        f"{t.name} {t.type.name} {'x'.join(map(str, t.shape))}" for t in gguf_file.tensors.values()
    ]
    return {
        "metadata": {
            key: _digest([repr(value).encode()])[:16] for key, value in gguf_file.metadata.items()
        },
        "tensors": _digest(line.encode() for line in table),
        "samples": _digest(samples),
    }


def _of_examples(examples: Sequence[Example]) -> dict[str, Any]:
    ids = [np.ascontiguousarray(example.ids, "<i4").tobytes() for example in examples]
    masks = [np.packbits(example.trained).tobytes() for example in examples]
    each = sorted(_digest(pair) for pair in zip(ids, masks, strict=True))
    return {
        "examples": len(examples),
        "tokens": _digest(ids),
        "masks": _digest(masks),
        "in any order": _digest(digest.encode() for digest in each),
    }


def settings_differences(then: Mapping[str, Any], config: Config) -> list[str]:
    """Which settings a run can't go on with, of those that need neither model nor data to tell.

    Args:
        then: the fingerprints that a checkpoint holds.
    """
    now = json.loads(json.dumps(_of_config(config)))
    settings = {key: value for key, value in then["settings"].items() if key in now}
    return differences({**then, "settings": settings}, {**then, "settings": now})[0]


def _of_config(config: Config) -> dict[str, Any]:
    """Settings that are what the config says, whatever the model and the data are."""
    train, data, adapter = config.train, config.data, config.adapter
    return {
        "adapter.rank": adapter.rank,
        "adapter.alpha": adapter.alpha,
        "adapter.variant": adapter.variant,
        "data.packing": data.packing,
        "data.shuffle": data.shuffle,
        "data.max_length": data.max_length if data.packing else "any",
        "train.batch_size": train.batch_size,
        "train.seed": train.seed,
        "train.betas": list(train.betas),
        "train.epsilon": train.epsilon,
        "train.schedule": train.schedule,
    }


def _of_settings(workload: Workload, course: Course) -> dict[str, Any]:
    """What decides numbers, beside data and base; what only the order follows from included."""
    layout, train = workload.layout, workload.config.train
    return (_of_options(workload) | _of_config(workload.config)) | {
        "adapter.targets": sorted(layout.targets),
        "adapter.layers": list(layout.layers),
        # Of all processes that the run was begun with: so it stays where others go on with it.
        "train.gradient_accumulation": workload.micro_batches,
        "train.precision": course.precision,
        "the loss": course.loss,
        "processes": course.processes,
        **({"train.comm_dtype": train.comm_dtype} if course.processes > 1 else {}),
        "train.learning_rate": train.learning_rate,
        "train.weight_decay": train.weight_decay,
        "train.max_grad_norm": train.max_grad_norm,
        "warm-up steps": course.warmup_steps,
        "steps": course.total_steps,
    }


def _of_options(workload: Workload) -> dict[str, Any]:
    """Settings that are seldom given, where they are: checkpoints from before them go on, too."""
    config, layout = workload.config, workload.layout
    found: dict[str, Any] = {}
    adapter = config.adapter
    if adapter.exclude or layout.is_partial:
        found["the adapted matrices"] = sorted(layout.low_ranks())
    if layout.tokens:
        found["adapter.trainable_tokens"] = list(layout.tokens)
    for name, section, keys in (
        ("adapter", adapter, _ADAPTER_OPTIONS), ("train", config.train, _TRAIN_OPTIONS)
    ):  # fmt: skip
        for key in keys:
            value = getattr(section, key)
            if value != type(section).model_fields[key].default:
                found[f"{name}.{key}"] = value
    return found


def _base_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    keys = [
        key
        for key in sorted({*then["metadata"], *now["metadata"]})
        if then["metadata"].get(key) != now["metadata"].get(key)
    ]
    found = []
    if keys:
        more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
        found.append(f"another base model (its {', '.join(keys[:_NAMED])}{more} differ)")
    elif then["tensors"] != now["tensors"]:
        found.append("another base model (its tensors have other names, shapes or types)")
    elif then["samples"] != now["samples"]:
        found.append("another base model (its tensors hold other numbers)")
    return found


def _data_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    if then == now:
        return []
    if then["examples"] != now["examples"]:
        return [f"other data ({then['examples']} examples, and now there are {now['examples']})"]
    if then["in any order"] == now["in any order"]:
        return ["the same data in another order"]
    if then["tokens"] != now["tokens"]:
        return ["other data (the tokens differ)"]
    return ["other tokens of the data to train on (data.train_on and what goes with it)"]


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) < 80 else f"{text[:77]}…"


def _digest(pieces: Iterable[bytes]) -> str:
    """SHA-256 over pieces with their lengths: no two lists of pieces give the same bytes."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.hexdigest()
