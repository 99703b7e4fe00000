"""What a session has on the device: tensors, programs, and what they would take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lora.backward.lora import most_slices
from lora.backward.losses import Loss, SupervisedLoss
from lora.data.examples import Example
from lora.forward.cross_entropy import Criterion
from lora.forward.decoder.head import chunk_size
from lora.forward.dora import Dora
from lora.forward.model.balance import Balance
from lora.forward.model.frozen_model import Model, load_model
from lora.forward.model.inputs import Inputs
from lora.forward.plans.matmul_plans import (
    PlanSource,
    ProductShape,
    Request,
    noting,
    plan_of,
    source_of,
)
from lora.forward.plans.matmul_tiles import Plan
from lora.optim.adamw import AdamWSettings
from lora.shaders.device import Device
from lora.shaders.errors import InputError
from lora.shaders.facts import DeviceFacts
from lora.shaders.memory import CountingMemory, Memory
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.training.activations import Activations
from lora.training.adapter_state import AdapterState
from lora.training.balancing import balanced_on, read_balance
from lora.training.communicator import Communicator, SingleProcess
from lora.training.noise import Noise
from lora.training.precision import precision_on
from lora.training.prefix_cache import AUTO_LIMIT, PrefixCache
from lora.training.programs import (
    StepSettings,
    StepTensors,
    TrainingPrograms,
    record_prefix,
)
from lora.training.recompute import layer_bytes, recomputed_layers
from lora.training.workload import Workload

if TYPE_CHECKING:
    from lora.config.schema import TrainConfig

_LEAST_SLICE_ROWS = 64  # of a micro-batch, for each slice of the gradients


@dataclass(frozen=True)
class Seams:
    """What scripts may put in place of what training does by itself."""

    loss: Loss = field(default_factory=SupervisedLoss)
    communicator: Communicator = field(default_factory=SingleProcess)


@dataclass(frozen=True)
class SessionTensors:
    """All that stays while a session is open, whatever is recorded.

    Attributes:
        recomputed: how many of the lowest adapted layers are run again in the backward pass.
        train_cache: of data.train's frozen prefix, where there is one and it is kept.
        plain: the model as the file has it, for text; a step's may be balanced for f16.
        balance: what that one was balanced by; None where the two are the same.
    """

    step: StepTensors
    recomputed: int
    train_cache: PrefixCache | None
    plain: Model
    balance: Balance | None = None

    @classmethod
    def allocate(
        cls,
        recording: Recording,
        workload: Workload,
        recomputed: int,
        balance: Balance | None = None,
    ) -> SessionTensors:
        """Loads the model and makes room for the largest micro-batch.

        Args:
            recomputed: see the class.
            balance: of the model, where it is known; None to find it, where weights are there.

        Raises:
            InputError: a tensor is larger than the device can bind.
            DeviceMemoryError: the device has no room.
        """
        plain = load_model(recording, workload.gguf_file, workload.architecture, workload.longest)
        model, balance = balanced_on(recording, workload, plain, balance)
        targets = workload.maximum_targets
        chunk = chunk_size(recording, workload.architecture.logits_size, targets)
        inputs = Inputs.allocate(
            recording, workload.maximum_rows, targets, chunk, model.bounds, model.long_examples,
            model.host_table, ordered=workload.trains and workload.layout.embedding is not None,
        )  # fmt: skip
        probability = workload.config.adapter.dropout if workload.trains else 0.0
        config = workload.config
        # Each is as much memory as the adapter: of 128 rows four were a quarter of all.
        of_rows = max(1, workload.maximum_rows // _LEAST_SLICE_ROWS)
        adapter = AdapterState.allocate(
            recording, workload.layout,
            min(most_slices(recording.facts, probability > 0), of_rows),
            config.train.optimizer, config.adapter.loraplus_lr_ratio,
        )  # fmt: skip
        recording.memory.write(adapter.parameters, workload.initial)
        if workload.layout.dora:
            factors = adapter.factors(workload.layout)
            adapter = replace(adapter, dora=Dora.allocate(recording, model, factors))
        factors = adapter.factors(workload.layout)
        activations = Activations.allocate(recording, model, inputs, factors)
        train_cache = None
        if workload.trains:
            train_cache = open_cache(recording, workload, workload.train_examples)
        noise = Noise.allocate(recording, workload, inputs)
        step = StepTensors(model, inputs, workload.layout, adapter, activations, noise)
        return cls(step, recomputed, train_cache, plain, balance)


@dataclass(frozen=True)
class SessionPrograms:
    """What every micro-batch begins with and, in training, the rest of a step.

    Attributes:
        memory: of what only these programs need.
        prefix: up to what enters the lowest adapted layer.
        bare_prefix: the same with the base's embedding.
        training: None in a session without training.
    """

    memory: Memory
    prefix: Program
    bare_prefix: Program
    training: TrainingPrograms | None

    @classmethod
    def record(
        cls, recording: Recording, workload: Workload, tensors: SessionTensors, seams: Seams
    ) -> SessionPrograms:
        """Records them with memory of their own, inside the recording's."""
        inner = replace(recording, memory=recording.memory.inner())
        step, train = tensors.step, workload.config.train
        bare_prefix = prefix = record_prefix(
            inner, step.model, step.inputs, step.activations, step.layout.lowest_layer,
            step.noise.embedding,
        )  # fmt: skip
        factors = step.adapter.factors(step.layout)
        if factors.below_layers:
            prefix = record_prefix(
                inner, step.model, step.inputs, step.activations, 0, step.noise.embedding, factors
            )
        training = None
        if workload.trains:
            settings = StepSettings(
                tensors.recomputed,
                seams.loss,
                AdamWSettings((train.betas[0], train.betas[1]), train.epsilon, train.weight_decay),
                train.max_grad_norm,
                combined=seams.communicator.size > 1,
                criterion=criterion_of(train, seams.loss),
            )
            training = TrainingPrograms(inner, step, settings)
        return cls(inner.memory, prefix, bare_prefix, training)

    @property
    def step(self) -> tuple[Program, ...]:
        """What runs on the device in a step: what it begins with, DoRA's lengths among it, the
        frozen prefix, a micro-batch, the optimizer."""
        if self.training is None:
            return (self.prefix,)
        begin, *others = self.training.all
        return begin, self.prefix, *others


@dataclass(frozen=True)
class SessionPlan:
    """A session recorded on memory that only counts: what it would take and run.

    Attributes:
        facts: of the device that it is for.
        requests: the products of a step, each as often as it occurs.
        allocated: bytes by purpose.
        largest_scratch: elements; of the memory beside it, too.
    """

    workload: Workload
    facts: DeviceFacts
    tensors: SessionTensors
    programs: SessionPrograms
    requests: Sequence[Request]
    allocated: Counter[str]
    largest_scratch: tuple[int, ...]

    @classmethod
    def of(
        cls,
        facts: DeviceFacts,
        workload: Workload,
        plans: PlanSource | None = None,
        seams: Seams | None = None,
        recomputed: int | None = None,
        balance: Balance | None = None,
    ) -> SessionPlan:
        """Records a session as a device of these facts would.

        Args:
            plans: of products; None for the model's choices.
            seams: those of the session; None for the usual ones.
            recomputed: how many of the lowest adapted layers are run again; None for what
                train.recompute and train.memory_limit mean.
            balance: of the model under f16, as its weights decide (`read_balance`); None for an
                ordinary model.

        Raises:
            InputError: something is larger than the device can bind.
        """
        if recomputed is None:
            kept = cls.of(facts, workload, plans, seams, 0, balance)
            recomputed = kept.wanted_recompute()
            if recomputed == 0:
                return kept
        requests: list[Request] = []
        note = noting(requests)

        def source(request: Request) -> Plan | None:
            note(request)
            return None if plans is None else plans(request)

        memory = CountingMemory(facts)
        recording = Recording(facts, memory, precision_on(facts, workload), plans=source)
        tensors = SessionTensors.allocate(recording, workload, recomputed, balance)
        programs = SessionPrograms.record(recording, workload, tensors, seams or Seams())
        return cls(
            workload, facts, tensors, programs, requests, memory.allocated, memory.largest_scratch
        )

    def of_file(self, device: Device, plans: PlanSource | None = None) -> SessionPlan:
        """The plan with what f16 needs of the file's weights, which are read for it.

        Args:
            plans: as of `of`.

        Raises:
            DeviceMemoryError: there is no room for the model.
        """
        balance = read_balance(device, self.workload)
        if balance is None:
            return self
        recomputed = self.tensors.recomputed
        return self.of(self.facts, self.workload, plans, None, recomputed, balance)

    @property
    def precision(self) -> str:
        """f32 or f16, as it was recorded."""
        return precision_on(self.facts, self.workload)

    def wanted_recompute(self) -> int:
        """How many layers this session, which keeps all activations, is to run again after all."""
        if not self.workload.trains:
            return 0
        step = self.tensors.step
        recording = Recording(
            self.facts, CountingMemory(self.facts), precision_on(self.facts, self.workload)
        )
        return recomputed_layers(
            self.workload,
            self.facts,
            layer_bytes(recording, self.workload, step.model, step.inputs, step.activations.shared),
            sum(self.allocated.values()),
            step.inputs.rows.maximum,
        )

    @property
    def kernels(self) -> list[tuple[str, dict[str, Any]]]:
        """Templates and constants of all kernels of these programs, each once.

        Without those that a script wrote for its own loss, which are no templates.
        """
        training = self.programs.training
        programs = (self.programs.prefix, *(() if training is None else training.all))
        found = {
            repr((dispatch.template, sorted(dispatch.constants.items()))): dispatch
            for program in programs
            for dispatch in program.dispatches
            if "wgsl" not in dispatch.constants
        }
        return [(dispatch.template, dict(dispatch.constants)) for dispatch in found.values()]

    def chosen(self, plans: PlanSource | None) -> dict[ProductShape, Plan]:
        """The plan of each product that training records, from a source or the model."""
        if not self.workload.trains:
            return {}
        recording = Recording(self.facts, CountingMemory(self.facts), plans=plans)
        requests = {request.product: request for request in self.requests}
        return {product: plan_of(recording, request) for product, request in requests.items()}


def replanned(
    recording: Recording, plans: Mapping[ProductShape, Plan], others: PlanSource | None
) -> Recording:
    """The same recording with these plans; `others` is asked for products not among them."""
    return replace(recording, plans=source_of(plans, others))


def criterion_of(train: TrainConfig, loss: Loss) -> Criterion | None:
    """What the config has minimized; None for the usual.

    Raises:
        InputError: a script's own loss is there, too.
    """
    if train.loss_type == "nll" and not train.label_smoothing:
        return None
    if not isinstance(loss, SupervisedLoss):
        key = "label_smoothing" if train.label_smoothing else "loss_type"
        raise InputError(
            f"train.{key}: the session was given a loss of its own "
            f"({type(loss).__qualname__}), which takes its place; leave train.{key} out."
        )
    return Criterion(train.label_smoothing, train.loss_type == "dft")


def open_cache(
    recording: Recording, workload: Workload, examples: Sequence[Example]
) -> PrefixCache | None:
    """The prefix cache of a data set, where there is a frozen prefix and it is wanted.

    Raises:
        InputError: it is asked for and larger than one buffer can be.
    """
    setting = workload.config.train.reuse_frozen_prefix
    if not examples:  # none, or rows that are streamed
        return None
    if workload.config.train.neftune_noise_alpha:
        if setting == "on":
            raise InputError(
                "train.reuse_frozen_prefix: on: with train.neftune_noise_alpha the embeddings "
                "differ from step to step, and so does all above them; set it to auto."
            )
        return None
    if workload.layout.below_layers and setting == "on":
        raise InputError(
            "train.reuse_frozen_prefix: on: the embeddings are trained (adapter.trainable_tokens, "
            "or embed_tokens as a target), and so all above them changes; set it to auto."
        )
    lowest, a = workload.layout.lowest_layer, workload.architecture
    if lowest < a.n_layers and (a.per_layer_size or any(donor < lowest for donor in a.donors)):
        if setting == "on":
            raise InputError(
                "train.reuse_frozen_prefix: on: layers of this model read more of what lies below "
                "them than their input (inputs of their own, or keys and values of lower layers), "
                "which is not kept; set it to auto."
            )
        return None
    hidden_size = workload.architecture.hidden_size
    needed = PrefixCache.bytes_needed(examples, hidden_size)
    most = recording.facts.max_buffer
    if setting == "on" and needed > most:
        raise InputError(
            f"train.reuse_frozen_prefix: on: the states of {len(examples)} examples take "
            f"{needed / 2**20:.0f} MiB, more than the {most / 2**20:.0f} MiB that one "
            "buffer can hold here; set it to off."
        )
    wanted = (
        setting != "off"
        and workload.layout.lowest_layer > 0
        and (setting == "on" or needed <= min(most, AUTO_LIMIT))
    )
    return PrefixCache(recording, examples, hidden_size) if wanted else None
