"""Frozen matrices on the device: quantized, stacked by their input, split where large."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora.forward.gguf.file import GGUFTensor
from lora.forward.gguf.quantization import QUANTIZATIONS, Quantization
from lora.shaders.errors import InputError
from lora.shaders.memory import UPLOAD_PIECE
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

# On a device that runs on the CPU a part and its share of the activations stay in the cache
# while all rows pass: a head of 30 MB in one part ran at half the speed (docs/log.md).
CPU_PART_BYTES = 2 << 20
MAX_PART_BYTES = 1 << 30
# Bytes of a part decoded to f16, in f32 to pairs of f16, which scratch memory holds while products
# on matrix units read it: a head of 1 GiB is several parts (docs/log.md).
MOST_DECODED = 256 << 20
HALF_BYTES, PAIR_BYTES = 2, 4  # of a number
WHOLE_ROWS = 8192  # parts are of so many times some: blocks of the gradient (cross_entropy.py)
_BAND = 32  # rows of a workgroup that looks for the largest weights


@dataclass(frozen=True)
class MatrixPart:
    """Some rows of a frozen matrix, of one tensor type, in one binding.

    Attributes:
        quantization: how `words` are to be decoded.
        words: u32 [out_features, words a row].
        first_feature: the row of the whole matrix (column of the output) where it begins.
        largest: u32 [out_features + in_features], see `largest_of`; None where no product asks.
        powers: f32 [out_features + 2], powers of two: what each row is multiplied by before it is
            rounded to f16, what the low-rank part is, and what comes out; None for 1.
    """

    quantization: Quantization
    words: Tensor
    first_feature: int
    largest: Tensor | None = None
    powers: Tensor | None = None

    @property
    def out_features(self) -> int:
        """Rows of the matrix that it holds."""
        return self.words.shape[0]


@dataclass(frozen=True)
class FrozenMatrix:
    """A matrix W [out_features, in_features] that never changes, in parts along its rows.

    Matrices that share an input (q k v; gate up) are stacked into one. There are several parts
    where their tensor types differ or where the device's largest binding is smaller than the whole.
    """

    out_features: int
    in_features: int
    parts: tuple[MatrixPart, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes on the device."""
        return sum(part.words.n_bytes for part in self.parts)


def with_powers(matrix: FrozenMatrix, powers: Sequence[Tensor]) -> FrozenMatrix:
    """The same with each row multiplied by a number, which none was before.

    Args:
        powers: see `MatrixPart.powers`, of each part; here any numbers near 1.
    """
    assert all(part.powers is None for part in matrix.parts)
    parts = [replace(part, powers=own) for part, own in zip(matrix.parts, powers, strict=True)]
    return replace(matrix, parts=tuple(parts))


def load_matrix(recording: Recording, tensors: Sequence[GGUFTensor]) -> FrozenMatrix:
    """Uploads GGUF tensors [out_i, in] stacked along their rows, piece by piece.

    A vocabulary's size may be anything, but kernels take four rows at once: a run of tensors of
    one type is padded with rows of zeros to a multiple of four. The host never holds more than a
    piece of some megabytes.

    Raises:
        InputError: a scale (of F32, F16, BF16: a weight) is NaN or infinite.
    """
    in_features = tensors[0].shape[1]
    if any(t.shape[1] != in_features for t in tensors):
        raise ValueError(
            f"tensors of unequal width cannot be stacked: {[t.shape for t in tensors]}"
        )
    parts = []
    first_feature = 0
    for run in _runs_of_one_type(tensors):
        quantization = QUANTIZATIONS[run[0].type]
        row_words = quantization.row_words(in_features)
        n_rows = sum(t.shape[0] for t in run)
        most = _most_rows(recording, quantization, n_rows, in_features)
        pieces = _packed_pieces(
            run, quantization, in_features, max(1, UPLOAD_PIECE // (4 * row_words))
        )
        pending = np.zeros((0, row_words), np.uint32)
        padded_rows = -(-n_rows // 4) * 4
        for start in range(0, n_rows, most):
            count = min(most, n_rows - start)
            shape = (min(most, padded_rows - start), row_words)
            words = recording.memory.empty(shape, "u32", purpose="weights")
            filled = 0 if recording.memory.holds_data else count
            while filled < count:
                if len(pending) == 0:
                    pending = next(pieces)
                take = min(len(pending), count - filled)
                recording.memory.write_rows(words, filled, pending[:take])
                pending = pending[take:]
                filled += take
            largest = largest_of(recording, words, quantization, in_features)
            parts.append(MatrixPart(quantization, words, first_feature + start, largest))
        first_feature += padded_rows
    return FrozenMatrix(first_feature, in_features, tuple(parts))


def _most_rows(
    recording: Recording, quantization: Quantization, n_rows: int, in_features: int
) -> int:
    """Rows of a part: a multiple of 64, so that parts begin on whole tiles."""
    facts = recording.facts
    part_bytes = min(facts.max_binding, CPU_PART_BYTES if facts.is_cpu else MAX_PART_BYTES)
    most = part_bytes // (4 * quantization.row_words(in_features))
    decoded = decoded_bytes(recording, quantization)
    if decoded:
        whole = min(most, MOST_DECODED // (decoded * in_features)) // WHOLE_ROWS
        if n_rows > whole * WHOLE_ROWS > 0:  # parts alike, of which gradients may be in blocks
            n_parts = -(-n_rows // (whole * WHOLE_ROWS))
            return -(-n_rows // (n_parts * WHOLE_ROWS)) * WHOLE_ROWS
    return max(64, most // 64 * 64)


def decoded_bytes(recording: Recording, quantization: Quantization) -> int:
    """Bytes of a weight where products may decode parts of such a matrix before they read it; 0."""
    if recording.facts.is_cpu or not recording.facts.has_matrix_units or quantization.name == "f16":
        return 0
    if recording.half_products:
        return HALF_BYTES
    return PAIR_BYTES if recording.paired_products else 0


def largest_of(
    recording: Recording, words: Tensor, quantization: Quantization, columns: int
) -> Tensor | None:  # u32 [rows + columns]
    """The largest weight's size in each row, then in each column, as f32's bits; found once.

    None where no product asks: those whose numbers are pairs of f16 scale weights by them, but not
    weights that are f16 themselves.
    """
    if not recording.paired_products or quantization.name == "f16":
        return None
    largest = recording.memory.empty((words.shape[0] + columns,), "u32", purpose="weights")
    if recording.memory.holds_data:
        program = Program(recording)
        record_largest(program, words, quantization, largest)
        program.run()
    return largest


def record_largest(
    program: Program, words: Tensor, quantization: Quantization, largest: Tensor
) -> None:
    """Appends what `largest_of` finds.

    Args:
        words: u32 [rows, words a row].
        largest: zeros [rows + columns].
    """
    rows, row_words = words.shape
    constants = {
        "quantization": quantization.name, "rows": rows, "columns": largest.size - rows,
        "row_words": row_words, "band": _BAND,
    }  # fmt: skip
    program.dispatch("largest_weights", constants, [words, largest], -(-rows // _BAND))


def _runs_of_one_type(tensors: Sequence[GGUFTensor]) -> list[list[GGUFTensor]]:
    runs: list[list[GGUFTensor]] = []
    for tensor in tensors:
        if runs and runs[-1][0].type == tensor.type:
            runs[-1].append(tensor)
        else:
            runs.append([tensor])
    return runs


def _packed_pieces(
    tensors: Iterable[GGUFTensor], quantization: Quantization, columns: int, piece_rows: int
) -> Iterator[np.ndarray]:
    for tensor in tensors:
        for start in range(0, tensor.shape[0], piece_rows):
            data = tensor.data[start : start + piece_rows]
            check_finite(tensor, quantization, data, np.arange(start, start + len(data)))
            yield quantization.pack(data, columns)


def check_finite(
    tensor: GGUFTensor, quantization: Quantization, data: np.ndarray, numbers: np.ndarray
) -> None:
    """Refuses rows that would turn everything they are multiplied with into NaN.

    Args:
        tensor: what they are of.
        quantization: of its rows.
        data: bytes [n, …] of some rows.
        numbers: of these rows in the tensor.

    Raises:
        InputError: there is one.
    """
    broken = np.flatnonzero(~quantization.finite_rows(data))
    if len(broken):
        what = "weight" if quantization.block_size == 1 else "scale"
        raise InputError(
            f"Row {numbers[broken[0]]} of the tensor {tensor.name!r} ({tensor.type.name}) has a "
            f"{what} that is NaN or infinite: the file is damaged or was converted wrongly. "
            "Fetch or convert it again."
        )
