"""Greedy text, by running the whole forward again for every token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from forward.adapter import AdapterLayout
from forward.head import record_head_input, record_logits
from forward.inputs import Inputs
from forward.model import Model
from forward.tokenizer import Tokenizer
from lora.programs import Activations, last_states, record_forward_only
from shaders.device import Device
from shaders.errors import InputError
from shaders.program import Program
from shaders.tensor import Tensor


class Generator:
    """Continues texts with the most likely token, on the tensors of a session."""

    def __init__(
        self,
        device: Device,
        model: Model,
        inputs: Inputs,
        act: Activations,
        prefix: Program,
        layout: AdapterLayout,
        flat: Tensor,
        tokenizer: Tokenizer,
    ) -> None:
        self._device = device
        self._inputs = inputs
        self._tokenizer = tokenizer
        self._prefix = prefix
        self._programs = {}
        for adapted in (True, False):
            weights = flat if adapted else None
            program = record_forward_only(device, model, inputs, act, layout, weights)
            record_head_input(program, model, inputs, act.head, last_states(model, layout, act))
            factors = layout.factors(flat) if adapted else {}
            record_logits(program, model, inputs, factors, act.head, 0)
            self._programs[adapted] = program
        self._row = replace(act.head.logits, shape=(1, model.architecture.logits_size))
        self._vocab_size = model.architecture.vocab_size

    def next_logits(self, ids: list[int], *, adapted: bool) -> np.ndarray:
        """Logits f32 [vocab_size] of the token after `ids`."""
        n = len(ids)
        targets = np.full(n, -1)
        targets[-1] = 0  # any label: it only marks the row whose logits are wanted
        self._inputs.write(
            self._device, np.array(ids), np.arange(n), np.zeros(n, int), np.full(n, n), targets
        )
        self._prefix.run()
        self._programs[adapted].run()
        return self._device.read(self._row)[0, : self._vocab_size]

    def stream(
        self, prompt: str | list[int], *, max_tokens: int, adapted: bool, add_bos: bool | None
    ) -> Iterator[str]:
        """Pieces of text until an end-of-turn token, max_tokens, or the end of the room.

        Args:
            prompt: a text, or token ids.
            add_bos: for a text, whether BOS comes before it; None: as the model wants it.
        """
        if isinstance(prompt, str):
            ids = self._tokenizer.encode(prompt, add_bos=add_bos).ids
        else:
            ids = list(prompt)
        room = self._inputs.rows.maximum
        if not ids or len(ids) >= room:
            raise InputError(
                f"The prompt has {len(ids)} tokens; from 1 to {room - 1} fit here "
                "(data.max_length, or --max-length, sets the room)."
            )
        start = len(ids)
        shown = ""
        while len(ids) < room and len(ids) - start < max_tokens:
            token = int(np.argmax(self.next_logits(ids, adapted=adapted)))
            if token in self._tokenizer.end_of_turn_ids:
                break
            ids.append(token)
            text = self._tokenizer.decode(ids[start:])
            # A character spread over several tokens is shown when its last one has come.
            if not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text
