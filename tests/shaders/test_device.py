"""Adapters, buffers, uploads."""

from types import SimpleNamespace

import numpy as np
import pytest

from shaders import device as device_module
from shaders.device import UPLOAD_PIECE, Device, choose_adapter
from shaders.errors import InputError
from shaders.templates import render


def adapters(*kinds: tuple[str, str]) -> list[SimpleNamespace]:
    return [SimpleNamespace(info={"device": name, "adapter_type": kind}) for name, kind in kinds]


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> None:
    found = adapters(("llvmpipe", "CPU"), ("Iris Xe", "IntegratedGPU"), ("RTX 9", "DiscreteGPU"))
    monkeypatch.setattr(device_module, "list_adapters", lambda: found)


@pytest.mark.parametrize(
    ("wanted", "name"), [("auto", "RTX 9"), ("1", "Iris Xe"), (0, "llvmpipe"), ("xe", "Iris Xe")]
)
def test_choice(three: None, wanted: str | int, name: str) -> None:
    assert choose_adapter(wanted).info["device"] == name


def test_wrong_choices(three: None) -> None:
    with pytest.raises(InputError, match="device: 3: there is no adapter of that index; there are"):
        choose_adapter("3")
    with pytest.raises(InputError, match="'voodoo': no adapter has that in its name.*0: llvmpipe"):
        choose_adapter("voodoo")


def test_no_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "list_adapters", lambda: [])
    with pytest.raises(InputError, match="apt-get install mesa-vulkan-drivers"):
        choose_adapter()


def test_upload_in_pieces(device: Device) -> None:
    n = UPLOAD_PIECE // 4 * 2 + 77
    values = np.random.default_rng(0).integers(0, 2**32, n, dtype=np.uint32)
    tensor = device.upload(values)
    assert (device.read(tensor) == values).all()
    device.write_rows(tensor, 5, np.array([1, 2, 3]))
    assert device.read(tensor)[4:9].tolist() == [values[4], 1, 2, 3, values[8]]


def test_wrong_shapes_are_refused(device: Device) -> None:
    tensor = device.empty((4, 8))
    with pytest.raises(ValueError, match="does not fit"):
        device.write(tensor, np.zeros((8, 4)))
    with pytest.raises(ValueError, match="does not fit"):
        device.write_rows(tensor, 3, np.zeros((2, 8)))
    with pytest.raises(ValueError, match="not on 256"):
        tensor.rows(1, 2)


def test_a_tensor_too_large_for_a_binding(device: Device) -> None:
    rows = device.max_binding // 4 + 1
    with pytest.raises(InputError, match="lower data.max_length or train.batch_size"):
        device.empty((rows,))


def test_memory_is_counted_by_purpose(device: Device) -> None:
    before = device.allocated["a test"]
    device.empty((100,), purpose="a test")
    assert device.allocated["a test"] - before == 512  # padded to the alignment of bindings


def test_an_unknown_constant_is_an_error() -> None:
    with pytest.raises(Exception, match="undefined"):
        render("rmsnorm", {"width": 4})
