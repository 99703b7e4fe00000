"""Adapters of recurrent models: value heads in either order, modules whose name stands twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lora.adapters.files import load_adapter, open_adapter
from lora.export.to_gguf import export
from lora.forward.gguf.file import GGUFFile
from lora.forward.model.adapter import AdapterLayout
from lora.forward.model.architecture import Architecture
from tests.support.tiny_model import TinyModel
from tests.support.tiny_models import TINY_MODELS
from tests.support.tiny_qwen35 import qwen35_in_gguf


@pytest.mark.parametrize("name", ["lfm2", "qwen35"])
def test_both_kinds_of_files_hold_the_same(name: str, tmp_path: Path) -> None:
    model, base, folder = TINY_MODELS[name], tmp_path / "base.gguf", tmp_path / "adapter"
    model.write_gguf(base)
    model.write_adapter(folder)
    architecture = Architecture.from_gguf(GGUFFile(base))
    layout = open_adapter(folder, architecture).layout(architecture)
    of_peft = load_adapter(folder, layout)
    of_gguf = load_adapter(export(folder, "gguf", base=str(base)).path, layout)
    np.testing.assert_array_equal(of_gguf, of_peft)
    modules = layout.to_modules(of_peft)
    for path, (a, b) in modules.items():
        saved = [model.adapter()[f"base_model.model.{path}.lora_{half}.weight"] for half in "AB"]
        np.testing.assert_array_equal(a, saved[0])
        np.testing.assert_array_equal(b, saved[1])
    assert len(modules) == len(model.adapter()) // 2


def test_changes_lie_where_the_converter_puts_weights(tmp_path: Path) -> None:
    """B · A of every module, as if it were its weight, is what the device's factors give."""
    model: TinyModel = TINY_MODELS["qwen35"]
    base, folder = tmp_path / "base.gguf", tmp_path / "adapter"
    model.write_gguf(base)
    model.write_adapter(folder)
    architecture = Architecture.from_gguf(GGUFFile(base))
    layout: AdapterLayout = open_adapter(folder, architecture).layout(architecture)
    flat = load_adapter(folder, layout)
    adapter, moved = model.adapter(), 0
    for path, _, a, b in layout._views(flat):
        hf_a, hf_b = (adapter[f"base_model.model.{path}.lora_{half}.weight"] for half in "AB")
        _, expected = qwen35_in_gguf(model, f"{path}.weight", hf_b @ hf_a)
        np.testing.assert_allclose(b @ a, expected, rtol=0, atol=1e-6)
        moved += not np.array_equal(hf_b @ hf_a, expected)
    assert moved == 2 * 5  # all matrices of both DeltaNets, and no other
