"""What users touch: config, data, TrainingSession, checkpoints, export, command line.

Imports every other room. What is exported here is the public API; the rest may change. Each name is
imported when it is first asked for, so that `import lora` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora.config.schema import Config, load_config
    from lora.data.given import tokenize
    from lora.shaders.errors import InputError, LoraError
    from lora.training.listeners import Listener
    from lora.training.metrics import EvalResult, Metrics, Sample
    from lora.training.run import run_training
    from lora.training.session import TrainingSession
    from lora.training.watch import joined

    __version__: str

_HOMES = {
    "Config": "lora.config.schema",
    "EvalResult": "lora.training.metrics",
    "InputError": "lora.shaders.errors",
    "Listener": "lora.training.listeners",
    "LoraError": "lora.shaders.errors",
    "Metrics": "lora.training.metrics",
    "Sample": "lora.training.metrics",
    "TrainingSession": "lora.training.session",
    "joined": "lora.training.watch",
    "load_config": "lora.config.schema",
    "tokenize": "lora.data.given",
    "run_training": "lora.training.run",
}

__all__ = [
    "Config",
    "EvalResult",
    "InputError",
    "Listener",
    "LoraError",
    "Metrics",
    "Sample",
    "TrainingSession",
    "__version__",
    "joined",
    "load_config",
    "run_training",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = _version()
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'lora' has no attribute {name!r}")
    globals()[name] = value
    return value


def _version() -> str:
    """pyproject.toml's, as it was installed; in a checkout without an installation from there."""
    from importlib import metadata

    try:
        return metadata.version("webgpu-lora")
    except metadata.PackageNotFoundError:
        import tomllib
        from pathlib import Path

        with open(Path(__file__).parents[1] / "pyproject.toml", "rb") as file:
            return str(tomllib.load(file)["project"]["version"])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
