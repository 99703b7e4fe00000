"""How A and B lie in the flat arrays, and the way to PEFT's modules and back."""

import numpy as np
import pytest

from lora.forward.model.adapter import AdapterLayout
from lora.forward.model.architecture import Architecture
from lora.forward.model.row_order import permute_rows_to_hf
from lora.shaders.errors import InputError
from lora.shaders.recording import Recording
from tests.support.architectures import LLAMA, PHI3
from tests.support.kernels import with_facts

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("rank", [1, 3, 4, 8])
@pytest.mark.parametrize(
    ("architecture", "targets"),
    [
        (LLAMA, ALL),
        (LLAMA, ("q_proj", "v_proj")),
        (LLAMA, ("up_proj",)),
        (LLAMA, ("lm_head",)),
        (LLAMA, (*ALL, "lm_head")),
        (LLAMA, ("up_proj", "embed_tokens")),
        (PHI3, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    ],
)
def test_round_trip(rank: int, architecture: Architecture, targets: tuple[str, ...]) -> None:
    layout = AdapterLayout(architecture, [0, 2], targets, rank, 2.0)
    rng = np.random.default_rng(0)
    modules = {
        path: (rng.normal(size=a.shape).astype(np.float32), rng.normal(size=b.shape).astype("f4"))
        for path, (a, b) in layout.to_modules(np.zeros(layout.size, np.float32)).items()
    }
    head = bool({"lm_head", "embed_tokens"} & set(targets))  # in no layer
    assert len(modules) == 2 * (len(targets) - head) + head
    flat = layout.from_modules(modules)
    back = layout.to_modules(flat)
    for path, (a, b) in modules.items():
        assert a.shape[0] == b.shape[1] == rank
        assert (back[path][0] == a).all() and (back[path][1] == b).all()
    n = sum(a.size + b.size for a, b in modules.values())
    assert layout.n_trainable == n == np.count_nonzero(flat)  # padding is zero


def test_q_and_k_are_permuted_and_no_other() -> None:
    layout = AdapterLayout(LLAMA, [0], ALL, 4, 1.0)
    flat = np.random.default_rng(1).normal(size=layout.size).astype(np.float32)
    modules = layout.to_modules(flat)
    for path, _, a, b in layout._views(flat):
        found_a, found_b = modules[path]
        heads = {"q_proj": 4, "k_proj": 2}.get(path.rpartition(".")[2])
        assert (found_a == a).all()
        assert (found_b == (b if heads is None else permute_rows_to_hf(b, heads))).all()


def test_views_are_aligned_and_apart(recording: Recording) -> None:
    layout = AdapterLayout(LLAMA, [0, 1, 2], (*ALL, "lm_head"), 3, 1.0)
    flat = recording.memory.empty((layout.size,))
    taken = []
    for factors in layout.factors(flat).values():
        for tensor in (factors.a, factors.b):
            assert tensor.offset % 256 == 0
            taken.append((tensor.offset, tensor.offset + tensor.n_bytes))
    taken.sort()
    assert all(end <= start for (_, end), (start, _) in zip(taken, taken[1:], strict=False))
    assert taken[-1][1] <= flat.n_bytes


def test_initial_values() -> None:
    layout = AdapterLayout(LLAMA, [1], ALL, 3, 1.0)
    flat = layout.initial(7)
    assert flat.tobytes() == layout.initial(7).tobytes() != layout.initial(8).tobytes()
    for a, b in layout.to_modules(flat).values():
        bound = 1 / np.sqrt(a.shape[1])
        assert (b == 0).all() and 0.8 * bound < abs(a).max() <= bound


def test_the_head() -> None:
    """Its layer is the one after the last, its rows are padded to whole vec4 (322 → 324)."""
    layout = AdapterLayout(LLAMA, [0, 1, 2], ("lm_head",), 4, 1.0)
    assert layout.layers == [] and layout.lowest_layer == 3
    (group,) = layout.groups
    assert (group.layer, group.group, group.ranges) == (3, "head", ((0, 324),))
    ((path, (a, b)),) = layout.to_modules(np.zeros(layout.size, np.float32)).items()
    assert (path, a.shape, b.shape) == ("lm_head", (4, 32), (322, 4))
    assert layout.n_trainable == 4 * (32 + 322)


def test_the_embedding(recording: Recording) -> None:
    """Before all groups, rows of A padded to whole quads (322 → 324)."""
    layout = AdapterLayout(LLAMA, [1], ("q_proj", "embed_tokens"), 3, 2.0)
    path = "model.embed_tokens"
    modules = layout.to_modules(layout.initial(0))
    a, b = modules[path]
    assert (a.shape, b.shape) == ((3, 322), (32, 3)) and not a.any() and b.all()
    assert layout.lowest_layer == 0 and layout.low_ranks()[path].scale == 2.0
    assert layout.groups[0].a_start > 0 and not layout.b_blocks()[0]
    found = layout.factors(recording.memory.empty_flat(layout.size, purpose="adapter")).embedding
    assert found is not None and (found.a.shape, found.b.shape) == ((324, 4), (4, 32))
    small = with_facts(recording, max_binding=4 * 324 * 4)
    layout.check_bindings(small.facts)
    wide = AdapterLayout(LLAMA, [1], ("embed_tokens",), 5, 2.0)
    with pytest.raises(InputError, match=r"A of embed_tokens would .* rank for it here is 4\."):
        wide.check_bindings(small.facts)


def test_factors_of_another_shape_are_refused() -> None:
    layout = AdapterLayout(LLAMA, [0], ("v_proj",), 4, 1.0)
    modules = layout.to_modules(np.zeros(layout.size, np.float32))
    path = "model.layers.0.self_attn.v_proj"
    modules[path] = (modules[path][0], np.zeros((1, 4), np.float32))  # would broadcast in silence
    with pytest.raises(ValueError, match=r"v_proj has A \(4, 32\) and B \(1, 4\), expected"):
        layout.from_modules(modules)


def test_factors_larger_than_a_binding(recording: Recording) -> None:
    """The head's 324 rows of B and A's 32 columns: 356 numbers a rank."""
    recording = with_facts(recording, max_binding=4 * 356 * 12 + 256)
    AdapterLayout(LLAMA, [0], (*ALL, "lm_head"), 12, 1.0).check_bindings(recording.facts)
    layout = AdapterLayout(LLAMA, [0], (*ALL, "lm_head"), 13, 1.0)
    with pytest.raises(InputError, match=r"of lm_head would .* highest rank for them here is 12\."):
        layout.check_bindings(recording.facts)
