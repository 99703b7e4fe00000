"""Lines that a tokenizer may stumble over, made from a seed: the same on every machine."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from unicodedata import ucd_3_2_0

_ENGLISH_WORDS = (
    "the of and to in is that it was for on are with his they at be this from have or one had by "
    "word but not what all were we when your can said there use an each which she do how their if "
    "will up other about out many then them these so some her would make like him into time has "
    "look two more write go see number no way could people my than first water been call who oil "
    "its now find long down day did get come made may part antidisestablishmentarianism"
)
_SCRIPT_WORDS = {
    "cyrillic": "съешь же ещё этих мягких французских булок да выпей чаю Привет МИР",
    "greek": "ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία Ελληνικά",
    "arabic": "السَّلَامُ عليكم ورحمة الله وبركاته مرحبا ١٢٣ كتاب",
    "hebrew": "שָׁלוֹם עולם ספר ירושלים",
    "devanagari": "नमस्ते दुनिया हिन्दी में पढ़ना क्षेत्र १२३",
    "thai": "สวัสดีชาวโลก ภาษาไทย กำลัง น้ำ",
    "bengali": "বাংলা ভাষা কেমন আছেন",
    "chinese": "你好 世界 机器学习 模型的训练需要大量数据 四千三百 漢字",
    "japanese": "こんにちは カタカナ 日本語のテキスト ー々〆 ﾊﾝｶｸ",
    "korean": "안녕하세요 세계 한국어 ㅋㅋㅋ",
    "vietnamese": "Tiếng Việt được viết bằng chữ Quốc ngữ",
    "rare": "ᚠᛇᚻ 𐍈𐌰 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ꙮ Ⅷ ½ ² ٤ ௧ ǅ ﬁ ß İ ı",
}
_ENGLISH = _ENGLISH_WORDS.split()
_SCRIPTS = {name: words.split() for name, words in _SCRIPT_WORDS.items()}
_EMOJI = ["🎉", "👩‍👩‍👧", "🏳️‍🌈", "👍🏽", "🇩🇪🇫🇷", "❤️", "1️⃣", "🤦🏼‍♂️", "☺", "\U0001fae0", "™️"]
_MARKS = [chr(code) for code in (0x300, 0x301, 0x302, 0x308, 0x323, 0x327, 0x330, 0x335, 0x20D7)]
_SPACES = [" ", "  ", "   ", "\t", "\n", "\r\n", "\n\n", "\n\n\n", "\u00a0", "\u3000", "\u2003"]
_SPACES += ["\u2028", "\x0b", "\x0c", " \n", "\t\t", "\n ", "\r", " " * 40, "\n" * 35]
_INVISIBLE = ["\u200b", "\u200c", "\u200d", "\ufeff", "\u00ad", "\u202e", "\u2060", "\u0085"]
_CONTROL = [chr(code) for code in [*range(1, 32), 127, 128, 159]]
_PUNCTUATION = [*"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", "...", "—", "«", "»", "„", "“", "¿", "…"]
_PUNCTUATION += [
    "。",
    "、",
    "「",
    "」",
    "，",
    "！",
    "€",
    "£",
    "×",
    "→",
    "≤",
    "∑",
    "▁",
    "▁▁",
    "Ġ",
    "Ċ",
]
_CONTRACTIONS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'T", "'LL", "'Re"]
_CONTRACTIONS += ["’s", "n't", "I'm", "we'VE", "o'clock"]
_CODE = [
    "def f(x):\n    return x ** 2  # square\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * 0x1F; }",
    '\tif err != nil {\n\t\treturn nil, fmt.Errorf("%w", err)\n\t}\n',
    "<html><body class='x'>&amp;<s>no</s><h1>Hi</h1></body></html>",
    "SELECT * FROM t WHERE a_b = 'c''d' AND e <> 1e-5;",
    "let café = `${x}`;\n\n\n// TODO: naïve\n",
    '{"key": [1, 2.5, null, true], "nested": {"a": "\\u00e9\\n"}}',
    "#include <stdio.h>\r\n\r\nint main(void)\r\n{\r\n    return 0;\r\n}\r\n",
    "        class A(B):\n            pass\n\n    x = lambda: (yield)\n",
    "$$\\int_0^\\infty e^{-x^2}\\,dx = \\frac{\\sqrt{\\pi}}{2}$$",
    "git commit -m 'x' && ls -la ~/.ssh | grep -v '^d' > /dev/null 2>&1",
]


def lines(count: int, seed: int, special: Sequence[str]) -> list[str]:
    """Random lines of code, scripts, emoji, spaces, numbers, special tokens and broken bytes.

    Args:
        count: how many.
        seed: the same lines for the same seed.
        special: tokens that are written into some of them.
    """
    rng = random.Random(seed)
    kinds: list[Callable[[random.Random], str]] = [
        _english, _english, _code, _script, _mixed, _mixed, _numbers, _spaces, _emoji, _combined,
        _controls, _broken_bytes, _long_word, _any_characters, lambda rng: _chat(rng, special),
        lambda rng: _chat(rng, special),
    ]  # fmt: skip
    return [rng.choice(kinds)(rng) for _ in range(count)]


def _english(rng: random.Random) -> str:
    words = [rng.choice(_ENGLISH) for _ in range(rng.randint(1, 30))]
    for place in range(len(words)):
        if rng.random() < 0.2:
            words[place] = rng.choice([str.upper, str.title, str.capitalize])(words[place])
        if rng.random() < 0.1:
            words[place] += rng.choice(_CONTRACTIONS + _PUNCTUATION)
    return rng.choice(["", " ", ""]) + " ".join(words) + rng.choice(["", ".", "?", "\n", " "])


def _code(rng: random.Random) -> str:
    indent = rng.choice(["", "    ", "\t", " " * rng.randint(1, 33)])
    return "".join(indent + rng.choice(_CODE) for _ in range(rng.randint(1, 3)))


def _script(rng: random.Random) -> str:
    words = _SCRIPTS[rng.choice(sorted(_SCRIPTS))]
    between = rng.choice(["", " ", " "])
    return between.join(rng.choice(words) for _ in range(rng.randint(1, 15)))


def _mixed(rng: random.Random) -> str:
    every = [word for words in _SCRIPTS.values() for word in words]
    pools = [_ENGLISH, every, _EMOJI, _SPACES, _PUNCTUATION, _CONTRACTIONS, _INVISIBLE, _MARKS]
    return "".join(
        rng.choice(rng.choice(pools)) + rng.choice(["", "", " "]) for _ in range(rng.randint(1, 25))
    )


def _numbers(rng: random.Random) -> str:
    shapes: list[Callable[[], str]] = [
        lambda: str(rng.randrange(10 ** rng.randint(1, 20))),
        lambda: f"{rng.uniform(-1e6, 1e6):,.3f}",
        lambda: f"{rng.random():e}",
        lambda: hex(rng.randrange(2**40)),
        lambda: f"{rng.randint(0, 23)}:{rng.randint(0, 59):02}",
        lambda: "".join(rng.choice("٠١٢٣٤٥٦٧٨٩") for _ in range(rng.randint(1, 6))),
        lambda: "".join(rng.choice("0123456789½²Ⅷ①") for _ in range(rng.randint(1, 9))),
        lambda: rng.choice(_ENGLISH) + str(rng.randint(0, 9999)),
    ]
    return rng.choice([" ", "", ", ", "\n"]).join(
        rng.choice(shapes)() for _ in range(rng.randint(1, 10))
    )


def _spaces(rng: random.Random) -> str:
    parts = [rng.choice(_SPACES) * rng.randint(1, 6) for _ in range(rng.randint(1, 6))]
    return "".join(part + rng.choice(["", rng.choice(_ENGLISH), "1", "."]) for part in parts)


def _emoji(rng: random.Random) -> str:
    return "".join(
        rng.choice(_EMOJI) + rng.choice(["", " ", rng.choice(_ENGLISH)])
        for _ in range(rng.randint(1, 10))
    )


def _combined(rng: random.Random) -> str:
    letters = "aeiounAEIOUNсяоΩعשनক한"
    return "".join(
        rng.choice(letters) + "".join(rng.choice(_MARKS) for _ in range(rng.randint(0, 3)))
        for _ in range(rng.randint(1, 20))
    )


def _controls(rng: random.Random) -> str:
    pool = _CONTROL + _INVISIBLE
    return "".join(
        rng.choice(pool) + rng.choice(["", " ", rng.choice(_ENGLISH)])
        for _ in range(rng.randint(1, 12))
    )


def _broken_bytes(rng: random.Random) -> str:
    cut = _mixed(rng).encode()[rng.randint(0, 3) :]
    noise = bytes(rng.randrange(256) for _ in range(rng.randint(0, 12)))
    return (cut[: rng.randint(0, 30)] + noise).replace(b"\0", b"").decode(errors="replace")


def _long_word(rng: random.Random) -> str:
    alphabet = rng.choice(["ab", "0123456789abcdef", "AaBbCc", "=", "-_", "日本語中文字", "é"])
    return "".join(rng.choice(alphabet) for _ in range(rng.choice([50, 200, 1000])))


def _any_characters(rng: random.Random) -> str:
    """Characters anywhere below the surrogates, those of later Unicodes than 3.2 left out.

    What a new character is depends on the version of each library.
    """
    codes = [rng.choice([rng.randrange(1, 0x300), rng.randrange(1, 0xD800)]) for _ in range(16)]
    assigned = [chr(code) for code in codes if ucd_3_2_0.category(chr(code)) != "Cn"]
    return "".join(assigned[: rng.randint(1, 12)])


def _chat(rng: random.Random, special: Sequence[str]) -> str:
    parts = []
    for _ in range(rng.randint(1, 6)):
        parts.append(rng.choice(special) if special else "<|none|>")
        parts.append(rng.choice(["", " ", "\n", "user\n", _english(rng), _mixed(rng)]))
    return "".join(parts[rng.randint(0, 1) :])
