"""Products of one row with frozen quantized matrices: as fast as the weights can be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora.forward.matmul import adapted_members
from lora.forward.model.adapter import LoraFactors
from lora.forward.model.weights import FrozenMatrix
from lora.forward.swiglu import check_activation
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


@dataclass(frozen=True)
class InputNorm:
    """An RMSNorm that x passes on its way into a product.

    Attributes:
        weight: [in_features].
        epsilon: added to the mean square.
    """

    weight: Tensor
    epsilon: float


def matmul_row(
    program: Program,
    x: Tensor,
    matrix: FrozenMatrix,
    *,
    norm: InputNorm | None = None,
    gate: str | None = None,
    lora: LoraFactors | None = None,
    z: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    tiling: RowTiling | None = None,
    label: str = "matmul",
) -> Tensor:  # [1, out_features], with a gate half of them
    """Appends y = cap(norm(x) · Wᵀ + scale · z · Bᵀ + bias) + residual for one row.

    Args:
        x: [1, in_features].
        matrix: W [out_features, in_features].
        norm: what x passes first; None for nothing.
        gate: an activation that forward/swiglu.py lists: the first half of W's rows are a gate's,
            the others those of up, and activation(gate) · up is what comes out. W must be one part
            (`can_gate`); a softcap or a residual there is none.
        lora: the factors of the adapted members of W, or None.
        z: [1, members · rank], by `project_row` under the same norm; needed with `lora`.
        bias: [out_features], added where given.
        softcap: y becomes softcap · tanh(y / softcap); None for none.
        residual: [1, out_features], added where given; not the tensor `out`.
        out: where to write; a new tensor by default.
        tiling: by default chosen for the device.
        label: what the dispatches are called in listings.
    """
    check_shape("matmul_row input", x, 1, matrix.in_features)
    if x.dtype != "f32":
        raise ValueError(f"{label}: one row is computed in f32, not from {x.dtype}")
    if norm is not None:
        check_shape("matmul_row norm", norm.weight, matrix.in_features)
    check_row_product(
        matrix, gate=gate, lora=lora, z=z, bias=bias, softcap=softcap, residual=residual,
        label=label,
    )  # fmt: skip
    width = matrix.out_features if gate is None else matrix.out_features // 2
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
            "epilogue": "write" if residual is None else "residual",
            "bias": bias is not None,
            "softcap": softcap,
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
        tensors += [tensor for tensor in (residual, bias) if tensor is not None]
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


def check_row_product(
    matrix: FrozenMatrix,
    *,
    gate: str | None,
    lora: LoraFactors | None,
    z: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    residual: Tensor | None,
    label: str,
) -> None:
    """Refuses what no product of one row can do; arguments as for `matmul_row`."""
    if bias is not None:
        check_shape(f"{label} bias", bias, matrix.out_features)
    if residual is not None:
        check_shape(f"{label} residual", residual, 1, matrix.out_features)
    if gate is not None:
        check_activation(gate)
        if not can_gate(matrix) or softcap is not None or residual is not None:
            raise ValueError(f"{label}: a gate takes one part, no softcap and no residual")
    if matrix.in_features % 4 or (lora is not None and lora.rank % 4):
        raise ValueError(f"{label}: widths must be multiples of 4: {matrix.in_features}")
    if lora is not None:
        if z is None:
            raise ValueError(f"{label}: an adapted matrix needs z and its factors")
        check_shape(f"{label} z", z, 1, lora.n_members * lora.rank)
    for part in matrix.parts:
        if part.out_features % 4 or part.first_feature % 4:
            raise ValueError(f"{label}: parts must be whole quads of rows: {part.words.shape}")


def can_gate(matrix: FrozenMatrix) -> bool:
    """Whether `matmul_row` can take the rows of gate and up together."""
    return len(matrix.parts) == 1 and matrix.out_features % 8 == 0


def project_row(
    program: Program,
    x: Tensor,
    lora: LoraFactors,
    *,
    norm: InputNorm | None = None,
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
    constants = {"width": in_features, "lanes": lanes, "norm": norm is not None, "steps": _Z_STEPS}
    tensors = [x, lora.a, z] + ([norm.weight] if norm is not None else [])
    program.dispatch(
        "project_row", constants, tensors, (n, 1, 1), label=label, flops=2 * n * in_features
    )
    return z
