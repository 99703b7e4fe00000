"""Which device each of several processes takes: a host's, in turn."""

from __future__ import annotations

from collections.abc import Sequence

from lora.shaders.choice import SHARED, asked_for, list_devices, pick
from lora.shaders.errors import InputError
from lora.shaders.webgpu import Found
from lora.training.communicator import Communicator


def device_of(communicator: Communicator, device: str | int, webgpu: str) -> str | int:
    """What this process opens in place of the config's `device`.

    Args:
        device, webgpu: the config's.

    Raises:
        InputError: the host has more processes than devices, and `device` is not shared.
    """
    if communicator.size == 1:
        return device
    found = list_devices("dawn" if asked_for(webgpu) == "dawn" else "wgpu")
    host = communicator.hosts[communicator.rank]
    return placed(found, device, communicator.local_rank, communicator.local_size, host)


def placed(
    found: Sequence[Found], device: str | int, local_rank: int, local_size: int, host: str
) -> int:
    """The index of the device that one of a host's processes takes.

    Args:
        found: the host's devices.
        device: the config's: auto, part of a name, an index, or shared.
        local_rank, local_size: of the process among those of its host.
        host: its name.

    Raises:
        InputError: as `device_of`.
    """
    first = pick(found, device)
    if str(device).isdigit():
        usable = [int(device)]
    else:
        kind = ("adapter_type", "backend_type")
        usable = [
            index
            for index, one in enumerate(found)
            if all(one.info[key] == first.info[key] for key in kind)
            and (device in ("auto", SHARED) or str(device).lower() in one.info["device"].lower())
        ]
    if local_size > len(usable) and device != SHARED:
        names = ", ".join(f"{index}: {found[index].info['device']}" for index in usable)
        devices = "1 device" if len(usable) == 1 else f"{len(usable)} devices"
        raise InputError(
            f"device: {local_size} processes run on {host}, which has {devices} for them "
            f"({names}); start fewer there, or set device: {SHARED} to have several use one."
        )
    return usable[local_rank % len(usable)]
