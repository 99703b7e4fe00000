"""Batching: nothing is lost, nothing crosses from one example into another, resume is exact."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.data.batches import IGNORED, Batch, make_batch, sequential_batches
from lora.data.examples import Example
from lora.data.order import DataStream
from lora.shaders.errors import InputError


def make_examples(lengths: list[int], seed: int = 0) -> list[Example]:
    generator = np.random.default_rng(seed)
    examples = []
    for index, length in enumerate(lengths):
        trained = generator.random(length) < 0.5
        trained[0] = False
        ids = generator.integers(0, 1000, length, dtype=np.int32)
        examples.append(Example(ids, trained, index))
    return examples


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.examples == other.examples and one.example_starts == other.example_starts
        for name in ("token_ids", "positions", "segment_start", "segment_end", "targets"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


lengths_strategy = st.lists(st.integers(1, 12), min_size=1, max_size=30)


def test_a_batch_written_out() -> None:
    first = Example(np.array([5, 6, 7], np.int32), np.array([False, False, True]), 0)
    second = Example(np.array([8, 9], np.int32), np.array([False, True]), 4)
    batch = make_batch([first, second])
    assert batch.token_ids.tolist() == [5, 6, 7, 8, 9]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1]
    assert batch.segment_start.tolist() == [0, 0, 0, 3, 3]
    assert batch.segment_end.tolist() == [3, 3, 3, 5, 5]
    assert batch.targets.tolist() == [IGNORED, 7, IGNORED, 9, IGNORED]
    assert batch.examples == [0, 4] and batch.example_starts == [0, 3]
    assert (batch.rows, batch.n_trained) == (5, 2)


@given(lengths_strategy)
def test_targets_are_each_examples_own_next_tokens(lengths: list[int]) -> None:
    examples = make_examples(lengths)
    batch = make_batch(examples)
    for name in ("token_ids", "positions", "segment_start", "segment_end", "targets"):
        array = getattr(batch, name)
        assert array.dtype == np.int32 and array.shape == (sum(lengths),)
    assert batch.n_trained == sum(int(example.trained.sum()) for example in examples)
    for example, start in zip(examples, batch.example_starts, strict=True):
        end = start + len(example.ids)
        np.testing.assert_array_equal(batch.token_ids[start:end], example.ids)
        assert set(batch.segment_start[start:end]) == {start}
        assert set(batch.segment_end[start:end]) == {end}
        expected = np.where(example.trained[1:], example.ids[1:], IGNORED)
        np.testing.assert_array_equal(batch.targets[start : end - 1], expected)
        assert batch.targets[end - 1] == IGNORED


def test_a_trained_first_token_does_not_become_the_example_befores_target() -> None:
    example = Example(np.array([5, 6], np.int32), np.array([True, True]), 0)
    assert make_batch([example, example]).targets.tolist() == [6, IGNORED, 6, IGNORED]
    assert example.trained.tolist() == [True, True]


@given(
    lengths=lengths_strategy,
    batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    packing=st.booleans(),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_epoch_has_every_example_once(
    lengths: list[int],
    batch_size: int,
    accumulation: int,
    packing: bool,
    shuffle: bool,
    seed: int,
) -> None:
    stream = DataStream(
        make_examples(lengths),
        batch_size=batch_size,
        gradient_accumulation=accumulation,
        packing=packing,
        max_length=12,
        shuffle=shuffle,
        seed=seed,
        epochs=2,
    )
    for epoch in range(2):
        n_steps = stream.steps_per_epoch(epoch)
        steps = list(islice(stream, n_steps))
        assert len(steps) == n_steps
        batches = [batch for step in steps for batch in step]
        seen = [index for batch in batches for index in batch.examples]
        assert sorted(seen) == list(range(len(lengths)))
        assert all(1 <= len(step) <= accumulation for step in steps)
        assert all(len(step) == accumulation for step in steps[:-1])
        for batch in batches:
            assert batch.rows <= batch_size * 12
            assert packing or len(batch.examples) <= batch_size
        if not packing:
            assert all(len(batch.examples) == batch_size for batch in batches[:-1])
            assert shuffle or seen == sorted(seen)
    assert next(stream, None) is None
    assert stream.epoch == 2.0


@settings(max_examples=50)
@given(
    lengths=lengths_strategy,
    packing=st.booleans(),
    n_before=st.integers(0, 20),
    seed=st.integers(0, 9),
)
def test_a_restored_stream_goes_on_bit_for_bit(
    lengths: list[int], packing: bool, n_before: int, seed: int
) -> None:
    def stream() -> DataStream:
        return DataStream(
            make_examples(lengths),
            batch_size=2,
            gradient_accumulation=2,
            packing=packing,
            max_length=12,
            seed=seed,
            steps=25,
        )

    whole = list(stream())
    assert len(whole) == 25
    stopped = stream()
    for _ in range(n_before):
        next(stopped)
    state = json.loads(json.dumps(stopped.state()))
    resumed = stream()
    resumed.restore(state)
    assert resumed.step == n_before and resumed.epoch == stopped.epoch
    rest = list(resumed)
    assert len(rest) == 25 - n_before
    for expected, got in zip(whole[n_before:], rest, strict=True):
        assert_same(expected, got)


def test_epochs_are_shuffled_differently_and_seeds_too() -> None:
    def order(seed: int) -> list[list[int]]:
        stream = DataStream(make_examples([3] * 20), batch_size=20, seed=seed, epochs=2)
        return [step[0].examples for step in stream]

    assert order(0) == order(0)
    first, second = order(0)
    assert first != second and first != order(1)[0]


@pytest.mark.parametrize(
    ("epochs", "steps", "expected"),
    [(1, None, 3), (2, None, 6), (0.5, None, 2), (1.4, None, 5), (3, 4, 4), (1, 100, 100)],
)
def test_total_steps(epochs: float, steps: int | None, expected: int) -> None:
    # 9 examples, 2 a micro-batch: 5 micro-batches, 2 a step: 3 steps, the last a short one.
    stream = DataStream(
        make_examples([4] * 9), batch_size=2, gradient_accumulation=2, epochs=epochs, steps=steps
    )
    assert stream.steps_per_epoch() == 3
    assert stream.total_steps == expected == len(list(stream))


def test_packing_fills_the_row_with_the_least_room_that_is_enough() -> None:
    stream = DataStream(
        make_examples([2, 6, 3, 7, 2]), batch_size=1, packing=True, max_length=10, shuffle=False
    )
    # 7 and 6 begin rows, 3 goes to 7, whose room is less; both 2 go to 6.
    assert [step[0].examples for step in stream] == [[2, 3], [0, 1, 4]]
    assert stream.packing_efficiency == 1.0
    assert DataStream(make_examples([2]), batch_size=1).packing_efficiency is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 3}, "made with batch_size 2, and now it is 3"),
        ({"seed": 1}, "made with seed 0, and now it is 1"),
        ({"gradient_accumulation": 2}, "made with gradient_accumulation 1, and now it is 2"),
        ({"shuffle": False}, "made with shuffle True, and now it is False"),
        ({"packing": True, "max_length": 9}, "made with packing False, and now it is True"),
    ],
)
def test_a_state_of_other_settings_is_refused(change: dict[str, Any], words: str) -> None:
    examples = make_examples([3, 4, 5])
    state = DataStream(examples, batch_size=2).state()
    with pytest.raises(InputError, match=words):
        DataStream(examples, **{"batch_size": 2, **change}).restore(state)


def test_a_state_of_other_data_is_refused_and_of_fewer_steps_is_not() -> None:
    state = DataStream(make_examples([3, 4, 5]), batch_size=2).state()
    with pytest.raises(InputError, match="made with n_examples 3, and now it is 2"):
        DataStream(make_examples([3, 4]), batch_size=2).restore(state)
    with pytest.raises(InputError, match="made with n_tokens 12, and now it is 13"):
        DataStream(make_examples([3, 4, 6]), batch_size=2).restore(state)
    DataStream(make_examples([3, 4, 5]), batch_size=2, steps=50).restore(state)


def test_sequential_batches_keep_the_order() -> None:
    batches = list(sequential_batches(make_examples([2, 3, 4, 5, 6]), 2))
    assert [batch.examples for batch in batches] == [[0, 1], [2, 3], [4]]
