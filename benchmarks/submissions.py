"""How many dispatches a submission should have, and the first: a step's time, waited for and not.

    python benchmarks/submissions.py [--model SmolLM2-135M] [--batch-size 1] [--length 128]
        [--most 512 128 32] [--first 16 128]

The settings take turns, so that a drift of the clocks meets all of them; medians count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.sessions import Case, describe, markdown_table, shake_adapter
from lora.data.batches import Batch, sequential_batches
from lora.shaders import program
from lora.training.session import TrainingSession
from tests.support.synthetic_models import SHAPES, write_model
from tests.support.synthetic_runs import as_examples, run_config

UNCUT = 10**9


Setting = tuple[int, int]  # the most dispatches of all submissions, and those of the first


def timed(session: TrainingSession, batches: list[Batch], setting: Setting, waited: bool) -> float:
    """Seconds a step of some steps under a setting."""
    program.MAX_SUBMISSION_DISPATCHES, program.FIRST_SUBMISSION_DISPATCHES = setting
    session.finished_steps(wait=True)
    start = time.perf_counter()
    for batch in batches:
        session.step([batch])
        session.finished_steps(wait=waited)
    session.finished_steps(wait=True)
    return (time.perf_counter() - start) / len(batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["SmolLM2-135M"])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--precision", nargs="+", default=["f32", "f16"])
    parser.add_argument("--most", type=int, nargs="+", default=[UNCUT, 512, 256, 128, 64, 32])
    parser.add_argument("--first", type=int, nargs="+", default=[UNCUT, 16])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="a folder for submissions-*.json")
    options = parser.parse_args()
    case = Case(options.batch_size, options.length, 4)
    for model in options.model:
        for precision in options.precision:
            measure(model, case, precision, options)


def measure(model: str, case: Case, precision: str, options: argparse.Namespace) -> None:
    """Prints and keeps one table."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_model(path, SHAPES[model])
        config = run_config(
            path, batch_size=case.batch_size, length=case.length, steps=10**6, precision=precision
        )
        with TrainingSession(config, examples=as_examples(case.data(model))) as session:
            time_session(session, model, case, precision, options)


def time_session(
    session: TrainingSession, model: str, case: Case, precision: str, options: argparse.Namespace
) -> None:
    """The same of a session that is open."""
    shake_adapter(session)
    batches = list(sequential_batches(session.workload.train_examples, case.batch_size))
    settings = [(most, first) for most in options.most for first in options.first]
    for setting in settings:
        timed(session, batches, setting, True)
    found: dict[tuple[Setting, bool], list[float]] = {}
    for _ in range(options.rounds):
        for setting in settings:
            for waited in (True, False):
                seconds = timed(session, batches, setting, waited)
                found.setdefault((setting, waited), []).append(seconds)
    middle = {key: 1e3 * statistics.median(values) for key, values in found.items()}
    n = sum(len(p.dispatches) for p in session.step_programs())
    print(f"\n{model} {case} {precision}, {n} dispatches a step, {describe(session.device)}\n")
    rows = [
        [
            *("uncut" if n == UNCUT else n for n in setting),
            *(f"{middle[setting, w]:.2f}" for w in (True, False)),
        ]
        for setting in settings
    ]
    header = ["most dispatches", "of the first", "ms waited for", "ms not"]
    print("\n".join(markdown_table(header, rows)))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        contents = {
            "model": model, "case": str(case), "precision": precision, "dispatches": n,
            "device": describe(session.device), "rounds": options.rounds,
            "ms": [
                {"most": most, "first": first, "waited": waited, "median": value}
                for ((most, first), waited), value in middle.items()
            ],
        }  # fmt: skip
        name = f"submissions-{model}-{case}-{precision}.json"
        (options.output / name).write_text(json.dumps(contents, indent=1) + "\n")


if __name__ == "__main__":
    main()
