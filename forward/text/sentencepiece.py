"""SentencePiece's byte-pair tokenizers as llama.cpp runs them: Llama 2, Mistral, Gemma, Phi-3.

A space is the character U+2581 (▁). Of all neighbours that can merge, the best merge first, the
leftmost where two are as good; there are no words. What is best says the score of the merged token
(`tokenizer.ggml.scores`), or the place in a list of merges (Gemma 4). A character that is no token
becomes its UTF-8 bytes, the tokens <0x00> to <0xFF>.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

from gguf import TokenType

from lora.forward.text.vocabulary import Vocabulary
from lora.shaders.errors import InputError

_SPACE = "▁"
_SPECIAL = (TokenType.CONTROL, TokenType.UNKNOWN)
_FOUND_IN_TEXT = (*_SPECIAL, TokenType.USER_DEFINED)
_STRIPPED = " \t\n\v\f\r"
# Words are remembered with their tokens, as most come again; sentences of Chinese don't.
_REMEMBERED = 1 << 15
_LONGEST_WORD = 24
_LONGEST_SPECIAL, _MOST_LENGTHS = 512, 128  # Gemma 3: 31 and 30

Priority = Callable[[str, str], float | None]
_Piece = tuple[int, int, int]


class SentencePiece:
    """Text to ids and back, by scores or by merges."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        priority: Priority,
        products: Iterable[str],
        *,
        unknown_id: int | None,
        add_space_prefix: bool,
        right_stripped: Iterable[int] = (),
        whole_newlines: bool = False,
    ) -> None:
        """Prepares the tokenizer; use `by_scores` or `by_merges`.

        Args:
            vocabulary: the tokens.
            priority: of merging two neighbours, lowest first; None where they don't merge.
            products: every text that a merge may give.
            unknown_id: stands for a character whose bytes are no tokens either.
            add_space_prefix: a space comes before the text, and before what follows a special
                token.
            right_stripped: special tokens that swallow the white space behind them.
            whole_newlines: a run of line breaks that is a token is taken whole, and no token
                crosses from a line break to another character.
        """
        self._texts, self._ids = vocabulary.texts, vocabulary.ids
        self._kinds = vocabulary.kinds
        self._priority = priority
        self._unknown_id = unknown_id
        self._add_space_prefix = add_space_prefix
        self._whole_newlines = whole_newlines
        self._special = _SpecialTokens(vocabulary, frozenset(right_stripped))
        self._boundary = _boundary(products, whole_newlines)
        self._word = lru_cache(_REMEMBERED)(self._merge)
        self._byte_ids = [self._ids.get(f"<0x{byte:02X}>") for byte in range(256)]
        self._bytes = {token: byte for byte, token in enumerate(self._byte_ids)}

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self._texts)

    def encode(
        self, text: str, *, continues: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The text's ids and, in characters of it, where each begins and ends.

        `continues` says that the text goes on from another: no space is put before it. A space
        that was put before the text has no place in it: a token of that space alone gets the
        offsets of the character behind it, as a byte of a character gets the character's.

        Raises:
            UnicodeEncodeError: the text holds half a surrogate pair.
        """
        text.encode()
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        done = 0
        for start, end, token in self._special.find(text):
            self._encode_fragment(text, done, start, ids, offsets, continues=continues and not done)
            ids.append(token)
            offsets.append((start, end))
            done = end
        self._encode_fragment(text, done, len(text), ids, offsets, continues=continues and not done)
        return ids, offsets

    def cut_before(self, text: str, border: int) -> int:
        """As LibraryCodec.cut_before: none is known."""
        return 0

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """The text of the tokens; the space that `encode` puts first is taken off again."""
        data = bytearray()
        at_start = True
        for token in ids:
            if not 0 <= token < len(self._texts):
                continue
            text, kind = self._texts[token], self._kinds[token]
            if kind in _FOUND_IN_TEXT:
                if kind == TokenType.USER_DEFINED or not skip_special:
                    data += text.encode()
                at_start = True
                continue
            if token in self._bytes:
                data.append(self._bytes[token])
            else:
                word = text.replace(_SPACE, " ")
                stripped = at_start and self._add_space_prefix
                data += (word.removeprefix(" ") if stripped else word).encode()
            at_start = False
        return data.decode(errors="replace")

    def _encode_fragment(
        self,
        text: str,
        start: int,
        end: int,
        ids: list[int],
        offsets: list[tuple[int, int]],
        *,
        continues: bool,
    ) -> None:
        """Appends the tokens of text[start:end], which lies between special tokens."""
        if start == end:
            return
        fragment = text[start:end].replace(" ", _SPACE)
        position = start
        if self._add_space_prefix and not continues:
            fragment = _SPACE + fragment
            position -= 1
        for chunk in self._boundary.split(fragment):
            pieces = self._word if len(chunk) <= _LONGEST_WORD else self._merge
            for token, first, last in pieces(chunk):
                begin = max(position + first, start)
                ids.append(token)
                offsets.append((begin, max(position + last, begin + 1)))
            position += len(chunk)

    def _merge(self, chunk: str) -> tuple[_Piece, ...]:
        """Tokens of a piece of text with their first and last character in it."""
        if self._whole_newlines and chunk in self._ids and not chunk.strip("\n"):
            return ((self._ids[chunk], 0, len(chunk)),)
        texts = list(chunk)
        after = list(range(1, len(texts) + 1))
        before = list(range(-1, len(texts) - 1))
        queue: list[tuple[float, int, int, int]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right < len(texts):
                priority = self._priority(texts[left], texts[right])
                if priority is not None:
                    size = len(texts[left]) + len(texts[right])
                    heapq.heappush(queue, (priority, left, right, size))

        for right in range(1, len(texts)):
            offer(right - 1, right)
        while queue:
            _, left, right, size = heapq.heappop(queue)
            # One of the two may have merged with another neighbour since.
            if not texts[left] or not texts[right] or len(texts[left]) + len(texts[right]) != size:
                continue
            texts[left] += texts[right]
            texts[right] = ""
            after[left] = after[right]
            if after[right] < len(texts):
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])

        pieces: list[_Piece] = []
        position = 0
        for text in filter(None, texts):
            end = position + len(text)
            pieces += ((token, position, end) for token in self._tokens_of(text))
            position = end
        return tuple(pieces)

    def _tokens_of(self, text: str) -> list[int]:
        token = self._ids.get(text)
        if token is not None:
            return [token]
        as_bytes = [self._byte_ids[byte] for byte in text.encode()]
        known = [byte_id for byte_id in as_bytes if byte_id is not None]
        if len(known) < len(as_bytes):
            return [] if self._unknown_id is None else [self._unknown_id]
        return known


class _SpecialTokens:
    """Finds tokens that stand in a text as they are written, before it is cut."""

    def __init__(self, vocabulary: Vocabulary, right_stripped: frozenset[int]) -> None:
        self._right_stripped = right_stripped
        self._ids = {
            text: token
            for text, token in vocabulary.ids.items()
            if vocabulary.kinds[token] in _FOUND_IN_TEXT
        }
        lengths: dict[str, set[int]] = {}
        for text in self._ids:
            lengths.setdefault(text[:2], set()).add(len(text))
        # Every place of a text is compared with a token of each length.
        longest = max(map(len, self._ids), default=0)
        most = max(map(len, lengths.values()), default=0)
        if longest > _LONGEST_SPECIAL or most > _MOST_LENGTHS:
            raise InputError(
                f"{vocabulary.path} is damaged: its tokenizer has special tokens of {longest:,} "
                f"characters, or of {most} lengths with one beginning; {_LONGEST_SPECIAL} and "
                f"{_MOST_LENGTHS} are the most that is looked for in texts."
            )
        # By its first two characters: how long a token may be there, the longest first.
        self._lengths = {
            head: sorted(found | ({1} if head[0] in self._ids else set()), reverse=True)
            for head, found in lengths.items()
        }
        firsts = "".join(sorted({re.escape(text[0]) for text in self._ids}))
        self._first = re.compile(f"[{firsts}]") if firsts else None

    def find(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(start, end, id) of each, from left to right, the longest where several begin.

        llama.cpp looks for the longest token in the whole text first: that is the same unless the
        end of one token is the beginning of a longer other.
        """
        done = 0
        while self._first is not None and (match := self._first.search(text, done)):
            done = match.start() + 1
            head = text[match.start() : match.start() + 2]
            for length in self._lengths.get(head) or self._lengths.get(head[0], []):
                found = text[match.start() : match.start() + length]
                token = self._ids.get(found)
                if token is None:
                    continue
                done = match.start() + len(found)
                if token in self._right_stripped:
                    while done < len(text) and text[done] in _STRIPPED:
                        done += 1
                yield match.start(), done, token
                break


def by_scores(
    vocabulary: Vocabulary,
    scores: Sequence[float],
    *,
    unknown_id: int | None,
    add_space_prefix: bool,
    right_stripped: Iterable[int] = (),
) -> SentencePiece:
    """A tokenizer that merges to the token of the highest score; arguments as `SentencePiece`."""
    ids = vocabulary.ids

    def priority(left: str, right: str) -> float | None:
        token = ids.get(left + right)
        return None if token is None else -scores[token]

    return SentencePiece(
        vocabulary,
        priority,
        vocabulary.texts,
        unknown_id=unknown_id,
        add_space_prefix=add_space_prefix,
        right_stripped=right_stripped,
    )


def by_merges(
    vocabulary: Vocabulary, merges: Sequence[tuple[str, str]], *, unknown_id: int | None
) -> SentencePiece:
    """A tokenizer that merges in the order of a list, as Gemma 4's does."""
    ranks: dict[tuple[str, str], int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault(pair, rank)
    return SentencePiece(
        vocabulary,
        lambda left, right: ranks.get((left, right)),
        (left + right for left, right in merges),
        unknown_id=unknown_id,
        add_space_prefix=False,
        whole_newlines=True,
    )


def _boundary(products: Iterable[str], whole_newlines: bool) -> re.Pattern[str]:
    """Where text can be cut without changing its tokens, so that its pieces can be remembered.

    Before a space, unless a merge joins the character before it to a space: most vocabularies
    have a space only in front. Gemma 3 has one token like that: ">▁</".
    """
    joined = set(re.findall(f"([^{_SPACE}\0]){_SPACE}", "\0".join(products)))
    uncut = "".join(sorted(re.escape(character) for character in joined))
    at_space = rf"(?<=[^{_SPACE}{uncut}])(?={_SPACE})"
    at_newlines = r"|(?<=\n)(?=[^\n])|(?<=[^\n])(?=\n)" if whole_newlines else ""
    return re.compile(at_space + at_newlines)
