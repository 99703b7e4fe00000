"""Tensors that a file may hold and text doesn't need: left alone, counted, kept in merged files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora.export.to_gguf import export
from lora.forward.gguf.file import GGUFFile
from lora.forward.model.architecture import Architecture
from lora.shaders.errors import InputError
from tests.support.export_case import write_adapter
from tests.support.tiny_gguf import write_tiny_llama
from tests.support.tiny_models import TINY_MODELS

MTP: dict[str, np.ndarray | None] = {
    "blk.2.nextn.eh_proj.weight": np.ones((32, 64), np.float32),
    "blk.2.attn_q.weight": np.ones((32, 32), np.float32),
}
IMAGES: dict[str, np.ndarray | None] = {
    "v.patch_embd.weight": np.ones((4, 4), np.float32),
    "a.conv.weight": np.ones((4, 4), np.float32),
    "mm.0.weight": np.ones((4, 4), np.float32),
}
KEYS: dict[str, Any] = {"llama.block_count": 3, "llama.nextn_predict_layers": 1}


def test_they_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "base.gguf"
    write_tiny_llama(path, metadata=KEYS, tensors=MTP | IMAGES)
    architecture = Architecture.from_gguf(GGUFFile(path))
    assert architecture.n_layers == 2
    assert dict(architecture.unused) == {
        "predicting further tokens (MTP)": 2, "images and sound": 3,
    }  # fmt: skip


def test_they_are_kept_in_a_merged_file(tmp_path: Path) -> None:
    base = tmp_path / "base.gguf"
    write_tiny_llama(base, metadata=KEYS, tensors=MTP | IMAGES)
    factors = {"lora_A": np.ones((4, 64), np.float32), "lora_B": np.ones((32, 4), np.float32)}
    adapter = write_adapter(
        tmp_path / "adapter",
        {f"model.layers.1.mlp.down_proj.{half}": values for half, values in factors.items()},
        base_model_name_or_path=str(base),
    )
    merged = GGUFFile(export(adapter, "merged-gguf", base=str(base)).path)
    assert merged.metadata["llama.nextn_predict_layers"] == 1
    for name, values in (MTP | IMAGES).items():
        assert values is not None
        kept = merged.tensors[name]
        assert np.asarray(kept.data).tobytes() == values.tobytes()


def test_lists_have_numbers_for_them(tmp_path: Path) -> None:
    path = tmp_path / "base.gguf"
    widths = {"llama.feed_forward_length": [64, 64, 128]}
    write_tiny_llama(path, metadata=KEYS | widths, tensors=MTP)
    assert Architecture.from_gguf(GGUFFile(path)).n_layers == 2


def test_a_file_of_them_alone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "base.gguf"
    write_tiny_llama(path, metadata={"llama.nextn_predict_layers": 2})
    with pytest.raises(InputError, match="all 2 layers predict further tokens only"):
        Architecture.from_gguf(GGUFFile(path))


def test_keys_that_no_layer_takes(tmp_path: Path) -> None:
    """Converters leave them in layers of Gemma 4 that take others'."""
    model, path = TINY_MODELS["gemma4_e2b"], tmp_path / "base.gguf"
    spare = {f"blk.5.attn_{name}.weight": np.ones((16, 64), np.float32) for name in "kv"}
    model.write_gguf(path, more=spare)
    architecture = Architecture.from_gguf(GGUFFile(path))
    assert dict(architecture.unused) == {"keys and values that no layer takes": 2}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention.shared_kv_layers", 7, "shared_kv_layers is 7; a number below the 7 layers"),
        ("attention.value_length", 16, "key_length is 32 and the values' 16"),
        ("attention.head_count_kv", 3, "4 heads of layer 0 cannot share 3 key and value heads"),
        ("expert_count", 8, "expert_count is 8: a mixture of experts is not supported"),
        ("rope.dimension_count_swa", 64, "is 64, more than the head size 16"),
    ],
)
def test_gemma4s_that_are_refused(tmp_path: Path, key: str, value: int, message: str) -> None:
    model, path = TINY_MODELS["gemma4_e2b"], tmp_path / "base.gguf"
    model.write_gguf(path, keys={key: value})
    with pytest.raises(InputError, match=message):
        Architecture.from_gguf(GGUFFile(path))
