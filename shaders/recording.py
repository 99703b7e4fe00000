"""What a program is recorded with, as one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lora.shaders.errors import InputError
from lora.shaders.facts import DeviceFacts
from lora.shaders.memory import Memory


@dataclass(frozen=True)
class Recording:
    """What a program is recorded with. `dataclasses.replace` makes one that differs.

    Attributes:
        facts: of the device; tests record what other devices would by changing them.
        memory: who owns the tensors that recording asks for; one that only counts makes programs
            that cannot run, from which sizes, products and kernels are read.
        precision: of tiles and activations: f32, or f16 where the device has shader-f16.
        products: f16: tiles of products are f16, whatever is between them; None: as the precision.
        body: of products, a name of forward/matmul_bodies.py; None: by the device.
        plans: asked for the tile of each product that is recorded (forward/plans/matmul_plans.py);
            None, as an answer too, leaves it to the model of the time.

    Raises:
        InputError: f16 on a device that lacks it.
    """

    facts: DeviceFacts
    memory: Memory
    precision: str = "f32"
    products: str | None = None
    body: str | None = None
    plans: Callable[[Any], Any] | None = None

    @property
    def half_products(self) -> bool:
        """Whether both sides of products with frozen matrices are rounded to f16."""
        return (self.products or self.precision) == "f16"

    def __post_init__(self) -> None:
        if self.half_products and "shader-f16" not in self.facts.features:
            raise InputError(
                f"train.precision: f16: {self.facts.name} lacks WebGPU's shader-f16; set it to f32."
            )
