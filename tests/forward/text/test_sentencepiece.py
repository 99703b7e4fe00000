"""SentencePiece tokenizers out of a GGUF, on a vocabulary small enough to follow by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora.config.schema import DataConfig
from lora.data.rows import RowTokenizer
from lora.forward.text.tokenizer import Tokenizer
from lora.shaders.errors import InputError
from tests.support.tiny_sentencepiece import spaced_gguf, spaced_metadata

TOKENS: list[str] = spaced_metadata()["tokenizer.ggml.tokens"]


def _pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [TOKENS[token] for token in tokenizer.encode(text, add_bos=False).ids]


def _tokenizer(tmp_path: Path, **changes: Any) -> Tokenizer:
    return Tokenizer.from_gguf(spaced_gguf(tmp_path, **changes))


@pytest.mark.parametrize(
    ("text", "pieces", "offsets"),
    [
        ("", [], []),
        ("hi", ["▁hi"], [(0, 2)]),
        ("hi hi", ["▁hi", "▁hi"], [(0, 2), (2, 5)]),
        (" hi", ["▁", "▁hi"], [(0, 1), (0, 3)]),
        # the space in front belongs to nothing; its token gets the first character's place
        ("ab", ["▁", "ab"], [(0, 1), (0, 2)]),
        ("abc", ["▁", "ab", "c"], [(0, 1), (0, 2), (2, 3)]),  # of equal scores the leftmost
        ("abcbc", ["▁", "ab", "c", "bc"], [(0, 1), (0, 2), (2, 3), (3, 5)]),
        ("c d", ["▁", "c▁d"], [(0, 1), (0, 3)]),  # a token that crosses a space
        ("hi\n\nhi", ["▁hi", "\n\n", "▁hi"], [(0, 2), (2, 4), (4, 6)]),
        ("h\ni", ["▁", "h", "<0x0A>", "i"], [(0, 1), (0, 1), (1, 2), (2, 3)]),
        ("é", ["▁", "<0xC3>", "<0xA9>"], [(0, 1), (0, 1), (0, 1)]),
        ("a<|user|>hi", ["▁", "a", "<|user|>", "▁hi"], [(0, 1), (0, 1), (1, 9), (9, 11)]),
        ("<tool>b<s>", ["<tool>", "▁", "b", "<s>"], [(0, 6), (6, 7), (6, 7), (7, 10)]),
        ("<|user|>", ["<|user|>"], [(0, 8)]),
        ("hi ", ["▁hi", "▁"], [(0, 2), (2, 3)]),
    ],
)
def test_pieces_and_their_places(
    text: str, pieces: list[str], offsets: list[tuple[int, int]], tmp_path: Path
) -> None:
    tokenizer = _tokenizer(tmp_path)
    tokens = tokenizer.encode(text, add_bos=False)
    assert [TOKENS[token] for token in tokens.ids] == pieces
    assert tokens.offsets == offsets
    assert tokenizer.decode(tokens.ids, skip_special=False) == text


def test_without_a_space_in_front(tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path, add_space_prefix=False)
    for text, pieces in (("hi", ["hi"]), (" hi", ["▁hi"]), ("<s>hi", ["<s>", "hi"])):
        tokens = tokenizer.encode(text, add_bos=False)
        assert [TOKENS[token] for token in tokens.ids] == pieces
        assert tokenizer.decode(tokens.ids, skip_special=False) == text


def test_bos_and_eos_where_the_metadata_says_nothing(tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (1, 2, True)
    tokens = tokenizer.encode("hi")
    assert [TOKENS[token] for token in tokens.ids] == ["<s>", "▁hi"]
    assert tokens.offsets == [(0, 0), (0, 2)]
    assert tokenizer.decode(tokens.ids) == "hi"
    assert tokenizer.end_of_turn_ids == {2, TOKENS.index("<|endoftext|>")}
    tokenizer = _tokenizer(tmp_path, bos_token_id=2, add_bos_token=False)
    assert (tokenizer.bos_id, tokenizer.add_bos) == (2, False)


def test_decoding_token_by_token(tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path)
    text = "hi é hi 🎉<tool>ab c d"
    ids = tokenizer.encode(text).ids
    for count in range(len(ids) + 1):
        assert text.startswith(tokenizer.decode(ids[:count]).rstrip("\ufffd"))
    assert tokenizer.decode([1, *ids, 2, 10**6]) == text
    assert tokenizer.decode([TOKENS.index("<0xC3>")]) == "\ufffd"


def test_phi3_swallows_white_space_behind_special_tokens(tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path, name="Phi-3 mini 4k")
    tokens = tokenizer.encode("<|user|> \n hi<s> hi", add_bos=False)
    assert [TOKENS[token] for token in tokens.ids] == ["<|user|>", "▁hi", "<s>", "▁", "▁hi"]
    assert tokens.offsets == [(0, 11), (11, 13), (13, 16), (16, 17), (16, 19)]
    assert _pieces(_tokenizer(tmp_path), "<|user|> hi") == ["<|user|>", "▁", "▁hi"]


def test_characters_without_bytes_are_unknown(tmp_path: Path) -> None:
    tokens = [text.replace("<0x", "<byte") for text in TOKENS]
    tokenizer = _tokenizer(tmp_path, tokens=tokens, add_space_prefix=False)
    assert tokenizer.encode("hié").ids == [1, TOKENS.index("hi"), 0]


def test_gemma4_merges_by_rank(tmp_path: Path) -> None:
    changes = {
        "scores": None,
        "merges": ["b c", "a b", "h i", "▁ hi"],
        "bos_token_id": 1,
        "add_bos_token": False,
    }
    for model, pre in (("gemma4", None), ("llama", "gemma4")):
        tokenizer = _tokenizer(tmp_path, model=model, pre=pre, **changes)
        assert tokenizer.add_bos
        assert _pieces(tokenizer, "abc hi") == ["a", "bc", "▁hi"]
        assert _pieces(tokenizer, "hi\n\n\nhi") == ["hi", "\n\n", "<0x0A>", "hi"]
        assert tokenizer.decode(tokenizer.encode("ab é").ids) == "ab é"
    # a run of line breaks is a token as a whole, though no merge gives it
    tokens = [text if text != "c▁d" else "\n\n\n" for text in TOKENS]
    kinds = [1] * len(tokens)
    tokenizer = _tokenizer(tmp_path, model="gemma4", tokens=tokens, token_type=kinds, **changes)
    assert tokenizer.encode("a\n\n\n", add_bos=False).ids[1] == tokens.index("\n\n\n")


def test_trained_parts_are_cut_by_offsets(tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path)
    settings = DataConfig(train="unread.jsonl")
    columns = {"prompt": "hi é", "completion": " hi🎉"}
    rows = RowTokenizer(settings, tokenizer, "completion")

    def pieces_of(columns: dict[str, str]) -> list[list[str]]:
        (tokens,) = rows.tokenize(columns)
        assert tokenizer.decode(tokens.ids) == "".join(columns.values())
        halves: list[list[str]] = [[], []]
        for token, trained in zip(tokens.ids, tokens.trained, strict=True):
            halves[trained].append(TOKENS[token])
        return halves

    assert pieces_of(columns)[1] == ["▁hi", "<0xF0>", "<0x9F>", "<0x8E>", "<0x89>", "</s>"]
    # A prompt that ends with a space: no other is put before the answer.
    columns = {"prompt": "é ", "completion": "hi"}
    assert pieces_of(columns) == [["<s>", "▁", "<0xC3>", "<0xA9>", "▁"], ["hi", "</s>"]]


def test_damaged_vocabularies(tmp_path: Path) -> None:
    for changes, message in (
        ({"scores": None}, "must hold 276 numbers"),
        ({"scores": [0.0]}, "must hold 276 numbers"),
        ({"unknown_token_id": 276}, "unknown_token_id is 276; it must be below 276"),
        ({"model": "gemma4"}, "merges is no list of strings"),
        ({"model": "t5"}, "kind 't5'"),
    ):
        with pytest.raises(InputError, match=message):
            _tokenizer(tmp_path, **changes)
    with pytest.raises(InputError, match="cannot be tokenized"):
        _tokenizer(tmp_path).encode("a\ud800")
