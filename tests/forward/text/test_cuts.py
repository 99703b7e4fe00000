"""Where a text can be cut without other tokens, for each way of cutting it into words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.forward.gguf.file import GGUFFile
from lora.forward.text.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from lora.forward.text.tokenizer import Tokenizer
from tests.support.tiny_gguf import tiny_tokenizer_metadata, write_tiny_llama

# What expressions look at: case, contractions, digits, signs, marks that compose, white space.
PARTS = [
    "a",
    "B",
    "e",
    "Hello",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\u00a0",
    "'s",
    "'ll",
    "'",
    "1",
    "234",
]
PARTS += [
    ".",
    "/",
    "(",
    "|",
    "-",
    "\u0301",
    "é",
    "ſ",
    "日本",
    "ゟ",
    "🎉",
    "<|im_end|>",
    " x y",
    "\x04",
]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=14).map("".join)
FAMILIES: dict[PreTokenizer, str] = {family: name for name, family in PRE_TOKENIZERS.items()}


MERGED = "aBe'sl1.|/ĠĊĉ"  # any two of these merge, if they are in one word


def _merging(pre: str) -> dict[str, Any]:
    """A tokenizer that shows where text is cut: within a word, all that may merge does."""
    made = tiny_tokenizer_metadata(512)
    tokens, merges = made["tokenizer.ggml.tokens"], made["tokenizer.ggml.merges"]
    new = [f"{left} {right}" for left in MERGED for right in MERGED]
    new = [merge for merge in new if merge.replace(" ", "") not in tokens]
    free = tokens.index("[PAD0]")
    for place, merge in enumerate(new, free):
        tokens[place] = merge.replace(" ", "")
        made["tokenizer.ggml.token_type"][place] = 1
    return made | {"tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": [*new, *merges]}


@pytest.mark.parametrize("pre", FAMILIES.values())
def test_both_sides_of_a_cut_have_the_tokens_of_the_whole(tmp_path: Path, pre: str) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_llama(path, vocab_size=512, metadata=_merging(pre))
    tokenizer = Tokenizer.from_gguf(GGUFFile(path))
    n_cuts = 0

    @settings(max_examples=200)
    @given(before=TEXTS, after=TEXTS)
    def check(before: str, after: str) -> None:
        nonlocal n_cuts
        border = len(before)
        place = tokenizer.cut_before(before + after, border)
        if not place:
            return
        n_cuts += 1
        first, end = before[:place], before[place:]
        ids = tokenizer.encode(before, add_bos=False).ids
        n_first = len(tokenizer.encode(first, add_bos=False).ids)
        assert tokenizer.encode(first, add_bos=False).ids == ids[:n_first]
        assert tokenizer.ending_ids(end) == tokenizer.ending_ids(end) == ids[n_first:]
        whole = tokenizer.encode(before + after, add_bos=False)
        assert whole.ids[:n_first] == ids[:n_first]
        assert whole.offsets[n_first][0] == place

    check()
    assert n_cuts >= 10


def test_no_cut_where_none_is_known(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "tiny.gguf")
    tokenizer = Tokenizer.from_gguf(GGUFFile(tmp_path / "tiny.gguf"))
    assert tokenizer.cut_before("a bc", 3) == 1
    assert tokenizer.cut_before("a bc", 2) == 0  # the letter behind is past the border
    assert tokenizer.cut_before("a  b 1 .a b1c", 9) == 0
    assert tokenizer.cut_before("", 0) == 0
