"""Options of the adapter and of training against PEFT, transformers, TRL and PyTorch, live."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.option_runs import (
    RATE,
    Run,
    assert_alike,
    config_of,
    examples_of,
    mean_loss,
    peft_of,
    run_ours,
    run_theirs,
)
from tests.support.tiny_model import TinyModel
from tests.support.tiny_models import TINY_MODELS

pytestmark = pytest.mark.parity

FAMILIES = ("llama_head", "qwen3", "gemma3")


class Case:
    """A tiny model, its GGUF and its adapter."""

    def __init__(self, model: TinyModel, folder: Path) -> None:
        self.model, self.gguf, self.adapter = model, folder / "base.gguf", folder / "adapter"
        model.write_gguf(self.gguf)
        model.write_adapter(self.adapter)
        self.rows = model.token_rows()

    def ours(self, **sections: dict[str, Any]) -> Run:
        config = config_of(self.model, self.gguf, self.adapter, **sections)
        return run_ours(config, examples_of(self.model))

    def net(self, **settings: Any) -> Any:
        return peft_of(self.model, self.adapter, **settings)


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    yield Case(TINY_MODELS[request.param], tmp_path)


def lora_layers(net: Any) -> dict[str, Any]:
    """PEFT's layers by the module's path."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in net.named_modules()
        if hasattr(module, "lora_dropout")
    }


def test_without_options(case: Case) -> None:
    assert_alike(case.ours(), run_theirs(case.net(), case.rows))


def test_dropout(case: Case) -> None:
    """PEFT with the very masks that ours draws in place of its dropout."""
    import torch

    from lora.forward.dropout import mask, matrix_key, row_keys, scale_of

    p, seed, net = 0.25, 5, case.net()
    state = {"step": 0, "example": 0}

    class Given(torch.nn.Module):
        def __init__(self, path: str) -> None:
            super().__init__()
            self.key = matrix_key(path)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            keys = row_keys(seed, state["step"], [state["example"]], [x.shape[1]])
            kept = mask(keys, self.key, x.shape[2], p) * scale_of(p)
            return x * torch.from_numpy(kept.astype(np.float32))

    for path, layer in lora_layers(net).items():
        layer.lora_dropout["default"] = Given(path)

    def loss_of(net: Any, rows: list[list[int]], step: int) -> Any:
        state["step"] = step
        n_targets = sum(len(row) - 1 for row in rows)
        total = 0.0
        for number, row in enumerate(rows):
            state["example"] = number
            total = total + mean_loss(net, [row]) * ((len(row) - 1) / n_targets)
        return total

    theirs = run_theirs(net, case.rows, loss_of=loss_of)
    for recompute in ("off", "on"):
        ours = case.ours(adapter={"dropout": p}, train={"seed": seed, "recompute": recompute})
        assert_alike(ours, theirs)


def test_neftune(case: Case) -> None:
    """transformers' hook with our noise in place of its uniform_."""
    import torch

    from lora.forward.dropout import row_keys
    from lora.forward.embedding_noise import noise

    alpha, seed, net = 5.0, 3, case.net()
    state = {"step": 0, "example": 0}

    def hook(module: Any, _: Any, output: torch.Tensor) -> torch.Tensor:
        n, width = output.shape[1:]
        keys = row_keys(seed, state["step"], [state["example"]], [n])
        added = noise(keys, np.full(n, n), width, alpha)
        return output + torch.from_numpy(added.astype(np.float32))

    net.get_input_embeddings().register_forward_hook(hook)

    def loss_of(net: Any, rows: list[list[int]], step: int) -> Any:
        state["step"] = step
        n_targets = sum(len(row) - 1 for row in rows)
        total = 0.0
        for number, row in enumerate(rows):
            state["example"] = number
            total = total + mean_loss(net, [row]) * ((len(row) - 1) / n_targets)
        return total

    theirs = run_theirs(net, case.rows, loss_of=loss_of)
    assert_alike(case.ours(train={"seed": seed, "neftune_noise_alpha": alpha}), theirs)


def test_patterns(case: Case, tmp_path: Path) -> None:
    """Ranks and alphas by PEFT's patterns: PEFT takes what we write, and trains it alike."""
    from lora.training.session import TrainingSession

    options = {
        "rank_pattern": {"q_proj": 8, r"layers\.1\..*\.down_proj": 2},
        "alpha_pattern": {"v_proj": 3.0, "layers.0.mlp.up_proj": 12.0},
        "exclude": ["layers.0.self_attn.o_proj"],
        "init": "gaussian",
    }
    config = config_of(case.model, case.gguf, None, adapter=options)
    saved = tmp_path / "saved"
    with TrainingSession(config, examples=examples_of(case.model)) as session:
        modules = session.layout.to_modules(session.parameters())
        rng = np.random.default_rng(1)
        for a, b in modules.values():
            assert a.std() == pytest.approx(1 / len(a), rel=0.2)
            b[:] = rng.normal(0, 0.15, b.shape)
        session.memory.write(session.adapter.parameters, session.layout.from_modules(modules))
        session.save(saved)
    net = peft_of(case.model, saved)
    ranks = {path: layer.r["default"] for path, layer in lora_layers(net).items()}
    assert "model.layers.0.self_attn.o_proj" not in ranks
    assert ranks["model.layers.0.self_attn.q_proj"] == 8
    assert ranks["model.layers.1.mlp.down_proj"] == 2
    # At the usual rate here AdamW moves an element by a whole rate where rounding decides the sign.
    import torch

    rate = RATE / 10
    trained = [p for p in net.parameters() if p.requires_grad]
    theirs = run_theirs(net, case.rows, torch.optim.AdamW(trained, lr=rate, weight_decay=0.0))
    del options["init"]
    train = {"learning_rate": rate}
    config = config_of(case.model, case.gguf, saved, adapter=options, train=train)
    assert_alike(run_ours(config, examples_of(case.model)), theirs)


def per_token(net: Any, rows: list[list[int]], make: Any) -> Any:
    """The mean of a loss of (logits [n, vocab], labels [n]) over the shifted tokens of all rows."""
    import torch

    n_targets, total = sum(len(row) - 1 for row in rows), 0.0
    for row in rows:
        ids = torch.tensor([row])
        logits = net(input_ids=ids).logits
        total = total + make(logits, ids) * ((len(row) - 1) / n_targets)
    return total


def test_label_smoothing(case: Case) -> None:
    """transformers' LabelSmoother, as its Trainer calls it."""
    from transformers.trainer_pt_utils import LabelSmoother

    smoother = LabelSmoother(epsilon=0.2)

    def make(logits: Any, labels: Any) -> Any:
        return smoother({"logits": logits}, labels, shift_labels=True)

    theirs = run_theirs(
        case.net(), case.rows, loss_of=lambda net, rows, step: per_token(net, rows, make)
    )
    assert_alike(case.ours(train={"label_smoothing": 0.2}), theirs)


def test_dft(case: Case) -> None:
    """As TRL's SFTTrainer has it: −p · log p, the first p detached."""
    import torch

    def make(logits: Any, labels: Any) -> Any:
        log_p = torch.log_softmax(logits[:, :-1], -1).gather(-1, labels[:, 1:, None])
        return (-log_p.detach().exp() * log_p).mean()

    theirs = run_theirs(
        case.net(), case.rows, loss_of=lambda net, rows, step: per_token(net, rows, make)
    )
    assert_alike(case.ours(train={"loss_type": "dft"}), theirs)


def test_loraplus(case: Case) -> None:
    """PEFT's create_loraplus_optimizer."""
    import torch
    from peft.optimizers import create_loraplus_optimizer

    net = case.net()
    optimizer = create_loraplus_optimizer(
        net, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=4.0, loraplus_weight_decay=0.1
    )
    theirs = run_theirs(net, case.rows, optimizer)
    ours = case.ours(adapter={"loraplus_lr_ratio": 4.0}, train={"weight_decay": 0.1})
    assert_alike(ours, theirs)


def test_lion(case: Case) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    net, rate, betas = case.net(), 1e-4, (0.9, 0.99)
    trained = [p for p in net.parameters() if p.requires_grad]
    judge = bnb.optim.Lion(trained, lr=rate, betas=betas, weight_decay=0.1)
    theirs = run_theirs(net, case.rows, judge)
    train = {"optimizer": "lion", "learning_rate": rate, "betas": list(betas), "weight_decay": 0.1}
    assert_alike(case.ours(train=train), theirs)


def test_adamw_8bit(case: Case) -> None:
    """bitsandbytes' has blocks of its own for each tensor: alike, not the same."""
    bnb = pytest.importorskip("bitsandbytes")
    net = case.net()
    trained = [p for p in net.parameters() if p.requires_grad]
    judge = bnb.optim.AdamW8bit(trained, lr=RATE, weight_decay=0.0, min_8bit_size=1)
    theirs = run_theirs(net, case.rows, judge)
    ours = case.ours(train={"optimizer": "adamw_8bit"})
    plain = case.ours()
    away = max(abs(np.array(ours.losses) - theirs.losses))
    print("8 bits:", ours.losses[-1], theirs.losses[-1], "32 bits:", plain.losses[-1])
    fallen = theirs.losses[0] - theirs.losses[-1]
    assert away < 0.03 * fallen
    assert ours.losses != plain.losses


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("constant_with_warmup", {}),
        ("linear", {}),
        ("cosine", {}),
        ("cosine", {"num_cycles": 1.5}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("cosine_with_min_lr", {"min_lr": 3e-5, "num_cycles": 1.0}),
        ("cosine_with_restarts", {"num_cycles": 3}),
        ("inverse_sqrt", {}),
        ("inverse_sqrt", {"timescale": 7}),
        ("warmup_stable_decay", {"num_decay_steps": 9}),
        ("warmup_stable_decay", {"num_decay_steps": 9, "decay_type": "1-sqrt",
                                 "min_lr_ratio": 0.2}),
        ("warmup_stable_decay", {"num_decay_steps": 9, "decay_type": "linear",
                                 "num_stable_steps": 5}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedules(name: str, kwargs: dict[str, Any], warmup: int) -> None:
    """transformers' values after the warm-up, step by step."""
    import torch
    from transformers import get_scheduler

    from lora.optim.schedule import Schedule

    total, peak = 30, 2e-3
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    judge = get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=kwargs)
    ours = Schedule(name, total, peak, warmup, kwargs)
    for step in range(total):
        if step >= warmup:
            assert ours.rate(step) == pytest.approx(judge.get_last_lr()[0], rel=1e-12, abs=1e-18)
        optimizer.step()
        judge.step()


@pytest.mark.parametrize("name", ["llama_bias", "qwen3", "gemma3"])
def test_dora(name: str, tmp_path: Path) -> None:
    """PEFT's own initialization, and the trained magnitudes; the file read and written."""
    import torch

    from lora.training.session import TrainingSession

    case = Case(TINY_MODELS[name], tmp_path)
    options = {"variant": "dora"}
    config = config_of(case.model, case.gguf, None, adapter=options)
    saved = tmp_path / "saved"
    with TrainingSession(config, examples=examples_of(case.model)) as session:
        session.save(saved)
    new = peft_of(case.model, saved)
    for path, layer in lora_layers(new).items():
        lengths = torch.linalg.norm(layer.base_layer.weight, dim=1)
        found = layer.lora_magnitude_vector["default"].weight
        assert torch.allclose(lengths, found, rtol=1e-6), path
        with torch.no_grad():  # away from where it begins
            generator = torch.Generator().manual_seed(len(path))
            found *= 1 + 0.2 * torch.rand(found.shape, generator=generator)
            b = layer.lora_B["default"].weight
            b += 0.15 * torch.randn(b.shape, generator=generator)
    started = tmp_path / "started"
    new.save_pretrained(started)
    # AdamW's first step divides a gradient by its own size: one of 2e-9 beside others of 0.07,
    # which f32 can't tell from 3e-8, moves a weight by another step unless epsilon is above it.
    epsilon = 1e-6
    trained = [weight for weight in new.parameters() if weight.requires_grad]
    judge = torch.optim.AdamW(trained, lr=RATE, eps=epsilon, weight_decay=0.0)
    theirs = run_theirs(new, case.rows, judge)
    for recompute in ("off", "on"):
        train = {"recompute": recompute, "epsilon": epsilon}
        config = config_of(case.model, case.gguf, started, adapter=options, train=train)
        ours = run_ours(config, examples_of(case.model))
        assert_alike(ours, theirs)
