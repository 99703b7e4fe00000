"""A training step as data: in another process it does what it does here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lora.config.schema import load_config
from lora.data.batches import sequential_batches
from lora.optim.adamw import step_words
from lora.shaders.device import Device
from lora.shaders.errors import InputError
from lora.shaders.memory import CountingMemory
from lora.shaders.program import Dispatch, Program
from lora.shaders.program_data import kernels_digest, load_programs, save_programs
from lora.shaders.recording import Recording
from lora.training.programs import loss_weight_words
from lora.training.session import TrainingSession
from tests.support.tiny_run import write_run

STEPS = ("begin", "prefix", "micro_batch", "finish")
ELSEWHERE = """
import sys
from pathlib import Path
import numpy as np
from lora.optim.adamw import step_words
from lora.shaders.device import Device
from lora.shaders.program_data import load_programs

device = Device()
loaded = load_programs(Path(sys.argv[1]), device.recording())
for _ in range(2):
    for name in ("begin", "prefix", "micro_batch", "finish"):
        loaded.programs[name].run()
np.savez(sys.argv[2], **{name: device.memory.read(t) for name, t in loaded.tensors.items()})
"""


@pytest.fixture
def session(tmp_path: Path, device: Device) -> TrainingSession:
    """A session whose device holds the inputs of a step; only its last two layers are adapted."""
    config = write_run(tmp_path, adapter={"layers": {"last": 2}}, train={"tuning": "off"})
    session = TrainingSession(load_config(str(config)), device=device)
    batch = next(sequential_batches(session.workload.train_examples, 3))
    session.inputs.write(
        device.memory, batch.token_ids, batch.positions, batch.segment_start, batch.segment_end,
        batch.targets,
    )  # fmt: skip
    programs = session._programs.training
    device.memory.write(
        programs.loss_weight, loss_weight_words(batch.n_trained, programs.loss_scale)
    )
    device.memory.write(programs.step_words, step_words(0.01, 1, (0.9, 0.999)))
    return session


def programs_of(session: TrainingSession) -> dict[str, Program]:
    programs = session._programs.training
    assert programs is not None
    return dict(
        zip(
            STEPS,
            (programs.begin, session._programs.prefix, programs.micro_batch, programs.finish),
            strict=True,
        )
    )


def test_the_same_bits_in_another_process(
    session: TrainingSession, device: Device, tmp_path: Path
) -> None:
    programs = programs_of(session)
    path, found = tmp_path / "step.safetensors", tmp_path / "found.npz"
    adapter = session.adapter
    tensors = {
        "parameters": adapter.parameters, "gradients": adapter.gradients[0],
        "moment": adapter.optimizer.tensors["second_moment"], "metrics": session._act.metrics,
    }  # fmt: skip
    save_programs(path, programs, tensors)
    before = session.parameters()
    for _ in range(2):
        for program in programs.values():
            program.run()
    subprocess.run([sys.executable, "-c", ELSEWHERE, path, found], check=True)
    other = np.load(found)
    for name, tensor in tensors.items():
        assert device.memory.read(tensor).tobytes() == other[name].tobytes(), name
    assert np.abs(other["gradients"]).max() > 0 and other["metrics"][0] > 0
    assert (before != other["parameters"]).any()


def test_what_is_loaded_is_what_was_saved(
    session: TrainingSession, device: Device, tmp_path: Path
) -> None:
    programs = programs_of(session)
    save_programs(tmp_path / "step", programs, {})
    loaded = load_programs(tmp_path / "step", device.recording()).programs
    assert list(loaded) == list(programs)
    for name, program in programs.items():
        for command, other in zip(program.commands, loaded[name].commands, strict=True):
            assert command.label == other.label
            if isinstance(command, Dispatch):
                assert isinstance(other, Dispatch)
                assert command.template == other.template
                assert command.workgroups == other.workgroups and command.flops == other.flops
    assert kernels_digest(programs.values()) == kernels_digest(loaded.values())
    fewer = Program(device.recording())
    fewer.commands += programs["micro_batch"].commands[:-1]
    assert kernels_digest([fewer]) != kernels_digest([programs["micro_batch"]])


def test_what_is_no_file_of_programs(device: Device, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no programs")
    for name in ("absent", "text"):
        with pytest.raises(InputError, match=name):
            load_programs(tmp_path / name, device.recording())
    with pytest.raises(ValueError, match="nothing to save"):
        counting = Recording(device.facts, CountingMemory(device.facts))
        save_programs(tmp_path / "x", {"a": Program(counting)}, {})
