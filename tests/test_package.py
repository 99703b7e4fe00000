"""What `pip install webgpu-lora` gives: one name, whole, whatever lies beside the user's script."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.imports import REPOSITORY, ROOMS
from tests.support.tiny_run import write_run

# Everything that a distribution is built from, with the links as links.
_SOURCES = (*ROOMS, "configs", "pyproject.toml", "README.md", "LICENSE")
_BUILD = "import sys; from setuptools import build_meta as b; b.build_{}(sys.argv[1])"

# Files that a user may have beside a script; whoever imports one by mistake ends with its text.
_SHADOWS = ("optim.py", "forward.py", "backward.py", "shaders/__init__.py", "configs/__init__.py")

_SCRIPT = """
import json
import sys

from lora import TrainingSession

session = TrainingSession.from_config("config.yaml", ["train.steps=1"])
losses = [metrics.loss for metrics in session.train()]
session.save("mine")
files = [m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "lora" and m.__file__]
print(json.dumps({"losses": losses, "files": files}))
"""

# Every module of lora with its file, and whatever lies in a room but has another name.
_LIST_FILES = """
import importlib.util, json, pkgutil, sys
import lora
left_out = {"lora.__main__"}
if importlib.util.find_spec("wgpudawn") is None:
    left_out.add("lora.shaders.dawn")
names = [m.name for m in pkgutil.walk_packages(lora.__path__, "lora.") if m.name not in left_out]
files = {name: importlib.import_module(name).__file__ for name in names}
others = [n for n in sys.modules if n.split(".")[0] in ("forward", "backward", "optim", "shaders")]
print(json.dumps({"files": files, "others": others}))
"""


def run(*command: object, cwd: Path) -> str:
    """Runs a command outside the repository; returns what it prints, and shows why it failed."""
    left_out = {"PYTHONPATH"}
    if "/.dawn/" in os.environ.get("VK_DRIVER_FILES", ""):
        # A new environment's Python is the system's, whose glibc may be too old for the driver that
        # scripts/newer_mesa.sh unpacks: what is installed runs on the system's driver there.
        left_out |= {"LORA_WEBGPU", "VK_DRIVER_FILES"}
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh checkout: the repository's own may hold an older build's leftovers."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in _SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(source, folder / name, symlinks=True, ignore=unwanted)
        else:
            shutil.copy(source, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-c", _BUILD.format("wheel"), folder, cwd=checkout)
    return next(folder.glob("*.whl"))


def empty_environment(folder: Path) -> Path:
    """A virtual environment without pip that sees what is installed here; returns its Python.

    A path in a .pth file is only searched: .pth files there, such as the one of an editable
    installation, are not read.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ours = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    dependencies = sysconfig.get_path("purelib")
    Path(ours.strip(), "dependencies.pth").write_text(f"{dependencies}\n", encoding="utf-8")
    return python


def install(python: Path, *what: object) -> None:
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    # --ignore-installed: what is installed here is no reason to leave it out there.
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    run(*pip, *options, *what, cwd=python.parent)


def wanted_files() -> set[str]:
    """Every file of the package, by its path in site-packages."""
    wanted = {"lora/py.typed"}
    for room in ROOMS:
        prefix = "" if room == "lora" else "lora/"
        for ending in ("*.py", "*.wgsl", "*.jinja"):
            found = (REPOSITORY / room).rglob(ending)
            wanted |= {prefix + p.relative_to(REPOSITORY).as_posix() for p in found}
    for ending in ("*.yaml", "*.jsonl"):
        found = (REPOSITORY / "configs").rglob(ending)
        wanted |= {"lora/" + p.relative_to(REPOSITORY).as_posix() for p in found}
    return wanted


def test_the_wheel_holds_lora_whole_and_nothing_else(
    wheel: Path, record_property: Callable[[str, object], None]
) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    packed = {name for name in names if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in packed} == {"lora"}
    assert packed == wanted_files()
    size = wheel.stat().st_size / 1e6
    record_property("print", f"{wheel.name}: {size:.2f} MB, {len(packed)} files, all in lora/")


def test_a_wheel_of_the_source_distribution_is_the_same(
    checkout: Path, wheel: Path, tmp_path: Path
) -> None:
    run(sys.executable, "-c", _BUILD.format("sdist"), tmp_path, cwd=checkout)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        assert not [member.name for member in archive if member.issym()]
        archive.extractall(tmp_path / "source", filter="data")
    source = next((tmp_path / "source").iterdir())
    run(sys.executable, "-c", _BUILD.format("wheel"), tmp_path, cwd=source)
    again = zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    first = zipfile.ZipFile(wheel)
    assert {i.filename: i.CRC for i in again.infolist() if "RECORD" not in i.filename} == {
        i.filename: i.CRC for i in first.infolist() if "RECORD" not in i.filename
    }


def test_a_step_beside_files_of_the_same_names(wheel: Path, tmp_path: Path) -> None:
    """The user's optim.py, forward.py, shaders/ are the user's: by a script and by `-m lora`."""
    python = empty_environment(tmp_path / "venv")
    install(python, wheel)
    project = tmp_path / "project"
    project.mkdir()
    for name in _SHADOWS:
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text(f"raise SystemExit('{name} was imported')\n")
    write_run(project).rename(project / "config.yaml")
    (project / "script.py").write_text(_SCRIPT)

    done = json.loads(run(python, "script.py", cwd=project))
    assert len(done["losses"]) == 1 and done["losses"][0] > 0
    site_packages = tmp_path.resolve() / "venv"
    assert all(site_packages in Path(file).resolve().parents for file in done["files"])
    assert (project / "mine" / "adapter_model.safetensors").exists()

    run(python, "-m", "lora", "train", "config.yaml", "--set", "train.steps=1", cwd=project)
    lines = (project / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["loss"] == done["losses"][0]
    # The installed command, and a config out of the wheel.
    command = python.with_name("lora")
    assert run(command, "--version", cwd=project).startswith("webgpu-lora ")
    run(command, "init", "--model", "model.gguf", "--data", "train.jsonl", cwd=project)
    assert (project / "lora.yaml").exists()


def test_the_checkout_and_an_editable_installation_import_the_same_files(
    checkout: Path, tmp_path: Path
) -> None:
    """Each module by one name and one path: no `forward` beside `lora.forward`."""
    python = empty_environment(tmp_path / "venv")
    install(python, "--editable", checkout)
    installed = json.loads(run(python, "-c", _LIST_FILES, cwd=tmp_path))
    beside = json.loads(run(python, "-c", _LIST_FILES, cwd=checkout))
    assert installed == beside
    assert installed["others"] == []
    files = installed["files"]
    assert set(files) >= {f"lora.{room}" for room in ROOMS if room != "lora"}
    assert all(file.startswith(f"{checkout}{os.sep}lora{os.sep}") for file in files.values())
    assert len({os.path.realpath(file) for file in files.values()}) == len(files)
