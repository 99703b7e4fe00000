"""Rope's stretched frequencies: properties by hand here, against transformers in tests/parity."""

import math

import numpy as np
import pytest

from lora.forward.model.rope_frequencies import LongRope, Rope, Yarn

PLAIN = Rope(10000.0, 16, interleaved=False)


def test_plain() -> None:
    expected = [10000.0 ** (-2 * j / 16) for j in range(8)]
    np.testing.assert_allclose(PLAIN.frequencies(), expected, rtol=1e-15)
    tables = PLAIN.tables(3)
    assert tables.shape == (3, 8, 2) and tables.dtype == np.float32
    assert tables[2, 1, 0] == np.float32(math.cos(2 * expected[1]))
    assert tables[2, 1, 1] == np.float32(math.sin(2 * expected[1]))


def test_linear_and_divisors() -> None:
    linear = Rope(10000.0, 16, interleaved=False, factor=4.0)
    np.testing.assert_allclose(linear.frequencies(), PLAIN.frequencies() / 4, rtol=1e-15)
    divisors = tuple(float(n) for n in range(1, 9))
    divided = Rope(10000.0, 16, interleaved=False, divisors=divisors)
    np.testing.assert_allclose(
        divided.frequencies(), PLAIN.frequencies() / np.arange(1, 9), rtol=1e-15
    )


def test_yarn_leaves_fast_pairs_and_interpolates_slow_ones() -> None:
    yarn = Rope(
        10000.0, 64, interleaved=False, factor=8.0, yarn=Yarn(4096, 32.0, 1.0), amplitude=1.25
    )
    plain = Rope(10000.0, 64, interleaved=False).frequencies()
    found = yarn.frequencies()
    turns = 4096 * plain / (2 * math.pi)  # over the original context
    assert np.array_equal(found[turns > 33], plain[turns > 33])
    slow = turns < 0.9
    assert slow.sum() > 3 and np.allclose(found[slow], plain[slow] / 8, rtol=1e-12)
    between = ~slow & (turns < 30)
    assert ((found[between] < plain[between]) & (found[between] > plain[between] / 8)).all()
    assert yarn.tables(2)[0, 0].tolist() == [1.25, 0.0]


@pytest.mark.parametrize(("long", "divisor"), [(False, 2.0), (True, 5.0)])
def test_long_rope(long: bool, divisor: float) -> None:
    rope = Rope(10000.0, 16, interleaved=False, long=LongRope(32, (2.0,) * 8, (5.0,) * 8))
    np.testing.assert_allclose(
        rope.frequencies(long=long), PLAIN.frequencies() / divisor, rtol=1e-15
    )
