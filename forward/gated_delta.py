"""The gated delta rule of linear attention (Yang et al. 2024, "Gated Delta Networks"), in chunks.

What a chunk's rows are to each other becomes small triangular matrices, so that states are passed
from chunk to chunk and not from row to row. Chunks are counted from each example's first row: what
comes out does not depend on where the example lies, bit for bit. All in f32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora.forward.delta_matrix import delta_cut
from lora.shaders.activations import check_f32, check_shape, extent_of
from lora.shaders.facts import DeviceFacts
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor

GPU_LANES, CPU_LANES = 128, 32
_LARGE, _SMALL, _CPU = 64, 32, 16  # rows of a chunk
_MEMORY_OF_LARGE = 20 << 10  # bytes of workgroup memory that chunks of _LARGE take


def chunk_rows(facts: DeviceFacts) -> int:
    """Rows of a chunk on a device."""
    if facts.is_cpu:
        return _CPU
    return _LARGE if facts.workgroup_memory >= _MEMORY_OF_LARGE else _SMALL


@dataclass(frozen=True)
class DeltaSizes:
    """Heads of the rule.

    Attributes:
        key_heads: heads of q and k; value head h takes those of h modulo their number.
        value_heads: heads of v, a multiple of 4 and of key_heads.
        head_size: columns of any head, a multiple of 4.
    """

    key_heads: int
    value_heads: int
    head_size: int

    @property
    def key_size(self) -> int:
        """Columns of all keys."""
        return self.key_heads * self.head_size

    @property
    def value_size(self) -> int:
        """Columns of all values."""
        return self.value_heads * self.head_size

    @property
    def gates_at(self) -> int:
        """The column of `DeltaTensors.inputs` where gates begin."""
        return 2 * self.key_size + self.value_size

    @property
    def input_size(self) -> int:
        """Columns of `DeltaTensors.inputs`."""
        return self.gates_at + 2 * self.value_heads

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Of the states of all heads."""
        return self.value_heads, self.head_size, self.head_size

    def constants(self, facts: DeviceFacts, *, text: bool = False) -> dict[str, Any]:
        """The template constants that the kernels share."""
        if self.head_size % 4 or self.value_heads % 4 or self.value_heads % self.key_heads:
            raise ValueError(f"gated_delta: {self} are no multiples")
        return {
            "key_heads": self.key_heads, "value_heads": self.value_heads,
            "head_size": self.head_size, "chunk": chunk_rows(facts),
            "lanes": CPU_LANES if facts.is_cpu else GPU_LANES, "text": text,
        }  # fmt: skip

    def columns(self) -> int:
        """Columns of v that one workgroup walks with."""
        return next(n for n in (16, 8, 4) if self.head_size % n == 0)


@dataclass(frozen=True)
class DeltaTensors:
    """What the rule reads and computes, f32.

    Attributes:
        inputs: [rows, input_size]: q and k of the key heads, v, then g and beta of value heads.
        mixes: [rows, 2 · heads · chunk], T and P of a row's chunk; see delta_prepare.wgsl.
        deltas: [rows, 4 · value_size]: what comes out first, then v', U and W.
        states: [chunks, heads, n, n], at the start of every chunk but an example's first.
    """

    inputs: Tensor
    mixes: Tensor
    deltas: Tensor
    states: Tensor

    @classmethod
    def allocate(cls, recording: Recording, sizes: DeltaSizes, rows: Extent) -> DeltaTensors:
        """Tensors for up to rows.maximum rows."""

        def tensor(width: int) -> Tensor:
            return recording.memory.empty((rows.maximum, width), extent=rows)

        chunk = chunk_rows(recording.facts)
        return cls(
            tensor(sizes.input_size),
            tensor(2 * sizes.value_heads * chunk),
            tensor(4 * sizes.value_size),
            recording.memory.empty(states_shape(recording.facts, sizes, rows.maximum)),
        )

    def check(self, facts: DeviceFacts, sizes: DeltaSizes) -> None:
        """Refuses tensors of other shapes or types."""
        rows, chunk = self.inputs.shape[0], chunk_rows(facts)
        check_f32("gated_delta", inputs=self.inputs, mixes=self.mixes, deltas=self.deltas)
        check_shape("gated_delta inputs", self.inputs, None, sizes.input_size)
        check_shape("gated_delta mixes", self.mixes, rows, 2 * sizes.value_heads * chunk)
        check_shape("gated_delta deltas", self.deltas, rows, 4 * sizes.value_size)
        check_shape("gated_delta states", self.states, *states_shape(facts, sizes, rows))


def states_shape(facts: DeviceFacts, sizes: DeltaSizes, rows: int) -> tuple[int, ...]:
    """Of the states at chunks' starts: of two of them at least a chunk lies between."""
    return -(-rows // chunk_rows(facts)), *sizes.state_shape


@dataclass(frozen=True)
class GateWeights:
    """What gates are made with: a f32 [heads], below 0, and dt f32 [heads]."""

    a: Tensor
    dt: Tensor


def delta_gates(
    program: Program, projected: Tensor, first: int, weights: GateWeights, sizes: DeltaSizes,
    inputs: Tensor,
) -> None:  # fmt: skip
    """Appends g = a · softplus(alpha + dt) and beta = σ(b), into the last columns of inputs.

    Args:
        program: what the dispatch is appended to.
        projected: [rows, any width], f32 or f16.
        first: the column of b, which alpha follows.
        weights: of the layer.
        sizes: of the rule.
        inputs: of `DeltaTensors`.
    """
    constants = gate_constants(projected, first, weights, sizes)
    check_shape("delta_gates inputs", inputs, projected.shape[0], sizes.input_size)
    extent = extent_of(projected)
    program.dispatch(
        "delta_gates",
        constants | {"input_stride": sizes.input_size},
        [extent.uniform, projected, weights.a, weights.dt, inputs],
        -(-extent.maximum * sizes.value_heads // 256),
    )


def gate_constants(
    projected: Tensor, first: int, weights: GateWeights, sizes: DeltaSizes
) -> dict[str, Any]:
    """The template constants that forward and backward share, once the tensors fit."""
    heads, stride = sizes.value_heads, projected.shape[1]
    check_f32("delta_gates", a=weights.a, dt=weights.dt)
    check_shape("delta_gates a", weights.a, heads)
    check_shape("delta_gates dt", weights.dt, heads)
    if heads % 4 or stride % 4 or first % 4 or first + 2 * heads > stride:
        raise ValueError(f"delta_gates: {heads} heads at {first} of {stride}: not by 4, or beyond")
    return {"x_type": projected.dtype, "stride": stride, "first": first, "heads": heads}


def gated_delta(
    program: Program, tensors: DeltaTensors, sizes: DeltaSizes, segments: Tensor
) -> None:
    """Appends the rule over the rows of each example.

    Args:
        program: what the dispatches are appended to.
        tensors: inputs is read, all else written.
        sizes: of the rule.
        segments: u32 [rows, 2], first row and end of the row's example.
    """
    check_shape("gated_delta segments", segments, tensors.inputs.shape[0], 2)
    _record(program, tensors, sizes, [segments], text=False)


def gated_delta_text(
    program: Program, tensors: DeltaTensors, sizes: DeltaSizes, positions: Tensor, state: Tensor
) -> None:
    """Appends the rule over new rows of a text.

    Args:
        program, tensors, sizes: as of `gated_delta`.
        positions: u32 [rows], in the text.
        state: f32 [heads, n, n], before and after; not read where the text begins with the rows.
    """
    check_shape("gated_delta positions", positions, tensors.inputs.shape[0])
    check_shape("gated_delta state", state, *sizes.state_shape)
    check_f32("gated_delta", state=state)
    _record(program, tensors, sizes, [positions, state], text=True)


def _record(
    program: Program, tensors: DeltaTensors, sizes: DeltaSizes, places: list[Tensor], *, text: bool
) -> None:
    facts, extent = program.recording.facts, extent_of(tensors.inputs)
    tensors.check(facts, sizes)
    constants = sizes.constants(facts, text=text)
    chunk, n = constants["chunk"], sizes.head_size
    cut = None if text else delta_cut(program.recording, chunk, n)
    family = "delta" if cut is None else "delta_matrix"
    columns = sizes.columns() if cut is None else cut["columns"]
    constants |= cut or {}
    blocks = -(-extent.maximum // chunk) * sizes.value_heads
    products = extent.maximum * sizes.value_heads * n
    program.dispatch(
        f"{family}_prepare",
        constants,
        [extent.uniform, tensors.inputs, tensors.mixes, tensors.deltas, *([] if text else places)],
        blocks,
        flops=4 * products * chunk,
    )
    program.dispatch(
        f"{family}_walk",
        constants | {"columns": columns},
        [
            extent.uniform, tensors.inputs, tensors.mixes, tensors.deltas, tensors.states, *places,
        ],
        blocks * (n // columns),
        flops=products * (6 * n + chunk),
    )  # fmt: skip


def gated_delta_row(
    program: Program, inputs: Tensor, sizes: DeltaSizes, positions: Tensor, state: Tensor,
    deltas: Tensor,
) -> None:  # fmt: skip
    """Appends the rule for one new row of a text; arguments as of `gated_delta_text`.

    Args:
        deltas: [1, 4 · value_size], of which what comes out is written.
    """
    check_f32("gated_delta_row", inputs=inputs, state=state, deltas=deltas)
    check_shape("gated_delta_row inputs", inputs, 1, sizes.input_size)
    check_shape("gated_delta_row positions", positions, 1)
    check_shape("gated_delta_row state", state, *sizes.state_shape)
    check_shape("gated_delta_row deltas", deltas, 1, 4 * sizes.value_size)
    constants = sizes.constants(program.recording.facts)
    program.dispatch(
        "delta_row",
        {key: constants[key] for key in ("key_heads", "value_heads", "head_size")},
        [extent_of(inputs).uniform, inputs, positions, state, deltas],
        sizes.value_heads * -(-sizes.head_size // 32),
    )
