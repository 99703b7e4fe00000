"""Plans of matmul_tiled that were found once for a device and its driver, kept for later runs.

A plan decides the last bits of a result: training never measures again what stands here, so that a
seed gives one adapter on a machine. One process at a time looks for plans.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from lora.forward.plans.matmul_plans import PlanSource, ProductShape, Request
from lora.forward.plans.matmul_tiles import (
    MOST_PARTIAL_SUMS,
    MatrixTile,
    PairedTile,
    Plan,
    known_tiles,
)
from lora.forward.plans.tuning import TUNING_SECONDS, tune
from lora.shaders import templates
from lora.shaders.device import Device
from lora.shaders.facts import DeviceFacts
from lora.shaders.stages import stage
from lora.shaders.untrusted import as_f32
from lora.storage.files import write_file

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_KERNELS = Path(templates.__file__).parent / "wgsl"
_TEMPLATES = (
    "matmul_*.wgsl",
    "decode_weights.wgsl",
    "largest_of_rows.wgsl",
    "pair_*.wgsl",
    "parts/matmul_*.wgsl",
    "parts/pairs.wgsl",
    "parts/row_largest.wgsl",
    "parts/unpacked.wgsl",
    "parts/stored.wgsl",
    "decode/*.wgsl",
)


class Tuner(Protocol):
    """What looks for plans, as `lora.forward.plans.tuning.tune` does."""

    def __call__(
        self, device: Device, requests: Sequence[Request], /, *, seconds: float
    ) -> Mapping[ProductShape, Plan]:
        """A plan for every product of the requests."""


def cache_folder() -> Path:
    """Where this program keeps what it can find again: in the user's folder of caches."""
    configured = os.environ.get("XDG_CACHE_HOME")
    if configured:
        folder = Path(configured)
    elif sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches"
    else:
        folder = Path.home() / ".cache"
    return folder / "webgpu-lora"


def circumstances(facts: DeviceFacts) -> dict[str, Any]:
    """All that the plans found on a device hold for, as values that JSON can hold."""
    native = facts.implementation == "wgpu-native"  # the only one when this key got its name
    return {
        "adapter": facts.name,
        "driver": facts.info["description"],
        "backend": facts.info["backend_type"],
        "wgpu": facts.version if native else facts.software,
        "workgroup_memory": facts.workgroup_memory,
        "kernels": _kernels_digest(),
    }


def entry_of(plan: Plan) -> dict[str, Any]:
    """A plan as values that JSON can hold."""
    return {"tile": plan.tile.name, "splits": plan.splits, "length": plan.length}


def plan_of_entry(facts: DeviceFacts, product: ProductShape, entry: Any) -> Plan | None:
    """The plan that `entry_of` gave; None for what is no plan that this product can use here."""
    if not isinstance(entry, dict):
        return None
    tile = next((t for t in known_tiles(product.half) if t.name == entry.get("tile")), None)
    splits, length = entry.get("splits"), entry.get("length")
    if isinstance(tile, MatrixTile) and not facts.matrix_shapes:
        return None
    if isinstance(tile, PairedTile) and "pairs" in facts.distrusted:
        return None
    if tile is None or not isinstance(splits, int) or not isinstance(length, int):
        return None
    whole = length > 0 and length % tile.depth == 0
    covers = (splits - 1) * length < product.contraction <= splits * length
    if splits > 1 and splits * product.rows * product.columns > MOST_PARTIAL_SUMS:
        return None
    if splits > 1 and not tile.may_cut(product.columns, product.contraction):
        return None
    if not whole or not covers or tile.workgroup_bytes > facts.workgroup_memory:
        return None
    return Plan(tile, splits, length)


class TileCache:
    """The plans found for one device, driver and version of the kernels: one JSON file.

    Args:
        device: whose plans.
        folder: where the file lies; by default the user's.
    """

    def __init__(self, device: Device, folder: Path | None = None) -> None:
        self._device = device
        # Where units are left alone plans are found without them, which are none once they aren't.
        units = {
            "matrix_units": bool(device.facts.matrix_shapes),
            "left_alone": sorted(device.facts.distrusted),
        }
        self._identity = circumstances(device.facts) | units
        digest = hashlib.sha256(json.dumps(self._identity).encode()).hexdigest()[:16]
        self.path = (folder or cache_folder()) / f"tiles-{digest}.json"
        self._plans: dict[str, Any] = {}

    def load(self) -> None:
        """Reads the file; without one, or with a damaged one, no plan is known."""
        self._plans = {}
        try:
            contents = json.loads(self.path.read_bytes())
            self._plans = dict(contents["plans"])
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            warnings.warn(
                f"{self.path} cannot be read ({error!r}) and is passed over; the next training "
                "writes it anew.",
                stacklevel=2,
            )

    def plan(self, product: ProductShape) -> Plan | None:
        """The plan known for a product; None where there is none, or one that can't be used."""
        return plan_of_entry(self._device.facts, product, self._plans.get(product.key))

    def find(
        self, requests: Sequence[Request], tuner: Tuner = tune, seconds: float = TUNING_SECONDS
    ) -> None:
        """Loads the file, and lets a tuner find and keep the plans that it doesn't have.

        Others who look for plans at the same time wait, and read these.

        Args:
            requests: the products of a training step, each as often as it occurs.
            tuner: what looks for plans.
            seconds: that it may take. A plan that was found with fewer is looked for again: little
                time leaves products of little weight with a choice that was never timed.

        Raises:
            OSError: the file cannot be written.
        """
        with self._alone():
            self.load()
            missing = [
                request
                for request in requests
                if self.plan(request.product) is None or self._seconds(request.product) < seconds
            ]
            if not missing:
                return
            stage(f"Timing tiles of {len(missing)} products (once on this device)")
            found = {
                product.key: entry_of(plan) | {"seconds": seconds}
                for product, plan in tuner(self._device, missing, seconds=seconds).items()
            }
            contents = {**self._identity, "plans": self._plans | found}
            write_file(self.path, json.dumps(contents, indent=1) + "\n")
            self._plans |= found

    def _seconds(self, product: ProductShape) -> float:
        """How long the search took that found a product's plan."""
        seconds = as_f32(self._plans[product.key].get("seconds"))
        return seconds or 0.0

    def forget(self) -> None:
        """Removes the file."""
        with self._alone():
            self.path.unlink(missing_ok=True)
            self._plans = {}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds a lock on a file beside the cache, which the system releases if we die."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock"), "ab") as file:
            if sys.platform == "win32":
                msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
            else:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield  # closing the file releases it


def _kernels_digest() -> str:
    """Of the text of all kernels that a plan is about, and of the tiles that there are."""
    digest = hashlib.sha256()
    for pattern in _TEMPLATES:
        for path in sorted(_KERNELS.glob(pattern)):
            digest.update(path.read_bytes())
    tiles = (*known_tiles(half=False), *known_tiles(half=True))
    digest.update(repr([tile.name for tile in tiles]).encode())
    return digest.hexdigest()[:16]


def find_tiles(
    device: Device, setting: str, requests: Sequence[Request] | None = None
) -> PlanSource | None:
    """The plans that a session shall record its products with; None for the model's choices.

    CPU devices take the model's: they have another body for products.

    Args:
        setting: `train.tuning`: off for the model's choices alone, which depend on nothing else;
            auto for those that are kept in the user's cache.
        requests: all products that training will run; plans that are not known yet are looked
            for, which takes some 4 seconds once. None (for evaluation and generation) looks for
            none.
    """
    if setting == "off" or device.facts.info["adapter_type"] == "CPU":
        return None
    cache = TileCache(device)
    if requests is None:
        cache.load()
    else:
        try:
            cache.find(requests)
        except OSError as error:
            warnings.warn(
                f"The fastest tiles of {device.facts.name} cannot be kept in {cache.path} "
                f"({error}), so default ones are used. Set XDG_CACHE_HOME to a directory that can "
                "be written, or train.tuning to off.",
                stacklevel=2,
            )
            cache.load()

    def source(request: Request) -> Plan | None:
        plan = cache.plan(request.product)
        # A text's products in f32 are plain ones, a training's of the same shape may not be.
        offered = plan is not None and plan.tile.body in {tile.body for tile in request.tiles}
        return plan if offered else None

    return source
