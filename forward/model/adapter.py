"""The low-rank factors: how they lie in flat buffers.

All A and B lie in one flat f32 array, their gradients and the two moments of AdamW in others of the
same layout: clipping and AdamW are one dispatch each over it, and a checkpoint is a few arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lora.forward.model.adaptable import EMBEDDING, EMBEDDING_PATH, HEAD, AdaptableMatrix
from lora.forward.model.adapted_group import AdaptedGroup, whole_quads
from lora.forward.model.architecture import Architecture
from lora.forward.model.embedding_place import EmbeddingPlace
from lora.forward.model.factors import Factors, LoraFactors
from lora.forward.model.low_rank import NOTHING_BESIDE, Beside, LowRank
from lora.forward.model.row_order import to_gguf, to_hf
from lora.forward.model.trained_tokens import TokenIndex, TokenRows
from lora.shaders.errors import InputError
from lora.shaders.facts import DeviceFacts
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

ALIGNMENT = 64  # elements: 256 bytes, the strictest alignment of a binding


Orders = tuple[np.ndarray | None, np.ndarray | None]


class AdapterLayout:
    """Which matrices are adapted, and where each A and B lies in a flat f32 array.

    Args:
        architecture: of the base model.
        layers: numbers of the adapted layers.
        targets: PEFT names of the adapted matrices, each one that the architecture has; lm_head
            and embed_tokens are adapted whatever the layers are.
        rank: of every matrix, as the user asked for it.
        scale: what B · A is multiplied by.
        modules: what single matrices are adapted with, by PEFT's path; those that are not there
            are left alone. None: all that layers and targets say, with `rank` and `scale`.
        alignment: each group's stacked A, and B, begins on a multiple of it, 64 or more of them.
        beside: what is trained beside A and B.

    Raises:
        InputError: the layers have none of the matrices, or rows of this model's embedding can't
            be trained beside them.
    """

    def __init__(
        self,
        architecture: Architecture,
        layers: Sequence[int],
        targets: Iterable[str],
        rank: int,
        scale: float,
        modules: Mapping[str, LowRank] | None = None,
        alignment: int = ALIGNMENT,
        beside: Beside = NOTHING_BESIDE,
    ) -> None:
        self.architecture = architecture
        self.targets = frozenset(targets)
        self._modules = modules
        self._every = LowRank(rank, scale)
        self._alignment = alignment
        self.dora, self.tokens = beside.dora, beside.tokens
        self.layers = [layer for layer in sorted(layers) if self._adapts(layer)]
        self.rank = rank
        self.padded_rank = whole_quads(rank)
        self.scale = scale
        self.groups: list[AdaptedGroup] = []
        self.n_trainable = 0  # parameters, padding not counted
        self.n_trainable += len(self.tokens) * architecture.hidden_size
        self._end = _aligned(whole_quads(len(self.tokens)) * architecture.hidden_size, alignment)
        self.embedding: EmbeddingPlace | None = None
        if (low := self._low(-1, EMBEDDING)) is not None:
            self.embedding = EmbeddingPlace(architecture, self._end, alignment, low)
            self._end = self.embedding.end
            self.n_trainable += self.embedding.n_trainable
        for layer in self.layers:
            for name, matrices in architecture.layers[layer].groups.items():
                self._place(layer, name, matrices)
        self._place(architecture.n_layers, HEAD.group, (HEAD,))
        if self.targets and layers and not self.groups and self.embedding is None:
            raise InputError(
                f"adapter.targets: none of the layers {', '.join(map(str, sorted(layers)))} has "
                f"{' or '.join(sorted(self.targets))} of its own; lora inspect says how many do."
            )
        self._check_tokens()
        self.size = max(self._end, ALIGNMENT)  # elements of a flat array

    @property
    def below_layers(self) -> bool:
        """Whether it changes what enters the lowest layer."""
        return bool(self.tokens) or self.embedding is not None

    def _check_tokens(self) -> None:
        """Refuses rows of the embedding where their gradient would not be whole."""
        a = self.architecture
        if self.below_layers and a.per_layer_size:
            key = "trainable_tokens" if self.tokens else "targets: embed_tokens"
            raise InputError(
                f"adapter.{key}: in a model of the architecture "
                f"{a.name!r} tokens have inputs of their own for every layer, which come of the "
                "embedding, too; gradients through these are not supported. Leave it out."
            )

    def _adapts(self, layer: int) -> bool:
        """Whether a layer has one of the matrices."""
        groups = self.architecture.layers[layer].groups.values()
        return any(self._low(layer, matrix) for group in groups for matrix in group)

    def _low(self, layer: int, matrix: AdaptableMatrix) -> LowRank | None:
        """What a matrix is adapted with; None for nothing."""
        if self._modules is not None:
            return self._modules.get(matrix.peft_path(layer))
        return self._every if matrix.module in self.targets else None

    def _place(self, layer: int, name: str, matrices: Sequence[AdaptableMatrix]) -> None:
        """Gives the adapted matrices of one group their place after all others."""
        members: list[AdaptableMatrix] = []
        ranges: list[tuple[int, int]] = []
        lows: list[LowRank] = []
        column = 0
        holder = self.architecture.holder(layer)
        for matrix in matrices:
            rows = whole_quads(matrix.out_size(holder))
            low = self._low(layer, matrix)
            if low is not None:
                members.append(matrix)
                ranges.append((column, column + rows))
                lows.append(low)
                self.n_trainable += low.rank * (matrix.out_size(holder) + matrix.in_size(holder))
            column += rows
        if not members:
            return
        in_features = members[0].in_size(holder)
        rank = whole_quads(max(low.rank for low in lows))
        a_start = self._end
        b_start = _aligned(a_start + len(members) * rank * in_features, self._alignment)
        n_rows = sum(stop - start for start, stop in ranges)
        self._end = _aligned(b_start + n_rows * rank, self._alignment)
        m_start = None
        if self.dora:
            m_start, self._end = self._end, _aligned(self._end + n_rows, self._alignment)
            self.n_trainable += sum(matrix.out_size(holder) for matrix in members)
        self.groups.append(
            AdaptedGroup(
                layer, name, tuple(members), tuple(ranges), in_features, a_start, b_start,
                tuple(lows), m_start,
            )
        )  # fmt: skip

    @property
    def lowest_layer(self) -> int:
        """The lowest adapted layer: the backward ends there, and all below it is a fixed prefix.

        n_layers where only the head is adapted; 0 where the embedding is, below all layers.
        """
        if self.below_layers:
            return 0
        return self.layers[0] if self.layers else self.architecture.n_layers

    def factors(self, flat: Tensor, index: TokenIndex | None = None) -> Factors:
        """The factors inside a flat tensor [size], by (layer, group).

        Args:
            index: of its tokens, where these are to be among them.
        """
        found = {}
        for group in self.groups:
            rank = group.padded_rank
            a_shape = (len(group.members) * rank, group.in_features)
            b_shape = (sum(stop - start for start, stop in group.ranges), rank)
            a = flat.slice(group.a_start, group.a_start + a_shape[0] * a_shape[1])
            b = flat.slice(group.b_start, group.b_start + b_shape[0] * b_shape[1])
            found[group.layer, group.group] = LoraFactors(
                a.reshape(*a_shape), b.reshape(*b_shape), rank, group.scale, group.ranges,
                group.member_scales,
                None if group.m_start is None
                else flat.slice(group.m_start, group.m_start + b_shape[0]),
            )  # fmt: skip
        tokens = None
        if index is not None:
            tokens = TokenRows(index, self.token_rows(flat), self.architecture.tied_head)
        embedding = None if self.embedding is None else self.embedding.factors(flat)
        return Factors(found, tokens, embedding)

    def token_rows(self, flat: Tensor) -> Tensor:
        """The rows of its tokens [n in whole quads, hidden_size] in a flat tensor [size]."""
        n, width = whole_quads(len(self.tokens)), self.architecture.hidden_size
        return flat.slice(0, n * width).reshape(n, width)

    def token_index(self, recording: Recording) -> TokenIndex | None:
        """A new index of its tokens; None where it has none."""
        if not self.tokens:
            return None
        return TokenIndex.allocate(recording, self.tokens, self.architecture.vocab_size)

    def trained_tokens(self, flat: np.ndarray) -> np.ndarray:
        """The rows of its tokens [n, hidden_size], a view of a flat array."""
        width = self.architecture.hidden_size
        return flat[: len(self.tokens) * width].reshape(-1, width)

    def check_bindings(self, facts: DeviceFacts) -> None:
        """Checks that the device can bind the factors of every group.

        Raises:
            InputError: one is too large; the message has the highest rank that works.
        """
        most = facts.max_binding // (4 * self.architecture.hidden_size) // 4 * 4
        if len(self.tokens) > most:
            raise InputError(
                f"adapter.trainable_tokens: got {len(self.tokens):,} tokens; {facts.name} can bind "
                f"the rows of {most:,} of this model's."
            )
        if self.embedding is not None:
            self.embedding.check_bindings(facts)
        for group in self.groups:
            rows = sum(stop - start for start, stop in group.ranges)
            width = rows + len(group.members) * group.in_features
            if 4 * width * group.padded_rank + 4 * ALIGNMENT > facts.max_binding:
                names = ", ".join(matrix.module for matrix in group.members)
                highest = (facts.max_binding - 4 * ALIGNMENT) // (4 * width) // 4 * 4
                rank = max(low.rank for low in group.low)
                raise InputError(
                    f"adapter.rank: got {rank}; the factors of {names} would take "
                    f"{4 * width * group.padded_rank / 2**20:.0f} MiB, more than the "
                    f"{facts.max_binding / 2**20:.0f} MiB that {facts.name} can bind. The "
                    f"highest rank for them here is {highest}."
                )

    def _views(self, flat: np.ndarray) -> Iterable[tuple[str, Orders, np.ndarray, np.ndarray]]:
        """(PEFT path, orders, A [rank, in], B [out, rank]), views of a flat array.

        The orders are those of B's rows and of A's columns, see `AdaptableMatrix.row_order`.
        """
        if self.embedding is not None:
            yield EMBEDDING_PATH, (None, None), *self.embedding.views(flat)
        for group in self.groups:
            holder = self.architecture.holder(group.layer)
            a_row = group.a_start
            b_row = group.b_start
            rank = group.padded_rank
            for matrix, (start, stop), low in zip(
                group.members, group.ranges, group.low, strict=True
            ):
                n_a = rank * group.in_features
                n_b = (stop - start) * rank
                a = flat[a_row : a_row + n_a].reshape(rank, group.in_features)
                b = flat[b_row : b_row + n_b].reshape(stop - start, rank)
                out_features = matrix.out_size(holder)
                yield (
                    matrix.peft_path(group.layer),
                    (matrix.row_order(holder), matrix.column_order(holder)),
                    a[: low.rank],
                    b[:out_features, : low.rank],
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

    def magnitudes(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """DoRA's m of each module [out], by PEFT's path, rows in Hugging Face's order."""
        found = {}
        for path, order, rows in self._magnitude_views(flat):
            found[path] = to_hf(rows, order).copy()
        return found

    def set_magnitudes(self, flat: np.ndarray, magnitudes: Mapping[str, np.ndarray]) -> None:
        """The inverse of `magnitudes`, into a flat array."""
        for path, order, rows in self._magnitude_views(flat):
            given = magnitudes[path]
            if given.shape != rows.shape:
                raise ValueError(f"{path} has magnitudes {given.shape}, expected {rows.shape}")
            rows[:] = to_gguf(given, order)

    def _magnitude_views(
        self, flat: np.ndarray
    ) -> Iterable[tuple[str, np.ndarray | None, np.ndarray]]:
        """(PEFT path, order of rows, m [out]), views of a flat array."""
        for group in self.groups:
            if group.m_start is None:
                continue
            holder, at = self.architecture.holder(group.layer), group.m_start
            for matrix, (start, stop) in zip(group.members, group.ranges, strict=True):
                rows = flat[at : at + matrix.out_size(holder)]
                yield matrix.peft_path(group.layer), matrix.row_order(holder), rows
                at += stop - start

    def initial(self, seed: int, init: str = "default") -> np.ndarray:
        """A new adapter, f32 [size], B zero; DoRA's magnitudes, too, which the base decides.

        Of an embedding A is zero, and B normal.

        Args:
            init: as PEFT's init_lora_weights: "default", A uniform in ±1/sqrt(in); "gaussian", A
                normal with the standard deviation 1/rank.
        """
        if init not in ("default", "gaussian"):
            raise ValueError(f"init {init!r} is neither default nor gaussian")
        rng = np.random.default_rng(seed)
        flat = np.zeros(self.size, np.float32)
        for path, _, a, b in self._views(flat):
            if path == EMBEDDING_PATH:  # of which PEFT begins A with zeros
                b[:] = rng.normal(0.0, 1.0, b.shape)
            elif init == "gaussian":
                a[:] = rng.normal(0.0, 1.0 / a.shape[0], a.shape)
            else:
                bound = 1.0 / np.sqrt(a.shape[1])
                a[:] = rng.uniform(-bound, bound, a.shape)
        return flat

    def b_blocks(self) -> np.ndarray:
        """Which 64 neighbouring elements of a flat array are of B, bool [⌈size / 64⌉]."""
        found = np.zeros(-(-self.size // ALIGNMENT), bool)
        ends = [*(group.a_start for group in self.groups[1:]), self.size]
        for group, end in zip(self.groups, ends, strict=False):
            found[group.b_start // ALIGNMENT : -(-end // ALIGNMENT)] = True
        return found

    @property
    def is_partial(self) -> bool:
        """Whether it leaves out a matrix of a name that it adapts elsewhere in its layers."""
        every = AdapterLayout(self.architecture, self.layers, self.targets, self.rank, self.scale)
        return len(self.low_ranks()) < len(every.low_ranks())

    def low_ranks(self) -> dict[str, LowRank]:
        """What each matrix is adapted with, by PEFT's path."""
        own = {} if self.embedding is None else {EMBEDDING_PATH: self.embedding.low}
        return own | {
            matrix.peft_path(group.layer): low
            for group in self.groups
            for matrix, low in zip(group.members, group.low, strict=True)
        }


def _aligned(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment
