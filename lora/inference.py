"""A session for text only: a model, perhaps an adapter, no data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forward.architecture import MODULE_NAMES
from forward.tokenizer import Tokenizer
from lora.config import Config
from lora.peft_files import read_peft_modules, read_peft_settings
from lora.session import TrainingSession
from shaders.errors import InputError


def open_for_inference(
    model: str, adapter: Path | None, *, max_length: int, device: str = "auto"
) -> TrainingSession:
    """Opens a model and a PEFT adapter directory for generation.

    Args:
        max_length: tokens of prompt and answer together.

    Raises:
        InputError: the model or the adapter can't be read, or they do not fit together.
    """
    settings: dict[str, Any] = {}
    if adapter is not None:
        peft = read_peft_settings(adapter)
        modules = read_peft_modules(adapter)
        targets = sorted({path.rpartition(".")[2] for path in modules})
        unknown = [name for name in targets if name not in MODULE_NAMES]
        if unknown or not targets:
            raise InputError(f"{adapter}: adapts {', '.join(unknown) or 'nothing'}; not supported.")
        layers = {
            int(path.split(".layers.")[1].split(".")[0]) for path in modules if ".layers." in path
        }
        settings = {
            "rank": peft["r"],
            "alpha": peft["lora_alpha"],
            "targets": targets,
            "variant": "rslora" if peft.get("use_rslora") else "lora",
        }
        if layers:
            settings["layers"] = sorted(layers)
    config = Config.model_validate(
        {
            "model": {"path": model},
            "adapter": settings,
            "data": {"train": "none", "max_length": max_length},  # read by training only
            "device": device,
            "output": "none",
        }
    )
    session = TrainingSession(config, train=False)
    if adapter is not None:
        session.load_adapter(adapter)
    return session


def token_text(tokenizer: Tokenizer, token: int | None) -> str:
    """How a special token is written, "" for none."""
    return "" if token is None else tokenizer.decode([token], skip_special=False)
