"""The norm of query and key heads against float64 numpy."""

import numpy as np
import pytest

from forward.head_norm import head_norm
from shaders.device import Device
from shaders.program import Program
from tests.kernels import MARKER, activation, extent_in_use, marked, run_twice

EPSILON = 1e-6
# rows, in use, query heads, key heads, head size
SHAPES = [
    (1, 1, 1, 1, 4),
    (5, 3, 2, 1, 12),
    (67, 66, 4, 2, 64),
    (3, 3, 4, 1, 256),
    (5, 4, 1, 1, 2052),
]


def head_norm_reference(
    qkv: np.ndarray, q_weight: np.ndarray, k_weight: np.ndarray, n_heads: int, n_kv_heads: int
) -> np.ndarray:
    heads = qkv.astype(np.float64).reshape(len(qkv), n_heads + 2 * n_kv_heads, -1).copy()
    rstd = 1 / np.sqrt((heads * heads).mean(axis=2, keepdims=True) + EPSILON)
    k, v = slice(n_heads, n_heads + n_kv_heads), slice(n_heads + n_kv_heads, None)
    normed = heads * rstd
    normed[:, :n_heads] *= q_weight
    normed[:, k] *= k_weight
    normed[:, v] = heads[:, v]
    return normed.reshape(qkv.shape)


@pytest.mark.parametrize("is_cpu", [True, False], ids=["CPU's lanes", "GPU's lanes"])
@pytest.mark.parametrize(("rows", "in_use", "n_heads", "n_kv_heads", "head_size"), SHAPES)
def test_head_norm(
    device: Device, monkeypatch: pytest.MonkeyPatch, rows: int, in_use: int, n_heads: int,
    n_kv_heads: int, head_size: int, is_cpu: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(device, "is_cpu", is_cpu)  # both run on any device
    rng = np.random.default_rng(rows)
    width = (n_heads + 2 * n_kv_heads) * head_size
    qkv = rng.normal(size=(rows, width)).astype(np.float32)
    q_weight, k_weight = rng.normal(size=(2, head_size)).astype(np.float32)
    extent = extent_in_use(device, rows, in_use)
    out = marked(device, extent, width)
    program = Program(device)
    head_norm(
        program, activation(device, qkv, extent), device.upload(q_weight),
        device.upload(k_weight), EPSILON, n_heads=n_heads, n_kv_heads=n_kv_heads,
        head_size=head_size, out=out,
    )  # fmt: skip
    result = run_twice(program, out)
    expected = head_norm_reference(qkv, q_weight, k_weight, n_heads, n_kv_heads)
    # A sum of up to 256 squares in f32, in a tree, a root, two products.
    np.testing.assert_allclose(result[:in_use], expected[:in_use], rtol=2e-6, atol=1e-7)
    v = (n_heads + n_kv_heads) * head_size
    assert (result[:in_use, v:] == qkv[:in_use, v:]).all()
    assert (result[in_use:] == MARKER).all()


def test_weights_of_another_size_are_refused(device: Device) -> None:
    extent = device.extent(2)
    qkv = device.empty((2, 24), extent=extent)
    weight, short = device.empty((8,)), device.empty((4,))
    with pytest.raises(ValueError, match="head_norm k_weight has shape"):
        head_norm(
            Program(device), qkv, weight, short, EPSILON, n_heads=1, n_kv_heads=1, head_size=8
        )
