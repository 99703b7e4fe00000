"""Which layers are run again in the backward pass, and how much memory a run may take."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

from lora.config.sizes import size_of
from lora.forward.decoder.layers import LayerActivations
from lora.forward.model.frozen_model import Model
from lora.forward.model.inputs import Inputs
from lora.shaders.facts import DeviceFacts
from lora.shaders.memory import CountingMemory
from lora.shaders.recording import Recording
from lora.shaders.tensor import item_bytes
from lora.training.activations import allocate_layer
from lora.training.workload import Workload

KEPT_ACTIVATIONS_LIMIT = 256 << 20  # bytes: kept up to here where nothing tells the memory
# Of a device's memory, what `memory_limit: auto` takes: screens, other programs and the driver
# itself want some, and its blocks are not filled to the last byte.
_SHARE, _SHARE_OF_FREE = 0.85, 0.95


def memory_limit(facts: DeviceFacts, setting: str) -> int | None:
    """Bytes that all buffers of a run may take; None where nothing tells.

    Args:
        facts: of the device.
        setting: train.memory_limit: auto, or a size.
    """
    if setting != "auto":
        return size_of(setting)
    if facts.is_cpu:
        return None
    total, free = _of_nvidia(facts.name) or (facts.device_memory, facts.device_memory)
    if total is None or free is None:
        return None
    return int(min(_SHARE * total, _SHARE_OF_FREE * free))


@cache
def _of_nvidia(name: str) -> tuple[int, int] | None:
    """Bytes that the GPU of that name has, and has free when first asked; of several the least.

    By nvidia-smi; None where there is none, or it knows no such GPU.
    """
    if "NVIDIA" not in name.upper() and "GEFORCE" not in name.upper():
        return None
    figures = "--query-gpu=memory.total,memory.free,name"
    asked = ["nvidia-smi", figures, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = []
    for line in done.stdout.splitlines():
        total, free, own = [*(part.strip() for part in line.split(",", 2)), "", ""][:3]
        if own == name and total.isdigit() and free.isdigit():
            found.append((int(total) << 20, int(free) << 20))
    return (min(t for t, _ in found), min(f for _, f in found)) if found else None


def layer_bytes(
    recording: Recording,
    workload: Workload,
    model: Model,
    inputs: Inputs,
    shared: Mapping[int, LayerActivations],
) -> list[int]:
    """What keeping the activations of each layer takes that is not run again, the lowest first.

    Nothing for the last: its activations lie where those of layers that are run again do.

    Args:
        recording: of the run.
        workload: the run.
        model: its model.
        inputs: of a micro-batch.
        shared: activations of the layer that is being computed, by layer.
    """
    counted = CountingMemory(recording.facts)
    counting = replace(recording, memory=counted)
    factors = workload.layout.factors(counted.empty_flat(workload.layout.size, purpose="adapter"))
    layers = range(workload.layout.lowest_layer, model.architecture.n_layers)
    sizes, before = [], 0
    for layer in layers:
        allocate_layer(counting, model, inputs, factors, layer, shared[layer])
        sizes.append(counted.allocated["activations"] - before)
        before = counted.allocated["activations"]
    return [*sizes[:-1], 0] if sizes else []


def recomputed_layers(
    workload: Workload, facts: DeviceFacts, sizes: Sequence[int], everything: int, rows: int
) -> int:
    """How many of the lowest adapted layers are run again: what `train.recompute: auto` means.

    As few as the memory limit allows; where there is no limit, none while activations are few,
    else all.

    Args:
        workload: the run.
        facts: of the device.
        sizes: of `layer_bytes`.
        everything: bytes of the session with all activations kept.
        rows: of a micro-batch.
    """
    setting = workload.config.train.recompute
    if setting != "auto":
        return len(sizes) if setting == "on" else 0
    limit = memory_limit(facts, workload.config.train.memory_limit)
    if limit is None:
        kept_inputs = len(sizes) * item_bytes("f32") * rows * workload.architecture.hidden_size
        return len(sizes) if sum(sizes) + kept_inputs > KEPT_ACTIVATIONS_LIMIT else 0
    count = 0
    while everything > limit and count < len(sizes):
        everything -= sizes[count]
        count += 1
    return count
