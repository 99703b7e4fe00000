"""Gradient of RMSNorm to its input (its weight is frozen)."""

from __future__ import annotations

from dataclasses import dataclass

from lora.backward.before import SourceBefore
from lora.forward.model.norm import Norm
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
    out: Tensor
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
    out: Tensor | None = None,
    stretches: Stretches | None = None,
    normed: Tensor | None = None,
) -> Tensor:  # [rows, width]
    """Appends d_x = (gradient through the norm) + residual.

    Args:
        x: [rows, width], f32 or f16, what the norm was given.
        norm: as in the forward.
        d_y: [rows, width], f32 or f16, the gradient to the norm's output.
        residual: f32 [rows, width], the gradient that flows past the norm; may be `out` itself.
        out: where to write, f32 or f16; a new f32 tensor by default.
        stretches: where given, d_y is their sum, rounded as d_y would hold it, and d_y itself is
            neither read nor written.
        normed: [rows, width], f32 or f16; where given, what the norm gave is written there again,
            to the bits of `rmsnorm`.
    """
    width = x.shape[1]
    check_shape("rmsnorm_backward weight", norm.weight, width)
    check_f32("rmsnorm_backward", weight=norm.weight)
    check_shape("rmsnorm_backward d_y", d_y, x.shape[0], width)
    extent = extent_of(x)
    d_x = out if out is not None else activation(program, extent, width)
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
        "width": width,
        "x_type": x.dtype,
        "d_y_type": d_y.dtype,
        "out_type": d_x.dtype,
        "lanes": row_lanes(program.recording, width),
        "epsilon": norm.epsilon,
        "residual": kind,
        "normed_type": None if normed is None else normed.dtype,
        "splits": stretches.splits if stretches else 1,
        "maximum_rows": extent.maximum if stretches else 0,
    }
    label = "reduce_rmsnorm_backward" if stretches else "rmsnorm_backward"
    program.dispatch("rmsnorm_backward", constants, tensors, extent.maximum, label=label)
    return d_x
