"""The token embedding: rows of a quantized matrix."""

from __future__ import annotations

from lora.forward.model.weights import FrozenMatrix
from lora.shaders.activations import activation, check_shape
from lora.shaders.program import Program
from lora.shaders.tensor import Extent, Tensor


def embedding(
    program: Program,
    tokens: Tensor,
    matrix: FrozenMatrix,
    extent: Extent,
    *,
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:  # [rows, hidden_size]
    """Appends y[m] = W[tokens[m]] · scale, decoding only the rows that are looked up.

    Args:
        tokens: u32 [extent.maximum], each below the vocabulary's size (the host checks).
        matrix: W [vocab_size, hidden_size], in one or several parts.
        extent: how many tokens are in use.
        scale: Gemma's sqrt(hidden_size); 1 elsewhere.
        out: where to write; a new tensor by default.
    """
    width = matrix.in_features
    if width % 4:
        raise ValueError(f"embedding: hidden_size {width} is no multiple of 4")
    check_shape("embedding tokens", tokens, extent.maximum)
    y = out if out is not None else activation(program, extent, width)
    check_shape("embedding output", y, extent.maximum, width)
    for part in matrix.parts:
        constants = {
            "quantization": part.quantization.name,
            "width": width,
            "row_words": part.words.shape[1],
            "first_token": part.first_feature,
            "n_tokens": part.out_features,
            "scale": scale,
        }
        n_lanes = extent.maximum * -(-width // 8)
        tensors = [extent.uniform, tokens, part.words, y]
        program.dispatch("embedding", constants, tensors, -(-n_lanes // 64))
    return y
