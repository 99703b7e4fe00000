"""The tokenizer: recorded ids of SmolLM2, special tokens, offsets, and what is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import processors

from forward.gguf_file import GGUFFile
from forward.tokenizer import Tokenizer
from shaders.errors import InputError
from tests.forward.tiny_gguf import tiny_tokenizer_metadata, write_tiny_llama

# 80 texts (code, CJK, emoji, runs of spaces, special tokens, random mixtures) with the ids that
# llama.cpp (xllamacpp 2026.10, /tokenize with parse_special) gave for the Q4_1 GGUF.
RECORDED = Path(__file__).parent / "tokenizer_smollm2.json"

TEXTS = [
    "",
    "the hello world",
    "  two  spaces\n\n\ttab \r\n",
    "naïve 日本語 🎉👩‍👩‍👧 42½",
    "it's 1234 I'LL",
]


def _gguf(tmp_path: Path, **metadata: Any) -> GGUFFile:
    path = tmp_path / "tiny.gguf"
    named = {key.replace("__", "."): value for key, value in metadata.items()}
    changes = {key if "." in key else f"tokenizer.ggml.{key}": v for key, v in named.items()}
    write_tiny_llama(path, metadata=changes)
    return GGUFFile(path)


def _error(tmp_path: Path, **metadata: Any) -> str:
    with pytest.raises(InputError) as caught:
        Tokenizer.from_gguf(_gguf(tmp_path, **metadata))
    return str(caught.value)


def _pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [text[start:end] for start, end in tokenizer.encode(text, add_bos=False).offsets]


def test_recorded_ids_of_smollm2(smollm2: Path) -> None:
    gguf_file = GGUFFile(smollm2)
    started = time.monotonic()
    tokenizer = Tokenizer.from_gguf(gguf_file)
    assert time.monotonic() - started < 1.0  # 0.2 s on two cores
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert len(recorded) == 80
    for row in recorded:
        assert tokenizer.encode(row["text"]).ids == row["ids"], row["text"]
        assert tokenizer.decode(row["ids"], skip_special=False) == row["text"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 49152)
    assert tokenizer.end_of_turn_ids == {0, 2}
    assert tokenizer.chat_template is not None


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "default", "llama-bpe", "qwen2"])
def test_round_trip_and_offsets(tmp_path: Path, pre: str) -> None:
    tokenizer = Tokenizer.from_gguf(_gguf(tmp_path, pre=pre))
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens.ids) == text
        covered = 0
        for start, end in tokens.offsets:  # no character is left out, none comes out of order
            assert start <= covered <= end
            covered = end
        assert covered == len(text)


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        # merges of the tiny tokenizer: "ing", " the", "\n\n"; what a pattern cuts never merges
        ("smollm", "sing the", ["s", "ing", " the"]),
        ("smollm", "\n\n1", ["\n\n", "1"]),  # digits are cut off first
        ("gpt-2", "\n\n1", ["\n", "\n", "1"]),  # the last space before a word stays alone
        ("llama-bpe", "\n\n1", ["\n\n", "1"]),
        ("qwen2", "\n\nthe", ["\n\n", "the"]),
        ("gpt-2", "\n\nthe", ["\n", "\n", "the"]),
    ],
)
def test_how_pre_tokenizers_differ(tmp_path: Path, pre: str, text: str, pieces: list[str]) -> None:
    assert _pieces(Tokenizer.from_gguf(_gguf(tmp_path, pre=pre)), text) == pieces


def test_digits_are_grouped_by_three_in_llama3_only(tmp_path: Path) -> None:
    tokens = tiny_tokenizer_metadata(320)["tokenizer.ggml.tokens"]
    tokens[-1] = "12"
    merges = [*tiny_tokenizer_metadata(320)["tokenizer.ggml.merges"], "1 2"]
    for pre, pieces in (("llama-bpe", ["12"]), ("qwen2", ["1", "2"]), ("smollm", ["1", "2"])):
        gguf_file = _gguf(tmp_path, pre=pre, tokens=tokens, merges=merges)
        assert _pieces(Tokenizer.from_gguf(gguf_file), "12") == pieces


def test_qwen2_composes_and_keeps_offsets_of_the_text_as_given(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(_gguf(tmp_path, pre="qwen2"))
    decomposed = tokenizer.encode("e\u0301x")
    assert decomposed.ids == tokenizer.encode("\u00e9x").ids
    assert decomposed.offsets[-1] == (2, 3)


def test_special_tokens_inside_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(_gguf(tmp_path))
    text = "<|im_start|>user\nhi<|im_end|>\n"
    tokens = tokenizer.encode(text)
    assert tokens.ids[0] == 1
    assert tokens.ids[-2] == 2
    assert tokens.offsets[0] == (0, 12)
    assert tokens.offsets[-1] == (len(text) - 1, len(text))
    assert tokenizer.decode(tokens.ids) == "user\nhi\n"
    assert tokenizer.decode(tokens.ids, skip_special=False) == text


def test_user_defined_and_wrongly_normal_tokens(tmp_path: Path) -> None:
    tokens = tiny_tokenizer_metadata(320)["tokenizer.ggml.tokens"]
    kinds = tiny_tokenizer_metadata(320)["tokenizer.ggml.token_type"]
    tokens[-1], kinds[-1] = "<tool>", 4
    kinds[2] = 1  # <|im_end|>
    tokenizer = Tokenizer.from_gguf(_gguf(tmp_path, tokens=tokens, token_type=kinds))
    ids = tokenizer.encode("a<tool>b<|im_end|>").ids
    assert (ids[1], ids[3]) == (319, 2)
    assert tokenizer.decode(ids) == "a<tool>b"


def test_bos(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(_gguf(tmp_path))
    assert tokenizer.encode("the").ids[0] != 1
    assert tokenizer.encode("the", add_bos=True).ids[0] == 1
    tokenizer = Tokenizer.from_gguf(_gguf(tmp_path, add_bos_token=True))
    assert tokenizer.encode("the").ids[0] == 1
    assert tokenizer.encode("the").offsets[0] == (0, 0)
    assert tokenizer.encode("the", add_bos=False).ids[0] != 1
    # llama.cpp adds BOS for Llama 3 where the file doesn't say
    llama3 = Tokenizer.from_gguf(_gguf(tmp_path, pre="llama-bpe", add_bos_token=None))
    assert llama3.add_bos
    without = Tokenizer.from_gguf(_gguf(tmp_path, bos_token_id=None, add_bos_token=True))
    assert without.bos_id is None
    assert without.encode("the").ids == tokenizer.encode("the", add_bos=False).ids
    with pytest.raises(InputError, match="no BOS"):
        without.encode("the", add_bos=True)


def test_refused_tokenizers(tmp_path: Path) -> None:
    message = _error(tmp_path, pre="tekken")
    assert "'tekken'" in message
    assert "default, gpt-2, llama-bpe, llama-v3, llama3, qwen2, smollm" in message
    assert "kind 'llama'" in _error(tmp_path, model="llama")
    assert "holds no tokenizer" in _error(tmp_path, model=None)
    assert "tokens is no list of strings" in _error(tmp_path, tokens=[1, 2, 3])
    assert "merges is no list of strings" in _error(tmp_path, merges=None)
    assert "merges are wrong" in _error(tmp_path, merges=["nope nope"])
    assert "has the merge 'ab'" in _error(tmp_path, merges=["ab"])
    assert "types for 2" in _error(tmp_path, token_type=[1, 1])
    assert "eos_token_id is 320" in _error(tmp_path, eos_token_id=320)
    tokens = tiny_tokenizer_metadata(320)["tokenizer.ggml.tokens"]
    tokens[-1] = tokens[5]
    assert "twice" in _error(tmp_path, tokens=tokens)


def test_half_a_surrogate_pair(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be tokenized"):
        Tokenizer.from_gguf(_gguf(tmp_path)).encode("a\ud800")


def _saved(tmp_path: Path, *, with_bos: bool) -> Path:
    """A directory as Hugging Face saves one, with what its post-processors do to texts."""
    directory = tmp_path / "saved"
    directory.mkdir(exist_ok=True)
    saved: tokenizers.Tokenizer = Tokenizer.from_gguf(_gguf(tmp_path))._tokenizer
    trim: Any = processors.ByteLevel(trim_offsets=True)
    if with_bos:
        bos = processors.TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", 1)])
        saved.post_processor = processors.Sequence([trim, bos])
    else:
        saved.post_processor = trim
    saved.enable_truncation(3)
    saved.save(str(directory / "tokenizer.json"))
    return directory


def test_from_file_agrees_with_from_gguf(tmp_path: Path) -> None:
    directory = _saved(tmp_path, with_bos=False)
    expected = Tokenizer.from_gguf(_gguf(tmp_path))
    for path in (directory, directory / "tokenizer.json"):
        tokenizer = Tokenizer.from_file(path)
        for text in TEXTS:
            assert tokenizer.encode(text) == expected.encode(text)
        assert tokenizer.eos_id is None
        assert tokenizer.end_of_turn_ids == {0, 2}
    completed = Tokenizer.from_file(directory, gguf_file=_gguf(tmp_path))
    assert (completed.bos_id, completed.eos_id, completed.add_bos) == (1, 2, False)
    assert completed.chat_template == expected.chat_template


def test_from_file_reads_its_neighbours(tmp_path: Path) -> None:
    directory = _saved(tmp_path, with_bos=True)
    config = {"eos_token": {"content": "<|im_end|>"}, "chat_template": "old"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_file(directory)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (1, 2, True)
    assert tokenizer.encode("the").ids[0] == 1
    assert tokenizer.chat_template == "old"
    (directory / "chat_template.jinja").write_text("new")
    assert Tokenizer.from_file(directory).chat_template == "new"


def test_from_file_refuses(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no tokenizer"):
        Tokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is not a tokenizer.json"):
        Tokenizer.from_file(tmp_path)
    directory = _saved(tmp_path, with_bos=False)
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<nope>"}')
    with pytest.raises(InputError, match="<nope>"):
        Tokenizer.from_file(directory)
    (directory / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        Tokenizer.from_file(directory)
