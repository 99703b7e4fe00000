"""Products with frozen quantized matrices, the low-rank part included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora.forward.model.adapter import LoraFactors
from lora.forward.model.weights import FrozenMatrix, MatrixPart
from lora.forward.plans.matmul_plans import Request, plan_of
from lora.forward.plans.stretches import ProductNorm, Stretches
from lora.forward.rmsnorm import adds_up
from lora.shaders.activations import activation, check_f32, check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Extent, Tensor

BODIES = ("wide", "tiled")  # for CPU devices; for GPUs

# What matmul_wide's lanes hold, measured on llvmpipe (docs/log.md).
WIDE_ROWS = 12
WIDE_LANES = 32

# Steps whose products matmul_tiled sums in f16 before f32 takes them over: twice as many would cost
# a bit of accuracy and save less than a tenth of the instructions.
HALF_CARRY = 32


@dataclass(frozen=True)
class Place:
    """Where one part's columns begin in x and in out: parts of a matrix share their kernel so."""

    x_column: int
    out_column: int


def _uniforms(program: Program, place: Place | None) -> list[Tensor]:
    if place is None:
        return []
    return [program.recording.memory.constant_uniform((place.x_column, place.out_column))]


def matmul(
    program: Program,
    x: Tensor,
    matrix: FrozenMatrix,
    *,
    lora: LoraFactors | None = None,
    z: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    norm: ProductNorm | None = None,
    label: str = "matmul",
) -> Tensor:  # [rows, out_features]
    """Appends y = cap(x · Wᵀ + scale · z · Bᵀ + bias) + residual, decoding W in the kernel's tiles.

    The low-rank part is a few more steps of the same contraction (Hu et al. 2021, "LoRA").

    Args:
        x: [rows, in_features].
        matrix: W [out_features, in_features].
        lora: the factors of the adapted members of W, or None.
        z: [rows, members · rank] = x · Aᵀ, needed with `lora`.
        bias: [out_features], added where given.
        softcap: y becomes softcap · tanh(y / softcap); None for none.
        residual: [rows, out_features], added where given; not the tensor `out`.
        out: where to write; a new tensor by default.
        norm: a norm of y, appended too: with what finishes the product, where that is a second
            pass of its own.
    """
    extent = extent_of(x)
    if bias is not None:
        check_shape("matmul bias", bias, matrix.out_features)
    check_shape("matmul input", x, None, matrix.in_features)
    y = out if out is not None else activation(program, extent, matrix.out_features)
    check_shape("matmul output", y, x.shape[0], matrix.out_features)
    whole = len(matrix.parts) == 1
    for part in matrix.parts:
        record_product(
            program,
            extent,
            x,
            part,
            y,
            transposed=False,
            contraction=matrix.in_features,
            place=None if whole else Place(0, part.first_feature),
            members=adapted_members(lora, part),
            low=z,
            factor=lora.b if lora else None,
            rank=lora.rank if lora else 0,
            scale=lora.scale if lora else 1.0,
            residual=residual,
            bias=bias,
            softcap=softcap,
            epilogue="write" if residual is None else "residual",
            norm=norm if whole else None,
            label=label,
        )
    if norm is not None and not whole:
        norm.record(program, y)
    return y


def adapted_members(lora: LoraFactors | None, part: MatrixPart) -> list[dict[str, int]]:
    """The adapted ranges inside a part: columns of the part, columns of z, rows of B."""
    members: list[dict[str, int]] = []
    if lora is None:
        return members
    for index, (start, stop) in enumerate(lora.ranges):
        first = max(start, part.first_feature)
        last = min(stop, part.first_feature + part.out_features)
        if first < last:
            members.append(
                {
                    "start": first - part.first_feature,
                    "stop": last - part.first_feature,
                    "low_start": index * lora.rank,
                    "factor_start": lora.first_feature(index) + first - start,
                }
            )
    return members


def record_product(
    program: Program,
    extent: Extent,
    x: Tensor,
    part: MatrixPart,
    out: Tensor,
    *,
    transposed: bool,
    contraction: int,
    place: Place | None = None,
    members: Sequence[dict[str, int]] = (),
    low: Tensor | None = None,
    factor: Tensor | None = None,
    rank: int = 0,
    scale: float = 1.0,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    epilogue: str = "write",
    norm: ProductNorm | None = None,
    label: str,
) -> None:
    """Appends the product with one part: what `matmul` and its backward share.

    transposed=False: out[m, n] = Σ_k x[m, k] · W[n, k] + scale · Σ_r low[m, r] · factor[n, r].
    transposed=True:  out[m, k] = Σ_n x[m, n] · W[n, k] + Σ_r low[m, r] · factor[r, k].

    Args:
        contraction: length of the sum over k (or n).
        place: where the part's columns begin in x and out, where there are several parts.
        members: the adapted stretches of columns; see the body of matmul_wide.wgsl.
        bias, softcap: see `matmul`; the bias's columns are those of out.
        epilogue: "write", "residual" (out = residual + …) or "accumulate" (out += …).
        norm: see `matmul`; of a matrix of one part.
    """
    n_columns = out.shape[1] if transposed else part.out_features
    if contraction % 4 or n_columns % 4 or x.shape[1] % 4 or rank % 4:
        raise ValueError(f"{label}: widths must be multiples of 4: {x.shape}, {out.shape}, {rank}")
    constants: dict[str, Any] = {
        "quantization": part.quantization.name,
        "transposed": transposed,
        "contraction": contraction,
        "n_columns": n_columns,
        "row_words": part.words.shape[1],
        "x_type": x.dtype,
        "out_type": out.dtype,
        "x_stride": x.shape[1],
        "out_stride": out.shape[1],
        "placed": place is not None,
        "weight_columns": n_columns if transposed else contraction,
        "members": list(members),
        "rank": rank,
        "low_stride": low.shape[1] if members and low is not None else 0,
        "scale": scale,
        "epilogue": epilogue,
        "bias": bias is not None,
        "softcap": softcap,
    }
    tensors = [extent.uniform, x, part.words, out]
    if members:
        if low is None or factor is None:
            raise ValueError(f"{label}: an adapted matrix needs z and its factors")
        tensors += [low, factor]
    check_f32(label, low=low, factor=factor, residual=residual, bias=bias)
    if residual is not None:
        check_shape(f"{label} residual", residual, *out.shape)
    after = [tensor for tensor in (residual, bias) if tensor is not None]
    flops = 2 * extent.maximum * n_columns * (contraction + len(members) * rank)
    body = program.recording.body or ("wide" if program.recording.facts.is_cpu else "tiled")
    if body == "wide":
        constants |= {"lane_rows": WIDE_ROWS, "lanes": WIDE_LANES}
        workgroups = -(-(-(-n_columns // 8) * -(-extent.maximum // WIDE_ROWS)) // WIDE_LANES)
        tensors += [*after, *_uniforms(program, place)]
        program.dispatch("matmul_wide", constants, tensors, workgroups, label=label, flops=flops)
        if norm is not None:
            norm.record(program, out)
    else:
        _record_tiled(program, extent, out, constants, tensors, after, place, label, flops, norm)


def _record_tiled(
    program: Program,
    extent: Extent,
    out: Tensor,
    constants: dict[str, Any],
    tensors: list[Tensor],
    after: list[Tensor],
    place: Place | None,
    label: str,
    flops: int,
    norm: ProductNorm | None,
) -> None:
    """Appends matmul_tiled, in one pass or, where workgroups would be few, in two.

    Args:
        tensors: the extent, x, the weights, out, and the low-rank part's.
        after: residual and bias, which the last pass takes.
        norm: see `matmul`; it is the last pass where it can add stretches up.
    """
    n_columns, recording = constants["n_columns"], program.recording
    half, given = recording.precision == "f16", dict(constants)
    request = Request(
        _record_tiled, half, extent, out, given, tensors, after, place, label, flops, norm
    )
    tile, splits, length = plan_of(recording, request)
    constants |= tile.constants() | {"splits": splits, "split_length": length}
    # Drivers unroll no loop with a barrier near it; llvmpipe compiles long code slowly, also where
    # it is given the kernels of GPUs.
    constants["unroll"] = 4 if recording.facts.info["adapter_type"] == "CPU" else tile.depth
    constants["maximum_rows"] = extent.maximum
    constants |= {"half": half, "carry": HALF_CARRY if half else tile.depth}
    grid = (-(-n_columns // tile.tile_columns), -(-extent.maximum // tile.tile_rows), splits)
    placed = _uniforms(program, place)
    if splits == 1:
        tensors = [*tensors, *after, *placed]
        program.dispatch("matmul_tiled", constants, tensors, grid, label=label, flops=flops)
        if norm is not None:
            norm.record(program, out)
        return
    partial = recording.memory.scratch((splits * extent.maximum, n_columns))
    first_pass = constants | {
        "epilogue": "write", "bias": False, "softcap": None, "out_stride": n_columns,
        "out_type": "f32",
    }  # fmt: skip
    product = [*tensors[:3], partial, *tensors[4:]]
    if place is not None:
        product += _uniforms(program, Place(place.x_column, 0))
    program.dispatch("matmul_tiled", first_pass, product, grid, label=label, flops=flops)
    plain = not constants["bias"] and constants["softcap"] is None
    if norm is not None and plain and adds_up(recording, n_columns, splits):
        norm.record(program, out, Stretches(partial, splits, after[0] if after else None))
        return
    keys = (
        "splits", "n_columns", "maximum_rows", "out_stride", "epilogue", "bias", "softcap",
        "placed", "out_type",
    )  # fmt: skip
    program.dispatch(
        "matmul_reduce",
        {key: constants[key] for key in keys},
        [extent.uniform, partial, out, *after, *placed],
        -(-extent.maximum * n_columns // 256),
        label=f"{label}.reduce",
    )
    if norm is not None:
        norm.record(program, out)
