"""Tokenizers out of GGUFs against llama.cpp's own and transformers', live."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest

from lora.forward.gguf.file import GGUFFile
from lora.forward.text.pre_tokenizers import PRE_TOKENIZERS
from lora.forward.text.tokenizer import Tokenizer
from tests.support.llama_cpp import llama_cpp_ids
from tests.support.tiny_tokenizers import (
    SPECIAL_TEXTS,
    byte_level,
    gemma4,
    merges_of,
    sentencepiece,
    write_model,
)
from tests.support.tokenizer_corpus import lines

pytestmark = pytest.mark.parity

MODELS = Path(__file__).parents[2] / "models"
GEMMA_TEXTS = ("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "[multimodal]", "<unused7>")
REAL = {
    "SmolLM2-135M-Instruct.Q4_1.gguf": (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<file_sep>",
    ),
    "gemma-3-270m-q4_k_m.gguf": (*GEMMA_TEXTS, "</h1>", "<0x0A>", "\n\n\n", "<unk>"),
}
# Words are cut at marks and capitals differently, see forward/text/pre_tokenizers.py.
WORDS_BY_CASE = ("gpt-4o", "llama4", "kanana2", "minimax-m2", "tekken")


def _differences(path: Path, texts: list[str], *, add_special: bool = False) -> list[Any]:
    tokenizer = Tokenizer.from_gguf(GGUFFile(path))
    expected = llama_cpp_ids(path, texts, add_special=add_special)
    add_bos = None if add_special else False
    found = [tokenizer.encode(text, add_bos=add_bos).ids for text in texts]
    return [row for row in zip(texts, found, expected, strict=True) if row[1] != row[2]]


@pytest.mark.parametrize("name", REAL)
def test_real_models_give_the_ids_of_llama_cpp(name: str) -> None:
    if not (MODELS / name).exists():
        pytest.skip(f"models/{name} is absent")
    assert _differences(MODELS / name, lines(10_000, 0, REAL[name])) == []
    some = ["", " a", "x", "\n", REAL[name][0]]
    assert _differences(MODELS / name, some, add_special=True) == []


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pre_tokenizers_cut_as_llama_cpp(name: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf", byte_level(), pre=name)
    texts = lines(1000, 2, ("<|im_start|>", "<|im_end|>", "<tool>"))
    if PRE_TOKENIZERS[name].compose:
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    if name in WORDS_BY_CASE:
        texts = [text for text in texts if not any(map(_is_mark_or_cased, text))]
    assert len(texts) > 500
    assert _differences(path, texts) == []
    assert _differences(path, texts[:20], add_special=True) == []


def _is_mark_or_cased(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] == "M" or (not character.isascii() and category in ("Lu", "Ll", "Lt"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"words": False},
        {"tied": True},
        {"words": False, "tied": True},
        {"add_space_prefix": False},
        {"general.name": "Phi-3 mini"},
        {"bos_token_id": 2, "add_bos_token": False},
    ],
    ids=str,
)
def test_sentencepiece_merges_as_llama_cpp(changes: dict[str, Any], tmp_path: Path) -> None:
    shape = {key: changes[key] for key in ("words", "tied") if key in changes}
    keys = {key: value for key, value in changes.items() if key not in shape}
    metadata = sentencepiece(**{"words": True, **shape})
    path = write_model(tmp_path / "tiny.gguf", metadata, **keys)
    texts = lines(3000, 3, SPECIAL_TEXTS)
    if "general.name" in changes:
        # White space that swallows white space: the order in which it is found would matter. No
        # Phi-3 has such tokens.
        texts = [text for text in texts if "  " not in text and "\n\n" not in text]
    assert _differences(path, texts) == []
    assert _differences(path, ["", *texts[:20]], add_special=True) == []


def test_gemma4_merges_as_llama_cpp(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf", gemma4())
    texts = lines(3000, 4, SPECIAL_TEXTS)
    assert _differences(path, texts) == []
    assert _differences(path, texts[:20], add_special=True) == []


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "Qwen3_5Tokenizer", "CohereTokenizer"])
def test_byte_level_gives_the_ids_of_transformers(name: str, tmp_path: Path) -> None:
    import transformers

    pre = {"Qwen2Tokenizer": "qwen2", "Qwen3_5Tokenizer": "qwen35", "CohereTokenizer": "command-r"}
    metadata = byte_level()
    path = write_model(tmp_path / "tiny.gguf", metadata, pre=pre[name])
    tokens = metadata["tokenizer.ggml.tokens"]
    theirs = getattr(transformers, name)(
        vocab={text: token for token, text in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]],
    )
    ours = Tokenizer.from_gguf(GGUFFile(path))
    for text in lines(1000, 5, []):
        expected = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, add_bos=False).ids == expected, text


@pytest.mark.parametrize("words", [True, False])
def test_sentencepiece_gives_the_ids_of_transformers(words: bool, tmp_path: Path) -> None:
    from transformers import GemmaTokenizer, LlamaTokenizer

    metadata = sentencepiece(words=words)
    vocab = {text: token for token, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = merges_of(metadata)
    # transformers isn't told which tokens are user-defined.
    special = ("\n\n", "  ", "<s>", "</s>")
    texts = [text for text in lines(1000, 6, []) if not any(part in text for part in special)]
    llama = LlamaTokenizer(vocab=vocab, merges=merges)
    path = write_model(tmp_path / "llama.gguf", metadata)
    ours = Tokenizer.from_gguf(GGUFFile(path))
    for text in texts:
        # Metaspace puts no space before a space; sentencepiece and llama.cpp do.
        if text[:1] not in (" ", "▁"):
            expected = llama(text, add_special_tokens=False).input_ids
            assert ours.encode(text, add_bos=False).ids == expected, text
    gemma = GemmaTokenizer(vocab=vocab, merges=merges, bos_token="<s>", eos_token="</s>")
    path = write_model(tmp_path / "gemma.gguf", metadata, add_space_prefix=False)
    ours = Tokenizer.from_gguf(GGUFFile(path))
    for text in texts:
        expected = gemma(text, add_special_tokens=False).input_ids
        assert ours.encode(text, add_bos=False).ids == expected, text
