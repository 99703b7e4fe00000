"""benchmarks/watching.py on a tiny model: that it measures what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.watching import eval_seconds, listener_seconds
from lora.shaders.device import Device
from lora.training.session import TrainingSession
from tests.support.synthetic_runs import as_examples, random_sequences, run_config
from tests.support.tiny_gguf import write_tiny_llama
from tests.support.tiny_run import TYPES


def test_what_watching_costs(tmp_path: Path, device: Device) -> None:
    if "timestamp-query" not in device.facts.features:
        pytest.skip("the device has no timestamps")
    model = tmp_path / "model.gguf"
    write_tiny_llama(model, n_layers=3, types=TYPES)
    config = run_config(model, batch_size=3, length=20, steps=4)
    examples = as_examples(random_sequences(60, 12, 6))
    with TrainingSession(config, examples=examples[:3], device=device) as session:
        clock, kernels, n_batches = eval_seconds(session, examples)
    assert 0 < kernels < 10 * clock and n_batches == 4  # 15 targets each
    step, listening = listener_seconds(config, examples)
    assert 0 < listening < step
