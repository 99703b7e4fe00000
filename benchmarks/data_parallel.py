"""Training by one process and by several, each on a device of its own, in one run under MPI.

Models have real ones' shapes with random quantized weights (benchmarks/synthetic.py), every rank
takes micro-batches of --size and --accumulation of them a step. Rank 0 trains alone first, while
the others wait without work; then all train together. So both numbers are of one machine within
minutes.

    mpiexec -n 2 python benchmarks/data_parallel.py --output results.json
    mpiexec -n 2 python benchmarks/data_parallel.py --models tiny --size 2x64 --steps 3 --shared

It prints a line a measurement, and a table at the end: tokens a second of one and of all, how near
that is to all times one, the step's milliseconds, the share of communication that is not hidden
behind the device's work, and what the exchange takes with nothing to hide behind (from the device
to the host, over MPI, back), for the f32 bytes of the gradient. --comm-dtype f16 halves what
travels.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.sessions import describe, markdown_table
from lora.data.batches import make_batch
from lora.shaders.choice import SHARED
from lora.shaders.device import Device
from lora.training.communicator import Communicator, SingleProcess
from lora.training.metrics import Metrics
from lora.training.placement import device_of
from lora.training.session import TrainingSession
from lora.training.watch import joined
from tests.support.synthetic_models import SHAPES, write_model
from tests.support.synthetic_runs import as_examples, random_sequences, run_config

MODELS = ("SmolLM2-135M", "Llama-1.2B", "Llama-8B")


Keep = Callable[[str, int, str, dict[str, Any]], None]


def measure(
    path: Path, name: str, options: argparse.Namespace, communicator: Communicator,
    device: Device, keep: Keep,
) -> None:  # fmt: skip
    """Times steps of one process or of all, the host running ahead as it does in training."""
    gc.collect()
    kind = "one rank" if communicator.size == 1 else f"{communicator.size} ranks"
    batch_size, length = map(int, options.size.split("x"))
    config = run_config(
        path, batch_size=batch_size, length=length, steps=1_000,
        precision=options.precision, recompute=options.recompute,
    )  # fmt: skip
    train = config.train.model_copy(update={"comm_dtype": options.comm_dtype})
    # A few sequences, again and again: what they say costs nothing.
    sequences = random_sequences(SHAPES[name].vocab_size, 4 * batch_size, length, communicator.rank)
    examples = as_examples(sequences)
    batches = [
        make_batch(examples[i : i + batch_size]) for i in range(0, len(examples), batch_size)
    ]
    # Opened with sequences that are the same for all, as data are.
    opened = as_examples(random_sequences(SHAPES[name].vocab_size, 4 * batch_size, length))
    with TrainingSession(
        config.model_copy(update={"train": train}),
        examples=opened, device=device, communicator=communicator,
    ) as session:  # fmt: skip
        for accumulation in options.accumulation:
            coming = cycle(batches)
            for _ in range(max(2, options.steps // 4)):
                session.step(list(islice(coming, accumulation)))
            session.finished_steps(wait=True)
            communicator.gather(None)
            begin = time.perf_counter()
            for _ in range(options.steps):
                session.step(list(islice(coming, accumulation)))
            done = session.finished_steps(wait=True)
            seconds = (time.perf_counter() - begin) / options.steps
            keep(name, accumulation, kind, _result(session, communicator, done, seconds))


def _result(
    session: TrainingSession, communicator: Communicator, done: list[Metrics], seconds: float
) -> dict[str, Any]:
    """What is told of some steps."""
    last, ranks = done[-1], [metrics.ranks for metrics in done if metrics.ranks is not None]
    result: dict[str, Any] = {
        "tokens_per_second": last.tokens / seconds,
        "ms": 1e3 * seconds,
        "gradient_MB": 4e-6 * session.layout.size,
        "loss": last.loss,
        "memory_MiB": session.device.allocated.total() / 2**20,
    }
    if not ranks:
        return result
    pieces, exchange = session._training().pieces, session._exchange
    assert exchange is not None
    alone = [exchange.run(pieces, time.perf_counter(), backward=False).total for _ in range(5)]
    return result | {
        "communication": statistics.median(one.communication for one in ranks),
        "waiting_for_slowest": statistics.median(one.behind for one in ranks),
        "pieces": len(pieces),
        "exchange_ms": 1e3 * min(alone),
        **{f"{name}_ms": 1e3 * value for name, value in asdict(exchange.host_seconds).items()},
        "alike": _alike(session, communicator),
    }


def _alike(session: TrainingSession, communicator: Communicator) -> bool:
    """Whether all ranks have the same adapter, to the last bit."""
    everyone = communicator.gather(session.parameters().tobytes())
    return all(theirs == everyone[0] for theirs in everyone)


def main() -> None:
    parser = argparse.ArgumentParser()
    # fmt: off
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=SHAPES)
    parser.add_argument("--size", default="4x512", metavar="BATCHxLENGTH", help="of a micro-batch")
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 4],
                        help="micro-batches of a rank in a step")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--precision", default="f16", choices=("f32", "f16"))
    parser.add_argument("--recompute", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--comm-dtype", default="f32", choices=("f32", "f16"))
    parser.add_argument("--shared", action="store_true", help="ranks may share a device")
    parser.add_argument("--output", type=Path, help="a JSON file, written after every measurement")
    # fmt: on
    options = parser.parse_args()
    with joined() as communicator:
        _run(options, communicator)


def _run(options: argparse.Namespace, communicator: Communicator) -> None:
    leads = communicator.rank == 0
    wanted = device_of(communicator, SHARED if options.shared else "auto", "auto")
    results: dict[str, Any] = {
        "settings": {key: str(value) for key, value in vars(options).items()},
        "ranks": communicator.size,
        "mpi": getattr(communicator, "name", "none"),
        "hosts": communicator.hosts,
        "cases": {},
    }

    def keep(name: str, accumulation: int, kind: str, result: dict[str, Any]) -> None:
        if not leads:
            return
        case = results["cases"].setdefault(f"{name} {options.size} x{accumulation}", {})
        case[kind] = result
        if options.output is not None:
            options.output.write_text(json.dumps(results, indent=1))
        rest = {key: round(value, 4) for key, value in result.items()}
        print(f"{name} x{accumulation} {kind}: {json.dumps(rest)}", flush=True)

    with Device(wanted) as device, tempfile.TemporaryDirectory() as folder:
        devices = communicator.gather(f"{wanted}: {describe(device)}")
        results["devices"] = devices
        if leads:
            print(f"{communicator.size} ranks, {results['mpi']}: {'; '.join(devices)}", flush=True)
        for name in options.models:
            path = Path(folder) / f"{name}.gguf"
            start = time.perf_counter()
            if leads:
                write_model(path, SHAPES[name])
                print(f"{name}: written in {time.perf_counter() - start:.0f} s", flush=True)
            path = communicator.wait_for(path)
            if leads:
                measure(path, name, options, SingleProcess(), device, keep)
            communicator.wait_for(None)
            if communicator.size > 1:
                measure(path, name, options, communicator, device, keep)
            if leads:
                path.unlink()
    if leads:
        print(table(results), flush=True)


def table(results: dict[str, Any]) -> str:
    """All cases."""
    n, rows = results["ranks"], []
    for case, kinds in results["cases"].items():
        one, every = kinds["one rank"], kinds.get(f"{n} ranks")
        if every is None:
            continue
        efficiency = every["tokens_per_second"] / (n * one["tokens_per_second"])
        rows.append(
            [
                case, f"{one['tokens_per_second']:,.0f}", f"{every['tokens_per_second']:,.0f}",
                f"{efficiency:.1%}", f"{one['ms']:.1f}", f"{every['ms']:.1f}",
                f"{every['communication']:.1%}", f"{every['waiting_for_slowest']:.1%}",
                f"{every['gradient_MB']:.1f}", f"{every['exchange_ms']:.1f}",
            ]
        )  # fmt: skip
    header = [
        "case", "tokens/s of 1", f"of {n}", f"of {n} times 1", "ms of 1", f"ms of {n}",
        "communication", "slowest behind", "MB", "ms of exchange alone",
    ]  # fmt: skip
    return "\n".join(markdown_table(header, rows))


if __name__ == "__main__":
    main()
