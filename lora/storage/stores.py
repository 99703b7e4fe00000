"""Where a model's file lies: under a path, in Ollama's store, or in a repository of the Hub.

`ollama:[HOST/][NAMESPACE/]MODEL[:TAG]` is a model that `ollama pull` has fetched.
`hf:ORG/REPO[@REVISION]/FILE` is a file of a Hugging Face repository, fetched into Hugging Face's
own cache (HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE hold as everywhere).
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lora.forward.gguf.file import part_names
from lora.shaders.errors import InputError, LoraError

MODEL_NAME_FORMS = "the path of a GGUF file, ollama:NAME[:TAG], or hf:ORG/REPO/FILE"

_OLLAMA, _HUB = "ollama:", "hf:"
_MODEL_LAYER = "application/vnd.ollama.image.model"
_ADAPTER_LAYER = "application/vnd.ollama.image.adapter"
_TENSOR_LAYER = "application/vnd.ollama.image.tensor"
_TEMPLATE_LAYER = "application/vnd.ollama.image.template"
_SYSTEM_LAYER = "application/vnd.ollama.image.system"
_PARAMETERS_LAYER = "application/vnd.ollama.image.params"
_MOST_MANIFEST_BYTES = 1 << 24  # a model of 10,000 tensor layers has 2 MB
_MOST_TEXT_BYTES = 1 << 24
_MOST_LISTED = 8

# Where Ollama keeps models when it runs as a service on Linux, under a user of its own.
_SERVICE_STORE = Path("/usr/share/ollama/.ollama/models")

# No part can be "." or "..", hold a separator, or be hidden: a name never leaves its store.
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(:\d+)?")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_FILE_PART = re.compile(r"(?!\.{1,2}$)[^/\\\x00-\x1f]+")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


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
    if name.startswith(_OLLAMA):
        return OllamaModel.parse(name)
    if name.startswith(_HUB):
        return HubFile.parse(name)
    return Path(name)


def _nearest_first(wanted: str, names: Iterable[str]) -> str:
    """Some names as a list in words, those that are most like the wanted one first."""
    ordered = sorted(names)
    ordered.sort(key=lambda n: -difflib.SequenceMatcher(None, wanted, n, autojunk=False).ratio())
    more = len(ordered) - _MOST_LISTED
    return ", ".join(ordered[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


# -- Ollama's store -------------------------------------------------------------------------------


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
        *folders, last = name.removeprefix(_OLLAMA).split("/")
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
        return _OLLAMA + "/".join(parts)

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
            f"{_nearest_first(str(self), installed)}."
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
        return f"Run `ollama pull {str(self).removeprefix(_OLLAMA)}` again."


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


# -- Hugging Face's Hub ---------------------------------------------------------------------------


@dataclass(frozen=True)
class HubFile:
    """A GGUF in a model repository of the Hub.

    Attributes:
        repository: ORG/REPO.
        revision: a branch, a tag or a commit.
        file: its path in the repository, with slashes.
    """

    repository: str
    revision: str
    file: str

    @classmethod
    def parse(cls, name: str) -> HubFile:
        """Reads `hf:ORG/REPO[@REVISION]/FILE`; the file's `.gguf` may be left out.

        Raises:
            InputError: it is no such name.
        """
        parts = name.removeprefix(_HUB).split("/")
        organization, repository = parts[0], parts[1] if len(parts) > 1 else ""
        repository, at, revision = repository.partition("@")
        names = [organization, repository, *([revision] if at else [])]
        if (
            not all(_PART.fullmatch(part) for part in names)
            or len(parts) < 3
            or not all(_FILE_PART.fullmatch(part) for part in parts[2:])
        ):
            raise InputError(
                f"{name!r} is no name of a file on the Hub; it is written "
                "hf:ORG/REPO[@REVISION]/FILE, for example "
                "hf:bartowski/SmolLM2-135M-Instruct-GGUF/SmolLM2-135M-Instruct-Q8_0.gguf."
            )
        file = "/".join(parts[2:])
        if not file.endswith(".gguf"):
            file += ".gguf"
        return cls(f"{organization}/{repository}", revision if at else "main", file)

    def __str__(self) -> str:
        at = "" if self.revision == "main" else f"@{self.revision}"
        return f"{_HUB}{self.repository}{at}/{self.file}"

    def locate(self) -> Path:
        """Fetches it, with all its parts if it is one of a split model, and returns the first.

        Raises:
            InputError: the repository, the revision or the file is not there, or not for this
                user.
            LoraError: it can't be fetched.
        """
        whole = PurePosixPath(self.file)
        first, *others = (str(whole.with_name(name)) for name in part_names(whole.name))
        path = self._fetch(first, self.revision)
        # Its folder is named by the commit; the other parts must be of the same.
        commit = path.parents[len(whole.parts) - 1].name
        for other in others:
            self._fetch(other, commit)
        return path

    def _fetch(self, file: str, revision: str) -> Path:
        import huggingface_hub
        from huggingface_hub import constants, errors

        login = "log in with `hf auth login` or set HF_TOKEN"
        try:
            return Path(huggingface_hub.hf_hub_download(self.repository, file, revision=revision))
        except errors.GatedRepoError:
            page = f"{constants.ENDPOINT}/{self.repository}"
            raise InputError(
                f"{self}: the repository is gated. Accept its terms at {page}, then {login}."
            ) from None
        except errors.RepositoryNotFoundError:
            raise InputError(
                f"{self}: there is no model repository {self.repository}, or it is private; then "
                f"{login}."
            ) from None
        except errors.RevisionNotFoundError:
            raise InputError(
                f"{self}: {self.repository} has no branch, tag or commit {revision!r}."
            ) from None
        except errors.LocalEntryNotFoundError as error:
            if isinstance(error.__cause__, errors.OfflineModeIsEnabled):
                raise InputError(
                    f"{self}: {file} is not in the cache {constants.HF_HUB_CACHE}, and "
                    "HF_HUB_OFFLINE forbids fetching it."
                ) from None
            raise LoraError(
                f"{self}: {file} is not in the cache {constants.HF_HUB_CACHE} and could not be "
                f"fetched from {constants.ENDPOINT} ({_first_line(error.__cause__ or error)})."
            ) from error
        except errors.EntryNotFoundError:
            raise InputError(f"{self}: {self._what_there_is(file, revision)}") from None
        # What a broken connection, a full disk or an odd answer raises differs between versions
        # of huggingface_hub (requests, httpx, httpx2) and has no common class.
        except Exception as error:
            raise LoraError(f"{self}: could not be fetched: {_first_line(error)}.") from error

    def _what_there_is(self, file: str, revision: str) -> str:
        import huggingface_hub

        try:
            files = huggingface_hub.list_repo_files(self.repository, revision=revision)
        except Exception:  # a courtesy only, and see _fetch
            return f"{self.repository} has no file {file}."
        models = {name for name in files if name.endswith(".gguf")}
        models = {
            name
            for name in models
            if PurePosixPath(name).name == part_names(PurePosixPath(name).name)[0]
        }
        if not models:
            return f"{self.repository} has no file {file}, and no GGUF at all."
        return f"{self.repository} has no file {file}. There are {_nearest_first(file, models)}."


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
