"""The examples run as they are, on a tiny model; the API page is made of the docstrings."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import lora
from tests.support.command_server import run_script
from tests.support.tiny_run import write_run

REPOSITORY = Path(__file__).parents[1]


def run(name: str, *arguments: object) -> str:
    done = run_script(REPOSITORY / "examples" / f"{name}.py", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here() -> None:
    text = Path(__file__).read_text()
    for path in (REPOSITORY / "examples").glob("*.py"):
        assert f'run("{path.stem}"' in text


def test_own_data(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    printed = run("own_data", path, "--output", tmp_path / "mine", "--steps", 3)
    assert re.search(r"^step 3: loss \d", printed, re.MULTILINE)
    assert (tmp_path / "mine" / "adapter_config.json").exists()


def test_own_loop(tmp_path: Path) -> None:
    """A rate so high that the evaluation gets worse is halved."""
    path = write_run(tmp_path, train={"learning_rate": 30.0, "steps": 8, "max_grad_norm": None})
    printed = run("own_loop", path, "--output", tmp_path / "mine", "--every", 2)
    assert len(re.findall(r": eval loss", printed)) == 4
    assert "the rate is 15 now" in printed
    assert (tmp_path / "mine" / "adapter_config.json").exists()


def test_evaluation(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    run("own_data", path, "--output", tmp_path / "mine", "--steps", 2)
    printed = run("evaluation", path, "--adapter", tmp_path / "mine")
    assert [line.split()[0] for line in printed.splitlines()] == ["base", "adapter", "mine"]


def test_sweep(tmp_path: Path) -> None:
    path = write_run(tmp_path, train={"steps": 4})
    printed = run("sweep", path, "--output", tmp_path / "s", "--rates", 0.001, 0.02)
    losses = [float(line.split()[0]) for line in printed.splitlines()]
    assert losses == sorted(losses) and "lr0.02-r8" in printed.splitlines()[0]
    assert (tmp_path / "s" / "lr0.001-r8" / "best" / "best.json").exists()


@pytest.mark.filterwarnings("ignore")  # pdoc's
def test_the_api_page(tmp_path: Path) -> None:
    """Every public name is on it, with its docstring."""
    pytest.importorskip("pdoc")
    called = re.search(r"-m pdoc ((?:.|\\\n)*?)--output", (REPOSITORY / "Makefile").read_text())
    assert called is not None
    documented = shlex.split(called[1].replace("\\\n", " "))
    done = subprocess.run(
        [sys.executable, "-m", "pdoc", *documented, "--output-directory", str(tmp_path)],
        capture_output=True, text=True, cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Warn" not in done.stderr, done.stderr
    page = (tmp_path / "lora.html").read_text()
    for name in lora.__all__:
        assert f'id="{name}"' in page or name == "__version__", name
    assert all(f'id="TrainingSession.{member}"' in page for member in ("train", "steps"))
    for member in ("evaluate", "generate", "save", "learning_rate"):  # of the classes below it
        (link,) = {
            (file, name)
            for file, name in re.findall(r'href="([^"#]+)#(\w+\.\w+)"', page)
            if name.endswith(f".{member}") and "training/" in file
        }
        assert f'id="{link[1]}"' in (tmp_path / link[0]).read_text(), member


def test_public_docstrings_have_examples() -> None:
    session = lora.TrainingSession
    for shown in (session.train, session.steps, session.evaluate, session.save, lora.Listener,
                  session.learning_rate, session.generate, lora.run_training, session.from_config,
                  lora.tokenize, lora.load_config):  # fmt: skip
        assert ">>>" in (shown.__doc__ or ""), shown


def test_the_names_of_the_api_exist() -> None:
    module = importlib.import_module("lora")
    assert all(getattr(module, name) is not None for name in lora.__all__)
