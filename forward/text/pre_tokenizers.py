"""How byte-level tokenizers cut text before merging, by the name in `tokenizer.ggml.pre`.

The names, and which of them cut alike, are llama.cpp's (src/llama-vocab.cpp). The expressions are
those of the model families' own tokenizer.json, which llama.cpp rewrites for a smaller regex
engine: a model is trained with these. What differs on purpose, and nothing else does
(tests/parity/test_tokenizers.py): NFC, which llama.cpp leaves out; words of gpt-4o and tekken,
which llama.cpp cuts at combining marks and, outside ASCII, not at capitals; and 'ſ, which ignoring
case takes for 's.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora.forward.gguf.file import GGUFFile
from lora.shaders.errors import InputError
from lora.shaders.untrusted import shown


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before byte-pair merging, and what else its name implies.

    Attributes:
        patterns: applied one after the other; each match, and each gap between, is a piece.
        compose: text is brought to Unicode NFC first.
        ignore_merges: a piece that is itself a token is taken whole.
        add_bos: whether BOS is added where the metadata has no add_bos_token.
    """

    patterns: tuple[str, ...]
    compose: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_DIGIT = r"\p{N}"
_DIGITS = r"\p{N}{1,3}"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_BEFORE_WORD = r"[^\r\n\p{L}\p{N}]?"
_WORD = _BEFORE_WORD + r"\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = "|".join([_CONTRACTION, _WORD, _DIGITS, _SIGNS, _SPACES])
_QWEN2 = "|".join([_CONTRACTION, _WORD, _DIGIT, _SIGNS, _SPACES])
_SEED_CODER = "|".join([_CONTRACTION, _WORD, _DIGIT, r" ?[^\s\p{L}\p{N}\r\n]+", _SPACES])
_MINICPM5 = "|".join([_CONTRACTION, _WORD, r"\p{N}+", _SIGNS, _SPACES])
_MARKED_WORD = _BEFORE_WORD + r"[\p{L}\p{M}]+"
_QWEN35 = "|".join([_CONTRACTION, _MARKED_WORD, _DIGIT, r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", _SPACES])
# A word is capitals, then small letters: "iPhone" is two.
_CAPITALS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_WORDS = [
    f"{_BEFORE_WORD}{_CAPITALS}*{_SMALL}+",
    f"{_BEFORE_WORD}{_CAPITALS}+{_SMALL}*",
]
_SIGNS_AND_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = "|".join([*_CASED_WORDS, _DIGIT, _SIGNS_AND_SLASHES, _SPACES])
_GPT4O = "|".join(
    [*(f"{word}{_CONTRACTION}?" for word in _CASED_WORDS), _DIGITS, _SIGNS_AND_SLASHES, _SPACES]
)
_DEEPSEEK3 = (
    _DIGITS,
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES,
)
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"

_FAMILIES = {
    # llama.cpp's own, for files without a known name; no model was trained with it.
    ("default",): PreTokenizer((_FALCON[0].replace("`", ""), _GPT2, r"\p{N}+", _FALCON[2])),
    ("gpt-2", "phi-2", "exaone4", "mellum", "a.x-4.0", "gigachat", "granite-docling", "jais"): (
        PreTokenizer((_GPT2,))
    ),
    ("mpt", "olmo"): PreTokenizer((_GPT2,), compose=True),
    ("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"): (
        PreTokenizer((_DIGIT, _GPT2))
    ),
    ("command-r",): PreTokenizer((_DIGIT, _GPT2), compose=True),
    ("llama-bpe", "llama-v3", "llama3", "falcon3", "falcon-h1", "lfm2", "midm-2.0", "pixtral"): (
        PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
    ),
    ("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"): PreTokenizer((_LLAMA3,)),
    ("qwen2",): PreTokenizer((_QWEN2,), compose=True),
    ("deepseek-r1-qwen", "megrez", "kormo", "hunyuan", "solar-open", "stablelm2", "grok-2"): (
        PreTokenizer((_QWEN2,))
    ),
    ("seed-coder",): PreTokenizer((_SEED_CODER,)),
    ("minicpm5",): PreTokenizer((_DIGITS, _MINICPM5), ignore_merges=True),
    ("qwen35",): PreTokenizer((_QWEN35,), compose=True),
    ("gpt-4o", "llama4", "kanana2", "minimax-m2"): PreTokenizer((_GPT4O,)),
    ("tekken",): PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    ("deepseek-v3", "hunyuan-dense"): PreTokenizer(_DEEPSEEK3),
    ("falcon",): PreTokenizer(_FALCON),
    ("bloom", "poro-chat", "gpt3-finnish"): PreTokenizer((_BLOOM,)),
    ("viking",): PreTokenizer((_BLOOM, _DIGIT)),
}

PRE_TOKENIZERS = {name: family for names, family in _FAMILIES.items() for name in names}


def named_pre_tokenizer(gguf_file: GGUFFile) -> PreTokenizer:
    """The one that `tokenizer.ggml.pre` names.

    Raises:
        InputError: the name is not known here.
    """
    name = gguf_file.metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise InputError(
            f"{gguf_file.path} has the pre-tokenizer {shown(name)}, which is not supported; "
            f"supported: {', '.join(PRE_TOKENIZERS)}. Name the model's tokenizer.json with "
            "model.tokenizer."
        )
    return PRE_TOKENIZERS[name]
