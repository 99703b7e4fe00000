"""What those who watch and save a session ask of it; `TrainingSession` itself asks them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lora.data.order import BatchStream
from lora.forward.model.adapter import AdapterLayout
from lora.forward.plans.matmul_plans import ProductShape
from lora.forward.plans.matmul_tiles import Plan
from lora.generation.prompts import Prompt
from lora.optim.guard import GuardState
from lora.shaders.device import Device
from lora.training.communicator import Communicator
from lora.training.metrics import EvalResult, Metrics
from lora.training.orders import Orders
from lora.training.workload import Workload

if TYPE_CHECKING:
    from lora.config.schema import Config


class Trained(Protocol):
    """A session with training, as `TrainingSession` documents it."""

    config: Config
    workload: Workload
    layout: AdapterLayout
    device: Device
    communicator: Communicator
    orders: Orders
    started: datetime
    steps_done: int
    total_steps: int
    evaluations: list[tuple[int, EvalResult]]
    precision: str

    @property
    def settled_config(self) -> Config: ...
    @property
    def stream(self) -> BatchStream | None: ...
    @property
    def plans(self) -> Mapping[ProductShape, Plan]: ...
    @property
    def evaluate(self) -> Callable[..., EvalResult]: ...
    def generate(self, prompt: Prompt, *, max_tokens: int = 64) -> str: ...
    def steps(self, pause: Callable[[], bool] = ...) -> Iterator[Metrics | None]: ...
    def parameters(self) -> np.ndarray: ...
    def checked_parameters(self) -> np.ndarray: ...
    def set_parameters(self, flat: np.ndarray) -> None: ...
    def load_adapter(self, path: str | Path) -> None: ...
    def moments(self) -> dict[str, np.ndarray]: ...
    def guard(self) -> GuardState: ...
    def fingerprints(self) -> dict[str, Any]: ...
    def kernels_digest(self) -> str: ...
    def begin_feedback_anew(self) -> None: ...
