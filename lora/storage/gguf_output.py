"""Writing large GGUFs: metadata copied byte for byte, tensors streamed, the name given last."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from lora.forward.gguf.file import GGUFFile
from lora.shaders.errors import LoraError
from lora.storage.files import clean_leftovers, make_directories, sync_directory, temporary_path

_SCALAR_BYTES = {
    GGUFValueType.UINT8: 1,
    GGUFValueType.INT8: 1,
    GGUFValueType.BOOL: 1,
    GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2,
    GGUFValueType.UINT32: 4,
    GGUFValueType.INT32: 4,
    GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8,
    GGUFValueType.INT64: 8,
    GGUFValueType.FLOAT64: 8,
}


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what is written there takes its name at the end.

    Raises:
        LoraError: it can't be written (no room, no permission).
    """
    temporary = temporary_path(path)
    try:
        make_directories(path.parent)
        clean_leftovers(path.parent)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        raise LoraError(f"{path} could not be written: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class TensorPlace:
    """One tensor of a file that is to be written."""

    name: str
    shape: tuple[int, ...]  # numpy order
    kind: GGMLQuantizationType

    @property
    def n_bytes(self) -> int:
        """Bytes of its data."""
        block_size, block_bytes = GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape, dtype=np.int64)) // block_size * block_bytes


def write_header(
    file: BinaryIO,
    base: GGUFFile,
    tensors: Sequence[TensorPlace],
    texts: Mapping[str, str | None] | None = None,
) -> None:
    """Writes everything before the tensors' data: the base's metadata and a new list of tensors.

    The data must follow in the same order, each tensor's followed by `padding`.

    Args:
        file: the new file, at its beginning.
        base: whose metadata it is.
        tensors: the new list.
        texts: metadata in place of the base's, or besides it; None leaves a key out.
    """
    new = dict(texts or {})
    keys: list[bytes | memoryview] = [
        data for key, data in _raw_metadata(base) if not key.startswith("split.") and key not in new
    ]
    keys += [_text_entry(key, text) for key, text in new.items() if text is not None]
    file.write(struct.pack("<4sIQQ", b"GGUF", base.version, len(tensors), len(keys)))
    file.writelines(keys)
    offset = 0
    for tensor in tensors:
        name = tensor.name.encode()
        file.write(struct.pack("<Q", len(name)) + name)
        file.write(struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1]))
        file.write(struct.pack("<IQ", tensor.kind, offset))
        offset += tensor.n_bytes + len(padding(base, tensor.n_bytes))
    file.write(padding(base, file.tell()))


def _text_entry(key: str, text: str) -> bytes:
    """A key of the metadata that holds a text."""
    name, value = key.encode(), text.encode()
    head = struct.pack("<Q", len(name)) + name + struct.pack("<I", GGUFValueType.STRING)
    return head + struct.pack("<Q", len(value)) + value


def padding(base: GGUFFile, n_bytes: int) -> bytes:
    """Zeros up to the next multiple of the alignment."""
    alignment = int(base.metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT))
    return bytes(-n_bytes % alignment)


def _raw_metadata(base: GGUFFile) -> Iterator[tuple[str, memoryview]]:
    """The metadata keys of a GGUF, each with the bytes that hold its name, type and value.

    The file has been read as a whole before: nothing here is checked again.
    """
    view = base.raw_header()
    n_keys: int
    _, n_keys = struct.unpack_from("<QQ", view, 8)
    position = 24
    for _ in range(n_keys):
        start = position
        (length,) = struct.unpack_from("<Q", view, start)
        key = str(view[start + 8 : start + 8 + length], "utf-8")
        position = start + 8 + length
        (kind,) = struct.unpack_from("<I", view, position)
        position = _end_of_value(view, position + 4, kind)
        yield key, view[start:position]


def _end_of_value(view: memoryview, position: int, kind: int) -> int:
    if kind != GGUFValueType.ARRAY:
        return _end_of_items(view, position, kind, 1)
    kind, n_items = struct.unpack_from("<IQ", view, position)
    return _end_of_items(view, position + 12, kind, n_items)


def _end_of_items(view: memoryview, position: int, kind: int, n_items: int) -> int:
    if kind != GGUFValueType.STRING:
        return position + _SCALAR_BYTES[GGUFValueType(kind)] * n_items
    length_of = struct.Struct("<Q").unpack_from
    for _ in range(n_items):
        position += 8 + length_of(view, position)[0]
    return position
