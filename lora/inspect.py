"""What a GGUF file or an adapter directory holds, as tables."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

from rich.table import Table

from forward.architecture import Architecture
from forward.gguf_file import GGUFFile
from forward.tokenizer import Tokenizer
from lora.peft_files import read_peft_modules, read_peft_settings
from shaders.errors import InputError


def describe_gguf(path: Path) -> list[Table | str]:
    """Architecture, sizes, tensor types, tokenizer, and whether it can be trained here.

    Raises:
        InputError: the file cannot be read as GGUF.
    """
    gguf_file = GGUFFile(path)
    metadata = gguf_file.metadata
    prefix = str(metadata.get("general.architecture"))
    facts = Table.grid(padding=(0, 2))
    facts.add_row(
        "file", f"{path} ({path.stat().st_size / 2**20:.1f} MiB, GGUF {gguf_file.version})"
    )
    facts.add_row("name", str(metadata.get("general.name", "")))
    facts.add_row("architecture", prefix)
    parameters = sum(math.prod(tensor.shape) for tensor in gguf_file.tensors.values())
    facts.add_row("parameters", f"{parameters:,}")
    for label, key in (
        ("layers", "block_count"),
        ("hidden size", "embedding_length"),
        ("feed-forward", "feed_forward_length"),
        ("heads", "attention.head_count"),
        ("KV heads", "attention.head_count_kv"),
        ("context", "context_length"),
    ):
        facts.add_row(label, str(metadata.get(f"{prefix}.{key}", "")))
    tokenizer = metadata.get("tokenizer.ggml.model")
    entries = len(metadata.get("tokenizer.ggml.tokens", []))
    pre = metadata.get("tokenizer.ggml.pre", "")
    facts.add_row("tokenizer", f"{tokenizer} {pre}, {entries:,} entries" if tokenizer else "none")
    facts.add_row("chat template", "yes" if metadata.get("tokenizer.chat_template") else "no")
    facts.add_row("can be trained", _trainable(gguf_file))

    types = Table("type", "tensors", "parameters", "MiB")
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for tensor in gguf_file.tensors.values():
        row = counts[tensor.type.name]
        row[0] += 1
        row[1] += math.prod(tensor.shape)
        row[2] += tensor.data.nbytes
    for name, (n_tensors, n_parameters, n_bytes) in sorted(counts.items(), key=lambda c: -c[1][2]):
        types.add_row(name, str(n_tensors), f"{n_parameters:,}", f"{n_bytes / 2**20:.1f}")
    return [facts, types]


def _trainable(gguf_file: GGUFFile) -> str:
    try:
        Architecture.from_gguf(gguf_file)
    except InputError as error:
        return f"no: {error}"
    try:
        Tokenizer.from_gguf(gguf_file)
    except InputError as error:
        return f"yes, with model.tokenizer set ({error})"
    return "yes"


def describe_adapter(directory: Path) -> list[Table | str]:
    """Rank, scale, targets, layers and parameters of a PEFT adapter directory.

    Raises:
        InputError: there is no LoRA adapter in it.
    """
    settings = read_peft_settings(directory)
    modules = read_peft_modules(directory)
    layers = sorted({int(path.split(".layers.")[1].split(".")[0]) for path in modules})
    facts = Table.grid(padding=(0, 2))
    facts.add_row("adapter", str(directory))
    facts.add_row("base", str(settings.get("base_model_name_or_path", "")))
    facts.add_row("rank", str(settings["r"]))
    facts.add_row("alpha", f"{settings['lora_alpha']:g}")
    facts.add_row("variant", "rslora" if settings.get("use_rslora") else "lora")
    facts.add_row("layers", f"{len(layers)}: {layers[0]} to {layers[-1]}" if layers else "none")
    facts.add_row("parameters", f"{sum(a.size + b.size for a, b in modules.values()):,}")

    matrices = Table("matrix", "modules", "A", "B", "mean |A|", "mean |B|")
    by_name: dict[str, list[str]] = defaultdict(list)
    for path in modules:
        by_name[path.rsplit(".", 1)[1]].append(path)
    for name, paths in sorted(by_name.items()):
        a, b = modules[paths[0]]
        sizes = [(abs(modules[p][0]).mean(), abs(modules[p][1]).mean()) for p in paths]
        mean_a, mean_b = (sum(column) / len(paths) for column in zip(*sizes, strict=True))
        matrices.add_row(
            name, str(len(paths)), str(a.shape), str(b.shape), f"{mean_a:.4g}", f"{mean_b:.4g}"
        )
    return [facts, matrices]
