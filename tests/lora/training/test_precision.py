"""`train.precision: f16`: as f32 in losses, gradients and a whole training, in less memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora.config.schema import Config
from lora.data.examples import Example
from lora.forward.delta_matrix import CHUNK
from lora.forward.matmul_matrix import shape_on
from lora.shaders.device import Device
from lora.shaders.errors import InputError, LoraError
from lora.shaders.facts import DeviceFacts
from lora.shaders.memory import Memory
from lora.shaders.recording import Recording
from lora.training.session import TrainingSession
from tests.support.half_tensors import needs_halves
from tests.support.synthetic_models import Shape, write_model
from tests.support.synthetic_runs import largest_difference, loss_curves
from tests.support.tiny_gguf import write_tiny_llama
from tests.support.tiny_models import TINY_MODELS
from tests.support.tiny_ours import gradients, open_session

# Odd sizes, norms of heads and post norms, both kinds of recurrent blocks: every line in f16 that
# more tiny models would have is also elsewhere (caps of scores in the kernels' own tests). These
# are in `make parity-long`.
NAMES, OTHERS = ["llama_odd", "gemma3", "lfm2", "qwen35"], ["qwen3", "gemma2", "llama_head"]


@pytest.fixture(autouse=True)
def half(device: Device) -> Iterator[None]:
    needs_halves(device.facts)
    yield


@pytest.fixture(params=["wide", "tiled"])
def body(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sessions opened in the test record this body of the matmul; other kernels are the device's.

    Those of GPUs take llvmpipe twice as long to compile, and test_default_limits.py has them.
    """

    def recorded(
        facts: DeviceFacts, memory: Memory, precision: str = "f32", **plans: Any
    ) -> Recording:
        return Recording(facts, memory, precision, body=request.param, **plans)

    def on_device(device: Device, *, memory: Memory, precision: str, plans: Any) -> Recording:
        return recorded(device.facts, memory, precision, plans=plans)

    monkeypatch.setattr("lora.training.device_state.Recording", recorded)
    monkeypatch.setattr(Device, "recording", on_device)
    return str(request.param)


# The bodies differ in the products only: one model suffices for the one that compiles for long.
@pytest.mark.parametrize(
    ("name", "body"),
    [(name, "wide") for name in NAMES]
    + [("gemma3", "tiled")]
    + [pytest.param(name, "wide", marks=[pytest.mark.parity, pytest.mark.long]) for name in OTHERS],
    indirect=["body"],
)
def test_losses_and_gradients(name: str, body: str, tmp_path: Path) -> None:
    model = TINY_MODELS[name]
    model.write_gguf(tmp_path / "model.gguf")
    model.write_adapter(tmp_path / "adapter")
    found = {}
    for precision in ("f32", "f16"):
        session = open_session(
            model, tmp_path / "model.gguf", tmp_path / "adapter", precision=precision
        )
        found[precision] = gradients(session)
    # f16 rounds to 2^-12 about a dozen numbers a layer on the way to a logit: errors of some 2^-10
    # of the logits, which partly cancel in the mean over the tokens.
    assert found["f16"].loss == pytest.approx(found["f32"].loss, rel=1e-3)
    assert found["f16"].loss != found["f32"].loss
    # A DeltaNet's rule is f32, but what it is given was rounded, and its gates are exponents.
    bound = 0.04 if name == "qwen35" else 0.02
    for path, wanted in found["f32"].gradients.items():
        difference = np.linalg.norm(found["f16"].gradients[path] - wanted)
        assert difference < bound * np.linalg.norm(wanted), path


@pytest.mark.parametrize("body", ["wide"], indirect=True)
def test_the_delta_rule_on_matrix_units(
    body: str, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in f32 up to the same roundings; the other kernels are a CPU device's, which compile soon.

    In plain WGSL: software that has units would compile these for half an hour.
    """
    if shape_on(device.facts) is not None:
        pytest.skip("software drivers would compile it for long")
    model = TINY_MODELS["qwen35"]
    model.write_gguf(tmp_path / "model.gguf")
    model.write_adapter(tmp_path / "adapter")
    found = []
    for precision, on_units in (("f32", False), ("f16", False), ("f16", True)):
        if on_units:
            monkeypatch.setattr("lora.forward.gated_delta.chunk_rows", lambda facts: CHUNK)
            monkeypatch.setattr("lora.forward.delta_matrix.takes_units", lambda *_: True)
        session = open_session(
            model, tmp_path / "model.gguf", tmp_path / "adapter", precision=precision
        )
        recorded = {d.template for program in session._programs.step for d in program.dispatches}
        assert ("delta_matrix_walk" in recorded) == on_units
        assert ("delta_matrix_states_backward" in recorded) == on_units
        found.append(gradients(session))
    full, half, on_matrices = found
    assert on_matrices.loss == pytest.approx(full.loss, rel=1e-3)
    assert on_matrices.loss != half.loss
    for path, wanted in full.gradients.items():
        difference = np.linalg.norm(on_matrices.gradients[path] - wanted)
        assert difference < 0.04 * np.linalg.norm(wanted), path


@pytest.mark.parametrize("recompute", ["on", "off"])
def test_what_is_f16(recompute: str, tmp_path: Path) -> None:
    """Activations and their gradients; not the residual stream, the low-rank parts, the adapter."""
    model = TINY_MODELS["gemma3"]
    model.write_gguf(tmp_path / "model.gguf")
    model.write_adapter(tmp_path / "adapter")
    sessions = [
        open_session(
            model, tmp_path / "model.gguf", tmp_path / "adapter",
            precision=precision, recompute=recompute,
        )
        for precision in ("f32", "f16")
    ]  # fmt: skip
    full, small = (s.device.allocated for s in sessions)
    assert small["activations"] < 0.75 * full["activations"]
    for purpose in ("weights", "adapter", "gradients", "optimizer", "logits", "kept inputs"):
        assert small[purpose] == full[purpose], purpose
    act = sessions[1]._act
    layer = act.shared[0]
    assert len({id(other.normed) for other in act.shared.values()}) == 1  # one for all
    mixer = layer.mixer
    halves = (layer.normed, mixer.qkv, mixer.attended, layer.feed_forward.gate_up)
    assert {tensor.dtype for tensor in halves} == {"f16"}
    assert {t.dtype for t in (act.boundary, act.final, layer.middle, mixer.lse)} == {"f32"}
    assert sessions[1].plan.allocated == small


def test_recompute_changes_no_bit(tmp_path: Path) -> None:
    model = TINY_MODELS["gemma3"]
    model.write_gguf(tmp_path / "model.gguf")
    model.write_adapter(tmp_path / "adapter")
    on, off = (
        gradients(
            open_session(
                model, tmp_path / "model.gguf", tmp_path / "adapter",
                precision="f16", recompute=recompute,
            )
        )
        for recompute in ("on", "off")
    )  # fmt: skip
    assert on.loss == off.loss
    for path, gradient in on.gradients.items():
        assert (gradient == off.gradients[path]).all(), path


@pytest.mark.parametrize("body", ["tiled"], indirect=True)
def test_fifty_steps(body: str, tmp_path: Path) -> None:
    """The loss curve of f16 stays within 1% of that of f32."""
    path = tmp_path / "model.gguf"
    write_model(path, Shape("llama", 2, 64, 128, 4, 2, 16, 512, {"weight": "Q8_0"}))
    curves = loss_curves(path, 50, ["f32", "f16"], batch_size=2, length=24, learning_rate=5e-3)
    assert curves["f32"][-1] < 0.8 * curves["f32"][0]
    assert 0 < largest_difference(curves["f16"], curves["f32"]) < 0.01


def config_of(tmp_path: Path, **train: object) -> Config:
    path = tmp_path / "tiny.gguf"
    write_tiny_llama(path, types={"weight": "Q8_0"})
    return Config.model_validate(
        {
            "model": {"path": str(path)},
            "adapter": {"rank": 4},
            "data": {"train": "none", "max_length": 64},
            "train": {"steps": 2, "batch_size": 2, "precision": "f16", **train},
            "output": "none",
        }
    )


EXAMPLES = [Example(np.full(50, 7, np.int32), np.arange(50) > 3, i) for i in range(3)]


def test_without_the_feature_it_is_refused(tmp_path: Path) -> None:
    device = Device()
    without = device.facts.features - {"shader-f16"}
    device.facts = replace(device.facts, features=without)
    with pytest.raises(InputError, match="train.precision: f16: .* lacks WebGPU's shader-f16; set"):
        TrainingSession(config_of(tmp_path), examples=EXAMPLES, device=device)


def test_beyond_f16_the_step_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    """An overflow shows in the norm: the adapter stays, and the message names the way out."""
    model = TINY_MODELS["gemma3"]  # whose kernels test_recompute_changes_no_bit has
    model.write_gguf(tmp_path / "model.gguf")
    model.write_adapter(tmp_path / "adapter")
    session = open_session(
        model, tmp_path / "model.gguf", tmp_path / "adapter", precision="f16", recompute="on"
    )
    modules = session.layout.to_modules(session.parameters())
    for path, (a, b) in modules.items():
        modules[path] = (a, np.full_like(b, 1e6))
    before = session.layout.from_modules(modules)
    session.device.memory.write(session.adapter.parameters, before)
    with pytest.raises(LoraError, match=r"set train\.precision: f32 \(f16 ends at 65504\)"):
        list(session.train())
    assert (session.parameters() == before).all()


def test_text_is_written_in_f32(tmp_path: Path) -> None:
    """Generation has no f16: the text is the same as after opening the session with f32."""
    model = TINY_MODELS["qwen3"]
    model.write_gguf(tmp_path / "model.gguf")
    model.write_adapter(tmp_path / "adapter")
    texts = []
    for precision in ("f32", "f16"):
        session = open_session(
            model, tmp_path / "model.gguf", tmp_path / "adapter", precision=precision
        )
        prompt = [int(t) for t in session.workload.train_examples[0].ids[:5]]
        texts.append(session.generate(prompt, max_tokens=8))
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("precision", "is_cpu", "products"),
    [("f16", False, "f16"), ("f16", True, None), ("f32", False, None)],
)
def test_prompts_follow_training_on_gpus(
    precision: str, is_cpu: bool, products: str | None, tmp_path: Path
) -> None:
    """A prompt's products alone: all between them stays f32."""
    model = TINY_MODELS["qwen3"]
    model.write_gguf(tmp_path / "model.gguf")
    model.write_adapter(tmp_path / "adapter")
    session = open_session(
        model, tmp_path / "model.gguf", tmp_path / "adapter", precision=precision
    )
    session.device.facts = replace(session.device.facts, is_cpu=is_cpu)
    recording = session._recording_of_text()
    assert (recording.precision, recording.products) == ("f32", products)
