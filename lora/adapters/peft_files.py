"""Adapters as Hugging Face PEFT saves and loads them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy

from lora.adapters.saved_factors import SavedFactors, pack
from lora.forward.model.adapter import AdapterLayout
from lora.forward.model.layer_spec import HEAD, LANGUAGE_LAYERS, TEXT_LAYERS
from lora.shaders.errors import InputError
from lora.storage.files import write_file

if TYPE_CHECKING:
    from lora.config.schema import Config

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"
_PREFIX = "base_model.model."
_PEFT_VERSION = "0.21.0"  # the version whose file layout this follows
_NUMBERS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}  # as numpy reads them
_MAGNITUDE = ".lora_magnitude_vector"
# Settings under which an adapter is no sum of W and scale · B · A, and what it is then.
_UNSUPPORTED = {
    "fan_in_fan_out": "an adapter of transposed matrices",
    "modules_to_save": "an adapter with fully trained modules",
    "layer_replication": "an adapter of a model with repeated layers",
    "alora_invocation_tokens": "an aLoRA adapter, which acts from some tokens on only",
    "use_qalora": "a QA-LoRA adapter, which averages groups of its inputs",
    "use_bdlora": "a BD-LoRA adapter, of matrices in blocks",
    "kasa_config": "a KaSA adapter, which cuts singular values out of the base's weights",
    "arrow_config": "an Arrow adapter, which chooses between others token by token",
}
# Values of init_lora_weights: those that took a part out of the base's weights for the adapter to
# begin with (by their beginnings, since pissa_niter_16 is one), and those that left the base alone.
_BASE_CHANGING = ("pissa", "corda", "olora", "lora_ga", "loftq")
_BASE_LEAVING = ("gaussian", "eva", "orthogonal", "mica")


def save_peft_adapter(
    directory: Path, layout: AdapterLayout, flat: np.ndarray, config: Config
) -> None:
    """Writes adapter_model.safetensors and adapter_config.json.

    Args:
        flat: f32 [layout.size], the parameters in the layout of the device.
    """
    own = config.adapter.peft_layers
    layers = layout.architecture.peft_layers if own == "auto" else own
    modules = {
        path.replace(TEXT_LAYERS, layers, 1): factors
        for path, factors in layout.to_modules(flat).items()
    }
    tensors = {}
    for path, (a, b) in modules.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = np.ascontiguousarray(a)
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = np.ascontiguousarray(b)
    some_layers = 0 < len(layout.layers) < layout.architecture.n_layers
    # PEFT's layers_to_transform leaves out the head, and in a class for images, too, other parts
    # have modules of these names: then every module is named in full.
    by_path = (some_layers and HEAD.module in layout.targets) or layers == LANGUAGE_LAYERS
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.model.path,
        "r": layout.rank,
        "lora_alpha": config.adapter.alpha,
        "target_modules": sorted(modules if by_path else layout.targets),
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


def read_peft_settings(directory: Path) -> dict[str, Any]:
    """The adapter_config.json of a LoRA, rsLoRA or DoRA adapter; ranks and alphas are numbers.

    Raises:
        InputError: there is none, it is not the config of an adapter of these kinds, or the
            adapter belongs to weights that its initialisation changed.
    """
    path = directory / SETTINGS
    if not path.is_file() or not (directory / WEIGHTS).is_file():
        raise InputError(
            f"{directory}: no PEFT adapter there; it should be a directory that holds {SETTINGS} "
            f"and {WEIGHTS}."
        )
    try:
        settings = dict(json.loads(path.read_text()))
        kind = settings.get("peft_type")
        if kind != "LORA":
            raise InputError(f"{path}: peft_type is {kind!r}; only LoRA is supported.")
        settings["r"], settings["lora_alpha"] = int(settings["r"]), float(settings["lora_alpha"])
        for key, number in (("rank_pattern", int), ("alpha_pattern", float)):
            pattern = (settings.get(key) or {}).items()
            settings[key] = {re.compile(name).pattern: number(value) for name, value in pattern}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError, AttributeError, re.error) as error:
        raise InputError(f"{path}: not the config of a LoRA adapter ({error!r}).") from None
    for rank in (settings["r"], *settings["rank_pattern"].values()):
        if rank < 1:
            raise InputError(f"{path}: has the rank {rank}; it must be 1 at least.")
    for alpha in (settings["lora_alpha"], *settings["alpha_pattern"].values()):
        if not math.isfinite(alpha):
            raise InputError(f"{path}: has the alpha {alpha}; it must be a number.")
    for key, what in _UNSUPPORTED.items():
        if settings.get(key):
            raise InputError(
                f"{path}: {what} ({key}) is not supported here; where PEFT's merge_and_unload() "
                "can merge it, do that and convert the model with llama.cpp's "
                "convert_hf_to_gguf.py."
            )
    _check_initialization(path, settings.get("init_lora_weights"))
    return settings


def _check_initialization(path: Path, value: Any) -> None:
    """Refuses an adapter that is no change of the base as its file has it."""
    if value is None or isinstance(value, bool):
        return
    name = value.lower() if isinstance(value, str) else ""
    if name.startswith(_BASE_CHANGING):
        # PEFT's conversion is not made for LoftQ, whose base is the rounded one.
        way_out = (
            "Merge it into the model it was trained with by PEFT's merge_and_unload(), and convert "
            "that with llama.cpp's convert_hf_to_gguf.py."
            if name.startswith("loftq")
            else "Where it was trained, save it as a plain adapter with PEFT's save_pretrained("
            "..., path_initial_model_for_weight_conversion=...) and take that one."
        )
        raise InputError(
            f"{path}: init_lora_weights is {value!r}, which changed the base's weights too, so on "
            f"the base as it is the adapter makes another model. {way_out}"
        )
    if name not in _BASE_LEAVING:
        raise InputError(
            f"{path}: init_lora_weights is {value!r}, which is not known here; it may have changed "
            f"the base's weights. Known to leave them are true, false, {', '.join(_BASE_LEAVING)}."
        )


def refuse_dora(directory: Path, settings: Mapping[str, Any]) -> None:
    """Refuses a DoRA adapter, which a base of other weights than its own can't be run with.

    Raises:
        InputError: it is one.
    """
    if settings.get("use_dora"):
        raise InputError(
            f"{directory / SETTINGS}: a DoRA adapter is no sum of scale · B · A: it sets the "
            f"length of each row of the weights. Fold it into its base with lora export "
            f"{directory} --to merged-gguf, and use the model that this writes."
        )


def read_peft_factors(
    directory: Path, settings: Mapping[str, Any] | None = None
) -> dict[str, SavedFactors]:
    """The factors of an adapter by module path (`model.layers.0.self_attn.q_proj`).

    Args:
        settings: of `read_peft_settings`, where they are read already.

    Raises:
        InputError: the files can't be read, hold something that is no part of an adapter, or a
            matrix has another rank than the settings say.
    """
    settings = read_peft_settings(directory) if settings is None else settings
    path = directory / WEIGHTS
    factors = {}
    for module, parts in _read_parts(path).items():
        if not {"A", "B"} <= parts.keys():
            raise InputError(f"{path}: {module} has only one of its A and B.")
        if ("magnitude" in parts) != bool(settings.get("use_dora")):
            has = "a" if "magnitude" in parts else "no"
            raise InputError(
                f"{path}: {module} has {has} {_MAGNITUDE[1:]}, but use_dora is "
                f"{bool(settings.get('use_dora'))} in {SETTINGS}."
            )
        a, b = parts["A"], parts["B"]
        rank = _of_pattern(settings["rank_pattern"], module, settings["r"])
        alpha = _of_pattern(settings["alpha_pattern"], module, settings["lora_alpha"])
        if a.ndim != 2 or b.ndim != 2 or len(a) != rank or b.shape[1] != rank:
            raise InputError(
                f"{path}: {module} has A {a.shape} and B {b.shape}; {SETTINGS} gives it the rank "
                f"{rank}."
            )
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        # Gemma 3 of 4B and up is a model of images too, with the language model one level down.
        plain = module.replace("language_model.", "")
        factors[plain] = SavedFactors(a, b, scale, parts.get("magnitude"))
    return factors


def _read_parts(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """All tensors in f32 by module path, then by "A", "B" or "magnitude"."""
    try:
        tensors = {
            name: _decoded(tensor) for name, tensor in safetensors.deserialize(path.read_bytes())
        }
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({error}).") from None
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, array in tensors.items():
        if array is None:
            raise InputError(f"{path}: {name} is none of {', '.join(_NUMBERS)}.")
        plain = name.removeprefix(_PREFIX).removesuffix(".weight")
        module, dot, part = plain.rpartition(".lora_")
        if dot and part == "magnitude_vector":
            part = "magnitude"
        elif not dot or part not in ("A", "B"):
            raise InputError(f"{path}: {name} is not the A or B of a LoRA adapter.")
        if not np.isfinite(array).all():
            raise InputError(f"{path}: {name} holds NaN or infinite numbers.")
        parts.setdefault(module, {})[part] = array
    return parts


def _decoded(tensor: Mapping[str, Any]) -> np.ndarray | None:
    """A tensor of a safetensors file in f32; None if it is not of numbers with a point."""
    if tensor["dtype"] not in _NUMBERS:
        return None
    values = np.frombuffer(tensor["data"], _NUMBERS[tensor["dtype"]]).reshape(tensor["shape"])
    if tensor["dtype"] == "BF16":  # the upper half of an f32; numpy has no such type
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _of_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value that PEFT takes for a module: of the first pattern that its path ends with."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def load_peft_adapter(directory: Path, layout: AdapterLayout) -> np.ndarray:
    """A PEFT adapter in the layout of the device, f32 [layout.size]; see `saved_factors.pack`.

    Raises:
        InputError: it adapts other matrices than the layout, with other sizes, or by DoRA.
    """
    settings = read_peft_settings(directory)
    refuse_dora(directory, settings)
    return pack(directory, read_peft_factors(directory, settings), layout)
