"""What a program is recorded with, as one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lora.shaders.errors import InputError
from lora.shaders.facts import DeviceFacts
from lora.shaders.memory import Memory

# A submission that runs for some seconds is killed by the watchdogs of desktop drivers. This is
# half a second on an integrated GPU of 0.2 TFLOP/s; a large GPU hardly notices the few more.
MAX_SUBMISSION_FLOPS = 10**11
SLOW_DEVICE = 2e11  # FLOP/s of the slowest GPU that is thought of


@dataclass
class Submissions:
    """How long programs may keep a device busy with one submission; it may change between runs.

    Attributes:
        flops: about as many operations go into one; a single dispatch is never cut.
    """

    flops: float = MAX_SUBMISSION_FLOPS

    def set_seconds(self, seconds: float, flops_a_second: float = SLOW_DEVICE) -> None:
        """Bounds the time of one; half of it, since kernels differ in speed."""
        self.flops = 0.5 * seconds * flops_a_second


@dataclass(frozen=True)
class Recording:
    """What a program is recorded with. `dataclasses.replace` makes one that differs.

    Attributes:
        facts: of the device; tests record what other devices would by changing them.
        memory: who owns the tensors that recording asks for; one that only counts makes programs
            that cannot run, from which sizes, products and kernels are read.
        precision: of tiles and activations: f32, or f16 where the device has shader-f16.
        products: f16: tiles of products are f16, whatever is between them (and what a text's
            attention multiplies on matrix units); f32: they are, and plain ones, also where there
            are matrix units; None: as the precision.
        body: of products, a name of forward/matmul_bodies.py; None: by the device.
        plans: asked for the tile of each product that is recorded (forward/plans/matmul_plans.py);
            None, as an answer too, leaves it to the model of the time.
        submissions: how long they may be.

    Raises:
        InputError: f16 on a device that lacks it.
    """

    facts: DeviceFacts
    memory: Memory
    precision: str = "f32"
    products: str | None = None
    body: str | None = None
    plans: Callable[[Any], Any] | None = None
    submissions: Submissions = field(default_factory=Submissions)

    @property
    def half_products(self) -> bool:
        """Whether both sides of products with frozen matrices are rounded to f16."""
        return (self.products or self.precision) == "f16"

    @property
    def paired_products(self) -> bool:
        """Whether products in f32 may run on matrix units, their numbers as pairs of f16."""
        if self.body is not None:
            return self.body in ("paired", "prepared")
        facts, whole = self.facts, self.precision == "f32" and self.products is None
        real = facts.has_matrix_units and facts.info["adapter_type"] != "CPU"
        real &= "pairs" not in facts.distrusted
        return whole and real and "shader-f16" in facts.features

    def __post_init__(self) -> None:
        if self.half_products and "shader-f16" not in self.facts.features:
            raise InputError(
                f"train.precision: f16: {self.facts.name} lacks WebGPU's shader-f16; set it to f32."
            )
