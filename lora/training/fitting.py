"""What fits a device: the longest examples and the largest micro-batches within a memory limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from lora.data.examples import Example
from lora.forward.model.balance import Balance
from lora.shaders.errors import InputError
from lora.shaders.facts import DeviceFacts
from lora.training.device_state import SessionPlan
from lora.training.recompute import memory_limit
from lora.training.workload import Workload

_LENGTH_STEP = 128  # tokens between lengths that are tried
_MOST_BATCH = 1024


@dataclass(frozen=True)
class Fit:
    """The most that fits, as it is counted before a run.

    Attributes:
        recomputed: how many of the lowest adapted layers are run again.
        length: of the longest example, at the batch size of the config; None where none fits.
        batch_size: of examples as long as data.max_length; None where not even one fits.
    """

    recomputed: int
    length: int | None
    batch_size: int | None


@dataclass(frozen=True)
class Fits:
    """Without and with recompute, and how many layers the config as it is runs again.

    Attributes:
        limit: bytes.
        layers: adapted ones, and those above the lowest.
        recomputed: least number of layers to run again; None where nothing is enough.
    """

    limit: int
    layers: int
    recomputed: int | None
    off: Fit
    on: Fit


def fits(facts: DeviceFacts, workload: Workload, balance: Balance | None = None) -> Fits:
    """The largest sizes within train.memory_limit, every token of every example trained.

    Args:
        facts: of the device.
        workload: of the config.
        balance: see `SessionPlan.of`.

    Raises:
        InputError: nothing tells how much memory there is.
    """
    config = workload.config
    limit = memory_limit(facts, config.train.memory_limit)
    if limit is None:
        raise InputError(
            f"train.memory_limit: auto: nothing tells how much memory {facts.name} has; give a "
            "size, such as 7GiB."
        )
    architecture = workload.layout.architecture
    layers = architecture.n_layers - workload.layout.lowest_layer

    def taken(length: int, batch_size: int, recomputed: int | None) -> tuple[int, int]:
        sized = _sized(workload, length, batch_size)
        planned = SessionPlan.of(facts, sized, recomputed=recomputed, balance=balance)
        return sum(planned.allocated.values()), planned.tensors.recomputed

    def fit(recomputed: int) -> Fit:
        def room_for(length: int, batch_size: int) -> bool:
            try:
                return taken(length, batch_size, recomputed)[0] <= limit
            except InputError:  # a tensor is larger than the device binds
                return False

        most = max(1, architecture.context_length // _LENGTH_STEP)
        steps = _largest(lambda n: room_for(n * _LENGTH_STEP, config.train.batch_size), most)
        batch = _largest(lambda n: room_for(config.data.max_length, n), _MOST_BATCH)
        return Fit(recomputed, steps and steps * _LENGTH_STEP, batch)

    needed, recomputed = taken(config.data.max_length, config.train.batch_size, None)
    return Fits(limit, layers, recomputed if needed <= limit else None, fit(0), fit(layers))


def _sized(workload: Workload, length: int, batch_size: int) -> Workload:
    """The same run with micro-batches of so many examples of that length."""
    config = workload.config
    data = config.data.model_copy(update={"max_length": length})
    train = config.train.model_copy(update={"batch_size": batch_size})
    example = Example(np.zeros(length, np.int32), np.arange(length) > 0, 0)
    return replace(
        workload,
        config=config.model_copy(update={"data": data, "train": train}),
        train_examples=[example] * batch_size,
        eval_examples=[],
        streamed=None,
    )


def _largest(fits_in: Callable[[int], bool], most: int) -> int | None:
    """The largest number from 1 to `most` that fits, if more never fits where less doesn't."""
    if not fits_in(1):
        return None
    below, above = 1, 2
    while above <= most and fits_in(above):
        below, above = above, 2 * above
    above = min(above, most + 1)
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if fits_in(middle) else (below, middle)
    return below
