"""DoRA (Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation"), as PEFT trains it.

y = c ∘ (x · Wᵀ + s · z · Bᵀ) + bias with c = m / ‖W + s · B · A‖, row by row of W. The lengths
follow the factors from step to step, and count as constants in the gradient. They are found from
the sum, which nothing stores: a dispatch for each part of W, none of which waits for another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lora.forward.model.factors import DoraTensors, Factors, LoraFactors
from lora.forward.model.frozen_model import Model
from lora.forward.model.weights import FrozenMatrix
from lora.forward.part_product import adapted_members
from lora.shaders.activations import check_f32, check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

_ROWS = 4  # of a workgroup that finds lengths: see dora_lengths.wgsl
_MOST_LANES, _CPU_LANES = 256, 16


def member_constants(lora: LoraFactors) -> list[dict[str, Any]]:
    """Where each member's columns and rows of B lie, and its scale, for templates."""
    return [
        {
            "start": start,
            "stop": stop,
            "first": lora.first_feature(index),
            "scale": lora.scale * lora.projection_scale(index),
        }
        for index, (start, stop) in enumerate(lora.ranges)
    ]


def scale_columns(
    program: Program,
    x: Tensor,
    scales: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    label: str = "scale_columns",
) -> None:
    """Appends out[m, j] = scales[j] · x[m, j] + bias[j] + residual[m, j].

    Args:
        x: [rows, width], f32 or f16; so is out.
        scales: f32 [width].
        bias: f32 [width].
        residual: f32 [rows, width]; not out itself.
    """
    rows, width = x.shape
    check_shape(f"{label} scales", scales, width)
    check_shape(f"{label} output", out, rows, width)
    check_f32(label, scales=scales, bias=bias, residual=residual)
    if width % 4:
        raise ValueError(f"{label}: {width} columns are no multiple of 4")
    extent = extent_of(x)
    tensors = [extent.uniform, x, scales, out]
    tensors += [tensor for tensor in (bias, residual) if tensor is not None]
    program.dispatch(
        "scale_columns",
        {
            "width": width,
            "x_type": x.dtype,
            "y_type": out.dtype,
            "bias": bias is not None,
            "residual": residual is not None,
        },
        tensors,
        -(-extent.maximum * (width // 4) // 64),
        label=label,
    )


@dataclass(frozen=True)
class Dora:
    """The lengths of an adapter's rows, on the device.

    Attributes:
        factors: of the adapter, each group with its `DoraTensors`.
        matrices: of the groups.
        update: a program that finds the lengths, to be run after each change of the adapter.
    """

    factors: Factors
    matrices: Mapping[tuple[int, str], FrozenMatrix]
    update: Program

    @classmethod
    def allocate(cls, recording: Recording, model: Model, factors: Factors) -> Dora:
        """For factors with magnitudes.

        Args:
            factors: of `AdapterLayout.factors`, none of the head.
        """
        matrices = {
            (layer, group): model.layers[layer].matrices[group] for layer, group in factors.groups
        }
        found = {
            key: replace(lora, dora=dora_tensors(recording, matrices[key]))
            for key, lora in factors.items()
        }
        dora = cls(replace(factors, groups=found), matrices, Program(recording))
        dora.record_update(dora.update)
        return dora

    def record_update(self, program: Program) -> None:
        """Appends what finds scales and inverse lengths of the factors as they are."""
        with program.scope("dora"):
            for (layer, group), lora in self.factors.items():
                with program.scope(f"layers.{layer}"):
                    row_lengths(program, self.matrices[layer, group], lora, f"{group}.lengths")


def dora_tensors(recording: Recording, matrix: FrozenMatrix) -> DoraTensors:
    """As columns have them that nothing adapts."""

    def ones(n: int) -> Tensor:
        return recording.memory.upload(np.ones(n, np.float32), purpose="adapter")

    return DoraTensors(
        scales=ones(matrix.out_features),
        inverses=recording.memory.empty((matrix.out_features,), purpose="adapter"),
        powers=tuple(ones(part.out_features + 2) for part in matrix.parts),
    )


def row_lengths(program: Program, matrix: FrozenMatrix, lora: LoraFactors, label: str) -> None:
    """Appends the scales, inverse lengths and powers of a group's adapted rows.

    Args:
        lora: with its magnitudes and `DoraTensors`.
    """
    dora = lora.dora
    if dora is None or lora.magnitude is None:
        raise ValueError(f"{label}: these factors have no magnitudes")
    check_shape(f"{label} factor", lora.a, None, matrix.in_features)
    check_shape(f"{label} scales", dora.scales, matrix.out_features)
    check_f32(label, a=lora.a, b=lora.b, magnitudes=lora.magnitude)
    for part, powers in zip(matrix.parts, dora.powers, strict=True):
        check_shape(f"{label} powers", powers, part.out_features + 2)
        members: list[dict[str, Any]] = []
        n_groups = 0
        for member in adapted_members(lora, part):
            of_member = -(-(member["stop"] - member["start"]) // _ROWS)
            scale = lora.scale * lora.projection_scale(member["low_start"] // lora.rank)
            members.append(
                {**member, "scale": scale, "first_group": n_groups, "n_groups": of_member}
            )
            n_groups += of_member
        if not members:
            continue
        constants = {
            "quantization": part.quantization.name,
            "columns": matrix.in_features,
            "row_words": part.words.shape[1],
            "first_feature": part.first_feature,
            "rank": lora.rank,
            "members": members,
            "lanes": _lanes(program.recording, matrix.in_features),
        }
        tensors = [part.words, lora.a, lora.b, lora.magnitude, dora.scales, dora.inverses, powers]
        flops = 2 * lora.rank * matrix.in_features * part.out_features
        program.dispatch("dora_lengths", constants, tensors, n_groups, label=label, flops=flops)


def _lanes(recording: Recording, columns: int) -> int:
    """Of a workgroup: as many as there are eights of columns, or a whole part of these."""
    if recording.facts.is_cpu:
        return _CPU_LANES
    eights = -(-columns // 8)
    turns = -(-eights // _MOST_LANES)
    return max(64, -(-eights // (32 * turns)) * 32)
