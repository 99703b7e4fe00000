"""Tables of what benchmarks/vs_peft.py has measured, as Markdown, and all figures as JSON."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.sessions import Case, markdown_table
from tests.support.synthetic_runs import RANK, largest_difference

LOSS_TOLERANCE, NORM_TOLERANCE = 5e-4, 5e-3  # of tests/parity/test_live.py
PACKED = " at most, an eighth at least"
CARD = 12 << 30  # bytes of the card that a run should fit on


def write_report(output: Path, name: str, case: Case, results: dict[str, dict[str, Any]]) -> str:
    """Writes a case's tables and all figures as Markdown and JSON; returns the Markdown."""
    text = "\n".join(report(name, case, results)) + "\n"
    _write(output / f"vs_peft-{name}-{case}", text, results)
    return text


def _write(path: Path, text: str, figures: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ".md").write_text(text)
    path.with_name(path.name + ".json").write_text(json.dumps(figures, indent=1) + "\n")


def report(name: str, case: Case, results: dict[str, dict[str, Any]]) -> list[str]:
    """The lines of a case's Markdown."""
    of_ours = {label: r for label, r in results.items() if "kernels" in r}
    device = next(iter(of_ours.values()))["device"]
    reference = next((label for label in results if label.startswith("PEFT float32")), None)
    compared = reference or next(iter(results))
    tokens = case.tokens(name)
    lines = [
        f"# {name}, {case.batch_size} × {case.length} tokens{PACKED * case.packed}, r={RANK}, all "
        "linear layers",
        "",
        f"{device}, through Vulkan, {date.today()}. Median of {case.steps} steps or a second of "
        "them, after half a second, the device waited for after each; weights random, the same "
        "adapter and batches for all. Memory: ours what is allocated, PEFT's "
        "torch.cuda.max_memory_allocated. "
        f"Differences: the largest relative one from {compared} over {case.warm_up + case.steps} "
        f"steps; the parity tests allow {LOSS_TOLERANCE:.0e} (losses) and {NORM_TOLERANCE:.0e} "
        "(gradient norms).",
        "",
    ]
    rows = []
    for label, result in results.items():
        ratio = f"{results[reference]['ms'] / result['ms']:.2f}×" if reference else ""
        rows.append([
            label, f"{result['ms']:.1f}", f"{1e3 * tokens / result['ms']:,.0f}", ratio,
            _mib(result["memory_MiB"]), *_differences(label, compared, results),
        ])  # fmt: skip
    lines += markdown_table(
        ["", "ms a step", "tokens/s", "against PEFT f32", "memory, MiB",
         f"loss after {case.warm_up + case.steps} steps", "losses differ by", "norms differ by",
         "within the parity tests'"],
        rows,
    )  # fmt: skip
    lines += ["", *memory_lines(of_ours)]
    reserved = [
        f"{k} {_mib(r['reserved_MiB'])}" for k, r in results.items() if r.get("reserved_MiB")
    ]
    if reserved:
        lines += ["", f"Reserved by PyTorch's allocator, MiB: {', '.join(reserved)}."]
    for label, result in of_ours.items():
        lines += [
            "",
            f"{label}: {result['ms_pipelined']:.1f} ms a step without waiting, "
            f"{result['encode_ms']:.1f} ms of it encoding on the host; set-up "
            f"{result['set_up_s']:.1f} s, first step {result['first_step_s']:.1f} s.",
        ]
    last_of_precision = {label.split(",")[0]: label for label in of_ours}
    for label in last_of_precision.values():
        if of_ours[label]["kernels"]:
            lines += ["", f"GPU time of a step by kernel, {label}:", ""]
            lines += kernel_lines(of_ours[label]["kernels"])
    return lines


def _differences(label: str, compared: str, results: dict[str, dict[str, Any]]) -> list[str]:
    """The last loss, differences of losses and norms, and whether they are as small as in tests."""
    result, other = results[label], results[compared]
    if result["losses"] is None:  # of other weights
        return ["", "", "", ""]
    losses = largest_difference(result["losses"], other["losses"])
    norms = largest_difference(result["norms"], other["norms"])
    within = losses <= LOSS_TOLERANCE and norms <= NORM_TOLERANCE
    verdict = "is compared with" if label == compared else "yes" if within else "no"
    return [f"{result['losses'][-1]:.6f}", f"{losses:.1e}", f"{norms:.1e}", verdict]


def memory_lines(results: dict[str, dict[str, Any]]) -> list[str]:
    """The table of what our runs take: allocated, planned, and what the driver says."""
    rows = []
    for label, result in results.items():
        seen, planned = result["nvidia_smi_MiB"], result["planned_MiB"]
        total = planned if seen is None else seen
        purposes = sorted(result["memory"].items(), key=lambda item: -item[1])
        rows.append([
            label, f"{result['memory_MiB']:.0f}", f"{planned:.0f}", _mib(seen),
            _mib(result["context_MiB"]),
            "" if seen is None else _beyond(seen - result["context_MiB"], planned),
            f"{total * 2**20 / CARD:.0%}",
            ", ".join(f"{purpose} {size:.0f}" for purpose, size in purposes if size >= 0.5),
        ])  # fmt: skip
    table = markdown_table(
        ["MiB", "allocated", "`lora plan`", "nvidia-smi", "of it an empty device",
         "the rest against the plan", "of 12 GiB", "allocated for"],
        rows,
    )  # fmt: skip
    note = (
        "nvidia-smi: growth of the GPU's memory in use from before the device was opened until "
        "after the last timed step; where it is absent, the plan is compared with 12 GiB. It moves "
        "in large steps, since wgpu takes memory from the driver in blocks."
    )
    times = [
        f"{label} {planned:.1f} ms of {(seen := result['ms_pipelined']):.1f} "
        f"({_beyond(planned, seen)})"
        for label, result in results.items()
        if (planned := result.get("planned_ms")) is not None
    ]
    told = (
        ["", f"`lora plan` puts a step, not waited for as in training, at: {'; '.join(times)}."]
        if times
        else []
    )
    return [*table, "", note, *told]


def _beyond(seen: float, planned: float) -> str:
    return f"{(seen - planned) / planned:+.1%}"


def kernel_lines(kernels: list[dict[str, Any]]) -> list[str]:
    """The table of a step's kernels."""
    total = sum(row["seconds"] for row in kernels)
    rows = [
        [
            row["kernel"], row["label"], row["calls"], f"{1e3 * row['seconds']:.2f}",
            f"{row['seconds'] / total:.1%}",
            f"{row['flops'] / row['seconds'] / 1e12:.3g}" if row["flops"] else "",
        ]
        for row in kernels
    ]  # fmt: skip
    return markdown_table(["kernel", "label", "calls", "ms", "share", "TFLOP/s"], rows)


def write_curves(output: Path, name: str, case: Case, curves: dict[str, list[float]]) -> str:
    """Writes loss curves and how far they part, as Markdown and JSON; returns the Markdown."""
    first, *others = curves
    steps = len(curves[first])
    lines = [f"# {name}, {case.batch_size} × {case.length} tokens: losses of {steps} steps", ""]
    for precision in others:
        worst = largest_difference(curves[precision], curves[first])
        lines += [f"{precision} against {first}: they differ by at most {worst:.1e}.", ""]
    shown = sorted({*range(0, steps, max(1, steps // 10)), steps - 1})
    lines += markdown_table(
        ["step", *curves],
        [[step + 1, *(f"{curve[step]:.5f}" for curve in curves.values())] for step in shown],
    )
    text = "\n".join(lines) + "\n"
    _write(output / f"curves-{name}-{case}-{steps}", text, curves)
    return text


def _mib(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"
