"""Attention and its gradient on the device, over rows of which some are spare."""

from __future__ import annotations

import numpy as np

from lora.backward.attention import Attended, attention_backward
from lora.checks.references.attention import Shape
from lora.forward.attention import attention
from lora.forward.heads import Heads
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.attention_cases import activation_of, segments_on


def run_attention(
    recording: Recording, qkv: np.ndarray, segments: np.ndarray, shape: Shape, spare: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """out and lse of all recorded rows, over a fill of -7."""
    extent = recording.memory.extent(len(qkv) + spare)
    recording.memory.set_rows(extent, len(qkv))
    program = Program(recording)
    out, lse = attention(
        program,
        activation_of(recording, extent, qkv),
        segments_on(recording, extent, segments),
        Heads(**shape.options),
    )
    for tensor in (out, lse):
        recording.memory.write(tensor, np.full(tensor.shape, -7.0))
    program.run()
    return recording.memory.read(out), recording.memory.read(lse)


def run_backward(
    recording: Recording,
    qkv: np.ndarray,
    d_out: np.ndarray,
    segments: np.ndarray,
    shape: Shape,
    spare: int = 0,
) -> np.ndarray:
    """d_qkv of all recorded rows, over a fill of -7."""
    extent = recording.memory.extent(len(qkv) + spare)
    recording.memory.set_rows(extent, len(qkv))
    x = activation_of(recording, extent, qkv)
    rows = segments_on(recording, extent, segments)
    d_y = activation_of(recording, extent, d_out)
    program = Program(recording)
    heads = Heads(**shape.options)
    out, lse = attention(program, x, rows, heads)
    d_qkv = attention_backward(program, Attended(x, out, lse), d_y, rows, heads)
    for tensor in (out, lse):
        recording.memory.write(tensor, np.full(tensor.shape, np.nan))
    recording.memory.write(d_qkv, np.full(d_qkv.shape, -7.0))
    program.run()
    return recording.memory.read(d_qkv)
