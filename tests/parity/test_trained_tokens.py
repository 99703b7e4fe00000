"""Rows of the embedding that are trained themselves, against PEFT's trainable_token_indices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.option_runs import (
    RATE,
    assert_alike,
    config_of,
    examples_of,
    peft_of,
    run_ours,
    run_theirs,
)
from tests.support.tiny_model import TinyModel
from tests.support.tiny_models import TINY_MODELS

pytestmark = pytest.mark.parity

# A head of its own; the embedding as head; that with a scale and a cap of its own.
FAMILIES = ("llama_head", "qwen3", "gemma2")


def tokens_of(model: TinyModel) -> list[int]:
    """Two that occur (one often), one that occurs nowhere, in no order."""
    ids, counts = np.unique(np.concatenate(model.token_rows()), return_counts=True)
    absent = next(n for n in range(model.config["vocab_size"]) if n not in ids)
    return [int(ids[counts.argmax()]), absent, int(ids[counts.argmin()])]


def begun(model: TinyModel, folder: Path, **options: Any) -> tuple[Path, Path]:
    """The model's GGUF, and an adapter that we began and moved away from its beginning."""
    from lora.training.session import TrainingSession

    gguf, saved = folder / "base.gguf", folder / "saved"
    model.write_gguf(gguf)
    with TrainingSession(
        config_of(model, gguf, None, adapter=options), examples=examples_of(model)
    ) as session:
        layout, flat, rng = session.layout, session.parameters(), np.random.default_rng(3)
        modules = layout.to_modules(flat)
        for _, b in modules.values():
            b[:] = rng.normal(0, 0.15, b.shape)
        new = layout.from_modules(modules)
        layout.set_magnitudes(new, layout.magnitudes(flat))
        rows = layout.trained_tokens(flat)
        layout.trained_tokens(new)[:] = rows + rng.normal(0, 0.3 * rows.std(), rows.shape)
        session.set_parameters(new)
        session.save(saved)
    return gguf, saved


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_eight_steps(name: str, head: bool, tmp_path: Path) -> None:
    """Kept and recomputed; few layers adapted, since the gradient goes through all of them."""
    model = TINY_MODELS[name]
    targets = ["q_proj", "lm_head"] if head else ["q_proj"]
    options = {"trainable_tokens": tokens_of(model), "layers": [1], "targets": targets}
    gguf, saved = begun(model, tmp_path, **options)
    net = peft_of(model, saved)
    theirs = run_theirs(net, model.token_rows())
    for recompute in ("off", "on"):
        config = config_of(model, gguf, saved, adapter=options, train={"recompute": recompute})
        assert_alike(run_ours(config, examples_of(model)), theirs)


def test_with_dora_and_rates_of_its_own(tmp_path: Path) -> None:
    """PEFT's create_loraplus_optimizer: rows of tokens have A's rate, and the weight decay."""
    import torch
    from peft.optimizers import create_loraplus_optimizer

    model = TINY_MODELS["qwen3"]
    options = {"trainable_tokens": tokens_of(model), "variant": "dora", "targets": ["v_proj"]}
    gguf, saved = begun(model, tmp_path, **options)
    net = peft_of(model, saved)
    optimizer = create_loraplus_optimizer(
        net, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=4.0, loraplus_weight_decay=0.1
    )
    theirs = run_theirs(net, model.token_rows(), optimizer)
    options["loraplus_lr_ratio"] = 4.0
    config = config_of(model, gguf, saved, adapter=options, train={"weight_decay": 0.1})
    assert_alike(run_ours(config, examples_of(model)), theirs)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama_head", ["q_proj", "lm_head"]),
        ("qwen3", ["q_proj", "lm_head"]),
        ("gemma2", ["q_proj", "down_proj"]),
    ],
)
def test_files_go_both_ways(name: str, targets: list[str], tmp_path: Path) -> None:
    """What PEFT saves is what we saved, and merged by us it gives PEFT's logits.

    So does its own merge_and_unload(), but where a head is adapted and is the embedding: there it
    adds the head's B · A to the embedding, too, the two being one tensor (0.21.2).
    """
    import safetensors.numpy

    from lora.export.to_gguf import export
    from lora.generation.opening import open_generator
    from tests.support.tiny_judge import logits

    model = TINY_MODELS[name]
    options = {"trainable_tokens": tokens_of(model), "targets": targets}
    gguf, saved = begun(model, tmp_path, **options)
    net = peft_of(model, saved)
    theirs = tmp_path / "theirs"
    net.save_pretrained(theirs)
    ours, back = (
        safetensors.numpy.load_file(folder / "adapter_model.safetensors")
        for folder in (saved, theirs)
    )
    assert set(ours) == set(back)
    for tensor, values in ours.items():
        np.testing.assert_array_equal(back[tensor], values)
    merged = export(theirs, "merged-gguf", base=str(gguf), kind="F32").path
    row = model.token_rows()[0]
    judge = logits(net.eval(), [row])[-1]
    if name != "qwen3":
        unloaded = logits(net.merge_and_unload().eval(), [row])[-1]
        np.testing.assert_allclose(unloaded, judge, rtol=0, atol=2e-4)
    with open_generator(str(gguf), {"theirs": theirs}, max_length=64) as generator:
        adapted = generator.next_logits(row, adapter="theirs")
    with open_generator(str(merged), max_length=64) as generator:
        found = generator.next_logits(row, adapter=None)
    # f32 sums in other orders, of logits of up to 20; W + change is rounded once more.
    np.testing.assert_allclose(adapted, judge, rtol=0, atol=2e-4)
    np.testing.assert_allclose(found, judge, rtol=0, atol=2e-4)
