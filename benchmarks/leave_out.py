"""What each kind of kernel costs of a training step: all of a kind alone, or the step without it.

A timestamp around each dispatch ends what overlaps and, where kernels take microseconds, measures
the device at rest: its clock falls between them. Here commands run as in training, never waited
for. Alone: all dispatches of one kind, in their order, again and again, which repeats to a
hundredth. Left out (`--rounds`): the whole step and the step without the kind, in turns; the
difference is what it costs there, but a small one of two large times. What is computed then means
nothing, but kernels take as long whatever the numbers are.

    python benchmarks/leave_out.py --shapes SmolLM2-135M:1x512 --option none dropout dora
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.options import OPTIONS, with_option
from benchmarks.sessions import describe, markdown_table
from benchmarks.synthetic import write_models
from benchmarks.vs_peft import parse_shapes
from lora.shaders.program import Copy, Dispatch, Program
from lora.training.session import TrainingSession
from tests.support.synthetic_models import SHAPES
from tests.support.synthetic_runs import as_examples, random_sequences, run_config

Kind = tuple[str, str]  # the template, and what it does in the step
_WARM_UP = 2  # steps: every kernel is compiled
_LAUNCHES = 500  # in a pass, about


def kind_of(dispatch: Dispatch) -> Kind:
    """The template, and the last part of its label."""
    return dispatch.template, dispatch.label.split(".")[-1]


class Step:
    """The commands of a session's step, of which some run."""

    def __init__(self, session: TrainingSession) -> None:
        self._session = session
        self._programs = session.step_programs()
        self._commands: list[list[Dispatch | Copy]] = [list(p.commands) for p in self._programs]

    def kinds(self) -> Counter[Kind]:
        """How often each occurs."""
        return Counter(kind_of(d) for program in self._programs for d in program.dispatches)

    def whole(self, seconds: float) -> float:
        """Seconds of a step, run again and again for that long."""
        return self._time(lambda _: True, seconds)

    def alone(self, kind: Kind, seconds: float) -> float:
        """Those of one kind of dispatch, in passes of many, by the device's own clock: the host
        may take longer to encode them. The least of some passes that take that long together."""
        launches = [d.launch for p in self._programs for d in p.dispatches if kind_of(d) == kind]
        handle = self._session.device.memory.handle
        times = 1 + _LAUNCHES // len(launches)
        best, whole = math.inf, 0.0
        while best == math.inf or whole < seconds:
            encoder = handle.encoder()
            queries = handle.query_set(2)
            encoder.dispatches(launches * times, (queries, 0, 1))
            start, end = handle.submit_timed(encoder, queries, 2)
            taken = 1e-9 * max(end - start, 1)
            best, whole = min(best, taken / times), whole + taken
        return best

    def without(self, kind: Kind, seconds: float) -> float:
        """Those of the step without it."""
        return self._time(lambda c: not (isinstance(c, Dispatch) and kind_of(c) == kind), seconds)

    def _time(self, taken: Callable[[Dispatch | Copy], bool], seconds: float) -> float:
        for program, commands in zip(self._programs, self._commands, strict=True):
            program.commands = [command for command in commands if taken(command)]
        programs = [program for program in self._programs if program.commands]
        self._run(programs, 2)
        n, begun = 0, time.perf_counter()
        while n == 0 or time.perf_counter() - begun < seconds:
            self._run(programs, 8)
            n += 8
        found = (time.perf_counter() - begun) / n
        for program, commands in zip(self._programs, self._commands, strict=True):
            program.commands = commands
        return found

    def _run(self, programs: Sequence[Program], times: int) -> None:
        for _ in range(times):
            for program in programs:
                program.run()
        session = self._session
        session.device.memory.read(session.adapter.parameters.slice(0, 4))  # waits


def measure(path: Path, name: str, size: tuple[int, int], options: argparse.Namespace,
            option: str) -> dict[str, Any]:  # fmt: skip
    """Milliseconds of a whole step, and what each kind takes of it."""
    batch_size, length = size
    config = run_config(
        path, batch_size=batch_size, length=length, steps=_WARM_UP,
        precision=options.precision, recompute=options.recompute,
    )  # fmt: skip
    config = with_option(config, option)
    sequences = random_sequences(SHAPES[name].vocab_size, batch_size * _WARM_UP, length)
    with TrainingSession(config, examples=as_examples(sequences)) as session:
        list(session.train())
        step = Step(session)
        kinds = step.kinds()
        step.whole(0.5)  # a GPU that was idle takes that long to reach its clock
        whole = [step.whole(options.seconds)]
        alone = {kind: step.alone(kind, options.seconds) for kind in kinds}
        left_out: dict[Kind, list[float]] = {kind: [] for kind in kinds}
        for _ in range(options.rounds):
            for kind, found in left_out.items():
                whole.append(step.whole(options.seconds))
                found.append(whole[-1] - step.without(kind, options.seconds))
        rows = [
            {"kernel": kind[0], "label": kind[1], "calls": kinds[kind], "alone": 1e3 * alone[kind],
             "left_out": 1e3 * statistics.median(found) if found else None}
            for kind, found in left_out.items()
        ]  # fmt: skip
        return {
            "model": name,
            "size": f"{batch_size}x{length}",
            "option": option,
            "device": describe(session.device),
            "milliseconds": 1e3 * statistics.median(whole),
            "kernels": sorted(rows, key=lambda row: -alone[row["kernel"], row["label"]]),
        }


def section(found: dict[str, Any]) -> list[str]:
    """The Markdown of one."""
    rows = [
        [row["kernel"], "" if row["label"] == row["kernel"] else row["label"], row["calls"],
         f"{row['alone']:.3f}", f"{1e3 * row['alone'] / row['calls']:.1f}",
         "" if row["left_out"] is None else f"{row['left_out']:.3f}"]
        for row in found["kernels"]
    ]  # fmt: skip
    header = ["kernel", "in the step", "calls", "ms alone", "µs a call", "ms less without"]
    total = found["milliseconds"]
    return [
        f"## {found['model']} {found['size']}, {found['option']}: {total:.2f} ms a step", "",
        found["device"], "",
        *markdown_table(header, rows),
        "",
    ]  # fmt: skip


def main() -> None:
    """Parses the command line and runs it."""
    parser = argparse.ArgumentParser()
    # fmt: off
    parser.add_argument("--shapes", nargs="+", metavar="MODEL:BATCHxLENGTH,…",
                        default=["SmolLM2-135M:1x512"])
    parser.add_argument("--option", nargs="+", default=["none"], choices=OPTIONS)
    parser.add_argument("--precision", default="f16", choices=("f32", "f16"))
    parser.add_argument("--recompute", default="off", choices=("on", "off"))
    parser.add_argument("--seconds", type=float, default=0.1, help="of a kind")
    parser.add_argument("--rounds", type=int, default=0, help="of steps without a kind")
    parser.add_argument("--output", type=Path, help="a JSON file for all that was measured")
    # fmt: on
    options = parser.parse_args()
    every: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        cases = parse_shapes(options.shapes, 1)
        paths = write_models(Path(folder), cases)
        for name, of_model in cases.items():
            for case in of_model:
                for option in options.option:
                    size = case.batch_size, case.length
                    every.append(measure(paths[name], name, size, options, option))
                    print("\n".join(section(every[-1])), flush=True)
                    if options.output is not None:
                        options.output.write_text(json.dumps(every, indent=1) + "\n")


if __name__ == "__main__":
    main()
