"""Choice of device, buffers, uploads."""

from types import SimpleNamespace

import numpy as np
import pytest

from lora.shaders import device as device_module
from lora.shaders.device import UPLOAD_PIECE, Device, choose_device, list_devices
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
    monkeypatch.setattr(device_module.wgpu.gpu, "enumerate_adapters_sync", lambda: found)
    assert [a.info["backend_type"] for a in list_devices()] == ["Vulkan", "Metal", "D3D12"]


def test_auto_takes_the_software_driver_where_nothing_else_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = devices(("unknown", "Unknown"), ("llvmpipe", "CPU"))
    monkeypatch.setattr(device_module, "list_devices", lambda: found)
    assert choose_device().info["device"] == "llvmpipe"


def test_upload_in_pieces(device: Device) -> None:
    n = UPLOAD_PIECE // 4 * 2 + 77
    values = np.random.default_rng(0).integers(0, 2**32, n, dtype=np.uint32)
    tensor = device.upload(values)
    assert (device.read(tensor) == values).all()
    device.write_rows(tensor, 5, np.array([1, 2, 3]))
    assert device.read(tensor)[4:9].tolist() == [values[4], 1, 2, 3, values[8]]


def test_write_rows_in_pieces(device: Device) -> None:
    """More than one piece from a row in the middle; the rows around it keep what they hold."""
    rows = UPLOAD_PIECE // 4 // 1024 + 5
    tensor = device.upload(np.full((rows + 3, 1024), 7, np.uint32))
    values = np.random.default_rng(1).integers(0, 2**32, (rows, 1024), dtype=np.uint32)
    device.write_rows(tensor, 2, values)
    result = device.read(tensor)
    assert (result[2:-1] == values).all()
    assert (result[:2] == 7).all() and (result[-1] == 7).all()


@pytest.mark.parametrize(
    ("given", "dtype"),
    [(np.float64, "f32"), (np.float16, "f32"), (np.int64, "u32"), (np.uint8, "u32")],
)
def test_upload_converts(device: Device, given: type, dtype: str) -> None:
    values = np.arange(12).reshape(3, 4)
    tensor = device.upload(values.astype(given).T[::-1])  # not contiguous
    assert tensor.dtype == dtype and tensor.shape == (4, 3)
    assert (device.read(tensor) == values.T[::-1]).all()


def test_rows_in_use(device: Device) -> None:
    extent = device.extent(5)
    assert device.read(extent.uniform).tolist() == [5, 0, 0, 0]
    device.set_rows(extent, 0)
    assert device.read(extent.uniform)[0] == 0
    for rows in (-1, 6):
        with pytest.raises(ValueError, match="do not fit an extent of 5"):
            device.set_rows(extent, rows)


def test_wrong_shapes_are_refused(device: Device) -> None:
    tensor = device.empty((4, 8))
    with pytest.raises(ValueError, match="does not fit"):
        device.write(tensor, np.zeros((8, 4)))
    with pytest.raises(ValueError, match="does not fit"):
        device.write_rows(tensor, 3, np.zeros((2, 8)))
    with pytest.raises(ValueError, match="does not fit"):
        device.write_rows(tensor, -1, np.zeros((1, 8)))
    with pytest.raises(ValueError, match="not on 256"):
        tensor.slice(1, 2)


def test_a_tensor_too_large_for_a_binding(device: Device) -> None:
    rows = device.max_binding // 4 + 1
    with pytest.raises(
        InputError, match="take fewer tokens at a time .data.max_length, train.batch_size"
    ):
        device.empty((rows,))


def test_memory_is_counted_by_purpose(device: Device) -> None:
    before = device.allocated["a test"]
    device.empty((100,), purpose="a test")
    assert device.allocated["a test"] - before == 512  # padded to the alignment of bindings


def test_an_unknown_constant_is_an_error() -> None:
    with pytest.raises(Exception, match="undefined"):
        render("rmsnorm", {"width": 4})
