"""The tokenizer: recorded ids of SmolLM2, special tokens, offsets, and what is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, processors

from lora.forward.gguf.file import GGUFFile
from lora.forward.text.pre_tokenizers import PRE_TOKENIZERS
from lora.forward.text.tokenizer import Tokenizer
from lora.shaders.errors import InputError
from tests.support.tiny_gguf import tiny_tokenizer_metadata, write_tiny_llama
from tests.support.tiny_sentencepiece import spaced_gguf, spaced_metadata

# 300 texts each (code, scripts, emoji, spaces, special tokens, random mixtures) with the ids
# that llama.cpp gave (xllamacpp 2026.10, tests/parity/record_tokenizers.py).
RECORDED = Path(__file__).parent
GEMMA3 = Path(__file__).parents[3] / "models" / "gemma-3-270m-q4_k_m.gguf"

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


def _covers(offsets: list[tuple[int, int]], length: int) -> bool:
    """Whether no character is left out and none comes out of order."""
    covered = 0
    for start, end in offsets:
        if not start <= covered <= end:
            return False
        covered = end
    return covered == length


def test_recorded_ids_of_smollm2(smollm2: Path) -> None:
    gguf_file = GGUFFile(smollm2)
    started = time.process_time()
    tokenizer = Tokenizer.from_gguf(gguf_file)
    assert time.process_time() - started < 1.0  # 0.2 s on two cores
    recorded = json.loads((RECORDED / "tokenizer_smollm2.json").read_text(encoding="utf-8"))
    assert len(recorded) == 300
    absent = str.maketrans(
        "", "", "\x04\x06\x13\x14\x16\x1d"
    )  # bytes that SmolLM2 has no tokens for
    for row in recorded:
        assert tokenizer.encode(row["text"]).ids == row["ids"], row["text"]
        assert tokenizer.decode(row["ids"], skip_special=False) == row["text"].translate(absent)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 49152)
    assert tokenizer.end_of_turn_ids == {0, 2}
    assert tokenizer.chat_template is not None


def test_recorded_ids_of_gemma3() -> None:
    if not GEMMA3.exists():
        pytest.skip(f"models/{GEMMA3.name} is absent")
    gguf_file = GGUFFile(GEMMA3)
    started = time.process_time()
    tokenizer = Tokenizer.from_gguf(gguf_file)
    assert time.process_time() - started < 2.0  # 0.2 s on two cores, for 262,144 tokens
    recorded = json.loads((RECORDED / "tokenizer_gemma3.json").read_text(encoding="utf-8"))
    assert len(recorded) == 300
    for row in recorded:
        tokens = tokenizer.encode(row["text"], add_bos=False)
        assert tokens.ids == row["ids"], row["text"]
        # The character that stands for a space is itself no other.
        assert tokenizer.decode(row["ids"], skip_special=False) == row["text"].replace("▁", " ")
        assert _covers(tokens.offsets, len(row["text"]))
    assert tokenizer.encode("a").ids == [2, *tokenizer.encode("a", add_bos=False).ids]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (2, 1, 262144)
    # <eos>, <end_of_turn>, and </s>, an HTML tag here, which llama.cpp stops at too.
    assert tokenizer.end_of_turn_ids == {1, 106, 212}


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_round_trip_and_offsets(tmp_path: Path, pre: str) -> None:
    tokenizer = Tokenizer.from_gguf(_gguf(tmp_path, pre=pre))
    for text in TEXTS:
        tokens = tokenizer.encode(text, add_bos=False)
        assert tokenizer.decode(tokens.ids) == text
        assert _covers(tokens.offsets, len(text))


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
    # A text that begins with it gets no second one.
    text = tokenizer.decode([1], skip_special=False) + "the"
    assert tokenizer.encode(text).ids == tokenizer.encode("the").ids
    assert tokenizer.encode(text, add_bos=True).ids == tokenizer.encode("the").ids
    assert tokenizer.encode("the", continues=True).ids == tokenizer.encode("the", add_bos=False).ids
    # llama.cpp adds BOS for Llama 3 where the file doesn't say
    llama3 = Tokenizer.from_gguf(_gguf(tmp_path, pre="llama-bpe", add_bos_token=None))
    assert llama3.add_bos
    without = Tokenizer.from_gguf(_gguf(tmp_path, bos_token_id=None, add_bos_token=True))
    assert without.bos_id is None
    assert without.encode("the").ids == tokenizer.encode("the", add_bos=False).ids
    with pytest.raises(InputError, match="no BOS"):
        without.encode("the", add_bos=True)


def test_refused_tokenizers(tmp_path: Path) -> None:
    message = _error(tmp_path, pre="kimi-k2")
    assert "'kimi-k2'" in message
    assert ", ".join(PRE_TOKENIZERS) in message
    assert "kind 'bert'" in _error(tmp_path, model="bert")
    assert "must hold 320 numbers" in _error(tmp_path, model="llama")
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


def test_end_of_turn_ids(tmp_path: Path) -> None:
    tokens = tiny_tokenizer_metadata(320)["tokenizer.ggml.tokens"]
    ends = {"eot_token_id": 310, "eom_token_id": 311, "eos_token_ids": [312, 313]}
    tokenizer = Tokenizer.from_gguf(_gguf(tmp_path, **ends))
    assert tokenizer.end_of_turn_ids == {0, 2, 310, 311, 312, 313}
    assert "eot_token_id is 320" in _error(tmp_path, eot_token_id=320)
    assert "eos_token_ids is 320" in _error(tmp_path, eos_token_ids=[320])
    # gpt-oss ends a turn with <|return|> or <|call|>, and a message in it with <|end|>
    named = [*tokens[:-3], "<|end|>", "<|return|>", "<|call|>"]
    tokenizer = Tokenizer.from_gguf(_gguf(tmp_path, tokens=named))
    assert tokenizer.end_of_turn_ids == {0, 2, 318, 319}
    assert tokenizer.decode(tokenizer.encode("a<|end|>").ids) == "a<|end|>"
    assert tokenizer.decode([317, 318]) == "<|end|>"
    named = [*tokens[:-2], "</s>", "<|tool_response>"]
    tokenizer = Tokenizer.from_gguf(_gguf(tmp_path, tokens=named))
    assert tokenizer.end_of_turn_ids == {0, 2, 319}
    assert 318 not in tokenizer.encode("a</s>").ids
    named = [*tokens[:-1], "</s>"]
    assert Tokenizer.from_gguf(_gguf(tmp_path, tokens=named)).end_of_turn_ids == {0, 2, 319}


def test_control_tokens_that_are_part_of_the_text(tmp_path: Path) -> None:
    tokens = tiny_tokenizer_metadata(320)["tokenizer.ggml.tokens"]
    kinds = tiny_tokenizer_metadata(320)["tokenizer.ggml.token_type"]
    tokens[-2:], kinds[-2:] = ["<|channel|>", "<|other|>"], [3, 3]
    tokenizer = Tokenizer.from_gguf(_gguf(tmp_path, tokens=tokens, token_type=kinds))
    ids = tokenizer.encode("<|channel|>a<|other|>").ids
    assert (ids[0], ids[2]) == (318, 319)
    assert tokenizer.decode(ids) == "<|channel|>a"


def test_bytes_without_a_token_are_left_out(tmp_path: Path) -> None:
    metadata = tiny_tokenizer_metadata(320)
    tokens = metadata["tokenizer.ggml.tokens"]
    tokens[tokens.index("x")] = "[no x]"
    tokenizer = Tokenizer.from_gguf(_gguf(tmp_path, tokens=tokens))
    found = tokenizer.encode("usxer the")
    # "us" and "er" don't become "user", as if nothing had stood between
    assert [tokens[token] for token in found.ids] == ["us", "er", "Ġthe"]
    assert found.offsets == [(0, 2), (3, 5), (5, 9)]
    assert tokenizer.vocab_size == 320
    assert tokenizer.decode([320, *found.ids, 321]) == "user the"


def test_half_a_surrogate_pair(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be tokenized: .* is half a surrogate pair"):
        Tokenizer.from_gguf(_gguf(tmp_path)).encode("a\ud800")


def _saved(tmp_path: Path, *, with_bos: bool) -> Path:
    """A directory as Hugging Face saves one, with what its post-processors do to texts."""
    directory = tmp_path / "saved"
    directory.mkdir(exist_ok=True)
    saved: tokenizers.Tokenizer = Tokenizer.from_gguf(_gguf(tmp_path))._codec._tokenizer
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
    assert Tokenizer.from_file(directory).tool_use_template is None
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert Tokenizer.from_file(directory).tool_use_template == "tools"
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match="chat_template.jinja: not text in UTF-8; a chat templ"):
        Tokenizer.from_file(directory)


def test_what_the_gguf_says_of_bos_goes_before_a_tokenizer_json(tmp_path: Path) -> None:
    """As by llama.cpp, which reads the GGUF alone."""
    for with_bos in (False, True):
        directory = _saved(tmp_path, with_bos=with_bos)
        for metadata, expected in (
            ({"add_bos_token": True}, True),
            ({"add_bos_token": False}, False),
            ({"add_bos_token": None}, with_bos),
        ):
            gguf_file = _gguf(tmp_path, **metadata)
            assert Tokenizer.from_file(directory, gguf_file=gguf_file).add_bos is expected


def test_a_template_that_is_no_text_is_none(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "list.gguf", metadata={"tokenizer.chat_template": ["a"]})
    assert Tokenizer.from_gguf(GGUFFile(tmp_path / "list.gguf")).chat_template is None


def test_a_second_template_is_for_chats_with_tools(tmp_path: Path) -> None:
    directory = _saved(tmp_path, with_bos=True)
    named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    metadata = {"tokenizer.chat_template": "one", "tokenizer.chat_template.tool_use": "two"}
    write_tiny_llama(tmp_path / "two.gguf", metadata=metadata)
    for tokenizer in (
        Tokenizer.from_file(directory),
        Tokenizer.from_gguf(GGUFFile(tmp_path / "two.gguf")),
    ):
        assert (tokenizer.chat_template, tokenizer.tool_use_template) == ("one", "two")


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
    with pytest.raises(InputError, match="not JSON"):
        Tokenizer.from_file(directory)


def test_from_file_reads_sentencepiece(tmp_path: Path) -> None:
    """As Hugging Face has written Llama 2's: a space put before the text, bytes as tokens."""
    metadata = spaced_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [("h", "i"), ("▁", "hi")]
    model = models.BPE(
        {text: token for token, text in enumerate(tokens)},
        merges,
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    saved = tokenizers.Tokenizer(model)
    prepend = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    saved.normalizer = normalizers.Sequence(prepend)
    strip = decoders.Strip(" ", 1, 0)
    spaces = decoders.Replace("▁", " ")
    saved.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), strip])
    saved.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    saved.add_special_tokens(["<unk>", "<s>", "</s>"])
    saved.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(tmp_path)
    ours = Tokenizer.from_gguf(spaced_gguf(tmp_path))
    for text in ("hi", "hi hi", "  hi", "é hi", "hihi", "x", ""):
        found = tokenizer.encode(text)
        assert found == ours.encode(text), text
        assert tokenizer.decode(found.ids) == text
        # What goes on from another text has no space before it.
        found = tokenizer.encode(text, continues=True)
        assert found == ours.encode(text, continues=True), text
        assert [tokens[token] for token in found.ids[:1]] != ["▁"] or text.startswith(" ")
    assert (tokenizer.bos_id, tokenizer.add_bos) == (1, True)
    assert tokenizer.end_of_turn_ids == {2, 4}


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    """It is the tokenizer.json that doesn't fit, not the GGUF that is damaged."""
    small = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    small.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"tokenizer.json has 1 tokens, but BOS of .* is token 1"):
        Tokenizer.from_file(tmp_path, gguf_file=_gguf(tmp_path))
