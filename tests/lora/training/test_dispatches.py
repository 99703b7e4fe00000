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
from tests.support.tiny_models import TINY_MODELS


@pytest.mark.parametrize("precision", ["f32", "f16"])
@pytest.mark.parametrize(("name", "most"), [("SmolLM2-135M", (13, 15)), ("Gemma-3-270M", (16, 18))])
def test_dispatches_of_a_layer(
    name: str, most: tuple[int, int], precision: str, device: Device, tmp_path: Path
) -> None:
    """Forward and backward, with the tiles that the model chooses for 512 rows.

    In f16 as many as in f32: norms write the sizes of the stream's gradient. With 8 storage
    buffers a kernel, four more: no gradients of A and B share a dispatch with d_z.
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
    assert 10 < counts["forward"] <= most[0] and 11 < counts["backward"] <= most[1], counts
    assert found[8] == counts + Counter(backward=4)


@pytest.mark.parametrize("recompute", ["on", "off"])
@pytest.mark.parametrize(
    ("name", "variant", "sized", "wrote"),
    [
        # Of two layers: the head, both norms of the upper one, the upper norm of the lowest.
        ("llama", "lora", {}, 4),
        # DoRA scales the gradient first, but on matrix units: what it gives is sized.
        ("llama", "dora", {"attn_output": 2, "down": 2}, 0),
        ("gemma3", "lora", {}, 0),  # post norms give f16
    ],
)
def test_who_sizes_the_gradient(
    name: str, variant: str, sized: dict[str, int], wrote: int, recompute: str, device: Device,
    tmp_path: Path,
) -> None:  # fmt: skip
    """What finds sizes of rows of the backward under f16, and which norms write them."""
    path = tmp_path / "model.gguf"
    TINY_MODELS[name].write_gguf(path)
    facts = replace(
        device.facts, is_cpu=False, features=frozenset({"shader-f16"}), workgroup_memory=49152,
        most_storage_buffers=16, matrix_shapes=(),
    )  # fmt: skip
    config = run_config(
        path, batch_size=1, length=16, steps=1, precision="f16", recompute=recompute
    )
    adapter = config.adapter.model_copy(update={"variant": variant, "rank": 4})
    config = config.model_copy(update={"adapter": adapter})
    examples = as_examples(random_sequences(64, 1, 16))
    workload = Workload.open(config, train=True, examples=examples)
    training = SessionPlan.of(facts, workload).programs.training
    assert training is not None
    backward = [d for d in training.micro_batch.dispatches if d.label.startswith("backward")]
    found = Counter(
        d.label.split(".")[-2].removesuffix("_backward")
        for d in backward
        if d.template == "largest_of_rows" and ".layers." in d.label
    )
    assert found == sized
    norms = [d for d in backward if d.template == "rmsnorm_backward"]
    assert sum(norm.constants["sized"] for norm in norms) == wrote
    assert [norm.constants["picked"] for norm in norms] == [True, *[False] * (len(norms) - 1)]
