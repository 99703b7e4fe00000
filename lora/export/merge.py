"""Base and adapter as one GGUF, tensor by tensor and some rows at a time.

W stands for a tensor of the base and D for what the adapter adds to it, `AdaptedTensor.change`:
scale · B · A, or what DoRA makes of it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from lora.adapters.adapted_tensor import TensorChange
from lora.forward.gguf.file import GGUFFile, GGUFTensor
from lora.forward.gguf.quantization import quantize
from lora.shaders.errors import InputError, LoraError
from lora.storage.gguf_output import TensorPlace, new_file, padding, write_header

_MERGED_AT_ONCE = 1 << 20  # weights, by one thread
_COPIED_AT_ONCE = 4 << 20  # bytes
_HEAD, _EMBEDDING = "output.weight", "token_embd.weight"


@dataclass(frozen=True)
class MergedTensor:
    """What merging did to one tensor.

    Attributes:
        name: of the tensor.
        kind: the type in which it was written.
        error: size of what rounding to that type changed, relative to W + D.
        change: size of D, relative to the same.
        kept: how much of D the file holds: the part of (stored weights - W) that lies along it,
            1 if all. A base of few bits lies on its type's grid, and a change below half
            a step of the grid rounds back to the base: then it is near 0.
    """

    name: str
    kind: GGMLQuantizationType
    error: float
    change: float
    kept: float


def write_merged_gguf(
    path: Path,
    base: GGUFFile,
    adapted: Mapping[str, TensorChange],
    kind: GGMLQuantizationType | None = None,
    on_tensor: Callable[[MergedTensor], None] = lambda tensor: None,
    chat_template: str | None = None,
) -> list[MergedTensor]:
    """Writes base plus adapter; what the adapter doesn't touch is copied byte for byte.

    So are rows of a tensor that it leaves as they are, where the type stays. A head that is the
    embedding itself, and is adapted, becomes a tensor of its own.

    Args:
        adapted: changes by the tensors' names in the base.
        kind: how touched tensors are stored; None: as they are in the base.
        on_tensor: called after each touched tensor.
        chat_template: what the adapter was trained with, in place of the base's.

    Raises:
        InputError: a type can't hold a tensor.
        LoraError: the merged weights are not finite, or the file can't be written.
    """
    sources = dict(base.tensors)
    if _HEAD in adapted and _HEAD not in sources:
        sources[_HEAD] = sources[_EMBEDDING]
    places = []
    for name, source in sources.items():
        stored = kind if kind is not None and name in adapted else source.type
        _check_fits(name, source, stored)
        places.append(TensorPlace(name, source.shape, stored))
    texts: dict[str, str | None] = {}
    if chat_template is not None:  # the base's second one, for tools, doesn't go with it
        key = "tokenizer.chat_template"
        texts = {key: chat_template, f"{key}.tool_use": None}
    report = []
    n_threads = os.cpu_count() or 1
    with (
        new_file(path) as temporary,
        ThreadPoolExecutor(n_threads) as pool,
        open(temporary, "wb") as file,
    ):
        write_header(file, base, places, texts)
        for place in places:
            source = sources[place.name]
            if place.name in adapted:
                merged = _write_merged(file, pool, n_threads, source, adapted[place.name], place)
                report.append(merged)
                on_tensor(merged)
            else:
                _copy(file, source)
            file.write(padding(base, place.n_bytes))
    return report


def _check_fits(name: str, source: GGUFTensor, kind: GGMLQuantizationType) -> None:
    block_size, columns = GGML_QUANT_SIZES[kind][0], source.shape[-1]
    if columns % block_size:
        raise InputError(
            f"--type {kind.name}: {name} has rows of {columns} weights, and {kind.name} stores "
            f"them in blocks of {block_size}. Take Q8_0, or leave --type out."
        )


def _pieces(rows: int, columns: int) -> list[tuple[int, int]]:
    """First and last row (exclusive) of each piece."""
    step = max(1, _MERGED_AT_ONCE // columns)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _copy(file: BinaryIO, source: GGUFTensor) -> None:
    rows, row_bytes = source.data.shape
    step = max(1, _COPIED_AT_ONCE // row_bytes)
    for start in range(0, rows, step):
        file.write(source.data[start : start + step].data)


def _write_merged(
    file: BinaryIO,
    pool: ThreadPoolExecutor,
    n_threads: int,
    source: GGUFTensor,
    adapted: TensorChange,
    place: TensorPlace,
) -> MergedTensor:
    """Merges the pieces of a tensor, as many at a time as there are threads."""

    def merge(piece: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        return _merged_rows(source, adapted, place.kind, *piece)

    sums = np.zeros(4)
    pieces = _pieces(*source.shape)
    for first in range(0, len(pieces), n_threads):
        for data, products in pool.map(merge, pieces[first : first + n_threads]):
            file.write(data.data)
            sums += products
    if not np.isfinite(sums).all():
        raise LoraError(
            f"{place.name}: base plus adapter is not finite, or too large for {place.kind.name}. "
            "Check the adapter, or take --type F32."
        )
    error, change, whole = (math.sqrt(square) for square in sums[:3])
    size = max(whole, math.ulp(0.0))
    kept = float(sums[3] / sums[1]) if change else 1.0
    return MergedTensor(place.name, place.kind, error / size, change / size, kept)


def _merged_rows(
    source: GGUFTensor,
    adapted: TensorChange,
    kind: GGMLQuantizationType,
    start: int,
    stop: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of W + D as they are stored, and four sums over their weights.

    Those are the squares of what rounding changed, of what the adapter changed and of the exact
    rows, and the products of what is stored beyond W and what the adapter changed.
    """
    data = np.ascontiguousarray(source.data[start:stop])
    base = gguf.quants.dequantize(data, source.type).reshape(stop - start, -1)
    with np.errstate(all="ignore"):  # what is not finite shows in the sums
        change = adapted.change(base, start)
        exact = base + change
        stored = quantize(exact, kind)
        if kind == source.type:
            untouched = ~change.any(axis=1)
            stored[untouched] = data.reshape(stored.shape)[untouched]
        decoded = gguf.quants.dequantize(stored, kind).reshape(exact.shape)
        error = decoded - exact
        pairs = ((error, error), (change, change), (exact, exact), (decoded - base, change))
        sums = [np.multiply(*pair, dtype=np.float64).sum() for pair in pairs]
    return stored, np.array(sums)
