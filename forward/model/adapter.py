"""The low-rank factors: how they lie in flat buffers, and as the kernels see them.

All A and B lie in one flat f32 array, their gradients and the two moments of AdamW in others of the
same layout: clipping and AdamW are one dispatch each over it, and a checkpoint is a few arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora.forward.model.adaptable import HEAD, AdaptableMatrix
from lora.forward.model.architecture import Architecture
from lora.forward.model.row_order import to_gguf, to_hf
from lora.shaders.errors import InputError
from lora.shaders.facts import DeviceFacts
from lora.shaders.tensor import Tensor

_ALIGNMENT = 64  # elements: 256 bytes, the strictest alignment of a binding


@dataclass(frozen=True)
class LoraFactors:
    """The A and B of matrices that share an input ("members": q k v; gate up; or one alone).

    y[:, start:stop] = x · W[start:stop]ᵀ + scale · z_g · B_gᵀ with z = x · Aᵀ, for each member g
    and its range (start, stop) of output columns. Ranges are in order; a matrix of the group that
    is not adapted has none.

    Attributes:
        a: [members · rank, in_features], the members' A stacked.
        b: [sum of the members' out_features, rank], the members' B stacked.
        rank: a multiple of 4. A rank that is none is padded with rows of A and columns of B that
            are zero: their gradients are zero then, so that AdamW leaves them zero.
        scale: alpha / rank (rsLoRA: alpha / sqrt(rank)), with the rank that the user asked for.
        ranges: output columns [start, stop) of each member.
    """

    a: Tensor
    b: Tensor
    rank: int
    scale: float
    ranges: tuple[tuple[int, int], ...]

    @property
    def n_members(self) -> int:
        """How many matrices it adapts."""
        return len(self.ranges)

    def first_feature(self, member: int) -> int:
        """The row of the stacked B where a member's begins."""
        return sum(stop - start for start, stop in self.ranges[:member])


Orders = tuple[np.ndarray | None, np.ndarray | None]
Factors = Mapping[tuple[int, str], LoraFactors]  # by (layer, group); the head's layer is n_layers


@dataclass(frozen=True)
class AdaptedGroup:
    """Where the factors of one group of one layer lie in the flat arrays."""

    layer: int  # n_layers for the head
    group: str  # of LayerSpec.groups, or "head"
    members: tuple[AdaptableMatrix, ...]  # the adapted ones
    ranges: tuple[tuple[int, int], ...]
    in_features: int
    a_start: int
    b_start: int


class AdapterLayout:
    """Which matrices are adapted, and where each A and B lies in a flat f32 array.

    Args:
        architecture: of the base model.
        layers: numbers of the adapted layers.
        targets: PEFT names of the adapted matrices, each one that the architecture has; lm_head
            is adapted whatever the layers are.
        rank: of every matrix, as the user asked for it.
        scale: what B · A is multiplied by.

    Raises:
        InputError: the layers have none of the matrices.
    """

    def __init__(
        self,
        architecture: Architecture,
        layers: Sequence[int],
        targets: Iterable[str],
        rank: int,
        scale: float,
    ) -> None:
        self.architecture = architecture
        self.targets = frozenset(targets)
        self.layers = [layer for layer in sorted(layers) if self._adapts(layer)]
        self.rank = rank
        self.padded_rank = -(-rank // 4) * 4
        self.scale = scale
        self.groups: list[AdaptedGroup] = []
        self.n_trainable = 0  # parameters, padding not counted
        self._end = 0
        for layer in self.layers:
            for name, matrices in architecture.layers[layer].groups.items():
                self._place(layer, name, matrices)
        self._place(architecture.n_layers, HEAD.group, (HEAD,))
        if self.targets and layers and not self.groups:
            raise InputError(
                f"adapter.targets: none of the layers {', '.join(map(str, sorted(layers)))} has "
                f"{' or '.join(sorted(self.targets))} of its own; lora inspect says how many do."
            )
        self.size = max(self._end, _ALIGNMENT)  # elements of a flat array

    def _adapts(self, layer: int) -> bool:
        """Whether a layer has one of the matrices."""
        groups = self.architecture.layers[layer].groups.values()
        return any(matrix.module in self.targets for group in groups for matrix in group)

    def _place(self, layer: int, name: str, matrices: Sequence[AdaptableMatrix]) -> None:
        """Gives the adapted matrices of one group their place after all others."""
        members, ranges, column = [], [], 0
        holder = self.architecture.holder(layer)
        for matrix in matrices:
            rows = _whole_quads(matrix.out_size(holder))
            if matrix.module in self.targets:
                members.append(matrix)
                ranges.append((column, column + rows))
                self.n_trainable += self.rank * (matrix.out_size(holder) + matrix.in_size(holder))
            column += rows
        if not members:
            return
        in_features = members[0].in_size(holder)
        b_start = _aligned(self._end + len(members) * self.padded_rank * in_features)
        group = AdaptedGroup(
            layer, name, tuple(members), tuple(ranges), in_features, self._end, b_start
        )
        self.groups.append(group)
        n_rows = sum(stop - start for start, stop in ranges)
        self._end = _aligned(b_start + n_rows * self.padded_rank)

    @property
    def lowest_layer(self) -> int:
        """The lowest adapted layer: the backward ends there, and all below it is a fixed prefix.

        n_layers where only the head is adapted.
        """
        return self.layers[0] if self.layers else self.architecture.n_layers

    def factors(self, flat: Tensor) -> dict[tuple[int, str], LoraFactors]:
        """The factors inside a flat tensor [size], by (layer, group)."""
        found = {}
        for group in self.groups:
            a_shape = (len(group.members) * self.padded_rank, group.in_features)
            b_shape = (sum(stop - start for start, stop in group.ranges), self.padded_rank)
            a = flat.slice(group.a_start, group.a_start + a_shape[0] * a_shape[1])
            b = flat.slice(group.b_start, group.b_start + b_shape[0] * b_shape[1])
            found[group.layer, group.group] = LoraFactors(
                a.reshape(*a_shape), b.reshape(*b_shape), self.padded_rank, self.scale, group.ranges
            )
        return found

    def check_bindings(self, facts: DeviceFacts) -> None:
        """Checks that the device can bind the factors of every group.

        Raises:
            InputError: one is too large; the message has the highest rank that works.
        """
        for group in self.groups:
            rows = sum(stop - start for start, stop in group.ranges)
            width = rows + len(group.members) * group.in_features
            if 4 * width * self.padded_rank + 4 * _ALIGNMENT > facts.max_binding:
                names = ", ".join(matrix.module for matrix in group.members)
                highest = (facts.max_binding - 4 * _ALIGNMENT) // (4 * width) // 4 * 4
                raise InputError(
                    f"adapter.rank: got {self.rank}; the factors of {names} would take "
                    f"{4 * width * self.padded_rank / 2**20:.0f} MiB, more than the "
                    f"{facts.max_binding / 2**20:.0f} MiB that {facts.name} can bind. The "
                    f"highest rank for them here is {highest}."
                )

    def _views(self, flat: np.ndarray) -> Iterable[tuple[str, Orders, np.ndarray, np.ndarray]]:
        """(PEFT path, orders, A [rank, in], B [out, rank]), views of a flat array.

        The orders are those of B's rows and of A's columns, see `AdaptableMatrix.row_order`.
        """
        for group in self.groups:
            holder = self.architecture.holder(group.layer)
            a_row = group.a_start
            b_row = group.b_start
            for matrix, (start, stop) in zip(group.members, group.ranges, strict=True):
                n_a = self.padded_rank * group.in_features
                n_b = (stop - start) * self.padded_rank
                a = flat[a_row : a_row + n_a].reshape(self.padded_rank, group.in_features)
                b = flat[b_row : b_row + n_b].reshape(stop - start, self.padded_rank)
                out_features = matrix.out_size(holder)
                yield (
                    matrix.peft_path(group.layer),
                    (matrix.row_order(holder), matrix.column_order(holder)),
                    a[: self.rank],
                    b[:out_features, : self.rank],
                )
                a_row += n_a
                b_row += n_b

    def to_modules(self, flat: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """A [rank, in] and B [out, rank] by PEFT's module path, rows in Hugging Face's order.

        Args:
            flat: f32 [size], in the layout of the device.
        """
        modules = {}
        for path, (rows, columns), a, b in self._views(flat):
            modules[path] = (
                np.array(to_hf(a.T, columns).T, order="C"), np.ascontiguousarray(to_hf(b, rows))
            )  # fmt: skip
        return modules

    def from_modules(self, modules: dict[str, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """The inverse of `to_modules`: f32 [size], padding zero. Every module must be there."""
        flat = np.zeros(self.size, np.float32)
        for path, (rows, columns), a, b in self._views(flat):
            given_a, given_b = modules[path]
            if given_a.shape != a.shape or given_b.shape != b.shape:
                raise ValueError(
                    f"{path} has A {given_a.shape} and B {given_b.shape}, expected {a.shape} and "
                    f"{b.shape}"
                )
            a[:] = to_gguf(given_a.T, columns).T
            b[:] = to_gguf(given_b, rows)
        return flat

    def initial(self, seed: int) -> np.ndarray:
        """A new adapter, f32 [size]: A uniform in ±1/sqrt(in) as PEFT's, B zero."""
        rng = np.random.default_rng(seed)
        flat = np.zeros(self.size, np.float32)
        for _, _, a, _ in self._views(flat):
            bound = 1.0 / np.sqrt(a.shape[1])
            a[:] = rng.uniform(-bound, bound, a.shape)
        return flat


def _aligned(n: int) -> int:
    return -(-n // _ALIGNMENT) * _ALIGNMENT


def _whole_quads(n: int) -> int:
    """Rows of B that are stored: kernels take four columns of the output at once."""
    return -(-n // 4) * 4
