"""Choice of device, and how it compiles."""

from types import SimpleNamespace

import pytest

from lora.shaders import device as device_module
from lora.shaders.device import Device, choose_device, list_devices
from lora.shaders.errors import InputError
from lora.shaders.templates import render


def devices(*kinds: tuple[str, str]) -> list[SimpleNamespace]:
    return [SimpleNamespace(info={"device": name, "adapter_type": kind}) for name, kind in kinds]


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> None:
    found = devices(("llvmpipe", "CPU"), ("Iris Xe", "IntegratedGPU"), ("RTX 9", "DiscreteGPU"))
    monkeypatch.setattr(device_module, "list_devices", lambda: found)


@pytest.mark.parametrize(
    ("wanted", "name"), [("auto", "RTX 9"), ("1", "Iris Xe"), (0, "llvmpipe"), ("xe", "Iris Xe")]
)
def test_choice(three: None, wanted: str | int, name: str) -> None:
    assert choose_device(wanted).info["device"] == name


def test_wrong_choices(three: None) -> None:
    with pytest.raises(InputError, match="device: 3: there is no device of that index; there are"):
        choose_device("3")
    with pytest.raises(InputError, match="'voodoo': no device has that in its name.*0: llvmpipe"):
        choose_device("voodoo")


def test_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "list_devices", lambda: [])
    with pytest.raises(InputError, match="apt-get install mesa-vulkan-drivers"):
        choose_device()


def test_devices_that_repeat_others_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = ["OpenGL", "Vulkan", "Metal", "Null", "D3D12"]
    found = [SimpleNamespace(info={"backend_type": backend}) for backend in backends]
    monkeypatch.setattr(
        device_module, "implementation", lambda: SimpleNamespace(found=lambda: found)
    )
    assert [a.info["backend_type"] for a in list_devices()] == ["Vulkan", "Metal", "D3D12"]


def test_auto_takes_the_software_driver_where_nothing_else_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = devices(("unknown", "Unknown"), ("llvmpipe", "CPU"))
    monkeypatch.setattr(device_module, "list_devices", lambda: found)
    assert choose_device().info["device"] == "llvmpipe"


@pytest.mark.parametrize(
    ("kept", "asked", "checked"),
    [(True, None, False), (True, "1", True), (True, "0", False), (False, None, True)],
)
def test_kernels_are_checked_where_the_driver_is_not_to_be_trusted(
    monkeypatch: pytest.MonkeyPatch, kept: bool, asked: str | None, checked: bool
) -> None:
    """Or where LORA_CHECKED=1 asks for it."""
    found = choose_device()
    monkeypatch.setattr(found, "bounds_are_kept", kept)
    monkeypatch.setattr(device_module, "choose_device", lambda _: found)
    monkeypatch.delenv("LORA_CHECKED", raising=False)
    if asked is not None:
        monkeypatch.setenv("LORA_CHECKED", asked)
    with Device() as device:
        compiled = []
        monkeypatch.setattr(device.handle, "compile", lambda *_, checked: compiled.append(checked))
        device.pipeline("gather", {"width": 4})
    assert compiled == [checked]


def test_an_unknown_constant_is_an_error() -> None:
    with pytest.raises(Exception, match="undefined"):
        render("rmsnorm", {"width": 4})
