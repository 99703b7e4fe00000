"""What watching a run costs: an evaluation against its kernels, listeners against a step.

    python benchmarks/watching.py [--model SmolLM2-135M] [--rows 200] [--length 40] [--steps 400]

The evaluation is of short rows of random tokens, timed by the clock after a warm-up (the middle of
some), against the timestamps of the same micro-batches' kernels. The listeners are those of a run
with every logger (metrics.jsonl, the bar, CSV, TensorBoard where it is installed); what each step's
metrics cost them is added up, over the time of steps of 1 × 128.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from rich.console import Console

from benchmarks.sessions import describe, shake_adapter
from lora.commands.progress import TrainingProgress
from lora.config.schema import Config
from lora.data.batches import full_batches
from lora.data.examples import Example
from lora.training.listeners import Audience, MetricsFile, Unhurried
from lora.training.metrics import Metrics
from lora.training.reporters import CSVFile, TensorBoard
from lora.training.session import TrainingSession
from tests.support.synthetic_models import SHAPES, write_model
from tests.support.synthetic_runs import as_examples, random_sequences, run_config

REPEATS = 5


def eval_seconds(session: TrainingSession, examples: list[Example]) -> tuple[float, float, int]:
    """By the clock, of the kernels alone, and how many micro-batches it took."""
    session.evaluate(examples)
    clock = statistics.median(_timed(session, examples) for _ in range(REPEATS))
    evaluator = session._evaluator
    assert evaluator is not None  # it has evaluated
    programs = session._programs.prefix, evaluator._program(True)
    rows, targets = session.inputs.rows.maximum, session.workload.maximum_targets
    batches = list(full_batches(examples, rows, targets))
    kernels = 0.0
    for batch in batches:
        found = []
        for _ in range(REPEATS):
            session.write_inputs(batch)
            found.append(sum(k.seconds for program in programs for k in program.time()))
        kernels += statistics.median(found)
    return clock, kernels, len(batches)


def _timed(session: TrainingSession, examples: list[Example]) -> float:
    started = time.perf_counter()
    session.evaluate(examples)
    return time.perf_counter() - started


class Timed(Audience):
    """Adds up what the others take for steps."""

    seconds = 0.0

    def step(self, metrics: Metrics) -> bool:
        """Tells all, by the clock."""
        started = time.perf_counter()
        asked = super().step(metrics)
        self.seconds += time.perf_counter() - started
        return asked

    def ended(self, error: BaseException | None) -> None:
        """Adds what the last steps take that wait to be told; not the closing of files."""
        started = time.perf_counter()
        for listener in self._listeners:
            if isinstance(listener, Unhurried):
                listener._tell()
        self.seconds += time.perf_counter() - started
        super().ended(error)


def listener_seconds(config: Config, examples: list[Example]) -> tuple[float, float]:
    """A step's, and what the listeners took of it."""
    train = config.train.model_copy(update={"save_every": None})
    config = config.model_copy(update={"train": train})
    with tempfile.TemporaryDirectory() as folder, TrainingSession(config, examples=examples) as run:
        output = Path(folder)
        console = Console(file=io.StringIO(), force_terminal=True, width=80)
        with TrainingProgress(console) as progress:
            writers = [MetricsFile(output / "metrics.jsonl"), CSVFile(output)]
            if find_spec("tensorboardX") is not None:
                writers.append(TensorBoard(output))
            timed = Timed([progress, *map(Unhurried, writers)])
            seconds = [m.seconds for m in run.train([timed])]
    return statistics.median(seconds), timed.seconds / len(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="SmolLM2-135M", choices=list(SHAPES))
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--length", type=int, default=40, help="tokens of a row of the evaluation")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--precision", default="f32")
    options = parser.parse_args()
    vocab_size = SHAPES[options.model].vocab_size
    short = as_examples(random_sequences(vocab_size, options.rows, options.length))
    long = as_examples(random_sequences(vocab_size, options.steps, 128))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_model(path, SHAPES[options.model])
        several = run_config(path, batch_size=4, length=128, steps=1, precision=options.precision)
        with TrainingSession(several, examples=long[:4]) as session:
            shake_adapter(session)
            clock, kernels, n_batches = eval_seconds(session, short)
            device = describe(session.device)
        one = run_config(
            path, batch_size=1, length=128, steps=options.steps, precision=options.precision
        )
        step, listening = listener_seconds(one, long)
    print(json.dumps({
        "model": options.model, "device": device, "precision": options.precision,
        "rows": options.rows, "micro_batches": n_batches,
        "evaluation_ms": round(1e3 * clock, 2), "kernels_ms": round(1e3 * kernels, 2),
        "evaluation_to_kernels": round(clock / kernels, 3),
        "step_ms": round(1e3 * step, 3), "listeners_ms": round(1e3 * listening, 4),
        "listeners_to_step": round(listening / step, 5),
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
