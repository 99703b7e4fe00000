"""TrainingSession: a frozen model, its adapter, and the steps that train it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from lora.data.batches import Batch
from lora.forward.plans.matmul_plans import ProductShape
from lora.forward.plans.matmul_tiles import Plan
from lora.optim.adamw import step_words
from lora.optim.guard import GuardState
from lora.shaders.device import Device
from lora.shaders.errors import DeviceMemoryError, GPUError, LoraError
from lora.shaders.program import Program
from lora.shaders.program_data import kernels_digest
from lora.shaders.readback import ReadbackRing
from lora.training.course import train
from lora.training.device_state import SessionPrograms, replanned
from lora.training.endings import Culprit, NotFiniteError, StepWatch, device_ended
from lora.training.exchange import GradientExchange, Sums, stretches
from lora.training.fingerprints import Course, fingerprints
from lora.training.kept_state import KeptState
from lora.training.learning_rate import LearningRate
from lora.training.listeners import Listener
from lora.training.metrics import EvalResult, Metrics, MetricsAtArrival, StepClock
from lora.training.non_finite import find_in_step
from lora.training.open_session import OpenSession
from lora.training.programs import TrainingPrograms, loss_weight_words
from lora.training.submissions import MeasuredSpeed

IN_FLIGHT = 3  # steps that the host may be ahead of the device
# Steps that can be taken back: those that were skipped in a row, and those under way behind them.
_REMEMBERED = GuardState.MOST_IN_A_ROW + IN_FLIGHT + 1


@dataclass(frozen=True)
class _StepBegun:
    """What a step that may be taken back began with."""

    steps_done: int  # before it
    stream: dict[str, Any]  # where the data stood
    batches: Sequence[Batch]


class TrainingSession(LearningRate, KeptState, OpenSession):
    """Holds frozen quantized base weights and f32 A/B adapters on a device, and trains them.

    `session.step(batches)` runs forward, backward, clipping and AdamW on the device and returns
    without waiting for it. A context manager: `close` gives its memory back.

    Args:
        config: checked settings.
        train: False leaves out what only training needs (for evaluation and generation).
        examples: in place of data.train: rows, such as {"messages": …}, or tokens (`Example`s).
            Rows without a length, as a generator's, are streamed, which needs train.steps.
        device: one that is open already, and stays open; several sessions can share it. By default
            the config's is opened, and closed with the session.
        loss: what each trained token counts in the gradient; None for the mean cross-entropy.
        communicator: of the processes that train this adapter, each with batches of its own; None
            for one process. All open one, and call the same methods in the same order.
        started: when the run began, which chat templates may write; None for now. A resumed run's
            is that of its first start (`lora.training.checkpoint.started_at`).
        processes: that the run was begun with, whose micro-batches make a step; None for as many
            as there are (`lora.training.checkpoint.processes_of_then`).

    Attributes:
        started: the same.
        workload: the model's file, the adapter's layout and the data.
        memory: that the session owns.
        plan: what the session takes.
        evaluations: what `train` has evaluated so far: after which step, and the result.
        plans: what the products of training are recorded with; none on adapters without tiles.

    Raises:
        InputError: the model, the data, an adapter or the device are not what the config needs.
    """

    _exchange: GradientExchange | None = None  # where there are several processes

    def close(self) -> None:
        """Gives the memory back, and the device where the session opened it."""
        if self._exchange is not None:
            self._exchange.close()
        super().close()

    def _new_device(self, webgpu: str) -> Device:
        return Device(self._wanted, webgpu=webgpu)

    def _open(self) -> None:
        """As without training, and where the steps begin."""
        super()._open()
        self._fingerprints: dict[str, Any] | None = None
        self._exchange = None
        self.steps_done = 0
        self._own_rate = None
        self.evaluations: list[tuple[int, EvalResult]] = []
        self._digest: str | None = None
        self._begun: deque[_StepBegun] = deque(maxlen=_REMEMBERED)
        self.stream = self.workload.stream() if self.workload.trains else None
        if self.stream is not None:
            self.total_steps = self.stream.total_steps
            self.warmup_steps = self.config.train.resolve_warmup(self.total_steps)
            self._ring = ReadbackRing(self.memory, self._act.metrics.n_bytes, slots=IN_FLIGHT)
            self._watch = StepWatch(self.precision)
            self._speed = MeasuredSpeed(
                self._recording, self._act.loss_sum, self.config.train.max_submission_seconds
            )
            if self.communicator.size > 1:
                sums = Sums(self.adapter.gradients[0], self._act.loss_sum, stretches(self.layout))
                self._exchange = GradientExchange(
                    self.memory, sums, self.communicator, self.config.train.comm_dtype
                )

    def fingerprints(self) -> dict[str, Any]:
        """Of all that decides this run's numbers; see `lora.training.fingerprints`."""
        if self._fingerprints is None:
            loss = type(self._seams.loss).__qualname__
            processes, steps = self.communicator.size, self.total_steps
            course = Course(loss, processes, steps, self.warmup_steps, self.precision)
            self._fingerprints = fingerprints(self.workload, course)
        return self._fingerprints

    def use_plans(self, plans: Mapping[ProductShape, Plan]) -> None:
        """Records the programs again, with these plans of products; others keep theirs.

        So a run goes on with the order of sums that it began with (lora/training/resuming.py).
        """
        if self.stream is None:
            raise LoraError("This session was opened without training.")
        if all(self.plans.get(product) == plan for product, plan in plans.items()):
            return
        self.plans |= plans
        self._recording = replanned(self._recording, self.plans, self._found)
        # Their memory goes first: there may be no room for both.
        self._programs.memory.close()
        self._close_users()
        self._digest = None
        self._programs = SessionPrograms.record(
            self._recording, self.workload, self._tensors, self._seams
        )

    def reopen(self) -> None:
        """Opens the device anew after it was lost: the session is as it was before its first step.

        What products are recorded with stays, so that the same numbers follow.
        """
        setting, plans = self.device.found.implementation.setting, self.plans
        self.close()
        self._open_on(self._new_device(setting), owned=True)
        self.memory.write(self.adapter.parameters, self._initial)
        if self.stream is not None:
            self.use_plans(plans)

    def _training(self) -> TrainingPrograms:
        if self._programs.training is None:
            raise LoraError("This session was opened without training.")
        return self._programs.training

    # -- training -------------------------------------------------------------------------------

    def step(self, batches: Sequence[Batch]) -> None:
        """One optimizer step over some micro-batches; returns without waiting for the device.

        Its metrics come out of `train`, or of `finished_steps`, some steps later. One that is not
        finite changes nothing (`Metrics.skipped`), and after three of them in a row no step does:
        `train` and `steps` end with an error then; who calls `step` looks at what has finished.
        """
        programs, train = self._training(), self.config.train
        for batch in batches:
            self.workload.check(batch, self.inputs.rows.maximum)
        assert self.stream is not None  # as there are programs
        rate = self.learning_rate
        step = self.steps_done + 1
        counts = (sum(b.n_trained for b in batches), sum(b.rows for b in batches), self.stop_signal)
        everyone = self.communicator.gather(counts)
        n_trained, n_tokens = (sum(theirs[i] for theirs in everyone) for i in (0, 1))
        self.stop_asked = max(theirs[2] for theirs in everyone)
        self.memory.write(programs.loss_weight, loss_weight_words(n_trained, programs.loss_scale))
        words = step_words(rate, step, (train.betas[0], train.betas[1]))
        self.memory.write(programs.step_words, words)
        begun, ranks = time.perf_counter(), None
        programs.begin.run()
        for batch in batches:
            self._enter(batch, self._cache, self.steps_done)
            if batch is batches[-1] and self._exchange is not None and not self._speed.wanted:
                ranks = self._exchange.run(programs.pieces, begun, backward=True)
            else:
                self._run_micro_batch(programs, batch)
        if self._exchange is not None and ranks is None:
            ranks = self._exchange.run(programs.pieces, begun, backward=False)
        programs.finish.run()
        self.steps_done = step
        self._ring.push(
            self._act.metrics,
            MetricsAtArrival(
                step=step,
                epoch=self.stream.epoch,
                learning_rate=rate,
                tokens=n_tokens,
                trained_tokens=n_trained,
                ranks=ranks,
            ),
        )

    def _run_micro_batch(self, programs: TrainingPrograms, batch: Batch) -> None:
        self._speed.run(programs.micro_batch, batch.rows / self.workload.maximum_rows)

    def kernels_digest(self) -> str:
        """Of all kernels that a step runs; see `shaders.program_data`."""
        if self._digest is None:
            programs = self._training()
            self._digest = kernels_digest((self._programs.prefix, *programs.all))
        return self._digest

    def finished_steps(self, *, wait: bool = False) -> list[Metrics]:
        """Metrics of the steps that have ended since the last call; with `wait`, of all."""
        finished: list[Metrics] = self._ring.ready(wait=wait)
        return finished

    def train(self, listeners: Sequence[Listener] = ()) -> Iterator[Metrics]:
        """Runs the steps that are left, one item a step, in order, and what is due between them.

        As the config says it is evaluated (`evaluations` has the results), prompts are answered,
        the run stops early, and one process saves checkpoints to `output`; all other files are
        `run_training`'s. With train.load_best_model_at_end the session holds the best adapter
        afterwards. Any thread may do this.

        Seconds and rates are measured between the arrivals of results, without what the caller
        does meanwhile. Where the loss or the gradient of a step is not finite the adapter stays as
        it was (`Metrics.skipped`).

        Args:
            listeners: who hear of steps, evaluations, samples, checkpoints, and may end the run.

        Raises:
            NotFiniteError: three times in a row, or in all steps, no loss or gradient was finite.
                The session stands behind the last step that counted.
            DeviceLostError: the device was lost, or its memory ran out.
            InputError: the config's `output` can't be had, for a checkpoint.

        Example:
            >>> with TrainingSession.from_config("lora.yaml", ["train.eval_every=50"]) as session:
            ...     for metrics in session.train():
            ...         print(metrics.step, metrics.loss)
            ...     print(session.evaluations[-1])
        """
        if self.stream is None:
            raise LoraError("This session was opened without training.")
        return train(self, listeners)

    def steps(self, pause: Callable[[], bool] = lambda: False) -> Iterator[Metrics | None]:
        """The steps that are left and nothing else, with pauses: None where `pause()` holds.

        For a loop of one's own, which decides itself when to evaluate or save.

        All results so far are handed out before a pause, so that what is done in it (a
        checkpoint, an evaluation) sees the device at rest; its time counts for no step.

        Example:
            >>> for metrics in session.steps(pause=lambda: session.steps_done % 50 == 0):
            ...     if metrics is None:
            ...         print(session.evaluate().loss)
        """
        if self.stream is None:
            raise LoraError("This session was opened without training.")
        clock = StepClock()
        while (begun := self._begin()) is not None:
            self.orders.give("step")
            try:
                with self._device_held():
                    self.step(begun.batches)
            except BaseException:
                if self.steps_done == begun.steps_done:  # nothing came of it
                    self.stream.restore(begun.stream)
                raise
            paused = pause()
            yield from self._arrived(clock, wait=paused)
            if paused:
                yield None
                clock = StepClock()
        yield from self._arrived(clock, wait=True)
        self._watch.end()

    def take_step(self) -> None:
        """Runs the next step as it comes; its metrics are dropped. For ranks that follow."""
        begun = self._begin()
        assert begun is not None  # rank 0's stream had one
        with self._device_held():
            self.step(begun.batches)
            self.finished_steps()

    def begin_feedback_anew(self) -> None:
        """Drops what f16's rounding of gradients left: who resumes a checkpoint has none of it."""
        if self._exchange is not None:
            self._exchange.forget()

    def _begin(self) -> _StepBegun | None:
        """What the next step begins with, which can be taken back for a while; None at the end."""
        assert self.stream is not None
        stands = self.stream.state()
        batches = next(self.stream, None)
        if batches is None:
            return None
        self._begun.append(_StepBegun(self.steps_done, stands, batches))
        return self._begun[-1]

    def _arrived(self, clock: StepClock, *, wait: bool) -> Iterator[Metrics]:
        with self._device_held():
            finished = self.finished_steps(wait=wait)
        for metrics in clock.timed(finished):
            handed_out = time.perf_counter()
            yield metrics
            clock.left(time.perf_counter() - handed_out)
            if self._watch.halts(metrics):
                self.finished_steps(wait=True)  # of steps that changed nothing any more
                raise self._not_finite(metrics)

    def _not_finite(self, last: Metrics) -> NotFiniteError:
        """Takes back the skipped steps, and looks for what was not finite in the first."""
        first = last.step - GuardState.MOST_IN_A_ROW + 1
        self.orders.give("find", first)
        culprit = self.find_not_finite(first)
        self._take_back(self._beginning_of(first))
        return NotFiniteError(first, last, self.precision, culprit)

    def find_not_finite(self, step: int) -> Culprit | None:
        """Runs one of the last steps again, and says what went non-finite first.

        Of several processes, which all call this, in the first that finds something.

        Args:
            step: counted from 1; it changed nothing, nor did those after it.
        """
        batches = self._beginning_of(step).batches
        own = find_in_step(
            self._programs.prefix,
            self._training(),
            batches,
            lambda batch: self.write_inputs(batch, step - 1),
        )
        everyone = self.communicator.gather(own)
        return next((culprit for culprit in everyone if culprit is not None), None)

    def _beginning_of(self, step: int) -> _StepBegun:
        return next(begun for begun in self._begun if begun.steps_done == step - 1)

    def _take_back(self, begun: _StepBegun) -> None:
        """Puts the session where a step began that changed nothing, and none behind it."""
        assert self.stream is not None
        self.stream.restore(begun.stream)
        self.steps_done = begun.steps_done
        self.set_guard(replace(self.guard(), in_a_row=0))
        self._begun.clear()

    @contextmanager
    def _device_held(self) -> Iterator[None]:
        """What the device can't do any more becomes an error that says what to change."""
        try:
            yield
        except (GPUError, DeviceMemoryError) as error:
            alone = self.communicator.size == 1
            name = self.device.facts.name
            raise device_ended(error, self.steps_done, name, alone=alone) from error

    def step_programs(self) -> tuple[Program, ...]:
        """What runs on the device in a step: what begins it, the frozen prefix, a micro-batch, the
        optimizer."""
        return self._programs.step
