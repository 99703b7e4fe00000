"""What a run shows on the terminal while it goes on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lora.shaders.errors import for_terminal, plain
from lora.training.listeners import Listener
from lora.training.metrics import EvalResult, Metrics, Sample

if TYPE_CHECKING:
    from lora.training.exchange import StepOfRanks
    from lora.training.session import TrainingSession

_GONE = (OSError, SystemExit)  # a terminal that was closed; rich ends a process whose pipe broke
_SMOOTHING = 0.9  # of the loss's exponential moving average
_LAST_STEPS = 20  # whose time and tokens count for rates and the time left
_QUIET_SECONDS = 60  # without a terminal a line comes this often, however long a tenth takes
_KINDS = ("loss", "perplexity", "accuracy", "exact_match")  # of a set's metrics
_SHOWN_OF_A_SAMPLE = 300  # characters


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 0:01:05."""
    whole = int(seconds + 0.5)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def binary_size(n_bytes: float) -> str:
    """Bytes in the largest unit that they reach: 312 MiB, 1.3 GiB."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"


class Pace:
    """Loss, speed and time of a run as its steps come in."""

    def __init__(self) -> None:
        self.loss: float | None = None
        self._ema, self._weight = 0.0, 0.0
        self._last: deque[Metrics] = deque(maxlen=_LAST_STEPS)
        self._n_steps = 0

    def add(self, metrics: Metrics) -> None:
        """One step more."""
        self.loss = metrics.loss
        self._n_steps += 1
        if self._n_steps == 2:  # the first one compiles; it stood in for want of another
            self._last.clear()
        self._last.append(metrics)
        if not metrics.skipped:
            self.smooth(metrics.loss)

    def smooth(self, loss: float) -> None:
        """Takes a loss into the moving average."""
        self._ema = _SMOOTHING * self._ema + (1 - _SMOOTHING) * loss
        self._weight = _SMOOTHING * self._weight + 1 - _SMOOTHING

    @property
    def mean_loss(self) -> float | None:
        """The exponential moving average, without its bias towards the zero it begins with."""
        return self._ema / self._weight if self._weight else None

    @property
    def seconds_a_step(self) -> float | None:
        """Of the last steps; in the middle, since some wait for a kernel to be compiled."""
        return median(m.seconds for m in self._last) if self._last else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of the last steps."""
        seconds = sum(m.seconds for m in self._last)
        return sum(m.tokens for m in self._last) / seconds if seconds else None


def _ranks(ranks: StepOfRanks, hosts: Sequence[str]) -> list[str]:
    """How several processes fared: whom the others waited for, and what communication took."""
    return [
        f"{len(ranks.seconds)} ranks",
        f"slowest {ranks.slowest} on {plain(hosts[ranks.slowest])} +{ranks.behind:.0%}",
        f"communication {ranks.communication:.0%}",
    ]


class TrainingProgress(Listener):
    """A live bar; evaluations and samples as lines above it. Plain lines where no terminal is.

    A context manager that may begin before there is a session: `stage` says what is under way.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        # One that can't go back a line gets lines, too.
        self._is_live = console.is_terminal and not console.is_dumb_terminal
        self._session: TrainingSession | None = None
        self._begun = time.monotonic()
        self._stage: str | None = "Starting"
        self._pace = Pace()
        self._metrics: Metrics | None = None
        self._done, self._total, self._resumed_at = 0, 0, 0
        self._evaluating: tuple[int, int] | None = None
        self._answering = ""  # what is said while prompts are answered
        self._eval_seconds = 0.0  # of the last one: the first compiles
        self._best: str | None = None  # the metric whose best comes with the next evaluation
        self._stopping = False
        self._line_at = self._heard_at = self._begun
        self._live = Live(self, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        if self._is_live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(*_GONE):
            self._live.stop()

    def _print(self, line: str) -> None:
        """A line above the bar; a terminal or a reader that is gone doesn't end the run."""
        with suppress(*_GONE):
            text = Text(for_terminal(line))
            if self._is_live:
                self._console.print(text, highlight=False)
            else:
                self._console.print(text, highlight=False, soft_wrap=True)
            self._line_at = time.monotonic()

    @property
    def _elapsed(self) -> str:
        return clock(time.monotonic() - self._begun)

    # -- what it hears ------------------------------------------------------------------------

    def stage(self, what: str) -> None:
        """What is under way before the first step."""
        self._stage = what
        if not self._is_live:
            self._print(f"{self._elapsed}  {what}")

    def started(self, session: Any) -> None:
        """From here on there are steps."""
        self._session = session
        self._done = self._resumed_at = session.steps_done
        self._total = session.total_steps
        if self._done:
            self._print(f"Resumed: {self._done} of {self._total} steps were done before.")
            from lora.training.history import History, numbers
            from lora.training.output import METRICS  # which lora chat has no use for

            past = History.read(Path(session.config.output) / METRICS)
            for loss in numbers(past.steps, "loss"):  # the average goes on, too
                self._pace.smooth(loss)
        begins_with_it = session.config.train.eval_at_start and not self._done
        evaluates = begins_with_it and session.workload.eval_examples
        self.stage("Evaluating before the first step" if evaluates else "First step")

    def step(self, metrics: Metrics) -> bool:
        """Shows one step."""
        self._pace.add(metrics)
        self._heard_at = time.monotonic()
        self._metrics, self._stage, self._done = metrics, None, metrics.step
        tenth = max(1, self._total // 10)
        first = metrics.step == self._resumed_at + 1
        due = first or metrics.step % tenth == 0 or metrics.step == self._total
        quiet = time.monotonic() - self._line_at > _QUIET_SECONDS
        if not self._is_live and (due or quiet):
            self._print("  ".join([f"step {self._done}/{self._total}", *self._figures()]))
        return False

    def evaluating(self, step: int, done: int, total: int) -> None:
        """Shows how far it is."""
        self._evaluating = done, total

    def evaluated(self, step: int, result: EvalResult) -> bool:
        """Shows one evaluation."""
        self._evaluating, self._heard_at = None, time.monotonic()
        self._eval_seconds = result.seconds
        took = f" ({clock(result.seconds)})" if result.seconds >= 1 else ""
        for name, one in {"": result, **result.sets}.items():
            of_set = f" {name}:" if name else ""
            metrics = [f"eval_{name}_{kind}" if name else f"eval_{kind}" for kind in _KINDS]
            best = ", best so far" if self._best in metrics else ""
            self._print(
                f"step {step}:{of_set} eval loss {one.loss:.4f}, accuracy "
                f"{one.token_accuracy:.1%}, exact match {one.n_exact}/{one.n_examples}{best}"
                + ("" if name else took)
            )
        self._best = None
        if self._metrics is None and step == self._resumed_at:
            self.stage("First step")
        return False

    def improved(self, step: int, metric: str, value: float) -> None:
        """The evaluation that is told of next is the best."""
        self._best = metric if step > 0 else None

    def stopped_early(self, step: int, evaluations: int) -> None:
        """Says why the run ends."""
        times = "evaluation" if evaluations == 1 else f"{evaluations} evaluations"
        least = self._session.config.train.early_stopping_threshold if self._session else 0.0
        gain = f"gain above {least:g}" if least else "gain"
        self._print(f"step {step}: stops early, the last {times} brought no {gain}")

    def sampling(self, step: int, done: int, total: int) -> None:
        """Shows that the model is at it: an answer may take longer than a step."""
        self._answering = f"answering prompt {done + 1}/{total}"

    def sampled(self, step: int, samples: Sequence[Sample]) -> None:
        """Shows the answers, each on a line."""
        self._answering = ""
        for sample in samples:
            prompt = sample.prompt
            asked = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
            answer = sample.text
            if len(answer) > _SHOWN_OF_A_SAMPLE:
                answer = answer[:_SHOWN_OF_A_SAMPLE] + "…"
            self._print(f"step {step}: {asked.strip()!r} → {answer!r}")

    def stopping(self, signum: int) -> None:
        """Acknowledges Ctrl-C: the step under way may take its time."""
        if not self._stopping:
            self._stopping = True
            self._print(
                "Stopping after the step under way, with a checkpoint; once more stops at once."
            )

    def rewound(self, step: int) -> None:
        """The steps behind it come again."""
        self._done = step

    def standing(self) -> str:
        """How far it has come: for the one line of a run that is stopped."""
        found = f"step {self._done} of {self._total}"
        if self._metrics is not None:
            found += f" (loss {self._metrics.loss:.4f}"
            mean = self._pace.mean_loss
            found += ")" if mean is None else f", its moving average {mean:.4f})"
        return found

    # -- what it shows ------------------------------------------------------------------------

    def _figures(self) -> list[str]:
        """Of the run as it is, the most wanted first."""
        pace, metrics, session = self._pace, self._metrics, self._session
        found = []
        if metrics is not None:
            found.append(f"loss {metrics.loss:.4f}")
            if pace.mean_loss is not None:
                found.append(f"ema {pace.mean_loss:.4f}")
            found.append(f"lr {metrics.learning_rate:.2g}")
        if pace.tokens_per_second is not None:
            found.append(f"{pace.tokens_per_second:,.0f} tokens/s")
        if metrics is not None and metrics.ranks is not None and session is not None:
            found += _ranks(metrics.ranks, session.communicator.hosts)
        left = self._seconds_left()
        if left is not None and self._is_live:  # counts on while a step or an evaluation goes on
            expected = self._eval_seconds if self._evaluating else pace.seconds_a_step or 0.0
            left -= min(left, expected, time.monotonic() - self._heard_at)
        time_left = "" if left is None else f", {clock(left)} left"
        found.append(f"{self._elapsed}{time_left}")
        if session is not None:
            found.append(binary_size(sum(session.device.allocated.values())))
        if metrics is not None:
            found.append(f"epoch {metrics.epoch:.2f}")
        return found

    def _seconds_left(self) -> float | None:
        """By the last steps, and by the evaluations so far that there are more of."""
        seconds, session = self._pace.seconds_a_step, self._session
        if seconds is None or session is None:
            return None
        left = self._total - self._done
        every = session.config.train.eval_every
        n_evals = 0
        if session.workload.eval_examples:
            n_evals = max(1, left // every) if isinstance(every, int) else 1
        return left * seconds + (n_evals * self._eval_seconds if left else 0.0)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The bar, and figures in as many lines as they need."""
        width = options.max_width
        done, total = self._evaluating or (self._done, self._total)
        name = "eval " if self._evaluating else "step "
        if total:
            label, share = f"{name}{done}/{total} ", f" {done / total:4.0%}"
            row = Table.grid(expand=False)
            bar = ProgressBar(
                total=total, completed=done, width=max(4, width - len(label) - len(share) - 1)
            )
            row.add_row(Text(label), bar, Text(share))
            yield row
        figures = self._figures()
        if self._evaluating:
            figures = [f"after step {self._done}/{self._total}", *figures]
        elif self._answering:
            figures = [f"{self._answering} …", *figures]
        elif self._stage is not None:
            figures = [f"{self._stage} …", *figures]
        if self._stopping:
            figures = ["stopping …", *figures]
        line = ""
        for figure in figures:
            joined = f"{line} · {figure}" if line else figure
            if line and cell_len(joined) > width - 1:
                yield Text(line, style="dim", no_wrap=True, overflow="ellipsis")
                joined = figure
            line = joined
        yield Text(line, style="dim", no_wrap=True, overflow="ellipsis")

    def saved(self, step: int, path: Path) -> None:
        """Says where a checkpoint went, without a terminal."""
        if not self._is_live and path.parent.name == "checkpoints":
            self._print(f"step {step}: saved {path}")
