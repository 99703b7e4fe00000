"""Loggers of other tools behind the listener seam: TensorBoard, Weights & Biases, CSV."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lora.shaders.choice import say_once
from lora.shaders.errors import InputError
from lora.storage.files import write_file
from lora.training.listeners import Listener, Unhurried
from lora.training.metrics import EvalResult, Metrics, Sample

if TYPE_CHECKING:
    from lora.config.schema import Config

TENSORBOARD, CSV, WANDB = "tensorboard", "metrics.csv", "wandb"  # under the run's directory
WANDB_ID = "wandb_run_id.txt"
_PACKAGES = {"tensorboard": ("tensorboardX", "webgpu-lora[tensorboard]"),
             "wandb": ("wandb", "webgpu-lora[wandb]")}  # fmt: skip
# Of a step, by the names that Hugging Face's trainers log them under.
_STEP = {"loss": "train/loss", "learning_rate": "train/learning_rate",
         "grad_norm": "train/grad_norm", "epoch": "train/epoch",
         "tokens_per_second": "train/tokens_per_second"}  # fmt: skip


def check_reporters(config: Config) -> None:
    """Refuses `train.report_to` what isn't installed, before anything is loaded.

    Raises:
        InputError: a package is missing.
    """
    for name in config.train.report_to:
        package, requirement = _PACKAGES.get(name, (None, None))
        if package is not None and find_spec(package) is None:
            raise InputError(
                f"train.report_to: {name} needs the package {package}: pip install "
                f"'{requirement}', or leave {name} out."
            )


def open_reporters(config: Config) -> list[Listener]:
    """The listeners that `train.report_to` names, told of steps some at a time."""
    output = Path(config.output)
    made = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "csv": CSVFile}
    return [Unhurried(made[name](output)) for name in config.train.report_to]


def step_values(metrics: Metrics) -> dict[str, float]:
    """Of a step, by the names that loggers give them."""
    return {name: getattr(metrics, field) for field, name in _STEP.items()}


def eval_values(result: EvalResult) -> dict[str, float]:
    """Of an evaluation: eval_loss is eval/loss, eval_NAME_loss is eval/NAME_loss."""
    return {f"eval/{key.removeprefix('eval_')}": v for key, v in result.metrics().items()}


def prompt_text(sample: Sample) -> str:
    """What was asked, as one text."""
    if isinstance(sample.prompt, str):
        return sample.prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in sample.prompt)


class TensorBoard(Listener):
    """Event files under `tensorboard/`, written by tensorboardX.

    Args:
        output: the run's directory.
    """

    def __init__(self, output: Path) -> None:
        self._folder = output / TENSORBOARD
        self._writer: Any = None

    def started(self, session: Any) -> None:
        """Opens the file; what a resumed run does again takes the place of what was there."""
        self._session = session
        self._open(session.steps_done)

    def _open(self, steps_done: int) -> None:
        from tensorboardX import SummaryWriter  # not everyone has it
        from tensorboardX.proto.summary_pb2 import Summary

        self._summary, self._value = Summary, Summary.Value
        purge = {"purge_step": steps_done + 1} if steps_done else {}
        # A file's name has the second it was opened in; a run that goes on within the same one
        # would write over what was there. Readers take files in the order of their names.
        suffix = f".{len(list(self._folder.glob('events.out.tfevents.*'))):04d}"
        # Its thread writes; with room for ten, the default, several steps at once wait for that.
        self._writer = SummaryWriter(
            str(self._folder), max_queue=1000, flush_secs=10, filename_suffix=suffix, **purge
        )
        if not steps_done:
            self._writer.add_text("config", f"```yaml\n{self._session.config.dump_yaml()}```", 0)

    def step(self, metrics: Metrics) -> bool:
        """Writes a point of each curve."""
        self._add(step_values(metrics), metrics.step)
        return False

    def _add(self, values: dict[str, float], step: int) -> None:
        """Writes several as one event: a step of a small model takes a few milliseconds."""
        points = [self._value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.file_writer.add_summary(self._summary(value=points), step)

    def evaluated(self, step: int, result: EvalResult) -> bool:
        """The same, and what is read at once."""
        self._add(eval_values(result), step)
        self._writer.flush()
        return False

    def sampled(self, step: int, samples: Sequence[Sample]) -> None:
        """Writes the answers as texts."""
        for number, sample in enumerate(samples):
            text = f"{prompt_text(sample)}\n\n---\n\n{sample.text}"
            self._writer.add_text(f"samples/{number}", text, step)

    def rewound(self, step: int) -> None:
        """A file that begins again behind a step."""
        self._writer.close()
        self._open(step)

    def ended(self, error: BaseException | None) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases(Listener):
    """A run of wandb, under `wandb/`; WANDB_PROJECT, WANDB_MODE and the others hold.

    A resumed run goes on under its id. One that is offline (`WANDB_MODE=offline`) is sent later,
    by `wandb sync`.

    Args:
        output: the run's directory.
    """

    def __init__(self, output: Path) -> None:
        self._output = output
        self._run: Any = None

    def started(self, session: Any) -> None:
        """Opens the run."""
        import wandb  # not everyone has it

        file = self._output / WANDB_ID
        with suppress(OSError):
            known = file.read_text().strip() if session.steps_done else None
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "webgpu-lora"),
                name=os.environ.get("WANDB_NAME", self._output.name),
                id=known if session.steps_done and file.exists() else None,
                resume="allow" if session.steps_done else None,
                dir=str(self._output),
                config=session.config.model_dump(mode="json"),
            )
        except Exception as error:  # nobody logged in, no connection: wandb's own, of many classes
            raise InputError(
                f"train.report_to: wandb cannot begin a run ({error}). Log in with `wandb login`, "
                "set WANDB_MODE=offline, or leave wandb out."
            ) from error
        write_file(file, f"{self._run.id}\n")

    def step(self, metrics: Metrics) -> bool:
        """Logs the step."""
        self._run.log(step_values(metrics), step=metrics.step)
        return False

    def evaluated(self, step: int, result: EvalResult) -> bool:
        """Logs the evaluation, of the same step."""
        self._run.log(eval_values(result), step=step)
        return False

    def sampled(self, step: int, samples: Sequence[Sample]) -> None:
        """Logs the answers as a table."""
        import wandb

        rows = [[prompt_text(sample), sample.text] for sample in samples]
        self._run.log({"samples": wandb.Table(["prompt", "answer"], data=rows)}, step=step)

    def ended(self, error: BaseException | None) -> None:
        """Ends the run."""
        if self._run is not None:
            self._run.finish(exit_code=0 if error is None else 1)


class CSVFile(Listener):
    """`metrics.csv`: a row a step, and a row an evaluation, with the columns of metrics.jsonl.

    Args:
        output: the run's directory.
    """

    def __init__(self, output: Path) -> None:
        self._path = output / CSV
        self._file: TextIO | None = None
        self._columns: list[str] = []

    def started(self, session: Any) -> None:
        """Opens the file, behind what a resumed run has there."""
        sets = session.workload.eval_sets
        metrics = Metrics(1, 0.0, 0.0, 0.0, 0.0, 0, 0, 0.0, 0.0).as_dict()
        result = EvalResult(0.0, 1.0, 0.0, 0.0, 0, 1, 0, 0)
        names = EvalResult(**{**vars(result), "sets": dict.fromkeys(sets, result)}).metrics()
        self._columns = [*metrics, *(names if session.workload.eval_examples else {})]
        self._open(session.steps_done)

    def _open(self, steps_done: int) -> None:
        kept = []
        if steps_done and self._path.exists():
            with open(self._path, newline="", errors="replace") as file:
                for row in csv.DictReader(file):
                    if (row.get("step") or "").isdecimal() and int(row["step"]) <= steps_done:
                        kept.append(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(kept)
        write_file(self._path, text.getvalue())
        self._file = open(self._path, "a", newline="")  # noqa: SIM115 (closed in `ended`)
        self._writer = csv.DictWriter(self._file, self._columns, extrasaction="ignore")

    def _write(self, *rows: dict[str, Any]) -> None:
        try:
            self._writer.writerows(rows)
            if self._file is not None:
                self._file.flush()
        except OSError as error:  # a line of metrics is not worth a run
            say_once(f"{self._path} cannot be written ({error.strerror}): the run goes on without.")

    def step(self, metrics: Metrics) -> bool:
        """Writes the step."""
        self._write(metrics.as_dict())
        return False

    def several(self, steps: Sequence[Metrics]) -> None:
        """Writes them at once."""
        self._write(*(metrics.as_dict() for metrics in steps))

    def evaluated(self, step: int, result: EvalResult) -> bool:
        """Writes the evaluation."""
        self._write({"step": step, **result.metrics()})
        return False

    def rewound(self, step: int) -> None:
        """Takes out the rows of steps that are run again."""
        self.ended(None)
        self._open(step)

    def ended(self, error: BaseException | None) -> None:
        """Closes the file."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
