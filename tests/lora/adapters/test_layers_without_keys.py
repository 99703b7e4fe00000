"""Gemma 4's layers that take other layers' keys: what can't be adapted is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lora.export.to_gguf import export
from lora.forward.gguf.file import GGUFFile
from lora.forward.model.adapter import AdapterLayout
from lora.forward.model.architecture import Architecture
from lora.shaders.errors import InputError
from tests.support.export_case import write_adapter
from tests.support.tiny_models import TINY_MODELS


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gemma4") / "base.gguf"
    TINY_MODELS["gemma4_e2b"].write_gguf(path)
    return path


def test_layers_that_have_none_of_the_matrices_are_left_out(base: Path) -> None:
    architecture = Architecture.from_gguf(GGUFFile(base))
    assert architecture.donors == {2: 5, 3: 6}
    layout = AdapterLayout(architecture, range(7), ["k_proj"], 4, 1.0)
    assert layout.layers == [0, 1, 2, 3]
    with pytest.raises(InputError, match=r"none of the layers 4, 6 has k_proj of its own"):
        AdapterLayout(architecture, [6, 4], ["k_proj"], 4, 1.0)


def test_the_projection_that_llama_cpp_ignores_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(
        tmp_path / "adapter",
        {
            "model.per_layer_model_projection.lora_A": np.ones((4, 64), np.float32),
            "model.per_layer_model_projection.lora_B": np.ones((112, 4), np.float32),
        },
        base_model_name_or_path=str(base),
    )
    with pytest.raises(InputError, match="per_layer_model_projection, which llama.cpp does not"):
        export(adapter, "gguf", base=str(base))
