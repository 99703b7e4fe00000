"""Every key of the config does something: it is read, and what decides numbers changes them."""

from __future__ import annotations

import ast
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora.config.errors import dotted_keys
from lora.config.optimization import Optimization
from lora.config.schema import AdapterConfig, Config, load_config
from lora.optim.schedule import Schedule
from lora.shaders.facts import DeviceFacts
from lora.training.device_state import SessionPlan
from lora.training.workload import Workload
from tests.support.imports import module_files
from tests.support.renderings import CPU
from tests.support.tiny_run import write_run

SECTIONS = {"model", "adapter", "data", "train"}
# What a change of each key is shown with; beside it what must be there for it to have a meaning.
CHANGES: dict[str, tuple[str, ...]] = {
    "adapter.rank": ("adapter.rank=4",),
    "adapter.alpha": ("adapter.alpha=7",),
    "adapter.dropout": ("adapter.dropout=0.1",),
    "adapter.targets": ("adapter.targets=[q_proj]",),
    "adapter.exclude": ("adapter.exclude=[down_proj]",),
    "adapter.layers": ("adapter.layers=1-2",),
    "adapter.rank_pattern": ("adapter.rank_pattern={q_proj: 2}",),
    "adapter.alpha_pattern": ("adapter.alpha_pattern={q_proj: 2}",),
    "adapter.trainable_tokens": ("adapter.trainable_tokens=[5]",),
    "adapter.variant": ("adapter.variant=rslora",),
    "adapter.loraplus_lr_ratio": ("adapter.loraplus_lr_ratio=16",),
    "adapter.init": ("adapter.init=gaussian",),
    "adapter.init_from": ("adapter.init_from=SAVED",),
    "train.epochs": ("train.epochs=1",),
    "train.steps": ("train.steps=3",),
    "train.batch_size": ("train.batch_size=2",),
    "train.gradient_accumulation": ("train.gradient_accumulation=2",),
    "train.learning_rate": ("train.learning_rate=1e-3",),
    "train.schedule": ("train.schedule=linear",),
    "train.schedule_kwargs": ("train.schedule_kwargs={num_cycles: 1.5}",),
    "train.warmup_ratio": ("train.warmup_ratio=0.5",),
    "train.warmup_steps": ("train.warmup_ratio=null", "train.warmup_steps=3"),
    "train.optimizer": ("train.optimizer=lion",),
    "train.weight_decay": ("train.weight_decay=0.1",),
    "train.betas": ("train.betas=[0.9, 0.99]",),
    "train.epsilon": ("train.epsilon=1e-6",),
    "train.max_grad_norm": ("train.max_grad_norm=0.5",),
    "train.precision": ("train.precision=f16",),
    "train.recompute": ("train.recompute=on",),
    "train.reuse_frozen_prefix": ("adapter.layers={last: 1}", "train.reuse_frozen_prefix=off"),
    "train.neftune_noise_alpha": ("train.neftune_noise_alpha=5",),
    "train.label_smoothing": ("train.label_smoothing=0.1",),
    "train.loss_type": ("train.loss_type=dft",),
    "train.seed": ("train.seed=1",),
    "data.max_length": ("data.max_length=9",),
    "data.packing": ("data.packing=true",),
    "data.shuffle": ("data.shuffle=false",),
    "data.train_on": ("data.train_on=all",),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a tiny run, and an adapter that it may begin from."""
    folder = tmp_path_factory.mktemp("keys")
    write_run(folder)
    config = load_config(str(folder / "config.yaml"))
    from lora.adapters.peft_files import save_peft_adapter

    workload = Workload.open(config, train=True)
    flat = workload.layout.initial(7)
    save_peft_adapter(folder / "saved", workload.layout, flat, config)
    return folder


@cache
def facts() -> DeviceFacts:
    return CPU.facts


def effects(folder: Path, overrides: tuple[str, ...]) -> dict[str, str]:
    """Digests of all that decides what a session computes."""
    given = [text.replace("SAVED", str(folder / "saved")) for text in overrides]
    config = load_config(str(folder / "config.yaml"), given)
    workload = Workload.open(config, train=True)
    plan = SessionPlan.of(facts(), workload)
    stream = workload.stream()
    total = stream.total_steps
    warmup = config.train.resolve_warmup(total)
    schedule = Schedule(
        config.train.schedule, total, config.train.learning_rate, warmup,
        config.train.schedule_kwargs,
    )  # fmt: skip
    batches = [
        [batch.token_ids.tolist(), batch.targets.tolist(), batch.examples]
        for step in stream
        for batch in step
    ]
    training = plan.programs.training
    assert training is not None
    programs = (plan.programs.prefix, *training.all)
    found: dict[str, Any] = {
        "initial": hashlib.sha256(np.ascontiguousarray(workload.initial).tobytes()).hexdigest(),
        "kernels": [
            [d.label, sorted(d.constants.items()), d.workgroups]
            for program in programs
            for d in program.dispatches
        ],
        "memory": sorted(plan.allocated.items()),
        "cache": plan.tensors.train_cache is not None,
        "rates": [schedule.rate(step) for step in range(total)],
        "batches": batches,
        "steps": total,
    }
    return {name: json.dumps(value, default=str) for name, value in found.items()}


@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_key_changes_the_session(folder: Path, key: str) -> None:
    *needed, change = CHANGES[key]
    before, after = effects(folder, tuple(needed)), effects(folder, (*needed, change))
    assert [name for name in before if before[name] != after[name]], key


def test_all_keys_that_decide_numbers_are_walked() -> None:
    own = {f"adapter.{name}" for name in AdapterConfig.model_fields} - {"adapter.peft_layers"}
    own |= {f"train.{name}" for name in Optimization.model_fields}
    assert own <= set(CHANGES)
    assert set(CHANGES) <= set(dotted_keys(Config))


def test_every_key_is_read_somewhere() -> None:
    """By an attribute of its name, outside of the config's own files."""
    read = set()
    for module, path in module_files().items():
        if module.startswith("lora.config"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                read.add(node.value)  # getattr of a table of names
    # The config's own methods read these, and others call the methods.
    by_method = {
        "targets", "exclude", "layers", "rank_pattern", "alpha_pattern", "warmup_ratio",
        "warmup_steps", "variant",
    }  # fmt: skip
    keys = {key.rpartition(".")[2] for key in dotted_keys(Config)} - SECTIONS
    assert keys - read - by_method == set()
    config = ast.parse(Path(module_files()["lora.config.adapter_section"]).read_text())
    used = {n.attr for n in ast.walk(config) if isinstance(n, ast.Attribute)}
    assert {"exclude", "rank_pattern", "alpha_pattern", "targets", "layers"} <= used
