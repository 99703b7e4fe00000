"""Training models whose layers carry a state: packed rows, repeats, resuming, what is adapted."""

from __future__ import annotations

import hashlib
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from lora import TrainingSession, run_training
from lora.commands.plan import print_plan
from lora.config.schema import Config
from lora.shaders.device import Device
from lora.training.device_state import SessionPlan
from lora.training.programs import record_forward_only
from lora.training.workload import Workload
from tests.support.synthetic_runs import as_examples, random_sequences
from tests.support.tiny_models import TINY_MODELS
from tests.support.tiny_ours import open_session
from tests.support.tiny_run import write_run

RECURRENT = ("lfm2", "qwen35")
ADAPTER = "adapter_model.safetensors"


@pytest.mark.parametrize("name", RECURRENT)
def test_a_row_is_the_same_wherever_it_is_packed(name: str, tmp_path: Path) -> None:
    """Bit for bit: neighbours change no sum, and no state passes from one example to the next."""
    model = TINY_MODELS[name]
    model.write_gguf(tmp_path / "model.gguf")
    model.write_adapter(tmp_path / "adapter")
    first, second = model.token_rows()
    with open_session(model, tmp_path / "model.gguf", tmp_path / "adapter") as session:
        flat = session.adapter.parameters
        program = record_forward_only(
            session._recording, session.model, session.inputs, session._act, session.layout, flat
        )

        def states(*rows: list[int]) -> np.ndarray:
            """[tokens, hidden_size] above the last layer."""
            lengths = np.array([len(row) for row in rows])
            ends = np.cumsum(lengths)
            session.inputs.write(
                session.device.memory, np.concatenate(rows),
                np.concatenate([np.arange(n) for n in lengths]),
                np.repeat(ends - lengths, lengths), np.repeat(ends, lengths),
                np.zeros(lengths.sum(), int),
            )  # fmt: skip
            session._programs.prefix.run()
            program.run()
            return session.device.memory.read(session._act.final)[: lengths.sum()]

        alone = states(second)
        for packed in ([first], [first[:7]], [first[:1], first[:19]]):
            found = states(*packed, second)[-len(second) :]
            assert found.tobytes() == alone.tobytes()


@pytest.fixture(scope="module", params=RECURRENT)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    path = write_run(folder, n_rows=6, train={"steps": 3, "recompute": "on"})
    TINY_MODELS[request.param].write_gguf(folder / "model.gguf")
    return path


def test_repeats_and_resumed_runs_give_the_same_bytes(config: Path) -> None:
    folder, found = config.parent, []
    for name, stop in (("one", None), ("two", None), ("three", 1)):
        output = folder / name
        if stop is not None:
            run_training(TrainingSession.from_config(
                config, [f"output={output}", f"train.steps={stop}", "train.schedule=constant"]
            ))  # fmt: skip
        session = TrainingSession.from_config(
            config, [f"output={output}", "train.schedule=constant"]
        )
        run_training(session, resuming=stop is not None)
        found.append(hashlib.sha256((output / ADAPTER).read_bytes()).hexdigest())
    assert found[0] == found[1] == found[2]


def planned(name: str, targets: str | list[str], folder: Path, device: Device) -> str:
    """What `lora plan` prints."""
    TINY_MODELS[name].write_gguf(folder / "model.gguf")
    config = Config.model_validate(
        {
            "model": {"path": str(folder / "model.gguf")}, "adapter": {"targets": targets},
            "data": {"train": "none", "max_length": 16}, "train": {"steps": 1},
            "output": "none",
        }
    )  # fmt: skip
    examples = as_examples(random_sequences(320, 4, 16))
    workload = Workload.open(config, train=True, examples=examples)
    out = StringIO()
    print_plan(Console(file=out, width=400), SessionPlan.of(device.facts, workload))
    return out.getvalue()


def test_the_usual_names_are_few_of_all(tmp_path: Path, device: Device) -> None:
    seven = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    text = planned("qwen35", seven, tmp_path, device)
    assert (
        "what mixes tokens in 2 of 3 layers (in_proj_qkv, in_proj_z, in_proj_b, in_proj_a, "
        "out_proj); adapter.targets: all-linear adapts it"
    ) in text
    assert "q_proj (in 1)" in text
    for targets in ("all-linear", ["gate_proj"], [*seven, "out_proj"]):
        assert "not adapted" not in planned("qwen35", targets, tmp_path, device)
    assert "not adapted" not in planned("lfm2", ["out_proj"], tmp_path, device)
