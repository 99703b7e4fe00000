"""A PEFT directory and the GGUF adapter made of it are the same adapter, wherever one is taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from forward.adapter import AdapterLayout
from forward.architecture import Architecture
from forward.gguf_file import GGUFFile
from lora.adapters import load_adapter, open_adapter
from lora.export import export
from lora.generation import open_generator
from lora.inspect import gguf_facts
from shaders.errors import InputError
from tests.parity.tiny_models import TINY_MODELS
from tests.parity.tiny_ours import open_session


@pytest.fixture(params=["llama_odd", "phi3", "llama_head", "gemma3"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A tiny model's name, and a folder with model.gguf, the directory adapter and adapter.gguf."""
    model = TINY_MODELS[request.param]
    model.write_gguf(tmp_path / "model.gguf")
    model.write_adapter(tmp_path / "adapter")
    export(
        tmp_path / "adapter", "gguf", output=tmp_path / "adapter.gguf",
        base=str(tmp_path / "model.gguf"),
    )  # fmt: skip
    return request.param, tmp_path


def test_training_starts_from_either(made: tuple[str, Path]) -> None:
    name, folder = made
    sessions = [
        open_session(TINY_MODELS[name], folder / "model.gguf", folder / adapter)
        for adapter in ("adapter", "adapter.gguf")
    ]
    first, second = (session.parameters() for session in sessions)
    assert np.count_nonzero(first) > 0
    # alpha is a float32 in the file, and the scale a quotient of it: the last bit of B may differ.
    np.testing.assert_allclose(second, first, rtol=3e-7)


def test_layouts_and_values(made: tuple[str, Path]) -> None:
    name, folder = made
    architecture = Architecture.from_gguf(GGUFFile(folder / "model.gguf"))
    peft, gguf = (open_adapter(folder / a, architecture) for a in ("adapter", "adapter.gguf"))
    assert (peft.rank, peft.targets, peft.layers) == (gguf.rank, gguf.targets, gguf.layers)
    assert peft.scale == pytest.approx(gguf.scale)
    assert peft.targets == TINY_MODELS[name].targets
    layout = peft.layout(architecture)
    np.testing.assert_allclose(
        load_adapter(gguf.path, layout), load_adapter(peft.path, layout), rtol=3e-7
    )


def test_generation_under_either(made: tuple[str, Path]) -> None:
    _, folder = made
    generator = open_generator(
        str(folder / "model.gguf"),
        {"peft": folder / "adapter", "gguf": folder / "adapter.gguf"},
        max_length=32,
    )
    ids = list(range(5, 15))
    peft, gguf, bare = (generator.next_logits(ids, adapter=a) for a in ("peft", "gguf", None))
    np.testing.assert_allclose(gguf, peft, atol=1e-4)
    assert np.abs(bare - peft).max() > 0.1


def test_inspect_says_what_it_is(made: tuple[str, Path]) -> None:
    name, folder = made
    facts = gguf_facts(folder / "adapter.gguf")["adapter"]
    model = TINY_MODELS[name]
    assert (facts["rank"], facts["alpha"]) == (model.rank, pytest.approx(model.alpha))
    assert facts["tensors"] == len(model.adapter()) // 2


def test_an_adapter_of_another_kind_of_model(made: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = made
    other = TINY_MODELS["qwen3"]
    other.write_gguf(tmp_path / "other.gguf")
    architecture = Architecture.from_gguf(GGUFFile(tmp_path / "other.gguf"))
    with pytest.raises(InputError, match="is an adapter for the architecture"):
        open_adapter(folder / "adapter.gguf", architecture)


@pytest.mark.parametrize("adapter", ["adapter", "adapter.gguf"])
def test_another_alpha_in_the_config_changes_nothing(made: tuple[str, Path], adapter: str) -> None:
    """The product that was trained is what counts: B takes up the difference."""
    _, folder = made
    architecture = Architecture.from_gguf(GGUFFile(folder / "model.gguf"))
    layout = open_adapter(folder / adapter, architecture).layout(architecture)
    wider = AdapterLayout(
        architecture, layout.layers, layout.targets, layout.rank, 4 * layout.scale
    )
    own, scaled = (load_adapter(folder / adapter, each) for each in (layout, wider))
    for path, (a, b) in layout.to_modules(own).items():
        other_a, other_b = wider.to_modules(scaled)[path]
        np.testing.assert_array_equal(other_a, a)
        np.testing.assert_allclose(4 * other_b, b, rtol=3e-7)
