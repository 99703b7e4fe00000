"""Which of a run's adapters did best, and when the run has stopped getting better."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora.adapters.peft_files import save_peft_adapter
from lora.config.eval_metrics import greater_is_better
from lora.shaders.choice import say_once
from lora.storage.files import new_directory, write_file
from lora.training.card import write_card
from lora.training.listeners import Listener

if TYPE_CHECKING:
    from lora.training.trained import Trained

FOLDER = "best"
RECORD = "best.json"


@dataclass(frozen=True)
class Best:
    """The best evaluation so far.

    Attributes:
        metric: that it goes by.
        value: of it.
        step: whose adapter it was; 0 before the first.
    """

    metric: str
    value: float
    step: int


def better(metric: str, value: float, than: float, by: float = 0.0) -> bool:
    """Whether a value of a metric is better than another by more than so much."""
    gain = value - than if greater_is_better(metric) else than - value
    return math.isfinite(value) and (gain > by or not math.isfinite(than))


class EarlyStop:
    """Counts evaluations without a gain, as transformers' EarlyStoppingCallback does.

    Args:
        metric: that counts.
        patience: so many in a row end the run; None: none do.
        threshold: what a gain must be more than.
    """

    def __init__(self, metric: str, patience: int | None, threshold: float) -> None:
        self._metric, self._patience, self._threshold = metric, patience, threshold
        self._best: float | None = None
        self.without_gain = 0

    def replay(self, values: Iterable[float]) -> None:
        """Counts anew: evaluations of a run that is gone on with."""
        self._best, self.without_gain = None, 0
        for value in values:
            self.stops(value)

    def stops(self, value: float) -> bool:
        """Counts an evaluation; whether the run has had patience enough."""
        if self._best is None or better(self._metric, value, self._best, self._threshold):
            self.without_gain = 0
        else:
            self.without_gain += 1
        if self._best is None or better(self._metric, value, self._best):
            self._best = value
        return self._patience is not None and self.without_gain >= self._patience


def read_best(folder: Path, metric: str) -> Best | None:
    """The record in a `best/` folder; None where there is none of this metric, or it is damaged."""
    try:
        values = json.loads((folder / RECORD).read_bytes())
        found = Best(str(values["metric"]), float(values["value"]), int(values["step"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found if found.metric == metric and math.isfinite(found.value) else None


class BestAdapter(Listener):
    """Keeps the best adapter under `best/`, as PEFT saves one, with what it reached.

    Args:
        output: the run's directory.
    """

    def __init__(self, output: Path) -> None:
        self._folder = output / FOLDER
        self._session: Trained | None = None

    def started(self, session: Any) -> None:
        """Whose adapter it is."""
        self._session = session

    def improved(self, step: int, metric: str, value: float) -> None:
        """Puts the adapter in place of the one before."""
        session = self._session
        if session is None:
            raise ValueError("the best of a run that has not started")
        record = {"metric": metric, "value": value, "step": step}
        flat = session.checked_parameters()
        try:
            with new_directory(self._folder) as directory:
                save_peft_adapter(directory, session.layout, flat, session.config)
                work = session.workload
                write_card(
                    directory, session.settled_config, work.gguf_file, chats=work.trains_on_chats
                )
                write_file(directory / RECORD, json.dumps(record) + "\n")
        except OSError as error:  # the run is worth more, and may find a better one
            say_once(
                f"{self._folder} cannot be written ({error.strerror}): the best adapter so far, of "
                f"step {step}, is not kept there."
            )
