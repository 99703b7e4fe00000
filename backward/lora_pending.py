"""Gradients of a group's factors in the dispatch that makes d_z of the group that comes next.

A group's backward is d_z, the product, what lies before it, and then d_A and d_B, which read what
is written before the product. Nothing reads these until the step ends: they wait for the next
group's d_z, which fills a GPU no better alone, and both are one dispatch (lora_backward.wgsl), to
the bits of two.
"""

from __future__ import annotations

from dataclasses import replace

from lora.backward.lora import (
    GPU_TUNING,
    GroupGradients,
    plan_gradients,
    plan_project_gradient,
)
from lora.forward.model.factors import LoraFactors
from lora.forward.part_product import SizedRows
from lora.shaders.activations import extent_of
from lora.shaders.program import MAX_WORKGROUPS, Planned, Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

# What such a kernel binds with all slices: fewer, as by WebGPU's defaults, and nothing waits.
STORAGE_BUFFERS = 11


def gradients_wait(recording: Recording) -> bool:
    """Whether gradients wait on this device: GPUs, since a CPU device gains nothing by it."""
    facts = recording.facts
    return not facts.is_cpu and facts.most_storage_buffers >= STORAGE_BUFFERS


class PendingGradients:
    """Appends d_z and the gradients of groups one after the other; those of one may wait.

    Until `project` or `flush` nothing may overwrite what waiting gradients read.
    """

    def __init__(self) -> None:
        self._waiting: GroupGradients | None = None

    def free(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """The first of these that waiting gradients don't read as their d_z."""
        waiting = self._waiting
        return next(t for t in tensors if waiting is None or t is not waiting.d_z)

    def project(
        self,
        program: Program,
        d_y: SizedRows,
        lora: LoraFactors,
        out: Tensor,
        scales: Tensor | None = None,
    ) -> None:
        """Appends d_z of a group (`plan_project_gradient`), and the gradients that wait."""
        projection = plan_project_gradient(program.recording, d_y, lora, out, scales)
        if self._waiting is not None:
            rows = extent_of(self._waiting.sized.rows)
            both = None
            if extent_of(d_y.rows) is rows:
                both = _merged(program.recording, self._waiting, projection)
            if both is not None:
                self._waiting = None
                both.append(program)
                return
        self.flush(program)
        projection.append(program)

    def add(self, program: Program, group: GroupGradients) -> None:
        """Takes the gradients of a group, to append them later; or appends them where none wait."""
        self.flush(program)
        self._waiting = group
        if not gradients_wait(program.recording):
            self.flush(program)

    def flush(self, program: Program) -> None:
        """Appends what waits."""
        if self._waiting is not None:
            plan_gradients(program.recording, self._waiting).append(program)
            self._waiting = None


def _merged(recording: Recording, group: GroupGradients, projection: Planned) -> Planned | None:
    """One dispatch for a group's gradients and another's projection; None where lanes differ."""
    gradients = plan_gradients(recording, group)
    on_units = gradients.template == "lora_gradient_matrix"
    if on_units != (projection.template == "lora_project_matrix"):
        return None
    of_z, more = projection.constants, {}
    if on_units:
        lanes = of_z["subgroups"] * of_z["subgroup_lanes"]
        own = gradients.constants["long"] // of_z["n"] * of_z["subgroup_lanes"]
        more["tiles"] = max(of_z["tiles"], gradients.constants["tiles"])
    else:
        lanes, splits = of_z["splits"] * of_z["column_lanes"] * of_z["row_lanes"], GPU_TUNING.splits
        # A block's sums don't depend on how many blocks a workgroup has.
        whole = plan_gradients(
            recording, group, replace(GPU_TUNING, blocks=max(1, lanes // splits))
        )
        if whole.constants["splits"] != gradients.constants["splits"]:
            return None
        gradients = whole
        own = gradients.constants["blocks"] * gradients.constants["splits"]
        of_a_lane = [
            part["lane_left"] * part["lane_right"] for part in gradients.constants["parts"]
        ]
        of_a_lane.append(of_z["lane_rows"] * of_z["lane_columns"])
        more["sums"] = lanes * max(of_a_lane) // 4
    if lanes != own:
        return None
    assert isinstance(gradients.workgroups, tuple) and isinstance(projection.workgroups, int)
    n_groups, _, n_slices = gradients.workgroups
    grid = n_groups + -(-projection.workgroups // n_slices), 1, n_slices
    if grid[0] > MAX_WORKGROUPS:
        return None
    tensors = [*gradients.tensors, *projection.tensors[1:]]
    uniforms = 1 if group.dropout is None else 2  # the extent, and keys of matrices
    if len(tensors) - uniforms > recording.facts.most_storage_buffers:
        return None
    more |= {"lanes": lanes, "gradient_groups": n_groups, "projection": of_z}
    return Planned(
        "lora_backward_matrix" if on_units else "lora_backward",
        {**of_z, **gradients.constants, **more},
        tensors,
        grid,
        "lora_backward",
        gradients.flops + projection.flops,
    )
