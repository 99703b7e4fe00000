"""A tiny run whose adapter is known, and what became of it after a fault."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora.config.schema import load_config
from lora.shaders.device import Device
from lora.training.checkpoint import checkpoints
from lora.training.listeners import Listener
from lora.training.run import run_training
from lora.training.session import TrainingSession
from tests.support.tiny_run import write_run

ADAPTER = "adapter_model.safetensors"
STEPS = 40
_TRAIN = {"steps": STEPS, "save_every": 3, "eval_every": 7, "keep_checkpoints": 2}


@dataclass
class Tally:
    """A row of the table: what was done how often, and what came of it.

    Attributes:
        fault: in words.
        results: how often each thing happened.
        same: resumed adapters that are the whole run's, byte for byte.
        count: of faults.
        same_what: where that is something else.
    """

    fault: str
    results: dict[str, int] = field(default_factory=dict)
    same: int = 0
    count: int = 0
    same_what: str = ""

    def add(self, result: str, same: bool) -> None:
        """Counts one fault."""
        self.count += 1
        self.same += same
        self.results[result] = self.results.get(result, 0) + 1

    def row(self) -> str:
        """Of the table, in Markdown."""
        results = "; ".join(f"{number} × {result}" for result, number in self.results.items())
        same = f"{self.same} of {self.count}{self.same_what}"
        return f"| {self.fault} | {self.count} | {results} | {same} |"


class Case:
    """A folder with a model, data and a config; the run's adapter when nothing happens.

    Args:
        folder: new.
        train: keys of train: over those here.
    """

    def __init__(self, folder: Path, train: Mapping[str, object] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.config = write_run(folder, n_rows=30, train={**_TRAIN, **(train or {})})
        self.device = Device()
        self.adapter = b""
        whole = self.run("whole")
        self.adapter = (whole / ADAPTER).read_bytes()
        shutil.rmtree(whole)

    def session(self, output: Path, *settings: str) -> TrainingSession:
        """Of the run, on the one device of all."""
        return TrainingSession(
            load_config(str(self.config), [f"output={output}", *settings]), device=self.device
        )

    def run(self, name: str | Path, *settings: str, listener: Listener | None = None) -> Path:
        """Trains to the end in a directory."""
        output = self.folder / name
        with self.session(output, *settings) as session:
            return run_training(session, listeners=[] if listener is None else [listener])

    def is_mended(self, output: Path) -> bool:
        """Goes on as a user would, in this process; whether the adapter is the whole run's.

        With --resume where there is a checkpoint, else from the beginning.
        """
        resuming = bool(checkpoints(output))
        with self.session(output) as session:
            run_training(session, resuming=resuming)
        return (output / ADAPTER).read_bytes() == self.adapter

    def command(self, output: Path, *options: str) -> subprocess.Popen[str]:
        """`lora train` as a process of its own."""
        arguments = ["-m", "lora", "train", str(self.config), "--set", f"output={output}"]
        return subprocess.Popen(
            [sys.executable, *arguments, *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ),
        )  # fmt: skip


def quiet() -> None:
    """Keeps the lines of what is about to happen a thousand times from the terminal."""
    logging.getLogger("lora").setLevel(logging.ERROR)
    logging.getLogger("lora.shaders.choice").setLevel(logging.ERROR)
