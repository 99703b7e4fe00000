"""The page of results: it is the one that lies there, and it names what misses, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import summary


def test_the_page_is_the_one_that_lies_there() -> None:
    """Else: python benchmarks/summary.py --write."""
    assert (summary.RESULTS / "README.md").read_text() == summary.summary()


def test_every_file_is_on_the_page() -> None:
    found = summary.read_results(summary.RESULTS, "vs_peft")
    found += summary.read_results(summary.RESULTS, "generation")
    files = [*summary.RESULTS.glob("vs_peft-*.json"), *summary.RESULTS.glob("generation-*.json")]
    assert files and sorted(result.path for result in found) == sorted(files)


def kernel(name: str, seconds: float, flops: float = 0.0, calls: int = 100) -> dict[str, Any]:
    return {"kernel": name, "label": name, "calls": calls, "seconds": seconds, "flops": flops}


def ours(ms: float, memory: float, kernels: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "ms": ms, "memory_MiB": memory, "encode_ms": 1.0, "set_up_s": 2.0, "device": "Card, 1.0",
        "memory": {"weights": memory - 30, "logits": 20, "adapter": 10}, "kernels": kernels,
    }  # fmt: skip


KERNELS = [
    kernel("matmul_tiled", 0.012, 3e11), kernel("attention", 0.008, 1e11),
    kernel("matmul_reduce", 0.003), kernel("adamw", 0.002),
]  # fmt: skip


def write(folder: Path, stem: str, figures: dict[str, Any]) -> None:
    (folder / f"{stem}.json").write_text(json.dumps(figures))
    (folder / f"{stem}.md").write_text("# Something\n\nCard, 1.0, 2026-01-02. Median of 20.\n")


def test_a_step_that_misses(tmp_path: Path) -> None:
    """Products are the 15 of 25 ms that matmul_tiled and its second passes take."""
    write(tmp_path, "vs_peft-SmolLM2-135M-1x512", {
        "ours f32, recompute off": ours(20.4, 900, KERNELS),
        "ours f16, recompute off": ours(19.9, 800, KERNELS),
        "ours f32, recompute on": ours(30.0, 340, KERNELS),
        "PEFT float32": {"ms": 90.0, "memory_MiB": 2000},
        "PEFT bfloat16": {"ms": 80.0, "memory_MiB": 1000},
    })  # fmt: skip
    page = summary.summary(tmp_path)
    assert "- Card, 1.0, 2026-01-02, commit not noted: SmolLM2-135M\n" in page
    assert "| SmolLM2-135M | 1 × 512 | 20 | 19.9 | **20.4** | 90.0 | 80.0 |" in page
    assert "| SmolLM2-135M | 1 × 512 | 33% |  |  |  | 340 | **34%** | 30.0 |" in page
    assert [line for line in page.splitlines() if " asked; " in line] == [
        "- SmolLM2-135M, 1 × 512, ours f32, recompute off: 20.4 ms, 20 asked; bound by products "
        "with frozen weights, 60% of the kernels' 25.0 ms, at 20.0 TFLOP/s (attention 32%, "
        "others 8%).",
        "- SmolLM2-135M, 1 × 512, ours f32, recompute on: 34% of PEFT's memory, 33% asked; bound "
        "by weights (310 MiB), logits (20 MiB), adapter (10 MiB).",
    ]


def test_a_long_context(tmp_path: Path) -> None:
    row = ours(2000.0, 13000, [*KERNELS, kernel("attention_backward_q", 0.025, 4e11)])
    row |= {"encode_ms": 600.0, "set_up_s": 7.0}
    write(tmp_path, "vs_peft-Llama-1.2B-1x8192", {"ours f32, recompute on": row})
    page = summary.summary(tmp_path)
    assert "Llama-1.2B, 1 × 8192 tokens, ours f32, recompute on: 2000.0 ms a step, 13,000" in page
    missed = [line.split(": ", 1)[1] for line in page.splitlines() if " asked; " in line]
    assert missed == [
        "13,000 MiB, 12,288 asked; bound by weights (12970 MiB), logits (20 MiB), "
        "adapter (10 MiB).",
        "encoding takes 30% of a step, 25% asked; bound by the host, 600.0 ms for 500 dispatches, "
        "1200.0 µs each (beside the step before).",
        "attention is 66% of a step, 25% asked; bound by its arithmetic, 15.2 TFLOP/s.",
        "set-up takes 7.0 s, 5 asked; bound by kernels that are compiled and timed, once for a "
        "device and its driver.",
    ]


def test_what_is_met_or_was_not_timed_has_no_line(tmp_path: Path) -> None:
    """A shape that nobody asked for, kernels without times, and no PEFT."""
    write(tmp_path, "vs_peft-Llama-1.2B-1x512", {"ours f16, recompute off": ours(80.0, 1, [])})
    write(tmp_path, "vs_peft-tiny-2x16", {"ours f32, recompute off": ours(9000.0, 1, [])})
    page = summary.summary(tmp_path)
    assert page.count("Everything that was asked is met.") == 2 and " asked; " not in page
    assert "tiny, 2 × 16 tokens, ours f32, recompute off: 9000.0 ms a step, 1 MiB." in page


def test_a_step_whose_kernels_were_not_timed(tmp_path: Path) -> None:
    write(tmp_path, "vs_peft-Llama-1.2B-1x512", {"ours f16, recompute off": ours(80.1, 1, [])})
    assert "80.1 ms, 80 asked; its kernels were not timed." in summary.summary(tmp_path)


LLAMA_CPP = {"prompt": 900.0, "new": 300.0, "devices": ["Card (Vulkan)"]}


@pytest.mark.parametrize(
    ("beside", "label"),
    [
        ({"llama.cpp": LLAMA_CPP}, "llama.cpp (Card (Vulkan))"),
        ({"llama.cpp": {"Vulkan": LLAMA_CPP | {"devices": []}}}, "llama.cpp, Vulkan"),
        ({"llama.cpp Vulkan": {"new": 300.0}}, "llama.cpp Vulkan"),
        ({"llama.cpp": None, "note": "absent"}, None),
        ({"llama.cpp": {"error": "no device", "new": None}}, None),
    ],
)
def test_generation(tmp_path: Path, beside: dict[str, Any], label: str | None) -> None:
    """1 GB of weights and 1,000 GB/s: a share is the tokens a second over 1,000."""
    bare = [
        {"kernel": "matmul_row", "label": "gate_up", "calls": 20, "ms": 2.0, "GB/s": 300.0},
        {"kernel": "matmul_row", "label": "down", "calls": 20, "ms": 1.0, "GB/s": 150.0},
        {"kernel": "attention_decode_row", "label": "a", "calls": 20, "ms": 1.0, "GB/s": None},
    ]
    short = [{"kernel": "matmul_row", "label": "gate_up", "calls": 250, "ms": 2.0, "GB/s": 3.0}]
    write(tmp_path, "generation-Llama-1B-Q4_0-512-128", {
        "device": "Card, 1.0", "bandwidths": {"copy": 1e11, "read": 1e12}, "weight_bytes": 10**9,
        "ours": {
            "bare": {"prompt": 5000.0, "new": 250.0}, "adapter": {"new": 499.0},
            "other": {"prompt": 1.0, "new": 500.0},
        },
        "kernels": {"bare": bare, "adapter": short}, "sweep": [], **beside,
    })  # fmt: skip
    lines = summary.summary(tmp_path).splitlines()
    start = "| Llama-1B-Q4_0 | 512 + 128 | Card, 1.0 | "
    rows = [line.removeprefix(start) for line in lines if line.startswith(start)]
    assert rows[:3] == [
        "ours, bare | 5,000 | 250.0 | 250.0 | **25%** |",
        "ours, adapter |  | 499.0 | 499.0 | **50%** |",
        "ours, other | 1 | 500.0 | 500.0 | 50% |",
    ]
    prompt = "900" if "devices" in str(beside) else ""
    assert rows[3:] == ([] if label is None else [f"{label} | {prompt} | 300.0 | 300.0 | 30% |"])
    assert [line for line in lines if " asked; " in line] == [
        "- Llama-1B-Q4_0, ours, bare: 25% of the bandwidth, 50% asked; bound by products of one "
        "row: 75% of 4.00 ms at 250 GB/s, 25% of the bandwidth (gate_up 300, down 150).",
        "- Llama-1B-Q4_0, ours, adapter: 50% of the bandwidth, 50% asked; bound by the number of "
        "dispatches: 250 in 2.00 ms, 8.0 µs each, little of it for what they read.",
    ]


def test_a_token_whose_kernels_say_little() -> None:
    kernels = [{"kernel": "other", "label": "x", "calls": 10, "ms": 2.0, "GB/s": None}]
    assert summary.bound_of_token([], 1e12) == "its kernels were not timed"
    assert summary.bound_of_token(kernels, 1e12).startswith("10 dispatches take 2.00 ms")
