"""`lora export --to merged-gguf` on tiny models: numbers, types, bytes that stay."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.numpy
from gguf import GGMLQuantizationType as Type

from lora.commands.export import describe
from lora.export.to_gguf import export
from lora.forward.gguf.file import GGUFFile
from lora.forward.model.architecture import Architecture
from lora.shaders.errors import InputError, LoraError
from tests.support.export_case import CASES, Case, decoded, write_adapter, write_faint, write_wide
from tests.support.tiny_gguf import write_tiny_llama
from tests.support.tiny_models import TINY_MODELS


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return Case(TINY_MODELS[request.param], tmp_path)


@pytest.fixture
def llama(tmp_path: Path) -> Case:
    return Case(TINY_MODELS["llama"], tmp_path)


@pytest.fixture
def wide(tmp_path: Path) -> tuple[Path, Path]:
    return write_wide(tmp_path)


@pytest.fixture
def faint(tmp_path: Path) -> Path:
    return write_faint(tmp_path)


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
    # Relative errors on normal numbers, see test_block_writers.py; MXFP4 has no search.
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
    monkeypatch.setattr("lora.export.merge._MERGED_AT_ONCE", 3 * 512)
    monkeypatch.setattr("lora.export.merge._COPIED_AT_ONCE", 3 * 4 * 512)
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
        patch.setattr("lora.export.merge._MERGED_AT_ONCE", 1 << 16)
        patch.setattr("lora.export.merge._COPIED_AT_ONCE", 4 << 16)
        patch.setattr("os.cpu_count", lambda: 2)  # a thread holds a piece: pieces are what counts
        tracemalloc.start()
        export(adapter, "merged-gguf", base=str(base))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # Per thread and piece some ten f32 arrays of 65,536 weights.
    print(f"peak {peak / 2**20:.1f} MiB of a file of {base.stat().st_size / 2**20:.1f} MiB")
    assert peak < 16e6


def test_what_overflows_is_refused(llama: Case) -> None:
    llama.change(lora_alpha=1e30)
    with pytest.raises(LoraError, match="not finite, or too large for F16"):
        llama.export("merged-gguf", kind="F16")
    assert not (llama.adapter / "merged.gguf").exists()
