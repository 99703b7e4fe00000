"""A tokenizer.json from elsewhere: its work is bounded, and what it breaks is one sentence."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from lora.forward.text.tokenizer import Tokenizer
from lora.shaders.errors import InputError


def _file(tmp_path: Path, **changes: Any) -> Path:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
    values: dict[str, Any] = {"version": "1.0", "added_tokens": [], "model": model, **changes}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(values))
    return path


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False
    }  # fmt: skip


def test_a_pattern_that_never_ends_is_one_sentence(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(_file(tmp_path, pre_tokenizer=_split("(a+)+$")))
    assert tokenizer.encode("ab").ids == [0, 1]
    started = time.perf_counter()
    with pytest.raises(InputError) as caught:
        tokenizer.encode(("a" * 20 + "b") * 20_000)
    assert time.perf_counter() - started < 30  # 2 seconds of a processor that others use, too
    assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 400
    assert tokenizer.encode("ba").ids == [1, 0]
    assert tokenizer.decode([1, 0]) == "b a"


def test_a_panic_is_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The engine of expressions gives up after ten million steps, and the library unwraps that."""
    tokenizer = Tokenizer.from_file(_file(tmp_path, pre_tokenizer=_split("(a+)+$")))
    with pytest.raises(InputError, match="gave up on it .*retry-limit"):
        tokenizer.encode("a" * 5000 + "b")
    assert capfd.readouterr().err == ""
    assert tokenizer.encode("ab").ids == [0, 1]


def test_a_missing_unknown_token_is_one_sentence(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<zz>"}
    with pytest.raises(InputError, match="zz|unk|UNK|WordLevel"):
        Tokenizer.from_file(_file(tmp_path, model=model)).encode("b")


def test_nested_special_tokens_are_found(tmp_path: Path) -> None:
    added = [
        {
            "id": 2 + n, "content": "a" * n, "special": True, "single_word": False,
            "lstrip": False, "rstrip": False, "normalized": False,
        }
        for n in range(2, 2002)
    ]  # fmt: skip
    tokenizer = Tokenizer.from_file(_file(tmp_path, added_tokens=added))
    assert len(tokenizer.encode("a" * 50_000).ids) == 25


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        json.dumps({f"key{n}": n for n in range(100_000)}),
        json.dumps({"model": {"type": "BPE", "vocab": {"a": 1e999}, "merges": []}}),
        "{}",
        "\x00",
        '"\\ud800"',
    ],
    ids=["deep", "keys", "infinite", "empty", "null", "surrogate"],
)
def test_what_is_no_tokenizer_is_one_sentence(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(InputError, match="tokenizer.json") as caught:
        Tokenizer.from_file(path)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_a_file_that_changes_is_read_anew(tmp_path: Path) -> None:
    path = _file(tmp_path)
    assert Tokenizer.from_file(path).vocab_size == 2
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2}, "merges": []}
    assert Tokenizer.from_file(_file(tmp_path, model=model)).vocab_size == 3
