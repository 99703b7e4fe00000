"""Mixers that carry a state along a text, in place of attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lora.forward.model.adaptable import DELTA_NET, SHORT_CONVOLUTION, AdaptableMatrix
from lora.forward.model.layer_spec import BlockSpec

# Within a layer.
CONV_WEIGHT = "shortconv.conv.weight"
DELTA_CONV, DELTA_NORM = "ssm_conv1d.weight", "ssm_norm.weight"
DELTA_DECAY, DELTA_STEP = "ssm_a", "ssm_dt.bias"
UNIT_LENGTH = "unit length"  # weights with which RMSNorm brings q and k to their lengths
MOST_TAPS = 8  # of a convolution
MOST_DELTA_HEAD = 128  # numbers in a head that the rule's kernels have workgroup memory for


@dataclass(frozen=True)
class ShortConvolution(BlockSpec):
    """out_proj(C · convolution(B · x)) with B, C, x = in_proj of the input (LFM2).

    The convolution is each column's own, over a row and those before it in its example.

    Attributes:
        width: columns of B, of C and of x.
        taps: rows that the convolution sees, its own included.
    """

    width: int
    taps: int
    recurrent = True

    @property
    def in_size(self) -> int:
        """Width of B, C and x side by side."""
        return 3 * self.width

    @property
    def matrices(self) -> tuple[AdaptableMatrix, ...]:
        """See `BlockSpec`."""
        return SHORT_CONVOLUTION

    @property
    def tables(self) -> Mapping[str, tuple[int, ...]]:
        """See `BlockSpec`."""
        return {CONV_WEIGHT: (self.width, self.taps)}


@dataclass(frozen=True)
class GatedDeltaNet(BlockSpec):
    """Linear attention by the gated delta rule (Yang et al. 2024), as Qwen3.5 has it.

    q, k and v pass a causal convolution and SiLU, q and k are brought to length 1 (q to
    1/sqrt(head_size)), and what the rule gives passes an RMSNorm of each head and a gate: SiLU of
    z.

    Attributes:
        key_heads: heads of q and k.
        value_heads: heads of v and of all that follows it; a multiple of 4 and of key_heads. In the
            GGUF's order value head h takes key head h modulo their number.
        head_size: numbers in any head.
        taps: rows that the convolution sees, its own included.
    """

    key_heads: int
    value_heads: int
    head_size: int
    taps: int
    recurrent = True

    @property
    def key_size(self) -> int:
        """Width of all keys together."""
        return self.key_heads * self.head_size

    @property
    def value_size(self) -> int:
        """Width of all values together."""
        return self.value_heads * self.head_size

    @property
    def conv_size(self) -> int:
        """Width of q, k and v side by side."""
        return 2 * self.key_size + self.value_size

    @property
    def gates_at(self) -> int:
        """The column of the first product where b begins, which alpha follows; z is before it."""
        return self.conv_size + self.value_size

    @property
    def projected_size(self) -> int:
        """Width of q, k, v, z, b and alpha side by side."""
        return self.gates_at + 2 * self.value_heads

    @property
    def matrices(self) -> tuple[AdaptableMatrix, ...]:
        """See `BlockSpec`."""
        return DELTA_NET

    @property
    def tables(self) -> Mapping[str, tuple[int, ...]]:
        """See `BlockSpec`."""
        return {
            DELTA_CONV: (self.conv_size, self.taps),
            DELTA_NORM: (self.head_size,),
            DELTA_DECAY: (self.value_heads,),
            DELTA_STEP: (self.value_heads,),
        }

    @property
    def constants(self) -> Mapping[str, np.ndarray]:
        """See `BlockSpec`."""
        n = self.head_size
        return {UNIT_LENGTH: np.repeat(np.array([1 / n, n**-0.5], np.float32), n)}

    def value_order(self, size: int) -> np.ndarray:
        """Which of Hugging Face's places each of the GGUF's is, where the last are of value heads.

        There the value heads of a key head lie side by side; in the GGUF the first of every key
        head do, then the second.

        Args:
            size: how many places there are: of a number a head, or of all numbers of a head, with
                those of q and k before them.
        """
        width = self.head_size if size >= self.value_size else 1
        before, n = size - self.value_heads * width, self.key_heads
        heads = np.arange(self.value_heads * width).reshape(n, self.value_heads // n, width)
        return np.concatenate([np.arange(before), before + heads.swapaxes(0, 1).reshape(-1)])
