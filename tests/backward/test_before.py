"""What lies before a product writes its source again, to the forward's bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lora.backward.before import SourceBefore
from lora.backward.causal_conv import ConvolutionBefore, causal_conv_backward
from lora.backward.head_gate import HeadGateBefore
from lora.backward.per_layer import PerLayerGateBefore
from lora.backward.rmsnorm import NormBefore
from lora.backward.swiglu import SwigluBefore
from lora.forward.causal_conv import Convolution
from lora.forward.model.layer_spec import (
    HEAD_NORM,
    Attention,
    GatedFeedForward,
    LayerSpec,
    PerLayerInput,
)
from lora.forward.model.norm import Norm
from lora.forward.model.recurrent_spec import GatedDeltaNet, ShortConvolution
from lora.forward.model.rope_frequencies import Rope
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor
from tests.support.half_tensors import needs_halves, rounded, typed, typed_marked
from tests.support.kernels import MARKER, extent_in_use, with_facts
from tests.support.layer_models import Pass

ROWS, IN_USE, WIDTH = 19, 17, 36
BOUNDS = np.repeat([[0, 5], [5, 17], [17, 19]], [5, 12, 2], axis=0).astype(np.uint32)


class Case:
    """One kernel with its tensors.

    Attributes:
        before: what lies before a product of `WIDTH` columns.
        gradient: where its gradient goes.
    """

    def __init__(self, recording: Recording, extent: Extent, dtype: str, kind: str) -> None:
        rng = np.random.default_rng(3)

        def given(columns: int, of: str = dtype) -> Tensor:
            values = rounded(2 * rng.normal(size=(ROWS, columns)).astype(np.float32), of)
            return typed(recording, values, of, extent)

        def out(columns: int, of: str = dtype) -> Tensor:
            return typed_marked(recording, of, extent, columns)

        def weight(*shape: int) -> Tensor:
            return recording.memory.upload(rng.normal(size=shape).astype(np.float32))

        self.before: SourceBefore
        if kind.startswith("norm"):
            stream, norm = given(WIDTH, "f32"), Norm(weight(WIDTH), 1e-5)
            self.gradient = given(WIDTH, "f32")
            past = {"norm": None, "norm in place": self.gradient}.get(kind, stream)
            self.before = NormBefore(stream, norm, self.gradient, past)
        elif kind in ("silu", "gelu_tanh"):
            self.gradient = given(2 * WIDTH)
            self.before = SwigluBefore(self.gradient, kind)
        elif kind == "head gate":
            self.gradient = out(2 * WIDTH + 8)
            self.before = HeadGateBefore(given(2 * WIDTH + 8), given(WIDTH), 12, self.gradient)
        elif kind == "convolution":
            bounds, self.gradient = recording.memory.upload(BOUNDS), out(3 * WIDTH)
            convolution = Convolution(weight(3, WIDTH), gated=True)
            self.before = ConvolutionBefore(given(3 * WIDTH), convolution, bounds, self.gradient)
        else:
            self.gradient = given(WIDTH)
            self.before = PerLayerGateBefore(self.gradient, given(3 * WIDTH), WIDTH, "gelu_tanh")
        self.d_source = given(WIDTH)


KINDS = (
    "norm", "norm in place", "norm apart", "silu", "gelu_tanh", "head gate", "convolution",
    "own input",
)  # fmt: skip


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_source_again(recording: Recording, kind: str, dtype: str) -> None:
    if dtype == "f16":
        needs_halves(recording.facts)
    extent = extent_in_use(recording, ROWS, IN_USE)
    forward, again = (typed_marked(recording, dtype, extent, WIDTH) for _ in range(2))
    gradients = []
    for source in (None, again):
        case = Case(recording, extent, dtype, kind)
        program = Program(recording)
        case.before.repeat(program, forward)
        replace(case.before, again=source).record(program, case.d_source)
        program.run()
        gradients.append(recording.memory.read(case.gradient).tobytes())
    found, expected = recording.memory.read(again), recording.memory.read(forward)
    assert found.tobytes() == expected.tobytes()
    assert (found[IN_USE:] == MARKER).all() and (found[:IN_USE] != MARKER).all()
    assert gradients[0] == gradients[1]


@pytest.mark.parametrize("kind", ["norm in place", "silu"])
def test_the_source_again_by_lanes_of_gpus(recording: Recording, kind: str) -> None:
    test_the_source_again(with_facts(recording, is_cpu=not recording.facts.is_cpu), kind, "f32")


@pytest.mark.parametrize("kind", KINDS)
def test_a_place_of_another_shape_is_refused(recording: Recording, kind: str) -> None:
    extent = extent_in_use(recording, ROWS, IN_USE)
    case = Case(recording, extent, "f32", kind)
    other = typed_marked(recording, "f32", extent, WIDTH + 4)
    with pytest.raises(ValueError, match=rf"{WIDTH + 4}"):
        replace(case.before, again=other).record(Program(recording), case.d_source)


def test_other_convolutions_do_not_write_it_again(recording: Recording) -> None:
    extent = extent_in_use(recording, ROWS, IN_USE)
    x, d_y, d_x, y = (typed_marked(recording, "f32", extent, WIDTH) for _ in range(4))
    convolution = Convolution(recording.memory.upload(np.ones((3, WIDTH), np.float32)), gated=False)
    bounds = recording.memory.upload(BOUNDS)
    with pytest.raises(ValueError, match="of gated convolutions only"):
        causal_conv_backward(Program(recording), x, convolution, bounds, d_y, d_x, y=y)


# -- layers -----------------------------------------------------------------------------------

_ATTENTION = Attention(
    n_heads=4, n_kv_heads=2, head_size=16, rope=Rope(1e4, 16, interleaved=False), window=None,
    scale=0.25, softcap=None, qk_norm=HEAD_NORM, fused_modules=False, permuted=False,
    output_gate=True,
)  # fmt: skip
_SPEC = LayerSpec(
    mixer=_ATTENTION, feed_forward=GatedFeedForward(96, "silu", fused_modules=False),
    hidden_size=32, norm_epsilon=1e-5, post_norms=False, biases=frozenset(),
)  # fmt: skip
_DELTA_NET = GatedDeltaNet(key_heads=2, value_heads=4, head_size=8, taps=4)
_OWN = PerLayerInput(16, 0, "gelu_tanh")


def _gradients(recording: Recording, spec: LayerSpec, **how: Any) -> tuple[bytes, bytes, int]:
    """Of the factors and of the layer's input, and how many dispatches the backward has."""
    one, rng = Pass.record(recording, spec, **how), np.random.default_rng(1)
    rows = one.x.shape[0]
    starts, ends = np.repeat([[0, 5], [5, rows]], [5, rows - 5], axis=0).T
    places = np.arange(rows), starts, ends, np.zeros(rows, int)
    one.inputs.write(recording.memory, np.zeros(rows, int), *places)
    written = [one.parameters, one.x, one.d_x, *([] if one.own is None else [one.own])]
    for tensor in written:
        values = rng.normal(0, 0.5, tensor.shape).astype(np.float32)
        recording.memory.write(tensor, values)
    one.forward.run()
    assert bool(one.shared) == how.get("shares", False)
    for tensor in one.shared:
        recording.memory.write(tensor, np.full(tensor.shape, np.nan, np.float32))
    one.backward.run()
    found = [recording.memory.read(tensor) for tensor in (one.gradients, one.d_x)]
    assert all(np.isfinite(values).all() and values.any() for values in found)
    return found[0].tobytes(), found[1].tobytes(), len(one.backward.dispatches)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    "spec",
    [
        _SPEC,
        replace(_SPEC, mixer=ShortConvolution(32, 3), per_layer=_OWN),
        replace(_SPEC, mixer=_DELTA_NET, post_norms=True),
    ],
    ids=["attention", "short convolution, own input", "delta net"],
)
def test_a_layer_whose_sources_others_overwrote(recording: Recording, spec: LayerSpec) -> None:
    """The same bits, and no dispatch more: the mixer's, the feed-forward's, and the norms'."""
    assert _gradients(recording, spec) == _gradients(recording, spec, shares=True)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("targets", "more"),
    [((), 1), (("down_proj",), 1), (("o_proj", "down_proj"), 1), (("q_proj", "up_proj"), 1)],
)
def test_the_lowest_layer(recording: Recording, targets: tuple[str, ...], more: int) -> None:
    """Where no gradient passes below the last product, one dispatch writes its source."""
    kept = _gradients(recording, _SPEC, targets=targets, lowest=True)
    again = _gradients(recording, _SPEC, targets=targets, lowest=True, shares=True)
    assert kept[:2] == again[:2] and again[2] - kept[2] == more
