"""Chats under the templates of many models, against transformers' and llama.cpp's renderings.

A cell of the table is a template and a kind of chat. It is right, or refused for the reason in
`REFUSED`. Right is: each turn's prompt is llama.cpp's, the whole text transformers', and the
trained text what transformers renders after the prompt until generation stops.
"""

from __future__ import annotations

import os
import random
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from lora.data.conversations import Conversation, conversation_of
from lora.data.masks import MaskedTokens, mask_conversation
from lora.data.rows import RowTokenizer
from lora.data.turns import Turn, render_turns
from lora.forward.gguf.file import GGUFFile
from lora.forward.text.chat_template import ChatTemplate
from lora.forward.text.tokenizer import Tokenizer
from lora.forward.text.vocabulary import END_TEXTS, end_texts
from lora.shaders.errors import InputError
from tests.support.chat_templates import CASES, templates
from tests.support.fake_tokenizer import SPECIAL, FakeTokenizer, settings, shown
from tests.support.llama_cpp import llama_cpp_ids, llama_cpp_prompts
from tests.support.tiny_gguf import write_tiny_llama

pytestmark = pytest.mark.parity

MODELS = Path(__file__).parents[2] / "models"
TEMPLATES = {name: text for name, text in templates().items() if not name.endswith("_training")}
MARKED = {name: text for name, text in templates().items() if name.endswith("_training")}
# Of the request: every family that TRL's package has, and Mistral.
FAMILIES = ("mistral", "llama3", "llama3_1", "llama3_2", "qwen2_5", "qwen3", "qwen3_5_think",
            "gemma3", "gemma4_v5", "phi3", "phi3_5", "gptoss", "deepseekv3", "deepseek_r1_distill",
            "glm4moe", "lfm2", "lfm2_v2", "nemotron_3_nano")  # fmt: skip

THOUGHTS = "messages[1].reasoning_content: the chat template does not show it"
TOOLS = "tools: the chat template does not show the tool 'weather'"
CALLS = "messages[1].tool_calls: the chat template does not show it"
ALTERNATE = "The chat template refused the messages: Conversation roles must alternate"
PARTS = "The chat template refused the messages: str object has no element 0"
REWRITTEN = (
    "messages[2]: llama.cpp writes results of tools into the calls under this first template"
)
SYSTEM = "The chat template refused the messages: System role not supported"

_NO_THOUGHTS = {"reasoning": THOUGHTS}
_NO_CALLS = {**_NO_THOUGHTS, "tools": TOOLS, "calls": CALLS, "results": TOOLS}
_ALTERNATES = {**_NO_CALLS, "results": ALTERNATE}
_NO_TOOLS = {**_NO_THOUGHTS, "tools": TOOLS, "results": TOOLS}  # but calls

# Which kinds of chat a template has no place for, and what is said then.
REFUSED: dict[str, dict[str, str]] = {
    **dict.fromkeys(
        ("mistral", "gemma4", "gemma4_v3", "gemma4_v4", "lfm2_v2", "llama3_1",
         "llama3_2", "qwen2_5", "qwen3_instruct_2507", "qwen3_vl"), _NO_THOUGHTS
    ),
    **dict.fromkeys(("cohere", "cohere2", "gemma3"), _ALTERNATES),
    **dict.fromkeys(("deepseek_r1_distill", "deepseekv3"), _NO_TOOLS),
    **dict.fromkeys(("idefics3", "llama3", "phi3", "phi3_5", "qwen2_5_vl", "smolvlm"), _NO_CALLS),
    "gemma": {**_ALTERNATES, "system": SYSTEM},
    "gemma4_v2": {**_NO_THOUGHTS, "results": REWRITTEN},
    "lfm2": {**_NO_THOUGHTS, "tools": CALLS, "calls": CALLS, "results": CALLS},
    "llava_next": {**_NO_CALLS, "results": PARTS},
}  # fmt: skip

# llama.cpp gives templates variables that transformers doesn't, and the prompts are llama.cpp's.
VARIABLES_MATTER = {
    "enable_thinking: on": (
        "diffusion_gemma", "gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5",
        "qwen3_5_nothink",
    ),
    "date_string: today, and no day of 2024": ("llama3_1",),
}  # fmt: skip
# Templates that read messages in a form of their own, which transformers is given here. llama.cpp
# finds the form as we do.
OWN_FORM = ("deepseek_r1_distill", "deepseekv3", "idefics3", "llava_next", "smolvlm")
# Generation prompts that open thoughts where an answer has none: what stands there behind all that
# prompt and answer have in common.
OPENS_THOUGHTS = ("<think>\n", "think>\n", "\n", "<|channel>thought\n", "channel>thought\n")
# Ends of turns that files name in their metadata, since the templates don't.
ENDS = {
    "glm4moe": ["<|user|>", "<|observation|>"],
    "cohere": ["<|END_OF_TURN_TOKEN|>"],
    "cohere2": ["<|END_OF_TURN_TOKEN|>"],
    "muse_glimmer": ["<|eot|>"],
}
NOW = datetime.now()
GIVEN = {
    "enable_thinking": True,
    "date_string": NOW.strftime("%d %b %Y"),
    "datetime": NOW.strftime("%b %d %Y"),
}


def tokenizer_for(name: str, source: str) -> FakeTokenizer:
    """Its end-of-turn tokens are those that the template names, and EOS."""
    ends = end_texts([text for text in END_TEXTS if text in source])
    ends += ENDS.get(name.removesuffix("_training"), [])
    special = {text: 10 + place for place, text in enumerate(ends) if text not in SPECIAL}
    ids = [(SPECIAL | special)[text] for text in ends]
    return FakeTokenizer(
        source, eos_id=SPECIAL["<|eos|>"], end_of_turn_ids=frozenset({4, *ids}), special=special
    )


def transformers_renders(
    source: str, messages: list[dict[str, Any]], variables: Any = None, **options: Any
) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    variables = GIVEN if variables is None else variables
    rendered, _ = render_jinja_template(
        [messages], chat_template=source, bos_token="<|bos|>", eos_token="<|eos|>",
        **variables, **options,
    )  # fmt: skip
    return str(rendered[0])


def rendering(name: str, source: str, case: str) -> tuple[Conversation, Any] | None:
    """Ours; None where it is refused as the table says."""
    tokenizer = tokenizer_for(name, source)
    template = ChatTemplate.of(tokenizer, now=NOW)
    assert template is not None
    ends = [tokenizer.decode([token]) for token in tokenizer.end_of_turn_ids]
    conversation = conversation_of(CASES[case], "chat")
    reason = REFUSED.get(name, {}).get(case)
    if reason is None:
        return conversation, render_turns(conversation, template, settings(), ends)
    with pytest.raises(InputError) as caught:
        render_turns(conversation, template, settings(), ends)
    assert str(caught.value).startswith(reason)
    return None


def own_form(name: str, source: str, conversation: Conversation) -> list[dict[str, Any]]:
    """The messages as the template reads them: the first form that transformers renders whole."""
    for form in conversation.forms:
        messages = conversation.in_form(form)
        try:
            text = transformers_renders(source, messages)
        except Exception:
            continue
        said = [m["content"] for m in conversation.messages if m["role"] == "user"]
        called = any("tool_calls" in m for m in messages)
        if all(one in text for one in said) and (not called or '"Bern"' in text):
            return messages
    raise AssertionError(name)


def expected_trained(
    source: str, messages: list[dict[str, Any]], index: int, ends: list[str], tools: Any
) -> str:
    """What transformers renders after the generation prompt, until generation stops."""
    before = transformers_renders(source, messages[:index], tools=tools, add_generation_prompt=True)
    through = transformers_renders(source, messages[: index + 1], tools=tools)
    bare = transformers_renders(source, messages[:index], tools=tools)
    start = len(os.path.commonprefix([before, through]))
    if start < len(os.path.commonprefix([before, bare])):  # Mistral's last question
        start = through.rindex("[/INST]") + len("[/INST]")
    stop = re.search("|".join(map(re.escape, ends)), through[start:])
    if stop is None:  # GLM: the next role's marker, which a template writes for a next message
        role = "tool" if "tool_calls" in messages[index] else "user"
        follows = [*messages[: index + 1], {"role": role, "content": "x"}]
        longer = transformers_renders(source, follows, tools=tools)
        stop = re.match("|".join(map(re.escape, ends)), longer[len(through) :])
        return through[start:] + (stop[0] if stop is not None else "<|eos|>")
    return through[start : start + stop.end()]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_has_every_family(name: str) -> None:
    if len(TEMPLATES) == 1:
        pytest.skip("TRL is not installed")
    assert name in TEMPLATES


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_cell_is_what_transformers_renders_or_refused(name: str, case: str) -> None:
    source, columns = TEMPLATES[name], CASES[case]
    ours = rendering(name, source, case)
    if ours is None:
        return
    conversation, rendered = ours
    tools = columns.get("tools")
    messages = columns["messages"]
    if name in OWN_FORM:
        messages = own_form(name, source, conversation)
    assert rendered.text == transformers_renders(source, messages, tools=tools)
    # Without llama.cpp's variables it is another text exactly where the table says so.
    differs = [
        transformers_renders(source, messages, variables, tools=tools)
        + transformers_renders(
            source, messages[:-1], variables, tools=tools, add_generation_prompt=True
        )
        for variables in (GIVEN, {})
    ]
    matters = any(name in names for names in VARIABLES_MATTER.values())
    assert (differs[0] != differs[1]) is matters

    tokenizer = tokenizer_for(name, source)
    ends = [tokenizer.decode([token]) for token in tokenizer.end_of_turn_ids]
    trained = [
        stretch
        for tokens in mask_conversation(rendered, settings(), tokenizer)
        for stretch in shown(tokens, tokenizer)[1]
    ]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    expected = [expected_trained(source, messages, index, ends, tools) for index in answers]
    assert sorted(trained) == sorted(expected)


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    source = TEMPLATES[name]
    turns: list[tuple[str, Turn]] = []
    bodies = []
    for case, columns in CASES.items():
        ours = rendering(name, source, case)
        for turn in ours[1].turns if ours is not None else []:
            turns.append((case, turn))
            tools = {"tools": columns["tools"]} if "tools" in columns else {}
            bodies.append({"messages": columns["messages"][: turn.index], **tools})
    model = tmp_path / "tiny.gguf"
    # <|endoftext|> for <|bos|>, <|im_end|> for <|eos|>.
    write_tiny_llama(model, metadata={"tokenizer.ggml.bos_token_id": 0})
    for (case, turn), prompt in zip(
        turns, llama_cpp_prompts(model, bodies, template=source), strict=True
    ):
        assert prompt is not None, case
        ours_text = turn.text[: turn.start].replace("<|eos|>", "<|im_end|>")
        theirs = prompt.removeprefix("<|endoftext|>")
        ours_text = ours_text.removeprefix("<|bos|>")
        assert theirs.startswith(ours_text), case
        rest = theirs[len(ours_text) :]
        assert rest == "" if turn.after_prompt else rest in OPENS_THOUGHTS, (case, rest)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MARKED)
def test_what_a_template_marks_is_trained_until_generation_stops(name: str, case: str) -> None:
    """TRL's templates for training mark with {% generation %} what transformers then masks."""
    from transformers.utils.chat_template_utils import render_jinja_template

    source, columns = MARKED[name], CASES[case]
    tokenizer = tokenizer_for(name, source)
    template = ChatTemplate.of(tokenizer, now=NOW)
    assert template is not None
    ends = [tokenizer.decode([token]) for token in tokenizer.end_of_turn_ids]
    try:
        rendered = render_turns(conversation_of(columns, "chat"), template, settings(), ends)
    except InputError:
        return  # as the model's own template, above
    examples = mask_conversation(rendered, settings(append_eos="off"), tokenizer)
    trained = [stretch for tokens in examples for stretch in shown(tokens, tokenizer)[1]]
    conversation = conversation_of(columns, "chat")
    messages = conversation.messages
    if name.removesuffix("_training") in OWN_FORM:
        messages = own_form(name, source, conversation)
    expected = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        through, spans = render_jinja_template(
            [messages[: index + 1]], chat_template=source, bos_token="<|bos|>", eos_token="<|eos|>",
            return_assistant_tokens_mask=True, tools=columns.get("tools"), **GIVEN,
        )  # fmt: skip
        before = transformers_renders(
            source, messages[:index], tools=columns.get("tools"), add_generation_prompt=True
        )
        start = len(os.path.commonprefix([before, through[0]]))
        said = "".join(through[0][max(a, start) : b] for a, b in spans[0] if b > start)
        stop = re.search("|".join(map(re.escape, ends)), said)
        expected.append(said if stop is None else said[: stop.end()])
    assert sorted(trained) == sorted(expected)


TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
READS_THINKING = {
    "a mode alone": "{{ enable_thinking }}" + TURNS,
    "a place for thoughts": "{{ enable_thinking }}" + TURNS.replace(
        "{{ m.content }}",
        "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content }}",
    ),
    "thoughts that the prompt closes": TURNS
    + "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}",
}  # fmt: skip


@pytest.mark.parametrize("name", READS_THINKING)
def test_thoughts_are_on_where_llama_cpp_finds_a_place_for_them(name: str, tmp_path: Path) -> None:
    source, messages = READS_THINKING[name], CASES["one"]["messages"][:1]
    write_tiny_llama(tmp_path / "tiny.gguf")
    for arguments in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        body = {"messages": messages, "chat_template_kwargs": arguments}
        theirs = llama_cpp_prompts(tmp_path / "tiny.gguf", [body], template=source)
        ours = ChatTemplate(source).render(
            messages, add_generation_prompt=True, arguments=arguments
        )
        assert [ours.text] == theirs, arguments


PIECES = (
    "a", "Hello", "hello world", "1", "42", "1234567", "Grüße", "🙂", "日本語", "naïve", ".", ",",
    "?!", "...", "don't", "x = {'a': 1}", "<b>", "</think", "[INST]", "#", "  ", " ", "\n", "\n\n",
    "\t", "\r\n", "\u00a0", "- item", "`code`", "http://a.b/c?d=e", "{{ x }}", "e\u0301", "😀👍🏽",
)  # fmt: skip


def varied_rows(n_rows: int) -> list[dict[str, Any]]:
    """Chats of one to three turns, out of words, white space and signs in any order."""
    draw = random.Random(15)

    def text() -> str:
        parts = [draw.choice(PIECES) for _ in range(draw.randint(1, 8))]
        said = "".join(part + draw.choice(("", " ", "")) for part in parts)
        return said if said.strip() else said + "x"

    rows = []
    for _ in range(n_rows):
        messages = [{"role": "system", "content": text()}] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 3)):
            messages += [{"role": "user", "content": text()}]
            messages += [{"role": "assistant", "content": text()}]
        rows.append({"messages": messages})
    return rows


def prompts_of(examples: list[MaskedTokens], answers: list[int]) -> list[list[int]]:
    """The ids before each answer; `answers` are the messages' places."""
    found: dict[int, list[int]] = {}
    own = {tokens.turn for tokens in examples}
    for tokens in examples:
        trained = tokens.trained
        starts = [t for t in range(1, len(trained)) if trained[t] and not trained[t - 1]]
        turns = [tokens.turn] if tokens.turn is not None else [a for a in answers if a not in own]
        found |= {turn: tokens.ids[:s] for turn, s in zip(turns, starts, strict=True)}
    return [found[answer] for answer in answers]


@pytest.mark.parametrize(
    ("model", "template"),
    [("SmolLM2-135M-Instruct.Q4_1.gguf", None), ("gemma-3-270m-q4_k_m.gguf", "gemma3")],
)
def test_varied_rows_have_the_prompts_of_llama_cpp(model: str, template: str | None) -> None:
    path = MODELS / model
    if not path.exists() or (template is not None and template not in TEMPLATES):
        pytest.skip(f"models/{model} or TRL is absent")
    source = None if template is None else TEMPLATES[template]
    tokenizer = Tokenizer.from_gguf(GGUFFile(path))
    rows = RowTokenizer(settings(chat_template=source), tokenizer, "chat")
    bodies, ours = [], []
    for columns in varied_rows(200):
        messages = columns["messages"]
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        bodies += [{"messages": messages[:answer]} for answer in answers]
        ours += prompts_of(rows.tokenize(columns), answers)
    texts = llama_cpp_prompts(path, bodies, template=source)
    assert None not in texts and len(texts) == len(ours) > 350
    theirs = llama_cpp_ids(path, [str(text) for text in texts], add_special=True)
    wrong = [row for row in zip(texts, ours, theirs, strict=True) if row[1] != row[2]]
    assert wrong == []
