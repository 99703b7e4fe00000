"""Which implementation and which device are taken, on lists of devices that nobody has."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from lora.shaders import choice
from lora.shaders.choice import (
    NotInstalledError,
    UnavailableError,
    asked_for,
    choose,
    choose_device,
    implementation,
    list_devices,
    pick,
    uses_matrix_units,
)
from lora.shaders.errors import GPUError, InputError
from lora.shaders.webgpu import MatrixShape

NVIDIA = MatrixShape(16, 16, 16, "f16", "f32", 32, 32)
BYTES = MatrixShape(16, 16, 32, "i8", "i32", 32, 32)
HALVES = MatrixShape(16, 16, 16, "f16", "f16", 32, 32)


def found(
    name: str, kind: str = "DiscreteGPU", backend: str = "Vulkan", shapes: tuple[Any, ...] = ()
) -> Any:
    info = {"device": name, "adapter_type": kind, "backend_type": backend}
    return SimpleNamespace(info=info, matrix_shapes=shapes)


THREE = [found("llvmpipe", "CPU"), found("Iris Xe", "IntegratedGPU"), found("RTX 9")]


@pytest.mark.parametrize(
    ("wanted", "name"), [("auto", "RTX 9"), ("1", "Iris Xe"), (0, "llvmpipe"), ("xe", "Iris Xe")]
)
def test_a_device_of_a_list(wanted: str | int, name: str) -> None:
    assert pick(THREE, wanted).info["device"] == name


def test_wrong_choices() -> None:
    with pytest.raises(InputError, match="device: 3: there is no device of that index; there are"):
        pick(THREE, "3")
    with pytest.raises(InputError, match="'voodoo': no device has that in its name.*0: llvmpipe"):
        pick(THREE, "voodoo")
    with pytest.raises(InputError, match="apt-get install mesa-vulkan-drivers"):
        pick([])


def test_auto_takes_the_software_driver_where_nothing_else_is() -> None:
    assert pick([found("unknown", "Unknown"), THREE[0]]).info["device"] == "llvmpipe"


@pytest.mark.parametrize(
    ("kind", "shapes", "used"),
    [
        ("DiscreteGPU", (), False),
        ("DiscreteGPU", (BYTES, HALVES), False),
        ("DiscreteGPU", (BYTES, NVIDIA), True),
        ("IntegratedGPU", (NVIDIA,), True),
        ("CPU", (NVIDIA,), False),
    ],
)
def test_matrix_units_that_kernels_use(
    kind: str, shapes: tuple[MatrixShape, ...], used: bool
) -> None:
    """f16 factors and f32 sums; not a software driver's, whose products have another body."""
    assert uses_matrix_units(found("GPU", kind, shapes=shapes)) is used


WINDOWS = {
    "D3D12 has no matrix units": ((), (NVIDIA,), "Vulkan"),
    "D3D12 has those of bytes alone": ((BYTES,), (BYTES, NVIDIA), "Vulkan"),
    "both have them": ((NVIDIA,), (NVIDIA,), "D3D12"),
    "neither has": ((), (), "D3D12"),
}


@pytest.mark.parametrize("wanted", ["auto", "rtx"])
@pytest.mark.parametrize("case", WINDOWS)
def test_windows_shows_a_gpu_twice(case: str, wanted: str) -> None:
    """Asked for by name, Dawn's Vulkan is taken where Direct3D lacks what our kernels use."""
    direct3d, vulkan, backend = WINDOWS[case]
    dawn = [
        found("Iris Xe", "IntegratedGPU", "D3D12"),
        found("RTX 9", backend="D3D12", shapes=direct3d),
        found("Iris Xe", "IntegratedGPU", shapes=(NVIDIA,)),
        found("RTX 9", shapes=vulkan),
    ]
    chosen = choose("dawn", wanted, [], dawn).found
    assert (chosen.info["device"], chosen.info["backend_type"]) == ("RTX 9", backend)
    native = [found("RTX 9"), found("Iris Xe", "IntegratedGPU"), found("RTX 9", backend="D3D12")]
    taken = choose("auto", wanted, native, dawn)
    if case == "neither has":
        assert taken.found is native[0] and taken.instead is None
    else:
        assert taken.found is chosen and taken.instead is native[0]
    assert choose("wgpu", wanted, native, dawn).found is native[0]


def test_an_index_with_auto_counts_wgpus_devices() -> None:
    native = [found("llvmpipe", "CPU"), found("H100"), found("H100"), found("A2")]
    dawn = [found("H100", shapes=(NVIDIA,)), found("H100", shapes=(NVIDIA,)), found("A2")]
    dawn += [found("llvmpipe", "CPU", shapes=(NVIDIA,))]
    assert choose("auto", 2, native, dawn).found is dawn[1]
    assert choose("auto", 1, native, dawn).found is dawn[0]
    assert choose("auto", 3, native, dawn).found is native[3]  # nothing is gained on it
    assert choose("auto", 0, native, dawn).found is native[0]
    assert choose("dawn", 2, native, dawn).found is dawn[2]


def test_auto_does_not_change_which_gpu_is_taken() -> None:
    """The first discrete one, though Dawn would find matrix units on another."""
    native = [found("old"), found("new")]
    dawn = [found("old"), found("new", shapes=(NVIDIA,))]
    assert choose("auto", "auto", native, dawn).found is native[0]


@pytest.mark.parametrize(
    ("setting", "environment", "meant"),
    [
        ("auto", None, "auto"),
        ("auto", "", "auto"),
        ("auto", "dawn", "dawn"),
        ("auto", "wgpu", "wgpu"),
        ("wgpu", "dawn", "wgpu"),
        ("dawn", "wgpu", "dawn"),
    ],
)
def test_the_environment_says_what_auto_means(
    setting: str, environment: str | None, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LORA_WEBGPU")
    if environment is not None:
        monkeypatch.setenv("LORA_WEBGPU", environment)
    assert asked_for(setting) == meant


def test_settings_that_there_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="webgpu: got 'metal'; allowed here: auto, wgpu, dawn"):
        asked_for("metal")
    monkeypatch.setenv("LORA_WEBGPU", "Dawn")
    with pytest.raises(InputError, match="LORA_WEBGPU: got 'Dawn'; allowed here"):
        asked_for()


def lists(monkeypatch: pytest.MonkeyPatch, dawn: Exception | list[Any]) -> list[Any]:
    """Puts lists in place of this machine's; returns wgpu-native's."""
    native = [found("RTX 9")]

    def listed(name: str) -> list[Any]:
        if name == "wgpu":
            return native
        if isinstance(dawn, Exception):
            raise dawn
        return dawn

    monkeypatch.setattr(choice, "list_devices", listed)
    choice.say_once.cache_clear()
    return native


@pytest.mark.parametrize(
    ("reason", "lines"),
    [
        (NotInstalledError("Dawn is not installed (pip install it)"), []),
        (
            UnavailableError("Dawn doesn't load (no such file)"),
            ["webgpu: auto: Dawn doesn't load (no such file); wgpu-native is used."],
        ),
    ],
)
def test_where_dawn_cannot_be_used(
    reason: UnavailableError,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """auto goes on without it, with a line where it should have worked; dawn is an error."""
    monkeypatch.delenv("LORA_WEBGPU")
    native = lists(monkeypatch, reason)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert choose_device().found is native[0]
    assert caplog.messages == lines
    with pytest.raises(InputError) as refused:
        choose_device(webgpu="dawn")
    assert str(refused.value) == f"webgpu: dawn: {reason}; set it to auto or wgpu."
    assert choose_device(webgpu="wgpu").found is native[0]


def test_dawn_is_taken_where_it_reaches_matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORA_WEBGPU")
    dawn = [found("RTX 9", shapes=(NVIDIA,))]
    native = lists(monkeypatch, dawn)
    assert choose_device() == choice.Choice(dawn[0], instead=native[0])


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As in a process that has not loaded Dawn yet."""
    monkeypatch.delitem(sys.modules, "lora.shaders.dawn", raising=False)
    implementation.cache_clear()
    monkeypatch.setattr(choice, "implementation", implementation.__wrapped__)
    return monkeypatch


def test_a_package_that_is_not_installed(fresh: pytest.MonkeyPatch) -> None:
    class Hidden:
        def find_spec(self, name: str, *_: object) -> None:
            if name.split(".")[0] == "wgpudawn":
                raise ModuleNotFoundError(f"No module named {name!r}", name="wgpudawn")

    for name in [name for name in sys.modules if name.split(".")[0] == "wgpudawn"]:
        fresh.delitem(sys.modules, name)
    fresh.setattr(sys, "meta_path", [Hidden(), *sys.meta_path])
    with pytest.raises(NotInstalledError, match=r"pip install 'webgpu-lora\[dawn\]'"):
        choice.implementation("dawn")


@pytest.mark.parametrize(
    "error", [ImportError("libfoo.so"), OSError("not a library"), ValueError("?")]
)
def test_a_package_that_does_not_load(fresh: pytest.MonkeyPatch, error: Exception) -> None:
    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "lora.shaders.dawn":
                raise error

    fresh.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(UnavailableError, match=r"Dawn doesn't load \((libfoo|not a lib|\?)"):
        choice.implementation("dawn")


@pytest.mark.parametrize("kind", [GPUError, KeyError])
def test_a_driver_that_dawn_refuses(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """wgpu-native's own errors stay what they are: nothing goes on without it."""

    def refuse() -> list[Any]:
        raise kind("Vulkan robustness required")

    made = SimpleNamespace(found=refuse)
    monkeypatch.setattr(choice, "implementation", lambda _: made)
    with pytest.raises(
        UnavailableError, match=r"machine \(.?Vulkan robustness required.?\); a newer"
    ):
        list_devices("dawn")
    with pytest.raises(kind):
        list_devices("wgpu")


@pytest.mark.parametrize(
    ("name", "order"),
    [("wgpu", ["Vulkan", "Metal", "D3D12"]), ("dawn", ["D3D12", "Vulkan", "Metal"])],
)
def test_devices_that_repeat_others_are_left_out(
    name: str, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    backends = ["OpenGL", "Vulkan", "Metal", "Null", "D3D11", "D3D12"]
    made = SimpleNamespace(found=lambda: [found("GPU", backend=backend) for backend in backends])
    monkeypatch.setattr(choice, "implementation", lambda _: made)
    assert [one.info["backend_type"] for one in list_devices(name)] == order
