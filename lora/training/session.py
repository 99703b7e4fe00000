"""TrainingSession: a frozen model, its adapter, and the steps that train it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora.adapters.files import load_adapter
from lora.adapters.peft_files import save_peft_adapter
from lora.backward.losses import Loss, SupervisedLoss
from lora.checks.matrix_units import trust_matrix_units
from lora.data.batches import Batch
from lora.data.given import are_tokens
from lora.data.rows import chat_template
from lora.forward.plans.matmul_plans import PlanSource, ProductShape
from lora.forward.plans.matmul_tiles import Plan
from lora.generation.engine import Adapter, memory_figures
from lora.generation.generator import TextGenerator
from lora.generation.prompts import Prompt, is_tokens
from lora.generation.sampling import GREEDY, Sampling
from lora.optim.adamw import step_words
from lora.optim.schedule import learning_rate
from lora.shaders.device import Device
from lora.shaders.errors import DeviceMemoryError, InputError, LoraError
from lora.shaders.program import Program
from lora.shaders.program_data import kernels_digest
from lora.shaders.readback import ReadbackRing
from lora.shaders.recording import Recording
from lora.storage.tile_cache import find_tiles
from lora.training.communicator import Communicator, SingleProcess
from lora.training.device_state import (
    Seams,
    SessionPlan,
    SessionPrograms,
    SessionTensors,
    replanned,
)
from lora.training.evaluation import Evaluator
from lora.training.metrics import EvalResult, Metrics, MetricsAtArrival, StepClock, check_finite
from lora.training.prefix_cache import PrefixCache
from lora.training.programs import TrainingPrograms, loss_weight_words
from lora.training.workload import Workload

if TYPE_CHECKING:
    from lora.config.schema import Config

IN_FLIGHT = 3  # steps that the host may be ahead of the device


class TrainingSession:
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
            for one process.
        started: when the run began, which chat templates may write; None for now. A resumed run's
            is that of its first start (`lora.training.checkpoint.started_at`).

    Attributes:
        started: the same.
        workload: the model's file, the adapter's layout and the data.
        memory: that the session owns.
        plan: what the session takes.
        plans: what the products of training are recorded with; none on adapters without tiles.

    Raises:
        InputError: the model, the data, an adapter or the device are not what the config needs.
    """

    def __init__(
        self,
        config: Config,
        *,
        train: bool = True,
        examples: Iterable[Any] | None = None,
        device: Device | None = None,
        loss: Loss | None = None,
        communicator: Communicator | None = None,
        started: datetime | None = None,
    ) -> None:
        self.config = config
        self.started = datetime.now() if started is None else started
        self.communicator = SingleProcess() if communicator is None else communicator
        self._seams = Seams(SupervisedLoss() if loss is None else loss, self.communicator)
        self.workload = Workload.open(config, train=train, examples=examples, now=self.started)
        self.tokenizer, self.layout = self.workload.tokenizer, self.workload.layout
        self.device = Device(config.device, webgpu=config.webgpu) if device is None else device
        self._owns_device = device is None
        if config.train.precision == "f16":
            trust_matrix_units(self.device, config.device)
        self.memory = self.device.arena()
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        """Puts everything on the device and records the programs."""
        workload, train = self.workload, self.config.train
        # All is recorded once on memory that only counts: what it asks for is known beforehand.
        plan = SessionPlan.of(self.device.facts, workload, None, self._seams)
        requests = plan.requests if workload.trains else None
        self._found: PlanSource | None = find_tiles(self.device, train.tuning, requests)
        self.plans: dict[ProductShape, Plan] = plan.chosen(self._found)
        if self._found is not None:
            plan = SessionPlan.of(self.device.facts, workload, self._found, self._seams)
        self.plan = plan
        self._recording = self.device.recording(
            memory=self.memory, precision=train.precision, plans=self._found
        )
        try:
            if plan.largest_scratch:
                self.memory.scratch((plan.largest_scratch,))
            tensors = SessionTensors.allocate(self._recording, workload)
            self.device.compile_all(plan.kernels)
            self._programs = SessionPrograms.record(self._recording, workload, tensors, self._seams)
        except DeviceMemoryError as error:
            raise InputError(
                f"{self.config.model.path} does not fit: {error}, and this run takes "
                f"{memory_figures(plan.allocated)}. Lower train.batch_size or "
                "data.max_length, set train.recompute: on, or take a smaller quantization."
            ) from error
        self._tensors, self._cache, step = tensors, tensors.train_cache, tensors.step
        self.model, self.inputs, self.adapter = step.model, step.inputs, step.adapter
        self._act = step.activations
        self.recompute = tensors.recompute
        self.steps_done = 0
        self.stream = workload.stream() if workload.trains else None
        if self.stream is not None:
            self.total_steps = self.stream.total_steps
            self._warmup_steps = train.resolve_warmup(self.total_steps)
            self._ring = ReadbackRing(self.memory, self._act.metrics.n_bytes, slots=IN_FLIGHT)
        self._digest: str | None = None
        self._generator: TextGenerator | None = None
        self._evaluator: Evaluator | None = None

    @classmethod
    def from_config(
        cls, path: str | Path, overrides: Sequence[str] = (), **others: Any
    ) -> TrainingSession:
        """Opens the session of a YAML config; `overrides` are KEY=VALUE each, `others` as above."""
        from lora.config.schema import load_config  # pydantic: a quarter of the time of the import

        needs_data = others.get("examples") is None
        return cls(load_config(str(path), overrides, needs_data=needs_data), **others)

    def close(self) -> None:
        """Gives the memory back, and the device where the session opened it."""
        self.memory.close()
        if self._owns_device:
            self.device.close()

    def __enter__(self) -> TrainingSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def use_plans(self, plans: Mapping[ProductShape, Plan]) -> None:
        """Records the programs again, with these plans of products; others keep theirs.

        So a run goes on with the order of sums that it began with (lora/training/checkpoint.py).
        """
        if self.stream is None:
            raise LoraError("This session was opened without training.")
        if all(self.plans.get(product) == plan for product, plan in plans.items()):
            return
        self.plans |= plans
        self._recording = replanned(self._recording, self.plans, self._found)
        # Their memory goes first: there may be no room for both.
        self._programs.memory.close()
        for user in (self._generator, self._evaluator):
            if user is not None:
                user.close()
        self._evaluator, self._generator, self._digest = None, None, None
        self._programs = SessionPrograms.record(
            self._recording, self.workload, self._tensors, self._seams
        )

    def _training(self) -> TrainingPrograms:
        if self._programs.training is None:
            raise LoraError("This session was opened without training.")
        return self._programs.training

    # -- training -------------------------------------------------------------------------------

    def step(self, batches: Sequence[Batch]) -> None:
        """One optimizer step over some micro-batches; returns without waiting for the device.

        Its metrics come out of `train`, or of `finished_steps`, some steps later.
        """
        programs, train = self._training(), self.config.train
        for batch in batches:
            self.workload.check(batch, self.inputs.rows.maximum)
        assert self.stream is not None  # as there are programs
        rate = learning_rate(
            self.steps_done,
            total_steps=self.total_steps,
            peak=train.learning_rate,
            schedule=train.schedule,
            warmup_steps=self._warmup_steps,
        )
        self.steps_done += 1
        counts = [sum(b.n_trained for b in batches), sum(b.rows for b in batches)]
        n_trained, n_tokens = self.communicator.sum(np.array(counts, np.int64)).tolist()
        words = step_words(rate, self.steps_done, (train.betas[0], train.betas[1]))
        weight = loss_weight_words(n_trained, programs.loss_scale)
        self.memory.write(programs.loss_weight, weight)
        self.memory.write(programs.step_words, words)
        programs.begin.run()
        for batch in batches:
            self._enter(batch, self._cache)
            programs.micro_batch.run()
        if programs.sum_slices is not None:
            programs.sum_slices.run()
            for tensor in (self.adapter.gradients[0], self._act.loss_sum):
                total = self.communicator.sum(self.memory.read(tensor))
                self.memory.write(tensor, total)
        programs.finish.run()
        self._ring.push(
            self._act.metrics,
            MetricsAtArrival(
                step=self.steps_done,
                epoch=self.stream.epoch,
                learning_rate=rate,
                tokens=n_tokens,
                trained_tokens=n_trained,
            ),
        )

    def _enter(self, batch: Batch, cache: PrefixCache | None) -> None:
        """Puts what enters the lowest adapted layer into place: computed, or remembered."""
        self.inputs.write(
            self.memory,
            batch.token_ids,
            batch.positions,
            batch.segment_start,
            batch.segment_end,
            batch.targets,
        )
        if cache is None:
            self._programs.prefix.run()
        elif cache.holds(batch):
            cache.fill(batch, self._act.boundary)
        else:
            self._programs.prefix.run()
            cache.keep(batch, self._act.boundary)

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

    def train(self) -> Iterator[Metrics]:
        """Runs the steps that are left, one item a step, in order.

        Seconds and rates are measured between the arrivals of results; steps whose results come
        together share the time.

        Raises:
            LoraError: a loss or gradient was not finite. The adapter is as it was before that
                step.
        """
        for metrics in self.steps():
            if metrics is not None:
                yield metrics

    def steps(self, pause: Callable[[], bool] = lambda: False) -> Iterator[Metrics | None]:
        """As `train`, with pauses: None after a step where `pause()` holds.

        All results so far are handed out before a pause, so that what is done in it (a
        checkpoint, an evaluation) sees the device at rest; its time counts for no step.
        """
        if self.stream is None:
            raise LoraError("This session was opened without training.")
        clock = StepClock()
        for batches in self.stream:
            self.step(batches)
            paused = pause()
            for metrics in clock.timed(self.finished_steps(wait=paused)):
                yield check_finite(metrics, self.config.train.precision)
            if paused:
                yield None
                clock = StepClock()
        for metrics in clock.timed(self.finished_steps(wait=True)):
            yield check_finite(metrics, self.config.train.precision)

    def step_programs(self) -> tuple[Program, ...]:
        """What runs on the device in a step: the frozen prefix, a micro-batch, the optimizer."""
        return self._programs.step

    # -- evaluation and generation ----------------------------------------------------------------

    def evaluate(
        self, examples: Sequence[Any] | None = None, *, adapted: bool = True
    ) -> EvalResult:
        """Loss and greedy accuracy on examples (by default data.eval), one forward each.

        A greedy answer equals its target exactly when every target token, the end included, is
        the argmax after those before it. An example that data.max_length cut is never exact: its
        end was not asked for.

        Args:
            examples: at least one: rows, or tokenized ones.
            adapted: False for the bare model.
        """
        if examples is not None and not are_tokens(examples):
            examples = self.workload.data.of_rows(examples)
        if self._evaluator is None:
            self._evaluator = Evaluator(
                self._recording, self.workload, self._tensors.step, self._enter
            )
        return self._evaluator.evaluate(examples, adapted=adapted)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 64,
        adapted: bool = True,
        sampling: Sampling = GREEDY,
    ) -> str:
        """The continuation of a text (of token ids, of messages), alone; greedy by default."""
        pieces = self.stream_text(prompt, max_tokens=max_tokens, adapted=adapted, sampling=sampling)
        return "".join(pieces)

    def stream_text(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 64,
        adapted: bool = True,
        add_bos: bool | None = None,
        sampling: Sampling = GREEDY,
    ) -> Iterator[str]:
        """The continuation of a prompt, piece by piece; messages are written as in training.

        Raises:
            InputError: the prompt leaves no room in data.max_length, or can't be written.
        """
        if self._generator is None:
            adapter = Adapter(self.layout, self.adapter.parameters)
            self._generator = TextGenerator(
                self._recording_of_text(),
                self.model,
                self.tokenizer,
                {"adapter": adapter},
            )
        written = (self.config.data, self.tokenizer, self.started)
        template = None if is_tokens(prompt) else chat_template(*written)
        self._generator.forget()  # the adapter may have been trained or loaded since
        return self._generator.stream(
            prompt,
            max_tokens=max_tokens,
            adapter="adapter" if adapted else None,
            sampling=sampling,
            template=template,
            add_bos=add_bos,
        )

    def _recording_of_text(self) -> Recording:
        """In f32, but for the products of a prompt where training's are in f16 on a GPU."""
        half = self._recording.half_products and not self.device.facts.is_cpu
        return replace(self._recording, precision="f32", products="f16" if half else None)

    # -- the adapter ----------------------------------------------------------------------------

    def parameters(self) -> np.ndarray:
        """The adapter, f32 [layout.size], after all steps so far."""
        return self.memory.read(self.adapter.parameters)

    def load_adapter(self, path: str | Path) -> None:
        """Puts an adapter of the config's rank and targets in place of the present one.

        Args:
            path: a PEFT adapter directory, or a GGUF adapter.
        """
        self.memory.write(self.adapter.parameters, load_adapter(Path(path), self.layout))

    def save(self, directory: str | Path) -> None:
        """Writes the adapter as PEFT does: adapter_model.safetensors and adapter_config.json."""
        save_peft_adapter(Path(directory), self.layout, self.parameters(), self.config)
