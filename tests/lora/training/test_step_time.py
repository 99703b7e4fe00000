"""How long a step will take, by `lora plan`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lora import TrainingSession
from lora.config.schema import Config, load_config
from lora.data.examples import Example
from lora.data.order import DataStream
from lora.forward.attention import visible_pairs
from lora.shaders.device import Device
from lora.training import step_time
from lora.training.device_state import SessionPlan
from lora.training.profiling import Peaks, kernel_table
from lora.training.workload import Workload
from tests.support.tiny_run import write_run


def config_of(folder: Path, *overrides: str) -> Config:
    return load_config(str(write_run(folder)), list(overrides))


def planned(device: Device, config: Config) -> SessionPlan:
    return SessionPlan.of(device.facts, Workload.open(config, train=True))


def test_an_average_micro_batch() -> None:
    """Four examples of 2, 3, 4 and 5 tokens, two a micro-batch, in the order given."""
    examples = [Example(np.arange(n, dtype=np.uint32), np.arange(n) > 0, n) for n in (2, 3, 4, 5)]
    stream = DataStream(examples, batch_size=2, gradient_accumulation=2, shuffle=False)
    usual = stream.usual_micro_batch()
    assert (usual.tokens, usual.squared_lengths, usual.a_step) == (7, 27, 2)
    assert usual.trained == 5


def test_about_what_the_kernels_take(tmp_path: Path, device: Device) -> None:
    """Of a tiny model, on a machine that may do other things; a wrong unit would be further off."""
    config = config_of(tmp_path)
    with TrainingSession(config, device=device) as session:
        assert session.stream is not None
        session.step(next(session.stream))
        session.finished_steps(wait=True)
        measured = sum(row.seconds for row in kernel_table(session))
    expected = step_time.expected_seconds(planned(device, config), device)
    assert measured / 10 < expected < 10 * measured


def test_attention_is_counted_by_examples(tmp_path: Path, device: Device) -> None:
    """Four examples of a quarter have a quarter of the pairs, nearly; nothing else changes."""
    with TrainingSession(config_of(tmp_path), device=device) as session:
        assert session.stream is not None
        session.step(next(session.stream))
        rows = next(
            dispatch.tensors[1].shape[0]
            for program in session.step_programs()
            for dispatch in program.dispatches
            if dispatch.template == "attention"
        )
        of_one, of_four = (
            {(row.kernel, row.label): row.flops for row in kernel_table(session, 1, lengths)}
            for lengths in (None, [rows // 4] * 4)
        )
    for key, flops in of_one.items():
        if key[0].startswith("attention") and flops:
            pairs = 4 * visible_pairs(rows // 4, None) / visible_pairs(rows, None)
            assert of_four[key] == pytest.approx(flops * pairs, rel=1e-6), key
        else:
            assert of_four[key] == flops, key


@pytest.fixture
def a_second_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product takes a second, and all else next to nothing."""
    monkeypatch.setattr(step_time, "_time", lambda *_: step_time._Timed(1.0, 1e18))
    monkeypatch.setattr(step_time, "measure_peaks", lambda _: Peaks(1e18, 1e18))


@pytest.mark.usefixtures("a_second_each")
def test_every_product_counts_as_often_as_it_runs(tmp_path: Path, device: Device) -> None:
    plan = planned(device, config_of(tmp_path))
    training = plan.programs.training
    assert training is not None
    products = [
        dispatch
        for program in (plan.programs.prefix, training.micro_batch)
        for dispatch in program.dispatches
        if dispatch.template.startswith("matmul_")
    ]
    assert len(products) > 10
    assert step_time.expected_seconds(plan, device) == pytest.approx(len(products), abs=0.5)
    twice = config_of(tmp_path, "train.gradient_accumulation=2")
    found = step_time.expected_seconds(planned(device, twice), device)
    stream = Workload.open(twice, train=True).stream()
    assert isinstance(stream, DataStream)
    assert found == pytest.approx(len(products) * stream.usual_micro_batch().a_step, abs=0.5)


@pytest.mark.usefixtures("a_second_each")
def test_a_prefix_that_is_kept_runs_in_the_first_epoch(tmp_path: Path, device: Device) -> None:
    def found(*more: str) -> tuple[SessionPlan, float]:
        plan = planned(device, config_of(tmp_path, "adapter.layers=[2]", *more))
        return plan, step_time.expected_seconds(plan, device)

    plan, once = found("train.epochs=1")
    prefix = sum(d.template.startswith("matmul_") for d in plan.programs.prefix.dispatches)
    assert prefix > 0 and plan.tensors.train_cache is not None
    assert found("train.epochs=4")[1] == pytest.approx(once - 3 / 4 * prefix, abs=0.5)
    _, off = found("train.epochs=4", "train.reuse_frozen_prefix=off")
    assert off == pytest.approx(once, abs=0.5)
