"""When a model is balanced for f16 (`lora.forward.model.balance`): in a session, and for a plan."""

from __future__ import annotations

from lora.forward.model.balance import Balance, balanced, find_balance
from lora.forward.model.frozen_model import Model, load_model
from lora.shaders.device import Device
from lora.shaders.recording import Recording
from lora.training.precision import precision_on
from lora.training.workload import Workload


def balanced_on(
    recording: Recording, workload: Workload, model: Model, balance: Balance | None = None
) -> tuple[Model, Balance | None]:
    """The model that a step is recorded with, and what it was balanced by; None for nothing.

    DoRA compares rows of W with those of B · A, and so wants them as they are.

    Args:
        balance: of the model, where it is known; None to find it, where its weights are there.
    """
    if recording.precision != "f16" or workload.layout.dora:
        return model, None
    if balance is None:
        if not recording.memory.holds_data:
            return model, None
        balance = find_balance(recording, model)
    found = balanced(recording, model, balance)
    return found, None if found is model else balance


def read_balance(device: Device, workload: Workload) -> Balance | None:
    """The balance of a file, for a plan: the model is on the device for that long.

    Raises:
        DeviceMemoryError: there is no room for it.
        InputError: a tensor is larger than the device can bind.
    """
    precision = precision_on(device.facts, workload)
    if precision != "f16" or workload.layout.dora:
        return None
    with device.arena() as memory:
        recording = device.recording(memory=memory, precision=precision)
        model = load_model(recording, workload.gguf_file, workload.architecture, n_positions=1)
        return balanced_on(recording, workload, model)[1]
