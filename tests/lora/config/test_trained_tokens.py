"""`adapter.trainable_tokens`: ids, and texts that are one token."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from lora.config.schema import AdapterConfig
from lora.config.trained_tokens import token_ids
from lora.shaders.errors import InputError

WORDS = {"<|call|>": [7], "7": [12], "two words": [3, 4]}


def test_ids_and_texts_in_their_order() -> None:
    given = AdapterConfig(trainable_tokens=[9, "<|call|>", "7"]).trainable_tokens
    assert token_ids(given, 20, WORDS.__getitem__) == (9, 7, 12)
    assert token_ids([], 20, WORDS.__getitem__) == ()


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["two words"], r"'two words' is 2 tokens of this model \(3, 4\)"),
        ([20], r"20 has the id 20, but the model's embedding has 20 rows"),
        (["<|call|>", 7], "names the token 7 twice"),
    ],
)
def test_what_is_no_token_is_refused(tokens: list[int | str], words: str) -> None:
    with pytest.raises(InputError, match=rf"^adapter\.trainable_tokens: .*{words}"):
        token_ids(tokens, 20, WORDS.__getitem__)


@pytest.mark.parametrize("tokens", [[-1], [""], [1.5], [True], 3])
def test_what_names_none_is_refused(tokens: object) -> None:
    with pytest.raises(ValidationError, match="trainable_tokens"):
        AdapterConfig.model_validate({"trainable_tokens": tokens})
