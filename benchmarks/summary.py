"""What lies in benchmarks/results, on one page: its README.md, made from the JSON files there.

    python benchmarks/summary.py [--write]

Targets stand here; whatever misses one gets a line that says what bounds it, from the times of the
kernels in the same file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.sessions import markdown_table
from tests.support.synthetic_runs import RANK

RESULTS = Path(__file__).parent / "results"

STEP_TARGETS = {  # ms a step, recompute off
    ("SmolLM2-135M", "1x128"): 12, ("SmolLM2-135M", "1x512"): 20, ("SmolLM2-135M", "4x512"): 60,
    ("Gemma-3-270M", "1x128"): 15, ("Gemma-3-270M", "1x512"): 25, ("Gemma-3-270M", "4x512"): 75,
    ("Llama-1.2B", "1x128"): 40, ("Llama-1.2B", "1x512"): 80, ("Llama-1.2B", "4x512"): 260,
}  # fmt: skip
MEMORY_TARGETS = {"1x512": 1 / 3, "4x512": 1 / 2}  # of PEFT's bf16, recompute on
CONTEXT, CONTEXT_TARGET = "1x8192", 12 << 10  # MiB, recompute on
ENCODING_TARGET = 0.25  # of a step
ATTENTION_TARGET = 0.25  # of a step of 4 x 512 or 1 x 8192 tokens
SET_UP_TARGET = 5  # seconds before the first step
BANDWIDTH_TARGET = 0.5  # of what reads reach, for a new token on a GPU

# The tree that was measured, by `digest` of the files of one run: files can't tell it themselves.
COMMITS = {"e516ad3ba157": "6ea8a16", "345f9ff0ad14": "f5770ac"}

ATTENTION, REST = "attention", "others"
KINDS = {  # of a training step's kernels, by what their names begin with
    "matmul": "products with frozen weights",
    "attention": ATTENTION,
    "lora": "low-rank kernels",
}
OURS = [f"ours {precision}, recompute {switch}" for switch in ("off", "on")
        for precision in ("f16", "f32")]  # fmt: skip
PEFT_F32, PEFT_BF16 = "PEFT float32", "PEFT bfloat16"
# Seconds. A timed dispatch of next to nothing takes about half of it on an H200 (docs/log.md).
SHORT_DISPATCH = 1e-5


@dataclass(frozen=True)
class Result:
    """One JSON file: `name` is the model, `case` what of it was run."""

    path: Path
    name: str
    case: str
    figures: Mapping[str, Any]

    @property
    def title(self) -> str:
        """Model and case as they are written in text."""
        return f"{self.name}, {self.case.replace('x', ' × ')}"

    @property
    def device(self) -> str:
        """The GPU and its driver."""
        devices = [self.figures.get("device")]
        devices += [v.get("device") for v in self.figures.values() if isinstance(v, dict)]
        return next((str(device) for device in devices if device), "an unknown device")

    @property
    def date(self) -> str:
        """When it was measured, as the Markdown beside it says."""
        beside = self.path.with_suffix(".md")
        found = re.search(r"\d{4}-\d\d-\d\d", beside.read_text()) if beside.exists() else None
        return found[0] if found else "without a date"


def read_results(folder: Path, kind: str) -> list[Result]:
    """The files `KIND-NAME-CASE.json`; names by the order of the targets, then by letters."""
    pattern = r"(.+)-(\d+x\d+)" if kind == "vs_peft" else r"(.+)-(\d+-\d+)"
    found = []
    for path in folder.glob(f"{kind}-*.json"):
        parts = re.fullmatch(pattern, path.stem.removeprefix(f"{kind}-"))
        if parts:
            found.append(Result(path, parts[1], parts[2], json.loads(path.read_text())))
    order = [name for name, _ in STEP_TARGETS]

    def key(result: Result) -> tuple[int, str, list[int]]:
        rank = order.index(result.name) if result.name in order else len(order)
        return rank, result.name, [int(number) for number in re.findall(r"\d+", result.case)]

    return sorted(found, key=key)


def runs_of(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """The results by device and day: what was measured together."""
    runs: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        runs[result.device, result.date].append(result)
    return runs


def digest(results: Iterable[Result]) -> str:
    """Of the files that were measured together."""
    together = hashlib.sha256()
    for path in sorted(result.path for result in results):
        together.update(path.read_bytes())
    return together.hexdigest()[:12]


def origin_lines(results: Sequence[Result]) -> list[str]:
    """An item for each device and day: what was measured there, and of which commit."""
    lines = []
    for (device, date), measured in runs_of(results).items():
        commit = COMMITS.get(digest(measured))
        names = ", ".join(dict.fromkeys(result.name for result in measured))
        where = f"commit {commit}" if commit else "commit not noted"
        lines.append(f"- {device}, {date}, {where}: {names}")
    return lines


# -- training steps --------------------------------------------------------------------------------


def ms_of(result: Result, label: str, target: float | None = None) -> str:
    """A time, in bold where it misses a target; empty where it was not measured."""
    if label not in result.figures:
        return ""
    ms = result.figures[label]["ms"]
    return f"**{ms:.1f}**" if target is not None and ms > target else f"{ms:.1f}"


def share_of_peft(result: Result, label: str) -> float | None:
    """Our memory over that of PEFT in bfloat16; None where one is not known."""
    memory = [result.figures.get(name, {}).get("memory_MiB") for name in (label, PEFT_BF16)]
    return None if None in memory or not memory[1] else memory[0] / memory[1]


def step_lines(results: Sequence[Result]) -> list[str]:
    """The tables of training steps, and a line for every figure that misses its target."""
    compared = [r for r in results if PEFT_F32 in r.figures or PEFT_BF16 in r.figures]
    f16_off, f32_off, f16_on, f32_on = OURS
    times, memory = [], []
    for result in compared:
        target = STEP_TARGETS.get((result.name, result.case))
        size = result.case.replace("x", " × ")
        times.append([
            result.name, size, "" if target is None else target,
            ms_of(result, f16_off, target), ms_of(result, f32_off, target),
            ms_of(result, PEFT_F32), ms_of(result, PEFT_BF16),
        ])  # fmt: skip
        most = MEMORY_TARGETS.get(result.case)
        row = [result.name, size, "" if most is None else f"{most:.0%}"]
        for label in (f16_on, f32_on):
            share, figures = share_of_peft(result, label), result.figures.get(label)
            cell = "" if share is None else f"{share:.0%}"
            missed = share is not None and most is not None and share > most
            row += ["" if figures is None else f"{figures['memory_MiB']:.0f}"]
            row += [f"**{cell}**" if missed else cell, ms_of(result, label)]
        memory.append(row)
    lines = [
        "Milliseconds a step, recompute off, PEFT in the same run; bold misses what was asked:"
    ]
    header = ["model", "tokens", "asked", "ours, f16", "ours, f32", "PEFT, f32", "PEFT, bf16"]
    lines += ["", *markdown_table(header, times), ""]
    lines += ["Memory with recompute on, as a share of PEFT's in bf16, and what a step takes then:"]
    header = ["model", "tokens", "asked", "f16, MiB", "share", "ms", "f32, MiB", "share", "ms"]
    lines += ["", *markdown_table(header, memory)]
    alone = [result for result in results if result not in compared]
    for result in alone:
        for label, row in result.figures.items():
            asked = f" of the {CONTEXT_TARGET:,} asked" if result.case == CONTEXT else ""
            lines += ["", f"{result.title} tokens, {label}: {row['ms']:.1f} ms a step, "
                      f"{row['memory_MiB']:,.0f} MiB{asked}."]  # fmt: skip
    missed = [line for result in results for line in step_misses(result)]
    return [*lines, *_missed(missed)]


def step_misses(result: Result) -> list[str]:
    """A line for every figure of a training step that misses its target: what bounds it."""
    found = []
    for label, row in result.figures.items():
        if label in OURS:
            found += [
                f"{result.title}, {label}: {miss}." for miss in _misses_of(result, label, row)
            ]
    return found


def _misses_of(result: Result, label: str, row: Mapping[str, Any]) -> Iterator[str]:
    target, kernels = STEP_TARGETS.get((result.name, result.case)), kinds_of(row["kernels"])
    memory, share = MEMORY_TARGETS.get(result.case), share_of_peft(result, label)
    is_timed = label.endswith("off") or result.case == CONTEXT
    if target is not None and is_timed and row["ms"] > target:
        yield f"{row['ms']:.1f} ms, {target} asked; {bound_of_step(kernels)}"
    if memory is not None and share is not None and label.endswith("on") and share > memory:
        yield (
            f"{share:.0%} of PEFT's memory, {memory:.0%} asked; bound by {_largest(row['memory'])}"
        )
    if result.case == CONTEXT and row["memory_MiB"] > CONTEXT_TARGET:
        yield (
            f"{row['memory_MiB']:,.0f} MiB, {CONTEXT_TARGET:,} asked; bound by "
            f"{_largest(row['memory'])}"
        )
    if is_timed and row["encode_ms"] > ENCODING_TARGET * row["ms"]:
        calls = sum(kind.calls for kind in kernels.values())
        each = f" for {calls:,} dispatches, {1e3 * row['encode_ms'] / calls:.1f} µs each"
        yield (
            f"encoding takes {row['encode_ms'] / row['ms']:.0%} of a step, {ENCODING_TARGET:.0%} "
            f"asked; bound by the host, {row['encode_ms']:.1f} ms{each if calls else ''} (beside "
            "the step before)"
        )
    total = sum(kind.seconds for kind in kernels.values())
    attention = kernels.get(ATTENTION)
    if is_timed and result.case in (CONTEXT, "4x512") and attention is not None:
        part = attention.seconds / total
        if part > ATTENTION_TARGET:
            yield (
                f"attention is {part:.0%} of a step, {ATTENTION_TARGET:.0%} asked; bound by its "
                f"arithmetic, {attention.tflops:.1f} TFLOP/s"
            )
    if is_timed and row["set_up_s"] > SET_UP_TARGET:
        yield (
            f"set-up takes {row['set_up_s']:.1f} s, {SET_UP_TARGET} asked; bound by kernels that "
            "are compiled and timed, once for a device and its driver"
        )


@dataclass
class Kind:
    """What a step spends on kernels of one kind."""

    seconds: float = 0.0
    flops: float = 0.0
    calls: int = 0

    @property
    def tflops(self) -> float:
        """10^12 operations a second."""
        return self.flops / self.seconds / 1e12


def kinds_of(kernels: Sequence[Mapping[str, Any]]) -> dict[str, Kind]:
    """A step's kernels by kind, those that take longest first."""
    kinds: dict[str, Kind] = defaultdict(Kind)
    for row in kernels:
        name = next((n for prefix, n in KINDS.items() if row["kernel"].startswith(prefix)), REST)
        kinds[name].seconds += row["seconds"]
        kinds[name].flops += row["flops"]
        kinds[name].calls += row["calls"]
    return dict(sorted(kinds.items(), key=lambda item: -item[1].seconds))


def bound_of_step(kinds: Mapping[str, Kind]) -> str:
    """The kernels that take most of the GPU's time, each timed alone."""
    if not kinds:
        return "its kernels were not timed"
    total = sum(kind.seconds for kind in kinds.values())
    first, *others = (name for name in kinds if name != REST)
    parts = [f"{n} {kinds[n].seconds / total:.0%}" for n in (*others, REST) if n in kinds]
    return (
        f"bound by {first}, {kinds[first].seconds / total:.0%} of the kernels' {1e3 * total:.1f} "
        f"ms, at {kinds[first].tflops:.1f} TFLOP/s ({', '.join(parts)})"
    )


def _largest(memory: Mapping[str, float]) -> str:
    purposes = sorted(memory.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{purpose} ({size:.0f} MiB)" for purpose, size in purposes)


def _missed(lines: Sequence[str]) -> list[str]:
    if not lines:
        return ["", "Everything that was asked is met."]
    return ["", "What misses:", "", *(f"- {line}" for line in lines)]


# -- generation ------------------------------------------------------------------------------------

_NO_SPEEDS = {"device", "bandwidths", "weight_bytes", "kernels", "sweep"}


def speeds_of(figures: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Everyone's tokens a second in a file, by name: ours, and whatever stood beside us."""
    found: dict[str, Mapping[str, Any]] = {}
    named = dict(figures)
    if isinstance(named.get("llama.cpp"), list):  # one of its builds, or two
        for build in named.pop("llama.cpp"):
            named[f"llama.cpp ({build['backend']})"] = build["rows"]
    for name, value in named.items():
        if name in _NO_SPEEDS or not isinstance(value, dict):
            continue
        rows = {name: value} if "new" in value else value
        for label, row in rows.items():
            if not isinstance(row, dict) or not row.get("new"):
                continue
            if name != "ours":
                label = name if label == name else f"{name}, {label}"
                label += f" ({', '.join(row['devices'])})" if row.get("devices") else ""
            else:
                label = f"ours, {label}"
            found[label] = row
    return found


def generation_lines(results: Sequence[Result]) -> list[str]:
    """The table of tokens a second, and a line for every one that misses the bandwidth asked."""
    rows, missed = [], []
    for result in results:
        n_bytes = result.figures["weight_bytes"]
        bandwidth = max(result.figures["bandwidths"].values())
        prompt, _, new = result.case.partition("-")
        on_gpu = "llvmpipe" not in result.device
        for label, row in speeds_of(result.figures).items():
            share = row["new"] * n_bytes / bandwidth
            misses = on_gpu and label.startswith("ours") and share < BANDWIDTH_TARGET
            rows.append([
                result.name, f"{prompt} + {new}", result.device, label,
                f"{row['prompt']:,.0f}" if row.get("prompt") else "", f"{row['new']:,.1f}",
                f"{row['new'] * n_bytes / 1e9:,.1f}",
                f"**{share:.0%}**" if misses else f"{share:.0%}",
            ])  # fmt: skip
            if misses:
                kernels = result.figures.get("kernels", {}).get(label.removeprefix("ours, "), [])
                missed.append(
                    f"{result.name}, {label}: {share:.0%} of the bandwidth, "
                    f"{BANDWIDTH_TARGET:.0%} asked; {bound_of_token(kernels, bandwidth)}."
                )
    header = ["model", "tokens", "device", "who", "prompt, tokens/s", "new, tokens/s",
              "weights, GB/s", "share of the bandwidth"]  # fmt: skip
    lines = [
        "Greedy, one text. The bandwidth is what large reads or copies reach on the device; a new",
        "token reads every weight once. Half of it is asked on GPUs; bold misses that:",
    ]
    return [*lines, "", *markdown_table(header, rows), *_missed(missed)]


def bound_of_token(kernels: Sequence[Mapping[str, Any]], bandwidth: float) -> str:
    """What takes a new token's time: many short dispatches, or products that read slowly."""
    total, calls = sum(row["ms"] for row in kernels), sum(row["calls"] for row in kernels)
    if not calls:
        return "its kernels were not timed"
    if 1e-3 * total / calls < SHORT_DISPATCH:
        return (
            f"bound by the number of dispatches: {calls} in {total:.2f} ms, "
            f"{1e3 * total / calls:.1f} µs each, little of it for what they read"
        )
    reading = [row for row in kernels if row.get("GB/s")]
    if not reading:
        return f"{calls} dispatches take {total:.2f} ms, and what they read was not counted"
    ms = sum(row["ms"] for row in reading)
    rate = 1e9 * sum(row["GB/s"] * row["ms"] for row in reading) / ms
    slowest_first = sorted(reading, key=lambda row: -row["ms"])[:3]
    parts = ", ".join(f"{row['label']} {row['GB/s']:,.0f}" for row in slowest_first)
    return (
        f"bound by products of one row: {ms / total:.0%} of {total:.2f} ms at {rate / 1e9:,.0f} "
        f"GB/s, {rate / bandwidth:.0%} of the bandwidth ({parts})"
    )


# -- the page --------------------------------------------------------------------------------------


def summary(folder: Path = RESULTS) -> str:
    """The page, as Markdown."""
    steps, texts = read_results(folder, "vs_peft"), read_results(folder, "generation")
    lines = [
        "# Results",
        "",
        "Made by `python benchmarks/summary.py --write` from the JSON files here; each has a",
        "Markdown file of the same name with every kernel. [How they were measured](../README.md).",
        "",
        f"## A training step against PEFT's, LoRA r={RANK} on all linear layers",
        "",
        *origin_lines(steps),
        "",
        *step_lines(steps),
        "",
        "On the H200 products of registers alone reach 57 to 65 TFLOP/s, large ones with their",
        "loads and barriers 36 to 42 ([docs/log.md](../../docs/log.md)); PEFT's bf16 runs on",
        "matrix units, which WebGPU does not reach yet.",
        "",
        "## Generation",
        "",
        *origin_lines(texts),
        "",
        *generation_lines(texts),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the page, or writes it and says which runs `COMMITS` does not know."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true", help="into benchmarks/results/README.md")
    if not parser.parse_args(arguments).write:
        print(summary(), end="")
        return
    (RESULTS / "README.md").write_text(summary())
    for kind in ("vs_peft", "generation"):
        for (device, date), measured in runs_of(read_results(RESULTS, kind)).items():
            if digest(measured) not in COMMITS:
                print(f"COMMITS lacks {digest(measured)}: {kind} on {device}, {date}")


if __name__ == "__main__":
    main()
