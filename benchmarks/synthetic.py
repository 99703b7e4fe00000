"""Synthetic models for the benchmarks (tests/support/synthetic_models.py), several at a time."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.support.synthetic_models import SHAPES, write_model


def write_models(
    folder: Path, names: Sequence[str], then: Callable[[Path], None] | None = None
) -> dict[str, Path]:
    """Writes models of SHAPES, each in a process of its own.

    Args:
        folder: gets a folder for each model.
        names: of the models.
        then: what each process does with its file afterwards.

    Returns:
        The GGUF of each name.
    """
    paths = {name: folder / name / "model.gguf" for name in names}
    spawn = multiprocessing.get_context("spawn")  # a fork would share what PyTorch and wgpu hold
    with ProcessPoolExecutor(len(paths), mp_context=spawn) as pool:
        list(pool.map(_write_and_then, names, paths.values(), [then] * len(paths)))
    return paths


def _write_and_then(name: str, path: Path, then: Callable[[Path], None] | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_model(path, SHAPES[name])
    if then is not None:
        then(path)
