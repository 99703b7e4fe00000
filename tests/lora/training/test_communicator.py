"""Two processes that train one adapter, as two threads: what they add up, and what comes of it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora.config.schema import Config, load_config
from lora.data.batches import make_batch
from lora.shaders.device import Device
from lora.training.communicator import Communicator, SingleProcess
from lora.training.metrics import Metrics
from lora.training.session import TrainingSession
from tests.support.tiny_run import write_run

SIZE, STEPS = 2, 3


class _Meeting:
    """Where the threads put down what they add up."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(SIZE, timeout=120)
        self.values: list[np.ndarray] = [np.zeros(0)] * SIZE


class _OneOfTwo:
    size = SIZE

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self.rank = rank
        self._meeting = meeting

    def sum(self, values: np.ndarray) -> np.ndarray:
        meeting = self._meeting
        meeting.values[self.rank] = values
        meeting.barrier.wait()
        total = meeting.values[0] + meeting.values[1]
        meeting.barrier.wait()
        return total


def train(
    config: Config, is_cpu: bool, communicator: Communicator
) -> tuple[list[Metrics], np.ndarray]:
    """Three steps of two micro-batches: both where there is one process, else one's own."""
    with Device() as device:
        device.facts = replace(device.facts, is_cpu=is_cpu)
        session = TrainingSession(config, device=device, communicator=communicator)
        examples = session.workload.train_examples
        # Of different sizes: the mean is over all trained tokens, not of means.
        batches = [make_batch(examples[:2]), make_batch(examples[4:8])]
        for _ in range(STEPS):
            session.step(batches[communicator.rank :: communicator.size])
        metrics = session.finished_steps(wait=True)
        return metrics, session.parameters()


@pytest.mark.parametrize("is_cpu", [True, False], ids=["one slice", "four slices"])
def test_two_are_as_one(tmp_path: Path, is_cpu: bool) -> None:
    config = load_config(str(write_run(tmp_path, train={"tuning": "off", "batch_size": 4})))
    (wanted, alone), meeting = train(config, is_cpu, SingleProcess()), _Meeting()
    with ThreadPoolExecutor(SIZE) as pool:
        futures = [
            pool.submit(train, config, is_cpu, _OneOfTwo(rank, meeting)) for rank in range(SIZE)
        ]
        (first, one), (second, other) = (future.result() for future in futures)
    assert one.tobytes() == other.tobytes()
    # The same gradients, added up in another order.
    np.testing.assert_allclose(one, alone, rtol=0, atol=1e-5)
    assert np.abs(alone).max() > 0.05
    for mine, yours, theirs in zip(first, second, wanted, strict=True):
        assert mine == yours
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-6)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
        assert (mine.tokens, mine.trained_tokens) == (theirs.tokens, theirs.trained_tokens)
