"""A tokenizer.json: read and run in a child with limits (forward/text/bounded.py).

Its pre-tokenizer may be any regular expression, its normalizer and decoder any replacement, and the
library that runs them panics on some. So the child has the tokenizer, and this process its answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lora.forward.text.bounded import MOST_BYTES, SECONDS, allow_memory, ask
from lora.shaders.errors import InputError
from lora.shaders.untrusted import is_panic, reason_of

_MOST_FILE_BYTES = 1 << 28  # the largest known, of 256,000 tokens, have 35 MB
_MEMORY_A_BYTE = 64  # of the file, while it is read: objects of the library
_BYTES_A_SECOND = 1 << 21  # of a tokenizer.json or a text: a tenth of what honest ones take


@dataclass(frozen=True)
class ForeignFacts:
    """What a tokenizer.json says of itself.

    Attributes:
        n_tokens: added tokens included.
        first_id: the token that it puts before a text; None for none.
        ids: of the texts that were asked for; those that are no token are left out.
    """

    n_tokens: int
    first_id: int | None
    ids: dict[str, int]


class ForeignCodec:
    """The tokenizer of a tokenizer.json; as LibraryCodec.

    Attributes:
        vocab_size: number of tokens.
    """

    def __init__(self, file: Path) -> None:
        """Names the file; `facts` reads it.

        Raises:
            InputError: it can't be read, or is far larger than any tokenizer.
        """
        try:
            status = file.stat()
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror}).") from None
        if status.st_size > _MOST_FILE_BYTES:
            raise InputError(
                f"{file}: {status.st_size:,} bytes are more than any tokenizer.json has."
            )
        # A file that is changed meanwhile is read anew.
        self._key = str(file.absolute()), status.st_size, status.st_mtime_ns
        self._what = f"The tokenizer {file}"
        self._load_seconds = SECONDS + status.st_size / _BYTES_A_SECOND
        self.vocab_size = 0

    def facts(self, texts: Sequence[str]) -> ForeignFacts:
        """Reads the tokenizer.

        Args:
            texts: whose ids are asked for.

        Raises:
            InputError: it is none, or takes too long or too much memory.
        """
        n_tokens, first_id, ids = self._ask(foreign_facts, 0, list(texts))
        self.vocab_size = n_tokens
        return ForeignFacts(n_tokens, first_id, ids)

    def encode(
        self, text: str, *, continues: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """As LibraryCodec.encode.

        Raises:
            InputError: it takes too long.
            UnicodeEncodeError: the text holds half a surrogate pair.
        """
        ids, starts, ends = self._ask(foreign_encode, len(text.encode()), text, continues)
        return ids, list(zip(starts, ends, strict=True))

    def cut_before(self, text: str, border: int) -> int:
        """As LibraryCodec.cut_before: none is known."""
        return 0

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """As LibraryCodec.decode."""
        known = [int(token) for token in ids]
        return str(self._ask(foreign_decode, 8 * len(known), known, skip_special))

    def _ask(self, function: Any, n_bytes: int, *arguments: Any) -> Any:
        seconds = self._load_seconds + n_bytes / _BYTES_A_SECOND
        return ask(function, self._key, *arguments, what=self._what, seconds=seconds)


@lru_cache(maxsize=2)
def _loaded(key: tuple[str, int, int]) -> tuple[Any, int | None]:
    """The codec of a tokenizer.json, and the token that it puts before a text."""
    import tokenizers  # this process may only render templates

    from lora.forward.text.byte_level import LibraryCodec

    path, size, _ = key
    allow_memory(MOST_BYTES + _MEMORY_A_BYTE * size)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(path)
        # Found by what it does to a text.
        plain = tokenizer.encode("a", add_special_tokens=False).ids
        prefixed = tokenizer.encode("a", add_special_tokens=True).ids
        first_id = None if plain[:1] == prefixed[:1] else int(prefixed[0])
        return LibraryCodec(tokenizer), first_id
    except MemoryError:
        raise
    except BaseException as error:  # tokenizers raises bare Exception, or panics
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        reason = str(error).split("\n")[0] if type(error) is Exception else reason_of(error)
        raise InputError(f"{path} is not a tokenizer.json: {reason.rstrip('.')}.") from None


def foreign_facts(
    key: tuple[str, int, int], texts: list[str]
) -> tuple[int, int | None, dict[str, int]]:
    """See ForeignFacts; run by `ask`."""
    codec, first_id = _loaded(key)
    return codec.vocab_size, first_id, codec.ids_of(texts)


def foreign_encode(
    key: tuple[str, int, int], text: str, continues: bool
) -> tuple[list[int], list[int], list[int]]:
    """Ids, and in characters where each begins and ends; run by `ask`."""
    ids, offsets = _loaded(key)[0].encode(text, continues=continues)
    return ids, [start for start, _ in offsets], [end for _, end in offsets]


def foreign_decode(key: tuple[str, int, int], ids: list[int], skip_special: bool) -> str:
    """The text of ids; run by `ask`."""
    text: str = _loaded(key)[0].decode(ids, skip_special)
    return text
