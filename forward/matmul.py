"""Products with frozen quantized matrices, the low-rank part included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora.forward.model.adapter import LoraFactors
from lora.forward.model.weights import MatrixPart
from lora.forward.plans.matmul_plans import Request, plan_of
from lora.forward.plans.stretches import ProductNorm, Stretches
from lora.forward.product import Product
from lora.forward.rmsnorm import adds_up
from lora.shaders.activations import activation, check_f32, check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor

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
    product: Product,
    *,
    out: Tensor | None = None,
    norm: ProductNorm | None = None,
    label: str = "matmul",
) -> Tensor:  # [rows, out_features]
    """Appends a product, decoding W in the kernel's tiles.

    Args:
        product: of rows of f32 or f16, without a gate or a norm before it.
        out: where to write; a new tensor by default.
        norm: a norm of y, appended too: with what finishes the product, where that is a second
            pass of its own.
    """
    x, matrix, lora = product.x, product.matrix, product.lora
    if not isinstance(x, Tensor) or product.gate is not None or product.norm is not None:
        raise ValueError(f"{label}: rows of whole numbers, gates and norms are for one row")
    extent = extent_of(x)
    product.check(x.shape[0], label)
    check_shape("matmul input", x, None, matrix.in_features)
    y = out if out is not None else activation(program, extent, matrix.out_features)
    check_shape("matmul output", y, x.shape[0], matrix.out_features)
    whole = len(matrix.parts) == 1
    for part in matrix.parts:
        one = PartProduct(
            x,
            part,
            y,
            transposed=False,
            contraction=matrix.in_features,
            place=None if whole else Place(0, part.first_feature),
            members=tuple(adapted_members(lora, part)),
            low=product.z,
            factor=lora.b if lora else None,
            rank=lora.rank if lora else 0,
            scale=lora.scale if lora else 1.0,
            residual=product.residual,
            bias=product.bias,
            softcap=product.softcap,
            epilogue=product.epilogue,
        )
        record_product(program, one, norm if whole else None, label)
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


@dataclass(frozen=True)
class PartProduct:
    """The product with one part: what `matmul` and its backward share.

    transposed=False: out[m, n] = Σ_k x[m, k] · W[n, k] + scale · Σ_r low[m, r] · factor[n, r].
    transposed=True:  out[m, k] = Σ_n x[m, n] · W[n, k] + Σ_r low[m, r] · factor[r, k].

    Attributes:
        contraction: length of the sum over k (or n).
        place: where the part's columns begin in x and out, where there are several parts.
        members: the adapted stretches of columns; see the body of matmul_wide.wgsl.
        bias, softcap: see `Product`; the bias's columns are those of out.
        epilogue: "write", "residual" (out = residual + …) or "accumulate" (out += …).
    """

    x: Tensor
    part: MatrixPart
    out: Tensor
    transposed: bool
    contraction: int
    place: Place | None = None
    members: tuple[dict[str, int], ...] = ()
    low: Tensor | None = None
    factor: Tensor | None = None
    rank: int = 0
    scale: float = 1.0
    residual: Tensor | None = None
    bias: Tensor | None = None
    softcap: float | None = None
    epilogue: str = "write"

    @property
    def n_columns(self) -> int:
        """Columns that this part gives."""
        return self.out.shape[1] if self.transposed else self.part.out_features

    def constants(self, label: str) -> dict[str, Any]:
        """The template constants that the bodies share."""
        x, out, n_columns = self.x, self.out, self.n_columns
        if self.contraction % 4 or n_columns % 4 or x.shape[1] % 4 or self.rank % 4:
            raise ValueError(
                f"{label}: widths must be multiples of 4: {x.shape}, {out.shape}, {self.rank}"
            )
        return {
            "quantization": self.part.quantization.name,
            "transposed": self.transposed,
            "contraction": self.contraction,
            "n_columns": n_columns,
            "row_words": self.part.words.shape[1],
            "x_type": x.dtype,
            "out_type": out.dtype,
            "x_stride": x.shape[1],
            "out_stride": out.shape[1],
            "placed": self.place is not None,
            "weight_columns": n_columns if self.transposed else self.contraction,
            "members": list(self.members),
            "rank": self.rank,
            "low_stride": self.low.shape[1] if self.members and self.low is not None else 0,
            "scale": self.scale,
            "epilogue": self.epilogue,
            "bias": self.bias is not None,
            "softcap": self.softcap,
        }


def record_product(
    program: Program, one: PartProduct, norm: ProductNorm | None, label: str
) -> None:
    """Appends a product with one part, by the body that the recording has or its device takes.

    Args:
        norm: see `matmul`; of a matrix of one part.
    """
    extent, out = extent_of(one.x), one.out
    constants = one.constants(label)
    tensors = [extent.uniform, one.x, one.part.words, out]
    if one.members:
        if one.low is None or one.factor is None:
            raise ValueError(f"{label}: an adapted matrix needs z and its factors")
        tensors += [one.low, one.factor]
    check_f32(label, low=one.low, factor=one.factor, residual=one.residual, bias=one.bias)
    if one.residual is not None:
        check_shape(f"{label} residual", one.residual, *out.shape)
    after = [tensor for tensor in (one.residual, one.bias) if tensor is not None]
    n_columns = one.n_columns
    flops = 2 * extent.maximum * n_columns * (one.contraction + len(one.members) * one.rank)
    body = program.recording.body or ("wide" if program.recording.facts.is_cpu else "tiled")
    if body == "wide":
        constants |= {"lane_rows": WIDE_ROWS, "lanes": WIDE_LANES}
        workgroups = -(-(-(-n_columns // 8) * -(-extent.maximum // WIDE_ROWS)) // WIDE_LANES)
        tensors += [*after, *_uniforms(program, one.place)]
        program.dispatch("matmul_wide", constants, tensors, workgroups, label=label, flops=flops)
        if norm is not None:
            norm.record(program, out)
        return
    half = program.recording.precision == "f16"
    _record_tiled(
        program,
        Request(
            _record_tiled, half, extent, out, constants, tensors, after, one.place, label, flops,
            norm,
        ),
    )  # fmt: skip


def _record_tiled(program: Program, request: Request) -> None:
    """Appends matmul_tiled, in one pass or, where workgroups would be few, in two."""
    extent, out, label, flops = request.extent, request.out, request.label, request.flops
    constants, after, norm = dict(request.constants), request.after, request.norm
    tensors, place = list(request.tensors), request.place
    n_columns, recording = constants["n_columns"], program.recording
    half = request.half
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
