"""Runs every check on a device and says what came of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora.checks.comparison import Check, Comparison, NotHereError
from lora.checks.kernels import (
    adapters,
    attention,
    convolutions,
    dora,
    lanes,
    norms,
    one_row,
    options,
    products,
    recurrent,
    small,
    spans,
    tokens,
)
from lora.shaders.device import Device
from lora.shaders.memory import Arena
from lora.shaders.recording import Recording
from lora.shaders.webgpu import Pipeline

ALL_CHECKS: tuple[Check, ...] = tuple(
    check
    for family in (
        lanes,
        small,
        norms,
        spans,
        adapters,
        options,
        dora,
        tokens,
        attention,
        convolutions,
        recurrent,
        products,
        one_row,
    )
    for check in family.CHECKS
)


class _NotingArena(Arena):
    """An arena that notes which templates are recorded in it."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.used: set[str] = set()

    def kernel(self, template: str, constants: Mapping[str, Any]) -> Pipeline:
        """As an arena does."""
        self.used.add(template)
        return super().kernel(template, constants)


@dataclass(frozen=True)
class Result:
    """What came of a check.

    Attributes:
        comparison: None where nothing was computed.
        reason: why it failed or was skipped; empty where it passed.
        skipped: whether the device can't be asked.
        seconds: compilation included.
        templates: that were compiled for it or were there already.
    """

    check: Check
    comparison: Comparison | None
    reason: str
    skipped: bool
    seconds: float
    templates: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        """passed, failed or skipped."""
        return "skipped" if self.skipped else "failed" if self.reason else "passed"


def run_checks(
    open_device: Callable[[], Device], checks: Sequence[Check] = ALL_CHECKS
) -> Iterator[Result]:
    """Runs checks one after the other; whatever a driver does to one, the others are run, too.

    Args:
        open_device: opens the device, anew after a check that ended in an error: it may be lost.
        checks: which.
    """
    device: Device | None = None
    for check in checks:
        start = time.perf_counter()
        comparison, reason, skipped, templates = None, "", False, set[str]()
        try:
            if device is None:
                device = open_device()
            with _NotingArena(device) as arena:
                templates = arena.used
                facts = replace(device.facts, is_cpu=check.as_cpu)
                comparison = check.run(Recording(facts, arena))
            if not comparison.passed:
                reason = f"an error of {comparison.error:.2g}, above {comparison.bound:.2g}"
        except NotHereError as error:
            reason, skipped = str(error), True
        except Exception as error:  # a compiler's, a driver's, a lost device's: it is the finding
            reason = f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - start
        yield Result(check, comparison, reason, skipped, seconds, sorted(templates))
        if reason and not skipped and comparison is None:
            device = None
