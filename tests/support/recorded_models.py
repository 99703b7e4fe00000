"""What transformers and PEFT gave for the tiny models, recorded by tests/parity/record_tiny.py."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RECORD = Path(__file__).parents[1] / "parity" / "recorded" / "tiny_models.npz"
COLUMNS = np.array([7, 40, 93, 150, 201, 256, 290, 316])  # of the vocabulary
N_SIGNS = 8


@dataclass(frozen=True)
class Recorded:
    """What was kept of a judgement."""

    logits: np.ndarray  # [tokens, COLUMNS]
    adapted_logits: np.ndarray  # [tokens, COLUMNS]
    loss: float
    gradient_norms: np.ndarray  # [tensors], in the order of their sorted names
    gradient_sums: np.ndarray  # [tensors, N_SIGNS]


def signed_sums(name: str, gradient: np.ndarray) -> np.ndarray:
    """Σ ± gradient under N_SIGNS choices of signs that follow from the tensor's name."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    signs = 2.0 * random.randint(0, 2, (N_SIGNS, gradient.size)) - 1.0
    return signs @ gradient.reshape(-1).astype(np.float64)


def load_record() -> dict[str, Recorded]:
    """The recorded judgements by the tiny model's name."""
    with np.load(RECORD) as arrays:
        cases = sorted({key.split("/")[0] for key in arrays})
        return {
            case: Recorded(
                logits=arrays[f"{case}/logits"],
                adapted_logits=arrays[f"{case}/adapted_logits"],
                loss=float(arrays[f"{case}/loss"]),
                gradient_norms=arrays[f"{case}/gradient_norms"],
                gradient_sums=arrays[f"{case}/gradient_sums"],
            )
            for case in cases
        }
