"""Model files of Hugging Face repositories, in Hugging Face's own cache."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora.forward.gguf.file import part_names
from lora.shaders.errors import InputError, LoraError
from lora.storage.suggestions import nearest_first

HUB = "hf:"


_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_FILE_PART = re.compile(r"(?!\.{1,2}$)[^/\\\x00-\x1f]+")


def check_repository(name: str) -> None:
    """Checks how a repository is named, without looking for it.

    Raises:
        ValueError: it is not ORG/REPO.
    """
    parts = name.split("/")
    if len(parts) != 2 or not all(_PART.fullmatch(part) for part in parts):
        raise ValueError(f"got {name[:200]!r}; allowed here: null, or ORG/REPO.")


def is_name_part(text: str) -> bool:
    """Whether an organization, a repository or a revision can be called so."""
    return _PART.fullmatch(text) is not None


def refusal_of(name: str, repository: str, revision: str, error: BaseException) -> LoraError | None:
    """What an error of huggingface_hub says of a repository; None for another kind.

    Args:
        name: as it was asked for.
    """
    from huggingface_hub import constants, errors

    login = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{repository}"
        return InputError(
            f"{name}: the repository is gated. Accept its terms at {page}, then {login}."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            f"{name}: there is no model repository {repository}, or it is private; then {login}."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{name}: {repository} has no branch, tag or commit {revision!r}.")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return LoraError(
            f"{name}: the cache {constants.HF_HUB_CACHE} has no GGUF of it, and HF_HUB_OFFLINE "
            "forbids fetching one."
        )
    return None


def repository_of(name: str) -> str | None:
    """ORG/REPO of a model's name that begins with `hf:`; None for another."""
    parts = name.removeprefix(HUB).partition(":")[0].split("/")
    if not name.startswith(HUB) or len(parts) < 2:
        return None
    return f"{parts[0]}/{parts[1].partition('@')[0]}"


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
        parts = name.removeprefix(HUB).split("/")
        organization, repository = parts[0], parts[1] if len(parts) > 1 else ""
        repository, at, revision = repository.partition("@")
        names = [organization, repository, *([revision] if at else [])]
        if (
            not all(_PART.fullmatch(part) for part in names)
            or len(parts) < 3
            or not all(_FILE_PART.fullmatch(part) for part in parts[2:])
        ):
            raise InputError(
                f"{name!r} is no name of a file on the Hub; it is written hf:ORG/REPO, "
                "hf:ORG/REPO:QUANTIZATION or hf:ORG/REPO[@REVISION]/FILE, for example "
                "hf:bartowski/SmolLM2-135M-Instruct-GGUF:Q8_0."
            )
        file = "/".join(parts[2:])
        if not file.endswith(".gguf"):
            file += ".gguf"
        return cls(f"{organization}/{repository}", revision if at else "main", file)

    def __str__(self) -> str:
        at = "" if self.revision == "main" else f"@{self.revision}"
        return f"{HUB}{self.repository}{at}/{self.file}"

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

        try:
            return Path(huggingface_hub.hf_hub_download(self.repository, file, revision=revision))
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
            refusal = refusal_of(str(self), self.repository, revision, error)
            if refusal is not None:
                raise refusal from None
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
        return f"{self.repository} has no file {file}. There are {nearest_first(file, models)}."


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
