"""The judge: the same training in PyTorch, transformers and PEFT, on the CPU in float32.

    python tests/support/peft_reference.py     # records tests/parity/recorded/{smollm2,gemma3}.json

`make test` holds the recorded figures against ours; `make parity` runs both sides live.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors.numpy

if TYPE_CHECKING:
    from peft import PeftModel

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "tests" / "parity"
TEXTS: dict[str, list[str]] = json.loads((FOLDER / "texts.json").read_text())

RANK, ALPHA = 8, 16
LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY, MAX_NORM = 1e-4, (0.9, 0.999), 1e-8, 0.01, 1.0


@dataclass(frozen=True)
class RealModel:
    """A real GGUF that both sides train.

    Attributes:
        name: of its fixture in tests/conftest.py, and of its recorded figures.
        file: in models/.
        n_layers: decoder layers.
        sampled_layers: whose final adapters are recorded in part.
        sizes: (in, out) of each adapted matrix of a layer.
    """

    name: str
    file: str
    n_layers: int
    sampled_layers: tuple[int, ...]
    sizes: dict[str, tuple[int, int]]

    @property
    def path(self) -> Path:
        return REPOSITORY / "models" / self.file

    @property
    def record(self) -> Path:
        return FOLDER / "recorded" / f"{self.name}.json"


def _sizes(hidden: int, query: int, kv: int, intermediate: int) -> dict[str, tuple[int, int]]:
    return {
        "self_attn.q_proj": (hidden, query),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (query, hidden),
        "mlp.gate_proj": (hidden, intermediate),
        "mlp.up_proj": (hidden, intermediate),
        "mlp.down_proj": (intermediate, hidden),
    }


SMOLLM2 = RealModel(
    "smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", 30, (0, 14, 29), _sizes(576, 576, 192, 1536)
)
# Layers 5 and 17 see all, the others a window; layer 17 is the last.
GEMMA3 = RealModel(
    "gemma3", "gemma-3-270m-q4_k_m.gguf", 18, (0, 5, 17), _sizes(640, 1024, 256, 2048)
)
REAL_MODELS = {model.name: model for model in (SMOLLM2, GEMMA3)}


@dataclass(frozen=True)
class ReferenceRun:
    """What eight steps of PEFT gave."""

    losses: list[float]
    grad_norms: list[float]
    final: dict[str, np.ndarray]  # A and B by PEFT's tensor names
    eval_losses: list[float]  # of the final adapter


def make_adapter(model: RealModel, directory: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Writes a PEFT adapter with non-zero A and B on all matrices; returns its tensors."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(model.n_layers):
        for name, (n_in, n_out) in model.sizes.items():
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
        "base_model_name_or_path": str(model.path),
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted(name.split(".")[1] for name in model.sizes),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": False,
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return tensors


def token_ids(model_path: Path) -> dict[str, list[list[int]]]:
    """The texts as ids, by the GGUF's own tokenizer (transformers drops its digit splitting)."""
    from lora.forward.gguf.file import GGUFFile
    from lora.forward.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_gguf(GGUFFile(model_path))
    return {split: [tokenizer.encode(t).ids for t in texts] for split, texts in TEXTS.items()}


def load_peft_model(model_path: Path, adapter: Path, *, trainable: bool) -> PeftModel:
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


def record(model: RealModel) -> None:
    """Writes what PEFT gives for a model."""
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder)
        initial = make_adapter(model, adapter)
        before = eval_losses(model.path, adapter, token_ids(model.path)["eval"])
        run = run_reference(model.path, adapter)
    sampled = {}
    rng = np.random.default_rng(1)
    for name, start in initial.items():
        if int(name.split(".layers.")[1].split(".")[0]) in model.sampled_layers:
            places = rng.integers(0, start.size, 8)
            sampled[name] = {
                "movement": float(np.linalg.norm(run.final[name] - start)),
                "places": places.tolist(),
                "values": run.final[name].reshape(-1)[places].tolist(),
            }
    total = sum(
        float(((run.final[n] - s).astype(np.float64) ** 2).sum()) for n, s in initial.items()
    )
    figures = {
        "losses": run.losses,
        "grad_norms": run.grad_norms,
        "eval_losses_before": before,
        "eval_losses_after": run.eval_losses,
        "movement": total**0.5,
        "sampled": sampled,
    }
    model.record.write_text(json.dumps(figures, indent=1) + "\n")
    print({k: v for k, v in figures.items() if k != "sampled"})


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    for name in sys.argv[1:] or REAL_MODELS:
        record(REAL_MODELS[name])
