"""How many dispatches a layer takes on a GPU: each costs some microseconds, whatever it does."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from lora.shaders.device import Device
from lora.training.device_state import SessionPlan
from lora.training.workload import Workload
from tests.support.synthetic_models import SHAPES, write_model
from tests.support.synthetic_runs import as_examples, random_sequences, run_config


@pytest.mark.parametrize("precision", ["f32", "f16"])
@pytest.mark.parametrize(("name", "most"), [("SmolLM2-135M", (13, 15)), ("Gemma-3-270M", (16, 18))])
def test_dispatches_of_a_layer(
    name: str, most: tuple[int, int], precision: str, device: Device, tmp_path: Path
) -> None:
    """Forward and backward, with the tiles that the model chooses for 512 rows.

    In f16 rows of the residual stream's gradient are sized before each of the two products that
    read it; behind post norms none does. With 8 storage buffers a kernel, four more: no gradients
    of A and B share a dispatch with d_z.
    """
    path = tmp_path / "model.gguf"
    write_model(path, SHAPES[name])
    facts = replace(
        device.facts, is_cpu=False, features=frozenset({"shader-f16"}), workgroup_memory=49152
    )
    config = run_config(path, batch_size=1, length=512, steps=1, precision=precision)
    sequences = random_sequences(SHAPES[name].vocab_size, 1, 512)
    workload = Workload.open(config, train=True, examples=as_examples(sequences))
    found = {}
    for buffers in (16, 8):
        of = replace(facts, most_storage_buffers=buffers)
        training = SessionPlan.of(of, workload).programs.training
        assert training is not None
        counts: Counter[str] = Counter()
        for dispatch in training.micro_batch.dispatches:
            before, inside, _ = dispatch.label.partition("layers.5")
            if inside:
                counts["backward" if "backward" in before else "forward"] += 1
        found[buffers] = counts
    counts = found[16]
    sized = 2 if precision == "f16" and name == "SmolLM2-135M" else 0
    backward = most[1] + sized
    assert 10 < counts["forward"] <= most[0] and 11 < counts["backward"] <= backward, counts
    assert found[8] == counts + Counter(backward=4)
