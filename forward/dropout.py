"""Dropout of what the low-rank factors are given, as PEFT's lora_dropout (Srivastava et al. 2014).

z_g = (mask_g ∘ x) / (1 − p) · A_gᵀ, each matrix with a mask of its own. Masks are stored nowhere:
every kernel finds them again from counters (Salmon et al. 2011, "Parallel Random Numbers: As Easy
as 1, 2, 3"): a key of the row, which says step, example and position; a key of the matrix, which
says layer and module; and the column. So they are the same when a layer is run again, in a resumed
run, wherever an example lies in a micro-batch, and on whichever process.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lora.forward.model.adapter import AdapterLayout
from lora.forward.model.inputs import Inputs
from lora.shaders.memory import Memory
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

_STEPS = 1 << 16  # of a probability
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# As in parts/dropout.wgsl: odd factors of a column's number, of the first round, of the words'.
_COLUMN, _BEGIN, _HALF = np.uint32(0x9E3779B9), np.uint32(0x7FEB352D), np.uint32(0xFFFF)
_WORDS = tuple(map(np.uint32, (0x846CA68B, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1)))


def threshold_of(probability: float) -> int:
    """Below it 16 random bits drop their element: the probability in 65536ths."""
    return min(max(round(probability * _STEPS), 1), _STEPS - 1)


def scale_of(probability: float) -> float:
    """What is left is multiplied by: 1 / (1 − p) of the p that `threshold_of` makes of it."""
    return _STEPS / (_STEPS - threshold_of(probability))


@dataclass(frozen=True)
class GroupDropout:
    """Dropout before one group of matrices, as its kernels take it.

    Attributes:
        probability: that an element is dropped.
        rows: u32 [rows], keys of the rows.
        matrices: a uniform, u32 [4], keys of the members.
    """

    probability: float
    rows: Tensor
    matrices: Tensor

    @property
    def constants(self) -> dict[str, Any]:
        """For parts/dropout.wgsl."""
        return {"threshold": threshold_of(self.probability)}

    @property
    def scale(self) -> float:
        """What is left is multiplied by."""
        return scale_of(self.probability)


@dataclass(frozen=True)
class Dropout:
    """Dropout in a whole model.

    Attributes:
        probability: from 0 to below 1.
        rows: u32 [rows], keys of a micro-batch's rows.
        targets: u32 [targets], those of the rows that have a target, for the head.
        matrices: keys of the members of each group, up to four, by (layer, group).
    """

    probability: float
    rows: Tensor
    targets: Tensor
    matrices: Mapping[tuple[int, str], tuple[int, ...]]
    memory: Memory

    @classmethod
    def allocate(
        cls, recording: Recording, inputs: Inputs, layout: AdapterLayout, probability: float
    ) -> Dropout:
        """Room for the keys of the largest micro-batch."""

        def keys(extent: Any) -> Tensor:
            return recording.memory.empty((extent.maximum,), "u32", purpose="inputs", extent=extent)

        return cls(
            probability,
            keys(inputs.rows),
            keys(inputs.targets),
            {
                (group.layer, group.group): tuple(
                    matrix_key(member.peft_path(group.layer)) for member in group.members
                )
                for group in layout.groups
            },
            recording.memory,
        )

    def of(self, layer: int, group: str) -> GroupDropout:
        """Before a group of a layer."""
        keys = (*self.matrices[layer, group], 0, 0, 0, 0)[:4]
        return GroupDropout(self.probability, self.rows, self.memory.constant_uniform(keys))

    def of_head(self, layer: int, group: str, start: int, stop: int) -> GroupDropout:
        """Before the head, for targets start to stop (rows of them)."""
        return replace(self.of(layer, group), rows=self.targets.slice(start, stop))

    def write(self, memory: Memory, keys: np.ndarray, targets: np.ndarray) -> None:
        """Puts the keys of a micro-batch on the device.

        Args:
            keys: u32 [n], of its rows.
            targets: [n], as `Inputs.write` has them.
        """
        memory.write_rows(self.rows, 0, keys)
        (target_rows,) = np.nonzero(targets >= 0)
        if len(target_rows):
            memory.write_rows(self.targets, 0, keys[target_rows])


def matrix_key(path: str) -> int:
    """The key of a matrix, u32, by its PEFT path."""
    return zlib.crc32(path.encode())


def row_keys(seed: int, step: int, examples: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
    """Keys of the rows of a micro-batch, u32 [sum of lengths].

    Args:
        seed: of the run.
        step: of the optimizer, counted from 0.
        examples: the numbers of its examples among all of the run, whoever trains on them.
        lengths: tokens of each example.
    """
    with np.errstate(over="ignore"):
        begun = _mixed(np.uint64(seed) + _GOLDEN * np.uint64(step + 1))
        numbers = np.array([number & (2**64 - 1) for number in examples], np.uint64)
        starts = np.repeat(_mixed(begun ^ _mixed(numbers * _GOLDEN)), lengths)
        positions = np.concatenate([np.arange(n, dtype=np.uint64) for n in lengths])
        mixed = _mixed(starts + positions * _GOLDEN)
    return (mixed >> np.uint64(32)).astype(np.uint32)


def _mixed(values: Any) -> Any:
    """The finalizer of SplitMix64 (Steele et al. 2014), on u64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def mask(rows: np.ndarray, matrix: int, width: int, probability: float) -> np.ndarray:
    """What kernels leave of each element, bool [rows, width]: the reference for them.

    Args:
        rows: u32 [rows], keys of the rows.
        matrix: the key of the matrix.
        width: columns, a multiple of 4.
    """
    eights = np.arange(-(-width // 8), dtype=np.uint32) * _COLUMN
    keys = rows[:, None] ^ (np.uint32(matrix) + eights | np.uint32(1))
    words = [_round(_round(keys, _BEGIN), factor) for factor in _WORDS]
    bits = np.stack([half for word in words for half in (word & _HALF, word >> 16)], axis=-1)
    bits = bits.reshape(len(rows), 8 * len(eights))[:, :width]
    kept: np.ndarray = bits >= threshold_of(probability)
    return kept


def _round(values: np.ndarray, factor: np.uint32) -> np.ndarray:
    """`round_of` of parts/dropout.wgsl."""
    with np.errstate(over="ignore"):
        product = values * factor
    return product ^ (product >> np.uint32(16))


def hashed_columns(rows: np.ndarray, matrix: int, width: int) -> np.ndarray:
    """A hash of each element, u32 [rows, width]: `mixed(row ^ column_key(matrix, column))`."""
    columns = np.arange(width, dtype=np.uint32) * _COLUMN
    return _lowbias(rows[:, None] ^ (np.uint32(matrix) + columns))


def _lowbias(values: np.ndarray) -> np.ndarray:
    """`mixed` of parts/dropout.wgsl."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint32(16))) * np.uint32(0x7FEB352D)
        values = (values ^ (values >> np.uint32(15))) * np.uint32(0x846CA68B)
    return values ^ (values >> np.uint32(16))
