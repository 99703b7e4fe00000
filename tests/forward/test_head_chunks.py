"""How many rows of logits exist at one time."""

import pytest

from lora.forward.decoder.head import chunk_size
from lora.shaders.memory import CountingMemory
from lora.shaders.recording import Recording
from tests.support.renderings import CPU, MATRIX_GPU, Kind


def _recording(kind: Kind, precision: str) -> Recording:
    return Recording(kind.facts, CountingMemory(kind.facts), precision)


@pytest.mark.parametrize(
    ("vocab_size", "targets", "rows"),
    [
        (49_152, 2048, 512),
        (49_152, 700, 384),  # equal chunks, in 64s
        (128_256, 512, 512),  # 250 MiB
        (248_320, 512, 256),  # 485 MiB would be a quarter of a small model's memory
        (248_320, 128, 128),
        (248_320, 2048, 512),  # where a micro-batch's activations are larger by far
    ],
)
def test_rows_of_matrix_units(vocab_size: int, targets: int, rows: int) -> None:
    recording = _recording(MATRIX_GPU, "f16")
    assert chunk_size(recording, vocab_size, targets) == rows


def test_rows_of_plain_kernels() -> None:
    recording = _recording(CPU, "f32")
    assert chunk_size(recording, 248_320, 2048) == 128
    assert chunk_size(recording, 49_152, 2048) == 320  # 64 MiB
