"""Programs: recording, replay, timing, and reading back late."""

from typing import Any

import numpy as np
import pytest
import wgpu

from lora.forward.gather import gather_rows
from lora.forward.sums import sum_into
from lora.shaders.device import Device
from lora.shaders.errors import LoraError
from lora.shaders.native import map_for_reading
from lora.shaders.program import MAX_WORKGROUPS, Dispatch, Program, ReadbackRing, fold
from lora.shaders.tensor import Tensor


def ones(device: Device, n: int) -> Tensor:
    values = device.empty((n,), extent=device.extent(n))
    device.write(values, np.ones(n))
    return values


def test_copy_clear_and_replay(device: Device) -> None:
    source = device.upload(np.arange(128, dtype=np.float32))
    target = device.empty((128,))
    program = Program(device)
    with program.scope("outer"), program.scope("inner"):
        program.copy(source, target)
    program.clear(target.slice(64, 128))
    assert [command.label for command in program.commands] == ["outer.inner.copy", "clear"]
    for _ in range(2):
        program.run()
        expected = np.where(np.arange(128) < 64, np.arange(128), 0)
        assert (device.read(target) == expected).all()
        device.write(target, np.full(128, 5.0))


def test_copies_between_dispatches_keep_their_place(device: Device) -> None:
    values, totals, first = ones(device, 100), device.empty((64,)), device.empty((64,))
    program = Program(device)
    program.clear(totals)
    sum_into(program, values, values.extent, totals, 0)
    program.copy(totals, first)
    sum_into(program, values, values.extent, totals, 0)
    for _ in range(3):
        program.run()
    assert device.read(first)[0] == 100 and device.read(totals)[0] == 200


def test_labels_carry_their_scopes(device: Device) -> None:
    values, totals = ones(device, 4), device.empty((64,))
    program = Program(device)
    with program.scope("layer 3"):
        with program.scope("norm"):
            sum_into(program, values, values.extent, totals, 0)
        program.clear(totals)
    with pytest.raises(RuntimeError), program.scope("left by an error"):
        raise RuntimeError
    program.clear(totals, label="end")
    labels = [command.label for command in program.commands]
    assert labels == ["layer 3.norm.sum_into", "layer 3.clear", "end"]


def test_wrong_commands_are_refused(device: Device) -> None:
    values, totals = ones(device, 4), device.empty((64,))
    program = Program(device)
    with pytest.raises(ValueError, match="cannot copy"):
        program.copy(values, totals)
    with pytest.raises(ValueError, match=f"passes {MAX_WORKGROUPS} workgroups"):
        program.dispatch(
            "sum_into", {"slot": 0}, [values.extent.uniform, values, totals], (65_536, 1, 1)
        )
    assert not program.commands


def test_fold_covers_the_grid() -> None:
    for n in (0, 1, MAX_WORKGROUPS, MAX_WORKGROUPS + 1, 3 * MAX_WORKGROUPS + 5, 10_000_000):
        x, y, z = fold(n)
        assert z == 1 and max(x, y) <= MAX_WORKGROUPS and max(n, 1) <= x * y <= n + y


def test_a_grid_past_one_dimension(device: Device) -> None:
    """More workgroups than one dimension holds: every row is still done."""
    rows = 64 * MAX_WORKGROUPS + 100
    extent = device.extent(rows)
    x = device.upload(np.array([[1.0, 2.0, 3.0, 4.0]]))
    indices = device.empty((rows,), "u32", extent=extent)
    program = Program(device)
    y = gather_rows(program, x, indices, extent)
    (dispatch,) = program.commands
    assert isinstance(dispatch, Dispatch) and dispatch.workgroups[1] == 2
    program.run()
    assert (device.read(y) == [1.0, 2.0, 3.0, 4.0]).all()


def test_time_gives_a_row_for_each_dispatch(device: Device) -> None:
    extent = device.extent(100)
    values = device.empty((100,), extent=extent)
    device.write(values, np.ones(100))
    totals = device.empty((64,))
    program = Program(device)
    program.clear(totals)
    for slot in range(3):
        sum_into(program, values, extent, totals, slot)
    times = program.time()
    assert [t.label for t in times] == ["sum_into"] * 3
    assert all(0 < t.seconds < 10 for t in times)
    assert (device.read(totals)[:3] == 100.0).all()


@pytest.mark.parametrize("queries", [4096, 4])
def test_time_runs_every_command_once(
    device: Device, monkeypatch: pytest.MonkeyPatch, queries: int
) -> None:
    """Copies before, between and after the dispatches too, also where the queries run out."""
    monkeypatch.setattr("lora.shaders.program._QUERIES", queries)
    values, totals, results = ones(device, 100), device.empty((64,)), device.empty((64,))
    device.write(totals, np.full(64, 9.0))
    program = Program(device)
    program.clear(totals)
    for slot in (0, 1, 0, 1, 2):
        sum_into(program, values, values.extent, totals, slot)
        if slot == 1:
            program.clear(results)
    program.commands += program.commands[-1:]  # the same dispatch again
    program.copy(totals, results)
    times = program.time()
    assert [t.label for t in times] == ["sum_into"] * 6
    assert device.read(results)[:4].tolist() == [200, 200, 200, 0]


def test_time_of_copies_alone(device: Device) -> None:
    target = device.upload(np.ones(64))
    program = Program(device)
    program.clear(target)
    assert program.time() == []
    assert (device.read(target) == 0).all()


def test_a_binding_too_large_is_refused(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    extent = device.extent(100)
    values, totals = device.empty((100,), extent=extent), device.empty((64,))
    monkeypatch.setattr(device, "max_binding", 300)
    with pytest.raises(ValueError, match="largest binding"):
        sum_into(Program(device), values, extent, totals, 0)


def test_readback_when_full_waits_and_keeps_the_order(device: Device) -> None:
    """Four times around the ring without a call of `ready` in between."""
    ring = ReadbackRing(device, 256, slots=2)
    tensor = device.empty((64,))
    for step in range(8):
        device.write(tensor, np.full(64, float(step)))
        ring.push(tensor, lambda values: (len(values), float(values[63])))
    assert ring.ready(wait=True) == [(64, float(step)) for step in range(8)]


def test_readback_has_a_deadline(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that hangs ends in an error, not in a wait without end; no result is lost."""
    ring = ReadbackRing(device, 256, slots=2, deadline=0.05)
    tensor = device.upload(np.ones(64))
    ring.push(tensor, list)
    assert len(ring.take()) == 64

    class Held:
        """The promise of a map that the driver keeps back."""

        def __init__(self, promise: Any) -> None:
            self.promise, self.answers = promise, False

        @property
        def _state(self) -> str:
            return self.promise._state if self.answers else "pending"

        def sync_wait(self) -> None:
            self.promise.sync_wait()

    held: list[Held] = []

    def hold(buffer: wgpu.GPUBuffer) -> Held:
        held.append(Held(map_for_reading(buffer)))
        return held[-1]

    monkeypatch.setattr("lora.shaders.program.map_for_reading", hold)
    ring.push(tensor, list)
    with pytest.raises(LoraError, match="has not given a result for 0 s"):
        ring.ready(wait=True)
    assert ring.ready() == []
    held[0].answers = True
    assert ring.ready(wait=True) == [[1.0] * 64]


@pytest.mark.parametrize("size", [63, 65])
def test_readback_of_another_size_is_refused(device: Device, size: int) -> None:
    ring = ReadbackRing(device, 256)
    with pytest.raises(ValueError, match="ring of 256 bytes"):
        ring.push(device.empty((size,)), list)


def test_readback_keeps_the_order(device: Device) -> None:
    ring = ReadbackRing(device, 256, slots=3)
    tensor = device.empty((64,))
    got = []
    for step in range(10):
        device.write(tensor, np.full(64, float(step)))
        ring.push(tensor, lambda values, step=step: (step, float(values[0])))
        got += ring.ready()
    got += ring.ready(wait=True)
    assert got == [(step, float(step)) for step in range(10)]
    assert ring.ready(wait=True) == []


def test_a_long_program_is_submitted_in_pieces(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, and with the same result."""
    extent = device.extent(64)
    x, doubled = device.empty((64, 4), extent=extent), device.empty((64, 4), extent=extent)
    program = Program(device)
    for _ in range(3):
        program.dispatch(
            "gather", {"width": 4},
            [extent.uniform, x, device.upload(np.arange(64, dtype=np.uint32)), doubled], 4,
            flops=10,
        )  # fmt: skip
        program.copy(doubled, x)
    whole = len(program._pieces())
    monkeypatch.setattr("lora.shaders.program.MAX_SUBMISSION_FLOPS", 15)
    pieces = program._pieces()
    assert whole == 1 and [len(piece) for piece in pieces] == [4, 2]
    device.write(x, np.arange(256, dtype=np.float32).reshape(64, 4))
    program.run()
    assert (device.read(doubled) == np.arange(256).reshape(64, 4)).all()


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, [2, 2, 2, 2]), (2, [4, 4]), (3, [6, 2]), (4, [8]), (9, [8])]
)
def test_submissions_have_so_many_dispatches(
    device: Device, monkeypatch: pytest.MonkeyPatch, most: int, sizes: list[int]
) -> None:
    """Copies count for none; the last submission takes what is left, and none is empty."""
    monkeypatch.setattr("lora.shaders.program.MAX_SUBMISSION_DISPATCHES", most)
    values, totals = ones(device, 10), device.empty((64,))
    program = Program(device)
    for slot in range(4):
        sum_into(program, values, values.extent, totals, slot)
        program.copy(totals, device.empty((64,)))
    assert [len(piece) for piece in program._pieces()] == sizes
    program.run()
    assert device.read(totals)[:5].tolist() == [10, 10, 10, 10, 0]
