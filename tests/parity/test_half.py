"""The real models trained in f16, against what PEFT gave in f32."""

import json
from pathlib import Path

import numpy as np
import pytest

from lora.shaders.device import Device
from tests.support.half_tensors import needs_halves
from tests.support.peft_ours import run_ours
from tests.support.peft_reference import REAL_MODELS, make_adapter

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.long] if n == "gemma3" else []) for n in REAL_MODELS],
)
def test_eight_steps_in_f16(
    name: str, device: Device, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Losses within 1e-3, before and after; the gradient norms, which amplify errors, within 1%."""
    needs_halves(device.facts)
    request.getfixturevalue(name)  # skips where the file is absent
    model = REAL_MODELS[name]
    make_adapter(model, tmp_path)
    reference = json.loads(model.record.read_text())
    run = run_ours(model.path, tmp_path, precision="f16")
    pairs = {
        "losses": (run.losses, reference["losses"]),
        "gradient norms": (run.grad_norms, reference["grad_norms"]),
        "eval losses": (run.eval_losses, reference["eval_losses_after"]),
    }
    found = {}
    for what, (ours, theirs) in pairs.items():
        found[what] = np.abs(np.array(ours) / np.array(theirs) - 1).max()
        print(f"{name}: {what} differ by {found[what]:.1e} at most")
    assert 0 < found["losses"] < 1e-3 and found["eval losses"] < 1e-3
    assert found["gradient norms"] < 0.01
