"""Reading a GGUF model: its metadata, and its tensors when asked, out of one file or several.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the header is read by
forward/gguf/header.py.

Several files: `llama-gguf-split` cuts a model into NAME-00001-of-0000N.gguf and so on. Each has
the keys split.no (from 0), split.count and split.tensors.count (of the whole model); only the
first has the model's own metadata.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType

from lora.forward.gguf.header import Header, TensorInfo
from lora.forward.gguf.open_file import FileRows, OpenFile
from lora.shaders.errors import InputError
from lora.shaders.untrusted import reading, shown

_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


@dataclass(frozen=True, eq=False)
class GGUFTensor:
    """One tensor as the file holds it; nothing is copied or decoded.

    Attributes:
        name: for example `blk.0.attn_q.weight`.
        type: how the numbers are stored.
        shape: sizes in numpy order: (rows = out, columns = in), or (n,) for a vector.
        data: uint8 [rows, bytes_per_row], read from the file by slices and by `np.asarray`;
            [1, bytes] for a vector, and the leading sizes multiplied together for more than two
            dimensions.
    """

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray | FileRows


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
        """Opens the files and reads their headers.

        Args:
            path: the file, or any part of a split model; the others lie beside it.

        Raises:
            InputError: the path is not a readable GGUF file, the file is damaged, or the parts
                are not all there or don't belong together.
        """
        with reading(path, "a GGUF file"):
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
        self._first = first

    def raw_header(self) -> memoryview:
        """The bytes of the first file before its tensors' data, as they are.

        Raises:
            InputError: the file has been cut since it was opened.
        """
        return self._first.file.read(0, self._first.header_bytes).data


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
        raise InputError(f"{path} is damaged: split.count is {shown(count)}.")
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
            raise _foreign(part, given, f"split.count is {shown(part.metadata.get('split.count'))}")
        if part.metadata.get("split.no") != number:
            raise InputError(
                f"{part.path}: by its name it is part {number + 1} of {count}, by its metadata "
                f"split.no is {shown(part.metadata.get('split.no'))}, not {number}; the parts "
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
                part, given, f"it says {shown(n_tensors)} tensors, the parts hold {len(owners)}"
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
        self.file = OpenFile(path)
        self.n_bytes = self.file.size
        header = Header(self.file)
        self.version, n_tensors, n_keys = header.read_preamble()
        self.metadata = header.read_metadata(n_keys)
        infos = [header.read_tensor_info() for _ in range(n_tensors)]
        alignment = _alignment(path, self.metadata)
        self.header_bytes = header.position
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
        self, info: TensorInfo, data_start: int, alignment: int
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
        data = FileRows(self.file, start, rows, bytes_per_row)
        return start, end, GGUFTensor(info.name, info.type, info.shape, data)


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    """Returns the bytes that every tensor's beginning is a multiple of."""
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise InputError(
            f"{path} is damaged: general.alignment is {shown(alignment)}, not a power of two."
        )
    return alignment
