"""Reading a GGUF file: its metadata and its tensors, memory-mapped.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is read here and
not by `gguf.GGUFReader`, which makes numpy objects of every token and merge (2.4 s for SmolLM2)
and fails with whatever numpy raises when a file is cut short or its counts are wrong.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from shaders.errors import InputError

SUPPORTED_VERSIONS = (2, 3)

# A damaged count can point deep into the tensor data, where every byte reads as a valid number:
# these limits, far above any real model (262,144 tokens, 500,000 merges), stop it before the
# list that it would become fills the memory.
MAX_ARRAY_LENGTH = 1 << 23
MAX_STRING_BYTES = 1 << 26
MAX_DIMENSIONS = 4

_SCALARS: dict[int, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("<u1"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}


@dataclass(frozen=True, eq=False)
class GGUFTensor:
    """One tensor as the file holds it; nothing is copied or decoded.

    Attributes:
        name: for example `blk.0.attn_q.weight`.
        type: how the numbers are stored.
        shape: sizes in numpy order: (rows = out, columns = in), or (n,) for a vector.
        data: uint8 [rows, bytes_per_row], a read-only view of the mapped file; [1, bytes] for a
            vector, and the leading sizes multiplied together for more than two dimensions.
    """

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray


class GGUFFile:
    """A GGUF file, opened for reading.

    Attributes:
        path: where it is.
        version: of the format, 2 or 3.
        metadata: key to plain python value (str, int, float, bool, or a list of those).
        tensors: name to GGUFTensor, in the file's order.
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def __init__(self, path: str | Path) -> None:
        """Maps the file and reads its header.

        Raises:
            InputError: the path is not a readable GGUF file, or the file is damaged.
        """
        self.path = Path(path)
        self._bytes = _map_file(self.path)
        header = _Header(self.path, self._bytes)
        self.version, n_tensors, n_keys = header.read_preamble()
        self.metadata = header.read_metadata(n_keys)
        infos = [header.read_tensor_info() for _ in range(n_tensors)]
        alignment = _alignment(self.path, self.metadata)
        data_start = -(-header.position // alignment) * alignment
        self.tensors = {}
        for info in infos:
            if info.name in self.tensors:
                raise InputError(f"{self.path} is damaged: tensor {info.name!r} occurs twice.")
            self.tensors[info.name] = self._tensor(info, data_start, alignment)

    def _tensor(self, info: _TensorInfo, data_start: int, alignment: int) -> GGUFTensor:
        block_size, block_bytes = GGML_QUANT_SIZES[info.type]
        columns = info.shape[-1]
        if columns % block_size:
            raise InputError(
                f"{self.path} is damaged: tensor {info.name!r} of shape {info.shape} has rows of "
                f"{columns} values, but {info.type.name} stores them in blocks of {block_size}."
            )
        if info.offset % alignment:
            raise InputError(
                f"{self.path} is damaged: tensor {info.name!r} begins at byte {info.offset} of "
                f"the data, which is no multiple of the alignment {alignment}."
            )
        rows = math.prod(info.shape[:-1])
        bytes_per_row = columns // block_size * block_bytes
        start = data_start + info.offset
        end = start + rows * bytes_per_row
        if end > self._bytes.size:
            raise InputError(
                f"{self.path} is cut short: tensor {info.name!r} ends at byte {end:,}, the file "
                f"at {self._bytes.size:,}. Fetch the file again."
            )
        data = self._bytes[start:end].reshape(rows, bytes_per_row)
        return GGUFTensor(info.name, info.type, info.shape, data)


@dataclass(frozen=True)
class _TensorInfo:
    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]  # numpy order
    offset: int  # bytes from the start of the tensor data


class _Header:
    """Reads the header front to back and refuses every step past the end of the file."""

    def __init__(self, path: Path, content: np.ndarray) -> None:
        self.path = path
        self.view = content.data
        self.size = len(self.view)
        self.position = 0

    def read_preamble(self) -> tuple[int, int, int]:
        """Returns (version, number of tensors, number of metadata keys)."""
        magic = bytes(self.view[:4])
        if magic != b"GGUF":
            raise InputError(
                f"{self.path} is not a GGUF file: it begins with {magic!r}, not b'GGUF'."
            )
        self.position = 4
        version = self._integer("<I")
        if version & 0xFFFF == 0:
            raise InputError(
                f"{self.path} is a big-endian GGUF file; only little-endian files are supported."
            )
        if version not in SUPPORTED_VERSIONS:
            raise InputError(
                f"{self.path} has GGUF version {version}; supported are "
                f"{' and '.join(map(str, SUPPORTED_VERSIONS))}. Convert it again with llama.cpp."
            )
        n_tensors = self._integer("<Q")
        n_keys = self._integer("<Q")
        # name length 8, dimension count 4, type 4, offset 8; key length 8, type 4, value 1
        self._check_count(n_tensors, 24, "tensors")
        self._check_count(n_keys, 13, "metadata keys")
        return version, n_tensors, n_keys

    def read_metadata(self, n_keys: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self._string("a metadata key")
            if key in metadata:
                raise self._damaged(f"metadata key {key!r} occurs twice")
            metadata[key] = self._value(key)
        return metadata

    def read_tensor_info(self) -> _TensorInfo:
        name = self._string("a tensor's name")
        n_dimensions = self._integer("<I")
        if not 1 <= n_dimensions <= MAX_DIMENSIONS:
            raise self._damaged(
                f"tensor {name!r} has {n_dimensions} dimensions instead of 1 to {MAX_DIMENSIONS}"
            )
        # The file lists the columns first.
        shape = tuple(self._integer("<Q") for _ in range(n_dimensions))[::-1]
        if 0 in shape:
            raise self._damaged(f"tensor {name!r} of shape {shape} is empty")
        number = self._integer("<I")
        try:
            quantization = GGMLQuantizationType(number)
        except ValueError:
            raise InputError(
                f"{self.path}: tensor {name!r} has the unknown type number {number}."
            ) from None
        return _TensorInfo(name, quantization, shape, self._integer("<Q"))

    def _value(self, key: str) -> Any:
        kind = self._integer("<I")
        if kind == GGUFValueType.STRING:
            return self._string(key)
        if kind == GGUFValueType.ARRAY:
            return self._array(key)
        return self._scalars(key, kind, 1)[0]

    def _array(self, key: str) -> list[Any]:
        kind = self._integer("<I")
        length = self._integer("<Q")
        if length > MAX_ARRAY_LENGTH:
            raise self._damaged(
                f"metadata key {key!r} claims {length:,} values; more than "
                f"{MAX_ARRAY_LENGTH:,} are never read"
            )
        if kind == GGUFValueType.STRING:
            self._check_count(length, 8, f"strings in {key!r}")
            return self._strings(key, length)
        return self._scalars(key, kind, length)

    def _scalars(self, key: str, kind: int, count: int) -> list[Any]:
        dtype = _SCALARS.get(kind)
        if dtype is None:
            raise self._damaged(f"metadata key {key!r} has the unknown value type {kind}")
        raw = self._take(count * dtype.itemsize, repr(key))
        values = np.frombuffer(raw, dtype)
        return (values != 0 if kind == GGUFValueType.BOOL else values).tolist()

    def _strings(self, key: str, count: int) -> list[str]:
        # One loop with local names: a vocabulary has 100,000 and more of these.
        view, position, size = self.view, self.position, self.size
        length_of = struct.Struct("<Q").unpack_from
        strings = []
        try:
            for _ in range(count):
                (length,) = length_of(view, position)
                start = position + 8
                position = start + length
                if position > size:
                    raise self._cut_short(repr(key))
                strings.append(str(view[start:position], "utf-8"))
        except struct.error:
            raise self._cut_short(repr(key)) from None
        except UnicodeDecodeError as error:
            raise self._damaged(f"a string in {key!r} is not UTF-8 ({error})") from None
        self.position = position
        return strings

    def _string(self, what: str) -> str:
        length = self._integer("<Q")
        if MAX_STRING_BYTES < length <= self.size - self.position:
            raise self._damaged(f"{what} claims a string of {length:,} bytes")
        try:
            return str(self._take(length, what), "utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(f"{what} is not UTF-8 ({error})") from None

    def _integer(self, layout: str) -> int:
        raw = self._take(struct.calcsize(layout), "the header")
        value: int = struct.unpack(layout, raw)[0]
        return value

    def _take(self, n_bytes: int, what: str) -> memoryview:
        if n_bytes > self.size - self.position:
            raise self._cut_short(what)
        start = self.position
        self.position += n_bytes
        return self.view[start : self.position]

    def _check_count(self, count: int, least_bytes: int, what: str) -> None:
        """Refuses a count whose entries, each at its smallest, could not fit into the file."""
        if count * least_bytes > self.size - self.position:
            raise InputError(
                f"{self.path} is cut short or damaged: its header claims {count:,} {what}, more "
                f"than its {self.size:,} bytes can hold. Fetch the file again."
            )

    def _cut_short(self, what: str) -> InputError:
        return InputError(
            f"{self.path} is cut short: it ends after {self.size:,} bytes, within {what}. "
            "Fetch the file again."
        )

    def _damaged(self, what: str) -> InputError:
        return InputError(
            f"{self.path} is damaged: {what} (near byte {self.position:,}). Fetch the file again."
        )


def _map_file(path: Path) -> np.ndarray:
    """Maps a whole file read-only.  # uint8 [bytes]"""
    if path.is_dir():
        raise InputError(f"{path} is a directory; a GGUF file is expected.")
    if not path.exists():
        raise InputError(f"There is no file {path}.")
    if not path.is_file():
        raise InputError(f"{path} is not a regular file; a GGUF file is expected.")
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty; a GGUF file is expected.")
        return np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    """Returns the bytes that every tensor's beginning is a multiple of."""
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise InputError(
            f"{path} is damaged: general.alignment is {alignment!r}, not a power of two."
        )
    return alignment
