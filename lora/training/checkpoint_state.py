"""What a checkpoint's state.json must hold: each value's type and range, before any is used."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from lora.shaders.errors import InputError
from lora.shaders.untrusted import read_json_object, shown, whole_number

_MOST_BYTES = 1 << 24  # plans of ten thousand products have two million
_MOST_PROCESSES = 1 << 20
_PRECISIONS = ("f32", "f16")


def read_checkpoint_state(path: Path) -> dict[str, Any]:
    """The values of a state.json.

    Raises:
        InputError: it can't be read, or a value is missing or of another kind than is written.
    """
    return checked_state(read_json_object(path, _MOST_BYTES), path)


def checked_state(state: dict[str, Any], source: object) -> dict[str, Any]:
    """The values of a state.json, as they are, once their kinds are right.

    Args:
        source: for messages.

    Raises:
        InputError: a value is missing, or of another kind than is written.
    """
    whole_number(state, "step", source)
    _check(source, "precision", state.get("precision"), state.get("precision") in _PRECISIONS)
    if "processes" in state:
        processes = whole_number(state, "processes", source)
        _check(source, "processes", processes, 1 <= processes <= _MOST_PROCESSES)
    stream = _mapping(source, "stream", state.get("stream"))
    for key in ("epoch", "offset", "step"):
        if key in stream:
            whole_number(stream, key, f"{source}: stream")
    if "settings" in stream:
        _mapping(source, "stream.settings", stream["settings"])
    _mapping(source, "found_with", state.get("found_with"))
    for name, plan in _mapping(source, "plans", state.get("plans")).items():
        _mapping(source, f"plans.{name}", plan)
    for key in ("files", "fingerprints"):
        if key in state:
            _mapping(source, key, state[key])
    if "guard" in state:
        guard = _mapping(source, "guard", state["guard"])
        for key in ("good_steps", "skipped"):
            whole_number(dict(guard), key, f"{source}: guard")
        scale = guard.get("scale")
        _check(source, "guard.scale", scale, isinstance(scale, float | int) and scale > 0)
    for key in ("webgpu", "kernels", "started"):
        value = state.get(key)
        _check(source, key, value, value is None or isinstance(value, str))
    if state.get("started") is not None:
        try:
            datetime.fromisoformat(state["started"])
        except ValueError:
            _check(source, "started", state["started"], False)
    return state


def _mapping(source: object, key: str, value: Any) -> Mapping[str, Any]:
    _check(source, key, value, isinstance(value, dict))
    found: Mapping[str, Any] = value
    return found


def _check(source: object, key: str, value: Any, right: bool) -> None:
    if not right:
        raise InputError(f"{source}: {key[:100]} is {shown(value)}, which is never written there.")
