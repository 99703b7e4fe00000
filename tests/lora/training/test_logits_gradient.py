"""Which steps have the gradient to their logits in f16, in the place of the logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.renderings import CPU, LARGE_GPU, MATRIX_GPU, Kind
from tests.support.tiny_gguf import write_tiny_llama
from tests.support.tiny_sessions import micro_batch

_F16, _ALL = {"precision": "f16"}, {"targets": "all-linear"}


@pytest.mark.parametrize(
    ("kind", "train", "adapter", "vocab_size", "halves"),
    [
        (MATRIX_GPU, _F16, _ALL, 512, True),
        (MATRIX_GPU, _F16 | {"label_smoothing": 0.1}, _ALL, 512, True),
        (MATRIX_GPU, {"precision": "f32"}, _ALL, 512, False),
        (LARGE_GPU, _F16, _ALL, 512, False),  # no matrix units
        (CPU, _F16, _ALL, 512, False),
        (MATRIX_GPU, _F16, _ALL, 500, False),  # no whole steps of tiles
        (MATRIX_GPU, _F16, {"targets": ["q_proj", "lm_head"]}, 512, False),  # others read it
        (MATRIX_GPU, _F16, {"targets": ["q_proj"], "trainable_tokens": [5]}, 512, False),
    ],
    ids=str,
)
def test_where_it_is_f16(
    kind: Kind, train: dict[str, Any], adapter: dict[str, Any], vocab_size: int, halves: bool,
    tmp_path: Path,
) -> None:  # fmt: skip
    path = tmp_path / "model.gguf"
    write_tiny_llama(path, vocab_size=vocab_size, types={"weight": "Q8_0"})
    found = micro_batch(path, kind, adapter, **train)
    (loss,) = [d for d in found if d.template == "cross_entropy"]
    head = next(d for d in found if d.label.endswith("head.head_backward"))
    assert loss.constants["halves"] == halves
    taken = head.constants["x_type"], head.constants["x_block"]
    assert taken == (("f16", 8192) if halves else ("f32", 0))
    # In place: not a byte more.
    assert head.tensors[1].n_bytes == loss.tensors[5].n_bytes
