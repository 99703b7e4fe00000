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

from lora.checks.comparison import Check
from lora.forward.matmul_matrix import shape_on
from lora.shaders import templates
from lora.shaders.choice import say_once
from lora.shaders.device import Device
from lora.storage.children import run_module
from lora.storage.files import write_file
from lora.storage.tile_cache import cache_folder, circumstances

_SECONDS = 300  # that the child may take: a driver compiles each kernel for about a second
_FAULT = 3  # exit status of a child that found wrong numbers

# Of checks, by how their kernels' names begin; pairs are products of f32 (f16's are "products").
_KINDS = {"attention": "attention", "lora": "low rank", "gated_delta": "gated delta rule"}
PRODUCTS, PAIRS = "products", "pairs"
Ask = Callable[[Device, str | int], dict[str, str]]


def trust_matrix_units(device: Device, wanted: str | int, ask: Ask | None = None) -> None:
    """Takes a device's matrix units away where they were found wrong; one line says so.

    From all kernels where products are wrong, else from the kinds that are.

    Args:
        wanted: how the device was named, for the child to open it.
        ask: what looks; returns what is wrong by the kind of kernels.
    """
    facts = device.facts
    if facts.is_cpu or shape_on(facts) is None:
        return
    identity = {**circumstances(facts), "checked": _kernels_digest()}
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    path = cache_folder() / f"matrix-units-{digest}.json"
    try:
        kept = json.loads(path.read_bytes())["wrong"]
        wrong = {str(kind): str(why) for kind, why in kept.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        wrong = (ask or ask_child)(device, wanted)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, json.dumps({**identity, "wrong": wrong}, indent=1) + "\n")
        except OSError:
            pass  # it is asked again next time
    if PRODUCTS in wrong:
        say_once(
            f"The matrix units of {facts.name} are left alone: {wrong[PRODUCTS]}. The plain "
            f"kernels are taken; remove {path} to ask again."
        )
        device.facts = replace(facts, matrix_shapes=())
    elif wrong:
        found = "; ".join(f"{kind}: {why}" for kind, why in sorted(wrong.items()))
        say_once(
            f"Some kernels on the matrix units of {facts.name} are left alone ({found}). Plain "
            f"ones are taken for these; remove {path} to ask again."
        )
        device.facts = replace(facts, distrusted=frozenset(wrong))


def _kernels_digest() -> str:
    """Of the text of all kernels: those on matrix units are many, and share parts with others."""
    folder = Path(templates.__file__).parent / "wgsl"
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.wgsl")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def ask_child(device: Device, wanted: str | int) -> dict[str, str]:
    """Runs the checks of kernels on matrix units in a child; what is wrong, by kind.

    A child that does not end well makes all of them wrong, as products' would be.
    """
    question = json.dumps({"device": wanted, "webgpu": device.found.implementation.setting})
    try:
        done = run_module("lora.checks.matrix_units", [question], timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return {PRODUCTS: f"a check of them did not end within {_SECONDS} s"}
    except OSError as error:
        return {PRODUCTS: f"they could not be checked ({error.strerror})"}
    if done.returncode == 0:
        return {}
    if done.returncode == _FAULT:
        found: dict[str, str] = json.loads(done.stdout.strip().splitlines()[-1])
        return found
    lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
    return {PRODUCTS: f"a check of them ended badly ({lines[-1][:200]})"}


def kind_of(check: Check) -> str:
    """The kind of kernels on matrix units that a check is of."""
    if "paired matrix" in check.case:
        return PAIRS
    return next((kind for name, kind in _KINDS.items() if check.kernel.startswith(name)), PRODUCTS)


def answer(question: dict[str, Any]) -> int:
    """The child: prints the first kernel on matrix units of each kind that is wrong, as JSON."""
    from lora.checks.suite import ALL_CHECKS, run_checks

    checks = [check for check in ALL_CHECKS if "_matrix" in check.kernel]
    wrong: dict[str, str] = {}
    with Device(question["device"], webgpu=question["webgpu"]) as device:
        for result in run_checks(lambda: device, checks):
            if result.status == "failed":
                wrong.setdefault(kind_of(result.check), f"{result.check.case}: {result.reason}")
    print(json.dumps(wrong))
    return _FAULT if wrong else 0


if __name__ == "__main__":
    sys.exit(answer(json.loads(sys.argv[1])))
