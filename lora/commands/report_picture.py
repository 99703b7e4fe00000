"""The picture of `lora report`, drawn by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from lora.commands.report_data import Chart, Run, value_range
from lora.shaders.errors import InputError
from lora.storage.files import write_file

_STYLES: dict[str, dict[str, Any]] = {
    "faint": {"alpha": 0.3, "linewidth": 1.0},
    "line": {"linewidth": 2.0},
    "points": {"marker": "o", "linestyle": "--", "linewidth": 1.5},
}


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def write_picture(path: Path, runs: Sequence[Run], shown: Sequence[Chart]) -> None:
    """Draws the charts into a PNG.

    Args:
        path: the file; a PNG that is there is replaced.
        runs: in their order.
        shown: their charts.

    Raises:
        InputError: matplotlib is not installed, the name is no PNG's, or it can't be written.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"--png: {path} is no name of a PNG; it ends in .png.")
    if not can_draw():
        raise InputError("--png: matplotlib draws it: pip install 'webgpu-lora[report]'.")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    n_rows = (len(shown) + 1) // 2
    figure = Figure(figsize=(11, 3.2 * max(n_rows, 1)), layout="constrained", dpi=120)
    for place, chart in enumerate(shown):
        axes = figure.add_subplot(n_rows, 2 if len(shown) > 1 else 1, place + 1)
        for curve in chart.curves:
            label = None
            if curve.kind != "faint":
                label = f"{runs[curve.run].name}, {curve.name}" if len(runs) > 1 else curve.name
            style = _STYLES[curve.kind]
            axes.plot(curve.xs, curve.ys, color=f"C{curve.run % 10}", label=label, **style)
        axes.set_title(chart.title)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
        if chart.form.endswith("%"):
            ys = np.concatenate([curve.ys for curve in chart.curves])
            axes.set_ylim(*value_range(chart, float(ys.min()), float(ys.max())))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(alpha=0.3)
        if place == 0:
            axes.legend(fontsize="small")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    try:
        write_file(path, drawn.getvalue())
    except OSError as error:
        raise InputError(f"--png: {path} cannot be written ({error.strerror}).") from error
