"""What text needs on the device: keys and values, programs for pieces and for one token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from lora.forward.attention_prompt import FEWEST_ROWS, attends_on_units
from lora.forward.decoder.decode_step import Step, allocate_caches, record_step, record_step_head
from lora.forward.decoder.step_inputs import StepInputs
from lora.forward.decoder.step_tensors import StepActivations, StepHead
from lora.forward.dora import Dora
from lora.forward.model.adapter import AdapterLayout
from lora.forward.model.factors import Factors
from lora.forward.model.frozen_model import Model
from lora.forward.model.kv_cache import TextState
from lora.forward.model.trained_tokens import TokenIndex
from lora.generation.snapshots import allocate_snapshots, record_copies, states_of
from lora.shaders.errors import DeviceMemoryError, InputError
from lora.shaders.memory import Arena, CountingMemory
from lora.shaders.program import Program, encode
from lora.shaders.readback import ReadbackRing
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor
from lora.shaders.webgpu import Commands

# Tokens of a prompt that are computed at once; their activations are what they cost.
_PIECE_ROWS = 512
_CPU_PIECE_ROWS = 64
_MATRIX_PIECE_ROWS = 2048
# Greedy tokens that a GPU is given to compute before the host has heard of the last one.
STEPS_AHEAD = 2


@dataclass(frozen=True)
class Adapter:
    """An adapter on the device."""

    layout: AdapterLayout
    flat: Tensor  # [layout.size]
    dora: Dora | None = None  # measured, and up to date
    tokens: TokenIndex | None = None  # of the layout's, where it has some

    @property
    def factors(self) -> Factors:
        """As programs take them."""
        if self.dora is not None:
            return self.dora.factors
        return self.layout.factors(self.flat, self.tokens)


def piece_rows(recording: Recording) -> int:
    """Tokens of a prompt that are computed at once."""
    if recording.facts.is_cpu:
        return _CPU_PIECE_ROWS
    return _MATRIX_PIECE_ROWS if recording.half_products else _PIECE_ROWS


@dataclass(frozen=True)
class TextTensors:
    """What text needs on the device besides the model and the adapters."""

    caches: tuple[Any, ...]  # of the layers
    pieces: StepInputs
    step: StepInputs
    head: StepHead
    activations: dict[int, StepActivations]  # by the most rows of the inputs
    snapshots: tuple[tuple[TextState, ...], ...] = ()  # copies of the states among the caches

    @classmethod
    def allocate(cls, recording: Recording, model: Model, room: int) -> TextTensors:
        """For texts of up to `room` tokens.

        Raises:
            DeviceMemoryError: there is no memory for it.
        """
        piece = min(room, piece_rows(recording))
        caches = allocate_caches(recording, model, room)
        table, bounds = model.host_table, model.bounds
        pieces = StepInputs.allocate(recording, piece, bounds, room, table=table)
        head = StepHead.allocate(recording, model)
        step = StepInputs.allocate(recording, 1, bounds, room, head.token, table)
        activations = {
            inputs.rows.maximum: StepActivations.allocate(recording, model, inputs.rows)
            for inputs in (pieces, step)
        }
        snapshots = allocate_snapshots(recording, caches)
        return cls(caches, pieces, step, head, activations, snapshots)


class DecodeEngine:
    """Runs a model on tokens, bare or under one of several adapters: a context manager.

    What stands in the cache of keys and values is the caller's to know.

    Args:
        recording: where the model is, and the plans and `products` of a prompt's; in f32.
        model: its rope tables set the room: the tokens of prompt and answer together.
        adapters: by name.

    Attributes:
        room: tokens.

    Raises:
        InputError: the device has no memory for the keys and values.
    """

    def __init__(self, recording: Recording, model: Model, adapters: Mapping[str, Adapter]) -> None:
        self.adapters = dict(adapters)
        self._model = model
        long = model.long_examples
        self.room = model.n_positions if long is None else long.first_position
        taken = Counter(recording.memory.allocated)
        self._memory = recording.memory.inner()
        self._recording = replace(recording, memory=self._memory)
        try:
            self._tensors = TextTensors.allocate(self._recording, model, self.room)
        except DeviceMemoryError as error:
            self._memory.close()
            counted = CountingMemory(recording.facts)
            TextTensors.allocate(replace(recording, memory=counted), model, self.room)
            raise InputError(
                f"Text of up to {self.room} tokens does not fit: {error}, and it takes "
                f"{memory_figures(taken + counted.allocated)}. Lower the room (--max-length, or "
                "data.max_length)."
            ) from error
        self.is_cpu = recording.facts.is_cpu
        # Steps ahead of the host gain nothing on a CPU; it must know tokens to send their rows; and
        # states can't be taken back by a token.
        self.recurrent = bool(self._tensors.snapshots)
        self.waits = self.is_cpu or model.host_table is not None or self.recurrent
        self.piece_rows = self._tensors.pieces.rows.maximum
        self._programs: dict[tuple[str | None, int, bool, bool], tuple[Program, Program]] = {}
        self._prepared: dict[str | None, Commands] = {}  # by adapter
        self._copies: dict[tuple[int, bool], Program] = {}

    def run_piece(
        self,
        tokens: Sequence[int],
        first_position: int,
        first_rope_row: int,
        adapter: str | None,
        *,
        with_head: bool,
    ) -> None:
        """Puts some tokens' keys and values into the cache.

        Args:
            tokens: one to `piece_rows`.
            first_position: of the first of them, in the cache.
            first_rope_row: its row in rope's tables.
            adapter: one of `adapters`; None for the bare model.
            with_head: whether the logits after the last of them are wanted; one token has them.
        """
        pieces = self._tensors.pieces
        pieces.write(self._memory, tokens, first_position, first_rope_row)
        # CPU devices compile the kernel that walks the cache a row at a time more quickly.
        opening = first_position == 0 and not self._recording.facts.is_cpu
        few = attends_on_units(self._recording) and len(tokens) < FEWEST_ROWS
        layers, head = self._programs_of(adapter, pieces, opening=opening, few=few)
        layers.run()
        if with_head:
            head.run()

    def run_token(
        self, token: int | None, position: int, rope_row: int, adapter: str | None
    ) -> None:
        """Puts one token's keys and values into the cache, and its logits into the head.

        Args:
            token: None for the one that the head has just chosen, which is on the device already.
            position, rope_row, adapter: as in `run_piece`.
        """
        tokens = None if token is None else [token]
        self._tensors.step.write(self._memory, tokens, position, rope_row)
        self.prepare_token(adapter)
        self._memory.handle.submit(self._prepared.pop(adapter))

    def prepare_token(self, adapter: str | None) -> None:
        """Encodes the next token's commands, which do not depend on it, while the device works."""
        if adapter not in self._prepared:
            self._prepared[adapter] = encode(self._programs_of(adapter, self._tensors.step))

    def logits(self) -> np.ndarray:
        """Logits f32 [vocab_size] of the token after the last one; waits for them."""
        values = self._memory.read(self._tensors.head.logits)
        return values[0, : self._model.architecture.vocab_size]

    @cached_property
    def ring(self) -> ReadbackRing:
        """Most likely tokens on their way to the host."""
        assert isinstance(self._memory, Arena)  # what only counts runs nothing
        return ReadbackRing(self._memory, self._tensors.head.token.n_bytes, STEPS_AHEAD + 1)

    def push_token(self) -> None:
        """Asks for the most likely token that the work submitted so far leaves."""
        self.ring.push(self._tensors.head.token, lambda values: int(values.view(np.uint32)[0]))

    def keep_state(self, slot: int) -> None:
        """Copies the states of a recurrent model into a slot of the snapshots."""
        self._copy(slot, back=False)

    def restore_state(self, slot: int) -> None:
        """Copies the states of a slot back."""
        self._copy(slot, back=True)

    def _copy(self, slot: int, *, back: bool) -> None:
        if (slot, back) not in self._copies:
            pair = states_of(self._tensors.caches), list(self._tensors.snapshots[slot])
            source, destination = reversed(pair) if back else pair
            self._copies[slot, back] = record_copies(self._recording, source, destination)
        self._copies[slot, back].run()

    def _programs_of(
        self,
        adapter: str | None,
        inputs: StepInputs,
        *,
        opening: bool = False,
        few: bool = False,
    ) -> tuple[Program, Program]:
        """Layers and head for one adapter, size and way of attention, recorded once."""
        rows = inputs.rows.maximum
        if (adapter, rows, opening, few) not in self._programs:
            factors = Factors() if adapter is None else self.adapters[adapter].factors
            layers, head = Program(self._recording), Program(self._recording)
            tensors = self._tensors
            act = tensors.activations[rows]
            step = Step(self._model, inputs, factors, act, tensors.caches, opening, few)
            record_step(layers, step)
            record_step_head(head, step, tensors.head)
            self._programs[adapter, rows, opening, few] = layers, head
        return self._programs[adapter, rows, opening, few]

    def close(self) -> None:
        """Gives back all but the model and the adapters."""
        self._memory.close()


def memory_figures(allocated: Counter[str]) -> str:
    """Memory by purpose, as errors tell it."""
    parts = ", ".join(f"{name} {n / 2**20:,.0f}" for name, n in allocated.most_common())
    return f"{sum(allocated.values()) / 2**20:,.0f} MiB ({parts})"
