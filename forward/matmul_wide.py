"""The body of products for CPU devices: no workgroup memory, 12 × 8 outputs a lane."""

from __future__ import annotations

from lora.forward.part_product import place_uniforms
from lora.forward.plans.matmul_plans import Request
from lora.forward.plans.matmul_tiles import Plan
from lora.shaders.program import Program

# What matmul_wide's lanes hold, measured on llvmpipe (docs/log.md).
WIDE_ROWS = 12
WIDE_LANES = 32


def record_wide(program: Program, request: Request, _: Plan | None) -> None:
    """Appends matmul_wide, and what follows it."""
    constants = {**request.constants, "lane_rows": WIDE_ROWS, "lanes": WIDE_LANES}
    row_blocks = -(-request.extent.maximum // WIDE_ROWS)
    workgroups = -(-(-(-constants["n_columns"] // 8) * row_blocks) // WIDE_LANES)
    tensors = [*request.tensors, *request.after, *place_uniforms(program, request.place)]
    program.dispatch(
        "matmul_wide", constants, tensors, workgroups, label=request.label, flops=request.flops
    )
    if request.then is not None:
        request.then.record(program, request.out)
