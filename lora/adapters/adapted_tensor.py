"""A PEFT adapter as changes of a base GGUF's tensors: rank, alpha and row order of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora.adapters.peft_files import WEIGHTS, read_peft_factors
from lora.forward.model.architecture import (
    HEAD,
    AdaptableMatrix,
    Architecture,
    permute_rows_to_gguf,
)
from lora.shaders.errors import InputError


@dataclass(frozen=True)
class AdaptedTensor:
    """What an adapter makes of one tensor W of the base: W + scale · B · A.

    Under DoRA (Liu et al. 2024) each row of that sum is brought to a length of its own:
    W' = m · (W + scale · B · A) / ‖W + scale · B · A‖.

    Attributes:
        name: of the tensor in the base GGUF, for example `blk.3.attn_q.weight`.
        a: f32 [rank, columns].
        b: f32 [rows, rank], rows in the GGUF's order.
        scale: alpha / rank, or alpha / sqrt(rank) of an rsLoRA adapter.
        magnitude: DoRA's m, f32 [rows] in the GGUF's order; else None.
    """

    name: str
    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """Rows of A."""
        return len(self.a)

    def change(self, base: np.ndarray, start: int) -> np.ndarray:
        """What is added to some rows of the base, f32 as they are.

        Args:
            base: f32 [n, columns], rows of W.
            start: number of the first of them.
        """
        rows = slice(start, start + len(base))
        change: np.ndarray = (self.b[rows] * np.float32(self.scale)) @ self.a
        if self.magnitude is None:
            return change
        whole = base + change
        lengths = np.linalg.norm(whole, axis=1, keepdims=True)
        return self.magnitude[rows, None] / lengths * whole - base


def read_adapted_tensors(
    directory: Path, settings: Mapping[str, Any], architecture: Architecture
) -> dict[str, AdaptedTensor]:
    """All changes of an adapter by the tensor's name in the base.

    Args:
        settings: of `read_peft_settings`.
        architecture: of the base.

    Raises:
        InputError: the weights can't be read, or do not fit the base.
    """
    places = {path: (matrix, name) for path, matrix, name in adaptable(architecture)}
    adapted = {}
    modules = read_peft_factors(directory, settings)
    if not modules:
        raise InputError(f"{directory / WEIGHTS} is empty: the adapter changes nothing.")
    for path, factors in modules.items():
        if path not in places:
            raise InputError(
                f"{directory} adapts {path}, which the base (architecture {architecture.name!r}, "
                f"{architecture.n_layers} layers) does not have; name the right one with --base."
            )
        matrix, name = places[path]
        a, b, magnitude, rank = factors.a, factors.b, factors.magnitude, factors.rank
        n_rows = matrix.out_size(architecture)
        expected = (rank, matrix.in_size(architecture)), (n_rows, rank)
        if (a.shape, b.shape) != expected:
            raise InputError(
                f"{directory}: {path} has A {a.shape} and B {b.shape}; this base and rank {rank} "
                f"want {expected[0]} and {expected[1]}. Name the right base with --base."
            )
        if magnitude is not None and magnitude.shape != (n_rows,):
            raise InputError(
                f"{directory}: {path} has a lora_magnitude_vector {magnitude.shape}; this base "
                f"wants {(n_rows,)}. Name the right base with --base."
            )
        heads = matrix.permuted_heads(architecture)
        if heads is not None:
            b = np.ascontiguousarray(permute_rows_to_gguf(b, heads))
            if magnitude is not None:
                magnitude = permute_rows_to_gguf(magnitude[:, None], heads)[:, 0]
        adapted[name] = AdaptedTensor(name, a, b, factors.scale, magnitude)
    return adapted


def adaptable(architecture: Architecture) -> Iterator[tuple[str, AdaptableMatrix, str]]:
    """(PEFT's module path, matrix, name of the GGUF's tensor) of all that LoRA can adapt."""
    for matrix in architecture.matrices.values():
        if matrix is not HEAD:
            for layer in range(architecture.n_layers):
                yield matrix.peft_path(layer), matrix, matrix.tensor_name(layer)
    yield HEAD.module, HEAD, "output.weight"
