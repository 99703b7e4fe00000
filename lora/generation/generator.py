"""Text from a model: the prompt at once, then token by token, with keys and values kept."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import wgpu

from lora.adapters.files import load_adapter, open_adapter
from lora.forward.decoder.decode_step import record_step, record_step_head
from lora.forward.decoder.step_tensors import StepActivations, StepHead, StepInputs
from lora.forward.gguf.file import GGUFFile
from lora.forward.model.adapter import AdapterLayout
from lora.forward.model.architecture import Architecture
from lora.forward.model.frozen_model import Model, load_model
from lora.forward.model.kv_cache import KeyValueCache
from lora.forward.plans.matmul_plans import PlanSource, using_source
from lora.forward.text.tokenizer import Tokenizer
from lora.generation.sampling import GREEDY, Sampler, Sampling
from lora.shaders.device import Device
from lora.shaders.errors import DeviceMemoryError, InputError
from lora.shaders.planning import PlanningDevice
from lora.shaders.program import Program, ReadbackRing
from lora.shaders.tensor import Tensor
from lora.storage.stores import resolve_model
from lora.storage.tile_cache import find_tiles

# Tokens of a prompt that are computed at once; their activations are what they cost.
_PIECE_ROWS = 512
_CPU_PIECE_ROWS = 64

DEFAULT_ROOM = 4096  # tokens
# Greedy tokens that a GPU is given to compute before the host has heard of the last one.
_STEPS_AHEAD = 2
_DECODED_BEFORE = 16  # tokens decoded again before new ones, for what joins them
_MOST_HELD_BACK = 4  # tokens: a character has at most four bytes


@dataclass(frozen=True)
class Adapter:
    """An adapter on the device."""

    layout: AdapterLayout
    flat: Tensor  # [layout.size]


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


class _Stopped(Exception):
    """The caller wants no more, and the prompt is not done."""


class TextGenerator:
    """Continues texts with a model, bare or under one of several adapters.

    The keys and values of the last text stay on the device: of a text that begins like it, under
    the same adapter, only the rest is computed.

    Args:
        device: where the model is.
        model: its rope tables set the room: the tokens of prompt and answer together.
        tokenizer: of the model.
        adapters: by the name that `stream` is given.
        plans: with which the products of a prompt are recorded; None for the model's choices.

    Raises:
        InputError: the device has no memory for the keys and values.
    """

    def __init__(
        self,
        device: Device,
        model: Model,
        tokenizer: Tokenizer,
        adapters: Mapping[str, Adapter] | None = None,
        *,
        plans: PlanSource | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._plans = plans
        self.adapters = dict(adapters or {})
        self.times = GenerationTimes()
        self._device = device
        self._model = model
        self._vocab_size = model.architecture.vocab_size
        long = model.long_examples
        self.room = model.layers[0].rope.shape[0] if long is None else long.first_position
        taken = Counter(device.allocated)
        try:
            self._allocate(device)
        except DeviceMemoryError as error:
            plan = PlanningDevice(device)
            self._allocate(plan)
            raise InputError(
                f"Text of up to {self.room} tokens does not fit: {error}, and it takes "
                f"{memory_figures(taken + plan.allocated)}. Lower the room (--max-length, or "
                "data.max_length)."
            ) from error
        self._programs: dict[tuple[str | None, int], tuple[Program, Program]] = {}
        self._prepared: dict[str | None, wgpu.GPUCommandBuffer] = {}  # by adapter
        self._ahead: _Ahead | None = None
        self.forget()

    def _allocate(self, device: Device) -> None:
        """Takes the memory that text needs besides the model and the adapters."""
        architecture = self._model.architecture
        piece = min(self.room, _CPU_PIECE_ROWS if device.is_cpu else _PIECE_ROWS)
        self._cache = KeyValueCache.allocate(device, architecture, self.room)
        self._pieces = StepInputs.allocate(device, piece)
        self._head = StepHead.allocate(device, self._model)
        self._step = StepInputs.allocate(device, 1, self._head.token)
        self._act = {
            inputs.rows.maximum: StepActivations.allocate(device, self._model, inputs.rows)
            for inputs in (self._pieces, self._step)
        }

    def forget(self) -> None:
        """Drops what is kept of the last text; needed once an adapter's numbers have changed."""
        self._settle()
        self._held: list[int] = []  # tokens whose keys and values are in the cache
        self._held_under: tuple[str | None, bool] = (None, False)  # adapter, long rope

    def next_logits(self, ids: Sequence[int], *, adapter: str | None = None) -> np.ndarray:
        """Logits f32 [vocab_size] of the token after `ids`."""
        self._run(list(ids), adapter)
        return self._device.read(self._head.logits)[0, : self._vocab_size]

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
                        self._prepare_step(adapter)
                    logits = self._device.read(self._head.logits)[0, : self._vocab_size]
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
        prompt: str | Sequence[int],
        *,
        max_tokens: int,
        adapter: str | None = None,
        sampling: Sampling | Sampler = GREEDY,
        add_bos: bool | None = None,
        stopped: Callable[[], bool] | None = None,
    ) -> Iterator[str]:
        """Pieces of text until an end-of-turn token, max_tokens, or the end of the room.

        Args:
            prompt: a text, or token ids.
            max_tokens: new tokens at most.
            adapter: one of `adapters`; None for the bare model.
            sampling: how tokens are chosen; a Sampler goes on with its series of draws.
            add_bos: for a text, whether BOS comes before it; None: as the model wants it.
            stopped: as in `stream_ids`.

        Raises:
            InputError: as `stream_ids`.
        """
        if isinstance(prompt, str):
            ids = list(self.tokenizer.encode(prompt, add_bos=add_bos).ids)
        else:
            ids = list(prompt)
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
        most = 0 if self._device.is_cpu else min(n_more, _STEPS_AHEAD)
        under = self._held_under
        while ahead.n_in_flight <= most:
            position = len(ids) + ahead.n_in_flight - 1
            if self._under_length(position + 1, adapter) != under:
                break  # all keys turn differently from here on
            self._step.write(self._device, None, position, self._rope_offset() + position)
            self._submit_step(adapter)
            self._push_token(ahead)
        token: int = self._ring.take()
        ahead.n_in_flight -= 1
        ahead.length += 1
        if ahead.n_in_flight:  # its keys and values are on their way into the cache
            self._held.append(token)
        else:
            self._ahead = None
        return token

    @cached_property
    def _ring(self) -> ReadbackRing:
        """Tokens on their way to the host."""
        return ReadbackRing(self._device, self._head.token.n_bytes, _STEPS_AHEAD + 1)

    def _push_token(self, ahead: _Ahead) -> None:
        """Asks for the token that the work submitted so far leaves."""
        self._ring.push(self._head.token, lambda values: int(values.view(np.uint32)[0]))
        ahead.n_in_flight += 1

    def _settle(self) -> None:
        """Waits for what was computed ahead, and drops it."""
        if self._ahead is not None:
            self._ring.ready(wait=True)
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
        self._held_under = self._under_length(len(ids), adapter)
        del self._held[done:]
        rope_offset = self._rope_offset()
        marked = False  # whether the ring holds something
        while done < len(ids):
            inputs = self._step if len(ids) - done == 1 else self._pieces
            tokens = ids[done : done + inputs.rows.maximum]
            with_head = done + len(tokens) == len(ids)
            inputs.write(self._device, tokens, done, rope_offset + done)
            if inputs is self._step:
                self._submit_step(adapter)
            else:
                layers, head = self._programs_of(adapter, inputs)
                layers.run()
                if with_head:
                    head.run()
            self._held += tokens
            done += len(tokens)
            if stopped is not None and not with_head:
                # A GPU would take all pieces at once, and who stops would wait for all of them. So
                # the host stays one piece ahead: what it asks for comes when a piece is done.
                self._ring.push(self._head.token, len)
                if marked:
                    self._ring.take()
                marked = True
                if stopped():
                    self._ring.ready(wait=True)
                    raise _Stopped
        if marked:
            self._ring.ready(wait=True)

    def _prepare_step(self, adapter: str | None) -> None:
        """Encodes the next token's commands, which do not depend on it, while the device works."""
        if adapter not in self._prepared:
            encoder = self._device.wgpu.create_command_encoder()
            for program in self._programs_of(adapter, self._step):
                program.encode(encoder)
            self._prepared[adapter] = encoder.finish()

    def _submit_step(self, adapter: str | None) -> None:
        """Submits one token's commands."""
        self._prepare_step(adapter)
        self._device.queue.submit([self._prepared.pop(adapter)])

    def _programs_of(self, adapter: str | None, inputs: StepInputs) -> tuple[Program, Program]:
        """Layers and head for one adapter and size, recorded once."""
        rows = inputs.rows.maximum
        if (adapter, rows) not in self._programs:
            factors = {}
            if adapter is not None:
                loaded = self.adapters[adapter]
                factors = loaded.layout.factors(loaded.flat)
            layers, head = Program(self._device), Program(self._device)
            act = self._act[rows]
            with using_source(self._device, self._plans):
                record_step(layers, self._model, inputs, factors, act, self._cache)
                record_step_head(head, self._model, inputs, factors, act, self._head)
            self._programs[adapter, rows] = layers, head
        return self._programs[adapter, rows]


def memory_figures(allocated: Counter[str]) -> str:
    """Memory by purpose, as errors tell it."""
    parts = ", ".join(f"{name} {n / 2**20:,.0f}" for name, n in allocated.most_common())
    return f"{sum(allocated.values()) / 2**20:,.0f} MiB ({parts})"


def upload_adapter(device: Device, architecture: Architecture, path: Path) -> Adapter:
    """Puts an adapter on the device: a PEFT directory, or a GGUF adapter.

    Raises:
        InputError: it is no adapter, or not one for this model.
    """
    layout = open_adapter(path, architecture).layout(architecture)
    layout.check_bindings(device)
    flat = device.empty_flat(layout.size, purpose="adapter")
    device.write(flat, load_adapter(path, layout))
    return Adapter(layout, flat)


def open_generator(
    model: str,
    adapters: Mapping[str, Path] | None = None,
    *,
    tokenizer: str | None = None,
    max_length: int | None = None,
    device: str | Device = "auto",
) -> TextGenerator:
    """Opens a model and adapters for text, without anything that only training needs.

    Args:
        model: a GGUF file, or a name as in model.path.
        adapters: PEFT adapter directories or GGUF adapters by name.
        tokenizer: a tokenizer.json, or a directory that holds one; None for the GGUF's own.
        max_length: the room: tokens of prompt and answer together; None for what the model was
            trained for, DEFAULT_ROOM at most. More than it was trained for is refused.
        device: as in the config, or one that is open already.

    Raises:
        InputError: the model or an adapter can't be read, they do not fit together, max_length is
            beyond the model's context, or the device has no room.
    """
    gguf_file = GGUFFile(resolve_model(model))
    architecture = Architecture.from_gguf(gguf_file)
    if tokenizer is None:
        text_tokens = Tokenizer.from_gguf(gguf_file)
    else:
        text_tokens = Tokenizer.from_file(tokenizer, gguf_file=gguf_file)
    opened = Device(device) if isinstance(device, str) else device
    room = max_length or min(architecture.context_length, DEFAULT_ROOM)
    if room > architecture.context_length:
        raise InputError(
            f"max_length is {room}, but {model} was trained for texts of up to "
            f"{architecture.context_length} tokens and writes nonsense beyond them. Set "
            f"--max-length to {architecture.context_length} or less."
        )
    try:
        loaded = load_model(opened, gguf_file, architecture, room)
    except DeviceMemoryError as error:
        plan = PlanningDevice(opened)
        TextGenerator(plan, load_model(plan, gguf_file, architecture, room), text_tokens)
        raise InputError(
            f"{model} does not fit: {error}, and with room for texts of {room} tokens it takes "
            f"{memory_figures(plan.allocated)}. Take a smaller quantization, or lower --max-length."
        ) from error
    return TextGenerator(
        opened,
        loaded,
        text_tokens,
        {
            name: upload_adapter(opened, architecture, path)
            for name, path in (adapters or {}).items()
        },
        plans=find_tiles(opened, "auto"),
    )
