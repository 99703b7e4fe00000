"""The real models' logits of one row, computed as on a GPU, against those of a CPU device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora.generation.opening import open_generator
from lora.shaders.device import Device

TEXT = "The capital of France is Paris, and the capital of Germany is"


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_whole_numbers_are_as_good_as_f32(name: str, request: pytest.FixtureRequest) -> None:
    """Q4_1, Q8_0; Q4_K, Q5_0, Q6_K, Q8_0: products of bytes on one side, of floats on the other."""
    path: Path = request.getfixturevalue(name)  # skips where the file is absent
    found, texts = [], []
    for is_cpu in (True, False):
        device = Device()
        device.facts = replace(device.facts, is_cpu=is_cpu)
        generator = open_generator(str(path), device=device, max_length=64)
        ids = list(generator.tokenizer.encode(TEXT).ids)
        generator.next_logits(ids[:-1])
        logits = generator.next_logits(ids).astype(np.float64)
        found.append(logits - logits.max() - np.log(np.exp(logits - logits.max()).sum()))
        texts.append(list(generator.stream_ids(ids, max_tokens=5)))
        engine = generator._engine
        layers, _ = engine._programs_of(None, engine._tensors.step)
        templates = {dispatch.template for dispatch in layers.dispatches}
        assert ("matmul_int_row" in templates) is not is_cpu
    # Two f32 ways through 30 or 18 layers: sums in another order move a logit of 20 by up to 5e-5.
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=2e-4)
    assert texts[0] == texts[1]
