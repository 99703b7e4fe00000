"""What a kernel wrote, against what its reference says and how far it may be off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lora.checks.tensors import MARKER
from lora.shaders.recording import Recording


class NotHereError(Exception):
    """Why a check has nothing to say of this device: it lacks f16, say."""


@dataclass(frozen=True)
class Comparison:
    """The worst place of a result.

    Attributes:
        error: how far it is off there; infinite where it is no number.
        bound: how far it may be off there.
    """

    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the worst place is within its bound."""
        return self.error <= self.bound


@dataclass(frozen=True)
class Check:
    """A kernel on one shape.

    Attributes:
        kernel: its name: of a template, or of what is made of several.
        shape: sizes and types, in a few words.
        run: computes and compares; raises NotHereError where the device can't.
        as_cpu: whether the device is to take the variant of CPU devices or of GPUs.
    """

    kernel: str
    shape: str
    run: Callable[[Recording], Comparison]
    as_cpu: bool = False

    @property
    def case(self) -> str:
        """The shape, and which variant it is where that is the CPU devices'."""
        return f"{self.shape}, CPU" if self.as_cpu else self.shape

    def __str__(self) -> str:
        """As tests are named: the same in every process, unlike addresses of functions."""
        return f"{self.kernel} {self.case}"


def compare(
    actual: np.ndarray,
    expected: np.ndarray,
    *,
    rtol: float = 0.0,
    atol: float = 0.0,
    bound: np.ndarray | None = None,
) -> Comparison:
    """The worst place of a result, within rtol · |expected| + atol (+ bound).

    A result in f16 was rounded once: half a unit of its 11 bits more, 2^-25 among the subnormal.
    """
    half = actual.dtype == np.float16
    allowed = (rtol + half * 2.0**-11) * np.abs(expected) + (atol + half * 2.0**-25)
    if bound is not None:
        allowed = allowed + bound
    error = np.abs(actual.astype(np.float64) - expected)
    error = np.where(np.isfinite(error), error, np.inf)
    at = int(np.argmax(error / np.maximum(allowed, 1e-30)))
    return Comparison(float(error.flat[at]), float(np.broadcast_to(allowed, error.shape).flat[at]))


def same(actual: np.ndarray, expected: np.ndarray) -> Comparison:
    """For what must come out exactly."""
    return compare(actual, expected)


def untouched(rows: np.ndarray) -> Comparison:
    """For rows that are not in use: they keep the marker."""
    return Comparison(0.0 if (rows == MARKER).all() else np.inf, 0.0)


def worst(*comparisons: Comparison) -> Comparison:
    """The one that is furthest off, by its own bound."""
    return max(comparisons, key=lambda c: (not c.passed, c.error / max(c.bound, 1e-30)))


def needs_half(recording: Recording) -> None:
    """Refuses devices without f16.

    Raises:
        NotHereError: this is one.
    """
    if "shader-f16" not in recording.facts.features:
        raise NotHereError("the device has no shader-f16")


def spare_software(recording: Recording) -> None:
    """Refuses CPU devices: what they never run takes their compiler minutes.

    Raises:
        NotHereError: this is one.
    """
    if recording.facts.info["adapter_type"] == "CPU":
        raise NotHereError("CPU devices never run it and compile it for long")
