"""Nothing measured: fills torch.compile's cache on disk for vs_peft.py, all shapes at once.

A shape takes PyTorch over a minute to compile, most of it on one core, and a lent GPU's minutes are
few. Here each has a process, so that vs_peft.py's `compile` finds its graphs.

    export TORCHINDUCTOR_CACHE_DIR=/tmp/inductor
    python benchmarks/compile_ahead.py --shapes Llama-1.2B:1x512,4x512 SmolLM2-135M:1x512
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.peft_side import PEFT_VARIANTS, load_base, peft
from benchmarks.sessions import Case
from benchmarks.synthetic import write_models
from benchmarks.vs_peft import parse_shapes
from tests.support.synthetic_runs import ALPHA, RANK

_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def compile_one(name: str, case: Case) -> float:
    """Takes PEFT's compiled steps of a random model once; returns their milliseconds."""
    import torch
    from peft import LoraConfig, get_peft_model

    with tempfile.TemporaryDirectory() as folder:
        path = write_models(Path(folder), [name])[name]
        base = load_base(path)
        for parameter in base.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        # What vs_peft.py's adapter is: other settings would be another graph.
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, task_type="CAUSAL_LM", target_modules=_LINEAR)
        adapter = Path(folder) / "adapter"
        net = get_peft_model(base, config)
        net.save_pretrained(adapter)
        timed = peft(net.unload(), name, case, PEFT_VARIANTS["compile"], adapter)
        return float(timed["ms"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", required=True, metavar="MODEL:BATCHxLENGTH,…")
    parser.add_argument("--one", action="store_true", help="the only shape, in this process")
    options = parser.parse_args()
    cases = [(n, case) for n, of in parse_shapes(options.shapes, 1).items() for case in of]
    if options.one:
        ((name, case),) = cases
        print(f"{name} {case}: {compile_one(name, case):.1f} ms", flush=True)
        return
    texts = [
        f"{name}:{case.batch_size}x{case.length}{'p' if case.packed else ''}"
        for name, case in cases
    ]
    running = [
        subprocess.Popen([sys.executable, __file__, "--one", "--shapes", text]) for text in texts
    ]
    ended = [process.wait() for process in running]
    for text, status in zip(texts, ended, strict=True):
        if status:
            print(f"{text}: exit status {status}", flush=True)
    raise SystemExit(any(ended))


if __name__ == "__main__":
    main()
