"""The body for matrix units against float64: on such units where there are, else in plain WGSL."""

from __future__ import annotations

import pytest
from gguf import GGMLQuantizationType

from lora.forward.plans.matmul_tiles import MATRIX_TILES, MatrixTile
from lora.shaders.recording import Recording
from tests.support.matrix_products import Case, check, with_tile
from tests.support.quantized_tensors import ALL_TYPES, type_name

Q8_0, F16 = GGMLQuantizationType.Q8_0, GGMLQuantizationType.F16
SMALL, SMALLEST = MATRIX_TILES[-1], MatrixTile(32, 32, 16, 32, 16)


@pytest.mark.parametrize(
    ("case", "splits"),
    [
        (Case(1, 1, 4, 32, ranges=(), parts=(F16,)), 1),
        (Case(33, 32, 68, 100, ranges=(), parts=(F16,), bias=True, residual=True,
              out_type="f32"), 2),
        (Case(20, 19, 36, 64, rank=20, ranges=((4, 32),), x_type="f32"), 1),
        (Case(20, 20, 36, 64, ranges=((8, 44), (60, 72)), parts=(Q8_0, F16), out_type="f32"), 1),
        (Case(20, 19, 36, 64, ranges=((8, 44), (60, 72)), parts=(Q8_0, F16), bias=True,
              out_type="f32", scaled=True), 1),
        (Case(33, 32, 68, 100, parts=(F16,), ranges=((0, 40),), residual=True, out_type="f32",
              scaled=True), 2),
        (Case(570, 540, 36, 32, ranges=(), parts=(F16,)), 1),  # 16 tiles down, and two
    ],
    ids=["one row", "stretches", "a large rank", "two parts", "scaled", "scaled stretches",
         "two bands"],
)  # fmt: skip
def test_on_any_driver(recording: Recording, case: Case, splits: int) -> None:
    """A tile so small that software drivers compile it in seconds."""
    check(with_tile(recording, SMALLEST, splits, on_software=True), case)


@pytest.mark.parametrize("tile", MATRIX_TILES, ids=lambda tile: tile.name)
def test_every_tile(recording: Recording, tile: MatrixTile) -> None:
    check(with_tile(recording, tile), Case())


@pytest.mark.parametrize("splits", [2, 3])
def test_stretches(recording: Recording, splits: int) -> None:
    check(with_tile(recording, SMALL, splits), Case(bias=True, residual=True, out_type="f32"))


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1, 4, 32, ranges=(), parts=(F16,)),
        Case(33, 33, 68, 100, rank=20, ranges=((0, 68),), parts=(F16,)),
        Case(40, 39, 64, 32, rank=40, ranges=((4, 12), (12, 64))),
        Case(bias=True, softcap=7.0, out_type="f32", x_type="f32"),
        Case(residual=True, out_type="f32"),
        Case(parts=(Q8_0, F16), ranges=((8, 44), (60, 132)), bias=True, out_type="f32"),
    ],
    ids=["one row", "odd widths", "large ranks", "head", "residual", "two parts"],
)
def test_shapes_and_what_comes_after(recording: Recording, case: Case) -> None:
    check(with_tile(recording, SMALL), case)


@pytest.mark.parametrize("kind", ALL_TYPES, ids=type_name)
def test_every_type(recording: Recording, kind: GGMLQuantizationType) -> None:
    """Below 65504 they are: blocks of random bits have scales of any size."""
    check(
        with_tile(recording, SMALL), Case(20, 20, 36, 256, ranges=(), parts=(kind,), out_type="f32")
    )
