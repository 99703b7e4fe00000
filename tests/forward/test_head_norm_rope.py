"""The norm of query and key heads and their rotation against float64 numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from lora.checks.references.head_norm_rope import HeadLayout, head_norm_rope_reference
from lora.forward.head_norm_rope import head_norm_rope
from lora.forward.model.rope_frequencies import Rope
from lora.shaders.device import Device
from lora.shaders.program import Program
from lora.shaders.tensor import Extent, Tensor
from tests.support.half_tensors import (
    assert_rounded_once,
    needs_halves,
    rounded,
    typed,
    typed_marked,
)
from tests.support.kernels import MARKER, activation, extent_in_use, run_twice

EPSILON, BASE, N_POSITIONS = 1e-6, 10000.0, 5000


@dataclass(frozen=True)
class Case:
    rows: int
    in_use: int
    n_heads: int
    n_kv_heads: int
    head_size: int
    dimensions: int  # of a head, that turn
    interleaved: bool
    dispatches: int = 1

    @property
    def layout(self) -> HeadLayout:
        return HeadLayout(
            self.n_heads, self.n_kv_heads, self.head_size, self.dimensions, self.interleaved,
            BASE, EPSILON,
        )  # fmt: skip

    @property
    def width(self) -> int:
        return self.layout.width

    @property
    def heads(self) -> dict[str, Any]:
        return {
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_kv_heads,
            "head_size": self.head_size,
            "interleaved": self.interleaved,
        }

    def tensors(self, device: Device, extent: Extent) -> tuple[np.ndarray, Tensor, Tensor]:
        """Positions, the same on the device, and the tables."""
        positions = np.random.default_rng(self.width).integers(0, N_POSITIONS, self.rows)
        tables = Rope(BASE, self.dimensions, self.interleaved).tables(N_POSITIONS)
        return positions, activation(device, positions, extent), device.upload(tables)


CASES = [
    # Fewer quads than lanes, fewer heads than a workgroup takes, whole and broken steps, heads
    # that turn in part, as many lanes as a workgroup has.
    Case(1, 1, 1, 1, 4, 4, True),
    Case(5, 3, 2, 1, 12, 8, False),
    Case(67, 66, 4, 2, 64, 64, False),
    Case(67, 66, 4, 2, 64, 64, True),
    Case(19, 18, 3, 1, 80, 40, False),
    Case(19, 18, 3, 1, 100, 52, True),
    Case(3, 3, 4, 1, 256, 256, False),
    Case(5, 4, 1, 1, 516, 516, True),
    # No whole vectors: rope is a kernel of its own.
    Case(5, 4, 2, 1, 12, 12, False, dispatches=2),
    Case(5, 4, 2, 1, 12, 10, True, dispatches=2),
]
HALF_CASES = [CASES[4], CASES[5], CASES[8]]


def check(device: Device, case: Case, x_type: str, out_type: str) -> None:
    rng = np.random.default_rng(case.rows)
    qkv = rounded(rng.normal(size=(case.rows, case.width)), x_type)
    q_weight, k_weight = rng.normal(size=(2, case.head_size)).astype(np.float32)
    extent = extent_in_use(device, case.rows, case.in_use)
    positions, positions_tensor, tables = case.tensors(device, extent)
    out = typed_marked(device, out_type, extent, case.width)
    program = Program(device)
    head_norm_rope(
        program, typed(device, qkv, x_type, extent), device.upload(q_weight),
        device.upload(k_weight), EPSILON, positions_tensor, tables, out=out, **case.heads,
    )  # fmt: skip
    assert len(program.commands) == case.dispatches
    result, used = run_twice(program, out), slice(0, case.in_use)
    expected = head_norm_rope_reference(qkv, q_weight, k_weight, positions, case.layout)
    v = (case.n_heads + case.n_kv_heads) * case.head_size
    # As in test_rmsnorm.py, a sum of squares in a tree, a root, two products; then as in
    # test_rope.py tables rounded to f32, two products and a sum, of numbers up to 8. A rope of its
    # own turns what has been rounded to f16: by half a unit of up to 8, twice.
    between = 2 * 2**-11 * 8 if out_type == "f16" and case.dispatches == 2 else 0
    assert_rounded_once(result[used, :v], expected[used, :v], rtol=2e-6, atol=4e-6 + between)
    assert (result[used, v:] == rounded(qkv[used, v:], out_type)).all()
    assert (result[case.in_use :] == MARKER).all()


@pytest.mark.parametrize("is_cpu", [True, False], ids=["CPU's lanes", "GPU's lanes"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_head_norm_rope(
    device: Device, monkeypatch: pytest.MonkeyPatch, case: Case, is_cpu: bool
) -> None:
    monkeypatch.setattr(device, "is_cpu", is_cpu)  # both run on any device
    check(device, case, "f32", "f32")


@pytest.mark.parametrize(("x_type", "out_type"), [("f16", "f32"), ("f32", "f16"), ("f16", "f16")])
@pytest.mark.parametrize("case", HALF_CASES, ids=str)
def test_head_norm_rope_of_halves(device: Device, case: Case, x_type: str, out_type: str) -> None:
    needs_halves(device)
    check(device, case, x_type, out_type)


def test_weights_of_another_size_are_refused(device: Device) -> None:
    extent = device.extent(2)
    qkv = device.empty((2, 24), extent=extent)
    weight, short = device.empty((8,)), device.empty((4,))
    positions, tables = device.empty((2,), "u32", extent=extent), device.empty((4, 4, 2))
    with pytest.raises(ValueError, match="head_norm_rope k_weight has shape"):
        head_norm_rope(
            Program(device), qkv, weight, short, EPSILON, positions, tables,
            n_heads=1, n_kv_heads=1, head_size=8, interleaved=False,
        )  # fmt: skip


def test_more_rotated_columns_than_a_head_has_are_refused(device: Device) -> None:
    extent = device.extent(2)
    qkv, weight = device.empty((2, 24), extent=extent), device.empty((8,))
    positions, tables = device.empty((2,), "u32", extent=extent), device.empty((4, 8, 2))
    with pytest.raises(ValueError, match="16 rotated columns do not fit heads of 8"):
        head_norm_rope(
            Program(device), qkv, weight, weight, EPSILON, positions, tables,
            n_heads=1, n_kv_heads=1, head_size=8, interleaved=False,
        )  # fmt: skip
