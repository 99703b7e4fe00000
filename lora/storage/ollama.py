"""Models in Ollama's store: what `ollama pull` has fetched."""

from __future__ import annotations

import json
import os
import re
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from lora.shaders.errors import InputError
from lora.storage.suggestions import nearest_first

OLLAMA = "ollama:"
_MODEL_LAYER = "application/vnd.ollama.image.model"
_ADAPTER_LAYER = "application/vnd.ollama.image.adapter"
_TENSOR_LAYER = "application/vnd.ollama.image.tensor"
_TEMPLATE_LAYER = "application/vnd.ollama.image.template"
_SYSTEM_LAYER = "application/vnd.ollama.image.system"
_PARAMETERS_LAYER = "application/vnd.ollama.image.params"
_MOST_MANIFEST_BYTES = 1 << 24  # a model of 10,000 tensor layers has 2 MB
_MOST_TEXT_BYTES = 1 << 24

# Where Ollama keeps models when it runs as a service on Linux, under a user of its own.
_SERVICE_STORE = Path("/usr/share/ollama/.ollama/models")

# No part can be "." or "..", hold a separator, or be hidden: a name never leaves its store.
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(:\d+)?")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


@dataclass(frozen=True)
class OllamaSettings:
    """What a model of Ollama's store is run with.

    Attributes:
        template: in Go's language of templates; None where the model brings none.
        system: the system message; None for none.
        parameters: such as `temperature`, or `stop` with a list of texts.
    """

    template: str | None
    system: str | None
    parameters: dict[str, Any]


@dataclass(frozen=True)
class OllamaModel:
    """A model's name in Ollama's store; the four parts are its folders there."""

    host: str
    namespace: str
    model: str
    tag: str

    @classmethod
    def parse(cls, name: str) -> OllamaModel:
        """Reads `ollama:[HOST/][NAMESPACE/]MODEL[:TAG]`; what is left out is Ollama's default.

        Raises:
            InputError: it is no such name.
        """
        *folders, last = name.removeprefix(OLLAMA).split("/")
        model, colon, tag = last.partition(":")
        if len(folders) < 2:
            folders = ["registry.ollama.ai", *(folders or ["library"])]
        parsed = cls(folders[0], folders[1], model, tag if colon else "latest")
        if len(folders) > 2 or not parsed._is_well_formed():
            raise InputError(
                f"{name!r} is no name of an Ollama model; it is written "
                "ollama:[HOST/][NAMESPACE/]MODEL[:TAG], for example ollama:gemma3:270m."
            )
        return parsed

    def _is_well_formed(self) -> bool:
        return _HOST.fullmatch(self.host) is not None and all(
            _PART.fullmatch(part) for part in (self.namespace, self.model, self.tag)
        )

    def __str__(self) -> str:
        """The shortest form that names it."""
        parts = [self.host, self.namespace, f"{self.model}:{self.tag}"]
        for default in ("registry.ollama.ai", "library"):
            if parts[0] != default:
                break
            del parts[0]
        return OLLAMA + "/".join(parts)

    def locate(self) -> Path:
        """Returns its GGUF in the store.

        Raises:
            InputError: it is not there, is damaged, or is not one GGUF.
        """
        return self._gguf(*self._find())

    def settings(self) -> OllamaSettings:
        """Returns its template, system message and parameters.

        Raises:
            InputError: it is not there, or is damaged.
        """
        store, manifest = self._find()
        texts = {}
        for layer in _layers(manifest, store / "manifests"):
            kind = layer.get("mediaType")
            if kind in (_TEMPLATE_LAYER, _SYSTEM_LAYER, _PARAMETERS_LAYER):
                texts[kind] = self._text(store, manifest, layer)
        try:
            parameters = json.loads(texts.get(_PARAMETERS_LAYER, "{}"))
        except (ValueError, RecursionError):
            parameters = None
        if not isinstance(parameters, dict):
            raise InputError(f"{self}: its parameters are no JSON object. {self._again()}")
        return OllamaSettings(texts.get(_TEMPLATE_LAYER), texts.get(_SYSTEM_LAYER), parameters)

    def _find(self) -> tuple[Path, Path]:
        """The store that has it, and its manifest there."""
        stores = _ollama_stores()
        for store in stores:
            manifest = store.joinpath("manifests", *astuple(self))
            if os.path.lexists(manifest):
                return store, manifest
        installed = {str(model) for store in stores for model in _installed(store)}
        if not installed:
            raise InputError(
                f"{self}: there is no model in {' or '.join(map(str, stores))}. Fetch it with "
                f"`ollama pull`, or set OLLAMA_MODELS to the folder that Ollama keeps models in."
            )
        raise InputError(
            f"{self} is not in {' or '.join(map(str, stores))}. There are "
            f"{nearest_first(str(self), installed)}."
        )

    def _gguf(self, store: Path, manifest: Path) -> Path:
        layers = _layers(manifest, store / "manifests")
        kinds = [layer.get("mediaType") for layer in layers]
        models = [layer for layer in layers if layer.get("mediaType") == _MODEL_LAYER]
        if _ADAPTER_LAYER in kinds:
            raise InputError(
                f"{self} is a base model with an adapter on top, which training would drop; name "
                "the base model."
            )
        if not models and _TENSOR_LAYER in kinds:
            raise InputError(
                f"{self} is kept as {kinds.count(_TENSOR_LAYER)} single tensors, not as a GGUF; "
                "fetch a version of it that is a GGUF, for example from hf.co."
            )
        if len(models) != 1:
            raise InputError(
                f"{self}: {manifest} lists {len(models)} model layers; one GGUF is expected"
                f"{'' if models else ' (models that run in the cloud have none)'}."
            )
        return self._blob(store, manifest, models[0])

    def _text(self, store: Path, manifest: Path, layer: dict[str, Any]) -> str:
        """A layer that is a text."""
        blob = self._blob(store, manifest, layer)
        try:
            if blob.stat().st_size <= _MOST_TEXT_BYTES:
                return blob.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"{self}: {blob} cannot be read: {error.strerror}.") from None
        except UnicodeDecodeError:
            pass
        raise InputError(f"{self}: its file {blob} should be a text, and is none. {self._again()}")

    def _blob(self, store: Path, manifest: Path, layer: dict[str, Any]) -> Path:
        """The file of a layer."""
        match = _DIGEST.fullmatch(str(layer.get("digest")))
        if match is None:
            what = str(layer.get("mediaType")).rpartition(".")[2]
            raise InputError(
                f"{manifest} is damaged: the digest of its {what} is not sha256: and 64 hex "
                f"digits. {self._again()}"
            )
        blob = store / "blobs" / f"sha256-{match[1]}"
        _check_inside(blob, store / "blobs")
        size = layer.get("size")
        found = os.path.getsize(blob) if os.path.isfile(blob) else None
        if found is None or (isinstance(size, int) and size != found):
            state = "is missing" if found is None else f"has {found:,} bytes instead of {size:,}"
            raise InputError(f"{self}: its file {blob} {state}. {self._again()}")
        return blob

    def _again(self) -> str:
        return f"Run `ollama pull {str(self).removeprefix(OLLAMA)}` again."


def _ollama_stores() -> list[Path]:
    """The folders that Ollama may keep models in; where OLLAMA_MODELS is set, only that."""
    configured = os.environ.get("OLLAMA_MODELS")
    if configured:
        return [Path(configured).expanduser()]
    stores = [Path(os.path.expanduser("~/.ollama/models"))]
    if _SERVICE_STORE.is_dir():
        stores.append(_SERVICE_STORE)
    return stores


def _installed(store: Path) -> list[OllamaModel]:
    paths = (store / "manifests").glob("*/*/*/*")
    models = [OllamaModel(*path.parts[-4:]) for path in paths if path.is_file()]
    return [model for model in models if model._is_well_formed()]


def _layers(manifest: Path, folder: Path) -> list[dict[str, Any]]:
    """The layers that a manifest lists."""
    _check_inside(manifest, folder)
    try:
        size = manifest.stat().st_size
        content = manifest.read_bytes() if size <= _MOST_MANIFEST_BYTES else b""
    except OSError as error:
        raise InputError(f"{manifest} cannot be read: {error.strerror}.") from error
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        values = None
    layers = values.get("layers") if isinstance(values, dict) else None
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise InputError(
            f"{manifest} is damaged: it is no JSON manifest with a list of layers. Fetch the "
            "model again with `ollama pull`."
        )
    return layers


def _check_inside(path: Path, folder: Path) -> None:
    """Refuses a path that leaves its folder through a link; the folder itself may be a link."""
    # realpath and not Path.resolve, which raises RuntimeError for a link to itself.
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(folder)):
        raise InputError(f"{path} is a link that leaves the store, to {real}; it is not followed.")
