"""`lora export --to gguf` on tiny models: what is in the file, and that it loads again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.numpy
from gguf import GGMLQuantizationType as Type

from lora.adapters.gguf_files import load_gguf_adapter, read_adapter_settings
from lora.adapters.peft_files import load_peft_adapter
from lora.forward.gguf.file import GGUFFile
from lora.forward.gguf.quantization import quantize
from lora.forward.model.row_order import permute_rows_to_gguf
from lora.shaders.errors import InputError
from tests.support.export_case import CASES, Case, products
from tests.support.tiny_models import TINY_MODELS


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return Case(TINY_MODELS[request.param], tmp_path)


@pytest.fixture
def llama(tmp_path: Path) -> Case:
    return Case(TINY_MODELS["llama"], tmp_path)


def test_gguf_adapter_comes_back_as_the_peft_one(case: Case) -> None:
    done = case.export()
    settings = read_adapter_settings(done.path)
    model = case.model
    assert (settings.rank, settings.alpha) == (model.rank, model.alpha)
    assert settings.architecture == model.architecture
    layout = case.layout(settings.rank, settings.alpha / settings.rank)
    assert sorted(settings.modules(layout.architecture)) == sorted(
        {name.removeprefix("base_model.model.").rsplit(".", 2)[0] for name in model.adapter()}
    )
    np.testing.assert_array_equal(
        load_gguf_adapter(done.path, layout), load_peft_adapter(case.adapter, layout)
    )


def test_gguf_adapter_is_what_llama_cpp_reads(case: Case) -> None:
    """Names, metadata and products, through gguf-py's own reader."""
    done = case.export()
    reader = gguf.GGUFReader(done.path)
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values["general.architecture"] == case.model.architecture
    assert values["general.type"] == "adapter"
    assert values["adapter.type"] == "lora"
    alpha = values["adapter.lora.alpha"]
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(tensors) == 2 * done.n_tensors == len(case.model.adapter())
    for name in {name.rpartition(".")[0] for name in tensors}:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        product = (alpha / len(a)) * b.astype(np.float64) @ a.astype(np.float64)
        wanted = case.expected(name, case.model.alpha / case.model.rank)
        np.testing.assert_allclose(product, wanted, rtol=1e-5, atol=1e-7)


def test_rslora_is_said_by_alpha(llama: Case) -> None:
    llama.change(use_rslora=True)
    done = llama.export()
    rank, alpha = llama.model.rank, llama.model.alpha
    settings = read_adapter_settings(done.path)
    assert settings.alpha == pytest.approx(alpha * rank**0.5, rel=1e-6)
    for name, product in products(done.path).items():
        np.testing.assert_allclose(product, llama.expected(name, alpha / rank**0.5), atol=1e-6)
    layout = llama.layout(rank, alpha / rank**0.5)
    np.testing.assert_allclose(
        load_gguf_adapter(done.path, layout), load_peft_adapter(llama.adapter, layout), rtol=1e-6
    )


def test_alphas_of_single_tensors_go_into_b(llama: Case) -> None:
    llama.change(alpha_pattern={"v_proj": 3.0, r"layers\.0\.self_attn\.q_proj": 1.5})
    done = llama.export()
    rank, alpha = llama.model.rank, llama.model.alpha
    assert read_adapter_settings(done.path).alpha == alpha
    for name, product in products(done.path).items():
        its_alpha = {"blk.0.attn_q.weight": 1.5}.get(name, 3.0 if "attn_v" in name else alpha)
        np.testing.assert_allclose(product, llama.expected(name, its_alpha / rank), atol=1e-6)


def test_ranks_of_single_tensors_stay(llama: Case) -> None:
    tensors = llama.model.adapter()
    for name in tensors:
        if "o_proj" in name:
            tensors[name] = tensors[name][:2] if "lora_A" in name else tensors[name][:, :2].copy()
    safetensors.numpy.save_file(tensors, llama.adapter / "adapter_model.safetensors")
    llama.change(rank_pattern={"o_proj": 2})
    done = llama.export()
    file = GGUFFile(done.path)
    assert file.tensors["blk.0.attn_output.weight.lora_a"].shape[0] == 2
    alpha = llama.model.alpha
    b = tensors["base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight"]
    a = tensors["base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"]
    np.testing.assert_allclose(
        products(done.path)["blk.0.attn_output.weight"], alpha / 2 * b @ a, atol=1e-5
    )
    settings = read_adapter_settings(done.path)
    assert (settings.rank, set(settings.ranks.values())) == (
        llama.model.rank,
        {2, llama.model.rank},
    )
    # It loads again with its products, as the directory does.
    layout = llama.layout(settings.rank, alpha / settings.rank)
    for flat in (load_gguf_adapter(done.path, layout), load_peft_adapter(llama.adapter, layout)):
        padded_a, padded_b = layout.to_modules(flat)["model.layers.0.self_attn.o_proj"]
        assert not padded_a[2:].any() and not padded_b[:, 2:].any()
        np.testing.assert_allclose(layout.scale * padded_b @ padded_a, alpha / 2 * b @ a, atol=1e-5)


def test_f16(llama: Case) -> None:
    done = llama.export(kind="f16")
    assert {t.type for t in GGUFFile(done.path).tensors.values()} == {Type.F16}
    layout = llama.layout(llama.model.rank, llama.model.alpha / llama.model.rank)
    found, exact = load_gguf_adapter(done.path, layout), load_peft_adapter(llama.adapter, layout)
    assert (found != exact).any()
    # 11 bits; below 6e-5 f16 is subnormal, with steps of 6e-8.
    np.testing.assert_allclose(found, exact, rtol=2**-11, atol=3e-8)


@pytest.mark.parametrize("kind", ["BF16", "Q8_0"])
def test_adapters_of_others(llama: Case, tmp_path: Path, kind: str) -> None:
    """Without an alpha B · A is taken as it is; tensors may be of any type."""
    model = llama.model
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    given = products(llama.export().path)
    halves = {}
    for name in given:
        rows, columns = given[name].shape
        random = np.random.default_rng(rows)
        # Ranks of 32, so that B has whole blocks of Q8_0.
        halves[name] = [
            random.normal(size=s).astype(np.float32) for s in ((32, columns), (rows, 32))
        ]
        for half, values in zip(("lora_a", "lora_b"), halves[name], strict=True):
            stored = quantize(values, Type[kind])
            writer.add_tensor(f"{name}.{half}", stored, raw_dtype=Type[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    settings = read_adapter_settings(path)
    assert (settings.rank, settings.alpha) == (32, None)
    assert {settings.scale(name) for name in settings.ranks} == {1.0}
    layout = llama.layout(32, 1.0)
    modules = layout.to_modules(load_gguf_adapter(path, layout))
    a, b = modules["model.layers.0.self_attn.q_proj"]
    exact_a, exact_b = halves["blk.0.attn_q.weight"]
    heads = model.config["num_attention_heads"]
    for found, exact in ((a, exact_a), (permute_rows_to_gguf(b, heads), exact_b)):
        assert np.linalg.norm(found - exact) < 0.006 * np.linalg.norm(exact)


def test_language_model_one_level_down(llama: Case) -> None:
    """Adapters of Gemma 3 4B and up: the same under `model.language_model.layers`."""
    plain = products(llama.export().path)
    tensors = {
        name.replace("model.layers", "model.language_model.layers"): values
        for name, values in llama.model.adapter().items()
    }
    safetensors.numpy.save_file(tensors, llama.adapter / "adapter_model.safetensors")
    again = products(llama.export(force=True).path)
    assert again.keys() == plain.keys()
    for name, product in plain.items():
        np.testing.assert_array_equal(again[name], product)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model", "is no LoRA adapter: general.type is 'model'"),
        ("architecture", "adapter for the architecture 'llama'; this model's is 'qwen3'"),
        ("layers", "has no factors for model.layers"),
        ("extra", "also adapts"),
        ("rank", "its rank is 4, and the config's adapter.rank wants 8"),
        ("size", r"has A \(4, .*wants .* The adapter was made for another one"),
    ],
)
def test_messages_of_loading(llama: Case, tmp_path: Path, change: str, message: str) -> None:
    path = llama.export().path
    case, rank, model = llama, 4, llama.model
    if change == "model":
        path = llama.base
    elif change == "architecture":
        case = Case(TINY_MODELS["qwen3"], tmp_path / "other")
    elif change == "layers":
        one = replace(model, adapted_layers=(0,))
        one.write_adapter(llama.adapter)
        path = llama.export(force=True).path
    elif change == "extra":
        case.model = replace(model, adapted_layers=(0,))
    elif change == "rank":
        rank = 8
    elif change == "size":
        wider = replace(model, config={**model.config, "intermediate_size": 48})
        case = Case(wider, tmp_path / "wider")
    with pytest.raises(InputError, match=message):
        load_gguf_adapter(path, case.layout(rank, 2.0))
