"""Reading the header of a GGUF: every count and length is checked before it is believed.

Not by `gguf.GGUFReader`, which makes numpy objects of every token and merge (2.4 s for SmolLM2) and
fails with whatever numpy raises when a file is cut short or its counts are wrong.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from lora.forward.gguf.open_file import OpenFile
from lora.shaders.errors import InputError

SUPPORTED_VERSIONS = (2, 3)

# A damaged count can point deep into the tensor data, where every byte reads as a valid number:
# these limits, far above any real model (Gemma 3: 262,144 tokens, 515,000 merges, a header of
# 20 MB), stop it before what it would become fills the memory.
MAX_HEADER_BYTES = 1 << 26
MAX_ARRAY_VALUES = 1 << 22  # in all arrays of a file together: each may take 40 bytes as an object
MAX_ENTRIES = 1 << 17  # tensors, and metadata keys
MAX_NAME_BYTES = 1 << 10  # of a key or a tensor
MAX_DIMENSIONS = 4
_FIRST_BYTES = 1 << 16  # read at first; then twice as many whenever they don't suffice

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


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of a tensor."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]  # numpy order
    offset: int  # bytes from the start of the tensor data


class Header:
    """Reads the header front to back and refuses every step past the end of the file."""

    def __init__(self, file: OpenFile) -> None:
        self.path = file.path
        self.file_size = file.size
        self.size = min(self.file_size, MAX_HEADER_BYTES)
        self._file = file
        self._view = file.read(0, min(self.size, _FIRST_BYTES)).data
        self.position = 0
        self.n_array_values = 0

    def read_preamble(self) -> tuple[int, int, int]:
        """Returns (version, number of tensors, number of metadata keys)."""
        magic = bytes(self._view[:4])
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
        if max(n_tensors, n_keys) > MAX_ENTRIES:
            raise self._damaged(
                f"it claims {n_tensors:,} tensors and {n_keys:,} metadata keys; more than "
                f"{MAX_ENTRIES:,} are never read"
            )
        return version, n_tensors, n_keys

    def read_metadata(self, n_keys: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self._name("a metadata key")
            if key in metadata:
                raise self._damaged(f"metadata key {key!r} occurs twice")
            metadata[key] = self._value(key)
        return metadata

    def read_tensor_info(self) -> TensorInfo:
        name = self._name("a tensor's name")
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
        return TensorInfo(name, quantization, shape, self._integer("<Q"))

    def _value(self, key: str) -> Any:
        kind = self._integer("<I")
        if kind == GGUFValueType.STRING:
            return self._string(repr(key))
        if kind == GGUFValueType.ARRAY:
            return self._array(key)
        return self._scalars(key, kind, 1)[0]

    def _array(self, key: str) -> list[Any]:
        kind = self._integer("<I")
        length = self._integer("<Q")
        if kind == GGUFValueType.ARRAY:
            raise InputError(
                f"{self.path}: metadata key {key!r} is a list of lists, which is not supported."
            )
        self.n_array_values += length
        if self.n_array_values > MAX_ARRAY_VALUES:
            raise self._damaged(
                f"with the {length:,} values of {key!r} its metadata has {self.n_array_values:,}; "
                f"more than {MAX_ARRAY_VALUES:,} are never read"
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
        view, position = self._view, self.position
        held = len(view)
        length_of = struct.Struct("<Q").unpack_from
        strings = []
        try:
            for _ in range(count):
                start = position + 8
                if start > held:
                    view = self._read_up_to(start, repr(key))
                    held = len(view)
                position = start + length_of(view, position)[0]
                if position > held:
                    view = self._read_up_to(position, repr(key))
                    held = len(view)
                strings.append(str(view[start:position], "utf-8"))
        except UnicodeDecodeError as error:
            raise self._damaged(f"a string in {key!r} is not UTF-8 ({error.reason})") from None
        self.position = position
        return strings

    def _name(self, what: str) -> str:
        name = self._string(what, MAX_NAME_BYTES)
        if not name:
            raise self._damaged(f"{what} is empty")
        return name

    def _string(self, what: str, most_bytes: int = MAX_HEADER_BYTES) -> str:
        length = self._integer("<Q")
        if most_bytes < length <= self.size - self.position:
            raise self._damaged(f"{what} claims a length of {length:,} bytes")
        try:
            return str(self._take(length, what), "utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(f"{what} is not UTF-8 ({error.reason})") from None

    def _integer(self, layout: str) -> int:
        raw = self._take(struct.calcsize(layout), "the header")
        value: int = struct.unpack(layout, raw)[0]
        return value

    def _take(self, n_bytes: int, what: str) -> memoryview:
        start, end = self.position, self.position + n_bytes
        view = self._read_up_to(end, what)
        self.position = end
        return view[start:end]

    def _read_up_to(self, end: int, what: str) -> memoryview:
        """The file's first bytes, up to this one at least."""
        if end > self.size:
            raise self._cut_short(what)
        held = len(self._view)
        if end > held:
            more = self._file.read(held, min(self.size, max(end, 2 * held)))
            self._view = np.concatenate([np.asarray(self._view), more]).data
        return self._view

    def _check_count(self, count: int, least_bytes: int, what: str) -> None:
        """Refuses a count whose entries, each at its smallest, could not fit into the file."""
        if count * least_bytes > self.size - self.position:
            raise InputError(
                f"{self.path} is cut short or damaged: its header claims {count:,} {what}, more "
                f"than {self.size - self.position:,} bytes can hold. Fetch the file again."
            )

    def _cut_short(self, what: str) -> InputError:
        if self.size < self.file_size:
            return self._damaged(
                f"{what} reaches past byte {self.size:,}, where every header has ended"
            )
        return InputError(
            f"{self.path} is cut short: it ends after {self.file_size:,} bytes, within {what}. "
            "Fetch the file again."
        )

    def _damaged(self, what: str) -> InputError:
        return InputError(
            f"{self.path} is damaged: {what} (near byte {self.position:,}). Fetch the file again."
        )
