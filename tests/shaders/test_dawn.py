"""The inner parts of wgpudawn that we rely on; skipped where Dawn takes no driver."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lora.shaders.choice import UnavailableError, implementation, list_devices
from lora.shaders.device import Device
from lora.shaders.facts import usable_shapes
from lora.shaders.templates import with_directives
from lora.shaders.webgpu import MATRIX_FEATURE


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    try:
        list_devices("dawn")
    except UnavailableError as reason:
        pytest.skip(str(reason))
    with Device(webgpu="dawn") as opened:
        yield opened


def test_a_product_on_matrix_units(device: Device) -> None:
    """The first shape of use here, against numpy."""
    if not device.facts.matrix_shapes:
        pytest.skip(f"{device.facts.name} has no matrix units of use (llvmpipe: Mesa 26.1)")
    shape = device.facts.matrix_shapes[0]
    m, n, k = shape.m, shape.n, 2 * shape.k
    code = f"""
alias Left = subgroup_matrix_left<f16, {shape.k}, {m}>;
alias Right = subgroup_matrix_right<f16, {n}, {shape.k}>;
alias Result = subgroup_matrix_result<f32, {n}, {m}>;
@group(0) @binding(0) var<storage, read> x: array<f16>;
@group(0) @binding(1) var<storage, read> w: array<f16>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@compute @workgroup_size({shape.most_lanes}) fn main() {{
    var sums = Result();
    for (var at = 0u; at < {k}u; at += {shape.k}u) {{
        let left = subgroupMatrixLoad<Left, row_major>(&x, at, {k}u);
        let right = subgroupMatrixLoad<Right, col_major>(&w, at, {k}u);
        sums = subgroupMatrixMultiplyAccumulate(left, right, sums);
    }}
    subgroupMatrixStore<row_major>(&y, 0u, sums, {n}u);
}}"""
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(s).astype(np.float16) for s in ((m, k), (n, k)))
    memory, handle = device.memory, device.handle
    tensors = [memory.empty(array.shape, "f16") for array in (x, w)]
    for tensor, array in zip(tensors, (x, w), strict=True):
        memory.write(tensor, array)
    tensors.append(memory.empty((m, n)))
    kernel = handle.compile("product", with_directives(code))
    group = handle.bind_group(kernel, [(t.buffer, t.offset, t.n_bytes) for t in tensors])
    encoder = handle.encoder()
    encoder.dispatches([(kernel, group, (1, 1, 1))])
    handle.submit(encoder.finish())
    wanted = x.astype(np.float64) @ w.astype(np.float64).T
    assert np.abs(memory.read(tensors[2]) - wanted).max() < 1e-4


def test_the_shapes_are_the_drivers(device: Device) -> None:
    listed = device.found.matrix_shapes
    assert (MATRIX_FEATURE in device.found.features) == bool(listed)
    assert device.facts.matrix_shapes == usable_shapes(listed)
    assert device.facts.subgroup_lanes is not None
    least, most = device.facts.subgroup_lanes
    for shape in listed:
        assert least <= shape.least_lanes <= shape.most_lanes <= most


def test_several_cards_of_one_model_are_several(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wgpudawn lists one of them; Dawn itself lists a card again for each loader that shows it."""
    from lora.shaders import dawn

    def card(uuid: int, backend: str = "Vulkan") -> Any:
        info = {"backend_type": backend, "vendor_id": 1, "device_id": 2, "device": "H100"}
        return SimpleNamespace(info=info, uuid=bytes([uuid]))

    cards = [card(1), card(2), card(1), card(3, "Null")]
    monkeypatch.setattr(dawn.dawn.gpu, "_enumerate_all_adapters", lambda: cards)
    monkeypatch.setattr(
        dawn.extras,
        "get_adapter_properties",
        lambda one: {"vulkan_uuids": {"device_uuid": one.uuid}},
    )
    assert list(dawn._adapters()[0].values()) == cards[:2]


def test_notes_of_drivers_are_kept_from_stderr(
    device: Device, capfd: pytest.CaptureFixture[str]
) -> None:
    from lora.shaders.dawn import _notes

    with _notes() as notes:
        os.write(2, b"Warning: maxThing reduced.\n")
        os.write(2, b"a driver's own words\n")
        os.write(2, b"Warning: too old.\n - While initializing\n    at Impl (x.cpp:2)\n\nmore\n")
    assert notes == ["maxThing reduced.", "too old."]
    assert capfd.readouterr().err == "a driver's own words\nmore\n"


def test_versions_are_told(device: Device) -> None:
    maker = implementation("dawn")
    assert device.facts.software == f"Dawn {maker.version}"
    assert maker.package == "wgpudawn" and maker.library_version[:2] == "20"
