"""Which plan of matmul_tiled a product is recorded with.

Wherever a program records a product, `plan_of` asks the source of its `Recording`: plans found by
forward/plans/tuning.py, now or in an earlier run. Where there is none, or it knows no plan, the
model of forward/plans/matmul_tiles.py says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lora.forward.plans.matmul_tiles import Plan, PlanSpace, Tile, choose_plan
from lora.forward.plans.stretches import Follower
from lora.shaders.facts import DeviceFacts
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor

_ROW_STEP = 32  # rows of the smallest tile: between its multiples no tile's grid changes


@dataclass(frozen=True)
class ProductShape:
    """What decides which plan is the fastest for a product.

    Attributes:
        rows: the most that the output can have, rounded up to whole smallest tiles.
        members: adapted ranges of the part.
        epilogue: with " scaled" where the columns are scaled, and what follows can't do that to
            stretches.
        half: whether the tiles are of f16.
        normed: whether a norm or a gate follows, which may add stretches up.

    Dropout is none of it: what its masks cost depends little on the plan.
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
        record: called with a program and a request; forward/matmul_bodies.py's own.
        body: the first that fits.
        tiles: of all bodies that fit.
        tensors: the extent, x, the weights, out, and the low-rank part's.
        after: residual, bias, scales of columns and what keeps them, which the last pass takes.
        then: after a matrix of one part; it is the last pass where it can add stretches up.
        half: whether it is recorded under `precision: f16`.
        largest: of the weights, see `MatrixPart`.
        dropout: see `PartProduct`.
    """

    record: Callable[[Program, Request], None]
    body: str
    tiles: tuple[Tile, ...]
    half: bool
    extent: Extent
    out: Tensor
    constants: Mapping[str, Any]
    tensors: Sequence[Tensor]
    after: Sequence[Tensor]
    place: Any
    label: str
    flops: int
    then: Follower | None
    largest: Tensor | None = None
    dropout: Any = None

    @property
    def product(self) -> ProductShape:
        """What decides the plan."""
        c = self.constants
        return ProductShape(
            rows=-(-self.extent.maximum // _ROW_STEP) * _ROW_STEP,
            columns=c["n_columns"],
            contraction=c["contraction"],
            quantization=c["quantization"],
            transposed=c["transposed"],
            members=len(c["members"]),
            rank=c["rank"] if c["members"] else 0,
            placed=c["placed"],
            epilogue=c["epilogue"] + (" scaled" if self._scaled_apart else ""),
            x_type=c["x_type"] + (" in blocks" if c["x_block"] else ""),
            out_type=c["out_type"],
            half=self.half,
            normed=self.then is not None,
        )

    @property
    def unmasked(self) -> Request:
        """The same without dropout."""
        return replace(self, dropout=None, constants={**self.constants, "dropout": None})

    @property
    def _scaled_apart(self) -> bool:
        scales_columns = self.then is not None and self.then.scales_columns
        return self.constants["scaled"] is not None and not scales_columns

    def space(self, facts: DeviceFacts) -> PlanSpace:
        """The plans that there are for it on a device."""
        c, rows = self.constants, self.extent.maximum
        return PlanSpace(rows, c["n_columns"], c["contraction"], self.tiles, facts.multiprocessors)


PlanSource = Callable[[Request], Plan | None]


def plan_of(recording: Recording, request: Request) -> Plan:
    """The plan of a product: the recording's source has the first word, then the model."""
    plan = None if recording.plans is None else recording.plans(request)
    return plan or choose_plan(request.space(recording.facts))


def source_of(plans: Mapping[ProductShape, Plan], others: PlanSource | None = None) -> PlanSource:
    """A source of these plans.

    Args:
        others: asked for products that are not among them; None leaves those to the model.
    """
    return lambda request: plans.get(request.product) or (others(request) if others else None)


def noting(requests: list[Request]) -> PlanSource:
    """A source that appends what it is asked for to a list, and leaves it to the model."""

    def note(request: Request) -> None:
        requests.append(request)

    return note
