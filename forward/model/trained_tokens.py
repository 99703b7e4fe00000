"""Tokens whose rows of the embedding are trained themselves, as PEFT's trainable_token_indices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from gguf import GGMLQuantizationType, quants

from lora.forward.gguf.file import GGUFFile
from lora.forward.gguf.quantization import QUANTIZATIONS
from lora.forward.model.adapted_group import whole_quads
from lora.forward.model.inputs import indices
from lora.forward.model.weights import FrozenMatrix, MatrixPart
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor

NO_SLOT = 0xFFFFFFFF  # of a token that is not trained, and the id where there is no token


@dataclass(frozen=True)
class TokenIndex:
    """Which tokens are trained, both ways round.

    Attributes:
        n_tokens: how many there are.
        ids: u32 [n_tokens, padded to whole quads], NO_SLOT behind them.
        slots: u32 [vocab_size], the place of each token's row among the trained ones; or NO_SLOT.
        extent: of all of `ids`.
    """

    n_tokens: int
    ids: Tensor
    slots: Tensor
    extent: Extent

    @classmethod
    def allocate(cls, recording: Recording, tokens: Sequence[int], vocab_size: int) -> TokenIndex:
        """For tokens that differ.

        Raises:
            InputError: one is not below the vocabulary's size.
        """
        ids = np.full(whole_quads(len(tokens)), NO_SLOT, np.uint32)
        ids[: len(tokens)] = indices("the trained token", np.array(tokens, np.int64), vocab_size)
        slots = np.full(vocab_size, NO_SLOT, np.uint32)
        slots[list(tokens)] = np.arange(len(tokens))
        memory = recording.memory
        return cls(
            len(tokens),
            memory.upload(ids, purpose="adapter"),
            memory.upload(slots, purpose="adapter"),
            memory.extent(len(ids)),
        )


def embedding_rows(gguf_file: GGUFFile, tokens: Sequence[int]) -> np.ndarray:
    """Rows of the base's embedding, f32 [tokens, hidden_size]: what training begins with."""
    tensor = gguf_file.tensors["token_embd.weight"]
    found = np.zeros((len(tokens), tensor.shape[1]), np.float32)
    for row, token in zip(found, tokens, strict=True):
        data = np.ascontiguousarray(tensor.data[token : token + 1])
        row[:] = quants.dequantize(data, tensor.type).reshape(-1)
    return found


def as_matrix(values: Tensor) -> FrozenMatrix:
    """f32 rows [n, columns], n a multiple of 4, as products take a matrix."""
    n, width = values.shape
    words = replace(values, dtype="u32")
    part = MatrixPart(QUANTIZATIONS[GGMLQuantizationType.F32], words, 0)
    return FrozenMatrix(n, width, (part,))


@dataclass(frozen=True)
class EmbeddingFactors:
    """The A and B of an embedding: rows of A are looked up as those of the base.

    Attributes:
        a: f32 [vocab_size in whole quads, rank in whole quads].
        b: f32 [rank in whole quads, hidden_size].
        scale: what A · B is multiplied by.
    """

    a: Tensor
    b: Tensor
    scale: float

    @property
    def matrix(self) -> FrozenMatrix:
        """B as products take a matrix."""
        return as_matrix(self.b)


@dataclass(frozen=True)
class TokenRows:
    """The rows that stand in place of the base's.

    Attributes:
        index: of which tokens.
        rows: f32 [n_tokens, padded to whole quads; hidden_size]; rows behind the tokens' are zero.
        in_head: whether the head is the embedding: then its rows are these, too.
    """

    index: TokenIndex
    rows: Tensor
    in_head: bool

    @property
    def matrix(self) -> FrozenMatrix:
        """The rows as products take a matrix: [n_tokens in whole quads, hidden_size]."""
        return as_matrix(self.rows)
