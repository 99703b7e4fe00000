"""The body of products for GPUs: tiles in workgroup memory, in one pass or in stretches."""

from __future__ import annotations

from lora.forward.part_product import Place, place_uniforms
from lora.forward.plans.matmul_plans import Request
from lora.forward.plans.matmul_tiles import Plan
from lora.forward.plans.stretches import Stretches
from lora.forward.rmsnorm import adds_up
from lora.shaders.program import Program

# Steps whose products matmul_tiled sums in f16 before f32 takes them over: twice as many would cost
# a bit of accuracy and save less than a tenth of the instructions.
HALF_CARRY = 32


def record_tiled(program: Program, request: Request, plan: Plan | None) -> None:
    """Appends matmul_tiled, in one pass or, where workgroups would be few, in two."""
    extent, out, label, flops = request.extent, request.out, request.label, request.flops
    constants, after, norm = dict(request.constants), request.after, request.norm
    tensors, place = list(request.tensors), request.place
    n_columns, recording = constants["n_columns"], program.recording
    half = request.half
    assert plan is not None  # tiles are chosen
    tile, splits, length = plan
    constants |= tile.constants() | {"splits": splits, "split_length": length}
    # Drivers unroll no loop with a barrier near it; llvmpipe compiles long code slowly, also where
    # it is given the kernels of GPUs.
    constants["unroll"] = 4 if recording.facts.info["adapter_type"] == "CPU" else tile.depth
    constants["maximum_rows"] = extent.maximum
    constants |= {"half": half, "carry": HALF_CARRY if half else tile.depth}
    grid = (-(-n_columns // tile.tile_columns), -(-extent.maximum // tile.tile_rows), splits)
    placed = place_uniforms(program, place)
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
        product += place_uniforms(program, Place(place.x_column, 0))
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
