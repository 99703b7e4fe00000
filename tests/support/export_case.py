"""Adapters on disk and their bases, small enough to export: for the tests of `lora export`."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.numpy

from lora.export.to_gguf import Export, export
from lora.forward.gguf.file import GGUFFile
from lora.forward.model.adapter import AdapterLayout
from lora.forward.model.architecture import Architecture
from lora.forward.model.row_order import permute_rows_to_gguf
from tests.support.tiny_gguf import write_tiny_llama
from tests.support.tiny_model import TinyModel

CASES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "phi3_long")


def decoded(file: GGUFFile, name: str) -> np.ndarray:
    tensor = file.tensors[name]
    values = gguf.quants.dequantize(np.ascontiguousarray(tensor.data), tensor.type)
    return values.reshape(tensor.shape)


class Case:
    """A tiny model and its PEFT adapter on disk."""

    def __init__(self, model: TinyModel, folder: Path, fused_layers: Collection[int] = ()) -> None:
        self.model = model
        self.base = folder / "base.gguf"
        self.adapter = folder / "adapter"
        folder.mkdir(exist_ok=True)
        model.write_gguf(self.base, fused_layers)
        model.write_adapter(self.adapter)

    def change(self, **settings: Any) -> None:
        path = self.adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    def export(self, target: str = "gguf", **options: Any) -> Export:
        return export(self.adapter, target, **{"base": str(self.base), **options})

    def layout(self, rank: int, scale: float) -> AdapterLayout:
        architecture = Architecture.from_gguf(GGUFFile(self.base))
        return AdapterLayout(architecture, self.model.layers, self.model.targets, rank, scale)

    def expected(self, name: str, scale: float) -> np.ndarray:
        """scale · B · A of a tensor in the GGUF's row order, by names written out here."""
        _, layer, gguf_name, _ = name.split(".") if name.startswith("blk") else ("", "", "", "")
        module = {
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.gate_up_proj" if self.model.family == "phi3" else "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        }.get(gguf_name)
        path = "lm_head" if name == "output.weight" else f"model.layers.{layer}.{module}"
        tensors = self.model.adapter()
        if f"base_model.model.{path}.lora_A.weight" not in tensors:
            return np.zeros(GGUFFile(self.base).tensors[name].shape)
        a, b = (tensors[f"base_model.model.{path}.lora_{half}.weight"] for half in "AB")
        product = scale * b.astype(np.float64) @ a.astype(np.float64)
        heads = {
            "attn_q": self.model.config["num_attention_heads"],
            "attn_k": self.model.config["num_key_value_heads"],
        }
        if self.model.architecture == "llama" and gguf_name in heads:
            return permute_rows_to_gguf(product, heads[gguf_name])
        return product


def products(path: Path) -> dict[str, np.ndarray]:
    """What llama.cpp adds to each tensor of the base."""
    file = GGUFFile(path)
    alpha = file.metadata["adapter.lora.alpha"]
    found = {}
    for name in {name.rpartition(".")[0] for name in file.tensors}:
        a, b = decoded(file, f"{name}.lora_a"), decoded(file, f"{name}.lora_b")
        found[name] = alpha / len(a) * b.astype(np.float64) @ a.astype(np.float64)
    return found


def write_adapter(folder: Path, tensors: dict[str, np.ndarray], **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(
        {f"base_model.model.{name}.weight": values for name, values in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def write_wide(folder: Path) -> tuple[Path, Path]:
    """A base with rows of 256, of several types, and an adapter on layer 1's down_proj."""
    base = folder / "wide.gguf"
    types = {"weight": "Q8_0", "ffn_up.weight": "Q4_1", "token_embd.weight": "BF16"}
    write_tiny_llama(base, hidden_size=256, intermediate_size=512, types=types)
    random = np.random.default_rng(0)
    tensors = {
        "model.layers.1.mlp.down_proj.lora_A": random.normal(0, 0.05, (4, 512)),
        "model.layers.1.mlp.down_proj.lora_B": random.normal(0, 0.2, (256, 4)),
    }
    tensors = {name: values.astype(np.float32) for name, values in tensors.items()}
    adapter = write_adapter(folder / "ours", tensors, base_model_name_or_path=str(base))
    return base, adapter


def write_faint(folder: Path) -> Path:
    """An adapter that changes a Q4_1 tensor by 1 %, below half a step of its grid."""
    base = folder / "faint.gguf"
    write_tiny_llama(base, hidden_size=256, intermediate_size=512, types={"weight": "Q4_1"})
    random = np.random.default_rng(0)
    a, b = random.normal(size=(4, 512)), random.normal(size=(256, 4))
    size = np.linalg.norm(decoded(GGUFFile(base), "blk.1.ffn_down.weight"))
    b *= 0.01 * size / np.linalg.norm(2 * b @ a)
    tensors = {"lora_A": a.astype(np.float32), "lora_B": b.astype(np.float32)}
    return write_adapter(
        folder / "faint",
        {f"model.layers.1.mlp.down_proj.{half}": values for half, values in tensors.items()},
        base_model_name_or_path=str(base),
    )
