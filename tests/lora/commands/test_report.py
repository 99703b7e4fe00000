"""The page and the picture of `lora report`."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from lora.commands.cli import app
from lora.commands.report_data import (
    MOST_POINTS,
    charts,
    moving_average,
    points,
    read_runs,
    thinned,
    ticks,
)
from lora.commands.report_page import FIRST_LINE, drawn, settings
from lora.config.schema import load_config
from lora.shaders.errors import InputError
from tests.support.tiny_run import write_run


def write_history(folder: Path, n_steps: int = 30, **config: Any) -> Path:
    """A run's directory, without the run."""
    folder.mkdir(parents=True)
    lines = [{"step": 0, "eval_loss": 3.0, "eval_accuracy": 0.1, "eval_seconds": 1.0}]
    for step in range(1, n_steps + 1):
        lines.append({
            "step": step, "epoch": step / 10, "loss": 3 / step + 0.5, "grad_norm": 1.0,
            "learning_rate": 1e-3, "tokens": 100, "trained_tokens": 50,
            "tokens_per_second": 50.0, "seconds": 2.0,
        })  # fmt: skip
    lines.append({"step": n_steps, "eval_loss": 0.7, "eval_accuracy": 0.8, "eval_seconds": 1.0})
    lines.append({"step": n_steps, "eval_loss": None, "loss": None})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 31, "lo')  # a crash left half a line
    source = folder.parent / "source.yaml"
    source.write_text(yaml.safe_dump(
        {"model": {"path": "m.gguf"}, "data": {"train": "t.jsonl", "eval": "e.jsonl"},
         "output": str(folder), "train": config}))  # fmt: skip
    (folder / "config.yaml").write_text(load_config(str(source)).dump_yaml())
    sample = {"step": n_steps, "prompt": "<b>wake</b> me", "text": "<script>alert(1)</script>"}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (folder / "run.json").write_text(json.dumps({"adapter": "A GPU", "versions": {"numpy": "2"}}))
    return folder


class Page(HTMLParser):
    """What a page refers to, and the texts in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())


def report(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_one_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = write_history(tmp_path / "run", learning_rate=1e-3)
    done = report(run)
    assert done.exit_code == 0, done.output
    page = Page((run / "report.html").read_text())
    assert page.references == [] and "script" not in page.tags and "link" not in page.tags
    assert {"loss", "learning rate", "gradient norm", "eval accuracy"} <= set(page.texts)
    assert "<script>alert(1)</script>" in page.texts  # as text
    assert "Settings other than the defaults" in page.texts
    shown = dict(settings(read_runs([run])))
    assert shown["train.learning_rate"] == ["0.001"] and "train.seed" not in shown
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    assert report(run).exit_code == 0  # its own page is replaced
    (run / "report.html").write_text("mine")
    refused = report(run)
    assert isinstance(refused.exception, InputError) and "is there already" in str(
        refused.exception
    )


def test_several_runs(tmp_path: Path) -> None:
    """With what they differ in; of runs of one name the folders tell them apart."""
    runs = [
        write_history(tmp_path / "a" / "run", 30, learning_rate=1e-3),
        write_history(tmp_path / "b" / "run", 60, learning_rate=1e-4),
    ]
    read = read_runs(runs)
    assert [run.name for run in read] == ["a/run", "b/run"]
    assert dict(settings(read)) == {
        "train.learning_rate": ["0.001", "0.0001"], "output": [str(run) for run in runs]
    }  # fmt: skip
    loss = charts(read)[0]
    assert [(c.run, c.kind) for c in loss.curves] == [
        (place, kind) for place in (0, 1) for kind in ("faint", "line", "points")
    ]
    output = tmp_path / "both.html"
    assert report(*runs, "--output", output).exit_code == 0
    text = output.read_text()
    assert text.startswith(FIRST_LINE) and "a/run" in text and "Settings that differ" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "there is no such directory; name the output of a run"),
        (["."], "holds no metrics.jsonl with steps in it"),
        (["run", "--png", "x.jpg"], "is no name of a PNG"),
        (["run", "--output", "."], "is a directory; name a file"),
    ],
)
def test_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_history(tmp_path / "run")
    done = report(*arguments)
    assert isinstance(done.exception, InputError) and words in str(done.exception)


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora.commands.report_picture.find_spec", lambda _: None)
    run = write_history(tmp_path / "run")
    done = report(run)
    assert done.exit_code == 0 and "pip install 'webgpu-lora[report]'" in done.output
    assert not (run / "report.png").exists()
    refused = report(run, "--png", tmp_path / "x.png")
    assert isinstance(refused.exception, InputError)


def test_curves_keep_their_ends_and_means() -> None:
    xs, ys = np.arange(1.0, 50_001.0), np.random.default_rng(0).normal(size=50_000)
    few_xs, few_ys = thinned(xs, ys)
    assert len(few_xs) == MOST_POINTS
    assert (few_xs[0], few_xs[-1]) == (1.0, 50_000.0) and (few_ys[0], few_ys[-1]) == (ys[0], ys[-1])
    assert abs(few_ys[1:-1].mean() - ys.mean()) < 0.01
    assert moving_average(np.full(5, 2.0)) == pytest.approx(np.full(5, 2.0))
    lines: list[dict[str, Any]] = [
        {"step": 1, "loss": 1}, {"step": 2, "loss": None}, {"step": 3, "loss": float("inf")},
        {"step": 4, "loss": True}, {"step": 5},
    ]  # fmt: skip
    assert [list(part) for part in points(lines, "loss")] == [[1.0], [1.0]]


def test_round_ticks() -> None:
    assert ticks(0, 100, 5) == [0, 20, 40, 60, 80, 100]
    assert ticks(0.13, 0.47) == pytest.approx([0.2, 0.3, 0.4])
    assert ticks(3.0, 3.0) == [3.0]
    assert all(3 <= len(ticks(0, n)) <= 6 for n in (0.011, 1, 7, 33, 12345))


def test_charts_stay_in_their_frames(tmp_path: Path) -> None:
    """A run of one step, and a loss that flies off once, too."""
    short = write_history(tmp_path / "short", 1)
    wild = write_history(tmp_path / "wild", 100)
    text = (wild / "metrics.jsonl").read_text()
    (wild / "metrics.jsonl").write_text(re.sub(r'"step": 50, (.*?)"loss": [\d.]+',
                                               r'"step": 50, \1"loss": 1e9', text))  # fmt: skip
    for chart in charts(read_runs([short, wild])):
        made = drawn(chart, 2)
        numbers = [float(n) for line in made["lines"] for n in re.split("[ ,]", line["points"])]
        assert all(0 <= n <= 1000 for n in numbers)
        places = [dot[side] for dot in made["dots"] for side in ("left", "top")]
        assert all(0 <= place <= 100 for place in places) and made["y"]


def test_charts_of_several_sets(tmp_path: Path) -> None:
    """Kind by kind, all sets before each; and no axis with shares below none or above all."""
    run = write_history(tmp_path / "run")
    sets = {
        f"eval_{name}{kind}": value
        for name in ("", "b_", "a_")
        for kind, value in (("exact_match", 0.0), ("accuracy", 1.0), ("loss", 0.5))
    }
    with open(run / "metrics.jsonl", "w") as file:
        for step in (0, 5):
            file.write(json.dumps({"step": step, **sets}) + "\n")
    found = charts(read_runs([run]))
    assert [chart.title for chart in found] == [
        "loss", "eval a loss", "eval b loss",
        "eval accuracy", "eval a accuracy", "eval b accuracy",
        "eval exact match", "eval a exact match", "eval b exact match",
    ]  # fmt: skip
    for chart in found[3:]:
        labels = [int(label.removesuffix("%")) for _, label in drawn(chart, 1)["y"]]
        assert labels and all(0 <= label <= 100 for label in labels)
    (run / "samples.jsonl").write_text(json.dumps({"step": 5, "prompt": "hi", "text": " "}))
    assert report(run).exit_code == 0
    assert "nothing" in Page((run / "report.html").read_text()).texts


def test_the_report_of_a_run_that_ran(tmp_path: Path) -> None:
    path = write_run(tmp_path, train={"steps": 2})
    assert CliRunner().invoke(app, ["train", str(path)]).exit_code == 0
    assert report(tmp_path / "run").exit_code == 0
    page = Page((tmp_path / "run" / "report.html").read_text())
    ran = json.loads((tmp_path / "run" / "run.json").read_text())
    assert page.references == [] and ran["adapter"] in page.texts
