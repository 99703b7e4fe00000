"""Which plan of matmul_tiled a device records a product with.

Wherever a program records a product, `plan_of` asks what was attached to its device: plans found by
forward/plans/tuning.py, now or in an earlier run, or (the rule where nothing is attached) the model
of forward/plans/matmul_tiles.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakKeyDictionary

from lora.forward.plans.matmul_tiles import Plan, choose_tile
from lora.forward.plans.stretches import ProductNorm
from lora.shaders.device import Device
from lora.shaders.tensor import Extent, Tensor

_ROW_STEP = 32  # rows of the smallest tile: between its multiples no tile's grid changes


@dataclass(frozen=True)
class Product:
    """What decides which plan is the fastest for a product.

    Attributes:
        rows: the most that the output can have, rounded up to whole smallest tiles.
        members: adapted ranges of the part.
        half: whether the tiles are of f16.
        normed: whether a norm follows, which may add stretches up.
    """

    rows: int
    columns: int
    contraction: int
    quantization: str
    transposed: bool
    members: int
    rank: int
    placed: bool
    epilogue: str
    x_type: str
    out_type: str
    half: bool
    normed: bool

    @property
    def key(self) -> str:
        """Its name in files."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())


@dataclass(frozen=True)
class Request:
    """A product that is being recorded: what `record` needs to record it again elsewhere.

    Attributes:
        record: called as record(program, extent, out, constants, tensors, after, place, label,
            flops, norm); forward/matmul.py's own.
        half: whether it is recorded under `precision: f16`.
    """

    record: Callable[..., None]
    half: bool
    extent: Extent
    out: Tensor
    constants: Mapping[str, Any]
    tensors: Sequence[Tensor]
    after: Sequence[Tensor]
    place: Any
    label: str
    flops: int
    norm: ProductNorm | None

    @property
    def product(self) -> Product:
        """What decides the plan."""
        c = self.constants
        return Product(
            rows=-(-self.extent.maximum // _ROW_STEP) * _ROW_STEP,
            columns=c["n_columns"],
            contraction=c["contraction"],
            quantization=c["quantization"],
            transposed=c["transposed"],
            members=len(c["members"]),
            rank=c["rank"] if c["members"] else 0,
            placed=c["placed"],
            epilogue=c["epilogue"],
            x_type=c["x_type"],
            out_type=c["out_type"],
            half=self.half,
            normed=self.norm is not None,
        )

    def shape(self, device: Device) -> tuple[int, int, int, int, bool]:
        """The arguments of `choose_tile`."""
        c = self.constants
        limit = device.workgroup_memory
        return self.extent.maximum, c["n_columns"], c["contraction"], limit, self.half


PlanSource = Callable[[Request], Plan | None]

_sources: WeakKeyDictionary[Device, PlanSource] = WeakKeyDictionary()
_listeners: WeakKeyDictionary[Device, list[Request]] = WeakKeyDictionary()


def plan_of(device: Device, request: Request) -> Plan:
    """The plan of a product: what was attached to the device has the first word, then the model."""
    if device in _listeners:
        _listeners[device].append(request)
    source = _sources.get(device)
    plan = None if source is None else source(request)
    return plan or choose_tile(*request.shape(device))


def use_source(device: Device, source: PlanSource | None) -> None:
    """Lets a device record with a source's plans from now on; None for the model's alone."""
    if source is None:
        _sources.pop(device, None)
    else:
        _sources[device] = source


@contextmanager
def using_source(device: Device, source: PlanSource | None) -> Iterator[None]:
    """Lets a device record with a source's plans in the block only."""
    before = _sources.get(device)
    use_source(device, source)
    try:
        yield
    finally:
        use_source(device, before)


def use_plans(device: Device, plans: Mapping[Product, Plan]) -> None:
    """Lets a device record with these plans, and with the model's for products not among them."""
    use_source(device, lambda request: plans.get(request.product))


@contextmanager
def requests_of(device: Device) -> Iterator[list[Request]]:
    """Collects the requests of what is recorded on a device in the block."""
    requests: list[Request] = []
    _listeners[device] = requests
    try:
        yield requests
    finally:
        del _listeners[device]
