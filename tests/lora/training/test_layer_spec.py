"""No way through a layer may leave a field of its LayerSpec unread."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from lora.backward.blocks import BLOCKS_BACKWARD
from lora.forward.decoder.blocks import BLOCKS
from lora.forward.model.architecture import Architecture
from lora.forward.model.layer_spec import (
    HEAD_NORM,
    LATE_NORM,
    NO_NORM,
    WIDTH_NORM,
    Attention,
    GatedFeedForward,
    LayerSpec,
    PerLayerInput,
)
from lora.forward.model.recurrent_spec import GatedDeltaNet, ShortConvolution
from lora.forward.model.rope_frequencies import Rope, Temperature
from lora.shaders.memory import CountingMemory
from lora.shaders.program import Dispatch
from lora.shaders.recording import Recording
from tests.support.layer_models import paths_of

SPEC = LayerSpec(
    mixer=Attention(
        n_heads=4, n_kv_heads=2, head_size=16, rope=Rope(1e4, 16, interleaved=False), window=5,
        scale=0.25, softcap=30.0, qk_norm=HEAD_NORM, fused_modules=False, permuted=False,
    ),
    feed_forward=GatedFeedForward(96, "silu", fused_modules=False),
    hidden_size=32, norm_epsilon=1e-5, post_norms=True, biases=frozenset(("attn_q",)),
)  # fmt: skip

# Another value of every field.
CHANGED: dict[str, dict[str, Any]] = {
    "mixer": {
        "n_heads": 8, "n_kv_heads": 1, "head_size": 32, "rope": Rope(1e4, 8, interleaved=True),
        "window": None, "scale": 0.5, "softcap": None, "qk_norm": NO_NORM,
        "fused_modules": True, "permuted": True, "fused_tensor": True, "lfm2_names": True,
        "output_gate": True,
    },
    "feed_forward": {
        "intermediate_size": 64, "activation": "gelu_tanh", "fused_modules": True,
        "lfm2_names": True,
    },
    "": {
        "hidden_size": 48, "norm_epsilon": 1e-6, "post_norms": False, "biases": frozenset(),
        "pre_norms": False, "feed_forward_norm": "other_norm", "output_scale": True,
        "per_layer": PerLayerInput(16, 1, "gelu_tanh"),
    },
}  # fmt: skip
# How the file lies, not how the layer computes: read where files are (the second test).
OF_FILES = {"fused_modules", "permuted", "fused_tensor", "feed_forward_norm", "lfm2_names"}
# What other fields must allow; see the tests below, and the tiny models of Gemma 4.
ONLY_TOGETHER = {"temperature", "value_norm", "keys_are_values", "keys_of"}
# A bias is added by the forward alone: its gradient passes on as it is.
UNSEEN = {("backward", "biases")}


def changed(part: str, name: str) -> LayerSpec:
    value = {name: CHANGED[part][name]}
    if not part:
        return replace(SPEC, **value)
    return replace(SPEC, **{part: replace(getattr(SPEC, part), **value)})


def test_every_field_has_another_value() -> None:
    for part, values in CHANGED.items():
        of = getattr(SPEC, part) if part else SPEC
        names = {field.name for field in fields(of)} - {"mixer", "feed_forward", *ONLY_TOGETHER}
        assert set(values) == names
        assert all(getattr(of, name) != value for name, value in values.items())


def test_every_kind_has_its_rows() -> None:
    kinds = {Attention, GatedFeedForward, PerLayerInput, ShortConvolution, GatedDeltaNet}
    assert set(BLOCKS) == set(BLOCKS_BACKWARD) == kinds


def recorded_by(recording: Recording, path: str, spec: LayerSpec) -> list[Any]:
    """What a way through a layer records."""
    facts = recording.facts
    program = paths_of()[path](Recording(facts, CountingMemory(facts)), spec)
    return [
        (c.template, c.constants, c.workgroups, [(t.shape, t.dtype) for t in c.tensors])
        for c in program.commands
        if isinstance(c, Dispatch)
    ]


@pytest.mark.parametrize("path", paths_of())
def test_what_is_recorded_follows_every_norm_and_a_temperature(
    recording: Recording, path: str
) -> None:
    """Of q and k; queries that are normed have no temperature."""
    kinds = [
        recorded_by(recording, path, replace(SPEC, mixer=replace(SPEC.mixer, **values)))
        for values in (
            {"qk_norm": NO_NORM}, {"qk_norm": HEAD_NORM}, {"qk_norm": LATE_NORM},
            {"qk_norm": WIDTH_NORM}, {"qk_norm": NO_NORM, "temperature": Temperature(0.1, 8)},
            {"value_norm": True}, {"value_norm": True, "keys_are_values": True},
        )
    ]  # fmt: skip
    assert all(a != b for i, a in enumerate(kinds) for b in kinds[:i])


@pytest.mark.parametrize("path", paths_of())
@pytest.mark.parametrize("other", [{"size": 32}, {"activation": "silu"}])
def test_what_is_recorded_follows_a_layer_s_own_input(
    recording: Recording, path: str, other: dict[str, Any]
) -> None:
    own = PerLayerInput(16, 1, "gelu_tanh")
    both = [replace(SPEC, per_layer=one) for one in (own, replace(own, **other))]
    assert recorded_by(recording, path, both[0]) != recorded_by(recording, path, both[1])


@pytest.mark.parametrize("path", paths_of())
def test_what_is_recorded_follows_a_short_convolution(recording: Recording, path: str) -> None:
    of_path = [
        recorded_by(recording, path, replace(SPEC, mixer=ShortConvolution(32, taps)))
        for taps in (3, 4)
    ]
    assert of_path[0] != of_path[1]


@pytest.mark.parametrize("path", paths_of())
@pytest.mark.parametrize(
    "changed", [{"key_heads": 4}, {"value_heads": 8}, {"head_size": 16}, {"taps": 3}], ids=str
)
def test_what_is_recorded_follows_a_delta_net(
    recording: Recording, path: str, changed: dict[str, int]
) -> None:
    delta_net = GatedDeltaNet(key_heads=2, value_heads=4, head_size=8, taps=4)
    both = [replace(SPEC, mixer=one) for one in (delta_net, replace(delta_net, **changed))]
    assert recorded_by(recording, path, both[0]) != recorded_by(recording, path, both[1])


@pytest.mark.parametrize("path", paths_of())
@pytest.mark.parametrize(
    ("part", "name"),
    [(part, name) for part, values in CHANGED.items() for name in values if name not in OF_FILES],
)
def test_what_is_recorded_follows_every_field(
    recording: Recording, path: str, part: str, name: str
) -> None:
    """Another value gives other dispatches: other constants, shapes, grids or kernels."""
    follows = recorded_by(recording, path, changed(part, name)) != recorded_by(
        recording, path, SPEC
    )
    assert follows or (path, name) in UNSEEN


@pytest.mark.parametrize(
    ("part", "name"),
    [(part, name) for part, values in CHANGED.items() for name in values
     if name in OF_FILES | {"biases"}],
)  # fmt: skip
def test_what_is_loaded_and_written_follows_every_field_of_files(part: str, name: str) -> None:
    def seen(spec: LayerSpec) -> Any:
        a = Architecture("test", (spec,), 32, 64, 128, 1e-5, True, None, 1.0)
        rows = [m.permuted_heads(spec) for members in spec.groups.values() for m in members]
        return a.tensor_shapes(), a.matrices, rows, {g: a.tensors_of(0, g) for g in spec.groups}

    assert seen(changed(part, name)) != seen(SPEC)
