"""A mixer to show what one takes: W · (x[t] + share · x[t − 1]), as RWKV's token shift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora.backward.blocks import BlockBackward
from lora.backward.recorder import BackwardRecorder
from lora.backward.rmsnorm import NormBefore
from lora.forward.decoder.blocks import Block
from lora.forward.decoder.recorder import AfterCache, BlockEnd, LayerRecorder
from lora.forward.decoder.row_recorder import Row, RowEnd, RowRecorder
from lora.forward.model.adaptable import AdaptableMatrix
from lora.forward.model.layer_spec import BlockSpec
from lora.forward.part_product import SizedRows
from lora.forward.rmsnorm import rmsnorm
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor

_OUT = AdaptableMatrix("o_proj", "mix", "mix_out", "mix", "hidden_size", "hidden_size")

# What differs: where the other row is, when there is one, and what takes its place.
_WAYS = {
    "forward": ("row - 1u", "row > bounds[2u * row]", "", ""),
    "backward": ("row + 1u", "row + 1u < bounds[2u * row + 1u]", "", ""),
    "text": ("row - 1u", "row > 0u", "else if (bounds[0] > 0u) { other = state[at.x]; }",
             "if (at.x < width) { state[at.x] = x[(rows.x - 1u) * width + at.x]; }"),
}  # fmt: skip
_CODE = """@group(0) @binding(0) var<uniform> rows: vec4<u32>;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> bounds: array<u32>;  // of examples; of a text: positions
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
@group(0) @binding(4) var<storage, read_write> state: array<f32>;
const width = %(width)du;
@compute @workgroup_size(64) fn main(@builtin(global_invocation_id) at: vec3<u32>) {
    for (var row = 0u; row < rows.x && at.x < width; row++) {
        var other = 0.0;
        if (%(exists)s) { other = x[(%(other)s) * width + at.x]; } %(else)s
        y[row * width + at.x] = x[row * width + at.x] + f32(%(share)f) * other;
    }
    %(last)s
}"""


@dataclass(frozen=True)
class TokenShift(BlockSpec):
    """The mixer's spec; share: of the row before."""

    width: int
    share: float
    matrices = (_OUT,)

    def record(self, way: str, program: Program, tensors: Sequence[Tensor], rows: Extent) -> None:
        names = "other", "exists", "else", "last", "width", "share"
        code = _CODE % dict(zip(names, (*_WAYS[way], self.width, self.share), strict=True))
        program.dispatch_wgsl("shift", code, [rows.uniform, *tensors], -(-self.width // 64))


def allocate(
    recording: Recording, spec: TokenShift, rows: Extent, shared: Tensor | None = None
) -> Tensor:  # nothing writes it again, so that each layer that is kept has its own
    return recording.memory.empty((rows.maximum, spec.width), extent=rows)


def record(
    layer: LayerRecorder, spec: TokenShift, mixed: Tensor, normed: Tensor, end: BlockEnd
) -> None:
    context, rows = layer.walk.context, layer.walk.context.inputs.rows
    if isinstance(context, AfterCache):
        tensors = [normed, context.inputs.positions, mixed, context.caches[layer.layer]]
        spec.record("text", layer.program, tensors, rows)
    else:
        spec.record("forward", layer.program, [normed, context.inputs.segments, mixed], rows)
    layer.end(mixed, "mix", end)


def record_row(layer: RowRecorder, spec: TokenShift, mixed: Tensor, row: Row, end: RowEnd) -> None:
    normed = rmsnorm(layer.program, row.values, row.norm)
    inputs = layer.inputs
    spec.record("text", layer.program, [normed, inputs.positions, mixed, layer.cache], inputs.rows)
    layer.end(layer.before("mixed", mixed, "mix"), "mix", end)


def cache(recording: Recording, spec: TokenShift, room: int) -> Tensor:
    return recording.memory.empty((spec.width,), purpose="key-value cache")


def record_backward(
    layer: BackwardRecorder, spec: TokenShift, mixed: Tensor, _: Tensor, d: SizedRows,
    norm: NormBefore,
) -> bool:  # fmt: skip
    d_mixed = layer.scratch(spec)
    if not layer.through("mix", mixed, d, d_mixed):
        return False
    d_normed, inputs = layer.shared.scratch.d_normed, layer.shared.inputs
    spec.record("backward", layer.program, [d_mixed, inputs.segments, d_normed], inputs.rows)
    norm.record(layer.program, d_normed)
    return True


BLOCK = Block(allocate, record, record_row, cache)
BLOCK_BACKWARD = BlockBackward(allocate, record_backward)
