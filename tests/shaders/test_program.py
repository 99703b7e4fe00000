"""Programs: recording, replay, timing, and reading back late."""

import numpy as np
import pytest

from lora.forward.gather import gather_rows
from lora.forward.sums import sum_into
from lora.shaders.program import MAX_WORKGROUPS, Dispatch, Program, fold
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor
from tests.support.kernels import with_facts


def ones(recording: Recording, n: int) -> Tensor:
    values = recording.memory.empty((n,), extent=recording.memory.extent(n))
    recording.memory.write(values, np.ones(n))
    return values


def test_copy_clear_and_replay(recording: Recording) -> None:
    source = recording.memory.upload(np.arange(128, dtype=np.float32))
    target = recording.memory.empty((128,))
    program = Program(recording)
    with program.scope("outer"), program.scope("inner"):
        program.copy(source, target)
    program.clear(target.slice(64, 128))
    assert [command.label for command in program.commands] == ["outer.inner.copy", "clear"]
    for _ in range(2):
        program.run()
        expected = np.where(np.arange(128) < 64, np.arange(128), 0)
        assert (recording.memory.read(target) == expected).all()
        recording.memory.write(target, np.full(128, 5.0))


def test_copies_between_dispatches_keep_their_place(recording: Recording) -> None:
    values, totals, first = (
        ones(recording, 100),
        recording.memory.empty((64,)),
        recording.memory.empty((64,)),
    )
    program = Program(recording)
    program.clear(totals)
    sum_into(program, values, values.extent, totals, 0)
    program.copy(totals, first)
    sum_into(program, values, values.extent, totals, 0)
    for _ in range(3):
        program.run()
    assert recording.memory.read(first)[0] == 100 and recording.memory.read(totals)[0] == 200


def test_labels_carry_their_scopes(recording: Recording) -> None:
    values, totals = ones(recording, 4), recording.memory.empty((64,))
    program = Program(recording)
    with program.scope("layer 3"):
        with program.scope("norm"):
            sum_into(program, values, values.extent, totals, 0)
        program.clear(totals)
    with pytest.raises(RuntimeError), program.scope("left by an error"):
        raise RuntimeError
    program.clear(totals, label="end")
    labels = [command.label for command in program.commands]
    assert labels == ["layer 3.norm.sum_into", "layer 3.clear", "end"]


def test_wrong_commands_are_refused(recording: Recording) -> None:
    values, totals = ones(recording, 4), recording.memory.empty((64,))
    program = Program(recording)
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


def test_a_grid_past_one_dimension(recording: Recording) -> None:
    """More workgroups than one dimension holds: every row is still done."""
    rows = 64 * MAX_WORKGROUPS + 100
    extent = recording.memory.extent(rows)
    x = recording.memory.upload(np.array([[1.0, 2.0, 3.0, 4.0]]))
    indices = recording.memory.empty((rows,), "u32", extent=extent)
    program = Program(recording)
    y = gather_rows(program, x, indices, extent)
    (dispatch,) = program.commands
    assert isinstance(dispatch, Dispatch) and dispatch.workgroups[1] == 2
    program.run()
    assert (recording.memory.read(y) == [1.0, 2.0, 3.0, 4.0]).all()


def test_time_gives_a_row_for_each_dispatch(recording: Recording) -> None:
    extent = recording.memory.extent(100)
    values = recording.memory.empty((100,), extent=extent)
    recording.memory.write(values, np.ones(100))
    totals = recording.memory.empty((64,))
    program = Program(recording)
    program.clear(totals)
    for slot in range(3):
        sum_into(program, values, extent, totals, slot)
    times = program.time()
    assert [t.label for t in times] == ["sum_into"] * 3
    assert all(0 < t.seconds < 10 for t in times)
    assert (recording.memory.read(totals)[:3] == 100.0).all()


@pytest.mark.parametrize("queries", [4096, 4])
def test_time_runs_every_command_once(
    recording: Recording, monkeypatch: pytest.MonkeyPatch, queries: int
) -> None:
    """Copies before, between and after the dispatches too, also where the queries run out."""
    monkeypatch.setattr("lora.shaders.program._QUERIES", queries)
    values, totals, results = (
        ones(recording, 100),
        recording.memory.empty((64,)),
        recording.memory.empty((64,)),
    )
    recording.memory.write(totals, np.full(64, 9.0))
    program = Program(recording)
    program.clear(totals)
    for slot in (0, 1, 0, 1, 2):
        sum_into(program, values, values.extent, totals, slot)
        if slot == 1:
            program.clear(results)
    program.commands += program.commands[-1:]  # the same dispatch again
    program.copy(totals, results)
    times = program.time()
    assert [t.label for t in times] == ["sum_into"] * 6
    assert recording.memory.read(results)[:4].tolist() == [200, 200, 200, 0]


def test_time_of_copies_alone(recording: Recording) -> None:
    target = recording.memory.upload(np.ones(64))
    program = Program(recording)
    program.clear(target)
    assert program.time() == []
    assert (recording.memory.read(target) == 0).all()


def test_a_binding_too_large_is_refused(recording: Recording) -> None:
    extent = recording.memory.extent(100)
    values, totals = recording.memory.empty((100,), extent=extent), recording.memory.empty((64,))
    recording = with_facts(recording, max_binding=300)
    with pytest.raises(ValueError, match="largest binding"):
        sum_into(Program(recording), values, extent, totals, 0)


def test_a_long_program_is_submitted_in_pieces(recording: Recording) -> None:
    """In order, and with the same result."""
    extent = recording.memory.extent(64)
    x, doubled = (
        recording.memory.empty((64, 4), extent=extent),
        recording.memory.empty((64, 4), extent=extent),
    )
    program = Program(recording)
    for _ in range(3):
        program.dispatch(
            "gather", {"width": 4, "scale": 1},
            [extent.uniform, x, recording.memory.upload(np.arange(64, dtype=np.uint32)), doubled],
            4,
            flops=10,
        )  # fmt: skip
        program.copy(doubled, x)
    whole = len(program._pieces())
    recording.submissions.flops = 15
    pieces = program._pieces()
    assert whole == 1 and [len(piece) for piece in pieces] == [4, 2]
    recording.memory.write(x, np.arange(256, dtype=np.float32).reshape(64, 4))
    program.run()
    assert (recording.memory.read(doubled) == np.arange(256).reshape(64, 4)).all()


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, [2, 2, 2, 2]), (2, [4, 4]), (3, [6, 2]), (4, [8]), (9, [8])]
)
def test_submissions_have_so_many_dispatches(
    recording: Recording, monkeypatch: pytest.MonkeyPatch, most: int, sizes: list[int]
) -> None:
    """Copies count for none; the last submission takes what is left, and none is empty."""
    monkeypatch.setattr("lora.shaders.program.MAX_SUBMISSION_DISPATCHES", most)
    values, totals = ones(recording, 10), recording.memory.empty((64,))
    program = Program(recording)
    for slot in range(4):
        sum_into(program, values, values.extent, totals, slot)
        program.copy(totals, recording.memory.empty((64,)))
    assert [len(piece) for piece in program._pieces()] == sizes
    program.run()
    assert recording.memory.read(totals)[:5].tolist() == [10, 10, 10, 10, 0]


def test_a_gpus_first_submissions_are_short(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora.shaders.program.FIRST_SUBMISSION_DISPATCHES", 2)
    monkeypatch.setattr("lora.shaders.program.MAX_SUBMISSION_DISPATCHES", 6)
    for is_cpu, sizes in ((True, [6, 6, 6]), (False, [2, 3, 5, 6, 2])):
        of = with_facts(recording, is_cpu=is_cpu)
        values, totals = ones(of, 10), of.memory.empty((64,))
        program = Program(of)
        for slot in range(18):
            sum_into(program, values, values.extent, totals, slot)
        assert [len(piece) for piece in program._pieces()] == sizes
        program.run()
        assert of.memory.read(totals)[:19].tolist() == [10] * 18 + [0]
