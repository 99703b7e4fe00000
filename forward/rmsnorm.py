"""RMSNorm (Zhang & Sennrich 2019, "Root Mean Square Layer Normalization")."""

from __future__ import annotations

from dataclasses import dataclass

from lora.forward.model.factors import LoraFactors
from lora.forward.model.norm import Norm
from lora.forward.plans.stretches import Stretches, check_stretches, scaled_columns
from lora.shaders.activations import activation, check_f32, check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

# Fewest lanes a row, and quads of columns a lane until there are more lanes. A GPU waits for
# memory: few quads, all loaded at once. A CPU device runs 8 lanes as one vector and pays
# for each vector that meets a barrier; past 16 quads its compiler takes seconds.
GPU_LANES, GPU_QUADS = 64, 4
CPU_LANES, CPU_QUADS = 16, 16
_MOST_LANES = 256  # of a workgroup, on every device
# Most vec4s of partial sums that a lane loads at once: half of the 255 registers of a GPU's lane.
MOST_PARTIAL_QUADS = 32


# Lanes that share a sum of z. Each row's workgroup reads all of A: bytes that this may come to, of
# all rows together; beyond it A is read for many rows at a time, by a dispatch of its own.
_SHARING = 8
MOST_LOW_BYTES = 16 << 20


@dataclass(frozen=True)
class LowRank:
    """z = y · Aᵀ of what a norm gives, written in its dispatch: see `writes_low_rank`.

    Attributes:
        lora: of the product that takes y.
        z: [rows, members · rank].
    """

    lora: LoraFactors
    z: Tensor


def writes_low_rank(recording: Recording, rows: int, lora: LoraFactors) -> bool:
    """Whether a norm writes the z of the product that takes what it gives.

    On GPUs, where rows are so few that reading A for each costs less than a dispatch. Members'
    scales, and dropout, are for `lora_project`.
    """
    width = lora.a.shape[1]
    shared = 4 * (width + 2 * _SHARING * lora.a.shape[0] + 1024)  # sums of lanes and rows included
    few = rows * lora.a.size * 4 <= MOST_LOW_BYTES and shared <= recording.facts.workgroup_memory
    return few and not recording.facts.is_cpu and not lora.member_scales


def row_lanes(recording: Recording, width: int) -> int:
    """Lanes of the workgroup that norms one row of `width` columns."""
    if width % 4:
        raise ValueError(f"rmsnorm: a width of {width} is no multiple of 4")
    lanes, quads = (CPU_LANES, CPU_QUADS) if recording.facts.is_cpu else (GPU_LANES, GPU_QUADS)
    while lanes < _MOST_LANES and 4 * quads * lanes < width:
        lanes *= 2
    return lanes


def adds_up(recording: Recording, width: int, splits: int) -> bool:
    """Whether a norm over rows of `width` columns can take a product in so many stretches."""
    steps = -(-width // (4 * row_lanes(recording, width)))
    return steps * splits <= MOST_PARTIAL_QUADS


@dataclass(frozen=True)
class NormAfter:
    """RMSNorm of a product; attributes as the arguments of `rmsnorm`."""

    norm: Norm
    out: Tensor
    residual: Tensor | None = None
    low: LowRank | None = None
    scales_columns = True

    def record(self, program: Program, product: Tensor, stretches: Stretches | None = None) -> None:
        """See `Follower`; the product is written in either case."""
        rmsnorm(
            program, product, self.norm, residual=self.residual, out=self.out,
            stretches=stretches, low=self.low,
        )  # fmt: skip

    def adds_up(self, recording: Recording, width: int, splits: int) -> bool:
        """See `Follower`."""
        return adds_up(recording, width, splits)


def rmsnorm(
    program: Program,
    x: Tensor,
    norm: Norm,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    stretches: Stretches | None = None,
    low: LowRank | None = None,
    sizes: Tensor | None = None,
) -> Tensor:  # [rows, width]
    """Appends y = x / sqrt(mean(x²) + epsilon) · weight + residual, row by row.

    Args:
        x: [rows, width], f32 or f16, width a multiple of 4.
        norm: of that width.
        residual: f32 [rows, width], added where given; not the tensor `out`.
        out: where to write, f32 or f16; a new f32 tensor by default.
        stretches: where given, x is first written as their sum (scaled, and its residual).
        low: where given, z of y as it is stored is written, too.
        sizes: u32 [rows]; where given, `out` is f16 and has y as `SizedRows.halves` does, and this
            is written with the sizes that go with it. Not with stretches or z.
    """
    width = x.shape[1]
    check_shape("rmsnorm weight", norm.weight, width)
    extent = extent_of(x)
    y = out if out is not None else activation(program, extent, width)
    check_shape("rmsnorm output", y, x.shape[0], width)
    check_f32("rmsnorm", weight=norm.weight, residual=residual)
    tensors = [extent.uniform, stretches.partial if stretches else x, norm.weight, y]
    if residual is not None:
        check_shape("rmsnorm residual", residual, x.shape[0], width)
        tensors.append(residual)
    kept_type = None
    if stretches is not None:
        check_stretches("rmsnorm", stretches, extent.maximum, width)
        tensors.append(x)
        if stretches.residual is not None:
            check_shape("rmsnorm residual of x", stretches.residual, x.shape[0], width)
            tensors.append(stretches.residual)
        scaled = scaled_columns("rmsnorm", stretches, x.shape[0], width)
        kept_type = scaled[-1].dtype if scaled else None
        tensors += scaled
    if sizes is not None:
        check_shape("rmsnorm sizes", sizes, x.shape[0])
        if y.dtype != "f16" or sizes.dtype != "u32" or stretches is not None or low is not None:
            raise ValueError("rmsnorm: u32 sizes go with f16 alone, without stretches or z")
        tensors.append(sizes)
    low_width = 0
    if low is not None:
        low_width = low.lora.a.shape[0]
        check_shape("rmsnorm factor", low.lora.a, low_width, width)
        check_shape("rmsnorm low rank", low.z, x.shape[0], low_width)
        check_f32("rmsnorm", factor=low.lora.a, z=low.z)
        tensors += [low.lora.a, low.z]
    constants = {
        "width": width,
        "x_type": x.dtype,
        "out_type": y.dtype,
        "lanes": row_lanes(program.recording, width),
        "epsilon": norm.epsilon,
        "residual": residual is not None,
        "splits": stretches.splits if stretches else 1,
        "maximum_rows": extent.maximum if stretches else 0,
        "x_residual": stretches is not None and stretches.residual is not None,
        "kept_type": kept_type,
        "sized": sizes is not None,
        "low_width": low_width,
        "sharing": _SHARING,
    }
    label = "reduce_rmsnorm" if stretches else "rmsnorm"
    program.dispatch("rmsnorm", constants, tensors, extent.maximum, label=label)
    return y
