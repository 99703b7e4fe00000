"""Text from a model: the prompt at once, then token by token, with keys and values kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lora.forward.model.frozen_model import Model
from lora.forward.text.tokenizer import Tokenizer
from lora.generation.engine import STEPS_AHEAD, Adapter, DecodeEngine
from lora.generation.prompts import Prompt, prompt_ids
from lora.generation.sampling import GREEDY, Sampler, Sampling
from lora.generation.snapshots import Snapshots
from lora.shaders.errors import InputError
from lora.shaders.recording import Recording

if TYPE_CHECKING:
    from lora.forward.text.chat_template import ChatTemplate

_DECODED_BEFORE = 16  # tokens decoded again before new ones, for what joins them
_MOST_HELD_BACK = 4  # tokens: a character has at most four bytes


@dataclass
class GenerationTimes:
    """What the last text took; grows while it is streamed."""

    reused_tokens: int = 0  # of the prompt, from the cache
    prompt_tokens: int = 0  # the rest of the prompt
    prompt_seconds: float = 0.0
    new_tokens: int = 0  # the first comes with the prompt; one that ends the text counts
    new_seconds: float = 0.0  # of the others
    ended: bool = False  # by a token that ends texts; not so one that was stopped or cut off

    @property
    def prompt_speed(self) -> float:
        """Tokens of the prompt a second."""
        return self.prompt_tokens / max(self.prompt_seconds, 1e-9)

    @property
    def speed(self) -> float:
        """New tokens a second, from the first one on."""
        return max(0, self.new_tokens - 1) / max(self.new_seconds, 1e-9)


@dataclass
class _Ahead:
    """A greedy text that the device goes on with by itself."""

    ids: list[int]  # what the host knows of it
    length: int  # tokens that it then has, if nobody changed it
    n_in_flight: int = 0  # tokens after these that the host has yet to hear of


class _Owner(Protocol):
    def close(self) -> None: ...


class _Stopped(Exception):
    """The caller wants no more, and the prompt is not done."""


class TextGenerator:
    """Continues texts with a model, bare or under one of several adapters.

    The keys and values of the last text stay on the device: of a text that begins like it, under
    the same adapter, only the rest is computed.

    A context manager: `close` gives the memory back.

    Args:
        recording: where the model is, and the plans of a prompt's products; in f32.
        model: its rope tables set the room: the tokens of prompt and answer together.
        tokenizer: of the model.
        adapters: by the name that `stream` is given.
        owner: what is closed with the generator; None for its own memory alone.

    Raises:
        InputError: the device has no memory for the keys and values.
    """

    def __init__(
        self,
        recording: Recording,
        model: Model,
        tokenizer: Tokenizer,
        adapters: Mapping[str, Adapter] | None = None,
        *,
        owner: _Owner | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.times = GenerationTimes()
        self._model = model
        self._vocab_size = model.architecture.vocab_size
        self._engine = DecodeEngine(recording, model, adapters or {})
        self._owner: _Owner = self._engine if owner is None else owner
        self.adapters = self._engine.adapters
        self.room = self._engine.room
        self._ahead: _Ahead | None = None
        self._snapshots = Snapshots(self._engine if self._engine.recurrent else None)
        self.forget()

    def close(self) -> None:
        """Gives the memory back."""
        self._owner.close()

    def __enter__(self) -> TextGenerator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def forget(self) -> None:
        """Drops what is kept of the last text; needed once an adapter's numbers have changed."""
        self._settle()
        self._snapshots.forget()
        self._held: list[int] = []  # tokens whose keys and values are in the cache
        self._held_under: tuple[str | None, bool] = (None, False)  # adapter, long rope

    def next_logits(self, ids: Sequence[int], *, adapter: str | None = None) -> np.ndarray:
        """Logits f32 [vocab_size] of the token after `ids`."""
        self._run(list(ids), adapter)
        return self._engine.logits()

    def stream_ids(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        adapter: str | None = None,
        sampling: Sampling | Sampler = GREEDY,
        stop_ids: frozenset[int] = frozenset(),
        stopped: Callable[[], bool] | None = None,
    ) -> Iterator[int]:
        """New tokens one by one, until one of `stop_ids`, max_tokens, or the end of the room.

        Args:
            prompt: token ids.
            max_tokens: new tokens at most.
            adapter: one of `adapters`; None for the bare model.
            sampling: how tokens are chosen; a Sampler goes on with its series of draws.
            stop_ids: tokens that end the text; they are not given.
            stopped: asked between the pieces of the prompt and before each token; True ends the
                text. What was computed until then is kept.

        Raises:
            InputError: the prompt is empty or leaves no room, or there is no such adapter.
        """
        ids = list(prompt)
        if not ids or len(ids) >= self.room:
            raise InputError(
                f"The prompt has {len(ids)} tokens; from 1 to {self.room - 1} fit here "
                "(data.max_length, or --max-length, sets the room)."
            )
        sampler = sampling if isinstance(sampling, Sampler) else Sampler(sampling)
        times = self.times = GenerationTimes()
        start = time.perf_counter()
        times.reused_tokens = self._reusable(ids, adapter)
        times.prompt_tokens = len(ids) - times.reused_tokens
        n_most = min(max_tokens, self.room - len(ids))
        for index in range(n_most):
            if index > 0 and stopped is not None and stopped():
                return
            try:
                if sampler.sampling.only_argmax:
                    token = self._most_likely(ids, adapter, n_most - index - 1, stopped)
                else:
                    self._run(ids, adapter, stopped)
                    if index + 1 < n_most:
                        self._engine.prepare_token(adapter)
                    logits = self._engine.logits()
                    token = sampler.choose(logits, ids)
            except _Stopped:
                times.prompt_tokens = len(self._held) - times.reused_tokens
                times.prompt_seconds = time.perf_counter() - start
                return
            now = time.perf_counter()
            if index == 0:
                times.prompt_seconds = now - start
                start = now
            else:
                times.new_seconds = now - start
            times.new_tokens = index + 1
            if token in stop_ids:
                times.ended = True
                return
            ids.append(token)
            yield token

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int,
        adapter: str | None = None,
        sampling: Sampling | Sampler = GREEDY,
        template: ChatTemplate | None = None,
        add_bos: bool | None = None,
        stopped: Callable[[], bool] | None = None,
    ) -> Iterator[str]:
        """Pieces of text until an end-of-turn token, max_tokens, or the end of the room.

        Args:
            prompt: a text, token ids, or messages.
            max_tokens: new tokens at most.
            adapter: one of `adapters`; None for the bare model.
            sampling: how tokens are chosen; a Sampler goes on with its series of draws.
            template: what messages are written with; None for the model's.
            add_bos: for a text, whether BOS comes before it; None: as the model wants it.
            stopped: as in `stream_ids`.

        Raises:
            InputError: as `stream_ids`; or messages are given, and no chat template takes them.
        """
        ids = prompt_ids(self.tokenizer, prompt, template, add_bos=add_bos)
        shown = len(ids)  # tokens whose text has been given
        for token in self.stream_ids(
            tuple(ids),
            max_tokens=max_tokens,
            adapter=adapter,
            sampling=sampling,
            stop_ids=self.tokenizer.end_of_turn_ids,
            stopped=stopped,
        ):
            ids.append(token)
            text = self._text_after(ids, shown)
            # A character spread over several tokens is shown when its last one has come.
            if not text.endswith("\ufffd") or len(ids) - shown >= _MOST_HELD_BACK:
                shown = len(ids)
                if text:
                    yield text
        if shown < len(ids):
            yield self._text_after(ids, shown)

    def _text_after(self, ids: list[int], shown: int) -> str:
        """The text of ids[shown:], as it joins on to that of the tokens before."""
        first = max(0, shown - _DECODED_BEFORE)
        before = self.tokenizer.decode(ids[first:shown])
        return self.tokenizer.decode(ids[first:])[len(before) :]

    # -- the device -----------------------------------------------------------------------------

    def _under_length(self, length: int, adapter: str | None) -> tuple[str | None, bool]:
        """What decides the keys and values of a text besides its tokens."""
        long = self._model.long_examples
        return adapter, long is not None and length > long.longer_than

    def _reusable(self, ids: Sequence[int], adapter: str | None) -> int:
        """How many tokens of a text need not be computed: all but the last at most."""
        return self._snapshots.nearest(self._in_common(ids, adapter), len(self._held))

    def _in_common(self, ids: Sequence[int], adapter: str | None) -> int:
        """With how many tokens of the last text a text begins, all but its own last at most."""
        if self._under_length(len(ids), adapter) != self._held_under:
            return 0
        known = list(ids[: min(len(ids) - 1, len(self._held))])
        if known == self._held[: len(known)]:  # the usual case, each new token
            return len(known)
        return next(i for i, token in enumerate(known) if token != self._held[i])

    def _most_likely(
        self,
        ids: list[int],
        adapter: str | None,
        n_more: int,
        stopped: Callable[[], bool] | None = None,
    ) -> int:
        """The most likely token after `ids`.

        The host hears of a token some steps late, while the device goes on with it: asking for each
        and waiting took as long as a third of a step.

        Args:
            ids: the text; of one text always the same list, with each token appended.
            n_more: further tokens that may be asked for: no more are computed ahead.
            stopped: as in `_run`.
        """
        ahead = self._ahead
        if ahead is None or ahead.ids is not ids or ahead.length != len(ids):
            self._run(ids, adapter, stopped)
            ahead = self._ahead = _Ahead(ids, len(ids))
            self._push_token(ahead)
        most = 0 if self._engine.waits else min(n_more, STEPS_AHEAD)
        under = self._held_under
        while ahead.n_in_flight <= most:
            position = len(ids) + ahead.n_in_flight - 1
            if self._under_length(position + 1, adapter) != under:
                break  # all keys turn differently from here on
            self._engine.run_token(None, position, self._rope_offset() + position, adapter)
            self._push_token(ahead)
        token: int = self._engine.ring.take()
        ahead.n_in_flight -= 1
        ahead.length += 1
        if ahead.n_in_flight:  # its keys and values are on their way into the cache
            self._held.append(token)
        else:
            self._ahead = None
        return token

    def _push_token(self, ahead: _Ahead) -> None:
        """Asks for the token that the work submitted so far leaves."""
        self._engine.push_token()
        ahead.n_in_flight += 1

    def _settle(self) -> None:
        """Waits for what was computed ahead, and drops it."""
        if self._ahead is not None:
            self._engine.ring.ready(wait=True)
            self._ahead = None

    def _rope_offset(self) -> int:
        """The row of rope's tables where those begin that the held text takes."""
        long = self._model.long_examples
        return long.first_position if long is not None and self._held_under[1] else 0

    def _run(
        self, ids: list[int], adapter: str | None, stopped: Callable[[], bool] | None = None
    ) -> None:
        """Puts the logits of the token after `ids` into the head's tensors.

        Raises:
            _Stopped: `stopped` said so between two pieces.
        """
        self._settle()
        if adapter is not None and adapter not in self.adapters:
            loaded = ", ".join(self.adapters) or "none"
            raise InputError(f"There is no adapter {adapter!r}; loaded: {loaded}.")
        if not 0 < len(ids) <= self.room:
            raise InputError(f"A text of {len(ids)} tokens does not fit the room of {self.room}.")
        done = self._reusable(ids, adapter)
        for token in ids[done:]:
            if not 0 <= token < self._vocab_size:
                raise InputError(
                    f"The text has the token id {token}, but the vocabulary of the model has "
                    f"{self._vocab_size} entries; the tokenizer does not fit the model."
                )
        self._snapshots.go_back(done, len(self._held))
        self._held_under = self._under_length(len(ids), adapter)
        del self._held[done:]
        rope_offset = self._rope_offset()
        marked = False  # whether the ring holds something
        while done < len(ids):
            tokens = ids[done : done + self._engine.piece_rows]
            with_head = done + len(tokens) == len(ids)
            if len(ids) - done == 1:
                self._engine.run_token(tokens[0], done, rope_offset + done, adapter)
            else:
                self._engine.run_piece(
                    tokens, done, rope_offset + done, adapter, with_head=with_head
                )
            self._held += tokens
            done += len(tokens)
            if len(tokens) > 1:
                self._snapshots.keep(done)
            if stopped is not None and not with_head:
                # A GPU would take all pieces at once, and who stops would wait for all of them. So
                # the host stays one piece ahead: what it asks for comes when a piece is done.
                self._engine.push_token()
                if marked:
                    self._engine.ring.take()
                marked = True
                if stopped():
                    self._engine.ring.ready(wait=True)
                    raise _Stopped
        if marked:
            self._engine.ring.ready(wait=True)
