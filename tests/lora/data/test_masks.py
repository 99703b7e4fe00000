"""What is trained, format by format, read off through a tokenizer of one token a character."""

from __future__ import annotations

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

# As Phi-3's: the whole text ends with EOS.
EOS_AT_END = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% else %}{{ '<|eos|>' }}{% endif %}"
)
# As Nemotron 3's: the prompt opens thoughts, which an answer without any closes at once.
PROMPT_THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ ('<think></think>' if m.role == 'assistant' else '') + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
# As GLM's: a turn ends where the next role's marker stands.
NEXT_ROLE = (
    "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}"
    "{{ '\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def refused(columns: dict[str, Any], data_format: str = "chat", template: str | None = CHATML,
            **values: Any) -> str:  # fmt: skip
    with pytest.raises(InputError) as caught:
        masked(columns, data_format, FakeTokenizer(template), **values)
    return str(caught.value)


# Turns of a chat.


def test_every_assistant_turn_and_its_end_is_trained() -> None:
    messages = [user("hi"), assistant("yo"), user("and?"), assistant("end\n")]
    text, trained = trained_text({"messages": messages}, "chat", FakeTokenizer())
    assert text == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
        "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\nend\n<|im_end|>\n"
    )
    assert trained == ["yo<|im_end|>", "end\n<|im_end|>"]


def test_a_chat_that_ends_with_the_user_trains_what_came_before() -> None:
    messages = [user("hi"), assistant("yo"), user("bye")]
    for append_eos in ("auto", "on"):
        text, trained = trained_text(
            {"messages": messages}, "chat", FakeTokenizer(), append_eos=append_eos
        )
        assert trained == ["yo<|im_end|>"]
        assert text.endswith("bye<|im_end|>\n")


def test_nothing_after_the_end_of_a_turn_is_trained() -> None:
    """Phi-3's template writes EOS behind the last end of turn: generation has stopped there."""
    tokenizer = FakeTokenizer(EOS_AT_END, eos_id=4, end_of_turn_ids=frozenset({2, 4}))
    for append_eos in ("auto", "on", "off"):
        text, trained = trained_text(
            {"messages": TWO_TURNS}, "chat", tokenizer, append_eos=append_eos
        )
        assert text.endswith("A2<|im_end|>\n<|eos|>")
        assert trained == ["A1<|im_end|>", "A2<|im_end|>"]


def test_a_turn_that_later_ones_change_is_an_example_of_its_own() -> None:
    tokenizer = FakeTokenizer(THINK_IN_LAST)
    whole, first = masked({"messages": TWO_TURNS}, "chat", tokenizer)
    assert (whole.turn, first.turn) == (None, 1)
    begin = "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n"
    thought = "<think>\n\n</think>\n\n"
    assert shown(whole, tokenizer) == (
        f"{begin}A1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n{thought}"
        "A2<|im_end|>\n",
        [f"{thought}A2<|im_end|>"],
    )
    # It ends with the turn, and is what the model saw then.
    assert shown(first, tokenizer) == (
        f"{begin}{thought}A1<|im_end|>",
        [f"{thought}A1<|im_end|>"],
    )


def test_thoughts_of_earlier_turns_are_trained_though_the_whole_drops_them() -> None:
    messages = [dict(message) for message in TWO_TURNS]
    messages[1]["reasoning_content"] = "why not"
    _, first = masked({"messages": messages}, "chat", FakeTokenizer(THINK_IN_LAST))
    assert shown(first, FakeTokenizer())[1] == ["<think>\nwhy not\n</think>\n\nA1<|im_end|>"]
    # With train_on: all there is the whole only, and they would be dropped.
    message = refused({"messages": messages}, "chat", THINK_IN_LAST, train_on="all")
    assert message.startswith("messages[1].reasoning_content: the chat template does not show it")


def test_a_turn_begins_where_it_parts_from_the_generation_prompt() -> None:
    text, trained = trained_text({"messages": TWO_TURNS}, "chat", FakeTokenizer(PROMPT_THINKS))
    assert trained == ["</think>A1<|im_end|>", "</think>A2<|im_end|>"]
    assert "<|im_start|>assistant\n<think></think>A1<|im_end|>\n" in text
    # A token is not cut there.
    tokenizer = FakeTokenizer(PROMPT_THINKS, merged=["<think></think>"])
    assert trained_text({"messages": TWO_TURNS}, "chat", tokenizer)[1] == [
        "<think></think>A1<|im_end|>",
        "<think></think>A2<|im_end|>",
    ]


def test_the_next_roles_marker_ends_a_turn() -> None:
    # <|user|> is an end of turn, and EOS another token.
    tokenizer = FakeTokenizer(
        NEXT_ROLE, eos_id=4, end_of_turn_ids=frozenset({4, 5}), special={"<|user|>": 5}
    )
    text, trained = trained_text({"messages": TWO_TURNS}, "chat", tokenizer)
    assert text == ("<|user|>\nQ1<|assistant|>\nA1<|user|>\nQ2<|assistant|>\nA2<|user|>")
    assert trained == ["\nA1<|user|>", "\nA2<|user|>"]
    text, trained = trained_text({"messages": TWO_TURNS}, "chat", tokenizer, append_eos="off")
    assert text.endswith("A2") and trained == ["\nA1<|user|>", "\nA2"]
    text, trained = trained_text({"messages": TWO_TURNS}, "chat", tokenizer, append_eos="on")
    assert trained == ["\nA1<|user|>", "\nA2<|eos|>"]


def test_a_template_that_ends_no_turn_gets_eos_at_the_end() -> None:
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    tokenizer = FakeTokenizer(PLAIN, add_bos=True)
    text, trained = trained_text({"messages": messages}, "chat", tokenizer)
    # One BOS: the template's own.
    assert text == "<|bos|>user: a\nassistant: b\nuser: c\nassistant: d\n<|im_end|>"
    assert trained == ["b\n", "d\n<|im_end|>"]
    _, trained = trained_text({"messages": messages}, "chat", tokenizer, append_eos="off")
    assert trained == ["b\n", "d\n"]
    text, _ = trained_text({"messages": messages[:3]}, "chat", tokenizer)
    assert text.endswith("user: c\n")


def test_generation_marks_say_what_is_trained_but_nothing_after_the_end() -> None:
    text, trained = trained_text({"messages": TWO_TURNS}, "chat", FakeTokenizer(MARKED))
    assert trained == ["A1<|im_end|>", "A2<|im_end|>"]  # not the line break, which is marked
    # Marks are around what assistants say: who asks for users' words gets these, too.
    _, trained = trained_text(
        {"messages": TWO_TURNS[:2]}, "chat", FakeTokenizer(MARKED), roles_to_train=["user"]
    )
    assert trained == ["Q1<|im_end|>"]
    without_end = MARKED.replace(
        "{{ m.content + '<|im_end|>\n' }}{% endgeneration %}",
        "{{ m.content[:1] }}{% endgeneration %}{{ m.content[1:] + '<|im_end|>\n' }}",
    )
    _, trained = trained_text({"messages": TWO_TURNS}, "chat", FakeTokenizer(without_end))
    assert trained == ["A", "A"]


# BOS.


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("writes", [False, True])
def test_a_chat_has_bos_once_where_the_template_or_the_model_wants_it(
    add_bos: bool, writes: bool
) -> None:
    tokenizer = FakeTokenizer(("{{ bos_token }}" if writes else "") + CHATML, add_bos=add_bos)
    text, trained = trained_text({"messages": TWO_TURNS}, "chat", tokenizer)
    assert text.count("<|bos|>") == (add_bos or writes)
    assert text.startswith("<|bos|>" if add_bos or writes else "<|im_start|>")
    assert trained == ["A1<|im_end|>", "A2<|im_end|>"]


@pytest.mark.parametrize(
    ("columns", "data_format"),
    [({"text": "<|bos|>ab"}, "text"), ({"prompt": "<|bos|>a", "completion": "b"}, "completion")],
)
def test_a_text_that_begins_with_bos_has_it_once(columns: Any, data_format: str) -> None:
    for add_bos in (False, True):
        text, trained = trained_text(columns, data_format, FakeTokenizer(add_bos=add_bos))
        assert text == "<|bos|>ab<|im_end|>"
        assert trained == ["ab<|im_end|>" if data_format == "text" else "b<|im_end|>"]


# Plain text.


def test_train_on_all_trains_all_but_the_first_token() -> None:
    for columns, data_format in (
        ({"messages": [user("hi"), assistant("yo")]}, "chat"),
        ({"prompt": "hi ", "completion": "yo"}, "completion"),
        ({"text": "hi yo"}, "text"),
    ):
        (tokens,) = masked(columns, data_format, FakeTokenizer(), train_on="all")
        assert tokens.trained == [False] + [True] * (len(tokens.ids) - 1)


def test_append_eos_on_and_off() -> None:
    columns = {"prompt": "p", "completion": "c"}
    for value, expected in (("auto", "c<|im_end|>"), ("on", "c<|im_end|>"), ("off", "c")):
        _, trained = trained_text(columns, "completion", FakeTokenizer(), append_eos=value)
        assert trained == [expected]
    # A row of text is a document, which ends.
    for value, expected in (("auto", "tu<|im_end|>"), ("on", "tu<|im_end|>"), ("off", "tu")):
        text, _ = trained_text({"text": "tu"}, "text", FakeTokenizer(), append_eos=value)
        assert text == expected
    assert trained_text({"text": "tu"}, "text", FakeTokenizer(eos_id=None))[0] == "tu"
    with pytest.raises(InputError, match="no EOS token to append; set data.append_eos: off"):
        trained_text({"text": "t"}, "text", FakeTokenizer(eos_id=None), append_eos="on")


def test_no_eos_is_appended_where_generation_has_stopped() -> None:
    tokenizer = FakeTokenizer(eos_id=4, end_of_turn_ids=frozenset({2, 4}))
    for completion in ("c<|im_end|>", "c<|eos|>", "c<|im_end|>\n"):
        columns = {"prompt": "p", "completion": completion}
        for append_eos in ("auto", "on"):
            text, trained = trained_text(columns, "completion", tokenizer, append_eos=append_eos)
            assert (text, trained) == (f"p{completion}", [completion.rstrip()])
    columns = {"prompt": "p", "completion": "c<|im_end|>\nand more"}
    with pytest.raises(InputError, match=r"The answer goes on behind <\|im_end\|>, and generation"):
        masked(columns, "completion", tokenizer)
    _, trained = trained_text(columns, "completion", tokenizer, train_on="all")
    assert trained == ["c<|im_end|>\nand more<|eos|>"]
    columns = {"prompt": "a<|im_end|>b", "completion": "c<|im_end|><|eos|>"}
    assert trained_text(columns, "completion", tokenizer)[1] == ["c<|im_end|>"]
    text, _ = trained_text({"text": "tu<|im_end|>"}, "text", tokenizer)
    assert text == "tu<|im_end|>"


def test_completion_with_bos() -> None:
    columns = {"prompt": "p", "completion": "c"}
    text, trained = trained_text(columns, "completion", FakeTokenizer(add_bos=True))
    assert (text, trained) == ("<|bos|>pc<|im_end|>", ["c<|im_end|>"])


def test_a_prompt_has_the_tokens_that_generation_sees() -> None:
    # "Q: " + "yes" as one text has the token " yes", which no model writes behind "Q: ".
    tokenizer = FakeTokenizer(merged=[" yes"], add_bos=True)
    columns = {"prompt": "Q: ", "completion": "yes"}
    text, trained = trained_text(columns, "completion", tokenizer)
    assert (text, trained) == ("<|bos|>Q: yes<|im_end|>", ["yes<|im_end|>"])
    (tokens,) = masked(columns, "completion", tokenizer)
    n_prompt = tokens.trained.index(True)
    assert tokens.ids[:n_prompt] == tokenizer.encode("Q: ").ids
    assert len(tokens.ids) == 8
    # Where it is not cut there, it stays.
    columns = {"prompt": "Q:", "completion": " yes"}
    (tokens,) = masked(columns, "completion", tokenizer)
    assert len(tokens.ids) == 5


def test_a_turn_whose_prompt_would_merge_with_it_is_an_example_of_its_own() -> None:
    tokenizer = FakeTokenizer(merged=["\n\n"])
    messages = [user("a"), assistant("\nb"), user("c"), assistant("d")]
    whole, first = masked({"messages": messages}, "chat", tokenizer)
    assert shown(whole, tokenizer)[1] == ["d<|im_end|>"]
    assert shown(first, tokenizer)[1] == ["\nb<|im_end|>"]
    # What generation sees of the first answer later on is one token, as in the whole.
    assert 5000 in whole.ids and 5000 not in first.ids


def test_instruct_with_and_without_a_template() -> None:
    columns = {"instruction": "add", "input": "1 2", "output": "3"}
    text, trained = trained_text(columns, "instruct", FakeTokenizer())
    assert text.startswith("<|im_start|>user\nadd\n\n1 2<|im_end|>\n<|im_start|>assistant\n3<|im")
    assert trained == ["3<|im_end|>"]
    text, trained = trained_text(columns, "instruct", FakeTokenizer(None))
    assert (text, trained) == ("add\n\n1 2\n\n3<|im_end|>", ["3<|im_end|>"])
    for absent in ({}, {"input": ""}):
        columns = {"instruction": "add", "output": "3", **absent}
        assert trained_text(columns, "instruct", FakeTokenizer(None))[0] == "add\n\n3<|im_end|>"


def test_instruct_has_a_system_message_and_a_history() -> None:
    columns = {
        "instruction": "say hello",
        "output": "arr",
        "system": "a pirate",
        "history": [["hi", "ho"]],
    }
    text, trained = trained_text(columns, "instruct", FakeTokenizer())
    assert text == (
        "<|im_start|>system\na pirate<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nho<|im_end|>\n<|im_start|>user\nsay hello<|im_end|>\n"
        "<|im_start|>assistant\narr<|im_end|>\n"
    )
    assert trained == ["ho<|im_end|>", "arr<|im_end|>"]
    assert trained_text(columns, "instruct", FakeTokenizer(), train_on="last")[1] == [
        "arr<|im_end|>"
    ]
    assert refused(columns, "instruct", None) == (
        "system needs a chat template, and the model has none: give one with data.chat_template, "
        "or leave it out."
    )
