"""The body of products for GPUs: tiles in workgroup memory."""

from __future__ import annotations

from lora.forward.matmul_passes import record_passes
from lora.forward.plans.matmul_plans import Request
from lora.forward.plans.matmul_tiles import Plan
from lora.shaders.program import Program

# Steps whose products matmul_tiled sums in f16 before f32 takes them over: twice as many would cost
# a bit of accuracy and save less than a tenth of the instructions.
HALF_CARRY = 32


def record_tiled(program: Program, request: Request, plan: Plan | None) -> None:
    """Appends the product, and what follows it."""
    assert plan is not None  # tiles are chosen
    depth, half = plan.tile.depth, request.half
    # Drivers unroll no loop with a barrier near it; llvmpipe compiles long code slowly, also where
    # it is given the kernels of GPUs.
    on_cpu = program.recording.facts.info["adapter_type"] == "CPU"
    constants = {
        "unroll": (4 if half else 1) if on_cpu else depth,  # f16 sums of one product are none
        "half": half,
        "carry": HALF_CARRY if half else depth,
    }
    record_passes(program, request, plan, "matmul_tiled", constants)
