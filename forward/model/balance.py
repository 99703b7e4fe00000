"""A model as f16 can hold it: the same function, with powers of two between its tensors.

f16 ends at 65,504 and has few bits below 2^-14, and what models store between their products may
be beyond (Gemma 3 after norms and before down_proj, Gemma 4's gate and up). How large it can
become follows from the weights: a row that passed an RMSNorm of n columns has a length of sqrt(n),
so that |x · w| ≤ sqrt(n) · |weight of the norm · w| (Cauchy and Schwarz). Where such a bound passes
2^15 the tensor is stored as so many powers of two less, in whoever writes it and whoever reads it;
gradients follow by the chain rule. Matrices that f16 would not hold are multiplied in their
tiles alone. A model that needs none of it stays as it is, bit for bit.

What has no bound stays, too: what models without pre norms give to their blocks, the inside of
DeltaNets and convolutions, what a layer's own input adds (Gemma 3n and 4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from lora.forward.model.adaptable import AdaptableMatrix
from lora.forward.model.frozen_model import LayerWeights, Model
from lora.forward.model.layer_spec import NO_NORM, Attention, GatedFeedForward
from lora.forward.model.norm import Norm
from lora.forward.model.powers import AS_THEY_ARE, LayerPowers
from lora.forward.model.weights import FrozenMatrix, MatrixPart
from lora.shaders.memory import Memory
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

_BEFORE = ("mixer_norm", "feed_forward_norm")  # what they give is another multiple
# Bounds outside these are brought to 2^11 and 2^4: half of what f16 holds is left to adapters, and
# bounds are loose by two or three powers of ten, most of it for a product of two.
LEAST, LIMIT = 2.0**-4, 2.0**15
# Only a norm reads what a block gives to it, so that its bound may be the limit; sums of 32
# products, which are f16 in the plain body, stay below it, too. Behind a gated activation all gates
# and ups are along one row at once in that bound: Gemma 3's matrices stay 2^3.9 … 2^6.2 below it by
# their spectral norms (ten layers), its texts 2^15 … 2^23. It may pass the limit by 2^4 there, so
# that small rows keep f16's bits; what passes 65,504 all the same is infinite: the loss shows it.
_BEFORE_NORM, _GATED_BEFORE_NORM = LIMIT, 2.0**4 * LIMIT
# The same of a matrix's largest weight, brought to 2^-6: the plain body sums 32 products in f16.
_LEAST_WEIGHT, _MOST_WEIGHT = 2.0**-10, 2.0**4


@dataclass(frozen=True)
class _Bounds:
    """Of each row of a matrix, [out_features]: see row_bounds.wgsl."""

    length: np.ndarray
    sum: np.ndarray
    largest: np.ndarray


@dataclass(frozen=True)
class _Source:
    """What a group of matrices reads.

    Attributes:
        weights: of each column, [in_features], in the bounds of a row's sum.
        length: of a row, where that is divided by these weights; None where they are themselves
            what a column can be at most.
        down: as how many powers of two less it is stored.
    """

    weights: np.ndarray
    length: float | None
    down: int


@dataclass
class LayerBalance:
    """As how many powers of two less a layer's numbers are stored.

    Attributes:
        down: of each row of a group's matrix, [out_features]: what comes out.
        up: what goes in, by group.
        largest: of each row's weights, by group.
        norms: what a norm before a block gives, or one after it is given, by its name in
            `LayerWeights`.
        gate, gated: of the gate and of the gated activation.
        heads: of q and of k together.
    """

    down: dict[str, np.ndarray] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)
    largest: dict[str, np.ndarray] = field(default_factory=dict)
    norms: dict[str, int] = field(default_factory=dict)
    gate: int = 0
    gated: int = 0
    heads: int = 0


@dataclass(frozen=True)
class Balance:
    """What f16 needs of a model, found by its weights.

    Attributes:
        layers: of each.
        head: the largest weight of each of its rows, [out_features].
    """

    layers: tuple[LayerBalance, ...]
    head: np.ndarray


@dataclass(frozen=True)
class _Layer:
    """A layer whose weights are there, and what has been found of it."""

    recording: Recording
    weights: LayerWeights
    found: LayerBalance = field(default_factory=LayerBalance)

    def sizes(self, group: str, source: _Source | None) -> np.ndarray | None:
        """What each row of a group's matrix gives at most, [out_features]; None for no bound."""
        matrix, found = self.weights.matrices[group], self.found
        n = matrix.in_features
        bounds = row_bounds(
            self.recording, matrix, np.ones(n) if source is None else source.weights
        )
        found.largest[group] = bounds.largest
        found.down[group] = np.zeros(matrix.out_features, np.int64)
        found.up[group] = 0 if source is None else source.down
        if source is None:
            return None
        most = bounds.sum if source.length is None else source.length * bounds.length
        bias = self.weights.biases.get(group)
        return most if bias is None else most + np.abs(self.recording.memory.read(bias))


def find_balance(recording: Recording, model: Model) -> Balance:
    """Reads a model's weights on the device, once."""
    layers = tuple(_found_of(_Layer(recording, weights)) for weights in model.layers)
    head = row_bounds(recording, model.head, np.ones(model.head.in_features)).largest
    return Balance(layers, head)


def balanced(recording: Recording, model: Model, balance: Balance) -> Model:
    """The model with what f16 needs; itself where that is nothing.

    On memory that only counts, too: whatever is allocated on a device is counted there.
    """
    layers = tuple(map(partial(_applied, recording), model.layers, balance.layers))
    head = _powered(recording, model.head, np.zeros(len(balance.head), np.int64), balance.head)
    if head is model.head and all(a is b for a, b in zip(layers, model.layers, strict=True)):
        return model
    return replace(model, layers=layers, head=head)


def row_bounds(recording: Recording, matrix: FrozenMatrix, v: np.ndarray) -> _Bounds:
    """The sizes of a matrix's rows, each column weighed by v [in_features].

    Its length is sqrt(Σ (v · w)²), its sum Σ |v · w|, its largest max |w|.
    """
    memory = recording.memory.inner()
    try:
        program, found = Program(replace(recording, memory=memory)), []
        weights = memory.upload(v.astype(np.float32))
        for part in matrix.parts:
            found.append(memory.empty((part.out_features, 4)))
            record_row_bounds(program, part, weights, found[-1])
        program.run()
        values = np.concatenate([memory.read(tensor) for tensor in found]).astype(np.float64)
    finally:
        memory.close()
    return _Bounds(np.sqrt(values[:, 0]), values[:, 1], values[:, 2])


def record_row_bounds(program: Program, part: MatrixPart, v: Tensor, bounds: Tensor) -> None:
    """Appends what row_bounds.wgsl says, of one part.

    Args:
        program: what is appended to.
        part: of the matrix.
        v: f32 [in_features].
        bounds: f32 [out_features, 4].
    """
    rows, row_words = part.words.shape
    constants = {
        "quantization": part.quantization.name, "rows": rows, "columns": v.size,
        "row_words": row_words,
    }  # fmt: skip
    program.dispatch("row_bounds", constants, [part.words, v, bounds], rows)


def _down(bounds: np.ndarray, limit: float = LIMIT, to: float = 2.0**11) -> int:
    """As how many powers of two less than these bounds something is stored; often none.

    Bounds above `limit` are brought to `to`.
    """
    most = float(bounds.max(initial=0.0))
    if most > limit:
        return math.ceil(math.log2(min(most, 2.0**100) / to))
    return math.floor(math.log2(max(most, 2.0**-100))) - 4 if 0.0 < most < LEAST else 0


def _found_of(layer: _Layer) -> LayerBalance:
    spec = layer.weights.spec
    mixer, feed_forward = spec.mixer, spec.feed_forward
    source = _after_norm(layer, "mixer_norm")
    if isinstance(mixer, Attention):
        attended = _qkv(layer, mixer, source)
        _output(layer, "attn_output", attended, "post_mixer_norm", _BEFORE_NORM)
    else:
        _others(layer, mixer.matrices, source)
    source = _after_norm(layer, "feed_forward_norm")
    if isinstance(feed_forward, GatedFeedForward):
        gated = _gate_up(layer, feed_forward, source)
        _output(layer, "down", gated, "post_feed_forward_norm", _GATED_BEFORE_NORM)
    else:
        _others(layer, feed_forward.matrices, source)
    if spec.per_layer is not None:
        _others(layer, spec.per_layer.matrices, None)
    return layer.found


def _after_norm(layer: _Layer, name: str) -> _Source | None:
    """Finds the power of what a norm before a block gives; what that is, if there is a norm."""
    norm: Norm | None = getattr(layer.weights, name)
    if norm is None:
        return None
    values = layer.recording.memory.read(norm.weight)
    length = math.sqrt(len(values))
    layer.found.norms[name] = down = _down(length * np.abs(values))
    return _Source(np.abs(values), length, down)


def _qkv(layer: _Layer, mixer: Attention, source: _Source | None) -> _Source | None:
    """Finds the powers of q, k and v; what attention then gives."""
    sizes = layer.sizes("qkv", source)
    per_group = mixer.n_heads // mixer.n_kv_heads
    if mixer.value_norm:
        n = mixer.head_size
        of_values, down = np.full(mixer.kv_size, math.sqrt(n)), 0
    if sizes is not None:
        first = mixer.query_rows + mixer.kv_size  # of v
        parts = [slice(0, mixer.query_rows), slice(mixer.query_rows, first), slice(first, None)]
        if mixer.value_norm or len(layer.weights.spec.groups["qkv"]) == 1:
            parts = [slice(None)] * 3  # normed with one epsilon, or one module
        elif mixer.qk_norm != NO_NORM:
            parts[:2] = [slice(0, first)] * 2
        queries, keys, values = (_down(sizes[part]) for part in parts)
        if mixer.output_gate:
            queries = keys = 0  # the gate lies among the rows of q, and is no linear one
        for part, down in zip(parts, (queries, keys, values), strict=True):
            layer.found.down["qkv"][part] = down
        layer.found.heads = queries + keys
        if not mixer.value_norm:
            of_values, down = sizes[first:], values
    elif not mixer.value_norm:
        return None
    by_head = of_values.reshape(mixer.n_kv_heads, -1).repeat(per_group, axis=0)
    return _Source(by_head.reshape(-1), None, down)


def _gate_up(layer: _Layer, block: GatedFeedForward, source: _Source | None) -> _Source | None:
    """Finds the powers of gate and up; what the gated activation then gives."""
    sizes = layer.sizes("gate_up", source)
    if sizes is None:
        return None
    n = block.intermediate_size
    gate, up = _down(sizes[:n]), _down(sizes[n:])
    if len(layer.weights.spec.groups["gate_up"]) == 1:
        gate = up = max(gate, up)
    layer.found.down["gate_up"][:n], layer.found.down["gate_up"][n:] = gate, up
    product = sizes[:n] * sizes[n:]  # no activation gives more than it is given
    layer.found.gate, layer.found.gated = gate, _down(product * 2.0**-up)
    return _Source(product, None, up + layer.found.gated)


def _output(layer: _Layer, group: str, source: _Source | None, norm: str, limit: float) -> None:
    """Finds the power of what a block gives, where a norm follows that takes it out again."""
    sizes = layer.sizes(group, source)
    if sizes is not None and getattr(layer.weights, norm) is not None:
        layer.found.norms[norm] = down = _down(sizes, limit, limit)
        layer.found.down[group][:] = down


def _others(layer: _Layer, matrices: Sequence[AdaptableMatrix], source: _Source | None) -> None:
    """Matrices whose outputs have no power; those that read the norm undo that one's."""
    for group in dict.fromkeys(matrix.group for matrix in matrices):
        reads_norm = any(m.group == group and m.in_field == "hidden_size" for m in matrices)
        layer.sizes(group, source if reads_norm else None)


def _applied(recording: Recording, weights: LayerWeights, found: LayerBalance) -> LayerWeights:
    """The layer with the powers that were found; itself where there is none."""
    spec, memory = weights.spec, recording.memory
    matrices, rows, biases = {}, {}, dict(weights.biases)
    for group, matrix in weights.matrices.items():
        down = found.down[group]
        exponents = found.up[group] - down
        matrices[group] = _powered(recording, matrix, exponents, found.largest[group])
        if exponents.any():
            starts = [0, *(1 + np.flatnonzero(np.diff(exponents)))]
            rows[group] = tuple((int(start), 2.0 ** int(exponents[start])) for start in starts)
        if group in biases and down.any():
            biases[group] = _multiplied(memory, biases[group], 2.0**-down)
    changes: dict[str, Any] = {}
    for name, less in found.norms.items():
        norm: Norm = getattr(weights, name)
        if less and name in _BEFORE:
            weight = _multiplied(memory, norm.weight, 2.0**-less)
            changes[name] = replace(norm, weight=weight)
        elif less:
            changes[name] = replace(norm, epsilon=norm.epsilon * 0.25**less)
    powers = LayerPowers(rows, 2.0**found.gate, 2.0**-found.gated)
    same = all(matrices[group] is matrix for group, matrix in weights.matrices.items())
    if same and not changes and powers == AS_THEY_ARE:
        return weights
    if found.heads and isinstance(spec.mixer, Attention):
        if spec.mixer.qk_norm == NO_NORM:
            scale = spec.mixer.scale * 2.0**found.heads
            spec = replace(spec, mixer=replace(spec.mixer, scale=scale))
        else:
            spec = replace(spec, norm_epsilon=spec.norm_epsilon * 0.5**found.heads)
    return replace(weights, spec=spec, matrices=matrices, biases=biases, powers=powers, **changes)


def _multiplied(memory: Memory, vector: Tensor, factors: float | np.ndarray) -> Tensor:
    """A new vector, multiplied; of memory that only counts its size alone."""
    values = memory.read(vector) if memory.holds_data else np.zeros(vector.shape, np.float32)
    return memory.upload(values * np.asarray(factors, np.float32))


def _powered(
    recording: Recording, matrix: FrozenMatrix, exponents: np.ndarray, largest: np.ndarray
) -> FrozenMatrix:
    """A matrix whose rows are multiplied by powers of two, its tiles in f16's range.

    Args:
        recording: whose memory takes the powers.
        matrix: as it is.
        exponents: of its rows, [out_features].
        largest: of each row's weights, before.
    """
    parts = []
    for part in matrix.parts:
        own = slice(part.first_feature, part.first_feature + part.out_features)
        most = float((largest[own] * 2.0 ** exponents[own]).max())
        tile = 0
        if most > 0.0 and not _LEAST_WEIGHT <= most <= _MOST_WEIGHT:
            tile = -6 - round(math.log2(most))
        if tile or exponents[own].any():
            powers = 2.0 ** np.concatenate([exponents[own] + tile, [tile, -tile]])
            part = replace(part, powers=recording.memory.upload(powers.astype(np.float32)))
        parts.append(part)
    same = all(a is b for a, b in zip(parts, matrix.parts, strict=True))
    return matrix if same else replace(matrix, parts=tuple(parts))
