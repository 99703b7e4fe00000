"""What Tint, Chromium's compiler, says of WGSL: `python tests/support/tint.py < REQUEST`.

Dawn's Null backend compiles and checks pipelines without any driver. A process of its own, which
needs no package of ours: Dawn and wgpu-native define the same C functions.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import wgpudawn
from wgpudawn.backends.dawn import _api, extras


def null_device() -> Any:
    """A device of WebGPU's default limits that computes nothing."""
    extras.set_instance_extras(enable_toggles=["allow_unsafe_apis"])
    adapter = wgpudawn.gpu._request_adapter(
        "core", "high-performance", False, _api._NULL, _api.lib.WGPUBackendType_Null
    ).sync_wait()
    return adapter.request_device_sync(
        required_features=["subgroups", "shader-f16", "chromium-experimental-subgroup-matrix"]
    )


def refusals(texts: list[str], pipelines: list[bool]) -> list[tuple[int, str]]:
    """Index and message of each text that is refused; a pipeline is made of those marked."""
    device, refused = null_device(), []
    for index, (text, whole) in enumerate(zip(texts, pipelines, strict=True)):
        try:
            module = device.create_shader_module(code=text)
            if whole:
                device.create_compute_pipeline(
                    layout="auto", compute={"module": module, "entry_point": "main"}
                )
        except wgpudawn.GPUError as error:
            refused.append((index, str(error)))
    return refused


if __name__ == "__main__":
    request = json.load(sys.stdin)
    json.dump(refusals(request["texts"], request["pipelines"]), sys.stdout)
