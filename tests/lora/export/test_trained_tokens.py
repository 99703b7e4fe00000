"""Rows of the embedding in a merged GGUF: those of the tokens, and no byte of another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from lora.adapters.peft_files import save_peft_adapter
from lora.config.schema import Config
from lora.export.to_gguf import export
from lora.forward.gguf.file import GGUFFile
from lora.shaders.errors import InputError
from lora.training.workload import Workload
from tests.support.export_case import decoded
from tests.support.tiny_gguf import write_tiny_llama

TOKENS = [319, 0, 44]
EMBEDDING = "token_embd.weight"


def saved(folder: Path, *targets: str) -> tuple[Path, np.ndarray]:
    """An adapter that begins, of other rows; and the rows."""
    write_tiny_llama(folder / "base.gguf", n_layers=1, types={"weight": "Q8_0"})
    config = Config.model_validate(
        {
            "model": {"path": str(folder / "base.gguf")},
            "adapter": {"rank": 2, "targets": list(targets), "trainable_tokens": TOKENS},
            "data": {"train": "none"},
            "output": "none",
        }
    )
    workload = Workload.open(config, train=False)
    flat = workload.initial.copy()
    rows = workload.layout.trained_tokens(flat)
    rows[:] = np.random.default_rng(0).normal(size=rows.shape)
    save_peft_adapter(folder / "saved", workload.layout, flat, config)
    return folder / "saved", rows


def test_other_rows_stay_to_the_byte(tmp_path: Path) -> None:
    adapter, rows = saved(tmp_path, "q_proj")
    done = export(adapter, "merged-gguf")
    base, merged = GGUFFile(tmp_path / "base.gguf"), GGUFFile(done.path)
    assert done.n_tensors == 2 and EMBEDDING in {tensor.name for tensor in done.merged}
    found = decoded(merged, EMBEDDING)[TOKENS]
    np.testing.assert_allclose(found, rows, atol=np.abs(rows).max() / 127)  # Q8_0's steps
    others = np.setdiff1d(np.arange(320), TOKENS)
    before, after = (np.array(file.tensors[EMBEDDING].data[:]) for file in (base, merged))
    assert (before[others] == after[others]).all() and (before[TOKENS] != after[TOKENS]).any()
    # B is zero: nothing else was changed, so no byte of it.
    name = "blk.0.attn_q.weight"
    assert (np.array(base.tensors[name].data[:]) == np.array(merged.tensors[name].data[:])).all()
    exact = export(adapter, "merged-gguf", kind="F32", output=tmp_path / "exact.gguf")
    found = decoded(GGUFFile(exact.path), EMBEDDING)
    np.testing.assert_allclose(found[TOKENS], rows, atol=2e-7)
    np.testing.assert_array_equal(found[others], decoded(base, EMBEDDING)[others])


def test_a_head_of_its_own_has_both(tmp_path: Path) -> None:
    """An adapted head that was the embedding: the embedding's new rows, and B · A."""
    adapter, rows = saved(tmp_path, "lm_head")
    path = adapter / "adapter_model.safetensors"
    tensors, rng = safetensors.numpy.load_file(path), np.random.default_rng(1)
    a, b = (f"base_model.model.lm_head.lora_{half}.weight" for half in "AB")
    tensors[b] = rng.normal(0, 0.3, tensors[b].shape).astype(np.float32)
    safetensors.numpy.save_file(tensors, path)
    merged = GGUFFile(export(adapter, "merged-gguf", kind="F32").path)
    exact = decoded(GGUFFile(tmp_path / "base.gguf"), EMBEDDING)
    exact[TOKENS] = rows
    np.testing.assert_allclose(decoded(merged, EMBEDDING), exact, atol=2e-7)
    exact += 16.0 * tensors[b] @ tensors[a]  # alpha 32, rank 2
    np.testing.assert_allclose(decoded(merged, "output.weight"), exact, atol=1e-5)


def test_no_gguf_adapter_holds_them(tmp_path: Path) -> None:
    adapter, _ = saved(tmp_path, "q_proj")
    with pytest.raises(InputError, match=r"rows of the embedding .* --to merged-gguf"):
        export(adapter, "gguf")
    assert not (adapter / "adapter.gguf").exists()
