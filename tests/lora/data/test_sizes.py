"""Rows that are many: processes, the cache, what is too long, streams, weights, packing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lora.config.data_section import SourceConfig
from lora.data import cache, loading, sources
from lora.data.examples import Example, Examples
from lora.data.given import given_rows, tokenize
from lora.data.loading import DataSets, load_data, load_examples
from lora.data.order import DataStream
from lora.data.packing import best_fit_decreasing
from lora.data.pieces import Task
from lora.data.shapes import Shape
from lora.data.sources import open_source
from lora.data.streams import StreamedBatches, shuffled
from lora.data.worker import Setup
from lora.forward.gguf.file import GGUFFile
from lora.forward.text.tokenizer import Tokenizer
from lora.shaders.errors import InputError, LoraError
from tests.support.fake_tokenizer import FakeTokenizer, assistant, settings, user
from tests.support.tiny_gguf import write_tiny_llama


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def same(left: Examples, right: Examples) -> bool:
    return len(left) == len(right) and all(
        a.ids.tolist() == b.ids.tolist()
        and a.trained.tolist() == b.trained.tolist()
        and (a.index, a.row, a.turn, a.cut, a.n_cut) == (b.index, b.row, b.turn, b.cut, b.n_cut)
        for a, b in zip(left, right, strict=True)
    )


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Tokenizer]:
    """Enough rows for the pool and the cache, and a tokenizer out of a file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(sources, "PIECE_ROWS", 20)
    monkeypatch.setattr(sources._pieces, "__defaults__", (20,))
    write_tiny_llama(tmp_path / "model.gguf")
    rows = [{"prompt": f"say {'ab' * (i % 5)} ", "completion": f"{i}!"} for i in range(130)]
    path = write(tmp_path / "rows.jsonl", rows)
    return path, Tokenizer.from_gguf(GGUFFile(tmp_path / "model.gguf"))


def test_processes_and_the_cache_give_what_one_process_gives(
    many: tuple[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tokenizer = many
    data = settings(train=path, max_length=20)
    pooled, summary = load_examples(data, tokenizer)
    assert len(list(cache.folder_of_tables().iterdir())) == 1
    monkeypatch.setattr(loading, "Pool", None)  # no process is asked a second time
    kept, kept_summary = load_examples(data, tokenizer)
    assert same(pooled, kept) and summary == kept_summary
    monkeypatch.setattr(loading, "_FEW_PIECES", 10**6)
    here, here_summary = load_examples(data, tokenizer)
    assert same(pooled, here) and summary == here_summary
    assert load_data(data, tokenizer).places[129] == f"{path}, line 130"


def test_what_decides_the_tokens_decides_what_is_kept(many: tuple[str, Tokenizer]) -> None:
    path, tokenizer = many

    def n_kept(**values: Any) -> int:
        load_examples(settings(train=path, **values), tokenizer)
        return len(list(cache.folder_of_tables().iterdir()))

    assert n_kept() == 1
    assert n_kept(shuffle=False, packing=True) == 1
    assert n_kept(max_length=9) == 2
    assert n_kept(train_on="all") == 3
    with open(path, "a") as file:
        file.write('{"prompt": "a", "completion": "b"}\n')
    assert n_kept() == 4
    damaged = next(cache.folder_of_tables().glob("*/ids"))
    damaged.write_bytes(b"")
    for values in ({}, {"max_length": 9}, {"train_on": "all"}):
        assert load_examples(settings(train=path, **values), tokenizer)[1].n_rows == 131


def test_a_wrong_row_is_named_from_a_process_too(many: tuple[str, Tokenizer]) -> None:
    path, tokenizer = many
    with open(path, "a") as file:
        file.write('{"prompt": "a", "completion": 3}\n{"prompt"\n')
    with pytest.raises(InputError) as caught:
        load_examples(settings(train=path), tokenizer)
    assert str(caught.value) == f"{path}, line 131: completion is 3; it must be a string."
    assert not list(cache.folder_of_tables().iterdir())


def test_a_process_that_dies_is_said(
    many: tuple[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tokenizer = many
    monkeypatch.setattr(loading, "Pool", lambda setup, size: DyingPool(setup, 1))
    with pytest.raises(LoraError, match="A process that tokenizes the data has ended"):
        load_examples(settings(train=path), tokenizer)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="Windows has no such timer")
def test_a_row_without_end_is_said(
    many: tuple[str, Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    path = write(tmp_path / "b.jsonl", [{"messages": [user("a"), assistant("b")]}] * 70)
    origin = many[1].origin
    assert origin is not None
    worker = "import lora.data.worker as w; w.SECONDS_A_ROW = 0.2; w.main()"
    popen = subprocess.Popen

    def hurried(command: list[str], **options: Any) -> Any:
        return popen([command[0], "-c", worker], **options)

    task = Task(settings(train=path, chat_template=endless), Shape("chat"), False, None)
    monkeypatch.setattr(subprocess, "Popen", hurried)
    pieces = open_source(SourceConfig(path=path), "train").pieces()
    words = "b.jsonl, line 1 to 20: one of these rows takes longer"
    pool = loading.Pool(Setup(task, origin), 1)
    with pytest.raises(InputError, match=words), pool:
        list(pool.tokenized(pieces))


class DyingPool(loading.Pool):
    def __enter__(self) -> DyingPool:
        super().__enter__()
        for process in self._processes:
            process.kill()
        return self


# Rows that are too long.

LONG = [{"text": "abcdefghij"}, {"text": "xyz"}]


def test_what_becomes_of_long_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LONG)

    def found(overflow: str) -> tuple[list[str], str]:
        data = settings(train=path, max_length=4, overflow=overflow, append_eos="off")
        examples, summary = load_examples(data, FakeTokenizer())
        return [FakeTokenizer().decode(e.ids.tolist()) for e in examples], str(summary)

    assert found("cut")[0] == ["abcd", "xyz"]
    assert found("drop")[0] == ["xyz"]
    assert "1 left out, longer than data.max_length" in found("drop")[1]
    texts, summary = found("split")
    # Each part begins with the last token of that before: every token is predicted once.
    assert texts == ["abcd", "defg", "ghij", "xyz"] and "1 split at 4" in summary
    with pytest.raises(InputError) as caught:
        found("error")
    assert str(caught.value) == (
        f"{path}, line 1: has 10 tokens, and data.max_length is 4: raise it, or say with "
        "data.overflow what becomes of longer rows (cut, drop or split)."
    )


@hypothesis_settings(deadline=None)
@given(st.integers(2, 40), st.integers(2, 12))
def test_a_split_row_trains_each_token_once(length: int, limit: int) -> None:
    text = "".join(chr(0x4E00 + i) for i in range(length))
    parts = tokenize({"text": text}, FakeTokenizer(), max_length=limit, overflow="split",
                     append_eos="off")  # fmt: skip
    trained = [int(t) for e in parts for t in e.ids[e.trained]]
    assert trained == [100 + ord(c) for c in text[1:]]
    assert all(2 <= len(e.ids) <= limit for e in parts)
    assert [e.part for e in parts] == list(range(len(parts)))


# Weights.


def test_weights_say_how_often_an_epoch_takes_rows(tmp_path: Path) -> None:
    sets = []
    for name, weight in (("a", 1.0), ("b", 2.0), ("c", 0.5)):
        path = write(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(10)])
        sets.append({"path": path, "weight": weight})
    examples, _ = load_examples(settings(train=sets), FakeTokenizer())
    stream = DataStream(examples, batch_size=1, epochs=2)
    assert stream.total_steps == 70
    seen = [step[0].examples[0] for step in stream]
    epochs = [Counter(seen[:35]), Counter(seen[35:])]
    for epoch in epochs:
        assert all(epoch[i] == 1 for i in range(10))
        assert all(epoch[i] == 2 for i in range(10, 20))
        assert sum(epoch[i] for i in range(20, 30)) == 5
    assert all(epochs[0][i] + epochs[1][i] == 1 for i in range(20, 30))  # the other half then
    state = stream.state()
    with pytest.raises(InputError, match="made with weights"):
        DataStream(list(examples), batch_size=1, epochs=2).restore(state)


# Packing.


@hypothesis_settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 50))
def test_packing_loses_nothing_and_overfills_nothing(lengths: list[int], capacity: int) -> None:
    sizes = np.array(lengths, np.int32)
    examples, starts = best_fit_decreasing(np.arange(len(sizes)), sizes, capacity)
    assert sorted(examples.tolist()) == list(range(len(lengths)))
    filled = np.add.reduceat(sizes[examples], starts[:-1])
    assert filled.max() <= capacity
    # Any two rows together hold more than one could: else the later one had gone there.
    assert all(a + b > capacity for i, a in enumerate(filled) for b in filled[:i])


def test_packing_many_examples_is_quick_and_tight() -> None:
    lengths = np.random.default_rng(0).integers(10, 300, 100_000).astype(np.int32)
    _, starts = best_fit_decreasing(np.arange(len(lengths)), lengths, 1024)
    assert lengths.sum() / (1024 * (len(starts) - 1)) > 0.995


# Streams.


def examples_of(n: int) -> list[Example]:
    return [Example(np.full(2 + i % 7, i, np.int32), np.arange(2 + i % 7) > 0, i) for i in range(n)]


def stream_of(n: int, steps: int, **values: Any) -> StreamedBatches:
    options: dict[str, Any] = {
        "batch_size": 3, "gradient_accumulation": 2, "packing": False, "max_length": 8,
        "shuffle": True, "buffer": 8, "seed": 1, **values,
    }  # fmt: skip
    return StreamedBatches(lambda: iter(examples_of(n)), steps=steps, **options)


@hypothesis_settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40), n_before=st.integers(0, 20), packing=st.booleans(), shuffle=st.booleans()
)
def test_a_restored_stream_goes_on_bit_for_bit(
    n: int, n_before: int, packing: bool, shuffle: bool
) -> None:
    def stream() -> StreamedBatches:
        return stream_of(n, 20, packing=packing, shuffle=shuffle)

    whole = [[batch.examples for batch in step] for step in stream()]
    stopped = stream()
    for _ in range(n_before):
        next(stopped)
    resumed = stream()
    resumed.restore(json.loads(json.dumps(stopped.state())))
    assert (resumed.step, resumed.epoch) == (n_before, stopped.epoch)
    assert [[batch.examples for batch in step] for step in resumed] == whole[n_before:]
    # Each pass has each example once.
    seen = [i for step in whole for examples in step for i in examples]
    for first in range(0, len(seen) - n + 1, n):
        assert sorted(seen[first : first + n]) == list(range(n))


def test_a_shuffle_buffer_moves_examples_about() -> None:
    found = [e.index for e in shuffled(iter(examples_of(50)), 10, np.random.default_rng(0))]
    assert sorted(found) == list(range(50)) != found
    assert all(index <= place + 10 for place, index in enumerate(found))


def test_a_stream_that_became_shorter_is_refused() -> None:
    long = stream_of(40, 20)
    for _ in range(5):
        next(long)
    with pytest.raises(InputError, match="The rows end before the place where the checkpoint"):
        stream_of(6, 20).restore(long.state())
    with pytest.raises(InputError, match="made with shuffle_buffer 8, and now it is 4"):
        stream_of(40, 20, buffer=4).restore(long.state())


def test_an_iterator_is_gone_through_once() -> None:
    def rows() -> Iterator[dict[str, str]]:
        for index in range(70):
            yield {"text": f"row {index}"}

    data = DataSets(settings(), FakeTokenizer(), given=given_rows(rows()))
    streamed = data.streamed()
    assert len(list(streamed)) == 70 and str(streamed) == "text rows as they come"
    with pytest.raises(InputError, match="an iterator is gone through once"):
        list(streamed)


def test_an_empty_stream_is_refused() -> None:
    with pytest.raises(InputError, match="examples: holds no rows"):
        DataSets(settings(), FakeTokenizer(), given=given_rows(iter([]))).streamed()
    empty = DataSets(settings(), FakeTokenizer(), given=given_rows(iter([{"text": ""}])))
    with pytest.raises(InputError, match="no token of its rows is trained"):
        list(empty.streamed())


# A row alone.


def test_tokenizing_a_row(tmp_path: Path) -> None:
    row = {"messages": [user("a"), assistant("b")]}
    (example,) = tokenize(row, FakeTokenizer())
    assert FakeTokenizer().decode(example.ids[example.trained].tolist()) == "b<|im_end|>"
    (whole,) = tokenize(row, FakeTokenizer(), train_on="all")
    assert whole.trained.sum() == len(whole.ids) - 1
    with pytest.raises(InputError, match="tokenize: max_length: got 'x'; allowed here: a whole"):
        tokenize(row, FakeTokenizer(), max_length="x")
    with pytest.raises(InputError, match="examples, row 0: the columns are a, which is no known"):
        tokenize({"a": 1}, FakeTokenizer())
    write_tiny_llama(tmp_path / "model.gguf")
    (by_path,) = tokenize({"text": "hello"}, tmp_path / "model.gguf")
    assert len(by_path.ids) > 1


def test_the_folder_of_caches_may_have_no_room(
    many: tuple[str, Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tokenizer = many
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    with pytest.raises(InputError, match="tokenized data can't be kept there"):
        load_examples(settings(train=path), tokenizer)
    assert os.path.isfile(file)
