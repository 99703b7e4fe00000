"""Who owns memory on the device: tensors, uploads, and what is given back."""

import numpy as np
import pytest

from lora.shaders.device import Device
from lora.shaders.errors import DeviceMemoryError, InputError, LoraError
from lora.shaders.memory import UPLOAD_PIECE, Arena, CountingMemory
from lora.shaders.program import Program


def test_upload_in_pieces(device: Device) -> None:
    n = UPLOAD_PIECE // 4 * 2 + 77
    values = np.random.default_rng(0).integers(0, 2**32, n, dtype=np.uint32)
    tensor = device.memory.upload(values)
    assert (device.memory.read(tensor) == values).all()
    device.memory.write_rows(tensor, 5, np.array([1, 2, 3]))
    assert device.memory.read(tensor)[4:9].tolist() == [values[4], 1, 2, 3, values[8]]


def test_write_rows_in_pieces(device: Device) -> None:
    """More than one piece from a row in the middle; the rows around it keep what they hold."""
    rows = UPLOAD_PIECE // 4 // 1024 + 5
    tensor = device.memory.upload(np.full((rows + 3, 1024), 7, np.uint32))
    values = np.random.default_rng(1).integers(0, 2**32, (rows, 1024), dtype=np.uint32)
    device.memory.write_rows(tensor, 2, values)
    result = device.memory.read(tensor)
    assert (result[2:-1] == values).all()
    assert (result[:2] == 7).all() and (result[-1] == 7).all()


@pytest.mark.parametrize(
    ("given", "dtype"),
    [(np.float64, "f32"), (np.float16, "f32"), (np.int64, "u32"), (np.uint8, "u32")],
)
def test_upload_converts(device: Device, given: type, dtype: str) -> None:
    values = np.arange(12).reshape(3, 4)
    tensor = device.memory.upload(values.astype(given).T[::-1])  # not contiguous
    assert tensor.dtype == dtype and tensor.shape == (4, 3)
    assert (device.memory.read(tensor) == values.T[::-1]).all()


def test_rows_in_use(device: Device) -> None:
    extent = device.memory.extent(5)
    assert device.memory.read(extent.uniform).tolist() == [5, 0, 0, 0]
    device.memory.set_rows(extent, 0)
    assert device.memory.read(extent.uniform)[0] == 0
    for rows in (-1, 6):
        with pytest.raises(ValueError, match="do not fit an extent of 5"):
            device.memory.set_rows(extent, rows)


def test_wrong_shapes_are_refused(device: Device) -> None:
    tensor = device.memory.empty((4, 8))
    with pytest.raises(ValueError, match="does not fit"):
        device.memory.write(tensor, np.zeros((8, 4)))
    with pytest.raises(ValueError, match="does not fit"):
        device.memory.write_rows(tensor, 3, np.zeros((2, 8)))
    with pytest.raises(ValueError, match="does not fit"):
        device.memory.write_rows(tensor, -1, np.zeros((1, 8)))
    with pytest.raises(ValueError, match="not on 256"):
        tensor.slice(1, 2)


def test_a_tensor_too_large_for_a_binding(device: Device) -> None:
    rows = device.facts.max_binding // 4 + 1
    with pytest.raises(
        InputError, match="take fewer tokens at a time .data.max_length, train.batch_size"
    ):
        device.memory.empty((rows,))


def test_memory_is_counted_by_purpose(device: Device) -> None:
    before = device.allocated["a test"]
    device.memory.empty((100,), purpose="a test")
    assert device.allocated["a test"] - before == 512  # padded to the alignment of bindings


def test_an_arena_gives_everything_back(device: Device) -> None:
    before = +device.allocated
    with device.arena() as arena:
        tensor = arena.empty((1000,), purpose="here")
        arena.scratch((500,))
        within = arena.inner()
        within.empty((300,), purpose="within")
        assert device.allocated - before == {"here": 4096, "scratch": 2048, "within": 1280}
        within.close()
        assert device.allocated - before == {"here": 4096, "scratch": 2048}
        again = arena.inner()
        again.empty((300,), purpose="within")
    assert device.allocated == before
    for closed in (arena, within, again):
        with pytest.raises(LoraError, match="This was closed"):
            closed.empty((4,))
    with pytest.raises(LoraError, match="was given back"):
        arena.read(tensor)
    with pytest.raises(LoraError, match="was given back"):
        Program(device.recording(memory=arena)).run()  # wgpu-native would end the process


def test_an_arena_that_nobody_holds_is_not_counted(device: Device) -> None:
    before = +device.allocated
    arena = device.arena()
    arena.empty((100,))
    del arena
    assert device.allocated == before


def test_inner_memory_shares_scratch_and_constants(device: Device) -> None:
    for outer in (device.arena(), CountingMemory(device.facts)):
        large = outer.scratch((1000,))
        within = outer.inner()
        assert within.scratch((10,)).buffer is large.buffer
        assert within.constant_uniform((1, 2)) is outer.constant_uniform((1, 2))
        other, third = within.scratch((50,), beside=1), within.scratch((60,), beside=2)
        assert other.buffer is outer.scratch((40,), beside=1).buffer
        assert outer.holds_data == (len({id(t.buffer) for t in (large, other, third)}) == 3)
        assert outer.largest_scratch == (1000, 50, 60) and not any(within.largest_scratch)


def test_counting_is_as_on_the_device(device: Device) -> None:
    counted = CountingMemory(device.facts)
    with device.arena() as arena:
        within = [memory.inner() for memory in (arena, counted)]
        for memory, inner in zip((arena, counted), within, strict=True):
            memory.upload(np.zeros(77), purpose="weights")
            inner.empty((5, 7), "f16", purpose="within")
            memory.scratch((65,))
            memory.scratch((70,), beside=True)
        real = arena.allocated + within[0].allocated
        assert counted.allocated == real == {"weights": 512, "within": 256, "scratch": 1024}
    for use in (lambda: counted.read(counted.empty((4,))), lambda: counted.handle):
        with pytest.raises(ValueError, match="only counts"):
            use()


def test_too_much_for_the_host_is_said(device: Device) -> None:
    """A CPU device has the host's memory: nobody else would say no."""
    with Device() as small:
        taken = 1 << 20
        small.facts = type(small.facts)(**{**vars(small.facts), "memory_limit": taken})
        small.memory.empty((taken // 4 - 64,))
        with pytest.raises(DeviceMemoryError, match="has 1 MiB of memory"):
            small.memory.empty((128,))


def test_a_closed_device_is_not_used_again() -> None:
    with Device() as device:
        arena: Arena = device.memory
        arena.empty((64,))
    assert device.allocated == {}
    with pytest.raises(LoraError, match="This was closed"):
        arena.empty((64,))
