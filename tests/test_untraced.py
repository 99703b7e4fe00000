"""Coverage leaves out what is marked so: tracing costs the suite half of its time otherwise."""

from __future__ import annotations

import sys
import threading

import pytest


@pytest.mark.parametrize("case", range(2))
def test_a_second_case_runs_untraced(case: int) -> None:
    if case == 1:
        assert sys.gettrace() is None and threading.gettrace() is None
