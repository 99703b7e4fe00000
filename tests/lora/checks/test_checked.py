"""Every kernel with the implementation's own checks of indices, as LORA_CHECKED=1 compiles it.

Everywhere else kernels run without them; a checked one keeps a stray access inside its
buffer, so that what it computes differs then. `LORA_CHECKED=1 lora devices --check` runs all
shapes.
"""

from __future__ import annotations

import pytest

from lora.checks.suite import run_checks
from lora.shaders.device import Device
from tests.support.few_checks import a_few
from tests.support.renderings import WGSL


def test_every_kernel_computes_the_same_when_it_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_CHECKED", "1")
    results = list(run_checks(Device, a_few()))
    assert [(r.check, r.reason) for r in results if r.status == "failed"] == []
    used = {template for result in results for template in result.templates}
    # What only GPUs with matrix units run.
    on_units = {path.stem for path in WGSL.glob("*_matrix*.wgsl")}
    everywhere = {path.stem for path in WGSL.glob("*.wgsl")} - on_units
    assert everywhere - used == set()
