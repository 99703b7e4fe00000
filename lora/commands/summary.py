"""What a run came to, as `lora train` says it at its end."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from lora.commands.progress import Pace, clock
from lora.commands.tables import print_rows
from lora.shaders.errors import plain
from lora.training.best import FOLDER as BEST
from lora.training.best import read_best
from lora.training.history import History, numbers
from lora.training.output import METRICS

if TYPE_CHECKING:
    from lora.config.schema import Config
    from lora.training.session import TrainingSession


def summary_rows(config: Config, output: Path) -> dict[str, str]:
    """Of a run's files: how long it took, losses, evaluations before and after, what lies where.

    Args:
        config: of the run.
        output: its directory.
    """
    rows = summary_rows_of(History.read(output / METRICS))
    metric = config.train.best_metric
    best = None if metric is None else read_best(output / BEST, metric)
    if best is not None:
        rows["best"] = f"{best.metric} {best.value:.4g} after step {best.step}, in {output / BEST}"
        if config.train.load_best_model_at_end:
            rows["best"] += "; the adapter below is this one"
    rows["adapter"] = str(output)
    return rows


def summary_rows_of(history: History, best: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Of a run's metrics, and of its best.json where that is to be said."""
    steps, evals = history.steps, history.evaluations
    rows: dict[str, str] = {}
    if steps:
        seconds, tokens = history.sum_of("seconds"), int(history.sum_of("tokens"))
        rows["trained"] = (
            f"{len(steps)} steps in {clock(seconds)} ({seconds / len(steps):.3g} s each), "
            f"{tokens:,} tokens, {int(history.sum_of('trained_tokens')):,} of them trained, "
            f"{tokens / max(seconds, 1e-9):,.0f} a second"
        )
        losses = [(line["loss"], line["step"]) for line in steps if line["loss"] is not None]
        if losses:
            least, at = min(losses)
            rows["loss"] = (
                f"{losses[0][0]:.4f} → {losses[-1][0]:.4f} (its moving average "
                f"{moving_average(loss for loss, _ in losses):.4f}), least {least:.4f} at step {at}"
            )
        skipped = sum(1 for line in steps if line.get("skipped"))
        if skipped:
            rows["skipped"] = f"{skipped} steps, whose loss or gradient was not finite"
        retried = sum(1 for line in steps if line.get("retried"))
        if retried:
            rows["retried"] = (
                f"{retried} steps, {int(history.sum_of('retried'))} times in all, whose gradients "
                "the loss scale made too large for f16"
            )
    if evals:
        rows["evaluation"] = _evaluation(evals)
        rows |= {f"  {name}": _evaluation(evals, f"{name}_") for name in _sets(evals[-1])}
    if best:
        rows["best"] = f"{best.get('metric')} {best.get('value'):.4g} after step {best.get('step')}"
    return rows


def moving_average(losses: Iterable[float]) -> float:
    """As the bar has it in the end."""
    pace = Pace()
    for loss in losses:
        pace.smooth(loss)
    return pace.mean_loss or 0.0


def _sets(line: Mapping[str, Any]) -> list[str]:
    """The named sets of an evaluation."""
    found = (re.fullmatch(r"eval_(.+)_perplexity", key) for key in line)
    return [match[1] for match in found if match]


def _evaluation(evals: Sequence[dict[str, Any]], of_set: str = "") -> str:
    """The first and the last one.

    Args:
        of_set: a named set's name and an underscore; "" for all together.
    """
    first, last = evals[0], evals[-1]
    shown = []
    for name, form in (("loss", "{:.4f}"), ("accuracy", "{:.1%}"), ("exact_match", "{:.1%}")):
        values = numbers([first, last], f"eval_{of_set}{name}")
        if len(values) == 2:
            before = "" if first is last else f"{form.format(values[0])} → "
            shown.append(f"{name.replace('_', ' ')} {before}{form.format(values[1])}")
    if of_set:
        return ", ".join(shown)
    steps = f"step {last['step']}" if first is last else f"steps {first['step']} and {last['step']}"
    return f"{', '.join(shown)} (after {steps})"


def next_commands(
    config: Config, given: Sequence[str], output: Path, *, chats: bool = False
) -> list[str]:
    """What one may want to do with the adapter.

    Args:
        config: of the run.
        given: the words of the command line that name the config.
        output: the run's directory.
        chats: whether its rows were chats.
    """
    of_model = [config.model.path, "--adapter", str(output)]
    commands = [
        ["lora", "chat", *of_model] if chats else ["lora", "generate", *of_model, "--prompt", "…"]
    ]
    if config.data.evaluates:
        commands.insert(0, ["lora", "eval", *given, "--adapter", str(output)])
    commands += [
        ["lora", "export", str(output), "--to", config.adapter.gguf_form],
        ["lora", "report", str(output)],
    ]
    return [shlex.join(words) for words in commands]


def print_summary(
    console: Console, session: TrainingSession, given: Sequence[str], output: Path
) -> None:
    """Prints what the run came to, and the commands to go on with."""
    config, chats = session.config, session.workload.trains_on_chats
    print_rows(console, summary_rows(config, output))
    console.print("Go on with:")
    for command in next_commands(config, given, output, chats=chats):
        console.print(Text(f"  {plain(command)}"), soft_wrap=True)  # to be copied as they are
