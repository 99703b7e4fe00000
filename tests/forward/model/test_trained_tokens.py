"""Rows of the embedding in the flat arrays: before all groups, whole quads of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora.forward.gguf.file import GGUFFile
from lora.forward.model.adapter import AdapterLayout
from lora.forward.model.low_rank import Beside
from lora.forward.model.trained_tokens import NO_SLOT, TokenIndex, embedding_rows
from lora.shaders.errors import InputError
from lora.shaders.recording import Recording
from lora.training.exchange import stretches
from tests.support.architectures import LLAMA
from tests.support.export_case import decoded
from tests.support.kernels import with_facts
from tests.support.tiny_gguf import write_tiny_llama


def layout_of(*tokens: int, targets: tuple[str, ...] = ("v_proj",)) -> AdapterLayout:
    return AdapterLayout(LLAMA, [1], targets, 3, 2.0, beside=Beside(tokens=tokens))


def test_rows_lie_before_all_groups(recording: Recording) -> None:
    layout, without = layout_of(9, 2, 320, 5, 7), layout_of()
    assert layout.n_trainable == without.n_trainable + 5 * 32
    assert layout.size == without.size + 8 * 32  # 5 in whole quads
    assert layout.groups[0].a_start == 8 * 32
    flat = np.arange(layout.size, dtype=np.float32)
    assert layout.trained_tokens(flat).tobytes() == flat[: 5 * 32].tobytes()
    assert layout.token_rows(recording.memory.empty_flat(layout.size, purpose="adapter")).shape == (
        8,
        32,
    )
    # No rate of B's is theirs, and what several processes send last holds them.
    assert not layout.b_blocks()[: 8 * 32 // 64].any()
    assert stretches(layout)[-1].start == 0
    # The gradient goes through every layer.
    assert (layout.lowest_layer, without.lowest_layer, layout.layers) == (0, 1, [1])


def test_an_index_goes_both_ways(recording: Recording) -> None:
    index = TokenIndex.allocate(recording, [9, 2, 320, 5, 7], 322)
    ids, slots = (recording.memory.read(t) for t in (index.ids, index.slots))
    assert ids.tolist() == [9, 2, 320, 5, 7, NO_SLOT, NO_SLOT, NO_SLOT]
    assert [slots[token] for token in ids[:5]] == [0, 1, 2, 3, 4]
    assert (slots == NO_SLOT).sum() == 322 - 5


def test_what_can_not_be_trained_is_refused() -> None:
    own_inputs = replace(LLAMA, per_layer_size=8)
    with pytest.raises(InputError, match=r"trainable_tokens: .* inputs of their own for every"):
        AdapterLayout(own_inputs, [1], ("v_proj",), 4, 1.0, beside=Beside(tokens=(3,)))


def test_rows_larger_than_a_binding(recording: Recording) -> None:
    recording = with_facts(recording, max_binding=4 * 32 * 8)
    with pytest.raises(InputError, match=r"got 9 tokens; .* can bind the rows of 8 of this"):
        layout_of(*range(9)).check_bindings(recording.facts)


@pytest.mark.parametrize("kind", ["Q8_0", "F16", "Q4_1"])
def test_training_begins_with_the_base_s_rows(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "base.gguf"
    write_tiny_llama(path, types={"token_embd.weight": kind})
    file = GGUFFile(path)
    rows = embedding_rows(file, [7, 319, 0])
    np.testing.assert_array_equal(rows, decoded(file, "token_embd.weight")[[7, 319, 0]])
    assert embedding_rows(file, []).shape == (0, 32)
