"""Noise on the embeddings while training (Jain et al. 2023, "NEFTune"), as transformers adds it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lora.forward.dropout import hashed_columns, matrix_key
from lora.forward.model.inputs import Inputs
from lora.shaders.activations import check_f32, check_shape, extent_of
from lora.shaders.memory import Memory
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

_KEY = matrix_key("neftune")


@dataclass(frozen=True)
class EmbeddingNoise:
    """Uniform noise between −m and m, m = alpha / √(tokens of the example · hidden_size).

    Attributes:
        alpha: NEFTune's.
        scale: what the noise is multiplied by where embeddings are, outside of them.
        rows: u32 [rows], keys of a micro-batch's rows; see `lora.forward.dropout.row_keys`.
        magnitudes: [rows], m of each row; 0 for none, as in an evaluation.
    """

    alpha: float
    scale: float
    rows: Tensor
    magnitudes: Tensor

    @classmethod
    def allocate(
        cls, recording: Recording, inputs: Inputs, alpha: float, scale: float
    ) -> EmbeddingNoise:
        """Room for the largest micro-batch."""

        def tensor(dtype: str) -> Tensor:
            shape = (inputs.rows.maximum,)
            return recording.memory.empty(shape, dtype, purpose="inputs", extent=inputs.rows)

        return cls(alpha, scale, tensor("u32"), tensor("f32"))

    def record(self, program: Program, x: Tensor) -> None:
        """Appends the noise to the embeddings, f32 [rows, hidden_size], in place."""
        rows, width = x.shape
        check_f32("embedding_noise", x=x)
        check_shape("embedding_noise keys", self.rows, rows)
        if width % 4:
            raise ValueError(f"embedding_noise: hidden_size {width} is no multiple of 4")
        extent = extent_of(x)
        program.dispatch(
            "embedding_noise",
            {"width": width, "key": _KEY},
            [extent.uniform, x, self.rows, self.magnitudes],
            -(-extent.maximum * (width // 4) // 64),
        )

    def write(self, memory: Memory, keys: np.ndarray, lengths: np.ndarray, width: int) -> None:
        """Puts a micro-batch of training on the device.

        Args:
            keys: u32 [n], of its rows.
            lengths: [n], tokens of each row's example.
            width: hidden_size.
        """
        memory.write_rows(self.rows, 0, keys)
        magnitudes = self.scale * self.alpha / np.sqrt(lengths * float(width))
        memory.write_rows(self.magnitudes, 0, magnitudes.astype(np.float32))

    def leave_out(self, memory: Memory, n_rows: int) -> None:
        """No noise for the micro-batch on the device."""
        memory.write_rows(self.magnitudes, 0, np.zeros(n_rows, np.float32))


def noise(keys: np.ndarray, lengths: np.ndarray, width: int, alpha: float) -> np.ndarray:
    """What is added to the embeddings, float64 [rows, width]: the reference for the kernel."""
    u = (hashed_columns(keys, _KEY, width) >> np.uint32(8)) / 2.0**24
    magnitudes = np.array([alpha / math.sqrt(n * width) for n in lengths])
    found: np.ndarray = magnitudes[:, None] * (2.0 * u - 1.0)
    return found
