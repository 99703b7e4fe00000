"""`lora export` on tiny models: numbers, bytes that stay, messages. llama.cpp: tests/parity."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy
import typer
from gguf import GGMLQuantizationType as Type
from typer.testing import CliRunner

from forward.adapter import AdapterLayout
from forward.architecture import Architecture, permute_rows_to_gguf
from forward.gguf_file import GGUFFile
from forward.requantize import quantize
from lora.export import Export, export
from lora.export_command import describe, export_command
from lora.gguf_adapter import load_gguf_adapter, read_adapter_settings
from lora.gguf_output import new_file
from lora.merge import MergedTensor
from lora.peft_files import load_peft_adapter
from shaders.errors import InputError, LoraError
from tests.forward.tiny_gguf import write_tiny_llama
from tests.parity.tiny_models import TINY_MODELS, TinyModel

CASES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "phi3_long")


def decoded(file: GGUFFile, name: str) -> np.ndarray:
    tensor = file.tensors[name]
    values = gguf.quants.dequantize(np.ascontiguousarray(tensor.data), tensor.type)
    return values.reshape(tensor.shape)


class Case:
    """A tiny model and its PEFT adapter on disk."""

    def __init__(self, model: TinyModel, folder: Path) -> None:
        self.model = model
        self.base = folder / "base.gguf"
        self.adapter = folder / "adapter"
        folder.mkdir(exist_ok=True)
        model.write_gguf(self.base)
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


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return Case(TINY_MODELS[request.param], tmp_path)


@pytest.fixture
def llama(tmp_path: Path) -> Case:
    return Case(TINY_MODELS["llama"], tmp_path)


# -- the adapter alone -----------------------------------------------------------------------------


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


def products(path: Path) -> dict[str, np.ndarray]:
    """What llama.cpp adds to each tensor of the base."""
    file = GGUFFile(path)
    alpha = file.metadata["adapter.lora.alpha"]
    found = {}
    for name in {name.rpartition(".")[0] for name in file.tensors}:
        a, b = decoded(file, f"{name}.lora_a"), decoded(file, f"{name}.lora_b")
        found[name] = alpha / len(a) * b.astype(np.float64) @ a.astype(np.float64)
    return found


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
    with pytest.raises(InputError, match="tensors of several ranks"):
        read_adapter_settings(done.path)


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
    assert (settings.rank, settings.alpha) == (32, 32.0)
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


# -- merged ----------------------------------------------------------------------------------------


def test_merged_tensors_are_the_exact_sum(case: Case) -> None:
    """In F32 but for the rounding of a sum; everything else byte for byte."""
    done = case.export("merged-gguf", kind="F32")
    base, merged = GGUFFile(case.base), GGUFFile(done.path)
    assert merged.metadata == base.metadata
    assert list(merged.tensors)[: len(base.tensors)] == list(base.tensors)
    touched = {tensor.name for tensor in done.merged}
    assert len(touched) == done.n_tensors == len(case.model.adapter()) // 2
    scale = case.model.alpha / case.model.rank
    for name, tensor in base.tensors.items():
        if name in touched:
            exact = decoded(base, name) + case.expected(name, scale)
            # f32 sums of up to `rank` products, and values up to 2.
            np.testing.assert_allclose(decoded(merged, name), exact, atol=2e-6)
        else:
            assert merged.tensors[name].type == tensor.type
            np.testing.assert_array_equal(merged.tensors[name].data, tensor.data)
    Architecture.from_gguf(merged)  # still a model that loads


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"])
def test_merged_in_every_small_type(llama: Case, kind: str) -> None:
    done = llama.export("merged-gguf", kind=kind)
    base, merged = GGUFFile(llama.base), GGUFFile(done.path)
    # Relative errors on normal numbers, see tests/forward/test_requantize.py; MXFP4 has no search.
    bound = {"Q8_0": 0.006, "Q5_0": 0.045, "Q5_1": 0.04, "MXFP4": 0.2}.get(kind, 0.09)
    for tensor in done.merged:
        exact = decoded(base, tensor.name) + llama.expected(
            tensor.name, llama.model.alpha / llama.model.rank
        )
        error = np.linalg.norm(decoded(merged, tensor.name) - exact) / np.linalg.norm(exact)
        assert merged.tensors[tensor.name].type == Type[kind]
        assert tensor.error == pytest.approx(error, rel=1e-3)
        assert 0 < error < bound
        change = np.linalg.norm(exact - decoded(base, tensor.name)) / np.linalg.norm(exact)
        assert tensor.change == pytest.approx(change, rel=1e-3)
        added = decoded(base, tensor.name) - decoded(merged, tensor.name)
        wanted = decoded(base, tensor.name) - exact
        kept = np.vdot(added, wanted) / np.vdot(wanted, wanted)
        assert tensor.kept == pytest.approx(kept, rel=1e-3)


def write_adapter(folder: Path, tensors: dict[str, np.ndarray], **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(
        {f"base_model.model.{name}.weight": values for name, values in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def wide(tmp_path: Path) -> tuple[Path, Path]:
    """A base with rows of 256, of several types, and an adapter on layer 1's down_proj."""
    base = tmp_path / "wide.gguf"
    types = {"weight": "Q8_0", "ffn_up.weight": "Q4_1", "token_embd.weight": "BF16"}
    write_tiny_llama(base, hidden_size=256, intermediate_size=512, types=types)
    random = np.random.default_rng(0)
    tensors = {
        "model.layers.1.mlp.down_proj.lora_A": random.normal(0, 0.05, (4, 512)),
        "model.layers.1.mlp.down_proj.lora_B": random.normal(0, 0.2, (256, 4)),
    }
    tensors = {name: values.astype(np.float32) for name, values in tensors.items()}
    adapter = write_adapter(tmp_path / "ours", tensors, base_model_name_or_path=str(base))
    return base, adapter


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_merged_in_super_blocks(wide: tuple[Path, Path], kind: str) -> None:
    done = export(wide[1], "merged-gguf", kind=kind)
    assert [tensor.kind for tensor in done.merged] == [Type[kind]]
    assert 0.01 < done.merged[0].error < 0.3
    # Again, over the new base: now it is a K-quant that is read and written.
    again = export(
        wide[1], "merged-gguf", base=str(done.path), output=done.path.with_name("again.gguf")
    )
    assert again.merged[0].kind == Type[kind]
    name = again.merged[0].name
    change = decoded(GGUFFile(again.path), name) - decoded(GGUFFile(done.path), name)
    tensors = safetensors.numpy.load_file(wide[1] / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.model.layers.1.mlp.down_proj.lora_{h}.weight"] for h in "AB")
    exact = 2 * b @ a
    size = np.linalg.norm(decoded(GGUFFile(again.path), name))
    # The second rounding alone stands between them, about as large as the first.
    assert np.linalg.norm(change - exact) < 1.2 * again.merged[0].error * size + 1e-6


def test_own_types_and_untouched_bytes(wide: tuple[Path, Path]) -> None:
    base, adapter = wide
    done = export(adapter, "merged-gguf")
    merged, original = GGUFFile(done.path), GGUFFile(base)
    assert [(t.name, t.kind) for t in done.merged] == [("blk.1.ffn_down.weight", Type.Q8_0)]
    assert done.path == adapter / "merged.gguf"
    for name, tensor in original.tensors.items():
        same = np.array_equal(merged.tensors[name].data, tensor.data)
        assert same == (name != "blk.1.ffn_down.weight"), name
    # The header: but for the counts at its start nothing may differ up to the list of tensors.
    old, new = base.read_bytes(), done.path.read_bytes()
    assert len(old) == len(new)
    start = old.index(b"blk.0.attn_q.weight")
    assert old[:start] == new[:start]


@pytest.fixture
def faint(tmp_path: Path) -> Path:
    """An adapter that changes a Q4_1 tensor by 1 %, below half a step of its grid."""
    base = tmp_path / "faint.gguf"
    write_tiny_llama(base, hidden_size=256, intermediate_size=512, types={"weight": "Q4_1"})
    random = np.random.default_rng(0)
    a, b = random.normal(size=(4, 512)), random.normal(size=(256, 4))
    size = np.linalg.norm(decoded(GGUFFile(base), "blk.1.ffn_down.weight"))
    b *= 0.01 * size / np.linalg.norm(2 * b @ a)
    tensors = {"lora_A": a.astype(np.float32), "lora_B": b.astype(np.float32)}
    return write_adapter(
        tmp_path / "faint",
        {f"model.layers.1.mlp.down_proj.{half}": values for half, values in tensors.items()},
        base_model_name_or_path=str(base),
    )


def test_a_faint_change_needs_fine_steps(faint: Path) -> None:
    (own,) = export(faint, "merged-gguf").merged
    (fine,) = export(faint, "merged-gguf", kind="Q8_0", force=True).merged
    print(f"kept: {own.kept:.4f} in {own.kind.name}, {fine.kept:.4f} in {fine.kind.name}")
    assert own.kind == Type.Q4_1
    assert own.change == pytest.approx(0.01, rel=1e-2)
    assert -0.1 < own.kept < 0.3
    assert 0.9 < fine.kept < 1.1


def test_an_adapter_of_nothing_keeps_all(wide: tuple[Path, Path]) -> None:
    """B = 0, as before the first step: nothing to lose, nothing to warn of."""
    weights = wide[1] / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    zeros = {n: np.zeros_like(v) if "lora_B" in n else v for n, v in tensors.items()}
    safetensors.numpy.save_file(zeros, weights)
    done = export(wide[1], "merged-gguf", kind="Q2_K")
    assert [(tensor.change, tensor.kept) for tensor in done.merged] == [(0.0, 1.0)]
    assert done.merged[0].error > 0.1
    assert describe(done)[0].startswith("Wrote")


def described(kind: str, kept: float) -> list[str]:
    merged = MergedTensor("blk.0.attn_q.weight", Type[kind], error=0.01, change=0.01, kept=kept)
    here = Path(__file__)
    return describe(Export(here, here, here, 1, [merged]))


@pytest.mark.parametrize(
    ("kind", "kept", "behaves", "finer"),
    [
        ("Q4_K", 0.06, "mostly like the base: 6.0%", "Q8_0"),
        ("Q8_0", 0.79, "only in part as it was trained: 79.0%", "F16"),
        ("BF16", 0.49, "mostly like the base: 49.0%", "F32"),
    ],
)
def test_warning_of_a_lost_change(kind: str, kept: float, behaves: str, finer: str) -> None:
    first, second, *_ = described(kind, kept)
    assert first.startswith(f"Warning: the merged file behaves {behaves}")
    assert f"rounding to {kind}." in first
    assert f"--type {finer} and --force" in second
    assert not any("Warning" in line for line in described(kind, 0.81))


def test_a_tied_head_gets_a_tensor_of_its_own(tmp_path: Path) -> None:
    base = tmp_path / "base.gguf"
    write_tiny_llama(base, types={"weight": "Q8_0"})
    random = np.random.default_rng(0)
    a, b = (random.normal(0, 0.3, shape).astype(np.float32) for shape in ((4, 32), (320, 4)))
    adapter = write_adapter(tmp_path / "ours", {"lm_head.lora_A": a, "lm_head.lora_B": b})
    done = export(adapter, "merged-gguf", base=str(base))
    merged, original = GGUFFile(done.path), GGUFFile(base)
    assert set(merged.tensors) - set(original.tensors) == {"output.weight"}
    assert merged.tensors["output.weight"].type == Type.Q8_0
    np.testing.assert_array_equal(
        merged.tensors["token_embd.weight"].data, original.tensors["token_embd.weight"].data
    )
    exact = decoded(original, "token_embd.weight") + 2 * b @ a
    error = np.linalg.norm(decoded(merged, "output.weight") - exact) / np.linalg.norm(exact)
    assert error < 0.008
    assert not Architecture.from_gguf(merged).tied_head
    with pytest.raises(InputError, match=r"adapts lm_head.*Take --to merged-gguf"):
        export(adapter, "gguf", base=str(base))


@pytest.mark.parametrize("target", ["gguf", "merged-gguf"])
def test_gemma2_has_no_head_of_its_own(tmp_path: Path, target: str) -> None:
    case = Case(TINY_MODELS["gemma2_head"], tmp_path)
    with pytest.raises(InputError, match="llama.cpp gives gemma2 no head of its own"):
        case.export(target)


def test_pieces_and_parts(wide: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of three rows give the same file as whole tensors."""
    whole = export(wide[1], "merged-gguf").path.read_bytes()
    monkeypatch.setattr("lora.merge._PIECE", 3 * 512)
    again = export(wide[1], "merged-gguf", force=True)
    assert again.path.read_bytes() == whole


def test_a_split_base_becomes_one_file(wide: tuple[Path, Path], tmp_path: Path) -> None:
    base = GGUFFile(wide[0])
    names = list(base.tensors)
    for number, part in enumerate((names[:5], names[5:]), start=1):
        path = tmp_path / f"split-0000{number}-of-00002.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        if number == 1:
            for key, field in gguf.GGUFReader(wide[0]).fields.items():
                if not key.startswith("GGUF.") and key != "general.architecture":
                    kinds = field.types
                    writer.add_key_value(key, field.contents(), kinds[0], sub_type=kinds[-1])
        writer.add_key_value("split.no", number - 1, gguf.GGUFValueType.UINT16)
        writer.add_key_value("split.count", 2, gguf.GGUFValueType.UINT16)
        writer.add_key_value("split.tensors.count", len(names), gguf.GGUFValueType.INT32)
        for name in part:
            tensor = base.tensors[name]
            data = np.ascontiguousarray(tensor.data)
            if tensor.type == Type.F32:
                data = data.view(np.float32).reshape(tensor.shape)
            writer.add_tensor(name, data, raw_dtype=tensor.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    one = export(wide[1], "merged-gguf")
    two = export(
        wide[1],
        "merged-gguf",
        base=str(tmp_path / "split-00001-of-00002.gguf"),
        output=tmp_path / "joined.gguf",
    )
    merged, joined = GGUFFile(one.path), GGUFFile(two.path)
    assert joined.paths == (two.path,)
    assert joined.metadata == merged.metadata
    for name, tensor in merged.tensors.items():
        np.testing.assert_array_equal(joined.tensors[name].data, tensor.data)


def test_memory_is_that_of_pieces(wide: tuple[Path, Path], tmp_path: Path) -> None:
    """A base of 50 MB with a merged tensor of 16 MB; 25 MB and more if it were whole."""
    base = tmp_path / "large.gguf"
    write_tiny_llama(
        base, n_layers=2, hidden_size=1024, intermediate_size=4096, types={"weight": "F16"}
    )
    random = np.random.default_rng(0)
    tensors = {
        "model.layers.1.mlp.down_proj.lora_A": random.normal(0, 0.1, (4, 4096)),
        "model.layers.1.mlp.down_proj.lora_B": random.normal(0, 0.1, (1024, 4)),
    }
    tensors = {name: values.astype(np.float32) for name, values in tensors.items()}
    adapter = write_adapter(tmp_path / "large", tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora.merge._PIECE", 1 << 16)
        tracemalloc.start()
        export(adapter, "merged-gguf", base=str(base))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # Per thread and piece some ten f32 arrays of 65,536 weights; tens of threads are possible.
    print(f"peak {peak / 2**20:.1f} MiB of a file of {base.stat().st_size / 2**20:.1f} MiB")
    assert peak < 16e6


# -- files and messages ----------------------------------------------------------------------------


def test_modelfiles(llama: Case, tmp_path: Path) -> None:
    done = llama.export()
    assert done.modelfile == llama.adapter / "Modelfile"
    lines = done.modelfile.read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        f"FROM {llama.base.resolve()}",
        "ADAPTER ./adapter.gguf",
    ]
    merged = llama.export("merged-gguf", output=tmp_path / "two words.gguf")
    lines = merged.modelfile.read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ['FROM "./two words.gguf"']


def test_each_export_keeps_its_modelfile(llama: Case, tmp_path: Path) -> None:
    """In one directory, whichever comes last; again for the same file it is written anew."""
    done = [llama.export(), llama.export("merged-gguf")]
    done.append(llama.export("merged-gguf", kind="F16", output=llama.adapter / "half.gguf"))
    names = [each.modelfile.name for each in done]
    assert names == ["Modelfile", "merged.Modelfile", "half.Modelfile"]
    for each, instruction in zip(done, ("ADAPTER", "FROM", "FROM"), strict=True):
        assert f"{instruction} ./{each.path.name}" in each.modelfile.read_text().splitlines()
    before = done[0].modelfile.read_text()
    with pytest.raises(InputError, match=r"was not written by lora export for other.gguf; --force"):
        llama.export(output=llama.adapter / "other.gguf")
    assert done[0].modelfile.read_text() == before
    done[0].path.unlink()
    assert llama.export().modelfile.read_text() == before


def test_modelfile_names_the_ollama_model(
    llama: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("lora.export.resolve_model", lambda name: llama.base)
    llama.change(base_model_name_or_path="ollama:gemma3:270m")
    assert "\nFROM gemma3:270m\n" in llama.export(base=None).modelfile.read_text()


def test_nothing_is_replaced_without_force(llama: Case) -> None:
    path = llama.adapter / "adapter.gguf"
    path.write_text("mine")
    with pytest.raises(InputError, match=r"adapter.gguf is there already; --force"):
        llama.export()
    assert path.read_text() == "mine"
    llama.export(force=True)
    path.unlink()
    (llama.adapter / "Modelfile").write_text("FROM mine\n")
    with pytest.raises(InputError, match="not written by lora export"):
        llama.export()
    assert not path.exists()


def test_the_base_is_never_replaced(llama: Case) -> None:
    before = llama.base.read_bytes()
    with pytest.raises(InputError, match="is the base itself"):
        llama.export("merged-gguf", output=llama.base, force=True)
    assert llama.base.read_bytes() == before


def test_a_failure_leaves_nothing(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora.merge._copy", fail)
    before = sorted(llama.adapter.iterdir())
    with pytest.raises(LoraError, match="could not be written: No space left"):
        llama.export("merged-gguf")
    assert sorted(llama.adapter.iterdir()) == before


def test_new_file_keeps_the_old_one_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyError), new_file(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def broken(case: Case, change: str) -> dict[str, Any]:
    """Breaks a case; returns the options of its export."""
    tensors = case.model.adapter()
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    weights = case.adapter / "adapter_model.safetensors"
    if change == "no adapter":
        weights.unlink()
    elif change == "no json":
        (case.adapter / "adapter_config.json").write_text("{")
    elif change == "dora":
        case.change(use_dora=True)
    elif change == "other kind":
        case.change(peft_type="IA3")
    elif change == "pattern":
        case.change(rank_pattern={"(": 3})
    elif change == "shape":
        safetensors.numpy.save_file({**tensors, first: tensors[first][:-1].copy()}, weights)
    elif change == "module":
        renamed = {n.replace("layers.0.", "layers.77."): v for n, v in tensors.items()}
        safetensors.numpy.save_file(renamed, weights)
    elif change == "empty":
        safetensors.numpy.save_file({}, weights)
    elif change == "huge":
        safetensors.numpy.save_file({**tensors, first: tensors[first] * 1e9}, weights)
        return {"kind": "F16"}
    elif change == "no base":
        return {"base": None}
    elif change == "missing base":
        return {"base": "nowhere.gguf"}
    elif change == "target":
        return {"target": "merged"}
    elif change == "type":
        return {"kind": "Q4_K"}
    elif change == "blocks":
        return {"target": "merged-gguf", "kind": "Q4_K"}
    elif change == "directory":
        return {"output": case.adapter}
    return {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no adapter", "no PEFT adapter there"),
        ("no json", "not the config of a LoRA adapter"),
        ("dora", "a DoRA adapter can't be exported here; merge it with PEFT"),
        ("other kind", "peft_type is 'IA3'"),
        ("pattern", "not the config of a LoRA adapter"),
        ("shape", r"q_proj has A .* want .* Name the right base with --base"),
        ("module", r"adapts model.layers.77.* does not have"),
        ("empty", "the adapter changes nothing"),
        ("huge", "too large for F16; take F32"),
        ("no base", r"names the base 'llama', which is no GGUF file here; name it with --base"),
        ("missing base", "There is no file nowhere.gguf"),
        ("target", r"--to merged: did you mean merged-gguf\?"),
        ("type", "--type Q4_K: with --to gguf it must be one of F32, F16"),
        ("blocks", r"blocks of 256. Take Q8_0"),
        ("directory", "is a directory"),
    ],
)
def test_messages(llama: Case, change: str, message: str) -> None:
    options = broken(llama, change)
    before = sorted(llama.adapter.iterdir())
    with pytest.raises(InputError, match=message):
        llama.export(**{"target": "gguf", **options})
    assert sorted(llama.adapter.iterdir()) == before


def test_what_overflows_is_refused(llama: Case) -> None:
    llama.change(lora_alpha=1e30)
    with pytest.raises(LoraError, match="not finite, or too large for F16"):
        llama.export("merged-gguf", kind="F16")
    assert not (llama.adapter / "merged.gguf").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model", "is no LoRA adapter: general.type is 'model'"),
        ("architecture", "adapter for the architecture 'llama'; this model's is 'qwen3'"),
        ("layers", "has no factors for model.layers"),
        ("extra", "also adapts"),
        ("rank", r"has A \(4, .*want"),
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
    with pytest.raises(InputError, match=message):
        load_gguf_adapter(path, case.layout(rank, 2.0))


def test_command(wide: tuple[Path, Path]) -> None:
    app = typer.Typer()
    app.command(name="export")(export_command)
    runner = CliRunner()
    result = runner.invoke(app, [str(wide[1]), "--to", "gguf"])
    assert result.exit_code == 0, result.output
    assert "1 adapted tensors" in result.output
    assert f"--lora {wide[1] / 'adapter.gguf'}" in result.output
    result = runner.invoke(app, [str(wide[1]), "--to", "merged-gguf", "--type", "q4_k"])
    assert result.exit_code == 0, result.output
    assert "Types of the merged tensors: 1 Q4_K." in result.output
    assert "at worst (blk.1.ffn_down.weight, Q4_K)" in result.output
    assert "of what the adapter changed is kept." in result.output
    assert "Warning" not in result.output
    assert result.stderr == ""  # no terminal: no bar, and no line of it
    assert runner.invoke(app, [str(wide[1])]).exit_code == 2


def test_command_warns_first(faint: Path) -> None:
    app = typer.Typer()
    app.command(name="export")(export_command)
    runner = CliRunner()
    result = runner.invoke(app, [str(faint), "--to", "merged-gguf"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Warning: the merged file behaves mostly like the base: ")
    result = runner.invoke(app, [str(faint), "--to", "merged-gguf", "--type", "Q8_0", "--force"])
    assert result.exit_code == 0, result.output
    assert "Warning" not in result.output
    assert "--type" not in result.output
