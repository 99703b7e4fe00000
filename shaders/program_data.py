"""Programs as plain data: written to a file, loaded in another process, and run to the same bits.

One safetensors file holds every buffer that the programs touch, as it is, and in its metadata the
kernels' WGSL, the dispatches with their grids and bindings, and the copies between them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from lora.shaders.errors import InputError
from lora.shaders.memory import ALIGNMENT, Memory
from lora.shaders.program import Copy, Dispatch, Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor
from lora.shaders.untrusted import reading
from lora.shaders.webgpu import UNIFORM, Buffer

_FORMAT = "webgpu-lora program, 1"
_HOLDS = "programs"  # the key of the metadata


def kernels_digest(programs: Iterable[Program]) -> str:
    """Of the text of all kernels that programs run and in which order, 16 hexadecimal digits.

    Two runs on one device and driver whose digests agree add up in the same order.
    """
    digest = hashlib.sha256()
    seen: dict[str, str] = {}
    for program in programs:
        for command in program.commands:
            if isinstance(command, Dispatch):
                key = _key(command.template, command.constants)
                if key not in seen:
                    seen[key] = hashlib.sha256(command.code.encode()).hexdigest()
                shapes = [(tensor.shape, tensor.dtype) for tensor in command.tensors]
                digest.update(repr((seen[key], command.workgroups, shapes)).encode())
            else:
                digest.update(repr(("copy", command.destination.shape)).encode())
    return digest.hexdigest()[:16]


def save_programs(
    path: Path, programs: Mapping[str, Program], tensors: Mapping[str, Tensor]
) -> None:
    """Writes programs of one device with the buffers that they touch, as these are now.

    Args:
        path: of the file.
        programs: by the names that they are loaded under.
        tensors: those that whoever loads the programs will want to write or read, by name.
    """
    memory = next(iter(programs.values())).recording.memory
    if not memory.holds_data:
        raise ValueError("memory that only counts has nothing to save")
    writer = _Writer()
    described = {
        name: [writer.command(command) for command in program.commands]
        for name, program in programs.items()
    }
    named = {name: writer.tensor(tensor) for name, tensor in tensors.items()}
    contents = {
        f"buffer.{place}": np.frombuffer(memory.handle.read(buffer, 0, buffer.size), np.uint8)
        for place, buffer in enumerate(writer.buffers)
    }
    metadata = {
        "format": _FORMAT,
        _HOLDS: json.dumps(
            {
                "uniforms": [bool(b.usage & UNIFORM) for b in writer.buffers],
                "kernels": writer.kernels,
                "programs": described,
                "tensors": named,
            }
        ),
    }
    path.write_bytes(safetensors.numpy.save(contents, metadata))


@dataclass(frozen=True)
class LoadedPrograms:
    """What `load_programs` found: programs ready to run, and the tensors that were named."""

    programs: dict[str, Program]
    tensors: dict[str, Tensor]


def load_programs(path: Path, recording: Recording) -> LoadedPrograms:
    """Puts the buffers of a file of `save_programs` into memory and builds its programs.

    Raises:
        InputError: no such file, or the device lacks what its kernels need.
    """
    try:
        with (
            reading(path, "a file of programs"),
            safetensors.safe_open(path, framework="numpy") as file,
        ):
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise InputError(f"{path}: not a file of programs of this version.")
            described = json.loads(metadata[_HOLDS])
            buffers = [
                _buffer(recording.memory, file.get_tensor(f"buffer.{place}"), is_uniform)
                for place, is_uniform in enumerate(described["uniforms"])
            ]
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} cannot be read as programs: {error}.") from None
    with reading(path, "a file of programs"):
        reader = _Reader(recording, buffers, described["kernels"])
        return LoadedPrograms(
            {name: reader.program(commands) for name, commands in described["programs"].items()},
            {name: reader.tensor(values) for name, values in described["tensors"].items()},
        )


def _key(template: str, constants: Mapping[str, Any]) -> str:
    return f"{template} {sorted(constants.items())!r}"


def _buffer(memory: Memory, data: np.ndarray, is_uniform: bool) -> Any:
    if is_uniform:
        tensor = memory.uniform(ALIGNMENT // 4)
    else:
        tensor = memory.empty((len(data) // 4,), "u32")
    memory.write(tensor, data.view(np.uint32))
    return tensor.buffer


class _Writer:
    """Numbers the buffers and kernels of commands as they come."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.kernels: list[dict[str, Any]] = []
        self._places: dict[int, int] = {}
        self._kernel_places: dict[str, int] = {}

    def command(self, command: Dispatch | Copy) -> dict[str, Any]:
        """A command as values that JSON holds."""
        if isinstance(command, Copy):
            source = None if command.source is None else self.tensor(command.source)
            return {"label": command.label, "copy": [source, self.tensor(command.destination)]}
        return {
            "label": command.label,
            "kernel": self._kernel(command),
            "workgroups": command.workgroups,
            "flops": command.flops,
            "tensors": [self.tensor(tensor) for tensor in command.tensors],
        }

    def tensor(self, tensor: Tensor) -> list[Any]:
        """Its buffer's number, offset in bytes, shape and type."""
        place = self._places.setdefault(id(tensor.buffer), len(self.buffers))
        if place == len(self.buffers):
            self.buffers.append(tensor.buffer)
        return [place, tensor.offset, tensor.shape, tensor.dtype]

    def _kernel(self, command: Dispatch) -> int:
        key = _key(command.template, command.constants)
        place = self._kernel_places.setdefault(key, len(self.kernels))
        if place == len(self.kernels):
            self.kernels.append(
                {
                    "template": command.template,
                    "constants": dict(command.constants),
                    "wgsl": command.code,
                }
            )
        return place


class _Reader:
    """Builds commands out of what `_Writer` made of them."""

    def __init__(
        self, recording: Recording, buffers: list[Any], kernels: list[dict[str, Any]]
    ) -> None:
        self._recording = recording
        self._buffers = buffers
        self._kernels = kernels
        self._pipelines = [recording.memory.compile(k["template"], k["wgsl"]) for k in kernels]

    def tensor(self, values: list[Any]) -> Tensor:
        """See `_Writer.tensor`."""
        place, offset, shape, dtype = values
        return Tensor(self._buffers[place], offset, tuple(shape), dtype)

    def program(self, commands: list[dict[str, Any]]) -> Program:
        """A program of these commands."""
        program = Program(self._recording)
        program.commands += [self._command(command) for command in commands]
        return program

    def _command(self, values: dict[str, Any]) -> Dispatch | Copy:
        if "copy" in values:
            source, destination = values["copy"]
            tensor = None if source is None else self.tensor(source)
            return Copy(values["label"], tensor, self.tensor(destination))
        pipeline, kernel = self._pipelines[values["kernel"]], self._kernels[values["kernel"]]
        tensors = tuple(self.tensor(tensor) for tensor in values["tensors"])
        x, y, z = values["workgroups"]
        return Dispatch(
            label=values["label"],
            template=kernel["template"],
            constants=kernel["constants"],
            pipeline=pipeline,
            bind_group=self._recording.memory.bind(pipeline, tensors),
            workgroups=(x, y, z),
            flops=values["flops"],
            tensors=tensors,
        )
