"""Two processes that train one adapter, as two threads: what they add up, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora.config.schema import Config, load_config
from lora.shaders.device import Device
from lora.training import exchange
from lora.training.communicator import Communicator, SingleProcess
from lora.training.metrics import EvalResult, Metrics
from lora.training.session import TrainingSession
from tests.support.thread_ranks import ThreadRanks
from tests.support.tiny_run import write_run

SIZE, STEPS = 2, 4


class Trained:
    """What a process has after some steps."""

    def __init__(self, config: Config, device: Device, communicator: Communicator) -> None:
        with TrainingSession(
            config, device=device, communicator=communicator, processes=SIZE
        ) as session:
            self.n_pieces = len(session._training().pieces)
            self.gradients, self.batches = [], []
            assert session.stream is not None
            for batches in session.stream:
                session.step(batches)
                self.batches.append(batches)
                self.gradients.append(session.memory.read(session.adapter.gradients[0]))
            self.metrics: list[Metrics] = session.finished_steps(wait=True)
            self.adapter = session.parameters()
            self.evaluated: EvalResult = session.evaluate()


@pytest.fixture(scope="module")
def devices() -> Iterator[list[Device]]:
    """One a thread. wgpu-native can't open one while another thread compiles."""
    opened = [Device() for _ in range(SIZE)]
    yield opened
    for device in opened:
        device.close()


Train = Callable[..., tuple[Trained, list[Trained]]]


@pytest.fixture
def trained(devices: list[Device]) -> Iterator[Train]:
    """Trains by one process, and by two; without matrix units, which compile for minutes here."""
    facts = [device.facts for device in devices]

    def train(config: Config, is_cpu: bool = True) -> tuple[Trained, list[Trained]]:
        for device in devices:
            device.facts = replace(device.facts, is_cpu=is_cpu, matrix_shapes=())
        alone = Trained(config, devices[0], SingleProcess())
        with ThreadPoolExecutor(SIZE) as pool:
            return alone, list(
                pool.map(Trained, [config] * SIZE, devices, ThreadRanks(SIZE).communicators)
            )

    yield train
    for device, before in zip(devices, facts, strict=True):
        device.facts = before


@pytest.mark.parametrize(
    ("is_cpu", "data"),
    [(True, {}), (False, {}), (True, {"packing": True}), (True, {"streaming": True})],
    ids=["one slice", "four slices", "packing", "streaming"],
)
def test_two_are_as_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trained: Train,
    is_cpu: bool,
    data: dict[str, Any],
) -> None:
    """Their gradients to 1e-6 of the largest, their losses to 1e-6, both with the same bytes."""
    monkeypatch.setattr(exchange, "LEAST_PIECE", 1024)
    train = {"tuning": "off", "batch_size": 2, "gradient_accumulation": 2, "steps": STEPS}
    config = load_config(str(write_run(tmp_path, n_rows=14, train=train, data=data)))
    alone, (one, other) = trained(config, is_cpu)
    assert one.n_pieces == 3 and alone.n_pieces == 0
    assert one.adapter.tobytes() == other.adapter.tobytes()
    for mine, yours, theirs in zip(one.metrics, other.metrics, alone.metrics, strict=True):
        assert replace(mine, ranks=None) == replace(yours, ranks=None)
        assert mine.ranks is not None and len(mine.ranks.seconds) == SIZE
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-6)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
        assert (mine.tokens, mine.trained_tokens) == (theirs.tokens, theirs.trained_tokens)
        assert mine.epoch == theirs.epoch
    # The first step's adapters are the same to the last bit, so that its gradients can be compared.
    for mine, yours in zip(one.gradients, other.gradients, strict=True):
        assert mine.tobytes() == yours.tobytes()
    wanted = alone.gradients[0]
    if is_cpu:  # with slices the sum isn't left in the first before it is clipped
        assert np.abs(one.gradients[0] - wanted).max() <= 1e-6 * np.abs(wanted).max()
    np.testing.assert_allclose(one.adapter, alone.adapter, rtol=0, atol=1e-5)
    assert np.abs(alone.adapter).max() > 0.05
    # Every micro-batch is somebody's: the steps of one process, dealt.
    for first, second, whole in zip(one.batches, other.batches, alone.batches, strict=True):
        dealt = {batch.place: batch for batch in (*first, *second)}
        assert [dealt[place].examples for place in sorted(dealt)] == [b.examples for b in whole]
    assert one.evaluated == other.evaluated
    assert one.evaluated.loss == pytest.approx(alone.evaluated.loss, rel=1e-4)
    assert one.evaluated.n_tokens == alone.evaluated.n_tokens


@pytest.mark.parametrize(
    ("train", "adapter"),
    [
        (
            {"neftune_noise_alpha": 5.0, "label_smoothing": 0.1},
            {"dropout": 0.3, "loraplus_lr_ratio": 2.0, "trainable_tokens": [4, 9, 30]},
        ),
        ({}, {"variant": "dora"}),
        ({}, {"targets": ["embed_tokens", "v_proj"]}),
    ],
    ids=["dropout, noise, tokens", "dora", "embedding"],
)
def test_options_are_the_same_for_two(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trained: Train,
    train: dict[str, Any],
    adapter: dict[str, Any],
) -> None:
    """Masks and noise follow the example, whichever process has it; magnitudes are summed, too."""
    monkeypatch.setattr(exchange, "LEAST_PIECE", 1024)
    common = {"tuning": "off", "batch_size": 2, "gradient_accumulation": 2, "steps": STEPS}
    path = write_run(tmp_path, n_rows=14, train=common | train, adapter=adapter)
    alone, (one, other) = trained(load_config(str(path)))
    assert one.adapter.tobytes() == other.adapter.tobytes()
    for mine, theirs in zip(one.metrics, alone.metrics, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-6)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
    np.testing.assert_allclose(one.adapter, alone.adapter, rtol=0, atol=2e-5)


def test_a_step_may_have_fewer_micro_batches_than_processes(tmp_path: Path, trained: Train) -> None:
    """An epoch of three: two in the first step, one in the second."""
    train = {"tuning": "off", "batch_size": 4, "epochs": 1}
    config = load_config(str(write_run(tmp_path, train=train)))
    alone, (one, other) = trained(config)
    assert [len(batches) for batches in one.batches] == [1, 1]
    assert [len(batches) for batches in other.batches] == [1, 0]
    assert one.adapter.tobytes() == other.adapter.tobytes()
    np.testing.assert_allclose(one.adapter, alone.adapter, rtol=0, atol=1e-6)


def test_submissions_that_are_bounded_change_nothing(tmp_path: Path, trained: Train) -> None:
    """The second micro-batch is then timed as a whole, and not sent in pieces."""
    train = {"tuning": "off", "batch_size": 2, "steps": STEPS}
    config = load_config(str(write_run(tmp_path, train=train)))
    _, (wanted, _) = trained(config)
    bounded = config.model_copy(
        update={"train": config.train.model_copy(update={"max_submission_seconds": 0.1})}
    )
    _, (found, _) = trained(bounded)
    assert found.adapter.tobytes() == wanted.adapter.tobytes()


def test_f16_with_feedback_learns_what_f32_learns(tmp_path: Path, trained: Train) -> None:
    train = {"tuning": "off", "batch_size": 2, "steps": 12}
    config = load_config(str(write_run(tmp_path, n_rows=14, train=train)))
    halved = config.model_copy(
        update={"train": config.train.model_copy(update={"comm_dtype": "f16"})}
    )
    _, (wanted, _) = trained(config)
    _, (one, other) = trained(halved)
    assert one.adapter.tobytes() == other.adapter.tobytes() != wanted.adapter.tobytes()
    # A gradient is off by up to 2^-11 of what is sent; AdamW divides by its size.
    np.testing.assert_allclose(
        [m.loss for m in one.metrics], [m.loss for m in wanted.metrics], rtol=1e-2
    )


def test_what_threads_tell_each_other() -> None:
    """The stand-in itself: values in the order of ranks, sums and broadcasts."""
    ranks = ThreadRanks(3)

    def talk(one: Communicator) -> Any:
        total = one.sum(np.full(2, one.rank + 1.0))
        return one.gather(one.rank), one.broadcast(f"from {one.rank}"), total.tolist()

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(talk, ranks.communicators))
    assert found == [([0, 1, 2], "from 0", [6.0, 6.0])] * 3
    assert [one.local_rank for one in ranks.communicators] == [0, 1, 2]
