"""How a device is opened, and how it compiles."""

import logging
from collections.abc import Mapping

import pytest

from lora.shaders import choice
from lora.shaders import device as device_module
from lora.shaders.choice import Choice, choose_device
from lora.shaders.device import Device
from lora.shaders.errors import GPUError, InputError
from lora.shaders.templates import render, with_directives


@pytest.mark.parametrize(
    ("kept", "asked", "checked"),
    [(True, None, False), (True, "1", True), (True, "0", False), (False, None, True)],
)
def test_kernels_are_checked_where_the_driver_is_not_to_be_trusted(
    monkeypatch: pytest.MonkeyPatch, kept: bool, asked: str | None, checked: bool
) -> None:
    """Or where LORA_CHECKED=1 asks for it."""
    found = choose_device().found
    asked_with: list[bool] = []

    def refuse(features: object, limits: object, *, checked: bool) -> None:
        asked_with.append(checked)
        raise GPUError("not today")

    monkeypatch.setattr(found, "trusts_kernels", kept)
    monkeypatch.setattr(found, "open", refuse)
    monkeypatch.setattr(device_module, "choose_device", lambda *_: Choice(found))
    monkeypatch.delenv("LORA_CHECKED", raising=False)
    if asked is not None:
        monkeypatch.setenv("LORA_CHECKED", asked)
    with pytest.raises(InputError, match=r"makes no device of .*\(not today\); name another"):
        Device()
    assert asked_with == [checked]


def test_where_one_implementation_makes_no_device_the_other_is_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As `auto` does it; one line says so, once in a process."""
    first, second = choose_device().found, choose_device().found

    def refuse(features: object, limits: Mapping[str, int], *, checked: bool) -> None:
        raise GPUError("the driver is confused\nat line 5")

    monkeypatch.setattr(first, "open", refuse)
    monkeypatch.setattr(device_module, "choose_device", lambda *_: Choice(first, instead=second))
    choice.say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with Device() as device:
                assert device.found is second
    assert len(caplog.messages) == 1
    assert "makes no device of" in caplog.text and "confused); wgpu-native" in caplog.text


@pytest.mark.parametrize(
    ("code", "enabled"),
    [
        ("var a: f32; // f16, subgroupAdd", []),
        ("var a: f16;", ["f16"]),
        ("let a = subgroupAdd(b);", ["subgroups"]),
        ("@builtin(subgroup_id) at: u32", ["subgroups"]),
        (
            "var a: subgroup_matrix_left<f16, 8, 8>;",
            ["f16", "subgroups", "chromium_experimental_subgroup_matrix"],
        ),
        (
            "subgroupMatrixStore<row_major>(&y, 0u, a, 8u);",
            ["subgroups", "chromium_experimental_subgroup_matrix"],
        ),
    ],
)
def test_a_kernel_enables_what_it_uses(code: str, enabled: list[str]) -> None:
    """Tint refuses a kernel without these lines, and naga one with lines that it doesn't know."""
    assert with_directives(code) == "".join(f"enable {name};\n" for name in enabled) + code


def test_an_unknown_constant_is_an_error() -> None:
    with pytest.raises(Exception, match="undefined"):
        render("rmsnorm", {"width": 4})
