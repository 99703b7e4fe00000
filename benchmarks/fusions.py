"""Whether a fusion pays: a step's time with it and without, in sessions that take turns.

    python benchmarks/fusions.py [--runs SmolLM2-135M:1x128,1x512 Llama-1.2B:1x128]
        [--precision f16 f32]

Each session is opened as its row says, all on one device; a drift of the clocks meets all of them,
and medians count. Tiles are those that the model of a product's time chooses. Losses show that all
compute the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.sessions import Case, describe, markdown_table, shake_adapter
from benchmarks.submissions import timed
from benchmarks.synthetic import write_models
from lora.data.batches import sequential_batches
from lora.forward.plans import matmul_tiles
from lora.shaders import program
from lora.shaders.device import Device
from lora.training.session import TrainingSession
from tests.support.synthetic_runs import as_examples, run_config

STEPS = 4  # of a turn


def _few_buffers(device: Device) -> AbstractContextManager[Any]:
    """As a device that binds too few buffers for gradients to wait."""
    return mock.patch.object(device, "facts", replace(device.facts, most_storage_buffers=8))


def _whole_gradient(_: Device) -> AbstractContextManager[Any]:
    """The gradient to the logits in f32, as products read it elsewhere."""
    return mock.patch("lora.forward.decoder.head.gradient_halves", lambda *_: False)


def _whole_stream(_: Device) -> AbstractContextManager[Any]:
    """No copy in f16 of the stream's gradient: products and low-rank kernels read the f32."""
    return mock.patch("lora.backward.scratch.takes_copies", lambda _: False)


def _whole_head_input(_: Device) -> AbstractContextManager[Any]:
    """What the head is given in f32, whose rows are sized by a dispatch for each chunk."""
    return mock.patch("lora.forward.decoder.head.takes_copies", lambda _: False)


def _z_apart(_: Device) -> AbstractContextManager[Any]:
    """The z of products after norms by dispatches of their own, however few rows there are."""
    return mock.patch("lora.forward.rmsnorm.MOST_LOW_BYTES", 0)


def _more_logits(_: Device) -> AbstractContextManager[Any]:
    """Twice as many rows of logits at once on matrix units, where a step has so many."""
    return mock.patch("lora.forward.decoder.head.MATRIX_CHUNK_ROWS", 1024)


@contextmanager
def _powers_of_two(_: Device) -> Iterator[None]:
    """A contraction over the vocabulary in 16 or 32 stretches."""
    with mock.patch.object(matmul_tiles.PlanSpace, "_filling", lambda *_: []):
        matmul_tiles.ranked_plans.cache_clear()
        yield
    matmul_tiles.ranked_plans.cache_clear()


# While a session is opened, what it leaves out.
VARIANTS: Mapping[str, Callable[[Device], AbstractContextManager[Any]]] = {
    "all fusions": lambda _: nullcontext(),
    "gradients of A and B apart from d_z": _few_buffers,
    "z apart from norms": _z_apart,
    "gradient to the logits in f32": _whole_gradient,
    "gradient of the stream in f32": _whole_stream,
    "the head's input in f32": _whole_head_input,
    "head's stretches in powers of two": _powers_of_two,
    "1,024 rows of logits at once": _more_logits,
}


def measure(path: Path, model: str, case: Case, precision: str, options: argparse.Namespace) -> str:
    """A table of one case; kept as JSON, too."""
    config = run_config(
        path, batch_size=case.batch_size, length=case.length, steps=10**6, precision=precision
    )
    # Else one session's plans would be all others', too.
    train = config.train.model_copy(update={"tuning": "off"})
    config = config.model_copy(update={"train": train})
    examples = as_examples(case.data(model))
    with ExitStack() as stack:
        device = stack.enter_context(Device())
        sessions = {}
        for name, without in VARIANTS.items():
            with without(device):
                session = TrainingSession(config, examples=examples, device=device)
            sessions[name] = stack.enter_context(session)
            shake_adapter(session)
        batches = list(sequential_batches(session.workload.train_examples, case.batch_size))
        found: dict[tuple[str, bool], list[float]] = {}
        most = program.MAX_SUBMISSION_DISPATCHES
        for turn in range(options.rounds + 1):  # the first warms up
            for name, session in sessions.items():
                for waited in (True, False):
                    seconds = timed(session, batches, most, waited)
                    if turn > 0:
                        found.setdefault((name, waited), []).append(seconds)
        rows, contents = [], []
        for name, session in sessions.items():
            n = sum(len(p.dispatches) for p in session.step_programs())
            loss = session.evaluate(examples[: case.batch_size]).loss
            ms = [1e3 * statistics.median(found[name, waited]) for waited in (True, False)]
            rows.append([name, n, *(f"{value:.3f}" for value in ms), f"{loss:.6f}"])
            contents.append({"variant": name, "dispatches": n, "ms": ms, "loss": loss})
        about = f"{model} {case} {precision}, {describe(device)}"
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        name = f"fusions-{model}-{case}-{precision}.json"
        (options.output / name).write_text(
            json.dumps({"case": about, "rounds": options.rounds, "rows": contents}, indent=1) + "\n"
        )
    head = ["step", "dispatches", "ms waited for", "ms not", "loss after"]
    return "\n".join([f"\n{about}\n", *markdown_table(head, rows)])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--runs", nargs="+", metavar="MODEL:BATCHxLENGTH,…",
        default=["SmolLM2-135M:1x128,1x512", "Llama-1.2B:1x128"],
    )  # fmt: skip
    parser.add_argument("--precision", nargs="+", default=["f16", "f32"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="a folder for fusions-*.json")
    options = parser.parse_args()
    runs = dict(run.split(":") for run in options.runs)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_models(Path(folder), list(runs))
        for model, sizes in runs.items():
            for size in sizes.split(","):
                batch_size, length = (int(n) for n in size.split("x"))
                for precision in options.precision:
                    case = Case(batch_size, length, STEPS)
                    print(measure(paths[model], model, case, precision, options), flush=True)


if __name__ == "__main__":
    main()
