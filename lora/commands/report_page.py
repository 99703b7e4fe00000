"""The page of `lora report`: one file that needs no other, for screens of any width."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from lora.commands.report_data import Chart, Curve, Run, flat, ticks, value_range
from lora.commands.summary import summary_rows_of
from lora.shaders.errors import InputError
from lora.storage.files import write_file

FIRST_LINE = "<!doctype html><!-- written by lora report -->"
_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_COLOURS = 8  # that the page's style has; further runs begin again
_SHOWN_STEPS = 12  # of the answers to a prompt


def write_page(path: Path, runs: Sequence[Run], shown: Sequence[Chart]) -> None:
    """Writes the page.

    Args:
        path: the file; one that was written here is replaced.
        runs: in their order.
        shown: their charts.

    Raises:
        InputError: another file is there, or it can't be written.
    """
    _check_replaceable(path)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        runs=[_run(run, place) for place, run in enumerate(runs)],
        charts=[drawn(chart, len(runs)) for chart in shown],
        settings=settings(runs),
        several=len(runs) > 1,
    )
    try:
        write_file(path, f"{FIRST_LINE}\n{page}")
    except OSError as error:
        raise InputError(f"--output: {path} cannot be written ({error.strerror}).") from error


def _check_replaceable(path: Path) -> None:
    """Refuses to write over what isn't ours."""
    if path.is_dir():
        raise InputError(f"--output: {path} is a directory; name a file, such as report.html.")
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(FIRST_LINE)) != FIRST_LINE.encode():
                raise InputError(f"--output: {path} is there already; name another file.")


def settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Of several runs, the keys in which they differ; of one, those that are no defaults."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    if len(runs) == 1:
        defaults, run = _defaults(), runs[0]
        return [
            (key, [_shown(value)])
            for key, value in run.config.items()
            if key not in defaults or defaults[key] != value
        ]
    found = []
    for key in keys:
        values = [run.config.get(key) for run in runs]
        if any(value != values[0] for value in values):
            found.append((key, [_shown(value) for value in values]))
    return found


def _defaults() -> dict[str, Any]:
    """The config's defaults by dotted key, of what has one."""
    from lora.config.schema import AdapterConfig, Config, TrainConfig

    found = flat({"adapter": AdapterConfig().model_dump(mode="json"),
                  "train": TrainConfig().model_dump(mode="json")})  # fmt: skip
    for name in ("device", "webgpu", "hub"):
        found[name] = Config.model_fields[name].default
    data = Config.model_fields["data"].annotation
    for name, field in getattr(data, "model_fields", {}).items():
        if name != "train":
            found[f"data.{name}"] = field.default
    found["model.tokenizer"] = None
    return found


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _run(run: Run, place: int) -> dict[str, Any]:
    return {
        "name": run.name,
        "colour": place % _COLOURS,
        "rows": summary_rows_of(run.history, run.best),
        "environment": _environment(run),
        "samples": _samples(run),
    }


def _environment(run: Run) -> dict[str, str]:
    ran = run.ran
    found = {
        name: str(ran[key])
        for name, key in (("device", "adapter"), ("backend", "backend"), ("driver", "driver"))
        if ran.get(key)
    }
    versions = ran.get("versions")
    if isinstance(versions, dict):
        found["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return found


def _samples(run: Run) -> list[dict[str, Any]]:
    """By prompt: the answers of some steps, the first and the last among them."""
    by_prompt: dict[str, list[tuple[int, str]]] = {}
    for line in run.samples:
        prompt = line["prompt"]
        if isinstance(prompt, list):
            parts = [m for m in prompt if isinstance(m, dict)]
            prompt = "\n".join(f"{m.get('role')}: {m.get('content')}" for m in parts)
        by_prompt.setdefault(str(prompt), []).append((line["step"], str(line["text"])))
    found = []
    for prompt, answers in by_prompt.items():
        chosen = np.unique(np.linspace(0, len(answers) - 1, _SHOWN_STEPS).round().astype(int))
        found.append({"prompt": prompt, "answers": [answers[place] for place in chosen]})
    return found


def drawn(chart: Chart, n_runs: int) -> dict[str, Any]:
    """A chart in parts of its width and height: lines, dots, and labels that no scale distorts."""
    xs = np.concatenate([curve.xs for curve in chart.curves])
    ys = np.concatenate([_central(curve) for curve in chart.curves])
    left, right = float(xs.min()), float(xs.max())
    low, high = value_range(chart, float(ys.min()), float(ys.max()))
    width = right - left or 1.0

    def across(x: float) -> float:
        return round(100 * (x - left) / width, 2)

    def down(y: float) -> float:
        return round(100 * (high - min(max(y, low), high)) / (high - low), 2)

    lines, dots = [], []
    for curve in chart.curves:
        places = [(across(x), down(y)) for x, y in zip(curve.xs, curve.ys, strict=True)]
        colour = curve.run % _COLOURS
        path = " ".join(f"{x * 10:g},{y * 10:g}" for x, y in places)
        lines.append({"points": path, "colour": colour, "kind": curve.kind})
        if curve.kind == "points" or len(places) == 1:
            dots += [
                {
                    "left": x,
                    "top": y,
                    "colour": colour,
                    "text": f"{curve.name}, step {step:g}: {format(value, chart.form)}",
                }
                for (x, y), step, value in zip(places, curve.xs, curve.ys, strict=True)
            ]
    return {
        "title": chart.title,
        "lines": lines,
        "dots": dots,
        "y": [(down(y), _label(y, chart.form)) for y in ticks(low, high) if low <= y <= high],
        "x": [(across(x), f"{x:g}") for x in ticks(left, right, 5) if x == int(x)],
        "kinds": list(dict.fromkeys(curve.kind for curve in chart.curves)),
    }


def _central(curve: Curve) -> np.ndarray:
    """What decides the height: of single steps not the few that fly off."""
    if curve.kind != "faint" or len(curve.ys) < 20:
        return curve.ys
    return np.quantile(curve.ys, [0.01, 0.99])


def _label(value: float, form: str) -> str:
    return f"{value:.0%}" if form.endswith("%") else f"{value:.4g}"
