"""A device that holds nothing: what is recorded on it is only counted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from lora.shaders.device import Device, padded_bytes
from lora.shaders.tensor import Extent, Tensor


class PlanningDevice(Device):
    """Stands in for a device of the same limits, to learn what a session would take.

    Tensors have no buffer, writes go nowhere, kernels are not compiled; `allocated` counts just
    as on the device itself, because the same code asks it for memory.

    Args:
        device: whose limits and kind it takes.
    """

    holds_data = False

    def __init__(self, device: Device) -> None:
        self.copy_limits(device)
        self.memory_limit = None

    def _create(
        self, shape: tuple[int, ...], dtype: str, purpose: str, extent: Extent | None
    ) -> Tensor:
        self.allocated[purpose] += padded_bytes(shape, dtype)
        return Tensor(None, 0, tuple(shape), dtype, extent)

    def _write_bytes(
        self, buffer: Any, offset: int, array: np.ndarray, dtype: type[np.generic]
    ) -> None:
        pass

    def read(self, tensor: Tensor) -> np.ndarray:
        """Refused: there is nothing to read."""
        raise ValueError("a planning device holds no data")

    def uniform(self, n_values: int = 4) -> Tensor:
        """A uniform without a buffer."""
        return Tensor(None, 0, (n_values,), "u32")

    def pipeline(self, template: str, constants: dict[str, Any]) -> Any:
        """Nothing is compiled."""
        return None

    def bind_group(self, pipeline: Any, tensors: Iterable[Tensor]) -> Any:
        """Nothing is bound."""
        return None
