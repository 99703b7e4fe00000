"""PEFT's side of benchmarks/vs_peft.py: transformers' model, and its variants as users run them."""

from __future__ import annotations

import gc
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sessions import Case, step_times

LEARNING_RATE = 1e-4
IGNORED = -100  # the label of what is not trained
# More numbers than this are not read from a GGUF, which takes transformers minutes: such a model
# gets random ones, and its losses are not ours.
MOST_READ = 3_000_000_000


@dataclass(frozen=True)
class Variant:
    """One way to run PEFT.

    Attributes:
        dtype: of the base; PEFT keeps the adapter in float32.
        checkpointing: as transformers does it, a layer at a time.
        kernels: liger for Liger-Kernel's (Hsu et al. 2024), compile for torch.compile's, nf4 for a
            base in bitsandbytes' NF4 (Dettmers et al. 2023, QLoRA); none: eager.
    """

    dtype: str
    checkpointing: bool = False
    kernels: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """As tables name it."""
        return ", ".join(
            [f"PEFT {self.dtype}", *self.kernels, *["checkpointing"] * self.checkpointing]
        )


# In the order in which one model on the device serves most: once cast to bfloat16 it stays so, as
# it keeps Liger's kernels and NF4's weights (`serves`).
PEFT_VARIANTS = {
    "float32": Variant("float32"),
    "float32-checkpointing": Variant("float32", True),
    "bfloat16": Variant("bfloat16"),
    "bfloat16-checkpointing": Variant("bfloat16", True),
    "compile": Variant("bfloat16", kernels=("compile",)),
    "liger": Variant("bfloat16", kernels=("liger",)),
    "liger-checkpointing": Variant("bfloat16", True, ("liger",)),
    "nf4-checkpointing": Variant("bfloat16", True, ("nf4",)),
    "nf4-liger-checkpointing": Variant("bfloat16", True, ("nf4", "liger")),
}


def make_base(path: Path) -> None:
    """Leaves transformers' model of a GGUF, in float32, as a pickle beside it.

    This is most of what a comparison's set-up takes, and one core's work: it is done once a model,
    for several models at a time. (save_pretrained refuses a model that came out of a GGUF.) Large
    models have none: `load_base` makes up their numbers.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if _is_large(path):
        return
    torch.set_num_threads(2)
    base = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    torch.save(base, path.with_suffix(".pt"))


def _is_large(path: Path) -> bool:
    from lora.forward.gguf.file import GGUFFile

    return sum(int(np.prod(t.shape)) for t in GGUFFile(path).tensors.values()) > MOST_READ


def load_base(path: Path) -> Any:
    """Transformers' model, on the GPU if PyTorch has one.

    As `make_base` left it, in float32; a large one in bfloat16, with random numbers.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if path.with_suffix(".pt").exists():
        base = torch.load(path.with_suffix(".pt"), weights_only=False, mmap=True)
        return base.to(device)
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    base.random_weights = True
    return base


def peft(base: Any, name: str, case: Case, variant: Variant, adapter: Path) -> dict[str, Any]:
    """Times PEFT's steps from the same adapter; leaves `base` as it was but for its kernels.

    Args:
        base: transformers' model, in float32 or already in the variant's dtype.
    """
    import torch
    from peft import PeftModel

    on_gpu = base.device.type == "cuda"
    prepare(base, variant)
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if variant.checkpointing:
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
    net = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    net.train()
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    # Rows of several lengths would otherwise be compiled anew for each.
    dynamic = True if case.packed else None
    compiles = "compile" in variant.kernels
    forward = torch.compile(net, dynamic=dynamic) if compiles else net
    losses, norms = [], []
    sequences = case.data(name)

    def step(number: int) -> None:
        first = number * case.batch_size
        inputs = padded(sequences[first : first + case.batch_size], base.device)
        loss = forward(**inputs, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        _wait(on_gpu)
        losses.append(float(loss.detach()))
        norms.append(float(norm))

    n_batches = len(sequences) // case.batch_size
    for number in range(n_batches):
        step(number)
    n_compared = len(losses)
    times = step_times(step, n_batches, case.steps)
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
    reserved = torch.cuda.max_memory_reserved() / 2**20 if on_gpu else None
    net.unload()
    if compiles:
        torch.compiler.reset()
    if variant.checkpointing:
        base.gradient_checkpointing_disable()
        base.disable_input_require_grads()
    random = getattr(base, "random_weights", False)
    return {
        "ms": 1e3 * statistics.median(times),
        "memory_MiB": peak,
        "reserved_MiB": reserved,
        "losses": None if random else losses[:n_compared],
        "norms": None if random else norms[:n_compared],
    }


def padded(sequences: list[np.ndarray], device: Any) -> dict[str, Any]:
    """A batch of token ids; shorter ones end with what is neither seen nor trained."""
    import torch

    length = max(len(ids) for ids in sequences)
    ids = np.zeros((len(sequences), length), np.int64)
    labels = np.full_like(ids, IGNORED)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = labels[row, : len(sequence)] = sequence
    batch = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
    if any(len(sequence) < length for sequence in sequences):
        batch["attention_mask"] = torch.tensor((labels != IGNORED).astype(np.int64))
    return {key: value.to(device) for key, value in batch.items()}


def serves(base: Any, variant: Variant) -> bool:
    """Whether a base has no kernels or weights of other variants that this one is without."""
    return base.__dict__.get("prepared_for", set()) <= {*variant.kernels}


def prepare(base: Any, variant: Variant) -> None:
    """Casts the base and puts a variant's kernels or weights into it, once."""
    import torch

    done = base.__dict__.setdefault("prepared_for", set())
    # No buffers: in from_pretrained's bfloat16 models too, rotary frequencies are float32.
    for parameter in base.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(getattr(torch, variant.dtype))
    if "liger" in variant.kernels and "liger" not in done:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=base)
    if "nf4" in variant.kernels and "nf4" not in done:
        quantize_to_nf4(base)
    done.update({"liger", "nf4"}.intersection(variant.kernels))


def quantize_to_nf4(base: Any) -> None:
    """Puts bitsandbytes' NF4 in place of every linear layer's weights but the head's, as QLoRA."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, module in list(base.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name.endswith("lm_head"):
            continue
        linear = Linear4bit(
            module.in_features, module.out_features, bias=module.bias is not None,
            compute_dtype=torch.bfloat16, quant_type="nf4", device="meta",
        )  # fmt: skip
        weight = module.weight.data
        linear.weight = Params4bit(weight, requires_grad=False, quant_type="nf4").to(base.device)
        linear.bias = module.bias
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, linear)
    base.is_loaded_in_4bit = True  # what PEFT asks


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        import torch

        torch.cuda.synchronize()
