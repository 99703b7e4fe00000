"""The judge of generation: the whole forward pass of training, run again for every token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lora.forward.decoder.head import record_head_input, record_logits
from lora.shaders.program import Program
from lora.training.adapter_state import factors_of
from lora.training.programs import last_states, record_forward_only
from lora.training.session import TrainingSession


class FullRerun:
    """Logits of the next token by the programs that training and evaluation are made of."""

    def __init__(self, session: TrainingSession) -> None:
        self._session = session
        self._programs: dict[bool, Program] = {}
        logits_size = session.model.architecture.logits_size
        self._row = replace(session._act.head.logits, shape=(1, logits_size))

    def next_logits(self, ids: list[int], *, adapted: bool) -> np.ndarray:
        """Logits f32 [vocab_size] of the token after `ids`."""
        session, n = self._session, len(ids)
        targets = np.full(n, -1)
        targets[-1] = 0  # any label: it only marks the row whose logits are wanted
        session.inputs.write(
            session.device.memory,
            np.array(ids),
            np.arange(n),
            np.zeros(n, int),
            np.full(n, n),
            targets,
        )
        if adapted not in self._programs:
            self._programs[adapted] = self._record(adapted)
        programs = session._programs
        (programs.prefix if adapted else programs.bare_prefix).run()
        self._programs[adapted].run()
        vocab_size = session.model.architecture.vocab_size
        return session.device.memory.read(self._row)[0, :vocab_size]

    def _record(self, adapted: bool) -> Program:
        s = self._session
        adapter = s.adapter if adapted else None
        program = record_forward_only(s._recording, s.model, s.inputs, s._act, s.layout, adapter)
        record_head_input(
            program, s.model, s.inputs, s._act.head, last_states(s.model, s.layout, s._act)
        )
        factors = factors_of(s.layout, adapter)
        record_logits(program, s.model, s.inputs, factors, s._act.head, 0)
        return program
