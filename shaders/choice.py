"""Which implementation of WebGPU is used, and which device: the one place that decides.

`webgpu:` in a config is auto, wgpu or dawn; LORA_WEBGPU in the environment is what auto means where
it is set. Left to itself auto takes the device that wgpu-native would, and Dawn where that reaches
matrix units of it which our kernels use.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from lora.shaders.errors import InputError
from lora.shaders.facts import usable_shapes
from lora.shaders.webgpu import Found, Implementation

SETTINGS = ("auto", "wgpu", "dawn")
ENVIRONMENT = "LORA_WEBGPU"
SHARED = "shared"  # `device:` where several processes may use one; else it is auto
_LOG = logging.getLogger(__name__)  # a line on stderr, where nobody configures it
_NO_DEVICE = (
    "WebGPU found no device on this machine. Install a Vulkan driver "
    "(Debian: apt-get install mesa-vulkan-drivers) and see `lora devices`."
)
# Direct3D is what Dawn is tested most with on Windows, where all three may show one GPU; OpenGL's
# and Direct3D 11's devices repeat these and can't run our kernels.
_COMPUTE_BACKENDS = {"wgpu": ("Vulkan", "Metal", "D3D12"), "dawn": ("D3D12", "Vulkan", "Metal")}
_KINDS = {"DiscreteGPU": 0, "IntegratedGPU": 1, "CPU": 2}


@dataclass(frozen=True)
class Wanted:
    """A device as the config's `device:` names it, and an implementation as `webgpu:` does.

    Attributes:
        products: of the prompts of texts: f16 rounds both sides of a product, for matrix units.
    """

    device: str | int = "auto"
    webgpu: str = "auto"
    products: str = "f32"


class UnavailableError(Exception):
    """An implementation that can't be used here; the message says why, without a full stop."""


class NotInstalledError(UnavailableError):
    """Its package is not there."""


def asked_for(setting: str = "auto") -> str:
    """What a setting means: auto is LORA_WEBGPU's, where that is set.

    Raises:
        InputError: it is none of SETTINGS.
    """
    where = "webgpu"
    if setting == "auto":
        where, setting = ENVIRONMENT, os.environ.get(ENVIRONMENT, "") or "auto"
    if setting not in SETTINGS:
        raise InputError(f"{where}: got {setting!r}; allowed here: {', '.join(SETTINGS)}.")
    return setting


@cache
def implementation(name: str) -> Implementation:
    """The implementation of a setting, wgpu or dawn; their packages are imported here first.

    Raises:
        UnavailableError: it is not installed, or doesn't load.
    """
    if name == "wgpu":
        from lora.shaders.native import WgpuNative

        return WgpuNative()
    try:
        from lora.shaders.dawn import Dawn

        return Dawn()
    except ModuleNotFoundError as error:
        if error.name != "wgpudawn":
            raise UnavailableError(f"Dawn doesn't load ({error})") from error
        raise NotInstalledError(
            "Dawn is not installed (pip install 'webgpu-lora[dawn]')"
        ) from error
    except Exception as error:  # an alpha: whatever it is, wgpu-native goes on
        raise UnavailableError(f"Dawn doesn't load ({error})") from error


def list_devices(name: str) -> list[Found]:
    """The devices of an implementation, wgpu or dawn, that can compute, in its order.

    Raises:
        UnavailableError: as `implementation`, or it takes none of them and says why.
    """
    chosen = implementation(name)
    try:
        found = chosen.found()
    except Exception as error:
        if name == "wgpu":
            raise
        raise UnavailableError(
            f"Dawn takes no device of this machine ({error}); a newer driver may help"
        ) from error
    backends = _COMPUTE_BACKENDS[name]
    computing = [one for one in found if one.info["backend_type"] in backends]
    if name == "dawn":
        computing.sort(key=lambda one: backends.index(one.info["backend_type"]))
    return computing


def uses_matrix_units(found: Found) -> bool:
    """Whether our kernels use matrix units of a device.

    Not those that a software driver computes with the CPU's plain instructions: its products have
    a body of their own, which is faster.
    """
    return found.info["adapter_type"] != "CPU" and bool(usable_shapes(found.matrix_shapes))


def pick(found: Sequence[Found], wanted: str | int = "auto") -> Found:
    """The device of a list that the config's `device:` names.

    Where several backends show the GPU that it is (Windows: D3D12 and Vulkan), the first one that
    reaches matrix units our kernels use is taken, else the first.

    Args:
        wanted: "auto" (a discrete GPU before an integrated one before a software driver; so is
            "shared"), an index into the list, or part of a name, in any case.

    Raises:
        InputError: the list is empty, or none fits.
    """
    if not found:
        raise InputError(_NO_DEVICE)
    listing = ", ".join(f"{i}: {one.info['device']}" for i, one in enumerate(found))
    text = str(wanted)
    if text.isdigit():
        if int(text) < len(found):
            return found[int(text)]
        raise InputError(f"device: {text}: there is no device of that index; there are {listing}.")
    if text in ("auto", SHARED):
        first = min(found, key=lambda one: _KINDS.get(one.info["adapter_type"], 3))
    else:
        named = [one for one in found if text.lower() in one.info["device"].lower()]
        if not named:
            raise InputError(
                f"device: {text!r}: no device has that in its name; there are {listing}."
            )
        first = named[0]
    return next((one for one in same_gpu(found, first, found) if uses_matrix_units(one)), first)


def same_gpu(found: Sequence[Found], of: Found, among: Sequence[Found]) -> list[Found]:
    """Those devices of a list that are the same GPU as one of another list.

    Of its name and, where a machine has several of that name, in the same place among them.

    Args:
        found: the list to look in; each of its backends may show the GPU.
        of: the device, and among: the list that it is from.
    """

    def place(one: Found, listed: Sequence[Found]) -> tuple[str, int]:
        name, backend = one.info["device"], one.info["backend_type"]
        alike = [
            other
            for other in listed
            if (other.info["device"], other.info["backend_type"]) == (name, backend)
        ]
        return name, next(i for i, other in enumerate(alike) if other is one)

    wanted = place(of, among)
    return [one for one in found if place(one, found) == wanted]


@dataclass(frozen=True)
class Choice:
    """A device to open.

    Attributes:
        instead: what to open where its driver makes no device of it; None: that is an error.
    """

    found: Found
    instead: Found | None = None


def choose(
    setting: str, wanted: str | int, native: Sequence[Found], dawn: Sequence[Found]
) -> Choice:
    """The device and the implementation that a config asks for.

    Args:
        setting: wgpu, dawn, or auto.
        wanted: see `pick`; with auto an index counts wgpu-native's devices.
        native, dawn: the devices of both; those of one that is not asked for may be left out.

    Raises:
        InputError: there is no such device.
    """
    if setting == "dawn":
        return Choice(pick(dawn, wanted))
    chosen = pick(native, wanted)
    alike = same_gpu(dawn, chosen, native)
    reaching = [one for one in alike if uses_matrix_units(one)]
    if setting == "wgpu" or not reaching:
        return Choice(chosen)
    return Choice(reaching[0], instead=chosen)


def choose_device(wanted: str | int = "auto", webgpu: str = "auto") -> Choice:
    """What a config asks for, of the devices of this machine.

    Where auto finds Dawn installed and of no use, a line says so.

    Args:
        wanted: see `choose`.
        webgpu: of SETTINGS.

    Raises:
        InputError: there is no such device, or Dawn is asked for and can't be used.
    """
    setting = asked_for(webgpu)
    native: list[Found] = []
    dawn: list[Found] = []
    if setting != "dawn":
        native = list_devices("wgpu")
    if setting != "wgpu":
        try:
            dawn = list_devices("dawn")
        except UnavailableError as reason:
            if setting == "dawn":
                raise InputError(f"webgpu: dawn: {reason}; set it to auto or wgpu.") from reason
            if not isinstance(reason, NotInstalledError):
                say_once(f"webgpu: auto: {reason}; wgpu-native is used.")
    return choose(setting, wanted, native, dawn)


@cache
def say_once(line: str) -> None:
    """Logs a line for the user, once in a process."""
    _LOG.warning("%s", line)
