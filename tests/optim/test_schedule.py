"""Learning rates: the climb by hand, the decay against transformers' schedulers."""

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
    # The climb is (step + 1) / warmup: no step is lost, and the peak comes with the last of it.
    assert rates("constant", 4, 2) == pytest.approx([1e-4, 2e-4, 2e-4, 2e-4, 2e-4, 2e-4])
    assert rates("linear", 6, 2) == pytest.approx(
        [1e-4, 2e-4, 2e-4, 1.5e-4, 1e-4, 0.5e-4, 0, 0], abs=1e-18
    )
    assert rates("linear", 3, 3)[:3] == pytest.approx([2e-4 / 3, 4e-4 / 3, 2e-4])
    assert rates("cosine", 4, 0)[:5] == pytest.approx(
        [2e-4, 2e-4 * (2 + 2**0.5) / 4, 1e-4, 2e-4 * (2 - 2**0.5) / 4, 0], abs=1e-18
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_of_one_step_trains(schedule: str) -> None:
    """Whether or not that one step is the whole warm-up, as the default ratio makes it."""
    assert [rates(schedule, 1, warmup)[0] for warmup in (0, 1)] == [2e-4, 2e-4]


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="polynomial"):
        rates("polynomial", 3, 0)


@pytest.mark.parity
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (10, 0), (10, 3), (3, 3)])
def test_the_decay_is_that_of_transformers(schedule: str, total: int, warmup: int) -> None:
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
    decay = rates(schedule, total, warmup)[warmup:]
    assert decay == pytest.approx(expected[warmup:], rel=1e-12, abs=1e-18)
