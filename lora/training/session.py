"""TrainingSession: a frozen model, its adapter, and the steps that train it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora.adapters.files import load_adapter, open_adapter
from lora.adapters.peft_files import save_peft_adapter
from lora.data.batches import Batch, DataStream, sequential_batches
from lora.data.examples import DataSummary, Example, load_examples
from lora.forward.decoder.head import chunk_size
from lora.forward.gguf.file import GGUFFile
from lora.forward.model.adapter import AdapterLayout
from lora.forward.model.architecture import Architecture
from lora.forward.model.frozen_model import load_model
from lora.forward.model.inputs import Inputs
from lora.forward.plans.matmul_plans import (
    PlanSource,
    Product,
    Request,
    plan_of,
    requests_of,
    using_source,
)
from lora.forward.plans.matmul_tiles import Plan
from lora.forward.text.tokenizer import Tokenizer
from lora.generation.generator import Adapter, TextGenerator, memory_figures
from lora.generation.sampling import GREEDY, Sampling
from lora.optim.adamw import step_words
from lora.optim.schedule import learning_rate
from lora.shaders.device import Device
from lora.shaders.errors import DeviceMemoryError, InputError, LoraError
from lora.shaders.planning import PlanningDevice
from lora.shaders.program import Program, ReadbackRing
from lora.shaders.program_data import kernels_digest
from lora.storage.stores import resolve_model
from lora.storage.tile_cache import find_tiles
from lora.training.evaluation import Tally
from lora.training.metrics import EvalResult, Metrics, MetricsAtArrival, StepClock, check_finite
from lora.training.prefix_cache import AUTO_LIMIT, PrefixCache
from lora.training.programs import (
    Activations,
    AdapterState,
    TrainingPrograms,
    loss_weight_words,
    record_eval,
    record_prefix,
    wants_recompute,
)

if TYPE_CHECKING:
    from lora.config.schema import Config

IN_FLIGHT = 3  # steps that the host may be ahead of the device


class TrainingSession:
    """Holds frozen quantized base weights and f32 A/B adapters on a device, and trains them.

    `session.step(batches)` runs forward, backward, clipping and AdamW on the device and returns
    without waiting for it.

    Args:
        config: checked settings.
        train: False leaves out what only training needs (for evaluation and generation).
        examples: tokenized ones in place of data.train; example i has index i.
        device: one that is open already; by default the config's is opened.

    Attributes:
        plans: what the products of training are recorded with; none on adapters without tiles.

    Raises:
        InputError: the model, the data, an adapter or the device are not what the config needs.
    """

    def __init__(
        self,
        config: Config,
        *,
        train: bool = True,
        examples: Sequence[Example] | None = None,
        device: Device | None = None,
    ) -> None:
        self.config = config
        gguf_file = GGUFFile(resolve_model(config.model.path))
        architecture = Architecture.from_gguf(gguf_file)
        if config.model.tokenizer is None:
            self.tokenizer = Tokenizer.from_gguf(gguf_file)
        else:
            self.tokenizer = Tokenizer.from_file(config.model.tokenizer, gguf_file=gguf_file)
        adapter = config.adapter
        self.layout = AdapterLayout(
            architecture,
            adapter.resolve_layers(architecture.n_layers),
            adapter.resolve_targets(architecture),
            adapter.rank,
            adapter.scale,
        )
        self.train_examples: list[Example] = []
        self.train_summary: DataSummary | None = None
        if examples is not None:
            self.train_examples = list(examples)
        elif train:
            self.train_examples, self.train_summary = load_examples(config.data, self.tokenizer)
        self.eval_examples: list[Example] = []
        self.eval_summary: DataSummary | None = None
        if config.data.eval is not None:
            self.eval_examples, self.eval_summary = load_examples(
                config.data, self.tokenizer, "eval"
            )
        initial = self._initial_parameters()
        self._check_tokens(architecture.vocab_size)

        self.device = device if device is not None else Device(config.device)
        self.maximum_rows = self._most_rows()

        def allocate() -> None:
            with self._recording():
                self._allocate(gguf_file, architecture, initial, train)

        # All is recorded once on a device that only counts: what it asks for is known beforehand.
        self._plans: PlanSource | None = None
        planning = PlanningDevice(self.device)
        device, self.device = self.device, planning
        with requests_of(planning) as requests:
            allocate()
        self.device = device
        self._plans = find_tiles(device, config.train.tuning, requests if train else None)
        products = {request.product: request for request in requests if train}
        with using_source(planning, self._plans):
            self.plans = {p: plan_of(planning, request) for p, request in products.items()}
        try:
            if planning.largest_scratch:
                self.device.scratch((planning.largest_scratch,))
            allocate()
        except DeviceMemoryError as error:
            raise self._too_large(gguf_file, architecture, initial, train, error) from error

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Programs recorded in the block have this session's precision and tiles."""
        with (
            self.device.computing_in(self.config.train.precision),
            using_source(self.device, self._plans),
        ):
            yield

    def _allocate(
        self, gguf_file: GGUFFile, architecture: Architecture, initial: np.ndarray, train: bool
    ) -> None:
        """Puts everything on the device and records the programs."""
        lengths = (len(e.ids) for e in (*self.train_examples, *self.eval_examples))
        longest = max(self.config.data.max_length, *lengths, 1)
        self.model = load_model(self.device, gguf_file, architecture, longest)
        targets = self._most_targets()
        chunk = chunk_size(self.device, architecture.logits_size, targets)
        self.inputs = Inputs.allocate(
            self.device, self.maximum_rows, targets, chunk, self.model.long_examples
        )
        self.adapter = AdapterState.allocate(self.device, self.layout)
        self.device.write(self.adapter.parameters, initial)
        self._act = Activations.allocate(
            self.device, self.model, self.inputs, self.layout, self.adapter.parameters
        )
        self._eval_programs: dict[bool, Program] = {}
        self._eval_ring: ReadbackRing | None = None
        self._caches: dict[str, PrefixCache | None] = {}
        self._generator: TextGenerator | None = None
        self._programs: TrainingPrograms | None = None
        self.stream: DataStream | None = None
        if train:
            self._prepare_training()
        self._record_programs()

    def use_plans(self, plans: Mapping[Product, Plan]) -> None:
        """Records the programs again, with these plans of products; others keep theirs.

        So a run goes on with the order of sums that it began with (lora/training/checkpoint.py).
        """
        if self._programs is None:
            raise LoraError("This session was opened without training.")
        if all(self.plans.get(product) == plan for product, plan in plans.items()):
            return
        self.plans |= plans
        found = self._plans

        def source(request: Request) -> Plan | None:
            return self.plans.get(request.product) or (found(request) if found else None)

        self._plans = source
        # Their memory goes first: there may be no room for both.
        self._eval_programs, self._generator, self._programs = {}, None, None
        self.device.allocated.subtract(self._programs_memory)
        with self._recording():
            self._record_programs()

    def _too_large(
        self,
        gguf_file: GGUFFile,
        architecture: Architecture,
        initial: np.ndarray,
        train: bool,
        error: DeviceMemoryError,
    ) -> InputError:
        """What to say where the device has no room: all figures, and what to change."""
        self.device = PlanningDevice(self.device)
        with self._recording():
            self._allocate(gguf_file, architecture, initial, train)
        return InputError(
            f"{self.config.model.path} does not fit: {error}, and this run takes "
            f"{memory_figures(self.device.allocated)}. Lower train.batch_size or "
            "data.max_length, set train.recompute: on, or take a smaller quantization."
        )

    @classmethod
    def from_config(
        cls, path: str | Path, overrides: Sequence[str] = (), *, train: bool = True
    ) -> TrainingSession:
        """Opens the session of a YAML config; `overrides` are KEY=VALUE each."""
        from lora.config.schema import load_config  # pydantic: a quarter of the time of the import

        return cls(load_config(str(path), overrides), train=train)

    # -- set-up ---------------------------------------------------------------------------------

    def _initial_parameters(self) -> np.ndarray:
        init_from = self.config.adapter.init_from
        if init_from is None:
            return self.layout.initial(self.config.train.seed)
        saved = open_adapter(Path(init_from), self.layout.architecture)
        adapter = self.config.adapter
        if saved.rank != adapter.rank or not math.isclose(saved.scale, adapter.scale, rel_tol=1e-6):
            raise InputError(
                f"adapter.init_from: {init_from} was made with {saved.made_with}, but adapter.rank "
                f"is {adapter.rank}, adapter.alpha {adapter.alpha:g} and adapter.variant "
                f"{adapter.variant}; set them to the same."
            )
        return load_adapter(Path(init_from), self.layout)

    def _check_tokens(self, vocab_size: int) -> None:
        for example in (*self.train_examples, *self.eval_examples):
            if int(example.ids.max()) >= vocab_size:
                raise InputError(
                    f"The tokenizer gives id {int(example.ids.max())}, but the model's vocabulary "
                    f"has {vocab_size} entries; model.tokenizer does not fit this model."
                )

    def _most_rows(self) -> int:
        """Tokens of the largest micro-batch that can occur."""
        longest = self._most(lambda example: len(example.ids))
        return max(longest, self.config.data.max_length)

    def _most_targets(self) -> int:
        """Trained tokens of the largest micro-batch; one at least, for generation."""
        return max(1, self._most(lambda example: int(example.trained.sum())))

    def _most(self, size: Callable[[Example], int]) -> int:
        """The largest sum of sizes over a micro-batch of training or evaluation."""
        data, batch_size = self.config.data, self.config.train.batch_size
        sums = []
        for examples, packing in ((self.train_examples, data.packing), (self.eval_examples, False)):
            if packing:
                sums.append(batch_size * data.max_length)
            else:
                sums.append(sum(sorted(map(size, examples), reverse=True)[:batch_size]))
        return max(sums)

    def _prepare_training(self) -> None:
        train, data = self.config.train, self.config.data
        self.stream = DataStream(
            self.train_examples,
            batch_size=train.batch_size,
            gradient_accumulation=train.gradient_accumulation,
            packing=data.packing,
            max_length=data.max_length,
            shuffle=data.shuffle,
            seed=train.seed,
            epochs=train.epochs,
            steps=train.steps,
        )
        self.total_steps = self.stream.total_steps
        self._warmup_steps = train.resolve_warmup(self.total_steps)
        self.recompute = wants_recompute(
            train.recompute, self.model, self.layout, self.maximum_rows, train.precision
        )
        self._cache("train", self.train_examples)
        self.steps_done = 0
        if self.device.holds_data:
            self._ring = ReadbackRing(self.device, self._act.metrics.n_bytes, slots=IN_FLIGHT)

    def _record_programs(self) -> None:
        """What every micro-batch begins with and, in training, the rest of a step."""
        self._digest: str | None = None
        self._prefix = record_prefix(
            self.device, self.model, self.inputs, self._act, self.layout.lowest_layer
        )
        if self.stream is None:
            return
        train, before = self.config.train, Counter(self.device.allocated)
        self._programs = TrainingPrograms(
            self.device,
            self.model,
            self.inputs,
            self._act,
            self.layout,
            self.adapter,
            recompute=self.recompute,
            max_norm=train.max_grad_norm,
            betas=(train.betas[0], train.betas[1]),
            epsilon=train.epsilon,
            weight_decay=train.weight_decay,
        )
        self._programs_memory = Counter(self.device.allocated)
        self._programs_memory.subtract(before)
        self._programs_memory.pop("scratch", None)  # which is the device's

    def _cache(self, name: str, examples: Sequence[Example]) -> PrefixCache | None:
        """The prefix cache of a data set, where there is a frozen prefix and it is wanted."""
        if name not in self._caches:
            setting = self.config.train.reuse_frozen_prefix
            hidden_size = self.model.architecture.hidden_size
            needed = PrefixCache.bytes_needed(examples, hidden_size)
            most = self.device.max_buffer
            if setting == "on" and needed > most:
                raise InputError(
                    f"train.reuse_frozen_prefix: on: the states of {len(examples)} examples take "
                    f"{needed / 2**20:.0f} MiB, more than the {most / 2**20:.0f} MiB that one "
                    "buffer can hold here; set it to off."
                )
            wanted = (
                setting != "off"
                and self.layout.lowest_layer > 0
                and (setting == "on" or needed <= min(most, AUTO_LIMIT))
            )
            self._caches[name] = PrefixCache(self.device, examples, hidden_size) if wanted else None
        return self._caches[name]

    # -- training -------------------------------------------------------------------------------

    def step(self, batches: Sequence[Batch]) -> None:
        """One optimizer step over some micro-batches; returns without waiting for the device.

        Its metrics come out of `train`, or of `finished_steps`, some steps later.
        """
        programs = self._programs
        if programs is None or self.stream is None:
            raise LoraError("This session was opened without training.")
        train = self.config.train
        rate = learning_rate(
            self.steps_done,
            total_steps=self.total_steps,
            peak=train.learning_rate,
            schedule=train.schedule,
            warmup_steps=self._warmup_steps,
        )
        self.steps_done += 1
        n_trained = sum(batch.n_trained for batch in batches)
        words = step_words(rate, self.steps_done, (train.betas[0], train.betas[1]))
        self.device.write(programs.loss_weight, loss_weight_words(n_trained, programs.loss_scale))
        self.device.write(programs.step_words, words)
        programs.begin.run()
        cache = self._cache("train", self.train_examples)
        for batch in batches:
            self._write(batch)
            self._run_prefix(batch, cache)
            programs.micro_batch.run()
        programs.finish.run()
        self._ring.push(
            self._act.metrics,
            MetricsAtArrival(
                step=self.steps_done,
                epoch=self.stream.epoch,
                learning_rate=rate,
                tokens=sum(batch.rows for batch in batches),
                trained_tokens=n_trained,
            ),
        )

    def _write(self, batch: Batch) -> None:
        self.inputs.write(
            self.device,
            batch.token_ids,
            batch.positions,
            batch.segment_start,
            batch.segment_end,
            batch.targets,
        )

    def _run_prefix(self, batch: Batch, cache: PrefixCache | None) -> None:
        """Puts what enters the lowest adapted layer into place: computed, or remembered."""
        if cache is None:
            self._prefix.run()
            return
        known = cache.holds(batch)
        if not known:
            self._prefix.run()
        encoder = self.device.wgpu.create_command_encoder()
        if known:
            cache.fill(encoder, batch, self._act.boundary)
        else:
            cache.keep(encoder, batch, self._act.boundary)
        self.device.queue.submit([encoder.finish()])

    def kernels_digest(self) -> str:
        """Of all kernels that a step runs; see `shaders.program_data`."""
        if self._digest is None:
            programs = self._programs
            if programs is None:
                raise LoraError("This session was opened without training.")
            self._digest = kernels_digest(
                (programs.begin, self._prefix, programs.micro_batch, programs.finish)
            )
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
        if self._programs is None:
            raise LoraError("This session was opened without training.")
        return self._prefix, self._programs.micro_batch, self._programs.finish

    # -- evaluation and generation ----------------------------------------------------------------

    def evaluate(
        self, examples: Sequence[Example] | None = None, *, adapted: bool = True
    ) -> EvalResult:
        """Loss and greedy accuracy on examples (by default data.eval), one forward each.

        A greedy answer equals its target exactly when every target token, the end included, is
        the argmax after those before it. An example that data.max_length cut is never exact: its
        end was not asked for.

        Args:
            examples: at least one.
            adapted: False for the bare model.
        """
        cache = None
        if examples is None:
            if not self.eval_examples:
                raise InputError("data.eval is null: there is nothing to evaluate on.")
            examples = self.eval_examples
            cache = self._cache("eval", examples)
        if adapted not in self._eval_programs:
            flat = self.adapter.parameters if adapted else None
            with self._recording():
                self._eval_programs[adapted] = record_eval(
                    self.device, self.model, self.inputs, self._act, self.layout, flat
                )
        program, head = self._eval_programs[adapted], self._act.head
        # The host prepares a batch while the device computes the one before it.
        if self._eval_ring is None:
            self._eval_ring = ReadbackRing(self.device, head.losses.n_bytes, slots=2 * IN_FLIGHT)
        ring, tally = self._eval_ring, Tally(examples)
        ring.ready(wait=True)  # what an evaluation that was interrupted left behind
        sent: list[Batch] = []
        arrived: list[np.ndarray] = []

        def count(*, wait: bool) -> None:
            arrived.extend(ring.ready(wait=wait))
            while len(arrived) > 1:
                tally.add(sent.pop(0), arrived.pop(0), arrived.pop(0))

        for batch in sequential_batches(examples, self.config.train.batch_size):
            self._write(batch)
            self._run_prefix(batch, cache)
            program.run()
            for tensor in (head.losses, head.correct):
                ring.push(tensor, lambda values: values)
            sent.append(batch)
            count(wait=False)
        count(wait=True)
        return tally.result()

    def generate(
        self,
        prompt: str | list[int],
        *,
        max_tokens: int = 64,
        adapted: bool = True,
        sampling: Sampling = GREEDY,
    ) -> str:
        """The continuation of a text (or of token ids), without the prompt; greedy by default."""
        pieces = self.stream_text(prompt, max_tokens=max_tokens, adapted=adapted, sampling=sampling)
        return "".join(pieces)

    def stream_text(
        self,
        prompt: str | list[int],
        *,
        max_tokens: int = 64,
        adapted: bool = True,
        add_bos: bool | None = None,
        sampling: Sampling = GREEDY,
    ) -> Iterator[str]:
        """The continuation of a text, piece by piece.

        Raises:
            InputError: the prompt leaves no room in data.max_length.
        """
        if self._generator is None:
            adapter = Adapter(self.layout, self.adapter.parameters)
            self._generator = TextGenerator(
                self.device, self.model, self.tokenizer, {"adapter": adapter}, plans=self._plans
            )
        self._generator.forget()  # the adapter may have been trained or loaded since
        return self._generator.stream(
            prompt,
            max_tokens=max_tokens,
            adapter="adapter" if adapted else None,
            sampling=sampling,
            add_bos=add_bos,
        )

    # -- the adapter ----------------------------------------------------------------------------

    def parameters(self) -> np.ndarray:
        """The adapter, f32 [layout.size], after all steps so far."""
        return self.device.read(self.adapter.parameters)

    def load_adapter(self, path: str | Path) -> None:
        """Puts an adapter of the config's rank and targets in place of the present one.

        Args:
            path: a PEFT adapter directory, or a GGUF adapter.
        """
        self.device.write(self.adapter.parameters, load_adapter(Path(path), self.layout))

    def save(self, directory: str | Path) -> None:
        """Writes the adapter as PEFT does: adapter_model.safetensors and adapter_config.json."""
        save_peft_adapter(Path(directory), self.layout, self.parameters(), self.config)
