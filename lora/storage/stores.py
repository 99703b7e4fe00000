"""Where a model's file lies: under a path, in Ollama's store, or in a repository of the Hub.

`ollama:[HOST/][NAMESPACE/]MODEL[:TAG]` is a model that `ollama pull` has fetched.
`hf:ORG/REPO[@REVISION]/FILE` is a file of a Hugging Face repository, fetched into Hugging Face's
own cache (HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE hold as everywhere).
"""

from __future__ import annotations

from pathlib import Path

from lora.storage.hub import HUB, HubFile
from lora.storage.ollama import OLLAMA, OllamaModel, OllamaSettings

MODEL_NAME_FORMS = "the path of a GGUF file, ollama:NAME[:TAG], or hf:ORG/REPO/FILE"


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
        name: a path, `ollama:NAME[:TAG]`, or `hf:ORG/REPO[@REVISION]/FILE`. A path is returned
            as it is, whether there is a file or not.

    Returns:
        The file; of a split model the first part, with the others beside it.

    Raises:
        InputError: there is no such model, or it is not one GGUF.
        LoraError: it can't be fetched.
    """
    source = _parse(str(name))
    return source if isinstance(source, Path) else source.locate()


def ollama_settings(name: str) -> OllamaSettings | None:
    """Returns what Ollama's store holds of a model beside its weights; None for other names.

    Raises:
        InputError: there is no such model, or it is damaged.
    """
    source = _parse(name)
    return source.settings() if isinstance(source, OllamaModel) else None


def _parse(name: str) -> Path | OllamaModel | HubFile:
    if name.startswith(OLLAMA):
        return OllamaModel.parse(name)
    if name.startswith(HUB):
        return HubFile.parse(name)
    return Path(name)
