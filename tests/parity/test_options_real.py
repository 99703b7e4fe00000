"""Dropout and DoRA on the real SmolLM2 against PEFT: eight steps, a text each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora.config.schema import Config
from lora.data.batches import make_batch
from lora.data.examples import Example
from lora.forward.dropout import mask, matrix_key, row_keys, scale_of
from lora.training.session import TrainingSession
from tests.support.peft_reference import (
    ALPHA,
    LEARNING_RATE,
    RANK,
    SMOLLM2,
    load_peft_model,
    make_adapter,
    token_ids,
)

pytestmark = [pytest.mark.parity, pytest.mark.long]
P, SEED = 0.1, 4


def _with_our_masks(net: Any, state: dict[str, int]) -> None:
    """Puts the masks of ours in place of PEFT's dropout; `state` has the step and the example."""
    import torch

    class Given(torch.nn.Module):
        def __init__(self, path: str) -> None:
            super().__init__()
            self.key = matrix_key(path)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            keys = row_keys(SEED, state["step"], [state["step"]], [x.shape[1]])
            kept = mask(keys, self.key, x.shape[2], P) * scale_of(P)
            return x * torch.from_numpy(kept.astype(np.float32))

    for name, module in net.named_modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = Given(name.removeprefix("base_model.model."))


def _add_magnitudes(net: Any) -> None:
    """Away from the lengths that they begin with."""
    import torch

    for name, module in net.named_modules():
        if hasattr(module, "lora_magnitude_vector") and len(module.lora_magnitude_vector):
            weight = module.lora_magnitude_vector["default"].weight
            generator = torch.Generator().manual_seed(len(name))
            with torch.no_grad():
                weight *= 1 + 0.1 * torch.rand(weight.shape, generator=generator)


@pytest.mark.parametrize("option", ["dropout", "dora"])
def test_smollm2(option: str, smollm2: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    adapter, rows = tmp_path / "adapter", token_ids(smollm2)["train"]
    make_adapter(SMOLLM2, adapter)
    state = {"step": 0}
    net = load_peft_model(smollm2, adapter, trainable=True)
    if option == "dora":
        made = {n: p.detach().clone() for n, p in net.named_parameters() if "lora_" in n}
        settings = json.loads((adapter / "adapter_config.json").read_text())
        config = LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=settings["target_modules"], use_dora=True,
            task_type="CAUSAL_LM",
        )  # fmt: skip
        net = get_peft_model(net.unload(), config)
        net.load_state_dict(made, strict=False)
        _add_magnitudes(net)
        adapter = tmp_path / "dora"
        net.save_pretrained(adapter)
    else:
        _with_our_masks(net, state)
    net.train()
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    losses, norms = [], []
    for step, ids in enumerate(rows):
        state["step"] = step
        x = torch.tensor([ids])
        loss = net(input_ids=x, labels=x).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    values = {"dropout": P} if option == "dropout" else {"variant": "dora"}
    config = Config.model_validate(
        {
            "model": {"path": str(smollm2)},
            "adapter": {"rank": RANK, "alpha": ALPHA, "init_from": str(adapter), **values},
            "data": {"train": "none", "max_length": max(map(len, rows)), "shuffle": False},
            "train": {
                "steps": len(rows), "batch_size": 1, "learning_rate": LEARNING_RATE,
                "schedule": "constant", "warmup_ratio": 0.0, "seed": SEED,
            },
            "output": "none",
        }
    )  # fmt: skip
    arrays = [np.array(row, np.int32) for row in rows]
    examples = [Example(row, np.arange(len(row)) > 0, i) for i, row in enumerate(arrays)]
    with TrainingSession(config, examples=examples) as session:
        for example in examples:
            session.step([make_batch([example])])
        metrics = session.finished_steps(wait=True)
    print("losses:", [m.loss for m in metrics], losses)
    print("gradient norms:", [m.grad_norm for m in metrics], norms)
    np.testing.assert_allclose([m.loss for m in metrics], losses, rtol=5e-4)
    np.testing.assert_allclose([m.grad_norm for m in metrics], norms, rtol=5e-3)
