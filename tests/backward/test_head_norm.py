"""The gradient of the norm of query and key heads against float64 numpy."""

import numpy as np
import pytest

from backward.head_norm import head_norm_backward
from shaders.device import Device
from shaders.program import Program
from tests.forward.test_head_norm import EPSILON, SHAPES, head_norm_reference
from tests.kernels import activation, central_difference, extent_in_use, run_twice


def head_norm_backward_reference(
    qkv: np.ndarray, q_weight: np.ndarray, k_weight: np.ndarray, d_y: np.ndarray,
    n_heads: int, n_kv_heads: int,
) -> np.ndarray:  # fmt: skip
    shape = (len(qkv), n_heads + 2 * n_kv_heads, len(q_weight))
    x, d = qkv.astype(np.float64).reshape(shape), d_y.astype(np.float64).reshape(shape).copy()
    for head in range(n_heads + n_kv_heads):
        g = d[:, head] * (q_weight if head < n_heads else k_weight)
        x_h = x[:, head]
        rstd = 1 / np.sqrt((x_h * x_h).mean(axis=1, keepdims=True) + EPSILON)
        d[:, head] = rstd * (g - x_h * rstd**2 * (g * x_h).mean(axis=1, keepdims=True))
    return d.reshape(qkv.shape)


def test_reference_is_the_derivative() -> None:
    rng = np.random.default_rng(0)
    qkv, d_y, direction = (rng.normal(size=(3, 32)) for _ in range(3))
    q_weight, k_weight = rng.normal(size=(2, 8))
    slope = central_difference(
        lambda v: float((head_norm_reference(v, q_weight, k_weight, 2, 1) * d_y).sum()),
        qkv, direction,
    )  # fmt: skip
    gradient = head_norm_backward_reference(qkv, q_weight, k_weight, d_y, 2, 1)
    assert slope == pytest.approx((gradient * direction).sum(), rel=1e-7)


@pytest.mark.parametrize("is_cpu", [True, False], ids=["CPU's lanes", "GPU's lanes"])
@pytest.mark.parametrize(("rows", "in_use", "n_heads", "n_kv_heads", "head_size"), SHAPES)
def test_head_norm_backward(
    device: Device, monkeypatch: pytest.MonkeyPatch, rows: int, in_use: int, n_heads: int,
    n_kv_heads: int, head_size: int, is_cpu: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(device, "is_cpu", is_cpu)  # both run on any device
    rng = np.random.default_rng(rows)
    width = (n_heads + 2 * n_kv_heads) * head_size
    qkv, d_y = rng.normal(size=(2, rows, width)).astype(np.float32)
    q_weight, k_weight = rng.normal(size=(2, head_size)).astype(np.float32)
    extent = extent_in_use(device, rows, in_use)
    gradient = activation(device, d_y, extent)
    program = Program(device)
    head_norm_backward(
        program, activation(device, qkv, extent), device.upload(q_weight),
        device.upload(k_weight), EPSILON, gradient, n_heads=n_heads, n_kv_heads=n_kv_heads,
        head_size=head_size,
    )  # fmt: skip
    result = run_twice(program, gradient)
    expected = head_norm_backward_reference(qkv, q_weight, k_weight, d_y, n_heads, n_kv_heads)
    # As in test_rmsnorm.py: two sums, then a difference of numbers of about |d_y| rstd, where a
    # head of four numbers can be small: rstd up to 10.
    np.testing.assert_allclose(result[:in_use], expected[:in_use], rtol=1e-5, atol=1e-5)
    v = (n_heads + n_kv_heads) * head_size
    assert (result[:, v:] == d_y[:, v:]).all()
    assert (result[in_use:] == d_y[in_use:]).all()
