"""Products of one row of whole numbers with frozen quantized matrices, as fast as they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora.forward.int_row import BLOCK, IntRow, takes_int_row, to_int_row
from lora.forward.matmul import adapted_members
from lora.forward.product import Product
from lora.shaders.activations import activation, check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

# Of a dispatch: fewer do not keep the memory of a large GPU busy, more only have more to add up.
_LANES_WANTED = 2**16
_GATED_LANES_WANTED = 100_000
_BYTES_A_LANE = 20  # of workgroup memory: a lane's four sums, and those of what it adds up


@dataclass(frozen=True)
class IntRowTiling:
    """How the lanes of `matmul_int_row` divide a product.

    Attributes:
        lanes: of a workgroup.
        share: lanes that share the sums of a group of rows of W; at least `weight_rows`.
        weight_rows: of W in such a group, 2, 4 or 8: the row's numbers are loaded once for all.
        steps: blocks of 32 weights, for each of these rows, that a lane loads at once.
    """

    lanes: int
    share: int
    weight_rows: int
    steps: int


def choose_int_tiling(
    columns: int, contraction: int, *, most_lanes: int, gated: bool = False, stores: bool = False
) -> IntRowTiling:
    """How to divide a product: what was fastest on one H200 for layers of 135 M to 8 B.

    Args:
        columns: rows of W.
        contraction: columns of W.
        most_lanes: of a workgroup on the device.
        gated: the first half of W's rows are a gate's.
        stores: whole numbers come out, of blocks of 32 columns which a workgroup must have whole.
    """
    blocks = contraction // BLOCK
    if gated:
        group, share = 4, 16
        if most_lanes >= 512 and blocks >= 32 and columns // group * share < _GATED_LANES_WANTED:
            share = 32
        return IntRowTiling(min(most_lanes, 512), share, group, 1)
    if stores:
        group, share = (4, 128) if blocks >= 128 else (4, 64) if blocks >= 48 else (2, 32)
        while BLOCK * share // group > most_lanes:
            share //= 2
        return IntRowTiling(BLOCK * share // group, share, group, 2 if blocks >= 2 * share else 1)
    group, share = 4, 16 if blocks >= 32 else 8
    while (
        share < 64 and columns // group * share < _LANES_WANTED and 2 * share <= max(32, blocks)
    ):  # fmt: skip
        share *= 2
    if share > blocks:
        group = 2
    return IntRowTiling(128, share, group, 2 if share == 8 and blocks >= 16 else 1)


def matmul_int_row(
    program: Program,
    product: Product,
    *,
    out: Tensor | None = None,
    int_out: IntRow | None = None,
    tiling: IntRowTiling | None = None,
    label: str = "matmul",
) -> Tensor:  # [1, out_features], with a gate half of them
    """Appends a product of one row of whole numbers.

    Args:
        product: of a row that may be on its way into an RMSNorm: that norm is completed, and z is
            by `project_row` under the same one. W must be a matrix that `takes_int_row`.
        out: where to write; a new tensor by default.
        int_out: where to write y as whole numbers, too, for the product that takes it.
        tiling: by default chosen for the shape.
        label: what the dispatches are called in listings.
    """
    x, matrix, gate, recording = product.x, product.matrix, product.gate, program.recording
    lora, z, width = product.lora, product.z, product.width
    if not isinstance(x, IntRow) or product.norm is not None:
        raise ValueError(f"{label}: a row of whole numbers brings its norm with it")
    if x.width != matrix.in_features or not takes_int_row(recording, matrix):
        raise ValueError(f"{label}: an int row of {x.width} does not fit {matrix.in_features}")
    product.check_row(label)
    y = out if out is not None else activation(program, extent_of(x.words), width)
    check_shape("matmul_int_row output", y, 1, width)
    if int_out is not None and int_out.width != width:
        raise ValueError(f"{label}: an int row of {int_out.width} cannot hold {width} columns")
    for part in matrix.parts:
        n_columns = part.out_features if gate is None else width
        members = adapted_members(lora, part)
        tensors = [x.words, part.words, y]
        if members and lora is not None and z is not None:
            tensors += [z, lora.b]
        tensors += [tensor for tensor in (product.residual, product.bias) if tensor is not None]
        stored = [] if int_out is None else [int_out.words]
        if int_out is not None and int_out.norm is not None:
            stored.append(int_out.norm.weight)
        # WebGPU promises eight buffers: an adapted product with a bias would take nine.
        fits = (
            len(matrix.parts) == 1 and n_columns % BLOCK == 0
            and len(tensors) + len(stored) <= recording.facts.most_storage_buffers
        )  # fmt: skip
        chosen = tiling or choose_int_tiling(
            part.out_features, matrix.in_features, most_lanes=_most_lanes(recording),
            gated=gate is not None, stores=int_out is not None and fits,
        )  # fmt: skip
        weight_rows = chosen.weight_rows if n_columns % chosen.weight_rows == 0 else 4
        columns = chosen.lanes // chosen.share * (weight_rows if gate is None else weight_rows // 2)
        stores_ints = int_out is not None and fits and columns % BLOCK == 0
        constants: dict[str, Any] = {
            **part.quantization.row_constants(),
            "contraction": matrix.in_features,
            "n_columns": n_columns,
            "row_words": part.words.shape[1],
            "epsilon": None if x.norm is None else x.norm.epsilon,
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
            "int_out": stores_ints,
            "next_norm": stores_ints and int_out is not None and int_out.norm is not None,
            "lanes": chosen.lanes,
            "share": chosen.share,
            "weight_rows": weight_rows,
            "steps": chosen.steps,
            "parts": chosen.share // weight_rows,
        }
        if len(matrix.parts) > 1:
            tensors.append(recording.memory.constant_uniform((0, part.first_feature)))
        if stores_ints:
            tensors += stored
        terms = matrix.in_features + (lora.rank if lora and members else 0)
        program.dispatch(
            "matmul_int_row",
            constants,
            tensors,
            -(-n_columns // columns),
            label=label,
            flops=2 * part.out_features * terms,
        )
    if int_out is not None and not stores_ints:
        to_int_row(program, y, int_out, label=f"{label}.int_row")
    return y


def _most_lanes(recording: Recording) -> int:
    """Lanes that a workgroup may have, as a power of two."""
    most = min(recording.facts.most_lanes, recording.facts.workgroup_memory // _BYTES_A_LANE)
    return int(1 << (most.bit_length() - 1))
