"""A model whose layers differ in size, against float64: losses, gradients, prompts, one row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora.config.schema import Config
from lora.data.examples import Example
from lora.forward.gguf.file import GGUFFile
from lora.forward.model.architecture import Architecture
from lora.generation.opening import open_generator
from lora.shaders.device import Device
from lora.training.session import TrainingSession
from tests.support.tiny_gguf import write_tiny_llama
from tests.support.tiny_ours import gradients

HIDDEN, HEAD_SIZE, EPSILON = 32, 8, 1e-5
HEADS, KV_HEADS, INNER = (4, 2, 6), (2, 1, 2), (64, 32, 96)
IDS = np.random.default_rng(3).integers(3, 280, 23)


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    path = tmp_path_factory.mktemp("sizes") / "model.gguf"
    rng, changed = np.random.default_rng(1), {}
    for layer, (heads, kv, inner) in enumerate(zip(HEADS, KV_HEADS, INNER, strict=True)):
        shapes = {
            "attn_q": (heads * HEAD_SIZE, HIDDEN), "attn_k": (kv * HEAD_SIZE, HIDDEN),
            "attn_v": (kv * HEAD_SIZE, HIDDEN), "attn_output": (HIDDEN, heads * HEAD_SIZE),
            "ffn_gate": (inner, HIDDEN), "ffn_up": (inner, HIDDEN), "ffn_down": (HIDDEN, inner),
        }  # fmt: skip
        for name, shape in shapes.items():
            values = rng.normal(0, 1.3 * shape[1] ** -0.5, shape).astype(np.float32)
            changed[f"blk.{layer}.{name}.weight"] = values
    sizes = {"attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS,
             "feed_forward_length": INNER}  # fmt: skip
    written = write_tiny_llama(
        path, n_layers=3, types={"weight": "F32"}, tensors=changed,
        metadata={f"llama.{key}": list(values) for key, values in sizes.items()},
    )  # fmt: skip
    return path, written


def reference_logits(
    weights: dict[str, np.ndarray], adapter: dict[str, tuple[np.ndarray, np.ndarray]], scale: float
) -> np.ndarray:
    """float64 [tokens, vocabulary] of a Llama; A and B by PEFT's path, rows in PEFT's order."""

    def w(layer: int, name: str, module: str) -> np.ndarray:
        matrix = weights[f"blk.{layer}.{name}.weight"].astype(np.float64)
        a, b = adapter[f"model.layers.{layer}.{module}"]
        change = scale * b.astype(np.float64) @ a.astype(np.float64)
        if name in ("attn_q", "attn_k"):  # a GGUF has pairs side by side
            heads = change.reshape(-1, 2, HEAD_SIZE // 2, change.shape[1])
            change = heads.transpose(0, 2, 1, 3).reshape(change.shape)
        return matrix + change

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * weights[f"{name}.weight"]

    n = len(IDS)
    angles = np.arange(n)[:, None] / 1e4 ** (np.arange(HEAD_SIZE // 2) / (HEAD_SIZE // 2))
    turn = np.exp(1j * angles)

    def heads_of(x: np.ndarray, turned: bool) -> np.ndarray:
        heads = x.reshape(n, -1, HEAD_SIZE // 2, 2)
        if turned:
            pairs = (heads[..., 0] + 1j * heads[..., 1]) * turn[:, None]
            heads = np.stack([pairs.real, pairs.imag], axis=-1)
        return heads.reshape(n, -1, HEAD_SIZE)

    x = weights["token_embd.weight"].astype(np.float64)[IDS]
    for layer in range(3):
        h = norm(x, f"blk.{layer}.attn_norm")
        q = heads_of(h @ w(layer, "attn_q", "self_attn.q_proj").T, True)
        k = heads_of(h @ w(layer, "attn_k", "self_attn.k_proj").T, True)
        v = heads_of(h @ w(layer, "attn_v", "self_attn.v_proj").T, False)
        k, v = (np.repeat(t, HEADS[layer] // KV_HEADS[layer], axis=1) for t in (k, v))
        scores = np.einsum("nhd,mhd->hnm", q, k) / np.sqrt(HEAD_SIZE)
        scores[:, ~np.tri(n, dtype=bool)] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        attended = np.einsum("hnm,mhd->nhd", p / p.sum(-1, keepdims=True), v).reshape(n, -1)
        x = x + attended @ w(layer, "attn_output", "self_attn.o_proj").T
        h = norm(x, f"blk.{layer}.ffn_norm")
        gate = h @ w(layer, "ffn_gate", "mlp.gate_proj").T
        inner = gate / (1 + np.exp(-gate)) * (h @ w(layer, "ffn_up", "mlp.up_proj").T)
        x = x + inner @ w(layer, "ffn_down", "mlp.down_proj").T
    return norm(x, "output_norm") @ weights["token_embd.weight"].astype(np.float64).T


def reference_loss(
    weights: dict[str, np.ndarray], adapter: dict[str, tuple[np.ndarray, np.ndarray]]
) -> float:
    logits = reference_logits(weights, adapter, 2.0)[:-1]
    largest = logits.max(-1, keepdims=True)
    logs = logits - largest - np.log(np.exp(logits - largest).sum(-1, keepdims=True))
    return float(-logs[np.arange(len(IDS) - 1), IDS[1:]].mean())


@pytest.mark.parametrize("recompute", ["on", "off"])
def test_loss_and_gradients(tensors: tuple[Path, dict[str, np.ndarray]], recompute: str) -> None:
    path, weights = tensors
    config = Config.model_validate(
        {
            "model": {"path": str(path)},
            "adapter": {"rank": 4, "alpha": 8},
            "data": {"train": "none", "max_length": 32},
            "train": {"steps": 1, "batch_size": 1, "recompute": recompute},
            "output": "none",
        }
    )
    example = Example(IDS.astype(np.int32), np.arange(len(IDS)) > 0, 0)
    with TrainingSession(config, examples=[example]) as session:
        rng = np.random.default_rng(5)
        flat = session.layout.initial(0)
        modules = {
            name: (a, rng.normal(0, 0.2, b.shape).astype(np.float32))
            for name, (a, b) in session.layout.to_modules(flat).items()
        }
        session.device.memory.write(
            session.adapter.parameters, session.layout.from_modules(modules)
        )
        ours = gradients(session)
    assert ours.loss == pytest.approx(reference_loss(weights, modules), rel=1e-5)
    direction = {name: [rng.normal(size=t.shape) for t in pair] for name, pair in modules.items()}

    def moved(by: float) -> float:
        at = {
            name: tuple(t + by * d for t, d in zip(pair, direction[name], strict=True))
            for name, pair in modules.items()
        }
        return reference_loss(weights, at)  # type: ignore[arg-type]

    wanted = (moved(1e-5) - moved(-1e-5)) / 2e-5
    found = sum(
        float((ours.gradients[f"base_model.model.{name}.lora_{half}.weight"] * d).sum())
        for name, pair in direction.items()
        for half, d in zip("AB", pair, strict=True)
    )
    assert found == pytest.approx(wanted, rel=2e-4, abs=1e-6)


@pytest.mark.parametrize("is_cpu", [True, False], ids=["cpu", "gpu"])
def test_text(
    tensors: tuple[Path, dict[str, np.ndarray]], device: Device, is_cpu: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A piece of a prompt, then tokens one by one, by the kernels of either kind of device."""
    path, weights = tensors
    architecture = Architecture.from_gguf(GGUFFile(path))
    assert [spec.mixer.n_heads for spec in architecture.layers] == list(HEADS)
    nothing = {
        matrix.peft_path(layer): (np.zeros((1, matrix.in_size(spec))),
                                  np.zeros((matrix.out_size(spec), 1)))
        for layer, spec in enumerate(architecture.layers)
        for members in spec.groups.values() for matrix in members
    }  # fmt: skip
    expected = reference_logits(weights, nothing, 1.0)
    monkeypatch.setattr(device, "facts", replace(device.facts, is_cpu=is_cpu))
    with open_generator(str(path), device=device) as generator:
        for n in (17, 18, 19, 23):
            found = generator.next_logits(IDS[:n].tolist())
            np.testing.assert_allclose(found, expected[n - 1], rtol=0, atol=2e-4)
