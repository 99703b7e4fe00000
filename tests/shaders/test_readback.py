"""Small results that come to the host late, in order."""

import numpy as np
import pytest

from lora.shaders.device import Device
from lora.shaders.errors import LoraError
from lora.shaders.readback import ReadbackRing
from lora.shaders.webgpu import Buffer, Mapped


def test_readback_when_full_waits_and_keeps_the_order(device: Device) -> None:
    """Four times around the ring without a call of `ready` in between."""
    ring = ReadbackRing(device.memory, 256, slots=2)
    tensor = device.memory.empty((64,))
    for step in range(8):
        device.memory.write(tensor, np.full(64, float(step)))
        ring.push(tensor, lambda values: (len(values), float(values[63])))
    assert ring.ready(wait=True) == [(64, float(step)) for step in range(8)]


def test_readback_has_a_deadline(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that hangs ends in an error, not in a wait without end; no result is lost."""
    ring = ReadbackRing(device.memory, 256, slots=2, deadline=0.05)
    tensor = device.memory.upload(np.ones(64))
    ring.push(tensor, list)
    assert len(ring.take()) == 64

    class Held:
        """What a driver keeps back."""

        def __init__(self, mapped: Mapped) -> None:
            self.mapped, self.answers = mapped, False

        def arrived(self) -> bool:
            return self.answers and self.mapped.arrived()

        def take(self) -> bytes:
            return self.mapped.take()

    held: list[Held] = []
    map_for_reading = device.handle.map_for_reading

    def hold(buffer: Buffer) -> Held:
        held.append(Held(map_for_reading(buffer)))
        return held[-1]

    monkeypatch.setattr(device.handle, "map_for_reading", hold)
    ring.push(tensor, list)
    with pytest.raises(LoraError, match="has not given a result for 0 s"):
        ring.ready(wait=True)
    assert ring.ready() == []
    held[0].answers = True
    assert ring.ready(wait=True) == [[1.0] * 64]


@pytest.mark.parametrize("size", [63, 65])
def test_readback_of_another_size_is_refused(device: Device, size: int) -> None:
    ring = ReadbackRing(device.memory, 256)
    with pytest.raises(ValueError, match="ring of 256 bytes"):
        ring.push(device.memory.empty((size,)), list)


def test_readback_keeps_the_order(device: Device) -> None:
    ring = ReadbackRing(device.memory, 256, slots=3)
    tensor = device.memory.empty((64,))
    got = []
    for step in range(10):
        device.memory.write(tensor, np.full(64, float(step)))
        ring.push(tensor, lambda values, step=step: (step, float(values[0])))
        got += ring.ready()
    got += ring.ready(wait=True)
    assert got == [(step, float(step)) for step in range(10)]
    assert ring.ready(wait=True) == []
