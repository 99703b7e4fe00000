"""A frozen model and an adapter on a device: evaluation, generation, and a step's beginning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

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
from lora.shaders.device import Device
from lora.shaders.errors import DeviceMemoryError, InputError, LoraError
from lora.shaders.recording import Recording
from lora.shaders.stages import stage
from lora.storage.tile_cache import find_tiles
from lora.training.card import write_card
from lora.training.communicator import Communicator, SingleProcess
from lora.training.device_state import Seams, SessionPlan, SessionPrograms, SessionTensors
from lora.training.endings import warn_of_growth
from lora.training.evaluation import Evaluator, Progress
from lora.training.kept_state import KeptState
from lora.training.metrics import EvalResult
from lora.training.orders import Orders
from lora.training.placement import device_of
from lora.training.precision import agreed_precision, precision_on
from lora.training.prefix_cache import PrefixCache
from lora.training.workload import Workload

if TYPE_CHECKING:
    from lora.config.schema import Config


class OpenSession(KeptState, ABC):
    """See `TrainingSession`, whose part without training this is."""

    @abstractmethod
    def _new_device(self, webgpu: str) -> Device:
        """Opens the config's device.

        Args:
            webgpu: the implementation, as the config's `webgpu:`.
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
        processes: int | None = None,
    ) -> None:
        self.config = config
        self.started = datetime.now() if started is None else started
        self.communicator = SingleProcess() if communicator is None else communicator
        self.orders = Orders(self.communicator)
        _ = self.communicator.hosts  # asked of all of them, so while all are here
        # Signals that ask for a stop: one to this process, and the largest that any was sent.
        self.stop_signal, self.stop_asked = 0, 0
        self._wanted: str | int = config.device
        if device is None:
            self._wanted = device_of(self.communicator, config.device, config.webgpu)
        self._seams = Seams(SupervisedLoss() if loss is None else loss, self.communicator)
        self.workload = Workload.open(
            config, train=train, examples=examples, now=self.started, peers=self.communicator,
            processes=processes,
        )  # fmt: skip
        self.tokenizer, self.layout = self.workload.tokenizer, self.workload.layout
        self._initial = self.workload.initial
        if device is None:
            stage("Opening the device")
        self._open_on(self._new_device(config.webgpu) if device is None else device, device is None)

    def _open_on(self, device: Device, owned: bool) -> None:
        """Puts everything on a device.

        Args:
            owned: whether it is closed with the session.
        """
        self.device, self._owns_device = device, owned
        trust_matrix_units(self.device, self._wanted)
        self.memory = self.device.arena()
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        """Puts everything on the device and records the programs."""
        self.workload = agreed_precision(self.workload, self.device.facts, self.communicator)
        workload, train = self.workload, self.config.train
        stage("Planning the steps")
        # All is recorded once on memory that only counts: what it asks for is known beforehand.
        plan = SessionPlan.of(self.device.facts, workload, None, self._seams)
        self.precision = precision_on(self.device.facts, workload)
        requests = plan.requests if workload.trains else None
        self._found: PlanSource | None = find_tiles(self.device, train.tuning, requests)
        self.plans: dict[ProductShape, Plan] = plan.chosen(self._found)
        if self._found is not None:
            recomputed = plan.tensors.recomputed
            plan = SessionPlan.of(self.device.facts, workload, self._found, self._seams, recomputed)
        self.plan = plan
        self._recording = self.device.recording(
            memory=self.memory, precision=self.precision, plans=self._found
        )
        try:
            for beside, size in enumerate(plan.largest_scratch):
                if size:
                    self.memory.scratch((size,), beside=beside)
            stage("Loading the model")
            recomputed = plan.tensors.recomputed
            tensors = SessionTensors.allocate(self._recording, workload, recomputed)
            if tensors.balance is not None:  # the weights ask for powers, and for other kernels
                self.plan = plan = SessionPlan.of(
                    self.device.facts, workload, self._found, self._seams, recomputed,
                    tensors.balance,
                )  # fmt: skip
            stage(f"Compiling {len(plan.kernels)} kernels")
            self.device.compile_all(plan.kernels)
            self._programs = SessionPrograms.record(self._recording, workload, tensors, self._seams)
        except DeviceMemoryError as error:
            raise InputError(
                f"{self.config.model.path} does not fit: {error}, and this run takes "
                f"{memory_figures(plan.allocated)}. Lower train.batch_size or "
                "data.max_length, set train.recompute: on or a lower train.memory_limit, or take a "
                "smaller quantization."
            ) from error
        self._tensors, self._cache, step = tensors, tensors.train_cache, tensors.step
        self.model, self.inputs, self.adapter = tensors.plain, step.inputs, step.adapter
        self._act = step.activations
        self._begin_magnitudes()
        self.recomputed_layers = tensors.recomputed
        self._generator: TextGenerator | None = None
        self._evaluator: Evaluator | None = None

    def _begin_magnitudes(self) -> None:
        """Under DoRA a new adapter's magnitudes are the lengths of the base's rows: B is zero."""
        dora = self.adapter.dora
        if dora is None:
            return
        if any(m.any() for m in self.layout.magnitudes(self._initial).values()):
            return  # of an adapter that is continued
        dora.update.run()
        flat = self._initial.copy()
        for group in self.layout.groups:
            tensors = dora.factors[group.layer, group.group].dora
            assert group.m_start is not None and tensors is not None
            inverses, at = self.memory.read(tensors.inverses), group.m_start
            lengths = np.divide(1.0, inverses, where=inverses > 0, out=np.zeros_like(inverses))
            for start, stop in group.ranges:
                flat[at : at + stop - start] = lengths[start:stop]
                at += stop - start
        self._initial = flat
        self.memory.write(self.adapter.parameters, flat)

    @classmethod
    def from_config(cls, path: str | Path, overrides: Sequence[str] = (), **others: Any) -> Self:
        """Opens the session of a YAML config.

        Args:
            path: of the config.
            overrides: KEY=VALUE each, as --set.
            others: arguments of the class.

        Example:
            >>> TrainingSession.from_config("lora.yaml", ["train.steps=10"], examples=rows)
        """
        from lora.config.schema import load_config  # pydantic: a quarter of the time of the import

        needs_data = others.get("examples") is None
        return cls(load_config(str(path), overrides, needs_data=needs_data), **others)

    def close(self) -> None:
        """Gives the memory back, and the device where the session opened it."""
        self.memory.close()
        if self._owns_device:
            self.device.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _close_users(self) -> None:
        """Gives back what evaluation and generation have: they are opened again when asked for."""
        for user in (self._generator, self._evaluator):
            if user is not None:
                user.close()
        self._evaluator, self._generator = None, None

    def _enter(
        self,
        batch: Batch,
        cache: PrefixCache | None,
        step: int | None = None,
        *,
        adapted: bool = True,
    ) -> None:
        """Puts what enters the lowest adapted layer into place: computed, or remembered."""
        self.write_inputs(batch, step)
        if cache is None:
            (self._programs.prefix if adapted else self._programs.bare_prefix).run()
        elif cache.holds(batch):
            cache.fill(batch, self._act.boundary)
        else:
            self._programs.prefix.run()
            cache.keep(batch, self._act.boundary)

    def write_inputs(self, batch: Batch, step: int | None = None) -> None:
        """Puts the tokens of a micro-batch on the device.

        Args:
            step: of training, counted from 0, for what it draws anew; None for an evaluation.
        """
        self._tensors.step.noise.write(self.memory, batch, step)
        self.inputs.write(
            self.memory,
            batch.token_ids,
            batch.positions,
            batch.segment_start,
            batch.segment_end,
            batch.targets,
        )

    # -- evaluation and generation ----------------------------------------------------------------

    def evaluate(
        self,
        examples: Sequence[Any] | None = None,
        *,
        adapted: bool = True,
        progress: Progress = lambda done, total: None,
    ) -> EvalResult:
        """Loss and greedy accuracy on examples (by default data.eval), one forward each.

        A greedy answer equals its target exactly when every target token, the end included, is
        the argmax after those before it. An example that data.max_length cut is never exact: its
        end was not asked for. Several processes share the examples; all call this.

        Args:
            examples: at least one: rows, or tokenized ones.
            adapted: False for the bare model.
            progress: told on the way how many examples are done, and of how many.

        Example:
            >>> result = session.evaluate()  # data.eval
            >>> result.loss, result.token_accuracy
            >>> session.evaluate([{"prompt": "2 + 2 = ", "completion": "4"}]).exact_match
        """
        if examples is not None and not are_tokens(examples):
            examples = self.workload.data.of_rows(examples)
        self.settle()
        self.orders.give("evaluate", None if examples is None else list(examples), adapted)
        if self._evaluator is None:
            self._evaluator = Evaluator(
                self._recording, self.workload, self._tensors.step, self._enter, self.communicator
            )
        return self._evaluator.evaluate(examples, adapted=adapted, progress=progress)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 64,
        adapted: bool = True,
        sampling: Sampling = GREEDY,
    ) -> str:
        """The continuation of a text (of token ids, of messages), alone; greedy by default.

        Example:
            >>> session.generate("wake me at 6:45 am\\n", max_tokens=24)
            >>> session.generate([{"role": "user", "content": "Hi"}], adapted=False)
        """
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
        self.settle()
        if self._generator is None:
            adapter = Adapter(
                self.layout, self.adapter.parameters, self.adapter.dora, self.adapter.tokens
            )
            self._generator = TextGenerator(
                self._recording_of_text(),
                self.model,
                self.tokenizer,
                {"adapter": adapter},
            )
        if adapted and self.adapter.dora is not None:
            self.adapter.dora.update.run()
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

    @property
    def settled_config(self) -> Config:
        """The config with what it left to the device."""
        train = self.config.train.model_copy(update={"precision": self.precision})
        return self.config.model_copy(update={"train": train})

    def save(self, directory: str | Path) -> None:
        """Writes the adapter as PEFT does: its weights, adapter_config.json and README.md.

        Raises:
            LoraError: it holds what is no number; nothing is written.

        Example:
            >>> session.save("runs/mine")
        """
        save_peft_adapter(Path(directory), self.layout, self.checked_parameters(), self.config)
        work = self.workload
        write_card(Path(directory), self.settled_config, work.gguf_file, chats=work.trains_on_chats)

    def checked_parameters(self) -> np.ndarray:
        """As `parameters`, of an adapter that is to be kept; one that grew large is said.

        Raises:
            LoraError: it holds what is no number.
        """
        flat = self.parameters()
        n_bad = int(flat.size - np.isfinite(flat).sum())
        if n_bad:
            raise LoraError(
                f"The adapter holds {n_bad} of {flat.size} values that are no finite numbers, and "
                "is not saved. The checkpoints before it stay."
            )
        warn_of_growth(float(np.abs(flat).max()))
        return flat
