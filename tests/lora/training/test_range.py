"""f16 where numbers pass what it holds: models of the same function, otherwise scaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora.config.schema import Config
from lora.data.examples import Example
from lora.forward.plans.matmul_plans import Request
from lora.forward.plans.matmul_tiles import MatrixTile, Plan, cut
from lora.forward.rmsnorm import MOST_LOW_BYTES
from lora.optim.guard import Scaling
from lora.shaders.device import Device
from lora.shaders.facts import DeviceFacts
from lora.shaders.memory import Memory
from lora.shaders.recording import Recording
from lora.training.session import TrainingSession
from tests.support.half_tensors import needs_halves
from tests.support.scaled_models import (
    BY,
    NORMS,
    OUTPUTS,
    POST_STREAM,
    QUERIES,
    STREAM,
    UP,
    VALUES,
    factor_of,
    scale_adapter,
    write_scaled,
)
from tests.support.tiny_models import TINY_MODELS
from tests.support.tiny_ours import OurGradients, gradients, open_session

SMALLEST = MatrixTile(32, 32, 16, 32, 16)


@pytest.fixture(autouse=True)
def half(device: Device) -> None:
    needs_halves(device.facts)


@pytest.fixture(params=["tiled"])
def body(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sessions opened in the test record this body; of units in plain WGSL a small tile."""

    def tile(product: Request) -> Plan:
        return Plan(SMALLEST, *cut(product.constants["contraction"], 1, SMALLEST.depth))

    def recorded(
        facts: DeviceFacts, memory: Memory, precision: str = "f32", **more: Any
    ) -> Recording:
        if precision == "f32":
            return Recording(facts, memory, precision, **more)
        own = Recording(facts, memory, precision, body=request.param, **more)
        return own if request.param == "tiled" else replace(own, plans=tile)

    def on_device(device: Device, *, memory: Memory, precision: str, plans: Any) -> Recording:
        return recorded(device.facts, memory, precision, plans=plans)

    monkeypatch.setattr("lora.training.device_state.Recording", recorded)
    monkeypatch.setattr(Device, "recording", on_device)
    return str(request.param)


def found(
    name: str,
    factors: Mapping[str, float],
    tmp_path: Path,
    device: Device,
    own: float = 1.0,
    **train: object,
) -> OurGradients:
    """Loss and gradients of a model with tensors multiplied, those of B as of the model before."""
    model = TINY_MODELS[name]
    write_scaled(model, tmp_path / "model.gguf", factors)
    model.write_adapter(tmp_path / "adapter")
    session = open_session(
        model, tmp_path / "model.gguf", tmp_path / "adapter", device=device, **train
    )
    scale_adapter(session, factors, own)
    result = gradients(session)
    session.close()
    unscaled = {path: g * factor_of(path, factors) for path, g in result.gradients.items()}
    return replace(result, gradients=unscaled)


CASES = {
    "llama up": ("llama", UP),
    "llama values": ("llama", VALUES),
    "llama queries": ("llama", QUERIES),
    "llama norms": ("llama", NORMS),
    "llama stream": ("llama", STREAM),
    "llama bias": ("llama_bias", {**UP, "ffn_up.bias": BY, **VALUES, "attn_v.bias": BY}),
    "qwen3 all": ("qwen3", {**UP, **VALUES, "attn_q": 1e4, "attn_k": 1e4}),
    "gemma3 up": ("gemma3", UP),
    "gemma3 outputs": ("gemma3", OUTPUTS),
    "gemma3 stream": ("gemma3", POST_STREAM),
}


@pytest.mark.parametrize(
    ("case", "body"),
    [(case, "tiled") for case in CASES.values()]
    # Units in plain WGSL take 40 s to compile: powers of rows alone. Rows that are sized are in
    # tests/forward/test_matmul_powers.py, and here in `make parity-long`.
    + [(CASES["llama up"], "matrix")]
    + [pytest.param(CASES["llama stream"], "matrix", marks=[pytest.mark.parity, pytest.mark.long])],
    ids=[*CASES, *(f"llama {what}, matrix" for what in ("up", "stream"))],
    indirect=["body"],
)
def test_loss_and_gradients(
    case: tuple[str, Mapping[str, float]], body: str, tmp_path: Path, device: Device
) -> None:
    """Those of the model before, by f32: as near as ordinary models' in test_precision.py."""
    name, factors = case
    own = 1.0 if factors in (STREAM, POST_STREAM) else 2**-8
    whole = found(name, {}, tmp_path, device, own, precision="f32")
    half = found(name, factors, tmp_path, device, own, precision="f16")
    assert half.loss == pytest.approx(whole.loss, rel=1e-3)
    errors = {
        path: np.linalg.norm(half.gradients[path] - wanted) / np.linalg.norm(wanted)
        for path, wanted in whole.gradients.items()
    }
    worst = max(errors, key=lambda path: errors[path])
    assert errors[worst] < 0.02, worst


STEPS = 8


@pytest.mark.parametrize("name", ["llama up", "gemma3 stream"])
def test_eight_steps(name: str, body: str, tmp_path: Path, device: Device) -> None:
    """Losses and parameters of a training are those of the model before, under f16 as well.

    What is trained has the size that it had: rounding differs in which 2^-12 it takes, since 1e4
    is no power of two. AdamW turns a gradient's sign into a step: of the smallest the sign may be
    another, so that parameters are compared as a whole.
    """
    name, factors = CASES[name]
    model, found = TINY_MODELS[name], []
    rows = [np.array(row, np.int32) for row in model.token_rows()]
    examples = [Example(row, np.arange(len(row)) > 0, i) for i, row in enumerate(rows)]
    for own in ({}, factors):
        write_scaled(model, tmp_path / "model.gguf", own)
        config = Config.model_validate(
            {
                "model": {"path": str(tmp_path / "model.gguf")},
                "adapter": {"rank": 4, "targets": ["q_proj", "k_proj", "v_proj"]},
                "data": {"train": "none", "max_length": 64},
                "train": {"steps": STEPS, "learning_rate": 2e-3, "precision": "f16"},
                "output": "none",
            }
        )
        session = TrainingSession(config, examples=examples, device=device)
        before = session.parameters()
        losses = [metrics.loss for metrics in session.train()]
        found.append((losses, session.parameters() - before))
        session.close()
    (wanted, way), (losses, own_way) = found
    assert len(losses) == STEPS and wanted[-1] < wanted[0]
    np.testing.assert_allclose(losses, wanted, rtol=1e-3)
    assert np.linalg.norm(own_way - way) < 0.05 * np.linalg.norm(way)


@pytest.mark.parametrize("name", ["llama up", "llama stream"])
def test_without_powers_f16_does_not_hold_it(
    name: str, body: str, tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tests above would give without what they test."""
    monkeypatch.setattr(
        "lora.training.device_state.balanced_on", lambda _, __, model, ___: (model, None)
    )
    monkeypatch.setattr("lora.forward.matmul.row_scales", lambda *_: None)
    monkeypatch.setattr("lora.backward.recorder.row_scales", lambda *_: None)
    monkeypatch.setattr("lora.backward.scratch.scales_rows", lambda *_: False)
    whole = found(*CASES[name], tmp_path, device, precision="f32")
    half = found(*CASES[name], tmp_path, device, precision="f16")
    worst = max(
        np.linalg.norm(half.gradients[path] - wanted) / np.linalg.norm(wanted)
        for path, wanted in whole.gradients.items()
    )
    assert not worst < 0.5


@pytest.mark.parametrize(
    ("case", "recompute"), [("llama stream", "on"), ("llama stream", "off"), ("gemma3 up", "off")]
)
def test_norms_write_the_sizes_of_rows(
    case: str, recompute: str, body: str, tmp_path: Path, device: Device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In place of a dispatch before each product that reads the stream's gradient, bit for bit."""
    results = []
    for asked in (True, False):
        if not asked:
            monkeypatch.setattr("lora.backward.scratch.scales_rows", lambda *_: False)
        results.append(
            found(*CASES[case], tmp_path, device, 2**-8, precision="f16", recompute=recompute)
        )
    written, apart = results
    assert written.loss == apart.loss
    for path, wanted in apart.gradients.items():
        assert np.abs(wanted).max() > 0, path
        assert written.gradients[path].tobytes() == wanted.tobytes(), path


@pytest.mark.parametrize(
    "body",
    [pytest.param("matrix", marks=[pytest.mark.parity, pytest.mark.long])],
    indirect=True,
)
def test_a_copy_of_the_streams_gradient(
    body: str, tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits but in gradients of B that it gives: f16 loses others of their smallest.

    And of what the head is given.
    """
    name, factors = CASES["llama stream"]
    results = []
    for copied in (True, False):
        if not copied:
            for place in ("lora.backward.scratch", "lora.forward.decoder.head"):
                monkeypatch.setattr(f"{place}.takes_copies", lambda _: False)
        results.append(found(name, factors, tmp_path, device, precision="f16"))
    of_copy, of_rows = results
    assert of_copy.loss == of_rows.loss
    for path, wanted in of_rows.gradients.items():
        gradient = of_copy.gradients[path]
        if gradient.tobytes() != wanted.tobytes():
            assert "lora_B" in path and ("o_proj" in path or "down_proj" in path), path
            assert np.linalg.norm(gradient - wanted) < 1e-3 * np.linalg.norm(wanted), path


def test_a_scale_far_too_large_ends_no_run(
    body: str, tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step is tried until it fits, more than three times, and all count."""
    scaling = Scaling(begin=2.0**40, most=2.0**40)
    monkeypatch.setattr("lora.training.programs.SCALING", scaling)
    model = TINY_MODELS["llama"]
    model.write_gguf(tmp_path / "model.gguf")
    model.write_adapter(tmp_path / "adapter")
    session = open_session(
        model, tmp_path / "model.gguf", tmp_path / "adapter", device=device, precision="f16",
        steps=10,
    )  # fmt: skip
    before = session.parameters()
    metrics = list(session.train())
    tries = metrics[0].retried
    assert len(metrics) == 10 and not any(m.skipped for m in metrics)
    assert 3 < tries <= 5 and not any(m.retried for m in metrics[1:])
    # 2^40 less 1, 2, 4, 8 and 16 powers of two.
    assert session.guard().scale == 2.0 ** (41 - 2**tries)
    assert (session.parameters() != before).any()


def test_norms_write_z_of_members_that_have_one_power(
    body: str, tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU with few rows; v's power is another than q's and k's, so that z has it in it."""
    monkeypatch.setattr(device, "facts", replace(device.facts, is_cpu=False))
    results = []
    for most in (MOST_LOW_BYTES, 0):
        monkeypatch.setattr("lora.forward.rmsnorm.MOST_LOW_BYTES", most)
        results.append(found(*CASES["llama values"], tmp_path, device, 2**-8, precision="f16"))
    by_norms, apart = results
    assert by_norms.loss == pytest.approx(apart.loss, rel=1e-4)
    for path, wanted in apart.gradients.items():
        off = np.linalg.norm(by_norms.gradients[path] - wanted)
        assert off < 0.01 * np.linalg.norm(wanted), path
