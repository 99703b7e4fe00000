"""A and B of an adapter as its file has them, and how they come into one layout of the device."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora.forward.model.adapter import AdapterLayout
from lora.shaders.errors import InputError


@dataclass(frozen=True)
class SavedFactors:
    """What an adapter has for one matrix: scale · B · A, each matrix with a rank of its own.

    Attributes:
        a: f32 [rank, in_features].
        b: f32 [out_features, rank], rows in Hugging Face's order.
        scale: alpha / rank, or alpha / sqrt(rank) of an rsLoRA adapter.
        magnitude: f32 [out_features] of a DoRA adapter: the length that each row of the adapted
            weights gets. Such factors are no sum, so that no layout takes them.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """Rows of A."""
        return len(self.a)

    @property
    def n_parameters(self) -> int:
        """All its numbers."""
        return self.a.size + self.b.size + (0 if self.magnitude is None else self.magnitude.size)


def common_scale(scales: Iterable[float]) -> float:
    """The scale of a layout for matrices of these scales: what most of them have, above zero.

    1 where all are zero: zero is no scale that B could be divided by.
    """
    return most_common(abs(scale) for scale in scales if scale) or 1.0


def most_common(values: Iterable[float]) -> float | None:
    """The value that occurs most often, of several such the smallest; None of no values.

    Not the first of them: in which order a file's tensors come may differ from time to time.
    """
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value), default=None)


def _check_same_matrices(source: Path, wanted: Collection[str], given: Collection[str]) -> None:
    """Checks that an adapter has factors for just the matrices that a layout has.

    Raises:
        InputError: it lacks one, or has another.
    """
    for paths, others, why in (
        (wanted, given, "has no factors for {}, which adapter.targets and adapter.layers ask for"),
        (given, wanted, "also adapts {}, which adapter.targets and adapter.layers leave out"),
    ):
        missing = sorted(set(paths) - set(others))
        if missing:
            raise InputError(f"{source}: {why.format(missing[0])} ({len(missing)} such).")


def pack(source: Path, modules: Mapping[str, SavedFactors], layout: AdapterLayout) -> np.ndarray:
    """An adapter in the layout of the device, f32 [layout.size], each product the file's own.

    A matrix of a lower rank than the layout has for it gets rows of A and columns of B that are
    zero: each one's gradient is a multiple of the other, so that they stay zero in training. Where
    a scale is not the layout's, B takes up the difference.

    Args:
        source: where the adapter came from, for messages.
        modules: by PEFT's module path.

    Raises:
        InputError: it adapts other matrices than the layout, or with other sizes, or only one of
            both has DoRA's magnitudes.
    """
    wanted = layout.to_modules(np.zeros(layout.size, np.float32))
    _check_same_matrices(source, wanted, modules)
    _check_magnitudes(source, modules, layout)
    lows = layout.low_ranks()
    highest = max((factors.rank for factors in modules.values()), default=layout.rank)
    wanted_rank = max((low.rank for low in lows.values()), default=layout.rank)
    if highest != wanted_rank:
        raise InputError(
            f"{source}: its rank is {highest}, and the config's adapter.rank wants {wanted_rank}; "
            f"set it to {highest}."
        )
    padded = {}
    for path, (a, b) in wanted.items():
        factors, low = modules[path], lows[path]
        rank = factors.rank
        if rank > low.rank:
            raise InputError(
                f"{source}: {path} has the rank {rank}, and the config's adapter.rank and "
                f"adapter.rank_pattern give it {low.rank}; set them to the same."
            )
        expected = (rank, a.shape[1]), (b.shape[0], rank)
        if (factors.a.shape, factors.b.shape) != expected:
            raise InputError(
                f"{source}: {path} has A {factors.a.shape} and B {factors.b.shape}; this model "
                f"wants {expected[0]} and {expected[1]}. The adapter was made for another one."
            )
        factor = factors.scale / low.scale
        # alpha is a float32 in some files: what differs by rounding alone is the same scale.
        same = math.isclose(factor, 1.0, rel_tol=1e-6)
        a[:rank], b[:, :rank] = factors.a, factors.b if same else factors.b * np.float32(factor)
        padded[path] = a, b
    flat = layout.from_modules(padded)
    if layout.dora:
        magnitudes = {
            path: factors.magnitude
            for path, factors in modules.items()
            if factors.magnitude is not None
        }
        layout.set_magnitudes(flat, magnitudes)
    return flat


def _check_magnitudes(
    source: Path, modules: Mapping[str, SavedFactors], layout: AdapterLayout
) -> None:
    """Checks that an adapter has magnitudes where its layout has, each a number for every row.

    Raises:
        InputError: it has not.
    """
    for path, factors in modules.items():
        if (factors.magnitude is not None) != layout.dora:
            said = (
                "has no lora_magnitude_vector, and the config's adapter.variant is dora; set it to "
                "lora, or to rslora"
                if layout.dora
                else "has a lora_magnitude_vector; set adapter.variant to dora"
            )
            raise InputError(f"{source}: {path} {said}.")
        if factors.magnitude is not None and (
            factors.magnitude.shape != (len(factors.b),) or not np.isfinite(factors.magnitude).all()
        ):
            raise InputError(
                f"{source}: the lora_magnitude_vector of {path} does not have a number for each of "
                f"its {len(factors.b)} rows."
            )
