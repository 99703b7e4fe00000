"""`train.precision: auto`: what it is on which device, where it is said, and how a run goes on."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from rich.console import Console

from lora import TrainingSession, run_training
from lora.commands.plan import print_plan
from lora.config.schema import load_config
from lora.shaders.device import Device
from lora.shaders.errors import InputError
from lora.shaders.facts import DeviceFacts
from lora.training.checkpoint import checkpoints
from lora.training.communicator import SingleProcess
from lora.training.device_state import SessionPlan
from lora.training.leading import open_together
from lora.training.precision import agreed_precision, precision_on
from lora.training.run import RUN
from lora.training.workload import Workload
from tests.support.half_tensors import needs_halves
from tests.support.renderings import CPU, LARGE_GPU, MATRIX_GPU
from tests.support.thread_ranks import ThreadRanks
from tests.support.tiny_run import write_run

UNITS, PLAIN, SOFTWARE = MATRIX_GPU.facts, LARGE_GPU.facts, CPU.facts
WITHOUT = replace(UNITS, features=UNITS.features - {"shader-f16"})
SOFTWARE_UNITS = replace(SOFTWARE, matrix_shapes=UNITS.matrix_shapes)


@pytest.mark.parametrize(
    ("facts", "given", "found"),
    [
        (UNITS, (), "f16"),
        (PLAIN, (), "f32"),
        (WITHOUT, (), "f32"),
        (SOFTWARE, (), "f32"),
        (SOFTWARE_UNITS, (), "f32"),
        (UNITS, ("adapter.variant=dora",), "f32"),
        (UNITS, ("train.precision=f32",), "f32"),
        (PLAIN, ("train.precision=f16",), "f16"),
    ],
)
def test_what_it_is(facts: DeviceFacts, given: tuple[str, ...], found: str, tmp_path: Path) -> None:
    """Recorded so, and said where a run starts."""
    workload = Workload.open(load_config(str(write_run(tmp_path)), given), train=True)
    assert precision_on(facts, workload) == found
    plan = SessionPlan.of(facts, workload)
    training = plan.programs.training
    assert plan.precision == found and training is not None
    assert training.micro_batch.recording.precision == found
    assert (training.loss_scale == 1024.0) == (found == "f16")
    console = Console(record=True, width=200)
    print_plan(console, plan)
    said = [line for line in console.export_text().splitlines() if "train.precision" in line]
    assert len(said) == (not facts.is_cpu) and all(found in line for line in said)


def test_processes_agree(tmp_path: Path) -> None:
    """One whose device has no units takes the others to f32: their gradients are added up."""
    workload = Workload.open(load_config(str(write_run(tmp_path))), train=True)

    def all_of(*devices: DeviceFacts) -> list[str]:
        ranks = ThreadRanks(len(devices))

        def of_rank(rank: int) -> str:
            communicator = ranks.communicators[rank]
            agreed = agreed_precision(workload, devices[rank], communicator)
            return precision_on(devices[rank], agreed)

        with ThreadPoolExecutor(len(devices)) as pool:
            return list(pool.map(of_rank, range(len(devices))))

    assert all_of(UNITS, UNITS) == ["f16", "f16"]
    assert all_of(UNITS, PLAIN) == all_of(PLAIN, UNITS) == ["f32", "f32"]
    assert workload.config.train.precision == "auto"


def test_on_software_it_is_f32_to_the_byte(tmp_path: Path) -> None:
    """run.json has what was asked and what ran; README.md and checkpoints have what ran."""
    path = write_run(tmp_path, train={"steps": 2})
    output = run_training(TrainingSession.from_config(path))
    assert json.loads((output / RUN).read_text())["precision"] == {"asked": "auto", "ran": "f32"}
    assert "| precision | f32 |" in (output / "README.md").read_text()
    given = [f"output={tmp_path / 'given'}", "train.precision=f32"]
    other = run_training(TrainingSession.from_config(path, given))
    name = "adapter_model.safetensors"
    assert (output / name).read_bytes() == (other / name).read_bytes()


def test_a_resumed_run_takes_what_it_began_with(tmp_path: Path, device: Device) -> None:
    needs_halves(device.facts)
    path = write_run(tmp_path, train={"steps": 2})
    run_training(TrainingSession.from_config(path, ["train.precision=f16"]))
    again = load_config(str(path), ["train.steps=3"])
    assert again.train.precision == "auto"
    # A script that opens the session itself is told what differs.
    with pytest.raises(InputError, match=r"train\.precision f16"):
        run_training(TrainingSession(again), resuming=True)
    session = open_together(again, SingleProcess(), resuming=True)
    assert session.precision == "f16"
    output = run_training(session, resuming=True)
    states = [json.loads((p / "state.json").read_text()) for p in checkpoints(output)]
    assert {state["precision"] for state in states} == {"f16"} and states[-1]["step"] == 3


def test_with_powers_a_resumed_run_has_the_same_bytes(tmp_path: Path, device: Device) -> None:
    """Norms of 1e6: what f16 needs is found again, and is the same."""
    needs_halves(device.facts)
    path = write_run(tmp_path, train={"precision": "f16", "save_every": 1, "epochs": 2})
    reader = gguf.GGUFReader(tmp_path / "model.gguf", "r+")
    for tensor in reader.tensors:
        if tensor.name.endswith("ffn_norm.weight"):
            tensor.data[:] *= 1e6
    reader.data.flush()
    session = TrainingSession.from_config(path)
    step = session._tensors.step
    assert all(part.powers for part in step.model.layers[0].matrices["down"].parts)
    assert not any(part.powers for part in session.model.layers[0].matrices["down"].parts)
    output = run_training(session)
    name = "adapter_model.safetensors"
    whole = (output / name).read_bytes()
    *_, before, last = checkpoints(output)
    assert (before / name).read_bytes() != whole
    shutil.rmtree(last)
    run_training(TrainingSession.from_config(path), resuming=True)
    assert (output / name).read_bytes() == whole
