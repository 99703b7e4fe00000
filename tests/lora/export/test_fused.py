"""Files whose q, k and v are one tensor (convert_hf_to_gguf.py --fuse-qkv): what the others are."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from lora.adapters.adapted_tensor import AdaptedTensor, _as_one
from lora.forward.gguf.file import GGUFFile
from lora.forward.model.architecture import Architecture
from lora.generation.opening import open_generator
from lora.shaders.device import Device
from lora.shaders.errors import InputError
from tests.support.export_case import Case, decoded
from tests.support.tiny_models import TINY_MODELS
from tests.support.tiny_ours import gradients, open_session

# All layers fused, or one of them: it is said layer by layer.
CASES = [("llama_bias", (0, 1)), ("qwen2", (0, 1)), ("qwen3", (1,)), ("gemma3", (0,))]


def of_name(architecture: Architecture, layer: int, which: str) -> slice:
    """The rows of q, k or v in the tensor of all three."""
    a = architecture.layers[layer].mixer
    bounds = np.cumsum([0, a.query_size, a.kv_size, a.kv_size])
    place = "qkv".index(which)
    return slice(bounds[place], bounds[place + 1])


@pytest.mark.parametrize(("name", "layers"), CASES)
def test_it_trains_the_same(name: str, layers: tuple[int, ...], tmp_path: Path) -> None:
    """Loss, gradients and the adapter that is saved, to the last bit."""
    found = []
    for fused in ((), layers):
        case = Case(TINY_MODELS[name], tmp_path / str(len(fused)), fused)
        assert ("blk.0.attn_qkv.weight" in GGUFFile(case.base).tensors) is (0 in fused)
        with open_session(case.model, case.base, case.adapter) as session:
            ours = gradients(session)
            session.save(tmp_path / "saved")
            weights = (tmp_path / "saved" / "adapter_model.safetensors").read_bytes()
        found.append((ours.loss, {k: v.tobytes() for k, v in ours.gradients.items()}, weights))
    assert found[0] == found[1]


@pytest.mark.parametrize(("name", "layers"), CASES)
def test_it_is_exported_and_taken_back(
    name: str, layers: tuple[int, ...], tmp_path: Path, device: Device
) -> None:
    """As one adapter of rank 3r, B three times as large: llama.cpp divides alpha by the rank."""
    model = TINY_MODELS[name]
    plain = Case(model, tmp_path / "plain")
    fused = Case(model, tmp_path / "fused", layers)
    adapter = fused.export().path
    architecture = Architecture.from_gguf(GGUFFile(fused.base))
    file = GGUFFile(adapter)
    layer = next(layer for layer in layers if layer in model.layers)
    a, b = (decoded(file, f"blk.{layer}.attn_qkv.weight.lora_{half}") for half in "ab")
    assert a.shape == (3 * model.rank, architecture.hidden_size)
    separate = GGUFFile(plain.export().path)
    for place, which in enumerate("qkv"):
        own = slice(place * model.rank, (place + 1) * model.rank)
        wanted = decoded(separate, f"blk.{layer}.attn_{which}.weight.lora_b")
        rows = of_name(architecture, layer, which)
        np.testing.assert_allclose(b[rows, own], 3 * wanted, rtol=1e-6)
        others = np.delete(b[rows], np.arange(own.start, own.stop), axis=1)
        assert not others.any()
    logits = []
    ids = model.token_rows()[0][:9]
    for base, path in ((plain.base, plain.adapter), (fused.base, adapter)):
        with open_generator(str(base), {"one": path}, device=device) as generator:
            logits.append(generator.next_logits(ids, adapter="one"))
    # The sum over the rank has three times the terms, two thirds of them zero.
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "layers"), CASES[:1] + CASES[2:3])
def test_it_is_merged(name: str, layers: tuple[int, ...], tmp_path: Path) -> None:
    model = TINY_MODELS[name]
    plain = GGUFFile(Case(model, tmp_path / "plain").export("merged-gguf").path)
    fused = GGUFFile(Case(model, tmp_path / "fused", layers).export("merged-gguf").path)
    architecture = Architecture.from_gguf(fused)
    for layer in layers:
        whole = decoded(fused, f"blk.{layer}.attn_qkv.weight")
        for which in "qkv":
            rows = of_name(architecture, layer, which)
            wanted = decoded(plain, f"blk.{layer}.attn_{which}.weight")
            np.testing.assert_allclose(whole[rows], wanted, rtol=0, atol=1e-6)


def test_rows_that_dora_leaves_alone() -> None:
    """DoRA on v alone: q and k, in the same tensor, keep their lengths."""
    rng = np.random.default_rng(0)
    v = AdaptedTensor("blk.0.attn_qkv.weight", rng.normal(size=(2, 8)).astype(np.float32),
                      rng.normal(size=(4, 2)).astype(np.float32), 0.5,
                      np.abs(rng.normal(size=4)).astype(np.float32))  # fmt: skip
    base = rng.normal(size=(16, 8)).astype(np.float32)
    change = _as_one([(12, v)], 16).change(base, 0)
    assert not change[:12].any()
    np.testing.assert_allclose(change[12:], v.change(base[12:], 0), rtol=0, atol=1e-6)


def test_an_adapter_of_another_width_is_refused(tmp_path: Path) -> None:
    case = Case(TINY_MODELS["qwen3"], tmp_path / "fused", (0, 1))
    path = tmp_path / "wrong.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    hidden = Architecture.from_gguf(GGUFFile(case.base)).hidden_size
    for half, shape in (("a", (2, hidden)), ("b", (12, 2))):
        writer.add_tensor(f"blk.0.attn_qkv.weight.lora_{half}", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"B of blk\.0\.attn_qkv\.weight has 12 rows; this model"):
        open_generator(str(case.base), {"one": path})
