"""Which turns and ends are trained by the config and by the row, under which template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora.shaders.errors import InputError
from tests.support.fake_tokenizer import (
    CHATML,
    PLAIN,
    THINK_IN_LAST,
    TWO_TURNS,
    FakeTokenizer,
    assistant,
    masked,
    shown,
    trained_text,
    user,
)


def refused(columns: dict[str, Any], data_format: str = "chat", template: str | None = CHATML,
            **values: Any) -> str:  # fmt: skip
    with pytest.raises(InputError) as caught:
        masked(columns, data_format, FakeTokenizer(template), **values)
    return str(caught.value)


# Which turns.


def test_train_on_last_and_roles_to_train() -> None:
    columns = {"messages": TWO_TURNS}
    assert trained_text(columns, "chat", FakeTokenizer(), train_on="last")[1] == ["A2<|im_end|>"]
    roles = {"roles_to_train": ["user"]}
    assert trained_text(columns, "chat", FakeTokenizer(), **roles)[1] == [
        "Q1<|im_end|>",
        "Q2<|im_end|>",
    ]
    both = {"roles_to_train": ["user", "assistant"]}
    _, trained = trained_text(columns, "chat", FakeTokenizer(), **both, train_on="last")
    assert trained == ["A2<|im_end|>"]
    _, trained = trained_text(columns, "chat", FakeTokenizer(), **both)
    assert trained == [f"{text}<|im_end|>" for text in ("Q1", "A1", "Q2", "A2")]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"weight": 0}, ["A2"]),
        ({"train": False}, ["A2"]),
        ({"weight": 1}, ["A1", "A2"]),
        ({"train": True}, ["A1", "A2"]),
        ({"weight": 0.0, "train": False}, ["A2"]),
    ],
)
def test_a_message_says_whether_it_is_trained(fields: Any, expected: list[str]) -> None:
    messages = [TWO_TURNS[0], {**TWO_TURNS[1], **fields}, *TWO_TURNS[2:]]
    text, trained = trained_text({"messages": messages}, "chat", FakeTokenizer())
    assert trained == [f"{answer}<|im_end|>" for answer in expected]
    assert text == trained_text({"messages": TWO_TURNS}, "chat", FakeTokenizer())[0]
    if "A1" not in expected:
        assert refused({"messages": messages}, train_on="all").startswith(
            "messages[1] says that it is not trained, but data.train_on: all trains every token"
        )


def test_a_users_message_may_ask_to_be_trained() -> None:
    messages = [{**user("Q1"), "train": True}, *TWO_TURNS[1:]]
    _, trained = trained_text({"messages": messages}, "chat", FakeTokenizer(), train_on="last")
    assert trained == ["Q1<|im_end|>", "A2<|im_end|>"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("turn", ["A1<|im_end|>", "A2<|im_end|>"]),
        ("none", ["A1", "A2"]),
        ("last", ["A1", "A2<|im_end|>"]),
        ("all", ["<|im_end|>", "A1<|im_end|>", "<|im_end|>", "A2<|im_end|>"]),
    ],
)
def test_train_on_eos(value: str, expected: list[str]) -> None:
    columns = {"messages": TWO_TURNS}
    _, trained = trained_text(columns, "chat", FakeTokenizer(), train_on_eos=value)
    assert trained == expected
    examples = masked(columns, "chat", FakeTokenizer(THINK_IN_LAST), train_on_eos=value)
    ends = sum(shown(tokens, FakeTokenizer())[1][-1].endswith("<|im_end|>") for tokens in examples)
    assert ends == {"turn": 2, "none": 0, "last": 1, "all": 2}[value]


def test_ends_alone_make_no_row_a_trained_one() -> None:
    messages = [user("Q1"), {**assistant("A1"), "weight": 0}]
    for value in ("turn", "all", "last", "none"):
        (tokens,) = masked({"messages": messages}, "chat", FakeTokenizer(), train_on_eos=value)
        assert not any(tokens.trained)


def test_rows_that_cannot_be_marked() -> None:
    assert refused({"messages": [assistant("b")]}).startswith(
        "The chat begins with the assistant, so nothing"
    )
    assert refused({"messages": TWO_TURNS}, "chat", None).startswith(
        "The model has no chat template. Give one with data.chat_template, use a model that has"
    )
    # A greeting that isn't trained is context like another.
    greeting = {**assistant("hello"), "weight": 0}
    _, trained = trained_text({"messages": [greeting, *TWO_TURNS]}, "chat", FakeTokenizer())
    assert trained == ["A1<|im_end|>", "A2<|im_end|>"]


def test_a_prompt_that_an_answer_changes_is_what_generation_sees() -> None:
    """As Mistral's, whose last question has the system message: an answer drops it."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '[' + (messages[0].content if loop.last else '') + m.content + ']' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + '<|im_end|>' }}{% endif %}"
        "{% endfor %}"
    )
    messages = [{"role": "system", "content": "terse "}, *TWO_TURNS]
    tokenizer = FakeTokenizer(template)
    examples = masked({"messages": messages}, "chat", tokenizer)
    assert [(tokens.turn, *shown(tokens, tokenizer)) for tokens in examples] == [
        (2, "[terse Q1] A1<|im_end|>", [" A1<|im_end|>"]),
        (4, "[Q1] A1<|im_end|>[terse Q2] A2<|im_end|>", [" A2<|im_end|>"]),
    ]
    # One that changes the end of the last question leaves nothing to find the answer by.
    ends_otherwise = CHATML.replace("message['content']", "message['content'][loop.last|int:]")
    message = refused({"messages": TWO_TURNS}, "chat", ends_otherwise)
    assert message.startswith("messages[1]: the chat template writes the message before it other")


# The config's template.


def test_a_template_of_the_config_is_taken_for_the_models(tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text(CHATML)
    for value in (str(file), CHATML):
        for own in (None, PLAIN):
            _, trained = trained_text(
                {"messages": TWO_TURNS}, "chat", FakeTokenizer(own), chat_template=value
            )
            assert trained == ["A1<|im_end|>", "A2<|im_end|>"]
    columns = {"instruction": "a", "output": "b"}
    text, _ = trained_text(columns, "instruct", FakeTokenizer(None), chat_template=CHATML)
    assert text.startswith("<|im_start|>user")
    absent = str(tmp_path / "absent.jinja")
    assert refused({}, "chat", None, chat_template=absent) == (
        f"data.chat_template: {absent}: there is no such file."
    )
    file.write_bytes(b"\xff{{ messages }}")
    assert refused({}, "chat", None, chat_template=str(file)) == (
        f"{file}: not text in UTF-8; a chat template is."
    )


def test_variables_of_the_template() -> None:
    template = "{{ style }}{{ mood }}" + CHATML
    columns = {"messages": TWO_TURNS, "chat_template_kwargs": {"mood": "glad "}}
    given = {"chat_template_kwargs": {"style": "terse ", "mood": "sad "}}
    text, _ = trained_text(columns, "chat", FakeTokenizer(template), **given)
    assert text.startswith("terse glad <|im_start|>")
    assert refused(columns) == (
        "chat_template_kwargs: mood is no variable that the chat template reads; it reads none."
    )
    assert refused({"messages": TWO_TURNS}, "chat", template, chat_template_kwargs={"x": 1}) == (
        "data.chat_template_kwargs: x is no variable that the chat template reads; it reads mood, "
        "style."
    )
