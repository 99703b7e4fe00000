"""What transformers and PEFT give for the tiny models, as a small file for `make test`.

    python tests/parity/record_tiny.py     # records tests/parity/recorded/tiny_models.npz

Of the logits it keeps a few columns at every position; of every gradient its norm and its sums
under random signs. Such a sum of a difference, squared, is on average the difference's squared
norm: the sums of two gradients show how far apart they are as a whole.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.support.recorded_models import COLUMNS, RECORD, signed_sums

REPOSITORY = Path(__file__).parent.parent.parent


def main() -> None:
    from tests.support.tiny_judge import judge
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
