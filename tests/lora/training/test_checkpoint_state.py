"""A damaged state.json is refused in one sentence, whatever is wrong with it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from lora.shaders.errors import InputError
from lora.training.checkpoint_state import checked_state, read_checkpoint_state

STATE: dict[str, Any] = {
    "step": 3,
    "started": "2026-11-29T05:00:00",
    "stream": {"epoch": 0, "offset": 3, "step": 3, "settings": {"seed": 0}},
    "precision": "f32",
    "found_with": {"adapter": "x"},
    "webgpu": "wgpu",
    "kernels": "abc",
    "plans": {"1x2": {"tile": "t", "splits": 1, "length": 4}},
}
_WRONG = [None, True, -1, 2**31, 10**30, 1.5, "x", [], {}, [[]]]
_MAY_BE_NONE = ("started", "webgpu", "kernels")


def test_what_is_written_is_read() -> None:
    assert checked_state(copy.deepcopy(STATE), "x") == STATE
    assert checked_state({k: v for k, v in STATE.items() if k not in _MAY_BE_NONE}, "x")


@pytest.mark.parametrize("key", STATE)
def test_values_of_other_kinds_are_refused(key: str) -> None:
    for value in _WRONG:
        fine = type(value) is type(STATE[key]) and key not in ("step", "precision", "started")
        if fine or (value is None and key in _MAY_BE_NONE):
            continue
        with pytest.raises(InputError, match=rf"state.json: {key}"):
            checked_state(STATE | {key: value}, "state.json")


@pytest.mark.parametrize("key", ["epoch", "offset", "step", "settings"])
def test_the_stream_is_checked_too(key: str) -> None:
    for value in ("x", -1, None, 10**30, [1]):
        with pytest.raises(InputError, match=rf"stream.*{key}"):
            checked_state(STATE | {"stream": STATE["stream"] | {key: value}}, "state.json")


@pytest.mark.parametrize(
    "content", ["", "[", "[]", "[" * 10**5, '{"step": 1e999}', '{"step": ' + "9" * 5000, "\xff"]
)
def test_files_that_are_no_state_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"state\.json") as caught:
        read_checkpoint_state(path)
    assert len(str(caught.value)) < 400
    path.write_text(json.dumps(STATE))
    assert read_checkpoint_state(path) == STATE
