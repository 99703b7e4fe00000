"""A product in stretches whose last pass is the norm that follows: bit for bit the two kernels."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from lora.backward.matmul import matmul_backward
from lora.backward.rmsnorm import NormBefore, rmsnorm_backward
from lora.backward.swiglu import SwigluBefore
from lora.forward import rmsnorm as forward_rmsnorm
from lora.forward.matmul import matmul
from lora.forward.model.factors import LoraFactors
from lora.forward.model.norm import Norm
from lora.forward.model.weights import load_matrix
from lora.forward.plans.matmul_plans import Request, noting
from lora.forward.plans.matmul_tiles import TILES, Plan, PlanSpace, cut
from lora.forward.product import Product, ScaledColumns
from lora.forward.rmsnorm import (
    GPU_LANES,
    GPU_QUADS,
    MOST_PARTIAL_QUADS,
    NormAfter,
    Stretches,
    adds_up,
    rmsnorm,
)
from lora.forward.rope import RopeAfter
from lora.forward.swiglu import GateAfter
from lora.shaders.device import Device
from lora.shaders.program import Dispatch, Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor
from tests.support.half_tensors import needs_halves, typed, typed_marked
from tests.support.kernels import activation, extent_in_use, with_facts
from tests.support.quantized_tensors import random_blocks, tensor_of
from tests.support.stretches import same
from tests.support.tiny_models import TINY_MODELS
from tests.support.tiny_ours import gradients, open_session

Q4_1, Q8_0 = GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0
ROWS, IN_USE, N_OTHER, RANK = 67, 66, 224, 4
EPSILON = 1e-5
# Widths of fewer quads than lanes, of a broken last step, of whole steps; how many stretches; the
# types of what comes before and after the norm.
F32, F16 = "f32", "f16"
FORWARD = [
    (32, 2, "product", (F32, F32)), (32, 2, "norm", (F16, F16)), (32, 2, "none", (F16, F32)),
    (96, 3, "norm", (F32, F32)), (96, 3, "none", (F32, F16)), (96, 3, "product", (F16, F32)),
    (256, 7, "none", (F32, F32)), (256, 7, "product", (F16, F16)), (256, 7, "norm", (F32, F16)),
]  # fmt: skip
BACKWARD = [
    (32, 2, False, (F32, F32)), (32, 2, True, (F16, F16)), (96, 3, True, (F32, F32)),
    (96, 3, False, (F16, F32)), (256, 7, True, (F32, F16)), (256, 7, False, (F32, F32)),
    (256, 7, False, (F16, F16)),
]  # fmt: skip


@pytest.fixture
def tiled(recording: Recording) -> Recording:
    return replace(recording, body="tiled")


def cut_into(recording: Recording, splits: int) -> Recording:
    """Records every product in so many stretches."""
    tile = TILES[0]

    def plans(request: Request) -> Plan:
        return Plan(tile, *cut(request.constants["contraction"], splits, tile.depth))

    return replace(recording, plans=plans)


class Case:
    """A product of `width` columns in either direction, and the norm that it meets."""

    def __init__(self, recording: Recording, width: int, parts: int = 1) -> None:
        rng = np.random.default_rng(width)
        self.recording, self.width = recording, width
        self.extent = extent_in_use(recording, ROWS, IN_USE)

        def rows_of(columns: int) -> Tensor:
            values = rng.normal(size=(ROWS, columns)).astype(np.float32)
            return activation(recording, values, self.extent)

        def frozen(*shape: int) -> Tensor:
            return recording.memory.upload(rng.normal(size=shape).astype(np.float32))

        self.x, self.z, self.past, self.norm_input = (
            rows_of(columns) for columns in (N_OTHER, RANK, width, width)
        )
        self.weight, self.bias = frozen(width), frozen(width)
        # Two types of quantization make two parts.
        kinds = (Q4_1, Q8_0)[:parts]
        self.matrix, self.transposed = (
            load_matrix(
                recording, [tensor_of(k, random_blocks(k, n_out, n_in), n_in) for k in kinds]
            )
            for n_out, n_in in ((width // parts, N_OTHER), (N_OTHER // parts, width))
        )
        self.lora = LoraFactors(frozen(RANK, N_OTHER), frozen(16, RANK), RANK, 1.5, ((8, 24),))
        self.lora_backward = LoraFactors(
            frozen(RANK, width), frozen(16, RANK), RANK, 1.5, ((8, 24),)
        )

    def forward(
        self,
        types: tuple[str, str],
        *,
        apart: bool,
        past_of: str = "none",
        softcap: float | None = None,
        biased: bool = False,
        scaled: bool = False,
    ) -> tuple[list[str], list[np.ndarray]]:
        """The kernels of a product and its norm, and what they write.

        Args:
            types: of the product and of its norm.
            apart: whether they are asked for one after the other.
            past_of: what the residual is added to: "product", "norm" or "none".
        """
        product, normed = (typed_marked(self.recording, t, self.extent, self.width) for t in types)
        program = Program(self.recording)
        kept = typed_marked(self.recording, types[1], self.extent, self.width)
        past = self.past if past_of == "norm" else None
        norm = NormAfter(Norm(self.weight, EPSILON), normed, residual=past)
        matmul(
            program,
            Product(
                self.x,
                self.matrix,
                lora=self.lora,
                z=self.z,
                softcap=softcap,
                bias=self.bias if biased else None,
                residual=self.past if past_of == "product" else None,
                scaled=ScaledColumns(self.bias, kept) if scaled else None,
            ),
            out=product,
            then=None if apart else norm,
        )
        if apart:
            rmsnorm(program, product, Norm(self.weight, EPSILON), residual=past, out=normed)
        return run(program, [product, normed, *([kept] if scaled else [])])

    def backward(
        self, types: tuple[str, str], *, apart: bool, in_place: bool = False
    ) -> tuple[list[str], list[np.ndarray]]:
        """The kernels of a gradient through a product and its norm, and the gradient below."""
        d_y = typed_marked(self.recording, types[0], self.extent, self.width)
        d_x = typed(self.recording, self.recording.memory.read(self.past), types[1], self.extent)
        program = Program(self.recording)
        residual = d_x if in_place else None
        norm = NormBefore(self.norm_input, Norm(self.weight, EPSILON), d_x, residual=residual)
        matmul_backward(
            program, self.x, self.transposed, lora=self.lora_backward, d_z=self.z, out=d_y,
            before=None if apart else norm,
        )  # fmt: skip
        if apart:
            rmsnorm_backward(
                program,
                self.norm_input,
                Norm(self.weight, EPSILON),
                d_y,
                residual=residual,
                out=d_x,
            )
        return run(program, [d_x])


def run(program: Program, outputs: list[Tensor]) -> tuple[list[str], list[np.ndarray]]:
    """Runs a program once: its kernels, and the outputs."""
    recording = program.recording
    before = [recording.memory.read(tensor) for tensor in outputs]
    program.run()
    after = [recording.memory.read(tensor) for tensor in outputs]
    for start, end in zip(before, after, strict=True):
        assert np.isfinite(end).all() and len(np.unique(end)) > 100
        assert (start[IN_USE:] == end[IN_USE:]).all()  # rows that are not in use
    kernels = [c.template for c in program.commands if isinstance(c, Dispatch)]
    return kernels, after


@pytest.mark.parametrize(("width", "splits", "past_of", "types"), FORWARD)
def test_the_norm_adds_stretches_up(
    tiled: Recording, width: int, splits: int, past_of: str, types: tuple[str, str]
) -> None:
    if "f16" in types:
        needs_halves(tiled.facts)
    tiled = cut_into(tiled, splits)
    case = Case(tiled, width)
    kernels, wanted = case.forward(types, past_of=past_of, apart=True)
    assert kernels == ["matmul_tiled", "matmul_reduce", "rmsnorm"]
    kernels, found = case.forward(types, past_of=past_of, apart=False)
    assert kernels == ["matmul_tiled", "rmsnorm"]
    assert same(tiled, types, found, wanted)


@pytest.mark.parametrize(("width", "splits", "past_of", "types"), FORWARD)
def test_the_norm_scales_columns_of_stretches(
    tiled: Recording, width: int, splits: int, past_of: str, types: tuple[str, str]
) -> None:
    if "f16" in types:
        needs_halves(tiled.facts)
    case = Case(cut_into(tiled, splits), width)
    _, plain = case.forward(types, past_of=past_of, apart=True)
    kernels, wanted = case.forward(types, past_of=past_of, apart=True, scaled=True)
    assert kernels == ["matmul_tiled", "matmul_reduce", "rmsnorm"]
    kernels, found = case.forward(types, past_of=past_of, apart=False, scaled=True)
    assert kernels == ["matmul_tiled", "rmsnorm"]
    assert same(tiled, (*types, types[1]), found, wanted)
    assert not np.array_equal(plain[0], found[0])


def test_columns_that_are_scaled_in_a_pass_of_their_own_count_for_the_plan(
    tiled: Recording,
) -> None:
    """Where what follows does not scale them stretches cost a dispatch more."""
    requests: list[Request] = []
    case = Case(replace(tiled, plans=noting(requests)), 64)
    for apart, scaled in ((False, False), (False, True), (True, True)):
        case.forward(("f32", "f32"), past_of="none", apart=apart, scaled=scaled)
    epilogues = [request.product.epilogue for request in requests]
    assert epilogues == ["write", "write", "write scaled"]


@pytest.mark.parametrize(("width", "splits", "in_place", "types"), BACKWARD)
def test_the_norms_backward_adds_stretches_up(
    tiled: Recording, width: int, splits: int, in_place: bool, types: tuple[str, str]
) -> None:
    if "f16" in types:
        needs_halves(tiled.facts)
    tiled = cut_into(tiled, splits)
    case = Case(tiled, width)
    kernels, wanted = case.backward(types, in_place=in_place, apart=True)
    assert kernels == ["matmul_tiled", "matmul_reduce", "rmsnorm_backward"]
    kernels, found = case.backward(types, in_place=in_place, apart=False)
    assert kernels == ["matmul_tiled", "rmsnorm_backward"]
    assert same(tiled, types, found, wanted)


def test_with_the_lanes_of_a_gpu(tiled: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the last step of a row is broken."""
    monkeypatch.setattr(forward_rmsnorm, "CPU_LANES", GPU_LANES)
    monkeypatch.setattr(forward_rmsnorm, "CPU_QUADS", GPU_QUADS)
    tiled = cut_into(tiled, 4)
    case, types = Case(tiled, 288), ("f32", "f32")
    kernels, found = case.forward(types, past_of="product", apart=False)
    assert kernels == ["matmul_tiled", "rmsnorm"]
    assert same(tiled, types, found, case.forward(types, past_of="product", apart=True)[1])
    kernels, found = case.backward(types, in_place=True, apart=False)
    assert kernels == ["matmul_tiled", "rmsnorm_backward"]
    assert same(tiled, types, found, case.backward(types, in_place=True, apart=True)[1])


@pytest.mark.parametrize("why", ["one pass", "two parts", "bias", "softcap", "wide row", "wide"])
def test_otherwise_the_norm_has_a_dispatch_of_its_own(
    tiled: Recording, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    tiled = cut_into(tiled, 1 if why == "one pass" else 2)
    if why == "wide":
        tiled = replace(tiled, body="wide")
    case, types = Case(tiled, 64, parts=2 if why == "two parts" else 1), ("f32", "f32")
    if why == "wide row":
        monkeypatch.setattr(forward_rmsnorm, "MOST_PARTIAL_QUADS", 1)
    options = {"biased": why == "bias", "softcap": 5.0 if why == "softcap" else None}
    kernels, wanted = case.forward(types, past_of="product", apart=True, **options)
    again, found = case.forward(types, past_of="product", apart=False, **options)
    assert again == kernels and same(tiled, types, found, wanted)
    if why not in ("bias", "softcap"):  # of which a gradient's product has none
        kernels, wanted = case.backward(types, in_place=True, apart=True)
        again, found = case.backward(types, in_place=True, apart=False)
        assert again == kernels and same(tiled, types, found, wanted)


def test_a_row_that_fits_no_registers(recording: Recording) -> None:
    recording = with_facts(recording, is_cpu=False)
    for width in (576, 4096):  # 3 and 4 quads a lane
        assert adds_up(recording, width, 8)
    assert not adds_up(recording, 4096, 9) and not adds_up(recording, 16384, 4)  # 16 quads a lane
    assert adds_up(recording, 4, MOST_PARTIAL_QUADS) and not adds_up(
        recording, 4, MOST_PARTIAL_QUADS + 1
    )


def test_stretches_that_do_not_fit_are_refused(recording: Recording) -> None:
    extent = recording.memory.extent(2)
    x, weight, partial = (
        recording.memory.empty(shape, extent=extent) for shape in ((2, 8), (8,), (3, 8))
    )
    with pytest.raises(ValueError, match="rmsnorm stretches has shape"):
        rmsnorm(Program(recording), x, Norm(weight, EPSILON), stretches=Stretches(partial, 2))
    whole = recording.memory.empty((4, 8))
    with pytest.raises(ValueError, match="no residual of its own"):
        rmsnorm_backward(
            Program(recording),
            x,
            Norm(weight, EPSILON),
            x,
            stretches=Stretches(whole, 2, residual=x),
        )


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(("name", "precision"), [("llama_q8_0", "f32"), ("gemma2", "f16")])
def test_a_step_is_the_same(
    name: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients do not tell whether what follows a product adds its stretches up."""

    def opened(wanted: str | int, webgpu: str) -> Device:
        device = Device(wanted, webgpu=webgpu)
        device.facts = replace(device.facts, is_cpu=False)
        if precision == "f16":
            needs_halves(device.facts)
        return device

    def in_two(space: PlanSpace) -> Plan:
        plain = [tile for tile in space.tiles if tile.body == "tiled"]
        tile = (plain or space.tiles)[1]  # a gradient in blocks is read on matrix units alone
        return Plan(tile, *cut(space.contraction, 2, tile.depth))

    monkeypatch.setattr("lora.training.session.Device", opened)
    monkeypatch.setattr("lora.forward.plans.matmul_plans.choose_plan", in_two)
    model = TINY_MODELS[name]
    model.write_gguf(tmp_path / "model.gguf")
    model.write_adapter(tmp_path / "adapter")
    found, labels = [], []
    for most in (0, MOST_PARTIAL_QUADS):
        monkeypatch.setattr(forward_rmsnorm, "MOST_PARTIAL_QUADS", most)
        for kind in (GateAfter, RopeAfter, SwigluBefore):
            monkeypatch.setattr(kind, "adds_up", lambda *_, adds=most > 0: adds)
        session = open_session(
            model, tmp_path / "model.gguf", tmp_path / "adapter", precision=precision, tuning="off"
        )  # plans that were found on a GPU would come before choose_plan's
        found.append(gradients(session))
        last = f"layers.{session.model.architecture.n_layers - 1}."
        commands = [c for c in session._programs.training.micro_batch.commands if last in c.label]
        labels.append(Counter(c.label.rsplit(".", 1)[1] for c in commands))
    # After attention and, with post norms, after the feed-forward; backward below both.
    forwards = 2 if name == "gemma2" else 1
    once = Counter(rmsnorm=forwards, rmsnorm_backward=2, swiglu=1, swiglu_backward=1, rope=1)
    assert labels[1] - labels[0] == Counter({f"reduce_{name}": n for name, n in once.items()})
    assert labels[0] - labels[1] == once + Counter(reduce=once.total())
    recording, types = session._recording, (precision, "f32")
    losses = [[np.array([f.loss], np.float32)] for f in found]
    assert same(recording, types, *losses)
    for path, gradient in found[0].gradients.items():
        other = [found[1].gradients[path]]  # on its way through some ten rounded activations
        assert gradient.any() and same(recording, types, [gradient], other, roundings=10), path
