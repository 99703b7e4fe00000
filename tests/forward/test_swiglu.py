"""The gated activation and its gradient against float64 numpy."""

import numpy as np
import pytest

from backward.swiglu import swiglu_backward
from forward.swiglu import swiglu
from shaders.device import Device
from shaders.program import Program
from tests.kernels import MARKER, activation, central_difference, extent_in_use, marked, run_twice

ACTIVATIONS = ["silu", "gelu_tanh"]
SHAPES = [(1, 1, 4), (5, 3, 100), (67, 67, 576)]


def gate_reference(g: np.ndarray, name: str) -> np.ndarray:
    if name == "silu":
        return g / (1 + np.exp(-g))
    return 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))


def gate_slope_reference(g: np.ndarray, name: str) -> np.ndarray:
    if name == "silu":
        s = 1 / (1 + np.exp(-g))
        return s * (1 + g * (1 - s))
    t = np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))
    inner = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * g**2)
    return 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * inner


def make(rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(width)
    gate_up = 3 * rng.normal(size=(rows, 2 * width)).astype(np.float32)
    gate_up[0, 0], gate_up[-1, 1] = -80.0, 80.0  # far into both tails
    return gate_up, rng.normal(size=(rows, width)).astype(np.float32)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slope_is_the_derivative(name: str) -> None:
    g = np.linspace(-6, 6, 25)
    direction = np.ones_like(g)
    weights = np.random.default_rng(0).normal(size=25)
    slope = central_difference(
        lambda v: float((gate_reference(v, name) * weights).sum()), g, direction
    )
    assert slope == pytest.approx((gate_slope_reference(g, name) * weights).sum(), rel=1e-8)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "in_use", "width"), SHAPES)
def test_swiglu(device: Device, rows: int, in_use: int, width: int, name: str) -> None:
    gate_up, _ = make(rows, width)
    extent = extent_in_use(device, rows, in_use)
    out = marked(device, extent, width)
    program = Program(device)
    swiglu(program, activation(device, gate_up, extent), activation_name=name, out=out)
    result = run_twice(program, out)
    g, up = gate_up[:, :width].astype(np.float64), gate_up[:, width:]
    # exp and tanh of WGSL are good to some ulp; gelu cancels 1 + tanh at the left.
    np.testing.assert_allclose(
        result[:in_use], (gate_reference(g, name) * up)[:in_use], rtol=4e-6, atol=1e-5
    )
    assert (result[in_use:] == MARKER).all()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "in_use", "width"), SHAPES)
def test_swiglu_backward(
    device: Device, rows: int, in_use: int, width: int, name: str, in_place: bool
) -> None:
    gate_up, d_y = make(rows, width)
    extent = extent_in_use(device, rows, in_use)
    source = activation(device, gate_up, extent)
    out = source if in_place else marked(device, extent, 2 * width)
    program = Program(device)
    swiglu_backward(program, source, activation(device, d_y, extent), activation_name=name, out=out)
    result = run_twice(program, out)
    g, up = gate_up[:, :width].astype(np.float64), gate_up[:, width:]
    expected = np.concatenate(
        [d_y * up * gate_slope_reference(g, name), d_y * gate_reference(g, name)], axis=1
    )
    np.testing.assert_allclose(result[:in_use], expected[:in_use], rtol=4e-6, atol=2e-5)
    untouched = gate_up if in_place else np.full_like(gate_up, MARKER)
    assert (result[in_use:] == untouched[in_use:]).all()


def test_an_unknown_activation_is_refused(device: Device) -> None:
    gate_up = device.empty((2, 8), extent=device.extent(2))
    with pytest.raises(ValueError, match="none of silu, gelu_tanh"):
        swiglu(Program(device), gate_up, activation_name="relu")
