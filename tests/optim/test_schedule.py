"""Learning rates against transformers' schedulers."""

from __future__ import annotations

import pytest

from lora.optim.schedule import learning_rate

SCHEDULES = ("constant", "linear", "cosine")


def rates(schedule: str, total_steps: int, warmup: int) -> list[float]:
    return [
        learning_rate(
            step, total_steps=total_steps, peak=2e-4, schedule=schedule, warmup_steps=warmup
        )
        for step in range(total_steps + 2)
    ]


def test_by_hand() -> None:
    # transformers' first step of a warm-up has rate 0; the peak comes at step `warmup_steps`.
    assert rates("constant", 4, 2) == pytest.approx([0, 1e-4, 2e-4, 2e-4, 2e-4, 2e-4])
    assert rates("linear", 6, 2) == pytest.approx(
        [0, 1e-4, 2e-4, 1.5e-4, 1e-4, 0.5e-4, 0, 0], abs=1e-18
    )
    assert rates("cosine", 4, 0)[:5] == pytest.approx(
        [2e-4, 2e-4 * (2 + 2**0.5) / 4, 1e-4, 2e-4 * (2 - 2**0.5) / 4, 0], abs=1e-18
    )


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="polynomial"):
        rates("polynomial", 3, 0)


@pytest.mark.parity
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (10, 0), (10, 3), (3, 3), (2, 5)])
def test_as_transformers(schedule: str, total: int, warmup: int) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
    make = {
        "constant": transformers.get_constant_schedule_with_warmup,
        "linear": transformers.get_linear_schedule_with_warmup,
        "cosine": transformers.get_cosine_schedule_with_warmup,
    }[schedule]
    lengths = {} if schedule == "constant" else {"num_training_steps": total}
    scheduler = make(optimizer, num_warmup_steps=warmup, **lengths)
    expected = []
    for _ in range(total + 2):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    # Both are float64; the order of the factors differs.
    assert rates(schedule, total, warmup) == pytest.approx(expected, rel=1e-12, abs=1e-18)
