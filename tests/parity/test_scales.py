"""Matrices whose products are multiplied by a number of their own (`NAME.scale`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lora.export.to_gguf import export
from tests.support.llama_cpp_logits import LlamaCpp
from tests.support.tiny_models import TINY_MODELS
from tests.support.tiny_ours import gradients, logits, open_session

pytestmark = pytest.mark.parity

# Powers of two, so that the divided weights times their scale are the model's own.
SCALES = {
    "blk.0.attn_q.scale": 0.25, "blk.0.attn_output.scale": 4.0, "blk.1.attn_k.scale": 0.5,
    "blk.1.ffn_gate.scale": 8.0, "blk.1.ffn_down.scale": 0.125,
}  # fmt: skip


def test_scales_of_matrices(tmp_path: Path) -> None:
    """Ours, llama.cpp with the adapter, and merged, are all as transformers without the scales."""
    from tests.support.tiny_judge import judge, log_softmax

    model, base, adapter = TINY_MODELS["llama"], tmp_path / "base.gguf", tmp_path / "adapter"
    model.write_gguf(base, scales=SCALES)
    model.write_adapter(adapter)
    theirs = judge(model, adapter)
    session = open_session(model, base, adapter)
    assert np.abs(logits(session, adapted=True) - theirs.adapted_logits).max() < 1e-4
    ours = gradients(session)
    for name, gradient in theirs.gradients.items():
        error = np.linalg.norm(ours.gradients[name] - gradient) / np.linalg.norm(gradient)
        assert error < 1e-4, name
    row = model.token_rows()[0]
    prefixes = [row[:length] for length in (7, 40)]
    expected = log_softmax(theirs.adapted_logits)[[len(prefix) - 1 for prefix in prefixes]]
    written = export(adapter, "gguf", base=str(base))
    merged = export(adapter, "merged-gguf", base=str(base))
    reread = open_session(model, base, written.path)
    assert np.abs(logits(reread, adapted=True) - theirs.adapted_logits).max() < 1e-4
    for llama_cpp in (LlamaCpp(base, written.path), LlamaCpp(merged.path)):
        answers = llama_cpp.log_probabilities(prefixes, expected.shape[1])
        for one, (tokens, values) in zip(expected, answers, strict=True):
            assert np.abs(values - one[tokens]).max() < 2e-4
