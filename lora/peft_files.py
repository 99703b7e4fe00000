"""Adapters as Hugging Face PEFT saves and loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from forward.adapter import AdapterLayout
from forward.architecture import HEAD
from lora.config import Config
from lora.files import write_file
from shaders.errors import InputError

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"
_PREFIX = "base_model.model."
_PEFT_VERSION = "0.21.0"  # the version whose file layout this follows


def save_peft_adapter(
    directory: Path, layout: AdapterLayout, flat: np.ndarray, config: Config
) -> None:
    """Writes adapter_model.safetensors and adapter_config.json.

    Args:
        flat: f32 [layout.size], the parameters in the layout of the device.
    """
    tensors = {}
    for path, (a, b) in layout.to_modules(flat).items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = np.ascontiguousarray(a)
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = np.ascontiguousarray(b)
    some_layers = 0 < len(layout.layers) < layout.architecture.n_layers
    # PEFT's layers_to_transform leaves out the head: then every module is named in full.
    by_path = some_layers and HEAD.module in layout.targets
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.model.path,
        "r": layout.rank,
        "lora_alpha": config.adapter.alpha,
        "target_modules": sorted(layout.to_modules(flat) if by_path else layout.targets),
        "lora_dropout": config.adapter.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": config.adapter.variant == "rslora",
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": layout.layers if some_layers and not by_path else None,
        "layers_pattern": "layers" if some_layers and not by_path else None,
        "peft_version": _PEFT_VERSION,
    }
    # The tensors first: a directory with a config but no tensors would look like an adapter.
    write_file(directory / WEIGHTS, safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    write_file(directory / SETTINGS, json.dumps(settings, indent=2) + "\n")


def parse_peft_settings(directory: Path) -> dict[str, Any]:
    """The adapter_config.json of a PEFT adapter directory, its rank and alpha numbers.

    Raises:
        InputError: there is none, or it is not the config of a LoRA adapter.
    """
    path = directory / SETTINGS
    if not path.is_file() or not (directory / WEIGHTS).is_file():
        raise InputError(
            f"{directory}: no PEFT adapter there; it should be a directory that holds {SETTINGS} "
            f"and {WEIGHTS}."
        )
    try:
        settings = json.loads(path.read_text())
        settings["r"], settings["lora_alpha"] = int(settings["r"]), float(settings["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the config of a LoRA adapter ({error!r}).") from None
    parsed: dict[str, Any] = settings
    return parsed


def read_peft_settings(directory: Path) -> dict[str, Any]:
    """As `parse_peft_settings`, for an adapter that can be loaded here.

    Raises:
        InputError: also where the adapter is of a kind that is not supported.
    """
    settings, path = parse_peft_settings(directory), directory / SETTINGS
    if settings.get("peft_type") != "LORA" or settings.get("use_dora"):
        raise InputError(f"{path}: only plain LoRA and rsLoRA adapters can be loaded here.")
    if settings.get("rank_pattern") or settings.get("alpha_pattern"):
        raise InputError(f"{path}: rank_pattern and alpha_pattern are not supported yet.")
    return settings


def read_peft_modules(directory: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A [rank, in] and B [out, rank] in f32 by module path (`model.layers.0.self_attn.q_proj`).

    Raises:
        InputError: the file can't be read, or holds something that is no A or B.
    """
    path = directory / WEIGHTS
    halves: dict[str, dict[str, np.ndarray]] = {}
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, safetensors.SafetensorError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({error}).") from None
    for name, array in tensors.items():
        module, dot, half = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".lora_")
        if not dot or half not in ("A", "B"):
            raise InputError(f"{path}: {name} is not the A or B of a LoRA adapter.")
        halves.setdefault(module, {})[half] = array.astype(np.float32)
    for module, pair in halves.items():
        if len(pair) != 2:
            raise InputError(f"{path}: {module} has only one of its A and B.")
        for half, array in pair.items():
            if not np.isfinite(array).all():
                raise InputError(f"{path}: {module}.lora_{half} holds NaN or infinite numbers.")
    return {module: (pair["A"], pair["B"]) for module, pair in halves.items()}


def load_peft_adapter(directory: Path, layout: AdapterLayout) -> np.ndarray:
    """A PEFT adapter in the layout of the device, f32 [layout.size].

    Raises:
        InputError: it adapts other matrices than the layout, or with other sizes.
    """
    modules = read_peft_modules(directory)
    wanted = layout.to_modules(np.zeros(layout.size, np.float32))
    for path, (a, b) in wanted.items():
        if path not in modules:
            raise InputError(
                f"{directory}: has no factors for {path}, which adapter.targets and "
                "adapter.layers ask for."
            )
        given_a, given_b = modules[path]
        if given_a.shape != a.shape or given_b.shape != b.shape:
            raise InputError(
                f"{directory}: {path} has A {given_a.shape} and B {given_b.shape}; this model and "
                f"adapter.rank want {a.shape} and {b.shape}."
            )
    extra = sorted(set(modules) - set(wanted))
    if extra:
        raise InputError(
            f"{directory}: also adapts {extra[0]} ({len(extra)} such), which adapter.targets and "
            "adapter.layers leave out."
        )
    return layout.from_modules(modules)
