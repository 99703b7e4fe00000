"""What transformers and PEFT give for the tiny models, as a small file for `make test`.

    python tests/parity/record_tiny.py     # records tests/parity/recorded/tiny_models.npz

Of the logits it keeps a few columns at every position; of every gradient its norm and its sums
under random signs. Such a sum of a difference, squared, is on average the difference's squared
norm: the sums of two gradients show how far apart they are as a whole.
"""

from __future__ import annotations

import sys
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parent.parent.parent
RECORD = Path(__file__).parent / "recorded" / "tiny_models.npz"
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


def main() -> None:
    from tests.parity.tiny_judge import judge
    from tests.support.tiny_models import TINY_MODELS

    arrays = {}
    for name, model in TINY_MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            model.write_adapter(Path(folder))
            judgement = judge(model, Path(folder))
        gradients = sorted(judgement.gradients.items())
        sums = [signed_sums(tensor, gradient) for tensor, gradient in gradients]
        arrays[f"{name}/logits"] = judgement.logits[:, COLUMNS]
        arrays[f"{name}/adapted_logits"] = judgement.adapted_logits[:, COLUMNS]
        arrays[f"{name}/loss"] = np.float64(judgement.loss)
        arrays[f"{name}/gradient_norms"] = np.array(
            [np.linalg.norm(gradient) for _, gradient in gradients], np.float32
        )
        arrays[f"{name}/gradient_sums"] = np.array(sums, np.float32)
        print(f"{name}: loss {judgement.loss:.6f}, {len(gradients)} gradients")
    RECORD.parent.mkdir(exist_ok=True)
    np.savez_compressed(RECORD, **arrays)
    print(f"{RECORD}: {RECORD.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main()
