"""Whether a device's matrix units can be trusted: asked once, in a process of its own.

They are reached through an experimental feature, on NVIDIA behind a switch that exists because of
drivers' faults. A fault may end a process, so the question runs in a child; what came of it is
remembered for the device, its driver and our kernels.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora.forward.matmul_matrix import shape_on
from lora.shaders import templates
from lora.shaders.choice import say_once
from lora.shaders.device import Device
from lora.storage.children import run_module
from lora.storage.files import write_file
from lora.storage.tile_cache import cache_folder, circumstances

_SECONDS = 300  # that the child may take: a driver compiles each kernel for about a second
_FAULT = 3  # exit status of a child that found wrong numbers

Ask = Callable[[Device, str | int], str]


def trust_matrix_units(device: Device, wanted: str | int, ask: Ask | None = None) -> None:
    """Takes a device's matrix units away where they were found wrong; one line says so.

    Args:
        wanted: how the device was named, for the child to open it.
        ask: what looks; returns what is wrong, "" where nothing is.
    """
    facts = device.facts
    if facts.is_cpu or shape_on(facts) is None:
        return
    identity = {**circumstances(facts), "checked": _kernels_digest()}
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    path = cache_folder() / f"matrix-units-{digest}.json"
    try:
        wrong = str(json.loads(path.read_bytes())["wrong"])
    except (OSError, ValueError, KeyError, TypeError):
        wrong = (ask or ask_child)(device, wanted)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, json.dumps({**identity, "wrong": wrong}, indent=1) + "\n")
        except OSError:
            pass  # it is asked again next time
    if wrong:
        say_once(
            f"The matrix units of {facts.name} are left alone: {wrong}. The plain kernels "
            f"are taken; remove {path} to ask again."
        )
        device.facts = replace(facts, matrix_shapes=())


def _kernels_digest() -> str:
    """Of the text of all kernels: those on matrix units are many, and share parts with others."""
    folder = Path(templates.__file__).parent / "wgsl"
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.wgsl")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def ask_child(device: Device, wanted: str | int) -> str:
    """Runs the checks of products on matrix units in a child; what is wrong, or ""."""
    question = json.dumps({"device": wanted, "webgpu": device.found.implementation.setting})
    try:
        done = run_module("lora.checks.matrix_units", [question], timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return f"a check of them did not end within {_SECONDS} s"
    except OSError as error:
        return f"they could not be checked ({error.strerror})"
    if done.returncode == 0:
        return ""
    if done.returncode == _FAULT:
        return done.stdout.strip().splitlines()[-1]
    lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
    return f"a check of them ended badly ({lines[-1][:200]})"


def answer(question: dict[str, Any]) -> int:
    """The child: prints the first kernel on matrix units that is wrong."""
    from lora.checks.suite import ALL_CHECKS, run_checks

    checks = [check for check in ALL_CHECKS if "_matrix" in check.kernel]
    with Device(question["device"], webgpu=question["webgpu"]) as device:
        for result in run_checks(lambda: device, checks):
            if result.status == "failed":
                print(f"{result.check.case}: {result.reason}")
                return _FAULT
    return 0


if __name__ == "__main__":
    sys.exit(answer(json.loads(sys.argv[1])))
