"""benchmarks/leave_out.py on a tiny model: what it runs, and that a step stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.leave_out import Step, kind_of
from lora.shaders.device import Device
from lora.shaders.program import Program
from lora.training.session import TrainingSession
from tests.support.synthetic_runs import as_examples, random_sequences, run_config
from tests.support.tiny_gguf import write_tiny_llama
from tests.support.tiny_run import TYPES


def test_kinds_alone_and_left_out(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_llama(tmp_path / "model.gguf", n_layers=3, types=TYPES)
    config = run_config(tmp_path / "model.gguf", batch_size=3, length=20, steps=1)
    examples = as_examples(random_sequences(60, 3, 6))
    with TrainingSession(config, examples=examples, device=device) as session:
        step, programs, ran = Step(session), session.step_programs(), []
        whole = [list(program.commands) for program in programs]
        monkeypatch.setattr(Program, "run", lambda program: ran.append(list(program.commands)))
        kinds = step.kinds()
        assert kinds["adamw", "adamw"] == 1 and sum(kinds.values()) == sum(
            len(program.dispatches) for program in programs
        )
        for kind in (("adamw", "adamw"), ("swiglu", "swiglu")):
            ran.clear()
            assert step.without(kind, 0.0) > 0
            run = [d for commands in ran for d in commands if hasattr(d, "template")]
            assert run and not any(kind_of(d) == kind for d in run)
        if "timestamp-query" in device.facts.features:
            assert 0 < step.alone(("adamw", "adamw"), 0.0) < 1.0
        assert [program.commands for program in programs] == whole
