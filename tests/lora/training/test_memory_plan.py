"""What a run takes on a device, counted without one, and what is said where it doesn't fit."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from io import StringIO
from pathlib import Path

import gguf
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from lora.commands.cli import app
from lora.commands.plan import print_plan
from lora.config.schema import Config
from lora.data.examples import Example
from lora.shaders.device import Device
from lora.shaders.errors import DeviceMemoryError, GPUError, InputError
from lora.shaders.webgpu import Use
from lora.training.balancing import read_balance
from lora.training.device_state import SessionPlan
from lora.training.session import TrainingSession
from lora.training.workload import Workload
from tests.support.half_tensors import needs_halves
from tests.support.scaled_models import BY, NORMS, OUTPUTS, UP, write_scaled
from tests.support.tiny_gguf import write_tiny_llama
from tests.support.tiny_models import TINY_MODELS
from tests.support.tiny_ours import open_session
from tests.support.tiny_run import write_run


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = tmp_path / "tiny.gguf"
    write_tiny_llama(path, types={"weight": "Q8_0"})
    return Config.model_validate(
        {
            "model": {"path": str(path)},
            "adapter": {"rank": 4, "targets": ["q_proj", "down_proj", "lm_head"]},
            "data": {"train": "none", "max_length": 64},
            "train": {"steps": 1, "batch_size": 2, "tuning": "off"},
            "output": "none",
        }
    )


EXAMPLES = [Example(np.full(50, 7, np.int32), np.arange(50) > 3, i) for i in range(3)]


@pytest.mark.parametrize(
    ("rows", "is_cpu", "slices"),
    [(32, False, 1), (64, False, 1), (128, False, 2), (256, False, 4), (512, False, 4),
     (512, True, 1)],
)  # fmt: skip
def test_few_rows_have_few_slices_of_the_gradient(
    config: Config, rows: int, is_cpu: bool, slices: int
) -> None:
    """64 rows of a micro-batch each at least: a slice is as much memory as the adapter."""
    data = config.data.model_copy(update={"max_length": rows})
    train = config.train.model_copy(update={"batch_size": 1})
    config = config.model_copy(update={"data": data, "train": train})
    examples = [Example(np.full(rows, 7, np.int32), np.arange(rows) > 3, 0)]
    workload = Workload.open(config, train=True, examples=examples)
    facts = replace(Device().facts, is_cpu=is_cpu)
    allocated = SessionPlan.of(facts, workload).allocated
    assert allocated["gradients"] == slices * allocated["adapter"]


@pytest.mark.parametrize("recompute", ["on", "off"])
@pytest.mark.parametrize("is_cpu", [True, False])
def test_a_plan_counts_what_is_taken(config: Config, recompute: str, is_cpu: bool) -> None:
    train = config.train.model_copy(update={"recompute": recompute})
    config = config.model_copy(update={"train": train})
    device = Device()
    device.facts = replace(device.facts, is_cpu=is_cpu)
    session = TrainingSession(config, examples=EXAMPLES, device=device)
    planned = SessionPlan.of(device.facts, session.workload).allocated
    assert planned == session.plan.allocated == device.allocated
    assert {"weights", "adapter", "gradients", "optimizer", "activations"} <= set(planned)


SCALED = {
    "llama": ("llama", UP | {"attn_v": BY, "attn_output": 1 / BY}),
    "biases": ("llama_bias", {**UP, "ffn_up.bias": BY, **NORMS}),
    "post norms": ("gemma3", OUTPUTS),
}


@pytest.mark.parametrize("recompute", ["on", "off"])
@pytest.mark.parametrize("case", SCALED.values(), ids=SCALED)
def test_powers_of_two_are_counted(
    case: tuple[str, Mapping[str, float]], recompute: str, device: Device, tmp_path: Path
) -> None:
    """What f16 takes for a model beyond its range, which its weights tell, and the kernels."""
    needs_halves(device.facts)
    name, factors = case
    model, own = TINY_MODELS[name], Device()
    write_scaled(model, tmp_path / "model.gguf", factors)
    model.write_adapter(tmp_path / "adapter")
    with open_session(
        model, tmp_path / "model.gguf", tmp_path / "adapter", device=own, precision="f16",
        recompute=recompute, tuning="off",
    ) as session:  # fmt: skip
        unread = SessionPlan.of(own.facts, session.workload)
        taken = Counter(own.allocated)
        planned = unread.of_file(own)
        assert own.allocated == taken  # given back
        assert planned.allocated == session.plan.allocated == taken
        powers = taken["weights"] - unread.allocated["weights"]
        assert 0 < powers < 1 << 20 and taken - Counter(weights=powers) == unread.allocated
        programs = session._programs
        assert programs.training is not None
        recorded = {
            repr((d.template, sorted(d.constants.items())))
            for program in (programs.prefix, *programs.training.all)
            for d in program.dispatches
        }
        assert recorded == {repr((t, sorted(c.items()))) for t, c in planned.kernels}
    own.close()


def test_the_command_counts_them(tmp_path: Path, device: Device) -> None:
    needs_halves(device.facts)
    path = write_run(tmp_path, train={"precision": "f16", "tuning": "off"})
    reader = gguf.GGUFReader(tmp_path / "model.gguf", "r+")
    for tensor in reader.tensors:
        if tensor.name.endswith("attn_norm.weight"):
            tensor.data[:] *= 1e4
    reader.data.flush()
    done = CliRunner().invoke(app, ["plan", str(path), "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.output)["memory_bytes"]
    own = Device()
    with TrainingSession.from_config(path, device=own) as session:
        assert session.plan.tensors.balance is not None
        assert said == {"total": sum(own.allocated.values()), **own.allocated}
    own.close()


def test_an_ordinary_model_is_planned_as_it_is(
    config: Config, device: Device, tmp_path: Path
) -> None:
    """No plan is made again; nor where nothing is balanced, which reads no weights."""
    needs_halves(device.facts)
    for change in ({"precision": "f16"}, {"precision": "f32"}):
        train = config.train.model_copy(update=change)
        one = config.model_copy(update={"train": train})
        plan = SessionPlan.of(device.facts, Workload.open(one, train=True, examples=EXAMPLES))
        assert plan.of_file(device) is plan and plan.tensors.balance is None
    dora = config.adapter.model_copy(update={"variant": "dora", "targets": ["q_proj"]})
    train = config.train.model_copy(update={"precision": "f16"})
    one = config.model_copy(update={"train": train, "adapter": dora})
    assert read_balance(device, Workload.open(one, train=True, examples=EXAMPLES)) is None


def test_a_model_that_does_not_fit(config: Config) -> None:
    device = Device()
    device.facts = replace(device.facts, memory_limit=300_000)
    with pytest.raises(InputError) as caught:
        TrainingSession(config, examples=EXAMPLES, device=device)
    message = str(caught.value)
    assert "tiny.gguf does not fit: " in message and "has 0 MiB of memory" in message
    assert "MiB (" in message and "activations" in message and "weights" in message
    assert "Lower train.batch_size or data.max_length, set train.recompute: on" in message


def test_a_refusal_of_the_device(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()

    def refuse(n_bytes: int, use: Use) -> None:
        raise GPUError("Not enough memory left.\nmore")

    monkeypatch.setattr(device.handle, "create_buffer", refuse)
    with pytest.raises(DeviceMemoryError, match=r"refused a buffer of .* \(Not enough memory left"):
        device.memory.empty((100,))


@pytest.mark.parametrize(("limit", "said"), [("0.1MiB", True), ("7GiB", False)])
def test_a_plan_above_the_limit_says_so(
    config: Config, device: Device, limit: str, said: bool
) -> None:
    """With all layers run again, too."""
    train = config.train.model_copy(update={"memory_limit": limit, "steps": 3})
    config = config.model_copy(update={"train": train})
    workload = Workload.open(config, train=True, examples=EXAMPLES)
    out = StringIO()
    print_plan(Console(file=out, width=400), SessionPlan.of(device.facts, workload))
    assert (f"train.memory_limit ({limit}) is 0 MiB; lower" in out.getvalue()) == said
    assert "\nsteps         3 (1.5 epochs), micro-batches" in out.getvalue()
