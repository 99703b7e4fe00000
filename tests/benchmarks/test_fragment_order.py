"""The probe of weights in the order of fragments: what it times computes the product."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.fragment_order import VARIANTS, Bench, Variant, in_order
from lora.shaders.device import Device
from lora.shaders.recording import Recording

_SMALL = {"tile_rows": 32, "tile_columns": 32, "team_rows": 16, "team_columns": 16, "depth": 16}
_WAYS = {(v.x_in_order, v.w_in_order, v.ahead): replace(v, **_SMALL, band=2) for v in VARIANTS}
_SMALLEST = [*_WAYS.values(), replace(next(iter(_WAYS.values())), depth=32)]  # lines change places


def test_fragments_lie_whole_and_one_after_the_other_along_the_contraction() -> None:
    matrix = np.arange(4 * 6, dtype=np.float16).reshape(4, 6)
    ordered = in_order(matrix, 2, 3).reshape(-1)
    for number, (row, column) in enumerate([(0, 0), (0, 3), (2, 0), (2, 3)]):
        fragment = matrix[row : row + 2, column : column + 3]
        np.testing.assert_array_equal(ordered[6 * number :][:6], fragment.reshape(-1))


@pytest.mark.parametrize("variant", _SMALLEST, ids=lambda variant: variant.name)
def test_every_way_computes_the_product(device: Device, variant: Variant) -> None:
    """Tiles so small that software drivers compile them in seconds."""
    if not device.facts.matrix_shapes:
        pytest.skip("no matrix units: make test-dawn has some")
    recording = Recording(device.facts, device.memory, "f16")
    bench = Bench(recording, device.facts.matrix_shapes[0], (64, 96, 64))
    assert bench.fits(variant)
    bench.program(variant).run()
    assert bench.error() < 1e-6
    assert not bench.fits(replace(variant, tile_rows=48))
