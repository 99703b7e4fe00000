"""The benchmarks' models: their random weights are ordinary numbers, in every type."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from lora.forward.gguf.file import GGUFFile
from lora.forward.model.architecture import Architecture
from tests.support.synthetic_models import SHAPES, Shape, write_model

TYPES = ("Q8_0", "Q5_0", "Q4_1", "Q4_K", "Q6_K")


@pytest.mark.parametrize("kind", TYPES)
def test_weights_are_centred_and_of_unit_gain(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, Shape("llama", 1, 256, 512, 4, 2, 64, 512, {"weight": kind}))
    for tensor in gguf.GGUFReader(path).tensors:
        if "norm" in tensor.name:
            continue
        assert tensor.tensor_type.name == kind
        weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        gain = weights.std() * np.sqrt(weights.shape[1])
        # Uniform quants of n values have a deviation of n / √12, to a per mille; the scale is
        # written for that to about 1 %, and rounded to f16.
        assert gain == pytest.approx(1.0, rel=0.03)
        # Quants of -n … n - 1 lie half a quant off the middle: of 32 values that is 0.054 of the
        # deviation; the mean of 32,768 and more scatters by 0.006 of it at most.
        assert abs(weights.mean()) < 0.08 * weights.std()


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_whole_models(name: str) -> None:
    shape = SHAPES[name]
    for tensor, sizes in shape.tensors().items():
        block_size, _ = gguf.GGML_QUANT_SIZES[shape.type_of(tensor)]
        assert sizes[-1] % block_size == 0, tensor


def test_a_model_is_read_as_it_was_meant(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shape = SHAPES["tiny"]
    write_model(path, shape)
    architecture = Architecture.from_gguf(GGUFFile(path))
    for field in ("n_layers", "hidden_size", "vocab_size"):
        assert getattr(architecture, field) == getattr(shape, field), field
    for spec in architecture.layers:
        for field in ("n_heads", "n_kv_heads", "head_size"):
            assert getattr(spec.mixer, field) == getattr(shape, field), field
        assert spec.feed_forward.intermediate_size == shape.intermediate_size
