"""Coverage leaves out what is marked so: tracing costs the suite half of its time otherwise."""

from __future__ import annotations

import sys
import threading

import pytest


@pytest.mark.parametrize("case", range(3))
def test_a_third_case_runs_untraced(case: int) -> None:
    if case == 2:
        assert sys.gettrace() is None and threading.gettrace() is None
