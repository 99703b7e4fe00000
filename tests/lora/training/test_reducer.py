"""Gradients added up by several ranks: the order of sums, groups of ranks, f16 with feedback."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lora.training import reducer
from lora.training.levels import Level, WholeGather
from lora.training.reducer import Feedback, Reducer
from tests.support.thread_ranks import ThreadRanks

N = 1000  # no multiple of anything


def gradients(size: int, steps: int = 1, seed: int = 0) -> np.ndarray:
    """f32 [steps, size, N], of very different sizes."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(steps, size, N)) * 10.0 ** rng.uniform(-6, 0, N)
    return values.astype(np.float32)


def reduced(reducers: list[Reducer], values: np.ndarray, key: int = 0) -> list[np.ndarray]:
    """What each rank has in the end."""
    with ThreadPoolExecutor(len(reducers)) as pool:
        futures = [
            pool.submit(lambda r, v: r.begin(key, v).result().copy(), one, mine)
            for one, mine in zip(reducers, values, strict=True)
        ]
        return [future.result() for future in futures]


def flat(size: int, comm_dtype: str = "f32", threaded: bool = False) -> list[Reducer]:
    communicators = ThreadRanks(size).communicators
    return [Reducer(one.levels(), comm_dtype, threaded=threaded) for one in communicators]


def grouped(hosts: int, each: int, comm_dtype: str) -> list[Reducer]:
    """Ranks of several hosts: within a host first, then those of one place across hosts."""
    within = [ThreadRanks(each) for _ in range(hosts)]
    across = [ThreadRanks(hosts) for _ in range(each)]
    reducers = []
    for host in range(hosts):
        for place in range(each):
            pair = within[host].communicators[place], across[place].communicators[host]
            levels: list[Level] = [WholeGather(one.rank, one.size, one.gather) for one in pair]
            reducers.append(Reducer(levels, comm_dtype, threaded=False))
    return reducers


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("threaded", [False, True])
def test_sums_are_in_the_order_of_ranks(size: int, threaded: bool) -> None:
    (values,) = gradients(size)
    wanted = values[0].copy()
    for theirs in values[1:]:
        wanted += theirs
    reducers = flat(size, threaded=threaded)
    for found in reduced(reducers, values):
        assert found.tobytes() == wanted.tobytes()
    for one in reducers:
        one.close()


@pytest.mark.parametrize(("hosts", "each"), [(2, 2), (3, 2)])
def test_groups_add_up_within_and_then_across(hosts: int, each: int) -> None:
    (values,) = gradients(hosts * each)
    found = reduced(grouped(hosts, each, "f32"), values)
    parts = []
    for host in range(hosts):
        part = values[host * each].copy()
        for theirs in values[host * each + 1 : (host + 1) * each]:
            part += theirs
        parts.append(part)
    wanted = parts[0].copy()
    for part in parts[1:]:
        wanted += part
    for theirs in found:
        assert theirs.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("make", [lambda: flat(3, "f16"), lambda: grouped(2, 2, "f16")])
def test_what_f16_loses_is_sent_later(make) -> None:
    """The sum over steps stays within what one step's rounding loses; without feedback it drifts.

    Gradients that are alike from step to step are rounded alike, which is the worst case.
    """
    reducers, steps = make(), 50
    size = len(reducers)
    values = gradients(size)[0]
    exact = values.astype(np.float64).sum(0)
    total = np.zeros(N)
    for _ in range(steps):
        found = reduced(reducers, values)
        assert len({theirs.tobytes() for theirs in found}) == 1
        total += found[0]
    # One step's rounding: of each rank's row (2^-11 of a value, or of the row's smallest normal
    # number) and of the sum, of which either may be left.
    rows = np.abs(values).max()
    bound = 2 * (size + 1) * (2.0**-11 * np.abs(values).sum(0) + 2.0**-24 * rows)
    assert (np.abs(total - steps * exact) <= bound).all()
    assert (np.abs(steps * found[0] - steps * exact) > bound).any()


def test_feedback_can_be_dropped() -> None:
    feedback = Feedback()
    ((values,),) = gradients(1)

    def packed() -> bytes:
        found = np.empty(feedback.size(N), np.uint8)
        feedback.pack(0, values, found)
        return found.tobytes()

    first = packed()
    assert packed() != first
    feedback.forget()
    assert packed() == first


def test_long_segments_are_converted_by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes, whoever converts which part of them."""
    (values,) = gradients(2)
    wanted = reduced(flat(2, "f16"), values)
    monkeypatch.setattr(reducer, "_CHUNK", 100)
    for theirs, ours in zip(wanted, reduced(flat(2, "f16"), values), strict=True):
        assert theirs.tobytes() == ours.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_arrives_and_leaves_nothing(bad: float) -> None:
    """The step is skipped for all; the next one is as if it had not been."""
    reducers, (values,) = flat(2, "f16"), gradients(2)
    broken = values.copy()
    broken[1, 5] = bad
    for found in reduced(reducers, broken):
        assert not np.isfinite(found[5])
    fresh = flat(2, "f16")
    reduced(reducers, np.zeros_like(values), key=1)  # another piece
    again = reduced(reducers, values)
    first = reduced(fresh, values)
    segment = slice(512, N)  # of the rank whose row was finite nothing is lost
    assert np.isfinite(again[0]).all() and np.isfinite(first[0]).all()
    np.testing.assert_allclose(again[0][segment], first[0][segment], rtol=0, atol=2e-3)


def test_zeros_stay_zeros() -> None:
    for found in reduced(flat(2, "f16"), np.zeros((2, N), np.float32)):
        assert not found.any()


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(ValueError, match="comm_dtype"):
        Reducer([], "bf16", threaded=False)
