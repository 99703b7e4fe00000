"""LoRA on the embedding in a merged GGUF: what is looked up changes, the head does not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lora.adapters.files import load_adapter, open_adapter
from lora.adapters.peft_files import save_peft_adapter
from lora.config.schema import Config
from lora.export.to_gguf import export
from lora.forward.gguf.file import GGUFFile
from lora.forward.model.architecture import Architecture
from lora.shaders.errors import InputError
from lora.training.workload import Workload
from tests.support.export_case import decoded
from tests.support.tiny_gguf import write_tiny_llama
from tests.support.tiny_models import TINY_MODELS

EMBEDDING, PATH = "token_embd.weight", "model.embed_tokens"


def saved(folder: Path, base: Path) -> tuple[Path, np.ndarray]:
    """An adapter of some numbers, and what it adds to the embedding."""
    config = Config.model_validate(
        {
            "model": {"path": str(base)},
            "adapter": {"rank": 2, "alpha": 3, "targets": ["embed_tokens"]},
            "data": {"train": "none"},
            "output": "none",
        }
    )
    layout = Workload.open(config, train=False).layout
    modules = layout.to_modules(layout.initial(0))
    a, b = modules[PATH]
    a[:] = np.random.default_rng(0).normal(size=a.shape)
    save_peft_adapter(folder / "saved", layout, layout.from_modules(modules), config)
    return folder / "saved", 1.5 * a.T @ b.T


def test_a_tied_head_becomes_its_own(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "base.gguf", n_layers=1, types={"weight": "Q8_0"})
    adapter, change = saved(tmp_path, tmp_path / "base.gguf")
    done = export(adapter, "merged-gguf")
    base, merged = GGUFFile(tmp_path / "base.gguf"), GGUFFile(done.path)
    exact = decoded(base, EMBEDDING) + change
    error = np.linalg.norm(decoded(merged, EMBEDDING) - exact) / np.linalg.norm(exact)
    assert error < 0.008
    head = np.array(merged.tensors["output.weight"].data[:])
    assert (head == np.array(base.tensors[EMBEDDING].data[:])).all()
    with pytest.raises(InputError, match=r"embed_tokens.*Take --to merged-gguf"):
        export(adapter, "gguf")


def test_gemma2_has_no_head_of_its_own(tmp_path: Path) -> None:
    TINY_MODELS["gemma2"].write_gguf(tmp_path / "base.gguf")
    adapter, _ = saved(tmp_path, tmp_path / "base.gguf")
    with pytest.raises(InputError, match="llama.cpp gives gemma2 no head of its own"):
        export(adapter, "merged-gguf")


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_dora", True), ("ensure_weight_tying", True), ("trainable_token_indices", [3])],
)
def test_what_goes_beside_none_is_refused(tmp_path: Path, key: str, value: object) -> None:
    write_tiny_llama(tmp_path / "base.gguf", n_layers=1)
    adapter, _ = saved(tmp_path, tmp_path / "base.gguf")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(InputError, match=f"embed_tokens is adapted under {key}"):
        open_adapter(adapter, Architecture.from_gguf(GGUFFile(tmp_path / "base.gguf")))


def test_it_is_read_as_it_is_written(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "base.gguf", n_layers=1)
    adapter, change = saved(tmp_path, tmp_path / "base.gguf")
    architecture = Architecture.from_gguf(GGUFFile(tmp_path / "base.gguf"))
    found = open_adapter(adapter, architecture)
    assert (found.targets, found.layers) == (["embed_tokens"], [])
    layout = found.layout(architecture)
    a, b = layout.to_modules(load_adapter(adapter, layout))[PATH]
    np.testing.assert_allclose(1.5 * a.T @ b.T, change, rtol=1e-6)
    assert found.settings(architecture).targets == ["embed_tokens"]
