"""Runs with options: resumed ones go on bit for bit, and masks follow the example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora import InputError, TrainingSession
from lora.backward.losses import LossTensors
from lora.config.schema import load_config
from lora.data.batches import make_batch
from lora.shaders.device import Device
from lora.shaders.program import Program
from lora.training.checkpoint import save_checkpoint
from lora.training.resuming import resume
from tests.support.tiny_run import write_run

OPTIONS = {
    "noisy, 8 bits": {
        "adapter": {
            "dropout": 0.2,
            "loraplus_lr_ratio": 4.0,
            "init": "gaussian",
            "trainable_tokens": [9, 4],
        },
        "train": {"neftune_noise_alpha": 5.0, "label_smoothing": 0.1, "optimizer": "adamw_8bit"},
    },
    "dora": {
        "adapter": {
            "variant": "dora",
            "layers": [1, 2],
            "loraplus_lr_ratio": 2.0,
            "trainable_tokens": [5, 6, 7, 300, 8],
        },
        "train": {"learning_rate": 1e-3, "weight_decay": 0.01},
    },
    "the embedding": {
        "adapter": {"targets": ["embed_tokens", "down_proj"], "dropout": 0.1, "layers": [2]},
        "train": {"weight_decay": 0.01, "learning_rate": 1e-3},
    },
    "lion, dft, patterns": {
        "adapter": {
            "rank_pattern": {"q_proj": 6},
            "alpha_pattern": {"v_proj": 3.0},
            "exclude": ["layers.1.mlp.up_proj"],
        },
        "train": {
            "optimizer": "lion",
            "loss_type": "dft",
            "learning_rate": 1e-3,
            "schedule": "cosine_with_min_lr",
            "schedule_kwargs": {"min_lr_rate": 0.1},
        },
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_resumed_run_is_the_same_bit_for_bit(
    tmp_path: Path, device: Device, options: dict[str, dict[str, Any]]
) -> None:
    adapter, train = options["adapter"], {"tuning": "off", "steps": 6, **options["train"]}
    config = load_config(str(write_run(tmp_path, adapter=adapter, train=train)))
    with TrainingSession(config, device=device) as session:
        assert session.stream is not None
        for step in range(6):
            if step == 3:
                save_checkpoint(session, tmp_path / "run")
            session.step(next(session.stream))
        whole = session.parameters()
        losses = [metrics.loss for metrics in session.finished_steps(wait=True)]
        state = session.moments()
        before = session.workload.initial
    assert np.isfinite(losses).all() and whole.tobytes() != before.tobytes()
    with TrainingSession(config, device=device) as session:
        assert session.stream is not None
        resume(session, tmp_path / "run")
        for _ in range(3):
            session.step(next(session.stream))
        assert session.parameters().tobytes() == whole.tobytes()
        again = [metrics.loss for metrics in session.finished_steps(wait=True)]
        assert again == losses[3:]
        for name, values in session.moments().items():
            assert values.tobytes() == state[name].tobytes(), name
    name = "adamw" if train.get("optimizer", "adamw") != "adamw" else "lion"
    other = load_config(str(tmp_path / "config.yaml"), [f"train.optimizer={name}"])
    with (
        TrainingSession(other, device=device) as session,
        pytest.raises(InputError, match=r"train\.optimizer"),
    ):
        resume(session, tmp_path / "run")


def test_masks_follow_the_example_wherever_it_lies(tmp_path: Path, device: Device) -> None:
    """Examples end to end, or each by itself in another order; recomputed or kept."""
    found: dict[str, np.ndarray] = {}
    for name, recompute, seed in (
        ("together", "off", 0), ("apart", "off", 0), ("recomputed", "on", 0),
        ("other", "off", 1),
    ):  # fmt: skip
        train = {"recompute": recompute, "seed": seed, "neftune_noise_alpha": 5.0, "tuning": "off"}
        path = write_run(tmp_path, adapter={"dropout": 0.3}, train=train)
        config = load_config(str(path))
        with TrainingSession(config, device=device) as session:
            rng = np.random.default_rng(3)
            modules = session.layout.to_modules(session.parameters())
            for a, b in modules.values():
                a[:], b[:] = rng.normal(size=a.shape) * 0.2, rng.normal(size=b.shape) * 0.2
            flat = session.layout.from_modules(modules)
            session.memory.write(session.adapter.parameters, flat)
            examples = list(session.workload.train_examples)[:3]
            batches = [make_batch(examples)]
            if name == "apart":
                batches = [make_batch([example]) for example in reversed(examples)]
            session.step(batches)
            found[name] = session.memory.read(session.adapter.gradients[0])
            # An evaluation has none of it, before a step or after one.
            losses = {session.evaluate(examples).loss for _ in range(2)}
            session.step(batches)
            assert len(losses) == 1
    size = np.abs(found["together"]).max()
    assert np.abs(found["together"] - found["apart"]).max() < 1e-5 * size
    assert found["together"].tobytes() == found["recomputed"].tobytes()
    assert np.abs(found["together"] - found["other"]).max() > 0.05 * size


class OwnLoss:
    reads_losses = False

    def record(self, program: Program, tensors: LossTensors) -> None:
        raise AssertionError("refused before")


@pytest.mark.parametrize("override", ["train.label_smoothing=0.1", "train.loss_type=dft"])
def test_a_loss_of_a_script_takes_no_other(tmp_path: Path, device: Device, override: str) -> None:
    config = load_config(str(write_run(tmp_path)), [override])
    with pytest.raises(InputError, match="was given a loss of its own"):
        TrainingSession(config, device=device, loss=OwnLoss())


def test_a_prefix_with_noise_is_not_kept(tmp_path: Path, device: Device) -> None:
    overrides = ["train.neftune_noise_alpha=5", "adapter.layers={last: 1}"]
    path = str(write_run(tmp_path))
    with TrainingSession(load_config(path, overrides), device=device) as session:
        assert session._cache is None
    config = load_config(path, [*overrides, "train.reuse_frozen_prefix=on"])
    with pytest.raises(InputError, match="the embeddings differ"):
        TrainingSession(config, device=device)


def test_a_decay_must_fit_behind_the_warm_up(tmp_path: Path, device: Device) -> None:
    overrides = [
        "train.schedule=warmup_stable_decay", "train.schedule_kwargs={num_decay_steps: 7}",
        "train.steps=6",
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"num_decay_steps \(7\)"):
        TrainingSession(load_config(str(write_run(tmp_path)), overrides), device=device)


def test_an_adapter_is_continued_by_its_own_kind(tmp_path: Path, device: Device) -> None:
    """With its magnitudes, ranks and scales, or not at all."""
    folder = tmp_path / "config.yaml"
    write_run(tmp_path, adapter={"variant": "dora"})
    for name, overrides in (
        ("dora", []), ("plain", ["adapter.variant=lora"]),
        ("patterns", ["adapter.variant=lora", "adapter.rank_pattern={q_proj: 2}"]),
    ):  # fmt: skip
        with TrainingSession(load_config(str(folder), overrides), device=device) as session:
            session.save(tmp_path / name)

    def begun(name: str, *overrides: str) -> np.ndarray:
        config = load_config(str(folder), [f"adapter.init_from={tmp_path / name}", *overrides])
        with TrainingSession(config, device=device, train=False) as session:
            return session.parameters()

    assert begun("dora").any()
    for name, overrides, words in (
        ("plain", (), "has no lora_magnitude_vector, and the config's adapter.variant is dora"),
        ("dora", ("adapter.variant=lora",), "set adapter.variant to dora"),
        ("patterns", ("adapter.variant=lora", "adapter.rank_pattern={q_proj: 1}"),
         "has .*q_proj with the rank 2 and the scale 3, but .* give it 1 and 6"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            begun(name, *overrides)
    assert begun("patterns", "adapter.variant=lora", "adapter.rank_pattern={q_proj: 2}").any()
