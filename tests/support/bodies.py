"""Tests of products run by both bodies: `body` in a test's arguments, or by `usefixtures`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lora.forward.matmul_bodies import BODIES
from lora.shaders.recording import Recording

# On matrix units, whose tiles software drivers compile for minutes: their tests are in
# test_matmul_matrix.py, test_matmul_paired.py, test_matmul_prepared.py and test_decode_weights.py.
_ON_UNITS = ("matrix", "decoded", "paired", "prepared")
EXACT = [name for name in BODIES if name not in _ON_UNITS]


@pytest.fixture(params=EXACT)
def body(request: pytest.FixtureRequest) -> str:
    """Both kernels on whatever device there is."""
    return str(request.param)


@pytest.fixture
def recording(request: pytest.FixtureRequest, recording: Recording) -> Recording:
    """With the body that a test asks for."""
    if "body" not in request.fixturenames:
        return recording
    return replace(recording, body=request.getfixturevalue("body"))
