"""A model of one layer, made of a LayerSpec without a file, and the ways through its layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from lora.backward.decoder import record_layer_backward
from lora.backward.recorder import BackwardPass
from lora.backward.scratch import allocate_scratch
from lora.forward.decoder.decode_step import Step, allocate_caches, record_step
from lora.forward.decoder.layers import record_layer
from lora.forward.decoder.recorder import Walk, WithinExamples
from lora.forward.decoder.step_inputs import StepInputs
from lora.forward.decoder.step_tensors import StepActivations
from lora.forward.model.adaptable import HEAD
from lora.forward.model.adapter import AdapterLayout
from lora.forward.model.architecture import Architecture
from lora.forward.model.factors import Factors
from lora.forward.model.frozen_model import LayerWeights, Model
from lora.forward.model.inputs import Inputs
from lora.forward.model.layer_spec import LayerSpec
from lora.forward.model.norm import Norm
from lora.forward.model.weights import FrozenMatrix, load_matrix
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor
from lora.training.activations import allocate_layer
from tests.support.quantized_tensors import random_blocks, tensor_of

F32 = GGMLQuantizationType.F32
N_POSITIONS, ROOM, RANK, SCALE = 64, 32, 4, 2.0


def model_of(recording: Recording, spec: LayerSpec, seed: int = 0) -> Model:
    """A model of one such layer and small random weights."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> FrozenMatrix:
        tensor = tensor_of(F32, random_blocks(F32, rows, columns, int(rng.integers(1000))), columns)
        values = tensor.data.view(np.float32) / np.sqrt(np.float32(columns))
        return load_matrix(recording, [tensor_of(F32, values.view(np.uint8), columns)])

    def vector(width: int) -> Tensor:
        return recording.memory.upload(rng.normal(1, 0.1, width).astype(np.float32))

    def norm() -> Norm:
        return Norm(vector(spec.hidden_size), spec.norm_epsilon)

    rows_of = {group: sum(m.out_size(spec) for m in ms) for group, ms in spec.groups.items()}
    layer = LayerWeights(
        spec=spec,
        matrices={
            group: matrix(rows_of[group], members[0].in_size(spec))
            for group, members in spec.groups.items()
        },
        biases={
            group: vector(rows_of[group])
            for group, members in spec.groups.items()
            if any(member.gguf_name in spec.biases for member in members)
        },
        mixer_norm=norm() if spec.pre_norms else None,
        feed_forward_norm=norm() if spec.pre_norms else None,
        post_mixer_norm=norm() if spec.post_norms else None,
        post_feed_forward_norm=norm() if spec.post_norms else None,
        post_per_layer_norm=norm() if spec.per_layer else None,
        output_scale=vector(4) if spec.output_scale else None,
        vectors={
            stack: vector(sum(block.vectors[name] for name in names))
            for block in spec.blocks
            for stack, names in block.stacks.items()
        }
        | {
            name: recording.memory.upload(rng.normal(0, 0.5, shape[::-1]).astype(np.float32))
            for block in spec.blocks
            for name, shape in block.tables.items()
        }
        | {
            name: recording.memory.upload(numbers)
            for block in spec.blocks
            for name, numbers in block.constants.items()
        },
        rope=spec.rope and recording.memory.upload(spec.rope.tables(N_POSITIONS)),
        temperature=None
        if getattr(spec.mixer, "temperature", None) is None
        else recording.memory.upload(spec.mixer.temperature.factors(N_POSITIONS)),
    )
    architecture = Architecture(
        "test", (spec,), spec.hidden_size, 64, 128, spec.norm_epsilon, True, None, 1.0
    )
    head = matrix(64, spec.hidden_size)
    return Model(architecture, head, (layer,), norm(), head, N_POSITIONS, None)


def own_inputs(recording: Recording, spec: LayerSpec, rows: Extent) -> Tensor | None:
    """What the tokens have for the layer, where it has inputs of its own."""
    if spec.per_layer is None:
        return None
    width = (spec.per_layer.layer + 1) * spec.per_layer.size
    return recording.memory.empty((rows.maximum, width), extent=rows)


@dataclass(frozen=True)
class Pass:
    """A layer's forward and backward, recorded, and the tensors around them.

    Attributes:
        own: what the tokens have for the layer, where it has inputs of its own.
        shared: what the forwards of other layers would overwrite, where it shares.
    """

    model: Model
    inputs: Inputs
    layout: AdapterLayout
    parameters: Tensor
    gradients: Tensor
    x: Tensor
    out: Tensor
    d_x: Tensor
    forward: Program
    backward: Program
    own: Tensor | None
    shared: tuple[Tensor, ...]

    @classmethod
    def record(
        cls,
        recording: Recording,
        spec: LayerSpec,
        rows: int = 12,
        *,
        targets: Sequence[str] = (),
        shares: bool = False,
        lowest: bool = False,
    ) -> Pass:
        """All matrices of the layer are adapted, or `targets`; it may share what layers may."""
        model = model_of(recording, spec)
        inputs = Inputs.allocate(recording, rows, rows, 64, model.bounds)
        every = [name for name in model.architecture.matrices if name != HEAD.module]
        targets = targets or every
        layout = AdapterLayout(model.architecture, [0], targets, RANK, SCALE)
        parameters, gradients = (
            recording.memory.empty_flat(layout.size, purpose="adapter") for _ in range(2)
        )
        factors, slices = layout.factors(parameters), layout.factors(gradients)
        act = allocate_layer(recording, model, inputs, factors, 0)
        theirs: set[int] = set()
        if shares:
            theirs = {id(tensor) for tensor in _tensors_of(act)}
            act = allocate_layer(recording, model, inputs, factors, 0, act)
        x, out = (
            recording.memory.empty((rows, spec.hidden_size), extent=inputs.rows) for _ in range(2)
        )
        own = own_inputs(recording, spec, inputs.rows)
        forward, backward = Program(recording), Program(recording)
        context = WithinExamples(inputs, per_layer=own)
        record_layer(forward, Walk(model, factors, context), 0, act, x, out)
        scratch = allocate_scratch(recording, model, inputs, factors)
        shared = BackwardPass(
            model, inputs, factors, {key: [one] for key, one in slices.items()}, scratch, own
        )
        record_layer_backward(backward, shared, 0, act, x, lowest=lowest)
        return cls(
            model, inputs, layout, parameters, gradients, x, out, scratch.d_x, forward, backward,
            own, tuple(tensor for tensor in _tensors_of(act) if id(tensor) in theirs),
        )  # fmt: skip


def _tensors_of(value: Any) -> list[Tensor]:
    """All tensors of a layer's activations."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    parts = value.values() if isinstance(value, Mapping) else ()
    return [tensor for part in parts for tensor in _tensors_of(part)]


def record_text(recording: Recording, model: Model, rows: int) -> tuple[Program, StepInputs, Step]:
    """New tokens of a text through the bare layer, `rows` at once."""
    inputs = StepInputs.allocate(recording, rows, model.bounds, ROOM)
    act = StepActivations.allocate(recording, model, inputs.rows)
    act = replace(act, per_layer=own_inputs(recording, model.layers[0].spec, inputs.rows))
    step = Step(model, inputs, Factors(), act, allocate_caches(recording, model, ROOM))
    program = Program(recording)
    record_step(program, step)
    return program, inputs, step


def as_gpu(recording: Recording) -> Recording:
    return replace(recording, facts=replace(recording.facts, is_cpu=False))


def paths_of() -> Mapping[str, Callable[[Recording, LayerSpec], Program]]:
    """The ways through a layer, each recorded."""

    def text(rows: int, gpu: bool) -> Callable[[Recording, LayerSpec], Program]:
        def record(recording: Recording, spec: LayerSpec) -> Program:
            where = as_gpu(recording) if gpu else recording
            return record_text(where, model_of(where, spec), rows)[0]

        return record

    return {
        "forward": lambda recording, spec: Pass.record(recording, spec).forward,
        "backward": lambda recording, spec: Pass.record(recording, spec).backward,
        "piece of a prompt": text(8, gpu=False),
        "one row": text(1, gpu=False),
        "one row, fused": text(1, gpu=True),
    }
