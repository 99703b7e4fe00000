"""Shapes of rows: public data sets' columns become chats, completions, instructions or text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora.data.loading import load_examples
from lora.data.shapes import shape_of
from lora.shaders.errors import InputError
from tests.support.fake_tokenizer import FakeTokenizer, assistant, settings, shown, user

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
SYSTEM = "<|im_start|>system\nBe kind.<|im_end|>\n"
CALLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def said(path: Path, row: Any, template: str | None = None, **values: Any) -> tuple[str, list[str]]:
    """The text of a row that gives one example, and what of it is trained."""
    path.write_text(json.dumps(row) + "\n")
    tokenizer = FakeTokenizer(template) if template else FakeTokenizer()
    (example,), _ = load_examples(settings(train=str(path), **values), tokenizer)
    return shown(example, tokenizer)  # type: ignore[arg-type]


def refusal(path: Path, row: Any, **values: Any) -> str:
    with pytest.raises(InputError) as caught:
        said(path, row, **values)
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # Alpaca
        ({"instruction": "Q", "input": "", "output": "A"}, CHAT.format("Q", "A")),
        (
            {"instruction": "Q", "input": "I", "output": "A", "system": "Be kind.", "history": []},
            SYSTEM + CHAT.format("Q\n\nI", "A"),
        ),
        (
            {"instruction": "Q", "output": "A", "history": [["q", "a"]]},
            CHAT.format("q", "a") + CHAT.format("Q", "A"),
        ),
        # Dolly
        (
            {"instruction": "Q", "context": "C", "response": "A", "category": "open_qa"},
            CHAT.format("Q\n\nC", "A"),
        ),
        ({"instruction": "Q", "context": "", "response": "A"}, CHAT.format("Q", "A")),
        ({"prompt": "Q", "response": "A"}, CHAT.format("Q", "A")),
        ({"question": "Q", "answer": "A", "id": 3}, CHAT.format("Q", "A")),
        ({"input": "Q", "output": "A"}, CHAT.format("Q", "A")),
        # ShareGPT
        (
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            CHAT.format("Q", "A"),
        ),
        (
            {
                "id": "x_0",
                "system": "Be kind.",
                "conversations": [user("Q"), assistant("A")],
            },
            SYSTEM + CHAT.format("Q", "A"),
        ),
        (
            {
                "conversation": [
                    {"from": "system", "value": "Be kind."},
                    {"from": "user", "value": "Q"},
                    {"from": "Assistant", "value": "A"},
                ]
            },
            SYSTEM + CHAT.format("Q", "A"),
        ),
        # TRL's conversational prompt and completion
        ({"prompt": [user("Q")], "completion": [assistant("A")]}, CHAT.format("Q", "A")),
        # nested values as text, as tables have them
        ({"messages": json.dumps([user("Q"), assistant("A")])}, CHAT.format("Q", "A")),
        # parts, joined as llama.cpp joins them
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": t} for t in "QR"]},
                    assistant("A"),
                ]
            },
            CHAT.format("Q\nR", "A"),
        ),
    ],
)
def test_shapes_that_become_chats(tmp_path: Path, row: Any, expected: str) -> None:
    text, trained = said(tmp_path / "a.jsonl", row)
    assert text == expected and trained[-1] == "A<|im_end|>"
    assert len(trained) == text.count("<|im_start|>assistant")


def test_wikisql_is_text(tmp_path: Path) -> None:
    text = "table: 1-10015132-16\ncolumns: Player, No.\nQ: Who wears 3?\nA: SELECT Player"
    assert said(tmp_path / "a.jsonl", {"text": text})[0] == text + "<|im_end|>"


def test_calls_that_sharegpt_writes_as_messages(tmp_path: Path) -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"in": "Bern"}}'},
            {"from": "observation", "value": "sun"},
            {"from": "gpt", "value": "Sun."},
        ],
        "tools": "[]",
    }
    text, trained = said(tmp_path / "a.jsonl", row, CALLS)
    call = '<call>{"name": "weather", "arguments": {"in": "Bern"}}</call><|im_end|>'
    assert trained == [call, "Sun.<|im_end|>"]
    assert "<|im_start|>tool\nsun<|im_end|>" in text


def test_the_prompts_own_answers_are_not_trained(tmp_path: Path) -> None:
    """Of lists of messages the completion alone is, as TRL does it; with train_on: all, all."""
    row = {
        "prompt": [user("q"), assistant("a"), user("Q")],
        "completion": [assistant("A")],
    }
    assert said(tmp_path / "a.jsonl", row)[1] == ["A<|im_end|>"]
    (whole,) = said(tmp_path / "a.jsonl", row, train_on="all")[1]
    assert whole == (CHAT.format("q", "a") + CHAT.format("Q", "A"))[len("<|im_start|>") :]


def test_columns_are_mapped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = {"q": "Q ", "a": "A", "text": "unused"}
    columns = {"prompt": "q", "completion": "a"}
    assert said(path, row, columns=columns) == ("Q A<|im_end|>", ["A<|im_end|>"])
    path.write_text(json.dumps(row) + "\n")
    source = {"path": str(path), "columns": {"output": "a"}}
    examples, _ = load_examples(
        settings(train=source, columns={"instruction": "q"}), FakeTokenizer()
    )
    assert shown(examples[0], FakeTokenizer())[0] == CHAT.format("Q ", "A")  # type: ignore[arg-type]
    dialog = {"dialog": [{"who": "human", "says": "Q"}, {"who": "bot", "says": "A"}]}
    named = {"messages": "dialog", "role": "who", "content": "says"}
    assert said(path, dialog, columns=named)[0] == CHAT.format("Q", "A")
    assert said(path, {"dialog": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
                columns={"messages": "dialog"})[0] == CHAT.format("Q", "A")  # fmt: skip
    assert refusal(path, row, columns={"prompt": "x"}) == (
        f"{path}, line 1: lacks the column x, which data.columns names; its columns are q, a, text."
    )
    assert refusal(path, {"q": 3, "a": "A"}, columns=columns) == (
        f"{path}, line 1: q is 3; it must be a string."
    )
    path.write_text('{"q": "Q ", "a": "A"}\n{"q": "Q "}\n')
    with pytest.raises(InputError, match="line 2: lacks a, which the format completion needs"):
        load_examples(settings(train=str(path), columns=columns), FakeTokenizer())


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"prompt": "Q", "chosen": "A", "rejected": "B"},
            "columns: {prompt: prompt, completi",
        ),
        ({"chosen": [user("Q"), assistant("A")], "rejected": []}, "columns: {messages: chosen}"),
        ({"chosen": "A", "rejected": "B"}, "columns: {text: chosen}"),
    ],
)
def test_preference_pairs_are_refused_by_name(tmp_path: Path, row: Any, words: str) -> None:
    message = refusal(tmp_path / "a.jsonl", row)
    assert (
        "line 1: has the columns chosen and rejected: pairs of answers, one of which is" in message
    )
    assert words in message


def test_preferred_answers_can_be_trained_on_as_the_error_says(tmp_path: Path) -> None:
    row = {"prompt": "Q", "chosen": [user("Q"), assistant("A")], "rejected": []}
    columns = {"messages": "chosen"}
    assert said(tmp_path / "a.jsonl", row, columns=columns)[0] == CHAT.format("Q", "A")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"conversations": [{"from": "narrator", "value": "x"}]},
            'conversations[0] is said by "narrator"; known are human, user',
        ),
        (
            {"conversations": [{"from": "function_call", "value": "x"}]},
            'conversations[0] is "x"; a call is an object with name and arguments.',
        ),
        ({"conversations": [3]}, "conversations[0] is 3; a message is an object with role and"),
        (
            {"conversations": [{"from": "human", "value": [{"type": "image"}]}]},
            'conversations[0].content has a part of the type "image"; this version trains on',
        ),
        ({"question": "Q", "answer": 3}, "answer is 3; it must be a string."),
        ({"a": "Q"}, "the columns are a, which is no known format (chat: messages; completion"),
    ],
)
def test_errors_have_the_rows_own_names(tmp_path: Path, row: Any, words: str) -> None:
    path = tmp_path / "a.jsonl"
    assert refusal(path, row).startswith(f"{path}, line 1: {words}")


@pytest.mark.parametrize(
    ("data_format", "columns"),
    [
        ("completion", {"prompt": "Q", "response": "A"}),
        ("completion", {"input": "Q", "output": "A"}),
    ],
)
def test_a_format_that_is_asked_for(data_format: str, columns: dict[str, str]) -> None:
    shape = shape_of(columns, data_format, {})
    assert [shape.given(name) for name in shape.required] == list(columns)
    assert shape_of(columns, "auto", {}).data_format == "instruct"
