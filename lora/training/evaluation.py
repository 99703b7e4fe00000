"""Evaluation: one forward pass over examples, and what their losses and hits come to."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice

import numpy as np

from lora.data.batches import Batch, full_batches
from lora.data.examples import Example
from lora.shaders.errors import InputError
from lora.shaders.memory import Arena
from lora.shaders.program import Program
from lora.shaders.readback import ReadbackRing
from lora.shaders.recording import Recording
from lora.training.communicator import Communicator
from lora.training.device_state import open_cache
from lora.training.metrics import EvalResult
from lora.training.prefix_cache import PrefixCache
from lora.training.programs import StepTensors, record_eval
from lora.training.workload import Workload

_SLOTS = 6  # results under way: the losses and hits of three batches


Progress = Callable[[int, int], None]  # told of the examples done, and of all


@dataclass(frozen=True)
class _Counted:
    """What a batch comes to."""

    loss_sum: float
    n_tokens: int
    n_correct: int
    all_correct: list[bool]  # of each example


class Tally:
    """Adds up batches in their order.

    Args:
        examples: all that are evaluated, in the order of the batches.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self._cut = [example.cut for example in examples]
        self._counted: list[_Counted] = []

    @classmethod
    def of_all(cls, parts: Sequence[Tally]) -> Tally:
        """Several as one, in their order."""
        whole = cls([])
        for part in parts:
            whole._cut += part._cut
            whole._counted += part._counted
        return whole

    @property
    def n_done(self) -> int:
        """Examples counted so far."""
        return sum(len(counted.all_correct) for counted in self._counted)

    def add(self, batch: Batch, losses: np.ndarray, correct: np.ndarray) -> None:
        """Counts a batch.

        Args:
            losses: f32 [at least batch.n_trained], of its targets in order.
            correct: the same; 1 where the target is the argmax.
        """
        n = batch.n_trained
        hits = correct[:n] == 1.0
        owner = batch.segment_start[batch.targets >= 0]
        self._counted.append(
            _Counted(
                float(losses[:n].astype(np.float64).sum()),
                n,
                int(hits.sum()),
                [bool(hits[owner == start].all()) for start in batch.example_starts],
            )
        )

    def share(self, communicator: Communicator) -> None:
        """Takes the batches of all processes, each of which has added every so many.

        They come in the order in which one process has them: so does their sum, to the last bit.
        """
        everyone = communicator.gather(self._counted)
        n = sum(map(len, everyone))
        size = communicator.size
        self._counted = [everyone[place % size][place // size] for place in range(n)]

    def result(self) -> EvalResult:
        """Of all batches."""
        cut = self._cut
        all_correct = [right for counted in self._counted for right in counted.all_correct]
        n_exact = sum(right and not is_cut for right, is_cut in zip(all_correct, cut, strict=True))
        n_tokens = sum(counted.n_tokens for counted in self._counted)
        n_correct = sum(counted.n_correct for counted in self._counted)
        loss = sum(counted.loss_sum for counted in self._counted) / max(1, n_tokens)
        return EvalResult(
            loss=loss,
            perplexity=math.exp(min(loss, 700.0)),
            token_accuracy=n_correct / max(1, n_tokens),
            exact_match=n_exact / len(cut),
            n_exact=n_exact,
            n_examples=len(cut),
            n_tokens=n_tokens,
            n_cut=sum(cut),
        )


def _behind(progress: Progress, before: int, total: int, done: int) -> None:
    """Tells of one set, behind those before it."""
    progress(before + done, total)


class Evaluator:
    """Evaluates a session's model, with and without its adapter.

    Args:
        recording: of the session, whose memory is an arena.
        enter: (batch, cache, adapted=…) puts a micro-batch on the device up to the lowest adapted
            layer.
        communicator: of the processes that evaluate together, each every so many micro-batches.
    """

    def __init__(
        self,
        recording: Recording,
        workload: Workload,
        tensors: StepTensors,
        enter: Callable[..., None],
        communicator: Communicator,
    ) -> None:
        # Of its own: dropped with it when programs are recorded again.
        self._memory = recording.memory.inner()
        self._recording = replace(recording, memory=self._memory)
        self._workload = workload
        self._tensors = tensors
        self._enter = enter
        self._communicator = communicator
        self._programs: dict[bool, Program] = {}  # by whether it is adapted

    @cached_property
    def _ring(self) -> ReadbackRing:
        assert isinstance(self._memory, Arena)  # what only counts evaluates nothing
        return ReadbackRing(self._memory, self._tensors.activations.head.losses.n_bytes, _SLOTS)

    @cached_property
    def _cache(self) -> PrefixCache | None:
        """Of data.eval."""
        return open_cache(self._recording, self._workload, self._workload.eval_examples)

    def _program(self, adapted: bool) -> Program:
        if adapted not in self._programs:
            t = self._tensors
            adapter = t.adapter if adapted else None
            self._programs[adapted] = record_eval(
                self._recording, t.model, t.inputs, t.activations, t.layout, adapter
            )
        return self._programs[adapted]

    def close(self) -> None:
        """Gives back its memory."""
        self._memory.close()

    def evaluate(
        self,
        examples: Sequence[Example] | None,
        *,
        adapted: bool,
        progress: Progress = lambda done, total: None,
    ) -> EvalResult:
        """See `TrainingSession.evaluate`."""
        started = time.perf_counter()
        cache = None
        sets: Mapping[str, range] = {}
        if examples is None:
            examples, sets = self._workload.eval_examples, self._workload.eval_sets
            if not examples:
                raise InputError("data.eval is null: there is nothing to evaluate on.")
            cache = self._cache
        if adapted and self._tensors.adapter.dora is not None:
            self._tensors.adapter.dora.update.run()
        program, total = self._program(adapted), len(examples)
        enter = partial(self._enter, cache=cache, adapted=adapted)
        if not sets:
            tally = self._tallied(examples, program, enter, lambda done: progress(done, total))
            return replace(tally.result(), seconds=time.perf_counter() - started)
        tallies: dict[str, Tally] = {}
        for name, part in sets.items():
            before = part.start  # the sets lie one behind the other
            tallies[name] = self._tallied(
                examples[part.start : part.stop],
                program,
                enter,
                partial(_behind, progress, before, total),
            )
        return replace(
            Tally.of_all(list(tallies.values())).result(),
            seconds=time.perf_counter() - started,
            sets={name: tally.result() for name, tally in tallies.items()},
        )

    def _tallied(
        self,
        examples: Sequence[Example],
        program: Program,
        enter: Callable[[Batch], None],
        progress: Callable[[int], None],
    ) -> Tally:
        """Runs examples in their order. The host prepares a batch while the device computes."""
        workload, head = self._workload, self._tensors.activations.head
        ring, tally = self._ring, Tally(examples)
        ring.ready(wait=True)  # what an evaluation that was interrupted left behind
        sent: list[Batch] = []
        arrived: list[np.ndarray] = []

        def count(*, wait: bool) -> None:
            arrived.extend(ring.ready(wait=wait))
            before = tally.n_done
            while len(arrived) > 1:
                tally.add(sent.pop(0), arrived.pop(0), arrived.pop(0))
            if tally.n_done > before:  # the other processes are about as far
                progress(min(len(examples), tally.n_done * self._communicator.size))

        most_rows = self._tensors.inputs.rows.maximum
        ours = self._communicator.rank, None, self._communicator.size
        batches = full_batches(examples, most_rows, workload.maximum_targets)
        for batch in islice(batches, *ours):
            workload.check(batch, most_rows)
            enter(batch)
            program.run()
            for tensor in (head.losses, head.correct):
                ring.push(tensor, lambda values: values)
            sent.append(batch)
            count(wait=False)
        count(wait=True)
        tally.share(self._communicator)
        return tally
