"""Where a model's file lies: under a path, in Ollama's store, or in a repository of the Hub.

`ollama:[HOST/][NAMESPACE/]MODEL[:TAG]` is a model that `ollama pull` has fetched.
`hf:ORG/REPO[@REVISION]/FILE` is a file of a Hugging Face repository; `hf:ORG/REPO[:QUANTIZATION]`
finds it as llama.cpp's -hf does. It is fetched into Hugging Face's own cache (HF_HOME, HF_TOKEN,
HF_ENDPOINT and HF_HUB_OFFLINE hold as everywhere).
"""

from __future__ import annotations

import re
from pathlib import Path

from lora.shaders.errors import InputError
from lora.storage.hub import HUB, HubFile
from lora.storage.hub_repository import HubRepository
from lora.storage.ollama import OLLAMA, OllamaModel, OllamaSettings

MODEL_NAME_FORMS = (
    "the path of a GGUF file, ollama:NAME[:TAG], hf:ORG/REPO[:QUANTIZATION], or hf:ORG/REPO/FILE"
)


_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def check_model_name(name: str) -> None:
    """Checks how a model is named, without looking for it.

    Raises:
        InputError: it begins with `ollama:` or `hf:` and does not go on as such a name does.
    """
    _parse(name)


def is_path(name: str) -> bool:
    """Whether a model is named by its path, not by a store's or the Hub's name."""
    return isinstance(_parse(name), Path)


def resolve_model(name: str | Path) -> Path:
    """Returns the GGUF file of a model; one of the Hub is fetched, unless the cache has it.

    Args:
        name: a path, `ollama:NAME[:TAG]`, `hf:ORG/REPO[:QUANTIZATION]`, or
            `hf:ORG/REPO[@REVISION]/FILE`. A path is returned as it is, whether there is a file or
            not, but for safetensors and for what looks like a repository's name.

    Returns:
        The file; of a split model the first part, with the others beside it.

    Raises:
        InputError: there is no such model, or it is not one GGUF.
        LoraError: it can't be fetched.
    """
    source = _parse(str(name))
    if not isinstance(source, Path):
        return source.locate()
    _check_is_no_safetensors(source)
    hint = hub_hint(str(name))
    if hint and not source.exists():
        raise InputError(f"{name}: there is no such file{hint}.")
    return source


def hub_hint(name: str) -> str:
    """Of a name as transformers takes it, ORG/REPO: how it is written here; "" for others."""
    is_repository = _REPOSITORY.fullmatch(name) and not Path(name).parent.exists()
    if not is_repository or name.lower().endswith(".gguf"):
        return ""
    return (
        f"; a repository of the Hugging Face hub that holds a GGUF is hf:{name} or hf:{name}:Q4_K_M"
    )


def ollama_settings(name: str) -> OllamaSettings | None:
    """Returns what Ollama's store holds of a model beside its weights; None for other names.

    Raises:
        InputError: there is no such model, or it is damaged.
    """
    source = _parse(name)
    return source.settings() if isinstance(source, OllamaModel) else None


def _check_is_no_safetensors(path: Path) -> None:
    """Refuses what transformers would take: people try that first.

    Raises:
        InputError: it is safetensors, or a directory of them.
    """
    if path.suffix == ".safetensors" or (path.is_dir() and any(path.glob("*.safetensors"))):
        raise InputError(
            f"{path}: holds safetensors, as transformers reads them, and a GGUF is needed, such as "
            "llama.cpp and Ollama run: take one of the same model from the Hub "
            "(hf:ORG/REPO-GGUF:Q4_K_M), or make it with llama.cpp's convert_hf_to_gguf.py."
        )


def _parse(name: str) -> Path | OllamaModel | HubFile | HubRepository:
    if name.startswith(OLLAMA):
        return OllamaModel.parse(name)
    if name.startswith(HUB):
        return HubRepository.parse(name) or HubFile.parse(name)
    return Path(name)
