"""What a run ran on and with: `run.json`, and what reports of devices say of the software."""

from __future__ import annotations

import platform
from typing import Any

import numpy

import lora
from lora.shaders.device import Device


def versions(device: Device) -> dict[str, str]:
    """Of this program, of the implementation of WebGPU and its package, and of what they run in."""
    maker = device.found.implementation
    return {
        "webgpu-lora": lora.__version__,
        maker.package: maker.version,
        maker.name: maker.library_version,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def ran_on(device: Device) -> dict[str, Any]:
    """What stands in `run.json`, as values that JSON can hold.

    `webgpu` is the implementation as the config's key names it, whatever that key asked for;
    `adapter`, `backend` and `driver` are WebGPU's words for the device.
    """
    facts = device.facts
    return {
        "versions": versions(device),
        "webgpu": device.found.implementation.setting,
        "adapter": facts.name,
        "backend": facts.info["backend_type"],
        "driver": facts.info["description"],
        "features": sorted(facts.features),
        "matrix_shapes": [vars(shape) for shape in facts.matrix_shapes],
    }
