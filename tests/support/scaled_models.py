"""Models of the same function whose numbers f16 does not hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

from lora.training.session import TrainingSession
from tests.support.tiny_model import TinyModel

BY = 1e4
# What of a model without post norms is larger, and what of it smaller, by the names of tensors.
UP = {"ffn_up": BY, "ffn_down": 1 / BY}
VALUES = {"attn_v": BY, "attn_output": 1 / BY}
QUERIES = {"attn_q": BY, "attn_k": 1 / BY}
NORMS = {
    "attn_norm": BY, "attn_q": 1 / BY, "attn_k": 1 / BY, "attn_v": 1 / BY,
    "ffn_norm": BY, "ffn_gate": 1 / BY, "ffn_up": 1 / BY,
}  # fmt: skip
# The stream 1e-6 of what it was: its gradients 1e6.
STREAM = {"token_embd": 1e-6, "attn_output": 1e-6, "ffn_down": 1e-6, "output_norm": 1e6}
# With post norms, which take the size of what blocks give out again.
POST_STREAM = {
    "token_embd": 1e-6, "post_attention_norm": 1e-6, "post_ffw_norm": 1e-6, "output_norm": 1e6
}  # fmt: skip
OUTPUTS = {"ffn_down": BY, "attn_output": BY}  # before post norms

_TENSORS = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def factor_of(path: str, factors: Mapping[str, float]) -> float:
    """What the matrix of a module, or of its B's gradient, is multiplied by; 1 for an A's."""
    if path.endswith("lora_A.weight"):
        return 1.0
    return next((factors.get(t, 1.0) for m, t in _TENSORS.items() if f".{m}" in path), 1.0)


def scale_adapter(session: TrainingSession, factors: Mapping[str, float], own: float) -> None:
    """Multiplies each B as its matrix is, so that B · A changes as much of it as before.

    And all by `own`: one above 64 is infinite in the kernels for matrix units.
    """
    modules = session.layout.to_modules(session.parameters())
    scaled = {
        path: (a, b * np.float32(own * factor_of(path, factors)))
        for path, (a, b) in modules.items()
    }
    session.set_parameters(session.layout.from_modules(scaled))


def write_scaled(model: TinyModel, path: Path, factors: Mapping[str, float]) -> None:
    """Writes a model's GGUF with tensors multiplied; of a smaller stream the epsilons are, too."""
    model.write_gguf(path)
    reader = gguf.GGUFReader(path, "r+")
    found = set()
    for tensor in reader.tensors:
        name = re.sub(r"^blk\.\d+\.", "", tensor.name).removesuffix(".weight")
        if name in factors:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
            tensor.data[:] = (tensor.data * np.float64(factors[name])).astype(np.float32)
            found.add(name)
    assert found == set(factors)
    if "token_embd" in factors:
        field = reader.fields[f"{model.architecture}.attention.layer_norm_rms_epsilon"]
        field.parts[field.data[0]][0] *= factors["token_embd"] ** 2
    reader.data.flush()
