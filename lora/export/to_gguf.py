"""`lora export`: an adapter as a GGUF that llama.cpp and Ollama load, alone or merged."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from lora.adapters.adapted_tensor import (
    EMBEDDING_TENSOR,
    AdaptedTensor,
    ReplacedRows,
    SumOfChanges,
    TensorChange,
    read_adapted_tensors,
    read_replaced_rows,
)
from lora.adapters.gguf_files import ADAPTER_TYPES, write_gguf_adapter
from lora.adapters.origin import CONFIG, Origin, PromptForm, origin_of
from lora.adapters.peft_files import SETTINGS, WEIGHTS, read_peft_settings
from lora.adapters.peft_settings import refuse_dora, refuse_tokens
from lora.export.merge import MergedTensor, write_merged_gguf
from lora.export.modelfile import (
    OF_ADAPTER,
    may_replace,
    modelfile_of_adapter,
    modelfile_of_merged,
    name_of_merged,
)
from lora.forward.gguf.file import GGUFFile
from lora.forward.gguf.quantization import QUANTIZATIONS
from lora.forward.model.architecture import Architecture
from lora.forward.model.model_tensors import read_scale, scales_adapters
from lora.forward.text.configured import read_template
from lora.shaders.errors import InputError, LoraError
from lora.storage.files import write_file
from lora.storage.stores import ollama_settings, resolve_model

ADAPTER, MERGED = TARGETS = ("gguf", "merged-gguf")
# Architectures that always take the embedding for the head: llama.cpp refuses a file of theirs that
# has an output.weight (tried with xllamacpp 2026-10; gemma3, llama, qwen2, qwen3 and phi3 load it).
_NEVER_OWN_HEAD = ("gemma2",)
_DEFAULT_NAMES = {ADAPTER: "adapter.gguf", MERGED: "merged.gguf"}


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        path: the GGUF.
        modelfile: for `ollama create`, beside it: `Modelfile` for an adapter, and for merged.gguf
            `merged.Modelfile`.
        base_path: the base's file.
        n_tensors: how many tensors of the base the adapter touches.
        merged: what merging did to each of them; empty for an adapter alone.
        prompts: how prompts are written where no chat template is to stand around them; None
            where one is, or where the adapter's run is not known.
        template: the file of the chat template that the adapter was trained with; None for the
            base's own. A merged GGUF holds it.
        template_arguments: `data.chat_template_kwargs` of its run.
    """

    path: Path
    modelfile: Path
    base_path: Path
    n_tensors: int
    merged: list[MergedTensor]
    prompts: PromptForm | None = None
    template: Path | None = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


def export(
    directory: Path,
    target: str,
    *,
    output: Path | None = None,
    base: str | None = None,
    kind: str | None = None,
    force: bool = False,
    on_tensor: Callable[[MergedTensor], None] = lambda tensor: None,
) -> Export:
    """Writes a PEFT adapter directory as a GGUF, and a Modelfile beside it.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors.
        target: "gguf" for the adapter alone, "merged-gguf" for base and adapter in one.
        output: the file to write; by default adapter.gguf or merged.gguf in the directory.
        base: a path, ollama:NAME or hf:ORG/REPO/FILE; by default what the adapter names.
        kind: tensor type of what is written, e.g. "F16"; by default F32 for an adapter, and for
            a merged tensor the base's own.
        force: replaces files that are there.
        on_tensor: called after each tensor that was merged.

    Raises:
        InputError: the adapter, the base, the target or the type is wrong, they do not fit
            together, or the output is there already.
        LoraError: the merged weights are not finite, or a file can't be written.
    """
    if target not in TARGETS:
        raise InputError(f"--to {target}: {_nearest(target, TARGETS)}")
    kinds = ADAPTER_TYPES if target == ADAPTER else tuple(QUANTIZATIONS)
    stored = None if kind is None else _kind(kind, kinds, target)
    settings = read_peft_settings(directory)
    if target == ADAPTER:
        refuse_dora(directory, settings)
        refuse_tokens(directory, settings)
    path = directory / _DEFAULT_NAMES[target] if output is None else output
    modelfile = path.with_name(OF_ADAPTER if target == ADAPTER else name_of_merged(path))
    name = base or str(settings.get("base_model_name_or_path") or "")
    origin = origin_of(directory)
    file = _open_base(name, directory, origin, given=base is not None)
    _check_output(path, modelfile, directory, file, force=force)
    prompts = None if origin is None else origin.prompt_form(file)
    template = None if origin is None or prompts is not None else origin.template_file
    architecture = Architecture.from_gguf(file)
    adapted = read_adapted_tensors(directory, settings, architecture)
    replaced = read_replaced_rows(directory, settings, architecture)
    merged: list[MergedTensor] = []
    if "output.weight" in adapted and architecture.tied_head:
        _check_tied_head(directory, architecture.name, target)
    if EMBEDDING_TENSOR in adapted:
        _check_embedding(directory, architecture, target)
    # The texts before the GGUFs: what can't be said in them leaves no file behind.
    if target == ADAPTER:
        text = modelfile_of_adapter(path, name, file.path, prompts)
        changes = {name: _in_llama_cpp(file, change) for name, change in adapted.items()}
        write_gguf_adapter(
            path, architecture.name, changes.values(), stored or GGMLQuantizationType.F32
        )
    else:
        settings_of_base = ollama_settings(name)
        if template is not None and settings_of_base is not None:
            settings_of_base = replace(settings_of_base, template=None)
        text = modelfile_of_merged(path, prompts, settings_of_base)
        source = None if template is None else read_template(template)
        whole: dict[str, TensorChange] = {}
        whole |= {name: _below_scale(file, change) for name, change in adapted.items()}
        if EMBEDDING_TENSOR in adapted and architecture.tied_head:  # the head stays as it was
            whole.setdefault("output.weight", ReplacedRows("output.weight", (), np.zeros((0, 0))))
        if replaced is not None:
            whole[replaced.name] = replaced
            head = whole.get("output.weight")
            if architecture.tied_head and isinstance(head, AdaptedTensor):
                whole["output.weight"] = SumOfChanges((replaced, head))
        merged = write_merged_gguf(path, file, whole, stored, on_tensor, source)
    try:
        write_file(modelfile, text)
    except OSError as error:
        reason = error.strerror or error
        raise LoraError(f"{modelfile} could not be written: {reason}. {path} is whole.") from error
    n_tensors = len(adapted) + (replaced is not None)
    return Export(
        path, modelfile, file.path, n_tensors, merged, prompts, template,
        {} if origin is None or prompts is not None else origin.config.data.chat_template_kwargs,
    )  # fmt: skip


def _below_scale(base: GGUFFile, change: AdaptedTensor) -> AdaptedTensor:
    """A change of a tensor whose products are multiplied by a number of its own: divided by it."""
    scale = read_scale(change.name, base)
    if scale is None:
        return change
    if change.magnitude is not None or scale == 0:
        raise InputError(
            f"{base.path}: {change.name} has a scale of its own ({scale:g}), and DoRA, or a scale "
            "of 0, can't be merged into it."
        )
    return replace(change, scale=change.scale / scale)


def _in_llama_cpp(base: GGUFFile, change: AdaptedTensor) -> AdaptedTensor:
    """A change as llama.cpp adds it: below the tensor's scale, or past it."""
    return _below_scale(base, change) if scales_adapters(change.name) else change


def _nearest(word: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}?" if close else f"it must be {' or '.join(known)}."


def _kind(name: str, kinds: tuple[GGMLQuantizationType, ...], target: str) -> GGMLQuantizationType:
    for kind in kinds:
        if kind.name == name.upper():
            return kind
    raise InputError(
        f"--type {name}: with --to {target} it must be one of "
        f"{', '.join(kind.name for kind in kinds)}."
    )


def _open_base(name: str, directory: Path, origin: Origin | None, *, given: bool) -> GGUFFile:
    if given:
        return GGUFFile(resolve_model(name))
    source = f"{directory / SETTINGS} names the base {name!r}"
    try:
        path = resolve_model(name)
    except InputError as error:
        raise InputError(f"{source}: {error} Or name the base with --base.") from None
    # A relative path leads from where the run was started, or from the adapter itself.
    folders = (*(origin.folders if origin else (Path(),)), directory)
    found = next((file for folder in folders if (file := folder / path).is_file()), None)
    if found is None:
        raise InputError(f"{source}, which is no GGUF file here; name it with --base MODEL.")
    return GGUFFile(found)


def _check_tied_head(directory: Path, architecture: str, target: str) -> None:
    """Refuses an adapter on a head that is the embedding, where llama.cpp could not load it."""
    what = f"{directory} adapts lm_head, but the base's head is its embedding"
    if architecture in _NEVER_OWN_HEAD:
        raise InputError(
            f"{what}, and llama.cpp gives {architecture} no head of its own. Train with "
            "adapter.targets that leave lm_head out; PEFT and `lora generate` run this one."
        )
    if target == ADAPTER:
        raise InputError(
            f"{what}: llama.cpp has no place for such an adapter. Take --to merged-gguf."
        )


def _check_embedding(directory: Path, architecture: Architecture, target: str) -> None:
    """Refuses an adapted embedding where llama.cpp could not load it.

    PEFT adapts what is looked up alone: a head that was the embedding becomes one of its own.
    """
    what = f"{directory} adapts embed_tokens"
    if target == ADAPTER:
        raise InputError(
            f"{what}: exporting that as a GGUF adapter is not supported, since llama.cpp would add "
            "it to a head that is the embedding, too. Take --to merged-gguf."
        )
    if architecture.tied_head and architecture.name in _NEVER_OWN_HEAD:
        raise InputError(
            f"{what} and not the head, which is the embedding, and llama.cpp gives "
            f"{architecture.name} no head of its own. PEFT and `lora generate` run this one."
        )


def _check_output(
    path: Path, modelfile: Path, directory: Path, base: GGUFFile, *, force: bool
) -> None:
    for own in (WEIGHTS, SETTINGS, CONFIG):
        file = directory / own
        if file.exists() and path.exists() and os.path.samefile(path, file):
            raise InputError(f"{path} is a part of the adapter itself; choose another --output.")
    for part in base.paths:
        if path.exists() and os.path.samefile(path, part):
            raise InputError(f"{path} is the base itself; choose another --output.")
    if path.is_dir():
        raise InputError(f"{path} is a directory; --output is the file to write.")
    if path.name == modelfile.name:
        raise InputError(f"{path}: the Modelfile goes by that name; choose another --output.")
    if modelfile.is_dir():
        raise InputError(
            f"{modelfile} is a directory, and the Modelfile goes by that name; move it away, or "
            "choose an --output in another directory."
        )
    if force:
        return
    if os.path.lexists(path):
        raise InputError(f"{path} is there already; --force replaces it, --output avoids it.")
    if not may_replace(modelfile, path):
        raise InputError(
            f"{modelfile} is there and was not written by lora export for {path.name}; --force "
            "replaces it, --output in another directory avoids it."
        )
