"""Host memory of training the real model, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# A process of its own compiles the real kernels with all optimizations: 80 s of a processor. In
# `make test` tests/parity/test_recorded.py has the same bound of the steps that run there anyway.
pytestmark = [pytest.mark.parity, pytest.mark.long]

QUICK = {"GALLIVM_PERF", "LP_NATIVE_VECTOR_WIDTH", "OPENBLAS_NUM_THREADS"}  # of the Makefile

# Peak resident memory above that of the interpreter with its libraries loaded. On the software
# driver the device's memory is the host's and counts too.
SCRIPT = """
import json, resource, sys
import lora, datasets, tokenizers, wgpu
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
overrides = ["train.steps=1", "data.eval=null"]
session = lora.TrainingSession.from_config("configs/quickstart.yaml", overrides)
n_steps = len(list(session.train()))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([before / 1024, after / 1024, n_steps]))
"""


def test_training_takes_at_most_600_megabytes(smollm2: Path) -> None:
    repository = Path(__file__).parents[3]
    # Steps of the real model take minutes without the optimizations that `make test` goes without.
    environment = {name: value for name, value in os.environ.items() if name not in QUICK}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=repository, capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    before, after, n_steps = json.loads(result.stdout.splitlines()[-1])
    print(f"{before:.0f} MB before, {after:.0f} MB at the peak")
    assert n_steps == 1
    assert after - before <= 600
