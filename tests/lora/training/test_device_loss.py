"""A device that is lost mid-step, or has no memory left: what is said, and how a run goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lora import TrainingSession, run_training
from lora.data.batches import Batch
from lora.shaders.errors import DeviceMemoryError, GPUError, LoraError
from lora.training.checkpoint import checkpoints
from lora.training.endings import DeviceFullError, DeviceLostError, device_ended
from tests.support.tiny_run import write_run

ADAPTER = "adapter_model.safetensors"


def lose_at(session: TrainingSession, steps: Sequence[int]) -> None:
    """Destroys the device in the middle of some steps, as a driver's reset would."""
    left = list(steps)
    run = session._run_micro_batch

    def losing(programs: Any, batch: Batch) -> None:
        run(programs, batch)
        if left and session.steps_done + 1 == left[0]:
            left.pop(0)
            session.device.handle.wgpu.destroy()  # type: ignore[attr-defined]

    session._run_micro_batch = losing  # type: ignore[method-assign]


@pytest.fixture
def whole(tmp_path: Path) -> tuple[Path, bytes]:
    """A config, and the adapter of its run when nothing goes wrong."""
    path = write_run(tmp_path, train={"save_every": 3})
    output = run_training(TrainingSession.from_config(path, [f"output={tmp_path / 'whole'}"]))
    return path, (output / ADAPTER).read_bytes()


def test_the_run_ends_with_its_last_checkpoint(
    whole: tuple[Path, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    path, adapter = whole
    session = TrainingSession.from_config(path)
    lose_at(session, [5])
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(DeviceLostError, match=r"lost.*watchdog.*train\.max_submission_seconds"),
    ):
        run_training(session)
    output = path.parent / "run"
    (checkpoint,) = checkpoints(output)
    assert checkpoint.name == "step-000003"
    assert any(f"the last checkpoint is {checkpoint}" in line for line in caplog.messages)
    session.close()
    run_training(TrainingSession.from_config(path), resuming=True)
    assert (output / ADAPTER).read_bytes() == adapter


@pytest.mark.parametrize("steps", [[2], [5, 6], [4, 4, 8]])
def test_retry_goes_on_byte_for_byte(whole: tuple[Path, bytes], steps: list[int]) -> None:
    """Before the first checkpoint, behind one, and twice in the same step."""
    path, adapter = whole
    session = TrainingSession.from_config(path, ["train.on_device_loss=retry"])
    lose_at(session, steps)
    output = run_training(session)
    session.close()
    assert (output / ADAPTER).read_bytes() == adapter
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))


def test_what_was_evaluated_is_not_again(tmp_path: Path) -> None:
    """Lost before the first checkpoint, the run begins anew, but not its lines."""
    train = {"steps": 4, "eval_at_start": True, "on_device_loss": "retry"}
    asked = {"sample_prompts": ["say ab "], "sample_tokens": 2}
    session = TrainingSession.from_config(write_run(tmp_path, train=train | asked))
    lose_at(session, [2])
    output = run_training(session)
    session.close()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 4]
    samples = (output / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in samples] == [0, 4]


def test_it_is_retried_so_many_times(whole: tuple[Path, bytes]) -> None:
    path, _ = whole
    session = TrainingSession.from_config(path, ["train.on_device_loss=retry"])
    lose_at(session, [4, 4, 4, 4, 4])
    with pytest.raises(DeviceLostError):
        run_training(session)
    assert [p.name for p in checkpoints(path.parent / "run")] == ["step-000003"]


def test_what_is_said() -> None:
    full = device_ended(DeviceMemoryError("no room for 3 MiB (Not enough memory left)"), 4, "GPU")
    assert isinstance(full, DeviceFullError)
    assert "Lower train.batch_size or data.max_length, set train.recompute: on" in str(full)
    lost = device_ended(GPUError("Validation Error\n\n  Parent device is lost\n"), 4, "GPU")
    assert isinstance(lost, DeviceLostError) and not isinstance(lost, DeviceFullError)
    assert str(lost).startswith("After step 4: GPU was lost (Parent device is lost). Likely")
    other = device_ended(GPUError("a buffer is too small"), 4, "GPU")
    assert type(other) is LoraError and "refused what it was given" in str(other)


def test_a_device_without_memory_leaves_a_checkpoint(tmp_path: Path) -> None:
    """An evaluation finds no room; what was trained is still there."""
    path = write_run(tmp_path, train={"eval_every": 4})
    session = TrainingSession.from_config(path)

    def evaluate(**_: object) -> None:
        raise DeviceMemoryError("refused a buffer of 900 MiB (Not enough memory left)")

    session.evaluate = evaluate  # type: ignore[method-assign, assignment]
    with pytest.raises(DeviceFullError, match="has no memory left"):
        run_training(session)
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-000004"]


def test_submissions_are_as_long_as_asked_for(whole: tuple[Path, bytes]) -> None:
    """At first by a slow device's speed, then by what was measured; the numbers stay the same."""
    path, adapter = whole
    session = TrainingSession.from_config(path, ["train.max_submission_seconds=0.0005"])
    submissions = session._recording.submissions
    assert submissions.flops == pytest.approx(0.5 * 0.0005 * 2e11)
    output = run_training(session)
    measured = submissions.flops
    assert 0 < measured < 0.5 * 0.0005 * 2e11  # the software driver is slower than any GPU
    assert (output / ADAPTER).read_bytes() == adapter
    programs = session._programs.training
    assert programs is not None
    pieces = programs.micro_batch._pieces()
    assert all(sum(getattr(c, "flops", 0) for c in piece[:-1]) <= measured for piece in pieces)
    assert len(pieces) > 1
