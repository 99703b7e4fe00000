"""Adapters as Hugging Face PEFT saves and loads them; their settings are peft_settings's."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy

from lora.adapters.fused_names import as_named_in
from lora.adapters.peft_settings import (
    EMBEDDING,
    SETTINGS,
    TOKENS,
    WEIGHTS,
    match_patterns,
    read_peft_settings,
)
from lora.adapters.saved_factors import SavedFactors, pack
from lora.adapters.saved_tokens import SavedTokens, put_tokens
from lora.forward.model.adaptable import EMBEDDING_PATH, HEAD, LANGUAGE_LAYERS, TEXT_LAYERS
from lora.forward.model.adapter import AdapterLayout
from lora.shaders.errors import InputError
from lora.shaders.untrusted import as_f32, reading
from lora.storage.files import write_file

if TYPE_CHECKING:
    from lora.config.schema import Config

_PREFIX = "base_model.model."
_PEFT_VERSION = "0.21.0"  # the version whose file layout this follows
_NUMBERS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}  # as numpy reads them
_MAGNITUDE = ".lora_magnitude_vector"
_BASE_LAYER = ".base_layer"
_TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
_MODULE = re.compile(r"(?!.*\.layers\.(?!\d{1,6}\.))[\w-]+(\.[\w-]+)*")


def save_peft_adapter(
    directory: Path, layout: AdapterLayout, flat: np.ndarray, config: Config
) -> None:
    """Writes adapter_model.safetensors and adapter_config.json.

    Args:
        flat: f32 [layout.size], the parameters in the layout of the device.
    """
    own = config.adapter.peft_layers
    layers = layout.architecture.peft_layers if own == "auto" else own

    def in_class(path: str) -> str:
        """As PEFT finds a module in the class that the adapter is for."""
        if path == EMBEDDING_PATH:
            return f"{layers.removesuffix('layers')}{EMBEDDING}"
        return path.replace(TEXT_LAYERS, layers, 1)

    modules = {in_class(path): factors for path, factors in layout.to_modules(flat).items()}
    tensors = {}
    for path, (a, b) in modules.items():
        kind, weight = ("", ".weight") if path != in_class(EMBEDDING_PATH) else ("embedding_", "")
        tensors[f"{_PREFIX}{path}.lora_{kind}A{weight}"] = np.ascontiguousarray(a)
        tensors[f"{_PREFIX}{path}.lora_{kind}B{weight}"] = np.ascontiguousarray(b)
    for path, magnitude in layout.magnitudes(flat).items():
        name = f"{_PREFIX}{in_class(path)}{_MAGNITUDE}"
        tensors[name] = np.ascontiguousarray(magnitude)
    if layout.tokens:
        where = f"{_PREFIX}{layers.removesuffix('layers')}{EMBEDDING}{_TOKEN_ROWS}"
        tensors[where] = layout.trained_tokens(flat).copy()
    some_layers = 0 < len(layout.layers) < layout.architecture.n_layers
    # PEFT's layers_to_transform leaves out the head, and in a class for images, too, other parts
    # have modules of these names: then every module is named in full.
    by_path = (
        (some_layers and {HEAD.module, EMBEDDING} & layout.targets)
        or layers == LANGUAGE_LAYERS
        or layout.is_partial
    )
    low = {in_class(path): one for path, one in layout.low_ranks().items()}
    adapter = config.adapter
    alphas = {
        path: one.scale * (math.sqrt(one.rank) if adapter.variant == "rslora" else one.rank)
        for path, one in low.items()
    }
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.model.path,
        "r": layout.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": sorted(modules if by_path else layout.targets),
        "lora_dropout": adapter.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": "gaussian" if adapter.init == "gaussian" else True,
        "use_rslora": adapter.variant == "rslora",
        "use_dora": layout.dora,
        "modules_to_save": None,
        # By whole paths, which fit one matrix each, whatever class the model opens as.
        "rank_pattern": {path: one.rank for path, one in low.items() if one.rank != layout.rank},
        "alpha_pattern": {
            path: alpha
            for path, alpha in alphas.items()
            if not math.isclose(alpha, adapter.alpha, rel_tol=1e-9)
        },
        TOKENS: list(layout.tokens) or None,
        "layers_to_transform": layout.layers if some_layers and not by_path else None,
        "layers_pattern": "layers" if some_layers and not by_path else None,
        "peft_version": _PEFT_VERSION,
    }
    # The tensors first: a directory with a config but no tensors would look like an adapter.
    write_file(directory / WEIGHTS, safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    write_file(directory / SETTINGS, json.dumps(settings, indent=2) + "\n")


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
    parts_of = _read_parts(path)
    ranks, alphas = (
        _by_module(directory / SETTINGS, settings[key], list(parts_of))
        for key in ("rank_pattern", "alpha_pattern")
    )
    factors = {}
    for module, parts in parts_of.items():
        if "tokens" in parts:
            continue
        if not {"A", "B"} <= parts.keys():
            raise InputError(f"{path}: {module} has only one of its A and B.")
        if module.rpartition(".")[2] == EMBEDDING:
            _check_embedding(path, module, settings)
        if ("magnitude" in parts) != settings["use_dora"]:
            has = "a" if "magnitude" in parts else "no"
            raise InputError(
                f"{path}: {module} has {has} {_MAGNITUDE[1:]}, but use_dora is "
                f"{settings['use_dora']} in {SETTINGS}."
            )
        a, b = parts["A"], parts["B"]
        rank = ranks.get(module, settings["r"])
        alpha = alphas.get(module, settings["lora_alpha"])
        if a.ndim != 2 or b.ndim != 2 or len(a) != rank or b.shape[1] != rank:
            raise InputError(
                f"{path}: {module} has A {a.shape} and B {b.shape}; {SETTINGS} gives it the rank "
                f"{rank}."
            )
        if not a.size or not b.size:
            raise InputError(f"{path}: {module} has A {a.shape} and B {b.shape}, of no numbers.")
        own = (len(b), a.shape[1])
        own = own[::-1] if module.rpartition(".")[2] == EMBEDDING else own  # a row for each token
        if "base" in parts and parts["base"].shape != own:
            raise InputError(
                f"{path}: {module}.base_layer.weight is {parts['base'].shape}, but its A and B are "
                f"for {own}."
            )
        scale = as_f32(alpha / (math.sqrt(rank) if settings["use_rslora"] else rank))
        if scale is None:
            raise InputError(
                f"{directory / SETTINGS}: alpha {alpha:g} of {module} by its rank {rank} is no "
                "number that 32 bits hold."
            )
        # Gemma 3 of 4B and up is a model of images too, with the language model one level down.
        plain = module.replace("language_model.", "")
        if plain in factors:
            raise InputError(f"{path}: {plain} stands there twice.")
        factors[plain] = SavedFactors(a, b, scale, parts.get("magnitude"))
    return factors


def _check_embedding(path: Path, module: str, settings: Mapping[str, Any]) -> None:
    """Refuses what an embedding's A and B can't be put beside here."""
    why = {
        "use_dora": "its rows have magnitudes, too",
        "ensure_weight_tying": "a head that is the embedding has its A and B, too",
        TOKENS: "some of its rows are trained themselves, too",
    }
    for key, reason in why.items():
        if settings.get(key):
            raise InputError(
                f"{path}: {module} is adapted under {key}: {reason}, which is not supported here; "
                "merge it with PEFT's merge_and_unload(), and convert the model with llama.cpp's "
                "convert_hf_to_gguf.py."
            )


def read_trained_tokens(directory: Path, settings: Mapping[str, Any]) -> SavedTokens | None:
    """The rows of the embedding that an adapter brings; None where it has none.

    Args:
        settings: of `read_peft_settings`.

    Raises:
        InputError: the files don't say the same.
    """
    path, ids = directory / WEIGHTS, settings[TOKENS]
    found = {m: parts["tokens"] for m, parts in _read_parts(path).items() if "tokens" in parts}
    if any(module.rpartition(".")[2] != EMBEDDING for module in found) or len(found) > 1:
        raise InputError(
            f"{path}: has rows of tokens of {', '.join(sorted(found))[:200]}; those of {EMBEDDING} "
            "alone are supported."
        )
    rows = next(iter(found.values()), None)
    if rows is None and not ids:
        return None
    if rows is None or rows.ndim != 2 or len(rows) != len(ids):
        there = "none" if rows is None else f"{rows.shape}"
        raise InputError(
            f"{path}: {SETTINGS} names {len(ids)} tokens ({TOKENS}), but the rows of {EMBEDDING} "
            f"there are {there}."
        )
    return SavedTokens(tuple(ids), rows)


def _by_module(path: Path, pattern: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """The value that PEFT takes for each module: of the first pattern that its path ends with."""
    found: dict[str, Any] = {}
    for name, matched in match_patterns(path, list(pattern), modules).items():
        for module in matched:
            found.setdefault(module, (list(pattern).index(name), pattern[name]))
            found[module] = min(found[module], (list(pattern).index(name), pattern[name]))
    return {module: value for module, (_, value) in found.items()}


def _read_parts(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """All tensors in f32 by module path, then by "A", "B", "magnitude", "tokens" or "base".

    In the order of their names: the library gives them in that of its hashes, which changes.
    """
    with reading(path, "a file of safetensors"):
        try:
            tensors = {
                name: _decoded(tensor)
                for name, tensor in sorted(safetensors.deserialize(path.read_bytes()))
            }
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"{path}: cannot be read as safetensors ({error}).") from None
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, array in tensors.items():
        if array is None:
            raise InputError(f"{path}: {name[:200]} is none of {', '.join(_NUMBERS)}.")
        plain = name.removeprefix(_PREFIX).removesuffix(".weight")
        module, dot, part = plain.rpartition(".lora_")
        if dot and part == "magnitude_vector":
            part = "magnitude"
        elif plain.endswith(_TOKEN_ROWS):
            module, part = plain.removesuffix(_TOKEN_ROWS), "tokens"
        elif module.endswith(f".{EMBEDDING}") and part in ("embedding_A", "embedding_B"):
            part = part[-1]
        elif not dot and plain.endswith(_BASE_LAYER):
            # PEFT saves the base's own matrix, too, where it adapts the head or the embedding.
            module, part = plain.removesuffix(_BASE_LAYER), "base"
        elif not dot or part not in ("A", "B"):
            raise InputError(f"{path}: {name[:200]} is not the A or B of a LoRA adapter.")
        if _MODULE.fullmatch(module) is None:
            raise InputError(f"{path}: {name[:200]} is of no module that a model has.")
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
    with np.errstate(all="ignore"):  # what becomes infinite is refused
        return values.astype(np.float32)


def load_peft_adapter(directory: Path, layout: AdapterLayout) -> np.ndarray:
    """A PEFT adapter in the layout of the device, f32 [layout.size]; see `saved_factors.pack`.

    Raises:
        InputError: it adapts other matrices than the layout, with other sizes, or another variant.
    """
    settings = read_peft_settings(directory)
    modules = read_peft_factors(directory, settings)
    flat = pack(directory, as_named_in(layout.architecture, directory, modules), layout)
    put_tokens(directory, read_trained_tokens(directory, settings), layout, flat)
    return flat
