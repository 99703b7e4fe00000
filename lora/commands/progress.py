"""What a run shows on the terminal."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from lora.data.order import DataStream
from lora.forward.model.adaptable import HEAD
from lora.forward.model.adapter import AdapterLayout
from lora.shaders.errors import plain
from lora.training.device_state import SessionPlan
from lora.training.listeners import Listener
from lora.training.metrics import EvalResult, Metrics
from lora.training.session import TrainingSession


def _recompute(plan: SessionPlan) -> str:
    """on, off, or of how many layers."""
    layout = plan.workload.layout
    layers = layout.architecture.n_layers - layout.lowest_layer
    count = plan.tensors.recomputed
    return "off" if count == 0 else "on" if count >= layers else f"of {count} of {layers} layers"


def print_plan(console: Console, plan: SessionPlan, *, seconds_a_step: float | None = None) -> None:
    """What is about to be trained: device, adapter, data, memory by purpose, time."""
    workload, allocated = plan.workload, plan.allocated
    layout, config = workload.layout, workload.config
    stream = workload.stream()
    total_steps = stream.total_steps
    memory = ", ".join(
        f"{name} {size / 2**20:.0f}" for name, size in allocated.items() if size >> 20
    )
    rows = {
        "device": escape(plain(f"{plan.facts.name}, through {plan.facts.software}")),
        "model": f"{escape(plain(config.model.path))} ({layout.architecture.name}, "
        f"{layout.architecture.n_layers} layers)",
        "adapter": f"{layout.n_trainable:,} parameters: rank {layout.rank} on "
        f"{_targets_shown(layout)} of {len(layout.layers)} layers",
        "data": escape(plain(str(workload.streamed or workload.train_summary))),
        "steps": f"{total_steps}, micro-batches of at most {workload.maximum_rows} tokens, "
        f"recompute {_recompute(plan)}",
        "memory (MiB)": f"{sum(allocated.values()) / 2**20:.0f}: {memory}",
    }
    if (bare := _bare_mixers(layout)) is not None:
        rows["not adapted"] = bare
    if workload.share.size > 1:
        rows["processes"] = (
            f"{workload.share.size}, which share {workload.micro_batches} micro-batches a step"
        )
    if layout.architecture.unused:
        rows["left alone"] = ", ".join(
            f"{what} ({n} tensors)" for what, n in layout.architecture.unused
        )
    if isinstance(stream, DataStream) and stream.packing_efficiency is not None:
        rows["packing"] = f"{stream.packing_efficiency:.1%} of the micro-batches' room is filled"
    if seconds_a_step is not None:
        minutes = seconds_a_step * total_steps / 60
        rows["time"] = f"about {seconds_a_step:.2g} s a step, {minutes:.2g} min in all"
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(f"[dim]{name}[/dim]", value)
    console.print(table)


_GONE = (OSError, SystemExit)  # a terminal that was closed; rich ends a process whose pipe broke


def _targets_shown(layout: AdapterLayout) -> str:
    """The adapted matrices; of those that some of the layers lack, in how many they are."""
    counts = Counter(m.module for group in layout.groups for m in group.members)
    n_layers = len(layout.layers)
    return ", ".join(
        name
        if counts[name] in (n_layers, 0) or name == HEAD.module
        else f"{name} (in {counts[name]})"
        for name in sorted(layout.targets)
    )


def _bare_mixers(layout: AdapterLayout) -> str | None:
    """Which layers' mixers are left out though others' are adapted; None where none are.

    The usual seven names are those of attention: in a model of other mixers they are few of all.
    """
    layers = layout.architecture.layers
    names = [[m.module for m in layers[layer].mixer.matrices] for layer in layout.layers]
    bare = [of for of in names if not layout.targets & set(of)]
    if not bare or len(bare) == len(names):
        return None
    missing = ", ".join(dict.fromkeys(name for of in bare for name in of))
    return (
        f"what mixes tokens in {len(bare)} of {len(names)} layers ({missing}); adapter.targets: "
        "all-linear adapts it"
    )


class TrainingProgress(Listener):
    """A live bar: steps, loss, tokens a second, time left; evaluations as lines above it.

    Where the output is no terminal, a line is printed for every tenth of the run.
    """

    def __init__(self, console: Console, session: TrainingSession) -> None:
        self._console = console
        self._session = session
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(40 if session.communicator.size == 1 else 8),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("{task.fields[rate]:,.0f} tokens/s{task.fields[ranks]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(
            "train", total=session.total_steps, loss=float("nan"), rate=0.0, ranks=""
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(*_GONE):
            self._progress.stop()

    def step(self, metrics: Metrics) -> bool:
        """Shows one step; a terminal or a reader that is gone doesn't end the run."""
        with suppress(*_GONE):
            self._show(metrics)
        return False

    def _show(self, metrics: Metrics) -> None:
        self._progress.update(
            self._task,
            completed=metrics.step,
            loss=metrics.loss,
            rate=metrics.tokens_per_second,
            ranks=self._ranks(metrics),
        )
        tenth = max(1, self._session.total_steps // 10)
        last = metrics.step == self._session.total_steps
        if not self._console.is_terminal and (metrics.step % tenth == 0 or last):
            self._console.print(
                f"step {metrics.step}/{self._session.total_steps}  loss {metrics.loss:.4f}  "
                f"{metrics.tokens_per_second:,.0f} tokens/s{self._ranks(metrics)}",
                highlight=False,
            )

    def _ranks(self, metrics: Metrics) -> str:
        """How several processes fared: whom the others waited for, and what communication took."""
        ranks = metrics.ranks
        if ranks is None:
            return ""
        host = self._session.communicator.hosts[ranks.slowest]
        return escape(
            plain(
                f" of {len(ranks.seconds)} ranks, slowest {ranks.slowest} on {host} "
                f"+{ranks.behind:.0%}, communication {ranks.communication:.0%}"
            )
        )

    def evaluated(self, step: int, result: EvalResult) -> bool:
        """Shows one evaluation."""
        with suppress(*_GONE):
            self._console.print(
                f"step {step}: eval loss {result.loss:.4f}, exact match "
                f"{result.n_exact}/{result.n_examples}",
                highlight=False,
            )
        return False
