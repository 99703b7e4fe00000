"""How A and B lie in the flat arrays, and the way to PEFT's modules and back."""

import numpy as np
import pytest

from forward.adapter import AdapterLayout
from forward.architecture import Architecture, permute_rows_to_hf
from shaders.device import Device

ARCHITECTURE = Architecture(
    name="llama", n_layers=3, hidden_size=32, intermediate_size=64, n_heads=4, n_kv_heads=2,
    head_size=8, vocab_size=320, context_length=128, norm_epsilon=1e-5, rope_base=10000.0,
    rope_dimensions=8, rope_interleaved=True, tied_head=True,
)  # fmt: skip
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("rank", [1, 3, 4, 8])
@pytest.mark.parametrize("targets", [ALL, ("q_proj", "v_proj"), ("up_proj",)])
def test_round_trip(rank: int, targets: tuple[str, ...]) -> None:
    layout = AdapterLayout(ARCHITECTURE, [0, 2], targets, rank, 2.0)
    rng = np.random.default_rng(0)
    modules = {
        path: (rng.normal(size=a.shape).astype(np.float32), rng.normal(size=b.shape).astype("f4"))
        for path, (a, b) in layout.to_modules(np.zeros(layout.size, np.float32)).items()
    }
    assert len(modules) == 2 * len(targets)
    flat = layout.from_modules(modules)
    back = layout.to_modules(flat)
    for path, (a, b) in modules.items():
        assert a.shape[0] == b.shape[1] == rank
        assert (back[path][0] == a).all() and (back[path][1] == b).all()
    n = sum(a.size + b.size for a, b in modules.values())
    assert layout.n_trainable == n == np.count_nonzero(flat)  # padding is zero


def test_q_and_k_are_permuted_and_no_other() -> None:
    layout = AdapterLayout(ARCHITECTURE, [0], ALL, 4, 1.0)
    flat = np.random.default_rng(1).normal(size=layout.size).astype(np.float32)
    modules = layout.to_modules(flat)
    for module, _, a, b in layout._views(flat):
        found_a, found_b = next(m for path, m in modules.items() if path.endswith(module))
        heads = {"q_proj": 4, "k_proj": 2}.get(module)
        assert (found_a == a).all()
        assert (found_b == (b if heads is None else permute_rows_to_hf(b, heads))).all()


def test_views_are_aligned_and_apart(device: Device) -> None:
    layout = AdapterLayout(ARCHITECTURE, [0, 1, 2], ALL, 3, 1.0)
    flat = device.empty((layout.size,))
    taken = []
    for factors in layout.factors(flat).values():
        for tensor in (factors.a, factors.b):
            assert tensor.offset % 256 == 0
            taken.append((tensor.offset, tensor.offset + tensor.n_bytes))
    taken.sort()
    assert all(end <= start for (_, end), (start, _) in zip(taken, taken[1:], strict=False))
    assert taken[-1][1] <= flat.n_bytes


def test_initial_values() -> None:
    layout = AdapterLayout(ARCHITECTURE, [1], ALL, 3, 1.0)
    flat = layout.initial(7)
    assert flat.tobytes() == layout.initial(7).tobytes() != layout.initial(8).tobytes()
    for a, b in layout.to_modules(flat).values():
        bound = 1 / np.sqrt(a.shape[1])
        assert (b == 0).all() and 0.8 * bound < abs(a).max() <= bound
