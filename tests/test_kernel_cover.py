"""What tests/support/kernel_cover.py lists."""

from __future__ import annotations

from collections import defaultdict

import pytest

from lora.shaders.device import Device
from tests.support import kernel_cover
from tests.support.kernel_cover import listed

LONG = 20_000


def test_the_longest_whose_lines_others_have() -> None:
    """`b` goes, and then `c` must stay: nobody else has line 2 any more."""
    kernels = {"a": {1: LONG}, "b": {2: LONG + 1}, "c": {3: LONG}}
    lines = {1: [1], 2: [1, 2], 3: [2]}
    assert listed(kernels, lines) == {"b": LONG + 1}


def test_what_two_have_counts_for_who_is_left() -> None:
    kernels = {"a": {1: LONG}, "b": {1: LONG, 2: LONG}, "c": {1: LONG, 3: LONG}}
    lines = {1: [1], 2: [1], 3: [1]}
    assert listed(kernels, lines) == {"b": LONG, "c": LONG}


def test_little_text_is_not_worth_it() -> None:
    assert listed({"a": {1: 9}, "b": {2: 9}}, {1: [1], 2: [1]}) == {}


def test_a_kernel_is_of_every_test_that_asks_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes second finds it made, and would compile it without the first."""
    for name, empty in (("_kernels", defaultdict(dict)), ("_lines", {}), ("_texts", {})):
        monkeypatch.setattr(kernel_cover, name, empty)
    monkeypatch.setattr(kernel_cover.device, "render", kernel_cover._noted_render)
    monkeypatch.setattr(Device, "pipeline", kernel_cover._noted_pipeline)
    with Device() as device:
        for test, slots in (("first", (0, 1)), ("second", (1,))):
            monkeypatch.setattr(kernel_cover, "_test", test)
            for slot in slots:
                device.pipeline("sum_into", {"slot": slot})
    first, second = (kernel_cover._kernels[test] for test in ("first", "second"))
    assert len(first) == 2 and len(second) == 1 and second.items() <= first.items()
