"""Products of one row with frozen quantized matrices: as fast as the weights can be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora.forward.matmul import adapted_members
from lora.forward.model.factors import LoraFactors
from lora.forward.model.norm import Norm
from lora.forward.product import Product
from lora.shaders.activations import activation, check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor

_CPU_LANES = 32
# Of a GPU. Its memory answers after half a microsecond or more: 4 TB/s need some 3 MB of loads on
# their way, which no few thousand lanes with a word or two each make.
_LANES = 64  # of a workgroup whose sums few lanes share
_MOST_LANES = 256  # that share the sums of a group of rows of W
_LANES_WANTED = 2**18  # in one dispatch: two thousand for each multiprocessor of a large GPU
_EIGHTS_AT_ONCE = 4  # eights × quads of rows of W that a lane loads before it uses the first
_Z_LANES = 64  # of a workgroup for one z, at least
_Z_STEPS = 4  # quads of columns that such a lane loads at once
_BRANCHES = 8  # sums that a lane adds between two barriers


@dataclass(frozen=True)
class RowTiling:
    """How the lanes of `matmul_row` divide a product.

    Attributes:
        lanes: of a workgroup.
        share: lanes that share the sums of a group of rows of W.
        quads: such a group is 4 · quads rows, 1 or 2; x is loaded once for all of them.
        steps: eights of the contraction that a lane loads at once.
    """

    lanes: int
    share: int
    quads: int
    steps: int


def choose_tiling(
    is_cpu: bool, columns: int, contraction: int, *, gated: bool = False
) -> RowTiling:
    """How to divide a product: as many lanes as keep a GPU's memory busy.

    All the columns of a matrix decide, so that the results do not depend on its parts.

    Args:
        is_cpu: whether the device is a CPU.
        columns: of the product (rows of W).
        contraction: columns of W.
        gated: two quads of rows belong together: one of the gate, one of up.
    """
    # A CPU device runs lanes of one workgroup in turn and pays for barriers: no lane shares.
    if is_cpu:
        return RowTiling(_CPU_LANES, 1, 2 if gated else 1, 1)
    share = _MOST_LANES
    while share > 8 and contraction < 16 * share:  # two eights a lane or more
        share //= 2
    quads = 2 if gated else 1
    # Past the lanes wanted, more of them only have more sums to add up.
    while share > 2 * _LANES and columns // (4 * quads) * share // 2 >= _LANES_WANTED:
        share //= 2
    eights = max(1, contraction // 8 // share)
    return RowTiling(max(share, _LANES), share, quads, min(_EIGHTS_AT_ONCE // quads, eights))


def matmul_row(
    program: Program,
    product: Product,
    *,
    out: Tensor | None = None,
    tiling: RowTiling | None = None,
    label: str = "matmul",
) -> Tensor:  # [1, out_features], with a gate half of them
    """Appends a product of one row.

    Args:
        product: of [1, in_features] in f32; z by `project_row` under the same norm.
        out: where to write; a new tensor by default.
        tiling: by default chosen for the device.
        label: what the dispatches are called in listings.
    """
    x, matrix, norm, gate = product.x, product.matrix, product.norm, product.gate
    lora, z, width = product.lora, product.z, product.width
    if not isinstance(x, Tensor):
        raise ValueError(f"{label}: a row of whole numbers is for matmul_int_row")
    check_shape("matmul_row input", x, 1, matrix.in_features)
    if x.dtype != "f32":
        raise ValueError(f"{label}: one row is computed in f32, not from {x.dtype}")
    if norm is not None:
        check_shape("matmul_row norm", norm.weight, matrix.in_features)
    product.check_row(label)
    y = out if out is not None else activation(program, extent_of(x), width)
    check_shape("matmul_row output", y, 1, width)
    tiling = tiling or choose_tiling(
        program.recording.facts.is_cpu,
        matrix.out_features,
        matrix.in_features,
        gated=gate is not None,
    )
    for part in matrix.parts:
        members = adapted_members(lora, part)
        quads = 1 if part.out_features % 8 and gate is None else tiling.quads
        constants: dict[str, Any] = {
            **part.quantization.row_constants(),
            "contraction": matrix.in_features,
            "n_columns": part.out_features if gate is None else width,
            "row_words": part.words.shape[1],
            "norm": norm is not None,
            "epsilon": norm.epsilon if norm else None,
            "gate": gate is not None,
            "activation": gate,
            "placed": len(matrix.parts) > 1,
            "members": members,
            "rank": lora.rank if lora else 0,
            "scale": lora.scale if lora else 1.0,
            "epilogue": product.epilogue,
            "bias": product.bias is not None,
            "softcap": product.softcap,
            "out_type": "f32",
            "lanes": tiling.lanes,
            "share": tiling.share,
            "quads": quads,
            "steps": tiling.steps,
            "branches": _BRANCHES,
        }
        tensors = [x, part.words, y]
        if norm is not None:
            tensors.append(norm.weight)
        if members and lora is not None and z is not None:
            tensors += [z, lora.b]
        tensors += [tensor for tensor in (product.residual, product.bias) if tensor is not None]
        if len(matrix.parts) > 1:
            tensors.append(program.recording.memory.constant_uniform((0, part.first_feature)))
        terms = matrix.in_features + (lora.rank if lora and members else 0)
        program.dispatch(
            "matmul_row",
            constants,
            tensors,
            -(-part.out_features // (4 * quads) * tiling.share // tiling.lanes),
            label=label,
            flops=2 * part.out_features * terms,
        )
    return y


def project_row(
    program: Program,
    x: Tensor,
    lora: LoraFactors,
    *,
    norm: Norm | None = None,
    out: Tensor | None = None,
    label: str = "z",
) -> Tensor:  # [1, members · rank]
    """Appends z = x · Aᵀ for one row.

    Args:
        x: [1, in_features].
        lora: A [members · rank, in_features].
        norm: of the product that takes z, which divides by the root mean square itself: here x is
            multiplied by the weight only.
        out: where to write; a new tensor by default.
        label: what the dispatch is called in listings.
    """
    n, in_features = lora.a.shape
    check_shape("project_row input", x, 1, in_features)
    if norm is not None:
        check_shape("project_row norm", norm.weight, in_features)
    if in_features % 4:
        raise ValueError(f"{label}: {in_features} columns are no multiple of 4")
    z = out if out is not None else activation(program, extent_of(x), n)
    check_shape("project_row output", z, 1, n)
    quads = in_features // 4
    lanes = _Z_LANES
    while lanes * _Z_STEPS < quads and 2 * lanes <= program.recording.facts.most_lanes:
        lanes *= 2
    constants = {
        "width": in_features,
        "lanes": lanes,
        "norm": norm is not None,
        "steps": _Z_STEPS,
        "rank": lora.rank if lora.member_scales else 0,
        "scales": list(lora.member_scales),
    }
    tensors = [x, lora.a, z] + ([norm.weight] if norm is not None else [])
    program.dispatch(
        "project_row", constants, tensors, (n, 1, 1), label=label, flops=2 * n * in_features
    )
    return z
