"""Which GGUF of a repository is meant where none is named: chosen as llama.cpp's -hf does."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora.forward.gguf.file import part_names
from lora.shaders.errors import InputError, LoraError
from lora.storage.hub import HUB, HubFile, is_name_part, refusal_of
from lora.storage.suggestions import nearest_first

DEFAULT = "Q4_K_M"  # llama.cpp's
_QUANTIZATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_PROJECTOR = re.compile(r"(^|[-._/])mmproj([-._/]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class HubRepository:
    """A repository of GGUFs, and which quantization is wanted.

    Attributes:
        repository: ORG/REPO.
        revision: a branch, a tag or a commit.
        quantization: as it stands in the files' names, whatever its case; None for DEFAULT, or the
            first file where there is none.
    """

    repository: str
    revision: str
    quantization: str | None

    @classmethod
    def parse(cls, name: str) -> HubRepository | None:
        """Reads `hf:ORG/REPO[@REVISION][:QUANTIZATION]`; None for what is no such name."""
        whole, colon, quantization = name.removeprefix(HUB).partition(":")
        parts = whole.split("/")
        if len(parts) != 2:
            return None
        repository, at, revision = parts[1].partition("@")
        if not all(map(is_name_part, (parts[0], repository, *([revision] if at else [])))):
            return None
        if colon and not _QUANTIZATION.fullmatch(quantization):
            return None
        return cls(
            f"{parts[0]}/{repository}", revision if at else "main", quantization if colon else None
        )

    def __str__(self) -> str:
        at = "" if self.revision == "main" else f"@{self.revision}"
        wanted = "" if self.quantization is None else f":{self.quantization}"
        return f"{HUB}{self.repository}{at}{wanted}"

    def locate(self) -> Path:
        """Fetches the file that is meant, with all its parts, and returns the first.

        Raises:
            InputError: there is no such repository, or no such file in it.
            LoraError: it can't be asked or fetched.
        """
        return HubFile(self.repository, self.revision, self._chosen(self._files())).locate()

    def _files(self) -> list[str]:
        """The repository's files; where it can't be asked, those that the cache has of it."""
        import huggingface_hub

        try:
            return list(huggingface_hub.list_repo_files(self.repository, revision=self.revision))
        except Exception as error:  # see HubFile: they have no common class
            cached = self._cached()
            refusal = refusal_of(str(self), self.repository, self.revision, error)
            if cached and not isinstance(refusal, InputError):
                return cached
            if refusal is not None:
                raise refusal from None
            raise LoraError(f"{self}: could not be looked up: {error}.") from error

    def _cached(self) -> list[str]:
        from huggingface_hub import constants

        folder = Path(constants.HF_HUB_CACHE) / f"models--{self.repository.replace('/', '--')}"
        try:
            commit = (folder / "refs" / self.revision).read_text().strip()
        except OSError:
            commit = self.revision
        snapshot = folder / "snapshots" / commit
        return [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.gguf")]

    def _chosen(self, files: Iterable[str]) -> str:
        """The file that is meant.

        Raises:
            InputError: there is none.
        """
        every = list(files)
        models = sorted(
            name
            for name in every
            if name.endswith(".gguf")
            and not _PROJECTOR.search(name)
            and PurePosixPath(name).name == part_names(PurePosixPath(name).name)[0]
        )
        if not models:
            raise InputError(f"{self}: {self._without_models(every)}")
        wanted = self.quantization or DEFAULT
        found = [name for name in models if _has(name, wanted)]
        if found:
            return min(found, key=len)  # of Q4_K_M and Q4_K_M-imat the plain one
        if self.quantization is None:
            return models[0]
        raise InputError(
            f"{self}: {self.repository} has no GGUF of {wanted}. There are "
            f"{nearest_first(wanted, models)}."
        )

    def _without_models(self, files: list[str]) -> str:
        if any(name.endswith(".safetensors") for name in files):
            return (
                f"{self.repository} holds safetensors, as transformers reads them, and no GGUF. "
                f"Take one of GGUFs made from it (often called {self.repository}-GGUF), or make "
                "one with llama.cpp's convert_hf_to_gguf.py."
            )
        return f"{self.repository} holds no GGUF of a model."


def _has(file: str, quantization: str) -> bool:
    """Whether a file's path has a quantization as a word of its own: not Q4_K in Q4_K_M."""
    word = re.escape(quantization)
    return re.search(rf"(^|[-._/]){word}(?![A-Za-z0-9_])", file, re.IGNORECASE) is not None
