"""What is written does not depend on Python's hash seed: sets and maps are walked in an order."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from tests.support.imports import REPOSITORY

_SEEDS = ("0", "1", "2", "3", "4")


def write_all(trains: bool) -> dict[str, str]:
    """Writes what lora writes, into the current folder, and gives each file's digest."""
    from typer.testing import CliRunner

    from lora.adapters.peft_files import save_peft_adapter
    from lora.commands.cli import app
    from lora.config.schema import load_config
    from lora.export.to_gguf import export
    from lora.forward.gguf.file import GGUFFile
    from lora.forward.model.adapter import AdapterLayout
    from lora.forward.model.architecture import Architecture
    from tests.support.tiny_models import TINY_MODELS
    from tests.support.tiny_run import write_run

    here = Path()
    for name in ("llama_head", "phi3", "gemma3"):
        folder = here / name
        folder.mkdir()
        TINY_MODELS[name].write_gguf(folder / "model.gguf")
        TINY_MODELS[name].write_adapter(folder / "adapter")
        base = str(folder / "model.gguf")
        # Two alphas as often as each other: which is the file's?
        settings = folder / "adapter" / "adapter_config.json"
        values = json.loads(settings.read_text())
        values["alpha_pattern"] = {r"model\.layers\.0\..*": 24}
        settings.write_text(json.dumps(values))
        export(folder / "adapter", "gguf", output=folder / "adapter.gguf", base=base)
        export(folder / "adapter", "merged-gguf", output=folder / "m" / "merged.gguf", base=base)
    config_path = write_run(here, adapter={"targets": ["v_proj", "q_proj", "up_proj", "lm_head"]})
    config = load_config(str(config_path))
    architecture = Architecture.from_gguf(GGUFFile(config.model.path))
    layers, targets = config.adapter.resolve_layers(3), config.adapter.resolve_targets(architecture)
    layout = AdapterLayout(architecture, layers, targets, 3, 2.0)
    save_peft_adapter(here / "saved", layout, layout.initial(0), config)
    (here / "config.dump").write_text(config.dump_yaml())
    runner = CliRunner()
    for place, command in enumerate(
        (
            ["inspect", "model.gguf", "--json"],
            ["inspect", "phi3/adapter", "--json"],
            ["inspect", "gemma3/adapter.gguf", "--json"],
            ["data", "config.yaml", "--json"],
            ["data", "config.yaml", "--html", "data.html"],
            ["init", "model.gguf", "train.jsonl"],
        )
    ):
        (here / f"{place}.txt").write_text(runner.invoke(app, command).output)
    if trains:
        from lora.training.checkpoint import save_checkpoint
        from lora.training.session import TrainingSession
        from tests.support.short_kernels import short_kernels

        with short_kernels(), TrainingSession(config, started=datetime(2026, 1, 1)) as session:
            next(iter(session.train()))
            save_checkpoint(session, here / "run")
    files = (path for path in sorted(here.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _written(folder: Path, seed: str, *, trains: bool = False) -> dict[str, str]:
    folder.mkdir()  # the same for all: Modelfiles hold paths
    code = (
        "import json; from tests.test_order import write_all; "
        f"print(json.dumps(write_all({trains})))"
    )
    environment = dict(os.environ, PYTHONHASHSEED=seed, PYTHONPATH=str(REPOSITORY))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    folder.rename(folder.with_name(seed))
    return found


@pytest.mark.parametrize("n", [2, len(_SEEDS)], ids=["two", "five"])
def test_files_are_the_same_under_some_seeds(n: int, tmp_path: Path) -> None:
    first, *others = (_written(tmp_path / "here", seed) for seed in _SEEDS[:n])
    assert len(first) > 25
    for other in others:
        assert {name for name in first if other[name] != first[name]} == set()
        assert other.keys() == first.keys()


def test_checkpoints_are_the_same_under_two_seeds(tmp_path: Path) -> None:
    first, second = (_written(tmp_path / "here", seed, trains=True) for seed in ("7", "8"))
    assert any("checkpoints" in name for name in first)
    assert {name for name in first if second[name] != first[name]} == set()


@pytest.mark.parametrize("room", ["lora", "forward", "backward", "optim", "shaders"])
def test_no_set_is_walked_unsorted(room: str) -> None:
    """Where one is written out in place; those that have names are the writers' test."""
    import ast

    def is_set(node: ast.expr) -> bool:
        if isinstance(node, ast.BinOp):
            return is_set(node.left) or is_set(node.right)
        named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        of_set = named and node.func.id in ("set", "frozenset")  # type: ignore[attr-defined]
        return of_set or isinstance(node, ast.Set | ast.SetComp)

    for path in sorted((REPOSITORY / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            walked = [node.iter] if isinstance(node, ast.For) else []
            if isinstance(node, ast.ListComp | ast.DictComp):
                walked = [part.iter for part in node.generators]
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                walked = list(node.args) if node.func.id in ("list", "tuple", "enumerate") else []
            for one in walked:
                assert not is_set(one), f"{path}, line {one.lineno}: {ast.unparse(one)}"
