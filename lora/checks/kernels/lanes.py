"""Whether all lanes of a workgroup run, and wait for each other.

Some integrated GPUs silently ran 64 of a workgroup's 128 lanes: every kernel is wrong then, and
this says why. It is no kernel of the product, so that its WGSL is here.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from lora.checks.comparison import Check, Comparison, NotHereError, same
from lora.shaders.program import Dispatch, Program
from lora.shaders.recording import Recording

_GROUPS = (5, 3)  # of the grid
_CODE = """
@group(0) @binding(0) var<storage, read_write> written: array<u32>;
var<workgroup> places: array<u32, LANES>;

@compute @workgroup_size(X, Y)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
    places[lane] = lane + 1u;
    workgroupBarrier();
    let first = (group.x + group.y * GROUPSu) * LANESu;
    written[first + lane] = first + places[LANESu - 1u - lane];
}
"""


def check_lanes(recording: Recording, x: int, y: int) -> Comparison:
    """Each lane writes what another one left in workgroup memory."""
    lanes = x * y
    if lanes > recording.facts.most_lanes or 4 * lanes > recording.facts.workgroup_memory:
        raise NotHereError(f"a workgroup has {recording.facts.most_lanes} lanes at most")
    constants = {"GROUPS": _GROUPS[0], "LANES": lanes, "X": x, "Y": y}
    code = _CODE
    for name, value in constants.items():
        code = code.replace(name, str(value))
    pipeline = recording.memory.compile("lanes", code)
    n = lanes * _GROUPS[0] * _GROUPS[1]
    written, program = recording.memory.empty((n,), "u32"), Program(recording)
    group = recording.memory.bind(pipeline, [written])
    launch = Dispatch(
        "lanes", "lanes", constants, pipeline, group, (*_GROUPS, 1), flops=0, tensors=(written,)
    )
    program.commands.append(launch)
    program.run()
    first = np.arange(n) // lanes * lanes
    return same(recording.memory.read(written), first + lanes - np.arange(n) % lanes)


CHECKS = [
    Check("lanes", f"{x}x{y}", partial(check_lanes, x=x, y=y))
    for x, y in ((32, 1), (64, 1), (128, 1), (256, 1), (16, 16), (512, 1), (1024, 1))
]
