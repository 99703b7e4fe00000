"""Every kernel with the implementation's own checks of indices, as LORA_CHECKED=1 compiles it.

Everywhere else kernels run without them; a checked one keeps a stray access inside its
buffer, so that what it computes differs then. `LORA_CHECKED=1 lora devices --check` runs all
shapes.
"""

from __future__ import annotations

from collections import Counter

import pytest

from lora.checks.comparison import Check
from lora.checks.suite import ALL_CHECKS, run_checks
from lora.shaders.device import Device
from tests.support.renderings import WGSL

# Whose second shape alone has a kernel that adds parts of the first.
_TWO_SHAPES = ("attention_backward",)


def _a_few() -> list[Check]:
    """The first check of each kernel; of products in stretches, which a second pass adds, too."""
    counts: Counter[tuple[str, str]] = Counter()
    chosen = []
    for check in ALL_CHECKS:
        key = check.kernel, check.shape.partition(" in ")[2]
        counts[key] += 1
        if counts[key] <= 1 + (check.kernel in _TWO_SHAPES):
            chosen.append(check)
    return chosen


def test_every_kernel_computes_the_same_when_it_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_CHECKED", "1")
    checks = _a_few()
    results = list(run_checks(Device, checks))
    assert [(r.check, r.reason) for r in results if r.status == "failed"] == []
    used = {template for result in results for template in result.templates}
    # What only GPUs with matrix units run.
    on_units = {path.stem for path in WGSL.glob("*_matrix*.wgsl")}
    everywhere = {path.stem for path in WGSL.glob("*.wgsl")} - on_units - {"decode_weights"}
    assert everywhere - used == set()
