"""Data sets to examples: cut, counted, and wrong rows are refused by file and line."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from lora.data.examples import DataSummary, Example
from lora.data.loading import load_examples
from lora.data.rows import RowTokenizer
from lora.forward.gguf.file import GGUFFile
from lora.forward.text.tokenizer import Tokenizer
from lora.shaders.errors import InputError
from tests.support.fake_tokenizer import CHATML, FakeTokenizer, assistant, settings, user


def write_rows(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(
    source: str | list[str], tokenizer: FakeTokenizer | None = None, **values: Any
) -> tuple[list[Example], DataSummary]:
    return load_examples(settings(train=source, **values), tokenizer or FakeTokenizer())


def refusal(source: str | list[str], tokenizer: FakeTokenizer | None = None, **values: Any) -> str:
    with pytest.raises(InputError) as caught:
        load(source, tokenizer, **values)
    return str(caught.value)


# Files.


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [user("a"), assistant("b")], "id": 3}, "chat"),
        ({"prompt": "a", "completion": "b", "text": "c"}, "completion"),
        ({"instruction": "a", "output": "b"}, "instruct"),
        ({"text": "abc", "prompt": "unused"}, "text"),
    ],
)
def test_the_format_goes_by_the_columns(tmp_path: Path, row: Any, expected: str) -> None:
    examples, summary = load(write_rows(tmp_path / "a.jsonl", [row]))
    assert summary.data_format == expected
    assert len(examples) == 1


def test_cutting_leaving_out_and_the_summary(tmp_path: Path) -> None:
    rows = [
        {"prompt": "ab", "completion": "cd"},  # 5 tokens with EOS
        {"prompt": "abcdefgh", "completion": "x"},  # its answer is cut away
        {"prompt": "abcd", "completion": "xyz"},  # 8 tokens, cut to 6
    ]
    examples, summary = load(write_rows(tmp_path / "a.jsonl", rows), max_length=6)
    assert [example.index for example in examples] == [0, 1]
    assert [example.trained.tolist() for example in examples] == [
        [False, False, True, True, True],
        [False, False, False, False, True, True],
    ]
    assert [example.cut for example in examples] == [False, True]
    reason = "what is trained begins beyond data.max_length"
    assert summary == DataSummary("completion", 2, 11, 5, 2, 1, 10, 6, 3, {reason: 1})
    assert str(summary) == (
        "2 completion examples, 11 tokens, 5 of them trained; the longest row has 10; 2 cut to 6; "
        "1 left out, what is trained begins beyond data.max_length"
    )


def test_cut_is_what_lost_a_trained_token(tmp_path: Path) -> None:
    """ChatML's last line break is never trained: without it the answer is still whole."""
    rows = [{"messages": [user("a"), assistant("b")]}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    whole = load(path)[1].longest
    cut = []
    for length in (whole, whole - 1, whole - 2):
        (example,), summary = load(path, max_length=length)
        assert summary.n_cut == (length < whole)
        cut.append(example.cut)
    assert cut == [False, False, True]


def test_several_files_blank_lines_marks_and_line_separators(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "tw\xe2\x80\xa8o"}')
    examples, _ = load([str(first), write_rows(second, [{"text": "three"}])], append_eos="off")
    texts = [FakeTokenizer().decode(example.ids.tolist()) for example in examples]
    assert texts == ["one", "tw\u2028o", "three"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "a"}\n{"text": \n', ", line 2: not JSON (Expecting value); each line is one ob"),
        ('{"text": "a"}\n\n[1]\n', ", line 3: got [1]; each row is an object with columns."),
        ("[1]\n", ", line 1: got [1]; each row is an object with columns."),
        ('{"a": 1, "b": 2}\n', ", line 1: the columns are a, b, which is no known format (chat: "),
        ("{}\n", ", line 1: the columns are none, which is no known format (chat: messages; com"),
        (
            '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "answer": "b"}\n',
            ", line 2: lacks completion, which the format completion needs; its columns are prom",
        ),
        ('{"text": 3}\n', ", line 1: text is 3; it must be a string."),
        ('{"text": null}\n', ", line 1: text is null; it must be a string."),
        (
            '{"instruction": "a", "input": 1, "output": "b"}\n',
            ", line 1: input is 1; it must be a string.",
        ),
        ('{"messages": []}\n', ", line 1: messages is []; it must be a list of messages."),
        ('{"messages": "hi"}\n', ', line 1: messages is "hi"; it must be a list of messages.'),
        (
            '{"messages": [{"from": "human", "value": "hi"}]}\n',
            ', line 1: messages[0] is {"from": "human", "value": "hi"}; a message is an object wi',
        ),
        (
            '{"messages": [{"role": "user", "content": ["hi"]}]}\n',
            ', line 1: messages[0].content is ["hi"]; it must be a string.',
        ),
        ('{"text": ' + "1" * 5000 + "}\n", ", line 1: not JSON (a number in it is too long); each"),
        ('{"text": ' + "[" * 100_000 + "\n", ", line 1: nested too deeply."),
        ("\n \n", ": holds no rows."),
        ("", ": holds no rows."),
    ],
)
def test_wrong_rows_are_refused_by_file_and_line(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    assert refusal(str(path)).startswith(f"{path}{words}")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.jsonl")
    assert refusal(absent) == f"{absent}: there is no such file (data.train, data.eval)."
    good = write_rows(tmp_path / "a.jsonl", [{"text": "abc"}])
    assert refusal([good, absent]).startswith(f"{absent}: there is no such file")
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    assert refusal(str(latin)) == f"{latin}, line 2: not text in UTF-8."
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    assert refusal(str(folder)).startswith(f"{folder}: cannot be read (")


def test_a_rows_error_in_the_template_names_the_line(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"messages": [user("a"), assistant("b")]}])
    tokenizer = FakeTokenizer("{{ raise_exception('roles must alternate') }}")
    assert refusal(path, tokenizer) == (
        f"{path}, line 1: The chat template refused the messages: roles must alternate. Check "
        "their roles and fields."
    )


@pytest.mark.parametrize(
    "given",
    [
        {"chat_template": CHATML},
        {"chat_template_kwargs": {"style": 1}},
        {"roles_to_train": ["user"]},
    ],
)
def test_settings_of_chats_are_refused_where_there_are_none(tmp_path: Path, given: Any) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "abc"}])
    (name,) = given
    assert refusal(path, **given).startswith(
        f"data.{name} is for chats, and the rows are of the format text: leave it out"
    )
    # Evaluation may be on rows of another kind.
    load_examples(settings(eval=path, **given), FakeTokenizer(), "eval")


def test_a_data_set_without_a_trained_token(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"messages": [user("a")]}, {"messages": [user("b")]}])
    assert refusal(path) == (
        "data.train: no token of its 2 rows is trained. Left out: 2, empty, or without a turn to "
        "train (data.max_length is 512; the longest row has 9 tokens)."
    )


def test_the_eval_split(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "abc"}])
    examples, _ = load_examples(settings(eval=path), FakeTokenizer(), "eval")
    assert len(examples) == 1
    with pytest.raises(InputError, match="data.eval: got null; name the examples"):
        load_examples(settings(), FakeTokenizer(), "eval")


# Hugging Face data sets: a directory is loaded by the same call as a name on the hub.


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets  # type: ignore[import-untyped]

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    folder = tmp_path / "set"
    folder.mkdir()
    return folder


def test_a_data_set_has_no_fields_that_arrow_filled_in(data_set: Path) -> None:
    messages = [{**user("a"), "name": "Ann"}, assistant("b")]
    # Parquet, as on the hub: the assistant's message gets "name": None in it.
    table = pa.Table.from_pylist([{"messages": messages}, {"messages": messages[:1]}])
    pq.write_table(table, data_set / "train.parquet")
    template = CHATML.replace("message['role'] +", "message['role'] + message.get('name', '') +")
    examples, summary = load(str(data_set), FakeTokenizer(template))
    assert (summary.n_examples, summary.n_untrained) == (1, 1)
    assert FakeTokenizer().decode(examples[0].ids.tolist()) == (
        "<|im_start|>userAnn\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    )


def test_splits_of_a_data_set(data_set: Path) -> None:
    write_rows(data_set / "train.jsonl", [{"text": "abc"}])
    with pytest.raises(InputError) as caught:
        load_examples(settings(eval=str(data_set)), FakeTokenizer(), "eval")
    assert str(caught.value) == (
        f"{data_set}: the data set has no validation or valid or test split; it has train."
    )
    write_rows(data_set / "validation.jsonl", [{"text": "defgh"}])
    examples, _ = load_examples(settings(eval=str(data_set)), FakeTokenizer(), "eval")
    assert len(examples[0].ids) == 6  # and EOS


def test_a_data_set_that_cannot_be_loaded(data_set: Path) -> None:
    assert refusal(str(data_set)).startswith(f"{data_set}: cannot be loaded as a data set: ")


def test_training_from_a_file_does_not_import_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    load(write_rows(tmp_path / "a.jsonl", [{"text": "abc"}]))


# The real tokenizer and template.


def test_smollm2s_prompts_are_tokenized_as_by_generation(smollm2: Path) -> None:
    """Whatever a prompt ends with and an answer begins with, and only where it matters apart."""
    tokenizer = Tokenizer.from_gguf(GGUFFile(smollm2))
    rows = RowTokenizer(settings(), tokenizer, "completion")
    draw, apart = random.Random(0), 0
    pieces = ("a", "the", "12", "345", " ", "  ", "\n", "\n\n", "\t", ".", "...", "'", "s", "é",
              "🙂", "日本", "<|im_start|>", "user")  # fmt: skip
    for _ in range(500):
        prompt, answer = ("".join(draw.choices(pieces, k=draw.randint(1, 5))) for _ in range(2))
        (tokens,) = rows.tokenize({"prompt": prompt, "completion": answer})
        seen = tokenizer.encode(prompt).ids
        assert tokens.ids[: len(seen)] == seen
        assert tokens.trained.index(True) == len(seen)
        assert tokenizer.decode(tokens.ids, skip_special=False) == prompt + answer + "<|im_end|>"
        apart += tokens.ids[:-1] != tokenizer.encode(prompt + answer).ids
    assert 50 < apart < 250


def test_smollm2_trains_what_the_assistant_says(smollm2: Path) -> None:
    tokenizer = Tokenizer.from_gguf(GGUFFile(smollm2))
    messages = [user("Grüße 🙂?"), assistant("Ja 🙂!"), user("Why?"), assistant("42, of course.")]
    rows = RowTokenizer(settings(), tokenizer, "chat")
    (tokens,) = rows.tokenize({"messages": messages})
    ids, trained = np.array(tokens.ids), np.array(tokens.trained)
    text = tokenizer.decode(tokens.ids, skip_special=False)
    assert text.startswith("<|im_start|>system\n")
    said = tokenizer.decode(ids[trained].tolist(), skip_special=False)
    assert said == "Ja 🙂!<|im_end|>42, of course.<|im_end|>"
    assert tokenizer.decode([ids[-1]], skip_special=False) == "\n" and not trained[-1]


def test_smollm2_refuses_half_a_surrogate_pair_by_line(tmp_path: Path, smollm2: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "abc"}, {"text": "\ud800"}])
    with pytest.raises(InputError) as caught:
        load_examples(settings(train=path), Tokenizer.from_gguf(GGUFFile(smollm2)))
    assert str(caught.value).startswith(f"{path}, line 2: The text ")
