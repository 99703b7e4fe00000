"""The judge: the same training in PyTorch, transformers and PEFT, on the CPU in float32.

    python tests/parity/peft_reference.py      # records tests/parity/smollm2_reference.json

`make test` holds the recorded figures against ours; `make parity` runs both sides live.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy

FOLDER = Path(__file__).parent
REPOSITORY = FOLDER.parent.parent
MODEL = REPOSITORY / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
RECORD = FOLDER / "smollm2_reference.json"
TEXTS: dict[str, list[str]] = json.loads((FOLDER / "texts.json").read_text())

RANK, ALPHA = 8, 16
LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY, MAX_NORM = 1e-4, (0.9, 0.999), 1e-8, 0.01, 1.0
SAMPLED_LAYERS = (0, 14, 29)
_SIZES = {  # (in, out) of SmolLM2-135M's matrices
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (576, 192),
    "self_attn.v_proj": (576, 192),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (576, 1536),
    "mlp.up_proj": (576, 1536),
    "mlp.down_proj": (1536, 576),
}


@dataclass(frozen=True)
class ReferenceRun:
    """What eight steps of PEFT gave."""

    losses: list[float]
    grad_norms: list[float]
    final: dict[str, np.ndarray]  # A and B by PEFT's tensor names
    eval_losses: list[float]  # of the final adapter


def make_adapter(directory: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Writes a PEFT adapter with non-zero A and B on all matrices; returns its tensors."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(30):
        for name, (n_in, n_out) in _SIZES.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            bound = 1 / np.sqrt(n_in)
            a = rng.uniform(-bound, bound, (RANK, n_in))
            b = rng.normal(0, 0.02, (n_out, RANK))
            tensors[f"{path}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"{path}.lora_B.weight"] = b.astype(np.float32)
    directory.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(MODEL),
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted(name.split(".")[1] for name in _SIZES),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": False,
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return tensors


def token_ids(model_path: Path = MODEL) -> dict[str, list[list[int]]]:
    """The texts as ids, by the GGUF's own tokenizer (transformers drops its digit splitting)."""
    from forward.gguf_file import GGUFFile
    from forward.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_gguf(GGUFFile(model_path))
    return {split: [tokenizer.encode(t).ids for t in texts] for split, texts in TEXTS.items()}


def load_peft_model(model_path: Path, adapter: Path, *, trainable: bool):
    """The GGUF's weights in float32 through transformers, wrapped by PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    base = AutoModelForCausalLM.from_pretrained(
        model_path.parent,
        gguf_file=model_path.name,
        dtype=torch.float32,
        attn_implementation="eager",
    )
    return PeftModel.from_pretrained(base, adapter, is_trainable=trainable)


def eval_losses(model_path: Path, adapter: Path, rows: list[list[int]]) -> list[float]:
    """The mean loss of each row under any PEFT adapter directory."""
    import torch

    net = load_peft_model(model_path, adapter, trainable=False).eval()
    with torch.no_grad():
        return [float(net(input_ids=x, labels=x).loss) for x in (torch.tensor([r]) for r in rows)]


def run_reference(model_path: Path, adapter: Path) -> ReferenceRun:
    """Eight steps, a text each, every token trained: AdamW, clipping at 1.0, constant rate."""
    import torch

    rows = token_ids(model_path)
    net = load_peft_model(model_path, adapter, trainable=True).train()
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY
    )
    losses, norms = [], []
    for ids in rows["train"]:
        x = torch.tensor([ids])
        loss = net(input_ids=x, labels=x).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    final = {
        name.replace(".default", ""): p.detach().numpy().copy()
        for name, p in net.named_parameters()
        if p.requires_grad
    }
    net.eval()
    with torch.no_grad():
        held_out = [
            float(net(input_ids=x, labels=x).loss)
            for x in (torch.tensor([r]) for r in rows["eval"])
        ]
    return ReferenceRun(losses, norms, final, held_out)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder)
        initial = make_adapter(adapter)
        before = eval_losses(MODEL, adapter, token_ids()["eval"])
        run = run_reference(MODEL, adapter)
    sampled = {}
    rng = np.random.default_rng(1)
    for name, start in initial.items():
        if int(name.split(".layers.")[1].split(".")[0]) in SAMPLED_LAYERS:
            places = rng.integers(0, start.size, 8)
            sampled[name] = {
                "movement": float(np.linalg.norm(run.final[name] - start)),
                "places": places.tolist(),
                "values": run.final[name].reshape(-1)[places].tolist(),
            }
    total = sum(
        float(((run.final[n] - s).astype(np.float64) ** 2).sum()) for n, s in initial.items()
    )
    record = {
        "losses": run.losses,
        "grad_norms": run.grad_norms,
        "eval_losses_before": before,
        "eval_losses_after": run.eval_losses,
        "movement": total**0.5,
        "sampled": sampled,
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print({k: v for k, v in record.items() if k != "sampled"})


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main()
