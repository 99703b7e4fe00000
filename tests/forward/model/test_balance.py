"""How many powers of two less numbers are stored under f16, against bounds in float64."""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import numpy as np
import pytest

from lora.forward.gguf.file import GGUFFile
from lora.forward.model.architecture import Architecture
from lora.forward.model.balance import find_balance
from lora.forward.model.frozen_model import load_model
from lora.shaders.recording import Recording
from tests.support.scaled_models import write_scaled
from tests.support.tiny_models import TINY_MODELS

BEGINS = 2.0**11, 2.0**15, 2.0**19  # of products' operands, before a norm, there behind a gate


def _powers(bound: float, to: float, limit: float) -> int:
    return math.ceil(math.log2(bound / to)) if bound > limit else 0


@pytest.mark.parametrize(("up", "output"), [(1.0, 1.0), (2.0**9, 1.0), (2.0**20, 2.0**12)])
def test_what_norms_are_given_has_bounds_of_its_own(
    up: float, output: float, tmp_path: Path, recording: Recording
) -> None:
    """A bound of sums is loose: brought as low as an operand's, rows would lose their bits."""
    path = tmp_path / "model.gguf"
    write_scaled(TINY_MODELS["gemma3"], path, {"ffn_up": up, "attn_output": output})
    file = GGUFFile(path)
    model = load_model(recording, file, Architecture.from_gguf(file), 64)
    tensors = {t.name: t.data.astype(np.float64) for t in gguf.GGUFReader(path).tensors}
    operand, normed, behind_gate = BEGINS
    for layer, found in enumerate(find_balance(recording, model).layers):

        def of(name: str, layer: int = layer) -> np.ndarray:
            return tensors[f"blk.{layer}.{name}.weight"]

        def lengths(name: str, norm: np.ndarray) -> np.ndarray:
            n = len(norm)
            return math.sqrt(n) * np.linalg.norm(of(name) * norm, axis=1)

        norm, heads = of("ffn_norm"), model.layers[layer].spec.mixer
        product = lengths("ffn_gate", norm) * lengths("ffn_up", norm)
        sums = np.abs(of("ffn_down")) @ product
        assert found.norms["post_feed_forward_norm"] == _powers(
            sums.max(), behind_gate, behind_gate
        )
        of_up = _powers(lengths("ffn_up", norm).max(), operand, normed)
        assert found.gated == _powers(product.max() * 2.0**-of_up, operand, normed)
        values = lengths("attn_v", of("attn_norm")).reshape(heads.n_kv_heads, -1)
        attended = values.repeat(heads.n_heads // heads.n_kv_heads, axis=0).reshape(-1)
        sums = np.abs(of("attn_output")) @ attended
        assert found.norms["post_mixer_norm"] == _powers(sums.max(), normed, normed)
    assert (found.norms["post_feed_forward_norm"] > 0) == (up > 1.0)
    assert (found.norms["post_mixer_norm"] > 0) == (output > 1.0)
