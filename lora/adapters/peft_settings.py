"""The settings of a PEFT adapter, adapter_config.json: typed, within bounds, nothing overlooked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora.forward.text.bounded import ask
from lora.shaders.errors import InputError
from lora.shaders.untrusted import (
    MOST_RANK,
    MOST_SETTINGS_BYTES,
    as_f32,
    parse_json,
    read_text,
    shown,
)

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"
TOKENS = "trainable_token_indices"
EMBEDDING = "embed_tokens"
_NOT_ONE = "not the config of a LoRA adapter"
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


def read_peft_settings(directory: Path) -> dict[str, Any]:
    """The adapter_config.json of a LoRA, rsLoRA or DoRA adapter.

    Returns:
        what it says, with r (int), lora_alpha (float), rank_pattern and alpha_pattern (mappings of
        those), use_rslora and use_dora (bool), trainable_token_indices (a list of ids, empty where
        there are none) and base_model_name_or_path (str or None) checked.

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
    text = read_text(path, MOST_SETTINGS_BYTES, f"{_NOT_ONE} (no text in UTF-8)")
    try:
        settings = parse_json(text, path, finite=False)  # a NaN is told with its key, below
    except InputError as error:
        reason = str(error).removeprefix(f"{path}: ").rstrip(".")
        raise InputError(f"{path}: {_NOT_ONE}: {reason}.") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path}: {_NOT_ONE}, but {shown(settings)}.")
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{path}: peft_type is {shown(kind)}; only LoRA is supported.")
    for key in ("r", "lora_alpha"):
        if key not in settings:
            raise InputError(f"{path}: {_NOT_ONE}: it has no {key}.")
    settings["r"] = _rank(path, settings["r"])
    settings["lora_alpha"] = _alpha(path, settings["lora_alpha"])
    for key, number in (("rank_pattern", _rank), ("alpha_pattern", _alpha)):
        pattern = settings.get(key) or {}
        if not isinstance(pattern, dict):
            raise InputError(
                f"{path}: {_NOT_ONE}: {key} is {shown(pattern)}, not patterns with numbers."
            )
        settings[key] = {name: number(path, value) for name, value in pattern.items()}
    for key in ("use_rslora", "use_dora"):
        value = settings.get(key) or False
        if not isinstance(value, bool):
            raise InputError(f"{path}: {key} is {shown(value)}; it must be true or false.")
        settings[key] = value
    settings[TOKENS] = _tokens(path, settings.get(TOKENS))
    base = settings.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise InputError(f"{path}: base_model_name_or_path is {shown(base)}; it must be a name.")
    for key, what in _UNSUPPORTED.items():
        if settings.get(key):
            raise InputError(
                f"{path}: {what} ({key}) is not supported here; where PEFT's merge_and_unload() "
                "can merge it, do that and convert the model with llama.cpp's "
                "convert_hf_to_gguf.py."
            )
    _check_initialization(path, settings.get("init_lora_weights"))
    match_patterns(path, [*settings["rank_pattern"], *settings["alpha_pattern"]], [])
    return settings


def _rank(path: Path, value: Any) -> int:
    whole = value if isinstance(value, int) and not isinstance(value, bool) else None
    if isinstance(value, float) and value.is_integer():
        whole = int(value)
    if whole is None or whole > MOST_RANK:
        raise InputError(
            f"{path}: has the rank {shown(value)}; it must be a whole number, {MOST_RANK:,} at "
            "most."
        )
    if whole < 1:
        raise InputError(f"{path}: has the rank {shown(value)}; it must be 1 at least.")
    return whole


def _alpha(path: Path, value: Any) -> float:
    alpha = as_f32(value)
    if alpha is None:
        raise InputError(
            f"{path}: has the alpha {shown(value)}; it must be a number, and one that 32 bits hold."
        )
    return alpha


def _tokens(path: Path, value: Any) -> list[int]:
    """Ids whose rows of the embedding are trained: a list, or one by the embedding's name."""
    if isinstance(value, dict):
        others = [str(name) for name in value if str(name).rpartition(".")[2] != EMBEDDING]
        if others or len(value) > 1:
            named = others[0] if others else ", ".join(value)
            raise InputError(
                f"{path}: {TOKENS} names {shown(named)}; rows of {EMBEDDING} alone are supported "
                "here, which are the head's, too, where that is the embedding."
            )
        value = next(iter(value.values()), None)
    ids = [] if value is None else value
    whole = isinstance(ids, list) and all(type(one) is int and one >= 0 for one in ids)
    if not whole or len(set(ids)) != len(ids):
        raise InputError(
            f"{path}: {TOKENS} is {shown(value)}; it must be a list of token ids, each once."
        )
    return list(ids)


def refuse_tokens(directory: Path, settings: Mapping[str, Any]) -> None:
    """Refuses an adapter with rows of the embedding, which no GGUF adapter can hold.

    Raises:
        InputError: it has some.
    """
    if settings.get(TOKENS):
        raise InputError(
            f"{directory / SETTINGS}: {TOKENS}: the adapter has rows of the embedding in place of "
            "the base's, and a GGUF adapter holds products of A and B alone, none of them for an "
            f"embedding that is the head, too. Fold it into its base with lora export {directory} "
            "--to merged-gguf, and use the model that this writes."
        )


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
            f"{path}: init_lora_weights is {shown(value)}, which changed the base's weights too, "
            f"so on the base as it is the adapter makes another model. {way_out}"
        )
    if name not in _BASE_LEAVING:
        raise InputError(
            f"{path}: init_lora_weights is {shown(value)}, which is not known here; it may have "
            "changed the base's weights. Known to leave them are true, false, "
            f"{', '.join(_BASE_LEAVING)}."
        )


def refuse_dora(directory: Path, settings: Mapping[str, Any]) -> None:
    """Refuses a DoRA adapter where nothing but A and B can be held, as in a GGUF adapter.

    Raises:
        InputError: it is one.
    """
    if settings.get("use_dora"):
        raise InputError(
            f"{directory / SETTINGS}: a DoRA adapter is no sum of scale · B · A: it sets the "
            f"length of each row of the weights. Fold it into its base with lora export "
            f"{directory} --to merged-gguf, and use the model that this writes."
        )


def match_patterns(
    path: Path, patterns: Sequence[str], modules: Sequence[str]
) -> dict[str, list[str]]:
    """Which modules each pattern is for, as PEFT matches them: with the end of their paths.

    PEFT takes the first pattern that fits. Most are names; another is a regular expression out of a
    file, and runs in a child with limits.

    Args:
        path: of the settings, for messages.

    Returns:
        by the pattern's text, the modules in their order.

    Raises:
        InputError: one is no regular expression, or takes too long.
    """
    found = {}
    foreign = [pattern for pattern in patterns if _NAME.fullmatch(pattern) is None]
    for pattern in patterns:
        if pattern not in foreign:
            found[pattern] = [m for m in modules if m == pattern or m.endswith(f".{pattern}")]
    if foreign:
        what = f"{path}: {_NOT_ONE}: a pattern"
        matched = ask(matching_modules, foreign, list(modules), what=what)
        found |= dict(zip(foreign, matched, strict=True))
    return found


_NAME = re.compile(r"\w+")


def matching_modules(patterns: list[str], modules: list[str]) -> list[list[str]]:
    """The modules that each pattern is for; run by `ask`."""
    compiled = [re.compile(rf"(.*\.)?({pattern})$") for pattern in patterns]
    return [[module for module in modules if one.match(module)] for one in compiled]
