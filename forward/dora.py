"""DoRA (Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation"), as PEFT trains it.

y = c ∘ (x · Wᵀ + s · z · Bᵀ) + bias with c = m / ‖W + s · B · A‖, row by row of W. The lengths
follow the factors from step to step, and count as constants in the gradient. They are found from
the sum, which nothing stores, of matrices of one shape together; no dispatch waits for another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lora.forward.model.factors import DoraTensors, Factors, LoraFactors
from lora.forward.model.frozen_model import Model
from lora.forward.model.weights import FrozenMatrix
from lora.forward.part_product import adapted_members
from lora.shaders.activations import check_f32, check_shape, extent_of
from lora.shaders.facts import DeviceFacts
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

_ROWS = 8  # of a team of lanes that finds lengths: all read A once
_MOST_LANES, _CPU_LANES = 256, 16
_STAGING_TEAMS = 2  # of a workgroup that copies its rows into its memory first
_MOST_STAGED = 16000  # bytes of these: rows that are longer fill a GPU by themselves
_SUM_BYTES = 4608 + 16  # of workgroup memory: where lanes meet, what an eight reads behind rows
_AT_ONCE = 8  # rows of A that a lane loads before it uses the first
_OTHER_BUFFERS = 3  # that it binds beside the weights


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
class DoraGroup:
    """A group's matrix, and its factors with their magnitudes and `DoraTensors`."""

    matrix: FrozenMatrix
    lora: LoraFactors


@dataclass(frozen=True)
class Dora:
    """The lengths of an adapter's rows, on the device.

    Attributes:
        factors: of the adapter, each group with its `DoraTensors`.
        groups: those of the layers.
        update: a program that finds the lengths, to be run after each change of the adapter.
    """

    factors: Factors
    groups: Sequence[DoraGroup]
    update: Program

    @classmethod
    def allocate(cls, recording: Recording, model: Model, factors: Factors) -> Dora:
        """For factors with magnitudes.

        Args:
            factors: of `AdapterLayout.factors`, none of the head.
        """
        matrices = [model.layers[layer].matrices[group] for layer, group in factors.groups]
        tensors = allocate_lengths(recording, matrices)
        groups = [
            DoraGroup(matrix, replace(lora, dora=own))
            for matrix, (_, lora), own in zip(matrices, factors.items(), tensors, strict=True)
        ]
        found = {key: one.lora for key, one in zip(factors.groups, groups, strict=True)}
        dora = cls(replace(factors, groups=found), groups, Program(recording))
        dora.record_update(dora.update)
        return dora

    def record_update(self, program: Program) -> None:
        """Appends what finds scales and inverse lengths of the factors as they are."""
        row_lengths(program, self.groups)


def allocate_lengths(
    recording: Recording, matrices: Sequence[FrozenMatrix]
) -> tuple[DoraTensors, ...]:
    """Those of groups with these matrices, all in one buffer, as where nothing is adapted."""
    sizes = [_sizes(matrix) for matrix in matrices]
    whole = np.ones(sum(map(sum, sizes)), np.float32)
    at = 0
    for of_scales, *others in sizes:
        whole[at + of_scales : at + 2 * of_scales] = 0.0  # the inverses
        at += of_scales + sum(others)
    flat, at = recording.memory.upload(whole, purpose="adapter"), 0
    found = []
    for matrix, (of_scales, _, *of_parts) in zip(matrices, sizes, strict=True):
        scales = flat.slice(at, at + matrix.out_features)
        inverses = flat.slice(at + of_scales, at + of_scales + matrix.out_features)
        at, powers = at + 2 * of_scales, []
        for part, size in zip(matrix.parts, of_parts, strict=True):
            powers.append(flat.slice(at, at + part.out_features + 2))
            at += size
        found.append(DoraTensors(scales, inverses, tuple(powers)))
    return tuple(found)


def _sizes(matrix: FrozenMatrix) -> list[int]:
    """Of scales, inverses and each part's powers, in whole bindings of 64 numbers."""
    width = matrix.out_features
    return [-(-n // 64) * 64 for n in (width, width, *(p.out_features + 2 for p in matrix.parts))]


@dataclass(frozen=True)
class _Rows:
    """A part's rows whose lengths are found; those of equal `constants` share a dispatch.

    Attributes:
        words: of the part.
    """

    words: Tensor
    lora: LoraFactors
    constants: dict[str, Any]
    flops: int

    @property
    def stretch(self) -> tuple[int, int]:
        """Bytes of the adapter's buffer from A's first to the magnitudes' last."""
        last = self.lora.magnitude
        assert last is not None
        return self.lora.a.offset, last.offset + last.n_bytes


def row_lengths(program: Program, groups: Sequence[DoraGroup]) -> None:
    """Appends the scales, inverse lengths and powers of all adapted rows.

    A group's A, B and magnitudes lie in one buffer, in this order; what is written lies in one, of
    `allocate_lengths`. Matrices of one shape, of many layers, share a dispatch where a device binds
    them and their rows are short: a GPU does little else while it finds those of one.
    """
    alike: dict[str, list[_Rows]] = {}
    for group in groups:
        for one in _rows_of(program.recording, group):
            alike.setdefault(repr(one.constants), []).append(one)
    for rows in alike.values():
        for batch in _batches(program.recording, rows):
            _record(program, batch)


def _rows_of(recording: Recording, group: DoraGroup) -> Iterator[_Rows]:
    """Of the parts that have adapted rows."""
    matrix, lora, dora = group.matrix, group.lora, group.lora.dora
    if dora is None or lora.magnitude is None:
        raise ValueError("row_lengths: these factors have no magnitudes")
    check_shape("row_lengths factor", lora.a, None, matrix.in_features)
    check_shape("row_lengths scales", dora.scales, matrix.out_features)
    for part, powers in zip(matrix.parts, dora.powers, strict=True):
        teams, team_lanes = _teams(recording, matrix, part.words.shape[1], lora.rank)
        members: list[dict[str, Any]] = []
        n_groups = 0
        for member in adapted_members(lora, part):
            scale = lora.scale * lora.projection_scale(member["low_start"] // lora.rank)
            of_member = -(-(member["stop"] - member["start"]) // (_ROWS * teams))
            more = {"scale": scale, "first_group": n_groups, "n_groups": of_member}
            members.append({**member, **more})
            n_groups += of_member
        if members:
            constants = {
                "quantization": part.quantization.name,
                "columns": matrix.in_features,
                "row_words": part.words.shape[1],
                "first_feature": part.first_feature,
                "rank": lora.rank,
                "members": members,
                "block": _ROWS,
                "whole_eights": recording.facts.is_cpu,
                "unrolled": 1 if recording.facts.is_cpu else math.gcd(lora.rank, _AT_ONCE),
                "teams": teams,
                "team_lanes": team_lanes,
                "inverses_at": (dora.inverses.offset - dora.scales.offset) // 4,
                "powers_at": (powers.offset - dora.scales.offset) // 4,
            }
            flops = 2 * lora.rank * matrix.in_features * part.out_features
            yield _Rows(part.words, lora, constants, flops)


def _batches(recording: Recording, rows: Sequence[_Rows]) -> Iterator[Sequence[_Rows]]:
    """As many as a dispatch takes, of rows that are alike."""
    facts, most = recording.facts, 1
    constants = rows[0].constants
    if _stages(facts, constants["row_words"], constants["rank"]):
        most = facts.most_storage_buffers - _OTHER_BUFFERS
    batch: list[_Rows] = []
    for one in rows:
        stretch = max(r.stretch[1] for r in (*batch, one)) - (batch or [one])[0].stretch[0]
        if len(batch) == most or stretch > facts.max_binding:
            yield batch
            batch = []
        batch.append(one)
    yield batch


def _record(program: Program, batch: Sequence[_Rows]) -> None:
    memory, staged = program.recording.memory, len(batch) > 1
    begin, end = batch[0].stretch[0], max(one.stretch[1] for one in batch)
    first, places = batch[0].lora, []
    assert first.dora is not None
    scales = first.dora.scales
    for one in batch:
        lora, dora = one.lora, one.lora.dora
        assert dora is not None and lora.magnitude is not None
        if lora.a.buffer is not first.a.buffer or lora.a.offset < begin:
            raise ValueError("row_lengths: the groups' factors lie in no order")
        at = [(tensor.offset - begin) // 4 for tensor in (lora.a, lora.b, lora.magnitude)]
        places.append([at[0] // 4, *at[1:], dora.scales.offset // 4])
    last = max(one.lora.dora.powers[-1].offset + one.lora.dora.powers[-1].n_bytes
               for one in batch if one.lora.dora is not None)  # fmt: skip
    program.dispatch(
        "dora_lengths",
        {**batch[0].constants, "n_matrices": len(batch), "staged": staged},
        [
            *(one.words for one in batch),
            replace(first.a, shape=((end - begin) // 4,), extent=None),
            memory.upload(np.array(places, np.uint32), purpose="adapter"),
            replace(scales, offset=0, shape=(last // 4,)),
        ],
        len(batch) * sum(member["n_groups"] for member in batch[0].constants["members"]),
        label="dora.lengths",
        flops=sum(one.flops for one in batch),
    )


def _teams(
    recording: Recording, matrix: FrozenMatrix, row_words: int, rank: int
) -> tuple[int, int]:
    """Of a workgroup, and the lanes of each: where no lane is without columns, or the fewest are.

    Half of a team's lanes have the lower fours of eights of columns, the others the upper ones.
    """
    facts = recording.facts
    if facts.is_cpu:
        return 1, _CPU_LANES
    teams = _STAGING_TEAMS if _stages(facts, row_words, rank) else 1
    fours = 2 * -(-matrix.in_features // 8)
    lanes = range(min(_MOST_LANES, facts.most_lanes) // teams // 16 * 16, 32, -16)
    return teams, min(lanes, key=lambda n: -(-fours // n) * n)


def _stages(facts: DeviceFacts, row_words: int, rank: int) -> bool:
    """Whether rows are short: a GPU's workgroups have room for them, and for what multiplies A's.

    Those of many matrices then share a dispatch.
    """
    rows, factors = (4 * _ROWS * _STAGING_TEAMS * n for n in (row_words, rank))
    fits = rows + factors + _SUM_BYTES <= facts.workgroup_memory
    return not facts.is_cpu and rows <= _MOST_STAGED and fits
