"""What a GGUF file or an adapter directory holds, as values and as tables."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from lora.adapters.gguf_files import read_adapter_settings
from lora.adapters.peft_files import (
    read_peft_factors,
    read_peft_settings,
    read_trained_tokens,
)
from lora.adapters.saved_factors import SavedFactors
from lora.commands.tables import Records, Rows, tokens_shown
from lora.forward.gguf.file import GGUFFile
from lora.forward.gguf.quantization import QUANTIZATIONS
from lora.forward.model.architecture import Architecture
from lora.forward.model.families import FAMILIES
from lora.forward.text.tokenizer import Tokenizer
from lora.shaders.errors import InputError
from lora.storage.stores import resolve_model

# What the sizes are called, by their keys without the architecture's prefix.
_SIZES = {
    "block_count": "layers",
    "embedding_length": "hidden size",
    "feed_forward_length": "feed-forward",
    "attention.head_count": "heads",
    "attention.head_count_kv": "KV heads",
    "attention.key_length": "head size",
    "expert_count": "experts",
    "context_length": "context",
    "shortconv.l_cache": "convolution taps",
    "full_attention_interval": "attention every",
    "ssm.group_count": "DeltaNet key heads",
    "ssm.time_step_rank": "DeltaNet value heads",
    "ssm.state_size": "DeltaNet head size",
    "attention.sliding_window": "sliding window",
    "attention.sliding_window_pattern": "window pattern",
}
_MOST_SHOWN = 10_000  # values of a list that are counted one by one; layers are fewer
_SPECIAL = ("bos", "eos", "eot", "unknown", "padding")


def gguf_facts(model: str | Path) -> dict[str, Any]:
    """What a GGUF says of itself, as values that JSON can hold.

    Args:
        model: a path, ollama:NAME[:TAG] or hf:ORG/REPO/FILE.

    Returns:
        model: as given; files, bytes, gguf_version; name, architecture, parameters; sizes and
        rope, each metadata key without its prefix to a value or a list of one a layer;
        models, well-known ones of the architecture (or None); adaptable, a list of module (PEFT's
        name), layers (how many have it) and of, all layers; left_alone, what tensors are that text
        doesn't need, each with how many; tensor_types, a list of type, tensors, parameters, bytes,
        the largest first; tokenizer, None or kind, pre, entries, special (id and text by role),
        problem (why the file's own can't be used, or None); chat_template, None or characters and
        first_line; adapter, None or rank (the highest), ranks, alpha (or None) and tensors of a
        GGUF adapter; trainable, and obstacles, the reasons why it can't be trained.

    Raises:
        InputError: there is no such file, or it cannot be read as GGUF.
        LoraError: it can't be fetched.
    """
    gguf_file = GGUFFile(resolve_model(model))
    metadata = gguf_file.metadata
    prefix = f"{metadata.get('general.architecture')}."
    rope = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(f"{prefix}rope")}
    rope_tensors = [name for name in gguf_file.tensors if name.startswith("rope_")]
    obstacles = _obstacles(gguf_file)
    architecture = None if obstacles else Architecture.from_gguf(gguf_file)
    return {
        "model": str(model),
        "files": [str(path) for path in gguf_file.paths],
        "bytes": gguf_file.n_bytes,
        "gguf_version": gguf_file.version,
        "name": metadata.get("general.name"),
        "architecture": metadata.get("general.architecture"),
        "parameters": sum(math.prod(tensor.shape) for tensor in gguf_file.tensors.values()),
        "sizes": {key: metadata[prefix + key] for key in _SIZES if prefix + key in metadata},
        "rope": rope | ({"tensors": rope_tensors} if rope_tensors else {}),
        "models": None if architecture is None else FAMILIES[architecture.name].models,
        "adaptable": [] if architecture is None else _adaptable(architecture),
        "left_alone": {} if architecture is None else dict(architecture.unused),
        "tensor_types": _tensor_types(gguf_file),
        "tokenizer": _tokenizer_facts(gguf_file),
        "chat_template": _chat_template_facts(metadata.get("tokenizer.chat_template")),
        "adapter": _adapter_facts(gguf_file),
        "trainable": not obstacles,
        "obstacles": obstacles,
    }


def _adaptable(architecture: Architecture) -> list[dict[str, Any]]:
    """The matrices of the layers that LoRA can adapt, by PEFT's names."""
    found: Counter[str] = Counter(
        matrix.module
        for spec in architecture.layers
        for members in spec.groups.values()
        for matrix in members
    )
    n_layers = architecture.n_layers
    return [{"module": name, "layers": n, "of": n_layers} for name, n in found.items()]


def _tensor_types(gguf_file: GGUFFile) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for tensor in gguf_file.tensors.values():
        name = tensor.type.name
        row = rows.setdefault(name, {"type": name, "tensors": 0, "parameters": 0, "bytes": 0})
        row["tensors"] += 1
        row["parameters"] += math.prod(tensor.shape)
        row["bytes"] += tensor.data.nbytes
    return sorted(rows.values(), key=lambda row: -row["bytes"])


def _tokenizer_facts(gguf_file: GGUFFile) -> dict[str, Any] | None:
    metadata = gguf_file.metadata
    if "tokenizer.ggml.model" not in metadata:
        return None
    tokens = metadata.get("tokenizer.ggml.tokens")
    texts = tokens if isinstance(tokens, list) else []
    special = {}
    for role in _SPECIAL:
        token = metadata.get(f"tokenizer.ggml.{role}_token_id")
        if isinstance(token, int):
            text = texts[token] if 0 <= token < len(texts) else None
            special[role] = {"id": token, "text": text}
    return {
        "kind": metadata["tokenizer.ggml.model"],
        "pre": metadata.get("tokenizer.ggml.pre"),
        "entries": len(texts),
        "special": special,
        "problem": _refusal(gguf_file, Tokenizer),
    }


def _chat_template_facts(template: Any) -> dict[str, Any] | None:
    if not isinstance(template, str) or not template.strip():
        return None
    return {"characters": len(template), "first_line": template.strip().splitlines()[0]}


def _adapter_facts(gguf_file: GGUFFile) -> dict[str, Any] | None:
    if gguf_file.metadata.get("general.type") != "adapter":
        return None
    settings = read_adapter_settings(gguf_file.path)
    ranks = sorted(set(settings.ranks.values()))
    return {
        "rank": settings.rank,
        "ranks": ranks,
        "alpha": settings.alpha,
        "tensors": len(settings.ranks),
    }


def _obstacles(gguf_file: GGUFFile) -> list[str]:
    """Why the model can't be trained: what its architecture lacks first, then its types."""
    refusal = _refusal(gguf_file, Architecture)
    if refusal is None:
        return []
    types = {tensor.type for tensor in gguf_file.tensors.values() if len(tensor.shape) > 1}
    unsupported = sorted(kind.name for kind in types - set(QUANTIZATIONS))
    if not unsupported or "is stored as" in refusal:
        return [refusal]
    return [refusal, f"Matrices stored as {', '.join(unsupported)} are not supported."]


def _refusal(gguf_file: GGUFFile, made_of: type[Architecture] | type[Tokenizer]) -> str | None:
    """What making one of these out of the file fails with, without the file's path."""
    try:
        made_of.from_gguf(gguf_file)
    except InputError as error:
        return str(error).replace(str(gguf_file.path), "This file")
    return None


def describe_gguf(model: str | Path) -> list[Rows | Records]:
    """`gguf_facts` as tables.

    Raises:
        InputError: there is no such file, or it cannot be read as GGUF.
        LoraError: it can't be fetched.
    """
    facts = gguf_facts(model)
    n_files = len(facts["files"])
    of_files = f"{n_files} files, " if n_files > 1 else ""
    size = f"{of_files}{facts['bytes'] / 2**20:.1f} MiB, GGUF {facts['gguf_version']}"
    rows = {
        "file": f"{facts['files'][0]} ({size})",
        "name": facts["name"],
        "architecture": facts["architecture"]
        if facts["models"] is None
        else f"{facts['architecture']} ({facts['models']})",
        "parameters": f"{facts['parameters']:,}",
    }
    rows |= {label: facts["sizes"].get(key) for key, label in _SIZES.items()}
    rows["rope"] = ", ".join(
        f"{key.removeprefix('rope.')} {_shown(value)}" for key, value in facts["rope"].items()
    )
    tokenizer, template = facts["tokenizer"], facts["chat_template"]
    if tokenizer is None:
        rows["tokenizer"] = "none"
    else:
        kind = " ".join(_shown(tokenizer[key]) for key in ("kind", "pre") if tokenizer[key])
        rows["tokenizer"] = f"{kind}, {tokenizer['entries']:,} entries"
        rows["special tokens"] = ", ".join(
            f"{role} {token['id']} {token['text'] or ''}"
            for role, token in tokenizer["special"].items()
        )
    rows["chat template"] = (
        "no"
        if template is None
        else f"yes, {template['characters']:,} characters: "
        f"{template['first_line'][:60]}{'…' * (template['characters'] > 60)}"
    )
    if facts["adapter"] is not None:
        adapter = facts["adapter"]
        rows["adapter"] = (
            f"LoRA of {_ranks_shown(adapter['ranks'])}, alpha "
            f"{'none' if adapter['alpha'] is None else _shown(adapter['alpha'])}, on "
            f"{adapter['tensors']} tensors; train from it with adapter.init_from"
        )
    elif facts["obstacles"]:
        rows["can be trained"] = "no: " + " ".join(facts["obstacles"])
    elif tokenizer is None or tokenizer["problem"]:
        why = tokenizer["problem"] if tokenizer else "the file has none"
        rows["can be trained"] = f"yes, with model.tokenizer set ({why})"
    else:
        rows["can be trained"] = "yes"

    if facts["adaptable"]:
        rows["adapter.targets"] = ", ".join(
            row["module"] + (f" ({row['layers']} layers)" if row["layers"] < row["of"] else "")
            for row in facts["adaptable"]
        )
    if facts["left_alone"]:
        rows["left alone"] = ", ".join(
            f"{what} ({n} tensors)" for what, n in facts["left_alone"].items()
        )
    known = {label: _shown(value) for label, value in rows.items() if value not in (None, "", [])}
    types = [
        (row["type"], str(row["tensors"]), f"{row['parameters']:,}", f"{row['bytes'] / 2**20:.1f}")
        for row in facts["tensor_types"]
    ]
    return [Rows(known), Records(("type", "tensors", "parameters", "MiB"), types)]


def _shown(value: Any) -> str:
    """A value out of a file for the terminal; of a list with one entry a layer, how often what."""
    if isinstance(value, list):
        if len(value) > _MOST_SHOWN:
            return f"{len(value):,} values"
        counts = Counter(map(_shown, value))
        if len(counts) == 1:
            return next(iter(counts))
        if len(counts) > 4:
            return f"{len(value)} values, {_shown(min(value))} to {_shown(max(value))}"
        return ", ".join(f"{text} ({n} times)" for text, n in counts.items())
    if isinstance(value, float):
        return f"{value:.10g}"
    # A terminal obeys control characters.
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value)
    )


def _ranks_shown(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def adapter_facts(directory: Path) -> dict[str, Any]:
    """What a PEFT adapter directory says of itself, as values that JSON can hold.

    Returns:
        adapter: as given; base: what it names as such; rank and alpha: what its config says;
        ranks, all that occur; variant: lora, rslora, dora or dora-rslora; layers, their numbers;
        parameters; trainable_tokens, ids whose rows of the embedding it has; matrices, a list of
        name, modules (how many), ranks and scales that occur, in_features, out_features, and mean_a
        and mean_b, the mean sizes of the numbers in A and B.

    Raises:
        InputError: there is no LoRA adapter in it.
    """
    settings = read_peft_settings(directory)
    modules = read_peft_factors(directory, settings)
    tokens = read_trained_tokens(directory, settings)
    layered = (path.split(".layers.")[1] for path in modules if ".layers." in path)
    by_name: dict[str, list[SavedFactors]] = defaultdict(list)
    for path, factors in modules.items():
        by_name[path.rpartition(".")[2]].append(factors)
    kinds = [kind for kind in ("dora", "rslora") if settings.get(f"use_{kind}")]
    return {
        "adapter": str(directory),
        "base": settings.get("base_model_name_or_path"),
        "rank": settings["r"],
        "ranks": sorted({factors.rank for factors in modules.values()}),
        "alpha": settings["lora_alpha"],
        "variant": "-".join(kinds) or "lora",
        "layers": sorted({int(rest.split(".")[0]) for rest in layered}),
        "parameters": sum(factors.n_parameters for factors in modules.values())
        + (0 if tokens is None else tokens.rows.size),
        "trainable_tokens": [] if tokens is None else list(tokens.ids),
        "matrices": [
            {
                "name": name,
                "modules": len(all_of_it),
                "ranks": sorted({factors.rank for factors in all_of_it}),
                "scales": sorted({factors.scale for factors in all_of_it}),
                "in_features": all_of_it[0].a.shape[1],
                "out_features": all_of_it[0].b.shape[0],
                "mean_a": fmean(float(abs(factors.a).mean(dtype="f8")) for factors in all_of_it),
                "mean_b": fmean(float(abs(factors.b).mean(dtype="f8")) for factors in all_of_it),
            }
            for name, all_of_it in sorted(by_name.items())
        ],
    }


def describe_adapter(directory: Path) -> list[Rows | Records]:
    """`adapter_facts` as tables.

    Raises:
        InputError: there is no LoRA adapter in it.
    """
    facts = adapter_facts(directory)
    layers = facts["layers"]
    rows = {
        "adapter": facts["adapter"],
        "base": facts["base"] or "",
        "rank": ", ".join(map(str, facts["ranks"])),
        "alpha": f"{facts['alpha']:g}",
        "variant": facts["variant"],
        "layers": f"{len(layers)}: {layers[0]} to {layers[-1]}" if layers else "none",
        "parameters": f"{facts['parameters']:,}",
    }
    if facts["trainable_tokens"]:
        rows["tokens"] = tokens_shown(facts["trainable_tokens"])
    matrices = [
        (
            row["name"],
            str(row["modules"]),
            ", ".join(map(str, row["ranks"])),
            ", ".join(f"{scale:.4g}" for scale in row["scales"]),
            str(row["in_features"]),
            str(row["out_features"]),
            f"{row['mean_a']:.4g}",
            f"{row['mean_b']:.4g}",
        )
        for row in facts["matrices"]
    ]
    headings = ("matrix", "modules", "rank", "scale", "in", "out", "mean |A|", "mean |B|")
    known = {label: _shown(value) for label, value in rows.items()}
    return [Rows(known), Records(headings, matrices)]
