"""What is under way before a run's first step, told to whoever shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_TOLD: ContextVar[Callable[[str], None] | None] = ContextVar("stages", default=None)


def stage(what: str) -> None:
    """Says what begins: a few words, such as "Loading the model"."""
    told = _TOLD.get()
    if told is not None:
        told(what)


@contextmanager
def stages_told(told: Callable[[str], None]) -> Iterator[None]:
    """Within the block `told` hears of each stage, on the thread where it begins."""
    token = _TOLD.set(told)
    try:
        yield
    finally:
        _TOLD.reset(token)
