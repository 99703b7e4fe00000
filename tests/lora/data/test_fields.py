"""What a row says is trained, or the row is refused with the field: nothing is dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from lora.data.fields import Shown, dropped_tool
from lora.data.loading import load_examples
from lora.data.records import check_record
from lora.data.shapes import Shape
from lora.shaders.errors import InputError
from tests.support.fake_tokenizer import (
    CHATML,
    FakeTokenizer,
    assistant,
    masked,
    settings,
    shown,
    trained_text,
    user,
)

# Shows tools, calls and thoughts; arguments as objects.
KNOWS_TOOLS = (
    "{% if tools %}{{ '<tools>' + tools|tojson + '</tools>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{ m.content | trim }}{% for call in m.tool_calls %}"
    "{{ '<call>' + call.function.name + call.function.arguments|tojson + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As DeepSeek's: joins the arguments to its own text.
JOINS_TEXTS = KNOWS_TOOLS.replace("call.function.arguments|tojson", "call.function.arguments")
# As R1's: a call is known by content that is null.
BY_NULL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.content is none %}{{ m.tool_calls[0].function.name + '('"
    " + m.tool_calls[0].function.arguments + ')' }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Phi-3's: roles that it doesn't know are left out.
KNOWS_TWO_ROLES = CHATML.replace(
    "{% for message in messages %}",
    "{% for message in messages if message.role in ('user', 'assistant') %}",
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says it.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def calling(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [CALL], **fields}


def refused(columns: dict[str, Any], template: str = CHATML) -> str:
    with pytest.raises(InputError) as caught:
        masked(columns, "chat", FakeTokenizer(template))
    return str(caught.value)


def trained(columns: dict[str, Any], template: str = KNOWS_TOOLS) -> list[str]:
    return trained_text(columns, "chat", FakeTokenizer(template))[1]


# Fields of messages.


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"content": None, "tool_calls": [CALL]}, "tool_calls"),
        ({"content": "", "tool_calls": [CALL]}, "tool_calls"),
        ({"content": "", "function_call": CALL["function"]}, "function_call"),
        ({"content": "Cold.", "reasoning_content": "It is winter."}, "reasoning_content"),
        ({"content": "Cold.", "thinking": "It is winter."}, "thinking"),
        ({"content": "Cold.", "reasoning": "It is winter."}, "reasoning"),
    ],
)
def test_what_the_template_does_not_show_is_refused(fields: dict[str, Any], name: str) -> None:
    columns = {"messages": [user("Weather?"), {"role": "assistant", **fields}]}
    assert refused(columns) == (
        f"messages[1].{name}: the chat template does not show it (role assistant), so the model "
        "would be trained without it. Take it out of the row, leave the row out, or give a "
        "template that shows it with data.chat_template."
    )
    (said,) = trained(columns)
    assert said.endswith("<|im_end|>") and len(said) > len("<|im_end|>")


def test_whole_roles_that_the_template_drops_are_refused() -> None:
    for index, role in ((0, "system"), (2, "tool")):
        messages: list[dict[str, Any]] = [user("a"), assistant("b"), user("c"), assistant("d")]
        messages.insert(index, {"role": role, "content": "12 degrees"})
        message = refused({"messages": messages}, KNOWS_TWO_ROLES)
        assert message.startswith(
            f"messages[{index}].content: the chat template does not show it (role {role})"
        )
        trained({"messages": messages}, CHATML)


def test_a_developers_message_is_the_systems_where_the_template_knows_no_developer() -> None:
    messages = [{"role": "developer", "content": "Be terse."}, user("a"), assistant("b")]
    text, _ = trained_text({"messages": messages}, "chat", FakeTokenizer())
    assert text.startswith("<|im_start|>system\nBe terse.<|im_end|>")
    knows = CHATML + "{# developer #}"
    text, _ = trained_text({"messages": messages}, "chat", FakeTokenizer(knows))
    assert text.startswith("<|im_start|>developer\n")


def test_a_template_that_takes_content_in_parts() -> None:
    parts = CHATML.replace("message['content']", "message['content'][0].text")
    text, said = trained_text({"messages": [user("a"), assistant("b")]}, "chat",
                              FakeTokenizer(parts))  # fmt: skip
    assert text.startswith("<|im_start|>user\na<|im_end|>") and said == ["b<|im_end|>"]


def test_results_of_tools_under_gemma_4s_first_template() -> None:
    """llama.cpp knows it by these texts, and rewrites messages that transformers leaves alone."""
    first = CHATML + "{# '<|tool_call>call:' #}"
    messages = [user("a"), assistant("b"), {"role": "tool", "content": "c"}, assistant("d")]
    assert refused({"messages": messages}, first).startswith(
        "messages[2]: llama.cpp writes results of tools into the calls under this first template"
    )
    trained({"messages": messages[:2]}, first)
    trained({"messages": messages}, first + "{#- OpenAI Chat Completions: #}")


def test_a_content_of_one_part_is_its_text(tmp_path: Path) -> None:
    part = {"type": "text", "text": "a", "image": None}
    rows = ({"messages": [{"role": "user", "content": content}, assistant("b")]}
            for content in ("a", [part]))  # fmt: skip
    first, second = (load(tmp_path, row)[0][0].ids.tolist() for row in rows)
    assert first == second


def test_a_context_is_looked_for_where_it_was_said() -> None:
    """That an earlier message says the same doesn't make it shown."""
    messages = [user("12 degrees"), assistant("b"), {"role": "tool", "content": "12 degrees"},
                assistant("d")]  # fmt: skip
    assert refused({"messages": messages}, KNOWS_TWO_ROLES).startswith("messages[2].content")
    # Nor does what stands in the prompt show the answer.
    echo = "{{ '<|im_start|>' + messages[0].content + '<|im_end|>' }}"
    assert refused({"messages": [user("yes"), assistant("yes")]}, echo).startswith(
        "messages[1].content"
    )


def test_an_answer_that_goes_on_after_its_end_is_refused_by_what_is_not_shown() -> None:
    cut = CHATML.replace("message['content']", "message['content'][:5]")
    # A template that prints whatever it is given prints parts as Python shows them: no way out.
    prints = cut.replace("+ message['content'][:5] +", "~ message['content'][:5] ~")
    for template in (cut, prints):
        assert refused({"messages": [user("a"), assistant("one two three")]}, template).startswith(
            "messages[1].content: the chat template does not show it"
        )


def test_an_answer_that_holds_an_end_of_turn_goes_on_after_it() -> None:
    for said in ("one<|im_end|>", "one<|im_end|>\n", "one"):
        assert trained({"messages": [user("a"), assistant(said)]}) == ["one<|im_end|>"]
    messages = [user("a"), assistant("one<|im_end|>two")]
    assert refused({"messages": messages}) == (
        "messages[1].content: it goes on behind <|im_end|>, and generation stops there, so the "
        "rest would not be trained. Take that token out of the row."
    )
    trained_text({"messages": messages}, "chat", FakeTokenizer(), train_on="all")
    messages[1] = {**messages[1], "weight": 0}
    trained({"messages": [*messages, user("c"), assistant("d")]})


def test_a_null_content_is_empty_and_parquet_agrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets  # type: ignore[import-untyped]

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    rows = [
        {"messages": [user("Weather?"), calling()], "tools": [TOOL]},
        {"messages": [{**user("a"), "name": "Ann"}, assistant("b")], "tools": None},
    ]
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "set"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    tokenizer = FakeTokenizer(KNOWS_TOOLS)
    texts = []
    for source in (str(jsonl), str(folder), str(folder / "train.parquet")):
        examples, _ = load_examples(settings(train=source), tokenizer)
        texts.append([tokenizer.decode(example.ids.tolist()) for example in examples])
    assert texts[0] == texts[1] == texts[2]
    assert '<|im_start|>assistant\n<call>weather{"city": "Bern"}</call><|im_end|>' in texts[0][0]


# Calls of tools.


@pytest.mark.parametrize("template", [KNOWS_TOOLS, JOINS_TEXTS])
@pytest.mark.parametrize("arguments", [{"city": "Bern"}, '{"city": "Bern"}'])
def test_arguments_given_as_json_are_trained_as_the_object(template: str, arguments: Any) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    columns = {"messages": [user("Weather?"), calling(tool_calls=[call])]}
    assert trained(columns, template) == ['<call>weather{"city": "Bern"}</call><|im_end|>']
    older = {"role": "assistant", "content": "", "function_call": call["function"]}
    assert trained({"messages": [user("Weather?"), older]}, template) == trained(columns, template)


def test_a_template_that_knows_calls_by_their_null_content() -> None:
    columns = {"messages": [user("Weather?"), calling()]}
    assert trained(columns, BY_NULL) == ['weather({"city": "Bern"})<|im_end|>']


def test_every_argument_and_every_call_is_looked_for() -> None:
    one_argument = KNOWS_TOOLS.replace("call.function.arguments|tojson", "'city'")
    columns = {"messages": [user("Weather?"), calling()]}
    assert refused(columns, one_argument).startswith("messages[1].tool_calls")
    first_alone = KNOWS_TOOLS.replace("in m.tool_calls", "in (m.tool_calls or [])[:1]")
    two = [CALL, {"type": "function", "function": {"name": "clock", "arguments": {}}}]
    columns = {"messages": [user("Weather?"), calling(tool_calls=two)]}
    assert refused(columns, first_alone).startswith("messages[1].tool_calls")
    numbers = {"n": 2, "on": True, "off": None, "list": [1.5, "é"]}
    call = {"function": {"name": "set", "arguments": numbers}}
    (said,) = trained({"messages": [user("a"), calling(tool_calls=[call])]})
    assert said == (
        '<call>set{"n": 2, "on": true, "off": null, "list": [1.5, "é"]}</call><|im_end|>'
    )


def test_arguments_that_are_nested_too_deeply(tmp_path: Path) -> None:
    """However deep the stack is that reads it."""
    call = {"function": {"name": "f", "arguments": 0}}
    row = {"messages": [user("a"), calling(tool_calls=[call])]}
    deep = '{"a":' * 5000 + "1" + "}" * 5000
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row).replace('"arguments": 0', f'"arguments": {deep}') + "\n")
    with pytest.raises(InputError, match=r"a.jsonl, line 1: nested too deeply\."):
        load_examples(settings(train=str(path)), FakeTokenizer(KNOWS_TOOLS))


def test_tools_are_shown_or_refused() -> None:
    columns = {"messages": [user("Weather?"), calling()], "tools": [TOOL]}
    text, said = trained_text(columns, "chat", FakeTokenizer(KNOWS_TOOLS))
    assert text.startswith("<tools>[{") and said[0].startswith("<call>weather")
    as_text = {**columns, "tools": json.dumps([TOOL])}
    assert trained_text(as_text, "chat", FakeTokenizer(KNOWS_TOOLS)) == (text, said)
    drops = KNOWS_TOOLS.replace("{% if tools %}", "{% if false %}")
    assert refused(columns, drops).startswith(
        "tools: the chat template does not show the tool 'weather'"
    )
    # The user's talk of it doesn't show it.
    assert dropped_tool([TOOL], "weather: Says it. city", "weather: Says it. city") == "weather"
    assert dropped_tool([TOOL], "weather weather: Says it. city", "weather") is None
    assert dropped_tool([TOOL], "weather weather: Says it.", "weather") == "weather"


def test_how_texts_are_looked_for() -> None:
    shown_text = Shown('a "quoted"\n text; {"x": "line\\nbreak \\u00e9"}')
    for wanted in ('a  "quoted" text', "line\nbreak é", ""):
        assert shown_text.has(wanted)
    assert not shown_text.has("absent")
    assert Shown("<think>\nwhy\n</think>\n\nso").has_content("<think>why</think>so")
    assert Shown("why | so").has_content("<think>why</think>so")
    assert not Shown("so").has_content("<think>why</think>so")
    assert Shown("yes, yes", start=4).has("yes") and not Shown("yes, no", start=4).has("yes")


# Columns.


def load(tmp_path: Path, row: dict[str, Any], **values: Any) -> Any:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return load_examples(settings(train=str(path), **values), FakeTokenizer(KNOWS_TOOLS))


CHAT_ROW = {"messages": [user("a"), assistant("b")]}
COMPLETION_ROW = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**CHAT_ROW, "weight": 0.5}, "weight is 0.5; a weight is 0 (not trained) or 1; others"),
        ({**CHAT_ROW, "weight": True}, "weight is true; a weight is 0"),
        ({**CHAT_ROW, "train": 1}, "train is 1; it must be true or false."),
        ({**CHAT_ROW, "images": ["x.png"]}, 'images is ["x.png"], and rows of the format chat have '
         "no place for it; this version trains on text alone: leave the row out."),
        ({**CHAT_ROW, "audio": "x.wav"}, 'audio is "x.wav", and rows of the format chat'),
        ({**CHAT_ROW, "history": [["a", "b"]]}, "history is ["),
        ({**CHAT_ROW, "functions": [TOOL]}, "functions is ["),
        ({**CHAT_ROW, "tools": {"a": 1}}, 'tools is {"a": 1}; it must be a list of JSON schemas.'),
        ({**CHAT_ROW, "tools": "weather"}, 'tools is "weather"; it must be a list of JSON schem'),
        ({**CHAT_ROW, "chat_template_kwargs": [1]}, "chat_template_kwargs is [1]; it must be an"),
        ({**CHAT_ROW, "system": 3}, "system is 3; it must be a string."),
        ({**COMPLETION_ROW, "system": "x"}, 'system is "x", and rows of the format completion have '
         "no place for it; write it as it shall stand in the text, or write the row as messages."),
        ({**COMPLETION_ROW, "tools": [TOOL]}, "tools is ["),
        ({**COMPLETION_ROW, "reasoning_content": "x"}, 'reasoning_content is "x"'),
        ({"text": "a", "history": [["a", "b"]]}, 'history is [["a", "b"]], and rows of the for'),
        ({"instruction": "a", "output": "b", "history": ["c"]}, 'history is ["c"]; it must be a '
         "list of [instruction, output], two strings."),
        ({"messages": [{"role": "system", "content": "s"}, *CHAT_ROW["messages"]], "system": "t"},
         "The row has the column system, and its messages begin with a system message; keep one"),
        ({"messages": [user("a"), {**assistant("b"), "weight": 2}]},
         "messages[1].weight is 2; a weight is 0 (not trained) or 1"),
        ({"messages": [user("a"), {**assistant("b"), "weight": 0, "train": True}]},
         "messages[1]: weight is 0, but train is true."),
        ({"messages": [user("a"), {"role": "assistant", "content": None}]},
         "messages[1].content is null; it must be a string."),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
         'messages[0].content has a part of the type "image"; this version trains on text alone'),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
         "messages[0].content is 3; it must be a string."),
        ({"messages": [user("a"), {**assistant("b"), "images": ["x"]}]},
         'messages[1].images is ["x"]; this version trains on text alone'),
        ({"messages": [user("a"), {**assistant("b"), "reasoning_content": 3}]},
         "messages[1].reasoning_content is 3; it must be a string."),
        ({"messages": [user("a"), calling(tool_calls="x")]},
         'messages[1].tool_calls is "x"; it must be a list of objects with a function'),
        ({"messages": [user("a"), calling(tool_calls=[{"function": {"name": "f", "arguments":
         "{"}}])]}, "messages[1].tool_calls is ["),
        ({"messages": [user("a"), calling(function_call=CALL["function"])]},
         "messages[1] has tool_calls and function_call; keep one of them."),
        ({"messages": [user("a"), {"role": "assistant", "function_call": 3}]},
         "messages[1].function_call is 3; it must be an object with name and arguments."),
    ],
)  # fmt: skip
def test_columns_that_carry_meaning_are_used_or_refused(
    tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError) as caught:
        load(tmp_path, row)
    assert str(caught.value).startswith(f"{tmp_path}/a.jsonl, line 1: {words}")


def test_empty_columns_mean_nothing(tmp_path: Path) -> None:
    empty = {"system": "", "tools": [], "images": [], "history": None, "weight": 1, "train": True}
    examples, _ = load(tmp_path, {**CHAT_ROW, **empty})
    assert examples[0].ids.tolist() == load(tmp_path, CHAT_ROW)[0][0].ids.tolist()


def test_a_system_column_is_a_system_message(tmp_path: Path) -> None:
    examples, _ = load(tmp_path, {**CHAT_ROW, "system": "be terse"})
    messages = [{"role": "system", "content": "be terse"}, *CHAT_ROW["messages"]]
    assert examples[0].ids.tolist() == load(tmp_path, {"messages": messages})[0][0].ids.tolist()


def test_rows_of_weight_0_are_left_out_and_other_columns_named_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        {**COMPLETION_ROW, "weight": 0, "id": 1},
        {**COMPLETION_ROW, "train": False, "source": "x"},
        {**COMPLETION_ROW, "weight": 1, "id": 2},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples, summary = load_examples(settings(train=str(path)), FakeTokenizer())
    assert [(example.row, example.index) for example in examples] == [(2, 0)]
    assert str(summary) == (
        "1 completion examples, 3 tokens, 2 of them trained; the longest row has 3; 2 left out, of "
        "weight 0; ignored columns: id, source"
    )
    ignored = [check_record(row, Shape("completion")).ignored for row in rows]
    assert ignored == [("id",), ("source",), ("id",)]


def test_a_row_may_give_several_examples(tmp_path: Path) -> None:
    last_thinks = KNOWS_TOOLS.replace(
        "m.content | trim", "('hm, ' if m.role == 'assistant' and loop.last else '') + m.content"
    )
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps(CHAT_ROW) + "\n")
    examples, summary = load_examples(settings(train=str(path)), FakeTokenizer(last_thinks))
    assert [(e.index, e.row, e.turn) for e in examples] == [(0, 0, None), (1, 0, 1), (2, 1, None)]
    assert (summary.n_examples, summary.n_rows, summary.n_untrained) == (3, 2, 0)
    assert str(summary).startswith("3 chat examples of 2 rows, ")
    assert shown(masked({"messages": messages}, "chat", FakeTokenizer(last_thinks))[1],
                 FakeTokenizer())[1] == ["hm, b<|im_end|>"]  # fmt: skip
