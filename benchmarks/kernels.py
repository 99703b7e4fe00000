"""Every kernel of a training step at real models' shapes: time, speed, share of the peaks.

Records the step of a real session over a synthetic model (benchmarks/synthetic.py) and times it
dispatch by dispatch with the device's timestamps, so that no shape is written down twice.

    python benchmarks/kernels.py [--model SmolLM2-135M Llama-1.2B] [--batch-size 1 4] [--length 512]
        [--precision f32 f16] [--recompute off] [--option dora]

--option is one of benchmarks/options.py: which kernels make it cost what it does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.options import OPTIONS, with_option
from benchmarks.sessions import describe, markdown_table
from benchmarks.synthetic import write_models
from lora.shaders.errors import InputError
from lora.training.profiling import kernel_table, measure_peaks
from lora.training.session import TrainingSession
from tests.support.synthetic_models import SHAPES
from tests.support.synthetic_runs import as_examples, random_sequences, run_config

WARM_UP = 2  # steps: every kernel is compiled, and the clocks are up


def time_step(
    model: Path, vocab_size: int, batch_size: int, length: int, precision: str, recompute: str,
    option: str = "none",
) -> dict[str, Any]:  # fmt: skip
    """The kernels of one training step and the device's peaks.

    Args:
        option: of benchmarks/options.py.

    Raises:
        InputError: the device has no timestamps, or can't compute in that precision.
    """
    config = run_config(
        model,
        batch_size=batch_size,
        length=length,
        steps=WARM_UP,
        precision=precision,
        recompute=recompute,
    )
    config = with_option(config, option)
    examples = as_examples(random_sequences(vocab_size, batch_size * WARM_UP, length))
    with TrainingSession(config, examples=examples) as session:
        list(session.train())
        kernels = kernel_table(session)
        return {
            "batch_size": batch_size,
            "length": length,
            "precision": precision,
            "recompute": recompute,
            "option": option,
            "device": describe(session.device),
            "peaks": asdict(measure_peaks(session.device)),
            "kernels": [asdict(row) for row in kernels],
        }


def section(timed: dict[str, Any]) -> list[str]:
    """The Markdown of one shape and precision."""
    peaks, total = timed["peaks"], sum(row["seconds"] for row in timed["kernels"])
    rows = []
    for row in timed["kernels"]:
        seconds = row["seconds"]
        flops, speed = row["flops"] / seconds, row["n_bytes"] / seconds
        rows.append([
            row["kernel"], "" if row["label"] == row["kernel"] else row["label"], row["calls"],
            f"{1e6 * seconds / row['calls']:.1f}", f"{1e3 * seconds:.2f}", f"{seconds / total:.1%}",
            f"{flops / 1e12:.3g}" if flops else "",
            f"{flops / peaks['flops']:.0%}" if flops else "",
            f"{speed / 1e9:.3g}", f"{speed / peaks['bytes_per_second']:.0%}",
        ])  # fmt: skip
    return [
        f"## {timed['batch_size']} × {timed['length']} tokens, {timed['precision']}, "
        f"recompute {timed['recompute']}{_named(timed)}: {1e3 * total:.2f} ms of GPU time a step",
        "",
        f"Peaks: {peaks['flops'] / 1e12:.3g} TFLOP/s in a product of our own, "
        f"{peaks['bytes_per_second'] / 1e9:.3g} GB/s in a copy.",
        "",
        *markdown_table(
            ["kernel", "in the step", "calls", "µs a call", "ms a step", "share",
             "TFLOP/s", "of peak", "GB/s", "of peak"],
            rows,
        ),
        "",
    ]  # fmt: skip


def _named(timed: dict[str, Any]) -> str:
    option = timed.get("option", "none")
    return "" if option == "none" else f", {option}"


def write_report(output: Path, name: str, timed: list[dict[str, Any]]) -> None:
    """Writes a model's sections so far as Markdown and all figures as JSON."""
    output.mkdir(parents=True, exist_ok=True)
    lines = [
        f"# The kernels of {name}",
        "",
        f"{timed[0]['device']}, through Vulkan, {date.today()}; random weights, LoRA of all linear "
        "layers. Each kind of dispatch at its best of five steps, each in a pass of its own. GB/s "
        "count all that is bound, once.",
        "",
        *(line for one in timed for line in section(one)),
    ]
    (output / f"kernels-{name}.md").write_text("\n".join(lines).rstrip() + "\n")
    (output / f"kernels-{name}.json").write_text(json.dumps(timed, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    real = [name for name in SHAPES if name != "tiny"]
    parser.add_argument("--model", nargs="+", default=real, choices=SHAPES)
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--length", nargs="+", type=int, default=[512])
    parser.add_argument("--precision", nargs="+", default=["f32", "f16"], choices=["f32", "f16"])
    parser.add_argument("--recompute", default="off", choices=["on", "off"])
    parser.add_argument("--option", nargs="+", default=["none"], choices=OPTIONS)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    shapes = itertools.product(options.batch_size, options.length)
    runs = list(itertools.product(shapes, options.precision, options.option))
    with tempfile.TemporaryDirectory() as folder:
        for name, path in write_models(Path(folder), options.model).items():
            timed = []
            for (batch_size, length), precision, option in runs:
                vocab_size = SHAPES[name].vocab_size
                try:
                    timed.append(
                        time_step(
                            path,
                            vocab_size,
                            batch_size,
                            length,
                            precision,
                            options.recompute,
                            option,
                        )  # fmt: skip
                    )
                except InputError as error:
                    sys.exit(str(error))
                write_report(options.output, name, timed)
                print(f"{name}\n" + "\n".join(section(timed[-1])), flush=True)


if __name__ == "__main__":
    main()
