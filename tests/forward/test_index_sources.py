"""What indexes on the device is checked where it enters: kernels run without checks of their own.

Every binding of whole numbers is here: a new kernel's fails this test until it is said where its
numbers come from, and that place checks them.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from lora.forward.decoder.step_inputs import StepInputs
from lora.forward.model.inputs import NO_ROW, IndexBounds, Inputs, indices
from lora.shaders.errors import InputError
from lora.shaders.recording import Recording
from tests.support.imports import REPOSITORY

# (template, binding): who writes it.
_INPUTS = "Inputs.write"
_STEP = "StepInputs.write"
_WEIGHTS = "quantized weights: bits that are decoded, no indices"
_INT_ROW = "a row as whole numbers, written by kernels: bits that are decoded, no indices"
_ARGMAX = "argmax.wgsl: the place of a maximum, below its length"
_HALVES = "f16 activations: no indices"
_TRAINED = "TokenIndex.allocate"
_LARGEST = "largest numbers as their bits: no indices"
_KEYS = "keys of pseudo-random masks and noise: bits that are hashed, no indices"
SOURCES = {
    "adamw_8bit.wgsl": {
        "first_moment": "bytes of moments, below 256: places in a table of as many",
        "second_moment": "bytes of moments, below 256: places in a table of as many",
    },
    "argmax.wgsl": {"token": _ARGMAX},
    "attention.wgsl": {"segments": f"{_INPUTS}, {_STEP}"},
    "attention_matrix.wgsl": {
        "segments": _INPUTS,
        "qkv": _HALVES,
        "out": _HALVES,
        "halves": _HALVES,
        "sizes": _LARGEST,
        "positions": _STEP,
    },
    "attention_matrix_backward_kv.wgsl": {"segments": _INPUTS, "qkv": _HALVES, "d_out": _HALVES},
    "attention_matrix_backward_q.wgsl": {
        "segments": _INPUTS,
        "qkv": _HALVES,
        "out": _HALVES,
        "d_out": _HALVES,
        "d_qkv": _HALVES,
    },
    "attention_backward_kv.wgsl": {"segments": _INPUTS},
    "attention_backward_q.wgsl": {"segments": _INPUTS},
    "attention_decode.wgsl": {"positions": _STEP},
    "attention_decode_combine.wgsl": {"row": _STEP, "int_row": _INT_ROW},
    "attention_decode_row.wgsl": {"row": _STEP},
    "causal_conv.wgsl": {"segments": f"{_INPUTS}, {_STEP}", "positions": f"{_INPUTS}, {_STEP}"},
    "causal_conv_backward.wgsl": {"segments": _INPUTS},
    "conv_state.wgsl": {"positions": _STEP},
    "cross_entropy.wgsl": {
        "labels": _INPUTS,
        "logits": "logits, and their gradient in f16: no indices",
    },
    "cross_entropy_sums.wgsl": {"labels": _INPUTS},
    "decode_weights.wgsl": {"weights": _WEIGHTS, "out": "f16 weights, decoded: no indices"},
    "delta_chunk_backward.wgsl": {"segments": _INPUTS},
    "delta_matrix_chunk_backward.wgsl": {"segments": _INPUTS},
    "delta_matrix_prepare.wgsl": {"segments": _INPUTS},
    "delta_matrix_states_backward.wgsl": {"segments": _INPUTS},
    "delta_matrix_walk.wgsl": {"segments": _INPUTS},
    "delta_matrix_walk_backward.wgsl": {"segments": _INPUTS},
    "delta_prepare.wgsl": {"segments": f"{_INPUTS}, {_STEP}"},
    "delta_row.wgsl": {"positions": _STEP},
    "delta_walk.wgsl": {"segments": f"{_INPUTS}, {_STEP}", "positions": f"{_INPUTS}, {_STEP}"},
    "delta_walk_backward.wgsl": {"segments": _INPUTS},
    "dora_lengths.wgsl": {"places": "where tensors of the device lie, by forward/dora.py"},
    "dropout_input_gradient.wgsl": {"row_keys": _KEYS},
    "embedding.wgsl": {"tokens": f"{_INPUTS}, {_STEP}, {_ARGMAX}", "weights": _WEIGHTS},
    "embedding_scatter.wgsl": {"tokens": _INPUTS, "order": _INPUTS},
    "embedding_noise.wgsl": {"row_keys": _KEYS},
    "gather.wgsl": {"indices": f"{_INPUTS}, {_STEP}"},
    "halve_rows.wgsl": {"halves": _HALVES, "largest": _LARGEST},
    "head_halves.wgsl": {"largest": _LARGEST, "halves": _HALVES, "sizes": _LARGEST},
    "head_sizes.wgsl": {"largest": _LARGEST},
    "int_row.wgsl": {"int_row": _INT_ROW},
    "largest_of_rows.wgsl": {"largest": _LARGEST},
    "largest_weights.wgsl": {"weights": _WEIGHTS},
    "lora_backward.wgsl": {"row_keys": _KEYS},
    "lora_gradient.wgsl": {"row_keys": _KEYS},
    "lora_project.wgsl": {"row_keys": _KEYS},
    "lora_backward_matrix.wgsl": {
        "row_largest": _LARGEST,
        "d_y_largest": _LARGEST,
        "row_keys": _KEYS,
    },
    "lora_project_matrix.wgsl": {"row_largest": _LARGEST, "row_keys": _KEYS},
    "lora_gradient_matrix.wgsl": {"d_y_largest": _LARGEST, "row_keys": _KEYS},
    "kv_store.wgsl": {"positions": _STEP},
    "matmul_int_row.wgsl": {"row": _INT_ROW, "weights": _WEIGHTS, "int_row": _INT_ROW},
    "matmul_row.wgsl": {"weights": _WEIGHTS},
    "parts/cached_heads.wgsl": {"positions": _STEP},
    "parts/head_bindings.wgsl": {"positions": f"{_INPUTS}, {_STEP}"},
    "parts/matmul_bindings.wgsl": {
        "weights": _WEIGHTS,
        "x": _HALVES,
        "w_largest": _LARGEST,
        "x_largest": _LARGEST,
        "row_keys": _KEYS,
    },
    "pair_rows.wgsl": {"largest": _LARGEST, "out": _HALVES},
    "pair_weights.wgsl": {"weights": _WEIGHTS, "w_largest": _LARGEST, "out": _HALVES},
    "rmsnorm.wgsl": {"y": _HALVES, "largest": _LARGEST},
    "rmsnorm_backward.wgsl": {"slots": _INPUTS, "largest": _LARGEST, "halves": _HALVES},
    "rope.wgsl": {"positions": f"{_INPUTS}, {_STEP}"},
    "row_bounds.wgsl": {"weights": _WEIGHTS},
    "scale_rows.wgsl": {"positions": f"{_INPUTS}, {_STEP}"},
    "token_columns.wgsl": {"ids": _TRAINED},
    "token_gradient.wgsl": {"tokens": _INPUTS, "ids": _TRAINED},
    "token_rows.wgsl": {"tokens": f"{_INPUTS}, {_STEP}, {_ARGMAX}", "slots": _TRAINED},
}
_WHOLE = r"array<(?:\{\{[^}]*[ui]32[^}]*\}\}|(?:vec\d<)?[ui]32>?)(?:, \d+)?>"
_PLAIN = re.compile(rf"var<storage, \w+> (\w+): {_WHOLE};")
_MACRO = re.compile(rf'bind\("(\w+)", "storage[^"]*", "{_WHOLE}"\)')


def test_every_binding_of_whole_numbers_is_known() -> None:
    folder = REPOSITORY / "shaders" / "wgsl"
    found: dict[str, set[str]] = {}
    for path in sorted(folder.rglob("*.wgsl")):
        text = path.read_text()
        names = set(_PLAIN.findall(text)) | set(_MACRO.findall(text))
        if names:
            found[str(path.relative_to(folder))] = names
    assert found == {name: set(bindings) for name, bindings in SOURCES.items()}


def test_nothing_else_writes_what_indexes() -> None:
    """u32 tensors are made for inputs alone, besides weights and what kernels write themselves."""
    makers = set()
    for room in ("forward", "backward", "optim", "lora", "shaders"):
        for path in sorted((REPOSITORY / room).rglob("*.py")):
            if re.search(r'"u32"', path.read_text()) and "references" not in path.parts:
                makers.add(str(path.relative_to(REPOSITORY)))
    known = {
        "forward/model/inputs.py",  # Inputs
        "forward/decoder/step_inputs.py",  # StepInputs
        "forward/decoder/step_tensors.py",  # argmax's token
        "forward/model/weights.py",  # bits
        "forward/model/trained_tokens.py",  # TokenIndex, and bits
        "forward/model/host_table.py",  # places of the rows that it has just sent
        "lora/training/non_finite.py",  # tells them from numbers
        "forward/int_row.py", "forward/argmax.py", "forward/embedding.py", "forward/gather.py",
        "lora/checks/tensors.py",  # of the checks of kernels, which are given by the checks
        "shaders/memory.py", "shaders/tensor.py", "shaders/program_data.py",
        "shaders/activations.py",
        "forward/attention.py",  # tests that they are u32
        "forward/attention_prompt.py",  # sizes and eights of f16, as bits
        "forward/dropout.py", "forward/embedding_noise.py",  # keys that are hashed
        "forward/matmul_decoded.py", "forward/matmul_prepared.py",  # bits
        "forward/plans/workbench.py",  # the same
        "backward/scratch.py", "backward/rmsnorm.py",  # sizes of rows, as bits
        "forward/decoder/head.py", "forward/rmsnorm.py",  # the same
    }  # fmt: skip
    assert makers <= known | {name for name in makers if name.startswith("lora/checks/")}


@pytest.mark.parametrize("value", [-1, 7, 2**31, -(2**40), 2**62])
def test_an_index_out_of_range_is_refused(value: int) -> None:
    with pytest.raises(InputError, match=rf"the token {value} at place 1 is out of range"):
        indices("the token", np.array([0, value, 3]), 7)


def test_indices_in_range_come_back() -> None:
    given = np.array([[0, 6], [3, NO_ROW]])
    np.testing.assert_array_equal(indices("the row", given, 7, but=NO_ROW), given)
    assert indices("the row", given, 7, but=NO_ROW).dtype == np.uint32
    assert indices("the row", np.zeros(0, int), 0).size == 0


_ROWS = 6
# What one micro-batch is made of, and how each part may leave its tensor.
_GOOD = {
    "token_ids": [1, 2, 3, 4], "positions": [0, 1, 0, 1], "segment_start": [0, 0, 2, 2],
    "segment_end": [2, 2, 4, 4], "targets": [2, -1, 4, -1],
}  # fmt: skip
_BAD = [
    ("token_ids", [1, 2, 9, 4]), ("token_ids", [-1, 2, 3, 4]), ("positions", [0, 1, 0, 8]),
    ("positions", [-1, 0, 0, 1]), ("segment_start", [0, 0, -1, 2]), ("segment_end", [2, 2, 5, 4]),
    ("segment_end", [2, 2, 0, 4]), ("segment_start", [4, 0, 2, 2]), ("targets", [9, -1, 4, -1]),
]  # fmt: skip


@pytest.fixture
def inputs(recording: Recording) -> Inputs:
    return Inputs.allocate(recording, _ROWS, _ROWS, 64, IndexBounds(tokens=9, rope_rows=8))


def test_a_micro_batch_in_range_is_written(inputs: Inputs, recording: Recording) -> None:
    values = {name: np.array(one) for name, one in _GOOD.items()}
    assert inputs.write(recording.memory, **values) == 2
    np.testing.assert_array_equal(recording.memory.read(inputs.tokens)[:4], _GOOD["token_ids"])


def test_the_order_of_tokens_is_written_where_it_is_wanted(recording: Recording) -> None:
    bounds = IndexBounds(tokens=9, rope_rows=8)
    ordered = Inputs.allocate(recording, _ROWS, _ROWS, 64, bounds, ordered=True)
    values = {name: np.array(one) for name, one in _GOOD.items()}
    ordered.write(recording.memory, **values | {"token_ids": np.array([5, 2, 5, 2])})
    assert ordered.token_order is not None
    assert recording.memory.read(ordered.token_order)[:4].tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize(("name", "value"), _BAD)
def test_a_micro_batch_out_of_range_is_refused(
    inputs: Inputs, recording: Recording, name: str, value: list[int]
) -> None:
    values = {key: np.array(one) for key, one in (_GOOD | {name: value}).items()}
    with pytest.raises(InputError, match="out of range"):
        inputs.write(recording.memory, **values)


@pytest.mark.parametrize(
    ("tokens", "position", "rope_row"),
    [([9], 0, 0), ([-1], 0, 0), ([1, 2], 4, 0), ([1, 2], -1, 0), ([1, 2], 0, 7), ([1], 0, -1)],
)
def test_new_tokens_out_of_range_are_refused(
    recording: Recording, tokens: list[int], position: int, rope_row: int
) -> None:
    step = StepInputs.allocate(recording, _ROWS, IndexBounds(tokens=9, rope_rows=8), room=5)
    step.write(recording.memory, [8, 0], 3, 6)
    with pytest.raises(InputError, match="out of range"):
        step.write(recording.memory, tokens, position, rope_row)
