"""What users touch: config, data, TrainingSession, checkpoints, export, command line.

Imports every other room. What is exported here is the public API; the rest may change.
"""

from lora.config import Config, load_config
from lora.metrics import EvalResult, Metrics
from lora.run import run_training
from lora.session import TrainingSession
from shaders.errors import InputError, LoraError

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
