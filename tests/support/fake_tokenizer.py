"""A tokenizer of one token a character, so that what is trained can be read off."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lora.config.schema import DataConfig
from lora.data.masks import MaskedTokens
from lora.data.rows import RowTokenizer
from lora.forward.text.tokenizer import TokenizedText

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Ends no turn itself.
PLAIN = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# As Qwen3's: the last answer alone has a place for thoughts.
THINK_IN_LAST = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + m.reasoning_content|default('') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = {"<|bos|>": 1, "<|im_end|>": 2, "<|im_start|>": 3, "<|eos|>": 4}


@dataclass
class FakeTokenizer:
    """One token a character, 100 + its code; SPECIAL ones are one token each."""

    chat_template: str | None = CHATML
    tool_use_template: str | None = None
    bos_id: int | None = 1
    eos_id: int | None = 2
    end_of_turn_ids: frozenset[int] = frozenset({2})
    add_bos: bool = False
    merged: list[str] = field(default_factory=list)  # texts that are one token, 5000 + index
    special: dict[str, int] = field(default_factory=dict)  # besides SPECIAL

    def encode(
        self, text: str, *, add_bos: bool | None = None, continues: bool = False
    ) -> TokenizedText:
        ids, offsets = [], []
        wants_bos = self.add_bos if add_bos is None else add_bos
        if wants_bos and not continues and not text.startswith("<|bos|>"):
            ids, offsets = [1], [(0, 0)]
        names = SPECIAL | self.special
        names |= {name: 5000 + index for index, name in enumerate(self.merged)}
        pattern = "|".join([*map(re.escape, names), "."])
        for match in re.finditer(pattern, text, re.DOTALL):
            ids.append(names.get(match[0], 100 + ord(match[0][0])))
            offsets.append(match.span())
        return TokenizedText(ids, offsets)

    def cut_before(self, text: str, border: int) -> int:
        return 0

    def ending_ids(self, text: str) -> list[int]:
        return self.encode(text, add_bos=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        names = {number: name for name, number in (SPECIAL | self.special).items()}
        names |= {5000 + index: name for index, name in enumerate(self.merged)}
        return "".join(names[i] if i in names else chr(i - 100) for i in ids)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def settings(**values: Any) -> DataConfig:
    return DataConfig.model_validate({"train": "unused.jsonl", **values})


def masked(
    columns: dict[str, Any], data_format: str, tokenizer: FakeTokenizer, **values: Any
) -> list[MaskedTokens]:
    """A record's examples."""
    return RowTokenizer(settings(**values), tokenizer, data_format).tokenize(columns)


def trained_text(
    columns: dict[str, Any], data_format: str, tokenizer: FakeTokenizer, **values: Any
) -> tuple[str, list[str]]:
    """The whole text of a record that gives one example, and its trained stretches."""
    (only,) = masked(columns, data_format, tokenizer, **values)
    assert only.turn is None
    return shown(only, tokenizer)


def shown(tokens: MaskedTokens, tokenizer: FakeTokenizer) -> tuple[str, list[str]]:
    """An example's text, and its trained stretches."""
    ids, trained = tokens.ids, tokens.trained
    assert len(ids) == len(trained)
    stretches: list[str] = []
    for t in range(len(ids)):
        if trained[t]:
            if t == 0 or not trained[t - 1]:
                stretches.append("")
            stretches[-1] += tokenizer.decode([ids[t]])
    return tokenizer.decode(ids), stretches


TWO_TURNS = [user("Q1"), assistant("A1"), user("Q2"), assistant("A2")]
