"""What `lora report` shows: runs read from their files, and the curves that come of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora.config.yaml_file import read_yaml_mapping
from lora.shaders.errors import InputError
from lora.shaders.untrusted import read_json_object
from lora.training.best import FOLDER as BEST
from lora.training.best import RECORD
from lora.training.history import History
from lora.training.listeners import SAMPLES
from lora.training.output import METRICS, RUN
from lora.training.run import CONFIG

MOST_POINTS = 800  # of a curve: more are one line to the eye
SMOOTHING = 0.9  # of the loss's exponential moving average
_MOST_SAMPLES = 20_000  # lines that are read
_MOST_BYTES = 1 << 22
_MARGIN = 0.05  # above and below the curves, of their span
_KINDS = ("loss", "accuracy", "exact_match")  # of what is evaluated


@dataclass(frozen=True)
class Run:
    """A run's directory, read.

    Attributes:
        name: of the directory, made different from other runs' names.
        config: by dotted key, {} where there is none.
        samples: lines of samples.jsonl.
        ran: run.json.
        best: best.json; {} where there is none.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    history: History
    samples: list[dict[str, Any]]
    ran: dict[str, Any]
    best: dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        run: its place among the runs.
        xs, ys: steps and finite values.
        kind: "faint" (every step), "line", or "points" (evaluations, joined by a line).
    """

    run: int
    name: str
    xs: np.ndarray
    ys: np.ndarray
    kind: str


@dataclass(frozen=True)
class Chart:
    """Curves over the steps, of one quantity.

    Attributes:
        form: of its values, for `format`.
    """

    title: str
    curves: list[Curve]
    form: str = ".4g"


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads runs.

    Raises:
        InputError: a directory isn't there, or holds no run.
    """
    names = _names(folders)
    return [_read(folder, name) for folder, name in zip(folders, names, strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """As few last parts of the paths as tell them apart."""
    parts = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def _read(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such directory; name the output of a run.")
    history = History.read(folder / METRICS)
    if not history.steps and not history.evaluations:
        raise InputError(
            f"{folder}: holds no {METRICS} with steps in it; name the output of a run."
        )
    config: dict[str, Any] = {}
    if (folder / CONFIG).is_file():
        config = flat(read_yaml_mapping(folder / CONFIG))

    def optional(path: Path) -> dict[str, Any]:
        return read_json_object(path, _MOST_BYTES) if path.is_file() else {}

    return Run(
        name,
        folder,
        config,
        history,
        _samples(folder / SAMPLES),
        optional(folder / RUN),
        optional(folder / BEST / RECORD),
    )


def _samples(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if not path.is_file():
        return found
    with open(path, errors="replace") as file:
        for line in file:
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(values, dict) and {"step", "prompt", "text"} <= values.keys():
                found.append(values)
            if len(found) == _MOST_SAMPLES:
                break
    return found


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value and prefix.count(".") < 1 and key not in _WHOLE:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


_WHOLE = ("columns", "chat_template_kwargs", "eval", "train_on", "layers")  # values, no sections


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Loss with evaluations, learning rate, gradient norm, and what else was evaluated."""
    loss = Chart("loss", [])
    for place, run in enumerate(runs):
        xs, ys = points(run.history.steps, "loss")
        if len(xs):
            if len(xs) > 1:
                loss.curves.append(Curve(place, "each step", *thinned(xs, ys), "faint"))
            smooth = moving_average(ys)
            loss.curves.append(Curve(place, "training", *thinned(xs, smooth), "line"))
        xs, ys = points(run.history.evaluations, "eval_loss")
        if len(xs):
            loss.curves.append(Curve(place, "evaluation", *thinned(xs, ys), "points"))
    found = [loss]
    for title, key, form in (
        ("learning rate", "learning_rate", ".2g"),
        ("gradient norm", "grad_norm", ".3g"),
    ):
        curves = [
            Curve(place, title, *thinned(*points(run.history.steps, key)), "line")
            for place, run in enumerate(runs)
        ]
        found.append(Chart(title, curves, form))
    keys = {key for run in runs for line in run.history.evaluations for key in line}
    for key in sorted(keys - {"step", "eval_loss", "eval_seconds"}, key=_place):
        if not key.startswith("eval_") or key.endswith("perplexity"):
            continue  # the loss again
        curves = [
            Curve(place, key, *thinned(*points(run.history.evaluations, key)), "points")
            for place, run in enumerate(runs)
        ]
        form = ".1%" if key.endswith(("accuracy", "exact_match")) else ".4g"
        found.append(Chart(key.replace("_", " "), curves, form))
    kept = [Chart(c.title, [one for one in c.curves if len(one.xs)], c.form) for c in found]
    return [chart for chart in kept if chart.curves]


def _place(key: str) -> tuple[int, str]:
    """Of a metric among the charts: those of one kind together, of all sets before one set's."""
    for place, kind in enumerate(_KINDS):
        if key.endswith(kind):
            return place, "" if key == f"eval_{kind}" else key
    return len(_KINDS), key


def value_range(chart: Chart, low: float, high: float) -> tuple[float, float]:
    """What a chart shows of its values, from the least to the most; of shares none that is none."""
    margin = (high - low or abs(high) or 1.0) * _MARGIN
    low, high = low - margin, high + margin
    return (max(low, 0.0), min(high, 1.0)) if chart.form.endswith("%") else (low, high)


def points(lines: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a key, where they are finite numbers."""
    pairs = [
        (line["step"], float(line[key]))
        for line in lines
        if isinstance(line.get(key), int | float)
        and not isinstance(line[key], bool)
        and math.isfinite(line[key])
    ]
    return np.array([x for x, _ in pairs], float), np.array([y for _, y in pairs], float)


def moving_average(values: np.ndarray) -> np.ndarray:
    """Exponential, without its bias towards the zero that it begins with."""
    found, total, weight = np.empty(len(values)), 0.0, 0.0
    for place, value in enumerate(values):
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + 1 - SMOOTHING
        found[place] = total / weight
    return found


def thinned(xs: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS of a curve: means of its stretches; the ends stay."""
    if len(xs) <= MOST_POINTS:
        return xs, ys
    parts = np.array_split(np.arange(len(xs)), MOST_POINTS)
    means = [np.array([values[part].mean() for part in parts]) for values in (xs, ys)]
    for mean, values in zip(means, (xs, ys), strict=True):
        mean[0], mean[-1] = values[0], values[-1]
    return means[0], means[1]


def ticks(low: float, high: float, number: int = 4) -> list[float]:
    """Round numbers between two, about so many."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    step = 10.0 ** math.floor(math.log10(span / number))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= number)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]
