"""What options of the adapter and of training cost: steps with each beside steps without, in turns.

Models are synthetic ones (benchmarks/synthetic.py). Every option has a session of its own on one
device, all are open at once, and rounds of steps alternate between them, each beginning with
another, so that a clock that changes meets all alike. Sessions of the very same kernels differ by
three percent by where their tensors lie, so that all are opened several times, in another order
each time. Steps are not waited for, as in training (`running_time`), and the first round of an
opening, in which a GPU reaches its clock, does not count. Printed: the median time of a step, its
ratio to that without options, and what the optimizer keeps.

    python benchmarks/options.py --shapes SmolLM2-135M:1x512 Llama-1.2B:4x512 --precision f16
    python benchmarks/options.py --shapes tiny:1x64 --seconds 0.1 --rounds 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.sessions import Case, describe, markdown_table, running_time, shake_adapter
from benchmarks.synthetic import write_models
from benchmarks.vs_peft import parse_shapes
from lora.config.schema import Config
from lora.shaders.device import Device
from lora.training.session import TrainingSession
from tests.support.synthetic_runs import as_examples, run_config

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "none": {},
    "dropout": {"adapter": {"dropout": 0.1}},
    "loraplus": {"adapter": {"loraplus_lr_ratio": 16.0}},
    "dora": {"adapter": {"variant": "dora"}},
    "rank_pattern": {"adapter": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 8.0}}},
    "trainable_tokens": {"adapter": {"trainable_tokens": [5, 6, 7, 8, 9, 10, 11, 12]}},
    "neftune": {"train": {"neftune_noise_alpha": 5.0}},
    "label_smoothing": {"train": {"label_smoothing": 0.1}},
    "dft": {"train": {"loss_type": "dft"}},
    "adamw_8bit": {"train": {"optimizer": "adamw_8bit"}},
    "lion": {"train": {"optimizer": "lion"}},
}


_BATCHES = 8  # of tokens of their own, that steps take in turns


def with_option(config: Config, name: str) -> Config:
    """A config with one of OPTIONS."""
    values = config.model_dump()
    for section, changes in OPTIONS[name].items():
        values[section] |= changes
    return Config.model_validate(values)


def measure(model: Path, name: str, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Times all options on one model and shape."""
    config = run_config(
        model, batch_size=case.batch_size, length=case.length, steps=case.steps,
        precision=options.precision, recompute=options.recompute,
    )  # fmt: skip
    configs = {option: with_option(config, option) for option in options.options}
    examples = as_examples(case.data(name))
    found: dict[str, Any] = {option: {"seconds": []} for option in configs}
    order = list(configs)
    with Device() as device:
        for _ in range(options.openings):
            sessions = {}
            for option in order:
                before = device.allocated["optimizer"]
                session = TrainingSession(configs[option], examples=examples, device=device)
                shake_adapter(session)
                found[option]["optimizer_bytes"] = device.allocated["optimizer"] - before
                sessions[option] = session, list(session.stream or ())
            for turn in range(1 + options.rounds):
                for option in order:
                    taken = running_time(*sessions[option], options.seconds)
                    if turn > 0:
                        found[option]["seconds"].append(taken)
                order = [*order[1:], order[0]]
            for session, _ in sessions.values():
                session.close()
        found["device"] = describe(device)
    return found


def report(title: str, found: dict[str, Any], precision: str) -> None:
    """Prints a table: medians over all rounds, and their ratios."""
    usual, rows = found["none"], []
    usual_time = statistics.median(usual["seconds"])
    for option in OPTIONS:
        if option not in found:
            continue
        one = found[option]
        seconds = statistics.median(one["seconds"])
        memory = one["optimizer_bytes"] / usual["optimizer_bytes"]
        ratio = f"{100 * (seconds / usual_time - 1):+.1f}%"
        rows.append([option, f"{1e3 * seconds:.2f}", ratio, f"{100 * memory:.1f}%"])
    header = ["option", "ms a step", "cost", "optimizer's memory"]
    print(f"\n{title}, {precision}, {found['device']}\n", flush=True)
    print("\n".join(markdown_table(header, rows)), flush=True)


def main() -> None:
    """Parses the command line and runs it."""
    parser = argparse.ArgumentParser()
    # fmt: off
    parser.add_argument("--shapes", nargs="+", metavar="MODEL:BATCHxLENGTH,…",
                        default=["SmolLM2-135M:1x512", "Llama-1.2B:4x512"])
    parser.add_argument("--options", nargs="+", default=list(OPTIONS), choices=OPTIONS)
    parser.add_argument("--precision", default="f32", choices=("f32", "f16"))
    parser.add_argument("--recompute", default="off", choices=("on", "off"))
    parser.add_argument("--seconds", type=float, default=0.3, help="of an option in a round")
    parser.add_argument("--openings", type=int, default=3, help="of all sessions")
    parser.add_argument("--rounds", type=int, default=3, help="of an opening, that count")
    parser.add_argument("--output", type=Path, help="a JSON file for all that was measured")
    # fmt: on
    options = parser.parse_args()
    options.options = list(dict.fromkeys(["none", *options.options]))
    every = {}
    cases = parse_shapes(options.shapes, _BATCHES)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_models(Path(folder), cases)
        for name, of_model in cases.items():
            for case in of_model:
                found = measure(paths[name], name, case, options)
                every[f"{name} {case}"] = found
                report(f"{name} {case}", found, options.precision)
    if options.output is not None:
        options.output.write_text(json.dumps(every, indent=1) + "\n")


if __name__ == "__main__":
    main()
