"""Where a recurrent model can go back to in the last text: states kept at some of its tokens.

Keys and values lie token by token, and a cache of them is shortened by forgetting its end. A state
cannot be: it is that after all tokens so far. So copies of it are kept on the device, at the ends
of the pieces in which prompts are computed; a text that begins like the last one goes on from the
copy nearest below where the two part.
"""

from __future__ import annotations

from typing import Any, Protocol

from lora.forward.model.kv_cache import TextState
from lora.shaders.program import Program
from lora.shaders.recording import Recording

N_SNAPSHOTS = 4


class StateStore(Protocol):
    """What copies states on the device."""

    def keep_state(self, slot: int) -> None:
        """Copies the states of now into a slot."""

    def restore_state(self, slot: int) -> None:
        """Copies a slot's states back."""


def states_of(caches: tuple[Any, ...]) -> list[TextState]:
    """The states among what layers keep of a text."""
    return [cache for cache in caches if isinstance(cache, TextState)]


def allocate_snapshots(
    recording: Recording, caches: tuple[Any, ...]
) -> tuple[tuple[TextState, ...], ...]:
    """Slots for copies of all states; none where there are no states."""
    states = states_of(caches)
    if not states:
        return ()

    def copy_of(state: TextState) -> TextState:
        return TextState(
            tuple(
                recording.memory.empty(tensor.shape, purpose="key-value cache")
                for tensor in state.tensors
            )
        )

    return tuple(tuple(map(copy_of, states)) for _ in range(N_SNAPSHOTS))


def record_copies(
    recording: Recording, sources: list[TextState], destinations: list[TextState]
) -> Program:
    """Copies of states into others of the same shapes."""
    program = Program(recording)
    for source, destination in zip(sources, destinations, strict=True):
        for one, other in zip(source.tensors, destination.tensors, strict=True):
            program.copy(one, other, label="state")
    return program


class Snapshots:
    """Which states of the last text are kept; for models without states all of it is.

    Args:
        store: what copies states; None for a model without any.
    """

    def __init__(self, store: StateStore | None) -> None:
        self._store = store
        self._kept: dict[int, int] = {}  # slot by position, the oldest first

    def nearest(self, known: int, held: int) -> int:
        """From where a text goes on of which `known` tokens are held, of all `held` tokens."""
        if self._store is None or known == held:
            return known
        return max((position for position in self._kept if position <= known), default=0)

    def go_back(self, position: int, held: int) -> None:
        """Makes the states those at a position of `nearest`, and drops what comes after it."""
        if self._store is None or position == held:
            return
        for later in [kept for kept in self._kept if kept > position]:
            del self._kept[later]
        if position:  # kernels read no state where a text begins
            self._store.restore_state(self._kept[position])

    def keep(self, position: int) -> None:
        """Keeps the states of now, which are those at a position, in place of the oldest."""
        if self._store is None or position in self._kept:
            return
        free = sorted(set(range(N_SNAPSHOTS)) - set(self._kept.values()))
        slot = free[0] if free else self._kept.pop(next(iter(self._kept)))
        self._store.keep_state(slot)
        self._kept[position] = slot

    def forget(self) -> None:
        """Drops all."""
        self._kept.clear()
