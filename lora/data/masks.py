"""Text to tokens, and which of them are trained.

The prompt's tokens are those that generation sees, the trained ones those that it must give. Where
a token would reach from the prompt into the answer (" yes" of "Q: " and "yes"), the prompt is
tokenized by itself, as it is when the model runs, and the answer after it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from lora.data.turns import RenderedConversation, Turn, common_length
from lora.forward.text.tokenizer import TokenizedText
from lora.shaders.errors import InputError

if TYPE_CHECKING:
    from lora.config.data_section import DataConfig
    from lora.forward.text.chat_template import Span


class TextTokenizer(Protocol):
    """What is asked of a tokenizer here; `lora.forward.text.tokenizer.Tokenizer` is one."""

    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def end_of_turn_ids(self) -> frozenset[int]: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def tool_use_template(self) -> str | None: ...
    def encode(
        self, text: str, *, add_bos: bool | None = None, continues: bool = False
    ) -> TokenizedText: ...
    def cut_before(self, text: str, border: int) -> int: ...
    def ending_ids(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...


@dataclass(frozen=True)
class MaskedTokens:
    """Tokens of a row, or of one turn of it.

    Attributes:
        ids: one a token.
        trained: one a token.
        turn: the message whose turn this is, where it is an example of its own; None for a row.
    """

    ids: list[int]
    trained: list[bool]
    turn: int | None = None


def mask_text(
    prompt: str, answer: str, settings: DataConfig, tokenizer: TextTokenizer
) -> MaskedTokens:
    """Tokens of plain text, with EOS as data.append_eos wants it.

    Args:
        prompt: not trained, unless data.train_on is all; "" for a document, all of which is.
        answer: what follows it.
        settings: the config's `data:`.
        tokenizer: the model's.

    Raises:
        InputError: the text can't be tokenized, there is no EOS to append, or the answer goes on
            where generation has stopped.
    """
    trains_all = settings.train_on == "all" or not prompt
    ids, offsets = _tokens(tokenizer, prompt + answer, len(prompt) or None)
    if trains_all:
        trained = [True] * len(ids)
        end = _last_end_of_turn(ids, tokenizer)
    else:
        border, ends = len(prompt), tokenizer.end_of_turn_ids
        trained = [end > border for _, end in offsets]
        end = next((t for t, token in enumerate(ids) if token in ends and trained[t]), None)
        _stop_at(end, ids, trained, tokenizer)
    if settings.append_eos == "on":
        wanted = end is None or trains_all
    else:
        may = tokenizer.eos_id is not None or bool(prompt)
        wanted = settings.append_eos == "auto" and end is None and may
    if wanted:
        _append_eos(ids, trained, tokenizer)
    return MaskedTokens(ids, trained)


def _stop_at(
    end: int | None, ids: list[int], trained: list[bool], tokenizer: TextTokenizer
) -> None:
    """Trains nothing behind an answer's end; refuses an answer that goes on there."""
    if end is None:
        return
    for place in range(end + 1, len(ids)):
        trained[place] = False
        text = tokenizer.decode([ids[place]], skip_special=False)
        if text.strip() and ids[place] not in tokenizer.end_of_turn_ids:
            raise InputError(
                f"The answer goes on behind {tokenizer.decode([ids[end]], skip_special=False)}, "
                "and generation stops there, so the rest would not be trained. Write the row as "
                "messages or as text, take that token out, or set data.train_on: all."
            )


def mask_conversation(
    rendered: RenderedConversation, settings: DataConfig, tokenizer: TextTokenizer
) -> list[MaskedTokens]:
    """Tokens of a conversation: of the whole, and of turns that it doesn't show as they were said.

    Raises:
        InputError: the text can't be tokenized, or there is no EOS to append.
    """
    whole = _TokenizedTurns(rendered.text, tokenizer)
    if settings.train_on == "all":
        trained = [True] * len(whole.ids)
        unended = rendered.ends_with_turn and _last_end_of_turn(whole.ids, tokenizer) is None
        if settings.append_eos == "on" or (settings.append_eos == "auto" and unended):
            _append_eos(whole.ids, trained, tokenizer)
        return [MaskedTokens(whole.ids, trained)]
    trained = [False] * len(whole.ids)
    own: list[MaskedTokens] = []
    for turn in rendered.turns:
        places = whole.find(turn)
        if places is None:
            own.append(_own_example(turn, settings, tokenizer))
            continue
        for place in places.trained:
            trained[place] = True
        if not places.ended and turn.text == rendered.text:
            _end_turn(whole.ids, trained, turn, settings, tokenizer)
    # One without any trained turn is kept, so that it is counted as left out.
    if len(own) < len(rendered.turns) or not own:
        own.insert(0, MaskedTokens(whole.ids, trained))
    return own


def train_ends(
    examples: Sequence[MaskedTokens], settings: DataConfig, tokenizer: TextTokenizer
) -> list[MaskedTokens]:
    """Applies data.train_on_eos to the examples of a row.

    With `all` the ends of turns that aren't trained are, too; with `last` only the row's last
    trained one; with `none` none.
    """
    if settings.train_on_eos == "turn":
        return list(examples)
    ends = tokenizer.end_of_turn_ids
    changed: list[MaskedTokens] = []
    keeps = settings.train_on_eos == "last"
    for example in reversed(examples):
        if not any(example.trained):  # to be left out, whatever its ends
            changed.insert(0, example)
            continue
        trained = list(example.trained)
        for place in reversed(range(len(trained))):
            if example.ids[place] not in ends:
                continue
            if settings.train_on_eos == "all":
                # A turn of its own has the others' ends before it, which the row trains already.
                trained[place] |= example.turn is None
            elif trained[place]:
                trained[place], keeps = keeps, False
        changed.insert(0, replace(example, trained=trained))
    return changed


@dataclass(frozen=True)
class _Places:
    """Where a turn's tokens are.

    Attributes:
        trained: of the tokens to train.
        ended: the turn ends with a token at which generation stops.
        stop: how many tokens there are to the turn's end.
    """

    trained: list[int]
    ended: bool
    stop: int


class _TokenizedTurns:
    """A text with its tokens, in which turns are found.

    Args:
        text: a rendering.
        tokenizer: the model's.
        border: where a prompt ends that is to have its own tokens; None for none.
    """

    def __init__(self, text: str, tokenizer: TextTokenizer, border: int | None = None) -> None:
        self.ids, self._offsets = _tokens(tokenizer, text, border)
        self._text, self._tokenizer = text, tokenizer
        self._ends = tokenizer.end_of_turn_ids

    def find(self, turn: Turn) -> _Places | None:
        """Where a turn is, if it stands here with the tokens with which it was said; else None."""
        common = common_length(self._text, turn.text)
        first = bisect_right(self._offsets, turn.start, key=lambda span: span[1])
        if turn.start > common:
            return None
        tokens = TokenizedText(self.ids, self._offsets)
        if turn.after_prompt and not _prompt_stands(
            self._tokenizer, self._text, tokens, turn.start
        ):
            return None
        inside: list[int] = []
        for place in range(first, len(self.ids)):
            begin, end = self._offsets[place]
            if end > common:
                break
            inside += [place] if begin < end else []
            if self.ids[place] in self._ends:
                return _Places(self._said(inside, turn), True, place + 1)
        if common < len(turn.text):
            return None
        trained, stop = self._said(inside, turn), first + len(inside)
        if stop == len(self.ids) or self.ids[stop] not in self._ends:
            return _Places(trained, False, stop)
        # GLM ends a turn with the next role's marker.
        return _Places([*trained, stop] if trained[-1:] == inside[-1:] else trained, True, stop + 1)

    def _said(self, places: list[int], turn: Turn) -> list[int]:
        """Those that the template marks with {% generation %}; all where it marks nothing."""
        if turn.said is None:
            return places
        return [
            place
            for place in places
            if any(
                self._offsets[place][0] < end and start < self._offsets[place][1]
                for start, end in turn.said
            )
        ]


def _own_example(turn: Turn, settings: DataConfig, tokenizer: TextTokenizer) -> MaskedTokens:
    """A turn by itself, to its end."""
    tokens = _TokenizedTurns(turn.text, tokenizer, turn.start if turn.after_prompt else None)
    places = tokens.find(turn)
    assert places is not None  # it is the turn's own text, and the prompt has its own tokens
    ids = tokens.ids[: places.stop]
    trained = [False] * len(ids)
    for place in places.trained:
        trained[place] = True
    if not places.ended:
        _end_turn(ids, trained, turn, settings, tokenizer)
    return MaskedTokens(ids, trained, turn.index)


def _tokens(
    tokenizer: TextTokenizer, text: str, border: int | None = None
) -> tuple[list[int], list[Span]]:
    """A text's tokens and their offsets.

    Args:
        tokenizer: the model's.
        text: all of it.
        border: where a prompt ends that is to have its own tokens; None for none.
    """
    whole = tokenizer.encode(text)
    if border is None or _prompt_stands(tokenizer, text, whole, border):
        return list(whole.ids), list(whole.offsets)
    before = tokenizer.encode(text[:border])
    after = tokenizer.encode(text[border:], continues=True)
    moved = [(start + border, end + border) for start, end in after.offsets]
    return [*before.ids, *after.ids], [*before.offsets, *moved]


def _prompt_stands(tokenizer: TextTokenizer, text: str, whole: TokenizedText, border: int) -> bool:
    """Whether a text's tokens up to a border are those of the text before the border alone.

    They are not where a token crosses it, nor always where none does: expressions that cut a text
    before it is merged look ahead ("  \\n" is one word at the end of a text, two before a letter).

    Args:
        tokenizer: the model's.
        text: all of it.
        whole: its tokens.
        border: in characters.
    """
    ids, offsets = whole.ids, whole.offsets
    first = bisect_right(offsets, border, key=lambda span: span[1])
    if first < len(ids) and offsets[first][0] < border:
        return False
    # What stands before a cut needn't be tokenized again. Special tokens cut a text, too.
    cut = tokenizer.cut_before(text, border)
    start = bisect_left(offsets, cut, key=lambda span: span[0])
    ends = tokenizer.end_of_turn_ids
    last = next((place for place in range(first - 1, start - 1, -1) if ids[place] in ends), None)
    if last is not None:
        cut, start = offsets[last][1], last + 1
    known = last is not None or (cut and start < first and offsets[start][0] == cut)
    if known and tokenizer.ending_ids(text[cut:border]) == ids[start:first]:
        return True
    return tokenizer.encode(text[:border]).ids == ids[:first]


def _end_turn(
    ids: list[int],
    trained: list[bool],
    turn: Turn,
    settings: DataConfig,
    tokenizer: TextTokenizer,
) -> None:
    """Appends what ends a turn that its template leaves open."""
    if settings.append_eos == "off":
        return
    closing = tokenizer.encode(turn.closing, continues=True).ids[:1] if turn.closing else []
    if settings.append_eos == "auto" and closing and closing[0] in tokenizer.end_of_turn_ids:
        ids.append(closing[0])
        trained.append(True)
    else:
        _append_eos(ids, trained, tokenizer)


def _append_eos(ids: list[int], trained: list[bool], tokenizer: TextTokenizer) -> None:
    """Appends EOS unless it is there."""
    if tokenizer.eos_id is None:
        raise InputError("The tokenizer has no EOS token to append; set data.append_eos: off.")
    if ids[-1:] != [tokenizer.eos_id]:
        ids.append(tokenizer.eos_id)
        trained.append(True)


def _last_end_of_turn(ids: Sequence[int], tokenizer: TextTokenizer) -> int | None:
    """Where the end-of-turn token stands that only white space follows; None without one."""
    for position in range(len(ids) - 1, -1, -1):
        if ids[position] in tokenizer.end_of_turn_ids:
            return position
        if tokenizer.decode([ids[position]], skip_special=False).strip():
            return None
    return None
