"""Plans that are kept: read back, never measured again, passed over where they can't be used."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lora.storage.tile_cache
from lora.forward.matmul_matrix import EMULATED
from lora.forward.plans.matmul_plans import (
    PlanSource,
    ProductShape,
    Request,
    plan_of,
)
from lora.forward.plans.matmul_tiles import (
    DECODED_TILES,
    PAIRED_TILES,
    Plan,
    PlanSpace,
    candidates,
    choose_plan,
    cut,
    ranked_plans,
)
from lora.forward.plans.tuning import TUNING_SECONDS
from lora.shaders.device import Device
from lora.shaders.facts import DeviceFacts
from lora.storage.tile_cache import (
    TileCache,
    cache_folder,
    circumstances,
    entry_of,
    find_tiles,
    plan_of_entry,
)
from tests.support.plans import gpu as gpu  # a fixture
from tests.support.plans import planned_requests, refuse, second_choices, use_tuner


def requests_for(device: Device, precision: str = "f32") -> list[Request]:
    return planned_requests(device.facts, [(256, 512, 1024)], precision)


def with_info(device: Device, **info: str) -> DeviceFacts:
    return replace(device.facts, info={**device.facts.info, **info})


def plans_of(device: Device, source: PlanSource | None, requests: Sequence[Request]) -> list[Plan]:
    return [plan_of(device.recording(plans=source), request) for request in requests]


def test_found_once(gpu: Device, tmp_path: Path) -> None:
    """A second process reads what the first found; only what is new is looked for."""
    requests = requests_for(gpu)
    wanted = second_choices(gpu, requests, seconds=1)
    TileCache(gpu).find(requests, second_choices)
    again = TileCache(gpu)
    again.find(requests, refuse)
    assert {p: again.plan(p) for p in wanted} == wanted
    assert again.path.parent == tmp_path / "webgpu-lora" == cache_folder()
    looked_for: list[Request] = []

    def note(
        device: Device, missing: Sequence[Request], *, seconds: float
    ) -> dict[ProductShape, Plan]:
        looked_for.extend(missing)
        return second_choices(device, missing, seconds=seconds)

    more = planned_requests(gpu.facts, [(64, 128, 192)])
    again.find([*requests, *more], note)
    assert looked_for == more
    once_more = TileCache(gpu)
    once_more.load()
    wanted |= second_choices(gpu, more, seconds=1)
    assert {p: once_more.plan(p) for p in wanted} == wanted
    again.forget()
    again.load()
    assert all(again.plan(p) is None for p in wanted)


def test_more_time_looks_again_at_what_less_time_found(gpu: Device) -> None:
    """As `lora tune` after `lora train`; what comes later with less time keeps what is there."""
    requests = requests_for(gpu)
    calls: list[tuple[int, float]] = []

    def note(
        device: Device, missing: Sequence[Request], *, seconds: float
    ) -> dict[ProductShape, Plan]:
        calls.append((len(missing), seconds))
        return second_choices(device, missing, seconds=seconds)

    cache = TileCache(gpu)
    cache.find(requests[:1], note)
    cache.find(requests, note, 30.0)
    cache.find(requests, refuse, 30.0)
    cache.find(requests, refuse, 1.0)
    TileCache(gpu).find(requests, refuse)
    cache.find(requests, note, 60.0)
    n = len(requests)
    assert n > 1 and calls == [(1, TUNING_SECONDS), (n, 30.0), (n, 60.0)]
    contents = json.loads(cache.path.read_text())
    for entry in contents["plans"].values():
        entry["seconds"] = "long"
    cache.path.write_text(json.dumps(contents))
    cache.find(requests, note)
    assert calls[3:] == [(n, TUNING_SECONDS)]


@pytest.mark.parametrize(
    "other",
    [
        "name",
        "driver",
        "backend",
        "workgroup_memory",
        "implementation",
        "version",
        "kernel",
        "precision",
        "matrix_shapes",
        "distrusted",
    ],
)
def test_what_is_found_holds_for_one_device_driver_and_kernel(
    gpu: Device, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_for(gpu)
    TileCache(gpu).find(requests, second_choices)
    key = {"driver": "description", "backend": "backend_type"}.get(other)
    if key is not None:
        monkeypatch.setattr(gpu, "facts", with_info(gpu, **{key: "another"}))
    elif other == "kernel":
        (tmp_path / "matmul_tiled.wgsl").write_text("changed")
        monkeypatch.setattr(lora.storage.tile_cache, "_KERNELS", tmp_path)
    elif other == "precision":
        requests = requests_for(gpu, "f16")
    else:
        values: dict[str, Any] = {"name": "Card 4000", "workgroup_memory": 16384}
        values |= {"implementation": "another", "version": "0.99"}
        values |= {"matrix_shapes": (EMULATED,), "distrusted": frozenset({"low rank"})}
        monkeypatch.setattr(gpu, "facts", replace(gpu.facts, **{other: values[other]}))
    cache = TileCache(gpu)
    cache.load()
    assert all(cache.plan(r.product) is None for r in requests)


def test_wgpus_entry_keeps_its_form(device: Device) -> None:
    """Files of before Dawn was there are still found; Dawn's version comes with its name."""
    native = replace(device.facts, implementation="wgpu-native", version="0.32.0")
    assert circumstances(native)["wgpu"] == "0.32.0"
    dawn = replace(native, implementation="Dawn", version="0.32.0.4")
    assert circumstances(dawn)["wgpu"] == "Dawn 0.32.0.4"
    assert list(circumstances(dawn)) == list(circumstances(native))


@pytest.mark.parametrize(
    "contents", [b"", b'{"plans": {', b"[]", b'{"plans": 3}', b"\xff\xfe", b'{"other": {}}']
)
def test_a_damaged_file_is_passed_over_and_replaced(gpu: Device, contents: bytes) -> None:
    cache, requests = TileCache(gpu), requests_for(gpu)
    cache.path.parent.mkdir(parents=True)
    cache.path.write_bytes(contents)
    with pytest.warns(UserWarning, match="cannot be read"):
        cache.find(requests, second_choices)
    again = TileCache(gpu)
    again.find(requests, refuse)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        3,
        {},
        {"tile": "7x7x7/1x1", "splits": 1, "length": 1024},
        {"tile": "64x64x16/8x4", "splits": 2, "length": 256},  # half of the contraction
        {"tile": "64x64x16/8x4", "splits": 3, "length": 512},  # a stretch with nothing in it
        {"tile": "64x64x16/8x4", "splits": 1, "length": 1030},  # no whole steps
        {"tile": "64x64x16/8x4", "splits": 0, "length": 0},
        {"tile": "64x64x16/8x4", "splits": "1", "length": 1024},
        {"tile": "128x128x32/8x8", "splits": 1, "length": 1024},  # more memory than there is
    ],
)
def test_an_entry_that_cannot_be_used_is_replaced(
    gpu: Device, entry: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "facts", replace(gpu.facts, workgroup_memory=16384))
    request, _ = requests_for(gpu)
    product = request.product
    cache = TileCache(gpu)
    cache.find([request], second_choices)
    contents = json.loads(cache.path.read_text())
    usable = contents["plans"][product.key]
    contents["plans"][product.key] = entry
    cache.path.write_text(json.dumps(contents))
    cache.load()
    assert cache.plan(product) is None
    cache.find([request], second_choices)
    assert json.loads(cache.path.read_text())["plans"][product.key] == usable


def test_find_tiles(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training finds plans; evaluation reads them; off and CPU devices know none."""
    calls = []

    def tuner(
        device: Device, requests: Sequence[Request], *, seconds: float
    ) -> dict[ProductShape, Plan]:
        calls.append(list(requests))
        return second_choices(device, requests, seconds=seconds)

    use_tuner(monkeypatch, tuner)
    requests = requests_for(gpu)
    wanted = list(second_choices(gpu, requests, seconds=1).values())
    model = [choose_plan(r.space(gpu.facts)) for r in requests]

    def plans(source: PlanSource | None) -> list[Plan]:
        return plans_of(gpu, source, requests)

    assert plans(find_tiles(gpu, "auto")) == model
    assert find_tiles(gpu, "off", requests) is None
    assert not calls and not TileCache(gpu).path.exists()
    found = find_tiles(gpu, "auto", requests)
    assert plans(found) == wanted and len(calls) == 1
    assert plans(find_tiles(gpu, "auto", requests)) == wanted and len(calls) == 1
    assert plans(None) == model
    assert plans(find_tiles(gpu, "auto")) == wanted
    monkeypatch.setattr(gpu, "facts", with_info(gpu, adapter_type="CPU"))
    assert find_tiles(gpu, "auto", requests) is None
    assert len(calls) == 1


def test_plans_of_products_in_pairs(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of matrix units in f32 go to products that are offered them, and nowhere else."""
    features = gpu.facts.features | {"shader-f16"}
    without = replace(gpu.facts, features=features)
    monkeypatch.setattr(gpu, "facts", replace(without, matrix_shapes=(EMULATED,)))

    def tuner(
        device: Device, requests: Sequence[Request], *, seconds: float
    ) -> dict[ProductShape, Plan]:
        return {r.product: Plan(PAIRED_TILES[-1], 1, r.constants["contraction"]) for r in requests}

    use_tuner(monkeypatch, tuner)
    requests = planned_requests(gpu.facts, [(256, 512, 1024)], body=None)
    assert any(tile.body == "paired" for tile in requests[0].tiles)
    found = find_tiles(gpu, "auto", requests)
    assert found is not None
    plans = [found(request) for request in requests]
    assert [plan and plan.tile for plan in plans] == [PAIRED_TILES[-1]] * len(requests)
    plain = [t for t in requests[0].tiles if t.body == "tiled"]
    assert found(replace(requests[0], tiles=tuple(plain))) is None
    entry = entry_of(Plan(PAIRED_TILES[-1], 1, 1024))
    product = requests[0].product
    assert plan_of_entry(gpu.facts, product, entry) == Plan(PAIRED_TILES[-1], 1, 1024)
    assert plan_of_entry(without, product, entry) is None


def test_decoded_weights_go_in_stretches_where_they_are_many(gpu: Device) -> None:
    """A plan that is kept is taken again where it would be chosen, and nowhere else."""
    facts = replace(gpu.facts, matrix_shapes=(EMULATED,), workgroup_memory=49152)
    (request, *_) = planned_requests(gpu.facts, [(256, 512, 1024)], "f16")
    for columns, contraction, taken in (
        (512, 1024, False), (512, 8192, False), (4096, 1024, False),
        (512, 16384, True), (4096, 4096, True), (512, 65536, True),
    ):  # fmt: skip
        product = replace(request.product, columns=columns, contraction=contraction)
        plan = Plan(DECODED_TILES[0], *cut(contraction, 4, 32))
        assert plan.splits == 4
        space = PlanSpace(product.rows, columns, contraction, DECODED_TILES)
        assert (plan in ranked_plans(space)) == taken
        assert plan_of_entry(facts, product, entry_of(plan)) == (plan if taken else None)


def test_without_a_place_to_keep_them_the_model_chooses(
    gpu: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans that are not kept could differ from run to run."""
    requests = requests_for(gpu)
    use_tuner(monkeypatch, second_choices)
    (tmp_path / "webgpu-lora").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="train.tuning"), pytest.warns(match="cannot be read"):
        source = find_tiles(gpu, "auto", requests)
    assert plans_of(gpu, source, requests) == [choose_plan(r.space(gpu.facts)) for r in requests]


def _find_slowly(rank: int, folder: Path, started: object, results: object) -> None:
    """What one of two processes does: tunes for a while, to another result than the other's."""
    device = Device()
    requests = requests_for(device)
    cache = TileCache(device, folder)

    def tuner(
        device: Device, missing: Sequence[Request], *, seconds: float
    ) -> dict[ProductShape, Plan]:
        time.sleep(0.3)
        return {r.product: candidates(r.space(device.facts))[rank] for r in missing}

    started.wait()  # type: ignore[attr-defined]
    cache.find(requests, tuner)
    names = [cache.plan(r.product).name for r in requests]  # type: ignore[union-attr]
    results.put(names)  # type: ignore[attr-defined]


def test_two_processes_at_once_take_the_same_plans(device: Device, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    started, results = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=_find_slowly, args=(rank, tmp_path, started, results))
        for rank in (1, 2)
    ]
    for process in processes:
        process.start()
    first, second = results.get(timeout=60), results.get(timeout=60)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert first == second
    (path,) = tmp_path.glob("tiles-*.json")
    kept = json.loads(path.read_text())["plans"].values()
    assert sorted(f"{e['tile']} in {e['splits']}" for e in kept) == sorted(first)
