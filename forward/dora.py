"""DoRA (Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation"), as PEFT trains it.

y = c ∘ (x · Wᵀ + s · z · Bᵀ) + bias with c = m / ‖W + s · B · A‖, row by row of W. The lengths
follow the factors from step to step, and count as constants in the gradient. They are found without
the sum: ‖W‖ is known, and A · Wᵀ and A · Aᵀ are small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lora.forward.lora import lora_project
from lora.forward.matmul import matmul
from lora.forward.model.factors import DoraTensors, Factors, LoraFactors
from lora.forward.model.frozen_model import Model
from lora.forward.model.weights import FrozenMatrix
from lora.forward.product import Product
from lora.shaders.activations import check_f32, check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor


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


def row_squares(program: Program, matrix: FrozenMatrix, out: Tensor) -> None:
    """Appends out[n] = ‖W_n‖², f32 [out_features]."""
    check_shape("row_squares", out, matrix.out_features)
    for part in matrix.parts:
        place = program.recording.memory.constant_uniform((part.first_feature,))
        constants = {
            "quantization": part.quantization.name,
            "rows": part.out_features,
            "columns": matrix.in_features,
            "row_words": part.words.shape[1],
        }
        program.dispatch("row_squares", constants, [place, part.words, out], part.out_features)


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
class DoraGroup:
    """One group's factors and matrix, and room for A · Wᵀ and A · Aᵀ."""

    matrix: FrozenMatrix
    lora: LoraFactors
    products: Tensor
    grams: Tensor
    extent: Extent


@dataclass(frozen=True)
class Dora:
    """The lengths of an adapter's rows, on the device.

    Attributes:
        factors: of the adapter, each group with its `DoraTensors`.
        measure: a program that finds the lengths of the base's rows, to be run once.
        update: a program that finds those of the adapted rows, to be run after each change of the
            adapter.
    """

    factors: Factors
    groups: Mapping[tuple[int, str], DoraGroup]
    measure: Program
    update: Program

    @classmethod
    def allocate(cls, recording: Recording, model: Model, factors: Factors) -> Dora:
        """For factors with magnitudes.

        Args:
            factors: of `AdapterLayout.factors`, none of the head.
        """
        memory, found, groups = recording.memory, {}, {}
        room: dict[tuple[int, int], tuple[Tensor, Tensor, Extent]] = {}
        for (layer, group), lora in factors.items():
            matrix = model.layers[layer].matrices[group]
            low, width = lora.n_members * lora.rank, matrix.out_features
            if (low, width) not in room:
                extent = memory.extent(low)
                room[low, width] = (
                    memory.empty((low, width), extent=extent),
                    memory.empty((low, low), extent=extent),
                    extent,
                )
            products, grams, extent = room[low, width]
            vectors = [memory.empty((width,), purpose="adapter") for _ in range(3)]
            found[layer, group] = replace(lora, dora=DoraTensors(*vectors))
            groups[layer, group] = DoraGroup(matrix, found[layer, group], products, grams, extent)
        measure = Program(recording)
        for one in groups.values():
            assert one.lora.dora is not None
            row_squares(measure, one.matrix, one.lora.dora.squares)
        of_adapter = replace(factors, groups=found)
        dora = cls(of_adapter, groups, measure, Program(recording))
        dora.record_update(dora.update)
        return dora

    def record_update(self, program: Program) -> None:
        """Appends what finds scales and inverse lengths of the factors as they are."""
        with program.scope("dora"):
            for (layer, group), one in self.groups.items():
                with program.scope(f"layers.{layer}"):
                    record_scales(program, one, group)


def record_scales(program: Program, one: DoraGroup, label: str) -> None:
    """Appends the scales of one group."""
    lora, dora = one.lora, one.lora.dora
    if dora is None or lora.magnitude is None:
        raise ValueError(f"{label}: these factors have no magnitudes")
    a = replace(lora.a, extent=one.extent)
    matmul(program, Product(a, one.matrix), out=one.products, label=f"{label}.a_w")
    plain = replace(lora, member_scales=())
    lora_project(program, a, plain, out=one.grams, label=f"{label}.a_a")
    columns = one.matrix.out_features
    program.dispatch(
        "dora_scales",
        {"rank": lora.rank, "columns": columns, "members": member_constants(lora)},
        [
            lora.b, one.products, one.grams, dora.squares, lora.magnitude, dora.scales,
            dora.inverses,
        ],
        -(-columns // 64),
        label=f"{label}.scales",
    )  # fmt: skip
