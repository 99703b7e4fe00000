"""How many dispatches a layer takes on a GPU: each costs some microseconds, whatever it does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lora.shaders.device import Device
from lora.shaders.planning import PlanningDevice
from lora.shaders.program import Dispatch
from lora.training.session import TrainingSession
from tests.support.synthetic_models import SHAPES, write_model
from tests.support.synthetic_runs import as_examples, random_sequences, run_config


@pytest.mark.parametrize("precision", ["f32", "f16"])
@pytest.mark.parametrize("name", ["SmolLM2-135M", "Gemma-3-270M"])
def test_dispatches_of_a_layer(name: str, precision: str, tmp_path: Path) -> None:
    """At most 20 forward and 35 backward, with the tiles that the model chooses for 512 rows."""
    path = tmp_path / "model.gguf"
    write_model(path, SHAPES[name])
    planned = PlanningDevice(Device())
    planned.is_cpu, planned.features = False, {"shader-f16"}
    planned.workgroup_memory = 49152
    config = run_config(path, batch_size=1, length=512, steps=1, precision=precision)
    sequences = random_sequences(SHAPES[name].vocab_size, 1, 512)
    session = TrainingSession(config, examples=as_examples(sequences), device=planned)
    assert session._programs is not None
    counts: Counter[str] = Counter()
    for command in session._programs.micro_batch.commands:
        if isinstance(command, Dispatch) and "layers.5" in command.label:
            counts[
                "backward" if "backward" in command.label.split("layers.5")[0] else "forward"
            ] += 1
    assert 10 < counts["forward"] <= 20 and 15 < counts["backward"] <= 35, counts
