"""What users touch: config, data, TrainingSession, checkpoints, export, command line.

Imports every other room. What is exported here is the public API; the rest may change. Each name is
imported when it is first asked for, so that `import lora` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora.config.schema import Config, load_config
    from lora.shaders.errors import InputError, LoraError
    from lora.training.metrics import EvalResult, Metrics
    from lora.training.run import run_training
    from lora.training.session import TrainingSession

_HOMES = {
    "Config": "lora.config.schema",
    "EvalResult": "lora.training.metrics",
    "InputError": "lora.shaders.errors",
    "LoraError": "lora.shaders.errors",
    "Metrics": "lora.training.metrics",
    "TrainingSession": "lora.training.session",
    "load_config": "lora.config.schema",
    "run_training": "lora.training.run",
}

__all__ = [
    "Config",
    "EvalResult",
    "InputError",
    "LoraError",
    "Metrics",
    "TrainingSession",
    "load_config",
    "run_training",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lora' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
