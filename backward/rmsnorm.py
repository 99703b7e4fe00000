"""Gradient of RMSNorm to its input (its weight is frozen)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora.backward.before import SourceBefore
from lora.forward.model.norm import Norm
from lora.forward.part_product import SizedRows
from lora.forward.plans.stretches import Stretches, check_stretches
from lora.forward.rmsnorm import adds_up, rmsnorm, row_lanes
from lora.shaders.activations import activation, check_f32, check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor


@dataclass(frozen=True)
class NormBefore(SourceBefore):
    """RMSNorm's backward of a product's gradient; attributes as arguments of `rmsnorm_backward`."""

    x: Tensor
    norm: Norm
    out: Tensor | SizedRows
    residual: Tensor | None = None

    def record(self, program: Program, product: Tensor, stretches: Stretches | None = None) -> None:
        """See `lora.forward.plans.stretches.Follower`; a product in stretches is not written."""
        rmsnorm_backward(
            program, self.x, self.norm, product, residual=self.residual,
            out=self.out, stretches=stretches, normed=self.again,
        )  # fmt: skip

    def adds_up(self, recording: Recording, width: int, splits: int) -> bool:
        """See `lora.forward.plans.stretches.Follower`."""
        return adds_up(recording, width, splits)

    def repeat(self, program: Program, out: Tensor) -> None:
        """See `SourceBefore`."""
        rmsnorm(program, self.x, self.norm, out=out)


def rmsnorm_backward(
    program: Program,
    x: Tensor,
    norm: Norm,
    d_y: Tensor,
    *,
    residual: Tensor | None = None,
    out: Tensor | SizedRows | None = None,
    stretches: Stretches | None = None,
    normed: Tensor | None = None,
) -> Tensor:  # [rows, width]
    """Appends d_x = (gradient through the norm) + residual.

    Args:
        x: [rows, width], f32 or f16, what the norm was given.
        norm: as in the forward.
        d_y: [rows, width], f32 or f16, the gradient to the norm's output.
        residual: f32 [rows, width], the gradient that flows past the norm; may be `out` itself.
        out: where to write, f32 or f16; a new f32 tensor by default. Where sizes go with its rows,
            they are written, too: what `largest_of_rows` would find. So is the copy in f16.
        stretches: where given, d_y is their sum, rounded as d_y would hold it, and d_y itself is
            neither read nor written.
        normed: [rows, width], f32 or f16; where given, what the norm gave is written there again,
            to the bits of `rmsnorm`.
    """
    extent, width = extent_of(x), x.shape[1]
    written = SizedRows(out, None) if isinstance(out, Tensor) else out
    if written is None:
        written = SizedRows(activation(program, extent, width), None)
    d_x = written.rows
    check_shape("rmsnorm_backward d_y", d_y, x.shape[0], width)
    check_shape("rmsnorm_backward output", d_x, x.shape[0], width)
    tensors = [extent.uniform, x, norm.weight, stretches.partial if stretches else d_y, d_x]
    kind = "none"
    if residual is not None:
        check_shape("rmsnorm_backward residual", residual, x.shape[0], width)
        same_buffer = residual.buffer is d_x.buffer
        if same_buffer and residual.offset != d_x.offset:
            raise ValueError("rmsnorm_backward: residual is another range of the output's buffer")
        kind = "in place" if same_buffer else "separate"
        if kind == "separate":
            tensors.append(residual)
    if stretches is not None:
        check_stretches("rmsnorm_backward", stretches, extent.maximum, width)
        if stretches.residual is not None:
            raise ValueError("rmsnorm_backward: a gradient in stretches has no residual of its own")
    if normed is not None:
        check_shape("rmsnorm_backward normed", normed, x.shape[0], width)
        tensors.append(normed)
    constants = {
        **_constants(program.recording, x, norm, d_y, written),
        "residual": kind,
        "normed_type": None if normed is None else normed.dtype,
        "picked": False,
        "splits": stretches.splits if stretches else 1,
        "maximum_rows": extent.maximum if stretches else 0,
    }
    tensors += _sizes(written)
    label = "reduce_rmsnorm_backward" if stretches else "rmsnorm_backward"
    program.dispatch("rmsnorm_backward", constants, tensors, extent.maximum, label=label)
    return d_x


def picked_rmsnorm_backward(
    program: Program, x: Tensor, norm: Norm, d_y: Tensor, slots: Tensor, out: SizedRows
) -> None:
    """Appends the gradient through a norm that was given some rows alone; that of others is 0.

    Args:
        x: [any rows, width], what the norm was given.
        d_y: as x, the gradient to the norm's output.
        slots: u32 [rows], each row's place in x, or NO_ROW; no row is picked twice.
        out: [rows, width], where to write; its sizes and its copy in f16, too, where there are any.
    """
    d_x, width = out.rows, x.shape[1]
    extent = extent_of(d_x)
    check_shape("rmsnorm_backward d_y", d_y, *x.shape)
    check_shape("rmsnorm_backward output", d_x, extent.maximum, width)
    check_shape("rmsnorm_backward slots", slots, extent.maximum)
    constants = {
        **_constants(program.recording, x, norm, d_y, out),
        "residual": "none",
        "normed_type": None,
        "picked": True,
        "splits": 1,
        "maximum_rows": 0,
    }
    tensors = [extent.uniform, x, norm.weight, d_y, d_x, *_sizes(out), slots]
    label = "picked_rmsnorm_backward"
    program.dispatch("rmsnorm_backward", constants, tensors, extent.maximum, label=label)


def _sizes(out: SizedRows) -> list[Tensor]:
    """Where the sizes of the rows go that are written, and then their copy; empty without."""
    if out.largest is None:
        if out.halves is not None:
            raise ValueError("rmsnorm_backward: a copy in f16 goes with the sizes of its rows")
        return []
    check_shape("rmsnorm_backward sizes", out.largest, out.rows.shape[0])
    if out.rows.dtype != "f32" or out.largest.dtype != "u32":
        raise ValueError("rmsnorm_backward: sizes are u32, of rows of f32")
    if out.halves is None:
        return [out.largest]
    check_shape("rmsnorm_backward copy", out.halves, *out.rows.shape)
    if out.halves.dtype != "f16":
        raise ValueError(f"rmsnorm_backward: a copy in {out.halves.dtype}, expected f16")
    return [out.largest, out.halves]


def _constants(
    recording: Recording, x: Tensor, norm: Norm, d_y: Tensor, out: SizedRows
) -> dict[str, Any]:
    """The template constants of what is read and written."""
    width = x.shape[1]
    check_shape("rmsnorm_backward weight", norm.weight, width)
    check_f32("rmsnorm_backward", weight=norm.weight)
    return {
        "width": width,
        "x_type": x.dtype,
        "d_y_type": d_y.dtype,
        "out_type": out.rows.dtype,
        "lanes": row_lanes(recording, width),
        "epsilon": norm.epsilon,
        "sized": out.largest is not None,
        "copied": out.halves is not None,
    }
