"""A table that stays on the host: which rows travel, and what the device decodes of them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from lora.config.schema import Config
from lora.data.examples import Example
from lora.forward.embedding import embedding
from lora.forward.gguf.file import GGUFTensor
from lora.forward.gguf.quantization import quantize
from lora.forward.model.host_table import HostTable, TableRows
from lora.shaders.errors import InputError
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.training.session import TrainingSession
from tests.support.kernels import with_facts
from tests.support.tiny_models import TINY_MODELS


def table_of(kind: GGMLQuantizationType, rows: int, columns: int) -> tuple[HostTable, np.ndarray]:
    values = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)
    data = quantize(values, kind)
    decoded = gguf.quants.dequantize(data, kind).reshape(rows, columns)
    return HostTable(GGUFTensor("table", kind, (rows, columns), data)), decoded


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q6_K"])
def test_rows_of_tokens(recording: Recording, kind: str) -> None:
    """Repeated tokens, the last one, and fewer than there is room for."""
    table, decoded = table_of(GGMLQuantizationType[kind], 50, 256)
    extent = recording.memory.extent(7)
    rows = TableRows.allocate(recording, table, extent)
    out, program = recording.memory.empty((7, 256), extent=extent), Program(recording)
    embedding(program, rows.slots, rows.matrix, extent, out=out)
    for tokens in ([3, 49, 3, 0, 49], [7]):
        recording.memory.set_rows(extent, len(tokens))
        rows.write(recording.memory, np.array(tokens))
        program.run()
        found = recording.memory.read(out)[: len(tokens)]
        np.testing.assert_allclose(found, decoded[tokens], rtol=1e-6, atol=1e-7)


def test_broken_rows_are_refused_when_they_are_needed(recording: Recording) -> None:
    table, _ = table_of(GGMLQuantizationType.F32, 8, 64)
    table.tensor.data.view(np.float32)[5, 3] = np.nan
    rows = TableRows.allocate(recording, table, recording.memory.extent(4))
    rows.write(recording.memory, [1, 2])
    with pytest.raises(InputError, match="Row 5 of the tensor 'table'"):
        rows.write(recording.memory, [1, 5])


def test_too_many_tokens_are_refused(recording: Recording) -> None:
    table, _ = table_of(GGMLQuantizationType.F32, 8, 64)
    small = with_facts(recording, max_binding=1024)
    with pytest.raises(InputError, match="5 tokens at once need more .* 4 tokens fit"):
        TableRows.allocate(small, table, recording.memory.extent(5))


def test_a_frozen_prefix_is_not_kept(tmp_path: Path) -> None:
    """Layers above it read more than its output."""
    TINY_MODELS["gemma4_upper"].write_gguf(tmp_path / "model.gguf")
    config = {
        "model": {"path": str(tmp_path / "model.gguf")},
        "adapter": {"rank": 4, "alpha": 8, "layers": [5, 6]},
        "data": {"train": "none", "max_length": 8},
        "train": {"steps": 1, "reuse_frozen_prefix": "on"},
        "output": "none",
    }
    examples = [Example(np.arange(3, 9, dtype=np.int32), np.ones(6, bool), 0)]
    with pytest.raises(InputError, match="reuse_frozen_prefix: on: layers of this model read more"):
        TrainingSession(Config.model_validate(config), examples=examples)
    config["train"] = {"steps": 1}
    with TrainingSession(Config.model_validate(config), examples=examples) as session:
        assert len(list(session.train())) == 1
