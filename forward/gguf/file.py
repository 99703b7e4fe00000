"""Reading a GGUF model: its metadata and its tensors, memory-mapped, out of one file or several.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is read here and
not by `gguf.GGUFReader`, which makes numpy objects of every token and merge (2.4 s for SmolLM2)
and fails with whatever numpy raises when a file is cut short or its counts are wrong.

Several files: `llama-gguf-split` cuts a model into NAME-00001-of-0000N.gguf and so on. Each has
the keys split.no (from 0), split.count and split.tensors.count (of the whole model); only the
first has the model's own metadata.
"""

from __future__ import annotations

import math
import re
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

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

_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")

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
    """A GGUF model, opened for reading; the parts of a split one are presented as one.

    Attributes:
        path: where it is; of a split model the first part.
        paths: all its files, in order.
        version: of the format, 2 or 3.
        metadata: key to plain python value (str, int, float, bool, or a list of those). That of
            the first part, without what says how the model is split.
        tensors: name to GGUFTensor, in the files' order.
        n_bytes: of all files together.
    """

    path: Path
    paths: tuple[Path, ...]
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    n_bytes: int

    def __init__(self, path: str | Path) -> None:
        """Maps the files and reads their headers.

        Args:
            path: the file, or any part of a split model; the others lie beside it.

        Raises:
            InputError: the path is not a readable GGUF file, the file is damaged, or the parts
                are not all there or don't belong together.
        """
        parts = _read_parts(Path(path))
        first = parts[0]
        self.path = first.path
        self.paths = tuple(part.path for part in parts)
        self.version = first.version
        self.metadata = {k: v for k, v in first.metadata.items() if k not in _SPLIT_KEYS}
        self.tensors = {}
        for part in parts:
            self.tensors |= part.tensors
        self.n_bytes = sum(part.n_bytes for part in parts)


def part_names(name: str) -> list[str]:
    """The names of all parts of the split model that a file name belongs to, in order.

    A name that is no part's comes back alone.
    """
    match = _PART_NAME.fullmatch(name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]):
        return [name]
    count = int(match["count"])
    return [f"{match['stem']}-{n:05}-of-{count:05}.gguf" for n in range(1, count + 1)]


def _read_parts(path: Path) -> list[_Part]:
    """Reads the file, and where it is a part of a split model all the parts, in order."""
    given = _Part(path)
    count = given.metadata.get("split.count", 1)
    if count in (0, 1):
        return [given]
    if not isinstance(count, int):
        raise InputError(f"{path} is damaged: split.count is {shortened(count)}.")
    names = part_names(path.name)
    if len(names) != count:
        raise InputError(
            f"{path}: by its metadata it is one of {count} parts of a model, which its name does "
            "not say. Give the parts their names back (NAME-00001-of-0000N.gguf), or join them "
            "with `llama-gguf-split --merge`."
        )
    paths = [path.with_name(name) for name in names]
    missing = [other.name for other in paths if other.name != path.name and not other.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{path} is one of {count} parts of a model; missing beside it: {missing[0]}{more}."
        )
    parts = [given if other.name == path.name else _Part(other) for other in paths]
    owners: dict[str, Path] = {}
    for number, part in enumerate(parts):
        if part.metadata.get("split.count") != count:
            raise _foreign(
                part, given, f"split.count is {shortened(part.metadata.get('split.count'))}"
            )
        if part.metadata.get("split.no") != number:
            raise InputError(
                f"{part.path}: by its name it is part {number + 1} of {count}, by its metadata "
                f"split.no is {shortened(part.metadata.get('split.no'))}, not {number}; the parts "
                "were renamed or mixed up."
            )
        for name in part.tensors:
            if name in owners:
                raise _foreign(part, given, f"tensor {name!r} is in {owners[name].name} too")
            owners[name] = part.path
    for part in parts:
        n_tensors = part.metadata.get("split.tensors.count", len(owners))
        if n_tensors != len(owners):
            raise _foreign(
                part, given, f"it says {shortened(n_tensors)} tensors, the parts hold {len(owners)}"
            )
    return parts


def _foreign(part: _Part, given: _Part, why: str) -> InputError:
    if part is given:
        return InputError(f"{part.path} does not belong to the parts beside it: {why}.")
    return InputError(f"{part.path} and {given.path.name} are no parts of one model: {why}.")


class _Part:
    """One file: a whole model or a part of one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = _map_file(path)
        self.n_bytes = self._bytes.size
        header = _Header(path, self._bytes)
        self.version, n_tensors, n_keys = header.read_preamble()
        self.metadata = header.read_metadata(n_keys)
        infos = [header.read_tensor_info() for _ in range(n_tensors)]
        alignment = _alignment(path, self.metadata)
        data_start = -(-header.position // alignment) * alignment
        self.tensors: dict[str, GGUFTensor] = {}
        spans: list[tuple[int, int, str]] = []
        for info in infos:
            if info.name in self.tensors:
                raise InputError(f"{path} is damaged: tensor {info.name!r} occurs twice.")
            start, end, tensor = self._tensor(info, data_start, alignment)
            self.tensors[info.name] = tensor
            spans.append((start, end, info.name))
        spans.sort()
        for (_, end, before), (start, _, name) in zip(spans, spans[1:], strict=False):
            if start < end:
                raise InputError(
                    f"{path} is damaged: the tensors {before!r} and {name!r} overlap. "
                    "Fetch the file again."
                )

    def _tensor(
        self, info: _TensorInfo, data_start: int, alignment: int
    ) -> tuple[int, int, GGUFTensor]:
        """Returns where the tensor begins and ends in the file, and the tensor."""
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
        # Python's integers don't overflow: sizes whose product passes 64 bits end here too.
        rows = math.prod(info.shape[:-1])
        bytes_per_row = columns // block_size * block_bytes
        start = data_start + info.offset
        end = start + rows * bytes_per_row
        if end > self.n_bytes:
            raise InputError(
                f"{self.path} is cut short or damaged: tensor {info.name!r} ends at byte "
                f"{end:,}, the file at {self.n_bytes:,}. Fetch the file again."
            )
        data = self._bytes[start:end].reshape(rows, bytes_per_row)
        return start, end, GGUFTensor(info.name, info.type, info.shape, data)


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
        self.file_size = len(self.view)
        self.size = min(self.file_size, MAX_HEADER_BYTES)
        self.position = 0
        self.n_array_values = 0

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

    def read_tensor_info(self) -> _TensorInfo:
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
        return _TensorInfo(name, quantization, shape, self._integer("<Q"))

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


def _map_file(path: Path) -> np.ndarray:
    """Maps a whole file read-only.  # uint8 [bytes]"""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{path} is a directory; a GGUF file is expected.")
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} is not a regular file; a GGUF file is expected.")
        if status.st_size == 0:
            raise InputError(f"{path} is empty; a GGUF file is expected.")
        return np.memmap(path, dtype=np.uint8, mode="r")
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():
            raise InputError(f"{path} is a link to a file that is not there.") from error
        raise InputError(f"There is no file {path}.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # a null character
        raise InputError(f"{str(path)!r} is no path of a file.") from error


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    """Returns the bytes that every tensor's beginning is a multiple of."""
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise InputError(
            f"{path} is damaged: general.alignment is {shortened(alignment)}, not a power of two."
        )
    return alignment


def shortened(value: Any) -> str:
    """How a value is written in a message: a list may have thousands of entries."""
    text = repr(value[:20] if isinstance(value, list | str) else value)
    return text if len(text) <= 60 else text[:57] + "..."
