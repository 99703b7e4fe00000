"""The errors of this project: sentences that say what is wrong, where, and how to mend it."""


class LoraError(Exception):
    """Something failed while running. The message is one or two sentences for the user."""


class InputError(LoraError):
    """What the user gave is wrong: a config, a file, a device name. Exit status 2."""


class DeviceMemoryError(LoraError):
    """The device has no room for a buffer. Who knows what the memory is for says more."""


def is_lost(error: BaseException) -> bool:
    """Whether an error says that the device is gone; both implementations have the word."""
    return isinstance(error, GPUError) and "lost" in str(error).lower()


class GPUError(Exception):
    """What a WebGPU implementation refused: code, a command, memory. Our fault, or a driver's."""
