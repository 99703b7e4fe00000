"""LoRA on the embedding, against PEFT's lora_embedding_A and lora_embedding_B."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from tests.support.option_runs import (
    assert_alike,
    config_of,
    examples_of,
    peft_of,
    run_ours,
    run_theirs,
)
from tests.support.tiny_model import TinyModel
from tests.support.tiny_models import TINY_MODELS

pytestmark = pytest.mark.parity

# A head of its own; the embedding as head, which stays the base's; one with a scale, and a cap.
FAMILIES = ("llama_head", "qwen3", "gemma2")


def begun(model: TinyModel, folder: Path, **options: Any) -> tuple[Path, Path]:
    """The model's GGUF, and an adapter that we began and moved away from its beginning."""
    from lora.training.session import TrainingSession

    gguf, saved = folder / "base.gguf", folder / "saved"
    model.write_gguf(gguf)
    config = config_of(model, gguf, None, adapter=options)
    with TrainingSession(config, examples=examples_of(model)) as session:
        modules, rng = session.layout.to_modules(session.parameters()), np.random.default_rng(3)
        for path, (a, b) in modules.items():
            if path == "model.embed_tokens":
                assert not a.any() and b.std() == pytest.approx(1, rel=0.2)
                a[:] = rng.normal(0, 0.1, a.shape)
            else:
                b[:] = rng.normal(0, 0.15, b.shape)
        session.set_parameters(session.layout.from_modules(modules))
        session.save(saved)
    return gguf, saved


@pytest.mark.parametrize("name", FAMILIES)
def test_eight_steps(name: str, tmp_path: Path) -> None:
    """Kept and recomputed, with a rank of its own."""
    model = TINY_MODELS[name]
    options = {
        "targets": ["embed_tokens", "q_proj"], "layers": [1], "rank_pattern": {"embed_tokens": 6},
    }  # fmt: skip
    gguf, saved = begun(model, tmp_path, **options)
    theirs = run_theirs(peft_of(model, saved), model.token_rows())
    for recompute in ("off", "on"):
        config = config_of(model, gguf, saved, adapter=options, train={"recompute": recompute})
        assert_alike(run_ours(config, examples_of(model)), theirs)


@pytest.mark.parametrize("name", FAMILIES)
def test_files_go_both_ways(name: str, tmp_path: Path) -> None:
    """PEFT saves the base's embedding, too; what it saves is what we saved, and gives the same."""
    from lora.export.to_gguf import export
    from lora.generation.opening import open_generator
    from tests.support.tiny_judge import logits

    model = TINY_MODELS[name]
    gguf, saved = begun(model, tmp_path, targets=["embed_tokens", "down_proj"])
    net = peft_of(model, saved)
    theirs = tmp_path / "theirs"
    net.save_pretrained(theirs)
    ours, back = (
        safetensors.numpy.load_file(folder / "adapter_model.safetensors")
        for folder in (saved, theirs)
    )
    assert set(back) - set(ours) <= {"base_model.model.model.embed_tokens.base_layer.weight"}
    for tensor, values in ours.items():
        np.testing.assert_array_equal(back[tensor], values)
    row = model.token_rows()[0]
    judge = logits(net.eval(), [row])[-1]
    with open_generator(str(gguf), {"theirs": theirs}, max_length=64) as generator:
        found = generator.next_logits(row, adapter="theirs")
    np.testing.assert_allclose(found, judge, rtol=0, atol=2e-4)
    if name == "gemma2":  # llama.cpp gives it no head of its own
        return
    merged = export(theirs, "merged-gguf", base=str(gguf), kind="F32").path
    with open_generator(str(merged), max_length=64) as generator:
        found = generator.next_logits(row, adapter=None)
    np.testing.assert_allclose(found, judge, rtol=0, atol=2e-4)
