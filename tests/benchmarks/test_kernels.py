"""The table of a step's kernels: complete, and in units that fit together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.kernels import section, time_step, write_report
from lora.shaders.choice import choose_device
from tests.support.synthetic_models import SHAPES, write_model


def test_a_step_of_a_tiny_model(tmp_path: Path) -> None:
    if "timestamp-query" not in choose_device().found.features:
        pytest.skip("the device has no timestamps")
    shape = SHAPES["tiny"]
    path = tmp_path / "model.gguf"
    write_model(path, shape)
    timed = time_step(path, shape.vocab_size, 1, 20, "f32", "off")
    calls = {(row["kernel"], row["label"]): row["calls"] for row in timed["kernels"]}
    assert calls["attention", "attention"] == calls["swiglu", "swiglu"] == shape.n_layers
    assert calls["adamw", "adamw"] == calls["embedding", "embedding"] == 1
    assert all(row["seconds"] > 0 and row["n_bytes"] > 0 for row in timed["kernels"])
    write_report(tmp_path, "tiny", [timed])
    assert json.loads((tmp_path / "kernels-tiny.json").read_text()) == [timed]
    text = (tmp_path / "kernels-tiny.md").read_text()
    assert text.count("\n| ") == len(timed["kernels"]) + 2  # the header and the rule below it


def test_units() -> None:
    row = {
        "kernel": "matmul_tiled",
        "label": "gate_up",
        "calls": 4,
        "seconds": 2e-3,
        "flops": 5 * 10**9,
        "n_bytes": 10**9,
    }
    timed = {
        "batch_size": 1,
        "length": 512,
        "precision": "f32",
        "recompute": "off",
        "peaks": {"flops": 1e13, "bytes_per_second": 2e12},
        "kernels": [row, row | {"kernel": "rope", "label": "rope", "flops": 0, "seconds": 6e-3}],
    }
    assert section(timed)[0].startswith("## 1 × 512 tokens, f32, recompute off: 8.00 ms")
    assert ", recompute off, dora: " in section(timed | {"option": "dora"})[0]
    first, second = [line for line in section(timed) if line.startswith(("| matmul", "| rope"))]
    assert first == "| matmul_tiled | gate_up | 4 | 500.0 | 2.00 | 25.0% | 2.5 | 25% | 500 | 25% |"
    assert second == "| rope |  | 4 | 1500.0 | 6.00 | 75.0% |  |  | 167 | 8% |"
