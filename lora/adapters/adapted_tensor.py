"""A PEFT adapter as changes of a base GGUF's tensors: rank, alpha and row order of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora.adapters.fused_names import as_named_in
from lora.adapters.peft_files import WEIGHTS, read_peft_factors, read_trained_tokens
from lora.adapters.saved_factors import SavedFactors
from lora.forward.model.adaptable import EMBEDDING_PATH, HEAD, AdaptableMatrix
from lora.forward.model.architecture import Architecture
from lora.forward.model.layer_spec import LayerSpec
from lora.forward.model.row_order import to_gguf
from lora.shaders.errors import InputError

EMBEDDING_TENSOR = "token_embd.weight"
# Of Gemma 4: what its embedding gives all layers. PEFT's all-linear takes it; llama.cpp ignores it.
_PROJECTION_OF_ALL = "per_layer_model_projection"


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
        magnitude: DoRA's m, f32 [rows] in the GGUF's order, NaN for rows that it leaves alone;
            None without DoRA.
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
        whole, magnitude = base + change, self.magnitude[rows, None]
        lengths = np.linalg.norm(whole, axis=1, keepdims=True)
        return np.where(np.isnan(magnitude), change, magnitude / lengths * whole - base)


@dataclass(frozen=True)
class ReplacedRows:
    """Rows of a tensor of the base that an adapter has others for.

    Attributes:
        name: of the tensor in the base GGUF.
        tokens: which rows.
        rows: f32 [tokens, columns], what stands there instead.
    """

    name: str
    tokens: tuple[int, ...]
    rows: np.ndarray

    def change(self, base: np.ndarray, start: int) -> np.ndarray:
        """As `AdaptedTensor.change`."""
        found = np.zeros_like(base)
        for token, row in zip(self.tokens, self.rows, strict=True):
            if start <= token < start + len(base):
                found[token - start] = row - base[token - start]
        return found


@dataclass(frozen=True)
class SumOfChanges:
    """Several changes of one tensor: each of the base as it is, added up."""

    parts: tuple[AdaptedTensor | ReplacedRows, ...]

    def change(self, base: np.ndarray, start: int) -> np.ndarray:
        """As `AdaptedTensor.change`."""
        found = np.zeros_like(base)
        for part in self.parts:
            found += part.change(base, start)
        return found


TensorChange = AdaptedTensor | ReplacedRows | SumOfChanges


def read_replaced_rows(
    directory: Path, settings: Mapping[str, Any], architecture: Architecture
) -> ReplacedRows | None:
    """The rows of the embedding that an adapter brings; None where it has none.

    Args:
        settings: of `read_peft_settings`.
        architecture: of the base.

    Raises:
        InputError: they do not fit the base.
    """
    saved = read_trained_tokens(directory, settings)
    if saved is None:
        return None
    n_rows, width = architecture.vocab_size, architecture.hidden_size
    if max(saved.ids) >= n_rows or saved.rows.shape[1] != width:
        raise InputError(
            f"{directory}: has rows of tokens up to {max(saved.ids)}, of {saved.rows.shape[1]} "
            f"columns; this base's embedding is {(n_rows, width)}. Name the right base with --base."
        )
    return ReplacedRows(EMBEDDING_TENSOR, saved.ids, saved.rows)


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
    places = {place.path: place for place in adaptable(architecture)}
    parts: dict[str, list[tuple[int, AdaptedTensor]]] = {}  # by tensor: first row, change
    modules = as_named_in(architecture, directory, read_peft_factors(directory, settings))
    if not modules:
        raise InputError(f"{directory / WEIGHTS} is empty: the adapter changes nothing.")
    for path, factors in modules.items():
        if path.endswith(_PROJECTION_OF_ALL):
            raise InputError(
                f"{directory} adapts {path}, which llama.cpp does not: it would run without a word "
                "and give something else. Train without it (adapter.targets: all-linear leaves it "
                "out)."
            )
        if path == EMBEDDING_PATH:
            parts[EMBEDDING_TENSOR] = [(0, _of_embedding(directory, factors, architecture))]
            continue
        if path not in places:
            raise InputError(
                f"{directory} adapts {path}, which the base (architecture {architecture.name!r}, "
                f"{architecture.n_layers} layers) does not have; name the right one with --base."
            )
        place = places[path]
        a, b, magnitude, rank = factors.a, factors.b, factors.magnitude, factors.rank
        n_rows = place.matrix.out_size(place.holder)
        expected = (rank, place.matrix.in_size(place.holder)), (n_rows, rank)
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
        rows = place.matrix.row_order(place.holder)
        a = np.ascontiguousarray(to_gguf(a.T, place.matrix.column_order(place.holder)).T)
        b = to_gguf(b, rows)
        if magnitude is not None:
            magnitude = to_gguf(magnitude, rows)
        one = AdaptedTensor(place.tensor, a, b, factors.scale, magnitude)
        parts.setdefault(place.tensor, []).append((place.first_row, one))
    fused = {place.tensor: place.tensor_rows for place in places.values() if place.first_row}
    return {
        name: _as_one(found, fused[name]) if name in fused else found[0][1]
        for name, found in parts.items()
    }


def _of_embedding(
    directory: Path, factors: SavedFactors, architecture: Architecture
) -> AdaptedTensor:
    """A change of the embedding, whose rows are the columns of PEFT's A."""
    n_rows, width = architecture.vocab_size, architecture.hidden_size
    expected = (factors.rank, n_rows), (width, factors.rank)
    if (factors.a.shape, factors.b.shape) != expected:
        raise InputError(
            f"{directory}: {EMBEDDING_PATH} has A {factors.a.shape} and B {factors.b.shape}; this "
            f"base wants {expected[0]} and {expected[1]}. Name the right base with --base."
        )
    a, b = (np.ascontiguousarray(one.T) for one in (factors.b, factors.a))
    return AdaptedTensor(EMBEDDING_TENSOR, a, b, factors.scale)


def _as_one(parts: Sequence[tuple[int, AdaptedTensor]], n_rows: int) -> AdaptedTensor:
    """Changes of rows of one tensor as one change: A stacked, B in blocks, scales within B.

    Rows that DoRA leaves alone have no magnitude: NaN.
    """
    parts = sorted(parts, key=lambda part: part[0])  # q, k, v, however the adapter lists them
    rank = sum(part.rank for _, part in parts)
    b, column = np.zeros((n_rows, rank), np.float32), 0
    magnitude = np.full(n_rows, np.nan, np.float32)
    for first, part in parts:
        rows = slice(first, first + len(part.b))
        b[rows, column : column + part.rank] = part.b * np.float32(part.scale)
        column += part.rank
        if part.magnitude is not None:
            magnitude[rows] = part.magnitude
    has_lengths = any(part.magnitude is not None for _, part in parts)
    a = np.concatenate([part.a for _, part in parts])
    return AdaptedTensor(parts[0][1].name, a, b, 1.0, magnitude if has_lengths else None)


@dataclass(frozen=True)
class Adaptable:
    """Where a matrix that LoRA can adapt lies.

    Attributes:
        path: PEFT's, of the module.
        holder: what has its sizes.
        tensor: name of the GGUF's tensor that holds it, with others where the file fuses them.
        first_row: of it, in that tensor.
    """

    path: str
    matrix: AdaptableMatrix
    holder: LayerSpec | Architecture
    tensor: str
    first_row: int = 0

    @property
    def tensor_rows(self) -> int:
        """Rows of the tensor that holds it, where that holds its whole group."""
        assert isinstance(self.holder, LayerSpec)  # the head is alone in its tensor
        return sum(m.out_size(self.holder) for m in self.holder.groups[self.matrix.group])


def adaptable(architecture: Architecture) -> Iterator[Adaptable]:
    """All that LoRA can adapt."""
    for layer, spec in enumerate(architecture.layers):
        for matrix in (matrix for members in spec.groups.values() for matrix in members):
            place = architecture.place_of(layer, matrix)
            yield Adaptable(matrix.peft_path(layer), matrix, spec, *place)
    yield Adaptable(HEAD.module, HEAD, architecture, "output.weight")
