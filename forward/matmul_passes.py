"""A product by tiles, in one pass or, where workgroups would be few, in stretches and a second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora.forward.part_product import Place, place_uniforms
from lora.forward.plans.matmul_plans import Request
from lora.forward.plans.matmul_tiles import Plan
from lora.forward.plans.stretches import Follower, Stretches
from lora.shaders.program import Program


def record_passes(
    program: Program,
    request: Request,
    plan: Plan,
    template: str,
    more: Mapping[str, Any],
    *,
    in_scratch: bool = False,
) -> None:
    """Appends a product by a template that computes one tile a workgroup, and what follows it.

    Args:
        more: constants of the template beside the request's, the tile's and the stretches'.
        in_scratch: whether the weights lie in scratch memory.
    """
    extent, out, label, flops = request.extent, request.out, request.label, request.flops
    after, then, recording = request.after, request.then, program.recording
    tensors, place = list(request.tensors), request.place
    tile, splits, length = plan
    constants = {
        **request.constants, **tile.constants(), **more, "splits": splits, "split_length": length,
        "maximum_rows": extent.maximum,
    }  # fmt: skip
    n_columns = constants["n_columns"]
    grid = (-(-n_columns // tile.tile_columns), -(-extent.maximum // tile.tile_rows), splits)
    placed, dropout = place_uniforms(program, place), request.dropout
    keys_of_masks = [] if dropout is None else [dropout.rows, dropout.matrices]
    if splits == 1:
        tensors = [*tensors, *after, *placed, *keys_of_masks]
        program.dispatch(template, constants, tensors, grid, label=label, flops=flops)
        if then is not None:
            then.record(program, out)
        return
    partial = recording.memory.scratch((splits * extent.maximum, n_columns), beside=int(in_scratch))
    first_pass = constants | {
        "epilogue": "write", "bias": False, "softcap": None, "scaled": None,
        "out_stride": n_columns, "out_type": "f32",
    }  # fmt: skip
    product = [*tensors[:3], partial, *tensors[4:]]
    if place is not None:
        product += place_uniforms(program, Place(place.x_column, 0))
    product += keys_of_masks
    program.dispatch(template, first_pass, product, grid, label=label, flops=flops)
    if then is not None and then.adds_up(recording, n_columns, splits) and _takes(then, constants):
        given = list(after)
        residual = given.pop(0) if constants["epilogue"] == "residual" else None
        then.record(program, out, Stretches(partial, splits, residual, *given))
        return
    keys = (
        "splits", "n_columns", "maximum_rows", "out_stride", "epilogue", "bias", "softcap",
        "scaled", "placed", "out_type",
    )  # fmt: skip
    program.dispatch(
        "matmul_reduce",
        {key: constants[key] for key in keys},
        [extent.uniform, partial, out, *after, *placed],
        -(-extent.maximum * n_columns // 256),
        label=f"{label}.reduce",
    )
    if then is not None:
        then.record(program, out)


def _takes(then: Follower, constants: Mapping[str, Any]) -> bool:
    """Whether a follower can do what the last pass of a product does to the sum of stretches."""
    plain = not constants["bias"] and constants["softcap"] is None
    return plain and (constants["scaled"] is None or then.scales_columns)
