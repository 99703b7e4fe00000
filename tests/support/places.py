"""Which kernel of a recorded program writes what, on memory that has places for tensors alone."""

from __future__ import annotations

import re
from typing import Any

from lora.shaders.memory import CountingMemory
from lora.shaders.program import Dispatch
from lora.shaders.templates import render
from lora.shaders.webgpu import Use

_BINDING = re.compile(r"@binding\((\d+)\)\s*var<([^>]+)>")
_WRITTEN: dict[str, frozenset[int]] = {}  # bindings, by kernel


class Places(CountingMemory):
    """Memory that only counts, but tells tensors' buffers from each other."""

    def _buffer(self, n_bytes: int, use: Use) -> Any:
        return object()

    def inner(self) -> Places:
        within = Places(self.facts, self)
        within.allocated = self.allocated
        return within


def written(dispatch: Dispatch) -> frozenset[int]:
    """Which bindings a kernel writes."""
    key = f"{dispatch.template} {sorted(dispatch.constants.items())!r}"
    if key not in _WRITTEN:
        found = _BINDING.findall(render(dispatch.template, dict(dispatch.constants)))
        _WRITTEN[key] = frozenset(int(n) for n, kind in found if "read_write" in kind)
    return _WRITTEN[key]
